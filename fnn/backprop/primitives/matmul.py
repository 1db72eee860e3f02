"""Matrix multiplication in all its forms: products summed over the axes that both arguments share.

A product is *bilinear*: with one argument held fixed, the output is a linear map of the other.
So the local gradient for `a` is `b`, and the local gradient for `b` is `a`; all that is left to
find is over which axes the upstream gradient `g` is summed with them.

    Y = A B     ∂L/∂A = G Bᵀ     ∂L/∂B = Aᵀ G

The shapes alone fix the answer (CS231n, "Derivatives, Backpropagation, and Vectorization"):
G Bᵀ is the only product of G and B with the shape of A. What follows keeps the order of axes
and operands of JAX's own transposes, so that the compiled program is the same one.

Nothing is conjugated for complex numbers: that is JAX's convention.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, get_abstract_mesh

from fnn.backprop.rules import LocalRule, each


@functools.cache
def _product_for_a(dimension_numbers, a_ndim: int, b_ndim: int, a_is_second: bool):
    """How to multiply g and b so that the gradient of a comes out.

    The output's axes are the batch axes, then a's own ("kept") axes, then b's; the contracted
    axes were summed away. The gradient of a therefore sums g with b over the axes that b
    brought in, and gets back the contracted axes from b.

    Returns the dimension numbers of dot_general(g, b), the axes of `a` in the order in which
    that product delivers them, and the permutation that sorts them.
    """
    (a_contract, b_contract), (a_batch, b_batch) = dimension_numbers
    a_kept = [i for i in range(a_ndim) if i not in a_contract and i not in a_batch]
    b_kept = [i for i in range(b_ndim) if i not in b_contract and i not in b_batch]
    y_batch = tuple(range(len(a_batch)))
    start = len(y_batch) + (0 if a_is_second else len(a_kept))
    y_from_b = tuple(range(start, start + len(b_kept)))
    product = ((y_from_b, tuple(b_kept)), (y_batch, tuple(b_batch)))
    # dot_general leaves b's remaining axes in ascending order, so a's follow that order.
    in_order_of_b = sorted(range(len(b_contract)), key=lambda i: b_contract[i])
    axes = (*a_batch, *a_kept, *(a_contract[i] for i in in_order_of_b))
    return product, axes, tuple(sorted(range(a_ndim), key=lambda i: axes[i]))


def _dot_general_a(
    g, y, a, b, *, dimension_numbers, out_sharding=None, a_is_second=False, **params
):
    """∂L/∂a of y = a·b is g·b, summed over the axes that came from b: G Bᵀ for matrices."""
    product, axes, permutation = _product_for_a(dimension_numbers, a.ndim, b.ndim, a_is_second)
    gradient = lax.dot_general_p.bind(
        g, b, dimension_numbers=product, out_sharding=gradient_sharding(a, axes), **params
    )
    return as_dtype(a.dtype, lax.transpose(gradient, permutation))


def _dot_general_b(g, y, a, b, *, dimension_numbers, **params):
    """∂L/∂b: the same with the two arguments' roles exchanged, Aᵀ G for matrices."""
    (a_contract, b_contract), (a_batch, b_batch) = dimension_numbers
    swapped = ((b_contract, a_contract), (b_batch, a_batch))
    return _dot_general_a(g, y, b, a, dimension_numbers=swapped, a_is_second=True, **params)


