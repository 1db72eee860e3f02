"""An operation with a hand-written backward does under every transform what plain JAX does."""

import copy
import functools
import itertools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive, sweep

import fnn

# ------------------------------------------------------------------ operations to try it on


@fnn.rule
def sigmoid(x):
    return jax.nn.sigmoid(x)


@sigmoid.forward
def _(x):
    y = jax.nn.sigmoid(x)
    return y, y


@sigmoid.backward
def _(y, g):
    return (g * y * (1 - y),)


@fnn.rule
def affine(W, x, b):
    return W @ x + b


@affine.backward
def _(residuals, g):
    W, x, _ = residuals
    return jnp.einsum("i,j->ij", g, x), W.T @ g, g


@fnn.rule
def power(x, *, exponent=2):
    return x**exponent


@power.backward
def _(residuals, g, *, exponent):
    (x,) = residuals
    return (g * exponent * x ** (exponent - 1),)


@fnn.rule
def standardize(params, x, *, epsilon=1e-3):
    """Pytrees in and out, an integer and a None among the results."""
    scale = lax.rsqrt(jnp.mean(x * x) + epsilon)
    return {"y": params["gain"] * x * scale + params["bias"], "best": jnp.argmax(x), "none": None}


@standardize.forward
def _(params, x, *, epsilon):
    scale = lax.rsqrt(jnp.mean(x * x) + epsilon)
    y = params["gain"] * x * scale + params["bias"]
    return {"y": y, "best": jnp.argmax(x), "none": None}, (params["gain"], x, scale)


@standardize.backward
def _(residuals, d, *, epsilon):
    gain, x, scale = residuals
    dy = d["y"]
    dn = dy * gain
    dx = scale * dn - x * scale**3 * jnp.mean(x * dn)
    return {"gain": jnp.sum(dy * x * scale), "bias": dy}, dx


@fnn.rule
def noisy(x, key, count, *, scale=1.0):
    """An array, a PRNG key and an integer."""
    return x * jax.random.normal(key, x.shape, x.dtype) * scale + count, count + 1


@noisy.backward
def _(residuals, g, *, scale):
    x, key, _ = residuals
    return g[0] * jax.random.normal(key, x.shape, x.dtype) * scale, None, None


def power_by_loop(x, steps):
    """x**steps by a while loop, which JAX can push tangents through but not transpose."""
    return lax.while_loop(
        lambda c: c[0] < steps, lambda c: (c[0] + 1, c[1] * x), (0, jnp.ones_like(x))
    )[1]


@fnn.rule
def looped(x):
    return x**4


@looped.backward
def _(residuals, g):
    (x,) = residuals
    return (lax.fori_loop(0, 3 + 0 * jnp.int32(x.sum() > 0), lambda i, c: c * x, 4 * g),)


@looped.tangent
def _(residuals, dx):
    (x,) = residuals
    return 4 * power_by_loop(x, 3) * dx


# ---------------------------------------------------------------------------------- comparing


def normal(seed, *shape, dtype="float64"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def close(ours, plain, rtol=1e-9, atol=1e-9):
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, plain)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        if x.dtype == jax.dtypes.float0:
            continue
        if jnp.issubdtype(x.dtype, jnp.inexact):
            wide = "complex128" if jnp.iscomplexobj(x) else "float64"
            x, y = np.asarray(x).astype(wide), np.asarray(y).astype(wide)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def same(transformed, operation, *args, jit=jax.jit, **tolerances):
    """`transformed(f)(*args)` is the same with the operation and with its plain definition."""
    ours, plain = jit(transformed(operation)), jit(transformed(operation.definition))
    close(ours(*args), plain(*args), **tolerances)


def op_by_op(f):
    """In the place of `jax.jit`."""
    return f


def hvp(f):
    return lambda x: jax.jvp(jax.grad(f), (x,), (jnp.sin(x + 1),))[1]


def transposed(f):
    return lambda x: jax.linear_transpose(jax.linearize(f, x)[1], x)(jnp.ones_like(f(x)))


def pushed(f):
    return lambda x: jax.jvp(f, (x,), (jnp.cos(x),))


ORDERS = {
    "fwd-fwd": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "fwd-rev": lambda f: jax.jacfwd(jax.jacrev(f)),
    "rev-fwd": lambda f: jax.jacrev(jax.jacfwd(f)),
    "rev-rev": lambda f: jax.jacrev(jax.jacrev(f)),
}
TRANSFORMS = {
    "call": lambda f: f,
    "jit": jax.jit,
    "grad": jax.grad,
    "value_and_grad": jax.value_and_grad,
    "jvp": pushed,
    "jacfwd": jax.jacfwd,
    "jacrev": jax.jacrev,
    **ORDERS,
    "linearize": lambda f: lambda x: jax.linearize(f, x)[1](jnp.cos(x)),
    "linear_transpose": transposed,
    "hvp": hvp,
    "third, forward over reverse over reverse": lambda f: jax.jacfwd(jax.jacrev(jax.grad(f))),
    "third, reverse over forward over reverse": lambda f: jax.jacrev(jax.jacfwd(jax.grad(f))),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    "checkpoint dots": lambda f: jax.hessian(
        jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable)
    ),
    "checkpoint nothing": lambda f: jax.grad(
        jax.checkpoint(f, policy=jax.checkpoint_policies.nothing_saveable)
    ),
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])),
    "vmap of grad": lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, 2 * x])),
    "grad of vmap": lambda f: jax.grad(lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])).sum()),
    "vmap of hessian": lambda f: lambda x: jax.vmap(jax.hessian(f))(jnp.stack([x, 2 * x])),
    "vmap of vmap of grad": lambda f: (
        lambda x: jax.vmap(jax.vmap(jax.grad(f)))(jnp.stack([x, 2 * x, 3 * x, x])[None])
    ),
    "hessian of vmap": lambda f: jax.hessian(lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])).sum()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    W, b = normal(1, 3, 4), normal(2, 3)

    def network(sigmoid, affine, power):
        return lambda x: power(affine(W, sigmoid(x), b), exponent=3).sum()

    ours = network(sigmoid, affine, power)
    plain = network(sigmoid.definition, affine.definition, power.definition)
    transform, x = TRANSFORMS[name], normal(0, 4)
    close(jax.jit(transform(ours))(x), jax.jit(transform(plain))(x), rtol=1e-8)


