"""The recurrent language models: against their formulas, step by step, in training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import exhaustive, sweep

import fnn
from fnn import models, ops
from fnn.layers import LRU, LSTM, LayerNorm, summary, training

KEY = jax.random.key(0)
TOKENS = jnp.asarray([3, 1, 4, 1, 5, 2, 6])
LSTMS = models.lstm_language_model(8, 6)
SPACES = models.state_space_language_model(8, 6, 2, states=5)
MODELS = {"lstm": LSTMS, "state space": SPACES}


def layer_of(params, i):
    return jax.tree.map(lambda a: a[i], params)


def lstm_by_hand(params, tokens):
    h = params["embed"]["E"][tokens]
    for i in range(2):
        h = LSTM(6)(layer_of(params["blocks"]["lstm"], i), h)
    return h @ params["output"]["W"].T + params["output"]["b"]


def state_space_by_hand(params, tokens):
    x = params["embed"]["E"][tokens]
    for i in range(2):
        own = layer_of(params["blocks"], i)
        h = jax.nn.gelu(LRU(5)(own["recurrence"], LayerNorm()(own["norm"], x)))
        a, b = jnp.split(h @ own["gate"]["W"].T + own["gate"]["b"], 2, axis=-1)
        x = x + a * jax.nn.sigmoid(b)
    return LayerNorm()(params["norm"], x) @ params["output"]["W"].T + params["output"]["b"]


BY_HAND = {"lstm": lstm_by_hand, "state space": state_space_by_hand}


@exhaustive
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_its_formula_whole_and_in_pieces(name):
    net = MODELS[name]
    params = net.init(KEY, TOKENS)

    @jax.jit
    def both():
        cache, pieces = net.init_cache(7, TOKENS), []
        for piece in (TOKENS[:1], TOKENS[1:3], TOKENS[3:]):
            y, cache = net.apply(params, cache, piece)
            pieces.append(y)
        trained = net(params, TOKENS, mode=training(KEY))
        whole = net(params, TOKENS)
        return whole, jnp.concatenate(pieces), BY_HAND[name](params, TOKENS), trained

    y, pieces, wanted, trained = both()
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(pieces, wanted, rtol=1e-6, atol=1e-9)
    assert not np.allclose(trained, y)


@exhaustive
def test_options():
    tied = models.lstm_language_model(8, 6, 1, tied=True)
    params = tied.init(KEY, TOKENS)
    assert list(params) == ["embed", "blocks"]
    h = LSTM(6)(layer_of(params["blocks"]["lstm"], 0), params["embed"]["E"][TOKENS])
    np.testing.assert_allclose(tied(params, TOKENS), h @ params["embed"]["E"].T, rtol=1e-6)
    params = LSTMS.init(KEY, TOKENS)
    masked = LSTMS(params, TOKENS.at[5:].set(0), 5)
    np.testing.assert_allclose(masked[:5], LSTMS(params, TOKENS)[:5], rtol=1e-6)
    assert all(np.abs(p).max() <= 0.05 for p in jax.tree.leaves(params))
    again = models.lstm_language_model(8, 6, remat=True)
    np.testing.assert_allclose(again(params, TOKENS), LSTMS(params, TOKENS), rtol=1e-6)
    with pytest.raises(TypeError, match="lstm_language_model: tied must be True or False"):
        models.lstm_language_model(tied=1)
    for wrong in ({"bound": -1.0}, {"layers": 0}, {"dropout": 1.5}):
        with pytest.raises(ValueError, match=f"lstm_language_model: {next(iter(wrong))} must be"):
            models.lstm_language_model(**wrong)
    with pytest.raises(ValueError, match="state_space_language_model: layers must be"):
        models.state_space_language_model(8, 6, 0)


def test_the_papers_sizes():
    """The medium model: 20 million parameters."""
    tokens = jax.ShapeDtypeStruct((35,), jnp.int32)
    shapes = jax.eval_shape(models.lstm_language_model().init, KEY, tokens)
    count = sum(p.size for p in jax.tree.leaves(shapes))
    lstms = 2 * (4 * 650 * (650 + 650) + 4 * 650)
    assert count == 2 * 10_000 * 650 + 10_000 + lstms
    assert "lstm_language_model" in repr(models.lstm_language_model())


@exhaustive
@pytest.mark.parametrize("name", sweep(MODELS, ["lstm"]))
def test_training(name):
    """A text that repeats itself is learned."""
    net = {
        "lstm": models.lstm_language_model(4, 16, 1, dropout=0.0, bound=0.3),
        "state space": models.state_space_language_model(4, 16, 1, dropout=0.1),
    }[name]
    text = jnp.asarray([[0, 1, 2, 0, 3, 1, 2, 0, 3, 1, 2, 0, 3, 1]] * 4)
    loss = fnn.supervised(net, lambda z, y: jnp.mean(ops.softmax_cross_entropy(z, y)))
    params = net.init(KEY, text[0, :-1])
    data = text[:, :-1], text[:, 1:]
    options = {"epochs": 60, "batch_size": 4, "key": KEY, "progress": False}
    result = fnn.fit(loss, params, data, optax.adam(0.03), **options)
    assert result.history["loss"][-1] < 0.3


@exhaustive
def test_summaries():
    for net in (LSTMS, models.state_space_language_model(8, 6, 2, remat=True)):
        table = summary(net, TOKENS)
        assert table.parameters == sum(p.size for p in jax.tree.leaves(net.init(KEY, TOKENS)))
        assert "repeat" in str(table) and table.kept > 0
