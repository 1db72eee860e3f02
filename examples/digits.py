"""Handwritten digits: a linear classifier, two and three layers, the lecture's activations.

    python examples/digits.py            one to two minutes on two cores
    python examples/digits.py --quick    a few seconds, to see that it runs

The data are scikit-learn's 1797 digits of 8x8 pixels, which come with the package. A fifth of
them, the same in every run, is kept for testing. Each network is trained from five different
starts, all by one call of `fnn.sweep`: a program for each network, which trains its five starts. In
the folder out/ you find afterwards

    graph.svg               the graph of a two-layer network's loss, with values and gradients
    curves.png              training loss and test error of all networks, epoch by epoch
    templates_linear.png    the rows of the linear classifier's W as images: a template a digit
    templates_hidden.png    the largest rows of W1 of a two-layer network
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from fnn import ops, plot
from fnn.initializers import Initializer, he_normal, xavier_normal
from fnn.layers import Layer, Linear, Maxout, chain

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
    from rich.console import Console
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    line = 'pip install "scikit-learn>=1.5" "matplotlib>=3.9" "pygraphviz>=2.0" "rich>=13"'
    raise SystemExit(f"{error}. For this example: {line}") from None

EPOCHS = 40
STARTS = 5
BATCH = 64
LEARNING_RATE = 0.01  # adamw, falling to zero along a cosine
WEIGHT_DECAY = 0.1
SMOOTHING = 0.1  # of the labels: what the losses don't ask for, networks don't overfit to
NOISE = 0.4  # added to the pixels, drawn anew at each step; in their standard deviations

# Noise, smoothing and decay were compared on parts of the training data; a first sweep, from which
# the learning rate comes, had been scored on the test data.


class Digits(NamedTuple):
    """Images as vectors of 64 pixels, float32, and labels 0..9, int32."""

    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def load() -> Digits:
    """The digits, divided once and for all, scaled by the training pixels' mean and deviation."""
    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    mean, deviation = train.mean(), train.std()

    def scaled(x):
        return jnp.asarray((x - mean) / deviation, jnp.float32)

    return Digits(
        (scaled(train), jnp.asarray(train_labels, jnp.int32)),
        (scaled(test), jnp.asarray(test_labels, jnp.int32)),
    )


# ------------------------------------------------------------------------------------ networks

# Each activation with the initialisation that suits it.
ACTIVATIONS: dict[fnn.Operation, Initializer] = {
    ops.sigmoid: xavier_normal,
    ops.tanh: xavier_normal,
    ops.relu: he_normal,
    ops.leaky_relu: he_normal,
    ops.elu: he_normal,
}


def networks() -> dict[str, Layer]:
    """W x + b; W2 f(W1 x + b1) + b2; W3 f(W2 f(W1 x + b1) + b2) + b3."""
    nets: dict[str, Layer] = {"linear": chain(output=Linear(10))}
    for f, init in ACTIVATIONS.items():
        nets[f"2 layers, {f.name}"] = chain(
            hidden=Linear(128, weight_init=init), f=f, output=Linear(10)
        )
    nets["2 layers, maxout"] = chain(hidden=Maxout(128), output=Linear(10))
    for f, init in ACTIVATIONS.items():
        nets[f"3 layers, {f.name}"] = chain(
            hidden=Linear(128, weight_init=init),
            f=f,
            hidden2=Linear(64, weight_init=init),
            f2=f,
            output=Linear(10),
        )
    nets["3 layers, maxout"] = chain(hidden=Maxout(128), hidden2=Maxout(64), output=Linear(10))
    return nets


def loss_of(net: Layer):
    """The loss of one example: cross entropy of its scores with smoothed labels."""

    def loss(params, example):
        image, label = example
        scores = net(params, image)
        return ops.softmax_cross_entropy(scores, label, label_smoothing=SMOOTHING)

    return loss


def noisy(loss: Callable):
    """The same loss of the image with noise on it, drawn anew at each step."""

    def loss_with_noise(params, example, key):
        image, label = example
        return loss(params, (image + NOISE * jax.random.normal(key, image.shape), label))

    return loss_with_noise


def test_of(net: Layer):
    """What is looked at on the test images: the loss, and whether the label's score is largest."""
    loss = loss_of(net)

    def test(params, example):
        image, label = example
        return loss(params, example), {"accuracy": jnp.argmax(net(params, image)) == label}

    return test


# -------------------------------------------------------------------------- checks before training


def check(nets: dict[str, Layer], digits: Digits, pool: Executor, console: Console) -> None:
    """Hold each activation's rule, and a network's gradient, against finite differences.

    Raises:
        fnn.GradientError: one of them is wrong.
    """
    key = jax.random.key(0)
    image, label = (a[0] for a in digits.train)

    def check_activation(f):
        x = jax.random.normal(key, (2, 12))
        return fnn.check_rule(f, x, dtypes=("float64",), order=1)

    def check_loss(name):
        def loss(params):
            return loss_of(nets[name])(params, (image, label))

        params = nets[name].init(key, image)
        return fnn.check_grads(loss, params, dtypes=("float64",), order=1, max_entries=8)

    reports = {f.name: pool.submit(check_activation, f) for f in (*ACTIVATIONS, ops.maxout)}
    reports["loss of 2 layers, relu"] = pool.submit(check_loss, "2 layers, relu")

    table = Table(title="Gradient checks, in float64")
    for column in ("function", "furthest off", "against"):
        table.add_column(column, no_wrap=True)
    for column in ("relative error", "checks"):
        table.add_column(column, justify="right")
    with console.status("checking gradients"):
        for name, future in reports.items():
            worst, count = future.result().worst, str(len(future.result().checks))
            table.add_row(name, worst.what, worst.against, worst.off, count)
    console.print(table)


