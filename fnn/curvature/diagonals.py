"""Diagonals, traces and Gram matrices of curvature, from one sweep with columns."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fnn.curvature.columns import check_samples, columns, pair
from fnn.curvature.operators import hessian_vector_product
from fnn.jaxpr import inner_jaxprs, program, trace
from fnn.per_example.differentiate import batch_size, parameters
from fnn.per_example.gradient import _as


def ggn_diagonal(model: Callable, loss: Callable, *, key: Any = None, samples: int = 0) -> Callable:
    """The diagonal of the generalised Gauss-Newton matrix (1/N) Σₙ JₙᵀHₙJₙ.

    One sweep with the columns of H's root S: Σ_c (JᵀS_c)². With one position, (A²)ᵀ Σ_c G_c²
    (Dangel et al., "BackPACK", 2020).

    Args:
        model: `model(params, input)`, the outputs of one example, an array.
        loss: `loss(outputs, target)`, the loss of one example, convex in the outputs.
        key, samples: with samples > 0 an unbiased estimate from as many random columns, drawn
            with the key, instead of all: for networks with many outputs.

    Returns:
        A function `(params, (inputs, targets))` to a tree like the parameters.
    """
    check_samples(key, samples)

    def of_batch(params: Any, batch: Any) -> Any:
        found, tree, _ = columns(model, loss, params, batch, key=key, samples=samples)
        size = batch_size(batch)
        return jax.tree.unflatten(tree, [_as(c.sum_of_squares() / size, c.dtype) for c in found])

    return of_batch


def ggn_trace(model: Callable, loss: Callable, *, key: Any = None, samples: int = 0) -> Callable:
    """The trace of the generalised Gauss-Newton matrix, a scalar: Σ of |JᵀS_c|² over N.

    Arguments as for `ggn_diagonal`. No product of factors is formed for it.
    """
    check_samples(key, samples)

    def of_batch(params: Any, batch: Any) -> jax.Array:
        found, _, _ = columns(model, loss, params, batch, key=key, samples=samples, thrifty=False)
        return functools.reduce(jnp.add, [jnp.sum(c.squared_norms()) for c in found]) / (
            batch_size(batch)
        )

    return of_batch


def ggn_gram(model: Callable, loss: Callable) -> Callable:
    """The Gram matrix of all columns JₙᵀSₙ, (N · C, N · C), divided by N; or of two batches'.

    C is the number of outputs, less one for softmax, whose Hessian has that rank.
    It has the GGN's nonzero eigenvalues, and is small where there are more parameters than
    N · C (Dangel, Tatzel & Hennig, "ViViT: Curvature access through the generalized
    Gauss-Newton's low-rank structure", 2022). Arguments as for `ggn_diagonal`.

    Returns:
        A function `(params, batch, other_batch=None)`: with another batch of M examples the
        matrix is (N · C, M · C), divided by √(N M).
    """

    def of_batch(params: Any, batch: Any, other: Any = None) -> jax.Array:
        own = [c.as_batch() for c in columns(model, loss, params, batch)[0]]
        size = other_size = batch_size(batch)
        others = own
        if other is not None:
            others = [c.as_batch() for c in columns(model, loss, params, other)[0]]
            other_size = batch_size(other)
        grams = [g.gram(h) for g, h in zip(own, others, strict=True)]
        return functools.reduce(jnp.add, grams) / math.sqrt(size * other_size)

    return of_batch


def ntk(model: Callable) -> Callable:
    """The empirical neural tangent kernel Jₙ Jₘᵀ of the outputs (Jacot et al. 2018).

    Args:
        model: `model(params, input)`, the outputs of one example, an array.

    Returns:
        A function `(params, inputs, other_inputs=None)` to an array
        (N, *outputs, M, *outputs).
    """

    def of_inputs(params: Any, inputs: Any, others: Any = None) -> jax.Array:
        def sweep(x):
            size = batch_size(x)
            one_hot = lambda z, _: jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)
            unused = jnp.zeros(size)
            found, _, z = columns(model, None, params, (x, unused), seeds=one_hot)
            return [c.as_batch() for c in found], z.shape

        own, shape = sweep(inputs)
        other, other_shape = (own, shape) if others is None else sweep(others)
        grams = [g.gram(h) for g, h in zip(own, other, strict=True)]
        return functools.reduce(jnp.add, grams).reshape(*shape, *other_shape)

    return of_inputs


def hessian_diagonal(model: Callable, loss: Callable, *, chunk: int = 64) -> Callable:
    """The diagonal of the mean loss's Hessian, exactly.

    In a network of matrix products, convolutions and piecewise linear functions (ReLU, max),
    each weight used once, the outputs are linear in each weight by itself, and the Hessian's
    diagonal is the GGN's: one sweep. Any other network takes one Hessian product for each
    parameter, `chunk` at a time: exact, and slow.

    Args:
        model, loss: as for `ggn_diagonal`; here the loss needn't be convex.

    Returns:
        A function `(params, (inputs, targets))` to a tree like the parameters.
    """

    def of_batch(params: Any, batch: Any) -> Any:
        if piecewise_linear(model, params, pair(batch)[0]) and _has_known_hessian(
            model, loss, params, batch
        ):
            return ggn_diagonal(model, loss)(params, batch)
        operator = hessian_vector_product(model, loss)(params, batch)
        flat, unravel = ravel_pytree(params)
        entry = lambda i: ravel_pytree(operator(unravel(jnp.zeros_like(flat).at[i].set(1))))[0][i]
        found = jax.lax.map(entry, jnp.arange(flat.size), batch_size=chunk)
        return unravel(found)

    return of_batch


def _has_known_hessian(model, loss, params, batch) -> bool:
    """Is the loss convex for sure, so that the root of its Hessian is exact?"""
    from fnn.curvature import output_hessian

    inputs, targets = batch
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    z = jax.eval_shape(model, params, first(inputs))
    return output_hessian.is_convex(loss, z, first(targets))


# Linear, or linear in pieces, in all their inputs together.
_LINEAR = {
    "add",
    "sub",
    "neg",
    "add_any",
    "reshape",
    "squeeze",
    "expand_dims",
    "transpose",
    "rev",
    "broadcast_in_dim",
    "slice",
    "concatenate",
    "pad",
    "reduce_sum",
    "convert_element_type",
    "copy",
    "copy_p",
    "select_n",
    "max",
    "min",
    "abs",
    "clamp",
    "reduce_max",
    "reduce_min",
    "gather",
    "dynamic_slice",
    "stop_gradient",
    "reduce_window_sum",
    "reduce_window_max",
    "select_and_gather_add",
    "reduce_precision",
    "sort",
    "real",
    "imag",
}
_BILINEAR = {"dot_general", "conv_general_dilated", "mul"}
_PIECEWISE_LINEAR_OPERATIONS = {"relu", "leaky_relu", "maxout", "hard_tanh", "relu6"}
_NOT_DIFFERENTIATED = {
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "and",
    "or",
    "not",
    "sign",
    "floor",
    "ceil",
    "round",
    "iota",
    "argmax",
    "argmin",
    "is_finite",
    "stop_gradient",
    "random_bits",
    "shift_right_logical",
}


def piecewise_linear(model: Callable, params: Any, inputs: Any) -> bool:
    """Are the outputs, in pieces, linear in each parameter array while the others are fixed?

    Then a parameter's second derivative by itself is zero almost everywhere. Seen from the
    program: each value carries the set of parameters that it depends on; products multiply
    values without a parameter in common, and all else is linear in pieces.
    """
    _, leaves, tree = parameters(params)
    example = jax.tree.map(lambda x: x[0], inputs)
    example_leaves, example_tree = jax.tree.flatten(example)

    def flat(*args):
        here = jax.tree.unflatten(tree, args[: len(leaves)])
        return [model(here, jax.tree.unflatten(example_tree, args[len(leaves) :]))]

    traced = program(trace(flat, [*leaves, *example_leaves]))
    given = [frozenset([i]) for i in range(len(leaves))] + [frozenset()] * len(example_leaves)
    return _parameters_of(traced, given) is not None


def _parameters_of(flat, given) -> list[frozenset] | None:
    """Of which parameters each output is a piecewise linear function; None if it isn't."""
    depends = {i: frozenset() for i in flat.constants}
    depends.update(zip(flat.inputs, given, strict=True))
    for equation in flat.equations:
        ins = [depends[i] for i in equation.ins]
        union = frozenset().union(*ins)
        operation = equation.operation()
        name = equation.name
        outs = [union] * len(equation.outs)
        if not union or name in _NOT_DIFFERENTIATED:
            outs = [frozenset()] * len(equation.outs)
        elif operation is not None:
            if operation.operation.name not in _PIECEWISE_LINEAR_OPERATIONS:
                return None
            # maxout multiplies its weights with its input.
            if sum(len(i) for i in ins) != len(union):
                return None
        elif name in _BILINEAR:
            if ins[0] & ins[1]:
                return None
        elif name == "div":
            if ins[1]:
                return None
        elif name in ("custom_jvp_call", "custom_vjp_call"):
            if not _derivative_is_constant(equation, [flat.avals[i] for i in equation.ins], ins):
                return None
        elif name in ("cond", "checkpoint", "remat2"):
            operands = ins[1:] if name == "cond" else ins
            found = [
                _parameters_of(program(j), operands[-len(j.in_avals) :] if j.in_avals else [])
                for role, j in inner_jaxprs(equation).items()
                if len(j.in_avals) == len(operands)
            ]
            if not found or any(f is None for f in found):
                return None
        elif name not in _LINEAR:
            return None
        depends.update(zip(equation.outs, outs, strict=True))
    return [depends[i] for i in flat.outputs]


def _derivative_is_constant(equation, avals, ins) -> bool:
    """Is the rule that a function has for its derivative the same at all points, in pieces?

    The rule needn't be the function's own derivative: a step function may have a smooth one.
    """
    moving = [k for k, parameters in enumerate(ins) if parameters]

    def derivative(values, cotangents):
        def of_moving(*given):
            here = list(values)
            for k, x in zip(moving, given, strict=True):
                here[k] = x
            return equation.apply(here)

        return list(jax.vjp(of_moving, *[values[k] for k in moving])[1](cotangents))

    struct = lambda aval: jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    values = [struct(a) for a in avals]
    outs = jax.eval_shape(equation.apply, values)
    if not all(jnp.issubdtype(x.dtype, jnp.inexact) for x in [*outs, *(values[k] for k in moving)]):
        return False
    flat = program(trace(derivative, [values, outs]))
    given = [frozenset([k]) if ins[k] else frozenset() for k in range(len(values))]
    found = _parameters_of(flat, [*given, *[frozenset()] * len(outs)])
    return found is not None and not any(found)
