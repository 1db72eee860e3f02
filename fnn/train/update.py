"""An optimiser's update that is looked at before it is kept, without a second set of memory.

Whether a step is good is known only when every new number was looked at, and then the old
state must still be there. So the new numbers are computed to be looked at and, if they are
good, computed again in the place of the old. XLA folds arithmetic that goes entry by entry
into the loop that uses it, so that this costs less than keeping them. What doesn't go entry by
entry (sums, products, random numbers, line searches) is computed once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn.backprop.partial_evaluation import run
from fnn.jaxpr import Equation, Program, program, trace
from fnn.train.state import State, path_name

# What XLA computes entry by entry, inside the loop that needs it.
_NAMES = """
    abs add add_any and broadcast_in_dim cbrt ceil clamp complex conj convert_element_type
    copy copy_p cos div eq exp exp2 expand_dims expm1 floor ge gt imag integer_pow is_finite
    le log log1p logistic lt max min mul ne neg nextafter not or pow real reduce_precision
    rem reshape round rsqrt select_n sign sin sqrt square squeeze stop_gradient sub tanh xor
"""
_ENTRYWISE = frozenset(_NAMES.split())


def propose(update: Callable[[], Any]) -> tuple[Any, Callable[[], Any]]:
    """Run an update; return what it gives, and a function that gives it again.

    The second computes anew only what goes entry by entry. Called in a branch of `lax.cond`,
    it keeps XLA from holding the first's arrays until there.
    """
    trees = []

    def leaves():
        flat, tree = jax.tree.flatten(update())
        trees.append(tree)
        return flat

    flat = program(trace(leaves, ()))
    values = dict(enumerate(flat.values(())))
    run(flat.equations, values)
    entrywise = _entrywise_end(flat)

    def again():
        anew = dict(values)
        run(entrywise, anew)
        return jax.tree.unflatten(trees[0], [anew[i] for i in flat.outputs])

    return jax.tree.unflatten(trees[0], [values[i] for i in flat.outputs]), again


def _entrywise_end(flat: Program) -> list[Equation]:
    """The equations on arrays, entry by entry, that stand between the outputs and all others."""

    def is_entrywise(equation: Equation) -> bool:
        entrywise = equation.name in _ENTRYWISE and not equation.has_effects
        return entrywise and bool(flat.avals[equation.outs[0]].shape)

    return flat.needed_for(flat.outputs, through=is_entrywise)[0]


class Group(NamedTuple):
    """Leaves that are looked at in one loop: a parameter, and what the optimiser keeps for it.

    Fields:
        parameter: the number of the parameter's leaf, or None for other numbers of the state.
        leaves: numbers of leaves of (params, opt_state).
    """

    parameter: int | None
    leaves: tuple[int, ...]


def groups(state: State) -> list[Group]:
    """All inexact leaves of the parameters and the optimiser's state, the parameters' first.

    An optimiser keeps moments and the like in trees like the parameters: the end of the path
    to a leaf, and its type, say whose it is. They are computed from the same numbers.
    """
    paths = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    number = len(jax.tree.leaves(state.params))
    found: dict[Any, list[int]] = {}
    for i, (path, leaf) in enumerate(paths):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        kind = (leaf.shape, getattr(jax.typeof(leaf), "sharding", None))
        ends = (path[1:],) if i < number else (path[k:] for k in range(1, len(path) + 1))
        key = next(((e, kind) for e in ends if (e, kind) in found), None)
        if i < number:
            key = (path[1:], kind)
        found.setdefault(key or i, []).append(i)
    return [
        Group(leaves[0] if leaves[0] < number else None, tuple(leaves)) for leaves in found.values()
    ]


def square_sums(gradient: Any, new: State, old: State, *, exact: bool) -> jax.Array:
    """For each group, Σ |g|² over the parameter's gradient, or nan if a new number is bad.

    A number is bad if it became inf or nan: some optimisers' states hold inf from the start,
    the best loss so far, for one. (A group without a gradient has the sum 0.)

    To the square of the gradient's entry, 0 times the new numbers is added, which is 0, or nan
    if one of them isn't finite: one sum tells both, in one loop.

    Args:
        gradient: a tree like the parameters.
        new, old: the states.
        exact: whether an array of the old state may hold inf or nan. XLA's CPU compiler makes
            more than one loop of a choice and a sum, so this costs more.
    """
    gradients = jax.tree.leaves(gradient)
    after = jax.tree.leaves((new.params, new.opt_state))
    before = jax.tree.leaves((old.params, old.opt_state))
    sums = []
    for group in groups(old):
        terms = [] if group.parameter is None else [square(gradients[group.parameter])]
        for i in group.leaves:
            look_back = exact or after[i].ndim == 0
            terms.append(_zero_if_fine(after[i], before[i] if look_back else None))
        dtype = jnp.result_type(*terms)
        sums.append(jnp.sum(functools.reduce(jnp.add, [t.astype(dtype) for t in terms])))
    dtype = jnp.result_type(*sums)
    return jnp.stack([s.astype(dtype) for s in sums])


def holds_nonfinite(state: State) -> bool:
    """Whether an array of the state holds inf or nan. (Scalars are always looked at exactly.)"""
    arrays = [
        x
        for x in jax.tree.leaves((state.params, state.opt_state))
        if jnp.ndim(x) and jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    return bool(_any_nonfinite(arrays))


@jax.jit
def _any_nonfinite(arrays: list) -> jax.Array:
    found = jnp.zeros((), bool)
    for x in arrays:
        found = found | ~jnp.all(jnp.isfinite(x))
    return found


def square(x: jax.Array) -> jax.Array:
    """|x|² of each entry, in at least float32."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return square(x.real) + square(x.imag)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * x


def _zero_if_fine(new: jax.Array, old: jax.Array | None) -> jax.Array:
    """0 times the new numbers; where the old ones weren't finite, 0."""
    if jnp.issubdtype(new.dtype, jnp.complexfloating):
        olds = (None, None) if old is None else (old.real, old.imag)
        return _zero_if_fine(new.real, olds[0]) + _zero_if_fine(new.imag, olds[1])
    zero = new * jnp.zeros((), new.dtype)
    if old is not None:
        zero = jnp.where(jnp.isfinite(old), zero, jnp.zeros_like(zero))
    return zero.astype(jnp.promote_types(new.dtype, jnp.float32))


def leaf_names(state: State) -> list[str]:
    """The names of the leaves of (params, opt_state): `params['W']`, `opt_state[0].mu['W']`."""
    parts = (("params", state.params), ("opt_state", state.opt_state))
    return [
        path_name(part, path)
        for part, tree in parts
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
