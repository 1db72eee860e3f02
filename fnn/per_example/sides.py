"""What each value of a program depends on: constants, parameters alone, or the example."""

from __future__ import annotations

from collections.abc import Sequence

from fnn.jaxpr import Program

# The larger of its inputs' decides an equation's outputs.
CONSTANT, PARAMETERS, EXAMPLE = range(3)


def sides(flat: Program, inputs: Sequence[int]) -> list[int]:
    """For each value, what it depends on: CONSTANT, PARAMETERS or EXAMPLE.

    Through integers no gradient comes: those of parameters alone count as constants.

    Args:
        flat: the program.
        inputs: the same of its inputs.
    """
    of = lambda kind: [i for i, k in zip(flat.inputs, inputs, strict=True) if k == kind]
    of_parameters = flat.dependents(of(PARAMETERS), inexact=True)
    of_example = flat.dependents(of(EXAMPLE))
    return [
        EXAMPLE if i in of_example else PARAMETERS if i in of_parameters else CONSTANT
        for i in range(len(flat.avals))
    ]
