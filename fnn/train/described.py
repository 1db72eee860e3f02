"""Losses, optimisers and options as short text without addresses, for a `repr`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from fnn import arguments


def option(value: Any) -> str:
    """`supervised(...)`, `a_function`, `bfloat16`, `'*.head.*'`."""
    shown = repr(value)
    if isinstance(value, type) or (callable(value) and " at 0x" in shown):
        return arguments.name_of(value)
    return shown


def transformations(optimizer: Any) -> str:
    """`chain(scale_by_adam, scale)`: what made an optax transformation.

    An optax transformation is two functions without a name of their own. The function that made
    them is in theirs, and the parts of a chain are in its closure, by their names in optax's
    source; where they aren't, the chain is shown alone.
    """
    return _maker(getattr(optimizer, "update", optimizer))


def _maker(update: Callable) -> str:
    while isinstance(update, functools.partial):
        update = update.func
    if inspect.ismethod(update):
        return type(update.__self__).__name__
    holds = _closure(update)
    wrapped = getattr(holds.get("tx"), "update", None)  # of `with_extra_args_support`
    if wrapped is not None and update.__qualname__.startswith("with_extra_args_support."):
        return _maker(wrapped)
    name = getattr(update, "__qualname__", type(update).__qualname__).split(".")[0]
    parts = holds.get("update_fns", ())
    return f"{name}({', '.join(map(_maker, parts))})" if parts else name


def _closure(function: Any) -> dict[str, Any]:
    """The variables that a function closes over."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    found = {}
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return found
