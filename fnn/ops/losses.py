"""Loss functions of one example: forward and backward side by side.

A loss is written for one example; `jax.vmap` makes it the losses of a batch, and their mean is
what training minimises. `softmax_cross_entropy` and `multiclass_hinge` classify: scores of
shape `(classes,)` give a scalar, and scores of shape `(positions, classes)`, as those of a
language model, one number for each position. The other losses sum over all entries of the
example, as the lecture does, and give a scalar.

The loss has the dtype of the logits, scores or prediction, which must be real floating-point
(else TypeError); labels and targets are converted to it. Shapes that don't fit raise a
ValueError; and so do labels outside 0 … classes − 1, or outside [0, 1] where they are
probabilities, wherever their values are known: outside jit. Compiled code can't raise: there an
integer label out of range gives a loss of NaN and a gradient of NaN, rather than a plausible
number. (`fnn.fit` and a training step look at labels before they run.)

"The lecture" is Stanford's CS231n, "Loss functions and optimization".
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments
from fnn.operation import compiled_rule as rule
from fnn.ops.activations import log_softmax, softmax
from fnn.ops.arguments import must_be_real, wide

# ----------------------------------------------------------------------------- classification


@rule
def softmax_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
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
    −(1 − ε) log p. Kept: p, the labels, and for distributions log p. Smooth, no kink. Where q
    is 0, a logit of −inf (an excluded class) adds nothing. Stable for logits of any size.

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
    if _is_integer(labels):
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
    more = (log_softmax(logits),) if _is_floating(labels) else ()
    return loss, (softmax(logits), labels, *more)


@softmax_cross_entropy.backward
def _(residuals, g, *, label_smoothing):
    p, labels, *more = residuals
    dtype, p, g = p.dtype, wide(p), wide(g)[..., None]
    smooth = label_smoothing / p.shape[-1]
    if _is_integer(labels):
        g = g * jnp.where(_is_class(labels, p), 1, jnp.nan)[..., None].astype(g.dtype)
        right = jnp.where(_one_hot(labels, p), (1 - label_smoothing) * g, 0)
        return ((g * (p - smooth) if smooth else g * p) - right).astype(dtype), None
    q = (1 - label_smoothing) * labels.astype(p.dtype) + smooth
    d_logits = g * (p * jnp.sum(q, axis=-1, keepdims=True) - q)
    d_labels = (label_smoothing - 1) * g * wide(more[0])
    return d_logits.astype(dtype), d_labels.astype(labels.dtype)


@rule
def multiclass_hinge(scores: jax.Array, labels: jax.Array, *, margin: float = 1.0) -> jax.Array:
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
    d = d * jnp.where(_is_class(labels, too_close), 1, jnp.nan).astype(d.dtype)
    wrong = jnp.where(too_close, d[..., None], 0)
    return _add_at_label(wrong, labels, -jnp.sum(wrong, axis=-1)).astype(g.dtype), None


def _hinges(scores, labels, margin):
    """max(0, sⱼ − s_y + Δ) for the wrong classes, 0 for the right one."""
    scores = wide(scores)
    right = _pick(scores, labels)[..., None]
    margins = jnp.where(_one_hot(labels, scores), 0, scores - (right - margin))
    return jnp.maximum(margins, 0)


@rule
def sigmoid_binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """−Σᵢ (zᵢ log σ(xᵢ) + (1 − zᵢ) log(1 − σ(xᵢ))): yes-or-no questions, each by itself.

    Args:
        logits: x, floating, any shape: one logit for each question.
        labels: z, the answers 0 and 1 (booleans, integers) or probabilities (floating), of
            the same shape.

    Returns:
        The loss, a scalar: the sum over all questions. For their mean divide by `logits.size`.

    Computed as max(x, 0) − x z + log(1 + e^−|x|), stable for logits of any size. Local gradient:
    σ(x) − z for the logits, −x for floating labels. Kept: logits and labels. Smooth, no kink.

    Raises:
        TypeError: the logits aren't real floating, or the labels aren't real.
        ValueError: the shapes differ.

    Source: the lecture's notes, "attribute classification" (independent logistic regressions).
    """
    _check_equal_shapes("sigmoid_binary_cross_entropy", "logits", logits, "labels", labels)
    x = wide(logits)
    z = labels.astype(logits.dtype).astype(x.dtype)
    each = jnp.where(x >= 0, x, 0) - x * z + jnp.log1p(jnp.exp(-jnp.abs(x)))
    return jnp.sum(each).astype(logits.dtype)


@sigmoid_binary_cross_entropy.look
def _(types, logits, labels):
    if labels is None or not np.size(labels):
        return
    z = np.asarray(labels)
    low, high = z.min(), z.max()
    if low < 0 or high > 1:
        raise ValueError(
            f"sigmoid_binary_cross_entropy: labels must be from 0 to 1, but hold "
            f"{low if low < 0 else high}. (Labels of -1 and 1: pass (labels + 1) / 2.)"
        )


@sigmoid_binary_cross_entropy.forward
def _(logits, labels):
    return sigmoid_binary_cross_entropy(logits, labels), (logits, labels)


@sigmoid_binary_cross_entropy.backward
def _(residuals, g):
    logits, labels = residuals
    d_logits = g * (jax.nn.sigmoid(logits) - labels.astype(logits.dtype))
    return d_logits, (-g * logits).astype(labels.dtype) if _is_floating(labels) else None


# --------------------------------------------------------------------------------- regression


@rule
def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Σᵢ (fᵢ − tᵢ)²: the squared distance of prediction f and target t.

    Args:
        prediction: f, floating, any shape.
        target: t, real, of the same shape.

    Returns:
        The loss, a scalar: the sum over all entries, without a factor ½.

    Local gradient: 2 (f − t) for the prediction, −2 (f − t) for a floating target. Kept:
    f − t. Smooth, no kink. It overflows, as any square, beyond the root of the dtype's largest.

    Raises:
        TypeError: the prediction isn't real floating, or the target isn't real.
        ValueError: the shapes differ.

    Source: the lecture's notes, "regression".
    """
    _check_equal_shapes("squared_error", "prediction", prediction, "target", target)
    difference = wide(prediction) - wide(target.astype(prediction.dtype))
    return jnp.sum(jnp.square(difference)).astype(prediction.dtype)


