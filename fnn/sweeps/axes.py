"""The axes of a sweep: names and values, the members of the grid, and groups of them."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import keyword
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments

# The names of a loss's own arguments.
TAKEN = ("params", "example", "key", "mode", "state")
# What stands beside the hyperparameters in `SweepResult.rows` and `diverged`.
COLUMNS = ("epoch", "epochs")


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the grid: a hyperparameter, or several that change together.

    Fields:
        names: of its hyperparameters.
        values: for each of them, its value at each place along the axis.
    """

    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]

    @property
    def size(self) -> int:
        return len(self.values[0])

    @property
    def label(self) -> str:
        """Its names as one text."""
        return ", ".join(self.names)


@dataclasses.dataclass(frozen=True)
class Group:
    """Members whose static hyperparameters are the same: one program trains them.

    Fields:
        static: those hyperparameters.
        members: the members' numbers.
        numeric: the other hyperparameters, an array each with an entry for each member.
    """

    static: dict[str, Any]
    members: tuple[int, ...]
    numeric: dict[str, np.ndarray]


class Axes:
    """The grid of a sweep; its members are numbered in the order of the axes, the last fastest."""

    def __init__(self, where: str, axes: Any, static: Any = ()):
        """Read what a caller passed.

        Raises:
            TypeError: the axes are no dict, an axis no sequence.
            ValueError: an axis is empty, or doesn't fit its names; a number is nan, or too large
                for its dtype; a place stands twice on an axis.
        """
        if not isinstance(axes, Mapping):
            raise TypeError(
                f"{where}: axes must be a dict from names to values, such as "
                f"{{'seed': range(8), 'learning_rate': [1e-3, 1e-2]}}, but got "
                f"{arguments.show(axes)}."
            )
        if not axes:
            raise ValueError(f"{where}: axes is empty: there is nothing to sweep over.")
        self.all = tuple(_axis(where, names, values) for names, values in axes.items())
        names = [name for axis in self.all for name in axis.names]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(f"{where}: the axes name {repeated!r} more than once.")
        self.names = tuple(names)
        self.static = _static(where, static, self)
        for axis in self.all:
            for name, values in zip(axis.names, axis.values, strict=True):
                _check_numbers(where, name, values, name in self.static)

    @property
    def shape(self) -> tuple[int, ...]:
        """How many places each axis has."""
        return tuple(axis.size for axis in self.all)

    @property
    def size(self) -> int:
        """How many members there are."""
        return math.prod(self.shape)

    @property
    def numeric(self) -> tuple[str, ...]:
        """The hyperparameters that one program takes as arrays."""
        return tuple(name for name in self.names if name not in self.static)

    def values(self, name: str) -> tuple[Any, ...]:
        """A hyperparameter's values along its axis."""
        axis = self.axis(name)
        return axis.values[axis.names.index(name)]

    def axis(self, name: str) -> Axis:
        """The axis that a hyperparameter lies on."""
        return next(axis for axis in self.all if name in axis.names)

    def number(self, name: str) -> int:
        """The place of that axis among the axes."""
        return self.all.index(self.axis(name))

    def of(self, member: int) -> dict[str, Any]:
        """A member's hyperparameters."""
        found = {}
        for axis, i in zip(self.all, np.unravel_index(member, self.shape), strict=True):
            found.update({n: v[int(i)] for n, v in zip(axis.names, axis.values, strict=True)})
        return found

    def groups(self) -> list[Group]:
        """The members by their static hyperparameters."""
        found: list[tuple[list[Any], list[int]]] = []
        for member in range(self.size):
            own = self.of(member)
            static = [own[name] for name in self.static]
            same = (ms for values, ms in found if all(map(_exact, values, static)))
            members = next(same, None)
            if members is None:
                found.append((static, [member]))
            else:
                members.append(member)
        return [
            Group(
                dict(zip(self.static, static, strict=True)),
                tuple(members),
                {n: self._array(n, members) for n in self.numeric},
            )
            for static, members in found
        ]

    def _array(self, name: str, members: Sequence[int]) -> np.ndarray:
        values = [self.of(member)[name] for member in members]
        whole = all(map(is_integer, self.values(name)))
        return np.asarray(values, int if whole else float)

    def find(self, where: str, wanted: Mapping[str, Any]) -> list[int]:
        """The members whose hyperparameters are these; numbers may be off by a rounding.

        (Where one is exactly the number, those beside it aren't meant.)

        Raises:
            ValueError: there is no such hyperparameter, no such value of it, or no member that has
                these values together.
        """
        for name, value in wanted.items():
            if name not in self.names:
                raise ValueError(
                    f"{where}: there is no axis {name!r}; there are {', '.join(self.names)}."
                )
            if not any(_same(v, value) for v in self.values(name)):
                raise ValueError(
                    f"{where}: no member has {name} = {show(value)}; there are "
                    f"{listed(self.values(name))}."
                )
        same = {n: _exact if _is_on(self.values(n), v) else _same for n, v in wanted.items()}
        found = []
        for member in range(self.size):
            own = self.of(member)
            if all(same[name](own[name], value) for name, value in wanted.items()):
                found.append(member)
        if not found:
            raise ValueError(
                f"{where}: no network has {described(wanted)} together. (Hyperparameters of one "
                "axis change together.)"
            )
        return found


