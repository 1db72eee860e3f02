"""Layers, their combinators, their errors, and the summary."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnn.layers import Layer, Linear, Maxout, chain, constructor, parallel, residual, summary

KEY = jax.random.key(0)


def shapes(tree):
    return jax.tree.map(lambda a: a.shape, tree)


# --------------------------------------------------------------------------------- the layers


def test_linear_is_W_x_plus_b():
    layer = Linear(3, bias_init=jax.nn.initializers.normal(1.0))
    x = jnp.arange(4.0)
    params = layer.init(KEY, x)
    assert shapes(params) == {"W": (3, 4), "b": (3,)}
    W, b = np.asarray(params["W"]), np.asarray(params["b"])
    wanted = [sum(W[i, j] * x[j] for j in range(4)) + b[i] for i in range(3)]
    np.testing.assert_allclose(layer.apply(params, x), wanted, rtol=1e-6)


def test_linear_without_bias():
    layer = Linear(3, use_bias=False)
    params = layer.init(KEY, jnp.ones(4))
    assert set(params) == {"W"}
    np.testing.assert_allclose(layer.apply(params, jnp.ones(4)), params["W"].sum(1), rtol=1e-6)


@pytest.mark.parametrize("layer", [Linear(3), Maxout(3, 4)])
def test_positions_share_the_weights(layer):
    x = jax.random.normal(KEY, (5, 6, 4))
    params = layer.init(KEY, x)
    assert params["W"].shape[-2:] == (3, 4)
    wanted = jax.vmap(jax.vmap(lambda x: layer.apply(params, x)))(x)
    np.testing.assert_allclose(layer.apply(params, x), wanted, rtol=1e-5, atol=1e-6)


def test_maxout_is_the_largest_of_linear_functions():
    layer = Maxout(3, pieces=4, bias_init=jax.nn.initializers.normal(1.0))
    x = jnp.arange(5.0)
    params = layer.init(KEY, x)
    assert shapes(params) == {"W": (4, 3, 5), "b": (4, 3)}
    wanted = np.max([W @ x + b for W, b in zip(params["W"], params["b"], strict=True)], axis=0)
    np.testing.assert_allclose(layer.apply(params, x), wanted, rtol=1e-6)
    W = np.asarray(Maxout(400, 2).init(KEY, jnp.zeros(50))["W"])
    assert W.var() == pytest.approx(1 / 50, rel=0.05)  # LeCun's, with the fans of one piece
    assert not np.allclose(W[0], W[1])


@pytest.mark.parametrize("layer", [Linear(3), Maxout(3)])
@pytest.mark.parametrize(
    ("x_dtype", "asked", "wanted"),
    [
        (jnp.float32, None, jnp.float32),
        (jnp.bfloat16, None, jnp.bfloat16),
        (jnp.float64, None, jnp.float64),
        (jnp.float32, jnp.float16, jnp.float16),
        (jnp.int32, None, jnp.float64),  # JAX's default float, while the tests allow 64 bits
    ],
)
def test_dtype_follows_x(layer, x_dtype, asked, wanted):
    if asked is not None:
        layer = layer.made_by.constructor(*layer.made_by.args, dtype=asked)
    params = layer.init(KEY, jax.ShapeDtypeStruct((4,), x_dtype))
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(wanted)}
    if asked is None and jnp.issubdtype(x_dtype, jnp.floating):
        assert layer.apply(params, jnp.ones(4, x_dtype)).dtype == x_dtype


def test_init_needs_only_the_shape():
    net = chain(h=Linear(3), a=jnp.tanh, m=Maxout(2), p=parallel(Linear(1), residual(Linear(2))))
    by_array = net.init(KEY, jnp.zeros(4))
    by_type = net.init(KEY, jax.ShapeDtypeStruct((4,), jnp.zeros(4).dtype))
    jax.tree.map(np.testing.assert_array_equal, by_array, by_type)
    abstract = jax.eval_shape(net.init, KEY, jnp.zeros(4))
    assert shapes(abstract) == shapes(by_array)


# -------------------------------------------------------------------------------- combinators


def test_chain_by_position():
    net = chain(Linear(5), jnp.tanh, Linear(2))
    x = jnp.arange(3.0)
    params = net.init(KEY, x)
    assert shapes(params) == ({"W": (5, 3), "b": (5,)}, (), {"W": (2, 5), "b": (2,)})
    first, _, last = params
    wanted = last["W"] @ np.tanh(first["W"] @ x + first["b"]) + last["b"]
    np.testing.assert_allclose(net.apply(params, x), wanted, rtol=1e-6)


def test_chain_by_name_keeps_only_parts_with_parameters():
    net = chain(hidden=Linear(5), act=jnp.tanh, twice=chain(jnp.sin, jnp.cos), output=Linear(2))
    x = jnp.arange(3.0)
    params = net.init(KEY, x)
    assert list(params) == ["hidden", "output"]
    h = np.cos(np.sin(np.tanh(params["hidden"]["W"] @ x + params["hidden"]["b"])))
    wanted = params["output"]["W"] @ h + params["output"]["b"]
    # twice's parameters, ((), ()), were left out: there are none to look up.
    np.testing.assert_allclose(net.apply(params, x), wanted, rtol=1e-6)


def test_chain_of_nothing_is_the_identity():
    assert chain().init(KEY, jnp.ones(3)) == ()
    np.testing.assert_array_equal(chain().apply((), jnp.arange(3.0)), np.arange(3.0))


def test_parallel():
    x = jnp.arange(3.0)
    net = parallel(Linear(2), jnp.sin)
    params = net.init(KEY, x)
    assert shapes(params) == ({"W": (2, 3), "b": (2,)}, ())
    linear, sine = net.apply(params, x)
    np.testing.assert_allclose(linear, params[0]["W"] @ x, rtol=1e-6)
    np.testing.assert_allclose(sine, np.sin(x), rtol=1e-6)
    net = parallel(left=Linear(2), right=jnp.sin)
    params = net.init(KEY, x)
    assert list(params) == ["left"]
    assert shapes(net.apply(params, x)) == {"left": (2,), "right": (3,)}


def test_residual_adds_its_input():
    x = jnp.arange(3.0)
    net = residual(Linear(3), jnp.tanh)
    params = net.init(KEY, x)
    np.testing.assert_allclose(
        net.apply(params, x), x + np.tanh(params[0]["W"] @ x + params[0]["b"]), rtol=1e-6
    )
    named = residual(inner=Linear(3), act=jnp.tanh)
    assert list(named.init(KEY, x)) == ["inner"]


def test_nested_networks_have_readable_paths_and_gradients_by_jax():
    net = chain(
        encoder=chain(hidden=Linear(4), act=jax.nn.relu),
        heads=parallel(mean=Linear(2), scale=chain(Linear(2), jax.nn.softplus)),
    )
    x = jnp.arange(3.0)
    params = net.init(KEY, x)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert "['encoder']['hidden']['W']" in names and "['heads']['scale'][0]['b']" in names

    def by_hand(params, x):
        p = params["encoder"]["hidden"]
        h = jnp.maximum(p["W"] @ x + p["b"], 0)
        mean, scale = params["heads"]["mean"], params["heads"]["scale"][0]
        scale = jnp.log1p(jnp.exp(scale["W"] @ h + scale["b"]))
        return jnp.sum((mean["W"] @ h + mean["b"]) * scale)

    def by_net(params, x):
        out = net.apply(params, x)
        return jnp.sum(out["mean"] * out["scale"])

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.grad(by_net)(params, x),
        jax.grad(by_hand)(params, x),
    )


def test_parts_draw_from_different_keys():
    net = chain(a=Linear(3), b=Linear(3))
    params = net.init(KEY, jnp.zeros(3))
    assert not np.allclose(params["a"]["W"], params["b"]["W"])
    again = net.init(KEY, jnp.zeros(3))
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_a_pair_of_functions_is_a_layer():
    def init(key, x):
        return {"scale": jnp.ones(x.shape)}

    def apply(params, x):
        return params["scale"] * x

    for layer in (Layer(init, apply), (init, apply)):
        net = chain(scale=layer, act=jnp.tanh)
        params = net.init(KEY, jnp.zeros(3))
        assert shapes(params) == {"scale": {"scale": (3,)}}
    init_again, apply_again = Layer(init, apply)
    assert (init_again, apply_again) == (init, apply)


def test_layers_print_as_they_were_written():
    net = chain(hidden=Linear(100), act=jax.nn.relu, out=residual(Maxout(3, pieces=4)))
    assert repr(net) == ("chain(hidden=Linear(100), act=relu, out=residual(Maxout(3, pieces=4)))")


def test_names_reach_the_compiled_program():
    net = chain(hidden=Linear(3), act=jnp.tanh)
    params = net.init(KEY, jnp.zeros(3))
    text = jax.jit(net.apply).lower(params, jnp.zeros(3)).as_text(debug_info=True)
    assert "hidden" in text


# ------------------------------------------------------------------------------------- errors


def test_wrong_input_names_layer_shapes_and_place():
    net = chain(encoder=chain(hidden=Linear(100), act=jnp.tanh), output=Linear(10))
    params = net.init(KEY, jnp.zeros(784))
    with pytest.raises(ValueError) as error:
        net.apply(params, jnp.zeros(785))
    message = str(error.value)
    assert "Linear(100)" in message and "(784,)" in message and "(785,)" in message
    assert error.value.__notes__[0].startswith("in part 'hidden'")
    assert error.value.__notes__[1].startswith("in part 'encoder'")


@pytest.mark.parametrize("layer", [Linear(3), Maxout(3)])
def test_wrong_input_of_one_layer(layer):
    params = layer.init(KEY, jnp.zeros(4))
    with pytest.raises(ValueError, match=re.escape(f"{layer!r}"[:6]) + r".*\(4,\).*\(5,\)"):
        layer.apply(params, jnp.zeros(5))
    with pytest.raises(ValueError, match=r"shape \(in,\).*shape \(\)"):
        layer.init(KEY, jnp.zeros(()))
    with pytest.raises(ValueError, match=r"keys \['W', 'b'\], but got \['W'\]"):
        layer.apply({"W": params["W"]}, jnp.zeros(4))


def test_wrong_parameters_of_a_combinator():
    x = jnp.zeros(3)
    net = chain(hidden=Linear(3), out=Linear(3))
    params = net.init(KEY, x)
    with pytest.raises(ValueError, match=r"among \['hidden', 'out'\], but got \['hiden', 'out'\]"):
        net.apply({"hiden": params["hidden"], "out": params["out"]}, x)
    with pytest.raises(ValueError, match="Linear.*got tuple"):
        net.apply({"out": params["out"]}, x)
    net = parallel(Linear(3), jnp.sin)
    with pytest.raises(ValueError, match="2 parts, but got a tuple of 1"):
        net.apply(net.init(KEY, x)[:1], x)
    with pytest.raises(ValueError, match="2 parts, but got a dict"):
        net.apply({"a": 1}, x)


def test_what_is_no_layer():
    with pytest.raises(TypeError, match=r"chain, part 1: Linear makes a layer.*write Linear\("):
        chain(jnp.tanh, Linear)
    with pytest.raises(TypeError, match=r"parallel, part 'b'.*chain makes a layer"):
        parallel(a=jnp.tanh, b=chain)
    with pytest.raises(TypeError, match="part 0.*function of one array, but got 3"):
        residual(3)
    with pytest.raises(TypeError, match="Name all of them or none"):
        chain(jnp.tanh, out=Linear(3))


def test_residual_must_keep_the_shape():
    net = residual(Linear(4))
    params = net.init(KEY, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"residual.*\(3,\).*\(4,\).*Linear\(4\)"):
        net.apply(params, jnp.zeros(3))


# ------------------------------------------------------------------------------------ summary


def test_summary():
    net = chain(
        body=chain(hidden=Linear(100), act=jax.nn.relu),
        skip=residual(Linear(100)),
        output=Linear(10, use_bias=False),
    )
    x = jax.ShapeDtypeStruct((784,), jnp.float32)
    table = summary(net, x)
    rows = {row.path: row for row in table.rows}
    assert list(rows) == [
        (),
        ("body",),
        ("body", "hidden"),
        ("body", "act"),
        ("skip",),
        ("skip", "0"),
        ("output",),
    ]
    params = net.init(KEY, x)
    assert table.parameters == sum(p.size for p in jax.tree.leaves(params)) == 89_600
    assert rows["body", "hidden"].parameters == 78_500
    assert rows["output",].output.shape == (10,)
    assert rows["output",].flops == 2 * 100 * 10  # a product and a sum for each weight
    assert rows["skip",].flops == rows["skip", "0"].flops + 100
    # The whole is counted by itself: where XLA fuses, it may compute a number twice.
    parts = sum(rows[p,].flops for p in ("body", "skip", "output"))
    assert table.flops == pytest.approx(parts, rel=0.01)
    text = str(table)
    assert re.search(r"\n  hidden +Linear\(100\) +float32\[100\] +78,500 +156,900\n", text)
    assert re.search(r"total .*float32\[10\] +89,600 +\d", text)
    assert len({len(line) for line in text.splitlines() if "─" not in line}) <= 2


def test_summary_of_one_layer_of_a_function_and_of_a_tree():
    assert "Linear(3)" in str(summary(Linear(3), jnp.zeros(2)))
    assert summary(jnp.tanh, jnp.zeros(2)).parameters == 0
    net = chain(pair=lambda xs: xs["a"] + xs["b"], out=Linear(2))
    table = summary(net, {"a": jnp.zeros(3), "b": jnp.zeros(3)})
    assert table.parameters == 8
    table = summary(parallel(a=Linear(2), b=jnp.sin), jnp.zeros(3, jnp.float32))
    assert "float32[2], float32[3]" in str(table)


def test_summary_of_a_layer_of_ones_own():
    @constructor
    def Twice(inner: Layer):
        def init(key, x):
            return inner.init(key, x)

        def apply(params, x):
            return inner.apply(params, inner.apply(params, x))

        return Layer(init, apply)

    table = summary(chain(twice=Twice(Linear(3))), jnp.zeros(3))
    assert [row.layer for row in table.rows][1:] == ["Twice(Linear(3))"] + ["Linear(3)"] * 2
    assert table.parameters == 12
