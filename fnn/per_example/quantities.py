"""What a batch's gradients tell, for whole trees of parameters.

Each function takes the tree that `fnn.per_example.grads` returned; its leaves have methods of
the same names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn.per_example import terms as algebra
from fnn.per_example.gradient import FactoredGradient

By = str | Callable[[str], str] | Mapping[str, Sequence[str]] | None


def sum(grads: Any) -> Any:
    """Σₙ gₙ, the gradient of the sum of the losses: a tree like the parameters."""
    return _each(FactoredGradient.sum, grads)


def mean(grads: Any) -> Any:
    """The gradient of the mean loss: a tree like the parameters."""
    return _each(FactoredGradient.mean, grads)


def weighted_sum(grads: Any, weights: jax.Array) -> Any:
    """Σₙ cₙ gₙ for weights c (batch,): a tree like the parameters.

    It costs one matrix product for each weight, as a gradient does.
    """
    return _each(lambda g: g.weighted_sum(weights), grads)


def norms(grads: Any, by: By = None) -> Any:
    """|gₙ|, the Euclidean norm of each example's gradient, without forming it.

    One position: |g aᵀ| = |g| |a| (Goodfellow 2015). Several: ⟨A Aᵀ, G Gᵀ⟩ (Li et al. 2022,
    "Large language models can be strong differentially private learners") or the formed Gᵀ A,
    whichever is cheaper.

    Args:
        grads: what `fnn.per_example.grads` returned.
        by: None for the norm over all parameters; "leaf" for each parameter's own; or groups
            of parameters: a function from a path, as "['hidden']['W']", to the group's name, or
            a dict from the name to the beginnings of the paths in it.

    Returns:
        An array (batch,), real, at least float32; with "leaf" a tree of them like the
        parameters, with groups a dict of them.

    Raises:
        ValueError: a parameter is in no group.
    """
    leaves, tree = _leaves(grads)
    squares = [g.squared_norms() for g in leaves]
    if by == "leaf":
        return jax.tree.unflatten(tree, [jnp.sqrt(s) for s in squares])
    if by is None:
        return jnp.sqrt(_total(squares))
    found: dict[str, list[jax.Array]] = {}
    for g, square in zip(leaves, squares, strict=True):
        found.setdefault(group_of(g.path, by), []).append(square)
    return {name: jnp.sqrt(_total(s)) for name, s in found.items()}


def group_of(path: str, by: By) -> str:
    """The name of the group that a path is in."""
    if callable(by):
        return by(path)
    if not isinstance(by, Mapping):
        raise ValueError(
            f'by (or groups) must be None, "leaf", a function from a path to a name, or a dict '
            f"from a name to beginnings of paths, but is {by!r}."
        )
    for name, beginnings in by.items():
        if any(path.startswith(b) for b in beginnings):
            return name
    raise ValueError(
        f"the parameter {path} is in none of the groups {sorted(by)}: give a beginning of its path."
    )


def gram(grads: Any, others: Any = None) -> jax.Array:
    """⟨gₙ, hₘ⟩ for all pairs of examples, (batch, other batch): the empirical neural tangent
    kernel of the loss (Jacot et al. 2018); h are the same gradients unless `others` is given.

    For complex parameters the real part; so are `dot` and `norms` those of a real space.
    """
    leaves, tree = _leaves(grads)
    others_leaves, others_tree = (leaves, tree) if others is None else _leaves(others)
    if tree != others_tree:
        raise ValueError(
            f"gram: both trees must be gradients of the same parameters, but one is {tree} and "
            f"the other {others_tree}."
        )
    return _total([g.gram(h) for g, h in zip(leaves, others_leaves, strict=True)])


def dot(grads: Any, tree: Any) -> jax.Array:
    """⟨gₙ, tree⟩ for each example, (batch,): how its loss changes in a direction.

    Args:
        grads: what `fnn.per_example.grads` returned.
        tree: arrays, of the parameters' structure and shapes.
    """
    leaves, expected = _leaves(grads)
    tensors, got = jax.tree.flatten(tree)
    if got != expected:
        raise ValueError(
            f"dot: the tree's structure must be the parameters', {expected}, but is {got}."
        )
    return _total([g.dot(t) for g, t in zip(leaves, tensors, strict=True)])


def second_moment(grads: Any) -> Any:
    """The mean over the examples of gₙ², entry by entry: a tree like the parameters.

    One position: (G²)ᵀ A² (Dangel et al. 2020, BackPACK).
    """
    return _each(FactoredGradient.second_moment, grads)


def variance(grads: Any) -> Any:
    """The mean of (gₙ − mean)², entry by entry: a tree like the parameters."""
    return _each(FactoredGradient.variance, grads)


class Noise(NamedTuple):
    """What `noise` returns, both scalars.

    variance: tr Σ, of the examples' gradients.
    signal: |G|², of the true gradient; it may come out negative where the noise hides it.
    """

    variance: jax.Array
    signal: jax.Array


def noise(grads: Any) -> Noise:
    """tr Σ and |G|² of a batch, each without bias: average them over steps, then divide.

    From a batch of B (McCandlish et al. 2018, "An empirical model of large-batch training",
    appendix A.1, with small batches of one):

        |G|² = (B |ḡ|² − mean |gₙ|²) / (B − 1),   tr Σ = (mean |gₙ|² − |ḡ|²) B / (B − 1).
    """
    leaves, _ = _leaves(grads)
    size = leaves[0].batch_size
    if size < 2:
        raise ValueError("the noise needs at least 2 examples, but the batch has 1.")
    squares = jnp.mean(_total([g.squared_norms() for g in leaves]))
    mean = _total([jnp.sum(algebra._square(algebra._wide(g.mean())[0])) for g in leaves])
    signal = (size * mean - squares) / (size - 1)
    return Noise((squares - mean) * size / (size - 1), signal)


def noise_scale(grads: Any) -> jax.Array:
    """The simple gradient noise scale, tr Σ / |G|², a scalar; see `noise`.

    It is about the batch size beyond which a larger one hardly helps (McCandlish et al. 2018).
    """
    found = noise(grads)
    return found.variance / found.signal


def materialize(grads: Any) -> Any:
    """The gradients themselves: a tree of arrays (batch, *shape), as `vmap(grad)` returns."""
    return _each(FactoredGradient.materialize, grads)


def explain(grads: Any) -> Explanation:
    """Which parameter's gradients are kept how, why, and what that costs: print it."""
    leaves, _ = _leaves(grads)
    return Explanation([row for g in leaves for row in g.explain()])


