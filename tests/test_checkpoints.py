"""Checkpoints of training states: as they went in, checked when read, and none lost to another."""

import collections
import errno
import json
import os
import pickle
import shutil
import subprocess

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sweeps import exhaustive

import fnn
from fnn.train import checkpoint_files, keeping
from fnn.train.checkpoints import CheckpointError, Checkpoints
from fnn.train.configuration import of_arrays, of_function
from fnn.train.interrupts import Interrupts
from fnn.train.result import Work

Pair = collections.namedtuple("Pair", "left right")
ADAM = optax.adam(1e-3)


def state_of(params, position=(1, 0, 10), **more):
    state = fnn.State(params, {}, jnp.int32(position[2]), np.array(position, np.int32))
    return state._replace(**more)


def save(folder, *states, scores=(), **options):
    """Write states as fit does: at the end of an epoch each."""
    checkpoints = Checkpoints(folder, **{"every": 1} | options)
    keeper = keeping.Keeper(checkpoints, {}, 99, None, Interrupts())
    steps = {"loss": np.array([0.5, 0.25], np.float32), "half": jnp.ones(2, jnp.bfloat16)}
    with keeper.open():
        for i, state in enumerate(states):
            record = {"loss": 0.5, **({"validation_loss": scores[i]} if scores else {})}
            work = Work(state, lambda: None, None)
            keeper.begin(work)
            work.log.extend(steps, np.array([4, 4]))
            work.log.history = {"loss": [0.5], "lists": [np.arange(3.0)], "skipped": [1]}
            work._now = state, 0
            keeper.epoch_over(work, i + 1, record)
        keeper._finish()
    return checkpoints


W = np.arange(6.0, dtype=np.float32).reshape(2, 3)


def trees():
    return {
        "integer keys": {1: W, 20: W + 1, -3: W},
        "keys of one text": {"1": W, "01": W + 1},
        "odd keys": {"a/b": W, "a.b": W + 1, "": W, "é ": W},
        "tuples": (W, (W, [W, W])),
        "namedtuples": {"pair": Pair(W, {"x": W})},
        "None and nothing": {"a": None, "b": {}, "c": [], "d": W, "e": ()},
        "optax": optax.inject_hyperparams(optax.adam)(1e-3).init({"W": W}),
        "dtypes": {
            "bfloat16": jnp.ones((2, 3), jnp.bfloat16) * 1.5,
            "float8": jnp.ones(3, jnp.float8_e4m3fn),
            "int4": jnp.arange(-4, 4).astype(jnp.int4),
            "float64": jnp.array([1 / 3], jnp.float64),
            "complex64": jnp.array([1 + 2j], jnp.complex64),
            "bool": jnp.array([True, False]),
            "uint8": jnp.arange(3, dtype=jnp.uint8),
            "int64": jnp.array(2**40),
        },
        "keys": {
            "one": jax.random.key(3),
            "many": jax.random.split(jax.random.key(0, impl="rbg"), 4),
        },
        "raw keys": {"key": jax.random.PRNGKey(0)},
        "shapes": {"scalar": jnp.float32(2.0), "empty": jnp.zeros((0, 3)), "one": jnp.ones((1, 1))},
        "not a number": {"W": jnp.array([jnp.nan, jnp.inf, -0.0])},
    }


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_trees_come_back_as_they_went_in(tmp_path):
    """All kinds in one state: each its own checkpoint would take ten times as long."""
    params = trees()
    state = state_of(params, model_state={"statistics": [W]})
    checkpoints = save(tmp_path, state)
    like = jax.tree.map(lambda x: jnp.zeros_like(x) if x.dtype == float else x, state)
    result = checkpoints.load(like)
    assert_same(result.state, state)
    assert result.history["loss"] == [0.5] and result.history["skipped"] == [1]
    np.testing.assert_array_equal(result.history["lists"], [np.arange(3.0)])
    assert list(result.history) == ["loss", "lists", "skipped"]
    assert result.steps["half"].dtype == jnp.bfloat16
    assert result.steps["loss"].tolist() == [0.5, 0.25]
    assert_same(checkpoints.load_params(params), params)
    types = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params["dtypes"]))
    only = save(tmp_path / "types", state_of(params["dtypes"])).load_params(types)
    assert_same(only, params["dtypes"])


