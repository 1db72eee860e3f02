"""The graph as a picture, drawn like the circuits of CS231n, lecture 4.

From left to right: names of inputs, operations in circles, and on each wire the value above
(green) and its gradient below (red). A long graph runs from top to bottom, so that its letters
stay legible on a page; then the value is to the left of the wire and the gradient to its right.

What is drawn is a list of boxes, each an operation or a closed group of operations, and the
wires between them; `grouping.py` chooses the groups.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fnn import arguments, text
from fnn.backprop import rows
from fnn.backprop.grouping import Choice, Group, Unit, groups

if TYPE_CHECKING:
    from fnn.backprop.trace import Graph, Node

# Both stand out against white by more than 5 : 1 and differ in lightness, and above and below
# tells them apart too, for readers who don't see the colours.
GREEN, RED, INK, GREY = "#1a7a36", "#b3202c", "#20242c", "#6b7280"
FONT = "Helvetica"

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
LARGE = 800  # boxes, wires and rows crossed; Graphviz takes time that grows faster than they
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def to_svg(graph: Graph, max_boxes: int, open: Choice = None, closed: Choice = None) -> str:
    """The picture as SVG; see `Graph.to_svg`."""
    picture = _Picture(graph, groups(graph, max_boxes, open, closed, "graph.to_svg"))
    if picture.effort > LARGE:
        return rows.to_svg(picture)
    try:
        import pygraphviz
    except ImportError:
        without = "(Its wheel brings Graphviz along.) graph.to_dot() gives the picture as text."
        raise arguments.missing("drawing a graph", "pygraphviz>=2.0", otherwise=without) from None
    drawn = pygraphviz.AGraph(string=picture.dot()).draw(format="svg", prog="dot")
    svg = drawn.decode("utf-8")
    return _joined(svg[svg.index("<svg") :]).replace(
        'font-family="Helvetica,sans-Serif"',
        'font-family="Helvetica,Arial,Liberation Sans,sans-serif"',
    )


def _joined(svg: str) -> str:
    """Graphviz ends an edge one point before the wire that it leads to: lengthen the wires."""

    def longer(match):
        points = [tuple(map(float, p.split(","))) for p in match[1].split()]
        (x0, y0), (x1, y1) = map(min, zip(*points)), map(max, zip(*points))
        dx, dy = (1, 0) if x1 - x0 > y1 - y0 else (0, 1)
        x0, y0, x1, y1 = x0 - dx, y0 - dy, x1 + dx, y1 + dy
        corners = f"{x0:g},{y0:g} {x0:g},{y1:g} {x1:g},{y1:g} {x1:g},{y0:g}"
        return match[0].replace(match[1], corners)

    return re.sub(f'<polygon fill="{GREY}" stroke="none" points="([^"]*)"', longer, svg)


def to_dot(graph: Graph, max_boxes: int, open: Choice = None, closed: Choice = None) -> str:
    """The picture in Graphviz's language; see `Graph.to_dot`."""
    return _Picture(graph, groups(graph, max_boxes, open, closed, "graph.to_dot")).dot()


@dataclasses.dataclass(eq=False)
class Wire:
    """A value on its way from the box that makes it to those that read it; or many values.

    maker: the number of the box, None for inputs.
    users: the numbers of the boxes.
    """

    nodes: list[Node]
    maker: int | None
    users: list[int]


