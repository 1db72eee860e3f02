"""Losses of classifiers, which compare scores with labels.

Integer labels outside 0 … classes − 1, and answers outside [0, 1] to yes-or-no questions, raise
a ValueError wherever their values are known: outside jit. Compiled code can't raise: there an
integer label out of range gives a loss of NaN and a gradient of NaN, rather than a plausible
number. (`fnn.fit` and a training step look at labels before they run.)
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments
from fnn.operation import compiled_rule as rule
from fnn.ops.arguments import (
    is_floating,
    is_integer,
    must_be_alike,
    must_be_array,
    must_be_real,
    one_or_nan,
)
from fnn.ops.probabilities import log_softmax, softmax
from fnn.precision import signed, wide


@rule
def softmax_cross_entropy(
    logits: chex.Array, labels: chex.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """−Σᵢ qᵢ log softmax(logits)ᵢ: the softmax classifier's loss, −log of the right probability.

    Args:
        logits: unnormalised log-probabilities, floating, shape `(..., classes)`.
        labels: the right classes, integers of shape `(...)`; or distributions q over the
            classes, floating, of the logits' shape.
        label_smoothing: ε in [0, 1): q becomes (1 − ε) q + ε / classes.

    Returns:
        The loss, of shape `(...)`: a scalar for logits of shape `(classes,)`.

    Local gradient: for the logits p Σq − q with p = softmax(logits), which is p − q for a
    distribution ("probs[y] −= 1" in the lecture's code); for a distribution's labels
    −(1 − ε) log p. In 16 bits it is p Σq − q Σp, since Σp of a rounded p isn't 1, and p − q would
    be the rounding where the answer is right. Kept: p, the labels, and for distributions log p.
    Smooth, no kink. Where q is 0, a logit of −inf (an excluded class) adds nothing. Stable for
    logits of any size.

    Raises:
        TypeError: the logits aren't real floating, the labels neither integer nor floating.
        ValueError: the shapes don't fit, there are no classes, or label_smoothing is outside
            [0, 1).

    A label out of range gives NaN (see the top of this file).
    Sources: the lecture; Szegedy et al., "Rethinking the inception architecture",
    arXiv:1512.00567 (label smoothing).
    """
    _check_classes("softmax_cross_entropy", "logits", logits, labels, distributions=True)
    arguments.number("softmax_cross_entropy", "label_smoothing", label_smoothing, least=0, below=1)
    log_p = log_softmax(wide(logits))
    if is_integer(labels):
        loss = -_pick(log_p, labels)
    else:
        q = labels.astype(log_p.dtype)
        is_excluded = (q == 0) & (log_p == -jnp.inf)
        loss = -jnp.sum(q * jnp.where(is_excluded, 0, log_p), axis=-1)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * jnp.mean(log_p, axis=-1)
    return loss.astype(logits.dtype)


@softmax_cross_entropy.look
def _(types, logits, labels, *, label_smoothing):
    _look_at_classes("softmax_cross_entropy", types[0], labels)


@softmax_cross_entropy.forward
def _(logits, labels, *, label_smoothing):
    loss = softmax_cross_entropy(logits, labels, label_smoothing=label_smoothing)
    more = (log_softmax(logits),) if is_floating(labels) else ()
    return loss, (softmax(logits), labels, *more)


@softmax_cross_entropy.backward
def _(residuals, g, *, label_smoothing):
    """g (p Σq − q) for the logits, −(1 − ε) g log p for a distribution's labels."""
    p, labels, *log_p = residuals
    q = _target(labels, wide(p), label_smoothing)
    total = 1 if is_integer(labels) else jnp.sum(q, axis=-1, keepdims=True)
    if p.dtype.itemsize < 4:
        q = q * jnp.sum(wide(p), axis=-1, keepdims=True)
    g, dtype = wide(g)[..., None], p.dtype
    if is_integer(labels):
        g = g * one_or_nan(_is_class(labels, p), g.dtype)[..., None]
    d_logits = (g * (wide(p) * total - q)).astype(dtype)
    if is_integer(labels):
        return d_logits, None
    return d_logits, ((label_smoothing - 1) * g * wide(log_p[0])).astype(labels.dtype)


def _target(labels, p, smoothing):
    """q: the distribution over classes that the labels mean."""
    rest = smoothing / p.shape[-1]
    if is_integer(labels):
        return jnp.where(_one_hot(labels, p), 1 - smoothing + rest, rest).astype(p.dtype)
    return (1 - smoothing) * labels.astype(p.dtype) + rest


@rule
def multiclass_hinge(scores: chex.Array, labels: chex.Array, *, margin: float = 1.0) -> jax.Array:
    """Σ over j ≠ y of max(0, sⱼ − s_y + Δ): the lecture's multiclass SVM loss, Δ = `margin`.

    Args:
        scores: s, floating, shape `(..., classes)`.
        labels: the right classes y, integers of shape `(...)`.
        margin: Δ, by how much the right score should exceed each other score.

    Returns:
        The loss, of shape `(...)`: a scalar for scores of shape `(classes,)`.

    Local gradient: 1 for each wrong class within the margin (sⱼ − s_y + Δ > 0), minus their
    number for the right class. Kept: the mask of those classes (one byte an entry) and the
    labels. At the kink sⱼ − s_y + Δ = 0 the gradient is 0, as for `relu`.

    Raises:
        TypeError: the scores aren't real floating, or the labels not integers.
        ValueError: the shapes don't fit, or there are no classes.

    A label out of range gives NaN (see the top of this file).
    Sources: the lecture; Weston, Watkins, "Support vector machines for multi-class pattern
    recognition", 1999.
    """
    _check_classes("multiclass_hinge", "scores", scores, labels, distributions=False)
    arguments.number("multiclass_hinge", "margin", margin)
    return jnp.sum(_hinges(scores, labels, margin), axis=-1).astype(scores.dtype)


@multiclass_hinge.look
def _(types, scores, labels, *, margin):
    _look_at_classes("multiclass_hinge", types[0], labels)


@multiclass_hinge.forward
def _(scores, labels, *, margin):
    hinges = _hinges(scores, labels, margin)
    loss = multiclass_hinge(scores, labels, margin=margin)
    # Not "> 0", so that the NaN of a label out of range counts, and reaches the gradient.
    return loss, (~(hinges <= 0), labels)


@multiclass_hinge.backward
def _(residuals, g, *, margin):
    too_close, labels = residuals
    d = wide(g)
    d = d * one_or_nan(_is_class(labels, too_close), d.dtype)
    wrong = jnp.where(too_close, d[..., None], 0)
    return _add_at_label(wrong, labels, -jnp.sum(wrong, axis=-1)).astype(g.dtype), None


def _hinges(scores, labels, margin):
    """max(0, sⱼ − s_y + Δ) for the wrong classes, 0 for the right one."""
    scores = wide(scores)
    right = _pick(scores, labels)[..., None]
    margins = jnp.where(_one_hot(labels, scores), 0, (scores - right) + margin)
    return jnp.maximum(margins, 0)


@rule
def sigmoid_binary_cross_entropy(logits: chex.Array, labels: chex.Array) -> jax.Array:
    """−Σᵢ (zᵢ log σ(xᵢ) + (1 − zᵢ) log(1 − σ(xᵢ))): yes-or-no questions, each by itself.

    Args:
        logits: x, floating, any shape: one logit for each question.
        labels: z, the answers 0 and 1 (booleans, integers) or probabilities (floating), of
            the same shape.

    Returns:
        The loss, a scalar: the sum over all questions. For their mean divide by `logits.size`.

    Computed as max(x, 0) − x z + log(1 + e^−|x|), stable for logits of any size. Local gradient:
    σ(x) − z for the logits, as (1 − z) σ(x) − z σ(−x), which doesn't cancel where the answer is
    right; −x for floating labels. Kept: logits and labels. Smooth, no kink.

    Raises:
        TypeError: the logits aren't real floating, or the labels aren't real.
        ValueError: the shapes differ.

    Source: the lecture's notes, "attribute classification" (independent logistic regressions).
    """
    must_be_alike("sigmoid_binary_cross_entropy", logits=logits, labels=labels)
    x = wide(logits)
    z = labels.astype(logits.dtype).astype(x.dtype)
    each = jnp.where(x >= 0, x, 0) - x * z + jnp.log1p(jnp.exp(-jnp.abs(x)))
    return jnp.sum(each).astype(logits.dtype)


@sigmoid_binary_cross_entropy.look
def _(types, logits, labels):
    _look_at_answers("sigmoid_binary_cross_entropy", labels)


@sigmoid_binary_cross_entropy.forward
def _(logits, labels):
    return sigmoid_binary_cross_entropy(logits, labels), (logits, labels)


@sigmoid_binary_cross_entropy.backward
def _(residuals, g):
    logits, labels = residuals
    x = wide(logits)
    z = labels.astype(logits.dtype).astype(x.dtype)
    slope = (1 - z) * jax.nn.sigmoid(x) - z * jax.nn.sigmoid(-x)
    d_logits = (wide(g) * slope).astype(logits.dtype)
    return d_logits, (-g * logits).astype(labels.dtype) if is_floating(labels) else None


@rule
def sigmoid_focal(
    logits: chex.Array, labels: chex.Array, *, gamma: float = 2.0, alpha: float | None = None
) -> jax.Array:
    """Σᵢ mᵢ^γ cᵢ: `sigmoid_binary_cross_entropy`, with less weight for what is easily told.

    cᵢ is its term, and mᵢ = z (1 − σ(x)) + (1 − z) σ(x) how wrong the answer is.

    Args:
        logits: x, floating, any shape: one logit for each question.
        labels: z, the answers 0 and 1 (booleans, integers) or probabilities (floating), of
            the same shape.
        gamma: γ, at least 0, which gives the plain loss.
        alpha: a factor of the answers 1, 1 − alpha being that of the answers 0; None for none.

    Returns:
        The loss, a scalar: the sum over all questions. (The paper divides it by how many are 1.)

    Stable for logits of any size. Local gradient, with p = σ(x):
    m^γ (p − z + γ c (1 − 2z) p (1 − p) / m) for the logits, m^γ (γ c (1 − 2p) / m − x) for floating
    labels, times alpha's factor. Kept: logits and labels. Smooth, no kink; not convex.

    Raises:
        TypeError: the logits aren't real floating, or the labels aren't real.
        ValueError: the shapes differ, gamma is below 0, or alpha isn't from 0 to 1.

    Source: Lin, Goyal, Girshick, He, Dollár, "Focal loss for dense object detection", ICCV 2017.
    """
    must_be_alike("sigmoid_focal", logits=logits, labels=labels)
    arguments.number("sigmoid_focal", "gamma", gamma, least=0)
    if alpha is not None:
        arguments.number("sigmoid_focal", "alpha", alpha, least=0, most=1)
    _, z, c, weight, _ = _focal(logits, labels, gamma)
    return jnp.sum(_balance(z, alpha) * weight * c).astype(logits.dtype)


@sigmoid_focal.look
def _(types, logits, labels, *, gamma, alpha):
    _look_at_answers("sigmoid_focal", labels)


@sigmoid_focal.forward
def _(logits, labels, *, gamma, alpha):
    return sigmoid_focal(logits, labels, gamma=gamma, alpha=alpha), (logits, labels)


@sigmoid_focal.backward
def _(residuals, g, *, gamma, alpha):
    logits, labels = residuals
    x, z, c, weight, wrong = _focal(logits, labels, gamma)
    p, q = jax.nn.sigmoid(x), jax.nn.sigmoid(-x)
    factor = wide(g) * weight * _balance(z, alpha)
    # (1 − z) p − z q is p − z, and doesn't cancel where the answer is right.
    d_logits = factor * ((1 - z) * p - z * q + gamma * c * ((1 - 2 * z) * (p * q / wrong)))
    if not is_floating(labels):
        return d_logits.astype(logits.dtype), None
    d_labels = factor * (gamma * c * ((q - p) / wrong) - x)
    if alpha is not None:
        d_labels = d_labels + wide(g) * weight * c * (2 * alpha - 1)
    return d_logits.astype(logits.dtype), d_labels.astype(labels.dtype)


def _focal(logits, labels, gamma):
    """x and z in at least float32, c, m^γ, and m, 1 in its place where it is 0."""
    x = wide(logits)
    z = labels.astype(logits.dtype).astype(x.dtype)
    c = jnp.where(x >= 0, x, 0) - x * z + jnp.log1p(jnp.exp(-jnp.abs(x)))
    m = z * jax.nn.sigmoid(-x) + (1 - z) * jax.nn.sigmoid(x)
    wrong = jnp.where(m > 0, m, 1)
    weight = jnp.exp(gamma * jnp.log(wrong))
    return x, z, c, weight if gamma == 0 else jnp.where(m > 0, weight, 0), wrong


def _balance(z, alpha):
    return 1 if alpha is None else alpha * z + (1 - alpha) * (1 - z)


@rule
def kl_divergence(log_predictions: chex.Array, targets: chex.Array) -> jax.Array:
    """KL(q ‖ p) = Σᵢ qᵢ (log qᵢ − log pᵢ): how far predicted probabilities are from a distribution.

    Args:
        log_predictions: log p, floating, shape `(..., classes)`: `log_softmax(logits)`.
        targets: q, probabilities, floating, of the same shape.

    Returns:
        The divergence, of shape `(...)`: a scalar for one distribution.

    Local gradient: −q for log p, log q − log p + 1 for q. Kept: q and log q − log p. Where q is 0,
    the term and its gradients are 0, whatever p is. Smooth elsewhere.

    Raises:
        TypeError: an argument isn't real floating.
        ValueError: the shapes differ, or there are no classes.

    Source: Kullback, Leibler, "On information and sufficiency", 1951.
    """
    op = "kl_divergence"
    must_be_real(op, log_predictions=log_predictions, targets=targets)
    must_be_alike(op, log_predictions=log_predictions, targets=targets)
    if log_predictions.ndim == 0 or log_predictions.shape[-1] == 0:
        raise ValueError(
            f"{op}: argument 'log_predictions' has shape {log_predictions.shape}, wanted "
            "(..., classes) with at least one class."
        )
    q, difference = _log_ratio(log_predictions, targets)
    return jnp.sum(q * difference, axis=-1).astype(log_predictions.dtype)


@kl_divergence.forward
def _(log_predictions, targets):
    _, difference = _log_ratio(log_predictions, targets)
    difference = difference.astype(log_predictions.dtype)
    return kl_divergence(log_predictions, targets), (targets, difference)


@kl_divergence.backward
def _(residuals, g):
    targets, difference = residuals
    d, q = wide(g)[..., None], wide(targets)
    slope = jnp.where(q == 0, 0, wide(difference) + 1)
    return (-d * q.astype(d.dtype)).astype(g.dtype), (d * slope).astype(targets.dtype)


def _log_ratio(log_predictions, targets):
    """q, and log q − log p, or 0 where q is 0."""
    log_p = wide(log_predictions)
    q = targets.astype(log_p.dtype)
    is_zero = q == 0
    log_q = jnp.log(jnp.where(is_zero, 1, q))
    return q, jnp.where(is_zero, 0, log_q - jnp.where(is_zero, 0, log_p))


# ------------------------------------------------------------------------- labels and classes


def _look_at_answers(op, labels):
    if labels is None or not np.size(labels):
        return
    z = np.asarray(labels)
    low, high = z.min(), z.max()
    if low < 0 or high > 1:
        raise ValueError(
            f"{op}: labels must be from 0 to 1, but hold {low if low < 0 else high}. (Labels of -1 "
            "and 1: pass (labels + 1) / 2.)"
        )


def _look_at_classes(op, scores, labels):
    if labels is None or not is_integer(jax.typeof(labels)) or not np.size(labels):
        return
    y, classes = np.asarray(labels), scores.shape[-1]
    low, high = y.min(), y.max()
    if low < 0 or high >= classes:
        raise ValueError(
            f"{op}: labels hold {low if low < 0 else high}, but there are {classes} classes: "
            f"labels are 0, ..., {classes - 1}."
        )


def _one_hot(labels, scores):
    """True where an entry of `scores` belongs to the right class; nowhere for a wrong label."""
    index = signed(labels)[..., None]
    return jnp.arange(scores.shape[-1], dtype=index.dtype) == index


def _is_class(labels, scores):
    """Is there such a class?"""
    return (signed(labels) >= 0) & (signed(labels) < scores.shape[-1])


def _pick(scores, labels):
    """The score of the right class; NaN where there is no such class."""
    is_class = _is_class(labels, scores)
    index = jnp.where(is_class, signed(labels), 0)[..., None]
    picked = jnp.take_along_axis(scores, index, axis=-1, mode="promise_in_bounds")[..., 0]
    return picked * one_or_nan(is_class, picked.dtype)


def _add_at_label(x, labels, amount):
    """x with `amount` added to the right class's entry: in place, where a select copies x."""

    def add(x, label, amount):
        place = x.at[label]
        return place.add(amount, mode="drop", unique_indices=True, wrap_negative_indices=False)

    return jnp.vectorize(add, signature="(classes),(),()->(classes)")(x, signed(labels), amount)


def _check_classes(op, name, scores, labels, *, distributions):
    must_be_real(op, **{name: scores})
    must_be_array(op, "labels", labels)
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ValueError(
            f"{op}: argument '{name}' has shape {scores.shape}, wanted (..., classes) with at "
            "least one class."
        )
    if is_integer(labels):
        wanted, what = scores.shape[:-1], "integer labels"
    elif distributions and is_floating(labels):
        wanted, what = scores.shape, "distributions over the classes (floating labels)"
    else:
        raise TypeError(
            f"{op}: argument 'labels' of shape {labels.shape} has dtype {labels.dtype}, wanted "
            f"integers of shape {scores.shape[:-1]}"
            + (f" or floating distributions of shape {scores.shape}." if distributions else ".")
        )
    if labels.shape != wanted:
        raise ValueError(
            f"{op}: argument 'labels' has shape {labels.shape}, wanted {wanted} for {what} with "
            f"{name} of shape {scores.shape}. (For a batch of examples, jax.vmap the loss.)"
        )
