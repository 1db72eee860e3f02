"""Kronecker factors of the generalised Gauss-Newton matrix, parameter by parameter.

A weight's block of the GGN is Σ over examples and columns of vec(GᵀA) vec(GᵀA)ᵀ. KFAC takes for
it a Kronecker product of two small matrices, of the inputs and of the backpropagated columns
(Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
2015):

    GGN of W  ≈  (mean of a aᵀ)  ⊗  (mean of Σ_c g_c g_cᵀ).

A weight that is used at several positions comes in two kinds (Eschenhagen et al., "Kronecker-
factored approximate curvature for modern neural network architectures", 2023): "expand" takes
every position for an example of its own, "reduce" sums over them first.
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

from fnn import arguments, text
from fnn.backprop import grad
from fnn.batch import batch_size
from fnn.curvature.checks import check_loss, check_model, check_samples, checked
from fnn.curvature.sqrt_ggn import SqrtGGN, sqrt_ggn
from fnn.meshes import with_auto_axes
from fnn.per_example.layout import Layout
from fnn.per_example.terms import Convolution, Product, Rows, Term, materialized
from fnn.precision import wide, wide_dtype, wide_together


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("A", "G"),
    meta_fields=("layout", "shape"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Kronecker:
    """A block A ⊗ G for a weight: A (stack, in, in), G (stack, out, out).

    A may be a vector (stack, in): a diagonal, as an embedding's. The stack are weights of their
    own, such as a convolution's groups or the layers of a scan.
    """

    A: jax.Array
    G: jax.Array
    layout: Layout
    shape: tuple[int, ...]

    def __repr__(self) -> str:
        return text.of_fields("Kronecker", A=self.A, G=self.G, shape=self.shape)

    def times(self, w: jax.Array) -> jax.Array:
        """The block times a tensor of the parameter's shape."""
        G, A, w = wide_together(self.G, self.A, w)
        x = jnp.einsum("sop,spi->soi", G, self.layout.from_parameter(w))
        x = x * A[:, None] if A.ndim == 2 else jnp.einsum("soi,sij->soj", x, A)
        return self.layout.to_parameter(x)

    def to_dense(self) -> jax.Array:
        """The block as a matrix (size, size), in the order of the parameter's entries."""
        eye = jnp.eye(math.prod(self.shape), dtype=self.G.dtype)
        return jax.vmap(lambda e: self.times(e.reshape(self.shape)).reshape(-1))(eye).T


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("matrix",), meta_fields=("shape",)
)
@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A parameter's whole block, (size, size): a bias's, say."""

    matrix: jax.Array
    shape: tuple[int, ...]

    def __repr__(self) -> str:
        return text.of_fields("Block", matrix=self.matrix, shape=self.shape)

    def times(self, w: jax.Array) -> jax.Array:
        matrix, w = wide_together(self.matrix, w)
        return (matrix @ w.reshape(-1)).reshape(self.shape)

    def to_dense(self) -> jax.Array:
        return self.matrix


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("diagonal",), meta_fields=("shape",)
)
@dataclasses.dataclass(frozen=True, eq=False)
class Diagonal:
    """A block's diagonal alone, of the parameter's shape."""

    diagonal: jax.Array
    shape: tuple[int, ...]

    def __repr__(self) -> str:
        return text.of_fields("Diagonal", diagonal=self.diagonal, shape=self.shape)

    def times(self, w: jax.Array) -> jax.Array:
        diagonal, w = wide_together(self.diagonal, w)
        return diagonal * w

    def to_dense(self) -> jax.Array:
        return jnp.diag(self.diagonal.reshape(-1))


Factors = Kronecker | Block | Diagonal


def kronecker_factors(
    model: Callable,
    loss: Callable,
    *,
    kind: str = "expand",
    key: chex.PRNGKey | None = None,
    samples: int = 0,
    empirical: bool = False,
    largest_block: int = 1024,
) -> Callable:
    """Kronecker factors of the GGN (1/N) Σₙ JₙᵀHₙJₙ, for each parameter.

    Args:
        model: `model(params, input)`, the outputs of one example, an array.
        loss: `loss(outputs, target)`, the loss of one example; of its Hessian with respect to
            the outputs the positive part (see `fnn.curvature`).
        kind: "expand" or "reduce", for weights used at several positions.
        key, samples: with samples > 0, labels drawn from the network's distribution (KFAC); else
            all columns of the loss's Hessian (KFLR, Botev et al. 2017).
        empirical: the gradients themselves instead of columns (the empirical Fisher).
        largest_block: parameters without factors, biases and scales, get their whole block up to
            so many numbers, its diagonal beyond.

    Returns:
        A function `(params, (inputs, targets))` to a tree like the parameters of `Kronecker`,
        `Block` or `Diagonal`; each has `times(tensor)` and `to_dense()`. Exact for a weight
        used at one position of a batch of one example, and an approximation beyond.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or there are
            samples to draw without a key, or for the empirical Fisher.
    """
    check_model("kronecker_factors", model)
    check_loss("kronecker_factors", loss)
    arguments.choice("kronecker_factors", "kind", kind, ("expand", "reduce"))
    check_samples("kronecker_factors", key, samples)
    arguments.integer("kronecker_factors", "largest_block", largest_block, least=0)
    if arguments.flag("kronecker_factors", "empirical", empirical) and samples:
        raise ValueError(
            "kronecker_factors: the empirical Fisher takes the data's labels: no samples."
        )
    options: dict[str, Any] = {
        "kind": kind,
        "key": key,
        "samples": samples,
        "largest_block": largest_block,
    }
    if empirical:
        options["seeds"] = lambda z, t: grad(lambda z: loss(z, t))(z)[None]
    part = "fisher" if samples else "positive"

    def of_batch(params: chex.ArrayTree, batch: chex.ArrayTree) -> Any:
        params, *batch, _ = checked("kronecker_factors", params, batch)
        of = lambda params, batch: factors(model, loss, params, batch, part=part, **options)
        return with_auto_axes(of, (params, batch))

    return of_batch


def factors(
    model: Callable,
    loss: Callable,
    params: chex.ArrayTree,
    batch: chex.ArrayTree,
    *,
    kind: str,
    part: str,
    largest_block: int = 1024,
    **sweep: Any,
) -> Any:
    """A batch's factors; `sweep` says how its columns are found (see `sqrt_ggn.py`)."""
    found, tree, _ = sqrt_ggn(model, loss, params, batch, part=part, thrifty=False, **sweep)
    size = batch_size(batch)
    return jax.tree.unflatten(tree, [factors_of(c, size, kind, largest_block) for c in found])


