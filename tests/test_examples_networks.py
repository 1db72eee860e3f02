"""The examples of networks run from end to end, on few steps, and leave their pictures."""

import re

import numpy as np
import pytest
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


def test_language(tmp_path):
    printed = run("language.py", "--quick", folder=tmp_path)
    found = dict(re.findall(r"^    ([\d.]+)  (.+)$", printed, re.MULTILINE)[::-1])
    bits = {name.split(",")[0]: float(value) for value, name in found.items()}
    assert bits["bz2"] < bits["gzip"] < 3
    for name in ("GPT", "LSTM"):
        assert f"{name}, " in printed and bits[name] < 6  # after fifty steps; at first 8
    assert printed.count("    def read(self, ") == 2  # what each writes
    assert is_a_picture(tmp_path / "out" / "language.png")


def test_lora(tmp_path):
    printed = run("lora.py", "--quick", folder=tmp_path)
    rows = re.findall(r"^    (.+?) +([\d,]+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    assert [name.split()[0] for name, *_ in rows] == ["trained", "LoRA", "all"]
    base, adapters, everything = (float(of_second) for *_, of_second in rows)
    assert adapters < base and everything < base
    sizes = [int(size.replace(",", "")) for _, size, *_ in rows]
    assert sizes[1] < sizes[0] / 5 and sizes[2] == sizes[0]
    assert is_a_picture(tmp_path / "out" / "lora.png")


def test_interoperation(tmp_path):
    for library in ("diffrax", "numpyro", "optimistix"):
        pytest.importorskip(library)
    printed = run("interoperation.py", folder=tmp_path)
    means = re.findall(r"^(\w+): posterior means W (.+), b (.+)$", printed, re.MULTILINE)
    assert [sampler for sampler, *_ in means] == ["numpyro", "Langevin"]
    # Linear regression on x of mean zero, whose posterior is normal: Bishop, 2006, (3.53).
    x = np.linspace(-2, 2, 20)
    weight = np.sum(x * np.sin(2 * x)) / (np.sum(x**2) + 0.5**2)
    for _, W, b in means:
        np.testing.assert_allclose([float(W), float(b)], [weight, 0], atol=0.03)


def test_multi_device(tmp_path):
    printed = run("multi_device.py", "--steps", "2", folder=tmp_path)
    differences = re.findall(r"at most ([\d.e+-]+) from one device's", printed)
    assert len(differences) == 5 and max(map(float, differences)) < 1e-4
    held = [tuple(map(int, m)) for m in re.findall(r"holds (\d+) of the state's (\d+) kB", printed)]
    assert held[0][0] == held[0][1]
    assert held[1][0] < held[1][1] / 7.9 and held[2][0] < held[2][1] / 7


def test_sweep(tmp_path):
    printed = run("sweep.py", "--quick", folder=tmp_path)
    assert "SweepResult: 16 networks, seed (2) × width (2) × learning_rate (4)" in printed
    ((width, rate),) = re.findall(r"The best: width (\d+), learning rate ([\d.]+)", printed)
    # Of 1e-4, 0.002, 0.05 and 1 the first is too small for four epochs, the last too large.
    assert width == "128" and 1e-3 < float(rate) < 0.1
    assert is_a_picture(tmp_path / "out" / "sweep_rates.png")
    assert is_a_picture(tmp_path / "out" / "sweep_curves.png")


def test_resume(tmp_path):
    """Killed once; `test_resume.py` kills more."""
    printed = run("resume.py", "--quick", "--out", "runs", folder=tmp_path)
    assert "the state of both, bit by bit: the same" in printed
    assert (tmp_path / "runs" / "resume" / "killed").is_dir()
