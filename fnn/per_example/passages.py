"""Among parameters alone: a term of what is made from a parameter as a term of the parameter.

The gradient of W, given that of W.T, is the same product with its axes exchanged. A table of
rules, one for each primitive through which a term keeps its factors:

    passes(k, term, ins, equation, flat) -> Term of argument k, or None where it loses its factors

ins are the arguments of the equation, which is one of the program `flat`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy
from jax import lax

from fnn.jaxpr import is_inexact
from fnn.per_example.inner_products import dot
from fnn.per_example.layout import Layout, Pad, Reshape, Reverse, Transpose, View
from fnn.per_example.terms import Dense, Factored, Product, Term
from fnn.precision import wide, wide_dtype, widest

# Below, w is what is made, and v the argument k that it is made from.


def _viewed(term: Factored, view: View) -> Factored:
    """The term, its entries rearranged once more on the way to the parameter."""
    return dataclasses.replace(term, layout=term.layout.viewed(view))


def _pass_transpose(k, term, ins, equation, flat):
    return _viewed(term, Transpose(tuple(numpy.argsort(equation.params["permutation"]).tolist())))


def _pass_reshape(k, term, ins, equation, flat):
    return _viewed(term, Reshape(tuple(ins[0].shape)))


def _pass_slice(k, term, ins, equation, flat):
    """w = v[start:stop:step]: zeros where v's entries were left out."""
    p = equation.params
    steps = p["strides"] or (1,) * ins[0].ndim
    out = flat.avals[equation.outs[0]].shape
    pads = [
        (low, full - (low + (n - 1) * step + 1) if n else full - low, step - 1)
        for full, low, n, step in zip(ins[0].shape, p["start_indices"], out, steps, strict=True)
    ]
    return _viewed(term, Pad(tuple(pads)))


def _pass_rev(k, term, ins, equation, flat):
    return _viewed(term, Reverse(tuple(equation.params["dimensions"])))


def _pass_same(k, term, ins, equation, flat):
    return term


def _pass_cast(k, term, ins, equation, flat):
    """w = v in another dtype; Re(Gᵀ A) of a real v in a complex w."""
    if not is_inexact(flat.avals[equation.ins[0]]):
        return None
    was_complex, is_complex = (
        jnp.issubdtype(flat.avals[i].dtype, jnp.complexfloating)
        for i in (equation.ins[0], equation.outs[0])
    )
    return term if was_complex == is_complex else term.real_part()


def _pass_neg(k, term, ins, equation, flat):
    return dataclasses.replace(term, g=-term.g)


def _pass_sub(k, term, ins, equation, flat):
    """w = v − u: the same for v, with −G for u, unless one is broadcast."""
    if ins[0].shape != ins[1].shape:
        return None
    return term if k == 0 else _pass_neg(k, term, ins, equation, flat)


def _pass_add(k, term, ins, equation, flat):
    """w = v + u: the same for both, unless one is broadcast."""
    return term if ins[0].shape == ins[1].shape else None


def _pass_mul(k, term, ins, equation, flat):
    """w = c v, with one number c: (c G)ᵀ A for v, ⟨Gᵀ A, v⟩ for c."""
    if _is_scalar(k, ins):
        return _along_one_number(term, ins[1 - k], ins[k])
    if ins[k].shape != flat.avals[equation.outs[0]].shape:
        return None
    c = _one_number(equation.ins[1 - k], ins[1 - k], flat)
    return None if c is None else _scaled(term, c)


def _pass_div(k, term, ins, equation, flat):
    """w = v / c, with one number c: (G / c)ᵀ A for v, −⟨Gᵀ A, w⟩ / c for c."""
    if _is_scalar(k, ins) and k == 1:
        c = ins[1]
        return _along_one_number(_scaled(term, -1 / wide(c)), ins[0] / c, c)
    if k == 1 or ins[0].shape != flat.avals[equation.outs[0]].shape:
        return None
    c = _one_number(equation.ins[1], ins[1], flat)
    return None if c is None else _scaled(term, 1 / wide(c))


def _is_scalar(k: int, ins) -> bool:
    """Is argument k one number that multiplies all entries of the other?"""
    return jnp.shape(ins[k]) == () != jnp.shape(ins[1 - k])


def _along_one_number(term: Factored, v, c) -> Dense | None:
    """⟨Gᵀ A, v⟩, the gradient of the number that v is multiplied by."""
    if jnp.iscomplexobj(v) or jnp.iscomplexobj(c):
        return None
    why = "it is, or makes, a number by which an array is multiplied"
    return Dense(dot([term], v.astype(wide_dtype(term.g.dtype))).astype(c.dtype), why)


def _scaled(term, c):
    """(c G)ᵀ A, in c's dtype if that is wider: in G's, float16 perhaps, c may be inf or 0."""
    dtype = widest(term.g.dtype, c.dtype)
    return dataclasses.replace(term, g=term.g.astype(dtype) * c.astype(dtype))


