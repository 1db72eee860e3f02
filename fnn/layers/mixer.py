"""`MLP`, the two linear layers of a block, and `MixerBlock`, two of them across patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex

from fnn import arguments, ops
from fnn.initializers import Initializer, he_normal
from fnn.layers.combinators import chain
from fnn.layers.dropout import Dropout
from fnn.layers.layer import Layer, LayerError, last_axis, set_count, set_number
from fnn.layers.linear import Linear
from fnn.layers.mode import EVALUATE, Mode
from fnn.layers.net import Net, Network
from fnn.layers.normalization import LayerNorm


class _MadeOfParts(Layer):
    """A layer that is a network of parts, some of which depend on its input's shape."""

    def _network(self, x: Any) -> Network:
        raise NotImplementedError

    def init(self, key: chex.PRNGKey, x: Any) -> dict:
        return self._network(x).init(key, x)

    def __call__(self, params: Any, x: Any, mode: Mode = EVALUATE) -> Any:
        return self._network(x)(params, x, mode=mode)

    def _make(self, key: Any, length: int | None, *xs: Any) -> tuple[dict, dict, Any]:
        return self._network(*xs)._make(key, length, *xs)


@dataclasses.dataclass(frozen=True, repr=False)
class MLP(_MadeOfParts):
    """y = W₂ f(W₁ x + b₁) + b₂ along the last axis: the multilayer perceptron of a block.

    x is `(..., in)`, the same at each position, and y `(..., features)`. In training dropout
    follows f, and the end.

    Parameters: `{"hidden": {"W": (hidden, in), "b": (hidden,)}, "output": {"W": (features, hidden),
    "b": (features,)}}`.

    Args:
        hidden: how many hidden units; four times `in` is usual.
        features: how many outputs; `in` unless given.
        activation: f.
        dropout: the rate of dropout.
        use_bias: whether there are b₁ and b₂.
        weight_init, output_init: initialisers of W₁ and of W₂.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) x or the parameters don't fit.
    """

    hidden: int
    features: int | None = None
    _: dataclasses.KW_ONLY
    activation: Callable = ops.gelu
    dropout: float = 0.0
    use_bias: bool = True
    weight_init: Initializer = he_normal
    output_init: Initializer = he_normal

    def __post_init__(self) -> None:
        set_count(self, "hidden")
        for option in ("weight_init", "output_init"):
            form = "an initialiser, a function (key, shape, dtype)"
            arguments.function("MLP", option, getattr(self, option), form)
        if self.features is not None:
            set_count(self, "features")
        arguments.function("MLP", "activation", self.activation, "a function of an array")
        set_number(self, "dropout", least=0, most=1)
        arguments.flag("MLP", "use_bias", self.use_bias)

    def _network(self, x: Any) -> Network:
        features = self.features or last_axis(self, x)
        return chain(
            hidden=Linear(self.hidden, use_bias=self.use_bias, weight_init=self.weight_init),
            activation=self.activation,
            dropout=Dropout(self.dropout),
            output=Linear(features, use_bias=self.use_bias, weight_init=self.output_init),
            dropout_of_output=Dropout(self.dropout),
        )


@dataclasses.dataclass(frozen=True, repr=False)
class MixerBlock(_MadeOfParts):
    """U = X + MLP(norm(X)ᵀ)ᵀ, Y = U + MLP(norm(U)): across the patches, then across the channels.

    X is `(patches, channels)`, and so is Y. The first MLP serves each channel alike, and sees all
    patches; the second serves each patch alike.

    Parameters: `{"norm_tokens", "tokens", "norm_channels", "channels"}`, those of `LayerNorm` and
    `MLP`.

    Args:
        tokens: how many hidden units the MLP across the patches has.
        channels: how many the one across the channels has.
        activation: of both.
        dropout: the rate of dropout in both.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) X isn't `(patches, channels)`, or the parameters don't fit.

    Tolstikhin et al., "MLP-Mixer: an all-MLP architecture for vision", NeurIPS 2021, equation 1.
    """

    tokens: int
    channels: int
    _: dataclasses.KW_ONLY
    activation: Callable = ops.gelu
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for option in ("tokens", "channels"):
            set_count(self, option)
        arguments.function("MixerBlock", "activation", self.activation, "a function of an array")
        set_number(self, "dropout", least=0, most=1)

    def _network(self, x: Any) -> Network:
        if len(getattr(x, "shape", ())) != 2:
            raise LayerError(
                f"{self} wants an array of shape (patches, channels), but got {arguments.show(x)}."
            )
        options: dict[str, Any] = {"activation": self.activation, "dropout": self.dropout}
        parts = {
            "norm_tokens": LayerNorm(),
            "tokens": MLP(self.tokens, **options),
            "norm_channels": LayerNorm(),
            "channels": MLP(self.channels, **options),
        }
        return Network(_mixer, parts)


def _mixer(net: Net, x: Any) -> Any:
    x = x + net.tokens(net.norm_tokens(x).T).T
    return x + net.channels(net.norm_channels(x))
