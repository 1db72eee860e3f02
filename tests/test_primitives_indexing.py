"""The rules of structural and indexing operations against `jax.vjp`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from primitive_checks import check_cost, check_primitive, compare, our_vjp, random_like
from sweeps import exhaustive, sweep

import fnn


def numbers(*shape, seed=0, dtype="float64"):
    (x,) = random_like(jax.ShapeDtypeStruct(shape, dtype), seed)
    return x


# --------------------------------------------------------------------------------- structure


def _scalar(value, x):
    return np.array(value, x.dtype)


X = numbers(2, 3, 4)

MOVES = {
    "reshape": [
        lambda x: lax.reshape(x, (4, 6)),
        lambda x: lax.reshape(x, (24,)),
        lambda x: lax.reshape(x, (6, 4), (2, 0, 1)),
    ],
    "transpose": [lambda x: lax.transpose(x, (2, 0, 1)), lambda x: lax.transpose(x, (1, 0, 2))],
    "squeeze": [lambda x: lax.squeeze(lax.reshape(x, (1, 6, 1, 4)), (0, 2))],
    "rev": [lambda x: lax.rev(x, (0, 2)), lambda x: lax.rev(x, ())],
    "broadcast_in_dim": [
        lambda x: lax.broadcast_in_dim(x, (5, 2, 3, 4), (1, 2, 3)),
        lambda x: lax.broadcast_in_dim(x[:, :1], (2, 3, 6, 4), (0, 1, 3)),
        lambda x: lax.broadcast_in_dim(x[:1, :1], (1, 5, 4), (0, 1, 2)),
        lambda x: lax.broadcast_in_dim(x[0, 0, 0], (3, 2), ()),
        lambda x: jnp.broadcast_to(x[:, :, :1], (7, 2, 3, 9)),
    ],
    "tile": [lambda x: jnp.tile(x, (2, 1, 3)), lambda x: jnp.tile(x[0, 0], 5)],
    "slice": [
        lambda x: lax.slice(x, (0, 1, 1), (2, 3, 4)),
        lambda x: lax.slice(x, (0, 0, 1), (2, 3, 4), (1, 2, 2)),
        lambda x: lax.slice(x, (1, 1, 0), (2, 1, 4), (1, 3, 2)),
        lambda x: x[::-1, 1:, ::3],
    ],
    "pad": [
        lambda x: lax.pad(x, _scalar(0, x), ((1, 2, 0), (0, 0, 1), (0, 3, 2))),
        lambda x: lax.pad(x, _scalar(0, x), ((-1, 0, 0), (1, -1, 1), (-1, -1, 0))),
        lambda x: lax.pad(x, _scalar(0, x), ((0, 0, 0), (-1, -2, 2), (-2, 1, 1))),
        lambda x: lax.pad(x, x[0, 0, 0], ((1, 2, 0), (0, -1, 1), (-1, 3, 2))),
    ],
    "concatenate": [
        lambda x: lax.concatenate([x, 2 * x, x[:, :1]], 1),
        lambda x: lax.concatenate([jnp.ones((2, 3, 1), x.dtype), x], 2),
    ],
    "split": [lambda x: lax.split(x, (1, 0, 2), 1), lambda x: lax.split(x, (1, 3), 2)[1]],
    "stack": [lambda x: jnp.stack([x, x * x, jnp.ones_like(x)], 1)],
    "unstack": [lambda x: jnp.unstack(x, axis=1), lambda x: jnp.unstack(x, axis=2)[1]],
    "optimization_barrier": [
        lambda x: lax.optimization_barrier((x, x * x, jnp.arange(3))),
        lambda x: lax.optimization_barrier([x, x * x])[0],
    ],
    "device_put": [
        lambda x: jax.device_put(x),
        lambda x: jax.device_put((x, 2 * x), jax.devices()[0]),
    ],
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name):
    together = lambda x: [f(x) for f in MOVES[name]]
    check_primitive(together, X, primitive=name, second_order=name in ("pad", "stack"))
    check_primitive(together, numbers(2, 3, 4, dtype="complex128"), primitive=name)


@pytest.mark.parametrize("name", MOVES)
def test_moves_cost_no_more_than_jaxs(name):
    for f in MOVES[name]:
        check_cost(f, X)


@exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moves_keep_the_dtype(dtype):
    x = X.astype(dtype)
    for moves in MOVES.values():
        for f in moves:
            g = random_like(jax.eval_shape(f, x), 0)
            jax.eval_shape(lambda x, g, f=f: our_vjp(f, [x], g), x, g)


def test_moves_of_nothing():
    x = jnp.zeros((2, 0, 3))
    check_primitive(lambda x: [lax.reshape(x, (0, 6)), lax.transpose(x, (1, 0, 2))], x)
    check_primitive(lambda x: [lax.pad(x, 1.0, ((0, 0, 0), (2, 2, 1), (0, 0, 0))), x[:, :, ::2]], x)
    check_primitive(lambda x: lax.concatenate([x, jnp.ones((2, 2, 3))], 1), x)
    check_primitive(lambda x: jnp.broadcast_to(x, (4, 2, 0, 3)), x)
    check_primitive(lambda x: lax.slice(x, (0,), (0,), (2,)), jnp.ones(3))


def test_a_barrier_stays_in_the_backward_pass():
    f = lambda x: lax.optimization_barrier(x)
    jaxpr = jax.make_jaxpr(lambda x, g: our_vjp(f, [x], [g]))(X, X)
    assert str(jaxpr).count("optimization_barrier") == 2


def test_a_sharding_constraint_holds_for_the_gradient():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, PartitionSpec("d"))
    x = numbers(8, 3)
    f = lambda x: lax.with_sharding_constraint(x, place) * x
    check_primitive(f, x, primitive="sharding_constraint")
    jaxpr = jax.make_jaxpr(lambda x, g: our_vjp(f, [x], [g]))(x, x)
    assert str(jaxpr).count("sharding_constraint") == 2


@pytest.mark.exhaustive
def test_explicit_shardings_are_those_of_the_arguments():
    """On a mesh with explicit axes a gradient's type says where it lies: as its argument does."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    here = lambda *spec: jax.sharding.NamedSharding(mesh, PartitionSpec(*spec))
    sort = lambda x: jnp.sort(x, axis=1)
    cases = [
        (lambda x: jnp.sum(x, axis=0), here("d", None)),
        (lambda x: jnp.sum(x, axis=1), here("d", None)),
        (lambda x: jnp.max(x, axis=1), here("d", None)),
        (lambda x: lax.cumprod(x, axis=1), here("d", None)),
        (lambda x: jnp.broadcast_to(x, (3, 8, 4)), here("d", None)),
        (lambda x: x.T, here("d", None)),
        (sort, here("d", None)),
        (lambda x: jax.sharding.reshard(x, here(None, None)) * 2, here("d", None)),
        (lambda x: lax.reshape(x, (8, 2, 2), out_sharding=here("d", None, None)), here("d", None)),
        (lambda x: x[:, 1:3], here("d", None)),
        (lambda x: lax.pad(x, _scalar(0, x), ((0, 0, 0), (1, 1, 0))), here("d", None)),
        (lambda x: jnp.stack([x, x], 1), here("d", None)),
        (lambda x: jnp.concatenate([x, x], 1), here("d", None)),
        (lambda x: lax.top_k(x, 2)[0], here("d", None)),
        (lambda x: lax.dynamic_slice(x, (0, 1), (8, 2)), here("d", None)),
        (lambda x: lax.dynamic_update_slice(x, x[:, :1], (0, 1)), here("d", None)),
        (lambda x: jnp.clip(x, -1.0, 1.0) / jnp.sum(x * x, 1, keepdims=True), here("d", None)),
        (lambda x: x.at[:, 1].set(0.0) + x.at[:, 1].max(0.0), here("d", None)),
        (lambda x: x.at[:, jnp.array([1, 3])].get(out_sharding=here("d", None)), here("d", None)),
    ]
    if not hasattr(lax, "one_minus_square"):  # JAX 0.10 itself can't differentiate this sort
        cases = [(f, place) for f, place in cases if f is not sort]
    with jax.set_mesh(mesh):
        for f, place in cases:
            x = jax.device_put(numbers(8, 4), place)
            y = f(x)
            g = jax.device_put(np.ones(y.shape), y.sharding)
            ours = jax.jit(lambda x, g, f=f: our_vjp(f, [x], [g])[0])(x, g)
            theirs = jax.jit(lambda x, g, f=f: jax.vjp(f, x)[1](g)[0])(x, g)
            assert jax.typeof(ours) == jax.typeof(theirs) == jax.typeof(x)
            np.testing.assert_allclose(ours, theirs, atol=1e-12)

        # A product of sharded rows, whose gradient JAX has no way to reshape.
        x = jax.device_put(numbers(8, 4), here("d", None))
        product = jax.jit(lambda x: our_vjp(lambda x: jnp.prod(x, axis=1), [x], [x[:, 0]])[0])(x)
        assert jax.typeof(product) == jax.typeof(x)
        y = np.prod(np.asarray(x), axis=1, keepdims=True)
        np.testing.assert_allclose(product, np.asarray(x)[:, :1] * y / np.asarray(x), rtol=1e-12)


