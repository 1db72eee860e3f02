"""Looking at data before it is trained on or evaluated: nan, and labels that can't be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from fnn.batch import batch_size, example_types
from fnn.train.bad_input import check_no_nan
from fnn.train.labels import Labels, check_labels

FindLabels = Callable[[Any, Any, Any], tuple[Labels, ...]]  # of params, an example's types, a key


class BatchChecks:
    """Look at batch after batch: at each new kind of batch thoroughly, at the others quickly.

    Args:
        find: the labels that a loss reads: `find_labels` of the loss.
        values: look at values too, not only at shapes: nan in the first batch of each kind
            (structure, shapes and dtypes), labels there and in every batch of numpy arrays.
    """

    def __init__(self, find: FindLabels, values: bool):
        self._find = find
        self._values = values
        self._known: dict[Any, tuple[Labels, ...]] = {}

    def look_at(
        self, params: Any, batch: Any, key: Any, first: Callable[[], None] = lambda: None
    ) -> None:
        """Check a batch of arrays.

        Args:
            params, key: the loss's.
            batch: a tree of arrays.
            first: called before the thorough look at a new kind of batch.

        Raises:
            TypeError, ValueError: as `batch_size` and `check_values` do.
        """
        leaves, tree = jax.tree.flatten(batch)
        types = [(getattr(x, "shape", None), _dtype(x)) for x in (key, *leaves)]
        kind = (tree, type(key), *types)
        if kind not in self._known:
            if first is not None:
                first()
            batch_size(batch)
            labels = check_values(self._find, params, batch, key, "batch") if self._values else ()
            self._known[kind] = labels
            return
        on_host = [lb for lb in self._known[kind] if isinstance(leaves[lb.leaf], np.ndarray)]
        if on_host:
            check_labels(batch, tuple(on_host))


def check_values(
    find: FindLabels, params: Any, data: Any, key: Any, name: str
) -> tuple[Labels, ...]:
    """Look at all of the data, if its values are there to be seen; return its labels.

    Raises:
        ValueError: it holds nan, or a label that can't be one.
    """
    labels = find(params, example_types(data), key)
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(data)):
        check_no_nan(data, name)
        check_labels(data, labels, name)
    return labels


def _dtype(x: Any) -> Any:
    return getattr(x, "dtype", None)
