"""Backpropagation: the forward pass along a program, and the reverse sweep back.

The forward pass computes every value in order and keeps what the backward pass needs. The
reverse sweep visits the equations from the last to the first. At each it multiplies the
gradient of the equation's outputs (the upstream gradient g) with the local gradient, and hands
the product to the equation's inputs. Where a value was used several times, the contributions
add up. That is the chain rule (CS231n, lecture 4; Rumelhart, Hinton & Williams 1986; Griewank &
Walther, "Evaluating Derivatives", 2008, chapter 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from fnn.backprop.rules import Rule, zero
from fnn.eager import apply
from fnn.jaxpr import Equation, Program, is_inexact
from fnn.meshes import zeros
from fnn.operation import operation_name

# Tells the rule of an equation; `fnn.backprop.primitives.rule_of` knows the hand-written ones.
RuleOf = Callable[[Equation], Rule]


class Visit(NamedTuple):
    """What the forward pass notes of an equation whose gradient will be wanted.

    needed: of which inputs.
    saved: what the rule keeps for its backward.
    """

    equation: Equation
    rule: Rule
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
    rule_of: RuleOf,
    *,
    opaque: bool = False,
) -> Tape:
    """Run a program and note, for each equation on the way from a needed input, its visit.

    Args:
        program: what to run.
        args: one array for each of the program's inputs.
        needed: of which inputs a gradient will be wanted.
        rule_of: the rule of an equation.
        opaque: see `Tape`.
    """
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

    def accumulate(i: int, product) -> None:
        gradients[i] = product if gradients[i] is None else add(gradients[i], product)

    for i, of_output in zip(tape.program.outputs, cotangents, strict=True):
        if of_output is not None:
            accumulate(i, of_output)
    for visit in reversed(tape.visits):
        g = [gradients[i] for i in visit.equation.outs]
        if all(of_output is None for of_output in g):
            continue
        products = pull_back(tape, visit, g)
        with visit.equation.origin(backward=True):
            for i, product, wanted in zip(visit.equation.ins, products, visit.needed, strict=True):
                if wanted and product is not None:
                    accumulate(i, product)
        if observe is not None:
            observe(visit, g, products)
    return gradients


def pull_back(tape: Tape, visit: Visit, g: Sequence) -> Sequence:
    """One step of the chain rule: local gradient times upstream gradient, for each input.

    g: the upstream gradient of each of the equation's outputs, None for zero.
    """
    equation = visit.equation
    with equation.origin(operation_name(equation), backward=True), equation.context.manager:
        return visit.rule.backward(equation, visit.needed, visit.saved, g, tape.opaque)


def add(g, h):
    """The sum of two gradients of one value.

    Those that rules keep factored (see `fnn/per_example/factors.py`) add themselves up.
    """
    return lax.add(g, h) if isinstance(g, jax.Array) else g + h


def gradients_of(
    program: Program,
    args: Sequence,
    needed: Sequence[bool],
    cotangents: Sequence,
    rule_of: RuleOf,
    *,
    opaque: bool = False,
) -> tuple[list, list]:
    """Outputs, and the gradients of the needed inputs (zeros where nothing flows)."""
    tape = forward(program, args, needed, rule_of, opaque=opaque)
    gradients = backward(tape, cotangents)
    found = []
    for i, wanted in zip(program.inputs, needed, strict=True):
        if wanted:
            g = gradients[i]
            found.append(zeros(program.avals[i]) if g is None else g)
    return tape.outputs, found
