"""Two processes that write one checkpoint: killed, they go on; one process goes on from theirs."""

import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from sweeps import exhaustive
from test_processes import run

import fnn
from fnn import sharding

WORKER = Path(__file__).parent / "checkpoint_worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def found(folder):
    """What each process found, the second time."""
    run(2, WORKER, folder, "killed", ends=-signal.SIGKILL)
    assert fnn.Checkpoints(folder / "divided").steps()
    return run(2, WORKER, folder, "again")


@exhaustive
@pytest.mark.parametrize("layout", ["divided", "whole"])
def test_they_go_on_to_the_same_numbers(layout, found):
    """To the last bit: "divided" was killed, "whole" was at its second epoch's end."""
    for process in found:
        resumed, uninterrupted = process[layout]
        assert resumed == uninterrupted
        assert len(resumed["losses"]) == 12
    assert found[0][layout] == found[1][layout]


@exhaustive
def test_what_cannot_work_is_an_error_in_both(found):
    for number, process in enumerate(found):
        errors = process["errors"]
        assert errors["damaged"].startswith("CheckpointError: ")
        assert "is damaged: " in errors["damaged"]
        assert errors["not shared"].startswith("CheckpointError: ")
        assert "must be on a file system that all processes share" in errors["not shared"]
        assert errors["alone"].startswith("ValueError: fit: checkpoints are written by all 2")
        assert number == 1 or "in process 1: " in errors["not shared"]


@pytest.fixture(scope="module")
def worker():
    """The worker's call, in this process."""
    flags = os.environ["XLA_FLAGS"]
    sys.argv, before = ["checkpoint_worker.py", "0", "1", "0", "", ""], sys.argv
    try:
        import checkpoint_worker

        return checkpoint_worker
    finally:
        sys.argv, os.environ["XLA_FLAGS"] = before, flags


@exhaustive
@pytest.mark.parametrize("devices", [8, 1])
@pytest.mark.parametrize("layout", ["divided", "whole"])
def test_one_process_goes_on_from_theirs(layout, devices, found, folder, worker, tmp_path):
    with jax.enable_x64(False):
        wanted = found[0][layout][0]
        where = worker.layouts()[layout]
        if devices == 1:
            where = sharding.fully_sharded(jax.make_mesh((1,), ("data",)))
        step = fnn.train_step(worker.LOSS, optax.adam(0.05), layout=where)
        saved = fnn.Checkpoints(folder / layout).load(step.init(worker.PARAMS))
        assert worker.told(saved, where) == wanted
        copy = shutil.copytree(folder / layout, tmp_path / "copy")
        result = worker.train(where, 5, copy)
        whole = worker.train(None, 5)
    assert len(result.params["hidden"]["W"].devices()) == devices
    np.testing.assert_allclose(result.steps["loss"], whole.steps["loss"], rtol=2e-5)


@exhaustive
def test_damage_is_found_in_one_process(found, folder, worker):
    with jax.enable_x64(False):
        state = fnn.train_step(worker.LOSS, optax.adam(0.05)).init(worker.PARAMS)
        with pytest.raises(fnn.CheckpointError, match="is damaged: .*(checksum|can't be read)"):
            fnn.Checkpoints(folder / "damaged").load(state)
