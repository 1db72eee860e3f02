"""Recurrent networks: one step (`lstm_cell`, `gru_cell`), or all of them (`lstm`, `gru`, `rnn`).

A recurrent network reads a sequence step by step and carries a memory from each step to the next.
Its weights meet two things: the input xₜ and the carried hₜ₋₁. The product with the input needs no
loop, since all steps' inputs are known: it is done before, for all steps at once, and what the
operations here are given is its result z. The loop does the product with hₜ₋₁, U hₜ₋₁.

Going back, the loop finds the gradient of each step's z; the gradient of U, Σₜ duₜ hₜ₋₁ᵀ with
u = U h, is one matrix product after the loop, where autodiff of a loop adds a matrix of U's size
in every step. (cuDNN does the same: Appleyard, Kočiský, Blunsom, "Optimizing performance of
recurrent neural networks on GPUs", arXiv:1604.01946.)

The gates stand one below the other, in PyTorch's order: i, f, g, o of an LSTM, r, q, n of a GRU
(whose q is PyTorch's z).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from fnn import arguments
from fnn.operation import compiled_rule as rule
from fnn.ops.arguments import must_be_array, must_be_real
from fnn.precision import wide, widest

# ----------------------------------------------------------------------------------- the cells
#
# A cell is four functions of one step, elementwise and in at least float32. z is the step's input,
# u = U h; old and new are what is carried before and after the step, h first.
#
#     step(z, u, old) -> new, kept              kept: the activated gates
#     back(kept, old, new, g) -> dz, d_old      g: the gradient of new. d_old without the way by u.
#     through(kept, dz) -> du                   the gradient of u, given that of z
#     push(kept, old, new, dz, du, d_old) -> d_new      forwards: tangents


class _LSTM:
    """i, f, o = σ(z + u), g = tanh(z + u); c′ = f c + i g; h′ = o tanh(c′). Kept: i, f, g, o."""

    @staticmethod
    def step(z, u, old):
        _, c = old
        i, f, g, o = jnp.split(z if u is None else z + u, 4, axis=-1)
        i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
        c = f * c + i * g
        return (o * jnp.tanh(c), c), jnp.concatenate([i, f, g, o], axis=-1)

    @staticmethod
    def back(kept, old, new, gs):
        i, f, g, o = jnp.split(kept, 4, axis=-1)
        dh, dc = gs
        t = jnp.tanh(new[1])
        dc = dc + dh * o * (1 - t * t)
        dz = [
            dc * g * i * (1 - i),
            dc * old[1] * f * (1 - f),
            dc * i * (1 - g * g),
            dh * t * o * (1 - o),
        ]
        return jnp.concatenate(dz, axis=-1), (jnp.zeros_like(dh), dc * f)

    @staticmethod
    def through(kept, dz):
        return dz

    @staticmethod
    def push(kept, old, new, dz, du, d_old):
        i, f, g, o = jnp.split(kept, 4, axis=-1)
        di, df, dg, do = jnp.split(dz if du is None else dz + du, 4, axis=-1)
        t = jnp.tanh(new[1])
        dc = f * d_old[1] + old[1] * f * (1 - f) * df + g * i * (1 - i) * di + i * (1 - g * g) * dg
        return t * o * (1 - o) * do + o * (1 - t * t) * dc, dc


class _GRU:
    """r, q = σ(z + u); n = tanh(z + r u); h′ = (1 − q) n + q h. Kept: r, q, n, and u's third."""

    @staticmethod
    def step(z, u, old):
        (h,) = old
        (z_r, z_q, z_n), (u_r, u_q, v) = (jnp.split(x, 3, axis=-1) for x in (z, u))
        r, q = jax.nn.sigmoid(z_r + u_r), jax.nn.sigmoid(z_q + u_q)
        n = jnp.tanh(z_n + r * v)
        return ((1 - q) * n + q * h,), jnp.concatenate([r, q, n, v], axis=-1)

    @staticmethod
    def back(kept, old, new, gs):
        r, q, n, v = jnp.split(kept, 4, axis=-1)
        (dh,), (h,) = gs, old
        dn = dh * (1 - q) * (1 - n * n)
        dz = jnp.concatenate([dn * v * r * (1 - r), dh * (h - n) * q * (1 - q), dn], axis=-1)
        return dz, (dh * q,)

    @staticmethod
    def through(kept, dz):
        """u's third passes through r on its way: du = (d_r, d_q, r d_n)."""
        r, _, _, _ = jnp.split(kept, 4, axis=-1)
        d_r, d_q, d_n = jnp.split(dz, 3, axis=-1)
        return jnp.concatenate([d_r, d_q, d_n * r], axis=-1)

    @staticmethod
    def push(kept, old, new, dz, du, d_old):
        r, q, n, v = jnp.split(kept, 4, axis=-1)
        (z_r, z_q, z_n), (u_r, u_q, dv) = (jnp.split(x, 3, axis=-1) for x in (dz, du))
        dr, dq = r * (1 - r) * (z_r + u_r), q * (1 - q) * (z_q + u_q)
        dn = (1 - n * n) * (z_n + dr * v + r * dv)
        (dh,), (h,) = d_old, old
        return ((1 - q) * dn + q * dh + (h - n) * dq,)


