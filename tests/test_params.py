"""Parameters by path, and their files: read by another library, whole or not at all."""

import collections
import os
import pickle
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import fnn
from fnn import params as by_path
from fnn.layers import Linear, chain, repeat

Pair = collections.namedtuple("Pair", "left right")


@chex.dataclass
class Weights:
    W: jax.Array
    b: jax.Array


def trees():
    x = jnp.arange(3.0)
    return {
        "nested dicts": ({"a": {"b": {"c": x}}}, ["a.b.c"]),
        "lists": ({"blocks": [{"W": x}, {"W": x}]}, ["blocks.0.W", "blocks.1.W"]),
        "tuples": ((x, (x,)), ["0", "1.0"]),
        "integer keys": ({3: x, 20: x}, ["3", "20"]),
        "a namedtuple": (Pair(x, {"y": x}), ["left", "right.y"]),
        "a dataclass": ({"layer": Weights(W=x, b=x)}, ["layer.W", "layer.b"]),
        "a leaf": (x, [""]),
        "nothing": ({"a": {}, "b": None}, []),
    }


@pytest.mark.parametrize("name", trees())
def test_there_and_back(name):
    tree, paths = trees()[name]
    flat = by_path.flatten(tree)
    assert sorted(flat) == sorted(paths)
    chex.assert_trees_all_equal_structs(by_path.unflatten(flat, tree), tree)
    chex.assert_trees_all_equal(by_path.unflatten(flat, tree), tree)


def test_without_a_tree_the_result_is_made_of_dicts():
    flat = by_path.flatten({"blocks": [{"W": 1.0}, {"W": {"x": 2.0}}], "bias": 3.0})
    wanted = {"blocks": {"0": {"W": 1.0}, "1": {"W": {"x": 2.0}}}, "bias": 3.0}
    assert by_path.unflatten(flat) == wanted
    assert by_path.unflatten({"": 1.0}) == 1.0 and by_path.unflatten({}) == {}
    assert by_path.unflatten({"a": {"not": "flat"}}) == {"a": {"not": "flat"}}


def test_paths_that_would_be_read_otherwise():
    with pytest.raises(ValueError, match=r"'a\.b' holds a dot"):
        by_path.flatten({"a.b": 1.0})
    with pytest.raises(ValueError, match=r"^save: the key 'a\.b' holds a dot"):
        by_path.save("never", {"a.b": jnp.ones(2)})
    with pytest.raises(ValueError, match="two leaves have the path '1'"):
        by_path.flatten(collections.OrderedDict([(1, 1.0), ("1", 2.0)]))
    for flat in ({"a": 1.0, "a.b": 2.0}, {"a.b": 2.0, "a": 1.0}, {"a": 1.0, "a.b.c": 2.0}):
        with pytest.raises(ValueError, match="one path ends where another goes on"):
            by_path.unflatten(flat)
    with pytest.raises(TypeError, match="unflatten: flat must be a dict from paths"):
        by_path.unflatten([1.0])


def test_a_number_of_python_s_among_the_wanted():
    like = {"a": 1.0, "b": 2}
    got = by_path.unflatten({"a": np.float32(3), "b": 4}, like)
    chex.assert_trees_all_equal(got, {"a": jnp.asarray(3.0), "b": jnp.asarray(4)})
    assert by_path.unflatten({"b": 4}, like, strict=False)["a"] == 1.0


LIKE = {"a": {"W": np.zeros((2, 3), np.float32)}, "n": np.zeros((), np.int32)}


@pytest.mark.parametrize(
    "flat, said",
    {
        "missing": ({"a.W": np.ones((2, 3))}, "missing: n."),
        "not wanted": ({"a.W": np.ones((2, 3)), "n": np.int32(1), "a.V": 1}, "not wanted: a.V."),
        "shape": ({"a.W": np.ones((3, 2)), "n": np.int32(1)}, "a.W is float64[3,2], wanted float"),
        "dtype": ({"a.W": np.ones((2, 3)), "n": np.float32(1)}, "n is float32[], wanted int32[]."),
    }.values(),
    ids=["missing", "not wanted", "shape", "dtype"],
)
def test_what_does_not_fit_is_named(flat, said):
    with pytest.raises(by_path.PathError) as found:
        by_path.unflatten(flat, LIKE)
    assert said in str(found.value)
    again = pickle.loads(pickle.dumps(found.value))
    assert str(again) == str(found.value) and again.different == found.value.different


def test_not_strict():
    flat = {"a.W": np.ones((2, 3)), "other": np.ones(5)}
    got = by_path.unflatten(flat, LIKE, strict=False)
    chex.assert_trees_all_equal(got, {"a": {"W": np.ones((2, 3), np.float32)}, "n": LIKE["n"]})
    assert got["a"]["W"].dtype == np.float32
    with pytest.raises(by_path.PathError, match="a.W is float64"):  # a shape is never overlooked
        by_path.unflatten({"a.W": np.ones((3, 2))}, LIKE, strict=False)
    types = jax.eval_shape(lambda: LIKE)
    with pytest.raises(by_path.PathError, match="missing: n"):  # nothing to take it from
        by_path.unflatten(flat, types, strict=False)
    with pytest.raises(TypeError, match="strict must be True or False"):
        by_path.unflatten(flat, LIKE, strict="no")


