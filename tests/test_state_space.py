"""The linear recurrence, and the state-space layer made of it: against loops written out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive, sweep

import fnn
import fnn.per_example as pe
from fnn import ops
from fnn.layers import LRU, LayerError, Linear, chain, repeat, residual, summary

KEY = jax.random.key(0)


def R(i, *shape, dtype=jnp.float64):
    numbers = np.random.default_rng([i, *shape])
    real = numbers.normal(size=shape)
    return jnp.asarray(
        real + 1j * numbers.normal(size=shape) if jnp.issubdtype(dtype, complex) else real, dtype
    )


def plain(a, b, x, reverse=False):
    a, xs = jnp.broadcast_to(a, b.shape), [None] * len(b)
    for t in range(len(b))[::-1] if reverse else range(len(b)):
        x = xs[t] = a[t] * x + b[t]
    return jnp.stack(xs)


WAYS = [
    (dtype, steps, of_step, back)
    for dtype in (float, complex)
    for steps in (1, 2, 5)
    for of_step in (0, 1)
    for back in (0, 1)
]
QUICK = [(complex, 5, 0, 0), (float, 5, 1, 1)]


@pytest.mark.parametrize("way", sweep(WAYS, QUICK), ids=lambda w: f"{w[0].__name__} {w[1:]}")
def test_a_linear_recurrence(way):
    """Values, gradients in both modes, and second derivatives, of numbers real and complex."""
    dtype, steps, of_step, back = way
    dtype = jnp.dtype(dtype)
    args = (
        R(0, *(steps,) * of_step, 3, dtype=dtype),
        R(1, steps, 3, dtype=dtype),
        R(2, 3, dtype=dtype),
    )
    weights = jnp.arange(1, 3 * steps + 1).reshape(steps, 3)

    def everything(op, gradient):
        def total(*args):
            return jnp.sum(jnp.sin(weights * jnp.abs(op(*args, reverse=bool(back)) + 0.1) ** 2))

        g = gradient(total, (0, 1, 2))
        return total(*args), g(*args), jax.jvp(g, args, args)[1], jax.jvp(total, args, args)[1]

    ours = ops.linear_recurrence
    found = jax.jit(lambda: [everything(ours, d) for d in (jax.grad, fnn.grad)])()
    wanted = jax.jit(lambda: everything(plain, jax.grad))()
    for of_gradient in found:
        chex.assert_trees_all_close(of_gradient, wanted, rtol=1e-9, atol=1e-9)


def test_in_rounds_as_on_an_accelerator():
    """What other platforms run, compared where it can be run: here."""
    from fnn.ops.state_space import _in_a_loop, _in_rounds

    for shape in ((3,), (6, 3)):
        a, b = R(0, *shape, dtype=complex) / 2, R(1, 6, 3, dtype=complex)
        for reverse in (False, True):
            wanted = _in_a_loop(a, b, reverse)
            np.testing.assert_allclose(_in_rounds(a, b, reverse), wanted, rtol=1e-10)
    exported = jax.export.export(
        jax.jit(jax.grad(lambda a: jnp.sum(ops.linear_recurrence(a, b.real)))),
        platforms=("cuda", "tpu"),
    )
    assert "while" not in exported(a.real).mlir_module()


def test_gradients_keep_the_states_alone():
    a, b = (jax.ShapeDtypeStruct(s, jnp.complex64) for s in ((64,), (4096, 64)))

    def rounds(a, b):
        join = lambda f, s: (f[0] * s[0], s[0] * f[1] + s[1])
        return jax.lax.associative_scan(join, (jnp.broadcast_to(a, b.shape), b))[1]

    def temporaries(op):
        loss = lambda a, b: jnp.sum(jnp.abs(op(a, b)) ** 2)
        made = jax.jit(jax.grad(loss, (0, 1))).lower(a, b).compile()
        return made.memory_analysis().temp_size_in_bytes

    assert temporaries(ops.linear_recurrence) < 0.5 * temporaries(rounds)


def test_what_does_not_fit():
    a, b = jnp.ones(3), jnp.ones((5, 3))
    op = ops.linear_recurrence
    for args, match in [
        ((jnp.ones(4), b), r"'a' has shape \(4,\), wanted \(3,\).* or \(5, 3\)"),
        ((a, b, jnp.ones(4)), r"'x' has shape \(4,\), wanted \(3,\)"),
        ((a, jnp.ones(())), r"'b' has shape \(\), wanted \(steps, ...\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            op(*args)
    with pytest.raises(TypeError, match="'a' has dtype float32, wanted float64"):
        op(a.astype(jnp.float32), b)
    assert op(a, b[:0]).shape == (0, 3)
    half = op(jnp.full(3, 0.5, jnp.bfloat16), b.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half[-1].astype(float), 1.9375, rtol=1e-2)


# ------------------------------------------------------------------------------------ the layer


def step_by_step(params, x):
    """The paper's formula, with complex matrices."""
    decay = jnp.exp(-jnp.exp(params["nu"]) + 1j * jnp.exp(params["theta"]))
    B, C = (params[name][0] + 1j * params[name][1] for name in "BC")
    s, ys = jnp.zeros(len(decay), complex), []
    for x_t in x:
        s = decay * s + jnp.exp(params["gamma"]) * (B @ x_t)
        ys.append((C @ s).real + params["D"] * x_t)
    return jnp.stack(ys)


