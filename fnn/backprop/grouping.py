"""How a large graph becomes a readable picture: groups of operations, some of them closed.

An operation was made in some named scope, some jitted function, some call of a function of the
user's, on some line of source. Each of these covers stretches of consecutive operations; the
stretches lie inside one another and form a tree. All groups start closed; then those that the
reader asked for are opened, and then the largest, again and again, as long as the number of
boxes stays within the limit.

Closing a stretch of a topological order never makes a cycle: what leaves it can't come back.
"""

from __future__ import annotations

import dataclasses
import difflib
import heapq
import itertools
import linecache
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

from fnn import arguments
from fnn.backprop.node import Node
from fnn.backprop.scopes import is_backward, scope_name
from fnn.backprop.source import Source, frames_of
from fnn.frames import Frame
from fnn.jaxpr import Equation, Inlined

# Which groups: a name or path, several of them, or a function of the group.
Choice = str | Iterable[str] | Callable[["Group"], bool] | None


@dataclasses.dataclass(eq=False)
class Unit:
    """One operation: its equation, and the nodes that it makes."""

    equation: Equation
    results: list[Node]

    @property
    def name(self) -> str:
        return self.results[0].operation

    @property
    def inputs(self) -> tuple[Node, ...]:
        return self.results[0].inputs

    @property
    def inlined(self) -> Sequence[Inlined]:
        return self.results[0].inlined

    def units(self) -> list[Unit]:
        return [self]


@dataclasses.dataclass(eq=False)
class Group:
    """A stretch of operations under one label, from `start` up to `stop`.

    Attributes:
        label: the scope, function or line of source that it is of.
        path: the labels of the groups around it and its own, `block[1]/attention`; those that
            have siblings of the same label are numbered.
        is_open: whether it's drawn as a frame around what is inside, else as one box.
    """

    label: str
    start: int
    stop: int
    items: list[Unit | Group] = dataclasses.field(default_factory=list)
    is_open: bool = False
    path: str = ""

    def units(self) -> list[Unit]:
        return [unit for item in self.items for unit in item.units()]


def groups(
    nodes: Iterable[Node],
    max_boxes: int,
    open: Choice = None,
    closed: Choice = None,
    where: str = "graph.to_dot",
) -> list[Unit | Group]:
    """The operations of a graph, in groups if there are more than `max_boxes` of them.

    Args:
        nodes: a graph, or its nodes.
        max_boxes: how many boxes to draw at most, if `open` doesn't want more.
        open, closed: the groups to open and to keep closed; see `Graph.to_dot`.
        where: what to call the function in errors.
    """
    max_boxes = arguments.integer(where, "max_boxes", max_boxes, least=1)
    units: dict[int, Unit] = {}
    for node in nodes:
        if node.equation is not None:
            unit = units.setdefault(id(node.equation), Unit(node.equation, []))
            unit.results.append(node)
    order = list(units.values())
    is_small = len(order) <= max_boxes
    if is_small and open is None and closed is None:
        return list(order)
    top = _tree(order)
    if len(top.items) > max_boxes:
        top.items = _bundled(top.items, max_boxes)
    _number(top)
    opened = _chosen(top, open, where, "open")
    shut = _chosen(top, closed, where, "closed")
    _open_chosen(top, opened, shut, where)
    _open(top, max_boxes, shut)
    if is_small:  # there is room for all: frames only where they were asked for
        _without_frames(top, opened)
    return top.items


def _inside(group: Group) -> Iterator[Group]:
    """All groups in a group, the outer before the inner."""
    waiting = [group]
    while waiting:
        inner = [g for g in waiting.pop().items if isinstance(g, Group)]
        yield from inner
        waiting += reversed(inner)


def _number(top: Group) -> None:
    """Give each group its path."""
    for group in (top, *_inside(top)):
        inner = [g for g in group.items if isinstance(g, Group)]
        several = Counter(g.label for g in inner)
        seen: Counter[str] = Counter()
        for g in inner:
            name = f"{g.label}[{seen[g.label]}]" if several[g.label] > 1 else g.label
            seen[g.label] += 1
            g.path = f"{group.path}/{name}" if group.path else name


def _chosen(top: Group, choice: Choice, where: str, name: str) -> set[int]:
    """The ids of the groups that a name, a path, several of them or a function chooses."""
    if choice is None:
        return set()
    found = list(_inside(top))
    if callable(choice):
        return {
            id(g)
            for g in found
            if arguments.flag(where, f"{name}(group), at group {g.path!r},", choice(g))
        }
    wanted = [choice] if isinstance(choice, str) else choice
    wanted = list(wanted) if isinstance(wanted, Iterable) else [wanted]
    if not all(isinstance(w, str) for w in wanted):
        raise TypeError(
            f"{where}: {name} must be a group's name or path, a list of them, or a function "
            f"of a group that returns a bool, but got {arguments.show(choice)}."
        )
    chosen: set[int] = set()
    for text in wanted:
        alike = [g for g in found if text == g.label or f"/{g.path}".endswith(f"/{text}")]
        if not alike:
            names = list(dict.fromkeys(g.label for g in found))
            close = difflib.get_close_matches(text, names, 3) or names[:12]
            known = ", ".join(map(repr, close)) if names else "none: it has no groups"
            more = f" and {len(names) - len(close)} more" if len(names) > len(close) else ""
            raise ValueError(
                f"{where}: {name} names the group {text!r}, which this graph does not have. "
                f"Its groups are {known}{more}."
            )
        chosen |= {id(g) for g in alike}
    return chosen


