"""Options of a training step: microbatches, half precision, and the scale of the loss."""

import functools
import itertools
import pickle

import chex
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest
from compiling import compiled_programs
from jax.sharding import AxisType
from sweeps import exhaustive, sweep

import fnn
from fnn import ops
from fnn.layers import BatchNorm, Linear, chain
from fnn.train import DynamicLossScale, NonFiniteError, train_step

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 5)), RNG.integers(3, size=24)
DATA = (X, Y)
START = {
    "hidden": {"W": jnp.asarray(RNG.normal(size=(7, 5)) / 2), "b": jnp.zeros(7)},
    "out": {"W": jnp.asarray(RNG.normal(size=(3, 7)) / 2), "b": jnp.zeros(3)},
}
SINGLE = jax.tree.map(lambda p: p.astype(jnp.float32), START)


def scores_of(params, x):
    hidden = jnp.tanh(params["hidden"]["W"] @ x + params["hidden"]["b"])
    return params["out"]["W"] @ hidden + params["out"]["b"]


def loss_of(params, example):
    x, label = example
    scores = scores_of(params, x)
    value = jax.nn.logsumexp(scores) - scores[label]
    return value, {"right": jnp.argmax(scores) == label, "scores": scores}


def noisy(params, example, key):
    x, label = example
    value, metrics = loss_of(params, (x + jax.random.normal(key, x.shape, x.dtype), label))
    return value, metrics | {"draw": jax.random.uniform(key)}


def close(a, b, rtol=1e-6, atol=1e-8):
    chex.assert_trees_all_close(jax.device_get(a), jax.device_get(b), rtol=rtol, atol=atol)


def run(steps, loss=loss_of, params=START, batch=DATA, optimizer=None, key=None, **options):
    step = train_step(loss, optimizer or optax.adam(0.1), **options)
    state = step.init(params)
    for _ in range(steps):
        state, metrics = step(state, batch, key)
    step.finish(state)
    return state, metrics


# ----------------------------------------------------------------------------------- accumulate


@pytest.mark.parametrize("parts", sweep([2, 3, 5, 24, 40], [5]))
@pytest.mark.parametrize(
    "loss", [pytest.param(loss_of, marks=exhaustive), noisy], ids=["plain", "with keys"]
)
def test_microbatches_are_the_whole_batch(loss, parts):
    key = KEY if loss is noisy else None
    wanted = run(3, loss, key=key)
    found = run(3, loss, key=key, accumulate=parts)
    close(found, wanted)
    chex.assert_trees_all_equal_dtypes(found, wanted)


@exhaustive
def test_the_first_bad_example_is_named_whatever_its_microbatch():
    step = train_step(loss_of, optax.sgd(0.1), accumulate=5, check=False)
    for bad in (0, 7, 23):
        x = X.copy()
        x[bad] = np.inf
        state, _ = step(step.init(START), (x, Y))
        with pytest.raises(NonFiniteError, match=f"is number {bad} of the batch's 24"):
            step.finish(state)


def test_microbatches_save_memory():
    net = chain(**{f"l{i}": Linear(128) for i in range(6)}, f=ops.tanh)
    params = net.init(KEY, jnp.zeros(128, jnp.float32))
    loss = lambda p, x: jnp.sum(jnp.tanh(net(p, jnp.tanh(x))) ** 2)
    batch = jnp.ones((4096, 128), jnp.float32)
    temp = {}
    for parts in (1, 8):
        step = train_step(loss, optax.sgd(0.1), accumulate=parts)
        lowered = step._compiled.lower(step.init(params), batch, None)
        temp[parts] = lowered.compile().memory_analysis().temp_size_in_bytes
    # A second gradient is added up; all else is an eighth.
    gradient = 4 * sum(p.size for p in jax.tree.leaves(params))
    assert temp[8] <= temp[1] / 8 + 2.5 * gradient


@exhaustive
def test_half_precision_gradients_add_up_in_float32():
    """256 gradients of 1 + 2⁻⁷: in bfloat16 their running sum would stop at 256."""
    params = jnp.zeros((), jnp.bfloat16)
    loss = lambda p, x: (p * x.astype(p.dtype)).astype(jnp.float32)
    batch = np.full(1024, 1 + 2**-7, np.float32)
    _, metrics = run(1, loss, params, batch, optax.sgd(1.0), accumulate=1024)
    assert metrics["grad_norm"] == 1 + 2**-7


