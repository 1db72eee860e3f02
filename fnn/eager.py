"""Evaluating a program outside jit: what was compiled once isn't compiled again.

JAX compiles a loop once for each jaxpr *object*. A function that is traced at each call makes
new objects each time, with the same content. Here the compiled loop is found by that content, and
the cache keeps no function and no array of the user's alive. Outside jit:

* a call (jit, checkpoint, a custom rule) is evaluated equation by equation, as JAX does;
* a conditional takes its branch now;
* a loop is compiled by `_compiled`, one jitted function, whose static argument describes it.
  The arrays that a loop holds are arguments. What else its body may hold, a custom rule's
  functions and fnn's operations, isn't kept: only what they compute is. The user's own rules are
  traced at each call, since they may compute something else by then; what is the same program as
  before isn't compiled again.

`apply` does that for one equation, and `once` for a whole function.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy
from jax import lax

from fnn.jaxpr import Equation, Program, close, inlined, is_inexact, is_staged, program, scan_layout
from fnn.operation import (
    Call,
    LinearMap,
    MappedCall,
    MappedLinearMap,
    call_of,
    linear_map_of,
    mapped_results,
    new_primitive,
)

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


def apply(equation: Equation, values: Sequence) -> list:
    """The outputs of an equation at these inputs; traceable like any JAX function.

    Outside jit, nothing is compiled again that was compiled before.
    """
    if equation.name in _HOLDS_FUNCTIONS and not is_staged(values):
        if any(isinstance(v, jax.core.Tracer) for v in values):
            return list(_held.bind(*values, equation=equation))
        return _evaluated(equation, values)
    return equation.bind(values)


def apply_all(equations: Iterable[Equation], values: dict[int, Any]) -> None:
    """Apply equations in order: `values` holds their inputs by number, and gets their outputs."""
    for equation in equations:
        outs = apply(equation, [values[i] for i in equation.ins])
        values.update(zip(equation.outs, outs, strict=True))


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
    """The function of pytrees of arrays, as one call of a jitted function in a program."""

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


def evaluate(flat: Program, args: Sequence, apply: Callable = apply) -> list:
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
    inner = called(equation, values)
    if inner is not None:
        return evaluate(program(inner[0]), inner[1])
    if equation.name == "cond" and equation.params.get("branches_platforms") is None:
        branches = equation.params["branches"]
        chosen = branches[min(max(int(values[0]), 0), len(branches) - 1)]
        return evaluate(program(close(chosen)), values[1:])
    try:
        description = _description(equation, values)
    except TypeError:  # it holds something of a kind that can't be described
        return equation.bind(values)
    arrays = description.arrays
    try:
        with equation.context.manager:
            return _compiled(description, arrays, list(values))
    finally:
        description.forget()


def called(equation: Equation, values: Sequence):
    """The jaxpr that a call evaluates, with its arguments; None for what isn't a call."""
    if equation.name == "custom_linear_solve":
        lengths, jaxprs = equation.params["const_lengths"], equation.params["jaxprs"]
        start = lengths.matvec + lengths.vecmat
        consts, b = values[start : start + lengths.solve], values[sum(lengths) :]
        return close(jaxprs.solve), [*consts, *b]
    if equation.name in ("jit", "pjit"):
        jaxpr = inlined(equation)
        return None if jaxpr is None else (jaxpr, values)
    if equation.name == "call_hi_primitive":
        prim = equation.params["_prim"]
        expanded = lambda *leaves: prim.expand(*jax.tree.unflatten(prim.in_tree, leaves))
        return jax.make_jaxpr(expanded)(*values), values
    if equation.name in _CALLS:
        return close(equation.params[_CALLS[equation.name]]), values
    return None


def _description(equation: Equation, values: Sequence) -> _Description:
    """What an equation computes at such inputs.

    Raises:
        TypeError: it holds something of a kind that can't be described.
    """
    arrays: list = []
    try:
        is_jit = equation.name in ("jit", "pjit")  # one with shardings; see `called`
        params = _described_params(equation.name, equation.params, arrays, is_jit)
        what = (equation.name, params, equation.context)
        run = functools.partial(_by_value, equation)
    except _MayChangeError:
        # Described and run is the same trace: a second one might find something else.
        with equation.context.manager:
            traced = jax.make_jaxpr(lambda *ins: _by_value(equation, list(ins), {}))(*values)
        arrays = []
        what = (equation.name, _described(traced, arrays), equation.context)
        run = functools.partial(_evaluated_by_value, traced)
    return _Description(what, run, arrays)


class _MayChangeError(TypeError):
    """A rule of the user's: what it computes may depend on what it closes over."""


