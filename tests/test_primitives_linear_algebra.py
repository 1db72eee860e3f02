"""The hand-written rules of matmul, convolution, pooling, Fourier transforms and linear algebra.

Each is compared with `jax.vjp` of the same function for random upstream gradients; where JAX
has no gradient, or a doubtful one, with central differences or a plain definition.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from primitive_checks import check_cost, compare, jax_vjp, our_vjp, random_like
from sweeps import exhaustive, sweep

import fnn.backprop
from fnn.backprop.primitives import RULES, convolution, fourier, linear_algebra, matmul, pooling

# The functions around the primitives of these files need the other families' rules too.
OURS = matmul.RULES | convolution.RULES | pooling.RULES | fourier.RULES | linear_algebra.RULES

quick = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


# Most of a test's time is compilation; these small programs need no optimisation.
hasty = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def normal(*shape, dtype=jnp.float64, seed=0):
    (x,) = random_like(jax.ShapeDtypeStruct(shape, dtype), seed)
    return x


def check(fun, *args, primitive=None, tol=1e-10, second_order=False):
    """Compare our gradients of `fun` with `jax.vjp`'s, both in one program (it's quicker)."""
    assert primitive is None or (primitive in OURS and primitive in str(jax.make_jaxpr(fun)(*args)))
    gs = random_like(jax.eval_shape(fun, *args), 0)
    check_against(fun, fun, args, gs, tol)
    if second_order:
        chosen = [i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.inexact)]

        def gradients(vjp):
            def f(*args):
                found = vjp(fun, args, gs)
                return [jnp.zeros_like(args[i]) if found[i] is None else found[i] for i in chosen]

            return f

        bars = random_like([args[i] for i in chosen], 1)
        first, second = gradients(our_vjp), gradients(jax_vjp)
        ours, theirs = hasty(
            lambda args: (jax_vjp(first, args, bars), jax_vjp(second, args, bars))
        )(args)
        compare(ours, theirs, 100 * tol, "second order")


def check_against(fun, plain, args, gs, tol=1e-12):
    """Our gradient of `fun` is JAX's gradient of `plain`."""
    both = lambda args: (our_vjp(fun, args, gs, RULES), jax_vjp(plain, args, gs))
    ours, theirs = hasty(both)(args)
    for x, g in zip(args, ours, strict=True):
        assert g is None or (g.shape, g.dtype) == (x.shape, x.dtype)
    compare(ours, theirs, tol)


def check_by_differences(fun, *args, tol=1e-6):
    """⟨g, df⟩ by central differences along a random direction, for where JAX has no answer."""
    gs = random_like(jax.eval_shape(fun, *args), 0)
    directions = random_like(list(args), 7)
    h = 1e-6

    @hasty
    def both(args):
        gradients = our_vjp(fun, args, gs, RULES)
        shifted = lambda s: [a + s * h * d for a, d in zip(args, directions, strict=True)]
        ahead, behind = (jax.tree.leaves(fun(*shifted(s))) for s in (1, -1))
        changes = [(p - m) / (2 * h) for p, m in zip(ahead, behind, strict=True)]
        inner = lambda xs, ys: sum(
            jnp.sum(x * y).real for x, y in zip(xs, ys, strict=True) if x is not None
        )
        return inner(gradients, directions), inner(gs, changes)

    analytic, numeric = both(args)
    np.testing.assert_allclose(analytic, numeric, rtol=tol, atol=tol)


# ------------------------------------------------------------------------ products of matrices


@st.composite
def products(draw):
    """Shapes and dimension numbers of a dot_general, with axes in any order on both sides."""
    sizes = st.integers(0, 3)
    batch, contract, a_kept, b_kept = (draw(st.lists(sizes, max_size=2)) for _ in range(4))
    a_kinds = [("batch", i) for i in range(len(batch))]
    a_kinds += [("contract", i) for i in range(len(contract))]
    b_kinds = list(a_kinds) + [("kept", i) for i in range(len(b_kept))]
    a_kinds += [("kept", i) for i in range(len(a_kept))]
    a_order, b_order = draw(st.permutations(a_kinds)), draw(st.permutations(b_kinds))
    shape_of = lambda order, kept: tuple(
        {"batch": batch, "contract": contract, "kept": kept}[kind][i] for kind, i in order
    )
    places = lambda order, kind, n: tuple(order.index((kind, i)) for i in range(n))
    numbers = (
        (places(a_order, "contract", len(contract)), places(b_order, "contract", len(contract))),
        (places(a_order, "batch", len(batch)), places(b_order, "batch", len(batch))),
    )
    return shape_of(a_order, a_kept), shape_of(b_order, b_kept), numbers


