"""`sweep` where values, settings and functions are out of the ordinary: nothing is lost or wrong.

The wanted numbers are those of a loop of numpy.
"""

import contextlib
import dataclasses
import gc
import os
import signal
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import exhaustive

import fnn
from fnn.plot import against
from fnn.sweeps.compiled import Programs
from fnn.train import progress

RNG = np.random.default_rng(0)
X = RNG.normal(size=(11, 3))
Y = X @ np.array([1.0, -2.0, 0.5]) + 0.3
DATA = X[:8], Y[:8]
HELD_OUT = X[8:], Y[8:]
START = {"W": np.zeros(3), "b": np.zeros(())}
LAYOUTS = ("vmap", "scan", "threads", "devices")


def squares(params, example):
    x, y = example
    return (params["W"] @ x + params["b"] - y) ** 2


def sweep(axes, loss=squares, data=DATA, **options):
    """All examples in each step: no order, and no key."""
    given = {"optimizer": optax.sgd, "init": START, "epochs": 3, "batch_size": 8}
    given |= {"shuffle": False, "progress": False, "layout": "threads"}
    return fnn.sweep(loss, axes, data, **{**given, **options})


def alone(rate, epochs=3, momentum=0.0):
    """Gradient descent in numpy: the parameters, and the loss before each step."""
    x = np.concatenate([DATA[0], np.ones((8, 1))], axis=1)
    w, trace, losses = np.zeros(4), np.zeros(4), []
    for _ in range(epochs):
        error = x @ w - DATA[1]
        losses.append(np.mean(error**2))
        trace = 2 * error @ x / 8 + momentum * trace
        w = w - rate * trace
    return {"W": w[:3], "b": w[3]}, losses


def is_alone(member, rate, rtol=1e-9, **options):
    params, losses = alone(rate, **options)
    for name, value in params.items():
        np.testing.assert_allclose(np.asarray(member.params[name], float), value, rtol=rtol)
    np.testing.assert_allclose(member.history["loss"], losses, rtol=rtol, atol=1e-12)


# ------------------------------------------------------------------------------- values of axes


def test_an_infinite_rate_diverges_and_is_named():
    found = sweep({"learning_rate": [0.05, np.inf]})
    assert found.diverged == [{"learning_rate": np.inf, "epoch": 1}]
    is_alone(found.best(), 0.05)
    assert "diverged: learning_rate inf, epoch 1" in repr(found)
    assert np.isinf(found.member(learning_rate=np.inf).hyperparameters["learning_rate"])


