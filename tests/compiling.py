"""What JAX compiles, as its own reports tell.

A jitted function's `_cache_size()` doesn't say it: that table of quick calls is shared by all
functions, and where it is full (8,192 entries, after some hundred tests) a new entry goes at once.
"""

import contextlib

import jax


@contextlib.contextmanager
def compiled_programs():
    """A list that gets the name of each program compiled meanwhile, by any thread: `jit(step)`."""
    names = []

    def listen(event, seconds, fun_name=None, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