@exhaustive
@quick
@given(products(), st.sampled_from([jnp.float64, jnp.complex128]))
def test_dot_general(shapes, dtype):
    a, b, numbers = shapes
    check(
        lambda a, b: lax.dot_general(a, b, numbers),
        normal(*a, dtype=dtype),
        normal(*b, dtype=dtype, seed=1),
        primitive="dot_general",
    )


def test_dot_general_second_order():
    check(
        lambda a, b: jnp.einsum("bij,bkj->bik", jnp.sin(a), b),
        normal(2, 3, 4),
        normal(2, 5, 4, seed=1),
        second_order=True,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dot_general_keeps_dtypes(dtype):
    """A wider output (preferred_element_type) still gives gradients of the arguments' dtypes."""
    a, b = normal(3, 4, dtype=dtype), normal(4, 5, dtype=dtype, seed=1)
    numbers = (((1,), (0,)), ((), ()))
    for wider in (None, jnp.float32):
        check(
            lambda a, b: lax.dot_general(a, b, numbers, preferred_element_type=wider),  # noqa: B023
            a,
            b,
            tol=0.0,
        )


@pytest.mark.parametrize(
    ("left", "right"),
    [(jnp.float64, jnp.complex128), (jnp.complex128, jnp.float64), (jnp.bfloat16, jnp.float32)],
)
def test_dot_general_of_two_dtypes(left, right):
    a, b = normal(3, 4, dtype=left), normal(4, 5, dtype=right, seed=1)
    check(lambda a, b: lax.dot_general(a, b, (((1,), (0,)), ((), ()))), a, b, tol=1e-6)


def test_dot_general_keeps_precision():
    """Two precisions and an algorithm arrive in the transposed product as JAX passes them on."""
    a, b = normal(3, 4, dtype=jnp.float32), normal(4, 5, dtype=jnp.float32, seed=1)

    def precisions(vjp, precision):
        product = lambda a, b: lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=precision)
        g = random_like(jax.eval_shape(product, a, b), 0)
        jaxpr = jax.make_jaxpr(lambda a, b: vjp(product, [a, b], g))(a, b)
        return [e.params["precision"] for e in jaxpr.eqns if e.primitive.name == "dot_general"]

    for precision in ((lax.Precision.HIGHEST, lax.Precision.DEFAULT), "F32_F32_F32"):
        ours = precisions(functools.partial(our_vjp, rules=RULES), precision)
        assert len(ours) == 3
        assert ours == precisions(jax_vjp, precision)


@pytest.mark.parametrize(
    "expression", ["ij,jk->ik", "oi,ni->no", "bhqd,bhkd->bhqk", "bqhd,bkhd->bhqk", "ij,j->i"]
)
def test_dot_general_compiles_to_the_same_program(expression):
    sizes = dict(zip("ijkonbhqd", (32, 48, 24, 16, 40, 3, 4, 20, 8), strict=True))
    a, b = (
        normal(*(sizes[axis] for axis in axes), dtype=jnp.float32)
        for axes in expression.split("->")[0].split(",")
    )
    check_cost(lambda a, b: jnp.einsum(expression, a, b), a, b, rules=RULES, slack=1.0)


def test_dot_general_on_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        a = jax.device_put(normal(4, 6), PartitionSpec("x", None))
        b = jax.device_put(normal(6, 8, seed=1), PartitionSpec(None, "y"))
        product = lambda a, b: a @ b
        g = jax.device_put(normal(4, 8, seed=2), PartitionSpec("x", "y"))
        ours = jax.jit(lambda a, b, g: our_vjp(product, [a, b], [g], RULES))(a, b, g)
        theirs = jax.jit(lambda a, b, g: jax_vjp(product, [a, b], [g]))(a, b, g)
        for mine, other in zip(ours, theirs, strict=True):
            assert jax.typeof(mine).sharding == jax.typeof(other).sharding
        compare(ours, theirs, 1e-12)


def ragged(a, b, sizes, numbers, ragged, group):
    return lax.ragged_dot_general(
        a,
        b,
        sizes,
        lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=numbers, lhs_ragged_dimensions=ragged, rhs_group_dimensions=group
        ),
    )


