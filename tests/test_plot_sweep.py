"""Pictures of a sweep: their lines are medians, their bands go from the lowest to the highest."""

import numpy as np
import pytest

from fnn import ops, plot
from fnn.plot import against, bands
from fnn.sweeps import SweepResult
from fnn.sweeps.axes import Axes

RATES = (1e-3, 1e-2, 1e-1, 1.0)
RNG = np.random.default_rng(0)


def found(axes=None, losses=None):
    """A sweep's result with made-up losses, of five epochs each."""
    axes = Axes("test", axes or {"learning_rate": RATES, "seed": (0, 1, 2)})
    losses = np.exp(RNG.normal(size=(*axes.shape, 5))) if losses is None else losses
    return SweepResult(
        axes,
        {"loss": losses.reshape(axes.size, 5)},
        np.full(axes.size, 5),
        np.ones((axes.size, 5), bool),
        [None] * axes.size,
        False,
        [("vmap", axes.size)],
        0.0,
    )


def test_against_a_rate_shows_the_medians_over_seeds():
    result = found()
    (axes,) = against(result, "learning_rate").axes
    (line,) = axes.lines
    np.testing.assert_allclose(line.get_xdata(), RATES)
    last = result.history["loss"][..., -1]
    np.testing.assert_allclose(line.get_ydata(), np.median(last, axis=1))
    band = axes.collections[0].get_paths()[0].vertices
    for rate, low, high in zip(RATES, last.min(axis=1), last.max(axis=1), strict=True):
        at = band[band[:, 0] == rate, 1]
        assert at.min() == pytest.approx(low) and at.max() == pytest.approx(high)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_xlabel() == "learning rate" and axes.get_ylabel() == "loss"


@pytest.mark.parametrize("change", ["log", "wide", "negative", "small", "zero"])
def test_where_the_median_diverged_there_is_no_line_and_the_band_is_open(change):
    losses = np.exp(RNG.normal(size=(4, 3, 5)))
    if change == "wide":
        losses = losses**100
    if change in ("negative", "zero"):
        losses = -(losses**3) if change == "negative" else losses.max() - losses
        losses -= losses.max() + (1e-9 if change == "negative" else 0.0)
    if change == "small":
        losses *= 1e-9
    losses[3, :2, -1] = np.nan
    losses[2, 0, -1] = np.inf
    result = found(losses=losses)
    (axes,) = against(result, "learning_rate").axes
    assert len(axes.lines[0].get_xdata()) == 3
    top = axes.get_ylim()[1]
    band = np.concatenate([path.vertices for path in axes.collections[0].get_paths()])
    assert band[band[:, 0] == RATES[2], 1].max() > top


def test_a_line_for_each_setting_and_words_for_what_is_no_number():
    result = found({"activation": (ops.relu, ops.tanh), "seed": (0, 1), "width": (8, 64)})
    (panel,) = against(result, "activation").axes
    assert [t.get_text() for t in panel.get_xticklabels()] == ["relu", "tanh"]
    assert [line.get_label() for line in panel.lines] == ["width 8", "width 64"]
    np.testing.assert_allclose(
        panel.lines[1].get_ydata(), np.median(result.history["loss"][:, :, 1, -1], axis=1)
    )


def test_bands_are_medians_over_the_epochs():
    result = found()
    (axes,) = bands(result).axes
    for line, entries in zip(axes.lines, result.history["loss"], strict=True):
        np.testing.assert_allclose(line.get_xdata(), np.arange(1, 6))
        np.testing.assert_allclose(line.get_ydata(), np.median(entries, axis=0))
    assert [line.get_label() for line in axes.lines] == [
        f"learning rate {rate:.3g}" for rate in RATES
    ]
    assert len(axes.collections) == 4


def test_of_many_settings_the_best_are_drawn():
    rates = tuple(np.geomspace(1e-4, 1, 20).tolist())
    result = found({"learning_rate": rates, "seed": (0, 1)})
    (axes,) = bands(result).axes
    assert len(axes.lines) == 8
    last = np.median(result.history["loss"][..., -1], axis=1)
    best = [f"learning rate {rates[i]:.3g}" for i in np.argsort(last)[7::-1]]
    assert [line.get_label() for line in axes.lines] == best  # the highest on top


