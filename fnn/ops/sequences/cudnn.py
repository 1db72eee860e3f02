"""Attention on NVIDIA GPUs by cuDNN's kernels, through `jax.nn.dot_product_attention`.

What they take is rounded to 16 bits, and has neither mask nor bias nor positions. They have no
forward mode and no second derivative: those are of the formula, block by block. So value and
gradient are operations here, computed by cuDNN and differentiated by the formula.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning

from fnn.operation import compiled_rule as rule
from fnn.ops.sequences.blockwise import blockwise_attention

_NARROW = ("bfloat16", "float16")
_MOST_FEATURES = 128


def is_for_cudnn(q, k, v, given: dict, causal: bool, window: int | None) -> bool:
    """Whether there is a GPU, and cuDNN computes this."""
    queries, _, features = q.shape
    keys = k.shape[0]
    return (
        _has_gpu()
        and q.dtype.name in _NARROW
        and not given
        and features == v.shape[-1]
        and features % 8 == 0
        and 0 < features <= _MOST_FEATURES
        and min(queries, keys, k.shape[1]) > 1
        # Which keys of a longer or shorter list are causal ones, libraries see differently.
        and (queries == keys or not causal)
        and (window is None or (causal and queries == keys))
    )


def _has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _by_cudnn(q, k, v, *, causal: bool, window: int | None, scale: float, block: int) -> jax.Array:
    return jax.nn.dot_product_attention(
        *(q, k, v),
        scale=scale,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def _by_formula(q, k, v, **static) -> jax.Array:
    return blockwise_attention(q, k, v, {}, **static)[0]


def attention_by_cudnn(q, k, v, **static) -> jax.Array:
    """`cudnn_attention`, in a program that says what it holds."""
    return cudnn_attention(_with_devices(q), k, v, **static)


@rule
def cudnn_attention(q, k, v, *, causal, window, scale, block):
    """softmax(scale · q kᵀ) v for each head; on other platforms by the formula.

    Kept: q, k and v. The gradient runs cuDNN's forward kernel once more.
    """
    static = {"causal": causal, "window": window, "scale": scale, "block": block}
    return _by_platform(lambda function: functools.partial(function, **static), q, k, v)


@cudnn_attention.backward
def _(residuals, g, **static):
    q, k, v = residuals
    return cudnn_gradients(_with_devices(q), k, v, g, **static)


@cudnn_attention.tangent
def _(residuals, dq, dk, dv, **static):
    return _tangent(functools.partial(_by_formula, **static), residuals, (dq, dk, dv))


@rule
def cudnn_gradients(q, k, v, g, *, causal, window, scale, block):
    """(∂q, ∂k, ∂v) for the upstream gradient g."""
    static = {"causal": causal, "window": window, "scale": scale, "block": block}
    return _by_platform(lambda function: _gradients_of(function, static), q, k, v, g)


@cudnn_gradients.backward
def _(residuals, g, **static):
    """They are Jᵀ g with attention's Jacobian J: the gradient of g is J times these'."""
    *arrays, of_attention = residuals
    of_arrays = lambda q, k, v: _gradients_of(_by_formula, static)(q, k, v, of_attention)
    d_g = _tangent(functools.partial(_by_formula, **static), arrays, g)
    return *jax.vjp(of_arrays, *arrays)[1](g), d_g


@custom_partitioning
def _zero():
    return jnp.zeros((), jnp.float32)


_zero.def_partition(
    partition=lambda mesh, args, result: (mesh, lambda: jnp.zeros((), jnp.float32), result, ()),
    infer_sharding_from_operands=lambda mesh, args, result: result.sharding,
    sharding_rule="-> ",
)


def _with_devices(x) -> jax.Array:
    """x, beside something of a custom partitioning.

    JAX tells the lowering of cuDNN's kernels, which are partitioned so, its devices if it sees in
    a program that there are such; it doesn't look into operations.
    """
    return x + lax.stop_gradient(_zero()).astype(x.dtype) if _has_gpu() else x


def _by_platform(of: Callable, *args) -> Any:
    if not _has_gpu():  # without one, JAX refuses to trace cuDNN's kernel
        return of(_by_formula)(*args)
    return lax.platform_dependent(*args, cuda=of(_by_cudnn), default=of(_by_formula))


def _gradients_of(function: Callable, static: dict) -> Callable:
    of_arrays = functools.partial(function, **static)
    return lambda q, k, v, g: jax.vjp(of_arrays, q, k, v)[1](g)


def _tangent(function: Callable, primals: Sequence, tangents: Sequence) -> Any:
    return jax.jvp(function, tuple(primals), tuple(tangents))[1]
