"""Curvature for numbers of any size, on meshes, in JAX's strict modes, with bad arguments."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from sweeps import exhaustive, sweep

from fnn import curvature, ops

N = 4
NAN, INF = float("nan"), float("inf")
KEY = jax.random.key(0)


def normal(seed, *shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def close(a, b, rtol=1e-5, atol=0.0):
    chex.assert_trees_all_close(a, b, rtol=rtol, atol=atol)


def stepped(optimizer, gradient, p, batch):
    return optimizer.update(gradient, optimizer.init(p), p, batch=batch)


# --------------------------------------------------------------------------------- sizes of numbers


@pytest.mark.parametrize("scale", sweep([1e-12, 1e-6, 1.0, 1e6, 1e12], quick=[1e-12, 1e6]))
def test_kfac_solves_a_linear_problem_in_any_units(scale):
    """Inputs times c, and weights by c smaller: one step to the least squares' solution."""
    X = normal(0, 20, 3)
    Y = X @ normal(1, 3, 2)
    model, W, batch = lambda W, x: W @ x, jnp.zeros((2, 3), "float32"), (X * scale, Y)
    loss = ops.squared_error
    mean = lambda W: jnp.mean(jax.vmap(lambda x, t: loss(model(W, x), t))(*batch))
    damping = {"damping": 1e-10 * scale**2, "min_damping": 0.0}
    optimizer = curvature.kfac(model, loss, batch, samples=0, **damping)
    update, state = jax.jit(lambda W: stepped(optimizer, jax.grad(mean)(W), W, batch))(W)
    close(update * scale, np.linalg.lstsq(X, Y, rcond=None)[0].T, 1e-3)
    close(state.ratio, 1.0)


@pytest.mark.parametrize("gap", [20.0, 30.0])
@pytest.mark.parametrize("top", [0, 1, 2])
def test_the_curvature_of_a_softmax_that_is_sure(gap, top):
    """Of float32 logits, to float32's digits: 1 − p is far below its rounding errors."""
    model, loss = lambda z, x: z + x, ops.softmax_cross_entropy
    z = np.array([0.0, 1.0, -2.0])
    z[top] += gap
    p = np.exp(z - z.max()) / np.sum(np.exp(z - z.max()))
    others = [sum(p[k] for k in range(3) if k != i) for i in range(3)]
    H = np.diag(p * others) - np.outer(p, p) * (1 - np.eye(3))
    given = jnp.array(z, "float32"), (jnp.zeros((1, 3), "float32"), jnp.zeros(1, "int32"))
    found = jax.jit(lambda z, b: curvature.ggn_vector_product(model, loss)(z, b).to_dense())(*given)
    close(found, H.astype("float32"), 1e-5)
    diagonal = jax.jit(curvature.ggn_diagonal(model, loss))(*given)
    close(diagonal, np.diag(H).astype("float32"), 1e-5)


@pytest.mark.parametrize("positions", [1, 2])
def test_the_hessian_diagonal_in_half_precision_of_unscaled_inputs(positions):
    """Squares of inputs of 300 are beyond float16, the entries are not."""
    model = lambda W, x: jnp.tanh(x @ W.T).sum(0)
    loss = lambda z, t: ops.squared_error(z, t) / 16
    W, x = normal(0, 2, 3) / 300, 300 + normal(1, 4, positions, 3)
    batch = x.astype("float16"), normal(2, 4, 2).astype("float16")
    half = jax.jit(curvature.hessian_diagonal(model, loss))
    found = half(W.astype("float16"), batch)
    W, x, t = (jnp.asarray(a.astype("float16"), "float64") for a in (W, *batch))
    mean = lambda W: jnp.mean(jax.vmap(lambda x, t: loss(model(W, x), t))(x, t))
    wanted = jnp.diag(jax.hessian(mean)(W).reshape(6, 6)).reshape(2, 3)
    assert jnp.abs(wanted).max() < jnp.finfo("float16").max
    close(found.astype("float64"), wanted, 0.02, 0.02 * float(jnp.abs(wanted).max()))