def _open_chosen(top: Group, opened: set[int], shut: set[int], where: str) -> None:
    """Open the chosen groups, and those around them."""

    def has_opened(group: Group, around: Group | None) -> bool:
        around = group if id(group) in shut else around
        wanted = id(group) in opened
        if wanted and around is not None:
            raise ValueError(
                f"{where}: {group.path!r} is to be open, but {around.path!r} is to be closed."
            )
        inner = [has_opened(g, around) for g in group.items if isinstance(g, Group)]
        group.is_open = wanted or any(inner)
        return group.is_open

    has_opened(top, None)


def _open(top: Group, most: int, shut: set[int]) -> None:
    """Open groups, the largest first, while no more than `most` boxes are to be drawn.

    Groups of one name (the blocks of a deep network) are opened together or not at all.
    """
    boxes = 0
    closed: dict[str, list[Group]] = {}
    sizes: list[tuple[int, int, str]] = []
    count = itertools.count()

    def add(items: list[Unit | Group]) -> int:
        added = 0
        for item in items:
            if isinstance(item, Group) and item.is_open:
                added += add(item.items)
                continue
            added += 1
            if isinstance(item, Group) and id(item) not in shut:
                closed.setdefault(item.label, []).append(item)
                heapq.heappush(sizes, (item.start - item.stop, next(count), item.label))
        return added

    boxes = add(top.items)
    while sizes:
        _, _, label = heapq.heappop(sizes)
        alike = closed.pop(label, [])
        more = sum(len(g.items) - 1 for g in alike)
        if alike and boxes + more <= most:
            for group in alike:
                group.is_open = True
            boxes += sum(add(group.items) - 1 for group in alike)


def _without_frames(group: Group, kept: set[int]) -> None:
    """Replace the open groups, but for the kept ones, by what is in them."""
    items: list[Unit | Group] = []
    for item in group.items:
        if isinstance(item, Group):
            _without_frames(item, kept)
        is_frame = isinstance(item, Group) and item.is_open and id(item) not in kept
        items += item.items if isinstance(item, Group) and is_frame else [item]
    group.items = items


# -------------------------------------------------------------------------------------- the tree


def _tree(units: list[Unit]) -> Group:
    """All labelled stretches of at least two operations, each inside the next larger one.

    Where one begins in another and ends after it, it's cut in two.
    """
    top = Group("", 0, len(units))
    count = itertools.count()
    waiting = [(g.start, -g.stop, next(count), g) for g in _stretches(units)]
    heapq.heapify(waiting)
    nest = [top]
    while waiting:
        *_, group = heapq.heappop(waiting)
        while group.start >= nest[-1].stop:
            nest.pop()
        end = nest[-1].stop
        if group.stop > end:
            rest = Group(group.label, end, group.stop)
            if rest.stop - rest.start > 1:
                heapq.heappush(waiting, (rest.start, -rest.stop, next(count), rest))
            group.stop = end
            if group.stop - group.start < 2:
                continue
        if (group.start, group.stop) != (nest[-1].start, nest[-1].stop):
            nest[-1].items.append(group)
            nest.append(group)
    _fill(top, units)
    return top


def _fill(group: Group, units: list[Unit]) -> None:
    """Put the operations that stand in no smaller group between the smaller groups."""
    items: list[Unit | Group] = []
    place = group.start
    for inner in (item for item in group.items if isinstance(item, Group)):
        items += [*units[place : inner.start], inner]
        _fill(inner, units)
        place = inner.stop
    group.items = [*items, *units[place : group.stop]]


def _stretches(units: list[Unit]) -> list[Group]:
    """The maximal stretches of each label; scopes before functions before lines."""
    found: list[Group] = []
    rank: dict[int, int] = {}
    running: dict[Hashable, Group] = {}
    calls = _Calls()
    for place, unit in enumerate(units):
        labels = dict(_labels(unit, calls.of(unit)))
        running = {key: group for key, group in running.items() if key in labels}
        for order, (key, label) in enumerate(labels.items()):
            if key not in running:
                running[key] = Group(label, place, place)
                rank[id(running[key])] = order
                found.append(running[key])
            running[key].stop = place + 1
    return sorted((g for g in found if g.stop - g.start > 1), key=lambda g: rank[id(g)])


