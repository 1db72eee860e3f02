"""Low-rank adapters: fine-tuning a network by small matrices beside its weights.

    adapters = lora(params, "*.q.W", 8, key)               small, and all that is trained
    y = net(adapted(params, adapters), x)                  W x + B (A x) in the place of W x
    params = merge(params, adapters)                       W + B A, weights like any others

The frozen parameters are closed over, and training knows the adapters alone:

    tuned = lambda adapters, x: net(adapted(params, adapters), x)
    result = fnn.fit(fnn.supervised(tuned, loss), adapters, data, optax.adam(1e-3), ...)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.layers.combinators import Repeat
from fnn.layers.convolution import Conv, ConvTranspose, window_of
from fnn.layers.dropout import DropConnect
from fnn.layers.experts import MixtureOfExperts
from fnn.layers.layer import Layer
from fnn.layers.low_rank import AdaptedKernel, AdaptedWeight, merged
from fnn.layers.net import Network
from fnn.layers.normalization import SpectralNorm, WeightNorm
from fnn.layers.once import Once
from fnn.params import Where, choose, flatten, unflatten


def lora(
    params: chex.ArrayTree,
    where: Where,
    rank: int,
    key: chex.PRNGKey,
    *,
    net: Layer | None = None,
) -> dict:
    """Adapters for some of a network's weights: each W becomes W + scale · B A of the given rank.

    Args:
        params: of the network. Nothing in it changes.
        where: which weights: a pattern of paths such as "*.q.W" ("*" stands for anything), or
            several of them, or a function (path, array) of those that are asked for. A path is
            made of the keys on the way to it, "blocks.attend.q.W" (see `fnn.params.flatten`).
        rank: r, the size of the axis between B and A.
        key: A is drawn from it.
        net: the network. It tells the kernels of convolutions, `(out, in, *window)`, from matrices
            that are stacked, which their shapes don't. Without it an array of three axes is taken
            for stacked matrices (unless it has a kernel's bias), and one of more is refused.

    Returns:
        Nested dicts like params, of what is chosen alone: in the place of a W of shape `(out, in)`
        `{"A": (rank, in), "B": (out, rank)}`, in float32 (float64 under x64). Of W's stacked along
        axes in front, as `repeat` has them, A and B are stacked as well. A kernel is the matrix
        `(out, in / groups · window)`, of a `ConvTranspose` `(in, out / groups · window)`.
        A is drawn from N(0, 1 / in), and B is 0: at first nothing changes.

    Raises:
        TypeError, ValueError: an argument isn't of its kind, or nothing is chosen (the paths are
            named), or something is that isn't a matrix of real numbers, or may be a kernel.

    Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: low-rank adaptation of large language
    models", ICLR 2022.

    >>> params = {"q": {"W": jnp.ones((6, 4)), "b": jnp.ones(6)}}
    >>> jax.tree.map(jnp.shape, lora(params, "*.W", 2, jax.random.key(0)))
    {'q': {'W': {'A': (2, 4), 'B': (6, 2)}}}
    """
    rank = arguments.integer("lora", "rank", rank, least=1)
    key = arguments.key("lora", "key", key)
    if net is not None and not isinstance(net, Layer):
        raise TypeError(f"lora: net must be a layer, but got {arguments.show(net)}.")
    flat = flatten(params)
    made = {}
    for number, path in enumerate(choose(where, params, "lora")):
        W = flat[path]
        if jnp.ndim(W) < 2 or not jnp.issubdtype(jnp.result_type(W), jnp.floating):
            raise ValueError(
                f"lora: where chooses {path}, wanted a real weight of shape (out, in), but it is "
                f"{arguments.show(W)}."
            )
        kernel = _kernel_axes(net, path, jnp.ndim(W))
        if kernel is None and _may_be_kernel(path, flat):
            raise ValueError(
                f"lora: where chooses {path} of shape {jnp.shape(W)}, which may be a convolution's "
                "kernel (out, in, *window) or matrices that are stacked: pass net=, the network, "
                "which tells."
            )
        *stack, out, ins = _as_matrices(jnp.shape(W), kernel or 2)
        dtype = jnp.result_type(float)
        A = jax.random.normal(jax.random.fold_in(key, number), (*stack, rank, ins), dtype)
        made[f"{path}.A"] = A / jnp.sqrt(jnp.asarray(max(ins, 1), dtype))
        made[f"{path}.B"] = jnp.zeros((*stack, out, rank), dtype)
    return unflatten(made)


def adapted(
    params: chex.ArrayTree, adapters: chex.ArrayTree, *, scale: float = 1.0
) -> chex.ArrayTree:
    """The parameters with adapters beside some weights: to be given to the network as they are.

    In the place of an adapted W stands an `AdaptedWeight`, which multiplies as W + scale · B A does
    without that being formed: W x + scale · B (A x). So the gradient of the adapters is found from
    vectors of their rank, and a matrix of W's size is never formed; nor is W's own gradient, as
    long as it isn't asked for. It multiplies by `@` alone, from both sides and transposed, which is
    how `Linear` and most layers use their weights. Elsewhere it is refused; `merge` then does, at
    the price of a matrix of W's size.

    In the place of a kernel stands an `AdaptedKernel`, of which `Conv` and `ConvTranspose` compute
    W ∗ x + scale · B (A ∗ x): a convolution with A, to as many features as the rank, and a product
    at each place. Of groups that don't have more outputs than the rank, as depthwise ones, A ∗ x
    would be as large as the output, and the sum W + scale · B A is formed, which is small then. It
    is formed as well where a layer changes another's weight: by `WeightNorm`, `SpectralNorm`, and
    in training `DropConnect`.

    Args:
        params: the network's, as they were when the adapters were made.
        adapters: what `lora` made.
        scale: the paper's α / rank.

    Raises:
        ValueError: an adapter belongs to no parameter, or to one of another shape.
    """
    return _replaced("adapted", params, adapters, scale, _beside)


def merge(
    params: chex.ArrayTree, adapters: chex.ArrayTree, *, scale: float = 1.0
) -> chex.ArrayTree:
    """The parameters with W + scale · B A in the place of each adapted W, of W's dtype.

    The network then costs what it did before. Arguments and errors are as in `adapted`.
    """

    return _replaced("merge", params, adapters, scale, merged)


def _beside(W: Any, A: Any, B: Any, scale: float) -> AdaptedWeight | AdaptedKernel:
    return (AdaptedWeight if W.ndim == A.ndim else AdaptedKernel)(W, A, B, scale)


def _kernel_axes(net: Layer | None, path: str, axes: int) -> int | None:
    """How many of a weight's axes are those of one kernel or matrix; None where net can't tell."""
    layer: Any = net
    names, stacked = path.split(".")[::-1], 0
    while True:
        if isinstance(layer, (Conv, ConvTranspose)):
            return 2 + len(window_of(layer))
        if isinstance(layer, Repeat):
            layer, stacked = layer.block, stacked + 1
        elif isinstance(layer, Network) and names:
            layer = dict(layer.parts).get(names.pop())
        elif isinstance(layer, MixtureOfExperts) and names[-1:] == ["experts"]:
            names.pop()
            layer, stacked = layer.expert, stacked + 1
        elif isinstance(layer, (WeightNorm, SpectralNorm, DropConnect, Once)):
            layer = layer.layer
        else:
            return 2 if isinstance(layer, Layer) and axes - stacked <= 3 else None


def _may_be_kernel(path: str, flat: dict[str, Any]) -> bool:
    """Could a weight be a convolution's, by its shape and that of the bias beside it?"""
    axes, bias = jnp.ndim(flat[path]), flat.get(path.removesuffix("W") + "b")
    return axes > 3 or (axes == 3 and bias is not None and jnp.ndim(bias) == 1)


