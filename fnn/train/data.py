"""Batches: cut from arrays, in an order drawn from a key; or as they come from outside."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments
from fnn.arguments import name_of
from fnn.batch import batch_size as size_of
from fnn.meshes import of_rows
from fnn.train.conversion import as_arrays
from fnn.train.orders import sort_bits, sort_bits_of_epochs, sorted_orders

# So many numbers are drawn at once, to shuffle by.
DRAWN_AT_ONCE = 2**16


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A tree of arrays with the examples along their first axes.

    Every example comes once in an epoch. If their number isn't a multiple of the batch size,
    the last batch is smaller, or left out.
    """

    data: Any
    size: int
    batch_size: int
    shuffle: bool
    drop_last: bool = False

    @property
    def steps(self) -> int:
        """The number of batches in an epoch."""
        return self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)

    @property
    def sizes(self) -> np.ndarray:
        """How many examples each batch of an epoch has."""
        sizes = np.full(self.steps, self.batch_size, np.int32)
        sizes[-1] = min(self.batch_size, self.size - (self.steps - 1) * self.batch_size)
        return sizes

    def rows(self, key: Any) -> Any:
        """Which examples make each batch of an epoch, in an order drawn from the epoch's key.

        Returns:
            Numbers of examples of shape (steps, batch_size). A smaller last batch is filled up
            with examples of its own.
        """
        if not self.shuffle:
            return self._in_batches(np.arange(self.size, dtype=np.int32))
        if jax.default_backend() == "cpu":  # whose sort is slow
            return self._in_batches(sorted_orders(_bits(key, self.size)))
        return _permuted(key, self.size, self.steps, self.batch_size)

    def rows_ahead(self, key: Any, epoch: int, last: int) -> Callable[[], list]:
        """`rows` of an epoch and of some after it, up to the last one, to be called for.

        A device computes one program after the other: what is drawn for these epochs is put in line
        at once, so that who calls for it later need not wait for the training before it.

        Args:
            key: of all epochs.
            epoch, last: numbers of epochs.
        """
        if not self.shuffle:
            return lambda: [self.rows(None)]
        if jax.default_backend() != "cpu":
            there = self.rows(fold_in(key, epoch))
            return lambda: [there]
        # A short epoch takes no longer than drawing its order does: many are drawn at once.
        count = max(1, DRAWN_AT_ONCE // self.size)
        bits = _bits_of_epochs(key, np.uint32(epoch), count, self.size)

        def rows():
            orders = sorted_orders(np.asarray(bits)[: last + 1 - epoch])
            return [self._in_batches(order) for order in orders]

        return rows

    def _in_batches(self, order: np.ndarray) -> Any:
        return _in_batches(order, self.size, self.steps, self.batch_size)

    def epoch(self, key: Any, start: int = 0) -> Iterator[Any]:
        """The batches of one epoch, in an order drawn from the key, without the first `start`."""
        rows = np.asarray(self.rows(key))
        for own, size in list(zip(rows, self.sizes, strict=True))[start:]:
            yield take(self.data, own[:size])


@dataclasses.dataclass(frozen=True)
class Stream:
    """Batches from outside: an iterable, or a function that makes one for each epoch.

    Fields:
        source: the iterable or the function. (An iterator goes on where the last epoch ended.)
        name: what it is called in messages.
        limit: how many batches make an epoch; None for all that there are.
    """

    source: Any
    name: str
    limit: int | None
    _kind: list = dataclasses.field(default_factory=list)  # of the first batch

    @property
    def batch(self) -> str:
        """What one of its batches is called in messages."""
        return "batch" if self.name == "data" else f"{self.name}'s batch"

    @property
    def steps(self) -> int | None:
        """The number of batches in an epoch, if it is known."""
        if self.limit is None and isinstance(self.source, Sized):
            try:
                return len(self.source)
            except (TypeError, NotImplementedError):  # of what has a length only at times
                return None
        return self.limit

    def epoch(self, key: Any, start: int = 0) -> Iterator[Any]:
        """The batches of one epoch, converted from other libraries' arrays where need be.

        Args:
            key: for a function that takes one.
            start: how many batches of the epoch are over. They are left out; an iterator stands
                behind them already.

        Raises:
            TypeError, ValueError: a batch can't be converted, or isn't built as the first was;
                there are fewer batches than make an epoch; the source wants a key that isn't
                there.
        """
        count = start
        skip = 0 if isinstance(self.source, Iterator) else start
        end = None if self.limit is None else skip + max(0, self.limit - start)
        for count, batch in enumerate(itertools.islice(self._batches(key), skip, end), start + 1):
            batch = as_arrays(batch, self.batch)
            self._check_kind(batch, count)
            yield batch
        if self.limit is not None and count < self.limit:
            used_up = isinstance(self.source, Iterator)
            raise ValueError(
                f"{self.name} gave {count} batches for an epoch, but steps_per_epoch is "
                f"{self.limit}{': the iterator is used up' if used_up else ''}. (`result` of this "
                "error is what was trained.)"
            )

    def _batches(self, key: Any) -> Iterable[Any]:
        if not callable(self.source) or isinstance(self.source, Iterable):
            return self.source
        wants = _key_parameter(self.source)
        if wants is not None and key is None and wants.default is wants.empty:
            raise TypeError(
                f"{self.name} is a function that takes a key, {name_of(self.source)}"
                f"({wants.name}): pass key=..., or a function without arguments."
            )
        made = self.source() if wants is None else self.source(key)
        # Not by iter(made), which may start a pipeline's workers.
        if not (hasattr(made, "__iter__") or hasattr(made, "__getitem__")):
            raise TypeError(
                f"{self.name} is a function, {name_of(self.source)}, which must return an iterable "
                f"of batches, but it returned {arguments.show(made)}."
            )
        return made

    def _check_kind(self, batch: Any, count: int) -> None:
        leaves, tree = jax.tree.flatten(batch)
        kind = tree, [np.ndim(leaf) for leaf in leaves]
        if not self._kind:
            self._kind.append((kind, arguments.shapes(batch)))
        elif self._kind[0][0] != kind:
            raise ValueError(
                f"the batches of {self.name} aren't all built alike: number {count} of this epoch "
                f"is {arguments.shapes(batch)}, but the first was {self._kind[0][1]}. (Sizes may "
                "change from batch to batch; the tree and the numbers of axes may not.)"
            )


def batches_of(
    where: str,
    data: Any,
    *,
    batch_size: int | None,
    shuffle: bool,
    epochs: int,
    steps: int | None = None,
    name: str = "data",
    drop_last: bool = False,
) -> Arrays | Stream:
    """Decide what the data is: see `fnn.fit` for the rules.

    Raises:
        TypeError, ValueError: it is neither, is empty, or doesn't fit the other arguments.
    """
    if batch_size is not None:
        batch_size = arguments.integer(where, "batch_size", batch_size, least=1)
    if steps is not None:
        steps = arguments.integer(where, "steps_per_epoch", steps, least=1)
    if is_tree_of_arrays(data):
        data = as_arrays(data, name)
        size = size_of(data, name)
        if steps is not None:
            raise ValueError(
                f"{name} is arrays, whose epoch is all of their {size} examples: steps_per_epoch "
                "is for iterables."
            )
        return Arrays(data, size, min(batch_size or 128, size), shuffle, drop_last)
    if not (callable(data) or isinstance(data, Iterable)) or isinstance(data, (str, bytes)):
        raise TypeError(
            f"{name} must be arrays, like (X, y), or an iterable of batches, or a function that "
            f"returns one, but got {arguments.show(data)}."
        )
    if batch_size is not None:
        raise ValueError(
            f"{name} is an iterable, which makes its own batches: batch_size is for arrays. "
            "(Arrays come in a tuple, (X, y), or a dict; a list is an iterable of batches.)"
        )
    if drop_last:
        raise ValueError(
            f"{name} is an iterable, which makes its own batches: drop_last is for arrays. Leave "
            "the last batch out there."
        )
    if isinstance(data, list):
        _check_list(data, name)
    elif not isinstance(data, Iterable):
        wanted = [p.name for p in arguments.positional(data) or [] if p.default is p.empty]
        if len(wanted) > 1:
            raise TypeError(
                f"{name} is a function, {name_of(data)}({', '.join(wanted)}): it is called for "
                "each epoch with no argument, or with a key."
            )
    takes_steps = where == "fit" and name == "data"
    if isinstance(data, itertools.cycle) and steps is None:
        way = "pass steps_per_epoch" if takes_steps else "cut it, itertools.islice(data, n)"
        raise ValueError(f"{name} never ends (itertools.cycle): {way}.")
    if isinstance(data, Iterator) and epochs > 1 and steps is None:
        raise ValueError(
            f"{name} is an iterator ({type(data).__name__}): it would be used up after the first "
            f"of {epochs} epochs. Pass a list, or a function that makes a new iterator for each "
            f"epoch{', or steps_per_epoch' if takes_steps else ''}."
        )
    if steps is not None and isinstance(data, list) and len(data) != steps:
        less = len(data) < steps
        raise ValueError(
            f"{name} is a list of {len(data)} batches, but steps_per_epoch is {steps}"
            + (". It" if less else ": the others would never be seen. It")
            + " is for iterables whose end isn't known; leave it out, or cut the list."
        )
    return Stream(data, name, steps)


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
    first = f"{name}[0]"
    size_of(as_arrays(data[0], first), first)


def take(data: Any, rows: Any) -> Any:
    """These rows of each array, where it lies: on the host or on the device."""
    leaves, tree = jax.tree.flatten(data)
    on_device = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
    taken = _take_on_device(on_device, rows) if on_device else {}
    return jax.tree.unflatten(
        tree, [taken[i] if i in taken else x[rows] for i, x in enumerate(leaves)]
    )


def filled(batch: Any, size: int | None) -> Any:
    """A batch, filled up to `size` examples with its own, if given."""
    return batch if size is None else take(batch, np.arange(size) % size_of(batch))


@jax.jit
def _take_on_device(arrays: dict, rows: jax.Array) -> dict:
    return {
        i: x.at[rows].get(mode="promise_in_bounds", out_sharding=of_rows(x, len(rows)))
        for i, x in arrays.items()
    }


@functools.partial(jax.jit, static_argnums=1)
def _bits(key: Any, size: int) -> jax.Array:
    return sort_bits(key, size)


_bits_of_epochs = jax.jit(sort_bits_of_epochs, static_argnums=(2, 3))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _permuted(key: Any, size: int, steps: int, batch_size: int) -> jax.Array:
    """See `Arrays.rows`; in one program, since a GPU takes long to begin each."""
    order = jax.random.permutation(key, size).astype(jnp.int32)
    return _in_batches(order, size, steps, batch_size)


def _in_batches(order: Any, size: int, steps: int, batch_size: int) -> Any:
    """An order of the examples, (size,), as batches, (steps, batch_size)."""
    before = (steps - 1) * batch_size
    last = before + np.arange(batch_size) % (size - before)
    join = np.concatenate if isinstance(order, np.ndarray) else jnp.concatenate
    return join([order[:before], order[last]]).reshape(steps, -1)


def _key_parameter(function: Callable) -> inspect.Parameter | None:
    """A function's first argument, if it can't be called without one or it is named key."""
    first = (arguments.positional(function) or [])[:1]
    return next((p for p in first if p.default is p.empty or p.name == "key"), None)


@jax.jit
def _fold(key, i):
    return jax.random.fold_in(key, i)


def fold_in(key: Any, i: int) -> Any:
    """The i-th key drawn from a key; None from None. Compiled: a loop calls it at each step."""
    return None if key is None else _fold(key, np.uint32(i))
