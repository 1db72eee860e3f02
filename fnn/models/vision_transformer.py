"""The vision transformer: an image as a sequence of patches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax.numpy as jnp

from fnn import arguments, ops
from fnn.initializers import lecun_normal, normal, xavier_uniform, zeros
from fnn.layers import (
    MLP,
    Attention,
    Dropout,
    Layer,
    LayerError,
    LayerNorm,
    Linear,
    Net,
    Network,
    PositionEmbedding,
    repeat,
)
from fnn.models.options import check_options


def vit(
    classes: int = 1000,
    image: int = 224,
    patch: int = 16,
    features: int = 768,
    depth: int = 12,
    heads: int = 12,
    hidden: int = 3072,
    *,
    dropout: float = 0.1,
    remat: bool = False,
    unroll: int = 1,
) -> Network:
    """ViT, as given ViT-B/16, of 86,567,656 parameters with its 1000 classes.

        x = [class; W p₁ + b; …; W pₙ + b] + P                  p: the patches' pixels
        x = x + attention(norm(x)),  x = x + MLP(norm(x))       depth times; gelu
        scores = W norm(x)[0] + b

    A network of one image `(image, image, channels)`, of any number of channels. In training it
    needs a key, for dropout (none of the attention's probabilities).

    Args:
        classes: how many scores.
        image, patch: the side of an image, and of a patch, in pixels.
        features, depth, heads, hidden: of the model; 1024, 24, 16, 4096 is ViT-L, 192, 12, 3, 768
            DeiT's ViT-Ti.
        dropout: its rate; 0.1 in the paper on ImageNet (table 3).
        remat: whether backward computes each block again instead of keeping its insides.
        unroll: how many blocks stand in one turn of the loop over them; see `repeat`.

    Returns:
        A Network with the parameters "patches.W" (features, channels · patch²; the pixels of a
        patch in the order of a convolution's kernel), "patches.b", "class.token", "position.P",
        "blocks.norm1", "blocks.attend.q.W", …, "blocks.mlp.hidden.W", …, "norm", "output".

    Raises:
        TypeError, ValueError: an option isn't of its kind; patch doesn't divide image, or heads
            features.
        LayerError: (when called) the image isn't of shape (image, image, channels).

    Dosovitskiy et al., "An image is worth 16x16 words", arXiv:2010.11929.

    >>> import fnn
    >>> net = fnn.models.vit(10, image=8, patch=4, features=8, depth=2, heads=2, hidden=16)
    >>> params = net.init(jax.random.key(0), jnp.zeros((8, 8, 3)))
    >>> net(params, jnp.zeros((8, 8, 3))).shape
    (10,)
    """
    counts = {"features": features, "depth": depth, "heads": heads, "hidden": hidden}
    check_options("vit", classes=classes, image=image, patch=patch, **counts, dropout=dropout)
    if image % patch:
        raise ValueError(f"vit: patch must divide image, {image}, but got {patch}.")
    block = Network(
        _block,
        {
            "norm1": LayerNorm(1e-6),
            "attend": Attention(heads, weight_init=xavier_uniform),
            "norm2": LayerNorm(1e-6),
            "mlp": MLP(
                hidden,
                activation=functools.partial(ops.gelu, approximate=False),
                dropout=dropout,
                weight_init=xavier_uniform,
                output_init=xavier_uniform,
            ),
            "dropout": Dropout(dropout),
        },
    )
    parts = {
        "cut": _Patches(image, patch),
        "patches": Linear(features, weight_init=lecun_normal),
        "class": _Token(),
        "position": PositionEmbedding((image // patch) ** 2 + 1),
        "dropout": Dropout(dropout),
        "blocks": repeat(block, depth, remat=remat, unroll=unroll),
        "norm": LayerNorm(1e-6),
        "output": Linear(classes, weight_init=zeros),
    }
    return Network(_vit, parts)


def _vit(net: Net, x: Any) -> Any:
    with_class = getattr(net, "class")  # a word of Python's
    x = with_class(net.patches(net.cut(x)))
    x = net.blocks(net.dropout(net.position(x)))
    return net.output(net.norm(x)[0])


def _block(net: Net, x: Any) -> Any:
    x = x + net.dropout(net.attend(net.norm1(x)))
    return x + net.mlp(net.norm2(x))


@dataclasses.dataclass(frozen=True, repr=False)
class _Patches(Layer):
    """An image (side, side, channels) as patches (n, channels · size²), row by row."""

    side: int
    size: int

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        if getattr(x, "ndim", 0) != 3 or x.shape[:2] != (self.side, self.side):
            raise LayerError(
                f"vit wants an image of shape ({self.side}, {self.side}, channels), but got "
                f"{arguments.show(x)}."
            )
        n = self.side // self.size
        return ops.pixel_unshuffle(x, self.size).reshape(n * n, -1)


@dataclasses.dataclass(frozen=True, repr=False)
class _Token(Layer):
    """A learned vector in front of a sequence."""

    def init(self, key: chex.PRNGKey, x: Any) -> dict:
        return {"token": normal(key, (x.shape[1],), jnp.result_type(float), stddev=0.02)}

    def __call__(self, params: Any, x: Any, **mode: Any) -> Any:
        return jnp.concatenate([params["token"][None].astype(x.dtype), x])
