"""Layouts: which axis of which array is divided, what a device then holds, and what is refused."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled_programs
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive

from fnn import sharding
from fnn.layers import Linear, chain
from fnn.models import gpt2
from fnn.ops import relu
from fnn.sharding import Layout

MESH = jax.make_mesh((8,), ("data",))
GRID = jax.make_mesh((4, 2), ("data", "model"))
NET = chain(hidden=Linear(16), act=relu, out=Linear(8))


def params_of_net():
    return NET.init(jax.random.key(0), jnp.zeros(24))


@pytest.fixture(scope="module")
def gpt_types():
    net = gpt2(32, 8, features=16, depth=4, heads=2)
    return jax.eval_shape(net.init, jax.random.key(0), jnp.arange(8))


def test_fully_sharded_takes_the_longest_axis_that_is_divisible():
    layout = sharding.fully_sharded(MESH)
    spec = lambda *shape: layout.spec("a.path", shape)
    assert spec(16, 24) == P(None, "data")
    assert spec(24, 16) == P("data")
    assert spec(16, 16) == P(None, "data")  # of equal ones the last
    assert spec(20, 8) == P(None, "data")  # 20 isn't divisible
    assert spec(12, 64, 64) == P(None, None, "data")
    assert spec(7) == spec() == P()


def test_rules_are_of_the_last_axes_and_the_rest_is_sharded():
    layout = sharding.tensor_parallel(
        GRID, {"q.W": P("model", None), "out.*": P(None, "model")}, shard="data"
    )
    assert layout.batch == ("data",)
    assert layout.spec("blocks.q.W", (3, 8, 16)) == P(None, "model", "data")
    assert layout.spec("q.W", (8, 16)) == P("model", "data")
    assert layout.spec("out.W", (8, 16)) == P("data", "model")
    assert layout.spec("norm.scale", (16,)) == P("data")
    assert layout.spec("freq.W", (6, 10)) == P()  # "q.W" fits whole keys alone


def test_the_rules_for_transformers_fit_our_own(gpt_types):
    specs = sharding.tensor_parallel(GRID).specs(gpt_types)
    attend, mlp = specs["blocks"]["attend"], specs["blocks"]["mlp"]
    assert (
        attend["q"] == attend["k"] == attend["v"] == {"W": P(None, "model"), "b": P(None, "model")}
    )
    assert attend["out"] == {"W": P(None, None, "model"), "b": P()}
    assert mlp["hidden"] == {"W": P(None, "model"), "b": P(None, "model")}
    assert mlp["output"] == {"W": P(None, None, "model"), "b": P()}
    assert specs["embed"] == {"E": P()}


def test_stages_divide_the_blocks_first_axis(gpt_types):
    mesh = jax.make_mesh((2, 4), ("data", "stage"))
    layout = sharding.pipeline_parallel(mesh, microbatches=2)
    specs = layout.specs(gpt_types)
    assert set(jax.tree.leaves(specs["blocks"], is_leaf=lambda x: isinstance(x, P))) == {P("stage")}
    assert specs["embed"] == {"E": P()} and layout.batch == ("data",)


def test_the_optimisers_state_lies_as_its_parameters():
    layout = sharding.tensor_parallel(GRID, {"hidden.W": P("model", None)})
    params = params_of_net()
    for optimizer in (optax.adam(1e-3), optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9))):
        found = layout.shardings(jax.eval_shape(optimizer.init, params), params)
        divided = [
            jax.tree_util.keystr(path)
            for path, at in jax.tree_util.tree_leaves_with_path(found)
            if at.spec == P("model")
        ]
        assert divided and all(path.endswith("['hidden']['W']") for path in divided)


@exhaustive
def test_parameters_are_made_where_they_lie():
    """The compiled program's memory on one device, and what each device has, is an eighth."""
    layout = sharding.fully_sharded(MESH)
    key, x = jax.random.key(1), jnp.zeros(512)
    net = chain(hidden=Linear(1024), act=relu, out=Linear(256))
    whole = net.init(key, x)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    params = layout.init(net.init, key, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, whole)
    for leaf in jax.tree.leaves(params):
        assert {s.data.size for s in leaf.addressable_shards} == {leaf.size // 8}
    assert layout.bytes_per_device(params) == total // 8
    program = jax.jit(net.init, out_shardings=layout.shardings(whole)).lower(key, x).compile()
    memory = program.memory_analysis()
    assert memory.output_size_in_bytes < total / 8 + 100  # and a table of addresses
    assert memory.temp_size_in_bytes < total / 4
    assert not [c for c in sharding.collectives(program) if c.size > 1024]


def test_a_function_that_makes_parameters_is_compiled_once():
    class Maker:
        size = 1.0

        def init(self, key):
            return {"W": self.size * jnp.ones(8)}

    layout, key, maker = sharding.fully_sharded(MESH), jax.random.key(1), Maker()
    layout.init(maker.init, key)
    with compiled_programs() as programs:
        layout.init(maker.init, key)
    assert not programs
    maker.size = 2.0
    np.testing.assert_array_equal(layout.init(maker.init, key)["W"], 2.0)
    gone = weakref.ref(maker)
    del maker
    gc.collect()
    assert gone() is None


def test_batches_are_dealt_out_or_whole():
    layout = sharding.data_parallel(MESH)
    x = np.arange(32.0).reshape(16, 2)
    placed = layout.place_batch({"x": x})["x"]
    assert placed.sharding.spec == P("data")
    assert layout.place_batch({"x": placed})["x"] is placed
    assert layout.place_batch(x[:3]).sharding.spec == P()
    rows = np.array([3, 1, 2, 0, 7, 6, 5, 4])
    taken = layout.take({"x": x}, rows)["x"]
    assert taken.sharding.spec == P("data")
    np.testing.assert_array_equal(taken, x[rows])


def test_explicit_axes_count_as_automatic():
    """make_mesh's default; a mesh with automatic axes gives the same layout."""
    auto = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    assert sharding.data_parallel(MESH) == sharding.data_parallel(auto)
    assert sharding.data_parallel(MESH).mesh == auto


def test_arrays_of_another_mesh_are_placed():
    params = params_of_net()
    before = sharding.fully_sharded(MESH).place(params)
    after = sharding.tensor_parallel(GRID, {"hidden.W": P("model", None)}).place(before)
    assert after["hidden"]["W"].sharding == NamedSharding(
        sharding.data_parallel(GRID).mesh, P("model")
    )
    jax.tree.map(np.testing.assert_array_equal, after, params)


def test_what_is_shown():
    layout = sharding.fully_sharded(MESH)
    assert repr(layout) == "Layout(mesh of data=8, batch=('data',), shard=('data',))"
    assert layout.show(params_of_net()).splitlines() == [
        "parameter  shape     divided          bytes a device",
        "hidden.W   (16, 24)  P(None, 'data')  384",
        "hidden.b   (16,)     P('data')        16",
        "out.W      (8, 16)   P(None, 'data')  128",
        "out.b      (8,)      P('data')        8",
    ]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: sharding.data_parallel("data"), "mesh must be a jax.sharding.Mesh"),
        (lambda: Layout(MESH, batch="model"), r"batch names the axis 'model', but .* \('data',\)"),
        (lambda: sharding.tensor_parallel(GRID, {"W": ("model",)}), "a pair of a pattern"),
        (lambda: sharding.tensor_parallel(GRID, {"W": P("stage")}), "names the axis 'stage'"),
        (lambda: sharding.tensor_parallel(GRID, [P("model")]), "must be a dict"),
        (lambda: Layout(MESH, batch="data", stages="data"), "divides the blocks"),
        (lambda: Layout(MESH, sequence="data", stages="data"), "can't be used together"),
        (lambda: Layout(MESH, batch="data", microbatches=2), "stages isn't"),
        (lambda: sharding.pipeline_parallel(MESH, axis="data", microbatches=0), "microbatches"),
        (lambda: Layout(MESH, batch=("data",), sequence="sequence"), "names the axis 'sequence'"),
        (lambda: Layout(MESH, batch=3), "batch must be a name or a tuple of names, but got 3"),
        (lambda: Layout(MESH, blocks=[1]), "blocks must be a name or a tuple of names"),
        (lambda: Layout(MESH, stages=("data",)), "stages must be the name of an axis"),
        (lambda: Layout(MESH, rules=3), "rules must be pairs of a pattern .* got 3"),
        (lambda: Layout(MESH, rules=("W", P("data"))), "rules must be pairs .* one is 'W'"),
        (lambda: sharding.fully_sharded(MESH, batch=3), "batch must be a name"),
        (lambda: sharding.tensor_parallel(GRID, {}, shard=None), "shard must be a name"),
        (lambda: sharding.sequence_parallel(MESH, axis=None), "axis must be the name of an axis"),
        (lambda: sharding.pipeline_parallel(MESH, axis=3, microbatches=1), "axis must be the name"),
    ],
)
def test_layouts_that_are_none(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    "rules, message",
    [
        ({"hidden.w": P("model")}, r"none of the layout's patterns \['hidden.w'\] fits"),
        ({"hidden.b": P("model", None)}, "is of 2 axes, but hidden.b has shape"),
        ({"hidden.W": P(("data", "model"), None)}, "16 isn't divisible"),
    ],
)
def test_rules_that_do_not_fit(rules, message):
    mesh = jax.make_mesh((1, 3), ("data", "model")) if "isn't" in message else GRID
    with pytest.raises(ValueError, match=message):
        sharding.tensor_parallel(mesh, rules).specs(params_of_net())


