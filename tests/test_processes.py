"""Two processes with four devices each, over loopback: the numbers of one device in one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from sweeps import exhaustive

import fnn

HERE = Path(__file__).parent


def start(number, count, port, worker, args):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    return subprocess.Popen(
        [sys.executable, str(worker), *map(str, (number, count, port, *args))],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(count, worker=HERE / "mesh_worker.py", *args, ends=0):
    """What each process found; how it ended is as expected."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    processes = [start(number, count, port, worker, args) for number in range(count)]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == ends, out + err
    lines = [line for out, _ in outputs for line in out.splitlines() if line.startswith("FOUND ")]
    return [json.loads(line.removeprefix("FOUND ")) for line in lines]


@pytest.fixture(scope="module")
def together():
    return run(2)


@pytest.fixture(scope="module")
def alone():
    """On one device, in 32 bits as the processes."""
    sys.argv, before = ["mesh_worker.py", "0", "1", "0"], sys.argv
    try:
        flags = os.environ["XLA_FLAGS"]
        import mesh_worker as worker

        os.environ["XLA_FLAGS"] = flags
    finally:
        sys.argv = before
    with jax.enable_x64(False):
        params = worker.NET.init(worker.KEY, worker.X[0])
        data = (worker.X, worker.Y)
        fit = lambda data, **options: fnn.fit(
            worker.LOSS,
            params,
            data,
            optax.adam(0.05),
            epochs=2,
            key=worker.KEY,
            progress=False,
            **options,
        )
        return {
            "arrays": fit(data, batch_size=16, validation=data),
            "batches": fit(lambda: worker.own_batches()),
            "rules": fit(data, batch_size=16),
        }


@exhaustive
@pytest.mark.parametrize("kind", ["arrays", "batches", "rules"])
def test_two_processes_train_as_one_device_does(kind, together, alone):
    wanted = alone[kind]
    params = fnn.params.flatten(wanted.params)
    for found in together:
        ours = found[kind]
        np.testing.assert_allclose(ours["losses"], wanted.steps["loss"], rtol=2e-5)
        for name, value in ours["params"].items():
            np.testing.assert_allclose(value, params[name], rtol=1e-3, atol=1e-4)
        validation = wanted.history.get("validation_loss", [])
        np.testing.assert_allclose(ours["validation"], validation, rtol=1e-4)


@exhaustive
def test_a_device_holds_its_share(together, alone):
    params = fnn.params.flatten(alone["arrays"].params)
    for found in together:
        for name, size in found["arrays"]["bytes"].items():
            assert size == params[name].nbytes // 8
        assert found["rules"]["bytes"]["hidden.W"] == params["hidden.W"].nbytes // 2
