"""The examples on per-example gradients run from end to end, on few steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str, folder: Path) -> str:
    """What an example prints, run as a reader would: without our tests' settings."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dp_sgd(tmp_path):
    printed = run("dp_sgd.py", "--steps", "60", folder=tmp_path)
    rows = re.findall(r"^(.+?) +([\d.]+) +(inf|[\d.]+|\?) +([\d.]+)%$", printed, re.MULTILINE)
    accuracy = {(name, sigma): float(percent) for name, sigma, _, percent in rows}
    assert accuracy["without clipping", "0.0"] > 90
    assert accuracy["clipped", "0.0"] > 85
    assert accuracy["clipped and noise", "2.0"] > 75
    spent = [e for _, sigma, e, _ in rows if sigma != "0.0"]
    if "?" in spent:
        assert "pip install jax-privacy" in printed
    else:  # more noise, more privacy
        assert sorted(map(float, spent), reverse=True) == list(map(float, spent))


def test_poisson_sampling_draws_each_image_with_the_same_chance(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    pytest.importorskip("sklearn")
    import jax
    import numpy as np
    from dp_sgd import BATCH, draw

    size, capacity = 1000, 400
    keys = jax.random.split(jax.random.key(0), 2000)
    index, mask = jax.jit(jax.vmap(lambda k: draw(k, size, capacity)))(keys)
    counts = np.bincount(np.asarray(index)[np.asarray(mask)], minlength=size)
    q = BATCH / size
    assert abs(counts / len(keys) - q).max() < 6 * (q * (1 - q) / len(keys)) ** 0.5
    # Independent: the size of a draw varies as a binomial number does.
    assert abs(np.asarray(mask).sum(1).std() / (size * q * (1 - q)) ** 0.5 - 1) < 0.1
