"""An iterator that runs in a thread of its own, ahead of who reads it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax


def prefetched(make: Callable[[], Iterator[Any]], ahead: int) -> Iterator[Any]:
    """What an iterator gives, which runs in a thread of its own, up to `ahead` entries ahead.

    The thread computes under JAX's settings of this one: 64 bits, promotion, device, mesh, how
    random numbers are drawn, looking for nan, and the like.

    Args:
        make: called in the thread to make the iterator, whose errors come out here.
        ahead: 0 for no thread.
    """
    if ahead == 0:
        yield from make()
        return
    ready: queue.Queue = queue.Queue(ahead)
    over = threading.Event()
    thread = threading.Thread(
        target=_work, args=(make, _settings(), ready, over), name="fnn data", daemon=True
    )
    thread.start()
    try:
        while True:
            entry, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield entry
            del entry  # its memory is the reader's
    finally:
        over.set()
        thread.join(timeout=1.0)  # data that hang can't be ended


def _work(make, settings: dict, ready: queue.Queue, over: threading.Event) -> None:
    def offer(entry: Any, error: BaseException | None = None) -> bool:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((entry, error), timeout=0.1)
                return True
        return False

    try:
        with contextlib.ExitStack() as stack:
            _enter(stack, settings)
            iterator = stack.enter_context(contextlib.closing(make()))
            if all(map(offer, iterator)):
                offer(None, StopIteration())
    except BaseException as error:  # also a KeyboardInterrupt that the data raise
        offer(None, error)


# JAX's settings that belong to a thread and decide what is computed in it, or what is an error:
# the context managers of `jax`, by the names of their options.
_SETTINGS = {
    "jax_enable_x64": "enable_x64",
    "jax_numpy_dtype_promotion": "numpy_dtype_promotion",
    "jax_numpy_rank_promotion": "numpy_rank_promotion",
    "jax_default_device": "default_device",
    "jax_default_matmul_precision": "default_matmul_precision",
    "jax_default_prng_impl": "default_prng_impl",
    "jax_threefry_partitionable": "threefry_partitionable",
    "jax_debug_nans": "debug_nans",
    "jax_debug_infs": "debug_infs",
    "jax_debug_key_reuse": "debug_key_reuse",
    "jax_log_compiles": "log_compiles",
}


def _settings() -> dict[str, Any]:
    """JAX's settings of this thread; the mesh under "mesh"."""
    own = {option: getattr(jax.config, option) for option in _SETTINGS}
    return own | {"mesh": jax.sharding.get_abstract_mesh()}


def _enter(stack: contextlib.ExitStack, settings: dict[str, Any]) -> None:
    """Have this thread's settings be those of another.

    Only what differs is set: what JAX compiled is found by which settings are set at all.
    """
    for option, manager in _SETTINGS.items():
        if getattr(jax.config, option) != settings[option]:
            stack.enter_context(getattr(jax, manager)(settings[option]))
    if not settings["mesh"].empty:
        stack.enter_context(jax.sharding.use_abstract_mesh(settings["mesh"]))
