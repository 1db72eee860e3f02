"""The JAX primitives that stand for operations and their derivatives in a jaxpr.

An operation `sigmoid` is an equation `sigmoid[call=...] x`, and its derivative an equation
`sigmoid_tangent[linear=...] residuals tangents`. What JAX must know of these two (value, types,
derivative, transpose, vmap, lowering) is registered here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fnn.jaxpr import is_inexact
from fnn.meshes import same_varying_axes
from fnn.operation.call import Axis, Call, MappedCall
from fnn.operation.experimental import register_experimental
from fnn.operation.form import remembered
from fnn.operation.linear_map import MappedLinearMap, linearize


def new_primitive(name: str, value: Callable, jvp: Callable, batch: Callable) -> Primitive:
    """A primitive with several results. All three functions take its parameters as keywords, too.

    Args:
        name: what JAX prints.
        value: `(*arrays) -> outs`, for arrays that are known.
        jvp: `(primals, tangents) -> (outs, tangents of the outs)`; None is a tangent of zero.
        batch: `(axis, arrays, axes) -> (outs, axes of the outs)` under the `vmap` of an `Axis`;
            the axis of an array is None where it isn't mapped. At least one is.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def jvp_of_symbolic(primals, tangents, **params):
        given = [None if type(t) is ad.Zero else t for t in tangents]
        outs, found = jvp(primals, given, **params)
        return outs, [
            ad.Zero(jax.typeof(y).to_tangent_aval()) if t is None else t
            for y, t in zip(outs, found, strict=True)
        ]

    def batch_of_some(axis_data, arrays, axes, **params):
        if all(axis is None for axis in axes):
            outs = primitive.bind(*arrays, **params)
            return outs, [None] * len(outs)
        return batch(Axis.of(axis_data), arrays, tuple(axes), **params)

    primitive.def_impl(value)
    ad.primitive_jvps[primitive] = jvp_of_symbolic
    batching.fancy_primitive_batchers[primitive] = batch_of_some
    return primitive


# JAX keeps all that is registered for a primitive, for ever: so there is one for each name, which
# knows no operation, and not one for each operation.


@functools.cache
def primitive_of_operation(name: str) -> Primitive:
    """`(*arrays; call, keeper) -> outs`: a `Call` or a `MappedCall`."""

    @functools.partial(jax.jit, static_argnames="call")
    def compiled(*leaves, call):
        return call.primal(*leaves)

    def value(*leaves, call, keeper):
        if isinstance(call, MappedCall):
            call.look(leaves)
        if call.rule.compiled:
            return compiled(*leaves, call=call)
        return [jnp.asarray(y) for y in call.primal(*map(jnp.asarray, leaves))]

    def jvp(primals, tangents, *, call, keeper):
        if all(t is None for t in tangents):
            outs = primitive.bind(*primals, call=call, keeper=keeper)
            return outs, [None] * len(outs)
        outs, residuals, linear = linearize(call, *primals)
        given = [t for t, is_in in zip(tangents, linear.takes, strict=True) if is_in]
        keep = [t is not None for t in given]
        inexact = [is_inexact(jax.typeof(y)) for y in outs]
        if not any(keep) or not any(inexact):
            return outs, [None] * len(outs)
        dxs = [t for t in given if t is not None]
        dys = iter(_bind_linear_map(jax.tree.leaves(residuals), dxs, linear.restrict(keep)))
        return outs, [next(dys) if has_tangent else None for has_tangent in inexact]

    def batch(axis, leaves, axes, *, call, keeper):
        if call.rule.vmapped is not None and isinstance(call, Call):
            outs = call.vmapped(axis.size, leaves, axes)
            if outs is not None:
                return outs, [0] * len(outs)
        mapped = MappedCall(call, axes, axis)
        outs = primitive.bind(*leaves, call=mapped, keeper=keeper)
        return outs, [0] * len(outs)

    def transpose(cotangents, *arrays, call, keeper):
        """Of an operation that is itself linear, such as `W @ x` in x; JAX refuses the others."""
        unknown = [ad.is_undefined_primal(x) for x in arrays]
        in_avals = [x.aval if u else jax.typeof(x) for u, x in zip(unknown, arrays, strict=True)]
        inexact = [is_inexact(a) for a in _out_avals(call, tuple(in_avals))]

        def linear(*xs):
            given = iter(xs)
            full = [next(given) if u else x for u, x in zip(unknown, arrays, strict=True)]
            return [y for y, has in zip(call.primal(*full), inexact, strict=True) if has]

        cts = [ad.instantiate_zeros(ct) for ct, has in zip(cotangents, inexact, strict=True) if has]
        avals = [a for u, a in zip(unknown, in_avals, strict=True) if u]
        found = iter(jax.linear_transpose(linear, *avals)(cts))
        return [next(found) if u else None for u in unknown]

    def abstract(*in_avals, call, keeper):
        return _out_avals(call, in_avals)

    def definition(*leaves, call, keeper):
        return call.primal(*leaves)

    primitive = new_primitive(name, value, jvp, batch)
    _make_traceable(primitive, abstract, transpose, definition)
    return primitive