def _one_number(i: int, value, flat):
    """The one number that an array consists of, if it can be seen that it does."""
    if math.prod(jnp.shape(value)) == 1:
        return jnp.asarray(value).reshape(())
    for equation in flat.equations:
        made = i in equation.outs and equation.name == "broadcast_in_dim"
        if made and math.prod(flat.avals[equation.ins[0]].shape) == 1:
            return jnp.asarray(value)[(0,) * jnp.ndim(value)]
    return None


def _pass_broadcast(k, term, ins, equation, flat):
    """A weight repeated along new axes: its gradient is summed over them, as positions are."""
    if not isinstance(term, Product) or len(equation.ins) != 1 or term.layout.stack:
        return None
    shape, where = equation.params["shape"], equation.params["broadcast_dimensions"]
    new = [d for d in range(len(shape)) if d not in where]
    if any(ins[0].shape[j] != shape[d] for j, d in enumerate(where)) or (new and term.layout.views):
        return None
    for axis in sorted(new, reverse=True):
        term = _along(term, axis, lambda x, d: jnp.sum(x, axis=d), term.layout.without(axis))
    return term


def _pass_product(k, term, ins, equation, flat):
    """w = p q, a product of two weights: ∂L/∂p = Gᵀ A qᵀ = Gᵀ (A qᵀ), and the like for q."""
    if not isinstance(term, Product) or term.layout.views or term.layout.stack:
        return None
    (contract, batch) = equation.params["dimension_numbers"]
    p, q = ins
    if batch[0] or p.ndim != 2 or q.ndim != 2 or len(contract[0]) != 1:
        return None
    if [len(term.layout.out), len(term.layout.ins)] != [1, 1]:
        return None
    # Axis 0 of w came from p, axis 1 from q.
    other = ins[1 - k]
    name, array, _ = _factor(term, 1 - k)  # the factor that runs along the other's axis
    x = getattr(term, array)
    dtype = widest(x.dtype, other.dtype)  # w may have been cast to a narrower one
    other_kept = 1 - contract[1 - k][0]
    contracted = ((x.ndim - 1,), (other_kept,)), ((), ())
    x = lax.dot_general(x.astype(dtype), other.astype(dtype), contracted)
    inner = other.shape[contract[1 - k][0]]
    layout = dataclasses.replace(term.layout, **{name: (inner,)})
    # The parameter's axes: its own kept one, and the contracted one in place of the other's.
    own_kept = 1 - contract[k][0]
    mine = layout.order[k]
    theirs = layout.order[1 - k]
    order = [0, 0]
    order[own_kept], order[1 - own_kept] = mine, theirs
    layout = dataclasses.replace(layout, order=tuple(order))
    return dataclasses.replace(term, **{array: x}, layout=layout)


def _pass_concatenate(k, term, ins, equation, flat):
    """Weights put side by side: each gets its part of the one factor that runs that way."""
    axis = equation.params["dimension"]
    if not isinstance(term, Product):
        return None
    owner = term.layout.owner(axis)
    if owner is None or owner[0] == "stack":
        return None
    start = sum(x.shape[axis] for x in ins[:k])
    size = ins[k].shape[axis]
    part = lambda x, d: lax.slice_in_dim(x, start, start + size, axis=d)
    return _along(term, axis, part, term.layout.resized(axis, size))


def _along(term: Product, axis: int, change: Callable, layout: Layout) -> Product:
    """The term with a change to the factor that runs along an axis of the parameter.

    change: of the factor, its axes laid out one by one, and of the number of the axis in it.
    layout: the layout after it.
    """
    name, array, i = _factor(term, axis)
    x = getattr(term, array)
    *lead, _ = x.shape
    x = change(x.reshape(*lead, *getattr(term.layout, name)), len(lead) + i)
    x = x.reshape(*lead, math.prod(getattr(layout, name)))
    return dataclasses.replace(term, **{array: x}, layout=layout)


def _factor(term: Product, axis: int) -> tuple[str, str, int]:
    """Which factor runs along an axis: ("out", "g", 0) for g's first, or ("ins", "a", …)."""
    owner = term.layout.owner(axis)
    assert owner is not None
    name, i = owner
    return name, {"out": "g", "ins": "a"}[name], i


PASSAGES: dict[str, Callable[..., Term | None]] = {
    # w is a rearrangement of v: the same factors, and the entries put back.
    "transpose": _pass_transpose,
    "reshape": _pass_reshape,
    "squeeze": _pass_reshape,
    "expand_dims": _pass_reshape,
    "slice": _pass_slice,
    "rev": _pass_rev,
    # w = v, in another dtype perhaps.
    "copy": _pass_same,
    "copy_p": _pass_same,
    "reduce_precision": _pass_same,
    "convert_element_type": _pass_cast,
    # w = −v, v + u, v − u, c v, v / c: the same product, with G times −1, 1, ∓1, c, 1 / c.
    "neg": _pass_neg,
    "add": _pass_add,
    "add_any": _pass_add,
    "sub": _pass_sub,
    "mul": _pass_mul,
    "div": _pass_div,
    # w is v repeated, v next to u, or a product v u: one of the factors changes.
    "broadcast_in_dim": _pass_broadcast,
    "concatenate": _pass_concatenate,
    "dot_general": _pass_product,
}
