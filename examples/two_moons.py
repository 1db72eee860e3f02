"""Two moons: how a small network's decision boundary bends while it learns, as an animation.

    python examples/two_moons.py            about twenty seconds on two cores
    python examples/two_moons.py --quick    a few seconds, to see that it runs

400 points in two half-moons that reach into each other, and a network of two hidden layers of 16
tanh units, trained by Adam. After some of the epochs, more of them at the beginning, the plane is
drawn as the network divides it. The folder out/ then holds

    two_moons.gif    the animation
    two_moons.png    its last picture
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from fnn import ops, plot
from fnn.initializers import xavier_normal
from fnn.layers import Linear, chain

try:
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter
    from sklearn.datasets import make_moons
except ImportError as error:
    line = 'pip install "scikit-learn>=1.5" "matplotlib>=3.9"'
    raise SystemExit(f"{error}. For this example: {line}") from None

EPOCHS = 120
FRAMES = 40
NET = chain(
    hidden=Linear(16, weight_init=xavier_normal),
    f=ops.tanh,
    hidden2=Linear(16, weight_init=xavier_normal),
    f2=ops.tanh,
    output=Linear(2),
)


def right(scores, label):
    return jnp.argmax(scores) == label


LOSS = fnn.supervised(NET, ops.softmax_cross_entropy, accuracy=right)


def moons(examples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points `(examples, 2)`, float32, and the moon that each is of, int32."""
    points, labels = make_moons(examples, noise=0.2, random_state=seed)
    return points.astype(np.float32), labels.astype(np.int32)


def train(epochs: int, frames: int, points, labels) -> tuple[list, fnn.FitResult]:
    """Train; keep the parameters before, and after epochs spaced evenly in their roots."""
    start = NET.init(jax.random.key(0), points[0])
    chosen = set(np.unique(np.round(epochs * np.linspace(0, 1, frames) ** 2).astype(int)))
    kept = [(0, start)]

    def after_epoch(epoch, state, record):
        if epoch in chosen:
            kept.append((epoch, jax.device_get(state.params)))

    result = fnn.fit(
        LOSS,
        start,
        (points, labels),
        optax.adam(1e-2),
        epochs=epochs,
        batch_size=50,
        key=jax.random.key(1),
        after_epoch=after_epoch,
    )
    return kept, result


def animate(kept: list, result: fnn.FitResult, points, labels, out: Path, resolution: int) -> None:
    """A picture for each of the parameters kept: the plane, and the loss so far."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    losses = result.history["loss"]
    region = ((-1.9, 2.9), (-1.4, 1.9))
    writer = PillowWriter(fps=8)
    with writer.saving(figure, str(out / "two_moons.gif"), dpi=80):
        for number, (epoch, params) in enumerate(kept):
            plot.decision_boundary(
                functools.partial(NET, params),
                points,
                labels,
                region=region,
                resolution=resolution,
                axes=left,
            )
            left.set_title(f"epoch {epoch}", fontsize="small")
            right.clear()
            right.plot(range(1, len(losses) + 1), losses, color="0.8")
            right.plot(range(1, epoch + 1), losses[:epoch], color="C3")
            right.set(yscale="log", xlabel="epoch")
            right.yaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 6)), major_formatter="{x:g}")
            right.yaxis.set_minor_formatter(NullFormatter())
            right.set_title("training loss", fontsize="small")
            for axes in (left, right):
                axes.tick_params(labelsize="x-small")
            last = number == len(kept) - 1
            for _ in range(12 if last else 1):  # it stays a while
                writer.grab_frame()
    figure.savefig(out / "two_moons.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10 epochs, 4 pictures")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    arguments = parser.parse_args()
    epochs, frames, resolution = (10, 4, 40) if arguments.quick else (EPOCHS, FRAMES, 120)
    arguments.out.mkdir(parents=True, exist_ok=True)

    points, labels = moons(400, seed=0)
    kept, result = train(epochs, frames, points, labels)
    animate(kept, result, points, labels, arguments.out, resolution)
    new = fnn.evaluate(LOSS, result.params, moons(10_000, seed=1))
    size = (arguments.out / "two_moons.gif").stat().st_size
    print(f"On 10000 new points: accuracy {new['accuracy']:.1%}, loss {new['loss']:.3f}.")
    print(f"{len(kept)} pictures, {size / 1000:.0f} kB, in {arguments.out / 'two_moons.gif'}.")


if __name__ == "__main__":
    main()
