"""Pictures: what they show, and what is said where matplotlib is missing."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import exhaustive

from fnn import plot

HISTORY = {
    "loss": [1.0, 0.5, 0.25],
    "accuracy": [0.5, 0.7, 0.9],
    "validation_loss": [1.1, 0.7, 0.6],
    "seconds": [1.0, 1.0, 1.0],
}


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (lambda: plot.curves(HISTORY), lambda: plot.templates(np.ones((2, 4)))):
        with pytest.raises(ImportError) as error:
            draw()
        assert str(error.value) == 'fnn.plot needs matplotlib: pip install "matplotlib>=3.9"'


@exhaustive
def test_importing_the_module_does_not_import_matplotlib():
    import subprocess

    code = "import sys, fnn.plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    figure = plot.curves(HISTORY)
    loss, accuracy = figure.axes
    assert loss.get_title() == "loss" and accuracy.get_title() == "accuracy"
    training, validation = loss.lines
    np.testing.assert_array_equal(training.get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(training.get_ydata(), HISTORY["loss"])
    np.testing.assert_array_equal(validation.get_ydata(), HISTORY["validation_loss"])
    assert loss.get_yscale() == "log" and accuracy.get_yscale() == "linear"
    assert [t.get_text() for t in loss.get_legend().get_texts()] == ["training", "validation"]
    figure.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one epoch"):
        plot.curves({"loss": []})


def test_curves_of_numbers_of_16_bits():
    """numpy makes no array of a list of JAX's bfloat16 numbers."""
    pytest.importorskip("matplotlib")
    (axes,) = plot.curves({"loss": [jnp.bfloat16(2), jnp.bfloat16(1.5)]}).axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [2, 1.5])


def test_grey_templates_share_a_scale():
    pytest.importorskip("matplotlib")
    W = np.arange(5 * 64).reshape(5, 64) - 100.0
    figure = plot.templates(W, titles=list("abcde"))
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 5 and len(figure.axes) == 6
    for i, image in enumerate(images):
        np.testing.assert_array_equal(image.get_array(), W[i].reshape(8, 8))
        assert image.get_clim() == (-219.0, 219.0)
    assert [axes.get_title() for axes in figure.axes[:5]] == list("abcde")


def test_colour_templates_and_maxout_pieces():
    pytest.importorskip("matplotlib")
    W = np.random.default_rng(0).normal(size=(2, 3, 32 * 32 * 3))
    figure = plot.templates(W, columns=3)
    images = [axes.images[0].get_array() for axes in figure.axes]
    assert len(images) == 6
    picture = W[1, 0].reshape(32, 32, 3)
    wanted = (picture - picture.min()) / (picture.max() - picture.min())
    np.testing.assert_allclose(images[3], wanted)
    plot.templates(np.zeros((1, 6)), image=(2, 3))


@pytest.mark.parametrize(
    ("W", "options", "message"),
    [
        (np.ones(4), {}, r"shape \(out, pixels\), but has \(4,\)"),
        (np.ones((2, 5)), {}, "have 5 pixels, which don't make images"),
        (np.ones((2, 4)), {"image": (3, 3)}, r"have 4 pixels.*\(3, 3\)"),
        (np.ones((2, 4)), {"titles": ["a"]}, "each of W's 2 templates, but has 1"),
    ],
)
def test_bad_templates(W, options, message):
    with pytest.raises(ValueError, match=message):
        plot.templates(W, **options)


LOSSES = {"loss": [1.0]}


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot.curves({3: [1.0]}), "curves: history's keys must be names, but one is 3"),
        (lambda: plot.curves({"loss": 3.0}), "curves: history must .* but got {loss: float}"),
        (lambda: plot.curves(np.ones(2)), "curves: .* got an array of dtype float64 and shape"),
        (lambda: plot.templates(np.ones((0, 4))), r"templates: W must .* but has \(0, 4\)"),
        (lambda: plot.templates(np.ones((2, 0))), r"templates: W must .* but has \(2, 0\)"),
        (lambda: plot.templates(np.ones(4)), r"templates: W must .* but has \(4,\)"),
        (lambda: plot.templates(np.ones((2, 4)), titles=3), "templates: titles must be a list"),
        (
            lambda: plot.templates(np.ones((2, 4)), (-2, -2)),
            r"templates: image\[0\] must be .* got -2",
        ),
        (lambda: plot.templates(np.ones((2, 4)), (3, 2)), "templates: the rows of W have 4 pixels"),
        (lambda: plot.confusion([0], [0], classes=3), "confusion: classes must be a list"),
        (lambda: plot.confusion([0], np.ones((1, 0))), r"confusion: predictions .* \(1, 0\)"),
        (lambda: plot.confusion([0], [[1], [1, 2]]), "confusion: predictions must be real numbers"),
        (lambda: plot.confusion([0.5], [0]), "confusion: labels .* but holds 0.5"),
    ],
)
def test_errors_name_function_argument_and_what_it_got(draw, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        draw()
