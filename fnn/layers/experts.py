"""`MixtureOfExperts`: many layers, of which each token goes through a few."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fnn import arguments, ops
from fnn.initializers import Initializer, lecun_normal
from fnn.layers.layer import (
    Layer,
    LayerError,
    as_layer,
    check_params,
    initial,
    run,
    set_count,
    set_number,
)
from fnn.layers.mode import EVALUATE, Mode
from fnn.layers.net import in_copies


@dataclasses.dataclass(frozen=True, repr=False)
class MixtureOfExperts(Layer):
    """y = Σ over the chosen k experts e of weightₑ · expertₑ(x), at each position of a sequence.

    A router, one linear layer, scores the n experts at each position; the k best compute it, and
    are weighted by softmax (see `ops.top_k_routing`). x is `(positions, features)`, and the
    experts' outputs are put together to `(positions, ...)`.

    Each expert has a fixed number of places, its capacity, into which its positions' x are put; so
    shapes don't depend on numbers, and all experts run as one stacked layer. Without a factor
    there is a place for every position at every expert: nothing is left out, but all n experts
    compute as many rows as there are positions, as if all of them were chosen everywhere. With
    one, the capacity is factor · k · positions / n, so that the work is that of k experts times
    the factor; what doesn't fit is left out, and its y is 0 where no expert had a place (so keep
    x beside it: `residual(MixtureOfExperts(...))`). Positions of other sequences of a batch take
    no places: each sequence has its own. An empty place holds zeros, whose output goes nowhere; an
    expert must have a finite derivative at them, which x / ‖x‖ hasn't.

    The router must be kept from sending all to a few experts. With `return_losses` the output is
    `(y, losses)`, with the dict of scalars `{"balance": ..., "z": ...}` to be added to the loss
    (by about 0.01 and 0.001). A network hands them on as it does any output; through `repeat` they
    can be carried beside x, since a block's input may be a tuple `(x, sum of losses)`.

    Parameters: `{"router": {"W": (n, features)}, "experts": ...}`, the expert's parameters, each
    array with an axis of length n in front.

    Args:
        expert: a layer (or network) of one array `(places, features)`, row by row: a gated MLP,
            say. It has no state.
        n: how many experts.
        k: to how many of them a position goes.
        capacity_factor: see above; None for a place for everything.
        return_losses: whether the router's losses are returned.
        router_init: initialiser of the router's W.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) x isn't `(positions, features)`, or the parameters don't fit.

    Shazeer et al., "Outrageously large neural networks: the sparsely-gated mixture-of-experts
    layer", ICLR 2017; Fedus, Zoph, Shazeer, "Switch transformers", JMLR 2022.
    """

    expert: Layer | Callable
    n: int
    k: int = 2
    _: dataclasses.KW_ONLY
    capacity_factor: float | None = None
    return_losses: bool = False
    router_init: Initializer = lecun_normal

    def __post_init__(self) -> None:
        object.__setattr__(self, "expert", as_layer(self.expert, "MixtureOfExperts, expert"))
        set_count(self, "n")
        set_count(self, "k")
        arguments.integer("MixtureOfExperts", "k", self.k, most=self.n)
        if self.capacity_factor is not None:
            set_number(self, "capacity_factor", above=0)
        arguments.flag("MixtureOfExperts", "return_losses", self.return_losses)
        form = "an initialiser, a function (key, shape, dtype)"
        arguments.function("MixtureOfExperts", "router_init", self.router_init, form)

    def init(self, key: chex.PRNGKey, x: Any) -> dict:
        shape = self.n, self._features(x)
        router, experts = jax.random.split(arguments.key("MixtureOfExperts.init", "key", key))
        rows = jax.ShapeDtypeStruct((self._capacity(x), *x.shape[1:]), x.dtype)
        each = jax.vmap(jax.random.fold_in, (None, 0))(experts, jnp.arange(self.n))
        return {
            "router": {"W": initial(self, self.router_init, router, shape)},
            "experts": jax.vmap(lambda key: self._expert.init(key, rows))(each),
        }

    def __call__(self, params: Any, x: Any, mode: Mode = EVALUATE) -> Any:
        features, capacity = self._features(x), self._capacity(x)
        self._check(params, features, x)
        x = jnp.asarray(x)
        if not len(x):
            return self._of_nothing(params, x)
        routing = ops.top_k_routing(x @ params["router"]["W"].T, self.k, capacity)
        # Place p of expert e is row e · capacity + p; what has no place is dropped beyond the last.
        rows = routing.experts * capacity + routing.places
        rows = jnp.where(routing.places < capacity, rows, self.n * capacity)
        position = jnp.broadcast_to(jnp.arange(len(x), dtype=jnp.int32)[:, None], rows.shape)
        nobody = jnp.full(self.n * capacity, len(x), jnp.int32)
        taken = nobody.at[rows].set(position, mode="drop")
        given = x.at[taken].get(mode="fill", fill_value=0).reshape(self.n, capacity, features)
        keys = None if mode.key is None else jax.random.split(mode.key, self.n)

        def compute(own, x, key):
            here = dataclasses.replace(mode, key=key)
            with in_copies(self._expert, self.n) as note:
                y, _ = run(self._expert, own, {}, (x,), here)
                note(own, {}, (x,), y)
            return y

        ys = jax.vmap(compute)(params["experts"], given, keys)
        ys = ys.reshape(self.n * capacity, *ys.shape[2:])
        found = ys.at[rows].get(mode="fill", fill_value=0)
        y = jnp.einsum("pk,pk...->p...", routing.weights.astype(ys.dtype), found)
        losses = {"balance": routing.balance_loss, "z": routing.z_loss}
        return (y, losses) if self.return_losses else y

    def _of_nothing(self, params: Any, x: Any) -> Any:
        """The output for a sequence of no positions, from which nothing can be taken."""
        one = jnp.zeros((1, *x.shape[1:]), x.dtype)
        kind = jax.eval_shape(lambda: self(params, one))
        y, losses = kind if self.return_losses else (kind, {})
        y = jnp.zeros((0, *y.shape[1:]), y.dtype)
        losses = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), losses)
        return (y, losses) if self.return_losses else y

    @property
    def _expert(self) -> Layer:
        return as_layer(self.expert)

    def _capacity(self, x: Any) -> int:
        positions = max(x.shape[0], 1)
        if self.capacity_factor is None:
            return positions
        return min(positions, math.ceil(self.capacity_factor * self.k * positions / self.n))

    def _features(self, x: Any) -> int:
        if not hasattr(x, "shape") or len(x.shape) != 2:
            got = f"shape {tuple(x.shape)}" if hasattr(x, "shape") else arguments.show(x)
            raise LayerError(
                f"{self} wants an input of shape (positions, features), but got {got}."
            )
        return x.shape[1]

    def _check(self, params: Any, features: int, x: Any) -> None:
        if not isinstance(params, dict) or set(params) != {"router", "experts"}:
            got = sorted(params) if isinstance(params, dict) else type(params).__name__
            raise LayerError(
                f"{self} wants parameters with the keys ['experts', 'router'], but got {got}."
            )
        check_params(self, params["router"], {"W": (self.n, features)}, x)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params["experts"]):
            if jnp.shape(leaf)[:1] != (self.n,):
                raise LayerError(
                    f"{self} wants each array of its experts' parameters with an axis of length "
                    f"{self.n} in front, but {jax.tree_util.keystr(path)} has shape "
                    f"{jnp.shape(leaf)}."
                )
