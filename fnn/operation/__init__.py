"""`fnn.rule`: an operation with a hand-written backward rule, valid under every JAX transform.

What a person writes is what the lecture teaches, a forward and a backward side by side:

    @fnn.rule
    def sigmoid(x):
        return jax.nn.sigmoid(x)

    @sigmoid.forward            # the value, and what the backward needs (the residuals)
    def _(x):
        y = jax.nn.sigmoid(x)
        return y, y

    @sigmoid.backward           # local gradient times upstream gradient
    def _(y, g):
        return (g * y * (1 - y),)

Everything else follows from these two:

* The operation is a JAX primitive of its own. A jaxpr shows one `sigmoid`, not its insides.
* Its derivative (JVP) runs `forward` and emits one *linear* primitive on the residuals and
  the tangents. The transpose of that primitive is the hand-written `backward`; its own
  action, the tangent map, is the transpose of `backward`, so that forward mode needs only
  the residuals too. (`op.tangent` replaces it where `backward` can't be transposed.)
* The linear primitive's derivative is itself on the tangents' tangents, plus the derivative
  of the tangent map with respect to the residuals. Hence second, third, ... derivatives.
* `vmap` of an operation is the same operation over the vmapped forward and backward. A
  residual that doesn't depend on the batch (a weight, say) stays unbatched.

Each module imports only from those above it:

    form            the functions that a person writes (`Rule`), and what each must take
    call            a call of an operation (`Call`), and a call under vmap (`MappedCall`)
    linearity       is a traced function linear? Read off its jaxpr
    well_formed     what is refused and why: arguments, and rules that don't fit
    outer_products  a sum of outer products as one matrix product
    linear_map      the derivative of a call (`LinearMap`), and under vmap (`MappedLinearMap`)
    experimental    what jax.experimental's `jet` and `checkify` must know
    primitive       the two primitives, and all that JAX must know of them
    twins           a JAX primitive a second time, computed otherwise on some platforms
    decorator       `rule`, and the `Operation` that it makes
"""

from fnn.operation.call import Call, MappedCall, call_of, mapped_results, operation_name
from fnn.operation.decorator import Operation, compiled_rule, rule
from fnn.operation.form import RuleError
from fnn.operation.linear_map import LinearMap, MappedLinearMap, linear_map_of, linearize
from fnn.operation.primitive import new_primitive
from fnn.operation.twins import bind_twin, twin

__all__ = [
    "Call",
    "LinearMap",
    "MappedCall",
    "MappedLinearMap",
    "Operation",
    "RuleError",
    "bind_twin",
    "call_of",
    "compiled_rule",
    "linear_map_of",
    "linearize",
    "mapped_results",
    "new_primitive",
    "operation_name",
    "rule",
    "twin",
]
