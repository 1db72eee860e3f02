"""The examples on per-example gradients run from end to end, on few steps."""

import re

import pytest
from running import ROOT, run
from sweeps import exhaustive


@exhaustive
def test_dp_sgd(tmp_path):
    printed = run("dp_sgd.py", "--steps", "60", folder=tmp_path)
    rows = re.findall(r"^(.+?) +([\d.]+) +(inf|[\d.]+|\?) +([\d.]+)%$", printed, re.MULTILINE)
    accuracy = {(name, sigma): float(percent) for name, sigma, _, percent in rows}
    assert accuracy["without clipping", "0.0"] > 90
    assert accuracy["clipped", "0.0"] > 85
    assert accuracy["clipped and noise", "2.0"] > 75
    spent = [e for _, sigma, e, _ in rows if sigma != "0.0"]
    if "?" in spent:
        assert 'pip install "jax-privacy>=2.0"' in printed
    else:  # more noise, more privacy
        assert sorted(map(float, spent), reverse=True) == list(map(float, spent))


@exhaustive
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


@exhaustive
def test_kfac(tmp_path):
    printed = run("kfac.py", "--quick", "--out", "pictures", folder=tmp_path)
    final = {
        name.strip(): float(loss)
        for name, loss in re.findall(
            r"^(.+?) +loss +([\d.]+) after \d+ steps$", printed, re.MULTILINE
        )
    }
    assert len(final) == 7
    # In 50 steps KFAC comes further than the others in 250.
    assert final["KFAC"] < 8 < min(loss for name, loss in final.items() if name != "KFAC")
    assert (tmp_path / "pictures" / "kfac.png").stat().st_size > 10_000


@exhaustive
def test_attribution(tmp_path):
    printed = run("attribution.py", "--quick", "--out", "pictures", folder=tmp_path)
    rows = re.findall(
        r"^ +(\d) +(\d) +0\.\d\d +(\d \d \d \d) +(\d \d \d \d)$", printed, re.MULTILINE
    )
    assert len(rows) == 5
    helped = [label == digit for label, _, digits, _ in rows for digit in digits.split()]
    harmed = [label == digit for label, _, _, digits in rows for digit in digits.split()]
    # A digit is helped by its own kind, and harmed by others.
    assert sum(helped) > 14 and sum(harmed) < 6
    assert (tmp_path / "pictures" / "attribution.png").stat().st_size > 10_000


@exhaustive
def test_attribution_is_the_change_of_the_loss_by_small_steps(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    pytest.importorskip("sklearn")
    import attribution
    import jax
    import numpy as np

    from fnn import ops
    from fnn.layers import Linear, chain

    digits = attribution.load()
    net = chain(hidden=Linear(8), tanh=ops.tanh, output=Linear(10))
    loss = attribution.loss_of(net)
    train, test = (tuple(a[:3] for a in pair) for pair in digits)
    params = net.init(jax.random.key(0), train[0][0])
    scores = attribution.influence(net, [params], train, test)
    losses = lambda p: jax.vmap(lambda image, label: loss(p, (image, label)))(*test)
    weight = attribution.RATE * attribution.STEPS / 3
    for n in range(3):
        gradient = jax.grad(loss)(params, tuple(a[n] for a in train))
        change = jax.jvp(losses, (params,), (gradient,))[1]
        np.testing.assert_allclose(scores[n], weight * change, rtol=1e-4, atol=1e-4)


@exhaustive
def test_noise_scale(tmp_path):
    printed = run("noise_scale.py", "--quick", "--out", "pictures", folder=tmp_path)
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    loss, scale = ([float(row[i]) for row in rows] for i in (1, 2))
    assert len(rows) > 4
    assert loss[-1] < 0.7 * loss[0]
    assert scale[-1] > 2 * scale[0] > 0
    assert (tmp_path / "pictures" / "noise_scale.png").stat().st_size > 10_000
