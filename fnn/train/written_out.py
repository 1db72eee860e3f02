"""A program with its scans written out, so that what each round computes is a value like others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from fnn.jaxpr import Inlined, Program, inner_jaxprs, program, scan_layout, trace

# A longer scan stays one equation, and so does what would make the program longer than this.
MOST_ROUNDS = 64
MOST_EQUATIONS = 4000

_CHECKPOINTS = ("checkpoint", "remat2")


def written_out(flat: Program) -> Program:
    """The same program, with the rounds of scans, and the insides of checkpoints, in their place.

    Equations of round i of a scan stand in its scope and in one called "[i]". A scan of more than
    64 rounds stays, one of none, and one that would make the program longer than 4000 equations.
    """
    out = Program([], [], [], {}, [])
    out.inputs = [_new(out, flat.avals[i]) for i in flat.inputs]
    calls: list[Inlined] = []
    out.outputs = _splice(out, flat, out.inputs, (), calls)
    out.calls = calls
    return out


def _new(out: Program, aval) -> int:
    out.avals.append(aval)
    return len(out.avals) - 1


def _splice(
    out: Program, part: Program, ins: Sequence[int], scope: tuple[str, ...], calls: list[Inlined]
) -> list[int]:
    """Append a program's equations, applied to values that are there; return its outputs."""
    places = dict(zip(part.inputs, ins, strict=True))
    for i, value in part.constants.items():
        places[i] = _new(out, part.avals[i])
        out.constants[places[i]] = value
    begins: list[int] = []  # where the part's equations begin in `out`
    for equation in part.equations:
        begins.append(len(out.equations))
        read = [places[i] for i in equation.ins]
        within = (*scope, *equation.scope)
        body = _body(equation, len(out.equations))
        if body is None:
            outs = [_new(out, part.avals[i]) for i in equation.outs]
            out.equations.append(
                dataclasses.replace(equation, ins=tuple(read), outs=tuple(outs), scope=within)
            )
        elif equation.name in _CHECKPOINTS:
            outs = _splice(out, body, read, within, calls)
        else:
            outs = _rounds(out, equation.params, body, read, within, calls)
        places.update(zip(equation.outs, outs, strict=True))
    begins.append(len(out.equations))
    calls += [_moved(call, begins, places, scope) for call in part.calls]
    return [places[i] for i in part.outputs]


def _body(equation, so_far: int) -> Program | None:
    """The program inside an equation that is to be written out."""
    if equation.name not in ("scan", *_CHECKPOINTS):
        return None
    (inner,) = inner_jaxprs(equation).values() or (None,)
    if inner is None:
        return None
    body = program(inner)
    rounds = equation.params["length"] if equation.name == "scan" else 1
    is_short = 0 < rounds <= MOST_ROUNDS and so_far + rounds * len(body.equations) <= MOST_EQUATIONS
    return body if is_short else None


def _rounds(
    out: Program,
    params: dict,
    body: Program,
    ins: Sequence[int],
    scope: tuple[str, ...],
    calls: list[Inlined],
) -> list[int]:
    """The rounds of a scan, one after the other."""
    consts, carried = scan_layout(params)
    fixed, carry, stacks = (
        ins[:consts],
        list(ins[consts : consts + carried]),
        ins[consts + carried :],
    )
    length = params["length"]
    made: dict[int, list[int]] = {}
    for i in reversed(range(length)) if params["reverse"] else range(length):
        rows = [_apply(out, lambda x, i=i: x[i], [s], scope, calls)[0] for s in stacks]
        results = _splice(out, body, [*fixed, *carry, *rows], (*scope, f"[{i}]"), calls)
        carry, made[i] = results[:carried], results[carried:]
    ys = [
        _apply(
            out, lambda *rows: jnp.stack(rows), [made[i][k] for i in range(length)], scope, calls
        )[0]
        for k in range(len(body.outputs) - carried)
    ]
    return [*carry, *ys]


def _apply(
    out: Program, function: Callable, ins: list[int], scope: tuple[str, ...], calls: list[Inlined]
) -> list[int]:
    """Append what a function of values computes."""
    types = [jax.ShapeDtypeStruct(out.avals[i].shape, out.avals[i].dtype) for i in ins]
    made = program(trace(lambda *xs: [function(*xs)], types))
    return _splice(out, made, ins, scope, calls)


def _moved(call: Inlined, begins: list[int], places: dict[int, int], scope) -> Inlined:
    """A call of the part that was spliced in, where it stands now."""
    return call._replace(
        start=begins[call.start],
        stop=begins[call.stop],
        outs=tuple(places[i] for i in call.outs),
        scope=(*scope, *call.scope),
        calls=[_moved(inner, begins, places, scope) for inner in call.calls],
    )
