"""`fnn.per_example.clipped_grad`: the sum of clipped per-example gradients, from one sweep."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy
from jax import lax
from jax.sharding import PartitionSpec as P

from fnn import arguments, text
from fnn.backprop import value_and_grad
from fnn.batch import batch_size
from fnn.eager import once
from fnn.jaxpr import is_inexact
from fnn.meshes import batch_spec, specs_of, with_auto_axes
from fnn.per_example import quantities
from fnn.per_example.differentiate import factored
from fnn.per_example.inputs import join_static, keys_of, parameters, split_static
from fnn.per_example.precision import as_dtype
from fnn.per_example.sums import weighted_sums
from fnn.precision import wide, wide_dtype

_WHERE = "per_example.clipped_grad"
_ALL = ""  # the one group where none are given

Groups = Callable[[str], str] | Mapping[str, Sequence[str]] | None


class Clipped(NamedTuple):
    """What `clipped_grad` returns.

    losses: (batch,).
    gradient: Σₙ cₙ gₙ (and noise), a tree like the parameters.
    norms: |gₙ| before clipping, (batch,); with groups a dict of such. Also of examples that are
        masked out or, with nan_safe, left out: there it may be inf or nan.
    aux: the loss's auxiliary data, None without.
    """

    losses: chex.Array
    gradient: chex.ArrayTree
    norms: Any
    aux: Any

    def __repr__(self) -> str:
        return text.of_fields("Clipped", **self._asdict())


def clipped_grad(
    loss: Callable,
    clip_norm: chex.Numeric | Mapping[str, chex.Numeric],
    *,
    groups: Groups = None,
    has_aux: bool = False,
    noise_multiplier: chex.Numeric = 0.0,
    microbatch_size: int | None = None,
    sweeps: int | None = None,
    nan_safe: bool = False,
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
        clip_norm: C, positive; inf for no clipping. With groups each group is clipped to its own:
            a dict gives them, a number is shared, C / √(number of groups) for each, so that the
            whole has norm C at most.
        groups: parameters that are clipped together: a function from a path, as
            "['hidden']['W']", to a name, or a dict from names to lists of beginnings of paths.
            Each parameter is in one group, and each beginning in use.
        has_aux: whether `loss` returns `(loss, aux)`.
        noise_multiplier: σ, the noise's standard deviation over C (with a dict over its
            Euclidean norm).
        microbatch_size: so many examples at a time, in a loop: for batches beyond memory.
        sweeps: 1: keep the factors until the norms are known. 2: find the norms, then sweep
            again for the gradient of Σₙ cₙ lossₙ, cₙ held fixed; slower, in less memory where
            the factors are large. None chooses: 2 where the factors hold more than twice as many
            numbers as any sweep keeps, as where large weights enter by other ways than products;
            1 with groups, and in less than float32, where cₙ would be rounded.
        nan_safe: whether examples with a gradient that isn't finite contribute 0. Else one makes
            the sum nan. `norms` shows them: it is inf or nan there.

    Returns:
        A function `(params, batch, key=None, *, noise_key=None, mask=None, **static)` to
        `Clipped(losses, gradient, norms, aux)`. mask (batch,) is 0 or False for examples that
        don't count, such as those that pad a batch drawn by Poisson sampling: they contribute
        exactly 0, whatever they hold.

    Each |clipped gₙ| is at most C in rounding, too: where an example's positions cancel so far that
    its gradient is hardly more than rounding errors, these are added to the norm it is clipped by.
    Two sweeps in less than float32 don't keep that: cₙ and all that it multiplies are rounded.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a norm isn't positive, a group is missing, unknown or overlaps another, there
            is noise but no key or no finite norm, or an array's shape doesn't fit.
    """
    arguments.function(_WHERE, "loss", loss, "a function loss(params, example)")
    arguments.flag(_WHERE, "has_aux", has_aux)
    arguments.flag(_WHERE, "nan_safe", nan_safe)
    arguments.number(_WHERE, "noise_multiplier", noise_multiplier, least=0)
    if sweeps is not None:
        sweeps = arguments.integer(_WHERE, "sweeps", sweeps, least=1, most=2)
    if microbatch_size is not None:
        microbatch_size = arguments.integer(_WHERE, "microbatch_size", microbatch_size, least=1)
    norms = clip_norm if isinstance(clip_norm, Mapping) else {None: clip_norm}
    for name, norm in norms.items():
        what = "clip_norm" if name is None else f"clip_norm[{name!r}]"
        arguments.number(_WHERE, what, norm, above=0, infinite=True)
    if isinstance(clip_norm, Mapping) and groups is None:
        raise ValueError("clip_norm is a dict of groups' norms, but no groups are given.")
    is_noisy = isinstance(noise_multiplier, jax.core.Tracer) or noise_multiplier > 0
    is_finite = lambda c: isinstance(c, jax.core.Tracer) or float(c) < math.inf
    if is_noisy and not all(map(is_finite, norms.values())):
        raise ValueError(
            f"{_WHERE}: noise is in proportion to clip_norm, which must be finite then, but is "
            f"{clip_norm}."
        )

    def of_batch(
        params: chex.ArrayTree,
        batch: chex.ArrayTree,
        key: chex.PRNGKey | None = None,
        *,
        noise_key: chex.PRNGKey | None = None,
        mask: chex.Array | None = None,
        **static: Any,
    ) -> Clipped:
        size = batch_size(batch)
        if noise_key is not None:
            arguments.key(_WHERE, "noise_key", noise_key)
        elif is_noisy:
            raise ValueError(
                f"noise_multiplier is {noise_multiplier}, so the noise needs a key: pass "
                "noise_key=..., a fresh one at each step."
            )
        which = None if mask is None else _which(mask, size)
        paths, _, _ = parameters(params)
        names = None if groups is None else quantities.groups_of(paths, groups)
        limits = _limits(clip_norm, names)
        static_arrays, static_rest = split_static(static)

        def whole(params, inputs, which, limits, noise_key, static_arrays):
            given = join_static(static_arrays, static_rest)
            part = functools.partial(
                _clipped, loss, params, limits, names, has_aux, sweeps, nan_safe, given
            )
            if microbatch_size is None or microbatch_size >= size:
                found = part(inputs, which)
            else:
                # Divided over devices, XLA adds up wrongly what it can't divide evenly (seen with
                # the gradient of looked-up rows): each device finds all of a part.
                settle = (lambda x: lax.with_sharding_constraint(x, P())) if is_divided else None
                found = _in_parts(part, (inputs, which), size, microbatch_size, settle)
            if names is None:
                found = found._replace(norms=found.norms[_ALL])
            gradient = found.gradient
            if is_noisy:
                norm = quantities.together([jnp.asarray(c, float) for c in limits.values()])
                sigma = jnp.asarray(noise_multiplier).astype(norm.dtype)
                gradient = _with_noise(gradient, sigma * norm, noise_key)
            # In the parameters' dtypes at last: parts and noise are added in at least float32.
            gradient = jax.tree.map(lambda g, p: g.astype(jax.typeof(p).dtype), gradient, params)
            return found._replace(gradient=gradient)

        inputs = batch, *keys_of(key, size)
        by_example = batch_spec(batch)
        is_divided = by_example != P()
        of_aux = by_example if has_aux else None
        in_order: Any = by_example, specs_of(params), by_example, of_aux
        specs = Clipped(*in_order)
        given = params, inputs, which, limits, noise_key, static_arrays
        return with_auto_axes(whole, given, specs)

    return of_batch


