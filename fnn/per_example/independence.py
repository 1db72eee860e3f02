"""One example's loss may not depend on others: then there is no gradient of one example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fnn.jaxpr import Equation, Program, inner_jaxprs, program, scan_layout, trace
from fnn.per_example.sides import CONSTANT, EXAMPLE, sides

# What makes one device's, or one example's, value depend on others'.
COLLECTIVES = (
    "psum",
    "psum_invariant",
    "pmax",
    "pmin",
    "all_gather",
    "all_to_all",
    "ragged_all_to_all",
    "ppermute",
    "psend",
    "precv",
    "pbroadcast",
    "pbroadcast_dynamic",
    "reduce_scatter",
    "all_gather_invariant",
    "all_gather_reduced",
    "unreduced_psum",
    "unreduced_pmax",
    "unreduced_pmin",
    "unreduced_reduce_scatter",
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


def check_independent(flat: Program, kinds: Sequence[int]) -> None:
    """An error if what depends on the example goes into a collective, also inside loops."""
    side = sides(flat, kinds)
    for equation in flat.equations:
        ins = [side[i] for i in equation.ins]
        if _is_collective(equation) and EXAMPLE in ins:
            raise ValueError(_DEPENDENT.format(what=equation.name))
        for role, inner in inner_jaxprs(equation).items():
            inner_flat = program(inner)
            count = len(inner_flat.inputs)
            if EXAMPLE not in ins:
                check_independent(inner_flat, [CONSTANT] * count)
            elif count <= len(ins):
                check_independent(inner_flat, _inner_kinds(equation, role, ins, count))


def _is_collective(equation: Equation) -> bool:
    """Over a named axis; of a `vmap` within the function there is but a numbered one left."""
    # An asynchronous one is named by its start.
    if equation.name.removesuffix("_start") not in COLLECTIVES:
        return False
    axes = equation.params.get("axes", ())
    return not (axes and all(isinstance(axis, int) for axis in axes))


def _inner_kinds(equation: Equation, role: str, ins: list[int], count: int) -> list[int]:
    """What each of a jaxpr's inputs depends on, of those of the equation that holds it."""
    if equation.name == "scan":
        num_consts, num_carry = scan_layout(equation.params)
        # After a step, what is carried may depend on all that the loop is given.
        return [*ins[:num_consts], *[EXAMPLE] * num_carry, *ins[num_consts + num_carry :]]
    if equation.name == "while":
        num_cond, num_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
        consts = ins[:num_cond] if role == "cond_jaxpr" else ins[num_cond : num_cond + num_body]
        return [*consts, *[EXAMPLE] * (count - len(consts))]
    # Those of a conditional's branches are the last.
    return ins[len(ins) - count :]
