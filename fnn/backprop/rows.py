"""Large pictures, laid out in rows, in time that grows with the number of boxes.

Graphviz searches for few crossings and short edges; beyond some hundred boxes that takes minutes.
Here each box stands below those that it reads from, at the mean of their places; the rows are
folded into columns. Frames around open groups are left out.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

from fnn.backprop.grouping import Group, Unit
from fnn.backprop.picture import (
    GREY,
    INK,
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

GAP, ROW_GAP, COLUMN_GAP, MARGIN = 14.0, 22.0, 60.0, 16.0
SHAPE = 1.4  # wanted width of the picture to its height


@dataclasses.dataclass(eq=False)
class _Mark:
    """A box or a wire: its size, its place (of the centre), and how it's drawn there."""

    width: float
    height: float
    drawn: Group | Unit | Wire
    x: float = 0.0
    y: float = 0.0
    before: list[_Mark] = dataclasses.field(default_factory=list)
    is_input: bool = False
    in_line: bool = False  # of the longest path, which runs straight down


def svg(picture: Picture) -> str:
    """The picture as SVG; see `Graph.to_svg`."""
    boxes = [_box_mark(picture, k) for k in range(len(picture.boxes))]
    wires = [_wire_mark(wire) for wire in picture.wires]
    for mark in (*boxes, *wires):
        mark.in_line = id(mark.drawn) in picture.spine
    edges = []
    rows: list[list[_Mark]] = [[] for _ in range(2 * max(picture.levels, default=0) + 2)]
    for k, mark in enumerate(boxes):
        rows[2 * picture.levels[k] - 1].append(mark)
    beside: dict[int, list[_Mark]] = {}  # inputs of a box stand beside what else it reads
    for wire, mark in zip(picture.wires, wires, strict=True):
        if wire.maker is not None:
            mark.before = [boxes[wire.maker]]
            rows[2 * picture.levels[wire.maker]].append(mark)
            edges.append((boxes[wire.maker], mark, False))
        else:
            first = min(wire.users, key=picture.levels.__getitem__, default=None)
            mark.is_input = True
            level = 1 if first is None else picture.levels[first]
            rows[2 * level - 2].append(mark)
            if first is not None:
                beside.setdefault(first, []).append(mark)
        for k in wire.users:
            boxes[k].before.append(mark)
            edges.append((mark, boxes[k], True))
    anchors = {
        id(mark): [m for k in wire.users for m in beside.get(k, ())]
        for wire, mark in zip(picture.wires, wires, strict=True)
        if wire.maker is not None
    }
    lines = _placed(list(filter(None, rows)), anchors)
    size = _folded(lines)
    body = [_edge(*edge) for edge in edges]
    body += [_drawn_box(picture, k, mark) for k, mark in enumerate(boxes)]
    body += [_drawn_wire(wire, m) for wire, m in zip(picture.wires, wires, strict=True)]
    return _document(size, body)


# ------------------------------------------------------------------------------------- the places


def _placed(rows: list[list[_Mark]], anchors: dict[int, list[_Mark]]) -> list[list[_Mark]]:
    """Set the x of all marks, around 0; rows that are too long become several lines."""
    area = sum((m.width + GAP) * (m.height + ROW_GAP) for row in rows for m in row)
    longest = max(900.0, 1.2 * math.sqrt(area))
    lines = []
    for row in rows:
        wanted = {id(m): _wanted(m) for m in row}
        inner = sorted((m for m in row if not m.is_input), key=lambda m: wanted[id(m)])
        inputs = {id(m): m for m in row if m.is_input}
        order: list[_Mark] = []
        for mark in inner:
            order.append(mark)
            order += [m for a in anchors.get(id(mark), ()) if (m := inputs.pop(id(a), None))]
        order += inputs.values()
        total = sum(m.width + GAP for m in order)
        count = max(1, math.ceil(total / longest))
        share = math.ceil(len(order) / count)
        for k in range(0, len(order), share):
            line = order[k : k + share]
            _set_in_line(line, wanted if count == 1 else {id(m): 0.0 for m in line})
            lines.append(line)
    return lines


