"""The Hessian of a loss by the network's outputs, as a product and as a square root.

A generalised Gauss-Newton matrix is Jᵀ H J with the network's Jacobian J and the small Hessian
H of the loss by the outputs z of one example. It has three forms here:

    "positive"  H with its negative eigenvalues taken for zero, H₊. It is H where the loss is
                convex in the outputs, as the usual losses are.
    "all"       H itself.
    "fisher"    the mean of ∇ℓ ∇ℓᵀ over labels drawn from the distribution whose −log the loss
                is; where it isn't one of a known distribution, H₊.

For the usual losses all three are one matrix, and known:

    squared_error                 2 I
    softmax_cross_entropy         (diag(p) − p pᵀ) Σq,  p = softmax(z), Σq = 1 for an integer label
    sigmoid_binary_cross_entropy  diag(p (1 − p)),      p = σ(z)
    multiclass_hinge              0
    huber                         diag(|z − t| < δ); it is no −log of a known distribution

For gaussian_nll, with mean m, log variance s and r = t − m, they differ:

    H = e⁻ˢ (1  r      )        Fisher = (e⁻ˢ  0)
            (r  r² / 2 )                 (0    ½)

So are their roots S, H₊ = S Sᵀ. So it is where such a loss is taken at several positions of the
outputs, z[:-1] say, and its values are weighted and added up, as a language model's are: then H
consists of one such matrix for each position, times its weight; and H₊ of the positive parts of
these. For any other loss H comes from autodiff, and its root from its eigenvectors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy

from fnn import ops
from fnn.batch import example_types
from fnn.curvature.convex import is_convex as is_seen_to_be_convex
from fnn.curvature.linearize import linearized, second_derivative
from fnn.eager import apply_all
from fnn.jaxpr import Program, program, trace
from fnn.operation import Call, MappedCall, call_of


class Known(NamedTuple):
    """What is known of an operation of fnn's at its outputs u and target t, in float32 at least.

    product: `(u, t, v) -> H v`.
    root: `(u, t) -> S`, the columns along the first axis, (columns, *u.shape); none: H = 0.
    sample: `(u, key) -> s`, a random column with E[s sᵀ] = Fisher, drawn as KFAC does: the
        gradient of the loss at a label drawn from the network's own distribution; None if it
        has none.
    signs: `u.shape -> ±1 for each column of the root`, H = S diag(signs) Sᵀ; None for ones.
    positive, fisher, fisher_root: the products `(u, t, v)` with H₊ and with the Fisher matrix,
        and the latter's root; None where they are H's.
    """

    product: Callable[[Any, Any, Any], Any]
    root: Callable[[Any, Any], Any]
    sample: Callable[[Any, Any], Any] | None
    signs: Callable[[tuple[int, ...]], numpy.ndarray] | None = None
    positive: Callable[[Any, Any, Any], Any] | None = None
    fisher: Callable[[Any, Any, Any], Any] | None = None
    fisher_root: Callable[[Any, Any], Any] | None = None


def _squared_error() -> Known:
    return Known(
        lambda z, t, v: 2 * v,
        lambda z, t: math.sqrt(2) * _identity(z),
        # exp(−(z − t)²) is a normal distribution of t, of variance ½.
        lambda z, key: math.sqrt(2) * jax.random.normal(key, z.shape, z.dtype),
    )


def _softmax_cross_entropy() -> Known:
    def product(z, t, v):
        p = jax.nn.softmax(z)
        return p * v - p * jnp.sum(p * v)

    def root(z, t):
        # With q = √p of unit length, diag(p) − p pᵀ = D (I − q qᵀ) D, D = diag(q). Householder's
        # reflection that takes the first axis to −q takes the others to a basis of what is
        # orthogonal to q: one column less than there are classes.
        q = jnp.sqrt(jax.nn.softmax(z))
        v = q.at[0].add(1)
        eye = jnp.eye(z.size, dtype=z.dtype)
        return (eye[1:] - v[1:, None] * v[None] / (1 + q[0])) * q[None]

    def sample(z, key):
        drawn = jax.random.categorical(key, z)
        return jax.nn.softmax(z) - jax.nn.one_hot(drawn, z.size, dtype=z.dtype)

    return Known(product, root, sample)


def _sigmoid_binary_cross_entropy() -> Known:
    variance = lambda z: jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)

    def sample(z, key):
        drawn = jax.random.bernoulli(key, jax.nn.sigmoid(z))
        return jax.nn.sigmoid(z) - drawn.astype(z.dtype)

    root = lambda z, t: _diagonal(jnp.sqrt(variance(z)))
    return Known(lambda z, t, v: variance(z) * v, root, sample)


def _multiclass_hinge() -> Known:
    return Known(
        lambda z, t, v: jnp.zeros_like(v), lambda z, t: jnp.zeros((0, *z.shape), z.dtype), None
    )


def _huber(delta: float = 1.0) -> Known:
    inside = lambda z, t: (jnp.abs(z - t.astype(z.dtype)) < delta).astype(z.dtype)
    return Known(lambda z, t, v: inside(z, t) * v, lambda z, t: _diagonal(inside(z, t)), None)


def _gaussian_nll() -> Known:
    def entries(z, t):
        r = t.astype(z.dtype) - z[..., 0]
        precision = jnp.exp(-z[..., 1])
        return precision, precision * r, 0.5 * precision * r * r

    def product(z, t, v):
        a, b, d = entries(z, t)
        return jnp.stack([a * v[..., 0] + b * v[..., 1], b * v[..., 0] + d * v[..., 1]], -1)

    def eigen(z, t):
        """The positive eigenvalue, the other one's size, and the first's eigenvector."""
        a, b, d = entries(z, t)
        larger = 0.5 * (a + d) + jnp.hypot(0.5 * (a - d), b)
        angle = 0.5 * jnp.arctan2(2 * b, a - d)
        # The product of both is a d − b² = −b²/2.
        smaller = 0.5 * b * jnp.where(larger > 0, b / jnp.where(larger > 0, larger, 1), 0)
        return larger, smaller, jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)

    def root(z, t):
        larger, smaller, axis = eigen(z, t)
        other = jnp.stack([-axis[..., 1], axis[..., 0]], -1)
        first = _blocks(jnp.sqrt(larger)[..., None] * axis)
        return jnp.concatenate([first, _blocks(jnp.sqrt(smaller)[..., None] * other)])

    def positive(z, t, v):
        larger, _, axis = eigen(z, t)
        return (larger * jnp.sum(axis * v, -1))[..., None] * axis

    variances = lambda z: jnp.stack([jnp.exp(-z[..., 1]), jnp.full_like(z[..., 1], 0.5)], -1)

    def sample(z, key):
        # With w = (t − m) / σ, normal: the loss's gradient at t.
        w = jax.random.normal(key, z.shape[:-1], z.dtype)
        return jnp.stack([-w * jnp.exp(-0.5 * z[..., 1]), 0.5 * (1 - w * w)], -1)

    return Known(
        product,
        root,
        sample,
        signs=lambda shape: numpy.repeat([1, -1], math.prod(shape[:-1])),
        positive=positive,
        fisher=lambda z, t, v: variances(z) * v,
        fisher_root=lambda z, t: _diagonal(jnp.sqrt(variances(z))),
    )


def _identity(z):
    return jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)


def _diagonal(x):
    """Columns of a diagonal matrix, x of any shape."""
    return _identity(x) * x[None]


def _blocks(x):
    """x (..., 2) as columns, each with one pair of x and zeros elsewhere."""
    count = math.prod(x.shape[:-1])
    eye = jnp.eye(count, dtype=x.dtype).reshape(count, *x.shape[:-1], 1)
    return eye * x[None]


_KNOWN: dict[Any, Callable[..., Known]] = {
    ops.squared_error.rule: _squared_error,
    ops.softmax_cross_entropy.rule: lambda label_smoothing: _softmax_cross_entropy(),
    ops.sigmoid_binary_cross_entropy.rule: _sigmoid_binary_cross_entropy,
    ops.multiclass_hinge.rule: lambda margin: _multiclass_hinge(),
    ops.huber.rule: _huber,
    ops.gaussian_nll.rule: _gaussian_nll,
}
# These give a number for each position (..., classes); the others add up all entries.
_BY_POSITION = (ops.softmax_cross_entropy.rule, ops.multiclass_hinge.rule)


class OutputHessian:
    """The Hessian of `loss(z, target)` by z, for one example; `part` is of the forms above."""

    def product(self, u, part: str = "positive") -> jax.Array:
        """H u, in z's dtype."""
        raise NotImplementedError

    def root(self, part: str = "positive") -> jax.Array:
        """S: the columns along the first axis, (columns, *z.shape); no columns: H = 0.

        Of part "all" H = S diag(signs) Sᵀ, with the signs that `signs` gives.
        """
        raise NotImplementedError

    def signs(self) -> jax.Array | None:
        """±1 for each column of `root("all")`; None if all are ones."""
        raise NotImplementedError

    def has_cheap_product(self, part: str) -> bool:
        """Can the product be taken without the root?"""
        raise NotImplementedError

    def has_labels(self, part: str) -> bool:
        """Do the gradients at labels that are drawn have E[s sᵀ] = H?"""
        raise NotImplementedError

    def sample(self, key) -> jax.Array:
        """Such a gradient, a column."""
        raise NotImplementedError


