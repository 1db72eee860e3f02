"""The reverse sweep started from columns of the output Hessian's root, not from a gradient.

Where backpropagation takes the loss's gradient with respect to the outputs back to the
parameters, this takes back the columns of S, H = S Sᵀ. What arrives is Jᵀ S, a square root of the
generalised Gauss-Newton matrix: (Jᵀ S)(Jᵀ S)ᵀ = Jᵀ H J (Schraudolph 2002; Dangel et al. 2020). It
is kept factored, with the input A once and G for each column.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from fnn.backprop.partial_evaluation import PartialEvaluation
from fnn.batch import batch_size
from fnn.curvature import output_hessian
from fnn.curvature.checks import pair
from fnn.eager import apply_all
from fnn.jaxpr import Equation, Program, close, program, scan_layout
from fnn.per_example.differentiate import leaf_gradient, partial_evaluation_of_example
from fnn.per_example.exact_norms import measured, sums_products
from fnn.per_example.gradient import FactoredGradient
from fnn.per_example.inputs import parameters
from fnn.per_example.moments import sum_over_parts
from fnn.per_example.precision import square
from fnn.per_example.sums import weighted_sum
from fnn.per_example.terms import Dense, Product, Term, Terms, materialized, one_of
from fnn.precision import wide, wide_together


@dataclasses.dataclass(eq=False)
class SqrtGGN:
    """For one parameter, the columns of Jᵀ S for each example, factored.

    terms: arrays with the batch as first axis; those that differ by column have the columns as
        second.
    axes: the same structure; 0 where an array has an axis of columns (behind the batch's), None
        where it hasn't.
    count: the number of columns.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    terms: tuple[Term, ...]
    axes: tuple[Any, ...]
    count: int

    @property
    def batch_size(self) -> int:
        return jax.tree.leaves(self.terms)[0].shape[0]

    def each(self, function: Callable) -> Any:
        """function(terms of one example and one column), mapped: (batch, columns, ...)."""
        by_column = lambda terms: jax.vmap(function, in_axes=(self.axes,))(terms)
        return jax.vmap(by_column)(self.terms)

    def as_batch(self) -> FactoredGradient:
        """Each example's each column as an example: (batch · columns)."""
        own = self.each(lambda terms: terms)
        flat = lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
        return FactoredGradient(jax.tree.map(flat, own), self.path, self.shape, self.dtype)

    def sum_of_squares(self) -> jax.Array:
        """Σ over examples and columns of the entries' squares: the GGN's diagonal, times N."""
        if len(self.terms) == 1:
            (term,), (axes,) = self.terms, self.axes
            if isinstance(term, Dense):
                return jnp.sum(square(wide(term.value)), axis=(0, 1))
            if isinstance(term, Product) and (term.positions, axes.a, axes.g) == (1, None, 0):
                a, g = wide_together(term.a, term.g)
                return weighted_sum(Product(square(a), jnp.sum(square(g), 1), term.layout), None)
        size = self.count * math.prod(self.shape)

        def squares(terms):
            part = dataclasses.replace(self, terms=terms)
            formed = part.each(materialized)
            return jnp.sum(square(wide(formed)), axis=(0, 1))

        return sum_over_parts(squares, self.terms, self.batch_size, size)

    def squared_norms(self) -> jax.Array:
        """|Jᵀ s|² for each example's each column, (batch, columns)."""
        found = self.each(measured)
        one = jax.eval_shape(self.as_batch).terms
        if not sums_products([one_of(t) for t in one]):
            return lax.square(found.norm)
        doubts = jnp.any(~found.is_in_range | found.cancels)

        def carefully(terms, norms):
            return dataclasses.replace(self, terms=terms).as_batch().norms().reshape(norms.shape)

        return lax.square(
            lax.cond(doubts, carefully, lambda _, norms: norms, self.terms, found.norm)
        )


def sqrt_ggn(
    model: Callable,
    loss: Callable | None,
    params: chex.ArrayTree,
    batch: chex.ArrayTree,
    *,
    key: chex.PRNGKey | None = None,
    samples: int = 0,
    seeds: Callable | None = None,
    part: str = "positive",
    thrifty: bool = True,
) -> tuple[list[SqrtGGN], Any, Any]:
    """`(columns of each parameter, their tree, outputs)` of a batch.

    Args:
        model: `model(params, input)`, the outputs of one example, an array.
        loss: `loss(outputs, target)`, for the root of its Hessian; or
        seeds: `(outputs, target) -> (columns, *outputs.shape)`, instead.
        params: a tree of real arrays.
        batch: `(inputs, targets)`, trees of arrays with the examples along their first axis.
        key, samples: how many random columns to take instead of the exact root.
        part: of which form of the Hessian (see `output_hessian.py`).
        thrifty: form what has more numbers in its factors than the gradient has.
    """
    inputs, targets = pair("sqrt_ggn", batch)
    size = batch_size(batch)
    paths, leaves, tree = parameters(params)
    seen: dict[str, Any] = {}
    keys = None if key is None else jax.random.split(key, size)

    def of_example(x, target, key):
        example, example_tree = jax.tree.flatten(x)

        def flat(*args):
            here = jax.tree.unflatten(tree, args[: len(leaves)])
            out = model(here, jax.tree.unflatten(example_tree, args[len(leaves) :]))
            return [one_array(out)]

        cut = partial_evaluation_of_example(flat, leaves, example)
        (z,), residuals = cut.run_forward([*leaves, *example])
        if seeds is not None:
            s = seeds(z, target)
        else:
            s = output_hessian.sqrt_columns(loss, z, target, key, samples, part)
        terms, axes = _swept_back(cut, [*leaves, *example], residuals, s)
        joined = [
            _joined(t.terms, a.terms, path, leaf, thrifty, s.shape[0])
            for t, a, path, leaf in zip(terms, axes, paths, leaves, strict=True)
        ]
        seen["axes"] = [a for _, a in joined]
        seen["count"] = s.shape[0]
        return [t for t, _ in joined], z

    all_terms, z = jax.vmap(of_example)(inputs, targets, keys)
    found = [
        SqrtGGN(path, leaf.shape, leaf.dtype, terms, axes, seen["count"])
        for path, leaf, terms, axes in zip(paths, leaves, all_terms, seen["axes"], strict=True)
    ]
    return found, tree, z


def _swept_back(
    cut: PartialEvaluation, ins: list, residuals: list, s
) -> tuple[list[Terms], list[Terms]]:
    """The gradients Jᵀ s of each parameter for all columns s, and which arrays differ by column.

    What doesn't depend on the column, the inputs A above all, is made and kept once.

    Returns:
        The terms, and the same structure with 0 for an array whose first axis are the columns,
        None for one that all columns share.
    """
    once = dict(cut.joint.constants)
    once.update(zip(cut.ins, ins, strict=True))
    once.update(zip(cut.residuals, residuals, strict=True))
    by_column, depends = [], _dependents(cut.joint, cut.cotangents)
    for equation in cut.backward:
        if depends.isdisjoint(equation.ins) and once.keys() >= set(equation.ins):
            apply_all([equation], once)
        else:
            by_column.append(equation)
    differing = list(dict.fromkeys(i for i in cut.gradients if i in depends))
    # What a checkpoint computes again stands in one equation with what differs.
    shared = [i for i in dict.fromkeys(cut.gradients) if i not in depends and i not in once]

    def back(s):
        values = once | dict(zip(cut.cotangents, [s], strict=True))
        apply_all(by_column, values)
        return [values[i] for i in differing], [values[i] for i in shared]

    of_columns, of_all = jax.vmap(back, out_axes=(0, None))(s)
    made = once | dict(zip([*differing, *shared], [*of_columns, *of_all], strict=True))
    arrays = [made[i] for i in cut.gradients]
    axes = [0 if i in depends else None for i in cut.gradients]
    return jax.tree.unflatten(cut.tree, arrays), jax.tree.unflatten(cut.tree, axes)


def _dependents(flat: Program, sources: Sequence[int]) -> set[int]:
    """As `Program.dependents`, but output by output of loops and checkpoints too."""
    found = set(sources)
    for equation in flat.equations:
        given = [i in found for i in equation.ins]
        if any(given):
            found.update(compress(equation.outs, _dependent_outputs(equation, given)))
    return found


def _dependent_outputs(equation: Equation, given: Sequence[bool]) -> list[bool]:
    """Which outputs of an equation depend on those of its inputs that are given."""
    params = equation.params
    if equation.name == "optimization_barrier":
        return list(given)
    if equation.name in ("checkpoint", "remat2"):
        return _reached(close(params["jaxpr"]), given)
    if equation.name != "scan":
        return [True] * len(equation.outs)
    start, count = scan_layout(params)
    carry, given = slice(start, start + count), list(given)
    while True:
        outs = _reached(params["jaxpr"], given)
        outs[:count] = [a or b for a, b in zip(given[carry], outs, strict=False)]
        if outs[:count] == given[carry]:
            return outs
        given[carry] = outs[:count]


def _reached(body: Any, given: Sequence[bool]) -> list[bool]:
    flat = program(body)
    found = _dependents(flat, list(compress(flat.inputs, given)))
    return [i in found for i in flat.outputs]


def _joined(terms, axes, path, leaf, thrifty, count):
    """One parameter's terms, joined column by column where there is something to join.

    What all columns share, such as the inputs A, they share joined as well; but each term has an
    array that differs by column, be it only zeros.
    """
    join = lambda ts: leaf_gradient(Terms(ts), path, leaf, thrifty).terms
    if not terms:
        terms = join(())
        axes = jax.tree.map(lambda x: None, terms)
    pairs = [_by_column(t, a, count) for t, a in zip(terms, axes, strict=True)]
    terms, axes = (tuple(part) for part in zip(*pairs, strict=True))
    if len(terms) == 1 and not (thrifty and _pays_to_form(terms[0], leaf, count)):
        return terms, axes
    differs = [a is not None for a in jax.tree.leaves(axes, is_leaf=lambda a: a is None)]
    columns = jax.vmap(lambda ts: ts, in_axes=(axes,), axis_size=count)
    column = one_of(jax.eval_shape(columns, terms))
    closed, made = jax.make_jaxpr(join, return_shape=True)(column)
    of_made = [0 if d else None for d in _reached(closed, differs)]
    joined_axes = jax.tree.unflatten(jax.tree.structure(made), of_made)
    return jax.vmap(join, in_axes=(axes,), out_axes=joined_axes)(terms), joined_axes


def _by_column(term: Term, axes: Any, count: int) -> tuple[Term, Any]:
    """A term and its axes; one that is the same for all columns with an axis of them."""
    if jax.tree.leaves(axes):
        return term, axes
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), term)
    return repeated, jax.tree.map(lambda x: 0, term)


def _pays_to_form(term: Term, leaf, count: int) -> bool:
    """Do G's numbers for one column outnumber the gradient's?"""
    if isinstance(term, Dense) or (isinstance(term, Product) and term.positions == 1):
        return False
    return term.g.size >= leaf.size * count


def one_array(out: Any) -> jax.Array:
    try:
        aval = jax.typeof(out)
    except TypeError:
        raise TypeError(
            f"model(params, input) must return one array, the outputs of one example, but "
            f"returned {type(out).__name__}."
        ) from None
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        raise TypeError(f"the model's outputs must be real, but have dtype {aval.dtype}.")
    return out
