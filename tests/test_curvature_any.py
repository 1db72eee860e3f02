"""Curvature for any dtype, loss, network and size of numbers, against float64 and closed forms."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree
from sweeps import exhaustive, sweep

import fnn
from fnn import curvature, ops
from fnn.curvature.convex import is_convex

N = 3
LABELS = jnp.arange(N) % 3
DRAW = {"key": jax.random.key(0), "samples": 2}


def normal(seed, *shape, dtype="float64"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def flat(tree):
    return ravel_pytree(tree)[0]


def close(a, b, rtol=1e-8, atol=1e-10):
    as_numpy = lambda x: np.asarray(x.astype("float64"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(as_numpy(a), as_numpy(b), rtol=rtol, atol=atol),
        a,
        b,
    )


def cast(tree, dtype):
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def mlp(f=jnp.tanh, width=3):
    """A network of one example, with a parameter without entries and one that isn't used."""
    params = {
        "W": normal(0, 4, 3), "b": normal(1, 4), "V": normal(2, width, 4), "scale": jnp.ones(()),
        "empty": jnp.zeros((0, 3)), "frozen": normal(9, 2),
    }  # fmt: skip
    model = lambda p, x: p["scale"] * (p["V"] @ f(p["W"] @ x + p["b"])) + p["empty"].sum()
    return model, params, normal(3, N, 3)


def gradient_of(model, loss, params, batch):
    return jax.grad(lambda p: jnp.mean(jax.vmap(lambda x, t: loss(model(p, x), t))(*batch)))(params)


def everything(model, loss, params, batch):
    """What every function of the module gives."""
    product = lambda make: make(model, loss)(params, batch) @ params
    values, vectors = curvature.eigenpairs(
        curvature.ggn_vector_product(model, loss)(params, batch), 2, DRAW["key"], steps=12
    )
    optimizer = curvature.kfac(model, loss, batch, samples=0, adapt_damping_every=1)
    gradient = gradient_of(model, loss, params, batch)
    update, _ = optimizer.update(gradient, optimizer.init(params), params, batch=batch)
    times = lambda f: jax.tree.map(
        lambda f, p: f.times(p), f, params, is_leaf=lambda f: hasattr(f, "times")
    )
    return {
        "GGN": product(curvature.ggn_vector_product),
        "Hessian": product(curvature.hessian_vector_product),
        "empirical": product(curvature.empirical_fisher),
        "diagonal": curvature.ggn_diagonal(model, loss)(params, batch),
        "Hessian's diagonal": curvature.hessian_diagonal(model, loss)(params, batch),
        "trace": curvature.ggn_trace(model, loss)(params, batch),
        "gram": curvature.ggn_gram(model, loss)(params, batch),
        "ntk": curvature.ntk(model)(params, batch[0]),
        "factors": times(curvature.kronecker_factors(model, loss)(params, batch)),
        "reduced": times(curvature.kronecker_factors(model, loss, kind="reduce")(params, batch)),
        "natural": curvature.natural_gradient(model, loss, damping=1.0)(params, batch),
        "eigenvalues": values,
        "projections": jax.tree.map(lambda v: (v * v).sum(), vectors),
        "update": update,
    }


def drawn(model, loss, params, batch):
    """What every function gives that draws labels."""
    optimizer = curvature.kfac(model, loss, batch, learning_rate=0.1, momentum=0.9, l2=1e-2)
    gradient = gradient_of(model, loss, params, batch)
    update, state = optimizer.update(gradient, optimizer.init(params), params, batch=batch)
    return {
        "Fisher": curvature.fisher_vector_product(model, loss, **DRAW)(params, batch) @ params,
        "diagonal": curvature.ggn_diagonal(model, loss, **DRAW)(params, batch),
        "trace": curvature.ggn_trace(model, loss, **DRAW)(params, batch),
        "factors": curvature.kronecker_factors(model, loss, **DRAW)(params, batch),
        "update": (update, state),
    }


@functools.cache
def in_float64():
    model, params, xs = mlp()
    return jax.jit(
        functools.partial(everything, model, ops.softmax_cross_entropy)
    )(params, (xs, LABELS))  # fmt: skip


@exhaustive
def test_types_in_half_precision():
    """Traced only, under x64."""
    model, params, xs = mlp()
    params, xs = cast((params, xs), "bfloat16")
    of = functools.partial(everything, model, ops.softmax_cross_entropy)
    found = jax.eval_shape(of, params, (xs, LABELS))
    for name in ("GGN", "Hessian", "diagonal", "Hessian's diagonal", "update"):
        chex.assert_trees_all_equal_shapes_and_dtypes(found[name], params)


