"""Weights with a change of low rank beside them, W + scale · B A, which isn't formed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fnn import text
from fnn.precision import widest


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Beside:
    """What both have in common. It has a shape and a dtype, and yet is no array."""

    W: Any
    A: Any
    B: Any
    scale: float = 1.0

    def __repr__(self) -> str:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return text.of_fields(type(self).__name__, **fields)

    __array_ufunc__ = None  # numpy's arrays leave products to this class

    @property
    def shape(self) -> tuple[int, ...]:
        return self.W.shape

    @property
    def ndim(self) -> int:
        return self.W.ndim

    @property
    def size(self) -> int:
        return self.W.size

    @property
    def dtype(self) -> Any:
        return self.W.dtype

    def astype(self, dtype: Any) -> Any:
        cast = {name: getattr(self, name).astype(dtype) for name in "WAB"}
        return dataclasses.replace(self, **cast)

    @property
    def shown_in_errors(self) -> str:
        raise NotImplementedError

    def _refuse(self, *others: Any) -> Any:
        raise TypeError(f"adapted: wanted an array, but got {self.shown_in_errors}.")

    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __matmul__ = __rmatmul__ = _refuse
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _refuse


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["W", "A", "B"],
    meta_fields=["scale", "transposed"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AdaptedWeight(_Beside):
    """W + scale · B A, or its transpose, known by its products alone."""

    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self._plain.shape

    @property
    def T(self) -> AdaptedWeight:
        return dataclasses.replace(self, transposed=not self.transposed)

    @property
    def shown_in_errors(self) -> str:
        return (
            f"an adapted weight of shape {self.shape}, which multiplies by @ alone: merge(params, "
            "adapters) makes an array of it"
        )

    def __matmul__(self, x: Any) -> Any:
        left, right = self._factors
        return self._plain @ x + self.scale * (left @ (right @ x))

    def __rmatmul__(self, x: Any) -> Any:
        left, right = self._factors
        return x @ self._plain + self.scale * ((x @ left) @ right)

    @property
    def _plain(self) -> Any:
        return self.W.T if self.transposed else self.W

    @property
    def _factors(self) -> tuple[Any, Any]:
        return (self.A.T, self.B.T) if self.transposed else (self.B, self.A)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["W", "A", "B"], meta_fields=["scale"]
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AdaptedKernel(_Beside):
    """W + scale · B A of a convolution's kernel W, `(n, m, *window)`, as a matrix (n, m · window).

    `Conv` and `ConvTranspose` know what to do with it, and layers that change the weight of another
    layer (`layer.weight`) get the sum.
    """

    @property
    def small(self) -> Any:
        """A as a kernel, `(rank, m, *window)`."""
        return self.A.reshape(self.A.shape[0], *self.W.shape[1:])

    @property
    def shown_in_errors(self) -> str:
        return (
            f"an adapted kernel of shape {self.shape}, which only Conv and ConvTranspose use: "
            "merge(params, adapters) makes an array of it"
        )


def merged(W: Any, A: Any, B: Any, scale: float) -> jax.Array:
    """W + scale · B A as an array of W's shape and dtype."""
    wide = widest(A.dtype, W.dtype)
    change = jnp.matmul(B.astype(wide), A.astype(wide)).reshape(W.shape)
    return (W.astype(wide) + scale * change).astype(W.dtype)


def as_array(W: Any) -> Any:
    """A weight as an array: the sum, where it is an adapted kernel."""
    return merged(W.W, W.A, W.B, W.scale) if isinstance(W, AdaptedKernel) else W
