"""`train_step`: against loops written by hand, every kind of optimiser, bad input, inf and nan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled_programs
from sweeps import sweep

import fnn
from fnn import ops
from fnn.layers import Linear, Mode, chain
from fnn.train import NonFiniteError, State, train_step

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def close(a, b, rtol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-8), a, b)


# A small least-squares problem in float64, with a solution in closed form.
A = RNG.normal(size=(24, 3))
Y = A @ np.array([1.0, -2.0, 0.5]) + 0.3 + 0.1 * RNG.normal(size=24)
PROBLEM = (A, Y)
START = {"W": jnp.zeros(3), "b": jnp.zeros(())}


def squares(params, example):
    x, y = example
    error = params["W"] @ x + params["b"] - y
    return error**2, {"error": jnp.abs(error)}


def mean_squares(params):
    """The same loss for the whole batch, by numpy's own broadcasting."""
    return jnp.mean((A @ params["W"] + params["b"] - Y) ** 2)


def solution():
    columns = np.column_stack([A, np.ones(len(A))])
    w = np.linalg.lstsq(columns, Y, rcond=None)[0]
    return {"W": w[:3], "b": w[3]}


def run(optimizer, steps, loss=squares, params=START, batch=PROBLEM, **options):
    step = train_step(loss, optimizer, **options)
    state = step.init(params)
    for _ in range(steps):
        state, metrics = step(state, batch)
    step.finish()
    return state, metrics


# -------------------------------------------------------------------------- against the by-hand


def test_one_step_of_gradient_descent():
    state, metrics = run(optax.sgd(0.1), 1)
    gradient = jax.grad(mean_squares)(START)
    close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, START, gradient))
    assert state.step == 1
    assert metrics["loss"] == pytest.approx(float(mean_squares(START)))
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(gradient)))
    assert metrics["error"] == pytest.approx(np.mean(np.abs(Y)))
    assert list(metrics) == ["error", "grad_norm", "loss"]


def test_converges_to_the_closed_form():
    state, metrics = run(optax.sgd(0.2), 300)
    close(state.params, solution(), rtol=1e-5)
    residual = Y - A @ solution()["W"] - solution()["b"]
    assert metrics["loss"] == pytest.approx(np.mean(residual**2))


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 6)
MASK = {"W": True, "b": False}
OPTIMIZERS = {
    "schedule": optax.adam(SCHEDULE),
    "clipping": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)),
    "decay with a mask": optax.adamw(0.1, weight_decay=0.5, mask=MASK),
    "masked": optax.masked(optax.sgd(0.1), MASK),
    "multi_transform": optax.multi_transform(
        {"train": optax.adam(0.1), "freeze": optax.set_to_zero()}, {"W": "train", "b": "freeze"}
    ),
    "accumulation": optax.MultiSteps(optax.sgd(0.1), 2),
    "hyperparameters": optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE),
    "noise": optax.chain(optax.add_noise(0.01, 0.5, key=3), optax.sgd(0.1)),
    "noise, typed key": optax.chain(optax.add_noise(0.01, 0.5, key=KEY), optax.sgd(0.1)),
    "lookahead-like": optax.contrib.schedule_free_sgd(0.1),
    "one keyword, and no other": optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05)),
    "adafactor": optax.adafactor(0.1),
    "lion": optax.lion(0.01),
}


QUICK = [
    "multi_transform",
    "accumulation",
    "hyperparameters",
    "noise, typed key",
    "one keyword, and no other",
    "adafactor",
]


@pytest.mark.parametrize("name", sweep(OPTIMIZERS, QUICK))
def test_equals_a_loop_over_optax(name):
    optimizer = OPTIMIZERS[name]

    @jax.jit
    def by_hand(params, opt_state):
        gradient = jax.grad(mean_squares)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = START, optimizer.init(START)
    for _ in range(4):
        params, opt_state = by_hand(params, opt_state)
    state, _ = run(optimizer, 4)
    close(state.params, params)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(opt_state)


def plateau(factor):
    return optax.chain(
        optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=factor, patience=1, rtol=0.9)
    )


EXTRA = {
    "polyak": (lambda: optax.polyak_sgd(max_learning_rate=0.5), ("value",)),
    "plateau": (lambda: plateau(0.5), ("value",)),
    "momo": (lambda: optax.contrib.momo(0.1), ("value",)),
    "lbfgs": (lambda: optax.lbfgs(), ("value", "grad", "value_fn")),
    "backtracking": (
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
        ("value", "grad", "value_fn"),
    ),
}


