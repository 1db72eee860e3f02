"""Operations inside `jax.shard_map`, with its checks: as the same plain functions without it."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ops_table import CASES
from sweeps import sweep

import fnn


def a_mesh(kind=AxisType.Auto):
    return jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])


def derivatives(f, total=lambda x: x):
    """All derivatives of a batch by a weight that the examples share, and by each example."""

    def of_batch(w, X, *rest):
        along = jnp.ones_like(X)

        def value(w, x, *rest):
            y = f((w * x).astype(x.dtype), *rest)
            return jnp.sum(y * jnp.arange(1, y.size + 1, dtype=y.dtype).reshape(y.shape))

        def of_example(x, dx, *rest):
            g = jax.grad(value, 1)
            return {
                "value": value(w, x, *rest),
                "grad": g(w, x, *rest),
                "jvp": jax.jvp(lambda x: value(w, x, *rest), (x,), (dx,))[1],
                "hessian": jax.hessian(value, 1)(w, x, *rest),
            }

        def batch(w):
            return total(jnp.sum(jax.vmap(value, (None, *[0] * (1 + len(rest))))(w, X, *rest)))

        return jax.vmap(of_example)(X, along, *rest), jax.grad(batch)(w)

    return of_batch


def sharded(f, mesh, n, **options):
    of_batch = derivatives(f, lambda x: lax.psum(x, "data"))
    return jax.shard_map(
        of_batch,
        mesh=mesh,
        in_specs=(P(), *[P("data")] * n),
        out_specs=(P("data"), P()),
        **options,
    )


def must_agree(case, mesh, dtype=jnp.float32, **options):
    args = case.example(dtype, (2,))
    w = jnp.asarray(0.9, dtype)
    # On an explicit mesh, arrays lie where shard_map is told they do.
    args = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in args]
    ours = jax.jit(sharded(case.op, mesh, len(args), **options))(w, *args)
    plain = jax.jit(derivatives(case.reference))(w, *map(np.asarray, args))
    eps = float(jnp.finfo(dtype).eps)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=100 * eps, atol=100 * eps
        ),
        ours,
        plain,
    )


QUICK = ["gelu", "huber", "l2", "logsumexp", "mish", "sigmoid", "softmax", "softmax_cross_entropy"]


@pytest.mark.parametrize("name", sweep(CASES, QUICK))
def test_operations(name):
    must_agree(CASES[name], a_mesh())


MASKED = [
    "attention",
    "relu",
    "hard_silu",
    "maxout",
    "multiclass_hinge",
    "softmax_cross_entropy",
    "softmax_cross_entropy of distributions",
]


@pytest.mark.parametrize("name", sweep(MASKED, ["relu", "softmax_cross_entropy"]))
def test_operations_on_an_explicit_mesh(name):
    must_agree(CASES[name], a_mesh(AxisType.Explicit))


@pytest.mark.parametrize("name", ["relu", "multiclass_hinge"])
def test_operations_without_checks(name):
    """Without them, JAX takes another meaning of psum's transpose: compare within shard_map."""
    case, mesh = CASES[name], a_mesh()
    args = jnp.float32(0.9), *case.example(batch=(2,))
    ours, plain = (
        jax.jit(sharded(f, mesh, len(args) - 1, check_vma=False))(*args)
        for f in (case.op, case.reference)
    )
    chex.assert_trees_all_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, kind", [("relu", AxisType.Auto), ("maxout", AxisType.Explicit)])
def test_operations_without_jit(name, kind):
    case, mesh, spec = CASES[name], a_mesh(kind), P("data")
    args = [jax.device_put(x, NamedSharding(mesh, spec)) for x in case.example(batch=(2,))]
    of_batch = lambda f: jax.vmap(jax.grad(lambda x: jnp.sum(f(x))))
    ours = jax.shard_map(of_batch(case.op), mesh=mesh, in_specs=spec, out_specs=spec)
    plain = of_batch(case.reference)(*map(np.asarray, args))
    np.testing.assert_allclose(ours(*args), plain)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", sweep(["relu6", "softmax_cross_entropy"], ["relu6"]))
def test_operations_in_half_precision(name, dtype):
    must_agree(CASES[name], a_mesh(), dtype)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_some_axes_manual(kind):
    """The other axis of the mesh stays with the compiler."""
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2, devices=devices)
    must_agree(CASES["hard_tanh"], mesh, axis_names={"data"})


# Ways to write the gate of a relu that lets through `g` where x > 0.


@jax.jit
def masked_by_a_jitted_function(x, g):
    return jnp.where(x > 0, g, jnp.zeros_like(g))


@jax.custom_jvp
def masked_by_a_function_with_a_jvp(x, g):
    return lax.select(x > 0, g, lax.full_like(g, 0))


