"""The Hessian of a loss by the network's outputs, as a product and as a square root.

A generalised Gauss-Newton matrix is Jᵀ H J with the network's Jacobian J and the small Hessian
H of the loss by the outputs z of one example. For the usual losses H is known:

    squared_error                 2 I
    softmax_cross_entropy         (diag(p) − p pᵀ) Σq,  p = softmax(z), Σq = 1 for an integer label
    sigmoid_binary_cross_entropy  diag(p (1 − p)),      p = σ(z)
    multiclass_hinge              0

and its root S, H = S Sᵀ, too. So it is where such a loss is taken at several positions of the
outputs, z[:-1] say, and its values are weighted and added up, as a language model's are: then H
consists of one such matrix for each position, times its weight. For any other convex loss both
come from autodiff.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import ops
from fnn.backprop.halves import run
from fnn.jaxpr import Program, program, trace
from fnn.operation import Call, MappedCall


class Known(NamedTuple):
    """What is known of a loss at outputs z.

    product: `(z, u) -> H u`.
    root: `z -> S`, the columns along the first axis, (columns, *z.shape); no columns: H = 0.
    sample: `(z, key) -> s`, a random column with E[s sᵀ] = H, drawn as KFAC does: the gradient
        of the loss at a label drawn from the network's own distribution; None if it has none.
    """

    product: Callable[[Any, Any], Any]
    root: Callable[[Any], Any]
    sample: Callable[[Any, Any], Any] | None


def _squared_error() -> Known:
    return Known(
        lambda z, u: 2 * u,
        lambda z: math.sqrt(2) * _identity(z),
        # exp(−(z − t)²) is a normal distribution of t, of variance ½.
        lambda z, key: math.sqrt(2) * jax.random.normal(key, z.shape, z.dtype),
    )


def _softmax_cross_entropy() -> Known:
    def product(z, u):
        p = jax.nn.softmax(z)
        return p * u - p * jnp.sum(p * u)

    def root(z):
        # With q = √p of unit length, diag(p) − p pᵀ = D (I − q qᵀ) D, D = diag(q). Householder's
        # reflection that takes the first axis to −q takes the others to a basis of what is
        # orthogonal to q: one column less than there are classes.
        q = jnp.sqrt(jax.nn.softmax(z))
        v = q.at[0].add(1)
        return (jnp.eye(z.size, dtype=z.dtype)[1:] - v[1:, None] * v / (1 + q[0])) * q

    def sample(z, key):
        return jax.nn.softmax(z) - jax.nn.one_hot(jax.random.categorical(key, z), z.size)

    return Known(product, root, sample)


def _sigmoid_binary_cross_entropy() -> Known:
    variance = lambda z: jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)
    return Known(
        lambda z, u: variance(z) * u,
        lambda z: jnp.sqrt(variance(z)) * _identity(z),
        lambda z, key: jax.nn.sigmoid(z) - jax.random.bernoulli(key, jax.nn.sigmoid(z)),
    )


def _multiclass_hinge() -> Known:
    return Known(lambda z, u: jnp.zeros_like(u), lambda z: jnp.zeros((0, *z.shape), z.dtype), None)


_KNOWN = {
    ops.squared_error: _squared_error(),
    ops.softmax_cross_entropy: _softmax_cross_entropy(),
    ops.sigmoid_binary_cross_entropy: _sigmoid_binary_cross_entropy(),
    ops.multiclass_hinge: _multiclass_hinge(),
}
# These give a number for each position (..., classes); the others add up all entries.
_BY_POSITION = (ops.softmax_cross_entropy, ops.multiclass_hinge)


def of(loss: Callable, z, target) -> Known:
    """What is known of `loss(z, target)`, for one example; found by autodiff if nothing is."""
    check_loss(loss, z, target)
    composition = _composition(loss, z, target)
    if composition is not None:
        return composition.known()
    gradient = jax.grad(lambda z: loss(z, target))
    return Known(
        lambda z, u: jax.jvp(gradient, (z,), (u,))[1],
        lambda z: _root_by_autodiff(loss, z, target),
        None,
    )


def is_likelihood(loss: Callable, z, target) -> bool:
    """Is it the negative log-likelihood of a distribution that we can draw labels from, or a
    weighted sum of such?"""
    found = _composition(loss, z, target)
    return found is not None and not found.soft_labels and found.known().sample is not None


def is_convex(loss: Callable, z, target) -> bool:
    """Is it one of the known losses, with weights that no example's target can make negative?"""
    found = _composition(loss, z, target)
    return found is not None and found.weights_are_constant_and_positive()


