"""Curvature against dense Hessians and Gauss-Newton matrices, built by jacrev in float64."""

import functools
import importlib.util

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
from fnn import curvature, layers, ops
from fnn.curvature import output_hessian
from fnn.curvature.composition import composition
from fnn.curvature.exact_diagonal import _layers
from fnn.curvature.piecewise_linear import piecewise_linear
from fnn.jaxpr import program, trace


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(a, b, rtol=1e-8, atol=1e-10):
    chex.assert_trees_all_close(a, b, rtol=rtol, atol=atol)


def flat(tree):
    return ravel_pytree(tree)[0]


# ------------------------------------------------------------------------------------- networks

N = 5
LABELS = jnp.arange(N) % 3


def mlp(f):
    params = {"W1": normal(0, 6, 4), "b1": normal(1, 6), "W2": normal(2, 3, 6)}
    return (lambda p, x: p["W2"] @ f(p["W1"] @ x + p["b1"])), params, normal(3, N, 4)


def recurrent():
    def model(p, xs):
        def step(h, x):
            return jnp.tanh(p["W"] @ x + p["U"] @ h), None

        return p["out"] @ lax.scan(step, jnp.zeros(4), xs)[0]

    params = {"W": normal(0, 4, 3), "U": normal(1, 4, 4) / 2, "out": normal(2, 3, 4)}
    return model, params, normal(3, N, 4, 3)


def convolutional():
    numbers = ("NHWC", "HWIO", "NHWC")

    def model(p, x):
        h = lax.conv_general_dilated(x[None], p["k"], (1, 1), "SAME", dimension_numbers=numbers)
        h = lax.conv_general_dilated(
            jax.nn.relu(h + p["b"]),
            p["g"],
            (1, 1),
            "VALID",
            dimension_numbers=numbers,
            feature_group_count=2,
        )
        return p["out"] @ h.reshape(-1)

    params = {
        "k": normal(0, 3, 3, 2, 4), "b": normal(1, 4), "g": normal(2, 2, 2, 2, 4),
        "out": normal(4, 3, 16),
    }  # fmt: skip
    return model, params, normal(3, N, 3, 3, 2)


def embedding():
    model = lambda p, i: p["out"] @ jnp.tanh(p["E"][i]).mean(0)
    params = {"E": normal(0, 5, 3), "out": normal(2, 3, 3)}
    return model, params, jax.random.randint(jax.random.key(1), (N, 4), 0, 5)


def layers_in_a_scan():
    model = lambda p, x: p["out"] @ lax.scan(lambda h, W: (jnp.tanh(W @ h), None), x, p["W"])[0]
    return model, {"W": normal(0, 2, 4, 4), "out": normal(1, 3, 4)}, normal(3, N, 4)


def twice():
    """A weight that meets itself: not linear in it, in no piece."""
    return (lambda p, x: p @ jax.nn.relu(p @ x)), normal(0, 3, 3), normal(3, N, 3)


NETWORKS = {
    "tanh": lambda: mlp(jnp.tanh),
    "relu": lambda: mlp(jax.nn.relu),
    "recurrent": recurrent,
    "convolutional": convolutional,
    "embedding": embedding,
    "layers in a scan": layers_in_a_scan,
    "twice": twice,
}


def fourth_power(z, target):
    return jnp.sum((z - target) ** 4)


@functools.cache
def dense(name, loss):
    """The GGN, the Hessian and the Jacobians (examples, outputs, parameters), by autodiff."""
    model, params, xs = NETWORKS[name]()
    targets = targets_of(loss)
    vector, unravel = ravel_pytree(params)

    def of_example(x, t):
        z = model(params, x)
        J = jax.jacrev(lambda v: model(unravel(v), x))(vector)
        H = jax.hessian(lambda z: loss(z, t))(z)
        return J.T @ H @ J, J

    def mean(v):
        return jnp.mean(jax.vmap(lambda x, t: loss(model(unravel(v), x), t))(xs, targets))

    G, J = jax.jit(jax.vmap(of_example))(xs, targets)
    return G.mean(0), jax.jit(jax.hessian(mean))(vector), J


def targets_of(loss):
    return LABELS if loss in (ops.softmax_cross_entropy, ops.multiclass_hinge) else normal(7, N, 3)


SOME = [
    ("tanh", ops.softmax_cross_entropy),
    ("tanh", fourth_power),
    ("relu", ops.squared_error),
    ("relu", ops.multiclass_hinge),
    *((n, ops.softmax_cross_entropy) for n in list(NETWORKS)[2:]),
]


def _some():
    """Quickly: a smooth network, and one with rows."""
    quick = (
        "tanh, softmax_cross_entropy",
        "embedding, softmax_cross_entropy",
    )
    for network, loss in SOME:
        name = f"{network}, {getattr(loss, 'name', None) or loss.__name__}"
        marks = () if name in quick else exhaustive
        yield pytest.param(network, loss, id=name, marks=marks)


# ---------------------------------------------------------------------------------- the matrices


