"""Arithmetic in which no square overflows or underflows, and sums keep their digits.

Norms and inner products are sums of squares and of products, which leave the range of a dtype
long before the norm does. So what is squared is divided by a power of two first, which is exact;
and sums are in at least float32.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax

from fnn.precision import wide


def power_of_two(m):
    """The largest power of two that is at most m, which is at least 0; 0 for 0 and nan.

    It is no smaller than the smallest normal number and no larger than one over that. Dividing by
    it is exact. It is held fixed in derivatives: what it divides, it multiplies again.
    """
    m = lax.stop_gradient(m)
    bits = {4: jnp.int32, 8: jnp.int64}[m.dtype.itemsize]
    info = jnp.finfo(m.dtype)
    exponent = jnp.asarray(((1 << info.bits - 1 - info.nmant) - 1) << info.nmant, bits)
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(m, bits) & exponent, m.dtype)
    tiny = float(info.tiny)
    power = lax.clamp(jnp.asarray(tiny, m.dtype), power, jnp.asarray(1 / tiny, m.dtype))
    return jnp.where(m > 0, power, jnp.zeros_like(m))


def divided(x, power):
    """x / power, and x where the power is 0: as where x is."""
    return x / nonzero(power).astype(x.dtype)


def nonzero(power):
    """The power, or 1 in the place of 0."""
    return jnp.where(power > 0, power, jnp.ones_like(power))


def largest(x, axes=None):
    """max |x|, or of a complex x of its parts; along some axes, which stay, or all."""
    parts = [lax.real(x), lax.imag(x)] if jnp.iscomplexobj(x) else [x]
    of_part = lambda p: jnp.max(jnp.abs(p), axes, keepdims=axes is not None, initial=0.0)
    return functools.reduce(lax.max, map(of_part, parts))


def unit(x):
    """(x / s, s), with s a power of two about as large as x's largest entry."""
    scale = power_of_two(largest(x))
    return divided(x, scale), scale


def norm_of(x, axes=None):
    """|x|, real, at least float32, over some axes or all; no square over- or underflows."""
    x = wide(x)
    scale = power_of_two(largest(x, axes))
    norm = root(jnp.sum(square(divided(x, scale)), axes))
    return norm * lax.reshape(scale, norm.shape)


def square(x):
    """|x|², entry by entry."""
    return lax.real(x) ** 2 + lax.imag(x) ** 2 if jnp.iscomplexobj(x) else lax.square(x)


def root(x):
    """√x, of a sum that may round to a little less than zero; its derivative at zero is zero."""
    is_zero = x <= 0
    return jnp.where(is_zero, jnp.zeros_like(x), jnp.sqrt(jnp.where(is_zero, jnp.ones_like(x), x)))


def vdot(x, y):
    """Re⟨x, y⟩."""
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
        return jnp.sum((x.conj() * y).real)
    return jnp.sum(x * y)


def as_dtype(x, dtype):
    """x in a dtype; its real part, where the dtype is real."""
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        x = x.real
    return x.astype(dtype)
