"""A layer: hyperparameters, and pure functions of parameters and one example.

This is all there is to the protocol. A layer is a frozen dataclass of hyperparameters that
derives from `Layer` and never holds an array:

    init(key, *xs) -> params                            a dict of arrays; {} unless defined
    init_state(*xs) -> state                            {} unless there are running statistics
    init_cache(length, *xs) -> state                    {} unless it generates step by step
    __call__(params, *xs, mode=EVALUATE) -> y           what a layer without state defines
    apply(params, state, *xs, mode=EVALUATE) -> (y, state)    what a layer with state defines

`xs` are one example's inputs. In the functions `init...` only their shapes and dtypes matter:
`jax.ShapeDtypeStruct`s will do. A batch is `jax.vmap(net, (None, 0))(params, batch)`.

A layer of your own:

    @dataclasses.dataclass(frozen=True)
    class Scale(Layer):
        start: float = 1.0

        def init(self, key, x):
            return {"scale": jnp.full(x.shape, self.start)}

        def __call__(self, params, x):       # may name mode as well, and is then given it
            return params["scale"] * x

A state is a dict keyed by kind, since kinds batch differently: `{"statistics": ...}` belongs to
the batch, `{"cache": ...}` to each example.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments
from fnn.layers.low_rank import as_array
from fnn.layers.mode import EVALUATE


class Layer:
    """The base of all layers; see the head of this file.

    Attributes:
        takes_mask: whether its second input says which steps count; a chain hands it on to such.
    """

    takes_mask = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Layer:
        if inspect.get_annotations(cls) and "__dataclass_fields__" not in cls.__dict__:
            raise TypeError(
                f"{cls.__name__} has fields, but isn't a dataclass: write "
                f"@dataclasses.dataclass(frozen=True) above `class {cls.__name__}(Layer)`."
            )
        fields = [f.name for f in getattr(cls, "__dataclass_fields__", {}).values() if f.init]
        for name, value in (*zip(fields, args, strict=False), *kwargs.items()):
            if isinstance(value, (jax.Array, np.ndarray)) and value.ndim:
                raise TypeError(
                    f"{cls.__name__}: {name} is {arguments.show(value)}, but a layer holds "
                    "hyperparameters and never arrays. What is trained is made by init."
                )
        return super().__new__(cls)

    def init(self, key: chex.PRNGKey, *xs: Any) -> dict:
        """The parameters for inputs of these shapes: a dict, nested perhaps, of arrays."""
        return {}

    def init_state(self, *xs: Any) -> dict:
        """The state to start from, `{"statistics": ...}`; {} for a layer without one."""
        return {}

    def init_cache(self, length: int, *xs: Any) -> dict:
        """The cache to generate `length` steps with, `{"cache": ...}`; {} for a layer without.

        A layer that finds a cache in its state continues from it.
        """
        return {}

    def __call__(self, params, *args: Any, **mode: Any) -> Any:
        """The output for one example. A layer with state refuses this: use `apply`."""
        if type(self).apply is Layer.apply:
            raise TypeError(
                f"{type(self).__name__} must define __call__(self, params, x), or, if it has a "
                "state, apply(self, params, state, x)."
            )
        must_have_state(self, {}, args)
        return self.apply(params, {}, *args, **mode)[0]

    def apply(self, params, state, *args: Any, **mode: Any) -> tuple[Any, dict]:
        """The output and the new state for one example."""
        if type(self).__call__ is Layer.__call__:
            return self(params, *args)  # says what is missing
        if "mode" in mode and not takes_mode(type(self).__call__):
            mode = {}
        return self(params, *args, **mode), state

    def extend(self, params: Any, cache: Any, *xs: Any) -> tuple[Any, dict]:
        """The outputs for the positions that come next, and the cache that remembers them too.

            cache = net.init_cache(100, tokens)
            y, cache = net.extend(params, cache, tokens)     any number of them at a time

        The same as `apply` in evaluation: a cache is a state.
        """
        if not isinstance(cache, dict) or "cache" not in cache:
            raise LayerError(
                f"{type(self).__name__}.extend wants what init_cache(length, x) returns, but got "
                f"{keys_of(cache)}. (A network without a cache computes all positions at once.)"
            )
        return run(self, params, cache, xs, EVALUATE)

    def _make(self, key: Any, length: int | None, *xs: Any) -> tuple[dict, dict, Any]:
        """Parameters, state and output at once: a layer made of layers does it in one pass.

        Args:
            key: to draw parameters from.
            length: of a cache to make in the place of the state, or None.
        """
        params, state = self.init(key, *xs), own_state(self, length, *xs)
        return params, state, run(self, params, state, xs, EVALUATE)[0]

    def __copy__(self) -> Layer:
        return self

    def __deepcopy__(self, memo: dict) -> Layer:
        return self  # it is frozen, and the functions that it may hold have no copies

    def __repr__(self) -> str:
        """`Linear(100, use_bias=False)`: as it is written, without what has its default."""
        fields = [f for f in dataclasses.fields(self) if f.repr]  # type: ignore[arg-type]
        fields.sort(key=lambda f: bool(f.kw_only))
        shown, positional = [], True
        for field in fields:
            value = getattr(self, field.name)
            if field.default is not dataclasses.MISSING and _same(value, field.default):
                positional = False
                continue
            positional = positional and not field.kw_only
            shown.append(_show(value) if positional else f"{field.name}={_show(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Function(Layer):
    """A plain function of arrays as a layer without parameters."""

    function: Callable

    def __call__(self, params, *xs: Any, **mode: Any) -> Any:
        check_params(self, params, {})
        return self.function(*xs)

    def __repr__(self) -> str:
        return arguments.name_of(self.function)


class LayerError(ValueError):
    """An input, a parameter or a state doesn't fit a layer; the message begins with its path.

    Attributes:
        path: where in the network the layer stands, "encoder.hidden"; "" if it stands alone.
        problem: what is wrong.
    """

    def __init__(self, problem: str, path: str = ""):
        super().__init__(problem)
        self.problem, self.path = problem, path

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem

    def __reduce__(self):
        return type(self), (self.problem, self.path), self.__dict__


def as_layer(part: Any, where: str = "as_layer") -> Layer:
    """A layer as it is; a plain function of arrays as a layer without parameters.

    Raises:
        TypeError: it is neither; the message begins with `where`.
    """
    if isinstance(part, Layer):
        return part
    name = arguments.name_of(part)
    ours = (getattr(part, "__module__", None) or "").startswith("fnn.layers")
    if inspect.isclass(part) and issubclass(part, Layer) or (callable(part) and ours):
        raise TypeError(f"{where}: {name} makes a layer and isn't one: write {name}(...).")
    if inspect.isclass(part) or not callable(part):
        raise TypeError(
            f"{where}: a part is a Layer or a function of one array, but got "
            f"{arguments.show(part)}."
        )
    return Function(part)


def run(layer: Layer, params: Any, state: dict, xs: tuple, mode: Any) -> tuple[Any, dict]:
    """A layer's output and new state, by whichever of its two functions it defines."""
    if type(layer).apply is Layer.apply:
        given = {"mode": mode} if takes_mode(type(layer).__call__) else {}
        return layer(params, *xs, **given), state
    must_have_state(layer, state, xs)
    given = {"mode": mode} if takes_mode(type(layer).apply) else {}
    return layer.apply(params, state, *xs, **given)


