"""Whole networks, a page each, in the default configuration of their papers.

mlp                      multilayer perceptron
vae, negative_elbo,
decode                   variational autoencoder
lenet                    LeNet-5
resnet18, resnet50,
resnet                   residual networks
convnext                 ConvNeXt-T and its kind
unet                     U-Net, an image in and a map out
vit                      vision transformer
gpt2, llama              language models
lstm_language_model      language model of LSTMs
state_space_language_model
                         language model of linear recurrences
bert                     encoder of text
transformer              encoder and decoder, from one sequence to another
generate                 how a language model continues a text
load_torch, to_torch     PyTorch's parameters as ours, and back

Each is a function of hyperparameters that returns a `Network` of `fnn.layers`, for one example.
"""

from fnn.models.autoencoder import Reconstruction, decode, negative_elbo, vae
from fnn.models.conv_next import convnext
from fnn.models.conversion import load_torch, to_torch
from fnn.models.encoder import bert
from fnn.models.encoder_decoder import transformer
from fnn.models.generation import generate
from fnn.models.language import gpt2, llama
from fnn.models.lenet5 import lenet
from fnn.models.perceptron import mlp
from fnn.models.recurrent_language import lstm_language_model
from fnn.models.residual import resnet, resnet18, resnet50
from fnn.models.state_space_language import state_space_language_model
from fnn.models.u_net import unet
from fnn.models.vision_transformer import vit

__all__ = [
    "load_torch",
    "to_torch",
    "convnext",
    "lenet",
    "resnet",
    "resnet18",
    "resnet50",
    "unet",
    "Reconstruction",
    "bert",
    "decode",
    "generate",
    "gpt2",
    "llama",
    "lstm_language_model",
    "mlp",
    "negative_elbo",
    "state_space_language_model",
    "transformer",
    "vae",
    "vit",
]