@pytest.mark.parametrize("name", sweep(EXTRA, ["polyak", "backtracking"]))
def test_optimisers_with_extra_arguments(name):
    make, wanted = EXTRA[name]
    optimizer = optax.with_extra_args_support(make())

    @jax.jit
    def by_hand(params, opt_state):
        value, gradient = jax.value_and_grad(mean_squares)(params)
        given = {"value": value, "grad": gradient, "value_fn": mean_squares}
        given = {k: given[k] for k in wanted}
        updates, opt_state = optimizer.update(gradient, opt_state, params, **given)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = START, optimizer.init(START)
    for _ in range(10):
        params, opt_state = by_hand(params, opt_state)
    state, _ = run(make(), 10)
    close(state.params, params, rtol=1e-5)
    if name == "lbfgs":
        close(state.params, solution(), rtol=1e-4)


def test_complex_parameters_descend():
    target = jnp.array([1 + 2j, -3j])

    def loss(params, example):
        return jnp.sum(jnp.abs(params["z"] - example) ** 2)

    params = {"z": jnp.zeros(2, complex)}
    state, metrics = run(optax.sgd(0.1), 100, loss, params, jnp.stack([target, target]))
    close(state.params["z"], target, rtol=1e-5)
    assert metrics["grad_norm"].dtype.kind == "f"


def test_a_network_with_our_operations_equals_plain_jax():
    net = chain(hidden=Linear(7), act=ops.tanh, out=Linear(4))
    x, y = RNG.normal(size=(9, 5)), RNG.integers(4, size=9)
    params = net.init(KEY, jnp.zeros(5))

    def loss(params, example):
        return ops.softmax_cross_entropy(net(params, example[0]), example[1])

    def plain(params):
        h = jnp.tanh(x @ params["hidden"]["W"].T + params["hidden"]["b"])
        logits = h @ params["out"]["W"].T + params["out"]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(y)).mean()

    state, metrics = run(optax.sgd(0.5), 1, loss, params, (x, y))
    value, gradient = jax.jit(jax.value_and_grad(plain))(params)
    close(state.params, jax.tree.map(lambda p, g: np.asarray(p) - 0.5 * g, params, gradient))
    assert metrics["loss"] == pytest.approx(float(value))


# --------------------------------------------------------------------------- the step as a program


def test_init_copies_and_the_step_donates():
    step = train_step(squares, optax.adam(0.1))
    params = {"W": jnp.ones(3), "b": jnp.zeros(())}
    first = step.init(params)
    second, _ = step(first, PROBLEM)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, second)))
    close(params, {"W": np.ones(3), "b": 0.0})
    with pytest.raises(ValueError, match="was given to a step already"):
        step(first, PROBLEM)
    step(second, PROBLEM)


@pytest.mark.parametrize(
    "call",
    [
        lambda state: fnn.fit(squares, state, PROBLEM, optax.adam(0.1), epochs=1, shuffle=False),
        lambda state: fnn.evaluate(squares, state, PROBLEM),
        lambda state: fnn.find_learning_rate(squares, state, PROBLEM, steps=5, batch_size=2),
        lambda state: fnn.loss_surface(squares, state, PROBLEM, key=jax.random.key(0)),
        lambda state: fnn.activation_statistics(squares)(state, PROBLEM),
    ],
    ids=["fit", "evaluate", "find_learning_rate", "loss_surface", "activation_statistics"],
)
def test_a_state_that_was_donated_is_refused(call):
    step = train_step(squares, optax.adam(0.1))
    first = step.init({"W": jnp.ones(3), "b": jnp.zeros(())})
    step(first, PROBLEM)
    with pytest.raises(ValueError, match="was given to a step already"):
        call(first)


@pytest.mark.parametrize("state", [3, {"W": jnp.ones(3)}])
def test_finish_takes_a_state(state):
    with pytest.raises(TypeError, match="step.finish: state is the State of step.init"):
        train_step(squares, optax.adam(0.1)).finish(state)


def test_optimisers_that_keep_the_parameters_themselves_get_a_copy():
    params = {"W": jnp.ones(3), "b": jnp.zeros(())}
    keeps = optax.GradientTransformation(lambda p: p, lambda u, s, p: (u, s))
    state, _ = run(keeps, 1, params=params)
    close(state.opt_state, params)