def columns(loss: Callable, z, target, key=None, samples: int = 0):
    """Columns whose squares add up to H: S, or `samples` random ones of which E[s sᵀ] = H."""
    known = of(loss, z, target)
    if not samples:
        return known.root(z)
    keys = jax.random.split(key, samples)
    if known.sample is not None:
        found = jax.vmap(lambda k: known.sample(z, k))(keys)
    else:
        root = known.root(z)
        signs = jax.random.rademacher(key, (samples, root.shape[0]), z.dtype)
        found = jnp.tensordot(signs, root, axes=1)
    return (found / math.sqrt(samples)).astype(z.dtype)


@dataclasses.dataclass(eq=False)
class _Composition:
    """A loss that is affine in a known loss's values, which is taken at an affine map of z.

    call: the known operation, with its static arguments.
    mapped: over how many axes of z it is vmapped.
    flat, at: the loss's program, and the number of the equation that calls the operation.
    targets: the program's inputs but z.
    """

    call: Call
    mapped: int
    flat: Program
    at: int
    targets: list

    def before(self, z) -> jax.Array:
        """What the operation is taken of."""
        values = self._values(z)
        run(self.flat.equations[: self.at], values)
        return values[self._equation.ins[0]]

    def after(self, value, z) -> jax.Array:
        """The loss, by the operation's values; and by z, of which it may be affine besides."""
        values = self._values(z)
        run(self.flat.equations[: self.at], values)
        values[self._equation.outs[0]] = value
        run(self.flat.equations[self.at + 1 :], values)
        return values[self.flat.outputs[0]]

    def weights(self, z) -> jax.Array:
        """∂ loss / ∂ the operation's values: the same at all z."""
        value = jnp.zeros(self._value.shape, self._value.dtype)
        return jax.grad(self.after)(value, z) * self._sum_of_soft_labels(z)

    def weights_are_constant_and_positive(self) -> bool:
        shapes = [self.flat.avals[i] for i in self.flat.inputs]

        def weights(z, *targets):
            return [dataclasses.replace(self, targets=list(targets)).weights(z)]

        traced = program(trace(weights, shapes))
        if _dependents(traced, traced.inputs).intersection(traced.outputs):
            return False
        with jax.ensure_compile_time_eval():
            unused = [jnp.zeros(a.shape, a.dtype) for a in shapes]
            values = dict(enumerate(traced.values(unused)))
            run(traced.equations, values)
            found = values[traced.outputs[0]]
            return not isinstance(found, jax.core.Tracer) and bool(jnp.all(found >= 0))

    def known(self) -> Known:
        core = _KNOWN[self.call.operation]
        shape = self.flat.avals[self._equation.ins[0]].shape
        by_position = self.call.operation in _BY_POSITION
        positions = shape[:-1] if by_position else shape[: self.mapped]
        each = lambda f: functools.reduce(lambda g, _: jax.vmap(g), positions, f)
        weighted = lambda c, x: x * c.reshape(c.shape + (1,) * (x.ndim - c.ndim))
        # A loss that isn't convex has weights below zero, which count as zero.
        half = lambda z: jnp.sqrt(jnp.maximum(self.weights(z), 0))

        def product(z, v):
            u, pushed = jax.jvp(self.before, (z,), (v,))
            return self._back(z, weighted(self.weights(z), each(core.product)(u, pushed)))

        def root(z):
            u, c = self.before(z), half(z)
            if not positions:
                found = c * core.root(u)
            else:
                size = math.prod(positions)
                found = jax.vmap(core.root)(u.reshape(size, *shape[len(positions) :]))
                found = weighted(c.reshape(-1), found)
                # The columns of one position are zero at the others.
                place = jnp.eye(size, dtype=u.dtype).reshape(size, 1, size, *[1] * (found.ndim - 2))
                found = (found[:, :, None] * place).reshape(-1, *u.shape)
            return jax.vmap(lambda s: self._back(z, s))(found)

        def sample(z, key):
            u = self.before(z)
            keys = jax.random.split(key, positions) if positions else key
            return self._back(z, weighted(half(z), each(core.sample)(u, keys)))

        return Known(product, root, None if core.sample is None else sample)

    @property
    def soft_labels(self) -> bool:
        """Are the labels distributions, which needn't add up to one?"""
        label = self.flat.avals[self._equation.ins[1]]
        return self.call.operation is ops.softmax_cross_entropy and jnp.issubdtype(
            label.dtype, jnp.floating
        )

    def _sum_of_soft_labels(self, z):
        if not self.soft_labels:
            return jnp.ones((), self._z.dtype)
        values = self._values(z)
        run(self.flat.equations[: self.at], values)
        sums = jnp.sum(values[self._equation.ins[1]], axis=-1).astype(self._z.dtype)
        smooth = dict(self.call.static)["label_smoothing"]
        return (1 - smooth) * sums + smooth

    def _back(self, z, s) -> jax.Array:
        """The transpose of `before`."""
        return jax.vjp(self.before, z)[1](s)[0]

    def _values(self, z):
        return dict(enumerate(self.flat.values([z, *self.targets])))

    @property
    def _equation(self):
        return self.flat.equations[self.at]

    @property
    def _z(self):
        return self.flat.avals[self.flat.inputs[0]]

    @property
    def _value(self):
        return self.flat.avals[self._equation.outs[0]]


