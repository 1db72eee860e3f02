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

Each module imports only from those above it:

    precision        arithmetic in which nothing overflows
    measured         a norm, and how far it can be relied on
    layout           where the entries of a product of factors lie in a parameter's array
    product          the gradient of a weight in a matrix product, Gᵀ A
    convolution      that of a convolution's kernel
    rows             that of a table of which rows are looked up
    terms            one example's gradient of one parameter: a sum of these, or dense
    inner_products   of one example's gradient, with an array or of two terms

    sides            what a value depends on: parameters, the example
    meetings         rules: where a parameter meets the example
    operations       rules: the same in operations of fnn's own
    passages         rules: among parameters alone
    loops            rules: loops and checkpoints that hold both
    factors          the reverse sweep with these rules

    exact_norms      norms within rounding of the formed gradients'
    pairs            inner products of all pairs of examples
    sums             weighted sums over a batch
    moments          second moments and variances
    gradient         `FactoredGradient`: all of these as its methods

    inputs           what a loss is given and returns, checked
    independence     whether one example's loss depends on others
    differentiate    `grads`
    quantities       the functions of whole trees
    clipping         `clipped_grad`
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
