"""What fnn reads of a jaxpr, JAX's own record of a traced function.

JAX traces a function to a list of equations, each with a primitive, parameters, inputs and
outputs. Here this list becomes a `Program`: calls of jitted functions are inlined, and
every value has a number, its place in the list of all values. All that depends on how a
JAX version spells a jaxpr stands in this file (and, for primitives of our own, in
`fnn/operation.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sysconfig
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal, Primitive
from jax.interpreters import ad, batching
from jax.interpreters.partial_eval import DynamicJaxprTracer, dce_jaxpr
from jax.sharding import NamedSharding

from fnn.operation import (
    Axis,
    Call,
    LinearMap,
    MappedCall,
    MappedLinearMap,
    as_varying,
    mapped_results,
    varying_axes,
)


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
        """The outputs at these inputs; traceable like any JAX function.

        Outside jit, nothing is compiled again that was compiled before (see `_evaluated`).
        """
        if self.name in _HOLDS_FUNCTIONS and not is_staged(values):
            if any(isinstance(v, jax.core.Tracer) for v in values):
                return list(_held.bind(*values, equation=self))
            return _evaluated(self, values)
        return self.bind(values)

    def bind(self, values: Sequence) -> list:
        """The outputs at these inputs, by JAX's own ways."""
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


class Inlined(NamedTuple):
    """A call of a jitted function that was inlined: equations `start` up to `stop`.

    name: the function's.
    outs: the values that it returned.
    paths: where in the returned tree each stands: "" for all of it, "[0]", "['loss']", ...
    is_library: whether it's one of JAX's or fnn's own functions.
    scope: the scope inside it.
    source_info: of the call.
    calls: those inside.
    """

    name: str
    start: int
    stop: int
    outs: tuple[int, ...]
    paths: tuple[str, ...]
    is_library: bool
    scope: tuple[str, ...]
    source_info: Any
    calls: Sequence[Inlined]


@dataclasses.dataclass(eq=False)
class Program:
    """A traced function as a flat list of equations in topological order.

    avals: the type (shape, dtype, ...) of each value.
    inputs, outputs: numbers of the values that go in and come out.
    constants: the values that are known already: literals and closed-over arrays.
    calls: the calls of jitted functions that were inlined, outermost, in order.
    """

    avals: list
    inputs: list[int]
    outputs: list[int]
    constants: dict[int, Any]
    equations: list[Equation]
    calls: Sequence[Inlined] = ()

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

    def walk(jaxpr, consts, ins, scope, calls, source=None) -> list[int]:
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
                start, inside = len(flat.equations), []
                outs = walk(inner.jaxpr, inner.consts, ins, deeper, inside, here)
                numbers.update(zip(eqn.outvars, outs, strict=True))
                calls.append(
                    Inlined(
                        name,
                        start,
                        len(flat.equations),
                        tuple(outs),
                        result_paths(inner),
                        _is_of_library(inner.jaxpr),
                        deeper,
                        source or eqn.source_info,
                        inside,
                    )
                )
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
    calls: list[Inlined] = []
    flat.outputs = walk(closed_jaxpr.jaxpr, closed_jaxpr.consts, flat.inputs, (), calls)
    flat.calls = calls
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
    found: dict[str, Any] = {}
    if equation.operation() is not None or equation.is_derivative_of_operation():
        return found  # its `rule` looks like one
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


# ------------------------------------------------------------------------- running outside jit
#
# JAX compiles a loop once for each jaxpr *object*. A program that is traced again at each call
# has new ones each time, though they say the same; what they were compiled to must be found by
# what they say. Nor may that cache keep a user's function or arrays alive. So, outside jit:
#
# * a call (jit, checkpoint, a custom rule) is evaluated equation by equation, as JAX does;
# * a conditional takes its branch now;
# * a loop is compiled by `_compiled`, one jitted function, whose static argument describes it.
#   The arrays that a loop holds are arguments. What else its body may hold, a custom rule's
#   functions and fnn's operations, isn't kept: only what they compute is.

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_closed_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
_HOLDS_FUNCTIONS = frozenset(
    {*_CALLS, "call_hi_primitive", "custom_linear_solve", "cond", "while", "scan"}
)


