"""One process of a run that writes checkpoints; see `test_processes_checkpoints.py`.

python checkpoint_worker.py NUMBER COUNT PORT FOLDER killed|again
"""

import json
import os
import shutil
import signal
import sys
import zlib
from pathlib import Path

from mesh_worker import KEY, LOSS, NET, X, Y, count, number  # begins the processes

# isort: split
import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

import fnn
from fnn import sharding

# Drawn by numpy: to the last bit the same in every process, however it compiles.
RNG = np.random.default_rng(1)
PARAMS = jax.tree.map(
    lambda x: RNG.normal(0.0, 0.3, x.shape).astype(np.float32), jax.eval_shape(NET.init, KEY, X[0])
)
ADAM = optax.adam(0.05)
DATA = X[:44], Y[:44]  # a last batch of 12, which can't be dealt out


def train(layout, epochs, folder=None, **options):
    if folder is not None:
        options["checkpoints"] = fnn.Checkpoints(folder)
    options = {"epochs": epochs, "key": KEY, "progress": False, "layout": layout} | options
    return fnn.fit(LOSS, PARAMS, DATA, ADAM, batch_size=16, **options)


def layouts():
    """By name: parameters divided, some in two ways; whole on all devices."""
    grid = jax.make_mesh((2, 4), ("data", "model"))
    rules = {"hidden.W": jax.sharding.PartitionSpec("model", None)}
    return {
        "divided": sharding.tensor_parallel(grid, rules, shard="data"),
        "whole": sharding.data_parallel(grid),
    }


def die(epoch, state, record):
    if epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def told(result, layout):
    state = jax.device_get(layout.spread(result.state))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    digest = lambda x: zlib.crc32(np.ascontiguousarray(x).tobytes())
    digests = {jax.tree_util.keystr(path): digest(x) for path, x in leaves}
    return {"losses": result.steps["loss"].tolist(), "state": digests}


def message(function, *args, **options):
    """What it raises."""
    try:
        function(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def damage(folder):
    """The longest file of numbers in the newest checkpoint, with other bytes in its midst."""
    newest = max(path for path in Path(folder).iterdir() if path.name.isdigit())
    files = [path for path in newest.glob("arrays/**/d/*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    numbers = bytearray(path.read_bytes())
    for place in range(len(numbers) // 4, 3 * len(numbers) // 4):
        numbers[place] ^= 0xFF
    path.write_bytes(bytes(numbers))


def main():
    folder, what = sys.argv[4:]
    assert jax.device_count() == 8 and jax.process_count() == count
    found = {}
    if what == "killed":
        train(layouts()["divided"], 4, f"{folder}/divided", after_epoch=die)
    for name, layout in layouts().items():
        if name != "divided":
            train(layout, 2, f"{folder}/{name}")
        resumed = train(layout, 4, f"{folder}/{name}")
        found[name] = told(resumed, layout), told(train(layout, 4), layout)
    divided = layouts()["divided"]
    if number == 0:
        shutil.copytree(f"{folder}/divided", f"{folder}/damaged")
        damage(f"{folder}/damaged")
    multihost_utils.sync_global_devices("damaged")
    found["errors"] = {
        "damaged": message(train, divided, 5, f"{folder}/damaged"),
        "not shared": message(train, divided, 1, f"{folder}/of process {number}"),
        "alone": message(train, None, 1, f"{folder}/alone"),
    }
    print("FOUND", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
