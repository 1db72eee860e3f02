"""Sums of outer products, as the matrix products that they are.

The gradient of a weight is, for one example, an outer product: `g[:, None] * x`. Summed
over a batch it is a matrix product, Σₙ dyₙ xₙᵀ = dYᵀ X. Compilers don't see that in general:
written as a product with a sum after it, it may take two hundred times as long (measured on a
CPU under two `vmap`s). So where fnn itself sums an operation's gradients over a batch, it looks
for these patterns and puts a `dot_general` in their place:

    reduce_sum(broadcast(a) * broadcast(b))  where a and b share summed axes and each has axes
                                             of its own
    reduce_sum(dot_general(a, b))            where axes are summed over which the products are
                                             stacked: they are contracted with the others
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from fnn.jaxpr import Equation, Program, program
from fnn.meshes import sharding_of


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
        outs = _run(program(closed, inline=False), jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(out), outs)

    return rewritten


def _run(flat: Program, args: Sequence) -> list:
    maker = {i: equation for equation in flat.equations for i in equation.outs}
    products: dict[tuple[int, ...], _Product | _Contraction] = {}
    for equation in flat.equations:
        product: _Product | _Contraction | None = _sum_of_outer_products(equation, maker, flat)
        if product is None:
            product = _sum_of_products(equation, maker, flat)
        if product is not None:
            products[equation.outs] = product
    # Each such sum is made from the two factors: its large operand may not be needed any more.
    flat.equations = [
        dataclasses.replace(e, ins=products[e.outs].factors) if e.outs in products else e
        for e in flat.equations
    ]
    needed, _ = flat.needed_for(flat.outputs, effects=True)
    values = flat.values(args)
    for equation in needed:
        run = products.get(equation.outs, equation.bind)
        outs = run([values[i] for i in equation.ins])
        for i, out in zip(equation.outs, outs, strict=True):
            values[i] = out
    return [values[i] for i in flat.outputs]


class _Product(NamedTuple):
    """A sum of outer products as `dot_general`, and then its axes put in order."""

    factors: tuple[int, int]
    contract: tuple[list[int], list[int]]
    batch: tuple[list[int], list[int]]
    shapes: tuple[list[int], list[int]]
    order: list[int]
    shape: tuple[int, ...]
    dtype: Any

    def __call__(self, factors: Sequence) -> list:
        a, b = (lax.reshape(x, s) for x, s in zip(factors, self.shapes, strict=True))
        numbers = self.contract, self.batch
        y = lax.dot_general(a, b, numbers, preferred_element_type=self.dtype)
        return [lax.reshape(lax.transpose(y, self.order), self.shape)]


class _Contraction(NamedTuple):
    """A sum of matrix products as one, in the wider of their type and the sum's."""

    factors: tuple[int, int]
    params: dict
    dtype: Any

    def __call__(self, factors: Sequence) -> list:
        return [lax.dot_general(*factors, **self.params).astype(self.dtype)]


def _sum_of_products(equation: Equation, maker: dict, flat: Program) -> _Contraction | None:
    """The equation as a matrix product, if it sums matrix products over the axes of their stack."""
    if equation.name != "reduce_sum" or equation.params.get("out_sharding") is not None:
        return None
    dot = _made_by(equation.ins[0], maker)
    if dot is None or dot.name != "dot_general" or dot.params.get("out_sharding") is not None:
        return None
    avals = [flat.avals[i] for i in (*dot.ins, *dot.outs)]
    if any(sharding_of(aval) is not None for aval in avals):
        return None
    contract, batch = dot.params["dimension_numbers"]
    summed = equation.params["axes"]
    if not summed or any(d >= len(batch[0]) for d in summed):
        return None
    more = [[axes[d] for d in summed] for axes in batch]
    left = [[a for d, a in enumerate(axes) if d not in summed] for axes in batch]
    numbers = tuple([*c, *m] for c, m in zip(contract, more, strict=True)), tuple(left)
    params = dot.params | {"dimension_numbers": numbers}
    dtype, total = (flat.avals[e.outs[0]].dtype for e in (dot, equation))
    if all(jax.numpy.issubdtype(d, jax.numpy.floating) for d in (dtype, total)):
        # float16 products may be summed in float32.
        dtype = max(dtype, total, key=lambda d: jax.numpy.finfo(d).bits)
    params["preferred_element_type"] = dtype
    return _Contraction((dot.ins[0], dot.ins[1]), params, total)


def _made_by(value: int, maker: dict[int, Equation]) -> Equation | None:
    """The equation that made a value, before it was converted to another dtype."""
    made = maker.get(value)
    if made is None or made.name != "convert_element_type":
        return made
    return maker.get(made.ins[0])


def _sum_of_outer_products(equation: Equation, maker: dict, flat: Program) -> _Product | None:
    """The equation as a matrix product, if it is such a sum.

    maker: the equation that made each value.
    """
    if equation.name != "reduce_sum" or equation.params.get("out_sharding") is not None:
        return None
    total = flat.avals[equation.outs[0]].dtype
    mul = _made_by(equation.ins[0], maker)  # it may be summed more precisely
    if mul is None or mul.name != "mul":
        return None
    out = flat.avals[mul.outs[0]]
    if not all(jax.numpy.issubdtype(d, jax.numpy.inexact) for d in (out.dtype, total)):
        return None
    a, b = (_unbroadcast(i, out.shape, maker, flat) for i in mul.ins)
    if a is None or b is None:
        return None
    factors = a, b
    avals = [flat.avals[f.value] for f in factors]
    if any(aval.dtype != out.dtype or sharding_of(aval) is not None for aval in avals):
        return None
    summed, axes = set(equation.params["axes"]), range(out.ndim)
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
        (a.value, b.value),
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

    value: int
    axes: list[int]


def _unbroadcast(value: int, shape: Sequence[int], maker: dict, flat: Program) -> _Factor | None:
    """Follow broadcasts and reshapes that only add axes back to the array they started from."""
    # For each axis of the product, the axis of the current array that it is, if it is any.
    size = flat.avals[value].shape
    if len(size) != len(shape):
        return None
    axis = {d: d for d in range(len(shape)) if size[d] == shape[d] and shape[d] != 1}
    while (equation := maker.get(value)) is not None and equation.ins:
        source, name = equation.ins[0], equation.name
        before, after = flat.avals[source].shape, flat.avals[equation.outs[0]].shape
        if name == "broadcast_in_dim" and len(equation.ins) == 1:
            where = {int(d): k for k, d in enumerate(equation.params["broadcast_dimensions"])}
            same = {d: k for d, k in where.items() if before[k] == after[d]}
        elif name in _RESHAPES and _without_ones(before) == _without_ones(after):
            places = [k for k, n in enumerate(before) if n != 1]
            same = dict(zip([d for d, n in enumerate(after) if n != 1], places, strict=True))
        elif name == "reduce_sum" and not equation.params["axes"]:
            same = {d: d for d in range(len(before))}
        else:
            break
        axis = {d: same[c] for d, c in axis.items() if c in same}
        value = source
    size = flat.avals[value].shape
    order = sorted(axis, key=lambda d: axis[d])
    if [axis[d] for d in order] != [k for k, n in enumerate(size) if n != 1]:
        return None
    return _Factor(value, order)


_RESHAPES = ("reshape", "squeeze", "expand_dims")


def _without_ones(shape) -> list[int]:
    return [n for n in shape if n != 1]
