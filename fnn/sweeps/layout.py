"""How the members of a sweep lie on the machine, what that costs, and which way is fastest."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fnn.sweeps.program import Carry, Program, Shared
from fnn.train.orders import sorted_orders
from fnn.train.readings import Kept, readings

Layout = Literal["vmap", "scan", "threads", "devices"]
LAYOUTS = ("vmap", "scan", "threads", "devices")

# The part of the free memory that a sweep takes.
SHARE = 0.8

# A member is given the orders of as many epochs in one call as fit into so many bytes, or of one.
ORDERS_BYTES = 2**18

# A measurement of a layout is at least this long, unless one step is longer.
SECONDS = 0.03


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


class Programs:
    """The compiled programs of one group of members, each compiled when it is first wanted.

    Attributes:
        carry_types: the types of one member's carry.
        seconds: how long compiling the last one took.
    """

    def __init__(self, program: Program, shared: Shared, numeric: Mapping[str, np.ndarray]):
        self.program = program
        self._shared = shared
        self._one = {n: jax.ShapeDtypeStruct((), jnp.asarray(x).dtype) for n, x in numeric.items()}
        # Jitted, so that what is traced for one layout serves for all.
        self._traced = {
            "begin": jax.jit(program.begin),
            "advance": jax.jit(program.advance),
        }
        self._store = _kept_for(program, _types((self._one, shared)))
        self._compiled = self._store.compiled
        if self._store.carry_types is None:
            self._store.carry_types = jax.eval_shape(self._traced["begin"], self._one, shared)
        self.carry_types = self._store.carry_types
        self._everywhere: Any = None
        self.seconds = 0.0

    def begin(self, plan: Plan, numeric: Mapping[str, Any]) -> Carry:
        """The first carries of a plan's members: stacked, or of the one alone."""
        return self._get("begin", plan)(numeric, self._shared)

    def get(self, plan: Plan) -> Callable:
        """The program of a plan, `(carry, numeric, begin, end) -> carry`; the carry is donated."""
        compiled = self._get("advance", plan)
        dealt, shared = _dealt(plan), self._shared_for(plan)

        def advance(carry, numeric, begin, end):
            orders = self._orders(plan, numeric, begin, end)
            own = dealt((carry, numeric)), np.int32(begin), np.int32(end), dealt(orders)
            return compiled(*own[0], *own[1:], shared)

        return advance

    def most_steps(self, plan: Plan, begin: int) -> int:
        """How many steps one call may take from a step on: the epochs whose orders it is given."""
        steps = self.program.steps
        if self._is_given_orders:
            return steps * (begin // steps + self._epochs_a_call) - begin
        return steps * self.program.epochs - begin

    @property
    def _needed(self) -> tuple[str, ...]:
        return ("advance", "begin", "bits") if self._is_given_orders else ("advance", "begin")

    @property
    def _is_given_orders(self) -> bool:
        return self.program.shuffle and not self.program.draws

    @property
    def _epochs_a_call(self) -> int:
        return max(1, min(self.program.epochs, ORDERS_BYTES // (4 * self.program.size)))

    def _orders(self, plan: Plan, numeric: Any, begin: int, end: int) -> Any:
        """The orders of the examples in the epochs of some steps, in an array for the most."""
        if not self._is_given_orders:
            return None
        first = begin // self.program.steps
        count = -(-end // self.program.steps) - first
        bits = np.asarray(self._get("bits", plan)(numeric, np.int32(first), self._shared))
        orders = np.zeros((*bits.shape[:-2], self.program.size), np.int32)
        orders[..., :count, :] = sorted_orders(bits[..., :count, :, :])
        return orders

    def compile(self, plans: Sequence[Plan]) -> None:
        """Compile the programs of several plans at the same time, where that isn't done."""
        began = time.perf_counter()
        with ThreadPoolExecutor(len(self._needed) * len(plans)) as pool:
            self.compile_ahead(plans, pool)
        for plan in plans:
            for what in self._needed:
                self._compiled[what, *_kind(plan)].result()
        self.seconds = time.perf_counter() - began

    def compile_ahead(self, plans: Sequence[Plan], pool: ThreadPoolExecutor) -> None:
        """Trace the programs of several plans, and have them compiled by a pool."""
        for plan in plans:
            for what in self._needed:
                key = (what, *_kind(plan))
                if not self._is_there(key):
                    lowered = self._lowered(what, plan)
                    self._compiled[key] = pool.submit(lowered.compile)

    def _is_there(self, key: tuple) -> bool:
        """Whether it is compiled, or on its way."""
        future = self._compiled.get(key)
        if future is None or future.cancelled():
            return False
        return not future.done() or future.exception() is None

    def _get(self, what: str, plan: Plan) -> Any:
        self.compile([plan])
        return self._compiled[what, *_kind(plan)].result()

    def _lowered(self, what: str, plan: Plan) -> Any:
        def over(tree):
            if plan.layout == "threads":
                return tree
            sharding = _sharding(DEALT) if plan.layout == "devices" else None
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((plan.width, *x.shape), x.dtype, sharding=sharding),
                tree,
            )

        if what == "begin":
            begin = _begin_all(self._traced["begin"], plan)
            return jax.jit(begin).lower(over(self._one), self._shared)
        count = jax.ShapeDtypeStruct((), np.int32)
        most = self._epochs_a_call
        if what == "bits":

            def bits(numeric, first, shared):
                return self.program.sort_bits(numeric, first, shared, most)

            mapped = jax.vmap(bits, (0, None, None)) if plan.layout != "threads" else bits
            return jax.jit(mapped).lower(over(self._one), count, self._shared)
        orders = None
        if self._is_given_orders:
            orders = over(jax.ShapeDtypeStruct((most, self.program.size), np.int32))
        numeric = over(self._one)
        mapped = jax.jit(_mapped(self._traced["advance"], plan.layout), donate_argnums=0)
        carry, shared = over(self.carry_types), self._shared_for(plan)
        return mapped.lower(carry, numeric, count, count, orders, shared)

    def _shared_for(self, plan: Plan) -> Shared:
        """What all members use; for several devices a copy on each."""
        if plan.layout != "devices":
            return self._shared
        if self._everywhere is None:
            self._everywhere = jax.device_put(self._shared, _sharding(ALIKE))
        return self._everywhere

    def bytes(self, plan: Plan) -> int:
        """How much memory a plan takes besides the data, by its compiled program."""
        found = self._get("advance", plan).memory_analysis()
        if found is None:
            return 0
        shared = sum(x.nbytes for x in jax.tree.leaves(self._shared))
        arguments = found.argument_size_in_bytes + found.output_size_in_bytes
        own = arguments - found.alias_size_in_bytes - shared + found.temp_size_in_bytes
        return max(0, own) * plan.lanes

    @property
    def name(self) -> str:
        """A name for the program of one member: alike for programs that compute alike."""
        if self._store.name is None:
            count, orders = jax.ShapeDtypeStruct((), np.int32), None
            if self._is_given_orders:
                orders = jax.ShapeDtypeStruct((self._epochs_a_call, self.program.size), np.int32)
            jaxpr = jax.make_jaxpr(self._traced["advance"])(
                self.carry_types, self._one, count, count, orders, self._shared
            )
            self._store.name = hashlib.blake2b(str(jaxpr.jaxpr).encode()).hexdigest()
        return self._store.name


@dataclasses.dataclass
class Store:
    """What is kept of a group's programs for later sweeps.

    Fields:
        compiled: the programs, or their compilation on its way.
        carry_types, name: see `Programs`.
    """

    compiled: dict[Any, Future] = dataclasses.field(default_factory=dict)
    carry_types: Any = None
    name: str | None = None


def _kept_for(program: Program, types: Any) -> Store:
    """What an earlier sweep compiled, if its functions read the same; else an empty place for it.

    It is kept as long as the loss lives; the other functions may be others that read the same.
    """
    loss, *others = program.recipe.functions
    read = list(map(readings, (*others, *program.static.values())))
    settings = [getattr(jax.config, name) for name in _SETTINGS]
    kind = (types, settings, program.sizes)
    try:
        stores = _kept.find((loss,)) or []
        for known, same, store in stores:
            if known == kind and same == read:
                return store
        stores.append((kind, read, Store()))
        _kept.keep((loss,), made=stores)
    except TypeError:  # there are no weak references to the loss
        return Store()
    return stores[-1][2]


_kept: Kept[list[tuple[Any, list, Store]]] = Kept()

# What changes the program of a function, besides what it reads.
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_debug_nans",
)


def _types(tree: Any) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves]


def _begin_all(begin: Callable, plan: Plan) -> Callable:
    """`begin` over members, of whom there may be several without any hyperparameters."""
    if plan.layout == "threads":
        return begin

    def all_members(numeric, shared):
        return jax.vmap(lambda own: begin(own, shared), axis_size=plan.width)(numeric)

    return all_members


def _kind(plan: Plan) -> tuple:
    return plan.layout, None if plan.layout == "threads" else plan.width


def _mapped(advance: Callable, layout: Layout) -> Callable:
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
        one_by_one if jax.local_devices()[0].platform == "cpu" else over,
        mesh=_mesh(),
        in_specs=(DEALT, DEALT, ALIKE, ALIKE, DEALT, ALIKE),
        out_specs=DEALT,
        check_vma=False,
    )


