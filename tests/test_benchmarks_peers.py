"""benchmarks/peers: in every library the models have the same number of parameters."""

import importlib
from pathlib import Path

import jax
import pytest
from sweeps import sweep

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LIBRARIES = ("fnn", "linen", "nnx", "equinox", "haiku", "torch")
MODELS = ("lenet", "resnet", "vit", "gpt", "lstm")
CASES = [(library, model) for library in LIBRARIES for model in MODELS]


@pytest.fixture
def module(monkeypatch):
    """The benchmarks' modules, in the 32 bits that they run in."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with jax.enable_x64(False):
        yield importlib.import_module


@pytest.mark.parametrize("case", sweep(CASES, [("fnn", "lstm"), ("nnx", "lenet")]), ids=" ".join)
def test_as_many_parameters_in_every_library(module, case):
    library, model = case
    if library == "torch":
        pytest.importorskip("torch", reason="pip install torch==2.13.0")
    peers = module("peers")
    assert peers.MODELS == tuple(peers.PARAMETERS) == MODELS
    wanted = peers.PARAMETERS[model]
    if case == ("torch", "lstm"):
        wanted += 2_048  # a second bias
    assert module(f"peers.of_{library}").training(model).parameters == wanted
