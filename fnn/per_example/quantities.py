"""What a batch's gradients tell, for whole trees of parameters.

Each function takes the tree that `fnn.per_example.grads` returned; its leaves have methods of
the same names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from fnn import arguments, text
from fnn.meshes import batch_spec, with_auto_axes
from fnn.per_example.gradient import FactoredGradient, exactly
from fnn.per_example.measured import LONGEST
from fnn.per_example.precision import divided, nonzero, norm_of, power_of_two
from fnn.per_example.sums import weighted_sums
from fnn.precision import total, widest

By = str | Callable[[str], str] | Mapping[str, Sequence[str]] | None


def sum(grads: Any) -> chex.ArrayTree:
    """Σₙ gₙ, the gradient of the sum of the losses: a tree like the parameters."""
    return _each(FactoredGradient.sum, grads)


def mean(grads: Any) -> chex.ArrayTree:
    """The gradient of the mean loss: a tree like the parameters."""
    return _each(FactoredGradient.mean, grads)


def weighted_sum(grads: Any, weights: chex.Array) -> chex.ArrayTree:
    """Σₙ cₙ gₙ for weights c (batch,): a tree like the parameters.

    It costs one matrix product for each weight, as a gradient does.

    Raises:
        TypeError: grads isn't a tree of factored gradients, or weights aren't real numbers.
        ValueError: weights are of another shape than (batch,).
    """
    arguments.array("weighted_sum", "weights", weights)
    return _each(lambda g: g.weighted_sum(weights), grads)


def norms(grads: Any, by: By = None) -> Any:
    """|gₙ|, the Euclidean norm of each example's gradient, without forming it.

    One position: |g aᵀ| = |g| |a| (Goodfellow 2015). Several: ⟨A Aᵀ, G Gᵀ⟩ (Li et al. 2022,
    "Large language models can be strong differentially private learners") or the formed Gᵀ A,
    whichever is cheaper; and the formed one for those examples whose positions cancel, so that
    the norm is within rounding of the materialised gradient's in any case.

    Args:
        grads: what `fnn.per_example.grads` returned.
        by: None for the norm over all parameters; "leaf" for each parameter's own; or groups
            of parameters: a function from a path, as "['hidden']['W']", to the group's name, or
            a dict from the name to the beginnings of the paths in it.

    Returns:
        An array (batch,), real, at least float32; with "leaf" a tree of them like the
        parameters, with groups a dict of them.

    Raises:
        ValueError: a parameter is in no group or in two, or no parameter in what a dict names.
        TypeError: a group's name is no string.
    """
    leaves, tree = _leaves(grads)
    names = None if by is None or by == "leaf" else groups_of([g.path for g in leaves], by, "by")
    if by == "leaf":
        return jax.tree.unflatten(tree, [g.norms() for g in leaves])

    def found(leaves):
        own = [g.norms() for g in leaves]
        return together(own) if names is None else _by_group(own, names)

    return with_auto_axes(found, (leaves,), batch_spec(leaves))


def norms_to_clip(grads: Any, names: Sequence[str] | None) -> tuple[Any, Any]:
    """The norms, and what they may grow to by rounding in a sum of the gradients, by group."""
    leaves, _ = _leaves(grads)
    names = [""] * len(leaves) if names is None else names
    measured = [g.measured() for g in leaves]
    norms = _by_group([m.norm for m in measured], names)
    rounding = _by_group([g.rounding(m) for g, m in zip(leaves, measured, strict=True)], names)
    return norms, {name: norms[name] + rounding[name] for name in norms}


def _by_group(norms: Sequence[jax.Array], names: Sequence[str]) -> dict[str, jax.Array]:
    of = {name: [n for n, own in zip(norms, names, strict=True) if own == name] for name in names}
    return {name: together(found) for name, found in of.items()}


def together(norms: Sequence[jax.Array]) -> jax.Array:
    """√Σ norms², of several parameters' norms (batch,)."""
    if len(norms) == 1:
        return norms[0]
    dtype = widest(*[n.dtype for n in norms])
    return norm_of(jnp.stack([n.astype(dtype) for n in norms]), (0,))


