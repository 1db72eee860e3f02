"""The Hessian of a loss with respect to the network's outputs, as a product and as a square root.

A generalised Gauss-Newton matrix is Jᵀ H J with the network's Jacobian J and the small Hessian
H of the loss with respect to the outputs z of one example. It has three forms here:

    "positive"  H with its negative eigenvalues taken for zero, H₊. It is H where the loss is
                convex in the outputs, as the usual losses are.
    "all"       H itself.
    "fisher"    the mean of ∇ℓ ∇ℓᵀ over labels drawn from the distribution whose −log the loss
                is; where it isn't one of a known distribution, H₊.

For the losses in `known_losses.py` all are known in closed form, and so are their roots S,
H₊ = S Sᵀ; also where such a loss's values are weighted and added up (`composition.py`): then H₊
consists of the positive parts at each position. For any other loss H comes from autodiff, and its
root from its eigenvectors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from fnn.batch import example_types
from fnn.curvature.composition import composition
from fnn.curvature.convex import is_convex as is_seen_to_be_convex
from fnn.curvature.known_losses import identity
from fnn.curvature.linearize import second_derivative
from fnn.precision import wide


class OutputHessian(Protocol):
    """The Hessian of one example's `loss(z, target)` with respect to z.

    part: which of the three forms above.
    """

    def product(self, u, part: str = "positive") -> jax.Array:
        """H u, in z's dtype."""

    def root(self, part: str = "positive") -> jax.Array:
        """S: the columns along the first axis, (columns, *z.shape); no columns: H = 0.

        Of part "all" H = S diag(signs) Sᵀ, with the signs that `signs` gives.
        """

    def signs(self) -> jax.Array | None:
        """±1 for each column of `root("all")`; None if all are ones."""

    def has_cheap_product(self, part: str) -> bool:
        """Can the product be taken without the root?"""

    def has_labels(self, part: str) -> bool:
        """Do the gradients at labels that are drawn have E[s sᵀ] = H?"""

    def sample(self, key) -> jax.Array:
        """Such a gradient, a column."""


def of(loss: Callable, z, target) -> OutputHessian:
    """What is known of `loss(z, target)`; found by differentiating twice if nothing is."""
    _check_is_scalar(loss, z, target)
    return composition(loss, z, target) or _ByAutodiff(loss, z, target)


def is_likelihood(loss: Callable, z, target) -> bool:
    """Is it the negative log-likelihood of a distribution that we can draw labels from, or a
    weighted sum of such?"""
    found = composition(loss, z, target)
    return found is not None and not found.soft_labels and found.known.sample is not None


def is_convex(loss: Callable, z, target) -> bool:
    """Is it convex for sure: a known loss, with weights that no example's target can make
    negative, or a function whose program shows it?"""
    found = composition(loss, z, target)
    if found is None:
        return is_seen_to_be_convex(loss, z, target)
    return found.known.signs is None and found.weights_are_constant_and_positive()


def products(loss: Callable, z, targets, part: str) -> Callable:
    """u ↦ H u for a batch, with the examples along the first axes of all."""
    of_one = lambda z, t: of(loss, z, t)
    if of_one(*example_types((z, targets))).has_cheap_product(part):
        return lambda u: jax.vmap(lambda z, t, u: of_one(z, t).product(u, part))(z, targets, u)
    # Found once, however often the product is taken.
    roots = jax.vmap(lambda z, t: of_one(z, t).root(part))(z, targets)
    return lambda u: jax.vmap(_times_own_transpose)(roots, u)


def sqrt_columns(loss: Callable, z, target, key=None, samples: int = 0, part: str = "positive"):
    """Columns whose squares add up to H: S, or `samples` random ones of which E[s sᵀ] = H."""
    hessian = of(loss, z, target)
    if not samples:
        return hessian.root(part)
    if hessian.has_labels(part):
        found = jax.vmap(hessian.sample)(jax.random.split(key, samples))
    else:
        root = wide(hessian.root(part))
        signs = jax.random.rademacher(key, (samples, root.shape[0]), root.dtype)
        found = jnp.tensordot(signs, root, axes=1)
    return (found / math.sqrt(samples)).astype(z.dtype)


def signed_sqrt(loss: Callable, z, target):
    """`(S, signs)`, H = S diag(signs) Sᵀ."""
    hessian = of(loss, z, target)
    root, signs = hessian.root("all"), hessian.signs()
    return root, jnp.ones(root.shape[0], root.dtype) if signs is None else signs


@dataclasses.dataclass(eq=False)
class _ByAutodiff:
    """Any loss: products by differentiating twice, the root from H's eigenvectors."""

    loss: Callable
    z: Any
    target: Any

    def has_cheap_product(self, part: str) -> bool:
        return part == "all" or is_seen_to_be_convex(self.loss, self.z, self.target)

    def product(self, u, part: str = "positive"):
        if self.has_cheap_product(part):
            return self._push(u)
        return _times_own_transpose(self.root(part), u)

    def root(self, part: str = "positive"):
        values, vectors = self._eigen()
        kept = jnp.abs(values) if part == "all" else jnp.maximum(values, 0)
        root = vectors * jnp.sqrt(kept)[None]
        return root.T.reshape(self.z.size, *self.z.shape).astype(self.z.dtype)

    def signs(self):
        values, _ = self._eigen()
        return jnp.where(values < 0, -1, 1).astype(values.dtype)

    def has_labels(self, part: str) -> bool:
        return False

    def sample(self, key):
        raise NotImplementedError("has_labels() is false")

    def _push(self, u):
        return second_derivative(jax.grad(lambda z: self.loss(z, self.target)), self.z)(u)

    def _eigen(self):
        """In float32 at least: there is no decomposition in half precision."""
        rows = jax.vmap(self._push)(identity(self.z))
        return jnp.linalg.eigh(wide(rows.reshape(self.z.size, self.z.size)))


def _check_is_scalar(loss: Callable, z, target) -> None:
    """An error unless the loss of one example is a real scalar."""
    out = jax.eval_shape(loss, z, target)
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(
            "loss(outputs, target) must return the real scalar loss of one example, but returned "
            f"{out} for outputs of shape {z.shape}."
        )


def _times_own_transpose(root, u):
    """S Sᵀ u, summed in float32 at least."""
    root = wide(root)
    axes = range(u.ndim)
    along = jnp.tensordot(root, u.astype(root.dtype), axes=([d + 1 for d in axes], list(axes)))
    return jnp.tensordot(along, root, axes=1).astype(u.dtype)