@pytest.mark.parametrize("name", ["call", "grad", "jvp", "fwd-rev", "vmap of grad"])
def test_transforms_op_by_op(name):
    """Without jit around."""
    transform = TRANSFORMS[name]
    same(lambda s: transform(lambda x: s(x).sum()), sigmoid, normal(0, 3), jit=op_by_op)


# ------------------------------------------------------------------------------- differentiation


@pytest.mark.parametrize("order", ORDERS)
def test_second_derivatives_by_all_arguments(order):
    args = normal(0, 2, 3), normal(1, 3), normal(2, 2)

    def of(affine):
        def loss(args):
            return jnp.sum(jnp.tanh(affine(*args)) ** 2)

        return lambda *args: jax.jit(ORDERS[order](loss))(args)

    same(of, affine, *args)


def test_only_the_moving_argument():
    W, x, b = normal(0, 2, 3), normal(1, 3), normal(2, 2)
    for i in range(3):
        same(lambda f, i=i: jax.jacfwd(f, i), affine, W, x, b)
        same(lambda f, i=i: jax.jacrev(f, i), affine, W, x, b)


def test_transposes_an_operation_that_is_linear():
    W, x, b = normal(0, 2, 3), normal(1, 3), normal(2, 2)
    dot = fnn.rule(lambda W, x: W @ x)
    dot.backward(lambda residuals, g: (jnp.outer(g, residuals[1]), residuals[0].T @ g))

    def transpose(dot):
        return lambda W, b: jax.linear_transpose(lambda x: dot(W, x), x)(b)

    same(transpose, dot, W, b)
    same(lambda dot: jax.vmap(transpose(dot), (None, 0)), dot, W, jnp.stack([b, 2 * b]))
    with pytest.raises(NotImplementedError, match="[Tt]ranspose"):
        jax.linear_transpose(sigmoid, x)(x)


def test_operations_within_operations():
    @fnn.rule
    def two(W, x):
        return sigmoid(affine(W, x, x[:2]))

    @two.backward
    def _(residuals, g):
        return jax.vjp(lambda W, x: sigmoid(affine(W, x, x[:2])), *residuals)[1](g)

    def plain(W, x):
        return jax.nn.sigmoid(W @ x + x[:2])

    def transform(f):
        return jax.jit(jax.hessian(lambda W, x: (f(W, x) ** 2).sum(), (0, 1)))

    W, x = normal(0, 2, 3), normal(1, 3)
    close(transform(two)(W, x), transform(plain)(W, x))


@exhaustive
def test_a_handwritten_tangent():
    def loss(f):
        return lambda x: (f(x) ** 2).sum()

    x = normal(0, 3)
    for transform in (jax.grad, jax.jacfwd, pushed, hvp, ORDERS["fwd-fwd"], ORDERS["fwd-rev"]):
        same(lambda f, t=transform: t(loss(f)), looped, x)
    same(lambda f: jax.vmap(jax.grad(loss(f))), looped, jnp.stack([x, 2 * x]))
    # One x shared by a batch, whose gradients are summed.
    y = normal(1, 5)
    same(lambda f: jax.grad(lambda x: jax.vmap(lambda y: loss(f)(x * 1) * y)(y).sum()), looped, x)
    same(
        lambda f: jax.grad(lambda x: jax.vmap(lambda y: loss(lambda z: f(z) * y)(x))(y).sum()),
        looped,
        x,
    )


def test_tangent_of_some_results_and_arguments():
    @fnn.rule
    def scaled(x, n):
        return x * n, n, jnp.zeros_like(x)

    @scaled.backward
    def _(residuals, g):
        return residuals[1] * g[0], None

    @scaled.tangent
    def _(residuals, dx, dn):
        assert dn is None
        return residuals[1] * dx, None, None

    x = normal(0, 3)
    same(lambda f: pushed(lambda x: f(x, 2)[0] + f(x, 2)[2]), scaled, x)
    same(lambda f: jax.grad(lambda x: (f(x, 2)[0] + f(x, 2)[2]).sum()), scaled, x)


# ------------------------------------------------------------------------------------------- vmap


def squares(f, axes, out_axes=0):
    return lambda *args: jnp.sum(jax.vmap(f, axes, out_axes)(*args) ** 2)


@pytest.mark.parametrize(
    "axes",
    sweep([(None, 0, None), (0, None, 0), (0, 0, 0), (2, 1, 1), (None, 1, 0)], [(0, None, 0)]),
)
def test_shared_and_mapped_arguments(axes):
    """A batch of 5; the mapped axis at any place."""
    shapes = [(2, 3), (3,), (2,)]
    args = []
    for i, (shape, axis) in enumerate(zip(shapes, axes, strict=True)):
        shape = list(shape)
        if axis is not None:
            shape.insert(axis, 5)
        args.append(normal(i, *shape))
    same(lambda f: jax.grad(squares(f, axes, 1), (0, 1, 2)), affine, *args)
    same(lambda f: jax.hessian(squares(f, axes), (0, 1, 2)), affine, *args)
    same(lambda f: jax.jacfwd(squares(f, axes), (0, 1, 2)), affine, *args)

    def per_example(f):
        return jax.vmap(jax.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1, 2)), axes, (0, 1, 1))

    same(per_example, affine, *args)


def test_vmap_of_vmap():
    W, X, b = normal(0, 4, 2, 3), normal(1, 5, 4, 3), normal(2, 2)

    def transform(f):
        inner = jax.vmap(f, (0, 0, None))  # over 4
        return jax.jit(jax.grad(squares(inner, (None, 0, None)), (0, 1, 2)))  # over 5

    same(transform, affine, W, X, b)
    same(
        lambda f: jax.vmap(jax.vmap(jax.jacrev(f, 0), (0, 0, None)), (None, 0, None)),
        affine,
        W,
        X,
        b,
    )

    def grads_within(f):
        inner = jax.vmap(f, (0, 0, None))
        return jax.jit(
            jax.vmap(jax.grad(lambda W, x, b: (inner(W, x, b) ** 2).sum(), (0, 2)), (None, 0, None))
        )

    same(grads_within, affine, W, X, b)


def test_residuals_that_no_mapped_argument_reaches():
    @fnn.rule
    def project(W, x):
        return W @ x

    @project.forward
    def _(W, x):
        return W @ x, W

    @project.backward
    def _(W, g):
        return None, W.T @ g

    W, X = normal(0, 2, 3), normal(1, 5, 3)
    same(lambda f: jax.grad(lambda X: squares(f, (None, 0))(W, X)), project, X)
    same(lambda f: jax.vmap(jax.jacfwd(lambda x: f(W, x))), project, X)


