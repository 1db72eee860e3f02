"""Convolutions that XLA gets wrong where it divides arrays among devices.

A weight's gradient is summed over the images. Where these are dealt out along one axis of a mesh
that has two, each of their parts lies on several devices. XLA then adds up all devices' sums for
groups of features: each part counts as often as there are copies of it. (So it is in JAX 0.10 and
0.12, seen on CPUs, of a convolution whose batch is in groups; what divides is the same on all
platforms. Others are right, but for those of which an axis of space is dealt out so.) Matrix
products are right: here the gradient is one for each place of the window.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from fnn.convolution.windows import Window, in_order_of, in_usual_order, out_space, padded
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
    x_spec, _, y_spec = dimension_numbers
    groups, explicit = batch_group_count, sharding_of(x)
    is_dealt = explicit is not None and any(explicit.spec[d] for d in x_spec[2:])
    if others or (groups == 1 and (not is_dealt or feature_group_count > 1)):
        return None
    x, w = in_usual_order(x, w, dimension_numbers)  # the groups are of x's batch, and of w's out
    window = Window(window_strides, padding, lhs_dilation, rhs_dilation)
    out = out_space(x, w, window)
    *sizes, ins, outs = w.shape
    is_gradient = math.prod(sizes) > math.prod(out)  # of a weight
    if (groups == 1 and not is_gradient) or min(*x.shape, *w.shape, *out) == 0:
        return None
    batch = x.shape[0] // groups
    x, w = _space_on_each(x, slice(1, -1)), _space_on_each(w, slice(0, -2))
    x = padded(x, window)
    each = outs // groups
    w = lax.reshape(w, (*sizes, ins, groups, each))
    summed = (*range(len(sizes)), len(sizes))
    whole = None if explicit is None else NamedSharding(explicit.mesh, PartitionSpec())
    reach = [1 + (n - 1) * hole for n, hole in zip(sizes, window.holes, strict=True)]

    def at(place):
        starts = [jnp.zeros((), place.dtype)] * x.ndim
        starts[1:-1] = [i * stride for i, stride in zip(place, window.strides, strict=True)]
        met = lax.dynamic_slice(x, starts, (x.shape[0], *reach, x.shape[-1]))
        met = lax.slice(met, (0,) * x.ndim, met.shape, (1, *window.holes, 1))
        axes = tuple(d + 2 for d in summed), summed
        return lax.dot_general(
            lax.reshape(met, (groups, batch, *met.shape[1:])),
            w,
            (axes, ((0,), (len(sizes) + 1,))),
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=whole,
        )

    places = numpy.array(list(numpy.ndindex(*out)), numpy.int32)
    few = len(places) <= _UNROLLED
    y = jnp.stack([at(place) for place in places]) if few else lax.map(at, places)
    y = lax.reshape(y, (*out, groups, batch, each))
    last = y.ndim - 1  # (out..., groups, batch, out of a group) -> (batch, out..., outs)
    y = lax.transpose(y, (last - 1, *range(last - 2), last - 2, last))
    y = lax.reshape(y, (batch, *out, outs))
    y = in_order_of(y, y_spec)
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def _space_on_each(x, axes: slice) -> jax.Array:
    """x with these axes whole on each device; JAX slices none that an explicit mesh has dealt."""
    sharding = sharding_of(x)
    if sharding is None:
        return x
    spec = list(sharding.spec)
    spec[axes] = [None] * len(spec[axes])
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
