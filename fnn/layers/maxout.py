"""`Maxout`: the largest of several linear functions."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.initializers import Initializer, lecun_normal, zeros
from fnn.layers.layer import Layer, initial, last_axis, set_count
from fnn.layers.linear import check_options, check_weights
from fnn.ops import maxout


@dataclasses.dataclass(frozen=True, repr=False)
class Maxout(Layer):
    """A maxout layer: y = max over i of (Wᵢ x + bᵢ), entry by entry.

    "max(w₁ᵀx + b₁, w₂ᵀx + b₂)" in CS231n's lecture on activations: relu and leaky relu are
    two special cases; it never saturates and never dies, for `pieces` times the parameters.
    Its operation is `fnn.ops.maxout`.

    Parameters: `{"W": (pieces, features, in), "b": (pieces, features)}`, or `{"W"}`. One example
    x `(in,)` gives `(features,)`; `(positions, in)` gives `(positions, features)`.

    Args:
        features: how many outputs.
        pieces: how many linear functions each output is the maximum of.
        use_bias: whether there is a b.
        weight_init: initialiser of each Wᵢ, shape `(features, in)`.
        bias_init: initialiser of each bᵢ, shape `(features,)`.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) the last axis of x isn't `in`, or the parameters aren't of
            these shapes; (from init) an initialiser makes another shape.

    Goodfellow, Warde-Farley, Mirza, Courville, Bengio, "Maxout networks", ICML 2013.
    """

    features: int
    pieces: int = 2
    _: dataclasses.KW_ONLY
    use_bias: bool = True
    weight_init: Initializer = lecun_normal
    bias_init: Initializer = zeros

    def __post_init__(self) -> None:
        set_count(self, "features")
        set_count(self, "pieces")
        check_options(self)

    def init(self, key: chex.PRNGKey, x: Any) -> dict:
        shape = (self.features, last_axis(self, x))
        arguments.key(f"{self}.init", "key", key)
        weights, biases = jax.random.split(key, (2, self.pieces))
        params = {"W": jnp.stack([initial(self, self.weight_init, k, shape) for k in weights])}
        if self.use_bias:
            made = [initial(self, self.bias_init, k, (self.features,)) for k in biases]
            params["b"] = jnp.stack(made)
        return params

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        shapes: dict[str, tuple[int, ...]] = {"W": (self.pieces, self.features, last_axis(self, x))}
        if self.use_bias:
            shapes["b"] = (self.pieces, self.features)
        check_weights(self, params, shapes, x)
        W = arguments.array(f"{self}", "W", params["W"])
        z = jnp.einsum("poi,...i->...po", W, x)
        return maxout(z + params["b"] if self.use_bias else z, axis=-2)