def test_batch_statistics_are_those_of_microbatches():
    """And the running ones go from one to the next: as k forward passes in evaluation's terms."""
    net = chain(norm=BatchNorm(decay=0.5), out=Linear(1))
    loss = fnn.supervised(net, lambda y, t: (y[0] - t) ** 2)
    params, start = net.init(KEY, X[0]), net.init_state(X[0])
    step = train_step(loss, optax.sgd(0.1), accumulate=5)  # of 5, 5, 5, 5 and 4 rows
    state, metrics = step(step.init(params, start), (X, X[:, 0]))
    rows = [np.arange(i, 20, 4) for i in range(4)] + [np.arange(20, 24)]
    mean, total = start["statistics"]["norm"]["mean"], 0.0
    for r in rows:
        x = X[r]
        mean = 0.5 * mean + 0.5 * x.mean(0)
        normal = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        y = normal @ params["out"]["W"].T + params["out"]["b"]
        total += np.sum((y[:, 0] - X[r, 0]) ** 2)
    close(state.model_state["statistics"]["norm"]["mean"], mean, rtol=1e-5)
    assert metrics["loss"] == pytest.approx(float(total / 24), rel=1e-5)


@exhaustive
def test_line_searches_and_microbatches():
    search = lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10))
    wanted, _ = run(3, optimizer=search())
    found, _ = run(3, optimizer=search(), accumulate=5)
    close((found.params, found.opt_state), (wanted.params, wanted.opt_state), rtol=1e-5)


@exhaustive
@pytest.mark.parametrize(
    "kind, devices, parts",  # 5: of 5 and of 4 rows
    [
        (AxisType.Explicit, 4, 5),
        (AxisType.Explicit, 8, 5),
        (AxisType.Auto, 8, 5),
        ("layout", 8, 5),
    ],
)
def test_microbatches_of_a_batch_on_a_mesh(kind, devices, parts):
    is_layout = kind == "layout"
    mesh = jax.make_mesh((devices,), ("data",), **({} if is_layout else {"axis_types": (kind,)}))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = DATA if is_layout else jax.device_put((jnp.asarray(X), jnp.asarray(Y)), spec)
    layout = fnn.sharding.data_parallel(mesh) if is_layout else None
    found = run(2, noisy, batch=batch, key=KEY, accumulate=parts, layout=layout)
    close(found, run(2, noisy, key=KEY), rtol=1e-5)


# -------------------------------------------------------------------------------------- compute


@functools.partial(jax.jit, static_argnums=2)
def by_hand(params, batch, dtype, scale=1.0):
    """Value and gradient in a 16-bit dtype, by jax.grad of the whole batch."""
    x, y = batch

    def mean(params):
        low = jax.tree.map(lambda p: p.astype(dtype), params)
        losses = jax.vmap(lambda x, y: loss_of(low, (x, y))[0])(jnp.asarray(x, dtype), y)
        return scale * jnp.mean(losses.astype(jnp.float32))

    value, g = jax.value_and_grad(mean)(params)
    return value / scale, jax.tree.map(lambda g: g / scale, g)


@pytest.mark.parametrize("dtype", sweep([jnp.bfloat16, jnp.float16], [jnp.bfloat16]))
def test_the_forward_and_the_backward_pass_are_in_16_bits(dtype):
    batch = X.astype(np.float32), Y
    optimizer = optax.adam(0.1)
    scale = 2.0**15 if dtype == jnp.float16 else 1.0
    value, g = by_hand(SINGLE, batch, dtype, scale)
    found, metrics = run(1, params=SINGLE, batch=batch, optimizer=optax.sgd(1.0), compute=dtype)
    moved = jax.tree.map(lambda p, new: p - new, SINGLE, found.params)
    eps = float(jnp.finfo(dtype).eps)
    close(moved, g, rtol=4 * eps, atol=eps / 8)
    assert metrics["loss"] == pytest.approx(float(value), rel=eps)
    step = train_step(loss_of, optimizer, compute=dtype, ema=0.9)
    wide = {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    found = jax.eval_shape(step.traced, step.init(SINGLE), batch, None)
    assert {x.dtype for x in jax.tree.leaves(found)} <= wide
    # The products are in 16 bits: of the step, none is in 32.
    text = step._compiled.lower(step.init(SINGLE), batch, None).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    name = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]
    assert products and all(f"{name}>" in line and "f32>" not in line for line in products)