@exhaustive
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02), ("float32", 2e-4)]
)
def test_every_function_in_every_dtype(dtype, tolerance):
    """Under x64, where constants of Python's would widen to float64."""
    model, params, xs = mlp()
    params, xs = cast((params, xs), dtype)
    batch, loss = (xs, LABELS), ops.softmax_cross_entropy
    found, random = jax.jit(
        lambda p, b: (everything(model, loss, p, b), drawn(model, loss, p, b))
    )(params, batch)  # fmt: skip
    for name, wanted in in_float64().items():
        size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted) if x.size)
        close(found[name], wanted, tolerance, tolerance * size)
    for name in ("GGN", "Hessian", "diagonal", "Hessian's diagonal", "update"):
        assert jax.tree.all(jax.tree.map(lambda x, p: x.dtype == p.dtype, found[name], params))
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(random["update"][0]))
    del random["update"]
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(random))


# ---------------------------------------------------------------------------------------- losses


@jax.custom_vjp
def fourth_power(z, t):
    return jnp.sum((z - t) ** 4)


# As in JAX's own examples the rule calls the function: differentiated forwards it would fail.
fourth_power.defvjp(
    lambda z, t: (fourth_power(z, t), (z, t)),
    lambda saved, g: (4 * g * (saved[0] - saved[1]) ** 3, -4 * g * (saved[0] - saved[1]) ** 3),
)


def gaussian_by_hand(z, t):
    return 0.5 * (z[1] + (t[0] - z[0]) ** 2 * jnp.exp(-z[1])) + z[2] ** 2


TARGETS = normal(7, N, 3)
LOSSES = {
    "squared error": (ops.squared_error, TARGETS),
    "softmax": (ops.softmax_cross_entropy, LABELS),
    "soft labels": (ops.softmax_cross_entropy, jax.nn.softmax(TARGETS)),
    "sigmoid": (ops.sigmoid_binary_cross_entropy, TARGETS > 0),
    "hinge": (ops.multiclass_hinge, LABELS),
    "huber": (ops.huber, TARGETS),
    "pinball": (ops.pinball, TARGETS),
    "Poisson": (ops.poisson_nll, jnp.round(TARGETS**2)),
    "Gaussian": (lambda z, t: ops.gaussian_nll(z[:2], t[0]) + z[2] ** 0, TARGETS),
    "Gaussian, mapped": (
        lambda z, t: jax.vmap(ops.gaussian_nll)(jnp.stack([z[:1], z[2:]], -1), t[:1]) @ t[1:2] ** 2,
        TARGETS,
    ),
    "a weight below zero": (lambda z, t: -2 * ops.gaussian_nll(z[1:], t[0]), TARGETS),
    "Gaussian by hand": (gaussian_by_hand, TARGETS),
    "optax, softmax": (optax.softmax_cross_entropy_with_integer_labels, LABELS),
    "optax, sigmoid": (
        lambda z, t: optax.sigmoid_binary_cross_entropy(z, jax.nn.sigmoid(t)).sum(), TARGETS,
    ),
    "jnp, squares": (lambda z, t: jnp.mean((z - t) ** 2), TARGETS),
    "jnp, logarithm": (lambda z, t: jnp.sum(jnp.log1p((z - t) ** 2)), TARGETS),
    "custom_vjp": (fourth_power, TARGETS),
}  # fmt: skip


QUICK = ["softmax", "a weight below zero"]


@pytest.mark.parametrize("name", sweep(LOSSES, QUICK))
def test_one_meaning_for_every_loss(name):
    """Products, diagonals, traces, Gram matrices and factors of one matrix: the positive part's,
    or with part="all" the Hessian's. The network is linear: its Jacobian is the input."""
    loss, targets = LOSSES[name]
    model = lambda p, x: p * x[0]
    p, xs = normal(1, 3), normal(2, N, 1)

    def of_example(x, t):
        H = x**2 * jax.jacrev(jax.grad(loss))(p * x[0], t)
        values, vectors = jnp.linalg.eigh(H)
        return H, vectors * jnp.maximum(values, 0) @ vectors.T

    @jax.jit
    def both(p, batch):
        found = []
        for part in ("positive", "all"):
            make = lambda f, part=part: f(model, loss, part=part)(p, batch)
            found.append(make(curvature.ggn_vector_product).to_dense())
            found += [make(curvature.ggn_diagonal), make(curvature.ggn_trace)]
        gram = curvature.ggn_gram(model, loss)(p, batch)
        factors = curvature.kronecker_factors(model, loss)(p, batch)
        return jax.vmap(of_example)(*batch), found, jnp.trace(gram), factors.to_dense()

    matrices, (product, diagonal, trace, *of_all), gram, factors = both(p, (xs, targets))
    H, positive = (m.mean(0) for m in matrices)
    for wanted, found in ((positive, (product, diagonal, trace)), (H, of_all)):
        for w, f in zip((wanted, jnp.diag(wanted), jnp.trace(wanted)), found, strict=True):
            close(f, w)
    close(gram, jnp.trace(positive))
    close(factors, positive)