@exhaustive
@pytest.mark.parametrize(("name", "loss"), list(_some()))
def test_products_diagonals_traces_and_grams(name, loss):
    model, params, xs = NETWORKS[name]()
    batch = xs, targets_of(loss)
    G, H, J = dense(name, loss)
    v = jax.tree.map(lambda p: normal(11, *p.shape), params)
    has_gram = loss is not ops.multiclass_hinge

    @jax.jit
    def ours(params, batch):
        gram = curvature.ggn_gram(model, loss) if has_gram else lambda *_: None
        ggn = curvature.ggn_vector_product(model, loss)(params, batch)
        hessian = curvature.hessian_vector_product(model, loss)(params, batch)
        return {
            "Gv": flat(ggn @ v),
            "(G + 2)v": flat(ggn.damped(2.0) @ v),
            "Hv": flat(hessian(v)),
            "diag G": flat(curvature.ggn_diagonal(model, loss)(params, batch)),
            "diag H": flat(curvature.hessian_diagonal(model, loss)(params, batch)),
            "trace": curvature.ggn_trace(model, loss)(params, batch),
            "ntk": curvature.ntk(model)(params, xs),
            "ntk of two": curvature.ntk(model)(params, xs, xs[:2]),
            "gram": gram(params, batch),
            "gram of two": gram(params, batch, jax.tree.map(lambda x: x[:2], batch)),
        }

    w = flat(v)
    kernel = jnp.einsum("nip,mjp->nimj", J, J)
    want = {
        "Gv": G @ w,
        "(G + 2)v": G @ w + 2 * w,
        "Hv": H @ w,
        "diag G": jnp.diag(G),
        "diag H": jnp.diag(H),
        "trace": jnp.trace(G),
        "ntk": kernel,
        "ntk of two": kernel[:, :, :2],
    }
    got = ours(params, batch)
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-8, atol=1e-10, err_msg=key)
    if has_gram:
        gram, two = got["gram"], got["gram of two"]
        k = min(len(gram), len(G))
        close(two, gram[:, : len(gram) * 2 // N] * N / np.sqrt(2 * N))
        close(jnp.linalg.eigvalsh(gram)[::-1][:k], jnp.linalg.eigvalsh(G)[::-1][:k])


@exhaustive
def test_which_networks_are_piecewise_linear():
    found = {}
    for name, make in NETWORKS.items():
        model, params, xs = make()
        found[name] = piecewise_linear(model, params, xs)
    assert {n for n, yes in found.items() if yes} == {"relu", "convolutional"}
    attention = lambda p, x: jax.nn.softmax((p["q"] @ x) * x) @ x * p["v"]
    assert not piecewise_linear(
        attention, {"q": normal(0, 4, 4), "v": normal(1, 4)}, normal(3, N, 4)
    )
    for f in (ops.relu, ops.leaky_relu):
        assert piecewise_linear(*mlp(f))


def test_the_fast_hessian_diagonal_is_one_sweep():
    """No loop over the parameters in its program."""
    model, params, xs = mlp(jax.nn.relu)
    batch = xs, LABELS
    of = curvature.hessian_diagonal(model, ops.softmax_cross_entropy)
    assert "while" not in jax.jit(of).lower(params, batch).as_text()
    model, params, xs = mlp(jnp.tanh)
    of = curvature.hessian_diagonal(model, ops.softmax_cross_entropy, chunk=4)
    assert "while" in jax.jit(of).lower(params, (xs, LABELS)).as_text()


def by_layers(name):
    """`(model, params, one input, the parameters whose diagonals go through layers)`."""
    numbers = ("NHWC", "HWIO", "NHWC")

    def conv(x, k, groups=1):
        options = {"dimension_numbers": numbers, "feature_group_count": groups}
        return lax.conv_general_dilated(x[None], k, (2, 2), "SAME", **options)[0]

    def in_batch_groups(x, k):
        options = {"dimension_numbers": numbers, "batch_group_count": 2}
        return lax.conv_general_dilated(x, k, (2, 2), "SAME", **options)[0]

    W, V, b = normal(0, 6, 4), normal(1, 3, 6), normal(2, 6)
    model = {
        "dense": lambda p, x: p["V"] @ jnp.tanh(p["W"] @ x + p["b"]),
        "shared bias": lambda p, x: p["V"] @ jnp.tanh(p["W"] @ x + p["b"]) + p["b"][:3],
        "tied": lambda p, x: (p["W"].T @ jnp.tanh(p["W"] @ x))[:3] + p["V"] @ p["b"],
        "views": lambda p, x: jnp.tanh(x @ p["W"][:, ::-1].reshape(4, 6)) @ p["V"].T,
        "words": lambda p, x: jnp.tanh(x @ p["W"].T + p["b"]).sum(0) @ p["V"].T,
        "convolution": lambda p, x: p["V"] @ jnp.tanh(conv(x, p["W"]) + p["b"]).sum((0, 1)),
        "groups": lambda p, x: p["V"] @ jnp.tanh(conv(x, p["W"], 2)).sum((0, 1)),
        "matrices": lambda p, x: p["V"] @ jnp.tanh(jnp.einsum("gi,gio->go", x, p["W"])).reshape(6),
        "low rank": lambda p, x: p["V"] @ jnp.tanh((p["W"] @ p["A"]) @ x + p["b"]),
        "itself": lambda p, x: p["V"] @ jnp.tanh(p["W"] @ (x * p["W"][0])),
        "batch groups": lambda p, x: p["V"] @ jnp.tanh(in_batch_groups(x, p["W"])).sum((0, 1)),
    }[name]  # fmt: skip
    x, found = normal(3, N, 4), {"W", "V"}
    if name in ("dense", "tied"):
        found.add("b")
    if name in ("tied", "itself", "batch groups"):
        found.discard("W")
    if name == "words":
        x = normal(3, N, 2, 4)
    if name in ("convolution", "groups"):
        W, x = normal(0, 3, 3, 4, 6), normal(3, N, 3, 3, 4)
        W = W[:, :, :2] if name == "groups" else W
    if name == "batch groups":
        W, x = normal(0, 3, 3, 4, 6), normal(3, N, 2, 3, 3, 4)
    if name == "matrices":
        W, x = normal(0, 2, 4, 3), normal(3, N, 2, 4)
    if name == "low rank":
        return model, {"W": W, "V": V, "b": b, "A": normal(4, 4, 4)}, x, {"V"}
    return model, {"W": W, "V": V, "b": b}, x, found


@exhaustive
@pytest.mark.parametrize(
    "name",
    sweep(
        ["dense", "shared bias", "tied", "views", "words", "convolution", "groups", "matrices"]
        + ["low rank", "itself", "batch groups"],
        quick=["shared bias", "tied", "convolution"],
    ),
)
def test_the_hessian_diagonal_through_layers(name):
    model, p, xs, layers = by_layers(name)
    loss = lambda z, t: ops.softmax_cross_entropy(z, t % 3) + jnp.sin(z).sum()
    names = sorted(p)
    of_leaves = lambda *w: [model(dict(zip(names, w[:-1], strict=True)), w[-1])]
    found = _layers(program(trace(of_leaves, [*(p[k] for k in names), xs[0]])), len(p))
    numbers = {i for layer in found for i in (layer.weight, layer.bias) if i is not None}
    assert {names[i] for i in numbers} == layers
    of_diagonal = curvature.hessian_diagonal(model, loss, chunk=5)
    H = curvature.hessian_vector_product(model, loss)(p, (xs, LABELS))
    H, diagonal = jax.jit(lambda: (H.to_dense(), of_diagonal(p, (xs, LABELS))))()
    close(flat(diagonal), jnp.diag(H))


@exhaustive
def test_fisher_matrices():
    model, params, xs = mlp(jnp.tanh)
    batch = xs, LABELS
    G, _, J = dense("tanh", ops.softmax_cross_entropy)
    exact = curvature.fisher_vector_product(model, ops.softmax_cross_entropy)(params, batch)
    close(exact.to_dense(), G)
    drawn = curvature.fisher_vector_product(
        model, ops.softmax_cross_entropy, key=jax.random.key(0), samples=20_000
    )
    error = jax.jit(lambda p: drawn(p, batch).to_dense())(params) - G
    assert jnp.linalg.norm(error) < 0.03 * jnp.linalg.norm(G)
    with pytest.raises(ValueError, match="negative log-likelihood"):
        curvature.fisher_vector_product(model, fourth_power)(params, (xs, normal(7, N, 3)))

    def gradient(x, t):
        return flat(jax.grad(lambda p: ops.softmax_cross_entropy(model(p, x), t))(params))

    g = jax.vmap(gradient)(*batch)
    found = curvature.empirical_fisher(model, ops.softmax_cross_entropy)(params, batch)
    close(found.to_dense(), g.T @ g / N)


@pytest.mark.parametrize(
    "loss",
    sweep([ops.softmax_cross_entropy, ops.squared_error, fourth_power], [ops.squared_error]),
)
def test_sampled_diagonals_and_traces_are_unbiased(loss):
    model, params, xs = mlp(jnp.tanh)
    batch = xs, targets_of(loss)
    G, _, _ = dense("tanh", loss)
    draw = {"key": jax.random.key(1), "samples": 20_000}
    diagonal = jax.jit(curvature.ggn_diagonal(model, loss, **draw))(params, batch)
    error = jnp.linalg.norm(flat(diagonal) - jnp.diag(G))
    assert error < 0.03 * jnp.linalg.norm(jnp.diag(G))
    trace = jax.jit(curvature.ggn_trace(model, loss, **draw))(params, batch)
    assert abs(trace / jnp.trace(G) - 1) < 0.03


@exhaustive
def test_eigenpairs():
    model, params, xs = mlp(jnp.tanh)
    G, _, _ = dense("tanh", ops.softmax_cross_entropy)
    operator = curvature.ggn_vector_product(model, ops.softmax_cross_entropy)(params, (xs, LABELS))
    values, vectors = curvature.eigenpairs(operator, 3, jax.random.key(0))
    want, basis = jnp.linalg.eigh(G)
    close(values, want[::-1][:3], 1e-6)
    overlap = jnp.abs(jnp.sum(jax.vmap(flat)(vectors) * basis.T[::-1][:3], axis=1))
    close(overlap, jnp.ones(3), 1e-6)
    with pytest.raises(ValueError, match="k must be"):
        curvature.eigenpairs(operator, 0, jax.random.key(0))


def test_natural_gradient_and_conjugate_gradients():
    model, params, xs = mlp(jnp.tanh)
    loss, batch = ops.softmax_cross_entropy, (xs, LABELS)
    G, _, _ = dense("tanh", loss)
    value, found = jax.jit(
        curvature.natural_gradient(model, loss, damping=0.1, max_iterations=200, tolerance=1e-12)
    )(params, batch)
    mean = lambda p: jnp.mean(jax.vmap(lambda x, t: loss(model(p, x), t))(*batch))
    want, gradient = jax.value_and_grad(mean)(params)
    close(value, want)
    close(flat(found), jnp.linalg.solve(G + 0.1 * jnp.eye(len(G)), flat(gradient)), 1e-6, 1e-8)


def test_operators_refuse_other_trees_and_become_lineax_operators():
    model, params, xs = mlp(jnp.tanh)
    operator = curvature.ggn_vector_product(model, ops.squared_error)(params, (xs, normal(7, N, 3)))
    with pytest.raises(
        ValueError, match=r"tree like the parameters, but has nothing for params\['W2'\]"
    ):
        operator({"W1": params["W1"]})
    with pytest.raises(ValueError, match=r"shape \(3,\) at params\['b1'\].*shape \(6,\)"):
        operator(params | {"b1": jnp.zeros(3)})
    if importlib.util.find_spec("lineax") is None:
        with pytest.raises(ImportError, match="pip install lineax"):
            operator.to_lineax()
    else:
        import lineax

        solved = lineax.linear_solve(
            operator.damped(1.0).to_lineax(), params, lineax.CG(rtol=1e-10, atol=1e-10)
        )
        close(operator.damped(1.0)(solved.value), params, 1e-6, 1e-8)
        tagged = lambda a: lineax.is_positive_semidefinite(a.to_lineax())
        assert tagged(operator.damped(1.0)) and not tagged(operator.damped(-100.0))
    assert jax.jit(lambda d: jnp.array(operator.damped(d).is_positive))(1.0)
    assert not operator.damped(jnp.float32(-1)).is_positive


# ------------------------------------------------------------------------------------ the losses


def of_words(reduce, z_of=lambda z: z):
    """A language model's loss: one softmax for each position."""
    return lambda z, t: reduce(ops.softmax_cross_entropy(z_of(z), t), t)


WORDS = jnp.array([1, 0, 3])
KNOWN = {
    "squared error": (ops.squared_error, normal(0, 4)),
    "softmax": (ops.softmax_cross_entropy, jnp.int32(2)),
    "smooth": (
        functools.partial(ops.softmax_cross_entropy, label_smoothing=0.2), jnp.int32(2),
    ),
    # These don't add up to one.
    "soft labels": (ops.softmax_cross_entropy, jnp.array([0.2, 0.5, 0.9, 0.3])),
    "smooth soft labels": (
        functools.partial(ops.softmax_cross_entropy, label_smoothing=0.2),
        jnp.array([0.2, 0.5, 0.9, 0.3]),
    ),
    "sigmoid": (ops.sigmoid_binary_cross_entropy, jnp.array([0.0, 1, 1, 0])),
    "hinge": (ops.multiclass_hinge, jnp.int32(1)),
    "in a lambda": (lambda z, t: ops.softmax_cross_entropy(z, t), jnp.int32(0)),
    "of a multiple": (lambda z, t: ops.softmax_cross_entropy(2 * z + 1, t), jnp.int32(0)),
    "a multiple": (lambda z, t: 3 * ops.squared_error(z, t) + t[0], normal(0, 4)),
    "and a penalty": (lambda z, t: ops.squared_error(z, t) + t @ z, normal(0, 4)),
    "mean of words": (of_words(lambda x, t: jnp.mean(x)), WORDS),
    "some words": (
        of_words(lambda x, t: jnp.sum(jnp.where(t > 0, x, 0)) / jnp.sum(t > 0)), WORDS,
    ),
    "the next words": (of_words(lambda x, t: x.sum(), lambda z: z[:-1]), WORDS[1:]),
    "words in rows": (
        of_words(lambda x, t: x.mean(), lambda z: z.reshape(2, -1, 2)), jnp.eye(2, 3, dtype=int),
    ),
    "vmapped words": (
        lambda z, t: jnp.mean(jax.vmap(ops.softmax_cross_entropy)(z, t)), WORDS,
    ),
    "vmapped squares": (
        lambda z, t: jnp.arange(3) @ jax.vmap(ops.squared_error)(z, t), normal(1, 3, 4),
    ),
    "hinges of words": (lambda z, t: jnp.mean(ops.multiclass_hinge(z, t)), WORDS),
    "sigmoids of words": (
        lambda z, t: ops.sigmoid_binary_cross_entropy(z, t), jnp.eye(3, 4),
    ),
}  # fmt: skip
UNKNOWN = {
    "fourth power": (fourth_power, normal(0, 4)),
    "of a square": (lambda z, t: ops.squared_error(z**2, t), -(normal(0, 4) ** 2)),
    "with itself": (lambda z, t: ops.squared_error(z, z), normal(0, 4)),
    "squared": (lambda z, t: ops.softmax_cross_entropy(z, t) ** 2, jnp.int32(1)),
    "of two": (lambda z, t: ops.squared_error(z, t) + ops.squared_error(z, 0 * t), normal(0, 4)),
    "weighted by itself": (
        lambda z, t: ops.squared_error(z, t) * lax.stop_gradient(z @ z), normal(0, 4),
    ),
}  # fmt: skip


def outputs_of(name):
    words = "words" in name or "vmapped" in name
    return normal(5, 3, 4) if words else normal(5, 4)


@pytest.mark.parametrize(
    "name", sweep([*KNOWN, *UNKNOWN], [*list(KNOWN)[::3], *list(UNKNOWN)[::3]])
)
def test_the_root_of_the_output_hessian(name):
    (loss, target), z = (KNOWN | UNKNOWN)[name], outputs_of(name)
    assert (composition(loss, z, target) is not None) == (name in KNOWN)
    known = output_hessian.of(loss, z, target)
    samples = 20_000 if known.has_labels("positive") else 0

    @jax.jit
    def found():
        S = known.root().reshape(-1, z.size)
        rows = jnp.eye(z.size).reshape(-1, *z.shape)
        s = jnp.zeros((1, z.size))
        if samples:
            s = jax.vmap(known.sample)(jax.random.split(jax.random.key(0), samples))
            s = s.reshape(-1, z.size)
        hessian = jax.hessian(loss)(z, target)
        return hessian, S.T @ S, jax.vmap(known.product)(rows), s.T @ s / len(s)

    H, *others = (x.reshape(z.size, z.size) for x in found())
    close(others[:2], [H, H])
    if samples:
        close(others[2], H, atol=0.05 * jnp.abs(H).max())


@exhaustive
def test_a_language_model_has_a_fisher_matrix_and_samples():
    """Its loss is a mean over words: labels are drawn for each of them."""
    model = lambda p, xs: jnp.tanh(xs @ p["V"]) @ p["W"]
    p = {"V": normal(0, 3, 4), "W": normal(1, 4, 4)}
    batch = normal(2, N, 3, 3), jax.random.randint(jax.random.key(3), (N, 3), 0, 4)
    loss, _ = KNOWN["some words"]
    G = curvature.ggn_vector_product(model, loss)(p, batch).to_dense()
    close(curvature.fisher_vector_product(model, loss)(p, batch).to_dense(), G)
    draw = {"key": jax.random.key(4), "samples": 20_000}
    drawn = curvature.ggn_diagonal(model, loss, **draw)(p, batch)
    close(flat(drawn), jnp.diag(G), 0.1)
    drawn = curvature.fisher_vector_product(model, loss, **draw)(p, batch)
    close(flat(drawn(p)), G @ flat(p), 0.1, 0.01)


@exhaustive
def test_a_loss_with_a_weight_below_zero_is_not_convex():
    z = outputs_of("words")
    signed = lambda c: lambda z, t: c @ ops.softmax_cross_entropy(z, t)
    by_target = lambda z, t: jnp.sum(ops.softmax_cross_entropy(z, t) * (t - 1))
    assert output_hessian.is_convex(signed(jnp.ones(3)), z, WORDS)
    assert not output_hessian.is_convex(signed(jnp.array([1.0, 1, -1])), z, WORDS)
    assert not output_hessian.is_convex(by_target, z, WORDS)
    with pytest.raises(TypeError, match="real scalar loss"):
        output_hessian.of(lambda z, t: z, z, z)
    # So the Hessian's diagonal of such a network is found in the slow way, with its sign.
    model, p, xs = lambda p, x: p @ x, normal(1, 3, 4), normal(2, N, 4)
    loss = lambda z, t: -ops.softmax_cross_entropy(z, t)
    found = curvature.hessian_diagonal(model, loss)(p, (xs, LABELS))
    positive = curvature.hessian_diagonal(model, ops.softmax_cross_entropy)(p, (xs, LABELS))
    close(found, -positive)


# ----------------------------------------------------------------------------- Kronecker factors


def blocks(params, matrix):
    """The matrix's diagonal blocks, a tree like the parameters."""
    sizes = np.cumsum([0, *(p.size for p in jax.tree.leaves(params))])
    leaves = [matrix[a:b, a:b] for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


@exhaustive
def test_factors_are_exact_for_one_example_with_one_column():
    """One output: then a block is (a aᵀ) ⊗ (g gᵀ) itself."""
    params = {"W1": normal(0, 4, 3), "b1": normal(1, 4), "w": normal(2, 1, 4)}
    model = lambda p, x: p["w"] @ jnp.tanh(p["W1"] @ x + p["b1"])
    x, t = normal(3, 1, 3), normal(4, 1, 1)
    found = curvature.kronecker_factors(model, ops.squared_error)(params, (x, t))
    vector, unravel = ravel_pytree(params)
    J = jax.jacrev(lambda v: model(unravel(v), x[0]))(vector)
    is_factors = lambda f: hasattr(f, "times")
    dense_blocks = jax.tree.map(lambda f: f.to_dense(), found, is_leaf=is_factors)
    close(dense_blocks, blocks(params, 2 * J.T @ J))
    w = normal(5, 4, 3)
    close(found["W1"].times(w).reshape(-1), found["W1"].to_dense() @ w.reshape(-1))


@exhaustive
@pytest.mark.parametrize("kind", sweep(["expand", "reduce"], quick=["expand"]))
def test_factors_of_weights_used_at_several_positions(kind):
    """Written out position by position, for a recurrent and a convolutional network."""
    loss = ops.squared_error
    targets = normal(7, N, 3)

    def average(a, g):
        """a (N, positions, in), g (N, columns, positions, out): the two kinds' definitions."""
        n, positions, _ = a.shape
        if kind == "reduce":
            a, g = a.mean(1, keepdims=True), g.sum(2, keepdims=True)
            positions = 1
        A = sum(jnp.outer(v, v) for example in a for v in example) / (n * positions)
        G = sum(jnp.outer(v, v) for e in g for column in e for v in column) / n
        return A, G

    model, params, xs = recurrent()

    def states(p, xs):
        def step(h, x):
            return jnp.tanh(p["W"] @ x + p["U"] @ h), h

        return lax.scan(step, jnp.zeros(4), xs)[1]

    def taps(d, xs):  # the outputs, each step's pre-activation moved by d
        def step(h, xd):
            return jnp.tanh(params["W"] @ xd[0] + params["U"] @ h + xd[1]), None

        return params["out"] @ lax.scan(step, jnp.zeros(4), (xs, d))[0]

    g = jax.vmap(lambda x: np.sqrt(2) * jax.jacrev(taps)(jnp.zeros((4, 4)), x))(xs)
    found = jax.jit(curvature.kronecker_factors(model, loss, kind=kind))(params, (xs, targets))
    for name, a in (("W", xs), ("U", jax.vmap(lambda x: states(params, x))(xs))):
        A, G = average(a, g)
        close(found[name].A[0], A)
        close(found[name].G[0], G)

    numbers = ("NHWC", "HWIO", "NHWC")
    out = normal(8, 3, 8)

    def conv(p, x):
        y = lax.conv_general_dilated(x[None], p, (1, 1), "VALID", dimension_numbers=numbers)
        return out @ jnp.tanh(y).reshape(-1)

    kernel, xs = normal(0, 2, 2, 2, 2), normal(3, N, 3, 3, 2)
    found = jax.jit(curvature.kronecker_factors(conv, loss, kind=kind))(kernel, (xs, targets))

    def patches(x):  # (pixels, features, kernel): the layout's order
        return jnp.stack(
            [x[i : i + 2, j : j + 2].reshape(4, 2).T.reshape(-1) for i in (0, 1) for j in (0, 1)]
        )

    def after(d, x):
        y = lax.conv_general_dilated(x[None], kernel, (1, 1), "VALID", dimension_numbers=numbers)
        return out @ jnp.tanh(y.reshape(4, 2) + d).reshape(-1)

    g = jax.vmap(lambda x: np.sqrt(2) * jax.jacrev(after)(jnp.zeros((4, 2)), x))(xs)
    A, G = average(jax.vmap(patches)(xs), g)
    close(found.A[0], A)
    close(found.G[0], G)


@exhaustive
def test_factors_of_stacks_tables_and_the_empirical_fisher():
    model, params, xs = layers_in_a_scan()
    found = jax.jit(curvature.kronecker_factors(model, ops.softmax_cross_entropy))(
        params, (xs, LABELS)
    )
    assert found["W"].A.shape == (2, 4, 4) and found["W"].G.shape == (2, 4, 4)
    first = jnp.einsum("ni,nj->ij", xs, xs) / N
    close(found["W"].A[0], first)
    second = jax.vmap(lambda x: jnp.tanh(params["W"][0] @ x))(xs)
    close(found["W"].A[1], second.T @ second / N)

    model, params, index = embedding()
    found = curvature.kronecker_factors(model, ops.softmax_cross_entropy)(params, (index, LABELS))
    counts = jnp.bincount(index.reshape(-1), length=5)
    close(found["E"].A[0], counts / counts.sum())
    assert found["E"].G.shape == (1, 3, 3)
    close(found["E"].times(params["E"]).reshape(-1), found["E"].to_dense() @ flat(params["E"]))

    # A table of positions, of which the first 4 are added: rows that all examples look up.
    out, xs = normal(2, 3, 3), normal(3, N, 4, 3)
    model = lambda P, x: out @ jnp.tanh(x + P[:4]).mean(0)
    P = normal(4, 7, 3)
    found = curvature.kronecker_factors(model, ops.softmax_cross_entropy)(P, (xs, LABELS))
    close(found.A[0], jnp.array([1, 1, 1, 1, 0, 0, 0]) / 4)
    J = jax.vmap(jax.jacobian(model), (None, 0))(P, xs)
    z = jax.vmap(model, (None, 0))(P, xs)
    H = jax.vmap(jax.hessian(ops.softmax_cross_entropy))(z, LABELS)
    close(found.G[0], jnp.einsum("nzpi,nzy,nypj->ij", J, H, J) / N)

    model, params, xs = mlp(jnp.tanh)
    loss = ops.softmax_cross_entropy
    found = curvature.kronecker_factors(model, loss, empirical=True)(params, (xs, LABELS))
    g = jax.vmap(lambda x, t: jax.grad(lambda z: loss(z, t))(model(params, x)))(xs, LABELS)
    close(found["W2"].G[0], g.T @ g / N)

    exact = curvature.kronecker_factors(model, loss)(params, (xs, LABELS))
    drawn = jax.jit(
        curvature.kronecker_factors(model, loss, key=jax.random.key(0), samples=20_000)
    )(params, (xs, LABELS))
    close(drawn["W1"].A, exact["W1"].A)
    assert jnp.linalg.norm(drawn["W1"].G - exact["W1"].G) < 0.03 * jnp.linalg.norm(exact["W1"].G)


LOOPS = {
    "repeat": lambda remat: layers.repeat(layers.Linear(3), 2, remat=remat),
    "LSTM": lambda remat: layers.LSTM(3, remat=bool(remat)),
    "LSTM, uneven": lambda remat: layers.LSTM(3, remat=bool(remat), reverse=True),
    "checkpoint": lambda remat: layers.chain(layers.Linear(3), layers.repeat(kept(remat), 2)),
}


def kept(remat):
    """A layer whose checkpoint is one that the compiler can't see through, inside the loop."""
    f = lambda p, x: jnp.tanh(p["W"] @ x + p["b"])

    class Own(layers.Linear):
        def __call__(self, params, x):
            return (jax.checkpoint(f) if remat else f)(params, x)

    return Own(3)


def with_and_without_checkpoint(name):
    x = normal(11, 2, *{"LSTM": (4,), "LSTM, uneven": (7,)}.get(name, ()), 3)
    params = LOOPS[name](None).init(jax.random.key(0), x[0])
    loss = lambda z, t: jnp.sum(jnp.cosh(z - t))
    of = lambda remat: curvature.kronecker_factors(LOOPS[name](remat), loss)
    both = lambda params, batch: (of(None)(params, batch), of(True)(params, batch))
    return both, (params, (x, normal(12, *x.shape)))


def test_where_a_checkpoint_computes_the_inputs_again_there_are_factors():
    both, args = with_and_without_checkpoint("repeat")
    without, found = jax.eval_shape(both, *args)
    assert jax.tree.structure(found) == jax.tree.structure(without)
    assert [type(f) for f in found.values()] == [curvature.Kronecker, curvature.Block]


@exhaustive
def test_a_recurrent_weight_used_in_pieces_and_in_the_rest_has_factors():
    """Of `LSTM(remat=True)` where √n doesn't divide the steps."""
    both, args = with_and_without_checkpoint("LSTM, uneven")
    without, found = jax.eval_shape(both, *args)
    assert jax.tree.structure(found) == jax.tree.structure(without)
    assert [type(found[name]) for name in "UWb"] == [curvature.Kronecker] * 2 + [curvature.Block]


def test_a_weight_used_in_two_places_has_factors_of_the_inputs_of_both():
    params, (xs, ys) = {"W": normal(1, 2, 3)}, (normal(2, N, 2, 3), normal(3, N, 2))
    twice = lambda p, x: jnp.sin(p["W"] @ x[0]) + p["W"] @ x[1]
    mapped = lambda p, x: (lambda z: jnp.sin(z[0]) + z[1])(x @ p["W"].T)
    of = lambda model: curvature.kronecker_factors(model, ops.squared_error)(params, (xs, ys))["W"]
    close(of(twice).to_dense(), of(mapped).to_dense())


def test_a_gradient_that_is_the_same_in_all_columns():
    nothing = jax.custom_vjp(lambda W, x: W @ x)
    nothing.defvjp(
        lambda W, x: (W @ x, (W, x)), lambda saved, g: jax.tree.map(jnp.zeros_like, saved)
    )
    model = lambda p, x: nothing(p["W"], x) + p["V"] @ x
    args = {"W": normal(1, 2, 3), "V": normal(2, 2, 3)}, (normal(3, N, 3), normal(4, N, 2))
    found = curvature.kronecker_factors(model, ops.squared_error)(*args)["W"]
    close(found.to_dense(), jnp.zeros((6, 6)))
    close(curvature.ggn_diagonal(model, ops.squared_error)(*args)["W"], jnp.zeros((2, 3)))


@exhaustive
@pytest.mark.parametrize("name", LOOPS)
def test_factors_are_those_without_a_checkpoint(name):
    both, args = with_and_without_checkpoint(name)
    without, found = jax.jit(both)(*args)
    assert jax.tree.structure(found) == jax.tree.structure(without)
    chex.assert_trees_all_close(found, without, rtol=1e-9, atol=1e-12)


def test_factors_refuse_what_is_wrong():
    model, params, xs = mlp(jnp.tanh)
    with pytest.raises(ValueError, match="expand"):
        curvature.kronecker_factors(model, ops.squared_error, kind="both")
    with pytest.raises(ValueError, match="key"):
        curvature.kronecker_factors(model, ops.squared_error, samples=1)
    with pytest.raises(ValueError, match="pair"):
        curvature.kronecker_factors(model, ops.squared_error)(params, xs)
    with pytest.raises(TypeError, match="must return one array"):
        curvature.ggn_diagonal(lambda p, x: (x, x), ops.squared_error)(params, (xs, xs))


# ------------------------------------------------------------------------------------------ KFAC


def regression():
    """Linear least squares: the GGN is (2/N) XᵀX ⊗ I, exactly a Kronecker product."""
    X = normal(0, 20, 3)
    Y = X @ normal(1, 3, 2) + 0.1 * normal(2, 20, 2)
    return (lambda W, x: W @ x), jnp.zeros((2, 3)), (X, Y)


def mean_loss(model, loss, batch):
    return lambda p: jnp.mean(jax.vmap(lambda x, t: loss(model(p, x), t))(*batch))


@exhaustive
def test_kfac_solves_a_linear_problem_in_one_step():
    model, W, batch = regression()
    optimizer = curvature.kfac(model, ops.squared_error, batch, damping=1e-12, samples=0)
    gradient = jax.grad(mean_loss(model, ops.squared_error, batch))(W)
    updates, state = jax.jit(optimizer.update)(gradient, optimizer.init(W), W, batch=batch)
    want = np.linalg.lstsq(batch[0], batch[1], rcond=None)[0].T
    close(W + updates, want, 1e-6)
    close(state.ratio, 1.0, 1e-6)  # unless adapted: the model is exact


@exhaustive
def test_kfac_takes_fewer_steps_than_adam():
    model, params, xs = mlp(jnp.tanh)
    xs = normal(3, 64, 4)
    batch = xs, jax.vmap(lambda x: jnp.sin(3 * x[:3]))(xs)
    loss = ops.squared_error
    value = mean_loss(model, loss, batch)

    def trained(optimizer, steps):
        def step(state, _):
            params, opt = state
            g = jax.grad(value)(params)
            updates, opt = optimizer.update(g, opt, params, batch=batch)
            return (optax.apply_updates(params, updates), opt), None

        start = params, optimizer.init(params)
        return value(jax.jit(lambda s: lax.scan(step, s, None, length=steps))(start)[0][0])

    adam = min(
        trained(optax.with_extra_args_support(optax.adam(r)), 60) for r in (0.003, 0.01, 0.03, 0.1)
    )
    kfac = trained(curvature.kfac(model, loss, batch, damping=0.1), 30)
    assert kfac < adam


OPTIONS = {
    "defaults": {},
    "schedule": {
        "learning_rate": optax.constant_schedule(0.1),
        "momentum": 0.5,
        "factors_every": 2,
    },
    "trust region": {"trust_region": 1e-3, "l2": 1e-3, "kind": "reduce"},
}


@exhaustive
@pytest.mark.parametrize("name", sweep(OPTIONS, ["defaults"]))
def test_kfac_in_a_training_step(name):
    model, params, xs = mlp(jnp.tanh)
    batch = xs, LABELS
    loss = ops.softmax_cross_entropy
    optimizer = curvature.kfac(model, loss, batch, **OPTIONS[name])
    step = fnn.train_step(lambda p, e: loss(model(p, e[0]), e[1]), optimizer)
    state = step.init(params)
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


@exhaustive
def test_kfac_trust_region_and_damping():
    model, params, xs = mlp(jnp.tanh)
    batch, loss = (xs, LABELS), ops.softmax_cross_entropy
    gradient = jax.grad(mean_loss(model, loss, batch))(params)
    G, _, _ = dense("tanh", loss)

    def updated(**options):
        optimizer = curvature.kfac(model, loss, batch, adapt_damping_every=1, **options)
        updates, state = optimizer.update(gradient, optimizer.init(params), params, batch=batch)
        return flat(updates), state

    free, state = updated(damping=0.1)
    length = 0.5 * free @ (G + 0.1 * jnp.eye(len(G))) @ free
    held, _ = updated(damping=0.1, trust_region=float(length) / 4)
    close(held, free / 2, 1e-6)
    # λ: down where the model foretold the loss, up where it promised too much.
    value = mean_loss(model, loss, batch)
    after = optax.apply_updates(params, jax.tree.map(lambda x: x, _like(params, free)))
    foretold = flat(gradient) @ free + length
    ratio = (value(after) - value(params)) / foretold
    close(state.ratio, ratio, 1e-4)
    expected = 0.1 * (19 / 20) if ratio > 0.75 else 0.1 / (19 / 20) if ratio < 0.25 else 0.1
    close(state.damping, expected, 1e-5)
    _, wild = updated(damping=0.1, learning_rate=50.0)
    assert wild.ratio < 0.25 and wild.damping > 0.1


def _like(params, vector):
    return ravel_pytree(params)[1](vector)


def test_kfac_refuses_what_is_wrong():
    model, params, xs = mlp(jnp.tanh)
    batch = xs, LABELS
    optimizer = curvature.kfac(model, ops.softmax_cross_entropy, batch)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="batch="):
        optimizer.update(params, state, params)
    with pytest.raises(ValueError, match="params"):
        optimizer.update(params, state, batch=batch)
    with pytest.raises(ValueError, match="damping must be a positive finite number"):
        curvature.kfac(model, ops.softmax_cross_entropy, batch, damping=0.0)


# -------------------------------------------------------------------- models of other libraries


@exhaustive
def test_models_of_other_libraries():
    import equinox as eqx
    import flax.linen as nn
    import haiku as hk
    from flax import nnx

    x = normal(0, N, 4)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(jnp.tanh(nn.Dense(5)(x)))

    linen = Linen()
    arrays, rest = eqx.partition(eqx.nn.MLP(4, 3, 5, 1, key=jax.random.key(0)), eqx.is_array)
    graphdef, nnx_state = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    haiku = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(3)(jnp.tanh(hk.Linear(5)(x)))))
    for model, params in (
        (linen.apply, linen.init(jax.random.key(0), x[0])),
        (lambda p, x: eqx.combine(p, rest)(x), arrays),
        (lambda p, x: nnx.merge(graphdef, p)(x), nnx_state),
        (haiku.apply, haiku.init(jax.random.key(0), x[0])),
    ):
        params = jax.tree.map(lambda p: p.astype("float64"), params)
        vector, unravel = ravel_pytree(params)
        loss = ops.softmax_cross_entropy

        def block(x, t, model=model, params=params, vector=vector, unravel=unravel):
            J = jax.jacrev(lambda v: model(unravel(v), x))(vector)
            H = jax.hessian(lambda z: ops.softmax_cross_entropy(z, t))(model(params, x))
            return jnp.diag(J.T @ H @ J)

        found = jax.jit(curvature.ggn_diagonal(model, loss))(params, (x, LABELS))
        close(flat(found), jax.vmap(block)(x, LABELS).mean(0))


