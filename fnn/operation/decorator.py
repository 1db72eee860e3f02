"""`fnn.rule`: an operation with a hand-written backward rule, valid under every JAX transform.

What a person writes is what the lecture teaches, a forward and a backward side by side:

    @fnn.rule
    def sigmoid(x):
        return jax.nn.sigmoid(x)

    @sigmoid.forward            # the value, and what the backward needs (the residuals)
    def _(x):
        y = jax.nn.sigmoid(x)
        return y, y

    @sigmoid.backward           # local gradient times upstream gradient
    def _(y, dy):
        return (dy * y * (1 - y),)

Everything else follows from these two:

* The operation is a JAX primitive of its own. A jaxpr shows one `sigmoid`, not its insides.
* Its derivative (JVP) runs `forward` and emits one *linear* primitive on the residuals and
  the tangents. The transpose of that primitive is the hand-written `backward`; its own
  action, the tangent map, is the transpose of `backward`, so that forward mode needs only
  the residuals too. (`op.tangent` replaces it where `backward` can't be transposed.)
* The linear primitive's derivative is itself on the tangents' tangents, plus the derivative
  of the tangent map by the residuals. Hence second, third, ... derivatives.
* `vmap` of an operation is the same operation over the vmapped forward and backward. A
  residual that doesn't depend on the batch (a weight, say) stays unbatched.

Four small classes mirror this: `Call` (an operation at given static arguments) and
`MappedCall` (the same under vmap); `LinearMap` (its derivative at given residuals) and
`MappedLinearMap`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import sys
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify, jet
from jax.extend.core import ClosedJaxpr, Literal, Primitive
from jax.interpreters import ad, batching, mlir
from jax.interpreters.partial_eval import dce_jaxpr

from fnn import arguments
from fnn.jaxpr import Equation, as_varying, same_varying_axes
from fnn.operation import linearity
from fnn.operation.outer_products import with_matrix_products


class RuleError(TypeError):
    """A hand-written rule doesn't fit its operation: the message says which, where and how."""


# ------------------------------------------------------------------------- what is remembered


def _kept(function):
    """Remember what tracing a rule showed: of the types of its arrays, and nothing of values.

    It is remembered with the operation, and goes with it. The key holds all that tracing depends
    on besides the arguments: the jaxpr that JAX's own cache holds for an empty function, which is
    another one wherever JAX itself would trace anew (64-bit mode, precision, promotion, mesh,
    named axes, ...).
    """

    @functools.wraps(function)
    def remembered(subject, *types):
        memory = subject.operation.memory
        key = (function, subject, types, _context())
        found = memory.get(key)
        if found is None:
            found = memory[key] = function(subject, *types)
            while len(memory) > _REMEMBERED:  # another thread may be doing the same
                memory.pop(next(iter(memory)), None)
        return found

    return remembered


def _context():
    return _EMPTY.trace().jaxpr, jax.config.jax_default_prng_impl


_EMPTY = jax.jit(lambda: None)
_REMEMBERED = 1024


# ----------------------------------------------------------------------- what a person writes


