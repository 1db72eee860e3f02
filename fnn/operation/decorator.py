"""`fnn.rule`, the decorator, and the `Operation` that it makes."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import jax

from fnn import arguments
from fnn.meshes import same_varying_axes
from fnn.operation import well_formed
from fnn.operation.call import Call
from fnn.operation.form import Rule
from fnn.operation.primitive import primitive_of_operation


class Operation:
    """A function of arrays with a hand-written backward rule; made by `fnn.rule`.

    Positional arguments are pytrees of arrays (integer arrays and PRNG keys get no
    gradient); keyword-only arguments are static configuration and must be hashable.

    Attributes:
        name: the function's name; JAX prints the operation under it.
        definition: the undecorated function.
        rule: all functions of the operation, as they were registered.
    """

    def __init__(self, definition: Callable, compiled: bool = False):
        arguments.function("rule", "definition", definition, "a function of arrays")
        functools.update_wrapper(self, definition)
        self.name = arguments.name_of(definition)
        self.definition = definition
        self.rule = Rule(definition, primitive_of_operation(self.name), compiled)

    def __repr__(self):
        return f"<fnn operation {self.name}{self.rule.signature}>"

    def forward(self, function: Callable) -> Callable:
        """Register `function(*args, **static) -> (value, residuals)`; a decorator.

        The residuals, any pytree of arrays, are all that `backward` gets to see: keep as
        little as you can. Without a forward they are the positional arguments.

        Raises:
            RuleError: the function doesn't take the operation's own arguments.
        """
        return self.rule.register("forward", function, self.rule.positional())

    def backward(self, function: Callable) -> Callable:
        """Register `function(residuals, g, **static) -> (dx, ...)`; a decorator.

        It returns a tuple with one gradient for each positional argument, of the argument's
        structure, shapes and dtypes, or None where the gradient is zero, and is linear in
        `g`, the upstream gradient.

        Raises:
            RuleError: the function doesn't take (residuals, g) and the static keywords.
        """
        return self.rule.register("backward", function, ("residuals", "g"))

    def tangent(self, function: Callable) -> Callable:
        """Register `function(residuals, *dx, **static) -> dy`, the forward-mode rule; optional.

        Each dx has its argument's structure, with None in the place of integer arrays. dy has
        the value's structure, with None where it is zero or the value is an integer. Only
        needed where `backward` can't be transposed by JAX: where it holds a while loop, say.

        Raises:
            RuleError: the function doesn't take (residuals, dx, ...) and the static keywords.
        """
        dxs = (f"d{name}" for name in self.rule.positional())
        return self.rule.register("tangent", function, ("residuals", *dxs))

    def look(self, function: Callable) -> Callable:
        """Register `function(types, *args, **static)`, to look at values; optional, a decorator.

        It is called where a call stands, and where a vmapped call is computed: with the types of
        one example's arrays, and the arrays, which under vmap have more axes. Of what is traced
        it gets None. It raises a ValueError for values that the operation can't mean.

        Raises:
            RuleError: the function doesn't take the types and the operation's own arguments.
        """
        return self.rule.register("look", function, ("types", *self.rule.positional()))

    def vmapped(self, function: Callable) -> Callable:
        """Register `function(size, axes, *args, **static)`, a vmapped call as one call; optional.

        For an operation to which examples are but more of what it takes anyway: positions that
        share the weights. `axes` has the arguments' structure, with the mapped axis of each array,
        or None where the examples share it; `size` is the number of examples. It returns the values
        of all examples, along their first axes, or None where this call is to be mapped as usual.

        Raises:
            RuleError: the function doesn't take (size, axes) and the operation's own arguments.
        """
        return self.rule.register("vmapped", function, ("size", "axes", *self.rule.positional()))

    def argument_names(self, count: int) -> tuple[str, ...]:
        """The names of `count` positional arguments, numbered where `*args` gathers them."""
        return self.rule.argument_names(count)

    def __call__(self, *args, **kwargs):
        try:
            bound = self.rule.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}; it is {self.rule.shown()}.") from None
        bound.apply_defaults()
        leaves, in_tree = jax.tree.flatten(bound.args)
        static = well_formed.check_static(self.rule, bound.kwargs)
        well_formed.check_arrays(self.rule, leaves, len(bound.args))
        cache_key = self.rule.version, *(well_formed.kind(value) for _, value in static)
        call = Call(weakref.ref(self.rule), in_tree, static, cache_key)
        out_tree = well_formed.out_tree(call, [jax.typeof(x) for x in leaves])
        call.look(leaves)
        return jax.tree.unflatten(out_tree, self.rule.bind(same_varying_axes(leaves), call))

    def __copy__(self):
        return self  # copied like a function

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        """Pickled by name, like a function; or by its functions, if it has no name to find."""
        found: Any = sys.modules.get(self.__module__)
        for name in self.__qualname__.split("."):
            found = getattr(found, name, None)
        if found is self:
            return self.__qualname__
        rule = self.rule
        roles = rule.forward, rule.backward, rule.tangent, rule.look, rule.vmapped
        return _rebuilt, (self.definition, rule.compiled, *roles)


def _rebuilt(definition, compiled, forward, backward, tangent, look, vmapped) -> Operation:
    operation = Operation(definition, compiled)
    rule = operation.rule
    rule.forward, rule.backward, rule.tangent, rule.look = forward, backward, tangent, look
    rule.vmapped = vmapped
    return operation


def rule(definition: Callable) -> Operation:
    """Make a function of arrays an operation with a hand-written backward rule.

    Write the plain function under `@fnn.rule`, then `@op.forward` (optional: the value and
    the residuals), `@op.backward` (residuals and upstream gradient to the gradients of the
    arguments) and, seldom, `@op.tangent`. The operation works under jit, grad, jvp, vmap,
    jacfwd, jacrev, hessian, linearize, linear_transpose, checkpoint, scan, cond, shard_map
    and export, in any nesting, which `jax.custom_vjp` does not (it refuses forward mode).

    Args:
        definition: a function whose positional arguments are pytrees of arrays and whose
            keyword-only arguments are static configuration. It must be pure. A call outside
            jit runs it in Python, as any function of JAX: what it closes over may change
            between two calls, and value, gradient and tangent then all see the new one. (Only
            types are remembered: the shapes of results and residuals, and which arguments
            have a gradient.)

    Returns:
        The `Operation`, called like the function.

    Raises:
        RuleError: when the operation is differentiated and its backward is missing, returns
            the wrong number of gradients or a wrong shape or dtype, or isn't linear in the
            upstream gradient. The message names the operation, the argument and both shapes.

    >>> @rule
    ... def cube(x):
    ...     return x**3
    >>> @cube.backward
    ... def _(residuals, g):
    ...     (x,) = residuals
    ...     return (3 * x**2 * g,)
    >>> float(jax.grad(cube)(2.0)), float(jax.grad(jax.grad(cube))(2.0))
    (12.0, 12.0)
    """
    return Operation(definition)


# The rules of `fnn.ops`: pure, so that a call outside jit may be compiled.
compiled_rule = functools.partial(Operation, compiled=True)
