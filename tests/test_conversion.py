"""Data that isn't JAX's own: converted or refused alike by `fit`, `evaluate` and a step."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from fnn import evaluate, fit, ops, train_step

KEY = jax.random.key(0)
START = {"W": np.zeros((3, 2), np.float32), "b": np.zeros(3, np.float32)}
SGD = optax.sgd(0.1)
X = np.random.default_rng(0).normal(size=(4, 2))
LABELS = np.array([0, 2, 1, 2])


def cross_entropy(params, example):
    x, y = example
    return ops.softmax_cross_entropy(params["W"] @ x + params["b"], y)


def binary(params, example):
    x, y = example
    return ops.sigmoid_binary_cross_entropy(params["W"] @ x + params["b"], y)


def with_fit(loss, data):
    result = fit(loss, START, data, SGD, epochs=1, shuffle=False, progress=False)
    return result.steps["loss"][0]


def with_batches(loss, data):
    return fit(loss, START, [data], SGD, epochs=1, progress=False).steps["loss"][0]


def with_step(loss, data):
    step = train_step(loss, SGD)
    _, metrics = step(step.init(START), data)
    step.finish()
    return metrics["loss"]


def with_evaluate(loss, data):
    return evaluate(loss, START, data)["loss"]


def with_evaluated_batches(loss, data):
    return evaluate(loss, START, [data])["loss"]


def with_validation(loss, data):
    good = (X, LABELS if loss is cross_entropy else np.zeros((4, 3)))
    options = {"validation": data, "shuffle": False, "progress": False}
    return fit(loss, START, good, optax.sgd(0.0), epochs=1, **options).history["validation_loss"][0]


WAYS = [
    with_fit,
    with_batches,
    with_step,
    with_evaluate,
    with_evaluated_batches,
    with_validation,
]


@pytest.fixture
def x32():
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


class Tensor:
    """Another library's array, which numpy can read."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class OnlyDlpack:
    """Another library's array, as numpy and JAX exchange them."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Broken(Tensor):
    """As one on another device, or one that wants to be detached."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("call .detach() first")


SAME = {
    "list": lambda a: a.tolist(),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "longdouble": lambda a: a.astype(np.longdouble) if a.dtype.kind == "f" else a,
    "uint64": lambda a: a.astype(np.uint64) if a.dtype.kind == "i" else a,
    "torch": Tensor,
    "dlpack": OnlyDlpack,
    "masked array, nothing masked": np.ma.masked_array,
    "memmap": lambda a: a.view(np.memmap),
}


@pytest.mark.parametrize("way", WAYS[:-1])
def test_the_same_numbers_from_every_kind_of_array(way, x32):
    def loss(params, example):
        """Every kind of array in one batch, each with a weight of its own."""
        terms = [
            weight * (params["b"][0] + x @ jnp.array([1.0, 2.0]) + y.astype(jnp.float32))
            for weight, (x, y) in enumerate(example.values())
        ]
        return jnp.stack(terms).sum()

    batch = {name: (convert(X), convert(LABELS)) for name, convert in SAME.items()}
    weights = sum(range(len(SAME)))
    wanted = weights * np.mean(X @ np.array([1.0, 2.0]) + LABELS)
    np.testing.assert_allclose(way(loss, batch), wanted, rtol=1e-5)


def other(array):
    return lambda: (array, LABELS)


def labels(array):
    return lambda: (X, array)


def changed(value, dtype=np.float64):
    x = X.astype(dtype)
    x[2, 1] = value
    return x


FIRST = np.array([True] + [False] * 7).reshape(4, 2)
BAD = {
    "2**32 + 1": (labels([0, 2**32 + 1, 1, 0]), ValueError, r"4294967297 at index \(1,\).*int32"),
    "int64": (labels(LABELS + 2**32), ValueError, r"\[1\].*4294967296 at index \(0,\)"),
    "uint64": (labels(np.uint64(2**63) + LABELS.astype(np.uint64)), ValueError, "uint32"),
    "negative": (labels(LABELS - 2**33), ValueError, r"\[1\].*int32"),
    "float64": (other(changed(1e300)), ValueError, r"\[0\].*1e\+300 at index \(2, 1\).*float32"),
    "list": (other(changed(-1e300).tolist()), ValueError, r"\[0\].*-1e\+300.*float32"),
    "complex": (other(changed(1e300j, complex)), ValueError, r"\[0\].*complex64"),
    "torch, large": (labels(Tensor(LABELS + 2**32)), ValueError, "int32"),
    "dlpack, large": (labels(OnlyDlpack(LABELS + 2**32)), ValueError, "int32"),
    "masked": (other(np.ma.masked_array(X, mask=FIRST)), ValueError, r"\[0\].*masked"),
    "masked labels": (labels(np.ma.masked_equal(LABELS, 1)), ValueError, r"\[1\].*masked"),
    "object": (other(X.astype(object)), TypeError, r"\[0\].*objects"),
    "None": (labels([0, 1, None, 2]), TypeError, r"\[1\].*objects"),
    "ragged": (other([[1.0, 2.0], [3.0]]), TypeError, r"\[0\].*list.*can't be read as an array"),
    "dates": (other(np.zeros((4, 2), "datetime64[s]")), TypeError, r"\[0\].*dates"),
    "times": (labels(np.zeros(4, "timedelta64[s]")), TypeError, r"\[1\].*lengths of time"),
    "fields": (other(np.zeros(4, [("a", float)])), TypeError, r"\[0\].*records"),
    "strings": (labels(["a", "b", "c", "d"]), TypeError, r"\[1\].*strings"),
    "bytes": (labels(np.array([b"a"] * 4)), TypeError, r"\[1\].*byte strings"),
    "broken": (other(Broken(X)), TypeError, r"\[0\].*Broken.*call .detach\(\) first"),
    "function": (labels(len), TypeError, r"\[1\].*objects"),
    "scalar": (labels(3), TypeError, r"\[1\] is 3 of type int, not an array"),
    "label": (labels(np.array([0, 1, 3, 2])), ValueError, r"\[1\].*label 3 at index 2.*3 classes"),
    "nan": (other(changed(np.nan)), ValueError, r"\[0\].*nan.*\(2, 1\)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_can_not_be_converted_is_refused_and_named(kind, x32):
    data, error, message = BAD[kind]
    for way in WAYS:
        with pytest.raises(error, match=message):
            way(cross_entropy, data())


def test_with_64_bits_nothing_is_narrowed():
    for way in WAYS:
        with pytest.raises(ValueError, match=r"holds the label 4294967297.*3 classes"):
            way(cross_entropy, (X, [0, 1, 2**32 + 1, 2]))
    with pytest.raises(ValueError, match="which float64 can't hold"):
        with_step(cross_entropy, (np.full((4, 2), np.longdouble("1e400")), LABELS))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float16])
