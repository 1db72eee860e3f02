"""`evaluate`: compiled once, never stale, and holding no loss; memory of all that takes a loss."""

import array
import collections
import dataclasses
import functools
import gc
import types
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn import evaluate, fit, train_step
from fnn.layers import chain
from fnn.readings import readings
from fnn.train.result import Log

PARAMS = {"w": jnp.ones(2)}
X = np.ones((4, 2))  # w·x is 2
SGD = optax.sgd(0.1)


def value(loss):
    return evaluate(loss, PARAMS, X)["loss"]


class Model:
    """A loss as a method, and an object to call."""

    factor = 2.0

    def __init__(self, scale):
        self.scale = scale
        self.unread = 0

    def loss(self, params, x):
        return self.scaled(params["w"] @ x)

    def scaled(self, y):
        return self.factor * self.scale * y

    def __call__(self, params, x):
        return self.loss(params, x)


class Pair(NamedTuple):
    """A tuple with a method."""

    weight: float
    other: float

    def __call__(self, params, x):
        return GLOBAL * self.weight * params["w"] @ x


class Table(dict):
    """A dictionary with an attribute."""


class Times:
    """What is called by an operator."""

    def __mul__(self, x):
        return GLOBAL * x


@dataclasses.dataclass(slots=True)
class Slotted:
    weight: float


GLOBAL = 3.0
SETTINGS = types.SimpleNamespace(scale=3.0)
MODULE = types.ModuleType("settings")
MODULE.scale = 3.0


def of_global(params, x):
    return GLOBAL * params["w"] @ x


def helper(y):
    return (lambda: GLOBAL * y)()


def change_global(new):
    global GLOBAL
    GLOBAL = new


def losses_that_change():
    """Of each kind: a loss that gives 2·scale, and what sets the scale, 3 at first."""
    scale = 3.0

    def of_cell(params, x):
        return scale * params["w"] @ x

    def set_cell(new):
        nonlocal scale
        scale = new

    in_list, in_dict, in_array = [3.0], {"a": {"b": 3.0}}, np.array([1.0, 3.0])
    on_device, default, model = [jnp.array(3.0)], [3.0], Model(1.5)

    def of_nested(y):
        return in_list[0] * y

    def with_default(params, x, *, scale=default):
        return scale[0] * params["w"] @ x

    def with_attribute(params, x):
        return with_attribute.scale * params["w"] @ x

    with_attribute.scale = 3.0

    def bound(new):
        model.scale = new / 2

    network = chain(lambda y: in_dict["a"]["b"] * y)
    pair, table, times = Pair(1.0, 0.0), Table(), Times()
    table.scale, in_deque, in_bytes = 3.0, collections.deque([3.0]), array.array("d", [3.0])
    return {
        "cell": (of_cell, set_cell),
        "global": (of_global, change_global),
        "global of a helper": (lambda p, x: helper(p["w"] @ x), change_global),
        "list": (lambda p, x: of_nested(p["w"] @ x), lambda new: in_list.__setitem__(0, new)),
        "layer": (
            lambda p, x: network({}, p["w"] @ x),
            lambda new: in_dict["a"].__setitem__("b", new),
        ),
        "numpy array": (
            lambda p, x: in_array[1] * p["w"] @ x,
            lambda new: in_array.__setitem__(1, new),
        ),
        "array": (
            lambda p, x: on_device[0] * p["w"] @ x,
            lambda new: on_device.__setitem__(0, jnp.array(new)),
        ),
        "default": (with_default, lambda new: default.__setitem__(0, new)),
        "attribute": (
            lambda p, x: SETTINGS.scale * p["w"] @ x,
            lambda new: setattr(SETTINGS, "scale", new),
        ),
        "module": (
            lambda p, x: MODULE.scale * p["w"] @ x,
            lambda new: setattr(MODULE, "scale", new),
        ),
        "tuple's method": (lambda p, x: pair(p, x), change_global),
        "dictionary's attribute": (
            lambda p, x: table.scale * p["w"] @ x,
            lambda new: setattr(table, "scale", new),
        ),
        "operator": (lambda p, x: (times * p["w"]) @ x, change_global),
        "deque": (
            lambda p, x: in_deque[0] * p["w"] @ x,
            lambda new: in_deque.__setitem__(0, new),
        ),
        "array of Python's": (
            lambda p, x: in_bytes[0] * p["w"] @ x,
            lambda new: in_bytes.__setitem__(0, new),
        ),
        "function's attribute": (
            with_attribute,
            functools.partial(setattr, with_attribute, "scale"),
        ),
        "method": (model.loss, bound),
        "object": (model, bound),
        "class": (Model(1.5), lambda new: setattr(Model, "factor", 2 * new / 3)),
        "partial": (functools.partial(lambda s, p, x: s[0] * p["w"] @ x, in_list), None),
        "partial of a method": (functools.partial(model.loss), bound),
        "wrapped": (functools.wraps(of_cell)(lambda *args: of_cell(*args)), set_cell),
    }


