"""Training that is killed, and goes on: the same digits, the same parameters to the last bit.

    python examples/resume.py            about a minute on two cores
    python examples/resume.py --quick    fewer epochs, killed once

Two processes train the same network, a perceptron with dropout that reads handwritten digits, each
with checkpoints in a folder of its own. One is left alone. The other is killed (SIGKILL: it gets to
say nothing) three times, at random moments, and started again with the same call each time. At the
end the parameters of both are compared, bit by bit.

    python examples/resume.py --train out/mine

is the program that they run: kill it as you like (Ctrl-C and SIGTERM too), and start it again.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from fnn import ops
from fnn.layers import Dropout, Linear, chain

try:
    import orbax.checkpoint  # noqa: F401
    from sklearn.datasets import load_digits
except ImportError as error:
    line = 'pip install "scikit-learn>=1.5" "orbax-checkpoint>=0.12"'
    raise SystemExit(f"{error}. For this example: {line}") from None

KILLS = 3


def train(folder: Path, epochs: int) -> fnn.FitResult:
    """The whole program: begun, or gone on with, by the same call."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    held_out = np.arange(len(images)) % 5 == 0
    net = chain(hidden=Linear(100), f=ops.relu, drop=Dropout(0.2), output=Linear(10))
    right = lambda scores, label: jnp.argmax(scores) == label
    return fnn.fit(
        fnn.supervised(net, ops.softmax_cross_entropy, accuracy=right),
        net.init(jax.random.key(0), images[0]),
        (images[~held_out], labels[~held_out]),
        optax.adam(optax.cosine_decay_schedule(3e-3, 12 * epochs)),
        epochs=epochs,
        batch_size=128,
        key=jax.random.key(1),
        validation=(images[held_out], labels[held_out]),
        checkpoints=fnn.Checkpoints(folder, every=1, keep=3, best="validation_loss"),
    )


def start(folder: Path, epochs: int) -> subprocess.Popen:
    """The program in a process of its own."""
    command = [sys.executable, __file__, "--train", str(folder), "--epochs", str(epochs)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def finish(process: subprocess.Popen) -> None:
    if process.wait() != 0:
        raise SystemExit("the training process failed: its message is above")


def wait_for_one_more(folder: Path, process: subprocess.Popen) -> None:
    """Until the process has written a checkpoint."""
    checkpoints = fnn.Checkpoints(folder)
    before = checkpoints.steps()[-1:]
    while process.poll() is None and checkpoints.steps()[-1:] == before:
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer epochs, killed once")
    parser.add_argument("--train", type=Path, metavar="FOLDER", help="only train, or go on")
    parser.add_argument("--epochs", type=int, help="how many")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for checkpoints")
    arguments = parser.parse_args()
    epochs = arguments.epochs or (24 if arguments.quick else 100)
    if arguments.train:
        result = train(arguments.train, epochs)
        if result.interrupted:
            print("Saved. The same command goes on from here.")
        return
    alone, killed = arguments.out / "resume" / "alone", arguments.out / "resume" / "killed"
    shutil.rmtree(alone.parent, ignore_errors=True)
    finish(start(alone, epochs))
    print(f"one process:   {epochs} epochs, left alone")
    draw = random.Random(0)
    for i in range(1 if arguments.quick else KILLS):
        process = start(killed, epochs)
        wait_for_one_more(killed, process)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        ended = process.wait() == 0
        steps = fnn.Checkpoints(killed).steps()
        how = "was over already" if ended else "killed"
        print(f"process {i + 1}:     {how}; the newest checkpoint is of step {steps[-1]}")
    finish(start(killed, epochs))
    print("last process:  trained to the end\n")
    # The call of a run that is over returns its result.
    results = [train(folder, epochs) for folder in (alone, killed)]
    leaves = [jax.tree.leaves(result.state) for result in results]
    same = all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))
    accuracy = results[1].history["validation_accuracy"][-1]
    print(fnn.Checkpoints(killed, best="validation_loss"))
    print(f"\nvalidation accuracy {accuracy:.1%}; the state of both, bit by bit: ", end="")
    print("the same" if same else "not the same")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