def _which(mask: Any, size: int) -> jax.Array:
    """The mask as (batch,) True and False, checked."""
    arguments.array(_WHERE, "mask", mask)
    dtype = jax.typeof(mask).dtype
    if jnp.shape(mask) != (size,):
        raise ValueError(
            f"{_WHERE}: mask must have shape ({size},), but got {arguments.show(mask)}."
        )
    is_real = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
    if not (is_real or jnp.issubdtype(dtype, jnp.bool_)):
        raise TypeError(f"{_WHERE}: mask must hold True and False, but got {arguments.show(mask)}.")
    if not isinstance(mask, jax.core.Tracer):
        values = numpy.asarray(mask)
        if not ((values == 0) | (values == 1)).all():
            raise ValueError(
                f"{_WHERE}: mask must hold 1 for examples that count and 0 for others, but holds "
                f"{values[(values != 0) & (values != 1)][0]}. Examples are weighted in their loss."
            )
    return jnp.asarray(mask).astype(bool)


def _limits(clip_norm, names: Sequence[str] | None) -> dict[str, Any]:
    """The largest norm of each group."""
    if names is None:
        return {_ALL: clip_norm}
    names = list(dict.fromkeys(names))
    if not isinstance(clip_norm, Mapping):
        return {name: clip_norm / math.sqrt(len(names)) for name in names}
    missing = [name for name in names if name not in clip_norm]
    if missing:
        raise ValueError(f"clip_norm has no entry for the groups {missing}.")
    unknown = [name for name in clip_norm if name not in names]
    if unknown:
        raise ValueError(f"clip_norm has entries for {unknown}, but the groups are {names}.")
    return {name: clip_norm[name] for name in names}


