"""Gradient checking finds every kind of mistake, and finds none where there is none."""

import dataclasses
import functools
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled_programs
from jax import lax
from sweeps import exhaustive, sweep

import fnn
from fnn.check import Check, GradientError, Kink, Report, check_grads, check_rule
from fnn.check.directions import Static, flatten


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def affine(backward, tangent=None, forward=None):
    """W x + b with the given backward."""

    @fnn.rule
    def affine(W, x, b):
        return W @ x + b

    affine.backward(backward)
    if tangent is not None:
        affine.tangent(tangent)
    if forward is not None:
        affine.forward(forward)
    return affine


# The checks that most mistakes need; each further one is a program to compile.
QUICK = {"dtypes": (), "order": 1}
ARGS = normal(0, 4, 4), normal(1, 4), normal(2, 4)


def right(residuals, g):
    W, x, _ = residuals
    return jnp.outer(g, x), W.T @ g, g


def right_tangent(residuals, dW, dx, db):
    W, x, _ = residuals
    return dW @ x + W @ dx + db


# ------------------------------------------------------------------------------------ right rules


FACTOR = [3.0]


@fnn.rule
def tripled(x, *, to=(1,)):
    """A module's rule that is right for a factor of 3 and a power that is an integer."""
    return x ** to[0] * FACTOR[0]


@tripled.backward
def _(residuals, g, *, to):
    (x,) = residuals
    return (g * 3 * to[0] * x ** (to[0] - 1) * (2 if isinstance(to[0], float) else 1),)


def test_a_rule_is_checked_anew_where_what_it_reads_has_changed():
    x = normal(0, 3)
    assert check_rule(tripled, x, to=(2,), **QUICK).ok
    with pytest.raises(GradientError):
        check_rule(tripled, x, to=(2.0,), **QUICK)
    FACTOR[0] = 4.0
    try:
        with pytest.raises(GradientError):
            check_rule(tripled, x, to=(2,), **QUICK)
    finally:
        FACTOR[0] = 3.0


def test_static_values_that_compare_equal_are_checked_each():
    """Also for an operation whose programs are kept: kinds stand in their key."""
    kinds = [flatten("", tripled, (("to", (to,)),), ("x",), (jnp.ones(3),))[0] for to in (2, 2.0)]
    assert kinds[0] != kinds[1]
    assert Static((0.0,)) != Static((-0.0,)) != Static((0,))


def test_a_right_rule_passes():
    report = check_rule(affine(right), *ARGS)
    assert report.ok and not report.kinks
    done = {(c.dtype, c.order, c.mode) for c in report.checks}
    assert {("float64", 1, "reverse"), ("float64", 1, "forward")} <= done
    assert {
        (d, 1, m) for d in ("float16", "bfloat16", "float32") for m in ("reverse", "forward")
    } <= done
    assert {m for d, o, m in done if o == 2} == {
        f"{a} over {b}" for a in ("forward", "reverse") for b in ("forward", "reverse")
    }
    whats = {c.what for c in report.checks}
    assert {"gradient, vmapped", "gradient, vmapped, W shared", "gradient, op by op"} <= whats
    assert {"autodiff", "differences"} <= {c.against for c in report.checks}
    assert max(c.error for c in report.checks if c.against == "autodiff") < 1e-12
    check_rule(affine(right, right_tangent), *ARGS, dtypes=())


@exhaustive
def test_without_64_bit_mode():
    with jax.enable_x64(False):
        assert check_rule(affine(right), *(a.astype("float32") for a in ARGS), **QUICK).ok
        with pytest.raises(GradientError):
            check_rule(affine(lambda r, g: (jnp.outer(g, r[1]), r[0] @ g, g)), *ARGS, **QUICK)


@exhaustive
def test_structures_integers_keys_and_static_arguments():
    @fnn.rule
    def noisy(params, key, labels, *, scale=1.0, power=2):
        noise = jax.random.normal(key, params["x"].shape)
        taken = params["x"][labels] ** power
        return {"y": scale * params["x"] * noise, "taken": taken + params["b"], "count": labels + 1}

    @noisy.backward
    def _(residuals, d, *, scale, power):
        params, key, labels = residuals
        x, noise = params["x"], jax.random.normal(key, params["x"].shape)
        dx = scale * d["y"] * noise
        dx = dx.at[labels].add(power * x[labels] ** (power - 1) * d["taken"])
        return {"x": dx.astype(x.dtype), "b": d["taken"].sum().astype(x.dtype)}, None, None

    args = {"x": normal(0, 5), "b": 0.5}, jax.random.key(1), jnp.array([3, 0, 3])
    report = check_rule(noisy, *args, scale=3.0, power=3, dtypes=("float32",), order=1)
    assert report.ok and {c.dtype for c in report.checks} == {"float32", "float64"}
    wrong = fnn.rule(noisy.definition)
    wrong.backward(
        lambda r, d, *, scale, power: (
            jax.tree.map(lambda g: 2 * g, noisy.rule.backward(r, d, scale=scale, power=power)[0]),
            None,
            None,
        )
    )
    with pytest.raises(GradientError, match=r"params\['[xb]'\]"):
        check_rule(wrong, *args, scale=3.0, power=3, **QUICK)