def groups_of(paths: Sequence[str], groups: By, name: str = "groups") -> list[str]:
    """The name of each path's group, checked: each path is in one, and each beginning in use.

    Args:
        paths: of all parameters.
        groups: a function from a path to a name, or a dict from names to beginnings of paths.
        name: the argument's name, for errors.
    """
    if callable(groups):
        found = [groups(path) for path in paths]
        for path, group in zip(paths, found, strict=True):
            if not isinstance(group, str):
                raise TypeError(
                    f"{name} must return a group's name, a str, but returned "
                    f"{arguments.show(group)} for {path}."
                )
        return found
    if not isinstance(groups, Mapping):
        also = 'None, "leaf"' if name == "by" else "None"
        raise (ValueError if isinstance(groups, str) else TypeError)(
            f"{name} must be {also}, a function from a path to a name, or a dict from a name to "
            f"beginnings of paths, but is {arguments.show(groups)}."
        )
    of: dict[str, str] = {}
    for group, beginnings in groups.items():
        is_list = isinstance(beginnings, Sequence) and not isinstance(beginnings, str)
        if not is_list or not all(isinstance(b, str) for b in (group, *beginnings)):
            raise TypeError(
                f"{name} must be a dict from names to lists of beginnings of paths, but for "
                f"{arguments.show(group)} it has {arguments.show(beginnings)}."
            )
        for beginning in beginnings:
            inside = [path for path in paths if path.startswith(beginning)]
            if not inside:
                raise ValueError(
                    f"{name}: no parameter's path begins with {beginning!r}, of the group "
                    f"{group!r}; the paths are {', '.join(paths)}."
                )
            for path in inside:
                if of.setdefault(path, group) != group:
                    raise ValueError(
                        f"{name}: the parameter {path} is in two groups: "
                        f"{of[path]!r} and {group!r}."
                    )
    for path in paths:
        if path not in of:
            raise ValueError(
                f"{name}: the parameter {path} is in none of the groups {sorted(groups)}: give a "
                "beginning of its path."
            )
    return [of[path] for path in paths]


def gram(grads: Any, others: Any = None) -> jax.Array:
    """⟨gₙ, hₘ⟩ for all pairs of examples, (batch, other batch): the empirical neural tangent
    kernel of the loss (Jacot et al. 2018); h are the same gradients unless `others` is given.

    For complex parameters the real part; so are `dot` and `norms` those of a real space.

    Raises:
        TypeError: grads or others isn't a tree of factored gradients.
        ValueError: they aren't of the same parameters.
    """
    others = grads if others is None else others
    leaves, others_leaves, _ = _same_parameters("gram", grads, others)
    return total([g.gram(h) for g, h in zip(leaves, others_leaves, strict=True)])


def dot(grads: Any, tree: chex.ArrayTree) -> jax.Array:
    """⟨gₙ, tree⟩ for each example, (batch,): how its loss changes in a direction.

    Args:
        grads: what `fnn.per_example.grads` returned.
        tree: arrays, of the parameters' structure and shapes.

    Raises:
        TypeError: grads isn't a tree of factored gradients, or the tree not of arrays.
        ValueError: the tree is of another structure, or one of its arrays of another shape.
    """
    leaves, expected = _leaves(grads)
    tensors, got = jax.tree.flatten(tree)
    if got != expected:
        raise ValueError(
            f"dot: the tree's structure must be the parameters', {expected}, but is {got}."
        )
    return total([g.dot(t) for g, t in zip(leaves, tensors, strict=True)])


def second_moment(grads: Any) -> chex.ArrayTree:
    """The mean over the examples of gₙ², entry by entry: a tree like the parameters.

    One position: (G²)ᵀ A² (Dangel et al. 2020, BackPACK).
    """
    return _each(FactoredGradient.second_moment, grads)


def variance(grads: Any) -> chex.ArrayTree:
    """The mean of (gₙ − mean)², entry by entry: a tree like the parameters."""
    return _each(FactoredGradient.variance, grads)


class Noise(NamedTuple):
    """What `noise` returns, both scalars.

    variance: tr Σ, of the examples' gradients.
    signal: |G|², of the true gradient; it may come out negative where the noise hides it.
    """

    variance: chex.Array
    signal: chex.Array