def is_staged(values: Sequence = ()) -> bool:
    """Is a program being made here, by jit or `make_jaxpr`, rather than numbers computed?"""
    if any(isinstance(v, DynamicJaxprTracer) for v in values):
        return True
    # Under vmap or jvp a constant is a number, unless these are themselves part of a program.
    return isinstance(lax.iota("int32", 1), jax.core.Tracer)


def once(function: Callable) -> Callable:
    """The function of pytrees of arrays; outside jit, its loops are compiled once for all calls.

    That is so even if the function is made anew for each call. Under jit it stays as it is.
    """

    def evaluated(*args):
        leaves, tree = jax.tree.flatten(args)
        if is_staged(leaves):
            return function(*args)
        flat = _Flat(function, tree)
        outs = evaluate(program(jax.make_jaxpr(flat)(leaves)), leaves)
        return jax.tree.unflatten(flat.out_tree, outs)

    return evaluated


def as_one_call(function: Callable) -> Callable:
    """The function of pytrees of arrays, as one call in a program, not to be taken apart."""

    def call(*args):
        leaves, tree = jax.tree.flatten(args)
        flat = _Flat(function, tree)
        outs = jax.jit(flat)(leaves)
        return jax.tree.unflatten(flat.out_tree, outs)

    return call


class _Flat:
    """A function of pytrees as one of a list of arrays.

    JAX's caches keep the structures that they are handed; a pullback's holds functions.
    """

    def __init__(self, function: Callable, in_tree):
        self._function, self._in_tree = function, in_tree
        self.out_tree: Any = None
        self.__name__ = getattr(function, "__name__", "call")

    def __call__(self, leaves):
        out = self._function(*jax.tree.unflatten(self._in_tree, leaves))
        outs, self.out_tree = jax.tree.flatten(out)
        return outs


def evaluate(flat: Program, args: Sequence, apply: Callable = Equation.apply) -> list:
    """The outputs of a program; each value is forgotten after its last use."""
    values = flat.values(args)
    last = {i: n for n, equation in enumerate(flat.equations) for i in equation.ins}
    last.update(dict.fromkeys(flat.outputs, -1))
    for n, equation in enumerate(flat.equations):
        outs = apply(equation, [values[i] for i in equation.ins])
        for i in equation.ins:
            if last[i] == n:
                values[i] = None
        for i, out in zip(equation.outs, outs, strict=True):
            if i in last:
                values[i] = out
    return [values[i] for i in flat.outputs]


def _evaluated(equation: Equation, values: Sequence) -> list:
    """The outputs of an equation that holds functions, where its inputs are numbers."""
    called = _called(equation, values)
    if called is not None:
        return evaluate(program(called[0]), called[1])
    if equation.name == "cond" and equation.params.get("branches_platforms") is None:
        branches = equation.params["branches"]
        chosen = branches[min(max(int(values[0]), 0), len(branches) - 1)]
        return evaluate(program(close(chosen)), values[1:])
    arrays: list = []
    try:
        what = (equation.name, _described(equation.params, arrays), equation.context)
    except TypeError:  # it holds something of a kind that can't be described
        return equation.bind(values)
    description = _Description(what, equation, arrays)
    try:
        with equation.context.manager:
            return _compiled(description, arrays, list(values))
    finally:
        description.forget()


def _called(equation: Equation, values: Sequence):
    """The jaxpr that a call evaluates, with its arguments; None for what isn't a call."""
    if equation.name == "custom_linear_solve":
        lengths, jaxprs = equation.params["const_lengths"], equation.params["jaxprs"]
        start = lengths.matvec + lengths.vecmat
        consts, b = values[start : start + lengths.solve], values[sum(lengths) :]
        return close(jaxprs.solve), [*consts, *b]
    if equation.name in ("jit", "pjit"):
        jaxpr = _inlined(equation)
        return None if jaxpr is None else (jaxpr, values)
    if equation.name == "call_hi_primitive":
        prim = equation.params["_prim"]
        expanded = lambda *leaves: prim.expand(*jax.tree.unflatten(prim.in_tree, leaves))
        return jax.make_jaxpr(expanded)(*values), values
    if equation.name in _CALLS:
        return close(equation.params[_CALLS[equation.name]]), values
    return None


