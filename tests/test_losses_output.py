"""`ops.linear_softmax_cross_entropy` against the same with all logits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import exhaustive, sweep

import fnn
from fnn import ops

POSITIONS, FEATURES, CLASSES = 4, 3, 10


def example(dtype=jnp.float32, batch=(), seed=0):
    random = np.random.default_rng(seed)
    h = jnp.asarray(random.normal(size=(*batch, POSITIONS, FEATURES)), dtype)
    W = jnp.asarray(random.normal(size=(CLASSES, FEATURES)), dtype)
    b = jnp.asarray(random.normal(size=CLASSES), dtype)
    labels = jnp.asarray(random.integers(0, CLASSES, (*batch, POSITIONS)), jnp.int32)
    return h, W, b, labels


def ours(h, W, b, labels, **options):
    return ops.linear_softmax_cross_entropy(h, W, labels, bias=b, **options)


def plain(h, W, b, labels, *, label_smoothing=0.0, ignore=None, z_loss=0.0, block=None):
    logits = h @ W.T + b
    target = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), label_smoothing)
    losses = optax.softmax_cross_entropy(logits, target.astype(logits.dtype))
    losses += z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return losses if ignore is None else jnp.where(labels == ignore, 0, losses)


OPTIONS = {
    "": {},
    "smoothing": {"label_smoothing": 0.2},
    "all": {"label_smoothing": 0.2, "z_loss": 0.1, "ignore": 3},
}


@exhaustive
@pytest.mark.parametrize("block", sweep([4, 5, 256], [4]))
@pytest.mark.parametrize("name", sweep(OPTIONS, ["all"]))
def test_two_modes_and_two_orders(name, block):
    """Blocks that divide the classes, that overlap, and one alone."""
    args = *example()[:3], jnp.asarray([3, 0, 9, 2])

    def derivatives(f):
        total = lambda *args: jnp.sum(jnp.sin(f(*args, **OPTIONS[name] | {"block": block})))
        gradient = jax.grad(total, (0, 1, 2))
        floats = args[:3]
        along = lambda g: jax.jvp(lambda *x: g(*x, args[3]), floats, floats)
        squares = lambda *a: sum(jnp.sum(x**2) for x in gradient(*a))
        return (
            f(*args, **OPTIONS[name] | {"block": block}),
            along(total),
            along(gradient),
            jax.grad(squares, (0, 1, 2))(*args),
        )

    found, wanted = (jax.jit(functools.partial(derivatives, f))() for f in (ours, plain))
    chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-4)


@exhaustive
def test_a_batch_shares_the_weights():
    """Its examples are more positions; the gradient is summed block by block, in both orders."""
    args = example(batch=(2,))
    mean = lambda f: lambda *args: jnp.sum(jax.vmap(f, (0, None, None, 0))(*args) ** 2)
    of = lambda f: jax.jit(jax.value_and_grad(mean(f), (0, 1, 2)))(*args)
    chex.assert_trees_all_close(of(functools.partial(ours, block=4)), of(plain), rtol=1e-4)
    # Weights of each example's own are mapped as usual.
    h, W, b, labels = args
    Ws = jnp.stack([W, 2 * W])
    each = lambda f: jax.jit(jax.vmap(jax.grad(lambda h, W, y: jnp.sum(f(h, W, b, y)), 1)))
    found, wanted = (each(f)(h, Ws, labels) for f in (functools.partial(ours, block=4), plain))
    chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-5)
    jaxpr = jax.make_jaxpr(jax.vmap(functools.partial(ours, block=4), (0, None, None, 0)))(*args)
    assert "vmapped" not in str(jaxpr)


def test_large_blocks_are_whole_tiles():
    """As on accelerators. The last of them has many classes of the one before."""
    random = np.random.default_rng(0)
    h, W = (jnp.asarray(random.normal(size=(n, 3)) / 9) for n in (5, 3300))
    labels = jnp.asarray([0, 3299, 2303, 2304, 1151])
    logits = lambda h, W: optax.softmax_cross_entropy_with_integer_labels(h @ W.T, labels)
    f = lambda h, W: ops.linear_softmax_cross_entropy(h, W, labels, block=1200)
    chex.assert_trees_all_close(f(h, W), logits(h, W), rtol=1e-12)
    found, wanted = (jax.jacobian(g, (0, 1))(h, W) for g in (f, logits))
    chex.assert_trees_all_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert "tensor<1152x3xf64>" in jax.jit(f).lower(h, W).as_text()


def test_memory():
    """At most 1/64 of the logits' way, for a batch too."""
    h, W, y = (
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((4, 512, 256), "float32"), ((32768, 256), "float32"), ((4, 512), "int32"))
    )

    def temporaries(f):
        total = lambda h, W, y: jnp.sum(jax.vmap(f, (0, None, 0))(h, W, y))
        lowered = jax.jit(jax.value_and_grad(total, (0, 1))).lower(h, W, y)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    theirs = temporaries(
        lambda h, W, y: optax.softmax_cross_entropy_with_integer_labels(h @ W.T, y)
    )
    assert temporaries(ops.linear_softmax_cross_entropy) <= theirs / 64


