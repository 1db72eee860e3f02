"""A picture as an SVG, and the file that it is written to."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Any

from fnn import arguments
from fnn.backprop import graphviz, rows
from fnn.backprop.picture import Picture


def svg(picture: Picture) -> str:
    """The picture as SVG: drawn by Graphviz, or in rows if it is too large for that."""
    return rows.svg(picture) if picture.effort > graphviz.LARGE else graphviz.svg(picture)


def checked_path(path: Any) -> str:
    """Where the picture goes; wrong paths are told before anything is drawn."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(f"graph.to_svg: path must be a path, but got {arguments.show(path)}.")
    target = os.fspath(path)
    if os.path.splitext(target)[1].lower() != ".svg":
        raise ValueError(f"graph.to_svg: path must end in .svg, but got {target!r}.")
    if os.path.isdir(target):
        raise IsADirectoryError(f"graph.to_svg: path is a folder: {target!r}.")
    folder = os.path.dirname(target) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"graph.to_svg: path must lie in a folder that exists, but there is no {folder!r}."
        )
    return target


def write(path: str, content: str) -> None:
    """Write a file whole, or leave what was there."""
    path = os.path.realpath(path)  # a link stays a link
    handle, temporary = tempfile.mkstemp(
        dir=os.path.dirname(path), prefix=os.path.basename(path), suffix=".part"
    )
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(content)
        if os.path.exists(path):
            shutil.copymode(path, temporary)
        else:
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