@exhaustive
def test_kfac_where_the_ratio_of_the_factors_overflows():
    """A large factor of inputs, a vanishing one of a saturated sigmoid: π² is beyond float32. The
    curvature is far below λ, so that the step is along −∇L / λ, as by hand in float64."""
    model, p, x = lambda p, x: p @ x, jnp.array([[0.0, 1.0]], "float32"), [[1e9, 80.0]]
    batch = jnp.array(x, "float32"), jnp.zeros((1, 1), "float32")
    gradient = jnp.array([[3e-14, -1e-14]], "float32")
    optimizer = curvature.kfac(
        model, ops.sigmoid_binary_cross_entropy, batch, damping=0.1, samples=0, learning_rate=1.0
    )
    update, _ = stepped(optimizer, gradient, p, (-batch[0], batch[1]))
    x, s = np.array(x, "float64")[0], 1 / (1 + np.exp(np.array(80.0)))
    a, g = np.sum(x**2) / 2, s * (1 - s)
    pi = np.sqrt(a / g)
    A = np.outer(x, x) + pi * np.sqrt(0.1) * np.eye(2)
    wanted = -np.linalg.solve(A, np.array(gradient, "float64")[0]) / (g + np.sqrt(0.1) / pi)
    assert a / g > float(jnp.finfo("float32").max)
    close(update[0], wanted, 1e-3, 1e-16)


@exhaustive
def test_kfac_on_unscaled_pixels():
    """A saturated softmax has no curvature, and the model's minimum lies far beyond the loss's."""
    xs = jnp.round(16 * jax.random.uniform(KEY, (64, 32), "float32"))
    labels = jnp.arange(64) % 5
    model = lambda p, x: p["V"] @ jax.nn.relu(p["W"] @ x)
    p = {"W": normal(1, 24, 32) / 4, "V": normal(2, 5, 24) / 3}
    loss, batch = ops.softmax_cross_entropy, (xs, labels)
    value = lambda p: jnp.mean(jax.vmap(lambda x, t: loss(model(p, x), t))(*batch))
    optimizer = curvature.kfac(model, loss, batch)

    def step(carry, _):
        p, state = carry
        now, gradient = jax.value_and_grad(value)(p)
        update, state = optimizer.update(gradient, state, p, batch=batch)
        return (optax.apply_updates(p, update), state), now

    run = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, length=25)[1])
    losses = run(p)
    assert losses[0] > 10 and losses.max() < 2 * losses[0] and losses[-1] < 1.5


@exhaustive
@pytest.mark.parametrize("scale", sweep([1e-12, 1e12], quick=[1e12]))
def test_eigenvalues_and_natural_gradients_in_any_units(scale):
    """A squared norm of such numbers is out of float32's range."""
    X, targets = normal(0, 20, 3), normal(1, 20, 2)
    model, W = lambda W, x: W @ x, normal(2, 2, 3)
    batch = X * scale, targets * scale
    operator = curvature.ggn_vector_product(model, ops.squared_error)(W, batch)
    values, vectors = curvature.eigenpairs(operator, 2, KEY)
    G = 2 * np.asarray(X, "float64").T @ np.asarray(X, "float64") / 20
    wanted = np.linalg.eigvalsh(G)
    close(values / scale / scale, wanted[[-1, -1]], 1e-4)
    close(jnp.sum(vectors**2, axis=(1, 2)), jnp.ones(2), 1e-4)
    of_batch = curvature.natural_gradient(
        model, ops.squared_error, damping=float(0.5 * scale**2), max_iterations=100
    )
    _, natural = of_batch(W, batch)
    gradient = 2 * (np.asarray(W) @ X.T - targets.T) @ X / 20
    close(natural, gradient @ np.linalg.inv(G + 0.5 * np.eye(3)), 1e-3, 1e-5)


def test_eigenpairs_of_a_matrix_of_zeros():
    model, p, batch = network()
    operator = curvature.ggn_vector_product(model, ops.multiclass_hinge)(p, batch)
    values, vectors = curvature.eigenpairs(operator, 3, KEY)
    assert values.tolist() == [0, 0, 0]
    rows = jnp.concatenate([x.reshape(3, -1) for x in jax.tree.leaves(vectors)], axis=1)
    close(rows @ rows.T, jnp.eye(3, dtype=rows.dtype), atol=1e-5)


# -------------------------------------------------------------------------------------- everything


def network():
    p = {"W": normal(0, 3, 3), "b": normal(1, 3), "V": normal(2, 2, 3)}
    model = lambda p, x: p["V"] @ jnp.tanh(p["W"] @ x + p["b"])
    return model, p, (normal(3, N, 3), jnp.arange(N) % 2)


