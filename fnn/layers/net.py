"""`network`: a layer made of layers, whose body reads like the formula.

    @network(hidden=Linear(100), output=Linear(10))
    def mlp(net, x):
        return net.output(relu(net.hidden(x)))

    params = mlp.init(key, x)              {"hidden": {"W", "b"}, "output": {"W", "b"}}
    scores = mlp(params, x)

One body serves `init`, `init_state`, `__call__` and `apply`. `net` holds what the body needs:
its parts, to be called, and `net.params`, `net.state` and `net.mode`. A part that is called twice
shares its weights; parameters of a part may be used directly, `net.params["embed"]["E"]`.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import functools
import importlib
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.layers.layer import Layer, LayerError, as_layer, keys_of, own_state, run, with_mask
from fnn.layers.mode import EVALUATE, Mode

RESERVED = ("params", "state", "mode")


def network(**parts: Layer | Callable) -> Callable[[Callable], Network]:
    """Decorate the body of a network, a function `(net, *xs) -> y` for one example.

    Args:
        **parts: layers, or plain functions of arrays. In the body they are called as
            `net.name(x)`. Not called `params`, `state` or `mode`, nor with a leading underscore.

    Returns:
        A decorator that makes a `Network`, which is a Layer. Its parameters and its state hold
        an entry for each part that has some, under the part's name. A part draws its parameters
        (and random numbers in training) from a key of its own, folded from the network's by the
        part's name: to add another part changes no other's draw.

    Raises:
        TypeError: a part is neither a layer nor a function, or the body isn't a function.
        ValueError: a part has a name that isn't free.
        LayerError: when it is called, parameters or a state that aren't this network's.

    An error from inside a part says where in the network that stands.
    """
    made = _as_parts("network", parts)

    def decorate(body: Callable) -> Network:
        arguments.function("network", "body", body, "a function body(net, x)")
        return Network(body, made)

    return decorate


_HAND_MASK_ON: set[Callable] = set()


def hands_mask_on(body: Callable) -> Callable:
    """Decorate a network's body that gives its second input, a mask, to all parts that take one."""
    _HAND_MASK_ON.add(body)
    return body


@dataclasses.dataclass(frozen=True, repr=False)
class Network(Layer):
    """A layer made of layers; see `network`, which makes it.

    Fields:
        body: `(net, *xs) -> y`.
        parts: pairs of a name and a Layer, in order (it may be given as a dict).
    """

    body: Callable
    parts: Any

    def __post_init__(self) -> None:
        arguments.function("Network", "body", self.body, "a function body(net, x)")
        parts = self.parts if isinstance(self.parts, Mapping) else dict(self.parts)
        object.__setattr__(self, "parts", _as_parts(self._name, parts))

    @property
    def takes_mask(self) -> bool:  # type: ignore[override]
        """Whether its body hands a mask on, and its first part takes one."""
        return self.body in _HAND_MASK_ON and bool(self.parts) and self.parts[0][1].takes_mask

    def init(self, key: chex.PRNGKey, *xs: Any) -> dict:
        arguments.key(f"{self._name}.init", "key", key)
        made = {
            name: layer.init(_folded(key, self._drawn_by(name)), *types)
            for name, layer, types in self._inputs_of_parts(None, *xs)
        }
        return {name: own for name, own in made.items() if jax.tree.leaves(own)}

    def init_state(self, *xs: Any) -> dict:
        parts = self._inputs_of_parts(None, *xs)
        return _by_kind({name: layer.init_state(*types) for name, layer, types in parts})

    def init_cache(self, length: int, *xs: Any) -> dict:
        length = arguments.integer(f"{self._name}.init_cache", "length", length, least=1)
        parts = self._inputs_of_parts(length, *xs)
        return _by_kind({name: own_state(p, length, *types) for name, p, types in parts})

    def apply(
        self, params: Any, state: Any, *xs: Any, mask: Any = None, mode: Mode = EVALUATE
    ) -> tuple[Any, dict]:
        xs = with_mask(self, xs, mask)
        _check_trees(self, params, state)
        if not isinstance(mode, Mode):
            raise TypeError(
                f"{self._name}: mode must be EVALUATE or training(key), but got "
                f"{arguments.show(mode)}."
            )
        net = Net(self, params, state, mode)
        return self.body(net, *xs), net.state

    def _make(self, key: Any, length: int | None, *xs: Any) -> tuple[dict, dict, Any]:
        net = Net(self, {}, {}, EVALUATE, _Making(key, length))
        y = self.body(net, *xs)
        return dict(net.params), net.state, y

    def _inputs_of_parts(self, length: int | None, *xs: Any) -> list[tuple[str, Layer, tuple]]:
        """Each part that the body calls, in order, with the types of its inputs.

        The body runs once, on types alone; the parameters are of JAX's float, whatever the inputs.
        """
        making = _Making(None, length)

        def run_body(*xs):
            # Not in `making`, which outlives the trace; what is noted goes to its dicts.
            here = dataclasses.replace(making, key=jax.random.key(0))
            return self.body(Net(self, {}, {}, EVALUATE, here), *xs)

        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(run_body, *xs)
        parts = dict(self.parts)
        return [(name, parts[name], types) for name, types in making.inputs.items()]

    def _drawn_by(self, name: str) -> str:
        """What a part's key is folded from: its name; of a part without one its kind and number.

        The numbers count parts of its kind alone, so that a relu more shifts no other's draw.
        """
        if not name.isdigit():
            return name
        parts = dict(self.parts)
        kind = type(parts[name])
        before = [n for n in parts if n.isdigit() and int(n) < int(name)]
        return f"{kind.__name__} {sum(type(parts[n]) is kind for n in before)}"

    @property
    def _name(self) -> str:
        return arguments.name_of(self.body).lstrip("_")

    def __repr__(self) -> str:
        names = [name for name, _ in self.parts]
        by_position = names == [str(i) for i in range(len(names))]
        shown = [repr(p) if by_position else f"{name}={p!r}" for name, p in self.parts]
        return f"{self._name}({', '.join(shown)})"

    def __reduce__(self):
        """Pickled by the name under which the decorated body stands in its module."""
        module, name = self.body.__module__, self.body.__qualname__
        if isinstance(_found(sys.modules.get(module), name), Network):
            return _network_again, (module, name, self.parts)
        return type(self), (self.body, self.parts)


