"""The examples of pictures run from end to end, on few epochs, and leave what they say."""

import csv
import re

import pytest
from running import is_a_picture, run
from sweeps import exhaustive

pytestmark = exhaustive


def test_two_moons(tmp_path):
    image = pytest.importorskip("PIL.Image")
    printed = run("two_moons.py", "--quick", folder=tmp_path)
    (accuracy,) = re.findall(r"new points: accuracy ([\d.]+)%", printed)
    assert float(accuracy) > 80  # after ten epochs; by chance 50
    with image.open(tmp_path / "out" / "two_moons.gif") as animation:
        assert animation.n_frames == 4
    assert is_a_picture(tmp_path / "out" / "two_moons.png")


def test_the_animation_in_docs_is_small_and_of_this_example():
    from running import ROOT

    image = pytest.importorskip("PIL.Image")
    path = ROOT / "docs" / "two_moons.gif"
    assert path.stat().st_size < 1_000_000
    with image.open(path) as animation:
        assert animation.n_frames > 20


def test_pictures(tmp_path):
    printed = run("pictures.py", "--quick", folder=tmp_path)
    (accuracy,) = re.findall(r"Accuracy on 360 test digits: ([\d.]+)%", printed)
    assert float(accuracy) > 50  # after three epochs; by chance 10
    for name in ("learning_rates", "activations", "confusion", "surface", "reading", "mistake"):
        assert is_a_picture(tmp_path / "out" / f"{name}.png"), name
    with open(tmp_path / "out" / "log.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]