def test_bands_where_one_diverged_or_was_dropped():
    losses = np.exp(RNG.normal(size=(4, 3, 5)))
    losses[0, 0, 2:] = np.inf  # one of three
    losses[1, :2, 3:] = np.nan  # two of three
    result = found(losses=losses)
    result.epochs[2, 0] = 2  # given up
    losses[2, 0, 2:] = np.nan
    result.epochs[3] = 3
    losses[3, :, 3:] = np.nan
    result.history["loss"] = losses
    (axes,) = bands(result).axes
    lines = [line.get_ydata() for line in axes.lines]
    one = np.where(np.isnan(losses), np.inf, losses)
    np.testing.assert_allclose(lines[0], np.median(one[0], axis=0))
    np.testing.assert_allclose(lines[1][:3], np.median(losses[1, :, :3], axis=0))
    assert np.isnan(lines[1][3:]).all()
    np.testing.assert_allclose(lines[2][:2], np.median(losses[2, :, :2], axis=0))
    np.testing.assert_allclose(lines[2][2:], losses[2, 1:, 2:].mean(axis=0))
    assert np.isnan(lines[3][3:]).all() and np.isfinite(lines[3][:3]).all()
    top = axes.get_ylim()[1]
    for i, band in enumerate(axes.collections):
        vertices = np.concatenate([path.vertices for path in band.get_paths()])
        is_open = vertices[vertices[:, 0] == 4, 1] > top
        assert is_open.any() == (i < 2)


def test_of_many_settings_those_that_halving_kept_are_drawn():
    rates = tuple(np.geomspace(1e-4, 1, 20).tolist())
    losses = np.exp(RNG.normal(size=(20, 1, 5)))
    losses[:8, :, 2:] = np.nan
    losses[:8] /= 100
    result = found({"learning_rate": rates, "seed": (0,)}, losses)
    result.epochs[:8] = 2
    (axes,) = bands(result).axes
    drawn = {line.get_label() for line in axes.lines}
    assert len(drawn) == 8 and drawn <= {f"learning rate {rate:.3g}" for rate in rates[8:]}


def test_without_seeds_there_are_no_bands():
    result = found({"learning_rate": RATES})
    (axes,) = against(result, "learning_rate").axes
    assert not axes.collections
    np.testing.assert_allclose(axes.lines[0].get_ydata(), result.history["loss"][:, -1])


def minus(result):
    result.history["loss"] = -result.history["loss"]
    return result


def with_arrays(result):
    result.history["parts"] = np.zeros((*result.epochs.shape, 5, 2))
    return result


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (
            lambda r: plot.against({"loss": [1.0]}, "seed"),
            TypeError,
            "pass what fnn.sweep returned",
        ),
        (lambda r: against(r, "width"), ValueError, "no axis 'width'; there are learning_rate"),
        (lambda r: bands(r, over="width"), ValueError, "no axis 'width'"),
        (lambda r: bands(r, log=1), TypeError, "bands: log must be True or False"),
        (lambda r: bands(minus(r), log=True), ValueError, "bands: log=True wants positive numbers"),
        (lambda r: against(minus(r), "seed", log=True), ValueError, "but one is -[0-9.]+"),
        (lambda r: bands(r, over=3), TypeError, "over must be the name of an axis, .* got 3"),
        (lambda r: against(r, None), TypeError, "name must be that of a hyperparameter"),
        (lambda r: bands(r, metric=["loss"]), TypeError, "metric must be a quantity's name"),
        (lambda r: bands(with_arrays(r), metric="parts"), ValueError, "isn't a number but an arr"),
        (lambda r: r.best(largest="loss"), TypeError, "best: largest must be True or False"),
    ],
    ids=[
        "no result",
        "no such name",
        "no such axis",
        "log",
        "bands of the log of what is negative",
        "against the log of what is negative",
        "over",
        "no name",
        "metrics",
        "an array",
        "largest",
    ],
)
def test_what_is_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call(found())