def test_a_mean_over_many_examples_is_in_float32():
    """4096 losses of 1 + 2⁻⁷: a mean in bfloat16 of values near 257 has steps of 2."""
    loss = lambda p, x: (p["w"] * x, {"x": x, "n": x > 0})
    batch = np.concatenate([np.full(4095, 1, np.float32), np.full(1, 1.5, np.float32)])
    params = {"w": jnp.ones((), jnp.float32)}
    _, metrics = run(1, loss, params, batch, optax.sgd(0.0), compute=jnp.bfloat16)
    assert metrics["loss"] == metrics["x"] == np.float32(1 + 0.5 / 4096)
    assert metrics["n"] == 1


def test_a_mean_over_counted_examples_is_summed_in_float32():
    """Parameters in float16: 100 losses of 1600 have no sum there. (Compiled, XLA may sum wide.)"""
    objective = train_step(lambda w, x: (w * x, {"x": x}), optax.sgd(0.1)).traced.objective
    x = jnp.full(128, 1600, jnp.float16)
    given = jnp.ones((), jnp.float16), lambda w: w, x, None, {}
    found = objective.found(*given, count=jnp.int32(100))
    assert found.means["loss"] == found.means["x"] == 1600
    np.testing.assert_allclose(found.gradient, 1600, rtol=2e-3)
    assert found.means["loss"].dtype == found.gradient.dtype == jnp.float16


def test_integers_keys_complex_and_the_network_s_state_keep_their_dtypes():
    seen = {}

    def loss(params, example, key, state):
        seen.update(jax.tree.map(lambda x: x.dtype, {"p": params, "e": example, "s": state}))
        value = jnp.abs(params["z"]) ** 2 + params["w"] * example["x"]
        return value.astype(jnp.float32), jax.tree.map(lambda s: s + 1, state)

    params = {"z": jnp.ones((), jnp.complex64), "w": jnp.ones((), jnp.float32)}
    batch = {"x": np.ones(4, np.float32), "i": np.arange(4), "k": jax.random.split(KEY, 4)}
    step = train_step(loss, optax.sgd(0.1), compute=jnp.bfloat16, accumulate=2)
    state = step.init(params, {"n": jnp.zeros((), jnp.float32)})
    state, _ = step(state, batch, KEY)
    assert state.model_state["n"] == 2 and state.model_state["n"].dtype == jnp.float32
    assert seen["p"] == {"z": jnp.complex64, "w": jnp.bfloat16}
    assert seen["e"]["x"] == jnp.bfloat16 and seen["e"]["i"] == batch["i"].dtype
    assert seen["e"]["k"] == KEY.dtype and seen["s"] == {"n": jnp.float32}


def test_what_compute_refuses():
    for bad in (jnp.int8, jnp.complex64, "half precision", 16, jnp.float8_e4m3fn, bool):
        with pytest.raises(TypeError, match="train_step: compute must be a dtype of real floats"):
            train_step(loss_of, optax.sgd(0.1), compute=bad)
    with jax.enable_x64(False), pytest.raises(ValueError, match="computes in 32 bits"):
        train_step(loss_of, optax.sgd(0.1), compute=jnp.float64)
    for bad in (0, -1, 2.5, "2", True, None):
        with pytest.raises((TypeError, ValueError), match="train_step: accumulate must be"):
            train_step(loss_of, optax.sgd(0.1), accumulate=bad)


# ----------------------------------------------------------------------------------- loss_scale


def linear(params, x):
    """The gradient is x."""
    return params["w"] * x


LINEAR = {"w": jnp.zeros((), jnp.float32)}


def ones(x):
    return jnp.full(4, x, jnp.float32)


