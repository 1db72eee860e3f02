"""What fnn reads of a jaxpr, JAX's own record of a traced function.

JAX traces a function to a list of equations, each with a primitive, parameters, inputs and
outputs. Here this list becomes a `Program`: calls of jitted functions are inlined, and
every value has a number, its place in the list of all values. All that depends on how a
JAX version spells a jaxpr stands in this file (and, for primitives of our own, in
`fnn/operation/primitive.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sysconfig
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal
from jax.interpreters.partial_eval import DynamicJaxprTracer, dce_jaxpr
from jax.sharding import NamedSharding


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

    def bind(self, values: Sequence) -> list:
        """The outputs at these inputs; traceable like any JAX function.

        Outside jit it compiles what JAX compiles: `fnn.eager.apply` does that once.
        """
        with self.context.manager:
            outs = self.primitive.bind(*values, **self.primitive.get_bind_params(self.params))
        return list(outs) if self.primitive.multiple_results else [outs]


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

    def dependents(
        self,
        sources: Iterable[int],
        *,
        inexact: bool = False,
        through: Callable[[Equation], bool] | None = None,
    ) -> set[int]:
        """The values that depend on the sources, which are among them: from inputs to outputs.

        Args:
            sources: numbers of values.
            inexact: follow only real and complex values. Those are the ones that a gradient may
                pass; a comparison or an argmax ends its way.
            through: the equations whose outputs depend on their inputs; all unless given.
        """
        found = set(sources)
        for equation in self.equations:
            if found.isdisjoint(equation.ins) or (through is not None and not through(equation)):
                continue
            found.update(i for i in equation.outs if not inexact or is_inexact(self.avals[i]))
        return found

    def needed_for(
        self,
        targets: Iterable[int],
        *,
        among: Container[int] | None = None,
        through: Callable[[Equation], bool] | None = None,
        effects: bool = False,
    ) -> tuple[list[Equation], set[int]]:
        """What the targets need, from outputs to inputs: the equations, in order, and the values.

        Args:
            targets: numbers of values. They are among the values returned, and so are all inputs
                of the equations returned.
            among: the values to follow; all unless given.
            through: the equations to follow; all unless given. What another one makes is needed,
                but not what it is made from.
            effects: whether to include equations that have effects, such as printing, though no
                target needs what they return.
        """
        values, equations = set(targets), []
        for equation in reversed(self.equations):
            is_needed = not values.isdisjoint(equation.outs) or (effects and equation.has_effects)
            if is_needed and (through is None or through(equation)):
                equations.append(equation)
                values.update(i for i in equation.ins if among is None or i in among)
        return equations[::-1], values


def trace(function: Callable, args: Sequence) -> Any:
    """The jaxpr of a function of arrays (or of their types) that returns a list of arrays.

    What no output needs is left out, also inside loops: a scan's unused results, for one.
    """
    closed = jax.make_jaxpr(function)(*args)
    live, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return close(live, closed.consts)


def is_staged(values: Sequence = ()) -> bool:
    """Is a jaxpr being made here, by jit or `make_jaxpr`, rather than numbers computed?"""
    if any(isinstance(v, DynamicJaxprTracer) for v in values):
        return True
    # Under vmap or jvp a constant is a number, unless these are themselves part of a jaxpr.
    return isinstance(lax.iota("int32", 1), jax.core.Tracer)


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
            inner = inlined(eqn) if inline else None
            if inner is not None:
                name = eqn.params.get("name", "")
                # JAX traces its own functions once: the lines noted inside are the first user's.
                here = source or (eqn.source_info if _is_of_library(inner.jaxpr) else None)
                deeper = (*within, name) if name else within
                start = len(flat.equations)
                inside: list[Inlined] = []
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


def inlined(eqn):
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
    for name, value in equation.params.items():
        if hasattr(value, "eqns"):
            inner = close(value)
            # An empty one computes nothing: fnn's operations carry one (see `Operation.keeper`).
            if inner.eqns or inner.out_avals:
                found[name] = inner
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
    aval: Any = x if isinstance(x, jax.core.AbstractValue) else jax.typeof(x)
    return None if aval.sharding.mesh.empty else aval.sharding


def zeros(aval) -> jax.Array:
    """Zeros of a type: sharded alike, and under shard_map varying over the same devices."""
    zero = numpy.zeros((), aval.dtype)
    return as_varying(broadcast(zero, aval, ()), aval)


def broadcast(x, like, axes: Sequence[int]):
    """x copied to the shape and sharding of `like`, of whose axes its own are `axes`.

    On explicit axes the mesh is set: JAX 0.12 ignores the sharding of a result made from arrays
    that are on no mesh where none is set.
    """
    sharding = sharding_of(like)
    if sharding is None:
        return lax.broadcast_in_dim(x, like.shape, axes)
    mesh: Any = sharding.mesh  # that of a type is abstract
    with jax.sharding.use_abstract_mesh(mesh):
        return lax.broadcast_in_dim(x, like.shape, axes, out_sharding=sharding)


def varying_axes(aval) -> frozenset:
    """The axes of the mesh over whose devices a value varies, under shard_map."""
    kind = getattr(aval, "manual_axis_type", None)
    return getattr(kind, "varying", frozenset())


def as_varying(x, aval):
    """x, marked under shard_map as varying over the devices that `aval` varies over."""
    return _vary_over(x, varying_axes(aval))


def _vary_over(x, axes: frozenset):
    """x, marked as varying over these axes of the mesh too."""
    missing = axes - varying_axes(jax.typeof(x))
    return jax.lax.pcast(x, tuple(sorted(missing, key=str)), to="varying") if missing else x


def same_varying_axes(arrays):
    """Under shard_map, mark what is equal on all devices as varying where its partners vary.

    JAX's own operations do the same. Its transpose is the sum over the devices, which is how
    a replicated weight gets the gradient of the whole batch.
    """
    axes = [varying_axes(jax.typeof(x)) for x in arrays]
    union = frozenset().union(*axes)
    if not union or all(a == union for a in axes):
        return arrays
    return [_vary_over(x, union) for x in arrays]


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
