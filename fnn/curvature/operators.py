"""Curvature matrices as linear operators: products with vectors, never the matrix.

All are matrices of the MEAN loss over the batch, by the parameters; a vector is a tree like
them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import fnn.per_example as per_example
from fnn import arguments
from fnn.backprop import grad, value_and_grad
from fnn.curvature import output_hessian
from fnn.curvature.columns import check_samples, columns, one_array, pair
from fnn.jaxpr import once
from fnn.per_example.differentiate import batch_size


@dataclasses.dataclass(eq=False)
class LinearOperator:
    """A symmetric matrix A as `operator(v)`, or `operator @ v`, for trees v like the parameters.

    `jax.scipy.sparse.linalg.cg(operator, b)` takes it as it is, `to_lineax()` makes it one of
    lineax's. Make it where it is used, inside `jit`: it holds arrays, but is no pytree.
    """

    product: Callable[[Any], Any]
    like: Any
    name: str

    def __call__(self, v: Any) -> Any:
        self._check(v)
        return once(self.product)(v)

    __matmul__ = __call__

    def damped(self, damping: float) -> LinearOperator:
        """A + damping · I."""

        def product(v):
            return jax.tree.map(lambda a, x: a + damping * x, self.product(v), v)

        return LinearOperator(product, self.like, f"{self.name} + damping")

    def to_dense(self) -> jax.Array:
        """The matrix (n, n), one product for each column: for small networks, and for tests."""
        zero, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, self.like))
        column = lambda e: ravel_pytree(self.product(unravel(e)))[0]
        columns_of = once(functools.partial(jax.lax.map, column))
        return columns_of(jnp.eye(zero.size, dtype=zero.dtype)).T

    def to_lineax(self) -> Any:
        """A `lineax.FunctionLinearOperator`, tagged symmetric.

        Raises:
            ImportError: lineax isn't installed.
        """
        try:
            import lineax
        except ImportError as error:
            raise arguments.missing("to_lineax", "lineax") from error
        tags = [lineax.symmetric_tag]
        if self.name != "Hessian":
            tags.append(lineax.positive_semidefinite_tag)
        structure = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, self.like))
        return lineax.FunctionLinearOperator(self.product, structure, tags)

    def _check(self, v) -> None:
        got, want = jax.tree.structure(v), jax.tree.structure(self.like)
        if got != want:
            raise ValueError(
                f"the {self.name} acts on trees like the parameters, {want}, but got {got}."
            )
        for (path, x), p in zip(
            jax.tree_util.tree_leaves_with_path(v), jax.tree.leaves(self.like), strict=True
        ):
            if jnp.shape(x) != jnp.shape(p):
                raise ValueError(
                    f"the vector for the {self.name} has shape {jnp.shape(x)} at "
                    f"{jax.tree_util.keystr(path) or 'its only leaf'}, where the parameter has "
                    f"shape {jnp.shape(p)}."
                )


def ggn_vector_product(model: Callable, loss: Callable) -> Callable:
    """The generalised Gauss-Newton matrix, (1/N) Σₙ JₙᵀHₙJₙ, as an operator.

    J is the Jacobian of the outputs by the parameters, H the Hessian of the loss by the outputs
    (Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent",
    2002). The network is linearised once, when the operator is made; one product then is J, H,
    and J transposed.

    Args:
        model: `model(params, input)`, the outputs of one example, an array.
        loss: `loss(outputs, target)`, the loss of one example, convex in the outputs.

    Returns:
        A function `(params, (inputs, targets))` that makes a `LinearOperator`.
    """

    def make(params: Any, batch: Any) -> LinearOperator:
        arguments.no_result("fnn.curvature", "params", params)
        (inputs, targets), size = pair(batch), batch_size(batch)
        outputs = lambda p: jax.vmap(lambda x: one_array(model(p, x)))(inputs)
        z, push = once(functools.partial(jax.linearize, outputs))(params)
        pull = jax.linear_transpose(push, params)

        def product(v):
            by_example = lambda z, t, u: output_hessian.of(loss, z, t).product(z, u)
            (found,) = pull(jax.vmap(by_example)(z, targets, push(v)) / size)
            return found

        return LinearOperator(product, params, "GGN")

    return make


def hessian_vector_product(model: Callable, loss: Callable) -> Callable:
    """The Hessian of the mean loss as an operator: the derivative of the gradient in a direction
    (Pearlmutter, "Fast exact multiplication by the Hessian", 1994). Arguments as for
    `ggn_vector_product`; the loss needn't be convex.
    """

    def make(params: Any, batch: Any) -> LinearOperator:
        arguments.no_result("fnn.curvature", "params", params)
        gradient = grad(mean_loss(model, loss, batch))

        # Not linearised once: on an LSTM that kept twice the memory, and took a sixth off a
        # product's time; in a loop, XLA hoists what doesn't depend on v.
        def product(v):
            return jax.jvp(gradient, (params,), (v,))[1]

        return LinearOperator(product, params, "Hessian")

    return make


def mean_loss(model, loss, batch) -> Callable:
    """The batch's mean loss as a function of the parameters."""
    inputs, targets = pair(batch)
    batch_size(batch)
    return lambda p: jnp.mean(jax.vmap(lambda x, t: loss(model(p, x), t))(inputs, targets))


