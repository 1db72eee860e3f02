"""Data as batches: arrays that are shuffled and cut, or batches that come from outside."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import jax
import numpy as np

from fnn.train.bad_input import batch_size as size_of
from fnn.train.conversion import as_arrays


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A tree of arrays with the examples along their first axes.

    Every example comes once in an epoch. If their number isn't a multiple of the batch size,
    the last batch is smaller: one more shape to compile, and nothing is lost.
    """

    data: Any
    size: int
    batch_size: int
    shuffle: bool

    @property
    def steps(self) -> int:
        """The number of batches in an epoch."""
        return -(-self.size // self.batch_size)

    def epoch(self, key: Any) -> Iterator[Any]:
        """The batches of one epoch, in an order drawn from the key."""
        if self.shuffle:
            order = np.asarray(jax.random.permutation(key, self.size))
        else:
            order = np.arange(self.size)
        for start in range(0, self.size, self.batch_size):
            yield _take(self.data, order[start : start + self.batch_size])


@dataclasses.dataclass(frozen=True)
class Stream:
    """Batches from outside: an iterable, or a function that makes one for each epoch."""

    source: Any
    steps: int | None
    running: Iterator | None = None

    def epoch(self, key: Any) -> Iterator[Any]:
        """The batches of one epoch, converted from other libraries' arrays where need be."""
        batches: Any
        if self.running is not None:
            batches = self.running
        elif callable(self.source):
            batches = self.source(key) if _takes_an_argument(self.source) else self.source()
        else:
            batches = self.source
        for batch in itertools.islice(batches, self.steps):
            yield as_arrays(batch, "batch")


def batches_of(
    data: Any,
    *,
    batch_size: int | None,
    shuffle: bool,
    epochs: int,
    steps: int | None = None,
    name: str = "data",
) -> Arrays | Stream:
    """Decide what the data is: see `fnn.fit` for the rules.

    Raises:
        TypeError, ValueError: it is neither, is empty, or doesn't fit the other arguments.
    """
    if is_tree_of_arrays(data):
        data = as_arrays(data, name)
        size = size_of(data, name)
        if batch_size is None:
            batch_size = 128
        if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
        if steps is not None:
            raise ValueError(
                f"{name} is arrays, whose epoch is all of their {size} examples: steps_per_epoch "
                "is for iterables."
            )
        return Arrays(data, size, min(int(batch_size), size), shuffle)
    if not (callable(data) or isinstance(data, Iterable)) or isinstance(data, (str, bytes)):
        raise TypeError(
            f"{name} must be arrays, like (X, y), or an iterable of batches, or a function that "
            f"returns one, but got a {type(data).__name__}."
        )
    if batch_size is not None:
        raise ValueError(
            f"{name} is an iterable, which makes its own batches: batch_size is for arrays. "
            "(Arrays come in a tuple, (X, y), or a dict; a list is an iterable of batches.)"
        )
    if isinstance(data, list):
        _check_list(data, name)
    once = isinstance(data, Iterator)
    if once and epochs > 1 and steps is None:
        raise ValueError(
            f"{name} is an iterator ({type(data).__name__}): it would be used up after the first "
            f"of {epochs} epochs. Pass a list, a function that makes a new iterator for each "
            "epoch, or steps_per_epoch."
        )
    length = len(data) if isinstance(data, Sized) else None
    return Stream(data, length if steps is None else steps, data if once else None)


def is_tree_of_arrays(data: Any) -> bool:
    """Whether data is arrays, rather than an iterable of batches or a function that makes one."""
    if isinstance(data, (tuple, dict)) or hasattr(data, "shape"):
        return True
    # A pytree of some class of its own, a dataclass say: neither a leaf nor iterable.
    known = callable(data) or isinstance(data, Iterable)
    return not known and not jax.tree_util.all_leaves([data])


def _check_list(data: list, name: str) -> None:
    if not data:
        raise ValueError(f"{name} is an empty list: there are no batches.")
    lengths = {np.shape(e)[:1] for e in data if hasattr(e, "shape")}
    shapes = {np.shape(e)[1:] for e in data if hasattr(e, "shape")}
    if all(hasattr(e, "shape") for e in data) and len(lengths) == 1 and len(shapes) > 1:
        raise ValueError(
            f"{name} is a list of arrays of different shapes, and a list is an iterable of "
            "batches. If these are the inputs and labels of the examples, pass a tuple: (X, y)."
        )


def _take(data: Any, rows: np.ndarray) -> Any:
    leaves, tree = jax.tree.flatten(data)
    on_device = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
    taken = _take_on_device(on_device, rows) if on_device else {}
    return jax.tree.unflatten(
        tree, [taken[i] if i in taken else x[rows] for i, x in enumerate(leaves)]
    )


@jax.jit
def _take_on_device(arrays: dict, rows: jax.Array) -> dict:
    return {i: x.at[rows].get(mode="promise_in_bounds") for i, x in arrays.items()}


def _takes_an_argument(function: Callable) -> bool:
    """Whether a function can't be called without an argument, or has one named key."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return any(p.default is p.empty or p.name == "key" for p in positional[:1])