def _labels(unit: Unit, calls: list[tuple[Frame, int]]) -> Iterator[tuple[Hashable, str]]:
    """(what tells it apart, what to call it) for each scope, call and line around it."""
    scope = unit.equation.scope
    if is_backward(scope):  # its lines are those of the forward pass
        calls = []
    for depth, raw in enumerate(scope, start=1):
        name = scope_name(raw).lstrip("_")
        if name:
            which = tuple(id(call) for call in unit.inlined if len(call.scope) <= depth)
            yield ("scope", scope[:depth], which), name
    for frame, number in calls[1:]:
        name = getattr(frame.code, "co_qualname", frame.code.co_name)
        name = name.removesuffix(".__call__").removesuffix(".<locals>.apply").split(".")[-1]
        if not name.startswith("<"):
            yield ("call", number), name
    if calls:
        frame, number = calls[-1]
        line = unit.results[0].calls[-1][2]
        source = linecache.getline(frame.code.co_filename, line).strip().removeprefix("return ")
        yield ("line", number, line), source if len(source) <= 40 else source[:39] + "…"


class _Calls:
    """Tells the calls of a function apart: each frame of each stack gets its call's number.

    JAX notes of a stack which functions stood where, not which call of them it was. So from one
    operation to the next it is inferred whether a function was left and called again.
    """

    def __init__(self) -> None:
        self.source = Source()
        self.counter = itertools.count()
        self.before: list[tuple[Frame, int]] = []
        self.unit: Unit | None = None
        self.first: dict[int, tuple[tuple, str]] = {}  # of each call, its first operation

    def of(self, unit: Unit) -> list[tuple[Frame, int]]:
        """(frame, number of the call) for each of the user's frames, outermost first."""
        frames = [] if is_backward(unit.equation.scope) else [*reversed(frames_of(unit.equation))]
        numbers: list[int] = []
        for depth in range(len(frames)):
            is_same = len(numbers) == depth and depth < len(self.before)
            if is_same and self._is_same_call(frames, depth, unit):
                numbers.append(self.before[depth][1])
                continue
            while len(numbers) < len(frames):
                number = next(self.counter)
                self.first[number] = (_places(frames[len(numbers) :]), unit.name)
                numbers.append(number)
            break
        self.before = list(zip(frames, numbers, strict=True))
        self.unit = unit
        return self.before

    def _is_same_call(self, frames: list[Frame], depth: int, unit: Unit) -> bool:
        """Is the frame of the same call as the one before, those around it being of the same?"""
        frame, (before, number) = frames[depth], self.before[depth]
        if frame.code is not before.code:
            return False
        if depth == 0:
            return True
        caller, caller_before = frames[depth - 1], self.before[depth - 1][0]
        if caller.instruction != caller_before.instruction:
            return False
        if self._calls_once(caller):
            return True  # the caller stands where it stood
        differ = (k for k in range(depth, len(frames)) if not self._stands(frames, k))
        here = next(differ, len(frames))
        if here == len(frames):  # nothing moved: in a new call the scopes around it are others
            return _share_a_prefix(self.scope(unit), self.scope(self.unit))
        if here == len(self.before) or frames[here].code is not self.before[here][0].code:
            return True
        if frames[here].instruction > self.before[here][0].instruction:
            return True
        loops = not all(self._calls_once(f) for f in frames[depth:here])
        if not loops and not self.source.is_in_loop(frames[here]):
            return False  # only a new call goes back
        return (_places(frames[depth:]), unit.name) != self.first[number]

    def _stands(self, frames: list[Frame], k: int) -> bool:
        """Does the frame stand at the same place as before?"""
        if k >= len(self.before):
            return False
        frame, before = frames[k], self.before[k][0]
        return frame.code is before.code and frame.instruction == before.instruction

    def _calls_once(self, frame: Frame) -> bool:
        """In one call of this function, is what it calls from here called once?"""
        return frame.called != "package" and not self.source.is_in_loop(frame)

    def scope(self, unit: Unit | None) -> tuple[str, ...]:
        """The scopes without the names of JAX's own jitted functions, which are the innermost."""
        if unit is None:
            return ()
        scope = unit.equation.scope
        own = sum(call.is_library and bool(call.name) for call in unit.inlined)
        return scope[: len(scope) - own]


def _share_a_prefix(a: tuple, b: tuple) -> bool:
    """Is one of them inside the other, or the same?"""
    return all(x == y for x, y in zip(a, b, strict=False))


def _places(frames: list[Frame]) -> tuple[Any, ...]:
    return tuple((id(f.code), f.instruction) for f in frames)


def _bundled(items: list[Unit | Group], most: int) -> list[Unit | Group]:
    """Too many operations with nothing to tell them apart: equal shares of them."""
    share = -(-len(items) // most)
    bundles: list[Unit | Group] = []
    before = 0
    for k in range(0, len(items), share):
        part = items[k : k + share]
        count = sum(len(item.units()) for item in part)
        bundle = Group(f"operations {before + 1} to {before + count}", 0, count, items=part)
        before += count
        bundles.append(bundle if len(part) > 1 else part[0])
    return bundles
