"""`generate`: a language model continues a text, token by token."""

from __future__ import annotations

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn import arguments
from fnn.layers import Embedding, Layer
from fnn.layers.net import watching
from fnn.precision import wide


def generate(
    net: Layer,
    params: Any,
    prompt: chex.Array,
    n: int,
    key: chex.PRNGKey | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    inputs: tuple = (),
) -> jax.Array:
    """The next n tokens after a prompt, each drawn from what the network says of it.

    One compiled program: the prompt at once, then a loop of one token at a time with the cache of
    keys and values. For several prompts of one length, `jax.vmap` it over prompts and keys.

    Args:
        net: a network from tokens `(positions,)` to logits `(positions, vocabulary)` that has a
            cache: `gpt2`, `llama`, or one of your own with causal `Attention` or recurrent layers.
        params: its parameters.
        prompt: tokens, integers of shape `(positions,)`, at least one.
        n: how many tokens to add.
        key: to draw with; not needed for temperature 0.
        temperature: the logits are divided by it. 1 draws from the network's own distribution, 0
            takes the likeliest token each time.
        top_k: if given, only among the k likeliest tokens.
        top_p: if given, only among the fewest likeliest tokens that together have at least this
            probability (nucleus sampling), after temperature and top_k.
        inputs: what the network takes before the tokens: `(source,)` of `transformer`.

    Returns:
        The n tokens, int32.

    Raises:
        TypeError, ValueError: an option isn't of its kind, the key is missing, the prompt is
            empty, or, where it is known, holds a token that the network's `Embedding` hasn't.
        LayerError: the network has no cache, or fewer positions than prompt.size + n − 1.

    Fan, Lewis, Dauphin, "Hierarchical neural story generation", arXiv:1805.04833 (top k); Holtzman
    et al., "The curious case of neural text degeneration", arXiv:1904.09751 (top p).
    """
    where = "generate"
    n = arguments.integer(where, "n", n, least=1)
    arguments.number(where, "temperature", temperature, least=0)
    is_greedy = arguments.is_known(temperature) and float(temperature) == 0
    if top_k is not None:
        top_k = arguments.integer(where, "top_k", top_k, least=1)
    if top_p is not None:
        arguments.number(where, "top_p", top_p, above=0, most=1)
    if not isinstance(inputs, tuple):
        raise TypeError(
            f"{where}: inputs must be a tuple, (source,), but got {arguments.show(inputs)}."
        )
    if key is None and not is_greedy:
        raise ValueError(f"{where}: key must be given to draw tokens with (unless temperature=0).")
    prompt = jnp.asarray(arguments.array(where, "prompt", prompt))
    if not jnp.issubdtype(prompt.dtype, jnp.integer) or prompt.ndim != 1 or not prompt.size:
        raise ValueError(
            f"{where}: prompt must be at least one token, integers of shape (positions,), but got "
            f"{arguments.show(prompt)}."
        )
    key = jax.random.key(0) if key is None else arguments.key(where, "key", key)
    if arguments.is_known(prompt):
        leaves, tree = jax.tree.flatten((*inputs, prompt.astype(jnp.int32)))
        vocabulary = _vocabulary(
            net, tree, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        )
        known = np.asarray(prompt)
        wrong = known[(known < 0) | (known >= vocabulary)]
        if wrong.size:
            raise ValueError(
                f"{where}: prompt holds {wrong[0]}, but the network's tokens are 0, ..., "
                f"{vocabulary - 1:.0f}."
            )
    return _generate(
        net, params, prompt, inputs, key, temperature, top_p, n=n, top_k=top_k, is_greedy=is_greedy
    )


@functools.lru_cache(maxsize=64)
def _vocabulary(net: Layer, tree: Any, types: tuple) -> float:
    """How many tokens the network knows: the fewest rows of a table that the prompt goes into.

    Only of an `Embedding` that is given the prompt as it is; else inf. The body is run on types.
    """
    sizes = [math.inf]

    def body(*xs):
        def watch(path, layer, times, written):
            def note(params, state, given, y):
                if isinstance(layer, Embedding) and any(x is xs[-1] for x in given):
                    sizes.append(layer.vocabulary)

            return note

        with watching(watch):
            return net._make(jax.random.key(0), None, *xs)[2]

    with jax.numpy_dtype_promotion("standard"):
        jax.eval_shape(body, *jax.tree.unflatten(tree, list(map(_type, types))))
    return min(sizes)


def _type(shape_and_dtype: tuple) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(*shape_and_dtype)


@functools.partial(jax.jit, static_argnames=("net", "n", "top_k", "is_greedy"))
def _generate(net, params, prompt, inputs, key, temperature, top_p, *, n, top_k, is_greedy):
    def draw(logits, key):
        if is_greedy:
            return jnp.argmax(logits).astype(jnp.int32)
        # Differences from the largest, for a small temperature would make several of them inf.
        logits = wide(logits)
        least = jnp.finfo(logits.dtype).tiny
        t = jnp.asarray(temperature, logits.dtype)
        logits = (logits - jnp.max(logits)) / jnp.maximum(t, least)
        logits = likely(logits, top_k, top_p)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    def step(carry, key):
        cache, logits = carry
        token = draw(logits, key)
        y, cache = net.extend(params, cache, *inputs, token[None])
        return (cache, y[-1]), token

    cache = net.init_cache(prompt.size + n - 1, *inputs, prompt)  # the last token isn't read
    y, cache = net.extend(params, cache, *inputs, prompt.astype(jnp.int32))
    keys = jax.random.split(key, n)
    (_, logits), tokens = lax.scan(step, (cache, y[-1]), keys[:-1])
    return jnp.append(tokens, draw(logits, keys[-1]))


def likely(logits: jax.Array, top_k: int | None, top_p: Any) -> jax.Array:
    """The logits `(vocabulary,)`, with −inf for those that are not to be drawn.

    Of equal ones the first are likelier.
    """
    if top_k is None and top_p is None:
        return logits
    order = jnp.argsort(logits, descending=True, stable=True)
    ordered = logits[order]
    if top_k is not None:
        ordered = jnp.where(jnp.arange(logits.size) < top_k, ordered, -jnp.inf)
    if top_p is not None:
        p = jax.nn.softmax(wide(ordered))
        ordered = jnp.where(jnp.cumsum(p) - p < jnp.asarray(top_p, p.dtype), ordered, -jnp.inf)
    return jnp.zeros_like(logits).at[order].set(ordered, unique_indices=True)
