"""Curvature matrices as linear operators: products with vectors, never the matrix.

All are of the MEAN loss over the batch, with a row and a column for each number in the parameters;
a vector is a tree like them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

import fnn.per_example as per_example
from fnn import arguments, text
from fnn.backprop import grad, value_and_grad
from fnn.batch import example_types
from fnn.curvature import output_hessian
from fnn.curvature.checks import (
    check_like,
    check_loss,
    check_model,
    check_part,
    check_samples,
    checked,
)
from fnn.curvature.linearize import calls_custom_vjp, linearized
from fnn.curvature.sqrt_ggn import one_array, sqrt_ggn
from fnn.eager import once
from fnn.meshes import batch_spec, specs_of, with_auto_axes
from fnn.per_example.precision import norm_of
from fnn.precision import widest


@dataclasses.dataclass(eq=False)
class LinearOperator:
    """A symmetric matrix A as `operator(v)`, or `operator @ v`, for trees v like the parameters.

    `jax.scipy.sparse.linalg.cg(operator, b)` takes it as it is, `to_lineax()` makes it one of
    lineax's. Make it where it is used, inside `jit`: it holds arrays, but is no pytree.

    A product has the parameters' structure, shapes and dtypes, as v must have.

    Attributes:
        product: v ↦ A v; unlike `operator(v)` it doesn't check v.
        like: the parameters, or any tree like them.
        name: the matrix's, for errors.
        is_positive: whether it is positive semidefinite for sure.
    """

    product: Callable[[chex.ArrayTree], chex.ArrayTree]
    like: chex.ArrayTree
    name: str
    is_positive: bool = True

    def __repr__(self) -> str:
        return f"<LinearOperator {self.name}: of trees like {text.size_of_tree(self.like)}>"

    def __call__(self, v: chex.ArrayTree) -> chex.ArrayTree:
        return once(self.product)(check_like(self.name, "the vector", v, self.like))

    __matmul__ = __call__

    def damped(self, damping: chex.Numeric) -> LinearOperator:
        """A + damping · I; below zero it isn't taken to be positive semidefinite any more.

        Raises:
            TypeError, ValueError: damping is no finite number.
        """
        arguments.number("damped", "damping", damping)
        is_traced = isinstance(damping, jax.core.Tracer)
        is_positive = self.is_positive and (is_traced or bool(damping >= 0))

        def product(v):
            add = lambda a, x: a + jnp.asarray(damping).astype(x.dtype) * x
            return jax.tree.map(add, self.product(v), v)

        name = f"{self.name} + damping"
        return LinearOperator(product, self.like, name, is_positive)

    def to_dense(self) -> jax.Array:
        """The matrix (n, n), one product for each column: for small networks, and for tests."""
        flat = _Flat(self.like)
        column = lambda e: flat.vector(self.product(flat.tree(e)))
        eye = jnp.eye(flat.size, dtype=flat.vector(self.like).dtype)
        return once(functools.partial(jax.lax.map, column))(eye).T

    def to_lineax(self) -> Any:
        """A `lineax.FunctionLinearOperator`, tagged symmetric, and positive semidefinite unless
        it is a Hessian.

        Raises:
            ImportError: lineax isn't installed.
        """
        try:
            import lineax
        except ImportError as error:
            raise arguments.missing("to_lineax", "lineax") from error
        tags = [lineax.symmetric_tag]
        if self.is_positive:
            tags.append(lineax.positive_semidefinite_tag)
        structure = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, self.like))
        return lineax.FunctionLinearOperator(self.product, structure, tags)


class _Flat:
    """Trees like the parameters as vectors, in their widest dtype; `wide` makes it float32 at
    least."""

    def __init__(self, like: Any, *, wide: bool = False):
        self.leaves, self.structure = jax.tree.flatten(like)
        self.leaves = [jnp.asarray(x) for x in self.leaves]
        self.size = sum(x.size for x in self.leaves)
        dtypes = [x.dtype for x in self.leaves] + [jnp.dtype("float32")] * wide
        self.dtype = widest(*dtypes)

    def vector(self, tree) -> jax.Array:
        leaves = jax.tree.leaves(tree)
        return jnp.concatenate([jnp.asarray(x, self.dtype).reshape(-1) for x in leaves])

    def tree(self, vector) -> Any:
        found, start = [], 0
        for x in self.leaves:
            part = vector[start : start + x.size]
            found.append(part.reshape(x.shape).astype(x.dtype))
            start += x.size
        return jax.tree.unflatten(self.structure, found)


def ggn_vector_product(model: Callable, loss: Callable, *, part: str = "positive") -> Callable:
    """The generalised Gauss-Newton matrix, (1/N) Σₙ JₙᵀHₙJₙ, as an operator.

    J is the Jacobian of the outputs with respect to the parameters, H the Hessian of the loss with
    respect to the outputs (Schraudolph, "Fast curvature matrix-vector products for second-order
    gradient descent", 2002). The network is linearised once, when the operator is made; one
    product then is J, H, and J transposed. A network that calls a `jax.custom_vjp`, which has no
    forward mode, is gone through backwards twice instead.

    Args:
        model: `model(params, input)`, the outputs of one example, an array.
        loss: `loss(outputs, target)`, the loss of one example.
        part: "positive" or "all" of H; they differ for a loss that isn't convex in the outputs
            (see `fnn.curvature`). Where a loss unknown to fnn can't be seen to be convex, the
            positive part takes the eigenvectors of H, once for the operator.

    Returns:
        A function `(params, (inputs, targets))` that makes a `LinearOperator`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """
    check_model("ggn_vector_product", model)
    check_loss("ggn_vector_product", loss)
    check_part("ggn_vector_product", part)

    def make(params: chex.ArrayTree, batch: chex.ArrayTree) -> LinearOperator:
        params, inputs, targets, size = checked("ggn_vector_product", params, batch)
        product = _ggn_product(model, loss, params, inputs, targets, size, part)
        return LinearOperator(product, params, "GGN", part == "positive")

    return make


def _ggn_product(model, loss, params, inputs, targets, size, part) -> Callable:
    outputs = lambda p: jax.vmap(lambda x: one_array(model(p, x)))(inputs)
    z, push, pull = linearized(outputs, params)
    bend = output_hessian.products(loss, z, targets, part)
    return lambda v: pull(bend(push(v)) / size)


def hessian_vector_product(model: Callable, loss: Callable) -> Callable:
    """The Hessian of the mean loss as an operator: the derivative of the gradient in a direction
    (Pearlmutter, "Fast exact multiplication by the Hessian", 1994).

    Args:
        model, loss: as for `ggn_vector_product`; the loss needn't be convex.

    Returns:
        A function `(params, (inputs, targets))` that makes a `LinearOperator`.

    Raises:
        TypeError: an argument is no function.
    """
    check_model("hessian_vector_product", model)
    check_loss("hessian_vector_product", loss)

    def make(params: chex.ArrayTree, batch: chex.ArrayTree) -> LinearOperator:
        params, inputs, targets, _ = checked("hessian_vector_product", params, batch)
        gradient = grad(mean_loss(model, loss, inputs, targets))

        # Not linearised once: on an LSTM that kept twice the memory, and took a sixth off a
        # product's time; in a loop, XLA hoists what doesn't depend on v.
        if calls_custom_vjp(gradient, params):
            product = lambda v: jax.vjp(gradient, params)[1](v)[0]
        else:
            product = lambda v: jax.jvp(gradient, (params,), (v,))[1]
        return LinearOperator(product, params, "Hessian", False)

    return make


def mean_loss(model, loss, inputs, targets) -> Callable:
    """The batch's mean loss as a function of the parameters."""

    def mean(params):
        losses = jax.vmap(lambda x, t: loss(model(params, x), t))(inputs, targets)
        return jnp.mean(losses)

    return mean


def fisher_vector_product(
    model: Callable, loss: Callable, *, key: chex.PRNGKey | None = None, samples: int = 0
) -> Callable:
    """The Fisher matrix (1/N) Σₙ E[∇ log p(t|z) ∇ log p(t|z)ᵀ] as an operator.

    The label t is drawn from the network's own distribution, loss = −log p. For squared error
    (a normal distribution), softmax and binary cross-entropy and poisson_nll it is the GGN
    (Martens, "New insights and perspectives on the natural gradient method", 2020), and that is
    how it is found; for gaussian_nll it has a form of its own. For a weighted sum or mean of such
    losses, of a text's words for one, it is the same sum of their Fisher matrices.

    Args:
        model, loss: as for `ggn_vector_product`.
        key, samples: with samples > 0 the expectation is over as many labels drawn with the key.

    Returns:
        A function `(params, (inputs, targets))` that makes a `LinearOperator`; it raises a
        ValueError where the loss isn't the negative log-likelihood of a known distribution.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: there are samples to draw without a key.
    """
    where = "fisher_vector_product"
    check_model(where, model)
    check_loss(where, loss)
    check_samples(where, key, samples)

    def make(params: chex.ArrayTree, batch: chex.ArrayTree) -> LinearOperator:
        params, inputs, targets, size = checked(where, params, batch)
        if not _is_likelihood(model, loss, params, inputs, targets):
            raise ValueError(
                f"{where}: the Fisher matrix needs a loss that is a negative log-likelihood: one "
                "of fnn.ops' squared_error, softmax_cross_entropy (integer labels), "
                "sigmoid_binary_cross_entropy, poisson_nll and gaussian_nll. For other losses use "
                "ggn_vector_product."
            )
        if not samples:
            product = _ggn_product(model, loss, params, inputs, targets, size, "fisher")
            return LinearOperator(product, params, "Fisher")
        draw = {"key": key, "samples": samples, "part": "fisher"}

        def gradients(params, batch):
            drawn, tree, _ = sqrt_ggn(model, loss, params, batch, **draw)
            return jax.tree.unflatten(tree, [c.as_batch() for c in drawn])

        return _outer_products(gradients, params, (inputs, targets), size, "Fisher")

    return make


def _is_likelihood(model, loss, params, inputs, targets) -> bool:
    z = jax.eval_shape(model, params, example_types(inputs))
    return output_hessian.is_likelihood(loss, one_array(z), example_types(targets))


def empirical_fisher(model: Callable, loss: Callable) -> Callable:
    """(1/N) Σₙ gₙgₙᵀ, of the gradients at the data's own labels, as an operator.

    One sweep keeps the gradients factored; a product is their inner products with v, and a
    weighted sum. It isn't the Fisher matrix (Kunstner, Hennig & Balles, "Limitations of the
    empirical Fisher approximation", 2019). Its diagonal is
    `fnn.per_example.second_moment`, its trace the mean of the squared norms.

    Args:
        model, loss: as for `ggn_vector_product`; the loss needn't be convex.

    Returns:
        A function `(params, (inputs, targets))` that makes a `LinearOperator`.

    Raises:
        TypeError: an argument is no function.
    """
    check_model("empirical_fisher", model)
    check_loss("empirical_fisher", loss)

    def make(params: chex.ArrayTree, batch: chex.ArrayTree) -> LinearOperator:
        params, inputs, targets, size = checked("empirical_fisher", params, batch)
        whole = lambda p, example: loss(model(p, example[0]), example[1])
        gradients = lambda params, batch: per_example.grads(whole)(params, batch)[1]
        return _outer_products(gradients, params, (inputs, targets), size, "empirical Fisher")

    return make


def _outer_products(gradients, params, batch, size, name) -> LinearOperator:
    grads = with_auto_axes(gradients, (params, batch), batch_spec(batch))

    def product(grads, v):
        found = per_example.weighted_sum(grads, per_example.dot(grads, v) / size)
        return jax.tree.map(lambda x, p: x.astype(p.dtype), found, v)

    placed = lambda v: with_auto_axes(product, (grads, v), specs_of(params))
    return LinearOperator(placed, params, name)


def eigenpairs(
    operator: LinearOperator, k: int, key: chex.PRNGKey, *, steps: int | None = None
) -> tuple[jax.Array, chex.ArrayTree]:
    """The k largest eigenvalues of an operator and their eigenvectors, by Lanczos' method.

    With full reorthogonalisation (Golub & Van Loan, "Matrix computations", section 10.1). The
    extreme eigenvalues converge first; more steps make the later of the k exact.

    Args:
        operator: a symmetric operator, such as `ggn_vector_product(model, loss)(params, batch)`.
        k: how many.
        key: for the vector it starts from.
        steps: products with the operator; 2 k + 20 unless given, at most the dimension.

    Returns:
        `(values, vectors)`: (k,) in descending order, in float32 at least, and a tree like the
        parameters with a leading axis of k, of unit length together.

    Raises:
        TypeError: operator is no `LinearOperator`, key no key, k or steps no integer.
        ValueError: k isn't between 1 and the number of steps.
    """
    if not isinstance(operator, LinearOperator):
        raise TypeError(
            "eigenpairs: operator must be a LinearOperator, such as ggn_vector_product(model, "
            f"loss)(params, batch), but got {arguments.show(operator)}."
        )
    k = arguments.integer("eigenpairs", "k", k, least=1)
    key = arguments.key("eigenpairs", "key", key)
    if steps is not None:
        steps = arguments.integer("eigenpairs", "steps", steps, least=1)
    # Lanczos' method in float32 at least, the products in the parameters' dtypes.
    flat = _Flat(operator.like, wide=True)
    size = flat.size
    steps = min(size, 2 * k + 20 if steps is None else steps)
    if k > steps:
        raise ValueError(
            f"eigenpairs: k must be between 1 and the number of steps, {steps}, but is {k}."
        )
    product = lambda v: flat.vector(operator.product(flat.tree(v)))

    def orthogonal(v, basis):
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            v = v - basis.T @ (basis @ v)
        return v

    def unit(v):
        return v / _norm(v)

    def step(carry, given):
        basis, v, scale = carry
        i, key = given
        basis = basis.at[i].set(v)
        w = product(v)
        alpha = jnp.sum(v * w)
        w = orthogonal(w, basis)
        beta = _norm(w)
        scale = jnp.maximum(scale, jnp.maximum(jnp.abs(alpha), beta))
        # An invariant subspace is used up: go on from any vector that is orthogonal to it. (|0| is
        # tiny here, and all that there is where the matrix is zero.)
        info = jnp.finfo(v.dtype)
        used_up = beta <= jnp.maximum(10 * info.eps * math.sqrt(size) * scale, info.tiny)
        fresh = orthogonal(jax.random.normal(key, v.shape, v.dtype), basis)
        after = unit(orthogonal(unit(jnp.where(used_up, fresh, w)), basis))
        return (basis, after, scale), (alpha, jnp.where(used_up, 0, beta))

    first, more = jax.random.split(key)
    v = jax.random.normal(first, (size,), flat.dtype)
    start = (jnp.zeros((steps, size), flat.dtype), unit(v), jnp.zeros((), flat.dtype))
    each = jnp.arange(steps), jax.random.split(more, steps)
    (basis, _, _), (alpha, beta) = once(functools.partial(jax.lax.scan, step))(start, each)
    tridiagonal = jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1)
    values, vectors = jnp.linalg.eigh(tridiagonal)
    found = (basis.T @ vectors[:, ::-1][:, :k]).T
    found = jax.vmap(unit)(found)
    return values[::-1][:k], jax.vmap(flat.tree)(found)


