"""`Upsample` and `PixelShuffle`: more pixels from fewer, without weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from fnn import arguments, ops
from fnn.layers.convolution import image_features, window_of
from fnn.layers.layer import Layer, check_params
from fnn.ops.convolutions import Sizes


@dataclasses.dataclass(frozen=True, repr=False)
class Upsample(Layer):
    """Each axis of space `scale` times as long: see `fnn.ops.upsample`.

    One example x is `(height, width, features)`; axes in front are more images.

    Args:
        scale: one integer for the two axes of an image, or one for each axis of space.
        method: "nearest" or "bilinear".

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) x is no such image.
    """

    scale: Sizes
    _: dataclasses.KW_ONLY
    method: str = "nearest"

    def __post_init__(self) -> None:
        window_of(self, "scale")
        arguments.choice("Upsample", "method", self.method, ("nearest", "bilinear"))

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        check_params(self, params, {})
        image_features(self, x, len(window_of(self, "scale")))
        return ops.upsample(x, self.scale, method=self.method)


@dataclasses.dataclass(frozen=True, repr=False)
class PixelShuffle(Layer):
    """Features become pixels: `(h, w, features · scale²)` → `(scale · h, scale · w, features)`.

    See `fnn.ops.pixel_shuffle`. Axes in front are more images.

    Args:
        scale: an integer.

    Raises:
        TypeError, ValueError: scale is no count, or its square doesn't divide the features.
        LayerError: (when called) x is no image.
    """

    scale: int

    def __post_init__(self) -> None:
        arguments.integer("PixelShuffle", "scale", self.scale, least=1)

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        check_params(self, params, {})
        image_features(self, x, 2)
        return ops.pixel_shuffle(x, self.scale)