# ---------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint64", "float16", "bfloat16", "float32", "float64", "complex64"]
)
def test_a_file_holds_every_bit(tmp_path, dtype):
    x = (np.arange(6).reshape(2, 3) % 2).astype(jnp.dtype(dtype))
    tree = {"a": [x, x.T, x[::-1]], "one": x[0, 0], "empty": x[:0], "jax": jnp.asarray(x)}
    file = tmp_path / "p.safetensors"
    by_path.save(file, tree, {"made": "here"})
    theirs = safetensors.numpy.load_file(file)  # their reader
    for path, leaf in by_path.flatten(tree).items():
        assert theirs[path].dtype == leaf.dtype
        np.testing.assert_array_equal(theirs[path], leaf)
    again = by_path.load(file, jax.eval_shape(lambda: tree))
    chex.assert_trees_all_equal_structs(again, tree)
    chex.assert_trees_all_equal(again, tree)
    assert set(by_path.load(file)["a"]) == {"0", "1", "2"}


def test_a_network_comes_back(tmp_path):
    x = jnp.ones(4)
    net = chain(embed=Linear(8), blocks=repeat(chain(Linear(8), fnn.ops.relu), 3), out=Linear(2))
    params = net.init(jax.random.key(0), x)
    file = tmp_path / "net.safetensors"
    by_path.save(file, params)
    assert set(by_path.read(file)) == {
        *("embed.W", "embed.b", "blocks.0.W", "blocks.0.b", "out.W", "out.b")
    }
    types = jax.eval_shape(net.init, jax.random.key(1), x)
    chex.assert_trees_all_equal(by_path.load(file, types), params)
    other = chain(embed=Linear(9), out=Linear(2)).init(jax.random.key(0), x)
    with pytest.raises(by_path.PathError, match=r"load .*net\.safetensors: .*not wanted: blocks"):
        by_path.load(file, other)


def test_floating_parameters_take_the_dtype_that_is_wanted(tmp_path):
    file = tmp_path / "half.safetensors"
    by_path.save(file, {"W": jnp.ones(3, jnp.bfloat16)})
    assert by_path.load(file, {"W": jnp.zeros(3, jnp.float32)})["W"].dtype == jnp.float32


def test_what_cannot_be_saved(tmp_path):
    file = tmp_path / "p.safetensors"
    by_path.save(file, {"W": jnp.ones(3)})
    before = file.read_bytes()
    for name, (leaf, said) in {
        "key": (jax.random.key(0), r"a\.key must be an array .*Save jax\.random\.key_data"),
        "word": ("text", r"a\.word must be an array"),
        "complex128": (np.ones(2, complex), r"a\.complex128 must be an array"),
        "objects": (np.array([None]), r"a\.objects must be an array"),
        "type": (jax.ShapeDtypeStruct((2,), jnp.float32), r"a\.type must be an array"),
    }.items():
        with pytest.raises(TypeError, match=said):
            by_path.save(file, {"a": {name: leaf}})
    with pytest.raises(TypeError, match="metadata must be a dict of strings"):
        by_path.save(file, {"W": jnp.ones(3)}, {"n": 1})
    with pytest.raises(OSError, match="save: there is no folder .*nowhere"):
        by_path.save(tmp_path / "nowhere" / "p.safetensors", {"W": jnp.ones(3)})
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["p.safetensors"]


def test_a_save_that_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "p.safetensors"
    by_path.save(file, {"W": jnp.ones(3)})
    before = file.read_bytes()

    def full(flat, name, metadata):
        with open(name, "wb") as f:
            f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        by_path.save(file, {"W": jnp.zeros(3)})
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["p.safetensors"]


def test_files_that_cannot_be_read(tmp_path):
    file = tmp_path / "p.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        by_path.load(file)
    by_path.save(file, {"W": jnp.ones(30)})
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="can't be read as a safetensors file"):
        by_path.load(file)
    file.write_text("hello, this is text")
    with pytest.raises(ValueError, match="can't be read as a safetensors file"):
        by_path.load(file)


def test_without_safetensors(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"fnn\.params\.save needs safetensors: pip install saf"):
        by_path.save(tmp_path / "p.safetensors", {})


def test_a_file_may_be_read_by_whom_any_other_may(tmp_path):
    fnn.params.save(tmp_path / "a.safetensors", {"W": jnp.ones(3)})
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_numbers_of_python_come_back():
    tree = {"a": 1.0, "b": [2, jnp.ones(2)]}
    back = by_path.unflatten(by_path.flatten(tree), tree)
    assert jax.tree.map(float, back["a"]) == 1.0 and back["b"][0].dtype == jnp.result_type(int)
    np.testing.assert_array_equal(back["b"][1], 1)


@pytest.mark.parametrize("leaf", ["x", None, [1.0, 2.0]])
def test_a_leaf_that_is_no_array_is_named(leaf):
    with pytest.raises(TypeError, match=r"^unflatten: a\.b must be an array, but got"):
        by_path.unflatten({"a.b": leaf}, {"a": {"b": jnp.ones(2)}})


@pytest.mark.parametrize("path", [3, None, "", b"x"])
def test_a_path_must_be_one(path):
    for name, call in (
        ("save", lambda: by_path.save(path, {})),
        ("load", lambda: by_path.load(path)),
    ):
        with pytest.raises(TypeError, match=f"^{name}: path must be that of a file, but got"):
            call()


def test_a_folder_is_no_file_to_save_to(tmp_path):
    with pytest.raises(IsADirectoryError, match="^save: .* is a folder"):
        by_path.save(tmp_path, {"a": jnp.ones(2)})
    assert not os.listdir(tmp_path.parent / tmp_path.name)