def _clipped(
    loss, params, limits, names, has_aux, sweeps, nan_safe, static, inputs, which
) -> Clipped:
    """The gradient is in at least float32 here."""
    costs: dict[str, int] = {}
    one = lambda x: factored(loss, params, x, static, has_aux=has_aux, costs=costs)
    losses, grads = jax.vmap(one)(inputs)
    losses, aux = losses if has_aux else (losses, None)
    norms, sizes = quantities.norms_to_clip(grads, names)
    weights = {name: _factor(sizes[name], limits[name]) for name in norms}
    if nan_safe:
        finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, norms.values()))
        which = finite if which is None else which & finite
    if which is not None:
        weights = {name: jnp.where(which, c, jnp.zeros_like(c)) for name, c in weights.items()}
    if sweeps is None:
        # Measured, one sweep is faster and in less memory up to there and beyond: the second one
        # makes the first one's values wait.
        is_cheap = costs["on top"] <= 2 * costs["residuals"]
        is_half = any(map(_is_half, [losses, *jax.tree.leaves(grads)]))
        sweeps = 1 if names is not None or is_cheap or is_half else 2
    if sweeps == 1:
        leaves, tree = jax.tree.flatten(grads, is_leaf=quantities._is_factored)
        if which is not None:
            leaves = [g.keep(which) for g in leaves]
        of = [_ALL] * len(leaves) if names is None else names
        added = [
            as_dtype(weighted_sums(g.terms, weights[name]), wide_dtype(g.dtype))
            for g, name in zip(leaves, of, strict=True)
        ]
        gradient = jax.tree.unflatten(tree, added)
    else:
        gradient = _swept_again(loss, params, inputs, static, has_aux, weights, names, which)
        gradient = jax.tree.map(wide, gradient)
    return Clipped(losses, gradient, norms, aux)


def _is_half(x) -> bool:
    """Is it of real or complex numbers in less than float32?"""
    return is_inexact(x) and wide_dtype(x.dtype) != x.dtype


def _factor(norms: jax.Array, limit) -> jax.Array:
    """min(1, C / |g|); 1 at a gradient of zero and where C is inf, nan for nan."""
    limit = jnp.asarray(limit, norms.dtype)
    fits = norms <= limit
    return jnp.where(fits, jnp.ones_like(norms), limit / jnp.where(fits, 1, norms))


def _swept_again(loss, params, inputs, static, has_aux, weights, names, which):
    """The gradient of Σₙ cₙ lossₙ; for each group's weights its own."""
    if which is not None:
        # An example that doesn't count is swept as one that does: 0 · nan would be nan.
        place = jnp.where(which, jnp.arange(which.shape[0]), jnp.argmax(which))
        inputs = jax.tree.map(lambda x: x[place], inputs)

    def weighted(params, c):
        out = jax.vmap(lambda x: loss(params, *x, **static))(inputs)
        losses = out[0] if has_aux else out
        return jnp.sum(c.astype(losses.dtype) * losses)

    found = {
        name: value_and_grad(weighted)(params, lax.stop_gradient(c))[1]
        for name, c in weights.items()
    }
    _, _, tree = parameters(params)
    leaves = {name: jax.tree.leaves(g) for name, g in found.items()}
    of = [_ALL] * tree.num_leaves if names is None else names
    chosen = [leaves[name][k] for k, name in enumerate(of)]
    if which is not None:
        is_any = jnp.any(which)
        chosen = [jnp.where(is_any, x, jnp.zeros_like(x)) for x in chosen]
    return jax.tree.unflatten(tree, chosen)


def _in_parts(part, batch, size: int, microbatch_size: int, settle=None) -> Clipped:
    """The batch in parts of equal size and a rest, their gradients added up.

    settle: what is done to the arrays that go into a part and come out.
    """
    if settle is not None:
        batch, one = jax.tree.map(settle, batch), part
        part = lambda *inputs: jax.tree.map(settle, one(*jax.tree.map(settle, inputs)))
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
    """The gradient is in at least float32: in half precision noise would be of few values."""
    leaves, tree = jax.tree.flatten(gradient)
    keys = jax.random.split(key, len(leaves))
    # JAX's complex normal numbers have variance 1 in both parts together, where C counts each.
    scales = [scale * (math.sqrt(2) if jnp.iscomplexobj(x) else 1) for x in leaves]

    def noisy(x, scale, key):
        noise = jax.random.normal(key, x.shape, x.dtype)
        return x + jnp.asarray(scale).astype(noise.dtype) * noise

    return jax.tree.unflatten(tree, list(map(noisy, leaves, scales, keys)))