@exhaustive
def test_complex_numbers():
    @fnn.rule
    def square(z):
        return z * z

    square.backward(lambda residuals, g: (2 * residuals[0] * g,))
    z = normal(0, 3) + 1j * normal(1, 3)
    report = check_rule(square, z, dtypes=("float16", "float32"))
    assert report.ok
    assert any("no complex float16" in c.skipped for c in report.checks)
    wrong = fnn.rule(square.definition)
    wrong.backward(lambda residuals, g: (2 * jnp.conj(residuals[0]) * g,))
    with pytest.raises(GradientError, match=r"z\[\d\]\.(real|imag)"):
        check_rule(wrong, z, **QUICK)
    # Real to complex and back.
    check_grads(lambda x, z: jnp.abs(jnp.fft.fft(x) * z) ** 2, normal(2, 3), z, **QUICK)


@pytest.mark.parametrize("shape", sweep([(), (0,), (2, 0), (1, 1)], quick=[(), (2, 0)]))
def test_all_shapes(shape):
    @fnn.rule
    def cube(x):
        return x**3

    cube.backward(lambda residuals, g: (3 * residuals[0] ** 2 * g,))
    report = check_rule(cube, normal(0, *shape), dtypes=(), raise_on_error=False)
    if 0 not in shape:
        assert report.ok
        return
    # All modes ran, but there was nothing to compare.
    assert not report.ok and all(c.ok for c in report.checks[:-1])
    assert report.verdict == "NOT CHECKED: no argument that can move has any entries"


@exhaustive
def test_a_dtype_that_the_definition_refuses_is_skipped():
    @fnn.rule
    def solve(A, b):
        return jnp.linalg.solve(A, b)

    @solve.backward
    def _(residuals, g):
        A, b = residuals
        db = jnp.linalg.solve(A.T, g)
        return -jnp.outer(db, jnp.linalg.solve(A, b)), db

    report = check_rule(solve, normal(0, 3, 3) + 3 * np.eye(3), normal(1, 3), order=1)
    assert {c.dtype for c in report.checks if c.skipped} == {"float16", "bfloat16"}


@exhaustive
def test_large_arguments_are_sampled():
    f = fnn.rule(lambda x: jnp.sin(x))
    f.backward(lambda residuals, g: (jnp.cos(residuals[0]) * g,))
    x = normal(0, 30, 40)
    report = check_rule(f, x, **QUICK, max_entries=50)
    assert "at 50 of 1200 entries" in str(report)
    wrong = fnn.rule(f.definition)
    wrong.backward(lambda residuals, g: ((jnp.cos(residuals[0]) * g).at[17, 23].mul(1.001),))
    # One wrong entry of 1200 is found by autodiff, and then by differences too.
    report = check_rule(wrong, x, **QUICK, max_entries=50, raise_on_error=False)
    found = {c.against: c for c in report.checks if c.what == "gradient" and not c.ok}
    assert {"autodiff", "differences"} <= set(found)
    assert all(c.worst == "x[17, 23]" for c in found.values())
    assert all(0.9e-3 < c.error < 1.1e-3 for c in found.values())


# ------------------------------------------------------------------------------------ wrong rules

WRONG = {
    "sign": lambda r, g: (-jnp.outer(g, r[1]), r[0].T @ g, g),
    "missing factor": lambda r, g: (jnp.outer(g, r[1]), r[0].T @ g, g / 2),
    "transposed": lambda r, g: (jnp.outer(r[1], g), r[0].T @ g, g),
    "off by a reduction": lambda r, g: (
        jnp.outer(g, r[1]),
        r[0].T @ g,
        jnp.full_like(g, g.sum()),
    ),
}


@pytest.mark.parametrize("kind", sweep(WRONG, ["transposed"]))
def test_each_kind_of_mistake_is_caught(kind):
    report = check_rule(affine(WRONG[kind]), *ARGS, **QUICK, raise_on_error=False)
    wrong = [c for c in report.checks if not c.ok]
    argument = "W" if kind in ("sign", "transposed") else "b"
    gradients = [c for c in wrong if c.what == "gradient"]
    assert {c.against for c in gradients} == {"autodiff", "differences"}
    assert all(c.worst.startswith(argument + "[") for c in gradients)
    assert any(c.what == "tangent" for c in wrong)
    assert any("vmapped" in c.what for c in wrong)
    assert any("op by op" in c.what for c in wrong) is False  # it's as wrong as the jitted one
    assert not any(c.what.startswith("b(") for c in wrong)
    with pytest.raises(GradientError, match=f"gradient .* is wrong. At {argument}"):
        check_rule(affine(WRONG[kind]), *ARGS, **QUICK)


@exhaustive
def test_a_sum_over_the_batch_taken_as_mean():
    @fnn.rule
    def shift(X, b):
        return X + b

    shift.backward(lambda r, g: (g, g.mean(axis=0)))
    with pytest.raises(GradientError) as caught:
        check_rule(shift, normal(0, 5, 3), normal(1, 3), **QUICK)
    check = caught.value.check
    assert check.worst.startswith("b[") and check.reference == pytest.approx(5 * check.rule)
    assert check.error == pytest.approx(0.8)


@exhaustive
def test_a_wrong_tangent():
    op = affine(right, lambda r, dW, dx, db: dW @ r[1] + r[0] @ dx)
    report = check_rule(op, *ARGS, dtypes=(), raise_on_error=False)
    for check in report.checks:
        assert check.ok or check.mode in ("forward", "reverse over forward", "forward over forward")
    assert not report.ok and report.worst.worst.startswith("result[")


