"""Training on layouts of eight devices: one device's numbers, its share, and what is sent."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled_programs
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive, sweep

import fnn
from fnn import ops, sharding
from fnn.layers import BatchNorm, Dropout, Linear, chain
from fnn.models import gpt2
from fnn.sharding import collectives

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(40, 8)), RNG.integers(8, size=40)
NET = chain(hidden=Linear(64), act=ops.relu, drop=Dropout(0.2), out=Linear(8))
LOSS = fnn.supervised(NET, ops.softmax_cross_entropy)
PARAMS = NET.init(KEY, X[0])
DATA, GRID = jax.make_mesh((8,), ("data",)), jax.make_mesh((4, 2), ("data", "model"))
RULES = {"hidden.W": P("model", None), "hidden.b": P("model"), "out.W": P(None, "model")}
LAYOUTS = {
    "data": sharding.data_parallel(DATA),
    "full": sharding.fully_sharded(DATA),
    "tensor": sharding.tensor_parallel(GRID, RULES),
    "both": sharding.tensor_parallel(GRID, RULES, shard="data"),
}


def train(layout, start=PARAMS, epochs=2, loss=LOSS, **options):
    """A last batch of 8 of 40 examples; of 12, which can't be dealt out, if asked for."""
    options = {"batch_size": 16, "key": KEY, "progress": False, "layout": layout} | options
    return fnn.fit(loss, start, (X, Y), optax.adam(0.05), epochs=epochs, **options)


def close(ours, wanted):
    chex.assert_trees_all_close(jax.device_get(ours), jax.device_get(wanted), rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def alone():
    return train(None, validation=(X, Y))


@pytest.mark.parametrize("name", sweep(LAYOUTS, ["full"]))
def test_fit_gives_what_one_device_gives(name, alone):
    found = train(LAYOUTS[name], validation=(X, Y))
    close(found.params, alone.params)
    close(found.steps, alone.steps)
    close(found.history["validation_loss"], alone.history["validation_loss"])


@exhaustive
@pytest.mark.parametrize("name", sweep(LAYOUTS, ["both"]))
def test_the_state_stays_where_it_was_put(name):
    """After a step, in one compiled program; a device holds the bytes that the layout says."""
    layout = LAYOUTS[name]
    step = fnn.train_step(LOSS, optax.adam(0.05), layout=layout)
    state = step.init(PARAMS)
    wanted = layout.of_state(state)
    with compiled_programs() as programs:
        for i in range(3):
            state, _ = step(state, (X, Y), jax.random.key(i))
        step.finish(state)
    at = jax.tree.map(lambda x: x.sharding, state)
    assert jax.tree.leaves(at) == jax.tree.leaves(wanted)
    assert programs.count("jit(step)") == 1
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.params))
    total = sum(x.nbytes for x in jax.tree.leaves(PARAMS))
    assert held == layout.bytes_per_device(state.params)
    if name == "full":
        assert held == total // 8
        moments = state.opt_state[0].mu, state.opt_state[0].nu
        assert layout.bytes_per_device(state) < 3 * total // 8 + 100
        held = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(moments)]
        assert sum(held) == 2 * total // 8


def program(layout, loss=LOSS, params=PARAMS, batch=(X, Y)):
    step = fnn.train_step(loss, optax.adam(0.05), layout=layout)
    key = layout.spread(KEY)
    state = step.init(params)
    return jax.jit(step, donate_argnums=0).lower(state, layout.place_batch(batch), key).compile()


def test_data_parallel_sends_the_gradient_once():
    sent = collectives(program(LAYOUTS["data"]))
    total = sum(x.nbytes for x in jax.tree.leaves(PARAMS))
    assert {(c.kind, c.devices) for c in sent} == {("all-reduce", 8)}
    assert total <= sum(c.size * c.times for c in sent) <= total + 100


def test_fully_sharded_gathers_and_reduces_each_parameter_once():
    """The CPU's compiler reduces the whole gradient and takes a share: it has no reduce-scatter."""
    compiled = program(LAYOUTS["full"])
    sent = dict.fromkeys(("all-gather", "all-reduce", "reduce-scatter"), 0)
    for c in collectives(compiled):
        sent[c.kind] += c.size * c.times
    total = sum(x.nbytes for x in jax.tree.leaves(PARAMS))
    assert sent["all-gather"] <= total + 100
    assert sent["all-reduce"] + 8 * sent["reduce-scatter"] <= total + 1000
    assert compiled.memory_analysis().alias_size_in_bytes < 3 * total / 8 + 200