class Explanation(list):
    """A list of dicts, one for each term of a parameter's gradients, that prints as a table."""

    def __str__(self) -> str:
        heads = ("parameter", "shape", "kept for one example", "numbers", "÷ dense", "because")
        rows = [
            (
                r["path"],
                str(r["shape"]),
                r["kept"],
                f"{r['numbers']:,}",
                f"{r['numbers'] / max(r['dense'], 1):.3f}",
                r["why"],
            )
            for r in self
        ]
        widths = [max(len(r[i]) for r in (heads, *rows)) for i in range(len(heads))]
        line = lambda r: "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip()
        numbers = functools.reduce(lambda s, r: s + r["numbers"], self, 0)
        dense = functools.reduce(
            lambda s, r: s + r, {r["path"]: r["dense"] for r in self}.values(), 0
        )
        total = f"{numbers:,} numbers for one example, where its gradient has {dense:,}"
        return "\n".join([line(heads), *map(line, rows), total])


def _is_factored(x) -> bool:
    return isinstance(x, FactoredGradient)


def _leaves(grads) -> tuple[list[FactoredGradient], Any]:
    leaves, tree = jax.tree.flatten(grads, is_leaf=_is_factored)
    for leaf in leaves:
        if not _is_factored(leaf):
            raise TypeError(
                "grads must be a tree of factored gradients, the second of what fnn.per_example."
                "grads returns (losses, grads = fnn.per_example.grads(loss)(params, batch)), but "
                f"holds {type(leaf).__name__}."
            )
    if not leaves:
        raise ValueError("grads is a tree without parameters.")
    return leaves, tree


def _each(function, grads):
    leaves, tree = _leaves(grads)
    return jax.tree.unflatten(tree, [function(g) for g in leaves])


def _total(arrays):
    return functools.reduce(jnp.add, arrays)