def kfac(model, loss, p, batch):
    options = {"momentum": 0.5, "learning_rate": 0.1, "trust_region": 1.0, "l2": 0.1}
    update, _ = stepped(curvature.kfac(model, loss, batch, **options), p, p, batch)
    optimizer = curvature.kfac(model, loss, batch, adapt_damping_every=1)
    return update, stepped(optimizer, p, p, batch)[0]


DRAW = {"key": KEY, "samples": 1}
FUNCTIONS = {
    "GGN product": lambda m, f, p, b: curvature.ggn_vector_product(m, f)(p, b).damped(0.1) @ p,
    "Hessian product": lambda m, f, p, b: curvature.hessian_vector_product(m, f)(p, b) @ p,
    "Fisher product": lambda m, f, p, b: curvature.fisher_vector_product(m, f)(p, b) @ p,
    "drawn": lambda m, f, p, b: curvature.fisher_vector_product(m, f, **DRAW)(p, b) @ p,
    "empirical Fisher": lambda m, f, p, b: curvature.empirical_fisher(m, f)(p, b) @ p,
    "dense": lambda m, f, p, b: curvature.ggn_vector_product(m, f)(p, b).to_dense(),
    "eigenvalues": lambda m, f, p, b: curvature.eigenpairs(
        curvature.ggn_vector_product(m, f)(p, b), 2, KEY, steps=4
    )[0],
    "GGN diagonal": lambda m, f, p, b: curvature.ggn_diagonal(m, f)(p, b),
    "diagonal, drawn": lambda m, f, p, b: curvature.ggn_diagonal(m, f, **DRAW)(p, b),
    "Hessian's diagonal": lambda m, f, p, b: curvature.hessian_diagonal(m, f)(p, b),
    "trace": lambda m, f, p, b: curvature.ggn_trace(m, f)(p, b),
    "gram": lambda m, f, p, b: curvature.ggn_gram(m, f)(p, b, b),
    "ntk": lambda m, f, p, b: curvature.ntk(m)(p, b[0]),
    "factors": lambda m, f, p, b: curvature.kronecker_factors(m, f)(p, b),
    "empirical factors": lambda m, f, p, b: curvature.kronecker_factors(m, f, empirical=True)(p, b),
    "natural": lambda m, f, p, b: curvature.natural_gradient(m, f, max_iterations=3)(p, b),
    "kfac": kfac,
}


def together(p, batch, names=tuple(FUNCTIONS)):
    model, loss = network()[0], ops.softmax_cross_entropy
    return {name: FUNCTIONS[name](model, loss, p, batch) for name in names}


@exhaustive
@pytest.mark.parametrize("names", sweep(["all", "some"], quick=["some"]))
@pytest.mark.parametrize("in_context", sweep([True, False], quick=[False]))
def test_a_batch_spread_over_a_mesh_with_explicit_axes(in_context, names):
    """The numbers of one device, laid out as the parameters are."""
    _, p, batch = network()
    some = ("GGN product", "GGN diagonal", "factors")
    names = some if names == "some" else tuple(FUNCTIONS)
    run = jax.jit(functools.partial(together, names=names))
    wanted = run(p, batch)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    context = jax.set_mesh(mesh) if in_context else contextlib.nullcontext()
    with context:
        copies = jax.device_put(p, NamedSharding(mesh, PartitionSpec()))
        found = run(copies, spread)
        close(found, wanted, 1e-3, 1e-4)
        eager = FUNCTIONS["GGN diagonal"](network()[0], ops.softmax_cross_entropy, copies, spread)
        close(eager, wanted["GGN diagonal"], 1e-3, 1e-4)


STRICT = {
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_check_tracer_leaks": True,
    "jax_debug_key_reuse": True,
}


@exhaustive
@pytest.mark.parametrize("name", sweep([*STRICT, "jax_debug_nans"], ["jax_numpy_dtype_promotion"]))
def test_jaxs_strict_modes(name):
    """Traced, and for nans run, under x64 in float32."""
    _, p, batch = network()
    before = getattr(jax.config, name)
    jax.config.update(name, STRICT.get(name, True))
    try:
        if name in STRICT:
            # One after the other: each draws with the same key.
            for f in FUNCTIONS.values():
                of = functools.partial(f, network()[0], ops.softmax_cross_entropy)
                jax.eval_shape(of, p, batch)
        else:
            jax.block_until_ready(jax.jit(together)(p, batch))
    finally:
        jax.config.update(name, before)


