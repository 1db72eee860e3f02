"""PyTorch's parameters as ours: the outputs are those of its modules, and of their formulas."""

import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from sweeps import exhaustive

from fnn import models
from fnn import params as by_path

TOKENS = np.arange(7) * 3 % 11


def gpt2():
    return models.gpt2(11, 16, features=8, depth=2, heads=2, dropout=0.0)


def llama():
    return models.llama(11, features=8, depth=2, heads=4, kv_heads=2, hidden=12)


def vit():
    return models.vit(5, 8, 4, features=8, depth=2, heads=2, hidden=16, dropout=0.0)


def resnet():
    return models.resnet((1, 2), 5, features=4)


INPUTS = {
    "gpt2": (gpt2, TOKENS),
    "llama": (llama, TOKENS),
    "vit": (vit, np.random.default_rng(0).normal(size=(8, 8, 3))),
    "resnet": (resnet, np.random.default_rng(0).normal(size=(32, 32, 3))),
}


def drawn(name, seed=0):
    """A model, and parameters and a state of no special values, unlike those it begins with."""
    make, x = INPUTS[name]
    net = make()
    types = jax.eval_shape(lambda: (net.init(jax.random.key(0), x), net.init_state(x)))
    rng = np.random.default_rng(seed)
    draw = lambda t: jnp.asarray(0.5 + np.abs(rng.normal(size=t.shape)) / 4, t.dtype)
    return net, *jax.tree.map(draw, types)


LIBRARIES = [
    ("gpt2", "transformers"),
    ("llama", "transformers"),
    ("vit", "torchvision"),
    ("vit", "transformers"),
    ("vit", "transformers 5"),
    ("resnet", "torchvision"),
]


@pytest.mark.parametrize("name, library", LIBRARIES)
def test_there_and_back(name, library):
    net, params, state = drawn(name)
    theirs = models.to_torch(params, net, state, library=library)
    assert all(type(a) is np.ndarray and a.flags["C_CONTIGUOUS"] for a in theirs.values())
    again = models.load_torch(theirs, net)
    chex.assert_trees_all_equal_structs(again, (params, state))
    chex.assert_trees_all_equal(again, (params, state))


# --------------------------------------------------------------- their formulas, by their names


def layer_norm(w, name, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def gpt2_in_numpy(w, tokens, heads):
    """GPT-2 with transformers' names, whose matrices are (in, out)."""
    conv = lambda name, x: x @ w[f"{name}.weight"] + w[f"{name}.bias"]
    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][: len(tokens)]
    depth = sum(name.endswith("ln_1.weight") for name in w)
    for i in range(depth):
        at = f"transformer.h.{i}"
        h = conv(f"{at}.attn.c_attn", layer_norm(w, f"{at}.ln_1", x))
        q, k, v = (
            np.moveaxis(a.reshape(len(tokens), heads, -1), 0, 1) for a in np.split(h, 3, axis=-1)
        )
        scores = q @ np.swapaxes(k, 1, 2) / math.sqrt(q.shape[-1])
        scores = np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf)
        y = np.moveaxis(softmax(scores) @ v, 0, 1).reshape(len(tokens), -1)
        x = x + conv(f"{at}.attn.c_proj", y)
        h = conv(f"{at}.mlp.c_fc", layer_norm(w, f"{at}.ln_2", x))
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + conv(f"{at}.mlp.c_proj", h)
    return layer_norm(w, "transformer.ln_f", x) @ w["lm_head.weight"].T


