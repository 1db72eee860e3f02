"""Convolution and its two gradients: `fnn.ops.convolution` against XLA's and PyTorch's.

    python benchmarks/convolution.py [--only 3x3 depthwise] [--products] [--rounds 9] [--markdown]

For each shape and each of forward, input gradient and weight gradient: milliseconds of ours, and
ours over XLA's (`jax.vjp` of `lax.conv_general_dilated`) and over PyTorch's where it is installed,
in turns in one process. Below 1 ours is faster. Then the same in a `lax.scan` of two steps, for one
step: ours over ours alone, and ours over XLA's in the scan. What takes XLA above two seconds there
is run once.

With `--products`: how much of that is out of reach for whoever computes a convolution as one matrix
product. For each that isn't in groups, XLA's product of matrices of the same multiplications, which
lie ready in memory (nobody has put the windows side by side), over PyTorch's whole convolution, and
ours over the product.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from measure import installed, interleaved, machine, milliseconds, ratio, table

from fnn import ops

STEPS = 2


class Case(NamedTuple):
    """images × size × size × ins → outs; the padding is half of the window."""

    images: int
    size: int
    ins: int
    outs: int
    window: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1

    def __str__(self):
        words = [
            f"{self.images}×{self.size}²×{self.ins}→{self.outs}, {self.window}x{self.window}",
            *([f"stride {self.stride}"] if self.stride > 1 else []),
            *([f"dilated {self.dilation}"] if self.dilation > 1 else []),
        ]
        if self.groups > 1:
            words.append("depthwise" if self.groups == self.ins else f"{self.groups} groups")
        return " ".join(words)

    @property
    def pad(self) -> int:
        return self.dilation * (self.window - 1) // 2


CASES = [
    Case(32, 32, 64, 64, 3),
    Case(32, 16, 128, 128, 3),
    Case(64, 28, 1, 6, 5),
    Case(64, 28, 1, 16, 3),
    Case(64, 14, 6, 16, 5),
    Case(64, 14, 16, 32, 3),
    Case(32, 32, 64, 128, 3, stride=2),
    Case(32, 16, 128, 256, 1),
    Case(32, 32, 64, 128, 1, stride=2),
    Case(32, 14, 32, 64, 5),
    Case(16, 64, 3, 64, 7, stride=2),
    Case(32, 16, 128, 128, 3, groups=128),
    Case(16, 14, 96, 96, 7, groups=96),
    Case(32, 16, 128, 128, 3, groups=8),
    Case(32, 16, 64, 64, 3, dilation=2),
]
KINDS = ("forward", "input", "weight")


def ours(case: Case, x, w):
    return ops.convolution(
        x,
        w,
        stride=case.stride,
        padding=case.pad,
        dilation=case.dilation,
        groups=case.groups,
    )


def xla(case: Case, x, w):
    return lax.conv_general_dilated(
        x,
        w,
        (case.stride,) * 2,
        [(case.pad, case.pad)] * 2,
        rhs_dilation=(case.dilation,) * 2,
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
        feature_group_count=case.groups,
    )


def functions(conv: Callable, case: Case, x, w) -> dict[str, Callable]:
    """Each of the three, as a function of two arrays."""
    f = functools.partial(conv, case)
    of_x = lambda w, g: jax.linear_transpose(lambda x: f(x, w), x)(g)[0]
    of_w = lambda x, g: jax.linear_transpose(lambda w: f(x, w), w)(g)[0]
    return {"forward": f, "input": of_x, "weight": of_w}


def looped(function: Callable) -> Callable:
    """Some steps of it, each on what the one before has changed a little."""

    def loop(a, b):
        def step(total, _):
            y = function(a + 1e-30 * total, b)
            return jnp.sum(y * y), None

        return lax.scan(step, jnp.zeros(()), None, length=STEPS)[0]

    return loop


def waiting(function: Callable, *args) -> Callable:
    """A compiled call that waits for its result."""
    run = jax.jit(function).lower(*args).compile()
    return lambda: jax.block_until_ready(run(*args))


def torchs(case: Case, x, w, g) -> dict[str, Callable]:
    import torch

    image = lambda a: torch.tensor(np.moveaxis(np.asarray(a), -1, 1).copy())
    tx, tw, tg = image(x), torch.tensor(np.asarray(w)), image(g)
    stride, pad, dilation = ([n] * 2 for n in (case.stride, case.pad, case.dilation))

    def gradient(of_x: bool):
        mask = [of_x, not of_x, False]
        return lambda: torch.ops.aten.convolution_backward(
            tg, tx, tw, None, stride, pad, dilation, False, [0, 0], case.groups, mask
        )

    forward = functools.partial(
        torch.nn.functional.conv2d, tx, tw, None, stride, pad, dilation, case.groups
    )
    return {"forward": forward, "input": gradient(True), "weight": gradient(False)}


def rows_of(case: Case, rounds: int, with_torch: bool) -> list[list[str]]:
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), "float32")
    x = draw(case.images, case.size, case.size, case.ins)
    w = draw(case.outs, case.ins // case.groups, case.window, case.window)
    g = draw(*jax.eval_shape(functools.partial(xla, case), x, w).shape)
    args = {"forward": (x, w), "input": (w, g), "weight": (x, g)}
    mine, theirs = functions(ours, case, x, w), functions(xla, case, x, w)
    peers = torchs(case, x, w, g) if with_torch else {}
    rows = []
    for kind in KINDS:
        runs = {
            "ours": waiting(mine[kind], *args[kind]),
            "XLA": waiting(theirs[kind], *args[kind]),
            "loop": waiting(looped(mine[kind]), *args[kind]),
        }
        if peers:
            runs["PyTorch"] = peers[kind]
        slow = waiting(looped(theirs[kind]), *args[kind])
        start = time.perf_counter()
        slow()
        once = time.perf_counter() - start
        if once < 2:
            runs["XLA's loop"] = slow
        found = interleaved(runs, rounds, seconds=0.01)
        in_loop = [s / STEPS for s in found["loop"]]
        slowly = [s / STEPS for s in found.get("XLA's loop", [once] * rounds)]
        rows.append(
            [
                str(case) if kind == "forward" else "",
                kind,
                milliseconds(found["ours"]),
                ratio(found["ours"], found["XLA"]),
                ratio(found["ours"], found["PyTorch"]) if peers else "-",
                ratio(in_loop, found["ours"]),
                ratio(in_loop, slowly),
            ]
        )
    return rows


def matrices(case: Case, kind: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of the two matrices whose product is the convolution, or that gradient of it."""
    rows = case.images * (-(-case.size // case.stride)) ** 2
    across = case.ins * case.window**2
    if kind == "forward":
        return (rows, across), (across, case.outs)
    if kind == "weight":
        return (case.outs, rows), (rows, across)
    if case.stride == 1:
        return (rows, case.outs * case.window**2), (case.outs * case.window**2, case.ins)
    return (rows, case.outs), (case.outs, across)


def products_of(case: Case, rounds: int) -> list[list[str]]:
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), "float32")
    x = draw(case.images, case.size, case.size, case.ins)
    w = draw(case.outs, case.ins, case.window, case.window)
    g = draw(*jax.eval_shape(functools.partial(xla, case), x, w).shape)
    args = {"forward": (x, w), "input": (w, g), "weight": (x, g)}
    mine, peers = functions(ours, case, x, w), torchs(case, x, w, g)
    rows = []
    for kind in KINDS:
        left, right = (draw(*shape) for shape in matrices(case, kind))
        runs = {
            "product": waiting(jnp.matmul, left, right),
            "ours": waiting(mine[kind], *args[kind]),
            "PyTorch": peers[kind],
        }
        found = interleaved(runs, rounds, seconds=0.01)
        rows.append(
            [
                str(case) if kind == "forward" else "",
                kind,
                milliseconds(found["product"]),
                ratio(found["product"], found["PyTorch"]),
                ratio(found["ours"], found["product"]),
                ratio(found["ours"], found["PyTorch"]),
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the shapes' names")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    with_torch = installed("torch", "pip install torch")
    print(machine(), flush=True)
    cases = [case for case in CASES if any(part in str(case) for part in options.only)]
    rows = []
    if options.products:
        if not with_torch:
            return
        heads = ["shape", "", "product, ms", "/ PyTorch", "ours / product", "ours / PyTorch"]
        for case in cases:
            rows += products_of(case, options.rounds) if case.groups == 1 else []
    else:
        heads = ["shape", "", "ours, ms", "/ XLA", "/ PyTorch", "scan / alone", "/ XLA in scan"]
        for case in cases:
            rows += rows_of(case, options.rounds, with_torch)
    print(table(heads, rows, options.markdown))


if __name__ == "__main__":
    main()
