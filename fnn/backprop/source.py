"""The stack that made an equation: the user's calls, and the expressions that they evaluated.

Python notes for each instruction from which line and column to which its expression goes; the
file is parsed, and the expression at that place looked up.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Callable
from typing import Any

from fnn.frames import Frame, stack, user_frames
from fnn.jaxpr import Equation


def call_user(fun: Callable, args: tuple, kwargs: dict) -> Any:
    """Call the user's function; the stack of what it computes is read down to this frame."""
    return fun(*args, **kwargs)


def user_calls(equation: Equation) -> tuple[tuple[str, str, int], ...]:
    """The user's stack, outermost first: (function, file, line)."""
    frames = list(user_frames(equation.source_info, outermost=__file__))
    traceback = equation.source_info.traceback
    if traceback is None or all(f.file_name != __file__ for f in traceback.frames):
        frames = frames[:1]  # a jitted function that was traced before, somewhere else
    return tuple((f.function_name, f.file_name, f.line_num) for f in reversed(frames))


def frames_of(equation: Equation) -> tuple[Frame, ...]:
    """The user's frames, innermost first."""
    found = stack(equation.source_info, outermost=__file__)
    return found.frames if found.reached else found.frames[:1]


class Source:
    """Looks up expressions; remembers where the instructions of each function stand."""

    def __init__(self) -> None:
        self._positions: dict[int, tuple[Any, list]] = {}

    def expression(self, frame: Frame) -> ast.expr | ast.AugAssign | None:
        """What the frame was evaluating; None where that can't be known.

        The node has an attribute `parent`, and so have all around it.
        """
        code = frame.code
        if id(code) not in self._positions:
            self._positions[id(code)] = (code, list(code.co_positions()))
        place = self._positions[id(code)][1][frame.instruction // 2]
        lines = linecache.getlines(code.co_filename)
        if None in place or not lines:
            return None
        node = _expressions("".join(lines)).get(place)
        # A file that was changed after it was imported has something else there.
        is_here = node is not None and _function_around(node) in (_function(code), None)
        return node if is_here else None

    def is_in_loop(self, frame: Frame) -> bool:
        """May the function evaluate this expression several times in one call?"""
        node: Any = self.expression(frame)
        if node is None:
            return True
        while (around := getattr(node, "parent", None)) is not None:
            if isinstance(around, (ast.For, ast.AsyncFor)) and node is not around.iter:
                return True
            if isinstance(around, (ast.While, *_COMPREHENSIONS)):
                return True
            if isinstance(around, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                return False
            node = around
        return False


_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@functools.lru_cache(maxsize=32)
def _expressions(source: str) -> dict[tuple, Any]:
    """The expressions of a file, by (first line, last line, first column, last column).

    These are the places that Python notes for the instructions of each. Every node gets its
    parent.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return {}
    found: dict[tuple, Any] = {}
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
        if isinstance(node, (ast.expr, ast.AugAssign)):
            place = (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset)
            found[place] = node
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                # x.sum() over several lines: noted is only the part from `sum` on.
                name = node.func
                start = (name.end_col_offset or 0) - len(name.attr.encode())
                found.setdefault(
                    (name.end_lineno, node.end_lineno, start, node.end_col_offset), node
                )
    return found


def _function_around(node) -> tuple[str, int] | None:
    """The function around a node, by name and first line; None in a comprehension."""
    while True:
        inside, node = node, getattr(node, "parent", None)
        if node is None:
            return "<module>", 1
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and inside in node.body:
            first = node.decorator_list[0].lineno if node.decorator_list else node.lineno
            return node.name, first
        if isinstance(node, ast.Lambda) and inside is node.body:
            return "<lambda>", node.lineno
        if isinstance(node, _COMPREHENSIONS):
            return None


def _function(code) -> tuple[str, int]:
    """What `_function_around` calls a code object's function."""
    return code.co_name, 1 if code.co_name == "<module>" else code.co_firstlineno