class _Description:
    """What an equation says, to find what it was compiled to; and until then the equation."""

    __slots__ = ("_arrays", "_equation", "_hash", "_what")

    def __init__(self, what, equation: Equation, arrays: list):
        self._what, self._hash = what, hash(what)
        self._equation, self._arrays = equation, arrays

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return isinstance(other, _Description) and self._what == other._what

    def forget(self):
        self._equation = self._arrays = None

    def run(self, arrays, values):
        place = {id(a): new for a, new in zip(self._arrays, arrays, strict=True)}
        return _by_value(self._equation, values, place)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(description: _Description, arrays: list, values: list) -> list:
    return description.run(arrays, values)


def _by_value(equation: Equation, values: Sequence, place: dict) -> list:
    """The outputs, in a program that keeps no custom rules and no operations.

    place: what stands in for the arrays that jaxprs hold, by their id.
    """

    def run(closed, args):
        flat = program(closed)
        flat.constants = {i: place.get(id(c), c) for i, c in flat.constants.items()}
        return evaluate(flat, args, lambda inner, ins: _by_value(inner, ins, place))

    called, params = _called(equation, values), equation.params
    if called is not None:
        return run(*called)
    with equation.context.manager:
        if equation.name == "scan":
            num_consts, num_carry = scan_layout(params)
            consts, rest = values[:num_consts], values[num_consts:]

            def step(carry, xs):
                outs = run(close(params["jaxpr"]), [*consts, *carry, *xs])
                return outs[:num_carry], outs[num_carry:]

            how = {name: params[name] for name in ("length", "reverse", "unroll")}
            carry, ys = lax.scan(step, rest[:num_carry], rest[num_carry:], **how)
            return [*carry, *ys]
        if equation.name == "while":
            num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
            of_cond, of_body = values[:num_cond], values[num_cond : num_cond + num_body]

            def goes_on(carry):
                return run(close(params["cond_jaxpr"]), [*of_cond, *carry])[0]

            def body(carry):
                after = run(close(params["body_jaxpr"]), [*of_body, *carry])
                going = goes_on(carry)
                if not going.ndim:
                    return after
                # Under vmap, an example that has finished keeps its values.
                masks = [lax.broadcast_in_dim(going, x.shape, range(going.ndim)) for x in carry]
                return [lax.select(*three) for three in zip(masks, after, carry, strict=True)]

            start = list(values[num_cond + num_body :])
            return lax.while_loop(lambda carry: goes_on(carry).any(), body, start)
        if equation.name == "cond":
            branches = [lambda *ins, b=b: run(close(b), ins) for b in params["branches"]]
            return take_branch(equation, values[0], branches, values[1:])
        if equation.operation() is not None:
            closed = jax.make_jaxpr(equation.operation().primal)(*values)
            return run(closed, values)
        if equation.is_derivative_of_operation():
            cut, linear = params["num_residuals"], params["linear"]
            closed = jax.make_jaxpr(lambda *a: linear.tangent(a[:cut], a[cut:]))(*values)
            return run(closed, values)
    return equation.bind(values)


def take_branch(equation: Equation, index, branches: Sequence[Callable], operands) -> list:
    """Take a branch by the index, or by the platform if that is what the equation does."""
    platforms = equation.params.get("branches_platforms")
    if platforms is not None:
        # Another platform's branch (its own kernel, say) must not even be compiled here.
        named = zip(platforms, branches, strict=True)
        by_name = {name: branch for names, branch in named for name in names or ("default",)}
        return lax.platform_dependent(*operands, **by_name)
    if len(branches) == 1:
        return branches[0](*operands)
    return lax.switch(index, branches, *operands)


