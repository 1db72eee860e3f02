"""`Maxout`: the largest of several linear functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.initializers import Initializer, lecun_normal, zeros
from fnn.layers.layer import Layer, constructor
from fnn.layers.linear import check_options, initial, last_axis, parameter_dtype, weight_and_bias
from fnn.ops import maxout


@constructor
def Maxout(
    features: int,
    pieces: int = 2,
    *,
    use_bias: bool = True,
    weight_init: Initializer = lecun_normal,
    bias_init: Initializer = zeros,
    dtype: Any = None,
) -> Layer:
    """A maxout layer: y = max over i of (Wᵢ x + bᵢ), entry by entry.

    "max(w₁ᵀx + b₁, w₂ᵀx + b₂)" in CS231n's lecture on activations: relu and leaky relu are
    two special cases; it never saturates and never dies, for `pieces` times the parameters.
    Its operation is `fnn.ops.maxout`.

    Args:
        features: how many outputs.
        pieces: how many linear functions each output is the maximum of.
        use_bias: whether there is a b.
        weight_init: initialiser of each Wᵢ, shape `(features, in)`.
        bias_init: initialiser of each bᵢ, shape `(features,)`.
        dtype: of the parameters; by default that of x (float32 for integer x).

    Returns:
        A Layer with parameters `{"W": (pieces, features, in), "b": (pieces, features)}`. One
        example x `(in,)` gives `(features,)`; `(positions, in)` gives `(positions, features)`.

    Raises:
        TypeError, ValueError: an option isn't of its kind, or (from init) the key is no key, or
            an initialiser makes another shape.
        ValueError: the last axis of x isn't `in`, or the parameters aren't a Maxout's.

    Goodfellow, Warde-Farley, Mirza, Courville, Bengio, "Maxout networks", ICML 2013.
    """
    features = arguments.integer("Maxout", "features", features, least=1)
    pieces = arguments.integer("Maxout", "pieces", pieces, least=1)
    check_options("Maxout", use_bias, weight_init, bias_init, dtype)
    name = f"Maxout({features}, {pieces})"

    def init(key, x):
        shape, kind = (features, last_axis(name, x)), parameter_dtype(dtype, x)
        keys = jax.random.split(arguments.key(name, "key", key), (2, pieces))
        params = {"W": jnp.stack([initial(name, weight_init, k, shape, kind) for k in keys[0]])}
        if use_bias:
            biases = [initial(name, bias_init, k, (features,), kind) for k in keys[1]]
            params["b"] = jnp.stack(biases)
        return params

    def apply(params, x):
        W, b = weight_and_bias(name, params, use_bias)
        if last_axis(name, x) != W.shape[-1]:
            raise ValueError(
                f"{name}: its W has shape {W.shape}, so it wants an input of shape "
                f"({W.shape[-1]},), but got {x.shape}."
            )
        z = jnp.einsum("poi,...i->...po", W, x)
        return maxout(z if b is None else z + b, axis=-2)

    return Layer(init, apply)
