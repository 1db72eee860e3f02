"""Activation functions: forward and backward side by side.

Each operation is three short functions: its definition, its `forward` (the value, and what
is kept for the backward pass) and its `backward` (the local gradient times the upstream
gradient g). What is kept is as little as can be: the output y where the local gradient
can be told from it (the next layer keeps y anyway), a mask of booleans where a mask is enough,
the input x elsewhere.

`forward` calls the operation itself, so that a kept y is differentiated by the rule below and
not through the definition. Hence the second derivative, and every one after it, comes from
these rules too, and a definition may be written for accuracy alone.

Common to all:

* The result has the dtype of the input. Integers raise a TypeError that names the operation;
  so do complex numbers, except for the holomorphic `sigmoid` and `tanh`.
* Sums over an axis are taken in at least float32, and the result rounded once.
* Values and gradients are finite for every finite input, up to the largest of the dtype, in
  float16, bfloat16, float32 and float64, except where the true value lies beyond the dtype
  (`selu` multiplies by 1.05, `swiglu` and `geglu` multiply two large numbers, `log_softmax`
  subtracts them); so are second derivatives of the elementwise ones.
* At a kink, where there is no derivative, the value given is that of `jax.nn`; each docstring
  says which. Second derivatives are zero there.

"The lecture" is Stanford's CS231n, "Training Neural Networks: activation functions".
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.operation import compiled_rule as rule
from fnn.ops.arguments import axes_of, axis_of, must_be_real, must_be_real_or_complex, wide

Axis = int | tuple[int, ...] | None


# ------------------------------------------------------------------------------ the lecture's


@rule
def sigmoid(x: jax.Array) -> jax.Array:
    """σ(x) = 1 / (1 + e⁻ˣ), between 0 and 1. Any shape; real or complex.

    Local gradient: σ(x) (1 − σ(x)) = y (1 − y). Kept: y. Smooth, no kink.
    Source: the lecture (a neuron's firing rate; it saturates, and then kills the gradient).
    """
    must_be_real_or_complex("sigmoid", x=x)
    return jax.nn.sigmoid(x)


@sigmoid.forward
def _(x):
    y = sigmoid(x)
    return y, y


@sigmoid.backward
def _(y, g):
    return (g * (y * (1 - y)),)


@rule
def tanh(x: jax.Array) -> jax.Array:
    """tanh(x) = (eˣ − e⁻ˣ) / (eˣ + e⁻ˣ), between −1 and 1. Any shape; real or complex.

    Local gradient: 1 − tanh²(x) = 1 − y². Kept: y. Smooth, no kink.
    Source: the lecture; LeCun et al., "Efficient BackProp", 1998 (zero-centred).
    """
    must_be_real_or_complex("tanh", x=x)
    return jnp.tanh(x)


@tanh.forward
def _(x):
    y = tanh(x)
    return y, y


@tanh.backward
def _(y, g):
    return (g * (1 - y * y),)


@rule
def relu(x: jax.Array) -> jax.Array:
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
def leaky_relu(x: jax.Array, *, slope: float = 0.1) -> jax.Array:
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
def maxout(z: jax.Array, *, axis: int = -2) -> jax.Array:
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
def elu(x: jax.Array, *, alpha: float = 1.0) -> jax.Array:
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


# --------------------------------------------------------------------- relatives of elu and relu

_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


@rule
def selu(x: jax.Array) -> jax.Array:
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
def celu(x: jax.Array, *, alpha: float = 1.0) -> jax.Array:
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
def relu6(x: jax.Array) -> jax.Array:
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
def hard_tanh(x: jax.Array) -> jax.Array:
    """hard_tanh(x) = x between −1 and 1, ±1 beyond. Any shape.

    Local gradient: 1 where −1 ≤ x ≤ 1, else 0. Kept: that mask (one byte an entry). At the
    kinks x = ±1 it is 1, as in `jax.nn.hard_tanh`.
    Source: Collobert, "Large scale machine learning", thesis, 2004.
    """
    must_be_real("hard_tanh", x=x)
    return jnp.clip(x, -1, 1)


@hard_tanh.forward
def _(x):
    return hard_tanh(x), jnp.abs(x) <= 1


@hard_tanh.backward
def _(is_inside, g):
    return (jnp.where(is_inside, g, 0),)


@rule
def hard_sigmoid(x: jax.Array) -> jax.Array:
    """hard_sigmoid(x) = relu6(x + 3) / 6: 0 below −3, 1 above 3, a line between. Any shape.

    Local gradient: 1/6 where −3 < x < 3, else 0. Kept: that mask (one byte an entry). At the
    kinks x = ±3 it is 0, as in `jax.nn.hard_sigmoid`.
    Source: Howard et al., "Searching for MobileNetV3", arXiv:1905.02244.
    """
    must_be_real("hard_sigmoid", x=x)
    return jnp.clip(x + 3, 0, 6) / 6


@hard_sigmoid.forward
def _(x):
    return hard_sigmoid(x), (x > -3) & (x < 3)


@hard_sigmoid.backward
def _(is_inside, g):
    return (jnp.where(is_inside, g / 6, 0),)


@rule
def hard_silu(x: jax.Array) -> jax.Array:
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


# -------------------------------------------------------------------------------- smooth ones


@rule
def softplus(x: jax.Array) -> jax.Array:
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
def log_sigmoid(x: jax.Array) -> jax.Array:
    """log_sigmoid(x) = log σ(x) = −softplus(−x). Any shape.

    Local gradient: 1 − σ(x) = 1 − eʸ. Kept: y. Smooth, no kink.
    Source: the log-likelihood of logistic regression; see `sigmoid_binary_cross_entropy`.
    """
    must_be_real("log_sigmoid", x=x)
    return jnp.where(x >= 0, 0, x) - jnp.log1p(jnp.exp(-jnp.abs(x)))


@log_sigmoid.forward
def _(x):
    y = log_sigmoid(x)
    return y, y


@log_sigmoid.backward
def _(y, g):
    return (g * -jnp.expm1(y),)


@rule
def softsign(x: jax.Array) -> jax.Array:
    """softsign(x) = x / (1 + |x|), between −1 and 1. Any shape.

    Local gradient: 1 / (1 + |x|)². Kept: x (it can be told from y as (1 − |y|)², but for large
    x that has few digits). The gradient has no kink; its own derivative jumps from 2
    to −2 at x = 0, and is −2 there.
    Source: Turian, Bergstra, Bengio, "Quadratic features and deep architectures for
    chunking", 2009.
    """
    must_be_real("softsign", x=x)
    return x / (1 + jnp.abs(x))


@softsign.forward
def _(x):
    return softsign(x), x


@softsign.backward
def _(x, g):
    r = 1 / (1 + jnp.abs(x))
    return (g * r * r,)


@rule
def silu(x: jax.Array) -> jax.Array:
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
    s = jax.nn.sigmoid(x)
    return s * (1 + x * (1 - s))


@rule
def gelu(x: jax.Array, *, approximate: bool = True) -> jax.Array:
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
    limited = jnp.clip(x, -_GELU_LIMIT, _GELU_LIMIT)
    if approximate:
        return x * jax.nn.sigmoid(limited * (_GELU_SCALE + _GELU_CUBIC * (limited * limited)))
    return 0.5 * x * jax.lax.erfc(-math.sqrt(0.5) * limited)


def _gelu_backward(x, g, approximate):
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
def mish(x: jax.Array) -> jax.Array:
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


@rule
def squareplus(x: jax.Array, *, b: float = 4.0) -> jax.Array:
    """squareplus(x) = (x + √(x² + b)) / 2, a smooth relu without exponentials. Any shape.

    Computed as max(x, 0) + (b/2) / (√(x² + b) + |x|), which cancels no digits where x < 0.
    Local gradient: (1 + x / √(x² + b)) / 2 = y / (2y − x). Kept: x and y. Smooth, no kink.
    Raises ValueError unless b is positive (b = 0 would be relu).
    Source: Barron, "Squareplus: a softplus-like algebraic rectifier", arXiv:2112.11687.
    """
    must_be_real("squareplus", x=x)
    arguments.number("squareplus", "b", b, above=0)
    # Beyond the limit √(x² + b) rounds to |x|; the clip keeps x² from overflowing.
    limit = math.sqrt(b / float(jnp.finfo(x.dtype).eps))
    root = jnp.maximum(jnp.abs(x), jnp.sqrt(jnp.square(jnp.clip(x, -limit, limit)) + b))
    return jnp.where(x >= 0, x, 0) + 0.5 * b / (root + jnp.abs(x))


@squareplus.forward
def _(x, *, b):
    y = squareplus(x, b=b)
    return y, (x, y)


@squareplus.backward
def _(residuals, g, *, b):
    x, y = residuals
    return (g * (y / (y + (y - x))),)


# ------------------------------------------------ gated: half of the features opens the other half


def _halves(op, x, axis):
    axis = axis_of(op, x, axis)
    if x.shape[axis] % 2:
        raise ValueError(
            f"{op}: argument 'x' of shape {x.shape} has {x.shape[axis]} features along axis "
            f"{axis}, wanted an even number (values, then gates)."
        )
    return jnp.split(x, 2, axis)


@rule
def glu(x: jax.Array, *, axis: int = -1) -> jax.Array:
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
    s = jax.nn.sigmoid(b)
    da = g * s
    return (jnp.concatenate([da, da * (a * (1 - s))], axis),)


@rule
def swiglu(x: jax.Array, *, axis: int = -1) -> jax.Array:
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
def geglu(x: jax.Array, *, axis: int = -1, approximate: bool = True) -> jax.Array:
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


# ------------------------------------------------------------------ scores to probabilities


@rule
def softmax(x: jax.Array, *, axis: Axis = -1) -> jax.Array:
    """softmax(x)ᵢ = e^xᵢ / Σⱼ e^xⱼ along `axis` (an integer, several, or None for all).

    The largest x is subtracted first, so that no exponential overflows; entries of −inf get
    probability 0. Local gradient: ∂yᵢ/∂xⱼ = yᵢ (1[i=j] − yⱼ), so that
    ∂L/∂x = y (g − Σ y g). Kept: y. Smooth, no kink.
    Source: CS231n, "Linear classification" (the softmax classifier).
    """
    must_be_real("softmax", x=x)
    axis = axes_of("softmax", x, axis)
    z = wide(x)
    e = jnp.exp(z - jnp.max(z, axis, keepdims=True, initial=-jnp.inf))
    return (e / jnp.sum(e, axis, keepdims=True)).astype(x.dtype)


@softmax.forward
def _(x, *, axis):
    y = softmax(x, axis=axis)
    return y, y


@softmax.backward
def _(y, g, *, axis):
    p, d = wide(y), wide(g)
    return ((p * (d - jnp.sum(p * d, axis, keepdims=True))).astype(y.dtype),)


@rule
def log_softmax(x: jax.Array, *, axis: Axis = -1) -> jax.Array:
    """log_softmax(x)ᵢ = xᵢ − log Σⱼ e^xⱼ along `axis` (an integer, several, or None for all).

    Local gradient: ∂yᵢ/∂xⱼ = 1[i=j] − e^yⱼ, so that ∂L/∂x = g − eʸ Σ g. Kept: the probabilities
    eʸ (from y they would cost a second exponential). Smooth, no kink. An x that lies more than
    the dtype's largest below the maximum gives −inf.
    Source: CS231n, "Linear classification" (numeric stability of the softmax).
    """
    must_be_real("log_softmax", x=x)
    axis = axes_of("log_softmax", x, axis)
    z = wide(x)
    shifted = z - jnp.max(z, axis, keepdims=True, initial=-jnp.inf)
    return (shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis, keepdims=True))).astype(x.dtype)


@log_softmax.forward
def _(x, *, axis):
    return log_softmax(x, axis=axis), softmax(x, axis=axis)


@log_softmax.backward
def _(p, g, *, axis):
    d = wide(g)
    return ((d - wide(p) * jnp.sum(d, axis, keepdims=True)).astype(g.dtype),)


@rule
def logsumexp(x: jax.Array, *, axis: Axis = None, keepdims: bool = False) -> jax.Array:
    """logsumexp(x) = log Σⱼ e^xⱼ along `axis` (an integer, several, or None, the default, for all).

    A smooth maximum. Local gradient: ∂y/∂xⱼ = e^(xⱼ − y), the softmax. Kept: e^(x − max x) and
    its sum. Smooth, no kink. Where all entries are −inf, or there are none, y is −inf and the
    gradient 0.
    Source: CS231n, "Linear classification" (numeric stability of the softmax).
    """
    must_be_real("logsumexp", x=x)
    arguments.flag("logsumexp", "keepdims", keepdims)
    axis = axes_of("logsumexp", x, axis)
    z = wide(x)
    largest = _largest(z, axis)
    y = jnp.log(jnp.sum(jnp.exp(z - largest), axis, keepdims=True)) + largest
    return (y if keepdims else jnp.squeeze(y, axis)).astype(x.dtype)


@logsumexp.forward
def _(x, *, axis, keepdims):
    y = logsumexp(x, axis=axis, keepdims=keepdims)
    return y, _exponentials(x, axes_of("logsumexp", x, axis))


@logsumexp.backward
def _(residuals, g, *, axis, keepdims):
    e, total = residuals
    if not keepdims:
        g = jnp.expand_dims(g, axes_of("logsumexp", e, axis))
    return ((wide(e) * (wide(g) / total)).astype(e.dtype),)


def _largest(x, axis):
    """The largest entries of x, to be subtracted before the exponential: finite."""
    largest = jnp.max(x, axis, keepdims=True, initial=-jnp.inf)
    return jnp.where(jnp.isfinite(largest), largest, 0)


def _exponentials(x, axis):
    """e = e^(x − max x) and its sum: e / Σ e is the softmax, and 0 where all x are −inf."""
    # The shift is held constant: it cancels in e / Σ e, and in the derivatives of that.
    z = wide(x)
    e = jnp.exp(z - jax.lax.stop_gradient(_largest(z, axis)))
    total = jnp.sum(e, axis, keepdims=True)
    return e.astype(x.dtype), jnp.where(total == 0, 1, total)
