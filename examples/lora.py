"""LoRA: a GPT that has read one module learns another by matrices of rank 8.

    python examples/lora.py            about two minutes on two cores
    python examples/lora.py --quick    a few seconds, to see that it runs

A small GPT is trained on the source of Python's `_pydecimal`, byte by byte, and then fine-tuned to
that of `tarfile`: once by low-rank adapters (Hu et al. 2022), W x + B (A x) in the place of W x for
each weight of its blocks, with W frozen; once by all its weights. A fifth of each module, at its
end, is kept for testing. In both ways `tarfile`'s end is then told better than before, and
`_pydecimal`'s worse. The adapters are few, and taking them away brings back the network that was,
word for word. In the folder out/ you find afterwards

    lora.png    bits for each byte of both modules' ends, during fine-tuning
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from fnn.layers import adapted, lora
from fnn.models import gpt2

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit(f'{error}. For this example: pip install "matplotlib>=3.9"') from None

LENGTH = 128
BATCH = 16
RANK = 8
ADAPTED = ("blocks.*.W",)

net = gpt2(256, LENGTH, features=96, depth=2, heads=3, dropout=0.0)


def load(name: str) -> tuple[jax.Array, jax.Array]:
    """A module's source, as bytes: the first four fifths, and the rest."""
    path = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
    text = np.frombuffer(path.read_bytes(), np.uint8).astype("int32")
    return jnp.asarray(text[: len(text) * 4 // 5]), jnp.asarray(text[len(text) * 4 // 5 :])


def bits(params: Any, window: jax.Array) -> jax.Array:
    """−log₂ p of each byte of a window but the first."""
    return net(params, window[:-1], window[1:]) / math.log(2)


@jax.jit
def tested(params: Any, text: jax.Array) -> jax.Array:
    """Bits a byte of windows that cover a text."""
    count = len(text) // LENGTH
    windows = text[: count * LENGTH].reshape(count, LENGTH)
    return jnp.mean(jax.lax.map(lambda w: jnp.mean(bits(params, w)), windows, batch_size=32))


def train(
    loss: Callable, params: Any, text: jax.Array, rate: float, steps: int, look: Callable
) -> Any:
    """Train on windows of a text drawn at random; `look(params)` is called every 25 steps."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    step = fnn.train_step(loss, optimizer, nonfinite="ignore")

    @functools.partial(jax.jit, donate_argnums=0)
    def some(state, key):
        def one(state, key):
            starts = jax.random.randint(key, (BATCH,), 0, len(text) - LENGTH)
            windows = text[starts[:, None] + jnp.arange(LENGTH + 1)]
            return step(state, windows)[0], None

        return jax.lax.scan(one, state, jax.random.split(key, 25))[0]

    state = step.init(params)
    for i in range(steps // 25):
        look(state.params)
        state = some(state, jax.random.key(i))
    look(state.params)
    return state.params


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def draw(curves: dict[str, list], names: tuple[str, str], path: Path) -> None:
    """A panel for each module: its end's bits a byte against steps, fine-tuned in both ways."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, name, which in zip(figure.subplots(1, 2), names, (0, 1), strict=True):
        for label, found in curves.items():
            axes.plot(25 * np.arange(len(found)), [pair[which] for pair in found], label=label)
        axes.set(title=f"the end of {name}", xlabel="step", ylabel="bits a byte")
        axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="50 steps of each kind")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    arguments = parser.parse_args()
    began = time.perf_counter()
    steps, more = (50, 50) if arguments.quick else (500, 200)
    arguments.out.mkdir(parents=True, exist_ok=True)

    names = "_pydecimal", "tarfile"
    (first, first_end), (second, second_end) = map(load, names)
    start = net.init(jax.random.key(0), first[:LENGTH])

    def loss(params, window):
        return jnp.mean(bits(params, window))

    base = train(loss, start, first, 3e-3, steps, lambda params: None)

    def ends(params):
        return float(tested(params, first_end)), float(tested(params, second_end))

    def lora_loss(adapters, window):
        return loss(adapted(base, adapters), window)

    adapters = lora(base, ADAPTED, RANK, jax.random.key(1))
    curves: dict[str, list] = {"LoRA": [], "all weights": []}
    adapters = train(
        lora_loss,
        adapters,
        second,
        1e-2,
        more,
        lambda adapters: curves["LoRA"].append(ends(adapted(base, adapters))),
    )
    everything = train(
        loss, base, second, 1e-3, more, lambda params: curves["all weights"].append(ends(params))
    )

    rows = (
        (f"trained on {names[0]}", count(base), ends(base)),
        (f"LoRA of rank {RANK}, on {names[1]}", count(adapters), ends(adapted(base, adapters))),
        (f"all weights, on {names[1]}", count(everything), ends(everything)),
    )
    print(f"bits a byte of the end of{'trained':>27}{names[0]:>12}{names[1]:>10}")
    for name, size, (of_first, of_second) in rows:
        print(f"    {name:<32}{size:>16,}{of_first:>12.2f}{of_second:>10.2f}")
    draw(curves, names, arguments.out / "lora.png")
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} seconds. The picture is in {arguments.out}{os.sep}")


if __name__ == "__main__":
    main()
