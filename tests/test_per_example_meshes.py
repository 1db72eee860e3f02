"""Per-example gradients on meshes with explicit axes, `jax.make_mesh`'s default: as on one device.

Needs the four virtual devices that `conftest.py` asks for.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive, sweep

import fnn.per_example as pe

HASTILY = {"xla_backend_optimization_level": 0}


def R(i, *shape):
    return jnp.asarray(np.random.default_rng([i, *shape]).standard_normal(shape), jnp.float32)


def loss(p, e):
    """Rows looked up, products at several positions, a convolution and a loop."""
    x, i, y = e
    h = jnp.tanh((x + p["E"][i]) @ p["W"].T + p["b"])
    numbers = ("NWC", "WIO", "NWC")
    h = lax.conv_general_dilated(h[None], p["k"], (1,), "SAME", dimension_numbers=numbers)[0]
    z, _ = lax.scan(lambda s, a: (jnp.tanh(p["U"] @ s + a), None), jnp.zeros(6), h)
    return jnp.sum((z @ p["V"] - y) ** 2)


def data():
    p = {"E": R(0, 9, 5), "W": R(1, 6, 5), "b": R(2, 6), "k": R(3, 3, 6, 6), "V": R(4, 6, 3)}
    p["U"] = R(5, 6, 6) / 3
    i = jnp.asarray(np.random.default_rng(6).integers(0, 9, (8, 4)))
    return p, (R(7, 8, 4, 5), i, R(8, 8, 3))


def of_gradients(g, p):
    names = ("norms", "gram", "mean", "sum", "variance", "second_moment", "noise", "materialize")
    found = {name: getattr(pe, name)(g) for name in names}
    found["by leaf"] = pe.norms(g, by="leaf")
    found["by group"] = pe.norms(g, by=lambda path: path[:3])
    found["dot"], found["scale"] = pe.dot(g, p), pe.norms(pe.scale(g, jnp.arange(8.0)))
    found["weighted_sum"] = pe.weighted_sum(g, jnp.arange(8.0))
    found["add"], found["noise_scale"] = pe.norms(pe.add(g, g)), pe.noise_scale(g)
    found["one"] = g["W"].norms(), g["W"].gram(), g["W"].mean()
    return found


def of_clipping(p, batch, sweeps):
    clip = functools.partial(pe.clipped_grad, loss, 1.0, sweeps=sweeps)
    key = jax.random.key(0)
    found = {
        "plain": clip()(p, batch),
        "mask": clip(nan_safe=True)(p, batch, mask=jnp.arange(8) != 2),
    }
    if sweeps == 2:
        return found | {"uneven parts": clip(microbatch_size=3)(p, batch)}
    return found | {
        "parts": clip(microbatch_size=2)(p, batch),
        "uneven parts": clip(microbatch_size=3)(p, batch),
        "noise": clip(noise_multiplier=1.0)(p, batch, noise_key=key),
        "groups": clip(groups=lambda path: path[:3])(p, batch),
    }


def everything(p, batch, few):
    losses, g = pe.grads(loss)(p, batch)
    if few:
        clipped = {"plain": pe.clipped_grad(loss, 1.0)(p, batch)}
        return losses, {"norms": pe.norms(g), "mean": pe.mean(g)}, clipped, {}
    return losses, of_gradients(g, p), of_clipping(p, batch, 1), of_clipping(p, batch, 2)


def close(ours, plain):
    assert jax.tree.structure(ours) == jax.tree.structure(plain)
    pairs = zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(plain), strict=True)
    for (path, a), b in pairs:
        where = jax.tree_util.keystr(path)
        largest = np.max(np.abs(b), initial=1e-30)
        np.testing.assert_allclose(a, b, 1e-4, 1e-5 * largest, err_msg=where)


def placed(mesh, p, batch, weights):
    at = lambda spec: NamedSharding(mesh, spec)
    own = {k: at(weights if k in "WV" else P()) for k in p}
    return jax.device_put(p, own), jax.device_put(batch, at(P("batch")))


# On the mesh of two axes the program computes less.
@exhaustive
@pytest.mark.parametrize("axes", sweep([("batch",), ("batch", "model")], [("batch", "model")]))
def test_everything_is_as_on_one_device(axes):
    p, batch = data()
    program = jax.jit(functools.partial(everything, few="model" in axes))
    expected = program.lower(p, batch).compile(HASTILY)(p, batch)
    mesh = jax.make_mesh((4,) if axes == ("batch",) else (2, 2), axes)
    assert all(kind == AxisType.Explicit for kind in mesh.axis_types)
    weights = P("model") if "model" in axes else P()
    args = placed(mesh, p, batch, weights)
    with jax.set_mesh(mesh):
        found = program.lower(*args).compile(HASTILY)(*args)
    close(found, expected)
    _, quantities, clipped, _ = found
    assert quantities["norms"].sharding.spec == P("batch")
    gradient = clipped["plain"].gradient["W"]
    assert gradient.sharding.is_equivalent_to(args[0]["W"].sharding, 2)


@exhaustive
def test_outside_jit_and_without_a_mesh_set():
    p, batch = data()
    small = lambda p, e: jnp.sum(jnp.tanh(p["W"] @ e[0].T) ** 2)
    p = {"W": p["W"]}
    mesh = jax.make_mesh((4,), ("batch",))
    args = placed(mesh, p, batch, P())

    def some(p, batch):
        losses, g = pe.grads(small)(p, batch)
        return losses, pe.norms(g), pe.gram(g), pe.clipped_grad(small, 1.0)(p, batch)

    expected = jax.jit(some)(p, batch)
    close(some(*args), expected)
    with jax.set_mesh(mesh):
        close(some(*args), expected)


@exhaustive
def test_arrays_beside_the_batch():
    """As keyword arguments they may lie on the mesh; closed over, an error says so."""
    p, batch = data()
    mesh = jax.make_mesh((4,), ("batch",))
    (p, (x, _, _)), frozen = (
        placed(mesh, p, batch, P()),
        jax.device_put(R(9, 6, 6), NamedSharding(mesh, P())),
    )
    norms = lambda loss, **static: pe.grads(loss)(p["W"], x, **static)[1].norms()
    found = norms(lambda w, x, frozen: jnp.sum(jnp.sin(frozen @ w @ x.T)), frozen=frozen)
    at_home = np.asarray(frozen)
    expected = norms(lambda w, x: jnp.sum(jnp.sin(at_home @ w @ x.T)))
    np.testing.assert_allclose(found, expected, 1e-5)
    with pytest.raises(ValueError, match="context mesh") as error:
        norms(lambda w, x: jnp.sum(jnp.sin(frozen @ w @ x.T)))
    assert "as a keyword argument" in error.value.__notes__[-1]
