"""Convolution and its transpose: against JAX's own, and against PyTorch's."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import export, lax
from sweeps import exhaustive, sweep
from test_primitives_linear_algebra import convolutions

import fnn
from fnn import ops
from fnn.convolution import conv_general_dilated_p, cpu, weights, windows

R = lambda seed, *shape, dtype=None: jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), dtype
)
NUMBERS = ("NHWC", "HWIO", "NHWC")


def parameters_of(x, w, **options):
    """The parameters of JAX's primitive."""
    (equation,) = jax.make_jaxpr(lambda x, w: lax.conv_general_dilated(x, w, **options))(x, w).eqns
    return equation.params


def derivatives(f):
    """Values, gradients, products with the Hessian; of one, and of three under vmap."""
    loss = lambda x, w: jnp.sum(jnp.sin(f(x, w)))
    grad = jax.grad(loss, (0, 1))

    def found(x, w):
        xs, ws = jnp.stack([x, 2 * x, x + 1], 1), jnp.stack([w, w * 2, w - 1], -1)
        summed = lambda xs, w: jnp.sum(jax.vmap(loss, (1, None))(xs, w))
        return {
            "grad": grad(x, w),
            "jvp": jax.jvp(f, (x, w), (x + 1, 3 * w)),
            "Hessian": jax.jvp(grad, (x, w), (x + 1, 3 * w)),
            "vmap of x": jax.vmap(f, (1, None))(xs, w),
            "vmap of w": jax.vmap(f, (None, -1))(x, ws),
            "vmap of both": jax.vmap(f, (1, -1))(xs, ws),
            "grad of vmap": jax.grad(summed, (0, 1))(xs, w),
            "vmap of grad": jax.vmap(grad, (1, None))(xs, w),
        }

    return found


def must_agree(f, plain, *args, tolerance=2e-4):
    ours, theirs = jax.jit(lambda *a: (derivatives(f)(*a), derivatives(plain)(*a)))(*args)
    jax.tree.map(lambda a, b: close(a, b, tolerance), ours, theirs)


def close(a, b, tolerance=2e-4):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * jnp.abs(b).max(initial=1))


# One of each formula of fnn/convolution/, forward and backward.
FORMULAS = {
    "product": ((2, 6, 5, 64), (3, 3, 64, 48), {}),
    "product, many out": (
        (2, 7, 5, 16),
        (2, 1, 16, 48),
        {"window_strides": (2, 1), "rhs_dilation": (2, 1)},
    ),
    "many to few": ((2, 6, 5, 64), (3, 3, 64, 2), {}),
    "library": ((2, 6, 5, 9), (3, 3, 9, 14), {}),
    "one pixel": ((2, 1, 1, 5), (2, 3, 5, 4), {"padding": ((1, 2), (3, 2))}),
    "of an image no larger": ((2, 3, 4, 9), (3, 4, 9, 5), {"padding": "VALID"}),
    "few pixels": (
        (2, 3, 2, 12),
        (3, 2, 12, 5),
        {"padding": ((6, 2), (1, 2)), "rhs_dilation": (2, 1)},
    ),
    "rows in": ((2, 6, 5, 3), (3, 2, 3, 4), {"rhs_dilation": (2, 1), "padding": ((-1, 2), (1, 1))}),
    "rows in, filled": ((2, 6, 5, 2), (3, 2, 2, 5), {}),
    "rows of the window": (
        (2, 6, 5, 6),
        (3, 2, 6, 4),
        {"rhs_dilation": (2, 1), "padding": ((3, 2), (0, 1))},
    ),
    "rows of the window, high": ((2, 6, 5, 16), (5, 3, 16, 8), {"padding": ((4, 3), (1, 1))}),
    "filled": ((2, 6, 5, 7), (3, 2, 7, 9), {}),
    "filled, many out": ((2, 6, 5, 3), (3, 2, 3, 20), {"window_strides": (2, 1)}),
    "few features": ((2, 6, 5, 9), (3, 2, 9, 3), {"rhs_dilation": (1, 2)}),
    "one place": (
        (2, 6, 5, 3),
        (1, 1, 3, 4),
        {"window_strides": (2, 1), "padding": ((1, 2), (0, -1))},
    ),
    "strided": (
        (2, 6, 7, 3),
        (3, 2, 3, 4),
        {"window_strides": (2, 3), "padding": ((1, 0), (2, 1))},
    ),
    "grey": ((2, 6, 5, 1), (3, 3, 1, 4), {"rhs_dilation": (1, 2)}),
    "grey, many out": ((2, 7, 6, 1), (5, 5, 1, 24), {"window_strides": (2, 1)}),
    "single features to many": ((2, 13, 12, 2), (7, 7, 1, 48), {"feature_group_count": 2}),
    "depthwise": ((2, 6, 5, 3), (3, 3, 1, 6), {"feature_group_count": 3}),
    "depthwise, of a small image": ((2, 3, 2, 4), (3, 3, 1, 8), {"feature_group_count": 4}),
    "groups": ((2, 6, 5, 4), (3, 3, 2, 6), {"feature_group_count": 2, "window_strides": (2, 1)}),
    "groups, of a small image": ((2, 2, 3, 6), (3, 3, 2, 6), {"feature_group_count": 3}),
    "one feature out": ((2, 6, 5, 3), (3, 2, 3, 1), {"rhs_dilation": (2, 1)}),
    "colours": ((2, 9, 12, 3), (3, 2, 3, 32), {"window_strides": (1, 2)}),
    "each group": ((2, 6, 5, 16), (3, 3, 8, 16), {"feature_group_count": 2}),
    "wide groups": ((2, 4, 3, 40), (3, 2, 20, 6), {"feature_group_count": 2}),
    "transpose": (
        (2, 3, 4, 2),
        (3, 4, 2, 3),
        {"lhs_dilation": (2, 3), "padding": ((1, 2), (1, 0))},
    ),
    "cropped": ((2, 6, 5, 2), (3, 1, 2, 3), {"padding": ((-1, 2), (0, -2))}),
}


