"""Every result that the library returns shows itself on one screen at most, with no arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn import models, ops, text
from fnn.layers import EVALUATE, Linear, chain, training
from fnn.layers.adapters import AdaptedWeight
from fnn.layers.table import Summary
from fnn.per_example import Explanation
from fnn.train import ActivationStatistics

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(6, 200)).astype(np.float32)
Y = np.arange(6, dtype=np.int32) % 3
# Many parts, so that what is listed is long.
NET = chain(*[part for _ in range(15) for part in (Linear(40), ops.relu)], Linear(3))
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


@functools.cache
def per_example():
    return fnn.per_example.grads(small)(WEIGHTS, (X, Y))[1]


@functools.cache
def graph():
    return fnn.graph(scalar)(PARAMS, (X[0], Y[0]))


@functools.cache
def looked():
    return fnn.activation_statistics(small)(WEIGHTS, (X, Y))


@functools.cache
def checked():
    return fnn.check_rule(ops.relu, jnp.zeros(30), dtypes=("float64",), order=1)


LARGE = jnp.ones((50, 50))


RESULTS = {
    "fit": fitted,
    "state": lambda: fitted().state,
    "evaluate": lambda: fnn.evaluate(fnn.supervised(SMALL, output_loss), WEIGHTS, (X, Y)),
    "train_step": lambda: fnn.train_step(loss, optax.adam(1e-3)),
    "supervised": lambda: fnn.supervised(SMALL, output_loss),
    "graph": graph,
    "node": lambda: graph().nodes[-1],
    "step": lambda: next(iter(graph().steps())),
    "coverage": lambda: graph().coverage(),
    "summary": lambda: Summary(fnn.summary(SMALL, X[0]).rows * 30),
    "check_rule": checked,
    "check": lambda: checked().worst,
    "kinks": lambda: checked().kinks[0],
    "explain": lambda: Explanation(fnn.per_example.explain(per_example()) * 30),
    "factored gradient": lambda: per_example()["hidden"]["W"],
    "noise": lambda: fnn.per_example.Noise(jnp.ones(()), jnp.ones(())),
    "clipped_grad": lambda: fnn.per_example.Clipped(LARGE[0], WEIGHTS, LARGE[0], {"a": LARGE}),
    "kronecker": lambda: fnn.curvature.Kronecker(LARGE[None], LARGE[None], None, (50, 50)),
    "block": lambda: fnn.curvature.Block(LARGE, (50,)),
    "diagonal": lambda: fnn.curvature.Diagonal(LARGE, (50, 50)),
    "operator": lambda: fnn.curvature.ggn_vector_product(SMALL, output_loss)(WEIGHTS, (X, Y)),
    "kfac": lambda: fnn.curvature.kfac(SMALL, output_loss, (X, Y)).init(WEIGHTS),
    "network": lambda: SMALL,
    "mode": lambda: EVALUATE,
    "mode with keys": lambda: training(KEY, "batch"),
    "adapter": lambda: AdaptedWeight(LARGE, LARGE[:2], LARGE[:, :2], 0.5),
    "routing": lambda: ops.top_k_routing(jnp.asarray(X), k=2, capacity=3),
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
    "histogram": lambda: looked().parts[0].values,
    "learning rates": lambda: fnn.find_learning_rate(small, WEIGHTS, (X, Y), steps=5),
    "surface": lambda: fnn.loss_surface(small, WEIGHTS, (X, Y), KEY, points=3),
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
