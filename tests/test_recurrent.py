"""Recurrent operations and layers: against loops written out, PyTorch and Flax."""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from ops_table import _gru_step, _lstm_step
from sweeps import exhaustive, sweep

import fnn
import fnn.per_example as pe
from fnn import layers, ops
from fnn.layers import (
    GRU,
    LSTM,
    RNN,
    Attention,
    Dropout,
    LayerError,
    Linear,
    WeightNorm,
    bidirectional,
    chain,
    network,
    recurrent,
    repeat,
    summary,
    training,
)

STEPS, HIDDEN = 5, 3
MASK = jnp.asarray([True, False, True, True, False])


def R(i, *shape, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng([i, *shape]).normal(size=shape), dtype)


# ------------------------------------------------------------------------ whole sequences


def plain(step):
    """A sequence of steps, one after the other in Python; a masked step doesn't happen."""

    def run(z, U, *carry, mask=None, reverse=False):
        order = range(len(z))[::-1] if reverse else range(len(z))
        hs = [None] * len(z)
        for t in order:
            if mask is None or mask[t]:
                carry = step(z[t], U, *carry)
            hs[t] = carry[0]
        return jnp.stack(hs), carry

    return run


def plain_gru(z, U, b, h):
    return (_gru_step(z, U @ h + jnp.pad(b, (2 * HIDDEN, 0)), h), b)


def _gru(z, U, b, h, mask=None, reverse=False):
    order = range(len(z))[::-1] if reverse else range(len(z))
    hs = [None] * len(z)
    for t in order:
        if mask is None or mask[t]:
            (h, _) = plain_gru(z[t], U, b, h)
        hs[t] = h
    return jnp.stack(hs), h


def lstm_of(z, U, h, c):
    return _lstm_step(z + U @ h, h, c)


SEQUENCES = {
    "lstm": (ops.lstm, plain(lstm_of), ((12,), (12, 3), (3,), (3,))),
    "gru": (ops.gru, _gru, ((9,), (9, 3), (3,), (3,))),
    "tanh": (ops.rnn, plain(lambda z, U, h: (jnp.tanh(z + U @ h),)), ((3,), (3, 3), (3,))),
    "relu": (
        functools.partial(ops.rnn, activation="relu"),
        plain(lambda z, U, h: (jax.nn.relu(z + U @ h),)),
        ((3,), (3, 3), (3,)),
    ),
}
WAYS = [(name, masked, back) for name in SEQUENCES for masked in (0, 1) for back in (0, 1)]
QUICK = [("lstm", 1, 1), ("gru", 1, 0)]


def total(result):
    """A function of all results, in which no two numbers play the same part."""
    leaves = jax.tree.leaves(result)
    return sum(jnp.sum(jnp.sin(a * jnp.arange(1, a.size + 1).reshape(a.shape))) for a in leaves)


def same_in_both_modes(ours, theirs, args):
    """Values, gradients in both modes, and second derivatives."""
    of = tuple(range(len(args)))

    def everything(f, gradient):
        g = lambda *args: gradient(f, of)(*args)
        return f(*args), g(*args), jax.jvp(g, args, args)[1]

    wanted = jax.jit(lambda: everything(theirs, jax.grad))()
    found = jax.jit(lambda: [everything(ours, d) for d in (jax.grad, fnn.grad, jax.jacfwd)])()
    for of_mode in found:
        chex.assert_trees_all_close(of_mode, wanted, rtol=1e-9, atol=1e-9)


@exhaustive
@pytest.mark.parametrize("way", sweep(WAYS, QUICK), ids=str)
def test_a_sequence_is_its_steps(way):
    name, masked, back = way
    op, reference, (step, *shapes) = SEQUENCES[name]
    args = (R(0, STEPS, *step), *(R(i, *s) for i, s in enumerate(shapes, 1)))
    mask = MASK if masked else None
    ours = lambda *args: total(op(*args, mask, reverse=bool(back)))
    known = None if mask is None else np.asarray(mask)
    theirs = lambda *args: total(reference(*args, mask=known, reverse=bool(back)))
    same_in_both_modes(ours, theirs, args)


