"""Language models: which token comes next? In the manner of GPT-2 and of Llama."""

from __future__ import annotations

import functools
import math
from typing import Any

from fnn import arguments, ops
from fnn.initializers import normal
from fnn.layers import (
    MLP,
    Attention,
    Dropout,
    Embedding,
    GatedMLP,
    LayerNorm,
    Linear,
    Net,
    Network,
    PositionEmbedding,
    RMSNorm,
    repeat,
)
from fnn.models.options import check_options


def gpt2(
    vocabulary: int = 50257,
    length: int = 1024,
    features: int = 768,
    depth: int = 12,
    heads: int = 12,
    *,
    dropout: float = 0.1,
    remat: bool = False,
    unroll: int = 1,
) -> Network:
    """GPT-2, as given the smallest one, of 124,439,808 parameters.

        x = E[tokens] + P
        x = x + attention(norm(x)),  x = x + MLP(norm(x))       depth times; causal; gelu
        logits = norm(x) Eᵀ                                     the embedding's weights again

    A network of one sequence of tokens `(positions,)`:

        logits = net(params, tokens)              (positions, vocabulary): of the token after each
        losses = net(params, tokens, targets)     (positions,): −log of each target's probability

    The second never holds all logits (`ops.linear_softmax_cross_entropy`), and is what to train
    with: `jnp.mean(net(params, text[:-1], text[1:], mode=mode))`. `fnn.models.generate` continues
    a text. In training it needs a key, for dropout (none of the attention's probabilities).

    Args:
        vocabulary: how many tokens there are.
        length: of the longest sequence.
        features, depth, heads: of the model; 1024, 24, 16 is GPT-2 medium, 1280, 36, 20 large,
            1600, 48, 25 XL.
        dropout: its rate.
        remat: whether backward computes each block again instead of keeping its insides.
        unroll: how many blocks stand in one turn of the loop over them; see `repeat`.

    Returns:
        A Network with the parameters "embed.E", "position.P", "blocks.norm1", "blocks.attend.q.W",
        …, "blocks.norm2", "blocks.mlp.hidden.W", …, "norm", made by
        `net.init(key, tokens)`. Those of the blocks are stacked.

    Raises:
        TypeError, ValueError: an option isn't of its kind.

    Radford et al., "Language models are unsupervised multitask learners", 2019; the gelu by tanh.

    >>> import fnn
    >>> net = fnn.models.gpt2(50, 16, features=8, depth=2, heads=2)
    >>> tokens = jnp.arange(5)
    >>> params = net.init(jax.random.key(0), tokens)
    >>> net(params, tokens).shape, net(params, tokens, tokens).shape
    ((5, 50), (5,))
    """
    counts = {"features": features, "depth": depth, "heads": heads}
    check_options("gpt2", vocabulary=vocabulary, length=length, **counts, dropout=dropout)
    weights = functools.partial(normal, stddev=0.02)
    # So many branches are added up (section 2.3).
    last = functools.partial(normal, stddev=0.02 / math.sqrt(2 * depth))
    block = Network(
        _pre_norm_block,
        {
            "norm1": LayerNorm(),
            "attend": Attention(heads, causal=True, weight_init=weights, out_init=last),
            "norm2": LayerNorm(),
            "mlp": MLP(4 * features, activation=ops.gelu, weight_init=weights, output_init=last),
            "dropout": Dropout(dropout),
        },
    )
    parts = {
        "embed": Embedding(vocabulary, features, init_table=weights),
        "position": PositionEmbedding(length, init_table=functools.partial(normal, stddev=0.01)),
        "dropout": Dropout(dropout),
        "blocks": repeat(block, depth, remat=remat, unroll=unroll),
        "norm": LayerNorm(),
    }
    return Network(_gpt2, parts)


def _gpt2(net: Net, tokens: Any, targets: Any = None) -> Any:
    x = net.dropout(net.position(net.embed(tokens)))
    x = net.norm(net.blocks(x))
    E = net.params["embed"]["E"]
    return x @ E.T if targets is None else ops.linear_softmax_cross_entropy(x, E, targets)


