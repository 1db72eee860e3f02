"""`loss_surface`: the loss on a plane through the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments
from fnn.batch import batch_size as size_of
from fnn.precision import wide
from fnn.readings import Kept
from fnn.text import size_of_tree
from fnn.train.conversion import as_arrays
from fnn.train.loss import Loss, batch_losses, check_loss, check_model_state, extras
from fnn.train.state import State, floats_among, params_and_model_state, path_name


class LossSurface(NamedTuple):
    """What `loss_surface` returns; `fnn.plot.loss_surface` draws it.

    Fields:
        a, b: how far along the two directions, `(points,)` each, with 0 in the middle.
        losses: the loss at params + a[i] directions[0] + b[j] directions[1] as `losses[j, i]`,
            `(points, points)`.
        directions: two trees like the parameters.
    """

    a: np.ndarray
    b: np.ndarray
    losses: np.ndarray
    directions: tuple[Any, Any]

    def __repr__(self) -> str:
        """What there is, in a line; the numbers stay out of it."""
        n = len(self.a)
        finite = self.losses[np.isfinite(self.losses)]
        span = f"{finite.min():.3g} … {finite.max():.3g}" if finite.size else "none finite"
        return (
            f"LossSurface({n} x {n} losses, {span}, at 0 {self.losses[n // 2, n // 2]:.3g}; "
            f"directions: {size_of_tree(self.directions[0])} each)"
        )


def loss_surface(
    loss: Loss,
    params: chex.ArrayTree | State,
    data: Any,
    key: chex.PRNGKey | None = None,
    *,
    directions: tuple[chex.ArrayTree, chex.ArrayTree] | None = None,
    span: float = 1.0,
    points: int = 25,
    filter_axis: int = 0,
    model_state: chex.ArrayTree | None = None,
) -> LossSurface:
    """The mean loss at params + a d₁ + b d₂, for a and b from -span to span.

        surface = fnn.loss_surface(loss, result.params, (X, y), jax.random.key(0))
        fnn.plot.loss_surface(surface)

    The directions are drawn at random, normal, and filter-normalised: each filter of a direction
    (the weights of one output: W[i] of a W `(out, in, ...)`) is given the norm of the same filter
    of the parameters,

        d[i] ← d[i] / ‖d[i]‖ · ‖W[i]‖

    so that surfaces can be compared between networks whose weights differ in scale. Biases, and
    all else that has one axis or none, stay as they are, as in the paper; so do integers.

    Args:
        loss: for ONE example, as for `train_step`; a `mode` that it names is EVALUATE.
        params: the parameters; or a training State, for them and the network's state.
        data: arrays like `(X, y)`. The examples are computed at once for each point, the points
            one after the other, in one compiled program: a thousand examples show what there is.
        key: to draw the directions, and for a loss that takes a key (the same at each point).
        directions: two trees like params, in the place of random ones; taken as they are.
        span: how far to go; 1 is as far as the parameters are large.
        points: how many along each direction, an odd number, so that 0 is one of them.
        filter_axis: which axis of the weights runs over the outputs: 0 in fnn's layers, -1 in
            Flax's and Haiku's.
        model_state: the network's state, for a loss that takes one; by default that of a State.

    The program is kept as long as the loss is, as that of `evaluate`.

    Returns:
        A `LossSurface`. Losses may be inf or nan far out.

    Raises:
        TypeError, ValueError: the arguments aren't such, or don't fit each other.

    Li, Xu, Taylor, Studer & Goldstein, "Visualizing the loss landscape of neural nets", 2018,
    arXiv:1712.09913.
    """
    where = "loss_surface"
    check_loss(where, loss)
    span = float(arguments.number(where, "span", span, above=0))
    points = arguments.integer(where, "points", points, least=3)
    filter_axis = arguments.integer(where, "filter_axis", filter_axis)
    if points % 2 == 0:
        raise ValueError(f"{where}: points must be odd, so that 0 is one of them; got {points}.")
    if key is not None:
        arguments.key(where, "key", key)
    check_model_state(where, loss, model_state)
    params, model_state = params_and_model_state(params, model_state)
    arguments.no_result(where, "params", params)
    floats_among(where, params, "to move")
    found = extras(loss)
    if (found.needs_key or directions is None) and key is None:
        what = "the loss takes a key" if directions is not None else "the directions are random"
        raise TypeError(f"{where}: {what}: pass key=jax.random.key(0), say.")
    if found.needs_state and model_state is None:
        raise TypeError(
            f"{where}: the loss takes a state: pass the training state, result.state, in the place "
            "of params, or model_state=..."
        )
    data = as_arrays(data, "data")
    size_of(data, "data")
    loss_key = None
    if key is not None:
        first_key, second_key, loss_key = jax.random.split(key, 3)
    if directions is None:
        first = _normalised(params, first_key, filter_axis)
        directions = first, _normalised(params, second_key, filter_axis)
    else:
        directions = _checked(where, directions, params)
    steps = np.linspace(-span, span, points)
    steps[points // 2] = 0.0
    own_key = loss_key if found.needs_key else None
    with _kept.found_or(_Surface, loss) as surface:
        losses = surface.losses(params, *directions, data, own_key, model_state, steps)
    return LossSurface(steps, steps.copy(), np.asarray(losses, float), directions)


class _Surface:
    """The program of a surface.

    Args:
        loss: a function that returns the loss.
    """

    def __init__(self, loss: Callable[[], Loss]):
        traces: list[str] = []
        self.traces = traces

        @jax.jit
        def losses(params, first, second, data, key, state, steps):
            traces.append("losses")
            size = size_of(data)

            def at(place):
                def move(p, d, e):
                    if not jnp.issubdtype(p.dtype, jnp.inexact):
                        return p
                    a, b = place.astype(p.dtype)
                    return p + a * d.astype(p.dtype) + b * e.astype(p.dtype)

                moved = jax.tree.map(move, params, first, second)
                found, _, _ = batch_losses(loss(), moved, data, size, key, train=False, state=state)
                return jnp.mean(found)

            grid = jnp.stack(jnp.meshgrid(steps, steps), axis=-1)
            return jax.lax.map(at, grid.reshape(-1, 2)).reshape(len(steps), len(steps))

        self.losses = losses


_kept: Kept[_Surface] = Kept()


def _normalised(params: Any, key: Any, filter_axis: int) -> Any:
    """A random direction with the parameters' norms, filter by filter."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def of(leaf, key):
        leaf = jnp.asarray(leaf)
        if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros_like(leaf)
        if not -leaf.ndim <= filter_axis < leaf.ndim:
            raise ValueError(
                f"loss_surface: filter_axis is {filter_axis}, but a parameter has {leaf.ndim} axes."
            )
        others = tuple(a for a in range(leaf.ndim) if a != filter_axis % leaf.ndim)
        d = jax.random.normal(key, leaf.shape, leaf.dtype)
        square = lambda x: jnp.square(jnp.abs(wide(x)))  # which float16 may not hold
        norm = lambda x: jnp.sqrt(jnp.sum(square(x), axis=others, keepdims=True))
        ratio = norm(leaf) / jnp.maximum(norm(d), float(jnp.finfo(jnp.float32).tiny))
        return (wide(d) * ratio).astype(d.dtype)

    return jax.tree.unflatten(tree, [of(x, k) for x, k in zip(leaves, keys, strict=True)])


def _checked(where: str, directions: Any, params: Any) -> tuple[Any, Any]:
    if not isinstance(directions, (tuple, list)) or len(directions) != 2:
        raise TypeError(
            f"{where}: directions must be two trees like params, but got "
            f"{arguments.show(directions)}."
        )
    for number, direction in enumerate(directions):
        mine: Any = jax.tree.structure(direction)
        if mine != jax.tree.structure(params):
            raise ValueError(
                f"{where}: directions[{number}] must be a tree like params, "
                f"{arguments.shapes(params)}, but is {arguments.shapes(direction)}."
            )
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(direction), jax.tree.leaves(params), strict=True
        )
        for (path, d), p in pairs:
            if jnp.shape(d) != jnp.shape(p):
                name = path_name(f"directions[{number}]", path)
                raise ValueError(
                    f"{where}: {name} must have the parameter's shape {jnp.shape(p)}, but has "
                    f"{jnp.shape(d)}."
                )
    first, second = (jax.tree.map(jnp.asarray, d) for d in directions)
    return first, second