def _axis(where: str, names: Any, values: Any) -> Axis:
    together = names if isinstance(names, tuple) else (names,)
    for name in together:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise TypeError(
                f"{where}: an axis is named by a hyperparameter, or by a tuple of those that "
                f"change together, but got {arguments.show(names)}."
            )
        if name in TAKEN:
            raise ValueError(
                f"{where}: an axis can't be named {name!r}, which is an argument of a loss."
            )
        if name in COLUMNS:
            raise ValueError(
                f"{where}: an axis can't be named {name!r}: a SweepResult calls the epochs of a "
                "network so."
            )
    if not together:
        raise ValueError(f"{where}: an axis has an empty tuple for its names.")
    if not isinstance(names, tuple):
        column = _values(where, repr(names), values)
        _check_once(where, names, column)
        return Axis(together, (column,))
    if not isinstance(values, (tuple, list)) or len(values) != len(together):
        got = f"{len(values)} of them" if isinstance(values, (tuple, list)) else "none"
        raise ValueError(
            f"{where}: the axis {names} needs a sequence of values for each of its {len(names)} "
            f"hyperparameters, but got {got}."
        )
    columns = tuple(_values(where, repr(n), v) for n, v in zip(names, values, strict=True))
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        has = ", ".join(f"{n} has {k}" for n, k in zip(names, lengths, strict=True))
        raise ValueError(
            f"{where}: the hyperparameters of one axis change together, but differ in length: "
            f"{has}."
        )
    _check_once(where, names, list(zip(*columns, strict=True)))
    return Axis(together, columns)


def _values(where: str, name: str, values: Any) -> tuple[Any, ...]:
    wanted = f"{where}: the axis {name} must be a sequence of values"
    if isinstance(values, (str, bytes, set, frozenset, Mapping)):
        raise TypeError(f"{wanted}, such as a list, but got {arguments.show(values)}.")
    if hasattr(values, "shape") and hasattr(values, "dtype"):
        if np.ndim(values) != 1:
            raise ValueError(f"{wanted}, but got {arguments.show(values)}.")
        values = np.asarray(values).tolist()
    if not isinstance(values, Iterable):
        raise TypeError(f"{wanted}, but got {arguments.show(values)}.")
    found = tuple(_plain(value) for value in values)
    if not found:
        raise ValueError(f"{where}: the axis {name} is empty.")
    return found


def _check_once(where: str, names: str | tuple[str, ...], values: Sequence[Any]) -> None:
    """Raise where a value stands twice on an axis: its members couldn't be told apart."""
    if all(map(is_number, values)):
        twice = [v for v, n in collections.Counter(values).items() if n > 1]
    else:
        twice = [v for i, v in enumerate(values) if _is_on(values[:i], v)]
    if twice:
        shown = twice[0] if isinstance(names, tuple) else (twice[0],)
        text = ", ".join(map(show, shown))
        raise ValueError(f"{where}: the axis {names!r} holds {text} twice.")