@pytest.mark.exhaustive
def test_inside_shard_map():
    """Zeros made by a rule vary over the devices as the argument does."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    x, i = numbers(8, 3), jnp.array([1, 0, 1])
    fs = [
        lambda x: lax.dynamic_slice(x, (0, 1), (2, 2)) * 2,
        lambda x: lax.dynamic_update_slice(x, jnp.ones_like(x[:1]), (0, 0)),
        lambda x: jnp.sort(x, axis=0) + jnp.cumsum(x, axis=0) + lax.cummax(x),
        lambda x: lax.top_k(x, 2)[0] + jnp.max(x, keepdims=True),
        lambda x: x[i] + x.at[i].set(x[i] * 2)[i] + x.at[i].max(1.0)[i],
        lambda x: jnp.where(x > 0, x, 0.0) + jnp.clip(x, -1.0, 1.0) + jnp.maximum(x, 0.5),
        lambda x: lax.clamp(-1.0, x, 1.0) + jnp.stack([x, 2 * x]).sum(0) + jnp.prod(x),
    ]

    def gradients(grad):
        local = lambda x: [grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in fs]
        spec = PartitionSpec("d")
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))(x)

    compare(gradients(fnn.grad), gradients(jax.grad), 1e-12)


# --------------------------------------------------------------------------------- reading

A = numbers(5, 4, 3)
INDICES = jnp.array([[0, 3], [4, 3], [-1, 7]])  # twice the same, negative, and out of bounds

READS = {
    "rows": lambda x: x[INDICES],
    "take clip": lambda x: jnp.take(x, INDICES, axis=1, mode="clip"),
    "take fill": lambda x: jnp.take(x, INDICES, axis=2, mode="fill", fill_value=7.0),
    "take wrap": lambda x: jnp.take(x, INDICES, axis=0, mode="wrap"),
    "promise": lambda x: x.at[jnp.array([1, 1, 4])].get(mode="promise_in_bounds"),
    "unique": lambda x: x.at[jnp.array([0, 1, 4])].get(
        unique_indices=True, indices_are_sorted=True
    ),
    "two axes": lambda x: x[INDICES, :, jnp.array([[0], [1], [2]])],
    "along": lambda x: jnp.take_along_axis(x, jnp.array([[[0], [2], [2]]]), axis=1),
    "mask and slice": lambda x: x[1:4, jnp.array([0, 2])],
    "batched": lambda x: jax.vmap(lambda row, i: row[i])(x, jnp.array([0, 1, 3, 3, 9])),
    "one": lambda x: x[2, 1, 0],
    "none": lambda x: x[jnp.zeros((0,), int)],
}


@pytest.mark.parametrize("name", READS)
def test_gather(name):
    check_primitive(READS[name], A, primitive="gather" if name not in ("one", "none") else None)
    check_cost(READS[name], A)


@exhaustive
def test_gather_of_other_dtypes_and_twice():
    together = lambda x: [f(x) for f in READS.values()]
    check_primitive(together, A.astype("complex128"))
    check_primitive(together, A.astype("float32"), tol=1e-5)
    check_primitive(lambda x: jnp.sin(x[INDICES]), A, second_order=True)
    gs = random_like(jax.eval_shape(together, A.astype("bfloat16")), 0)
    jax.eval_shape(lambda x, g: our_vjp(together, [x], g), A.astype("bfloat16"), gs)


@exhaustive
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_row_read_more_often_than_half_precision_can_count(dtype):
    rows, at = jnp.ones((3, 2), dtype), jnp.where(jnp.arange(6000) < 5000, 1, 2)
    found = fnn.grad(lambda rows: jnp.sum(rows[at], dtype="float32").astype(dtype))(rows)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype("float32")[:, 0], [0, 5000, 1000], rtol=4e-3)


@pytest.mark.parametrize("dtype", sweep(["int8", "uint8", "uint32", "int64"], ["uint8", "int64"]))
def test_a_batch_of_slices_at_integers_of_any_dtype(dtype):
    """Also where they are out of bounds, those of int32 included, where gradients are put back."""
    x, limits = numbers(4, 5), jnp.iinfo(dtype)
    starts = jnp.asarray([2, limits.max, limits.min, limits.max - 1], dtype)
    f = jax.vmap(lambda x, i: lax.dynamic_slice(x, (i,), (2,)))
    check_primitive(lambda x: f(x, starts), x, primitive="gather")


def test_labels_of_rows_that_are_dealt_out_unevenly():
    """XLA ends the process if gradients are put back at integers other than int32."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, PartitionSpec("d"))
    x, labels = jax.device_put((np.ones((8, 3)), np.arange(8) % 3), place)
    f = lambda x, labels: jnp.sum(jax.vmap(lambda x, i: x[i])(x[:3], labels[:3]))
    np.testing.assert_array_equal(jax.jit(fnn.grad(f))(x, labels)[:3], np.eye(3))


