"""Backpropagation itself: the forward pass along a program, and the reverse sweep back.

The forward pass computes every value in order and keeps what the backward needs. The
reverse sweep visits the equations from the last to the first; each multiplies the gradient
of its outputs (upstream) with its local gradient and hands the product to its inputs; where
a value was used several times, the contributions add up. That is the chain rule, and all
there is to it (CS231n, lecture 4; Rumelhart, Hinton & Williams 1986; Griewank & Walther,
"Evaluating Derivatives", 2008, chapter 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax import lax

from fnn.backprop.rules import ControlRule, LocalRule, zero
from fnn.eager import apply
from fnn.jaxpr import Equation, Program, is_inexact, zeros


class Visit(NamedTuple):
    """What the forward pass notes of an equation whose gradient will be wanted."""

    equation: Equation
    rule: LocalRule | ControlRule
    needed: tuple[bool, ...]
    saved: Any


@dataclasses.dataclass(eq=False)
class Tape:
    """A finished forward pass: every value, and a visit for each differentiable equation.

    opaque: hide an equation's own backward function in a call of its own; wanted where the
        tape is taken apart again (see `fnn/backprop/partial_evaluation.py`), so that what a
        function chose to recompute in its backward pass isn't moved to the forward pass.
    """

    program: Program
    values: list
    visits: list[Visit]
    opaque: bool

    @property
    def outputs(self) -> list:
        return [self.values[i] for i in self.program.outputs]


def forward(
    program: Program,
    args: Sequence,
    needed: Sequence[bool],
    *,
    opaque: bool = False,
    rule_of: Callable[[Equation], LocalRule | ControlRule] | None = None,
) -> Tape:
    """Run a program and note, for each equation on the way from a needed input, its visit.

    Args:
        program: what to run.
        args: one array for each of the program's inputs.
        needed: of which inputs a gradient will be wanted.
        rule_of: the rule of an equation; the hand-written ones unless given.
    """
    if rule_of is None:
        from fnn.backprop.primitives import rule_of
    values = program.values(args)
    active = [False] * len(values)
    for i, is_needed in zip(program.inputs, needed, strict=True):
        active[i] = is_needed and is_inexact(program.avals[i])
    visits = []
    for equation in program.equations:
        ins = [values[i] for i in equation.ins]
        wanted = tuple(active[i] for i in equation.ins)
        if not any(wanted):
            outs = apply(equation, ins)
        else:
            rule = rule_of(equation)
            if isinstance(rule, LocalRule):
                outs = apply(equation, ins)
                saved = None
            else:
                with equation.context.manager:
                    outs, saved = rule.forward(equation, wanted, ins, opaque)
            visits.append(Visit(equation, rule, wanted, saved))
            for i in equation.outs:
                active[i] = rule is not zero and is_inexact(program.avals[i])
        for i, value in zip(equation.outs, outs, strict=True):
            values[i] = value
    return Tape(program, values, visits, opaque)


def backward(
    tape: Tape,
    cotangents: Sequence,
    observe: Callable[[Visit, list, Sequence], None] | None = None,
) -> list:
    """The reverse sweep: the gradient of each value, None where it is zero.

    Args:
        tape: the forward pass.
        cotangents: the upstream gradient of each of the program's outputs, None for zero.
        observe: called at each visit with the gradients of the outputs and of the inputs.
    """
    gradients: list = [None] * len(tape.values)
    for i, ct in zip(tape.program.outputs, cotangents, strict=True):
        if ct is not None:
            _accumulate(gradients, i, ct)
    for visit in reversed(tape.visits):
        upstream = [gradients[i] for i in visit.equation.outs]
        if all(g is None for g in upstream):
            continue
        products = pull_back(tape, visit, upstream)
        for i, product, wanted in zip(visit.equation.ins, products, visit.needed, strict=True):
            if wanted and product is not None:
                _accumulate(gradients, i, product)
        if observe is not None:
            observe(visit, upstream, products)
    return gradients


def pull_back(tape: Tape, visit: Visit, upstream: Sequence) -> Sequence:
    """One step of the chain rule: local gradient times upstream gradient, for each input."""
    equation, rule = visit.equation, visit.rule
    if not isinstance(rule, LocalRule):
        with equation.context.manager:
            return rule.backward(equation, visit.needed, visit.saved, upstream, tape.opaque)
    ins = [tape.values[i] for i in equation.ins]
    outs = [tape.values[i] for i in equation.outs]
    with equation.context.manager:
        if not equation.primitive.multiple_results:
            return rule.pullback(visit.needed, upstream[0], outs[0], ins, equation.params)
        full = [
            zeros(tape.program.avals[i]) if g is None and is_inexact(tape.program.avals[i]) else g
            for i, g in zip(equation.outs, upstream, strict=True)
        ]
        return rule.pullback(visit.needed, full, outs, ins, equation.params)


def _accumulate(gradients: list, i: int, product) -> None:
    """Where a value is used several times, its gradient is the sum over the uses."""
    gradients[i] = product if gradients[i] is None else lax.add(gradients[i], product)


def gradients_of(closed_program: Program, args, needed, cotangents, *, opaque=False):
    """Outputs, and the gradients of the needed inputs (zeros where nothing flows)."""
    tape = forward(closed_program, args, needed, opaque=opaque)
    gradients = backward(tape, cotangents)
    found = []
    for i, wanted in zip(closed_program.inputs, needed, strict=True):
        if wanted:
            g = gradients[i]
            found.append(zeros(closed_program.avals[i]) if g is None else g)
    return tape.outputs, found
