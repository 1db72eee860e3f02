"""The stack that made an equation, or a warning, and which of its frames are the user's."""

from __future__ import annotations

import functools
import os
import re
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


def source_line(source_info) -> str:
    """`file.py:12 (function)`, the user's line that made an equation, or an empty string."""
    return line_of(next(user_frames(source_info), None))


def line_of(frame: Any) -> str:
    """`file.py:12 (function)` of a frame, or an empty string for None."""
    if frame is None:
        return ""
    return f"{os.path.basename(frame.file_name)}:{frame.line_num} ({frame.function_name})"


def user_frames(source_info, outermost: str = "") -> Iterator[Any]:
    """The frames of the stack that made an equation that are the user's, from the inside out.

    Not JAX's, not fnn's, and not those of installed packages, unless there are no others.

    outermost: the file to stop at.
    """
    traceback = source_info.traceback
    frames = []
    for frame in traceback.frames if traceback is not None else ():
        if frame.file_name == outermost:
            break
        if not frame.file_name.startswith(_LIBRARIES):
            frames.append(frame)
    own = [frame for frame in frames if not frame.file_name.startswith(_INSTALLED)]
    return iter(own or frames)


_LIBRARIES = (
    os.path.dirname(os.path.abspath(__file__)) + os.sep,
    os.path.dirname(os.path.abspath(jax.__file__)) + os.sep,
    "<frozen",
)
_INSTALLED = tuple(sysconfig.get_paths()[p] + os.sep for p in ("stdlib", "purelib", "platlib"))


class Frame(NamedTuple):
    """One of the user's functions on the stack that made an equation, and where it stood.

    instruction: the place in the code, in bytes.
    called: how it called what is inside: "directly"; through "vmap"; through an installed
        "package", or fnn's layers; or "otherwise", such as through jit or a derivative.
    """

    code: Any
    instruction: int
    called: str


class Stack(NamedTuple):
    """The stack that made an equation, from the inside out.

    frames: the user's.
    inside: those of JAX, fnn and other packages that the innermost of them called, as
        (code, instruction).
    reached: whether it goes down to the file that `stack` was to stop at.
    """

    frames: tuple[Frame, ...]
    inside: tuple[tuple[Any, int], ...]
    reached: bool


def stack(source_info, outermost: str = "") -> Stack:
    """The stack, with the instructions, so that the source's expressions can be found.

    outermost: the file to stop at.
    """
    if source_info.traceback is None:
        return Stack((), (), False)
    frames: list[Frame] = []
    inside: list[tuple[Any, int]] = []
    between: list[Any] = []
    for code, instruction in zip(*source_info.traceback.raw_frames(), strict=True):
        if code.co_filename == outermost:
            return Stack(tuple(frames), tuple(inside), True)
        if _kind(code.co_filename) == "user":
            frames.append(Frame(code, instruction, _how_called(between)))
            between = []
        else:
            between.append(code)
            if not frames:
                inside.append((code, instruction))
    return Stack(tuple(frames), tuple(inside), False)


def _how_called(between: list) -> str:
    """How a function calls another, by the library's frames between them."""
    kinds = {_kind(code.co_filename) for code in between}
    if not kinds:
        return "directly"
    if kinds == {"package"}:
        return "package"
    if kinds == {"library"} and any(code.co_name == "vmap_f" for code in between):
        plain = all(not re.search("jit|grad|vjp|jvp|cache_miss", c.co_name) for c in between)
        return "vmap" if plain else "otherwise"
    return "otherwise"


@functools.lru_cache(maxsize=4096)
def _kind(file_name: str) -> str:
    """Whose code is in a file: the "user"'s, an installed "package"'s, or of JAX and fnn."""
    if file_name.startswith(os.path.join(_LIBRARIES[0], "layers")):
        return "package"
    if file_name.startswith(_LIBRARIES):
        return "library"
    return "package" if file_name.startswith(_INSTALLED) else "user"


def warn(message: str) -> None:
    """A RuntimeWarning that points to the user's line, however deep in fnn it was noticed."""
    files = [f.f_code.co_filename for f, _ in traceback.walk_stack(sys._getframe(1))]
    ours = max(i for i, file in enumerate(files) if file.startswith(_LIBRARIES[0]))
    # Where an installed package called, its line.
    level = next((i for i, file in enumerate(files) if _kind(file) == "user"), ours + 1)
    warnings.warn(message, RuntimeWarning, stacklevel=level + 2)


def is_of_library(jaxpr) -> bool:
    """Was it made from one of JAX's or fnn's own functions?"""
    return (jaxpr.debug_info.func_filename or "").startswith(_LIBRARIES)
