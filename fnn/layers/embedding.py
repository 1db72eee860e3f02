"""`Embedding` of tokens, and what tells positions: `PositionEmbedding`, `SinusoidalPositions`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax.numpy as jnp

from fnn import arguments
from fnn.initializers import Initializer, normal
from fnn.layers.layer import Layer, LayerError, check_params, initial, last_axis, set_count
from fnn.layers.mode import EVALUATE, Mode
from fnn.ops import embedding, sinusoidal_positions

_init = functools.partial(normal, stddev=0.02)


@dataclasses.dataclass(frozen=True, repr=False)
class Embedding(Layer):
    """A table with a row of `features` numbers for each token: y = E[x].

    x holds tokens, integers from 0 to vocabulary − 1, of any shape `(...)`; y is
    `(..., features)`. A token out of range raises a ValueError, in compiled code it gives NaN.

    Parameters: `{"E": (vocabulary, features)}`. A network whose output layer has the same weights
    takes them from there: `h @ net.params["embed"]["E"].T`.

    Args:
        vocabulary: how many tokens there are.
        features: how many numbers stand for each.
        init_table: initialiser of E.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) the parameters aren't of this shape.
    """

    vocabulary: int
    features: int
    _: dataclasses.KW_ONLY
    init_table: Initializer = _init

    def __post_init__(self) -> None:
        set_count(self, "vocabulary")
        set_count(self, "features")
        _check_initializer(self, "init_table")

    def init(self, key: chex.PRNGKey, x: Any) -> dict:
        arguments.key(f"{self}.init", "key", key)
        return {"E": initial(self, self.init_table, key, (self.vocabulary, self.features))}

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        check_params(self, params, {"E": (self.vocabulary, self.features)})
        return embedding(params["E"], x)


@dataclasses.dataclass(frozen=True, repr=False)
class _Positions(Layer):
    """What the layers that add something at each position have in common: the cache.

    It holds the position that comes next.
    """

    def init_cache(self, length: int, x: Any) -> dict:
        return {"cache": {"position": jnp.zeros((), jnp.int32)}}

    def apply(self, params: Any, state: Any, x: Any, mode: Mode = EVALUATE) -> tuple[Any, dict]:
        if getattr(x, "ndim", 0) != 2:
            raise LayerError(
                f"{self} wants an input of shape (positions, features), but got "
                f"{arguments.show(x)}."
            )
        positions = jnp.arange(x.shape[0], dtype=jnp.int32)
        if "cache" not in state:
            return x + self._at(params, positions, x), state
        start = state["cache"]["position"]
        y = x + self._at(params, start + positions, x)
        return y, state | {"cache": {"position": start + x.shape[0]}}

    def _at(self, params: Any, positions: Any, x: Any) -> Any:
        """What is added, (positions, features)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, repr=False)
class PositionEmbedding(_Positions):
    """y = x + P[0, 1, 2, ...]: to each position a vector of its own is added, which is learned.

    x is `(positions, features)`. With a cache the positions go on from those before.

    Parameters: `{"P": (length, features)}`.

    Args:
        length: how many positions there are at most.
        init_table: initialiser of P.

    Raises:
        TypeError, ValueError: an option isn't of its kind, or (where the cache is known) the
            positions go beyond the length. In compiled code those give NaN.
        LayerError: (when called) x has more positions than there are, or the parameters aren't of
            this shape.

    Gehring et al., "Convolutional sequence to sequence learning", arXiv:1705.03122; as in GPT,
    BERT and ViT.
    """

    length: int
    _: dataclasses.KW_ONLY
    init_table: Initializer = _init

    def __post_init__(self) -> None:
        set_count(self, "length")
        _check_initializer(self, "init_table")

    def init(self, key: chex.PRNGKey, x: Any) -> dict:
        arguments.key(f"{self}.init", "key", key)
        return {"P": initial(self, self.init_table, key, (self.length, last_axis(self, x)))}

    def init_cache(self, length: int, x: Any) -> dict:
        if length > self.length:
            raise LayerError(
                f"{self} has {self.length} positions, fewer than a cache of length {length} needs."
            )
        return super().init_cache(length, x)

    def _at(self, params: Any, positions: Any, x: Any) -> Any:
        if x.shape[0] > self.length:
            raise LayerError(
                f"{self} has {self.length} positions, but got an input of shape {x.shape}."
            )
        check_params(self, params, {"P": (self.length, x.shape[-1])}, x)
        return embedding(params["P"], positions)


@dataclasses.dataclass(frozen=True, repr=False)
class SinusoidalPositions(_Positions):
    """y = x + PE(0, 1, 2, ...): sines and cosines of wavelengths from 2π to 2π · base are added.

    x is `(positions, features)`. With a cache the positions go on from those before. No
    parameters. See `fnn.ops.sinusoidal_positions`.

    Args:
        base: of the wavelengths.

    Raises:
        TypeError, ValueError: base is no positive number.
        LayerError: (when called) x isn't `(positions, features)`.

    Vaswani et al., "Attention is all you need", arXiv:1706.03762, section 3.5.
    """

    base: float = 10000.0

    def __post_init__(self) -> None:
        value = arguments.number("SinusoidalPositions", "base", self.base, above=0)
        object.__setattr__(self, "base", float(value))

    def _at(self, params: Any, positions: Any, x: Any) -> Any:
        check_params(self, params, {})
        y = sinusoidal_positions(positions, x.shape[-1], base=self.base)
        return y.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else y


def _check_initializer(layer: Layer, option: str) -> None:
    form = "an initialiser, a function (key, shape, dtype)"
    arguments.function(type(layer).__name__, option, getattr(layer, option), form)
