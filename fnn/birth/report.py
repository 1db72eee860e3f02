"""`Birth`: where an inf or nan was born, as fields and as a few lines of text."""

from __future__ import annotations

import dataclasses
from typing import Any

from fnn import text
from fnn.birth.entries import Index
from fnn.birth.loops import Iteration

# How an inf or nan came to be.
FORWARD = "forward"
LOCAL_GRADIENT = "local gradient"
PRODUCT = "0 * inf"
ARGUMENT = "argument"
CONSTANT = "constant"

_WIDEST = 72


@dataclasses.dataclass(frozen=True, repr=False)
class Birth:
    """The first inf or nan on the way to a result that isn't finite; `print` it.

    Attributes:
        kind: "nan", "inf" or "-inf".
        place: how it came to be. "forward": an operation made it in the forward pass. "local
            gradient": in the backward pass, by a local gradient that isn't finite, or overflows.
            "0 * inf": in the backward pass, an upstream gradient times a local gradient, one of
            them 0 and the other infinite. "argument", "constant": it was there at the start, in
            an argument or in an array that the function closes over.
        operation: the fnn operation's or the primitive's name; in the backward pass, that whose
            gradient it is. Of an argument its path, `params['W']`.
        primitive: the primitive that made it, "" of an argument.
        part: the part of the network by its path, `blocks/attention`: the named scopes and the
            user's jitted functions around it.
        source: `file.py:12 (function)`, the user's line; "" where there is none.
        code: the text of that line.
        loops: the steps of the loops that it stood in, the outer first.
        device: inside a shard_map, the device by its place along each axis of the mesh along which
            they differ: (("data", 3),).
        example: which example of `example_of` it belongs to, if that is certain; else None.
        example_of: the names of the arguments that hold the examples, along their first axes.
        index: its place in the array.
        shape, dtype: the array's.
        inputs: what it was made from: for each input of the primitive a text, the number at the
            same place, or what there is in the array.
        output: the function's output that it reached: `loss`, or "the gradient of params['W']".
        cause: of a nan that was made of an inf, the birth of that; else None.
    """

    kind: str
    place: str
    operation: str
    primitive: str = ""
    part: str = ""
    source: str = ""
    code: str = ""
    loops: tuple[Iteration, ...] = ()
    device: tuple[tuple[str, int], ...] = ()
    example: int | None = None
    example_of: tuple[str, ...] = ()
    index: Index = ()
    shape: tuple[int, ...] = ()
    dtype: Any = None
    inputs: tuple[str, ...] = ()
    output: str = ""
    cause: Birth | None = None

    def __str__(self) -> str:
        """A few lines."""
        lines = [self._headline()]
        if self.output:
            lines[0] += f", and reached {self.output}"
        lines += [f"  {name:<10}{value}" for name, value in self._rows() if value]
        if self.cause is not None:
            inner = str(dataclasses.replace(self.cause, output="")).splitlines()
            lines += ["  It was made of:", *(f"    {line}" for line in inner)]
        return "\n".join(lines)

    __repr__ = __str__

    def in_a_sentence(self) -> str:
        """The same in one sentence, for an error message."""
        where = [f"in the part {self.part}" if self.part else "", self._loops_in_words()]
        where.append(f"on the device {self._device_in_words()}" if self.device else "")
        where.append(f"at {self.source}" if self.source else "")
        there = ", ".join(w for w in where if w)
        equation = f": {self._equation()}" if self.primitive else ""
        return f"{self._headline()}{', ' if there else ''}{there}{equation}"

    def _headline(self) -> str:
        a = "An" if self.kind == "inf" else "A"
        if self.place == ARGUMENT:
            return f"{a} {self.kind} was in the argument {self.operation}"
        if self.place == CONSTANT:
            return f"{a} {self.kind} was in an array that the function closes over"
        how = {
            FORWARD: f"by {self.operation}, in the forward pass",
            LOCAL_GRADIENT: f"by the local gradient of {self.operation}, in the backward pass",
            PRODUCT: f"as 0 · inf, in the backward pass of {self.operation}",
        }
        return f"{a} {self.kind} was born {how[self.place]}"

    def _rows(self) -> list[tuple[str, str]]:
        short = self.code if len(self.code) <= _WIDEST else f"{self.code[: _WIDEST - 1]}…"
        code = f": {short}" if short else ""
        array = text.type_of(self.shape, self.dtype)
        example = "" if self.example is None else f"{self.example} of {', '.join(self.example_of)}"
        rows = [
            ("part", self.part),
            ("line", f"{self.source}{code}" if self.source else ""),
            ("loop", self._loops_in_words()),
            ("device", self._device_in_words()),
            ("example", example),
            ("entry", f"{list(self.index)} of {array}" if self.shape else ""),
            ("value", self._equation()),
        ]
        return rows if self.place not in (ARGUMENT, CONSTANT) else rows[3:6]

    def _loops_in_words(self) -> str:
        return ", ".join(
            f"iteration {step.number} of {step.length} (of the {step.kind}"
            + (f" at {step.source})" if step.source else ")")
            for step in self.loops
        )

    def _device_in_words(self) -> str:
        return ", ".join(f"{name}={place}" for name, place in self.device)

    def _equation(self) -> str:
        return f"{self.primitive}({', '.join(self.inputs)}) = {self.kind}" if self.primitive else ""
