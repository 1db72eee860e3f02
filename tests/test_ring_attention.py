"""Attention with keys and values going round the devices: as `attention`, and what is sent."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive, sweep

import fnn
from fnn import ops
from fnn.sharding import collectives

N = 4
AUTO = jax.make_mesh((2, N), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)


def draw(i, *shape):
    return jnp.asarray(np.random.default_rng([i, *shape]).normal(size=shape), jnp.float32)


def arrays(queries=8, keys=8, heads=4, kv_heads=2):
    return draw(0, queries, heads, 5), draw(1, keys, kv_heads, 5), draw(2, keys, kv_heads, 3)


LOWER = jnp.tril(jnp.ones((8, 8), bool), 2)
HEADS = jnp.stack([LOWER, LOWER.T, ~LOWER, jnp.zeros((8, 8), bool)])
OPTIONS = {
    "plain": {},
    "causal": {"causal": True, "block": 1},
    "window": {"causal": True, "window": 3},
    "keys": {"mask": jnp.array([True, False] * 4)},
    "nobody": {"mask": HEADS},
    "slopes": {"slopes": jnp.array([0.1, 0.2, 0.3, 0.4]), "causal": True},
    "scale": {"scale": 0.3, "window": 4},
}


def everything(attend, options, derivatives):
    moving = {k: v for k, v in options.items() if k == "slopes"}
    static = {k: v for k, v in options.items() if k != "slopes"}

    def total(q, k, v, moving):
        y = attend(q, k, v, **static, **moving)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    def found(q, k, v):
        argnums = (0, 1, 2, 3) if moving else (0, 1, 2)
        gradient, y = fnn.grad(total, argnums, has_aux=True)(q, k, v, moving)
        if not derivatives:
            return y, gradient
        value = lambda *args: total(*args, moving)[0]
        along = jax.tree.map(jnp.sin, (q, k, v))
        product = jax.jvp(jax.grad(value, (0, 1, 2)), (q, k, v), along)
        return y, gradient, product

    return jax.jit(found)


@exhaustive
@pytest.mark.parametrize("name", sweep(OPTIONS, ["nobody", "slopes"]))
def test_it_is_attention(name):
    """Value, gradient, and the Hessian times a vector: forward mode too."""
    options, derivatives = OPTIONS[name], name == "slopes"
    ring = lambda q, k, v, **o: ops.ring_attention(q, k, v, mesh=AUTO, axis="sequence", **o)
    ours = everything(ring, options, derivatives)(*arrays())
    plain = everything(ops.attention, options, derivatives)(*arrays())
    chex.assert_trees_all_close(ours, plain, rtol=2e-5, atol=2e-5)


@exhaustive
def test_many_devices_round_no_more_than_one():
    """In 16 bits, the sum over the devices' keys is in at least float32."""
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
    q, k, v = (draw(i, 64, 2, 16) for i in range(3))
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    ring = lambda *a: ops.ring_attention(*a, mesh=mesh, axis="sequence")

    def derivatives(attend, *args):
        loss = lambda *a: jnp.sum(jnp.sin(3 * attend(*a).astype(jnp.float32)))
        tangent = lambda *a: jax.jvp(attend, a, tuple(jnp.cos(x) for x in a))[1]
        return jax.jit(lambda *a: (jax.grad(loss)(*a), tangent(*a)))(*args)

    wanted = derivatives(ops.attention, *(x.astype(jnp.float64) for x in narrow))
    for ours, plain, exact in zip(
        derivatives(ring, *narrow), derivatives(ops.attention, *narrow), wanted, strict=True
    ):
        error = lambda x, exact=exact: np.linalg.norm(x.astype(jnp.float64) - exact)
        print(error(ours) / error(plain))
        assert error(ours) < 1.2 * error(plain)


@exhaustive
def test_of_a_batch_in_a_program_that_sends_no_more_than_it_must():
    """Each of 4 devices sends its keys and values 3 times, and back with their gradients."""
    q, k, v = (jnp.stack([x, x + 1, 2 * x, -x]) for x in arrays(16, 16, 2, 2))
    at = NamedSharding(AUTO, P("data", "sequence"))
    placed = jax.device_put((q, k, v), at)

    def of(attend):
        def loss(q, k, v):
            y = jax.vmap(attend)(q, k, v)
            return jnp.sum(y**2)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))

    ring = of(lambda *a: ops.ring_attention(*a, mesh=AUTO, axis="sequence", causal=True))
    plain = of(lambda *a: ops.attention(*a, causal=True))
    chex.assert_trees_all_close(ring(*placed), plain(q, k, v), rtol=2e-5, atol=2e-5)
    program = ring.lower(*placed).compile()
    sent = [c for c in collectives(program) if c.size > 8]
    assert {c.kind for c in sent} == {"collective-permute"}
    keys, values = 2 * 4 * 2 * 5 * 4, 2 * 4 * 2 * 3 * 4  # bytes a device: batch, positions, heads
    assert sum(c.size * c.times for c in sent) == (keys + values) * ((N - 1) + 2 * (N - 1) + 1)


@exhaustive
@pytest.mark.parametrize("spec", sweep([None, P(), P("sequence")], [P()]), ids=str)
def test_on_a_mesh_with_explicit_axes(spec):
    """The default of `jax.make_mesh`. Arrays on no mesh, on all devices alike, and divided."""
    mesh = jax.make_mesh((2, N), ("data", "sequence"))
    ring = lambda *a: ops.ring_attention(*a, mesh=mesh, axis="sequence", causal=True)
    plain = lambda *a: ops.attention(*a, causal=True)

    def of(attend):
        loss = lambda *a: jnp.sum(jnp.sin(attend(*a)))
        return lambda *a: (attend(*a), jax.grad(loss, (0, 1, 2))(*a))

    wanted = of(plain)(*arrays())
    given = arrays() if spec is None else jax.device_put(arrays(), NamedSharding(mesh, spec))
    found = [jax.jit(of(ring))(*given)]
    with jax.set_mesh(mesh):
        found += [of(ring)(*given)]
    if spec is None:
        found += [of(ring)(*given)]
    for one in found:
        chex.assert_trees_all_close(jax.device_get(one), wanted, rtol=2e-5, atol=2e-5)
    batch = jax.tree.map(lambda x: jnp.stack([x, -x]), arrays())
    wanted = jax.vmap(plain)(*batch)
    divided = NamedSharding(mesh, P("data", *(spec or ())))
    y = jax.jit(jax.vmap(ring))(*jax.device_put(batch, divided))
    chex.assert_trees_all_close(jax.device_get(y), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mesh": 3}, "ring_attention: mesh must be a jax.sharding.Mesh, but got 3"),
        ({"q": draw(0, 8, 5)}, "ring_attention: argument 'q' has shape"),
        ({"axis": "model"}, "axis must be one of the mesh's, but got 'model'"),
        ({"axis": ["model"]}, r"axis must be one of the mesh's, but got \['model'\]"),
        ({"q": draw(0, 6, 4, 5)}, "the 6 queries can't be divided evenly over the 4 devices"),
        ({"window": 0}, "window"),
        ({"mask": jnp.ones((3, 3))}, "wanted booleans"),
    ],
)
def test_what_is_refused(change, message):
    q, k, v = arrays()
    given = {"q": q, "k": k, "v": v, "mesh": AUTO, "axis": "sequence"} | change
    with pytest.raises((TypeError, ValueError), match=message):
        ops.ring_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
