"""Every result that the library returns shows itself on one screen at most, with no arrays."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn import models, ops, text
from fnn.check.report import Check, Kink, Report
from fnn.layers import EVALUATE, Linear, chain, training
from fnn.layers.low_rank import AdaptedWeight
from fnn.layers.table import Summary
from fnn.ops.experts import Routing
from fnn.per_example import Explanation
from fnn.per_example.terms import Dense
from fnn.sweeps.axes import Axes
from fnn.sweeps.result import Member, SweepResult
from fnn.train import ActivationStatistics, LearningRates, LossSurface

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(6, 200)).astype(np.float32)
Y = np.arange(6, dtype=np.int32) % 3
# Many parts, so that what is listed is long.
NET = chain(*[part for _ in range(6) for part in (Linear(40), ops.relu)], Linear(3))
PARAMS = NET.init(KEY, X[0])


def output_loss(scores, label):
    return ops.softmax_cross_entropy(scores, label)


def loss(params, example):
    x, label = example
    scores = NET(params, x)
    many = {f"a_metric_of_a_long_name_{i}": jnp.max(scores) for i in range(40)}
    return ops.softmax_cross_entropy(scores, label), many


def scalar(params, example):
    return loss(params, example)[0]


SMALL = chain(hidden=Linear(30), f=ops.tanh, output=Linear(3))
WEIGHTS = SMALL.init(KEY, X[0])


def small(params, example):
    return ops.softmax_cross_entropy(SMALL(params, example[0]), example[1])


def fitted():
    step = fnn.train_step(loss, optax.adam(1e-3), check=False)
    state = step.init(PARAMS)
    n = {name: [0.5] * 1000 for name in ("loss", *(f"metric_{i}" for i in range(40)))}
    return fnn.FitResult(PARAMS, n, {k: np.ones(5000) for k in n}, state, False)


def everything_on():
    layout = fnn.sharding.fully_sharded(jax.make_mesh((8,), ("devices",)))
    options = {"trainable": ["*.a_long_path*"] * 9, "accumulate": 2, "compute": jnp.bfloat16}
    options |= {"loss_scale": "dynamic", "ema": 0.99, "clip": 1.0, "layout": layout}
    optimizer = optax.chain(*[optax.adam(1e-3)] * 30)
    return fnn.train_step(fnn.supervised(NET, output_loss), optimizer, **options)


@functools.cache
def graph():
    return fnn.graph(scalar)(PARAMS, (X[0], Y[0]))


@functools.cache
def looked():
    return fnn.activation_statistics(small)(WEIGHTS, (X, Y))


def checked():
    checks = [Check(f"gradient {i}", "autodiff", "float64", 1, "reverse") for i in range(60)]
    kinks = [Kink(f"x[{i}]", -1.0, 1.0, 0.0) for i in range(30)]
    return Report("a_function_of_a_long_name" * 5, tuple(checks), tuple(kinks), ("note",) * 40)


def explained():
    row = {"path": "['hidden']['W']", "shape": (30, 200), "kept": "A, G", "numbers": 230}
    return Explanation([row | {"dense": 6000, "why": "gradient is Gᵀ A"}] * 40)


def swept():
    """A grid of long names."""
    names = [tuple(f"a_value_of_a_long_name_{i}" for i in range(n)) for n in (16, 10)]
    grid = Axes("test", dict(zip(("a_hyperparameter", "another"), names, strict=True)))
    losses, fine = np.ones((grid.size, 5)), np.ones((grid.size, 5), bool)
    states = [lambda: fitted().state] * grid.size
    layouts = [("threads", 2)]
    return SweepResult(grid, {"loss": losses}, fine.sum(1), fine, states, False, layouts, 1.0)


def rates():
    return LearningRates(np.ones(200), np.ones(200), np.ones(150), 0.1, None)


LARGE = jnp.ones((50, 50))


RESULTS = {
    "fit": fitted,
    "state": lambda: fitted().state,
    "train_step": lambda: fnn.train_step(loss, optax.adam(1e-3)),
    "train_step of everything": everything_on,
    "supervised": lambda: fnn.supervised(SMALL, output_loss),
    "graph": graph,
    "node": lambda: graph().nodes[-1],
    "step": lambda: next(iter(graph().steps())),
    "coverage": lambda: graph().coverage(),
    "summary": lambda: Summary(fnn.summary(SMALL, X[0]).rows * 30),
    "check_rule": checked,
    "check": lambda: checked().worst,
    "kinks": lambda: checked().kinks[0],
    "explain": explained,
    "factored gradient": lambda: fnn.per_example.FactoredGradient(
        [Dense(LARGE, "")] * 3, "['hidden']['W']", (50, 50), "float32"
    ),
    "noise": lambda: fnn.per_example.Noise(jnp.ones(()), jnp.ones(())),
    "clipped_grad": lambda: fnn.per_example.Clipped(LARGE[0], WEIGHTS, LARGE[0], {"a": LARGE}),
    "kronecker": lambda: fnn.curvature.Kronecker(LARGE[None], LARGE[None], None, (50, 50)),
    "block": lambda: fnn.curvature.Block(LARGE, (50,)),
    "diagonal": lambda: fnn.curvature.Diagonal(LARGE, (50, 50)),
    "operator": lambda: fnn.curvature.ggn_vector_product(SMALL, output_loss)(WEIGHTS, (X, Y)),
    "kfac": lambda: fnn.curvature.KFACState(jnp.ones(()), KEY, *[{"W": LARGE}] * 6),
    "network": lambda: SMALL,
    "mode": lambda: EVALUATE,
    "mode with keys": lambda: training(KEY, "batch"),
    "adapter": lambda: AdaptedWeight(LARGE, LARGE[:2], LARGE[:, :2], 0.5),
    "routing": lambda: Routing(*[LARGE] * 3, 7, jnp.ones(()), jnp.ones(())),
    "reconstruction": lambda: models.Reconstruction(LARGE, LARGE[0], LARGE[0]),
    "activations": looked,
    "activations of many parts": lambda: ActivationStatistics(
        tuple(
            dataclasses.replace(p, name=f"a.path.that.is.long.{i}.{p.name}", dead=np.ones(8, bool))
            for i in range(30)
            for p in looked()
        ),
        6,
    ),
    "part": lambda: looked().parts[0],
    "memory": lambda: fnn.memory(scalar, compiled=False)(PARAMS, (X[0], Y[0])),
    "birth": lambda: fnn.find_nonfinite(lambda x: jnp.sum(jnp.log(x)), jnp.zeros(300)),
    "member": lambda: Member({"seed": 1}, PARAMS, fitted().history, fitted().state),
    "sweep": swept,
    "table": lambda: swept()["loss"],
    "histogram": lambda: looked().parts[0].values,
    "learning rates": rates,
    "surface": lambda: LossSurface(np.ones(51), np.ones(51), np.ones((51, 51)), (WEIGHTS, WEIGHTS)),
}


def screen_lines(shown):
    return sum(max(1, -(-len(line) // 80)) for line in shown.splitlines())


@functools.cache
def result(name):
    return RESULTS[name]()


@pytest.mark.parametrize("name", RESULTS)
def test_one_screen(name):
    shown = repr(result(name))
    assert screen_lines(shown) <= 24, shown
    assert "Array([" not in shown and "array([" not in shown, shown


SCALARS = {"Noise", "Halving", "Collective"}  # their fields are few, and numbers


def test_every_public_record_has_a_repr_of_its_own():
    """Python's own shows every array that a NamedTuple or a dataclass holds."""
    packages = (
        fnn,
        fnn.per_example,
        fnn.curvature,
        fnn.layers,
        fnn.models,
        fnn.train,
        fnn.sharding,
    )
    for package in packages:
        for name in package.__all__:
            kind = getattr(package, name)
            if hasattr(kind, "_fields") or dataclasses.is_dataclass(kind):
                defined = sys.modules[kind.__repr__.__module__].__name__
                assert defined.startswith("fnn.") or name in SCALARS, name


