"""How large should a batch be? The gradient noise scale of digits, during training.

    python examples/noise_scale.py            about ten seconds on two cores
    python examples/noise_scale.py --quick    a few seconds, to see that it runs

The noise scale tr Σ / |G|² (McCandlish et al. 2018, "An empirical model of large-batch training")
compares the spread Σ of the examples' gradients with their mean G. A batch that is much smaller
is mostly noise; one that is much larger costs more than it brings. It is small at first, when all
examples pull the same way, and grows as the loss falls. Here Adam trains a two-layer network on
batches of 64 of scikit-learn's digits, and now and then `fnn.per_example.noise_scale` looks at
the gradients of all 1437 training digits at once, none of which is ever formed. Training stops
while the scale is below their number: beyond it the digits can't tell G from zero, and the
estimate swings and may even come out negative. In the folder out/ you find afterwards

    noise_scale.png    training loss and noise scale against steps
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

import fnn
from fnn import ops, per_example
from fnn.layers import Layer, Linear, chain

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    line = 'pip install "scikit-learn>=1.5" "matplotlib>=3.9"'
    raise SystemExit(f"{error}. For this example: {line}") from None

HIDDEN = 64
BATCH = 64
STEPS = 300
RATE = 1e-3  # of Adam
POINTS = 40  # at which the noise scale is measured


def load() -> tuple[jax.Array, jax.Array]:
    """Training images of 64 pixels in [-1, 1], and labels 0..9."""
    images, labels = load_digits(return_X_y=True)
    train, _, train_labels, _ = train_test_split(
        images / 8 - 1, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return jnp.asarray(train, jnp.float32), jnp.asarray(train_labels, jnp.int32)


def loss_of(net: Layer):
    """The loss of one example."""

    def loss(params, example):
        image, label = example
        return ops.softmax_cross_entropy(net(params, image), label)

    return loss


class History(NamedTuple):
    """Three arrays of as many numbers."""

    steps: np.ndarray
    loss: np.ndarray  # over all training digits
    scale: np.ndarray


def train(net: Layer, data: tuple[jax.Array, jax.Array], steps: int) -> History:
    """Train, and measure loss and noise scale after 0, 1, 2, ... steps, ever more sparsely."""
    images, labels = data
    step = fnn.train_step(loss_of(net), optax.adam(RATE))
    gradients = per_example.grads(loss_of(net))

    @jax.jit
    def measure(params):
        losses, grads = gradients(params, data)
        return jnp.mean(losses), per_example.noise_scale(grads)

    at = np.unique(np.geomspace(1, steps, POINTS).round().astype(int))
    state = step.init(net.init(jax.random.key(0), images[0]))
    measured = [measure(state.params)]
    chance = np.random.default_rng(0)
    for i in range(1, steps + 1):
        index = chance.integers(len(images), size=BATCH)
        state, _ = step(state, (images[index], labels[index]))
        if i in at:
            measured.append(measure(state.params))
    step.finish()
    loss, scale = np.array(jax.device_get(measured)).T
    return History(np.concatenate([[0], at]), loss, scale)


def draw(history: History, path: Path) -> None:
    """Loss and noise scale against steps."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, loss, scale = (x[1:] for x in history)  # no place for step 0 on a log axis
    left.plot(steps, loss, "C0")
    left.set(ylabel="training loss", title="loss")
    right.plot(steps, np.where(scale > 0, scale, np.nan), "C1", label="noise scale")
    right.axhline(BATCH, color="gray", linestyle=":", label=f"the batch of {BATCH}")
    right.set(ylabel="examples", title="noise scale")
    right.legend()
    for axes in (left, right):
        axes.set(xlabel="steps", xscale="log", yscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="64 steps")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    arguments = parser.parse_args()
    began = time.perf_counter()
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = load()
    net = chain(hidden=Linear(HIDDEN), tanh=ops.tanh, output=Linear(10))
    history = train(net, data, 64 if arguments.quick else STEPS)
    print(f"{'steps':>6}{'loss':>10}{'noise scale':>14}")
    rows = [0, *np.searchsorted(history.steps, [1, 3, 10, 30, 100, 200, STEPS])]
    for i in (i for i in rows if i < len(history.steps)):
        print(f"{history.steps[i]:>6}{history.loss[i]:>10.4f}{history.scale[i]:>14.1f}")
    path = arguments.out / "noise_scale.png"
    draw(history, path)
    print(f"\n{time.perf_counter() - began:.0f} seconds. The picture is {path}")


if __name__ == "__main__":
    main()