def test_compiled_once_for_each_shape():
    traces = 0

    def loss(params, example):
        nonlocal traces
        traces += 1
        return squares(params, example)

    step = train_step(loss, optax.adam(SCHEDULE), check=False)
    # Numbers that Python or JAX types weakly must not cost a second compilation.
    state = step.init({"W": np.zeros(3), "b": 0.0})
    with compiled_programs() as programs:
        state, _ = step(state, PROBLEM)
        once = traces
        for _ in range(3):
            state, _ = step(state, PROBLEM)
        assert traces == once
        state, _ = step(state, (A[:5], Y[:5]))
        assert traces == 2 * once
        state, _ = step(state, (A[5:10], Y[5:10]))
        state, _ = step(state, PROBLEM)
    assert traces == 2 * once
    assert programs.count("jit(step)") == 2


def test_low_precision_stays():
    def loss(params, x):
        return jnp.sum((params["w"] - x) ** 2)

    params = {"w": jnp.ones(3, jnp.bfloat16)}
    batch = jnp.zeros((4, 3), jnp.bfloat16)
    state, _ = run(optax.adam(0.1), 2, loss, params, batch)
    assert {x.dtype for x in jax.tree.leaves((state.params, state.opt_state[0].mu))} == {
        jnp.dtype(jnp.bfloat16)
    }


def test_scan_and_vmap_over_steps():
    step = train_step(squares, optax.sgd(0.1))
    batches = jax.tree.map(lambda a: jnp.stack([a, a, a]), PROBLEM)
    scanned, metrics = jax.lax.scan(step, step.init(START), batches)
    looped, _ = run(optax.sgd(0.1), 3)
    close(scanned, looped)
    assert metrics["loss"].shape == (3,)

    starts = jax.tree.map(lambda p: jnp.stack([p, p + 1]), START)
    states = jax.vmap(step.init)(starts)
    states, _ = jax.vmap(step, (0, None))(states, PROBLEM)
    other, _ = run(optax.sgd(0.1), 1, params=jax.tree.map(lambda p: p + 1, START))
    close(jax.tree.map(lambda x: x[1], states.params), other.params)


