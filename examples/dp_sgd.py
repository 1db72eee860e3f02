"""Differentially private training: DP-SGD on handwritten digits, and what privacy costs.

    python examples/dp_sgd.py               fifteen seconds on two cores
    python examples/dp_sgd.py --steps 60    to see that it runs

Each step draws every training image with the same chance, clips each image's gradient to norm C,
adds normal noise of deviation σ C to their sum, and hands that, divided by the expected number of
images, to an optimiser (Abadi et al. 2016, "Deep learning with differential privacy"). Nobody who
sees the trained network can tell much better than by a factor exp ε whether a given image was
among the training data; jax-privacy's accountant says how small ε is. The data are scikit-learn's
1797 digits, a fifth of them for testing.
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fnn import ops, per_example
from fnn.layers import Layer, Linear, chain

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    line = 'pip install "scikit-learn>=1.5"'
    raise SystemExit(f"{error}. For this example: {line}") from None

STEPS = 300
BATCH = 256  # expected; a draw has more or fewer
CLIP = 1.0  # C
NOISE = (0.0, 1.0, 2.0, 4.0)  # σ
DELTA = 1e-4  # the chance that the guarantee fails: below 1 / (number of images)
RATE = 0.5  # of SGD with momentum, falling to zero
HIDDEN = 64


class Digits(NamedTuple):
    """Images of 64 pixels, float32, and labels 0..9, int32."""

    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def load() -> Digits:
    """The digits, in [-1, 1]: scaled by what is known of them beforehand, not by the data."""
    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        images / 8 - 1, labels, test_size=0.2, stratify=labels, random_state=0
    )
    pair = lambda x, y: (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))
    return Digits(pair(train, train_labels), pair(test, test_labels))


def draw(key: jax.Array, size: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Poisson sampling: every image with the chance BATCH / size, independently.

    Programs have fixed shapes, so the draw is filled up to the capacity, and a mask tells which
    images count.
    """
    drawn = jax.random.bernoulli(key, BATCH / size, (size,))
    index = jnp.nonzero(drawn, size=capacity, fill_value=0)[0]
    return index, jnp.arange(capacity) < jnp.sum(drawn)


def train(
    net: Layer, digits: Digits, *, steps: int, clip: float, noise: float, seed: int = 0
) -> float:
    """The accuracy on the test digits after so many private steps."""
    images, labels = digits.train
    size = len(images)
    # Eight standard deviations above the mean: a draw never gets there.
    capacity = min(size, int(BATCH + 8 * BATCH**0.5))
    optimizer = optax.sgd(optax.linear_schedule(RATE, 0.0, steps), momentum=0.9)

    def loss(params, example):
        image, label = example
        return ops.softmax_cross_entropy(net(params, image), label)

    clipped = per_example.clipped_grad(loss, clip, noise_multiplier=noise)

    def step(state, key):
        params, moments = state
        draw_key, noise_key = jax.random.split(key)
        index, mask = draw(draw_key, size, capacity)
        found = clipped(params, (images[index], labels[index]), mask=mask, noise_key=noise_key)
        gradient = jax.tree.map(lambda g: g / BATCH, found.gradient)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), None

    @jax.jit
    def run(key):
        key, init_key = jax.random.split(key)
        params = net.init(init_key, images[0])
        state = params, optimizer.init(params)
        (params, _), _ = jax.lax.scan(step, state, jax.random.split(key, steps))
        test_images, test_labels = digits.test
        logits = jax.vmap(lambda x: net(params, x))(test_images)
        return jnp.mean(jnp.argmax(logits, axis=1) == test_labels)

    return float(run(jax.random.key(seed)))


def epsilon(noise: float, steps: int, size: int) -> float | None:
    """ε for δ = DELTA by jax-privacy's accountant, None where that isn't installed."""
    if noise == 0:
        return float("inf")
    try:
        from jax_privacy import accounting
    except ImportError:
        return None
    accountant = accounting.DpsgdTrainingAccountant(accounting.PldAccountantConfig())
    run = accounting.DpParams(
        noise_multipliers=noise, num_samples=size, delta=DELTA, batch_size=BATCH
    )
    return accountant.compute_epsilon(steps, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    began = time.perf_counter()
    digits = load()
    net = chain(hidden=Linear(HIDDEN), tanh=ops.tanh, output=Linear(10))
    size = len(digits.train[0])
    print(f"{size} training images, {steps} steps of about {BATCH}, delta = {DELTA}")
    print(f"\n{'':<24}{'sigma':>6}{'epsilon':>10}{'test accuracy':>16}")
    rows = [("without clipping", 1e9, 0.0), *(("clipped", CLIP, s) for s in NOISE)]
    for name, clip, noise in rows:
        accuracy = train(net, digits, steps=steps, clip=clip, noise=noise)
        private = epsilon(noise, steps, size)
        shown = "?" if private is None else f"{private:.2f}"
        print(f"{name + (' and noise' if noise else ''):<24}{noise:>6}{shown:>10}{accuracy:>15.1%}")
    if private is None:
        print('\nFor epsilon: pip install "jax-privacy>=2.0"')
    print(f"\n{time.perf_counter() - began:.0f} seconds")


if __name__ == "__main__":
    main()