# ------------------------------------------------------------------------------- particular cases


@exhaustive
def test_a_derivative_rule_of_its_own_is_not_linear_in_pieces():
    """A step with a smooth surrogate gradient, as in spiking networks."""

    @jax.custom_jvp
    def spike(x):
        return jnp.where(x > 0, 1.0, 0.0)

    spike.defjvp(lambda x, dx: (spike(x[0]), jax.nn.sigmoid(x[0]) * dx[0]))
    model, p, xs = mlp(spike)
    batch = xs, normal(5, N, 3)
    assert not piecewise_linear(model, p, xs)
    H = curvature.hessian_vector_product(model, ops.squared_error)(p, batch).to_dense()
    close(flat(curvature.hessian_diagonal(model, ops.squared_error)(p, batch)), jnp.diag(H))


@exhaustive
def test_the_hinge_has_no_columns_and_no_curvature():
    model, p, xs = convolutional()
    batch, loss = (xs, LABELS), ops.multiclass_hinge
    for make in (curvature.ggn_trace, curvature.ggn_diagonal, curvature.kronecker_factors):
        found = jax.jit(make(model, loss))(p, batch)
        if make is curvature.kronecker_factors:
            found = [f.times(w) for f, w in zip(_leaves_of(found), jax.tree.leaves(p), strict=True)]
        assert not flat(found).any()


