"""`evaluate`: the loss and the metrics on data that isn't trained on.

A loss is compiled once and kept, with a list of what it read besides its arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import inspect
import os
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments
from fnn.batch import batch_size as size_of
from fnn.meshes import beside
from fnn.train.checks import BatchChecks, Labels, check_values, find_labels
from fnn.train.data import Arrays, Stream, as_arrays, batches_of
from fnn.train.loss import Loss, batch_losses, check_loss, extras, mean_metrics
from fnn.train.result import stacked, weighted_mean
from fnn.train.state import State, path_name

# -------------------------------------------------------------------------------- what a loss reads
# What a function reads besides its arguments: is it still the function that was compiled?
#
# A compiled program holds the values that its function closed over when it was traced. They may
# change: a variable that it shares with the function around it, a global, an attribute of the
# object whose method it is, an entry of a list. `readings` lists all that a function can read by
# such names, so that two lists, taken before and after, tell whether to trace it anew.
#
# What it can't see: attributes read by a computed name (`getattr(self, name)`), and the insides
# of installed packages, which are taken to stay as they are.

_PLAIN = (str, bytes, int, type(None), type(Ellipsis), types.CodeType)
_INSTALLED = (
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,  # fnn itself
    *(sysconfig.get_paths()[p] + os.sep for p in ("stdlib", "purelib", "platlib")),
    "<frozen",
)
# Whatever is called may define the one, and wrap what defines the other.
_ALWAYS_READ = frozenset({"__call__", "__wrapped__"})


def readings(function: Any) -> list:
    """A list that is equal to an earlier one if the function still reads the same.

    It keeps alive none of what the function refers to. (An equal list may also come from
    another function with the same code.) Where something can't be looked at, it equals no other.
    """
    digests: dict[int, bytes] = {}
    names = _ALWAYS_READ
    try:
        while True:
            walk = _Walk(names, digests)
            walk.visit(function)
            # Of an object only what the code names is read, and all code must be known for that.
            if walk.names == names:
                return walk.entries
            names = frozenset(walk.names)
    except Exception:  # proxies that refuse, dicts that another thread changes, nesting too deep
        return [object()]


class _Walk:
    """One walk over what is reachable, as a flat list of entries."""

    def __init__(self, names: frozenset[str], digests: dict[int, bytes]):
        self.names = set(names)
        self.entries: list = []
        self._read = sorted(names)
        self._digests = digests
        self._seen: dict[int, tuple[int, Any]] = {}  # the object too: its id stays its own

    def visit(self, x: Any) -> None:
        if isinstance(x, _PLAIN):
            self.entries += (type(x), x)
            return
        if isinstance(x, (float, complex, np.generic)):
            self.entries += (type(x), repr(x))  # nan is itself, and -0.0 isn't 0.0
            return
        if id(x) in self._seen:
            self.entries += ("again", self._seen[id(x)][0])
            return
        self._seen[id(x)] = len(self._seen), x
        self.entries.append(type(x))
        for kind, visit in _VISITS:
            if isinstance(x, kind):
                visit(self, x)
                return
        self._object(x)

    def _all(self, *parts: Any) -> None:
        self.entries.append(len(parts))
        for part in parts:
            self.visit(part)

    def _named(self, values: dict[str, Any]) -> None:
        """Those of the values whose names are read."""
        for name in self._read:
            if name in values:
                self.entries.append(name)
                self.visit(values[name])

    def _array(self, x: np.ndarray) -> None:
        if x.dtype == object:
            self._all(x.shape, *x.flat)
            return
        if id(x) not in self._digests:
            self._digests[id(x)] = hashlib.blake2b(np.ascontiguousarray(x).tobytes()).digest()
        self.entries += (x.shape, str(x.dtype), self._digests[id(x)])

    def _function(self, f: types.FunctionType) -> None:
        cells = [c.cell_contents for c in f.__closure__ or () if _is_filled(c)]
        self._all(f.__code__, f.__defaults__, f.__kwdefaults__, *cells)
        self._named(f.__dict__)
        if not f.__code__.co_filename.startswith(_INSTALLED):
            read = set(_names(f.__code__))
            self.names |= read
            for name in sorted(read & f.__globals__.keys()):
                self.entries.append(name)
                self.visit(f.__globals__[name])

    def _module(self, x: types.ModuleType) -> None:
        if not _is_installed(x):
            self._named(vars(x))

    def _class(self, x: type) -> None:
        self.entries.append(_Same(x))
        for base in x.__mro__:
            if not _is_installed(sys.modules.get(base.__module__)):
                self._named(dict(vars(base)))

    def _object(self, x: Any) -> None:
        attributes = dict(getattr(x, "__dict__", {}))
        slots = {
            name: getattr(x, name)
            for base in type(x).__mro__
            for name in _slots(base)
            if hasattr(x, name)
        }
        if not _Same.can_tell(x):
            if not slots:
                self.entries.append(object())  # nothing to go by: never equal to an earlier one
            self._all(*slots, *slots.values())
        else:
            self.entries.append(_Same(x))
        self._named(attributes | slots)
        if dataclasses.is_dataclass(x) and _is_installed(sys.modules.get(type(x).__module__)):
            # The names in its methods aren't known: it may read any of its fields.
            fields = [f.name for f in dataclasses.fields(x) if hasattr(x, f.name)]
            self._all(*[getattr(x, name) for name in fields])
        self._class(type(x))


_VISITS: tuple[tuple[Any, Any], ...] = (
    (jax.Array, lambda walk, x: walk.entries.append(_Same(x))),
    (np.ndarray, _Walk._array),
    (types.FunctionType, _Walk._function),
    (types.MethodType, lambda walk, x: walk._all(x.__func__, x.__self__)),
    (types.BuiltinFunctionType, lambda walk, x: walk._all(x.__name__, x.__self__)),
    (types.ModuleType, _Walk._module),
    (functools.partial, lambda walk, x: walk._all(x.func, x.args, x.keywords)),
    (property, lambda walk, x: walk._all(x.fget)),
    ((staticmethod, classmethod), lambda walk, x: walk._all(x.__func__)),
    (type, _Walk._class),
    ((dict, types.MappingProxyType), lambda walk, x: walk._all(*x.keys(), *x.values())),
    ((tuple, list, set, frozenset), lambda walk, x: walk._all(*x)),
    (slice, lambda walk, x: walk._all(x.start, x.stop, x.step)),
)


class _Same:
    """An object to compare by identity, without keeping it alive."""

    def __init__(self, x: Any):
        try:
            self._ref: Any = weakref.ref(x)
        except TypeError:  # it refers to no other object, and so not to the function either
            self._ref = lambda: x

    @staticmethod
    def can_tell(x: Any) -> bool:
        """Can it be held weakly, or else without holding anything else?"""
        return type(x).__weakrefoffset__ != 0 or not gc.is_tracked(x)

    def __eq__(self, other: object) -> bool:
        mine = self._ref()
        return isinstance(other, _Same) and mine is not None and mine is other._ref()

    __hash__ = None  # type: ignore[assignment]


def _names(code: types.CodeType) -> Iterator[str]:
    """The globals and attributes that code, and the functions inside it, name."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_installed(module: Any) -> bool:
    file = getattr(module, "__file__", None) or ""
    return (
        file.startswith(_INSTALLED) or getattr(module, "__name__", "") in sys.builtin_module_names
    )