class _Tanh:
    """h′ = tanh(z + u). Kept: nothing but h′."""

    @staticmethod
    def step(z, u, old):
        return (jnp.tanh(z + u),), ()

    @staticmethod
    def back(kept, old, new, gs):
        return gs[0] * (1 - new[0] * new[0]), (jnp.zeros_like(gs[0]),)

    @staticmethod
    def through(kept, dz):
        return dz

    @staticmethod
    def push(kept, old, new, dz, du, d_old):
        return ((dz + du) * (1 - new[0] * new[0]),)


class _Relu(_Tanh):
    """h′ = max(z + u, 0); at the kink the gradient is 0, as for `relu`."""

    @staticmethod
    def step(z, u, old):
        return (jnp.maximum(z + u, 0),), ()

    @staticmethod
    def back(kept, old, new, gs):
        return jnp.where(new[0] > 0, gs[0], 0), (jnp.zeros_like(gs[0]),)

    @staticmethod
    def push(kept, old, new, dz, du, d_old):
        return (jnp.where(new[0] > 0, dz + du, 0),)


_PLAIN = {"tanh": _Tanh, "relu": _Relu}


# ------------------------------------------------------------------------------- one step


@rule
def lstm_cell(z: chex.Array, c: chex.Array) -> tuple[jax.Array, jax.Array]:
    """One step of an LSTM, all but its products: c′ = f c + i g, h′ = o tanh(c′).

    Args:
        z: the gates before their activation, i, f, g, o one after the other along the last axis:
            `(..., 4·hidden)`, of step t: W xₜ + U hₜ₋₁ + b. i, f and o become σ of theirs, g tanh.
        c: the memory, `(..., hidden)`.

    Returns:
        (h′, c′), both `(..., hidden)`.

    Local gradient: with t = tanh(c′), dc′ += dh′ o (1 − t²), and then dc′ g i (1 − i),
    dc′ c f (1 − f), dc′ i (1 − g²), dh′ t o (1 − o) for z, and dc′ f for c. Kept: the activated
    gates, c and c′. Smooth.

    Raises:
        TypeError: z or c isn't real floating.
        ValueError: their shapes don't fit.

    Sources: Hochreiter, Schmidhuber, "Long short-term memory", 1997; Gers, Schmidhuber, Cummins,
    "Learning to forget", 2000.
    """
    return _lstm_cell(z, c)[0]


def _lstm_cell(z, c):
    must_be_real("lstm_cell", z=z, c=c)
    if z.ndim == 0 or c.ndim == 0 or z.shape != (*c.shape[:-1], 4 * c.shape[-1]):
        raise ValueError(
            f"lstm_cell: argument 'z' has shape {z.shape}, wanted four times the last axis of 'c', "
            f"of shape {c.shape}."
        )
    (h, new), kept = _LSTM.step(wide(z), None, (None, wide(c)))
    return (h.astype(z.dtype), new.astype(c.dtype)), kept.astype(z.dtype)


@lstm_cell.forward
def _(z, c):
    (h, new), kept = _lstm_cell(z, c)
    return (h, new), (kept, c, new)


@lstm_cell.backward
def _(residuals, g):
    kept, c, new = residuals
    gs = tuple(map(wide, g))
    dz, (_, dc) = _LSTM.back(wide(kept), (None, wide(c)), (None, wide(new)), gs)
    return dz.astype(kept.dtype), dc.astype(c.dtype)


