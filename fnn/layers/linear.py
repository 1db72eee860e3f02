"""`Linear`: W x + b."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.initializers import Initializer, he_normal, zeros
from fnn.layers.layer import Layer, constructor, name_of


@constructor
def Linear(
    features: int,
    *,
    use_bias: bool = True,
    weight_init: Initializer = he_normal,
    bias_init: Initializer = zeros,
    dtype: Any = None,
) -> Layer:
    """A linear (affine) layer: y = W x + b, the score function of CS231n's lecture 2.

    One example x has shape `(in,)` and gives y of shape `(features,)`. An x with axes before
    the last, `(positions, in)` say, gives `(positions, features)`: the same W at each.

    Args:
        features: how many outputs.
        use_bias: whether there is a b.
        weight_init: initialiser of W, shape `(features, in)`. He's is made for a relu that
            follows; prefer `xavier_uniform` before tanh, `lecun_normal` before selu.
        bias_init: initialiser of b, shape `(features,)`.
        dtype: of the parameters; by default that of x (float32 for integer x).

    Returns:
        A Layer with parameters `{"W": (features, in), "b": (features,)}`, or `{"W"}`.

    Raises:
        TypeError, ValueError: an option isn't of its kind, or (from init) the key is no key, or
            an initialiser makes another shape.
        ValueError: the last axis of x isn't `in`, or the parameters aren't a Linear's.

    >>> layer = Linear(3)
    >>> params = layer.init(jax.random.key(0), jnp.zeros(4))
    >>> jax.tree.map(jnp.shape, params)
    {'W': (3, 4), 'b': (3,)}
    >>> layer.apply(params, jnp.ones(4)).shape
    (3,)
    """
    features = arguments.integer("Linear", "features", features, least=1)
    check_options("Linear", use_bias, weight_init, bias_init, dtype)
    name = f"Linear({features})"

    def init(key, x):
        inputs = last_axis(name, x)
        kind = parameter_dtype(dtype, x)
        weight_key, bias_key = jax.random.split(arguments.key(name, "key", key))
        params = {"W": initial(name, weight_init, weight_key, (features, inputs), kind)}
        if use_bias:
            params["b"] = initial(name, bias_init, bias_key, (features,), kind)
        return params

    def apply(params, x):
        W, b = weight_and_bias(name, params, use_bias)
        if last_axis(name, x) != W.shape[-1]:
            raise ValueError(
                f"{name}: its W has shape {W.shape}, so it wants an input of shape "
                f"({W.shape[-1]},), but got {x.shape}."
            )
        y = W @ x if x.ndim == 1 else x @ W.T
        return y if b is None else y + b

    return Layer(init, apply)


def check_options(where: str, use_bias: Any, weight_init: Any, bias_init: Any, dtype: Any) -> None:
    """Check what the layers with weights and a bias have in common."""
    arguments.flag(where, "use_bias", use_bias)
    for name, value in {"weight_init": weight_init, "bias_init": bias_init}.items():
        arguments.function(where, name, value, "an initialiser, a function (key, shape, dtype)")
    if dtype is not None:
        arguments.floating_dtype(where, "dtype", dtype)


def initial(name: str, initializer: Initializer, key: Any, shape: tuple, dtype: Any) -> jax.Array:
    """What an initialiser makes, checked: a wrong shape would be broadcast in silence."""
    made = initializer(key, shape, dtype)
    if getattr(made, "shape", None) != shape:
        raise ValueError(
            f"{name}: the initialiser {name_of(initializer)} must make an array of shape {shape}, "
            f"but made {arguments.show(made)}."
        )
    return made


def last_axis(name: str, x: Any) -> int:
    """The length of the last axis of a layer's input."""
    if not hasattr(x, "shape") or len(x.shape) == 0:
        got = f"shape {x.shape}" if hasattr(x, "shape") else arguments.show(x)
        raise ValueError(f"{name}: wants an array of shape (in,) as its input, but got {got}.")
    return x.shape[-1]


def parameter_dtype(dtype: Any, x: Any) -> Any:
    """The given dtype, or that of x if it has fractions, or else JAX's default float."""
    if dtype is not None:
        return dtype
    return x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.result_type(float)


def weight_and_bias(name: str, params: Any, use_bias: bool) -> tuple[jax.Array, Any]:
    """W and b (None without a bias) from a layer's parameters."""
    wanted = {"W", "b"} if use_bias else {"W"}
    if not isinstance(params, dict) or set(params) != wanted:
        known = isinstance(params, dict)
        got = sorted(map(str, params)) if known else f"{type(params).__name__} {params!r:.60}"
        raise ValueError(f"{name}: wants parameters with the keys {sorted(wanted)}, but got {got}.")
    return params["W"], params.get("b")
