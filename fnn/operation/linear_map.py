"""The derivative of a call: a map that is linear in the tangents, at given residuals.

`linearize` runs an operation's `forward` and returns the derivative with the residuals. The
derivative acts forwards on tangents (`tangent`) and backwards on upstream gradients
(`full_backward`). `LinearMap` is that of a `Call`, `MappedLinearMap` that of a `MappedCall`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp

from fnn.jaxpr import Equation, is_inexact, trace
from fnn.meshes import same_varying_axes, zeros
from fnn.operation import well_formed
from fnn.operation.call import Axis, Call, MappedCall, mapped_results
from fnn.operation.form import Rule, remembered
from fnn.operation.outer_products import with_matrix_products


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """The derivative of a call, linear in the tangents, at residuals given at each use.

    in_avals, out_avals: the types of the call's arrays, in and out.
    differentiable: which of the call's arrays can get a gradient at all: not the integers, and not
        those whose gradient `backward` says is None.
    takes: of which of the call's arrays this map takes a tangent.
    """

    call: Call
    in_avals: tuple
    out_avals: tuple
    out_tree: Any
    residual_tree: Any
    differentiable: tuple[bool, ...]
    takes: tuple[bool, ...]

    def __repr__(self):
        return repr(self.call)

    @property
    def rule(self) -> Rule:
        return self.call.rule

    def restrict(self, keep: Sequence[bool]) -> LinearMap:
        """The same map with a tangent of zero for all but the kept ones of its arguments."""
        return dataclasses.replace(self, takes=_restrict(self.takes, keep))

    def full_backward(self, residuals: Sequence, gs: Sequence) -> list:
        """The hand-written backward: one gradient for each argument of this map.

        gs are those of the inexact outputs. What only other arguments' gradients need is left
        out; without jit around, nobody else would do that.
        """
        avals = tuple(map(jax.typeof, residuals)), tuple(map(jax.typeof, gs))
        if self.rule.compiled:
            closed = _kept_backward_jaxpr(self, *avals)
        elif self.takes != self.differentiable:
            closed = _backward_jaxpr(self, *avals)
        else:
            return self.taken_gradients(residuals, gs)
        return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *residuals, *gs)

    def taken_gradients(self, residuals: Sequence, gs: Sequence) -> list:
        """The gradients of this map's arguments, none of them None."""
        # None where there was a gradient when the rule was checked: it is zero now.
        found = zip(self.gradients(residuals, gs), self.in_avals, strict=True)
        return [zeros(a) if dx is None else dx for dx, a in compress(found, self.takes)]

    def gradients(self, residuals: Sequence, gs: Sequence) -> list:
        """`backward` as it is written: a gradient or None for each array of the call."""
        given = iter(gs)
        g = [next(given) if is_inexact(a) else None for a in self.out_avals]
        assert self.rule.backward is not None
        grads = self.rule.backward(
            jax.tree.unflatten(self.residual_tree, residuals),
            jax.tree.unflatten(self.out_tree, g),
            **dict(self.call.static),
        )
        return well_formed.flat_gradients(self.call, self.in_avals, grads)

    def tangent(self, residuals: Sequence, dxs: Sequence) -> list:
        """The pushforward: the transpose of `backward`, or the hand-written `tangent`."""
        if self.rule.tangent is not None:
            given = iter(dxs)
            flat = [
                next(given) if is_in else zeros(aval) if is_inexact(aval) else None
                for is_in, aval in zip(self.takes, self.in_avals, strict=True)
            ]
            dx = jax.tree.unflatten(self.call.in_tree, flat)
            residual_args = jax.tree.unflatten(self.residual_tree, residuals)
            dy = self.rule.tangent(residual_args, *dx, **dict(self.call.static))
            return well_formed.flat_tangents(self.rule.name, self.out_tree, self.out_avals, dy)

        def from_gs(*gs):
            return self.full_backward(residuals, gs)

        avals = [a for a in self.out_avals if is_inexact(a)]
        taken = compress(self.in_avals, self.takes)
        dxs = [jnp.asarray(dx, a.dtype) for dx, a in zip(dxs, taken, strict=True)]
        return list(jax.linear_transpose(from_gs, *avals)(dxs))


