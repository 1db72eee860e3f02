"""From an output that isn't finite back to where its inf or nan was born."""

from __future__ import annotations

import functools
import linecache
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fnn import text
from fnn.backprop.scopes import is_backward, named_scopes
from fnn.birth.entries import Index, causes, on_host
from fnn.birth.levels import Place
from fnn.birth.report import ARGUMENT, CONSTANT, FORWARD, LOCAL_GRADIENT, PRODUCT, Birth
from fnn.frames import line_of
from fnn.jaxpr import Equation
from fnn.operation import operation_name

_MOST_ENTRIES = 8  # of one value: each costs as much as the whole way
_DEEPEST = 8  # a nan made of an inf made of an inf ...

# Whose entries are made of more than the inputs' entries at the same place.
_MIXING = frozenset(
    [
        "dot_general",
        "conv_general_dilated",
        "custom_linear_solve",
        "triangular_solve",
        "cholesky",
        "lu",
    ]
)


class Found(NamedTuple):
    """An entry that was born here.

    made_of: of a nan, the infs that it was made of.
    start: the place that the walk began with.
    """

    place: Place
    made_of: tuple[Place, ...]
    start: Place

    @property
    def equation(self) -> Equation | None:
        return self.place.level.equation(self.place.number)

    @property
    def when(self) -> tuple[int, ...]:
        """Tells which of two was earlier; arguments and constants were there first."""
        equation = self.equation
        return () if equation is None else self.place.level.when(equation)


def first_birth(starts: Iterable[Place]) -> Found:
    """The earliest birth that these entries, which are inf or nan, came from.

    From each entry it goes to the inputs that handed it on (see `causes`), of all equations and
    through loops, branches and calls, until no input is to blame; of one value it follows a few
    entries at most.
    """
    waiting = [(start, start) for start in starts]
    seen: dict[tuple[int, int], set[Index]] = {}
    found: list[Found] = []
    while waiting:
        place, start = waiting.pop()
        level, number, index = place
        entries = seen.setdefault((id(level), number), set())
        if index in entries or len(entries) == _MOST_ENTRIES:
            continue
        entries.add(index)
        equation = level.equation(number)
        if equation is None:
            is_input = number in level.flat.inputs and level.outside is not None
            if is_input:
                position = level.flat.inputs.index(number)
                waiting.append((level.outside(position, index), start))  # type: ignore[misc]
            else:
                found.append(Found(place, (), start))
            continue
        output = equation.outs.index(number)
        inner = level.inside(equation, output, index)
        if inner is not None:
            waiting.append((inner, start))
            continue
        again = functools.partial(level.apply, equation)
        came = causes(again, level.ins(equation), output, index)
        places = [Place(level, equation.ins[i], entry) for i, entry in came.followed]
        waiting += [(p, start) for p in places]
        if not places:
            made_of = tuple(Place(level, equation.ins[i], entry) for i, entry in came.made_of)
            found.append(Found(place, made_of, start))
    return min(found, key=lambda f: f.when)


def described(found: Found, labels: Sequence[str], depth: int = 0) -> Birth:
    """What there is to say of a birth.

    Args:
        found: the birth.
        labels: of the function's inputs.
        depth: how many births it is the cause of.
    """
    level, number, entry = found.place
    aval = level.flat.avals[number]
    equation = found.equation
    kind = _kind(on_host(level.values[number])[entry])
    _, index = level.split(entry)
    device = () if level.devices is None else level.devices.coordinates(entry, aval)
    cause = None
    if found.made_of and depth < _DEEPEST:
        cause = described(first_birth(found.made_of), labels, depth + 1)
    if equation is None:
        is_input = number in level.flat.inputs
        what = labels[level.flat.inputs.index(number)] if is_input else "constant"
        place = ARGUMENT if is_input else CONSTANT
        where = {"index": index, "shape": aval.shape, "device": device}
        return Birth(kind, place, what, dtype=aval.dtype, **where)
    scopes = level.scope_of(equation)
    part, operation = named_scopes(scopes)
    operation = "" if operation == "shard_map" else operation  # what is inside it says more
    ins = [level.on_device(x, entry) for x in level.ins(equation)]
    frame = level.frame_of(equation)
    place = FORWARD
    if is_backward(scopes):
        place = PRODUCT if _is_product(equation, ins, index) else LOCAL_GRADIENT
    return Birth(
        kind,
        place,
        operation or operation_name(equation),
        primitive=operation_name(equation),
        part=part,
        source=line_of(frame),
        code=linecache.getline(frame.file_name, frame.line_num).strip() if frame else "",
        loops=level.loops,
        device=device,
        index=index,
        shape=tuple(aval.shape),
        dtype=aval.dtype,
        inputs=tuple(_shown(x, index, aval.shape, equation.name) for x in ins),
        cause=cause,
    )


def _kind(y) -> str:
    if np.isnan(y):
        return "nan"
    return "-inf" if np.isrealobj(y) and y < 0 else "inf"


def _is_product(equation: Equation, ins: Sequence, index: Index) -> bool:
    """Is it 0 · inf, be it written 0 / 0?"""
    numbers = [_entry(x, index) for x in ins]
    if len(numbers) != 2 or any(y is None for y in numbers):
        return equation.name in ("dot_general", "conv_general_dilated")
    a, b = numbers
    if equation.name == "mul":
        return bool((a == 0 and np.isinf(b)) or (b == 0 and np.isinf(a)))
    return equation.name == "div" and bool(a == 0 and b == 0)


def _entry(x, index: Index):
    """The number at this place, of an array that has it; axes of length 1 stand for any length."""
    dims = np.shape(x)
    if not dims:
        return np.asarray(x)[()]
    if len(dims) != len(index) or any(k >= n > 1 for k, n in zip(index, dims, strict=True)):
        return None
    return on_host(x)[tuple(k if n > 1 else 0 for k, n in zip(index, dims, strict=True))]


def _shown(x, index: Index, shape: Sequence[int], operation: str) -> str:
    """An input of the equation: its number at the entry's place, or what there is in it."""
    if not text.is_concrete(x):
        return "key"
    number = _entry(x, index)
    if operation in _MIXING and np.ndim(x):
        number = None
    if number is not None and all(n in (1, m) for n, m in zip(np.shape(x), shape, strict=False)):
        return text.number(np.asarray(number), 6)
    return f"{text.type_of(np.shape(x), x.dtype)} of {text.value(x)}"