def test_what_comes_back_is_the_programs_own(tmp_path):
    state = state_of({"W": jnp.asarray(W)})
    result = save(tmp_path, state).load(state)
    assert isinstance(result.params["W"], jax.Array) and not result.params["W"].committed
    assert result.interrupted  # in epoch 1 of 99


# ------------------------------------------------------------------------------------ other trees


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (
            {"W": W.T},
            r"state.params\['W'\] is float32\[2,3\] in the checkpoint, float32\[3,2\] here",
        ),
        ({"W": W.astype(np.float64)}, r"float32\[2,3\] in the checkpoint, float64\[2,3\] here"),
        ({"V": W}, r"state.params\['V'\] is only here, not in the checkpoint"),
        ({}, r"state.params\['W'\] is only in the checkpoint, not here"),
        ({"W": [W]}, r"state.params\['W'\]\[0\] is only here"),
    ],
    ids=["shape", "dtype", "name", "missing", "deeper"],
)
def test_another_tree(folder_of_two, params, said):
    checkpoints, before = folder_of_two
    with pytest.raises(CheckpointError, match=said) as error:
        checkpoints.load(states()[0]._replace(params=params))
    assert "of another network or optimiser" in str(error.value) and error.value.step == 20
    assert listing(checkpoints.folder) == before


@pytest.fixture(scope="module")
def folder_of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    checkpoints = save(folder, *states())
    return checkpoints, listing(folder)


# More than a kilobyte, which orbax keeps in a file apart, and not to be compressed.
NOISE = np.random.default_rng(0).integers(0, 2**32, (40, 40), np.uint32).view(np.float32)


def states():
    more = {"noise": NOISE}
    return [state_of({"W": W + i}, (i + 1, 0, 10 * (i + 1)), model_state=more) for i in range(2)]


def listing(folder):
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


# ---------------------------------------------------------------------------------------- damage


def files_of(folder, step):
    return sorted(p for p in (folder / f"{step:010d}").rglob("*") if p.is_file())


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 16
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest(folder):
    return max(files_of(folder, 20), key=lambda p: p.stat().st_size * ("about" not in str(p)))


