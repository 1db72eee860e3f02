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

    The thread computes under JAX's settings of this one (64 bits, promotion, device, mesh).

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


def _work(make, settings: list, ready: queue.Queue, over: threading.Event) -> None:
    def offer(entry: Any, error: BaseException | None = None) -> bool:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((entry, error), timeout=0.1)
                return True
        return False

    try:
        with contextlib.ExitStack() as stack:
            for setting in settings:
                stack.enter_context(setting())
            iterator = stack.enter_context(contextlib.closing(make()))
            if all(map(offer, iterator)):
                offer(None, StopIteration())
    except BaseException as error:  # also a KeyboardInterrupt that the data raise
        offer(None, error)


def _settings() -> list[Callable[[], Any]]:
    """What enters JAX's settings of this thread in another: they belong to a thread."""
    config: Any = jax.config
    x64, promotion = config.jax_enable_x64, config.jax_numpy_dtype_promotion
    device, mesh = config.jax_default_device, jax.sharding.get_abstract_mesh()
    settings = [
        lambda: jax.enable_x64(x64),
        lambda: jax.numpy_dtype_promotion(promotion),
        lambda: jax.default_device(device),
    ]
    if not mesh.empty:
        settings.append(lambda: jax.sharding.use_abstract_mesh(mesh))
    return settings
