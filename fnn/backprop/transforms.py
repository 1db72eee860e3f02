"""`fnn.grad`, `fnn.value_and_grad`, `fnn.vjp`: JAX's signatures, our rules.

They trace the function to a program and run the reverse sweep along it. All three are
ordinary traceable functions: they work under jit, vmap, jvp and each other.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy

from fnn import arguments
from fnn.backprop import sweep
from fnn.backprop.partial_evaluation import PartialEvaluation, partially_evaluate
from fnn.backprop.primitives import rule_of
from fnn.jaxpr import is_inexact, program, trace
from fnn.meshes import as_varying


def value_and_grad(
    fun: Callable,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable:
    """A function that returns `(fun(*args), gradient)`, by the hand-written rules.

    The same signature, results and errors as `jax.value_and_grad`; the compiled program
    does the same work. The reverse sweep is that of CS231n, lecture 4.

    Args:
        fun: a function of pytrees of arrays with a scalar output, `()` in shape; with
            `has_aux`, a pair of that and any pytree.
        argnums: which positional arguments to differentiate with respect to: a number, counted
            from the end if negative, or several different ones.
        has_aux: whether `fun` returns `(value, auxiliary data)`.
        holomorphic: whether `fun` is a holomorphic function of complex arguments.
        allow_int: whether integer arguments are allowed (their gradient has dtype float0).

    Returns:
        A function of the same arguments. The gradient has the structure, shapes and dtypes
        of the argument (a tuple of such if `argnums` is a tuple).

    Raises:
        TypeError: `fun` can't be called, `argnums` isn't an integer or several, the output isn't
            a real scalar (complex and `holomorphic=True`), an argument isn't inexact, or there
            are fewer positional arguments than `argnums` asks for.
        ValueError: `argnums` is empty, names an argument twice, or counts beyond the first.

    `fun` is traced, as `jit` would: Python control flow on values needs `lax.cond`.

    >>> value_and_grad(lambda x: x**3)(2.0)
    (Array(8., dtype=float32, weak_type=True), Array(12., dtype=float32, weak_type=True))
    """
    arguments.function("value_and_grad", "fun", fun)
    numbers, is_one = _numbers("value_and_grad", argnums)
    name = getattr(fun, "__name__", repr(fun))

    @functools.wraps(fun, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def value_and_gradient(*args, **kwargs):
        for i, arg in enumerate(args):
            arguments.no_result("grad", f"argument {i}", arg)
        positions = _positions(numbers, args, name)
        chosen = [args[i] for i in positions]
        leaves, tree = jax.tree.flatten(chosen)
        for leaf in leaves:
            _check_input("grad", leaf, holomorphic, allow_int)
        leaves = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in leaves]
        traced = _Traced(fun, args, kwargs, positions, tree, has_aux)
        flat = traced.program(leaves)
        out_aval = _check_output(traced, flat, holomorphic)
        seed = _seed(out_aval)
        outs, found = sweep.gradients_of(
            flat,
            leaves,
            [is_inexact(flat.avals[i]) for i in flat.inputs],
            [seed] + [None] * (len(flat.outputs) - 1),
            rule_of,
        )
        given = iter(found)
        gradients = [
            next(given) if is_inexact(flat.avals[i]) else _float0(flat.avals[i])
            for i in flat.inputs
        ]
        gradient = jax.tree.unflatten(tree, gradients)
        gradient = gradient[0] if is_one else tuple(gradient)
        value, aux = traced.outputs(outs)
        return ((value, aux), gradient) if has_aux else (value, gradient)

    return value_and_gradient


def grad(
    fun: Callable,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable:
    """The gradient of a scalar function, by the hand-written rules; see `value_and_grad`.

    The same signature, results and errors as `jax.grad`.

    >>> grad(lambda x, y, z: (x + y) * z, argnums=(0, 1, 2))(-2.0, 5.0, -4.0)  # CS231n
    (Array(-4., dtype=float32, weak_type=True), Array(-4., dtype=float32, weak_type=True),
     Array(3., dtype=float32, weak_type=True))
    """
    arguments.function("grad", "fun", fun)
    numbers, is_one = _numbers("grad", argnums)
    both = value_and_grad(fun, numbers[0] if is_one else numbers, has_aux, holomorphic, allow_int)

    @functools.wraps(fun, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def gradient(*args, **kwargs):
        value, found = both(*args, **kwargs)
        return (found, value[1]) if has_aux else found

    return gradient


def vjp(fun: Callable, *primals, has_aux: bool = False) -> Any:
    """`(fun(*primals), pullback)`; the pullback takes the upstream gradient backwards.

    The same signature and results as `jax.vjp`. The pullback is a pytree whose arrays are
    the residuals: it can leave a jitted function.

    Args:
        fun: a function of pytrees of arrays; with `has_aux` it returns a pair.
        primals: where to evaluate it.
        has_aux: whether `fun` returns `(value, auxiliary data)`.

    Returns:
        `(value, pullback)` or `(value, pullback, aux)`. `pullback(ct)`, where ct has the
        value's structure, shapes and dtypes, returns a tuple of gradients, one for each
        primal.

    Raises:
        TypeError: `fun` can't be called, or a primal holds something that isn't an array.
        TypeError, ValueError: a cotangent's structure, shape or dtype isn't the value's; the
            pullback raises it.
    """
    arguments.function("vjp", "fun", fun)
    for i, arg in enumerate(primals):
        arguments.no_result("vjp", f"argument {i}", arg)
    leaves, tree = jax.tree.flatten(primals)
    for leaf in leaves:
        _aval_of_input("vjp", leaf)
    leaves = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in leaves]
    traced = _Traced(fun, primals, {}, tuple(range(len(primals))), tree, has_aux)
    closed = traced.jaxpr(leaves)
    has_cotangent = [
        is_inexact(a) and i < traced.num_values() for i, a in enumerate(closed.out_avals)
    ]
    needed = [is_inexact(a) for a in closed.in_avals]
    cut = partially_evaluate(closed, needed, rule_of, has_cotangent)
    outs, residuals = cut.run_forward(leaves)
    cut = cut.backward_half()
    out_avals = tuple(closed.out_avals[: traced.num_values()])
    static = (cut, tree, traced.value_tree(), out_avals, tuple(closed.in_avals))
    pullback = jax.tree_util.Partial(functools.partial(_pull_back, *static), residuals)
    value, aux = traced.outputs(outs)
    return (value, pullback, aux) if has_aux else (value, pullback)


def _pull_back(
    cut: PartialEvaluation, in_tree, out_tree, out_avals, in_avals, residuals, *cotangents
):
    if len(cotangents) != 1:
        raise TypeError(
            f"The pullback takes one cotangent, of the structure {out_tree} of the value, but got "
            f"{len(cotangents)}."
        )
    leaves, tree = jax.tree.flatten(cotangents[0])
    for ct in leaves:
        _aval_of_input("the pullback", ct)
    if tree != out_tree:
        raise ValueError(
            "Tree structure of cotangent input, got "
            f"{tree}, and structure of primal output, {out_tree}, do not match."
        )
    given = []
    for ct, aval in zip(leaves, out_avals, strict=True):
        if not is_inexact(aval):
            continue
        got = jax.typeof(ct)
        if got.shape != aval.shape:
            raise ValueError(
                f"The cotangent has shape {got.shape}, but the output that it belongs to has "
                f"shape {aval.shape}."
            )
        if got.dtype != aval.dtype:
            raise TypeError(
                f"The cotangent has dtype {got.dtype}, but the output that it belongs to has "
                f"dtype {aval.dtype}; convert it with `ct.astype('{aval.dtype}')`."
            )
        given.append(ct)
    found = iter(cut.run_backward(residuals, given))
    gradients = [next(found) if is_inexact(a) else _float0(a) for a in in_avals]
    return tuple(jax.tree.unflatten(in_tree, gradients))


class _Traced:
    """A function as one of flat lists of arrays, which remembers its outputs' structure."""

    def __init__(self, fun, args, kwargs, positions, tree, has_aux):
        self.fun, self.args, self.kwargs = fun, args, kwargs
        self.positions, self.tree, self.has_aux = positions, tree, has_aux
        self._value_tree = self._aux_tree = self._aux_constants = None

    def jaxpr(self, leaves):
        return trace(self._flat, leaves)

    def program(self, leaves):
        return program(self.jaxpr(leaves))

    def _flat(self, *leaves):
        args = list(self.args)
        for i, chosen in zip(self.positions, jax.tree.unflatten(self.tree, leaves), strict=True):
            args[i] = chosen
        out = self.fun(*args, **self.kwargs)
        aux = None
        if self.has_aux:
            if not (isinstance(out, (tuple, list)) and len(out) == 2):
                raise TypeError(
                    "with has_aux=True the function must return a pair (value, auxiliary data), "
                    f"but it returned {out!r}."
                )
            out, aux = out
        values, self._value_tree = jax.tree.flatten(out)
        aux_leaves, self._aux_tree = jax.tree.flatten(aux)
        # Auxiliary data may hold anything; what wasn't traced is handed on as it is.
        self._aux_constants = [None if _is_traced(x) else (x,) for x in aux_leaves]
        for x in values:
            if not _is_array(x):
                raise TypeError(
                    f"the function's output holds {x!r} of type {type(x).__name__}, which isn't "
                    "an array; pass it out as auxiliary data, with has_aux=True."
                )
        return [*values, *(x for x in aux_leaves if _is_traced(x))]

    def num_values(self) -> int:
        return self._value_tree.num_leaves

    def value_tree(self):
        return self._value_tree

    def outputs(self, flat) -> tuple[Any, Any]:
        count = self.num_values()
        arrays = iter(flat[count:])
        aux = [next(arrays) if c is None else c[0] for c in self._aux_constants]
        return (
            jax.tree.unflatten(self._value_tree, flat[:count]),
            jax.tree.unflatten(self._aux_tree, aux),
        )


