"""The transformer as it was first: one sequence made into another."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp

from fnn import ops
from fnn.initializers import normal, xavier_uniform
from fnn.layers import (
    MLP,
    Attention,
    Dropout,
    Embedding,
    LayerNorm,
    Net,
    Network,
    Once,
    SinusoidalPositions,
    repeat,
)
from fnn.models.encoder import post_norm_block
from fnn.models.options import check_options


def transformer(
    vocabulary: int = 37000,
    features: int = 512,
    depth: int = 6,
    heads: int = 8,
    hidden: int = 2048,
    *,
    dropout: float = 0.1,
    remat: bool = False,
    unroll: int = 1,
) -> Network:
    """The encoder-decoder transformer, as given the paper's base model.

        x = √features E[source] + PE
        x = norm(x + attention(x)),  x = norm(x + MLP(x))                depth times; relu
        y = √features E[tokens] + PE
        y = norm(y + attention(y)),  y = norm(y + attention(y, x)),  y = norm(y + MLP(y))
        logits = y Eᵀ                                                    the embedding's weights

    The decoder's attention to itself is causal. A network of two sequences of tokens,

        logits = net(params, source, tokens)                  (positions, vocabulary)
        logits = net(params, source, tokens, mask)            mask: booleans, which of source are

    so that it learns from `tokens` the token after each: the target, with a token for the start in
    front. `fnn.models.generate(..., inputs=(source,))` translates; the source is encoded once, and
    the keys and values that the decoder makes of it are kept. In training it needs a key, for
    dropout (none of the attention's probabilities).

    Args:
        vocabulary: how many tokens there are, of both languages together.
        features, depth, heads, hidden: of the model; 1024, 6, 16, 4096 is the big one.
        dropout: its rate; 0.3 for the big one.
        remat: whether backward computes each block again instead of keeping its insides.
        unroll: how many blocks stand in one turn of the loop over them; see `repeat`.

    Returns:
        A Network with the parameters "embed.E", "encoder.attend.q.W", …, "decoder.attend.q.W",
        "decoder.cross.q.W", ….

    Raises:
        TypeError, ValueError: an option isn't of its kind.

    Vaswani et al., "Attention is all you need", arXiv:1706.03762.

    >>> import fnn
    >>> net = fnn.models.transformer(50, features=8, depth=2, heads=2, hidden=16)
    >>> source, tokens = jnp.arange(6), jnp.arange(4)
    >>> params = net.init(jax.random.key(0), source, tokens)
    >>> net(params, source, tokens).shape
    (4, 50)
    """
    counts = {"features": features, "depth": depth, "heads": heads, "hidden": hidden}
    check_options("transformer", vocabulary=vocabulary, **counts, dropout=dropout)
    mlp = MLP(hidden, activation=ops.relu, weight_init=xavier_uniform, output_init=xavier_uniform)
    encoder = Network(
        post_norm_block,
        {
            "attend": Attention(heads),
            "norm1": LayerNorm(),
            "mlp": mlp,
            "norm2": LayerNorm(),
            "dropout": Dropout(dropout),
        },
    )
    decoder = Network(
        _decoder_block,
        {
            "attend": Attention(heads, causal=True),
            "norm1": LayerNorm(),
            "cross": Attention(heads),
            "norm2": LayerNorm(),
            "mlp": mlp,
            "norm3": LayerNorm(),
            "dropout": Dropout(dropout),
        },
    )
    table = functools.partial(normal, stddev=1 / math.sqrt(features))
    parts = {
        "embed": Embedding(vocabulary, features, init_table=table),
        "position": SinusoidalPositions(),
        "dropout": Dropout(dropout),
        "encoder": Once(repeat(encoder, depth, remat=remat, unroll=unroll)),
        "decoder": repeat(decoder, depth, remat=remat, unroll=unroll),
    }
    return Network(_transformer, parts)


def _transformer(net: Net, source: Any, tokens: Any, mask: Any = None) -> Any:
    x = net.embed(source)
    scale = math.sqrt(x.shape[1])
    # Not by the part, whose cache counts the decoder's positions.
    positions = ops.sinusoidal_positions(jnp.arange(x.shape[0]), x.shape[1])
    x = net.encoder(net.dropout(scale * x + positions.astype(x.dtype)), mask)
    y = net.dropout(net.position(scale * net.embed(tokens)))
    y = net.decoder(y, x, mask)
    return y @ net.params["embed"]["E"].T


def _decoder_block(net: Net, y: Any, x: Any, mask: Any = None) -> Any:
    y = net.norm1(y + net.dropout(net.attend(y)))
    y = net.norm2(y + net.dropout(net.cross(y, x, mask)))
    return net.norm3(y + net.dropout(net.mlp(y)))
