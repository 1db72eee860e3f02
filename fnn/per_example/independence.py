"""One example's loss may not depend on others: then there is no gradient of one example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fnn.jaxpr import Program, inner_jaxprs, program, trace
from fnn.per_example.sides import CONSTANT, EXAMPLE, sides

# What makes one device's, or one example's, value depend on others'.
COLLECTIVES = (
    "psum",
    "psum_invariant",
    "pmax",
    "pmin",
    "all_gather",
    "all_to_all",
    "ppermute",
    "reduce_scatter",
    "all_gather_invariant",
    "psum2",
    "pbroadcast_invariant",
)


def traced(flat: Callable, args: list) -> Any:
    """The jaxpr of one example's function; or the error that it depends on other examples."""
    try:
        return trace(flat, args)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise ValueError(_DEPENDENT.format(what=f"a collective over an axis ({error})")) from error


_DEPENDENT = (
    "the loss of one example depends on other examples, by {what}: so it does with batch "
    "normalisation over examples. Then there is no gradient of one example alone. Use statistics "
    "that are held fixed (in evaluation mode), or layer or group normalisation."
)


def check_independent(flat: Program, kinds: list[int]) -> None:
    """An error if what depends on the example goes into a collective, also inside loops."""
    side = sides(flat, kinds)
    for equation in flat.equations:
        ins = [side[i] for i in equation.ins]
        if equation.name in COLLECTIVES and EXAMPLE in ins:
            raise ValueError(_DEPENDENT.format(what=equation.name))
        for inner in inner_jaxprs(equation).values():
            inner_flat = program(inner)
            if len(inner_flat.inputs) <= len(ins):
                # Those of a conditional's branches are the last.
                kinds = ins[len(ins) - len(inner_flat.inputs) :]
                check_independent(inner_flat, kinds if EXAMPLE in ins else [CONSTANT] * len(kinds))
