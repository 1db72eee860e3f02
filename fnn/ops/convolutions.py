"""Convolution and its transpose, in any number of dimensions.

Images are `(height, width, features)`, sequences `(time, features)`, weights
`(out, in / groups, *window)` as in PyTorch. Axes in front of an image's are a batch.

How many axes of space there are, w says: it has two more. What is called
convolution here and in all of deep learning is a cross-correlation: the window isn't reversed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from jax import lax

from fnn import arguments
from fnn.convolution import conv_general_dilated_p
from fnn.operation import bind_twin
from fnn.ops.arguments import must_be_real_or_complex

Sizes = int | tuple[int, ...]
Padding = str | int | tuple[int | tuple[int, int], ...]


def convolution(
    x: chex.Array,
    w: chex.Array,
    *,
    stride: Sizes = 1,
    padding: Padding = "same",
    dilation: Sizes = 1,
    groups: int = 1,
) -> jax.Array:
    """y[o, f] = Σ x[o·stride + k·dilation − pad, c] w[f, c, k], over places k, features c.

    Args:
        x: one image `(*space, in)`, or with a batch's axes in front `(..., *space, in)`.
        w: the weight, `(out, in / groups, *window)`; its window says how many axes space has.
        stride: how far the window moves from one output to the next: one number, or one for each
            axis of space.
        padding: "same", so that the output has ⌈size / stride⌉ entries, an odd zero at the end;
            "valid", none; "circular", as much as "same", filled as if x went on periodically; a
            number of zeros at both ends, or one for each axis of space, or (low, high) for each.
        dilation: the distance of the window's places.
        groups: into how many groups the features are divided: those of one see no other. With as
            many as there are features in, the convolution is depthwise.

    Returns:
        y, `(..., *out_space, out)`, of the dtype that x and w have together.

    Local gradient: for x, g convolved with the flipped w; for w, x convolved with g. Both are
    convolutions. Kept: x and w. On a CPU, value and gradients are computed by the formulas of
    `fnn/convolution/cpu.py`, elsewhere by XLA's convolution (on a GPU cuDNN's). Linear in x and in
    w: no kink.

    Raises:
        TypeError: x or w isn't floating or complex, or an option isn't of its kind.
        ValueError: shapes, groups or options don't fit each other.

    Sources: LeCun et al., "Backpropagation applied to handwritten zip code recognition", 1989;
    Yu, Koltun, arXiv:1511.07122 (dilation); Dumoulin, Visin, arXiv:1603.07285 (the sizes).

    >>> x, w = jnp.ones((8, 8, 3)), jnp.ones((16, 3, 3, 3))
    >>> convolution(x, w, stride=2).shape
    (4, 4, 16)
    """
    op = "convolution"
    space = _space(op, x, w)
    groups = arguments.integer(op, "groups", groups, least=1)
    if w.shape[1] * groups != x.shape[-1] or w.shape[0] % groups:
        raise ValueError(
            f"{op}: argument 'w' has shape {w.shape}, wanted (out, {x.shape[-1]} / {groups}, "
            f"*window) with an out that {groups} groups divide, for x of shape {x.shape} and "
            f"groups={groups}."
        )
    strides = sizes_of(op, "stride", stride, space)
    dilations = sizes_of(op, "dilation", dilation, space)
    sizes = x.shape[-1 - space : -1]
    reach = [1 + d * (k - 1) for k, d in zip(w.shape[2:], dilations, strict=True)]
    pads = pads_of(op, padding, sizes, reach, strides, also=("circular",))
    _must_fit(op, x, w, sizes, reach, pads)
    if padding == "circular":
        lead = [(0, 0)] * (x.ndim - space - 1)
        x, pads = jnp.pad(x, [*lead, *pads, (0, 0)], mode="wrap"), [(0, 0)] * space
    return _convolve(x, w, "OI", strides, pads, (1,) * space, dilations, groups)


def conv_transpose(
    x: chex.Array,
    w: chex.Array,
    *,
    stride: Sizes = 1,
    padding: Padding = "same",
    output_padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> jax.Array:
    """The transpose of `convolution`: y[o·stride + k·dilation − pad] += x[o] w[k].

    It is what the convolution with the same w and options does backwards: from its output's shape
    to its input's. A stride makes it an upsampling by learned weights.

    Args:
        x: `(..., *space, in)`.
        w: the weight, `(in, out / groups, *window)`, as of PyTorch's ConvTranspose.
        stride, dilation, groups: of the convolution that this is the transpose of.
        padding: its padding; "same" makes the output `size · stride`. Not "circular".
        output_padding: how many entries more the output gets at the end of each axis: a strided
            convolution maps inputs of several sizes to one, and this says which one is meant.
            Less than the stride or the dilation.

    Returns:
        y, `(..., *out_space, out)`, with the sizes of PyTorch's ConvTranspose: (size − 1) · stride
        − low − high + dilation · (window − 1) + output_padding + 1.

    Local gradient: for x, the convolution of g with w; for w, g convolved with x. Kept: x and w.
    Linear in x and in w: no kink. Computed as `convolution` is.

    Raises:
        TypeError: x or w isn't floating or complex, or an option isn't of its kind.
        ValueError: shapes, groups or options don't fit each other.

    Source: Dumoulin, Visin, "A guide to convolution arithmetic for deep learning",
    arXiv:1603.07285, chapter 4.

    >>> conv_transpose(jnp.ones((4, 4, 3)), jnp.ones((3, 16, 2, 2)), stride=2).shape
    (8, 8, 16)
    """
    op = "conv_transpose"
    space = _space(op, x, w)
    groups = arguments.integer(op, "groups", groups, least=1)
    if w.shape[0] != x.shape[-1] or w.shape[0] % groups:
        raise ValueError(
            f"{op}: argument 'w' has shape {w.shape}, wanted ({x.shape[-1]}, out / groups, "
            f"*window) for x of shape {x.shape}, with an in that groups={groups} divides."
        )
    strides = sizes_of(op, "stride", stride, space)
    dilations = sizes_of(op, "dilation", dilation, space)
    more = sizes_of(op, "output_padding", output_padding, space, least=0)
    if any(m >= max(s, d) for m, s, d in zip(more, strides, dilations, strict=True)):
        raise ValueError(
            f"{op}: output_padding must be less than the stride or the dilation, but got "
            f"{output_padding} with stride={stride}, dilation={dilation}."
        )
    reach = [1 + d * (k - 1) for k, d in zip(w.shape[2:], dilations, strict=True)]
    whole = [n * s for n, s in zip(x.shape[-1 - space : -1], strides, strict=True)]
    pads = pads_of(op, padding, whole, reach, strides)
    if padding == "same":  # a window that is shorter than the stride leaves entries at the end out
        more = tuple(m + max(s - r, 0) for m, s, r in zip(more, strides, reach, strict=True))
    around = [
        (r - 1 - low, r - 1 - high + m) for r, (low, high), m in zip(reach, pads, more, strict=True)
    ]
    if 0 in w.shape[2:]:
        raise ValueError(f"{op}: argument 'w' has shape {w.shape}, wanted a window without zeros.")
    spread = [n and (n - 1) * s + 1 for n, s in zip(x.shape[-1 - space : -1], strides, strict=True)]
    sizes = [n + sum(a) - r + 1 for n, a, r in zip(spread, around, reach, strict=True)]
    if min(sizes, default=0) < 0:
        raise ValueError(
            f"{op}: argument 'x' has shape {x.shape}, whose output with padding {list(pads)} would "
            f"have the sizes {tuple(sizes)}, for w of shape {w.shape}: wanted less padding."
        )
    # (in, out / groups, *window) -> (in / groups, out, *window): each group's outputs side by side
    ins, outs, *window = w.shape
    if groups > 1:
        w = w.reshape(groups, ins // groups, outs, *window)
        w = jnp.moveaxis(w, 0, 1).reshape(ins // groups, groups * outs, *window)
    w = lax.rev(w, tuple(range(2, w.ndim)))
    return _convolve(x, w, "IO", (1,) * space, around, strides, dilations, groups)


def _convolve(x, w, order: str, strides, pads, between, dilations, groups: int):
    """The convolution of x `(..., *space, in)`, whose w has its first axes in this order."""
    dtype = jnp.result_type(x, w)
    x, w = x.astype(dtype), w.astype(dtype)
    space = w.ndim - 2
    lead, sizes = x.shape[: x.ndim - space - 1], x.shape[x.ndim - space - 1 :]
    if len(lead) != 1:
        x = x.reshape(math.prod(lead), *sizes)
    axes = "DHWXYZUV"[:space]
    numbers = lax.conv_dimension_numbers(
        x.shape, w.shape, (f"N{axes}C", f"{order}{axes}", f"N{axes}C")
    )
    y = bind_twin(
        conv_general_dilated_p,
        x,
        w,
        window_strides=tuple(strides),
        padding=tuple(pads),
        lhs_dilation=tuple(between),
        rhs_dilation=tuple(dilations),
        dimension_numbers=numbers,
        feature_group_count=groups,
        batch_group_count=1,
        precision=None,
        preferred_element_type=None,
        out_sharding=None,
    )
    return y if len(lead) == 1 else y.reshape(*lead, *y.shape[1:])


# ------------------------------------------------------------------------------------ options


def sizes_of(op: str, name: str, value, space: int, least: int = 1) -> tuple[int, ...]:
    """One integer for each axis of space, from one for all or one for each."""
    if not isinstance(value, (tuple, list)):
        return (arguments.integer(op, name, value, least=least),) * space
    if len(value) != space:
        raise ValueError(
            f"{op}: {name} must be one integer or one for each of the {space} axes of space, but "
            f"got {value}."
        )
    return tuple(arguments.integer(op, name, v, least=least) for v in value)


def pads_of(
    op: str,
    padding,
    sizes: Sequence[int],
    reach: Sequence[int],
    strides: Sequence[int],
    also: tuple[str, ...] = (),
) -> list[tuple[int, int]]:
    """The entries before and after each axis of space that `padding` means.

    sizes: of the axes. reach: from a window's first place to its last. also: words that mean as
    much as "same".
    """
    if isinstance(padding, str):
        arguments.choice(op, "padding", padding, ("same", "valid", *also))
        if padding == "valid":
            return [(0, 0)] * len(sizes)
        found = []
        for n, r, s in zip(sizes, reach, strides, strict=True):
            total = max((-(-n // s) - 1) * s + r - n, 0)
            found.append((total // 2, total - total // 2))
        return found
    if not isinstance(padding, (tuple, list)):
        both = arguments.integer(op, "padding", padding, least=0)
        return [(both, both)] * len(sizes)
    if len(padding) != len(sizes):
        raise ValueError(
            f"{op}: padding must be a word, one integer, or one integer or pair (low, high) for "
            f"each of the {len(sizes)} axes of space, but got {padding}."
        )
    found = []
    for of_axis in padding:
        pair = of_axis if isinstance(of_axis, (tuple, list)) else (of_axis, of_axis)
        if len(pair) != 2:
            raise ValueError(
                f"{op}: padding's pairs are (low, high), but got {of_axis} in {padding}."
            )
        low, high = (arguments.integer(op, "padding", p, least=0) for p in pair)
        found.append((low, high))
    return found


def check_padding(op: str, padding, space: int, also: tuple[str, ...] = ()) -> None:
    """Raise unless `padding` is of a kind that `pads_of` takes, whatever the sizes."""
    ones = (1,) * space
    pads_of(op, padding, ones, ones, ones, also)


def _space(op: str, x, w) -> int:
    """How many axes of space there are, from w; raise where x or w can't be what it should."""
    must_be_real_or_complex(op, x=x, w=w)
    space = w.ndim - 2
    if not 0 <= space <= 8:
        raise ValueError(
            f"{op}: argument 'w' has shape {w.shape}, wanted a weight with two axes of features "
            "and then up to 8 axes of a window."
        )
    if x.ndim < space + 1:
        raise ValueError(
            f"{op}: argument 'x' has shape {x.shape}, wanted (..., *space, in) with {space} axes "
            f"of space, for w of shape {w.shape}."
        )
    return space


def _must_fit(op: str, x, w, sizes, reach, pads) -> None:
    if 0 in w.shape[2:]:
        raise ValueError(f"{op}: argument 'w' has shape {w.shape}, wanted a window without zeros.")
    for n, r, (low, high) in zip(sizes, reach, pads, strict=True):
        if n + low + high < r:
            raise ValueError(
                f"{op}: argument 'x' has shape {x.shape}, whose space {tuple(sizes)}, with padding "
                f"{list(pads)}, is smaller than the {tuple(reach)} that the window of w, of shape "
                f"{w.shape}, reaches over."
            )
