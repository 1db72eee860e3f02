"""Ours against BackPACK, Opacus, jax-privacy and kfac-jax: equal networks, in float64.

None of them comes with fnn[test]: a test that is skipped says which line installs its peer.
"""

import dataclasses
import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fnn.per_example as pe
from fnn import curvature, ops

# BackPACK and Opacus hook the outputs' gradients, where no input requires one.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

PEERS = {
    "backpack": "pip install torch==2.13.0; "
    "pip install --no-deps backpack-for-pytorch einops unfoldNd opt_einsum",
    "opacus": "pip install torch==2.13.0 opacus",
    "jax_privacy": "pip install jax-privacy",
    "kfac_jax": "pip install --no-deps kfac-jax tfp-nightly distrax immutabledict",
}


def peer(name):
    try:
        module = importlib.import_module(name)
    except Exception as error:  # it isn't installed, or not for this JAX
        pytest.skip(f"{PEERS[name]}  ({error!r})")
    if name == "kfac_jax":
        from kfac_jax._src import tag_graph_matcher

        add = jax.make_jaxpr(jnp.add)(1.0, 1.0).eqns[0]
        try:
            tag_graph_matcher.eval_jaxpr_eqn(add, [1.0, 1.0])
        except (TypeError, ValueError) as error:
            pytest.skip(
                "kfac-jax takes two values from get_bind_params, which from JAX 0.10 on returns "
                f"one, in tag_graph_matcher.eval_jaxpr_eqn  ({error!r})"
            )
    return module


