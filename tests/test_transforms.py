"""fnn.grad, fnn.value_and_grad and fnn.vjp: JAX's signatures, results and errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive, sweep

import fnn

rng = np.random.default_rng(1)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape))


def mlp(params, x):
    return jnp.sum(params["W2"] @ jax.nn.relu(params["W1"] @ x))


PARAMS = {"W1": normal(5, 3), "W2": normal(2, 5)}
X = normal(3)


def same(got, want, rtol=1e-12):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol, 1e-12)


def test_the_lectures_gradients():
    got = fnn.grad(lambda x, y, z: (x + y) * z, argnums=(0, 1, 2))(-2.0, 5.0, -4.0)
    assert [float(g) for g in got] == [-4.0, -4.0, 3.0]


@pytest.mark.parametrize("argnums", [0, 1, -1, (0,), (0, 1), (1, 0)])
def test_argnums(argnums):
    same(fnn.grad(mlp, argnums)(PARAMS, X), jax.grad(mlp, argnums)(PARAMS, X))


def test_aux_may_hold_anything():
    def f(params, x):
        return mlp(params, x), {"hidden": params["W1"] @ x, "name": "relu", "n": 3}

    (value, aux), gradient = fnn.value_and_grad(f, has_aux=True)(PARAMS, X)
    (want, _), want_gradient = jax.value_and_grad(f, has_aux=True)(PARAMS, X)
    same((value, gradient), (want, want_gradient))
    assert aux["name"] == "relu" and aux["n"] == 3
    np.testing.assert_allclose(aux["hidden"], PARAMS["W1"] @ X)
    same(fnn.grad(f, has_aux=True)(PARAMS, X)[0], want_gradient)


def test_arguments_that_are_not_differentiated_stay_python():
    def f(x, kind, scale):
        return jnp.sum(jnp.sin(x) if kind == "sin" else x) * (2 if scale else 1)

    same(fnn.grad(f)(X, "sin", scale=True), 2 * jnp.cos(X))


@exhaustive
def test_weak_types_and_dtypes_are_kept():
    assert fnn.grad(lambda x: x**2)(3.0).weak_type == jax.grad(lambda x: x**2)(3.0).weak_type
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        x = X.astype(dtype)
        got = fnn.grad(lambda x: jnp.sum(jnp.tanh(x) * x))(x)
        assert got.dtype == x.dtype
        same(got, jax.grad(lambda x: jnp.sum(jnp.tanh(x) * x))(x), 3e-2)


def test_mixed_precision():
    def f(w, x):
        return jnp.sum((w.astype("bfloat16") @ x.astype("bfloat16")).astype("float32") ** 2)

    w, x = normal(4, 3).astype("float32"), normal(3).astype("float32")
    same(fnn.grad(f, (0, 1))(w, x), jax.grad(f, (0, 1))(w, x), 1e-5)


def test_holomorphic_and_real_functions_of_complex_numbers():
    z = normal(3) + 1j * normal(3)
    same(
        fnn.grad(lambda z: jnp.sum(jnp.exp(z) * z), holomorphic=True)(z),
        jax.grad(lambda z: jnp.sum(jnp.exp(z) * z), holomorphic=True)(z),
    )

    def real(z):
        return jnp.sum(jnp.abs(jnp.sin(z) * z.conj()) ** 2 + jnp.real(z) * jnp.imag(z))

    same(fnn.grad(real)(z), jax.grad(real)(z))


def test_integers():
    f = lambda n, x: jnp.sum(x) * n
    same(
        fnn.grad(f, (0, 1), allow_int=True)(3, X),
        jax.grad(f, (0, 1), allow_int=True)(jnp.asarray(3), X),
    )


def test_under_every_transform():
    f = lambda x: mlp(PARAMS, jnp.tanh(x)) ** 2
    g, h = fnn.grad(f), jax.grad(f)
    xs = normal(7, 3)
    same(jax.vmap(g)(xs), jax.vmap(h)(xs))
    same(jax.jit(jax.vmap(g))(xs), jax.vmap(h)(xs))
    same(jax.jvp(g, (X,), (X,)), jax.jvp(h, (X,), (X,)))
    same(jax.jacfwd(g)(X), jax.hessian(f)(X), 1e-9)
    same(jax.jacrev(g)(X), jax.hessian(f)(X), 1e-9)
    same(jax.linearize(g, X)[1](X), jax.jvp(h, (X,), (X,))[1], 1e-9)
    same(jax.checkpoint(g)(X), h(X))
    same(
        fnn.grad(lambda x: jnp.sum(fnn.grad(lambda x: jnp.sum(fnn.grad(f)(x) ** 2))(x)))(X),
        jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2))(x)))(X),
        1e-9,
    )


@pytest.mark.parametrize("transform", [fnn.grad, fnn.value_and_grad])
def test_a_jitted_gradient_traces_its_function_once(transform):
    chex.clear_trace_counter()
    gradient = jax.jit(transform(chex.assert_max_traces(mlp, n=1)))
    for scale in range(3):
        gradient(jax.tree.map(lambda p, s=scale: s * p, PARAMS), X + scale)


@exhaustive
@pytest.mark.parametrize("check_vma", sweep([True, False], quick=[True]))
def test_shard_map(check_vma):
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    W, xs = normal(3, 3), normal(8, 3)

    def loss(W, xs):
        return jax.lax.pmean(jnp.sum(jnp.tanh(xs @ W) ** 2), "i")

    outside = jax.shard_map(
        loss, mesh=mesh, in_specs=(P(), P("i")), out_specs=P(), check_vma=check_vma
    )
    want = jax.grad(lambda W: jnp.sum(jnp.tanh(xs @ W) ** 2) / 4)(W)
    same(fnn.grad(outside)(W, xs), want)

    inside = jax.shard_map(
        lambda W, xs: jax.lax.pmean(fnn.grad(lambda W: jnp.sum(jnp.tanh(xs @ W) ** 2))(W), "i"),
        mesh=mesh,
        in_specs=(P(), P("i")),
        out_specs=P(),
        check_vma=check_vma,
    )
    # With check_vma the gradient of a replicated weight is already the sum over the devices.
    same(inside(W, xs), want * 4 if check_vma else want)


def test_sharded_arrays():
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    xs = jax.device_put(normal(8, 3), jax.NamedSharding(mesh, P("i")))
    f = lambda W: jnp.sum(jnp.tanh(xs @ W) ** 2)
    W = normal(3, 3)
    same(jax.jit(fnn.grad(f))(W), jax.grad(f)(W))
    constrained = jax.jit(f, in_shardings=jax.NamedSharding(mesh, P("i")))
    W = normal(4, 3)
    xs = jax.device_put(normal(8, 4), jax.NamedSharding(mesh, P("i")))
    same(jax.jit(fnn.grad(constrained))(W), jax.grad(f)(W))


def test_vjp():
    def f(params, x, n):
        return {"y": jnp.tanh(params["W1"] @ x) * n, "n": n + 1}

    value, pullback = fnn.vjp(f, PARAMS, X, 2)
    want, want_pullback = jax.vjp(f, PARAMS, X, jnp.asarray(2))
    np.testing.assert_allclose(value["y"], want["y"])
    ct = {"y": normal(5), "n": np.zeros((), jax.dtypes.float0)}
    same(pullback(ct), want_pullback(ct))
    value, pullback, aux = fnn.vjp(lambda x: (x**2, "aux"), X, has_aux=True)
    assert aux == "aux"
    same(pullback(X)[0], 2 * X * X)


def test_pullback_leaves_a_jitted_function():
    value, pullback = jax.jit(lambda x: fnn.vjp(lambda x: jnp.sin(x) * x, x))(X)
    same(jax.jit(lambda p, ct: p(ct))(pullback, X)[0], (jnp.cos(X) * X + jnp.sin(X)) * X)
    kept = [r.shape for r in jax.tree.leaves(pullback)]
    assert len(kept) <= 3 and all(shape == (3,) for shape in kept)


CLOSING = {
    "product": lambda w, x: jnp.sin(w * x),
    "scan": lambda w, x: jax.lax.scan(lambda c, _: (c * w, c * w), x, None, length=2)[1],
    "cond": lambda w, x: jax.lax.cond(x[0] > 0, lambda x: x * w, lambda x: x * w * w, x),
    "checkpoint": lambda w, x: jax.checkpoint(lambda x: jnp.sin(x * w))(x),
    "operation": lambda w, x: fnn.ops.softmax(x * w) * w,
}


@pytest.mark.parametrize("name", sweep(CLOSING, ["product"]))
@pytest.mark.parametrize("around", sweep(["jit", "vmap"], ["jit"]))
def test_a_pullback_takes_along_what_its_function_closes_over(name, around):
    """It leaves the trace that the arrays which its function closes over belong to."""
    f, transform = CLOSING[name], getattr(jax, around)
    w, x = jnp.stack([X, 2 * X]), jnp.stack([X + 1, X * X])
    if around == "jit":
        w, x = w[0], x[0]
    with jax.checking_leaks():
        y, pullback = transform(lambda w, x: fnn.vjp(lambda x: f(w, x), x))(w, x)
    want = transform(lambda w, x, ct: jax.vjp(lambda x: f(w, x), x)[1](ct))(w, x, y)
    same(transform(lambda pullback, ct: pullback(ct))(pullback, y), want)


def test_vjp_complains_about_cotangents():
    value, pullback = fnn.vjp(jnp.sin, X)
    with pytest.raises(ValueError, match=r"\(4,\).*\(3,\)"):
        pullback(jnp.ones(4))
    with pytest.raises(TypeError, match="float32.*float64"):
        pullback(jnp.ones(3, "float32"))
    with pytest.raises(ValueError, match="[Tt]ree structure"):
        pullback([X, X])


@pytest.mark.parametrize(
    "f, args, words",
    [
        (lambda x: x, (X,), "Gradient only defined for scalar-output functions"),
        (lambda x: (x, x), (1.0,), "Gradient only defined for scalar-output functions"),
        (lambda x: x, (1,), "grad requires real- or complex-valued inputs"),
        (lambda x: x * 1j, (1.0,), "grad requires real-valued outputs"),
        (lambda x: jnp.asarray(3), (1.0,), "grad requires real-valued outputs"),
    ],
)
def test_errors_are_jaxs(f, args, words):
    with pytest.raises(TypeError, match=words):
        jax.grad(f)(*args)
    with pytest.raises(TypeError, match=words):
        fnn.grad(f)(*args)


def outcome(g):
    """What a call gives: its result, or the type of its error."""
    try:
        return jax.tree.map(lambda x: np.asarray(x).tolist(), g())
    except Exception as error:
        assert str(error)
        return type(error)


@pytest.mark.parametrize(
    "argnums",
    [
        *(0, 1, -1, -2, True, np.int64(1), np.array(1), jnp.array(1)),
        *((0,), [0], [0, 1], (1, 0), (True,), (np.int32(0),), np.array([0, 1]), range(2), {1}),
        *((), [], 0.0, (0.0,), "0", None, (0, None), [[0]], 1j, slice(0, 1)),
        *(2, -3, (0, 2), (0, -3), np.int64(5)),
    ],
    ids=repr,
)
def test_odd_argnums_do_what_they_do_in_jax(argnums):
    f = lambda x, y: jnp.sum(x * y)
    args = jnp.arange(3.0), jnp.full(3, 2.0)
    want = outcome(lambda: jax.grad(f, argnums)(*args))
    assert outcome(lambda: fnn.grad(f, argnums)(*args)) == want
    both = outcome(lambda: fnn.value_and_grad(f, argnums)(*args))
    assert both == (want if isinstance(want, type) else (6.0, want))


def test_argnums_that_can_be_gone_through_once():
    f = lambda x, y: jnp.sum(x * y)
    for differentiate in (jax.grad, fnn.grad, lambda *a: lambda *x: fnn.value_and_grad(*a)(*x)[1]):
        found = differentiate(f, (i for i in (1, 0)))(jnp.arange(3.0), jnp.full(3, 2.0))
        same(found, (jnp.arange(3.0), jnp.full(3, 2.0)))


@pytest.mark.parametrize("argnums", [(0, 0), (0, -2), (-1, 1), [1, 1]], ids=repr)
def test_an_argument_named_twice(argnums):
    """JAX fails within the function, on a None."""
    f = lambda x, y: jnp.sum(x * y)
    with pytest.raises(TypeError):
        jax.grad(f, argnums)(X, X)
    with pytest.raises(ValueError, match="the same argument twice"):
        fnn.grad(f, argnums)(X, X)


@pytest.mark.parametrize(
    "fun", [None, 3, "f", [jnp.sin], {}], ids=["None", "3", "str", "list", "dict"]
)
def test_what_is_called_must_be_a_function(fun):
    calls = [fnn.grad, fnn.value_and_grad, fnn.graph, lambda f: fnn.vjp(f, 1.0)]
    for call in calls:
        with pytest.raises(TypeError, match="fun must be a function.*but got"):
            call(fun)


FLOAT0 = np.zeros(3, jax.dtypes.float0)
CALLS = {
    "only keywords": lambda m: m.grad(lambda x: x**2)(x=2.0),
    "a keyword besides": lambda m: m.grad(lambda x, y=1.0: x * y)(2.0, y=3.0),
    "an unknown keyword": lambda m: m.grad(lambda x: x)(2.0, y=3.0),
    "no arguments": lambda m: m.grad(lambda: 2.0)(),
    "int": lambda m: m.grad(lambda x: x * 1.0)(2),
    "int allowed": lambda m: m.grad(lambda x: x * 1.0, allow_int=True)(2),
    "bool": lambda m: m.grad(lambda x: x * 1.0)(True),
    "float0": lambda m: m.grad(lambda x: 1.0)(FLOAT0),
    "float0, integers allowed": lambda m: m.grad(lambda x: 1.0, allow_int=True)(FLOAT0),
    "complex to real": lambda m: m.grad(lambda z: jnp.abs(z) ** 2)(1.0 + 2j),
    "complex to complex": lambda m: m.grad(lambda z: z**2)(1.0 + 2j),
    "holomorphic": lambda m: m.grad(lambda z: z**2, holomorphic=True)(1.0 + 2j),
    "holomorphic of a real": lambda m: m.grad(lambda z: z**2, holomorphic=True)(1.0),
    "holomorphic to a real": lambda m: m.grad(jnp.abs, holomorphic=True)(1.0 + 2j),
    "holomorphic of an int": lambda m: m.grad(jnp.abs, holomorphic=True, allow_int=True)(1),
    "a string": lambda m: m.grad(lambda x: 1.0)("a"),
    "an object": lambda m: m.grad(lambda x: 1.0)(object()),
    "None": lambda m: m.grad(lambda x: 1.0)(None),
    "objects": lambda m: m.grad(lambda x: x.sum())(np.array([1.0, None], object)),
    "big-endian": lambda m: m.grad(lambda x: x.sum())(np.ones(2, ">f8")),
    "a key": lambda m: m.grad(lambda k: jax.random.normal(k))(jax.random.key(0)),
    "returns nothing": lambda m: m.grad(lambda x: None)(1.0),
    "returns a string": lambda m: m.grad(lambda x: "a")(1.0),
    "returns a list": lambda m: m.grad(lambda x: [x])(1.0),
    "returns a bool": lambda m: m.grad(lambda x: True)(1.0),
    "aux: three": lambda m: m.grad(lambda x: (x, 1, 2), has_aux=True)(1.0),
    "aux: one": lambda m: m.grad(lambda x: x, has_aux=True)(1.0),
    "aux: a list": lambda m: m.grad(lambda x: [x, 1.0], has_aux=True)(1.0),
    "aux: an array": lambda m: m.grad(lambda x: jnp.stack([x, x]), has_aux=True)(1.0),
    "aux: not asked for": lambda m: m.grad(lambda x: (x, 1.0))(1.0),
    "vjp: no arguments": lambda m: m.vjp(lambda: 2.0)[1](1.0),
    "vjp: two cotangents": lambda m: m.vjp(lambda x: (x, x), 1.0)[1](1.0, 1.0),
    "vjp: another structure": lambda m: m.vjp(lambda x: (x, x), 1.0)[1]([1.0, 1.0]),
    "vjp: another shape": lambda m: m.vjp(jnp.sin, jnp.ones(3))[1](jnp.ones(2)),
    "vjp: aux of three": lambda m: m.vjp(lambda x: (x, x, x), 1.0, has_aux=True),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_odd_calls_do_what_they_do_in_jax(call):
    assert outcome(lambda: call(fnn)) == outcome(lambda: call(jax))


def test_auxiliary_data_that_is_not_traced_is_handed_on_as_it_is():
    array, number = np.arange(3), 1.0
    f = lambda x: (x**2, {"array": array, "number": number, "x": x})
    _, aux = fnn.grad(f, has_aux=True)(3.0)
    assert aux["array"] is array and aux["number"] is number and float(aux["x"]) == 3.0


def test_random_numbers_and_nothing_to_differentiate():
    def f(x, key):
        return jnp.sum(jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x / 0.5, 0.0) ** 2)

    key = jax.random.key(0)
    same(fnn.grad(f)(X, key), jax.grad(f)(X, key))
    same(fnn.grad(lambda x: 3.0)(X), jnp.zeros(3))
    same(fnn.grad(lambda x: x["a"].sum())({"a": X, "b": X}), {"a": jnp.ones(3), "b": jnp.zeros(3)})
    assert fnn.grad(lambda p: 1.0)({}) == {}
    same(fnn.grad(lambda x: jnp.sum(x**2))(jnp.zeros((0, 3))), jnp.zeros((0, 3)))


def test_side_effects_happen_once(capfd):
    def f(x):
        jax.debug.print("seen {}", x)
        return x**2

    fnn.grad(f)(3.0)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("seen") == 1


def test_export():
    f = jax.jit(fnn.grad(lambda x: mlp(PARAMS, x)))
    exported = jax.export.export(f, platforms=["cpu", "cuda", "tpu"])(X)
    same(exported.call(X), jax.grad(mlp, 1)(PARAMS, X))


def test_explicit_sharding():
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.sharding.use_mesh(mesh) if hasattr(jax.sharding, "use_mesh") else jax.set_mesh(mesh):
        xs = jax.device_put(normal(8, 6), P("d", None))
        W1 = jax.device_put(normal(6, 4), P(None, "m"))
        b = jax.device_put(normal(4), P("m"))
        W2 = jax.device_put(normal(4, 2), P("m", None))

        def f(W1, b, W2):
            h = jnp.tanh(xs @ W1 + b)
            y = jnp.einsum("bh,ho->bo", h, W2, out_sharding=P("d", None))
            return jnp.mean(jax.nn.logsumexp(y, axis=-1) * y.reshape(8, 2)[:, 0])

        got, want = (jax.jit(g(f, (0, 1, 2)))(W1, b, W2) for g in (fnn.grad, jax.grad))
        for a, b in zip(got, want, strict=True):
            assert jax.typeof(a).sharding == jax.typeof(b).sharding
            np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("function", [fnn.grad, fnn.value_and_grad])
def test_errors_name_the_function_that_was_called(function):
    with pytest.raises(TypeError, match=rf"^{function.__name__}: fun must be"):
        function("x")
    with pytest.raises(TypeError, match=rf"^{function.__name__}: argnums must be"):
        function(jnp.sin, "a")
    with pytest.raises(ValueError, match=rf"^{function.__name__}: argnums is empty"):
        function(jnp.sin, ())
