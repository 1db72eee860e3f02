"""What the nodes of a graph are called, where the source gives them no name (see `names`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy

from fnn import arguments, text
from fnn.backprop.node import Node
from fnn.jaxpr import scan_layout


def argument_labels(fun: Callable, paths: Sequence) -> list[str]:
    """`x`, `params['hidden']['W']`, `rest[0]`: the path of each leaf of (args, kwargs)."""
    parameters = arguments.parameters(fun) or []
    by_position = [p.name for p in parameters if p.kind in arguments.POSITIONAL]
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


def unique(label: str, taken: dict[str, int]) -> str:
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


def constant_label(constant: Any, aval: Any) -> str:
    """A constant by its value if it's one number, else by its type."""
    if aval.shape == () and text.is_concrete(constant):
        return text.number(numpy.asarray(constant)[()])
    return text.type_of(aval.shape, aval.dtype)


def body_name(role: str, body: Any) -> str:
    """The user's function, or what it is of the loop: "body", "condition", "branch 1"."""
    name = (body.jaxpr.debug_info.func_name or "").split(".")[-1]
    if name.isidentifier():
        return name
    plain = {"cond_jaxpr": "condition", "body_jaxpr": "body", "jaxpr": "body"}
    return plain.get(role, role.replace("branches[", "branch ").rstrip("]"))


def body_labels(node: Node, role: str, body: Any) -> list[str]:
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