def _wanted(mark: _Mark) -> float:
    """Below what it comes from; the inputs that it reads stand where there is room."""
    before = [b for b in mark.before if not b.is_input] or mark.before
    before = [b for b in before if b.in_line and mark.in_line] or before
    return sum(b.x for b in before) / len(before) if before else 0.0


def _set_in_line(line: list[_Mark], wanted: dict[int, float]) -> None:
    """From left to right, each as near to its wanted place as those before it allow."""
    right = -math.inf
    for mark in line:
        at_least = right + GAP + mark.width / 2
        mark.x = (
            at_least if mark.is_input and right > -math.inf else max(wanted[id(mark)], at_least)
        )
        right = mark.x + mark.width / 2
    held = [m for m in line if m.in_line] or [m for m in line if not m.is_input] or line
    shift = sum(m.x - wanted[id(m)] for m in held) / len(held)
    for mark in line:
        mark.x -= shift


def _folded(lines: list[list[_Mark]]) -> tuple[float, float]:
    """Put the lines one below the other, in columns; returns the picture's width and height."""
    heights = [max(m.height for m in line) + ROW_GAP for line in lines]
    widest = max(
        max(m.x + m.width / 2 for m in w) - min(m.x - m.width / 2 for m in w) for w in lines
    )
    total = sum(heights)
    count = max(1, round(math.sqrt(SHAPE * total / (widest + COLUMN_GAP))))
    columns: list[list[int]] = [[]]
    filled = 0.0
    for i, height in enumerate(heights):
        is_full = filled + height > total / count and len(columns) < count
        if is_full and columns[-1] and not lines[i][0].is_input and lines[i][0].before:
            columns.append([])
            filled = 0.0
        columns[-1].append(i)
        filled += height
    left, lowest = MARGIN, 0.0
    for column in columns:
        marks = [m for i in column for m in lines[i]]
        low = min(m.x - m.width / 2 for m in marks)
        high = max(m.x + m.width / 2 for m in marks)
        y = MARGIN
        for i in column:
            for mark in lines[i]:
                mark.x += left - low
                mark.y = y + (heights[i] - ROW_GAP) / 2
            y += heights[i]
        left += high - low + COLUMN_GAP
        lowest = max(lowest, y)
    return left - COLUMN_GAP + MARGIN, lowest - ROW_GAP + MARGIN


# ------------------------------------------------------------------------------------- the looks


def _box_mark(picture: Picture, k: int) -> _Mark:
    box = picture.boxes[k]
    if isinstance(box, Group):
        heading, table = in_closed(box, picture.own[k])
        wide = [line.width for line in heading] + [_width(row) + 12 for row in table]
        return _Mark(max(wide) + 20, 44 + 13 * len(table), box)
    symbol = symbol_of(box)
    if symbol_size(symbol) is not None:
        return _Mark(38, 38, box)
    return _Mark(Text(symbol, INK, 12).width + 18, 30, box)


def _width(line: Sequence[Text]) -> float:
    return sum(part.width + 3 for part in line)


def _wire_mark(wire: Wire) -> _Mark:
    lines, right = _texts(wire)
    half = max(_width(line) for line in [*lines, [right]])
    return _Mark(2 * half + 12, 13.0 * len(lines) + 4, wire)


def _texts(wire: Wire) -> tuple[list[list[Text]], Text]:
    """The lines to the left of a wire, each of several parts; and the gradient, to its right."""
    name, shape, value, gradient = about(wire)
    lines = ([title_of(wire)], [name, shape], [value])
    found = [[part for part in line if part.content.strip()] for line in lines]
    return [line for line in found if line] or [[value]], gradient


