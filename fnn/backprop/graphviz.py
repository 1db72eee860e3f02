"""A picture in Graphviz's language DOT, drawn as the circuits of CS231n, lecture 4.

From left to right: names of inputs, operations in circles, and on each wire the value above
(green) and its gradient below (red). A long graph runs from top to bottom, so that its letters
stay legible on a page; then the value is to the left of the wire and the gradient to its right.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator

from fnn import arguments, text
from fnn.backprop.grouping import Group, Unit
from fnn.backprop.node import Node
from fnn.backprop.picture import (
    GREY,
    INK,
    RED,
    Picture,
    Text,
    Wire,
    about,
    in_closed,
    symbol_of,
    symbol_size,
    title_of,
    tooltip,
)

FONT = "Helvetica"
LARGE = 800  # boxes, wires and rows crossed; Graphviz takes time that grows faster than they


def svg(picture: Picture) -> str:
    """The picture as SVG, laid out and drawn by Graphviz.

    Raises:
        ImportError: pygraphviz isn't installed.
    """
    try:
        import pygraphviz
    except ImportError:
        without = "(Its wheel brings Graphviz along.) graph.to_dot() gives the picture as text."
        raise arguments.missing("drawing a graph", "pygraphviz>=2.0", otherwise=without) from None
    drawn = pygraphviz.AGraph(string=dot(picture)).draw(format="svg", prog="dot")
    found = drawn.decode("utf-8")
    return _joined(found[found.index("<svg") :]).replace(
        'font-family="Helvetica,sans-Serif"',
        'font-family="Helvetica,Arial,Liberation Sans,sans-serif"',
    )


def _joined(svg: str) -> str:
    """Graphviz ends an edge one point before the wire that it leads to: lengthen the wires."""

    def longer(match):
        points = [tuple(map(float, p.split(","))) for p in match[1].split()]
        xs, ys = zip(*points, strict=True)
        x0, y0, x1, y1 = min(xs), min(ys), max(xs), max(ys)
        dx, dy = (1, 0) if x1 - x0 > y1 - y0 else (0, 1)
        x0, y0, x1, y1 = x0 - dx, y0 - dy, x1 + dx, y1 + dy
        corners = f"{x0:g},{y0:g} {x0:g},{y1:g} {x1:g},{y1:g} {x1:g},{y0:g}"
        return match[0].replace(match[1], corners)

    return re.sub(f'<polygon fill="{GREY}" stroke="none" points="([^"]*)"', longer, svg)


def dot(picture: Picture) -> str:
    """The picture in Graphviz's language DOT."""
    return "\n".join(_lines(picture)) + "\n"


def _lines(picture: Picture) -> Iterator[str]:
    direction = "TB" if picture.down else "LR"
    font = f'fontname="{FONT}"'
    yield f"digraph {_quoted(picture.name)} {{"
    yield f'  charset="UTF-8"; rankdir={direction}; nodesep=0.16; ranksep={_gap(picture)};'
    if picture.effort > LARGE / 3:  # bound Graphviz's search
        yield "  nslimit=1; nslimit1=1; mclimit=0.1; splines=polyline;"
    yield f'  bgcolor="white"; pad=0.15; tooltip=" "; {font}; fontsize=11; fontcolor="{GREY}";'
    yield f'  node [{font}, fontsize=12, fontcolor="{INK}", tooltip=" "];'
    yield f'  edge [{font}, fontsize=10, color="{GREY}", arrowsize=0.6, tooltip=" "];'
    for wire in picture.wires_of.get(None, ()):
        yield f"  {_wire(picture, wire)}"
    yield from _level(picture, picture.top, "  ", "c")
    yield from _edges(picture)
    yield "}"


def _gap(picture: Picture) -> float:
    return 0.2 if len(picture.boxes) <= 20 else 0.13