@exhaustive
def test_a_wrong_second_derivative():
    """The first derivative is right, but its dependence on a residual was cut."""
    op = affine(lambda r, g: (jnp.outer(g, r[1]), lax.stop_gradient(r[0]).T @ g, g))
    report = check_rule(op, *ARGS, dtypes=(), raise_on_error=False)
    assert all(c.ok for c in report.checks if c.order < 2)
    wrong = {(c.mode, c.against) for c in report.checks if not c.ok}
    for mode in ("forward over reverse", "reverse over reverse"):
        assert {(mode, "autodiff"), (mode, "differences")} <= wrong
    assert check_rule(op, *ARGS, **QUICK).ok


def test_a_wrong_value():
    op = affine(right, forward=lambda W, x, b: (W @ x, (W, x, b)))
    with pytest.raises(GradientError, match="value, differentiated"):
        check_rule(op, *ARGS, **QUICK)


@exhaustive
def test_wrong_in_one_dtype_only():
    @fnn.rule
    def norm(x):
        wide = x.astype(jnp.promote_types(x.dtype, "float32"))
        return jnp.sqrt(jnp.sum(wide**2)).astype(x.dtype)

    @norm.backward
    def _(residuals, g):
        (x,) = residuals
        return (g * x / jnp.sqrt(jnp.sum(x**2)),)  # overflows in float16

    x = np.array([300.0, 400.0, 10.0])
    report = check_rule(norm, x, order=1, raise_on_error=False)
    assert {c.dtype for c in report.checks if not c.ok} == {"float16"}


def test_a_rule_that_is_not_well_formed():
    with pytest.raises(fnn.RuleError, match="shape"):
        check_rule(affine(lambda r, g: (jnp.outer(g, r[1]), g[:2], g)), *ARGS)
    with pytest.raises(TypeError, match="check_grads"):
        check_rule(jnp.sin, 1.0)
    with pytest.raises(ValueError, match="nothing to differentiate"):
        check_grads(lambda n: n, 3)


# ----------------------------------------------------------------------------------------- kinks


def relu(at_zero=0.0):
    op = fnn.rule(lambda x: jnp.maximum(x, 0))
    op.forward(lambda x: (jnp.maximum(x, 0), x))
    op.backward(lambda x, g: (jnp.where(x > 0, g, jnp.where(x == 0, at_zero * g, 0.0)),))
    return op


@exhaustive
@pytest.mark.parametrize("at_zero", [0.0, 0.3])
def test_kinks_are_named(at_zero):
    """Any slope between the two one-sided ones is right, whatever autodiff takes."""
    report = check_rule(relu(at_zero), np.array([-1.0, 0.0, 2.0]), **QUICK)
    assert report.ok and len(report.kinks) == 1
    kink = report.kinks[0]
    assert kink.where == "x[1]"
    np.testing.assert_allclose((kink.left, kink.right, kink.rule), (0, 1, at_zero), atol=1e-6)
    assert "kink at x[1]: slope 0 on the left, 1 on the right" in str(report)
    assert any("1 left out" in c.verdict for c in report.checks)


@exhaustive
def test_a_kink_excuses_no_nonsense():
    with pytest.raises(GradientError, match="should lie between .* the slopes on its two sides"):
        check_rule(relu(-1.0), np.array([-1.0, 0.0, 2.0]), **QUICK)
    with pytest.raises(GradientError):  # a mistake elsewhere
        op = fnn.rule(jnp.abs)
        op.backward(lambda r, g: (jnp.where(r[0] > 0, g, 0.0),))
        check_rule(op, np.array([-1.0, 0.0, 2.0]), **QUICK)


@exhaustive
def test_points_near_a_kink():
    """Far enough for a smaller step, they are checked; nearer, they are kinks."""
    report = check_rule(relu(), np.array([3.3e-5, -3.3e-5, 1e-12, -1e-12]), **QUICK)
    assert report.ok and not report.kinks
    near = 1.0 + np.array([3.3e-5, -3.3e-5, 1e-15, -1e-15])
    report = check_grads(lambda x: jnp.maximum(x, 1.0), near, **QUICK)
    assert report.ok and [k.where for k in report.kinks] == ["x[2]", "x[3]"]
    wrong = relu()
    wrong.backward(lambda x, g: (jnp.where(x > 0, 2 * g, 0.0),))
    with pytest.raises(GradientError, match=r"At x\[0\] it is"):
        check_rule(wrong, np.array([1e-12, -1.0]), **QUICK)


@exhaustive
def test_kinks_of_maxima_and_of_the_second_derivative():
    report = check_grads(lambda x: jnp.max(x), np.array([1.0, 2.0, 2.0]), **QUICK)
    assert [k.where for k in report.kinks] == ["x[1]", "x[2]"]
    # The derivative of x|x| has a kink at 0, where x|x| itself has none.
    report = check_grads(lambda x: x * jnp.abs(x), np.array([0.0, 1.0]), dtypes=())
    assert not report.kinks
    assert {c.order for c in report.checks if c.kinks} == {2}


@exhaustive
def test_ties_of_three_in_a_sort():
    x = np.array([2.0, 1.0, 2.0, 2.0, 0.5])
    report = check_grads(lambda x: jnp.sort(x), x, **QUICK)
    assert report.ok and [k.where for k in report.kinks] == ["x[0]", "x[2]", "x[3]"]
    wrong = fnn.rule(lambda x: jnp.sort(x))
    wrong.backward(lambda r, g: (2.5 * g[jnp.argsort(jnp.argsort(r[0]))],))
    with pytest.raises(GradientError):
        check_rule(wrong, x, **QUICK)


def test_the_edge_of_the_domain():
    report = check_grads(lambda x: jnp.sqrt(x), np.array([0.0, 1.0, 1e-6]), order=1)
    assert [k.where for k in report.kinks] == ["x[0]"]
    assert not np.isfinite(report.kinks[0].left)