@pytest.mark.parametrize("kind", losses_that_change())
def test_what_a_loss_reads_may_change(kind):
    loss, change = losses_that_change()[kind]
    change = change or functools.partial(loss.args[0].__setitem__, 0)
    try:
        assert value(loss) == value(loss) == pytest.approx(6)
        change(5.0)
        assert value(loss) == value(loss) == pytest.approx(10)
    finally:
        change(3.0)
    assert value(loss) == pytest.approx(6)


def test_compiled_once_for_each_loss_and_shape():
    traced = []

    def loss(params, x):
        traced.append(x.shape)
        return params["w"] @ x

    evaluate(loss, PARAMS, X)
    once = len(traced)
    for scale in range(3):
        evaluate(loss, {"w": scale * jnp.ones(2)}, X + scale)
    assert len(traced) == once
    evaluate(loss, PARAMS, X[:2], check=False)
    assert len(traced) == once + 1
    evaluate(loss, PARAMS, X)
    assert len(traced) == once + 1


@pytest.mark.parametrize("kind", [Pair, Slotted])
def test_compiled_once_though_it_reads_a_field_by_name(kind):
    traced = []

    def loss(params, x):
        made = kind(*[1.0 for _ in kind.__annotations__])
        traced.append(made)
        return made.weight * params["w"] @ x

    assert value(loss) == pytest.approx(2)
    once = len(traced)
    assert value(loss) == pytest.approx(2) and len(traced) == once


def test_a_method_is_compiled_once_though_python_makes_it_anew():
    class Counting(Model):
        traces = 0

        def loss(self, params, x):
            type(self).traces += 1
            return super().loss(params, x)

    model = Counting(1.0)
    value(model.loss)
    once = Counting.traces
    for i in range(3):
        model.unread = i  # which the loss doesn't read
        value(model.loss)
    assert Counting.traces == once
    assert value(Counting(2.0).loss) == pytest.approx(8)


def test_losses_made_anew_are_not_mistaken_for_each_other():
    # One after the other is freed, and the next may get its place in memory.
    found = [value(lambda p, x, i=i: i * p["w"] @ x) for i in range(8)]
    np.testing.assert_allclose(found, 2.0 * np.arange(8))
    found = [value(functools.partial(lambda i, p, x: i * p["w"] @ x, i)) for i in range(8)]
    np.testing.assert_allclose(found, 2.0 * np.arange(8))
    found = [value(Model(i).loss) for i in range(8)]
    np.testing.assert_allclose(found, 4.0 * np.arange(8))


def test_objects_without_weak_references_and_without_a_hash():
    class Slots:
        __slots__ = ("scale",)

        def __call__(self, params, x):
            return self.scale * params["w"] @ x

    class Equal(Model):
        def __eq__(self, other):
            return True

        __hash__ = None

    loss = Slots()
    for loss.scale in (1.0, 2.0):
        assert value(loss) == pytest.approx(2 * loss.scale)
    first, second = Equal(1.0), Equal(2.0)
    assert (value(first), value(second)) == pytest.approx((4, 8))


def test_a_setting_of_jax_counts_too():
    def loss(params, x):
        return jnp.sum(params["w"] @ x).astype(jnp.result_type(float))

    assert value(loss) == pytest.approx(2)
    jax.config.update("jax_enable_x64", False)
    try:
        assert evaluate(loss, {"w": np.ones(2, np.float32)}, X)["loss"] == pytest.approx(2)
    finally:
        jax.config.update("jax_enable_x64", True)