class Operation:
    """A function of arrays with a hand-written backward rule; made by `fnn.rule`.

    Positional arguments are pytrees of arrays (integer arrays and PRNG keys get no
    gradient); keyword-only arguments are static configuration and must be hashable.

    Attributes:
        name: the function's name; JAX prints the operation under it.
        definition: the undecorated function.
        compiled: whether a call outside jit is compiled, and its traced backward kept, as those
            of `fnn.ops` are, which depend on nothing that can change. Other rules run in Python
            then, as JAX's functions do, and see what their closures and static arguments hold.
    """

    def __init__(self, definition: Callable, compiled: bool = False):
        arguments.function("rule", "definition", definition, "a function of arrays")
        functools.update_wrapper(self, definition)
        self.definition = definition
        self.name = _name_of(definition)
        self._signature = _signature_of("rule: definition", definition)
        self._forward: Callable | None = None
        self._backward: Callable | None = None
        self._tangent: Callable | None = None
        self._look: Callable | None = None
        self._edition = 0
        self.compiled = compiled
        self._primitive = _primitive_of_operation(self.name)
        self._linear_primitive = _primitive_of_linear_map(self.name)
        self.memory: dict = {}
        # What jaxprs hold in the place of this operation. JAX keeps the jaxpr of `jax.jit(op)` for
        # as long as `op` is there: it must not hold `op` itself.
        self._twin = object.__new__(type(self))
        self._twin.__dict__ = self.__dict__
        self._keeper: Callable = lambda: None

    def __eq__(self, other):
        return isinstance(other, Operation) and self.__dict__ is other.__dict__

    def __hash__(self):
        return id(self.__dict__)

    def __repr__(self):
        return f"<fnn operation {self.name}{self._signature}>"

    def forward(self, function: Callable) -> Callable:
        """Register `function(*args, **static) -> (value, residuals)`; a decorator.

        The residuals, any pytree of arrays, are all that `backward` gets to see: keep as
        little as you can. Without a forward they are the positional arguments.

        Raises:
            RuleError: the function doesn't take the operation's own arguments.
        """
        self._must_take(function, "forward", self._positional())
        self._forward = function
        self._edition += 1
        return function

    def backward(self, function: Callable) -> Callable:
        """Register `function(residuals, dy, **static) -> (dx, ...)`; a decorator.

        It returns a tuple with one gradient for each positional argument, of the argument's
        structure, shapes and dtypes, or None where the gradient is zero, and is linear in
        `dy`.

        Raises:
            RuleError: the function doesn't take (residuals, dy) and the static keywords.
        """
        self._must_take(function, "backward", ("residuals", "dy"))
        self._backward = function
        self._edition += 1
        return function

    def tangent(self, function: Callable) -> Callable:
        """Register `function(residuals, *dx, **static) -> dy`, the forward-mode rule; optional.

        Each dx has its argument's structure, with None in the place of integer arrays. dy has
        the value's structure, with None where it is zero or the value is an integer. Only
        needed where `backward` can't be transposed by JAX: where it holds a while loop, say.

        Raises:
            RuleError: the function doesn't take (residuals, dx, ...) and the static keywords.
        """
        self._must_take(function, "tangent", ("residuals", *(f"d{n}" for n in self._positional())))
        self._tangent = function
        self._edition += 1
        return function

    def look(self, function: Callable) -> Callable:
        """Register `function(types, *args, **static)`, to look at values; optional, a decorator.

        It is called where a call stands, and where a vmapped call is computed: with the types of
        one example's arrays, and the arrays, which under vmap have more axes. Of what is traced
        it gets None. It raises a ValueError for values that the operation can't mean.
        """
        self._look = function
        return function

    def keeper(self) -> ClosedJaxpr:
        """What keeps the operation for as long as an equation of it is in some jaxpr.

        JAX remembers what it passed to an abstract evaluation, but only jaxprs weakly. So a
        `Call` holds its operation weakly, and this, an empty jaxpr, holds it in `_KEPT`.
        """
        keeper = self._keeper()
        if keeper is None:
            keeper = ClosedJaxpr(_NOTHING.jaxpr, [])
            _KEPT[keeper] = self._twin
            self._keeper = weakref.ref(keeper)
        return keeper

    def __call__(self, *args, **kwargs):
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}") from None
        bound.apply_defaults()
        leaves, in_tree = jax.tree.flatten(bound.args)
        static = self._hashable(bound.kwargs)
        edition = (self._edition, *(type(value) for _, value in static))
        keeper = self.keeper()
        call = Call(weakref.ref(self._twin), in_tree, static, edition)
        leaves = self._arrays(leaves, bound)
        out_tree = call.out_tree([jax.typeof(x) for x in leaves])
        call.look(leaves)
        leaves = same_varying_axes(leaves)
        return jax.tree.unflatten(out_tree, self._primitive.bind(*leaves, call=call, rule=keeper))

    def __copy__(self):
        return self  # copied like a function

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        """Pickled by name, like a function; or by its functions, if it has no name to find."""
        found: Any = sys.modules.get(self.__module__)
        for name in self.__qualname__.split("."):
            found = getattr(found, name, None)
        if found == self:
            return self.__qualname__
        rules = self._forward, self._backward, self._tangent, self._look
        return _rebuilt, (self.definition, self.compiled, *rules)

    def _arrays(self, leaves, bound):
        for leaf in leaves:
            _must_be_kept(self.name, leaf)
            try:
                jax.typeof(leaf)
            except TypeError:
                names = ", ".join(f"'{n}'" for n in self.argument_names(len(bound.args)))
                raise TypeError(
                    f"{self.name}: its positional arguments ({names}) are pytrees of arrays, but "
                    f"one holds {leaf!r} of type {type(leaf).__name__}. Configuration goes into "
                    "keyword-only arguments (after a `*` in the operation's signature)."
                ) from None
        return leaves

    def _hashable(self, static: dict) -> tuple[tuple[str, Hashable], ...]:
        for name, value in static.items():
            try:
                hash(value)
            except TypeError:
                raise TypeError(
                    f"{self.name}: the keyword argument '{name}' is static configuration and "
                    f"must be hashable, but got a {type(value).__name__}. Pass arrays by position."
                ) from None
        return tuple(static.items())

    def _must_take(self, function, role, positional):
        arguments.function(f"{self.name}.{role}", "the rule", function)
        _signature_of(f"{self.name}.{role}: the rule", function)
        keywords = [p.name for p in self._signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        try:
            inspect.signature(function).bind(*positional, **dict.fromkeys(keywords))
        except TypeError as error:
            wanted = ", ".join((*positional, *(["*", *keywords] if keywords else [])))
            raise RuleError(
                f"{self.name}.{role}: its signature must be ({wanted}), but it is "
                f"{inspect.signature(function)}: {error}."
            ) from None

    def _positional(self) -> tuple[str, ...]:
        """The names of the positional arguments, two for `*args`."""
        parameters = self._signature.parameters.values()
        gathers = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        named = [p.name for p in parameters if p.kind in arguments.POSITIONAL]
        return self.argument_names(len(named) + 2 * gathers)

    def argument_names(self, count: int) -> tuple[str, ...]:
        """The names of `count` positional arguments, numbered where `*args` gathers them."""
        names = []
        for p in self._signature.parameters.values():
            if p.kind in arguments.POSITIONAL:
                names.append(p.name)
            elif p.kind is p.VAR_POSITIONAL:
                names += [f"{p.name}[{i}]" for i in range(count - len(names))]
        return tuple(names[:count])


def _rebuilt(definition, compiled, forward, backward, tangent, look) -> Operation:
    operation = Operation(definition, compiled)
    operation._forward, operation._backward = forward, backward
    operation._tangent, operation._look = tangent, look
    return operation


def _name_of(function) -> str:
    """Its name, or that of what a `functools.partial` calls, or its class's."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _signature_of(what: str, function) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        raise RuleError(
            f"{what} must be a function whose arguments Python can tell, but got "
            f"{arguments.show(function)}. Write a function around it."
        ) from None


_NOTHING = jax.make_jaxpr(lambda: ())()
_KEPT: weakref.WeakKeyDictionary[ClosedJaxpr, Operation] = weakref.WeakKeyDictionary()


def rule(definition: Callable) -> Operation:
    """Make a function of arrays an operation with a hand-written backward rule.

    Write the plain function under `@fnn.rule`, then `@op.forward` (optional: the value and
    the residuals), `@op.backward` (residuals and upstream gradient to the gradients of the
    arguments) and, seldom, `@op.tangent`. The operation works under jit, grad, jvp, vmap,
    jacfwd, jacrev, hessian, linearize, linear_transpose, checkpoint, scan, cond, shard_map
    and export, in any nesting, which `jax.custom_vjp` does not (it refuses forward mode).

    Args:
        definition: a function whose positional arguments are pytrees of arrays and whose
            keyword-only arguments are static configuration. It must be pure. A call outside
            jit runs it in Python, as any function of JAX: what it closes over may change
            between two calls, and value, gradient and tangent then all see the new one. (Only
            types are remembered: the shapes of results and residuals, and which arguments
            have a gradient.)

    Returns:
        The `Operation`, called like the function.

    Raises:
        RuleError: when the operation is differentiated and its backward is missing, returns
            the wrong number of gradients or a wrong shape or dtype, or isn't linear in the
            upstream gradient. The message names the operation, the argument and both shapes.

    >>> @rule
    ... def cube(x):
    ...     return x**3
    >>> @cube.backward
    ... def _(residuals, dy):
    ...     (x,) = residuals
    ...     return (3 * x**2 * dy,)
    >>> float(jax.grad(cube)(2.0)), float(jax.grad(jax.grad(cube))(2.0))
    (12.0, 12.0)
    """
    return Operation(definition)


# The rules of `fnn.ops`: pure, so that a call outside jit may be compiled.
compiled_rule = functools.partial(Operation, compiled=True)


# ------------------------------------------------------ an operation, and an operation under vmap


@dataclasses.dataclass(frozen=True)
class Call:
    """An operation together with what is static in one use of it. All methods take flat lists.

    handle: the operation, held weakly (see `Operation.keeper`).
    edition: what else keeps two uses apart that compare equal: how often the rule has been
        rewritten (in a notebook, say), and the types of the static values (2 == 2.0 == True).
    """

    handle: weakref.ref[Operation]
    in_tree: Any
    static: tuple[tuple[str, Hashable], ...]
    edition: tuple[Hashable, ...] = ()

    def __repr__(self):
        return ", ".join(f"{k}={v}" for k, v in self.static) or "()"

    @property
    def operation(self) -> Operation:
        operation = self.handle()
        assert operation is not None, "kept by the `rule` of the equation that this belongs to"
        return operation

    def look(self, leaves, types=None):
        """Look at the values that are known."""
        look = self.operation._look
        if look is None:
            return
        types = map(jax.typeof, leaves) if types is None else types
        known = [x if _is_known(x) else None for x in leaves]
        args = jax.tree.unflatten(self.in_tree, known)
        look(jax.tree.unflatten(self.in_tree, list(types)), *args, **dict(self.static))

    def primal(self, *leaves):
        args = jax.tree.unflatten(self.in_tree, leaves)
        return jax.tree.leaves(self.operation.definition(*args, **dict(self.static)))

    def out_tree(self, in_avals):
        return _out_tree(self, tuple(map(_shape_and_dtype, in_avals)))

    def forward(self, *leaves) -> tuple[list, Any, LinearMap]:
        """The value, the residuals, and the operation's derivative as a function of them."""
        op, in_avals = self.operation, tuple(jax.typeof(x) for x in leaves)
        linear = _checked_linear_map(self, in_avals)
        # JAX hands a Python number on as a number that knows its dtype, but isn't an array.
        arrays = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in leaves]
        args = jax.tree.unflatten(self.in_tree, arrays)
        if op._forward is None:
            # The operation and not its definition: what differentiates the value again, as in
            # the derivative of a vjp, then meets the rule.
            outs = op._primitive.bind(*same_varying_axes(arrays), call=self, rule=op.keeper())
            return outs, args, linear
        y, residuals = op._forward(*args, **dict(self.static))
        if jax.tree.structure(residuals) != linear.residual_tree:  # a static value has changed
            linear = _checked_linear_map.__wrapped__(self, in_avals)
        return jax.tree.leaves(y), residuals, linear