@pytest.mark.parametrize("sizes", [[2, 3, 2], [0, 5, 1], [7, 0, 0]])
def test_ragged_dot(sizes):
    sizes = jnp.array(sizes, jnp.int32)
    check(
        lambda a, b: lax.ragged_dot(a, b, sizes),
        normal(7, 4),
        normal(3, 4, 5, seed=1),
        primitive="ragged_dot_general",
    )


def test_ragged_dot_with_batch_and_axes_out_of_order():
    sizes = jnp.array([[2, 3], [4, 0]], jnp.int32)
    numbers = (((0, 3), (3, 2)), ((2,), (1,)))  # a: k, m, b, l    b: e, b, l, k, n
    a, b = normal(3, 5, 2, 4), normal(2, 2, 4, 3, 6, seed=1)
    check(lambda a, b: ragged(a, b, sizes, numbers, [1], [0]), a, b)


def test_ragged_dot_that_sums_in_groups():
    """JAX has no gradient here; compare with a sum over masks, group by group."""
    sizes = jnp.array([2, 0, 3], jnp.int32)
    ends = np.cumsum(sizes)
    numbers = (((2,), (1,)), ((0,), (0,)))  # a: b, m, k    b: b, k, n
    a, b = normal(2, 4, 6), normal(2, 6, 5, seed=1)

    def plain(a, b):
        masks = [
            ((np.arange(6) >= end - size) & (np.arange(6) < end)).astype(a.dtype)
            for end, size in zip(ends, sizes, strict=True)
        ]
        return jnp.stack([jnp.einsum("bmk,k,bkn->bmn", a, mask, b) for mask in masks])

    product = lambda a, b: ragged(a, b, sizes, numbers, [2], [])
    np.testing.assert_allclose(product(a, b), plain(a, b), atol=1e-12)
    g = random_like(jax.eval_shape(product, a, b), 0)
    check_against(product, plain, (a, b), g)


# --------------------------------------------------------------------------------- convolution


@st.composite
def convolutions(draw):
    """A convolution whose axes, strides, padding, dilations and groups are anything allowed."""
    space = draw(st.integers(0, 2))
    small = lambda low, high: st.tuples(*[st.integers(low, high)] * space)
    strides, base, holes = draw(small(1, 3)), draw(small(1, 3)), draw(small(1, 2))
    inputs, kernel = draw(small(2, 6)), draw(small(1, 3))
    padding = []
    for n, dilation in zip(inputs, base, strict=True):
        n = 1 + dilation * (n - 1)
        low = draw(st.integers(-min(2, n - 1), 3))
        padding.append((low, draw(st.integers(-min(2, n - 1 + min(low, 0)), 3))))
    groups, kind = draw(st.integers(1, 3)), draw(st.sampled_from(["feature", "batch"]))
    batch, features, outs = (draw(st.integers(1, 2)) for _ in range(3))
    outs *= groups
    x_features = features * groups if kind == "feature" else features
    batch = batch * groups if kind == "batch" else batch
    x_sizes = (batch, x_features, *inputs)
    w_sizes = (outs, features, *kernel)
    specs = [tuple(draw(st.permutations(range(space + 2)))) for _ in range(3)]
    place = lambda sizes, spec: tuple(sizes[spec.index(i)] for i in range(len(spec)))
    return (
        place(x_sizes, specs[0]),
        place(w_sizes, specs[1]),
        {
            "window_strides": strides,
            "padding": padding,
            "lhs_dilation": base,
            "rhs_dilation": holes,
            "dimension_numbers": lax.ConvDimensionNumbers(*specs),
            "feature_group_count": groups if kind == "feature" else 1,
            "batch_group_count": groups if kind == "batch" else 1,
        },
    )


@settings(quick, max_examples=40)
@given(convolutions())
def test_convolution(case):
    x, w, options = case
    check(
        lambda x, w: lax.conv_general_dilated(x, w, **options),
        normal(*x),
        normal(*w, seed=1),
        primitive="conv_general_dilated",
    )


