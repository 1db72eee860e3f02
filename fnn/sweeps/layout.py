"""How the members of a sweep lie on the machine: which are trained by one call, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fnn.sweeps.machine import cores, platform

Layout = Literal["vmap", "scan", "threads", "devices"]
LAYOUTS = ("vmap", "scan", "threads", "devices")


class Plan(NamedTuple):
    """A layout, and how many members it holds.

    Fields:
        layout: one of LAYOUTS.
        width: how many members one call of its program trains.
        lanes: how many calls run at the same time, each in a thread.
    """

    layout: Layout
    width: int
    lanes: int

    @property
    def at_once(self) -> int:
        """How many members are trained at the same time."""
        return self.width * self.lanes


def plan_of(layout: Layout, members: int, at_once: int | None) -> Plan:
    """The plan of a layout for so many members, where memory is no matter."""
    if layout == "threads":
        return Plan(layout, 1, min(members, at_once or cores()))
    width = min(members, at_once or members)
    width = -(-members // -(-members // width))  # as many runs, alike
    if layout == "devices":
        count = len(jax.local_devices())
        width = -(-width // count) * count
    return Plan(layout, width, 1)


def padded(numeric: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Hyperparameters of `count` members, the last one's repeated where there are fewer."""
    return {
        n: np.concatenate([x, np.repeat(x[-1:], count - len(x), 0)]) for n, x in numeric.items()
    }


# -------------------------------------------------------------------------------- their programs


def over_places(function: Callable, plan: Plan, numeric: Mapping[str, Any]) -> Any:
    """What a function makes of each place's hyperparameters, stacked; of the one's alone.

    The function is called for one place after the other, and what it makes is stacked by the host.
    """
    if plan.layout == "threads":
        return function(numeric)
    made = [function({n: x[i] for n, x in numeric.items()}) for i in range(plan.width)]
    return jax.tree.map(stacked, *made)


def stacked(*xs: Any) -> Any:
    """Arrays along a new first axis, without compiling anything for numbers."""
    if is_key(xs[0]):
        return jnp.stack(xs)
    return jnp.asarray(np.stack([np.asarray(x) for x in xs]))


def is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.extended)


def kind_of(plan: Plan) -> tuple:
    """What a plan's program of steps depends on."""
    return plan.layout, None if plan.layout == "threads" else plan.width


def over_members(advance: Callable, layout: Layout) -> Callable:
    """`advance` over members along the first axes of the carry and of the hyperparameters."""
    if layout == "threads":
        return advance
    over = jax.vmap(advance, (0, 0, None, None, 0, None))

    def one_by_one(carry, numeric, begin, end, orders, shared):
        def one(own):
            carry, numeric, orders = own
            return advance(carry, numeric, begin, end, orders, shared)

        return lax.map(one, (carry, numeric, orders))

    if layout == "vmap":
        return over
    if layout == "scan":
        return one_by_one
    return jax.shard_map(
        one_by_one if platform() == "cpu" else over,
        mesh=_mesh(),
        in_specs=(DEALT, DEALT, ALIKE, ALIKE, DEALT, ALIKE),
        out_specs=DEALT,
        check_vma=False,
    )


# Over several devices: members dealt out, and what they share a copy on each.
DEALT, ALIKE = PartitionSpec("members"), PartitionSpec()


def _mesh() -> Any:
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("members",), (AxisType.Auto,), devices=devices)


def sharding_of(spec: PartitionSpec) -> NamedSharding:
    """DEALT or ALIKE, over this process's devices."""
    return NamedSharding(_mesh(), spec)


def dealt_by(plan: Plan) -> Callable:
    """What deals out trees over the devices, where the plan wants that."""
    if plan.layout != "devices":
        return lambda tree: tree
    return lambda tree: jax.device_put(tree, sharding_of(DEALT))
