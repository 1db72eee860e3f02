"""The backward pass step by step: each use of a value, and the chain rule for it in words.

    ∂f/∂x = ∂f/∂q · ∂q/∂x = -4 · 1 = -4

The left factor is the upstream gradient, the right one the local gradient; where a value is
used several times, the products add up (`+=`, as in micrograd).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnn import text
from fnn.backprop import sweep
from fnn.backprop.node import Node
from fnn.backprop.primitives import is_ruled
from fnn.backprop.rules import LocalRule
from fnn.jaxpr import is_inexact
from fnn.meshes import zeros
from fnn.operation import call_of

LARGEST_JACOBIAN = 4096


@dataclasses.dataclass(eq=False, repr=False)
class Step:
    """One step of the chain rule: an operation passes the gradient to one of its inputs.

    Attributes:
        of: the name of what is differentiated, `f`.
        nodes: the operation's results, most often one: `q`.
        input: the node that gets a gradient: `x`.
        position: which of the operation's arguments it is.
        upstream: ∂f/∂q, an array; a tuple with one for each result if there are several.
        product: what this step adds to ∂f/∂x, an array of x's shape.
        local_gradient: the local gradient ∂q/∂x in words, with the names of this graph.
        before: what earlier steps added to ∂f/∂x, None if this is the first.
        use, uses: this is the use-th of the uses of `input` that pass a gradient to it.
    """

    of: str
    nodes: tuple[Node, ...]
    input: Node
    position: int
    upstream: Any
    product: Any
    local_gradient: str
    before: Any
    use: int
    uses: int
    _tape: sweep.Tape = dataclasses.field(repr=False)
    _visit: sweep.Visit = dataclasses.field(repr=False)

    @property
    def node(self) -> Node:
        """The operation's (first) result."""
        return self.nodes[0]

    @property
    def total(self) -> Any:
        """∂f/∂x so far: the earlier steps' sum and this step's product."""
        return self.product if self.before is None else lax.add(self.before, self.product)

    @functools.cached_property
    def local(self) -> Any:
        """The local gradient ∂q/∂x, found when asked for.

        For an elementwise operation an array of the output's shape (the Jacobian's diagonal),
        else the Jacobian, of shape `q.shape + x.shape`; a tuple of them if the operation has
        several results. None where the Jacobian has more than 4096 entries: then only
        its product with a vector is ever formed, as backpropagation does.
        """
        results = [self._jacobian(k) for k in range(len(self._visit.equation.outs))]
        return results[0] if len(results) == 1 else tuple(results)

    def _jacobian(self, k: int):
        equation, rule = self._visit.equation, self._visit.rule
        aval = self._tape.program.avals[equation.outs[k]]
        if not is_inexact(aval):
            return None

        def pull(g):
            upstream = [g if i == k else None for i in range(len(equation.outs))]
            found = sweep.pull_back(self._tape, self._visit, upstream)[self.position]
            return jnp.zeros(self.input.shape, self.input.dtype) if found is None else found

        elementwise = isinstance(rule, LocalRule) and rule.elementwise
        if aval.shape == () or (elementwise and self.input.shape == aval.shape):
            return pull(jnp.ones(aval.shape, aval.dtype))
        entries = math.prod(aval.shape)
        if entries * math.prod(self.input.shape) > LARGEST_JACOBIAN:
            return None
        basis = jnp.eye(entries, dtype=aval.dtype).reshape(entries, *aval.shape)
        return jax.vmap(pull)(basis).reshape(*aval.shape, *self.input.shape)

    def __repr__(self):
        return f"<Step {self}>"

    def __str__(self):
        above = f"∂{self.of}"
        q = text.listed([n.label for n in self.nodes])
        q = f"({q})" if len(self.nodes) > 1 else q
        x = self.input.label
        adds = self.uses > 1 or self.before is not None
        left = f"{above}/∂{x} {'+=' if adds else '='} {above}/∂{q} · ∂{q}/∂{x}"
        if len(self.nodes) == 1 and self.node.shape == self.input.shape == ():
            up, local, product = map(_number, (self.upstream, self.local, self.product))
            line = f"{left} = {up} · {local} = {product}"
        else:
            line = f"{left}: {_sizes(self.upstream)} → {_sizes(self.product)}"
            line += f", local gradient {self.local_gradient}"
        if self.before is None:
            return line
        if self.input.shape == ():
            total = f"{_number(self.before)} + {_number(self.product)} = {_number(self.total)}"
        else:
            total = _sizes(self.total)
        return f"{line}   (in sum {total})"


