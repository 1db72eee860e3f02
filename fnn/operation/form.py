"""The form of a rule: the functions that a person writes for one operation, and what each takes."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fnn import arguments
from fnn.jaxpr import empty_jaxpr


class RuleError(TypeError):
    """A hand-written rule doesn't fit its operation: the message says which, where and how."""


class Rule:
    """The functions of an operation, without the means to call it.

    This is what jaxprs hold. JAX keeps the jaxpr of `jax.jit(op)` for as long as `op`, the
    `Operation`, is there: so no jaxpr may hold `op` itself.

    Attributes:
        name: the definition's name; JAX prints the operation under it.
        definition: the plain function.
        signature: the definition's.
        forward, backward, tangent, look, vmapped: the functions registered under these names, or
            None. What they take and return stands at the methods of `Operation` that register them.
        compiled: whether a call outside jit is compiled, and its traced backward kept. It is so for
            the rules of `fnn.ops`, which depend on nothing that can change. Other rules run in
            Python then, as JAX's functions do, and see what their closures and static arguments
            hold.
        version: how many functions have been registered. In a notebook a rule may be rewritten.
        memory: what tracing the functions showed (see `remembered`).
    """

    def __init__(self, definition: Callable, primitive: Any, compiled: bool):
        self.name = arguments.name_of(definition)
        self.definition = definition
        self.signature = _signature_of("rule: definition", definition)
        self.forward: Callable | None = None
        self.backward: Callable | None = None
        self.tangent: Callable | None = None
        self.look: Callable | None = None
        self.vmapped: Callable | None = None
        self.compiled = compiled
        self.version = 0
        self.memory: dict = {}
        self._primitive = primitive
        self._keeper: Callable = lambda: None

    def register(self, role: str, function: Callable, positional: Sequence[str]) -> Callable:
        """Set `forward`, `backward`, ... to a function that takes these arguments.

        Raises:
            RuleError: it doesn't take them, and the definition's static keywords.
        """
        where = f"{self.name}.{role}"
        arguments.function(where, "the rule", function)
        signature = _signature_of(f"{where}: the rule", function)
        keywords = [p.name for p in self.signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        try:
            signature.bind(*positional, **dict.fromkeys(keywords))
        except TypeError as error:
            wanted = ", ".join((*positional, *(["*", *keywords] if keywords else [])))
            raise RuleError(
                f"{where}: its signature must be ({wanted}), but it is {signature}: {error}."
            ) from None
        setattr(self, role, function)
        self.version += 1
        return function

    def shown(self) -> str:
        """How the operation is called, without types: `dropout(x, key, *, rate)`."""
        parameters = self.signature.parameters.values()
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        return f"{self.name}{inspect.Signature(bare)}"

    def positional(self) -> tuple[str, ...]:
        """The names of the definition's positional arguments, two for `*args`."""
        parameters = self.signature.parameters.values()
        gathers = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        named = [p.name for p in parameters if p.kind in arguments.POSITIONAL]
        return self.argument_names(len(named) + 2 * gathers)

    def argument_names(self, count: int) -> tuple[str, ...]:
        """The names of `count` positional arguments, numbered where `*args` gathers them."""
        names: list[str] = []
        for p in self.signature.parameters.values():
            if p.kind in arguments.POSITIONAL:
                names.append(p.name)
            elif p.kind is p.VAR_POSITIONAL:
                names += [f"{p.name}[{i}]" for i in range(count - len(names))]
        return tuple(names[:count])

    def bind(self, leaves: Sequence, call: Any) -> list:
        """The results of a call of this operation, as one equation where a jaxpr is made."""
        return self._primitive.bind(*leaves, call=call, keeper=self.keeper())

    def keeper(self) -> Any:
        """What keeps the rule for as long as an equation of it is in some jaxpr.

        JAX remembers what it passed to an abstract evaluation, but only jaxprs weakly. So a
        `Call` holds its rule weakly, and this, an empty jaxpr, holds it in `_KEPT`.
        """
        keeper = self._keeper()
        if keeper is None:
            keeper = empty_jaxpr()
            _KEPT[keeper] = self
            self._keeper = weakref.ref(keeper)
        return keeper


_KEPT: weakref.WeakKeyDictionary[Any, Rule] = weakref.WeakKeyDictionary()


def _signature_of(what: str, function) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        raise RuleError(
            f"{what} must be a function whose arguments Python can tell, but got "
            f"{arguments.show(function)}. Write a function around it."
        ) from None


def remembered(function: Callable) -> Callable:
    """Remember what tracing a rule showed: of the types of its arrays, and nothing of values.

    `function(subject, *types)` is traced anew only for a subject (a `Call`, a `LinearMap`, ...) or
    types that it wasn't called with before. What it returned is kept in the rule's memory, and goes
    with the rule. The cache key holds all that tracing depends on besides the arguments: the jaxpr
    that JAX's own cache holds for an empty function, which is another one wherever JAX itself would
    trace anew (64-bit mode, precision, promotion, mesh, named axes, ...).
    """

    @functools.wraps(function)
    def lookup(subject, *types):
        memory = subject.rule.memory
        cache_key = (function, subject, types, _context())
        found = memory.get(cache_key)
        if found is None:
            found = memory[cache_key] = function(subject, *types)
            while len(memory) > _REMEMBERED:  # another thread may be doing the same
                memory.pop(next(iter(memory)), None)
        return found

    return lookup


def _context() -> tuple:
    prng_impl = jax.config.jax_default_prng_impl  # type: ignore[attr-defined]
    return _EMPTY.trace().jaxpr, prng_impl


_EMPTY = jax.jit(lambda: None)
_REMEMBERED = 1024