# --------------------------------------------------------------------------------------- evaluation


def evaluate(
    loss: Loss,
    params: chex.ArrayTree | State,
    data: Any,
    *,
    batch_size: int | None = None,
    key: chex.PRNGKey | None = None,
    check: bool = True,
    model_state: chex.ArrayTree | None = None,
) -> dict[str, float]:
    """The mean loss and metrics over all examples of the data, each counted once.

    Args:
        loss: as for `train_step`, for one example. A `mode` that it names is EVALUATE.
        params: the parameters; or a training State, `result.state`, for them and the network's.
        data: arrays like `(X, y)`, or an iterable of batches, as for `fit`.
        batch_size: how many examples at once, for arrays; 128 by default.
        key: for a loss that takes one.
        check: look at the values of the data too, as `fit` does: nan, and labels out of range.
        model_state: the network's state, for a loss that takes one; by default that of a State.

    Returns:
        `{"loss": ..., metric: ...}` as Python floats (arrays for metrics that are arrays).

    Raises:
        TypeError, ValueError: as in `fit`, for the data.

    A loss is compiled at its first evaluation, for each shape of batch, and again if what it
    reads besides its arguments has changed since: variables that it closes over, globals,
    attributes of its object. (Attributes read by a computed name aren't seen.) The program
    is kept as long as the loss is, and doesn't keep the loss.
    """
    check_loss("evaluate", loss)
    arguments.flag("evaluate", "check", check)
    if key is not None:
        arguments.key("evaluate", "key", key)
    if isinstance(params, State):
        model_state = params.model_state if model_state is None else model_state
        params = params.params
    params = _checked(params)
    found = extras(loss)
    if found.needs_key and key is None:
        raise TypeError("the loss takes a key: pass key=...")
    if found.needs_state and model_state is None:
        raise TypeError(
            "the loss takes a state: pass the training state, evaluate(loss, result.state, data), "
            "or model_state=..."
        )
    model_state = as_arrays(model_state or {}, "model_state", only_arrays=True)
    source = batches_of("evaluate", data, batch_size=batch_size, shuffle=False, epochs=1)
    with evaluation_of(loss) as evaluation:
        return evaluation.means(params, model_state, source, key, check)


