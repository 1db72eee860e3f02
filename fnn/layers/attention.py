"""`Attention`: multi-head attention, of a sequence to itself or to another one, with a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from fnn import arguments
from fnn.initializers import Initializer, xavier_uniform, zeros
from fnn.layers.layer import Layer, LayerError, check_parts, last_axis, set_count
from fnn.layers.linear import Linear, check_options
from fnn.layers.mode import EVALUATE, Mode
from fnn.layers.net import in_loop, is_watched
from fnn.layers.once import unless_there
from fnn.ops import alibi_slopes, attention, ring_attention, rotary
from fnn.ops.arguments import one_or_nan
from fnn.ops.sequences.attention import turns_of


@dataclasses.dataclass(frozen=True, repr=False)
class Attention(Layer):
    """y = W_o [head₁; …; headₙ] + b_o, with headᵢ = softmax(qᵢ kᵢᵀ / √features) vᵢ.

        layer(params, x)                    self-attention: q, k and v are made of x
        layer(params, x, memory)            cross-attention: k and v are made of memory
        layer(params, x, None, mask)        mask: booleans that broadcast to (heads, queries, keys),
        layer(params, x, memory, mask)      true where a query may attend to a key

    x is one sequence `(positions, in)`, and y has its shape; the memory is `(positions, any)`. The
    scores of all positions are never held at once: see `fnn.ops.attention`.

    With a cache (`init_cache(length, x)`) self-attention goes on from the positions before: it adds
    its keys and values to the cache's, and looks at all of them. It must be causal for that; else
    there is no cache. Positions beyond the cache's length raise a LayerError, in compiled code the
    output is NaN. Cross-attention's cache (`init_cache(length, x, memory)`) keeps the memory's keys
    and values: the first call makes them, all further ones make q alone, and look at no more of the
    memory than its shape.

    Where the mode says that positions are divided over devices (`fnn.sharding.sequence_parallel`),
    it is computed by `fnn.ops.ring_attention`.

    Parameters: `{"q": {"W": (heads · features, in), "b"}, "k": {"W": (kv_heads · features, …),
    "b"}, "v": {…}, "out": {"W": (in, heads · features), "b"}}`, without the "b" unless `use_bias`.
    State: none, or `{"cache": {"k": (length, kv_heads, features), "v", "position": ()}}`.

    Args:
        heads: how many.
        kv_heads: how many heads k and v have, a divisor of `heads`: fewer for grouped-query
            attention, 1 for multi-query attention; as many as `heads` unless given.
        features: how many each head has; in / heads unless given.
        causal: whether a position attends only to itself and those before.
        window: if given, a position attends only to those less than `window` away from it.
        rotary: if given, q and k are turned by rotary position embedding of this base (10000 in
            the paper).
        alibi: whether scores fall with the distance, as `fnn.ops.alibi_slopes` says.
        use_bias: whether q, k, v and out have a bias.
        qkv_bias: the same of q, k and v alone; as `use_bias` unless given.
        weight_init, out_init: initialisers of the W of q, k and v, and of out (as theirs unless
            given).
        bias_init: initialiser of all b.
        block: how many queries and keys are looked at together, at most; as `ops.attention` chooses
            unless given.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) x or memory isn't `(positions, in)`, the parameters don't fit, or
            the cache has no room.

    Vaswani et al., "Attention is all you need", arXiv:1706.03762, section 3.2; Ainslie et al.,
    arXiv:2305.13245 (grouped-query); Su et al., arXiv:2104.09864 (rotary); Press et al.,
    arXiv:2108.12409 (ALiBi).
    """

    heads: int
    _: dataclasses.KW_ONLY
    kv_heads: int | None = None
    features: int | None = None
    causal: bool = False
    window: int | None = None
    rotary: float | None = None
    alibi: bool = False
    use_bias: bool = True
    qkv_bias: bool | None = None
    weight_init: Initializer = xavier_uniform
    out_init: Initializer | None = None
    bias_init: Initializer = zeros
    block: int | None = None

    def __post_init__(self) -> None:
        set_count(self, "heads")
        for option in ("kv_heads", "features", "window", "block"):
            if getattr(self, option) is not None:
                set_count(self, option)
        for option in ("causal", "alibi"):
            arguments.flag("Attention", option, getattr(self, option))
        check_options(self)
        if self.qkv_bias is not None:
            arguments.flag("Attention", "qkv_bias", self.qkv_bias)
        if self.rotary is not None:
            base = arguments.number("Attention", "rotary", self.rotary, above=0)
            object.__setattr__(self, "rotary", float(base))
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"Attention: kv_heads must divide heads, {self.heads}, but got {self.kv_heads}."
            )
        if self.out_init is not None:
            form = "an initialiser, a function (key, shape, dtype)"
            arguments.function("Attention", "out_init", self.out_init, form)

    def init(self, key: chex.PRNGKey, x: Any, memory: Any = None, mask: Any = None) -> dict:
        key = arguments.key(f"{self}.init", "key", key)
        memory = x if memory is None else memory
        parts = self._parts(x)
        heads = jax.ShapeDtypeStruct((x.shape[0], parts["q"].features), x.dtype)
        inputs = {"q": x, "k": memory, "v": memory, "out": heads}
        keys = jax.random.split(key, len(parts))
        return {
            name: part.init(own, inputs[name])
            for (name, part), own in zip(parts.items(), keys, strict=True)
        }

    def init_cache(self, length: int, x: Any, memory: Any = None, mask: Any = None) -> dict:
        length = arguments.integer("Attention.init_cache", "length", length, least=1)
        if memory is None and not self.causal:
            return {}
        count, dtype = (length, x.dtype) if memory is None else (memory.shape[0], memory.dtype)
        shape = count, self._kv_heads, self._features(x)
        return {
            "cache": {
                "k": jnp.zeros(shape, dtype),
                "v": jnp.zeros(shape, dtype),
                "position": jnp.zeros((), jnp.int32),
            }
        }

    def apply(
        self,
        params: Any,
        state: Any,
        x: Any,
        memory: Any = None,
        mask: Any = None,
        mode: Mode = EVALUATE,
    ) -> tuple[Any, dict]:
        parts = self._parts(x)
        if memory is not None and getattr(memory, "ndim", 0) != 2:
            raise LayerError(
                f"{self} wants a memory of shape (positions, features), but got "
                f"{arguments.show(memory)}."
            )
        check_parts(self, params, list(parts))
        source = x if memory is None else memory
        features = self._features(x)

        def heads_of(name: str, x: Any) -> Any:
            self._check_input(name, params[name], x, memory is not None and name != "q")
            count = self.heads if name == "q" else self._kv_heads
            return parts[name](params[name], x).reshape(x.shape[0], count, features)

        cache = state.get("cache")
        start = 0 if cache is None else cache["position"]

        def keys_and_values() -> tuple[Any, Any]:
            k, v = heads_of("k", source), heads_of("v", source)
            if self.rotary is not None:
                k = self._turned(k, start if memory is None else 0)
            return k, v

        q = heads_of("q", x)
        if self.rotary is not None:
            q = self._turned(q, start)
        options: dict[str, Any] = {"causal": self.causal, "window": self.window, "mask": mask}
        if self.alibi:
            options["slopes"] = alibi_slopes(self.heads)
        across = mode.across
        if cache is not None:
            y, state = self._continued(q, keys_and_values, memory, options, state)
        elif across is not None and across.sequence is not None:
            options |= {"mesh": across.mesh, "axis": across.sequence}
            y = ring_attention(q, *keys_and_values(), block=self.block, **options)
        else:
            k, v = keys_and_values()
            if is_watched():
                self._tell_of_blocks(q, k, v, options)
            y = attention(q, k, v, block=self.block, **options)
        y = parts["out"](params["out"], y.reshape(x.shape[0], self.heads * features))
        return y, state

    def _check_input(self, name: str, own: Any, x: Any, is_memory: bool) -> None:
        """Raise unless x, or the memory, has as many features as q, k or v was made for."""
        shape: tuple[int, ...] = getattr(own.get("W"), "shape", ())
        if len(shape) == 2 and shape[-1] != x.shape[-1]:
            raise LayerError(
                f"{self} has a {name}.W of shape {shape}, so it wants "
                f"{'a memory' if is_memory else 'an input'} of shape (positions, {shape[-1]}), but "
                f"got {x.shape}."
            )

    def _tell_of_blocks(self, q: Any, k: Any, v: Any, options: dict) -> None:
        turns, queries, keys = turns_of(q, k, v, block=self.block, **options)
        if turns > 1:
            of = lambda a, count: jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype)
            with in_loop(OneBlock(max(queries, keys)), turns) as note:
                note({}, {}, (of(q, queries), of(k, keys), of(v, keys)), of(q, queries))

    def _continued(
        self, q: Any, keys_and_values: Callable, memory: Any, options: dict, state: dict
    ) -> tuple[Any, dict]:
        """Attention to the cache's keys, and the state that goes on from here."""
        start, count = state["cache"]["position"], q.shape[0]
        extended = self._with_these if memory is None else self._of_memory
        k, v, fits = extended(keys_and_values, memory, count, state["cache"])
        # As many scores at once as in a block of many queries.
        size = self.block or 128
        y = attention(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            q_positions=start + jnp.arange(count, dtype=jnp.int32),
            block=max(size, size**2 // max(count, 1)),
            **options,
        )
        y = jnp.where(fits, y, one_or_nan(fits, y.dtype))
        return y, state | {"cache": {"k": k, "v": v, "position": start + count}}

    def _with_these(
        self, keys_and_values: Callable, memory: None, count: int, cache: dict
    ) -> tuple[Any, Any, Any]:
        """The cache's keys and values with those of these positions added; whether they fit."""
        start, length = cache["position"], cache["k"].shape[0]
        if not self.causal:
            raise LayerError(
                f"{self} was given a cache and no memory: without one it attends to x itself, and "
                "has a cache only with causal=True."
            )
        if count > length or (arguments.is_known(start) and int(start) + count > length):
            raise LayerError(
                f"{self}: the cache has room for {length} positions, of which "
                f"{start if arguments.is_known(start) else 'some'} are taken; {count} more don't "
                "fit. Make it longer: init_cache(length, x)."
            )
        put = lambda old, new: lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 0)
        k, v = keys_and_values()
        return put(cache["k"], k), put(cache["v"], v), start + count <= length

    def _of_memory(
        self, keys_and_values: Callable, memory: Any, count: int, cache: dict
    ) -> tuple[Any, Any, Any]:
        """The memory's keys and values, made where no position came before."""
        if memory.shape[0] != cache["k"].shape[0]:
            raise LayerError(
                f"{self} has a cache for a memory of {cache['k'].shape[0]} positions, but got one "
                f"of shape {memory.shape}."
            )
        kept = cache["k"], cache["v"]
        return *unless_there(cache["position"] > 0, kept, keys_and_values), True

    def _turned(self, x: Any, start: Any) -> Any:
        assert self.rotary is not None
        positions = start + jnp.arange(x.shape[0], dtype=jnp.int32)
        return rotary(x, positions, base=self.rotary)

    @property
    def _kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    def _features(self, x: Any) -> int:
        inputs = last_axis(self, x)
        if len(x.shape) != 2:
            raise LayerError(f"{self} wants an input of shape (positions, in), but got {x.shape}.")
        if self.features is not None:
            return self.features
        if inputs % self.heads:
            raise LayerError(
                f"{self} wants an input (positions, in) with in a multiple of its {self.heads} "
                f"heads, or features=, how many each head has; but got {x.shape}."
            )
        return inputs // self.heads

    def _parts(self, x: Any) -> dict[str, Linear]:
        features = self._features(x)
        qkv_bias = self.use_bias if self.qkv_bias is None else self.qkv_bias

        def linear(features: int, init: Initializer, use_bias: bool) -> Linear:
            return Linear(features, use_bias=use_bias, weight_init=init, bias_init=self.bias_init)

        return {
            "q": linear(self.heads * features, self.weight_init, qkv_bias),
            "k": linear(self._kv_heads * features, self.weight_init, qkv_bias),
            "v": linear(self._kv_heads * features, self.weight_init, qkv_bias),
            "out": linear(last_axis(self, x), self.out_init or self.weight_init, self.use_bias),
        }


@dataclasses.dataclass(frozen=True, repr=False)
class OneBlock(Layer):
    """Some queries' attention to some keys, of all: `summary` counts its FLOPs."""

    block: int

    def __call__(self, params: Any, q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, block=self.block)
