"""`Dropout`: in training, some entries at random become 0."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fnn.layers.layer import Layer, LayerError, check_params, set_number
from fnn.layers.mode import EVALUATE, Mode


@dataclasses.dataclass(frozen=True, repr=False)
class Dropout(Layer):
    """Inverted dropout: in training y = m ∘ x / (1 − rate), each mᵢ being 1 with chance 1 − rate.

    In evaluation y = x. The mean of y over m is x, so that both agree on average (CS231n, notes
    on neural networks 2). x may have any shape; y has its shape and dtype. No parameters.

    Args:
        rate: the chance of an entry to become 0, from 0 to 1.

    Raises:
        TypeError, ValueError: rate is no such number.
        LayerError: (when called) mode is training and has no key.

    Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout", JMLR 2014.
    """

    rate: float

    def __post_init__(self) -> None:
        set_number(self, "rate", least=0, most=1)

    def __call__(self, params: Any, x: Any, mode: Mode = EVALUATE) -> Any:
        check_params(self, params, {})
        if not mode.train or self.rate == 0:
            return x
        if mode.key is None:
            raise LayerError(
                f"{self} draws random numbers in training, but mode has no key: "
                "mode=training(key), or fnn.fit(..., key=key) and step(state, batch, key)."
            )
        if self.rate == 1:
            return jnp.zeros_like(x)
        keep = jax.random.bernoulli(mode.key, 1 - self.rate, jnp.shape(x))
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))
