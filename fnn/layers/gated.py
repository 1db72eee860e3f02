"""`GatedMLP`: a multilayer perceptron whose hidden units are gated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax

from fnn import arguments
from fnn.initializers import Initializer, lecun_normal, zeros
from fnn.layers.layer import Layer, check_parts, last_axis, set_count
from fnn.layers.linear import Linear, check_options
from fnn.ops import silu


@dataclasses.dataclass(frozen=True, repr=False)
class GatedMLP(Layer):
    """y = W₂ (f(W_g x) ∘ W₁ x) at each position; with f = silu it is SwiGLU, as in Llama.

    x is `(..., features)`, and so is y.

    Parameters: `{"gate": {"W": (hidden, features)}, "up": {"W": (hidden, features)},
    "down": {"W": (features, hidden)}}`, each with a "b" where `use_bias`.

    Args:
        hidden: how many hidden units; two thirds of a plain layer's give as many parameters.
        activation: f, of the gate: silu (SwiGLU), gelu (GEGLU), sigmoid (GLU).
        use_bias: whether there are biases.
        weight_init, out_init: initialisers of W_g and W₁, and of W₂ (as theirs unless given).
        bias_init: initialiser of the biases.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) the parameters don't fit x.

    Shazeer, "GLU variants improve transformer", arXiv:2002.05202.
    """

    hidden: int
    activation: Callable = silu
    _: dataclasses.KW_ONLY
    use_bias: bool = False
    weight_init: Initializer = lecun_normal
    out_init: Initializer | None = None
    bias_init: Initializer = zeros

    def __post_init__(self) -> None:
        set_count(self, "hidden")
        arguments.function("GatedMLP", "activation", self.activation, "a function of arrays")
        check_options(self)
        if self.out_init is not None:
            form = "an initialiser, a function (key, shape, dtype)"
            arguments.function("GatedMLP", "out_init", self.out_init, form)

    def init(self, key: chex.PRNGKey, x: Any) -> dict:
        key = arguments.key(f"{self}.init", "key", key)
        parts = self._parts(x)
        hidden = jax.ShapeDtypeStruct((*x.shape[:-1], self.hidden), x.dtype)
        keys = jax.random.split(key, len(parts))
        return {
            name: part.init(own, hidden if name == "down" else x)
            for (name, part), own in zip(parts.items(), keys, strict=True)
        }

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        parts = self._parts(x)
        check_parts(self, params, list(parts))
        gate = self.activation(parts["gate"](params["gate"], x))
        hidden = gate * parts["up"](params["up"], x)
        return parts["down"](params["down"], hidden)

    def _parts(self, x: Any) -> dict[str, Linear]:
        def linear(features: int, init: Initializer) -> Linear:
            return Linear(
                features, use_bias=self.use_bias, weight_init=init, bias_init=self.bias_init
            )

        return {
            "gate": linear(self.hidden, self.weight_init),
            "up": linear(self.hidden, self.weight_init),
            "down": linear(last_axis(self, x), self.out_init or self.weight_init),
        }
