"""KFAC as an optax optimiser: steps preconditioned by Kronecker factors of the curvature."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fnn.curvature import output_hessian
from fnn.curvature.columns import one_array, pair
from fnn.curvature.kronecker import Block, Diagonal, Kronecker, kronecker_factors


class KFACState(NamedTuple):
    """The state of `kfac`.

    count: steps so far.
    key: for the labels that are drawn.
    factors: a tree like the parameters of moving averages of Kronecker factors.
    weight: the sum of the averages' weights, by which they are divided.
    inverses: the same tree, of the damped factors' inverses.
    damping: λ.
    velocity: the last update, a tree like the parameters.
    ratio: the loss's last measured reduction over the one that the quadratic model foretold.
    """

    count: jax.Array
    key: jax.Array
    factors: Any
    weight: jax.Array
    inverses: Any
    damping: jax.Array
    velocity: Any
    ratio: jax.Array


def kfac(
    model: Callable,
    loss: Callable,
    example_batch: Any,
    *,
    learning_rate: float | Callable | None = None,
    momentum: float | None = None,
    damping: float = 1e-1,
    adapt_damping_every: int = 5,
    damping_decay: float = 19 / 20,
    min_damping: float = 1e-6,
    max_damping: float = 1e4,
    trust_region: float | None = None,
    factors_every: int = 1,
    inverses_every: int = 5,
    average: float = 0.95,
    l2: float = 0.0,
    kind: str = "expand",
    samples: int = 1,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """KFAC (Martens & Grosse 2015), for any network.

    The gradient is multiplied by the inverse of the damped Kronecker factors, and the step
    δ = −α P⁻¹∇L + μ δ_last minimises the quadratic model of the loss,

        M(δ) = ∇Lᵀδ + ½ δᵀ(GGN + λI) δ,

    over α and μ, with the exact GGN, two forward-mode passes (section 7). λ follows the rule of
    Levenberg and Marquardt: every few steps the loss's true reduction over the model's, ρ, makes
    it smaller where ρ > ¾ and larger where ρ < ¼ (section 6.5).

    Args:
        model: `model(params, input)`, the outputs of one example, an array.
        loss: `loss(outputs, target)`, the loss of one example.
        example_batch: a batch `(inputs, targets)`, or its shapes; its values aren't looked at.
        learning_rate: a number or an optax schedule for α instead; then `momentum` is μ.
        momentum: μ where the learning rate is given, 0 unless given; else 0 leaves the last
            step out of the quadratic model.
        damping: λ to begin with.
        adapt_damping_every: steps between adaptations, each by `damping_decay` to as many; 0
            keeps λ fixed.
        min_damping, max_damping: bounds of λ.
        trust_region: the largest ½ δᵀ(GGN + λI) δ of a step; a longer one is shortened.
        factors_every, inverses_every: steps between new factors, and new inverses.
        average: the decay of the factors' moving average.
        l2: the weight of ½ l2 |params|², added to the loss, its gradient and the GGN.
        kind, samples: as for `kronecker_factors`; samples=0 takes all columns.
        key: for the labels that are drawn; `jax.random.key(0)` unless given.

    Returns:
        An optax optimiser. Its update takes the batch, too:

            updates, state = optimizer.update(gradient, state, params, batch=(inputs, targets))

        where the gradient is that of the mean loss. `fnn.train_step` passes it on.

    Raises:
        ValueError: an argument is out of range, or update gets no params or no batch.
    """
    for name, value in (
        ("damping", damping),
        ("factors_every", factors_every),
        ("inverses_every", inverses_every),
    ):
        if value <= 0:
            raise ValueError(f"kfac: {name} must be positive, but is {value}.")
    if not 0 <= average < 1:
        raise ValueError(f"kfac: average must be at least 0 and below 1, but is {average}.")
    key = jax.random.key(0) if key is None else key
    with_model = learning_rate is None
    look_back = momentum != 0.0 if with_model else bool(momentum)

    def new_factors(params, batch, key):
        draw = {"key": key, "samples": samples} if samples else {}
        return kronecker_factors(model, loss, kind=kind, **draw)(params, batch)

    def init(params):
        shapes = jax.eval_shape(new_factors, params, example_batch, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return KFACState(
            jnp.zeros((), jnp.int32),
            # A copy: a step that donates its state must not take the caller's key along.
            jnp.copy(key),
            zeros,
            jnp.zeros(()),
            jax.tree.map(jnp.copy, zeros),
            jnp.asarray(damping, jnp.float32),
            jax.tree.map(jnp.zeros_like, params),
            jnp.ones(()),
        )

    def update(gradient, state, params=None, *, batch=None, **unused):
        if params is None or batch is None:
            missing = "params" if params is None else "batch=(inputs, targets)"
            raise ValueError(
                f"kfac: update needs {missing}: update(gradient, state, params, batch=...)."
            )
        inputs, targets = pair(batch)
        gradient = jax.tree.map(lambda g, p: g + l2 * p, gradient, params) if l2 else gradient
        factors, weight = _every(
            factors_every,
            state.count,
            lambda: _averaged(
                (state.factors, state.weight),
                new_factors(params, batch, jax.random.fold_in(state.key, state.count)),
                average,
            ),
            (state.factors, state.weight),
        )
        inverses = _every(
            inverses_every,
            state.count,
            lambda: _inverted(factors, weight, state.damping + l2),
            state.inverses,
        )
        direction = jax.tree.map(
            lambda f, g: (-f.times(g)).astype(g.dtype), inverses, gradient, is_leaf=_is_factors
        )

        outputs = lambda p: jax.vmap(lambda x: one_array(model(p, x)))(inputs)
        z, push = jax.linearize(outputs, params)
        vectors = [direction, state.velocity] if look_back else [direction]
        curved = _quadratic(loss, z, targets, push, vectors)
        inner = jnp.array([[_dot(u, v) for v in vectors] for u in vectors])
        slope = jnp.array([_dot(gradient, v) for v in vectors])
        damped = curved + (state.damping + l2) * inner
        if with_model:
            steps = _minimum(damped, slope)
        else:
            rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
            steps = jnp.array([rate, momentum] if look_back else [rate])
        if trust_region is not None:
            length = 0.5 * steps @ damped @ steps
            steps = steps * jnp.sqrt(jnp.minimum(1, trust_region / jnp.maximum(length, 1e-30)))
        delta = _combined(steps, vectors)

        adapted, ratio = state.damping, state.ratio
        if adapt_damping_every:

            def adapt():
                foretold = slope @ steps + 0.5 * steps @ damped @ steps
                after = optax.apply_updates(params, delta)
                change = _mean(loss, outputs(after), targets) - _mean(loss, z, targets)
                if l2:
                    change += 0.5 * l2 * (_dot(after, after) - _dot(params, params))
                ratio = change / jnp.minimum(foretold, -1e-30)
                factor = damping_decay**adapt_damping_every
                ratio = jnp.where(jnp.isfinite(ratio), ratio, 0.0)
                new = jnp.where(ratio > 0.75, state.damping * factor, state.damping)
                new = jnp.where(ratio < 0.25, state.damping / factor, new)
                return (
                    jnp.clip(new, min_damping, max_damping).astype(state.damping.dtype),
                    ratio.astype(state.ratio.dtype),
                )

            adapted, ratio = _every(adapt_damping_every, state.count + 1, adapt, (adapted, ratio))
        new = KFACState(
            state.count + 1, state.key, factors, weight, inverses, adapted, delta, ratio
        )
        return delta, new

    return optax.GradientTransformationExtraArgs(init, update)


def _every(period: int, count, function: Callable, otherwise):
    """function() each `period` steps, else what there was."""
    if period == 1:
        return function()
    return lax.cond(count % period == 0, function, lambda: otherwise)


def _averaged(old, new, average):
    """An exponential moving average, with the sum of its weights (as Adam's correction)."""
    factors, weight = old
    factors = jax.tree.map(lambda x, y: average * x + (1 - average) * y, factors, new)
    return factors, average * weight + (1 - average)


def _is_factors(x) -> bool:
    return isinstance(x, (Kronecker, Block, Diagonal))


def _inverted(factors, weight, damping):
    """The inverses of the factors, each damped by its share of λ."""
    invert = functools.partial(_inverse, weight, damping)
    return jax.tree.map(invert, factors, is_leaf=_is_factors)


def _inverse(weight, damping, f):
    if isinstance(f, Diagonal):
        return Diagonal(1 / (f.diagonal / weight + damping), f.shape)
    if isinstance(f, Block):
        return Block(_inverse_of_positive(f.matrix / weight, damping), f.shape)
    # (A + π √λ I) ⊗ (G + √λ/π I), π² the mean eigenvalue of A over that of G (section 6.3).
    A, G = f.A / weight, f.G / weight
    mean_a = jnp.mean(A, axis=-1) if A.ndim == 2 else jnp.trace(A, 0, 1, 2) / A.shape[-1]
    mean_g = jnp.trace(G, 0, 1, 2) / G.shape[-1]
    tiny = jnp.finfo(G.dtype).tiny
    pi = jnp.sqrt(jnp.maximum(mean_a, tiny) / jnp.maximum(mean_g, tiny))
    pi = jnp.where((mean_a > 0) & (mean_g > 0), pi, 1)
    root = jnp.sqrt(damping).astype(G.dtype)
    if A.ndim == 2:
        inverse_a = 1 / (A + (pi * root)[:, None])
    else:
        inverse_a = jax.vmap(_inverse_of_positive)(A, pi * root)
    return Kronecker(inverse_a, jax.vmap(_inverse_of_positive)(G, root / pi), f.layout, f.shape)


def _inverse_of_positive(matrix, damping):
    """(matrix + damping I)⁻¹ by Cholesky's factor."""
    eye = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    factor = jnp.linalg.cholesky(matrix + damping.astype(matrix.dtype) * eye)
    return jax.scipy.linalg.cho_solve((factor, True), eye)


def _quadratic(loss, z, targets, push, vectors):
    """uᵀ GGN v for all pairs of vectors."""
    pushed = [push(v) for v in vectors]
    product = lambda z, t, u: output_hessian.of(loss, z, t).product(z, u)
    bent = [jax.vmap(product)(z, targets, u) for u in pushed]
    size = z.shape[0]
    return jnp.array([[jnp.vdot(u, v) / size for v in bent] for u in pushed])


def _minimum(matrix, slope):
    """The minimum of slopeᵀx + ½ xᵀ matrix x, of one or two numbers."""
    if slope.shape[0] == 1:
        return -slope / jnp.maximum(matrix[0], jnp.finfo(matrix.dtype).tiny)
    # The last step may be zero, or parallel to the direction: then it counts for nothing.
    (a, b), (_, d) = matrix
    det = a * d - b * b
    alone = jnp.array([-slope[0] / jnp.maximum(a, jnp.finfo(a.dtype).tiny), 0.0])
    sound = det > 1e-6 * a * d
    det = jnp.where(sound, det, 1)
    both = jnp.array([b * slope[1] - d * slope[0], b * slope[0] - a * slope[1]]) / det
    return jnp.where(sound, both, alone)


def _combined(steps, vectors):
    return jax.tree.map(
        lambda *vs: functools.reduce(
            jnp.add, [s.astype(v.dtype) * v for s, v in zip(steps, vs, strict=True)]
        ),
        *vectors,
    )


def _dot(u, v):
    return functools.reduce(
        jnp.add, [jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(u), jax.tree.leaves(v))]
    )


def _mean(loss, z, targets):
    return jnp.mean(jax.vmap(loss)(z, targets))