class _Picture:
    """What is drawn: boxes, the open groups around them, and the wires between them.

    top: the boxes and open groups.
    boxes: the boxes, in topological order.
    wires: the wires.
    own: for each box the parameters that are listed in it, as it alone reads them.
    levels: for each box the length of the longest path to it, in boxes, from 1 on.
    """

    def __init__(self, graph: Graph, top: list[Unit | Group]):
        self.graph = graph
        self.top = top
        self.boxes = list(_boxes(top))
        self.place = {id(box): k for k, box in enumerate(self.boxes)}
        self.number = {id(n): i for i, n in enumerate(graph.nodes)}
        self.outputs = {id(n) for n in graph.outputs}
        self.shares = {(id(equation), i): g for equation, i, g in graph.contributions()}
        maker: dict[int, int] = {}
        users: dict[int, list[int]] = {}
        for k, box in enumerate(self.boxes):
            maker.update({id(n): k for unit in box.units() for n in unit.results})
        self.levels = [1] * len(self.boxes)
        self.after: list[int | None] = [None] * len(self.boxes)  # the box before, on that path
        for k, box in enumerate(self.boxes):
            for node in _reads(box):
                before = maker.get(id(node))
                if before == k:
                    continue
                users.setdefault(id(node), []).append(k)
                if before is not None and self.levels[before] >= self.levels[k]:
                    self.levels[k], self.after[k] = self.levels[before] + 1, before
        self.own: list[list[Node]] = [[] for _ in self.boxes]
        for node in graph.inputs:
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
        is_small = len(self.graph.nodes) < 20
        alike: dict[tuple, list[Node]] = {}
        for node in self.graph.nodes:
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

    def dot(self) -> str:
        """The picture in Graphviz's language."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        direction = "TB" if self.down else "LR"
        font = f'fontname="{FONT}"'
        yield f"digraph {_quoted(self.graph.name)} {{"
        yield f'  charset="UTF-8"; rankdir={direction}; nodesep=0.16; ranksep={self._gap()};'
        if self.effort > LARGE / 3:  # bound Graphviz's search
            yield "  nslimit=1; nslimit1=1; mclimit=0.1; splines=polyline;"
        yield f'  bgcolor="white"; pad=0.15; tooltip=" "; {font}; fontsize=11; fontcolor="{GREY}";'
        yield f'  node [{font}, fontsize=12, fontcolor="{INK}", tooltip=" "];'
        yield f'  edge [{font}, fontsize=10, color="{GREY}", arrowsize=0.6, tooltip=" "];'
        for wire in self.wires_of.get(None, ()):
            yield f"  {self._wire(wire)}"
        yield from self._level(self.top, "  ", "c")
        yield from self._edges()
        yield "}"

    def _gap(self) -> float:
        return 0.2 if len(self.boxes) <= 20 else 0.13

    def _spine(self) -> set:
        """The longest path, which is put in one line: ids of boxes, of wires, (wire, box)."""
        box: int | None = max(range(len(self.boxes)), key=self.levels.__getitem__, default=None)
        found: set = set()
        while box is not None:
            found.add(id(self.boxes[box]))
            before = self.after[box]
            through = [w for w in self.wires_of.get(before, ()) if before is None or box in w.users]
            if before is not None and through:
                found |= {id(through[0]), (id(through[0]), box)}
            box = before
        return found

    def _level(self, items: Iterable[Unit | Group], indent: str, path: str) -> Iterator[str]:
        """The boxes, wires and open groups inside one open group, or at the top."""
        for i, item in enumerate(items):
            if isinstance(item, Group) and item.is_open:
                yield f"{indent}subgraph cluster_{path}_{i} {{"
                yield f'{indent}  label={_quoted(item.label)}; labeljust="l"; margin=8;'
                yield f'{indent}  style="rounded,filled"; color="#cbd5e1"; fillcolor="#f8fafc";'
                yield from self._level(item.items, indent + "  ", f"{path}_{i}")
                yield f"{indent}}}"
                continue
            k = self.place[id(item)]
            looks = _group(item, self.own[k]) if isinstance(item, Group) else _operation(item)
            yield f"{indent}b{k} {self._in_line(item, looks)};"
            for wire in self.wires_of.get(k, ()):
                yield indent + self._wire(wire)

    def _in_line(self, drawn: Unit | Group | Wire, looks: str) -> str:
        """Graphviz keeps the nodes of one `group` in a straight line."""
        return looks.replace("[", "[group=line, ", 1) if id(drawn) in self.spine else looks

    def _wire(self, wire: Wire) -> str:
        table = _wire_down if self.down else _wire
        looks = self._in_line(wire, f"[shape=plain, label=<{table(wire)}>]")
        return f"w{self.number[id(wire.nodes[0])]} {looks};"

    def _edges(self) -> Iterator[str]:
        start, end = ("n", "s") if self.down else ("w", "e")
        for wire in self.wires:
            w = f"w{self.number[id(wire.nodes[0])]}"
            if wire.maker is not None:
                k = wire.maker
                weight = 60 if {id(wire), id(self.boxes[k])} <= self.spine else 4
                looks = f"arrowhead=none, headclip=false, weight={weight}"
                yield f"  b{k} -> {w}:wire:{start} [{looks}];"
            for k in wire.users:
                several = len(wire.users) > 1 and len(wire.nodes) == 1
                label = self._share(wire.nodes[0], k) if several else ""
                dashed = "" if any(n.differentiable for n in wire.nodes) else ', style="dashed"'
                weight = 60 if (id(wire), k) in self.spine else 2
                yield f"  {w}:wire:{end} -> b{k} [tailclip=false, weight={weight}{label}{dashed}];"

    def _share(self, node: Node, k: int) -> str:
        """Where a wire branches, what each branch adds to a scalar's gradient."""
        if node.shape != ():
            return ""
        given = [
            self.shares[id(u.equation), i]
            for u in self.boxes[k].units()
            for i, n in enumerate(u.inputs)
            if n is node and self.shares.get((id(u.equation), i)) is not None
        ]
        if not given or not all(map(text.is_concrete, given)):
            return ""
        label = ", ".join(text.number(g, 3) for g in given)
        return f', label=" {label} ", fontcolor="{RED}"'


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