@dataclasses.dataclass(frozen=True)
class Axis:
    """The axis that a `vmap` maps: how long it is and what it is called, if anything."""

    size: int
    name: Any
    spmd_name: Any

    @staticmethod
    def of(axis_data) -> Axis:
        return Axis(axis_data.size, axis_data.name, axis_data.spmd_name)

    def __repr__(self):
        return str(self.size)

    def vmap(self, function: Callable, in_axes, out_axes) -> Callable:
        return jax.vmap(
            function,
            in_axes,
            out_axes,
            axis_size=self.size,
            axis_name=self.name,
            spmd_axis_name=self.spmd_name,
        )


@dataclasses.dataclass(frozen=True)
class MappedCall:
    """A call under `vmap`: in_axes[i] is the mapped axis of the i-th array, None if shared."""

    call: Call | MappedCall
    in_axes: tuple[int | None, ...]
    axis: Axis

    def __repr__(self):
        return f"{self.call} vmapped over {self.axis}"

    @property
    def operation(self):
        return self.call.operation

    def look(self, leaves, types=None):
        types = map(jax.typeof, leaves) if types is None else types
        pairs = zip(types, self.in_axes, strict=True)
        self.call.look(leaves, [_without_axis(t, axis) for t, axis in pairs])

    def primal(self, *leaves):
        return self.axis.vmap(self.call.primal, self.in_axes, 0)(*leaves)

    def forward(self, *leaves) -> tuple[list, Any, MappedLinearMap]:
        in_avals = tuple(jax.typeof(x) for x in leaves)
        residual_axes = _mapped_residuals(self, in_avals)
        derivatives = []

        def outs_and_residuals(*leaves):
            outs, residuals, linear = self.call.forward(*leaves)
            derivatives.append(linear)
            return outs, residuals

        outs, residuals = self.axis.vmap(outs_and_residuals, self.in_axes, (0, residual_axes))(
            *leaves
        )
        inner = derivatives[0]
        takes = _where(inner.takes)
        linear = MappedLinearMap(
            inner,
            tuple(jax.tree.leaves(residual_axes, is_leaf=lambda a: a is None)),
            tuple(self.in_axes[i] for i in takes),
            tuple(in_avals[i] for i in takes),
            inner.takes,
            self.axis,
        )
        return outs, residuals, linear


@_kept
def _mapped_residuals(mapped: MappedCall, in_avals):
    """For each residual, 0 if it depends on a mapped argument, None if it doesn't.

    This is the trap in vmap. A weight that the examples share is a residual of `W @ x`;
    broadcast to the batch it would cost batch-size times its memory and a batch of
    matrix-vector products where one matrix product does.
    """
    residuals_of = lambda *leaves: mapped.call.forward(*leaves)[1]
    return mapped_results(mapped.axis, residuals_of, mapped.in_axes, in_avals)