def test_named_axes():
    @fnn.rule
    def centered(x):
        return x - lax.pmean(x, "batch")

    @centered.backward
    def _(residuals, g):
        return (g - lax.pmean(g, "batch"),)

    def loss(f):
        return lambda x: (jax.vmap(lambda x: f(x**2) ** 3, axis_name="batch")(x)).sum()

    X = normal(0, 5)
    same(lambda f: jax.grad(loss(f)), centered, X)
    same(lambda f: jax.hessian(loss(f)), centered, X)


def test_none_among_the_residuals():
    """It has no array, so vmap finds none there."""

    @fnn.rule
    def shifted(x, w=None):
        return jnp.sin(x) if w is None else jnp.sin(x) + w

    @shifted.forward
    def _(x, w):
        return shifted(x, w), (None, jnp.cos(x), None if w is None else w[:0])

    @shifted.backward
    def _(residuals, g):
        _, cos, w = residuals
        return g * cos, None if w is None else g

    X = normal(0, 5, 3)
    for args in ((), (normal(1, 3),)):

        def transform(f, args=args):
            return jax.hessian(lambda X: jnp.sum(jax.vmap(lambda x: f(x * x, *args))(X) ** 2))

        same(transform, shifted, X)


def test_spmd_axis_name():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    W, X, b = normal(0, 2, 3), normal(1, 8, 3), normal(2, 2)
    X = jax.device_put(X, NamedSharding(mesh, P("data")))

    def transform(f):
        def loss(W, X, b):
            return jnp.sum(jax.vmap(f, (None, 0, None), spmd_axis_name="data")(W, X, b) ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))

    with jax.set_mesh(mesh):
        close(transform(affine)(W, X, b), transform(affine.definition)(W, X, b))


def widest(jaxpr):
    """The most numbers that any value of a jaxpr holds."""
    sizes = [0]
    for eqn in jaxpr.eqns:
        sizes += [int(np.prod(v.aval.shape)) for v in eqn.outvars]
        sizes += [widest(inner) for inner in jaxprs_in_params(eqn.params)]
    return max(sizes)


def test_a_shared_weight_is_never_copied_for_each_example():
    W, X, b = normal(0, 20, 30), normal(1, 50, 30), normal(2, 20)
    gradient = jax.grad(squares(affine, (None, 0, None)), (0, 1, 2))
    linear_map = lambda W, X, b: jax.linearize(squares(affine, (None, 0, None)), W, X, b)[0]
    for f in (gradient, linear_map, jax.jacfwd(squares(affine, (None, 0, None)), 2)):
        compiled = jax.jit(f).lower(W, X, b).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * X.nbytes + 4 * W.nbytes
    # ... also before XLA has a chance to mend it
    assert widest(jax.make_jaxpr(gradient)(W, X, b).jaxpr) < 50 * 20 * 30


# ------------------------------------------------------------------------------- control flow


def scanned(f):
    return lambda x: lax.scan(lambda c, _: (f(c) * x, f(c)), x, None, length=4)[1].sum()


def branched(f):
    return lambda x: lax.cond(x.sum() > 0, lambda x: f(x).sum(), lambda x: (f(f(x)) * x).sum(), x)


def looping(f):
    return lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1]) * x), (0, x))[
        1
    ].sum()


@pytest.mark.parametrize("control", [scanned, branched])
@pytest.mark.parametrize(
    "name",
    sweep(["call", "grad", "jvp", "fwd-rev", "rev-rev", "vmap of grad"], ["grad", "fwd-rev"]),
)
def test_scan_and_cond(control, name):
    same(lambda f: TRANSFORMS[name](control(f)), sigmoid, normal(0, 3))


@pytest.mark.parametrize("name", ["call", "jvp", "fwd-fwd", "vmap"])
def test_while(name):
    same(lambda f: TRANSFORMS[name](looping(f)), sigmoid, normal(0, 3))


def test_scan_over_layers_with_shared_weights():
    Ws, X, b = normal(0, 3, 4, 4), normal(1, 5, 4), normal(2, 4)

    def transform(f):
        def loss(Ws, b):
            body = jax.checkpoint(
                lambda h, W: (jnp.tanh(jax.vmap(f, (None, 0, None))(W, h, b)), None)
            )
            return lax.scan(body, X, Ws)[0].sum()

        return jax.jit(jax.grad(loss, (0, 1)))

    same(transform, affine, Ws, b)


# -------------------------------------------------------------------------------- many devices


@pytest.fixture
def mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("check_vma", [True, False])
def test_grad_of_shard_map(mesh, check_vma):
    W, X, b = normal(0, 2, 3), normal(1, 8, 3), normal(2, 2)

    def of(f):
        def local(W, X, b):
            return lax.psum(squares(f, (None, 0, None))(W, X, b), "data")

        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P(), check_vma=check_vma
        )
        return jax.jit(jax.grad(sharded, (0, 1, 2)))

    same(of, affine, W, X, b)
    plain = jax.grad(squares(affine.definition, (None, 0, None)), (0, 1, 2))
    close(of(affine)(W, X, b), plain(W, X, b))


def test_replicated_weights_get_the_sum_over_devices(mesh):
    W, X, b = normal(0, 2, 3), normal(1, 8, 3), normal(2, 2)

    def of(f, transform=jax.grad):
        return jax.jit(
            jax.shard_map(
                transform(squares(f, (None, 0, None)), (0, 2)),
                mesh=mesh,
                in_specs=(P(), P("data"), P()),
                out_specs=P(),
            )
        )

    plain = jax.grad(squares(affine.definition, (None, 0, None)), (0, 2))
    close(of(affine)(W, X, b), plain(W, X, b))


@pytest.mark.parametrize("order", ["fwd-rev", "rev-rev"])
def test_second_order_under_shard_map(mesh, order):
    W, X, b = normal(0, 2, 3), normal(1, 8, 3), normal(2, 2)

    def of(f):
        def local(W, X, b):
            return lax.psum(jnp.sum(jnp.tanh(jax.vmap(f, (None, 0, None))(W, X, b))), "data")

        sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P())
        return jax.jit(ORDERS[order](lambda W: sharded(W, X, b)))

    same(of, affine, W)


