"""`Linear`: W x + b."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import jax

from fnn import arguments
from fnn.initializers import Initializer, he_normal, zeros
from fnn.layers.layer import Layer, LayerError, check_params, initial, last_axis, set_count


@dataclasses.dataclass(frozen=True, repr=False)
class Linear(Layer):
    """A linear (affine) layer: y = W x + b, the score function of CS231n's lecture 2.

    One example x has shape `(in,)` and gives y of shape `(features,)`. An x with axes before
    the last, `(positions, in)` say, gives `(positions, features)`: the same W at each.

    Parameters: `{"W": (features, in), "b": (features,)}`, or `{"W"}`.

    Args:
        features: how many outputs.
        use_bias: whether there is a b.
        weight_init: initialiser of W, shape `(features, in)`. He's is made for a relu that
            follows; prefer `xavier_uniform` before tanh, `lecun_normal` before selu.
        bias_init: initialiser of b, shape `(features,)`.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) the last axis of x isn't `in`, or the parameters aren't of
            these shapes; (from init) an initialiser makes another shape.

    >>> layer = Linear(3)
    >>> params = layer.init(jax.random.key(0), jnp.zeros(4))
    >>> jax.tree.map(jnp.shape, params)
    {'W': (3, 4), 'b': (3,)}
    >>> layer(params, jnp.ones(4)).shape
    (3,)
    """

    features: int
    _: dataclasses.KW_ONLY
    use_bias: bool = True
    weight_init: Initializer = he_normal
    bias_init: Initializer = zeros

    def __post_init__(self) -> None:
        set_count(self, "features")
        check_options(self)

    def init(self, key: chex.PRNGKey, x: Any) -> dict:
        inputs = last_axis(self, x)
        weight_key, bias_key = jax.random.split(arguments.key(f"{self}.init", "key", key))
        params = {"W": initial(self, self.weight_init, weight_key, (self.features, inputs))}
        if self.use_bias:
            params["b"] = initial(self, self.bias_init, bias_key, (self.features,))
        return params

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        inputs = last_axis(self, x)
        shapes: dict[str, tuple[int, ...]] = {"W": (self.features, inputs)}
        if self.use_bias:
            shapes["b"] = (self.features,)
        check_weights(self, params, shapes, x)
        W = params["W"]
        y = W @ x if x.ndim == 1 else x @ W.T
        return y + params["b"] if self.use_bias else y


def check_options(layer: Any) -> None:
    """Check what the layers with weights and a bias have in common."""
    name = type(layer).__name__
    arguments.flag(name, "use_bias", layer.use_bias)
    for option in ("weight_init", "bias_init"):
        form, value = "an initialiser, a function (key, shape, dtype)", getattr(layer, option)
        if value is not getattr(type(layer), option):  # the default
            arguments.function(name, option, value, form)


def check_weights(layer: Layer, params: Any, shapes: Mapping[str, tuple[int, ...]], x: Any) -> None:
    """`check_params`; where W fits but for the last axis, it is the input that is wrong."""
    W = params.get("W") if isinstance(params, dict) else None
    wanted, got = shapes["W"], getattr(W, "shape", None)
    if got is not None and got[:-1] == wanted[:-1] and got != wanted:
        raise LayerError(
            f"{layer} has a W of shape {got}, so it wants an input of shape ({got[-1]},), but got "
            f"{x.shape}."
        )
    check_params(layer, params, shapes, x)