def _ragged_dot_general(
    a_is_second, g, y, a, b, sizes, *, ragged_dot_dimension_numbers, group_offset=None, **params
):
    """Rows of `a` come in groups, and each group has its own matrix (a mixture of experts).

    With one axis of each kind, and row m (or k, or b) belonging to group e:

        rows in groups       y[m,n] = Σₖ a[m,k] b[e,k,n]
                             ∂a[m,k] = Σₙ g[m,n] b[e,k,n]      rows in groups again
                             ∂b[e,k,n] = Σ_{m in e} a[m,k] g[m,n]      sums in groups
        sums in groups       y[e,m,n] = Σ_{k in e} a[m,k] b[k,n]
                             ∂a[m,k] = Σₙ b[k,n] g[e,m,n]      rows in groups
        batches in groups    as the plain product, batch by batch

    JAX itself differentiates the first kind only (so not twice).
    """
    if group_offset is not None:
        raise NotImplementedError("ragged_dot_general with group_offset has no gradient.")
    numbers = ragged_dot_dimension_numbers
    (a_contract, b_contract), (a_batch, b_batch) = numbers.dot_dimension_numbers
    (ragged,), group = numbers.lhs_ragged_dimensions, tuple(numbers.rhs_group_dimensions)
    a_kept = [i for i in range(a.ndim) if i not in a_contract and i not in a_batch]
    b_kept = [i for i in range(b.ndim) if i not in (*b_contract, *b_batch, *group)]
    k_sorted_by = lambda axes, key: [axes[i] for i in sorted(range(len(key)), key=lambda i: key[i])]
    first = int(ragged in a_contract)  # sums in groups put the group axis first in y
    y_batch = list(range(first, first + len(a_batch)))
    y_a = list(range(first + len(a_batch), first + len(a_batch) + len(a_kept)))
    y_b = list(range(first + len(a_batch) + len(a_kept), y.ndim))

    if ragged in a_contract and a_is_second:
        lhs, rhs, contract, batch = a, g, (a_kept, y_a), (a_batch, y_batch)
        ragged_axis, group_axis = ragged, [0]
        axes = [*b_batch, *k_sorted_by(b_contract, a_contract), *b_kept]
    elif ragged in a_contract:
        lhs, rhs, contract, batch = b, g, (b_kept, y_b), (b_batch, y_batch)
        ragged_axis, group_axis = b_contract[list(a_contract).index(ragged)], [0]
        axes = [*a_batch, *k_sorted_by(a_contract, b_contract), *a_kept]
    elif a_is_second:
        lhs, rhs, contract, batch = a, g, (a_kept, y_a), (a_batch, y_batch)
        ragged_axis, group_axis = ragged, []
        axes = [*group, *b_batch, *k_sorted_by(b_contract, a_contract), *b_kept]
    else:
        lhs, rhs, contract, batch = g, b, (y_b, b_kept), (y_batch, b_batch)
        ragged_axis, group_axis = [*a_batch, *a_kept].index(ragged), group
        axes = [*a_batch, *a_kept, *k_sorted_by(a_contract, b_contract)]

    target = b if a_is_second else a
    gradient = lax.ragged_dot_general(
        lhs,
        rhs,
        sizes,
        lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(contract, batch),
            lhs_ragged_dimensions=[ragged_axis],
            rhs_group_dimensions=group_axis,
        ),
        **params | {"out_sharding": gradient_sharding(target, axes)},
    )
    permutation = sorted(range(target.ndim), key=lambda i: axes[i])
    return as_dtype(target.dtype, lax.transpose(gradient, permutation))


# ------------------------------------------------------------------- dtypes and meshes


def as_dtype(dtype, x):
    """x in the dtype of the argument it is the gradient of.

    They differ where `preferred_element_type` or a mixed product made the output wider. A real
    argument of a complex product gets the real part.
    """
    if x.dtype == dtype:
        return x
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        x = lax.real(x)
    return lax.convert_element_type(x, dtype)


def gradient_sharding(x, axes: Sequence[int] | None = None) -> NamedSharding | None:
    """The sharding that a gradient of x must have, with its axes in the order `axes`.

    Only a mesh with explicit axes asks for it; elsewhere the compiler decides, and it is None.
    """
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:
        mesh = get_abstract_mesh()
        return None if mesh.empty else NamedSharding(mesh, PartitionSpec(*[None] * x.ndim))
    if axes is None:
        return sharding
    spec = sharding.spec
    return sharding.update(spec=spec.update(partitions=tuple(spec[axis] for axis in axes)))


RULES: dict[str, LocalRule] = {
    "dot_general": each(_dot_general_a, _dot_general_b, local_gradient=("g·bᵀ", "aᵀ·g")),
    "ragged_dot_general": each(
        functools.partial(_ragged_dot_general, False),
        functools.partial(_ragged_dot_general, True),
        None,
        local_gradient=("g·b[group]ᵀ", "a[group]ᵀ·g", "0"),
    ),
}
