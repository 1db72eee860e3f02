"""Whole networks, a page each, in the default configuration of their papers.

mlp                      multilayer perceptron
vae, negative_elbo,
decode                   variational autoencoder
vit                      vision transformer
gpt2, llama              language models
bert                     encoder of text
transformer              encoder and decoder, from one sequence to another
generate                 how a language model continues a text

Each is a function of hyperparameters that returns a `Network` of `fnn.layers`, for one example.
"""

from fnn.models.autoencoder import Reconstruction, decode, negative_elbo, vae
from fnn.models.encoder import bert
from fnn.models.encoder_decoder import transformer
from fnn.models.generation import generate
from fnn.models.language import gpt2, llama
from fnn.models.perceptron import mlp
from fnn.models.vision_transformer import vit

__all__ = [
    "bert",
    "generate",
    "gpt2",
    "llama",
    "transformer",
    "vit",
    "Reconstruction",
    "decode",
    "mlp",
    "negative_elbo",
    "vae",
]
