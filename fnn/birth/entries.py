"""Entries of arrays that are nan or inf, and which of an operation's inputs they came from.

Whether an input is to blame is found by trying: the operation is done again with the inf and nan
of that input replaced by an ordinary number. So no operation needs a rule of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Index = tuple[int, ...]

# Two numbers, since each is outside the domain of something: acosh(0.5), atanh(1.5).
_ORDINARY = (0.5, 1.5)


def on_host(x: Any) -> np.ndarray:
    """The numbers of an array, to be looked at; small floats as float32."""
    array = np.asarray(x)
    return array.astype(np.float32) if array.dtype.kind == "V" or array.itemsize < 4 else array


def can_be_read(x: Any) -> bool:
    """Is it an array of real or complex numbers, all of it on this host?"""
    dtype = getattr(x, "dtype", None)
    is_number = dtype is not None and jax.dtypes.issubdtype(dtype, jnp.inexact)
    return is_number and getattr(x, "is_fully_addressable", True)


def is_bad(x: Any) -> bool:
    """Does it hold inf or nan?"""
    return can_be_read(x) and not np.isfinite(on_host(x)).all()


def worst_entry(x: Any) -> Index | None:
    """The place of the first nan, else of the first inf; None if all is finite."""
    if not can_be_read(x):
        return None
    array = on_host(x)
    for mask in (np.isnan(array), np.isinf(array)):
        if mask.any():
            return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), array.shape))
    return None


class Causes(NamedTuple):
    """Where an entry that isn't finite came from.

    Fields:
        followed: (which input, which entry) that handed it on; empty if it was born here.
        made_of: of a nan that was born here the infs among the inputs that it was made of.
    """

    followed: list[tuple[int, Index]]
    made_of: list[tuple[int, Index]]


def causes(apply: Callable[[list], Sequence], ins: Sequence, output: int, index: Index) -> Causes:
    """Where an entry of an operation's output came from, which is inf or nan.

    A nan was handed on if it isn't there once the inputs' nans are replaced; else it was born here,
    be it of infs. An inf was handed on if it isn't there once all that isn't finite is replaced.

    Args:
        apply: the operation, of a list of arrays; it returns its outputs.
        ins: the arrays.
        output, index: which output, which entry.
    """
    trial = _Trial(apply, ins, output, index)
    if not np.isnan(trial.entry({})):
        return Causes(trial.responsible(np.isinf, lambda y: not np.isfinite(y), np.isnan), [])
    found = trial.responsible(np.isnan, np.isnan)
    if found:
        return Causes(found, [])
    return Causes([], trial.responsible(np.isinf, lambda y: not np.isfinite(y), np.isnan))


class _Trial:
    """An operation, to be done again with other inputs."""

    def __init__(self, apply, ins, output, index):
        self.apply, self.ins, self.output, self.index = apply, list(ins), output, index
        self.arrays = {i: on_host(x) for i, x in enumerate(ins) if is_bad(x)}

    def entry(self, replaced: dict[int, Any]) -> Any:
        outs = self.apply([replaced.get(i, x) for i, x in enumerate(self.ins)])
        return on_host(outs[self.output])[self.index]

    def responsible(
        self, is_cause: Callable, is_wrong: Callable, also: Callable | None = None
    ) -> list[tuple[int, Index]]:
        """The inputs, with an entry of each, without which the result wouldn't be wrong.

        Args:
            is_cause: which entries of the inputs may be to blame.
            is_wrong: what the result must not be.
            also: which other entries are replaced in all trials.
        """
        masks = {i: is_cause(a) for i, a in self.arrays.items()}
        masks = {i: mask for i, mask in masks.items() if mask.any()}
        if not masks:
            return []
        out = {i: also(a) for i, a in self.arrays.items()} if also is not None else {}

        def still(kept: dict[int, np.ndarray]) -> bool:
            """Is the result wrong with only these entries kept as they are?"""
            changed = {}
            for i in self.arrays:
                mask = masks.get(i, np.zeros(self.arrays[i].shape, bool))
                mask = mask & ~kept[i] if i in kept else mask
                changed[i] = mask | out[i] if i in out else mask
            return all(
                is_wrong(
                    self.entry({i: self._with(i, m, x) for i, m in changed.items() if m.any()})
                )
                for x in _ORDINARY
            )

        if still({}):
            return []
        alone = [i for i, mask in masks.items() if still({i: mask})]
        # If it takes several together, as for a sum that overflows, each of them is one.
        return [(i, self._one_of(i, masks[i], still)) for i in alone or masks]

    def _one_of(self, i: int, mask: np.ndarray, still: Callable) -> Index:
        """An entry that suffices, by halving; the entry at the result's own place if that does."""

        def suffices(places: np.ndarray) -> bool:
            kept = np.zeros(mask.size, bool)
            kept[places] = True
            return still({i: kept.reshape(mask.shape)})

        if mask.ndim == len(self.index) and _has(mask, self.index):
            place = int(np.ravel_multi_index(self.index, mask.shape)) if mask.ndim else 0
            if suffices(np.array([place])):
                return self.index
        places = np.flatnonzero(mask)
        while len(places) > 1:
            first, second = np.array_split(places, 2)
            if suffices(first):
                places = first
            elif suffices(second):
                places = second
            else:
                break
        return tuple(int(k) for k in np.unravel_index(int(places[0]), mask.shape))

    def _with(self, i: int, mask: np.ndarray, number: float) -> Any:
        """An input with another number where the mask is."""
        x = self.ins[i]
        new = np.where(mask, np.asarray(number, np.asarray(x).dtype), np.asarray(x))
        if isinstance(x, jax.Array):
            return jax.device_put(new.astype(x.dtype), x.sharding)
        return jnp.asarray(new, jnp.asarray(x).dtype)


def _has(mask: np.ndarray, index: Index) -> bool:
    return all(k < n for k, n in zip(index, mask.shape, strict=True)) and bool(mask[index])