def test_dynamic_slice():
    i, j = jnp.array(3), jnp.array(-1)
    read = lambda x, i, j: lax.dynamic_slice(x, (i, j, jnp.array(9)), (2, 3, 2))
    check_primitive(read, A, i, j, primitive="dynamic_slice", second_order=True)
    check_cost(read, A, i, j)
    write = lambda x, u, i, j: lax.dynamic_update_slice(x, u, (i, j, jnp.array(9)))
    u = numbers(2, 3, 2, seed=1)
    check_primitive(write, A, u, i, j, primitive="dynamic_update_slice", second_order=True)
    check_primitive(lambda x: write(x, u, i, j), A, primitive="dynamic_update_slice")
    check_primitive(lambda u: write(A, u, i, j), u, primitive="dynamic_update_slice")
    check_primitive(write, A + 1j, u - 2j, i, j)
    check_cost(write, A, u, i, j)


# --------------------------------------------------------------------------------- writing

UNIQUE = jnp.array([3, 0, 9])  # the last one out of bounds
REPEATED = jnp.array([3, 0, 3, 9, 0, 3])


@pytest.mark.parametrize("name", ["set", "add", "subtract", "multiply", "max", "min"])
@pytest.mark.parametrize("mode", sweep(["drop", "clip", "promise_in_bounds"], quick=["drop"]))
def test_scatter_at_unique_indices(name, mode):
    at = UNIQUE if mode == "drop" else jnp.array([3, 0, 4])
    options = {"unique_indices": True, "mode": mode}
    f = lambda x, u: getattr(x.at[at], name)(u, **options)
    u = numbers(3, 4, 3, seed=1)
    check_primitive(f, A, u, second_order=mode == "drop" and name not in ("max", "min"))
    check_primitive(lambda x: f(x, u), A)
    check_primitive(lambda u: f(A, u), u)
    check_cost(f, A, u)


