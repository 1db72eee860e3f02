"""What the scopes around an equation say: which part it is of, and whose gradient it computes."""

from __future__ import annotations

import re
from collections.abc import Sequence


def scope_name(raw: str) -> str:
    """A scope without the transforms around it: `encoder` of `vmap(encoder)`, "" of `vmap()`.

    The backward pass of a scope is told apart: `backward of encoder`.
    """
    is_backward = False
    while raw.endswith(")") and "(" in raw and raw.split("(", 1)[0].isidentifier():
        transform, raw = raw[:-1].split("(", 1)
        is_backward = is_backward or transform == "transpose"
    if is_backward:
        return f"backward of {raw}" if raw else "backward"
    return raw


def is_backward(scopes: Sequence[str]) -> bool:
    """Is it in a backward pass, JAX's or fnn's?"""
    return any("transpose(" in scope for scope in scopes)


def named_scopes(scopes: Sequence[str]) -> tuple[str, str]:
    """The part of the network, by its path; and the operation that it's of, or "".

    JAX's and fnn's own functions are no parts. The operation is the one whose forward or backward
    rule is computed there (see `Equation.origin`): `("encoder/attention", "softmax")`.
    """
    names, operation = [], ""
    for scope in scopes:
        found = re.search(r"\b(?:pullback|forward)\(([^()]*)\)", scope)
        if found is not None:
            operation = found[1]
            continue
        if "jit(" in scope:
            continue
        name = scope_name(scope).removeprefix("backward of ")
        if name and name != "backward":
            names.append(name)
    return "/".join(names), operation
