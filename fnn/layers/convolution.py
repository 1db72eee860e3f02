"""Convolutional layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fnn import arguments, ops
from fnn.initializers import Initializer, he_normal, variance_scaling, zeros
from fnn.layers.layer import Layer, LayerError, check_params, check_parts, initial, set_count
from fnn.layers.linear import Linear, check_options
from fnn.layers.low_rank import AdaptedKernel, as_array
from fnn.ops.convolutions import Padding, Sizes, check_padding, sizes_of


@dataclasses.dataclass(frozen=True, repr=False)
class Conv(Layer):
    """y = W ∗ x + b: the same weights at each place of an image.

        y[o, f] = b[f] + Σ W[f, c, k] x[o·stride + k·dilation − pad, c]    over places k, features c

    One example x is `(height, width, in)` and gives `(out_height, out_width, features)`; axes in
    front are more images. With a window of another number of sizes x has as many axes of space:
    `Conv(16, (3,))` is for sequences `(time, in)`.

    Parameters: `{"W": (features, in / groups, *window), "b": (features,)}`, or `{"W"}`.

    Args:
        features: how many outputs at each place.
        window: its sizes: one number for the two axes of an image, or one for each axis.
        stride, dilation: one number, or one for each axis.
        padding: "same", "valid", "circular", a number of zeros at both ends of each axis, or
            numbers or pairs (low, high) for each: see `fnn.ops.convolution`.
        groups: into how many groups the features are divided; those of one see no other.
        use_bias: whether there is a b.
        weight_init: initialiser of W. He's is made for a relu that follows.
        bias_init: initialiser of b.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) x isn't such an image, or the parameters aren't of these shapes.

    LeCun et al., "Backpropagation applied to handwritten zip code recognition", 1989.

    >>> layer = Conv(16, 3, stride=2)
    >>> params = layer.init(jax.random.key(0), jnp.zeros((28, 28, 1)))
    >>> params["W"].shape, layer(params, jnp.ones((28, 28, 1))).shape
    ((16, 1, 3, 3), (14, 14, 16))
    """

    features: int
    window: Sizes
    _: dataclasses.KW_ONLY
    stride: Sizes = 1
    padding: Padding = "same"
    dilation: Sizes = 1
    groups: int = 1
    use_bias: bool = True
    weight_init: Initializer = he_normal
    bias_init: Initializer = zeros

    def __post_init__(self) -> None:
        set_options(self, "stride", "dilation")
        check_padding("Conv", self.padding, len(window_of(self)), also=("circular",))

    def init(self, key: chex.PRNGKey, x: Any) -> dict:
        return initial_weights(self, key, self._shapes(x), self.weight_init)

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        check_params(self, params, self._shapes(x), x)
        y = _convolution(
            x,
            params["W"],
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return y + params["b"] if self.use_bias else y

    def _shapes(self, x: Any) -> dict[str, tuple[int, ...]]:
        window = window_of(self)
        ins = grouped_features(self, x, len(window))
        return shapes_of(self, (self.features, ins // self.groups, *window))


@dataclasses.dataclass(frozen=True, repr=False)
class ConvTranspose(Layer):
    """y = Wᵀ ∗ x + b, the transpose of a convolution: with a stride, upsampling by learned weights.

        y[o·stride + k·dilation − pad, f] += W[c, f, k] x[o, c]       and then b is added

    One example x is `(height, width, in)`; axes in front are more images. The output has
    `size · stride` entries along each axis with "same" padding, else (size − 1) · stride − low −
    high + dilation · (window − 1) + output_padding + 1, as PyTorch's.

    Parameters: `{"W": (in, features / groups, *window), "b": (features,)}`, or `{"W"}`.

    Args:
        features: how many outputs at each place.
        window: its sizes: one number for the two axes of an image, or one for each axis.
        stride, padding, dilation, groups: those of the convolution that this is the transpose of;
            see `fnn.ops.conv_transpose`.
        output_padding: how many entries more the output gets at the end of each axis.
        use_bias: whether there is a b.
        weight_init: initialiser of W, which is asked for `(features, in / groups, *window)`, so
            that its fan_in is in / groups · window. Unless given, He's for a relu that follows,
            with the number of inputs that an output sums over: of a stride, that is on average
            1/stride of the window along each axis.
        bias_init: initialiser of b.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) x isn't such an image, or the parameters aren't of these shapes.

    Dumoulin, Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285.
    """

    features: int
    window: Sizes
    _: dataclasses.KW_ONLY
    stride: Sizes = 1
    padding: Padding = "same"
    output_padding: Sizes = 0
    dilation: Sizes = 1
    groups: int = 1
    use_bias: bool = True
    weight_init: Initializer | None = None
    bias_init: Initializer = zeros

    def __post_init__(self) -> None:
        set_options(self, "stride", "dilation")
        space = len(window_of(self))
        sizes_of("ConvTranspose", "output_padding", self.output_padding, space, least=0)
        check_padding("ConvTranspose", self.padding, space)

    def init(self, key: chex.PRNGKey, x: Any) -> dict:
        shapes = self._shapes(x)
        ins, outs, *window = shapes["W"]
        seen = self.groups * outs, ins // self.groups, *window
        params = initial_weights(self, key, shapes | {"W": seen}, self.weight_init or self._he)
        W = params["W"].reshape(self.groups, outs, *seen[1:])
        return params | {"W": W.swapaxes(1, 2).reshape(shapes["W"])}

    def _he(self, key: chex.PRNGKey, shape: Any, dtype: Any) -> jax.Array:
        """He's, where the window's places are divided among several kinds of outputs.

        Along an axis of stride s and dilation d, places k of the same k·d mod s reach the same.
        """
        window = window_of(self)
        options = [
            sizes_of("ConvTranspose", "", o, len(window)) for o in (self.stride, self.dilation)
        ]
        kinds = (min(k, s // math.gcd(s, d)) for k, s, d in zip(window, *options, strict=True))
        return variance_scaling(key, shape, dtype, scale=2 * math.prod(kinds))

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        check_params(self, params, self._shapes(x), x)
        y = _conv_transpose(
            x,
            params["W"],
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return y + params["b"] if self.use_bias else y

    def _shapes(self, x: Any) -> dict[str, tuple[int, ...]]:
        window = window_of(self)
        ins = grouped_features(self, x, len(window))
        return shapes_of(self, (ins, self.features // self.groups, *window))


@dataclasses.dataclass(frozen=True, repr=False)
class SqueezeExcite(Layer):
    """y = x · g(W₂ f(W₁ mean(x) + b₁) + b₂): each feature scaled by what all of the image shows.

    x is `(height, width, features)`, the mean that over its space; axes in front are more images.

    Parameters: `{"reduce": {"W": (hidden, features), "b"}, "expand": {"W": (features, hidden),
    "b"}}`.

    Args:
        hidden: how many numbers the image is squeezed into (a sixteenth of the features, in the
            paper).
        activation: f.
        gate: g.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) x is no image, or the parameters aren't of these shapes.

    Hu, Shen, Sun, "Squeeze-and-excitation networks", arXiv:1709.01507.
    """

    hidden: int
    activation: Callable = ops.relu
    gate: Callable = ops.sigmoid

    def __post_init__(self) -> None:
        set_count(self, "hidden")
        for name in ("activation", "gate"):
            arguments.function("SqueezeExcite", name, getattr(self, name), "a function of arrays")

    def init(self, key: chex.PRNGKey, x: Any) -> dict:
        reduce, expand = self._parts(x)
        keys = jax.random.split(arguments.key(f"{self}.init", "key", key))
        features = jax.ShapeDtypeStruct(x.shape[-1:], x.dtype)
        hidden = jax.ShapeDtypeStruct((self.hidden,), x.dtype)
        return {"reduce": reduce.init(keys[0], features), "expand": expand.init(keys[1], hidden)}

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        reduce, expand = self._parts(x)
        check_parts(self, params, ["reduce", "expand"])
        shapes = {"W": (self.hidden, x.shape[-1]), "b": (self.hidden,)}
        check_params(self, params["reduce"], shapes, x)
        mean = ops.adaptive_average_pool(x, 1)
        hidden = self.activation(reduce(params["reduce"], mean))
        return x * self.gate(expand(params["expand"], hidden))

    def _parts(self, x: Any) -> tuple[Linear, Linear]:
        return Linear(self.hidden), Linear(image_features(self, x, 2))


# ------------------------------------------------------------------------------- adapted kernels


def _convolution(x: Any, W: Any, *, groups: int, **options: Any) -> jax.Array:
    """`ops.convolution`; of an adapted kernel W ∗ x + scale · B (A ∗ x), with A for each group."""
    if not _is_low(W, groups):
        return ops.convolution(x, as_array(W), groups=groups, **options)
    y = ops.convolution(x, W.W, groups=groups, **options)
    z = _together(ops.convolution(_apart(x, W, groups), W.small, **options), W, groups)
    change = z @ W.B.T if groups == 1 else _by_group("...gr,gor->...go", z, W.B, groups)
    return y + (W.scale * change).astype(y.dtype)


def _conv_transpose(x: Any, W: Any, *, groups: int, **options: Any) -> jax.Array:
    """`ops.conv_transpose`; of an adapted kernel Wᵀ ∗ x + scale · Aᵀ ∗ (Bᵀ x), B being of x's."""
    if not _is_low(W, groups):
        return ops.conv_transpose(x, as_array(W), groups=groups, **options)
    y = ops.conv_transpose(x, W.W, groups=groups, **options)
    z = W.scale * (x @ W.B if groups == 1 else _by_group("...gi,gir->...gr", x, W.B, groups))
    change = _together(ops.conv_transpose(_apart(z, W, groups), W.small, **options), W, groups)
    return y + change.astype(y.dtype)


