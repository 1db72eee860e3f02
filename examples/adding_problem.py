"""The adding problem: a GRU remembers two numbers of two hundred, and its gates show how.

    python examples/adding_problem.py            about a minute on two cores
    python examples/adding_problem.py --quick    a few seconds, to see that it runs

A sequence has 200 steps of two inputs: a random number from 0 to 1, and a mark that is 1 at two
steps and 0 elsewhere, one in each half. The target is the sum of the two marked numbers
(Hochreiter, Schmidhuber, "Long short-term memory", 1997). Who always answers 1, the mean, has a
mean squared error of 1/6. Between the first mark and the end lie 100 steps or more, over which
both the number and, in the backward pass, its gradient must be carried.

In the folder out/ you find afterwards

    gates.png    a sequence; how far each of the memory's numbers is rewritten at each step, which
                 is the update gate 1 − z; and the memory itself
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from fnn import ops
from fnn.layers import GRU, Linear, network

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit(f'{error}. For this example: pip install "matplotlib>=3.9"') from None

STEPS = 200
HIDDEN = 32
BATCH = 64
LEARNING_RATE = 0.005


def problems(key: jax.Array, count: int, steps: int) -> tuple[jax.Array, jax.Array]:
    """Sequences `(count, steps, 2)` and their targets `(count,)`."""
    number_key, first_key, second_key = jax.random.split(key, 3)
    numbers = jax.random.uniform(number_key, (count, steps))
    first = jax.random.randint(first_key, (count,), 0, steps // 2)
    second = jax.random.randint(second_key, (count,), steps // 2, steps)
    marks = jax.nn.one_hot(first, steps) + jax.nn.one_hot(second, steps)
    return jnp.stack([numbers, marks], axis=-1), jnp.sum(numbers * marks, axis=1)


@network(memory=GRU(HIDDEN), output=Linear(1))
def adder(net, x):
    return net.output(net.memory(x)[-1])[0]


def loss(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, target = example
    return ops.squared_error(adder(params, x), target)


def train(steps: int, batches: int, show: Any = print) -> Any:
    """The parameters after so many batches of new problems; `show` gets the error of each 100."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LEARNING_RATE))
    step = fnn.train_step(loss, optimizer)

    @functools.partial(jax.jit, donate_argnums=0)
    def hundred(state, key):
        """Each batch is drawn where it is used: one program for a hundred steps."""

        def one(state, key):
            return step(state, problems(key, BATCH, steps))

        state, metrics = jax.lax.scan(one, state, jax.random.split(key, 100))
        return state, jnp.mean(metrics["loss"])

    state = step.init(adder.init(jax.random.key(0), jnp.zeros((steps, 2))))
    for i in range(batches // 100):
        state, error = hundred(state, jax.random.key(i + 1))
        show(100 * (i + 1), float(error))
    return state.params


def gates(params: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The memory h and the update gate 1 − z of each step, both `(steps, hidden)`."""
    own = params["memory"]
    h = GRU(HIDDEN)(own, x)
    before = jnp.concatenate([jnp.zeros((1, HIDDEN)), h[:-1]])
    rows = slice(HIDDEN, 2 * HIDDEN)  # those of z, between r and n
    z = ops.sigmoid(x @ own["W"][rows].T + before @ own["U"][rows].T + own["b"][rows])
    return h, 1 - z


def draw(params: dict, x: jax.Array, target: jax.Array, path: Path) -> None:
    """A sequence, its gates and its memory, one below the other, over the steps."""
    h, update = jax.device_get(gates(params, x))
    numbers, marks = np.asarray(x).T
    steps = np.arange(len(x))
    # Units that the marks open come first.
    order = np.argsort(update[marks == 0].mean(axis=0) - update[marks == 1].mean(axis=0))
    figure = Figure(figsize=(10, 6), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2, 2))
    top.vlines(steps, 0, numbers, color="0.8")
    top.vlines(steps[marks == 1], 0, numbers[marks == 1], color="C3", linewidth=2)
    answer = float(adder(params, x))
    top.set(
        title=f"the red numbers' sum: {float(target):.3f}; the network's answer: {answer:.3f}",
        ylabel="number",
        ylim=(0, 1),
    )
    for axes, values, look, name in (
        (middle, update, {"cmap": "Greys", "vmin": 0, "vmax": 1}, "update gate 1 − z"),
        (bottom, h, {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}, "memory h"),
    ):
        image = axes.imshow(values.T[order], aspect="auto", interpolation="nearest", **look)
        figure.colorbar(image, ax=axes, label=name)
        axes.set(ylabel="unit")
    bottom.set(xlabel="step")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 steps, 300 batches")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    arguments = parser.parse_args()
    began = time.perf_counter()
    arguments.out.mkdir(parents=True, exist_ok=True)
    steps, batches = (20, 300) if arguments.quick else (STEPS, 2000)

    def show(done, error):
        print(f"{done:5d} batches: mean squared error {error:.5f}")

    params = train(steps, batches, show)
    x, target = problems(jax.random.key(10**6), 2000, steps)
    answers = jax.jit(jax.vmap(adder, (None, 0)))(params, x)
    error = float(jnp.mean((answers - target) ** 2))
    print(f"On 2000 new sequences of {steps} steps: {error:.5f} (always the mean: {1 / 6:.5f})")
    _, update = jax.vmap(gates, (None, 0))(params, x)
    marked = x[..., 1:] == 1
    at, elsewhere = (jnp.mean(update, axis=(0, 1), where=where) for where in (marked, ~marked))
    unit = jnp.argmax(at - elsewhere)
    opens = f"{at[unit]:.2f} at a mark, {elsewhere[unit]:.2f} elsewhere"
    print(f"The update gate of the unit that marks open most is {opens} on average")
    chosen = jnp.argmax(target[:20])
    draw(params, x[chosen], target[chosen], arguments.out / "gates.png")
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} seconds. The picture is in {arguments.out}{os.sep}")


if __name__ == "__main__":
    main()
