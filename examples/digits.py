"""Handwritten digits: a linear classifier, two and three layers, the lecture's activations.

    python examples/digits.py            about half a minute on two cores
    python examples/digits.py --quick    a few seconds, to see that it runs

The data are scikit-learn's 1797 digits of 8x8 pixels, which come with the package. A fifth of
them, the same in every run, is kept for testing. Each network is trained from five different
starts, all five at once: the program of one training step, mapped over the starts. In the folder
out/ you find afterwards

    graph.svg               the graph of a two-layer network's loss, with values and gradients
    curves.png              training loss and test error of all networks, epoch by epoch
    templates_linear.png    the rows of the linear classifier's W as images: a template a digit
    templates_hidden.png    the largest rows of W1 of a two-layer network
"""

from __future__ import annotations

import argparse
import functools
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
    from rich.progress import BarColumn, Progress, TextColumn
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
    """The loss of one example: cross entropy of the scores with smoothed labels."""

    def loss(params, example):
        image, label = example
        scores = net(params, image)
        return ops.softmax_cross_entropy(scores, label, label_smoothing=SMOOTHING)

    return loss


def accuracy(net: Layer, params, images, labels):
    """The fraction of the images whose largest score is their label's."""
    scores = jax.vmap(net, (None, 0))(params, images)
    return jnp.mean(jnp.argmax(scores, axis=-1) == labels)


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
            table.add_row(name, worst.what, worst.against, f"{worst.error:.1e}", count)
    console.print(table)


# ---------------------------------------------------------------------------------------- training


class Run(NamedTuple):
    """What training one network from several starts gave."""

    params: dict  # each array with a leading axis over the starts
    loss: np.ndarray  # (epochs, starts)
    accuracy: np.ndarray  # (epochs, starts), on the test images


@functools.partial(jax.jit, static_argnames="starts")
def batches(key, data, *, starts: int):
    """An epoch's batches: the data in a new order, with new noise, another for each start.

    Returns:
        Images `(starts, steps, BATCH, 64)` and labels `(starts, steps, BATCH)`.
    """
    images, labels = data
    steps = len(images) // BATCH

    def of_start(key):
        order_key, noise_key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(images))[: steps * BATCH]
        order = order.reshape(steps, BATCH)
        noise = jax.random.normal(noise_key, (steps, BATCH, images.shape[1]))
        return images[order] + NOISE * noise, labels[order]

    return jax.vmap(of_start)(jax.random.split(key, starts))


def train(net: Layer, digits: Digits, *, epochs: int, starts: int, show: Callable = print) -> Run:
    """Train a network from several starts at once; `show` gets the numbers of each epoch.

    An epoch is one program: a scan of the training step over the batches, mapped over the starts.
    """
    images = digits.train[0]
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, epochs * (len(images) // BATCH))
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    step = fnn.train_step(loss_of(net), optimizer, nonfinite="ignore")

    # Not jitted: networks of the same shapes share the little programs that draw their weights.
    @jax.vmap
    def begin(key):
        return step.init(net.init(key, images[0]))

    @functools.partial(jax.jit, donate_argnums=0)
    @jax.vmap
    def epoch(state, batches):
        state, metrics = jax.lax.scan(step, state, batches)
        return state, (jnp.mean(metrics["loss"]), accuracy(net, state.params, *digits.test))

    key = jax.random.key(0)
    state = begin(jax.random.split(key, starts))
    history = []
    for i in range(epochs):
        drawn = batches(jax.random.fold_in(key, i + 1), digits.train, starts=starts)
        state, numbers = epoch(state, drawn)
        history.append(jax.device_get(numbers))
        show(i + 1, *history[-1])
    loss, test_accuracy = (np.array(x) for x in zip(*history, strict=True))
    return Run(state.params, loss, test_accuracy)


def train_all(
    nets: dict[str, Layer],
    digits: Digits,
    *,
    epochs: int,
    starts: int,
    pool: Executor,
    console: Console,
) -> dict[str, Run]:
    """Train each network, behind a progress bar."""
    with Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        console=console,
    ) as progress:

        def train_one(name):
            task = progress.add_task(name, total=epochs, text="compiling")

            def show(epoch, loss, test):
                text = f"loss {np.mean(loss):.3f}  test {np.mean(test):.2%}"
                progress.update(task, completed=epoch, text=text)

            return train(nets[name], digits, epochs=epochs, starts=starts, show=show)

        return dict(zip(nets, pool.map(train_one, nets), strict=True))


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


def draw_curves(runs: dict[str, Run], path: Path) -> None:
    """Training loss and test error of every network, the means over its starts."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = {"2 layers": "-", "3 layers": "--"}
    kinds = [name.split(", ")[-1] for name in runs]
    for name, run in runs.items():
        layers, _, kind = name.partition(", ")
        look = {"color": f"C{sorted(set(kinds)).index(kind or name)}", "label": name}
        epochs = np.arange(1, len(run.loss) + 1)
        left.plot(epochs, run.loss.mean(axis=1), styles.get(layers, ":"), **look)
        right.plot(epochs, 1 - run.accuracy.mean(axis=1), styles.get(layers, ":"), **look)
    for axes, title in ((left, "training loss"), (right, "test error")):
        axes.set(title=title, xlabel="epoch", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_minor_formatter(NullFormatter())
    left.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    percent = PercentFormatter(1, decimals=0)
    right.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=percent)
    figure.legend(handles=left.get_lines(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)


def draw_templates(runs: dict[str, Run], out: Path) -> None:
    """W of the linear classifier, a row an image, and W1 of two layers, the 64 largest rows."""
    rows = runs["linear"].params["output"]["W"][0]  # of the first start
    titles = [str(digit) for digit in range(10)]
    plot.templates(rows, columns=5, titles=titles).savefig(out / "templates_linear.png", dpi=120)
    rows = runs["2 layers, relu"].params["hidden"]["W"][0]
    largest = jnp.argsort(-jnp.linalg.norm(rows, axis=1))[:64]
    plot.templates(rows[largest], columns=16).savefig(out / "templates_hidden.png", dpi=80)


def report(runs: dict[str, Run], digits: Digits, console: Console) -> None:
    """A table of test accuracies."""
    table = Table(title=f"Accuracy on {len(digits.test[1])} test digits")
    for column in ("network", "parameters", "mean", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, run in runs.items():
        final = run.accuracy[-1]
        count = sum(x[0].size for x in jax.tree.leaves(run.params))
        table.add_row(
            name,
            f"{count:,}",
            f"{final.mean():.2%}",
            f"{final.min():.2%}",
            f"{final.max():.2%}",
        )
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
        runs = train_all(nets, digits, epochs=epochs, starts=starts, pool=pool, console=console)
    report(runs, digits, console)
    draw_curves(runs, out / "curves.png")
    draw_templates(runs, out)
    seconds = time.perf_counter() - began
    console.print(f"{seconds:.0f} seconds. The pictures are in {out}{os.sep}", highlight=False)


if __name__ == "__main__":
    main()