def test_vmap_of_vmap_under_shard_map(mesh):
    W, X, b = normal(0, 4, 2, 3), normal(1, 8, 4, 3), normal(2, 2)

    def of(f):
        inner = jax.vmap(f, (0, 0, None))
        return jax.jit(
            jax.shard_map(
                jax.grad(squares(inner, (None, 0, None)), (0, 2)),
                mesh=mesh,
                in_specs=(P(), P("data"), P()),
                out_specs=P(),
            )
        )

    same(of, affine, W, X, b)


@exhaustive
@pytest.mark.parametrize("kind", sweep([AxisType.Auto, AxisType.Explicit], [AxisType.Explicit]))
def test_jit_over_a_mesh(kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    W, X, b = normal(0, 2, 3), normal(1, 8, 3), normal(2, 2)

    def of(f):
        return jax.jit(jax.value_and_grad(squares(f, (None, 0, None)), (0, 1, 2)))

    plain = of(affine.definition)(W, X, b)
    with jax.set_mesh(mesh):
        args = [jax.device_put(a, P(*s)) for a, s in ((W, ()), (X, ("data",)), (b, ()))]
        sharded = of(affine)(*args)
        close(sharded, plain)
        assert sharded[1][1].sharding.spec[0] == "data"
        per_example = jax.jit(jax.vmap(jax.grad(lambda x: (affine(W, x, b) ** 2).sum())))
        assert per_example(args[1]).sharding.spec[0] == "data"
        close(jax.jit(sigmoid)(args[1]), jax.nn.sigmoid(X))
        close(
            jax.jit(jax.hessian(lambda x: (sigmoid(x) ** 2).sum()))(b),
            jax.hessian(lambda x: (jax.nn.sigmoid(x) ** 2).sum())(b),
        )


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_export(platform):
    W, X, b = normal(0, 2, 3), normal(1, 8, 3), normal(2, 2)

    def of(f):
        return jax.jit(
            jax.grad(lambda W, X, b: squares(lambda *a: sigmoid(f(*a)), (None, 0, None))(W, X, b))
        )

    exported = jax.export.export(of(affine), platforms=[platform])(W, X, b)
    assert exported.platforms == (platform,)
    if platform == "cpu":
        close(exported.call(W, X, b), of(affine.definition)(W, X, b))


# ----------------------------------------------------------------- dtypes, shapes, structures


@pytest.mark.parametrize(
    "dtype",
    sweep(
        ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"],
        quick=["bfloat16", "complex64"],
    ),
)
def test_dtypes(dtype):
    tolerance = 2 * float(jnp.finfo(dtype).eps)
    args = [normal(i, *s).astype(dtype) for i, s in enumerate([(2, 3), (3,), (2,)])]
    if jnp.issubdtype(dtype, jnp.complexfloating):
        args = [a + 1j * normal(9, *a.shape).astype(dtype) for a in args]

    def loss(f):
        return lambda *args: jnp.sum(jnp.abs(f(*args)) ** 2)

    kw = {"rtol": 10 * tolerance, "atol": 20 * tolerance}
    same(lambda f: jax.value_and_grad(loss(f), (0, 1, 2)), affine, *args, **kw)
    same(lambda f: pushed(lambda x: f(args[0], x, args[2])), affine, args[1], **kw)
    same(lambda f: jax.grad(lambda x: loss(f)(x)), sigmoid, args[1], **kw)
    batch = jnp.stack([args[1], 2 * args[1]])
    same(
        lambda f: jax.jit(
            jax.grad(
                lambda W, X: jnp.sum(jnp.abs(jax.vmap(f, (None, 0, None))(W, X, args[2]))), (0, 1)
            )
        ),
        affine,
        args[0],
        batch,
        **kw,
    )


def test_holomorphic():
    z = normal(0, 3) + 1j * normal(1, 3)
    same(lambda f: jax.grad(lambda z: f(z, exponent=3).sum(), holomorphic=True), power, z)
    same(lambda f: jax.jacfwd(lambda z: f(z, exponent=3), holomorphic=True), power, z)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_zero_size(shape):
    x = jnp.zeros(shape)
    same(lambda f: jax.grad(lambda x: f(x).sum()), sigmoid, x)
    same(lambda f: jax.jacfwd(f), sigmoid, x)
    same(lambda f: jax.vmap(jax.grad(lambda x: f(x).sum())), sigmoid, x)
    same(
        lambda f: jax.grad(squares(f, (None, 0, None)), (0, 1, 2)),
        affine,
        normal(0, 2, 3),
        jnp.zeros((0, 3)),
        normal(1, 2),
    )


@exhaustive
def test_pytrees():
    params, x = {"gain": normal(0), "bias": normal(1, 4)}, normal(2, 4)

    def loss(f):
        return lambda params, x: (f(params, x, epsilon=1e-2)["y"] ** 3).sum()

    same(lambda f: f, standardize, params, x)
    same(lambda f: jax.grad(loss(f), (0, 1)), standardize, params, x)
    for order in ORDERS.values():
        same(lambda f, o=order: o(lambda p: loss(f)(*p)), standardize, (params, x))
    same(lambda f: lambda p, x: jax.jvp(f, (p, x), (p, x)), standardize, params, x)
    same(
        lambda f: jax.jit(jax.vmap(f, ({"gain": None, "bias": 1}, 0))),
        standardize,
        {"gain": normal(0), "bias": normal(1, 4, 5)},
        normal(2, 5, 4),
    )
    same(
        lambda f: jax.jit(jax.grad(lambda p, X: jax.vmap(loss(f), (None, 0))(p, X).sum())),
        standardize,
        params,
        normal(2, 5, 4),
    )


@exhaustive
def test_integers_and_keys_get_no_gradient():
    x, key = normal(0, 3), jax.random.key(0)

    def loss(f):
        return lambda x, key, n: (f(x, key, n, scale=2.0)[0] ** 2).sum()

    same(lambda f: jax.grad(loss(f)), noisy, x, key, 3)
    same(lambda f: jax.hessian(loss(f)), noisy, x, key, 3)
    same(lambda f: jax.grad(loss(f), (0, 2), allow_int=True), noisy, x, key, jnp.int32(3))
    same(
        lambda f: (
            lambda x: jax.vjp(lambda x, n: f(x, key, n), x, 3)[1](
                (x, np.zeros((), jax.dtypes.float0))
            )
        ),
        noisy,
        x,
    )
    keys = jax.random.split(key, 5)
    same(lambda f: jax.vmap(jax.grad(loss(f)), (None, 0, 0)), noisy, x, keys, jnp.arange(5))
    same(
        lambda f: jax.grad(lambda x: jax.vmap(loss(f), (None, 0, None))(x, keys, 3).sum()), noisy, x
    )
    same(lambda f: pushed(lambda x: f(x, jax.random.PRNGKey(0), jnp.int32(1))), noisy, x)


def test_a_number_arrives_as_an_array():
    @fnn.rule
    def scaled(x, n):
        return x * n.astype(x.dtype)

    @scaled.forward
    def _(x, n):
        return x * n.astype(x.dtype), n.astype(x.dtype)[None]

    @scaled.backward
    def _(n, g):
        return g * n[0], None

    x = jnp.arange(3.0, dtype="bfloat16")
    for n in (2, 2.0, True, np.float32(2)):
        plain = lambda x, n=n: (x * jnp.asarray(n).astype(x.dtype)).sum()
        ours = lambda x, n=n: scaled(x, n).sum()
        for grad in (jax.grad, fnn.grad):
            np.testing.assert_array_equal(grad(ours)(x), jax.grad(plain)(x))
            np.testing.assert_array_equal(jax.jit(grad(ours))(x), jax.grad(plain)(x))
        for got, want in zip(*(jax.jvp(f, (x,), (x,)) for f in (ours, plain)), strict=True):
            assert (got, got.dtype) == (want, want.dtype)
    # As in plain JAX, a number doesn't widen what it meets.
    product = fnn.rule(lambda x, n: x * n)
    product.forward(lambda x, n: (x * n, n))
    product.backward(lambda n, g: (g * n, None))
    assert jax.vjp(lambda x: product(x, 2), x)[0].dtype == x.dtype


def test_a_result_of_integers_only():
    @fnn.rule
    def best(x):
        return jnp.argmax(x)

    best.backward(lambda residuals, g: (None,))
    x = normal(0, 4)
    same(lambda f: jax.grad(lambda x: x[f(x)] ** 2), best, x)
    same(lambda f: pushed(f), best, x)
    same(lambda f: jax.vmap(f), best, normal(1, 3, 4))


def test_arguments_by_keyword_defaults_and_star():
    W, x, b = normal(0, 2, 3), normal(1, 3), normal(2, 2)
    close(affine(b=b, x=x, W=W), affine(W, x, b))
    close(jax.grad(lambda x: affine(W, b=b, x=x).sum())(x), W.sum(0))

    @fnn.rule
    def total(first, *rest, factor=1.0):
        return factor * sum(rest, first)

    @total.backward
    def _(residuals, g, *, factor):
        return (factor * g,) * len(residuals)

    assert total.argument_names(3) == ("first", "rest[0]", "rest[1]")
    same(lambda f: jax.grad(lambda *xs: f(*xs, factor=3.0).sum(), (0, 1, 2)), total, x, x, x)

    @fnn.rule
    def shifted(x, by=2.0):
        return x + by

    shifted.backward(lambda residuals, g: (g, g.sum()))
    close(shifted(x), x + 2.0)
    close(jax.grad(lambda x: shifted(x).sum())(x), jnp.ones(3))


def test_static_arguments_that_compare_equal_are_kept_apart():
    assert power(3, exponent=2).dtype == jnp.int64
    assert power(3, exponent=2.0).dtype == jnp.float64
    x = normal(0, 3)
    same(lambda f: jax.grad(lambda x: f(x, exponent=3).sum() + f(x, exponent=2).sum()), power, x)

    @fnn.rule
    def scaled(x, *, by):  # in a tuple, or a set
        return x * next(iter(by))

    scaled.backward(lambda residuals, g, *, by: (g * next(iter(by)),))
    for make in (lambda b: (b,), lambda b: frozenset({b})):
        for number, dtype in ((2, "int64"), (2.0, "float64"), (2 + 0j, "complex128")):
            by = make(number)
            assert jax.jit(lambda x, by=by: scaled(x, by=by))(jnp.arange(3)).dtype == dtype


@pytest.mark.parametrize("nested", [False, True])
def test_a_static_zero_keeps_its_sign(nested):
    @fnn.rule
    def over(x, *, by):
        return x / jnp.float64(by[0] if nested else by)

    over.backward(lambda residuals, g, *, by: (over(g, by=by),))
    for zero in (0.0, -0.0):
        by = (zero,) if nested else zero
        expected = np.copysign(np.inf, zero)
        f = lambda x, by=by: over(x, by=by)
        for run in (f, jax.jit(f), fnn.grad(f), jax.grad(f), jax.jit(jax.grad(f))):
            assert run(1.0) == expected


@pytest.mark.parametrize(
    "x", [2.0, np.float32(2), np.float64(2), np.ones(3), np.ones((2, 2), "float32")]
)
def test_python_and_numpy_numbers(x):
    """The same values, dtypes and weak types as JAX's own function."""

    def types(tree):
        return jax.tree.map(lambda a: (a.dtype, jnp.asarray(a).aval.weak_type), tree)

    close(jax.grad(lambda x: sigmoid(x).sum())(x), jax.grad(lambda x: jax.nn.sigmoid(x).sum())(x))
    for transform in (op_by_op, jax.jit):
        a, b = transform(sigmoid)(x), transform(jax.nn.sigmoid)(x)
        close(a, b)
        assert types(a) == types(b)
    assert sigmoid(jnp.bfloat16(1) * 1.0).dtype == jnp.bfloat16


def test_without_64_bit():
    with jax.enable_x64(False):
        x = np.ones(3)
        assert sigmoid(x).dtype == jnp.float32
        assert jax.grad(lambda x: sigmoid(x).sum())(x).dtype == jnp.float32
    assert sigmoid(np.ones(3)).dtype == jnp.float64


@exhaustive
def test_without_jit_and_with_leak_and_nan_checks():
    x = normal(0, 3)
    with jax.disable_jit():
        same(lambda f: jax.hessian(lambda x: f(x).sum()), sigmoid, x)
    with jax.checking_leaks(), jax.debug_nans(True):
        same(lambda f: jax.vmap(jax.hessian(f)), sigmoid, x)


# --------------------------------------------------------------------------------------- cost


def mlp(product, activation):
    def loss(params, X):
        def one(x):
            for W in params[:-1]:
                x = activation(product(W, x))
            return jnp.sum(product(params[-1], x) ** 2)

        return jax.vmap(one)(X).mean()

    return loss


@fnn.rule
def product(W, x):
    return W @ x


@product.backward
def _(residuals, g):
    W, x = residuals
    return jnp.einsum("i,j->ij", g, x), W.T @ g


def flops_and_bytes(f, *args):
    compiled = jax.jit(f).lower(*args).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def no_more(ours, plain):
    """FLOPs and temporary bytes; XLA's count of the former wavers by a few per mille."""
    assert ours[0] <= 1.005 * plain[0] and ours[1] <= 1.02 * plain[1] + 256, (ours, plain)


def test_mlp_costs_what_plain_jax_does():
    sizes = [784, 512, 512, 10]
    params = [jnp.ones((n, m), "float32") for m, n in itertools.pairwise(sizes)]
    X = jnp.ones((256, 784), "float32")
    ours = mlp(product, sigmoid)
    plain = mlp(lambda W, x: W @ x, jax.nn.sigmoid)
    reference = flops_and_bytes(jax.grad(plain), params, X)
    no_more(flops_and_bytes(jax.grad(ours), params, X), reference)

    def of_batches(loss):
        batches = lambda params, XX: jax.vmap(loss, (None, 0))(params, XX).mean()
        return flops_and_bytes(jax.grad(batches), params, X.reshape(4, 64, 784))

    no_more(of_batches(ours), of_batches(plain))


def test_convolution_costs_what_plain_jax_does():
    @fnn.rule
    def conv(kernel, x):
        return lax.conv(x[None], kernel, (1, 1), "SAME")[0]

    @conv.backward
    def _(residuals, g):
        return jax.vjp(conv.definition, *residuals)[1](g)

    def loss(conv):
        return lambda kernel, X: jnp.sum(jax.vmap(conv, (None, 0))(kernel, X) ** 2)

    kernel, X = normal(0, 8, 4, 3, 3, dtype="float32"), normal(1, 16, 4, 12, 12, dtype="float32")
    ours, plain = (jax.grad(loss(f), (0, 1)) for f in (conv, conv.definition))
    close(jax.jit(ours)(kernel, X), jax.jit(plain)(kernel, X), rtol=1e-4, atol=1e-3)
    no_more(flops_and_bytes(ours, kernel, X), flops_and_bytes(plain, kernel, X))


def test_what_nobody_asks_for_costs_nothing():
    W, x, b = normal(0, 200, 300), normal(1, 300), normal(2, 200)
    for i in range(3):
        ours, plain = (
            flops_and_bytes(jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), i), W, x, b)
            for f in (affine, affine.definition)
        )
        no_more(ours, plain)

    @fnn.rule
    def kept(x):
        return jnp.floor(x)

    kept.backward(lambda residuals, g: (None,))
    # A gradient of None: what lies upstream isn't differentiated at all.
    f = jax.jit(jax.grad(lambda W: jnp.sum(kept(jnp.sin(W @ x)))))
    compiled = f.lower(W).compile()
    assert compiled.cost_analysis().get("flops", 0) < 10 and "dot" not in compiled.as_text()


