"""How a large graph becomes a readable picture: groups of operations, some of them closed.

An operation was made in some named scope, some jitted function, some function of the user's,
on some line of source. Each of these labels covers stretches of consecutive operations; the
stretches lie inside one another and form a tree. All groups start closed; then the largest is
opened, again and again, as long as the number of boxes stays within the limit.

Closing a stretch of a topological order never makes a cycle: what leaves it can't come back.
"""

from __future__ import annotations

import dataclasses
import linecache
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fnn.backprop.trace import Graph, Node
    from fnn.jaxpr import Equation


@dataclasses.dataclass(eq=False)
class Unit:
    """One operation with the nodes that it makes and reads."""

    name: str
    equation: Equation
    results: list[Node]
    inputs: tuple[Node, ...]

    def units(self) -> list[Unit]:
        return [self]


@dataclasses.dataclass(eq=False)
class Group:
    """A stretch of operations under one label, from `start` up to `stop`."""

    label: str
    start: int
    stop: int
    items: list[Unit | Group] = dataclasses.field(default_factory=list)
    is_open: bool = False

    def units(self) -> list[Unit]:
        return [unit for item in self.items for unit in item.units()]


def groups(graph: Graph, max_boxes: int) -> list[Unit | Group]:
    """The operations of a graph, in groups if there are more than `max_boxes` of them."""
    units: dict[int, Unit] = {}
    for node in graph.nodes:
        if node.equation is not None:
            key = id(node.equation)
            if key not in units:
                units[key] = Unit(node.operation, node.equation, [], node.inputs)
            units[key].results.append(node)
    order = list(units.values())
    if len(order) <= max_boxes:
        return list(order)
    top = _tree(order)
    if len(top.items) > max_boxes:
        top.items = _bundled(top.items, max_boxes)
    _open(top, max_boxes)
    return top.items


def _open(top: Group, most: int) -> None:
    """Open groups, the largest first, while no more than `most` boxes are to be drawn.

    Groups of one name (the blocks of a deep network) are opened together or not at all.
    """
    boxes = len(top.items)
    closed = [g for g in top.items if isinstance(g, Group)]
    while closed:
        largest = max(closed, key=lambda g: g.stop - g.start)
        alike = [g for g in closed if g.label == largest.label]
        closed = [g for g in closed if g.label != largest.label]
        more = sum(len(g.items) - 1 for g in alike)
        if boxes + more <= most:
            boxes += more
            for group in alike:
                group.is_open = True
                closed += [g for g in group.items if isinstance(g, Group)]


def _tree(units: list[Unit]) -> Group:
    """All labelled stretches of at least two operations, each inside the next larger one."""
    top = Group("", 0, len(units))
    stretches = sorted(_stretches(units), key=lambda g: (g.start, -g.stop))
    open_groups = [top]
    for group in stretches:
        while group.start >= open_groups[-1].stop:
            open_groups.pop()
        around = open_groups[-1]
        crosses = group.stop > around.stop
        is_same = (group.start, group.stop) == (around.start, around.stop)
        if not crosses and not is_same:
            around.items.append(group)
            open_groups.append(group)
    _fill(top, units)
    return top


def _fill(group: Group, units: list[Unit]) -> None:
    """Put the operations that stand in no smaller group between the smaller groups."""
    items: list[Unit | Group] = []
    place = group.start
    for inner in group.items:
        items += [*units[place : inner.start], inner]
        _fill(inner, units)
        place = inner.stop
    group.items = [*items, *units[place : group.stop]]


def _stretches(units: list[Unit]) -> list[Group]:
    """The maximal stretches of each label; scopes before functions before lines."""
    found: list[Group] = []
    rank: dict[int, int] = {}
    running: dict[Hashable, Group] = {}
    for place, unit in enumerate(units):
        labels = dict(_labels(unit))
        running = {key: group for key, group in running.items() if key in labels}
        for order, (key, label) in enumerate(labels.items()):
            if key not in running or _is_called_again(key, units, running[key].start, place):
                running[key] = Group(label, place, place)
                rank[id(running[key])] = order
                found.append(running[key])
            running[key].stop = place + 1
    return sorted((g for g in found if g.stop - g.start > 1), key=lambda g: rank[id(g)])


def _is_called_again(key, units: list[Unit], start: int, place: int) -> bool:
    """Did a loop call the function anew? It's back at its first line, with the same operation."""
    if key[0] != "function":
        return False
    depth = len(key[1])
    first, before, here = (units[i].results[0] for i in (start, place - 1, place))
    is_back = before.calls[depth][2] > here.calls[depth][2]
    return is_back and here.calls == first.calls and here.operation == first.operation


def _labels(unit: Unit) -> Iterator[tuple[Hashable, str]]:
    """(what tells it apart, what to call it) for each scope, function and line around it."""
    node = unit.results[0]
    for depth, name in enumerate(node.scope, start=1):
        yield ("scope", node.scope[:depth]), name.lstrip("_")
    calls = node.calls
    for depth in range(1, len(calls)):
        name = calls[depth][0].removesuffix(".__call__").split(".")[-1]
        if not name.startswith("<"):
            yield ("function", calls[:depth], name), name
    if calls:
        _, file, line = calls[-1]
        source = linecache.getline(file, line).strip()
        source = source.removeprefix("return ")
        yield ("line", calls), source if len(source) <= 40 else source[:39] + "…"


def _bundled(items: list[Unit | Group], most: int) -> list[Unit | Group]:
    """Too many operations with nothing to tell them apart: equal shares of them."""
    share = -(-len(items) // most)
    bundles: list[Unit | Group] = []
    for k in range(0, len(items), share):
        part = items[k : k + share]
        count = sum(len(item.units()) for item in part)
        bundle = Group(f"operations {k + 1} to {k + len(part)}", 0, count, part)
        bundles.append(bundle if len(part) > 1 else part[0])
    return bundles
