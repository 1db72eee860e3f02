"""Losses of sequences whose labels aren't aligned with them."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import lax

from fnn import arguments
from fnn.meshes import same_varying_axes
from fnn.ops.arguments import is_integer, must_be_array, must_be_real
from fnn.ops.probabilities import log_softmax, logsumexp
from fnn.precision import signed, wide


def ctc(
    logits: chex.Array,
    labels: chex.Array,
    mask: chex.Array | None = None,
    label_mask: chex.Array | None = None,
    *,
    blank: int = 0,
) -> jax.Array:
    """−log of the probability that the frames spell the labels, in any alignment (CTC).

    Each frame says a label or a blank; what is said is read without blanks, and repeated labels
    that no blank parts are one. The sum over all alignments is by dynamic programming over the
    frames, a `scan`; its gradient is by JAX and the rules of `log_softmax` and `logsumexp`.

    Args:
        logits: of one example, floating, `(frames, classes)`, the blank being one of the classes.
        labels: integers, `(length,)`, none of them the blank. Where they are known, one that
            counts and is the blank is refused; in compiled code, which can't raise, it gives nan.
        mask: which frames count, booleans `(frames,)`, the first ones; None for all.
        label_mask: which labels count, booleans `(length,)`, the first ones; None for all.
        blank: the number of the blank's class.

    Returns:
        The loss, a scalar. Where the frames are too few to spell the labels it is inf, and its
        gradient 0. A label that is no class gives nan.

    Raises:
        TypeError: the logits aren't real floating, the labels not integers, a mask not boolean.
        ValueError: a shape doesn't fit, blank is no class, or a label is the blank.

    Source: Graves, Fernández, Gomez, Schmidhuber, "Connectionist temporal classification", ICML
    2006.
    """
    op = "ctc"
    must_be_real(op, logits=logits)
    logits = jnp.asarray(logits)
    must_be_array(op, "labels", labels)
    if logits.ndim != 2 or logits.shape[-1] == 0:
        raise ValueError(
            f"{op}: argument 'logits' has shape {logits.shape}, wanted (frames, classes). (For a "
            "batch of examples, jax.vmap the loss.)"
        )
    if not is_integer(labels):
        raise TypeError(f"{op}: argument 'labels' has dtype {labels.dtype}, wanted integers.")
    if labels.ndim != 1:
        raise ValueError(f"{op}: argument 'labels' has shape {labels.shape}, wanted (length,).")
    blank = arguments.integer(op, "blank", blank, least=0, most=logits.shape[-1] - 1)
    labels = signed(jnp.asarray(labels))
    is_label = _mask(op, "label_mask", label_mask, labels.shape)
    is_blank = is_label & (labels == blank)
    if arguments.is_known(is_blank) and bool(jnp.any(is_blank)):
        raise ValueError(
            f"{op}: argument 'labels' holds {blank}, the blank's class, at place "
            f"{int(jnp.argmax(is_blank))}: no label is the blank. (What only fills the row up "
            "is left out by label_mask.)"
        )
    # No class, and none from the end. What doesn't count may be any number: a blank is a class.
    labels = jnp.where((labels < 0) | is_blank, logits.shape[-1], labels)
    labels = jnp.where(is_label, labels, blank)
    # What may be said, in turn: blank, first label, blank, ..., last label, blank.
    said = jnp.full(2 * labels.size + 1, blank, labels.dtype).at[1::2].set(labels)
    is_new = (said != blank) & (said != jnp.roll(said, 2))  # the blank before may be left out
    is_new = is_new & (jnp.arange(said.size) > 1)
    counts = _mask(op, "mask", mask, logits.shape[:1])
    log_p = log_softmax(wide(jnp.where(counts[:, None], logits, 0)))
    each = jnp.take(log_p, said, axis=-1, mode="fill", fill_value=jnp.nan)
    start = jnp.where(jnp.arange(said.size) == 0, 0, -jnp.inf).astype(each.dtype)
    each, is_new, counts, start = same_varying_axes([each, is_new, counts, start])

    def frame(a, own):
        """a: the log probability of all alignments so far that end at each of these."""
        log_p, is_frame = own
        before = [_behind(a, 1), jnp.where(is_new, _behind(a, 2), -jnp.inf)]
        moved = logsumexp(jnp.stack([a, *before]), axis=0) + log_p
        return jnp.where(is_frame, moved, a), None

    a, _ = lax.scan(frame, start, (each, counts))
    length = jnp.sum(is_label, dtype=jnp.int32)
    place = jnp.arange(said.size, dtype=jnp.int32)
    is_end = (place == 2 * length) | (place == 2 * length - 1)
    return -logsumexp(jnp.where(is_end, a, -jnp.inf)).astype(logits.dtype)


def _behind(a, places):
    """a, moved on by some places; −inf comes in."""
    return jnp.concatenate([jnp.full(places, -jnp.inf, a.dtype), a])[: a.size]


def _mask(op, name, mask, shape):
    if mask is None:
        return jnp.ones(shape, bool)
    must_be_array(op, name, mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"{op}: argument '{name}' has dtype {mask.dtype}, wanted booleans.")
    if mask.shape != shape:
        raise ValueError(f"{op}: argument '{name}' has shape {mask.shape}, wanted {shape}.")
    return mask