masked_by_a_function_with_a_jvp.defjvp(
    lambda primals, tangents: (
        masked_by_a_function_with_a_jvp(*primals),
        masked_by_a_function_with_a_jvp(primals[0], tangents[1]),
    )
)

NOTHING = jnp.float32(0)

GATES = {
    "where": lambda x, g: jnp.where(x > 0, g, 0),
    "where of a float": lambda x, g: jnp.where(x > 0, g, 0.0),
    "where of an array": lambda x, g: jnp.where(x > 0, g, np.zeros(4, np.float32)),
    "where of zeros_like": lambda x, g: jnp.where(x > 0, g, jnp.zeros_like(x)),
    "where of a closed-over array": lambda x, g: jnp.where(x > 0, g, NOTHING),
    "where of zero times x": lambda x, g: jnp.where(x > 0, g, 0 * x),
    "where of a converted zero": lambda x, g: jnp.where(x > 0, g, jnp.asarray(0, x.dtype)),
    "where of the absolute value": lambda x, g: jnp.where(x > 0, g, jnp.abs(jnp.float32(0))),
    "select": lambda x, g: lax.select(x > 0, g, lax.full_like(g, 0)),
    "select_n": lambda x, g: lax.select_n(x > 0, jnp.zeros_like(g), g),
    "nested": lambda x, g: jnp.where(x > 5, 0, jnp.where(x > 0, g, 0)),
    "mask": lambda x, g: g * (x > 0),
    "mask of floats": lambda x, g: g * (x > 0).astype(g.dtype) + 0.0,
    "heaviside": lambda x, g: g * jnp.heaviside(x, 0.0),
    "jit": masked_by_a_jitted_function,
    "custom_jvp": masked_by_a_function_with_a_jvp,
    "checkpoint": lambda x, g: jax.checkpoint(lambda g: jnp.where(x > 0, g, 0))(g),
    "one_hot": lambda x, g: jnp.where(
        x > 0, jnp.sum(jax.nn.one_hot(jnp.arange(4), 4, dtype=g.dtype) * g[:, None], 0), 0
    ),
    "multiply at": lambda x, g: g.at[jnp.arange(4)].multiply((x > 0).astype(g.dtype)),
    "add at": lambda x, g: jnp.zeros_like(x).at[jnp.arange(4)].add(jnp.where(x > 0, g, 0)),
    "set at": lambda x, g: jnp.zeros_like(x).at[:].set(jnp.where(x > 0, g, 0)),
    "set to zero at": lambda x, g: jnp.where(x > 0, g.at[0].set(0) + g.at[1:].set(0), 0),
    "update slice": lambda x, g: jnp.where(
        x > 0, lax.dynamic_update_slice(jnp.zeros(4, g.dtype), g, (0,)), 0
    ),
    "padded": lambda x, g: jnp.where(x > 0, jnp.pad(g, 1)[1:-1], 0),
    "concatenated": lambda x, g: jnp.concatenate([g, jnp.zeros(3, g.dtype)])[:4] * (x > 0),
    "rolled": lambda x, g: jnp.where(x > 0, jnp.roll(jnp.roll(g, 1), -1), 0),
    "cond": lambda x, g: lax.cond(
        x.shape[0] == 4, lambda g: jnp.where(x > 0, g, 0), jnp.zeros_like, g
    ),
    "map": lambda x, g: lax.map(lambda v: jnp.where(v[0] > 0, v[1], 0), (x, g)),
    "scan": lambda x, g: lax.scan(
        lambda c, v: (c + 0 * v[1], lax.cond(v[0] > 0, lambda d: d, jnp.zeros_like, v[1])),
        jnp.zeros_like(g[0]),
        (x, g),
    )[1],
    "vmap": lambda x, g: jax.vmap(lambda a, d: jnp.where(a > 0, d, 0))(x, g),
    "einsum": lambda x, g: jnp.einsum("ij,j->i", jnp.diag((x > 0).astype(g.dtype)), g),
    "barrier": lambda x, g: jnp.where(x > 0, lax.optimization_barrier(g), 0),
    "relu's own derivative": lambda x, g: jax.vjp(jax.nn.relu, x)[1](g)[0],
    "our relu's derivative": lambda x, g: jax.vjp(fnn.ops.relu, x)[1](g)[0],
    "our relu's tangent": lambda x, g: jax.jvp(fnn.ops.relu, (x,), (g,))[1],
}


QUICK_GATES = ["where", "select", "mask", "custom_jvp", "checkpoint", "add at", "set to zero at"]
QUICK_GATES += ["update slice", "padded", "cond", "scan", "our relu's derivative"]


