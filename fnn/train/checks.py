"""Looking at data before it is trained on or evaluated: nan, and labels that can't be."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnn.arguments import name_of
from fnn.batch import batch_size, example_types
from fnn.jaxpr import Equation, Program, program, trace
from fnn.operation import MappedCall, call_of
from fnn.ops import sigmoid_binary_cross_entropy
from fnn.train.loss import Loss, call
from fnn.train.state import path_name

# ---------------------------------------------------------------------------------- nan in the data


def check_no_nan(data: Any, name: str) -> None:
    """Look at every number of the data.

    Raises:
        ValueError: there is a nan; the message says where the first one is.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if _is_float(leaf) and _any_nan(leaf):
            where = tuple(int(i) for i in np.argwhere(np.isnan(np.asarray(leaf)))[0])
            raise ValueError(
                f"{path_name(name, path)} (shape {leaf.shape}, {leaf.dtype}) holds nan, first at "
                f"index {where}. (check=False turns this check off.)"
            )


def describe_nonfinite(data: Any, name: str = "batch") -> str:
    """Where the data holds inf or nan, in words; empty if nowhere."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if _is_float(leaf) and not getattr(leaf, "is_deleted", bool)():
            values = np.asarray(leaf)
            bad = np.argwhere(~np.isfinite(values))
            if len(bad):
                where = tuple(int(i) for i in bad[0])
                found.append(f"{path_name(name, path)} holds {values[where]} at index {where}")
    return ", ".join(found)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _any_nan(leaf: Any) -> bool:
    # The maximum carries a nan through, and needs no array of flags as large as the data.
    if leaf.size == 0:
        return False
    if isinstance(leaf, jax.Array):
        return bool(jnp.isnan(leaf).any())
    return bool(np.isnan(leaf.max()))


# ------------------------------------------------------------------------------------------- labels
# Labels: found in the loss, and checked against what the loss can take.
#
# An index out of range is no error on a device: a gather clamps it or gives nan, a one-hot
# vector comes out as zeros. But a loss knows its classes. In its trace, an fnn operation with
# an argument `labels` beside `logits` (or `scores`) of shape `(classes,)` says which entry of
# the example are labels, and how many classes there are. The labels of
# `fnn.ops.sigmoid_binary_cross_entropy` are probabilities, from 0 to 1.

# What leaves the numbers of an array as they are, and what it does to a numpy array.
_UNCHANGING: dict[str, Callable[..., np.ndarray]] = {
    "broadcast_in_dim": lambda x, shape, broadcast_dimensions, **_: np.broadcast_to(
        np.expand_dims(x, sorted({*range(len(shape))} - {*broadcast_dimensions})), shape
    ),
    "convert_element_type": lambda x, **_: x,
    "copy": lambda x, **_: x,
    "copy_p": lambda x, **_: x,
    "expand_dims": lambda x, dimensions, **_: np.expand_dims(x, dimensions),
    "reshape": lambda x, new_sizes, **_: x.reshape(new_sizes),
    "rev": lambda x, dimensions, **_: np.flip(x, dimensions),
    "slice": lambda x, start_indices, limit_indices, strides, **_: x[
        tuple(map(slice, start_indices, limit_indices, strides or [None] * x.ndim))
    ],
    "squeeze": lambda x, dimensions, **_: np.squeeze(x, tuple(dimensions)),
    "stop_gradient": lambda x, **_: x,
    "transpose": lambda x, permutation, **_: np.transpose(x, permutation),
}


class Labels(NamedTuple):
    """One array of labels in an example.

    Fields:
        leaf: which of the example's arrays (in the order of `jax.tree.leaves`).
        classes: how many classes there are: labels are 0, ..., classes - 1. None for
            probabilities.
        operation: the name of the operation that reads them.
        read: which entries of the array (of one example's) are labels, as the bytes of a boolean
            array of its shape; None for all.
    """

    leaf: int
    classes: int | None
    operation: str
    read: bytes | None = None

    def among(self, values: np.ndarray) -> np.ndarray:
        """Which entries of a batch's array are labels, to be broadcast over the examples."""
        if self.read is None:
            return np.array(True)
        return np.frombuffer(self.read, bool).reshape(values.shape[1:])

    def are_wrong(self, values: Any) -> Any:
        """Which of these values can't be such labels, nan included."""
        if self.classes is None:
            return ~((values >= 0) & (values <= 1))
        return (values < 0) | (values >= self.classes)

    @property
    def wanted(self) -> str:
        """What they should be, in words."""
        if self.classes is None:
            return "labels from 0 to 1"
        return f"logits of {self.classes} classes: labels are 0, ..., {self.classes - 1}"


# Their derivative is 0 wherever there is one.
_WITHOUT_GRADIENT = {"ceil", "floor", "round", "sign", "stop_gradient"}


def find_labels(
    loss: Loss,
    params: Any,
    example: Any,
    key: Any = None,
    state: Any = None,
    *,
    trained: Callable[[Any], Sequence[bool]] | bool = False,
) -> tuple[Labels, ...]:
    """The labels in an example that a loss hands to an operation as they are.

    Args:
        loss: as for `fnn.train_step`. It is looked at as it evaluates.
        params, example, key, state: arrays or their types; nothing is computed.
        trained: whether the loss is one to be trained, by its gradient; or of the parameters, for
            each leaf whether it is trained.

    Raises:
        ValueError: the loss is to be trained, and no parameter that is can change it.
    """
    leaves, tree = jax.tree.flatten(example)

    def of_leaves(params, key, state, *leaves):
        example = jax.tree.unflatten(tree, leaves)
        value, metrics, _ = call(loss, params, example, key, state=state)
        return [value, *jax.tree.leaves(metrics)]

    flat = program(trace(of_leaves, (params, key, state, *leaves)))
    flags = trained(params) if callable(trained) else [trained] * len(jax.tree.leaves(params))
    changing = [number for number, flag in zip(flat.inputs, flags, strict=False) if flag]
    if trained and not _has_gradient(flat, changing):
        which = "that it is given" if len(changing) == len(flags) else "that are trained"
        raise ValueError(
            f"the loss {name_of(loss)} doesn't depend on the parameters {which} (or only "
            "by steps: comparisons, argmax, round): its gradient is zero, and training wouldn't "
            "change them. (check=False turns this check off.)"
        )
    inputs = {number: i for i, number in enumerate(flat.inputs[-len(leaves) :])}
    came_from = _origins(flat)
    found = []
    for equation in flat.equations:
        classes_and_labels = _classes_and_labels(equation, flat)
        if classes_and_labels:
            classes, labels, operation = classes_and_labels
            origin, way = came_from.get(labels, (labels, ()))
            if origin in inputs:
                read = _entries_read(flat.avals[origin].shape, way)
                found.append(Labels(inputs[origin], classes, operation, read))
    return tuple(dict.fromkeys(found))


def check_labels(data: Any, labels: tuple[Labels, ...], name: str = "batch") -> None:
    """Look at every label of the data.

    Raises:
        ValueError: a label isn't among the classes, or a probability isn't from 0 to 1.
    """
    problem = describe_bad_labels(data, labels, name)
    if problem:
        raise ValueError(f"{problem} (check=False turns this check off.)")


def describe_bad_labels(data: Any, labels: tuple[Labels, ...], name: str = "batch") -> str:
    """Which label is out of range, in words; empty if none is."""
    leaves = jax.tree_util.tree_leaves_with_path(data)
    for kind in labels:
        path, values = leaves[kind.leaf]
        if values.size and kind.are_wrong(_extremes(values)).any():
            values = np.asarray(values)
            wrong = np.argwhere(kind.are_wrong(values) & kind.among(values))
            if not len(wrong):
                continue
            where = tuple(int(i) for i in wrong[0])
            index = where[0] if len(where) == 1 else where
            return (
                f"{path_name(name, path)} holds the label {values[where]} at index {index}, but "
                f"{kind.operation} gets {kind.wanted}."
            )
    return ""


def _extremes(values: Any) -> np.ndarray:
    """The smallest and the largest value; nan if there is one."""
    return np.array([values.min(), values.max()])


def _origins(flat: Program) -> dict[int, tuple[int, tuple[Equation, ...]]]:
    """For values that are another value, or a part of it, in another shape or dtype: that other
    value, and the equations on the way from it."""
    origins: dict[int, tuple[int, tuple[Equation, ...]]] = {}
    for equation in flat.equations:
        if equation.name in _UNCHANGING and len(equation.ins) == len(equation.outs) == 1:
            source, way = origins.get(equation.ins[0], (equation.ins[0], ()))
            origins[equation.outs[0]] = source, (*way, equation)
    return origins


def _entries_read(shape: tuple[int, ...], way: tuple[Equation, ...]) -> bytes | None:
    """Which entries of an array are left after these equations: see `Labels.read`."""
    if all(equation.name != "slice" for equation in way):
        return None
    places = np.arange(math.prod(shape)).reshape(shape)
    for equation in way:
        places = _UNCHANGING[equation.name](places, **equation.params)
    read = np.zeros(math.prod(shape), bool)
    read[places] = True
    return None if read.all() else read.tobytes()


def _has_gradient(flat: Program, params: list[int]) -> bool:
    """Is there a way from a parameter to the first output, all of it in real numbers?"""
    has_gradient = lambda equation: equation.name not in _WITHOUT_GRADIENT
    return flat.outputs[0] in flat.dependents(params, inexact=True, through=has_gradient)


def _classes_and_labels(equation: Equation, flat: Program) -> tuple[int | None, int, str] | None:
    """The number of classes (None for probabilities), the labels' value, the operation's name."""
    call = call_of(equation)
    if call is None:
        return None
    arguments = call.rule.argument_names(len(equation.ins))
    logits = next((i for i, n in enumerate(arguments) if n in ("logits", "scores")), None)
    if logits is None or "labels" not in arguments or len(arguments) != len(equation.ins):
        return None
    labels = equation.ins[arguments.index("labels")]
    if call.rule is sigmoid_binary_cross_entropy.rule:
        return None, labels, call.rule.name
    if not jnp.issubdtype(flat.avals[labels].dtype, jnp.integer):
        return None
    shape = list(flat.avals[equation.ins[logits]].shape)
    while isinstance(call, MappedCall):  # under vmap, the axes of the examples come off again
        axis = call.in_axes[logits]
        if axis is not None:
            del shape[axis]
        call = call.call
    return (shape[-1], labels, call.rule.name) if shape else None


# -------------------------------------------------------------------------------- batch after batch

# Of the parameters, an example's types, a key and the network's state.
FindLabels = Callable[[Any, Any, Any, Any], tuple[Labels, ...]]


class BatchChecks:
    """Look at batch after batch: at each new kind of batch thoroughly, at the others quickly.

    Args:
        find: the labels that a loss reads: `find_labels` of the loss.
        values: look at values too, not only at shapes: nan in the first batch of each kind
            (structure, shapes and dtypes), labels there and in every batch of numpy arrays.
        name: what a batch is called in errors.
    """

    def __init__(self, find: FindLabels, values: bool, name: str = "batch"):
        self._find = find
        self._values = values
        self._name = name
        self._known: dict[Any, tuple[Labels, ...]] = {}

    def look_at(
        self,
        params: Any,
        batch: Any,
        key: Any,
        state: Any,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Check a batch of arrays.

        Args:
            params, key, state: the loss's.
            batch: a tree of arrays.
            first: called before the thorough look at a new kind of batch.

        Raises:
            TypeError, ValueError: as `batch_size` and `check_values` do.
        """
        leaves, tree = jax.tree.flatten(batch)
        types = [(getattr(x, "shape", None), _dtype(x)) for x in (key, *leaves)]
        kind = (tree, type(key), *types)
        if kind not in self._known:
            first()
            batch_size(batch, self._name)
            given = (params, batch, key, state, self._name)
            find = functools.partial(check_values, self._find, *given)
            self._known[kind] = find() if self._values else ()
            return
        on_host = [lb for lb in self._known[kind] if isinstance(leaves[lb.leaf], np.ndarray)]
        if on_host:
            check_labels(batch, tuple(on_host), self._name)


def check_values(
    find: FindLabels, params: Any, data: Any, key: Any, state: Any, name: str
) -> tuple[Labels, ...]:
    """Look at all of the data, if its values are there to be seen; return its labels.

    Raises:
        ValueError: it holds nan, or a label that can't be one.
    """
    labels = find(params, example_types(data), key, state)
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(data)):
        check_no_nan(data, name)
        check_labels(data, labels, name)
    return labels


def _dtype(x: Any) -> Any:
    return getattr(x, "dtype", None)
