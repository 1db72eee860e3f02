"""GPT-2, Llama, BERT, ViT and the encoder-decoder transformer."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive, sweep

import fnn
from fnn import layers, models
from fnn.models.generation import likely

KEY = jax.random.key(0)
TOKENS = jnp.asarray([3, 1, 4, 1, 5], jnp.int32)
VOCABULARY = 11


def tiny_gpt2(depth=2, length=12):
    return models.gpt2(VOCABULARY, length, features=8, depth=depth, heads=2)


def tiny_llama(depth=2):
    return models.llama(VOCABULARY, features=8, depth=depth, heads=4, kv_heads=2, hidden=12)


def tiny_transformer():
    return models.transformer(VOCABULARY, features=8, depth=2, heads=2, hidden=12)


LANGUAGE = {"gpt2": tiny_gpt2(), "llama": tiny_llama()}


def params_of(net, *xs):
    """Large enough for the tokens to matter."""
    return jax.tree.map(lambda x: 3 * x, net.init(KEY, *xs))


WORDS = jax.ShapeDtypeStruct((4,), jnp.int32)
COUNTS = {
    "gpt2": (models.gpt2, (WORDS,), 124_439_808),
    "llama": (models.llama, (WORDS,), 6_738_415_616),
    "bert": (models.bert, (WORDS,), 109_482_240),
    "vit": (models.vit, (jax.ShapeDtypeStruct((224, 224, 3), jnp.float32),), 86_567_656),
}


@pytest.mark.parametrize("name", COUNTS)
def test_as_many_parameters_as_published(name):
    make, xs, count = COUNTS[name]
    params = jax.eval_shape(make().init, KEY, *xs)
    assert sum(x.size for x in jax.tree.leaves(params)) == count


@exhaustive
@pytest.mark.parametrize("name", sweep(LANGUAGE, ["llama"]))
def test_the_program_is_as_long_for_any_depth(name):
    make = {"gpt2": tiny_gpt2, "llama": tiny_llama}[name]

    def equations(depth):
        net = make(depth)
        loss = lambda params: jnp.sum(net(params, TOKENS, TOKENS))
        return str(jax.make_jaxpr(jax.grad(loss))(net.init(KEY, TOKENS))).count("\n")

    assert equations(2) == equations(24)


@exhaustive
@pytest.mark.parametrize("name", sweep(LANGUAGE, ["gpt2"]))
def test_losses_of_targets(name):
    """As those of the logits."""
    net = LANGUAGE[name]
    params, targets = params_of(net, TOKENS), TOKENS[::-1]
    logits = net(params, TOKENS)
    wanted = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    chex.assert_trees_all_close(net(params, TOKENS, targets), wanted, rtol=1e-4, atol=1e-5)


@exhaustive
@pytest.mark.parametrize("name", sweep([*LANGUAGE, "transformer"], ["llama"]))
def test_generation_is_the_network_s(name):
    """The likeliest token each time, as found by passes over the whole text."""
    net = LANGUAGE.get(name) or tiny_transformer()
    inputs = () if name in LANGUAGE else (TOKENS[:3],)
    params = params_of(net, *inputs, TOKENS)
    found = models.generate(net, params, TOKENS, 6, temperature=0, inputs=inputs)
    text = jnp.zeros(11, jnp.int32).at[:5].set(TOKENS)
    whole = jax.jit(net)
    for i in range(5, 11):
        best = jnp.argmax(whole(params, *inputs, text)[i - 1])
        text = text.at[i].set(best.astype(jnp.int32))
    np.testing.assert_array_equal(found, text[5:])
    drawn = models.generate(net, params, TOKENS, 6, KEY, top_k=1, inputs=inputs)
    np.testing.assert_array_equal(drawn, found)


@exhaustive
def test_translation_step_by_step():
    """As at once; the source is encoded in the first step, and not looked at again."""
    net, source, mask = tiny_transformer(), TOKENS[::-1], jnp.arange(5) != 2
    params = params_of(net, source, TOKENS)

    @jax.jit
    def both(params):
        cache = net.init_cache(5, source, TOKENS, mask)
        y, cache = net.extend(params, cache, source, TOKENS[:2], mask)

        def step(cache, token):
            y, cache = net.extend(params, cache, jnp.zeros_like(source), token[None], mask)
            return cache, y[0]

        _, ys = jax.lax.scan(step, cache, TOKENS[2:])
        return jnp.concatenate([y, ys]), net(params, source, TOKENS, mask)

    steps, whole = both(params)
    np.testing.assert_allclose(steps, whole, rtol=1e-6, atol=1e-9)
    sources = jnp.stack([source, TOKENS])
    many = jax.vmap(
        lambda s: models.generate(net, params, TOKENS[:1], 4, temperature=0, inputs=(s,))
    )
    for found, one in zip(many(sources), sources, strict=True):
        alone = models.generate(net, params, TOKENS[:1], 4, temperature=0, inputs=(one,))
        np.testing.assert_array_equal(found, alone)


def test_what_is_likely():
    logits = jnp.log(jnp.asarray([0.1, 0.4, 0.2, 0.3]))
    kept = lambda **options: list(
        jnp.isfinite(likely(logits, **{"top_k": None, "top_p": None} | options))
    )
    assert kept() == [True] * 4
    assert kept(top_k=2) == [False, True, False, True]
    assert kept(top_k=9) == [True] * 4
    assert kept(top_p=0.39) == [False, True, False, False]
    assert kept(top_p=0.65) == [False, True, False, True]
    assert kept(top_p=0.75) == [False, True, True, True]
    # Of the two likeliest the first has more than half.
    assert kept(top_k=2, top_p=0.5) == [False, True, False, False]


@exhaustive
def test_generation_draws():
    net = tiny_gpt2(depth=1)
    params = params_of(net, TOKENS)
    keys = jax.random.split(KEY, 400)
    first = jax.vmap(lambda k: models.generate(net, params, TOKENS, 1, k, temperature=2.0))(keys)
    p = jax.nn.softmax(net(params, TOKENS)[-1] / 2)
    frequencies = np.bincount(np.asarray(first)[:, 0], minlength=VOCABULARY) / 400
    assert np.max(np.abs(frequencies - p)) < 0.1
    for wrong, options in (
        ("key must be given", {}),
        ("temperature must be", {"key": KEY, "temperature": -1.0}),
        ("top_k must be", {"key": KEY, "top_k": 0}),
        ("top_p must be", {"key": KEY, "top_p": 1.5}),
    ):
        with pytest.raises(ValueError, match=f"generate: {wrong}"):
            models.generate(net, params, TOKENS, 2, **options)
    with pytest.raises(ValueError, match="generate: prompt must be at least one token"):
        models.generate(net, params, TOKENS[:0], 2, KEY)
    with pytest.raises(TypeError, match=r"generate: inputs must be a tuple, \(source,\), but"):
        models.generate(net, params, TOKENS, 2, KEY, inputs=TOKENS)
    for wrong in (-1, VOCABULARY):
        with pytest.raises(
            ValueError, match=rf"prompt holds {wrong}, but .* 0, \.\.\., {VOCABULARY - 1}"
        ):
            models.generate(net, params, TOKENS.at[1].set(wrong), 2, KEY)
    with pytest.raises(
        layers.LayerError, match="has 12 positions, fewer than a cache of length 13"
    ):
        models.generate(net, params, TOKENS, 9, KEY)
    # The last token is drawn, and needs no position.
    whole = jnp.append(TOKENS, models.generate(net, params, TOKENS, 8, temperature=0))
    assert whole.size == 13
    np.testing.assert_array_equal(jnp.argmax(net(params, whole[:12])[4:], -1), whole[5:])


@exhaustive
def test_the_future_stays_hidden():
    """What comes later in the text changes nothing before; of the source all counts but masked."""
    net = tiny_transformer()
    source, mask = TOKENS, jnp.arange(5) != 2
    params = params_of(net, source, TOKENS)
    f = jax.jit(lambda source, tokens: net(params, source, tokens, mask))
    y = f(source, TOKENS)
    later = f(source, TOKENS.at[3].set(7))
    np.testing.assert_allclose(y[:3], later[:3], rtol=1e-5)
    assert jnp.max(jnp.abs(y[3:] - later[3:])) > 1e-3
    np.testing.assert_allclose(y, f(source.at[2].set(9), TOKENS), rtol=1e-5)
    assert jnp.max(jnp.abs(y - f(source.at[1].set(9), TOKENS))) > 1e-3


@exhaustive
def test_bert_reads_both_ways():
    net = models.bert(VOCABULARY, 8, features=8, depth=2, heads=2, hidden=12)
    params = params_of(net, TOKENS)
    f = jax.jit(lambda tokens, mask: net(params, tokens, None, mask))
    every, some = jnp.ones(5, bool), jnp.arange(5) < 4
    x, pooled = f(TOKENS, every)
    changed, _ = f(TOKENS.at[4].set(9), every)
    assert jnp.max(jnp.abs(x[0] - changed[0])) > 1e-4
    short, of_short = net(params, TOKENS[:4])
    np.testing.assert_allclose(f(TOKENS, some)[0][:4], short, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(f(TOKENS, some)[1], of_short, rtol=1e-4, atol=1e-5)


@exhaustive
def test_vit_s_patches_are_a_convolution():
    net = models.vit(3, image=8, patch=4, features=6, depth=1, heads=2, hidden=8)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 2)))
    params = net.init(KEY, x)
    parts = dict(net.parts)
    found = parts["patches"](params["patches"], parts["cut"]({}, x))
    kernel = params["patches"]["W"].reshape(6, 2, 4, 4)
    wanted = lax.conv(x.transpose(2, 0, 1)[None], kernel, (4, 4), "VALID")[0]
    np.testing.assert_allclose(found, wanted.reshape(6, 4).T, rtol=1e-5, atol=1e-6)
    assert net(params, x).shape == (3,)
    with pytest.raises(layers.LayerError, match=r"wants an image of shape \(8, 8, channels\)"):
        net(params, x[:4])


def test_vit_on_an_explicit_mesh():
    net = models.vit(3, image=4, patch=2, features=4, depth=1, heads=2, hidden=6)
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 4, 2)))
    params = net.init(KEY, xs[0])
    loss = lambda params, xs: jnp.sum(jnp.sin(jax.vmap(lambda x: net(params, x))(xs)))
    wanted = jax.jit(jax.value_and_grad(loss))(params, xs)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(xs, NamedSharding(mesh, P("data")))
        params = jax.device_put(params, NamedSharding(mesh, P()))
        found = jax.jit(jax.value_and_grad(loss))(params, sharded)
    chex.assert_trees_all_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_options():
    for make, words in (
        (lambda: models.gpt2(heads=7), "gpt2: heads must divide features, 768, but got 7"),
        (lambda: models.llama(depth=0), "llama: depth must be"),
        (lambda: models.llama(base=0), "llama: base must be"),
        (lambda: models.vit(patch=15), "vit: patch must divide image, 224, but got 15"),
        (lambda: models.vit(depth=0), "vit: depth must be"),
        (lambda: models.bert(segments=0), "bert: segments must be"),
        (lambda: models.bert(dropout=2.0), "bert: dropout must be"),
        (lambda: models.gpt2(dropout=float("nan")), "gpt2: dropout must be"),
        (lambda: models.transformer(features=-1), "transformer: features must be"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


@exhaustive
@pytest.mark.parametrize("name", LANGUAGE)
def test_per_example_gradients_of(name):
    """Factored, but for biases and scales; as those of one example after the other."""
    net = LANGUAGE[name]
    texts = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (3, 3)), jnp.int32)
    params = params_of(net, texts[0])
    loss = lambda params, text: jnp.mean(net(params, text[:-1], text[1:]))
    _, found = jax.jit(fnn.per_example.grads(loss))(params, texts)
    wanted = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, texts)
    chex.assert_trees_all_close(fnn.per_example.materialize(found), wanted, rtol=1e-3, atol=1e-5)
    norms = jnp.sqrt(sum(jnp.sum(x.reshape(3, -1) ** 2, 1) for x in jax.tree.leaves(wanted)))
    np.testing.assert_allclose(fnn.per_example.norms(found), norms, rtol=1e-4)
    kept = {row["path"]: row["kept"] for row in fnn.per_example.explain(found)}
    for path, how in kept.items():
        if "blocks" in path and "['W']" in path:
            assert "A (" in how, (path, how)


@exhaustive
@pytest.mark.parametrize("name", LANGUAGE)
def test_exported_for_accelerators(name):
    net = LANGUAGE[name]
    params = net.init(KEY, TOKENS)
    loss = jax.jit(jax.value_and_grad(lambda params, x: jnp.mean(net(params, x, x))))
    generated = jax.jit(lambda params, x: models.generate(net, params, x, 4, KEY, top_p=0.9))
    for f in (loss, generated):
        assert jax.export.export(f, platforms=["cuda", "tpu"])(params, TOKENS).nr_devices == 1


@exhaustive
def test_a_gpt_learns_by_heart():
    net = tiny_gpt2()
    texts = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (4, 8)), jnp.int32)

    def loss(params, text, mode):
        return jnp.mean(net(params, text[:-1], text[1:], mode=mode))

    result = fnn.fit(
        loss, net.init(KEY, texts[0]), texts, optimizer=optax.adam(1e-2), epochs=300, batch_size=4,
        key=KEY,
    )  # fmt: skip
    params = result.params
    losses = [float(jnp.mean(net(params, t[:-1], t[1:]))) for t in texts]
    assert max(losses) < 1, losses


def test_numbers_of_generation_may_be_of_any_dtype():
    net = tiny_gpt2(depth=1)
    params = params_of(net, TOKENS)
    draw = lambda **options: models.generate(net, params, TOKENS, 3, KEY, **options)
    wanted = draw(temperature=0.5, top_p=0.75)
    for dtype in ("float16", "float32", "float64"):
        with jax.numpy_dtype_promotion("strict"):
            found = draw(temperature=jnp.asarray(0.5, dtype), top_p=jnp.asarray(0.75, dtype))
        np.testing.assert_array_equal(found, wanted)


def test_of_equal_logits_no_more_are_likely_than_asked_for():
    for options in ({"top_k": 2, "top_p": None}, {"top_k": None, "top_p": 0.4}):
        np.testing.assert_array_equal(likely(jnp.ones(5), **options) == 1, [1, 1, 0, 0, 0])


@exhaustive
def test_a_temperature_of_almost_nothing_takes_the_likeliest():
    net = models.gpt2(50, 16, features=8, depth=1, heads=2)
    tokens = jnp.arange(4)
    params = jax.tree.map(lambda a: 30 * a, net.init(KEY, tokens))
    wanted = models.generate(net, params, tokens, 4, temperature=0)
    draw = lambda t: models.generate(net, params, tokens, 4, KEY, temperature=t)
    found = jax.vmap(draw)(jnp.asarray([0.0, 1e-44, 1e-37, 1e-3]))
    np.testing.assert_array_equal(found, np.broadcast_to(wanted, (4, 4)))


def test_heads_of_a_vision_transformer_divide_its_features():
    with pytest.raises(ValueError, match="heads must divide features, 10, but got 3"):
        models.vit(10, image=8, patch=4, features=10, depth=1, heads=3)


# ------------------------------------------------------- the papers' formulas, written in NumPy


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def affine(p, x):
    return x @ p["W"].T + p["b"]


def normalised(p, x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return p["scale"] * centred / np.sqrt(variance + epsilon) + p["bias"]


def attended(p, x, memory, allowed, heads):
    """softmax(q kᵀ / √features) v of each head, side by side, and the product with the output's."""
    q, k, v = affine(p["q"], x), affine(p["k"], memory), affine(p["v"], memory)
    found = []
    for part in np.split(np.arange(q.shape[1]), heads):
        scores = q[:, part] @ k[:, part].T / np.sqrt(len(part))
        found.append(softmax(np.where(allowed, scores, -np.inf)) @ v[:, part])
    return affine(p["out"], np.concatenate(found, 1))


