"""Pooling layers: the largest entry, or the mean, of windows that move over an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from fnn import arguments, ops
from fnn.layers.convolution import image_features, window_of
from fnn.layers.layer import Layer, check_params
from fnn.ops.convolutions import Padding, Sizes, check_padding, sizes_of


@dataclasses.dataclass(frozen=True, repr=False)
class MaxPool(Layer):
    """The largest entry of each window, for each feature: see `fnn.ops.max_pool`.

    One example x is `(height, width, features)`; axes in front are more images.

    Args:
        window: its sizes: one number for the two axes of an image, or one for each axis of space.
        stride: how far it moves; as far as it is long unless given.
        padding: "valid", "same", a number, or numbers or pairs (low, high) for each axis.
        dilation: the distance of the window's places.

    Raises:
        TypeError, ValueError: an option isn't of its kind, or the window doesn't fit into x.
        LayerError: (when called) x is no such image.
    """

    window: Sizes
    _: dataclasses.KW_ONLY
    stride: Sizes | None = None
    padding: Padding = "valid"
    dilation: Sizes = 1

    def __post_init__(self) -> None:
        _check(self, "stride", "dilation")

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        _check_call(self, params, x, "window")
        return ops.max_pool(
            x, self.window, stride=self.stride, padding=self.padding, dilation=self.dilation
        )


@dataclasses.dataclass(frozen=True, repr=False)
class AveragePool(Layer):
    """The mean of each window, for each feature: see `fnn.ops.average_pool`.

    One example x is `(height, width, features)`; axes in front are more images.

    Args:
        window: its sizes: one number for the two axes of an image, or one for each axis of space.
        stride: how far it moves; as far as it is long unless given.
        padding: "valid", "same", a number, or numbers or pairs (low, high) for each axis.
        count_padding: whether the zeros of the padding count in the mean.

    Raises:
        TypeError, ValueError: an option isn't of its kind, or the window doesn't fit into x.
        LayerError: (when called) x is no such image.
    """

    window: Sizes
    _: dataclasses.KW_ONLY
    stride: Sizes | None = None
    padding: Padding = "valid"
    count_padding: bool = True

    def __post_init__(self) -> None:
        _check(self, "stride")
        arguments.flag("AveragePool", "count_padding", self.count_padding)

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        _check_call(self, params, x, "window")
        return ops.average_pool(
            x,
            self.window,
            stride=self.stride,
            padding=self.padding,
            count_padding=self.count_padding,
        )


@dataclasses.dataclass(frozen=True, repr=False)
class _Adaptive(Layer):
    """What `AdaptiveAveragePool` and `AdaptiveMaxPool` have in common: all but `pool`."""

    sizes: Sizes
    pool: ClassVar[Callable]

    def __post_init__(self) -> None:
        window_of(self, "sizes")

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        _check_call(self, params, x, "sizes")
        return self.pool(x, self.sizes)


@dataclasses.dataclass(frozen=True, repr=False)
class _Global(Layer):
    """What `GlobalAveragePool` and `GlobalMaxPool` have in common: all but `pool`."""

    space: int = 2
    pool: ClassVar[Callable]

    def __post_init__(self) -> None:
        arguments.integer(type(self).__name__, "space", self.space, least=1)

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        check_params(self, params, {})
        features = image_features(self, x, self.space)
        return self.pool(x, (1,) * self.space).reshape(*x.shape[: -1 - self.space], features)


@dataclasses.dataclass(frozen=True, repr=False)
class AdaptiveAveragePool(_Adaptive):
    """Means over windows such that the output has `sizes`: see `fnn.ops.adaptive_average_pool`.

    One example x is `(height, width, features)`; axes in front are more images.

    Args:
        sizes: one number for the two axes of an image, or one for each axis of space.

    Raises:
        TypeError, ValueError: sizes are no integers.
        LayerError: (when called) x is no such image.
    """

    pool = staticmethod(ops.adaptive_average_pool)


@dataclasses.dataclass(frozen=True, repr=False)
class AdaptiveMaxPool(_Adaptive):
    """Maxima over windows such that the output has `sizes`: see `fnn.ops.adaptive_max_pool`.

    One example x is `(height, width, features)`; axes in front are more images.

    Args:
        sizes: one number for the two axes of an image, or one for each axis of space.

    Raises:
        TypeError, ValueError: sizes are no integers.
        LayerError: (when called) x is no such image.
    """

    pool = staticmethod(ops.adaptive_max_pool)


@dataclasses.dataclass(frozen=True, repr=False)
class GlobalAveragePool(_Global):
    """The mean over all of space: `(height, width, features)` becomes `(features,)`.

    Args:
        space: how many axes of space x has, before the last. Axes in front are more images.

    Raises:
        TypeError, ValueError: space is no count.
        LayerError: (when called) x is no such image.

    Lin, Chen, Yan, "Network in network", arXiv:1312.4400.
    """

    pool = staticmethod(ops.adaptive_average_pool)


@dataclasses.dataclass(frozen=True, repr=False)
class GlobalMaxPool(_Global):
    """The maximum over all of space: `(height, width, features)` becomes `(features,)`.

    Args:
        space: how many axes of space x has, before the last. Axes in front are more images.

    Raises:
        TypeError, ValueError: space is no count.
        LayerError: (when called) x is no such image.
    """

    pool = staticmethod(ops.adaptive_max_pool)


def _check(layer: Any, *names: str) -> None:
    space = len(window_of(layer))
    for name in names:
        if name != "stride" or layer.stride is not None:
            sizes_of(type(layer).__name__, name, getattr(layer, name), space)
    check_padding(type(layer).__name__, layer.padding, space)


def _check_call(layer: Layer, params: Any, x: Any, name: str) -> None:
    check_params(layer, params, {})
    image_features(layer, x, len(window_of(layer, name)))
