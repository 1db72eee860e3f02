"""Pictures of data, training and networks.

Each function returns a matplotlib `Figure`: show it in a notebook, or `figure.savefig(path)`.
matplotlib is an extra, `pip install "matplotlib>=3.9"`, and imported when a picture is made.

curves              a history over the epochs
templates           weights as images
two_layers          how a two-layer network reads an image: h, and what each template adds
confusion           the confusion matrix
decision_boundary   the plane as a classifier divides it
learning_rates      the loss against the learning rate, of `fnn.find_learning_rate`
activations         activations and gradients by part, of `fnn.activation_statistics`
loss_surface        the loss along two directions, of `fnn.loss_surface`
against             a quantity against a hyperparameter, of `fnn.sweep`
bands               a quantity over the epochs, with bands over seeds, of `fnn.sweep`
"""

from fnn.plot.classes import confusion, decision_boundary
from fnn.plot.distributions import activations
from fnn.plot.history import curves
from fnn.plot.hyperparameters import against, bands
from fnn.plot.images import templates
from fnn.plot.rates import learning_rates
from fnn.plot.reading import two_layers
from fnn.plot.surface import loss_surface

__all__ = [
    "activations",
    "against",
    "bands",
    "confusion",
    "curves",
    "decision_boundary",
    "learning_rates",
    "loss_surface",
    "templates",
    "two_layers",
]
