"""Which layout is the fastest here, found by measuring, and how many members memory holds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from fnn.footprint import free_memory
from fnn.sweeps.compiled import Programs
from fnn.sweeps.layout import Layout, Plan, padded, plan_of
from fnn.sweeps.machine import cores, platform

# The part of the free memory that a sweep takes.
SHARE = 0.8

# Another layout is tried where training takes so many times as long as compiling the first did.
WORTH = 2

# A measurement of a layout is at least this long, unless one step is longer.
SECONDS = 0.03


def plan_for(
    programs: Programs,
    members: int,
    layout: Layout | None,
    at_once: int | None,
    numeric: Mapping[str, Any],
) -> Plan:
    """The plan for a group: the layout asked for, or the fastest, in the memory that there is.

    The first candidate is compiled and measured; the next one only where so much is to be trained
    that its compilation, which takes as long or longer, can pay.
    """
    candidates = [layout] if layout is not None else _candidates(members, programs)
    if len(candidates) == 1:
        return _fitted(programs, plan_of(candidates[0], members, at_once), at_once)
    place = (programs.name, members, at_once, jax.local_devices()[0].device_kind, cores())
    known = _measured.setdefault(place, {})
    steps = programs.program.steps * programs.program.epochs
    for candidate in candidates:
        if candidate in known:
            continue
        if known and min(known.values()) * steps * members < WORTH * programs.seconds:
            break
        plan = plan_of(candidate, members, at_once)
        programs.compile([plan])
        known[candidate] = _seconds_a_step(programs, _fitted(programs, plan, at_once), numeric)
    best = min(known, key=known.__getitem__)
    return _fitted(programs, plan_of(best, members, at_once), at_once)


# Seconds for one step of one member in each layout, by program, members and machine.
_measured: dict[tuple, dict[Layout, float]] = {}


def _candidates(members: int, programs: Programs) -> list[Layout]:
    """The layouts that may be the fastest here, the likeliest first."""
    on_cpu = platform() == "cpu"
    if members == 1:
        return ["threads" if on_cpu else "vmap"]
    if on_cpu:
        # A batch of kernels makes a convolution of groups: slower, and minutes to compile.
        return ["threads"] if programs.convolves else ["threads", "vmap"]
    return ["devices"] if len(jax.local_devices()) > 1 else ["vmap", "scan"]


def _fitted(programs: Programs, plan: Plan, at_once: int | None) -> Plan:
    """The plan with as many members at once as there is memory for; at least one."""
    if at_once is not None:
        return plan
    free = free_memory()
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
