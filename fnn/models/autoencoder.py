"""The variational autoencoder: an example as a point of a plane, and any point as an example."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from fnn import arguments, ops, text
from fnn.initializers import xavier_normal
from fnn.layers import EVALUATE, Layer, LayerError, Linear, Mode, Network, chain
from fnn.layers.layer import keys_of
from fnn.layers.net import Net
from fnn.models.options import check_options
from fnn.precision import wide


class Reconstruction(NamedTuple):
    """What a VAE makes of an example x.

    Fields:
        logits: of x's entries, of x's shape: σ(logits) is the reconstruction.
        mean, log_variance: of the normal distribution of the latent z, each `(latent,)`.
    """

    logits: Any
    mean: Any
    log_variance: Any

    def __repr__(self) -> str:
        return text.of_fields("Reconstruction", **self._asdict())


def vae(
    shape: Sequence[int],
    latent: int = 20,
    hidden: int = 500,
    *,
    activation: Callable = ops.tanh,
) -> Network:
    """A VAE of examples with entries from 0 to 1, as pixels are.

        encoder     h = f(W x + b),  μ = W_μ h + b_μ,  log σ² = W_σ h + b_σ      q(z|x) = N(μ, σ²)
        sample      z = μ + σ ε with ε ~ N(0, 1) in training, z = μ in evaluation
        decoder     W' f(W" z + b") + b'                                logits of p(x|z), Bernoulli

    The gradient passes through z, for ε depends on no parameter: the reparametrisation trick.
    Train with `negative_elbo`, each example being its own target:

        model = vae((28, 28))
        loss = fnn.supervised(model, negative_elbo)          # on data (images, images)

    Args:
        shape: an example's.
        latent: how many numbers z has.
        hidden: how many hidden units encoder and decoder have.
        activation: f.

    Returns:
        A Network of one input x, `shape`, that returns a `Reconstruction`. `decode` shows what is
        at a point z. In training it needs a key.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) x has another shape, or in training there is no key.

    Kingma, Welling, "Auto-encoding variational Bayes", ICLR 2014, with the networks of appendix C.
    """
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"vae: shape must be an example's shape, but got {arguments.show(shape)}.")
    sizes = tuple(arguments.integer("vae", "shape", n, least=1) for n in shape)
    check_options("vae", latent=latent, hidden=hidden)
    linear = lambda features: Linear(features, weight_init=xavier_normal)
    parts = {
        "encode": chain(flatten=Flatten(sizes), hidden=linear(hidden), activation=activation),
        "mean": linear(latent),
        "log_variance": linear(latent),
        "sample": Sample(),
        "decode": chain(
            hidden=linear(hidden),
            activation=activation,
            output=linear(math.prod(sizes)),
            unflatten=Reshape(sizes),
        ),
    }
    return Network(_vae, parts)


def _vae(net: Net, x: Any) -> Reconstruction:
    h = net.encode(x)
    mean, log_variance = net.mean(h), net.log_variance(h)
    z = net.sample(mean, log_variance)
    return Reconstruction(net.decode(z), mean, log_variance)


def negative_elbo(output: Reconstruction, x: chex.Array, *, beta: float = 1.0) -> jax.Array:
    """−log p(x|z) + β KL(q(z|x) ‖ N(0, 1)), an upper bound of −log p(x) on average over z (β = 1).

    The first term is `sigmoid_binary_cross_entropy(logits, x)`. The second is

        ½ Σ (μ² + σ² − 1 − log σ²)

    Args:
        output: what a VAE made of x.
        x: entries from 0 to 1.
        beta: β. Above 1, latents are more independent and images less sharp.

    Returns:
        The loss in nats, a scalar: the sum over entries and latents.

    Raises:
        TypeError, ValueError: beta is no number of at least 0, or x isn't of the logits' shape.

    Kingma, Welling 2014, equation 10; Higgins et al., "beta-VAE", ICLR 2017 (β).
    """
    arguments.number("negative_elbo", "beta", beta, least=0)
    mean, s = map(wide, output[1:])
    # e^s − 1 − s near s = 0, without cancelling more than is needed.
    divergence = 0.5 * jnp.sum(jnp.square(mean) + (jnp.expm1(s) - s))
    if jnp.shape(x) != output.logits.shape:
        raise ValueError(
            f"negative_elbo: argument 'x' has shape {jnp.shape(x)}, wanted {output.logits.shape}, "
            "the shape of the logits."
        )
    error = ops.sigmoid_binary_cross_entropy(output.logits, x)
    return error + (jnp.asarray(beta, divergence.dtype) * divergence).astype(error.dtype)


def decode(model: Network, params: dict, z: chex.Array) -> jax.Array:
    """The example at a point z of a VAE's latent space: σ(decoder(z)), entries from 0 to 1.

    Args:
        model: made by `vae`.
        params: its parameters.
        z: `(latent,)`. Drawn from N(0, 1), it gives an example of the model's own.

    Raises:
        TypeError: model isn't made by `vae`.
        LayerError: the parameters don't fit, or z.
    """
    decoder = dict(model.parts).get("decode") if isinstance(model, Network) else None
    if decoder is None:
        raise TypeError(f"decode: model must be made by vae, but got {arguments.show(model)}.")
    if not isinstance(params, dict) or "decode" not in params:
        raise LayerError(
            "decode wants the model's parameters, with the key 'decode', but got "
            f"{keys_of(params)}."
        )
    return ops.sigmoid(decoder(params["decode"], z))


@dataclasses.dataclass(frozen=True, repr=False)
class Flatten(Layer):
    """An array of the shape that is wanted, as a vector."""

    shape: tuple[int, ...]

    def __call__(self, params: Any, x: Any) -> Any:
        if getattr(x, "shape", None) != self.shape:
            raise LayerError(f"wants an input of shape {self.shape}, but got {arguments.show(x)}.")
        return x.reshape(-1)


@dataclasses.dataclass(frozen=True, repr=False)
class Reshape(Layer):
    """A vector as an array of this shape."""

    shape: tuple[int, ...]

    def __call__(self, params: Any, x: Any) -> Any:
        return x.reshape(self.shape)


@dataclasses.dataclass(frozen=True, repr=False)
class Sample(Layer):
    """z = μ + σ ε in training; μ in evaluation."""

    def __call__(self, params: Any, mean: Any, log_variance: Any, mode: Mode = EVALUATE) -> Any:
        if not mode.train:
            return mean
        if mode.key is None:
            raise LayerError(
                "draws z in training, but mode has no key: mode=training(key), or "
                "fnn.fit(..., key=key) and step(state, batch, key)."
            )
        return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(
            mode.key, mean.shape, mean.dtype
        )
