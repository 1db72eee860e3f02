"""Options of a training step: what is trained, clipping, averages; against optax alone."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled_programs
from sweeps import exhaustive, sweep

import fnn
from fnn import ops
from fnn.layers import Linear, chain
from fnn.train import NonFiniteError, train_step

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 5)), RNG.integers(3, size=24)
DATA = (X, Y)
NET = chain(body=chain(first=Linear(7), act=ops.tanh), head=Linear(3))
PARAMS = NET.init(KEY, X[0])
LOSS = fnn.supervised(NET, ops.softmax_cross_entropy)


def plain(params, x, y):
    """The mean loss of a batch, in JAX's own functions."""
    first, head = params["body"]["first"], params["head"]
    scores = jnp.tanh(x @ first["W"].T + first["b"]) @ head["W"].T + head["b"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.asarray(y)).mean()


def close(a, b, rtol=1e-5):
    chex.assert_trees_all_close(jax.device_get(a), jax.device_get(b), rtol=rtol, atol=1e-7)


def equal(a, b):
    chex.assert_trees_all_equal(jax.device_get(a), jax.device_get(b))


def run(steps, loss=LOSS, params=PARAMS, batch=DATA, optimizer=None, **options):
    step = train_step(loss, optimizer or optax.adam(0.1), **options)
    state = step.init(params)
    for _ in range(steps):
        state, metrics = step(state, batch)
    step.finish(state)
    return state, metrics


def by_optax(steps, mean, params, optimizer):
    """The parameters after some steps, the optimiser's state, and the last gradient."""

    @jax.jit
    def one(params, state):
        g = jax.grad(mean)(params)
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state, g

    state = optimizer.init(params)
    for _ in range(steps):
        params, state, g = one(params, state)
    return params, state, g


# ------------------------------------------------------------------------------------ trainable


def only_head(path, leaf):
    return path.startswith("head.") and leaf.shape[0] == 3


WHERE = {"pattern": "head.*", "several": ("head.W", "*d.b"), "function": only_head}


@pytest.mark.parametrize("kind", sweep(WHERE, ["function"]))
def test_only_what_is_trainable_changes(kind):
    """As a loop over optax that closes over what is frozen."""
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    own = lambda head: plain(PARAMS | {"head": head}, X, Y)
    head, state, g = by_optax(3, own, PARAMS["head"], optimizer)
    found, metrics = run(3, optimizer=optimizer, trainable=WHERE[kind])
    assert jax.tree.structure(found.params) == jax.tree.structure(PARAMS)
    close(found.params["head"], head)
    chex.assert_trees_all_equal(
        jax.device_get(found.params["body"]), jax.device_get(PARAMS["body"])
    )
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(g)), rel=1e-5)
    # Nothing is kept for the frozen: as many arrays as for the head alone.
    shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]
    assert shapes(found.opt_state) == shapes(state)


def wide_step(**options):
    net = chain(first=Linear(64), a=ops.tanh, second=Linear(64), b=ops.tanh, third=Linear(64))
    params = jax.tree.map(lambda p: p.astype(jnp.float32), net.init(KEY, jnp.zeros(64)))
    loss = lambda p, x: jnp.sum(net(p, x) ** 2)
    step = train_step(loss, optax.sgd(0.1, momentum=0.9), **options)
    batch = jnp.ones((256, 64), jnp.float32)
    compiled = step._compiled.lower(step.init(params), batch, None).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis()


def test_frozen_parameters_cost_no_products():
    """Of 8 products (3 forward, 3 weights' gradients, 2 inputs') 4 remain for the last layer."""
    product = 2 * 256 * 64 * 64
    everything, all_memory = wide_step()
    last, memory = wide_step(trainable="third.*")
    assert everything >= 8 * product
    assert 4 * product <= last <= 4.3 * product
    # The state's buffers are taken over: parameters, and the momentum of one layer of three.
    arrays = 4 * (64 * 64 + 64)
    assert 4 * arrays <= memory.alias_size_in_bytes <= 4 * arrays + 100
    assert all_memory.alias_size_in_bytes >= 6 * arrays
    assert memory.temp_size_in_bytes <= all_memory.temp_size_in_bytes