def test_small_gradients_survive_in_float16_by_the_scale():
    # A cotangent of 2⁻²⁶ is 0 in float16, whose smallest number is 2⁻²⁴.
    small = lambda params, x: params["w"] * x[0] * x[1]
    batch = jnp.full((4, 2), 2.0**-13, jnp.float32)
    options = {"params": LINEAR, "optimizer": optax.sgd(1.0), "compute": jnp.float16}
    lost, _ = run(1, small, batch=batch, loss_scale=1, **options)
    kept, metrics = run(1, small, batch=batch, **options)
    fixed, _ = run(1, small, batch=batch, loss_scale=1024.0, **options)
    assert lost.params["w"] == 0
    assert kept.params["w"] == fixed.params["w"] == -(2.0**-26)
    assert metrics["loss_scale"] == 2.0**15 and metrics["skipped"] == 0
    assert metrics["grad_norm"] == 2.0**-26


@pytest.mark.parametrize("nonfinite", sweep(["raise", "skip", "ignore"], ["raise", "ignore"]))
def test_the_scale_falls_and_grows_as_jmp_s_does(nonfinite):
    rule = DynamicLossScale(initial=2.0**10, least=2.0**7, most=2.0**12, period=3)
    step = train_step(
        linear, optax.sgd(1.0), compute=jnp.float16, loss_scale=rule, nonfinite=nonfinite
    )
    state, applied = step.init(LINEAR), 0
    theirs = jmp.DynamicLossScale(2.0**10, period=3, min_loss_scale=2.0**7)
    # A gradient of 256 overflows (65504) from a scale of 2⁸ on.
    for x in [1, 1, 1, 1, 256, 1, 256, 256, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]:
        scale = min(float(theirs.loss_scale), 2.0**12)
        overflows = scale * x > 65504
        state, metrics = step(state, ones(x))
        assert metrics["loss_scale"] == scale
        assert metrics["skipped"] == overflows
        theirs = theirs.adjust(jnp.asarray(not overflows))
        assert state.loss_scale.good == theirs.counter
        applied += not overflows
        assert state.step == applied
    step.finish(state)
    assert state.loss_scale.scale == 2.0**12 and np.isfinite(state.params["w"])


def test_at_its_lower_bound_a_bad_step_is_an_error():
    rule = DynamicLossScale(initial=4.0, least=1.0)
    step = train_step(linear, optax.sgd(1.0), compute=jnp.float16, loss_scale=rule, check=False)
    state = step.init(LINEAR)
    for scale in (4.0, 2.0):
        state, metrics = step(state, ones(np.inf))
        step.finish(state)
        assert metrics["loss_scale"] == scale and metrics["skipped"] == 1
    state, metrics = step(state, ones(np.inf))
    with pytest.raises(NonFiniteError, match="(?s)step 0: .*gradient of params.*batch holds inf"):
        step.finish(state)
    assert state.loss_scale.scale == 1.0 and state.step == 0 and state.params["w"] == 0
    state, metrics = step(state, ones(1.0))
    step.finish(state)
    assert state.step == 1


def test_an_update_that_is_not_finite_is_no_matter_of_the_scale():
    step = train_step(linear, optax.sgd(np.inf), compute=jnp.float16)
    state, metrics = step(step.init(LINEAR), ones(1.0))
    with pytest.raises(NonFiniteError, match="the update of params"):
        step.finish(state)
    assert state.loss_scale.scale == 2.0**15 and metrics["skipped"] == 1


def test_a_scale_that_was_lost_ends_in_an_error_and_not_in_skipping():
    step = train_step(linear, optax.sgd(1.0), compute=jnp.float16)
    state = step.init(LINEAR)
    state = state._replace(loss_scale=state.loss_scale._replace(scale=jnp.float32(np.nan)))
    state, _ = step(state, ones(1.0))
    with pytest.raises(NonFiniteError):
        step.finish(state)


def test_a_state_with_or_without_a_scale():
    bare, step = (
        train_step(linear, optax.sgd(1.0)),
        train_step(linear, optax.sgd(1.0), compute=jnp.float16),
    )
    with pytest.raises(ValueError, match=r"dynamic, but state.loss_scale is None.*first\(\)"):
        step(bare.init(LINEAR), ones(1.0))
    with pytest.raises(ValueError, match=r"state._replace\(loss_scale=None\)"):
        bare(step.init(LINEAR), ones(1.0))
    step(bare.init(LINEAR)._replace(loss_scale=fnn.DynamicLossScale().first()), ones(1.0))