def _norm(v):
    """|v|; tiny, not 0, for zeros."""
    return jnp.maximum(norm_of(v), jnp.finfo(v.dtype).tiny)


def natural_gradient(
    model: Callable,
    loss: Callable,
    *,
    damping: chex.Numeric = 1e-3,
    max_iterations: int = 50,
    tolerance: chex.Numeric = 1e-5,
) -> Callable:
    """The natural gradient (F + damping · I)⁻¹ ∇L, by conjugate gradients.

    F is the Fisher matrix where the loss is the negative log-likelihood of a distribution known
    to fnn (see `fisher_vector_product`), and the GGN for any other loss (Amari 1998; Martens,
    "Deep learning via Hessian-free optimization", 2010).

    Args:
        model: `model(params, input)`, the outputs of one example, an array.
        loss: `loss(outputs, target)`, the loss of one example.
        damping: λ, at least 0.
        max_iterations: products with the matrix, at most.
        tolerance: it ends where the rest is so small a share of the gradient.

    Returns:
        A function `(params, (inputs, targets))` to `(mean loss, natural gradient)`; the latter,
        a tree like the parameters, is what an optimiser such as `optax.sgd` takes for a
        gradient. The iterations are in float32 at least, the products in the parameters' dtypes.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """
    where = "natural_gradient"
    check_model(where, model)
    check_loss(where, loss)
    arguments.number(where, "damping", damping, least=0)
    arguments.integer(where, "max_iterations", max_iterations, least=1)
    arguments.number(where, "tolerance", tolerance, least=0)

    def of_batch(params: chex.ArrayTree, batch: chex.ArrayTree) -> tuple[jax.Array, chex.ArrayTree]:
        params, inputs, targets, size = checked(where, params, batch)
        value, gradient = value_and_grad(mean_loss(model, loss, inputs, targets))(params)
        curved = _ggn_product(model, loss, params, inputs, targets, size, "fisher")
        flat = _Flat(params, wide=True)
        # In the vectors' dtype: numpy's float64 would make float64 of float32.
        shift, share = (jnp.asarray(x).astype(flat.dtype) for x in (damping, tolerance))
        product = lambda v: flat.vector(curved(flat.tree(v))) + shift * v
        # A gradient of length one: its square neither overflows nor vanishes.
        whole = flat.vector(gradient)
        length = _norm(whole)
        solve = functools.partial(
            jax.scipy.sparse.linalg.cg, product, tol=share, maxiter=max_iterations
        )
        found, _ = once(solve)(whole / length)
        return value, flat.tree(length * found)

    return of_batch
