"""What fnn reads of a jaxpr, JAX's own record of a traced function.

JAX traces a function to a list of equations, each with a primitive, parameters, inputs and
outputs. Here this list becomes a `Program`: calls of jitted functions are inlined, and
every value has a number, its place in the list of all values. All that depends on how a
JAX version spells a jaxpr stands in this file (and, for primitives of our own, in
`fnn/operation.py`).
"""

from __future__ import annotations

import dataclasses
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr

from fnn.operation import Call, LinearMap, MappedCall, MappedLinearMap


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Equation:
    """`outs = primitive(ins; params)`, with the inputs and outputs as numbers of values.

    scope: the names of the jitted functions and `jax.named_scope`s that it stands in.
    """

    primitive: Any
    params: dict
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    scope: tuple[str, ...]
    context: Any
    source_info: Any
    has_effects: bool

    @property
    def name(self) -> str:
        return self.primitive.name

    def apply(self, values: Sequence) -> list:
        """The outputs at these inputs; traceable like any JAX function."""
        with self.context.manager:
            outs = self.primitive.bind(*values, **self.primitive.get_bind_params(self.params))
        return list(outs) if self.primitive.multiple_results else [outs]

    def is_derivative_of_operation(self) -> bool:
        """Is it the linear map that stands for the derivative of an fnn operation?"""
        return isinstance(self.params.get("linear"), (LinearMap, MappedLinearMap))

    def operation(self) -> Call | MappedCall | None:
        """The fnn operation, with its static arguments, that this equation calls, if it does."""
        call = self.params.get("call")
        return call if isinstance(call, (Call, MappedCall)) else None


@dataclasses.dataclass(eq=False)
class Program:
    """A traced function as a flat list of equations in topological order.

    avals: the type (shape, dtype, ...) of each value.
    inputs, outputs: numbers of the values that go in and come out.
    constants: the values that are known already: literals and closed-over arrays.
    """

    avals: list
    inputs: list[int]
    outputs: list[int]
    constants: dict[int, Any]
    equations: list[Equation]

    def values(self, args: Sequence) -> list:
        """A list with a place for every value, the inputs and the constants filled in."""
        values: list = [None] * len(self.avals)
        for i, constant in self.constants.items():
            values[i] = constant
        for i, arg in zip(self.inputs, args, strict=True):
            values[i] = arg
        return values


def trace(function: Callable, args: Sequence) -> Any:
    """The jaxpr of a function of arrays (or of their types) that returns a list of arrays.

    What no output needs is left out, also inside loops: a scan's unused results, for one.
    """
    closed = jax.make_jaxpr(function)(*args)
    live, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return close(live, closed.consts)


