"""Blocks divided into stages, a device each, through which a batch goes in microbatches.

While the second stage has the first microbatch, the first has the second. With S stages and M
microbatches that takes M + S − 1 turns; in each, a device computes its blocks on what it has and
sends the result to the next device. The first turns of the last device, and the last of the first,
are of no use; that is a share of (S − 1)/(M + S − 1) of its time.

Backward is the derivative of that: the same turns, the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from fnn.layers.layer import LayerError
from fnn.layers.mode import Across
from fnn.meshes import mesh_here

Stage = Callable[[Any, Any, Any, Any, Any], Any]


def pipelined(stage: Stage, params: Any, x: Any, key: Any, others: Any, across: Across) -> Any:
    """All stages, one after the other, on an example; under vmap, on a batch in microbatches.

    Args:
        stage: `stage(params, number, x, key, others) -> y` of one example: the stage's own
            parameters, its number, an array like y, the example's key, and what is given to all.
        params: of all stages, along the first axes of the arrays.
        x, key, others: the example's.
        across: the mesh, the axis of the stages, the number of microbatches.

    Returns:
        What the last stage returns, on all devices.

    Huang et al., "GPipe", arXiv:1811.06965.
    """

    @jax.custom_batching.custom_vmap
    def of_one(params, x, key, others):
        row = jax.tree.map(lambda a: a[None], (x, key, others))
        return jax.tree.map(lambda y: y[0], _of_batch(stage, params, *row, across))

    @of_one.def_vmap
    def _(size, mapped, params, *given):
        if any(jax.tree.leaves(mapped[0])):
            raise LayerError(
                "blocks divided into stages share their parameters among the examples: vmap over "
                "the parameters, or a gradient for each example, wants a network that isn't "
                "divided."
            )

        def row(a, is_mapped):
            return a if is_mapped else jnp.broadcast_to(a, (size, *jnp.shape(a)))

        rows = jax.tree.map(row, given, tuple(mapped[1:]))
        ys = _of_batch(stage, params, *rows, across)
        return ys, jax.tree.map(lambda _: True, ys)

    return of_one(params, x, key, others)


def _of_batch(stage: Stage, params: Any, xs: Any, keys: Any, others: Any, across: Across) -> Any:
    """The stages on a batch, whose examples lie along the first axes of xs, keys and others."""
    axis = across.stages
    stages = across.mesh.shape[axis]
    size = jax.tree.leaves(xs)[0].shape[0]
    count = math.gcd(size, across.microbatches)

    def apart(a):
        # Every count-th example: each device of an axis over the batch has some of each part.
        return jnp.moveaxis(a.reshape(size // count, count, *a.shape[1:]), 1, 0)

    def together(a):
        return jnp.moveaxis(a, 0, 1).reshape(size, *a.shape[2:])

    def own(params, xs, keys, others):
        number = lax.axis_index(axis)
        of_batch = jax.vmap(stage, (None, None, 0, 0, 0))
        # Before the loop: their gradients are summed over the stages once, after it.
        vary = lambda a: lax.pcast(a, axis, to="varying")
        xs = jax.tree.map(vary, xs)
        others = jax.tree.map(vary, others)

        def turn(held, t):
            part = lambda a, i: lax.dynamic_index_in_dim(a, i, keepdims=False)
            mine = jnp.clip(t - number, 0, count - 1)
            new = jax.tree.map(lambda a: part(a, jnp.minimum(t, count - 1)), xs)
            x = jax.tree.map(lambda new, held: jnp.where(number == 0, new, held), new, held)
            beside = jax.tree.map(lambda a: part(a, mine), (keys, others))
            y = of_batch(params, number, x, *beside)
            if stages == 1:
                return y, y
            return lax.ppermute(y, axis, [(i, i + 1) for i in range(stages - 1)]), y

        held = jax.tree.map(lambda a: jnp.zeros_like(a[0]), xs)
        _, ys = lax.scan(turn, held, jnp.arange(count + stages - 1))
        # The last stage's results, sent to all.
        last = lambda a: lax.psum(jnp.where(number == stages - 1, a, jnp.zeros_like(a)), axis)
        return jax.tree.map(lambda a: last(a[stages - 1 :]), ys)

    ys = jax.shard_map(
        own,
        mesh=mesh_here(across.mesh),
        in_specs=(P(axis), P(), P(), P()),
        out_specs=P(),
        axis_names={axis},
    )(params, *jax.tree.map(apart, (xs, keys, others)))
    return jax.tree.map(together, ys)
