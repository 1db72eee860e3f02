"""Gradient checking: a rule against autodiff, and both against finite differences.

`check_rule` checks an fnn operation, `check_grads` any differentiable JAX function, such as
one with a rule of its own under `jax.custom_vjp`. Both follow the notes of Stanford's CS231n
("Gradient checks", https://cs231n.github.io/neural-networks-3/): central differences in
float64, the relative error

    |a − n| / max(|a|, |n|)

of the analytic a and the numerical n, and care with kinks, where there is no derivative to
agree on: they are found and named, and all that is asked there is that each number of the rule lies
between the slopes on its two sides. What rounding explains, and how far the difference itself may
be off, is taken from |a − n| first: "≤ rounding" in a report says that nothing is left of it.

How it is done. All numbers of the arguments that can move become one vector x, all of the
result one vector y = f(x), and the checks are on

* the gradient of wᵀf with respect to x, for a random w: a number for every entry of the arguments;
* the tangent f′(x) v, for a random direction v: a number for every entry of the result;
* the product H v with the Hessian H of wᵀf, and the second tangent vᵀf″(x) v.

A random w makes every entry of the Jacobian count; a mistake anywhere shows, but for
coincidences of probability zero.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.check.checks import Inspection, Options
from fnn.check.derivatives import Programs
from fnn.check.directions import Flat, flatten
from fnn.check.point import DTYPES
from fnn.check.report import Check, GradientError, Kink, Report
from fnn.operation import Operation

__all__ = ["Check", "GradientError", "Kink", "Report", "check_grads", "check_rule"]


def check_rule(
    op: Operation,
    *args: Any,
    dtypes: Sequence[str] = DTYPES,
    order: int = 2,
    seed: int = 0,
    max_entries: int = 256,
    raise_on_error: bool = True,
    **static: Any,
) -> Report:
    """Check an operation's hand-written rule at these arguments.

    The rule is compared with JAX's derivative of the plain `op.definition` and with central
    differences of it in float64: reverse and forward mode, first and second order, with and
    without jit, under vmap with arguments mapped and shared, linearity in the upstream
    gradient, and in each of `dtypes` against float64. It doesn't matter whether 64-bit mode
    is on.

    Args:
        op: the operation, made by `fnn.rule`.
        *args: its positional arguments, pytrees of arrays of any shapes; floating-point and
            complex arrays move (they are cast to each dtype in turn), integers and PRNG keys
            stay.
        dtypes: the real dtypes to check; float64 is always checked. A dtype that the definition
            refuses is skipped.
        order: of the highest derivative, 1 or 2.
        seed: of the random projections.
        max_entries: with more entries than that, differences of single entries are taken for
            a random sample of that many (and always where rule and autodiff differ most); along a
            random direction, they cover all of them.
        raise_on_error: if False, return the report whatever it says.
        **static: the operation's static keyword arguments.

    Returns:
        A `Report`; print it.

    Raises:
        GradientError: a derivative is wrong; the message holds the worst entry's index and
            both numbers.
        RuleError: the rule isn't well-formed.
        TypeError: op is no operation, or the arguments aren't its own; one is traced, as inside
            `jit`.
        ValueError: no argument is a floating-point array.

    >>> import fnn
    >>> print(fnn.check_rule(fnn.ops.relu, jnp.array([-1.0, 0.0, 2.0])).kinks[0])
    kink at x[1]: slope 0 on the left, 1 on the right; the rule says 0
    """
    options = _options("check_rule", dtypes, order, seed, max_entries, raise_on_error)
    if not isinstance(op, Operation):
        raise TypeError(
            f"check_rule takes an operation made by fnn.rule, but got {op!r}. For any other "
            "function there is check_grads."
        )
    try:
        bound = inspect.signature(op.definition).bind(*args, **static)
    except TypeError as error:
        form = f"{op.name}{inspect.signature(op.definition)}"
        raise TypeError(f"check_rule: the arguments don't fit {form}: {error}.") from None
    bound.apply_defaults()
    _refuse_traced("check_rule", (args, static))
    names = op.argument_names(len(bound.args))
    keywords = tuple(bound.kwargs.items())
    given = arguments.array
    with _plain_settings():
        arrays = [
            jax.tree.map(lambda a, n=name: jnp.asarray(given("check_rule", n, a)), argument)
            for name, argument in zip(names, bound.args, strict=True)
        ]
        ours, leaves = flatten("check_rule", op, keywords, names, tuple(arrays))
        plain = dataclasses.replace(ours, function=op.definition)
        programs = _programs(op, ours, plain)
        report = Inspection(programs, op.name, leaves, options).report()
    return _finish(report, raise_on_error)


def _programs(op: Operation, ours: Flat, plain: Flat) -> Programs:
    """Compiled once for those of `fnn.ops`, which depend on nothing that can change.

    They refer to the operation. One that was made in a function would never go.
    """
    if not op.rule.compiled or not isinstance(op.__reduce__(), str):
        return Programs(ours, plain)
    kept: dict[Any, Programs] = vars(op).setdefault("_checks", {})
    key = ours, op.rule.version
    if key not in kept:
        while len(kept) >= 16:
            kept.pop(next(iter(kept)))
        kept[key] = Programs(ours, plain)
    return kept[key]


def check_grads(
    f: Callable,
    *args: Any,
    dtypes: Sequence[str] = ("float32", "float64"),
    order: int = 2,
    seed: int = 0,
    max_entries: int = 256,
    raise_on_error: bool = True,
) -> Report:
    """Check the derivatives that JAX finds for any function, at these arguments.

    For functions with derivative rules of their own (`jax.custom_vjp`, `jax.custom_jvp`, fnn
    operations) or built from such. They are compared with central differences in float64, and,
    if `f` itself is such a function, with JAX's derivative of what it decorates. A mode that
    JAX can't do (forward mode of a `custom_vjp`) is skipped, and the report says why.

    Args:
        f: any function that can be jitted and differentiated.
        *args: its arguments, pytrees. Floating-point and complex arrays (and Python floats)
            move; all else stays: integer arrays, PRNG keys, strings, Python integers, ...
        dtypes, order, seed, max_entries, raise_on_error: as for `check_rule`.

    Returns:
        A `Report`; print it.

    Raises:
        GradientError: a derivative is wrong; the message holds the worst entry's index and
            both numbers.
        TypeError: f is no function; an argument is traced, as inside `jit`.
        ValueError: no argument is a floating-point array.
    """
    options = _options("check_grads", dtypes, order, seed, max_entries, raise_on_error)
    arguments.function("check_grads", "f", f, "a function to differentiate")
    _refuse_traced("check_grads", args)
    static_places = tuple(getattr(f, "nondiff_argnums", ()) or ())
    names = _parameter_names(f, len(args))
    with _plain_settings():
        ours, leaves = flatten("check_grads", f, (), names, args, static_places)
        plain = None
        if isinstance(f, Operation):
            plain = dataclasses.replace(ours, function=f.definition)
        elif isinstance(f, (jax.custom_vjp, jax.custom_jvp)):
            plain = dataclasses.replace(ours, function=inspect.unwrap(f))
        name = arguments.name_of(f)
        report = Inspection(Programs(ours, plain), name, leaves, options).report()
    return _finish(report, raise_on_error)


def _options(where, dtypes, order, seed, max_entries, raise_on_error) -> Options:
    wanted = f"names out of {', '.join(DTYPES)}"
    if isinstance(dtypes, str) or not isinstance(dtypes, Collection):
        raise TypeError(
            f"{where}: dtypes must be a sequence of {wanted}, but got {arguments.show(dtypes)}."
        )
    names = []
    for dtype in dtypes:
        if not isinstance(dtype, str) and dtype is not None:  # jnp.float32, np.dtype("float32")
            with contextlib.suppress(TypeError):
                dtype = jnp.dtype(dtype).name
        names.append(arguments.choice(where, "each of dtypes", dtype, DTYPES))
    arguments.flag(where, "raise_on_error", raise_on_error)
    return Options(
        tuple(dict.fromkeys(names)),
        arguments.integer(where, "order", order, least=1, most=2),
        arguments.integer(where, "seed", seed, least=0),
        arguments.integer(where, "max_entries", max_entries, least=1),
    )


def _refuse_traced(where: str, tree: Any) -> None:
    for leaf in jax.tree.leaves(tree):
        if not arguments.is_known(leaf):
            raise TypeError(
                f"{where} needs numbers, but an argument is {arguments.show(leaf)}. Call it "
                "outside jit, grad and vmap, on arrays."
            )


@contextlib.contextmanager
def _plain_settings() -> Iterator[None]:
    """JAX as a check needs it, whatever its settings outside.

    Numbers are of 64 bits, also beside constants of 32. Differences reach over the edge of the
    domain, where nan is an answer, and evaluate a function of a key many times.
    """
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.debug_key_reuse(False),
    ):
        yield


def _finish(report: Report, raise_on_error: bool) -> Report:
    if raise_on_error and not report.ok:
        raise GradientError(report)
    return report


def _parameter_names(f, count) -> tuple[str, ...]:
    names = [p.name for p in arguments.positional(f) or ()][:count]
    return (*names, *(f"argument {i}" for i in range(len(names), count)))