@exhaustive
def test_gpt2_by_its_formula():
    rng = np.random.default_rng(0)
    net = gpt2()
    theirs = {
        name: rng.normal(size=a.shape) / 2
        for name, a in models.to_torch(*drawn("gpt2")[1::-1]).items()
    }
    theirs["lm_head.weight"] = theirs["transformer.wte.weight"]
    params, _ = models.load_torch(theirs, net)
    want = gpt2_in_numpy(theirs, TOKENS, heads=2)
    np.testing.assert_allclose(net(params, TOKENS), want, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------- their modules


def extra(name):
    return pytest.importorskip(name, reason=f"no {name}: pip install -e '.[compare]'")


def compare(net, module, ours, x, theirs=lambda y: y, library="transformers"):
    """Random weights of a module, loaded: the same output; and ours, loaded by the module."""
    torch = extra("torch")
    torch.manual_seed(0)
    for w in module.parameters():
        w.data = 0.5 + 0.3 * torch.rand_like(w) if w.ndim < 2 else 0.3 * torch.randn_like(w)
    module.eval()
    params, state = models.load_torch(module.state_dict(), net)
    with torch.no_grad():
        want = theirs(module(x)).numpy()[0]
    np.testing.assert_allclose(net.apply(params, state, ours)[0], want, rtol=2e-3, atol=2e-4)
    names = set(module.state_dict())
    made = next(
        found
        for library in (library, f"{library} 5")
        if set(found := models.to_torch(params, net, state, library=library)) == names
    )
    module.load_state_dict({name: torch.from_numpy(a) for name, a in made.items()})
    with torch.no_grad():
        again = theirs(module(x)).numpy()[0]
    np.testing.assert_allclose(again, want, rtol=1e-5, atol=1e-6)


@exhaustive
def test_gpt2_of_transformers():
    transformers, torch = extra("transformers"), extra("torch")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2, attn_pdrop=0, embd_pdrop=0
    )
    module = transformers.GPT2LMHeadModel(config)
    compare(gpt2(), module, TOKENS, torch.from_numpy(TOKENS[None]), lambda y: y.logits)
    bare = transformers.GPT2Model(config).eval()  # without a head, and so without a prefix
    chex.assert_trees_all_equal_shapes(
        models.load_torch(bare.state_dict(), gpt2())[0], drawn("gpt2")[1]
    )


@exhaustive
def test_llama_of_transformers():
    transformers, torch = extra("transformers"), extra("torch")
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
    )
    module = transformers.LlamaForCausalLM(config)
    compare(llama(), module, TOKENS, torch.from_numpy(TOKENS[None]), lambda y: y.logits)


@exhaustive
def test_vit_of_transformers():
    transformers, torch = extra("transformers"), extra("torch")
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=5,
        layer_norm_eps=1e-6,
    )
    module = transformers.ViTForImageClassification(config)
    x = INPUTS["vit"][1]
    theirs = torch.from_numpy(np.moveaxis(x, -1, 0)[None].copy()).float()
    compare(vit(), module, x, theirs, lambda y: y.logits)


@exhaustive
def test_vit_of_torchvision():
    torchvision, torch = extra("torchvision"), extra("torch")
    module = torchvision.models.VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=5)
    x = INPUTS["vit"][1]
    theirs = torch.from_numpy(np.moveaxis(x, -1, 0)[None].copy()).float()
    compare(vit(), module, x, theirs, library="torchvision")


@exhaustive
@pytest.mark.parametrize("depth", [18, 50])
def test_resnets_of_torchvision(depth):
    torchvision, torch = extra("torchvision"), extra("torch")
    module = getattr(torchvision.models, f"resnet{depth}")(num_classes=5)
    net = getattr(models, f"resnet{depth}")(5)
    x = np.random.default_rng(0).normal(size=(64, 64, 3))
    for w in module.modules():  # the output stays of size 1
        if isinstance(w, torch.nn.BatchNorm2d):
            w.running_mean.uniform_(-0.1, 0.1)
            w.running_var.uniform_(0.8, 1.2)
    params, state = models.load_torch(module.state_dict(), net)
    with torch.no_grad():
        theirs = torch.from_numpy(np.moveaxis(x, -1, 0)[None].copy()).float()
        want = module.eval()(theirs).numpy()[0]
    got = jax.jit(net.apply)(params, state, jnp.asarray(x, jnp.float32))[0]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    made = models.to_torch(params, net, state)
    own = module.state_dict()
    assert set(made) == set(own)
    assert all(np.array_equal(made[n], own[n]) for n in made if "num_batches" not in n)


# ---------------------------------------------------------------------------------- files, errors


