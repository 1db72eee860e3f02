"""Networks of a few lines: `chain`, `parallel`, `residual`, and `repeat`.

The parts may be given by position or by name, and are layers or plain functions:

    chain(Linear(100), relu, Linear(10))                              parameters {"0", "2"}
    chain(hidden=Linear(100), activation=relu, output=Linear(10))     {"hidden", "output"}

A part without parameters leaves no trace in the tree.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.eager import once
from fnn.layers.layer import Layer, LayerError, as_layer, run, with_mask
from fnn.layers.mode import EVALUATE, Mode
from fnn.layers.net import Net, Network, hands_mask_on, in_loop
from fnn.layers.stages import pipelined

Part = Layer | Callable


def chain(*layers: Part, **named: Part) -> Network:
    """One layer after the other: the output of each is the input of the next.

    Args:
        *layers: layers or functions of one array, in order; or
        **named: the same by name. Not both. (The first may take several inputs. Where it takes a
            mask of steps as its second, as `LSTM` does, all that take one get it.)

    Returns:
        A Network; its parameters are a dict with an entry for each part that has some, under
        its name, or "0", "1", ... An empty chain is the identity.

    Raises:
        TypeError: a part is neither a layer nor a function, or some are named and some not.

    >>> net = chain(hidden=Linear(100), activation=relu, output=Linear(10))
    >>> params = net.init(jax.random.key(0), jnp.zeros(784))
    >>> params["hidden"]["W"].shape
    (100, 784)
    """
    return Network(_chain, _parts("chain", layers, named))


def parallel(*layers: Part, **named: Part) -> Network:
    """The same inputs to every part; the outputs side by side.

    Returns:
        A Network whose output is a tuple of the parts' outputs, or a dict if they are named.
        What to do with them is for the next layer:
        `chain(parallel(f, g), lambda ys: ys[0] + ys[1])`.

    Arguments, parameters and errors are as in `chain`.
    """
    return Network(_parallel, _parts("parallel", layers, named))


def residual(*layers: Part, **named: Part) -> Network:
    """y = x + chain(...)(x): the gradient reaches x undiminished through the sum.

    Arguments and parameters are as in `chain`.

    He et al., "Deep residual learning for image recognition", CVPR 2016, equation 1. For its
    equation 2, a projection beside the branch: `chain(parallel(branch, projection), add)`.

    Raises:
        LayerError: the chain changes the shape of x.
    """
    return Network(_residual, _parts("residual", layers, named))


@hands_mask_on
def _chain(net: Net, *xs: Any) -> Any:
    layers = list(net._parts.values())
    mask = xs[1:2] if layers and layers[0].takes_mask else ()
    for number, (part, layer) in enumerate(zip(net, layers, strict=True)):
        xs = (part(*xs, *(mask if number and layer.takes_mask else ())),)
    return xs[0] if len(xs) == 1 else xs


def _parallel(net: Net, *xs: Any) -> Any:
    ys = [part(*xs) for part in net]
    names = list(net._parts)
    return tuple(ys) if all(map(str.isdigit, names)) else dict(zip(names, ys, strict=True))


def _residual(net: Net, x: Any) -> Any:
    y = _chain(net, x)
    if getattr(y, "shape", None) != x.shape:
        got = f"has shape {y.shape}" if hasattr(y, "shape") else f"is a {type(y).__name__}"
        raise LayerError(
            f"residual: x + f(x) wants f(x) of the shape of x, {x.shape}, but f(x) {got}, in "
            f"{net._layer}."
        )
    return x + y


def _parts(where: str, layers: tuple, named: dict) -> dict[str, Any]:
    if layers and named:
        raise TypeError(
            f"{where}: got {len(layers)} layers by position and {sorted(named)} by name. "
            "Name all of them or none."
        )
    return named or {str(i): part for i, part in enumerate(layers)}


def repeat(block: Part, n: int, *, remat: bool | Callable | None = None, unroll: int = 1) -> Repeat:
    """The same block n times, each time with weights of its own: y = blockₙ(… block₁(x)).

    The weights of all blocks are stacked, and one program goes over them (`jax.lax.scan`): it
    takes no longer to compile for a hundred blocks than for one.

    Args:
        block: a layer whose output has the shape and dtype of its first input. Further inputs
            go to all blocks alike: `repeat(block, 12)(params, x, mask)`.
        n: how many.
        remat: whether the backward pass computes a block's insides again from its input, rather
            than keep them (`jax.checkpoint`); or a policy of `jax.checkpoint_policies`, which
            says what is kept.
        unroll: how many blocks stand in one turn of the loop (see `jax.lax.scan`). With n the
            compiler sees no loop: it takes n times as long, and may find faster programs.

    Returns:
        A Layer. Its parameters and its state are those of a block, each array with an axis of
        length n in front.

    Raises:
        TypeError, ValueError: block is no layer, n or unroll no positive integer, remat no such
            option.
        LayerError: the block changes its input's shape or dtype.
    """
    return Repeat(as_layer(block, "repeat, block"), n, remat=remat, unroll=unroll)


@dataclasses.dataclass(frozen=True, repr=False)
class Repeat(Layer):
    """See `repeat`, which makes it."""

    block: Layer
    n: int
    remat: bool | Callable | None = dataclasses.field(default=None, kw_only=True)
    unroll: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("n", "unroll"):
            number = arguments.integer("repeat", name, getattr(self, name), least=1)
            object.__setattr__(self, name, number)
        if not callable(self.remat) and self.remat is not None:
            arguments.flag("repeat", "remat", self.remat)

    @property
    def takes_mask(self) -> bool:  # type: ignore[override]
        return self.block.takes_mask

    def init(self, key: chex.PRNGKey, *xs: Any) -> dict:
        arguments.key("repeat.init", "key", key)
        y = jax.eval_shape(lambda *xs: self.block._make(jax.random.key(0), None, *xs)[2], *xs)
        self._must_keep_type(xs[0], y)
        return jax.vmap(lambda key: self.block.init(key, *xs))(self._keys(key))

    def init_state(self, *xs: Any) -> dict:
        return self._stacked(self.block.init_state(*xs))

    def init_cache(self, length: int, *xs: Any) -> dict:
        return self._stacked(self.block.init_cache(length, *xs))

    def apply(
        self,
        params: Any,
        state: Any,
        x: Any,
        *others: Any,
        mask: Any = None,
        mode: Mode = EVALUATE,
    ) -> tuple[Any, dict]:
        others = with_mask(self, (x, *others), mask)[1:]
        for path, leaf in jax.tree_util.tree_leaves_with_path((params, state)):
            if jnp.shape(leaf)[:1] != (self.n,):
                place = jax.tree_util.keystr(path[1:])
                raise LayerError(
                    f"{self} wants each array of its parameters and its state with an axis of "
                    f"length {self.n} in front, but {place} has shape {jnp.shape(leaf)}."
                )
        if mode.across is not None and mode.across.stages is not None:
            return self._in_stages(params, state, x, others, mode), state
        keys = None if mode.key is None else self._keys(mode.key)
        return self._over_blocks(params, state, keys, x, others, mode)

    def _over_blocks(
        self, params: Any, state: Any, keys: Any, x: Any, others: tuple, mode: Mode
    ) -> tuple[Any, dict]:
        """Those of the blocks whose parameters, states and keys these are, one after the other."""

        def step(x, own):
            params, state, key = own
            here = dataclasses.replace(mode, key=key)
            if mode.across is not None:
                x = jax.tree.map(mode.across.pin, x)
            with in_loop(self.block, self.n, self._written) as note:
                y, new = run(self.block, params, state, (x, *others), here)
                note(params, state, (x, *others), y)
            self._must_keep_type(x, y)
            return y, new

        if self.remat:
            policy = self.remat if callable(self.remat) else None
            step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        stacked = jax.tree.leaves((params, state, keys))
        length = len(stacked[0]) if stacked else self.n
        loop = functools.partial(jax.lax.scan, step, length=length, unroll=self.unroll)
        # Of `others` what is known stays so: the number of steps that a mask is, for one.
        return once(loop)(x, (params, state, keys))

    def _in_stages(self, params: Any, state: Any, x: Any, others: tuple, mode: Mode) -> Any:
        """The same, with the blocks divided over devices, which microbatches pass through."""
        across = mode.across
        assert across is not None and across.stages is not None
        stages = across.mesh.shape[across.stages]
        if jax.tree.leaves(state) or not jax.tree.leaves(params) or self.n % stages:
            raise LayerError(
                f"{self} can be divided into {stages} stages only if its blocks have parameters "
                f"but no state, and {stages} divides their number, {self.n}."
            )
        size = self.n // stages
        here = dataclasses.replace(mode, axis=None, across=None)

        def stage(params, number, x, key, others):
            """A stage's blocks, on one example."""
            keys = None
            if key is not None:
                keys = jax.vmap(jax.random.fold_in, (None, 0))(
                    key, number * size + jnp.arange(size)
                )
            return self._over_blocks(params, {}, keys, x, others, here)[0]

        return pipelined(stage, params, x, mode.key, others, across)

    def _make(self, key: Any, length: int | None, *xs: Any) -> tuple[dict, dict, Any]:
        make = jax.vmap(lambda key: self.block._make(key, length, *xs), out_axes=(0, None, 0))
        params, state, ys = make(self._keys(key))
        y = jax.tree.map(lambda y: y[0], ys)
        self._must_keep_type(xs[0], y)
        return params, self._stacked(state), y

    @property
    def _written(self) -> int:
        """How many blocks the program holds: those of one turn, and those left over."""
        turns, left = divmod(self.n, self.unroll)
        return (self.unroll if turns else 0) + left

    def _keys(self, key: Any) -> Any:
        """Each block's: of the first n the same for any number of blocks."""
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(self.n))

    def _stacked(self, state: dict) -> dict:
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (self.n, *jnp.shape(a))), state)

    def _must_keep_type(self, x: Any, y: Any) -> None:
        wanted, got = (
            jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), t) for t in (x, y)
        )
        if wanted != got:
            raise LayerError(
                f"{self} wants a block whose output has its input's shape and dtype, "
                f"{arguments.shapes(x)}, but got {arguments.shapes(y)}."
            )

    def __repr__(self) -> str:
        return super().__repr__().replace("Repeat(", "repeat(", 1)
