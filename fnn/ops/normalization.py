"""Normalisation: x less its mean, over its deviation, times a scale, plus a bias.

    rms_norm        over the features, without the mean
    layer_norm      over the features
    group_norm      over positions and a group of the features
    instance_norm   over positions, for each feature by itself
    batch_norm      over positions and a mapped axis, for each feature by itself
    weight_norm     of a weight: each row's length is a parameter of its own
    spectral_norm   of a weight: divided by its largest singular value

x is `(..., features)`. All keep x, and mean and 1 / deviation of each set of numbers; what is
normalised is computed again in the backward pass. In a network x is often kept anyway, as a result
of another operation, and in 16-bit floats it takes half the memory of a normalised x in float32.
Statistics and sums are in at least float32. The variance is that of x − μ: of large numbers that
hardly vary, E[x²] − μ² would be rounding error. It overflows, as any square, beyond the root of
the dtype's largest; there y is the bias. (Where a sum of x itself overflows, y is nan, but for
`rms_norm`, which has none.)

`mask`, booleans that broadcast to x's shape (for positions: `mask[..., None]`), says which entries
count. The others may hold anything: they are 0 in y, and have no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from jax import lax

from fnn import arguments
from fnn.meshes import explicit_mesh
from fnn.operation import compiled_rule as rule
from fnn.ops.arguments import axes_of, empty, must_be_array, must_be_real
from fnn.precision import wide

Axis = int | tuple[int, ...]


@rule
def rms_norm(
    x: chex.Array,
    scale: chex.Array | None = None,
    mask: chex.Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-6,
) -> jax.Array:
    """y = scale ∘ x r with r = 1 / √(mean(x²) + ε), the mean taken along `axis`.

    Args:
        x: floating, any shape.
        scale: floating, of the shape of the axes that are normalised, `(features,)`; None for 1.
        mask: which entries count, booleans that broadcast to x's shape; None for all.
        axis: an axis or several.
        epsilon: ε, at least 0. With 0, zeros give 0, and the gradient 0.

    Returns:
        y, of x's shape and dtype.

    With n = x r and d = scale ∘ g the local gradient is r (d − n mean(d n)) for x, and Σ g n for
    the scale. Kept: x, scale, r. Smooth for ε > 0.

    Raises:
        TypeError: x or scale isn't real floating, the mask isn't boolean.
        ValueError: a shape doesn't fit, or an option isn't of its kind.

    Source: Zhang, Sennrich, "Root mean square layer normalization", NeurIPS 2019.
    """
    return _rms_norm(x, scale, mask, axis, epsilon)[0]


@rms_norm.forward
def _(x, scale, mask, *, axis, epsilon):
    y, root = _rms_norm(x, scale, mask, axis, epsilon)
    return y, (x, scale, mask, root)


@rms_norm.backward
def _(residuals, g, *, axis, epsilon):
    x, scale, mask, root = residuals
    axes = axes_of("rms_norm", x, axis)
    mask = _beside(mask, x)
    normal, d = _counted(wide(x), mask) * root, _counted(wide(g), mask)
    d_scale = _sum_to(scale, d * normal, axes)
    d = _scaled(d, scale, axes)
    dx = root * (d - normal * _mean(d * normal, axes, mask))
    return dx.astype(x.dtype), d_scale, None


def _rms_norm(x, scale, mask, axis, epsilon):
    axes = _check("rms_norm", x, axis, epsilon, mask, scale=scale)
    mask = _beside(mask, x)
    z = _counted(wide(x), mask)
    root = _inverse_root(_mean(jnp.square(z), axes, mask) + epsilon)
    return _scaled(z * root, scale, axes).astype(x.dtype), root


@rule
def layer_norm(
    x: chex.Array,
    scale: chex.Array | None = None,
    bias: chex.Array | None = None,
    mask: chex.Array | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-5,
) -> jax.Array:
    """y = scale ∘ (x − μ) r + bias with r = 1 / √(σ² + ε), mean μ and variance σ² along `axis`.

    Args:
        x: floating, any shape.
        scale, bias: floating, of the shape of the axes that are normalised, `(features,)`; None
            for 1, and for 0.
        mask: which entries count, booleans that broadcast to x's shape; None for all.
        axis: an axis or several.
        epsilon: ε, at least 0. With 0, zeros give the bias, and the gradient 0; of other equal
            numbers the mean is rounded, and what is left of them is divided by its size.

    Returns:
        y, of x's shape and dtype.

    With n = (x − μ) r and d = scale ∘ g the local gradient is r (d − mean(d) − n mean(d n)) for x,
    Σ g n for the scale, and Σ g for the bias. Kept: x, scale, μ, r. Smooth for ε > 0.

    Raises:
        TypeError: x, scale or bias isn't real floating, the mask isn't boolean.
        ValueError: a shape doesn't fit, or an option isn't of its kind.

    Source: Ba, Kiros, Hinton, "Layer normalization", arXiv:1607.06450.
    """
    axes = _check("layer_norm", x, axis, epsilon, mask, scale=scale, bias=bias)
    return _normalise(x, scale, bias, mask, axes, axes, epsilon)[0]


@layer_norm.forward
def _(x, scale, bias, mask, *, axis, epsilon):
    axes = _check("layer_norm", x, axis, epsilon, mask, scale=scale, bias=bias)
    y, statistics = _normalise(x, scale, bias, mask, axes, axes, epsilon)
    return y, (x, scale, empty(bias), mask, statistics)


@layer_norm.backward
def _(residuals, g, *, axis, epsilon):
    axes = axes_of("layer_norm", residuals[0], axis)
    return _gradients(residuals, g, axes, axes)


@rule
def group_norm(
    x: chex.Array,
    scale: chex.Array | None = None,
    bias: chex.Array | None = None,
    mask: chex.Array | None = None,
    *,
    groups: int,
    epsilon: float = 1e-5,
) -> jax.Array:
    """`layer_norm` with mean and variance over all positions and a group of the features.

    Args:
        x: one example, floating, `(..., features)`: all axes but the last are positions.
        scale, bias: floating, `(features,)`; None for 1, and for 0.
        mask: which entries count, booleans that broadcast to x's shape; None for all.
        groups: into how many groups of neighbours the features are divided. With 1 the mean is
            over the whole example.
        epsilon: ε, at least 0.

    Returns:
        y, of x's shape and dtype.

    Local gradient and what is kept are `layer_norm`'s, with μ and r for each group.

    Raises:
        TypeError: x, scale or bias isn't real floating, the mask isn't boolean.
        ValueError: a shape doesn't fit, or groups don't divide the features.

    Source: Wu, He, "Group normalization", ECCV 2018.
    """
    _check_groups(x, scale, bias, mask, groups, epsilon)
    z, scale, bias, mask, over = _grouped(x, scale, bias, mask, groups)
    y, _ = _normalise(z, scale, bias, mask, over, (-2, -1), epsilon)
    return y.reshape(x.shape)


@group_norm.forward
def _(x, scale, bias, mask, *, groups, epsilon):
    _check_groups(x, scale, bias, mask, groups, epsilon)
    z, of_group, shift, among, over = _grouped(x, scale, bias, mask, groups)
    y, statistics = _normalise(z, of_group, shift, among, over, (-2, -1), epsilon)
    return y.reshape(x.shape), (x, scale, empty(bias), mask, statistics)


@group_norm.backward
def _(residuals, g, *, groups, epsilon):
    x, scale, bias, mask, statistics = residuals
    z, of_group, _, among, over = _grouped(x, scale, None, mask, groups)
    kept = z, of_group, bias, among, statistics
    found = _gradients(kept, g.reshape(z.shape), over, (-2, -1))
    flat = [None if d is None else d.reshape(-1) for d in found[1:]]
    return found[0].reshape(x.shape), *flat


def instance_norm(
    x: chex.Array,
    scale: chex.Array | None = None,
    bias: chex.Array | None = None,
    mask: chex.Array | None = None,
    *,
    epsilon: float = 1e-5,
) -> jax.Array:
    """`group_norm` with a group for each feature: mean and variance over the positions alone.

    Arguments, results and errors are as of `group_norm`.

    Source: Ulyanov, Vedaldi, Lempitsky, "Instance normalization", arXiv:1607.08022.
    """
    must_be_real("instance_norm", x=x)
    if x.ndim < 1:
        raise ValueError("instance_norm: argument 'x' has shape (), wanted (..., features).")
    groups = max(x.shape[-1], 1)
    _check_groups(x, scale, bias, mask, groups, epsilon, "instance_norm")
    return group_norm(x, scale, bias, mask, groups=groups, epsilon=epsilon)


def batch_norm(
    x: chex.Array,
    scale: chex.Array | None = None,
    bias: chex.Array | None = None,
    mask: chex.Array | None = None,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    epsilon: float = 1e-5,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """y = scale ∘ (x − μ) / √(σ² + ε) + bias for each feature, μ and σ² over all other numbers.

    These are x's positions, and the examples along a mapped axis:

        jax.vmap(lambda x: batch_norm(x, scale, bias, axis_name="batch")[0], axis_name="batch")(xs)

    Args:
        x: floating, `(..., features)`: all axes but the last are positions.
        scale, bias: floating, `(features,)`; None for 1, and for 0.
        mask: which entries count, booleans that broadcast to x's shape; None for all.
        axis_name: the name of a mapped axis, or several, that the statistics go over too.
        epsilon: ε, at least 0.

    Returns:
        y, of x's shape and dtype; the mean μ and the variance σ² (which divides by the count, not
        by one less), `(features,)` and in at least float32; and the count, a float of shape `()`,
        or `(features,)` with a mask.

    Made of two operations, `squared_deviations` and `standardize`, each of which keeps x. Of the
    gradient of y by x, the parts through μ and σ² come from them.

    Raises:
        TypeError: x, scale or bias isn't real floating, the mask isn't boolean.
        ValueError: a shape doesn't fit, or an option isn't of its kind.

    Source: Ioffe, Szegedy, "Batch normalization", ICML 2015, algorithm 1.
    """
    op = "batch_norm"
    must_be_real(op, x=x)
    x = jnp.asarray(x)
    if x.ndim == 0:
        raise ValueError(f"{op}: argument 'x' has shape (), wanted (..., features).")
    _check_weights(op, x, x.shape[-1:], {"scale": scale, "bias": bias})
    check_mask(op, x, mask)
    epsilon = arguments.fixed_number(op, "epsilon", epsilon, least=0)
    positions = tuple(range(x.ndim - 1))
    over = lambda total: _over(axis_name, total)
    if mask is None:
        count = over(jnp.full((), math.prod(x.shape[:-1]), wide(x).dtype))
    else:
        each = jnp.broadcast_to(_beside(mask, x), x.shape)
        count = over(jnp.sum(each, positions, dtype=wide(x).dtype))
    divisor = jnp.maximum(count, 1)
    mean = over(jnp.sum(_counted(wide(x), _beside(mask, x)), positions)) / divisor
    variance = over(squared_deviations(x, mean, mask)) / divisor
    y = standardize(x, mean, variance, scale, bias, mask, epsilon=epsilon)
    return y, mean, variance, count


@rule
def squared_deviations(
    x: chex.Array, mean: chex.Array, mask: chex.Array | None = None
) -> jax.Array:
    """Σ (x − μ)² over all axes but the last, `(features,)`, of the entries that count.

    Local gradient: 2 (x − μ) for x, its sum −Σ 2 (x − μ) for μ. Kept: x and μ. x is floating; μ,
    `(features,)`, and the result are in at least float32.
    """
    centred = _centred(x, mean, mask)
    return jnp.sum(jnp.square(centred), tuple(range(x.ndim - 1)))


@squared_deviations.forward
def _(x, mean, mask):
    return squared_deviations(x, mean, mask), (x, mean, mask)


@squared_deviations.backward
def _(residuals, g):
    x, mean, mask = residuals
    d = 2 * _centred(x, mean, mask) * _along(g, x, (-1,))
    return d.astype(x.dtype), _sum_to(mean, -d, (-1,)), None


@rule
def standardize(
    x: chex.Array,
    mean: chex.Array,
    variance: chex.Array,
    scale: chex.Array | None = None,
    bias: chex.Array | None = None,
    mask: chex.Array | None = None,
    *,
    epsilon: float = 1e-5,
) -> jax.Array:
    """y = scale ∘ (x − μ) r + bias with r = 1 / √(σ² + ε), for statistics that are given.

    All but x, `(..., features)`, and the mask are `(features,)`. With n = (x − μ) r, d = scale ∘ g
    the local gradient is d r for x, −r Σ d for μ, −½ r² Σ d n for σ², Σ g n for the scale and Σ g
    for the bias. Kept: x, μ, r, scale.
    """
    return _standardized(x, mean, variance, scale, bias, mask, epsilon)[0]


@standardize.forward
def _(x, mean, variance, scale, bias, mask, *, epsilon):
    y, root = _standardized(x, mean, variance, scale, bias, mask, epsilon)
    return y, (x, mean, root, scale, empty(variance), empty(bias), mask)


@standardize.backward
def _(residuals, g, *, epsilon):
    x, mean, root, scale, variance, bias, mask = residuals
    d = _counted(wide(g), _beside(mask, x))
    of_root = _along(root, x, (-1,))
    normal = _centred(x, mean, mask) * of_root
    d_scale, d_bias = _sum_to(root, d * normal, (-1,)), _sum_to(root, d, (-1,))
    weight = root if scale is None else scale.astype(root.dtype) * root
    dx = d * _along(weight, x, (-1,))
    d_variance = -0.5 * weight * root * d_scale
    return (
        dx.astype(x.dtype),
        (-weight * d_bias).astype(mean.dtype),
        d_variance.astype(variance.dtype),
        None if scale is None else d_scale.astype(scale.dtype),
        None if bias is None else d_bias.astype(bias.dtype),
        None,
    )


def _standardized(x, mean, variance, scale, bias, mask, epsilon):
    root = _inverse_root(variance + epsilon)
    centred = _centred(x, mean, mask)
    y = _scaled(centred * _along(root, centred, (-1,)), scale, (-1,))
    if bias is not None:
        y = _counted(y + _along(bias, y, (-1,)), _beside(mask, x))
    return y.astype(x.dtype), root


def _centred(x, mean, mask):
    """x − μ of the entries that count, 0 for the others."""
    mask = _beside(mask, x)
    z = _counted(wide(x), mask)
    return _counted(z - _along(mean, z, (-1,)), mask)


def _over(axis_name: str | tuple[str, ...] | None, x: jax.Array) -> jax.Array:
    """The sum over a mapped axis, or several."""
    if axis_name is None:
        return x
    if explicit_mesh(x) is None:
        return lax.psum(x, axis_name)
    # JAX's sums under vmap give a wrong sharding there (0.10.2 and 0.12.0.1).
    for name in axis_name if isinstance(axis_name, tuple) else (axis_name,):
        x = jnp.sum(lax.all_gather(x, name), axis=0)
    return x


# ----------------------------------------------------------------------------------- weights


def weight_norm(v: chex.Array, g: chex.Array) -> jax.Array:
    """W = g v / ‖v‖, row by row: the direction and the length of each row are trained apart.

    Args:
        v: floating, `(out, ...)`; a row is all that one output has.
        g: the lengths, floating, `(out,)`.

    Returns:
        W, of v's shape and dtype. A row of v that is 0 gives 0, and has no gradient.

    Raises:
        TypeError: an argument isn't real floating.
        ValueError: the shapes don't fit.

    Source: Salimans, Kingma, "Weight normalization", NeurIPS 2016.
    """
    must_be_real("weight_norm", v=v, g=g)
    if v.ndim == 0 or g.shape != v.shape[:1]:
        raise ValueError(
            f"weight_norm: argument 'g' has shape {g.shape}, wanted {v.shape[:1]}: a length for "
            f"each row of 'v' of shape {v.shape}."
        )
    v, g = jnp.asarray(v), jnp.asarray(g)
    z = wide(v)
    others = tuple(range(1, v.ndim))
    largest = lax.stop_gradient(jnp.max(jnp.abs(z), others, keepdims=True, initial=0))
    size = jnp.where(largest > 0, largest, 1)  # cancels: with it, no square overflows
    square = jnp.sum(jnp.square(z / size), others, keepdims=True)
    factor = _inverse_root(square) / size * g.astype(z.dtype).reshape(-1, *(1,) * (v.ndim - 1))
    return (z * factor).astype(v.dtype)


def spectral_norm(W: chex.Array, u: chex.Array, v: chex.Array) -> jax.Array:
    """W / σ with σ = uᵀ W v, W's largest singular value where u and v are its singular vectors.

    Args:
        W: floating, `(out, ...)`, taken for a matrix `(out, in)` of all other axes together.
        u, v: floating, `(out,)` and `(in,)`, held constant; `power_iteration` finds them.

    Returns:
        The weight whose product lengthens no vector, of W's shape and dtype; 0 where σ is 0.

    Raises:
        TypeError: an argument isn't real floating.
        ValueError: the shapes don't fit.

    Source: Miyato, Kataoka, Koyama, Yoshida, "Spectral normalization for generative adversarial
    networks", ICLR 2018.
    """
    matrix = _matrix("spectral_norm", W, u=u, v=v)
    W = jnp.asarray(W)
    u, v = (lax.stop_gradient(a).astype(matrix.dtype) for a in (u, v))
    sigma = u @ (matrix @ v)
    is_zero = sigma == 0
    factor = jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, sigma))
    return (W.astype(matrix.dtype) * factor).astype(W.dtype)


def power_iteration(
    W: chex.Array, u: chex.Array, v: chex.Array, *, iterations: int = 1
) -> tuple[jax.Array, jax.Array]:
    """v ← Wᵀ u / ‖Wᵀ u‖, u ← W v / ‖W v‖: towards W's first singular vectors. It has no gradient.

    Args:
        W: floating, `(out, ...)`, taken for a matrix `(out, in)` of all other axes together.
        u: floating, `(out,)`.
        v: floating, `(in,)`; only its dtype matters.
        iterations: how many times.

    Returns:
        u and v, unit vectors of the dtypes of u and v; zeros where W is 0.

    Raises:
        TypeError: an argument isn't real floating, or iterations no integer.
        ValueError: the shapes don't fit, or iterations is below 1.
    """
    matrix = lax.stop_gradient(_matrix("power_iteration", W, u=u, v=v))
    arguments.integer("power_iteration", "iterations", iterations, least=1)
    left = lax.stop_gradient(u).astype(matrix.dtype)
    for _ in range(iterations):
        right = _of_length_one(left @ matrix)
        left = _of_length_one(matrix @ right)
    return left.astype(jnp.result_type(u)), right.astype(jnp.result_type(v))


def _of_length_one(x):
    largest = jnp.max(jnp.abs(x), initial=0)
    x = x / jnp.where(largest > 0, largest, 1)  # no square overflows, and not all are 0
    return x * _inverse_root(jnp.sum(jnp.square(x)))


def _matrix(op, W, **vectors):
    must_be_real(op, W=W, **vectors)
    if W.ndim < 2:
        raise ValueError(f"{op}: argument 'W' has shape {W.shape}, wanted (out, in, ...).")
    matrix = wide(jnp.asarray(W)).reshape(W.shape[0], math.prod(W.shape[1:]))
    for (name, x), size in zip(vectors.items(), matrix.shape, strict=True):
        if x.shape != (size,):
            raise ValueError(f"{op}: argument '{name}' has shape {x.shape}, wanted ({size},).")
    return matrix


# ---------------------------------------------------------------------------------- formulas


def _normalise(x, scale, bias, mask, over, features, epsilon):
    """scale ∘ (x − μ) r + bias, and (μ, r); the statistics along `over`."""
    mask = _beside(mask, x)
    z = _counted(wide(x), mask)
    mean = _mean(z, over, mask)
    centred = _counted(z - mean, mask)
    root = _inverse_root(_mean(jnp.square(centred), over, mask) + epsilon)
    y = _scaled(centred * root, scale, features)
    if bias is not None:
        y = _counted(y + _along(bias, y, features), mask)
    return y.astype(x.dtype), (mean, root)


def _gradients(residuals, g, over, features):
    """The gradients of `_normalise` for x, scale and bias, and None for the mask."""
    x, scale, bias, mask, (mean, root) = residuals
    mask = _beside(mask, x)
    normal = _counted((_counted(wide(x), mask) - mean) * root, mask)
    d = _counted(wide(g), mask)
    d_scale = _sum_to(scale, d * normal, features)
    d_bias = _sum_to(bias, d, features)
    d = _scaled(d, scale, features)
    dx = root * (d - _mean(d, over, mask) - normal * _mean(d * normal, over, mask))
    return _counted(dx, mask).astype(x.dtype), d_scale, d_bias, None


def _inverse_root(x):
    """1 / √x, and 0 for 0."""
    is_zero = x == 0
    return jnp.where(is_zero, 0, lax.rsqrt(jnp.where(is_zero, 1, x)))


def _mean(x, axes, mask):
    """The mean along axes, which are kept; of the entries that count. Of none it is 0."""
    total = jnp.sum(x, axes, keepdims=True)
    if mask is None:
        return total / max(math.prod(x.shape[a] for a in axes), 1)
    count = jnp.sum(jnp.broadcast_to(mask, x.shape), axes, keepdims=True, dtype=x.dtype)
    return total / jnp.maximum(count, 1)


def _counted(x, mask):
    """x, with 0 for what doesn't count."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def _scaled(x, scale, features):
    return x if scale is None else x * _along(scale, x, features)


