"""What the source calls a value: the `q` of `q = x + y`.

An equation of a jaxpr knows the stack that made it, and Python knows for each frame of it which
expression it was evaluating, from which column to which. So the source is parsed, the
expression found in it, and followed outwards: `x + y` is what `q = x + y` assigns; in
`scores = readout(W, E[s])` the rows `E[s]` are an argument only, and what `readout` returns is
`scores`.

A wrong name is worse than none. Where it isn't certain that the equation's result is the
expression's value, there is none: a function that returns something else than what it computed
last, an element of a list, a value inside `jax.grad`.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fnn.backprop.source import Source
from fnn.frames import Stack, stack
from fnn.jaxpr import Equation, Inlined, Program, inner_jaxprs, result_paths
from fnn.operation import operation_name

# They call what they are given, or gather what was made: their last operation isn't their value.
_GATHERING_FUNCTIONS = {*dir(builtins), "reduce"} - {"abs", "pow", "round", "sum"}
_GATHERING_METHODS = {"map", "reduce", "accumulate", "starmap", "tree_map", "leaves"}
_DERIVATIVES = re.compile(r"(value_and_)?grad(_f|_f_aux)?|_?vjp|_?jvp|linearize|jacfun|gradient.*")


class _Item(NamedTuple):
    """An equation, or a call of a jitted function taken as one."""

    name: str
    outs: tuple[int, ...]
    paths: tuple[str, ...]  # where in the returned tree each stands: "", "[0]", "['a']"
    ins: tuple[int, ...]
    stack: Stack
    key: tuple  # tells the places of two stacks apart


def names_in_source(flat: Program) -> dict[int, str]:
    """The variable that the source assigns a value to, for the values that have one."""
    finder = _Finder(flat)
    finder.level(0, len(flat.equations), flat.calls)
    return finder.names


class _Finder:
    def __init__(self, flat: Program):
        self.flat = flat
        self.names: dict[int, str] = {}
        self.source = Source()
        self.readers: dict[int, list[int]] = {}  # the equations that read each value
        for k, equation in enumerate(flat.equations):
            for place in equation.ins:
                self.readers.setdefault(place, []).append(k)
        self.returned = set(flat.outputs)

    def level(self, start: int, stop: int, calls: Sequence[Inlined]) -> None:
        """Name what one function's equations made; first what's inside the functions it calls."""
        for call in calls:
            if not call.is_library:
                self.level(call.start, call.stop, call.calls)
        items, spans = [], []
        for item, first, after in self._items(start, stop, calls):
            items.append(item)
            spans.append((first, after))
        k = 0
        while k < len(items):
            end = k + 1
            while end < len(items) and items[end].key == items[k].key:
                end += 1
            if items[k].stack.frames:
                self._block(items, spans, k, end)
            k = end

    def _items(self, start, stop, calls) -> Iterator[tuple[_Item, int, int]]:
        place = start
        for call in [*calls, None]:
            for k in range(place, stop if call is None else call.start):
                e = self.flat.equations[k]
                if any("jvp(" in name or "transpose(" in name for name in e.scope):
                    yield _Item("", (), (), (), Stack((), (), False), ("derivative", k)), k, k + 1
                    continue
                paths = _paths(e)
                made = e.outs if len(e.outs) == len(paths) else ()
                yield self._item(operation_name(e), made, paths, e.ins, e.source_info), k, k + 1
            if call is not None:
                inside = {i for e in self.flat.equations[call.start : call.stop] for i in e.outs}
                found = [(i, p) for i, p in zip(call.outs, call.paths, strict=False) if i in inside]
                outs, paths = tuple(zip(*found, strict=True)) if found else ((), ())
                yield (
                    self._item(call.name, outs, paths, (), call.source_info),
                    call.start,
                    call.stop,
                )
                place = call.stop

    def _item(self, name, outs, paths, ins, source_info) -> _Item:
        where = stack(source_info)
        key = tuple((id(f.code), f.instruction) for f in where.frames)
        return _Item(name, tuple(outs), tuple(paths), tuple(ins), where, key)

    def _block(self, items, spans, start, end) -> None:
        """Equations that one expression made, one after the other (or a loop, again and again)."""
        innermost = items[start].stack.frames[0]
        node = self.source.expression(innermost)
        if node is None:
            return
        called = _terminal(node)
        if isinstance(node, ast.Call) and any(
            _DERIVATIVES.fullmatch(code.co_name) for code, _ in items[start].stack.inside
        ):
            return
        if isinstance(node, ast.Call):
            parts = [(start, end)]
        else:  # an operator has no loop inside: where its first operation recurs, it began anew
            first = items[start].stack.inside
            begins = [k for k in range(start, end) if items[k].stack.inside == first]
            parts = list(zip(begins, [*begins[1:], end], strict=True))
        for begin, after in parts:
            for k in range(begin, after):
                item = items[k]
                alike = isinstance(node, ast.Call) and called == item.name
                sole = k == after - 1 and self._is_sole(items, spans, begin, after)
                if not alike and (not sole or _gathers(node)):
                    continue
                for place, path in zip(item.outs, item.paths, strict=False):
                    name = self._follow(items, k, node, path)
                    if name and name != "_":
                        self.names.setdefault(place, name)

    def _is_sole(self, items, spans, begin, after) -> bool:
        """Is nothing that the part made, but its last result, used elsewhere?"""
        low, high = spans[begin][0], spans[after - 1][1]
        kept = set(items[after - 1].outs)
        for e in self.flat.equations[low:high]:
            for place in e.outs:
                if place in kept:
                    continue
                readers = self.readers.get(place, ())
                if place in self.returned or any(not low <= k < high for k in readers):
                    return False
        return True

    def _follow(self, items, k, node, path: str) -> str:
        """From an expression outwards to the name that its value is assigned to, or "".

        path: which part of the expression's value is meant: "" all of it, "[0]" its first.
        """
        frames = items[k].stack.frames
        depth = 0
        while True:
            parent = getattr(node, "parent", None)
            if isinstance(node, ast.AugAssign):
                return _matched(node.target, path)
            if isinstance(parent, ast.NamedExpr) and node is parent.value:
                return _matched(parent.target, path)
            if isinstance(parent, ast.IfExp) and node is not parent.test:
                node = parent
                continue
            if isinstance(parent, (ast.Tuple, ast.List)):
                if any(isinstance(e, ast.Starred) for e in parent.elts):
                    return ""
                path = f"[{parent.elts.index(node)}]{path}"
                node = parent
                continue
            if isinstance(parent, ast.Assign):
                return next(filter(None, (_matched(t, path) for t in parent.targets)), "")
            if isinstance(parent, ast.AnnAssign) and node is parent.value:
                return _matched(parent.target, path)
            is_lambda = isinstance(parent, ast.Lambda) and node is parent.body
            if not (isinstance(parent, ast.Return) or is_lambda):
                return ""
            callee = frames[depth].code
            if callee.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE):
                return ""
            depth += 1
            if depth == len(frames):
                return ""
            node = self.source.expression(frames[depth])
            if node is None or not self._returns_to(items, k, depth, callee, node):
                return ""

    def _returns_to(self, items, k, depth, callee, node) -> bool:
        """Is the value of the call `node` what the function `callee` returned?"""
        frames = items[k].stack.frames
        called = _terminal(node)
        if frames[depth].called == "directly" and called in (callee.co_name, None):
            return True
        if callee.co_name == "__call__" and not _gathers(node):
            return frames[depth].called in ("directly", "package") or self._is_last(items, k, depth)
        if frames[depth].called == "otherwise" or _gathers(node):
            return False
        return self._is_last(items, k, depth)

    def _is_last(self, items, k, depth) -> bool:
        """Isn't the next equation made by the same call?"""
        return (
            k + 1 == len(items)
            or items[k + 1].key[-len(items[k].key) + depth :] != (items[k].key[depth:])
        )