@rule
def gru_cell(z: chex.Array, u: chex.Array, h: chex.Array) -> jax.Array:
    """One step of a GRU, all but its products: h′ = (1 − q) n + q h.

    r = σ(z_r + u_r), q = σ(z_q + u_q), n = tanh(z_n + r u_n): the reset gate r acts after the
    product with h, as in PyTorch and cuDNN (in the paper before it).

    Args:
        z: what comes of the input, W xₜ + b: r, q and n one after the other along the last axis,
            `(..., 3·hidden)`.
        u: what comes of the memory, U hₜ₋₁ (and a bias of its own), of the same shape.
        h: the memory, `(..., hidden)`.

    Returns:
        The new memory h′, `(..., hidden)`.

    Local gradient: d_n = dh′ (1 − q)(1 − n²), d_q = dh′ (h − n) q (1 − q), d_r = d_n u_n r (1 − r)
    for z; for u the same, but r d_n in the place of d_n; q dh′ for h. Kept: r, q, n, u_n and h.
    Smooth.

    Raises:
        TypeError: an argument isn't real floating.
        ValueError: the shapes don't fit.

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014.
    """
    return _gru_cell(z, u, h)[0]


def _gru_cell(z, u, h):
    must_be_real("gru_cell", z=z, u=u, h=h)
    for name, x in (("z", z), ("u", u)):
        if h.ndim == 0 or x.shape != (*h.shape[:-1], 3 * h.shape[-1]):
            raise ValueError(
                f"gru_cell: argument '{name}' has shape {x.shape}, wanted three times the last "
                f"axis of 'h', of shape {h.shape}."
            )
    (new,), kept = _GRU.step(wide(z), wide(u), (wide(h),))
    return new.astype(h.dtype), kept.astype(z.dtype)


@gru_cell.forward
def _(z, u, h):
    new, kept = _gru_cell(z, u, h)
    return new, (kept, h, jnp.zeros((0,), u.dtype))


@gru_cell.backward
def _(residuals, g):
    kept, h, like_u = residuals
    dz, (dh,) = _GRU.back(wide(kept), (wide(h),), None, (wide(g),))
    du = _GRU.through(wide(kept), dz)
    return dz.astype(kept.dtype), du.astype(like_u.dtype), dh.astype(h.dtype)


# -------------------------------------------------------------------------- a whole sequence


class _Kept(NamedTuple):
    """What a sequence's backward pass needs.

    gates: of each step, as its cell keeps them.
    after: what is carried after each step.
    first: what is carried before the first.
    """

    gates: Any
    after: tuple
    first: tuple
    U: Any
    mask: Any


def _run(cell, z, U, b, carry, mask, reverse, several):
    """(h of each step, what is carried in the end), and what is kept."""
    first, types = carry, [x.dtype for x in carry]
    times = functools.partial(_times, U)
    if several and len(z) >= _WORTH:
        times = functools.partial(_times_transposed, lax.transpose(U, (1, 0)))

    def step(old, given):
        z, here = given
        u = times(old[0])
        u = u if b is None else u + wide(b)
        new, gates = cell.step(*_in_one_dtype((z, u, old)))
        # h is rounded in every step, since the product takes it so; other memory is not.
        new = (new[0].astype(types[0]), *new[1:])
        if here is not None:
            new = tuple(jnp.where(here, n, o) for n, o in zip(new, old, strict=True))
        rounded = tuple(x.astype(z.dtype) for x in new)
        return new, (rounded, jax.tree.map(lambda x: x.astype(z.dtype), gates))

    start = (carry[0], *(wide(x) for x in carry[1:]))
    last, (after, gates) = lax.scan(step, start, (z, mask), reverse=reverse)
    last = tuple(x.astype(t) for x, t in zip(last, types, strict=True))
    return (after[0], last), _Kept(gates, after, first, U, mask)


