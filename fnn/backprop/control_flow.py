"""Backward rules of the equations that hold functions: scan, cond, while, checkpoint, custom rules.

A loop's gradient is a loop that runs the other way. A conditional's gradient is a conditional
with the same index. A checkpoint computes its inside again before it goes back. Each cuts the
gradient of the function that it holds in two (`partial_evaluation`): its forward runs the first
half and keeps the residuals, its backward runs the second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import compress

import jax
import numpy
from jax import lax

from fnn.backprop import sweep
from fnn.backprop.partial_evaluation import partially_evaluate
from fnn.backprop.rules import ControlRule, hidden
from fnn.backprop.trip_count import trip_count
from fnn.eager import apply, apply_all, once, take_branch
from fnn.jaxpr import Equation, close, is_inexact, program, scan_layout, trace
from fnn.meshes import as_varying, barrier, zeros
from fnn.operation import call_of, linearize, operation_name
from fnn.precision import wide_dtype


def _in_place(forward: Callable) -> Callable:
    """The forward of a rule; what it traces has the equation's source line and scopes."""

    @functools.wraps(forward)
    def placed(*args):
        equation = args[-4]
        name = operation_name(equation) if call_of(equation) is not None else ""
        with equation.origin(name):
            return forward(*args)

    return placed


# ------------------------------------------------------------------------------------------ scan


@_in_place
def _scan_forward(rule_of, equation, needed, ins, opaque):
    """Run cₜ, yₜ = f(w, cₜ₋₁, xₜ) over the steps t; keep what each step's backward needs."""
    body = equation.params["jaxpr"]
    num_consts, num_carry = scan_layout(equation.params)
    active = active_in_loop(body, needed, num_consts, num_carry)
    cut = partially_evaluate(
        body, active, rule_of, cotangents_of_loop(body, active, num_consts, num_carry)
    )
    outs, kept = run_loop(equation, cut, ins)
    return outs, (cut, active, kept)


def run_loop(equation, cut, ins) -> tuple[list, tuple[dict, dict]]:
    """The loop's outputs, and the residuals of its body, by number: kept once, and for each step.

    Kept once is what is the same in all steps, since it depends on constants of the loop alone.
    """
    params = equation.params
    num_consts, num_carry = scan_layout(params)
    consts, init, xs = _cut(ins, num_consts, num_carry)
    const_ids, carry_ids, xs_ids = _cut(cut.ins, num_consts, num_carry)
    effects = [i for eqn in cut.forward if eqn.has_effects for i in eqn.outs]
    varies = cut.joint.dependents([*carry_ids, *xs_ids, *effects])

    def is_same(eqn: Equation) -> bool:
        return not eqn.has_effects and varies.isdisjoint(eqn.ins)

    each_step = [eqn for eqn in cut.forward if not is_same(eqn)]
    values = dict(cut.joint.constants)
    values.update(zip(const_ids, consts, strict=True))
    apply_all(filter(is_same, cut.forward), values)

    kept_once = [i for i in cut.residuals if i not in varies]
    kept_xs = [i for i in cut.residuals if i in xs_ids]
    stacked = [i for i in cut.residuals if i in varies and i not in xs_ids]

    def step(carry, x):
        here = values | dict(zip(carry_ids, carry, strict=True)) | dict(zip(xs_ids, x, strict=True))
        apply_all(each_step, here)
        outs = [here[i] for i in cut.outs]
        return outs[:num_carry], (outs[num_carry:], [here[i] for i in stacked])

    carry, (ys, stacks) = _scan(step, init, xs, params)
    by_id = dict(zip(xs_ids, xs, strict=True))
    return [*carry, *ys], (
        dict(zip(kept_once, [values[i] for i in kept_once], strict=True)),
        {i: by_id[i] for i in kept_xs} | dict(zip(stacked, stacks, strict=True)),
    )


def _scan_backward(equation, needed, saved, g, opaque):
    """From the last step to the first, with dv for ∂L/∂v, and dw summed over the steps:

    dw, dcₜ₋₁, dxₜ = (∂f/∂(w, cₜ₋₁, xₜ))ᵀ (dcₜ, dyₜ)
    """
    cut, active, kept = saved
    num_consts, _ = scan_layout(equation.params)
    found = run_loop_back(equation, cut, active, kept, g, sum(active[:num_consts]))
    flat = iter(found)
    return [next(flat) if a else None for a in active]


