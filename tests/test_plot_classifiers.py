"""Pictures of classifiers: the numbers drawn are those of numpy."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnn import ops, plot
from fnn.layers import Linear, chain

pytest.importorskip("matplotlib")

RANDOM = np.random.default_rng(0)

# ---------------------------------------------------------------------------------- confusion

LABELS = RANDOM.integers(4, size=200)
PREDICTED = np.where(RANDOM.random(200) < 0.7, LABELS, RANDOM.integers(4, size=200))


def matrix_of(figure):
    return figure.axes[0].images[0].get_array()


def texts_of(axes):
    return {tuple(map(round, t.get_position())): t.get_text() for t in axes.texts}


def test_confusion_counts():
    figure = plot.confusion(LABELS, PREDICTED)
    wanted = [[np.sum((i == LABELS) & (j == PREDICTED)) for j in range(4)] for i in range(4)]
    np.testing.assert_array_equal(matrix_of(figure), wanted)
    assert texts_of(figure.axes[0])[(2, 1)] == str(wanted[1][2])  # x is the prediction
    right = np.mean(LABELS == PREDICTED)
    assert figure.axes[0].get_title() == f"{right:.1%} of 200 right"


def test_confusion_of_scores_and_as_fractions():
    scores = jnp.asarray(RANDOM.normal(size=(200, 5)), jnp.bfloat16)
    names = ["a", "b", "c", "d", "empty"]
    figure = plot.confusion(jnp.asarray(LABELS), scores, classes=names, normalize=True)
    best = np.asarray(scores, np.float32).argmax(axis=1)
    wanted = np.array([[np.sum((i == LABELS) & (j == best)) for j in range(5)] for i in range(5)])
    wanted = wanted.astype(float)
    wanted[:4] /= wanted[:4].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(matrix_of(figure), wanted)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == names


def test_confusion_of_many_classes_has_no_words():
    figure = plot.confusion(np.arange(40), np.arange(40))
    assert not figure.axes[0].texts and len(figure.axes) == 2
    np.testing.assert_array_equal(matrix_of(figure), np.eye(40))


@pytest.mark.parametrize(
    ("labels", "predictions", "options", "error", "message"),
    [
        ([0, 1], [0], {}, ValueError, r"shapes \(2,\) and \(1,\)"),
        ([], [], {}, ValueError, r"shapes \(0,\)"),
        ([[0]], [[0, 1]], {}, ValueError, r"\(1, 1\)"),
        ([0.5, 1], [0, 1], {}, TypeError, "labels must be whole numbers"),
        ([0, -1], [0, 1], {}, ValueError, "labels must be classes.* holds -1"),
        (["a"], ["b"], {}, TypeError, "labels must be real numbers"),
        ([0, 3], [0, 1], {"classes": "xyz"}, TypeError, "classes must be a list"),
        ([0, 3], [0, 1], {"classes": ["x", "y"]}, ValueError, "class 3 has no name"),
        ([0, 1], [[1.0, np.nan]] * 2, {}, ValueError, "nan"),
        ([0, 1], [0, 1], {"normalize": 1}, TypeError, "normalize must be True or False"),
    ],
)
def test_bad_confusion(labels, predictions, options, error, message):
    with pytest.raises(error, match=message):
        plot.confusion(labels, predictions, **options)


# --------------------------------------------------------------------------- decision boundary

W, B = np.array([1.5, -0.5]), 0.25
X = RANDOM.normal(size=(50, 2))
Y = (X @ W + B > 0).astype(int)


def test_boundary_of_one_logit():
    figure = plot.decision_boundary(lambda x: x @ W + B, X, Y, resolution=40)
    (axes,) = figure.axes
    (line,) = axes.collections[:1]  # the contour; the points follow
    vertices = np.concatenate([p.vertices for p in line.get_paths()])
    assert len(vertices) > 10
    np.testing.assert_allclose(vertices @ W + B, 0, atol=1e-6)
    low, high = X.min(axis=0), X.max(axis=0)
    left, right = low - 0.1 * (high - low), high + 0.1 * (high - low)
    np.testing.assert_allclose(axes.images[0].get_extent(), np.stack([left, right], 1).ravel())
    zeros, ones = axes.collections[1:]
    np.testing.assert_array_equal(zeros.get_offsets(), X[Y == 0])
    np.testing.assert_array_equal(ones.get_offsets(), X[Y == 1])
    # Far on one side it is that class' colour, and on the line half of each.
    picture = axes.images[0].get_array()
    xs, ys = (np.linspace(*axis, 40) for axis in zip(left, right, strict=True))
    p = 1 / (1 + np.exp(-(np.stack(np.meshgrid(xs, ys), -1) @ W + B)))
    first, second = picture[p == p.min()][0], picture[p == p.max()][0]
    pure = np.linalg.solve([[1 - p.min(), p.min()], [1 - p.max(), p.max()]], [first, second])
    np.testing.assert_allclose(picture, (1 - p)[..., None] * pure[0] + p[..., None] * pure[1])


def test_boundary_of_a_network_of_three_classes():
    net = chain(Linear(8), ops.tanh, Linear(3))
    params = net.init(jax.random.key(0), jnp.zeros(2))
    f = functools.partial(net, params)
    region = ((-3, 3), (-2, 2))
    figure = plot.decision_boundary(f, region=region, resolution=60, classes=["a", "b", "c"])
    (axes,) = figure.axes
    assert axes.get_xlim() == (-3, 3) and axes.get_ylim() == (-2, 2)
    for line in axes.collections:
        for vertex in np.concatenate([p.vertices for p in line.get_paths()]):
            scores = np.sort(np.asarray(f(jnp.asarray(vertex))))
            assert scores[2] - scores[1] < 0.05  # two are the largest, but for interpolation


def test_boundary_into_given_axes():
    from matplotlib.figure import Figure

    figure = Figure()
    left, right = figure.subplots(1, 2)
    right.plot([1, 2])
    drawn = plot.decision_boundary(lambda x: x, X, axes=right, resolution=5)
    assert drawn is figure and not left.images and len(right.images) == 1 and not right.lines
    # No line where one class wins everywhere.
    alone = plot.decision_boundary(lambda x: 1 + 0 * x[0], X, resolution=5)
    assert len(alone.axes[0].collections) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((W, X), TypeError, "f must be a function of one point"),
        ((lambda x: x,), ValueError, "pass points, or region"),
        ((lambda x: x, X[:, 0]), ValueError, r"points must have shape \(examples, 2\).*\(50,\)"),
        ((lambda x: x, X, Y[1:]), ValueError, r"labels must have shape \(50,\).*\(49,\)"),
        ((lambda x: x, None, Y), ValueError, "labels are given, but no points"),
        ((lambda x: jnp.outer(x, x), X), ValueError, r"returned shape \(2, 2\)"),
        ((lambda x: x / 0, X), ValueError, "f returned inf or nan"),
        ((lambda x: x, X * np.nan), ValueError, "points holds inf or nan"),
    ],
)
def test_bad_boundary(arguments, error, message):
    with pytest.raises(error, match=message):
        plot.decision_boundary(*arguments, resolution=4)


@pytest.mark.parametrize("region", [((1, 0), (0, 1)), (0, 1), ((0, 1), (2, 2))])
def test_bad_region(region):
    with pytest.raises(ValueError, match="region must be"):
        plot.decision_boundary(lambda x: x, region=region)


# ------------------------------------------------------------------------ the lecture's reading

NET = chain(hidden=Linear(20), f=ops.relu, output=Linear(3))
IMAGE = RANDOM.random(16)
PARAMS = NET.init(jax.random.key(1), jnp.zeros(16))
PARAMS["hidden"]["b"] = PARAMS["hidden"]["b"] + 0.1
PARAMS["output"]["b"] = jnp.array([0.3, -0.2, 0.1])
ARRAYS = [np.asarray(PARAMS[k][n], float) for k in ("hidden", "output") for n in ("W", "b")]


def test_two_layers():
    figure = plot.two_layers(PARAMS, IMAGE, most=4, classes=["a", "b", "c"])
    W1, b1, W2, b2 = ARRAYS
    h = np.maximum(W1 @ IMAGE + b1, 0)
    added = (W2 * h).T
    order = np.argsort(-np.abs(added).max(axis=1), kind="stable")
    image, bars, table = figure.axes
    np.testing.assert_array_equal(image.images[0].get_array(), IMAGE.reshape(4, 4))
    scores = W2 @ h + b2
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], scores)
    np.testing.assert_allclose(scores, NET(PARAMS, IMAGE), rtol=1e-6)
    for cell, i in zip(table.child_axes, order[:4], strict=True):
        np.testing.assert_array_equal(cell.images[0].get_array(), W1[i].reshape(4, 4))
    matrix = table.images[0].get_array()
    rest = added[order[4:]].sum(axis=0)
    np.testing.assert_allclose(matrix, [*added[order[:4]], rest, b2, scores])
    np.testing.assert_allclose(matrix[:-1].sum(axis=0), scores)
    rows = [t.get_text() for t in table.get_yticklabels()]
    shown = [f"template {i}, h = {h[i]:.2f}" for i in order[:4]]
    assert rows == [*shown, "16 others", "bias b2", "score"]


def test_two_layers_of_arrays_and_in_either_order():
    wanted = plot.two_layers(PARAMS, IMAGE).axes[-1].images[0].get_array()
    turned = {"a": PARAMS["output"], "b": PARAMS["hidden"]}
    for params in (tuple(ARRAYS), turned):
        found = plot.two_layers(params, IMAGE.reshape(4, 4, 1), f=ops.relu)
        np.testing.assert_allclose(found.axes[-1].images[0].get_array(), wanted, rtol=1e-5)
    without = {name: {"W": layer["W"]} for name, layer in PARAMS.items()}
    found = plot.two_layers(without, IMAGE, f=np.tanh, most=50)
    assert found.axes[-1].images[0].get_array().shape == (22, 3)
    colours = plot.two_layers(
        (np.ones((2, 12)), np.zeros(2), np.ones((2, 2)), np.ones(2)), range(12)
    )
    assert colours.axes[0].images[0].get_array().shape == (2, 2, 3)


@pytest.mark.parametrize(
    ("params", "image", "error", "message"),
    [
        ({"W": 1}, IMAGE, ValueError, "those of two Linear layers"),
        (ARRAYS[:3], IMAGE, TypeError, r"or \(W1, b1, W2, b2\)"),
        (ARRAYS, IMAGE[1:], ValueError, "15 pixels, but W1.*16"),
        ([ARRAYS[0], ARRAYS[3], *ARRAYS[2:]], IMAGE, ValueError, r"shapes W1 \(hidden, pixels\)"),
        (ARRAYS, IMAGE * np.inf, ValueError, "image holds inf or nan"),
        (ARRAYS, "cat", TypeError, "image must be real numbers"),
    ],
)
def test_bad_two_layers(params, image, error, message):
    with pytest.raises(error, match=message):
        plot.two_layers(params, image)


def test_more_bad_two_layers():
    with pytest.raises(ValueError, match=r"f must return shape \(20,\), but returned \(\)"):
        plot.two_layers(PARAMS, IMAGE, f=np.sum)
    with pytest.raises(ValueError, match=r"images of shape \(3, 4\)"):
        plot.two_layers(PARAMS, IMAGE, shape=(3, 4))
    with pytest.raises(ValueError, match="each of the 3 classes, but has 2"):
        plot.two_layers(PARAMS, IMAGE, classes=["a", "b"])


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (
        lambda: plot.confusion(LABELS, PREDICTED),
        lambda: plot.decision_boundary(lambda x: x, X, resolution=2),
        lambda: plot.two_layers(PARAMS, IMAGE),
    ):
        with pytest.raises(ImportError) as error:
            draw()
        assert str(error.value) == 'fnn.plot needs matplotlib: pip install "matplotlib>=3.9"'


@pytest.mark.parametrize(
    ("f", "options", "message"),
    [
        (lambda x: x, {"axes": 3}, "axes must be matplotlib's Axes, but got 3"),
        (lambda x: x, {"classes": 3}, "classes must be a list of strings, but got 3"),
        (lambda x: x[:0], {}, r"f must return scores .* shape \(0,\)"),
        (lambda x: x * 1j, {}, "f's result must be real numbers"),
        (lambda x: {"scores": x}, {}, "f's result must be real numbers, but got a dict"),
    ],
)
def test_boundaries_of_what_is_no_classifier(f, options, message):
    with pytest.raises((TypeError, ValueError), match=f"^decision_boundary: {message}"):
        plot.decision_boundary(f, np.eye(2), resolution=3, **options)
