"""What a call of `fit` is made of, as text: to tell whether the next one is the same.

An optax transformation is two functions, whose numbers are in their closures: they are read there,
by the names that they have in optax's source.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import platform
import types
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from fnn.meshes import explicit_axes
from fnn.train.checkpoint_parts import checksum, is_divided
from fnn.train.checkpoint_tree import is_key
from fnn.train.data import Arrays, Stream
from fnn.train.state import State, path_name
from fnn.train.step import TrainStep

# Of larger data, rows spread over all of it are looked at.
MOST_BYTES = 1 << 24
_ROWS = 64
_DEEPEST = 12

# What decides when a step is refused, or where it is computed, and not what it is.
_NO_MATTER = ("nonfinite", "check", "layout")


def versions() -> dict[str, str]:
    """The versions of what decides how numbers are computed."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "numpy": np.__version__,
        "platform": jax.default_backend(),
    }


def of_call(
    training: Arrays | Stream, state: State, step: TrainStep, key: Any, **options: Any
) -> dict[str, Any]:
    """What a call of `fit` is, as far as it decides the result.

    Args:
        training: the data.
        state: the first state.
        step: what one step is.
        key: the key, or None.
        options: numbers and words: steps_per_epoch, say.
    """
    if isinstance(training, Arrays):
        size, shuffle = training.batch_size, training.shuffle
        call = {"data": of_data(training.data, "data"), "batch_size": size, "shuffle": shuffle}
    else:
        call = {"data": of_data(training.source, "data")}
    _, optimizer, settings = step.made_of
    settings = {name: settings[name] for name in settings if name not in _NO_MATTER}
    return call | {
        "key": of_key(key),
        "optimizer": shortened(of_function(optimizer, "optimizer")),
        "step": shortened(of_function(settings, "step")),
        "start": of_arrays(state, "state"),
        **options,
    }