def takes_mode(method: Callable) -> bool:
    """Whether a layer's function names `mode` as an argument."""
    parameters = arguments.parameters(method) or []
    return any(p.name == "mode" or p.kind is p.VAR_KEYWORD for p in parameters)


def own_state(layer: Layer, length: int | None, *xs: Any) -> dict:
    """A layer's state to start from; with a length its cache, beside or in the place of it."""
    state = layer.init_state(*xs)
    return state if length is None else state | layer.init_cache(length, *xs)


def with_mask(layer: Layer, xs: tuple, mask: Any) -> tuple:
    """The inputs, with a mask of steps that was given by keyword as the second."""
    if mask is None:
        return xs
    if not layer.takes_mask:
        raise TypeError(f"{layer} was given mask=, but hands no mask on to a part that takes one.")
    if len(xs) != 1:
        raise TypeError(f"{layer} was given mask= beside {len(xs)} inputs, wanted one, a sequence.")
    return (*xs, mask)


def must_have_state(layer: Layer, state: dict, xs: tuple) -> None:
    """Raise a LayerError if a layer has a state and isn't given it.

    One that is made of layers leaves that to them.
    """
    made_of_layers = type(layer)._make is not Layer._make
    if state or made_of_layers or type(layer).init_state is Layer.init_state:
        return
    if jax.eval_shape(lambda *xs: layer.init_state(*xs), *xs):
        raise state_is_missing(layer)