def factors_of(own: SqrtGGN, size: int, kind: str, largest_block: int) -> Factors:
    """One parameter's factors, in float32 at least."""
    if math.prod(own.shape) == 0:
        return Diagonal(jnp.zeros(own.shape, wide_dtype(own.dtype)), own.shape)
    term: Term | None
    axes: Any
    term, axes = (own.terms[0], own.axes[0]) if len(own.terms) == 1 else (None, None)
    if isinstance(term, Convolution):
        term, axes = _as_product(term, axes)
    if isinstance(term, Product) and axes.a is None:  # so that g differs by column
        a, g = wide_together(term.a, term.g)
        return _kronecker(a, g, term.layout, own.shape, size, kind)
    if isinstance(term, Rows) and axes.index is None and kind == "expand":
        positions = term.index.shape[-1]
        _, rows, _ = term.layout.sizes
        g = wide(term.g)
        counts = jnp.zeros(rows, g.dtype).at[term.index.reshape(-1)].add(1, mode="drop")
        g = jnp.einsum("ncspo,ncspq->soq", g, g) / size
        # The factor that stands first in the layout is the table's rows: theirs is diagonal.
        swapped = dataclasses.replace(
            term.layout,
            out=term.layout.ins,
            ins=term.layout.out,
            order=_swapped(term.layout),
        )
        return Kronecker(counts[None] / (size * positions), g, swapped, own.shape)
    numbers = math.prod(own.shape)
    if numbers <= largest_block:
        flat = wide(own.each(materialized).reshape(-1, numbers))
        return Block(flat.T @ flat / size, own.shape)
    return Diagonal(own.sum_of_squares() / size, own.shape)


def _kronecker(a, g, layout, shape, size, kind) -> Kronecker:
    """a (N, stack, positions, in), g (N, columns, stack, positions, out)."""
    positions = a.shape[2]
    if kind == "reduce" and positions > 1:
        a = jnp.sum(a, axis=2, keepdims=True) / positions
        g = jnp.sum(g, axis=3, keepdims=True)
        positions = 1
    return Kronecker(
        _second_moments(jnp.moveaxis(a, 1, 0)) / (size * positions),
        _second_moments(jnp.moveaxis(g, 2, 0)) / size,
        layout,
        shape,
    )


def _second_moments(x):
    """Σ x xᵀ over all axes between the first, the stack, and the last."""
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    if x.shape[0] == 1:
        return (x[0].T @ x[0])[None]
    return jnp.einsum("sni,snj->sij", x, x)


def _as_product(term: Convolution, axes: Any) -> tuple[Product | None, Any]:
    """A convolution as a product, its patches made once for all columns; None where x differs by
    column."""
    if axes.x is not None or axes.g != 0:
        return None, None
    one = lambda x, g: dataclasses.replace(term, x=x, g=g).as_product()
    unused = jnp.zeros(term.g.shape[2:], term.g.dtype)  # there may be no column at all
    a = jax.vmap(lambda x: one(x, unused).a)(term.x)
    g = jax.vmap(lambda x, gs: jax.vmap(lambda g: one(x, g).g)(gs))(term.x, term.g)
    return Product(a, g, term.layout), Product(None, 0, term.layout)


def _swapped(layout: Layout) -> tuple[int, ...]:
    """The order of axes once out and in have changed places."""
    s, o, i = len(layout.stack), len(layout.out), len(layout.ins)
    place = [*range(s), *range(s + i, s + i + o), *range(s, s + i)]
    return tuple(place[k] for k in layout.order)
