"""`find_nonfinite`: the birth of a nan or inf that was put there is found, no other is blamed."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn
from fnn import layers, ops
from fnn.birth import Birth

X = np.array([1.0, 2.0, 0.0, 4.0])
EXHAUSTIVE = pytest.mark.exhaustive


def line_of(function, text):
    """`file.py:12`, the line of a function's source that ends with a comment."""
    lines, first = inspect.getsourcelines(function)
    (place,) = [first + i for i, line in enumerate(lines) if line.endswith(f"# {text}\n")]
    return f"test_birth.py:{place} "


def born(function, *args, **options) -> Birth:
    found = fnn.find_nonfinite(function, *args, **options)
    assert found is not None
    assert str(found) == repr(found) and len(str(found).splitlines()) < 24
    return found


# ------------------------------------------------------------------------------- the forward pass


def logs(x):
    y = x * 2.0
    return jnp.log(y) + 1.0  # the log


@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "again"])
def test_an_operation(around):
    found = born(around(logs), X)
    assert (found.kind, found.place, found.operation) == ("-inf", "forward", "log")
    assert found.index == (2,) and found.shape == (4,) and found.dtype == np.float64
    assert found.source.startswith(line_of(logs, "the log")) and "jnp.log(y) + 1.0" in found.code
    assert found.inputs == ("0",) and found.loops == () and found.cause is None
    assert found.example == 2 and found.example_of == ("x",)
    assert fnn.find_nonfinite(around(logs), X + 1) is None


def test_in_vmap_the_example_is_found():
    def loss(w, x):
        return jnp.sum(jnp.sqrt(w * x))  # the root

    xs = np.abs(np.random.default_rng(0).normal(size=(5, 4))) + 0.1
    xs[3, 1] = -1.0
    found = born(jax.vmap(loss, (None, 0)), 2.0, xs)
    assert (found.kind, found.operation, found.example) == ("nan", "sqrt", 3)
    assert found.index == (3, 1) and found.example_of == ("xs",) or found.example_of
    assert found.source.startswith(line_of(loss, "the root"))
    # Mapped along another axis, within a scan, behind a mean: the place is as certain.
    found = born(lambda w, xs: jnp.mean(jax.jit(jax.vmap(loss, (None, 1)))(w, xs)), 2.0, xs.T)
    assert found.operation == "sqrt" and found.index in ((3, 1), (1, 3))


def test_a_number_that_overflows_and_the_nan_it_becomes():
    def f(x):
        e = jnp.exp(x)  # too large
        return e / jnp.sum(e)  # inf / inf

    found = born(f, np.array([1.0, 1000.0, 2.0]))
    assert (found.kind, found.operation, found.index) == ("nan", "div", (1,))
    assert found.inputs == ("inf", "inf") and found.source.startswith(line_of(f, "inf / inf"))
    cause = found.cause
    assert cause is not None and (cause.kind, cause.operation) == ("inf", "exp")
    assert cause.inputs == ("1000",) and cause.source.startswith(line_of(f, "too large"))


@pytest.mark.parametrize("reverse", [pytest.param(False, marks=EXHAUSTIVE), True])
def test_in_a_scan(reverse):
    def step(carry, x):
        carry = carry + jnp.log(x)  # in the loop
        return carry, carry * 2

    def f(start, xs):
        return jax.lax.scan(step, start, xs, reverse=reverse)

    xs = np.ones(7)
    xs[4] = -1.0
    found = born(jax.jit(f), 0.0, xs)
    assert (found.kind, found.operation, found.inputs) == ("nan", "log", ("-1",))
    (step_of,) = found.loops
    assert (step_of.kind, step_of.number, step_of.length) == ("scan", 4, 7)
    assert found.source.startswith(line_of(step, "in the loop"))
    # Of its stacked results alone; and mapped.
    found = born(jax.vmap(lambda xs: f(0.0, xs)[1]), np.stack([np.ones(7), xs, np.ones(7)]))
    assert found.loops[0].number == 4 and found.operation == "log" and found.example == 1


