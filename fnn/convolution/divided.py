"""Convolutions that XLA gets wrong where it divides arrays among devices.

A weight's gradient is summed over the images. Where these are dealt out along one axis of a mesh
that has two, each of their parts lies on several devices. XLA then adds up all devices' sums for
groups of features: each part counts as often as there are copies of it. (So it is in XLA as of JAX
0.10 to 0.12, on all platforms, with a convolution whose batch is in groups; others are right, but
for those of which an axis of space is dealt out so.) Matrix products are right: here the gradient
is one for each place of the window.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from fnn.convolution.windows import Window, out_space, padded, patch_at
from fnn.meshes import sharding_of

# Of more places the products are a loop, which keeps the patches of one place at a time.
_UNROLLED = 9


def convolution(
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
    precision,
    preferred_element_type,
    out_sharding=None,
    **others,
) -> jax.Array | None:
    """`conv_general_dilated`, place by place of its output; None where XLA is right."""
    x_spec, w_spec, y_spec = dimension_numbers
    explicit = sharding_of(x)
    is_dealt = explicit is not None and any(explicit.spec[d] for d in x_spec[2:])
    x = lax.transpose(x, (x_spec[0], *x_spec[2:], x_spec[1]))  # (groups · batch, space..., in)
    w = lax.transpose(w, (*w_spec[2:], w_spec[1], w_spec[0]))  # (window..., in, groups · out)
    window = Window(window_strides, padding, lhs_dilation, rhs_dilation)
    out, groups = out_space(x, w, window), batch_group_count
    *sizes, ins, outs = w.shape
    is_gradient = feature_group_count == 1 and math.prod(sizes) > math.prod(out)  # of a weight
    is_wrong = groups > 1 or (is_dealt and is_gradient)
    if not is_wrong or min(*x.shape, *w.shape, *out) == 0:
        return None
    batch = x.shape[0] // groups
    x, w = _space_on_each(x, slice(1, -1)), _space_on_each(w, slice(0, -2))
    x = padded(x, window)
    each = outs // groups
    w = lax.reshape(w, (*sizes, ins, groups, each))
    summed = (*range(len(sizes)), len(sizes))
    whole = None if explicit is None else NamedSharding(explicit.mesh, PartitionSpec())

    def product(met):
        met = lax.reshape(met, (groups, batch, *met.shape[1:]))
        axes = tuple(d + 2 for d in summed), summed
        return lax.dot_general(
            met,
            w,
            (axes, ((0,), (len(sizes) + 1,))),
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=whole,
        )

    def at(place):
        starts = [jnp.zeros((), place.dtype)] * x.ndim
        starts[1:-1] = [i * stride for i, stride in zip(place, window.strides, strict=True)]
        reach = [1 + (n - 1) * hole for n, hole in zip(sizes, window.holes, strict=True)]
        met = lax.dynamic_slice(x, starts, (x.shape[0], *reach, x.shape[-1]))
        return product(lax.slice(met, (0,) * x.ndim, met.shape, (1, *window.holes, 1)))

    places = list(numpy.ndindex(*out))
    if len(places) <= _UNROLLED:
        met = [patch_at(x, place, sizes, window.holes, window.strides) for place in places]
        y = lax.concatenate([lax.expand_dims(product(m), (0,)) for m in met], 0)
    else:
        y = lax.map(at, jnp.asarray(places, jnp.int32))
    y = lax.reshape(y, (*out, groups, batch, each))
    last = y.ndim - 1  # (out..., groups, batch, out of a group) -> (batch, out..., outs)
    y = lax.transpose(y, (last - 1, *range(last - 2), last - 2, last))
    y = lax.reshape(y, (batch, *out, outs))
    order = (y_spec[0], *y_spec[2:], y_spec[1])
    y = lax.transpose(y, tuple(int(d) for d in numpy.argsort(order)))
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def _space_on_each(x, axes: slice) -> jax.Array:
    """x with these axes whole on each device; JAX slices none that an explicit mesh has dealt."""
    sharding = sharding_of(x)
    if sharding is None:
        return x
    spec = list(sharding.spec)
    spec[axes] = [None] * len(spec[axes])
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
