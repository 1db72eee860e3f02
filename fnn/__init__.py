"""fnn: neural networks as pure functions, with a backward pass written by hand.

rule                        an operation from its forward and backward
graph                       a function as its computational graph
grad, value_and_grad, vjp   backpropagation by the hand-written rules
check_rule, check_grads     rules against autodiff against finite differences
find_nonfinite              where a nan or inf was born: operation, part, line, step of a loop
memory                      what the backward pass keeps, part by part; what a program takes
keep_memory                 programs on a CPU take the same memory at each call
ops                         activations and losses
layers, initializers        networks, as pure functions of their parameters
models                      whole networks
sharding                    layouts over many devices
params                      parameters by path, and their files
train_step, fit             training
EarlyStopping               what ends it where it no longer gets better
Checkpoints                 what fit keeps in a folder, to go on from
sweep                       many trainings by one program
logs                        what fit writes of each epoch
find_learning_rate, activation_statistics, loss_surface
                            looking at training
per_example                 per-example gradients, kept factored
curvature                   Gauss-Newton, Hessian, Fisher, KFAC
plot                        pictures
"""

from fnn import (
    curvature,
    initializers,
    layers,
    logs,
    models,
    ops,
    params,
    per_example,
    plot,
    sharding,
)
from fnn.backprop import Graph, grad, graph, value_and_grad, vjp
from fnn.birth import find_nonfinite
from fnn.check import GradientError, check_grads, check_rule
from fnn.footprint import memory
from fnn.heap import keep_memory
from fnn.layers import summary
from fnn.operation import Operation, RuleError, rule
from fnn.sweeps import Halving, SweepResult, sweep
from fnn.train import (
    CheckpointError,
    Checkpoints,
    DynamicLossScale,
    EarlyStopping,
    FitResult,
    NonFiniteError,
    State,
    TrainStep,
    activation_statistics,
    evaluate,
    find_learning_rate,
    fit,
    loss_surface,
    supervised,
    train_step,
)

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "DynamicLossScale",
    "EarlyStopping",
    "FitResult",
    "GradientError",
    "Graph",
    "Halving",
    "NonFiniteError",
    "Operation",
    "RuleError",
    "State",
    "SweepResult",
    "TrainStep",
    "activation_statistics",
    "check_grads",
    "check_rule",
    "curvature",
    "evaluate",
    "find_learning_rate",
    "find_nonfinite",
    "fit",
    "grad",
    "graph",
    "initializers",
    "keep_memory",
    "layers",
    "logs",
    "loss_surface",
    "memory",
    "models",
    "ops",
    "params",
    "per_example",
    "plot",
    "rule",
    "sharding",
    "summary",
    "supervised",
    "sweep",
    "train_step",
    "value_and_grad",
    "vjp",
]
