"""The main example runs from end to end, in its quick setting, and leaves its pictures."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.exhaustive  # .ci/run runs the whole example each time


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`python examples/digits.py --quick`, as a reader would, only compiled faster."""
    folder = tmp_path_factory.mktemp("digits")
    environment = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_X64"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "digits.py"), "--quick"],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, folder / "out"


def test_prints_checks_before_and_accuracies_after(run):
    printed, _ = run
    checks, accuracies = printed.index("Gradient checks"), printed.index("Accuracy on 360")
    assert checks < accuracies
    for name in ("linear", "2 layers, relu", "2 layers, maxout", "3 layers, tanh"):
        (mean,) = re.findall(rf"{name} +│ +[\d,]+ │ +([\d.]+)%", printed[accuracies:])
        assert float(mean) > 85, name


def test_the_graph_is_an_svg_with_the_networks_operations(run):
    _, out = run
    text = " ".join(ET.parse(out / "graph.svg").getroot().itertext())
    for word in ("relu", "softmax_cross_entropy", "W1", "label"):
        assert word in text


@pytest.mark.parametrize("name", ["curves.png", "templates_linear.png", "templates_hidden.png"])
def test_the_pictures_are_not_blank(run, name):
    from matplotlib.image import imread

    _, out = run
    pixels = imread(out / name)
    assert pixels.shape[0] > 100 and pixels.shape[1] > 100
    assert np.std(pixels[..., :3]) > 0.05
