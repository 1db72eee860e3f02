"""What the backward pass keeps of the forward pass: which values, of which part, how many bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from fnn import text
from fnn.backprop.partial_evaluation import partially_evaluate
from fnn.backprop.primitives import rule_of
from fnn.backprop.scopes import named_scopes
from fnn.frames import source_line
from fnn.jaxpr import Equation, Program, close, is_inexact, program, scan_layout
from fnn.operation import operation_name


class Kept(NamedTuple):
    """Values of one kind that are kept for the backward pass.

    Fields:
        part: the part of the network that made them, by its path; "" outside all parts.
        operation: what made them: the fnn operation's or the primitive's name.
        source: `file.py:12 (function)`, the user's line.
        bytes: of all together.
        types: of each: `float32[128, 256]`.
    """

    part: str
    operation: str
    source: str
    bytes: int
    types: tuple[str, ...]


class Residuals(NamedTuple):
    """All that is kept.

    Fields:
        made: what the forward pass made and keeps, the largest first. It takes memory of its own.
        arguments: the labels of the arguments that the backward pass reads again.
        argument_bytes: of these. They are there anyway.
    """

    made: list[Kept]
    arguments: list[str]
    argument_bytes: int

    @property
    def bytes(self) -> int:
        """Of all that the forward pass made and keeps."""
        return sum(kept.bytes for kept in self.made)


def residuals(closed_jaxpr: Any, labels: Sequence[str], needed: Sequence[bool]) -> Residuals:
    """What `fnn.vjp` keeps of a traced function.

    Args:
        closed_jaxpr: the function.
        labels: of its inputs.
        needed: of which of them a gradient is wanted.
    """
    cut = partially_evaluate(closed_jaxpr, needed, rule_of)
    joint = cut.joint
    made: dict[tuple[str, str, str], list[Any]] = {}
    arguments: list[str] = []
    argument_bytes = 0
    of_input = dict(zip(cut.ins, labels, strict=True))
    makers = {i: equation for equation in cut.forward for i in equation.outs}
    for number in cut.residuals:
        aval = joint.avals[number]
        if number in of_input:
            arguments.append(of_input[number])
            argument_bytes += size_of(aval)
            continue
        made.setdefault(_made_by(makers[number], number), []).append(aval)
    found = [
        Kept(*key, sum(map(size_of, avals)), tuple(text.type_of(a.shape, a.dtype) for a in avals))
        for key, avals in made.items()
    ]
    found.sort(key=lambda kept: -kept.bytes)
    return Residuals(found, arguments, argument_bytes)


def needed_of(flat: Program) -> list[bool]:
    """A gradient is wanted of all real and complex inputs."""
    return [is_inexact(flat.avals[i]) for i in flat.inputs]


def size_of(aval: Any) -> int:
    """The bytes of an array of this type."""
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        aval = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return math.prod(aval.shape) * aval.dtype.itemsize


def _made_by(
    equation: Equation, number: int, around: tuple[str, ...] = (), line: str = ""
) -> tuple[str, str, str]:
    """Part, operation and source line of what made a value; of a loop's, inside the loop."""
    scopes = (*around, *equation.scope)
    line = source_line(equation.source_info) or line
    output = equation.outs.index(number)
    inner = _inside(equation, output)
    if inner is not None:
        body, place = inner
        maker = next((e for e in body.equations if body.outputs[place] in e.outs), None)
        if maker is not None:
            return _made_by(maker, body.outputs[place], scopes, line)
    part, operation = named_scopes(scopes)
    name = operation or operation_name(equation)
    if name in ("jit", "pjit"):
        name = equation.params.get("name", name)
    return part, name, line


def _inside(equation: Equation, output: int) -> tuple[Program, int] | None:
    if equation.name == "scan":
        _, carry = scan_layout(equation.params)
        return (program(close(equation.params["jaxpr"])), output) if output >= carry else None
    if equation.name in ("jit", "pjit"):
        return program(close(equation.params["jaxpr"])), output
    return None
