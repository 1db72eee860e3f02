"""Training: one compiled step, and epochs of them."""

from fnn.train.checkpoint_files import CheckpointError
from fnn.train.checkpoints import Checkpoints
from fnn.train.early_stopping import EarlyStopping
from fnn.train.evaluation import evaluate
from fnn.train.landscape import LossSurface, loss_surface
from fnn.train.loop import fit
from fnn.train.loss import Loss, Supervised, supervised
from fnn.train.loss_scaling import DynamicLossScale
from fnn.train.nonfinite import NonFiniteError
from fnn.train.observation import (
    ActivationStatistics,
    Histogram,
    PartStatistics,
    activation_statistics,
)
from fnn.train.rate_search import LearningRates, find_learning_rate
from fnn.train.result import FitResult
from fnn.train.state import State
from fnn.train.step import TrainStep, train_step

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "ActivationStatistics",
    "DynamicLossScale",
    "EarlyStopping",
    "FitResult",
    "Histogram",
    "LearningRates",
    "Loss",
    "LossSurface",
    "NonFiniteError",
    "PartStatistics",
    "State",
    "Supervised",
    "TrainStep",
    "activation_statistics",
    "evaluate",
    "find_learning_rate",
    "fit",
    "loss_surface",
    "supervised",
    "train_step",
]
