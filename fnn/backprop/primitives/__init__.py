"""The hand-written backward rules of JAX's own primitives, a file a family.

From the lecture's word to the primitive that JAX makes of it, and the file of its rule:

    add gate, skip connection, bias          add                     elementwise
    mul gate, dropout mask                   mul                     elementwise
    max gate, ReLU                           max                     elementwise
    leaky ReLU, masking                      select_n                elementwise
    sigmoid                                  logistic                elementwise
    tanh                                     tanh                    elementwise
    softmax: exponential                     exp                     elementwise
    softmax, normalisation: quotient         div                     elementwise
    cross-entropy: log of a probability      log                     elementwise
    squared error, L2 regularisation         square                  elementwise
    batch norm: 1 / standard deviation       rsqrt                   elementwise
    batch norm: mean; sum of a loss          reduce_sum              reductions
    maxout; softmax: largest score           reduce_max              reductions
    prediction: the best class               argmax                  reductions
    matmul, fully-connected layer, score     dot_general             matmul
    mixture of experts                       ragged_dot_general      matmul
    convolution, transposed convolution      conv_general_dilated    convolution
    max-pool                                 reduce_window_max       pooling
    average-pool                             reduce_window_sum       pooling
    embedding lookup, score of a class       gather                  indexing
    writing into a cache                     dynamic_update_slice    indexing
    flatten                                  reshape                 structural
    transpose                                transpose               structural
    repeating a bias for each example        broadcast_in_dim        structural
    zero-padding                             pad                     structural
    crop                                     slice                   structural
    depth concatenation                      concatenate             structural
    PCA, whitening                           eigh                    linear_algebra
    recurrent network                        scan                    control_flow

`control_flow` is fnn/backprop/control_flow.py. What fnn has as one operation, with a forward and
a backward of its own, stands in fnn/ops:

    sigmoid, tanh                            activations/sigmoids
    ReLU, leaky ReLU, ELU, maxout            activations/rectifiers
    GELU, SiLU (swish), GLU                  activations/gated
    softmax                                  probabilities
    convolution                              convolutions
    max pooling, average pooling             pooling
    upsampling                               upsampling
    layer norm, RMS norm, batch norm         normalization
    dropout                                  stochastic
    mixture of experts                       experts
    linear recurrence                        state_space
    LSTM, GRU                                recurrent
    attention                                sequences/attention
    attention over several devices           sequences/ring
    embedding                                sequences/embedding
    rotary and sinusoidal positions          sequences/positions
    cross-entropy, hinge loss (SVM)          losses/classification
    cross-entropy of a large vocabulary      losses/output
    squared error                            losses/regression
    triplet loss, InfoNCE                    losses/similarity
    CTC                                      losses/sequences
    L2 regularisation                        losses/regularization

The table of rules is put together here and nowhere else; a primitive without a rule falls back
to `jax.vjp` of its one equation.
"""

from __future__ import annotations

from fnn.backprop import control_flow
from fnn.backprop.primitives import (
    convolution,
    elementwise,
    fourier,
    indexing,
    linear_algebra,
    matmul,
    pooling,
    reductions,
    structural,
)
from fnn.backprop.rules import ControlRule, LocalRule
from fnn.jaxpr import Equation
from fnn.operation import call_of, linear_map_of

FALLBACK = ControlRule(*control_flow.THROUGH_JAX)


def rule_of(equation: Equation) -> LocalRule | ControlRule:
    """The rule of an equation: its operation's, its primitive's, or JAX's own as a fallback."""
    if call_of(equation) is not None:
        return control_flow.OPERATION
    if linear_map_of(equation) is not None:
        return control_flow.THROUGH_JAX
    return RULES.get(equation.name, FALLBACK)


def is_ruled(equation: Equation) -> bool:
    """Has this equation a hand-written rule?"""
    return rule_of(equation) is not FALLBACK


RULES: dict[str, LocalRule | ControlRule] = {
    **elementwise.RULES,
    **reductions.RULES,
    **structural.RULES,
    **indexing.RULES,
    **matmul.RULES,
    **convolution.RULES,
    **pooling.RULES,
    **fourier.RULES,
    **linear_algebra.RULES,
    **control_flow.rules(rule_of),
}
