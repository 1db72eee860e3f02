"""Normalisation: over an example's features or positions, over the batch, and of weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fnn import arguments, ops
from fnn.layers.layer import (
    Layer,
    LayerError,
    as_layer,
    check_params,
    last_axis,
    run,
    set_count,
    set_number,
    state_is_missing,
    weight,
)
from fnn.layers.mode import EVALUATE, Mode
from fnn.ops.arguments import must_be_real
from fnn.ops.normalization import check_mask, power_iteration, standardize
from fnn.precision import wide


@dataclasses.dataclass(frozen=True, repr=False)
class LayerNorm(Layer):
    """y = scale ∘ (x − μ) / √(σ² + ε) + bias, with the mean μ and the variance σ² of the last axis.

    x is `(..., features)`; each position is normalised by itself. Mean and variance are computed
    in at least float32 (see `fnn.ops.layer_norm`), and y has x's dtype. A mask, a second input,
    says which features count: booleans that broadcast to x's shape.

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

    def init(self, key: chex.PRNGKey, x: Any, mask: Any = None) -> dict:
        return _scale_and_bias(self, last_axis(self, x))

    def __call__(self, params: Any, x: Any, mask: Any = None, **mode: Any) -> Any:
        weights = _weights(self, params, x)
        return ops.layer_norm(x, *weights, mask, epsilon=self.epsilon)


@dataclasses.dataclass(frozen=True, repr=False)
class RMSNorm(Layer):
    """y = scale ∘ x / √(mean(x²) + ε), the mean over the last axis.

    LayerNorm without μ and bias. x is `(..., features)`; each position is normalised by itself.
    The mean is computed in at least float32 (see `fnn.ops.rms_norm`), and y has x's dtype. A mask,
    a second input, says which features count: booleans that broadcast to x's shape.

    Parameters: `{"scale": (features,)}`, or `{}`.

    Args:
        epsilon: ε.
        use_scale: whether there is a scale.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) x has no last axis, or the parameters aren't of these shapes.

    Zhang, Sennrich, "Root mean square layer normalization", NeurIPS 2019.
    """

    epsilon: float = 1e-6
    _: dataclasses.KW_ONLY
    use_scale: bool = True

    def __post_init__(self) -> None:
        _check_options(self)

    def init(self, key: chex.PRNGKey, x: Any, mask: Any = None) -> dict:
        return _scale_and_bias(self, last_axis(self, x))

    def __call__(self, params: Any, x: Any, mask: Any = None, **mode: Any) -> Any:
        weights = _weights(self, params, x)
        return ops.rms_norm(x, *weights, mask, epsilon=self.epsilon)


@dataclasses.dataclass(frozen=True, repr=False)
class GroupNorm(Layer):
    """`LayerNorm` with mean and variance over all positions and a group of neighbouring features.

    x is one example, `(..., features)`, as an image `(H, W, C)`. A mask, a second input, says
    which entries count: booleans that broadcast to x's shape (`mask[..., None]` for positions).

    Parameters: `{"scale": (features,), "bias": (features,)}`, or those of them that are used.

    Args:
        groups: how many; it divides the features.
        epsilon: ε.
        use_scale, use_bias: whether there is a scale, and a bias.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (from init, and when called) x has no last axis, or not of features that
            `groups` divides; or the parameters aren't of these shapes.

    Wu, He, "Group normalization", ECCV 2018.
    """

    groups: int = 32
    epsilon: float = 1e-5
    _: dataclasses.KW_ONLY
    use_scale: bool = True
    use_bias: bool = True

    def __post_init__(self) -> None:
        set_count(self, "groups")
        _check_options(self)

    def init(self, key: chex.PRNGKey, x: Any, mask: Any = None) -> dict:
        return _scale_and_bias(self, self._features(x))

    def __call__(self, params: Any, x: Any, mask: Any = None, **mode: Any) -> Any:
        self._features(x)
        weights = _weights(self, params, x)
        return ops.group_norm(x, *weights, mask, groups=self.groups, epsilon=self.epsilon)

    def _features(self, x: Any) -> int:
        features = last_axis(self, x)
        if features % self.groups:
            raise LayerError(
                f"{self} wants features (the last axis) that {self.groups} groups divide, but got "
                f"an input of shape {x.shape}."
            )
        return features


@dataclasses.dataclass(frozen=True, repr=False)
class InstanceNorm(Layer):
    """`GroupNorm` with a group for each feature: mean and variance over the positions alone.

    x is one example, `(..., features)`, as an image `(H, W, C)`. A mask, a second input, says
    which entries count: booleans that broadcast to x's shape (`mask[..., None]` for positions).

    Parameters: `{"scale": (features,), "bias": (features,)}`, or those of them that are used.

    Args:
        epsilon: ε.
        use_scale, use_bias: whether there is a scale, and a bias. (PyTorch's has neither.)

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) x has no positions, or the parameters aren't of these shapes.

    Ulyanov, Vedaldi, Lempitsky, "Instance normalization", 2016.
    """

    epsilon: float = 1e-5
    _: dataclasses.KW_ONLY
    use_scale: bool = True
    use_bias: bool = True

    def __post_init__(self) -> None:
        _check_options(self)

    def init(self, key: chex.PRNGKey, x: Any, mask: Any = None) -> dict:
        return _scale_and_bias(self, last_axis(self, x))

    def __call__(self, params: Any, x: Any, mask: Any = None, **mode: Any) -> Any:
        scale, bias = _weights(self, params, x)
        if x.ndim == 1:
            raise LayerError(
                f"{self} takes its statistics over positions, but got an input of shape {x.shape}, "
                "which has none: wanted (..., features)."
            )
        return ops.instance_norm(x, scale, bias, mask, epsilon=self.epsilon)