def _is_traced(x) -> bool:
    return isinstance(x, jax.core.Tracer)


def _is_array(x) -> bool:
    try:
        jax.typeof(x)
    except TypeError:
        return False
    return True


def _numbers(where, argnums) -> tuple[tuple[int, ...], bool]:
    """The argument numbers, and whether it was one and not a sequence."""
    try:
        return (operator.index(argnums),), True
    except TypeError:
        pass
    wanted = f"{where}: argnums must be an integer or a sequence of integers, but "
    if isinstance(argnums, (str, bytes)) or not isinstance(argnums, Iterable):
        raise TypeError(f"{wanted}got {arguments.show(argnums)}.")
    numbers = []
    for number in argnums:
        try:
            numbers.append(operator.index(number))
        except TypeError:
            raise TypeError(f"{wanted}it holds {arguments.show(number)}.") from None
    if not numbers:
        raise ValueError(f"{where}: argnums is empty, so there is no argument to differentiate.")
    return tuple(numbers), False


def _positions(numbers, args, name) -> tuple[int, ...]:
    shown = numbers[0] if len(numbers) == 1 else numbers
    for i in numbers:
        if not -len(args) <= i < len(args):
            kind = TypeError if i >= 0 else ValueError  # as JAX's
            raise kind(
                f"differentiating {name} with respect to argnums={shown} requires at least "
                f"{(i if i >= 0 else -i - 1) + 1} positional arguments to be passed by the "
                f"caller, but got only {len(args)} positional arguments."
            )
    positions = tuple(i % len(args) for i in numbers)
    if len(set(positions)) < len(positions):
        raise ValueError(
            f"differentiating {name} with respect to argnums={shown}: they name the same argument "
            "twice."
        )
    return positions