def feed_forward(p, x, activation):
    return affine(p["output"], activation(affine(p["hidden"], x)))


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def relu(x):
    return np.maximum(x, 0)


def encoder_block(p, x, mask, heads, activation, epsilon):
    x = normalised(p["norm1"], x + attended(p["attend"], x, x, mask, heads), epsilon)
    return normalised(p["norm2"], x + feed_forward(p["mlp"], x, activation), epsilon)


def decoder_block(p, y, x, mask, heads):
    past = np.tril(np.ones((len(y), len(y)), bool))
    y = normalised(p["norm1"], y + attended(p["attend"], y, y, past, heads), 1e-5)
    y = normalised(p["norm2"], y + attended(p["cross"], y, x, mask, heads), 1e-5)
    return normalised(p["norm3"], y + feed_forward(p["mlp"], y, relu), 1e-5)


def layers_of(stacked):
    depth = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(depth)]


def of_bert(p, tokens, segments, mask, heads):
    x = p["embed"]["E"][tokens] + p["position"]["P"][: len(tokens)] + p["segment"]["E"][segments]
    x = normalised(p["norm"], x, 1e-12)
    for block in layers_of(p["blocks"]):
        x = encoder_block(block, x, mask, heads, gelu, 1e-12)
    return x, np.tanh(affine(p["pooler"], x[0]))