KFAC_OPTIONS = {  # it adapts its damping and takes new factors at its second step
    "learning_rate": 0.1, "momentum": 0.5, "trust_region": 1.0, "l2": 0.1, "damping": 0.2,
    "damping_decay": 0.9, "min_damping": 1e-3, "max_damping": 1e3, "average": 0.9,
    "adapt_damping_every": 2, "factors_every": 2, "inverses_every": 2,
}  # fmt: skip


def test_options_as_numpys_numbers():
    """Of 64 bits, beside parameters in float32: they change no dtype, and no number."""
    model, p, batch = network()
    of_numpy = lambda x: np.int64(x) if isinstance(x, int) else np.float64(x)
    damping = {"damping": 0.1, "tolerance": 1e-3}

    def found(convert):
        options = {name: convert(x) for name, x in KFAC_OPTIONS.items()}
        optimizer = curvature.kfac(model, ops.softmax_cross_entropy, batch, **options)
        options = {name: convert(x) for name, x in damping.items()}
        of = curvature.natural_gradient(model, ops.softmax_cross_entropy, **options)
        state, update = optimizer.init(p), jax.jit(optimizer.update)
        for _ in range(2):
            change, state = update(p, state, p, batch=batch)
        return change, state._replace(key=None), jax.jit(of)(p, batch)

    wanted = found(lambda x: x)
    for promotion in ("standard", "strict"):
        with jax.numpy_dtype_promotion(promotion):
            own = found(of_numpy)
        chex.assert_trees_all_equal_shapes_and_dtypes(own, wanted)
        close(own, wanted)


# ------------------------------------------------------------------------------------ bad arguments


def options_of(make, model, loss, **options):
    return lambda: make(model, loss, **options)


def _bad_numbers():
    batch = network()[2]
    kfac = lambda model, loss, **options: curvature.kfac(model, loss, batch, **options)
    for make, names in (
        (kfac, "damping damping_decay min_damping max_damping average l2 momentum trust_region "
               "learning_rate"),
        (curvature.natural_gradient, "damping tolerance"),
    ):  # fmt: skip
        for name in names.split():
            yield from ((make, name, v, ValueError) for v in (NAN, -1.0, -INF))
            yield from ((make, name, v, TypeError) for v in ("1", 1j, [1.0], True))
    for make, names in (
        (kfac, "adapt_damping_every factors_every inverses_every samples"),
        (curvature.natural_gradient, "max_iterations"),
        (curvature.hessian_diagonal, "chunk"),
        (curvature.ggn_diagonal, "samples"),
        (curvature.ggn_trace, "samples"),
        (curvature.fisher_vector_product, "samples"),
        (curvature.kronecker_factors, "samples largest_block"),
    ):
        for name in names.split():
            yield make, name, -1, ValueError
            yield from ((make, name, v, TypeError) for v in (NAN, 2.0, "1", None, True))
    for make, name, value, error in (
        (kfac, "kind", "both", ValueError),
        (kfac, "kind", 1, TypeError),
        (curvature.kronecker_factors, "kind", None, TypeError),
        (curvature.kronecker_factors, "empirical", "yes", TypeError),
        (curvature.ggn_diagonal, "part", "half", ValueError),
        (curvature.ggn_trace, "part", None, TypeError),
        (curvature.ggn_vector_product, "part", "half", ValueError),
        (curvature.ggn_diagonal, "key", 0, TypeError),
        (curvature.ggn_trace, "key", jax.random.split(KEY), ValueError),
        (curvature.kronecker_factors, "key", jnp.zeros(2), TypeError),
        (kfac, "key", 0, TypeError),
    ):
        yield make, name, value, error


def test_options_are_refused_by_name():
    model, _, _ = network()
    for make, name, value, error in _bad_numbers():
        with pytest.raises(error, match=rf"\w+: {name} must be"):
            make(model, ops.softmax_cross_entropy, **{name: value})
            pytest.fail(f"{make} took {name} = {value!r}")
    for make in (
        curvature.ggn_vector_product, curvature.hessian_vector_product, curvature.ggn_gram,
        curvature.fisher_vector_product, curvature.empirical_fisher, curvature.ggn_diagonal,
        curvature.ggn_trace, curvature.hessian_diagonal, curvature.kronecker_factors,
        curvature.natural_gradient,
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"{make.__name__}: model must be a function model"):
            make(None, ops.softmax_cross_entropy)
        with pytest.raises(TypeError, match=f"{make.__name__}: loss must be a function loss"):
            make(model, "softmax")
    with pytest.raises(TypeError, match="ntk: model must be"):
        curvature.ntk(3)
    with pytest.raises(ValueError, match='part="all" has no samples'):
        curvature.ggn_trace(model, ops.squared_error, part="all", **DRAW)


