"""`fnn.per_example.clipped_grad`: the sum of clipped per-example gradients, from one sweep."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnn.backprop import value_and_grad
from fnn.jaxpr import once
from fnn.per_example import quantities
from fnn.per_example.differentiate import batch_size, factored, keys_of, parameters

Groups = Callable[[str], str] | Mapping[str, Sequence[str]] | None


class Clipped(NamedTuple):
    """What `clipped_grad` returns.

    losses: (batch,).
    gradient: Σₙ cₙ gₙ (and noise), a tree like the parameters.
    norms: |gₙ| before clipping, (batch,); with groups a dict of such.
    aux: the loss's auxiliary data, None without.
    """

    losses: jax.Array
    gradient: Any
    norms: Any
    aux: Any


def clipped_grad(
    loss: Callable,
    clip_norm: float | Mapping[str, float],
    *,
    groups: Groups = None,
    has_aux: bool = False,
    noise_multiplier: float = 0.0,
    microbatch_size: int | None = None,
    sweeps: int | None = None,
) -> Callable:
    """The sum of per-example gradients, each scaled down to a norm of at most `clip_norm`:

        Σₙ gₙ min(1, C / |gₙ|)  +  σ C ξ,   ξ normal, where a noise multiplier σ is given.

    Divided by the (expected) batch size, it is what differentially private SGD gives to its
    optimiser (Abadi et al. 2016, "Deep learning with differential privacy"). One reverse sweep
    finds the factors, the norms follow from them, and the factors, weighted, are contracted to
    the sum (Bu et al. 2022, "Differentially private optimization on large model at small
    cost").

    Args:
        loss: `loss(params, example)` or `loss(params, example, key)`, as for
            `fnn.per_example.grads`.
        clip_norm: C. With groups each group is clipped to its own: a dict gives them, a number
            is shared, C / √(number of groups) for each, so that the whole has norm C at most.
        groups: parameters that are clipped together: a function from a path, as
            "['hidden']['W']", to a name, or a dict from names to beginnings of paths.
        has_aux: whether `loss` returns `(loss, aux)`.
        noise_multiplier: σ, the noise's standard deviation over C (with a dict over its
            Euclidean norm).
        microbatch_size: so many examples at a time, in a loop: for batches beyond memory.
        sweeps: 1: keep the factors until the norms are known. 2: find the norms, then sweep
            again for the gradient of Σₙ cₙ lossₙ, cₙ held fixed; slower, in less memory where
            the factors are large. None chooses: 2 where the factors hold more than twice as many
            numbers as any sweep keeps, as where large weights enter by other ways than products.

    Returns:
        A function `(params, batch, key=None, *, noise_key=None, mask=None, **static)` to
        `Clipped(losses, gradient, norms, aux)`. mask (batch,) is 0 for examples that don't
        count, such as those that pad a batch drawn by Poisson sampling.

    Raises:
        ValueError: a norm isn't positive, a group is missing, there is noise but no key, or an
            array's shape doesn't fit.
    """
    norms_given = list(clip_norm.values()) if isinstance(clip_norm, Mapping) else [clip_norm]
    if not all(isinstance(c, jax.core.Tracer) or c > 0 for c in norms_given):
        raise ValueError(f"clip_norm must be positive, but is {clip_norm}.")
    if isinstance(clip_norm, Mapping) and groups is None:
        raise ValueError("clip_norm is a dict of groups' norms, but no groups are given.")
    if sweeps not in (None, 1, 2):
        raise ValueError(f"sweeps must be 1, 2 or None, but is {sweeps}.")
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"microbatch_size must be at least 1, but is {microbatch_size}.")

    def of_batch(
        params: Any,
        batch: Any,
        key: Any = None,
        *,
        noise_key: Any = None,
        mask: jax.Array | None = None,
        **static: Any,
    ) -> Clipped:
        size = batch_size(batch)
        if noise_multiplier and noise_key is None:
            raise ValueError(
                f"noise_multiplier is {noise_multiplier}, so the noise needs a key: pass "
                "noise_key=..., a fresh one at each step."
            )
        mask = jnp.ones(size) if mask is None else jnp.asarray(mask)
        if mask.shape != (size,):
            raise ValueError(f"mask must have shape ({size},), but has shape {mask.shape}.")
        limits = _limits(params, clip_norm, groups)
        part = functools.partial(_clipped, loss, params, limits, groups, has_aux, sweeps, static)
        inputs = (batch, *keys_of(key, size))
        if microbatch_size is None or microbatch_size >= size:
            found = part(inputs, mask)
        else:
            found = _in_parts(part, (inputs, mask), size, microbatch_size)
        if noise_multiplier:
            scale = noise_multiplier * jnp.sqrt(sum(c**2 for c in limits.values()))
            found = found._replace(gradient=_with_noise(found.gradient, scale, noise_key))
        return found

    return of_batch


def _limits(params, clip_norm, groups) -> dict[str | None, float]:
    """The largest norm of each group."""
    if groups is None:
        return {None: clip_norm}
    paths, _, _ = parameters(params)
    names = dict.fromkeys(quantities.group_of(path, groups) for path in paths)
    if not isinstance(clip_norm, Mapping):
        return {name: clip_norm / math.sqrt(len(names)) for name in names}
    missing = [name for name in names if name not in clip_norm]
    if missing:
        raise ValueError(f"clip_norm has no entry for the groups {missing}.")
    return {name: clip_norm[name] for name in names}


def _clipped(loss, params, limits, groups, has_aux, sweeps, static, inputs, mask) -> Clipped:
    costs: dict[str, int] = {}
    one = lambda x: factored(loss, params, x, static, has_aux=has_aux, costs=costs)
    losses, grads = jax.vmap(one)(inputs)
    losses, aux = losses if has_aux else (losses, None)
    norms = quantities.norms(grads, groups)
    by_group = norms if groups is not None else {None: norms}
    # C / max(|g|, C) is min(1, C / |g|), at a gradient of zero too.
    weights = {
        name: mask.astype(n.dtype) * (limits[name] / jnp.maximum(n, limits[name]))
        for name, n in by_group.items()
    }
    if sweeps is None:
        # Measured, one sweep is faster and in less memory up to there and beyond: the second one
        # makes the first one's values wait.
        sweeps = 1 if groups is not None or costs["on top"] <= 2 * costs["residuals"] else 2
    if sweeps == 1:
        leaves, tree = jax.tree.flatten(grads, is_leaf=quantities._is_factored)
        name_of = lambda path: None if groups is None else quantities.group_of(path, groups)
        gradient = jax.tree.unflatten(
            tree, [g.weighted_sum(weights[name_of(g.path)]) for g in leaves]
        )
    else:
        gradient = _swept_again(loss, params, inputs, static, has_aux, weights, groups)
    return Clipped(losses, gradient, norms, aux)


def _swept_again(loss, params, inputs, static, has_aux, weights, groups):
    """The gradient of Σₙ cₙ lossₙ; for each group's weights its own."""

    def weighted(params, c):
        out = jax.vmap(lambda x: loss(params, *x, **static))(inputs)
        losses = out[0] if has_aux else out
        return jnp.sum(c.astype(losses.dtype) * losses)

    found = {
        name: value_and_grad(weighted)(params, lax.stop_gradient(c))[1]
        for name, c in weights.items()
    }
    if groups is None:
        return found[None]
    paths, _, tree = parameters(params)
    leaves = {name: jax.tree.leaves(g) for name, g in found.items()}
    chosen = [leaves[quantities.group_of(p, groups)][k] for k, p in enumerate(paths)]
    return jax.tree.unflatten(tree, chosen)


