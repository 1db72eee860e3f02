"""fnn.keep_memory: a program's temporaries lie on the same pages at each call."""

import subprocess
import sys

import pytest

import fnn
from fnn import heap

# A program with 64 MB of temporaries, called in a process of its own.
PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
import fnn

kept = fnn.keep_memory() if "keep" in sys.argv else None
x = jnp.ones((4096, 8))
f = jax.jit(lambda x: jnp.sin(x @ x.T) @ x)
pages = []
for _ in range(21):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
pages = sorted(pages[10:])[5]
print(pages, kept, fnn.keep_memory() if kept else None)
print(f.lower(x).compile().memory_analysis().temp_size_in_bytes // 4096)
"""

glibc = pytest.mark.skipif(heap._glibc() is None, reason="the C library isn't glibc")


def run(*options):
    command = [sys.executable, "-c", PROGRAM, *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@glibc
def test_pages_are_kept():
    pages, _, _, temporary = run()
    assert int(temporary) * 4096 > 2**25  # what glibc gives back
    assert int(pages) > int(temporary) / 2
    pages, kept, again, temporary = run("keep")
    assert (kept, again) == ("True", "True")
    assert int(pages) < int(temporary) / 10


@glibc
def test_called_too_late():
    """JAX's threads have heaps of their own by now."""
    import jax

    jax.block_until_ready(jax.numpy.ones(3) + 1)
    with pytest.raises(RuntimeError, match="keep_memory: .*before JAX computes anything"):
        fnn.keep_memory()


def test_another_c_library(monkeypatch):
    class Other:
        def __init__(self, name):
            pass

    monkeypatch.setattr(heap.ctypes, "CDLL", Other)
    assert fnn.keep_memory() is False
