"""Which operations on a gradient's way have a hand-written rule."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

from fnn.backprop import text
from fnn.jaxpr import Equation, Program, inner_jaxprs, is_inexact, program

# Their bodies' operations pass the gradient on one by one, each by its own rule.
_OPEN = ("scan", "cond", "while", "checkpoint", "remat2")


@dataclasses.dataclass(repr=False)
class Coverage:
    """How often each operation occurs, by name; `print` it for a table.

    ruled: those whose backward is a hand-written rule (fnn's, or the author's of a
        `custom_jvp` or `custom_vjp`).
    fallback: those that `jax.vjp` differentiates.
    """

    ruled: Counter[str] = dataclasses.field(default_factory=Counter)
    fallback: Counter[str] = dataclasses.field(default_factory=Counter)

    def __repr__(self):
        ruled, fallback = self.ruled.total(), self.fallback.total()
        return f"<Coverage: {ruled} of {ruled + fallback} operations have a hand-written rule>"

    def __str__(self):
        ruled, fallback = self.ruled.total(), self.fallback.total()
        if not ruled + fallback:
            return "No operation on a gradient's way."
        rows = [(name, str(n), "") for name, n in self.ruled.most_common()]
        rows += [(name, "", str(n)) for name, n in self.fallback.most_common()]
        share = f"{ruled} of {ruled + fallback} operations have a hand-written rule"
        table = text.columns(("operation", "ruled", "fallback"), rows, right=(1, 2))
        return f"{share} ({ruled / (ruled + fallback):.0%}).\n{table}"


def coverage(flat: Program, active: Sequence[bool], name_of: Callable[[Equation], str]) -> Coverage:
    """Count the equations that a gradient passes through, also inside loops and branches.

    Args:
        flat: the program.
        active: of which of its inputs a gradient is wanted.
        name_of: what to call an equation.
    """
    from fnn.backprop.primitives import is_ruled

    found = Coverage()
    reach = reached(flat, active)
    passed = {i for i in flat.outputs if i in reach}
    for equation in reversed(flat.equations):
        if not any(i in passed for i in equation.outs):
            continue
        passed.update(i for i in equation.ins if i in reach)
        counter = found.ruled if is_ruled(equation) else found.fallback
        counter[name_of(equation)] += 1
        if equation.name in _OPEN:
            for body in inner_jaxprs(equation).values():
                inner = coverage(program(body), list(map(is_inexact, body.in_avals)), name_of)
                found.ruled += inner.ruled
                found.fallback += inner.fallback
    return found


def reached(flat: Program, active: Sequence[bool]) -> set[int]:
    """The values that depend on an active input and can have a gradient."""
    reach = {i for i, a in zip(flat.inputs, active, strict=True) if a}
    for equation in flat.equations:
        if any(i in reach for i in equation.ins):
            reach.update(i for i in equation.outs if is_inexact(flat.avals[i]))
    return reach
