"""Curvature of a network's loss: products, diagonals, Kronecker factors, and optimisers.

All take `model(params, input)`, the outputs of one example, and `loss(outputs, target)`, its
loss, and return a function of `(params, (inputs, targets))`. All are of the mean loss.

A loss's Hessian with respect to the outputs is known in closed form where its program shows one
of fnn.ops' squared_error, softmax_cross_entropy, sigmoid_binary_cross_entropy, multiclass_hinge,
huber, pinball, poisson_nll or gaussian_nll. Weights, masks, means over words and slices of the
outputs may stand around it. Any other loss is differentiated twice, a matrix of the outputs' size
for each example (not so for the products, where its program shows that it is convex).

A loss that isn't convex in the outputs, as the Gaussian's with a variance among them, has a
Hessian H with eigenvalues below zero. The generalised Gauss-Newton matrix here is then that of
H's positive part, its negative eigenvalues taken for zero (of an fnn loss at several positions,
the positive part of each): in products, diagonals, traces, Gram matrices and factors alike.
ggn_vector_product, ggn_diagonal and ggn_trace take part="all" for H itself. natural_gradient,
kfac, and kronecker_factors with samples, take the Fisher matrix where the loss is the −log of a
distribution known to fnn: for all of these but gaussian_nll both are the same.

Any real dtype will do, and 16-bit ones are added up in float32. A network or loss with a
`jax.custom_vjp`, which JAX knows backwards only, is differentiated backwards twice where forward
mode is wanted.

ggn_vector_product, hessian_vector_product,
fisher_vector_product, empirical_fisher       linear operators
eigenpairs                                    the largest eigenvalues of an operator
ggn_diagonal, hessian_diagonal, ggn_trace     diagonals
ggn_gram, ntk                                 all pairs of examples
kronecker_factors                             KFAC's and KFLR's factors
kfac, natural_gradient                        optimisers

Each module imports only from those above it:

    checks           what the functions here ask of their arguments
    linearize        J v and Jᵀ u at a point
    convex           whether a loss is convex, seen in its program
    known_losses     the Hessians of fnn's losses with respect to the outputs, in closed form
    composition      losses made of a known one
    output_hessian   the Hessian of any loss with respect to the outputs, and its square root
    sqrt_ggn         the reverse sweep from columns of that root
    ggn              diagonal, trace, Gram matrix, NTK
    operators        linear operators, eigenpairs, the natural gradient
    piecewise_linear whether a network is linear in pieces
    exact_diagonal   the Hessian's diagonal
    kronecker        Kronecker factors
    damped_inverses  inverses of damped factors
    quadratic        the quadratic model of the loss along one or two directions
    part_of_params   a model of which only some parameters are trained
    kfac_optimizer   KFAC
"""

from fnn.curvature.exact_diagonal import hessian_diagonal
from fnn.curvature.ggn import ggn_diagonal, ggn_gram, ggn_trace, ntk
from fnn.curvature.kfac_optimizer import KFACState, kfac
from fnn.curvature.kronecker import Block, Diagonal, Kronecker, kronecker_factors
from fnn.curvature.operators import (
    LinearOperator,
    eigenpairs,
    empirical_fisher,
    fisher_vector_product,
    ggn_vector_product,
    hessian_vector_product,
    natural_gradient,
)

__all__ = [
    "Block",
    "Diagonal",
    "KFACState",
    "Kronecker",
    "LinearOperator",
    "eigenpairs",
    "empirical_fisher",
    "fisher_vector_product",
    "ggn_diagonal",
    "ggn_gram",
    "ggn_trace",
    "ggn_vector_product",
    "hessian_diagonal",
    "hessian_vector_product",
    "kfac",
    "kronecker_factors",
    "natural_gradient",
    "ntk",
]
