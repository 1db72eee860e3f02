"""Gradients on several devices: under shard_map's checks, and on meshes with explicit axes.

What a rule makes itself, zeros or places, must vary over the same devices and be sharded alike
as what it meets; the numbers, types and shardings are those of `jax.grad`.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive, sweep

import fnn

# ------------------------------------------------------------------------------- under shard_map
#
# Each function takes w (4,), the same on all devices, and x (4,), each device's own.


@jax.custom_vjp
def product(w, x):
    return w * x


product.defvjp(lambda w, x: (w * x, (w, x)), lambda r, g: (g * r[1], g * r[0]))

EYE = jnp.eye(4)
IDS = jnp.array([0, 2, 2])
special = jax.scipy.special


def _images(X):
    return X[:, :, None, None] * jnp.arange(1.0, 9).reshape(4, 2)


SHARD_MAP = {
    "elementwise": {
        "powers": lambda w, x: w**x + x**w + w**2 + w**3 + jnp.sqrt(x) * w + lax.rsqrt(w),
        "exp": lambda w, x: jnp.expm1(w) * x + jnp.log1p(x * w) + jax.nn.sigmoid(w * x),
        "angles": lambda w, x: jnp.tanh(w) * jnp.arcsin(w) + jnp.arctan2(w, x) + jnp.sin(x * w),
        "max": lambda w, x: jnp.maximum(w, x) + jnp.minimum(w * w, x) + jnp.maximum(w - 0.5, 0) * x,
        "clip": lambda w, x: jnp.clip(w, 0.2, 0.5) + lax.clamp(w * 0.4, x, w) + jnp.abs(w - x),
        "select": lambda w, x: jnp.where(x > 0.5, w, 0.0) + jnp.where(w > 0.5, w, 0.0) * x,
        "relu": lambda w, x: jax.nn.relu(w * x - 0.3) + jax.nn.relu6(9 * w) * x,
        "rem": lambda w, x: (5 * w) % x + jnp.floor(w) * x,
        "special": lambda w, x: lax.lgamma(w * x) * w,
        "complex": lambda w, x: jnp.abs(w + 1j * x) + jnp.imag(jnp.exp(1j * w)) * x,
        "cast": lambda w, x: w.astype(jnp.float32).astype(jnp.float64) * x,
    },
    "reductions": {
        "sum": lambda w, x: jnp.sum(w * x) + jnp.max(w) * x + jnp.min(w * x) + jnp.prod(w) * x,
        "not varying": lambda w, x: jnp.max(w) + jnp.min(w) + jnp.prod(w) + x,
        "logsumexp": lambda w, x: jax.nn.logsumexp(w * x) + jax.nn.softmax(w) * x,
        "running": lambda w, x: jnp.cumprod(w * x) + lax.cummax(w) * x + lax.cumlogsumexp(w),
        "sort": lambda w, x: jnp.sort(w) * x + lax.sort((x, w), num_keys=1)[1] + w[jnp.argsort(x)],
        "top_k": lambda w, x: lax.top_k(w, 2)[0].sum() * x + lax.top_k(w * x, 2)[0].sum(),
        "pool": lambda w, x: lax.reduce_window(w * x, -jnp.inf, lax.max, (2,), (1,), "SAME") * w,
    },
    "indexing": {
        "gather": lambda w, x: w[IDS].sum() * x + (w * x)[IDS].sum() + w[jnp.argmax(x)],
        "fill": lambda w, x: jnp.take(w, (x * 4).astype(int) % 4, mode="fill", fill_value=0.0),
        "slice": lambda w, x: lax.dynamic_slice(w, (jnp.argmax(x),), (2,)).sum() * x + w[1:3].sum(),
        "update": lambda w, x: lax.dynamic_update_slice(w, x[:2] * w[0], (jnp.argmax(x),)),
        "set": lambda w, x: w.at[IDS].set(w[:3]) * x + (w * x).at[IDS].set(w[:3]),
        "add": lambda w, x: w.at[IDS].add(x[:3]) + x.at[IDS].add(w[:3]) + w.at[IDS].max(w[:3]),
        "pad": lambda w, x: lax.pad(w, w[0], [(1, 1, 1)]).sum() * x + jnp.split(w, 2)[0].sum(),
        "join": lambda w, x: jnp.concatenate([w, x]).sum() + jnp.stack([w, x]).sum(0),
        "reshape": lambda w, x: (
            (w.reshape(2, 2).T[::-1] @ x.reshape(2, 2)).ravel() * jnp.tile(w, 1)
        ),
    },
    "products": {
        "dot": lambda w, x: jnp.outer(w, w) @ x + jnp.einsum("i,j->ij", w, x).sum(0) + w @ x,
        "conv": lambda w, x: jnp.convolve(x, w[:3], "same") + jnp.convolve(w, w[:3], "same") * x,
        "fft": lambda w, x: jnp.abs(jnp.fft.fft(w * x)) + jnp.fft.irfft(jnp.fft.rfft(w)) * x,
        "cholesky": lambda w, x: jnp.linalg.cholesky(jnp.outer(w, w) + 2 * EYE)[2] * x,
        "solve": lambda w, x: jnp.linalg.solve(jnp.diag(w) + 0.1 * jnp.outer(x, x), w),
        "eigh": lambda w, x: jnp.linalg.eigh(jnp.diag(w) + 0.1)[0] * x,
    },
    "control flow": {
        "scan": lambda w, x: lax.scan(lambda c, a: (jnp.sin(c * w[0] + a), c * a), w[0], w)[1] * x,
        "carry": lambda w, x: lax.scan(lambda c, a: (c * w, jnp.where(c > 0.1, c, 0)), w * x, x)[1],
        "cond": lambda w, x: lax.cond(w[0] > 0.1, lambda w: jnp.sin(w), lambda w: w * w, w) * x,
        "by x": lambda w, x: lax.cond(x[0] > 0.5, lambda w: jnp.sin(w), lambda w: w * w, w) * x,
        "fori": lambda w, x: lax.fori_loop(0, 3, lambda i, c: c * w + x, x),
        "checkpoint": lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(w * x) * w)(w, x),
        "custom": lambda w, x: jax.nn.gelu(w) * jax.nn.silu(x * w),
        "custom_vjp": lambda w, x: product(lax.pcast(w, ("i",), to="varying"), x) * x,
        "operation": lambda w, x: fnn.ops.gelu(w) * x + fnn.ops.relu(w - 0.5) + fnn.ops.tanh(w * x),
        "vmap": lambda w, x: jax.vmap(lambda a, b: jnp.where(a > b, a, 0.0) * b)(w, x),
    },
    "collectives": {
        "psum": lambda w, x: lax.psum(w * x, "i") * x + lax.psum(w, "i") * x,
        "pmean": lambda w, x: (x * w - lax.pmean(x * w, "i")) * lax.rsqrt(lax.pmean(w * x, "i")),
        "all_gather": lambda w, x: lax.all_gather(w * x, "i").sum() * x,
        "ppermute": lambda w, x: lax.ppermute(w * x, "i", [(0, 1), (1, 2), (2, 3), (3, 0)]) * x,
        "all_to_all": lambda w, x: lax.all_to_all(w * x, "i", 0, 0) * x,
        "psum_scatter": lambda w, x: lax.psum_scatter(w * x, "i") * x,
        "axis_index": lambda w, x: jnp.where(lax.axis_index("i") == 1, w, 0.0) * x,
    },
}


def close(ours, theirs):
    def same(path, a, b):
        where = jax.tree_util.keystr(path)
        assert jax.typeof(a) == jax.typeof(b), where
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), where
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12, err_msg=where)

    jax.tree_util.tree_map_with_path(same, ours, theirs)


def on_devices(kind):
    mesh = jax.make_mesh((4,), ("i",), axis_types=(kind,))
    w = jnp.array([0.35, 0.8, 0.55, 0.7])
    x = jax.random.permutation(jax.random.key(0), jnp.linspace(0.21, 0.93, 16))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    return mesh, put(w), put(x, "i")


def total(f):
    def loss(w, x):
        y = f(w, x)
        return lax.psum(jnp.sum(y * jnp.arange(1.0, 1 + y.size).reshape(y.shape)), "i")

    return loss


def inside(grad, functions, mesh):
    """The gradients of all functions, in one program, each taken on each device."""
    specs = dict.fromkeys(functions, (P(), P("i")))
    return jax.shard_map(
        lambda w, x: {name: grad(total(f), (0, 1))(w, x) for name, f in functions.items()},
        mesh=mesh,
        in_specs=(P(), P("i")),
        out_specs=specs,
    )


def outside(grad, functions, mesh):
    """The gradients of all functions, each a shard_map."""
    over = lambda f: jax.shard_map(total(f), mesh=mesh, in_specs=(P(), P("i")), out_specs=P())
    return lambda w, x: {name: grad(over(f), (0, 1))(w, x) for name, f in functions.items()}


@pytest.mark.parametrize(
    "kind", sweep([AxisType.Auto, AxisType.Explicit], [AxisType.Auto]), ids=str
)
@pytest.mark.parametrize("family", sweep(SHARD_MAP, ["elementwise", "control flow"]))
def test_under_the_checks_of_shard_map(family, kind):
    mesh, w, x = on_devices(kind)
    with jax.set_mesh(mesh):
        theirs, ours = (
            jax.jit(inside(grad, SHARD_MAP[family], mesh))(w, x) for grad in (jax.grad, fnn.grad)
        )
    close(ours, theirs)


@pytest.mark.parametrize(
    "family", sweep(["elementwise", "control flow", "collectives"], ["collectives"])
)
def test_through_a_shard_map(family):
    mesh, w, x = on_devices(AxisType.Auto)
    theirs, ours = (
        jax.jit(outside(grad, SHARD_MAP[family], mesh))(w, x) for grad in (jax.grad, fnn.grad)
    )
    close(ours, theirs)


@exhaustive
def test_under_shard_map_without_jit():
    mesh, w, x = on_devices(AxisType.Auto)
    some = {
        "mask": SHARD_MAP["elementwise"]["select"],
        "loop": SHARD_MAP["control flow"]["scan"],
        "sum": SHARD_MAP["collectives"]["psum"],
    }
    close(inside(fnn.grad, some, mesh)(w, x), jax.jit(inside(jax.grad, some, mesh))(w, x))


# ----------------------------------------------------------------- on a mesh with explicit axes
#
# Each function takes X (8, 4) sharded along its rows, W (4, 4) along its columns, the vector v
# (4,), and M (4, 4), not sharded.

REPEATED = jnp.array([0, 2, 1])


def _rows():
    return jax.sharding.reshard(jnp.arange(8) % 4, P("a"))


EXPLICIT = {
    "products": {
        "dot": lambda X, W, v, M: X @ W + v,
        "dot_out": lambda X, W, v, M: jnp.einsum("ij,jk->ik", X, W, out_sharding=P("a", "b")),
        "batchdot": lambda X, W, v, M: jnp.einsum("bi,bj->bij", X, X),
        "batchdot2": lambda X, W, v, M: jnp.einsum(
            "bi,bij->bj", X, jnp.broadcast_to(M, (8, 4, 4), out_sharding=P("a", None, None))
        ),
        "conv": lambda X, W, v, M: lax.conv_general_dilated(
            X[:, None, :], M[:1, None, :3], (1,), "SAME"
        ),
        "chol": lambda X, W, v, M: jnp.linalg.cholesky(M @ M.T + jnp.eye(4)),
        "solve": lambda X, W, v, M: jnp.linalg.solve(M + jnp.eye(4), M),
        "eigh": lambda X, W, v, M: jnp.linalg.eigh(M + M.T)[0],
        "inv": lambda X, W, v, M: jnp.linalg.inv(M + jnp.eye(4)),
        "fft": lambda X, W, v, M: jnp.abs(jnp.fft.fft(X)),
    },
    "shapes": {
        "reshape": lambda X, W, v, M: X.reshape(8, 2, 2) * 2,
        "reshape_out": lambda X, W, v, M: lax.reshape(
            X, (4, 2, 4), out_sharding=P("a", None, None)
        ),
        "ravel": lambda X, W, v, M: lax.reshape(X, (32,), out_sharding=P("a")),
        "broadcast": lambda X, W, v, M: X[:, None, :] * M[None],
        "bias": lambda X, W, v, M: jax.nn.relu(X @ W + v) * v[None],
        "bcast_new": lambda X, W, v, M: (
            lax.broadcast_in_dim(v, (8, 4), (1,), out_sharding=P("a", "b")) * (X @ W)
        ),
        "bcast1": lambda X, W, v, M: (
            jnp.mean(X, 1, keepdims=True) * X + jnp.mean(X, 0, keepdims=True) * X
        ),
        "transpose": lambda X, W, v, M: (X @ W).T * 2,
        "slice": lambda X, W, v, M: X[:, 1:3] * 2 + X[:, ::2],
        "pad": lambda X, W, v, M: jnp.pad(X, ((0, 0), (1, 1))),
        "concat": lambda X, W, v, M: (
            jnp.concatenate([X, X * 2], 1) + jnp.stack([X, X], 1).sum(1).sum(1, keepdims=True)
        ),
        "split": lambda X, W, v, M: jnp.split(X, 2, 1)[0] * jnp.split(X, 2, 1)[1],
        "tile": lambda X, W, v, M: jnp.tile(M, (2, 1)).sum(0) + jnp.repeat(M, 2, 0).sum(0),
        "rev": lambda X, W, v, M: X[:, ::-1] * X,
        "squeeze": lambda X, W, v, M: X[:, None, :].squeeze(1) * X[None][0],
        "reshard": lambda X, W, v, M: jax.sharding.reshard(X, P(None, "b")) * M[:1],
        "reshard2": lambda X, W, v, M: jax.sharding.reshard(X @ W, P("a", None)) @ M,
        "barrier": lambda X, W, v, M: lax.optimization_barrier(X) * 2,
    },
    "entries": {
        "where": lambda X, W, v, M: (
            jnp.where(X > 0.5, X, 0.0) + jnp.where(M[:1] > 0.5, X, X * 2) + jax.nn.relu(X - 0.4)
        ),
        "clip": lambda X, W, v, M: jnp.clip(X, 0.3, 0.6) + jnp.maximum(X, 0.5) + jnp.abs(X),
        "elementwise": lambda X, W, v, M: (
            jnp.tanh(X) * X**2.5 + jax.nn.gelu(X) + jax.nn.sigmoid(X) + jnp.sqrt(X) + X**3
        ),
        "cast": lambda X, W, v, M: X.astype(jnp.float32).astype(jnp.float64) * 2,
        "complex": lambda X, W, v, M: jnp.abs(X + 1j * X),
        "custom": lambda X, W, v, M: (
            jax.nn.relu(X)
            + jax.nn.silu(X)
            + jax.nn.softplus(X)
            + jax.nn.logsumexp(X, 1, keepdims=True)
        ),
    },
    "reductions": {
        "reduce": lambda X, W, v, M: X.sum(0) + X.max(0) + X.min(0),
        "argmax": lambda X, W, v, M: X.max(1) * jnp.argmax(X, 1),
        "sum_out": lambda X, W, v, M: lax.reduce_sum((X @ W), (0,), out_sharding=P("b")),
        "logsumexp": lambda X, W, v, M: (
            jax.nn.logsumexp(X @ W, axis=-1) + jax.nn.logsumexp(X, axis=0).sum()
        ),
        "softmax": lambda X, W, v, M: jax.nn.softmax(X) * X + jax.nn.log_softmax(X @ W),
        "cumsum": lambda X, W, v, M: (
            jnp.cumsum(X, 1)
            + jnp.cumprod(X, 1)
            + lax.cummax(X, axis=1)
            + lax.cumlogsumexp(X, axis=1)
        ),
        "cumsum_T": lambda X, W, v, M: lax.cumsum(X, axis=1, reverse=True) + lax.cummin(X, axis=1),
        "topk": lambda X, W, v, M: lax.top_k(X, 2)[0],
        "pool": lambda X, W, v, M: (
            lax.reduce_window(X, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID")
            + lax.reduce_window(X, 0.0, lax.add, (1, 2), (1, 2), "VALID")
        ),
        "pool of images": lambda X, W, v, M: (
            lax.reduce_window(_images(X), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            + fnn.ops.max_pool(_images(X), 2)
            + fnn.ops.average_pool(_images(X), 2)
        ),
        "norm": lambda X, W, v, M: (
            (X - X.mean(-1, keepdims=True)) * lax.rsqrt(X.var(-1, keepdims=True) + 1e-3)
        ),
        "bn": lambda X, W, v, M: (X - X.mean(0)) * lax.rsqrt(X.var(0) + 1e-3),
    },
    "indexing": {
        "gather": lambda X, W, v, M: X.at[REPEATED].get(out_sharding=P(None, None)),
        "gather2": lambda X, W, v, M: M.at[_rows()].get(out_sharding=P("a", None)),
        "gather3": lambda X, W, v, M: W.at[_rows()].get(out_sharding=P("a", "b")),
        "xent": lambda X, W, v, M: fnn.ops.softmax_cross_entropy(X @ M, _rows()),
        "dslice": lambda X, W, v, M: lax.dynamic_slice_in_dim(X, 1, 2, 1),
        "dupd": lambda X, W, v, M: lax.dynamic_update_slice(X, X[:, :2] * 2, (0, 1)),
        "scatter": lambda X, W, v, M: (
            M.at[jnp.array([0, 2])].set(M[:2] * 2)
            + M.at[jnp.array([0, 2])].add(M[:2])
            + M.at[jnp.array([0, 2])].max(M[:2])
        ),
        "scatterX": lambda X, W, v, M: (
            X.at[:, 0].set(X[:, 1] * 2) + X.at[:, jnp.array([0, 1])].add(X[:, :2])
        ),
        "embed_add": lambda X, W, v, M: X + M[jnp.array([0, 1, 2, 3, 0, 1, 2, 3])].sum(0),
    },
    "control flow": {
        "scan": lambda X, W, v, M: lax.scan(lambda c, m: (jnp.tanh(c @ M + m), None), X, M)[0],
        "scan_xs": lambda X, W, v, M: lax.scan(
            lambda c, m: (c * m, c.sum()), X[:, 0], jnp.transpose(X)
        )[0],
        "fori": lambda X, W, v, M: lax.fori_loop(0, 2, lambda i, c: jnp.sin(c @ M), X),
        "cond": lambda X, W, v, M: lax.cond(
            M[0, 0] > 0.1, lambda X: jnp.sin(X), lambda X: X * X, X
        ),
        "checkpoint": lambda X, W, v, M: jax.checkpoint(lambda X: jnp.sin(X @ M))(X),
        "vmap": lambda X, W, v, M: jax.vmap(lambda x: jnp.where(x > 0.5, jnp.tanh(M @ x), 0.0))(X),
        "vmapscan": lambda X, W, v, M: jax.vmap(
            lambda x: lax.scan(lambda c, m: (jnp.tanh(c * m), c), x, M)[1]
        )(X),
    },
}


def by_all(grad, functions):
    def loss(f):
        return lambda *args: jnp.sum(jnp.sin(f(*args)))

    return lambda *args: {name: grad(loss(f), (0, 1, 2, 3))(*args) for name, f in functions.items()}


def explicit():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    rng = np.random.default_rng(0)

    def array(shape, *spec):
        return jax.device_put(rng.uniform(0.2, 0.9, shape), NamedSharding(mesh, P(*spec)))

    args = array((8, 4), "a", None), array((4, 4), None, "b"), array(4, "b"), array((4, 4))
    return mesh, args


@pytest.mark.parametrize("family", sweep(EXPLICIT, ["products"]))
def test_on_explicit_meshes(family):
    mesh, args = explicit()
    with jax.set_mesh(mesh):
        theirs, ours = (jax.jit(by_all(g, EXPLICIT[family]))(*args) for g in (jax.grad, fnn.grad))
    close(ours, theirs)


@exhaustive
def test_on_explicit_meshes_without_jit():
    """And the two halves of a vjp, and zeros for what the function doesn't use."""
    mesh, args = explicit()
    some = {
        "mask": EXPLICIT["entries"]["where"],
        "bias": EXPLICIT["shapes"]["bias"],
        "loop": EXPLICIT["control flow"]["scan"],
    }
    with jax.set_mesh(mesh):
        theirs = jax.jit(by_all(jax.grad, some))(*args)
        close(by_all(fnn.grad, some)(*args), theirs)
        for name, f in some.items():
            y, pullback = fnn.vjp(f, *args)
            close(pullback(jnp.cos(y)), theirs[name])


