"""A loss that is made of a known one: its values weighted and added up, at a map of the outputs.

A language model's loss is the mean of the cross-entropies at its positions, with a mask perhaps;
it may be taken at a part of the outputs, z[:-1] say. The Hessian of such a loss consists of one
matrix for each position, the known loss's, times its weight. Whether a loss is of this kind is
seen in its program: it calls one known operation, takes it at an affine map of z, and is affine
in the operation's values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy

from fnn import ops
from fnn.curvature.known_losses import BY_POSITION, KNOWN, Known
from fnn.curvature.linearize import linearized
from fnn.eager import apply_all
from fnn.jaxpr import Program, program, trace
from fnn.operation import Call, MappedCall, call_of
from fnn.precision import wide, wide_dtype


def composition(loss: Callable, z, target) -> Composition | None:
    """How the loss is made of a known one; None if it isn't."""
    leaves, tree = jax.tree.flatten(target)
    flat = program(trace(lambda z, *t: [loss(z, jax.tree.unflatten(tree, t))], [z, *leaves]))
    depends = flat.dependents(flat.inputs[:1])
    found = []
    for k, equation in enumerate(flat.equations):
        called = call_of(equation)
        of_z = [i in depends for i in equation.ins]
        if called is None or called.rule not in KNOWN or not of_z[0] or any(of_z[1:]):
            continue
        mapped = 0
        while isinstance(called, MappedCall):
            # Along its first axis, and the labels too: then each value belongs to one position.
            if any(axis != 0 for axis in called.in_axes):
                return None
            called, mapped = called.call, mapped + 1
        found.append(Composition(called, mapped, flat, k, z, leaves))
    if len(found) != 1 or not _is_affine(found[0].before, z):
        return None
    (composition,) = found
    value = jax.ShapeDtypeStruct(composition._value.shape, composition._value.dtype)
    return composition if _is_affine(composition.after, value, z) else None


def _is_affine(function: Callable, *args) -> bool:
    """Is its derivative the same everywhere?"""

    def derivative(*both):
        return [jax.jvp(function, both[: len(args)], both[len(args) :])[1]]

    shapes = [jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) for x in args]
    flat = program(trace(derivative, shapes * 2))
    return flat.dependents(flat.inputs[: len(args)]).isdisjoint(flat.outputs)