def _leaves_of(factors):
    return jax.tree.leaves(factors, is_leaf=lambda f: hasattr(f, "times"))


@exhaustive
@pytest.mark.parametrize("kind", sweep(["expand", "reduce"], quick=["reduce"]))
def test_factors_of_an_attention_projection_by_a_loop_over_words(kind):
    p = {"Q": normal(0, 3, 4), "K": normal(1, 3, 4), "V": normal(2, 3, 4)}
    loss, batch = ops.softmax_cross_entropy, (normal(3, N, 5, 4), LABELS)

    def tail(p, q, x):
        scores = jax.nn.softmax(q @ (x @ p["K"].T).T)
        return jnp.tanh(scores @ (x @ p["V"].T)).sum(0)

    model = lambda p, x: tail(p, x @ p["Q"].T, x)
    A, G = 0, 0
    for x, t in zip(*batch, strict=True):
        z, pull = jax.vjp(lambda q, x=x: tail(p, q, x), x @ p["Q"].T)
        values, vectors = jnp.linalg.eigh(jax.hessian(loss)(z, t))
        columns = [pull(s)[0] for s in (vectors * jnp.sqrt(jnp.maximum(values, 0))).T]
        if kind == "reduce":
            A += jnp.outer(x.mean(0), x.mean(0)) / N
            G += sum(jnp.outer(g.sum(0), g.sum(0)) for g in columns) / N
        else:
            A += sum(jnp.outer(a, a) for a in x) / (5 * N)
            G += sum(jnp.outer(row, row) for g in columns for row in g) / N
    found = jax.jit(curvature.kronecker_factors(model, loss, kind=kind))(p, batch)["Q"]
    own = (found.A[0], found.G[0])
    close(*((own[0], A) if own[0].shape == A.shape else (own[1], A)))
    close(*((own[1], G) if own[1].shape == G.shape else (own[0], G)))


