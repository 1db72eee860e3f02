"""Matrix multiplication in all its forms: products, summed over axes that both arguments have.

A product is *bilinear*: with one argument held fixed, the output is a linear map of the other.
So the local gradient for `a` is `b`, and the local gradient for `b` is `a`; all that is left to
find is over which axes the upstream gradient `g` is summed with them.

    Y = A B     ∂L/∂A = G Bᵀ     ∂L/∂B = Aᵀ G

With any number of axes (n: batch axes, i: a's own, j: b's own, k: summed over) this reads

    y[n,i,j] = Σₖ a[n,i,k] b[n,j,k]
    ∂L/∂a[n,i,k] = Σⱼ g[n,i,j] b[n,j,k]     ∂L/∂b[n,j,k] = Σᵢ g[n,i,j] a[n,i,k]

The shapes alone fix the answer (CS231n, "Derivatives, Backpropagation, and Vectorization"):
G Bᵀ is the only product of G and B with the shape of A. What follows keeps the order of axes
and operands of JAX's own transposes, so that the compiled program is the same one.

Nothing is conjugated for complex numbers: that is JAX's convention.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, get_abstract_mesh

from fnn.backprop.primitives.elementwise import in_dtype_of
from fnn.backprop.rules import LocalRule, each

# ------------------------------------------------------------------------- products of arrays


def _dot_general_a(
    g, y, a, b, *, dimension_numbers, out_sharding=None, a_is_second=False, **params
):
    """∂L/∂a[n,i,k] = Σⱼ g[n,i,j] b[n,j,k]: G Bᵀ for matrices."""
    product, axes, permutation = _product_for_a(dimension_numbers, a.ndim, b.ndim, a_is_second)
    gradient = lax.dot_general_p.bind(
        g, b, dimension_numbers=product, out_sharding=gradient_sharding(a, axes), **params
    )
    return in_dtype_of(a, lax.transpose(gradient, permutation))


def _dot_general_b(g, y, a, b, *, dimension_numbers, **params):
    """∂L/∂b: the same with the two arguments' roles exchanged, Aᵀ G for matrices."""
    (a_contract, b_contract), (a_batch, b_batch) = dimension_numbers
    swapped = ((b_contract, a_contract), (b_batch, a_batch))
    return _dot_general_a(g, y, b, a, dimension_numbers=swapped, a_is_second=True, **params)


@functools.cache
def _product_for_a(dimension_numbers, a_ndim: int, b_ndim: int, a_is_second: bool):
    """Which axes of g and b are summed over, and where the axes of the result belong in a.

    Returns the dimension numbers of dot_general(g, b), the axes of `a` in the order in which
    that product delivers them, and the permutation that sorts them.
    """
    (a_k, b_k), (a_n, b_n) = dimension_numbers
    a_i = _others(a_ndim, a_n, a_k)
    b_j = _others(b_ndim, b_n, b_k)
    g_n = tuple(range(len(a_n)))  # g's axes are n, i, j, or n, j, i where a is the second argument
    start = len(g_n) + (0 if a_is_second else len(a_i))
    g_j = tuple(range(start, start + len(b_j)))
    axes = (*a_n, *a_i, *_in_order_of(b_k, a_k))
    return ((g_j, b_j), (g_n, tuple(b_n))), axes, _inverse(axes)


def _others(ndim: int, *axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if not any(i in group for group in axes))


def _in_order_of(k: Sequence[int], axes: Sequence[int]) -> list[int]:
    """The axes, each paired with one of k, as a product delivers them: by ascending k."""
    return [axis for _, axis in sorted(zip(k, axes, strict=True))]


def _inverse(axes: Sequence[int]) -> list[int]:
    """The permutation that sorts axes."""
    return sorted(range(len(axes)), key=lambda i: axes[i])


# ------------------------------------------------------------------------- products in groups


def _ragged_dot_general(
    a_is_second, g, y, a, b, sizes, *, ragged_dot_dimension_numbers, group_offset=None, **params
):
    """Rows of `a` come in groups, and each group e has its own matrix (a mixture of experts).

    With the axes named as above, and the batch axes n left out:

        i in groups     y[i,j] = Σₖ a[i,k] b[e,k,j]        with the group e that i belongs to
                        ∂L/∂a[i,k] = Σⱼ g[i,j] b[e,k,j]    i in groups again
                        ∂L/∂b[e,k,j] = Σᵢ a[i,k] g[i,j]    over the i in e: sums in groups
        k in groups     y[e,i,j] = Σₖ a[i,k] b[k,j]        over the k in e: sums in groups
                        ∂L/∂a[i,k] = Σⱼ b[k,j] g[e,i,j]    with the group e that k belongs to
                        ∂L/∂b[k,j] = Σᵢ a[i,k] g[e,i,j]
        n in groups     as the plain product, batch by batch

    JAX itself differentiates the first kind only (so not twice).
    """
    if group_offset is not None:
        raise NotImplementedError("ragged_dot_general with group_offset has no gradient.")
    numbers = ragged_dot_dimension_numbers
    (a_k, b_k), (a_n, b_n) = numbers.dot_dimension_numbers
    (ragged,), b_e = numbers.lhs_ragged_dimensions, tuple(numbers.rhs_group_dimensions)
    a_i = _others(a.ndim, a_n, a_k)
    b_j = _others(b.ndim, b_n, b_k, b_e)
    k_in_groups = ragged in a_k
    places = iter(range(y.ndim))
    g_e = [next(places) for _ in range(int(k_in_groups))]
    g_n = [next(places) for _ in a_n]
    g_i = [next(places) for _ in a_i]
    g_j = [next(places) for _ in b_j]

    if a_is_second:
        target, lhs, rhs, contract, batch = b, a, g, (a_i, g_i), (a_n, g_n)
        ragged_axis, group_axes = ragged, g_e
        axes = [*b_e, *b_n, *_in_order_of(a_k, b_k), *b_j]
    elif k_in_groups:
        target, lhs, rhs, contract, batch = a, b, g, (b_j, g_j), (b_n, g_n)
        ragged_axis, group_axes = b_k[list(a_k).index(ragged)], g_e
        axes = [*a_n, *_in_order_of(b_k, a_k), *a_i]
    else:
        target, lhs, rhs, contract, batch = a, g, b, (g_j, b_j), (g_n, b_n)
        ragged_axis, group_axes = [*a_n, *a_i].index(ragged), b_e
        axes = [*a_n, *a_i, *_in_order_of(b_k, a_k)]

    gradient = lax.ragged_dot_general(
        lhs,
        rhs,
        sizes,
        lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(contract, batch),
            lhs_ragged_dimensions=[ragged_axis],
            rhs_group_dimensions=group_axes,
        ),
        **params | {"out_sharding": gradient_sharding(target, axes)},
    )
    return in_dtype_of(target, lax.transpose(gradient, _inverse(axes)))


# ------------------------------------------------------------------------------------- meshes


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
