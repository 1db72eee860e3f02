"""Per-example gradients from one backward pass, kept factored, and what follows from them.

    losses, g = fnn.per_example.grads(loss)(params, batch)
    fnn.per_example.norms(g)

grads                               the gradient of each example, factored
sum, mean, weighted_sum             gradients of sums
scale, add                          multiples and sums of two, example by example
norms, gram, dot                    inner products
second_moment, variance             entry by entry
noise, noise_scale                  how large a batch is worth while
materialize, explain                the gradients themselves; how they are kept
clipped_grad                        the sum of clipped gradients, for differential privacy
"""

from fnn.per_example.clipping import Clipped, clipped_grad
from fnn.per_example.differentiate import grads
from fnn.per_example.gradient import FactoredGradient
from fnn.per_example.quantities import (
    Explanation,
    Noise,
    add,
    dot,
    explain,
    gram,
    materialize,
    mean,
    noise,
    noise_scale,
    norms,
    scale,
    second_moment,
    sum,
    variance,
    weighted_sum,
)

__all__ = [
    "Clipped",
    "Explanation",
    "FactoredGradient",
    "Noise",
    "add",
    "clipped_grad",
    "dot",
    "explain",
    "grads",
    "gram",
    "materialize",
    "mean",
    "noise",
    "noise_scale",
    "norms",
    "scale",
    "second_moment",
    "sum",
    "variance",
    "weighted_sum",
]
