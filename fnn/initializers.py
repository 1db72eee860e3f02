"""Initialisers: functions `init(key, shape, dtype) -> array` for the weights of a layer.

Weights are `(out, in)`, and convolution kernels `(out, in, *window)`. An initialiser that
looks at the fans reads them from there: `fan_in = in * window`, the number of inputs that
one output sums over, and `fan_out = out * window`, the number of outputs that one input
feeds.

Options are keyword-only. To set one, use `functools.partial`:

    Linear(100, weight_init=partial(he_normal, slope=0.1))

Most of these are `jax.nn.initializers`, told which axis is which (JAX takes weights to be
`(in, out)`). Any function of the same signature will do in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments

Initializer = Callable[[chex.PRNGKey, Sequence[int], Any], chex.Array]


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """`(fan_in, fan_out)` of a weight of shape `(out, in)` or `(out, in, *window)`.

    Raises:
        TypeError: shape isn't a sequence of integers.
        ValueError: the shape has fewer than two axes, as a bias has, or a negative one.

    >>> fans((100, 784)), fans((64, 3, 5, 5))
    ((784, 100), (75, 1600))
    """
    shape = _checked("fans", shape)
    if len(shape) < 2:
        raise ValueError(
            f"the fans of a weight are those of a shape (out, in) or (out, in, *window), but the "
            f"shape is {tuple(shape)}. For a bias use an initialiser that needs no fans: zeros, "
            "constant, normal, uniform."
        )
    out, in_, *window = shape
    positions = math.prod(window)
    return in_ * positions, out * positions


def _checked(where: str, shape: Any) -> tuple[int, ...]:
    """A shape as a tuple; an integer alone is one axis."""
    wanted = "shape must be a sequence of integers of at least 0"
    dims = (shape,) if isinstance(shape, (int, np.integer)) else shape
    if isinstance(dims, str) or not isinstance(dims, Iterable):
        raise TypeError(f"{where}: {wanted}, but got {arguments.show(shape)}.")
    dims = tuple(dims)
    if any(n is None or isinstance(n, (str, bool, float)) for n in dims):
        raise TypeError(f"{where}: {wanted}, but got {arguments.show(shape)}.")
    if any(isinstance(n, (int, np.integer)) and n < 0 for n in dims):
        raise ValueError(f"{where}: {wanted}, but got {arguments.show(shape)}.")
    return dims


# ------------------------------------------------------------------------------- without fans


def zeros(key, shape, dtype=jnp.float32) -> jax.Array:
    """All 0: the usual start of a bias.

    Never of weights: "if every neuron in the network computes the same output, then they
    will also all compute the same gradients" (CS231n, notes on neural networks 2).
    """
    del key
    return jnp.zeros(_checked("zeros", shape), dtype)


def ones(key, shape, dtype=jnp.float32) -> jax.Array:
    """All 1: the usual start of a scale."""
    del key
    return jnp.ones(_checked("ones", shape), dtype)


def constant(key, shape, dtype=jnp.float32, *, value: float) -> jax.Array:
    """All `value`, a number."""
    del key
    arguments.number("constant", "value", value, infinite=True)
    return jnp.full(_checked("constant", shape), value, dtype)


def normal(key, shape, dtype=jnp.float32, *, stddev: float = 0.01) -> jax.Array:
    """N(0, stddev²): "small random numbers" (CS231n, notes on neural networks 2)."""
    arguments.number("normal", "stddev", stddev, least=0)
    arguments.key("normal", "key", key)
    return jax.nn.initializers.normal(stddev)(key, _checked("normal", shape), dtype)


def uniform(key, shape, dtype=jnp.float32, *, bound: float = 0.01) -> jax.Array:
    """U(-bound, bound)."""
    arguments.number("uniform", "bound", bound, least=0)
    arguments.key("uniform", "key", key)
    return jax.random.uniform(key, _checked("uniform", shape), dtype, -bound, bound)


def truncated_normal(
    key,
    shape,
    dtype=jnp.float32,
    *,
    stddev: float = 0.02,
    lower: float = -2.0,
    upper: float = 2.0,
) -> jax.Array:
    """N(0, stddev²), redrawn outside [lower·stddev, upper·stddev].

    `stddev` is that of the normal before it is cut, as in BERT (Devlin et al. 2018, code)
    and ViT; the cut at ±2 leaves 0.8796 of it.

    Raises:
        ValueError: `lower` isn't below `upper`.
    """
    where = "truncated_normal"
    arguments.number(where, "stddev", stddev, least=0)
    arguments.number(where, "lower", lower, infinite=True)
    arguments.number(where, "upper", upper, infinite=True)
    if arguments.is_known(lower, upper) and not lower < upper:
        raise ValueError(f"{where}: lower must be below upper, but got {lower} and {upper}.")
    arguments.key(where, "key", key)
    shape = _checked(where, shape)
    return jax.nn.initializers.truncated_normal(stddev, lower=lower, upper=upper)(key, shape, dtype)


# ---------------------------------------------------------------------------------- with fans


def variance_scaling(
    key,
    shape,
    dtype=jnp.float32,
    *,
    scale: float = 1.0,
    fan: Literal["in", "out", "average"] = "in",
    distribution: Literal["normal", "uniform", "truncated_normal"] = "normal",
) -> jax.Array:
    """Mean 0 and variance `scale / fan`: the family that Xavier, He and LeCun belong to.

    The variance is right for each distribution: uniform draws from ±√(3·scale/fan), and the
    truncated normal, cut at ±2 of its deviations, is widened for what the cut takes away.

    Raises:
        ValueError: the shape has fewer than two axes.
    """
    return _scaled("variance_scaling", key, shape, dtype, scale, fan, distribution)


def _scaled(where: str, key, shape, dtype, scale, fan="in", distribution="normal") -> jax.Array:
    """`variance_scaling`, as the public function `where` calls it."""
    mode: dict[str, Any] = {"in": "fan_in", "out": "fan_out", "average": "fan_avg"}
    arguments.number(where, "scale", scale, least=0)
    arguments.choice(where, "fan", fan, list(mode))
    arguments.choice(where, "distribution", distribution, ("normal", "uniform", "truncated_normal"))
    arguments.key(where, "key", key)
    shape = _checked(where, shape)
    fans(shape)
    if 0 in shape or (arguments.is_known(scale) and scale == 0):
        return jnp.zeros(shape, dtype)
    init = jax.nn.initializers.variance_scaling(
        scale, mode[fan], distribution, in_axis=1, out_axis=0
    )
    return init(key, shape, dtype)


def xavier_uniform(key, shape, dtype=jnp.float32, *, gain: float = 1.0) -> jax.Array:
    """U(±gain·√(6 / (fan_in + fan_out))), variance gain²·2 / (fan_in + fan_out).

    For tanh and its kind: keeps the variance of the activations (fan_in) and of the
    gradients (fan_out) about the same from layer to layer.

    Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", AISTATS 2010, equation 16.
    """
    arguments.number("xavier_uniform", "gain", gain)
    return _scaled("xavier_uniform", key, shape, dtype, gain**2, "average", "uniform")


def xavier_normal(key, shape, dtype=jnp.float32, *, gain: float = 1.0) -> jax.Array:
    """N(0, gain²·2 / (fan_in + fan_out)). Glorot and Bengio 2010, equation 12."""
    arguments.number("xavier_normal", "gain", gain)
    return _scaled("xavier_normal", key, shape, dtype, gain**2, "average")


def he_normal(
    key,
    shape,
    dtype=jnp.float32,
    *,
    slope: float = 0.0,
    fan: Literal["in", "out"] = "in",
) -> jax.Array:
    """N(0, 2 / ((1 + slope²)·fan)): for relu, which halves the variance that reaches it.

    He et al., "Delving deep into rectifiers", ICCV 2015, equations 10 (fan in), 14 (fan out)
    and 15 (`slope`, the leaky relu's on the negative side). A normal that isn't truncated,
    as in the paper; Flax's and Keras' of the same name are.
    """
    arguments.number("he_normal", "slope", slope)
    return _scaled("he_normal", key, shape, dtype, 2 / (1 + slope**2), fan)


def he_uniform(
    key,
    shape,
    dtype=jnp.float32,
    *,
    slope: float = 0.0,
    fan: Literal["in", "out"] = "in",
) -> jax.Array:
    """U(±√(6 / ((1 + slope²)·fan))): `he_normal`'s variance, uniformly."""
    arguments.number("he_uniform", "slope", slope)
    return _scaled("he_uniform", key, shape, dtype, 2 / (1 + slope**2), fan, "uniform")


def lecun_normal(key, shape, dtype=jnp.float32) -> jax.Array:
    """N(0, 1 / fan_in): keeps the variance through a linear layer; what selu assumes.

    LeCun et al., "Efficient backprop", 1998, equation 16; Klambauer et al.,
    "Self-normalizing neural networks", NeurIPS 2017.
    """
    return _scaled("lecun_normal", key, shape, dtype, 1.0)


def lecun_uniform(key, shape, dtype=jnp.float32) -> jax.Array:
    """U(±√(3 / fan_in)), variance 1 / fan_in. LeCun et al. 1998."""
    return _scaled("lecun_uniform", key, shape, dtype, 1.0, distribution="uniform")


glorot_uniform, glorot_normal = xavier_uniform, xavier_normal
kaiming_uniform, kaiming_normal = he_uniform, he_normal


# --------------------------------------------------------------------------------- orthogonal


def orthogonal(key, shape, dtype=jnp.float32, *, gain: float = 1.0) -> jax.Array:
    """gain · a random matrix with orthonormal rows (or columns, if it has more rows).

    W, seen as `(out, in * window)`, has W Wᵀ = gain²·I if out <= in * window, and
    WᵀW = gain²·I otherwise, so that products keep their length through any depth. In 16-bit
    floats it is computed in float32 and rounded.

    Saxe, McClelland and Ganguli, "Exact solutions to the nonlinear dynamics of learning in
    deep linear neural networks", ICLR 2014.

    Raises:
        ValueError: the shape has fewer than two axes.
    """
    arguments.number("orthogonal", "gain", gain)
    arguments.key("orthogonal", "key", key)
    shape = _checked("orthogonal", shape)
    fans(shape)
    exact = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32
    return jax.nn.initializers.orthogonal(gain, column_axis=0)(key, shape, exact).astype(dtype)


def identity(key, shape, dtype=jnp.float32, *, gain: float = 1.0) -> jax.Array:
    """gain where an output's number is an input's, at the middle of the window; elsewhere 0.

    A linear layer, or a convolution with padding "same", then begins as the identity times gain,
    on the first channels if it has more inputs than outputs or the reverse. Of a window of even
    size the middle is the earlier of two: there "same" leaves each pixel in its place.

    Le, Jaitly, Hinton, "A simple way to initialize recurrent networks of rectified linear units",
    arXiv:1504.00941; Zagoruyko, Komodakis, "DiracNets", arXiv:1706.00388.

    Raises:
        ValueError: the shape has fewer than two axes.
    """
    del key
    arguments.number("identity", "gain", gain)
    shape = _checked("identity", shape)
    fans(shape)
    out, in_, *window = shape
    here = jnp.eye(out, in_, dtype=bool)
    W = jnp.where(here, jnp.asarray(gain, dtype), jnp.zeros((), dtype))
    return _in_the_middle(W, window)


def delta_orthogonal(key, shape, dtype=jnp.float32, *, gain: float = 1.0) -> jax.Array:
    """`orthogonal` at the middle of a convolution's window, and 0 around it.

    With padding "same" it keeps the length of what it is given, through any depth.

    Xiao, Bahri, Sohl-Dickstein, Schoenholz, Pennington, "Dynamical isometry and a mean field theory
    of CNNs", ICML 2018.

    Raises:
        ValueError: the shape has fewer than two axes.
    """
    arguments.number("delta_orthogonal", "gain", gain)
    arguments.key("delta_orthogonal", "key", key)
    shape = _checked("delta_orthogonal", shape)
    fans(shape)
    out, in_, *window = shape
    return _in_the_middle(orthogonal(key, (out, in_), dtype, gain=gain), window)


def _in_the_middle(W: jax.Array, window: Sequence[int]) -> jax.Array:
    """A weight `(out, in, *window)` that is W in the middle and 0 elsewhere."""
    whole = jnp.zeros((*W.shape, *window), W.dtype)
    if 0 in window:
        return whole
    return whole.at[(slice(None), slice(None), *((n - 1) // 2 for n in window))].set(W)