@pytest.mark.parametrize("bad", [1e-50, 1e-39, 1e39, 1e300])
def test_a_loss_scale_that_float32_has_not(bad):
    with pytest.raises(ValueError, match="train_step: loss_scale must be"):
        train_step(linear, optax.sgd(0.1), loss_scale=bad)


@pytest.mark.parametrize("scale", [1000.0, DynamicLossScale(initial=1000.0)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_scaled_gradient_in_float64_is_rounded_as_float64(scale, accumulate):
    with jax.enable_x64(True):
        xs = jnp.linspace(0.1, 1.7, 7)
        loss = lambda params, x: jnp.sum(jnp.sin(params["w"] * x))
        params = {"w": jnp.array([0.3, -1.1])}
        step = train_step(loss, optax.sgd(1.0), loss_scale=scale, accumulate=accumulate)
        state, _ = step(step.init(params), xs)
        moved = np.asarray(params["w"] - state.params["w"])
        wanted = np.mean(xs * np.cos(np.outer(params["w"], xs)), axis=1)
        np.testing.assert_allclose(moved, wanted, rtol=1e-14)


@pytest.mark.parametrize("x64", [False, True])
def test_numbers_of_numpy_make_the_same_rule_of_a_scale(x64):
    of_numpy = {"initial": np.float16(8), "least": np.float64(1), "most": jnp.float32(64)}
    rule = DynamicLossScale(**of_numpy, period=np.int64(1), factor=np.float64(2.0))
    assert rule == DynamicLossScale(8.0, 1.0, 64.0, 1, 2.0)
    assert all(type(value) in (int, float) for value in vars(rule).values())
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        assert rule.after(rule.first(), jnp.array(True)).scale == 16
        assert rule.after(rule.first(), jnp.array(False)).scale == 4


def test_what_loss_scale_refuses():
    for bad in ("static", 0, -1.0, np.nan, True, [1]):
        with pytest.raises((TypeError, ValueError), match="train_step: loss_scale must be"):
            train_step(linear, optax.sgd(0.1), loss_scale=bad)
    bounds = [{"least": 0}, {"most": 0.5}, {"initial": 0.5}, {"factor": 1}, {"period": 0}]
    beyond = [{"most": 2.0**127}, {"least": 1e-40}, {"factor": 1e300}, {"factor": 1 + 1e-9}]
    for bad in [*bounds, *beyond, {"least": np.nan}, {"period": 2.5}]:
        with pytest.raises((TypeError, ValueError), match=f"DynamicLossScale: {next(iter(bad))}"):
            DynamicLossScale(**({"initial": 2.0} | bad))


@exhaustive
def test_fit_with_everything_on_goes_on_where_it_was():
    rule = DynamicLossScale(initial=2.0**24, period=4)
    options = {"batch_size": 8, "key": KEY, "progress": False, "compute": jnp.float16}
    options |= {"loss_scale": rule, "ema": 0.9, "accumulate": 2, "clip": 0.5, "trainable": "out.*"}
    data = (X.astype(np.float32), Y)
    fit = lambda params, epochs: fnn.fit(
        loss_of, params, data, optax.adam(0.1), epochs=epochs, **options
    )
    whole, half = fit(SINGLE, 4), fit(SINGLE, 2)
    rest = fit(pickle.loads(pickle.dumps(jax.device_get(half.state))), 2)
    chex.assert_trees_all_equal(jax.device_get(rest.state), jax.device_get(whole.state))
    for tree in (whole.params, whole.state.ema):
        chex.assert_trees_all_equal(tree["hidden"], SINGLE["hidden"])
        assert not np.array_equal(tree["out"]["W"], SINGLE["out"]["W"])
    assert sum(whole.history["skipped"]) == whole.steps["skipped"].sum() > 0
    assert np.isfinite(whole.history["loss"]).all()
    assert whole.history["loss"][-1] < whole.history["loss"][0]
    assert whole.steps["loss_scale"][0] == 2.0**24 > whole.steps["loss_scale"][-1]


# ----------------------------------------------------------------------------- all combinations


def reference(steps, params, batch, *, trainable, accumulate, compute, loss_scale, ema, clip):
    """The step in optax's own words. Microbatches make no difference, so there are none."""
    optimizer = optax.adam(0.1)
    chosen = ["out"] if trainable else ["hidden", "out"]
    split = lambda p: ({k: p[k] for k in chosen}, {k: p[k] for k in p if k not in chosen})
    trained, frozen = split(params)
    if clip:
        optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
    opt_state = optimizer.init(trained)
    average = optax.ema(ema) if ema else None
    ema_state = average.init(params) if ema else None
    dtype = compute or jnp.float32

    @jax.jit
    def one(trained, opt_state, ema_state):
        value, g = by_hand(trained | frozen, batch, dtype, loss_scale or 1.0)
        g = split(g)[0]
        updates, opt_state = optimizer.update(g, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        mean = None
        if ema:
            mean, ema_state = average.update(trained | frozen, ema_state)
        return trained, opt_state, ema_state, mean, value, optax.tree.norm(g)

    for _ in range(steps):
        trained, opt_state, ema_state, mean, value, norm = one(trained, opt_state, ema_state)
    return trained | frozen, mean, value, norm


VALUES = {
    "trainable": (None, "out.*"),
    "accumulate": (1, 5),
    "compute": (None, jnp.bfloat16, jnp.float16),
    "loss_scale": (None, 256.0),
    "ema": (None, 0.7),
    "clip": (None, 0.2),
}
ALL = [dict(zip(VALUES, values, strict=True)) for values in itertools.product(*VALUES.values())]
# Each two of these values come together in one of these.
QUICK = [ALL[i] for i in (0, 26, 53, 92)]


@pytest.mark.parametrize(
    "options",
    [o if o in QUICK else pytest.param(o, marks=exhaustive) for o in ALL],
    ids=lambda o: " ".join(f"{k}" for k, v in o.items() if v not in (None, 1)) or "none",
)
def test_all_combinations_are_what_optax_says(options):
    batch = X.astype(np.float32), Y
    step = train_step(loss_of, optax.adam(0.1), **options)
    state = step.init(SINGLE)
    with compiled_programs() as programs:
        for _ in range(3):
            state, metrics = step(state, batch)
        step.finish(state)
    params, mean, value, norm = reference(3, SINGLE, batch, **options)
    # Adam divides by the gradient's size: where that is near 0, rounding is all there is.
    tolerance = 1e-5 if options["compute"] is None else 0.05
    close(state.params, params, rtol=tolerance, atol=tolerance)
    assert metrics["loss"] == pytest.approx(float(value), rel=tolerance)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=tolerance)
    if options["ema"]:
        close(state.ema, mean, rtol=tolerance, atol=tolerance)
    chex.assert_trees_all_equal_dtypes(state.params, SINGLE)
    assert programs.count("jit(step)") == 1


@exhaustive
def test_without_options_the_program_is_as_it_was():
    """As many FLOPs and temporary bytes as the same step by hand."""
    batch = X.astype(np.float32), Y.astype(np.int32)
    optimizer = optax.adam(0.1)

    def by_hand_step(params, opt_state, batch):
        def mean(params):
            losses, metrics = jax.vmap(loss_of, (None, 0))(params, batch)
            return losses.mean(), jax.tree.map(lambda m: m.mean(0), metrics)

        (value, metrics), g = jax.value_and_grad(mean, has_aux=True)(params)
        updates, opt_state = optimizer.update(g, opt_state, params)
        norm = optax.tree.norm(g)
        return optax.apply_updates(params, updates), opt_state, value, metrics, norm

    plain = jax.jit(by_hand_step, donate_argnums=(0, 1))
    wanted = plain.lower(SINGLE, optimizer.init(SINGLE), batch).compile()
    step = train_step(loss_of, optimizer, nonfinite="ignore")
    found = step._compiled.lower(step.init(SINGLE), batch, None).compile()
    assert found.cost_analysis()["flops"] <= 1.05 * wanted.cost_analysis()["flops"]
    temp = [c.memory_analysis().temp_size_in_bytes for c in (found, wanted)]
    assert temp[0] <= 1.1 * temp[1] + 256
