"""The memory that the C library holds for this process, and whether it is given back."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8

_is_kept = False


def keep_memory() -> bool:
    """Keep the memory of programs on a CPU for their next call, for the rest of this process.

    XLA takes the temporaries of a program from the C library at each call, and frees them behind.
    What is larger than 32 MB glibc, Linux's C library, gives back to the system, which at the next
    call brings it in again page by page: of a step with 150 MB that is a seventh of the time. After
    this call glibc keeps it, and programs of JAX, fnn or not, take the same pages again. In return
    the process stays as large as it ever was, also between trainings.

    Call it behind the imports, before JAX computes anything: JAX's threads then share one heap,
    the only one whose size has no bound. For a GPU or TPU nothing changes, since JAX has an
    allocator of its own there.

    It does what the environment variables `MALLOC_ARENA_MAX=1`, `MALLOC_MMAP_MAX_=0` and a
    `MALLOC_TRIM_THRESHOLD_` without bound do before Python starts (Linux's manual, mallopt(3)).

    Returns:
        True. Where the C library isn't glibc, as on macOS and Windows, False, and nothing is done.

    Raises:
        RuntimeError: threads of this process have heaps of their own already, as when JAX has run
            something.
    """
    global _is_kept
    glibc = _glibc()
    if glibc is None or _is_kept:
        return _is_kept
    if _heaps(glibc) > 1:
        raise RuntimeError(
            "keep_memory: threads of this process have heaps of their own already, of at most "
            "64 MB each, so it's too late to keep more: call it behind the imports, before JAX "
            "computes anything."
        )
    _is_kept = all(
        glibc.mallopt(what, value)
        for what, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    )
    return _is_kept


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    try:
        library = ctypes.CDLL(None)
        for name in ("gnu_get_libc_version", "mallopt", "malloc_info", "open_memstream"):
            getattr(library, name)
    except (AttributeError, OSError, TypeError):
        return None
    return library


def _heaps(glibc: ctypes.CDLL) -> int:
    """How many heaps there are: one, until a second thread allocates."""
    text, size = ctypes.c_void_p(), ctypes.c_size_t()
    glibc.open_memstream.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(glibc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
    glibc.malloc_info(0, stream)
    glibc.fclose(stream)
    found = ctypes.string_at(text.value or 0, size.value).count(b"<heap ")
    glibc.free(text)
    return found
