"""Layers: networks as pairs of pure functions, for one example."""

from fnn.layers.combinators import chain, parallel, residual
from fnn.layers.layer import Layer, as_layer, constructor
from fnn.layers.linear import Linear
from fnn.layers.maxout import Maxout
from fnn.layers.table import Summary, summary

__all__ = [
    "Layer",
    "Linear",
    "Maxout",
    "Summary",
    "as_layer",
    "chain",
    "constructor",
    "parallel",
    "residual",
    "summary",
]
