"""The multilayer perceptron: linear layers with a nonlinear function between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from fnn import arguments, ops
from fnn.layers import Dropout, Layer, Linear, Network, chain
from fnn.models.options import check_options


def mlp(
    features: int,
    hidden: Sequence[int] = (300, 100),
    *,
    activation: Callable = ops.relu,
    dropout: float = 0.0,
    norm: Layer | None = None,
) -> Network:
    """x → f(W₁ x + b₁) → f(W₂ · + b₂) → … → W x + b: scores for one example x of any shape.

    Args:
        features: how many outputs.
        hidden: how many units each hidden layer has. 300 and 100 are LeCun's of 1998.
        activation: f.
        dropout: the rate of dropout after each f.
        norm: a layer before each f, such as `BatchNorm()` or `LayerNorm()`; each has parameters of
            its own.

    Returns:
        A Network with the parameters `{"hidden0": {"W", "b"}, "hidden1": …, "output": …}`, and
        "norm0", … where there is a norm.

    Raises:
        TypeError, ValueError: an option isn't of its kind.

    Rumelhart, Hinton, Williams, "Learning representations by back-propagating errors", Nature 1986;
    LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998,
    section III.C.4.

    >>> import fnn
    >>> net = fnn.models.mlp(10, (64, 32))
    >>> params = net.init(jax.random.key(0), jnp.zeros((28, 28)))
    >>> net(params, jnp.zeros((28, 28))).shape
    (10,)
    """
    check_options("mlp", features=features, dropout=dropout)
    if not isinstance(hidden, (tuple, list)):
        raise TypeError(
            f"mlp: hidden must be a sequence of widths, but got {arguments.show(hidden)}."
        )
    parts: dict[str, Layer | Callable] = {"flatten": jnp.ravel}
    for i, width in enumerate(hidden):
        parts[f"hidden{i}"] = Linear(arguments.integer("mlp", "hidden", width, least=1))
        if norm is not None:
            parts[f"norm{i}"] = norm
        parts[f"activation{i}"] = activation
        parts[f"dropout{i}"] = Dropout(dropout)
    return chain(**parts, output=Linear(features))
