"""BERT's encoder: what each token means in the whole text, both what precedes and what follows."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from fnn import ops
from fnn.initializers import truncated_normal
from fnn.layers import (
    MLP,
    Attention,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Net,
    Network,
    PositionEmbedding,
    repeat,
)
from fnn.models.options import check_options


def bert(
    vocabulary: int = 30522,
    length: int = 512,
    features: int = 768,
    depth: int = 12,
    heads: int = 12,
    hidden: int = 3072,
    *,
    segments: int = 2,
    dropout: float = 0.1,
    remat: bool = False,
    unroll: int = 1,
) -> Network:
    """BERT, as given BERT-base, of 109,482,240 parameters with its pooler.

        x = norm(E[tokens] + P + S[segments])
        x = norm(x + attention(x)),  x = norm(x + MLP(x))       depth times; gelu
        pooled = tanh(W x₀ + b)

    A network of one sequence of tokens `(positions,)`, and of

        segments     integers `(positions,)`: which sentence a token belongs to; 0 if None
        mask         booleans `(positions,)`: which tokens there are; all if None

    that returns `(x, pooled)`: `(positions, features)`, and `(features,)` of the first position
    (where a classifier begins). In training it needs a key, for dropout (none of the attention's
    probabilities).

    Args:
        vocabulary: how many tokens there are.
        length: of the longest sequence.
        features, depth, heads, hidden: of the model; 1024, 24, 16, 4096 is BERT-large.
        segments: how many kinds of segments there are.
        dropout: its rate.
        remat: whether backward computes each block again instead of keeping its insides.
        unroll: how many blocks stand in one turn of the loop over them; see `repeat`.

    Returns:
        A Network with the parameters "embed.E", "position.P", "segment.E", "norm",
        "blocks.attend.q.W", …, "blocks.norm1", "blocks.mlp.hidden.W", …, "blocks.norm2", "pooler".

    Raises:
        TypeError, ValueError: an option isn't of its kind.

    Devlin et al., "BERT", arXiv:1810.04805.

    >>> import fnn
    >>> net = fnn.models.bert(50, 16, features=8, depth=2, heads=2, hidden=16)
    >>> tokens, mask = jnp.arange(5), jnp.arange(5) < 3
    >>> params = net.init(jax.random.key(0), tokens)
    >>> x, pooled = net(params, tokens, None, mask)
    >>> x.shape, pooled.shape
    ((5, 8), (8,))
    """
    counts = {"features": features, "depth": depth, "heads": heads, "hidden": hidden}
    sizes = {"vocabulary": vocabulary, "length": length, "segments": segments}
    check_options("bert", **sizes, **counts, dropout=dropout)
    weights = functools.partial(truncated_normal, stddev=0.02)
    norm = LayerNorm(1e-12)
    block = Network(
        post_norm_block,
        {
            "attend": Attention(heads, weight_init=weights),
            "norm1": norm,
            "mlp": MLP(
                hidden,
                activation=functools.partial(ops.gelu, approximate=False),
                weight_init=weights,
                output_init=weights,
            ),
            "norm2": norm,
            "dropout": Dropout(dropout),
        },
    )
    parts = {
        "embed": Embedding(vocabulary, features, init_table=weights),
        "position": PositionEmbedding(length, init_table=weights),
        "segment": Embedding(segments, features, init_table=weights),
        "norm": norm,
        "dropout": Dropout(dropout),
        "blocks": repeat(block, depth, remat=remat, unroll=unroll),
        "pooler": Linear(features, weight_init=weights),
    }
    return Network(_bert, parts)


def _bert(net: Net, tokens: Any, segments: Any = None, mask: Any = None) -> Any:
    segments = jnp.zeros_like(tokens) if segments is None else segments
    x = net.position(net.embed(tokens)) + net.segment(segments)
    x = net.blocks(net.dropout(net.norm(x)), mask)
    return x, jnp.tanh(net.pooler(x[0]))


def post_norm_block(net: Net, x: Any, mask: Any = None) -> Any:
    """An encoder's block of the original transformer."""
    x = net.norm1(x + net.dropout(net.attend(x, None, mask)))
    return net.norm2(x + net.dropout(net.mlp(x)))
