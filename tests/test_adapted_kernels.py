"""Low-rank adapters of convolutions: against the merged kernels, and what is never formed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sweeps import sweep

import fnn
import fnn.per_example as pe
from fnn import models, ops
from fnn.layers import (
    Conv,
    ConvTranspose,
    DropConnect,
    MixtureOfExperts,
    Once,
    SpectralNorm,
    WeightNorm,
    adapted,
    chain,
    lora,
    merge,
    repeat,
    training,
)

KEY = jax.random.key(0)
RANK = 3
HALVED = {"scale": 0.5}


def R(i, *shape):
    return jnp.asarray(np.random.default_rng([i, *shape]).normal(size=shape))


def trained(params, where, net, rank=RANK):
    """Adapters whose B isn't 0."""
    own = lora(params, where, rank, KEY, net=net)
    return jax.tree.map(lambda a: 0.5 * R(1, *a.shape), own)


CASES = {
    "plain": (Conv(12, 3), (6, 5, 8)),
    "strides": (Conv(12, (3, 2), stride=(2, 1), padding=1), (6, 5, 8)),
    "dilation": (Conv(12, 3, dilation=2, use_bias=False), (6, 5, 8)),
    "circular": (Conv(12, (3, 2), padding="circular"), (6, 5, 8)),
    "groups": (Conv(12, 3, stride=2, groups=2), (6, 5, 8)),
    "groups, circular": (Conv(12, 3, groups=2, padding="circular"), (6, 5, 8)),
    "depthwise": (Conv(8, 3, groups=8), (6, 5, 8)),
    "depthwise to many": (Conv(32, 3, groups=8), (6, 5, 8)),
    "a sequence": (Conv(12, (3,), padding=((1, 2),)), (7, 8)),
    "a volume": (Conv(12, (2, 3, 2), padding="valid", groups=2), (3, 4, 3, 8)),
    "more images": (Conv(12, 3, groups=2), (2, 3, 6, 5, 8)),
    "to fewer than the rank": (Conv(2, 3), (6, 5, 8)),
    "up": (ConvTranspose(12, 2, stride=2), (6, 5, 8)),
    "up, groups": (
        ConvTranspose(12, 3, stride=2, groups=2, output_padding=1, padding=1),
        (6, 5, 8),
    ),
    "up, dilation": (ConvTranspose(12, 3, dilation=2, groups=2), (2, 6, 5, 8)),
    "up, a sequence": (ConvTranspose(12, (2,), stride=3, padding="valid"), (6, 8)),
    "up, depthwise": (ConvTranspose(8, 3, groups=8), (6, 5, 8)),
}


@pytest.mark.parametrize("name", sweep(CASES, ["groups", "up, groups"]))
def test_as_the_merged_kernel(name):
    layer, shape = CASES[name]
    x = R(0, *shape)
    params = layer.init(KEY, x)
    own = trained(params, "W", layer)
    of = lambda a, x: layer(adapted(params, a, **HALVED), x)
    plain = lambda a, x: layer(merge(params, a, **HALVED), x)
    tangents = jax.tree.map(lambda a: R(2, *a.shape), (own, x))
    losses = [lambda a, x, f=f: jnp.sum(jnp.sin(f(a, x))) for f in (of, plain)]

    @jax.jit
    def ours(own, x, tangents, xs):
        _, g = pe.grads(losses[0])(own, xs)
        slopes = [gradient(losses[0], (0, 1))(own, x) for gradient in (jax.grad, fnn.grad)]
        return jax.jvp(of, (own, x), tangents), *slopes, pe.materialize(g)

    @jax.jit
    def wanted(own, x, tangents, xs):
        slopes = jax.grad(losses[1], (0, 1))(own, x)
        each = jax.vmap(jax.grad(losses[1]), (None, 0))(own, xs)
        return jax.jvp(plain, (own, x), tangents), slopes, slopes, each

    given = own, x, tangents, R(3, 2, *shape)
    chex.assert_trees_all_close(ours(*given), wanted(*given), rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------- what is never formed


def formed_of(jaxpr, alone):
    """The sizes of all that a program makes, but for what is made of the inputs `alone`."""
    alone, sizes = set(alone), set()
    is_alone = lambda v: not hasattr(v, "val") and v in alone  # literals have a value
    for equation in jaxpr.eqns:
        if all(map(is_alone, equation.invars)):
            alone.update(equation.outvars)
            continue
        sizes |= {v.aval.size for v in equation.outvars}
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):
                pairs = zip(inner.jaxpr.invars, equation.invars, strict=True)
                sizes |= formed_of(inner.jaxpr, [own for own, v in pairs if is_alone(v)])
    return sizes


