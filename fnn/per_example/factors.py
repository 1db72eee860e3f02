"""The rules by which the reverse sweep keeps parameters' gradients factored.

Backpropagation visits the equations from the last to the first. Some values depend on
parameters alone: the parameters, and what is made of them, W.T or a cast weight. At an equation
where such a value meets one that depends on the example, its gradient becomes a term (see
`fnn/per_example/terms.py`): of a matrix product its two factors, the input and the upstream
gradient, instead of their product. In equations among parameters alone the terms go on
backwards: the gradient of W, given that of W.T, is the same product with its axes exchanged.
What has no factors, or loses them, is a dense gradient and follows the rules as usual; at a product
or a look-up among parameters it gets factors anew.

So this is the sweep of `fnn/backprop/sweep.py`, with other rules:

    where a parameter meets the example     `meetings.py`, and `operations.py` for fnn's own
    among parameters alone                  `passages.py`
    loops and checkpoints that hold both    `loops.py`
    all else                                the usual rules

Nothing is asked of the function: no layers, no registration.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jax import lax

from fnn.backprop import sweep
from fnn.backprop.rules import ControlRule, Rule, zero
from fnn.backprop.sweep import RuleOf
from fnn.frames import source_line
from fnn.jaxpr import Equation, Program
from fnn.operation import call_of
from fnn.per_example import operations
from fnn.per_example.loops import LOOPS
from fnn.per_example.meetings import MEETINGS
from fnn.per_example.passages import PASSAGES
from fnn.per_example.sides import EXAMPLE, PARAMETERS, sides
from fnn.per_example.terms import Dense, Terms

# Under shard_map: a parameter that all devices share meets examples that each has of its own.
# Its gradient would be summed over the devices; those of single examples stay where they are.
_TO_ALL_DEVICES = ("pvary", "pcast")


def factored_gradients(
    flat: Program,
    args: Sequence,
    needed: Sequence[bool],
    cotangents: Sequence,
    rule_of: RuleOf,
    *,
    inputs: Sequence[int],
    opaque: bool = True,
) -> tuple[list, list]:
    """Outputs, and for each needed input its gradient: an array, or a parameter's `Terms`.

    Args:
        flat: the program of one example's loss.
        args: its inputs.
        needed: of which inputs a gradient is wanted.
        cotangents: the upstream gradient of each output, None for zero.
        rule_of: the usual rule of an equation.
        inputs: what each input is: CONSTANT, PARAMETERS or EXAMPLE (see `sides.py`).
    """
    side = sides(flat, inputs)
    seeds = [
        Terms((Dense(g, "it is an output"),)) if g is not None and side[i] == PARAMETERS else g
        for i, g in zip(flat.outputs, cotangents, strict=True)
    ]
    rules = lambda equation: _factored_rule(equation, flat, side, rule_of)
    outs, found = sweep.gradients_of(flat, args, needed, seeds, rules, opaque=opaque)
    kinds = [kind for kind, n in zip(inputs, needed, strict=True) if n]
    # Where nothing arrives, a parameter's gradient is a sum of no terms.
    return outs, [
        Terms(()) if kind == PARAMETERS and not isinstance(g, Terms) else g
        for kind, g in zip(kinds, found, strict=True)
    ]


def _factored_rule(equation: Equation, flat: Program, side: Sequence[int], rule_of: RuleOf) -> Rule:
    """The rule of an equation whose values depend on what `side` says."""
    kinds = [side[i] for i in equation.ins]
    rule = rule_of(equation)
    if PARAMETERS not in kinds or rule is zero:
        return rule
    if EXAMPLE not in kinds:
        if equation.name in _TO_ALL_DEVICES:
            return ControlRule(rule.forward, lambda equation, needed, saved, g, opaque: g)
        return _among_parameters(rule, flat)
    if equation.name in LOOPS:
        sweep_of = lambda kinds: functools.partial(factored_gradients, inputs=kinds)
        return LOOPS[equation.name](kinds, rule_of, sweep_of)
    return _where_they_meet(rule, [kind == PARAMETERS for kind in kinds])


def _where_they_meet(rule: Rule, is_parameter: Sequence[bool]) -> Rule:
    """A parameter's gradient becomes a term; that of other arguments is found as usual."""

    def backward(equation, needed, saved, g, opaque):
        ins, saved = saved
        products: list = [None] * len(ins)
        left = list(needed)
        if call_of(equation) is not None:
            found = operations.gradients(rule, equation, left, is_parameter, saved, g, opaque)
            if found is not None:
                return _as_terms(found, is_parameter, equation)
        wanted = [n and of_parameter for n, of_parameter in zip(needed, is_parameter, strict=True)]
        for k, term in _met(equation, wanted, ins, g).items():
            products[k], left[k] = Terms((term,)), False
        if any(left):
            found = rule.backward(equation, left, saved, g, opaque)
            for k, product in enumerate(_as_terms(found, is_parameter, equation)):
                if left[k]:
                    products[k] = product
        return products

    return _keeping_inputs(rule, backward)