def close(ours, theirs, rtol=1e-10):
    """Array by array, on the scale of its largest entry."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


# ------------------------------------------------------------------------------------- networks
#
# Parameters are (weight, bias) of each layer, in PyTorch's layouts and order: convolutions
# 3 × 3, of stride 2 and padded by 1, then dense layers, one activation between any two.

N, CLASSES = 5, 3
MLP = ([(6, 4), (5, 6), (CLASSES, 5)], (1, 1, 1), (4,))
CNN = ([(3, 2, 3, 3), (4, 3, 3, 3), (CLASSES, 16)], (9, 4, 1), (2, 5, 5))
NETWORKS = {  # name: (weights' shapes, positions that each is used at, input's shape), activation
    "MLP, tanh": (MLP, "tanh"),
    "MLP, relu": (MLP, "relu"),
    "CNN, sigmoid": (CNN, "sigmoid"),
    "CNN, relu": (CNN, "relu"),
}
ACTIVATIONS = {  # JAX's, PyTorch's
    "tanh": (jnp.tanh, "Tanh"),
    "relu": (jax.nn.relu, "ReLU"),
    "sigmoid": (jax.nn.sigmoid, "Sigmoid"),
}
LOSSES = {  # ours, PyTorch's, kfac-jax's
    "softmax": (ops.softmax_cross_entropy, "CrossEntropyLoss", "softmax_cross_entropy"),
    "squares": (ops.squared_error, "MSELoss", "squared_error"),
}
CASES = [
    ("MLP, tanh", "softmax"),
    ("MLP, tanh", "squares"),
    ("MLP, relu", "softmax"),
    ("CNN, sigmoid", "softmax"),
    ("CNN, relu", "squares"),
]
cases = pytest.mark.parametrize(("network", "loss"), CASES, ids=[", ".join(c) for c in CASES])
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


def normal(seed, *shape, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def setting(network, loss):
    """`(model, loss, parameters, batch)`, ours."""
    (shapes, _, input_shape), activation = NETWORKS[network]

    def model(p, x):
        for i, (W, b) in enumerate(p):
            x = x if i == 0 else ACTIVATIONS[activation][0](x)
            if W.ndim == 4:
                x = lax.conv_general_dilated(x[None], W, (2, 2), [(1, 1)] * 2)[0] + b[:, None, None]
            else:
                x = W @ x.reshape(-1) + b
        return x

    weights = [normal(i, *s, scale=math.prod(s[1:]) ** -0.5) for i, s in enumerate(shapes)]
    p = [(W, normal(10 + i, len(W), scale=0.3)) for i, W in enumerate(weights)]
    targets = jnp.arange(N) % CLASSES if loss == "softmax" else normal(21, N, CLASSES)
    return model, LOSSES[loss][0], p, (normal(20, N, *input_shape), targets)


def direction(p):
    leaves, tree = jax.tree.flatten(p)
    return jax.tree.unflatten(tree, [normal(30 + k, *x.shape) for k, x in enumerate(leaves)])


def loss_of_example(model, loss):
    return lambda p, example: loss(model(p, example[0]), example[1])


def tensor(x):
    import torch

    return torch.tensor(np.array(x))


def in_torch(network, loss, reduction, adapt=lambda module: module):
    """`(network, loss, inputs, targets, s)`, PyTorch's, with the same parameters.

    Its loss is s times the SUM of ours: s is 1 for a sum and 1/N for a mean, but MSELoss takes
    the mean over the outputs, too.
    """
    from torch import nn

    _, _, p, batch = setting(network, loss)
    layers = []
    for W, b in p:
        out, ins = W.shape[:2]
        layers += [getattr(nn, ACTIVATIONS[NETWORKS[network][1]][1])()] if layers else []
        layers += (
            [nn.Conv2d(ins, out, 3, 2, 1)] if W.ndim == 4 else [nn.Flatten(), nn.Linear(ins, out)]
        )
        layers[-1].weight, layers[-1].bias = nn.Parameter(tensor(W)), nn.Parameter(tensor(b))
    measure = getattr(nn, LOSSES[loss][1])(reduction=reduction)
    entries = N * (CLASSES if loss == "squares" else 1)
    s = 1 / entries if reduction == "mean" else 1
    return adapt(nn.Sequential(*layers)), adapt(measure), *map(tensor, batch), s


@functools.cache
def ours(network, loss):
    """All that the peers are compared with, compiled at once."""
    model, f, p, batch = setting(network, loss)
    leaves, tree = jax.tree.flatten(direction(p))
    # Directions along one parameter each: what they give in it is its block of a matrix.
    each = [
        jnp.stack([v if i == k else 0 * v for i in range(len(leaves))])
        for k, v in enumerate(leaves)
    ]

    @jax.jit
    def everything(p, batch):
        losses = loss_of_example(model, f)
        _, g = pe.grads(losses)(p, batch)
        norms = pe.norms(g)
        clip = jnp.mean(norms)  # some are longer
        alone = lambda of: jax.vmap(lambda *e: of(p, jax.tree.map(lambda x: x[None], e)))(*batch)
        product = lambda name: getattr(curvature, f"{name}_vector_product")(model, f)(p, batch)
        along = lambda A: A(jax.tree.unflatten(tree, leaves))
        blocks = lambda A: [
            x[k] for k, x in enumerate(jax.tree.leaves(jax.vmap(A)(jax.tree.unflatten(tree, each))))
        ]
        return {
            "gradients": pe.materialize(g),
            "squared norms": jax.tree.map(jnp.square, pe.norms(g, by="leaf")),
            "second moment": pe.second_moment(g),
            "variance": pe.variance(g),
            "clip": clip,
            "clipped": pe.clipped_grad(losses, clip)(p, batch),
            "clipped as by Opacus": pe.weighted_sum(g, jnp.minimum(1, clip / (norms + 1e-6))),
            "GGN": along(product("ggn")),
            "Fisher": along(product("fisher")),
            "Hessian": along(product("hessian")),
            "GGN, blocks": blocks(product("ggn")),
            "Hessian, blocks": blocks(product("hessian")),
            "GGN, diagonal": curvature.ggn_diagonal(model, f)(p, batch),
            "GGN, diagonals": alone(curvature.ggn_diagonal(model, f)),
            "Hessian, diagonal": curvature.hessian_diagonal(model, f)(p, batch),
            "Hessian, diagonals": alone(curvature.hessian_diagonal(model, f)),
            "Gram matrix": curvature.ggn_gram(model, f)(p, batch),
            "expand": curvature.kronecker_factors(model, f)(p, batch),
            "reduce": curvature.kronecker_factors(model, f, kind="reduce")(p, batch),
        }

    return everything(p, batch)


# ------------------------------------------------------------------------------------- BackPACK


def by_backpack(extension, field, network, loss, reduction, **options):
    """What the extension leaves in each parameter's field, and s as in `in_torch`."""
    backpack = peer("backpack")
    net, measure, x, y, s = in_torch(network, loss, reduction, backpack.extend)
    with backpack.backpack(getattr(backpack.extensions, extension)(**options)):
        measure(net(x), y).backward()
    return [getattr(w, field) for w in net.parameters()], s