# ------------------------------------------------------------------ what XLA itself gets wrong
#
# The images lie along one axis of a mesh that has two. XLA's gradient of a weight of groups is
# then that of each part as often as there are copies of it, and jax.grad's with it.


def plain_convolution(x, w, groups, **options):
    space = "DHW"[3 - (w.ndim - 2) :]
    given = {"window_strides": (1,) * len(space), "padding": "SAME"} | options
    numbers = (f"N{space}C", f"OI{space}", f"N{space}C")
    return lax.conv_general_dilated(
        x, w, dimension_numbers=numbers, feature_group_count=groups, **given
    )


CONVOLUTIONS = {
    "groups": ((8, 6, 6, 8), (8, 4, 3, 3), 2, {}),
    "depthwise": ((8, 9, 9, 6), (12, 1, 7, 7), 6, {"window_strides": (2, 1)}),
    "dilated": ((8, 7, 8, 4), (4, 2, 3, 2), 2, {"rhs_dilation": (2, 1), "padding": "VALID"}),
    "transposed": (
        (8, 5, 5, 4),
        (4, 2, 3, 3),
        2,
        {"lhs_dilation": (2, 2), "padding": [(1, 2)] * 2},
    ),
    "volumes": ((8, 7, 7, 7, 4), (4, 1, 6, 6, 6), 4, {}),
    "one axis": ((8, 9, 6), (6, 3, 5), 2, {}),
}
HOW = ("set", "not set", "explicit")


