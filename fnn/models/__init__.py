"""Whole networks, a page each, in the default configuration of their papers.

mlp                      multilayer perceptron
vae, negative_elbo,
decode                   variational autoencoder

Each is a function of hyperparameters that returns a `Network` of `fnn.layers`, for one example.
"""

from fnn.models.autoencoder import Reconstruction, decode, negative_elbo, vae
from fnn.models.perceptron import mlp

__all__ = [
    "Reconstruction",
    "decode",
    "mlp",
    "negative_elbo",
    "vae",
]
