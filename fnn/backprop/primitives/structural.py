"""Operations that move numbers, copy them, or leave some out, but never change them.

Each output entry is a copy of one input entry. Backwards, an input entry collects the gradients
of its copies: one copy (reshape, transpose, ...) means the same move undone, several copies
(broadcast, tile) mean a sum, no copy (what a slice left out) means zero.

    y = broadcast(x)   ∂L/∂x = Σ over the copies of g        y = x[2:5]   ∂L/∂x = g padded by zeros
    y = transpose(x)   ∂L/∂x = g transposed back             y = [a, b]   ∂L/∂a = a's part of g

That broadcasting and summing are each other's gradient is the reason for the sums over the
batch in the gradient of a bias (CS231n, lecture 4).
"""

from __future__ import annotations

import jax
from jax import lax

from fnn.backprop.rules import ControlRule, LocalRule, each, joint, zero
from fnn.eager import apply
from fnn.meshes import sharding_of


def _reshape(g, y, x, *, dimensions=None, **_):
    if dimensions is None:
        return lax.reshape(g, x.shape, out_sharding=sharding_of(x))
    g = lax.reshape(g, [x.shape[i] for i in dimensions])
    return lax.transpose(g, _inverse(dimensions))


def _transpose(g, y, x, *, permutation):
    return lax.transpose(g, _inverse(permutation))


def _broadcast_in_dim(g, y, x, *_, broadcast_dimensions, **__):
    """Sum over the axes that are new, and over those of size 1 that were repeated."""
    ones = [
        i
        for i, (axis, n) in enumerate(zip(broadcast_dimensions, x.shape, strict=True))
        if n == 1 and g.shape[axis] != 1
    ]
    from_x = [axis for i, axis in enumerate(broadcast_dimensions) if i not in ones]
    axes = [axis for axis in range(g.ndim) if axis not in from_x]
    sharding = sharding_of(x)
    if sharding is not None:
        spec = sharding.spec
        kept = tuple(p for i, p in enumerate(spec) if i not in ones)
        sharding = sharding.update(spec=spec.update(partitions=kept))
    g = lax.reduce_sum(g, axes, out_sharding=sharding) if axes else g
    return lax.expand_dims(g, ones) if ones else g


def _tile(g, y, x, *, reps):
    """Each axis of g is (repetitions, entries): sum over the repetitions."""
    pairs = [n for pair in zip(reps, x.shape, strict=True) for n in pair]
    return lax.reduce_sum(lax.reshape(g, pairs), range(0, 2 * x.ndim, 2))


def _pad(needed, g, y, x, value, *, padding_config):
    """x's entries stand in g with `interior` others between them; all others are the value's."""
    low, high, interior = zip(*padding_config, strict=True) if padding_config else ((), (), ())
    of_x = g
    if any(n != 0 for n in (*low, *high)):  # a negative padding cut entries off: zeros for them
        inverse = [(-n, -m, 0) for n, m in zip(low, high, strict=True)]
        of_x = lax.pad(of_x, _zero(g), inverse)
    if any(interior):
        of_x = lax.slice(of_x, [0] * g.ndim, of_x.shape, [n + 1 for n in interior])
    if not needed[1]:
        return of_x, None
    return of_x, _sum_of_padding(g, padding_config)


def _sum_of_padding(g, padding_config):
    """Σ of g before, between and behind x's entries, axis by axis.

    Not Σ g less x's part of it: where that is large, the difference would cancel.
    """
    total = _zero(g)
    for axis, (low, high, interior) in enumerate(padding_config):
        n, step = g.shape[axis], interior + 1
        first, stop = low if low >= 0 else low % step, min(n - high, n)
        places = [(0, min(first, n), 1), (max(stop, first), n, 1)]
        places += [(first + i, stop, step) for i in range(1, step)]
        for place in places:
            if place[0] < place[1]:
                part = lax.slice_in_dim(g, *place, axis)
                total = lax.add(total, lax.reduce_sum(part, range(g.ndim)))
        if (low, high, interior) != (0, 0, 0):
            g = lax.slice_in_dim(g, min(first, n), max(stop, min(first, n)), step, axis)
    return total