@EXHAUSTIVE
def test_in_loops_inside_loops_and_what_is_carried():
    def inner(c, x):
        return jnp.where(x < 0, jnp.inf, c * x), None  # inf

    def outer(c, row):
        c, _ = jax.lax.scan(inner, c, row)
        return c - c, c  # nan

    def f(rows):
        return jax.lax.scan(outer, 1.0, rows)[0]

    rows = np.ones((6, 5))
    rows[2, 3] = -1.0
    found = born(f, rows)
    assert (found.kind, found.operation) == ("nan", "sub")
    assert [s.number for s in found.loops] == [2]
    assert found.source.startswith(line_of(outer, "nan"))
    # Its inf comes of a literal, in the inner loop's step; it is told as far as it can be.
    assert found.cause is not None and found.cause.kind == "inf"


def test_in_while_loops():
    def body(state):
        i, x = state
        return i + 1, jnp.sqrt(x - 1.0)  # the root

    def f(x):
        return jax.lax.while_loop(lambda s: s[0] < 6, body, (0, x))[1]

    # 1.5 → 0.70… → nan: the second step.
    for function in (f, jax.jit(f)):
        found = born(function, 1.5)
        assert found.operation == "sqrt" and found.kind == "nan"
        assert found.loops[0][:3] == ("while", 1, 6)
    found = born(jax.vmap(f), np.array([1e40, 1.5, 1e41]))
    assert found.loops[0].number == 1 and found.index == (1,)
    found = born(lambda x: jax.lax.fori_loop(0, 5, lambda i, x: x / (3.0 - i), x), 1.0)
    assert (found.operation, found.inputs, found.loops[0].number) == ("div", found.inputs, 3)
    assert found.inputs[1] == "0"


@EXHAUSTIVE
def test_in_while_loops_whose_examples_take_different_numbers_of_steps():
    # Under vmap, an example that is done keeps its value.
    go = lambda s: s[1] > 1.0
    turn = lambda s: (s[0] + 1, s[1] / 2.0, jnp.log(s[1] - 8.0))
    several = jax.vmap(lambda x: jax.lax.while_loop(go, turn, (0, x, 0.0))[2])
    found = born(several, np.array([8.0, 32.0]))
    assert found.operation == "log"


def test_in_branches_and_rules_of_ones_own():
    @jax.custom_vjp
    def safe(x):
        return 1.0 / x  # in the rule

    safe.defvjp(lambda x: (safe(x), x), lambda x, g: (g,))

    def f(x):
        return jax.lax.cond(x.sum() > 0, lambda x: safe(x), lambda x: x, x)

    found = born(f, np.array([2.0, 0.0]))
    assert (found.operation, found.kind, found.index) == ("div", "inf", (1,))
    assert found.source.startswith(line_of(test_in_branches_and_rules_of_ones_own, "in the rule"))
    assert fnn.find_nonfinite(f, np.array([-2.0, 0.0])) is None


def test_operations_of_fnn_and_parts_of_networks():
    @layers.network(embed=layers.Linear(4), head=layers.chain(layers.Linear(3), jnp.sqrt))
    def net(net, x):
        return net.head(net.embed(x))

    x = jnp.ones(2)
    params = net.init(jax.random.key(0), x)
    params["head"]["0"]["b"] = jnp.array([5.0, -50.0, 5.0])
    params["head"]["0"]["W"] = params["head"]["0"]["W"] * 0
    found = born(net, params, x)
    assert found.operation == "sqrt" and found.part.startswith("head/") and found.index == (1,)
    found = born(lambda z: ops.softmax_cross_entropy(z, 0), np.array([-np.inf, 0.0]))
    assert found.place == "argument" or found.operation == "softmax_cross_entropy"


def test_what_is_infinite_for_a_good_reason_is_not_blamed():
    def attention(scores, mask, p):
        scores = jnp.where(mask, scores, -jnp.inf)  # on purpose
        weights = jax.nn.softmax(scores)
        largest = jax.lax.scan(lambda m, s: (jnp.maximum(m, s), None), -jnp.inf, scores[0])[0]
        return weights.sum() + largest + jnp.log(p)  # born here

    scores, mask = np.zeros((2, 3)), np.array([[True, False, True], [True, True, False]])
    assert fnn.find_nonfinite(attention, scores, mask, 1.0) is None
    found = born(attention, scores, mask, 0.0)
    assert found.operation == "log" and found.source.startswith(line_of(attention, "born here"))
    # A row that is all masked: the nan is born in the softmax, of the mask's −inf.
    found = born(attention, scores, mask & False, 1.0)
    assert found.kind == "nan" and found.operation == "sub" and found.inputs == ("-inf", "-inf")