def test_frozen_leaves_may_be_of_any_dtype():
    params = {"W": jnp.ones(3), "table": jnp.array([2, 0, 1]), "scale": jnp.ones((), jnp.bfloat16)}
    loss = lambda p, x: jnp.sum((p["W"][p["table"]] * p["scale"].astype(x.dtype) - x) ** 2)
    state, _ = run(2, loss, params, X[:, :3], trainable="W", ema=0.5)
    assert state.params["table"].dtype == params["table"].dtype
    chex.assert_trees_all_equal_dtypes(state.params, params)
    with pytest.raises(TypeError, match=r"params\['table'\] has dtype int.*trainable=... leave it"):
        train_step(loss, optax.sgd(0.1)).init(params)


@exhaustive
def test_masks_and_labels_of_optax_beside_trainable():
    """An optimiser gets None in the place of what is frozen; trees of flags still fit."""
    flags = {"body": {"first": {"W": True, "b": False}}, "head": {"W": True, "b": False}}
    for mask in (flags, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)):
        optimizer = optax.adamw(0.1, weight_decay=0.5, mask=mask)
        found, _ = run(2, optimizer=optimizer, trainable="head.*")
        wanted, _ = run(2, optimizer=optimizer)
        assert not np.allclose(found.params["head"]["W"], wanted.params["head"]["W"])
    groups = optax.partition({"a": optax.sgd(0.1), "b": optax.sgd(0.0)}, lambda p: _names(p))
    found, _ = run(1, optimizer=groups, trainable="head.*")
    close(found.params["head"]["W"], run(1, optimizer=optax.sgd(0.1))[0].params["head"]["W"])
    close(found.params["head"]["b"], PARAMS["head"]["b"])


def _names(params):
    name = lambda path, _: "a" if path[-1].key == "W" else "b"
    return jax.tree_util.tree_map_with_path(name, params)


@exhaustive
def test_line_searches_see_what_is_trained():
    found, metrics = run(12, optimizer=optax.lbfgs(), trainable="head.*")
    before = plain(PARAMS, X, Y)
    assert metrics["loss"] < before
    head = PARAMS["head"]
    optimizer = optax.lbfgs()
    state = optimizer.init(head)
    value_of = lambda head: plain(PARAMS | {"head": head}, X, Y)
    for _ in range(12):
        value, g = jax.value_and_grad(value_of)(head)
        updates, state = optimizer.update(g, state, head, value=value, grad=g, value_fn=value_of)
        head = optax.apply_updates(head, updates)
    close(value_of(found.params["head"]), value_of(head), rtol=1e-4)


def test_what_trainable_refuses():
    with pytest.raises(ValueError, match="trainable chooses none .* body.first.W, body.first.b"):
        train_step(LOSS, optax.sgd(0.1), trainable="heads.*").init(PARAMS)
    for bad in (3, [1], b"head"):
        with pytest.raises(TypeError, match="train_step: trainable must be a pattern of paths"):
            train_step(LOSS, optax.sgd(0.1), trainable=bad)
    only_head = lambda p, x: jnp.sum(p["head"]["W"]) * x[0]
    step = train_step(only_head, optax.sgd(0.1), trainable="body.*")
    with pytest.raises(ValueError, match="doesn't depend on the parameters that are trained"):
        step(step.init(PARAMS), X)
    # A state made for another choice.
    state = train_step(LOSS, optax.adam(0.1)).init(PARAMS)
    with pytest.raises(ValueError, match="isn't this optimiser's state"):
        train_step(LOSS, optax.adam(0.1), trainable="head.*")(state, DATA)


@exhaustive
def test_a_bad_step_names_what_is_trained():
    loss = lambda p, x: jnp.sum(p["a"]["W"] * 0) + jnp.sqrt(jnp.sum(p["b"]["W"] * x))
    params = {"a": {"W": jnp.ones(2)}, "b": {"W": jnp.zeros(2)}}
    step = train_step(loss, optax.sgd(0.1), trainable="b.*", ema=0.9)
    state, _ = step(step.init(params), X[:, :1] * 0)
    with pytest.raises(NonFiniteError) as error:
        step.finish(state)
    assert error.value.names == ("params['b']['W']",)
    step = train_step(LOSS, optax.sgd(np.inf), trainable="head.b")
    state, _ = step(step.init(PARAMS), DATA)
    with pytest.raises(NonFiniteError) as error:
        step.finish(state)
    assert error.value.names == ("params['head']['b']",)