# --------------------------------------------------------------------------- what an operation is


def test_a_jaxpr_shows_the_operation():
    x = normal(0, 3)
    assert "sigmoid" in str(jax.make_jaxpr(sigmoid)(x))
    assert "logistic" not in str(jax.make_jaxpr(sigmoid)(x))
    assert "power[call=exponent=3 " in str(jax.make_jaxpr(lambda x: power(x, exponent=3))(x))
    assert "vmapped over 3" in str(jax.make_jaxpr(jax.vmap(sigmoid))(x))


def test_it_is_a_function_with_a_name():
    assert sigmoid.name == sigmoid.__name__ == "sigmoid"
    assert sigmoid.__wrapped__ is sigmoid.definition
    assert standardize.__doc__.startswith("Pytrees")
    assert copy.deepcopy({"activation": sigmoid})["activation"] is sigmoid
    assert pickle.loads(pickle.dumps(sigmoid)) is sigmoid


def test_a_rule_can_be_rewritten():
    f = fnn.rule(lambda x: 3 * x)
    f.backward(lambda residuals, g: (2 * g,))
    assert (jax.grad(f)(1.0), jax.jvp(f, (1.0,), (1.0,))[1]) == (2, 2)
    f.backward(lambda residuals, g: (3 * g,))
    assert (jax.grad(f)(1.0), jax.jvp(f, (1.0,), (1.0,))[1]) == (3, 3)