@exhaustive
def test_the_fisher_matrix_of_the_gaussian_with_a_variance():
    """diag(e⁻ˢ, ½), whatever the labels; and the labels that are drawn give it."""
    model = lambda p, x: p + x
    loss, p, xs = ops.gaussian_nll, jnp.array([0.3, -0.7]), jnp.zeros((1, 2))
    batch = xs, jnp.array([2.0])
    wanted = jnp.diag(jnp.array([jnp.exp(0.7), 0.5]))
    draw = {"key": jax.random.key(4), "samples": 40_000}

    @jax.jit
    def all_of(p, batch):
        return {
            "Fisher": curvature.fisher_vector_product(model, loss)(p, batch).to_dense(),
            "drawn": curvature.fisher_vector_product(model, loss, **draw)(p, batch).to_dense(),
            "factors": curvature.kronecker_factors(model, loss, **draw)(p, batch).to_dense(),
            "GGN": curvature.ggn_vector_product(model, loss)(p, batch).to_dense(),
            "diagonal": curvature.ggn_diagonal(model, loss, **draw)(p, batch),
            "natural": curvature.natural_gradient(model, loss, damping=0.5)(p, batch)[1],
        }

    found = all_of(p, batch)
    close(found["Fisher"], wanted)
    close(found["drawn"], wanted, 0.03, 0.03)
    close(found["factors"], wanted, 0.03, 0.03)
    # The GGN is another matrix, and so is its estimate from samples.
    assert jnp.abs(found["GGN"] - wanted).max() > 0.5
    close(found["diagonal"], jnp.diag(found["GGN"]), 0.03)
    gradient = jax.grad(lambda p: loss(p, 2.0))(p)
    close(found["natural"], gradient / (jnp.diag(wanted) + 0.5), 1e-4)


SEEN = {
    "mean square": lambda z, t, i: jnp.mean((z - t) ** 2),
    "fourth power": lambda z, t, i: jnp.sum((z - t) ** 4),
    "optax": lambda z, t, i: optax.l2_loss(z, t).sum() + optax.huber_loss(z, t).sum(),
    "log-softmax": lambda z, t, i: -jax.nn.log_softmax(z)[i],
    "one hot": lambda z, t, i: -jnp.sum(jax.nn.one_hot(i, 4) * jax.nn.log_softmax(z)),
    "logsumexp": lambda z, t, i: jax.nn.logsumexp(z) - z[i],
    "Poisson": lambda z, t, i: jnp.sum(jnp.exp(z) - t * z),
    "sigmoid": lambda z, t, i: jnp.sum(jnp.maximum(z, 0) - z * t + jnp.log1p(jnp.exp(-jnp.abs(z)))),
    "squared hinge": lambda z, t, i: jnp.sum(jnp.maximum(0, 1 - t * z) ** 2),
    "two": lambda z, t, i: ops.squared_error(z, t) + ops.softmax_cross_entropy(z, i) ** 2,
    "a modulus": lambda z, t, i: jnp.sum(jnp.abs((z - t) * 2j + 1)),
}
UNSEEN = {
    "minus": lambda z, t, i: -jnp.sum((z - t) ** 2),
    "a weight": lambda z, t, i: jnp.sum(t * (z - t) ** 2),
    "a product": lambda z, t, i: z[0] * z[1],
    "of a square": lambda z, t, i: ops.squared_error(z**2, t),
    "a cube": lambda z, t, i: jnp.sum(z**3),
    "a logarithm": lambda z, t, i: jnp.sum(jnp.log1p((z - t) ** 2)),
    "a bell": lambda z, t, i: jnp.sum(jnp.exp(-((z - t) ** 2))),
    "a hump": lambda z, t, i: jnp.sum(jnp.maximum(1 - t * z, 0) * jnp.sin(z)),
    "a Gaussian": lambda z, t, i: jnp.sum(z[:2] + (t[:2] - z[2:]) ** 2 * jnp.exp(-z[:2])),
    "by a key": lambda z, t, i: -jnp.sum(lax.sort_key_val(i + jnp.arange(4), z**2)[1]),
    "minus a modulus": lambda z, t, i: -jnp.sum(jnp.abs((z - t) * 2j + 1)),
}


