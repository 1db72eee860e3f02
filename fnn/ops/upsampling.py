"""Upsampling: more pixels from fewer, by rules that have no weights.

Images are `(height, width, features)`; one number stands for both axes of an image, a tuple for as
many axes of space as it has. Axes in front are a batch.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn import arguments
from fnn.ops.arguments import must_be_array, must_be_real
from fnn.ops.convolutions import Sizes, sizes_of
from fnn.precision import wide


def upsample(x: chex.Array, scale: Sizes, *, method: str = "nearest") -> jax.Array:
    """Each axis of space `scale` times as long.

    Args:
        x: `(..., *space, features)`.
        scale: integers: one for the two axes of an image, or one for each axis.
        method: "nearest", y[s·i + r] = x[i]; or "bilinear", linear between the centres of the
            pixels along each axis, and constant beyond the first and the last centre (PyTorch's
            bilinear with align_corners=False).

    Returns:
        y, `(..., *(scale · space), features)`, of x's dtype; 16-bit floats are weighted in float32.

    Local gradient: the weights with which an entry enters, 1 for "nearest". Nothing is kept.
    Linear: no kink.

    Raises:
        TypeError: x isn't real floating, or an option isn't of its kind.
        ValueError: x has too few axes, or there is no such method.

    Source: Odena, Dumoulin, Olah, "Deconvolution and checkerboard artifacts", Distill, 2016.

    >>> upsample(jnp.asarray([[0.0], [4.0]]), (2,), method="bilinear")[:, 0].tolist()
    [0.0, 1.0, 3.0, 4.0]
    """
    op = "upsample"
    must_be_real(op, x=x)
    arguments.choice(op, "method", method, ("nearest", "bilinear"))
    x = jnp.asarray(x)
    scales, dtype = _axes_of(op, x, "scale", scale), x.dtype
    x = wide(x) if method == "bilinear" else x
    for axis, s in enumerate(scales, x.ndim - 1 - len(scales)):
        if s > 1 and x.size:
            phases = [x] * s if method == "nearest" else _between(x, axis, s)
            whole = (*x.shape[:axis], s * x.shape[axis], *x.shape[axis + 1 :])
            x = jnp.stack(phases, axis + 1).reshape(whole)
        elif s > 1:
            x = jnp.zeros((*x.shape[:axis], s * x.shape[axis], *x.shape[axis + 1 :]), x.dtype)
    return x.astype(dtype)


def _between(x, axis: int, s: int) -> list:
    """y[s·i + r] for r = 0 … s − 1, between x[i] and the neighbour that is nearer to it."""
    n = x.shape[axis]
    first, last = lax.slice_in_dim(x, 0, 1, axis=axis), lax.slice_in_dim(x, n - 1, n, axis=axis)
    before = jnp.concatenate([first, lax.slice_in_dim(x, 0, n - 1, axis=axis)], axis)
    after = jnp.concatenate([lax.slice_in_dim(x, 1, n, axis=axis), last], axis)
    phases = []
    for r in range(s):
        offset = (r + 0.5) / s - 0.5  # of y's centre from that of x[i], in pixels of x
        other, part = (before, -offset) if offset < 0 else (after, offset)
        phases.append((1 - part) * x + part * other)
    return phases


def resize(x: chex.Array, sizes: Sizes, *, method: str = "nearest") -> jax.Array:
    """Each axis of space of a given size, larger or smaller, without smoothing before.

    Args:
        x: `(..., *space, features)`.
        sizes: one number for the two axes of an image, or one for each axis.
        method: "nearest", y[i] = x[⌊i n / m⌋], or "bilinear", linear between the pixels' centres
            (PyTorch's `interpolate(size=...)`, align_corners=False).

    Returns:
        y, `(..., *sizes, features)`, of x's dtype; 16-bit floats are weighted in float32.

    Local gradient: the weights with which an entry enters. Nothing is kept. Linear: no kink. Along
    each axis it is a product with a matrix of m × n weights; by whole numbers `upsample` is
    cheaper.

    Raises:
        TypeError: x isn't real floating, or an option isn't of its kind.
        ValueError: x has too few axes, an axis of space is empty, or there is no such method.
    """
    op = "resize"
    must_be_real(op, x=x)
    arguments.choice(op, "method", method, ("nearest", "bilinear"))
    x = jnp.asarray(x)
    outs, dtype = _axes_of(op, x, "sizes", sizes), x.dtype
    x = wide(x) if method == "bilinear" else x
    for axis, m in enumerate(outs, x.ndim - 1 - len(outs)):
        n = x.shape[axis]
        if n == 0:
            raise ValueError(f"{op}: argument 'x' has shape {x.shape}, with nothing to be resized.")
        if m == n:
            continue
        if method == "nearest":
            x = jnp.take(x, np.arange(m) * n // m, axis) if n > 1 else jnp.repeat(x, m, axis)
            continue
        at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
        low = np.minimum(at.astype(int), max(n - 2, 0))
        weights = np.zeros((m, n))
        weights[np.arange(m), low] += 1 - (at - low)
        weights[np.arange(m), np.minimum(low + 1, n - 1)] += at - low
        x = jnp.moveaxis(jnp.tensordot(x, jnp.asarray(weights, x.dtype), (axis, 1)), -1, axis)
    return x.astype(dtype)


def pixel_shuffle(x: chex.Array, scale: int) -> jax.Array:
    """y[s·i + a, s·j + b, c] = x[i, j, c s² + a s + b]: features become pixels.

    Args:
        x: `(..., height, width, features · scale²)`.
        scale: s.

    Returns:
        y, `(..., s · height, s · width, features)`. The same numbers: PyTorch's order of them.

    Raises:
        TypeError: scale is no integer.
        ValueError: x has fewer than three axes, or features that s² doesn't divide.

    Source: Shi et al., "Real-time single image and video super-resolution using an efficient
    sub-pixel convolutional neural network", arXiv:1609.05158.
    """
    op = "pixel_shuffle"
    s = arguments.integer(op, "scale", scale, least=1)
    *lead, h, w, features = _image(op, x)
    if features % (s * s):
        raise ValueError(
            f"{op}: argument 'x' has shape {x.shape}, wanted a number of features that {s * s} "
            f"divides, for scale={s}."
        )
    n = len(lead)
    x = x.reshape(*lead, h, w, features // (s * s), s, s)
    x = jnp.transpose(x, (*range(n), n, n + 3, n + 1, n + 4, n + 2))
    # One axis after the other: on explicit axes of a mesh JAX cuts, and joins, no two at once.
    x = x.reshape(*lead, h * s, w, s, features // (s * s))
    return x.reshape(*lead, h * s, w * s, features // (s * s))


def pixel_unshuffle(x: chex.Array, scale: int) -> jax.Array:
    """The inverse of `pixel_shuffle`: y[i, j, c s² + a s + b] = x[s·i + a, s·j + b, c].

    Args:
        x: `(..., s · height, s · width, features)`.
        scale: s.

    Returns:
        y, `(..., height, width, features · s²)`.

    Raises:
        TypeError: scale is no integer.
        ValueError: x has fewer than three axes, or a height or width that s doesn't divide.
    """
    op = "pixel_unshuffle"
    s = arguments.integer(op, "scale", scale, least=1)
    *lead, h, w, features = _image(op, x)
    if h % s or w % s:
        raise ValueError(
            f"{op}: argument 'x' has shape {x.shape}, wanted a height and a width that {s} divides."
        )
    n = len(lead)
    x = x.reshape(*lead, h // s, s, w, features)  # one axis after the other, as above
    x = x.reshape(*lead, h // s, s, w // s, s, features)
    x = jnp.transpose(x, (*range(n), n, n + 2, n + 4, n + 1, n + 3))
    return x.reshape(*lead, h // s, w // s, features * s * s)


def _image(op: str, x) -> tuple[int, ...]:
    must_be_array(op, "x", x)
    if x.ndim < 3:
        raise ValueError(
            f"{op}: argument 'x' has shape {x.shape}, wanted (..., height, width, features)."
        )
    return x.shape


def _axes_of(op: str, x, name: str, value) -> tuple[int, ...]:
    """A size for each axis of space: of an image's two where it is one number."""
    space = len(value) if isinstance(value, (tuple, list)) else 2
    sizes = sizes_of(op, name, value, space)
    if x.ndim < space + 1:
        raise ValueError(
            f"{op}: argument 'x' has shape {x.shape}, wanted (..., *space, features) with {space} "
            f"axes of space, for {name}={value}."
        )
    return sizes
