"""What the operations are given and can't take is refused where it is given, by its name."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_table import CASES
from sweeps import exhaustive

import fnn
from fnn import ops

X = jnp.ones((2, 4))
LABEL = jnp.asarray([1, 2])

# Each option with a value that is right.
OPTIONS = {
    "leaky_relu slope": (functools.partial(ops.leaky_relu, X), 0.2),
    "elu alpha": (functools.partial(ops.elu, X), 0.5),
    "celu alpha": (functools.partial(ops.celu, X), 0.5),
    "squareplus b": (functools.partial(ops.squareplus, X), 1),
    "huber delta": (functools.partial(ops.huber, X, X), 2.0),
    "multiclass_hinge margin": (functools.partial(ops.multiclass_hinge, X, LABEL), 2),
    "layer_norm epsilon": (functools.partial(ops.layer_norm, X), np.float32(0.1)),
    "softmax_cross_entropy label_smoothing": (
        functools.partial(ops.softmax_cross_entropy, X, LABEL),
        np.float32(0.1),
    ),
}
FLAGS = {
    "gelu approximate": functools.partial(ops.gelu, X),
    "geglu approximate": functools.partial(ops.geglu, X),
    "logsumexp keepdims": functools.partial(ops.logsumexp, X),
}
AXES = {
    "maxout": functools.partial(ops.maxout, X),
    "glu": functools.partial(ops.glu, X),
    "swiglu": functools.partial(ops.swiglu, X),
    "geglu": functools.partial(ops.geglu, X),
    "softmax": functools.partial(ops.softmax, X),
    "log_softmax": functools.partial(ops.log_softmax, X),
    "logsumexp": functools.partial(ops.logsumexp, X),
    "layer_norm": functools.partial(ops.layer_norm, X),
    "rms_norm": functools.partial(ops.rms_norm, X),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_numbers(option):
    (f, right), (op, name) = OPTIONS[option], option.split()
    f(**{name: right})
    for wrong, error in [
        (math.nan, ValueError),
        (-math.inf, ValueError),
        (None, TypeError),
        ("1", TypeError),
        (True, TypeError),
        (1j, TypeError),
        ((1,), TypeError),
    ]:
        with pytest.raises(error, match=f"{op}: {name} must be"):
            f(**{name: wrong})
        with pytest.raises(error, match=f"{op}: {name} must be"):
            jax.jit(functools.partial(f, **{name: wrong}))()
    with pytest.raises(TypeError, match=f"{op}: .*'{name}' is static.*hashable"):
        f(**{name: jnp.asarray(right)})


HEADS = jnp.ones((2, 1, 4))


@pytest.mark.parametrize(
    "op, option, right",
    [
        (functools.partial(ops.attention, HEADS, HEADS, HEADS), "scale", 0.5),
        (functools.partial(ops.batch_norm, X), "epsilon", 0.1),
        (functools.partial(ops.linear_softmax_cross_entropy, X, X, LABEL * 0), "z_loss", 0.1),
        (
            functools.partial(ops.linear_softmax_cross_entropy, X, X, LABEL * 0),
            "label_smoothing",
            0.1,
        ),
    ],
)
def test_numbers_that_a_program_is_made_of(op, option, right):
    name = op.func.__name__
    wanted = jax.tree.leaves(op(**{option: right}))
    for given in (np.float32(right), np.array(right), jnp.float32(right)):
        for a, b in zip(jax.tree.leaves(op(**{option: given})), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    with pytest.raises(TypeError, match=f"^{name}: {option} must be .* but got a traced array"):
        jax.jit(lambda number: op(**{option: number}))(right)


def test_numbers_of_any_dtype():
    query, keys = jnp.asarray([1.0, 2.0]), jnp.eye(3, 2)
    wanted = ops.info_nce(query, keys, jnp.int32(1), temperature=2)
    frames, labels = jnp.ones((5, 3)), jnp.asarray([1, 2], jnp.int32)
    loss = ops.ctc(frames, labels)
    with jax.numpy_dtype_promotion("strict"):
        for number in (np.int8(2), jnp.int32(2), np.float64(2), jnp.bfloat16(2)):
            found = ops.info_nce(query, keys, jnp.int32(1), temperature=number)
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
        np.testing.assert_allclose(ops.ctc(frames, labels, blank=np.int8(0)), loss, rtol=1e-6)


@pytest.mark.parametrize("option", FLAGS)
def test_flags(option):
    op, name = option.split()
    for wrong in (None, 1, 0.0, "tanh"):
        with pytest.raises(TypeError, match=f"{op}: {name} must be True or False"):
            FLAGS[option](**{name: wrong})


@pytest.mark.parametrize("op", AXES)
def test_axes(op):
    AXES[op](axis=np.int64(-1))
    for wrong in (True, 0.0, "0", (0, None), (1.0,)):
        with pytest.raises(TypeError, match=f"{op}: axis must be"):
            AXES[op](axis=wrong)
    with pytest.raises(ValueError, match=f"{op}: axis 2 is out of range.*from -2 to 1"):
        AXES[op](axis=2)


def test_an_axis_twice():
    with pytest.raises(ValueError, match="axis must name each axis once"):
        ops.softmax(X, axis=(0, -2))


def test_an_endless_huber_is_half_the_square():
    d = jnp.asarray([3e3, -2.0])
    f = functools.partial(ops.huber, delta=math.inf)
    assert f(d, 0 * d) == jnp.sum(d**2) / 2
    np.testing.assert_array_equal(jax.grad(f)(d, 0 * d), d)
    np.testing.assert_array_equal(jax.hessian(f)(d, 0 * d), np.eye(2))


@pytest.mark.parametrize("wrong", [None, [1.0, 2.0], (1.0,), {"a": 1.0}])
@pytest.mark.parametrize("name", [n for n in CASES if n != "l2"])
def test_no_arrays(name, wrong):
    op = CASES[name].op
    if not isinstance(op, fnn.Operation):
        return
    args = CASES[name].example()
    optional = [p.default is None for p in op.rule.signature.parameters.values()]
    for i in range(len(args)):
        if wrong is None and optional[i]:
            continue
        with pytest.raises(TypeError, match=rf"{op.name}: \w+ must be an array, but got"):
            op(*args[:i], wrong, *args[i + 1 :])


def test_no_functions():
    for wrong in (None, 3, "relu", [abs]):
        with pytest.raises(TypeError, match="rule: definition must be a function"):
            fnn.rule(wrong)
        op = fnn.rule(lambda x: x)
        for register in (op.forward, op.backward, op.tangent):
            with pytest.raises(TypeError, match="must be a function, but got"):
                register(wrong)
    with pytest.raises(fnn.RuleError, match="Write a function around it"):
        fnn.rule(max)


def test_a_partial_has_the_name_of_its_function():
    def scaled(x, by):
        return by * x

    op = fnn.rule(functools.partial(scaled, by=3.0))
    assert op.name == "scaled" and op(2.0) == 6


# ------------------------------------------------------------------------- values that are known

SCORES = jnp.asarray([[0.5, -1.0, 2.0], [1.0, 0.0, -1.0]])

WAYS = {
    "call": lambda op, x, y: op(x, y),
    "grad": lambda op, x, y: jax.grad(lambda x: jnp.sum(op(x, y)))(x),
    "vmap": lambda op, x, y: jax.vmap(op)(x, y),
    "vmap of grad": lambda op, x, y: jax.vmap(jax.grad(op))(x, y),
    "labels known while tracing": lambda op, x, y: jax.jit(lambda x: jnp.sum(op(x, y)))(x),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", [ops.softmax_cross_entropy, ops.multiclass_hinge])
def test_classes_that_are_none(op, way):
    for labels, wrong in (([0, 3], 3), ([-1, 2], -1), (np.asarray([1, 100], np.uint8), 100)):
        with pytest.raises(ValueError, match=f"{op.name}: labels hold {wrong}, .* 3 classes"):
            WAYS[way](op, SCORES, jnp.asarray(labels))
    WAYS[way](op, SCORES, jnp.asarray([0, 2]))


@pytest.mark.parametrize("way", WAYS)
def test_probabilities_that_are_none(way):
    op = ops.sigmoid_binary_cross_entropy
    for labels in (-SCORES, 2 * SCORES, jnp.full((2, 3), 2)):
        with pytest.raises(ValueError, match="labels must be from 0 to 1, but hold"):
            WAYS[way](op, SCORES, labels)
    for labels in (SCORES > 0, jnp.ones((2, 3), jnp.int8), jnp.full((2, 3), 0.5, jnp.bfloat16)):
        WAYS[way](op, SCORES, labels)


def test_compiled_labels_cannot_raise():
    assert jnp.isnan(jax.jit(ops.softmax_cross_entropy)(SCORES[0], 3))


def test_what_jax_would_change_silently():
    """The high bits of an integer (2³² + 1 would be class 1), and a mask."""
    labels, scores = np.asarray([1, 2**32 + 1]), np.asarray(SCORES, "float32")
    with jax.enable_x64(False):
        for wrong in (labels, labels[1], -labels, labels.astype(np.uint64)):
            with pytest.raises(ValueError, match="softmax_cross_entropy: .* which u?int32 can't"):
                ops.softmax_cross_entropy(scores[: wrong.size], wrong)
        ops.softmax_cross_entropy(scores, np.asarray([1, 2]))
    masked = np.ma.masked_array(np.ones(3), [True, False, False])
    with pytest.raises(TypeError, match="relu: .* masked array"):
        ops.relu(masked)


@exhaustive
def test_numpy_s_arrays_of_64_bits_are_jax_s_of_32():
    """Without a warning (which is an error here)."""
    with jax.enable_x64(False):
        r = np.random.default_rng(0)
        n = lambda *shape: r.normal(size=shape)
        image = n(5, 5, 2)
        made = [
            ops.attention(jnp.asarray(n(3, 2, 4)), n(3, 2, 4), n(3, 2, 4)),
            ops.rnn(jnp.asarray(n(3, 2)), n(2, 2), n(2))[0],
            ops.linear_recurrence(n(4), n(3, 4), n(4)),
            ops.batch_norm(n(3, 4))[0],
            ops.weight_norm(n(3, 4), n(3)),
            ops.spectral_norm(n(3, 4), n(3), n(4)),
            ops.embedding(n(3, 4), np.arange(2)),
            ops.rotary(n(3, 2, 4)),
            ops.top_k_routing(n(3, 4), 2).weights,
            ops.linear_softmax_cross_entropy(n(3, 4), n(5, 4), np.arange(3), ignore=0, z_loss=0.1),
            ops.info_nce(n(3, 4), n(3, 4), np.arange(3)),
            ops.average_pool(image, 2),
            ops.adaptive_average_pool(image, 2),
            ops.resize(image, 3, method="bilinear"),
            ops.upsample(image, 2),
            ops.upsample(image, 2, method="bilinear"),
            ops.lstm(n(3, 8), n(8, 2), n(2), n(2), np.ones(3, bool))[0],
            ops.ctc(n(5, 4), np.array([1, 2])),
        ]
    assert {a.dtype for a in made} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("number", [1.0, 1, True])
def test_a_number_of_python_s_is_no_array(number):
    q = jnp.ones((2, 1, 1))
    for call in (
        lambda: ops.rotary(number),
        lambda: ops.convolution(number, number),
        lambda: ops.linear_recurrence(number, number),
        lambda: ops.pixel_shuffle(number, 2),
        lambda: ops.ctc(jnp.ones((2, 3)), number),
        lambda: ops.attention(q, q, q, mask=number),
        lambda: ops.rnn(jnp.ones((3, 2)), jnp.ones((2, 2)), jnp.ones(2), number),
    ):
        with pytest.raises(TypeError, match=f"must be an array, but got {number}"):
            call()