def test_a_batch_over_four_devices():
    mesh = jax.make_mesh((4,), ("batch",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    batch = jax.device_put(PROBLEM, sharding)
    step = train_step(squares, optax.adam(0.1))
    start = jax.device_put(START, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    state = step.init(start)
    assert len(state.params["W"].sharding.device_set) == 4
    for _ in range(2):
        state, _ = step(state, batch)
    alone, _ = run(optax.adam(0.1), 2)
    close(state, alone)


# ------------------------------------------------------------------------------------- keys


def noisy(params, example, key):
    return squares(params, example)[0] + jax.random.normal(key), {"noise": jax.random.uniform(key)}


def test_each_example_gets_its_own_key():
    step = train_step(noisy, optax.sgd(0.1))
    _, metrics = step(step.init(START), PROBLEM, key=KEY)
    _, again = step(step.init(START), PROBLEM, key=KEY)
    _, other = step(step.init(START), PROBLEM, key=jax.random.key(1))
    assert metrics["loss"] == again["loss"] != other["loss"]
    noise = [float(jax.random.normal(k)) for k in jax.random.split(KEY, len(Y))]
    assert metrics["loss"] == pytest.approx(np.mean(Y**2) + np.mean(noise))
    assert len(set(noise)) == len(Y)


def test_what_is_given_by_position_is_given_in_the_losss_order():
    def plain(params, example, key, mode, state):
        assert isinstance(mode, Mode)
        return params["W"] @ example * jax.random.uniform(key) * state, state + 1

    losses = [
        plain,
        lambda params, example, state, mode, key, /: plain(params, example, key, mode, state),
        lambda p, e, factor=1.0, mode=None, k=None, key=None, /, *, state: plain(
            p, factor * e, key, mode, state
        ),
    ]
    found = []
    for loss in losses:
        step = train_step(loss, optax.sgd(0.1))
        state = step.init({"W": jnp.ones(3)}, jnp.ones(()))
        state, metrics = step(state, jnp.ones((4, 3)), key=KEY)
        assert state.model_state == 2
        found.append(metrics["loss"])
    assert found[0] == found[1] == found[2] > 0


def test_a_key_where_there_should_be_one():
    with pytest.raises(TypeError, match="the loss takes a key"):
        step = train_step(noisy, optax.sgd(0.1))
        step(step.init(START), PROBLEM)
    with pytest.raises(TypeError, match="the loss takes none"):
        step = train_step(squares, optax.sgd(0.1))
        step(step.init(START), PROBLEM, key=KEY)
    scaled = functools.partial(lambda scale, p, e: scale * squares(p, e)[0], 2.0)
    step = train_step(scaled, optax.sgd(0.1))
    step(step.init(START), PROBLEM)


# --------------------------------------------------------------------------------- inf and nan


def fragile(params, example):
    """The gradient by `hidden.W` is nan where the example is negative; all else stays finite."""
    w = params["hidden"]["W"]
    root = jnp.sqrt(jnp.where(example < 0, jnp.sum(w * 0.0), jnp.sum(w**2)))
    return root + params["out"] * example


FRAGILE = {"hidden": {"W": jnp.ones(2)}, "out": jnp.ones(())}
GOOD, BAD = jnp.array([1.0, 2.0]), jnp.array([1.0, -2.0])


def test_nonfinite_gradient_is_named_and_not_applied():
    step = train_step(fragile, optax.adam(0.1))
    state, _ = step(step.init(FRAGILE), GOOD)
    good = jax.tree.map(np.array, state)
    step.finish()
    state, metrics = step(state, BAD)
    assert np.isnan(metrics["grad_norm"]) and np.isfinite(metrics["loss"])
    close(state, good)
    with pytest.raises(FloatingPointError) as error:
        step.finish()
    assert isinstance(error.value, NonFiniteError)
    assert error.value.step == 1 and error.value.names == ("params['hidden']['W']",)
    message = str(error.value)
    assert "step 1: the gradient of params['hidden']['W'] is not finite" in message
    assert "batch and the parameters that went in are finite" in message
    # The state in hand is good, and the error is told once.
    state, _ = step(state, GOOD)
    step.finish()
    assert state.step == 2


def test_nonfinite_is_raised_by_a_later_step():
    step = train_step(fragile, optax.sgd(0.1))
    state, metrics = step(step.init(FRAGILE), BAD)
    jax.block_until_ready((state, metrics))
    with pytest.raises(NonFiniteError, match="step 0"):
        for _ in range(40):  # at most IN_FLIGHT reports wait unread
            state, _ = step(state, GOOD)


def test_nonfinite_loss_names_the_example_and_the_data():
    step = train_step(squares, optax.sgd(0.1), check=False)
    x = A.copy()
    x[7, 1] = np.inf
    step(step.init(START), (x, Y))
    with pytest.raises(NonFiniteError) as error:
        step.finish()
    message = str(error.value)
    assert "the loss and the gradient of params['W'], params['b'] are not finite" in message
    assert "number 7 of the batch's 24" in message
    assert "batch[0] holds inf at index (7, 1)" in message
    assert error.value.names == ("loss", "params['W']", "params['b']")


def test_nonfinite_parameters_are_told_from_bad_data():
    step = train_step(squares, optax.sgd(0.1))
    step(step.init({"W": jnp.array([1.0, np.nan, 1.0]), "b": jnp.zeros(())}), PROBLEM)
    with pytest.raises(NonFiniteError, match=r"that went in hold inf or nan: params\['W"):
        step.finish()


def test_skip_and_ignore():
    step = train_step(fragile, optax.adam(0.1), nonfinite="skip")
    state, metrics = step(step.init(FRAGILE), GOOD)
    assert metrics["skipped"] == 0
    good = jax.tree.map(np.array, state)
    state, metrics = step(state, BAD)
    step.finish()
    assert metrics["skipped"] == 1
    close(state, good)
    state, _ = run(optax.sgd(0.1), 1, fragile, FRAGILE, BAD, nonfinite="ignore")
    assert np.isnan(state.params["hidden"]["W"]).all() and np.isfinite(state.params["out"])
    with pytest.raises(ValueError, match="'skip', 'ignore' or 'roll_back', but got 'warn'"):
        train_step(squares, optax.sgd(0.1), nonfinite="warn")


def test_a_gradient_too_large_for_its_norm():
    def loss(params, example):
        return params["w"] * example

    params = {"w": jnp.ones((), jnp.float32)}
    with pytest.raises(NonFiniteError, match=r"gradient of params\['w'\] is not finite"):
        run(optax.sgd(1e-30), 1, loss, params, jnp.full(2, 1e30, jnp.float32))


# ------------------------------------------------------------------------------------ bad input


def step_on(batch, loss=squares, params=START, **options):
    step = train_step(loss, optax.sgd(0.1), **options)
    with compiled_programs() as programs:
        step(step.init(params), batch)
    assert programs.count("jit(step)") == 1
    step.finish()


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((A[:5], Y), ValueError, r"batch\[0\] has 5, batch\[1\] has 24"),
        ((A[:0], Y[:0]), ValueError, r"batch is empty: batch\[0\] has shape \(0, 3\)"),
        ((A, 3.0), TypeError, r"batch\[1\] is 3.0 of type float, not an array"),
        ((A, jnp.ones(())), ValueError, r"batch\[1\] is a scalar"),
        ((), ValueError, "batch holds no arrays"),
    ],
)
def test_bad_batch(batch, error, message):
    with pytest.raises(error, match=message):
        step_on(batch)
    with pytest.raises(error, match=message):
        step_on(batch, check=False)


def test_nan_in_the_batch():
    x = A.copy()
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"batch\[0\] \(shape \(24, 3\).*first at index \(3, 2\)"):
        step_on((x, Y))
    with pytest.raises(ValueError, match=r"holds nan"):
        step_on((jnp.asarray(x), Y))
    with pytest.raises(NonFiniteError):
        step_on((x, Y), check=False)