@pytest.mark.parametrize(
    "axes, options, message",
    [
        ({"learning_rate": [0.1, np.nan]}, {}, "the axis 'learning_rate' holds nan"),
        ({"learning_rate": [np.nan]}, {"static": "learning_rate"}, "'learning_rate' holds nan"),
        ({("learning_rate", "momentum"): ([1.0, 2], [0, np.nan])}, {}, "'momentum' holds nan"),
        (
            {("learning_rate", "momentum"): ([0.1, 0.1], [0, 0])},
            {},
            "'momentum'.* holds 0.1, 0 twice",
        ),
        ({"learning_rate": [0.1, 1, 0.1]}, {}, "'learning_rate' holds 0.1 twice"),
        ({"learning_rate": [10**400]}, {}, "which int64 can't hold"),
        ({"learning_rate": [0.5, 10**400]}, {}, "which float64 can't hold"),
    ],
    ids=lambda _: None,
)
def test_values_that_are_refused(axes, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(axes, **options)


@pytest.mark.parametrize("rate", ["a", None, {"a": 1.0}, np.ones(2)], ids=str)
def test_a_rate_that_is_no_number_is_named(rate):
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    wanted = "no function takes 'learning_rate', .* must be a number, but its axis holds"
    with pytest.raises(TypeError, match=wanted):
        sweep({"learning_rate": [0.1, rate]}, optimizer=injected)
    if rate is None:  # of which optax makes no rate at all
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        sweep({"learning_rate": [rate]})
    note = caught.value.__notes__[-1]
    assert note.startswith("(fnn.sweep: for the networks with learning_rate")
    assert "what is no number is given to the functions as it is" in note


def test_what_32_bits_cannot_hold_is_refused():
    with jax.enable_x64(False), pytest.raises(ValueError, match="1e.200, which float32 can't hold"):
        sweep({"learning_rate": [1e200]})


@exhaustive
def test_values_beside_each_other_are_told_apart():
    rates = [0.1, 0.1 * (1 + 1e-9)]
    for static in ((), "learning_rate"):
        found = sweep({"learning_rate": rates}, static=static)
        for rate in rates:
            member = found.member(learning_rate=rate)
            assert member.hyperparameters == {"learning_rate": rate}
            is_alone(member, rate, rtol=1e-13)


@exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_axes_of_one_value(layout):
    axes = {"seed": [3], "learning_rate": [0.05], "momentum": (0.5,)}
    found = sweep(axes, layout=layout, validation=HELD_OUT)
    is_alone(found.best(), 0.05, momentum=0.5)
    assert found["loss"].values.shape == (1, 1, 1)
    assert found.mean(over="seed").values.shape == (1, 1)
    assert found.params()["W"].shape == (3,)


@exhaustive
def test_integers_are_rates_too():
    for rates in ([1, 2], np.array([1, 2], np.int32), [0.5, 1]):
        found = sweep({"learning_rate": rates}, epochs=2)
        for rate in rates:
            is_alone(found.member(learning_rate=rate), rate, epochs=2)


@exhaustive
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_rates_of_other_dtypes_where_promotion_is_strict(dtype):
    def loss(params, example):
        x, y = jax.tree.map(lambda x: x.astype(dtype), example)
        return (params["W"] @ x + params["b"] - y) ** 2

    start = jax.tree.map(lambda x: jnp.asarray(x, dtype), START)
    given = {"loss": loss, "init": start, "optimizer": optax.adam, "epochs": 2}
    axes = {"learning_rate": [1, 2]}
    found = []
    for mode in ("standard", "strict"):
        with jax.numpy_dtype_promotion(mode):
            found.append(sweep(axes, **given))
    for rate in (1, 2):
        by_promotion, strict = (f.member(learning_rate=rate).params for f in found)
        for x, y in zip(jax.tree.leaves(strict), jax.tree.leaves(by_promotion), strict=True):
            assert x.dtype == y.dtype == dtype
            np.testing.assert_array_equal(np.asarray(x, float), np.asarray(y, float))


# ------------------------------------------------------------------- hyperparameters in the state


@exhaustive
def test_injected_where_the_default_is_an_integer():
    made = optax.inject_hyperparams(optax.sgd)(learning_rate=1, momentum=0)
    axes = {"learning_rate": [0.05, 0.1], "momentum": [0.25]}
    found = sweep(axes, optimizer=made)
    for rate in (0.05, 0.1):
        is_alone(found.member(learning_rate=rate), rate, momentum=0.25)


@exhaustive
def test_injected_inside_of_other_transformations():
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    made = optax.chain(
        optax.clip_by_global_norm(1e9),
        optax.partition({"all": inner}, {"W": "all", "b": "all"}),
    )
    found = sweep({"learning_rate": [0.05, 0.1]}, optimizer=made)
    for rate in (0.05, 0.1):
        is_alone(found.member(learning_rate=rate), rate)


def test_what_a_schedule_overwrites_is_not_injected():
    made = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match="axis learning_rate is used by nothing"):
        sweep({"learning_rate": [0.05]}, optimizer=made)


# ----------------------------------------------------------------------------- errors on the way


def widths(width):
    return {"W": np.zeros(3), "b": np.zeros(()), "h": np.zeros(width)}


def test_an_error_names_the_static_value_it_was_for():
    def init(width):
        if width == 3:
            raise RuntimeError("no such width")
        return widths(width)

    axes = {"width": [2, 3, 4], "learning_rate": [0.1]}
    with pytest.raises(RuntimeError, match="no such width") as caught:
        sweep(axes, init=init, static="width")
    assert "(fnn.sweep: for the networks with width 3.)" in caught.value.__notes__
    assert not hasattr(caught.value, "result")  # nothing was trained yet


def test_metrics_of_different_shapes_are_refused_before_training():
    def loss(params, example):
        return squares(params, example), {"h": params["h"]}

    axes = {"width": [2, 3], "learning_rate": [0.1]}
    message = r"metric 'h' has shape \(2,\) for width 2, but \(3,\) for width 3"
    with pytest.raises(ValueError, match=message):
        sweep(axes, loss, init=widths, static="width")


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    text: str