def mapped_results(axis: Axis, function: Callable, in_axes, in_avals) -> Any:
    """For each result of a function under vmap, 0 if it depends on a mapped argument, else None.

    JAX itself is asked: the rule of a `custom_vmap` is told what is batched.
    """
    is_mapped: list[bool] = []

    @jax.custom_batching.custom_vmap
    def observe(*leaves):
        return leaves

    @observe.def_vmap
    def _(axis_size, in_batched, *leaves):
        is_mapped.extend(in_batched)
        return leaves, tuple(in_batched)

    structure: Any = None

    def observed(*args):
        nonlocal structure
        flat, structure = jax.tree.flatten(function(*args))
        return observe(*flat) if flat else ()

    jax.eval_shape(axis.vmap(observed, in_axes, 0), *in_avals)
    # JAX doesn't call the rule above where nothing is mapped.
    is_mapped = is_mapped or [False] * structure.num_leaves
    return jax.tree.unflatten(structure, [0 if m else None for m in is_mapped])


def call_of(equation: Equation) -> Call | MappedCall | None:
    """The call of an fnn operation that an equation is, if it is one."""
    call = equation.params.get("call")
    return call if isinstance(call, (Call, MappedCall)) else None


# --------------------------------------------------- the derivative, and the derivative under vmap


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """The derivative of a call, linear in the tangents, at residuals given at each use.

    in_avals, out_avals: the types of the call's arrays, in and out.
    may: which of the call's arrays can get a gradient at all: not the integers, and not those
        whose gradient `backward` says is None.
    takes: of which of the call's arrays this map takes a tangent.
    """

    call: Call
    in_avals: tuple
    out_avals: tuple
    out_tree: Any
    residual_tree: Any
    may: tuple[bool, ...]
    takes: tuple[bool, ...]

    def __repr__(self):
        return repr(self.call)

    @property
    def operation(self):
        return self.call.operation

    def restrict(self, keep: Sequence[bool]) -> LinearMap:
        """The same map with a tangent of zero for all but the kept ones of its arguments."""
        return dataclasses.replace(self, takes=_restrict(self.takes, keep))

    def full_backward(self, residuals: Sequence, dys: Sequence) -> list:
        """The hand-written backward: one gradient for each argument of this map.

        dys are those of the inexact outputs. What only other arguments' gradients need is left
        out; without jit around, nobody else would do that.
        """

        avals = tuple(map(jax.typeof, residuals)), tuple(map(jax.typeof, dys))
        if self.operation.compiled:
            closed = _backward_jaxpr(self, *avals)
        elif self.takes != self.may:
            closed = _backward_jaxpr.__wrapped__(self, *avals)
        else:
            return self.taken_gradients(residuals, dys)
        return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *residuals, *dys)

    def taken_gradients(self, residuals: Sequence, dys: Sequence) -> list:
        # None where there was a gradient when the rule was checked: it is zero now.
        found = zip(self.takes, self.gradients(residuals, dys), self.in_avals, strict=True)
        return [_zeros_or_none(a) if g is None else g for is_in, g, a in found if is_in]

    def gradients(self, residuals: Sequence, dys: Sequence) -> list:
        """`backward` as it is written: a gradient or None for each array of the call."""
        op = self.call.operation
        given = iter(dys)
        dy = [next(given) if _is_inexact(a) else None for a in self.out_avals]
        assert op._backward is not None
        grads = op._backward(
            jax.tree.unflatten(self.residual_tree, residuals),
            jax.tree.unflatten(self.out_tree, dy),
            **dict(self.call.static),
        )
        return _flat_gradients(self.call, self.in_avals, grads)

    def tangent(self, residuals: Sequence, dxs: Sequence) -> list:
        """The pushforward: the transpose of `backward`, or the hand-written `tangent`."""
        op = self.call.operation
        if op._tangent is not None:
            given = iter(dxs)
            flat = [
                next(given) if is_in else _zeros_or_none(aval)
                for is_in, aval in zip(self.takes, self.in_avals, strict=True)
            ]
            dx = jax.tree.unflatten(self.call.in_tree, flat)
            dy = op._tangent(
                jax.tree.unflatten(self.residual_tree, residuals), *dx, **dict(self.call.static)
            )
            return _flat_tangents(op.name, self.out_tree, self.out_avals, dy)

        def from_dys(*dys):
            return self.full_backward(residuals, dys)

        avals = [a for a in self.out_avals if _is_inexact(a)]
        dxs = _match_types(dxs, [a for a, t in zip(self.in_avals, self.takes) if t])
        return list(jax.linear_transpose(from_dys, *avals)(list(dxs)))


@_kept
def _backward_jaxpr(linear: LinearMap, residual_avals, dy_avals) -> ClosedJaxpr:
    closed = jax.make_jaxpr(linear.taken_gradients)(list(residual_avals), list(dy_avals))
    everything = [True] * len(closed.jaxpr.outvars)
    jaxpr, _ = dce_jaxpr(closed.jaxpr, everything, instantiate=True)
    return ClosedJaxpr(jaxpr, closed.consts)


@dataclasses.dataclass(frozen=True)
class MappedLinearMap:
    """A linear map under vmap; an axis is None for what all examples share.

    dx_avals: the types of the tangents it takes.
    takes: of which of the call's arrays it takes a tangent.
    """

    linear: LinearMap | MappedLinearMap
    residual_axes: tuple[int | None, ...]
    dx_axes: tuple[int | None, ...]
    dx_avals: tuple
    takes: tuple[bool, ...]
    axis: Axis

    def __repr__(self):
        return f"{self.linear} vmapped over {self.axis}"

    @property
    def operation(self):
        return self.linear.operation

    def restrict(self, keep: Sequence[bool]) -> MappedLinearMap:
        return dataclasses.replace(
            self,
            linear=self.linear.restrict(keep),
            dx_axes=tuple(self.dx_axes[i] for i in _where(keep)),
            dx_avals=tuple(self.dx_avals[i] for i in _where(keep)),
            takes=_restrict(self.takes, keep),
        )

    def tangent(self, residuals: Sequence, dxs: Sequence) -> list:
        axes = (list(self.residual_axes), list(self.dx_axes))
        return self.axis.vmap(self.linear.tangent, axes, 0)(list(residuals), list(dxs))

    def _tangent_at(self, residuals, *dxs):
        return self.tangent(residuals, dxs)

    def full_backward(self, residuals: Sequence, dys: Sequence) -> list:
        """Each example's gradients where arguments are mapped; their sum where they are shared.

        The sum is the transpose of the vmapped tangent map, which for a weight is one
        contraction over the batch, and for a convolution one convolution.
        """
        is_shared = [axis is None for axis in self.dx_axes]
        grads: list = [None] * len(is_shared)
        if any(is_shared):
            shared = self.restrict(is_shared)
            for i, g in zip(_where(is_shared), shared._summed(residuals, dys), strict=True):
                grads[i] = g
        if not all(is_shared):
            is_mapped = [not s for s in is_shared]
            own = self.restrict(is_mapped)
            vmapped = self.axis.vmap(
                own.linear.full_backward, (list(self.residual_axes), 0), list(own.dx_axes)
            )
            for i, g in zip(_where(is_mapped), vmapped(list(residuals), list(dys)), strict=True):
                grads[i] = g
        return grads

    def _summed(self, residuals, dys):
        if self.operation._tangent is None:
            tangent = functools.partial(self._tangent_at, residuals)
            transposed = jax.linear_transpose(tangent, *self.dx_avals)
            return with_matrix_products(transposed)(list(dys))
        # A hand-written tangent need not be transposable: sum the gradients themselves.
        vmapped = self.axis.vmap(self.linear.full_backward, (list(self.residual_axes), 0), 0)
        return [
            None if g is None else jnp.sum(g, axis=0, dtype=g.dtype)
            for g in vmapped(list(residuals), list(dys))
        ]


