"""What a step descends on: the mean loss of a batch, its gradient, and what is found beside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn.backprop import value_and_grad
from fnn.batch import batch_size
from fnn.sharding import Layout
from fnn.train.devices import dealt
from fnn.train.loss import Loss, counting, example_losses, keys_of
from fnn.train.loss_scaling import unscaled
from fnn.train.microbatches import in_order, over_microbatches
from fnn.train.precision import cast, wide
from fnn.train.state import checked_model_state, typed_like


class Found(NamedTuple):
    """Of a batch.

    Fields:
        means: the mean `loss`, and that of each metric.
        losses: of each example.
        gradient: of the mean loss, a tree like the parameters that it was asked for.
        model_state: the network's new state.
    """

    means: dict[str, jax.Array]
    losses: jax.Array
    gradient: Any
    model_state: Any


@dataclasses.dataclass(frozen=True)
class Objective:
    """The mean loss of a batch.

    Fields:
        loss: of one example.
        compute: the dtype that parameters and examples are cast to; None for theirs.
        microbatches: in how many parts a batch is computed.
        layout: where parameters and batches lie, on a mesh of devices.
    """

    loss: Loss
    compute: Any = None
    microbatches: int = 1
    layout: Layout | None = None

    def value(
        self, params: Any, batch: Any, key: Any, model_state: Any, count: Any = None
    ) -> jax.Array:
        """The mean loss, in training, of the first `count` examples; of all unless given."""
        size = batch_size(batch)

        def part(state, rows):
            _, (means, _, new) = self._share(params, rows, size, count, state)
            return new, (), means["loss"]

        rows = (batch, keys_of(key, size), counting(size, count))
        if self.microbatches == 1:
            return part(model_state, rows)[2]
        _, _, each = over_microbatches(part, self.microbatches, rows, size, model_state, ())
        return _sum(each)

    def found(
        self,
        params: Any,
        whole: Callable[[Any], Any],
        batch: Any,
        key: Any,
        model_state: Any,
        *,
        count: Any = None,
        scale: Any = None,
    ) -> Found:
        """Value, gradient and the rest.

        Args:
            params: what the gradient is by.
            whole: of them, all parameters.
            batch: a tree of arrays with the examples along their first axes.
            key: split into one for each example; or None.
            model_state: the network's.
            count: how many of the batch's first examples count; all unless given.
            scale: of the loss in the backward pass; the gradient is divided by it. None for none.
        """
        size = batch_size(batch)

        def part(state, rows):
            def scaled(params):
                mean, rest = self._share(whole(params), rows, size, count, state)
                if scale is not None:
                    mean = wide(mean)
                    mean = mean * jnp.asarray(scale, mean.dtype)
                return mean, rest

            (_, (means, losses, new)), gradient = value_and_grad(scaled, has_aux=True)(params)
            return new, gradient, (means, losses)

        rows = (batch, keys_of(key, size), counting(size, count))
        if self.microbatches == 1:
            new, gradient, (means, losses) = part(model_state, rows)
        else:
            zeros = jax.tree.map(jnp.zeros_like, wide(params))
            new, gradient, each = over_microbatches(
                part, self.microbatches, rows, size, model_state, zeros
            )
            means = {name: _sum([m[name] for m, _ in each]) for name in each[0][0]}
            losses = in_order([losses for _, losses in each])
            gradient = typed_like(gradient, params)
        if scale is not None:
            gradient = unscaled(gradient, scale, params)
        return Found(means, losses, gradient, new)

    def _share(self, params: Any, rows: Any, size: int, count: Any, state: Any) -> Any:
        """`(mean, (means, losses, state))`: what some rows of a batch add to its means."""
        examples, keys, counts = rows
        here = batch_size(examples)
        if here != size and self.layout is not None and not self.layout.deals_out(here):
            # Whole on each device: of rows dealt out unevenly XLA can't compile every program.
            examples = dealt(self.layout, examples)
        given = cast(params, self.compute), cast(examples, self.compute)
        losses, metrics, new = example_losses(
            self.loss, *given, keys, train=True, state=state, layout=self.layout
        )
        if self.compute is not None:
            losses, metrics = wide((losses, metrics))

        def share(values):
            if counts is not None:
                flags = counts.reshape(-1, *[1] * (values.ndim - 1))
                dtype = jnp.result_type(values)
                if not jnp.issubdtype(dtype, jnp.inexact):
                    dtype = jnp.result_type(float)
                # In float16 the sum may be inf where the mean isn't.
                total = jnp.sum(wide(values.astype(dtype)), axis=0, where=flags)
                return (total / jnp.asarray(count, total.dtype)).astype(dtype)
            mean = jnp.mean(values, axis=0)
            return mean if here == size else mean * (here / size)

        means = {name: share(values) for name, values in {"loss": losses, **metrics}.items()}
        new = checked_model_state(new, state)
        if self.microbatches > 1:
            new = typed_like(new, state)
        return means["loss"], (means, losses, new)


def _sum(shares: list[jax.Array]) -> jax.Array:
    """The sum over all microbatches, of a list of arrays with one for each loop."""
    return sum((jnp.sum(share, axis=0) for share in shares[1:]), jnp.sum(shares[0], axis=0))