@exhaustive
def test_per_example_gradients_stay_factored():
    h, W, b, labels = example(batch=(3,))
    loss = lambda params, example: jnp.sum(
        ours(jnp.tanh(example[0]), params["W"], params["b"], example[1], z_loss=0.1, block=4)
    )
    params, batch = {"W": W, "b": b}, (h[:, :2], labels[:, :2])
    _, found = fnn.per_example.grads(loss)(params, batch)
    kept = {row["path"]: row["kept"] for row in fnn.per_example.explain(found)}
    assert kept["['W']"] == "A (2 × 3), G (2 × 10)"
    wanted = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
    chex.assert_trees_all_close(fnn.per_example.materialize(found), wanted, rtol=1e-4, atol=1e-5)


def test_labels():
    h, W, b, labels = example()
    wrong = labels.at[1].set(CLASSES)
    with pytest.raises(ValueError, match=r"labels hold 10, but there are 10 classes"):
        ours(h, W, b, wrong)
    with pytest.raises(ValueError, match=r"labels hold -1, .*, or -100 to be ignored"):
        ours(h, W, b, labels.at[0].set(-1), ignore=-100)
    ours(h, W, b, labels.at[0].set(-100), ignore=-100)
    losses, pull = jax.jit(lambda y: (ours(h, W, b, y), jax.vjp(ours, h, W, b, y)[1](h[:, 0])))(
        wrong
    )
    assert list(jnp.isnan(losses)) == [False, True, False, False]
    assert list(jnp.any(jnp.isnan(pull[0]), axis=1)) == [False, True, False, False]


@pytest.mark.parametrize("dtype", sweep(["float16", "bfloat16"], ["float16"]))
def test_half_precision(dtype):
    h, W, b, labels = example(dtype)
    W = jnp.tile(W, (30, 1))
    f = lambda h, W: jnp.mean(ops.linear_softmax_cross_entropy(h, W, labels, block=64))
    both = jax.jit(jax.value_and_grad(f, (0, 1)))
    found, wanted = both(h, W), both(h.astype(jnp.float32), W.astype(jnp.float32))
    assert all(x.dtype == dtype for x in jax.tree.leaves(found))
    eps = float(jnp.finfo(dtype).eps)
    found = jax.tree.map(lambda x: x.astype(jnp.float32), found)
    chex.assert_trees_all_close(found, wanted, rtol=8 * eps, atol=eps)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_numbers_of_any_size(size):
    """With equal weights all probabilities are equal, however large the logits."""
    h, _, _, labels = example()
    W = jnp.full((CLASSES, FEATURES), size, jnp.float32)
    f = lambda h, W: ops.linear_softmax_cross_entropy(h, W, labels, block=4)
    losses, pull = jax.vjp(f, h * size, W)
    np.testing.assert_allclose(losses, np.log(CLASSES), rtol=1e-5)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in pull(losses))


def test_empty_axes():
    W = jnp.ones((CLASSES, FEATURES))
    f = lambda h, W, y: jnp.sum(ops.linear_softmax_cross_entropy(h, W, y, block=4))
    y = jnp.zeros(0, jnp.int32)
    dh, dW = jax.grad(f, (0, 1))(jnp.ones((0, FEATURES)), W, y)
    assert dh.shape == (0, FEATURES) and not jnp.any(dW)


@exhaustive
def test_a_batch_on_an_explicit_mesh():
    kind = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=kind, devices=jax.devices()[:2])
    h, W, b, labels = example(batch=(4,))

    def total(h, W, b, labels):
        each = jax.vmap(functools.partial(ours, block=4, label_smoothing=0.1), (0, None, None, 0))
        return jnp.sum(each(h, W, b, labels) ** 2)

    gradient = jax.jit(jax.grad(total, (0, 1, 2)))
    wanted = gradient(h, W, b, labels)

    def placed(x, spec):
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(*spec)))

    data = "data"
    with jax.set_mesh(mesh):
        found = gradient(placed(h, [data]), placed(W, []), placed(b, []), placed(labels, [data]))
    chex.assert_trees_all_close(*(jax.tree.map(np.asarray, x) for x in (found, wanted)), rtol=1e-5)


@exhaustive
@pytest.mark.parametrize("name", OPTIONS)
def test_check_grads(name):
    h, W, b, labels = example(jnp.float64)
    fnn.check_grads(lambda h, W, b: ours(h, W, b, labels, block=4, **OPTIONS[name]), h, W, b)


def test_errors():
    h, W, b, labels = example()
    f = ops.linear_softmax_cross_entropy
    for error, words, args, options in (
        (TypeError, "h must be an array", (None, W, labels), {}),
        (ValueError, r"'W' has shape \(3, 10\), wanted \(classes, 3\)", (h, W.T, labels), {}),
        (TypeError, "'W' .* wanted h's, float32", (h, W.astype("float16"), labels), {}),
        (TypeError, "'labels' .* wanted integers", (h, W, h[:, 0]), {}),
        (ValueError, r"'labels' has shape \(3,\), wanted \(4,\)", (h, W, labels[1:]), {}),
        (ValueError, r"'bias' has shape \(9,\), wanted \(10,\)", (h, W, labels), {"bias": b[1:]}),
        (ValueError, "label_smoothing must be", (h, W, labels), {"label_smoothing": 1.0}),
        (ValueError, "z_loss must be", (h, W, labels), {"z_loss": -1.0}),
        (TypeError, "ignore must be", (h, W, labels), {"ignore": 1.0}),
        (ValueError, "ignore must be an integer", (h, W, labels), {"ignore": 2**63}),
        (ValueError, "block must be", (h, W, labels), {"block": 0}),
    ):
        with pytest.raises(error, match=f"linear_softmax_cross_entropy: .*{words}"):
            f(*args, **options)