@squared_error.forward
def _(prediction, target):
    difference = prediction - target.astype(prediction.dtype)
    return squared_error(prediction, target), (difference, _empty(target))


@squared_error.backward
def _(residuals, g):
    difference, target = residuals
    d_prediction = (wide(g) * (2 * wide(difference))).astype(g.dtype)
    return d_prediction, (-d_prediction).astype(target.dtype) if _is_floating(target) else None


@rule
def huber(prediction: jax.Array, target: jax.Array, *, delta: float = 1.0) -> jax.Array:
    """Σᵢ of ½ d² where |d| ≤ δ, of δ (|d| − ½ δ) elsewhere; d = fᵢ − tᵢ, δ = `delta`.

    A square near zero and a straight line beyond, which outliers pull at with a bounded force.

    Args:
        prediction: f, floating, any shape.
        target: t, real, of the same shape.
        delta: where the square becomes a line, positive.

    Returns:
        The loss, a scalar: the sum over all entries.

    Computed as |c| (|d| − ½ |c|) with c = d clipped to ±δ: no square of a large d. Local
    gradient: c for the prediction, −c for a floating target. Kept: c. The gradient has no
    kink; its derivative jumps from 1 to 0 at |d| = δ, and is 0 there.

    Raises:
        TypeError: the prediction isn't real floating, or the target isn't real.
        ValueError: the shapes differ, or delta isn't positive.

    Source: Huber, "Robust estimation of a location parameter", 1964.
    """
    _check_equal_shapes("huber", "prediction", prediction, "target", target)
    arguments.number("huber", "delta", delta, above=0, infinite=True)
    d = prediction - target.astype(prediction.dtype)
    return _huber(d, _clip(d, delta))


@huber.forward
def _(prediction, target, *, delta):
    d = prediction - target.astype(prediction.dtype)
    c = _clip(d, delta)
    return _huber(d, c), (c, _empty(target))


@huber.backward
def _(residuals, g, *, delta):
    c, target = residuals
    d_prediction = g * c
    return d_prediction, (-d_prediction).astype(target.dtype) if _is_floating(target) else None