def test_the_groups_of_a_convolution_have_factors_each():
    p = {"k": normal(0, 2, 2, 2, 4), "V": normal(2, 3, 16)}
    numbers = ("NHWC", "HWIO", "NHWC")

    def model(p, x):
        y = lax.conv_general_dilated(
            x[None], p["k"], (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=2
        )
        return p["V"] @ jnp.tanh(y).reshape(-1)

    xs = normal(3, N, 3, 3, 4)
    found = jax.jit(curvature.kronecker_factors(model, ops.softmax_cross_entropy))(p, (xs, LABELS))
    assert found["k"].A.shape == (2, 8, 8) and found["k"].G.shape == (2, 2, 2)
    for group in range(2):
        own = xs[..., 2 * group : 2 * group + 2]
        patches = [
            x[i : i + 2, j : j + 2].reshape(4, 2).T.reshape(-1)
            for x in own
            for i in (0, 1)
            for j in (0, 1)
        ]
        close(found["k"].A[group], sum(jnp.outer(a, a) for a in patches) / len(patches))


def test_the_trust_region_bounds_a_step_with_momentum_too():
    model, p, xs = mlp(jnp.tanh)
    batch, loss = (xs, LABELS), ops.softmax_cross_entropy
    bound, damping = 1e-3, 0.1
    optimizer = curvature.kfac(
        model,
        loss,
        batch,
        damping=damping,
        trust_region=bound,
        adapt_damping_every=0,
        learning_rate=1.0,
        momentum=0.9,
    )

    @jax.jit
    def step(p, state):
        gradient = jax.grad(mean_loss(model, loss, batch))(p)
        updates, state = optimizer.update(gradient, state, p, batch=batch)
        product = curvature.ggn_vector_product(model, loss)(p, batch).damped(damping)(updates)
        return optax.apply_updates(p, updates), state, flat(updates) @ flat(product) / 2

    state = optimizer.init(p)
    for _ in range(3):
        p, state, length = step(p, state)
        close(length, bound, 1e-3)


def test_samples_need_a_key():
    for make in (
        curvature.ggn_diagonal,
        curvature.ggn_trace,
        curvature.kronecker_factors,
        curvature.fisher_vector_product,
    ):
        with pytest.raises(ValueError, match="pass key="):
            make(mlp(jnp.tanh)[0], ops.softmax_cross_entropy, samples=1)
        with pytest.raises(ValueError, match="at least 0"):
            make(mlp(jnp.tanh)[0], ops.softmax_cross_entropy, samples=-1)