NARROWS = {
    "plain": (Conv(11, 3), Conv(13, 3, stride=2)),
    "groups": (Conv(10, 3, groups=2), Conv(20, 3, groups=2)),
    "up": (ConvTranspose(11, 3, stride=2), ConvTranspose(13, 2)),
}


@pytest.mark.parametrize("name", NARROWS)
@pytest.mark.parametrize("gradient", [jax.grad, fnn.grad])
def test_nothing_of_a_kernel_s_size_is_formed(name, gradient):
    """Neither its gradient nor the change; but the kernel itself may be read backwards."""
    net = chain(first=NARROWS[name][0], act=jnp.tanh, second=NARROWS[name][1])
    xs = R(0, 2, 5, 7, 8)
    params = net.init(KEY, xs[0])
    own = trained(params, "*.W", net, 2)

    def of(how):
        loss = lambda a, p, xs: jnp.sum(jax.vmap(net, (None, 0))(how(p, a), xs) ** 2)
        program = jax.make_jaxpr(lambda a, p, xs: gradient(loss)(a, p, xs))(own, params, xs)
        count, ins = len(jax.tree.leaves(own)), program.jaxpr.invars
        sizes = formed_of(program.jaxpr, ins[count : count + len(jax.tree.leaves(params))])
        return sizes & {params[part]["W"].size for part in ("first", "second")}

    assert not of(adapted)
    assert len(of(merge)) == 2  # which it would find


def test_what_it_costs():
    """64 features, 3 × 3: fewer operations and less memory than with a merged kernel."""
    layer, xs = Conv(64, 3), jax.ShapeDtypeStruct((8, 16, 16, 64), jnp.float32)
    params = jax.eval_shape(layer.init, KEY, jax.ShapeDtypeStruct(xs.shape[1:], xs.dtype))
    own = jax.eval_shape(lambda p: lora(p, "W", 4, KEY, net=layer), params)
    params, own = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), (params, own))

    def cost(how):
        loss = lambda a, p, xs: jnp.mean(jax.vmap(layer, (None, 0))(how(p, a), xs) ** 2)
        compiled = jax.jit(jax.grad(loss)).lower(own, params, xs).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    assert cost(adapted)[0] < 0.8 * cost(merge)[0]
    assert cost(adapted)[1] < 0.6 * cost(merge)[1]


def test_per_example_gradients_stay_factored():
    layers = {"one": Conv(48, 3), "groups": Conv(64, 3, groups=2), "up": ConvTranspose(32, 3)}
    net = chain(**layers)
    xs = jax.ShapeDtypeStruct((2, 3, 3, 48), jnp.float64)
    params = jax.eval_shape(net.init, KEY, jax.ShapeDtypeStruct(xs.shape[1:], xs.dtype))
    own = jax.eval_shape(lambda p: lora(p, "*.W", 16, KEY, net=net), params)
    loss = lambda a, p, x: jnp.sum(net(adapted(p, a), x) ** 2)
    grads = lambda a, p, xs: pe.grads(lambda a, x: loss(a, p, x))(a, xs)
    _, g = jax.eval_shape(grads, own, params, xs)
    why = {row["path"]: row["why"] for row in pe.explain(g)}
    for part in layers:
        assert why[f"['{part}']['W']['A']"] == "gradient is x convolved with G"
        assert why[f"['{part}']['W']['B']"] == "gradient is Gᵀ A"


# ----------------------------------------------------------------- where kernels are held otherwise


HOLDERS = {
    "repeat": (repeat(chain(Conv(8, 3), jnp.tanh), 3), (5, 4, 8), "*.W"),
    "repeat, remat": (repeat(Conv(8, 3, groups=2), 2, remat=True), (5, 4, 8), "W"),
    "twice": (repeat(repeat(Conv(8, 3), 2), 2), (5, 4, 8), "W"),
    "experts": (MixtureOfExperts(Conv(8, (3,)), 3), (5, 8), "experts.W"),
    "once": (Once(Conv(8, 3)), (5, 4, 8), "W"),
    "weight norm": (WeightNorm(Conv(8, 3)), (5, 4, 8), "v"),
    "spectral norm": (SpectralNorm(ConvTranspose(6, 3)), (5, 4, 8), "W"),
    "drop connect": (DropConnect(Conv(8, 3), 0.5), (5, 4, 8), "W"),
}