def fisher_vector_product(
    model: Callable, loss: Callable, *, key: Any = None, samples: int = 0
) -> Callable:
    """The Fisher matrix (1/N) Σₙ E[∇ log p(t|z) ∇ log p(t|z)ᵀ] as an operator.

    The label t is drawn from the network's own distribution, loss = −log p. For squared error
    (a normal distribution), softmax and binary cross-entropy it is the GGN (Martens, "New
    insights and perspectives on the natural gradient method", 2020), and that is how it is
    found; with `samples` the expectation is over as many drawn labels. For a weighted sum or
    mean of such losses, of a text's words for one, it is the same sum of their Fisher matrices.

    Raises:
        ValueError: the loss isn't the negative log-likelihood of a known distribution, or there
            are samples to draw without a key.
    """
    check_samples(key, samples)

    def make(params: Any, batch: Any) -> LinearOperator:
        arguments.no_result("fnn.curvature", "params", params)
        inputs, targets = pair(batch)
        first = lambda tree: jax.tree.map(lambda x: x[0], tree)
        z = jax.eval_shape(model, params, first(inputs))
        if not output_hessian.is_likelihood(loss, z, first(targets)):
            raise ValueError(
                "the Fisher matrix needs a loss that is a negative log-likelihood: one of fnn.ops' "
                "squared_error, softmax_cross_entropy (integer labels) and "
                "sigmoid_binary_cross_entropy. For other losses use ggn_vector_product."
            )
        if not samples:
            return dataclasses.replace(
                ggn_vector_product(model, loss)(params, batch), name="Fisher"
            )
        drawn, tree, _ = columns(model, loss, params, batch, key=key, samples=samples)
        grads = jax.tree.unflatten(tree, [c.as_batch() for c in drawn])
        return _outer_products(grads, params, batch_size(batch), "Fisher")

    return make


def empirical_fisher(model: Callable, loss: Callable) -> Callable:
    """(1/N) Σₙ gₙgₙᵀ, of the gradients at the data's own labels, as an operator.

    One sweep keeps the gradients factored; a product is their inner products with v, and a
    weighted sum. It isn't the Fisher matrix (Kunstner, Hennig & Balles, "Limitations of the
    empirical Fisher approximation", 2019). Its diagonal is
    `fnn.per_example.second_moment`, its trace the mean of the squared norms.
    """

    def make(params: Any, batch: Any) -> LinearOperator:
        arguments.no_result("fnn.curvature", "params", params)
        pair(batch)
        whole = lambda p, example: loss(model(p, example[0]), example[1])
        _, grads = per_example.grads(whole)(params, tuple(batch))
        return _outer_products(grads, params, batch_size(batch), "empirical Fisher")

    return make


