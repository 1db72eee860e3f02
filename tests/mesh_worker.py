"""One process of a run on eight devices; prints what it found as JSON. See `test_processes.py`.

python mesh_worker.py NUMBER COUNT PORT
"""

import json
import os
import sys

number, count, port = map(int, sys.argv[1:4])
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={8 // count} --xla_backend_optimization_level=0"
)

import jax  # noqa: E402

if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, number)

import numpy as np  # noqa: E402
import optax  # noqa: E402

import fnn  # noqa: E402
from fnn import ops, sharding  # noqa: E402
from fnn.layers import Dropout, Linear, chain  # noqa: E402

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 8)).astype(np.float32)
Y = RNG.integers(8, size=48)
NET = chain(hidden=Linear(16), act=ops.relu, drop=Dropout(0.2), out=Linear(8))
LOSS = fnn.supervised(NET, ops.softmax_cross_entropy)
KEY = jax.random.key(0)


def own_batches():
    """This process's part of each batch of 16."""
    part = 16 // count
    for i in range(0, 48, 16):
        rows = slice(i + number * part, i + (number + 1) * part)
        yield X[rows], Y[rows]


def train(layout, data, **options):
    params = layout.init(NET.init, KEY, X[0])
    options = {"epochs": 2, "key": KEY, "progress": False, "layout": layout} | options
    result = fnn.fit(LOSS, params, data, optax.adam(0.05), **options)
    held = {
        name: sum(s.data.nbytes for s in leaf.addressable_shards[:1])
        for name, leaf in fnn.params.flatten(result.params).items()
    }
    params = jax.device_get(layout.spread(result.params))
    return {
        "losses": result.steps["loss"].tolist(),
        "validation": result.history.get("validation_loss", []),
        "params": {k: v.tolist() for k, v in fnn.params.flatten(params).items()},
        "bytes": held,
    }


def main():
    assert jax.device_count() == 8 and jax.process_count() == count
    data, grid = jax.make_mesh((8,), ("data",)), jax.make_mesh((4, 2), ("data", "model"))
    P = jax.sharding.PartitionSpec
    rules = {"hidden.W": P("model", None), "hidden.b": P("model"), "out.W": P(None, "model")}
    full = sharding.fully_sharded(data)
    found = {
        "arrays": train(full, (X, Y), batch_size=16, validation=(X, Y)),
        "batches": train(full, lambda: own_batches()),
        "rules": train(sharding.tensor_parallel(grid, rules), (X, Y), batch_size=16),
    }
    print("FOUND", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
