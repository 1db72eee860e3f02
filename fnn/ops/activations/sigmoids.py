"""Activations shaped like an S, which saturate at both ends; and the logarithm of one."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from fnn.operation import compiled_rule as rule
from fnn.ops.arguments import must_be_real, must_be_real_or_complex


@rule
def sigmoid(x: chex.Array) -> jax.Array:
    """σ(x) = 1 / (1 + e⁻ˣ), between 0 and 1. Any shape; real or complex.

    Local gradient: σ(x) (1 − σ(x)) = y (1 − y). Kept: y. Smooth, no kink. As in JAX, 1 − y cancels
    where y rounds to almost 1: in float32 the gradient is 0 from x = 17 on (it is 4e-8 there).
    Source: the lecture (a neuron's firing rate; it saturates, and then kills the gradient).
    """
    must_be_real_or_complex("sigmoid", x=x)
    return jax.nn.sigmoid(x)


@sigmoid.forward
def _(x):
    y = sigmoid(x)
    return y, y


@sigmoid.backward
def _(y, g):
    return (g * (y * (1 - y)),)


@rule
def tanh(x: chex.Array) -> jax.Array:
    """tanh(x) = (eˣ − e⁻ˣ) / (eˣ + e⁻ˣ), between −1 and 1. Any shape; real or complex.

    Local gradient: 1 − tanh²(x) = 1 − y². Kept: y. Smooth, no kink. As in JAX, 1 − y² cancels
    where y rounds to almost ±1: in float32 the gradient is 0 from x = 9 on (it is 6e-8 there).
    Source: the lecture; LeCun et al., "Efficient BackProp", 1998 (zero-centred).
    """
    must_be_real_or_complex("tanh", x=x)
    return jnp.tanh(x)


@tanh.forward
def _(x):
    y = tanh(x)
    return y, y


@tanh.backward
def _(y, g):
    return (g * (1 - y * y),)


@rule
def log_sigmoid(x: chex.Array) -> jax.Array:
    """log_sigmoid(x) = log σ(x) = −softplus(−x). Any shape.

    Local gradient: 1 − σ(x) = 1 − eʸ. Kept: y. Smooth, no kink.
    Source: the log-likelihood of logistic regression; see `sigmoid_binary_cross_entropy`.
    """
    must_be_real("log_sigmoid", x=x)
    return jnp.where(x >= 0, 0, x) - jnp.log1p(jnp.exp(-jnp.abs(x)))


@log_sigmoid.forward
def _(x):
    y = log_sigmoid(x)
    return y, y


@log_sigmoid.backward
def _(y, g):
    return (g * -jnp.expm1(y),)


@rule
def softsign(x: chex.Array) -> jax.Array:
    """softsign(x) = x / (1 + |x|), between −1 and 1. Any shape.

    Local gradient: 1 / (1 + |x|)². Kept: x (it can be told from y as (1 − |y|)², but for large
    x that has few digits). The gradient has no kink; its own derivative jumps from 2
    to −2 at x = 0, and is −2 there.
    Source: Turian, Bergstra, Bengio, "Quadratic features and deep architectures for
    chunking", 2009.
    """
    must_be_real("softsign", x=x)
    return x / (1 + jnp.abs(x))


@softsign.forward
def _(x):
    return softsign(x), x


@softsign.backward
def _(x, g):
    r = 1 / (1 + jnp.abs(x))
    return (g * r * r,)


@rule
def hard_tanh(x: chex.Array) -> jax.Array:
    """hard_tanh(x) = x between −1 and 1, ±1 beyond. Any shape.

    Local gradient: 1 where −1 ≤ x ≤ 1, else 0. Kept: that mask (one byte an entry). At the
    kinks x = ±1 it is 1, as in `jax.nn.hard_tanh`.
    Source: Collobert, "Large scale machine learning", thesis, 2004.
    """
    must_be_real("hard_tanh", x=x)
    return jnp.clip(x, -1, 1)


@hard_tanh.forward
def _(x):
    return hard_tanh(x), jnp.abs(x) <= 1


@hard_tanh.backward
def _(is_inside, g):
    return (jnp.where(is_inside, g, 0),)


@rule
def hard_sigmoid(x: chex.Array) -> jax.Array:
    """hard_sigmoid(x) = relu6(x + 3) / 6: 0 below −3, 1 above 3, a line between. Any shape.

    Local gradient: 1/6 where −3 < x < 3, else 0. Kept: that mask (one byte an entry). At the
    kinks x = ±3 it is 0, as in `jax.nn.hard_sigmoid`.
    Source: Howard et al., "Searching for MobileNetV3", arXiv:1905.02244.
    """
    must_be_real("hard_sigmoid", x=x)
    return jnp.clip(x + 3, 0, 6) / 6


@hard_sigmoid.forward
def _(x):
    return hard_sigmoid(x), (x > -3) & (x < 3)


@hard_sigmoid.backward
def _(is_inside, g):
    return (jnp.where(is_inside, g / 6, 0),)
