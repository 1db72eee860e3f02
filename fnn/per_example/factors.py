"""The reverse sweep that stops where a parameter meets an input, and keeps the two.

Backpropagation visits the equations from the last to the first. Some values depend on
parameters alone: the parameters, and what is made of them, W.T or a cast weight. At an equation
where such a value meets one that depends on the example, the sweep notes a term (see
`fnn/per_example/terms.py`): for a matrix product its two factors, the input and the upstream
gradient, instead of their product. In equations among parameters alone the terms go on
backwards: the gradient of W, given that of W.T, is the same product with its axes exchanged.
What has no factors, or loses them, is a dense gradient and follows the rules as usual.

Nothing is asked of the function: no layers, no registration. Loops and checkpoints are looked
into, as in `fnn/backprop/control_flow.py`, and their terms get an axis more.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy
from jax import lax

from fnn.backprop import control_flow, sweep
from fnn.backprop.partial_evaluation import PartialEvaluation, partially_evaluate
from fnn.backprop.primitives import rule_of
from fnn.backprop.rules import ControlRule
from fnn.frames import source_line
from fnn.jaxpr import Equation, Program, is_inexact, scan_layout
from fnn.operation import call_of
from fnn.per_example.layout import Layout, Pad, Reshape, Reverse, Transpose, View
from fnn.per_example.terms import Convolution, Dense, Product, Rows, Term

# What a value depends on. The larger of its inputs' decides an equation's outputs.
CONSTANT, PARAMETERS, EXAMPLE = range(3)


def sides(flat: Program, inputs: Sequence[int]) -> list[int]:
    """For each value, what it depends on: constants, parameters alone, or the example."""
    found = [CONSTANT] * len(flat.avals)
    # Integers that depend on parameters alone pass no gradient on: they count as constants.
    for side, inexact in ((PARAMETERS, True), (EXAMPLE, False)):
        sources = [i for i, own in zip(flat.inputs, inputs, strict=True) if own == side]
        for i in flat.dependents(sources, inexact=inexact):
            found[i] = side
    return found


def factored_gradients(
    flat: Program,
    args: Sequence,
    needed: Sequence[bool],
    cotangents: Sequence,
    inputs: Sequence[int],
    *,
    opaque: bool = True,
) -> tuple[list, list]:
    """Outputs, and for each needed input its gradient: an array, or a parameter's terms.

    Args:
        flat: the program of one example's loss.
        args: its inputs.
        needed: of which inputs a gradient is wanted.
        cotangents: the upstream gradient of each output, None for zero.
        inputs: what each input is: CONSTANT, PARAMETERS or EXAMPLE.
    """
    side = sides(flat, inputs)
    tape = sweep.forward(flat, args, needed, lambda e: _rule_of(e, side), opaque=opaque)
    gradients: list = [None] * len(tape.values)
    terms: dict[int, list[Term]] = {}

    def add(i: int, product) -> None:
        if isinstance(product, list):
            terms.setdefault(i, []).extend(product)
        elif gradients[i] is None:
            gradients[i] = product
        else:
            gradients[i] = lax.add(gradients[i], product)

    for i, ct in zip(flat.outputs, cotangents, strict=True):
        if ct is not None:
            add(i, [Dense(ct, "it is an output")] if side[i] == PARAMETERS else ct)
    for visit in reversed(tape.visits):
        equation = visit.equation
        if max(side[i] for i in equation.ins) == PARAMETERS:
            upstream = [terms.pop(i, []) for i in equation.outs]
            if not any(upstream):
                continue
            if equation.name in TO_ALL_DEVICES:
                products = upstream
            else:
                products = _among_parameters(tape, visit, upstream, side)
        else:
            upstream = [gradients[i] for i in equation.outs]
            if all(g is None for g in upstream):
                continue
            products = _where_they_meet(tape, visit, upstream, side)
        for i, product, wanted in zip(equation.ins, products, visit.needed, strict=True):
            if wanted and product is not None:
                add(i, product)
    found: list[Any] = []
    for i, wanted, kind in zip(flat.inputs, needed, inputs, strict=True):
        if wanted and kind == PARAMETERS:
            found.append(terms.get(i, []))
        elif wanted:
            aval = flat.avals[i]
            g = gradients[i]
            found.append(jnp.zeros(aval.shape, aval.dtype) if g is None else g)
    return tape.outputs, found


@dataclasses.dataclass(eq=False)
class FactoredHalves:
    """The gradient of one example's function in two halves, with terms for its parameters.

    cut: the halves (see `fnn/backprop/partial_evaluation.py`). The backward half's results are the
        gradients of the inputs that aren't parameters, then the arrays of all terms.
    num_arrays: how many gradients stand before the terms' arrays.
    terms_tree: how the arrays make up a list of terms for each parameter.
    """

    cut: PartialEvaluation
    num_arrays: int
    terms_tree: Any

    def terms(self, found: Sequence) -> list[list[Term]]:
        return jax.tree.unflatten(self.terms_tree, found[self.num_arrays :])


def factored_halves(
    closed_jaxpr,
    needed: Sequence[bool],
    inputs: Sequence[int],
    has_cotangent: Sequence[bool] | None = None,
    cut_with: Callable = partially_evaluate,
) -> FactoredHalves:
    """Cut a function's gradient in two, the parameters' gradients as terms."""
    seen: dict[str, Any] = {}

    def gradients_of(flat, args, needed, cotangents, rule_of, opaque):
        outs, found = factored_gradients(flat, args, needed, cotangents, inputs)
        kinds = [k for k, n in zip(inputs, needed, strict=True) if n]
        arrays = [g for g, k in zip(found, kinds, strict=True) if k != PARAMETERS]
        terms = [g for g, k in zip(found, kinds, strict=True) if k == PARAMETERS]
        leaves, seen["tree"] = jax.tree.flatten(terms)
        seen["count"] = len(arrays)
        return outs, [*arrays, *leaves]

    cut = cut_with(closed_jaxpr, needed, rule_of, has_cotangent, gradients_of=gradients_of)
    return FactoredHalves(cut, seen["count"], seen["tree"])


# ----------------------------------------------------------------- where parameters meet data


def _where_they_meet(tape, visit, upstream, side) -> list:
    equation = visit.equation
    is_parameter = [
        n and side[i] == PARAMETERS for i, n in zip(equation.ins, visit.needed, strict=True)
    ]
    products: list = [None] * len(equation.ins)
    if _looks_inside(equation, side):
        return visit.rule.backward(equation, visit.needed, visit.saved, upstream, tape.opaque)
    meet = MEETINGS.get(equation.name)
    left = list(visit.needed)
    if meet is not None:
        ins = [tape.values[i] for i in equation.ins]
        for k, is_one in enumerate(is_parameter):
            if is_one:
                term = meet(k, upstream[0], ins, equation.params)
                if term is not None:
                    products[k], left[k] = [term], False
    if any(left):
        found = sweep.pull_back(tape, visit._replace(needed=tuple(left)), upstream)
        for k, product in enumerate(found):
            if left[k] and product is not None:
                products[k] = [Dense(product, _why(equation))] if is_parameter[k] else product
    return products


def _why(equation: Equation) -> str:
    call = call_of(equation)
    name = equation.name if call is None else call.rule.name
    return f"used in {name}{_at_line(equation)}"


def _at_line(equation: Equation) -> str:
    line = source_line(equation.source_info)
    return f" at {line}" if line else ""


def _matrix_product(k, g, ins, params) -> Term | None:
    """∂L/∂w of y = x·w is gᵀx: keep x and g, as (stack, positions, in) and (…, out)."""
    (contract, batch) = params["dimension_numbers"]
    w, x = ins[k], ins[1 - k]
    w_contract, x_contract = contract[k], contract[1 - k]
    w_batch, x_batch = batch[k], batch[1 - k]
    w_kept = [d for d in range(w.ndim) if d not in w_contract and d not in w_batch]
    x_kept = [d for d in range(x.ndim) if d not in x_contract and d not in x_batch]
    y_batch = list(range(len(w_batch)))
    first, second = (w_kept, x_kept) if k == 0 else (x_kept, w_kept)
    y_first = [len(y_batch) + d for d in range(len(first))]
    y_second = [len(y_batch) + len(first) + d for d in range(len(second))]
    y_w, y_x = (y_first, y_second) if k == 0 else (y_second, y_first)
    size = lambda array, axes: tuple(array.shape[d] for d in axes)
    stack, positions = math.prod(size(x, x_batch)), math.prod(size(x, x_kept))
    a = lax.transpose(x, (*x_batch, *x_kept, *x_contract))
    a = lax.reshape(a, (stack, positions, math.prod(size(x, x_contract))))
    g = lax.transpose(g, (*y_batch, *y_x, *y_w))
    g = lax.reshape(g, (stack, positions, math.prod(size(w, w_kept))))
    axes = [*w_batch, *w_kept, *w_contract]
    order = tuple(axes.index(d) for d in range(w.ndim))
    term = Product(a, g, Layout(size(w, w_batch), size(w, w_kept), size(w, w_contract), order))
    is_complex = jnp.iscomplexobj(a) or jnp.iscomplexobj(g)
    return _real_part(term) if is_complex and not jnp.iscomplexobj(w) else term


def _convolution(k, g, ins, params) -> Term | None:
    x, w = ins
    if k == 0 or params["batch_group_count"] != 1 or g.size == 0:
        return None
    return Convolution.of(x, g, w.shape, params)


def _gather(k, g, ins, params) -> Term | None:
    """Whole rows looked up along one axis: an embedding."""
    table, index = ins
    numbers = params["dimension_numbers"]
    sizes = params["slice_sizes"]
    if k != 0 or numbers.operand_batching_dims or len(numbers.start_index_map) != 1:
        return None
    (axis,) = numbers.start_index_map
    whole = all(s == n for d, (s, n) in enumerate(zip(sizes, table.shape)) if d != axis)
    if tuple(numbers.collapsed_slice_dims) != (axis,) or sizes[axis] != 1 or not whole:
        return None
    # The result's axes: the row's at offset_dims, the index's elsewhere.
    row = numbers.offset_dims
    positions = [d for d in range(g.ndim) if d not in row]
    g = lax.transpose(g, (*positions, *row))
    index = lax.reshape(index[..., 0], (math.prod(index.shape[:-1]),))
    mode = str(params["mode"])
    if "CLIP" in mode:
        index = lax.clamp(
            jnp.zeros((), index.dtype), index, jnp.asarray(table.shape[axis] - 1, index.dtype)
        )
    return _rows(table, axis, index, g)


def _dynamic_slice(k, g, ins, params) -> Term | None:
    """One row at a place that the example says."""
    table, *starts = ins
    sizes = params["slice_sizes"]
    axes = [d for d, (s, n) in enumerate(zip(sizes, table.shape)) if s != n]
    if k != 0 or len(axes) != 1 or sizes[axes[0]] != 1:
        return None
    (axis,) = axes
    index = starts[axis]
    index = lax.clamp(
        jnp.zeros((), index.dtype), index, jnp.asarray(table.shape[axis] - 1, index.dtype)
    )
    return _rows(table, axis, lax.reshape(index, (1,)), g)


def _rows(table, axis: int, index, g) -> Rows:
    size = table.shape[axis]
    rest = tuple(n for d, n in enumerate(table.shape) if d != axis)
    order = list(range(1, table.ndim))
    order.insert(axis, 0)
    index = index.astype(jnp.int32)
    index = jnp.where((index < 0) | (index >= size), size, index)  # out of bounds: dropped
    g = lax.reshape(g, (1, index.shape[0], math.prod(rest)))
    return Rows(index, g, Layout((), (size,), rest, tuple(order)))


MEETINGS: dict[str, Callable[..., Term | None]] = {
    "dot_general": _matrix_product,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
}

# ------------------------------------------------------------------- among parameters alone

# Under shard_map: a parameter that all devices share meets examples that each has of its own.
# Its gradient would be summed over the devices; those of single examples stay where they are.
TO_ALL_DEVICES = ("pvary", "pcast")


def _among_parameters(tape, visit, upstream, side) -> list:
    """Terms of an output as terms of the inputs; those that lose their factors become dense."""
    equation = visit.equation
    products: list = [None] * len(equation.ins)
    passes = PASSAGES.get(equation.name)
    ins = [tape.values[i] for i in equation.ins]
    lost: list[list[Term]] = [list(ts) for ts in upstream]
    if passes is not None:
        lost[0] = []
        for term in upstream[0]:
            passed: list = [None] * len(equation.ins)
            for k, wanted in enumerate(visit.needed):
                if not wanted:
                    continue
                passed[k] = (
                    None
                    if isinstance(term, Dense)
                    else passes(k, term, ins, equation, tape.program)
                )
                if passed[k] is None:
                    break
            if any(p is None for p, wanted in zip(passed, visit.needed) if wanted):
                lost[0].append(term)
                continue
            for k, p in enumerate(passed):
                if p is not None:
                    products[k] = [*(products[k] or []), p]
    if any(lost):
        dense: list = []
        why = ""
        for ts, i in zip(lost, equation.outs, strict=True):
            dense.append(None)
            for t in ts:
                value = t.materialize().astype(tape.program.avals[i].dtype)
                dense[-1] = value if dense[-1] is None else lax.add(dense[-1], value)
                lost_here = f"made from it by {equation.name}{_at_line(equation)}"
                why = why or (t.why if isinstance(t, Dense) else lost_here)
        found = sweep.pull_back(tape, visit, dense)
        for k, product in enumerate(found):
            if visit.needed[k] and product is not None:
                products[k] = [*(products[k] or []), Dense(product, why)]
    return products


def _viewed(term, view: View) -> Term:
    return dataclasses.replace(term, layout=term.layout.viewed(view))


def _pass_transpose(k, term, ins, equation, flat):
    return _viewed(term, Transpose(tuple(numpy.argsort(equation.params["permutation"]).tolist())))


def _pass_reshape(k, term, ins, equation, flat):
    return _viewed(term, Reshape(tuple(ins[0].shape)))


def _pass_slice(k, term, ins, equation, flat):
    p = equation.params
    steps = p["strides"] or (1,) * ins[0].ndim
    out = flat.avals[equation.outs[0]].shape
    pads = [
        (low, full - (low + (n - 1) * step + 1) if n else full - low, step - 1)
        for full, low, n, step in zip(ins[0].shape, p["start_indices"], out, steps)
    ]
    return _viewed(term, Pad(tuple(pads)))


def _pass_rev(k, term, ins, equation, flat):
    return _viewed(term, Reverse(tuple(equation.params["dimensions"])))


def _pass_same(k, term, ins, equation, flat):
    return term


def _pass_cast(k, term, ins, equation, flat):
    if not is_inexact(flat.avals[equation.ins[0]]):
        return None
    was_complex, is_complex = (
        jnp.issubdtype(flat.avals[i].dtype, jnp.complexfloating)
        for i in (equation.ins[0], equation.outs[0])
    )
    return term if was_complex == is_complex else _real_part(term)


def _real_part(term: Term) -> Term | None:
    """Of a real weight in complex products: Re(Gᵀ A) = (Re G)ᵀ Re A - (Im G)ᵀ Im A."""
    if isinstance(term, Product):
        a = jnp.concatenate([jnp.real(term.a), jnp.imag(term.a)], axis=-2)
        g = jnp.concatenate([jnp.real(term.g), -jnp.imag(term.g)], axis=-2)
        return Product(a, g, term.layout)
    return dataclasses.replace(term, g=jnp.real(term.g)) if isinstance(term, Rows) else None


def _pass_neg(k, term, ins, equation, flat):
    return dataclasses.replace(term, g=-term.g)


def _pass_sub(k, term, ins, equation, flat):
    if ins[0].shape != ins[1].shape:
        return None
    return term if k == 0 else _pass_neg(k, term, ins, equation, flat)


def _pass_add(k, term, ins, equation, flat):
    return term if ins[0].shape == ins[1].shape else None


def _pass_mul(k, term, ins, equation, flat):
    """Times one number."""
    if ins[k].shape != flat.avals[equation.outs[0]].shape:
        return None
    c = _one_number(equation.ins[1 - k], ins[1 - k], flat)
    return None if c is None else _scaled(term, c)


def _pass_div(k, term, ins, equation, flat):
    if k == 1 or ins[0].shape != flat.avals[equation.outs[0]].shape:
        return None
    c = _one_number(equation.ins[1], ins[1], flat)
    return None if c is None else _scaled(term, 1 / c)


def _scaled(term, c):
    return dataclasses.replace(term, g=term.g * c.astype(term.g.dtype))


def _one_number(i: int, value, flat):
    """The one number that an array consists of, if it can be seen that it does."""
    if math.prod(jnp.shape(value)) == 1:
        return jnp.asarray(value).reshape(())
    for equation in flat.equations:
        made = i in equation.outs and equation.name == "broadcast_in_dim"
        if made and math.prod(flat.avals[equation.ins[0]].shape) == 1:
            return jnp.asarray(value)[(0,) * jnp.ndim(value)]
    return None


def _pass_broadcast(k, term, ins, equation, flat):
    """A weight repeated along new axes: its gradient is summed over them, as positions are."""
    if isinstance(term, (Convolution, Rows)) or len(equation.ins) != 1:
        return None
    shape, where = equation.params["shape"], equation.params["broadcast_dimensions"]
    new = [d for d in range(len(shape)) if d not in where]
    if any(ins[0].shape[j] != shape[d] for j, d in enumerate(where)) or len(term.layout.stack):
        return None
    for axis in sorted(new, reverse=True):
        owner = term.layout.owner(axis)
        if owner is None:
            return None
        name, i = owner
        array = {"out": "g", "ins": "a"}[name]
        dims = getattr(term.layout, name)
        x = getattr(term, array)
        x = jnp.sum(x.reshape(*x.shape[:-1], *dims), axis=x.ndim - 1 + i)
        x = x.reshape(*x.shape[: term.a.ndim - 1], math.prod(dims[:i] + dims[i + 1 :]))
        term = dataclasses.replace(term, **{array: x}, layout=term.layout.without(axis))
    return term


def _pass_product(k, term, ins, equation, flat):
    """w = p q, a product of two weights: ∂L/∂p = Gᵀ A qᵀ = Gᵀ (A qᵀ), and the like for q."""
    if not isinstance(term, Product) or term.layout.views or term.layout.stack:
        return None
    (contract, batch) = equation.params["dimension_numbers"]
    p, q = ins
    if batch[0] or p.ndim != 2 or q.ndim != 2 or len(contract[0]) != 1:
        return None
    owners = [term.layout.owner(axis) for axis in (0, 1)]
    if [len(term.layout.out), len(term.layout.ins)] != [1, 1]:
        return None
    # Axis 0 of w came from p, axis 1 from q.
    other = ins[1 - k]
    name, _ = owners[1 - k]  # the factor that runs along the other's axis
    array = {"out": "g", "ins": "a"}[name]
    x = getattr(term, array)
    other_kept = 1 - contract[1 - k][0]
    x = lax.dot_general(x, other.astype(x.dtype), (((x.ndim - 1,), (other_kept,)), ((), ())))
    inner = other.shape[contract[1 - k][0]]
    layout = dataclasses.replace(term.layout, **{name: (inner,)})
    # The parameter's axes: its own kept one, and the contracted one in place of the other's.
    own_kept = 1 - contract[k][0]
    mine = layout.order[k]
    theirs = layout.order[1 - k]
    order = [0, 0]
    order[own_kept], order[1 - own_kept] = mine, theirs
    layout = dataclasses.replace(layout, order=tuple(order))
    return dataclasses.replace(term, **{array: x}, layout=layout)


def _pass_concatenate(k, term, ins, equation, flat):
    """Weights put side by side: each gets its part of the one factor that runs that way."""
    axis = equation.params["dimension"]
    if not isinstance(term, Product):
        return None
    owner = term.layout.owner(axis)
    if owner is None or owner[0] == "stack":
        return None
    name, i = owner
    array = {"out": "g", "ins": "a"}[name]
    dims = getattr(term.layout, name)
    start = sum(x.shape[axis] for x in ins[:k])
    size = ins[k].shape[axis]
    x = getattr(term, array)
    x = x.reshape(*x.shape[:-1], *dims)
    x = lax.slice_in_dim(x, start, start + size, axis=term.a.ndim - 1 + i)
    layout = term.layout.resized(axis, size)
    x = x.reshape(*x.shape[: term.a.ndim - 1], math.prod(getattr(layout, name)))
    return dataclasses.replace(term, **{array: x}, layout=layout)


PASSAGES: dict[str, Callable[..., Term | None]] = {
    "transpose": _pass_transpose,
    "reshape": _pass_reshape,
    "squeeze": _pass_reshape,
    "expand_dims": _pass_reshape,
    "slice": _pass_slice,
    "rev": _pass_rev,
    "copy": _pass_same,
    "copy_p": _pass_same,
    "convert_element_type": _pass_cast,
    "reduce_precision": _pass_same,
    "neg": _pass_neg,
    "add": _pass_add,
    "add_any": _pass_add,
    "sub": _pass_sub,
    "mul": _pass_mul,
    "div": _pass_div,
    "broadcast_in_dim": _pass_broadcast,
    "dot_general": _pass_product,
    "concatenate": _pass_concatenate,
}

# --------------------------------------------------------------------- loops and checkpoints


def _looks_inside(equation: Equation, side) -> bool:
    """Does it hold a function, in which parameters meet what depends on the example?"""
    kinds = [side[i] for i in equation.ins]
    both = EXAMPLE in kinds and PARAMETERS in kinds
    return both and equation.name in ("scan", "checkpoint", "remat2")


def _rule_of(equation: Equation, side):
    """The rule of an equation; one that finds terms, where parameters meet data inside."""
    if not _looks_inside(equation, side):
        return rule_of(equation)
    kinds = [side[i] for i in equation.ins]
    forward = _scan_forward if equation.name == "scan" else _checkpoint_forward
    backward = _scan_backward if equation.name == "scan" else _checkpoint_backward
    return ControlRule(functools.partial(forward, kinds), backward(kinds))


def _checkpoint_forward(kinds, equation, needed, ins, opaque):
    cut_with = lambda closed, needed, rule_of, has_cotangent, gradients_of: (
        control_flow.cut_checkpoint(equation, needed, rule_of, gradients_of)
    )
    found = factored_halves(None, needed, kinds, cut_with=cut_with)
    outs, residuals = found.cut.run_forward(ins)
    return outs, (found, residuals)


def _checkpoint_backward(kinds):
    def backward(equation, needed, saved, cotangents, opaque):
        found, residuals = saved
        flat = control_flow.run_checkpoint_back(
            equation, (found.cut, residuals), cotangents, opaque
        )
        return _by_input(needed, kinds, flat[: found.num_arrays], found.terms(flat))

    return backward


def _by_input(needed, kinds, arrays, terms) -> list:
    arrays, terms = iter(arrays), iter(terms)
    return [
        None if not n else next(terms) if kind == PARAMETERS else next(arrays)
        for n, kind in zip(needed, kinds, strict=True)
    ]


def _scan_forward(kinds, equation, needed, ins, opaque):
    """The loop runs as ever; its body's backward half finds terms.

    Of its gradients come first those summed over the steps: of constants that aren't
    parameters, and the dense ones of parameters; then the carry's; then what is stacked: the
    gradients of what the steps were given, and the arrays of all terms.
    """
    body = equation.params["jaxpr"]
    num_consts, num_carry = scan_layout(equation.params)
    active = control_flow.active_in_loop(body, needed, num_consts, num_carry)
    # What a loop carries is no parameter after its first step.
    inner = list(kinds)
    for k in range(num_consts, num_consts + num_carry):
        inner[k] = EXAMPLE
    seen: dict[str, Any] = {}

    def gradients_of(flat, args, needed, cotangents, rule_of, opaque):
        outs, found = factored_gradients(flat, args, needed, cotangents, inner)
        places = [k for k, n in enumerate(needed) if n]
        summed, carried, stacked = [], [], []
        seen["terms"] = []
        for k, g in zip(places, found, strict=True):
            if inner[k] != PARAMETERS:
                group = summed if k < num_consts else stacked
                (carried if num_consts <= k < num_consts + num_carry else group).append(g)
                continue
            dense = [t for t in g if k < num_consts and isinstance(t, Dense)]
            kept = [t for t in g if t not in dense]
            total = functools.reduce(lax.add, [t.value for t in dense]) if dense else None
            if total is not None:
                summed.append(total)
            seen["terms"].append((k, dense[0].why if dense else None, kept))
        leaves, seen["tree"] = jax.tree.flatten([kept for _, _, kept in seen["terms"]])
        # Sums in the order of the inputs, those of parameters among them.
        seen["counts"] = len(summed), len(carried), len(stacked)
        return outs, [*summed, *carried, *stacked, *leaves]

    has_cotangent = control_flow.cotangents_of_loop(body, active, num_consts, num_carry)
    cut = partially_evaluate(body, active, rule_of, has_cotangent, gradients_of=gradients_of)
    # What only the forward half makes is stacked already, or the same in all steps.
    num_found = sum(seen["counts"])
    outs, kept = control_flow.run_loop(equation, cut, ins)
    once, per_step = kept
    leaves = cut.gradients[num_found:]
    known = {i: (per_step[i], True) for i in leaves if i in per_step}
    known |= {i: (once[i], False) for i in leaves if i in once}
    known |= {i: (cut.joint.constants[i], False) for i in leaves if i in cut.joint.constants}
    rest = list(dict.fromkeys(i for i in leaves if i not in known))
    smaller = dataclasses.replace(cut, gradients=[*cut.gradients[:num_found], *rest])
    return outs, (smaller, active, kept, inner, seen, leaves, known, rest)


def _scan_backward(kinds):
    def backward(equation, needed, saved, cotangents, opaque):
        cut, active, kept, inner, seen, leaves, known, rest = saved
        num_consts, num_carry = scan_layout(equation.params)
        length = equation.params["length"]
        num_sums, num_carried, num_stacked = seen["counts"]
        found = control_flow.run_loop_back(equation, cut, active, kept, cotangents, num_sums)
        sums, carried = found[:num_sums], found[num_sums : num_sums + num_carried]
        stacked = found[num_sums + num_carried :]
        made = dict(zip(rest, stacked[num_stacked:], strict=True))
        arrays = [(made[i], True) if i in made else known[i] for i in leaves]
        arrays = [
            x if is_stacked else jnp.broadcast_to(x, (length, *jnp.shape(x)))
            for x, is_stacked in arrays
        ]
        by_parameter = jax.tree.unflatten(seen["tree"], arrays)
        terms = {
            k: (why, kept) for (k, why, _), kept in zip(seen["terms"], by_parameter, strict=True)
        }
        sums, carried, stacked = iter(sums), iter(carried), iter(stacked)
        results: list = []
        for k, is_active in enumerate(active):
            if not is_active:
                results.append(None)
            elif inner[k] == PARAMETERS:
                why, kept_terms = terms[k]
                own = [_over_steps(t, k < num_consts) for t in kept_terms]
                if why is not None:
                    own.append(Dense(next(sums), why))
                results.append(own)
            elif k < num_consts:
                results.append(next(sums))
            elif k < num_consts + num_carry:
                g = next(carried)
                is_parameter = kinds[k] == PARAMETERS
                results.append([Dense(g, "a loop starts from it")] if is_parameter else g)
            else:
                results.append(next(stacked))
        return results

    return backward


def _over_steps(term: Term, is_constant: bool) -> Term:
    """A term that each step of a loop made, its arrays stacked, as one term.

    A constant of the loop is used at as many positions more as there are steps; of weights that
    the steps get one by one, each has its own products: they are stacked.
    """
    if isinstance(term, Dense):
        return term
    if is_constant:
        return term.as_one()
    if isinstance(term, Product):
        steps, stack, positions, _ = term.a.shape
        flat = lambda x: x.reshape(steps * stack, positions, x.shape[-1])
        return Product(flat(term.a), flat(term.g), term.layout.stacked(steps))
    if isinstance(term, Rows):
        value = jax.vmap(Rows.materialize)(term)
        return Dense(value, "a loop's steps look up rows of tables of their own")
    product = jax.vmap(Convolution.as_product)(term)
    return _over_steps(product, is_constant)
