"""A batch cut into microbatches, which are computed one after the other in one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn.meshes import EVERYWHERE, explicit_mesh, of_rows, spec_of


def over_microbatches(
    function: Callable[[Any, Any], tuple[Any, Any, Any]],
    count: int,
    rows: Any,
    size: int,
    state: Any,
    total: Any,
) -> tuple[Any, Any, list[Any]]:
    """Call a function on each microbatch; add up what it says to.

    Microbatch i of k gets the rows i, i + k, i + 2k, ...: on a mesh, each then lies on all of the
    devices that the batch lies on (as a whole on each, if it can't be dealt out evenly). If k
    doesn't divide their number, the first rows make microbatches of one more example (two loops,
    and none of them padded).

    Args:
        function: `(state, rows) -> (state, share, each)`.
        count: k. Of fewer rows, as many microbatches as there are rows.
        rows: a tree of arrays; the first axis of each runs over the examples.
        size: their number.
        state: passed from microbatch to microbatch. It keeps its types.
        total: zeros like `share`.

    Returns:
        `(state, total, each)`: the last state, the sum of the shares, and for each loop what
        the function returned last, stacked along a first axis over its microbatches.
    """
    least, more = divmod(size, count)
    rows, with_keys = _keys_as_numbers(rows)
    found, start = [], 0
    for number, length in ((more, least + 1), (count - more, least)):
        if number and length:
            part = _cut(rows, start, number, length)
            start += number * length

            def body(carry, i, part=part):
                state, total = carry
                own = jax.tree.map(
                    lambda x: jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False), part
                )
                state, share, each = function(state, with_keys(own))
                add = lambda t, s: t + s.astype(t.dtype)
                return (state, jax.tree.map(add, total, share)), each

            (state, total), each = jax.lax.scan(body, (state, total), jnp.arange(number))
            found.append(each)
    return state, total, found


def in_order(each: list[jax.Array]) -> jax.Array:
    """What was found for each row, in the order of the rows: from arrays (microbatches, rows)."""
    columns = [jnp.swapaxes(x, 0, 1) for x in each]
    if len(set(map(spec_of, columns))) > 1:  # those of one loop can be dealt out evenly
        everywhere = jax.sharding.NamedSharding(explicit_mesh(columns), EVERYWHERE)
        columns = [jax.sharding.reshard(x, everywhere) for x in columns]
    return jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in columns])


def _keys_as_numbers(rows: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The rows with numbers for keys, and a function that makes keys of the numbers again.

    Each key is used once. JAX's search for keys that are used twice (`jax_debug_key_reuse`) doesn't
    see that of parts of an array of keys.
    """
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    leaves, tree = jax.tree.flatten(rows)
    kinds = [jax.random.key_impl(x) if is_key(x) else None for x in leaves]

    def with_keys(part: Any) -> Any:
        made = [
            x if kind is None else jax.random.wrap_key_data(x, impl=kind)
            for x, kind in zip(jax.tree.leaves(part), kinds, strict=True)
        ]
        return jax.tree.unflatten(tree, made)

    numbers = [
        x if kind is None else jax.random.key_data(x) for x, kind in zip(leaves, kinds, strict=True)
    ]
    return jax.tree.unflatten(tree, numbers), with_keys


def _cut(rows: Any, start: int, number: int, length: int) -> Any:
    """Rows from `start` on as `(length, number, ...)`.

    On a mesh with explicit axes, rows that can't be dealt out evenly go to all devices.
    """

    def cut(x):
        stop = start + number * length
        lies = of_rows(x, stop - start)
        if lies is not None and lies.spec != spec_of(x):
            x = jax.sharding.reshard(x, lies)
        part = x if (start, stop) == (0, x.shape[0]) else x[start:stop]
        shape = (length, number, *x.shape[1:])
        sharding = of_rows(part, length)
        if sharding is None:
            return part.reshape(shape)
        first, *rest = sharding.spec
        spec = jax.sharding.PartitionSpec(first, None, *rest)
        return jnp.reshape(
            part, shape, out_sharding=jax.sharding.NamedSharding(sharding.mesh, spec)
        )

    return jax.tree.map(cut, rows)