# ------------------------------------------------------------------------------------ wrong rules


def wrong(backward, match, **others):
    @fnn.rule
    def product(W, x):
        return W @ x

    if "forward" in others:
        product.forward(others["forward"])
    if "tangent" in others:
        product.tangent(others["tangent"])
    if backward is not None:
        product.backward(backward)
    W, x = normal(0, 2, 3), normal(1, 3)
    for use in (
        lambda: jax.grad(lambda W: product(W, x).sum())(W),
        lambda: jax.jvp(lambda W: product(W, x), (W,), (W,)),
        lambda: jax.jit(jax.grad(lambda W: jax.vmap(product, (None, 0))(W, x[None]).sum()))(W),
    ):
        with pytest.raises(fnn.RuleError, match=match) as caught:
            use()
        assert "product" in str(caught.value)
    close(product(W, x), W @ x)


def outer(residuals, g):
    return jnp.outer(g, residuals[1])


WRONG = {
    "missing": (None, r"no backward rule.*"),
    "not a tuple": (outer, r"tuple with one gradient for each of its 2 arguments \(W, x\)"),
    "too few": (lambda r, g: (outer(r, g),), "returned 1 gradients.*2 arguments: W, x"),
    "too many": (lambda r, g: (outer(r, g), None, None), "returned 3 gradients"),
    "shape": (
        lambda r, g: (outer(r, g).T, None),
        r"argument 'W' has shape \(3, 2\), but 'W' has shape \(2, 3\)",
    ),
    "dtype": (
        lambda r, g: (outer(r, g).astype("float32"), None),
        r"argument 'W' has dtype float32, but 'W' of shape \(2, 3\) has dtype float64",
    ),
    "structure": (lambda r, g: ([outer(r, g), None], None), "'W' has the wrong structure"),
    "square": (
        lambda r, g: (outer(r, g * g), None),
        r"'W' \(shape \(2, 3\)\).*g \(shape \(2,\)",
    ),
    "sine": (lambda r, g: (outer(r, jnp.sin(g)), None), "isn't linear in g"),
    "relu": (lambda r, g: (outer(r, jax.nn.relu(g)), None), "isn't linear in g"),
    "constant": (lambda r, g: (2 + 0 * r[0], None), "doesn't depend on g"),
    "affine": (lambda r, g: (outer(r, g + 1), None), r"constant term \(1.0\)"),
    "affine in a residual": (
        lambda r, g: (outer(r, g) - r[0], None),
        r"constant term \(of shape",
    ),
    "where": (
        lambda r, g: (jnp.where(r[0] > 0, outer(r, g), 1.0), None),
        "constant term",
    ),
    "second argument": (
        lambda r, g: (outer(r, g), g),
        r"'x' has shape \(2,\), but 'x' has shape \(3,\)",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_rules(kind):
    wrong(*WRONG[kind])


def test_wrong_forward():
    right = lambda r, g: (jnp.outer(g, r[1]), r[0].T @ g)
    wrong(right, "must return a pair", forward=lambda W, x: W @ x)
    wrong(
        right,
        r"returned the value float64\[2, 1\].*float64\[2\]",
        forward=lambda W, x: ((W @ x)[:, None], (W, x)),
    )
    wrong(
        right,
        "returned the value float32",
        forward=lambda W, x: ((W @ x).astype("float32"), (W, x)),
    )


@pytest.mark.parametrize(
    "tangent, match",
    [
        (lambda r, dW, dx: dW, r"dy of shape \(2, 3\).*has shape \(2,\)"),
        (lambda r, dW, dx: (dW @ r[1]).astype("float32"), "dtype float32.*dtype float64"),
        (lambda r, dW, dx: (dW @ r[1], None), "wrong structure"),
        (lambda r, dW, dx: dW @ r[1] + 1, r"isn't linear .* constant term \(1.0\)"),
        (lambda r, dW, dx: dW @ r[1] + r[0] @ r[1], "isn't linear .* constant term"),
        (lambda r, dW, dx: dW @ dx, "isn't linear .* goes through 'dot_general'"),
        (lambda r, dW, dx: jnp.sin(dW @ r[1]), "isn't linear .* goes through 'sin'"),
        (lambda r, dW, dx: jnp.abs(dW) @ r[1], "isn't linear .* goes through 'abs'"),
        (lambda r, dW, dx: jnp.floor(dW @ r[1]), "isn't linear .* goes through 'floor'"),
        (lambda r, dW, dx: jnp.where(dW > 0, dW, 0) @ r[1], "isn't linear .* goes through 'gt'"),
        (lambda r, dW, dx: r[0] @ r[1], "isn't linear .* doesn't depend on them"),
        (
            lambda r, dW, dx: lax.while_loop(lambda c: c[0] < 2, lambda c: c * c, dW @ r[1]),
            "isn't linear .* decides when a loop ends|goes through",
        ),
        (
            lambda r, dW, dx: (
                lax.fori_loop(0, 2 + r[0].astype(int)[0, 0], lambda i, c: c**2, dW) @ r[1]
            ),
            "isn't linear .* goes through",
        ),
        (
            lambda r, dW, dx: lax.cond(dx[0] > 0, lambda: dW @ r[1], lambda: 2 * dW @ r[1]),
            "isn't linear .* decides which branch|goes through",
        ),
    ],
)
def test_wrong_tangent(tangent, match):
    @fnn.rule
    def product(W, x):
        return W @ x

    product.backward(lambda r, g: (jnp.outer(g, r[1]), r[0].T @ g))
    product.tangent(tangent)
    W, x = normal(0, 2, 3), normal(1, 3)
    with pytest.raises(fnn.RuleError, match=match):
        jax.jvp(lambda W: product(W, x), (W,), (W,))


def test_a_backward_beside_a_tangent_must_be_linear_too():
    """JAX doesn't transpose it then: it is read."""
    op = fnn.rule(lambda x: x)
    op.tangent(lambda residuals, dx: dx)
    for backward in (
        jnp.tanh,
        lambda g: g * g,
        lambda g: lax.fori_loop(0, 2, lambda i, c: c * c, g),
    ):
        op.backward(lambda residuals, g, b=backward: (b(g),))
        with pytest.raises(fnn.RuleError, match="backward isn't linear in g.* goes through"):
            jax.grad(op)(1.0)


@pytest.mark.parametrize(
    "tangent",
    [
        lambda r, dx: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 2 * c[1]), (0, dx))[
            1
        ],
        lambda r, dx: lax.scan(lambda c, a: (c * a, c), dx, jnp.full(3, 2.0))[0],
        lambda r, dx: lax.cond(r[0] > 100, jnp.zeros_like, lambda d: 8 * d, dx),
        lambda r, dx: lax.reduce_window(jnp.stack([dx] * 8), 0.0, lax.add, (8,), (8,), "VALID")[0],
        lambda r, dx: jnp.fft.irfft(jnp.fft.rfft(jnp.stack([8 * dx, dx])))[0],
        lambda r, dx: jnp.linalg.solve(jnp.eye(2) / 8, jnp.stack([dx, dx]))[0],
        lambda r, dx: jnp.real(8 * (dx + 0j)) + jnp.cumsum(jnp.zeros(2))[0],
        lambda r, dx: jnp.sort(jnp.zeros(3))[0] + 8 * dx,
        lambda r, dx: 8 * jax.checkpoint(lambda d: jnp.where(r[0] > 0, d, 0))(dx),
        lambda r, dx: jnp.dot(jnp.full(2, 4.0), dx * jnp.ones(2)),
    ],
)
def test_linear_tangents(tangent):
    """Loops, branches and what else is linear, also where JAX can't transpose it."""
    op = fnn.rule(lambda x: 8 * x)
    op.backward(lambda residuals, g: (8 * g,))
    op.tangent(tangent)
    assert abs(jax.jvp(op, (1.0,), (1.0,))[1] - 8) < 1e-6
    assert abs(jax.jvp(jax.grad(op), (1.0,), (1.0,))[1]) == 0