class Net:
    """What the body of a network is given: the parts by name, parameters, state and mode.

    Attributes:
        params: the network's parameters, a dict by part. (In `init`: of the parts called so far.)
        state: the network's state so far, by kind and by part.
        mode: the `Mode` that the network was called with.
    """

    def __init__(
        self,
        layer: Network,
        params: dict,
        state: dict,
        mode: Mode,
        making: _Making | None = None,
    ):
        self.state, self.mode = state, mode
        self._layer, self._params, self._making = layer, params, making
        self._parts = dict(layer.parts)
        self._calls: collections.Counter[str] = collections.Counter()

    @property
    def params(self) -> dict:
        if self._making is None:
            return self._params
        made = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), self._making.params)
        return _MadeSoFar(made)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._parts:
            raise AttributeError(
                f"{self._layer._name} has no part {name!r}; its parts are {list(self._parts)}."
            )
        return functools.partial(self._call, name)

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        """The parts in order, each to be called."""
        return (functools.partial(self._call, name) for name in self._parts)

    def _call(self, name: str, *xs: Any) -> Any:
        layer, number = self._parts[name], self._calls[name]
        self._calls[name] += 1
        given = {kind: own[name] for kind, own in self.state.items() if name in own}
        with _in_part(name, layer) as note:
            if self._making is not None and number == 0:
                self._making.inputs[name] = jax.tree.map(type_of, xs)
                key = _folded(self._making.key, self._layer._drawn_by(name))
                params, state, y = layer._make(key, self._making.length, *xs)
                if jax.tree.leaves(params):
                    self._making.params[name] = jax.tree.map(type_of, params)
            else:
                params, mode = self.params.get(name, {}), self.mode
                if mode.key is not None:
                    key = _folded(mode.key, self._layer._drawn_by(name))
                    mode = dataclasses.replace(mode, key=jax.random.fold_in(key, number))
                y, state = run(layer, params, given, xs, mode)
            note(params, given, xs, y)
        for kind, own in state.items():
            if jax.tree.leaves(own):
                self.state = self.state | {kind: self.state.get(kind, {}) | {name: own}}
        return y


@dataclasses.dataclass
class _Making:
    """What is noted while the body runs to make parameters.

    Fields:
        key: what the parts are made from.
        length: of a cache, or None.
        inputs: for each part called so far, the types of its inputs.
        params: the types of its parameters, if it has some. Not the arrays: a part may be called
            inside a loop, which they must not leave.
    """

    key: Any
    length: int | None
    inputs: dict[str, tuple] = dataclasses.field(default_factory=dict)
    params: dict[str, Any] = dataclasses.field(default_factory=dict)


class _MadeSoFar(dict):
    """The parameters of the parts called so far."""

    def __missing__(self, name: str) -> Any:
        raise KeyError(
            f"net.params[{name!r}] is read before the part is called for the first time (or the "
            f"part has no parameters): so far there are {list(self)}."
        )


# ------------------------------------------------------------------------- paths of the parts

Note = Callable[[Any, dict, tuple, Any], None]
Watch = Callable[[tuple[str, ...], Layer, int, int], Note]


class _Watched(NamedTuple):
    """Who watches, and where in the network it is.

    Fields:
        times: how often the loops around it run.
        written: how often the program holds what stands there: a loop's body once, or as often as
            it is unrolled.
    """

    watch: Watch
    path: tuple[str, ...] = ()
    times: int = 1
    written: int = 1

    def tell(self, layer: Layer) -> Note:
        """Tell of the layer that stands there."""
        return self.watch(self.path, layer, self.times, self.written)


