"""Convolution: features times kernels, summed over a window that slides over the input.

It is *bilinear*: with one argument held fixed, the output is a linear map of the other. So the
local gradient for the input is the kernel, and the local gradient for the kernel is the input:

    y = x * w     ∂L/∂x = g * flipped w     ∂L/∂w = x * g

In one dimension, without strides or dilation, and padded by p zeros on the left,

    y[o] = Σₖ x[o + k - p] w[k].

x[i] meets w[k] in the output o = i - k + p, and w[k] meets x[i] there too:

    ∂L/∂x[i] = Σₖ g[i - k + p] w[k]          g convolved with the kernel read backwards
    ∂L/∂w[k] = Σₒ x[o + k - p] g[o]          x convolved with g as the kernel

A stride of s is a y of which only every s-th entry was kept; its gradient puts s - 1 zeros
between the entries of g, which is what a dilation by s does. So strides and dilations of
the operands change places between forward and backward. Features behave as in a matrix
product: (batch, in)·(in, out), hence the exchanged pairs in the dimension numbers. Groups of
features in the forward pass are groups of the batch for the kernel, and vice versa.

Nothing is conjugated for complex numbers: that is JAX's convention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax import lax

from fnn.backprop.primitives.elementwise import in_dtype_of
from fnn.backprop.primitives.matmul import gradient_sharding
from fnn.backprop.rules import LocalRule, each
from fnn.convolution import conv_general_dilated_p
from fnn.eager import apply
from fnn.jaxpr import Equation


def _conv_x(
    g,
    y,
    x,
    w,
    *,
    window_strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers,
    feature_group_count,
    batch_group_count,
    out_sharding=None,
    **params,
):
    """∂L/∂x[i] = Σₖ g[i - k + p] w[k]: g, spread out by the stride, with the flipped kernel."""
    x_spec, w_spec, y_spec = dimension_numbers
    groups = max(feature_group_count, batch_group_count)
    if groups > 1:  # the kernel's output features (groups × out) become its inputs
        w = _split_axis(w, w_spec[0], groups)
        w = _merge_axis(w, w_spec[0], into=w_spec[1])
    x_sizes = _dilated(x, x_spec, lhs_dilation)
    w_sizes = _dilated(w, w_spec, rhs_dilation)
    g_sizes = _dilated(g, y_spec, window_strides)
    # Entry m = n - 1 - k of the flipped kernel meets g[i - k + p] = g[i + m - (n - 1 - p)].
    before = [n - 1 - low for n, (low, _) in zip(w_sizes, padding, strict=True)]
    after = [  # as many zeros as make the result as long as x
        n_x + n_w - 1 - n_g - low
        for n_x, n_w, n_g, low in zip(x_sizes, w_sizes, g_sizes, before, strict=True)
    ]
    gradient = conv_general_dilated_p.bind(
        g,
        in_dtype_of(g, lax.rev(w, w_spec[2:])),
        window_strides=lhs_dilation,
        padding=tuple(zip(before, after, strict=True)),
        lhs_dilation=window_strides,
        rhs_dilation=rhs_dilation,
        dimension_numbers=lax.ConvDimensionNumbers(y_spec, _swap_features(w_spec), x_spec),
        feature_group_count=groups,
        batch_group_count=1,
        out_sharding=gradient_sharding(x),
        **params,
    )
    gradient = in_dtype_of(x, gradient)
    if batch_group_count > 1:  # the groups come back as features; they were groups of the batch
        gradient = _split_axis(gradient, x_spec[1], batch_group_count)
        gradient = _merge_axis(gradient, x_spec[1], into=x_spec[0])
    return gradient


def _conv_w(
    g,
    y,
    x,
    w,
    *,
    window_strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers,
    feature_group_count,
    batch_group_count,
    out_sharding=None,
    **params,
):
    """∂L/∂w[k] = Σₒ x[o + k - p] g[o]: x, with g in the kernel's place."""
    if g.size == 0:
        return None  # no output, no gradient (and no convolution with a kernel of size 0)
    x_spec, w_spec, y_spec = dimension_numbers
    x_sizes = _dilated(x, x_spec, lhs_dilation)
    w_sizes = _dilated(w, w_spec, rhs_dilation)
    g_sizes = _dilated(g, y_spec, window_strides)
    before = [low for low, _ in padding]
    after = [  # as many zeros as make the result as long as w
        n_g - n_x + n_w - low - 1
        for n_x, n_w, n_g, low in zip(x_sizes, w_sizes, g_sizes, before, strict=True)
    ]
    gradient = conv_general_dilated_p.bind(
        in_dtype_of(g, x),
        g,
        window_strides=rhs_dilation,
        padding=tuple(zip(before, after, strict=True)),
        lhs_dilation=lhs_dilation,
        rhs_dilation=window_strides,
        dimension_numbers=lax.ConvDimensionNumbers(
            _swap_features(x_spec), _swap_features(y_spec), _swap_features(w_spec)
        ),
        feature_group_count=batch_group_count,
        batch_group_count=feature_group_count,
        out_sharding=gradient_sharding(w),
        **params,
    )
    return in_dtype_of(w, gradient)


def _swap_features(spec: Sequence[int]) -> tuple[int, ...]:
    """(batch, features, space...) -> (features, batch, space...), or out and in of a kernel."""
    return (spec[1], spec[0], *spec[2:])


def _dilated(x, spec: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """The spatial sizes of x once `dilation - 1` zeros stand between its entries."""
    return [dilated(x.shape[axis], d) for axis, d in zip(spec[2:], dilation, strict=True)]


def dilated(size: int, dilation: int) -> int:
    """A size once `dilation - 1` holes stand between the entries."""
    if dilation == 1 or (isinstance(size, int) and size == 0):
        return size
    return 1 + dilation * (size - 1)


def _split_axis(x, axis: int, groups: int):
    """(..., groups·n, ...) -> (..., groups, n, ...)."""
    shape = (*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])
    return lax.reshape(x, shape)


def _merge_axis(x, axis: int, into: int):
    """Take `axis` out and lay it before axis `into` (as numbered without it) as one axis."""
    order = [i for i in range(x.ndim) if i != axis]
    shape = [x.shape[i] for i in order]
    shape[into] *= x.shape[axis]
    order.insert(into, axis)
    return lax.reshape(x, shape, order)


class _Convolution(LocalRule):
    """JAX's convolution, whose value is computed as its gradients are: see `fnn/convolution`."""

    def forward(
        self, equation: Equation, needed: Sequence[bool], ins: Sequence, opaque: bool
    ) -> tuple[list, Any]:
        outs = apply(dataclasses.replace(equation, primitive=conv_general_dilated_p), ins)
        return outs, (ins, outs)


RULES: dict[str, LocalRule] = {
    "conv_general_dilated": _Convolution(
        *each(_conv_x, _conv_w, local_gradient=("g * flipped w", "x * g"))
    ),
}