NHWC = {"window_strides": (2, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def test_convolution_complex_and_second_order():
    for dtype in (jnp.float64, jnp.complex128):
        x, w = normal(2, 5, 6, 4, dtype=dtype), normal(3, 2, 2, 6, dtype=dtype, seed=1)
        check(
            lambda x, w: lax.conv_general_dilated(x, w, **NHWC, feature_group_count=2),
            x,
            w,
            second_order=True,
        )


def test_convolution_keeps_dtypes():
    x, w = normal(2, 5, 6, 3, dtype=jnp.bfloat16), normal(3, 3, 3, 4, dtype=jnp.bfloat16, seed=1)
    for wider in (None, jnp.float32):
        check(
            lambda x, w: lax.conv_general_dilated(x, w, **NHWC, preferred_element_type=wider),  # noqa: B023
            x,
            w,
            tol=0.0,
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_strides": (1, 1), "padding": "VALID"},
        {"feature_group_count": 4},
        {"rhs_dilation": (2, 2), "window_strides": (1, 1)},
        {"padding": ((-1, 2), (0, 0))},
    ],
)
def test_convolution_takes_no_more_work(options):
    options = NHWC | options
    groups = options.get("feature_group_count", 1)
    x = normal(4, 12, 12, 8, dtype=jnp.float32)
    w = normal(3, 3, 8 // groups, 16, dtype=jnp.float32)
    # On CPUs by other formulas: products with the padding's zeros are FLOPs too, for XLA those of
    # a convolution aren't; and there are patches, in blocks.
    fun, most = lambda x, w: lax.conv_general_dilated(x, w, **options), {"more_bytes": 2**21}
    check_cost(fun, x, w, rules=RULES, slack=1.15, **most)


def test_convolution_without_output():
    """An input smaller than the kernel: no output, and a gradient of zero."""
    check(
        lambda x, w: lax.conv_general_dilated(x, w, (1,), "VALID"), normal(1, 2, 2), normal(3, 2, 3)
    )


# ------------------------------------------------------------------------------------- windows


@st.composite
def window_options(draw):
    """A sliding window over a 2-D array."""
    pair = lambda low, high: st.tuples(*[st.integers(low, high)] * 2)
    padding = tuple(draw(pair(0, 2)) for _ in range(2))
    return draw(pair(3, 6)), {
        "window_dimensions": draw(pair(1, 3)),
        "window_strides": draw(pair(1, 3)),
        "padding": padding,
        "base_dilation": draw(pair(1, 2)),
        "window_dilation": draw(pair(1, 2)),
    }


@quick
@given(window_options())
def test_window_sum(case):
    shape, options = case
    check(
        lambda x: lax.reduce_window(x, 0.0, lax.add, **options),
        normal(*shape),
        primitive="reduce_window_sum",
    )


@exhaustive
@settings(quick, max_examples=15)
@given(window_options(), st.booleans())
def test_window_extremum(case, largest):
    shape, options = case
    options["window_dilation"] = (1, 1)
    worst, reducer = (-jnp.inf, lax.max) if largest else (jnp.inf, lax.min)
    check(
        lambda x: lax.reduce_window(x, worst, reducer, **options),
        normal(*shape),
        primitive="reduce_window_max" if largest else "reduce_window_min",
    )


@settings(quick, max_examples=7)
@given(window_options(), st.booleans())
def test_window_extremum_with_holes(case, largest):
    """JAX has no gradient for dilated windows; the same maximum over explicit slices has one."""
    shape, options = case
    worst, reducer = (-jnp.inf, lax.max) if largest else (jnp.inf, lax.min)
    pool = lambda x: lax.reduce_window(x, worst, reducer, **options)

    def plain(x):
        x = lax.pad(
            x,
            worst,
            [
                (lo, hi, d - 1)
                for (lo, hi), d in zip(options["padding"], options["base_dilation"], strict=True)
            ],
        )
        outs = jax.eval_shape(pool, normal(*shape)).shape
        slices = []
        for place in itertools.product(*map(range, options["window_dimensions"])):
            index = tuple(
                slice(i * d, i * d + s * (n - 1) + 1, s)
                for i, d, s, n in zip(
                    place, options["window_dilation"], options["window_strides"], outs, strict=True
                )
            )
            slices.append(x[index] if min(outs) else jnp.zeros(outs))
        return (jnp.max if largest else jnp.min)(jnp.stack(slices), 0)

    x = normal(*shape)
    # Windows that lie in the padding alone tie, harmlessly: their gradient falls on padding.
    g = random_like(jax.eval_shape(pool, x), 0)
    check_against(pool, plain, (x,), g)


def test_max_pool_gives_a_tie_to_its_first_entry():
    x = jnp.ones((2, 2))
    pool = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "VALID")
    (gradient,) = our_vjp(pool, [x], [jnp.ones((1, 1))], RULES)
    np.testing.assert_array_equal(gradient, [[1, 0], [0, 0]])
    dilated = lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (2, 1), (1, 1), "VALID", window_dilation=(2, 1)
    )
    (gradient,) = our_vjp(dilated, [jnp.ones((3, 1))], [jnp.ones((1, 1))], RULES)
    np.testing.assert_array_equal(gradient, [[1], [0], [0]])


