"""Parameters by path: `{"blocks.0.attend.q.W": ...}`, and their files.

flatten, unflatten      a tree of parameters as a flat dict by path, and back
choose                  the paths that a pattern, or a function of path and leaf, chooses
save, load              a tree of parameters as a safetensors file, and back

A path is made of the keys on the way to a leaf, with a dot between them: of a dict its keys, of
a tuple or list its indices, of a dataclass or namedtuple its field names. So the names are those
that PyTorch's state dicts have. Any pytree of arrays has paths, that of another library too.
"""

from __future__ import annotations

import fnmatch
import os
import secrets
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments


class PathError(ValueError):
    """The paths of a flat dict aren't those of the tree that is wanted, or a shape differs.

    Attributes:
        missing: the paths that are wanted and aren't there.
        unexpected: the paths that are there and aren't wanted.
        different: a path -> (the wanted type, the type it has), as text: "float32[3,4]".
    """

    def __init__(
        self,
        where: str,
        missing: tuple[str, ...],
        unexpected: tuple[str, ...],
        different: Mapping[str, tuple[str, str]],
    ):
        self.where, self.missing, self.unexpected = where, missing, unexpected
        self.different = dict(different)
        lines = []
        if missing:
            lines.append(f"missing: {_listed(missing)}")
        if unexpected:
            lines.append(f"not wanted: {_listed(unexpected)}")
        shown = [f"{path} is {got}, wanted {want}" for path, (want, got) in different.items()]
        if shown:
            lines.append(_listed(shown, separator="; "))
        super().__init__(f"{where}: the parameters don't fit. " + ". ".join(lines) + ".")

    def __reduce__(self):
        return type(self), (self.where, self.missing, self.unexpected, self.different)


def flatten(params: Any) -> dict[str, Any]:
    """The leaves of a tree by path, in the order of the tree.

    Args:
        params: any pytree: nested dicts, lists, tuples, dataclasses that JAX knows, of arrays.
            Empty dicts and None have no leaves, and leave no trace.

    Returns:
        A dict: "encoder.hidden.W" -> the leaf, as it is. A leaf by itself has the path "".

    Raises:
        ValueError: a key holds a dot, so that its path would be read as two keys; or two leaves
            have one path; or JAX can't sort a dict's keys, as those of {1: x, "1": y}.

    >>> flatten({"blocks": [{"W": 1.0}, {"W": 2.0}], "bias": 3.0})
    {'bias': 3.0, 'blocks.0.W': 1.0, 'blocks.1.W': 2.0}
    """
    return _flat("flatten", params)