def of_transformer(p, source, tokens, mask, heads):
    E = p["embed"]["E"]
    features = E.shape[1]

    def embedded(tokens):
        x = np.sqrt(features) * E[tokens]
        for t in range(len(tokens)):
            for i in range(0, features, 2):
                angle = t / 10000 ** (i / features)
                x[t, i : i + 2] += math.sin(angle), math.cos(angle)
        return x

    x, y = embedded(source), embedded(tokens)
    for block in layers_of(p["encoder"]):
        x = encoder_block(block, x, mask, heads, relu, 1e-5)
    for block in layers_of(p["decoder"]):
        y = decoder_block(block, y, x, mask, heads)
    return y @ E.T


def random_params(net, *xs):
    """All random, biases and norms' scales too, in float64."""
    rng = np.random.default_rng(1)
    types = jax.eval_shape(net.init, KEY, *xs)
    return jax.tree.map(lambda a: 0.6 * rng.normal(size=a.shape), types)


def test_bert_is_the_formula():
    """Learned positions, segments, norms after the sums, a mask of padding, gelu, the pooler."""
    net = models.bert(VOCABULARY, 8, features=6, depth=2, heads=3, hidden=10)
    tokens, segments = np.array([3, 1, 4, 1, 5, 9]), np.array([0, 0, 1, 1, 1, 0])
    params = random_params(net, tokens)
    for mask in (np.ones(6, bool), np.arange(6) < 4, np.arange(6) != 2):
        found = jax.jit(net)(params, tokens, segments, mask)
        wanted = of_bert(params, tokens, segments, mask, 3)
        chex.assert_trees_all_close(found, wanted, rtol=1e-10, atol=1e-10)
        assert found[0].dtype == found[1].dtype == np.float64
    plain, _ = net(params, tokens)
    wanted, _ = of_bert(params, tokens, np.zeros(6, int), np.ones(6, bool), 3)
    np.testing.assert_allclose(plain, wanted, rtol=1e-10, atol=1e-10)


def test_the_encoder_decoder_is_the_formula():
    """Sinusoidal positions, one embedding for all, a causal decoder, attention to the source."""
    net = models.transformer(VOCABULARY, features=6, depth=2, heads=3, hidden=10)
    source, tokens = np.array([3, 1, 4, 1, 5, 9, 2]), np.array([2, 7, 1, 8])
    params = random_params(net, source, tokens)
    for mask in (np.ones(7, bool), np.arange(7) < 4, np.arange(7) != 2):
        found = jax.jit(net)(params, source, tokens, mask)
        wanted = of_transformer(params, source, tokens, mask, 3)
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)
        assert found.dtype == np.float64