def of(loss: Callable, z, target) -> OutputHessian:
    """What is known of `loss(z, target)`; found by autodiff if nothing is."""
    check_loss(loss, z, target)
    return _composition(loss, z, target) or _ByAutodiff(loss, z, target)


def is_likelihood(loss: Callable, z, target) -> bool:
    """Is it the negative log-likelihood of a distribution that we can draw labels from, or a
    weighted sum of such?"""
    found = _composition(loss, z, target)
    return found is not None and not found.soft_labels and found.core.sample is not None


def is_convex(loss: Callable, z, target) -> bool:
    """Is it convex for sure: a known loss, with weights that no example's target can make
    negative, or a function whose program shows it?"""
    found = _composition(loss, z, target)
    if found is None:
        return is_seen_to_be_convex(loss, z, target)
    return found.core.signs is None and found.weights_are_constant_and_positive()


def products(loss: Callable, z, targets, part: str) -> Callable:
    """u ↦ H u for a batch, with the examples along the first axes of all."""
    of_one = lambda z, t: of(loss, z, t)
    if of_one(*example_types((z, targets))).has_cheap_product(part):
        return lambda u: jax.vmap(lambda z, t, u: of_one(z, t).product(u, part))(z, targets, u)
    # Found once, however often the product is taken.
    roots = jax.vmap(lambda z, t: of_one(z, t).root(part))(z, targets)
    return lambda u: jax.vmap(_times_own_transpose)(roots, u)