def _level(
    picture: Picture, items: Iterable[Unit | Group], indent: str, path: str
) -> Iterator[str]:
    """The boxes, wires and open groups inside one open group, or at the top."""
    for i, item in enumerate(items):
        if isinstance(item, Group) and item.is_open:
            yield f"{indent}subgraph cluster_{path}_{i} {{"
            yield f'{indent}  label={_quoted(item.label)}; labeljust="l"; margin=8;'
            yield f'{indent}  style="rounded,filled"; color="#cbd5e1"; fillcolor="#f8fafc";'
            yield from _level(picture, item.items, indent + "  ", f"{path}_{i}")
            yield f"{indent}}}"
            continue
        k = picture.place[id(item)]
        looks = _group(item, picture.own[k]) if isinstance(item, Group) else _operation(item)
        yield f"{indent}b{k} {_in_line(picture, item, looks)};"
        for wire in picture.wires_of.get(k, ()):
            yield indent + _wire(picture, wire)


def _in_line(picture: Picture, drawn: Unit | Group | Wire, looks: str) -> str:
    """Graphviz keeps the nodes of one `group` in a straight line."""
    return looks.replace("[", "[group=line, ", 1) if id(drawn) in picture.spine else looks


def _wire(picture: Picture, wire: Wire) -> str:
    table = _wire_down if picture.down else _wire_across
    looks = _in_line(picture, wire, f"[shape=plain, label=<{table(wire)}>]")
    return f"w{picture.number[id(wire.nodes[0])]} {looks};"


def _edges(picture: Picture) -> Iterator[str]:
    start, end = ("n", "s") if picture.down else ("w", "e")
    for wire in picture.wires:
        w = f"w{picture.number[id(wire.nodes[0])]}"
        if wire.maker is not None:
            k = wire.maker
            weight = 60 if {id(wire), id(picture.boxes[k])} <= picture.spine else 4
            looks = f"arrowhead=none, headclip=false, weight={weight}"
            yield f"  b{k} -> {w}:wire:{start} [{looks}];"
        for k in wire.users:
            several = len(wire.users) > 1 and len(wire.nodes) == 1
            label = _share(picture, wire.nodes[0], k) if several else ""
            dashed = "" if any(n.differentiable for n in wire.nodes) else ', style="dashed"'
            weight = 60 if (id(wire), k) in picture.spine else 2
            yield f"  {w}:wire:{end} -> b{k} [tailclip=false, weight={weight}{label}{dashed}];"


def _share(picture: Picture, node: Node, k: int) -> str:
    """Where a wire branches, what each branch adds to a scalar's gradient."""
    if node.shape != ():
        return ""
    given = [
        picture.shares[id(u.equation), i]
        for u in picture.boxes[k].units()
        for i, n in enumerate(u.inputs)
        if n is node and picture.shares.get((id(u.equation), i)) is not None
    ]
    if not given or not all(map(text.is_concrete, given)):
        return ""
    label = ", ".join(text.number(g, 3) for g in given)
    return f', label=" {label} ", fontcolor="{RED}"'


# ------------------------------------------------------------------------------ how things look


def _operation(unit: Unit) -> str:
    """A circle with the operation's symbol, or a rounded box with its name."""
    symbol = symbol_of(unit)
    has_gradient = any(n.differentiable for n in unit.results)
    colour = INK if has_gradient else GREY
    style = f'color="{colour}", fontcolor="{colour}", tooltip={_quoted(tooltip(unit))}'
    if unit.results[0].bodies is not None:
        return f'[shape=box, peripheries=2, style="rounded", label={_quoted(symbol)}, {style}]'
    size = symbol_size(symbol)
    if size is not None:
        return (
            f"[shape=circle, fixedsize=true, width=0.52, fontsize={size}, label={_quoted(symbol)}, "
            f'style="filled", fillcolor="white", {style}]'
        )
    return (
        f'[shape=box, style="rounded,filled", fillcolor="white", margin="0.09,0.05", height=0.4, '
        f"label={_quoted(symbol)}, {style}]"
    )


