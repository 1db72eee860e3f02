"""Data of any library as arrays that JAX computes in: the same numbers, or an error.

`fit`, `evaluate` and a training step all read their data here, so that what one of them takes, the
others take too. JAX itself would wrap an integer that doesn't fit 32 bits around, make inf of a
large float64, and drop the mask of a masked array, each without a word.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.train.state import path_name

_NOT_NUMBERS = {
    "O": "objects (of several types, or missing, or integers of more than 64 bits)",
    "S": "byte strings",
    "U": "strings",
    "M": "dates",
    "m": "lengths of time",
    "V": "records with fields",
}


def as_arrays(data: Any, name: str, *, only_arrays: bool = False) -> Any:
    """The data with each leaf an array: JAX's as they are, all others as numpy's.

    Arrays of other libraries are read by `__array__` or `__dlpack__`, and lists of numbers by
    numpy. Where JAX computes in 32 bits, 64 bits become 32: floats are rounded, integers must
    fit. A Python number is left as it is: it is no array, and `batch_size` says so. With
    `only_arrays`, for parameters, so are lists and whatever else isn't an array.

    Raises:
        TypeError: a leaf can't be read as an array of numbers; the message names it.
        ValueError: a number is too large for the dtype that JAX has for it, or a masked array
            has masked entries.
    """
    if all(map(_is_ready, jax.tree.leaves(data))):
        return data
    is_leaf = None if only_arrays else _is_list_of_values
    leaves, tree = jax.tree_util.tree_flatten_with_path(data, is_leaf=is_leaf)

    def convert(path, leaf):
        # numpy's own float64 and complex128 are floats and complex numbers of Python too.
        is_python = isinstance(leaf, (bool, int, float, complex))
        if isinstance(leaf, jax.Array) or (is_python and not isinstance(leaf, np.generic)):
            return leaf
        if only_arrays and not (hasattr(leaf, "__array__") or hasattr(leaf, "__dlpack__")):
            return leaf
        return _as_array(leaf, path_name(name, path))

    return jax.tree.unflatten(tree, [convert(path, leaf) for path, leaf in leaves])


def _is_ready(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        return True
    widest = jax.dtypes.canonicalize_dtype(np.float64)
    return type(leaf) is np.ndarray and _stays(leaf.dtype, widest)


@functools.lru_cache(maxsize=256)
def _stays(dtype: np.dtype, widest: np.dtype) -> bool:
    """Does JAX compute in this dtype, whose widest float is that one? (Asked at every step.)"""
    return _is_number(dtype) and _wanted(dtype) == dtype


def _is_list_of_values(entry: Any) -> bool:
    """Is it a list, of lists perhaps, of something other than arrays?"""
    if not isinstance(entry, list):
        return False
    while isinstance(entry, list) and entry:
        entry = entry[0]
    return isinstance(entry, (bool, int, float, complex, str, bytes, np.generic))


def _as_array(leaf: Any, place: str) -> Any:
    if _is_masked(leaf):
        raise ValueError(
            f"{place} is a masked array with masked entries, whose mask would be lost: fill them "
            "in (.filled(...)), or pass the mask as an array of its own for the loss to use."
        )
    array = _read(leaf, place)
    return array if isinstance(array, jax.Array) else _converted(array, place)


def _is_masked(leaf: Any) -> bool:
    if isinstance(leaf, list):
        return any(map(_is_masked, leaf))
    return isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf)


def _read(leaf: Any, place: str) -> Any:
    """A numpy array; a JAX array for what numpy has no dtype for."""
    problem: Exception | None = None
    try:
        array = np.asarray(leaf)
        if array.dtype != object or isinstance(leaf, np.ndarray) or not hasattr(leaf, "__dlpack__"):
            return array
    except Exception as error:  # whatever another library raises: rows that differ, a GPU's memory
        problem = error
    if hasattr(leaf, "__dlpack__"):
        try:
            return np.from_dlpack(leaf)
        except Exception:  # numpy has no bfloat16
            with contextlib.suppress(Exception):
                return jnp.from_dlpack(leaf, copy=True)
    raise TypeError(
        f"{place} is a {type(leaf).__name__}, which can't be read as an array: {problem}"
    ) from problem


def _converted(array: np.ndarray, place: str) -> np.ndarray:
    """The same numbers in the dtype that JAX has for them."""
    if not _is_number(array.dtype):
        what = _NOT_NUMBERS.get(array.dtype.kind, "no numbers")
        raise TypeError(
            f"{place} must be an array of numbers, but numpy reads it as an array of dtype "
            f"{array.dtype}: {what}."
        )
    wanted = _wanted(array.dtype)
    if wanted == array.dtype:
        return array
    if array.dtype.kind in "iu":
        limits = np.iinfo(wanted)
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            _refuse(array, (array < limits.min) | (array > limits.max), wanted, place)
        return array.astype(wanted)
    try:
        with np.errstate(over="raise"):
            return array.astype(wanted)
    except FloatingPointError:
        with np.errstate(over="ignore"):
            _refuse(array, np.isfinite(array) & ~np.isfinite(array.astype(wanted)), wanted, place)
        raise


def _refuse(array: np.ndarray, too_large: np.ndarray, wanted: np.dtype, place: str) -> None:
    where = tuple(int(i) for i in np.argwhere(too_large)[0])
    hint = (
        "" if jax.config.read("jax_enable_x64") else " (JAX computes in 32 bits: jax_enable_x64.)"
    )
    raise ValueError(
        f"{place} (shape {array.shape}, {array.dtype}) holds {array[where]} at index {where}, "
        f"which {wanted} can't hold.{hint}"
    )


def _is_number(dtype: np.dtype) -> bool:
    known = jnp.issubdtype(dtype, np.number) or dtype == np.bool_
    return known and dtype.kind != "m"  # numpy counts lengths of time among the integers


def _wanted(dtype: np.dtype) -> np.dtype:
    if dtype.kind == "f" and dtype.itemsize > 8:
        dtype = np.dtype(np.float64)
    elif dtype.kind == "c" and dtype.itemsize > 16:
        dtype = np.dtype(np.complex128)
    return jax.dtypes.canonicalize_dtype(dtype.newbyteorder("="))
