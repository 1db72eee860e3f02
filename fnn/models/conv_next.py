"""ConvNeXt: a convolutional network in the proportions of a vision transformer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax.numpy as jnp

from fnn import arguments, ops
from fnn.initializers import truncated_normal
from fnn.layers import Conv, DropPath, GlobalAveragePool, Layer, LayerNorm, Linear, Network, chain
from fnn.layers.layer import check_params, last_axis, set_number
from fnn.layers.net import Net

_init = functools.partial(truncated_normal, stddev=0.02)


def convnext(
    blocks: Sequence[int] = (3, 3, 9, 3),
    features: Sequence[int] = (96, 192, 384, 768),
    classes: int = 1000,
    *,
    drop_path: float = 0.1,
    layer_scale: float = 1e-6,
) -> Network:
    """ConvNeXt-T unless told otherwise: 28,589,128 parameters.

        stem    conv4×4 with stride 4, LayerNorm
        block   y = x + γ ∘ W₂ gelu(W₁ LayerNorm(depthwise conv7×7 x)),      4 n hidden units of n
        stages of blocks, between them LayerNorm and conv2×2 with stride 2
        mean over the image, LayerNorm, and the classes' logits

    Args:
        blocks: how many in each stage.
        features: n of each stage.
        classes: how many.
        drop_path: how often the last block's branch is left out in training; the blocks before it
            less often, in proportion to their number (stochastic depth).
        layer_scale: where γ, one number for each feature, starts.

    Returns:
        A Network of one image `(height, width, in)` whose sides are multiples of 32, and whose
        output are the logits, `(classes,)`. In training with drop_path it needs a key.

    Raises:
        TypeError, ValueError: an option isn't of its kind.

    Liu et al., "A ConvNet for the 2020s", CVPR 2022.
    """
    sizes = {}
    for name, given in {"blocks": blocks, "features": features}.items():
        if not isinstance(given, (tuple, list)) or not given:
            raise TypeError(
                f"convnext: {name} must hold a number for each stage, but got "
                f"{arguments.show(given)}."
            )
        sizes[name] = [arguments.integer("convnext", name, n, least=1) for n in given]
    if len(sizes["blocks"]) != len(sizes["features"]):
        raise ValueError(
            f"convnext: blocks and features must be as many, but got {blocks} and {features}."
        )
    classes = arguments.integer("convnext", "classes", classes, least=1)
    arguments.number("convnext", "drop_path", drop_path, least=0, below=1)
    arguments.number("convnext", "layer_scale", layer_scale)
    parts: dict[str, Any] = {}
    done, last = 0, max(sum(sizes["blocks"]) - 1, 1)
    for stage, (count, n) in enumerate(zip(sizes["blocks"], sizes["features"], strict=True)):
        if stage == 0:
            parts["stem"] = chain(_conv(n, 4, stride=4, padding="valid"), _norm())
        else:
            parts[f"down{stage}"] = chain(_norm(), _conv(n, 2, stride=2, padding="valid"))
        made = [convnext_block(n, drop_path * (done + i) / last, layer_scale) for i in range(count)]
        parts[f"stage{stage}"] = chain(*made)
        done += count
    parts["mean"], parts["norm"] = GlobalAveragePool(), _norm()
    parts["output"] = Linear(classes, weight_init=_init)
    return chain(**parts)


def convnext_block(features: int, drop_path: float, layer_scale: float) -> Network:
    """y = x + γ ∘ W₂ gelu(W₁ LayerNorm(depthwise conv7×7 x))."""
    parts: dict[str, Layer] = {
        "conv": _conv(features, 7, padding=3, groups=features),
        "norm": _norm(),
        "expand": Linear(4 * features, weight_init=_init),
        "reduce": Linear(features, weight_init=_init),
        "scale": LayerScale(layer_scale),
        "drop": DropPath(drop_path),
    }
    return Network(_block, parts)


def _block(net: Net, x: Any) -> Any:
    y = net.norm(net.conv(x))
    y = net.reduce(ops.gelu(net.expand(y), approximate=False))
    return x + net.drop(net.scale(y))


@dataclasses.dataclass(frozen=True, repr=False)
class LayerScale(Layer):
    """γ ∘ x, one γ for each feature, small at first: a branch that begins as almost nothing.

    Parameters: `{"gamma": (features,)}`.

    Touvron et al., "Going deeper with image transformers", ICCV 2021.
    """

    start: float = 1e-6

    def __post_init__(self) -> None:
        set_number(self, "start")

    def init(self, key: chex.PRNGKey, x: Any) -> dict:
        return {"gamma": jnp.full(last_axis(self, x), self.start, jnp.result_type(float))}

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        check_params(self, params, {"gamma": (last_axis(self, x),)}, x)
        return params["gamma"] * x


def _conv(features: int, window: int, **options: Any) -> Conv:
    return Conv(features, window, weight_init=_init, **options)


def _norm() -> LayerNorm:
    return LayerNorm(epsilon=1e-6)
