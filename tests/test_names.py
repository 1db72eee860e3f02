"""The names that a graph gives to values are those that the source assigns them to.

The truth is what Python itself binds: the function is run without a graph, and at each line the
local variables are noted.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fnn

ROW = np.array([0.3, -1.1])


def bound(function, *args):
    """{name: every value that it has in some function of this file while `function` runs}."""
    values = {}

    def note(frame, event, _):
        if frame.f_code.co_filename != __file__:
            return None
        for name, value in list(frame.f_locals.items()):
            if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
                found = values.setdefault(name, {})
                found[id(value)] = value
        return note

    sys.settrace(note)
    try:
        function(*args)
    finally:
        sys.settrace(None)
    return {name: list(found.values()) for name, found in values.items()}


def readout(W, e):
    return W @ e


def two(x):
    return jnp.sin(x), x * 5


def logged(x, log):
    log.append(jnp.sin(x))
    return x * 1.5


def unchanged(x):
    y = jnp.exp(x)
    del y
    return x


def tripled(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args) * 3

    return wrapper


@tripled
def decorated(x):
    return jnp.tanh(x)


@jax.jit
def jitted(x):
    return jnp.sin(x) + 1


@jax.jit
def jitted_pair(x):
    return {"a": jnp.sin(x)}, x * 7


class Layer:
    W = ROW * np.eye(2)

    def __call__(self, x):
        return jnp.tanh(x @ self.W)

    def method(self, x):
        return x @ self.W


def calls(W, E, s):
    scores = readout(W, E[s])
    layer = Layer()
    called = layer(scores)
    by_method = layer.method(called)
    three = decorated(by_method)
    once = jitted(three)
    twice = jitted(once)
    mapping, seven = jitted_pair(twice)
    as_it_was = unchanged(seven + mapping["a"])
    log = []
    beside = logged(as_it_was, log)
    return jnp.sum(beside + log[0])


def forms(W, E, s):
    x = E[s]
    (walrus := jnp.sin(x))
    a, b = jnp.exp(walrus), walrus * 2
    c, d = two(a + b)
    lines = (
        c
        + d
        * 2
    )  # fmt: skip
    chained = (
        lines
        .astype(jnp.float32)
        .cumsum()
    )  # fmt: skip
    chained -= b
    typed: jax.Array = chained @ W
    first, *_ = [typed * 0.5, typed]
    listed = [jnp.cos(first), first - 1]
    e, f = [jnp.cos(first), listed[0] * listed[1]]
    chosen = jnp.sin(e) if x.ndim else e
    both = same = chosen * f
    square = lambda v: v * v
    squared = square(both + same)
    return squared.sum()


def loops(W, E, s):
    h = E[s]
    for _ in range(3):
        h = jnp.tanh(h)
    for _ in range(2):
        h = readout(W, h) + 0.1
    for _ in range(2):
        g = readout(W, h)
        h = g
    total = sum([h[0], g[1], h[0] * 2])
    product = functools.reduce(lambda p, v: p * v, [h, g, W[0]])
    sines = list(map(jnp.sin, [product]))
    i = 0
    while i < 2:
        i, h = i + 1, h * total
    return sum(sines[0] + h)


def transforms(W, E, s):
    x = W @ E[s]
    each = jax.vmap(lambda z: jnp.sin(z) * 2)(x)
    slope = jax.grad(lambda z: jnp.tanh(z).sum())(each)
    pair = jax.value_and_grad(lambda z: jnp.tanh(z).sum())(each)
    own = fnn.value_and_grad(lambda z: jnp.tanh(z).sum())(each)
    last, rows = lax.scan(lambda carry, u: (jnp.sin(carry), carry * u), slope.sum(), each)
    softened = jax.nn.softmax(rows)
    rectified = fnn.ops.relu(softened)
    saved = jax.checkpoint(two)(rectified)
    chosen = lax.cond(last > 0, lambda v: v * 2, lambda v: v, saved[1])
    biggest = jnp.max(jnp.where(chosen > 0.1, chosen, 0.0))
    middle = jnp.linalg.norm(rows)
    pieces = jnp.split(chosen, 2)
    return pair[1].sum() + biggest * middle + own[1][0] + pieces[0].sum()


EXPECTED = {
    calls: "scores called by_method three once twice seven beside",
    forms: "x walrus a b c d lines chained chained₂ typed e f chosen both squared",
    loops: "h h₂ h₃ h₄ h₅ h₆ h₇ g g₂ total",
    transforms: "x each last rows softened rectified chosen biggest middle",
}


@pytest.mark.parametrize("function", EXPECTED, ids=lambda f: f.__name__)
def test_a_value_has_the_name_that_it_is_assigned_to(function):
    W, E = jnp.array([[0.3, 0.7], [-0.2, 0.9]]), jnp.array([[0.1, 0.2], [0.5, -0.4]])
    truth = bound(function, W, E, 1)
    nodes = [n for n in fnn.graph(function)(W, E, 1) if n.equation and n.value is not None]
    labels = [n.label for n in nodes]
    assert set(EXPECTED[function].split()) <= set(labels)
    for node in nodes:
        name = node.label.rstrip("₀₁₂₃₄₅₆₇₈₉")
        if name[1:].isdigit() or name == function.__name__:
            continue
        shaped = [v for v in truth[name] if v.shape == node.shape]
        assert any(np.allclose(v, node.value, rtol=1e-5) for v in shaped), node


def test_a_name_at_hand_is_not_given_to_an_argument():
    def function(W, E, s):
        scores = readout(W, E[s])
        return scores.sum()

    graph = fnn.graph(function)(jnp.eye(2), jnp.ones((3, 2)), 1)
    assert graph["scores"].operation == "dot_general" and graph["scores"].shape == (2,)
    rows = graph["scores"].inputs[1]
    assert rows.label.startswith("v")


def test_source_that_is_gone_or_changed_names_nothing(tmp_path):
    path = tmp_path / "gone.py"
    code = "def f(x):\n    h = x * 2\n    return h + 1\n"
    space = {}
    exec(compile(code, str(path), "exec"), space)
    assert [n.label for n in fnn.graph(space["f"])(1.0)] == ["x", "v1", "f"]
    path.write_text(code.replace("def f", "def other").replace("h =", "q ="))
    assert [n.label for n in fnn.graph(space["f"])(1.0)] == ["x", "v1", "f"]