def noise(grads: Any) -> Noise:
    """tr Σ and |G|² of a batch, each without bias: average them over steps, then divide.

    From a batch of B (McCandlish et al. 2018, "An empirical model of large-batch training",
    appendix A.1, with small batches of one):

        |G|² = (B |ḡ|² − mean |gₙ|²) / (B − 1),   tr Σ = (mean |gₙ|² − |ḡ|²) B / (B − 1).

    Raises:
        TypeError: grads isn't a tree of factored gradients.
        ValueError: the batch has one example only.
    """
    found, unit = with_auto_axes(_noise, (grads,))
    return Noise(*[x * unit * unit for x in found])


@exactly
def _noise(grads: Any) -> tuple[Noise, jax.Array]:
    """Of the gradients over a unit as large as they are: no square over- or underflows."""
    leaves, _ = _leaves(grads)
    size = leaves[0].batch_size
    if size < 2:
        raise ValueError("the noise needs at least 2 examples, but the batch has 1.")
    norms = together([g.norms() for g in leaves])
    unit = power_of_two(jnp.max(norms))
    squares = jnp.mean(lax.square(divided(norms, unit)))
    means = [norm_of(weighted_sums(g.terms, None)) / size for g in leaves]
    mean = lax.square(divided(together(means), unit))
    cancels = ~(squares - mean > squares / LONGEST**2)

    def from_deviations(leaves):
        own = [g.scale(1 / nonzero(unit)) for g in leaves]
        return total([jnp.sum(g.variance()) for g in own]).astype(mean.dtype)

    # The mean of the squares less the square of the mean, where that keeps enough digits.
    trace = lax.cond(cancels, from_deviations, lambda leaves: squares - mean, leaves)
    trace = trace * size / (size - 1)
    return Noise(trace, mean - trace / size), unit


def noise_scale(grads: Any) -> jax.Array:
    """The simple gradient noise scale, tr Σ / |G|², a scalar; see `noise`.

    It is about the batch size beyond which a larger one hardly helps (McCandlish et al. 2018).

    Raises:
        TypeError, ValueError: as `noise`.
    """
    found, _ = with_auto_axes(_noise, (grads,))
    return found.variance / found.signal


def scale(grads: Any, factor: chex.Numeric) -> Any:
    """cₙ gₙ: the gradients times a number, or an array (batch,) of one for each example.

    Not `jax.tree.map(lambda x: c * x, grads)`: the tree's arrays are factors, of which each
    gradient is a product, so that norms and sums would come out wrong.

    Raises:
        TypeError: grads isn't a tree of factored gradients, or factor isn't of real numbers.
        ValueError: factor is neither a number nor of shape (batch,).
    """
    return _each(lambda g: g.scale(factor), grads)


def add(grads: Any, others: Any) -> Any:
    """gₙ + hₙ, example by example, of the same parameters; no arrays are added up, as by
    `jax.tree.map`, but the terms of both kept.

    Raises:
        TypeError: grads or others isn't a tree of factored gradients.
        ValueError: they aren't of the same parameters, or of as many examples.
    """
    leaves, others_leaves, tree = _same_parameters("add", grads, others)
    return jax.tree.unflatten(tree, [g.add(h) for g, h in zip(leaves, others_leaves, strict=True)])


def materialize(grads: Any) -> chex.ArrayTree:
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
        numbers = functools.reduce(lambda s, r: s + r["numbers"], self, 0)
        dense = functools.reduce(
            lambda s, r: s + r, {r["path"]: r["dense"] for r in self}.values(), 0
        )
        total = f"{numbers:,} numbers for one example, where its gradient has {dense:,}"
        hint = "The arrays are factors: use per_example.scale and add, not jax.tree.map."
        return "\n".join([text.table(heads, rows), total, hint])

    def __repr__(self) -> str:
        return text.one_screen(str(self))


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


def _same_parameters(where, grads, others):
    leaves, tree = _leaves(grads)
    others_leaves, others_tree = _leaves(others)
    if tree != others_tree:
        raise ValueError(
            f"{where}: both trees must be gradients of the same parameters, but one is {tree} and "
            f"the other {others_tree}."
        )
    return leaves, others_leaves, tree


def _each(function, grads):
    leaves, tree = _leaves(grads)
    return jax.tree.unflatten(tree, [function(g) for g in leaves])