def linear_map_of(equation: Equation) -> LinearMap | MappedLinearMap | None:
    """The derivative of an fnn operation that an equation applies, if it does."""
    linear = equation.params.get("linear")
    return linear if isinstance(linear, (LinearMap, MappedLinearMap)) else None


# ----------------------------------------------------------------------- is the rule well-formed?


@_kept
def _checked_linear_map(call: Call, in_avals) -> LinearMap:
    """Trace the rule once for these types, and complain if forward and backward don't fit."""
    op, static = call.operation, dict(call.static)
    if op._backward is None:
        raise RuleError(
            f"{op.name} has no backward rule, so it can't be differentiated. Write one:\n\n"
            f"    @{op.name}.backward\n    def _(residuals, dy): return (...)"
        )
    args = jax.tree.unflatten(call.in_tree, list(in_avals))
    wanted = _types(functools.partial(op.definition, **static), *args)
    if op._forward is None:
        value, residuals = wanted, args
    else:
        pair = _types(functools.partial(op._forward, **static), *args)
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise RuleError(
                f"{op.name}.forward must return a pair, (value, residuals), but it returned "
                f"{_describe(pair)}."
            )
        value, residuals = pair
    out_tree: Any = jax.tree.structure(wanted)
    same = jax.tree.structure(value) == out_tree and all(
        v.shape == w.shape and v.dtype == w.dtype
        for v, w in zip(jax.tree.leaves(value), jax.tree.leaves(wanted), strict=True)
    )
    if not same:
        raise RuleError(
            f"{op.name}.forward returned the value {_describe(value)}, but {op.name} itself "
            f"returns {_describe(wanted)}."
        )
    out_avals = tuple(jax.make_jaxpr(call.primal)(*in_avals).out_avals)
    inexact = [_is_inexact(a) for a in in_avals]
    residual_tree = jax.tree.structure(residuals)
    may = tuple(inexact)
    linear = LinearMap(call, in_avals, out_avals, out_tree, residual_tree, may, may)
    residual_leaves = jax.tree.leaves(residuals)
    dy_avals = [a for a in out_avals if _is_inexact(a)]
    has_gradient = [False] * len(in_avals)
    nothing_flows = not dy_avals or not any(inexact)

    def gradients(residual_leaves, dys):
        flat = linear.gradients(residual_leaves, dys)
        for i, (g, ok) in enumerate(zip(flat, inexact, strict=True)):
            has_gradient[i] = ok and g is not None
        return [g for g, has in zip(flat, has_gradient, strict=True) if has]

    if not nothing_flows:
        jaxpr = jax.make_jaxpr(gradients)(residual_leaves, dy_avals)
        _must_be_closed(f"{op.name}.backward", jaxpr)
        _must_be_linear(op, jaxpr, len(residual_leaves), call, in_avals, has_gradient)
        if op._tangent is not None and any(has_gradient):
            _tangent_must_be_linear(
                dataclasses.replace(linear, takes=tuple(has_gradient)), residual_leaves
            )
    return dataclasses.replace(linear, may=tuple(has_gradient), takes=tuple(has_gradient))


def _flat_gradients(call: Call, in_avals, grads) -> list:
    """What `backward` returned, as one gradient or None for each array of the call."""
    op = call.operation
    arg_trees = call.in_tree.children()
    names = op.argument_names(len(arg_trees))
    if not isinstance(grads, (tuple, list)):
        raise RuleError(
            f"{op.name}.backward must return a tuple with one gradient for each of its "
            f"{len(arg_trees)} arguments ({', '.join(names)}), but it returned "
            f"{_describe(grads)}. (A single gradient is written with a comma: `return (dx,)`.)"
        )
    if len(grads) != len(arg_trees):
        raise RuleError(
            f"{op.name}.backward returned {len(grads)} gradients, but {op.name} has "
            f"{len(arg_trees)} arguments: {', '.join(names)}. (None stands for no gradient.)"
        )
    flat: list[Any] = []
    start = 0
    for name, tree, grad in zip(names, arg_trees, grads, strict=True):
        avals = in_avals[start : start + tree.num_leaves]
        start += tree.num_leaves
        if grad is None:
            flat += [None] * tree.num_leaves
            continue
        try:
            leaves = tree.flatten_up_to(grad)
        except ValueError as error:
            raise RuleError(
                f"{op.name}.backward: the gradient of argument '{name}' has the wrong structure: "
                f"{error}."
            ) from None
        for leaf, aval in zip(leaves, avals, strict=True):
            if leaf is None or not _is_inexact(aval):
                flat.append(None)
                continue
            if not jax.tree_util.all_leaves([leaf]):
                raise RuleError(
                    f"{op.name}.backward: the gradient of argument '{name}' has the wrong "
                    f"structure: {_describe(leaf)} for an array of shape {aval.shape}."
                )
            got = jax.typeof(leaf)
            if got.shape != aval.shape:
                raise RuleError(
                    f"{op.name}.backward: the gradient of argument '{name}' has shape "
                    f"{got.shape}, but '{name}' has shape {aval.shape}."
                )
            if got.dtype != aval.dtype and not got.weak_type:
                raise RuleError(
                    f"{op.name}.backward: the gradient of argument '{name}' has dtype "
                    f"{got.dtype}, but '{name}' of shape {aval.shape} has dtype {aval.dtype}."
                )
            keep = got.dtype == aval.dtype and got.weak_type == aval.weak_type
            leaf = leaf if keep else jnp.asarray(leaf, aval.dtype)
            flat.append(as_varying(leaf, aval))
    return flat