def _paths(equation: Equation) -> tuple[str, ...]:
    """Where in what the operation returned each of its results stands."""
    if len(equation.outs) == 1 and equation.name not in _WITH_BODY:
        return ("",)
    if equation.name not in _WITH_BODY:
        return ()
    bodies = list(inner_jaxprs(equation).values())
    found = {result_paths(body) for body in bodies if len(body.out_avals) == len(equation.outs)}
    return found.pop() if len(found) == 1 else ()


_WITH_BODY = ("scan", "while", "cond", "checkpoint", "remat2")


def _terminal(node) -> str | None:
    """The name that a call calls: f of f(x), of m.f(x); "" where it has none, as in f(x)(y)."""
    if not isinstance(node, ast.Call):
        return None
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _gathers(node) -> bool:
    """Does it call a function that may return something else than it computed last?"""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in _GATHERING_METHODS
    return _terminal(node) in _GATHERING_FUNCTIONS


def _matched(target, path: str) -> str:
    """The name in an assignment's target that stands at the path."""
    if not path:
        return target.id if isinstance(target, ast.Name) else ""
    found = re.match(r"\[(\d+)\]", path)
    if found is None or not isinstance(target, (ast.Tuple, ast.List)):
        return ""
    index = int(found[1])
    if index >= len(target.elts) or any(isinstance(e, ast.Starred) for e in target.elts):
        return ""
    return _matched(target.elts[index], path[found.end() :])
