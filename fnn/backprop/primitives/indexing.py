"""Reading and writing at indices that are known only at run time.

Reading (`gather`: `x[i]`, an embedding lookup) and adding (`scatter-add`: `x.at[i].add(u)`) are
each other's gradient. What is read from an entry several times gives it several gradients,
which add up; what is added to an entry gets that entry's gradient.

    y = x[i]              ∂L/∂x = zeros.at[i].add(g)
    y = x.at[i].add(u)    ∂L/∂x = g                         ∂L/∂u = g[i]
    y = x.at[i].set(u)    ∂L/∂x = g.at[i].set(0)            ∂L/∂u = g[i] where u was the last one
    y = x.at[i].max(u)    ∂L/∂x = g where x is the largest  ∂L/∂u = g[i] where u is the largest

An index out of bounds is treated alike in both directions (clipped, or dropped, by its mode).
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.lax import GatherDimensionNumbers, ScatterDimensionNumbers, select

from fnn.backprop.primitives.elementwise import in_dtype_of
from fnn.backprop.rules import ControlRule, LocalRule, each, joint
from fnn.eager import apply
from fnn.precision import wide_dtype

# ------------------------------------------------------------------------------ reading


def _gather(
    g,
    y,
    x,
    indices,
    *,
    dimension_numbers,
    unique_indices,
    indices_are_sorted,
    mode,
    **_,
):
    """∂L/∂x = zeros.at[i].add(g): every read entry gets the sum of its readers' gradients.

    Of 16-bit numbers the sum is made in float32: in bfloat16, a row of an embedding that is looked
    up 5,000 times would get the gradients of 256.
    """
    wide = wide_dtype(x.dtype)
    nothing = lax.full_like(x, 0) if wide == x.dtype else lax.full_like(x, 0, wide)
    numbers = ScatterDimensionNumbers(
        update_window_dims=dimension_numbers.offset_dims,
        inserted_window_dims=dimension_numbers.collapsed_slice_dims,
        scatter_dims_to_operand_dims=dimension_numbers.start_index_map,
        operand_batching_dims=dimension_numbers.operand_batching_dims,
        scatter_indices_batching_dims=dimension_numbers.start_indices_batching_dims,
    )
    gradient = lax.scatter_add(
        nothing,
        _in_32_bits(indices, x) if numbers.operand_batching_dims else indices,
        in_dtype_of(nothing, g),
        numbers,
        unique_indices=unique_indices,
        indices_are_sorted=indices_are_sorted,
        mode=mode,
    )
    return in_dtype_of(x, gradient)


def _in_32_bits(indices, x):
    """The same places of x, as int32.

    Of other integers XLA's partitioner ends the process, where a batch of such scatters isn't dealt
    out evenly over a mesh's devices (`jax.grad` of `x[:3]` looked up at int64 or uint8 labels).
    """
    limits, own = jnp.iinfo(jnp.int32), jnp.iinfo(indices.dtype)
    if indices.dtype == jnp.int32 or max(x.shape) > limits.max:
        return indices
    if own.max > limits.max:  # out of bounds is out of bounds still
        low, high = (jnp.asarray(n, own.dtype) for n in (max(own.min, limits.min), limits.max))
        indices = lax.clamp(low, indices, high)
    return lax.convert_element_type(indices, jnp.int32)


def _dynamic_slice(g, y, x, *starts, **_):
    """y = x[i : i + n]: zeros, with g written where y was read."""
    return lax.dynamic_update_slice(lax.full_like(x, 0), g, starts)


def _read_back(a, indices, updates, dimension_numbers, mode, fill_value=0, **_):
    """`a[indices]`: for each update, the entries of `a` that it was written to."""
    numbers = GatherDimensionNumbers(
        offset_dims=dimension_numbers.update_window_dims,
        collapsed_slice_dims=dimension_numbers.inserted_window_dims,
        start_index_map=dimension_numbers.scatter_dims_to_operand_dims,
        operand_batching_dims=dimension_numbers.operand_batching_dims,
        start_indices_batching_dims=dimension_numbers.scatter_indices_batching_dims,
    )
    windows = iter(dimension_numbers.update_window_dims)
    single = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    sizes = [1 if i in single else updates.shape[next(windows)] for i in range(a.ndim)]
    return lax.gather(a, indices, numbers, sizes, mode=mode, fill_value=fill_value)


# ------------------------------------------------------------------------------ writing


def _dynamic_update_slice(needed, g, y, x, update, *starts, **_):
    """y = x with u written at i: g with zeros there for x, g[i : i + n] for u."""
    nothing = [None] * len(starts)
    of_x = lax.dynamic_update_slice(g, lax.full_like(update, 0), starts) if needed[0] else None
    of_update = lax.dynamic_slice(g, starts, update.shape) if needed[1] else None
    return [of_x, of_update, *nothing]


def _scatter_add(g, y, x, indices, updates, **params):
    """∂L/∂u = g[i] of y = x.at[i].add(u)."""
    return _read_back(g, indices, updates, **params)


def _scatter_mul(needed, g, y, x, indices, updates, **params):
    """y = x.at[i].multiply(u): g.at[i].multiply(u) for x, (g · x)[i] for u."""
    of_x = of_updates = None
    if needed[0]:
        of_x = lax.scatter_mul(g, indices, updates, **_how_to_write(params))
    if needed[2]:
        if not params["unique_indices"]:
            raise NotImplementedError(
                "scatter-mul has a gradient with respect to its updates only where no two updates "
                "meet: pass unique_indices=True, as in x.at[i].multiply(u, unique_indices=True), "
                "if that is so."
            )
        of_updates = _read_back(lax.mul(g, x), indices, updates, **params)
    return of_x, None, of_updates


def _scatter_extremum(needed, g, y, x, indices, updates, **params):
    """y = x.at[i].max(u): g of an entry, shared equally by those of x and u that attain it."""
    how = _how_to_write(params)
    kept = lax.eq(x, y)
    attained = lax.eq(updates, _read_back(y, indices, updates, **params))
    wide = wide_dtype(g.dtype)  # in bfloat16, 256 + 1 is 256
    count = lax.scatter_add(
        lax.convert_element_type(kept, wide),
        indices,
        lax.convert_element_type(attained, wide),
        **how,
    )
    share = in_dtype_of(g, lax.div(lax.convert_element_type(g, wide), count))
    of_x = of_updates = None
    if needed[0]:
        of_x = select(kept, share, lax.full_like(g, 0))
    if needed[2]:
        there = _read_back(share, indices, updates, **params)
        of_updates = select(attained, there, lax.full_like(updates, 0))
    return of_x, None, of_updates


# Which update stays where several are written to the same entry is the machine's choice, and
# might fall out differently each time. So the forward pass of `scatter` numbers the updates,
# writes the numbers, reads back who won, and only then writes the winners' values.


def _scatter_forward(equation, needed, ins, opaque):
    """y = x.at[i].set(u), and which updates stayed."""
    x, indices, updates = ins
    params = equation.params
    if params["update_jaxpr"] is not None:
        raise NotImplementedError(
            "scatter with a function (jax.lax.scatter_apply) has no gradient, in JAX neither. "
            "Use x.at[i].set(f(x[i])) instead."
        )
    if params["unique_indices"] or not needed[2]:
        return apply(equation, ins), (indices, updates, None)
    windows = params["dimension_numbers"].update_window_dims
    shape = [1 if i in windows else n for i, n in enumerate(updates.shape)]
    numbers = lax.reshape(lax.iota(jnp.int32, functools.reduce(int.__mul__, shape, 1)), shape)
    numbers = lax.broadcast_in_dim(
        lax.add(numbers, jnp.int32(1)), updates.shape, range(updates.ndim)
    )
    how = _how_to_write(params)
    winners = lax.scatter(lax.full_like(x, 0, jnp.int32), indices, numbers, **how)
    won = lax.eq(numbers, _read_back(winners, indices, updates, **params))
    untouched = lax.eq(winners, jnp.int32(0))
    y = lax.scatter_add(
        select(untouched, x, lax.full_like(x, 0)),
        indices,
        select(won, updates, lax.full_like(updates, 0)),
        **how,
    )
    return [y], (indices, updates, won)


def _scatter_backward(equation, needed, saved, cotangents, opaque):
    """∂L/∂x = g.at[i].set(0), and ∂L/∂u = g[i] for the updates that stayed, 0 for the others."""
    indices, updates, won = saved
    (g,) = cotangents
    of_x = of_updates = None
    if needed[0]:
        zeros = lax.full_like(updates, 0)
        of_x = lax.scatter(g, indices, zeros, **_how_to_write(equation.params))
    if needed[2]:
        of_updates = _read_back(g, indices, updates, **equation.params)
        if won is not None:
            of_updates = select(won, of_updates, lax.full_like(of_updates, 0))
    return of_x, None, of_updates


def _how_to_write(params: dict) -> dict:
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    return {name: params[name] for name in names}


RULES: dict[str, LocalRule | ControlRule] = {
    "gather": each(_gather, None, local_gradient=("zeros.at[i].add(g)", "0")),
    "dynamic_slice": joint(
        lambda needed, g, y, x, *starts, **params: [
            _dynamic_slice(g, y, x, *starts, **params),
            *[None] * len(starts),
        ],
        local_gradient=("g in zeros",),
    ),
    "dynamic_update_slice": joint(_dynamic_update_slice, local_gradient=("g outside", "g inside")),
    "scatter": ControlRule(
        _scatter_forward,
        _scatter_backward,
        local_gradient=("1, and 0 where overwritten", "0", "g[i] where u was the last one"),
    ),
    "scatter-add": each(
        lambda g, *_, **__: g, None, _scatter_add, local_gradient=("1", "0", "g[i]")
    ),
    "scatter-sub": each(
        lambda g, *_, **__: g,
        None,
        lambda *a, **params: lax.neg(_scatter_add(*a, **params)),
        local_gradient=("1", "0", "−g[i]"),
    ),
    "scatter-mul": joint(_scatter_mul, local_gradient=("u", "0", "x[i]")),
    "scatter-max": joint(_scatter_extremum, local_gradient=("x is largest", "0", "u is largest")),
    "scatter-min": joint(_scatter_extremum, local_gradient=("x is smallest", "0", "u is smallest")),
}