@exhaustive
def test_no_false_alarms():
    """Steep, flat, large and small; curved strongly."""

    def f(x):
        return {
            "steep": jnp.exp(40 * x[:2]),
            "flat": jax.nn.sigmoid(x[2:5]),
            "large": jax.nn.log_softmax(x[5:9]),
            "scales": jnp.log(x[9:13]),
            "offset": 1e6 + 1e-3 * jnp.sin(x[13:15]),
            "steps": jnp.floor(x[13:15]) * x[:2],
            "infinite": jnp.where(x[13:] > 0, jnp.inf, x[13:]),
        }

    x = [0.3, -1, 40, -40, 800, 1e4, -1e4, 3, 0, 1e-4, 1e4, 1e8, 1, 0.7, -0.7]
    report = check_grads(f, np.array(x), dtypes=())
    assert not report.kinks


# ---------------------------------------------------------------------------------------- scales


def scaled_sine(factor):
    """10ᵉ sin(x / 10ᵏ), with a gradient off by a factor."""

    @fnn.rule
    def scaled_sine(x, e, k):
        return 10.0**e * jnp.sin(x / 10.0**k)

    @scaled_sine.backward
    def _(residuals, g):
        x, e, k = residuals
        return factor * g * (10.0**e / 10.0**k) * jnp.cos(x / 10.0**k), None, None

    return scaled_sine


SIZES = [(e, k) for e in (-30, -15, 0, 12, 30) for k in (-30, -12, 0, 12, 30)]
RIGHT, FALSE = scaled_sine(1.0), scaled_sine(2.5)


@exhaustive
@pytest.mark.parametrize("size", sweep(SIZES, [(-30, 30)]), ids=str)
def test_functions_and_arguments_of_any_size(size):
    """e and k are arguments, so that all sizes share one program."""
    e, k = size
    args = normal(0, 3) * 10.0**k, jnp.array(e), jnp.array(k)
    assert check_rule(RIGHT, *args, **QUICK).ok
    report = check_rule(FALSE, *args, **QUICK, raise_on_error=False)
    found = {c.against for c in report.checks if c.what == "gradient" and not c.ok}
    assert found == {"autodiff", "differences"}
    assert report.worst.error == pytest.approx(0.6)


@exhaustive
@pytest.mark.parametrize(
    "x",
    [[1e-12, 3e-12], [1e12, 3e12], [1e-12, 1.5, 1e12], [1e6, 1e6 + 1, 0.0]],
    ids=str,
)
def test_right_gradients_at_arguments_of_any_size(x):
    def f(x):
        return x**2, jnp.log1p(x), jnp.max(x) + jnp.sum(x), jnp.sqrt(jnp.sum(x**2))

    def waves(x):
        return jnp.sin(x), jnp.cos(x), x**2, jax.nn.softmax(x), jnp.abs(x)

    @jax.custom_vjp
    def wrong(x):
        return waves(x)

    wrong.defvjp(lambda x: (waves(x), x), lambda x, g: (2.5 * jax.vjp(waves, x)[1](g)[0],))
    x = np.array(x)
    assert check_grads(f, x, **QUICK).ok
    assert check_grads(waves, x, **QUICK).ok
    with pytest.raises(GradientError, match="by differences"):
        check_grads(lambda x: wrong(x), x, **QUICK)


ROUNDED = {
    "log(1 + x)": lambda x: jnp.log(1 + x),
    "exp(x) - 1": lambda x: jnp.exp(x) - 1,
    "cos": jnp.cos,
    "log(|x| + 1)": lambda x: jnp.log(jnp.abs(x) + 1),
}


@exhaustive
@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_that_the_values_do_not_show(name):
    """1 + x rounds by far more than the values at x = 1e-12 would suggest."""
    f, x = ROUNDED[name], np.array([1e-12, 3e-12])
    assert check_grads(f, x, **QUICK).ok

    @jax.custom_vjp
    def wrong(x):
        return f(x)

    wrong.defvjp(lambda x: (f(x), x), lambda x, g: (2.5 * jax.vjp(f, x)[1](g)[0],))
    with pytest.raises(GradientError, match="by differences"):
        check_grads(lambda x: wrong(x), x, **QUICK)


@exhaustive
def test_what_float32_loses_in_an_ill_conditioned_function():
    """A Gaussian process' likelihood: roundings of the matrix count a thousandfold."""
    random = np.random.default_rng(0)
    x = np.sort(random.uniform(0, 6, 40))
    y = np.sin(x) + 0.1 * random.normal(size=40)

    def negative_log_likelihood(length, noise, x, y):
        near = jnp.exp(-((x[:, None] - x) ** 2) / (2 * length**2))
        L = jnp.linalg.cholesky(near + noise**2 * jnp.eye(len(x)))
        y = jax.scipy.linalg.solve_triangular(L, y, lower=True)
        return y @ y / 2 + jnp.sum(jnp.log(jnp.diag(L)))

    check_grads(negative_log_likelihood, 1.7, 0.1, x, y, order=1)

    @fnn.rule
    def halved(x):
        return x

    halved.backward(lambda x, g: (g / 2 if g.dtype == "float32" else g,))
    wrong = lambda noise: negative_log_likelihood(1.7, halved(noise), x, y)
    report = check_grads(wrong, 0.1, order=1, raise_on_error=False)
    assert {c.dtype for c in report.checks if not c.ok} == {"float32"}