@exhaustive
@pytest.mark.parametrize("layout", ["vmap", "threads"])
def test_an_error_while_the_second_program_trains_brings_what_the_first_made(layout, monkeypatch):
    """Also one that no attribute can be set of."""
    real = Programs.get

    def get(self, plan):
        run = real(self, plan)

        def advance(carry, numeric, begin, end):
            if self.program.static["width"] == 3 and begin >= 1:
                raise Frozen("enough")
            return run(carry, numeric, begin, min(end, begin + 1))

        return advance

    monkeypatch.setattr(Programs, "get", get)
    monkeypatch.setattr("fnn.sweeps.training.SECONDS", 0.0)  # a step a call
    axes = {"width": [2, 3], "learning_rate": [0.05, 0.1]}
    with pytest.raises(Frozen) as caught:
        sweep(axes, init=widths, static="width", layout=layout, at_once=2)
    found = caught.value.result
    assert "`result` of this error is the SweepResult so far" in caught.value.__notes__[-1]
    for rate in (0.05, 0.1):
        is_alone(found.member(width=2, learning_rate=rate), rate)
    assert found.epochs[0].tolist() == [3, 3] and found.epochs[1].max() == 1


@exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ctrl_c(layout, monkeypatch):
    class Display(progress.Nothing):
        def epoch(self, epoch, record):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("fnn.sweeps.loop.progress_for", lambda *args: Display())
    # An epoch takes 7 µs on a fast machine: with so many of them the main thread may be late.
    monkeypatch.setattr("fnn.sweeps.training.SECONDS", 0.01)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found = sweep({"learning_rate": [0.02, 0.05]}, epochs=10**6, layout=layout)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert found.interrupted and 1 <= found.epochs.max() < 10**6
    for rate, epochs in zip((0.02, 0.05), found.epochs, strict=True):
        if epochs:
            is_alone(found.member(learning_rate=rate), rate, epochs=int(epochs))


# --------------------------------------------------------------------------------- JAX's settings


@contextlib.contextmanager
def everywhere(name):
    """A setting for all threads."""
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


@contextlib.contextmanager
def strict_32_bits():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("strict"):
        yield


SETTINGS = {
    "promotion in 32 bits": strict_32_bits,
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "leaks": jax.checking_leaks,
    "nans": lambda: jax.debug_nans(True),
    "nans in all threads": lambda: everywhere("jax_debug_nans"),
    "infs in all threads": lambda: everywhere("jax_debug_infs"),
    "key reuse": lambda: jax.debug_key_reuse(True),
    "a mesh": lambda: jax.set_mesh(jax.make_mesh((8,), ("data",))),
    "32 bits": lambda: jax.enable_x64(False),
}


@exhaustive
@pytest.mark.parametrize(
    "setting, layout", [*[(setting, None) for setting in SETTINGS], ("a mesh", "devices")]
)
def test_under_settings_of_jax(setting, layout):
    rtol = 1e-4 if "32 bits" in setting else 1e-9
    # A loss that is new: a program that was traced before would be taken.
    loss = lambda params, example: squares(params, example)
    with SETTINGS[setting]():
        found = sweep(
            {"learning_rate": [0.02, 0.05], "seed": [0]},
            loss,
            jax.tree.map(jnp.asarray, DATA),
            init=lambda seed: jax.tree.map(jnp.asarray, START),
            layout=layout,
            validation=jax.tree.map(jnp.asarray, HELD_OUT),
            batch_size=8,
            shuffle=True,
        )
        for rate in (0.02, 0.05):
            is_alone(found.member(learning_rate=rate), rate, rtol=rtol)


@exhaustive
@pytest.mark.parametrize("layout", ["vmap", "threads"])
def test_debug_nans_names_the_network(layout):
    axes = {"learning_rate": [0.05, np.inf], "seed": [0]}
    with jax.debug_nans(True), pytest.raises(FloatingPointError) as caught:
        sweep(axes, layout=layout)
    assert "nan in the network with learning_rate inf, seed 0, by step" in str(caught.value)
    assert isinstance(caught.value.result, fnn.SweepResult)
    assert sweep(axes, layout=layout).diverged


@exhaustive
def test_in_a_thread_with_settings_of_its_own():
    found, handlers = [], [signal.getsignal(signal.SIGINT)]

    def work():
        with jax.enable_x64(False):
            found.append(sweep({"learning_rate": [0.02, 0.05]}, layout=None))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert signal.getsignal(signal.SIGINT) is handlers[0]
    for one in found:
        assert one.best().params["W"].dtype == jnp.float32
        for rate in (0.02, 0.05):
            is_alone(one.member(learning_rate=rate), rate, rtol=1e-4)
    assert len(found) == 2


