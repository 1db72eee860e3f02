"""Pictures of a network on handwritten digits: before, during and after its training.

    python examples/pictures.py            about half a minute on two cores
    python examples/pictures.py --quick    a few seconds, to see that it runs

A network of two layers, W2 relu(W1 x + b1) + b2, on scikit-learn's digits of 8x8 pixels. The
folder out/ then holds

    learning_rates.png    the loss while the learning rate grows; training takes the rate at
                          which it falls fastest
    activations.png       activations and gradients of each layer, epoch by epoch; dead relus
    confusion.png         which test digits are taken for which
    surface.png           the loss on a plane through the parameters
    reading.png           how the network reads a digit: templates, their scores h, what each adds
    mistake.png           the same of the misread test digit whose own score is furthest below the
                          highest
    log.csv               the numbers of each epoch
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from fnn import logs, ops, plot
from fnn.layers import Linear, chain

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    line = 'pip install "scikit-learn>=1.5" "matplotlib>=3.9"'
    raise SystemExit(f"{error}. For this example: {line}") from None

NET = chain(hidden=Linear(32), f=ops.relu, output=Linear(10))
NOISE = 0.4  # added to the training pixels, in their standard deviations


def right(scores, label):
    return jnp.argmax(scores) == label


CLEAN = fnn.supervised(NET, ops.softmax_cross_entropy, accuracy=right)


def noisy(params, example, key):
    """The loss of a digit with noise on its pixels: templates then are smoother."""
    image, label = example
    return CLEAN(params, (image + NOISE * jax.random.normal(key, image.shape), label))


def load():
    """Images `(examples, 64)` of mean 0 and deviation 1, and labels, for training and test."""
    images, labels = load_digits(return_X_y=True)
    images = ((images - images.mean()) / images.std()).astype(np.float32)
    X, X_test, y, y_test = train_test_split(
        images, labels.astype(np.int32), test_size=0.2, stratify=labels, random_state=0
    )
    return (X, y), (X_test, y_test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 epochs, small pictures")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    arguments = parser.parse_args()
    epochs, points = (3, 5) if arguments.quick else (40, 31)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    train, test = load()
    params = NET.init(jax.random.key(0), train[0][0])
    optimizer = lambda rate: optax.adamw(rate, weight_decay=0.1)
    found = fnn.find_learning_rate(noisy, params, train, optimizer, key=jax.random.key(1))
    plot.learning_rates(found).savefig(out / "learning_rates.png", dpi=100)
    assert found.suggestion is not None
    print(f"The loss falls fastest at a learning rate of {found.suggestion:.2g}.")

    look = fnn.activation_statistics(CLEAN)
    few = train[0][:256], train[1][:256]
    seen = [look(params, few)]
    result = fnn.fit(
        noisy,
        params,
        train,
        optimizer(found.suggestion),
        epochs=epochs,
        key=jax.random.key(2),
        validation=test,
        validation_loss=CLEAN,
        after_epoch=lambda epoch, state, record: seen.append(look(state, few)),
        logs=[logs.CSV(out / "log.csv")],
    )
    print(seen[-1])
    plot.activations(seen).savefig(out / "activations.png", dpi=100)

    images, labels = test
    scores = np.asarray(jax.vmap(NET, (None, 0))(result.params, images))
    plot.confusion(labels, scores).savefig(out / "confusion.png", dpi=100)
    surface = fnn.loss_surface(CLEAN, result.params, test, jax.random.key(3), points=points)
    plot.loss_surface(surface).savefig(out / "surface.png", dpi=100)

    wrong = scores.argmax(axis=1) != labels
    lead = scores.max(axis=1) - scores[np.arange(len(labels)), labels]
    for name, which in (("reading", 0), ("mistake", int(np.argmax(wrong * lead)))):
        figure = plot.two_layers(result.params, images[which], most=8)
        figure.suptitle(f"a {labels[which]}, read as a {scores[which].argmax()}")
        figure.savefig(out / f"{name}.png", dpi=100)
    print(f"Accuracy on {len(labels)} test digits: {1 - wrong.mean():.1%}. Pictures are in {out}.")


if __name__ == "__main__":
    main()
