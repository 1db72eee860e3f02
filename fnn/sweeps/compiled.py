"""The compiled programs of a group of members, and where they are kept for later sweeps."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn.readings import Kept, readings
from fnn.sweeps.layout import (
    ALIKE,
    DEALT,
    Plan,
    dealt_by,
    kind_of,
    over_members,
    over_places,
    sharding_of,
)
from fnn.sweeps.machine import platform
from fnn.sweeps.program import Carry, Program, Shared
from fnn.train.orders import sorted_orders

# A member is given the orders of as many epochs in one call as fit into so many bytes, or of one.
ORDERS_BYTES = 2**18


class Programs:
    """The compiled programs of one group of members, each compiled when it is first wanted.

    Attributes:
        carry_types: the types of one member's carry.
        looks_for: what JAX is set to look for in what is computed: "nan", "inf" or both.
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
        config: Any = jax.config
        self._x64 = config.jax_enable_x64
        self.looks_for = [x for x in ("nan", "inf") if getattr(config, f"jax_debug_{x}s")]

    def begin(self, plan: Plan, numeric: Mapping[str, Any]) -> Carry:
        """The first carries of a plan's members: stacked, or of the one alone."""
        with self._set():
            begin = self._get("begin", plan)
            if _begin_together(plan):
                return begin(numeric, self._shared)
            return over_places(lambda own: begin(own, self._shared), plan, numeric)

    @contextlib.contextmanager
    def _set(self) -> Iterator[None]:
        """JAX's settings for a call, in whichever thread: they belong to a thread.

        JAX itself doesn't look for nan and inf: the history holds nan for epochs to come, and who
        calls knows whose they are.
        """
        with jax.enable_x64(self._x64), jax.debug_nans(False), jax.debug_infs(False):
            yield

    def get(self, plan: Plan) -> Callable:
        """The program of a plan, `(carry, numeric, begin, end) -> carry`; the carry is donated."""
        compiled = self._get("advance", plan)
        dealt, shared = dealt_by(plan), self._shared_for(plan)

        def advance(carry, numeric, begin, end):
            with self._set():
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
        of_one, epoch = self._get("bits", plan), np.int32(first)
        bits = np.asarray(over_places(lambda own: of_one(own, epoch, self._shared), plan, numeric))
        orders = np.zeros((*bits.shape[:-2], self.program.size), np.int32)
        orders[..., :count, :] = sorted_orders(bits[..., :count, :, :])
        return orders

    def compile(self, plans: Sequence[Plan]) -> None:
        """Compile the programs of several plans at the same time, where that isn't done."""
        began = time.perf_counter()
        known = len(self._compiled)
        with ThreadPoolExecutor(len(self._needed) * len(plans)) as pool:
            self.compile_ahead(plans, pool)
        for plan in plans:
            for what in self._needed:
                self._compiled[_name(what, plan)].result()
        if len(self._compiled) > known:
            self._store.seconds = time.perf_counter() - began

    def compile_ahead(self, plans: Sequence[Plan], pool: ThreadPoolExecutor) -> None:
        """Trace the programs of several plans, and have them compiled by a pool."""
        for plan in plans:
            for what in self._needed:
                key = _name(what, plan)
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
        return self._compiled[_name(what, plan)].result()

    def _lowered(self, what: str, plan: Plan) -> Any:
        def over(tree):
            if plan.layout == "threads":
                return tree
            sharding = sharding_of(DEALT) if plan.layout == "devices" else None
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((plan.width, *x.shape), x.dtype, sharding=sharding),
                tree,
            )

        if what == "begin":
            begin = self._traced["begin"]
            if not _begin_together(plan):
                return begin.lower(self._one, self._shared)
            places = {n: x.update(shape=(plan.width,)) for n, x in self._one.items()}
            # By rbg keys, what is drawn under vmap depends on the keys that are drawn from beside.
            by_rbg = "rbg" in str(jax.make_jaxpr(begin)(self._one, self._shared))

            def together(numeric, shared):
                if not by_rbg:
                    return jax.vmap(begin, (0, None), axis_size=plan.width)(numeric, shared)
                one = lambda _, own: (None, begin(own, shared))
                return lax.scan(one, None, numeric, plan.width)[1]

            return jax.jit(together).lower(places, self._shared)
        count = jax.ShapeDtypeStruct((), np.int32)
        most = self._epochs_a_call
        if what == "bits":

            def bits(numeric, first, shared):
                return self.program.sort_bits(numeric, first, shared, most)

            return jax.jit(bits).lower(self._one, count, self._shared)
        orders = None
        if self._is_given_orders:
            orders = over(jax.ShapeDtypeStruct((most, self.program.size), np.int32))
        numeric = over(self._one)
        advance = jax.jit(over_members(self._traced["advance"], plan.layout), donate_argnums=0)
        carry, shared = over(self.carry_types), self._shared_for(plan)
        return advance.lower(carry, numeric, count, count, orders, shared)

    def _shared_for(self, plan: Plan) -> Shared:
        """What all members use; for several devices a copy on each."""
        if plan.layout != "devices":
            return self._shared
        if self._everywhere is None:
            self._everywhere = jax.device_put(self._shared, sharding_of(ALIKE))
        return self._everywhere

    def bytes(self, plan: Plan) -> int:
        """How much memory a plan takes besides the data, by its compiled program."""
        compiled, known = self._get("advance", plan), self._store.memory
        if (kind := kind_of(plan)) not in known:
            known[kind] = compiled.memory_analysis()
        found = known[kind]
        if found is None:
            return 0
        shared = sum(x.nbytes for x in jax.tree.leaves(self._shared))
        arguments = found.argument_size_in_bytes + found.output_size_in_bytes
        own = arguments - found.alias_size_in_bytes - shared + found.temp_size_in_bytes
        return max(0, own) * plan.lanes

    @property
    def seconds(self) -> float:
        """How long compiling took, when something was compiled last."""
        return self._store.seconds

    @property
    def convolves(self) -> bool:
        """Whether a convolution is among a step's operations."""
        return self.name.endswith("convolution")

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
            text = str(jaxpr.jaxpr)
            kind = "convolution" if "conv_general_dilated" in text else ""
            self._store.name = hashlib.blake2b(text.encode()).hexdigest() + kind
        return self._store.name