def test_readings_of_what_refers_to_itself():
    ring = []
    ring.append(ring)

    def recursive(n):
        return recursive(n - 1) if n else ring

    first = readings(recursive)
    assert readings(recursive) == first
    ring.append(float("nan"))
    second = readings(recursive)
    assert second != first and readings(recursive) == second
    ring[1] = 0.0
    third = readings(recursive)
    ring[1] = -0.0
    assert readings(recursive) != third


def test_what_can_not_be_looked_at_is_traced_anew():
    class Proxy:
        def __getattribute__(self, name):
            raise RuntimeError("not here")

    deep = []
    for _ in range(100_000):
        deep = [deep]
    proxy, scale = Proxy(), [3.0]
    for loss in (
        lambda p, x: scale[0] * p["w"] @ x if proxy is not None else 0,
        lambda p, x: scale[0] * p["w"] @ x if deep else 0,
    ):
        scale[0] = 3.0
        assert value(loss) == value(loss) == pytest.approx(6)
        scale[0] = 5.0
        assert value(loss) == pytest.approx(10)
    while deep:  # or Python's own recursion frees it
        deep = deep[0]


# ------------------------------------------------------------------------------------- memory


def step_and_run(loss):
    step = train_step(loss, SGD)
    state, _ = step(step.init(PARAMS), X)
    step.finish()
    return state


HOLDERS = {
    "evaluate": value,
    "evaluate batches": lambda loss: evaluate(loss, PARAMS, [X]),
    "fit": lambda loss: fit(loss, PARAMS, X, SGD, epochs=1, shuffle=False, progress=False),
    "validation": lambda loss: fit(
        lambda p, x: p["w"] @ x,
        PARAMS,
        X,
        SGD,
        epochs=1,
        shuffle=False,
        progress=False,
        validation=X,
        validation_loss=loss,
    ),
    "after_epoch": lambda loss: fit(
        lambda p, x: p["w"] @ x,
        PARAMS,
        [X],
        SGD,
        epochs=1,
        progress=False,
        after_epoch=lambda *_: loss is None,
    ),
    "data": lambda loss: fit(
        lambda p, x: p["w"] @ x,
        PARAMS,
        lambda: iter([X + 0 * np.asarray(loss(PARAMS, X[0]))]),
        SGD,
        epochs=1,
        progress=False,
    ),
    "train_step": step_and_run,
    "find_labels": lambda loss: fnn.train.checks.find_labels(loss, PARAMS, X[0]),
    "grad": lambda loss: fnn.grad(loss)(PARAMS, X[0]),
    "graph": lambda loss: str(fnn.graph(loss)(PARAMS, X[0])),
    "summary": lambda loss: fnn.summary(chain(lambda x: loss(PARAMS, x)), X[0]),
    "plot": lambda loss: fnn.plot.curves({"loss": [float(loss(PARAMS, X[0]))] * 2}),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_loss_and_its_closure_are_freed(holder):
    class Closed(np.ndarray):
        """An array that tells when it goes."""

    def make():
        closed, on_device = np.ones(3).view(Closed), jnp.ones(5)
        loss = lambda p, x: p["w"] @ x * closed[0] * on_device[0]
        return loss, [weakref.ref(thing) for thing in (loss, closed, on_device)]

    loss, refs = make()
    try:
        result = HOLDERS[holder](loss)
    except ImportError as error:
        pytest.skip(str(error))
    del loss
    gc.collect()
    assert [ref() is None for ref in refs] == [True] * 3, holder
    del result


def test_evaluate_holds_no_loss_even_without_a_search_for_cycles():
    loss = lambda p, x: p["w"] @ x
    ref = weakref.ref(loss)
    gc.disable()
    try:
        value(loss)
        del loss
        assert ref() is None
    finally:
        gc.enable()


def test_the_log_grows_by_its_numbers_only():
    log = Log()
    one = np.ones(1, np.int32)
    for i in range(5000):
        log.extend({"loss": np.float32([i])}, one)
    assert len(log._parts) <= 1024
    assert log.epoch_means()["loss"] == pytest.approx(4999 / 2)
    assert len(log._parts) == 1
    log.extend({"loss": np.float32([7])}, one)
    np.testing.assert_array_equal(log.steps()["loss"], [*range(5000), 7])