def test_arguments_and_what_is_closed_over():
    found = born(lambda p, x: p["w"] @ x, {"w": np.ones((2, 3))}, np.array([1.0, np.nan, 2.0]))
    assert (found.place, found.operation, found.index) == ("argument", "x", (1,))
    closed = jnp.array([1.0, jnp.inf])
    found = born(lambda x: (x * closed).sum(), 2.0)
    assert (found.place, found.kind, found.index) == ("constant", "inf", (1,))
    found = born(lambda a, b: a + b, np.array([np.inf]), np.array([-np.inf]))
    assert (found.kind, found.operation) == ("nan", "add")
    assert found.cause is not None and found.cause.place == "argument"


def test_what_stands_beside_it_is_not_blamed():
    found = born(lambda x: (1.0 / x)[1:].sum(), np.array([np.inf, 0.0, 4.0]))
    assert (found.place, found.operation, found.index) == ("forward", "div", (1,))
    found = born(lambda x: jnp.sqrt(x)[1:].sum(), np.array([np.inf, -1.0, 4.0]))
    assert (found.operation, found.index, found.cause) == ("sqrt", (1,), None)
    found = born(lambda x: jnp.log(x)[1:].sum(), np.array([np.nan, 0.0, 4.0]))
    assert (found.operation, found.kind, found.index) == ("log", "-inf", (1,))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_outputs_through_one_array_the_earliest_birth(order):
    def f(x):
        early = jnp.log(x)
        late = jnp.sqrt(early - 1)
        both = early + late
        return [both[i] for i in order]

    found = born(f, jnp.array([-1.0, 1.0]))
    assert (found.operation, found.index) == ("log", (0,))


def test_sums_and_products_that_overflow():
    big = np.full(64, 1e308)
    found = born(jnp.sum, big)
    assert (found.operation, found.kind) == ("reduce_sum", "inf")
    found = born(lambda a, b: a @ b, big[None], big[:, None])
    assert found.operation == "dot_general"
    spoiled = np.ones((8, 64))
    spoiled[5, 17] = np.nan
    found = born(lambda a, b: jnp.tanh(a @ b).sum(), spoiled, np.ones((64, 3)))
    assert found.place == "argument" and found.index == (5, 17)


@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, *(pytest.param(d, marks=EXHAUSTIVE) for d in (jnp.float16, jnp.complex64))],
)
def test_dtypes(dtype):
    found = born(lambda x: jnp.log(x - 1), jnp.array([2.0, 1.0, 3.0], dtype))
    assert found.operation == "log" and found.index == (1,) and found.dtype == dtype
    largest = jnp.array([jnp.finfo(dtype).max], dtype)
    assert born(lambda x: x * 2, largest).kind == "inf"


# ------------------------------------------------------------------------------- the backward pass


def test_a_local_gradient_that_is_infinite():
    def f(x):
        return jnp.sqrt(x).sum()  # the root

    found = born(f, np.array([1.0, 0.0]))
    assert (found.place, found.operation, found.kind) == ("local gradient", "sqrt", "inf")
    assert found.index == (1,) and found.output == "the gradient of x"
    assert found.source.startswith(line_of(f, "the root"))
    assert fnn.find_nonfinite(f, np.array([1.0, 0.0]), gradient=False) is None
    assert fnn.find_nonfinite(lambda x: jnp.sqrt(x), np.array([0.0])) is None  # no scalar
    assert born(lambda x: jnp.sqrt(x), np.array([0.0]), gradient=True).operation == "sqrt"


def test_zero_times_infinity_where_a_branch_was_not_taken():
    def f(x):
        return jnp.where(x > 0, jnp.sqrt(x), 0.0).sum()  # the trap

    def g(x):
        return jnp.where(x > 1e3, 0.0, jnp.exp(x)).sum()  # the trap

    found = born(f, np.array([4.0, 0.0]))
    assert (found.place, found.operation, found.kind) == ("0 * inf", "sqrt", "nan")
    assert found.index == (1,) and found.source.startswith(line_of(f, "the trap"))
    found = born(g, np.array([1.0, 1e4]))
    assert (found.place, found.operation) == ("0 * inf", "exp")
    assert found.cause is not None and found.cause.operation == "exp"
    assert found.source.startswith(line_of(g, "the trap"))