def _backward_jaxpr(linear: LinearMap, residual_avals, g_avals) -> Any:
    return trace(linear.taken_gradients, (list(residual_avals), list(g_avals)))


_kept_backward_jaxpr = remembered(_backward_jaxpr)


def _derivative(call: Call, in_avals) -> LinearMap:
    """The derivative at arrays of these types, once the rule is seen to be well-formed for them."""
    rule = call.rule
    well_formed.must_have_backward(rule)
    value, residuals = well_formed.forward_types(call, in_avals)
    residual_avals, residual_tree = jax.tree.flatten(residuals)
    out_tree: Any = jax.tree.structure(value)
    out_avals = tuple(jax.make_jaxpr(call.primal)(*in_avals).out_avals)
    g_avals = [a for a in out_avals if is_inexact(a)]
    inexact = tuple(map(is_inexact, in_avals))
    linear = LinearMap(call, in_avals, out_avals, out_tree, residual_tree, inexact, inexact)
    has_gradient = [False] * len(in_avals)

    def gradients(residuals, gs):
        found = linear.gradients(residuals, gs)
        has_gradient[:] = [dx is not None for dx in found]
        return [dx for dx in found if dx is not None]

    if g_avals and any(inexact):
        closed = jax.make_jaxpr(gradients)(residual_avals, g_avals)
        well_formed.check_backward(call, closed, len(residual_avals), in_avals, has_gradient)
    gets = tuple(has_gradient)
    linear = dataclasses.replace(linear, differentiable=gets, takes=gets)
    if rule.tangent is not None and any(gets):
        dx_avals = [a.to_tangent_aval() for a in compress(in_avals, gets)]
        closed = jax.make_jaxpr(linear.tangent)(residual_avals, dx_avals)
        well_formed.check_tangent(rule, closed, len(residual_avals))
    return linear


_kept_derivative = remembered(_derivative)


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
    def rule(self) -> Rule:
        return self.linear.rule

    def restrict(self, keep: Sequence[bool]) -> MappedLinearMap:
        return dataclasses.replace(
            self,
            linear=self.linear.restrict(keep),
            dx_axes=tuple(compress(self.dx_axes, keep)),
            dx_avals=tuple(compress(self.dx_avals, keep)),
            takes=_restrict(self.takes, keep),
        )

    def tangent(self, residuals: Sequence, dxs: Sequence) -> list:
        axes = (list(self.residual_axes), list(self.dx_axes))
        return self.axis.vmap(self.linear.tangent, axes, 0)(list(residuals), list(dxs))

    def _tangent_at(self, residuals, *dxs):
        return self.tangent(residuals, dxs)

    def full_backward(self, residuals: Sequence, gs: Sequence) -> list:
        """Each example's gradients where arguments are mapped; their sum where they are shared.

        The sum is the transpose of the vmapped tangent map, which for a weight is one
        contraction over the batch, and for a convolution one convolution.
        """
        is_shared = [axis is None for axis in self.dx_axes]
        is_mapped = [not shared for shared in is_shared]
        if self.rule.tangent is not None:
            return self._all_summed(is_shared, residuals, gs)
        of_shared, of_mapped = iter(()), iter(())
        if any(is_shared):
            of_shared = iter(self.restrict(is_shared)._summed(residuals, gs))
        if any(is_mapped):
            own = self.restrict(is_mapped)
            axes = list(self.residual_axes), 0
            vmapped = self.axis.vmap(own.linear.full_backward, axes, list(own.dx_axes))
            of_mapped = iter(vmapped(list(residuals), list(gs)))
        return [next(of_shared if shared else of_mapped) for shared in is_shared]

    def _all_summed(self, is_shared, residuals, gs) -> list:
        """The gradients themselves, those of shared arguments summed.

        A hand-written tangent need not be transposable. And what it stands for is a loop, which
        must not run once for the arguments that are shared and once for the others.
        """
        out_axes = [0 if shared else a for shared, a in zip(is_shared, self.dx_axes, strict=True)]
        axes = list(self.residual_axes), 0
        vmapped = self.axis.vmap(self.linear.full_backward, axes, out_axes)

        def gradients(residuals, gs):
            return [
                jnp.sum(dx, axis=0, dtype=dx.dtype) if shared else dx
                for shared, dx in zip(is_shared, vmapped(residuals, gs), strict=True)
            ]

        if any(is_shared):
            gradients = with_matrix_products(gradients)
        return gradients(list(residuals), list(gs))

    def _summed(self, residuals, gs) -> list:
        tangent = functools.partial(self._tangent_at, residuals)
        transposed = jax.linear_transpose(tangent, *self.dx_avals)
        return with_matrix_products(transposed)(list(gs))