@dataclasses.dataclass(frozen=True, repr=False)
class BatchNorm(Layer):
    """y = scale ∘ (x − μ) / √(σ² + ε) + bias, with mean μ and variance σ² over the batch.

    x is one example `(..., features)`: further axes are positions, and count as more examples
    (as the pixels of an image do). In training μ and σ² are those of the batch, over the mapped
    axis that `mode.axis` names; the network must be mapped with `vmap(..., axis_name=...)`, as
    `fnn.fit` does. In evaluation they are the running statistics of the state:

        state ← decay · state + (1 − decay) · (μ, n σ² / (n − 1)),    n numbers for each feature

    A mask, a second input, says which entries count: booleans that broadcast to x's shape
    (`mask[..., None]` for positions). Where none counts the state stays.

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
            these shapes, or in training there is but one number for each feature and mode names no
            axis. (Of an axis of one example, y is the bias.)

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

    def init(self, key: chex.PRNGKey, x: Any, mask: Any = None) -> dict:
        return _scale_and_bias(self, last_axis(self, x))

    def init_state(self, x: Any, mask: Any = None) -> dict:
        shape, kind = (last_axis(self, x),), jnp.result_type(float)
        return {"statistics": {"mean": jnp.zeros(shape, kind), "variance": jnp.ones(shape, kind)}}

    def apply(
        self, params: Any, state: Any, x: Any, mask: Any = None, mode: Mode = EVALUATE
    ) -> tuple[Any, dict]:
        features, (scale, bias) = last_axis(self, x), _weights(self, params, x)
        if not isinstance(state, dict) or "statistics" not in state:
            raise state_is_missing(self)
        old = state["statistics"]
        check_params(self, old, {"mean": (features,), "variance": (features,)}, x)
        must_be_real("batch_norm", x=x)
        if not mode.train:
            check_mask("batch_norm", x, mask)
            given = x, old["mean"], old["variance"], scale, bias, mask
            return standardize(*given, epsilon=self.epsilon), state
        if x.size == features and mode.axis is None:
            raise LayerError(
                f"{self} in training takes its statistics over the batch, but mode names no axis "
                "of one: training(key, axis='batch') under vmap(..., axis_name='batch'), or "
                "fnn.fit, which does that."
            )
        y, mean, variance, count = ops.batch_norm(
            x, scale, bias, mask, axis_name=mode.axis, epsilon=self.epsilon
        )
        unbiased = variance * (count / jnp.maximum(count - 1, 1))

        def mixed(old, new):
            found = (self.decay * old + (1 - self.decay) * new.astype(old.dtype)).astype(old.dtype)
            return jnp.where(count > 0, found, old)

        new = {"mean": mixed(old["mean"], mean), "variance": mixed(old["variance"], unbiased)}
        return y, state | {"statistics": new}


@dataclasses.dataclass(frozen=True, repr=False)
class WeightNorm(Layer):
    """A layer whose weight is W = g v / ‖v‖, row by row: length and direction are trained apart.

    Parameters: the layer's, but `{"v": (out, ...), "g": (out,)}` in the place of W. At first W is
    the layer's own.

    `fnn.per_example` keeps the gradient of v whole, not as factors. Row by row it is g/‖v‖ times
    the part of W's gradient Gᵀ A that is orthogonal to v. What is taken away is D v with a diagonal
    D of each example's, of the rank of v: no pair of factors smaller than the gradient holds it.

    Args:
        layer: a layer whose parameters have a W, such as `Linear(100)`.

    Raises:
        TypeError: layer is no layer.
        LayerError: (from init) the layer has no W; (when called) the parameters don't fit.

    Salimans, Kingma, "Weight normalization", NeurIPS 2016.
    """

    layer: Layer

    @property
    def takes_mask(self) -> bool:  # type: ignore[override]
        return self.layer.takes_mask

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", as_layer(self.layer, "WeightNorm, layer"))

    def init(self, key: chex.PRNGKey, *xs: Any) -> dict:
        own = self.layer.init(key, *xs)
        v = weight(self, own)
        # As v's product with its direction, of which no square is too small or too large.
        z = wide(v)
        direction = ops.weight_norm(z, jnp.ones(v.shape[:1], z.dtype))
        lengths = jnp.sum(direction * z, axis=tuple(range(1, v.ndim))).astype(v.dtype)
        return {name: w for name, w in own.items() if name != "W"} | {"v": v, "g": lengths}

    def init_state(self, *xs: Any) -> dict:
        return self.layer.init_state(*xs)

    def init_cache(self, length: int, *xs: Any) -> dict:
        return self.layer.init_cache(length, *xs)

    def apply(self, params: Any, state: Any, *xs: Any, mode: Mode = EVALUATE) -> tuple[Any, dict]:
        v = weight(self, params, "v")
        g = weight(self, params, "g")
        check_params(self, {"v": v, "g": g}, {"v": v.shape, "g": v.shape[:1]})
        rest = {name: w for name, w in params.items() if name not in ("v", "g")}
        return run(self.layer, rest | {"W": ops.weight_norm(v, g)}, state, xs, mode)


@dataclasses.dataclass(frozen=True, repr=False)
class SpectralNorm(Layer):
    """A layer whose weight is divided by its largest singular value σ: W / σ lengthens no vector.

    σ is uᵀ W v, with vectors u and v from the state that each training step brings closer to W's
    first singular vectors. They depend on the weights alone, and have no gradient.

    Parameters: the layer's. State: `{"statistics": {"u": (out,), "v": (in,)}}`, where a weight
    `(out, ...)` is taken for a matrix; at first u is drawn from a fixed key, and v is 0, until a
    training step. (Of a v of 0, σ is ‖Wᵀ u‖.) The layer's cache, if it has one, stands beside.

    `fnn.per_example` keeps W's gradient in factors: Gᵀ A / σ, and through σ a multiple of u vᵀ,
    which is one position more.

    Args:
        layer: a layer without a state whose parameters have a W, such as `Linear(100)`.
        iterations: of the power iteration in a training step.

    Raises:
        TypeError, ValueError: layer is no layer, iterations no positive integer.
        LayerError: the layer has no W, or has a state; (when called) the state is missing.

    Miyato, Kataoka, Koyama, Yoshida, "Spectral normalization for generative adversarial networks",
    ICLR 2018.
    """

    layer: Layer
    iterations: int = 1

    @property
    def takes_mask(self) -> bool:  # type: ignore[override]
        return self.layer.takes_mask

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", as_layer(self.layer, "SpectralNorm, layer"))
        set_count(self, "iterations")

    def init(self, key: chex.PRNGKey, *xs: Any) -> dict:
        params = self.layer.init(key, *xs)
        weight(self, params)
        return params

    def init_state(self, *xs: Any) -> dict:
        if self.layer.init_state(*xs):
            raise LayerError(f"{self} wants a layer without a state.")
        key = jax.random.key(0)
        W = weight(self, jax.eval_shape(self.layer.init, key, *xs))
        u = jax.random.normal(key, W.shape[:1], W.dtype)
        u = u / jnp.linalg.norm(u)
        return {"statistics": {"u": u, "v": jnp.zeros(W.size // max(W.shape[0], 1), W.dtype)}}

    def init_cache(self, length: int, *xs: Any) -> dict:
        return self.layer.init_cache(length, *xs)

    def apply(self, params: Any, state: Any, *xs: Any, mode: Mode = EVALUATE) -> tuple[Any, dict]:
        W = weight(self, params)
        if not isinstance(state, dict) or "statistics" not in state:
            raise state_is_missing(self)
        old = state["statistics"]
        sizes = W.shape[0], math.prod(W.shape[1:])
        check_params(self, old, {"u": sizes[:1], "v": sizes[1:]})
        u, v = old["u"], old["v"]
        if mode.train:
            u, v = power_iteration(W, u, v, iterations=self.iterations)
        else:  # one iteration and no more: v must belong to this u
            v = jnp.where(jnp.any(v != 0), v, power_iteration(W, u, v)[1])
        rest = {kind: own for kind, own in state.items() if kind != "statistics"}
        W = ops.spectral_norm(W, u, v)
        y, rest = run(self.layer, params | {"W": W}, rest, xs, mode)
        if mode.train:
            rest = rest | {"statistics": {"u": u, "v": v}}
        return y, state | rest if rest else state


def _weights(layer: Any, params: Any, x: Any) -> Any:
    """The scale, and the bias where the layer may have one; None for those that aren't used."""
    check_params(layer, params, _shapes(layer, last_axis(layer, x)), x)
    return [params.get(name) for name in _WEIGHTS if hasattr(layer, f"use_{name}")]


def _shapes(layer: Any, features: int) -> dict[str, tuple[int, ...]]:
    return {name: (features,) for name in _WEIGHTS if getattr(layer, f"use_{name}", False)}


def _scale_and_bias(layer: Any, features: int) -> dict:
    shapes, kind = _shapes(layer, features), jnp.result_type(float)
    return {name: _WEIGHTS[name](shape, kind) for name, shape in shapes.items()}


# A scale starts from 1, a bias from 0.
_WEIGHTS = {"scale": jnp.ones, "bias": jnp.zeros}


def _check_options(layer: Any) -> None:
    name = type(layer).__name__
    set_number(layer, "epsilon", least=0)
    for option in ("use_scale", "use_bias"):
        if hasattr(layer, option):
            arguments.flag(name, option, getattr(layer, option))
