"""The examples of networks run from end to end, on few steps, and leave their pictures."""

import re

from running import is_a_picture, run
from sweeps import exhaustive

pytestmark = exhaustive


def test_adding_problem(tmp_path):
    printed = run("adding_problem.py", "--quick", folder=tmp_path)
    (error,) = re.findall(r"On 2000 new sequences of 20 steps: ([\d.]+)", printed)
    assert float(error) < 0.02  # always the mean: 1/6
    ((at, elsewhere),) = re.findall(r"is ([\d.]+) at a mark, ([\d.]+) elsewhere", printed)
    assert float(at) > float(elsewhere) + 0.1
    assert is_a_picture(tmp_path / "out" / "gates.png")


def test_vae(tmp_path):
    printed = run("vae.py", "--quick", folder=tmp_path)
    (bound,) = re.findall(r"ELBO of 360 test digits: (-[\d.]+)", printed)
    (pixels,) = re.findall(r"independent of each other: (-[\d.]+)", printed)
    assert float(bound) > float(pixels) + 0.5
    assert is_a_picture(tmp_path / "out" / "vae.png")


def test_digits_convolution(tmp_path):
    printed = run("digits_convolution.py", "--quick", folder=tmp_path)
    validated = re.findall(r"dropout 0\.\d +([\d.]+)%", printed)
    assert len(validated) == 3
    (mean,) = re.findall(r"accuracy on 360 test digits: .*; mean ([\d.]+)%", printed)
    assert float(mean) > 50  # after one epoch; by chance 10
    assert is_a_picture(tmp_path / "out" / "convolution.png")
