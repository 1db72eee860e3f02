"""The operations, each with a hand-written forward and backward; a file a family.

activations/sigmoids        S-shaped ones: sigmoid, tanh, ...
activations/rectifiers      relu, leaky_relu, elu, maxout, ...
activations/gated           a number times a gate: silu, gelu, glu, ...
normalization               rms_norm, layer_norm, group_norm, instance_norm, batch_norm; of weights
convolutions                convolution, conv_transpose
pooling                     max_pool, average_pool, adaptive_max_pool, adaptive_average_pool
upsampling                  upsample, resize, pixel_shuffle, pixel_unshuffle
probabilities               softmax, log_softmax, logsumexp
stochastic                  dropout
recurrent                   lstm, gru, rnn over a sequence; lstm_cell, gru_cell
state_space                 linear_recurrence
experts                     top_k_routing
losses/classification       softmax_cross_entropy, multiclass_hinge, sigmoid_focal, ...
losses/output               linear_softmax_cross_entropy
losses/regression           squared_error, huber, pinball, gaussian_nll, poisson_nll
losses/similarity           cosine_similarity, triplet, info_nce
losses/sequences            ctc
losses/regularization       l2
sequences/attention         attention
sequences/ring              ring_attention
sequences/embedding         embedding
sequences/positions         rotary, sinusoidal_positions, alibi_slopes
"""

from fnn.ops.activations.gated import geglu, gelu, glu, hard_silu, mish, silu, swiglu
from fnn.ops.activations.rectifiers import (
    celu,
    elu,
    leaky_relu,
    maxout,
    relu,
    relu6,
    selu,
    softplus,
    squareplus,
)
from fnn.ops.activations.sigmoids import (
    hard_sigmoid,
    hard_tanh,
    log_sigmoid,
    sigmoid,
    softsign,
    tanh,
)
from fnn.ops.convolutions import conv_transpose, convolution
from fnn.ops.experts import top_k_routing
from fnn.ops.losses.classification import (
    kl_divergence,
    multiclass_hinge,
    sigmoid_binary_cross_entropy,
    sigmoid_focal,
    softmax_cross_entropy,
)
from fnn.ops.losses.output import linear_softmax_cross_entropy
from fnn.ops.losses.regression import gaussian_nll, huber, pinball, poisson_nll, squared_error
from fnn.ops.losses.regularization import l2
from fnn.ops.losses.sequences import ctc
from fnn.ops.losses.similarity import cosine_distance, cosine_similarity, info_nce, triplet
from fnn.ops.normalization import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
    spectral_norm,
    weight_norm,
)
from fnn.ops.pooling import (
    adaptive_average_pool,
    adaptive_max_pool,
    average_pool,
    max_pool,
)
from fnn.ops.probabilities import log_softmax, logsumexp, softmax
from fnn.ops.recurrent import gru, gru_cell, lstm, lstm_cell, rnn
from fnn.ops.sequences.attention import attention
from fnn.ops.sequences.embedding import embedding
from fnn.ops.sequences.positions import alibi_slopes, rotary, sinusoidal_positions
from fnn.ops.sequences.ring import ring_attention
from fnn.ops.state_space import linear_recurrence
from fnn.ops.stochastic import dropout
from fnn.ops.upsampling import pixel_shuffle, pixel_unshuffle, resize, upsample

__all__ = [
    "adaptive_average_pool",
    "adaptive_max_pool",
    "alibi_slopes",
    "attention",
    "average_pool",
    "batch_norm",
    "celu",
    "conv_transpose",
    "convolution",
    "cosine_distance",
    "cosine_similarity",
    "ctc",
    "dropout",
    "elu",
    "embedding",
    "gaussian_nll",
    "geglu",
    "gelu",
    "glu",
    "group_norm",
    "gru",
    "gru_cell",
    "hard_sigmoid",
    "hard_silu",
    "hard_tanh",
    "huber",
    "info_nce",
    "instance_norm",
    "kl_divergence",
    "l2",
    "layer_norm",
    "leaky_relu",
    "linear_recurrence",
    "linear_softmax_cross_entropy",
    "log_sigmoid",
    "log_softmax",
    "logsumexp",
    "lstm",
    "lstm_cell",
    "max_pool",
    "maxout",
    "mish",
    "multiclass_hinge",
    "pinball",
    "pixel_shuffle",
    "pixel_unshuffle",
    "poisson_nll",
    "relu",
    "relu6",
    "resize",
    "ring_attention",
    "rms_norm",
    "rnn",
    "rotary",
    "selu",
    "sigmoid",
    "sigmoid_binary_cross_entropy",
    "sigmoid_focal",
    "silu",
    "sinusoidal_positions",
    "softmax",
    "softmax_cross_entropy",
    "softplus",
    "softsign",
    "spectral_norm",
    "squared_error",
    "squareplus",
    "swiglu",
    "tanh",
    "top_k_routing",
    "triplet",
    "upsample",
    "weight_norm",
]