def test_wrong_signatures():
    f = fnn.rule(lambda x, *, slope: slope * x)
    with pytest.raises(
        fnn.RuleError, match=r"backward: its signature must be \(residuals, g, \*, slope\)"
    ):
        f.backward(lambda residuals, g: (g,))
    with pytest.raises(fnn.RuleError, match=r"forward: its signature must be \(x, \*, slope\)"):
        f.forward(lambda x, y, *, slope: (x, x))
    with pytest.raises(
        fnn.RuleError, match=r"tangent: its signature must be \(residuals, dx, \*, slope\)"
    ):
        f.tangent(lambda residuals, *, slope: residuals)


def test_right_rules_that_look_affine():
    """Constants of zero beside g, and constants that multiply it, are no affine terms."""
    zeros = np.zeros(2)

    @fnn.rule
    def first(x):
        return jnp.where(x > 0, x, 0.0)[:3]

    @first.backward
    def _(residuals, g):
        (x,) = residuals
        padded = jnp.concatenate([g, zeros])
        return (jnp.where(x > 0, padded, 0.0) + jnp.zeros_like(x) + 0.0,)

    same(lambda f: jax.grad(lambda x: f(x).sum()), first, normal(0, 5))

    @fnn.rule
    def taken(x):
        return x[jnp.array([2, 0])]

    @taken.backward
    def _(residuals, g):
        return (jnp.zeros_like(residuals[0]).at[jnp.array([2, 0])].add(g),)

    same(lambda f: jax.hessian(lambda x: (f(x) ** 3).sum()), taken, normal(0, 5))