def _as_terms(found: Sequence, is_parameter: Sequence[bool], equation: Equation) -> list:
    """Gradients found as usual: of parameters as dense terms, those that aren't terms already."""
    return [
        Terms((Dense(product, _used_in(equation)),))
        if of_parameter and product is not None and not isinstance(product, Terms)
        else product
        for product, of_parameter in zip(found, is_parameter, strict=True)
    ]


def _among_parameters(rule: Rule, flat: Program) -> Rule:
    """Terms of an output become terms of the inputs; those that lose their factors, dense."""

    def backward(equation, needed, saved, g, opaque):
        ins, saved = saved
        products: list[list] = [[] for _ in ins]
        lost = [[] if of_output is None else list(of_output.terms) for of_output in g]
        passes = PASSAGES.get(equation.name)
        if passes is not None:
            terms, lost[0] = lost[0], []
            for term in terms:
                passed = _passed(passes, term, needed, ins, equation, flat)
                if passed is None:
                    lost[0].append(term)
                else:
                    for k, of_input in passed.items():
                        products[k].append(of_input)
        if any(lost):
            avals = [flat.avals[i] for i in equation.outs]
            dense = [
                _formed(ts, a.dtype) if ts else None for ts, a in zip(lost, avals, strict=True)
            ]
            first = next(t for ts in lost for t in ts)
            why = first.why if isinstance(first, Dense) else _lost_in(equation, needed)
            left = list(needed)
            for k, term in _new_factors(equation, needed, ins, dense).items():
                products[k].append(term)
                left[k] = False
            if any(left):
                for k, product in enumerate(rule.backward(equation, left, saved, dense, opaque)):
                    if left[k] and product is not None:
                        products[k].append(Dense(product, why))
        return [Terms(tuple(terms)) if terms else None for terms in products]

    return _keeping_inputs(rule, backward)


# Where what a dense gradient becomes is larger than it is, and has factors: of y = H z, which is
# used as a weight or a bias, H has g zᵀ; of P[:n] + x, P has g, added to the first n rows.
_NEW_FACTORS = ("dot_general", "gather", "dynamic_slice", "slice")


def _new_factors(equation: Equation, needed: Sequence[bool], ins: Sequence, g: Sequence) -> dict:
    """The factors that a dense gradient g gets in an equation, by the number of the input."""
    if equation.name not in _NEW_FACTORS:
        return {}
    larger = [n and x.size > g[0].size for n, x in zip(needed, ins, strict=True)]
    return _met(equation, larger, ins, g)


def _met(equation: Equation, wanted: Sequence[bool], ins: Sequence, g: Sequence) -> dict:
    """The terms of the wanted inputs that have factors, by the number of the input."""
    meet = MEETINGS.get(equation.name)
    if meet is None:
        return {}
    upstream = g[0] if len(g) == 1 else g
    numbers = [k for k, is_wanted in enumerate(wanted) if is_wanted]
    found = {k: meet(k, upstream, ins, equation.params) for k in numbers}
    return {k: term for k, term in found.items() if term is not None}


def _keeping_inputs(rule: Rule, backward) -> ControlRule:
    """The rule, with another backward, which is given the inputs too."""

    def forward(equation, needed, ins, opaque):
        outs, saved = rule.forward(equation, needed, ins, opaque)
        return outs, (ins, saved)

    return ControlRule(forward, backward)


def _passed(passes, term, needed, ins, equation, flat) -> dict | None:
    """The term as a term of each needed input; None if one of them would lose its factors."""
    found: dict = {}
    for k, wanted in enumerate(needed):
        if wanted:
            found[k] = None if isinstance(term, Dense) else passes(k, term, ins, equation, flat)
            if found[k] is None:
                return None
    return found


def _formed(terms, dtype):
    """The gradient that the terms add up to."""
    return functools.reduce(lax.add, [t.materialize().astype(dtype) for t in terms])


def _lost_in(equation: Equation, needed: Sequence[bool]) -> str:
    """Why there are no factors of what an equation among parameters is made from."""
    made = f"made from it by {equation.name}{_at_line(equation)}"
    if equation.name in ("mul", "div") and all(needed):
        return (
            f"{made}, of two values that both depend on parameters: its gradient is then a sum, "
            "of which more than one pair of factors would have to be kept"
        )
    return f"{made}, behind which no factors are kept"


def _used_in(equation: Equation) -> str:
    call = call_of(equation)
    name = equation.name if call is None else call.rule.name
    return f"used in {name}{_at_line(equation)}"


def _at_line(equation: Equation) -> str:
    line = source_line(equation.source_info)
    return f" at {line}" if line else ""