@pytest.mark.parametrize("name", sweep(SEQUENCES, ["gru"]))
def test_many_steps_of_sequences_that_share_their_weights(name):
    """There U is multiplied transposed: in the same numbers, in both modes, from all inputs."""
    op, reference, (step, *shapes) = SEQUENCES[name]
    shared = [(0.5 * R(i, *s)) for i, s in enumerate(shapes, 1)]
    args = (R(0, 2, 17, *step), *shared)
    batched = lambda f: lambda zs, *rest: total(jax.vmap(lambda z: f(z, *rest))(zs))
    ours, theirs = batched(lambda *a: op(*a)), batched(lambda *a: reference(*a))
    same_in_both_modes(ours, theirs, args)
    # One more vmap, of weights or of sequences; and of weights of their own.
    many = lambda axes: jax.vmap(lambda U, zs: ours(zs, U, *shared[1:]), axes)
    Us, zs = jnp.stack([shared[0], -shared[0]]), jnp.stack([args[0], 2 * args[0]])
    at = lambda x, axis, i: x[0] if axis is None else x[i]
    for U_axis, z_axis in ((0, 0), (None, 0), (0, None)):
        given = [x if axis == 0 else x[0] for x, axis in ((Us, U_axis), (zs, z_axis))]
        expected = [theirs(at(zs, z_axis, i), at(Us, U_axis, i), *shared[1:]) for i in range(2)]
        found = many((U_axis, z_axis))(*given)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_weights_are_transposed_where_that_is_faster():
    """Of several sequences that share them, of many steps."""
    hidden = 3
    U, carry = R(1, 4 * hidden, hidden), jnp.zeros(hidden)
    one = lambda z, U: ops.lstm(z, U, carry, carry)[0]

    def is_transposed(f, *args):
        text = jax.jit(f).lower(*args).as_text()
        return "(tensor<12x3xf64>) -> tensor<3x12xf64>" in text

    several = jax.vmap(one, (0, None))
    assert is_transposed(several, R(0, 4, 16, 12), U)
    assert not is_transposed(several, R(0, 4, 15, 12), U)
    assert not is_transposed(several, R(0, 1, 16, 12), U)
    assert not is_transposed(one, R(0, 16, 12), U)
    assert not is_transposed(jax.vmap(one), R(0, 4, 16, 12), R(1, 4, 12, 3))


def test_a_batch_s_gradient_is_one_loop_each_way_and_one_product():
    """The weights' gradient isn't added up step by step, nor found by a loop of its own."""
    U, zs = R(1, 12, 3), R(0, 4, STEPS, 12)

    def loss(U, zs):
        one = lambda z: jnp.sum(ops.lstm(z, U, jnp.zeros(3), jnp.zeros(3))[0] ** 2)
        return jnp.sum(jax.vmap(one)(zs))

    for gradient in (jax.grad, fnn.grad):
        f = jax.jit(gradient(loss, (0, 1)))
        jaxpr = str(jax.make_jaxpr(f)(U, zs).pretty_print(use_color=False))
        text = f.lower(U, zs).as_text()
        assert text.count("stablehlo.while") == 2, jaxpr
        assert text.count("tensor<4x5x12xf64>, tensor<4x5x3xf64>) -> tensor<12x3xf64>") <= 1
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert sum("-> tensor<12x3xf64>" in line for line in products) == 1
        assert not any("-> tensor<4x12x3xf64>" in line for line in products)


def test_a_masked_step_lets_nothing_through():
    z = R(0, STEPS, 12).at[1].set(jnp.nan).at[4].set(jnp.inf)
    args = z, R(1, 12, 3), R(2, 3), R(3, 3)
    loss = lambda *args: total(ops.lstm(*args, MASK))
    value, (dz, *rest) = jax.value_and_grad(loss, (0, 1, 2, 3))(*args)
    chex.assert_tree_all_finite((value, dz, rest))
    np.testing.assert_array_equal(dz[1], 0)
    hs, (h, c) = ops.lstm(*args, jnp.zeros(STEPS, bool))
    np.testing.assert_array_equal(hs, jnp.broadcast_to(args[2], (STEPS, 3)))
    np.testing.assert_array_equal((h, c), args[2:])


@pytest.mark.parametrize("dtype", sweep([jnp.float16, jnp.bfloat16], [jnp.bfloat16]))
def test_half_precision(dtype):
    """As in float32, within the rounding of what goes in and out; the memory isn't rounded."""
    args = R(0, STEPS, 12), R(1, 12, 3), R(2, 3), R(3, 3)
    half = [x.astype(dtype) for x in args]
    c = half[3].astype(jnp.float32)
    loss = lambda *args: sum(
        jnp.sum(a.astype(jnp.float32) ** 2) for a in jax.tree.leaves(ops.lstm(*args))
    )
    found = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*half[:3], c)
    wanted = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*(x.astype(jnp.float32) for x in half))
    assert [g.dtype for g in found[1]] == [dtype] * 3 + [jnp.float32]
    to_wide = lambda t: jax.tree.map(lambda a: np.asarray(a, np.float64), t)
    chex.assert_trees_all_close(to_wide(found), to_wide(wanted), rtol=0.05, atol=0.05)


def test_no_steps_and_large_numbers():
    hs, (h, c) = ops.lstm(jnp.zeros((0, 12)), R(1, 12, 3), R(2, 3), R(3, 3))
    assert hs.shape == (0, 3)
    np.testing.assert_array_equal(h, R(2, 3))
    for scale in (1e-12, 1e12):
        args = scale * R(0, STEPS, 12), scale * R(1, 12, 3), R(2, 3), R(3, 3)
        chex.assert_tree_all_finite(jax.grad(lambda *a: total(ops.lstm(*a)), (0, 1, 2, 3))(*args))


