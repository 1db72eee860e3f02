"""PyTorch's parameters as ours, and ours as PyTorch's, by name.

A layout is a list of entries: which of our arrays is which of theirs, and how it lies there. The
same list is read in both directions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments
from fnn import params as by_path
from fnn.layers import Layer, Network
from fnn.layers.combinators import Repeat
from fnn.models.language import _gpt2, _llama
from fnn.models.vision_transformer import _vit


class Entry(NamedTuple):
    """One array of ours, or of one block, and the array of theirs that holds it.

    Fields:
        ours: its path, "blocks.attend.q.W".
        theirs: its name in the state dict.
        block: which of our stacked blocks, or None.
        part: (k, n): it is the k-th of n arrays that theirs are, one below the other.
        transposed: theirs is (in, out).
        shape: theirs, where that isn't ours; -1 once for what doesn't matter.
    """

    ours: str
    theirs: str
    block: int | None = None
    part: tuple[int, int] = (0, 1)
    transposed: bool = False
    shape: tuple[int, ...] | None = None


class Layout(NamedTuple):
    """How another library lays a model out.

    Fields:
        library: whose it is, "transformers".
        fits: whether a state dict's names are of this layout.
        entries: of a model: what is where. Paths of its state begin with "state.".
        example: of a model and their arrays: the type of an input.
        prefix: what stands before all names but those of the head, unless a model is the bare one.
        optional: their names that may be missing -> another name that then has the array.
        ignored: ends of names that are no parameters.
    """

    library: str
    fits: Callable[[Mapping[str, Any]], bool]
    entries: Callable[[Network], Iterator[Entry]]
    example: Callable[[Network, Mapping[str, Any]], jax.ShapeDtypeStruct]
    prefix: str = ""
    optional: Mapping[str, str] = {}
    ignored: tuple[str, ...] = ()


def load_torch(source: Any, model: Network) -> tuple[dict, dict]:
    """The parameters and the state of a model from those of PyTorch's.

    Known are torchvision's ResNets (of any depth, made by `resnet`) and vision transformers, and
    those of transformers: `GPT2LMHeadModel` and `GPT2Model`, `LlamaForCausalLM` (so Mistral's too)
    and `ViTForImageClassification`.

    Args:
        source: a safetensors file, the index of several ("model.safetensors.index.json"), or a
            state dict: names -> tensors of PyTorch, or arrays.
        model: made by `resnet`, `vit`, `gpt2` or `llama`, of the same configuration.

    Returns:
        `(params, state)`: as `model.init` and `model.init_state` make them; {} for no state.

    Raises:
        ImportError: it is a file, and safetensors isn't installed.
        FileNotFoundError, ValueError: there is no such file, or it can't be read.
        TypeError: the source is none of these, or the model none of those.
        fnn.params.PathError: arrays are missing, not wanted, or of a shape that isn't the model's;
            the message has PyTorch's names.
        ValueError: GPT-2's `lm_head.weight` isn't its `wte.weight`: the model ties the two.

    >>> import fnn
    >>> net = fnn.models.gpt2(50, 16, features=8, depth=2, heads=2)
    >>> params = net.init(jax.random.key(0), jnp.arange(5))
    >>> theirs = fnn.models.to_torch(params, net)
    >>> theirs["transformer.h.1.attn.c_attn.weight"].shape
    (8, 24)
    >>> again, _ = fnn.models.load_torch(theirs, net)
    >>> bool(jnp.all(again["embed"]["E"] == params["embed"]["E"]))
    True
    """
    arrays, where = _read(source)
    layouts = _layouts(model)
    layout = next((known for known in layouts if known.fits(arrays)), layouts[0])
    arrays = _without_prefix(layout, arrays)
    for name, other in layout.optional.items():
        if name not in arrays and other in arrays:
            arrays[name] = arrays[other]
    entries = list(layout.entries(model))
    names = {entry.theirs for entry in entries}
    missing = tuple(dict.fromkeys(e.theirs for e in entries if e.theirs not in arrays))
    unexpected = tuple(
        name
        for name in arrays
        if name not in names and name not in layout.optional and not name.endswith(layout.ignored)
    )
    if missing or unexpected:
        raise by_path.PathError(where, missing, unexpected, {})
    for name, other in layout.optional.items():
        if name in arrays and name not in names:
            _must_be_tied(where, name, arrays[name], other, arrays[other])
    x = layout.example(model, arrays)
    like = {
        "params": jax.eval_shape(model.init, jax.random.key(0), x),
        "state": jax.eval_shape(lambda: model.init_state(x)),
    }
    wanted = by_path.flatten(like)
    pieces: dict[str, list[np.ndarray]] = {}
    different = {}
    for entry in entries:
        target = wanted[entry.ours].shape
        shape = target if entry.block is None else target[1:]
        piece = _ours(entry, arrays[entry.theirs], shape)
        if piece is None:
            got, ask = arrays[entry.theirs].shape, _their_shape(entry, shape)
            different[entry.theirs] = (str(ask), f"of shape {got}")
        else:
            pieces.setdefault(entry.ours, []).append(piece)
    if different:
        raise by_path.PathError(where, (), (), different)
    is_stacked = {entry.ours: entry.block is not None for entry in entries}
    flat = {path: np.stack(p) if is_stacked[path] else p[0] for path, p in pieces.items()}
    made = by_path.unflatten(flat, like)
    return made["params"], made["state"]


def _must_be_tied(where: str, name: str, array: Any, other: str, wanted: Any) -> None:
    """Raise a ValueError unless an array that has no place in the model is the one it uses."""
    if not np.array_equal(np.asarray(array), np.asarray(wanted), equal_nan=True):
        raise ValueError(
            f"{where}: {name} isn't {other}, but the model has no other output layer than its "
            "embedding's weights: of a network whose two aren't tied it would be another one."
        )


def to_torch(
    params: dict, model: Network, state: dict | None = None, *, library: str | None = None
) -> dict[str, np.ndarray]:
    """Our parameters under PyTorch's names: what `load_torch` reads.

    Args:
        params: of the model.
        model: as for `load_torch`.
        state: of the model, if it has one.
        library: whose layout of a vision transformer: "torchvision", as unless given; or
            "transformers", which is that of its files, or "transformers 5", that of its modules
            since version 5.

    Returns:
        Names -> numpy arrays, to be saved by `safetensors.numpy.save_file`, or loaded by
        `module.load_state_dict({name: torch.from_numpy(a) for name, a in these.items()})`. PyTorch
        takes no bfloat16 from numpy: `torch.from_numpy(a.view("int16")).view(torch.bfloat16)`.

    Raises:
        TypeError, ValueError: the model has no layout, or not this library's.
        KeyError: params or state aren't the model's.
    """
    layouts = {layout.library: layout for layout in _layouts(model)}
    chosen = next(iter(layouts)) if library is None else library
    layout = layouts[arguments.choice("to_torch", "library", chosen, tuple(layouts))]
    flat = by_path.flatten({"params": params, "state": state or {}})
    parts: dict[str, list[np.ndarray]] = {}
    axis: dict[str, int] = {}
    for entry in layout.entries(model):
        if entry.ours not in flat:
            hint = "; pass state=" if entry.ours.startswith("state.") else ""
            raise KeyError(f"to_torch: {entry.ours} is missing{hint}")
        own = np.asarray(flat[entry.ours])
        own = own if entry.block is None else own[entry.block]
        parts.setdefault(entry.theirs, []).append(_theirs(entry, own))
        axis[entry.theirs] = -1 if entry.transposed else 0
    joined = {name: np.concatenate(pieces, axis[name]) for name, pieces in parts.items()}
    made = {
        name if name in layout.optional else layout.prefix + name: np.ascontiguousarray(a)
        for name, a in joined.items()
    }
    for name, other in layout.optional.items():
        if name not in made:
            made[name] = made[layout.prefix + other]
    for name in list(made):
        if name.endswith(".running_mean"):
            count = name.removesuffix("running_mean") + "num_batches_tracked"
            made[count] = np.zeros((), np.int64)
    return made


def _ours(entry: Entry, theirs: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array of ours; None if theirs has another shape."""
    if not _alike(theirs.shape, _their_shape(entry, shape)):
        return None
    array = theirs.T if entry.transposed else theirs
    k, n = entry.part
    return np.split(np.asarray(array), n)[k].reshape(shape)


def _theirs(entry: Entry, ours: np.ndarray) -> np.ndarray:
    if entry.shape is not None:
        return ours.reshape(entry.shape)
    return ours.T if entry.transposed else ours


def _their_shape(entry: Entry, ours: tuple[int, ...]) -> tuple[int, ...]:
    if entry.shape is not None:
        return entry.shape
    whole = (ours[0] * entry.part[1], *ours[1:]) if ours else ours
    return whole[::-1] if entry.transposed else whole


def _alike(got: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(got) == len(wanted) and all(w in (-1, g) for g, w in zip(got, wanted, strict=True))


def _read(source: Any) -> tuple[dict[str, np.ndarray], str]:
    """Their arrays by name, and what to call the source in errors."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.suffix == ".json":
            if not path.is_file():
                raise FileNotFoundError(f"load_torch: there is no file {path}.")
            files = _files_of_index(path)
            arrays: dict[str, np.ndarray] = {}
            for name in files:
                arrays |= by_path.read(path.parent / name)
            return arrays, f"load_torch {path}"
        if path.suffix in (".pt", ".pth", ".bin"):
            raise ValueError(
                f"load_torch: {path} is a pickle, which may run any code: load it with torch.load("
                "..., weights_only=True), and pass the state dict."
            )
        return by_path.read(path), f"load_torch {path}"
    if not isinstance(source, Mapping):
        raise TypeError(
            "load_torch: source must be a safetensors file or a state dict, but got "
            f"{arguments.show(source)}."
        )
    return {name: _as_numpy(tensor) for name, tensor in source.items()}, "load_torch"


def _files_of_index(path: Path) -> list[str]:
    """The names of the files that an index lists."""
    try:
        return sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"load_torch: {path} isn't the index of safetensors files: JSON with a 'weight_map', "
            "from names to files."
        ) from None


def _as_numpy(tensor: Any) -> np.ndarray:
    if hasattr(tensor, "detach"):  # PyTorch's; numpy has none of its 16-bit floats but one
        tensor = tensor.detach().cpu()
        is_narrow = tensor.is_floating_point() and tensor.element_size() < 4
        return tensor.float().numpy() if is_narrow else tensor.numpy()
    return np.asarray(tensor)


def _without_prefix(layout: Layout, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(layout.prefix): array for name, array in arrays.items()}


def _layouts(model: Any) -> tuple[Layout, ...]:
    """The layouts of a model; the first is meant where a state dict fits none."""
    body = getattr(model, "body", None)
    names = [name for name, _ in getattr(model, "parts", ())]
    if body is _gpt2:
        return (GPT2,)
    if body is _llama:
        return (LLAMA,)
    if body is _vit:
        return VIT_OF_TORCHVISION, VIT_OF_TRANSFORMERS, VIT_OF_TRANSFORMERS_5
    if {"conv1", "bn1", "layer1", "fc"} <= set(names):
        return (RESNET,)
    raise TypeError(
        "load_torch and to_torch know the models of resnet, vit, gpt2 and llama, but got "
        f"{arguments.show(model)}."
    )


def _part(model: Network, *path: str) -> Any:
    """A part of a network by its path."""
    found: Any = model
    for name in path:
        found = dict(found.parts)[name]
        if isinstance(found, Repeat):
            found = found.block
    return found


def _depth(model: Network) -> int:
    return dict(model.parts)["blocks"].n


def _pair(
    ours: str,
    theirs: str,
    block: int | None = None,
    part: tuple[int, int] = (0, 1),
    transposed: bool = False,
) -> Iterator[Entry]:
    """A weight or a scale, and a bias, as our linear layers and norms have them."""
    weight, bias = ("scale", "bias") if "norm" in ours.rpartition(".")[2] else ("W", "b")
    yield Entry(f"{ours}.{weight}", f"{theirs}.weight", block, part, transposed)
    yield Entry(f"{ours}.{bias}", f"{theirs}.bias", block, part)


def _tokens(model: Network, theirs: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1,), jnp.int32)


# ---------------------------------------------------------------------------- transformers' GPT-2


def _gpt2_entries(model: Network) -> Iterator[Entry]:
    yield Entry("params.embed.E", "wte.weight")
    yield Entry("params.position.P", "wpe.weight")
    for i in range(_depth(model)):
        ours, theirs = "params.blocks", f"h.{i}"
        yield from _pair(f"{ours}.norm1", f"{theirs}.ln_1", i)
        for k, name in enumerate("qkv"):  # one (in, 3 · out) matrix
            fused = f"{theirs}.attn.c_attn"
            yield from _pair(f"{ours}.attend.{name}", fused, i, part=(k, 3), transposed=True)
        yield from _pair(f"{ours}.attend.out", f"{theirs}.attn.c_proj", i, transposed=True)
        yield from _pair(f"{ours}.norm2", f"{theirs}.ln_2", i)
        yield from _pair(f"{ours}.mlp.hidden", f"{theirs}.mlp.c_fc", i, transposed=True)
        yield from _pair(f"{ours}.mlp.output", f"{theirs}.mlp.c_proj", i, transposed=True)
    yield from _pair("params.norm", "ln_f")


GPT2 = Layout(
    "transformers",
    fits=lambda theirs: True,
    entries=_gpt2_entries,
    example=_tokens,
    prefix="transformer.",
    optional={"lm_head.weight": "wte.weight"},  # tied
    ignored=(".attn.bias", ".attn.masked_bias"),  # masks
)

# ---------------------------------------------------------------------------- transformers' Llama


def _llama_entries(model: Network) -> Iterator[Entry]:
    yield Entry("params.embed.E", "embed_tokens.weight")
    for i in range(_depth(model)):
        ours, theirs = "params.blocks", f"layers.{i}"
        yield Entry(f"{ours}.norm1.scale", f"{theirs}.input_layernorm.weight", i)
        for name in ("q", "k", "v"):
            yield Entry(f"{ours}.attend.{name}.W", f"{theirs}.self_attn.{name}_proj.weight", i)
        yield Entry(f"{ours}.attend.out.W", f"{theirs}.self_attn.o_proj.weight", i)
        yield Entry(f"{ours}.norm2.scale", f"{theirs}.post_attention_layernorm.weight", i)
        for name in ("gate", "up", "down"):
            yield Entry(f"{ours}.mlp.{name}.W", f"{theirs}.mlp.{name}_proj.weight", i)
    yield Entry("params.norm.scale", "norm.weight")
    yield Entry("params.output.W", "lm_head.weight")


LLAMA = Layout(
    "transformers",
    fits=lambda theirs: True,
    entries=_llama_entries,
    example=_tokens,
    prefix="model.",
    optional={"lm_head.weight": "embed_tokens.weight"},  # where they are tied
    ignored=(".rotary_emb.inv_freq",),
)

# ------------------------------------------------------------------------- vision transformers


def _image(model: Network, kernel: Any) -> jax.ShapeDtypeStruct:
    side = _part(model, "cut").side
    return jax.ShapeDtypeStruct((side, side, kernel.shape[1]), jnp.float32)


def _patches(model: Network, theirs: str) -> Iterator[Entry]:
    """Our linear map of patches is their convolution."""
    size = _part(model, "cut").size
    kernel = _part(model, "patches").features, -1, size, size
    yield Entry("params.patches.W", f"{theirs}.weight", shape=kernel)
    yield Entry("params.patches.b", f"{theirs}.bias")


def _sequence(model: Network, token: str, positions: str) -> Iterator[Entry]:
    width = _part(model, "patches").features
    yield Entry("params.class.token", token, shape=(1, 1, width))
    yield Entry("params.position.P", positions, shape=(1, _part(model, "position").length, width))


def _torchvision_vit_entries(model: Network) -> Iterator[Entry]:
    yield from _sequence(model, "class_token", "encoder.pos_embedding")
    yield from _patches(model, "conv_proj")
    for i in range(_depth(model)):
        ours, theirs = "params.blocks", f"encoder.layers.encoder_layer_{i}"
        yield from _pair(f"{ours}.norm1", f"{theirs}.ln_1", i)
        for k, name in enumerate("qkv"):
            own, fused = f"{ours}.attend.{name}", f"{theirs}.self_attention.in_proj"
            yield Entry(f"{own}.W", f"{fused}_weight", i, part=(k, 3))
            yield Entry(f"{own}.b", f"{fused}_bias", i, part=(k, 3))
        yield from _pair(f"{ours}.attend.out", f"{theirs}.self_attention.out_proj", i)
        yield from _pair(f"{ours}.norm2", f"{theirs}.ln_2", i)
        yield from _pair(f"{ours}.mlp.hidden", f"{theirs}.mlp.0", i)
        yield from _pair(f"{ours}.mlp.output", f"{theirs}.mlp.3", i)
    yield from _pair("params.norm", "encoder.ln")
    yield from _pair("params.output", "heads.head")


VIT_OF_TORCHVISION = Layout(
    "torchvision",
    fits=lambda theirs: "conv_proj.weight" in theirs,
    entries=_torchvision_vit_entries,
    example=lambda model, theirs: _image(model, theirs["conv_proj.weight"]),
)


# Their names in the files of transformers, and in its modules until its version 5.
OF_FILES = {
    "": "vit.encoder.layer",
    "norm1": "layernorm_before",
    "attend.q": "attention.attention.query",
    "attend.k": "attention.attention.key",
    "attend.v": "attention.attention.value",
    "attend.out": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.hidden": "intermediate.dense",
    "mlp.output": "output.dense",
}

# In its modules since.
OF_MODULES = {
    "": "vit.layers",
    "norm1": "layernorm_before",
    "attend.q": "attention.q_proj",
    "attend.k": "attention.k_proj",
    "attend.v": "attention.v_proj",
    "attend.out": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.hidden": "mlp.fc1",
    "mlp.output": "mlp.fc2",
}


def _transformers_vit(library: str, names: Mapping[str, str]) -> Layout:
    embeddings = "vit.embeddings"
    kernel = f"{embeddings}.patch_embeddings.projection"

    def entries(model: Network) -> Iterator[Entry]:
        yield from _sequence(model, f"{embeddings}.cls_token", f"{embeddings}.position_embeddings")
        yield from _patches(model, kernel)
        for i in range(_depth(model)):
            for ours, theirs in names.items():
                if ours:
                    yield from _pair(f"params.blocks.{ours}", f"{names['']}.{i}.{theirs}", i)
        yield from _pair("params.norm", "vit.layernorm")
        yield from _pair("params.output", "classifier")

    return Layout(
        library,
        fits=lambda theirs: any(name.startswith(f"{names['']}.") for name in theirs),
        entries=entries,
        example=lambda model, theirs: _image(model, theirs[f"{kernel}.weight"]),
    )


VIT_OF_TRANSFORMERS = _transformers_vit("transformers", OF_FILES)
VIT_OF_TRANSFORMERS_5 = _transformers_vit("transformers 5", OF_MODULES)

# ---------------------------------------------------------------------------- torchvision's ResNet


def _resnet_entries(model: Network) -> Iterator[Entry]:
    """Ours have the same names; a stage is a chain of blocks."""

    def of(part: Layer, path: str) -> Iterator[Entry]:
        kind = type(part).__name__
        if isinstance(part, Network):
            for name, inner in part.parts:
                yield from of(inner, f"{path}.{name}" if path else name)
        elif kind == "BatchNorm":
            yield Entry(f"params.{path}.scale", f"{path}.weight")
            yield Entry(f"params.{path}.bias", f"{path}.bias")
            yield Entry(f"state.statistics.{path}.mean", f"{path}.running_mean")
            yield Entry(f"state.statistics.{path}.variance", f"{path}.running_var")
        elif kind in ("Conv", "Linear"):
            yield Entry(f"params.{path}.W", f"{path}.weight")
            if getattr(part, "use_bias", False):
                yield Entry(f"params.{path}.b", f"{path}.bias")

    yield from of(model, "")


RESNET = Layout(
    "torchvision",
    fits=lambda theirs: True,
    entries=_resnet_entries,
    example=lambda model, theirs: jax.ShapeDtypeStruct(
        (64, 64, theirs["conv1.weight"].shape[1]), jnp.float32
    ),
    ignored=(".num_batches_tracked",),
)