def _described(x, arrays: list):
    """A hashable description, equal where the same is computed; arrays are put into the list.

    Raises:
        TypeError: it is of a kind that isn't hashable.
    """
    if hasattr(x, "eqns"):
        return _described_jaxpr(close(x), arrays)
    if isinstance(x, dict):
        return tuple((k, _described(v, arrays)) for k, v in x.items())
    if isinstance(x, (tuple, list)):
        return (type(x), *(_described(v, arrays) for v in x))
    if isinstance(x, (jax.Array, numpy.ndarray)):
        arrays.append(x)
        return jax.typeof(x)
    if isinstance(x, (Call, MappedCall, LinearMap, MappedLinearMap)):
        fields = (getattr(x, field.name) for field in dataclasses.fields(x))
        return (type(x), *(_described(v, arrays) for v in fields))
    if isinstance(x, weakref.ref):
        return x
    if isinstance(x, Primitive) or (callable(x) and not isinstance(x, type)):
        return weakref.ref(x)  # so that it can go; a reference that died equals no other
    hash(x)
    return type(x), x


def _described_jaxpr(closed, arrays: list):
    number: dict = {}

    def new(var):
        number[var] = len(number)
        return var.aval

    def read(atom):
        if not isinstance(atom, Literal):
            return number[atom]
        if isinstance(atom.val, (jax.Array, numpy.ndarray)) and numpy.ndim(atom.val):
            return _described(atom.val, arrays)
        return atom.aval, numpy.asarray(atom.val).tobytes()

    jaxpr = closed.jaxpr
    lines = [tuple(map(new, jaxpr.invars)), tuple(map(new, jaxpr.constvars))]
    lines.append(tuple(_described(c, arrays) for c in closed.consts))
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in _CALLS and (name not in ("jit", "pjit") or _inlined(eqn) is not None):
            params = {"jaxpr": params[_CALLS[name]]}  # only this is evaluated
        ins = tuple(map(read, eqn.invars))
        primitive, params = _described(eqn.primitive, arrays), _described(params, arrays)
        lines.append((primitive, params, ins, tuple(map(new, eqn.outvars)), eqn.ctx))
    return (*lines, tuple(map(read, jaxpr.outvars)))


_held = Primitive("held")
_held.multiple_results = True
_held.def_impl(lambda *values, equation: _evaluated(equation, values))


def _held_jvp(primals, tangents, *, equation):
    """JAX's own way: it knows the rules that stand in the equation."""
    moves = [type(t) is not ad.Zero for t in tangents]

    def of_moving(*moving):
        given = iter(moving)
        return equation.bind([next(given) if m else p for m, p in zip(moves, primals, strict=True)])

    moving = [p for p, m in zip(primals, moves, strict=True) if m]
    rates = [t for t, m in zip(tangents, moves, strict=True) if m]
    outs, dys = jax.jvp(of_moving, moving, rates)
    avals = [jax.typeof(y) for y in outs]
    return outs, [
        dy if is_inexact(a) else ad.Zero(a.to_tangent_aval())
        for a, dy in zip(avals, dys, strict=True)
    ]


def _held_batch(axis_data, values, axes, *, equation):
    """What doesn't depend on the mapped axis is computed, and kept, once."""
    if all(axis is None for axis in axes):
        outs = equation.apply(values)
        return outs, [None] * len(outs)
    axis, function = Axis.of(axis_data), lambda *v: equation.bind(v)
    out_axes = mapped_results(axis, function, tuple(axes), values)
    return once(axis.vmap(function, tuple(axes), out_axes))(*values), out_axes


ad.primitive_jvps[_held] = _held_jvp
batching.fancy_primitive_batchers[_held] = _held_batch


def called_function(equation: Equation) -> str:
    """The name of what a `custom_jvp`, `custom_vjp` or hi-primitive call calls, or ""."""
    if equation.name == "call_hi_primitive":
        return type(equation.params["_prim"]).__name__
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


class Frame(NamedTuple):
    """One of the user's functions on the stack that made an equation, and where it stood.

    instruction: the place in the code, in bytes.
    called: how it called what is inside: "directly"; through "vmap"; through an installed
        "package", or fnn's layers; or "otherwise", such as through jit or a derivative.
    """

    code: Any
    instruction: int
    called: str