DAMAGES = {
    "a bit of the numbers": lambda f: flip(largest(f)),
    "numbers cut short": lambda f: truncate(largest(f)),
    "a bit of about": lambda f: flip(f / "0000000020/about/metadata"),
    "about cut short": lambda f: truncate(f / "0000000020/about/metadata"),
    "no about": lambda f: (f / "0000000020/about/metadata").unlink(),
    "no arrays": lambda f: shutil.rmtree(f / "0000000020/arrays"),
    "another program's": lambda f: (
        shutil.rmtree(f / "0000000020"),
        (f / "0000000020").mkdir(),
        (f / "0000000020/data.bin").write_bytes(b"?"),
    ),
    "about of another kind": lambda f: (f / "0000000020/about/metadata").write_text('{"W": 1}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_and_the_one_before_is_offered(folder_of_two, tmp_path, damage):
    source, _ = folder_of_two
    folder = tmp_path / "copy"
    shutil.copytree(source.folder, folder)
    DAMAGES[damage](folder)
    before = listing(folder)
    checkpoints = Checkpoints(folder)
    like = states()[0]
    with pytest.raises(
        CheckpointError, match="the checkpoint of step 20 in .* is damaged"
    ) as error:
        checkpoints.load(like)
    assert error.value.step == 20 and error.value.previous == 10
    assert ".discard(20) sets this one aside" in str(error.value)
    assert listing(folder) == before
    assert checkpoints.load(like, 10).params["W"].tolist() == W.tolist()
    assert "step 10, 1 epochs over" in repr(checkpoints)
    aside = checkpoints.discard(20)
    assert aside.exists() and checkpoints.steps() == [10]
    assert checkpoints.load(like).params["W"].tolist() == W.tolist()


def test_each_bit_of_the_numbers_counts(folder_of_two, tmp_path):
    """Wherever a bit is flipped: it's told, or what is read is right all the same."""
    source, _ = folder_of_two
    folder = tmp_path / "copy"
    shutil.copytree(source.folder, folder)
    like, told = states()[1], 0
    for path in files_of(folder, 20):
        for at in (0.1, 0.5, 0.9):
            data = path.read_bytes()
            flip(path, at)
            try:
                assert_same(Checkpoints(folder).load(like).state, like)
            except CheckpointError:
                told += 1
            path.write_bytes(data)
    assert told >= 8


def test_when_all_are_damaged(tmp_path):
    checkpoints = save(tmp_path, states()[0])
    truncate(tmp_path / "0000000010/about/metadata")
    with pytest.raises(CheckpointError, match="no whole one before it: .* training begins anew"):
        checkpoints.load(states()[0])


# ------------------------------------------------------------------------------------ the folder


@exhaustive
def test_the_newest_and_the_best_are_kept(tmp_path):
    scores = [0.5, 0.2, float("nan"), 0.3, 0.2, 0.9]
    many = [state_of({"W": W + i}, (i, 0, i)) for i in range(1, 7)]
    for higher, best in {False: 2, True: 6}.items():
        options = {"keep": 2, "best": "validation_loss", "higher": higher}
        checkpoints = save(tmp_path / str(higher), *many, scores=scores, **options)
        assert checkpoints.steps() == sorted({5, 6, best})
        assert checkpoints.best_step() == best
        assert checkpoints.load(many[0], "best").params["W"].tolist() == (W + best).tolist()
    shown = repr(checkpoints)
    assert "step 6, 6 epochs over" in shown and "validation_loss 0.9 (best)" in shown
    assert "keep=2" in shown and len(shown.splitlines()) == 3
    assert save(tmp_path / "all", *many, keep=None).steps() == [1, 2, 3, 4, 5, 6]


def test_a_second_checkpoint_of_the_same_step_takes_the_place_of_the_first(tmp_path):
    within, end = state_of({"W": W}, (0, 5, 5)), state_of({"W": W + 1}, (1, 0, 5))
    checkpoints = save(tmp_path, within, end)
    assert checkpoints.steps() == [5]
    assert checkpoints.load(end).params["W"].tolist() == (W + 1).tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "0000000005.1"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    checkpoints = save(tmp_path, states()[0])
    for name in ("0000000020.orbax-checkpoint-tmp", "0000000005.deleted"):
        (tmp_path / name / "arrays").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "mine.orbax-checkpoint-tmp").mkdir()
    assert checkpoints.steps() == [10]
    save(tmp_path, states()[1])
    names = sorted(p.name for p in tmp_path.iterdir())
    mine = ["mine.orbax-checkpoint-tmp", "notes.txt"]
    assert names == [".lock", "0000000010", "0000000020", *mine]


def test_two_runs_in_one_folder(tmp_path):
    keeper = keeping.Keeper(Checkpoints(tmp_path), {}, 1, None, Interrupts())
    refused = pytest.raises(CheckpointError, match="another run writes checkpoints to")
    with keeper.open(), refused:
        save(tmp_path, states()[0])
    save(tmp_path, states()[0])


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    checkpoints = save(tmp_path, states()[0])
    before = listing(tmp_path)
    refuse = lambda *args, **kwargs: (_ for _ in ()).throw(
        OSError(errno.EROFS, "Read-only file system", str(tmp_path))
    )
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        with pytest.raises(CheckpointError, match="can't be written to .*Read-only file system"):
            save(tmp_path, states()[1])
    assert listing(tmp_path) == before
    assert checkpoints.load(states()[0]).params["W"].tolist() == W.tolist()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't be written"):
        Checkpoints(tmp_path / "file" / "deeper")
        save(tmp_path / "file" / "deeper", states()[0])


def test_a_full_disk(tmp_path, monkeypatch, caplog):
    """Orbax's threads meet it where they write."""
    checkpoints = save(tmp_path, states()[0])
    before = listing(tmp_path)

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("etils.epath.backend._OsPathBackend.rename", full, raising=False)
        patch.setattr(os, "rename", full)
        patch.setattr(os, "replace", full)
        with pytest.raises(CheckpointError, match="step 20 can't be written") as error:
            save(tmp_path, states()[1])
    assert "No space left" in str(error.value) and error.value.previous == 10
    assert not caplog.records
    assert "The newest one that is there is of step 10" in str(error.value)
    assert listing(tmp_path) == before
    assert checkpoints.load(states()[0]).params["W"].tolist() == W.tolist()


@exhaustive
# What orbax has under way when one write fails ends after its event loop, and Python says so.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_full_or_read_only(tmp_path):
    """A file system of three megabytes, where one can be mounted."""
    mount = lambda *args: subprocess.run(["mount", *args], capture_output=True).returncode == 0
    if not mount("-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)):
        pytest.skip("needs to mount a file system")
    try:
        noise = np.random.default_rng(0).normal(size=(320, 320)).astype(np.float32)
        many = [state_of({"W": noise}, (i, 0, i)) for i in range(1, 30)]
        with pytest.raises(CheckpointError, match=": No space left on device\n") as error:
            save(tmp_path / "run", *many, keep=None)
        there = list(range(1, error.value.step))
        checkpoints = Checkpoints(tmp_path / "run")
        assert len(there) > 2 and checkpoints.steps() == there
        assert error.value.previous == there[-1]
        assert not list((tmp_path / "run").glob("*tmp*"))
        assert mount("-o", "remount,ro", str(tmp_path))
        with pytest.raises(CheckpointError, match="Read-only file system"):
            save(tmp_path / "run", *many)
        assert_same(checkpoints.load(many[0], 2).params["W"], jnp.asarray(noise))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_options(tmp_path):
    for options, said in {
        "every 0": ({"every": 0}, "every must be an integer of at least 1"),
        "every 1.5": ({"every": 1.5}, "every must be an integer"),
        "every_steps": ({"every_steps": 0}, "every_steps must be an integer of at least 1"),
        "keep": ({"keep": 0}, "keep must be an integer of at least 1"),
        "best": ({"best": max}, "best must be the name of a number"),
        "higher": ({"higher": "min"}, "higher must be True or False"),
        "allow": ({"allow_changed": "optimizer"}, "allow_changed must be a tuple of names"),
        "allow 3": ({"allow_changed": 3}, "allow_changed must be a tuple of names, .* got 3"),
    }.values():
        with pytest.raises((TypeError, ValueError), match=said):
            Checkpoints(tmp_path, **options)
    with pytest.raises(TypeError, match="folder must be a path"):
        Checkpoints(3)
    with pytest.raises(ValueError, match=r"on a \(mounted\) file system"):
        Checkpoints("gs://bucket/run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(CheckpointError, match="there are no checkpoints"):
        Checkpoints(tmp_path / "none").load(states()[0])
    with pytest.raises(TypeError, match="state must be a training State"):
        Checkpoints(tmp_path).load({"W": W})
    checkpoints = save(tmp_path, states()[0])
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 in .*: there are \[10\]"):
        checkpoints.load(states()[0], 3)
    for name in ("load", "load_params"):
        with pytest.raises(ValueError, match=f"^{name}: step must be 'latest' or 'best'"):
            getattr(checkpoints, name)(states()[0], "first")
        with pytest.raises(TypeError, match=f"^{name}: step must be an integer"):
            getattr(checkpoints, name)(states()[0], 1.5)
    with pytest.raises(CheckpointError, match="aren't told what is best, so that none is the best"):
        checkpoints.load(states()[0], "best")
    with pytest.raises(CheckpointError, match="has a number 'f1' in its record, so that none is"):
        Checkpoints(tmp_path, best="f1").load(states()[0], "best")
    with pytest.raises(TypeError, match="^load_params: params is a training State: pass its"):
        checkpoints.load_params(states()[0])


def test_the_error_is_pickled():
    error = CheckpointError("why", "folder", 3, 2)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.folder, again.step, again.previous) == ("why", "folder", 3, 2)


def test_without_orbax(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r'pip install "orbax-checkpoint>=0.12"'):
        Checkpoints(tmp_path)


# -------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("devices", [4, 2, 1])
def test_another_mesh(tmp_path, devices):
    """Written by four devices, read by as many, by two, and by one."""
    there = Mesh(np.array(jax.devices()[:4]), ("d",))
    here = Mesh(np.array(jax.devices()[:devices]), ("e",))
    x = np.arange(32.0).reshape(8, 4)
    sharded = jax.device_put(x, NamedSharding(there, PartitionSpec("d")))
    state = state_of({"W": sharded, "b": jax.device_put(x, NamedSharding(there, PartitionSpec()))})
    wanted = NamedSharding(here, PartitionSpec(None, "e"))
    like = state_of({"W": jax.device_put(x * 0, wanted), "b": jnp.zeros_like(x)})
    found = save(tmp_path, state).load(like).params
    assert found["W"].sharding == wanted
    chex.assert_trees_all_equal(found, {"W": x, "b": x})


# ----------------------------------------------------------------------------------- the call


def test_settings_of_an_optimiser_are_read_by_name():
    def of(optimizer):
        return of_function(optimizer, "optimizer")

    assert of(optax.adam(1e-3)) == of(optax.adam(1e-3))
    for other in (optax.adam(1e-2), optax.adam(1e-3, b1=0.8), optax.sgd(1e-3), optax.adamw(1e-3)):
        assert of(other) != of(optax.adam(1e-3))
    settings = of(optax.adam(1e-3, b1=0.85))
    assert "0.85" in {v for name, v in settings.items() if name.endswith(".b1")}
    assert "-0.001" in settings.values()
    schedules = [optax.cosine_decay_schedule(0.1, n) for n in (100, 200)]
    assert of(optax.sgd(schedules[0])) != of(optax.sgd(schedules[1]))
    injected = [optax.inject_hyperparams(optax.adam)(rate) for rate in (0.1, 0.2)]
    assert of(injected[0]) != of(injected[1])
    assert of(optax.sgd(lambda step: 0.1 / (1 + step))) != of(
        optax.sgd(lambda step: 0.2 / (1 + step))
    )
    rates = jnp.array([0.1, 0.2])
    assert of(optax.sgd(lambda s: rates[s])) != of(optax.sgd(lambda s, rates=rates * 2: rates[s]))
    masked = [optax.masked(optax.sgd(0.1), {"W": m, "b": False}) for m in (True, False)]
    assert of(masked[0]) != of(masked[1])
    for settings in (of(optax.chain(optax.clip(1.0), optax.lamb(0.1))), of(injected[0])):
        assert not any("0x" in text for text in (*settings, *settings.values()))


def test_types_among_the_settings():
    settings = {"compute": np.float16, "like": jax.ShapeDtypeStruct((3,), jnp.float32)}
    found = of_function(settings, "step")
    assert found["step['compute']"] == "float16"
    assert "(3,)" in found["step['like']"] and "float32" in found["step['like']"]


def test_digests_of_keys():
    one, other = (of_arrays({"k": jax.random.key(i)}, "state") for i in range(2))
    assert one != other and "state['k']" in one


def test_digests_of_data():
    x = np.arange(12.0).reshape(4, 3)
    assert of_arrays((x, x), "data") == of_arrays((jnp.asarray(x), x.copy()), "data")
    for other in (x + 1, x[:3], x.astype(np.float32), x.T):
        assert of_arrays((x, x), "data") != of_arrays((other, x), "data")
    assert list(of_arrays({"x": x}, "data")) == ["data['x']"]


def test_json_of_about_can_be_read_by_people(folder_of_two):
    checkpoints, _ = folder_of_two
    sealed = json.loads((checkpoints.folder / "0000000020/about/metadata").read_text())
    about = json.loads(sealed["about"])
    assert about["versions"]["jax"] == jax.__version__ and about["epochs"] == 2
    assert about["state"][0]["path"] == "state.params['W']" and about["scores"] == {"loss": 0.5}
    assert checkpoint_files.CheckpointError is fnn.CheckpointError
