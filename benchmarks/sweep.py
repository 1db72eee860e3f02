"""Many two-layer networks on the digits, 300 steps of 128 examples each, in several ways.

    python benchmarks/sweep.py [--networks 64] [--hidden 32] [--rounds 5] [--only NAME ...]
                               [--markdown]

Every network has a seed of its own: its own start, its own order of the examples in each epoch; the
optimiser is Adam. All run in one process and take turns, compiled beforehand. `ms` is the median
time of a network; `CPU ms` that of all processor cores together, which depends less on what else
the machine does. The ratios to the first are medians of the ratios round by round.

    fnn.sweep    the layout that it chooses by measuring, shown in brackets
    vmap         plain JAX: the whole training, a scan over the steps, mapped over the networks
    a loop       plain JAX: one network after another, a jitted step at a time
    PyTorch      the same
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import installed, machine, ratio, table
from sklearn.datasets import load_digits

import fnn
from fnn import ops
from fnn.layers import Linear, chain

BATCH, EPOCHS, RATE = 128, 30, 1e-3
EXAMPLES = 10 * BATCH  # thirty epochs of ten batches are three hundred steps

Train = Callable[[int], object]  # so many networks


def data() -> tuple[np.ndarray, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    images = (images - images.mean()) / images.std()
    return images[:EXAMPLES].astype("float32"), labels[:EXAMPLES].astype("int32")


def start(seed, hidden: int):
    """W2 relu(W1 x + b1) + b2."""
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "hidden": {
            "W": jax.random.normal(first, (hidden, 64)) * np.float32((2 / 64) ** 0.5),
            "b": jnp.zeros(hidden),
        },
        "output": {
            "W": jax.random.normal(second, (10, hidden)) * np.float32((2 / hidden) ** 0.5),
            "b": jnp.zeros(10),
        },
    }


# -------------------------------------------------------------------------------------- fnn


def swept(hidden: int) -> Train:
    X, y = (jnp.asarray(a) for a in data())
    net = chain(hidden=Linear(hidden), f=ops.relu, output=Linear(10))
    loss = fnn.supervised(net, ops.softmax_cross_entropy)
    optimizer = optax.adam(RATE)

    def init(seed):
        return start(seed, hidden)

    def train(networks):
        found = fnn.sweep(
            loss,
            {"seed": range(networks)},
            (X, y),
            optimizer=optimizer,
            init=init,
            epochs=EPOCHS,
            batch_size=BATCH,
            progress=False,
            check=False,
        )
        train.layout = found.layouts[0][0]
        return found

    return train


# ------------------------------------------------------------------------------- plain JAX


def mean_loss(params, batch):
    x, labels = batch
    h = jax.nn.relu(x @ params["hidden"]["W"].T + params["hidden"]["b"])
    scores = h @ params["output"]["W"].T + params["output"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def stepping(optimizer):
    def step(state, batch):
        params, opt_state = state
        loss, gradient = jax.value_and_grad(mean_loss)(params, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return step


def vmapped(hidden: int) -> Train:
    X, y = (jnp.asarray(a) for a in data())
    optimizer = optax.adam(RATE)
    step = stepping(optimizer)

    @jax.jit
    @jax.vmap
    def run(seed):
        params = start(seed, hidden)

        def epoch(state, key):
            rows = jax.random.permutation(key, EXAMPLES).reshape(-1, BATCH)
            return jax.lax.scan(lambda s, r: step(s, (X[r], y[r])), state, rows)

        keys = jax.random.split(jax.random.key(seed), EPOCHS)
        return jax.lax.scan(epoch, (params, optimizer.init(params)), keys)

    return lambda networks: jax.block_until_ready(run(jnp.arange(networks)))


def looped(hidden: int) -> Train:
    X, y = data()
    optimizer = optax.adam(RATE)
    step = jax.jit(stepping(optimizer), donate_argnums=0)
    begin = jax.jit(lambda seed: start(seed, hidden))

    def train(networks):
        for seed in range(networks):
            rng = np.random.default_rng(seed)
            params = begin(seed)
            state = params, optimizer.init(params)
            for _ in range(EPOCHS):
                order = rng.permutation(EXAMPLES)
                for i in range(0, EXAMPLES, BATCH):
                    rows = order[i : i + BATCH]
                    state, loss = step(state, (X[rows], y[rows]))
            jax.block_until_ready(loss)

    return train


# ---------------------------------------------------------------------------------- PyTorch


def torch_loop(hidden: int) -> Train:
    import torch

    X, y = (torch.as_tensor(a) for a in data())
    y = y.long()

    def train(networks):
        for seed in range(networks):
            torch.manual_seed(seed)
            net = torch.nn.Sequential(
                torch.nn.Linear(64, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 10)
            )
            optimizer = torch.optim.Adam(net.parameters(), RATE)
            for _ in range(EPOCHS):
                order = torch.randperm(EXAMPLES)
                for i in range(0, EXAMPLES, BATCH):
                    rows = order[i : i + BATCH]
                    optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(net(X[rows]), y[rows]).backward()
                    optimizer.step()

    return train


CONTENDERS = {"fnn.sweep": swept, "vmap": vmapped, "a loop": looped, "PyTorch": torch_loop}

# The loops train one network after another: a few of them show the time of all.
AT_MOST = {"a loop": 8, "PyTorch": 2}


def sample(train: Train, networks: int) -> tuple[float, float]:
    """Milliseconds of a network: by the clock, and of all cores."""
    cpu, began = time.process_time(), time.perf_counter()
    train(networks)
    seconds = time.perf_counter() - began, time.process_time() - cpu
    return 1e3 * seconds[0] / networks, 1e3 * seconds[1] / networks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    names = options.only or list(CONTENDERS)
    if "PyTorch" in names and not installed("torch", "pip install torch==2.13.0"):
        names.remove("PyTorch")
    trains, counts = {}, {}
    for name in names:
        print(f"preparing {name}", file=sys.stderr, flush=True)
        trains[name] = CONTENDERS[name](options.hidden)
        counts[name] = min(options.networks, AT_MOST.get(name, options.networks))
        trains[name](counts[name])
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    draw = random.Random(0)
    for _ in range(options.rounds):
        for name in draw.sample(names, len(names)):
            samples[name].append(sample(trains[name], counts[name]))
    rows = []
    ours = samples[names[0]]
    for name, found in samples.items():
        wall, cpu = ([s[i] for s in found] for i in range(2))
        layout = getattr(trains[name], "layout", None)
        rows.append(
            [
                f"{name} ({layout})" if layout else name,
                f"{statistics.median(wall):.1f}",
                f"{statistics.median(cpu):.1f}",
                ratio(wall, [s[0] for s in ours]),
                ratio(cpu, [s[1] for s in ours]),
            ]
        )
    print(machine())
    what = f"{options.networks} × 64-{options.hidden}-10"
    heads = [what, "ms", "CPU ms", f"ms / {names[0]}", "CPU ms / its"]
    print(f"\n{table(heads, rows, options.markdown)}", flush=True)


if __name__ == "__main__":
    main()