def test_what_max_pooling_is_made_of():
    window = {"window_dimensions": (2, 2), "window_strides": (2, 1), "padding": ((0, 0), (1, 0))}
    x, source = normal(4, 5), normal(2, 5, seed=1)
    check(
        lambda s, x: lax.select_and_scatter_add_p.bind(s, x, select_prim=lax.ge_p, **window),
        source,
        x,
        primitive="select_and_scatter_add",
    )
    for base in ((1, 1), (2, 1)):
        window |= {"base_dilation": base, "window_dilation": (1, 1)}
        check(
            lambda t, x: lax.select_and_gather_add_p.bind(t, x, select_prim=lax.le_p, **window),  # noqa: B023
            normal(4, 5, seed=2),
            x,
            primitive="select_and_gather_add",
        )


def test_pooling_second_order_dtype_and_cost():
    pool = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    mean = lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    x = normal(2, 7, 8, 3)
    check(lambda x: pool(x) ** 2, x, second_order=True)
    check(lambda x: mean(x * x), x, second_order=True)
    narrow = normal(2, 7, 8, 3, dtype=jnp.bfloat16)
    check(pool, narrow, tol=0.0)
    # The windows' gradients are summed in float32 and rounded once, which JAX's aren't.
    g = random_like(jax.eval_shape(mean, narrow), 0)[0]
    (rounded,) = jax.vjp(mean, narrow.astype("float32"))[1](g.astype("float32"))
    (found,) = our_vjp(mean, [narrow], [g], RULES)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, rounded.astype(jnp.bfloat16))
    for function in (pool, mean):
        check_cost(function, normal(4, 12, 12, 8, dtype=jnp.float32), rules=RULES, slack=1.0)


# ----------------------------------------------------------------------------- Fourier transform


@pytest.mark.parametrize(
    "lengths", sweep([(8,), (7,), (1,), (2,), (3, 6), (2, 3, 5)], quick=[(8,), (2, 3, 5)])
)
@pytest.mark.parametrize("kind", list(lax.FftType))
def test_fft(kind, lengths):
    if kind == lax.FftType.RFFT:
        x = normal(2, *lengths)
    elif kind == lax.FftType.IRFFT:
        x = normal(2, *lengths[:-1], lengths[-1] // 2 + 1, dtype=jnp.complex128)
    else:
        x = normal(2, *lengths, dtype=jnp.complex128)
    check(lambda x: lax.fft(x, kind, lengths), x, primitive="fft")
    if lengths == (8,):
        check(lambda x: lax.fft(jnp.sin(x), kind, lengths), x, second_order=True)
        single = x.astype(jnp.float32 if kind == lax.FftType.RFFT else jnp.complex64)
        check(lambda x: lax.fft(x, kind, lengths), single, tol=1e-4)
        check_cost(lambda x: lax.fft(x, kind, lengths), x, rules=RULES)


# ------------------------------------------------------------------------------- linear algebra

real_and_complex = pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex128])


def positive(*shape, dtype=jnp.float64):
    x = normal(*shape, dtype=dtype)
    return x @ x.mT.conj() + shape[-1] * jnp.eye(shape[-1], dtype=dtype)


@real_and_complex
@pytest.mark.parametrize("shape", sweep([(4, 4), (2, 3, 3), (1, 1), (0, 0)], quick=[(2, 3, 3)]))
def test_cholesky(shape, dtype):
    check(lax.linalg.cholesky, positive(*shape, dtype=dtype), primitive="cholesky")


@real_and_complex
def test_cholesky_gives_its_gradient_to_the_triangle_it_reads(dtype):
    a = positive(4, 4, dtype=dtype)
    plain = lambda a: lax.linalg.cholesky(a, symmetrize_input=False)
    g = random_like(jax.eval_shape(plain, a), 0)
    (gradient,) = our_vjp(plain, [a], g, RULES)
    np.testing.assert_array_equal(gradient, jnp.tril(gradient))
    check_by_differences(lambda x: plain(positive(4, 4, dtype=dtype) + x), 0.0 * a)