def _operation(unit: Unit) -> str:
    """A circle with the operation's symbol, or a rounded box with its name."""
    symbol = symbol_of(unit)
    has_gradient = any(n.differentiable for n in unit.results)
    colour = INK if has_gradient else GREY
    style = f'color="{colour}", fontcolor="{colour}", tooltip={_quoted(tooltip(unit))}'
    if unit.results and unit.results[0].graphs:
        return f'[shape=box, peripheries=2, style="rounded", label={_quoted(symbol)}, {style}]'
    if len(symbol) <= 4:
        size = 12 if len(symbol) > 3 else 15 if len(symbol) > 1 else 19
        return (
            f"[shape=circle, fixedsize=true, width=0.52, fontsize={size}, label={_quoted(symbol)}, "
            f'style="filled", fillcolor="white", {style}]'
        )
    return (
        f'[shape=box, style="rounded,filled", fillcolor="white", margin="0.09,0.05", height=0.4, '
        f"label={_quoted(symbol)}, {style}]"
    )


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
    node = unit.results[0] if unit.results else None
    return f"{unit.name}  {node.source}" if node else unit.name


def _wire(wire: Wire) -> str:
    """Value above the wire, gradient below it; to the left of an input its name.

    An array has a row more: its name and shape. Its counterpart below is empty, so that the
    wire runs through the middle.
    """
    name, shape, value, gradient = (_coloured(part) for part in about(wire))
    title = _title(wire)
    above, below = [f"{name} {value}"], [gradient]
    if shape:
        above, below = [f"{name} {shape}", value], [gradient, _font(" ", GREY, 9)]
    lines = [
        f'<TR><TD CELLPADDING="2">{"<BR/>".join(above)}</TD></TR>',
        f'<TR><TD PORT="wire" HEIGHT="1" CELLPADDING="0" BGCOLOR="{GREY}"></TD></TR>',
        f'<TR><TD CELLPADDING="2">{"<BR/>".join(below)}</TD></TR>',
    ]
    if title:
        lines[0] = lines[0].replace("<TR>", f'<TR><TD ROWSPAN="3" CELLPADDING="3">{title}</TD>', 1)
    return f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0">{"".join(lines)}</TABLE>'