def _pre_norm_block(net: Net, x: Any) -> Any:
    x = x + net.dropout(net.attend(net.norm1(x)))
    return x + net.dropout(net.mlp(net.norm2(x)))


def llama(
    vocabulary: int = 32000,
    features: int = 4096,
    depth: int = 32,
    heads: int = 32,
    kv_heads: int | None = None,
    hidden: int = 11008,
    *,
    base: float = 10000.0,
    epsilon: float = 1e-5,
    window: int | None = None,
    remat: bool = False,
    unroll: int = 1,
) -> Network:
    """Llama, as given Llama 2 of 7 billion parameters (6,738,415,616).

        x = E[tokens]
        x = x + attention(norm(x)),  x = x + SwiGLU(norm(x))    depth times; causal, rotary
        logits = W norm(x)

    The norms are RMSNorm, and nothing has a bias. A network of one sequence of tokens, of any
    length; it is called as `gpt2` is.

    Args:
        vocabulary: how many tokens there are.
        features, depth, heads, hidden: of the model; hidden units of the gated MLP.
        kv_heads: how many heads keys and values have (grouped-query attention), as in Llama 2 70B
            (8, with 8192, 80, 64 and 28672) and Llama 3 8B (8, with 128256, 4096, 32, 32, 14336).
        base: of the rotary positions; 500000 in Llama 3.
        epsilon: of the norms.
        window: if given, a position sees only the last so many, as in Mistral 7B.
        remat: whether backward computes each block again instead of keeping its insides.
        unroll: how many blocks stand in one turn of the loop over them; see `repeat`.

    Returns:
        A Network with the parameters "embed.E", "blocks.norm1.scale", "blocks.attend.q.W", …,
        "blocks.norm2.scale", "blocks.mlp.gate.W", "blocks.mlp.up.W", "blocks.mlp.down.W",
        "norm.scale" and "output.W", made by `net.init(key, tokens)`.

    Raises:
        TypeError, ValueError: an option isn't of its kind.

    Touvron et al., "Llama 2", arXiv:2307.09288; Jiang et al., "Mistral 7B", arXiv:2310.06825.

    >>> import fnn
    >>> net = fnn.models.llama()
    >>> tokens = jax.ShapeDtypeStruct((1,), jnp.int32)
    >>> params = jax.eval_shape(net.init, jax.random.key(0), tokens)
    >>> sum(x.size for x in jax.tree.leaves(params))
    6738415616
    """
    counts = {"features": features, "depth": depth, "heads": heads, "hidden": hidden}
    check_options("llama", vocabulary=vocabulary, **counts)
    arguments.number("llama", "base", base, above=0)
    weights = functools.partial(normal, stddev=0.02)
    norm = RMSNorm(epsilon)
    block = Network(
        _llama_block,
        {
            "norm1": norm,
            "attend": Attention(
                heads,
                kv_heads=kv_heads,
                causal=True,
                window=window,
                rotary=base,
                use_bias=False,
                weight_init=weights,
            ),
            "norm2": norm,
            "mlp": GatedMLP(hidden, weight_init=weights),
        },
    )
    parts = {
        "embed": Embedding(vocabulary, features, init_table=weights),
        "blocks": repeat(block, depth, remat=remat, unroll=unroll),
        "norm": norm,
        "output": Linear(vocabulary, use_bias=False, weight_init=weights),
    }
    return Network(_llama, parts)


def _llama(net: Net, tokens: Any, targets: Any = None) -> Any:
    x = net.norm(net.blocks(net.embed(tokens)))
    if targets is None:
        return net.output(x)
    return ops.linear_softmax_cross_entropy(x, net.params["output"]["W"], targets)


def _llama_block(net: Net, x: Any) -> Any:
    x = x + net.attend(net.norm1(x))
    return x + net.mlp(net.norm2(x))
