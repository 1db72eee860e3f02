"""Dropout: in training, entries of x, all of it, or entries of a weight at random become 0."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax

from fnn import ops
from fnn.layers.layer import (
    Layer,
    LayerError,
    as_layer,
    check_params,
    run,
    set_number,
    weight,
)
from fnn.layers.mode import EVALUATE, Mode


@dataclasses.dataclass(frozen=True, repr=False)
class Dropout(Layer):
    """Inverted dropout: in training y = m ∘ x / (1 − rate), each mᵢ being 1 with chance 1 − rate.

    In evaluation y = x. The mean of y over m is x, so that both agree on average (CS231n, notes
    on neural networks 2). x may have any shape; y has its shape and dtype. For the backward pass
    the key is kept and not m (see `fnn.ops.dropout`). No parameters.

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
        if not _draws(self, mode):
            return x
        return ops.dropout(x, mode.key, rate=self.rate)


@dataclasses.dataclass(frozen=True, repr=False)
class DropPath(Layer):
    """Stochastic depth: in training an example's whole x becomes 0 with chance `rate`.

    Otherwise, it is x / (1 − rate). At the end of a residual branch,
    `residual(norm, attend, DropPath(0.1))`, it leaves the branch out. In evaluation y = x. x may
    have any shape; y has its shape and dtype. No parameters.

    Args:
        rate: the chance of x to become 0, from 0 to 1.

    Raises:
        TypeError, ValueError: rate is no such number.
        LayerError: (when called) mode is training and has no key.

    Huang, Sun, Liu, Sedra, Weinberger, "Deep networks with stochastic depth", ECCV 2016; the
    division is inverted dropout's.
    """

    rate: float

    def __post_init__(self) -> None:
        set_number(self, "rate", least=0, most=1)

    def __call__(self, params: Any, x: Any, mode: Mode = EVALUATE) -> Any:
        check_params(self, params, {})
        if not _draws(self, mode):
            return x
        return ops.dropout(x, mode.key, rate=self.rate, shared=None)


@dataclasses.dataclass(frozen=True, repr=False)
class DropConnect(Layer):
    """In training, entries of a layer's weight W become 0 with chance `rate`.

    The weight is `ops.dropout(W, key)`. Each example has a key of its own, and with it its own
    weights: a batch holds as many of them. In evaluation it is the layer as it is. Parameters and
    state: the layer's.

    Args:
        layer: a layer whose parameters have a W, such as `Linear(100)`.
        rate: the chance of a weight to become 0, from 0 to 1.

    Raises:
        TypeError, ValueError: layer is no layer, or rate no such number.
        LayerError: (when called) mode is training and has no key, or there is no W.

    Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of neural networks using DropConnect",
    ICML 2013; in evaluation with the mean weights, as dropout.
    """

    layer: Layer
    rate: float

    @property
    def takes_mask(self) -> bool:  # type: ignore[override]
        return self.layer.takes_mask

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", as_layer(self.layer, "DropConnect, layer"))
        set_number(self, "rate", least=0, most=1)

    def init(self, key: chex.PRNGKey, *xs: Any) -> dict:
        return self.layer.init(key, *xs)

    def init_state(self, *xs: Any) -> dict:
        return self.layer.init_state(*xs)

    def init_cache(self, length: int, *xs: Any) -> dict:
        return self.layer.init_cache(length, *xs)

    def apply(self, params: Any, state: Any, *xs: Any, mode: Mode = EVALUATE) -> tuple[Any, dict]:
        if _draws(self, mode):
            own, rest = jax.random.split(mode.key)
            params = params | {"W": ops.dropout(weight(self, params), own, rate=self.rate)}
            mode = dataclasses.replace(mode, key=rest)
        return run(self.layer, params, state, xs, mode)


def _draws(layer: Any, mode: Mode) -> bool:
    """Whether a layer drops anything now; an error if it has no key to draw from."""
    if not mode.train or layer.rate == 0:
        return False
    if mode.key is None:
        raise LayerError(
            f"{layer} draws random numbers in training, but mode has no key: "
            "mode=training(key), or fnn.fit(..., key=key) and step(state, batch, key)."
        )
    return True