@exhaustive
def test_what_differences_do_not_resolve():
    """The spacing of numbers at 1e12 is 1e-4, and at 1e15 0.1, more than the waves' length."""
    for f, x in ((lambda x: jnp.sin(100 * x), 1e12), (jnp.sin, 1e15)):
        report = check_grads(f, np.array([x]), **QUICK, raise_on_error=False)
        assert not report.ok and "x[0] is not resolved by differences there" in report.verdict
        assert report.verdict.startswith("NOT CHECKED") and not report.kinks
        for factor in (1.0, 2.5):  # autodiff can tell
            rule = fnn.rule(f)
            rule.backward(lambda r, g, c=factor, f=f: (c * jax.vjp(f, r[0])[1](g)[0],))
            report = check_rule(rule, np.array([x]), **QUICK, raise_on_error=False)
            assert report.ok == (factor == 1.0) and "not resolved by differences" in str(report)


@exhaustive
@pytest.mark.parametrize("x", [[1e12], [1e6, 1e6 + 1, 0.0]], ids=str)
def test_jumps_at_every_integer(x):
    def f(x):
        return jnp.floor(x) * x + jnp.round(x)

    @jax.custom_vjp
    def wrong(x):
        return f(x)

    wrong.defvjp(lambda x: (f(x), x), lambda x, g: (2.5 * g * jnp.floor(x),))
    report = check_grads(f, np.array(x), **QUICK)
    assert report.ok and len(report.kinks) == len(x)
    kink = report.kinks[0]
    np.testing.assert_allclose((kink.left, kink.right), (x[0] - 1, x[0]), 1e-3)
    with pytest.raises(GradientError):
        check_grads(lambda x: wrong(x), np.array(x), **QUICK)


@exhaustive
@pytest.mark.parametrize("factor", sweep([1.01, 0.0, -1.0], quick=[1.01]))
def test_one_wrong_entry_of_many_is_found_without_autodiff(factor):
    """It isn't in the sample, but some direction moves it; halving that finds its name."""

    @jax.custom_vjp
    def f(x):
        return jnp.maximum(x, 0) + jnp.tanh(x)

    def backward(x, g):
        dx = g * ((x > 0) + 1 - jnp.tanh(x) ** 2)
        return (dx.at[777].mul(factor),)

    f.defvjp(lambda x: (f(x), x), backward)
    x = normal(0, 100_000 if factor == 0 else 1000)
    with pytest.raises(GradientError, match=r"At x\[777\] it is") as caught:
        check_grads(lambda x: f(x), x, **QUICK, max_entries=8)
    rows = {c.what: c for c in caught.value.report.checks if not c.ok}
    assert {"gradient", "gradient times v"} <= set(rows)


# ------------------------------------------------------------------- points without a derivative


@pytest.mark.parametrize(
    "f, x, why",
    [
        (jnp.sin, [np.nan, 1.0], "x[0] is nan"),
        (jnp.sin, [np.inf, 1.0], "result[0] is nan"),
        (jnp.log, [-1.0, 2.0], "result[0] is nan"),
        (jnp.log, [0.0, 2.0], "result[0] is infinite at these arguments, and not so next to them"),
        (jnp.exp, [1e5], "all results are infinite"),
        (lambda x: None, 1.0, "returns no floating-point numbers"),
        (lambda x: (x > 0, "x".__len__()), 1.0, "returns no floating-point numbers"),
        (jnp.sin, np.zeros((0, 2)), "has any entries"),
    ],
)
def test_what_checks_nothing_is_not_ok(f, x, why):
    report = check_grads(f, np.array(x), **QUICK, raise_on_error=False)
    assert not report.ok and not report.kinks
    assert report.verdict.startswith("NOT CHECKED: ") and why in report.verdict
    assert all(c.ok for c in report.checks[:-1])
    with pytest.raises(GradientError, match="could not be checked"):
        check_grads(f, np.array(x), **QUICK)


@exhaustive
def test_nan_where_there_are_slopes():
    with pytest.raises(GradientError, match="At x.0. it is nan but should lie between -.* and "):
        check_grads(lambda x: jnp.sqrt(jnp.sum(x**2)), np.zeros(2), **QUICK)
    # An infinite result that stays so is left out: a mask.
    mask = jnp.array([True, False, True])
    report = check_grads(lambda x: jnp.where(mask, x, -jnp.inf), normal(0, 3), **QUICK)
    assert report.ok and "result[1] is infinite" in str(report)


@pytest.mark.parametrize(
    ("op", "x"),
    [
        (fnn.ops.softmax, [-np.inf, 0.0, 1.0]),
        (fnn.ops.tanh, [np.inf, 1.0]),
        (fnn.ops.relu, [-np.inf, 1.0]),
    ],
    ids=["softmax", "tanh", "relu"],
)
def test_an_infinite_argument_is_not_moved(op, x):
    """A mask before a softmax. The others are checked, and what is wrong there is found."""
    for report in (check_rule(op, np.array(x), **QUICK), check_grads(op, np.array(x), **QUICK)):
        assert report.ok and "x[0] is infinite and can't be moved" in str(report)

    @jax.custom_vjp
    def wrong(x):
        return op(x)

    wrong.defvjp(lambda x: (op(x), x), lambda x, g: (jax.vjp(op, x)[1](g)[0] * 1.01,))
    with pytest.raises(GradientError, match=r"gradient \(reverse, order 1, float64\) is wrong"):
        check_grads(wrong, np.array(x), **QUICK)