def _begin_together(plan: Plan) -> bool:
    """Whether one program makes the first carries of all members.

    To fetch one member's from an accelerator takes longer than to make all.
    """
    return plan.layout != "threads" and platform() != "cpu"


def _name(what: str, plan: Plan) -> tuple:
    """A program's name: that of steps is of a plan; the others are of one member.

    Drawing random numbers takes longer to compile than a small network's steps, over members twice
    as long again, and is done once, or once in many epochs.
    """
    of_plan = what == "advance" or (what == "begin" and _begin_together(plan))
    return (what, *kind_of(plan)) if of_plan else (what,)


@dataclasses.dataclass
class Store:
    """What is kept of a group's programs for later sweeps.

    Fields:
        compiled: the programs, or their compilation on its way.
        memory: what the compiler says that they take, by kind of plan.
        carry_types, name, seconds: see `Programs`.
    """

    compiled: dict[Any, Future] = dataclasses.field(default_factory=dict)
    memory: dict[tuple, Any] = dataclasses.field(default_factory=dict)
    carry_types: Any = None
    name: str | None = None
    seconds: float = 0.0


def _kept_for(program: Program, types: Any) -> Store:
    """What an earlier sweep compiled, if its functions read the same; else an empty place for it.

    It is kept as long as the loss lives; the other functions may be others that read the same.
    """
    loss, *others = program.recipe.functions
    read = list(map(readings, (*others, *program.static.values())))
    settings = [getattr(jax.config, name) for name in _SETTINGS]
    kind = (types, settings, program.sizes, tuple(program.static))
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
