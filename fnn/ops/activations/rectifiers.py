"""Rectifiers: `relu` and its relatives, which let positive numbers pass and flatten negative ones.

`maxout` learns what it lets pass: it is the largest of several pieces, of which `relu` has x and 0.
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
def relu(x: chex.Array) -> jax.Array:
    """relu(x) = max(0, x), the rectified linear unit. Any shape.

    Local gradient: 1 where x > 0, else 0: a gate. Kept: y (y > 0 just where x > 0).
    At the kink x = 0 it is 0, as in `jax.nn.relu`.
    Source: the lecture; Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep
    convolutional neural networks", 2012.
    """
    must_be_real("relu", x=x)
    return jnp.maximum(x, 0)


@relu.forward
def _(x):
    y = relu(x)
    return y, y


@relu.backward
def _(y, g):
    return (jnp.where(y > 0, g, 0),)


@rule
def leaky_relu(x: chex.Array, *, slope: float = 0.1) -> jax.Array:
    """leaky_relu(x) = x where x ≥ 0, slope · x elsewhere. Any shape.

    Local gradient: 1 where x ≥ 0, else `slope`. Kept: the mask x ≥ 0 (one byte an entry).
    At the kink x = 0 it is 1, as in `jax.nn.leaky_relu`. The slope 0.1 is the lecture's
    max(0.1x, x); jax.nn's is 0.01.
    Source: the lecture; Maas, Hannun, Ng, "Rectifier nonlinearities improve neural network
    acoustic models", 2013.
    """
    must_be_real("leaky_relu", x=x)
    arguments.number("leaky_relu", "slope", slope)
    return jnp.where(x >= 0, x, slope * x)


@leaky_relu.forward
def _(x, *, slope):
    return leaky_relu(x, slope=slope), x >= 0


@leaky_relu.backward
def _(is_right, g, *, slope):
    return (jnp.where(is_right, g, slope * g),)


@rule
def relu6(x: chex.Array) -> jax.Array:
    """relu6(x) = min(max(0, x), 6). Any shape.

    Local gradient: 1 where 0 < x < 6, else 0. Kept: that mask (one byte an entry). At the kinks
    x = 0 and x = 6 it is 0, as in `jax.nn.relu6`.
    Source: Howard et al., "MobileNets", arXiv:1704.04861.
    """
    must_be_real("relu6", x=x)
    return jnp.clip(x, 0, 6)


@relu6.forward
def _(x):
    return relu6(x), (x > 0) & (x < 6)


@relu6.backward
def _(is_inside, g):
    return (jnp.where(is_inside, g, 0),)


@rule
def maxout(z: chex.Array, *, axis: int = -2) -> jax.Array:
    """maxout(z) = the largest of the pieces, entry by entry: the maximum of z along `axis`.

    The lecture's max(w₁ᵀx + b₁, w₂ᵀx + b₂) for a whole layer: the pieces Wᵢ x + bᵢ are the rows
    of z, shape `(pieces, features)`, or `(positions, pieces, features)`, and the result has
    shape `(features,)` or `(positions, features)`.

    Local gradient: 1 for the piece that is largest, 0 for the others. Kept: the mask of the
    largest (one byte an entry). At the kink, where several pieces are largest, they share the
    gradient equally, as in `jnp.max` and `jnp.maximum`.
    Raises ValueError if z lacks the axis or has no pieces along it.
    Source: the lecture; Goodfellow et al., "Maxout networks", ICML 2013.
    """
    must_be_real("maxout", z=z)
    axis = axis_of("maxout", z, axis)
    if z.shape[axis] == 0:
        raise ValueError(
            f"maxout: argument 'z' of shape {z.shape} has no pieces along axis {axis}, wanted at "
            "least one."
        )
    return jnp.max(z, axis=axis)


@maxout.forward
def _(z, *, axis):
    y = maxout(z, axis=axis)
    return y, z == jnp.expand_dims(y, axis)


@maxout.backward
def _(is_largest, g, *, axis):
    how_many = jnp.sum(is_largest.astype(wide(g).dtype), axis)
    share = (wide(g) / how_many).astype(g.dtype)
    return (jnp.where(is_largest, jnp.expand_dims(share, axis), 0),)


@rule
def elu(x: chex.Array, *, alpha: float = 1.0) -> jax.Array:
    """elu(x) = x where x > 0, α (eˣ − 1) elsewhere. Any shape.

    Local gradient: 1 where x > 0, else α eˣ = y + α. Kept: y (y > 0 just where x > 0).
    At x = 0 it is α, as in `jax.nn.elu`: a kink unless α = 1.
    Raises ValueError if alpha is negative.
    Source: the lecture; Clevert, Unterthiner, Hochreiter, arXiv:1511.07289.
    """
    must_be_real("elu", x=x)
    arguments.number("elu", "alpha", alpha, least=0)
    return jnp.where(x > 0, x, alpha * jnp.expm1(x))


@elu.forward
def _(x, *, alpha):
    y = elu(x, alpha=alpha)
    return y, y


@elu.backward
def _(y, g, *, alpha):
    return (jnp.where(y > 0, g, g * (y + alpha)),)


_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


@rule
def selu(x: chex.Array) -> jax.Array:
    """selu(x) = λ elu(x; α), λ = 1.0507…, α = 1.6732…: keeps mean 0 and variance 1. Any shape.

    Local gradient: λ where x > 0, else λ α eˣ = y + λ α. Kept: y (y > 0 just where x > 0).
    At the kink x = 0 it is λ α = 1.758…, as in `jax.nn.selu`. The value exceeds the dtype's
    largest, and is inf, for x beyond 0.95 times the largest.
    Source: Klambauer et al., "Self-normalizing neural networks", arXiv:1706.02515.
    """
    must_be_real("selu", x=x)
    return jnp.where(x > 0, _SELU_SCALE * x, _SELU_SCALE * _SELU_ALPHA * jnp.expm1(x))


@selu.forward
def _(x):
    y = selu(x)
    return y, y


@selu.backward
def _(y, g):
    return (jnp.where(y > 0, _SELU_SCALE * g, g * (y + _SELU_SCALE * _SELU_ALPHA)),)


@rule
def celu(x: chex.Array, *, alpha: float = 1.0) -> jax.Array:
    """celu(x) = x where x > 0, α (e^(x/α) − 1) elsewhere. Any shape.

    Local gradient: 1 where x > 0, else e^(x/α) = 1 + y/α; no kink, it is 1 at x = 0 from both
    sides. Kept: y (y > 0 just where x > 0). Raises ValueError unless alpha is positive.
    Source: Barron, "Continuously differentiable exponential linear units", arXiv:1704.07483.
    """
    must_be_real("celu", x=x)
    arguments.number("celu", "alpha", alpha, above=0)
    return jnp.where(x > 0, x, alpha * jnp.expm1(x / alpha))


@celu.forward
def _(x, *, alpha):
    y = celu(x, alpha=alpha)
    return y, y


@celu.backward
def _(y, g, *, alpha):
    return (jnp.where(y > 0, g, g * (1 + y / alpha)),)


@rule
def softplus(x: chex.Array) -> jax.Array:
    """softplus(x) = log(1 + eˣ), a smooth relu. Any shape.

    Computed as max(x, 0) + log(1 + e^−|x|), which can't overflow. Local gradient:
    σ(x) = 1 − e⁻ʸ. Kept: y. Smooth, no kink.
    Source: Dugas et al., "Incorporating second-order functional knowledge for better option
    pricing", 2001.
    """
    must_be_real("softplus", x=x)
    return jnp.where(x >= 0, x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@softplus.forward
def _(x):
    y = softplus(x)
    return y, y


@softplus.backward
def _(y, g):
    return (g * -jnp.expm1(-y),)


@rule
def squareplus(x: chex.Array, *, b: float = 4.0) -> jax.Array:
    """squareplus(x) = (x + √(x² + b)) / 2, a smooth relu without exponentials. Any shape.

    Computed as max(x, 0) + (b/2) / (√(x² + b) + |x|), which cancels no digits where x < 0.
    Local gradient: (1 + x / √(x² + b)) / 2 = y / (2y − x). Kept: x and y. Smooth, no kink.
    Raises ValueError unless b is positive (b = 0 would be relu).
    Source: Barron, "Squareplus: a softplus-like algebraic rectifier", arXiv:2112.11687.
    """
    must_be_real("squareplus", x=x)
    arguments.number("squareplus", "b", b, above=0)
    # Beyond the limit √(x² + b) rounds to |x|; the clip keeps x² from overflowing.
    z = wide(x)
    limit = math.sqrt(b / float(jnp.finfo(z.dtype).eps))
    root = jnp.maximum(jnp.abs(z), jnp.sqrt(jnp.square(jnp.clip(z, -limit, limit)) + b))
    return (jnp.where(z >= 0, z, 0) + 0.5 * b / (root + jnp.abs(z))).astype(x.dtype)


@squareplus.forward
def _(x, *, b):
    y = squareplus(x, b=b)
    return y, (x, y)


@squareplus.backward
def _(residuals, g, *, b):
    x, y = residuals
    return (g * (y / (y + (y - x))),)
