"""`fnn.graph`: a function, at given arguments, as a computational graph.

    g = graph(lambda x, y, z: (x + y) * z)(-2.0, 5.0, -4.0)
    g.backprop()
    print(g)                    every node with its value and its gradient
    g["x"].gradient             -4.0
    for step in g.steps():      ∂f/∂z = ∂f/∂f · ∂f/∂z = 1 · 3 = 3
        print(step)

The circuit diagrams of CS231n, lecture 4, for any JAX function: inputs on the left, then one
node for each operation. The forward pass fills in the values, backpropagation the gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy

from fnn import arguments, text
from fnn.backprop import draw, steps, sweep
from fnn.backprop.coverage import Coverage, coverage
from fnn.backprop.grouping import Choice, scope_name
from fnn.backprop.names import names_in_source
from fnn.backprop.primitives import rule_of
from fnn.jaxpr import (
    Equation,
    Program,
    called_function,
    inner_jaxprs,
    is_inexact,
    program,
    scan_layout,
    source_line,
    trace,
    user_frames,
    zeros,
)
from fnn.operation import call_of


def graph(fun: Callable) -> Callable[..., Graph]:
    """The computational graph of a function: `graph(f)(*args, **kwargs)`.

    The function is traced and evaluated operation by operation, so that each node holds its
    value. Calls of jitted functions are taken apart; an fnn operation and a `custom_jvp` or
    `custom_vjp` function are one node each; `scan`, `cond`, `while_loop` and `checkpoint` are
    nodes that hold the graph of their body. Computations that the result doesn't depend on
    are left out.

    Args:
        fun: a function of pytrees that returns a pytree of arrays.

    Returns:
        A function of the same arguments that returns the `Graph`. Arrays and numbers in the
        arguments become inputs of the graph, named `x`, `params['hidden']['W']`, ...; all
        else (strings, functions, bools) is handed to `fun` as it is. Arguments that are
        `jax.ShapeDtypeStruct`s give the graph without values.

    Raises:
        TypeError: `fun` is no function, or returns something that is no array.

    >>> g = graph(lambda x, y, z: (x + y) * z)(-2.0, 5.0, -4.0).backprop()  # CS231n, lecture 4
    >>> [float(node.gradient) for node in g.inputs]
    [-4.0, -4.0, 3.0]
    """
    arguments.function("graph", "fun", fun, "a function to trace")
    name = getattr(fun, "__name__", "f")
    name = name if name.isidentifier() else "f"

    @functools.wraps(fun, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def of_arguments(*args, **kwargs) -> Graph:
        for i, arg in enumerate(args):
            arguments.no_result("graph", f"argument {i}", arg)
        args, kwargs = _in_order(fun, args, kwargs)
        given, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
        leaves = [leaf for _, leaf in given]
        is_input = [_is_input(leaf) for leaf in leaves]
        labels = _argument_labels(fun, [path for path, _ in given])
        out_paths: list = []
        out_tree = None

        def of_arrays(*arrays):
            nonlocal out_tree
            rest = iter(arrays)
            filled = [next(rest) if i else x for i, x in zip(is_input, leaves, strict=True)]
            args, kwargs = jax.tree.unflatten(tree, filled)
            outs, out_tree = jax.tree_util.tree_flatten_with_path(fun(*args, **kwargs))
            out_paths[:] = [path for path, _ in outs]
            return [_checked_output(name + jax.tree_util.keystr(path), y) for path, y in outs]

        arrays = [_as_array(x) for i, x in zip(is_input, leaves, strict=True) if i]
        flat = program(trace(of_arrays, arrays))
        return Graph(
            flat,
            name,
            [label for i, label in zip(is_input, labels, strict=True) if i],
            [name + jax.tree_util.keystr(path) for path in out_paths],
            None if any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays) else arrays,
            out_tree,
        )

    return of_arguments


# ------------------------------------------------------------------------------------- the graph


@dataclasses.dataclass(eq=False)
class Node:
    """One value of the computation, and the operation that made it.

    Attributes:
        number: its place in the graph's order; an operation comes after its inputs. None for
            a constant (a literal or a closed-over array), which isn't in the list of nodes.
        label: what to call it: an argument's path (`x`, `params['hidden']['W']`), the variable
            that the source assigns it to, or `v7`.
        operation: the fnn operation, the `custom_jvp` function or the primitive; "input" or
            "constant" if there's none.
        result: which of the operation's results it is, None if it has only one.
        inputs: the nodes that the operation reads, constants included, in the order of its
            arguments.
        shape, dtype: the value's.
        value: an array; None in a graph without values.
        gradient: an array of the value's shape and dtype, None before `backprop` and where
            no gradient can reach (integers, and what doesn't depend on a differentiable input).
        differentiable: whether it's a real or complex array that depends on such an input.
    """

    number: int | None
    label: str
    operation: str
    inputs: tuple[Node, ...]
    shape: tuple[int, ...]
    dtype: Any
    value: Any = None
    gradient: Any = None
    differentiable: bool = False
    result: int | None = None
    equation: Equation | None = dataclasses.field(default=None, repr=False)

    def __repr__(self):
        kind = text.type_of(self.shape, self.dtype)
        made = f" = {self.operation}({text.listed([n.label for n in self.inputs])})"
        return f"<Node {self.label}: {kind}{made if self.equation else ''}>"

    @property
    def params(self) -> dict[str, Any]:
        """The operation's parameters, without the functions that it holds (see `graphs`)."""
        if self.equation is None:
            return {}
        call = call_of(self.equation)
        if call is not None:
            return dict(getattr(call, "static", ()))
        held = {role.split("[")[0] for role in inner_jaxprs(self.equation)}
        return {k: v for k, v in self.equation.params.items() if k not in held}

    @property
    def source(self) -> str:
        """`file.py:12 (function)`: the user's line that made it."""
        return "" if self.equation is None else source_line(self.equation.source_info)

    @property
    def scope(self) -> tuple[str, ...]:
        """The names of the jitted functions and `jax.named_scope`s that it stands in."""
        if self.equation is None:
            return ()
        return tuple(filter(None, map(scope_name, self.equation.scope)))

    @property
    def calls(self) -> tuple[tuple[str, str, int], ...]:
        """The user's stack, outermost first: (function, file, line) down to the line above."""
        if self.equation is None:
            return ()
        return _calls(self.equation)

    @functools.cached_property
    def graphs(self) -> dict[str, Graph]:
        """The graphs of the bodies of a scan, cond, while_loop or checkpoint, without values."""
        if self.equation is None or self.equation.name not in _HOLDS_GRAPHS:
            return {}
        return {
            role: Graph(program(body), _body_name(role, body), _body_labels(self, role, body))
            for role, body in inner_jaxprs(self.equation).items()
        }


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
        """What the function returned."""
        self._tape_with_values()
        return jax.tree.unflatten(self._out_tree, [n.value for n in self.outputs])

    def coverage(self) -> Coverage:
        """Which operations have a hand-written backward rule, and which fall back to JAX's.

        Counted are the operations that a gradient passes through, those inside loops and
        branches too.
        """
        active = [is_inexact(self.program.avals[i]) for i in self.program.inputs]
        return coverage(self.program, active, operation_name)

    # ------------------------------------------------------------------------- backpropagation

    def backprop(self, seed: Any = None) -> Graph:
        """Fill in every node's gradient, by the reverse sweep; returns the graph.

        Args:
            seed: the upstream gradient of the function's result, of the same structure and
                shapes; None in the place of an output means zero. May be left out for a
                result that's a single real scalar, whose gradient by itself is 1.

        The gradients are those of Σ seed · result. Where JAX's `vjp` would conjugate nothing
        for complex numbers, neither does this.

        Raises:
            ValueError: the seed's structure or a shape isn't the result's, or there is none
                and the result isn't a scalar.
            TypeError: no input or no output is a real or complex array, or a seed is no array.
        """
        tape = self._tape_with_values()
        self._must_be_differentiable()
        self._seeds = self._checked_seeds(seed)
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

        Runs `backprop()` first if that hasn't been done.
        """
        if self._visited is None:
            self.backprop()
        tape, visited = self._tape_with_values(), self._visited or []
        return steps.steps(tape, visited, self._seeds, self._by_place, self.of)

    @property
    def of(self) -> str:
        """What the gradients are of: `f` for one scalar output, else L = Σ seed · output."""
        is_scalar = len(self.outputs) == 1 and self.outputs[0].shape == ()
        return self.outputs[0].label if is_scalar else "L"

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
                raise TypeError(
                    f"backprop starts from a real number, but {self.name} returned "
                    f"{outputs[0].dtype}; give its upstream gradient as backprop(seed)."
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
        if not _is_input(leaf):
            raise TypeError(
                f"the seed of {output.label} must be an array, but is {arguments.show(leaf)}."
            )
        if jnp.shape(leaf) != output.shape:
            raise ValueError(
                f"the seed of {output.label} has shape {jnp.shape(leaf)}, but must have the "
                f"output's, {output.shape}."
            )
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
        return draw.to_dot(self, max_boxes, open, closed)

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
            TypeError, ValueError: the path is none of an SVG, or see `to_dot`.
        """
        target = None if path is None else _checked_path(path)
        svg = draw.to_svg(self, max_boxes, open, closed)
        if target is not None:
            _write(target, svg)
        return svg

    def _repr_svg_(self) -> str | None:
        """For notebooks; without pygraphviz they show the text."""
        try:
            return self.to_svg()
        except ImportError:
            return None


# ------------------------------------------------------------------------- from program to nodes

_HOLDS_GRAPHS = ("scan", "cond", "while", "checkpoint", "remat2", "jit", "pjit", "shard_map")


def operation_name(equation: Equation) -> str:
    """The fnn operation's name, a custom derivative's function's, or the primitive's."""
    call = call_of(equation)
    if call is not None:
        return call.operation.name
    return called_function(equation) or equation.name


def _nodes(flat: Program, input_labels, output_labels) -> dict[int, Node]:
    """A node for each value of the program, by the value's place there."""
    inexact = [i for i in flat.inputs if is_inexact(flat.avals[i])]
    active = flat.dependents(inexact, inexact=True)
    used = {i for equation in flat.equations for i in equation.ins} | set(flat.outputs)
    names = names_in_source(flat, operation_name)
    for place, label in zip(flat.outputs, output_labels, strict=False):
        names.setdefault(place, label)
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
        )

    for number, (place, label) in enumerate(zip(flat.inputs, input_labels, strict=True)):
        add(place, label, "input", number=number)
    for place, constant in flat.constants.items():
        add(place, _constant_label(constant, flat.avals[place]), "constant")
        by_place[place].value = _as_array(constant)
    number = len(flat.inputs)
    for equation in flat.equations:
        inputs = [by_place[i] for i in equation.ins]
        several = len(equation.outs) > 1
        for result, place in enumerate(equation.outs):
            if several and place not in used:
                continue
            label = _unique(names.get(place, f"v{number}"), taken)
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


