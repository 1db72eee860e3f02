"""Partial evaluation: a function's gradient, cut into a forward half and a backward half.

A loop can't keep a tape of Python objects; it has to say beforehand, as arrays, what its
forward pass keeps for its backward pass: the residuals. To find them, the forward pass and the
reverse sweep are traced together, on types alone, to one program, and this is cut: what depends
on an upstream gradient is the backward half, all else the forward half, and the values that
cross the cut are the residuals. JAX's `jax.linearize` does the same with tangents. The rules of
`scan`, `cond` and `checkpoint` and `fnn.vjp` are built on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fnn.backprop import sweep
from fnn.eager import apply_all
from fnn.jaxpr import Equation, Program, is_inexact, program, trace

# Made again in the backward pass rather than kept: they cost no arithmetic. What is broadcast is
# larger than what it is made from; of a weight that is transposed, the weight is there anyway, and
# a loop over layers would keep a copy of all of them.
_CHEAP = ("broadcast_in_dim", "iota", "transpose")


@dataclasses.dataclass(eq=False)
class PartialEvaluation:
    """A function's gradient in two halves, and what the first keeps for the second.

    joint: the program `(ins, cotangents) -> (outs, gradients)` that was cut; the lists of these
        names hold the numbers of its values. There is a cotangent (an upstream gradient) for
        each output that gets one, and a gradient for each needed input.
    tree: how the arrays of `gradients` make up the gradients, which are arrays unless a rule keeps
        them factored (see `fnn/per_example/factors.py`).
    forward, backward: the equations of each half.
    residuals: the numbers of the values that cross from one to the other.
    """

    joint: Program
    ins: list[int]
    cotangents: list[int]
    outs: list[int]
    gradients: list[int]
    tree: Any
    forward: list[Equation]
    backward: list[Equation]
    residuals: list[int]

    def run_forward(self, args: Sequence) -> tuple[list, list]:
        """The outputs and the residuals."""
        values = dict(self.joint.constants)
        values.update(zip(self.ins, args, strict=True))
        apply_all(self.forward, values)
        return [values[i] for i in self.outs], [values[i] for i in self.residuals]

    def backward_half(self) -> PartialEvaluation:
        """Without the forward half, and without traced constants: what may leave the trace."""
        constants = _known_constants(self.joint)
        joint = dataclasses.replace(self.joint, constants=constants, equations=[], calls=())
        return dataclasses.replace(self, joint=joint, forward=[])

    def run_backward(self, residuals: Sequence, cotangents: Sequence) -> Any:
        """The gradients of the needed inputs, from residuals and upstream gradients."""
        values = dict(self.joint.constants)
        values.update(zip(self.residuals, residuals, strict=True))
        values.update(zip(self.cotangents, cotangents, strict=True))
        apply_all(self.backward, values)
        return jax.tree.unflatten(self.tree, [values[i] for i in self.gradients])


def partially_evaluate(
    closed_jaxpr,
    needed: Sequence[bool],
    rule_of: sweep.RuleOf,
    has_cotangent: Sequence[bool] | None = None,
    recompute: Callable[[Equation, Program], bool] | None = None,
    gradients_of: Callable[..., tuple[list, Any]] = sweep.gradients_of,
) -> PartialEvaluation:
    """Cut the gradient of a jaxpr in two.

    Args:
        closed_jaxpr: the function.
        needed: of which of its inputs a gradient is wanted.
        rule_of: the rule of an equation.
        has_cotangent: which of its outputs get an upstream gradient; all inexact ones unless
            given.
        recompute: which equations of the forward half the backward half does again rather
            than keep their results.
        gradients_of: the sweep, plain backpropagation unless given:
            `(program, ins, needed, cotangents, rule_of, opaque) -> (outs, gradients)`.
    """
    flat = program(closed_jaxpr)
    in_avals = [flat.avals[i] for i in flat.inputs]
    out_avals = [flat.avals[i] for i in flat.outputs]
    if has_cotangent is None:
        has_cotangent = [is_inexact(a) for a in out_avals]
    ct_avals = [a for a, has in zip(out_avals, has_cotangent, strict=True) if has]

    trees: list[Any] = []

    def both(*args):
        ins, given = args[: len(in_avals)], iter(args[len(in_avals) :])
        cotangents = [next(given) if has else None for has in has_cotangent]
        outs, gradients = gradients_of(flat, ins, needed, cotangents, rule_of, opaque=True)
        arrays, tree = jax.tree.flatten(gradients)
        trees.append(tree)
        return [*outs, *arrays]

    joint = program(trace(both, [*in_avals, *ct_avals]), inline=False)
    ins, cotangents = joint.inputs[: len(in_avals)], joint.inputs[len(in_avals) :]
    outs, gradients = joint.outputs[: len(out_avals)], joint.outputs[len(out_avals) :]

    depends = joint.dependents(cotangents)

    def is_forward(equation) -> bool:
        return depends.isdisjoint(equation.ins)

    def again(equation) -> bool:
        if not is_forward(equation):
            return True
        if equation.has_effects:
            return False
        return equation.name in _CHEAP or (recompute is not None and recompute(equation, joint))

    backward, wanted = joint.needed_for(gradients, through=again, effects=True)
    made = {i for equation in backward for i in equation.outs}
    known = _known_constants(joint)
    residuals = [
        i for i in sorted(wanted) if i not in made and i not in known and i not in cotangents
    ]
    forward, _ = joint.needed_for([*outs, *residuals], through=is_forward, effects=True)
    (tree,) = trees
    return PartialEvaluation(
        joint, ins, cotangents, outs, gradients, tree, forward, backward, residuals
    )


def _known_constants(joint: Program) -> dict[int, Any]:
    """All but the traced ones, which are of a function around that a pullback may leave."""
    constants = joint.constants.items()
    return {i: c for i, c in constants if not isinstance(c, jax.core.Tracer)}