def _is_low(W: Any, groups: int) -> bool:
    """Whether it is an adapted kernel, of a rank below the rows of a group's matrix.

    Else what is between B and A holds more numbers than a convolution's output (or a transposed
    one's input), and the sum W + scale · B A takes less time and memory. So it is of depthwise
    kernels: 7 × 7 of 64 features at rank 4 take a fifth of the time on a CPU.
    """
    return isinstance(W, AdaptedKernel) and W.B.shape[1] < W.shape[0] // groups


def _by_group(form: str, x: Any, B: Any, groups: int) -> jax.Array:
    """Each group of x's features with its own rows of B."""
    x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    y = jnp.einsum(form, x, B.reshape(groups, -1, B.shape[1]))
    return y.reshape(*y.shape[:-2], groups * y.shape[-1])


def _apart(x: Any, W: Any, groups: int) -> jax.Array:
    """Of an image each group of features as an image, on an axis in front of the space."""
    if groups == 1:
        return x
    x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return jnp.moveaxis(x, -2, -W.ndim)


def _together(x: Any, W: Any, groups: int) -> jax.Array:
    """The same, backwards."""
    if groups == 1:
        return x
    x = jnp.moveaxis(x, -W.ndim, -2)
    return x.reshape(*x.shape[:-2], groups * x.shape[-1])


