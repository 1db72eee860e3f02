"""The state-space language model: linear recurrences, with gates between them."""

from __future__ import annotations

from typing import Any

from fnn import ops
from fnn.initializers import lecun_normal
from fnn.layers import LRU, Dropout, Embedding, LayerNorm, Linear, Net, Network, network, repeat
from fnn.models.options import check_options


def state_space_language_model(
    vocabulary: int,
    features: int = 512,
    layers: int = 6,
    *,
    states: int | None = None,
    dropout: float = 0.1,
    least: float = 0.9,
    most: float = 0.999,
    remat: bool | None = None,
    unroll: int = 1,
) -> Network:
    """tokens → embedding → blocks → norm → scores of the next token, at each position.

    A block is that of the LRU's paper (figure 1): with x the stream,

        x ← x + dropout(glu(W gelu(LRU(norm(x)))))

    where glu(a, b) = a ∘ σ(b) of the two halves of W's output. All that goes from step to step is
    linear; the rest acts at each position by itself. The norm is over the features (the paper's is
    a batch norm).

    Tokens are integers `(steps,)`, and the scores `(steps, vocabulary)`. With a cache, of
    `net.init_cache(steps, tokens)`, `net.apply` goes on from the states where it stopped; a step
    costs the same however long the text before it is.

    Args:
        vocabulary: how many tokens there are.
        features: the width of the stream.
        layers: how many blocks. Their weights are stacked: it takes no longer to compile for more.
        states: how many complex numbers the state of each LRU has; three quarters of the features
            unless given.
        dropout: the rate.
        least, most: between which |λ| starts in each LRU.
        remat: whether the backward pass computes a block's insides again (see `repeat`).
        unroll: how many blocks stand in one turn of the loop over them (see `repeat`).

    Returns:
        A Network with the parameters `{"embed": {"E"}, "blocks": {"norm", "recurrence", "gate"},
        "norm": {"scale", "bias"}, "output": {"W", "b"}}`, those of the blocks stacked.

    Raises:
        TypeError, ValueError: an option isn't of its kind.

    Orvieto et al., "Resurrecting recurrent neural networks for long sequences", ICML 2023; Gu,
    Goel, Ré, "Efficiently modeling long sequences with structured state spaces", ICLR 2022 (S4,
    whose blocks these are).

    >>> import fnn
    >>> net = fnn.models.state_space_language_model(50, 16, 2)
    >>> tokens = jnp.zeros(7, jnp.int32)
    >>> params = net.init(jax.random.key(0), tokens)
    >>> net(params, tokens).shape
    (7, 50)
    """
    counts = {"vocabulary": vocabulary, "features": features, "layers": layers}
    check_options("state_space_language_model", **counts, dropout=dropout)
    embed = Embedding(vocabulary, features)
    states = max(3 * features // 4, 1) if states is None else states
    block = network(
        norm=LayerNorm(),
        recurrence=LRU(states, least=least, most=most),
        gate=Linear(2 * features, weight_init=lecun_normal),
        drop=Dropout(dropout),
    )(_block)
    return network(
        embed=embed,
        blocks=repeat(block, layers, remat=remat, unroll=unroll),
        norm=LayerNorm(),
        output=Linear(vocabulary, weight_init=lecun_normal),
    )(_state_space_language_model)


def _block(net: Net, x: Any) -> Any:
    h = ops.gelu(net.recurrence(net.norm(x)))
    return x + net.drop(ops.glu(net.gate(h)))


def _state_space_language_model(net: Net, tokens: Any) -> Any:
    return net.output(net.norm(net.blocks(net.embed(tokens))))