@dataclasses.dataclass(eq=False)
class Composition:
    """A loss that is affine in a known loss's values, which is taken at an affine map u of z.

    Its Hessian is Bᵀ (Σ over positions of weight · the known loss's Hessian) B, where B is the
    derivative of u. The methods are those of `OutputHessian` (see `output_hessian.py`).

    call: the known operation, with its static arguments.
    mapped: over how many axes of z it is vmapped.
    flat, at: the loss's program, and the number of the equation that calls the operation.
    z, targets: the program's inputs.
    """

    call: Call
    mapped: int
    flat: Program
    at: int
    z: Any
    targets: list

    # ---------------------------------------------------------------------- what OutputHessian asks

    def has_cheap_product(self, part: str) -> bool:
        return True

    def product(self, v, part: str = "positive"):
        u, push, pull = linearized(self.before, self.z)
        known, weights = self.known, self.weights()
        at, label, pushed = wide(u), self.label, wide(push(v))
        apply = lambda f: self._each(f)(at, label, pushed)
        if part == "fisher" and known.fisher is not None:
            found = _weighted(jnp.maximum(weights, 0), apply(known.fisher))
        elif part == "all":
            found = _weighted(weights, apply(known.product))
        elif known.positive is None:
            found = _weighted(jnp.maximum(weights, 0), apply(known.product))
        else:
            # A weight below zero makes the negative part, H₊ − H, the positive one.
            positive = apply(known.positive)
            negative = positive - apply(known.product)
            found = _weighted(jnp.maximum(weights, 0), positive)
            found = found + _weighted(jnp.maximum(-weights, 0), negative)
        return pull(found.astype(u.dtype))

    def root(self, part: str = "positive"):
        u, _, pull = linearized(self.before, self.z)
        fisher_root = self.known.fisher_root if part == "fisher" else None
        found, weights = self._columns(fisher_root or self.known.root, wide(u))
        if part != "all":
            # H is the sum of weight · sign · s sᵀ over the columns s: keep what is positive in it.
            signs = self._signs_of_known() if fisher_root is None else None
            if signs is not None and self.weights_are_constant_and_positive():
                found, weights = found[signs > 0], weights[signs > 0]
            elif signs is not None:
                weights = weights * signs.astype(weights.dtype)
            weights = jnp.maximum(weights, 0)
        found = _weighted(jnp.sqrt(jnp.abs(weights)), found)
        return jax.vmap(pull)(found.astype(u.dtype))

    def signs(self):
        if self.known.signs is None and self.weights_are_constant_and_positive():
            return None
        weights = self.weights()
        of_weights = jnp.where(weights < 0, -1, 1).astype(weights.dtype)
        if self.known.signs is None:
            own = numpy.ones(jax.eval_shape(self.known.root, *self._one_position()).shape[0])
        else:
            own = self.known.signs(self._u.shape[len(self.positions) :])
        return (of_weights.reshape(-1, 1) * own.astype(weights.dtype)).reshape(-1)

    def has_labels(self, part: str) -> bool:
        is_fisher = part == "fisher" or self.known.fisher is None
        return self.known.sample is not None and is_fisher

    def sample(self, key):
        assert self.known.sample is not None, "has_labels() is false"
        u, _, pull = linearized(self.before, self.z)
        keys = jax.random.split(key, self.positions) if self.positions else key
        drawn = self._each(self.known.sample)(wide(u), keys)
        weights = jnp.sqrt(jnp.maximum(self.weights(), 0))
        return pull(_weighted(weights, drawn).astype(u.dtype))

    # -------------------------------------------------------------------------- the known operation

    @property
    def known(self) -> Known:
        """What is known of the operation."""
        return KNOWN[self.call.rule](**dict(self.call.static))

    @property
    def positions(self) -> tuple[int, ...]:
        """The axes over which there is one value of the operation each."""
        shape = self._u.shape
        by_position = self.call.rule in BY_POSITION
        return shape[:-1] if by_position else shape[: self.mapped]

    @property
    def label(self):
        """What the operation is given besides."""
        return self._until_operation(self.z)[self._equation.ins[1]]

    @property
    def soft_labels(self) -> bool:
        """Are the labels distributions, which needn't add up to one?"""
        label = self.flat.avals[self._equation.ins[1]]
        return self.call.rule is ops.softmax_cross_entropy.rule and jnp.issubdtype(
            label.dtype, jnp.floating
        )

    def _columns(self, root: Callable, u) -> tuple[jax.Array, jax.Array]:
        """The columns of the known loss's root at all positions, and the weight of each."""
        weights = self.weights()
        if not self.positions:
            found = root(u, self.label)
            return found, jnp.broadcast_to(weights, found.shape[:1])
        size = math.prod(self.positions)
        flat = lambda x: x.reshape(size, *x.shape[len(self.positions) :])
        found = jax.vmap(root)(flat(u), flat(self.label))
        # The columns of one position are zero at the others.
        place = jnp.eye(size, dtype=u.dtype)
        place = place.reshape(size, 1, size, *[1] * (found.ndim - 2))
        found = (found[:, :, None] * place).reshape(-1, *u.shape)
        count = len(found) // max(size, 1)
        return found, jnp.repeat(weights.reshape(-1), count, total_repeat_length=len(found))

    def _signs_of_known(self) -> numpy.ndarray | None:
        """The sign of each of these columns; None if all are ones."""
        if self.known.signs is None:
            return None
        size = math.prod(self.positions)
        return numpy.tile(self.known.signs(self._u.shape[len(self.positions) :]), size)

    def _each(self, function: Callable) -> Callable:
        """The function, mapped over the positions."""
        return functools.reduce(lambda g, _: jax.vmap(g), self.positions, function)

    def _one_position(self):
        """The types of what the operation is given at one position."""
        count = len(self.positions)
        label = self.flat.avals[self._equation.ins[1]]
        return (
            jax.ShapeDtypeStruct(self._u.shape[count:], wide_dtype(self._u.dtype)),
            jax.ShapeDtypeStruct(label.shape[count:], label.dtype),
        )

    # ------------------------------------------------------------------------ the program around it

    def before(self, z) -> jax.Array:
        """What the operation is taken of."""
        return self._until_operation(z)[self._equation.ins[0]]

    def after(self, value, z) -> jax.Array:
        """The loss, from the operation's values; and from z, of which it may be affine besides."""
        values = self._until_operation(z)
        values[self._equation.outs[0]] = value
        apply_all(self.flat.equations[self.at + 1 :], values)
        return values[self.flat.outputs[0]]

    def weights(self) -> jax.Array:
        """∂ loss / ∂ the operation's values, the same at all z; in float32 at least."""
        value = jnp.zeros(self._value.shape, self._value.dtype)
        _, pull = jax.vjp(lambda value: self.after(value, self.z), value)
        (found,) = pull(jnp.ones((), self.flat.avals[self.flat.outputs[0]].dtype))
        return wide(found) * self._sum_of_soft_labels()

    def weights_are_constant_and_positive(self) -> bool:
        """Are the weights numbers that no target changes, and none of them below zero?"""
        shapes = [self.flat.avals[i] for i in self.flat.inputs]

        def weights(z, *targets):
            return [dataclasses.replace(self, z=z, targets=list(targets)).weights()]

        traced = program(trace(weights, shapes))
        if traced.dependents(traced.inputs).intersection(traced.outputs):
            return False
        with jax.ensure_compile_time_eval():
            unused = [jnp.zeros(a.shape, a.dtype) for a in shapes]
            values = dict(enumerate(traced.values(unused)))
            apply_all(traced.equations, values)
            found = values[traced.outputs[0]]
            return not isinstance(found, jax.core.Tracer) and bool(jnp.all(found >= 0))

    def _sum_of_soft_labels(self):
        """By what softmax cross-entropy's Hessian is multiplied."""
        if not self.soft_labels:
            return jnp.ones((), wide_dtype(self._u.dtype))
        sums = jnp.sum(wide(self.label), axis=-1)
        smooth = dict(self.call.static)["label_smoothing"]
        return (1 - smooth) * sums + smooth

    def _until_operation(self, z) -> dict:
        """The program's values before the operation is called."""
        inputs = [z, *self.targets]
        values = dict(enumerate(self.flat.values(inputs)))
        apply_all(self.flat.equations[: self.at], values)
        return values

    @property
    def _equation(self):
        return self.flat.equations[self.at]

    @property
    def _u(self):
        return self.flat.avals[self._equation.ins[0]]

    @property
    def _value(self):
        return self.flat.avals[self._equation.outs[0]]


def _weighted(weights, x):
    """x with its first axes, which are those of the weights, multiplied by them."""
    return x * weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim)).astype(x.dtype)