@real_and_complex
@pytest.mark.parametrize("left_side", [True, False])
@pytest.mark.parametrize("columns", sweep([2, 6], quick=[2]))
def test_triangular_solve(dtype, left_side, columns):
    """All flags at once: one program is quicker than sixteen."""
    a = normal(2, 4, 4, dtype=dtype) + 3 * jnp.eye(4)
    b = normal(2, *((4, columns) if left_side else (columns, 4)), dtype=dtype, seed=1)
    flags = [
        {"lower": lower, "transpose_a": transpose, "conjugate_a": conjugate, "unit_diagonal": unit}
        for lower, transpose, conjugate, unit in itertools.product((True, False), repeat=4)
    ]
    solve = lambda a, b: [
        lax.linalg.triangular_solve(a, b, left_side=left_side, **some) for some in flags
    ]
    check(solve, a, b, primitive="triangular_solve")
    check(lambda a: solve(a, b), a)  # a alone is needed: another order of operations


@real_and_complex
def test_tridiagonal_solve(dtype):
    below, diagonal, above = (normal(2, 5, dtype=dtype, seed=i) for i in range(3))
    b = normal(2, 5, 3, dtype=dtype, seed=3)
    check(
        lax.linalg.tridiagonal_solve, below, diagonal + 5, above, b, primitive="tridiagonal_solve"
    )


@real_and_complex
@pytest.mark.parametrize(
    "shape", sweep([(2, 2, 4, 4), (5, 3), (2, 3, 5)], quick=[(5, 3), (2, 3, 5)])
)
def test_lu(shape, dtype):
    check(lambda a: lax.linalg.lu(a)[0], normal(*shape, dtype=dtype), primitive="lu")


def test_lu_pivots():
    check(
        lambda a: lax.linalg.lu_pivots_to_permutation(lax.linalg.lu(a)[1], 4) * a[0],
        normal(4, 4),
        primitive="lu_pivots_to_permutation",
    )


@real_and_complex
@pytest.mark.parametrize("shape", sweep([(4, 4), (5, 3), (2, 3, 5)], quick=[(5, 3), (2, 3, 5)]))
def test_qr(shape, dtype):
    decompose = lambda a: [lax.linalg.qr(a, full_matrices=full) for full in (True, False)]
    check(decompose, normal(*shape, dtype=dtype), primitive="qr", tol=1e-8)


@real_and_complex
@pytest.mark.parametrize("shape", sweep([(5, 3), (2, 5, 3), (2, 3, 5)], quick=[(2, 3, 5)]))
def test_qr_with_pivoting(shape, dtype):
    """Also wide matrices and batches, where JAX's own derivative is wrong or fails."""
    decompose = lambda a: [
        lax.linalg.qr(a, pivoting=True, full_matrices=full)[:2] for full in (True, False)
    ]
    a = normal(*shape, dtype=dtype)
    if shape == (5, 3):
        check(decompose, a, primitive="qr", tol=1e-8)
    check_by_differences(decompose, a)


@real_and_complex
@pytest.mark.parametrize("shape", sweep([(4, 4), (2, 3, 3), (1, 1)], quick=[(2, 3, 3)]))
def test_eigh(shape, dtype):
    decompose = lambda a: [
        lax.linalg.eigh(a, symmetrize_input=True),
        lax.linalg.eigh(a, symmetrize_input=False),
        jnp.linalg.eigvalsh(a),
    ]
    check(decompose, positive(*shape, dtype=dtype), primitive="eigh", tol=1e-8)


@real_and_complex
@pytest.mark.parametrize("shape", sweep([(4, 4), (5, 3), (2, 3, 5)], quick=[(4, 4), (2, 3, 5)]))
def test_svd(shape, dtype):
    decompose = lambda a: [
        lax.linalg.svd(a, full_matrices=a.shape[-1] == a.shape[-2]),
        lax.linalg.svd(2 * a, full_matrices=False),
        lax.linalg.svd(3 * a, compute_uv=False),
    ]
    check(decompose, normal(*shape, dtype=dtype), primitive="svd", tol=1e-8)


def test_svd_of_some_singular_values():
    check(
        lambda a: lax.linalg.svd(a, compute_uv=False, full_matrices=False, subset_by_index=(0, 3)),
        normal(4, 3),
        primitive="svd",
    )


