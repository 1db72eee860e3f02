"""KFAC as an optax optimiser: steps preconditioned by Kronecker factors of the curvature."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from fnn import arguments, text
from fnn.curvature import output_hessian
from fnn.curvature.checks import check_like, check_loss, check_model, checked_params, pair
from fnn.curvature.damped_inverses import inverse
from fnn.curvature.kronecker import Block, Diagonal, Kronecker, factors
from fnn.curvature.linearize import linearized
from fnn.curvature.part_of_params import (
    NOT_TOLD,
    first_without_array,
    others_of,
    with_others,
)
from fnn.curvature.quadratic import Quadratic, share_of
from fnn.curvature.sqrt_ggn import one_array
from fnn.eager import once
from fnn.meshes import specs_of, with_auto_axes
from fnn.per_example.inputs import parameters
from fnn.precision import total, wide, widest


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

    weight, damping and ratio are in the widest of the parameters' dtypes, float32 at least.
    """

    count: chex.Array
    key: chex.PRNGKey
    factors: Any
    weight: chex.Array
    inverses: Any
    damping: chex.Array
    velocity: chex.ArrayTree
    ratio: chex.Array

    def __repr__(self) -> str:
        return text.of_fields("KFACState", **self._asdict())


def kfac(
    model: Callable,
    loss: Callable,
    example_batch: chex.ArrayTree,
    *,
    learning_rate: chex.Numeric | Callable | None = None,
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
    key: chex.PRNGKey | None = None,
    example_params: chex.ArrayTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """KFAC (Martens & Grosse 2015), for any network.

    The gradient is multiplied by the inverse of the damped Kronecker factors, and the step
    δ = −α P⁻¹∇L + μ δ_last minimises the quadratic model of the loss,

        M(δ) = ∇Lᵀδ + ½ δᵀ(GGN + λI) δ,

    over α and μ, with the exact GGN, two forward-mode passes (section 7). λ follows the rule of
    Levenberg and Marquardt: every few steps the loss's true reduction over the model's, ρ, makes
    it smaller where ρ > ¾ and larger where ρ < ¼ (section 6.5). Where the model is no good the
    step is halved until the loss itself, at the outputs z + J δ of the linearised network, falls
    by half of what the model foretold: a saturated softmax has next to no curvature, and the
    model's minimum lies far beyond it. No network is run for that.

    For gaussian_nll, whose GGN depends on the labels, the Fisher matrix takes its place. Factors
    and products are kept in float32 at least; inputs and gradients may be of any size whose
    square float32 holds.

    Args:
        model: `model(params, input)`, the outputs of one example, an array.
        loss: `loss(outputs, target)`, the loss of one example.
        example_batch: a batch `(inputs, targets)`, or its shapes; its values aren't looked at.
        learning_rate: a number or an optax schedule for α instead; then `momentum` is μ, and
            no step is halved.
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
        example_params: all parameters of the model, or their shapes, where only some are trained,
            as by `fnn.train_step(..., trainable=...)`: the optimiser is then given trees with None
            in the places of the others. The values aren't looked at.

    Returns:
        An optax optimiser. Its update takes the batch, too:

            updates, state = optimizer.update(gradient, state, params, batch=(inputs, targets))

        where the gradient is that of the mean loss; and, where only some parameters are trained,
        the tree of all, `all_params`. `fnn.train_step` passes both on.

    Raises:
        TypeError: an argument is of the wrong type, or a parameter is no real array.
        ValueError: an argument is out of range; update gets no params or no batch; parameters have
            None where the model needs arrays, and the others aren't known.
    """
    check_model("kfac", model)
    check_loss("kfac", loss)
    pair("kfac", example_batch, "example_batch")
    number = functools.partial(_number, "kfac")
    integer = functools.partial(arguments.integer, "kfac")
    damping = number("damping", damping, above=0)
    adapt_damping_every = integer("adapt_damping_every", adapt_damping_every, least=0)
    damping_decay = number("damping_decay", damping_decay, above=0, most=1)
    min_damping = number("min_damping", min_damping, least=0)
    max_damping = number("max_damping", max_damping, least=min_damping, infinite=True)
    factors_every = integer("factors_every", factors_every, least=1)
    inverses_every = integer("inverses_every", inverses_every, least=1)
    average = number("average", average, least=0, below=1)
    l2 = number("l2", l2, least=0)
    samples = integer("samples", samples, least=0)
    arguments.choice("kfac", "kind", kind, ("expand", "reduce"))
    if momentum is not None:
        momentum = number("momentum", momentum, least=0, below=1)
    if trust_region is not None:
        trust_region = number("trust_region", trust_region, above=0, infinite=True)
    if learning_rate is not None and not callable(learning_rate):
        number("learning_rate", learning_rate, least=0)
    key = jax.random.key(0) if key is None else arguments.key("kfac", "key", key)
    with_model = learning_rate is None
    look_back = momentum is None or momentum > 0 if with_model else bool(momentum)

    def new_factors(params, batch, key, others):
        draw = {"key": key, "samples": samples} if samples else {}
        of = with_others(model, others)
        return factors(of, loss, params, batch, kind=kind, part="fisher", **draw)

    def init(params):
        # Of types alone: how the arrays are laid out on a mesh doesn't matter.
        types = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        given = types(checked_params("kfac", params)), types(example_batch)
        others = others_of(params, types(example_params), "example_params")
        try:
            shapes = jax.eval_shape(new_factors, *given, key, others)
        except Exception as error:
            if example_params is None and (place := first_without_array(params)):
                error.add_note(f"kfac: {place} is None. {NOT_TOLD}")
            raise
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        dtype = widest(jnp.float32, *[x.dtype for x in parameters(params)[1]])
        return KFACState(
            jnp.zeros((), jnp.int32),
            # A copy: a step that donates its state must not take the caller's key along.
            jnp.copy(key),
            zeros,
            jnp.zeros((), dtype),
            jax.tree.map(jnp.copy, zeros),
            jnp.asarray(damping, dtype),
            jax.tree.map(jnp.zeros_like, params),
            jnp.ones((), dtype),
        )

    def update(gradient, state, params=None, *, batch=None, all_params=None, **unused):
        if params is None or batch is None:
            missing = "params" if params is None else "batch=(inputs, targets)"
            raise ValueError(
                f"kfac: update needs {missing}: update(gradient, state, params, batch=...)."
            )
        inputs, targets = pair("kfac", batch)
        check_like("kfac", "the gradient", gradient, params)
        others = others_of(params, all_params, "all_params")
        place = first_without_array(params)
        if place and example_params is None and jax.tree.leaves(others):
            raise ValueError(f"kfac: {place} isn't trained. {NOT_TOLD}")
        if place and example_params is not None and others is None:
            raise ValueError(
                f"kfac: {place} is None, so update needs the tree of all parameters: "
                "update(gradient, state, params, batch=..., all_params=...)."
            )
        # Where the parameters and the state are laid out, so is what comes of them.
        out = specs_of((gradient, state))
        args = gradient, state, params, (inputs, targets), others
        return with_auto_axes(once(step), args, out)

    def step(gradient, state, params, batch, others):
        inputs, targets = batch
        dtype = state.damping.dtype
        damping = state.damping + l2
        wide_params, gradient = _wide(params), _wide(gradient)
        if l2:
            gradient = jax.tree.map(lambda g, p: g + l2 * p, gradient, wide_params)
        factors, weight = _every(
            factors_every,
            state.count,
            lambda: _averaged(
                (state.factors, state.weight),
                new_factors(params, batch, jax.random.fold_in(state.key, state.count), others),
                average,
            ),
            (state.factors, state.weight),
        )
        inverses = _every(
            inverses_every,
            state.count,
            lambda: _inverted(factors, weight, damping),
            state.inverses,
        )
        direction = jax.tree.map(lambda f, g: -f.times(g), inverses, gradient, is_leaf=_is_factors)

        # Directions of entries up to one: so nothing overflows, whatever the units of the data.
        found = [direction, _wide(state.velocity)] if look_back else [direction]
        vectors, sizes = zip(*[_normalised(v, dtype) for v in found], strict=True)
        of = with_others(model, others)
        outputs = lambda p: jax.vmap(lambda x: one_array(of(p, x)))(inputs)
        z, push, _ = linearized(outputs, params)
        pushed = [push(_like(v, params)) for v in vectors]
        bend = output_hessian.products(loss, z, targets, "fisher")
        bent = [bend(u) for u in pushed]
        curved = _table(lambda i, j: _dot(pushed[i], bent[j]) / z.shape[0], vectors, dtype)
        inner = _table(lambda i, j: _dot(vectors[i], vectors[j]), vectors, dtype)
        slope = jnp.stack([_dot(gradient, v).astype(dtype) for v in vectors])
        quadratic = Quadratic.of(slope, curved + damping * inner)
        if with_model:
            x = quadratic.minimum()
        else:
            rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
            given = [rate, momentum] if look_back else [rate]
            x = jnp.stack([jnp.asarray(r, dtype) * s for r, s in zip(given, sizes, strict=True)])
        if trust_region is not None:
            length = quadratic.square(x) / 2
            tiny = float(jnp.finfo(dtype).tiny)
            x = x * jnp.sqrt(jnp.minimum(1, trust_region / jnp.maximum(length, tiny)))
        before = _mean(loss, z, targets).astype(dtype)
        if with_model:
            moved = _combined(x, pushed)

            def change(share):
                """The loss's, of the linearised network, and of what is quadratic besides."""
                there = z + share.astype(z.dtype) * moved
                rest = damping * (x @ inner @ x) / 2
                found = _mean(loss, there, targets).astype(dtype) - before + share**2 * rest
                if l2:
                    pull = jnp.stack([_dot(wide_params, v).astype(dtype) for v in vectors])
                    found += share * l2 * (pull @ x)
                return found

            x = x * share_of(change, slope @ x, before)
        delta = _like(_combined(x, vectors), params)

        adapted, ratio = state.damping, state.ratio
        if adapt_damping_every:

            def adapt():
                foretold = slope @ x + quadratic.square(x) / 2
                after = optax.apply_updates(params, delta)
                change = _mean(loss, outputs(after), targets).astype(dtype) - before
                if l2:
                    after = _wide(after)
                    squares = _dot(after, after) - _dot(wide_params, wide_params)
                    change += (0.5 * l2 * squares).astype(dtype)
                # Where nothing was foretold, at a minimum, nothing is learnt.
                is_known = foretold != 0
                ratio = jnp.where(foretold < 0, change / jnp.where(is_known, foretold, 1), 0)
                ratio = jnp.where(jnp.isfinite(ratio), ratio, 0)
                factor = damping_decay**adapt_damping_every
                new = jnp.where(ratio > 0.75, state.damping * factor, state.damping)
                new = jnp.where(ratio < 0.25, state.damping / factor, new)
                new = jnp.clip(new, min_damping, max_damping)
                return (
                    jnp.where(is_known, new, state.damping),
                    jnp.where(is_known, ratio, state.ratio),
                )

            adapted, ratio = _every(adapt_damping_every, state.count + 1, adapt, (adapted, ratio))
        new = KFACState(
            state.count + 1, state.key, factors, weight, inverses, adapted, delta, ratio
        )
        return delta, new

    return optax.GradientTransformationExtraArgs(init, update)


def _number(where: str, name: str, value: Any, **bounds: Any) -> Any:
    """A number, checked, as one of Python's, unless it is traced.

    Those give way to the dtype of what they meet; numpy's float64 makes float64 of float32.
    """
    arguments.number(where, name, value, **bounds)
    return float(value) if arguments.is_known(value) else value


# ------------------------------------------------------------------------------- the curvature


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
    invert = functools.partial(inverse, weight, damping)
    return jax.tree.map(invert, factors, is_leaf=_is_factors)


# ------------------------------------------------------------------------------------- the step


def _normalised(tree, dtype):
    """The tree divided by its largest entry, and that; zeros for zeros."""
    largest = functools.reduce(
        jnp.maximum,
        [jnp.max(jnp.abs(x), initial=0).astype(dtype) for x in jax.tree.leaves(tree)],
    )
    safe = jnp.where(largest >= float(jnp.finfo(jnp.float32).tiny), largest, 1)
    return jax.tree.map(lambda x: x / safe.astype(x.dtype), tree), safe


def _combined(x, vectors: Sequence):
    """Σ xᵢ vᵢ."""
    return jax.tree.map(
        lambda *vs: functools.reduce(
            jnp.add, [c.astype(v.dtype) * v for c, v in zip(x, vs, strict=True)]
        ),
        *vectors,
    )


def _table(entry: Callable, vectors: Sequence, dtype):
    places = range(len(vectors))
    return jnp.stack([jnp.stack([entry(i, j).astype(dtype) for j in places]) for i in places])


def _dot(u, v):
    """⟨u, v⟩ of two trees, in float32 at least."""
    pairs = zip(jax.tree.leaves(_wide(u)), jax.tree.leaves(_wide(v)), strict=True)
    return total([jnp.sum(a * b) for a, b in pairs])


def _mean(loss, z, targets):
    return jnp.mean(_wide(jax.vmap(loss)(z, targets)))


def _wide(tree):
    """In float32 at least."""
    return jax.tree.map(wide, tree)


def _like(tree, params):
    """In the parameters' dtypes."""
    return jax.tree.map(lambda x, p: x.astype(jnp.asarray(p).dtype), tree, params)
