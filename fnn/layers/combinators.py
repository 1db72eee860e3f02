"""Layers made of layers: `chain`, `parallel`, `residual`.

The parts may be given by position or by name, and are layers or plain functions:

    chain(Linear(100), relu, Linear(10))                                 parameters: a tuple
    chain(hidden=Linear(100), activation=relu, output=Linear(10))        parameters: a dict

A tuple of parameters has an entry for each part (`()` for one without parameters). A dict
has one for each part that has parameters, so that `params["hidden"]["W"]` reads well and a
checkpoint holds nothing empty.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from fnn import arguments
from fnn.layers.layer import Construction, Layer, as_layer, constructor

Part = Layer | Callable


def combinator(make: Callable[..., Layer]) -> Callable[..., Layer]:
    """Decorate a function of layers that makes a layer: plain functions become layers first."""
    name, record = make.__name__, constructor(make)

    @functools.wraps(make)
    def combine(*layers: Part, **named: Part) -> Layer:
        if layers and named:
            raise TypeError(
                f"{name}: got {len(layers)} layers by position and {sorted(named)} by name. "
                "Name all of them or none."
            )
        layer = record(
            *[as_layer(part, f"{name}, part {i}") for i, part in enumerate(layers)],
            **{key: as_layer(part, f"{name}, part '{key}'") for key, part in named.items()},
        )
        # What a reader calls, and what pickle finds under the name.
        assert isinstance(layer.made_by, Construction)
        layer.made_by = dataclasses.replace(layer.made_by, constructor=combine)
        return layer

    combine.is_constructor = True  # type: ignore[attr-defined]
    return combine


@combinator
def chain(*layers: Part, **named: Part) -> Layer:
    """One layer after the other: the output of each is the input of the next.

    Args:
        *layers: layers or functions of one array, in order; or
        **named: the same by name. Not both.

    Returns:
        A Layer; its parameters are a tuple, or a dict if the parts are named. An empty chain
        is the identity.

    Raises:
        TypeError: a part is neither a layer nor a function, or some are named and some not.

    An error inside a part says in a note which part it was.

    >>> net = chain(hidden=Linear(100), activation=relu, output=Linear(10))
    >>> params = net.init(jax.random.key(0), jnp.zeros(784))
    >>> params["hidden"]["W"].shape
    (100, 784)
    """
    parts = _parts(layers, named)

    def init(key, x):
        params = {}
        for k, (name, part) in zip(_keys("chain", key, parts), parts.items(), strict=True):
            with _naming(name, part):
                params[name] = part.init(k, x)
                x = jax.eval_shape(lambda p, x, f=part.apply: f(p, x), params[name], x)
        return _gather(params)

    def apply(params, x):
        for name, part, own in _each("chain", parts, params):
            with _naming(name, part):
                x = part.apply(own, x)
        return x

    return Layer(init, apply)


@combinator
def parallel(*layers: Part, **named: Part) -> Layer:
    """The same input to every part; the outputs side by side.

    Returns:
        A Layer whose output is a tuple of the parts' outputs, or a dict if they are named.
        What to do with them is for the next layer:
        `chain(parallel(f, g), lambda ys: ys[0] + ys[1])`.

    Arguments, parameters and errors are as in `chain`.
    """
    parts = _parts(layers, named)

    def init(key, x):
        params = {}
        for k, (name, part) in zip(_keys("parallel", key, parts), parts.items(), strict=True):
            with _naming(name, part):
                params[name] = part.init(k, x)
        return _gather(params)

    def apply(params, x):
        outs = {}
        for name, part, own in _each("parallel", parts, params):
            with _naming(name, part):
                outs[name] = part.apply(own, x)
        return outs if named else tuple(outs.values())

    return Layer(init, apply)


@combinator
def residual(*layers: Part, **named: Part) -> Layer:
    """y = x + chain(...)(x): the gradient reaches x undiminished through the sum.

    Arguments and parameters are as in `chain`.

    He et al., "Deep residual learning for image recognition", CVPR 2016, equation 1. For its
    equation 2, a projection beside the branch: `chain(parallel(branch, projection), add)`.

    Raises:
        ValueError: the chain changes the shape of x.
    """
    inner = chain(*layers, **named)

    def apply(params, x):
        y = inner.apply(params, x)
        if getattr(y, "shape", None) != x.shape:
            got = f"has shape {y.shape}" if hasattr(y, "shape") else f"is a {type(y).__name__}"
            raise ValueError(
                f"residual: x + f(x) wants f(x) of the shape of x, {x.shape}, but f(x) {got}, with "
                f"f = {inner}."
            )
        return x + y

    return Layer(inner.init, apply)


def _parts(layers: tuple, named: dict) -> dict[str | int, Any]:
    return named if named else dict(enumerate(layers))


def _keys(where: str, key, parts) -> list:
    return list(jax.random.split(arguments.key(where, "key", key), len(parts))) if parts else []


def _gather(params: dict[str | int, Any]) -> Any:
    if all(isinstance(name, int) for name in params):
        return tuple(params.values())
    return {name: own for name, own in params.items() if jax.tree.leaves(own)}


def _each(combinator: str, parts: dict, params: Any) -> Iterator[tuple[str | int, Layer, Any]]:
    """Each part with its own parameters."""
    if isinstance(params, tuple) and not params:
        own = {}  # no parameters: a chain by name left them out
    elif all(isinstance(name, int) for name in parts):
        if not isinstance(params, (tuple, list)) or len(params) != len(parts):
            size = f" of {len(params)}" if isinstance(params, (tuple, list)) else ""
            raise ValueError(
                f"{combinator}: wants its parameters as a tuple with an entry for each of its "
                f"{len(parts)} parts, but got a {type(params).__name__}{size}."
            )
        own = dict(enumerate(params))
    else:
        if not isinstance(params, dict) or set(params) - set(parts):
            got = sorted(params) if isinstance(params, dict) else f"a {type(params).__name__}"
            raise ValueError(
                f"{combinator}: wants its parameters as a dict with keys among {list(parts)}, "
                f"but got {got}."
            )
        own = params
    for name, part in parts.items():
        yield name, part, own.get(name, ())


@contextlib.contextmanager
def _naming(name: str | int, part: Layer):
    """Name the part in the profiler, in the graph, and in a note to any error from inside."""
    try:
        with jax.named_scope(_title(name, part)):
            yield
    except Exception as error:
        error.add_note(f"in part {name!r}, {part}")
        raise


def _title(name: str | int, part: Layer) -> str:
    """The part's name; "Linear 0" for the first of several without one."""
    if isinstance(name, str):
        return name
    kind = part.made_by.name if part.made_by else "<layer>"
    return f"part {name}" if kind.startswith("<") else f"{kind} {name}"
