"""Attention over a sequence whose positions are divided over devices: keys and values go round.

Each device has some of the queries, and as many keys and values. It computes with the keys that it
has, passes them on to the next device, and goes on with those of the one before, until it has met
all: the running maximum and sum of `attention` go on from one device's keys to the next's. So the
result is that of `attention`, and no device ever holds all keys. Backward goes round once more,
with the keys' gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fnn import arguments
from fnn.meshes import mesh_here, varies_as, with_auto_axes, with_auto_types
from fnn.operation import rule
from fnn.ops.arguments import block_size
from fnn.ops.sequences.attention import check
from fnn.ops.sequences.blockwise import (
    Blocks,
    blockwise_attention,
    finished,
    of_no_keys,
    running,
)
from fnn.precision import wide, wide_dtype


def ring_attention(
    q: chex.Array,
    k: chex.Array,
    v: chex.Array,
    *,
    mesh: Mesh,
    axis: str,
    causal: bool = False,
    window: int | None = None,
    mask: chex.Array | None = None,
    slopes: chex.Array | None = None,
    scale: float | None = None,
    block: int | None = None,
) -> jax.Array:
    """`attention` with the queries, the keys and the values divided over an axis of a mesh.

    Each of the axis's n devices has 1/n of the positions, in order, and sends its keys and values
    n − 1 times to the next one (in backward with their gradients, and those once more).

    Args:
        q, k, v: as of `attention`; queries and keys must be divisible by n. They are arrays of the
            whole sequence, inside or outside of jit.
        mesh: the mesh. The kinds of its axes don't matter, automatic or explicit ones: arrays with
            explicit axes give one with them, others one that the compiler divides. (A batch with
            explicit axes is mapped inside of jit: outside, JAX can't.)
        axis: the name of its axis.
        causal, window, mask, slopes, scale, block: as of `attention`. With `causal`, a device
            skips keys that come after all of its queries: the first device waits for the last.

    Returns:
        As `attention`, shape `(queries, heads, value_features)`, divided alike.

    The local gradient is that of `attention`; kept are q, k, v, y, and two numbers for each query
    and head.

    Raises:
        TypeError, ValueError: as `attention`; or the mesh has no such axis, or its size doesn't
            divide the numbers of queries and keys.

    Liu et al., "Ring attention with blockwise transformers for near-infinite context",
    arXiv:2310.01889.
    """
    where = "ring_attention"
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"{where}: mesh must be a jax.sharding.Mesh, but got {arguments.show(mesh)}."
        )
    if axis not in mesh.axis_names:
        raise ValueError(
            f"{where}: axis must be one of the mesh's, but got {axis!r} and {arguments.show(mesh)}."
        )
    check(q, k, v, mask, None, slopes, None, None, where)
    n = mesh.shape[axis]
    for name, x in (("queries", q), ("keys", k)):
        if x.shape[0] % n:
            raise ValueError(
                f"{where}: the {x.shape[0]} {name} can't be divided evenly over the {n} devices of "
                f"the axis {axis!r}: pad the sequence to a multiple of {n} positions."
            )
    if scale is None:
        scale = 1 / math.sqrt(max(q.shape[-1], 1))
    if mask is not None:
        mask = mask.reshape((1,) * (3 - mask.ndim) + mask.shape)
    given = {"mask": mask, "slopes": slopes}
    arrays = q, k, v, {name: x for name, x in given.items() if x is not None}
    static = {
        "mesh": with_auto_types(mesh),
        "axis": axis,
        "causal": arguments.flag(where, "causal", causal),
        "window": None if window is None else arguments.integer(where, "window", window, least=1),
        "scale": arguments.fixed_number(where, "scale", scale),
        "block": block_size(where, block, on_cpu=128, elsewhere=512),
    }
    # Arrays of explicit axes may lie otherwise: the compiler brings them where they are wanted.
    return with_auto_axes(lambda *args: attention_round(*args, **static)[0], arrays, P(axis))


@rule
def attention_round(q, k, v, given, *, mesh, axis, causal, window, scale, block):
    """`blockwise_attention` of all, (y, m, r), each device with its own queries."""
    ring = _Ring(mesh, axis, causal, window, scale, block)

    def own(q, k, v, given):
        blocks = ring.blocks(q, k, v, given, 0)

        def meet(total, keys, source):
            return running(blocks, q, *keys, ring.given(given, q, k, source), total), keys

        total, _ = ring.round(meet, of_no_keys(blocks), (k, v))
        return finished(blocks, q, total)

    specs = ring.of_queries, ring.of_keys, ring.of_keys, ring.of_given(given)
    return ring.over(own, specs, ring.of_results)(q, k, v, given)


@attention_round.forward
def _(q, k, v, given, **static):
    y, m, r = attention_round(q, k, v, given, **static)
    return (y, m, r), ((q, k, v, given), y, m, r)


@attention_round.backward
def _(residuals, g, *, mesh, axis, causal, window, scale, block):
    """As of `blockwise_attention`, from one device's keys to the next's; dk and dv go along."""
    ring = _Ring(mesh, axis, causal, window, scale, block)
    (q, k, v, given), y, m, r = residuals
    g_y, _, g_r = g

    def own(q, k, v, given, y, m, r, g_y, g_r):
        def meet(total, moving, source):
            (dq, d_slopes), (k, v, dk, dv) = total, moving
            arrays = q, k, v, ring.given(given, q, k, source)
            more = ring.backward((arrays, y, m, r), (g_y, None, g_r))
            if d_slopes is not None:
                d_slopes = d_slopes + more[3]["slopes"].astype(d_slopes.dtype)
            return (dq + wide(more[0]), d_slopes), (k, v, dk + more[1], dv + more[2])

        zeros = lambda x, dtype: varies_as(jnp.zeros(x.shape, dtype), q)
        slopes = given.get("slopes")
        total = [None if x is None else zeros(x, wide_dtype(x.dtype)) for x in (q, slopes)]
        # What moves is summed in its own dtype: of 16-bit floats, else twice as much would be sent.
        moving = k, v, zeros(k, k.dtype), zeros(v, v.dtype)
        (dq, d_slopes), moving = ring.round(meet, tuple(total), moving)
        dk, dv = ring.on(moving[2:])  # and home
        if d_slopes is not None:
            d_slopes = lax.psum(d_slopes, axis).astype(slopes.dtype)
        return dq.astype(q.dtype), dk, dv, d_slopes

    slopes = P() if "slopes" in given else None
    specs = ring.of_queries, ring.of_keys, ring.of_keys, ring.of_given(given)
    results = (*ring.of_results, ring.of_queries, ring.of_results[2])
    out = ring.of_queries, ring.of_keys, ring.of_keys, slopes
    dq, dk, dv, d_slopes = ring.over(own, (*specs, *results), out)(
        q, k, v, given, y, m, r, g_y, g_r
    )
    d_given = dict.fromkeys(given)
    if d_slopes is not None:
        d_given["slopes"] = d_slopes
    return dq, dk, dv, d_given


@attention_round.tangent
def _(residuals, dq, dk, dv, d_given, *, mesh, axis, causal, window, scale, block):
    ring = _Ring(mesh, axis, causal, window, scale, block)
    (q, k, v, given), y, m, r = residuals
    d_given = {name: dx for name, dx in d_given.items() if dx is not None}

    def own(q, k, v, given, y, m, r, dq, dk, dv, d_given):
        def meet(total, moving, source):
            k, v, dk, dv = moving
            arrays = q, k, v, ring.given(given, q, k, source)
            dy, _, dr = ring.tangent((arrays, y, m, r), dq, dk, dv, d_given)
            return (total[0] + wide(dy), total[1] + wide(dr)), moving

        total = tuple(varies_as(jnp.zeros(x.shape, wide_dtype(x.dtype)), q) for x in (y, r))
        total, _ = ring.round(meet, total, (k, v, dk, dv))
        return tuple(t.astype(x.dtype) for t, x in zip(total, (y, r), strict=True))

    whole = jax.tree.map(lambda _: P(), d_given)
    specs = ring.of_queries, ring.of_keys, ring.of_keys, ring.of_given(given)
    results = (*ring.of_results, *specs[:3], whole)
    dy, dr = ring.over(own, (*specs, *results), ring.of_results[::2])(
        q, k, v, given, y, m, r, dq, dk, dv, d_given
    )
    return dy, None, dr


class _Ring:
    """The devices of an axis, each with its part of the queries and of the keys."""

    def __init__(self, mesh, axis: str, causal: bool, window, scale: float, block: int):
        self.mesh, self.axis, self.n = mesh, axis, mesh.shape[axis]
        self.causal = causal
        self.static = {"causal": causal, "window": window, "scale": scale, "block": block}
        self.of_queries = self.of_keys = P(axis)
        self.of_results = P(axis), P(None, axis), P(None, axis)  # y, m and r

    def of_given(self, given: dict) -> dict:
        """How mask and slopes are divided: the mask's rows as the queries."""
        rows = {name: x.shape[1] for name, x in given.items() if name == "mask"}
        return {name: P(None, self.axis) if rows.get(name, 1) > 1 else P() for name in given}

    def over(self, own: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """A function of each device's part, as one of the whole arrays."""
        return jax.shard_map(
            own,
            mesh=mesh_here(self.mesh),
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names={self.axis},
        )

    def blocks(self, q, k, v, given, source) -> Blocks:
        return Blocks(q, k, v, self.given(given, q, k, source), **self.static)

    def given(self, given: dict, q, k, source) -> dict:
        """What this device's queries and the keys of the device `source` have beside them."""
        own = lax.axis_index(self.axis)
        at = lambda device, x: device * x.shape[0] + jnp.arange(x.shape[0], dtype=jnp.int32)
        found = given | {"q_positions": at(own, q), "k_positions": at(source, k)}
        mask = given.get("mask")
        if mask is not None and mask.shape[2] > 1:
            size = k.shape[0]
            found["mask"] = lax.dynamic_slice_in_dim(mask, source * size, size, 2)
        return found

    def backward(self, residuals: tuple, g: tuple) -> tuple:
        backward = blockwise_attention.rule.backward
        assert backward is not None
        return backward(residuals, g, **self.static)

    def tangent(self, residuals: tuple, *dx: Any) -> tuple:
        tangent = blockwise_attention.rule.tangent
        assert tangent is not None
        return tangent(residuals, *dx, **self.static)

    def round(self, meet: Callable, total: Any, moving: Any) -> tuple[Any, Any]:
        """meet(total, moving, source) with what each device had, this one's own first.

        Args:
            meet: returns the new total, and what moves on.
            total: what stays on the device.
            moving: what goes from device to device; `source` is where it began.
        """
        own = lax.axis_index(self.axis)

        def if_seen(total, moving, source):
            if not self.causal:
                return meet(total, moving, source)
            return lax.cond(source <= own, meet, lambda *kept: kept[:2], total, moving, source)

        total, moving = meet(total, moving, own)

        def step(carry, i):
            total, moving = carry
            return if_seen(total, self.on(moving), (own - i) % self.n), None

        if self.n == 1:
            return total, moving
        return lax.scan(step, (total, moving), jnp.arange(1, self.n, dtype=jnp.int32))[0]

    def on(self, moving: Any) -> Any:
        """What the device before this one had."""
        if self.n == 1:
            return moving
        return lax.ppermute(moving, self.axis, [(i, (i + 1) % self.n) for i in range(self.n)])
