"""Several processes that do the same: what one of them finds, all must know.

Where one raised and the others went on, these would wait for it for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Result = TypeVar("Result")

# So many bytes of a message come from one process to the others.
_MESSAGE = 2000


def in_all(value: Any) -> np.ndarray:
    """What each process has, along a first axis. All must call it.

    Args:
        value: numbers of 32 bits or fewer, of the same shape in each.
    """
    if jax.process_count() == 1:
        return np.asarray(value)[None]
    return np.asarray(multihost_utils.process_allgather(np.asarray(value)))


def in_all_or_none(make: Callable[[], Result], failure: type[Exception]) -> Result:
    """make(), in each process, unless it fails in one of them: then it fails in all.

    Args:
        make: raises a `failure` where it fails.
        failure: an exception of one message.

    Raises:
        failure: this process's own, or one with the message of the first that failed.
    """
    if jax.process_count() == 1:
        return make()
    problem: Exception | None = None
    made: Any = None
    try:
        made = make()
    except failure as error:
        problem = error
    text = str(problem).encode()[:_MESSAGE] if problem is not None else b""
    said = in_all(np.frombuffer(text.ljust(_MESSAGE, b"\0"), np.uint8))
    if problem is not None:
        raise problem
    for number, message in enumerate(said):
        if message.any():
            text = message.tobytes().rstrip(b"\0")
            raise failure(f"in process {number}: {text.decode(errors='ignore')}")
    return made


def is_shared(tree: Any) -> bool:
    """Whether an array of a tree lies on devices of other processes, too."""
    arrays = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    return any(not x.is_fully_addressable for x in arrays)


def is_of_all(tree: Any) -> bool:
    """Whether the arrays of a tree lie on devices of several processes, of all that there are."""
    return is_shared(tree) and len(processes_of(tree)) == jax.process_count()


def processes_of(tree: Any) -> set[int]:
    """The processes on whose devices the arrays of a tree lie."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    devices: set[Any] = set().union(*(x.sharding.device_set for x in arrays))
    return {device.process_index for device in devices}
