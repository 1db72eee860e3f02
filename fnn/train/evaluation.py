"""`evaluate`: the loss and the metrics on data that isn't trained on.

A loss is compiled once and kept, with a list of what it read besides its arguments.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import chex
import jax
import numpy as np

from fnn import arguments
from fnn.batch import batch_size as size_of
from fnn.batch import types_of
from fnn.meshes import beside
from fnn.readings import Kept
from fnn.sharding import Layout
from fnn.train.checks import BatchChecks, Labels, check_values, find_labels
from fnn.train.conversion import as_arrays
from fnn.train.data import Arrays, Stream, batches_of, filled, fold_in
from fnn.train.devices import Placed, check_layout, everywhere, on_its_mesh, settled
from fnn.train.loss import Loss, batch_means, check_loss, check_model_state, extras
from fnn.train.result import stacked, weighted_mean
from fnn.train.state import State, params_and_model_state, path_name


@on_its_mesh
def evaluate(
    loss: Loss,
    params: chex.ArrayTree | State,
    data: Any,
    *,
    batch_size: int | None = None,
    key: chex.PRNGKey | None = None,
    check: bool = True,
    model_state: chex.ArrayTree | None = None,
    layout: Layout | None = None,
) -> dict[str, float]:
    """The mean loss and metrics over all examples of the data, each counted once.

    Args:
        loss: as for `train_step`, for one example. A `mode` that it names is EVALUATE.
        params: the parameters; or a training State, `result.state`, for them and the network's.
        data: arrays like `(X, y)`, or an iterable of batches, as for `fit`.
        batch_size: how many examples at once, for arrays; 128 by default.
        key: for a loss that takes one.
        check: look at the values of the data too, as `fit` does: nan, and labels out of range.
        model_state: the network's state, for a loss that takes one; by default that of a State.
        layout: how parameters and batches are divided over devices, as for `fit`.

    Returns:
        `{"loss": ..., metric: ...}` as Python floats (arrays for metrics that are arrays).

    Raises:
        TypeError, ValueError: as in `fit`, for the data.

    A loss is compiled at its first evaluation, for each shape of batch, and again if what it
    reads besides its arguments has changed since: variables that it closes over, globals,
    attributes of its object. (Attributes read by a computed name aren't seen.) The program
    is kept as long as the loss is, and doesn't keep the loss. A smaller last batch is filled up
    with examples that don't count, so that it needs no program of its own.
    """
    check_loss("evaluate", loss)
    arguments.flag("evaluate", "check", check)
    check_layout("evaluate", layout, extras(loss).mode is not None)
    if key is not None:
        arguments.key("evaluate", "key", key)
    check_model_state("evaluate", loss, model_state)
    params, model_state = params_and_model_state(params, model_state)
    params = _checked(params)
    found = extras(loss)
    if found.needs_key and key is None:
        raise TypeError("the loss takes a key: pass key=...")
    if found.needs_state and model_state is None:
        raise TypeError(
            "the loss takes a state: pass the training state, evaluate(loss, result.state, data), "
            "or model_state=..."
        )
    model_state = as_arrays(
        {} if model_state is None else model_state, "model_state", only_arrays=True
    )
    source = batches_of("evaluate", data, batch_size=batch_size, shuffle=False, epochs=1)
    with evaluation_of(loss) as evaluation:
        return evaluation.means(params, model_state, source, key, check, layout=layout)


def _checked(params: Any) -> Any:
    """Parameters as arrays. (They get no gradient here: integers may be among them.)"""
    arguments.no_result("evaluate", "params", params)
    if params is None:
        raise TypeError("evaluate: params must be a tree of arrays, but got None.")
    params = as_arrays(params, "params", only_arrays=True)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        arguments.array("evaluate", path_name("params", path), leaf)
    return params


class Evaluation:
    """The program that evaluates one loss, and what is known of the labels that it reads.

    Args:
        loss: a function that returns the loss: a weak reference, where the loss mustn't be held.
    """

    def __init__(self, loss: Callable[[], Any]):
        self._loss = loss
        self._labels: dict[Any, tuple[Labels, ...]] = {}
        # No method of self's is jitted: a cycle would keep what the program holds for a while.
        traces: list[str] = []
        self.traces = traces

        @functools.partial(jax.jit, static_argnums=5)
        def means(params, state, batch, count, key, layout):
            traces.append("means")
            options = {"state": state, "count": count, "layout": layout}
            found = batch_means(loss(), params, batch, size_of(batch), key, **options)
            return found if layout is None else everywhere(layout, found)

        self._means = means

    def means(
        self,
        params: Any,
        state: Any,
        source: Arrays | Stream,
        key: Any,
        check: bool,
        name: str = "data",
        layout: Layout | None = None,
    ) -> dict[str, Any]:
        """The mean loss and metrics over all batches; see `evaluate`.

        A call of the device for each batch, and their mean in 64 bits on the host: batches may be
        a stream's, or lie on a mesh, and a convolution may be slow in a loop. (`fnn.sweep` does
        evaluate in a loop, as it trains: its data are arrays on one device.)
        """
        own_key = key if extras(self._loss()).needs_key else None
        if check and isinstance(source, Arrays):
            check_values(self.find_labels, params, source.data, own_key, state, name)
        called = source.batch if isinstance(source, Stream) else "batch"
        checks = BatchChecks(self.find_labels, check and isinstance(source, Stream), called)
        batches = source.epoch(key)
        if layout is None:
            look_at = lambda batch: checks.look_at(params, batch, own_key, state)
        else:
            types = params, own_key, state
            look_at = lambda batch: None
            look_first = lambda batch: checks.look_at(types[0], batch, *types[1:])
            batches = Placed(source, layout, look_first).epoch(key)
            params = layout.place(params)
            state, own_key = layout.spread(state), layout.spread(own_key)
        means, sizes = [], []
        even = isinstance(source, Arrays) and source.sizes[-1] == source.sizes[0]
        for i, (batch, is_last) in enumerate(_with_last(batches)):
            look_at(batch)
            sizes.append(size_of(batch))
            fill = sizes[-2] if is_last and len(sizes) > 1 and sizes[-1] < sizes[-2] else None
            batch = filled(batch, fill) if layout is None else settled(layout, batch, fill)
            count = None if even else np.int32(sizes[-1])
            placed = beside((params, state), batch)
            means.append(self._means(*placed, batch, count, fold_in(own_key, i), layout))
        if not means:
            raise ValueError(f"{name} has no batches to evaluate.")
        return weighted_mean(stacked(jax.device_get(means)), np.array(sizes))

    def find_labels(self, params: Any, example: Any, key: Any, state: Any) -> tuple[Labels, ...]:
        """`find_labels` of the loss, done once for arguments of the same types."""
        types = types_of((params, example, key, state))
        if types not in self._labels:
            self.traces.append("labels")
            self._labels[types] = find_labels(self._loss(), params, example, key, state)
        return self._labels[types]


def _with_last(entries: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Pairs of an entry and whether it is the last one."""
    nothing = object()
    before = nothing
    for entry in entries:
        if before is not nothing:
            yield before, False
        before = entry
    if before is not nothing:
        yield before, True


def evaluation_of(loss: Loss) -> contextlib.AbstractContextManager[Evaluation]:
    """The Evaluation of a loss: the one of before, if the loss still reads the same.

    It is found by the loss's identity and dropped with the loss.
    """
    return _kept.found_or(Evaluation, loss)


_kept: Kept[Evaluation] = Kept()
