"""Sums of outer products, as the matrix products that they are.

The gradient of a weight is, for one example, an outer product: `dy[:, None] * x`. Summed
over a batch it is a matrix product, Σₙ dyₙ xₙᵀ = dYᵀ X. Compilers don't see that in general:
written as a product with a sum after it, it may take two hundred times as long (measured on a
CPU under two `vmap`s). So where fnn itself sums an operation's gradients over a batch, it looks
for this pattern and puts a `dot_general` in its place:

    reduce_sum(broadcast(a) * broadcast(b))  where a and b share summed axes and each has axes
                                             of its own
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax


def with_matrix_products(function: Callable) -> Callable:
    """The function, with the sums of outer products in it done as matrix products.

    >>> def summed(x, y):
    ...     return jax.numpy.sum(x[:, :, None] * y[:, None, :], axis=0)
    >>> x, y = jax.numpy.ones((5, 2)), jax.numpy.ones((5, 3))
    >>> [e.primitive.name for e in jax.make_jaxpr(with_matrix_products(summed))(x, y).eqns]
    ['dot_general']
    """

    def rewritten(*args):
        closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(out), _run(closed, jax.tree.leaves(args)))

    return rewritten


def _run(closed, args: Sequence) -> list:
    jaxpr = closed.jaxpr
    maker = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    products = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "reduce_sum":
            product = _sum_of_outer_products(eqn, maker)
            if product is not None:
                products[eqn.outvars[0]] = product
    # What only such a sum needed, its large operand above all, isn't computed.
    needed, chosen = set(_variables(jaxpr.outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            chosen.append(eqn)
            product = products.get(eqn.outvars[0]) if eqn.outvars else None
            needed.update(_variables(eqn.invars if product is None else (product.a, product.b)))
    values = dict(zip(jaxpr.invars, args, strict=True))
    values.update(zip(jaxpr.constvars, closed.consts, strict=True))
    read = lambda v: v.val if hasattr(v, "val") else values[v]
    for eqn in reversed(chosen):
        product = products.get(eqn.outvars[0]) if eqn.outvars else None
        if product is not None:
            values[eqn.outvars[0]] = product(read(product.a), read(product.b))
            continue
        with eqn.ctx.manager:
            params = eqn.primitive.get_bind_params(eqn.params)
            outs = eqn.primitive.bind(*map(read, eqn.invars), **params)
        values.update(
            zip(eqn.outvars, outs if eqn.primitive.multiple_results else [outs], strict=True)
        )
    return [read(v) for v in jaxpr.outvars]


def _variables(atoms) -> list:
    return [v for v in atoms if not hasattr(v, "val")]


class _Product(NamedTuple):
    """A sum of outer products as `dot_general`, and then its axes put in order."""

    a: Any
    b: Any
    contract: tuple[list[int], list[int]]
    batch: tuple[list[int], list[int]]
    shapes: tuple[list[int], list[int]]
    order: list[int]
    shape: tuple[int, ...]
    dtype: Any

    def __call__(self, a, b):
        a, b = (lax.reshape(x, s) for x, s in zip((a, b), self.shapes, strict=True))
        numbers = self.contract, self.batch
        y = lax.dot_general(a, b, numbers, preferred_element_type=self.dtype)
        return lax.reshape(lax.transpose(y, self.order), self.shape)


def _sum_of_outer_products(eqn, maker) -> _Product | None:
    """The sum as a matrix product, if it is one."""
    total = eqn.outvars[0].aval.dtype
    mul = maker.get(eqn.invars[0])
    if mul is not None and mul.primitive.name == "convert_element_type":  # summed more precisely
        mul = maker.get(mul.invars[0])
    if mul is None or mul.primitive.name != "mul" or eqn.params.get("out_sharding") is not None:
        return None
    out = mul.outvars[0].aval
    if not all(jax.numpy.issubdtype(d, jax.numpy.inexact) for d in (out.dtype, total)):
        return None
    a, b = (_unbroadcast(v, out.shape, maker) for v in mul.invars)
    if a is None or b is None:
        return None
    factors = a, b
    if any(f.variable.aval.dtype != out.dtype for f in factors):
        return None
    if any(not f.variable.aval.sharding.mesh.empty for f in factors):
        return None
    summed, axes = set(eqn.params["axes"]), range(out.ndim)
    both = [d for d in axes if d in a.axes and d in b.axes]
    contract = [d for d in both if d in summed]
    batch = [d for d in both if d not in summed]
    own = [[d for d in f.axes if d not in both] for f in factors]
    # A sum over an axis of one factor alone would want summing first; and with no axes of its
    # own, a factor is a vector of weights, and the whole no outer product.
    if not contract or not all(own) or any(d in summed for d in (*own[0], *own[1])):
        return None
    place_a, place_b = ({d: i for i, d in enumerate(f.axes)} for f in factors)
    found = [*batch, *own[0], *own[1]]
    kept = [d for d in axes if d not in summed]
    if any(d not in found and out.shape[d] != 1 for d in kept):
        return None
    return _Product(
        a.variable,
        b.variable,
        ([place_a[d] for d in contract], [place_b[d] for d in contract]),
        ([place_a[d] for d in batch], [place_b[d] for d in batch]),
        ([out.shape[d] for d in a.axes], [out.shape[d] for d in b.axes]),
        [found.index(d) for d in kept if d in found],
        tuple(out.shape[d] for d in kept),
        total,
    )


class _Factor(NamedTuple):
    """An array before it was broadcast: which axis of the product each of its own became.

    Axes of size 1 aren't counted.
    """

    variable: Any
    axes: list[int]


def _unbroadcast(variable, shape, maker) -> _Factor | None:
    """Follow broadcasts and reshapes that only add axes back to the array they started from."""
    if hasattr(variable, "val"):
        return None
    # For each axis of the product, the axis of the current array that it is, if it is any.
    size = variable.aval.shape
    if len(size) != len(shape):
        return None
    axis = {d: d for d in range(len(shape)) if size[d] == shape[d] and shape[d] != 1}
    while (eqn := maker.get(variable)) is not None:
        source = eqn.invars[0] if eqn.invars else None
        if source is None or hasattr(source, "val"):
            break
        name, before, after = eqn.primitive.name, source.aval.shape, eqn.outvars[0].aval.shape
        if name == "broadcast_in_dim" and len(eqn.invars) == 1:
            where = {int(d): k for k, d in enumerate(eqn.params["broadcast_dimensions"])}
            same = {d: k for d, k in where.items() if before[k] == after[d]}
        elif name in ("reshape", "squeeze", "expand_dims") and _without_ones(
            before
        ) == _without_ones(after):
            places = [k for k, n in enumerate(before) if n != 1]
            same = dict(zip([d for d, n in enumerate(after) if n != 1], places, strict=True))
        elif name == "reduce_sum" and not eqn.params["axes"]:
            same = {d: d for d in range(len(before))}
        else:
            break
        axis = {d: same[c] for d, c in axis.items() if c in same}
        variable = source
    size = variable.aval.shape
    order = sorted(axis, key=lambda d: axis[d])
    if [axis[d] for d in order] != [k for k, n in enumerate(size) if n != 1]:
        return None
    return _Factor(variable, order)


def _without_ones(shape) -> list[int]:
    return [n for n in shape if n != 1]
