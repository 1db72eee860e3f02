"""What isn't an option's kind is refused at the call, by name: training, layers, pictures."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import exhaustive

import fnn
from fnn import initializers, plot
from fnn.layers import (
    MLP,
    BatchNorm,
    DropConnect,
    Dropout,
    DropPath,
    GroupNorm,
    LayerNorm,
    Linear,
    Maxout,
    MixerBlock,
    Once,
    RMSNorm,
    SpectralNorm,
    WeightNorm,
    chain,
    network,
    parallel,
    repeat,
    residual,
    summary,
    training,
)

KEY = jax.random.key(0)
START = {"w": jnp.ones(2)}
SGD = optax.sgd(0.1)
DATA = (np.ones((4, 2)), np.zeros(4))
NAN = float("nan")


def squares(params, example):
    x, y = example
    return (params["w"] @ x - y) ** 2


def noisy(params, example, key):
    return squares(params, example) + jax.random.normal(key)


def fit(**changes):
    options = {"loss": squares, "params": START, "data": DATA, "optimizer": SGD, "epochs": 1}
    return fnn.fit(**options | {"key": KEY, "progress": False} | changes)


def evaluate(**changes):
    return fnn.evaluate(**{"loss": squares, "params": START, "data": DATA} | changes)


def train_step(**changes):
    return fnn.train_step(**{"loss": squares, "optimizer": SGD} | changes)


def step(loss=squares, **changes):
    step = fnn.train_step(loss, SGD)
    return step(**{"state": step.init(START), "batch": DATA} | changes)


def init(params):
    return fnn.train_step(squares, SGD).init(params)


BAD = {
    "integer": (NAN, "3", 2.5, True, None, [2], np.ones(2), 2.0, jnp.ones(()), 1j),
    "optional integer": (NAN, "3", 2.5, True, [2], np.ones(2), 2.0, -1, 0),
    "flag": (1, 0, "no", "yes", None, NAN, np.ones(2), []),
    "function": (None, 3, "loss", START, NAN, (squares,)),
    "optional key": (0, 1.5, "key", True, np.ones(2), jax.random.split(KEY, 2), NAN),
    "optimizer": (None, optax.adam, optax.GradientTransformation, 0.1, "adam", NAN, [SGD]),
    "params": (None, {}, "W", {"w": "a"}, {"w": None}, [squares], {"w": jnp.arange(2)}),
    "data": (None, 3, NAN, "data", [], (), {}, ([],), (None, None), np.ones(())),
    "nonfinite": ("warn", None, True, 1, NAN, "Raise"),
}
TEMPLATES = functools.partial(plot.templates, np.ones((2, 4)))
OPTIONS = [
    (fit, "epochs", [*BAD["integer"], -1, float("inf")]),
    (fit, "batch_size", BAD["optional integer"]),
    (fit, "shuffle", BAD["flag"]),
    (fit, "progress", BAD["flag"]),
    (fit, "check", BAD["flag"]),
    (fit, "key", BAD["optional key"]),
    (fit, "nonfinite", BAD["nonfinite"]),
    (fit, "drop_last", BAD["flag"]),
    (fit, "steps_per_call", BAD["optional integer"]),
    (fit, "after_epoch", [b for b in BAD["function"] if b is not None]),
    (fit, "loss", BAD["function"]),
    (fit, "optimizer", BAD["optimizer"]),
    (fit, "params", BAD["params"]),
    (fit, "data", BAD["data"]),
    (fit, "validation", [b for b in BAD["data"] if b is not None]),
    (functools.partial(fit, validation=DATA), "validation_loss", BAD["function"][1:]),
    (functools.partial(fit, data=[DATA]), "steps_per_epoch", BAD["optional integer"]),
    (evaluate, "batch_size", BAD["optional integer"]),
    (evaluate, "key", BAD["optional key"]),
    (evaluate, "check", BAD["flag"]),
    (evaluate, "loss", BAD["function"]),
    (evaluate, "data", BAD["data"]),
    (evaluate, "params", (None, "W", {"w": "a"}, [squares])),
    (train_step, "loss", BAD["function"]),
    (train_step, "optimizer", BAD["optimizer"]),
    (train_step, "nonfinite", BAD["nonfinite"]),
    (train_step, "check", BAD["flag"]),
    (step, "state", (None, START, "state", 0)),
    (step, "batch", [b for b in BAD["data"] if b is not NAN]),
    (functools.partial(step, noisy), "key", [None, *BAD["optional key"]]),
    (init, "params", BAD["params"]),
    (Linear, "features", [*BAD["integer"], -1, 0]),
    (functools.partial(Linear, 2), "use_bias", BAD["flag"]),
    (functools.partial(Linear, 2), "weight_init", BAD["function"]),
    (functools.partial(Linear, 2), "bias_init", BAD["function"]),
    (Maxout, "features", [*BAD["integer"], -1, 0]),
    (functools.partial(Maxout, 2), "pieces", [*BAD["integer"], -1, 0]),
    (functools.partial(Maxout, 2), "use_bias", BAD["flag"]),
    (Dropout, "rate", [None, "0.5", NAN, -0.1, 1.5, True, jnp.ones(2)]),
    (LayerNorm, "epsilon", [None, "0", NAN, -1e-5, float("inf")]),
    (LayerNorm, "use_scale", BAD["flag"]),
    (BatchNorm, "decay", [None, "0.9", NAN, -0.1, 1.5]),
    (BatchNorm, "use_bias", BAD["flag"]),
    (RMSNorm, "use_scale", BAD["flag"]),
    (GroupNorm, "groups", [*BAD["integer"], -1, 0]),
    (functools.partial(SpectralNorm, Linear(2)), "iterations", [*BAD["integer"], -1, 0]),
    (Once, "layer", (None, 3, "relu", Linear)),
    (WeightNorm, "layer", (None, 3, "relu", Linear)),
    (DropPath, "rate", [None, "0.5", NAN, -0.1, 1.5, True, jnp.ones(2)]),
    (functools.partial(DropConnect, Linear(2)), "rate", [None, NAN, 1.5]),
    (MLP, "hidden", [*BAD["integer"], -1, 0]),
    (functools.partial(MLP, 3), "activation", BAD["function"]),
    (functools.partial(MixerBlock, 3), "channels", [*BAD["integer"], -1, 0]),
    (training, "key", BAD["optional key"]),
    (functools.partial(training, None), "axis", (3, ["batch"], ("batch", 3), NAN)),
    (functools.partial(repeat, Linear(2)), "n", [*BAD["integer"], -1, 0]),
    (functools.partial(repeat, Linear(2), 2), "remat", ("yes", 1, NAN)),
    (lambda part: network(part=part), "part", (None, 3, "relu", Linear)),
    (lambda body: network()(body), "body", (None, 3, "relu")),
    (lambda part: chain(part), "part", (None, 3, "relu", [Linear(2)], Linear, KEY)),
    (lambda part: parallel(a=part), "part", (None, 3, "relu", Maxout)),
    (lambda part: residual(part), "part", (None, NAN, {})),
    (functools.partial(summary, Linear(2)), "xs", (None, "x", {}, [Linear])),
    (lambda key: Linear(2).init(key, jnp.ones(3)), "key", (None, 0, *BAD["optional key"])),
    (lambda key: chain(Linear(2)).init(key, jnp.ones(3)), "key", (None, 0, jnp.ones(2))),
    (functools.partial(plot.curves, {"loss": [1.0]}), "log", BAD["flag"]),
    (plot.curves, "history", (None, 3, [1.0], "loss", {"a": "b"}, {"loss": [None]}, {"a": [1j]})),
    (plot.templates, "W", (None, "W", 3, [["a"]], np.ones(4), np.full((2, 4), NAN), np.ones(()))),
    (TEMPLATES, "columns", BAD["optional integer"]),
    (
        functools.partial(plot.templates, np.ones((2, 4))),
        "image",
        (4, "22", (2.0, 2), (NAN, 2), (2,)),
    ),
    (functools.partial(plot.templates, np.ones((2, 4))), "titles", ("ab", ["a"], ["a"] * 3)),
]
FAN = functools.partial(initializers.variance_scaling, KEY, (2, 2))
for function, option in [
    (initializers.constant, "value"),
    (initializers.normal, "stddev"),
    (initializers.uniform, "bound"),
    (initializers.truncated_normal, "stddev"),
    (initializers.truncated_normal, "lower"),
    (initializers.truncated_normal, "upper"),
    (initializers.variance_scaling, "scale"),
    (initializers.xavier_uniform, "gain"),
    (initializers.xavier_normal, "gain"),
    (initializers.he_normal, "slope"),
    (initializers.he_uniform, "slope"),
    (initializers.orthogonal, "gain"),
]:
    bad = (NAN, "1", None, True, 1j, np.ones(2))
    OPTIONS.append((functools.partial(function, KEY, (2, 2)), option, bad))
OPTIONS += [
    (FAN, "fan", ("both", None, 1, "IN")),
    (FAN, "distribution", ("cauchy", None, 1)),
    (functools.partial(initializers.normal, shape=(2,)), "key", (0, None, jnp.ones(2))),
    (functools.partial(initializers.normal, KEY, (2,)), "stddev", (-1.0, float("inf"))),
    (functools.partial(initializers.truncated_normal, KEY, (2,), lower=1.0), "upper", (1.0, 0.5)),
]


def name_of(function):
    function = getattr(function, "func", function)
    return getattr(function, "__name__", "?")


@pytest.mark.parametrize(
    ("function", "option", "bad"),
    [pytest.param(*case, id=f"{name_of(case[0])}-{case[1]}") for case in OPTIONS],
)
def test_what_is_not_of_its_kind_is_refused_by_name(function, option, bad):
    for value in bad:
        with pytest.raises((TypeError, ValueError)) as error:
            function(**{option: value})
        # Python's own errors come from deep inside, and name neither.
        message = str(error.value)
        assert option.split("_")[-1].lower() in message.lower() or "data" in message, value
        assert len(message) < 600


def test_what_is_of_its_kind_is_taken():
    fit(epochs=np.int64(1), batch_size=np.int32(2), shuffle=np.bool_(False), key=None)
    fit(data=[DATA], steps_per_epoch=np.int64(1), key=jax.random.PRNGKey(0))
    assert evaluate(batch_size=jnp.int32(3)) == evaluate()
    assert Linear(np.int64(2)) == Linear(2)
    assert Linear(2).init(jax.random.PRNGKey(0), jnp.ones(3))["W"].shape == (2, 3)
    assert hash(Dropout(np.float32(0.5))) == hash(Dropout(0.5))
    zero = initializers.variance_scaling(KEY, (2, 2), scale=0.0)
    np.testing.assert_array_equal(zero, np.zeros((2, 2)))
    jax.jit(lambda s: initializers.normal(KEY, (2,), stddev=s))(0.5)


def test_an_initialiser_of_another_shape():
    flat = lambda key, shape, dtype: jnp.ones(shape[:1], dtype)
    for layer in (Linear(2, weight_init=flat), Maxout(2, weight_init=flat)):
        with pytest.raises(ValueError, match=r"must make an array of shape \(2, 3\), but made"):
            layer.init(KEY, jnp.ones(3))


def test_options_that_do_not_fit_each_other():
    with pytest.raises(ValueError, match="validation_loss is given, but no data for it"):
        fit(validation_loss=squares)


# ------------------------------------------------------------------------------ forms of losses


class Methods:
    def loss(self, params, example):
        return squares(params, example)

    def __call__(self, params, example):
        return squares(params, example)

    @staticmethod
    def static(params, example):
        return squares(params, example)

    @classmethod
    def of_class(cls, params, example):
        return squares(params, example)


@pytest.mark.parametrize(
    "loss",
    [
        Methods().loss,
        Methods(),
        Methods.static,
        Methods.of_class,
        functools.partial(lambda scale, p, e: scale * squares(p, e), 2.0),
        functools.partial(lambda p, e, *, scale: scale * squares(p, e), scale=2.0),
        lambda *args: squares(*args),
        lambda p, e, scale=1.0: scale * squares(p, e),
        lambda p, e, *, scale=1.0: scale * squares(p, e),
        jax.jit(squares),
        jax.checkpoint(squares),
    ],
)
def test_losses_of_every_form(loss):
    assert evaluate(loss=loss)["loss"] in (4.0, 8.0)
    train_step(loss=loss)


@pytest.mark.parametrize(
    "loss",
    [
        noisy,
        lambda p, e, *, key: noisy(p, e, key),
        lambda p, e, rng: noisy(p, e, rng),
        lambda p, e, _: noisy(p, e, _),
        lambda p, e, key=None: noisy(p, e, key),
    ],
)
def test_losses_with_a_key(loss):
    state, metrics = step(loss, key=KEY)
    _, wanted = step(noisy, key=KEY)
    assert metrics["loss"] == wanted["loss"]
    assert evaluate(loss=loss, key=KEY) == evaluate(loss=noisy, key=KEY)
    with pytest.raises(TypeError, match="takes a key"):
        step(loss)
    with pytest.raises(TypeError, match="takes a key"):
        fit(loss=loss, key=None, shuffle=False)


@exhaustive
def test_a_key_by_position_and_by_keyword():
    step = fnn.train_step(noisy, SGD)
    _, a = step(step.init(START), DATA, KEY)
    _, b = step(step.init(START), DATA, key=KEY)
    assert a == b
    grads = fnn.per_example.grads(noisy)
    np.testing.assert_array_equal(grads(START, DATA, KEY)[0], grads(START, DATA, key=KEY)[0])
    clipped = fnn.per_example.clipped_grad(noisy, 1.0)
    first, second = clipped(START, DATA, KEY), clipped(START, DATA, key=KEY)
    np.testing.assert_array_equal(first.losses, second.losses)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda params, x, y: 0.0, r"loss\(params, example\).*\(params, x, y\) wants more: y"),
        (lambda params, x, y, z: 0.0, "wants more: y, z"),
        (lambda params, example, key, more: 0.0, "wants more: more"),
        (lambda params: 0.0, r"\(params\) takes 1 of these"),
        (lambda: 0.0, "takes 0 of these"),
        (lambda params, example, *, scale: 0.0, "wants scale by keyword.*functools.partial"),
    ],
)
def test_losses_that_can_not_be_called(loss, message):
    for run in (fit, evaluate, train_step):
        with pytest.raises(TypeError, match=message):
            run(loss=loss)
    with pytest.raises(TypeError, match="validation_loss is called for one example"):
        fit(validation=DATA, validation_loss=loss)


def of_a_batch(params, example):
    x, y = example
    return jnp.mean((jax.vmap(lambda x: params["w"] @ x)(x) - y) ** 2)


@pytest.mark.parametrize(
    "loss",
    [
        of_a_batch,
        lambda p, e: jnp.mean(e[0], axis=1) @ p["w"],
        lambda p, e: jnp.sum(e[0][:, 0] * p["w"][0]),
        lambda p, e: (e[0].reshape(4, 2) @ p["w"]).sum(),
        lambda p, e: optax.softmax_cross_entropy_with_integer_labels(e[0] @ p["w"], e[1]),
        lambda p, e: e["x"] * p["w"],
    ],
)
def test_an_error_inside_a_loss_notes_that_it_gets_one_example(loss):
    note = r"ONE example, \(float64\[2\], float64\[\]\): a loss is written for one example"
    for run in (
        lambda: fit(loss=loss),
        lambda: fit(loss=loss, check=False),
        lambda: evaluate(loss=loss),
        lambda: step(loss),
        lambda: fnn.per_example.grads(loss)(START, DATA),
        lambda: fnn.per_example.clipped_grad(loss, 1.0)(START, DATA),
    ):
        with pytest.raises(Exception) as error:
            run()
        notes = "\n".join(getattr(error.value, "__notes__", []))
        assert len(re.findall(note, notes)) == 1, notes