def _back(cell, kept, g, has_bias, reverse):
    """The gradients of z, U, b and what is carried at first."""
    g_h, g_last = g
    before = _before(kept, reverse)

    def step(d, given):
        types = [x.dtype for x in d]
        d, (g_h, here, gates, old, new) = _in_one_dtype((d, given))
        d = (d[0] + g_h, *d[1:])
        held = None
        if here is not None:
            held = tuple(jnp.where(here, 0, x) for x in d)
            d = tuple(jnp.where(here, x, 0) for x in d)
        dz, d_old = cell.back(gates, old, new, d)
        du = cell.through(gates, dz).astype(kept.U.dtype)
        by_u = _times_transposed(kept.U, du).astype(d_old[0].dtype)
        d_old = (d_old[0] + by_u, *d_old[1:])
        if held is not None:
            d_old = tuple(x + y for x, y in zip(d_old, held, strict=True))
        d_old = tuple(x.astype(t) for x, t in zip(d_old, types, strict=True))
        return d_old, dz.astype(kept.U.dtype)

    given = (g_h, kept.mask, kept.gates, before, kept.after)
    d_first, dz = lax.scan(step, tuple(map(wide, g_last)), given, reverse=not reverse)
    d_first = tuple(d.astype(x.dtype) for d, x in zip(d_first, kept.first, strict=True))
    du = cell.through(kept.gates, dz)
    # U's gradient, of all steps at once.
    dU = _summed_products(du, before[0]).astype(kept.U.dtype)
    db = jnp.sum(wide(du), axis=0).astype(kept.U.dtype) if has_bias else None
    return dz, dU, db, d_first, None


def _push(cell, kept, dz, dU, db, d_first, reverse):
    """The tangents of all that `_run` returns."""
    before = _before(kept, reverse)
    du = _products(dU, before[0])
    du = du if db is None else du + wide(db)[None]

    def step(d_old, given):
        types, by_u = [x.dtype for x in d_old], _times(kept.U, d_old[0])
        d_old, (dz, du, here, gates, old, new) = _in_one_dtype((d_old, given))
        d_new = cell.push(gates, old, new, dz, du + by_u.astype(du.dtype), d_old)
        if here is not None:
            d_new = tuple(jnp.where(here, n, o) for n, o in zip(d_new, d_old, strict=True))
        d_new = tuple(x.astype(t) for x, t in zip(d_new, types, strict=True))
        return d_new, d_new[0]

    start = (d_first[0], *(wide(x) for x in d_first[1:]))
    given = (dz, du, kept.mask, kept.gates, before, kept.after)
    d_last, d_h = lax.scan(step, start, given, reverse=reverse)
    return d_h, tuple(d.astype(x.dtype) for d, x in zip(d_last, kept.first, strict=True))


def _before(kept, reverse):
    """What is carried before each step: that after the step before."""

    def shifted(after, first):
        first = first.astype(after.dtype)[None]
        if reverse:
            return jnp.concatenate([after, first])[1:]
        return jnp.concatenate([first, after])[:-1]

    return tuple(map(shifted, kept.after, kept.first))


def _in_one_dtype(tree):
    """The floats of a tree in one dtype, at least float32: memory may be of a wider one."""
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    dtype = widest(jnp.float32, *[x.dtype for x in filter(is_float, jax.tree.leaves(tree))])
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, tree)


def _times(U, h):
    """U h for one step; 16-bit floats are summed in float32."""
    return lax.dot_general(h, U, (((0,), (1,)), ((), ())), preferred_element_type=wide(h).dtype)


def _times_transposed(U, du):
    """Uᵀ du for one step."""
    return lax.dot_general(du, U, (((0,), (0,)), ((), ())), preferred_element_type=wide(du).dtype)


def _products(U, hs):
    """U h for all steps at once."""
    return lax.dot_general(hs, U, (((1,), (1,)), ((), ())), preferred_element_type=wide(hs).dtype)


def _summed_products(du, hs):
    """Σₜ duₜ hₜᵀ."""
    return lax.dot_general(du, hs, (((0,), (0,)), ((), ())), preferred_element_type=wide(hs).dtype)


# Under vmap several sequences may share U. On CPUs XLA multiplies two and more of them faster by a
# transposed U (two in half of the time, sixteen in 0.9, 64 in as much), but one faster by U itself;
# and of so many steps on that is worth a copy.
_WORTH = 16


def _of_several(operation, size, axes, *args, several, **static):
    """A vmapped call whose sequences share U, as that; None for any other."""
    _, of_U, *_ = axes
    if several or of_U is not None or size == 1:
        return None
    return jax.vmap(functools.partial(operation, several=True, **static), axes)(*args)


@rule
def _lstm(z, U, h, c, mask, *, reverse, several=False):
    return _run(_LSTM, z, U, None, (h, c), mask, reverse, several)[0]


@_lstm.forward
def _(z, U, h, c, mask, *, reverse, several):
    return _run(_LSTM, z, U, None, (h, c), mask, reverse, several)


