"""Training: one compiled step, and epochs of them."""

from fnn.train.evaluation import evaluate
from fnn.train.loop import fit
from fnn.train.loss import Loss, Supervised, supervised
from fnn.train.nonfinite import NonFiniteError
from fnn.train.result import FitResult
from fnn.train.state import State
from fnn.train.step import TrainStep, train_step

__all__ = [
    "FitResult",
    "Loss",
    "NonFiniteError",
    "State",
    "Supervised",
    "TrainStep",
    "evaluate",
    "fit",
    "supervised",
    "train_step",
]