def test_an_axis_is_named_once():
    with pytest.raises(ValueError, match="batch names the axis 'data' twice"):
        sharding.data_parallel(MESH, batch=("data", "data"))
    with pytest.raises(ValueError, match="the rule 'a' names the axis 'model' twice"):
        sharding.tensor_parallel(GRID, {"a": P("model", "model")})


def test_numbers_of_python_lie_whole():
    layout = sharding.fully_sharded(MESH)
    tree = {"scale": 2.0, "W": jnp.ones((8, 4))}
    assert layout.specs(tree) == {"scale": P(), "W": P("data")}
    assert layout.place(tree)["scale"].sharding.is_fully_replicated
    assert "scale" in layout.show(tree)


# Each as XLA writes it for GPUs or TPUs: the line, its bytes, and how many of 8 devices take part.
LINES = {
    "asynchronous permutation": (
        "%p = (f32[1024]{0}, f32[1024]{0}, u32[], u32[]) collective-permute-start(%x), "
        "channel_id=1, source_target_pairs={{0,1},{1,0}}", 4096, 2,
    ),
    "the same of two arrays": (
        "%p = ((f32[8]{0}, bf16[2]{0}), (f32[8]{0}, bf16[2]{0}), u32[], u32[]) "
        "collective-permute-start(%x, %y), source_target_pairs={{0,1},{1,0}}", 36, 2,
    ),
    "the same without contexts": (
        "%p = (u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}", 4, 2,
    ),
    "asynchronous gathering": (
        "%g = (f32[8]{0}, f32[64]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8]", 256, 8,
    ),
    "all devices": ("%r = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add", 32, 8),
    "listed": ("%r = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2},{3,4,5}}", 32, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_collectives_as_text(name):
    line, size, devices = LINES[name]
    text = (
        "HloModule jit_f, is_scheduled=true, replica_count=2, num_partitions=4\n\n"
        f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  {line}\n}}\n"
    )
    (found,) = sharding.collectives(text)
    assert (found.size, found.devices) == (size, devices)


def test_collectives_are_of_a_compiled_program():
    with pytest.raises(TypeError, match="^collectives: compiled must be a compiled program"):
        sharding.collectives(jax.jit(jnp.sin))
