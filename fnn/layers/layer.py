"""A layer: a pair of pure functions.

    init(key, x) -> params        parameters for inputs of the shape and dtype of x
    apply(params, x) -> y         the layer's output for one example x

`x` may be an array or a `jax.ShapeDtypeStruct` in `init`: only its shape and dtype matter.
A batch is `jax.vmap(net.apply, (None, 0))(params, batch)`.

A layer of your own is two functions and `Layer(init, apply)`. Under `@constructor` it also
has a name to print and to appear under in `fnn.summary`:

    @constructor
    def Scale(start=1.0):
        def init(key, x):
            return jnp.full(x.shape, start, x.dtype)

        def apply(params, x):
            return params * x

        return Layer(init, apply)
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec

import jax

from fnn import arguments

Params = Any
P = ParamSpec("P")


class _Pair(NamedTuple):
    init: Callable[[jax.Array, Any], Params]
    apply: Callable[[Params, jax.Array], Any]


class Layer(_Pair):
    """A pair `(init, apply)`; see the head of this file.

    Fields:
        init: `init(key, x) -> params`.
        apply: `apply(params, x) -> y`, pure.

    `made_by` records the constructor's call that made the layer, for printing only.
    """

    made_by: Construction | PlainFunction | None = None

    def __new__(cls, init: Callable, apply: Callable) -> Layer:
        arguments.function("Layer", "init", init, "a function init(key, x)")
        arguments.function("Layer", "apply", apply, "a function apply(params, x)")
        return super().__new__(cls, init, apply)

    def __repr__(self):
        return str(self.made_by) if self.made_by else f"Layer({name_of(self.apply)})"

    def __reduce__(self):
        """Pickled as the call that made it: its functions stand inside that call's."""
        if isinstance(self.made_by, Construction):
            return _construct, (self.made_by.constructor, self.made_by.args, self.made_by.kwargs)
        if isinstance(self.made_by, PlainFunction):
            return as_layer, (self.made_by.function,)
        return Layer, tuple(self)

    def __copy__(self) -> Layer:
        return self  # a pair of pure functions: nothing in it changes

    def __deepcopy__(self, memo: dict) -> Layer:
        return self


@dataclasses.dataclass(frozen=True)
class Construction:
    """The call that made a layer: `constructor(*args, **kwargs)`."""

    constructor: Callable[..., Layer]
    args: tuple
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        return name_of(self.constructor)

    def __str__(self):
        args = [_show(a) for a in self.args]
        kwargs = [f"{k}={_show(v)}" for k, v in self.kwargs.items()]
        return f"{self.name}({', '.join(args + kwargs)})"


def _construct(make: Callable[..., Layer], args: tuple, kwargs: Mapping[str, Any]) -> Layer:
    return make(*args, **kwargs)


def constructor(make: Callable[P, Layer]) -> Callable[P, Layer]:
    """Decorate a function that makes a layer, so that the layer knows how it was made."""

    arguments.function("constructor", "make", make, "a function that makes a Layer")

    @functools.wraps(make)
    def construct(*args: P.args, **kwargs: P.kwargs) -> Layer:
        layer = Layer(*make(*args, **kwargs))
        layer.made_by = Construction(construct, args, kwargs)
        return layer

    construct.is_constructor = True  # type: ignore[attr-defined]
    return construct


def as_layer(function: Any, where: str = "as_layer") -> Layer:
    """The layer of a plain function of one array: no parameters (`()`), and the function.

    Raises:
        TypeError: it is neither a layer nor a function; the message begins with `where`.
    """
    if isinstance(function, Layer):
        return function
    if isinstance(function, tuple) and len(function) == 2 and all(map(callable, function)):
        return Layer(*function)
    if getattr(function, "is_constructor", False):
        name = name_of(function)
        raise TypeError(f"{where}: {name} makes a layer and isn't one: write {name}(...).")
    if inspect.isclass(function) or not callable(function):
        raise TypeError(
            f"{where}: a layer is a Layer(init, apply) or a function of one array, but got "
            f"{arguments.show(function)}."
        )

    def init(key, x):
        del key, x
        return ()

    def apply(params, x):
        del params
        return function(x)

    layer = Layer(init, apply)
    layer.made_by = PlainFunction(function)
    return layer


@dataclasses.dataclass(frozen=True)
class PlainFunction:
    """In the place of a Construction: the plain function that became a layer."""

    function: Callable

    @property
    def name(self) -> str:
        return name_of(self.function)

    def __str__(self):
        return self.name


def name_of(function: Any) -> str:
    """What to call a function: its name, or that of the function it is a partial of."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return getattr(function, "__name__", None) or type(function).__name__


def _show(value: Any) -> str:
    return name_of(value) if callable(value) and not isinstance(value, Layer) else repr(value)