# ---------------------------------------------------------------------------------------- training


def train(nets: dict[str, Layer], digits: Digits, *, epochs: int, starts: int) -> fnn.SweepResult:
    """Train all networks from several starts, and look at the test images after each epoch."""
    images = digits.train[0]
    steps = epochs * -(-len(images) // BATCH)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    return fnn.sweep(
        lambda network: noisy(loss_of(nets[network])),
        {"network": list(nets), "seed": range(starts)},
        digits.train,
        optimizer=optax.adamw(schedule, weight_decay=WEIGHT_DECAY),
        init=lambda network, seed: nets[network].init(jax.random.key(seed), images[0]),
        epochs=epochs,
        batch_size=BATCH,
        validation=digits.test,
        validation_loss=lambda network: test_of(nets[network]),
    )


# ---------------------------------------------------------------------------------------- pictures


def draw_graph(net: Layer, digits: Digits, path: Path) -> fnn.Graph:
    """The graph of the loss of one image, with its values and gradients."""

    def loss(W1, b1, W2, b2, x, label):
        params = {"hidden": {"W": W1, "b": b1}, "output": {"W": W2, "b": b2}}
        return loss_of(net)(params, (x, label))

    x, label = (a[0] for a in digits.train)
    params = net.init(jax.random.key(0), x)
    W1, b1 = params["hidden"]["W"], params["hidden"]["b"]
    W2, b2 = params["output"]["W"], params["output"]["b"]
    graph = fnn.graph(loss)(W1, b1, W2, b2, x, label)
    graph.backprop().to_svg(path)
    return graph


def draw_curves(found: fnn.SweepResult, path: Path) -> None:
    """Training loss and test error of every network, the means over its starts."""
    loss = found.history["loss"].mean(axis=1)  # of (networks, starts, epochs)
    error = 1 - found.history["validation_accuracy"].mean(axis=1)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = {"2 layers": "-", "3 layers": "--"}
    names = found.axes["network"]
    kinds = sorted({name.split(", ")[-1] for name in names})
    for i, name in enumerate(names):
        layers, _, kind = name.partition(", ")
        look = {"color": f"C{kinds.index(kind or name)}", "label": name}
        epochs = np.arange(1, loss.shape[1] + 1)
        left.plot(epochs, loss[i], styles.get(layers, ":"), **look)
        right.plot(epochs, error[i], styles.get(layers, ":"), **look)
    for axes, title in ((left, "training loss"), (right, "test error")):
        axes.set(title=title, xlabel="epoch", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_minor_formatter(NullFormatter())
    left.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    percent = PercentFormatter(1, decimals=0)
    right.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=percent)
    figure.legend(handles=left.get_lines(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)


def draw_templates(found: fnn.SweepResult, out: Path) -> None:
    """W of the linear classifier, a row an image, and W1 of two layers, the 64 largest rows."""
    rows = found.member(network="linear", seed=0).params["output"]["W"]
    titles = [str(digit) for digit in range(10)]
    plot.templates(rows, columns=5, titles=titles).savefig(out / "templates_linear.png", dpi=120)
    rows = found.member(network="2 layers, relu", seed=0).params["hidden"]["W"]
    largest = jnp.argsort(-jnp.linalg.norm(rows, axis=1))[:64]
    plot.templates(rows[largest], columns=16).savefig(out / "templates_hidden.png", dpi=80)


def report(found: fnn.SweepResult, digits: Digits, console: Console) -> None:
    """A table of test accuracies."""
    table = Table(title=f"Accuracy on {len(digits.test[1])} test digits")
    for column in ("network", "parameters", "mean", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "network" else "right")
    accuracy = found["validation_accuracy"]
    columns = (accuracy.mean("seed"), accuracy.min("seed"), accuracy.max("seed"))
    for i, name in enumerate(found.axes["network"]):
        params = found.member(network=name, seed=0).params
        count = sum(x.size for x in jax.tree.leaves(params))
        table.add_row(name, f"{count:,}", *(f"{column.values[i]:.2%}" for column in columns))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 epochs, 2 starts, 4 networks")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    arguments = parser.parse_args()
    began = time.perf_counter()
    epochs, starts = (3, 2) if arguments.quick else (EPOCHS, STARTS)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    console = Console()

    digits, nets = load(), networks()
    if arguments.quick:
        chosen = ("linear", "2 layers, relu", "2 layers, maxout", "3 layers, tanh")
        nets = {name: nets[name] for name in chosen}
    # Most of the time goes into compiling, on one core for each program: compile several at once.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        check(nets, digits, pool, console)
    graph = draw_graph(nets["2 layers, relu"], digits, out / "graph.svg")
    console.print(f"In the graph of the two-layer loss, {graph.coverage()}")
    found = train(nets, digits, epochs=epochs, starts=starts)
    report(found, digits, console)
    draw_curves(found, out / "curves.png")
    draw_templates(found, out)
    seconds = time.perf_counter() - began
    console.print(f"{seconds:.0f} seconds. The pictures are in {out}{os.sep}", highlight=False)


if __name__ == "__main__":
    main()