def _in_parts(part, batch, size: int, microbatch_size: int) -> Clipped:
    """The batch in parts of equal size and a rest, their gradients added up."""
    whole = size // microbatch_size * microbatch_size
    cut = lambda x: x[:whole].reshape(-1, microbatch_size, *x.shape[1:])
    parts = jax.tree.map(cut, batch)
    like = jax.eval_shape(part, *jax.tree.map(lambda x: x[0], parts))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like.gradient)

    def step(total, inputs):
        found = part(*inputs)
        total = jax.tree.map(jnp.add, total, found.gradient)
        return total, found._replace(gradient=None)

    total, found = once(functools.partial(lax.scan, step))(start, parts)
    found = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), found)
    if whole < size:
        rest = part(*jax.tree.map(lambda x: x[whole:], batch))
        total = jax.tree.map(jnp.add, total, rest.gradient)
        found = jax.tree.map(
            lambda x, y: jnp.concatenate([x, y]), found, rest._replace(gradient=None)
        )
    return found._replace(gradient=total)


def _with_noise(gradient, scale, key):
    leaves, tree = jax.tree.flatten(gradient)
    keys = jax.random.split(key, len(leaves))
    # JAX's complex normal numbers have variance 1 in both parts together, where C counts each.
    scales = [scale * (math.sqrt(2) if jnp.iscomplexobj(x) else 1) for x in leaves]
    noisy = [
        x + (s * jax.random.normal(k, x.shape, x.dtype)).astype(x.dtype)
        for x, s, k in zip(leaves, scales, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)