def of_arrays(tree: Any, name: str) -> dict[str, str]:
    """Each array of a tree by its path: dtype, shape, and a digest of its numbers.

    Of an array of more than 16 MiB, 64 rows spread over it are read. Of one that is divided among
    processes the same numbers are sent to all, which must all call it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    most = MOST_BYTES // max(1, len(leaves))
    return {path_name(name, path): _of_array(leaf, most) for path, leaf in leaves}


def of_data(data: Any, name: str) -> dict[str, str]:
    """Data as `fit` takes it: arrays, a list of batches, or what makes them.

    Of an iterator or a function nothing is known before it is used: only that it is one; nor of
    a list of batches of which each process has its own part.
    """
    if isinstance(data, list) and jax.process_count() > 1:
        return {name: f"a list of {len(data)} batches"}
    if isinstance(data, list):
        return {name: f"a list of {len(data)} batches"} | of_arrays(data[:_ROWS], name)
    if callable(data) and not isinstance(data, Iterable):
        return {name: "a function"}
    if isinstance(data, Iterable) and not isinstance(data, (tuple, dict)) and not _is_array(data):
        return {name: f"an iterable ({type(data).__name__})"}
    return of_arrays(data, name)


def of_key(key: Any) -> str | None:
    """A PRNG key: its numbers, and how it draws."""
    if key is None:
        return None
    if is_key(key):
        return f"{jax.random.key_impl(key)} {np.asarray(jax.random.key_data(key)).tolist()}"
    return str(np.asarray(key).tolist())


def of_function(value: Any, name: str) -> dict[str, str]:
    """The numbers and words that a function, or a tuple of functions, holds on to, by name.

    Closures, defaults, partials, dataclasses, and the constants in a function's own code are
    followed; global variables that it reads are not.
    """
    found: dict[str, str] = {}
    _follow(value, name, found, set(), 0)
    return found


def _follow(value: Any, name: str, found: dict[str, str], seen: set[int], depth: int) -> None:
    plain = (bool, int, float, complex, str, bytes, np.generic, jax.ShapeDtypeStruct)
    if value is None or isinstance(value, plain):
        found[name] = repr(value)
        return
    if isinstance(value, type) and issubclass(value, np.generic):  # np.float16
        found[name] = value.__qualname__
        return
    if _is_array(value):
        found[name] = of_key(value) or "" if is_key(value) else _of_array(value, MOST_BYTES)
        return
    if id(value) in seen or depth > _DEEPEST:
        return
    seen.add(id(value))
    follow = lambda inner, label: _follow(inner, label, found, seen, depth + 1)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            follow(inner, f"{name}[{key!r}]")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for field in value._fields:
            follow(getattr(value, field), f"{name}.{field}")
    elif isinstance(value, (tuple, list)):
        for i, inner in enumerate(value):
            follow(inner, f"{name}[{i}]")
    elif isinstance(value, (set, frozenset)):
        found[name] = str(sorted(map(repr, value)))
    elif isinstance(value, functools.partial):
        follow(value.func, name)
        follow(value.args, f"{name}.args")
        follow(value.keywords, f"{name}.keywords")
    elif isinstance(value, types.MethodType):
        follow(value.__func__, name)
        follow(value.__self__, f"{name}.__self__")
    elif isinstance(value, types.FunctionType):
        _follow_function(value, name, found, follow)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        found[name] = type(value).__qualname__
        for field in dataclasses.fields(value):
            follow(getattr(value, field.name, None), f"{name}.{field.name}")
    elif callable(getattr(value, "__wrapped__", None)):  # a jitted function, for one
        follow(value.__wrapped__, name)
    else:
        found[name] = getattr(value, "__qualname__", type(value).__qualname__)
        for key, inner in getattr(value, "__dict__", {}).items():
            if not isinstance(value, (type, types.ModuleType)):
                follow(inner, f"{name}.{key}")


def _follow_function(function, name, found, follow):
    found[name] = f"{function.__module__}.{function.__qualname__}"
    numbers = [c for c in function.__code__.co_consts if isinstance(c, (int, float, complex))]
    if numbers:
        found[f"{name}'s constants"] = str(numbers)
    names = function.__code__.co_freevars
    for variable, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            inner = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        follow(inner, f"{name}.{variable}")
    if function.__defaults__:
        follow(function.__defaults__, f"{name}'s defaults")
    if function.__kwdefaults__:
        follow(function.__kwdefaults__, f"{name}'s defaults")


def shortened(settings: dict[str, str], most: int = 2000) -> dict[str, str]:
    """The settings; of more than `most` of them a digest."""
    if len(settings) <= most:
        return settings
    digest = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()
    return {"digest": digest}


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _of_array(leaf: Any, most: int) -> str:
    """dtype, shape and digest of an array; of one of more than `most` bytes, of some rows."""
    dtype = leaf.dtype if _is_array(leaf) else jnp.result_type(leaf)
    kind = f"{dtype}[{','.join(map(str, np.shape(leaf)))}]"
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if is_divided(leaf) and not _can_be_sent(leaf):
        return kind
    if np.size(leaf) * np.dtype(leaf.dtype if _is_array(leaf) else float).itemsize > most:
        rows = np.linspace(0, len(leaf) - 1, min(len(leaf), _ROWS)).astype(int)
        if is_divided(leaf):
            leaf = _sent_to_all(leaf, rows)
        else:
            leaf = np.stack([np.asarray(leaf[int(i)]) for i in rows])
    elif is_divided(leaf):
        leaf = _sent_to_all(leaf, None)
    return f"{kind} {checksum(np.asarray(leaf)):08x}"


def _can_be_sent(leaf: jax.Array) -> bool:
    at = leaf.sharding
    return isinstance(at, NamedSharding) and not explicit_axes(at.mesh)


def _sent_to_all(leaf: jax.Array, rows: np.ndarray | None) -> np.ndarray:
    """These rows of an array that is divided among processes, or all of it; in each of them."""
    at: Any = leaf.sharding
    everywhere = NamedSharding(at.mesh, PartitionSpec())
    take = lambda x: x if rows is None else x[rows]
    return np.asarray(jax.jit(take, out_shardings=everywhere)(leaf))