def program(closed_jaxpr, inline: bool = True) -> Program:
    """Flatten a jaxpr; with `inline`, calls of jitted functions become part of the list."""
    flat = Program([], [], [], {}, [])

    def new(aval) -> int:
        flat.avals.append(aval)
        return len(flat.avals) - 1

    def constant(value, aval) -> int:
        number = new(aval)
        flat.constants[number] = value
        return number

    def walk(jaxpr, consts, ins, scope, source=None) -> list[int]:
        numbers = dict(zip(jaxpr.invars, ins, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            numbers[var] = constant(value, var.aval)

        def read(atom) -> int:
            return constant(atom.val, atom.aval) if isinstance(atom, Literal) else numbers[atom]

        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            within = scope + _scopes(eqn)
            inner = _inlined(eqn) if inline else None
            if inner is not None:
                name = eqn.params.get("name", "")
                # JAX traces its own functions once: the lines noted inside are the first user's.
                here = source or (eqn.source_info if _is_of_library(inner.jaxpr) else None)
                deeper = (*within, name) if name else within
                outs = walk(inner.jaxpr, inner.consts, ins, deeper, here)
                numbers.update(zip(eqn.outvars, outs, strict=True))
                continue
            outs = [new(v.aval) for v in eqn.outvars]
            numbers.update(zip(eqn.outvars, outs, strict=True))
            flat.equations.append(
                Equation(
                    eqn.primitive,
                    eqn.params,
                    tuple(ins),
                    tuple(outs),
                    within,
                    eqn.ctx,
                    source or eqn.source_info,
                    bool(eqn.effects),
                )
            )
        return [read(v) for v in jaxpr.outvars]

    flat.inputs = [new(v.aval) for v in closed_jaxpr.jaxpr.invars]
    flat.outputs = walk(closed_jaxpr.jaxpr, closed_jaxpr.consts, flat.inputs, ())
    return flat


def _inlined(eqn):
    """The jaxpr of a call that can be inlined: jit without shardings, and closed calls."""
    if eqn.primitive.name in ("jit", "pjit"):
        shardings = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
        # JAX keeps the class that stands for "no sharding given" to itself.
        if all(type(s).__name__ == "UnspecifiedValue" for s in shardings):
            return eqn.params["jaxpr"]
    elif eqn.primitive.name in ("closed_call", "core_closed_call"):
        return eqn.params["call_jaxpr"]
    return None


def _scopes(eqn) -> tuple[str, ...]:
    stack = str(eqn.source_info.name_stack)
    return tuple(stack.split("/")) if stack else ()


def close(jaxpr, consts=()) -> Any:
    """A jaxpr together with the values of its constants."""
    return jaxpr if hasattr(jaxpr, "consts") else ClosedJaxpr(jaxpr, consts)


def inner_jaxprs(equation: Equation) -> dict[str, Any]:
    """The jaxprs that a control-flow equation holds, by their role."""
    found = {}
    for name, value in equation.params.items():
        if hasattr(value, "eqns"):
            found[name] = close(value)
        elif isinstance(value, (tuple, list)) and value and hasattr(value[0], "eqns"):
            found.update({f"{name}[{i}]": close(j) for i, j in enumerate(value)})
    return found


def scan_layout(params: dict) -> tuple[int, int]:
    """How many constants and how many carried values a scan has."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def called_function(equation: Equation) -> str:
    """The name of the function that a `custom_jvp` or `custom_vjp` call calls, or ""."""
    if equation.name not in ("custom_jvp_call", "custom_vjp_call"):
        return ""
    return equation.params["call_jaxpr"].jaxpr.debug_info.func_name or ""


def source_line(source_info) -> str:
    """`file.py:12 (function)`, the user's line that made an equation, or an empty string."""
    for frame in user_frames(source_info):
        return f"{os.path.basename(frame.file_name)}:{frame.line_num} ({frame.function_name})"
    return ""


def user_frames(source_info, outermost: str = "") -> Iterator[Any]:
    """The frames of the stack that made an equation that are the user's, from the inside out.

    Not JAX's, not fnn's, and not those of installed packages, unless there are no others.

    outermost: the file to stop at.
    """
    traceback = source_info.traceback
    frames = []
    for frame in traceback.frames if traceback is not None else ():
        if frame.file_name == outermost:
            break
        if not frame.file_name.startswith(_LIBRARIES):
            frames.append(frame)
    own = [frame for frame in frames if not frame.file_name.startswith(_INSTALLED)]
    return iter(own or frames)


_LIBRARIES = (
    os.path.dirname(os.path.abspath(__file__)) + os.sep,
    os.path.dirname(os.path.abspath(jax.__file__)) + os.sep,
    "<frozen",
)
_INSTALLED = tuple(sysconfig.get_paths()[p] + os.sep for p in ("stdlib", "purelib", "platlib"))


def _is_of_library(jaxpr) -> bool:
    """Was it made from one of JAX's or fnn's own functions?"""
    return (jaxpr.debug_info.func_filename or "").startswith(_LIBRARIES)


def is_inexact(aval) -> bool:
    """Is it a real or complex array, so that it can have a gradient?"""
    return jax.dtypes.issubdtype(aval.dtype, jnp.inexact)


def zeros(aval) -> jax.Array:
    """Zeros of a type; under shard_map varying over the same devices."""
    return as_varying(lax.full(aval.shape, 0, aval.dtype), aval)


def as_varying(array, aval):
    """The array, marked under shard_map as varying over the devices that `aval` varies over."""
    missing = _varying(aval) - _varying(jax.typeof(array))
    return lax.pcast(array, tuple(missing), to="varying") if missing else array


def _varying(aval) -> frozenset:
    return getattr(getattr(aval, "manual_axis_type", None), "varying", frozenset())