def sqrt_columns(loss: Callable, z, target, key=None, samples: int = 0, part: str = "positive"):
    """Columns whose squares add up to H: S, or `samples` random ones of which E[s sᵀ] = H."""
    hessian = of(loss, z, target)
    if not samples:
        return hessian.root(part)
    if hessian.has_labels(part):
        found = jax.vmap(hessian.sample)(jax.random.split(key, samples))
    else:
        root = _wide(hessian.root(part))
        signs = jax.random.rademacher(key, (samples, root.shape[0]), root.dtype)
        found = jnp.tensordot(signs, root, axes=1)
    return (found / math.sqrt(samples)).astype(z.dtype)


def signed_sqrt(loss: Callable, z, target):
    """`(S, signs)`, H = S diag(signs) Sᵀ."""
    hessian = of(loss, z, target)
    root, signs = hessian.root("all"), hessian.signs()
    return root, jnp.ones(root.shape[0], root.dtype) if signs is None else signs


@dataclasses.dataclass(eq=False)
class _Composition(OutputHessian):
    """A loss that is affine in a known loss's values, which is taken at an affine map of z.

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

    def has_cheap_product(self, part: str) -> bool:
        return True

    def product(self, v, part: str = "positive"):
        u, push, pull = linearized(self.before, self.z)
        wide, label = _wide(u), self.label
        pushed, weights = push(v).astype(wide.dtype), self.weights()
        apply = lambda f: self._each(f)(wide, label, pushed)
        if part == "fisher" and self.core.fisher is not None:
            found = self._weighted(jnp.maximum(weights, 0), apply(self.core.fisher))
        elif part == "all":
            found = self._weighted(weights, apply(self.core.product))
        elif self.core.positive is None:
            found = self._weighted(jnp.maximum(weights, 0), apply(self.core.product))
        else:
            # A weight below zero makes the negative part, H₊ − H, the positive one.
            positive = apply(self.core.positive)
            negative = positive - apply(self.core.product)
            found = self._weighted(jnp.maximum(weights, 0), positive)
            found = found + self._weighted(jnp.maximum(-weights, 0), negative)
        return pull(found.astype(u.dtype))

    def root(self, part: str = "positive"):
        u, _, pull = linearized(self.before, self.z)
        wide, weights = _wide(u), self.weights()
        is_fisher = part == "fisher" and self.core.fisher_root is not None
        core = self.core.fisher_root if is_fisher else self.core.root
        if self.positions:
            size = math.prod(self.positions)
            flat = lambda x: x.reshape(size, *x.shape[len(self.positions) :])
            found = jax.vmap(core)(flat(wide), flat(self.label))
            # The columns of one position are zero at the others.
            place = jnp.eye(size, dtype=wide.dtype)
            place = place.reshape(size, 1, size, *[1] * (found.ndim - 2))
            found = (found[:, :, None] * place).reshape(-1, *u.shape)
            count, by_column = len(found) // max(size, 1), weights.reshape(-1)
            weights = jnp.repeat(by_column, count, total_repeat_length=len(found))
        else:
            found = core(wide, self.label)
            weights = jnp.broadcast_to(weights, found.shape[:1])
        if part != "all":
            signs = None if is_fisher else self._signs_of_core()
            if signs is not None and self.weights_are_constant_and_positive():
                found, weights = found[signs > 0], weights[signs > 0]
            elif signs is not None:
                weights = weights * signs.astype(weights.dtype)
            weights = jnp.maximum(weights, 0)
        found = self._weighted(jnp.sqrt(jnp.abs(weights)), found)
        return jax.vmap(pull)(found.astype(u.dtype))

    def signs(self):
        own = self._signs_of_core()
        if own is None and self.weights_are_constant_and_positive():
            return None
        weights = self.weights()
        one = lambda x: jnp.where(x < 0, -1, 1).astype(x.dtype)
        if self.core.signs is None:
            own = numpy.ones(jax.eval_shape(self.core.root, *self._one_position()).shape[0])
        else:
            own = self.core.signs(self._u.shape[len(self.positions) :])
        return (one(weights).reshape(-1, 1) * own.astype(weights.dtype)).reshape(-1)

    def has_labels(self, part: str) -> bool:
        is_fisher = part == "fisher" or self.core.fisher is None
        return self.core.sample is not None and is_fisher

    def sample(self, key):
        u, _, pull = linearized(self.before, self.z)
        keys = jax.random.split(key, self.positions) if self.positions else key
        drawn = self._each(self.core.sample)(_wide(u), keys)
        weights = jnp.sqrt(jnp.maximum(self.weights(), 0))
        return pull(self._weighted(weights, drawn).astype(u.dtype))

    @property
    def core(self) -> Known:
        return _KNOWN[self.call.rule](**dict(self.call.static))

    @property
    def positions(self) -> tuple[int, ...]:
        """The axes over which there is one value of the operation each."""
        shape = self._u.shape
        by_position = self.call.rule in _BY_POSITION
        return shape[:-1] if by_position else shape[: self.mapped]

    @property
    def label(self):
        """What the operation is given besides."""
        return self._until_operation()[self._equation.ins[1]]

    @property
    def soft_labels(self) -> bool:
        """Are the labels distributions, which needn't add up to one?"""
        label = self.flat.avals[self._equation.ins[1]]
        return self.call.rule is ops.softmax_cross_entropy.rule and jnp.issubdtype(
            label.dtype, jnp.floating
        )

    def before(self, z) -> jax.Array:
        """What the operation is taken of."""
        return self._until_operation(z)[self._equation.ins[0]]

    def after(self, value, z) -> jax.Array:
        """The loss, by the operation's values; and by z, of which it may be affine besides."""
        values = self._until_operation(z)
        values[self._equation.outs[0]] = value
        apply_all(self.flat.equations[self.at + 1 :], values)
        return values[self.flat.outputs[0]]

    def weights(self) -> jax.Array:
        """∂ loss / ∂ the operation's values, the same at all z; in float32 at least."""
        value = jnp.zeros(self._value.shape, self._value.dtype)
        _, pull = jax.vjp(lambda value: self.after(value, self.z), value)
        (found,) = pull(jnp.ones((), self.flat.avals[self.flat.outputs[0]].dtype))
        return _wide(found) * self._sum_of_soft_labels()

    def weights_are_constant_and_positive(self) -> bool:
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
        if not self.soft_labels:
            return jnp.ones((), _at_least_float32(self._u.dtype))
        sums = jnp.sum(_wide(self.label), axis=-1)
        smooth = dict(self.call.static)["label_smoothing"]
        return (1 - smooth) * sums + smooth

    def _each(self, function: Callable) -> Callable:
        return functools.reduce(lambda g, _: jax.vmap(g), self.positions, function)

    def _weighted(self, weights, x):
        return x * weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim)).astype(x.dtype)

    def _signs_of_core(self) -> numpy.ndarray | None:
        if self.core.signs is None:
            return None
        size = math.prod(self.positions)
        return numpy.tile(self.core.signs(self._u.shape[len(self.positions) :]), size)

    def _one_position(self):
        count = len(self.positions)
        label = self.flat.avals[self._equation.ins[1]]
        return (
            jax.ShapeDtypeStruct(self._u.shape[count:], _at_least_float32(self._u.dtype)),
            jax.ShapeDtypeStruct(label.shape[count:], label.dtype),
        )

    def _until_operation(self, z=None) -> dict:
        """The program's values before the operation is called."""
        inputs = [self.z if z is None else z, *self.targets]
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


