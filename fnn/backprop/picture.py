"""What is drawn of a graph: boxes, the wires between them, and what stands in and on them.

A box is an operation or a closed group of operations; `grouping` chooses the groups. A wire is a
value. `graphviz` draws a picture with Graphviz, `rows` draws one that is too large for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from fnn import text
from fnn.backprop.grouping import Group, Unit
from fnn.backprop.node import Node
from fnn.jaxpr import Equation

# Green and red have a contrast with white of more than 5 : 1 and differ in lightness, and their
# places tell them apart too, for readers who don't see the colours.
GREEN, RED, INK, GREY = "#1a7a36", "#b3202c", "#20242c", "#6b7280"

# What stands in the circle; anything else by its own name.
SYMBOLS = {
    "add": "+",
    "add_any": "+",
    "sub": "−",
    "mul": "*",
    "div": "/",
    "neg": "*−1",
    "dot_general": "@",
    "reduce_sum": "Σ",
    "reduce_prod": "Π",
    "reduce_max": "max",
    "reduce_min": "min",
    "logistic": "σ",
    "sqrt": "√x",
    "rsqrt": "1/√x",
    "cbrt": "∛x",
    "square": "x²",
    "abs": "|x|",
    "transpose": "xᵀ",
    "select_n": "where",
    "conv_general_dilated": "conv",
    "broadcast_in_dim": "broadcast",
    "eq": "=",
    "ne": "≠",
    "lt": "<",
    "le": "≤",
    "gt": ">",
    "ge": "≥",
    "while": "while loop",
    "remat2": "checkpoint",
}
WITH_NUMBER = {  # how a number that is an operand is written: (number first, number second)
    "add": ("+{}", "+{}"),
    "sub": ("{}−x", "−{}"),
    "mul": ("*{}", "*{}"),
    "div": ("{}/x", "/{}"),
    "pow": ("{}ˣ", "x^{}"),
    "max": ("max({}, x)", "max(x, {})"),
    "min": ("min({}, x)", "min(x, {})"),
}
LONGEST_ROW = 9  # operations in a row that are still legible from left to right
MOST_PARAMETERS = 12  # that a closed group lists
MOST_ALIKE = (4, 8)  # values of a group, and inputs, that go the same way in wires of their own
MOST_WIRES = 8  # from one closed group
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclasses.dataclass(eq=False)
class Wire:
    """A value on its way from the box that makes it to those that read it; or many values.

    maker: the number of the box, None for inputs.
    users: the numbers of the boxes.
    """

    nodes: list[Node]
    maker: int | None
    users: list[int]


class Picture:
    """What is drawn: boxes, the open groups around them, and the wires between them.

    name: the graph's.
    top: the boxes and open groups.
    boxes: the boxes, in topological order.
    wires: the wires.
    own: for each box the parameters that are listed in it, as it alone reads them.
    levels: for each box the length of the longest path to it, in boxes, from 1 on.
    previous: for each box the one before it on that path.
    place: the number of each box, by its id.
    number: the number of each node, by its id.
    wires_of: the wires that start at each box; those of the inputs at None.
    shares: what each operation handed to each of its inputs, by the equation's id and which input.
    down: whether it runs from top to bottom, as long ones do.
    spine: what lies on the longest path: the ids of boxes and wires, and (id of a wire, box).
    effort: what laying it out costs Graphviz.
    """

    def __init__(
        self,
        name: str,
        nodes: Sequence[Node],
        outputs: Sequence[Node],
        contributions: Iterable[tuple[Equation, int, Any]],
        top: list[Unit | Group],
    ):
        self.name = name
        self.nodes = nodes
        self.top = top
        self.boxes = list(_boxes(top))
        self.place = {id(box): k for k, box in enumerate(self.boxes)}
        self.number = {id(n): i for i, n in enumerate(nodes)}
        self.outputs = {id(n) for n in outputs}
        self.shares = {(id(equation), i): g for equation, i, g in contributions}
        maker: dict[int, int] = {}
        users: dict[int, list[int]] = {}
        for k, box in enumerate(self.boxes):
            maker.update({id(n): k for unit in box.units() for n in unit.results})
        self.levels = [1] * len(self.boxes)
        self.previous: list[int | None] = [None] * len(self.boxes)
        for k, box in enumerate(self.boxes):
            for node in _reads(box):
                before = maker.get(id(node))
                if before == k:
                    continue
                users.setdefault(id(node), []).append(k)
                if before is not None and self.levels[before] >= self.levels[k]:
                    self.levels[k], self.previous[k] = self.levels[before] + 1, before
        self.own: list[list[Node]] = [[] for _ in self.boxes]
        for node in (n for n in nodes if n.equation is None):
            reads = users.get(id(node), [])
            is_a_path = not node.label.isidentifier() and id(node) not in self.outputs
            if is_a_path and len(reads) == 1 and isinstance(self.boxes[reads[0]], Group):
                self.own[reads[0]].append(node)
        self.wires = self._wires(maker, users)
        self.wires_of: dict[int | None, list[Wire]] = {}
        for wire in self.wires:
            self.wires_of.setdefault(wire.maker, []).append(wire)
        self.down = max(self.levels, default=0) > LONGEST_ROW
        self.spine = self._spine() if self.down else set()
        # Graphviz's work: it places the boxes, the wires, and each edge in each row it crosses.
        self.effort = len(self.boxes) + len(self.wires)
        for wire in self.wires:
            start = self.levels[wire.maker] if wire.maker is not None else None
            for k in wire.users:
                self.effort += 2 * (self.levels[k] - start) if start is not None else 1

    def _wires(self, maker: dict[int, int], users: dict[int, list[int]]) -> list[Wire]:
        """The wires; values that go the same way are one, if they are many."""
        listed = {id(n) for own in self.own for n in own}
        is_small = len(self.nodes) < 20
        alike: dict[tuple, list[Node]] = {}
        for node in self.nodes:
            reads, k = users.get(id(node), []), maker.get(id(node))
            is_unused_input = k is None and is_small
            if id(node) in listed or not (reads or id(node) in self.outputs or is_unused_input):
                continue
            makes_many = k is None or isinstance(self.boxes[k], Group)
            key = (k, tuple(reads), id(node) in self.outputs)
            alike.setdefault(key if makes_many else (k, id(node)), []).append(node)
        of: dict[int | None, list[Wire]] = {}
        for (k, *_), nodes in alike.items():
            reads = users.get(id(nodes[0]), [])
            parts = [nodes] if len(nodes) > MOST_ALIKE[k is None] else [[n] for n in nodes]
            of.setdefault(k, []).extend(Wire(part, k, reads) for part in parts)
        most = {k: MOST_WIRES if k is not None else 24 + 2 * len(self.boxes) for k in of}
        wires = (
            wire
            for k, made in of.items()
            for wire in (made if len(made) <= most[k] else self._one(made))
        )
        return sorted(wires, key=lambda wire: self.number[id(wire.nodes[0])])

    def _one(self, wires: list[Wire]) -> list[Wire]:
        """All that are read somewhere, as one; what is an output keeps its wire."""
        kept = [w for w in wires if any(id(n) in self.outputs for n in w.nodes)]
        merged = [w for w in wires if not any(id(n) in self.outputs for n in w.nodes)]
        if not merged:
            return kept
        nodes = [n for w in merged for n in w.nodes]
        return [*kept, Wire(nodes, merged[0].maker, sorted({k for w in merged for k in w.users}))]

    def _spine(self) -> set:
        """The longest path, which is put in one line."""
        box: int | None = max(range(len(self.boxes)), key=self.levels.__getitem__, default=None)
        found: set = set()
        while box is not None:
            found.add(id(self.boxes[box]))
            before = self.previous[box]
            through = [w for w in self.wires_of.get(before, ()) if box in w.users]
            if before is not None and through:
                found |= {id(through[0]), (id(through[0]), box)}
            box = before
        return found


def _boxes(items) -> Iterator[Unit | Group]:
    for item in items:
        if isinstance(item, Group) and item.is_open:
            yield from _boxes(item.items)
        else:
            yield item


def _reads(box: Unit | Group) -> list[Node]:
    """The nodes that a box reads, each once; constants aren't wires."""
    found: dict[int, Node] = {}
    for unit in box.units():
        for node in unit.inputs:
            if node.number is not None:
                found[id(node)] = node
    return list(found.values())