@pytest.mark.parametrize("how", sweep(HOW, ["not set"]))
@pytest.mark.parametrize("case", sweep(CONVOLUTIONS, ["groups"]))
def test_a_weight_of_groups_on_some_axes_of_a_mesh(case, how):
    shape, kernel, groups, options = CONVOLUTIONS[case]
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=kernel))
    plain = functools.partial(plain_convolution, groups=groups, **options)
    loss = lambda f: lambda x, w: jnp.sum(jnp.sin(f(x, w)))
    wanted = jax.jit(jax.grad(loss(plain), (0, 1)))(x, w)

    kind = AxisType.Explicit if how == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    given = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, P("data")), (w, P()))]
    with jax.set_mesh(mesh) if how != "not set" else contextlib.nullcontext():
        found = {"fnn.grad": jax.jit(fnn.grad(loss(plain), (0, 1)))(*given)}
        if "padding" not in options:
            strides = options.get("window_strides", (1,) * (w.ndim - 2))
            ours = lambda x, w: fnn.ops.convolution(
                x,
                w,
                groups=groups,
                padding=lax.padtype_to_pads(x.shape[1:-1], w.shape[2:], strides, "SAME"),
                stride=strides,
            )
            for name, grad in (("jax.grad", jax.grad), ("fnn.grad of ours", fnn.grad)):
                found[name] = jax.jit(grad(loss(ours), (0, 1)))(*given)
    for name, gradients in found.items():
        for one, other in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9, err_msg=name)


@exhaustive
def test_images_whose_rows_lie_on_some_axes_of_an_explicit_mesh():
    """There XLA is wrong without groups, too; a type tells how they lie."""
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(4, 8, 6, 3))), jnp.asarray(rng.normal(size=(5, 3, 3, 3)))
    loss = lambda x, w: jnp.sum(jnp.sin(plain_convolution(x, w, 1)))
    wanted = jax.jit(jax.grad(loss, 1))(x, w)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    rows = NamedSharding(mesh, P(None, "model"))
    with jax.set_mesh(mesh):
        found = jax.jit(fnn.grad(loss, 1))(jax.device_put(x, rows), w)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