class Stack(NamedTuple):
    """The stack that made an equation, from the inside out.

    frames: the user's.
    inside: those of JAX, fnn and other packages that the innermost of them called, as
        (code, instruction).
    reached: whether it goes down to the file that `stack` was to stop at.
    """

    frames: tuple[Frame, ...]
    inside: tuple[tuple[Any, int], ...]
    reached: bool


def stack(source_info, outermost: str = "") -> Stack:
    """The stack, with the instructions, so that the source's expressions can be found.

    outermost: the file to stop at.
    """
    if source_info.traceback is None:
        return Stack((), (), False)
    frames: list[Frame] = []
    inside: list[tuple[Any, int]] = []
    between: list[Any] = []
    for code, instruction in zip(*source_info.traceback.raw_frames(), strict=True):
        if code.co_filename == outermost:
            return Stack(tuple(frames), tuple(inside), True)
        if _kind(code.co_filename) == "user":
            frames.append(Frame(code, instruction, _how_called(between)))
            between = []
        else:
            between.append(code)
            if not frames:
                inside.append((code, instruction))
    return Stack(tuple(frames), tuple(inside), False)


def _how_called(between: list) -> str:
    """How a function calls another, by the library's frames between them."""
    kinds = {_kind(code.co_filename) for code in between}
    if not kinds:
        return "directly"
    if kinds == {"package"}:
        return "package"
    if kinds == {"library"} and any(code.co_name == "vmap_f" for code in between):
        plain = all(not re.search("jit|grad|vjp|jvp|cache_miss", c.co_name) for c in between)
        return "vmap" if plain else "otherwise"
    return "otherwise"


@functools.lru_cache(maxsize=4096)
def _kind(file_name: str) -> str:
    """Whose code is in a file: the "user"'s, an installed "package"'s, or of JAX and fnn."""
    if file_name.startswith(os.path.join(_LIBRARIES[0], "layers")):
        return "package"
    if file_name.startswith(_LIBRARIES):
        return "library"
    return "package" if file_name.startswith(_INSTALLED) else "user"


def result_paths(closed_jaxpr) -> tuple[str, ...]:
    """Where in the tree that a traced function returned each of its results stands.

    "" for all of it, "[0]", "['loss']", ...; "?" for what isn't known.
    """
    paths = closed_jaxpr.jaxpr.debug_info.result_paths
    if paths is None or len(paths) != len(closed_jaxpr.jaxpr.outvars):
        return ("?",) * len(closed_jaxpr.jaxpr.outvars)
    return tuple(p.removeprefix("result") if p.startswith("result") else "?" for p in paths)


def _is_of_library(jaxpr) -> bool:
    """Was it made from one of JAX's or fnn's own functions?"""
    return (jaxpr.debug_info.func_filename or "").startswith(_LIBRARIES)


def is_inexact(aval) -> bool:
    """Is it a real or complex array, so that it can have a gradient?"""
    return jax.dtypes.issubdtype(aval.dtype, jnp.inexact)


def sharding_of(x) -> NamedSharding | None:
    """The sharding of an array or type on a mesh with explicit axes; elsewhere the compiler's."""
    sharding = (x if isinstance(x, jax.core.AbstractValue) else jax.typeof(x)).sharding
    return None if sharding.mesh.empty else sharding


def zeros(aval) -> jax.Array:
    """Zeros of a type: sharded alike, and under shard_map varying over the same devices."""
    zero = numpy.zeros((), aval.dtype)
    return as_varying(lax.broadcast(zero, aval.shape, out_sharding=sharding_of(aval)), aval)


def barrier(tree):
    """The arrays, none of which the compiler may use before all are there.

    Under shard_map, those that vary over the same devices are held together: JAX's barrier
    would make all of them vary.
    """
    leaves, structure = jax.tree.flatten(tree)
    kinds = [varying_axes(jax.typeof(x)) for x in leaves]
    for kind in set(kinds):
        places = [i for i, k in enumerate(kinds) if k == kind]
        held = lax.optimization_barrier([leaves[i] for i in places])
        for i, x in zip(places, held, strict=True):
            leaves[i] = x
    return jax.tree.unflatten(structure, leaves)