def _along(weights, x, features):
    """Weights of some axes of x, to be multiplied with x."""
    features = [a % x.ndim for a in features]
    shape = [n if a in features else 1 for a, n in enumerate(x.shape)]
    return weights.astype(wide(x).dtype).reshape(shape)


def _sum_to(weights, x, features):
    """The sum of x over all but some axes, for weights of these axes, in their dtype."""
    if weights is None:
        return None
    features = [a % x.ndim for a in features]
    others = tuple(a for a in range(x.ndim) if a not in features)
    return jnp.sum(x, others).astype(weights.dtype)


def _beside(mask, x):
    """A mask with as many axes as x."""
    return None if mask is None else mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)


def _grouped(x, scale, bias, mask, groups):
    """All with the last axis cut into groups, and the axes that a group's statistics are over."""

    def cut(a):
        return a.reshape(*a.shape[:-1], groups, a.shape[-1] // groups)

    z = cut(x)
    scale, bias = (None if a is None else cut(a) for a in (scale, bias))
    mask = _beside(mask, x)
    if mask is not None:
        mask = mask[..., None] if mask.shape[-1] == 1 else cut(mask)
    return z, scale, bias, mask, (*range(x.ndim - 1), x.ndim)


# ------------------------------------------------------------------------------------ checks


def _check(op, x, axis, epsilon, mask, **weights) -> tuple[int, ...]:
    """The axes that `axis` names, counted from 0 and in x's order."""
    must_be_real(op, x=x)
    axes = tuple(sorted(axes_of(op, x, axis)))
    _check_weights(op, x, tuple(x.shape[a] for a in axes), weights)
    check_mask(op, x, mask)
    arguments.number(op, "epsilon", epsilon, least=0)
    return axes


def _check_groups(x, scale, bias, mask, groups, epsilon, op="group_norm"):
    must_be_real(op, x=x)
    arguments.integer(op, "groups", groups, least=1)
    if x.ndim == 0 or x.shape[-1] % groups:
        raise ValueError(
            f"{op}: argument 'x' has shape {x.shape}, wanted (..., features) with features that "
            f"groups={groups} divides."
        )
    _check_weights(op, x, x.shape[-1:], {"scale": scale, "bias": bias})
    check_mask(op, x, mask)
    arguments.number(op, "epsilon", epsilon, least=0)


def _check_weights(op: str, x: chex.Array, shape: Sequence[int], weights: dict) -> None:
    for name, w in weights.items():
        if w is None:
            continue
        must_be_real(op, **{name: w})
        if w.shape != tuple(shape):
            raise ValueError(
                f"{op}: argument '{name}' has shape {w.shape}, wanted {tuple(shape)}, that of the "
                f"features of 'x' of shape {x.shape}."
            )


def check_mask(op: str, x: chex.Array, mask: chex.Array | None) -> None:
    if mask is None:
        return
    must_be_array(op, "mask", mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"{op}: argument 'mask' of shape {mask.shape} has dtype {mask.dtype}, wanted booleans, "
            "true where an entry counts."
        )
    shape = (1,) * (x.ndim - mask.ndim) + mask.shape
    if len(shape) != x.ndim or any(m not in (1, n) for m, n in zip(shape, x.shape, strict=True)):
        raise ValueError(
            f"{op}: argument 'mask' has shape {mask.shape}, which doesn't broadcast to {x.shape}, "
            "the shape of 'x'. (A mask of positions: mask[..., None].)"
        )