def run_loop_back(equation, cut, active, kept, g, num_sums) -> list:
    """The gradients that the body's backward half finds, over all steps.

    The first `num_sums` of them are summed over the steps (in float32 at least), the next are those
    of the carry, the others are stacked.
    """
    params = equation.params
    num_consts, num_carry = scan_layout(params)
    kept_once, per_step = kept
    outs_active = cotangents_of_loop(params["jaxpr"], active, num_consts, num_carry)
    joint_avals = cut.joint.avals
    full = [
        _zero(joint_avals[i], n >= num_carry, params["length"]) if of_out is None else of_out
        for n, (i, of_out) in enumerate(zip(cut.outs, g, strict=True))
        if outs_active[n]
    ]
    num_active_carry = sum(outs_active[:num_carry])
    ct_carry, ct_ys = full[:num_active_carry], full[num_active_carry:]
    summed = [joint_avals[i] for i in cut.gradients[:num_sums]]
    sums = [zeros(a.update(dtype=wide_dtype(a.dtype)) if is_inexact(a) else a) for a in summed]

    def step(state, given):
        sums, ct_carry = state
        ct_ys, kept = given
        here = kept_once | kept
        gradients = cut.run_backward([here[i] for i in cut.residuals], [*ct_carry, *ct_ys])
        d_consts, d_carry, d_xs = _cut(gradients, len(sums), len(ct_carry))
        sums = [_plus(s, d) for s, d in zip(sums, d_consts, strict=True)]
        return (sums, _of_types(d_carry, ct_carry)), d_xs

    avals = _carry_avals(cut, active, params)
    start = (sums, [as_varying(g, a) for g, a in zip(ct_carry, avals, strict=True)])
    (sums, ct_init), d_xs = _scan(step, start, (ct_ys, per_step), params, backwards=True)
    found = [lax.convert_element_type(s, a.dtype) for s, a in zip(sums, summed, strict=True)]
    return [*found, *ct_init, *d_xs]


def _plus(total, x):
    return lax.add(total, lax.convert_element_type(x, total.dtype))


def _scan(step, init, xs, params, backwards=False):
    loop = functools.partial(
        lax.scan,
        step,
        length=params["length"],
        reverse=params["reverse"] != backwards,
        unroll=params["unroll"],
    )
    return once(loop)(init, xs)


def _cut(values, *sizes):
    """Cut a list into pieces of the given sizes and the rest."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(list(values[start : start + size]))
        start += size
    return [*pieces, list(values[start:])]


def active_in_loop(body, needed, num_consts, num_carry) -> list[bool]:
    """Which inputs of a loop's body depend on a needed input, in any step (a fixed point)."""
    avals = body.in_avals
    active = [n and is_inexact(a) for n, a in zip(needed, avals, strict=True)]
    flat = program(body)
    while True:
        reached = _reached(flat, active)
        carry = active[num_consts : num_consts + num_carry]
        grown = [c or r for c, r in zip(carry, reached[:num_carry], strict=True)]
        if grown == carry:
            return active
        active[num_consts : num_consts + num_carry] = grown


def cotangents_of_loop(body, active, num_consts, num_carry) -> list[bool]:
    """Which outputs of the body get an upstream gradient: active carries, inexact ys."""
    carry = active[num_consts : num_consts + num_carry]
    return [*carry, *_reached(program(body), active)[num_carry:]]


def _reached(flat, active) -> list[bool]:
    """Which outputs of a program depend on its active inputs."""
    reached = flat.dependents(compress(flat.inputs, active), inexact=True)
    return [i in reached for i in flat.outputs]


def _zero(aval, is_stacked, length):
    return zeros(aval.update(shape=(length, *aval.shape))) if is_stacked else zeros(aval)


def _carry_avals(cut, active, params):
    num_consts, num_carry = scan_layout(params)
    carry = slice(num_consts, num_consts + num_carry)
    return [cut.joint.avals[i] for i, a in zip(cut.ins[carry], active[carry], strict=True) if a]