def _as_matrices(shape: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """The shape with the last of so many axes as two: `(*stack, out, in · window)`."""
    start = max(len(shape) - axes, 0)
    stack, (out, *ins) = shape[:start], shape[start:]
    return (*stack, out, math.prod(ins))


def _replaced(op: str, params: Any, adapters: Any, scale: float, make: Callable) -> Any:
    arguments.number(op, "scale", scale)
    if arguments.is_known(scale):
        scale = float(scale)  # of Python's alone the dtype gives way to the weights'
    pairs: dict[str, dict[str, Any]] = {}
    for path, array in flatten(adapters).items():
        place, _, name = path.rpartition(".")
        pairs.setdefault(place, {})[name] = array
    weights = flatten(params)
    for place, pair in pairs.items():
        W = weights.get(place)
        if W is None or set(pair) != {"A", "B"}:
            raise ValueError(
                f"{op}: there is an adapter of {sorted(pair)} for {place!r}, wanted A and B, for "
                f"one of {', '.join(weights)}."
            )
        axes = max(jnp.ndim(W) - max(jnp.ndim(pair["A"]) - 2, 0), 2)  # of a kernel or a matrix
        *stack, out, ins = _as_matrices(jnp.shape(W), axes)
        rank = jnp.shape(pair["A"])[-2] if jnp.ndim(pair["A"]) >= 2 else "rank"
        wanted = {"A": (*stack, rank, ins), "B": (*stack, out, rank)}
        got = {name: jnp.shape(array) for name, array in pair.items()}
        if got != wanted:
            raise ValueError(
                f"{op}: the adapter of {place}, of shape {jnp.shape(W)}, has A of shape "
                f"{got['A']} and B of shape {got['B']}, wanted {wanted['A']} and {wanted['B']}."
            )
    made = {place: make(weights[place], p["A"], p["B"], scale) for place, p in pairs.items()}
    leaves = [made.get(path, leaf) for path, leaf in weights.items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)