@exhaustive
def test_the_layer():
    layer, x = LRU(5), R(0, 6, 3)
    params = layer.init(KEY, x)

    @jax.jit
    def both():
        cache, ys = layer.init_cache(6, x), []
        for piece in (x[:1], x[1:4], x[4:]):
            y, cache = layer.apply(params, cache, piece)
            ys.append(y)
        return layer(params, x), jnp.concatenate(ys), step_by_step(params, x)

    y, pieces, wanted = both()
    np.testing.assert_allclose(y, wanted, rtol=1e-9)
    np.testing.assert_allclose(pieces, wanted, rtol=1e-9)
    half = layer(jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(float), wanted, rtol=0.1, atol=0.1)


@exhaustive
def test_the_start_is_finite_where_the_ring_begins_at_nothing():
    layer, x = LRU(4, least=0, most=1e-200), R(0, 3, 2)  # its square is 0
    params = layer.init(KEY, x)
    chex.assert_tree_all_finite((params, jax.grad(lambda p: jnp.sum(layer(p, x)))(params)))


@exhaustive
def test_a_phase_smaller_than_the_smallest_angle_that_is_drawn():
    angle = np.exp(LRU(4, phase=1e-9).init(KEY, R(0, 3, 2))["theta"])
    assert np.all((angle > 0) & (angle <= 1e-9 * (1 + 1e-9)))


@exhaustive
def test_where_the_layer_starts():
    params = LRU(4000, least=0.5, most=0.9, phase=1.0).init(KEY, jnp.zeros((1, 2)))
    size, angle = np.exp(-np.exp(params["nu"])), np.exp(params["theta"])
    assert size.min() >= 0.5 and size.max() <= 0.9 and angle.min() > 0 and angle.max() <= 1
    assert (size**2).mean() == pytest.approx((0.25 + 0.81) / 2, rel=0.01)
    np.testing.assert_allclose(np.exp(params["gamma"]), np.sqrt(1 - size**2), rtol=1e-9)
    # Of noise the states have the noise's size, whatever λ is.
    layer = LRU(64)
    params = layer.init(KEY, jnp.zeros((1, 64)))
    s = ops.linear_recurrence(
        jnp.exp(-jnp.exp(params["nu"]) + 1j * jnp.exp(params["theta"])),
        jnp.exp(params["gamma"]) * (R(0, 5000, 64) @ (params["B"][0] + 1j * params["B"][1]).T),
    )
    assert np.mean(np.abs(s[2000:]) ** 2) == pytest.approx(1, rel=0.15)


@exhaustive
def test_a_long_sequence():
    layer = LRU(8)
    x = R(0, 65_536, 2, dtype=jnp.float32)
    params = jax.tree.map(lambda a: a.astype(jnp.float32), layer.init(KEY, x))
    loss = lambda p: jnp.mean(layer(p, x)[-1] ** 2)
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    chex.assert_tree_all_finite((value, gradient))