# ----------------------------------------------------------------------------------------- memory


@exhaustive
@pytest.mark.parametrize("layout", [None, "devices"])
def test_nothing_is_held_after_the_call(layout):
    class Function:
        def __init__(self, function):
            self.function = function

    class Loss(Function):
        def __call__(self, params, example):
            return self.function(params, example)

    class Init(Function):
        def __call__(self, seed):
            return self.function(seed)

    class Optimizer(Function):
        def __call__(self, learning_rate):
            return self.function(learning_rate)

    loss, init, make = Loss(squares), Init(lambda seed: START), Optimizer(optax.sgd)
    data = jnp.asarray(DATA[0]), jnp.asarray(DATA[1])
    refs = [weakref.ref(x) for x in (loss, init, make, data[0])]
    axes = {"seed": [0, 1], "learning_rate": [0.05]}
    found = sweep(axes, loss, data, init=init, optimizer=make, layout=layout)
    del loss, init, make, data
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4
    is_alone(found.member(seed=1), 0.05)


@exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_is_one_copy_of_the_data(layout, monkeypatch):
    data = RNG.normal(size=(2**14, 3)), RNG.normal(size=2**14)
    size = sum(x.nbytes for x in data)
    taken = []
    real = Programs.get

    def get(self, plan):
        taken.append(self.bytes(plan))
        return real(self, plan)

    monkeypatch.setattr(Programs, "get", get)
    axes = {"seed": range(16), "learning_rate": [0.01]}
    sweep(axes, data=data, layout=layout, epochs=1, at_once=16, validation=data)
    # Sixteen copies would take sixteen times as much.
    assert taken and max(taken) < (5 if layout == "threads" else 2) * size


# ------------------------------------------------------------------------------------- validation


@exhaustive
@pytest.mark.parametrize("size", [3, 11])
def test_validation_is_what_evaluate_finds(size):
    """Over whole batches and a smaller last one, with keys of their own."""

    def noisy(params, example, key):
        x, y = example
        error = params["W"] @ x + params["b"] - y + jax.random.normal(key)
        return error**2, {"error": error, "large": error > 1, "features": x * error}

    key = jax.random.key(5)
    options = {"validation": (X, Y), "validation_loss": noisy, "batch_size": size, "key": key}
    found = sweep({"learning_rate": [0.05]}, **options)
    params = found.best().params
    wanted = fnn.evaluate(noisy, params, (X, Y), batch_size=size, key=jax.random.split(key, 3)[2])
    assert set(wanted) == {"loss", "error", "large", "features"}
    for name, value in wanted.items():
        last = found.history[f"validation_{name}"][0, -1]
        np.testing.assert_allclose(last, value, rtol=1e-6, err_msg=name)


def test_the_picture_has_a_place_for_inf():
    rates = [0.01, 0.1, np.inf]
    found = sweep({"learning_rate": rates})
    (axes,) = against(found, "learning_rate").axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0.01", "0.1", "inf"]
    (line,) = axes.lines
    assert line.get_xdata().tolist() == [0, 1]


# ------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("worth, tried", [(1e9, ["threads"]), (0, ["threads", "vmap"])])
def test_another_layout_is_compiled_where_it_can_pay(worth, tried, monkeypatch):
    loss = lambda params, example: squares(params, example) * (1 + worth)  # a program of its own
    seconds = {"threads": 2.0, "vmap": 1.0}
    measured = []
    note = lambda programs, plan, numeric: measured.append(plan.layout) or seconds[plan.layout]
    monkeypatch.setattr("fnn.sweeps.choice._seconds_a_step", note)
    monkeypatch.setattr("fnn.sweeps.choice.WORTH", worth)
    found = sweep({"learning_rate": [1e-12, 1e-13]}, loss, layout=None)
    assert measured == tried
    assert found.layouts[0][0] == tried[-1]


@exhaustive
def test_on_a_cpu_convolutions_are_not_made_one_of_many_networks(monkeypatch):
    """Which XLA takes minutes to compile."""
    monkeypatch.setattr("fnn.sweeps.choice.WORTH", 0)

    def loss(params, example):
        x, y = example
        out = jax.lax.conv(x.reshape(1, 1, 3), params["W"].reshape(1, 1, 3), (1,), "VALID")
        return (out[0, 0, 0] - y) ** 2

    found = sweep({"learning_rate": [0.05, 0.1]}, loss, layout=None, init={"W": np.zeros(3)})
    assert found.layouts[0][0] == "threads"
