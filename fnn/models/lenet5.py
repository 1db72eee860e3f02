"""LeNet-5: the convolutional network that reads digits."""

from __future__ import annotations

from typing import Any

from fnn import arguments, ops
from fnn.initializers import xavier_uniform
from fnn.layers import AveragePool, Conv, Linear, Network, chain


def lenet(classes: int = 10) -> Network:
    """LeNet-5 for images of 32 × 32 pixels (digits of 28 × 28 with a frame of zeros).

        C1  6 maps, 5 × 5     S2  means of 2 × 2     C3  16 maps, 5 × 5     S4  means of 2 × 2
        C5  120 maps, 5 × 5 (one pixel is left)      F6  84 units           the classes' logits

    with tanh after each layer with weights but the last. As everybody does today, C3 sees all maps
    of S2, not the paper's table of some; S2 and S4 have no weights; tanh isn't scaled, as the
    paper's 1.7159 tanh(2a/3); the last layer is linear, not one of distances to 7 × 12 bitmaps.
    61,706 parameters for images with one feature.

    Args:
        classes: how many.

    Returns:
        A Network of one image `(32, 32, in)`, whose output are the logits, `(classes,)`.

    Raises:
        TypeError, ValueError: classes is no count.

    LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition",
    Proceedings of the IEEE, 1998, figure 2.
    """
    classes = arguments.integer("lenet", "classes", classes, least=1)
    conv = lambda maps: Conv(maps, 5, padding="valid", weight_init=xavier_uniform)
    linear = lambda units: Linear(units, weight_init=xavier_uniform)
    return chain(
        c1=conv(6),
        f1=ops.tanh,
        s2=AveragePool(2),
        c3=conv(16),
        f3=ops.tanh,
        s4=AveragePool(2),
        c5=conv(120),
        f5=ops.tanh,
        flatten=_flatten,
        f6=linear(84),
        f=ops.tanh,
        output=linear(classes),
    )


def _flatten(x: Any) -> Any:
    return x.reshape(-1)
