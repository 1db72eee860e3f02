"""Gated activations: a number times a gate.

`silu`, `gelu`, `mish` and `hard_silu` compute the gate, between 0 and 1, from the number itself.
`glu`, `swiglu` and `geglu` take it from the other half of the features.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.operation import compiled_rule as rule
from fnn.ops.arguments import axis_of, must_be_real
from fnn.precision import wide


@rule
def silu(x: chex.Array) -> jax.Array:
    """silu(x) = x σ(x), also called swish. Any shape.

    Local gradient: σ(x) (1 + x (1 − σ(x))). Kept: x. Smooth, no kink.
    Source: Hendrycks, Gimpel, arXiv:1606.08415; Ramachandran, Zoph, Le, arXiv:1710.05941.
    """
    must_be_real("silu", x=x)
    return x * jax.nn.sigmoid(x)


@silu.forward
def _(x):
    return silu(x), x


@silu.backward
def _(x, g):
    return (g * _silu_gradient(x),)


def _silu_gradient(x):
    """s (1 + x (1 − s)) with s = σ(x)."""
    s = jax.nn.sigmoid(x)
    return s * (1 + x * (1 - s))


@rule
def hard_silu(x: chex.Array) -> jax.Array:
    """hard_silu(x) = x hard_sigmoid(x) (hard swish): 0 below −3, x above 3. Any shape.

    Local gradient: (2x + 3) / 6 where −3 < x < 3, else 0 on the left and 1 on the right. Kept:
    x. At the kinks it is 0 at x = −3 and 1 at x = 3, as in `jax.nn.hard_silu`.
    Source: Howard et al., "Searching for MobileNetV3", arXiv:1905.02244.
    """
    must_be_real("hard_silu", x=x)
    return x * (jnp.clip(x + 3, 0, 6) / 6)


@hard_silu.forward
def _(x):
    return hard_silu(x), x


@hard_silu.backward
def _(x, g):
    between = g * (x / 3 + 0.5)
    return (jnp.where(x <= -3, 0, jnp.where(x >= 3, g, between)),)


@rule
def gelu(x: chex.Array, *, approximate: bool = True) -> jax.Array:
    """gelu(x) = x Φ(x), Φ the normal distribution function. Any shape.

    approximate=False: Φ(x) = erfc(−x/√2) / 2; local gradient Φ(x) + x φ(x) with the density
    φ(x) = e^(−x²/2) / √(2π).
    approximate=True (the default, as in `jax.nn.gelu`): the paper's formula with tanh,
    Φ(x) ≈ (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2, written here as σ(u) with
    u = √(8/π) (x + 0.044715 x³), which is the same number; local gradient σ + x σ (1 − σ) u′.

    Kept: x. Smooth, no kink.
    Source: Hendrycks, Gimpel, "Gaussian error linear units", arXiv:1606.08415.
    """
    must_be_real("gelu", x=x)
    arguments.flag("gelu", "approximate", approximate)
    return _gelu(x, approximate)


@gelu.forward
def _(x, *, approximate):
    return gelu(x, approximate=approximate), x


@gelu.backward
def _(x, g, *, approximate):
    return (_gelu_backward(x, g, approximate),)


_GELU_SCALE = math.sqrt(8 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_SCALE

# Beyond ±40 both distribution functions are 0 or 1 to the last bit of every dtype, and their
# densities 0. Clipping x there changes nothing, and keeps x² from overflowing into 0 · inf.
_GELU_LIMIT = 40


def _gelu(x, approximate):
    """x σ(u), or x erfc(−x/√2) / 2."""
    limited = jnp.clip(x, -_GELU_LIMIT, _GELU_LIMIT)
    if approximate:
        return x * jax.nn.sigmoid(limited * (_GELU_SCALE + _GELU_CUBIC * (limited * limited)))
    return 0.5 * x * jax.lax.erfc(-math.sqrt(0.5) * limited)


def _gelu_backward(x, g, approximate):
    """g (s + x s (1 − s) u′) with s = σ(u), or g Φ(x) + g x φ(x)."""
    x = jnp.clip(x, -_GELU_LIMIT, _GELU_LIMIT)
    if approximate:
        s = jax.nn.sigmoid(x * (_GELU_SCALE + _GELU_CUBIC * (x * x)))
        du = _GELU_SCALE + 3 * _GELU_CUBIC * (x * x)
        return g * (s + s * (1 - s) * (x * du))
    # Two terms in g, not g times a sum: XLA then computes erfc once for value and gradient.
    z = -math.sqrt(0.5) * x
    density = math.sqrt(2 / math.pi) * jnp.exp(-(z * z))
    return 0.5 * g * _erfc(z) + 0.5 * x * g * density


@rule
def _erfc(z):
    """erfc(z), whose derivative JAX 0.12 can't take inside `shard_map`."""
    return jax.lax.erfc(z)


@_erfc.backward
def _(residuals, g):
    (z,) = residuals
    return (g * (-2 / math.sqrt(math.pi)) * jnp.exp(-(z * z)),)


@rule
def mish(x: chex.Array) -> jax.Array:
    """mish(x) = x tanh(softplus(x)). Any shape.

    With s = σ(x), w = 1 − s: tanh(softplus(x)) = t = s (1 + w) / (1 + w²), one exponential in
    place of three functions. Local gradient: t + x s (2w / (1 + w²))². Kept: x. Smooth, no kink.
    Source: Misra, "Mish: a self regularized non-monotonic activation function",
    arXiv:1908.08681.
    """
    must_be_real("mish", x=x)
    s = jax.nn.sigmoid(x)
    w = 1 - s
    return x * (s * (1 + w) / (1 + w * w))


@mish.forward
def _(x):
    return mish(x), x


@mish.backward
def _(x, g):
    s = jax.nn.sigmoid(x)
    w = 1 - s
    q = 1 / (1 + w * w)
    p = 2 * w * q
    return (g * (s * (1 + w) * q + x * s * p * p),)


def _halves(op, x, axis):
    """The values and the gates: the two halves of x along the axis."""
    axis = axis_of(op, x, axis)
    if x.shape[axis] % 2:
        raise ValueError(
            f"{op}: argument 'x' of shape {x.shape} has {x.shape[axis]} features along axis "
            f"{axis}, wanted an even number (values, then gates)."
        )
    return jnp.split(x, 2, axis)


@rule
def glu(x: chex.Array, *, axis: int = -1) -> jax.Array:
    """glu(x) = a σ(b), the gated linear unit; x = [a, b], two halves along `axis`.

    The second half are the gates, here as in `swiglu` and `geglu`. Shape `(..., 2n)` to
    `(..., n)`. Local gradient: σ(b) for a, a σ(b) (1 − σ(b)) for b. Kept: x. No kink.
    Raises ValueError if the size of the axis is odd.
    Source: Dauphin et al., "Language modeling with gated convolutional networks",
    arXiv:1612.08083.
    """
    must_be_real("glu", x=x)
    a, b = _halves("glu", x, axis)
    return a * jax.nn.sigmoid(b)


@glu.forward
def _(x, *, axis):
    return glu(x, axis=axis), x


@glu.backward
def _(x, g, *, axis):
    a, b = jnp.split(x, 2, axis)
    s = jax.nn.sigmoid(wide(b))  # of 16 bits, 1 − σ(b) would be 0 from b = 6 on
    da = wide(g) * s
    db = da * (wide(a) * (1 - s))
    return (jnp.concatenate([da.astype(g.dtype), db.astype(g.dtype)], axis),)


@rule
def swiglu(x: chex.Array, *, axis: int = -1) -> jax.Array:
    """swiglu(x) = a silu(b), x = [a, b], two halves along `axis`: the second half are the gates.

    Shape `(..., 2n)` to `(..., n)`. Local gradient: silu(b) for a, a silu′(b) for b. Kept: x.
    No kink. Weights of a model whose first half are the gates need their halves exchanged.
    Raises ValueError if the size of the axis is odd.
    Source: Shazeer, "GLU variants improve transformer", arXiv:2002.05202.
    """
    must_be_real("swiglu", x=x)
    a, b = _halves("swiglu", x, axis)
    return a * (b * jax.nn.sigmoid(b))


@swiglu.forward
def _(x, *, axis):
    return swiglu(x, axis=axis), x


@swiglu.backward
def _(x, g, *, axis):
    a, b = jnp.split(x, 2, axis)
    da = g * (b * jax.nn.sigmoid(b))
    return (jnp.concatenate([da, g * (a * _silu_gradient(b))], axis),)


@rule
def geglu(x: chex.Array, *, axis: int = -1, approximate: bool = True) -> jax.Array:
    """geglu(x) = a gelu(b), x = [a, b], two halves along `axis`: the second half are the gates.

    Shape `(..., 2n)` to `(..., n)`. Local gradient: gelu(b) for a, a gelu′(b) for b, with
    `approximate` as in `gelu`. Kept: x. No kink.
    Raises ValueError if the size of the axis is odd.
    Source: Shazeer, "GLU variants improve transformer", arXiv:2002.05202.
    """
    must_be_real("geglu", x=x)
    arguments.flag("geglu", "approximate", approximate)
    a, b = _halves("geglu", x, axis)
    return a * _gelu(b, approximate)


@geglu.forward
def _(x, *, axis, approximate):
    return geglu(x, axis=axis, approximate=approximate), x


@geglu.backward
def _(x, g, *, axis, approximate):
    a, b = jnp.split(x, 2, axis)
    da = g * gelu(b, approximate=approximate)
    return (jnp.concatenate([da, _gelu_backward(b, g * a, approximate)], axis),)
