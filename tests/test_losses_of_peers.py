"""Losses against optax's and PyTorch's, extreme inputs, and what is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import exhaustive, sweep

from fnn import curvature, ops


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


X, Y, Z = normal(0, 6, 4), normal(1, 6, 4), normal(2, 6, 4)
Q = jax.nn.softmax(Z).at[0].set(jnp.asarray([0.0, 0.25, 0.75, 0.0]))
QUERIES, KEYS = normal(3, 5, 4), normal(4, 5, 4)

OPTAX = {
    "kl_divergence": (
        lambda x: ops.kl_divergence(jax.nn.log_softmax(x), Q),
        lambda x: optax.kl_divergence(jax.nn.log_softmax(x), Q),
    ),
    "cosine_similarity": (
        lambda x: ops.cosine_similarity(x, Y),
        lambda x: optax.cosine_similarity(x, Y),
    ),
    "cosine_distance": (
        lambda x: ops.cosine_distance(x, Y),
        lambda x: optax.cosine_distance(x, Y),
    ),
    "sigmoid_focal": (
        lambda x: ops.sigmoid_focal(x, Q, gamma=1.5, alpha=0.25),
        lambda x: jnp.sum(optax.sigmoid_focal_loss(x, Q, gamma=1.5, alpha=0.25)),
    ),
    "triplet": (
        lambda x: ops.triplet(x, Y, Z),
        lambda x: optax.losses.triplet_margin_loss(x, Y, Z, eps=0),
    ),
    "info_nce": (
        lambda x: ops.info_nce(x, Y, jnp.arange(6), temperature=0.5),
        lambda x: optax.softmax_cross_entropy_with_integer_labels(
            2 * jax.vmap(jax.vmap(optax.cosine_similarity, (None, 0)), (0, None))(x, Y),
            jnp.arange(6),
        ),
    ),
    "ctc": (
        lambda x: ops.ctc(x, jnp.asarray([1, 3, 0]), jnp.arange(6) < 5, jnp.arange(3) < 2),
        lambda x: optax.ctc_loss(
            x[None, :5], jnp.zeros((1, 5)), jnp.asarray([[1, 3]]), jnp.zeros((1, 2))
        )[0],
    ),
}


@pytest.mark.parametrize("angle", [0.0, 1e-4, 1e-2, 1.0, 3.0])
def test_a_small_cosine_distance_does_not_cancel(angle):
    x = jnp.asarray([1.0, 0.0], jnp.float32)
    y = 3 * jnp.asarray([np.cos(angle), np.sin(angle)], jnp.float32)
    wanted = 2 * np.sin(angle / 2) ** 2
    np.testing.assert_allclose(ops.cosine_distance(x, y), wanted, rtol=1e-5)
    np.testing.assert_allclose(ops.cosine_distance(0 * x, y), 1)
    np.testing.assert_allclose(ops.cosine_distance(x, 0 * y), 1)


@exhaustive
def test_optax_s():
    """Values and gradients."""

    @jax.jit
    def both(x):
        found = {}
        for name, pair in OPTAX.items():
            found[name] = [(f(x), jax.grad(lambda x, f=f: jnp.sum(f(x)))(x)) for f in pair]
        return found

    for name, (ours, theirs) in both(X).items():
        chex.assert_trees_all_close(ours, theirs, rtol=1e-9, atol=1e-12, custom_message=name)


def test_pytorch_s():
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    x, y, z, q = (torch.tensor(np.asarray(a)) for a in (X, Y, Z, Q))
    counts = torch.tensor(np.asarray(jnp.round(Y**2)))
    pairs = [
        (ops.kl_divergence(X, Q), F.kl_div(x, q, reduction="none").sum(-1)),
        (ops.cosine_similarity(X, Y), F.cosine_similarity(x, y)),
        (ops.poisson_nll(X, jnp.round(Y**2)), F.poisson_nll_loss(x, counts, reduction="sum")),
        (ops.triplet(X, Y, Z), F.triplet_margin_loss(x, y, z, eps=0, reduction="none")),
        (
            ops.gaussian_nll(jnp.stack([X, Z], -1), Y) - 12 * np.log(2 * np.pi),
            F.gaussian_nll_loss(x, y, torch.exp(z), reduction="sum", eps=0),
        ),
        (
            ops.ctc(X, jnp.asarray([1, 2])),
            F.ctc_loss(
                x.log_softmax(-1), torch.tensor([1, 2]), torch.tensor(6), torch.tensor(2),
                reduction="sum",
            ),
        ),
    ]  # fmt: skip
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-7)


@exhaustive
@pytest.mark.parametrize("dtype", sweep(["float16", "float32"], ["float16"]))
def test_extremes(dtype):
    """Values may overflow where the loss does; no nan arises, and gradients are finite."""
    largest = float(jnp.finfo(dtype).max)
    sizes = [0, 1e-12, 1.0, 1e3, np.sqrt(largest) / 4, largest / 8]
    x = jnp.asarray([s * sign for s in sizes for sign in (1, -1)], dtype)
    pairs = jnp.stack(jnp.meshgrid(x, x), -1).reshape(-1, 2)
    answers = jnp.asarray([0.0, 1.0], dtype)
    excluded = jnp.asarray([-jnp.inf, 0.0], dtype)

    losses = (
        lambda x: ops.cosine_similarity(x, x[::-1]),
        lambda x: ops.triplet(x, x[::-1], 0.5 * x),
        lambda x: ops.sigmoid_focal(x, answers),
        lambda x: ops.sigmoid_focal(x, answers, gamma=0.3, alpha=0.25),
        lambda x: ops.pinball(x, jnp.zeros_like(x), quantile=0.1),
        lambda x: ops.poisson_nll(x, answers),
        lambda x: ops.kl_divergence(ops.log_softmax(x), answers),
        lambda x: ops.info_nce(x, jnp.stack([x, x[::-1]]), jnp.asarray(1)),
    )

    @jax.jit
    def derivatives(pairs):
        of = lambda f: jax.vmap(jax.value_and_grad(f))(pairs)
        return [of(f) for f in losses]

    for k, (value, gradient) in enumerate(derivatives(pairs)):
        assert value.dtype == gradient.dtype == dtype
        assert not np.any(np.isnan(value)), k
        assert np.all(np.isfinite(gradient)), k
    value, (d, _) = jax.value_and_grad(ops.kl_divergence, (0, 1))(excluded, answers)
    assert value == 0 and np.all(np.isfinite(d))


@exhaustive
def test_where_nothing_has_a_direction():
    zero, x = jnp.zeros(4), X[0]
    for f in (
        lambda x, y: ops.cosine_similarity(x, y),
        lambda x, y: ops.triplet(x, y, x),
        lambda x, y: ops.info_nce(x, jnp.stack([x, y]), 0),
    ):
        derivatives = jax.jit(
            lambda x, y, f=f: (
                jax.grad(f, (0, 1))(x, y),
                jax.jvp(jax.grad(f), (x, y), (y + 1, x))[1],
            )  # fmt: skip
        )
        for args in ((zero, x), (x, zero), (zero, zero), (x, x)):
            chex.assert_tree_all_finite(derivatives(*args))
    assert ops.cosine_similarity(zero, x) == 0
    assert ops.triplet(x, x, x + 100) == 0
    assert jax.grad(ops.pinball)(x, x).tolist() == [0, 0, 0, 0]


def test_info_nce_under_jit_of_keys_known_outside():
    positive = jnp.arange(6)
    found = jax.jit(lambda x: ops.info_nce(x, Y, positive))(X)
    np.testing.assert_allclose(found, ops.info_nce(X, Y, positive), rtol=1e-6)
    with pytest.raises(ValueError, match="'positive' holds 5, but there are 5 keys"):
        jax.jit(lambda x: ops.info_nce(x, Y[:5], positive))(X)


def test_a_sequence_that_cannot_be_spelt():
    @jax.jit
    def of(labels, frames, length):
        counts = jnp.arange(6) < frames, jnp.arange(3) < length
        return jax.value_and_grad(lambda x: ops.ctc(x, labels, *counts))(X)

    value, gradient = of(jnp.asarray([1, 2, 3]), 2, 3)
    assert value == jnp.inf and not np.any(gradient)
    twice = jnp.asarray([1, 1, 0])
    assert of(twice, 2, 2)[0] == jnp.inf and of(twice, 3, 2)[0] < jnp.inf  # a blank is between
    assert of(twice, 0, 0)[0] == 0
    blanks = -jax.nn.log_softmax(X)[:, 0].sum()
    np.testing.assert_allclose(of(twice, 6, 0)[0], blanks)
    assert jnp.isnan(of(jnp.asarray([4, 1, 1]), 6, 1)[0])


def test_what_does_not_count_in_a_sequence_does_not_reach_the_gradient():
    """Padding of −1, which is no class, and nan in a frame behind the last."""
    padded = jnp.asarray([1, 2, -1])
    frames, labels = jnp.arange(6) < 5, jnp.arange(3) < 2
    both = jax.jit(lambda x, frames, n: jax.value_and_grad(ops.ctc)(x, padded, frames, n))
    value, gradient = both(X.at[5].set(jnp.nan), frames, labels)
    wanted, of_the_first = jax.value_and_grad(lambda x: ops.ctc(x, padded[:2]))(X[:5])
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    np.testing.assert_allclose(gradient[:5], of_the_first, rtol=1e-9, atol=1e-12)
    assert not np.any(gradient[5])
    assert jnp.isnan(both(X, frames, jnp.ones(3, bool))[0])  # −1 counts


def test_what_is_kept():
    x, y = jnp.ones((32, 16)), jnp.ones((32, 16))
    for f, entries in (
        (lambda x: ops.sigmoid_focal(x, y), 2 * 8),
        (lambda x: ops.poisson_nll(x, y > 0), 8),
        (lambda x: ops.pinball(x, y), 1),
        (lambda x: ops.triplet(x, y, -y), 2 * 8 + 1),
        (lambda x: ops.cosine_similarity(x, y), 2 * 8 + 3),
    ):
        kept = jax.tree.leaves(jax.eval_shape(lambda x, f=f: jax.vjp(f, x)[1], x))
        assert sum(k.size * k.dtype.itemsize for k in kept) <= entries * x.size


@exhaustive
def test_a_poisson_regression_s_fisher_matrix():
    """It is the Hessian in the log rates, and what labels drawn from the network give."""
    z = jnp.asarray([0.3, -0.7])
    model = lambda p, x: p
    batch = (jnp.zeros((1, 1)), jnp.asarray([[2.0, 0.0]]))
    matrix = lambda make, **more: make(model, ops.poisson_nll, **more)(z, batch).to_dense()
    exact = np.diag(np.exp(z))
    np.testing.assert_allclose(matrix(curvature.ggn_vector_product), exact, rtol=1e-9)
    draws = {"samples": 4000, "key": jax.random.key(0)}
    drawn = matrix(curvature.fisher_vector_product, **draws)
    np.testing.assert_allclose(drawn, exact, atol=0.15)


@exhaustive
def test_arguments():
    for call, message in (
        (lambda: ops.triplet(X, Y, Z[:3]), r"'negative' has shape \(3, 4\), wanted \(6, 4\)"),
        (
            lambda: ops.cosine_similarity(1.0, 2.0),
            r"'x' has shape \(\), wanted \(\.\.\., features\)",
        ),
        (lambda: ops.cosine_distance(X, Z[:3]), r"cosine_distance: .* \(3, 4\), wanted \(6, 4\)"),
        (lambda: ops.info_nce(X, Y[0], 0), r"'keys' have shapes \(6, 4\) and \(4,\), wanted"),
        (lambda: ops.info_nce(X[0], Y, 0, temperature=0), "info_nce: temperature must be"),
        (lambda: ops.info_nce(X[0], Y, 6), "info_nce: argument 'positive' holds 6, but .* 6 keys"),
        (lambda: ops.info_nce(X, Y, 1), r"info_nce: .* 'positive' has shape \(\), wanted \(6,\)"),
        (lambda: ops.pinball(X, X, quantile=1.5), "pinball: quantile must be"),
        (lambda: ops.sigmoid_focal(X, Q, gamma=-1), "sigmoid_focal: gamma must be"),
        (lambda: ops.sigmoid_focal(X, 2 * Q + 1), "sigmoid_focal: labels must be from 0 to 1"),
        (
            lambda: ops.kl_divergence(X[:, :0], Q[:, :0]),
            r"kl_divergence: argument 'log_predictions' has shape \(6, 0\), wanted .* one class",
        ),
        (lambda: ops.kl_divergence(X, Q[:, :2]), r"'targets' has shape \(6, 2\), wanted \(6, 4\)"),
        (lambda: ops.ctc(X, jnp.asarray([[1]])), r"ctc: argument 'labels' has shape \(1, 1\)"),
        (
            lambda: ops.ctc(X, jnp.asarray([1]), jnp.ones(5, bool)),
            r"'mask' .*\(5,\), wanted \(6,\)",
        ),
        (lambda: ops.ctc(X, jnp.asarray([1]), blank=4), "ctc: blank must be an integer"),
        (
            lambda: ops.ctc(X, jnp.asarray([1, 0])),
            "'labels' holds 0, the blank's class, at place 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in (
        (lambda: ops.kl_divergence(X, jnp.ones((6, 4), int)), "wanted a real floating dtype"),
        (lambda: ops.info_nce(X[0], Y, X[:, 0]), "info_nce: argument 'positive' has dtype float64"),
        (lambda: ops.ctc(X, X[:, 0]), "ctc: argument 'labels' has dtype float64, wanted integers"),
        (lambda: ops.poisson_nll(X, Y, full=1), "full must be True or False"),
        (
            lambda: ops.gaussian_nll(X, Y, Y),
            r"too many .*; it is gaussian_nll\(prediction, target\)\.$",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            call()


@exhaustive
def test_labels_of_ctc_are_classes_and_narrow_ones_name_wide_classes():
    logits = jax.random.normal(jax.random.key(0), (5, 300))
    for wrong in (-1, 300):
        assert jnp.isnan(ops.ctc(logits, jnp.asarray([wrong, 2])))
    assert jnp.isnan(jax.jit(ops.ctc)(logits, jnp.asarray([1, 0])))  # the blank
    filled_up = jax.jit(ops.ctc)(logits, jnp.asarray([1, 0]), None, jnp.asarray([True, False]))
    np.testing.assert_allclose(filled_up, ops.ctc(logits, jnp.asarray([1])), rtol=1e-9)
    wanted = ops.ctc(logits, jnp.asarray([1, 2]), blank=299)
    assert ops.ctc(logits, jnp.asarray([1, 2], jnp.int8), blank=299) == wanted
    assert ops.ctc(logits, np.asarray([1, 2]), blank=299) == wanted  # of 64 bits


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_near_the_count_a_rate_s_gradient_is_exact(dtype):
    s, t = jnp.asarray(6.9, dtype), jnp.asarray(990, dtype)
    wanted = np.exp(float(s)) - float(t)
    found = jax.grad(ops.poisson_nll)(s, t)
    np.testing.assert_allclose(float(found), wanted, rtol=float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_right_answer_s_gradient_does_not_cancel(dtype):
    x = jnp.asarray([8.0, 20.0, -8.0, -20.0], dtype)
    z = jnp.asarray([1.0, 1.0, 0.0, 0.0], dtype)
    wanted = np.asarray([-1, -1, 1, 1]) / (1 + np.exp([8.0, 20.0, 8.0, 20.0]))
    found = jax.grad(ops.sigmoid_binary_cross_entropy)(x, z)
    np.testing.assert_allclose(
        found.astype(jnp.float32), wanted, rtol=5e-3 if dtype == jnp.bfloat16 else 1e-6
    )


COSINES = [
    (ops.cosine_similarity, optax.cosine_similarity),
    (ops.cosine_distance, optax.cosine_distance),
]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_of_almost_equal_directions_cosines_keep_their_digits(dtype):
    """In 16 bits the gradient is as good as its rounding, and so is the distance."""
    x = normal(5, 256)
    rounded = lambda a: a.astype(dtype).astype(jnp.float64)
    tolerance = float(jnp.finfo(dtype).eps)
    for noise in (0.1, 0.01):
        pair = rounded(x), rounded(x + noise * normal(6, 256))
        narrow = [a.astype(dtype) for a in pair]
        for ours, plain in COSINES:
            wanted = jax.value_and_grad(plain, (0, 1))(*pair)
            found = jax.value_and_grad(ours, (0, 1))(*narrow)
            np.testing.assert_allclose(float(found[0]), wanted[0], rtol=tolerance, atol=2e-7)
            for a, b in zip(found[1], wanted[1], strict=True):
                difference = np.linalg.norm(a.astype(jnp.float64) - b)
                assert difference < tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("z", [0.0, 1.0])
def test_a_right_answer_s_focal_gradient_does_not_cancel(z):
    x = (2 * z - 1) * jnp.asarray([4.0, 16.0, 18.0, 30.0])
    gradient = jax.grad(lambda x: ops.sigmoid_focal(x, jnp.full(4, z, x.dtype), gamma=0.5))
    # c and m in closed form, differentiated in float64 by x towards the right answer.
    plain = lambda x: jax.nn.sigmoid(-x) ** 0.5 * jax.nn.softplus(-x)
    wanted = (2 * z - 1) * jax.vmap(jax.grad(plain))((2 * z - 1) * x)
    np.testing.assert_allclose(gradient(x.astype(jnp.float32)), wanted, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", ["integer", "distribution", "smoothed"])
def test_a_right_class_s_gradient_does_not_cancel(kind, dtype):
    """The logits' gradient is as good as the rounding of what is kept, entry by entry."""
    options = {"label_smoothing": 1e-3} if kind == "smoothed" else {}
    labels = jnp.eye(10)[3].astype(dtype) if kind == "distribution" else 3
    loss = lambda x: ops.softmax_cross_entropy(x, labels, **options)
    q = (1 - options.get("label_smoothing", 0)) * jnp.eye(10)[3]
    q = q + options.get("label_smoothing", 0) / 10
    for top in (4.0, 6.0, 8.0, 8.5):
        x = jnp.zeros(10).at[3].set(top)
        wanted = jax.nn.softmax(x) - q
        found = jax.grad(loss)(x.astype(dtype)).astype(jnp.float64)
        smallest = float(jnp.finfo(dtype).smallest_subnormal)
        rounding = jnp.where(q > 0.5, jnp.sum(jax.nn.softmax(x)[:3]) * 4, jax.nn.softmax(x) + q)
        tolerance = 2 * float(jnp.finfo(dtype).eps) * rounding + 10 * smallest
        assert np.all(np.abs(found - wanted) <= tolerance), (top, found, wanted)