# Of three images, blocks of one; with these numbers of bytes one of two, and one is left over.
TWO_IMAGES = {
    "product": 140_000,
    "product, many out": 5_200,
    "groups": 4_400,
    "depthwise": 6_500,
    "few features": 17_400,
    "few pixels": 1_440,
    "rows in": 1_400,
    "rows of the window": 1_000,
}
BOTH = [(name, cached) for name in FORMULAS for cached in (None, 1, TWO_IMAGES.get(name, 2))]
QUICK = [
    ("product", TWO_IMAGES["product"]),
    ("strided", None),
    ("grey", None),
    ("each group", None),
]


@pytest.mark.parametrize(
    "name, cached", [pytest.param(*c, marks=() if c in QUICK else exhaustive) for c in BOTH]
)
def test_formulas_agree_with_jax(name, cached, monkeypatch):
    """Also image by image, and where one is left over."""
    if cached is not None:
        monkeypatch.setattr(windows, "CACHED", cached)
        monkeypatch.setattr(windows, "FOR_ALL_CORES", cached)
        monkeypatch.setattr(windows, "FOR_PIXELS", cached)
    x, w, options = FORMULAS[name]
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    x, w = R(0, 3, *x[1:], dtype="float32"), R(1, *w, dtype="float32")
    params = parameters_of(x, w, dimension_numbers=NUMBERS, **options)
    # New functions each time: else JAX would remember the other block size's program.
    ours = lambda x, w: conv_general_dilated_p.bind(x, w, **params)
    plain = lambda x, w: lax.conv_general_dilated_p.bind(x, w, **params)
    must_agree(ours, plain, x, w)