@_lstm.backward
def _(kept, g, *, reverse, several):
    dz, dU, _, d_first, _ = _back(_LSTM, kept, g, False, reverse)
    return dz, dU, *d_first, None


@_lstm.tangent
def _(kept, dz, dU, dh, dc, dmask, *, reverse, several):
    return _push(_LSTM, kept, dz, dU, None, (dh, dc), reverse)


@_lstm.vmapped
def _(size, axes, z, U, h, c, mask, *, reverse, several):
    return _of_several(_lstm, size, axes, z, U, h, c, mask, reverse=reverse, several=several)


@rule
def _gru(z, U, b, h, mask, *, reverse, several=False):
    return _run(_GRU, z, U, b, (h,), mask, reverse, several)[0]


@_gru.forward
def _(z, U, b, h, mask, *, reverse, several):
    return _run(_GRU, z, U, b, (h,), mask, reverse, several)


@_gru.backward
def _(kept, g, *, reverse, several):
    dz, dU, db, d_first, _ = _back(_GRU, kept, g, True, reverse)
    return dz, dU, db, *d_first, None


@_gru.tangent
def _(kept, dz, dU, db, dh, dmask, *, reverse, several):
    return _push(_GRU, kept, dz, dU, db, (dh,), reverse)


@_gru.vmapped
def _(size, axes, z, U, b, h, mask, *, reverse, several):
    return _of_several(_gru, size, axes, z, U, b, h, mask, reverse=reverse, several=several)


@rule
def _rnn(z, U, h, mask, *, activation, reverse, several=False):
    return _run(_PLAIN[activation], z, U, None, (h,), mask, reverse, several)[0]


@_rnn.forward
def _(z, U, h, mask, *, activation, reverse, several):
    return _run(_PLAIN[activation], z, U, None, (h,), mask, reverse, several)


@_rnn.backward
def _(kept, g, *, activation, reverse, several):
    dz, dU, _, d_first, _ = _back(_PLAIN[activation], kept, g, False, reverse)
    return dz, dU, *d_first, None


@_rnn.tangent
def _(kept, dz, dU, dh, dmask, *, activation, reverse, several):
    return _push(_PLAIN[activation], kept, dz, dU, None, (dh,), reverse)


@_rnn.vmapped
def _(size, axes, z, U, h, mask, *, activation, reverse, several):
    how = {"activation": activation, "reverse": reverse, "several": several}
    return _of_several(_rnn, size, axes, z, U, h, mask, **how)


