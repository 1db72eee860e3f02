"""`fnn.graph` under JAX's strict modes, and what it keeps alive."""

import contextlib
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import exhaustive

import fnn

MODES = {
    "rank": lambda: jax.numpy_rank_promotion("raise"),
    "dtype": lambda: jax.numpy_dtype_promotion("strict"),
    "nans": lambda: jax.debug_nans(True),
    "infs": lambda: jax.debug_infs(True),
    "leaks": lambda: jax.checking_leaks(),
    "no x64": lambda: jax.enable_x64(False),
    "x64": lambda: jax.enable_x64(True),
    "keys": lambda: jax.debug_key_reuse(True),
}


def loss(params, x):
    def step(h, w):
        return jnp.tanh(params["W"] @ h + w), jnp.sum(h)

    h, sums = jax.lax.scan(step, x, params["ws"])
    h = fnn.ops.relu(jnp.sort(h)[:2]) + jax.vmap(jnp.cos)(h)[:2]
    h = jax.lax.cond(h[0] > 0, lambda h: h * 2, lambda h: h, h)
    return jnp.sum(h**2) + sums.mean() + jax.checkpoint(jnp.sin)(h[0])


def arguments(dtype):
    ws = jnp.linspace(-1, 1, 6).reshape(2, 3).astype(dtype)
    return {"W": jnp.eye(3, dtype=dtype) / 2, "ws": ws}, jnp.array([0.3, -0.5, 0.7], dtype)


CASES = [(mode, "float32") for mode in MODES]
CASES += [("dtype", "bfloat16"), ("rank", "float16")]


QUICK = [("dtype", "bfloat16"), ("rank", "float32"), ("leaks", "float32")]


@exhaustive
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [pytest.param(*c, marks=() if c in QUICK else exhaustive) for c in CASES],
)
def test_a_graph_works_in_jax_strict_modes(mode, dtype, tmp_path):
    with MODES[mode]() if mode != "leaks" else contextlib.nullcontext():
        args = arguments(dtype)
        want = jax.grad(loss)(*args)
        with MODES[mode]():
            graph = fnn.graph(loss)(*args).backprop()
        steps = list(graph.steps())
        assert steps and all(str(s) and repr(s) for s in steps)
        table = str(graph)
        assert "scan" in table and "‖g‖" in table and "step" in table
        assert graph.coverage().ruled["scan"] == 1
        for name, gradient in want.items():
            got = graph[f"params['{name}']"].gradient
            assert got.dtype == dtype
            rtol = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}[dtype]
            np.testing.assert_allclose(
                np.asarray(got, float), np.asarray(gradient, float), rtol=rtol, atol=rtol
            )
        pytest.importorskip("pygraphviz")
        assert graph.to_svg(tmp_path / "graph.svg", max_boxes=5).startswith("<svg")


def test_nothing_is_kept_of_a_graph_that_is_gone(tmp_path):
    class Held:
        """A closure's object."""

        scale = 2.0

    def references():
        held, big = Held(), jnp.arange(5000.0)

        def function(x):
            def step(carry, row):
                return carry + held.scale * row, None

            rows = jax.lax.scan(step, jnp.zeros(50), x.reshape(100, 50))[0]
            return jnp.sum(fnn.ops.tanh(held.scale * x) * jnp.sin(big)) + rows.sum()

        x = jnp.linspace(0, 1, 5000)
        graph = fnn.graph(function)(x).backprop()
        text = str(graph), graph.to_dot(max_boxes=2), [str(step) for step in graph.steps()]
        steps = list(graph.steps())
        bodies = [node.graphs for node in graph]
        del text, bodies
        found = [graph, graph["x"], steps[0], held, function, big, x, graph.nodes[-2].value]
        return [weakref.ref(thing) for thing in found]

    alive = references()
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


def test_the_memory_of_graph_after_graph_stays_the_same():
    def once(k):
        weights = jnp.full((100, 100), float(k))

        def function(x):
            return jnp.sum(jnp.tanh(weights @ x))

        graph = fnn.graph(function)(jnp.ones(100)).backprop()
        assert str(graph) and len(list(graph.steps())) > 2

    def held():
        gc.collect()
        return sum(a.nbytes for a in jax.live_arrays())

    once(0)
    before = held()
    for k in range(1, 5):
        once(k)
    assert held() - before < 100 * 100 * 8