def _outer_products(grads, params, size, name) -> LinearOperator:
    def product(v):
        found = per_example.weighted_sum(grads, per_example.dot(grads, v) / size)
        return jax.tree.map(lambda x, p: x.astype(jnp.asarray(p).dtype), found, params)

    return LinearOperator(product, params, name)


def eigenpairs(
    operator: LinearOperator, k: int, key: jax.Array, *, steps: int | None = None
) -> tuple[jax.Array, Any]:
    """The k largest eigenvalues of an operator and their eigenvectors, by Lanczos' method.

    With full reorthogonalisation (Golub & Van Loan, "Matrix computations", section 10.1). The
    extreme eigenvalues converge first; more steps make the later of the k exact.

    Args:
        operator: a symmetric operator, such as `ggn_vector_product(model, loss)(params, batch)`.
        k: how many.
        key: for the vector it starts from.
        steps: products with the operator; 2 k + 20 unless given, at most the dimension.

    Returns:
        `(values, vectors)`: (k,) in descending order, and a tree like the parameters with a
        leading axis of k, of unit length together.
    """
    zero, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, operator.like))
    size = zero.size
    steps = min(size, 2 * k + 20 if steps is None else steps)
    if not 0 < k <= steps:
        raise ValueError(f"k must be between 1 and the number of steps, {steps}, but is {k}.")
    product = lambda v: ravel_pytree(operator(unravel(v)))[0]

    def orthogonal(v, basis):
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            v = v - basis.T @ (basis @ v)
        return v

    def unit(v):
        return v / jnp.linalg.norm(v)

    def step(carry, i):
        basis, v, scale = carry
        basis = basis.at[i].set(v)
        w = product(v)
        alpha = v @ w
        w = orthogonal(w, basis)
        beta = jnp.linalg.norm(w)
        scale = jnp.maximum(scale, jnp.maximum(jnp.abs(alpha), beta))
        # An invariant subspace is used up: go on from any vector that is orthogonal to it.
        used_up = beta <= 10 * jnp.finfo(v.dtype).eps * math.sqrt(size) * scale
        fresh = orthogonal(jax.random.normal(jax.random.fold_in(key, i), v.shape, v.dtype), basis)
        after = unit(orthogonal(unit(jnp.where(used_up, fresh, w)), basis))
        return (basis, after, scale), (alpha, jnp.where(used_up, 0, beta))

    v = jax.random.normal(key, zero.shape, zero.dtype)
    start = (jnp.zeros((steps, size), zero.dtype), unit(v), jnp.zeros((), zero.dtype))
    scan = once(functools.partial(jax.lax.scan, step))
    (basis, _, _), (alpha, beta) = scan(start, jnp.arange(steps))
    tridiagonal = jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1)
    values, vectors = jnp.linalg.eigh(tridiagonal)
    found = (basis.T @ vectors[:, ::-1][:, :k]).T
    found = found / jnp.linalg.norm(found, axis=1, keepdims=True)
    return values[::-1][:k], jax.vmap(unravel)(found)


def natural_gradient(
    model: Callable,
    loss: Callable,
    *,
    damping: float = 1e-3,
    max_iterations: int = 50,
    tolerance: float = 1e-5,
) -> Callable:
    """The natural gradient (G + damping · I)⁻¹ ∇L, by conjugate gradients on the GGN G.

    For a negative log-likelihood G is the Fisher matrix (Amari 1998; Martens, "Deep learning via
    Hessian-free optimization", 2010).

    Returns:
        A function `(params, (inputs, targets))` to `(mean loss, natural gradient)`; the latter,
        a tree like the parameters, is what an optimiser such as `optax.sgd` takes for a
        gradient.
    """

    def of_batch(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        value, gradient = value_and_grad(mean_loss(model, loss, batch))(params)
        operator = ggn_vector_product(model, loss)(params, batch).damped(damping)
        solve = functools.partial(
            jax.scipy.sparse.linalg.cg, operator, tol=tolerance, maxiter=max_iterations
        )
        found, _ = once(solve)(gradient)
        return value, found

    return of_batch