def _check_input(what, leaf, holomorphic, allow_int):
    dtype = _aval_of_input(what, leaf).dtype
    if dtype == jax.dtypes.float0:
        raise TypeError(
            f"{what} requires numerical-valued inputs, but got float0, the dtype of an integer "
            "argument's gradient: it has none itself."
        )
    if holomorphic:
        if not jax.dtypes.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"{what} with holomorphic=True requires inputs with complex dtype, but got {dtype}."
            )
    elif jax.dtypes.issubdtype(dtype, jnp.complexfloating):
        return  # a real function of complex arguments: Wirtinger's convention, as in JAX
    elif not jax.dtypes.issubdtype(dtype, jnp.floating) and not allow_int:
        raise TypeError(
            f"{what} requires real- or complex-valued inputs (input dtype that is a sub-dtype of "
            f"np.inexact), but got {dtype}. If you want to use Boolean- or integer-valued inputs, "
            "use vjp or set allow_int to True."
        )


def _aval_of_input(what, leaf):
    try:
        return jax.typeof(leaf)
    except TypeError:
        raise TypeError(
            f"{what} requires arguments that are pytrees of arrays, but one holds "
            f"{arguments.show(leaf)}."
        ) from None


def _check_output(traced, flat, holomorphic):
    if traced.num_values() != 1 or traced.value_tree() != jax.tree.structure(0):
        raise TypeError(
            "Gradient only defined for scalar-output functions. Output was "
            f"a pytree with structure {traced.value_tree()}. Return one scalar (the mean of the "
            "losses, say), or has_aux=True and a pair."
        )
    aval = flat.avals[flat.outputs[0]]
    if aval.shape != ():
        raise TypeError(
            f"Gradient only defined for scalar-output functions. Output had shape: {aval.shape}. "
            "Sum or average it, or use fnn.vjp or jax.vmap(fnn.grad(...))."
        )
    is_complex = jax.dtypes.issubdtype(aval.dtype, jnp.complexfloating)
    if holomorphic and not is_complex:
        raise TypeError(
            f"grad with holomorphic=True requires outputs with complex dtype, but got {aval.dtype}."
        )
    if not holomorphic and not jax.dtypes.issubdtype(aval.dtype, jnp.floating):
        hint = (
            "For holomorphic differentiation, pass holomorphic=True. For differentiation of "
            "non-holomorphic functions involving complex outputs, use fnn.vjp."
            if is_complex
            else "An integer output has no gradient: convert it, or return it as auxiliary data."
        )
        raise TypeError(
            f"grad requires real-valued outputs (output dtype that is a sub-dtype of np.floating), "
            f"but got {aval.dtype}. {hint}"
        )
    return aval


def _seed(aval):
    """The gradient of the output with respect to itself: one, of its type, weak if that is."""
    one = jnp.asarray(1.0)
    is_weak = aval.weak_type and aval.dtype == one.dtype
    return as_varying(one if is_weak else jnp.ones((), aval.dtype), aval)


def _float0(aval):
    return numpy.zeros(aval.shape, jax.dtypes.float0)
