"""Low-rank adapters: fine-tuning a network by small matrices beside its weights.

    adapters = lora(params, "*.q.W", 8, key)               small, and all that is trained
    y = net(adapted(params, adapters), x)                  W x + B (A x) in the place of W x
    params = merge(params, adapters)                       W + B A, weights like any others

The frozen parameters are closed over, and training knows the adapters alone:

    tuned = lambda adapters, x: net(adapted(params, adapters), x)
    result = fnn.fit(fnn.supervised(tuned, loss), adapters, data, optax.adam(1e-3), ...)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fnn import arguments, text
from fnn.params import Where, choose, flatten, unflatten
from fnn.precision import widest


def lora(
    params: chex.ArrayTree,
    where: Where,
    rank: int,
    key: chex.PRNGKey,
) -> dict:
    """Adapters for some of a network's weights: each W becomes W + scale · B A of the given rank.

    Args:
        params: of the network. Nothing in it changes.
        where: which weights: a pattern of paths such as "*.q.W" ("*" stands for anything), or
            several of them, or a function (path, array) of those that are asked for. A path is
            made of the keys on the way to it, "blocks.attend.q.W" (see `fnn.params.flatten`).
        rank: r, the size of the axis between B and A.
        key: A is drawn from it.

    Returns:
        Nested dicts like params, of what is chosen alone: in the place of a W of shape `(out, in)`
        `{"A": (rank, in), "B": (out, rank)}`, in float32 (float64 under x64). Of W's stacked along
        axes in front, as `repeat` has them, A and B are stacked as well. A is drawn from
        N(0, 1 / in), and B is 0: at first nothing changes.

    Raises:
        TypeError, ValueError: an argument isn't of its kind, or nothing is chosen (the paths are
            named), or something is that isn't a matrix of real numbers.

    Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: low-rank adaptation of large language
    models", ICLR 2022.

    >>> params = {"q": {"W": jnp.ones((6, 4)), "b": jnp.ones(6)}}
    >>> jax.tree.map(jnp.shape, lora(params, "*.W", 2, jax.random.key(0)))
    {'q': {'W': {'A': (2, 4), 'B': (6, 2)}}}
    """
    rank = arguments.integer("lora", "rank", rank, least=1)
    key = arguments.key("lora", "key", key)
    flat = flatten(params)
    made = {}
    for number, path in enumerate(choose(where, params, "lora")):
        W = flat[path]
        if jnp.ndim(W) < 2 or not jnp.issubdtype(jnp.result_type(W), jnp.floating):
            raise ValueError(
                f"lora: where chooses {path}, wanted a real weight of shape (out, in), but it is "
                f"{arguments.show(W)}."
            )
        *stack, out, ins = jnp.shape(W)
        dtype = jnp.result_type(float)
        A = jax.random.normal(jax.random.fold_in(key, number), (*stack, rank, ins), dtype)
        made[f"{path}.A"] = A / jnp.sqrt(jnp.asarray(max(ins, 1), dtype))
        made[f"{path}.B"] = jnp.zeros((*stack, out, rank), dtype)
    return unflatten(made)


def adapted(
    params: chex.ArrayTree, adapters: chex.ArrayTree, *, scale: float = 1.0
) -> chex.ArrayTree:
    """The parameters with adapters beside some weights: to be given to the network as they are.

    In the place of an adapted W stands an `AdaptedWeight`, which multiplies as W + scale · B A does
    without that being formed: W x + scale · B (A x). So the gradient of the adapters is found from
    vectors of their rank, and a matrix of W's size is never formed; nor is W's own gradient, as
    long as it isn't asked for. It multiplies by `@` alone, from both sides and transposed, which is
    how `Linear` and most layers use their weights. Elsewhere it is refused; `merge` then does, at
    the price of a matrix of W's size.

    Args:
        params: the network's, as they were when the adapters were made.
        adapters: what `lora` made.
        scale: the paper's α / rank.

    Raises:
        ValueError: an adapter belongs to no parameter, or to one of another shape.
    """
    return _replaced("adapted", params, adapters, scale, AdaptedWeight)


def merge(
    params: chex.ArrayTree, adapters: chex.ArrayTree, *, scale: float = 1.0
) -> chex.ArrayTree:
    """The parameters with W + scale · B A in the place of each adapted W, of W's dtype.

    The network then costs what it did before. Arguments and errors are as in `adapted`.
    """

    def formed(W, A, B, scale):
        wide = widest(A.dtype, W.dtype)
        change = jnp.matmul(B.astype(wide), A.astype(wide))
        return (W.astype(wide) + scale * change).astype(W.dtype)

    return _replaced("merge", params, adapters, scale, formed)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["W", "A", "B"],
    meta_fields=["scale", "transposed"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedWeight:
    """W + scale · B A, or its transpose, known by its products alone."""

    W: Any
    A: Any
    B: Any
    scale: float = 1.0
    transposed: bool = False

    def __repr__(self) -> str:
        fields = {name: getattr(self, name) for name in ("W", "A", "B", "scale", "transposed")}
        return text.of_fields("AdaptedWeight", **fields)

    __array_ufunc__ = None  # numpy's arrays leave products to this class

    @property
    def shape(self) -> tuple[int, ...]:
        return self._plain.shape

    @property
    def ndim(self) -> int:
        return self.W.ndim

    @property
    def size(self) -> int:
        return self.W.size

    @property
    def dtype(self) -> Any:
        return self.W.dtype

    @property
    def T(self) -> AdaptedWeight:
        return dataclasses.replace(self, transposed=not self.transposed)

    def astype(self, dtype: Any) -> AdaptedWeight:
        cast = {name: getattr(self, name).astype(dtype) for name in "WAB"}
        return dataclasses.replace(self, **cast)

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


def _replaced(op: str, params: Any, adapters: Any, scale: float, make: Callable) -> Any:
    arguments.number(op, "scale", scale)
    if arguments.is_known(scale):
        scale = float(scale)  # of Python's alone the dtype gives way to the weights'
    pairs: dict[str, dict[str, Any]] = {}
    for path, array in flatten(adapters).items():
        place, _, name = path.rpartition(".")
        pairs.setdefault(place, {})[name] = array
    weights = flatten(params)
    for place, pair in pairs.items():
        W = weights.get(place)
        if W is None or set(pair) != {"A", "B"}:
            raise ValueError(
                f"{op}: there is an adapter of {sorted(pair)} for {place!r}, wanted A and B, for "
                f"one of {', '.join(weights)}."
            )
        *stack, out, ins = jnp.shape(W)
        rank = jnp.shape(pair["A"])[-2] if jnp.ndim(pair["A"]) >= 2 else "rank"
        wanted = {"A": (*stack, rank, ins), "B": (*stack, out, rank)}
        got = {name: jnp.shape(array) for name, array in pair.items()}
        if got != wanted:
            raise ValueError(
                f"{op}: the adapter of {place}, of shape {jnp.shape(W)}, has A of shape "
                f"{got['A']} and B of shape {got['B']}, wanted {wanted['A']} and {wanted['B']}."
            )
    made = {place: make(weights[place], p["A"], p["B"], scale) for place, p in pairs.items()}
    leaves = [made.get(path, leaf) for path, leaf in weights.items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)
