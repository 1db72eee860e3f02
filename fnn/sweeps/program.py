"""The training of one member as a traceable function: from any step to any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnn.precision import wide_dtype
from fnn.sweeps.recipe import Recipe, as_floats_of
from fnn.train.data import take
from fnn.train.loss import batch_means, extras
from fnn.train.orders import sort_bits_of_epochs
from fnn.train.state import State

# Loops of known length have so many steps at most, where a member's state and a batch have so few
# numbers each.
MOST_KNOWN, FEW = 64, 2**18


class Shared(NamedTuple):
    """What all members use: arrays, of which there is one copy.

    Fields:
        data: a tree of arrays with the examples along their first axes.
        validation: the same, or None.
        key: the members' key, where it is one.
        start: their first parameters and network's state, where they are the same.
    """

    data: Any
    validation: Any
    key: Any
    start: Any


class Carry(NamedTuple):
    """What a member's training carries from step to step.

    Fields:
        state: parameters, optimiser's state and so on.
        sums: of the epoch under way, each metric's sum, weighted by examples; and the weights.
        history: for each quantity an array with an entry for each epoch, nan before it is over.
        finite: whether all parameters were finite at each epoch's end.
    """

    state: State
    sums: dict[str, jax.Array]
    history: dict[str, jax.Array]
    finite: jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """The training of one member of a group, of its numeric hyperparameters.

    Fields:
        recipe, static: what makes its step.
        batch_size, size: of a batch, and of the data.
        epochs: how many.
        shuffle: whether the data are shuffled anew in each epoch.
        pads: whether a smaller last batch is filled up with examples that don't count. Else, where
            examples know of each other, it is a step of its own shape.
        draws: whether the program draws the orders of the examples itself. On a CPU it is given
            them: see `fnn.train.orders`.
        asks: whether the device asks the host, at each turn of a loop whose number of turns isn't
            known when it is compiled, if there is another.
    """

    recipe: Recipe
    static: Mapping[str, Any]
    batch_size: int
    size: int
    validation_batch_size: int
    epochs: int
    shuffle: bool
    draws: bool
    asks: bool
    pads: bool = False

    @property
    def sizes(self) -> tuple:
        """All that decides what is computed besides the recipe and the static hyperparameters."""
        parts = self.batch_size, self.size, self.validation_batch_size, self.epochs
        flags = self.shuffle, self.draws, self.asks, self.pads
        return (*parts, *flags, self.recipe.injected)

    @property
    def whole(self) -> int:
        """How many batches of an epoch are whole."""
        return self.size // self.batch_size

    @property
    def rest(self) -> int:
        """How many examples the last batch has, if it isn't whole; else 0."""
        return self.size % self.batch_size

    @property
    def steps(self) -> int:
        """The number of steps in an epoch."""
        return self.whole + (self.rest > 0)

    # ---------------------------------------------------------------------------------- begin

    def begin(self, numeric: Mapping[str, Any], shared: Shared) -> Carry:
        """The carry before the first step."""
        hyper = {**self.static, **numeric}
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shared.data)
        state = self.recipe.begin(hyper, example, shared.start)
        _, metrics = jax.eval_shape(
            lambda state: self._stepping(hyper, state, shared)(
                state, take(shared.data, jnp.arange(self.batch_size)), jnp.int32(0), None
            ),
            state,
        )
        sums = {name: jnp.zeros(x.shape, wide_dtype(x.dtype)) for name, x in metrics.items()}
        sums[_WEIGHT] = jnp.zeros((), sums["loss"].dtype)
        record = jax.eval_shape(lambda s, c: self._record(hyper, s, c, shared), state, sums)
        history = {
            n: jnp.full((self.epochs, *x.shape), jnp.nan, x.dtype) for n, x in record.items()
        }
        return Carry(state, sums, history, jnp.ones(self.epochs, bool))

    # --------------------------------------------------------------------------------- advance

    def advance(
        self,
        carry: Carry,
        numeric: Mapping[str, Any],
        begin: Any,
        end: Any,
        orders: Any,
        shared: Shared,
    ) -> Carry:
        """Take the steps from number `begin` up to `end`, counted from 0 through all epochs.

        Both are arrays: one program takes any number of steps. `orders` are those of the examples
        in the epochs from that of `begin` on; None where the program draws them, or none is drawn.
        """
        hyper = {**self.static, **numeric}
        step = self._stepping(hyper, carry.state, shared)
        key = self._keys(hyper, shared)[0]
        rest = 0 if self.pads else self.rest
        in_loop = self.steps - (rest > 0)

        def advanced(carry: Carry, rows: Any, i: Any, count: Any) -> Carry:
            state, metrics = step(carry.state, take(shared.data, rows), i, count)
            size = rows.shape[0] if count is None else count
            return carry._replace(state=state, sums=_add(carry.sums, metrics, size))

        def rest_of_epoch(at: tuple) -> tuple:
            i, carry = at
            epoch = i // self.steps
            first = epoch * self.steps
            stop = jnp.minimum(end, first + self.steps)
            if orders is None:
                order = self._order(key, epoch + 1)
            else:
                order = lax.dynamic_index_in_dim(
                    orders, epoch - begin // self.steps, keepdims=False
                )

            if rest == 0 and self.rest:  # the last batch filled up with examples of its own
                more = jnp.arange(self.batch_size - self.rest) % self.rest
                order = jnp.concatenate([order, order[self.whole * self.batch_size + more]])

            def body(i, carry):
                start = (i - first) * self.batch_size
                count = None
                if self.pads:  # at least 1: a step behind the last counts for nothing, but is made
                    count = jnp.minimum(self.batch_size, jnp.maximum(1, self.size - start))
                rows = lax.dynamic_slice(order, (start,), (self.batch_size,))
                return advanced(carry, rows, i, count)

            last = jnp.minimum(stop, first + in_loop)
            if self.asks and self._is_small(carry.state, shared):
                carry = _in_known_loops(body, carry, i, last, first, in_loop)
            else:
                carry = lax.fori_loop(i, last, body, carry)
            is_over = stop == first + self.steps

            def close(carry):
                if rest:
                    carry = advanced(carry, order[self.size - rest :], stop - 1, None)
                return self._closed(hyper, carry, epoch, shared)

            return stop, lax.cond(is_over, close, lambda carry: carry, carry)

        return lax.while_loop(lambda at: at[0] < end, rest_of_epoch, (begin, carry))[1]

    def _is_small(self, state: State, shared: Shared) -> bool:
        """Whether a step takes so little that the host's answer would be felt."""
        numbers = sum(x.size for x in jax.tree.leaves(state))
        of_example = sum(x.size // x.shape[0] for x in jax.tree.leaves(shared.data))
        return max(numbers, self.batch_size * of_example) <= FEW

    def _order(self, key: Any, epoch: Any) -> jax.Array:
        """The order of the examples in an epoch, counted from 1: that of `fit`."""
        if not self.shuffle:
            return jnp.arange(self.size)
        return jax.random.permutation(jax.random.fold_in(key, epoch), self.size)

    def sort_bits(self, numeric: Mapping[str, Any], first: Any, shared: Shared, count: int) -> Any:
        """What makes the orders of `count` epochs from `first` on, counted from 0."""
        key = self._keys({**self.static, **numeric}, shared)[0]
        return sort_bits_of_epochs(key, first + 1, count, self.size)

    def _keys(self, hyper: Mapping[str, Any], shared: Shared) -> Any:
        """The keys of the order, of the loss and of the validation, as `fit` makes them."""
        key = self.recipe.key_of(hyper, shared.key)
        return (None,) * 3 if key is None else jax.random.split(key, 3)

    def _stepping(self, hyper: Mapping[str, Any], state: State, shared: Shared) -> Callable:
        """A function from a state, a batch and the step's number to the new state and metrics."""
        step = self.recipe.step(as_floats_of(state.params, hyper))
        key = self._keys(hyper, shared)[1]
        found = extras(step.loss)
        if found.needs_key and key is None:
            raise TypeError(
                "sweep: the loss takes a key: pass key=..., or an axis 'seed', which makes each "
                "member's."
            )

        def advanced(state, batch, i, count):
            own = jax.random.fold_in(key, i) if found.may_draw and key is not None else None
            # A member's inf and nan are its own affair, unless its bad steps are to be left out.
            look = step.traced.nonfinite == "skip"
            return step.traced(state, batch, own, True, count, look)[:2]

        return advanced

    # --------------------------------------------------------------------------- an epoch's end

    def _closed(self, hyper: Mapping[str, Any], carry: Carry, epoch: Any, shared: Shared) -> Carry:
        """Write the epoch's record into the history."""
        record = self._record(hyper, carry.state, carry.sums, shared)
        leaves = jax.tree.leaves(carry.state.params)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))
        return Carry(
            carry.state,
            jax.tree.map(jnp.zeros_like, carry.sums),
            {name: h.at[epoch].set(record[name]) for name, h in carry.history.items()},
            carry.finite.at[epoch].set(finite),
        )

    def _record(
        self, hyper: Mapping[str, Any], state: State, sums: dict[str, Any], shared: Shared
    ) -> dict[str, jax.Array]:
        weight = sums[_WEIGHT]
        record = {
            name: total / weight.astype(total.dtype)
            for name, total in sums.items()
            if name not in (_WEIGHT, "skipped")
        }
        if "skipped" in sums:
            record["skipped"] = sums["skipped"]
        if shared.validation is None:
            return record
        means = self._validated(hyper, state, shared)
        return record | {f"validation_{name}": value for name, value in means.items()}

    def _validated(
        self, hyper: Mapping[str, Any], state: State, shared: Shared
    ) -> dict[str, jax.Array]:
        loss = self.recipe.validation_loss(as_floats_of(state.params, hyper))
        key = self._keys(hyper, shared)[2]
        if not extras(loss).needs_key:
            key = None
        elif key is None:
            raise TypeError("sweep: the validation loss takes a key: pass key=...")
        data, size = shared.validation, self.validation_batch_size
        total = jax.tree.leaves(data)[0].shape[0]

        def sums(i):
            count = jnp.minimum(size, total - i * size)
            # A smaller last batch is filled up with examples of its own, as in `evaluate`.
            batch = take(data, i * size + jnp.arange(size, dtype=jnp.int32) % count)
            own = None if key is None else jax.random.fold_in(key, i)
            options = {"state": state.model_state, "count": count if total % size else None}
            means = batch_means(loss, state.params, batch, size, own, **options)
            wide = {n: x.astype(wide_dtype(x.dtype)) for n, x in means.items()}
            return {n: x * count.astype(x.dtype) for n, x in wide.items()}

        parts = lax.map(sums, jnp.arange(-(-total // size), dtype=jnp.int32))
        return {name: jnp.sum(x, axis=0) / total for name, x in parts.items()}


def _in_known_loops(
    body: Callable, carry: Carry, begin: Any, end: Any, first: Any, count: int
) -> Carry:
    """`lax.fori_loop(begin, end, body, carry)` in loops whose lengths are known.

    They are cut from the epoch's `count` steps, from number `first` on. What they do before `begin`
    and from `end` on counts for nothing.
    """
    run = jax.jit(body)
    if jax.make_jaxpr(run)(first, carry).effects:  # what it prints would tell of such steps
        return lax.fori_loop(begin, end, body, carry)
    parts = -(-count // MOST_KNOWN)
    length = -(-count // parts)

    def part(number: Any, carry: Carry) -> Carry:
        def one(carry: Carry, i: Any) -> tuple[Carry, None]:
            counts = (begin <= i) & (i < end)
            choose = lambda new, old: jnp.where(counts, new, old)
            return jax.tree.map(choose, run(i, carry), carry), None

        start = first + number * length
        return lax.scan(one, carry, start + jnp.arange(length, dtype=jnp.int32))[0]

    if parts == 1:
        return part(0, carry)
    return lax.fori_loop((begin - first) // length, -(-(end - first) // length), part, carry)


# The place of the weights among the sums: no metric has an empty name.
_WEIGHT = ""


def _add(sums: dict[str, Any], metrics: dict[str, Any], size: Any) -> dict[str, Any]:
    """Add a step's metrics. As in `fit`, those of a step that was skipped don't count."""
    skipped = metrics.get("skipped", jnp.zeros(()))
    new = {}
    for name, old in sums.items():
        if name == _WEIGHT:
            new[name] = old + jnp.asarray(size, old.dtype) * (1 - skipped).astype(old.dtype)
        elif name == "skipped":
            new[name] = old + skipped.astype(old.dtype)
        else:
            x = metrics[name].astype(old.dtype) * jnp.asarray(size, old.dtype)
            new[name] = old + (jnp.where(skipped > 0, 0, x) if "skipped" in metrics else x)
    return new
