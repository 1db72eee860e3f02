"""fnn networks inside other JAX libraries, and theirs inside fnn; a few lines each.

    python examples/interoperation.py        about twenty seconds on two cores

    in_equinox, in_nnx              an fnn network as a part of an Equinox or a Flax NNX module
    of_equinox, of_nnx              their modules as layers of an fnn network
    numpyro_posterior               the mean of a numpyro likelihood, its weights sampled by NUTS
    diffrax_field                   the vector field of a differential equation
    optimistix_fit                  residuals of a nonlinear least-squares problem
    langevin                        a loss as a function of one flat vector, for samplers such as
                                    blackjax's

A network is a pure function of a pytree of arrays: that is all that each of them asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fnn import ops
from fnn.layers import Layer, Linear, chain

try:
    import diffrax
    import equinox as eqx
    import numpyro
    import optimistix
    from flax import nnx
    from numpyro import distributions
except ImportError as error:
    line = "pip install equinox flax numpyro diffrax optimistix"
    raise SystemExit(f"{error}. For this example: {line}") from None


# --------------------------------------------------------------------- ours as a part of theirs


class InEquinox(eqx.Module):
    """An fnn network as an Equinox module: hyperparameters are static, parameters are leaves."""

    net: Layer = eqx.field(static=True)
    params: dict

    def __init__(self, net: Layer, x: jax.Array, *, key: jax.Array):
        self.net, self.params = net, net.init(key, x)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net(self.params, x)


class InNNX(nnx.Module):
    """An fnn network as a Flax NNX module: each array is an `nnx.Param`."""

    def __init__(self, net: Layer, x: jax.Array, *, rngs: nnx.Rngs):
        self.net = net
        self.params = nnx.data(jax.tree.map(nnx.Param, net.init(rngs.params(), x)))

    def __call__(self, x: jax.Array) -> jax.Array:
        is_param = lambda p: isinstance(p, nnx.Param)
        return self.net(jax.tree.map(lambda p: p[...], self.params, is_leaf=is_param), x)


# ---------------------------------------------------------------------- theirs as a part of ours


@dataclasses.dataclass(frozen=True)
class OfEquinox(Layer):
    """An Equinox module as a layer; `make(key)` makes the module."""

    make: Callable[[jax.Array], eqx.Module]

    def init(self, key: jax.Array, x: Any) -> dict:
        return {"weights": eqx.filter(self.make(key), eqx.is_inexact_array)}

    def __call__(self, params: dict, x: jax.Array) -> jax.Array:
        types = eqx.filter_eval_shape(self.make, jax.random.key(0))
        is_type = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
        return eqx.combine(params["weights"], eqx.filter(types, is_type, inverse=True))(x)


@dataclasses.dataclass(frozen=True)
class OfNNX(Layer):
    """A Flax NNX module as a layer; `make(rngs)` makes the module."""

    make: Callable[[nnx.Rngs], nnx.Module]

    def init(self, key: jax.Array, x: Any) -> dict:
        return {"weights": nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(key)), nnx.Param))}

    def __call__(self, params: dict, x: jax.Array) -> jax.Array:
        module = nnx.eval_shape(lambda: self.make(nnx.Rngs(0)))
        nnx.update(module, params["weights"])
        return module(x)


# ------------------------------------------------------------------------------ probability


def numpyro_posterior(net: Layer, x: jax.Array, y: jax.Array, noise: float, samples: int) -> dict:
    """Samples of the parameters, given y = net(params, x) + noise and a standard normal prior."""
    start, unravel = ravel_pytree(net.init(jax.random.key(0), x[0]))

    def model():
        prior = distributions.Normal(0.0, 1.0).expand(start.shape).to_event(1)
        params = unravel(numpyro.sample("params", prior))
        mean = jax.vmap(net, (None, 0))(params, x)
        numpyro.sample("y", distributions.Normal(mean, noise), obs=y)

    sampler = numpyro.infer.MCMC(
        numpyro.infer.NUTS(model), num_warmup=300, num_samples=samples, progress_bar=False
    )
    sampler.run(jax.random.key(1))
    return jax.vmap(unravel)(sampler.get_samples()["params"])


def langevin(loss: Callable, params: Any, key: jax.Array, *, step: float, samples: int) -> Any:
    """Samples of exp(−loss) by the Metropolis-adjusted Langevin algorithm, a chain of them.

    What a sampler takes is a log density of one flat vector, and its gradient.
    """
    start, unravel = ravel_pytree(params)
    log_density = jax.value_and_grad(lambda flat: -loss(unravel(flat)))

    def log_proposal(to, at, slope):
        return -jnp.sum((to - at - step * slope) ** 2) / (4 * step)

    def one(now, key):
        at, value, slope = now
        noise_key, accept_key = jax.random.split(key)
        to = at + step * slope + (2 * step) ** 0.5 * jax.random.normal(noise_key, at.shape)
        new_value, new_slope = log_density(to)
        log_ratio = new_value - value
        log_ratio += log_proposal(at, to, new_slope) - log_proposal(to, at, slope)
        accept = jnp.log(jax.random.uniform(accept_key)) < log_ratio
        now = jax.tree.map(
            lambda a, b: jnp.where(accept, a, b), (to, new_value, new_slope), (at, value, slope)
        )
        return now, now[0]

    keys = jax.random.split(key, samples)
    _, flat = jax.lax.scan(one, (start, *log_density(start)), keys)
    return jax.vmap(unravel)(flat)


# ------------------------------------------------------------------- equations and least squares


def diffrax_field(net: Layer, params: Any, start: jax.Array, time: float) -> jax.Array:
    """y(time) of dy/dt = net(params, y), y(0) = start."""
    term = diffrax.ODETerm(lambda t, y, params: net(params, y))
    control = diffrax.PIDController(rtol=1e-6, atol=1e-6)
    solution = diffrax.diffeqsolve(
        term, diffrax.Tsit5(), 0.0, time, None, start, args=params, stepsize_controller=control
    )
    return solution.ys[-1]


def optimistix_fit(net: Layer, params: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
    """The parameters of least squared error by Levenberg and Marquardt, and the residuals."""

    def residuals(params, data):
        return jax.vmap(net, (None, 0))(params, data[0]) - data[1]

    solver: Any = optimistix.LevenbergMarquardt(rtol=1e-6, atol=1e-6)
    found: Any = optimistix.least_squares(residuals, solver, params, (x, y), max_steps=1000)
    return found.value, residuals(found.value, (x, y))


def means(samples: dict) -> str:
    """Each parameter's, over all its samples."""
    return ", ".join(f"{name} {w.mean():.3f}" for name, w in samples.items())