def _of_types(values, like):
    """Under shard_map a carry must vary over the same devices in each step."""
    return [as_varying(v, jax.typeof(x)) for v, x in zip(values, like, strict=True)]


# ----------------------------------------------------------------------------------- cond, switch


@_in_place
def _cond_forward(rule_of, equation, needed, ins, opaque):
    """Run the chosen branch; keep its residuals in slots that the branches share.

    A residual that is an operand of the conditional needs no slot: it is there already.
    """
    index, *operands = ins
    branches = [close(b) for b in equation.params["branches"]]
    has_cotangent = _cond_cotangents(branches, needed[1:])
    cuts = [partially_evaluate(b, needed[1:], rule_of, has_cotangent) for b in branches]
    types = [[_slot(c.joint.avals[i]) for i in c.residuals if i not in c.ins] for c in cuts]
    slots = _shared_slots(types)

    def taken(cut, places):
        def branch(*operands):
            outs, residuals = cut.run_forward(operands)
            made = [r for i, r in zip(cut.residuals, residuals, strict=True) if i not in cut.ins]
            filled = [_zeros_of_slot(s) for s in slots]
            for place, residual in zip(places, made, strict=True):
                filled[place] = residual
            return outs, filled

        return branch

    places = [_places(own, slots) for own in types]
    outs, filled = _switch(equation, index, list(map(taken, cuts, places)), operands)
    return outs, (index, operands, cuts, places, filled, has_cotangent)


def _cond_backward(equation, needed, saved, g, opaque):
    """Of y = fᵢ(x): (∂fᵢ/∂x)ᵀ g, by the backward half of the branch that was taken."""
    index, operands, cuts, places, filled, has_cotangent = saved
    given = [
        zeros(cuts[0].joint.avals[i]) if of_out is None else of_out
        for i, of_out, has in zip(cuts[0].outs, g, has_cotangent, strict=True)
        if has
    ]

    def back(cut, places):
        def branch(operands, filled, given):
            made = iter([filled[p] for p in places])
            by_id = dict(zip(cut.ins, operands, strict=True))
            residuals = [by_id[i] if i in by_id else next(made) for i in cut.residuals]
            return cut.run_backward(residuals, given)

        return branch

    operands = (operands, filled, given)
    gradients = iter(_switch(equation, index, list(map(back, cuts, places)), operands))
    return [None, *(next(gradients) if n else None for n in needed[1:])]


def _switch(equation, index, branches, operands):
    return once(lambda index, operands: take_branch(equation, index, branches, operands))(
        index, operands
    )


def _cond_cotangents(branches, needed) -> list[bool]:
    reached = [_reached(program(b), needed) for b in branches]
    return [any(column) for column in zip(*reached, strict=True)]


def _slot(aval):
    return aval.update(weak_type=False)


def _zeros_of_slot(aval):
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        impl = jax.random.key_impl(lax.full(aval.shape, 0, aval.dtype))
        return lax.full(aval.shape, jax.random.key(0, impl=impl))
    return zeros(aval)


def _shared_slots(types) -> list:
    """For each type, as many slots as the branch with the most residuals of it needs."""
    slots: list = []
    for own in types:
        missing = list(own)
        for slot in slots:
            if slot in missing:
                missing.remove(slot)
        slots += missing
    return slots


def _places(own, slots) -> list[int]:
    """For each residual, the first free slot of its type."""
    taken, places = set(), []
    for aval in own:
        place = next(i for i, s in enumerate(slots) if s == aval and i not in taken)
        taken.add(place)
        places.append(place)
    return places


# ----------------------------------------------------------------------------------------- while


@_in_place
def _while_forward(rule_of, equation, needed, ins, opaque):
    """A loop with a known number of steps is a scan; any other has no backward pass."""
    params = equation.params
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, init = _cut(ins, num_cond, num_body)
    length = trip_count(params, cond_consts, init)
    if length is None:
        raise ValueError(
            "Reverse-mode differentiation does not work for lax.while_loop or lax.fori_loop with "
            "dynamic start/stop values: how many steps' values to keep for the backward pass is "
            "unknown when the loop is compiled. Use lax.scan or a lax.fori_loop with static "
            "bounds, count with `i < n`, `i + 1` and literal bounds, or bound the number of "
            "steps and stop early with lax.cond inside a scan."
        )
    body = close(params["body_jaxpr"])

    def loop(*args):
        consts, init = args[:num_body], args[num_body:]

        def step(carry, _):
            return jax.core.eval_jaxpr(body.jaxpr, body.consts, *consts, *carry), None

        return lax.scan(step, list(init), None, length=length)[0]

    args = [*body_consts, *init]
    wanted = needed[num_cond:]
    scan = program(trace(loop, [jax.typeof(a) for a in args]))
    tape = sweep.forward(scan, args, wanted, rule_of, opaque=opaque)
    return tape.outputs, (tape, num_cond)