def _plain(value: Any) -> Any:
    """A number of numpy's or JAX's as Python's."""
    is_scalar = isinstance(value, (np.generic, np.ndarray, jax.Array)) and np.ndim(value) == 0
    return np.asarray(value).item() if is_scalar else value


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _static(where: str, static: Any, axes: Axes) -> tuple[str, ...]:
    wanted = (static,) if isinstance(static, str) else static
    if not isinstance(wanted, (tuple, list)) or not all(isinstance(n, str) for n in wanted):
        raise TypeError(
            f"{where}: static must be the name of a hyperparameter, or a tuple of names, but got "
            f"{arguments.show(static)}."
        )
    for name in wanted:
        if name not in axes.names:
            raise ValueError(
                f"{where}: static names {name!r}, which is no axis; there are "
                f"{', '.join(axes.names)}."
            )
    by_kind = (n for n in axes.names if not all(map(is_number, axes.values(n))))
    chosen = {*wanted, *by_kind}
    return tuple(name for name in axes.names if name in chosen or name == "batch_size")


def _check_numbers(where: str, name: str, values: Sequence[Any], static: bool) -> None:
    """Raise where a number is nan, or is to be an array and doesn't fit. (inf may be meant.)"""
    if any(isinstance(v, float) and math.isnan(v) for v in values):
        raise ValueError(f"{where}: the axis {name!r} holds nan.")
    if static:
        return
    whole = all(map(is_integer, values))
    dtype = jax.dtypes.canonicalize_dtype(np.int64 if whole else np.float64)
    limits: Any = jnp.iinfo(dtype) if whole else jnp.finfo(dtype)
    least, most = (np.asarray(x).item() for x in (limits.min, limits.max))
    for v in values:
        if not least <= v <= most and v not in (math.inf, -math.inf):
            raise ValueError(
                f"{where}: the axis {name!r} holds {show(v)}, which {dtype} can't hold."
            )


def _is_on(values: Sequence[Any], value: Any) -> bool:
    """Whether one of the values is this one."""
    return any(_exact(v, value) for v in values)


def _same(a: Any, b: Any) -> bool:
    """Whether it is the same value, of numbers to a rounding."""
    b = _plain(b)
    if is_number(a) and is_number(b) and not (is_integer(a) and is_integer(b)):
        return math.isclose(a, b, rel_tol=1e-6)
    return _exact(a, b)


def _exact(a: Any, b: Any) -> bool:
    b = _plain(b)
    if is_number(a) and is_number(b):
        return a == b
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(map(_exact, a, b))
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # arrays, for one, whose equality is an array
        return False


def show(value: Any) -> str:
    """A hyperparameter's value, short: numbers with four digits, functions by their names."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if callable(value) and not isinstance(value, type):
        text = getattr(value, "name", None) or arguments.name_of(value)
        return text if isinstance(text, str) else arguments.name_of(value)
    text = str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."


def listed(values: Sequence[Any], most: int = 8) -> str:
    """A few values, and how many more there are."""
    shown = ", ".join(show(v) for v in itertools.islice(values, most))
    return shown if len(values) <= most else f"{shown}, ... ({len(values)} in all)"


def told(static: Mapping[str, Any]) -> str:
    """Static hyperparameters, and what is said of those that could have been meant as numbers."""
    odd = {n: v for n, v in static.items() if not is_number(v) and not callable(v)}
    shown = ", ".join(f"{name} is {arguments.show(value)}" for name, value in odd.items())
    what = f" ({shown}: what is no number is given to the functions as it is)" if odd else ""
    return described(static) + what


def described(hyperparameters: Mapping[str, Any]) -> str:
    """`seed 3, learning_rate 0.01`."""
    return ", ".join(f"{name} {show(value)}" for name, value in hyperparameters.items())