NET = chain(Linear(4), ops.relu, Linear(3))
NET_PARAMS = NET.init(KEY, jnp.zeros(2))
X = RNG.normal(size=(6, 2))


def cross_entropy(params, example):
    return ops.softmax_cross_entropy(NET(params, example["x"]), example["y"])


def hinge(params, example):
    return ops.multiclass_hinge(NET(params, example["x"]), example["y"])


@pytest.mark.parametrize("loss", [cross_entropy, hinge])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("bad", [3, -1])
def test_labels_out_of_range(loss, kind, bad):
    y = kind(np.array([0, 1, 2, 0, bad, 1]))
    name = {cross_entropy: "softmax_cross_entropy", hinge: "multiclass_hinge"}[loss]
    with pytest.raises(
        ValueError,
        match=rf"batch\['y'\] holds the label {bad} at index 4, but {name} gets .* 3 classes",
    ):
        step_on({"x": X, "y": y}, loss, NET_PARAMS)


def test_labels_of_later_batches():
    step = train_step(cross_entropy, optax.sgd(0.1))
    state, _ = step(step.init(NET_PARAMS), {"x": X, "y": np.array([0, 1, 2, 0, 1, 2])})
    bad = np.array([0, 1, 2, 0, 1, 7])
    with pytest.raises(ValueError, match=r"holds the label 7 at index 5"):
        step(state, {"x": X, "y": bad})
    # On the device the loss comes out as nan, and the error says why.
    step(state, {"x": X, "y": jnp.asarray(bad)})
    with pytest.raises(NonFiniteError, match=r"The data is to blame.*holds the label 7 at index 5"):
        step.finish()


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_labels_in_a_column_of_an_array_of_other_integers(kind):
    """As in a table. It is transposed, to have come through more than a slice."""

    def loss(params, example):
        columns = example[None].T[:, 0]
        return ops.softmax_cross_entropy(NET(params, columns[:2] / 255), columns[-1:][::-1][0])

    table = np.array([[200, 7, 0], [255, 0, 2], [-3, 90, 1]], np.int32)
    step_on(kind(table), loss, NET_PARAMS)
    table[1, 2] = 3
    with pytest.raises(ValueError, match=r"batch holds the label 3 at index \(1, 2\).*3 classes"):
        step_on(kind(table), loss, NET_PARAMS)
    step = train_step(loss, optax.sgd(0.1))
    state, _ = step(step.init(NET_PARAMS), table % 3)
    with pytest.raises(ValueError, match=r"batch holds the label 3 at index \(1, 2\)"):
        step(state, table)