# ----------------------------------------------------------------------------------------- clip


@pytest.mark.parametrize("length", sweep([0.05, 100.0], [0.05]))
def test_clipping_is_that_of_optax(length):
    chained = optax.chain(optax.clip_by_global_norm(length), optax.adam(0.1))
    params, _, g = by_optax(3, lambda params: plain(params, X, Y), PARAMS, chained)
    found, metrics = run(3, clip=length)
    close(found.params, params)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(g)), rel=1e-5)


@pytest.mark.parametrize("dtype", sweep([jnp.float16, jnp.bfloat16, jnp.complex64], [jnp.float16]))
def test_clipping_in_other_dtypes(dtype):
    params = {"a": jnp.zeros(2, dtype), "b": jnp.zeros((), dtype)}
    g = {"a": jnp.array([300.0, 400.0]), "b": jnp.zeros(())}
    factor = 1j if dtype == jnp.complex64 else 1
    g["a"] = (g["a"] * factor).astype(dtype)

    def loss(p, x):
        inner = jnp.sum(p["a"] * jnp.conj(g["a"])) + p["b"] * 0
        return inner.real.astype(jnp.float32)

    state, metrics = run(1, loss, params, jnp.ones(1), optimizer=optax.sgd(1.0), clip=5.0)
    assert metrics["grad_norm"] == 500.0
    wanted = -np.array([3.0, 4.0]) * factor
    np.testing.assert_allclose(np.asarray(state.params["a"]).astype(wanted.dtype), wanted, 5e-3)


def test_clipping_hides_no_nan():
    loss = lambda p, x: jnp.sqrt(jnp.sum(p * x))
    step = train_step(loss, optax.sgd(0.1), clip=1.0)
    state, _ = step(step.init(jnp.zeros(2)), jnp.zeros((1, 2)))
    with pytest.raises(NonFiniteError, match="the gradient of params is not finite"):
        step.finish(state)
    for bad in (0, -1.0, np.nan, np.inf, "1", True):
        with pytest.raises((TypeError, ValueError), match="train_step: clip must be"):
            train_step(loss, optax.sgd(0.1), clip=bad)


# ------------------------------------------------------------------------------------------ ema


@exhaustive
@pytest.mark.parametrize("decay", sweep([0.0, 0.5, 0.999], [0.5]))
def test_the_average_is_that_of_optax_and_of_the_closed_form(decay):
    step = train_step(LOSS, optax.adam(0.1), ema=decay)
    state, seen = step.init(PARAMS), []
    close(state.ema, PARAMS)
    average = optax.ema(decay)
    ema_state, update = average.init(PARAMS), jax.jit(average.update)
    for t in range(1, 6):
        state, _ = step(state, DATA)
        seen.append(jax.device_get(state.params))
        wanted, ema_state = update(state.params, ema_state)
        close(state.ema, wanted)
        weights = np.array([decay ** (t - i) for i in range(1, t + 1)])
        closed = jax.tree.map(lambda *ps, w=weights: np.average(ps, axis=0, weights=w), *seen)
        close(state.ema, closed)
    found = fnn.evaluate(LOSS, state.ema, DATA)["loss"]
    assert found == pytest.approx(float(plain(state.ema, X, Y)), rel=1e-5)
    assert "ema: 4 arrays, 66 numbers" in repr(state)


def test_the_average_of_half_precision_is_in_float32():
    loss = lambda p, x: jnp.sum((p["w"] - x.astype(p["w"].dtype)) ** 2).astype(jnp.float32)
    state, _ = run(2, loss, {"w": jnp.ones(5, jnp.bfloat16)}, X, ema=0.9)
    assert state.ema["w"].dtype == jnp.float32
    assert state.params["w"].dtype == jnp.bfloat16


def test_the_average_leaves_out_steps_that_are_not_taken():
    step = train_step(LOSS, optax.adam(0.1), ema=0.5, nonfinite="skip", check=False)
    state, _ = step(step.init(PARAMS), DATA)
    before = jax.device_get(state.ema)
    state, metrics = step(state, (X * np.nan, Y))
    assert metrics["skipped"] == 1
    equal(state.ema, before)


