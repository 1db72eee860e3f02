"""`Once`: a layer that is computed in the first step of a generation, and remembered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from fnn import arguments
from fnn.layers.layer import Layer, as_layer, run
from fnn.layers.mode import EVALUATE, Mode


@dataclasses.dataclass(frozen=True, repr=False)
class Once(Layer):
    """A layer of something that stays the same from step to step, such as a text to translate.

    Without a cache it is the layer itself. With one (`init_cache`) the first call computes the
    layer, and the cache keeps the output; every further call gives that, and looks at none of its
    inputs. So an encoder runs once, however many tokens are generated from what it says.

    Parameters: the layer's. State: the layer's, or `{"cache": {"y": …, "is_there": ()}}`.

    Args:
        layer: a layer, or a plain function of arrays, whose output is an array or a tree of them.

    Raises:
        TypeError: layer is no layer.

    >>> from fnn.layers import Linear
    >>> encode = Once(Linear(2))
    >>> x = jnp.ones(3)
    >>> params, cache = encode.init(jax.random.key(0), x), encode.init_cache(10, x)
    >>> y, cache = encode.extend(params, cache, x)
    >>> again, cache = encode.extend(params, cache, 5 * x)
    >>> bool(jnp.all(again == y))
    True
    """

    layer: Layer

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", as_layer(self.layer, "Once"))

    def init(self, key: chex.PRNGKey, *xs: Any) -> dict:
        return self.layer.init(key, *xs)

    def init_state(self, *xs: Any) -> dict:
        return self.layer.init_state(*xs)

    def init_cache(self, length: int, *xs: Any) -> dict:
        output = lambda *xs: self.layer._make(jax.random.key(0), None, *xs)[2]
        y = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), jax.eval_shape(output, *xs))
        return {"cache": {"y": y, "is_there": jnp.zeros((), bool)}}

    def apply(self, params: Any, state: Any, *xs: Any, mode: Mode = EVALUATE) -> tuple[Any, dict]:
        cache = state.get("cache") if isinstance(state, dict) else None
        if cache is None:
            return run(self.layer, params, state, xs, mode)
        own = {kind: part for kind, part in state.items() if kind != "cache"}
        compute = lambda: run(self.layer, params, own, xs, mode)[0]
        y = unless_there(cache["is_there"], cache["y"], compute)
        return y, state | {"cache": {"y": y, "is_there": jnp.ones((), bool)}}


def unless_there(is_there: Any, kept: Any, compute: Callable[[], Any]) -> Any:
    """What is kept, if it is there; else what `compute()` gives, in the same dtypes."""

    def computed():
        return jax.tree.map(lambda y, old: y.astype(old.dtype), compute(), kept)

    if arguments.is_known(is_there):
        return kept if is_there else computed()
    return lax.cond(is_there, lambda: kept, computed)