def test_labels_at_each_position_and_after_a_change_of_shape():
    def loss(params, example):
        logits = jax.vmap(lambda x: NET(params, x))(example["x"])
        each = jax.vmap(ops.softmax_cross_entropy)(logits, example["y"][:, 0].astype(jnp.int32))
        return each.mean()

    x = RNG.normal(size=(2, 5, 2))
    y = np.zeros((2, 5, 1), np.int8)
    step_on({"x": x, "y": y}, loss, NET_PARAMS)
    y[1, 3, 0] = 3
    with pytest.raises(ValueError, match=r"holds the label 3 at index \(1, 3, 0\).*3 classes"):
        step_on({"x": x, "y": y}, loss, NET_PARAMS)


def test_masked_labels_are_not_mistaken_for_bad_ones():
    def loss(params, example):
        y = jnp.where(example["y"] < 0, 0, example["y"])
        return (example["y"] >= 0) * ops.softmax_cross_entropy(NET(params, example["x"]), y)

    step_on({"x": X, "y": np.array([0, 1, 2, 0, -1, 1])}, loss, NET_PARAMS)


def test_float_labels_and_wrong_shapes_come_from_the_loss():
    with pytest.raises((TypeError, ValueError), match="softmax_cross_entropy.*labels"):
        step_on({"x": X, "y": np.zeros(6)}, cross_entropy, NET_PARAMS)
    with pytest.raises(TypeError, match="multiclass_hinge.*labels"):
        step_on({"x": X, "y": np.zeros(6)}, hinge, NET_PARAMS)
    with pytest.raises(ValueError, match=r"Linear\(4\).*\(2,\).*\(5,\)"):
        step_on({"x": np.zeros((6, 5)), "y": np.zeros(6, int)}, cross_entropy, NET_PARAMS)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (lambda x: x, ValueError, r"must return a scalar for one example.*shape \(3,\)"),
        (lambda x: (x.sum(), x), TypeError, "scalar and a dict of metrics.*tuple of 2"),
        (lambda x: {"loss": x}, TypeError, "must return a scalar, but returned a dict"),
        (lambda x: None, TypeError, "returned a NoneType"),
        (lambda x: jnp.sum(x).astype(int), TypeError, "must return a real float.*int64"),
        (lambda x: (x.sum(), {"loss": 1.0}), ValueError, "metric 'loss', a name that training"),
        (lambda x: (x.sum(), {"epoch": 1.0}), ValueError, "metric 'epoch', a name that training"),
        (lambda x: (x.sum(), {"step": 1.0}), ValueError, "metric 'step', a name that training"),
        (lambda x: (x.sum(), {"": 1.0}), ValueError, "a metric whose name is empty"),
        (lambda x: (x.sum(), {"m": "text"}), TypeError, "metric 'm' that is no array but a str"),
        (lambda x: (x.sum(), {"m": None}), TypeError, "metric 'm' that is no array but a NoneType"),
        (lambda x: (x.sum(), {"m": jax.random.key(0)}), TypeError, "'m' of dtype key.*are numbers"),
    ],
)
def test_bad_loss(out, error, message):
    def bad_loss(params, example):
        return out(params["W"] * example[0])

    for check in (True, False):
        with pytest.raises(error, match="bad_loss.*" + message):
            step_on(PROBLEM, bad_loss, check=check)


def test_bad_parameters_and_states():
    step = train_step(squares, optax.adam(0.1))
    with pytest.raises(TypeError, match=r"params\['n'\] has dtype int.*are floats"):
        step.init({"W": jnp.ones(3), "n": jnp.array(3)})
    with pytest.raises(TypeError, match=r"params\['act'\] is .*of type .*parameters are arrays"):
        step.init({"W": jnp.ones(3), "act": jnp.tanh})
    with pytest.raises(ValueError, match="no arrays to train"):
        step.init({})
    with pytest.raises(TypeError, match=r"the State of step.init\(params\), but got a dict"):
        step(START, PROBLEM)
    state = step.init(START)
    with pytest.raises(ValueError, match="isn't this optimiser's state for state.params"):
        step(State({"W": jnp.ones(3)}, state.opt_state, state.step), PROBLEM)
    with pytest.raises(ValueError, match="isn't this optimiser's state"):
        train_step(squares, optax.sgd(0.1))(state, PROBLEM)
    with pytest.raises(ValueError, match=r"structures or\s+shapes differ"):
        step(State({"W": jnp.ones(4), "b": jnp.ones(())}, state.opt_state, state.step), PROBLEM)
    assert not state.step.is_deleted()
    with pytest.raises(TypeError, match="must be an optax transformation.*got 0.1"):
        train_step(squares, 0.1)
