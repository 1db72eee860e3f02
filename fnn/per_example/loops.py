"""Loops and checkpoints in which parameters meet the example: they are looked into.

Their bodies are programs like any other, whose gradients are found by the same sweep. A term that
each step of a loop makes becomes one term of the whole loop.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnn.backprop import control_flow
from fnn.backprop.partial_evaluation import PartialEvaluation, partially_evaluate
from fnn.backprop.rules import ControlRule
from fnn.backprop.sweep import RuleOf
from fnn.jaxpr import scan_layout
from fnn.per_example.sides import EXAMPLE, PARAMETERS
from fnn.per_example.terms import Convolution, Dense, Product, Rows, Term, Terms

# The factored sweep of a program whose inputs are of the given kinds (see `factors.py`).
FactoredSweep = Callable[[Sequence[int]], Callable[..., tuple[list, Any]]]


def checkpoint(kinds: Sequence[int], rule_of: RuleOf, factored: FactoredSweep) -> ControlRule:
    """The rule of a checkpoint whose inputs are of the given kinds: the usual one."""
    return control_flow.checkpoint(rule_of, factored(kinds))


def scan(kinds: Sequence[int], rule_of: RuleOf, factored: FactoredSweep) -> ControlRule:
    """The rule of a scan whose inputs are of the given kinds."""
    forward = functools.partial(_scan_forward, kinds, rule_of, factored)
    return ControlRule(forward, functools.partial(_scan_backward, kinds))


LOOPS: dict[str, Callable[[Sequence[int], RuleOf, FactoredSweep], ControlRule]] = {
    "scan": scan,
    "checkpoint": checkpoint,
    "remat2": checkpoint,
}


class _OfStep(NamedTuple):
    """The gradients that one step of a loop finds, by the number of the input of its body.

    sums: of constants; the loop adds them up over the steps. Of parameters those that are dense.
    carried: of what the loop carries.
    stacked: of what the steps are given one by one, but for parameters.
    terms: of parameters, all other terms. The loop stacks their arrays.
    """

    sums: dict[int, Any]
    carried: dict[int, Any]
    stacked: dict[int, Any]
    terms: dict[int, Terms]


def _scan_forward(kinds, rule_of, factored, equation, needed, ins, opaque):
    """The loop runs as ever; its body's backward half finds terms."""
    body = equation.params["jaxpr"]
    num_consts, num_carry = scan_layout(equation.params)
    active = control_flow.active_in_loop(body, needed, num_consts, num_carry)
    # What a loop carries is no parameter after its first step.
    inner = list(kinds)
    inner[num_consts : num_consts + num_carry] = [EXAMPLE] * num_carry

    def gradients_of(flat, args, needed, cotangents, rule_of, opaque):
        outs, found = factored(inner)(flat, args, needed, cotangents, rule_of, opaque=opaque)
        of_step = _OfStep({}, {}, {}, {})
        for k, g in zip([k for k, n in enumerate(needed) if n], found, strict=True):
            if num_consts <= k < num_consts + num_carry:
                of_step.carried[k] = g
            elif inner[k] != PARAMETERS:
                (of_step.sums if k < num_consts else of_step.stacked)[k] = g
            else:
                dense = [t for t in g.terms if k < num_consts and isinstance(t, Dense)]
                of_step.terms[k] = Terms(tuple(t for t in g.terms if t not in dense))
                if dense:
                    total = functools.reduce(lax.add, [t.value for t in dense])
                    of_step.sums[k] = Dense(total, dense[0].why)
        return outs, of_step

    has_cotangent = control_flow.cotangents_of_loop(body, active, num_consts, num_carry)
    cut = partially_evaluate(body, active, rule_of, has_cotangent, gradients_of=gradients_of)
    outs, kept = control_flow.run_loop(equation, cut, ins)
    return outs, (cut, active, kept)


def _scan_backward(kinds, equation, needed, saved, g, opaque):
    """The loop backwards; the terms of its steps become terms of the loop."""
    cut, active, kept = saved
    num_consts, _ = scan_layout(equation.params)
    of_loop = _run_back(equation, cut, active, kept, g)
    found: list = [None] * len(active)
    for k, gradient in (of_loop.sums | of_loop.carried | of_loop.stacked).items():
        found[k] = gradient
    for k, terms in of_loop.terms.items():
        own = tuple(_over_steps(t, k < num_consts) for t in terms.terms)
        found[k] = Terms(own if found[k] is None else (*own, found[k]))
    for k in of_loop.carried:
        if kinds[k] == PARAMETERS:
            found[k] = Terms((Dense(found[k], "a loop starts from it"),))
    return found


def _run_back(equation, cut: PartialEvaluation, active, kept, g) -> _OfStep:
    """The gradients of all steps: sums, the first step's carry, and the others stacked.

    What only the forward half makes, the inputs A above all, is stacked already, or the same in
    all steps: the loop backwards doesn't stack it again.
    """
    once, per_step = kept
    once = once | cut.joint.constants
    of_step = jax.tree.unflatten(cut.tree, cut.gradients)
    num_sums = len(of_step.sums)
    num_arrays = num_sums + len(of_step.carried) + len(of_step.stacked)
    first, of_terms = cut.gradients[:num_arrays], cut.gradients[num_arrays:]
    rest = list(dict.fromkeys(i for i in of_terms if i not in per_step and i not in once))
    back = dataclasses.replace(
        cut, gradients=[*first, *rest], tree=jax.tree.structure([*first, *rest])
    )
    found = control_flow.run_loop_back(equation, back, active, kept, g, num_sums)
    stacked = per_step | dict(zip(rest, found[num_arrays:], strict=True))

    def over_steps(i):
        if i in stacked:
            return stacked[i]
        return jnp.broadcast_to(once[i], (equation.params["length"], *jnp.shape(once[i])))

    return jax.tree.unflatten(cut.tree, [*found[:num_arrays], *map(over_steps, of_terms)])


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