def test_a_long_text_is_cut_and_says_so():
    table = "\n".join(f"row {i}" for i in range(30))
    shown = text.one_screen(table)
    assert shown.splitlines() == [
        *table.splitlines()[:23],
        "… and 7 more lines: print(it) shows all",
    ]
    assert text.one_screen("\n".join(["row"] * 24)) == "\n".join(["row"] * 24)
    wide = "\n".join(["x" * 200] * 10)
    assert screen_lines(text.one_screen(wide)) <= 24
    assert text.one_screen(wide).splitlines()[-1] == "… and 3 more lines: print(it) shows all"
    assert text.one_screen("") == ""


def test_fields_in_words():
    shown = text.of_fields(
        "R", a=jnp.ones((2, 3)), b=jnp.float32(0.5), c={"x": X}, d=None, e=(1, 2)
    )
    assert shown == "R(a=float64[2, 3], b=0.5, c=1 array, 1200 numbers, d=None, e=(1, 2))"
    assert repr(EVALUATE) == "Mode(train=False, key=None, axis=None)"
    assert repr(training(KEY, "batch")) == "Mode(train=True, key=key<fry>, axis='batch')"


def test_a_step_in_words():
    """The loss, what the optimiser is made of, and the options that aren't the defaults."""
    shown = lambda loss, optimizer, **options: repr(fnn.train_step(loss, optimizer, **options))
    sgd = "chain(trace, scale)"
    momentum = optax.sgd(0.1, momentum=0.9)
    assert shown(scalar, momentum) == f"TrainStep(scalar, {sgd})"
    assert shown(jax.jit(scalar), momentum, nonfinite="raise") == f"TrainStep(scalar, {sgd})"
    options = {"nonfinite": "skip", "trainable": "*.W", "compute": jnp.bfloat16, "clip": 1.0}
    assert shown(scalar, momentum, **options) == (
        f"TrainStep(scalar, {sgd}, nonfinite='skip', trainable='*.W', compute=bfloat16, clip=1.0)"
    )
    chosen = shown(scalar, momentum, trainable=lambda path, x: True, loss_scale="dynamic")
    assert chosen == f"TrainStep(scalar, {sgd}, trainable=<lambda>, loss_scale='dynamic')"
    schedules = optax.inject_hyperparams(optax.sgd)(0.1)
    assert shown(scalar, schedules) == "TrainStep(scalar, inject_hyperparams)"

    class Own:
        def __call__(self, params, example):
            return scalar(params, example)

        def init(self, params):
            return ()

        def update(self, updates, state, params=None):
            return updates, state

    assert shown(Own(), Own()) == "TrainStep(Own, Own)"


@pytest.mark.parametrize("first", [[0.0, 0.0], [1.0], []])
@pytest.mark.parametrize("second", [[np.nan], [3.0, np.nan], [np.inf, 0.0], [1e300, 0.0], [0.0]])
def test_the_norm_of_several_arrays(first, second):
    wanted = np.hypot.reduce(np.asarray([*first, *second]))
    for arrays in ([first, second], [second, first]):
        np.testing.assert_allclose(text.euclidean([np.asarray(a) for a in arrays]), wanted)
