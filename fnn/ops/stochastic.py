"""Dropout: entries at random become 0. Which ones, the backward pass draws again from the key."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.meshes import barrier
from fnn.operation import compiled_rule as rule
from fnn.ops.arguments import axes_of, must_be_real
from fnn.precision import wide


@rule
def dropout(
    x: chex.Array, key: chex.PRNGKey, *, rate: float, shared: int | tuple[int, ...] | None = ()
) -> jax.Array:
    """y = m ∘ x / (1 − rate), each mᵢ being 1 with chance 1 − rate, and 0 otherwise.

    The mean of y over m is x. Each entry takes 16 random bits, half of what a uniform number
    takes: the rate is rounded to a multiple of 2⁻¹⁶ (but not to 0 or 1).

    Args:
        x: floating, any shape.
        key: what m is drawn from, typed or raw.
        rate: the chance of an entry to become 0, from 0 to 1.
        shared: the axes along which all entries live or die together, one draw for all: the
            pixels of a channel (Tompson et al. 2015), or all axes (None) of a residual branch
            (`DropPath`).

    Returns:
        y, of x's shape and dtype. Where m is 0 it is 0, whatever x is.

    Local gradient: m / (1 − rate). Kept: the key alone; the backward pass draws m a second time.
    (When it does so is the compiler's choice: XLA's scheduler for CPUs may draw many masks of a
    program early, though not those of a loop such as `fnn.layers.repeat`.) Linear in x.

    Raises:
        TypeError: x isn't real floating, key is no key, or an option isn't of its kind.
        ValueError: rate isn't from 0 to 1, or x has no such axis.

    Sources: Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout", JMLR 2014;
    CS231n, notes on neural networks 2 ("inverted dropout").
    """
    must_be_real("dropout", x=x)
    arguments.key("dropout", "key", key)
    arguments.number("dropout", "rate", rate, least=0, most=1)
    return _dropped(x, key, rate, axes_of("dropout", x, shared))


@dropout.forward
def _(x, key, *, rate, shared):
    return dropout(x, key, rate=rate, shared=shared), key


@dropout.backward
def _(key, g, *, rate, shared):
    return _dropped(g, _apart(key), rate, axes_of("dropout", g, shared)), None


def _apart(key):
    """The key, as if it were another.

    The compiler would see that both passes draw the same numbers, and keep those of the first.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return barrier(key)
    data = barrier(jax.random.key_data(key))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def _dropped(x, key, rate, shared):
    if rate in (0, 1):
        return x if rate == 0 else jnp.zeros_like(x)
    shape = tuple(1 if axis in shared else size for axis, size in enumerate(x.shape))
    count = _dropping(rate)
    # In 16-bit floats 1 − rate would be rounded, and the mean of y with it.
    y = (wide(x) / (1 - count / 2**16)).astype(x.dtype)
    return jnp.where(kept(key, shape, rate), y, jnp.zeros_like(x))


def kept(key: chex.PRNGKey, shape: tuple[int, ...], rate: float) -> jax.Array:
    """m, as booleans: of each 32 random bits one half decides on an entry, one on another."""
    *others, last = shape or (1,)
    bits = jax.random.bits(key, (*others, (last + 1) // 2), jnp.uint32)
    count = jnp.uint32(_dropping(rate))
    halves = (bits >> jnp.uint32(16)) >= count, (bits & jnp.uint32(2**16 - 1)) >= count
    return jnp.concatenate(halves, axis=-1)[..., :last].reshape(shape)


def _dropping(rate: float) -> int:
    """Of 2¹⁶ numbers, how many drop an entry."""
    return min(max(round(rate * 2**16), 1), 2**16 - 1)
