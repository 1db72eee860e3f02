"""`Graph`: a computational graph with its values and gradients, to read, step through and draw."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fnn import arguments, text
from fnn.backprop import draw, graphviz, steps, sweep
from fnn.backprop.coverage import Coverage, coverage
from fnn.backprop.grouping import Choice, groups
from fnn.backprop.labels import body_labels, body_name, constant_label, unique
from fnn.backprop.names import names_in_source
from fnn.backprop.node import Node, as_value, is_value
from fnn.backprop.picture import Picture
from fnn.backprop.primitives import rule_of
from fnn.jaxpr import Equation, Inlined, Program, inner_jaxprs, is_inexact, program
from fnn.meshes import zeros
from fnn.operation import operation_name


class Graph:
    """A function's computational graph; made by `graph(f)(*args)`.

    `print(g)` is a table of all nodes. `g[3]` is node number 3, `g["x"]` the node of that name.

    Attributes:
        name: the function's name.
        nodes: all nodes in topological order: the inputs, then the operations' results.
        inputs, outputs: nodes; an output may be an input or a constant.
    """

    def __init__(
        self,
        flat: Program,
        name: str,
        input_labels: Sequence[str],
        output_labels: Sequence[str] = (),
        args: Sequence | None = None,
        out_tree: Any = None,
    ):
        self.name = name
        self.program = flat
        self._by_place = _nodes(flat, input_labels, output_labels)
        self.nodes = [n for n in self._by_place.values() if n.number is not None]
        self.inputs = [self._by_place[i] for i in flat.inputs]
        self.outputs = [self._by_place[i] for i in flat.outputs]
        self._out_tree = out_tree
        self._tape: sweep.Tape | None = None
        self._cannot: Exception | None = None
        self._visited: list[tuple[sweep.Visit, list, list]] | None = None
        self._seeds: list = []
        self._is_seeded = False
        if args is not None:
            self._run(args)

    def _run(self, args) -> None:
        """The forward pass: fill in the values."""
        flat = self.program
        needed = [is_inexact(flat.avals[i]) for i in flat.inputs]
        try:
            self._tape = sweep.forward(flat, args, needed, rule_of)
        except Exception as error:  # without a backward pass, it can still be read
            self._tape = sweep.forward(flat, args, [False] * len(args), rule_of)
            self._cannot = error
        for place, node in self._by_place.items():
            if node.operation != "constant":
                node.value = self._tape.values[place]

    # ------------------------------------------------------------------------------- to look at

    def __getitem__(self, key: int | str) -> Node:
        """The node of this number, or the first of this name.

        Raises:
            IndexError: no node has this number.
            KeyError: no node has this name.
            TypeError: it is neither a number nor a name.
        """
        if not isinstance(key, str):
            number = arguments.integer("graph[...]", "a node's number or name", key)
            if not -len(self.nodes) <= number < len(self.nodes):
                raise IndexError(f"the graph of {self.name} has {len(self.nodes)} nodes, no {key}")
            return self.nodes[number]
        for node in self.nodes:
            if node.label == key:
                return node
        names = text.listed([node.label for node in self.inputs], most=12)
        raise KeyError(f"the graph of {self.name} has no node {key!r}; its inputs are {names}")

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self):
        return f"<Graph of {self._signature()}: {self._size()}>"

    def __str__(self):
        header = ("#", "name", "operation", "inputs", "shape", "dtype", "value", "gradient")
        rows = [_row(node) for node in self.nodes]
        table = text.table((*header, "source"), rows, right=(0,))
        bodies = [
            f"{node.operation} {node.label}, {body!s}"
            for node in self.nodes
            if not node.result
            for body in node.graphs.values()
        ]
        return "\n\n".join([f"{self._signature()}: {self._size()}\n{table}", *bodies])

    def _signature(self):
        return f"{self.name}({text.listed([n.label for n in self.inputs], most=7)})"

    def _size(self):
        inputs, operations = len(self.inputs), len(self._operations())
        return (
            f"{inputs} input{'s' if inputs != 1 else ''}, "
            f"{operations} operation{'s' if operations != 1 else ''}"
        )

    def _operations(self) -> list[Node]:
        return [n for n in self.nodes if n.equation is not None and not n.result]

    @property
    def value(self) -> Any:
        """What the function returned.

        Raises:
            ValueError: the graph has no values: it is a loop's or branch's body, or was made from
                types.
        """
        self._tape_with_values()
        return jax.tree.unflatten(self._out_tree, [n.value for n in self.outputs])

    def coverage(self) -> Coverage:
        """Which operations have a hand-written backward rule, and which fall back to JAX's.

        Counted are the operations that a gradient passes through, those inside loops and
        branches too.
        """
        active = [is_inexact(self.program.avals[i]) for i in self.program.inputs]
        values = () if self._tape is None else self._tape.values
        return coverage(self.program, active, operation_name, values)

    # ------------------------------------------------------------------------- backpropagation

    def backprop(self, seed: Any = None) -> Graph:
        """Fill in every node's gradient, by the reverse sweep; returns the graph.

        Args:
            seed: the upstream gradient of the function's result, of the same structure and
                shapes; None in the place of an output means zero. May be left out for a
                result that's a single real scalar, whose gradient with respect to itself is 1.

        The gradients are those of Σ seed · result. As in JAX's `vjp`, no complex number is
        conjugated.

        Raises:
            ValueError: the seed's structure or a shape isn't the result's, or there is none
                and the result isn't a scalar; or the graph has no values.
            TypeError: no input or no output is a real or complex array, or a seed is no array, or
                complex for a real output.
            Exception: what differentiating the function raised when the graph was made.
        """
        tape = self._tape_with_values()
        self._must_be_differentiable()
        self._seeds, self._is_seeded = self._checked_seeds(seed), seed is not None
        visited: list = []
        gradients = sweep.backward(tape, self._seeds, lambda *visit: visited.append(visit))
        self._visited = visited
        for place, node in self._by_place.items():
            if node.differentiable:
                found = gradients[place]
                node.gradient = zeros(self.program.avals[place]) if found is None else found
        return self

    def steps(self) -> Iterator[steps.Step]:
        """The backward pass step by step, from the output to the inputs.

        One step for each input of each operation: local gradient times upstream gradient.
        `str(step)` spells it out, with numbers for scalars:

            ∂f/∂x = ∂f/∂q · ∂q/∂x = -4 · 1 = -4

        Runs `backprop()` first if that hasn't been done, and raises what that raises.
        """
        if self._visited is None:
            self.backprop()
        tape, visited = self._tape_with_values(), self._visited or []
        return steps.steps(tape, visited, self._seeds, self._by_place, self.of)

    @property
    def of(self) -> str:
        """What the gradients are of: `f` for one scalar output, else L = Σ seed · output.

        It is L, too, where `backprop` was given a seed.
        """
        is_scalar = len(self.outputs) == 1 and self.outputs[0].shape == ()
        return self.outputs[0].label if is_scalar and not self._is_seeded else "L"

    def contributions(self) -> Iterator[tuple[Equation, int, Any]]:
        """What each operation handed to each of its inputs: (equation, which input, gradient)."""
        for visit, _, products in self._visited or ():
            for i, product in enumerate(products):
                yield visit.equation, i, product if visit.needed[i] else None

    def _tape_with_values(self) -> sweep.Tape:
        if self._tape is None:
            raise ValueError(
                f"the graph of {self.name} has no values: it's the body of a loop or branch, or "
                "was made from types. Call graph(f) with arrays."
            )
        return self._tape

    def _must_be_differentiable(self):
        if self._cannot is not None:
            raise self._cannot
        if not any(n.differentiable for n in self.inputs):
            types = ", ".join(f"{n.label} {text.type_of(n.shape, n.dtype)}" for n in self.inputs)
            raise TypeError(
                f"no input of {self.name} can have a gradient, only real and complex numbers "
                f"can: {types or 'it has no inputs'}. Write -2.0 rather than -2."
            )

    def _checked_seeds(self, seed) -> list:
        outputs = self.outputs
        if seed is None:
            if len(outputs) == 1 and outputs[0].shape == ():
                if jnp.issubdtype(outputs[0].dtype, jnp.floating):
                    return [jnp.ones((), outputs[0].dtype)]
                is_complex = jnp.issubdtype(outputs[0].dtype, jnp.complexfloating)
                hint = "; give its upstream gradient as backprop(seed)" if is_complex else ""
                raise TypeError(
                    f"backprop starts from a real number, but {self.name} returned "
                    f"{outputs[0].dtype}{hint}."
                )
            types = ", ".join(f"{n.label} {n.shape}" for n in outputs)
            raise ValueError(
                f"backprop needs a seed, the upstream gradient of what {self.name} returned: "
                f"{types}. Only a single scalar's is 1 by itself."
            )
        try:
            leaves = self._out_tree.flatten_up_to(seed)
        except ValueError as error:
            raise ValueError(
                f"the seed's structure must be that of what {self.name} returned, "
                f"{self._out_tree}: {error}"
            ) from None
        return [self._checked_seed(n, leaf) for n, leaf in zip(outputs, leaves, strict=True)]

    def _checked_seed(self, output, leaf):
        if leaf is None:
            return None
        if not jnp.issubdtype(output.dtype, jnp.inexact):
            raise TypeError(
                f"{output.label} is {output.dtype} and has no gradient; its seed must be None."
            )
        if not is_value(leaf):
            raise TypeError(
                f"the seed of {output.label} must be an array, but is {arguments.show(leaf)}."
            )
        if jnp.shape(leaf) != output.shape:
            raise ValueError(
                f"the seed of {output.label} has shape {jnp.shape(leaf)}, but must have the "
                f"output's, {output.shape}."
            )
        is_real = jnp.issubdtype(output.dtype, jnp.floating)
        if is_real and jnp.iscomplexobj(leaf):
            raise TypeError(f"the seed of {output.label} is complex, but it is {output.dtype}.")
        return jnp.asarray(leaf, output.dtype)

    # --------------------------------------------------------------------------------- pictures

    def to_dot(self, max_boxes: int = 16, *, open: Choice = None, closed: Choice = None) -> str:
        """The picture in Graphviz's language DOT, as text.

        Args:
            max_boxes: a graph of more operations is grouped by named scope, jitted function,
                function and source line, and groups stay closed so that no more boxes than
                this are drawn.
            open: groups to open, with those around them, however many boxes that makes: a
                name (`"attention"`), a path (`"block[1]/attention"`: numbers tell groups of
                one name apart), a list of these, or a function of a group (which has `label`,
                `path` and `units()`, its operations) that returns a bool.
            closed: groups to keep closed, in the same way.

        Raises:
            ValueError: there is no group of that name, or it is to be open inside a closed one.
            TypeError: an argument is of another type.
        """
        return graphviz.dot(self._picture("graph.to_dot", max_boxes, open, closed))

    def to_svg(
        self,
        path: str | os.PathLike | None = None,
        max_boxes: int = 16,
        *,
        open: Choice = None,
        closed: Choice = None,
    ) -> str:
        """The picture as an SVG, drawn as in CS231n, lecture 4.

        The circuit runs from left to right; on each wire stands the value above in green and
        the gradient below in red: numbers for scalars, for arrays the shape, the range of the
        values and the norm of the gradient. Many values that go the same way are one wire.
        What is too large for Graphviz (some hundred boxes) is laid out in rows, in time that
        grows with the number of boxes; frames around open groups are left out there.

        Args:
            path: where to write it too, a file `.svg`. It is written whole or not at all.
            max_boxes, open, closed: see `to_dot`.

        Raises:
            ImportError: pygraphviz isn't installed.
            FileNotFoundError: the folder of `path` doesn't exist.
            IsADirectoryError: `path` is a folder.
            TypeError, ValueError: the path is none of an SVG, or see `to_dot`.
        """
        target = None if path is None else draw.checked_path(path)
        svg = draw.svg(self._picture("graph.to_svg", max_boxes, open, closed))
        if target is not None:
            draw.write(target, svg)
        return svg

    def _picture(self, where: str, max_boxes: int, open: Choice, closed: Choice) -> Picture:
        top = groups(self.nodes, max_boxes, open, closed, where)
        return Picture(self.name, self.nodes, self.outputs, self.contributions(), top)

    def _repr_svg_(self) -> str | None:
        """For notebooks; without pygraphviz they show the text."""
        try:
            return self.to_svg()
        except ImportError:
            return None


# ------------------------------------------------------------------------- from program to nodes


def _nodes(flat: Program, input_labels, output_labels) -> dict[int, Node]:
    """A node for each value of the program, by the value's place there."""
    inexact = [i for i in flat.inputs if is_inexact(flat.avals[i])]
    active = flat.dependents(inexact, inexact=True)
    used = {i for equation in flat.equations for i in equation.ins} | set(flat.outputs)
    names = names_in_source(flat)
    for place, label in zip(flat.outputs, output_labels, strict=False):
        names.setdefault(place, label)
    around = _calls_around(flat)
    by_place: dict[int, Node] = {}
    taken = dict.fromkeys(input_labels, 1)

    def add(place, label, operation, inputs=(), equation=None, result=None, number=None):
        aval = flat.avals[place]
        by_place[place] = Node(
            number,
            label,
            operation,
            tuple(inputs),
            tuple(getattr(aval, "shape", ())),
            getattr(aval, "dtype", None),
            differentiable=place in active,
            equation=equation,
            result=result,
            inlined=around.get(id(equation), ()),
            bodies=_bodies if equation is not None and equation.name in _HOLDS_GRAPHS else None,
        )

    for number, (place, label) in enumerate(zip(flat.inputs, input_labels, strict=True)):
        add(place, label, "input", number=number)
    for place, constant in flat.constants.items():
        add(place, constant_label(constant, flat.avals[place]), "constant")
        by_place[place].value = as_value(constant)
    number = len(flat.inputs)
    for equation in flat.equations:
        inputs = [by_place[i] for i in equation.ins]
        several = len(equation.outs) > 1
        for result, place in enumerate(equation.outs):
            if several and place not in used:
                continue
            label = unique(names.get(place, f"v{number}"), taken)
            add(
                place,
                label,
                operation_name(equation),
                inputs,
                equation,
                result if several else None,
                number,
            )
            number += 1
    return by_place


