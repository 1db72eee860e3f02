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
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fnn import arguments
from fnn.backprop import text
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
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def to_svg(graph: Graph, max_boxes: int, open: Choice = None, closed: Choice = None) -> str:
    """The picture as SVG; see `Graph.to_svg`."""
    dot = _dot(graph, groups(graph, max_boxes, open, closed, "graph.to_svg"))
    try:
        import pygraphviz
    except ImportError:
        without = "(Its wheel brings Graphviz along.) graph.to_dot() gives the picture as text."
        raise arguments.missing("drawing a graph", "pygraphviz>=2.0", otherwise=without) from None
    drawn = pygraphviz.AGraph(string=dot).draw(format="svg", prog="dot")
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
    return _dot(graph, groups(graph, max_boxes, open, closed, "graph.to_dot"))


def _dot(graph: Graph, top: list[Unit | Group]) -> str:
    return "\n".join(_Picture(graph, top).lines()) + "\n"


@dataclasses.dataclass
class _Picture:
    """What is drawn: the boxes and open groups at the top, and who uses each value."""

    graph: Graph
    top: list[Unit | Group]

    def __post_init__(self):
        self.boxes = list(_boxes(self.top))
        self.maker: dict[int, int] = {}  # from id(node) to the number of the box that makes it
        self.users: dict[int, list[int]] = {}
        for k, box in enumerate(self.boxes):
            for unit in box.units():
                self.maker.update({id(n): k for n in unit.results})
        for k, box in enumerate(self.boxes):
            for node in _reads(box):
                if self.maker.get(id(node)) != k:
                    self.users.setdefault(id(node), []).append(k)
        self.shares = _shares(self.graph)
        self.number = {id(n): i for i, n in enumerate(self.graph.nodes)}
        self.down = self._longest_path() > LONGEST_ROW

    def lines(self) -> Iterator[str]:
        direction = "TB" if self.down else "LR"
        font = f'fontname="{FONT}"'
        yield f"digraph {_quoted(self.graph.name)} {{"
        yield f'  charset="UTF-8"; rankdir={direction}; nodesep=0.16; ranksep=0.2;'
        yield f'  bgcolor="white"; pad=0.15; tooltip=" "; {font}; fontsize=11; fontcolor="{GREY}";'
        yield f'  node [{font}, fontsize=12, fontcolor="{INK}", tooltip=" "];'
        yield f'  edge [{font}, fontsize=10, color="{GREY}", arrowsize=0.6, tooltip=" "];'
        for node in self.graph.inputs:
            if self._is_drawn_as_input(node):
                yield f"  {self._wire(node)}"
        yield from self._level(self.top, "  ", "c")
        yield from self._edges()
        yield "}"

    def _longest_path(self) -> int:
        """In boxes; a box stands after those that it reads from."""
        length = [0] * len(self.boxes)
        for k, box in enumerate(self.boxes):
            before = [self.maker[id(n)] for n in _reads(box) if id(n) in self.maker]
            length[k] = 1 + max((length[i] for i in before if i != k), default=0)
        return max(length, default=0)

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
            k = self.boxes.index(item)
            is_group = isinstance(item, Group)
            yield f"{indent}b{k} {_group(item, self._own(k)) if is_group else _operation(item)};"
            for unit in item.units():
                for node in unit.results:
                    if self.users.get(id(node)) or node in self.graph.outputs:
                        yield indent + self._wire(node)

    def _is_drawn_as_input(self, node: Node) -> bool:
        """A parameter that one closed group alone reads is listed in the group's box instead."""
        users = self.users.get(id(node), [])
        if len(users) == 1 and isinstance(self.boxes[users[0]], Group):
            return node.label.isidentifier() or node in self.graph.outputs
        return bool(users) or node in self.graph.outputs or len(self.graph.nodes) < 20

    def _own(self, k: int) -> list[Node]:
        """The parameters that are listed in a closed group's box."""
        return [
            n
            for n in self.graph.inputs
            if self.users.get(id(n)) == [k] and not self._is_drawn_as_input(n)
        ]

    def _wire(self, node: Node) -> str:
        table = _wire_down if self.down else _wire
        return f"w{self.number[id(node)]} [shape=plain, label=<{table(node)}>];"

    def _edges(self) -> Iterator[str]:
        start, end = ("n", "s") if self.down else ("w", "e")
        for node in self.graph.nodes:
            w = f"w{self.number[id(node)]}"
            users = self.users.get(id(node), [])
            maker = self.maker.get(id(node))
            if maker is not None and (users or node in self.graph.outputs):
                yield f"  b{maker} -> {w}:wire:{start} [arrowhead=none, headclip=false, weight=4];"
            if maker is None and not self._is_drawn_as_input(node):
                continue
            for k in users:
                label = self._share(node, k) if len(users) > 1 else ""
                dashed = "" if node.differentiable else ', style="dashed"'
                yield f"  {w}:wire:{end} -> b{k} [tailclip=false, weight=2{label}{dashed}];"

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