def state_is_missing(layer: Layer) -> LayerError:
    return LayerError(
        f"{layer} has a state, which it wasn't given: call net.apply(params, state, x), which "
        "returns the output and the new state, and begin with state = net.init_state(x). (In "
        "training: fnn.fit(..., model_state=net.init_state(x)), or step.init(params, that).)"
    )


def check_params(
    layer: Layer, params: Any, shapes: Mapping[str, tuple[int, ...]], x: Any = None
) -> None:
    """Raise a LayerError unless a layer's parameters are arrays of these names and shapes.

    What has no shape to compare, as a Python number, is refused as well: all else would be
    broadcast in silence. x is the input that the shapes come from, if they do: it may be the one
    that is wrong.
    """
    names = sorted(shapes)
    if not isinstance(params, dict) or set(params) != set(shapes):
        got = keys_of(params)
        wanted = f"wants parameters with the keys {names}" if names else "has no parameters"
        raise LayerError(f"{layer} {wanted}, but got {got}.")
    for name, shape in shapes.items():
        found = getattr(params[name], "shape", None)
        if found != shape:
            shown = f"one of shape {found}" if found is not None else arguments.show(params[name])
            of_input = f", with an input of shape {x.shape}" if hasattr(x, "shape") else ""
            raise LayerError(f"{layer} wants {name} of shape {shape}, but got {shown}{of_input}.")


def check_parts(layer: Layer, params: Any, names: Sequence[str]) -> None:
    """Raise a LayerError unless a layer's parameters are a dict with these keys."""
    if not isinstance(params, dict) or set(params) != set(names):
        raise LayerError(
            f"{layer} wants parameters with the keys {sorted(names)}, but got {keys_of(params)}."
        )


def set_number(layer: Layer, name: str, **bounds: Any) -> None:
    """Check a number among a layer's hyperparameters, and make it Python's."""
    value = arguments.number(type(layer).__name__, name, getattr(layer, name), **bounds)
    object.__setattr__(layer, name, float(value))


def set_count(layer: Layer, name: str) -> None:
    """Check a count of at least 1 among a layer's hyperparameters, and make it Python's."""
    value = arguments.integer(type(layer).__name__, name, getattr(layer, name), least=1)
    object.__setattr__(layer, name, value)


def weight(layer: Layer, params: Any, name: str = "W") -> Any:
    """The weight of a layer's parameters that a layer around it changes; of an adapted kernel the
    sum, which is an array."""
    if not isinstance(params, dict) or name not in params:
        raise LayerError(
            f"{layer} wants parameters with the key '{name}', but got {keys_of(params)}."
        )
    return as_array(params[name])


def keys_of(params: Any) -> str:
    """What there is in the place of a dict of parameters, in a few words."""
    if isinstance(params, dict):
        return str(sorted(map(str, params)))
    return "None" if params is None else f"a {type(params).__name__}"


def initial(layer: Layer, initializer: Callable, key: Any, shape: tuple[int, ...]) -> jax.Array:
    """What an initialiser makes when asked for the parameters' dtype, float32 (float64 under x64).

    Its shape is checked: a wrong one would be broadcast in silence. Its dtype is the initialiser's.
    """
    made = initializer(key, shape, jnp.result_type(float))
    if getattr(made, "shape", None) != shape:
        raise LayerError(
            f"{layer}: the initialiser {arguments.name_of(initializer)} must make an array of "
            f"shape {shape}, but made {arguments.show(made)}."
        )
    return made


def last_axis(layer: Layer, x: Any) -> int:
    """The length of the last axis of a layer's input."""
    if not hasattr(x, "shape") or len(x.shape) == 0:
        got = f"shape {x.shape}" if hasattr(x, "shape") else arguments.show(x)
        raise LayerError(f"{layer} wants an array of shape (in,) as its input, but got {got}.")
    return x.shape[-1]


def _show(value: Any) -> str:
    is_function = callable(value) and not isinstance(value, Layer)
    return arguments.name_of(value) if is_function else repr(value)


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and value == default)
