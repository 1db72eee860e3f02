"""How many steps a loop takes that counts: `while i < n: ...; i = i + step`."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from fnn.jaxpr import Equation, Program, close, program


def trip_count(params: dict, cond_consts: Sequence, init: Sequence) -> int | None:
    """The number of steps of a loop that counts, None of any other.

    Args:
        params: the parameters of the `while` equation.
        cond_consts: the constants of its condition.
        init: the values that it starts from.
    """
    cond, body = program(close(params["cond_jaxpr"])), program(close(params["body_jaxpr"]))
    num_cond, num_body = len(cond_consts), params["body_nconsts"]
    if len(cond.equations) != 1 or cond.equations[0].name not in ("lt", "le", "gt", "ge"):
        return None
    test = cond.equations[0]
    if cond.outputs != list(test.outs):
        return None

    def known(number):
        if number in cond.constants:
            return _concrete(cond.constants[number])
        place = cond.inputs.index(number)
        if place < num_cond:
            return _concrete(cond_consts[place])
        return None

    def counter(number):
        if number in cond.constants or cond.inputs.index(number) < num_cond:
            return None
        return cond.inputs.index(number) - num_cond

    left, right = test.ins
    name = test.name
    if counter(left) is None:
        left, right = right, left
        name = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}[name]
    place, bound = counter(left), known(right)
    if place is None or bound is None:
        return None
    start = _concrete(init[place])
    step = _increment(body, num_body + place, body.outputs[place])
    if start is None or not step:
        return None
    rises = name in ("lt", "le")
    if rises != (step > 0):
        return None
    stop = bound + (1 if name == "le" else -1 if name == "ge" else 0)
    return len(range(start, stop, step))


def _increment(body, in_place, out) -> int | None:
    """The constant that the body adds to a counter, None if it does anything else to it."""
    for equation in body.equations:
        if out in equation.outs and equation.name in ("add", "sub"):
            counter = body.inputs[in_place]
            a, b = equation.ins
            if equation.name == "add" and b == counter:
                a, b = b, a
            if a == counter and b in body.constants:
                amount = _concrete(body.constants[b])
                return amount if amount is None or equation.name == "add" else -amount
    return None


def _concrete(value) -> int | None:
    """A whole number that is known now, else None."""
    if value is None or isinstance(value, jax.core.Tracer):
        return None
    dtype = jax.typeof(value).dtype
    is_integer = jax.dtypes.issubdtype(dtype, jax.numpy.integer) and jax.numpy.ndim(value) == 0
    return int(value) if is_integer else None


def counts_its_steps(equation: Equation, flat: Program, values: Sequence = ()) -> bool:
    """Is the number of steps of this loop of a program known before it runs?

    values: those of the program's, by number, where they are known.
    """
    params = equation.params
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    known = [values[i] if values else flat.constants.get(i) for i in equation.ins]
    return trip_count(params, known[:num_cond], known[num_cond + num_body :]) is not None
