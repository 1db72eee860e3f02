"""Streams that don't keep what they promise, names of metrics, losses that ignore parameters."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn import evaluate, train_step

KEY = jax.random.key(0)
START = {"w": jnp.ones(2)}
SGD = optax.sgd(0.1)
BATCH = (np.ones((4, 2)), np.zeros(4))


def squares(params, example):
    x, y = example
    return (params["w"] @ x - y) ** 2


def fit(data, epochs=1, loss=squares, params=START, **options):
    return fnn.fit(loss, params, data, SGD, epochs=epochs, **{"progress": False, **options})


def short(count):
    return lambda: iter([BATCH] * count)


# ---------------------------------------------------------------------------- numbers of batches


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([BATCH] * 3, "data is a list of 3 batches, but steps_per_epoch is 5"),
        (
            [BATCH] * 7,
            "list of 7 batches, but steps_per_epoch is 5: the others would never be seen",
        ),
        (short(3), "data gave 3 batches for an epoch, but steps_per_epoch is 5"),
        (iter([BATCH] * 3), "gave 3 batches .* is 5: the iterator is used up"),
        (iter([BATCH] * 8), "gave 3 batches .* is 5: the iterator is used up"),
    ],
)
def test_fewer_batches_than_were_promised(data, message):
    with pytest.raises(ValueError, match=message):
        fit(data, epochs=2, steps_per_epoch=5)


class OfUnknownLength:
    """A `tf.data.Dataset` made by a generator is such, and a torch `DataLoader` of an
    `IterableDataset`: they have a `__len__`, which raises."""

    def __iter__(self):
        return iter([BATCH] * 3)

    def __len__(self):
        raise TypeError("The dataset length is unknown.")


def test_a_length_that_is_not_known():
    result = fit(OfUnknownLength(), epochs=2, validation=OfUnknownLength())
    chex.assert_trees_all_equal(result.params, fit([BATCH] * 3, epochs=2).params)
    assert len(result.steps["loss"]) == 6 and len(result.history["validation_loss"]) == 2


def test_the_error_carries_what_was_trained():
    for data, steps in ((short(3), 3), (iter([BATCH] * 8), 8)):
        with pytest.raises(ValueError, match="gave 3 batches") as error:
            fit(data, epochs=2, steps_per_epoch=5)
        result = error.value.result
        assert result.state.step == steps and len(result.steps["loss"]) == steps
        assert len(result.history.get("loss", [])) == steps // 5


def test_as_many_as_were_promised():
    assert len(fit(iter([BATCH] * 6), epochs=2, steps_per_epoch=3).steps["loss"]) == 6
    assert len(fit([BATCH] * 3, epochs=2, steps_per_epoch=3).steps["loss"]) == 6
    assert len(fit(short(5), epochs=2, steps_per_epoch=3).steps["loss"]) == 6


def test_a_length_is_for_the_display_only():
    class Longer:
        def __len__(self):
            return 2

        def __iter__(self):
            return iter([BATCH] * 3)

    assert len(fit(Longer()).steps["loss"]) == 3


def test_what_never_ends():
    with pytest.raises(ValueError, match=r"never ends \(itertools.cycle\): pass steps_per_epoch"):
        fit(itertools.cycle([BATCH]))
    cut = r"never ends \(itertools.cycle\): cut it, itertools.islice\(data, n\)"
    with pytest.raises(ValueError, match=cut):
        evaluate(squares, START, itertools.cycle([BATCH]))
    with pytest.raises(ValueError, match=cut):
        fnn.find_learning_rate(squares, START, itertools.cycle([BATCH]))
    used_up = "validation is an iterator .*a function that makes a new iterator for each epoch.$"
    with pytest.raises(ValueError, match=used_up):
        fit([BATCH], validation=iter([BATCH]), epochs=2)
    with pytest.raises(ValueError, match="data is an iterator .* each epoch, or steps_per_epoch.$"):
        fit(iter([BATCH]), epochs=2)


# ------------------------------------------------------------------------------ kinds of batches


@pytest.mark.parametrize(
    "odd",
    [
        {"x": BATCH[0], "y": BATCH[1]},
        (*BATCH, BATCH[1]),
        (BATCH[0],),
        (BATCH[0], BATCH[1][:, None]),
        list(BATCH),
    ],
)
def test_batches_that_are_not_built_alike(odd):
    def loss(params, example):  # which would take any of them
        return jnp.sum(params["w"]) * jnp.sum(jax.tree.leaves(example)[0])

    for run in (
        lambda: fit([BATCH, BATCH, odd], loss=loss),
        lambda: evaluate(loss, START, [BATCH, BATCH, odd]),
        lambda: fit([BATCH], loss=loss, validation=[BATCH, BATCH, odd]),
    ):
        with pytest.raises(ValueError, match=r"aren't all built alike: number 3.*the first was"):
            run()


def test_sizes_may_change():
    longer = (np.ones((2, 5)), np.zeros(2))

    def loss(params, example):
        x, y = example
        return (jnp.sum(x) * params["w"][0] - y) ** 2

    assert len(fit([BATCH, longer], loss=loss).steps["loss"]) == 2


def test_a_function_of_a_key_wants_one():
    def data(key):
        return [BATCH]

    with pytest.raises(TypeError, match=r"takes a key, data\(key\): pass key="):
        fit(data)
    with pytest.raises(TypeError, match=r"validation is a function that takes a key"):
        fit([BATCH], validation=data)
    with pytest.raises(TypeError, match=r"takes a key"):
        evaluate(squares, START, data)
    assert evaluate(squares, START, data, key=KEY) == {"loss": 4.0}
    assert fit([BATCH], validation=data, key=KEY).history["validation_loss"]
    assert evaluate(squares, START, lambda key=None: [BATCH]) == {"loss": 4.0}


# ------------------------------------------------------------------------------ names of metrics


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (
            lambda x: {"long": 1.0} if len(x) > 2 else {"short": 1.0},
            "other metrics.*'short'.*'long'",
        ),
        (lambda x: {"m": jnp.ones(len(x))}, r"'m' changes its shape.*\(2,\), \(5,\)"),
    ],
)
def test_metrics_that_change_from_batch_to_batch(metrics, message):
    def loss(params, example):
        x, y = example
        return jnp.sum(params["w"]) * jnp.sum(x), metrics(x)

    batches = [BATCH, (np.ones((2, 5)), np.zeros(2))]
    for run in (lambda: fit(batches, loss=loss), lambda: evaluate(loss, START, batches)):
        with pytest.raises(ValueError, match=message):
            run()


@pytest.mark.parametrize(
    "name",
    ["loss", "grad_norm", "seconds", "learning_rate", "validation_loss", "validation_accuracy"],
)
def test_names_that_training_uses_itself(name):
    def loss(params, example):
        return squares(params, example), {name: 0.0}

    step = train_step(loss, SGD)
    for run in (
        lambda: fit(BATCH, loss=loss, shuffle=False),
        lambda: fit([BATCH], validation=BATCH, validation_loss=loss),
        lambda: step(step.init(START), BATCH),
        lambda: evaluate(loss, START, BATCH),
    ):
        with pytest.raises(ValueError, match=f"metric '{name}', a name that training itself uses"):
            run()


def test_names_are_strings():
    with pytest.raises(TypeError, match="a metric whose name is 3"):
        fit([BATCH], loss=lambda p, e: (squares(p, e), {3: 0.0}))


# ------------------------------------------------------------------- losses without a gradient


LOSSES = {
    "constant": lambda p, e: 1.0,
    "other parameters": lambda p, e: squares(START, e),
    "stopped": lambda p, e: squares(jax.lax.stop_gradient(p), e),
    "accuracy": lambda p, e: (p["w"] @ e[0] > e[1]).astype(float),
    "argmax": lambda p, e: jnp.argmax(p["w"] * e[0]) - e[1],
    "rounded": lambda p, e: jnp.round(p["w"] @ e[0]),
    "metrics only": lambda p, e: (e[1], {"m": p["w"] @ e[0]}),
    "jitted": lambda p, e: jax.jit(lambda p, e: jnp.sum(e[0]))(p, e),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_that_no_parameter_changes(kind):
    loss = LOSSES[kind]
    step = train_step(loss, SGD)
    for run in (
        lambda: fit(BATCH, loss=loss, shuffle=False),
        lambda: fit([BATCH], loss=loss),
        lambda: step(step.init(START), BATCH),
    ):
        with pytest.raises(ValueError, match="doesn't depend on the parameters"):
            run()
    evaluate(loss, START, BATCH)


def test_some_parameters_may_be_unused_and_some_paths_are_hidden():
    params = {"w": jnp.ones(2), "unused": jnp.ones(3)}
    fit([BATCH], params=params)

    def looped(params, example):
        x, y = example
        return jax.lax.fori_loop(0, 2, lambda _, s: s + params["w"] @ x, y)

    @jax.custom_jvp
    def rounded(z):
        return jnp.round(z)

    rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0]))
    fit([BATCH], loss=looped)
    fit([BATCH], loss=lambda p, e: rounded(p["w"] @ e[0]))  # straight through