def test_an_average_that_overflows_is_a_bad_step():
    step = train_step(lambda p, x: jnp.sum(p["w"] * 0 * x), optax.sgd(0.1), ema=0.5)
    large = jnp.full(5, 2e38, jnp.float32)
    state = step.init({"w": large})._replace(ema={"w": -large})
    state, _ = step(state, X.astype(np.float32))
    with pytest.raises(NonFiniteError, match=r"params\['w'\] \(or of ema\['w'\]") as error:
        step.finish(state)
    assert error.value.names == ("params['w']",)
    equal(state.ema, {"w": -large})


def test_a_state_with_or_without_an_average():
    bare = train_step(LOSS, optax.sgd(0.1))
    step = train_step(LOSS, optax.sgd(0.1), ema=0.9)
    with pytest.raises(ValueError, match=r"keeps an average .*state._replace\(ema="):
        step(bare.init(PARAMS), DATA)
    with pytest.raises(ValueError, match=r"doesn't keep up.*state._replace\(ema=None\)"):
        bare(step.init(PARAMS), DATA)
    with pytest.raises(ValueError, match="state.ema must be a tree like state.params"):
        step(step.init(PARAMS)._replace(ema={"W": jnp.ones(3)}), DATA)
    # As the message says.
    state, _ = bare(bare.init(PARAMS), DATA)
    state = state._replace(ema=jax.tree.map(jnp.copy, state.params))
    step(state, DATA)
    for bad in (1.0, -0.1, np.nan, "0.9", True):
        with pytest.raises((TypeError, ValueError), match="train_step: ema must be"):
            train_step(LOSS, optax.sgd(0.1), ema=bad)


# ------------------------------------------------------------------------------------- together


OPTIONS = {"trainable": "head.*", "ema": 0.9, "clip": 0.5}


def test_fit_looks_at_what_is_trained():
    loss = lambda p, x: jnp.sum(p["head"]["W"]) * x[0]
    with pytest.raises(ValueError, match="doesn't depend on the parameters that are trained"):
        fnn.fit(loss, PARAMS, X, optax.sgd(0.1), epochs=1, shuffle=False, trainable="body.*")


def mean_squares(params, x):
    return jnp.mean((params["w"] * x) ** 2) + params["b"] ** 2


def test_a_pickled_step_keeps_its_options():
    params = {"w": jnp.ones(5), "b": jnp.ones(())}
    step = train_step(mean_squares, UPDATE, trainable="w", ema=0.5, clip=0.1, nonfinite="skip")
    again = pickle.loads(pickle.dumps(step))
    found = [s(s.init(params), X) for s in (step, again)]
    equal(*found)
    assert found[1][0].ema is not None and found[1][0].params["b"] == 1


def _init(params):
    return ()


def _update(updates, state, params=None):
    return jax.tree.map(lambda u: -0.1 * u, updates), state


UPDATE = optax.GradientTransformation(_init, _update)


@pytest.mark.parametrize("nonfinite", sweep(["raise", "skip", "ignore"], ["skip"]))
def test_compiled_once_in_buffers_of_its_own(nonfinite):
    step = train_step(LOSS, optax.adam(0.1), nonfinite=nonfinite, **OPTIONS)
    state = step.init(PARAMS)
    with compiled_programs() as programs:
        for _ in range(3):
            old = state
            state, _ = step(state, DATA)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert programs.count("jit(step)") == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(PARAMS))


@exhaustive
def test_steps_in_a_scan_and_over_seeds():
    step = train_step(LOSS, optax.sgd(0.1), **OPTIONS)
    batches = jax.tree.map(lambda a: jnp.stack([a, a]), DATA)
    state, _ = jax.lax.scan(step, step.init(PARAMS), batches)
    close(state, run(2, optimizer=optax.sgd(0.1), **OPTIONS)[0])
    starts = jax.tree.map(lambda p: jnp.stack([p, p + 1]), PARAMS)
    states, _ = jax.vmap(step, (0, None))(jax.vmap(step.init)(starts), DATA)
    other = run(
        1, params=jax.tree.map(lambda p: p + 1, PARAMS), optimizer=optax.sgd(0.1), **OPTIONS
    )
    close(jax.tree.map(lambda x: x[1], states), other[0])