def test_what_does_not_fit():
    z, U, h = jnp.zeros((STEPS, 12)), jnp.zeros((12, 3)), jnp.zeros(3)
    for bad, match in [
        ((z, U.T, h, h), r"lstm: argument 'U' has shape \(3, 12\), wanted \(4 hidden, hidden\)"),
        ((z[0], U, h, h), r"lstm: argument 'z' has shape \(12,\), wanted \(steps, 12\)"),
        ((z, U, h, jnp.zeros(4)), r"lstm: argument 'c' has shape \(4,\), wanted \(3,\)"),
        ((z, U, h, h, jnp.ones(4, bool)), r"lstm: argument 'mask' has shape \(4,\), wanted \(5,\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            ops.lstm(*bad)
    with pytest.raises(TypeError, match="'mask' of shape .* has dtype float64, wanted booleans"):
        ops.lstm(z, U, h, h, jnp.ones(5))
    with pytest.raises(TypeError, match="'U' has dtype float32, wanted float64"):
        ops.lstm(z, U.astype(jnp.float32), h, h)
    with pytest.raises(TypeError, match="'z' .* wanted a real floating dtype"):
        ops.rnn(jnp.zeros((2, 3), int), jnp.zeros((3, 3)), h)
    with pytest.raises(ValueError, match="rnn: activation must be 'tanh' or 'relu'"):
        ops.rnn(z[:, :3], U[:3], h, activation="sigmoid")
    with pytest.raises(ValueError, match=r"lstm_cell: argument 'z' has shape \(5, 12\)"):
        ops.lstm_cell(z, h)
    with pytest.raises(ValueError, match=r"gru_cell: argument 'u' has shape \(12,\)"):
        ops.gru_cell(jnp.zeros(9), jnp.zeros(12), h)


@exhaustive
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_checked_by_differences(name):
    op, _, (step, *shapes) = SEQUENCES[name]
    args = (R(0, STEPS, *step), *(R(i, *s) for i, s in enumerate(shapes, 1)))
    fnn.check_grads(lambda *args: total(op(*args, MASK)), *args)


# ------------------------------------------------------------------------------------ layers

KEY = jax.random.key(0)
X = R(9, 7, 4)
LAYERS = [LSTM(3), GRU(3), RNN(3), RNN(3, activation="relu")]


@network(gate=Linear(3), new=Linear(3), drop=Dropout(0.5))
def minimal(net, h, x):
    """A minimal gated unit (Zhou et al. 2016)."""
    f = jax.nn.sigmoid(net.gate(jnp.concatenate([h, x])))
    h = (1 - f) * h + f * jnp.tanh(net.new(jnp.concatenate([f * h, x])))
    return h, net.drop(h)


OF_CELL = recurrent(minimal, lambda x: jnp.zeros(3, x.dtype))


@pytest.mark.parametrize("layer", sweep([*LAYERS, OF_CELL], [GRU(3), OF_CELL]), ids=repr)
def test_a_recurrent_layer(layer):
    """Masks, directions, checkpoints and the cache."""
    params = layer.init(KEY, X)
    junk = X.at[5:].set(jnp.nan)
    backward = replace(layer, reverse=True)

    def pieces(x):
        cache = layer.init_cache(7, x[:1])
        first, cache = layer.apply(params, cache, x[:1])
        second, cache = layer.apply(params, cache, x[1:5])
        third, cache = layer.apply(params, cache, x[5:])
        return jnp.concatenate([first, second, third]), cache["cache"]["carry"]

    @jax.jit
    def ways():
        return {
            "plain": layer(params, X),
            "length": layer(params, junk, 5),
            "mask": layer(params, junk, jnp.arange(7) < 5),
            "short": layer(params, X[:5]),
            "back": backward(params, junk, 5),
            "back short": backward(params, X[:5]),
            "flipped": layer(params, X[:5][::-1])[::-1],
            "remat": replace(layer, remat=True, return_carry=True)(params, X),
            "remat back": replace(backward, remat=True)(params, junk, 5),
            "carry": replace(layer, return_carry=True)(params, X),
            "pieces": pieces(X),
        }

    found = ways()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8)
    pad = lambda y: np.concatenate([y, np.zeros((2, 3))])
    assert found["plain"].shape == (7, 3)
    close(found["length"], pad(found["plain"][:5]))
    close(found["mask"], pad(found["short"]))
    close(found["back"], pad(found["flipped"]))
    close(found["back short"], found["flipped"])
    close(found["remat back"], found["back"])
    for way in ("remat", "carry", "pieces"):
        close(found[way][0], found["plain"])
        chex.assert_trees_all_close(found[way][1], found["carry"][1], rtol=1e-6)


@pytest.mark.parametrize("layer", sweep([*LAYERS, OF_CELL], [RNN(3)]), ids=repr)
def test_checkpoints_change_no_gradient(layer):
    """Of any number of steps."""
    params = layer.init(KEY, X)

    def gradient(n, **options):
        own = replace(layer, **options)
        return jax.grad(lambda p: jnp.sum(own(p, X[:n]) ** 2))(params)

    def both(remat):
        return [gradient(n, remat=remat, reverse=n == 7) for n in (1, 7)]

    both = jax.jit(both, static_argnums=0)
    chex.assert_trees_all_close(both(True), both(False), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("layer", sweep([*LAYERS, OF_CELL], [GRU(3)]), ids=repr)
def test_checkpoints_change_no_dtype(layer):
    """In 16 bits the carry is wider at the start than after a step."""
    layer = replace(layer, return_carry=True)
    params = layer.init(KEY, X)
    for dtype in (jnp.bfloat16, jnp.float16):
        small, x = jax.tree.map(lambda a, d=dtype: a.astype(d), (params, X))
        for options in ({}, {"reverse": True}):
            for n in (4, 5):
                plain, remat = (
                    jax.eval_shape(replace(layer, remat=remat, **options), small, x[:n])
                    for remat in (False, True)
                )
                assert plain == remat


def test_checkpoints_need_less_memory():
    x = jax.ShapeDtypeStruct((1024, 4), jnp.float32)
    temporaries = []
    for remat in (False, True):
        layer = LSTM(32, remat=remat)
        params = jax.eval_shape(layer.init, KEY, x)
        loss = lambda p, x, layer=layer: jnp.sum(layer(p, x)[-1])
        made = jax.jit(jax.grad(loss)).lower(params, x).compile()
        temporaries.append(made.memory_analysis().temp_size_in_bytes)
    assert temporaries[1] < temporaries[0] / 5


def test_as_pytorch_s():
    torch = pytest.importorskip("torch")
    x = np.array(X, np.float32)
    for layer, theirs in (
        (LSTM(3), torch.nn.LSTM(4, 3)),
        (GRU(3), torch.nn.GRU(4, 3)),
        (RNN(3), torch.nn.RNN(4, 3)),
    ):
        W, U, b, c = (p.detach().numpy() for p in theirs.parameters())
        params = {"W": W, "U": U, "b": b + c}
        if isinstance(layer, GRU):
            params = {"W": W, "U": U, "b": b + np.where(np.arange(9) < 6, c, 0), "b_n": c[6:]}
        y = layer({k: jnp.asarray(v, jnp.float32) for k, v in params.items()}, x)
        wanted = theirs(torch.from_numpy(x))[0].detach().numpy()
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)


@exhaustive
def test_as_flax_s():
    linen = pytest.importorskip("flax.linen")
    x = X.astype(jnp.float32)
    for layer, cell, gates, biased in (
        (LSTM(3), linen.OptimizedLSTMCell(3), "ifgo", "h"),
        (GRU(3), linen.GRUCell(3), "rzn", "i"),
    ):
        theirs = linen.RNN(cell)
        params = layer.init(KEY, X)
        params |= {"b": params["b"] + 0.5 * jnp.arange(len(params["b"]))}
        if layer.gates == 3:
            params["b_n"] = jnp.arange(3.0)
        ((name, made),) = theirs.init(KEY, x)["params"].items()
        own = {}
        for k, gate in enumerate(gates):
            rows = slice(3 * k, 3 * k + 3)
            own[f"i{gate}"] = {"kernel": params["W"][rows].T}
            own[f"h{gate}"] = {"kernel": params["U"][rows].T}
            own[biased + gate]["bias"] = params["b"][rows]
        if layer.gates == 3:
            own["hn"]["bias"] = params["b_n"]
        assert jax.tree.structure(own) == jax.tree.structure(made)
        own = jax.tree.map(lambda a: a.astype(jnp.float32), own)
        wanted = theirs.apply({"params": {name: own}}, x)
        np.testing.assert_allclose(layer(params, x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_a_memory_that_is_not_given_is_of_the_parameters_dtype(dtype):
    """At least float32, for an LSTM's c, and not of JAX's float, which is wider here."""
    for layer in (LSTM(3), LSTM(3, remat=True), GRU(3, remat=True), RNN(3)):
        own = jax.tree.map(lambda a: a.astype(dtype), layer.init(KEY, X))
        found = jax.eval_shape(replace(layer, return_carry=True), own, X.astype(dtype))
        wide = jnp.promote_types(dtype, jnp.float32)
        assert found[0].dtype == dtype
        assert {t.dtype for t in jax.tree.leaves(found[1])} <= {jnp.dtype(dtype), jnp.dtype(wide)}


def test_where_parameters_start():
    params = LSTM(64).init(KEY, jnp.zeros((5, 256)))
    U = np.asarray(params["U"]).reshape(4, 64, 64)
    eye = np.broadcast_to(np.eye(64), U.shape)
    np.testing.assert_allclose(U @ U.swapaxes(1, 2), eye, atol=1e-9)
    assert np.asarray(params["W"]).std() == pytest.approx(1 / 16, rel=0.05)
    np.testing.assert_array_equal(params["b"].reshape(4, 64)[:, 0], [0, 1, 0, 0])


@exhaustive
def test_layers_on_layers():
    net = chain(both=bidirectional(LSTM(3)), drop=Dropout(0.5), top=repeat(LSTM(6), 2))
    params = net.init(KEY, X)
    assert params["both"]["backward"]["W"].shape == (12, 4)
    assert params["top"]["U"].shape == (2, 24, 6)
    y = jax.jit(net)(params, X)
    forward, backward = params["both"]["forward"], params["both"]["backward"]
    both = LSTM(3)(forward, X), LSTM(3)(backward, X[::-1])[::-1]
    h = first = jnp.concatenate(both, axis=-1)
    for i in range(2):
        h = LSTM(6)(jax.tree.map(lambda a, i=i: a[i], params["top"]), h)
    np.testing.assert_allclose(y, h, rtol=1e-6)
    top, own = repeat(LSTM(6), 2), params["top"]

    @jax.jit
    def others():
        step, cache = top.apply(own, top.init_cache(7, first), first[:3])
        rest, _ = top.apply(own, cache, first[3:])
        return jnp.concatenate([step, rest]), top(own, first, 4), net(params, X, mode=training(KEY))

    pieces, masked, trained = others()
    np.testing.assert_allclose(pieces, y, rtol=1e-6)
    np.testing.assert_allclose(masked[:4], y[:4], rtol=1e-6)
    assert not np.allclose(trained, y)
    of_steps = [summary(LSTM(6), jnp.zeros((n, 4))).flops for n in (1, 40)]
    assert 40 * 2 * 24 * (4 + 6) < of_steps[1] < 1.1 * 40 * of_steps[0]


@pytest.mark.parametrize(
    "net",
    [
        chain(bidirectional(LSTM(3)), Dropout(0.5), bidirectional(GRU(2))),
        chain(LSTM(3), GRU(3, reverse=True), repeat(RNN(3, reverse=True), 2)),
        chain(below=chain(bidirectional(LSTM(2)), jnp.tanh), above=WeightNorm(LSTM(3))),
    ],
)
def test_a_chain_hands_the_mask_on(net):
    """Parameters that aren't those of the start, by whose biases no padding would be seen."""
    params = net.init(KEY, X, 4)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = lambda k, a: jax.random.normal(k, a.shape, a.dtype)
    params = jax.tree.unflatten(tree, list(map(draw, keys, leaves)))
    wanted = jax.jit(net)(params, X[:4])
    for mask in (4, jnp.arange(len(X)) < 4):
        found = jax.jit(net)(params, X.at[4:].set(jnp.nan), mask)
        np.testing.assert_allclose(found[:4], wanted, rtol=1e-5, atol=1e-6)
        assert not jnp.any(found[4:])
    np.testing.assert_array_equal(jax.jit(lambda p, x: net(p, x, mask=4))(params, X), found)
    with pytest.raises(TypeError, match=r"was given mask= beside 2 inputs, wanted one, a sequence"):
        net(params, X, 4, mask=4)


def test_a_chain_hands_nothing_else_on():
    """What the first part takes as its second input is its own, unless it is a mask."""
    net = chain(Attention(2), LSTM(3))
    x, memory = jnp.ones((5, 4)), jnp.ones((3, 4))
    params = net.init(KEY, x, memory)
    assert net(params, x, memory).shape == (5, 3)
    with pytest.raises(TypeError, match="was given mask=, but hands no mask on"):
        net(params, x, mask=3)


def test_a_cell_draws_anew_in_each_step():
    params = OF_CELL.init(KEY, X)
    dropped = np.asarray(OF_CELL(params, X, mode=training(KEY))) == 0
    assert dropped.any() and not (dropped == dropped[0]).all()
    again = np.asarray(replace(OF_CELL, remat=True)(params, X, mode=training(KEY))) == 0
    np.testing.assert_array_equal(again, dropped)


@pytest.mark.parametrize("remat", [False, True])
def test_a_cell_starts_from_its_own_start(remat):
    """With a cache and without; that of numpy's numbers too."""
    layer = recurrent(lambda h, x: (h + x, h + x), lambda x: np.array([1, -2.0]), remat=remat)
    x = R(0, 5, 2)
    wanted = np.array([1, -2]) + np.cumsum(x, 0)
    np.testing.assert_allclose(layer({}, x), wanted, rtol=1e-12)
    np.testing.assert_allclose(layer.apply({}, layer.init_cache(5, x), x)[0], wanted, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8"])
def test_the_number_of_steps_may_be_of_any_integer_dtype(dtype):
    layer = RNN(3)
    params = layer.init(KEY, X)
    with jax.numpy_dtype_promotion("strict"):
        found = layer(params, X, jnp.asarray(2, dtype))
    np.testing.assert_array_equal(found, layer(params, X, 2))


def test_a_key_is_used_once_and_looked_at_first():
    drawn = {}

    def note(name):
        def init(key, shape, dtype):
            drawn[name, len(drawn)] = jax.random.key_data(key).tolist()
            return jnp.zeros(shape, dtype)

        return init

    inits = {f"{kind}_init": note(kind) for kind in ("weight", "recurrent", "bias")}
    GRU(3, **inits).init(KEY, X)
    split_again = jax.random.key_data(jax.random.split(KEY, 3)).tolist()
    biases = [key for (name, _), key in drawn.items() if name == "bias"]
    assert len(biases) == 2 and biases[0] != biases[1]
    assert sum(key in split_again for key in drawn.values()) == 2  # W's, and b's
    with pytest.raises(TypeError, match=r"GRU\(3\)\.init: key must be"):
        GRU(3).init("a", X)


@exhaustive
@pytest.mark.parametrize("layer", sweep([LSTM(8), GRU(8), RNN(8)], [GRU(8)]), ids=repr)
def test_per_example_gradients_stay_factored(layer):
    """The weights meet the example in two products, whose factors are kept."""
    xs, mask = R(3, 4, 3, 6), jnp.asarray([True, True, False])
    params = layer.init(KEY, xs[0])
    loss = lambda p, x: jnp.sum(jnp.sin(layer(p, x, mask)))

    @jax.jit
    def both(params, xs):
        _, g = pe.grads(loss)(params, xs)
        wanted = jax.vmap(jax.grad(loss), (None, 0))(params, xs)
        return (pe.materialize(g), pe.norms(g)), wanted

    (found, norms), wanted = both(params, xs)
    chex.assert_trees_all_close(found, wanted, rtol=1e-9, atol=1e-12)
    flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])(wanted)
    np.testing.assert_allclose(norms, jnp.linalg.norm(flat, axis=1), rtol=1e-9)
    _, g = jax.eval_shape(pe.grads(loss), params, xs)
    kept = {row["path"]: row["kept"] for row in pe.explain(g)}
    rows = layer.gates * 8
    assert kept["['W']"] == f"A (3 × 6), G (3 × {rows})" or rows == 8
    assert kept["['U']"] == f"A (3 × 8), G (3 × {rows})"


# The operation, its arguments' shapes, the shapes of what the forward pass makes and keeps, and
# which arguments are read again: of a cell over 7 examples, and of a sequence of 7 steps.
KEPT = {
    "lstm_cell": (ops.lstm_cell, {"z": (7, 20), "c": (7, 5)}, [(7, 5), (7, 20)], ["c"]),
    "gru_cell": (
        ops.gru_cell,
        {"z": (7, 15), "u": (7, 15), "h": (7, 5)},
        [(7, 20)],
        ["h"],
    ),
    "lstm": (
        ops.lstm,
        {"z": (7, 20), "U": (20, 5), "h": (5,), "c": (5,)},
        [(7, 5), (7, 5), (7, 20)],
        ["U", "h", "c"],
    ),
    "gru": (
        ops.gru,
        {"z": (7, 15), "U": (15, 5), "b": (5,), "h": (5,)},
        [(7, 5), (7, 20)],
        ["U", "h"],
    ),
    "rnn": (ops.rnn, {"z": (7, 5), "U": (5, 5), "h": (5,)}, [(7, 5)], ["U", "h"]),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("dtype", sweep(["float32", "bfloat16"], ["bfloat16"]))
def test_what_is_kept(name, dtype):
    """The gates, 4 · hidden for each step (a GRU's with u's third), and what is carried; not z."""
    op, shapes, made, read = KEPT[name]
    args = [jnp.ones(shape, dtype) for shape in shapes.values()]
    found = fnn.memory(op, compiled=False)(*args).residuals
    assert found.arguments == read
    types = [kind for kept in found.made for kind in kept.types]
    assert sorted(types) == sorted(f"{dtype}[{', '.join(map(str, shape))}]" for shape in made)
    # By JAX's own transformation no more: beside these, at most numbers and empty arrays.
    leaves = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(op, *args)[1], *args))
    kept = [(x.shape, x.dtype) for x in leaves if x.size > 1]
    wanted = [(shape, jnp.dtype(dtype)) for shape in made + [shapes[arg] for arg in read]]
    assert sorted(kept, key=str) == sorted(wanted, key=str)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_mask_makes_no_more_to_be_kept(name):
    op, shapes, made, _ = KEPT[name]
    mask = jnp.arange(7) < 4
    args = [jnp.ones(shape, "float32") for shape in shapes.values()]
    found = fnn.memory(lambda *args: op(*args, mask), compiled=False)(*args)
    assert found.kept == sum(4 * np.prod(shape) for shape in made)


def test_the_gates_that_are_kept():
    """As they come out of σ and tanh: i, f, g, o; and r, q, n and u's third."""
    sigmoid = jax.nn.sigmoid
    i, f, g, o, c = (R(k, 7, 5) for k in range(5))
    gates_of = lambda op, *args: next(
        x for x in jax.tree.leaves(jax.vjp(op, *args)[1]) if x.shape == (7, 20)
    )
    found = gates_of(ops.lstm_cell, jnp.concatenate([i, f, g, o], 1), c)
    wanted = [sigmoid(i), sigmoid(f), jnp.tanh(g), sigmoid(o)]
    np.testing.assert_allclose(found, jnp.concatenate(wanted, 1), rtol=1e-12)
    z, u = R(0, 7, 15), R(1, 7, 15)
    found = gates_of(ops.gru_cell, z, u, c)
    (z_r, z_q, z_n), (u_r, u_q, u_n) = (jnp.split(x, 3, 1) for x in (z, u))
    r = sigmoid(z_r + u_r)
    wanted = [r, sigmoid(z_q + u_q), jnp.tanh(z_n + r * u_n), u_n]
    np.testing.assert_allclose(found, jnp.concatenate(wanted, 1), rtol=1e-12)


@network(gate=Linear(32), new=Linear(32))
def gated_cell(net, h, x):
    f = jax.nn.sigmoid(net.gate(jnp.concatenate([h, x])))
    h = (1 - f) * h + f * jnp.tanh(net.new(jnp.concatenate([f * h, x])))
    return h, h


OF_STEPS = {  # the layer, and what is kept of each weight, of six steps of 24 features
    "bidirectional": (
        bidirectional(LSTM(32)),
        {
            f"['{way}']['{weight}']": f"A (6 × {ins}), G (6 × 128)"
            for way in ("forward", "backward")
            for weight, ins in (("W", 24), ("U", 32))
        },
    ),
    "a cell of one's own": (
        recurrent(gated_cell, lambda x: jnp.zeros(32)),
        {f"['{part}']['W']": "A (6 × 56), G (6 × 32)" for part in ("gate", "new")},
    ),
}


@pytest.mark.parametrize("name", OF_STEPS)
def test_weights_of_steps_stay_factored(name):
    """By a row for each step; all but the weights is dense."""
    layer, wanted = OF_STEPS[name]
    xs = R(3, 4, 6, 24)
    loss = lambda p, x: jnp.sum(jnp.sin(layer(p, x)))
    _, g = jax.eval_shape(pe.grads(loss), layer.init(KEY, xs[0]), xs)
    assert {r["path"]: r["kept"] for r in pe.explain(g) if r["kept"] != "dense"} == wanted


@exhaustive
@pytest.mark.parametrize("name", OF_STEPS)
def test_per_example_gradients_of_steps(name):
    layer, _ = OF_STEPS[name]
    xs = R(3, 4, 6, 24)
    params = jax.tree.map(lambda p: R(4, *p.shape) / 4, layer.init(KEY, xs[0]))
    loss = lambda p, x: jnp.sum(jnp.sin(layer(p, x)))
    found = jax.jit(lambda p, b: pe.materialize(pe.grads(loss)(p, b)[1]))(params, xs)
    wanted = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, xs)
    chex.assert_trees_all_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_per_example_gradients_of_operations_of_ones_own():
    """The product in either order, and rearranged; one that isn't a product stays dense."""

    @fnn.rule
    def times(v, w, s, x):
        return (x @ v) * (x @ w.T) * s

    @times.backward
    def _(residuals, g):
        v, w, s, x = residuals
        a, b = x @ v, x @ w.T
        return x.T @ (g * b * s), (x.T @ (g * a * s)).T, jnp.sum(g * a * b, 0), None

    p, xs = {"v": R(0, 5, 4), "w": R(1, 4, 5), "s": R(2, 4)}, R(3, 3, 2, 5)
    loss = lambda p, x: jnp.sum(times(p["v"], p["w"], p["s"], x))
    _, g = pe.grads(loss)(p, xs)
    wanted = jax.vmap(jax.grad(loss), (None, 0))(p, xs)
    chex.assert_trees_all_close(pe.materialize(g), wanted, rtol=1e-9)
    kept = {row["path"]: row["kept"] for row in pe.explain(g)}
    factors = "A (2 × 5), G (2 × 4)"
    assert kept == {"['v']": factors, "['w']": factors, "['s']": "dense"}