def _composition(loss: Callable, z, target) -> _Composition | None:
    """How the loss is made of a known one; None if it isn't."""
    leaves, tree = jax.tree.flatten(target)
    flat = program(trace(lambda z, *t: [loss(z, jax.tree.unflatten(tree, t))], [z, *leaves]))
    depends = _dependents(flat, flat.inputs[:1])
    found = []
    for k, equation in enumerate(flat.equations):
        called = equation.operation()
        of_z = [i in depends for i in equation.ins]
        if called is None or called.operation not in _KNOWN or not of_z[0] or any(of_z[1:]):
            continue
        mapped = 0
        while isinstance(called, MappedCall):
            # Along its first axis, and the labels too: then each value belongs to one position.
            if any(axis != 0 for axis in called.in_axes):
                return None
            called, mapped = called.call, mapped + 1
        found.append(_Composition(called, mapped, flat, k, leaves))
    if len(found) != 1 or not _is_affine(found[0].before, z):
        return None
    (composition,) = found
    value = jax.ShapeDtypeStruct(composition._value.shape, composition._value.dtype)
    return composition if _is_affine(composition.after, value, z) else None


def _dependents(flat: Program, sources) -> set[int]:
    found = set(sources)
    for equation in flat.equations:
        if found.intersection(equation.ins):
            found.update(equation.outs)
    return found


def _is_affine(function: Callable, *args) -> bool:
    """Is its derivative the same everywhere?"""

    def derivative(*both):
        return [jax.jvp(function, both[: len(args)], both[len(args) :])[1]]

    shapes = [jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) for x in args]
    flat = program(trace(derivative, shapes * 2))
    return not _dependents(flat, flat.inputs[: len(args)]).intersection(flat.outputs)


def check_loss(loss, z, target) -> None:
    out = jax.eval_shape(loss, z, target)
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(
            "loss(outputs, target) must return the real scalar loss of one example, but returned "
            f"{out} for outputs of shape {z.shape}."
        )


def _root_by_autodiff(loss, z, target):
    """S from the eigenvectors of H; a loss that isn't convex has eigenvalues below zero, which
    count as zero."""
    hessian = jax.hessian(lambda x: loss(x.reshape(z.shape), target))(z.reshape(-1))
    values, vectors = jnp.linalg.eigh(hessian)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))
    return root.T.reshape(-1, *z.shape)


def _identity(z):
    return jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)