def test_wrong_arguments():
    with pytest.raises(TypeError, match="affine: its positional arguments .* 'no' of type str"):
        affine(jnp.ones((2, 3)), "no", jnp.ones(2))
    with pytest.raises(TypeError, match="power: .*'exponent' is static .* hashable.*Array"):
        power(jnp.ones(3), exponent=jnp.ones(3))
    with pytest.raises(TypeError, match=r"missing a required argument: 'b'; it is affine\(.*, b\)"):
        affine(jnp.ones((2, 3)), jnp.ones(3))
    with pytest.raises(TypeError, match="shape"):
        affine(jnp.ones((2, 3)), jnp.ones(4), jnp.ones(2))


@pytest.mark.parametrize(
    "transform", [jax.jit, jax.grad, functools.partial(jax.jvp, primals=(2.0,), tangents=(1.0,))]
)
def test_a_traced_value_from_outside_is_refused(transform):
    def f(w):
        times = fnn.rule(lambda x: w * x)
        times.backward(lambda residuals, g: (w * g,))
        return times(3.0)

    with pytest.raises(fnn.RuleError, match="uses a traced value .* Pass it as a positional"):
        result = transform(f)
        if callable(result):
            result(2.0)


def test_a_closed_over_array_is_a_constant():
    w = normal(0, 3)
    times = fnn.rule(lambda x: w * x)
    times.backward(lambda residuals, g: (w * g,))
    same(
        lambda f: jax.jit(jax.vmap(jax.hessian(lambda x: (f(x) ** 2).sum()))),
        times,
        normal(1, 2, 3),
    )


def test_without_a_forward_the_value_is_differentiated_by_the_rule():
    """The value that a vjp hands out is the operation's, whose rule says 0 at the kink."""

    @fnn.rule
    def ramp(x):
        return jnp.maximum(x, 0)

    @ramp.backward
    def _(residuals, g):
        return (jnp.where(residuals[0] > 0, g, 0),)

    def value(x):
        return jax.vjp(ramp, x)[0]

    assert jax.grad(value)(0.0) == jax.grad(ramp)(0.0) == 0.0
    mapped = jax.grad(lambda x: jnp.sum(jax.vmap(value)(x)))(jnp.zeros(3))
    np.testing.assert_array_equal(mapped, jnp.zeros(3))


def a_linear_layer_of_positions():
    """x (positions, in), whose examples are more positions where they share W."""

    @fnn.rule
    def linear(x, W):
        return x @ W.T

    @linear.backward
    def _(residuals, g):
        x, W = residuals
        return g @ W, jnp.einsum("...o,...i->oi", g, x)

    @linear.vmapped
    def _(size, axes, x, W):
        if axes[1] is not None:
            return None
        return linear(jnp.moveaxis(x, axes[0], 0), W)

    return linear


def test_a_vmapped_call_as_one_call():
    linear = a_linear_layer_of_positions()
    x, W = jnp.ones((4, 3, 2)), jnp.arange(10.0).reshape(5, 2)
    mapped = jax.vmap(linear, (1, None), out_axes=1)
    assert "vmapped" not in str(jax.make_jaxpr(mapped)(x, W))
    np.testing.assert_allclose(mapped(x, W), x @ W.T)
    total = lambda f: lambda x, W: jnp.sum(jnp.sin(f(x, W)))
    found, wanted = (
        jax.jit(jax.grad(total(f), (0, 1)))(x, W) for f in (mapped, lambda x, W: x @ W.T)
    )
    chex.assert_trees_all_close(found, wanted, rtol=1e-5)
    # Each with a weight of its own: mapped as ever, twice.
    Ws = jnp.stack([W] * 4)
    own = jax.vmap(jax.vmap(linear, (0, None)), (None, 0))
    assert "vmapped" in str(jax.make_jaxpr(own)(x, Ws))
    np.testing.assert_allclose(own(x, Ws), jnp.stack([x @ W.T] * 4))


@pytest.mark.parametrize("number", [np.float32(0.1), np.float64(0.1)])
def test_a_static_number_of_numpy_s_changes_no_dtype(number):
    x = jnp.asarray([-1.0, 1.0], jnp.bfloat16)
    value, slopes = jax.value_and_grad(lambda x: fnn.ops.leaky_relu(x, slope=number).sum())(x)
    assert value.dtype == slopes.dtype == jnp.bfloat16


def test_look_and_vmapped_are_checked_and_counted_as_the_other_roles():
    @fnn.rule
    def scaled(x, *, by):
        return x * by

    version = scaled.rule.version
    scaled.look(lambda types, x, *, by: None)
    scaled.vmapped(lambda size, axes, x, **static: None)
    assert scaled.rule.version == version + 2
    for register in (scaled.look, scaled.vmapped):
        with pytest.raises(TypeError, match=rf"scaled.{register.__name__}: the rule must be"):
            register(3)
        with pytest.raises(
            fnn.RuleError, match=rf"scaled.{register.__name__}: its signature must be"
        ):
            register(lambda x: None)