def test_batches_parameters_and_vectors_are_refused_by_name():
    model, p, (xs, labels) = network()
    loss = ops.softmax_cross_entropy
    for make in (curvature.ggn_vector_product, curvature.ggn_diagonal, curvature.natural_gradient,
                 curvature.hessian_diagonal, curvature.empirical_fisher):  # fmt: skip
        of = make(model, loss)
        with pytest.raises(ValueError, match=r"batch must be a pair \(inputs, targets\)"):
            of(p, xs)
        with pytest.raises(ValueError, match="first axis"):
            of(p, (xs, labels[:2]))
        with pytest.raises(ValueError, match="empty"):
            of(p, (xs[:0], labels[:0]))
        with pytest.raises(TypeError, match=r"\['b'\] has dtype int"):
            of(p | {"b": jnp.zeros(3, int)}, (xs, labels))
        with pytest.raises(TypeError, match=r"\['b'\] has dtype complex.*real and imaginary"):
            of(p | {"b": jnp.zeros(3, complex)}, (xs, labels))
        with pytest.raises(TypeError, match=r"\['b'\] is no array but str"):
            of(p | {"b": "3"}, (xs, labels))
        with pytest.raises(ValueError, match="params is a tree without arrays"):
            of(None, (xs, labels))
    operator = curvature.ggn_vector_product(model, loss)(p, (xs, labels))
    for vector, error, message in (
        ({k: p[k] for k in "WV"}, ValueError, r"has nothing for params\['b'\]"),
        (p | {"c": p["b"]}, ValueError, r"an array too many, at params\['c'\]"),
        (p | {"b": p["b"][:2]}, ValueError, r"has shape \(2,\) at params\['b'\].*shape \(3,\)"),
        (p | {"b": p["b"].astype("float64")}, TypeError, r"has dtype float64 at params\['b'\]"),
        (p | {"b": "3"}, TypeError, r"at params\['b'\] must be an array"),
        (None, ValueError, "has nothing for"),
    ):
        with pytest.raises(error, match=message):
            operator(vector)
    for damping in (NAN, INF, "1"):
        with pytest.raises((ValueError, TypeError), match="damped: damping must be"):
            operator.damped(damping)
    for k, key, options, error in (
        (0, KEY, {}, ValueError), (1.0, KEY, {}, TypeError), (30, KEY, {}, ValueError),
        (2, 0, {}, TypeError), (2, KEY, {"steps": 0}, ValueError),
        (2, KEY, {"steps": 1}, ValueError), (2, KEY, {"steps": NAN}, TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match="eigenpairs: "):
            curvature.eigenpairs(operator, k, key, **options)
    with pytest.raises(TypeError, match="operator must be a LinearOperator"):
        curvature.eigenpairs(jnp.eye(3), 1, KEY)
    optimizer = curvature.kfac(model, loss, (xs, labels))
    state = optimizer.init(p)
    with pytest.raises(ValueError, match=r"kfac: the gradient .* nothing for params\['b'\]"):
        optimizer.update({k: p[k] for k in "WV"}, state, p, batch=(xs, labels))
    with pytest.raises(ValueError, match="example_batch must be a pair"):
        curvature.kfac(model, loss, xs)
    with pytest.raises(TypeError, match=r"\['b'\] has dtype int"):
        optimizer.init(p | {"b": jnp.zeros(3, int)})


def test_a_network_without_outputs_has_no_curvature():
    W, batch = jnp.ones((0, 4)), (jnp.ones((N, 4)), jnp.ones((N, 0)))
    model, loss = lambda p, x: p["W"] @ x + p["b"], lambda z, t: jnp.sum(z**4 * t)
    p = {"W": W, "b": jnp.ones(())}
    zeros = jax.tree.map(jnp.zeros_like, p)
    for of in curvature.ggn_diagonal, curvature.hessian_diagonal:
        close(of(model, loss)(p, batch), zeros)
    close(curvature.ggn_vector_product(model, loss)(p, batch)(p), zeros)
    assert curvature.ggn_trace(model, loss)(p, batch) == 0
    assert curvature.ggn_gram(model, loss)(p, batch).shape == (0, 0)
    factors = curvature.kronecker_factors(model, loss)(p, batch)
    assert not factors["b"].to_dense().any()