def _bind_linear_map(residuals, dxs, linear) -> list:
    """Apply a derivative to tangents, as one equation."""
    arrays = same_varying_axes([*residuals, *dxs])
    params = {"linear": linear, "num_residuals": len(residuals), "keeper": linear.rule.keeper()}
    return _primitive_of_linear_map(linear.rule.name).bind(*arrays, **params)


@functools.cache
def _primitive_of_linear_map(name: str) -> Primitive:
    """`(*residuals, *dxs; linear, num_residuals, keeper) -> dys`."""

    def act(*arrays, linear, num_residuals, keeper=None):
        return linear.tangent(arrays[:num_residuals], arrays[num_residuals:])

    compiled = jax.jit(act, static_argnames=("linear", "num_residuals"))

    def value(*arrays, linear, num_residuals, keeper):
        run = compiled if linear.rule.compiled else act
        return run(*arrays, linear=linear, num_residuals=num_residuals)

    def jvp(primals, tangents, *, linear, num_residuals, keeper):
        residuals, dxs = primals[:num_residuals], primals[num_residuals:]
        residual_tangents, dx_tangents = tangents[:num_residuals], tangents[num_residuals:]
        outs = _bind_linear_map(residuals, dxs, linear)
        total: list = [None] * len(outs)
        # Linear in dx: the same map on the tangents of dx.
        keep = [t is not None for t in dx_tangents]
        if any(keep):
            given = [t for t in dx_tangents if t is not None]
            total = _bind_linear_map(residuals, given, linear.restrict(keep))
        # Not linear in the residuals: differentiate the tangent map with respect to those that
        # move.
        moves = [t is not None for t in residual_tangents]
        if any(moves):

            def at_residuals(*moving):
                given = iter(moving)
                full = [next(given) if m else r for m, r in zip(moves, residuals, strict=True)]
                return linear.tangent(full, dxs)

            moving = [r for r, m in zip(residuals, moves, strict=True) if m]
            rates = [t for t in residual_tangents if t is not None]
            _, more = jax.jvp(at_residuals, moving, rates)
            total = [
                m if t is None else ad.add_tangents(t, m) for t, m in zip(total, more, strict=True)
            ]
        return outs, total

    def transpose(cotangents, *arrays, linear, num_residuals, keeper):
        residuals, dxs = arrays[:num_residuals], arrays[num_residuals:]
        wanted = [ad.is_undefined_primal(x) for x in dxs]
        gs = [ad.instantiate_zeros(ct) for ct in cotangents]
        found = iter(linear.restrict(wanted).full_backward(residuals, gs))
        return [None] * num_residuals + [next(found) if w else None for w in wanted]

    def batch(axis, arrays, axes, *, linear, num_residuals, keeper):
        mapped = MappedLinearMap(
            linear,
            axes[:num_residuals],
            axes[num_residuals:],
            tuple(jax.typeof(x) for x in arrays[num_residuals:]),
            linear.takes,
            axis,
        )
        params = {"num_residuals": num_residuals, "keeper": keeper}
        outs = primitive.bind(*arrays, linear=mapped, **params)
        return outs, [0] * len(outs)

    def abstract(*in_avals, linear, num_residuals, keeper):
        return _linear_out_avals(linear, num_residuals, in_avals)

    primitive = new_primitive(f"{name}_tangent", value, jvp, batch)
    _make_traceable(primitive, abstract, transpose, act)
    return primitive


def _make_traceable(primitive: Primitive, abstract, transpose, definition) -> None:
    """Register what JAX asks of an equation in a jaxpr: its types, its transpose, its program."""
    primitive.def_abstract_eval(abstract)
    ad.primitive_transposes[primitive] = transpose
    mlir.register_lowering(primitive, mlir.lower_fun(definition))
    register_experimental(primitive, definition)


@remembered
def _out_avals(call, in_avals) -> tuple[Any, ...]:
    return tuple(jax.make_jaxpr(call.primal)(*in_avals).out_avals)


@remembered
def _linear_out_avals(linear, num_residuals, in_avals) -> tuple[Any, ...]:
    residual_avals, dx_avals = in_avals[:num_residuals], in_avals[num_residuals:]
    jaxpr = jax.make_jaxpr(linear.tangent)(list(residual_avals), list(dx_avals))
    return tuple(jaxpr.out_avals)