def _while_backward(equation, needed, saved, g, opaque):
    tape, num_cond = saved
    gradients = sweep.backward(tape, g)
    return [None] * num_cond + [gradients[i] for i in tape.program.inputs]


# ------------------------------------------------------------------------------------ checkpoint


def checkpoint(rule_of: sweep.RuleOf, gradients_of: Callable = sweep.gradients_of) -> ControlRule:
    """The rule of a checkpoint; `rule_of` and `gradients_of` as for `partially_evaluate`."""
    forward = functools.partial(_checkpoint_forward, rule_of, gradients_of)
    return ControlRule(forward, _checkpoint_backward)


@_in_place
def _checkpoint_forward(rule_of, gradients_of, equation, needed, ins, opaque):
    """Keep the inputs, and what the policy says is worth keeping; forget the rest."""
    params = equation.params
    policy = params["policy"]

    def recompute(eqn, joint):
        if policy is None:
            return True
        verdict = policy(eqn.primitive, *(joint.avals[i] for i in eqn.ins), **eqn.params)
        if isinstance(verdict, bool):
            return not verdict
        return type(verdict).__name__ == "RecomputeType"

    cut = partially_evaluate(
        close(params["jaxpr"]), needed, rule_of, recompute=recompute, gradients_of=gradients_of
    )
    outs, residuals = cut.run_forward(ins)
    return outs, (cut, residuals)


def _checkpoint_backward(equation, needed, saved, g, opaque):
    """The gradients that the backward half finds, its inside computed again."""
    cut, residuals = saved
    given = _given([cut.joint.avals[i] for i in cut.outs], g)

    def again(residuals, given):
        if equation.params["prevent_cse"]:
            # Else the compiler would see that the inside was computed before, and keep it.
            residuals, given = barrier((residuals, given))
        return cut.run_backward(residuals, given)

    # As one call: taken apart, a loop around it would keep what it is here to forget.
    call = jax.checkpoint(again, prevent_cse=False) if opaque else again
    found = iter(once(call)(residuals, given))
    return [next(found) if n else None for n in needed]


def _given(avals, g):
    """The upstream gradients of the inexact outputs, zeros where nothing flows."""
    return [
        zeros(a) if of_out is None else as_varying(of_out, a)
        for a, of_out in zip(avals, g, strict=True)
        if is_inexact(a)
    ]


# ------------------------------------------------------------------------------- linear systems


def _solve_forward(equation, needed, ins, opaque):
    outs = apply(equation, ins)
    return outs, (ins, outs)


def _solve_backward(rule_of, equation, needed, saved, g, opaque):
    """x = A⁻¹ b: the gradient of b is A⁻ᵀ g, that of A's own variables comes from −A⁻ᵀ g xᵀ.

    A is a function, x ↦ A x; so its gradient is the gradient of −⟨A⁻ᵀ g, A x⟩ at fixed x.
    """
    ins, outs = saved
    lengths, jaxprs = equation.params["const_lengths"], equation.params["jaxprs"]
    matvec_consts, vecmat_consts, solve_consts, back_consts, b = _cut(ins, *lengths)
    if jaxprs.transpose_solve is None:
        raise TypeError("lax.custom_linear_solve without a transpose_solve has no gradient.")
    g = _given([jax.typeof(x) for x in outs], g)

    def vecmat(x):
        return jax.core.eval_jaxpr(jaxprs.vecmat.jaxpr, jaxprs.vecmat.consts, *vecmat_consts, *x)

    def solver(closed, consts):
        return lambda _, b: jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *consts, *b)

    def solve(g):
        return lax.custom_linear_solve(
            vecmat,
            g,
            solver(jaxprs.transpose_solve, back_consts),
            solver(jaxprs.solve, solve_consts),
        )

    transposed = once(solve)(g)
    wanted = list(needed[: len(matvec_consts)])
    found = iter(())
    if any(wanted):
        args = [*matvec_consts, *outs]
        of_a = wanted + [False] * len(outs)
        matvec = program(close(jaxprs.matvec))
        tape = sweep.forward(matvec, args, of_a, rule_of, opaque=opaque)
        gradients = sweep.backward(tape, [lax.neg(t) for t in transposed])
        inputs = tape.program.inputs[: len(wanted)]
        found = iter([gradients[i] for i, w in zip(inputs, wanted, strict=True) if w])
    consts = [next(found) if w else None for w in wanted]
    return [*consts, *[None] * sum(lengths[1:]), *transposed]