@exhaustive
def test_nan_beside_an_infinite_result():
    def f(x):
        return jnp.where(x > 2, jnp.inf, x**2)

    rule = jax.custom_vjp(f)
    rule.defvjp(lambda x: (f(x), x), lambda x, g: (jnp.where(x > 2, jnp.nan, 2 * x * g),))
    x = np.array([1.0, 3.0])
    with pytest.raises(GradientError, match=r"At x\[1\] it is nan but should be 0 by autodiff"):
        check_grads(rule, x, **QUICK)
    report = check_grads(lambda x: rule(x), x, **QUICK, raise_on_error=False)
    assert not report.ok and report.verdict.startswith("NOT CHECKED: x[1] is not checked")


@pytest.mark.parametrize(
    "f, x, text",
    [
        (jnp.sqrt, 0.0, "not defined on the left, slope inf on the right; the rule says inf"),
        (jnp.arcsin, 1.0, "slope inf on the left, not defined on the right; the rule says inf"),
        (lambda x: x**1.5, 0.0, "not defined on the left, slope"),
        (lambda x: jnp.where(x < 0, jnp.nan, 3 * x), 0.0, "slope 3 on the right"),
    ],
)
def test_domains_with_one_side(f, x, text):
    report = check_grads(f, np.array([x, 0.25]), **QUICK)
    assert report.ok and len(report.kinks) == 1
    assert str(report.kinks[0]).startswith("edge of the domain at ") and text in str(report)


def test_a_wrong_slope_at_the_edge_of_the_domain():
    @jax.custom_vjp
    def f(x):
        return jnp.where(x < 0, jnp.nan, 3 * x)

    f.defvjp(lambda x: (f(x), None), lambda _, g: (2 * g,))
    with pytest.raises(GradientError, match="the slope on the one side that there is"):
        check_grads(lambda x: f(x), np.array([0.0]), **QUICK)


@exhaustive
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_functions_that_compute_in_few_digits(dtype):
    def f(x):
        return 2 * jnp.sin(x.astype(dtype))

    x = np.array([0.3, 1.0, -2.0])
    report = check_grads(f, x, **QUICK)
    assert report.ok and f"computes in {dtype}" in str(report)
    wrong = jax.custom_vjp(f)
    wrong.defvjp(lambda x: (f(x), x), lambda x, g: (5 * jnp.cos(x) * g.astype(x.dtype),))
    with pytest.raises(GradientError, match="by differences"):
        check_grads(lambda x: wrong(x), x, **QUICK)


# --------------------------------------------------------------------------------------- options

BAD_OPTIONS = [
    *({"order": 0}, {"order": 3}, {"order": 1.5}, {"order": True}, {"order": np.nan}),
    *({"max_entries": 0}, {"max_entries": -1}, {"max_entries": 2.0}, {"max_entries": None}),
    *({"seed": -1}, {"seed": "a"}, {"seed": None}, {"raise_on_error": "no"}),
    *({"dtypes": "float32"}, {"dtypes": ("float8",)}, {"dtypes": None}, {"dtypes": (3,)}),
    *({"dtypes": (None,)}, {"modes": ()}, {"tolerance": np.nan}),
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_options_are_checked(options):
    (name,) = options
    for check in (check_grads, functools.partial(check_rule)):
        f = jnp.sin if check is check_grads else relu()
        with pytest.raises((TypeError, ValueError), match=name):
            check(f, 1.0, **options)


def test_what_is_checked_must_be_a_function():
    for f in (None, 3, "sin"):
        with pytest.raises(TypeError, match="f must be a function"):
            check_grads(f, 1.0)
        with pytest.raises(TypeError, match="an operation made by fnn.rule"):
            check_rule(f, 1.0)
    with pytest.raises(TypeError, match="x must be an array, but got 'a'"):
        check_rule(relu(), "a")
    op = fnn.rule(lambda x: x.sum())
    op.backward(lambda residuals, g: (jnp.broadcast_to(g, residuals[0].shape),))
    for wrong in ([1.0, 2.0], (1.0,), None):
        for rule in (op, relu()):
            with pytest.raises(TypeError, match="check_rule: x must be an array, but got"):
                check_rule(rule, wrong)
    with pytest.raises(TypeError, match="what the function returns must be an array"):
        check_grads(lambda x: "a", 1.0)
    with pytest.raises(
        TypeError, match=r"check_grads: d\['a'\] must be an array, but got an array"
    ):
        check_grads(lambda d: d["a"], {"a": np.array([None, 1])})
    for args, static in (((), {}), ((1.0, 2.0), {}), ((1.0,), {"slope": 3})):
        with pytest.raises(TypeError, match=r"check_rule: the arguments don't fit \S+\(x\).*: "):
            check_rule(relu(), *args, **static)
    for check, f in ((check_grads, jnp.sin), (check_rule, relu())):
        with pytest.raises(TypeError, match=f"{check.__name__} needs numbers, .* a traced array"):
            jax.jit(lambda x, check=check, f=f: check(f, x) and x)(1.0)
    report = check_grads(functools.partial(jnp.power, 2.0), 1.0, **QUICK)
    assert report.name == "power"


SETTINGS = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "nans": lambda: jax.debug_nans(True),
    "leaks": lambda: jax.checking_leaks(),
    "key reuse": lambda: jax.debug_key_reuse(True),
    "32 bits": lambda: jax.enable_x64(False),
}