_watched: contextvars.ContextVar[_Watched | None] = contextvars.ContextVar("watched", default=None)


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Within it, each call of a part is told of.

    Args:
        watch: called with the part's path, the layer, how often it is run, and how often the
            program holds it; what it returns is called after the part, with its parameters, its
            state, its inputs and its output.
    """
    with _watched_as(_Watched(watch)):
        yield


def is_watched() -> bool:
    """Whether somebody is told of the calls of parts."""
    return _watched.get() is not None


@contextlib.contextmanager
def in_loop(block: Layer, times: int, written: int = 1) -> Iterator[Note]:
    """Tell who watches of a block that a loop runs; in paths it is called ""."""
    with _repeated("", block, times, written) as note:
        yield note


@contextlib.contextmanager
def in_copies(block: Layer, count: int) -> Iterator[Note]:
    """Tell who watches of a block of which copies run side by side; in paths it is called "*"."""
    with _repeated("*", block, count, count) as note:
        yield note


@contextlib.contextmanager
def _repeated(name: str, block: Layer, times: int, written: int) -> Iterator[Note]:
    now = _watched.get()
    inner = now and now._replace(
        path=(*now.path, name), times=now.times * times, written=now.written * written
    )
    with _watched_as(inner):
        yield inner.tell(block) if inner else _unwatched


@contextlib.contextmanager
def _watched_as(value: _Watched | None) -> Iterator[None]:
    token = _watched.set(value)
    try:
        yield
    finally:
        _watched.reset(token)


@contextlib.contextmanager
def _in_part(name: str, layer: Layer) -> Iterator[Note]:
    """Name the part in the profiler, in the graph, for who watches, and in errors from inside."""
    now = _watched.get()
    inner = now and now._replace(path=(*now.path, name))
    try:
        with jax.named_scope(_title(name, layer)), _watched_as(inner):
            yield inner.tell(layer) if inner else _unwatched
    except Exception as error:
        _add_path(error, name, layer)
        raise


def _unwatched(*seen: Any) -> None:
    pass


def _title(name: str, layer: Layer) -> str:
    """The part's name; "Linear 0" for the first part, if it has none."""
    if not name.isdigit():
        return name
    kind = repr(layer).partition("(")[0]
    return f"part {name}" if kind.startswith("<") else f"{kind} {name}"


def _add_path(error: Exception, name: str, layer: Layer) -> None:
    """Put a part's name in front of the path that an error tells."""
    if isinstance(error, LayerError):
        error.path = f"{name}.{error.path}" if error.path else name
        return
    start = "in the network's part "
    *before, last = getattr(error, "__notes__", None) or [""]
    if last.startswith(start):
        with contextlib.suppress(AttributeError):
            error.__notes__ = [*before, f"{start}{name}.{last.removeprefix(start)}"]
            return
    error.add_note(f"{start}{name}, {layer}")


# -------------------------------------------------------------------------------------- checks


def _as_parts(where: str, parts: Mapping[str, Any]) -> tuple[tuple[str, Layer], ...]:
    for name in parts:
        if name in RESERVED or name.startswith("_"):
            raise ValueError(
                f"{where}: no part can be called {name!r}: `net` itself has {', '.join(RESERVED)}, "
                "and names with a leading underscore."
            )
    return tuple((name, as_layer(p, f"{where}, part {name!r}")) for name, p in parts.items())


def _check_trees(layer: Network, params: Any, state: Any) -> None:
    """Parameters and state must be this network's: those of another would go unnoticed."""
    names = [name for name, _ in layer.parts]
    if not isinstance(params, dict) or set(params) - set(names):
        raise LayerError(
            f"{layer._name} wants parameters as a dict with keys among {names}, but got "
            f"{keys_of(params)}."
        )
    known = isinstance(state, dict) and all(isinstance(own, dict) for own in state.values())
    if not known or any(set(own) - set(names) for own in state.values()):
        raise LayerError(
            f"{layer._name} wants a state as a dict by kind, such as 'statistics', of dicts with "
            f"keys among {names}, but got {keys_of(state)}. (A network "
            "without state is called as net(params, x).)"
        )


# -------------------------------------------------------------------------------------- helpers


def type_of(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def _by_kind(states: dict[str, dict]) -> dict:
    """The parts' states by kind first: {"statistics": {part: ...}}."""
    kinds = dict.fromkeys(kind for state in states.values() for kind in state)
    return {
        kind: {name: state[kind] for name, state in states.items() if kind in state}
        for kind in kinds
    }


def _folded(key: Any, name: str) -> Any:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _found(module: Any, qualname: str) -> Any:
    for name in qualname.split("."):
        module = getattr(module, name, None)
    return module


def _network_again(module: str, qualname: str, parts: tuple) -> Network:
    return dataclasses.replace(_found(importlib.import_module(module), qualname), parts=parts)