@pytest.mark.parametrize("how", sweep(GATES, QUICK_GATES))
def test_ways_to_write_a_mask(how):
    @fnn.rule
    def gate(x):
        return jnp.maximum(x, 0)

    gate.backward(lambda residuals, g: (GATES[how](residuals[0], g),))
    X = jnp.arange(-4.0, 4.0, dtype=jnp.float32).reshape(2, 4) + 0.5

    def local(x):
        f = lambda x: jnp.sum(gate(x) ** 2)
        return jax.vmap(jax.grad(f))(x), jax.vmap(lambda x: jax.jvp(f, (x,), (x,))[1])(x)

    spec = P("data")
    ours = jax.jit(jax.shard_map(local, mesh=a_mesh(), in_specs=spec, out_specs=spec))(X)
    positive = jnp.maximum(X, 0)
    np.testing.assert_allclose(ours[0], 2 * positive, rtol=1e-6)
    np.testing.assert_allclose(ours[1], jnp.sum(2 * positive * X, 1), rtol=1e-6)


CONSTANT_TERMS = {
    "where": lambda x, g: jnp.where(x > 0, g, 1),
    "where of x": lambda x, g: jnp.where(x > 0, g, x),
    "set at": lambda x, g: g.at[0].set(1),
    "add at": lambda x, g: jnp.ones_like(x).at[0].add(g[0]),
    "update slice": lambda x, g: lax.dynamic_update_slice(jnp.ones(4, g.dtype), g[:2], (0,)),
    "padded": lambda x, g: jnp.pad(g[:2], 1, constant_values=1),
    "cond": lambda x, g: lax.cond(x[0] > 0, lambda d: d, jnp.ones_like, g),
    "loop": lambda x, g: lax.fori_loop(0, 3, lambda i, c: c + g, x),
    "jit": lambda x, g: jax.jit(lambda d: jnp.where(x > 0, d, 2))(g),
    "sum of an operation and g": lambda x, g: fnn.ops.sigmoid(x) + g,
}


@pytest.mark.parametrize("inside", ["shard_map", "alone"])
@pytest.mark.parametrize("how", CONSTANT_TERMS)
def test_constant_terms_are_found(how, inside):
    @fnn.rule
    def gate(x):
        return jnp.maximum(x, 0)

    gate.backward(lambda residuals, g: (CONSTANT_TERMS[how](residuals[0], g),))
    g = jax.grad(lambda x: jnp.sum(gate(x)))
    if inside == "shard_map":
        g = jax.shard_map(g, mesh=a_mesh(), in_specs=P("data"), out_specs=P("data"))
    with pytest.raises(fnn.RuleError, match="constant term"):
        jax.eval_shape(g, jnp.ones(8 if inside == "shard_map" else 4))


def test_an_argument_whose_gradient_is_zero():
    """Written as zeros, which every device has alike, though the argument varies."""

    @fnn.rule
    def product(x, y):
        return x * y

    product.backward(lambda residuals, g: (g * residuals[1], jnp.zeros(residuals[1].shape)))
    product.tangent(lambda residuals, dx, g: dx * residuals[1])
    X = jnp.arange(4.0)

    def local(x, w):
        f = lambda x, w: jnp.sum(product(x, w * x) ** 2)
        return jax.grad(f, (0, 1))(x, w), jax.jvp(f, (x, w), (x, w))[1][None]

    ours = jax.shard_map(
        local, mesh=a_mesh(), in_specs=(P("data"), P()), out_specs=((P("data"), P()), P("data"))
    )
    (dx, dw), moved = jax.jit(ours)(X, jnp.float32(2.0))
    y = 2 * X
    np.testing.assert_allclose(dx, 2 * (X * y) * y)
    np.testing.assert_allclose(dw, 0)
    np.testing.assert_allclose(moved.sum(), jnp.sum(2 * (X * y) * y * X))


def _counting():
    """A cell whose carry varies over the devices, beside a count and zeros that needn't."""

    def step(net, carry, x):
        h, count, _ = carry
        h = jnp.tanh(net.linear(jnp.concatenate([h, x]))) + 0.1 * count
        return (h, count + 1, jnp.zeros(2)), h

    cell = fnn.layers.network(linear=fnn.layers.Linear(3))(step)
    start = lambda x: (jnp.zeros(3), jnp.zeros(()), jnp.zeros(2))
    return fnn.layers.recurrent(cell, start)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("layer", [fnn.layers.GRU(3), _counting()], ids=["GRU", "recurrent"])
def test_recurrent_layers_start_alike_on_all_devices(layer, remat):
    layer = dataclasses.replace(layer, remat=remat)
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)))
    params = layer.init(jax.random.key(0), xs[0])

    def loss(params, xs):
        return jnp.sum(jnp.sin(jax.vmap(lambda x: layer(params, x))(xs)))

    total = lambda params, xs: lax.psum(loss(params, xs), "data")
    ours = jax.shard_map(total, mesh=a_mesh(), in_specs=(P(), P("data")), out_specs=P())
    found, wanted = (jax.jit(jax.value_and_grad(f))(params, xs) for f in (ours, loss))
    chex.assert_trees_all_close(found, wanted, rtol=1e-9, atol=1e-12)