def linear_map_of(equation: Equation) -> LinearMap | MappedLinearMap | None:
    """The derivative of an fnn operation that an equation applies, if it does."""
    linear = equation.params.get("linear")
    return linear if isinstance(linear, (LinearMap, MappedLinearMap)) else None


def linearize(call: Call | MappedCall, *leaves) -> tuple[list, Any, LinearMap | MappedLinearMap]:
    """The value, the residuals, and the operation's derivative as a function of them."""
    if isinstance(call, MappedCall):
        return _linearize_mapped(call, leaves)
    rule, in_avals = call.rule, tuple(jax.typeof(x) for x in leaves)
    linear = _kept_derivative(call, in_avals)
    # JAX hands a Python number on as a number that knows its dtype, but isn't an array.
    arrays = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in leaves]
    args = jax.tree.unflatten(call.in_tree, arrays)
    if rule.forward is None:
        # The operation and not its definition: what differentiates the value again, as in
        # the derivative of a vjp, then meets the rule.
        return rule.bind(same_varying_axes(arrays), call), args, linear
    y, residuals = rule.forward(*args, **dict(call.static))
    if jax.tree.structure(residuals) != linear.residual_tree:  # a static value has changed
        linear = _derivative(call, in_avals)
    return jax.tree.leaves(y), residuals, linear


def _linearize_mapped(mapped: MappedCall, leaves) -> tuple[list, Any, MappedLinearMap]:
    in_avals = tuple(jax.typeof(x) for x in leaves)
    residual_axes = _mapped_residuals(mapped, in_avals)
    derivatives = []

    def outs_and_residuals(*leaves):
        outs, residuals, linear = linearize(mapped.call, *leaves)
        derivatives.append(linear)
        return outs, residuals

    out_axes = 0, residual_axes
    outs, residuals = mapped.axis.vmap(outs_and_residuals, mapped.in_axes, out_axes)(*leaves)
    inner = derivatives[0]
    structure: Any = jax.tree.structure(residuals)
    linear = MappedLinearMap(
        inner,
        tuple(structure.flatten_up_to(residual_axes)),
        tuple(compress(mapped.in_axes, inner.takes)),
        tuple(compress(in_avals, inner.takes)),
        inner.takes,
        mapped.axis,
    )
    return outs, residuals, linear


@remembered
def _mapped_residuals(mapped: MappedCall, in_avals):
    """For each residual, 0 if it depends on a mapped argument, None if it doesn't.

    This is the trap in vmap. A weight that the examples share is a residual of `W @ x`;
    broadcast to the batch it would cost batch-size times its memory and a batch of
    matrix-vector products where one matrix product does.
    """
    residuals_of = lambda *leaves: linearize(mapped.call, *leaves)[1]
    return mapped_results(mapped.axis, residuals_of, mapped.in_axes, in_avals)


def _restrict(takes: Sequence[bool], keep: Sequence[bool]) -> tuple[bool, ...]:
    kept = iter(keep)
    return tuple(is_in and next(kept) for is_in in takes)
