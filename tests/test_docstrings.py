"""The examples in the docstrings do what they say."""

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import sweep

import fnn
from fnn import layers, ops

MODULES = sorted(m.name for m in pkgutil.walk_packages(fnn.__path__, "fnn."))
# What a reader of an example takes for granted, besides the names of the module itself.
COMMON = {
    "jax": jax,
    "jnp": jnp,
    "np": np,
    "optax": optax,
    "fnn": fnn,
    "x": jnp.zeros(784, jnp.float32),
}
COMMON |= {name: getattr(package, name) for package in (layers, ops) for name in package.__all__}


def examples(name):
    finder = doctest.DocTestFinder(exclude_empty=True)
    module = importlib.import_module(name)
    found = finder.find(module, globs=COMMON | vars(module))
    return [test for test in found if test.examples]


# Those of models compile for seconds.
QUICK = [name for name in MODULES if not name.startswith("fnn.models.")]


@pytest.mark.parametrize("name", sweep(MODULES, QUICK))
def test_examples_of(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    said = []
    for test in examples(name):
        with jax.enable_x64(False):  # as at a reader's
            doctest.DocTestRunner(verbose=False, optionflags=flags).run(test, out=said.append)
    assert not said, "".join(said)


def test_there_are_examples():
    assert sum(len(examples(name)) for name in MODULES) >= 5