DEALT, ALIKE = PartitionSpec("members"), PartitionSpec()


def _mesh() -> Any:
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("members",), (AxisType.Auto,), devices=devices)


def _sharding(spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(_mesh(), spec)


def _dealt(plan: Plan) -> Callable:
    """What deals out trees over the devices, where the plan wants that."""
    if plan.layout != "devices":
        return lambda tree: tree
    return lambda tree: jax.device_put(tree, _sharding(DEALT))


# ------------------------------------------------------------------------------------ the choice


def plan_for(
    programs: Programs,
    members: int,
    layout: Layout | None,
    at_once: int | None,
    numeric: Mapping[str, Any],
) -> Plan:
    """The plan for a group: the layout asked for, or the fastest, in the memory that there is."""
    candidates = [layout] if layout is not None else _candidates(members)
    if len(candidates) == 1:
        return _fitted(programs, plan_of(candidates[0], members, at_once), at_once)
    place = (programs.name, members, at_once, jax.local_devices()[0].device_kind, cores())
    if place not in _fastest:
        plans = [plan_of(c, members, at_once) for c in candidates]
        programs.compile(plans)
        plans = [_fitted(programs, plan, at_once) for plan in plans]
        times = [_seconds_a_step(programs, plan, numeric) for plan in plans]
        _fastest[place] = plans[int(np.argmin(times))].layout
    return _fitted(programs, plan_of(_fastest[place], members, at_once), at_once)


# The layout that was the fastest, by program, members and machine.
_fastest: dict[tuple, Layout] = {}


def _candidates(members: int) -> list[Layout]:
    """The layouts that may be the fastest here."""
    devices = jax.local_devices()
    on_cpu = devices[0].platform == "cpu"
    if members == 1:
        return ["threads" if on_cpu else "vmap"]
    if on_cpu:
        return ["vmap", "threads"]
    return ["devices"] if len(devices) > 1 else ["vmap", "scan"]


def plan_of(layout: Layout, members: int, at_once: int | None) -> Plan:
    if layout == "threads":
        return Plan(layout, 1, min(members, at_once or cores()))
    width = min(members, at_once or members)
    width = -(-members // -(-members // width))  # as many runs, alike
    if layout == "devices":
        count = len(jax.local_devices())
        width = -(-width // count) * count
    return Plan(layout, width, 1)


def _fitted(programs: Programs, plan: Plan, at_once: int | None) -> Plan:
    """The plan with as many members at once as there is memory for; at least one."""
    if at_once is not None:
        return plan
    free = free_bytes()
    while free is not None and plan.at_once > 1:
        wanted = programs.bytes(plan)
        if wanted <= SHARE * free:
            break
        fewer = max(1, min(plan.at_once - 1, int(plan.at_once * SHARE * free / wanted)))
        smaller = plan_of(plan.layout, plan.at_once, fewer)
        if smaller == plan:
            break
        plan = smaller
    return plan


def _seconds_a_step(programs: Programs, plan: Plan, numeric: Mapping[str, Any]) -> float:
    """Seconds for one step of one member, measured."""
    values = padded({name: x[: plan.at_once] for name, x in numeric.items()}, plan.at_once)
    own = [values]
    if plan.layout == "threads":
        own = [{n: x[i] for n, x in values.items()} for i in range(plan.lanes)]
    run = programs.get(plan)
    carries = [programs.begin(plan, each) for each in own]
    total = programs.program.steps * programs.program.epochs
    at, count = 0, 1

    def advance(i):
        carries[i] = jax.block_until_ready(run(carries[i], own[i], at, at + count))

    with ThreadPoolExecutor(plan.lanes) as pool:
        list(pool.map(advance, range(len(own))))
        while True:
            at = (at + count) % total
            count = min(count, programs.most_steps(plan, at))
            began = time.perf_counter()
            list(pool.map(advance, range(len(own))))
            seconds = time.perf_counter() - began
            if seconds >= SECONDS or count == programs.most_steps(plan, at):
                return seconds / count / plan.at_once
            count = min(max(2 * count, int(1.2 * count * SECONDS / seconds)), 16 * count)


# ---------------------------------------------------------------------------------- the machine


def cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def free_bytes() -> int | None:
    """The free memory of the device that computes, in bytes; None where it isn't told."""
    device = jax.local_devices()[0]
    with contextlib.suppress(Exception):
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    free = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        with open("/proc/meminfo") as lines:
            line = next(line for line in lines if line.startswith("MemAvailable:"))
        free.append(1024 * int(line.split()[1]))
    with contextlib.suppress(OSError, ValueError):  # a container's own limit
        group = Path("/sys/fs/cgroup")
        most, now = (group / f"memory.{name}" for name in ("max", "current"))
        free.append(int(most.read_text()) - int(now.read_text()))
    return max(0, min(free)) if free else None


# --------------------------------------------------------------------------------- stacked trees


def padded(numeric: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Hyperparameters of `count` members, the last one's repeated where there are fewer."""
    return {
        n: np.concatenate([x, np.repeat(x[-1:], count - len(x), 0)]) for n, x in numeric.items()
    }


def to_host(x: Any) -> Any:
    """A copy in the host's memory, that doesn't hold on to x's; keys stay as they are."""
    return x if is_key(x) else np.array(x)


def is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.extended)