def _flat_tangents(name, out_tree, out_avals, dy) -> list:
    """What `tangent` returned, as one array for each inexact array of the value."""
    try:
        leaves = out_tree.flatten_up_to(dy)
    except ValueError as error:
        raise RuleError(f"{name}.tangent returned the wrong structure: {error}.") from None
    flat = []
    for d, aval in zip(leaves, out_avals, strict=True):
        if not _is_inexact(aval):
            continue
        d = jnp.zeros(aval.shape, aval.dtype) if d is None else d
        if not jax.tree_util.all_leaves([d]):
            raise RuleError(
                f"{name}.tangent returned the wrong structure: {_describe(d)} for an array of "
                f"shape {aval.shape}."
            )
        got = jax.typeof(d)
        if got.shape != aval.shape or (got.dtype != aval.dtype and not got.weak_type):
            raise RuleError(
                f"{name}.tangent returned a dy of shape {got.shape} and dtype {got.dtype}, but "
                f"the value of {name} has shape {aval.shape} and dtype {aval.dtype}."
            )
        flat.append(as_varying(jnp.asarray(d, aval.dtype), aval))
    return flat


def _must_be_linear(op, closed, num_residuals, call, in_avals, has_gradient):
    """Backward must be linear in dy: transposable by JAX, and without a constant term."""
    names = _leaf_names(call)
    of = [(n, a.shape) for n, a, has in zip(names, in_avals, has_gradient, strict=True) if has]
    jaxpr, invars = closed.jaxpr, closed.jaxpr.invars
    shapes = ", ".join(str(v.aval.shape) for v in invars[num_residuals:])
    depends = [linearity.CONSTANT] * num_residuals + [linearity.LINEAR] * (
        len(invars) - num_residuals
    )
    # Without a tangent of the rule's own, JAX's transposition finds what isn't linear at all.
    found = linearity.kinds(closed, depends, strict=op._tangent is not None)
    for how, (name, shape) in zip(found, of, strict=True):
        _must_be_zero_or_linear(
            how,
            "doesn't depend on dy at all (a gradient of zero is written None)",
            f"{op.name}.backward isn't linear in dy: the gradient of argument '{name}' "
            f"(shape {shape}, dy's shape {shapes})",
        )
    if op._tangent is not None:
        return
    for i, (name, shape) in enumerate(of):

        def one(residuals, dys, i=i):
            return jax.core.eval_jaxpr(jaxpr, closed.consts, *residuals, *dys)[i]

        def transposed(residuals, ct, one=one):
            dys = [v.aval for v in invars[num_residuals:]]
            return jax.linear_transpose(lambda *d: one(residuals, d), *dys)(ct)

        residuals = [v.aval for v in invars[:num_residuals]]
        try:
            jax.eval_shape(transposed, residuals, jaxpr.outvars[i].aval)
        except Exception as error:
            raise RuleError(
                f"{op.name}.backward can't be transposed: JAX finds that the gradient of "
                f"argument '{name}' (shape {shape}) isn't linear in dy (shape {shapes}). If it "
                f"is linear, but in a form that JAX can't transpose (a while loop), write its "
                f"forward-mode rule under @{op.name}.tangent."
            ) from error


def _tangent_must_be_linear(linear: LinearMap, residual_avals):
    op = linear.operation
    dx_avals = [a.to_tangent_aval() for a, t in zip(linear.in_avals, linear.takes) if t]
    closed = jax.make_jaxpr(linear.tangent)(residual_avals, dx_avals)
    _must_be_closed(f"{op.name}.tangent", closed)
    ins = [linearity.CONSTANT] * len(residual_avals) + [linearity.LINEAR] * len(dx_avals)
    for how, dy in zip(linearity.kinds(closed, ins, strict=True), closed.out_avals, strict=True):
        _must_be_zero_or_linear(
            how,
            "doesn't depend on them at all (a tangent of zero is written None)",
            f"{op.name}.tangent isn't linear in the tangents of its arguments: dy of shape "
            f"{dy.shape}",
        )


def _must_be_zero_or_linear(how: str, constant: str, what: str) -> None:
    """An error that says of `what` how it depends instead; `constant` says it of a constant."""
    if how not in (linearity.ZERO, linearity.LINEAR):
        raise RuleError(f"{what} {constant if how == linearity.CONSTANT else how}.")


def _leaf_names(call: Call) -> list[str]:
    names, trees = [], call.in_tree.children()
    for name, tree in zip(call.operation.argument_names(len(trees)), trees, strict=True):
        names += [name] * tree.num_leaves
    return names


# ------------------------------------------------------------------------------ the two primitives


# JAX keeps all that is registered for a primitive, for ever: so there is one for each name, which
# knows no operation, and not one for each operation.