EXTENSIONS = {  # name: (its field, ours, the factor that theirs has over ours)
    # Of the summands of PyTorch's loss, which are s times ours.
    "BatchGrad": ("grad_batch", "gradients", lambda s: s),
    "BatchL2Grad": ("batch_l2", "squared norms", lambda s: s**2),
    "SumGradSquared": ("sum_grad_squared", "second moment", lambda s: s**2 * N),  # ours: a mean
    "Variance": ("variance", "variance", lambda s: s**2),
    "BatchDiagGGNExact": ("diag_ggn_exact_batch", "GGN, diagonals", lambda s: s),
    "BatchDiagHessian": ("diag_h_batch", "Hessian, diagonals", lambda s: s),
    # Of PyTorch's whole loss, which is s N times ours, a mean.
    "DiagGGNExact": ("diag_ggn_exact", "GGN, diagonal", lambda s: s * N),
    "DiagHessian": ("diag_h", "Hessian, diagonal", lambda s: s * N),
    "GGNMP": ("ggnmp", "GGN, blocks", lambda s: s * N),
    "HMP": ("hmp", "Hessian, blocks", lambda s: s * N),
}


@cases
@reductions
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_equal_to_backpacks_extension(network, loss, reduction, extension):
    field, name, factor = EXTENSIONS[extension]
    theirs, s = by_backpack(extension, field, network, loss, reduction)
    if extension in ("GGNMP", "HMP"):  # functions of stacked directions
        along = map(tensor, jax.tree.leaves(direction(setting(network, loss)[2])))
        theirs = [product(v[None])[0] for product, v in zip(theirs, along, strict=True)]
    found = jax.tree.leaves(ours(network, loss)[name])
    close([factor(s) * x for x in found], [t.detach() for t in theirs])


@cases
@reductions
def test_products_equal_backpacks_hessianfree_ones(network, loss, reduction):
    peer("backpack")
    from backpack.hessianfree.ggnvp import ggn_vector_product
    from backpack.hessianfree.hvp import hessian_vector_product

    net, measure, x, y, s = in_torch(network, loss, reduction)
    v = [*map(tensor, jax.tree.leaves(direction(setting(network, loss)[2])))]
    z = net(x)
    value = measure(z, y)
    found = ours(network, loss)
    for name, theirs in {
        "GGN": ggn_vector_product(value, z, net, v),
        "Hessian": hessian_vector_product(value, list(net.parameters()), v),
    }.items():
        close([s * N * x for x in jax.tree.leaves(found[name])], [t.detach() for t in theirs])


dense = jax.jit(lambda factors: factors.to_dense())


@cases
@reductions
def test_kronecker_factors_equal_backpacks_kflr(network, loss, reduction):
    theirs, s = by_backpack("KFLR", "kflr", network, loss, reduction)
    found = ours(network, loss)
    layers = zip(NETWORKS[network][0][1], found["expand"], found["reduce"], strict=True)
    for i, (positions, (expand, bias), (reduce, _)) in enumerate(layers):
        G, A = theirs[2 * i]
        # BackPACK's A is the SUM of positions' a aᵀ, where "expand" has their mean; and its G is
        # of the positions' sums, as that of "reduce" is.
        weight = dataclasses.replace(expand, A=positions * expand.A, G=reduce.G)
        close(s * N * dense(weight), np.kron(G, A))
        close(s * N * dense(bias), theirs[2 * i + 1][0])