def _checked(params: Any) -> Any:
    """Parameters as arrays. (They get no gradient here: integers may be among them.)"""
    arguments.no_result("evaluate", "params", params)
    if params is None:
        raise TypeError("evaluate: params must be a tree of arrays, but got None.")
    params = as_arrays(params, "params", only_arrays=True)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        arguments.array("evaluate", path_name("params", path), leaf)
    return params


class Evaluation:
    """The program that evaluates one loss, and what is known of the labels that it reads.

    Args:
        loss: a function that returns the loss: a weak reference, where the loss mustn't be held.
    """

    def __init__(self, loss: Callable[[], Any]):
        self._loss = loss
        self._labels: dict[Any, tuple[Labels, ...]] = {}
        # No method of self's is jitted: a cycle would keep what the program holds for a while.
        traces: list[str] = []
        self.traces = traces

        @jax.jit
        def means(params, state, batch, key):
            traces.append("means")
            losses, metrics, _ = batch_losses(
                loss(), params, batch, size_of(batch), key, train=False, state=state
            )
            return {"loss": jnp.mean(losses), **mean_metrics(metrics)}

        self._means = means

    def means(
        self,
        params: Any,
        state: Any,
        source: Arrays | Stream,
        key: Any,
        check: bool,
        name: str = "data",
    ) -> dict[str, Any]:
        """The mean loss and metrics over all batches; see `evaluate`."""
        own_key = key if extras(self._loss()).needs_key else None
        if check and isinstance(source, Arrays):
            check_values(self.find_labels, params, source.data, own_key, state, name)
        checks = BatchChecks(self.find_labels, check and isinstance(source, Stream))
        means, sizes = [], []
        for i, batch in enumerate(source.epoch(key)):
            checks.look_at(params, batch, own_key, state)
            sizes.append(size_of(batch))
            placed = beside((params, state), batch)
            means.append(self._means(*placed, batch, fold_in(own_key, i)))
        if not means:
            raise ValueError(f"{name} has no batches to evaluate.")
        return weighted_mean(stacked(jax.device_get(means)), np.array(sizes))

    def find_labels(self, params: Any, example: Any, key: Any, state: Any) -> tuple[Labels, ...]:
        """`find_labels` of the loss, done once for arguments of the same types."""
        leaves, tree = jax.tree.flatten((params, example, key, state))
        types = (tree, *[(jnp.shape(x), jnp.result_type(x)) for x in leaves])
        if types not in self._labels:
            self.traces.append("labels")
            self._labels[types] = find_labels(self._loss(), params, example, key, state)
        return self._labels[types]


@contextlib.contextmanager
def evaluation_of(loss: Loss) -> Iterator[Evaluation]:
    """The Evaluation of a loss: the one of before, if the loss still reads the same.

    It is found by the loss's identity and dropped with the loss.
    """
    name = (id(loss.__self__), id(loss.__func__)) if inspect.ismethod(loss) else id(loss)
    kept, was = _kept.get(name, (None, None))
    if kept is None or was != readings(loss):
        refer = weakref.WeakMethod if inspect.ismethod(loss) else weakref.ref
        try:
            kept = Evaluation(refer(loss, lambda _: _kept.pop(name, None)))
        except TypeError:  # there are no weak references to it
            yield Evaluation(lambda: loss)
            return
    before = len(kept.traces)
    yield kept
    if len(kept.traces) > before:  # taken now: the loss may count its own traces
        _kept[name] = kept, readings(loss)


# By a loss's id: its evaluation, and what it read when it was traced.
_kept: dict[Any, tuple[Evaluation, list]] = {}


@jax.jit
def _fold(key, i):
    return jax.random.fold_in(key, i)


def fold_in(key: Any, i: int) -> Any:
    """The i-th key drawn from a key; None from None. Compiled: a loop calls it at each step."""
    return None if key is None else _fold(key, np.uint32(i))
