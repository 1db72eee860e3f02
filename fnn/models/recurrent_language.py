"""The LSTM language model: the next token's distribution, from the state of two LSTMs."""

from __future__ import annotations

import functools
from typing import Any

from fnn import arguments
from fnn.initializers import uniform
from fnn.layers import LSTM, Dropout, Embedding, Linear, Net, Network, network, repeat
from fnn.models.options import check_options


def lstm_language_model(
    vocabulary: int = 10_000,
    hidden: int = 650,
    layers: int = 2,
    *,
    dropout: float = 0.5,
    bound: float = 0.05,
    tied: bool = False,
    remat: bool = False,
) -> Network:
    """tokens → embedding → LSTM → … → LSTM → scores of the next token, at each position.

    By default the paper's medium model, for the Penn Treebank's 10,000 words; its large one is
    `lstm_language_model(10_000, 1500, dropout=0.65, bound=0.04)`. Dropout acts on what goes from
    layer to layer, the embedding and the last layer's output included, and not on what an LSTM
    carries from step to step.

    Tokens are integers `(steps,)`, and the scores `(steps, vocabulary)`; a second argument, a mask
    or the number of tokens, leaves padding out. For text as one long stream, which is trained and
    read in pieces, give the network a cache, `state = net.init_cache(steps, tokens)`: `net.apply`
    goes on from it, and step by step gives what it gives for the whole.

    Args:
        vocabulary: how many tokens there are.
        hidden: how many numbers an LSTM has, and an embedding.
        layers: how many LSTMs. Their weights are stacked: it takes no longer to compile for more.
        dropout: the rate.
        bound: all weights start from U(−bound, bound).
        tied: whether the scores are made with the embedding's table (Press, Wolf 2017), and not
            with a matrix of their own.
        remat: whether each LSTM keeps every √n-th of its n steps (see `LSTM`).

    Returns:
        A Network with the parameters `{"embed": {"E"}, "blocks": {"lstm": {"W", "U", "b"}},
        "output": {"W", "b"}}`, those of the blocks stacked; tied, without "output".

    Raises:
        TypeError, ValueError: an option isn't of its kind.

    Zaremba, Sutskever, Vinyals, "Recurrent neural network regularization", arXiv:1409.2329.

    >>> import fnn
    >>> net = fnn.models.lstm_language_model(50, 16)
    >>> tokens = jnp.zeros(7, jnp.int32)
    >>> params = net.init(jax.random.key(0), tokens)
    >>> net(params, tokens).shape
    (7, 50)
    """
    where = "lstm_language_model"
    check_options(where, vocabulary=vocabulary, hidden=hidden, layers=layers, dropout=dropout)
    arguments.number(where, "bound", bound, least=0)
    arguments.flag(where, "tied", tied)
    start = functools.partial(uniform, bound=bound)
    starts: dict[str, Any] = {"weight_init": start, "bias_init": start}
    lstm = LSTM(hidden, recurrent_init=start, forget_bias=0.0, remat=remat, **starts)
    block = network(lstm=lstm, drop=Dropout(dropout))(_block)
    parts = {
        "embed": Embedding(vocabulary, hidden, init_table=start),
        "drop": Dropout(dropout),
        "blocks": repeat(block, layers),
    }
    if tied:
        return network(**parts)(_tied_lstm_language_model)
    return network(**parts, output=Linear(vocabulary, **starts))(_lstm_language_model)


def _block(net: Net, x: Any, *mask: Any) -> Any:
    return net.drop(net.lstm(x, *mask))


def _lstm_language_model(net: Net, tokens: Any, *mask: Any) -> Any:
    return net.output(net.blocks(net.drop(net.embed(tokens)), *mask))


def _tied_lstm_language_model(net: Net, tokens: Any, *mask: Any) -> Any:
    return net.blocks(net.drop(net.embed(tokens)), *mask) @ net.params["embed"]["E"].T