def test_small_dtypes_stay(dtype):
    def loss(params, x):
        assert x.dtype == dtype
        return jnp.sum(params["b"]) + jnp.sum(x.astype(jnp.float32))

    for way in (with_fit, with_step):
        np.testing.assert_allclose(way(loss, np.ones((4, 2), dtype)), 2.0)


def test_keys_in_a_batch():
    def loss(params, example):
        x, key = example
        return jnp.sum(params["W"] @ x) + jax.random.normal(key)

    keys = jax.random.split(KEY, 4)
    noise = np.mean([jax.random.normal(k) for k in keys])
    np.testing.assert_allclose(with_fit(loss, (X, keys)), noise, rtol=1e-6)
    np.testing.assert_allclose(with_step(loss, (X, jax.random.key_data(keys))), noise, rtol=1e-6)


def test_parameters_too(x32):
    step = train_step(cross_entropy, SGD)
    state = step.init({"W": np.ones((3, 2), ">f4"), "b": np.zeros(3, np.longdouble)})
    assert {p.dtype for p in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    with pytest.raises(ValueError, match=r"params\['b'\].*1e\+300 at index \(1,\)"):
        step.init({"W": np.ones((3, 2)), "b": np.array([0, 1e300, 0])})
    # These are numbers of Python's types, too.
    for number in (np.float64(1e300), np.complex128(1e300j)):
        with pytest.raises(ValueError, match=r"params\['a'\].*1e\+300j? at index \(\), which"):
            step.init({"a": number})
    assert step.init({"a": np.float64(0.5)}).params["a"].dtype == jnp.float32
    with pytest.raises(ValueError, match=r"params\['b'\] is a masked array"):
        step.init({"W": np.ones((3, 2)), "b": np.ma.masked_equal([0.0, 1.0, 2.0], 1)})


@pytest.mark.parametrize("bad", [-1, 2, 1.5, -0.25, 255])
def test_answers_outside_0_and_1(bad):
    z = np.tile(np.array([0.0, 1.0, 0.5]), (4, 1))
    if isinstance(bad, int):
        z = np.tile(np.array([0, 1, 0]), (4, 1))
    z[3, 1] = bad
    message = rf"\[1\] holds the label {bad} at index \(3, 1\), but sigmoid_binary.* from 0 to 1"
    for kind in (np.asarray, jnp.asarray):
        for way in WAYS:
            with pytest.raises(ValueError, match=message):
                way(binary, (X, kind(z)))


def test_answers_in_a_later_batch():
    step = train_step(binary, SGD)
    z = np.tile(np.array([0.0, 1.0, 0.5]), (4, 1))
    state, _ = step(step.init(START), (X, z))
    with pytest.raises(ValueError, match="holds the label -0.5"):
        step(state, (X, z - 0.5))
    for bad in ([(X, z), (X, z - 0.5)], (X, z - 0.5)):
        with pytest.raises(ValueError, match="holds the label -0.5"):
            evaluate(binary, START, bad)
    assert np.isfinite(evaluate(binary, START, (X, z - 0.5), check=False)["loss"])


def test_answers_that_the_loss_computes_are_its_own():
    def smoothed(params, example):
        x, y = example
        return binary(params, (x, jax.nn.one_hot(y, 3) * 0.8 + 0.1))

    def signs(params, example):
        x, y = example
        return binary(params, (x, (y + 1) / 2))

    for way in (with_step, with_evaluate):
        way(smoothed, (X, LABELS))
        way(signs, (X, np.ones((4, 3))))
