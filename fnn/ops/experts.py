"""Routing for a mixture of experts: which of them computes what."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from fnn import arguments, text
from fnn.ops.arguments import must_be_real
from fnn.precision import wide


class Routing(NamedTuple):
    """Which experts each token goes to, and what a router's training adds to the loss.

    Fields:
        experts: the k experts of each token, the best first, integers `(tokens, k)`.
        weights: by what their outputs are multiplied, `(tokens, k)`; 0 where there is no place.
        places: which place among its expert's tokens each has, integers `(tokens, k)`; the capacity
            where it has none.
        capacity: how many places each expert has, an int.
        balance_loss: about 1 where all experts get as many tokens, and up to their number where
            one gets all, a scalar.
        z_loss: how large the logits are, a scalar.
    """

    experts: jax.Array
    weights: jax.Array
    places: jax.Array
    capacity: int
    balance_loss: jax.Array
    z_loss: jax.Array

    def __repr__(self) -> str:
        return text.of_fields("Routing", **self._asdict())


def top_k_routing(logits: chex.Array, k: int, capacity: int | None = None) -> Routing:
    """Each token goes to the k experts with the largest logits.

    With p = softmax(logits) of each token:

        weights         p of the chosen k, over their sum (Shazeer et al.); for k = 1 p itself
                        (Fedus et al.), since only through it does the router get a gradient
        balance_loss    E Σₑ fₑ Pₑ, fₑ being expert e's share of all choices, Pₑ the mean of its p
        z_loss          the mean of (log Σₑ e^logit)² (Zoph et al.): it keeps the logits small

    Added to the loss, the balance loss by about 0.01 and the z loss by 0.001, they keep a few
    experts from getting all tokens.

    Args:
        logits: `(tokens, experts)`, floating.
        k: how many experts a token goes to.
        capacity: how many tokens an expert takes at most. All tokens' first choices have their
            places before any second choice; a token that comes too late isn't computed by that
            expert, and its weight is 0. None: there is a place for each.

    Returns:
        A `Routing`. The gradient of the weights and losses goes to the logits; which experts are
        chosen has none. All is computed in at least float32; the weights have the logits' dtype.

    This is no rule of its own: the backward pass of the formula keeps p and the choices, and no
    rule could keep less.

    Raises:
        TypeError: the logits aren't real floating, or k or the capacity no integer.
        ValueError: the logits have no shape (tokens, experts), or there are fewer experts than k.

    Sources: Shazeer et al., "Outrageously large neural networks", ICLR 2017; Fedus, Zoph, Shazeer,
    "Switch transformers", JMLR 2022, equations 4 to 6; Lepikhin et al., "GShard", ICLR 2021 (the
    places); Zoph et al., "ST-MoE", arXiv:2202.08906, equation 5.
    """
    op = "top_k_routing"
    must_be_real(op, logits=logits)
    logits = jnp.asarray(logits)
    k = arguments.integer(op, "k", k, least=1)
    if capacity is not None:
        capacity = arguments.integer(op, "capacity", capacity, least=1)
    if logits.ndim != 2 or logits.shape[1] < k:
        raise ValueError(
            f"{op}: argument 'logits' has shape {logits.shape}, wanted (tokens, experts) with at "
            f"least k={k} experts. (For a batch of sequences, jax.vmap it.)"
        )
    tokens, count = logits.shape
    z = wide(logits)
    p = jax.nn.softmax(z, axis=-1)
    # By the logits: of p those that are far behind are all 0.
    experts = jax.lax.top_k(jax.lax.stop_gradient(z), k)[1]
    is_chosen = jax.nn.one_hot(experts, count, dtype=jnp.int32)
    best = jnp.sum(jnp.where(is_chosen == 1, p[:, None], 0), axis=-1)
    weights = best if k == 1 else best / jnp.sum(best, axis=-1, keepdims=True)
    # All first choices come before the second ones.
    in_order = is_chosen.swapaxes(0, 1).reshape(k * tokens, count)
    before = jnp.cumsum(in_order, axis=0) - in_order
    places = jnp.sum(before * in_order, axis=-1, dtype=jnp.int32).reshape(k, tokens).T
    if capacity is None:
        capacity = max(tokens, 1)
    else:
        weights = jnp.where(places < capacity, weights, 0)
        places = jnp.minimum(places, capacity)
    share = jnp.sum(is_chosen, axis=(0, 1)).astype(p.dtype) / max(k * tokens, 1)
    balance = count * jnp.sum(share * jnp.sum(p, axis=0)) / max(tokens, 1)
    z_loss = jnp.sum(jax.nn.logsumexp(z, axis=-1) ** 2) / max(tokens, 1)
    return Routing(
        experts.astype(jnp.int32),
        weights.astype(logits.dtype),
        places,
        capacity,
        balance,
        z_loss,
    )