@dataclasses.dataclass(eq=False)
class _ByAutodiff(OutputHessian):
    """Any loss: products by differentiating twice, the root from H's eigenvectors."""

    loss: Callable
    z: Any
    target: Any

    def has_cheap_product(self, part: str) -> bool:
        return part == "all" or is_seen_to_be_convex(self.loss, self.z, self.target)

    def product(self, u, part: str = "positive"):
        if self.has_cheap_product(part):
            return self._push(u)
        return _times_own_transpose(self.root(part), u)

    def root(self, part: str = "positive"):
        values, vectors = self._eigen()
        kept = jnp.abs(values) if part == "all" else jnp.maximum(values, 0)
        root = vectors * jnp.sqrt(kept)[None]
        return root.T.reshape(-1, *self.z.shape).astype(self.z.dtype)

    def signs(self):
        values, _ = self._eigen()
        return jnp.where(values < 0, -1, 1).astype(values.dtype)

    def has_labels(self, part: str) -> bool:
        return False

    def _push(self, u):
        return second_derivative(jax.grad(lambda z: self.loss(z, self.target)), self.z)(u)

    def _eigen(self):
        """In float32 at least: there is no decomposition in half precision."""
        rows = jax.vmap(self._push)(_identity(self.z))
        return jnp.linalg.eigh(_wide(rows.reshape(self.z.size, self.z.size)))