def _text(x: float, y: float, parts: Sequence[Text], anchor: str) -> str:
    spans = "".join(
        f'<tspan fill="{colour}" font-size="{size}"{slant}>{html.escape(content)}</tspan>'
        for content, colour, size, is_slanted in parts
        for slant in (' font-style="italic"' if is_slanted else "",)
    )
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{spans}</text>'


def _drawn_wire(wire: Wire, mark: _Mark) -> str:
    lines, gradient = _texts(wire)
    top = mark.y - mark.height / 2
    parts = [
        f'<path d="M{mark.x:.1f},{top:.1f}v{mark.height:.1f}" stroke="{GREY}"/>',
        *(
            _text(mark.x - 5, top + 12 + 13 * i, _spaced(line), "end")
            for i, line in enumerate(lines)
        ),
        _text(mark.x + 5, mark.y + 4, [gradient], "start") if gradient.content.strip() else "",
    ]
    return "".join(parts)


def _spaced(parts: Sequence[Text]) -> list[Text]:
    return [p._replace(content=" " * (i > 0) + p.content) for i, p in enumerate(parts)]


def _drawn_box(picture: Picture, k: int, mark: _Mark) -> str:
    box = picture.boxes[k]
    x, y, w, h = mark.x, mark.y, mark.width, mark.height
    frame = f'<rect x="{x - w / 2:.1f}" y="{y - h / 2:.1f}" width="{w:.1f}" height="{h:.1f}" rx="9"'
    if isinstance(box, Group):
        heading, table = in_closed(box, picture.own[k])
        parts = [f'{frame} fill="#eef2ff" stroke="#4f5b93"/>']
        line = y - h / 2 + 5
        for piece in heading:
            line += 13
            parts.append(_text(x, line, [piece], "middle"))
        for row in table:
            line += 13
            parts.append(_text(x - w / 2 + 8, line, _spaced(row[:2]), "start"))
            parts += [_text(x + w / 2 - 8, line, [last], "end") for last in row[2:]]
        return "".join(parts)
    symbol = symbol_of(box)
    colour = INK if any(n.differentiable for n in box.results) else GREY
    about_box = f"<title>{html.escape(tooltip(box))}</title>"
    size = symbol_size(symbol)
    if size is not None:
        shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="19" fill="white" stroke="{colour}"/>'
    else:
        size, shape = 12, f'{frame} fill="white" stroke="{colour}"/>'
    label = _text(x, y + size * 0.36, [Text(symbol, colour, size)], "middle")
    return f"<g>{about_box}{shape}{label}</g>"


def _edge(start: _Mark, end: _Mark, has_arrow: bool) -> str:
    x0, y0 = start.x, start.y + start.height / 2
    x1, y1 = end.x, end.y - end.height / 2
    arrow = ' marker-end="url(#arrow)"' if has_arrow else ""
    bend = min(40.0, max(6.0, abs(y1 - y0) / 3))
    curve = f"C{x0:.1f},{y0 + bend:.1f} {x1:.1f},{y1 - bend:.1f} {x1:.1f},{y1:.1f}"
    return f'<path d="M{x0:.1f},{y0:.1f}{curve}"{arrow} fill="none" stroke="{GREY}"/>'


def _document(size: tuple[float, float], body: list[str]) -> str:
    width, height = size
    return (
        f'<svg width="{width:.0f}pt" height="{height:.0f}pt" viewBox="0 0 {width:.0f} {height:.0f}"'
        ' xmlns="http://www.w3.org/2000/svg" font-family="Helvetica,Arial,Liberation Sans,'
        'sans-serif" xml:space="preserve"><defs><marker id="arrow" viewBox="0 0 6 6" refX="6"'
        ' refY="3" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0,0L6,3L0,6z" fill="{GREY}"/></marker></defs>'
        "<style>text{paint-order:stroke;stroke:white;stroke-width:3px}path{stroke-opacity:0.7}</style>"
        '<rect width="100%" height="100%" fill="white"/>' + "\n".join(body) + "</svg>\n"
    )
