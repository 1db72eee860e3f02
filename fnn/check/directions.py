"""A function of pytrees as one of a single vector of numbers, and directions to move it in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn import arguments
from fnn.operation.well_formed import kind


@dataclasses.dataclass(frozen=True)
class Static:
    """A leaf that isn't an array: equal only to one of the same kind."""

    value: Any

    def __eq__(self, other):
        same_kind = isinstance(other, Static) and kind(self.value) == kind(other.value)
        return same_kind and self.value == other.value

    def __hash__(self):
        try:
            return hash((type(self.value), self.value))
        except TypeError:
            return id(self.value)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the arguments. A complex one moves in its real and in its imaginary part."""

    path: str
    argument: str
    shape: tuple[int, ...]
    moves: bool
    is_complex: bool
    static: Static | None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape)) * (1 + self.is_complex) if self.moves else 0


@dataclasses.dataclass(frozen=True)
class Flat:
    """A function with its arguments as parts: one vector for each argument that moves."""

    function: Callable
    keywords: tuple[tuple[str, Any], ...]
    keyword_kinds: tuple[Any, ...]
    in_tree: Any
    leaves: tuple[Leaf, ...]

    @property
    def arguments(self) -> list[str]:
        """The names of those that move; x has a part for each."""
        return list(dict.fromkeys(leaf.argument for leaf in self.leaves if leaf.moves))

    @property
    def moving(self) -> list[Leaf]:
        return [leaf for leaf in self.leaves if leaf.moves]

    @property
    def sizes(self) -> list[int]:
        """Of the parts."""
        return [sum(x.size for x in self.leaves if x.argument == a) for a in self.arguments]

    def split(self, x, axis=0) -> list:
        return jnp.split(x, np.cumsum(self.sizes)[:-1], axis)

    def value(self, parts, fixed):
        """The result as it is, with parts and fixed arrays put back into the arguments."""
        rest = jnp.concatenate(parts) if parts else jnp.zeros(0)
        given, args, start = iter(fixed), [], 0
        for leaf in self.leaves:
            if leaf.static is not None:
                args.append(leaf.static.value)
            elif not leaf.moves:
                args.append(next(given))
            else:
                numbers = rest[start : start + leaf.size]
                start += leaf.size
                if leaf.is_complex:
                    numbers = lax.complex(*jnp.split(numbers, 2))
                args.append(numbers.reshape(leaf.shape))
        return self.function(*jax.tree.unflatten(self.in_tree, args), **dict(self.keywords))

    def of_parts(self, parts, fixed):
        """The result as one vector of its real numbers."""
        outs = [
            jnp.asarray(arguments.array("gradient check", "what the function returns", y))
            for y in jax.tree.leaves(self.value(parts, fixed))
        ]
        numbers = []
        for y in outs:
            if jnp.issubdtype(y.dtype, jnp.complexfloating):
                numbers += [jnp.real(y).ravel(), jnp.imag(y).ravel()]
            elif jnp.issubdtype(y.dtype, jnp.floating):
                numbers.append(y.ravel())
        return jnp.concatenate(numbers) if numbers else jnp.zeros(0)

    def __call__(self, x, fixed):
        return self.of_parts(self.split(x), fixed)

    def input_names(self) -> list[str]:
        return [n for leaf in self.leaves if leaf.moves for n in entry_names(leaf.path, leaf)]


def entry_names(path, leaf) -> list[str]:
    """A name for each number of an array: `x[0, 3]`."""
    places = [f"{list(map(int, i))}" if i else "" for i in np.ndindex(*leaf.shape)]
    if leaf.is_complex:
        return [f"{path}{p}.{part}" for part in ("real", "imag") for p in places]
    return [f"{path}{p}" for p in places]


def flatten(where, function, keywords, names, args, static_places=()) -> tuple[Flat, list]:
    """The function of one vector, and the arrays: numpy float64 or complex128 where they move."""
    paths, in_tree = jax.tree_util.tree_flatten_with_path(args)
    leaves, arrays = [], []
    for path, value in paths:
        place = path[0].idx
        label = names[place] + jax.tree_util.keystr(path[1:])
        is_static = place in static_places or not _is_array(value)
        aval = jax.typeof(0 if is_static else arguments.array(where, label, value))
        moves = bool(jax.dtypes.issubdtype(aval.dtype, jnp.inexact))
        is_complex = bool(jax.dtypes.issubdtype(aval.dtype, jnp.complexfloating))
        shape = tuple(aval.shape)
        static = Static(value) if is_static else None
        leaves.append(Leaf(label, names[place], shape, moves, is_complex, static))
        if moves:
            value = np.asarray(value)
            arrays.append(value.astype("complex128" if is_complex else "float64"))
        elif not is_static:
            arrays.append(value)
    if not any(leaf.moves for leaf in leaves):
        for name, value in zip(names, args, strict=True):
            if value is None:
                arguments.array(where, name, value)
        raise ValueError(
            f"{where}: there is nothing to differentiate: no argument is a floating-point array."
        )
    kinds = tuple(kind(v) for _, v in keywords)
    flat = Flat(function, keywords, kinds, in_tree, tuple(leaves))
    _refuse_lists(where, flat, arrays, names, args)
    return flat, arrays


def _refuse_lists(where, flat, arrays, names, args) -> None:
    """A list of numbers, or None, may be a pytree that the function takes, or a mistake."""

    def is_list(value):
        return isinstance(value, (list, tuple)) and all(np.shape(a) == () for a in value)

    doubtful = [i for i, value in enumerate(args) if value is None or is_list(value)]
    if not doubtful:
        return
    try:
        x, fixed = as_vector(flat, arrays)
        jax.eval_shape(flat, x, fixed)
    except (AttributeError, TypeError):
        for i in doubtful:
            arguments.array(where, names[i], args[i])
        raise


def _is_array(value) -> bool:
    return isinstance(value, (jax.Array, np.ndarray, np.generic, float, complex))


def as_vector(flat: Flat, arrays) -> tuple[np.ndarray, list]:
    """The vector x, and the arrays that stay."""
    given = [leaf for leaf in flat.leaves if leaf.static is None]
    moving, fixed = [], []
    for leaf, array in zip(given, arrays, strict=True):
        if not leaf.moves:
            fixed.append(array)
        elif leaf.is_complex:
            moving += [array.real.ravel(), array.imag.ravel()]
        else:
            moving.append(array.ravel())
    return np.concatenate(moving), fixed


def power_of_two(size) -> np.ndarray:
    """The power of two next to each number: steps of that size are exact."""
    with np.errstate(divide="ignore"):
        exponent = np.round(np.log2(np.abs(size)))
    return 2.0 ** np.clip(exponent, -1000, 1000)


def scales(flat: Flat, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How large a move of each number is, and of its array: powers of two.

    A number's scale is its own size, for zeros that of the array they are in, and 1 if all of
    it is zero.
    """
    own, arrays = np.ones_like(x), np.ones_like(x)
    for start, stop in leaf_slices(flat):
        size = np.abs(x[start:stop])
        usable = np.isfinite(size) & (size > 0)
        if usable.any():
            arrays[start:stop] = power_of_two(np.median(size[usable]))
        own[start:stop] = np.where(usable, power_of_two(size), arrays[start:stop])
    return own, arrays


def leaf_slices(flat: Flat) -> list[tuple[int, int]]:
    """Where each array that moves stands in x."""
    ends = np.cumsum([leaf.size for leaf in flat.leaves if leaf.moves])
    return [(int(end - leaf.size), int(end)) for end, leaf in zip(ends, flat.moving, strict=True)]


def random_moves(random: np.random.Generator, scale: np.ndarray) -> np.ndarray:
    """±½ to ±2 times the scale, in numbers of 16 bits, so that x + t v is exact."""
    size = np.round(random.uniform(0.5, 2.0, size=scale.shape) * 2.0**15) / 2.0**15
    return size * random.choice([-1.0, 1.0], size=scale.shape) * scale