# ------------------------------------------------------------------- what the layers have in common


def set_options(layer: Any, *names: str) -> None:
    """Check the counts of a convolutional layer, its window and the options named."""
    where = type(layer).__name__
    check_options(layer)
    set_count(layer, "features")
    set_count(layer, "groups")
    space = len(window_of(layer))
    for name in names:
        sizes_of(where, name, getattr(layer, name), space)
    if layer.features % layer.groups:
        raise ValueError(
            f"{where}: features must be a multiple of groups, but got features={layer.features}, "
            f"groups={layer.groups}."
        )


def window_of(layer: Any, name: str = "window") -> tuple[int, ...]:
    """A layer's window, a size for each axis of space: two where it is one number."""
    value = getattr(layer, name)
    space = len(value) if isinstance(value, (tuple, list)) else 2
    return sizes_of(type(layer).__name__, name, value, space)


def image_features(layer: Layer, x: Any, space: int) -> int:
    """The features of an image with so many axes of space."""
    shape = getattr(x, "shape", None)
    if shape is None or len(shape) < space + 1:
        got = arguments.show(x) if shape is None else f"shape {shape}"
        wanted = {1: "(length, in)", 2: "(height, width, in)"}.get(space, "(*space, in)")
        raise LayerError(f"{layer} wants an array of shape {wanted} as its input, but got {got}.")
    return shape[-1]


def grouped_features(layer: Any, x: Any, space: int) -> int:
    """The same, which the layer's groups must divide."""
    ins = image_features(layer, x, space)
    if ins % layer.groups:
        raise LayerError(
            f"{layer} wants a number of features that {layer.groups} groups divide, but got an "
            f"input of shape {x.shape}."
        )
    return ins


def shapes_of(layer: Any, W: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"W": W, "b": (layer.features,)} if layer.use_bias else {"W": W}


def initial_weights(layer: Any, key: Any, shapes: dict, weight_init: Initializer) -> dict:
    keys = jax.random.split(arguments.key(f"{layer}.init", "key", key))
    made = {"W": weight_init, "b": layer.bias_init}
    return {
        name: initial(layer, made[name], own, shapes[name])
        for (name, own) in zip(made, keys, strict=True)
        if name in shapes
    }
