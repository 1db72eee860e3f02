"""A bad step's error names where its inf or nan was born; `fit` goes back and goes on."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn import layers, ops
from fnn.train import NonFiniteError, fit, train_step

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 3)) + 3.0, RNG.normal(size=24)
START = {"W": jnp.ones(3)}


def unit(x):
    return x / jnp.sqrt(jnp.sum(x * x))  # divided


def unsafe(params, example):
    """The nan of a row of zeros is born in `unit`, if there is one."""
    x, y = example
    return (params["W"] @ jax.vmap(unit)(x[None])[0] - y) ** 2


def spoiled(*rows):
    x = X.copy()
    x[list(rows)] = 0.0
    return x


OPTIONS = {"epochs": 2, "batch_size": 8, "shuffle": False, "progress": False}


def test_fit_names_operation_line_and_example():
    with pytest.raises(NonFiniteError, match="step 1: the loss and the gradient") as error:
        fit(unsafe, START, (spoiled(11), Y), optax.sgd(0.01), **OPTIONS)
    birth = error.value.birth
    assert (birth.kind, birth.operation, birth.place, birth.example) == ("nan", "div", "forward", 3)
    assert birth.output == "the loss" and birth.example_of == ("batch",)
    assert "x / jnp.sqrt" in birth.code and "(unit)" in birth.source
    text = str(error.value)
    assert f"A nan was born by div, in the forward pass, at {birth.source}: div(0, 0)" in text
    assert str(pickle.loads(pickle.dumps(error.value)).birth) == str(birth)
    assert error.value.result.state.step == 1


def test_a_step_that_stands_by_itself():
    step = train_step(unsafe, optax.sgd(0.01))
    state, _ = step(step.init(START), (X, Y))
    state, _ = step(state, (spoiled(5), Y))
    with pytest.raises(NonFiniteError, match="born by div") as error:
        step.finish(state)
    assert error.value.birth.example == 5
    # For the next 32 steps the error comes from the call itself, and the batch is at hand.
    with pytest.raises(NonFiniteError, match="born by div") as error:
        step(state, (spoiled(7), Y))
    assert error.value.birth.example == 7
    # A good step after a bad one: the state is another one.
    quick = train_step(unsafe, optax.sgd(0.01))
    state, _ = quick(quick.init(START), (spoiled(5), Y))
    with pytest.raises(NonFiniteError) as error:
        for _ in range(3):
            state, _ = quick(state, (X, Y))
        quick.finish(state)
    assert error.value.birth is None or error.value.birth.example == 5


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"accumulate": 2}, marks=pytest.mark.exhaustive)],
    ids=["whole", "in parts"],
)
def test_gradients_and_parts_and_accumulation(options):
    @layers.network(body=layers.Linear(2), root=lambda x: jnp.where(x > 0, jnp.sqrt(x), 0.0))
    def net(net, x):
        return jnp.sum(net.root(net.body(x) * 0.0))

    params = net.init(jax.random.key(0), X[0])
    loss = fnn.supervised(net, ops.squared_error)
    with pytest.raises(NonFiniteError) as error:
        fit(loss, params, (X, Y + 1.0), optax.sgd(0.1), **OPTIONS, **options)
    birth = error.value.birth
    assert (birth.place, birth.operation, birth.kind) == ("0 * inf", "sqrt", "nan")
    assert birth.part == "root" and birth.output.startswith("the gradient of params['body']")


def test_an_update_is_looked_at_too():
    schedule = lambda count: jnp.log(1.0 - count)  # of 1 - 1
    with pytest.raises(NonFiniteError, match="the update of params") as error:
        fit(unsafe, START, (X, Y), optax.sgd(schedule), **OPTIONS)
    birth = error.value.birth
    assert birth is not None and birth.output == "the update of params['W']"


def test_so_is_what_the_optimiser_keeps():
    """It holds inf from the start, too, which isn't to blame."""
    start = {"best": jnp.full(3, jnp.inf), "moment": {"W": jnp.full(3, 1e100)}}

    def update(gradient, state, params=None):
        moment = jax.tree.map(jnp.square, state["moment"])
        return gradient, state | {"moment": moment}

    optimizer = optax.GradientTransformation(lambda params: start, update)
    with pytest.raises(NonFiniteError, match="step 1: the update of .*opt_state") as error:
        fit(unsafe, START, (X, Y), optax.chain(optimizer, optax.sgd(0.001)), **OPTIONS)
    birth = error.value.birth
    assert birth is not None and (birth.kind, birth.operation) == ("inf", "square")
    assert birth.output == "the update of opt_state[0]['moment']['W']"


def test_the_search_must_not_hide_the_error(monkeypatch):
    monkeypatch.setattr("fnn.train.replay.free_memory", lambda: 16)
    with pytest.raises(NonFiniteError, match="MemoryError: to look for the birth would") as error:
        fit(unsafe, START, (spoiled(11), Y), optax.sgd(0.01), **OPTIONS)
    assert error.value.birth is None and error.value.names[0] == "loss"


# --------------------------------------------------------------------------------- rolling back


def by_hand(batches):
    transform = optax.adam(0.1)
    params, opt_state = START, transform.init(START)
    for rows in batches:
        mean = lambda p, rows=rows: jnp.mean(
            jax.vmap(unsafe, (None, 0))(p, (jnp.asarray(X[rows]), jnp.asarray(Y[rows])))
        )
        updates, opt_state = transform.update(jax.grad(mean)(params), opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_roll_back_goes_back_to_the_last_kept_state_and_on_behind_the_batch():
    a, b, c = (slice(8 * i, 8 * i + 8) for i in range(3))
    options = OPTIONS | {"nonfinite": "roll_back"}
    result = fit(unsafe, START, (spoiled(11), Y), optax.adam(0.1), **options)
    assert result.history["rolled_back"] == [1, 1] and result.history["skipped"] == [1, 1]
    assert np.isfinite(result.history["loss"]).all()
    # Batch b is bad: a is undone, c made from the start; then c's state is kept, and so again.
    wanted = by_hand([c, c])
    np.testing.assert_allclose(result.params["W"], wanted["W"], rtol=1e-6)
    assert result.state.step == 2 and list(result.state.position) == [2, 0, 6]
    # Nothing is bad: as with "raise".
    same = fit(unsafe, START, (X, Y), optax.adam(0.1), **options)
    plain = fit(unsafe, START, (X, Y), optax.adam(0.1), **OPTIONS)
    np.testing.assert_array_equal(same.params["W"], plain.params["W"])
    np.testing.assert_allclose(plain.params["W"], by_hand([a, b, c] * 2)["W"], rtol=1e-6)
    assert same.history["rolled_back"] == [0, 0]


def test_roll_back_gives_up_at_last():
    always = optax.sgd(np.nan)
    options = OPTIONS | {"nonfinite": "roll_back", "batch_size": 4}
    with pytest.raises(NonFiniteError, match="step 0: the update") as error:
        fit(unsafe, START, (X, Y), always, **options)
    assert any("gone back to the last kept state 3 times" in n for n in error.value.__notes__)
    step = train_step(unsafe, optax.sgd(0.01), nonfinite="roll_back")
    state, metrics = step(step.init(START), (spoiled(5), Y))
    assert metrics["skipped"] == 1
    with pytest.raises(NonFiniteError):
        step.finish(state)