@pytest.mark.parametrize("grad", [jax.grad, fnn.grad])
def test_gradients_that_are_functions_themselves(grad):
    def f(w, x):
        y = jnp.tanh(w * x)
        return jnp.sum(jnp.sqrt(y * y))  # root of 0

    found = born(jax.jit(grad(f)), 2.0, np.array([1.0, 0.0, 2.0]))
    assert found.kind == "nan" and found.place in ("0 * inf", "local gradient")
    assert found.source.startswith(line_of(f, "root of 0"))


def test_in_the_backward_pass_of_loops():
    def step(c, x):
        c = c + jnp.where(x > 0, jnp.sqrt(x), 0.0)  # the trap
        return c, None

    def f(w, xs):
        return jax.lax.scan(step, 0.0, xs * w)[0]

    xs = np.ones(5)
    xs[2] = 0.0
    found = born(f, 1.0, xs)
    assert (found.place, found.operation, found.kind) == ("0 * inf", "sqrt", "nan")
    assert found.loops[0].number == 2 and found.source.startswith(line_of(step, "the trap"))

    def counted(w):
        return jax.lax.fori_loop(0, 4, lambda i, x: jnp.sqrt(x) * w, 0.0)

    assert fnn.find_nonfinite(counted, 2.0, gradient=False) is None
    # The last step's root hands on inf, which meets a root of 0 in the step before.
    found = born(counted, 2.0)
    assert (found.place, found.operation, found.loops[0].number) == ("0 * inf", "mul", 2)
    cause = found.cause
    assert cause is not None and (cause.place, cause.operation) == ("local gradient", "sqrt")
    assert cause.loops[0].number == 3


@EXHAUSTIVE
def test_in_a_part_of_a_network():
    @layers.network(a=layers.Linear(3), norm=lambda x: x / jnp.sqrt(jnp.sum(x * x)))
    def net(net, x):
        return net.norm(net.a(x))

    def loss(params, x):
        y = net(params, x)
        return jnp.sum(jnp.where(jnp.isnan(y), 0.0, y))

    x = jnp.ones(2)
    params = jax.tree.map(jnp.zeros_like, net.init(jax.random.key(0), x))
    found = born(loss, params, x)
    assert found.part == "norm" and found.kind == "nan"
    assert found.place in ("0 * inf", "local gradient")


# ------------------------------------------------------------------------------------ what is asked


def test_jax_debug_nans_does_not_stand_in_the_way():
    with jax.debug_nans(True), jax.debug_infs(True):
        assert born(logs, X).operation == "log"
        assert jax.config.jax_debug_nans


def test_what_cannot_be_asked():
    with pytest.raises(TypeError, match="fun must be a function to run, but got 3"):
        fnn.find_nonfinite(3)
    with pytest.raises(TypeError, match="gradient must be True or False"):
        fnn.find_nonfinite(jnp.log, 1.0, gradient="yes")
    with pytest.raises(TypeError, match=r"outside jit.*find_nonfinite\(jax.jit\(f\), x\)"):
        jax.jit(lambda x: fnn.find_nonfinite(jnp.log, x) or x)(1.0)
    loop = lambda x: jax.lax.while_loop(lambda x: x < 3, lambda x: x * 2, x)
    assert fnn.find_nonfinite(loop, 1.0) is None
    with pytest.raises(ValueError, match="Reverse-mode"):
        fnn.find_nonfinite(loop, 1.0, gradient=True)


@EXHAUSTIVE
def test_keys_integers_and_effects(capfd):
    def f(key, n, x):
        jax.debug.print("x = {}", x)
        noise = jax.random.normal(key, (3,))
        return jnp.log(noise * 0 + x[n])

    found = born(f, jax.random.key(0), 1, np.array([1.0, 0.0]))
    assert found.operation == "log"


def test_the_text():
    found = born(functools.partial(logs), X)
    lines = str(found).splitlines()
    assert lines[0].startswith("A -inf was born by log, in the forward pass, and reached")
    assert any("entry" in line and "[2] of float64[4]" in line for line in lines)
    assert any("value" in line and "log(0) = -inf" in line for line in lines)


def test_a_product_of_matrices_shows_no_numbers_that_did_not_make_it():
    found = born(lambda A: (A @ A).sum(), np.array([[1.0, 1e200], [1e200, 1.0]]))
    assert found.operation == "dot_general" and all("[2, 2] of " in x for x in found.inputs)