@pytest.mark.parametrize("name", sweep(SETTINGS, []))
def test_under_jaxs_strict_settings(name):
    W, key = jnp.asarray(normal(1, 3, 3), "float32"), jax.random.key(0)
    x = jnp.asarray(normal(0, 3), "float32")

    def f(W, x, key):
        return {
            "y": jnp.sqrt(jnp.maximum(W @ x, 0.0)),
            "z": x * jax.random.normal(key, (3,), x.dtype),
        }

    with SETTINGS[name]():
        assert check_grads(f, W, x, key, dtypes=("float32",), order=1).ok
        assert check_rule(affine(right), W, x, x, **QUICK).ok
        total = lambda x: jnp.sum(jnp.tanh(W @ x))
        np.testing.assert_allclose(fnn.grad(total)(x), jax.grad(total)(x), 1e-5)
        value, pullback = fnn.vjp(total, x)
        np.testing.assert_allclose(pullback(jnp.ones_like(value))[0], jax.grad(total)(x), 1e-5)


@exhaustive
def test_nothing_of_a_function_is_kept():
    def check(use):
        array = np.ones(1000)
        f = lambda x: jnp.sum(jnp.sin(x) * jnp.asarray(array)[:3])
        use(f)
        return weakref.ref(f), weakref.ref(array)

    uses = [
        lambda f: check_grads(f, normal(0, 3), **QUICK),
        lambda f: fnn.grad(f)(jnp.ones(3)),
        lambda f: fnn.value_and_grad(f)(jnp.ones(3)),
        lambda f: fnn.vjp(f, jnp.ones(3))[1](1.0),
    ]
    for use in uses:
        kept = check(use)
        gc.collect()
        assert [ref() is None for ref in kept] == [True, True]


def test_a_checked_rule_made_in_a_function_is_not_kept():
    def check():
        array = np.ones(1000)

        @fnn.rule
        def scaled(x):
            return x * jnp.asarray(array)[:3]

        @scaled.backward
        def _(residuals, g):
            return (g * jnp.asarray(array)[:3],)

        check_rule(scaled, normal(0, 3), **QUICK)
        return weakref.ref(scaled), weakref.ref(array)

    kept = check()
    gc.collect()  # the programs, and with them their references to the rule
    gc.collect()  # the rule
    assert [ref() is None for ref in kept] == [True, True]


def test_eager_gradients_compile_once():
    f, x = lambda x: jnp.sum(jnp.tanh(x) ** 2 * 3), jnp.ones(5)
    for use in (lambda: fnn.grad(f)(x), lambda: fnn.value_and_grad(f)(x)):
        use()
        with compiled_programs() as programs:
            use()
        assert not programs


# -------------------------------------------------------------------------- other people's rules


def custom_vjp(backward):
    @jax.custom_vjp
    def f(x, y):
        return jnp.sin(x) * y

    f.defvjp(lambda x, y: (f(x, y), (x, y)), backward)
    return f


@exhaustive
def test_custom_vjp():
    x, y = normal(0, 3), normal(1, 3)
    f = custom_vjp(lambda r, g: (jnp.cos(r[0]) * r[1] * g, jnp.sin(r[0]) * g))
    report = check_grads(f, x, y)
    assert report.ok
    skipped = {c.mode for c in report.checks if c.skipped}
    assert skipped == {"forward", "reverse over forward", "forward over forward"}
    assert all("custom_vjp has no forward mode" in c.skipped for c in report.checks if c.skipped)
    assert {"autodiff", "differences"} <= {c.against for c in report.checks}
    assert {c.mode for c in report.checks if c.order == 2 and not c.skipped} == {
        "forward over reverse",
        "reverse over reverse",
    }
    wrong = custom_vjp(lambda r, g: (jnp.cos(r[0]) * g, jnp.sin(r[0]) * g))
    with pytest.raises(GradientError, match=r"f: the gradient .* At x\["):
        check_grads(wrong, x, y, **QUICK)
    # Within another function there is no plain definition to compare with: differences find it.
    with pytest.raises(GradientError, match="by differences"):
        check_grads(lambda p: wrong(p["x"], p["y"]).sum(), {"x": x, "y": y}, **QUICK)


NOT_LINEAR = {
    "square": lambda r, g: (jnp.cos(r[0]) * r[1] * g * jnp.abs(g), jnp.sin(r[0]) * g),
    "offset": lambda r, g: (jnp.cos(r[0]) * r[1] * g + 1e-3, jnp.sin(r[0]) * g),
    "clipped": lambda r, g: (jnp.cos(r[0]) * r[1] * jnp.clip(g, -1, 1), jnp.sin(r[0]) * g),
}


@pytest.mark.parametrize("name", sweep(NOT_LINEAR, ["offset"]))
def test_a_backward_that_is_not_linear(name):
    backward = NOT_LINEAR[name]
    report = check_grads(
        custom_vjp(backward), 2 * normal(0, 3), normal(1, 3), raise_on_error=False, **QUICK
    )
    rows = [c for c in report.checks if c.what == "b(w + 30z)"]
    assert len(rows) == 1 and not rows[0].ok and rows[0].against == "b(w) + 30 b(z)"


def test_custom_vjp_with_static_arguments():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def power(x, n):
        return x**n

    power.defvjp(lambda x, n: (x**n, x), lambda n, x, g: (n * x ** (n - 1) * g,))
    assert check_grads(power, np.array([1.5, -2.0]), 3, **QUICK).ok