@exhaustive
@pytest.mark.parametrize(
    "name", sweep(["set", "add", "subtract", "max", "min"], quick=["set", "add"])
)
def test_scatter_at_repeated_indices(name):
    f = lambda x, u: getattr(x.at[REPEATED], name)(u)
    u = numbers(6, 4, 3, seed=1)
    check_primitive(f, A, u, second_order=name in ("set", "add"))
    check_primitive(lambda x: f(x, u), A)
    check_primitive(lambda u: f(A, u), u)
    check_cost(f, A, u)
    # in two axes, with windows, and batched by vmap
    v = numbers(6, 3, seed=2)
    check_primitive(lambda x, v: getattr(x.at[REPEATED, REPEATED // 3], name)(v), A, v)
    check_primitive(lambda x, u: getattr(x.at[1:4:2], name)(u), A, numbers(2, 4, 3, seed=3))
    batched = jax.vmap(lambda x, u, i: getattr(x.at[i], name)(u))
    check_primitive(batched, A, numbers(5, 2, 3, seed=4), INDICES[np.array([0, 1, 2, 0, 1])])
    check_primitive(batched, A, numbers(5, 2, 3, seed=4), jnp.full((5, 2), 1))


def test_scatter_of_overlapping_windows():
    numbers_ = lax.ScatterDimensionNumbers(
        update_window_dims=(1,), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
    )
    at = jnp.array([[0], [2], [1], [2], [6]])
    x, u = numbers(7), numbers(5, 3, seed=1)
    for scatter in (lax.scatter, lax.scatter_add, lax.scatter_max):
        for mode in ("drop", "clip"):
            f = lambda x, u, s=scatter, mode=mode: s(x, at, u, numbers_, mode=mode)
            check_primitive(f, x, u)


@pytest.mark.parametrize("name", ["max", "min"])
def test_scattered_extrema_share_ties(name):
    x = jnp.array([1.0, 1.0, 0.0, 2.0, 5.0])
    at, u = jnp.array([0, 0, 1, 2, 2, 3, 9]), jnp.array([1.0, 1.0, 1.0, 1.0, 1.0, 3.0, 4.0])
    check_primitive(lambda x, u: getattr(x.at[at], name)(u), x, u, primitive=f"scatter-{name}")


@exhaustive
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_many_ties_of_scattered_extrema(dtype):
    """From 2,048 and 256 on, one more is no more in these dtypes."""
    f = lambda u: jax.ops.segment_max(u, jnp.zeros(5000, int), 1)[0]
    shares = fnn.grad(f)(jnp.zeros(5000, dtype)).astype("float64")
    np.testing.assert_allclose(shares, 1 / 5000, rtol=1e-2)


@exhaustive
def test_scattered_extrema_out_of_bounds_make_no_nan():
    with jax.debug_nans(True):
        f = lambda u: jax.ops.segment_max(u, jnp.array([0, 5, 0]), 2)[0]
        assert fnn.grad(f)(jnp.array([1.0, 9.0, 2.0])).tolist() == [0, 0, 1]


def test_the_gradient_of_what_is_padded_with_does_not_cancel():
    """Nor does an infinite gradient elsewhere reach it."""
    f = lambda value: lax.pad(np.ones(3, np.float32), value, ((2, 1, 1),))
    _, pullback = fnn.vjp(f, jnp.float32(0))
    g = [1, 2, 3e9, 4, -1e9, 8, jnp.inf, 16]
    assert pullback(jnp.array(g, jnp.float32))[0] == 1 + 2 + 4 + 8 + 16


def test_scatter_of_complex_numbers_and_dtypes():
    u = numbers(6, 4, 3, seed=1)
    f = lambda x, u: [x.at[REPEATED].set(u), x.at[REPEATED].add(u), x.at[REPEATED].subtract(u)]
    check_primitive(f, A + 1j, u - 2j)
    check_primitive(f, A.astype("float32"), u.astype("float32"), tol=1e-5)
    for dtype in ("float32", "bfloat16"):
        args = [A.astype(dtype), u.astype(dtype)]
        gs = random_like(jax.eval_shape(f, *args), 0)
        jax.eval_shape(lambda args, gs: our_vjp(f, args, gs), args, gs)


def test_scattered_product_of_colliding_updates():
    """As in JAX, the updates have no gradient, but x has one."""
    u = numbers(6, 4, 3, seed=1)
    check_primitive(lambda x: x.at[REPEATED].multiply(u), A, primitive="scatter-mul")
    with pytest.raises(NotImplementedError, match="unique_indices=True"):
        our_vjp(lambda u: A.at[REPEATED].multiply(u), [u], [A])


def test_scatter_apply_says_what_to_do_instead():
    f = lambda x: x.at[UNIQUE].apply(jnp.sin)
    with pytest.raises(NotImplementedError, match=r"x.at\[i\].set"):
        our_vjp(f, [A], [A])