@cases
def test_the_gram_matrix_has_the_eigenvalues_of_backpacks_root(network, loss):
    theirs, s = by_backpack("SqrtGGNExact", "sqrt_ggn_exact", network, loss, "sum")
    V = np.concatenate([t.reshape(N * CLASSES, -1) for t in theirs], axis=1)
    values = np.linalg.eigvalsh(V @ V.T)
    # Softmax has one column less here, so that theirs has zeros more.
    found = np.linalg.eigvalsh(s * N * ours(network, loss)["Gram matrix"])
    close(np.concatenate([np.zeros(len(values) - len(found)), found]), values)


@pytest.mark.parametrize("loss", LOSSES)
def test_sampled_curvature_tends_to_what_backpacks_does(loss):
    peer("backpack")
    import torch

    torch.manual_seed(0)
    samples = 20_000
    model, f, p, batch = setting("MLP, tanh", loss)
    draw = {"key": jax.random.key(0), "samples": samples}
    case = ("MLP, tanh", loss, "mean")

    def near(ours, theirs):
        assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)

    theirs, s = by_backpack("DiagGGNMC", "diag_ggn_mc", *case, mc_samples=samples)
    diagonal = jax.jit(curvature.ggn_diagonal(model, f, **draw))(p, batch)
    for a, b in zip(jax.tree.leaves(diagonal), theirs, strict=True):
        near(s * N * a, b.numpy())
    theirs, s = by_backpack("KFAC", "kfac", *case, mc_samples=samples)
    factors = jax.jit(curvature.kronecker_factors(model, f, **draw))(p, batch)
    for i, (weight, bias) in enumerate(factors):
        near(s * N * dense(weight), np.kron(*theirs[2 * i]))
        near(s * N * dense(bias), theirs[2 * i + 1][0].numpy())


# ----------------------------------------------------------------------- Opacus and jax-privacy


@cases
@reductions
def test_gradients_equal_opacus_hooks(network, loss, reduction):
    opacus = peer("opacus")
    net, measure, x, y, s = in_torch(network, loss, reduction)
    net = opacus.GradSampleModule(net, loss_reduction=reduction)
    measure(net(x), y).backward()
    # Under "mean" it multiplies by N.
    factor = s * (N if reduction == "mean" else 1)
    found = jax.tree.leaves(ours(network, loss)["gradients"])
    close([factor * g for g in found], [w.grad_sample for w in net.parameters()])


def by_opacus_hooks(net, measure, x, y, clip):
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from torch.optim import SGD

    net = GradSampleModule(net, loss_reduction="sum")
    options = {"noise_multiplier": 0.0, "max_grad_norm": clip, "expected_batch_size": N}
    optimizer = DPOptimizer(SGD(net.parameters(), lr=0.0), loss_reduction="sum", **options)
    measure(net(x), y).backward()
    optimizer.clip_and_accumulate()
    return [w.summed_grad for w in net.parameters()]


def by_opacus_ghosts(net, measure, x, y, clip):
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
    from torch.optim import SGD

    sums = {"loss_reduction": "sum"}
    net = GradSampleModuleFastGradientClipping(
        net, max_grad_norm=clip, use_ghost_clipping=True, **sums
    )
    options = {"noise_multiplier": 0.0, "max_grad_norm": clip, "expected_batch_size": N}
    optimizer = DPOptimizerFastGradientClipping(SGD(net.parameters(), lr=0.0), **options, **sums)
    DPLossFastGradientClipping(net, optimizer, measure, **sums)(net(x), y).backward()
    return [w.grad for w in net.parameters()]


@pytest.mark.parametrize(
    ("network", "loss", "clipped"),
    [(*c, by_opacus_hooks) for c in CASES]
    # Its ghosts want one number for each example, where MSELoss gives one for each output.
    + [(*c, by_opacus_ghosts) for c in CASES if c[1] == "softmax"],
)
def test_the_clipped_sum_equals_opacus(network, loss, clipped):
    peer("opacus")
    found = ours(network, loss)
    theirs = clipped(*in_torch(network, loss, "sum")[:-1], float(found["clip"]))
    # It scales by C / (|g| + 10⁻⁶), we by C / |g|.
    close(jax.tree.leaves(found["clipped as by Opacus"]), theirs)
    close(jax.tree.leaves(found["clipped"].gradient), theirs, 1e-5)