def _slice(g, y, x, *, start_indices, limit_indices, strides):
    """Zeros where entries were left out: before, between and after."""
    config = []
    for n, m, start, stride in zip(
        x.shape, g.shape, start_indices, strides or (1,) * x.ndim, strict=True
    ):
        covered = 0 if m == 0 else (m - 1) * stride + 1
        config.append((start, n - start - covered, stride - 1))
    return lax.pad(g, _zero(g), config)


def _concatenate(needed, g, y, *parts, dimension):
    """y = [a, b, ...]: each part of g to the argument that it came from."""
    sizes = [part.shape[dimension] for part in parts]
    found = lax.split(g, sizes, axis=dimension)
    return [a if wanted else None for a, wanted in zip(found, needed, strict=True)]


def _split(g, y, x, *, axis, **_):
    """y₁, y₂, ... are the parts of x: ∂L/∂x = [g₁, g₂, ...]."""
    return lax.concatenate(g, axis)


def _stack(needed, g, y, *parts, axis):
    found = lax.unstack(g, axis=axis)
    return [a if wanted else None for a, wanted in zip(found, needed, strict=True)]


def _unstack(g, y, x, *, axis):
    return lax.stack(g, axis=axis)


def _barrier_backward(equation, needed, saved, cotangents, opaque):
    """The barrier holds in the backward pass too: the gradients pass one together."""
    chosen = [i for i, g in enumerate(cotangents) if needed[i] and g is not None]
    passed = lax.optimization_barrier([cotangents[i] for i in chosen])
    found = dict(zip(chosen, passed, strict=True))
    return [found.get(i) for i in range(len(needed))]


def _device_put_backward(equation, needed, xs, cotangents, opaque):
    """The gradient travels back to where x came from."""
    found = []
    for wanted, g, x, source in zip(needed, cotangents, xs, equation.params["srcs"], strict=True):
        if not wanted or g is None:
            found.append(None)
            continue
        if source is None and jax.typeof(x).memory_space != jax.typeof(g).memory_space:
            source = jax.typeof(x).memory_space
        found.append(g if source is None else jax.device_put(g, source))
    return found


def _keeping_inputs(equation, needed, ins, opaque):
    return apply(equation, ins), ins


def _sharding_constraint(g, y, x, *, sharding, **_):
    return lax.with_sharding_constraint(g, sharding)


def _reshard(g, y, x, **_):
    return jax.sharding.reshard(g, jax.typeof(x).sharding)


def _inverse(permutation) -> list[int]:
    return sorted(range(len(permutation)), key=lambda i: permutation[i])


def _zero(g):
    return g.dtype.type(0)


RULES: dict[str, LocalRule | ControlRule] = {
    # The same entries in another arrangement
    "reshape": each(_reshape, local_gradient=("reshaped back",)),
    "transpose": each(_transpose, local_gradient=("transposed back",)),
    "squeeze": each(
        lambda g, y, x, *, dimensions: lax.expand_dims(g, dimensions),
        local_gradient=("axes put back",),
    ),
    "rev": each(
        lambda g, y, x, *, dimensions: lax.rev(g, dimensions), local_gradient=("reversed",)
    ),
    # Several copies
    "broadcast_in_dim": each(_broadcast_in_dim, local_gradient=("Σ over the copies",)),
    "tile": each(_tile, local_gradient=("Σ over the copies",)),
    # Some left out, others put in
    "slice": each(_slice, local_gradient=("padded with zeros",)),
    "pad": joint(_pad, local_gradient=("the part of x", "Σ of the rest")),
    # Joined and taken apart
    "concatenate": joint(_concatenate, local_gradient=("its part",)),
    "split": each(_split, local_gradient=("concatenated",)),
    "stack": joint(_stack, local_gradient=("its part",)),
    "unstack": each(_unstack, local_gradient=("stacked",)),
    # In another place
    "optimization_barrier": ControlRule(_keeping_inputs, _barrier_backward, local_gradient=("1",)),
    "device_put": ControlRule(_keeping_inputs, _device_put_backward, local_gradient=("1",)),
    "sharding_constraint": each(_sharding_constraint, local_gradient=("1",)),
    "reshard": each(_reshard, local_gradient=("1",)),
    "tie": each(None, lambda g, y, a, b: g, local_gradient=("0", "1")),
    # Made from nothing
    "iota": zero,
    "empty": zero,
}
