"""A gradient that is too long is shortened."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def clipped(gradient: Any, length: float) -> Any:
    """The gradient, scaled to the Euclidean norm `length` if it is longer.

    It is `optax.clip_by_global_norm`, computed in float32 at least: in float16 the square of 256
    overflows. (Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks",
    ICML 2013.)
    """
    clip = optax.clip_by_global_norm(length)
    wide = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), gradient)
    short, _ = clip.update(wide, clip.init(wide))
    return jax.tree.map(lambda new, g: new.astype(g.dtype), short, gradient)
