"""Which training digits made the network err? Attribution by products of gradients.

    python examples/attribution.py            about eight seconds on two cores
    python examples/attribution.py --quick    a few seconds, to see that it runs

A step of gradient descent on training digit n changes the loss of test digit m by about
-rate <gₙ, hₘ>, where g and h are the two digits' gradients. Their sum over checkpoints of training
is TracIn (Pruthi et al. 2020, "Estimating training data influence by tracing gradient descent"):
where it is positive, the training digit has helped, where it is negative, it has harmed. All pairs
of products come from `fnn.per_example.gram`, and no digit's gradient is ever formed.

The network is trained on a part of scikit-learn's digits of 8x8 pixels; shown are the test digits
on which it is most confidently wrong. In the folder out/ you find afterwards

    attribution.png    a row for each test digit: the training digits that helped it most, and
                       those that harmed it most
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
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    line = 'pip install "scikit-learn>=1.5" "matplotlib>=3.9"'
    raise SystemExit(f"{error}. For this example: {line}") from None

HIDDEN = 64
CHECKPOINTS = 8
STEPS = 50  # between two checkpoints
BATCH = 64
RATE = 0.1  # of plain SGD, which is what TracIn is about
SHOWN = 5  # test digits
K = 4  # training digits of either kind for each


class Digits(NamedTuple):
    """Images of 64 pixels, float32, and labels 0..9, int32."""

    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def load() -> Digits:
    """The digits in [-1, 1], half of them for testing."""
    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        images / 8 - 1, labels, test_size=0.5, stratify=labels, random_state=0
    )
    pair = lambda x, y: (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))
    return Digits(pair(train, train_labels), pair(test, test_labels))


def loss_of(net: Layer):
    """The loss of one example."""

    def loss(params, example):
        image, label = example
        return ops.softmax_cross_entropy(net(params, image), label)

    return loss


def train(net: Layer, digits: Digits, checkpoints: int) -> list:
    """The parameters at each checkpoint, the last of them at the end."""
    images, labels = digits.train
    step = fnn.train_step(loss_of(net), optax.sgd(RATE), nonfinite="ignore")

    @jax.jit
    def advance(state, key):
        index = jax.random.randint(key, (STEPS, BATCH), 0, len(images))
        return jax.lax.scan(step, state, (images[index], labels[index]))[0]

    state = step.init(net.init(jax.random.key(0), images[0]))
    found = []
    for key in jax.random.split(jax.random.key(1), checkpoints):
        state = advance(state, key)
        found.append(state.params)
    return found


def influence(net: Layer, checkpoints: list, train, test) -> jax.Array:
    """TracIn: the sum over the checkpoints of rate <gₙ, hₘ>, (training digits, test digits)."""
    gradients = per_example.grads(loss_of(net))

    @jax.jit
    def products(params):
        _, of_train = gradients(params, train)
        _, of_test = gradients(params, test)
        return per_example.gram(of_train, of_test)

    # A digit is drawn STEPS BATCH / size times between two checkpoints, as one of BATCH.
    weight = RATE * STEPS / len(train[1])
    return weight * sum(products(params) for params in checkpoints)


def confidently_wrong(net: Layer, params, digits: Digits, count: int):
    """Test digits whose wrong class has the highest probability; all digits' predictions."""
    images, labels = digits.test
    p = jax.nn.softmax(jax.vmap(lambda x: net(params, x))(images))
    predicted = jnp.argmax(p, axis=1)
    confidence = jnp.where(predicted == labels, -1.0, jnp.max(p, axis=1))
    worst = np.asarray(jnp.argsort(-confidence))[: min(count, int(jnp.sum(predicted != labels)))]
    return worst, np.asarray(predicted), np.asarray(confidence)


def draw(digits: Digits, worst, predicted, scores, path: Path) -> None:
    """Rows: test digits; columns: the digit, the most helpful, the most harmful."""
    (images, labels), (test_images, test_labels) = jax.device_get(tuple(digits))
    figure = Figure(figsize=(1.05 * (2 * K + 1) + 0.8, 1.35 * len(worst) + 0.4))
    # Thin empty columns part the three groups.
    ratios = (1, 0.25, *[1] * K, 0.25, *[1] * K)
    grid = figure.add_gridspec(len(worst), len(ratios), width_ratios=ratios, hspace=0.5)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.9, bottom=0.02)

    def show(row, column, image, title, color):
        axes = figure.add_subplot(grid[row, column])
        axes.imshow(image.reshape(8, 8), cmap="gray_r")
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=8, pad=3)
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=1.5)
        return axes

    for row, m in enumerate(worst):
        order = np.argsort(-scores[:, row])
        title = f"{test_labels[m]}, taken for {predicted[m]}"
        first = [show(row, 0, test_images[m], title, "black")]
        for kind, chosen, color in ((0, order[:K], "tab:green"), (1, order[::-1][:K], "tab:red")):
            for i, n in enumerate(chosen):
                column = 2 + i + kind * (K + 1)
                title = f"{labels[n]}   {scores[n, row]:+.2f}"
                axes = show(row, column, images[n], title, color)
                first += [axes] if i == 0 else []
        if row == 0:
            for axes, text in zip(first, ("test digit", "helped most", "harmed most"), strict=True):
                x = axes.get_position().x0
                figure.text(x, 0.955, text, fontsize=11, weight="bold")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 checkpoints")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    arguments = parser.parse_args()
    began = time.perf_counter()
    arguments.out.mkdir(parents=True, exist_ok=True)
    digits = load()
    net = chain(hidden=Linear(HIDDEN), tanh=ops.tanh, output=Linear(10))
    checkpoints = train(net, digits, 2 if arguments.quick else CHECKPOINTS)
    worst, predicted, confidence = confidently_wrong(net, checkpoints[-1], digits, SHOWN)
    test_images, test_labels = digits.test
    accuracy = np.mean(predicted == np.asarray(test_labels))
    print(
        f"{len(digits.train[1])} training digits, {accuracy:.1%} of {len(test_labels)} test digits"
    )

    some = test_images[worst], test_labels[worst]
    scores = np.asarray(influence(net, checkpoints, digits.train, some))
    labels = np.asarray(digits.train[1])
    print("\nlabel  taken for  probability   labels that helped most   labels that harmed most")
    for row, m in enumerate(worst):
        order = np.argsort(-scores[:, row])
        helped, harmed = (" ".join(map(str, labels[n])) for n in (order[:K], order[::-1][:K]))
        print(
            f"{test_labels[m]:>5}{predicted[m]:>11}{confidence[m]:>13.2f}{helped:>26}{harmed:>26}"
        )
    path = arguments.out / "attribution.png"
    draw(digits, worst, predicted, scores, path)
    print(f"\n{time.perf_counter() - began:.0f} seconds. The picture is {path}")


if __name__ == "__main__":
    main()