# -------------------------------------------------------- rules that people wrote: custom_jvp/vjp


def _through_jax_forward(equation, needed, ins, opaque):
    """Let JAX differentiate this one equation: it knows the rule that somebody wrote for it."""
    places = [i for i, n in enumerate(needed) if n]

    def outs_of(*moving):
        full = list(ins)
        for i, value in zip(places, moving, strict=True):
            full[i] = value
        return equation.bind(full)

    outs, pullback = once(functools.partial(jax.vjp, outs_of))(*(ins[i] for i in places))
    return outs, (pullback, [jax.typeof(y) for y in outs])


def _through_jax_backward(equation, needed, saved, g, opaque):
    pullback, avals = saved

    def back(pullback, real):
        given = iter(real)
        return pullback(
            [
                next(given) if is_inexact(a) else numpy.zeros(a.shape, jax.dtypes.float0)
                for a in avals
            ]
        )

    found = iter(hidden(back, opaque)(pullback, _given(avals, g)))
    return [next(found) if n else None for n in needed]


# --------------------------------------------------------------------------- operations of our own


@_in_place
def _operation_forward(equation, needed, ins, opaque):
    """An fnn operation brings its own forward and backward."""
    call = call_of(equation)
    seen = []

    def outs_and_residuals(*ins):
        outs, residuals, linear = linearize(call, *ins)
        seen.append(linear)
        return outs, residuals

    outs, residuals = once(outs_and_residuals)(*ins)
    (linear,) = seen
    gets = [n and takes for n, takes in zip(needed, linear.takes, strict=True)]
    linear = linear.restrict([g for g, takes in zip(gets, linear.takes, strict=True) if takes])
    return outs, (linear, jax.tree.leaves(residuals), gets, [jax.typeof(y) for y in outs])


def _operation_backward(equation, needed, saved, g, opaque):
    linear, residuals, gets, avals = saved
    given = _given(avals, g)
    if not given or not any(gets):
        return [None] * len(needed)
    found = iter(hidden(linear.full_backward, opaque)(residuals, given))
    return [next(found) if g else None for g in gets]


THROUGH_JAX = ControlRule(_through_jax_forward, _through_jax_backward)
OPERATION = ControlRule(_operation_forward, _operation_backward)


def rules(rule_of: sweep.RuleOf) -> dict[str, ControlRule]:
    """The rules of JAX's control flow; `rule_of` tells those of the equations inside."""

    def with_rules(function: Callable) -> Callable:
        return functools.partial(function, rule_of)

    return {
        "scan": ControlRule(with_rules(_scan_forward), _scan_backward),
        "cond": ControlRule(with_rules(_cond_forward), _cond_backward),
        "while": ControlRule(with_rules(_while_forward), _while_backward),
        "remat2": checkpoint(rule_of),
        "checkpoint": checkpoint(rule_of),
        "custom_linear_solve": ControlRule(
            _solve_forward,
            with_rules(_solve_backward),
            local_gradient=("A⁻ᵀ g for b, -(∂b) xᵀ for A",),
        ),
        "custom_jvp_call": THROUGH_JAX,
        "custom_vjp_call": THROUGH_JAX,
        # JAX's newer kind of primitive (jax.experimental.hijax), with its author's rule in it.
        "call_hi_primitive": THROUGH_JAX,
        "call_hi_primitive_linearized": THROUGH_JAX,
    }
