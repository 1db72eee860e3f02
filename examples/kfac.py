"""KFAC against Adam and SGD with momentum: a deep autoencoder of handwritten digits.

    python examples/kfac.py            about half a minute on two cores
    python examples/kfac.py --quick    a few steps, to see that it runs

The network has six layers, 64-32-16-4-16-32-64, with tanh between them: it squeezes a digit of 64
pixels into four numbers and draws it again. Its loss is badly scaled, and steepest descent crawls;
KFAC (Martens & Grosse 2015) multiplies the gradient by an approximate inverse of the curvature.

All optimisers start from the same weights and draw batches of the same size. Adam and SGD with
momentum try several learning rates, constant ones, and the rate with the lowest loss at the end
is shown; KFAC takes its rate and its momentum from its quadratic model of the loss. It needs about
an eighth of Adam's steps; but one of its steps, on a network as small as this and on a CPU, costs
about eight of Adam's, so that by the clock it wins little here. The data are all 1797 digits
of scikit-learn: the picture is about descent, not about digits that nobody has seen. In the
folder out/ you find afterwards

    kfac.png    the training loss against steps and against seconds, without those of compiling
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import curvature, ops
from fnn.layers import Layer, Linear, chain

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter
    from sklearn.datasets import load_digits
except ImportError as error:
    line = 'pip install "scikit-learn>=1.5" "matplotlib>=3.9"'
    raise SystemExit(f"{error}. For this example: {line}") from None

BATCH = 512
WIDTHS = (32, 16, 4, 16, 32)
STEPS = {"KFAC": 500, "Adam": 2500, "SGD with momentum": 2500}
RATES = {
    "KFAC": (None,),
    "Adam": (0.01, 0.02, 0.03),
    "SGD with momentum": (0.003, 0.005, 0.01),
}
MOMENTUM = 0.9
POINTS = 50  # of a curve


def load() -> jax.Array:
    """All 1797 digits, 64 pixels each, in [-1, 1]."""
    images, _ = load_digits(return_X_y=True)
    return jnp.asarray(images / 8 - 1, jnp.float32)


def autoencoder() -> Layer:
    """64-32-16-4-16-32-64, tanh between the layers."""
    layers: dict = {}
    for i, width in enumerate(WIDTHS, 1):
        layers |= {f"layer{i}": Linear(width), f"tanh{i}": ops.tanh}
    return chain(**layers, output=Linear(64))


def optimizer_of(kind: str, net: Layer, images: jax.Array, rate: jax.Array | float | None):
    """The optimiser of a kind with a learning rate; KFAC has none."""
    if kind == "KFAC":
        example = (images[:BATCH], images[:BATCH])
        return curvature.kfac(net, ops.squared_error, example)
    made = optax.adam(rate) if kind == "Adam" else optax.sgd(rate, momentum=MOMENTUM)
    return optax.with_extra_args_support(made)


def trainer(kind: str, net: Layer, images: jax.Array):
    """Three functions: the first state, a step with each key, and the loss over all digits."""

    def mean_loss(params, batch):
        return jnp.mean(jax.vmap(lambda x: ops.squared_error(net(params, x), x))(batch))

    def begin(rate):
        params = net.init(jax.random.key(0), images[0])
        return params, optimizer_of(kind, net, images, rate).init(params)

    def advance(state, keys, rate):
        optimizer = optimizer_of(kind, net, images, rate)

        def step(state, key):
            params, memory = state
            batch = images[jax.random.randint(key, (BATCH,), 0, len(images))]
            gradient = jax.grad(mean_loss)(params, batch)
            # KFAC looks at inputs and targets, here the same; the others ignore them.
            updates, memory = optimizer.update(gradient, memory, params, batch=(batch, batch))
            return (optax.apply_updates(params, updates), memory), None

        return jax.lax.scan(step, state, keys)[0]

    def measure(state):
        return mean_loss(state[0], images)

    return begin, advance, measure


class Curve(NamedTuple):
    """How training went."""

    name: str
    steps: np.ndarray
    loss: np.ndarray  # over all digits, after so many steps
    each: float  # seconds a step
    compiling: float  # seconds, before


def train(kind: str, net: Layer, images: jax.Array, steps: int) -> list[Curve]:
    """Train with each of the kind's rates, and time the steps; a program makes several."""
    begin, advance, measure = map(jax.jit, trainer(kind, net, images))
    every = steps // POINTS
    keys = jax.random.split(jax.random.key(1), (POINTS, every))
    began = time.perf_counter()
    run = advance.lower(begin(RATES[kind][0]), keys[0], RATES[kind][0]).compile()
    compiling = time.perf_counter() - began
    curves = []
    for rate in RATES[kind]:
        state = begin(rate)
        loss, seconds = [float(measure(state))], []
        for some in keys:
            began = time.perf_counter()
            state = jax.block_until_ready(run(state, some, rate))
            seconds.append(time.perf_counter() - began)
            loss.append(float(measure(state)))
        # All calls do the same work; the median leaves out what else the machine was busy with.
        each = float(np.median(seconds)) / every
        name = kind if rate is None else f"{kind}, rate {rate:g}"
        curves.append(Curve(name, every * np.arange(POINTS + 1), np.array(loss), each, compiling))
    return curves