def test_per_example_gradients_of_an_operation_mapped_over_groups():
    """A product over two axes at once, of a weight that is made of the parameter."""
    xs, p = R(3, 4, 2, 3, 16), {"U": R(4, 4, 16) / 4}

    def loss(p, x):
        U, zero = p["U"].T / 2, jnp.zeros(4)
        return jnp.sum(jax.vmap(lambda z: ops.lstm(z, U, zero, zero)[0])(x) ** 2)

    @jax.jit
    def both():
        return pe.materialize(pe.grads(loss)(p, xs)[1]), jax.vmap(jax.grad(loss), (None, 0))(p, xs)

    chex.assert_trees_all_close(*both(), rtol=1e-9)
    _, g = jax.eval_shape(pe.grads(lambda p, x: loss(p, x[:, :1])), p, xs)
    assert "A (2 × 4), G (2 × 16)" in str(pe.explain(g))


@exhaustive
@pytest.mark.parametrize("layer", [LSTM(2), GRU(2), RNN(2), OF_CELL], ids=repr)
def test_kronecker_factors(layer):
    """Of one step, where Kronecker's approximation of the weights' block is the block."""
    xs = R(3, 1, 1, 2)
    params = layer.init(KEY, xs[0])
    carry = jax.tree.map(lambda a: jnp.arange(1.0, 1 + a.size), layer.start(xs[0, 0]))
    model = lambda p, x: jnp.sum(layer(p, x, None, carry), keepdims=True)[0, 0]
    square = lambda y, _: y**2
    found = fnn.curvature.kronecker_factors(model, square)(params, (xs, jnp.zeros(1)))
    if layer is not OF_CELL:
        assert all(isinstance(found[name], fnn.curvature.Kronecker) for name in "WU"), found
    flat, unravel = ravel_pytree(params)
    J = jax.grad(lambda v: model(unravel(v), xs[0]))(flat)
    ggn = 2 * np.outer(J, J)
    leaves = jax.tree.leaves(found, is_leaf=lambda f: hasattr(f, "to_dense"))
    start = 0
    for leaf, p in zip(leaves, jax.tree.leaves(params), strict=True):
        here = slice(start, start := start + p.size)
        np.testing.assert_allclose(leaf.to_dense(), ggn[here, here], rtol=1e-8, atol=1e-10)