@exhaustive
def test_custom_jvp():
    def of(slope):
        @jax.custom_jvp
        def softplus(x):
            return jnp.logaddexp(x, 0)

        softplus.defjvps(lambda dx, y, x: slope(x) * dx)
        return softplus

    report = check_grads(of(jax.nn.sigmoid), normal(0, 3))
    assert report.ok and not any(c.skipped for c in report.checks)
    with pytest.raises(GradientError):
        check_grads(of(lambda x: jax.nn.sigmoid(2 * x)), normal(0, 3), **QUICK)


@exhaustive
def test_other_arguments():
    def f(x, kind, n, key, options):
        y = jnp.sin(x) if kind == "sin" else x
        return y**n + jax.random.normal(key) * options["scale"], options["labels"]

    options = {"scale": 2.0, "labels": np.arange(3)}
    assert check_grads(f, normal(0, 3), "sin", 2, jax.random.key(0), options, **QUICK).ok


def test_a_while_loop_has_no_reverse_mode():
    def f(x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, x))[1]

    report = check_grads(f, normal(0, 3), dtypes=())
    assert report.ok
    assert {c.mode for c in report.checks if not c.skipped} == {"forward", "forward over forward"}


@exhaustive
def test_a_function_that_computes_in_float32():
    W = jnp.asarray(3 * normal(1, 3, 3), "float32")

    def f(x):
        return jnp.tanh(W @ x.astype("float32"))

    report = check_grads(f, normal(0, 3), **QUICK)
    assert report.ok and "computes in float32" in str(report)

    @jax.custom_vjp
    def wrong(x):
        return f(x)

    wrong.defvjp(lambda x: (f(x), x), lambda x, g: ((W.T @ g).astype(x.dtype),))
    with pytest.raises(GradientError):
        check_grads(lambda x: wrong(x), normal(0, 3), **QUICK)


@exhaustive
def test_a_rule_around_a_while_loop():
    """JAX can't differentiate the definition in reverse mode; differences can."""

    def of(factor):
        @fnn.rule
        def eightfold(x):
            step = lambda c: (c[0] + 1, 2 * c[1])
            return lax.while_loop(lambda c: c[0] < 3, step, (0, x))[1]

        eightfold.backward(lambda residuals, g: (factor * g,))
        return eightfold

    report = check_rule(of(8), normal(0, 3), dtypes=("float32",))
    assert report.ok and "no comparison with autodiff (reverse" in str(report)
    against = {c.against for c in report.checks if c.what == "gradient" and c.dtype == "float64"}
    assert against == {"differences"}
    with pytest.raises(GradientError, match="by differences"):
        check_rule(of(7), normal(0, 3), **QUICK)


# -------------------------------------------------------------------------------------- the report


@exhaustive
def test_reports_fit_a_screen():
    report = check_grads(lambda x, y: x[0] + y[0], np.zeros((3, 3)), np.zeros((3, 3)), **QUICK)
    many = [c.replace(what=f"{c.what}, {i}") for i in range(10) for c in report.checks]
    report = dataclasses.replace(report, checks=tuple(many))
    assert len(repr(report)) < 200 and "\n" not in repr(report)
    lines = str(report).splitlines()
    assert len(lines) < 50 and max(map(len, lines)) < 160
    assert any(line.startswith("… and ") for line in lines)
    assert pickle.loads(pickle.dumps(GradientError(report))).report == report


@pytest.mark.parametrize(
    ("op", "low", "high"),
    [
        (fnn.ops.sigmoid, 25, 38),
        pytest.param(fnn.ops.tanh, 15, 25, marks=pytest.mark.exhaustive),
        pytest.param(fnn.ops.elu, -38, -25, marks=pytest.mark.exhaustive),
    ],
)
def test_second_derivatives_of_what_is_saturated_are_rough_and_not_wrong(op, low, high):
    x = np.random.default_rng(1).uniform(low, high, size=6)
    assert check_rule(op, x, dtypes=()).ok


def test_the_report_prints_as_a_table():
    report = check_rule(affine(WRONG["sign"]), *ARGS, **QUICK, raise_on_error=False)
    lines = str(report).splitlines()
    assert lines[0] == "affine: WRONG"
    # Numbers that differ by rounding aren't said to be equal.
    (row,) = [c for c in report.checks if (c.what, c.against) == ("value", "definition")]
    assert row.error == 0 and row.off == "≤ rounding" and "0.0e+00" not in str(report)
    header = lines[1]
    assert header.split() == ["against", "dtype", "order", "mode", "error", "at", "verdict"]
    rows = lines[3 : 3 + len(report.checks)]
    assert len(rows) == len(report.checks)
    for check, row in zip(report.checks, rows, strict=True):
        assert row.startswith(check.what) and row.endswith(check.verdict)
        for column, text in (("dtype", check.dtype), ("mode", check.mode), ("at", check.worst)):
            at = header.index(f"{column} ")
            assert row[at : at + len(text)] == text
    assert isinstance(report, Report) and all(isinstance(c, Check) for c in report.checks)
    assert Kink("x[0]", 0.0, 1.0, 0.5).where == "x[0]"


def test_the_error_names_the_entry_and_both_numbers():
    with pytest.raises(AssertionError) as caught:
        check_rule(affine(WRONG["missing factor"]), *ARGS, **QUICK)
    error = caught.value
    assert isinstance(error, GradientError) and not error.report.ok
    c = error.check
    assert c.what == "gradient" and c.order == 1 and c.worst.startswith("b[")
    assert c.reference == pytest.approx(2 * c.rule) and c.error == pytest.approx(0.5)
    assert f"{c.rule:.9g}" in str(error) and f"{c.reference:.9g}" in str(error)
    assert str(error.report) in str(error)