def _wire_down(wire: Wire) -> str:
    """Name and value to the left of the wire, gradient to its right; both equally wide."""
    parts = about(wire)
    name, shape, value, gradient = map(_coloured, parts)
    lines = list(filter(None, [_title(wire), f"{name} {shape}".strip(), value]))
    left = "".join(f'{line}<BR ALIGN="RIGHT"/>' for line in lines)
    first = width(parts[0][0], 11) + width(parts[1][0], 9)
    half = max(first, *(width(p[0], 10) for p in parts[2:]), width(title_of(wire), 14))
    return (
        '<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0"><TR>'
        f'<TD CELLPADDING="4" ALIGN="RIGHT" WIDTH="{half:.0f}">{left}</TD>'
        f'<TD PORT="wire" WIDTH="1" CELLPADDING="0" BGCOLOR="{GREY}"></TD>'
        f'<TD CELLPADDING="4" ALIGN="LEFT" WIDTH="{half:.0f}">{gradient}</TD></TR></TABLE>'
    )


def width(content: str, size: int) -> float:
    """About how wide a text is, in points."""
    return 0.58 * size * len(content.strip())


def about(wire: Wire) -> list[tuple[str, str, int, bool]]:
    """Name (if it has one of its own), shape (an array's), value and gradient of a wire.

    Each as (text, colour, size in points, whether it's slanted).
    """
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
    return [
        (text.shortened(name), INK, 11, True),
        (shape, GREY, 9, False),
        (value or " ", GREEN, 10, False),
        (gradient or " ", RED, 10, False),
    ]


def title_of(wire: Wire) -> str:
    """An input's name; it stands before the wire."""
    if wire.nodes[0].equation is not None:
        return ""
    several = len(wire.nodes) > 1
    return f"{len(wire.nodes):,} inputs" if several else text.shortened(wire.nodes[0].label)


def _title(wire: Wire) -> str:
    return _font(title_of(wire), INK, 14)


def _coloured(part: tuple[str, str, int, bool]) -> str:
    content, colour, size, is_slanted = part
    return _font(content, colour, None if size == 10 else size, italic=is_slanted)


def parameter(node: Node) -> tuple[tuple[str, str, int, bool], tuple[str, str, int, bool]]:
    """The name and gradient of a parameter that is listed in a box, in the form of `about`."""
    gradient = text.gradient(node.gradient, 3)
    return (text.shortened(node.label), INK, 10, False), (gradient, RED, 10, False)


def _group(group: Group, own: list[Node]) -> str:
    """A closed group: its name, how much is in it, and its parameters with their gradients."""
    count = len(group.units())
    lines = [
        f'<TR><TD COLSPAN="3" ALIGN="CENTER">{_font(group.label, INK, 14)}</TD></TR>',
        f'<TR><TD COLSPAN="3" ALIGN="CENTER">{_font(f"{count} operations", GREY, 9)}</TD></TR>',
    ]
    for node in own[:MOST_PARAMETERS]:
        lines.append(
            f'<TR><TD ALIGN="LEFT">{_font(text.shortened(node.label), INK, 10)}</TD>'
            f'<TD ALIGN="LEFT">{_font(text.shape(node.shape), GREY, 9)}</TD>'
            f'<TD ALIGN="RIGHT">{_font(text.gradient(node.gradient, 3) or " ", RED, 10)}</TD></TR>'
        )
    if len(own) > MOST_PARAMETERS:
        more = _font(f"… and {len(own) - MOST_PARAMETERS} more", GREY, 10)
        lines.append(f'<TR><TD COLSPAN="3" ALIGN="LEFT">{more}</TD></TR>')
    return (
        '[shape=box, style="rounded,filled", fillcolor="#eef2ff", color="#4f5b93", '
        f"tooltip={_quoted(group.label)}, margin=0.06, label=<"
        f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="1">{"".join(lines)}'
        "</TABLE>>]"
    )


def _font(content: str, colour: str, size: int | None = None, italic=False) -> str:
    if not content:  # Graphviz takes no empty element
        return ""
    content = html.escape(content, quote=True)
    content = f"<I>{content}</I>" if italic else content
    points = f' POINT-SIZE="{size}"' if size else ""
    return f'<FONT COLOR="{colour}"{points}>{content}</FONT>'


def _quoted(label: str) -> str:
    return '"' + label.replace("\\", "\\\\").replace('"', '\\"') + '"'