def test_wrong_shapes_of_layers():
    net = chain(top=LSTM(3))
    params = net.init(KEY, X)
    for x, match in [
        (X[:, :3], r"^top: LSTM\(3\) has a W of shape \(12, 4\).*\(steps, 4\), but got \(7, 3\)"),
        (X[0], r"^top: LSTM\(3\) wants a sequence of shape \(steps, in\).* shape \(4,\)"),
    ]:
        with pytest.raises(LayerError, match=match):
            net(params, x)
    layer, own = LSTM(3), params["top"]
    for args, match in [
        ((X, jnp.ones(6, bool)), r"mask of booleans of shape \(7,\).*bool of shape \(6,\)"),
        ((X, None, jnp.zeros(3)), r"carries \(float64\[3\].*but got float64\[3\]"),
    ]:
        with pytest.raises(LayerError, match=match):
            layer(own, *args)
    with pytest.raises(TypeError, match=r"^LSTM\(3\): mask must be an array, but got \[True"):
        layer(own, X, [True] * 7)
    with pytest.raises(LayerError, match=r"U of shape \(12, 3\), but got one of shape \(3, 12\)"):
        layer(own | {"U": own["U"].T}, X)
    with pytest.raises(LayerError, match="has no cache"):
        LSTM(3, reverse=True).init_cache(3, X)
    with pytest.raises(LayerError, match="both a cache"):
        layer.apply(own, layer.init_cache(3, X), X, None, layer.start(X[0]))
    growing = recurrent(lambda h, x: (jnp.zeros(4), x), lambda x: jnp.zeros(3))
    with pytest.raises(LayerError, match=r"recurrent\(.*carries float64\[3\].*got float64\[4\]"):
        growing({}, X)
    with pytest.raises(TypeError, match="bidirectional: forward must be a recurrent layer"):
        bidirectional(Linear(3))


AROUND = {
    "WeightNorm": layers.WeightNorm,
    "SpectralNorm": layers.SpectralNorm,
    "DropConnect": lambda layer: layers.DropConnect(layer, 0.5),
}


@pytest.mark.parametrize("name", sweep(AROUND, ["DropConnect"]))
def test_a_layer_around_another_s_weight_keeps_its_cache(name):
    net = layers.chain(layers.SinusoidalPositions(), AROUND[name](layers.RNN(3)))
    x = jax.random.normal(jax.random.key(0), (5, 2))
    params, state = net.init(jax.random.key(1), x), net.init_state(x)
    whole, _ = net.apply(params, state, x)
    cache, found = net.init_cache(5, x), []
    for piece in (x[:2], x[2:]):
        y, cache = net.extend(params, cache, piece)
        found.append(y)
    np.testing.assert_allclose(jnp.concatenate(found), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [-1, 5])
def test_more_steps_than_there_are_do_not_count(count):
    layer, x = layers.LSTM(3), jnp.ones((4, 2))
    params = layer.init(jax.random.key(0), x)
    with pytest.raises(layers.LayerError, match=f"told that {count} steps count, .* has 4"):
        layer(params, x, count)
