"""Residual networks for images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from fnn import arguments, ops
from fnn.initializers import he_normal, variance_scaling
from fnn.layers import (
    BatchNorm,
    Conv,
    GlobalAveragePool,
    Layer,
    Linear,
    MaxPool,
    Network,
    chain,
)
from fnn.layers.net import Net

_by_outputs = functools.partial(he_normal, fan="out")
_of_linear = functools.partial(variance_scaling, scale=1 / 3, distribution="uniform")


def resnet18(classes: int = 1000, **options: Any) -> Network:
    """ResNet-18: basic blocks, 2 in each of 4 stages; 11,689,512 parameters. See `resnet`."""
    return resnet((2, 2, 2, 2), classes, **options)


def resnet50(classes: int = 1000, **options: Any) -> Network:
    """ResNet-50: bottlenecks, 3, 4, 6, 3 in 4 stages; 25,557,032 parameters. See `resnet`."""
    return resnet((3, 4, 6, 3), classes, bottleneck=True, **options)


def resnet(
    blocks: Sequence[int],
    classes: int = 1000,
    *,
    bottleneck: bool = False,
    features: int = 64,
    small: bool = False,
) -> Network:
    """A residual network: y = relu(x + f(x)), block after block; each stage after the first halves
    the image and doubles the features.

        basic block     f = BN conv3×3 relu BN conv3×3                    with n features
        bottleneck      f = BN conv1×1 relu BN conv3×3 relu BN conv1×1    with n, n and 4n features

    read from right to left. Where f changes the shape, x goes through a 1 × 1 convolution with a
    batch norm too. A stage's stride is that of the first 3 × 3 convolution of its first block, as
    in torchvision (in the paper it is the first 1 × 1 convolution's).

    Args:
        blocks: how many in each stage.
        classes: how many.
        bottleneck: which kind of blocks.
        features: n, in the first stage.
        small: for images of about 32 × 32 pixels, of CIFAR-10 say: the first convolution is 3 × 3
            without a stride, and there is no max pooling after it. Else it is 7 × 7 with a stride
            of 2, and the largest of 3 × 3 follows with another.

    Returns:
        A Network of one image `(height, width, in)`, whose output are the logits, `(classes,)`. It
        has running statistics: use `apply`, under `vmap(..., axis_name=...)`, or `fnn.fit`.

    Raises:
        TypeError, ValueError: an option isn't of its kind.

    He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016, table 1; the
    weights are drawn by He et al. 2015 with the outputs' fan, as torchvision does.
    """
    if not isinstance(blocks, (tuple, list)) or not blocks:
        raise TypeError(
            f"resnet: blocks must be how many each stage has, but got {arguments.show(blocks)}."
        )
    counts = [arguments.integer("resnet", "blocks", n, least=1) for n in blocks]
    arguments.flag("resnet", "bottleneck", bottleneck)
    arguments.flag("resnet", "small", small)
    features = arguments.integer("resnet", "features", features, least=1)
    classes = arguments.integer("resnet", "classes", classes, least=1)
    block = bottleneck_block if bottleneck else basic_block
    parts: dict[str, Any] = {
        "conv1": _conv(features, 3) if small else _conv(features, 7, 2),
        "bn1": BatchNorm(),
        "relu": ops.relu,
    }
    if not small:
        parts["pool"] = MaxPool(3, stride=2, padding=1)
    ins = features
    for stage, count in enumerate(counts, 1):
        outs = features * 2 ** (stage - 1)
        made: list[Layer] = []
        for i in range(count):
            stride = 2 if stage > 1 and i == 0 else 1
            made.append(block(ins, outs, stride))
            ins = outs * (4 if bottleneck else 1)
        parts[f"layer{stage}"] = chain(*made)
    parts["mean"] = GlobalAveragePool()
    parts["fc"] = Linear(classes, weight_init=_of_linear)
    return chain(**parts)


def basic_block(ins: int, outs: int, stride: int = 1) -> Network:
    """y = relu(x + BN conv3×3 relu BN conv3×3 x)."""
    parts = {
        "conv1": _conv(outs, 3, stride),
        "bn1": BatchNorm(),
        "conv2": _conv(outs, 3),
        "bn2": BatchNorm(),
    }
    return Network(_block, parts | _shortcut(ins, outs, stride))


def bottleneck_block(ins: int, outs: int, stride: int = 1) -> Network:
    """y = relu(x + BN conv1×1 relu BN conv3×3 relu BN conv1×1 x), with 4 · outs features."""
    parts = {
        "conv1": _conv(outs, 1),
        "bn1": BatchNorm(),
        "conv2": _conv(outs, 3, stride),
        "bn2": BatchNorm(),
        "conv3": _conv(4 * outs, 1),
        "bn3": BatchNorm(),
    }
    return Network(_block, parts | _shortcut(ins, 4 * outs, stride))


def _block(net: Net, x: Any) -> Any:
    y = ops.relu(net.bn1(net.conv1(x)))
    y = net.bn2(net.conv2(y))
    if "conv3" in net._parts:
        y = net.bn3(net.conv3(ops.relu(y)))
    return ops.relu(y + (net.downsample(x) if "downsample" in net._parts else x))


def _shortcut(ins: int, outs: int, stride: int) -> dict[str, Layer]:
    if ins == outs and stride == 1:
        return {}
    return {"downsample": chain(_conv(outs, 1, stride), BatchNorm())}


def _conv(features: int, window: int, stride: int = 1) -> Conv:
    padding = window // 2
    options: dict[str, Any] = {"use_bias": False, "weight_init": _by_outputs}
    return Conv(features, window, stride=stride, padding=padding, **options)
