"""A GPT and an LSTM learn to write Python, byte by byte, in less than two minutes.

    python examples/language.py            under two minutes on two cores
    python examples/language.py --quick    a few seconds, to see that it runs

The text is the source of Python's standard library: one module of twenty, chosen by its name, is
kept for testing. Both networks see the same windows of 128 bytes, drawn at random. What they have
learned is measured in bits for each byte of the test modules (the mean of −log₂ p, over the second
half of each window: to each byte 64 or more have gone before), and compared with compressors, which
find the regularities of the test text in the text itself, and with counting: the frequencies of the
byte after each four bytes, backed off to shorter contexts as Witten and Bell do, once in as much
text as the networks have seen, and once in all of it. In the folder out/ you find afterwards

    language.png    the bits a byte of both networks during training
"""

from __future__ import annotations

import argparse
import bz2
import functools
import gzip
import math
import os
import sysconfig
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from fnn import ops
from fnn.layers import Layer
from fnn.models import generate, gpt2, lstm_language_model

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit(f'{error}. For this example: pip install "matplotlib>=3.9"') from None

LENGTH = 128
BATCH = 16
TESTED = 512  # windows of the test text
LEFT_OUT = ("site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data")


def modules() -> dict[str, bytes]:
    """The source of the standard library's modules by name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(folder.rglob("*.py"))
    names = {path: path.relative_to(folder) for path in paths}
    return {
        str(name): path.read_bytes()
        for path, name in names.items()
        if not set(LEFT_OUT) & set(name.parts)
    }


def load() -> tuple[np.ndarray, np.ndarray]:
    """The bytes of the training modules, and of the test modules."""
    texts = modules()
    is_test = {name: zlib.crc32(name.encode()) % 20 == 0 for name in texts}
    join = lambda kept: b"\n".join(text for name, text in texts.items() if is_test[name] == kept)
    return np.frombuffer(join(False), np.uint8), np.frombuffer(join(True), np.uint8)


# ------------------------------------------------------------------------ compressors, counting


def compressed(text: np.ndarray, compress: Callable[[bytes], bytes]) -> float:
    """Bits for each byte of a text that is compressed by itself."""
    return 8 * len(compress(text.tobytes())) / len(text)


def counted(train: np.ndarray, test: np.ndarray, order: int = 4) -> float:
    """Bits for each byte by the frequencies of what follows the last `order` bytes.

        p(c | context) = (count(context c) + d · p(c | shorter context)) / (count(context) + d)

    with d the number of different bytes that follow the context (Witten, Bell 1991).
    """
    train, test = train.astype(np.uint64), test.astype(np.uint64)
    p = np.full(len(test), 1 / 256)

    def coded(text, k):
        """Each byte with the k before it, as one number."""
        code = np.zeros(len(text) - k, np.uint64)
        for i in range(k + 1):
            code = code * np.uint64(256) + text[i : len(text) - k + i]
        return code

    def found(keys, values, asked):
        at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
        return np.where(keys[at] == asked, values[at], 0)

    for k in range(order + 1):
        grams, count = np.unique(coded(train, k), return_counts=True)
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        total, distinct = np.add.reduceat(count, first), np.diff(np.append(first, len(grams)))
        asked = coded(test, k)
        before = asked >> np.uint64(8)
        n, here = found(contexts, total, before), found(contexts, distinct, before)
        mixed = (found(grams, count, asked) + here * p[k:]) / np.maximum(n + here, 1)
        p[k:] = np.where(n > 0, mixed, p[k:])
    return float(-np.log2(p).mean())


# ------------------------------------------------------------------------------------ networks


def networks() -> dict[str, tuple[Layer, float, int]]:
    """Each with its learning rate and its number of steps, which take about as long."""
    gpt = gpt2(256, 512, features=96, depth=2, heads=3, dropout=0.0)
    lstm = lstm_language_model(256, 192, layers=1, dropout=0.0)
    return {"GPT": (gpt, 5e-3, 600), "LSTM": (lstm, 5e-3, 600)}


def bits(net: Layer, params: Any, text: jax.Array) -> jax.Array:
    """−log₂ p of each byte of a window but the first."""
    losses = ops.softmax_cross_entropy(net(params, text[:-1]), text[1:])
    return losses / math.log(2)


def windows(text: jax.Array, starts: jax.Array) -> jax.Array:
    return text[starts[:, None] + jnp.arange(LENGTH + 1)].astype(jnp.int32)


def train(net: Layer, text: jax.Array, rate: float, steps: int) -> tuple[Any, np.ndarray]:
    """The parameters, and the bits a byte of each batch."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))
    step = fnn.train_step(
        lambda params, window: jnp.mean(bits(net, params, window)), optimizer, nonfinite="ignore"
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def fifty(state, key):
        def one(state, key):
            starts = jax.random.randint(key, (BATCH,), 0, len(text) - LENGTH)
            state, metrics = step(state, windows(text, starts))
            return state, metrics["loss"]

        return jax.lax.scan(one, state, jax.random.split(key, 50))

    state = step.init(net.init(jax.random.key(0), jnp.zeros(LENGTH, jnp.int32)))
    found = []
    for i in range(steps // 50):
        state, losses = fifty(state, jax.random.key(i))
        found.append(np.asarray(losses))
    return state.params, np.concatenate(found)


def tested(net: Layer, params: Any, text: jax.Array) -> float:
    """Bits a byte of the second halves of windows that cover the text."""
    starts = jnp.linspace(0, len(text) - LENGTH - 1, TESTED).astype(jnp.int32)

    @jax.jit
    def of_windows(params, windows):
        each = jax.lax.map(lambda window: bits(net, params, window), windows, batch_size=32)
        return jnp.mean(each[:, LENGTH // 2 :])

    return float(of_windows(params, windows(text, starts)))


def draw(curves: dict[str, np.ndarray], others: dict[str, float], path: Path) -> None:
    """Bits a byte against bytes seen, smoothed over 20 batches, and the others as lines."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, losses in curves.items():
        smooth = np.convolve(losses, np.ones(20) / 20, mode="valid")
        axes.plot((20 + np.arange(len(smooth))) * BATCH * LENGTH / 1e6, smooth, label=name)
    for i, (name, value) in enumerate(others.items()):
        axes.axhline(value, color=f"C{i + 2}", linestyle=":", label=f"{name}: {value:.2f}")
    axes.set(xlabel="million bytes seen", ylabel="bits a byte", ylim=(1.5, 5))
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="50 steps")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    arguments = parser.parse_args()
    began = time.perf_counter()
    arguments.out.mkdir(parents=True, exist_ok=True)

    train_text, test_text = load()
    print(f"{len(train_text):,} bytes to train on, {len(test_text):,} to test on")
    others = {
        "gzip": compressed(test_text, gzip.compress),
        "bz2": compressed(test_text, bz2.compress),
    }
    curves, results = {}, {}
    prompt = jnp.asarray(np.frombuffer(b"def read(self, ", np.uint8), jnp.int32)
    on_device = jnp.asarray(train_text)
    for name, (net, rate, steps) in networks().items():
        start = time.perf_counter()
        steps = 50 if arguments.quick else steps
        params, curves[name] = train(net, on_device, rate, steps)
        count = sum(w.size for w in jax.tree.leaves(params))
        seen = steps * BATCH * LENGTH
        results[f"{name}, {count:,} parameters, {seen / 1e6:.1f} million bytes seen"] = tested(
            net, params, jnp.asarray(test_text)
        )
        others[f"four bytes counted in {seen / 1e6:.1f} million"] = counted(
            train_text[:seen], test_text[: 2**17]
        )
        sample = generate(net, params, prompt, 240, jax.random.key(1), temperature=0.7)
        text = bytes(np.concatenate([prompt, sample]).astype(np.uint8).tolist())
        print(
            f"\n{name}, {time.perf_counter() - start:.0f} seconds; at temperature 0.7 it writes:\n"
        )
        print("    " + text.decode(errors="replace").replace("\n", "\n    "))
    if not arguments.quick:
        name = f"four bytes counted in {len(train_text) / 1e6:.1f} million"
        others[name] = counted(train_text, test_text[: 2**17])
    print("\nBits for each byte of the test text:")
    for name, value in sorted((results | others).items(), key=lambda item: item[1]):
        print(f"    {value:.2f}  {name}")
    draw(curves, others, arguments.out / "language.png")
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} seconds. The picture is in {arguments.out}{os.sep}")


if __name__ == "__main__":
    main()