def main() -> None:
    x = jnp.linspace(-2, 2, 20)[:, None]
    y = jnp.sin(2 * x)
    net = chain(hidden=Linear(16), activation=ops.tanh, output=Linear(1))
    params = net.init(jax.random.key(0), x[0])

    module = InEquinox(net, x[0], key=jax.random.key(0))
    squared = lambda module: jnp.mean((jax.vmap(module)(x) - y) ** 2)
    print(f"an fnn network in Equinox: loss {squared(module):.3f}")
    print("    its gradient's leaves:", len(jax.tree.leaves(eqx.filter_grad(squared)(module))))
    print(f"an fnn network in NNX: loss {squared(InNNX(net, x[0], rngs=nnx.Rngs(0))):.3f}")

    theirs = chain(
        first=OfEquinox(lambda key: eqx.nn.Linear(1, 16, key=key)),
        activation=ops.tanh,
        second=OfNNX(lambda rngs: nnx.Linear(16, 1, rngs=rngs)),
    )
    weights = jax.tree.leaves(theirs.init(jax.random.key(0), x[0]))
    print("their parts in an fnn network:", ", ".join(str(w.shape) for w in weights))

    _, residuals = optimistix_fit(net, params, x, y)
    error = jnp.sqrt(jnp.mean(residuals**2))
    print(f"optimistix: root mean square of the residuals {error:.1e}")
    field = chain(hidden=Linear(16), activation=ops.tanh, output=Linear(2))
    start = jnp.array([1.0, 0.0])
    end = jax.grad(lambda p: jnp.sum(diffrax_field(field, p, start, 1.0)))
    gradient = jax.tree.leaves(end(field.init(jax.random.key(0), start)))
    print("diffrax: gradient", ", ".join(str(g.shape) for g in gradient))
    line = Linear(1)
    posterior = numpyro_posterior(line, x, y, 0.5, 500)
    print("numpyro: posterior means", means(posterior))

    def loss(p):
        errors = jax.vmap(line, (None, 0))(p, x) - y
        return (
            jnp.sum(errors**2) / (2 * 0.5**2) + sum(jnp.sum(w**2) for w in jax.tree.leaves(p)) / 2
        )

    begin = line.init(jax.random.key(0), x[0])
    chain_of = langevin(loss, begin, jax.random.key(1), step=0.003, samples=20_000)
    print("Langevin: posterior means", means(chain_of))


if __name__ == "__main__":
    main()
