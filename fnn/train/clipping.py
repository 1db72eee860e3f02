"""A gradient that is too long is shortened."""

from __future__ import annotations

from typing import Any

import jax
import optax

from fnn.train.precision import wide


def clipped(gradient: Any, length: float) -> Any:
    """The gradient, scaled to the Euclidean norm `length` if it is longer.

    It is `optax.clip_by_global_norm`, computed in float32 at least: in float16 the square of 256
    overflows. (Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks",
    ICML 2013.)
    """
    clip = optax.clip_by_global_norm(length)
    long = wide(gradient)
    short, _ = clip.update(long, clip.init(long))
    return jax.tree.map(lambda new, g: new.astype(g.dtype), short, gradient)
