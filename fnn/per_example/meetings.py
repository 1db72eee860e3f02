"""Where a parameter meets the example: the term that its gradient is, with its factors.

A table of rules, one for each primitive in which the gradient has factors:

    meet(k, g, ins, params) -> term, or None where it has no factors after all

Of products and look-ups among parameters alone they make factors of a dense gradient, too.

k is the number of the argument that is the parameter, g the upstream gradient (of several results
a list, with None for zero), ins the arguments, params the equation's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fnn.operation import Call
from fnn.per_example.layout import Layout
from fnn.per_example.terms import Convolution, Factored, Product, Rows
from fnn.precision import signed


def _matrix_product(k, g, ins, params) -> Factored | None:
    """∂L/∂w of y = x·w is gᵀx: keep x and g, as (stack, positions, in) and (…, out)."""
    (contract, batch) = params["dimension_numbers"]
    w, x = ins[k], ins[1 - k]
    w_contract, x_contract = contract[k], contract[1 - k]
    w_batch, x_batch = batch[k], batch[1 - k]
    w_kept = [d for d in range(w.ndim) if d not in w_contract and d not in w_batch]
    x_kept = [d for d in range(x.ndim) if d not in x_contract and d not in x_batch]
    # The axes of y, and of g: the batch, what is kept of the first argument, and of the second.
    y_batch = list(range(len(w_batch)))
    first, second = (w_kept, x_kept) if k == 0 else (x_kept, w_kept)
    y_first = [len(y_batch) + d for d in range(len(first))]
    y_second = [len(y_batch) + len(first) + d for d in range(len(second))]
    y_w, y_x = (y_first, y_second) if k == 0 else (y_second, y_first)
    size = lambda array, axes: tuple(array.shape[d] for d in axes)
    stack, positions = math.prod(size(x, x_batch)), math.prod(size(x, x_kept))
    a = lax.transpose(x, (*x_batch, *x_kept, *x_contract))
    a = lax.reshape(a, (stack, positions, math.prod(size(x, x_contract))))
    g = lax.transpose(g, (*y_batch, *y_x, *y_w))
    g = lax.reshape(g, (stack, positions, math.prod(size(w, w_kept))))
    axes = [*w_batch, *w_kept, *w_contract]
    order = tuple(axes.index(d) for d in range(w.ndim))
    term = Product(a, g, Layout(size(w, w_batch), size(w, w_kept), size(w, w_contract), order))
    is_complex = jnp.iscomplexobj(a) or jnp.iscomplexobj(g)
    return term.real_part() if is_complex and not jnp.iscomplexobj(w) else term


def _convolution(k, g, ins, params) -> Factored | None:
    """∂L/∂w of y = x ∗ w is x convolved with g: keep both."""
    x, w = ins
    if k == 0 or params["batch_group_count"] != 1 or g.size == 0:
        return None
    return Convolution.of(x, g, w.shape, params)


def _gather(k, g, ins, params) -> Factored | None:
    """Whole rows looked up along one axis: an embedding."""
    table, index = ins
    numbers = params["dimension_numbers"]
    sizes = params["slice_sizes"]
    if k != 0 or numbers.operand_batching_dims or len(numbers.start_index_map) != 1:
        return None
    (axis,) = numbers.start_index_map
    whole = all(
        s == n for d, (s, n) in enumerate(zip(sizes, table.shape, strict=True)) if d != axis
    )
    if tuple(numbers.collapsed_slice_dims) != (axis,) or sizes[axis] != 1 or not whole:
        return None
    # The result's axes: the row's at offset_dims, the index's elsewhere.
    row = numbers.offset_dims
    positions = [d for d in range(g.ndim) if d not in row]
    g = lax.transpose(g, (*positions, *row))
    index = lax.reshape(index[..., 0], (math.prod(index.shape[:-1]),))
    mode = str(params["mode"])
    if "CLIP" in mode:
        index = _clamped(index, table.shape[axis])
    return _rows(table, axis, index, g)


def _dynamic_slice(k, g, ins, params) -> Factored | None:
    """Rows one after another, from a place that the example says."""
    table, *starts = ins
    axis = _cut_axis(g, table)
    if k != 0 or axis is None:
        return None
    rows = g.shape[axis]
    start = signed(_clamped(starts[axis], table.shape[axis] - rows + 1))
    return _rows(table, axis, start + jnp.arange(rows, dtype=start.dtype), jnp.moveaxis(g, axis, 0))


def _slice(k, g, ins, params) -> Factored | None:
    """Rows from known places: P[:n]."""
    (table,) = ins
    axis = _cut_axis(g, table)
    if axis is None:
        return None
    step = (params["strides"] or (1,) * table.ndim)[axis]
    index = jnp.arange(params["start_indices"][axis], params["limit_indices"][axis], step)
    return _rows(table, axis, index, jnp.moveaxis(g, axis, 0))


def _cut_axis(part, table) -> int | None:
    """The one axis along which a part is smaller than the table; None if there are others."""
    axes = [d for d, (s, n) in enumerate(zip(part.shape, table.shape, strict=True)) if s != n]
    return axes[0] if len(axes) == 1 else None


def _clamped(index, size: int):
    """The index, moved to the nearest row that there is. Its dtype may not reach to the last."""
    last = min(size - 1, jnp.iinfo(index.dtype).max)
    return lax.clamp(jnp.zeros((), index.dtype), index, jnp.asarray(last, index.dtype))


def _rows(table, axis: int, index, g) -> Rows:
    size = table.shape[axis]
    rest = tuple(n for d, n in enumerate(table.shape) if d != axis)
    order = list(range(1, table.ndim))
    order.insert(axis, 0)
    index = signed(index)
    index = jnp.where((index < 0) | (index >= size), size, index)  # out of bounds: dropped
    index = index.astype(jnp.int32)
    g = lax.reshape(g, (1, index.shape[0], math.prod(rest)))
    return Rows(index, g, Layout((), (size,), rest, tuple(order)))


def _linear_cross_entropy(k, g, ins, params) -> Factored | None:
    """∂L/∂W of a last layer and its loss in one is Gᵀh, with G the gradient by the logits.

    G is what a bias would get that each position had for itself.
    """
    call = params["call"]
    if k != 1 or not isinstance(call, Call):
        return None
    h, W, labels, *bias = ins
    classes, features = W.shape
    static = dict(call.static) | {"block": classes}

    def at_position(h, label, g_loss, g_log_sum):
        def loss(bias):
            y, m, r = call.rule.definition(h, W, label, {"bias": bias}, **static)
            return y, m + r

        ys, pull = jax.vjp(loss, *(bias or [jnp.zeros(classes, W.dtype)]))
        return pull(tuple(d.astype(y.dtype) for d, y in zip((g_loss, g_log_sum), ys, strict=True)))

    positions = math.prod(labels.shape)
    g_loss, _, g_log_sum = (jnp.zeros(labels.shape) if x is None else x for x in g)
    flat = [lax.reshape(x, (positions,)) for x in (labels, g_loss, g_log_sum)]
    h = lax.reshape(h, (positions, features))
    (G,) = jax.vmap(at_position)(h, *flat)
    return Product(h[None], G[None], Layout((), (classes,), (features,), (0, 1)))


MEETINGS: dict[str, Callable[..., Factored | None]] = {
    "dot_general": _matrix_product,  # gᵀ x
    "conv_general_dilated": _convolution,  # x convolved with g
    "gather": _gather,  # g added to the rows that were looked up
    "dynamic_slice": _dynamic_slice,  # g added to some rows
    "slice": _slice,  # the same
    "linear_cross_entropy": _linear_cross_entropy,  # Gᵀ h, G by the logits
}