def _unique(label: str, taken: dict[str, int]) -> str:
    """The label, with a subscript if it's taken: h, h₂, h₃ where a loop assigns to h again.

    taken: how often each label was asked for.
    """
    found, count = label, taken.get(label, 0)
    while found in taken:
        count += 1
        found = label + str(count).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
    taken[label] = max(count, 1)
    taken.setdefault(found, 1)
    return found


def _constant_label(constant, aval) -> str:
    if aval.shape == () and text.is_concrete(constant):
        return text.number(numpy.asarray(constant)[()])
    return text.type_of(aval.shape, aval.dtype)


def _calls(equation: Equation) -> tuple[tuple[str, str, int], ...]:
    frames = list(user_frames(equation.source_info, outermost=__file__))
    traceback = equation.source_info.traceback
    if traceback is None or all(f.file_name != __file__ for f in traceback.frames):
        frames = frames[:1]  # a jitted function that was traced before, somewhere else
    return tuple((f.function_name, f.file_name, f.line_num) for f in reversed(frames))


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


# ------------------------------------------------------------------------------ names and values


def _checked_path(path) -> str:
    """Where the picture goes; wrong paths are told before anything is drawn."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(f"graph.to_svg: path must be a path, but got {arguments.show(path)}.")
    target = os.fspath(path)
    if os.path.splitext(target)[1].lower() != ".svg":
        raise ValueError(f"graph.to_svg: path must end in .svg, but got {target!r}.")
    if os.path.isdir(target):
        raise IsADirectoryError(f"graph.to_svg: path is a folder: {target!r}.")
    folder = os.path.dirname(target) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"graph.to_svg: path must lie in a folder that exists, but there is no {folder!r}."
        )
    return target


def _write(path: str, content: str) -> None:
    """Write a file whole, or leave what was there."""
    path = os.path.realpath(path)  # a link stays a link
    handle, temporary = tempfile.mkstemp(
        dir=os.path.dirname(path), prefix=os.path.basename(path), suffix=".part"
    )
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(content)
        if os.path.exists(path):
            shutil.copymode(path, temporary)
        else:
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _is_input(leaf) -> bool:
    if isinstance(leaf, (bool, numpy.bool_)):
        return False
    arrays = (jax.Array, numpy.ndarray, numpy.generic, jax.ShapeDtypeStruct)
    return isinstance(leaf, (*arrays, int, float, complex))


def _as_array(x):
    return x if isinstance(x, (jax.Array, jax.ShapeDtypeStruct)) else jnp.asarray(x)


def _in_order(fun, args, kwargs) -> tuple[tuple, dict]:
    """The arguments in the order of the signature, however they were given."""
    try:
        bound = inspect.signature(fun).bind(*args, **kwargs)
    except (TypeError, ValueError):  # no signature; or the call is wrong, as `fun` will say
        return args, kwargs
    return bound.args, bound.kwargs


def _argument_labels(fun, paths) -> list[str]:
    """`x`, `params['hidden']['W']`, `rest[0]`: the path of each leaf of (args, kwargs)."""
    try:
        parameters = list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    by_position = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    gathers = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")

    def label(path):
        (which, key, *rest) = path
        if which.idx == 1:
            name = key.key
        elif key.idx < len(by_position):
            name = by_position[key.idx]
        else:
            name = f"{gathers}[{key.idx - len(by_position)}]"
        return name + jax.tree_util.keystr(tuple(rest))

    return [label(path) for path in paths]


def _checked_output(label, y):
    try:
        jax.typeof(y)
    except TypeError:
        raise TypeError(
            f"{label} is {y!r} of type {type(y).__name__}; a graph is of arrays, so return arrays."
        ) from None
    return y


def _body_name(role: str, body) -> str:
    """The user's function, or what it is of the loop: "body", "condition", "branch 1"."""
    name = (body.jaxpr.debug_info.func_name or "").split(".")[-1]
    if name.isidentifier():
        return name
    plain = {"cond_jaxpr": "condition", "body_jaxpr": "body", "jaxpr": "body"}
    return plain.get(role, role.replace("branches[", "branch ").rstrip("]"))


def _body_labels(node: Node, role: str, body) -> list[str]:
    """Names for a body's inputs: those from outside keep theirs; what a loop hands on is new."""
    count = len(body.in_avals)
    outside = [n.label for n in node.inputs]
    params = node.equation.params if node.equation is not None else {}
    if node.operation == "scan":
        consts, carried = scan_layout(params)
        outside = outside[:consts]
    elif node.operation == "while":
        before = params["cond_nconsts"] if role == "body_jaxpr" else 0
        consts = params["body_nconsts"] if role == "body_jaxpr" else params["cond_nconsts"]
        outside, carried = outside[before : before + consts], count - consts
    else:
        return outside[len(outside) - count :]
    carry = [f"carry[{i}]" for i in range(carried)]
    return [*outside, *carry, *(f"x[{i}]" for i in range(count - consts - carried))]
