"""A program that trains with checkpoints, for `test_resume.py` to kill: run as a process.

It imports once, and then forks for each folder that it reads from stdin: the child trains there,
from the start or from where an earlier one was killed, and writes to `FOLDER.done` what it has at
the end. To import takes longer than to train.
"""

import hashlib
import json
import os
import signal
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint  # noqa: F401 (so that the child needn't)

import fnn

warnings.filterwarnings("ignore", message="os.fork")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(90, 6)).astype(np.float32)
Y = (X @ RNG.normal(size=6)).astype(np.float32)


def loss(params, example, key):
    x, y = example
    hidden = jnp.tanh(params["W"] @ x + 0.1 * jax.random.normal(key))
    return (params["w"] @ hidden - y) ** 2


def validation_loss(params, example):
    return loss(params, example, jax.random.key(0))


ADAM = optax.adam(1e-2)


def train(folder, epochs=12, *, data=(X, Y), optimizer=ADAM, loss=loss, params=None, **options):
    """The run; `options` replace those of `fit`."""
    options = {
        "epochs": epochs,
        "batch_size": 16 if isinstance(data, tuple) else None,
        "key": jax.random.key(1),
        "validation": (X[:20], Y[:20]),
        "validation_loss": validation_loss,
        "progress": False,
        "checkpoints": None if folder is None else checkpoints(folder),
    } | options
    if params is None:
        params = {"W": jnp.eye(8, 6), "w": jnp.ones(8)}
    return fnn.fit(loss, params, data, optimizer, **options)


def checkpoints(folder, **options):
    options = {"every": 1, "keep": 2, "best": "validation_loss", "every_steps": 4} | options
    return fnn.Checkpoints(folder, **options)


def digest(result):
    """All that must be the same to the last bit."""
    parts = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(result.state)]
    parts += [np.asarray(values).tobytes() for values in result.steps.values()]
    history = {name: v for name, v in result.history.items() if name != "seconds"}
    parts.append(json.dumps(history, sort_keys=True).encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main():
    print("ready", flush=True)
    for line in sys.stdin:
        folder = line.strip()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            result = train(folder)
            with open(f"{folder}.done", "w") as f:
                json.dump({"digest": digest(result), "interrupted": result.interrupted}, f)
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(
            -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True
        )


if __name__ == "__main__":
    main()