def lstm(
    z: chex.Array,
    U: chex.Array,
    h: chex.Array,
    c: chex.Array,
    mask: chex.Array | None = None,
    *,
    reverse: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """An LSTM over a sequence: hₜ, cₜ = lstm_cell(zₜ + U hₜ₋₁, cₜ₋₁).

    Args:
        z: what comes of the inputs, W xₜ + b for all steps, `(steps, 4·hidden)`: the gates i, f, g,
            o one after the other.
        U: the recurrent weights, `(4·hidden, hidden)`, PyTorch's `weight_hh`.
        h, c: what is carried at first, `(hidden,)`. c may be of a wider dtype than the others.
        mask: booleans `(steps,)`, or None. A step where it is False doesn't happen: h and c stay
            as they are, and nothing comes of its z, not even of a nan.
        reverse: from the last step to the first.

    Returns:
        (hs, (h, c)): what is carried after each step, `(steps, hidden)`, and in the end. With a
        mask that leaves out the end, h and c are those of the last step that happens; and in
        reverse, the first of those starts from the given h and c.

    Local gradient: see `lstm_cell`, and Uᵀ dzₜ for hₜ₋₁; Σₜ dzₜ hₜ₋₁ᵀ for U, one product of the
    matrices of all steps, after the loop. Kept: the activated gates, h and c of each step. 16-bit
    floats are summed in float32, and c is carried in it.

    Raises:
        TypeError: an argument isn't real floating, or the mask not boolean.
        ValueError: the shapes don't fit.
    """
    z, _ = _checked("lstm", z, U, (("h", h), ("c", c)), mask, 4)
    arguments.flag("lstm", "reverse", reverse)
    return _lstm(z, U, h, c, mask, reverse=bool(reverse))


def gru(
    z: chex.Array,
    U: chex.Array,
    b: chex.Array,
    h: chex.Array,
    mask: chex.Array | None = None,
    *,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """A GRU over a sequence: hₜ = gru_cell(zₜ, U hₜ₋₁ + (0, 0, b), hₜ₋₁).

    Args:
        z: what comes of the inputs, W xₜ and a bias for all steps, `(steps, 3·hidden)`: r, q and n
            one after the other.
        U: the recurrent weights, `(3·hidden, hidden)`, PyTorch's `weight_hh`.
        b: the bias of n that the reset gate r multiplies, `(hidden,)`: the last third of PyTorch's
            `bias_hh`. (Its other thirds belong to the bias in z.)
        h: what is carried at first, `(hidden,)`.
        mask, reverse: as in `lstm`.

    Returns:
        (hs, h): what is carried after each step, `(steps, hidden)`, and in the end.

    Local gradient: see `gru_cell`; U's is one product after the loop. Kept: the activated gates,
    U's third product and h of each step. Errors are as in `lstm`.
    """
    z, b = _checked("gru", z, U, (("h", h),), mask, 3, b=b)
    arguments.flag("gru", "reverse", reverse)
    hs, (h,) = _gru(z, U, jnp.pad(b, (2 * len(b), 0)), h, mask, reverse=bool(reverse))
    return hs, h


def rnn(
    z: chex.Array,
    U: chex.Array,
    h: chex.Array,
    mask: chex.Array | None = None,
    *,
    activation: str = "tanh",
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The plain recurrent network: hₜ = tanh(zₜ + U hₜ₋₁), or max(zₜ + U hₜ₋₁, 0).

    Args:
        z: what comes of the inputs, W xₜ + b for all steps, `(steps, hidden)`.
        U: the recurrent weights, `(hidden, hidden)`.
        h: what is carried at first, `(hidden,)`.
        activation: "tanh" or "relu".
        mask, reverse: as in `lstm`.

    Returns:
        (hs, h): what is carried after each step, `(steps, hidden)`, and in the end.

    Local gradient: 1 − hₜ² of zₜ (or 1 where hₜ > 0: at relu's kink it is 0); U's is one product
    after the loop. Kept: h of each step. Errors are as in `lstm`.
    Source: Elman, "Finding structure in time", 1990.
    """
    z, _ = _checked("rnn", z, U, (("h", h),), mask, 1)
    arguments.choice("rnn", "activation", activation, list(_PLAIN))
    arguments.flag("rnn", "reverse", reverse)
    hs, (h,) = _rnn(z, U, h, mask, activation=activation, reverse=bool(reverse))
    return hs, h


def _checked(op, z, U, carried, mask, gates, b=None):
    """z, with zeros where the mask leaves a step out; and b."""
    must_be_real(op, z=z, U=U, **dict(carried), **({} if b is None else {"b": b}))
    if U.ndim != 2 or U.shape[0] != gates * U.shape[1]:
        wanted = "(hidden, hidden)" if gates == 1 else f"({gates} hidden, hidden)"
        raise ValueError(f"{op}: argument 'U' has shape {U.shape}, wanted {wanted}.")
    rows, hidden = U.shape
    if z.ndim != 2 or z.shape[1] != rows:
        raise ValueError(
            f"{op}: argument 'z' has shape {z.shape}, wanted (steps, {rows}) for U of shape "
            f"{U.shape}. (For a batch of sequences, jax.vmap the operation.)"
        )
    for name, x in (*carried, *(() if b is None else (("b", b),))):
        if x.shape != (hidden,):
            raise ValueError(
                f"{op}: argument '{name}' has shape {x.shape}, wanted {(hidden,)} for U of shape "
                f"{U.shape}."
            )
    same = {"U": U, **dict(carried[:1]), **({} if b is None else {"b": b})}
    for name, x in same.items():
        if jnp.result_type(x) != jnp.result_type(z):
            raise TypeError(
                f"{op}: argument '{name}' has dtype {x.dtype}, wanted {z.dtype}, the dtype of 'z'."
            )
    if mask is None:
        return z, b
    must_be_array(op, "mask", mask)
    if mask.dtype != bool:
        raise TypeError(
            f"{op}: argument 'mask' of shape {mask.shape} has dtype {mask.dtype}, wanted booleans."
        )
    if mask.shape != z.shape[:1]:
        raise ValueError(
            f"{op}: argument 'mask' has shape {mask.shape}, wanted {z.shape[:1]}, one boolean for "
            "each step."
        )
    z = jnp.asarray(z)
    return jnp.where(mask[:, None], z, jnp.zeros((), z.dtype)), b