@exhaustive
def test_a_state_goes_on_in_another_layout(alone):
    """And with a context mesh of explicit axes set, jax.make_mesh's default."""
    with jax.set_mesh(GRID):
        first = train(LAYOUTS["full"], epochs=1)
        found = train(LAYOUTS["both"], first.state, epochs=1)
        validation = fnn.evaluate(LOSS, found.params, (X, Y), layout=LAYOUTS["both"])
        step = fnn.train_step(LOSS, optax.sgd(0.0), layout=LAYOUTS["full"])
        options = {"epochs": 1, "shuffle": False, "progress": False, "key": KEY}
        by_name = fnn.fit(loss=step, params=found.params, data=(X, Y), **options)
    close(found.params, alone.params)
    close(by_name.params, alone.params)
    assert validation["loss"] == pytest.approx(alone.history["validation_loss"][-1], rel=1e-5)


@exhaustive
def test_batches_that_cannot_be_dealt_out_and_streams():
    batches = [(X[:16], Y[:16]), (X[16:28], Y[16:28])]
    run = lambda layout: fnn.fit(
        LOSS, PARAMS, batches, optax.sgd(0.1), epochs=1, key=KEY, progress=False, layout=layout
    )
    close(run(LAYOUTS["full"]).params, run(None).params)


@exhaustive
@pytest.mark.parametrize("options", [{"accumulate": 2}, {"ema": 0.9}, {"clip": 0.1}], ids=str)
def test_options_of_the_step(options):
    close(train(LAYOUTS["both"], **options).state, train(None, **options).state)


@exhaustive
def test_batch_statistics_are_those_of_the_whole_batch():
    net = chain(hidden=Linear(16), norm=BatchNorm(), out=Linear(8))
    loss, params = fnn.supervised(net, ops.softmax_cross_entropy), net.init(KEY, X[0])
    found, wanted = (train(layout, params, loss=loss) for layout in (LAYOUTS["full"], None))
    close(found.state.model_state, wanted.state.model_state)
    close(found.params, wanted.params)


GPT = gpt2(32, 8, features=16, depth=4, heads=4, dropout=0.1)
TOKENS = RNG.integers(32, size=(16, 9))
OF_GPT = {
    "data": sharding.data_parallel(DATA),
    "full": sharding.fully_sharded(DATA),
    "tensor": sharding.tensor_parallel(jax.make_mesh((2, 4), ("data", "model")), shard="data"),
    "sequence": sharding.sequence_parallel(jax.make_mesh((2, 4), ("data", "sequence"))),
    "stages": sharding.pipeline_parallel(
        jax.make_mesh((2, 4), ("data", "stage")), microbatches=4, shard="data"
    ),
}


def gpt_loss(params, tokens, mode):
    return jnp.mean(GPT(params, tokens[:-1], tokens[1:], mode=mode))


@exhaustive
@pytest.mark.parametrize("name", OF_GPT)
def test_a_transformer_in_every_layout(name):
    """With dropout, so that each example and each block must draw what they do on one device."""
    layout, key = OF_GPT[name], jax.random.key(1)
    params = layout.init(GPT.init, KEY, TOKENS[0, :-1])
    ours, plain = (
        fnn.fit(
            gpt_loss,
            params,
            TOKENS,
            optax.adam(0.01),
            epochs=2,
            batch_size=8,
            key=key,
            progress=False,
            layout=layout,
        )
        for params, layout in ((params, layout), (GPT.init(KEY, TOKENS[0, :-1]), None))
    )
    chex.assert_trees_all_close(ours.steps, plain.steps, rtol=1e-4)
    assert fnn.evaluate(gpt_loss, ours.params, TOKENS, layout=layout)["loss"] == pytest.approx(
        fnn.evaluate(gpt_loss, plain.params, TOKENS)["loss"], rel=1e-4
    )


@pytest.mark.parametrize(
    "loss, layout, message",
    [
        (LOSS, "full", "layout must be one of fnn.sharding's"),
        (
            lambda params, example: jnp.sum(params),
            OF_GPT["sequence"],
            "divides a sequence's positions, .*the loss must take one",
        ),
        (lambda params, example: jnp.sum(params), OF_GPT["stages"], "divides a network's blocks"),
    ],
)
def test_what_is_refused(loss, layout, message):
    with pytest.raises(TypeError, match=message):
        fnn.train_step(loss, optax.sgd(0.1), layout=layout)
