"""Recurrent layers: `LSTM`, `GRU`, `RNN`, and `recurrent`, which makes one of a cell of one's own.

All of them are for one sequence `(steps, features)` and give `(steps, hidden)`:

    ys = layer(params, x)                      from a memory of zeros, or a cell's own start
    ys = layer(params, x, mask)                mask: booleans (steps,), or how many steps there are
    ys = layer(params, x, mask, carry)         from another memory; mask may be None

A step that is masked doesn't happen: the memory stays as it is, and the output there is 0. So the
padding behind a sequence changes nothing, and in the reverse direction, which begins with it, a
sequence starts at its own end. What stands in a masked step is never looked at.

Several layers, one on top of the other, are a chain, which hands the mask on to all of them; those
of one width may be repeated:

    chain(LSTM(256), Dropout(0.5), repeat(LSTM(256), 3))

With a cache (`init_cache`) a layer goes on from where it stopped, so that a sequence may be given
step by step, or in pieces.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fnn import arguments, ops
from fnn.eager import once
from fnn.initializers import Initializer, lecun_normal, orthogonal, zeros
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
from fnn.layers.net import Net, Network, hands_mask_on, in_loop
from fnn.meshes import varies_as, varies_with
from fnn.precision import signed, wide_dtype, widest


@dataclasses.dataclass(frozen=True, repr=False)
class Recurrent(Layer):
    """What recurrent layers have in common: a loop over steps, masks, the cache, checkpoints."""

    _: dataclasses.KW_ONLY
    reverse: bool = False
    remat: bool = False
    return_carry: bool = False

    takes_mask = True

    def __post_init__(self) -> None:
        for option in ("reverse", "remat", "return_carry"):
            arguments.flag(type(self).__name__, option, getattr(self, option))

    def start(self, x: Any) -> Any:
        """What is carried into the first step; x is one step's input, or its type."""
        raise NotImplementedError

    def nothing(self, params: Any, x: Any, types: Any) -> Any:
        """The memory to start from where none is given, of these types."""
        start = self.start(_step_of(x))
        return jax.tree.map(lambda a, t: jnp.asarray(a, t.dtype), start, types)

    def steps(
        self, params: Any, x: Any, mask: Any, carry: Any, mode: Mode, keys: Any = None
    ) -> tuple[Any, Any]:
        """The outputs of all steps, and what is carried in the end; keys: one for each step."""
        raise NotImplementedError

    def check(self, params: Any, x: Any) -> None:
        """Raise a LayerError unless parameters and inputs fit."""

    def init_cache(self, length: int, x: Any, *others: Any) -> dict:
        if self.reverse:
            raise LayerError(
                f"{self} goes from the last step to the first, so it can't go on step by step: it "
                "has no cache."
            )
        _check_steps(self, x)
        return {"cache": {"carry": jax.tree.map(jnp.asarray, self.start(_step_of(x)))}}

    def apply(
        self,
        params: Any,
        state: Any,
        x: Any,
        mask: Any = None,
        carry: Any = None,
        *,
        mode: Mode = EVALUATE,
    ) -> tuple[Any, dict]:
        _check_steps(self, x)
        self.check(params, x)
        cached = state.get("cache") if isinstance(state, dict) else None
        if cached is not None and carry is not None:
            raise LayerError(f"{self} was given both a cache to go on from and a carry.")
        start = cached["carry"] if cached is not None else carry
        wanted = jax.eval_shape(lambda: self.start(_step_of(x)))
        if start is None:
            start = self.nothing(params, x, wanted)
        _check_carry(self, start, wanted)
        if mask is not None:
            mask = _as_mask(self, mask, len(x))
            kept = lambda a: mask.reshape(-1, *[1] * (a.ndim - 1))
            x = jax.tree.map(lambda a: jnp.where(kept(a), a, jnp.zeros((), a.dtype)), x)
        start = varies_with(start, (params, x, mask, mode.key))
        ys, last = self._all_steps(params, x, mask, start, mode)
        if mask is not None:
            ys = jax.tree.map(lambda y: jnp.where(kept(y), y, jnp.zeros((), y.dtype)), ys)
        if cached is not None:
            last = jax.tree.map(lambda a, t: a.astype(t.dtype), last, start)
            state = state | {"cache": {"carry": last}}
        return ((ys, last) if self.return_carry else ys), state

    def _all_steps(self, params, x, mask, carry, mode):
        """With `remat`, about √n pieces of about √n steps, of each of which the start is kept."""
        count = len(x)
        size = math.isqrt(count - 1) + 1 if count else 0
        if not self.remat or size < 2:
            return self.steps(params, x, mask, carry, mode, self._keys(mode, count))
        whole = count // size * size
        keys = self._keys(mode, count)
        left: Any = None  # the dtypes of a carry after steps: the start's may be wider

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def piece(params, carry, given):
            nonlocal left
            x, mask, keys = given
            ys, last = self.steps(params, x, mask, carry, mode, keys)
            left = jax.tree.map(lambda a: a.dtype, last)
            last = jax.tree.map(lambda a, t: a.astype(t.dtype), last, carry)
            return last, ys

        def loop(params, carry, given):
            def own(carry, given):
                with in_loop(dataclasses.replace(self, remat=False), whole // size) as note:
                    last, ys = piece(params, carry, given)
                    note(params, {}, (*given[:2], carry), ys)
                return last, ys

            return jax.lax.scan(own, carry, given, reverse=self.reverse)

        def pieces(carry):
            cut = lambda a: a[:whole].reshape(whole // size, size, *a.shape[1:])
            given = jax.tree.map(cut, (x, mask, keys))
            last, ys = once(loop)(params, carry, given)
            return last, jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)

        def rest(carry):
            return piece(params, carry, jax.tree.map(lambda a: a[whole:], (x, mask, keys)))

        behind: Any = None
        if whole < count and self.reverse:
            carry, behind = rest(carry)
        carry, ys = pieces(carry)
        if whole < count and not self.reverse:
            carry, behind = rest(carry)
        if behind is not None:
            ys = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, behind)
        return ys, jax.tree.map(lambda a, dtype: a.astype(dtype), carry, left)

    def _keys(self, mode: Mode, count: int) -> Any:
        """A key for each step, the same ones however the steps are cut into pieces."""
        return None


