"""How a sequence's positions are told to a network whose operations don't know them."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments
from fnn.ops.arguments import is_integer, must_be_real
from fnn.precision import wide


def rotary(
    x: chex.Array, positions: chex.Array | None = None, *, base: float = 10000.0
) -> jax.Array:
    """Rotary position embedding: each pair of features turned by an angle.

    Feature i is paired with feature i + features/2 (as in GPT-NeoX and in Llama's layout at
    Hugging Face; the paper pairs neighbours), and both are turned by the angle
    position · base^(−2i/features):

        yᵢ = xᵢ cos − xᵢ₊ₙ sin,    yᵢ₊ₙ = xᵢ₊ₙ cos + xᵢ sin,    n = features / 2

    The inner product of a turned query and a turned key depends on the difference of their
    positions alone.

    Args:
        x: floating, shape `(positions, ..., features)` with an even number of features; queries or
            keys `(positions, heads, features)`.
        positions: integers of shape `(positions,)`; 0, 1, 2, ... unless given.
        base: θ. 10000 in the paper and in Llama 1 and 2, 500000 in Llama 3.

    Returns:
        y, of x's shape and dtype; the angles are in at least float32.

    Linear in x: its gradient is turned back. No rule of its own: JAX keeps the cosines and sines
    of each position, which the heads share.

    Raises:
        TypeError: x isn't real floating, or the positions aren't integers.
        ValueError: shapes that don't fit, or a base that isn't positive.

    Su et al., "RoFormer", arXiv:2104.09864.
    """
    must_be_real("rotary", x=x)
    x = jnp.asarray(x)
    arguments.number("rotary", "base", base, above=0)
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ValueError(
            f"rotary: argument 'x' has shape {x.shape}, wanted (positions, ..., features) with an "
            "even number of features."
        )
    positions = _positions("rotary", positions, x.shape[0])
    half = x.shape[-1] // 2
    z = wide(x)
    rates = jnp.asarray(base ** (-np.arange(half) / max(half, 1)), z.dtype)
    angles = positions.astype(z.dtype)[:, None] * rates[None]
    angles = angles.reshape(x.shape[0], *(1,) * (x.ndim - 2), half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = z[..., :half], z[..., half:]
    y = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return y.astype(x.dtype)


def sinusoidal_positions(
    positions: chex.Array, features: int, *, base: float = 10000.0
) -> jax.Array:
    """PE(t, 2i) = sin(t / base^(2i/features)), PE(t, 2i+1) = cos of the same.

    Args:
        positions: t, integers of any shape `(...)`.
        features: how many.
        base: of the wavelengths, from 2π to 2π · base.

    Returns:
        Shape `(..., features)`, float32 (float64 under x64): to be added to an embedding.

    Raises:
        TypeError: the positions aren't integers.
        ValueError: no features, or a base that isn't positive.

    Vaswani et al., "Attention is all you need", arXiv:1706.03762, section 3.5.
    """
    arguments.integer("sinusoidal_positions", "features", features, least=1)
    arguments.number("sinusoidal_positions", "base", base, above=0)
    _must_be_integers("sinusoidal_positions", positions)
    kind = jnp.result_type(float)
    pairs = np.arange(features) // 2
    rates = jnp.asarray(base ** (-2 * pairs / features), kind)
    angles = jnp.asarray(positions).astype(kind)[..., None] * rates.reshape(
        (1,) * jnp.ndim(positions) + (features,)
    )
    is_sine = (np.arange(features) % 2 == 0).reshape((1,) * jnp.ndim(positions) + (features,))
    return jnp.where(is_sine, jnp.sin(angles), jnp.cos(angles))


def alibi_slopes(heads: int) -> jax.Array:
    """ALiBi's slope for each head, for `attention(..., slopes=...)`: 2^(−8/n), 2^(−16/n), ..., 2⁻⁸.

    For a number of heads that is no power of two: those of the next smaller power, and between them
    every other one of twice as many heads, as in the paper's code.

    Args:
        heads: how many, n.

    Returns:
        Shape `(heads,)`, float32 (float64 under x64).

    Raises:
        TypeError, ValueError: heads is no integer of at least 1.

    Press, Smith, Lewis, "Train short, test long", arXiv:2108.12409.
    """
    heads = arguments.integer("alibi_slopes", "heads", heads, least=1)
    power = 2 ** int(math.log2(heads))
    of = lambda n: 2.0 ** (-8 * np.arange(1, n + 1) / n)
    slopes = np.concatenate([of(power), of(2 * power)[::2][: heads - power]])
    return jnp.asarray(slopes, jnp.result_type(float))


def _positions(op: str, positions, count: int):
    if positions is None:
        return jnp.arange(count, dtype=jnp.int32)
    _must_be_integers(op, positions)
    if positions.shape != (count,):
        raise ValueError(
            f"{op}: argument 'positions' has shape {positions.shape}, wanted {(count,)}, one for "
            "each of x's first axis."
        )
    return positions


def _must_be_integers(op: str, positions) -> None:
    arguments.array(op, "positions", positions)
    if not is_integer(jax.typeof(positions)):
        raise TypeError(
            f"{op}: argument 'positions' has dtype {jax.typeof(positions).dtype}, wanted integers."
        )
