"""A node of a computational graph: one value, and the operation that made it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy

from fnn import text
from fnn.backprop.scopes import scope_name
from fnn.backprop.source import user_calls
from fnn.frames import source_line
from fnn.jaxpr import Equation, Inlined, inner_jaxprs
from fnn.operation import call_of


@dataclasses.dataclass(eq=False)
class Node:
    """One value of the computation, and the operation that made it.

    Attributes:
        number: its place in the graph's order; an operation comes after its inputs. None for
            a constant (a literal or a closed-over array), which isn't in the list of nodes.
        label: what to call it: an argument's path (`x`, `params['hidden']['W']`), the variable
            that the source assigns it to, or `v7`.
        operation: the fnn operation, the `custom_jvp` function or the primitive; "input" or
            "constant" if there's none.
        result: which of the operation's results it is, None if it has only one.
        inputs: the nodes that the operation reads, constants included, in the order of its
            arguments.
        shape, dtype: the value's.
        value: an array; None in a graph without values.
        gradient: an array of the value's shape and dtype, None before `backprop` and where
            no gradient can reach (integers, and what doesn't depend on a differentiable input).
        differentiable: whether it's a real or complex array that depends on such an input.
        equation: the equation that made it, None for an input or a constant.
        inlined: the calls of jitted functions that it stands in, the outer before the inner.
        bodies: makes `graphs`, where the operation holds functions.
    """

    number: int | None
    label: str
    operation: str
    inputs: tuple[Node, ...]
    shape: tuple[int, ...]
    dtype: Any
    value: Any = None
    gradient: Any = None
    differentiable: bool = False
    result: int | None = None
    equation: Equation | None = dataclasses.field(default=None, repr=False)
    inlined: Sequence[Inlined] = dataclasses.field(default=(), repr=False)
    bodies: Callable[[Node], dict[str, Any]] | None = dataclasses.field(default=None, repr=False)

    def __repr__(self):
        kind = text.type_of(self.shape, self.dtype)
        made = f" = {self.operation}({text.listed([n.label for n in self.inputs])})"
        return f"<Node {self.label}: {kind}{made if self.equation else ''}>"

    @property
    def params(self) -> dict[str, Any]:
        """The operation's parameters, without the functions that it holds (see `graphs`)."""
        if self.equation is None:
            return {}
        call = call_of(self.equation)
        if call is not None:
            return dict(getattr(call, "static", ()))
        held = {role.split("[")[0] for role in inner_jaxprs(self.equation)}
        return {k: v for k, v in self.equation.params.items() if k not in held}

    @property
    def source(self) -> str:
        """`file.py:12 (function)`: the user's line that made it."""
        return "" if self.equation is None else source_line(self.equation.source_info)

    @property
    def scope(self) -> tuple[str, ...]:
        """The names of the jitted functions and `jax.named_scope`s that it stands in."""
        if self.equation is None:
            return ()
        return tuple(filter(None, map(scope_name, self.equation.scope)))

    @property
    def calls(self) -> tuple[tuple[str, str, int], ...]:
        """The user's stack, outermost first: (function, file, line) down to the line above."""
        if self.equation is None:
            return ()
        return user_calls(self.equation)

    @functools.cached_property
    def graphs(self) -> dict[str, Any]:
        """The `Graph`s of the bodies of a scan, cond, while_loop or checkpoint, without values."""
        return {} if self.bodies is None else self.bodies(self)


def is_value(leaf: Any) -> bool:
    """Can it be the value of a node: an array, a number, or the type of an array?

    A bool can't: a function takes it as a switch.
    """
    if isinstance(leaf, (bool, numpy.bool_)):
        return False
    arrays = (jax.Array, numpy.ndarray, numpy.generic, jax.ShapeDtypeStruct)
    return isinstance(leaf, (*arrays, int, float, complex))


def as_value(x: Any) -> jax.Array | jax.ShapeDtypeStruct:
    """An array as JAX's, and a type of an array as it is."""
    return x if isinstance(x, (jax.Array, jax.ShapeDtypeStruct)) else jnp.asarray(x)
