"""The checks of what a caller passes: numbers, counts, choices, functions, keys and arrays.

One function for each kind of argument, used by every public function that takes one, so that
each kind is checked in the same way and refused in the same words. They look at what is known
where the call stands; of a traced value that is its shape and dtype.

The checks, whose first argument is `where`, the public function's name, return the value, raise a
TypeError for what is of the wrong type and a ValueError for what is of the right type and out of
range, and begin the message with `where`. The other functions find out what they say in, and what
messages show.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LARGEST_SHOWN = 60


def number(
    where: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    infinite: bool = False,
) -> Any:
    """A real number: Python's, numpy's, or an array of shape (). Never nan, never a bool.

    Args:
        where: the public function that was called.
        name: the argument.
        value: what was passed.
        above, least: an open, a closed lower bound.
        below, most: an open, a closed upper bound.
        infinite: whether inf is allowed (within the bounds).
    """
    wanted = _wanted_number("a number", above, least, below, most, infinite)
    if _is_traced(value):
        if value.shape != () or not _is_real(value.dtype):
            raise TypeError(_wrong(where, name, wanted, value))
        return value
    if not _is_number(value):
        raise TypeError(_wrong(where, name, wanted, value))
    x = float(value)
    fits = (
        not math.isnan(x)
        and (infinite or not math.isinf(x))
        and (above is None or x > above)
        and (least is None or x >= least)
        and (below is None or x < below)
        and (most is None or x <= most)
    )
    if not fits:
        raise ValueError(_wrong(where, name, wanted, value))
    return value


def fixed_number(where: str, name: str, value: Any, **bounds: Any) -> float:
    """The same as a Python float, of which the program is made: not traced."""
    number(where, name, value, **bounds)
    if _is_traced(value):
        raise TypeError(_wrong(where, name, "a number that is known, under jit too", value))
    return float(value)


def integer(
    where: str, name: str, value: Any, *, least: int | None = None, most: int | None = None
) -> int:
    """A whole number of an integer type, as a Python int; not a bool, not 3.0, not traced."""
    wanted = _wanted_number("an integer", None, least, None, most, True)
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
    if isinstance(value, (np.ndarray, jax.Array)) and not _is_traced(value):
        is_integer = value.shape == () and jnp.issubdtype(value.dtype, jnp.integer)
    if not is_integer:
        raise TypeError(_wrong(where, name, wanted, value))
    count = int(value)
    if (least is not None and count < least) or (most is not None and count > most):
        raise ValueError(_wrong(where, name, wanted, value))
    return count


def flag(where: str, name: str, value: Any) -> bool:
    """True or False, and nothing that only counts as one of them."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(_wrong(where, name, "True or False", value))
    return bool(value)


def choice(where: str, name: str, value: Any, options: Collection[str | None]) -> Any:
    """One of a few words."""
    known = [o for o in options if type(o) is type(value) and o == value]
    if known:
        return known[0]
    *first, last = (repr(o) for o in options)
    wanted = f"{', '.join(first)} or {last}" if first else last
    kind = ValueError if isinstance(value, str) else TypeError
    raise kind(_wrong(where, name, wanted, value))


def is_known(*values: Any) -> bool:
    """Are the values there, and not only their types, as under `jit`?"""
    return not any(map(_is_traced, values))


def function(where: str, name: str, value: Any, form: str = "a function") -> Callable:
    """Something to call; `form` says how it is called: "a function loss(params, example)"."""
    if not callable(value):
        raise TypeError(_wrong(where, name, form, value))
    return value


def name_of(function: Any) -> str:
    """What to call a function: its name, or that of the function it is a partial of."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return getattr(function, "__name__", None) or type(function).__name__


def positional(function: Callable) -> list[inspect.Parameter] | None:
    """The arguments that a function takes by position; None if Python can't tell."""
    found = parameters(function)
    return None if found is None else [p for p in found if p.kind in POSITIONAL]


def parameters(function: Callable) -> list[inspect.Parameter] | None:
    """All of a function's arguments; None if Python can't tell, as of some written in C."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def key(where: str, name: str, value: Any) -> jax.Array:
    """One PRNG key: a scalar `jax.random.key`, or the uint32 array of `jax.random.PRNGKey`."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        if shape == ():
            return value
        raise ValueError(_wrong(where, name, "one key (shape ())", value))
    wanted = "a key, such as jax.random.key(0)"
    if dtype is not None and dtype == np.uint32:
        impl = jax.config.jax_default_prng_impl  # type: ignore[attr-defined]
        if shape == _raw_key_shape(impl):
            return value
        raise ValueError(_wrong(where, name, wanted, value))
    raise TypeError(_wrong(where, name, wanted, value))