def _huber(d, c):
    size, clipped = jnp.abs(wide(d)), jnp.abs(wide(c))
    return jnp.sum(clipped * (size - 0.5 * clipped)).astype(d.dtype)


def _clip(d, delta):
    """d between ±δ; a select, for its derivative at |d| = δ is 0 from either side."""
    return jnp.where(jnp.abs(d) < delta, d, (delta * jnp.sign(d)).astype(d.dtype))


@rule
def gaussian_nll(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """−log N(t; m, eˢ) = ½ Σᵢ (sᵢ + (tᵢ − mᵢ)² e^−sᵢ + log 2π): a regression that tells how
    sure it is.

    Args:
        prediction: the means m and the logarithms s of the variances, side by side along the
            last axis: floating, shape `(..., 2)`.
        target: t, real, of shape `(...)`.

    Returns:
        The loss, a scalar: the sum over all entries of the target.

    With w = (t − m) e^(−s/2), the local gradient is −w e^(−s/2) for the mean, ½ (1 − w²) for
    the log variance, and w e^(−s/2) for a floating target. Kept: w and e^(−s/2). Smooth, no
    kink; not convex in s and m together. e^(−s/2) ends at a third of the dtype's largest number,
    so that t = m gives no nan; w² overflows, as any square, beyond the root of the largest.

    Raises:
        TypeError: the prediction isn't real floating, or the target isn't real.
        ValueError: the prediction's shape isn't the target's and an axis of 2 more.

    Source: Nix, Weigend, "Estimating the mean and variance of the target probability
    distribution", 1994.
    """
    _check_means_and_variances(prediction, target)
    w, _ = _standardised(prediction, target)
    return _gaussian_nll(w, prediction)


@gaussian_nll.forward
def _(prediction, target):
    _check_means_and_variances(prediction, target)
    w, root_precision = _standardised(prediction, target)
    return _gaussian_nll(w, prediction), (w, root_precision, _empty(target))


@gaussian_nll.backward
def _(residuals, g):
    w, root_precision, target = residuals
    dtype, g, w = g.dtype, wide(g), wide(w)
    d_target = g * (w * wide(root_precision))
    d_prediction = jnp.stack([-d_target, g * (0.5 * (1 - jnp.square(w)))], axis=-1).astype(dtype)
    return d_prediction, d_target.astype(target.dtype) if _is_floating(target) else None


def _gaussian_nll(w, prediction):
    each = wide(prediction[..., 1]) + jnp.square(wide(w)) + math.log(2 * math.pi)
    return (0.5 * jnp.sum(each)).astype(prediction.dtype)


def _standardised(prediction, target):
    """(t − m) / σ and 1 / σ."""
    mean, log_variance = prediction[..., 0], prediction[..., 1]
    largest = math.log(float(jnp.finfo(prediction.dtype).max)) - 1
    root_precision = jnp.exp(jnp.minimum(-0.5 * log_variance, largest))
    return (target.astype(prediction.dtype) - mean) * root_precision, root_precision


def _check_means_and_variances(prediction, target):
    must_be_real("gaussian_nll", prediction=prediction)
    arguments.array("gaussian_nll", "target", target)
    if jnp.issubdtype(target.dtype, jnp.complexfloating):
        raise TypeError(
            f"gaussian_nll: argument 'target' of shape {target.shape} has dtype {target.dtype}, "
            "wanted real numbers."
        )
    if prediction.shape != (*target.shape, 2):
        raise ValueError(
            f"gaussian_nll: argument 'prediction' has shape {prediction.shape}, wanted "
            f"{(*target.shape, 2)}: a mean and a log variance for each entry of 'target', along "
            "the last axis."
        )


# ----------------------------------------------------------------------------- regularisation


@rule
def l2(params: Any) -> jax.Array:
    """R(W) = Σ w² over all entries of a tree of parameters; add λ R(W) to the loss.

    Args:
        params: a pytree of real floating arrays of any shapes, such as `params["hidden"]["W"]`
            or all parameters of a network.

    Returns:
        The penalty, a scalar without a factor ½, of the dtype that JAX's promotion gives the
        arrays together (0 of the default floating dtype for an empty tree).

    Local gradient: 2 w. Kept: the parameters, no copy. Smooth, no kink. Adding λ R(W) with
    plain gradient descent is weight decay of 2 λ.

    Raises:
        TypeError: an array isn't real floating (the message gives its path).

    Source: the lecture ("R(W) = Σ W²", L2 regularisation).
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, w in leaves:
        must_be_real("l2", **{f"params{jax.tree_util.keystr(path)}": w})
    with jax.numpy_dtype_promotion("standard"):  # a tree may mix dtypes, also in strict mode
        dtype = jnp.result_type(*(w.dtype for _, w in leaves)) if leaves else jnp.result_type(float)
    zero = wide(jnp.zeros((), dtype))
    squares = (jnp.sum(jnp.square(wide(w))).astype(zero.dtype) for _, w in leaves)
    return sum(squares, zero).astype(dtype)


@l2.forward
def _(params):
    return l2(params), params


@l2.backward
def _(params, g):
    def gradient(w):
        return (wide(g).astype(wide(w).dtype) * (2 * wide(w))).astype(w.dtype)

    return (jax.tree.map(gradient, params),)


# ------------------------------------------------------------------------- labels and classes


def _is_integer(x):
    return jnp.issubdtype(x.dtype, jnp.integer)


def _is_floating(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def _look_at_classes(op, scores, labels):
    if labels is None or not _is_integer(jax.typeof(labels)) or not np.size(labels):
        return
    y, classes = np.asarray(labels), scores.shape[-1]
    low, high = y.min(), y.max()
    if low < 0 or high >= classes:
        raise ValueError(
            f"{op}: labels hold {low if low < 0 else high}, but there are {classes} classes: "
            f"labels are 0, ..., {classes - 1}."
        )


def _index(labels):
    """Labels as signed integers wide enough to count classes: an int8 ends at 127."""
    return jnp.asarray(labels, jnp.int64 if labels.dtype.itemsize == 8 else jnp.int32)


def _one_hot(labels, scores):
    """True where an entry of `scores` belongs to the right class; nowhere for a wrong label."""
    index = _index(labels)[..., None]
    return jnp.arange(scores.shape[-1], dtype=index.dtype) == index


def _is_class(labels, scores):
    return (_index(labels) >= 0) & (_index(labels) < scores.shape[-1])


def _pick(scores, labels):
    """The score of the right class; NaN where there is no such class."""
    is_class = _is_class(labels, scores)
    index = jnp.where(is_class, _index(labels), 0)[..., None]
    picked = jnp.take_along_axis(scores, index, axis=-1, mode="promise_in_bounds")[..., 0]
    return jnp.where(is_class, picked, jnp.nan)


def _add_at_label(x, labels, amount):
    """x with `amount` added to the right class's entry: in place, where a select copies x."""

    def add(x, label, amount):
        place = x.at[label]
        return place.add(amount, mode="drop", unique_indices=True, wrap_negative_indices=False)

    return jnp.vectorize(add, signature="(classes),(),()->(classes)")(x, _index(labels), amount)


def _empty(x):
    """A residual without entries, which only tells the dtype of x."""
    return jnp.zeros((0,), x.dtype)


def _check_classes(op, name, scores, labels, *, distributions):
    must_be_real(op, **{name: scores})
    arguments.array(op, "labels", labels)
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ValueError(
            f"{op}: argument '{name}' has shape {scores.shape}, wanted (..., classes) with at "
            "least one class."
        )
    if _is_integer(labels):
        wanted, what = scores.shape[:-1], "integer labels"
    elif distributions and _is_floating(labels):
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


def _check_equal_shapes(op, name, x, other_name, other):
    must_be_real(op, **{name: x})
    arguments.array(op, other_name, other)
    if jnp.issubdtype(other.dtype, jnp.complexfloating):
        raise TypeError(
            f"{op}: argument '{other_name}' of shape {other.shape} has dtype {other.dtype}, "
            "wanted real numbers."
        )
    if x.shape != other.shape:
        raise ValueError(
            f"{op}: argument '{other_name}' has shape {other.shape}, wanted {x.shape}, the shape "
            f"of '{name}'."
        )