def steps(
    tape: sweep.Tape,
    visited: Sequence[tuple[sweep.Visit, list, Sequence]],
    seeds: Sequence,
    nodes: dict[int, Node],
    of: str,
) -> Iterator[Step]:
    """The steps of a finished reverse sweep.

    Args:
        tape: the forward pass.
        visited: (visit, upstream gradients, products) in the order of the sweep.
        seeds: the upstream gradient of each output, None for zero.
        nodes: the node of each value.
        of: the name of what was differentiated.
    """
    sums: dict[int, Any] = {}
    if len(tape.program.outputs) > 1:  # a single output's seed is the 1 that all begins with
        for place, seed in zip(tape.program.outputs, seeds, strict=True):
            if seed is not None:
                sums[place] = seed if place not in sums else lax.add(sums[place], seed)
    uses = Counter(
        place
        for visit, _, _ in visited
        for place, needed in zip(visit.equation.ins, visit.needed, strict=True)
        if needed
    )
    seen: Counter[int] = Counter()
    for visit, upstream, products in visited:
        equation = visit.equation
        results = tuple(nodes[i] for i in equation.outs if i in nodes)
        given = tuple(upstream)
        for position, (place, product) in enumerate(zip(equation.ins, products, strict=True)):
            if not visit.needed[position]:
                continue
            seen[place] += 1
            if product is None:
                product = zeros(tape.program.avals[place])
            step = Step(
                of,
                results,
                nodes[place],
                position,
                given[0] if len(given) == 1 else given,
                product,
                _in_words(visit, position, results, nodes),
                sums.get(place),
                seen[place],
                uses[place],
                tape,
                visit,
            )
            sums[place] = step.total
            yield step


def _in_words(visit, position, results, nodes) -> str:
    """What the rule says of its local gradient, with this graph's names for a, b, x and y."""
    rule = visit.rule
    if not rule.local_gradient:
        if call_of(visit.equation) is not None:
            return f"the hand-written backward of {results[0].operation}"
        return f"the rule of {results[0].operation}" if is_ruled(visit.equation) else "by jax.vjp"
    said = rule.local_gradient[min(position, len(rule.local_gradient) - 1)]
    if not isinstance(rule, LocalRule):
        return said
    inputs = [nodes[i].label for i in visit.equation.ins]
    names = {}
    if rule.elementwise and len(inputs) == 1:
        names = {"x": inputs[0], "y": results[0].label}
        if visit.equation.name == "integer_pow":
            names["n"] = str(visit.equation.params["y"])
    elif rule.elementwise and len(inputs) == 2 and "x" not in "".join(rule.local_gradient):
        names = dict(zip("ab", inputs, strict=True))
    letter = r"(?<![A-Za-z])([abxyn])(?![A-Za-z])"
    return re.sub(letter, lambda m: str(names.get(m[1], m[1])), said)


def _number(x) -> str:
    return text.number(x, 3) if text.is_concrete(x) else "?"


def _sizes(x) -> str:
    """`(100, 64) ‖·‖ 0.031`, for each of several."""
    arrays = [a for a in (x if isinstance(x, tuple) else (x,)) if a is not None]
    return text.listed([f"{text.shape(a.shape)} {text.gradient(a, 3)}" for a in arrays], width=60)