def _shares(graph: Graph) -> dict:
    return {(id(equation), i): g for equation, i, g in graph.contributions()}


# ------------------------------------------------------------------------------ how things look


def _operation(unit: Unit) -> str:
    """A circle with the operation's symbol, or a rounded box with its name."""
    symbol = _symbol(unit)
    has_gradient = any(n.differentiable for n in unit.results)
    colour = INK if has_gradient else GREY
    style = f'color="{colour}", fontcolor="{colour}", tooltip={_quoted(_tooltip(unit))}'
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


def _symbol(unit: Unit) -> str:
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


def _tooltip(unit: Unit) -> str:
    node = unit.results[0] if unit.results else None
    return f"{unit.name}  {node.source}" if node else unit.name


def _wire(node: Node) -> str:
    """Value above the wire, gradient below it; to the left of an input its name.

    An array has a row more: its name and shape. Its counterpart below is empty, so that the
    wire runs through the middle.
    """
    name, shape, value, gradient = _about(node)
    above, below = [f"{name} {value}"], [gradient]
    if shape:
        above, below = [f"{name} {shape}", value], [gradient, _font(" ", GREY, 9)]
    rows = [
        f'<TR><TD CELLPADDING="2">{"<BR/>".join(above)}</TD></TR>',
        f'<TR><TD PORT="wire" HEIGHT="1" CELLPADDING="0" BGCOLOR="{GREY}"></TD></TR>',
        f'<TR><TD CELLPADDING="2">{"<BR/>".join(below)}</TD></TR>',
    ]
    if node.equation is None:
        title = _font(text.shortened(node.label), INK, 14)
        rows[0] = rows[0].replace("<TR>", f'<TR><TD ROWSPAN="3" CELLPADDING="3">{title}</TD>', 1)
    return f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0">{"".join(rows)}</TABLE>'


def _wire_down(node: Node) -> str:
    """Name and value to the left of the wire, gradient to its right."""
    name, shape, value, gradient = _about(node)
    title = _font(text.shortened(node.label), INK, 14) if node.equation is None else ""
    lines = filter(None, [title, f"{name} {shape}".strip(), value])
    left = "".join(f'{line}<BR ALIGN="RIGHT"/>' for line in lines)
    return (
        '<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0"><TR>'
        f'<TD CELLPADDING="4" ALIGN="RIGHT">{left}</TD>'
        f'<TD PORT="wire" WIDTH="1" CELLPADDING="0" BGCOLOR="{GREY}"></TD>'
        f'<TD CELLPADDING="4" ALIGN="LEFT">{gradient}</TD></TR></TABLE>'
    )


def _about(node: Node) -> tuple[str, str, str, str]:
    """Name (if it has one of its own), shape (an array's), value and gradient, in colour."""
    named = node.equation is not None and node.label != f"v{node.number}"
    return (
        _font(node.label if named else "", INK, 11, italic=True),
        _font(text.shape(node.shape) if node.shape != () else "", GREY, 9),
        _font(text.value(node.value, 3, numbers=0) or " ", GREEN),
        _font(text.gradient(node.gradient, 3, numbers=0) or " ", RED),
    )


def _group(group: Group, own: list[Node]) -> str:
    """A closed group: its name, how much is in it, and its parameters with their gradients."""
    count = len(group.units())
    rows = [
        f'<TR><TD COLSPAN="3" ALIGN="CENTER">{_font(group.label, INK, 14)}</TD></TR>',
        f'<TR><TD COLSPAN="3" ALIGN="CENTER">{_font(f"{count} operations", GREY, 9)}</TD></TR>',
    ]
    for node in own[:MOST_PARAMETERS]:
        rows.append(
            f'<TR><TD ALIGN="LEFT">{_font(text.shortened(node.label), INK, 10)}</TD>'
            f'<TD ALIGN="LEFT">{_font(text.shape(node.shape), GREY, 9)}</TD>'
            f'<TD ALIGN="RIGHT">{_font(text.gradient(node.gradient, 3) or " ", RED, 10)}</TD></TR>'
        )
    if len(own) > MOST_PARAMETERS:
        more = _font(f"… and {len(own) - MOST_PARAMETERS} more", GREY, 10)
        rows.append(f'<TR><TD COLSPAN="3" ALIGN="LEFT">{more}</TD></TR>')
    return (
        '[shape=box, style="rounded,filled", fillcolor="#eef2ff", color="#4f5b93", '
        f"tooltip={_quoted(group.label)}, margin=0.06, label=<"
        f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="1">{"".join(rows)}'
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