@pytest.mark.parametrize("name", sweep(HOLDERS, ["repeat", "drop connect"]))
@pytest.mark.parametrize("train", [False, True])
def test_in_what_holds_it(name, train):
    net, shape, where = HOLDERS[name]
    x = R(0, *shape)
    params, state = net.init(KEY, x), net.init_state(x)
    own = trained(params, where, net, 2)
    mode = {"mode": training(KEY)} if train else {}
    both = [
        jax.value_and_grad(
            lambda a, h=h: jnp.sum(net.apply(h(params, a), state, x, **mode)[0] ** 2)
        )
        for h in (adapted, merge)
    ]
    found, wanted = (jax.jit(f)(own) for f in both)
    chex.assert_trees_all_close(found, wanted, rtol=1e-8, atol=1e-10)


MODELS = {
    "lenet": (models.lenet(3), (32, 32, 1)),
    "resnet": (models.resnet((1, 1), 3, features=4, small=True), (6, 6, 2)),
    "convnext": (models.convnext((1, 1), (4, 6), 3, layer_scale=0.5), (8, 8, 2)),
    "unet": (models.unet(2, 3, 1, padding="same"), (4, 4, 1)),
}


@pytest.mark.parametrize("name", sweep(MODELS, ["unet"]))
def test_in_models(name):
    net, shape = MODELS[name]
    x = R(0, *shape)
    params, state = jax.jit(net.init)(KEY, x), net.init_state(x)
    own = trained(params, lambda path, W: path[-1] == "W", net, 2)
    both = [
        jax.value_and_grad(lambda a, h=h: jnp.sum(jnp.sin(net.apply(h(params, a), state, x)[0])))
        for h in (adapted, merge)
    ]
    found, wanted = (jax.jit(f)(own) for f in both)
    chex.assert_trees_all_close(found, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("layer", [Conv(12, 3, groups=2), ConvTranspose(12, 3, stride=2)])
@pytest.mark.parametrize("of_adapters", [jnp.float32, jnp.bfloat16])
def test_dtypes(layer, of_adapters):
    """The output has the kernel's and x's, as with a merged kernel."""
    half = lambda tree, dtype=jnp.bfloat16: jax.tree.map(lambda a: a.astype(dtype), tree)
    x = R(0, 5, 4, 8)
    params = layer.init(KEY, x)
    own = trained(params, "W", layer)
    y = layer(adapted(half(params), half(own, of_adapters)), half(x))
    assert y.dtype == jnp.bfloat16
    wanted = layer(merge(params, own), x)
    np.testing.assert_allclose(y.astype(float), wanted, atol=0.05 * jnp.max(jnp.abs(wanted)))


def test_on_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    net, xs = (
        chain(Conv(12, 3, groups=2), jnp.tanh, ConvTranspose(4, 2, stride=2)),
        R(0, 4, 5, 4, 8),
    )
    params = net.init(KEY, xs[0])
    own = trained(params, "*.W", net)
    loss = lambda a, p, xs: jnp.sum(jnp.sin(jax.vmap(net, (None, 0))(adapted(p, a), xs)))
    wanted = jax.grad(loss)(own, params, xs)
    with jax.set_mesh(mesh):
        put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
        found = jax.jit(jax.grad(loss))(put(own, P()), put(params, P()), put(xs, P("data")))
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(wanted), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "use",
    [
        lambda W: W + 1,
        lambda W: jnp.ones(3) * W,
        lambda W: W[0],
        lambda W: jnp.ones(4) @ W,
        lambda W: W @ jnp.ones(4),
        lambda W: ops.convolution(jnp.ones((4, 5, 2)), W),
    ],
)
def test_elsewhere_the_error_says_to_merge(use):
    layer = Conv(4, 3)
    params = layer.init(KEY, jnp.ones((4, 5, 2)))
    W = adapted(params, lora(params, "W", 2, KEY, net=layer))["W"]
    assert (W.shape, W.ndim, W.size, W.dtype) == ((4, 2, 3, 3), 4, 72, jnp.float64)
    with pytest.raises(TypeError, match=r"an adapted kernel of shape \(4, 2, 3, 3\), .*: merge"):
        use(W)