@real_and_complex
def test_eig(dtype):
    decompose = lambda a: [
        lax.linalg.eig(
            a,
            compute_left_eigenvectors=left,
            compute_right_eigenvectors=right,
            enable_eigvec_derivs=True,
        )
        for left, right in itertools.product((True, False), repeat=2)
    ]
    check(decompose, normal(2, 4, 4, dtype=dtype), primitive="eig", tol=1e-8)


@pytest.mark.parametrize(
    "function",
    [
        lambda a: lax.linalg.svd(a, full_matrices=True),
        lambda a: lax.linalg.eig(a[:3]),
        lambda a: lax.linalg.eigh(a[:3], subset_by_index=(0, 2)),
    ],
)
def test_what_has_no_gradient_says_so(function):
    a = normal(4, 3)
    try:
        g = random_like(jax.eval_shape(function, a), 0)
    except NotImplementedError:
        pytest.skip("JAX can't even compute it here")
    with pytest.raises(NotImplementedError, match="gradient"):
        jax.make_jaxpr(lambda a: our_vjp(function, [a], g, RULES))(a)


@exhaustive
@pytest.mark.parametrize(
    "function",
    [
        lax.linalg.cholesky,
        lambda a: lax.linalg.eigh(a)[1],
        lambda a: lax.linalg.lu(a)[0],
        lax.linalg.qr,
        lambda a: lax.linalg.svd(a, full_matrices=False),
    ],
)
def test_linear_algebra_second_order_and_dtype(function):
    check(function, positive(3, 3), second_order=True, tol=1e-7)
    check(function, positive(3, 3).astype(jnp.float32), tol=1e-2)


@exhaustive
@pytest.mark.parametrize("shape", sweep([(4, 4), (5, 3), (3, 5)], quick=[(4, 4)]))
def test_each_factor_alone(shape):
    """Where one factor gets an upstream gradient, the others' part is left out."""
    decompositions = [
        (lambda a: lax.linalg.qr(a, full_matrices=False), 2),
        (lambda a: lax.linalg.svd(a, full_matrices=False), 3),
    ]
    if shape[0] == shape[1]:
        decompositions += [
            (lambda a: lax.linalg.eigh(a @ a.mT.conj()), 2),
            (lambda a: lax.linalg.eig(a, enable_eigvec_derivs=True), 3),
        ]

    def one_factor_each(a):
        return [f((1 + i) * a)[i] for f, outputs in decompositions for i in range(outputs)]

    for dtype in (jnp.float64, jnp.complex128):
        check(one_factor_each, normal(*shape, dtype=dtype), tol=1e-7)


@pytest.mark.parametrize(
    "function",
    [
        jnp.linalg.eigvalsh,
        lambda a: lax.linalg.svd(a, compute_uv=False),
        jnp.linalg.eigvals,
        jnp.linalg.inv,
        lambda a: lax.linalg.qr(a)[1],
        lax.linalg.eigh,
        lax.linalg.cholesky,
    ],
)
def test_linear_algebra_costs_no_more(function):
    """No more products, and not a decomposition more: the value's factors serve the gradient."""
    a = positive(32, 32).astype(jnp.float32)

    def loss(a):
        y = jax.tree.leaves(function(a))[-1]
        return jnp.sum(jnp.sin(y)).real

    costs = []
    for transform in (fnn.backprop.value_and_grad, jax.value_and_grad):
        compiled = jax.jit(transform(loss)).lower(a).compile()
        calls = sum("custom-call(" in line for line in compiled.as_text().splitlines())
        costs.append((compiled.cost_analysis()["flops"], calls))
    (ours, our_calls), (theirs, their_calls) = costs
    assert ours <= 1.02 * theirs + 24 * a.size  # a product would be 64 operations per entry
    assert our_calls <= their_calls


@exhaustive
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_singular_vectors_of_tiny_and_huge_matrices(scale):
    """They are those of a matrix of usual size; the squares of these singular values are none."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), "float32")

    def of_vectors(a):
        u, _, vh = jnp.linalg.svd(a, full_matrices=False)
        return jnp.sum(u[0] * vh[1])

    found = fnn.grad(of_vectors)(a * np.float32(scale)) * np.float32(scale)
    np.testing.assert_allclose(found, jax.grad(of_vectors)(a.astype("float64")), rtol=1e-4)