def _composition(loss: Callable, z, target) -> _Composition | None:
    """How the loss is made of a known one; None if it isn't."""
    leaves, tree = jax.tree.flatten(target)
    flat = program(trace(lambda z, *t: [loss(z, jax.tree.unflatten(tree, t))], [z, *leaves]))
    depends = flat.dependents(flat.inputs[:1])
    found = []
    for k, equation in enumerate(flat.equations):
        called = call_of(equation)
        of_z = [i in depends for i in equation.ins]
        if called is None or called.rule not in _KNOWN or not of_z[0] or any(of_z[1:]):
            continue
        mapped = 0
        while isinstance(called, MappedCall):
            # Along its first axis, and the labels too: then each value belongs to one position.
            if any(axis != 0 for axis in called.in_axes):
                return None
            called, mapped = called.call, mapped + 1
        found.append(_Composition(called, mapped, flat, k, z, leaves))
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


def check_loss(loss, z, target) -> None:
    out = jax.eval_shape(loss, z, target)
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(
            "loss(outputs, target) must return the real scalar loss of one example, but returned "
            f"{out} for outputs of shape {z.shape}."
        )


def _times_own_transpose(root, u):
    """S Sᵀ u, summed in float32 at least."""
    wide = _wide(root)
    axes = range(u.ndim)
    along = jnp.tensordot(wide, u.astype(wide.dtype), axes=([d + 1 for d in axes], list(axes)))
    return jnp.tensordot(along, wide, axes=1).astype(u.dtype)


def _wide(x):
    """In float32 at least."""
    return x.astype(_at_least_float32(x.dtype))


def _at_least_float32(dtype):
    return jnp.promote_types(dtype, jnp.float32)