class _Description:
    """What is computed, the cache key of what it was compiled to.

    It holds the program itself only until that is compiled.

    Attributes:
        arrays: those that the program holds, until it is compiled.
    """

    __slots__ = ("_hash", "_run", "_what", "arrays")

    def __init__(self, what, run: Callable, arrays: list):
        self._what, self._hash = what, hash(what)
        self._run: Callable | None = run
        self.arrays: list = arrays

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return isinstance(other, _Description) and self._what == other._what

    def forget(self):
        self._run, self.arrays = None, []

    def run(self, arrays, values):
        assert self._run is not None
        return self._run(values, {id(a): new for a, new in zip(self.arrays, arrays, strict=True)})


@functools.partial(jax.jit, static_argnums=0)
def _compiled(description: _Description, arrays: list, values: list) -> list:
    return description.run(arrays, values)


def _evaluated_by_value(closed, args: Sequence, place: dict) -> list:
    """The outputs of a jaxpr; see `_by_value`."""
    flat = program(closed)
    flat.constants = {i: place.get(id(c), c) for i, c in flat.constants.items()}
    return evaluate(flat, args, lambda inner, ins: _by_value(inner, ins, place))


def _by_value(equation: Equation, values: Sequence, place: dict) -> list:
    """The outputs, in a program that keeps no custom rules and no operations.

    place: what stands in for the arrays that jaxprs hold, by their id.
    """

    def run(closed, args):
        return _evaluated_by_value(closed, args, place)

    inner, params = called(equation, values), equation.params
    if inner is not None:
        return run(*inner)
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
        if (call := call_of(equation)) is not None:
            return run(jax.make_jaxpr(call.primal)(*values), values)
        if (linear := linear_map_of(equation)) is not None:
            cut = params["num_residuals"]
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
        TypeError: it is of a kind that isn't hashable, or holds a rule that may change.
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
        if not x.rule.compiled:
            raise _MayChangeError
        fields = (getattr(x, field.name) for field in dataclasses.fields(x))
        return (type(x), *(_described(v, arrays) for v in fields))
    if isinstance(x, weakref.ref):
        return x
    if callable(x) and not isinstance(x, type):
        return weakref.ref(x)  # so that it can go; a reference that died equals no other
    hash(x)
    return type(x), x


def _described_params(name: str, params: dict, arrays: list, runs_as_it_is: bool = False):
    """The same of an equation's parameters.

    runs_as_it_is: whether `_by_value` leaves it so, although its kind holds functions.
    """
    before = len(arrays)
    described = _described(params, arrays)
    if len(arrays) > before and (runs_as_it_is or name not in _HOLDS_FUNCTIONS):
        raise TypeError("its arrays are part of the program, and can't be arguments")
    return described


def _described_jaxpr(closed, arrays: list):
    number: dict = {}

    def new(var):
        number[var] = len(number)
        return var.aval

    def read(atom):
        if not hasattr(atom, "val"):
            return number[atom]
        if isinstance(atom.val, (jax.Array, numpy.ndarray)) and numpy.ndim(atom.val):
            return _described(atom.val, arrays)
        return atom.aval, numpy.asarray(atom.val).tobytes()

    jaxpr = closed.jaxpr
    lines = [tuple(map(new, jaxpr.invars)), tuple(map(new, jaxpr.constvars))]
    lines.append(tuple(_described(c, arrays) for c in closed.consts))
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        runs_as_it_is = name in ("jit", "pjit") and inlined(eqn) is None
        if name in _CALLS and not runs_as_it_is:
            params = {"jaxpr": params[_CALLS[name]]}  # only this is evaluated
        ins = tuple(map(read, eqn.invars))
        params = _described_params(name, params, arrays, runs_as_it_is)
        lines.append(
            (weakref.ref(eqn.primitive), params, ins, tuple(map(new, eqn.outvars)), eqn.ctx)
        )
    return (*lines, tuple(map(read, jaxpr.outvars)))


def _held_value(*values, equation):
    return _evaluated(equation, values)


def _held_jvp(primals, tangents, *, equation):
    """JAX's own way: it knows the rules that stand in the equation."""
    moves = [t is not None for t in tangents]

    def of_moving(*moving):
        given = iter(moving)
        return equation.bind([next(given) if m else p for m, p in zip(moves, primals, strict=True)])

    moving = [p for p, m in zip(primals, moves, strict=True) if m]
    rates = [t for t in tangents if t is not None]
    outs, dys = jax.jvp(of_moving, moving, rates)
    return outs, [
        dy if is_inexact(jax.typeof(y)) else None for y, dy in zip(outs, dys, strict=True)
    ]


def _held_batch(axis, values, axes, *, equation):
    function = lambda *v: equation.bind(v)
    out_axes = mapped_results(axis, function, axes, values)
    return once(axis.vmap(function, axes, out_axes))(*values), out_axes


# An equation that holds functions, outside jit and under jvp or vmap: until its inputs are numbers.
_held = new_primitive("held", _held_value, _held_jvp, _held_batch)