def array(where: str, name: str, value: Any) -> Any:
    """Something with a shape and a dtype that JAX computes in, or a Python number.

    A list is refused and not converted, as by `jax.numpy`: it is a pytree.
    """
    try:
        jax.typeof(value)
    except TypeError:
        raise TypeError(_wrong(where, name, "an array", value)) from None
    return value


def no_result(where: str, name: str, value: Any) -> None:
    """Not what `fnn.fit` returns, nor a training state, where what is in it belongs."""
    fields = getattr(type(value), "_fields", ())
    if not isinstance(value, tuple) or "params" not in fields:
        return
    if "history" in fields:
        raise TypeError(
            f"{where}: {name} is the FitResult of fnn.fit: pass its `.params`. (fnn.fit and a step "
            "go on from its `.state`.)"
        )
    if "opt_state" in fields:
        raise TypeError(f"{where}: {name} is a training State: pass its `.params`.")


@contextlib.contextmanager
def one_example(loss: Callable, example: Any) -> Iterator[None]:
    """A note to errors from inside a loss: it was given one example, of these shapes.

    That it must be written for one example, and not for a batch, is easily forgotten, and the
    error that comes of it is about some shape deep inside.
    """
    try:
        yield
    except Exception as error:
        error.add_note(
            f"{name_of(loss)} was called with ONE example, {shapes(example)}: a loss is written "
            "for one example, loss(params, example), and is mapped over the batch for you."
        )
        raise


def shapes(tree: Any) -> str:
    """A tree with dtypes and shapes in the place of its arrays: `(float32[2], int32[])`."""
    return str(jax.tree.map(_shape, tree)).replace("'", "")


def missing(what: str, *requirements: str, otherwise: str = "") -> ImportError:
    """The error for a package that isn't installed, with the line to type.

    The line names the package itself. An extra of fnn's own, `fnn[plot]`, would be looked for
    among the published distributions, where a checkout's isn't.

    Args:
        what: what needs it: "fnn.plot".
        requirements: as in pyproject.toml: "matplotlib>=3.9".
        otherwise: what can be done without it, a sentence.
    """
    names = " and ".join(re.split("[<>=!~]", r)[0] for r in requirements)
    line = " ".join(f'"{r}"' if re.search("[<>=!~]", r) else r for r in requirements)
    more = f"\n{otherwise}" if otherwise else ""
    return ImportError(f"{what} needs {names}: pip install {line}{more}")


def show(value: Any) -> str:
    """A value in an error message, in a line: arrays by dtype and shape, long ones shortened."""
    if hasattr(value, "shown_in_errors"):  # it has a shape and a dtype, and yet is no array
        return value.shown_in_errors
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        kind = "a traced array" if _is_traced(value) else "an array"
        if value.shape == () and not _is_traced(value) and _is_plain(value.dtype):
            return f"{value} ({value.dtype}, shape ())"
        return f"{kind} of dtype {value.dtype} and shape {tuple(value.shape)}"
    text = repr(value)
    if len(text) > _LARGEST_SHOWN:
        text = text[: _LARGEST_SHOWN - 3] + "..."
    if value is None or isinstance(value, (bool, int, float)):
        return text
    return f"{text} of type {type(value).__name__}"


def _wrong(where: str, name: str, wanted: str, value: Any) -> str:
    return f"{where}: {name} must be {wanted}, but got {show(value)}."


@functools.lru_cache(maxsize=8)
def _raw_key_shape(implementation: str) -> tuple[int, ...]:
    """The shape of `jax.random.PRNGKey`'s arrays, by the name of JAX's setting."""
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=implementation))).shape


def _shape(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else type(x).__name__


def _wanted_number(kind, above, least, below, most, infinite) -> str:
    """ "a positive finite number", "an integer of at least 1", ..."""
    if (above, least, below, most) == (0, None, None, None):
        words = f"a positive {kind.split()[-1]}"
    else:
        low = f"above {above}" if above is not None else f"of at least {least}"
        high = f"below {below}" if below is not None else f"of at most {most}"
        bounds = [low] * (above is not None or least is not None)
        bounds += [high] * (below is not None or most is not None)
        words = " ".join([kind, " and ".join(bounds)]) if bounds else kind
    if infinite or below is not None or most is not None:
        return words
    return words.replace("number", "finite number")


def _is_plain(dtype: Any) -> bool:
    return isinstance(dtype, np.dtype) and dtype.kind in "biuf"  # a key's dtype is JAX's own


def _is_number(value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return False
    if isinstance(value, (int, float, np.integer, np.floating)):
        return True
    is_scalar = isinstance(value, (np.ndarray, jax.Array)) and value.shape == ()
    return is_scalar and _is_real(value.dtype)


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _is_traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)