def _wire_across(wire: Wire) -> str:
    """Value above the wire, gradient below it; to the left of an input its name.

    An array has a row more: its name and shape. Its counterpart below is empty, so that the
    wire runs through the middle.
    """
    name, shape, value, gradient = map(_font, _larger(about(wire)))
    title = _font(title_of(wire))
    above, below = [f"{name} {value}"], [gradient]
    if shape:
        above, below = [f"{name} {shape}", value], [gradient, _font(Text(" ", GREY, 9))]
    lines = [
        f'<TR><TD CELLPADDING="2">{"<BR/>".join(above)}</TD></TR>',
        f'<TR><TD PORT="wire" HEIGHT="1" CELLPADDING="0" BGCOLOR="{GREY}"></TD></TR>',
        f'<TR><TD CELLPADDING="2">{"<BR/>".join(below)}</TD></TR>',
    ]
    if title:
        lines[0] = lines[0].replace("<TR>", f'<TR><TD ROWSPAN="3" CELLPADDING="3">{title}</TD>', 1)
    return f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0">{"".join(lines)}</TABLE>'


def _larger(parts: Iterable[Text]) -> list[Text]:
    """Values and gradients in the size of the operations' names."""
    return [p._replace(size=12) if p.size == 10 else p for p in parts]


def _wire_down(wire: Wire) -> str:
    """Name and value to the left of the wire, gradient to its right; both equally wide."""
    parts = about(wire)
    name, shape, value, gradient = map(_font, _larger(parts))
    lines = list(filter(None, [_font(title_of(wire)), f"{name} {shape}".strip(), value]))
    left = "".join(f'{line}<BR ALIGN="RIGHT"/>' for line in lines)
    first = parts[0].width + parts[1].width
    half = max(first, parts[2].width, parts[3].width, title_of(wire).width)
    return (
        '<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0"><TR>'
        f'<TD CELLPADDING="4" ALIGN="RIGHT" WIDTH="{half:.0f}">{left}</TD>'
        f'<TD PORT="wire" WIDTH="1" CELLPADDING="0" BGCOLOR="{GREY}"></TD>'
        f'<TD CELLPADDING="4" ALIGN="LEFT" WIDTH="{half:.0f}">{gradient}</TD></TR></TABLE>'
    )


def _group(group: Group, own: list[Node]) -> str:
    """A closed group: its name, how much is in it, and its parameters with their gradients."""
    heading, table = in_closed(group, own)
    lines = [f'<TR><TD COLSPAN="3" ALIGN="CENTER">{_font(line)}</TD></TR>' for line in heading]
    for row in table:
        if len(row) == 1:
            lines.append(f'<TR><TD COLSPAN="3" ALIGN="LEFT">{_font(row[0])}</TD></TR>')
            continue
        name, shape, gradient = map(_font, row)
        lines.append(
            f'<TR><TD ALIGN="LEFT">{name}</TD><TD ALIGN="LEFT">{shape}</TD>'
            f'<TD ALIGN="RIGHT">{gradient}</TD></TR>'
        )
    return (
        '[shape=box, style="rounded,filled", fillcolor="#eef2ff", color="#4f5b93", '
        f"tooltip={_quoted(group.label)}, margin=0.06, label=<"
        f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="1">{"".join(lines)}'
        "</TABLE>>]"
    )


def _font(piece: Text) -> str:
    if not piece.content:  # Graphviz takes no empty element
        return ""
    content = html.escape(piece.content, quote=True)
    content = f"<I>{content}</I>" if piece.is_slanted else content
    return f'<FONT COLOR="{piece.colour}" POINT-SIZE="{piece.size}">{content}</FONT>'


def _quoted(label: str) -> str:
    return '"' + label.replace("\\", "\\\\").replace('"', '\\"') + '"'
