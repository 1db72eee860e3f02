"""Which operations on a gradient's way have a hand-written rule."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import compress

from fnn import text
from fnn.backprop.primitives import is_ruled
from fnn.backprop.trip_count import counts_its_steps
from fnn.jaxpr import Equation, Program, inner_jaxprs, is_inexact, program

# Their bodies' operations pass the gradient on one by one, each by its own rule.
_OPEN = ("scan", "cond", "while", "checkpoint", "remat2")


@dataclasses.dataclass(repr=False)
class Coverage:
    """How often each operation occurs, by name; `print` it for a table.

    ruled: those whose backward is a hand-written rule (fnn's, or the author's of a
        `custom_jvp` or `custom_vjp`).
    fallback: those that `jax.vjp` differentiates.
    without: those that have no gradient at all in reverse mode: a `while_loop` whose number of
        steps isn't known before it runs.
    """

    ruled: Counter[str] = dataclasses.field(default_factory=Counter)
    fallback: Counter[str] = dataclasses.field(default_factory=Counter)
    without: Counter[str] = dataclasses.field(default_factory=Counter)

    def __repr__(self):
        kinds = self.ruled, self.fallback, self.without
        ruled, fallback, without = (kind.total() for kind in kinds)
        loops = f", {without} without a gradient" if without else ""
        total = ruled + fallback + without
        return f"<Coverage: {ruled} of {total} operations have a hand-written rule{loops}>"

    def __str__(self):
        kinds = self.ruled, self.fallback, self.without
        ruled, fallback, without = (kind.total() for kind in kinds)
        total = ruled + fallback + without
        if not total:
            return "No operation on a gradient's way."
        rows = [
            (name, *(str(n) if kind is counted else "" for kind in kinds))
            for counted in kinds
            for name, n in counted.most_common()
        ]
        lines = [
            f"{ruled} of {total} operations have a hand-written rule ({_percent(ruled, total)})."
        ]
        if without:
            lines.append(
                f"{', '.join(self.without)} can't be differentiated in reverse mode: the number "
                "of steps isn't known before the loop runs."
            )
        header = "operation", "ruled", "fallback", "without gradient"
        return "\n".join([*lines, text.table(header, rows, right=(1, 2, 3))])


def _percent(part: int, whole: int) -> str:
    """100% is said only of all."""
    return f"{min(round(100 * part / whole), 99 if part < whole else 100)}%"


def coverage(
    flat: Program,
    active: Sequence[bool],
    name_of: Callable[[Equation], str],
    values: Sequence = (),
) -> Coverage:
    """Count the equations that a gradient passes through, also inside loops and branches.

    Args:
        flat: the program.
        active: of which of its inputs a gradient is wanted.
        name_of: what to call an equation.
        values: those of the program's, by number, where they are known.
    """
    found = Coverage()
    reached = flat.dependents(compress(flat.inputs, active), inexact=True)
    passed, _ = flat.needed_for(reached.intersection(flat.outputs), among=reached)
    for equation in reversed(passed):
        counter = found.ruled if is_ruled(equation) else found.fallback
        if equation.name == "while" and not counts_its_steps(equation, flat, values):
            found.without[name_of(equation)] += 1
            continue  # what is in it passes no gradient on either
        counter[name_of(equation)] += 1
        if equation.name in _OPEN:
            for body in inner_jaxprs(equation).values():
                inner = coverage(program(body), list(map(is_inexact, body.in_avals)), name_of)
                found.ruled += inner.ruled
                found.fallback += inner.fallback
                found.without += inner.without
    return found