@functools.cache
def _primitive_of_operation(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True

    @functools.partial(jax.jit, static_argnames="call")
    def compiled(*leaves, call):
        return call.primal(*leaves)

    def known_values(*leaves, call, rule):
        if isinstance(call, MappedCall):
            call.look(leaves)
        if call.operation.compiled:
            return compiled(*leaves, call=call)
        return [jnp.asarray(y) for y in call.primal(*map(jnp.asarray, leaves))]

    def jvp(primals, tangents, *, call, rule):
        if all(type(t) is ad.Zero for t in tangents):
            outs = primitive.bind(*primals, call=call, rule=rule)
            return outs, [ad.Zero(jax.typeof(y).to_tangent_aval()) for y in outs]
        outs, residuals, linear = call.forward(*primals)
        given = [t for t, is_in in zip(tangents, linear.takes, strict=True) if is_in]
        keep = [type(t) is not ad.Zero for t in given]
        out_avals = [jax.typeof(y) for y in outs]
        if not any(keep) or not any(map(_is_inexact, out_avals)):
            return outs, [ad.Zero(a.to_tangent_aval()) for a in out_avals]
        dxs = [t for t, k in zip(given, keep, strict=True) if k]
        residuals = jax.tree.leaves(residuals)
        dys = iter(_bind_linear(call.operation, residuals, dxs, linear.restrict(keep)))
        return outs, [
            next(dys) if _is_inexact(a) else ad.Zero(a.to_tangent_aval()) for a in out_avals
        ]

    def batch(axis_data, leaves, axes, *, call, rule):
        if all(axis is None for axis in axes):
            outs = primitive.bind(*leaves, call=call, rule=rule)
            return outs, [None] * len(outs)
        mapped = MappedCall(call, tuple(axes), Axis.of(axis_data))
        outs = primitive.bind(*leaves, call=mapped, rule=rule)
        return outs, [0] * len(outs)

    def transpose(cotangents, *arrays, call, rule):
        """Of an operation that is itself linear, such as `W @ x` in x; JAX refuses the others."""
        unknown = [ad.is_undefined_primal(x) for x in arrays]
        out_avals = _out_avals(call, tuple(_aval(x) for x in arrays))

        def linear(*xs):
            given = iter(xs)
            full = [next(given) if u else x for u, x in zip(unknown, arrays, strict=True)]
            outs = call.primal(*full)
            return [y for y, a in zip(outs, out_avals, strict=True) if _is_inexact(a)]

        cts = [
            ad.instantiate_zeros(ct)
            for ct, a in zip(cotangents, out_avals, strict=True)
            if _is_inexact(a)
        ]
        avals = [arrays[i].aval for i in _where(unknown)]
        found = iter(jax.linear_transpose(linear, *avals)(cts))
        return [next(found) if u else None for u in unknown]

    def abstract_eval(*in_avals, call, rule):
        return _out_avals(call, in_avals)

    primitive.def_impl(known_values)
    primitive.def_abstract_eval(abstract_eval)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.fancy_primitive_batchers[primitive] = batch
    definition = lambda *leaves, call, rule: call.primal(*leaves)
    mlir.register_lowering(primitive, mlir.lower_fun(definition))
    _also_experimental(primitive, definition)
    return primitive


def _bind_linear(operation, residuals, dxs, linear):
    """Apply a derivative to tangents, as one equation."""
    arrays = same_varying_axes([*residuals, *dxs])
    params = {"linear": linear, "num_residuals": len(residuals), "rule": operation.keeper()}
    return operation._linear_primitive.bind(*arrays, **params)


@functools.cache
def _primitive_of_linear_map(name: str) -> Primitive:
    primitive = Primitive(f"{name}_tangent")
    primitive.multiple_results = True

    def act(*arrays, linear, num_residuals, rule=None):
        return linear.tangent(arrays[:num_residuals], arrays[num_residuals:])

    @functools.partial(jax.jit, static_argnames=("linear", "num_residuals"))
    def compiled(*arrays, linear, num_residuals):
        return act(*arrays, linear=linear, num_residuals=num_residuals)

    def known_values(*arrays, linear, num_residuals, rule):
        run = compiled if linear.operation.compiled else act
        return run(*arrays, linear=linear, num_residuals=num_residuals)

    def jvp(primals, tangents, *, linear, num_residuals, rule):
        bind = functools.partial(_bind_linear, linear.operation)
        residuals, dxs = primals[:num_residuals], primals[num_residuals:]
        outs = bind(residuals, dxs, linear)
        total = [ad.Zero(jax.typeof(y)) for y in outs]
        # Linear in dx: the same map on the tangents of dx.
        keep = [type(t) is not ad.Zero for t in tangents[num_residuals:]]
        if any(keep):
            given = [t for t, k in zip(tangents[num_residuals:], keep, strict=True) if k]
            total = bind(residuals, given, linear.restrict(keep))
        # Not linear in the residuals: differentiate the tangent map by those that move.
        moves = [type(t) is not ad.Zero for t in tangents[:num_residuals]]
        if any(moves):

            def by_residuals(*moving):
                given = iter(moving)
                full = [next(given) if m else r for m, r in zip(moves, residuals, strict=True)]
                return linear.tangent(full, dxs)

            moving = [r for r, m in zip(residuals, moves, strict=True) if m]
            rates = [t for t, m in zip(tangents[:num_residuals], moves, strict=True) if m]
            _, more = jax.jvp(by_residuals, moving, rates)
            total = [ad.add_tangents(t, m) for t, m in zip(total, more, strict=True)]
        return outs, total

    def transpose(cotangents, *arrays, linear, num_residuals, rule):
        dxs = arrays[num_residuals:]
        wanted = [ad.is_undefined_primal(x) for x in dxs]
        dys = [ad.instantiate_zeros(ct) for ct in cotangents]
        residuals = arrays[:num_residuals]
        found = iter(linear.restrict(wanted).full_backward(residuals, dys))
        grads: list = [None] * len(arrays)
        for i in _where(wanted):
            g = next(found)
            grads[num_residuals + i] = ad.Zero(dxs[i].aval) if g is None else g
        return grads

    def batch(axis_data, arrays, axes, *, linear, num_residuals, rule):
        params = {"num_residuals": num_residuals, "rule": rule}
        if all(axis is None for axis in axes):
            outs = primitive.bind(*arrays, linear=linear, **params)
            return outs, [None] * len(outs)
        mapped = MappedLinearMap(
            linear,
            tuple(axes[:num_residuals]),
            tuple(axes[num_residuals:]),
            tuple(jax.typeof(x) for x in arrays[num_residuals:]),
            linear.takes,
            Axis.of(axis_data),
        )
        outs = primitive.bind(*arrays, linear=mapped, **params)
        return outs, [0] * len(outs)

    def abstract_eval(*in_avals, linear, num_residuals, rule):
        return _linear_out_avals(linear, num_residuals, in_avals)

    primitive.def_impl(known_values)
    primitive.def_abstract_eval(abstract_eval)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.fancy_primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(act))
    _also_experimental(primitive, act)
    return primitive


