"""Layers: networks of pure functions, for one example.

Layer                                     the protocol, to derive one's own from
network, chain, parallel, residual        networks made of layers
repeat                                    the same block many times, in one loop
Linear, Maxout                            layers
Conv, ConvTranspose, SqueezeExcite        convolution
MaxPool, AveragePool, ...                 pooling: also adaptive and global
Upsample, PixelShuffle                    more pixels
Dropout, DropPath, DropConnect            what is left out in training
LayerNorm, RMSNorm                        normalisation over features
GroupNorm, InstanceNorm, BatchNorm        ... over positions, over the batch
WeightNorm, SpectralNorm                  ... of a layer's weight
MLP, GatedMLP, MixerBlock                 blocks of linear layers
Embedding                                 of tokens
PositionEmbedding, SinusoidalPositions    of positions
Attention                                 multi-head attention: self, cross, grouped-query; a cache
LSTM, GRU, RNN                            recurrent layers
Once                                      what doesn't change from step to step: computed once
recurrent, bidirectional                  of a cell of one's own; from both ends
LRU                                       a diagonal state space
MixtureOfExperts                          many layers, each position through a few
lora, adapted, merge                      fine-tuning by low-rank adapters
Mode, EVALUATE, training                  whether a call trains
summary                                   a network as a table
"""

from fnn.layers.adapters import adapted, lora, merge
from fnn.layers.attention import Attention
from fnn.layers.combinators import chain, parallel, repeat, residual
from fnn.layers.convolution import Conv, ConvTranspose, SqueezeExcite
from fnn.layers.dropout import DropConnect, Dropout, DropPath
from fnn.layers.embedding import Embedding, PositionEmbedding, SinusoidalPositions
from fnn.layers.experts import MixtureOfExperts
from fnn.layers.gated import GatedMLP
from fnn.layers.layer import Layer, LayerError
from fnn.layers.linear import Linear
from fnn.layers.low_rank import AdaptedKernel, AdaptedWeight
from fnn.layers.maxout import Maxout
from fnn.layers.mixer import MLP, MixerBlock
from fnn.layers.mode import EVALUATE, Mode, training
from fnn.layers.net import Net, Network, network
from fnn.layers.normalization import (
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
    SpectralNorm,
    WeightNorm,
)
from fnn.layers.once import Once
from fnn.layers.pooling import (
    AdaptiveAveragePool,
    AdaptiveMaxPool,
    AveragePool,
    GlobalAveragePool,
    GlobalMaxPool,
    MaxPool,
)
from fnn.layers.recurrence import GRU, LSTM, RNN, bidirectional, recurrent
from fnn.layers.state_space import LRU
from fnn.layers.table import Summary, summary
from fnn.layers.upsampling import PixelShuffle, Upsample

__all__ = [
    "Conv",
    "ConvTranspose",
    "SqueezeExcite",
    "MaxPool",
    "AveragePool",
    "AdaptiveAveragePool",
    "AdaptiveMaxPool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "Upsample",
    "PixelShuffle",
    "EVALUATE",
    "GRU",
    "LRU",
    "LSTM",
    "MLP",
    "RNN",
    "AdaptedKernel",
    "AdaptedWeight",
    "Attention",
    "BatchNorm",
    "DropConnect",
    "DropPath",
    "Dropout",
    "Embedding",
    "GatedMLP",
    "GroupNorm",
    "InstanceNorm",
    "Layer",
    "LayerError",
    "LayerNorm",
    "Linear",
    "Maxout",
    "MixerBlock",
    "MixtureOfExperts",
    "Mode",
    "Net",
    "Network",
    "Once",
    "PositionEmbedding",
    "RMSNorm",
    "SinusoidalPositions",
    "SpectralNorm",
    "Summary",
    "WeightNorm",
    "adapted",
    "bidirectional",
    "chain",
    "lora",
    "merge",
    "network",
    "parallel",
    "recurrent",
    "repeat",
    "residual",
    "summary",
    "training",
]
