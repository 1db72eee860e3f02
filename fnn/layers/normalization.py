"""Normalisation: `LayerNorm` over an example's features, `BatchNorm` over the batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from fnn import arguments
from fnn.layers.layer import (
    Layer,
    LayerError,
    check_params,
    last_axis,
    set_number,
    state_is_missing,
)
from fnn.layers.mode import EVALUATE, Mode
from fnn.meshes import explicit_mesh


@dataclasses.dataclass(frozen=True, repr=False)
class LayerNorm(Layer):
    """y = scale ∘ (x − μ) / √(σ² + ε) + bias, with the mean μ and the variance σ² of the last axis.

    x is `(..., features)`; each position is normalised by itself. Mean and variance are computed
    in at least float32.

    Parameters: `{"scale": (features,), "bias": (features,)}`, or those of them that are used.

    Args:
        epsilon: ε.
        use_scale, use_bias: whether there is a scale, and a bias.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) x has no last axis, or the parameters aren't of these shapes.

    Ba, Kiros, Hinton, "Layer normalization", 2016.
    """

    epsilon: float = 1e-5
    _: dataclasses.KW_ONLY
    use_scale: bool = True
    use_bias: bool = True

    def __post_init__(self) -> None:
        _check_options(self)

    def init(self, key: chex.PRNGKey, x: Any) -> dict:
        return _scale_and_bias(self, last_axis(self, x))

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        features = last_axis(self, x)
        check_params(self, params, _shapes(self, features))
        wide = _wide(x)
        mean = jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
        return _normalised(self, params, x, mean, variance)


@dataclasses.dataclass(frozen=True, repr=False)
class BatchNorm(Layer):
    """y = scale ∘ (x − μ) / √(σ² + ε) + bias, with mean μ and variance σ² over the batch.

    x is one example `(..., features)`: further axes are positions, and count as more examples
    (as the pixels of an image do). In training μ and σ² are those of the batch, over the mapped
    axis that `mode.axis` names; the network must be mapped with `vmap(..., axis_name=...)`, as
    `fnn.fit` does. In evaluation they are the running statistics of the state:

        state ← decay · state + (1 − decay) · (μ, n σ² / (n − 1)),    n numbers for each feature

    Parameters: `{"scale": (features,), "bias": (features,)}`, or those of them that are used.
    State: `{"statistics": {"mean": (features,), "variance": (features,)}}`, at first 0 and 1,
    one for the whole batch. All are computed in at least float32.

    Args:
        epsilon: ε.
        decay: how much of the old statistics a step keeps, from 0 to 1. (PyTorch's `momentum`
            is 1 − decay.)
        use_scale, use_bias: whether there is a scale, and a bias.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) the state is missing, the parameters or the state aren't of
            these shapes, or in training there is but one number for each feature.

    Ioffe, Szegedy, "Batch normalization", ICML 2015, algorithms 1 and 2.
    """

    epsilon: float = 1e-5
    decay: float = 0.9
    _: dataclasses.KW_ONLY
    use_scale: bool = True
    use_bias: bool = True

    def __post_init__(self) -> None:
        set_number(self, "decay", least=0, most=1)
        _check_options(self)

    def init(self, key: chex.PRNGKey, x: Any) -> dict:
        return _scale_and_bias(self, last_axis(self, x))

    def init_state(self, x: Any) -> dict:
        shape, kind = (last_axis(self, x),), jnp.result_type(float)
        return {"statistics": {"mean": jnp.zeros(shape, kind), "variance": jnp.ones(shape, kind)}}

    def apply(self, params: Any, state: Any, x: Any, mode: Mode = EVALUATE) -> tuple[Any, dict]:
        features = last_axis(self, x)
        check_params(self, params, _shapes(self, features))
        if not isinstance(state, dict) or "statistics" not in state:
            raise state_is_missing(self)
        old = state["statistics"]
        check_params(self, old, {"mean": (features,), "variance": (features,)})
        if not mode.train:
            return _normalised(self, params, x, old["mean"], old["variance"]), state
        axes, wide = tuple(range(x.ndim - 1)), _wide(x)
        count = math.prod(x.shape[:-1]) * (1 if mode.axis is None else lax.axis_size(mode.axis))
        if count == 1 and mode.axis is None:
            raise LayerError(
                f"{self} in training takes its statistics over the batch, but mode names no axis "
                "of one: training(key, axis='batch') under vmap(..., axis_name='batch'), or "
                "fnn.fit, which does that."
            )

        def over_batch(x):
            mean = jnp.mean(x, axes)
            return mean if mode.axis is None else _mean_over(mode.axis, mean)

        mean = over_batch(wide)
        variance = over_batch(jnp.square(wide - mean))
        unbiased = variance * (count / max(count - 1, 1))
        new = {"mean": mean, "variance": unbiased}
        mixed = jax.tree.map(
            lambda old, new: (self.decay * old + (1 - self.decay) * new).astype(old.dtype), old, new
        )
        return _normalised(self, params, x, mean, variance), state | {"statistics": mixed}


def _mean_over(axis: str | tuple[str, ...], x: Any) -> Any:
    """The mean over a mapped axis, or several."""
    if explicit_mesh(x) is None:
        return lax.pmean(x, axis)
    # JAX's pmean under vmap gives a wrong sharding there (0.10.2 and 0.12.0.1).
    for name in axis if isinstance(axis, tuple) else (axis,):
        x = jnp.mean(lax.all_gather(x, name), axis=0)
    return x


def _normalised(layer: Any, params: dict, x: Any, mean: Any, variance: Any) -> Any:
    y = (_wide(x) - mean) * lax.rsqrt(variance + layer.epsilon)
    y = y.astype(x.dtype)
    if layer.use_scale:
        y = y * params["scale"]
    return y + params["bias"] if layer.use_bias else y


def _wide(x: Any) -> Any:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _shapes(layer: Any, features: int) -> dict[str, tuple[int, ...]]:
    used = {"scale": layer.use_scale, "bias": layer.use_bias}
    return {name: (features,) for name, is_used in used.items() if is_used}


def _scale_and_bias(layer: Any, features: int) -> dict:
    starts = {"scale": jnp.ones, "bias": jnp.zeros}
    shapes = _shapes(layer, features)
    return {name: starts[name](shape, jnp.result_type(float)) for name, shape in shapes.items()}


def _check_options(layer: Any) -> None:
    name = type(layer).__name__
    set_number(layer, "epsilon", least=0)
    for option in ("use_scale", "use_bias"):
        arguments.flag(name, option, getattr(layer, option))
