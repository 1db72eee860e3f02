"""What fnn reads of a jaxpr, JAX's own record of a traced function.

JAX traces a function to a list of equations, each with a primitive, parameters, inputs and
outputs. Here this list becomes a `Program`: calls of jitted functions are inlined, and
every value has a number, its place in the list of all values. Most of what depends on how a JAX
version spells a jaxpr stands in this file; for primitives of our own it stands in `primitive.py`
and `twins.py` of `fnn/operation`. `fnn/eager.py` reads the parameters of calls and loops,
`fnn/frames.py` and `fnn/backprop/labels.py` the names in a jaxpr's debug information.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Literal
from jax.interpreters.partial_eval import DynamicJaxprTracer, dce_jaxpr

from fnn.frames import is_of_library


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Equation:
    """`outs = primitive(ins; params)`, with the inputs and outputs as numbers of values.

    scope: the names of the jitted functions and `jax.named_scope`s that it stands in; of JAX's and
        fnn's own functions as `jit(name)`.
    context: JAX's settings where it was made (precision, 64-bit mode, mesh, ...).
    source_info: the stack that made it; `fnn/frames.py` reads it.
    has_effects: whether it does more than compute its outputs: it prints, for one.
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
        with self.origin(), self.context.manager:
            outs = self.primitive.bind(*values, **self.primitive.get_bind_params(self.params))
        return list(outs) if self.primitive.multiple_results else [outs]

    def origin(self, operation: str = "", *, backward: bool = False) -> Any:
        """Within it, what is traced counts as made where this equation was: by its line and scopes.

        Args:
            operation: the name of what is computed there, as one more scope inside those of the
                equation: `forward(softmax)`, `pullback(softmax)`.
            backward: whether it is the equation's backward pass. The outermost scope is then
                marked as JAX marks it: `transpose(encoder)/pullback(tanh)`.
        """
        stack = source_info_util.current_name_stack()
        if backward:
            stack = stack.transform("transpose")
        for name in self.scope:
            stack = stack.extend(name)
        if operation:
            stack = stack.transform("pullback" if backward else "forward").extend(operation)
        return source_info_util.user_context(self.source_info.traceback, name_stack=stack)


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
    """A jaxpr as a flat list of equations.

    Args:
        closed_jaxpr: what `jax.make_jaxpr` returns.
        inline: whether to put the equations of a jitted function in the place of its call.
    """
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
                is_library = is_of_library(inner.jaxpr)
                here = source or (eqn.source_info if is_library else None)
                deeper = (*within, f"jit({name})" if is_library else name) if name else within
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
                        is_library,
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
    """A jaxpr together with the values of its constants. (JAX 0.12's all have them.)"""
    return jaxpr if hasattr(jaxpr, "consts") else ClosedJaxpr(jaxpr, consts)


def empty_jaxpr() -> Any:
    """A jaxpr that computes nothing: a new object each time."""
    return ClosedJaxpr(_NOTHING.jaxpr, [])


_NOTHING = jax.make_jaxpr(lambda: ())()


def inner_jaxprs(equation: Equation) -> dict[str, Any]:
    """The jaxprs that a control-flow equation holds, by their role."""
    found: dict[str, Any] = {}
    for name, value in equation.params.items():
        if hasattr(value, "eqns"):
            inner = close(value)
            # An empty one computes nothing: fnn's operations carry one (see `Rule.keeper`).
            if inner.eqns or inner.out_avals:
                found[name] = inner
        elif isinstance(value, (tuple, list)) and value and hasattr(value[0], "eqns"):
            found.update({f"{name}[{i}]": close(j) for i, j in enumerate(value)})
    return found


def all_equations(flat: Program) -> Iterator[tuple[Equation, list]]:
    """The equations of a program and of those inside them, with the types of their values."""
    for equation in flat.equations:
        yield equation, flat.avals
        for inner in inner_jaxprs(equation).values():
            yield from all_equations(program(inner))


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


def result_paths(closed_jaxpr) -> tuple[str, ...]:
    """Where in the tree that a traced function returned each of its results stands.

    "" for all of it, "[0]", "['loss']", ...; "?" for what isn't known.
    """
    paths = closed_jaxpr.jaxpr.debug_info.result_paths
    if paths is None or len(paths) != len(closed_jaxpr.jaxpr.outvars):
        return ("?",) * len(closed_jaxpr.jaxpr.outvars)
    return tuple(p.removeprefix("result") if p.startswith("result") else "?" for p in paths)


def is_inexact(aval) -> bool:
    """Is it a real or complex array, so that it can have a gradient?"""
    return jax.dtypes.issubdtype(aval.dtype, jnp.inexact)
