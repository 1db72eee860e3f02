"""U-Net: an image in, a map of it out."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from fnn import arguments, ops
from fnn.layers import Conv, ConvTranspose, LayerError, MaxPool, Network, chain
from fnn.layers.net import Net


def unet(
    classes: int = 2,
    features: int = 64,
    depth: int = 4,
    *,
    padding: str = "valid",
) -> Network:
    """A U-Net: down through ever smaller images with ever more features, and up again.

        down, depth times   two convolutions 3×3, relu after each; then the largest of 2 × 2
        bottom              two convolutions 3×3, relu after each, with features · 2^depth
        up, depth times     a transposed convolution 2×2 with stride 2, beside it the image of the
                            same size on the way down (its middle); two convolutions 3×3, relu
        a convolution 1×1   the logits of each pixel's class

    31,030,658 parameters for images with one feature. The paper's dropout at the bottom, of a rate
    that it doesn't tell, is left out.

    Args:
        classes: how many.
        features: of the first convolutions; each step down doubles them.
        depth: how many steps down.
        padding: of the 3 × 3 convolutions: "valid" as in the paper, where the map is smaller than
            the image (572 × 572 become 388 × 388), or "same" for a map of the image's size.

    Returns:
        A Network of one image `(height, width, in)` whose output are logits,
        `(out_height, out_width, classes)`. Each image that is halved must have even sides.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) an image that is to be halved has an odd side.
        ValueError: (when called) the image is too small for the convolutions.

    Ronneberger, Fischer, Brox, "U-Net: convolutional networks for biomedical image segmentation",
    MICCAI 2015, figure 1. The paper's initialisation is the layers': He's.
    """
    classes = arguments.integer("unet", "classes", classes, least=1)
    features = arguments.integer("unet", "features", features, least=1)
    depth = arguments.integer("unet", "depth", depth, least=1)
    arguments.choice("unet", "padding", padding, ("valid", "same"))

    def twice(n: int) -> Network:
        conv = lambda: Conv(n, 3, padding=padding)
        return chain(conv(), ops.relu, conv(), ops.relu)

    parts: dict[str, Any] = {"pool": MaxPool(2)}
    for i in range(depth):
        parts[f"down{i}"] = twice(features * 2**i)
    parts["bottom"] = twice(features * 2**depth)
    for i in reversed(range(depth)):
        parts[f"grow{i}"] = ConvTranspose(features * 2**i, 2, stride=2)
        parts[f"up{i}"] = twice(features * 2**i)
    parts["output"] = Conv(classes, 1)
    return Network(_unet, parts)


def _unet(net: Net, x: Any) -> Any:
    depth = sum(name.startswith("down") for name in net._parts)
    passed = []
    for i in range(depth):
        x = getattr(net, f"down{i}")(x)
        if x.shape[-3] % 2 or x.shape[-2] % 2:
            raise LayerError(
                f"halves the image {depth} times, but after {i} of them it is {x.shape}: the "
                "sides must be even."
            )
        passed.append(x)
        x = net.pool(x)
    x = net.bottom(x)
    for i in reversed(range(depth)):
        x = getattr(net, f"grow{i}")(x)
        beside = _middle(passed[i], x.shape[-3:-1])
        x = getattr(net, f"up{i}")(jnp.concatenate([beside, x], axis=-1))
    return net.output(x)


def _middle(x: Any, sizes: tuple[int, int]) -> Any:
    """The middle of an image."""
    top, left = ((n - m) // 2 for n, m in zip(x.shape[-3:-1], sizes, strict=True))
    return x[..., top : top + sizes[0], left : left + sizes[1], :]