# ------------------------------------------------------------------------------ how things look


def symbol_of(unit: Unit) -> str:
    equation, name = unit.equation, unit.name
    if name == "integer_pow":
        return "x" + str(equation.params["y"]).translate(SUPERSCRIPT)
    if name == "convert_element_type":
        return f"as {equation.params['new_dtype']}"
    if name == "scan":
        return f"scan × {equation.params['length']}"
    numbers = [n for n in unit.inputs if n.number is None]
    if name in WITH_NUMBER and len(numbers) == 1 and len(unit.inputs) == 2:
        label = numbers[0].label
        second = unit.inputs[1].number is None
        return WITH_NUMBER[name][second].format(label.replace("-", "−"))
    symbol = SYMBOLS.get(name, name)
    if numbers and len(unit.inputs) > len(numbers) and name not in _OBVIOUS:
        symbol += f" ({', '.join(n.label for n in numbers)})"
    return symbol


_OBVIOUS = ("broadcast_in_dim", "pad", "gather", "scatter-add", "dynamic_slice", "select_n", "scan")


def tooltip(unit: Unit) -> str:
    return f"{unit.name}  {unit.results[0].source}"


class Text(NamedTuple):
    """A piece of text, and how it looks: `size` in points."""

    content: str
    colour: str
    size: int
    is_slanted: bool = False

    @property
    def width(self) -> float:
        """About how wide it is, in points."""
        return 0.58 * self.size * len(self.content.strip())