def draw(curves: list[Curve], path: Path) -> None:
    """Loss against steps, and against seconds."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for curve in curves:
        left.plot(curve.steps[1:], curve.loss[1:], label=curve.name)
        right.plot(curve.each * curve.steps[1:], curve.loss[1:], label=curve.name)
    left.set(xlabel="steps", ylabel="training loss", title="against steps")
    right.set(xlabel="seconds, without compiling", title="against time")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    left.yaxis.set(
        major_locator=LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)), major_formatter="{x:g}"
    )
    left.yaxis.set_minor_formatter(NullFormatter())
    for axis in (left.xaxis, right.xaxis):
        axis.set_major_formatter("{x:g}")
    right.legend(fontsize="small", loc="upper right")
    figure.savefig(path, dpi=120)


def report(curves: list[Curve]) -> None:
    """A table: how each ended, and when it had reached the loss that the others ended at."""
    goal = max(curve.loss[-1] for curve in curves[:2])  # that KFAC and Adam both reached
    heads = ("steps", "loss", "ms a step", "compiling", f"loss {goal:.2f} after")
    print(f"{'':<30}{heads[0]:>7}{heads[1]:>8}{heads[2]:>11}{heads[3]:>11}{heads[4]:>26}")
    for curve in curves:
        reached = np.flatnonzero(curve.loss <= goal)
        when = "never"
        if reached.size:
            count = curve.steps[reached[0]]
            when = f"{count} steps, {curve.each * count:.1f} s"
        print(
            f"{curve.name:<30}{curve.steps[-1]:>7}{curve.loss[-1]:>8.2f}{1000 * curve.each:>11.2f}"
            f"{curve.compiling:>9.1f} s{when:>26}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    arguments = parser.parse_args()
    began = time.perf_counter()
    arguments.out.mkdir(parents=True, exist_ok=True)
    net, images = autoencoder(), load()
    curves = []
    for kind, full in STEPS.items():
        tried = train(kind, net, images, full // 10 if arguments.quick else full)
        for curve in tried:
            print(f"{curve.name:<30} loss {curve.loss[-1]:6.2f} after {curve.steps[-1]} steps")
        curves.append(min(tried, key=lambda c: np.nan_to_num(c.loss[-1], nan=np.inf)))
    print()
    report(curves)
    draw(curves, arguments.out / "kfac.png")
    print(
        f"\n{time.perf_counter() - began:.0f} seconds. The picture is {arguments.out / 'kfac.png'}"
    )


if __name__ == "__main__":
    main()