def _flat(where: str, params: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
        dotted = [name for name in names if "." in name]
        if dotted:
            raise ValueError(
                f"{where}: the key {dotted[0]!r} holds a dot, which stands between the keys of a "
                "path."
            )
        path = ".".join(names)
        if path in flat:
            raise ValueError(f"{where}: two leaves have the path {path!r}.")
        flat[path] = leaf
    return flat


Where = str | Sequence[str] | Callable[[str, Any], bool]


def choose(where: Where, params: Any, op: str = "choose", name: str = "where") -> tuple[str, ...]:
    """The paths of those leaves that are asked for.

    Args:
        where: a pattern of paths such as "*.q.W" ("*" stands for anything), or several of them, or
            a function (path, leaf) of those that are asked for.
        params: a tree, as for `flatten`.
        op, name: what the function and the argument are called in errors.

    Returns:
        The paths, in the order of the tree.

    Raises:
        TypeError: where is neither.
        ValueError: nothing is chosen; the message names the paths that there are.

    >>> choose("blocks.*.W", {"blocks": [{"W": 1.0, "b": 2.0}, {"W": 3.0}], "W": 4.0})
    ('blocks.0.W', 'blocks.1.W')
    """
    check_where(where, op, name)
    flat = flatten(params)
    if callable(where):
        chosen = [path for path, leaf in flat.items() if where(path, leaf)]
    else:
        patterns = [where] if isinstance(where, str) else where
        matches = lambda path: any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
        chosen = list(filter(matches, flat))
    if not chosen:
        there = f"Their paths are {', '.join(flat)}." if flat else "There are none."
        raise ValueError(f"{op}: {name} chooses none of the parameters. {there}")
    return tuple(chosen)


def check_where(where: Any, op: str, name: str) -> None:
    """Raise a TypeError unless it can choose among paths; see `choose`."""
    patterns = [where] if isinstance(where, str) else where
    is_list = isinstance(patterns, Sequence) and all(isinstance(p, str) for p in patterns)
    if not callable(where) and not is_list:
        raise TypeError(
            f"{op}: {name} must be a pattern of paths such as '*.q.W', several of them, or a "
            f"function (path, array), but got {arguments.show(where)}."
        )


def unflatten(flat: Mapping[str, Any], like: Any = None, *, strict: bool = True) -> Any:
    """The tree that `flatten` took apart.

    Args:
        flat: the leaves by path.
        like: a tree of arrays (or of `jax.ShapeDtypeStruct`s) of the wanted structure, shapes and
            dtypes. Without it the result is made of dicts alone, and the leaves stay as they are.
        strict: whether flat must hold the paths of `like`, no more and no less. Otherwise what is
            missing is taken from `like`, and what isn't wanted is left out.

    Returns:
        The tree. With `like`, a floating leaf of another floating dtype is cast; other dtypes
        must agree.

    Raises:
        TypeError: flat is no dict by path.
        PathError: paths are missing or not wanted (if strict), or a shape or dtype isn't that of
            `like`. The message names them.
        ValueError: without `like`, one path goes on where another ends: "a" and "a.b".

    >>> unflatten({"blocks.0.W": 1.0, "bias": 3.0})
    {'bias': 3.0, 'blocks': {'0': {'W': 1.0}}}
    """
    if not isinstance(flat, Mapping) or not all(isinstance(path, str) for path in flat):
        raise TypeError(
            f"unflatten: flat must be a dict from paths to arrays, but got {arguments.show(flat)}."
        )
    arguments.flag("unflatten", "strict", strict)
    return _nested("unflatten", flat) if like is None else _as(like, flat, strict, "unflatten")


def save(path: str | os.PathLike, params: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Write a tree of parameters to a safetensors file, by path.

    The file appears whole or not at all: a save that fails leaves an older file as it was.

    Args:
        path: of the file, "model.safetensors".
        params: a tree of arrays (see `flatten`).
        metadata: text to keep with them, such as a configuration as JSON.

    Raises:
        ImportError: safetensors isn't installed.
        TypeError: a leaf is no array of numbers (a PRNG key: save `jax.random.key_data(key)`), or
            of a dtype that the format doesn't know; metadata isn't a dict of strings; path is no
            path.
        ValueError: a key holds a dot, or two leaves have one path (see `flatten`).
        IsADirectoryError: path is that of a folder.
        OSError: the file can't be written.
    """
    safetensors = _safetensors("fnn.params.save")
    flat = {name: _for_file(name, leaf) for name, leaf in _flat("save", params).items()}
    if metadata is not None:
        is_text = isinstance(metadata, Mapping) and all(
            isinstance(text, str) for item in metadata.items() for text in item
        )
        if not is_text:
            raise TypeError(
                f"save: metadata must be a dict of strings, but got {arguments.show(metadata)}."
            )
        metadata = dict(metadata)
    path = Path(_path_of_file("save", path))
    if path.is_dir():
        raise IsADirectoryError(f"save: {path} is a folder, and not a file to write to.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save: there is no folder {path.parent}, for the file {path}.")
    # Beside the file, and put in its place when it is whole. Who may read it is what is usual: a
    # file of `tempfile`, and of safetensors 0.8, could be read by its owner alone.
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        safetensors.numpy.save_file(flat, beside, metadata)
        beside.chmod(stat.S_IMODE(mode))
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike, like: Any = None, *, strict: bool = True) -> Any:
    """Read a tree of parameters from a safetensors file.

    Args:
        path: of the file.
        like: a tree of the wanted structure, shapes and dtypes, as for `unflatten`: what
            `net.init(key, x)` makes, or `jax.eval_shape(net.init, key, x)`, which makes nothing.
            Without it the result is nested dicts of numpy arrays of the file's dtypes.
        strict: as in `unflatten`.

    Returns:
        The tree; with `like` its leaves are `jax.Array`s.

    Raises:
        ImportError: safetensors isn't installed.
        TypeError: path is no path.
        FileNotFoundError: there is no such file.
        ValueError: it isn't a safetensors file, or it is cut short; or, without `like`, one path
            goes on where another ends.
        PathError: it doesn't hold the parameters that `like` wants.
    """
    where = f"load {os.fspath(_path_of_file('load', path))}"
    arguments.flag("load", "strict", strict)
    flat = read(path)
    return _nested(where, flat) if like is None else _as(like, flat, strict, where)


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by path, as numpy arrays.

    Raises:
        ImportError, TypeError, FileNotFoundError, ValueError: as `load`.
    """
    safetensors = _safetensors("fnn.params.load")
    _path_of_file("load", path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"load: there is no file {os.fspath(path)}.")
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, AttributeError) as error:  # or a dtype numpy hasn't
        raise ValueError(
            f"load: {os.fspath(path)} can't be read as a safetensors file: {error}."
        ) from None


# What numpy (with ml_dtypes) and the format both have.
DTYPES = frozenset(map(np.dtype, ["?", *"bhilqBHILQefdF"])) | {np.dtype(jnp.bfloat16)}


def _for_file(path: str, leaf: Any) -> np.ndarray:
    """A leaf as the format takes it: contiguous, and of a dtype that it knows."""
    dtype = getattr(leaf, "dtype", np.result_type(type(leaf)) if np.isscalar(leaf) else None)
    if dtype not in DTYPES or isinstance(leaf, jax.ShapeDtypeStruct):
        key = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
        hint = " Save jax.random.key_data(key) in its place." if key else ""
        raise TypeError(
            f"save: {path or 'the tree'} must be an array of a dtype that safetensors knows, but "
            f"is {arguments.show(leaf)}.{hint}"
        )
    return np.ascontiguousarray(leaf).reshape(np.shape(leaf))


def _path_of_file(where: str, path: Any) -> str | os.PathLike:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise TypeError(f"{where}: path must be that of a file, but got {arguments.show(path)}.")
    return path


def _safetensors(what: str) -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise arguments.missing(what, "safetensors") from error
    return safetensors


def _nested(where: str, flat: Mapping[str, Any]) -> Any:
    """Nested dicts by the keys of the paths."""
    if "" in flat and len(flat) == 1:
        return flat[""]
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *keys, last = path.split(".")
        place: Any = root
        for key in keys:
            place = place.setdefault(key, {})
            if isinstance(place, _Leaf):
                break
        if isinstance(place, _Leaf) or last in place:
            raise ValueError(f"{where}: one path ends where another goes on: {path!r}.")
        place[last] = _Leaf(leaf)
    return jax.tree.map(lambda leaf: leaf.value, root)


class _Leaf:
    """A leaf, which may be a dict itself."""

    def __init__(self, value: Any):
        self.value = value


def _as(like: Any, flat: Mapping[str, Any], strict: bool, where: str) -> Any:
    """The tree like another one, of the leaves by path."""
    wanted = flatten(like)
    missing = tuple(path for path in wanted if path not in flat)
    unexpected = tuple(path for path in flat if path not in wanted)
    for own in (wanted, flat):
        for path in wanted:
            if path in own:
                arguments.array(where.split()[0], path or "the tree", own[path])
    if not strict:
        unexpected = ()
        missing = tuple(p for p in missing if isinstance(wanted[p], jax.ShapeDtypeStruct))
    different = {
        path: (_type(leaf), _type(flat[path]))
        for path, leaf in wanted.items()
        if path in flat and not _fits(flat[path], leaf)
    }
    if missing or unexpected or different:
        raise PathError(where, missing, unexpected, different)
    leaves = [
        jnp.asarray(flat[path], dtype=jnp.result_type(leaf)) if path in flat else leaf
        for path, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _fits(leaf: Any, wanted: Any) -> bool:
    kind, other = jnp.result_type(leaf), jnp.result_type(wanted)
    both_floating = all(jnp.issubdtype(k, jnp.floating) for k in (kind, other))
    return jnp.shape(leaf) == jnp.shape(wanted) and (kind == other or both_floating)


def _type(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}[{','.join(map(str, jnp.shape(leaf)))}]"


def _listed(items: Any, most: int = 8, separator: str = ", ") -> str:
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more