def test_files(tmp_path):
    net, params, _ = drawn("gpt2")
    theirs = models.to_torch(params, net)
    one = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(theirs, one)
    chex.assert_trees_all_equal(models.load_torch(one, net)[0], params)
    halves = list(theirs)[::2], list(theirs)[1::2]
    for i, names in enumerate(halves):
        safetensors.numpy.save_file({n: theirs[n] for n in names}, tmp_path / f"{i}.safetensors")
    index = {n: f"{i}.safetensors" for i, names in enumerate(halves) for n in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    got, _ = models.load_torch(tmp_path / "model.safetensors.index.json", net)
    chex.assert_trees_all_equal(got, params)
    for name in ("nothing.safetensors", "nothing.json"):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            models.load_torch(tmp_path / name, net)
    for text in ("{", "[1]", '{"hidden_size": 8}', '{"weight_map": 3}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json isn't the index of safetensors files"):
            models.load_torch(tmp_path / "config.json", net)
    with pytest.raises(ValueError, match="is a pickle, which may run any code"):
        models.load_torch(tmp_path / "model.bin", net)


def test_masks_and_heads_of_old_files():
    net, params, _ = drawn("gpt2")
    theirs = models.to_torch(params, net)
    old = {n.removeprefix("transformer."): a for n, a in theirs.items() if n != "lm_head.weight"}
    old["h.0.attn.bias"] = np.ones((1, 1, 16, 16))
    chex.assert_trees_all_equal(models.load_torch(old, net)[0], params)


def test_an_output_layer_of_its_own_has_no_place_in_gpt2():
    net, params, _ = drawn("gpt2")
    theirs = models.to_torch(params, net)
    untied = theirs | {"lm_head.weight": theirs["lm_head.weight"] + 1}
    with pytest.raises(ValueError, match=r"lm_head\.weight isn't wte\.weight, but the model has"):
        models.load_torch(untied, net)
    chex.assert_trees_all_equal(models.load_torch(theirs, net)[0], params)


class Tensor:
    """What is asked of PyTorch's tensors, on numpy's arrays."""

    def __init__(self, array):
        self.array = array

    detach = cpu = lambda self: self
    numpy = lambda self: self.array
    float = lambda self: Tensor(self.array.astype(np.float32))
    element_size = lambda self: self.array.itemsize
    is_floating_point = lambda self: np.issubdtype(self.array.dtype, np.floating)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_a_tensor_of_64_bits_keeps_them(dtype):
    net, params, _ = drawn("gpt2")
    theirs = {n: np.asarray(a, dtype) for n, a in models.to_torch(params, net).items()}
    theirs = {n: a + dtype(1e-9) for n, a in theirs.items()}
    found, _ = models.load_torch({n: Tensor(a) for n, a in theirs.items()}, net)
    wanted = models.load_torch(theirs, net)[0]
    chex.assert_trees_all_equal(found, wanted)


def test_what_does_not_fit_is_named():
    net, params, _ = drawn("llama")
    theirs = models.to_torch(params, net)
    wrong = dict(theirs)
    wrong["model.layers.5.mlp.up_proj.weight"] = wrong.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(by_path.PathError) as found:
        models.load_torch(wrong, net)
    assert found.value.missing == ("layers.1.mlp.up_proj.weight",)
    assert found.value.unexpected == ("layers.5.mlp.up_proj.weight",)
    theirs["model.norm.weight"] = np.ones(9)
    with pytest.raises(by_path.PathError, match=r"norm\.weight is of shape \(9,\), wanted \(8,\)"):
        models.load_torch(theirs, net)
    with pytest.raises(TypeError, match="know the models of resnet, vit, gpt2 and llama"):
        models.load_torch({}, models.lenet())
    with pytest.raises(TypeError, match="source must be a safetensors file or a state dict"):
        models.load_torch(3, net)
    with pytest.raises(ValueError, match="library must be"):
        models.to_torch(params, net, library="timm")
    with pytest.raises(KeyError, match="state.statistics.bn1.mean is missing; pass state="):
        models.to_torch(drawn("resnet")[1], resnet())
