"""Data read by grain: trained on as arrays in the same order are, and resumed within an epoch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn import evaluate

grain = pytest.importorskip("grain", reason="grain is missing: pip install -e '.[grain]'")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(22, 3)).astype(np.float32)
Y = RNG.normal(size=22).astype(np.float32)
PARAMS = {"W": jnp.ones(3, jnp.float32), "b": jnp.zeros((), jnp.float32)}
SGD = optax.sgd(0.1, momentum=0.9)
EPOCHS = 3


def loss(params, example):
    x, y = example
    return (params["W"] @ x + params["b"] - y) ** 2


class Examples:
    """A source of grain's. Where `fails` names an example, reading it fails once."""

    def __init__(self, fails=None):
        self.fails = fails

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        if self.fails is not None and i == self.fails[-1]:
            self.fails.pop()
            raise OSError("the disk is gone")
        return X[i], Y[i]


def dataset(source, seed=7):
    return grain.MapDataset.source(source).seed(seed).shuffle().batch(4)


def loader(source):
    sampler = grain.samplers.IndexSampler(
        len(X), shard_options=grain.sharding.NoSharding(), num_epochs=1, seed=7, shuffle=True
    )
    batch = grain.transforms.Batch(4, drop_remainder=False)
    return grain.DataLoader(data_source=source, sampler=sampler, operations=[batch])


def fit(data, epochs=EPOCHS, **options):
    return fnn.fit(loss, PARAMS, data, SGD, epochs=epochs, progress=False, **options)


def same(found, wanted):
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, wanted.params))
    assert found.history["loss"] == wanted.history["loss"]
    assert found.steps["loss"].tolist() == wanted.steps["loss"].tolist()


KINDS = {
    "map": dataset,
    "iter": lambda source: dataset(source).to_iter_dataset(),
    "function": lambda source: lambda: iter(dataset(source)),
    "loader": loader,
}


@pytest.mark.parametrize("kind", KINDS)
def test_as_arrays_in_the_same_order(kind):
    """In the order in which grain reads the numbers of the examples, with a short last batch."""
    numbers = KINDS[kind](range(len(X)))
    rows = np.concatenate(list(numbers() if kind == "function" else numbers))
    assert sorted(rows) == list(range(len(X))) and list(rows) != sorted(rows)
    arrays = X[rows], Y[rows]
    data = KINDS[kind](Examples())
    same(fit(data), fit(arrays, batch_size=4, shuffle=False))
    if kind != "function":
        found, wanted = evaluate(loss, PARAMS, data), evaluate(loss, PARAMS, (X, Y))
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)


def by_key(source, seeds):
    """Shuffled anew in each epoch, by a seed that is drawn from the epoch's key."""

    def data(key):
        seeds.append(int(jax.random.bits(key, dtype=jnp.uint32)))
        return iter(dataset(source, seeds[-1]))

    return data


def test_it_goes_on_within_an_epoch(tmp_path):
    """Reading fails in the fourth batch of the second epoch; the same call goes on from there."""
    pytest.importorskip("orbax.checkpoint")
    seeds, key = [], jax.random.key(3)
    whole = fit(by_key(Examples(), seeds), key=key)
    assert len(set(seeds)) == EPOCHS
    batches = [[(X[rows], Y[rows]) for rows in dataset(range(len(X)), seed)] for seed in seeds]
    epochs = iter(batches)
    same(whole, fit(lambda: next(epochs)))

    second = np.concatenate(list(dataset(range(len(X)), seeds[1])))
    fails, again = [-1], []

    def fail_in_the_second(key):
        batches = by_key(Examples(fails), again)(key)
        if again[-1] == seeds[1] and len(fails) == 1 and len(again) == 2:
            fails.append(int(second[13]))
        return batches

    call = {"key": key, "checkpoints": fnn.Checkpoints(tmp_path)}
    with pytest.raises(OSError, match="the disk is gone") as error:
        fit(fail_in_the_second, **call)
    assert error.value.result.state.position.tolist() == [1, 3, 6 + 3]
    found = fit(fail_in_the_second, **call)
    same(found, whole)
    assert again == [*seeds[:2], *seeds[1:]]