@cases
def test_the_clipped_sum_equals_jax_privacys(network, loss):
    jax_privacy = peer("jax_privacy")
    model, f, p, batch = setting(network, loss)
    found = ours(network, loss)
    clipped_grad = jax_privacy.clipped_grad(
        loss_of_example(model, f),
        l2_clip_norm=float(found["clip"]),
        keep_batch_dim=False,
        return_values=True,
        return_grad_norms=True,
    )
    theirs, aux = jax.jit(clipped_grad)(p, batch)
    close(found["clipped"].gradient, theirs)
    close(found["clipped"].losses, aux.values)
    np.testing.assert_allclose(found["clipped"].norms, aux.grad_norms, 1e-6)  # theirs in float32


# ------------------------------------------------------------------------------------- kfac-jax


def in_its_layout(p):
    """(out, in) becomes (in, out), and (out, in, height, width) (height, width, in, out)."""
    return [(jnp.moveaxis(W, (0, 1), (-1, -2)), b) for W, b in p]


def in_ours(p):
    return [(jnp.moveaxis(W, (-1, -2), (0, 1)), b) for W, b in p]


def for_kfac_jax(network, loss):
    """The mean loss as a function of parameters in kfac-jax's layout, its layers registered."""
    kfac_jax = peer("kfac_jax")
    activation, _ = ACTIVATIONS[NETWORKS[network][1]]
    _, f, p, batch = setting(network, loss)

    def mean_loss(p, batch):
        z, targets = batch
        for i, (W, b) in enumerate(p):
            x = z if i == 0 else activation(z)
            if W.ndim == 4:
                options = {
                    "window_strides": (2, 2),
                    "padding": ((1, 1), (1, 1)),
                    "dimension_numbers": lax.conv_dimension_numbers(
                        x.shape, W.shape, ("NCHW", "HWIO", "NCHW")
                    ),
                }
                z = lax.conv_general_dilated(x, W, **options) + b[:, None, None]
                z = kfac_jax.register_conv2d(z, x, W, b, **options)
            else:
                x = x.reshape(N, -1)
                z = kfac_jax.register_dense(x @ W + b, x, W, b)
        getattr(kfac_jax, f"register_{LOSSES[loss][2]}_loss")(z, targets)
        return jnp.mean(jax.vmap(f)(z, targets))

    return kfac_jax, mean_loss, (in_its_layout(p), batch)


@cases
def test_products_equal_kfac_jaxs(network, loss):
    kfac_jax, mean_loss, args = for_kfac_jax(network, loss)
    exact = kfac_jax.ImplicitExactCurvature(mean_loss)
    v = in_its_layout(direction(in_ours(args[0])))
    for name in ("GGN", "Fisher", "Hessian"):
        theirs = jax.jit(getattr(exact, f"multiply_{name.lower()}"))(args, v)
        close(ours(network, loss)[name], in_ours(theirs))


@cases
def test_kronecker_factors_equal_kfac_jaxs(network, loss):
    kfac_jax, mean_loss, args = for_kfac_jax(network, loss)
    estimator = kfac_jax.BlockDiagonalCurvature(mean_loss, auto_register_tags=False)
    estimator.finalize(args)
    key = jax.random.PRNGKey(0)

    @jax.jit
    def product(args, v):
        state = estimator.init(key, args, None, None)
        state = estimator.update_curvature_matrix_estimate(
            state, 0.0, 1.0, 0.0, N, key, args, estimation_mode="ggn_exact"
        )
        return estimator.multiply(state, v, 0.0, True, False, None)

    # It folds a bias into its weight's factor A: we give a direction to one of them at a time.
    v = direction(in_ours(args[0]))
    of_weights = in_ours(product(args, in_its_layout([(W, 0 * b) for W, b in v])))
    of_biases = product(args, in_its_layout([(0 * W, b) for W, b in v]))
    for i, (weight, bias) in enumerate(ours(network, loss)["expand"]):
        close(weight.times(v[i][0]), of_weights[i][0])
        if len(weight.shape) == 2:  # for a convolution's bias we have the exact block
            close(bias.times(v[i][1]), of_biases[i][1])