def test_per_example_gradients_stay_factored():
    """The products' weights; λ, γ and D are used elementwise."""
    big = LRU(64)
    x = jax.ShapeDtypeStruct((2, 3, 48), jnp.float64)
    params = jax.eval_shape(big.init, KEY, jax.ShapeDtypeStruct((3, 48), jnp.float64))
    _, g = jax.eval_shape(pe.grads(lambda p, x: jnp.sum(big(p, x) ** 2)), params, x)
    kept = {row["path"]: row["kept"] for row in pe.explain(g)}
    assert kept["['B']"] == "A (3 × 48), G (3 × 128)"  # both halves in one
    assert kept["['C']"] == "A (3 × 128), G (3 × 48)"


@exhaustive
def test_per_example_gradients_are_right():
    layer, xs = LRU(6), R(0, 4, 3, 5)
    params = layer.init(KEY, xs[0])
    loss = lambda p, x: jnp.sum(jnp.sin(layer(p, x)))

    @jax.jit
    def both(params, xs):
        _, g = pe.grads(loss)(params, xs)
        wanted = jax.vmap(jax.grad(loss), (None, 0))(params, xs)
        return (pe.materialize(g), pe.norms(g)), wanted

    (found, norms), wanted = both(params, xs)
    chex.assert_trees_all_close(found, wanted, rtol=1e-9, atol=1e-12)
    flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])(wanted)
    np.testing.assert_allclose(norms, jnp.linalg.norm(flat, axis=1), rtol=1e-9)


@exhaustive
@pytest.mark.parametrize("steps", [1, 3])
def test_kronecker_factors(steps):
    """Of the weights' products; of one step of one example they are exact."""
    layer, xs = LRU(2), R(0, 1, steps, 2)
    params = layer.init(KEY, xs[0])
    model = lambda p, x: jnp.sum(layer(p, x) ** 2)
    find = fnn.curvature.kronecker_factors(model, lambda y, _: y**2)
    found = find(params, (xs, jnp.zeros(1)))
    for name in params:
        assert found[name].to_dense().shape == (params[name].size,) * 2
    assert isinstance(found["B"], fnn.curvature.Kronecker)
    assert isinstance(found["C"], fnn.curvature.Kronecker)
    if steps == 1:
        slope = jax.grad(model)(params, xs[0])["B"].reshape(-1)
        np.testing.assert_allclose(found["B"].to_dense(), 2 * jnp.outer(slope, slope), rtol=1e-9)


@pytest.mark.parametrize("states", [None, "model"])
def test_on_a_mesh_with_explicit_axes(states):
    """JAX joins no sharded axis with another there."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    layer, xs = LRU(4), R(0, 4, 3, 2)
    params = layer.init(KEY, xs[0])
    loss = lambda p, xs: jnp.sum(jnp.sin(jax.vmap(layer, (None, 0))(p, xs)))
    wanted = jax.grad(loss)(params, xs)
    lies = {name: P(states) for name in ("nu", "theta", "gamma")} | {"B": P(None, states)}
    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        placed = {name: put(p, lies.get(name, P())) for name, p in params.items()}
        found = jax.jit(jax.grad(loss))(placed, put(xs, P("data")))
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(wanted), rtol=1e-9)


@exhaustive
def test_in_networks():
    net = chain(Linear(4), repeat(residual(LRU(6)), 2))
    x = R(0, 5, 3)
    params = net.init(KEY, x)
    assert params["1"]["0"]["B"].shape == (2, 2, 6, 4)
    y, cache = net(params, x), net.init_cache(5, x)
    first, cache = net.apply(params, cache, x[:2])
    rest, cache = net.apply(params, cache, x[2:])
    np.testing.assert_allclose(jnp.concatenate([first, rest]), y, rtol=1e-9)


def test_wrong_shapes_of_the_layer():
    with pytest.raises(LayerError, match=r"^0: LRU\(6\) wants a sequence .* got shape \(4,\)"):
        chain(LRU(6)).init(KEY, jnp.zeros(4))
    with pytest.raises(LayerError, match=r"LRU\(6\) wants B of shape \(2, 6, 5\), but got one of"):
        LRU(6)(LRU(6).init(KEY, jnp.zeros((2, 4))), jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match="LRU: most must be a number above 0.9 and below 1"):
        LRU(6, most=0.5)
    assert "LRU(6)" in str(summary(LRU(6), jnp.zeros((2, 4))))
