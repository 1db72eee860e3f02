"""`LRU`: a diagonal state-space layer, a recurrence without a nonlinearity."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fnn import arguments, ops
from fnn.layers.layer import Layer, LayerError, check_params, set_count, set_number
from fnn.layers.mode import EVALUATE, Mode
from fnn.precision import wide_dtype


@dataclasses.dataclass(frozen=True, repr=False)
class LRU(Layer):
    """The linear recurrent unit, a state space with a diagonal complex matrix λ:

        sₜ = λ ∘ sₜ₋₁ + γ ∘ B xₜ,    yₜ = Re(C sₜ) + D ∘ xₜ

    with λ = exp(−exp(ν) + i exp(θ)), so that |λ| < 1 whatever ν and θ become and no state grows,
    and γ = √(1 − |λ|²) at first, which gives a state the size of its input whatever λ is.

    x is `(steps, features)`, and y too. It costs a few products for all steps at once, and a
    recurrence of elementwise products (`ops.linear_recurrence`), whose states alone are kept, so
    that a sequence may have tens of thousands of steps. With a cache (`init_cache`) the layer goes
    on from the state where it stopped; step by step it gives what it gives for the whole.

    Parameters: `{"nu": (states,), "theta": (states,), "gamma": (states,),
    "B": (2, states, features), "C": (2, features, states), "D": (features,)}`; γ is the exponential
    of "gamma"; of B and C the first half is the real part, the second the imaginary part.

    Args:
        states: how many numbers s has.
        least, most: between which |λ| starts, λ being drawn uniformly from a ring. The nearer to
            1, the longer a state remembers: λ = 0.999 about a thousand steps.
        phase: the largest angle of λ at first, at most 2π. A small one, π/50, is for tasks with
            steps that lie far apart.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) x isn't `(steps, features)`, or the parameters or the cache
            aren't of these shapes.

    Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu, De, "Resurrecting recurrent neural networks for
    long sequences", ICML 2023, whose start this is. (Gu, Gupta, Goel, Ré, "On the parameterization
    and initialization of diagonal state space models", NeurIPS 2022, and Smith, Warrington,
    Linderman, "Simplified state space layers", ICLR 2023, are S4D and S5.)

    >>> layer = LRU(16)
    >>> params = layer.init(jax.random.key(0), jnp.zeros((7, 4)))
    >>> layer(params, jnp.ones((7, 4))).shape
    (7, 4)
    """

    states: int
    _: dataclasses.KW_ONLY
    least: float = 0.9
    most: float = 0.999
    phase: float = 2 * math.pi

    def __post_init__(self) -> None:
        set_count(self, "states")
        set_number(self, "least", least=0, below=1)
        set_number(self, "most", above=self.least, below=1)
        set_number(self, "phase", above=0, most=2 * math.pi)

    def init(self, key: chex.PRNGKey, x: Any) -> dict:
        shapes, dtype = self._shapes(x), jnp.result_type(float)
        keys = jax.random.split(arguments.key(f"{self}.init", "key", key), 5)
        # Uniform over a ring: the square of the radius is uniform.
        square = jax.random.uniform(
            keys[0], (self.states,), dtype, minval=self.least**2, maxval=self.most**2
        )
        # No exact 0, of which ν is inf; and no exact 1, of which it is −inf, by rounding.
        info = jnp.finfo(dtype)
        square = jnp.clip(square, float(info.tiny), 1 - float(info.epsneg))
        least = min(1e-6, self.phase)
        angle = jax.random.uniform(keys[1], (self.states,), dtype, minval=least, maxval=self.phase)
        normal = lambda key, name, size: (
            jax.random.normal(key, shapes[name], dtype) / jnp.sqrt(jnp.asarray(size, dtype))
        )
        return {
            "nu": jnp.log(-0.5 * jnp.log(square)),
            "theta": jnp.log(angle),
            "gamma": 0.5 * jnp.log1p(-square),
            "B": normal(keys[2], "B", 2 * x.shape[1]),
            "C": normal(keys[3], "C", self.states),
            "D": normal(keys[4], "D", 1),
        }

    def init_cache(self, length: int, x: Any) -> dict:
        self._shapes(x)
        zeros = jnp.zeros(self.states, jnp.result_type(float))
        return {"cache": {"real": zeros, "imaginary": zeros}}

    def apply(self, params: Any, state: Any, x: Any, *, mode: Mode = EVALUATE) -> tuple[Any, dict]:
        check_params(self, params, self._shapes(x), x)
        B, C = (arguments.array(f"{self}", name, params[name]) for name in "BC")
        size, angle = -jnp.exp(params["nu"]), jnp.exp(params["theta"])
        # Nothing is multiplied by a matrix of complex numbers: the products are real. Both halves
        # of a weight are in one, of which `fnn.per_example` keeps one pair of factors.
        inputs = _driven(x, B) * jnp.exp(params["gamma"])  # (steps, 2, states)
        wide = wide_dtype(inputs.dtype)
        a = jnp.exp(jax.lax.complex(size.astype(wide), angle.astype(wide)))
        b = jax.lax.complex(inputs[:, 0].astype(wide), inputs[:, 1].astype(wide))
        cache = state.get("cache") if isinstance(state, dict) else None
        before = None
        if cache is not None:
            check_params(self, cache, dict.fromkeys(("real", "imaginary"), (self.states,)))
            before = jax.lax.complex(cache["real"].astype(wide), cache["imaginary"].astype(wide))
        s = ops.linear_recurrence(a, b, before)
        if cache is not None:
            parts = {"real": s.real, "imaginary": s.imag} if len(x) else {}
            new = {name: part[-1].astype(cache[name].dtype) for name, part in parts.items()}
            state = state | {"cache": cache | new}
        halves = jnp.stack([s.real, -s.imag], axis=1).astype(inputs.dtype)
        return _read(halves, C) + params["D"] * x, state

    def _shapes(self, x: Any) -> dict[str, tuple[int, ...]]:
        if not hasattr(x, "shape") or len(x.shape) != 2:
            got = f"shape {tuple(x.shape)}" if hasattr(x, "shape") else arguments.show(x)
            raise LayerError(f"{self} wants a sequence of shape (steps, features), but got {got}.")
        features = x.shape[1]
        return {
            **dict.fromkeys(("nu", "theta", "gamma"), (self.states,)),
            "B": (2, self.states, features),
            "C": (2, features, self.states),
            "D": (features,),
        }


# Of one step, as in generation, XLA would take longer to bring a weight into another order of axes
# than to multiply by it: it is used as it lies.


def _driven(x: Any, B: Any) -> jax.Array:
    """Both halves of B times each step's x: `(steps, 2, states)`."""
    if len(x) == 1:
        return jnp.tensordot(B, x[0], 1)[None]
    return jnp.tensordot(x, B, ((1,), (2,)))


def _read(halves: Any, C: Any) -> jax.Array:
    """The sum over both halves `(steps, 2, states)` of C times each: `(steps, features)`."""
    if len(halves) == 1:
        return jnp.sum(jnp.einsum("tks,kfs->ktf", halves, C), 0)
    return jnp.tensordot(halves, C, ((1, 2), (0, 2)))