QUICK = ["one hot", "squared hinge", "two", "minus", "a product", "a Gaussian"]
QUICK += ["by a key", "minus a modulus"]


@pytest.mark.parametrize("name", sweep(SEEN | UNSEEN, QUICK))
def test_which_losses_are_seen_to_be_convex(name):
    loss = (SEEN | UNSEEN)[name]
    target = jnp.array([-1.0, 0.3, 2.0, 0.5])
    of_pair = lambda z, both: loss(z, *both)
    assert is_convex(of_pair, target, (target, jnp.int32(1))) == (name in SEEN)
    hessian = jax.jit(jax.vmap(jax.hessian(lambda z: loss(z, target, 1))))
    lowest = jnp.linalg.eigvalsh(hessian(2 * normal(5, 200, 4))).min()
    assert (lowest > -1e-10) == (name in SEEN)


def test_a_loss_with_an_exponent_that_is_traced():
    xs, ts, p = normal(0, N, 3), normal(1, N, 3), normal(2, 3)
    model, loss = lambda p, x: p * x, lambda z, t, k: jnp.sum(lax.pow(jnp.abs(z - t), k))

    @jax.jit
    def ours(p, k):
        return curvature.hessian_diagonal(model, lambda z, t: loss(z, t, k))(p, (xs, ts))

    mean = lambda p: jnp.mean(jax.vmap(lambda x, t: loss(model(p, x), t, 3.0))(xs, ts))
    close(ours(p, 3.0), jnp.diag(jax.hessian(mean)(p)))


@pytest.mark.parametrize("place", ["network", "loss"])
def test_the_modulus_of_a_complex_number_is_not_linear_in_pieces(place):
    xs, ts, p = normal(0, N, 3), normal(1, N, 3), normal(2, 3)
    model, loss = {
        "network": (lambda p, x: jnp.abs(p * x + 1j), lambda z, t: jnp.sum(z * t)),
        "loss": (lambda p, x: p * x, lambda z, t: -jnp.sum(jnp.abs(z + 1j))),
    }[place]
    mean = lambda p: jnp.mean(jax.vmap(lambda x, t: loss(model(p, x), t))(xs, ts))
    found = jax.jit(curvature.hessian_diagonal(model, loss))(p, (xs, ts))
    close(found, jnp.diag(jax.hessian(mean)(p)))


# -------------------------------------------------------------------------------------- networks


@jax.custom_vjp
def backwards_only(x):
    return jnp.tanh(x)


backwards_only.defvjp(
    lambda x: (backwards_only(x), x), lambda x, g: (g * (1 - backwards_only(x) ** 2),)
)


@jax.custom_jvp
def forwards(x):
    return jnp.tanh(x)


forwards.defjvp(lambda p, t: (jnp.tanh(p[0]), t[0] * (1 - jnp.tanh(p[0]) ** 2)))


def _rule(with_tangent):
    @fnn.rule
    def own(x):
        """tanh."""
        return jnp.tanh(x)

    @own.forward
    def _(x):
        return jnp.tanh(x), jnp.tanh(x)

    @own.backward
    def _(y, g):
        return (g * (1 - y * y),)

    if with_tangent:

        @own.tangent
        def _(y, dx):
            return dx * (1 - y * y)

    return own


def in_a_loop(x):
    """tanh, at the end of a scan."""
    return lax.scan(lambda h, _: (backwards_only(h), None), x, None, length=1)[0]


ACTIVATIONS = {
    "custom_vjp": backwards_only,
    "custom_vjp in a loop": in_a_loop,
    "custom_jvp": forwards,
    "a rule": _rule(False),
    "a rule with a tangent": _rule(True),
}


@exhaustive
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_network_with_a_derivative_rule_of_its_own(name):
    """All of these are tanh, so all that is known of it holds: Hessians too."""
    model, params, xs = mlp(ACTIVATIONS[name])
    found = jax.jit(functools.partial(everything, model, ops.softmax_cross_entropy))(
        params, (xs, LABELS)
    )
    close(found, in_float64(), 1e-6, 1e-8)


def test_a_pullback_that_is_not_linear_counts_as_its_linearisation():
    """Gradients clipped to ±1 on their way: identity, for small ones."""

    @jax.custom_vjp
    def clip(x):
        return x

    clip.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))
    model, p, batch = lambda p, x: clip(p @ x), normal(0, 2, 3), (normal(1, N, 3), normal(2, N, 2))
    plain = curvature.ggn_vector_product(lambda p, x: p @ x, ops.squared_error)(p, batch)
    v = 100 * p
    close(curvature.ggn_vector_product(model, ops.squared_error)(p, batch)(v), plain(v))