@dataclasses.dataclass(frozen=True, repr=False)
class _Gated(Recurrent):
    """What `LSTM`, `GRU` and `RNN` have in common: W, U, b for gates one below the other."""

    hidden: int
    _: dataclasses.KW_ONLY
    weight_init: Initializer = lecun_normal
    recurrent_init: Initializer = orthogonal
    bias_init: Initializer = zeros

    gates = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        set_count(self, "hidden")
        for option in ("weight_init", "recurrent_init", "bias_init"):
            form = "an initialiser, a function (key, shape, dtype)"
            arguments.function(type(self).__name__, option, getattr(self, option), form)

    def init(self, key: chex.PRNGKey, x: Any, *others: Any) -> dict:
        _check_steps(self, x)
        shapes = self._shapes(x)
        w_key, u_key, b_key = self._keys_of_parts(key)
        square = self.hidden, self.hidden
        of_gates = [
            initial(self, self.recurrent_init, k, square)
            for k in jax.random.split(u_key, self.gates)
        ]
        return {
            "W": initial(self, self.weight_init, w_key, shapes["W"]),
            "U": jnp.concatenate(of_gates),
            "b": initial(self, self.bias_init, b_key, shapes["b"]),
        }

    def _keys_of_parts(self, key: Any) -> Any:
        """Those of W, of U and of b."""
        return jax.random.split(arguments.key(f"{self}.init", "key", key), 3)

    def start(self, x: Any) -> Any:
        return jnp.zeros(self.hidden, jnp.result_type(float))

    def nothing(self, params: Any, x: Any, types: Any) -> Any:
        """Zeros of the dtype of W x + b, which JAX's float may be wider than; at least float32."""
        dtype = wide_dtype(widest(x.dtype, params["W"].dtype, params["b"].dtype))
        return jax.tree.map(lambda t: jnp.zeros(t.shape, dtype), types)

    def check(self, params: Any, x: Any) -> None:
        shapes = self._shapes(x)
        W = params.get("W") if isinstance(params, dict) else None
        got = getattr(W, "shape", None)
        if got is not None and got[:-1] == shapes["W"][:-1] and got != shapes["W"]:
            raise LayerError(
                f"{self} has a W of shape {got}, so it wants an input of shape (steps, {got[-1]}), "
                f"but got {x.shape}."
            )
        check_params(self, params, shapes, x)

    def _shapes(self, x: Any) -> dict[str, tuple[int, ...]]:
        rows = self.gates * self.hidden
        return {"W": (rows, x.shape[-1]), "U": (rows, self.hidden), "b": (rows,)}

    def steps(
        self, params: Any, x: Any, mask: Any, carry: Any, mode: Mode, keys: Any = None
    ) -> tuple[Any, Any]:
        z = x @ params["W"].T + params["b"]
        with in_loop(Steps(self), len(x)) as note:
            note(params, {}, (jax.ShapeDtypeStruct((1, *z.shape[1:]), z.dtype), carry), carry)
        return self.loop(params, z, carry, mask)

    def loop(self, params: dict, z: Any, carry: Any, mask: Any = None) -> tuple[Any, Any]:
        """The operation itself, given its product with the inputs."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, repr=False)
class Steps(Layer):
    """Steps of a layer's loop, apart from what is done before it: `summary` counts one's FLOPs."""

    layer: _Gated

    def __call__(self, params: Any, z: Any, carry: Any) -> Any:
        return self.layer.loop(params, z, carry)


@dataclasses.dataclass(frozen=True, repr=False)
class LSTM(_Gated):
    """A long short-term memory: with σ the sigmoid,

        i, f, o = σ(W x + U h + b),  g = tanh(W x + U h + b)      rows of their own of W, U and b
        c ← f ∘ c + i ∘ g,           h ← o ∘ tanh(c)

    x is `(steps, in)` and gives the h of each step, `(steps, hidden)`. See the head of this file
    for masks and caches. The carry is `(h, c)`.

    Parameters: `{"W": (4·hidden, in), "U": (4·hidden, hidden), "b": (4·hidden,)}`, the rows in
    PyTorch's order i, f, g, o: its `weight_ih_l0`, `weight_hh_l0`, and the sum of its two biases.

    Args:
        hidden: how many numbers h has.
        reverse: from the last step to the first.
        remat: keep the memory at every √n-th of n steps, and in the backward pass compute the rest
            again, for one more forward pass of time.
        return_carry: give `(ys, carry)`, with what is carried in the end.
        forget_bias: what the start of the forget gate's bias is raised by, so that at first the
            memory stays (Jozefowicz, Zaremba, Sutskever 2015).
        weight_init: initialiser of W.
        recurrent_init: initialiser of each gate's part of U, `(hidden, hidden)`: orthogonal, which
            keeps the length of h.
        bias_init: initialiser of b.

    Raises:
        TypeError, ValueError: an option isn't of its kind.
        LayerError: (when called) x isn't `(steps, in)`, or the parameters, the mask or the carry
            don't fit.

    Hochreiter, Schmidhuber, "Long short-term memory", 1997; Gers, Schmidhuber, Cummins, "Learning
    to forget", 2000.

    >>> layer = LSTM(3)
    >>> params = layer.init(jax.random.key(0), jnp.zeros((7, 2)))
    >>> jax.tree.map(jnp.shape, params)
    {'U': (12, 3), 'W': (12, 2), 'b': (12,)}
    >>> layer(params, jnp.ones((7, 2))).shape
    (7, 3)
    """

    _: dataclasses.KW_ONLY
    forget_bias: float = 1.0

    gates = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        set_number(self, "forget_bias")

    def init(self, key: chex.PRNGKey, x: Any, *others: Any) -> dict:
        params = super().init(key, x)
        forget = slice(self.hidden, 2 * self.hidden)
        return params | {"b": params["b"].at[forget].add(self.forget_bias)}

    def start(self, x: Any) -> Any:
        return super().start(x), super().start(x)

    def loop(self, params: dict, z: Any, carry: Any, mask: Any = None) -> tuple[Any, Any]:
        h, c = carry
        c = c.astype(widest(c.dtype, z.dtype))
        U, h = params["U"].astype(z.dtype), h.astype(z.dtype)
        return ops.lstm(z, U, h, c, mask, reverse=self.reverse)


@dataclasses.dataclass(frozen=True, repr=False)
class GRU(_Gated):
    """A gated recurrent unit: with σ the sigmoid,

        r, z = σ(W x + U h + b)
        n = tanh(W x + b + r ∘ (U h + b_n))      rows of their own of W, U and b
        h ← (1 − z) ∘ n + z ∘ h

    The reset gate r acts after the product with h, as in PyTorch and cuDNN. x is `(steps, in)` and
    gives the h of each step, `(steps, hidden)`. See the head of this file for masks and caches. The
    carry is h.

    Parameters: `{"W": (3·hidden, in), "U": (3·hidden, hidden), "b": (3·hidden,),
    "b_n": (hidden,)}`, the rows in PyTorch's order r, z, n: its `weight_ih_l0` and
    `weight_hh_l0`; b is its `bias_ih_l0`, for r and z with `bias_hh_l0` added; b_n is the last
    third of that.

    Arguments and errors are as in `LSTM`.

    Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014.
    """

    gates = 3

    def init(self, key: chex.PRNGKey, x: Any, *others: Any) -> dict:
        params, key = super().init(key, x), self._keys_of_parts(key)[2]
        own = initial(self, self.bias_init, jax.random.fold_in(key, 1), (self.hidden,))
        return params | {"b_n": own}

    def _shapes(self, x: Any) -> dict[str, tuple[int, ...]]:
        return super()._shapes(x) | {"b_n": (self.hidden,)}

    def loop(self, params: dict, z: Any, carry: Any, mask: Any = None) -> tuple[Any, Any]:
        U, b = params["U"].astype(z.dtype), params["b_n"].astype(z.dtype)
        return ops.gru(z, U, b, carry.astype(z.dtype), mask, reverse=self.reverse)


@dataclasses.dataclass(frozen=True, repr=False)
class RNN(_Gated):
    """The plain recurrent network: h ← tanh(W x + U h + b), or relu in the place of tanh.

    x is `(steps, in)` and gives the h of each step, `(steps, hidden)`. See the head of this file
    for masks and caches. The carry is h.

    Parameters: `{"W": (hidden, in), "U": (hidden, hidden), "b": (hidden,)}`.

    Args:
        activation: "tanh" or "relu".

    All other arguments, and errors, are as in `LSTM`.

    Elman, "Finding structure in time", 1990.
    """

    _: dataclasses.KW_ONLY
    activation: str = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.choice("RNN", "activation", self.activation, ("tanh", "relu"))

    def loop(self, params: dict, z: Any, carry: Any, mask: Any = None) -> tuple[Any, Any]:
        U, h = params["U"].astype(z.dtype), carry.astype(z.dtype)
        return ops.rnn(z, U, h, mask, activation=self.activation, reverse=self.reverse)


# --------------------------------------------------------------------- a cell of one's own


def recurrent(
    cell: Layer | Callable,
    start: Callable,
    *,
    reverse: bool = False,
    remat: bool = False,
    return_carry: bool = False,
) -> OfCell:
    """A recurrent layer made of a cell: one step, `cell(params, carry, x) -> (carry, y)`.

    Args:
        cell: a layer of two inputs, the carry (any tree of arrays) and one step's x, which returns
            the new carry, of the same shapes, and the step's output.
        start: a function of one step's x that gives the first carry. Of x it is given the type
            alone, shape and dtype.
        reverse, remat, return_carry: as in `LSTM`.

    Returns:
        A Layer, called as all recurrent layers are. Its parameters are the cell's. In training a
        cell draws from a key of its own in each step.

    Raises:
        TypeError: cell is no layer, start no function, or an option isn't of its kind.
        LayerError: (when called) the cell's carry changes its shapes.

    >>> @network(gate=Linear(4), new=Linear(4))
    ... def minimal(net, h, x):
    ...     f = jax.nn.sigmoid(net.gate(jnp.concatenate([h, x])))
    ...     h = (1 - f) * h + f * jnp.tanh(net.new(jnp.concatenate([f * h, x])))
    ...     return h, h
    >>> layer = recurrent(minimal, lambda x: jnp.zeros(4))
    >>> params = layer.init(jax.random.key(0), jnp.zeros((7, 2)))
    >>> layer(params, jnp.ones((7, 2))).shape
    (7, 4)
    """
    return OfCell(
        as_layer(cell, "recurrent, cell"),
        start,
        reverse=reverse,
        remat=remat,
        return_carry=return_carry,
    )


@dataclasses.dataclass(frozen=True, repr=False)
class OfCell(Recurrent):
    """See `recurrent`, which makes it."""

    cell: Layer
    first: Callable

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.function("recurrent", "start", self.first, "a function start(x)")

    def init(self, key: chex.PRNGKey, x: Any, *others: Any) -> dict:
        _check_steps(self, x)
        carry = jax.eval_shape(lambda: self.start(_step_of(x)))
        return self.cell.init(key, carry, _step_of(x))

    def start(self, x: Any) -> Any:
        return self.first(x)

    def _keys(self, mode: Mode, count: int) -> Any:
        return None if mode.key is None else jax.random.split(mode.key, count)

    def steps(
        self, params: Any, x: Any, mask: Any, carry: Any, mode: Mode, keys: Any = None
    ) -> tuple[Any, Any]:
        count = len(x)

        def step(params, carry, given):
            x, here, key = given
            own = dataclasses.replace(mode, key=key)
            with in_loop(self.cell, count) as note:
                (new, y), _ = run(self.cell, params, {}, (carry, x), own)
                note(params, {}, (carry, x), (new, y))
            _check_carry(self, new, carry)
            new = jax.tree.map(lambda n, o: varies_as(n.astype(o.dtype), o), new, carry)
            if here is not None:
                new = jax.tree.map(lambda n, o: jnp.where(here, n, o), new, carry)
            return new, y

        def loop(params, carry, given):
            return jax.lax.scan(functools.partial(step, params), carry, given, reverse=self.reverse)

        last, ys = once(loop)(params, carry, (x, mask, keys))
        return ys, last

    def __repr__(self) -> str:
        return super().__repr__().replace("OfCell(", "recurrent(", 1)


def bidirectional(forward: Recurrent, backward: Recurrent | None = None) -> Network:
    """Two recurrent layers, one from each end; their outputs side by side at each step.

    Args:
        forward: `LSTM(128)`, say.
        backward: the one that goes from the last step to the first; unless given, one like
            `forward` with `reverse=True`.

    Returns:
        A Network with the parts "forward" and "backward", called as they are, as layer(params, x)
        or layer(params, x, mask). Of x `(steps, in)` it makes `(steps, 2·hidden)`.

    Raises:
        TypeError: one of them isn't a recurrent layer.

    Schuster, Paliwal, "Bidirectional recurrent neural networks", 1997.
    """
    for name, layer in (("forward", forward), ("backward", backward)):
        if not isinstance(layer, Recurrent) and (name == "forward" or layer is not None):
            raise TypeError(
                f"bidirectional: {name} must be a recurrent layer, but got {arguments.show(layer)}."
            )
    backward = backward or dataclasses.replace(forward, reverse=not forward.reverse)
    return Network(_bidirectional, {"forward": forward, "backward": backward})


@hands_mask_on
def _bidirectional(net: Net, x: Any, *others: Any) -> Any:
    ys = net.forward(x, *others), net.backward(x, *others)
    if isinstance(ys[0], tuple):  # they return what they carry
        (there, first), (back, last) = ys
        return jnp.concatenate([there, back], axis=-1), (first, last)
    return jnp.concatenate(ys, axis=-1)


# ------------------------------------------------------------------------------------- checks


def _step_of(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def _check_steps(layer: Recurrent, x: Any) -> None:
    rank = len(x.shape) if hasattr(x, "shape") else 0
    of_vectors = isinstance(layer, _Gated)
    if rank == 0 or (of_vectors and rank != 2):
        got = f"shape {tuple(x.shape)}" if hasattr(x, "shape") else arguments.show(x)
        wanted = "(steps, in)" if of_vectors else "(steps, ...)"
        raise LayerError(f"{layer} wants a sequence of shape {wanted} as its input, but got {got}.")


def _as_mask(layer: Recurrent, mask: Any, count: int) -> jax.Array:
    """Booleans, one for each step; of an integer, how many steps there are."""
    arguments.array(f"{layer}", "mask", mask)
    shape, dtype = jnp.shape(mask), jnp.result_type(mask)
    if shape == () and jnp.issubdtype(dtype, jnp.integer):
        if arguments.is_known(mask) and not 0 <= int(mask) <= count:
            raise LayerError(
                f"{layer} was told that {int(mask)} steps count, but the sequence has {count}."
            )
        steps = signed(jnp.asarray(mask))
        return jnp.arange(count, dtype=steps.dtype) < steps
    if shape != (count,) or not jnp.issubdtype(dtype, jnp.bool_):
        raise LayerError(
            f"{layer} wants a mask of booleans of shape {(count,)}, or an integer, the number of "
            f"steps, but got {dtype} of shape {shape}."
        )
    return jnp.asarray(mask)


def _check_carry(layer: Recurrent, got: Any, wanted: Any) -> None:
    of = lambda tree: jax.tree_util.tree_leaves_with_path(jax.tree.map(jnp.shape, tree))
    if [(str(p), a) for p, a in of(got)] != [(str(p), a) for p, a in of(wanted)]:
        raise LayerError(
            f"{layer} carries {arguments.shapes(wanted)} from step to step, but got "
            f"{arguments.shapes(got)}."
        )