# ------------------------------------------------------------------- jax.experimental's functions


def _also_experimental(primitive: Primitive, action: Callable) -> None:
    """Tell `jet` and `checkify` about a primitive that does `action(*arrays, **params)`."""

    def series(primals, terms, **params):
        return _taylor(lambda *xs: primitive.bind(*xs, **params), primals, terms)

    def checked(*args, **params):
        # (A context in newer JAX,) the errors so far, those to look for, and the arrays.
        start = next(i for i, a in enumerate(args) if isinstance(a, checkify.Error)) + 2
        inside = jax.jit(functools.partial(action, **params))
        closed = jax.make_jaxpr(inside)(*args[start:])
        known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        known.update(zip(closed.jaxpr.invars, args[start:], strict=True))
        read = lambda v: v.val if isinstance(v, Literal) else known[v]
        (eqn,) = closed.jaxpr.eqns
        check = checks[eqn.primitive]
        error, outs = check(*args[:start], *map(read, eqn.invars), **eqn.params)
        known.update(zip(eqn.outvars, outs, strict=True))
        return error, list(map(read, closed.jaxpr.outvars))

    jet.jet_rules[primitive] = series
    # JAX offers no way to register with checkify: this is the table that its public function uses.
    checks = getattr(inspect.unwrap(checkify.checkify), "__globals__", {}).get("error_checks")
    if checks is not None:
        checks[primitive] = checked


def _taylor(f, primals, terms):
    """The Taylor coefficients of f along a curve x₀ + x₁ t + x₂ t² + …, from those of the curve.

    They are derivatives by t, over factorials, and the derivatives are forward mode's, nested: so
    they follow from the hand-written rule.
    """
    moving = _where([_is_inexact(jax.typeof(jnp.asarray(x))) for x in primals])

    def along(t):
        xs = list(primals)
        for i in moving:
            for k, term in enumerate(terms[i]):
                xs[i] = xs[i] + term * (t ** (k + 1)).astype(jnp.asarray(term).dtype)
        return list(f(*xs))

    g, coefficients = along, []
    for k in range(max(map(len, terms)) + 1):
        values = g(jnp.zeros(()))
        scale = 1 / math.factorial(k)
        coefficients.append([y * scale if _is_inexact(jax.typeof(y)) else y for y in values])
        g = functools.partial(_by_t, g)
    outs, *more = coefficients
    return outs, [list(of_output) for of_output in zip(*more, strict=True)]


def _by_t(g, t):
    values, rates = jax.jvp(g, (t,), (jnp.ones_like(t),))
    return [
        dy if _is_inexact(jax.typeof(y)) else jnp.zeros_like(y)
        for y, dy in zip(values, rates, strict=True)
    ]


# -------------------------------------------------------------------------------- small services


@_kept
def _out_avals(call, in_avals):
    return tuple(jax.make_jaxpr(call.primal)(*in_avals).out_avals)


@_kept
def _linear_out_avals(linear, num_residuals, in_avals):
    jaxpr = jax.make_jaxpr(linear.tangent)(
        list(in_avals[:num_residuals]), list(in_avals[num_residuals:])
    )
    return tuple(jaxpr.out_avals)


@_kept
def _out_tree(call: Call, shapes):
    args = jax.tree.unflatten(call.in_tree, [jax.ShapeDtypeStruct(s, d) for s, d in shapes])
    definition = functools.partial(call.operation.definition, **dict(call.static))
    closed, shape = jax.make_jaxpr(definition, return_shape=True)(*args)
    _must_be_closed(call.operation.name, closed)
    return jax.tree.structure(shape)


def _types(function, *args):
    """The types of what a function returns. `jax.eval_shape` loses a mesh that is part manual."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    return jax.tree.unflatten(jax.tree.structure(shapes), closed.out_avals)


def _must_be_closed(name, closed_jaxpr):
    """A traced value from outside would get no gradient, and leak out of its trace."""
    for const in closed_jaxpr.consts:
        if isinstance(const, jax.core.Tracer):
            raise RuleError(
                f"{name} uses a traced value of shape {const.shape} and dtype {const.dtype} from "
                "the function around it. Pass it as a positional argument."
            )


def _shape_and_dtype(aval):
    return aval.shape, aval.dtype


def _is_known(x) -> bool:
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def _without_axis(aval, axis):
    if axis is None:
        return aval
    shape = list(aval.shape)
    del shape[axis]
    return jax.ShapeDtypeStruct(tuple(shape), aval.dtype)


def _must_be_kept(where: str, x) -> None:
    """JAX drops the mask of a masked array, and the high bits of an integer without x64."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{where}: an argument is a masked array of shape {x.shape}, whose mask JAX would "
            "drop. Fill it (x.filled(value)), and give the mask as weights."
        )
    is_wide = isinstance(x, (np.ndarray, np.generic)) and x.dtype in (np.int64, np.uint64)
    if not is_wide or not x.size or jax.config.jax_enable_x64:
        return
    kept = np.iinfo(np.int32 if x.dtype == np.int64 else np.uint32)
    low, high = int(x.min()), int(x.max())
    if low < kept.min or high > kept.max:
        raise ValueError(
            f"{where}: an argument of dtype {x.dtype} and shape {x.shape} holds "
            f"{high if high > kept.max else low}, which {kept.dtype} can't: JAX would drop its "
            "high bits (jax.enable_x64 keeps them)."
        )


def _aval(x):
    return x.aval if ad.is_undefined_primal(x) else jax.typeof(x)


def _is_inexact(aval) -> bool:
    return jax.dtypes.issubdtype(aval.dtype, jnp.inexact)


def _zeros_or_none(aval):
    if not _is_inexact(aval):
        return None
    return as_varying(jnp.zeros(aval.shape, aval.dtype), aval)


def _restrict(takes, keep):
    kept = iter(keep)
    return tuple(is_in and next(kept) for is_in in takes)


def _where(flags):
    return [i for i, flag in enumerate(flags) if flag]


def _describe(tree) -> str:
    def leaf(x):
        return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else repr(x)

    return str(jax.tree.map(leaf, tree)).replace("'", "")


def _match_types(arrays, avals):
    return [jnp.asarray(x, a.dtype) for x, a in zip(arrays, avals, strict=True)]