def _calls_around(flat: Program) -> dict[int, list[Inlined]]:
    """For each equation (by its id) the calls of jitted functions that it stands in."""
    found: dict[int, list[Inlined]] = {}
    waiting = list(flat.calls)
    while waiting:  # outer calls come before those inside them
        call = waiting.pop()
        for equation in flat.equations[call.start : call.stop]:
            found.setdefault(id(equation), []).append(call)
        waiting += call.calls
    return found


_HOLDS_GRAPHS = ("scan", "cond", "while", "checkpoint", "remat2", "jit", "pjit", "shard_map")


def _bodies(node: Node) -> dict[str, Graph]:
    """The graphs of the functions that a node's operation holds, by their role."""
    assert node.equation is not None
    return {
        role: Graph(program(body), body_name(role, body), body_labels(node, role, body))
        for role, body in inner_jaxprs(node.equation).items()
    }


def _row(node: Node) -> tuple[str, ...]:
    operation = node.operation if node.equation is not None else ""
    if node.result is not None:
        operation += f"[{node.result}]"
    return (
        str(node.number),
        text.shortened(node.label, 60),
        text.shortened(operation),
        text.listed([n.label for n in node.inputs], most=3, width=20),
        text.shape(node.shape),
        str(node.dtype),
        text.value(node.value),
        text.gradient(node.gradient),
        node.source,
    )