def about(wire: Wire) -> tuple[Text, Text, Text, Text]:
    """Name (if it has one of its own), shape (an array's), value and gradient of a wire."""
    node, value, gradient = wire.nodes[0], "", ""
    if len(wire.nodes) == 1:
        is_named = node.equation is not None and node.label != f"v{node.number}"
        name = node.label if is_named else ""
        shape = text.shape(node.shape) if node.shape != () else ""
        value = text.value(node.value, 3, numbers=0)
        gradient = text.gradient(node.gradient, 3, numbers=0)
    else:
        name = "" if node.equation is None else f"{len(wire.nodes):,} values"
        shape = f"{sum(math.prod(n.shape) for n in wire.nodes):,} numbers"
        gradients = [n.gradient for n in wire.nodes if n.gradient is not None]
        if gradients and all(map(text.is_concrete, gradients)):
            gradient = f"‖g‖ {text.euclidean(gradients):.3g}"
    return (
        Text(text.shortened(name), INK, 11, True),
        Text(shape, GREY, 9),
        Text(value or " ", GREEN, 10),
        Text(gradient or " ", RED, 10),
    )


def title_of(wire: Wire) -> Text:
    """An input's name; it stands before the wire."""
    name = ""
    if wire.nodes[0].equation is None:
        several = len(wire.nodes) > 1
        name = f"{len(wire.nodes):,} inputs" if several else text.shortened(wire.nodes[0].label)
    return Text(name, INK, 14)


def in_closed(group: Group, own: Sequence[Node]) -> tuple[list[Text], list[list[Text]]]:
    """What stands in a closed group's box: a heading of several lines, and a table.

    The table has a row (name, shape, gradient) for each of its own parameters; if there are too
    many, its last row says how many more.
    """
    heading = [Text(group.label, INK, 14), Text(f"{len(group.units())} operations", GREY, 9)]
    table = [
        [
            Text(text.shortened(node.label), INK, 10),
            Text(text.shape(node.shape), GREY, 9),
            Text(text.gradient(node.gradient, 3) or " ", RED, 10),
        ]
        for node in own[:MOST_PARAMETERS]
    ]
    if len(own) > MOST_PARAMETERS:
        table.append([Text(f"… and {len(own) - MOST_PARAMETERS} more", GREY, 10)])
    return heading, table


def symbol_size(symbol: str) -> int | None:
    """How large an operation's symbol is drawn in its circle; None if it needs a wider box."""
    if len(symbol) > 4:
        return None
    return 12 if len(symbol) > 3 else 15 if len(symbol) > 1 else 19