@pytest.mark.parametrize(
    "side, outs, padding, by_library",
    [
        (5, 32, "same", True),
        (5, 32, 0, True),
        (5, 16, "same", False),
        (6, 32, 3, False),  # y is larger than x: there the library is slow
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_from_single_features_to_many_goes_the_library(side, outs, padding, by_library, groups):
    f = lambda x, w: ops.convolution(x, w, padding=padding, groups=groups)
    x, w = R(0, 8, 14, 14, groups), R(1, outs * groups, 1, side, side)
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    text = jax.jit(f).lower(x, w).as_text()
    assert text.count("stablehlo.convolution") == (groups if by_library else 0)


@pytest.mark.parametrize("each", sweep([1, 2], [1]))
def test_a_large_window_of_single_features_is_a_loop_over_rows(each, monkeypatch):
    monkeypatch.setattr(windows, "MANY", 5)
    x, w = R(0, 2, 7, 8, 3, dtype="float32"), R(1, 4, 3, 1, 3 * each, dtype="float32")
    options = {"window_strides": (2, 1), "rhs_dilation": (1, 2), "padding": ((2, 1), (0, 3))}
    options |= {"feature_group_count": 3, "dimension_numbers": NUMBERS}
    params = parameters_of(x, w, **options)
    ours = lambda x, w: conv_general_dilated_p.bind(x, w, **params)
    must_agree(ours, lambda x, w: lax.conv_general_dilated_p.bind(x, w, **params), x, w)
    assert "while" in jax.jit(ours).lower(x, w).as_text()
    of_w = lambda x, g: jax.linear_transpose(lambda w: ours(x, w), w)(g)[0]
    assert "while" in jax.jit(of_w).lower(x, ours(x, w)).as_text()


@pytest.mark.parametrize("side", [1, 4, 7])
def test_features_of_groups_are_not_multiplied_with_all(side):
    """Also where the weight is as large as the image or larger, as in ConvNeXt's last stage."""
    x, w = R(0, 4, side, side, 64, dtype="float32"), R(1, 64, 1, 7, 7, dtype="float32")
    f = lambda x, w: ops.convolution(x, w, padding="same", groups=64)
    gradients = lambda x, w, g: jax.vjp(f, x, w)[1](g)
    found = jax.jit(gradients).lower(x, w, x).compile().cost_analysis()["flops"]
    assert found <= 6 * x.size * 49


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ins", [8, 5])
def test_zeros_after_the_entries_and_none_of_the_first(ins, dtype):
    """XLA's library reads what lies beyond x; of the numbers 1 to 4 the sums are exact."""
    random = np.random.default_rng(0)
    x, w = random.integers(1, 4, (3, 9, ins)), random.integers(1, 4, (2, ins, 4))
    padded = np.pad(x, ((0, 0), (0, 1), (0, 0)))[:, 1:]
    wanted = padded[:, :-1] @ w[0] + padded[:, 1:] @ w[1]
    numbers = ("NWC", "WIO", "NWC")
    options = {"window_strides": (1,), "padding": [(-1, 1)], "dimension_numbers": numbers}
    x, w = jnp.asarray(x, dtype), jnp.asarray(w, dtype)
    params = parameters_of(x, w, **options)
    found = jax.jit(lambda x, w: conv_general_dilated_p.bind(x, w, **params))(x, w)
    np.testing.assert_array_equal(found, wanted)


SIDE_BY_SIDE = {
    **{name: FORMULAS[name] for name in ("library", "strided", "transpose", "cropped")},
    "dilated": ((2, 6, 9, 3), (3, 2, 3, 4), {"rhs_dilation": (2, 3), "window_strides": (1, 2)}),
    "one place high": ((2, 6, 7, 3), (1, 3, 3, 4), {"padding": ((0, 0), (3, 1))}),
    "a window wider than its images": ((2, 6, 3, 3), (1, 5, 3, 4), {"padding": ((0, 0), (4, 4))}),
    "a stride beyond the window": (
        (2, 6, 9, 3),
        (2, 2, 3, 4),
        {"window_strides": (1, 4), "padding": ((0, 1), (0, 0))},
    ),
    "a sequence": ((2, 9, 3), (3, 3, 4), {"window_strides": (2,)}),
    "a volume": ((2, 4, 3, 5, 3), (2, 1, 3, 3, 4), {"window_strides": (1, 1, 2)}),
}


@pytest.mark.parametrize("name", sweep(SIDE_BY_SIDE, quick=["strided"]))
def test_images_side_by_side_agree_with_jax(name, monkeypatch):
    monkeypatch.setattr(cpu, "_is_on_one_core", lambda *_: True)
    x, w, options = SIDE_BY_SIDE[name]
    space = "DHW"[-(len(x) - 2) :]
    numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
    options = {"window_strides": (1,) * len(space), "padding": "SAME"} | options
    x, w = R(0, 3, *x[1:], dtype="float32"), R(1, *w, dtype="float32")
    params = parameters_of(x, w, dimension_numbers=numbers, **options)
    ours = lambda x, w: conv_general_dilated_p.bind(x, w, **params)
    plain = lambda x, w: lax.conv_general_dilated_p.bind(x, w, **params)
    must_agree(ours, plain, x, w)


@pytest.mark.parametrize("on_one_core", [True, False])
@pytest.mark.parametrize("ins, outs, many", [(32, 64, True), (32, 16, False), (8, 64, False)])
def test_where_one_core_would_work_images_lie_side_by_side(
    on_one_core, ins, outs, many, monkeypatch
):
    """Before JAX 0.11 XLA's library shares a row's pixels among the cores, if they are many."""
    assert (jax.__version_info__ < (0, 11)) == windows.ROWS_ON_ONE_CORE
    monkeypatch.setattr(windows, "ROWS_ON_ONE_CORE", on_one_core)
    x, w = R(0, 16, 8, 8, ins, dtype="float32"), R(1, outs, ins, 3, 3, dtype="float32")
    text = jax.jit(lambda x, w: ops.convolution(x, w)).lower(x, w).as_text()
    (batch,) = re.findall(r"stablehlo.convolution.*\(tensor<(\d+)x", text)
    assert int(batch) == (1 if on_one_core and many else 16)


@pytest.mark.parametrize(
    "sizes, wanted",
    [
        ((3, 18), "3x3x3x18"),
        ((8, 16), "3x3x8x16"),
        ((6, 16), "3x3x8x16"),  # filled up
        ((2, 16), "1x3x8x16"),  # three rows of x side by side, and filled up
        ((3, 16), "1x3x9x16"),
        ((16, 7), "1x3x16x21"),  # three rows of the window side by side
    ],
)
def test_what_the_library_gets_of_few_features(sizes, wanted, monkeypatch):
    """It is slow at few."""
    monkeypatch.setattr(windows, "ROWS_ON_ONE_CORE", False)
    ins, outs = sizes
    x, w = R(0, 2, 8, 8, ins, dtype="float32"), R(1, outs, ins, 3, 3, dtype="float32")
    text = jax.jit(lambda x, w: ops.convolution(x, w)).lower(x, w).as_text()
    found = re.findall(r"stablehlo.convolution.*tensor<((?:\d+x){3}\d+)xf32>\) ->", text)
    assert found == [wanted]


def test_zeros_around_few_pixels_are_not_multiplied():
    """y is larger than x: a fourth of the multiplications, and of one pixel a ninth."""
    for size, padding, part in ((2, 2, 4), (1, 2, 9)):
        x, w = R(0, 4, size, size, 16, dtype="float32"), R(1, 3, 3, 16, 16, dtype="float32")
        options = {"window_strides": (1, 1), "padding": [(padding, padding)] * 2}
        params = parameters_of(x, w, dimension_numbers=NUMBERS, **options)
        f = jax.jit(lambda x, w, p=params: conv_general_dilated_p.bind(x, w, **p))
        flops = f.lower(x, w).compile().cost_analysis()["flops"]
        plain = 2 * 4 * (size + 2) ** 2 * 9 * 16 * 16
        assert plain / part <= flops < 1.2 * plain / part


@pytest.mark.parametrize("on_one_core", [True, False])
def test_an_odd_number_of_features_is_filled_up_before_jax_0_11(on_one_core, monkeypatch):
    monkeypatch.setattr(windows, "ROWS_ON_ONE_CORE", on_one_core)
    x, w = R(0, 2, 8, 8, 3, dtype="float32"), R(1, 32, 3, 3, 3, dtype="float32")
    text = jax.jit(lambda x, w: ops.convolution(x, w)).lower(x, w).as_text()
    (found,) = re.findall(r"stablehlo.convolution.*\(tensor<(?:\d+x){3}(\d+)x", text)
    assert int(found) == (4 if on_one_core else 3)


LYING = [
    pytest.param(order, options, marks=() if order == "OIHW" and not options else exhaustive)
    for order in ("OIHW", "HWIO", "IOHW", "HOWI")
    for options in ({}, {"window_strides": (2, 1), "rhs_dilation": (1, 2)})
]


@pytest.mark.parametrize("order, options", LYING, ids=lambda x: x if isinstance(x, str) else len(x))
def test_of_few_pixels_weights_in_any_order_agree_with_jax(order, options, monkeypatch):
    monkeypatch.setattr(windows, "LARGE", 1)
    sizes = {"O": 18, "I": 14, "H": 2, "W": 3}
    x = R(0, 2, 3, 3, 14, dtype="float32")
    w = R(1, *map(sizes.get, order), dtype="float32")
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    params = parameters_of(x, w, dimension_numbers=("NHWC", order, "NHWC"), **options)
    ours = lambda x, w: conv_general_dilated_p.bind(x, w, **params)
    plain = lambda x, w: lax.conv_general_dilated_p.bind(x, w, **params)
    must_agree(ours, plain, x, w)


def test_many_weights_for_few_pixels_stay_where_they_lie():
    """No array as large as the weights is written in another order of axes."""
    x, w = R(0, 2, 4, 4, 192, dtype="float32"), R(1, 192, 192, 3, 3, dtype="float32")
    loss = lambda x, w: jnp.sum(ops.convolution(x, w) ** 2)
    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile().as_text()
    for line in text.splitlines():
        if re.search(r"= f32\[[\d,]+\]\S* (transpose|reverse|convolution)\(", line):
            sizes = re.search(r"f32\[([\d,]+)\]", line)[1].split(",")
            assert np.prod([int(n) for n in sizes]) < w.size, line


@exhaustive
@settings(max_examples=30, deadline=None)
@given(convolutions())
def test_any_convolution_agrees_with_jax(case):
    x, w, options = case
    with jax.enable_x64(True):
        x, w = R(0, *x, dtype="float64"), R(1, *w, dtype="float64")
        params = parameters_of(x, w, **options)
        ours = lambda x, w: conv_general_dilated_p.bind(x, w, **params)
        plain = lambda x, w: lax.conv_general_dilated_p.bind(x, w, **params)
        must_agree(ours, plain, x, w, tolerance=1e-10)


def network(x, w, v):
    y = jax.nn.relu(ops.convolution(x, w))
    return jnp.sum(ops.convolution(y, v, stride=2) ** 2)


def of_another_library(x, w, v):
    """The same with JAX's convolution, features first as in Equinox."""
    y = jax.nn.relu(lax.conv(jnp.moveaxis(x, -1, 1), w, (1, 1), "SAME"))
    return jnp.sum(lax.conv(y, v, (2, 2), "SAME") ** 2)


@pytest.mark.parametrize("grad, loss", [(jax.grad, network), (fnn.grad, of_another_library)])
def test_in_a_loop_the_library_gets_the_order_of_axes_that_it_wants(grad, loss):
    """XLA runs other convolutions in a loop a hundred times slower."""
    x, w, v = R(0, 2, 3, 9, 9, 4), R(1, 8, 4, 3, 3), R(2, 6, 8, 3, 3)
    step = lambda c, x: (jax.tree.map(jnp.add, c, grad(loss, (1, 2))(x, *c)), None)
    loop = jax.jit(lambda x, w, v: lax.scan(step, (w, v), x))
    text = loop.lower(x, w, v).compile().as_text()
    labels = re.findall(r"dim_labels=(\S+?)[,\s]", text)
    assert labels and set(labels) == {"b01f_01io->b01f"}


@pytest.mark.parametrize(
    "sizes",
    sweep(
        [
            ((1024, 28, 28, 3), (5, 5, 3, 16), 2),
            ((1024, 28, 28, 16), (5, 5, 16, 6), 2),
            ((2048, 10, 10, 16), (5, 5, 16, 6), 4),
            ((4096, 4, 4, 16), (3, 3, 16, 16), 2),
        ],
        quick=[((1024, 28, 28, 16), (5, 5, 16, 6), 2)],
    ),
)
def test_rows_and_pixels_take_little_memory(sizes):
    """However large the batch: those of some images at a time."""
    *shapes, padding = sizes
    x, w = (jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)
    options = {"window_strides": (1, 1), "padding": [(padding, padding)] * 2}
    params = parameters_of(x, w, dimension_numbers=NUMBERS, **options)
    f = jax.jit(lambda x, w: conv_general_dilated_p.bind(x, w, **params))
    memory = f.lower(x, w).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 3 * windows.FOR_PIXELS


# images, space, features in and out, and options of the convolution
NEIGHBOURS = {
    "grey": (6, (12, 8), 1, 6, {}),
    "an odd number of images": (5, (7, 12), 1, 32, {"padding": "same"}),
    "one image": (1, (9, 11), 1, 24, {"padding": [(2, 1), (3, 0)]}),
    "colour": (4, (8, 8), 3, 32, {"padding": "same"}),
    "strided": (4, (9, 16), 4, 48, {"stride": (3, 2), "padding": [(1, 1), (0, 2)]}),
    "sequences": (7, (20,), 1, 16, {"padding": "same"}),
    "volumes": (3, (4, 5, 6), 2, 5, {"padding": "same", "dilation": (2, 1, 1)}),
    "holes": (3, (5, 5, 10), 1, 4, {"padding": "same", "dilation": 2}),
}


@pytest.mark.parametrize("name", sweep(NEIGHBOURS, ["an odd number of images", "strided"]))
def test_weights_gradients_by_neighbours_agree_with_jax(name, monkeypatch):
    images, space, ins, outs, options = NEIGHBOURS[name]
    monkeypatch.setattr(weights, "_WORTH", 1)
    taken, real = [], weights.by_neighbours
    note = lambda *args, **how: taken.append(args[-1]) or real(*args, **how)
    monkeypatch.setattr(weights, "by_neighbours", note)
    x, w = R(0, images, *space, ins), R(1, outs, ins, *(3 for _ in space))

    def gradient(w):
        f = lambda w: jax.vmap(lambda x: ops.convolution(x, w, **options))(x)
        return jax.vjp(f, w)[1](jnp.cos(f(w)))[0]

    ours = jax.jit(gradient)(w)
    assert taken and min(taken) > 1
    monkeypatch.setattr(weights, "_WORTH", np.inf)
    close(ours, jax.jit(lambda w: gradient(w))(w), 1e-12)
    f = lambda w: jnp.sum(jnp.sin(jax.vmap(lambda x: ops.convolution(x, w, **options))(x)))
    for place in [(0, 0, *[0] * len(space)), (outs - 1, ins - 1, *[2] * len(space))]:
        step = jnp.zeros(w.shape).at[place].set(1e-6)
        close(ours[place], (f(w + step) - f(w - step)) / 2e-6, 1e-6)


def test_weights_gradients_by_neighbours_take_little_memory():
    x, w = jax.ShapeDtypeStruct((1024, 28, 28, 1), "float32"), R(0, 32, 1, 5, 5, dtype="float32")
    f = lambda x, g: jax.linear_transpose(lambda w: ops.convolution(x, w), w)(g)[0]
    g = jax.eval_shape(ops.convolution, x, w)
    memory = jax.jit(f).lower(x, g).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 3 * windows.FOR_PIXELS


def test_what_computes_g_is_not_compiled_for_another_shape():
    """Of neighbours' features side by side: XLA would make g by it slowly, entry by entry."""
    x, w = R(0, 64, 16, 16, 1, dtype=jnp.float32), R(1, 32, 1, 3, 3, dtype=jnp.float32)
    f = lambda w: jnp.sum(ops.max_pool(ops.convolution(x, w, padding="same"), 2) ** 2)
    text = jax.jit(jax.grad(f)).lower(w).compile().as_text()
    within = re.findall(r"\n%fused[^\n]* -> f32\[4096,128\] \{.*?\n\}", text, re.S)
    assert all("compare" not in fused for fused in within)


@pytest.mark.parametrize("images, outs", [(256, 16), (256, 48), (100, 48)])
def test_a_weights_gradient_takes_little_memory(images, outs):
    """However large the batch: the patches of some images at a time, and no copy of all."""
    x = jax.ShapeDtypeStruct((images, 28, 28, 16), "float32")
    w = R(0, outs, 16, 3, 3, dtype="float32")
    loss = lambda conv: lambda w, x: jnp.sum(conv(x, w) ** 2)
    plain = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
    )
    ours, theirs = (
        jax.jit(jax.grad(loss(f))).lower(w, x).compile().memory_analysis().temp_size_in_bytes
        for f in (ops.convolution, plain)
    )
    assert ours <= theirs + 4 * windows.CACHED


@pytest.mark.parametrize(
    "sizes", sweep([(1, 6), (3, 16), (6, 16), (64, 3), (32, 64)], quick=[(1, 6)])
)
def test_no_formula_does_more_than_it_must(sizes):
    """Multiplications and additions of LeNet's convolutions, and of wider ones."""
    ins, outs = sizes
    x, w = R(0, 64, 16, 16, ins, dtype=jnp.float32), R(1, 5, 5, ins, outs, dtype=jnp.float32)
    f = lambda x, w: ops.convolution(x, jnp.moveaxis(w, (2, 3), (1, 0)))
    g = f(x, w)
    operations = 2 * w.size * g.size // outs
    of_x = lambda w, g: jax.linear_transpose(lambda x: f(x, w), x)(g)[0]
    of_w = lambda x, g: jax.linear_transpose(lambda w: f(x, w), w)(g)[0]
    for function, args in ((f, (x, w)), (of_x, (w, g)), (of_w, (x, g))):
        cost = jax.jit(function).lower(*args).compile().cost_analysis()
        assert cost["flops"] < 2 * operations


def test_other_platforms_get_their_own_convolution():
    x, w, v = R(0, 3, 9, 9, 4), R(1, 8, 4, 3, 3), R(2, 6, 8, 3, 3)
    for platform in ("cuda", "tpu"):
        program = export.export(jax.jit(jax.grad(network, (0, 1, 2))), platforms=[platform])(
            x, w, v
        )
        text = program.mlir_module()
        assert "while" not in text and "dot_general" not in text
        assert text.count("stablehlo.convolution") == 6


def test_gradients_of_fnn_too():
    x, w, v = R(0, 3, 9, 9, 4), R(1, 8, 4, 3, 3), R(2, 6, 8, 3, 3)
    ours, plain = jax.jit(
        lambda *a: (fnn.grad(network, (0, 1, 2))(*a), jax.grad(network, (0, 1, 2))(*a))
    )(x, w, v)
    jax.tree.map(close, ours, plain)
    names = [node.operation for node in fnn.graph(network)(x, w, v).nodes]
    assert names.count("conv_general_dilated") == 2


# ------------------------------------------------------------------------------------- options


def test_same_and_circular_padding_by_hand():
    x, w = jnp.arange(1.0, 6.0)[:, None], jnp.asarray([[[1.0, 10.0, 100.0]]])
    at = lambda **options: ops.convolution(x, w, **options)[:, 0].tolist()
    assert at() == [210, 321, 432, 543, 54]
    assert at(padding="valid") == [321, 432, 543]
    assert at(padding="circular") == [215, 321, 432, 543, 154]
    assert at(padding=((0, 2),)) == [321, 432, 543, 54, 5]
    assert at(stride=2) == [210, 432, 54]
    assert at(dilation=2) == [310, 420, 531, 42, 53]


@exhaustive
def test_the_transpose_is_the_transpose():
    w = R(0, 6, 2, 3, 2)
    for stride, padding, dilation in [
        ((2, 3), 1, 1),
        (2, ((0, 1), (1, 0)), (1, 2)),
        (1, "valid", 2),
    ]:
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": 2}
        x = R(1, 7, 9, 4)
        into = functools.partial(ops.convolution, w=w, **options)
        y = into(x)
        g = R(2, *y.shape)
        short = ops.conv_transpose(g, w, **options)
        more = tuple(n - m for n, m in zip(x.shape[:2], short.shape[:2], strict=True))
        found = ops.conv_transpose(g, w, output_padding=more, **options)
        close(found, jax.linear_transpose(into, x)(g)[0], 1e-4)


def test_the_transpose_with_a_window_shorter_than_the_stride():
    """Its output is stride times its input, as the convolution's input was."""
    w = R(0, 2, 3, 1, 2)
    into = functools.partial(ops.convolution, w=w, stride=(2, 3))
    x = R(1, 8, 12, 3)
    g = R(2, *into(x).shape)
    found = ops.conv_transpose(g, w, stride=(2, 3))
    assert found.shape == x.shape
    close(found, jax.linear_transpose(into, x)(g)[0], 1e-4)


def test_one_dimension_three_and_none():
    x, w = R(0, 2, 3, 5, 4, 6, 2), R(1, 3, 2, 2, 1, 3)
    ours = ops.convolution(x, w, padding="valid")
    axes = ("NDHWC", "OIDHW", "NDHWC")
    plain = lax.conv_general_dilated(
        x.reshape(6, 5, 4, 6, 2), w, (1, 1, 1), "VALID", dimension_numbers=axes
    )
    close(ours, plain.reshape(2, 3, 4, 4, 4, 3))
    close(ops.convolution(x, w[:, :, 0, 0, 0]), x @ w[:, :, 0, 0, 0].T)
    assert ops.convolution(jnp.ones((0, 5, 2)), jnp.ones((3, 2, 3))).shape == (0, 5, 3)


def test_dtypes():
    for x, w, y in [("bfloat16", "bfloat16", "bfloat16"), ("bfloat16", "float32", "float32")]:
        found = ops.convolution(R(0, 5, 2, dtype=x), R(1, 3, 2, 3, dtype=w))
        assert found.dtype == y


TORCH = list(itertools.product((1, 2), (0, 1, "same"), (1, 2), (1, 2, 4), (2, 3)))


@pytest.mark.parametrize(
    "case", [pytest.param(TORCH, id="all", marks=exhaustive), TORCH[::9]], ids=["all", "some"]
)
def test_as_pytorch(case):
    torch = pytest.importorskip("torch")
    image = lambda x: torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())
    for stride, padding, dilation, groups, size in case:
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        x, w = R(0, 2, 9, 8, 4, dtype="float32"), R(1, 8, 4 // groups, size, size, dtype="float32")
        functional, weight = torch.nn.functional, torch.tensor(np.asarray(w))
        if padding != "same" or stride == 1 and size % 2:
            theirs = functional.conv2d(image(x), weight, **options)
            close(ops.convolution(x, w, **options), np.moveaxis(theirs.numpy(), 1, -1))
        if padding != "same":
            v = R(2, 4, 8 // groups, size, size, dtype="float32")
            options["output_padding"] = max(stride, dilation) - 1
            theirs = functional.conv_transpose2d(image(x), torch.tensor(np.asarray(v)), **options)
            close(ops.conv_transpose(x, v, **options), np.moveaxis(theirs.numpy(), 1, -1))


WRONG = [
    ({"w": (3, 3, 3, 3)}, "'w' has shape (3, 3, 3, 3), wanted (out, 2 / 1, *window)"),
    ({"w": (3, 1, 3, 3), "groups": 2}, "with an out that 2 groups divide"),
    ({"w": (3,)}, "'w' has shape (3,), wanted a weight"),
    ({"x": (2,)}, "'x' has shape (2,), wanted (..., *space, in) with 2 axes"),
    ({"padding": "valid", "x": (2, 5, 2)}, "smaller than the (3, 3) that the window"),
    ({"padding": "sum"}, "padding must be"),
    ({"padding": (1,)}, "for each of the 2 axes of space, but got (1,)"),
    ({"padding": ((1, 2, 3), 1)}, "pairs are (low, high)"),
    ({"stride": (1, 2, 3)}, "one for each of the 2 axes of space, but got (1, 2, 3)"),
    ({"stride": 0}, "stride must be"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=range(len(WRONG)))
def test_what_does_not_fit(wrong, message):
    shapes = {"x": (5, 5, 2), "w": (3, 2, 3, 3)} | {k: v for k, v in wrong.items() if k in "xw"}
    options = {k: v for k, v in wrong.items() if k not in "xw"}
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.convolution(*(jnp.ones(s) for s in shapes.values()), **options)


def test_what_does_not_fit_the_transpose():
    x = jnp.ones((5, 2))
    with pytest.raises(ValueError, match=r"wanted \(2, out / groups, \*window\)"):
        ops.conv_transpose(x, jnp.ones((3, 2, 3)))
    with pytest.raises(ValueError, match="output_padding must be less than the stride"):
        ops.conv_transpose(x, jnp.ones((2, 3, 3)), output_padding=1)
    with pytest.raises(TypeError, match="floating"):
        ops.conv_transpose(jnp.ones((5, 2), int), jnp.ones((2, 3, 3)))
    with pytest.raises(ValueError, match="wanted a window without zeros"):
        ops.conv_transpose(x, jnp.ones((2, 3, 0)))
    with pytest.raises(ValueError, match=r"sizes \(-1,\), for w of shape .*: wanted less padding"):
        ops.conv_transpose(x[:1], jnp.ones((2, 3, 3)), padding=2)
    assert ops.conv_transpose(x[:1], jnp.ones((2, 3, 2)), padding=1).shape == (0, 3)


# ------------------------------------------------------------------- per example, and curvature


@exhaustive
def test_per_example_gradients_stay_factored():
    p = {"w": R(0, 12, 8, 3, 3), "d": R(1, 12, 6, 3, 3), "t": R(2, 12, 8, 3, 3)}

    def loss(p, x):
        h = jnp.tanh(ops.convolution(x, p["w"], stride=2, padding="circular"))
        h = jnp.tanh(ops.convolution(h, p["d"], groups=2))
        return jnp.sum(ops.conv_transpose(h, p["t"], stride=2, padding=1) ** 2)

    def both(p, xs):
        losses, g = fnn.per_example.grads(loss)(p, xs)
        kept.extend(type(t).__name__ for leaf in g.values() for t in leaf.terms)
        plain = jax.vmap(jax.grad(loss), (None, 0))(p, xs)
        return fnn.per_example.materialize(g), fnn.per_example.norms(g), plain

    kept = []
    found, norms, plain = jax.jit(both)(p, R(3, 3, 4, 4, 8))
    jax.tree.map(close, found, plain)
    squares = sum(jnp.sum(g.reshape(3, -1) ** 2, 1) for g in plain.values())
    close(norms, jnp.sqrt(squares))
    assert kept == ["Convolution"] * 3


@exhaustive
def test_kronecker_factors():
    """With one position they are exact: the block itself."""
    w, xs = R(0, 3, 2, 2, 2), R(1, 4, 2, 2, 2)
    model = lambda p, x: ops.convolution(x, p["w"], padding="valid").reshape(-1)
    loss = lambda z, y: 0.5 * jnp.sum((z - y) ** 2)
    found = fnn.curvature.kronecker_factors(model, loss)({"w": w}, (xs, jnp.zeros((4, 3))))
    rows = xs.transpose(0, 3, 1, 2).reshape(4, 8)
    expected = jnp.einsum("op,ij->oipj", jnp.eye(3), rows.T @ rows / 4).reshape(24, 24)
    close(found["w"].to_dense(), expected)
