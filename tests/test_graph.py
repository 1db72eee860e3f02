"""`fnn.graph`: its nodes, values, gradients, steps and tables against jax.grad and the lecture."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from sweeps import exhaustive

import fnn
from fnn.backprop.primitives import RULES
from fnn.backprop.steps import Step
from fnn.eager import apply


def circuit(x, y, z):
    q = x + y
    f = q * z
    return f


def neuron(w0, x0, w1, x1, w2):
    s = w0 * x0 + w1 * x1 + w2
    f = 1 / (1 + jnp.exp(-s))
    return f


def mlp(params, x, label):
    h = jax.nn.relu(params["hidden"]["W"] @ x + params["hidden"]["b"])
    logits = params["output"]["W"] @ h + params["output"]["b"]
    return -jax.nn.log_softmax(logits)[label]


def mlp_arguments():
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    params = {
        "hidden": {"W": jax.random.normal(k1, (5, 4)), "b": jnp.full(5, 0.1)},
        "output": {"W": jax.random.normal(k2, (3, 5)), "b": jnp.zeros(3)},
    }
    return params, jax.random.normal(k3, (4,)), 1


def recurrent(W, xs):
    def step(h, x):
        h = jnp.tanh(W @ h + x)
        return h, h.sum()

    h, ys = lax.scan(step, jnp.zeros(3), xs)
    return h.sum() + (ys**2).mean()


def tied(W, x):
    return jnp.sum(W.T @ jnp.tanh(W @ (W @ x)))


def branching(x):
    return lax.cond(x.sum() > 0, lambda x: jnp.sin(x).sum(), lambda x: (x**2).sum(), x * 2)


def checkpointed(x):
    return jax.checkpoint(lambda x: jnp.sin(jnp.exp(x)))(x).sum()


def sorted_and_split(x):
    low, high = jnp.split(jnp.sort(x), 2)
    return (low * high).sum() + low[0]


@jax.custom_vjp
def shouting(x):
    return 2 * x


shouting.defvjp(lambda x: (2 * x, None), lambda _, g: (20 * g,))


@fnn.rule
def cube(x, *, scale=1.0):
    return scale * x**3


@cube.backward
def _(residuals, g, *, scale):
    (x,) = residuals
    return (3 * scale * x**2 * g,)


def custom(x):
    return cube(shouting(jax.nn.silu(x)), scale=0.5).sum()


FUNCTIONS = {
    "circuit": (circuit, (-2.0, 5.0, -4.0)),
    "neuron": (neuron, (2.0, -1.0, -3.0, -2.0, -3.0)),
    "mlp": (mlp, mlp_arguments()),
    "recurrent": (recurrent, (jnp.eye(3) / 2 + 0.1, jnp.linspace(-1, 1, 12).reshape(4, 3))),
    "tied": (tied, (jnp.arange(9.0).reshape(3, 3) / 9, jnp.array([1.0, -1.0, 0.5]))),
    "branching": (branching, (jnp.array([1.0, 2.0]),)),
    "checkpointed": (checkpointed, (jnp.array([0.5, -0.2]),)),
    "sorted_and_split": (sorted_and_split, (jnp.array([3.0, -1.0, 2.0, 0.5]),)),
    "custom": (custom, (jnp.array([0.5, -0.2]),)),
    "jitted": (jax.jit(circuit), (-2.0, 5.0, -4.0)),
    "vmapped": (lambda x: jax.vmap(cube)(jnp.sin(x)).mean(), (jnp.arange(3.0),)),
    "complex": (lambda x: jnp.abs(jnp.fft.fft(x) * 1j).sum(), (jnp.array([1.0, 2.0, 4.0]),)),
    "float16": (lambda x: (x * x).sum(), (jnp.arange(4, dtype=jnp.float16),)),
}


def perturbed(graph, perturbations):
    """The graph's output if something is added to values on the way; `{place: what to add}`."""
    flat = graph.program
    values = flat.values([node.value for node in graph.inputs])
    for place in flat.inputs:
        values[place] = values[place] + perturbations.get(place, 0)
    for equation in flat.equations:
        outs = apply(equation, [values[i] for i in equation.ins])
        for i, y in zip(equation.outs, outs, strict=True):
            values[i] = y + perturbations[i] if i in perturbations else y
    return values[flat.outputs[0]]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_value_and_every_gradient_are_jax_own(name):
    function, args = FUNCTIONS[name]
    graph = fnn.graph(function)(*args).backprop()
    np.testing.assert_allclose(graph.value, function(*args), rtol=1e-3 if name == "float16" else 0)
    nodes = graph._by_place
    nothing = {i: jnp.zeros(n.shape, n.dtype) for i, n in nodes.items() if n.differentiable}
    want = jax.grad(lambda perturbations: perturbed(graph, perturbations))(nothing)
    assert want
    for place, node in nodes.items():
        assert node.value.shape == node.shape and node.value.dtype == node.dtype
        if place not in want:
            assert node.gradient is None
            continue
        assert node.gradient.dtype == node.dtype
        np.testing.assert_allclose(node.gradient, want[place], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nodes_are_in_topological_order_and_steps_add_up(name):
    function, args = FUNCTIONS[name]
    graph = fnn.graph(function)(*args).backprop()
    for number, node in enumerate(graph.nodes):
        assert node.number == number and graph[number] is node
        assert all(n.number is None or n.number < number for n in node.inputs)
    totals = {}
    for step in graph.steps():
        assert step.product.shape == step.input.shape
        assert str(step).startswith(f"∂{graph.of}/∂{step.input.label} ")
        totals[step.input] = step
    for node in graph:
        if node in totals:
            np.testing.assert_allclose(totals[node].total, node.gradient, rtol=1e-6)
            assert totals[node].use == totals[node].uses


def test_the_circuit_of_the_lecture():
    graph = fnn.graph(circuit)(-2.0, 5.0, -4.0)
    assert [n.label for n in graph.nodes] == ["x", "y", "z", "q", "f"]
    assert [n.operation for n in graph.nodes] == ["input", "input", "input", "add", "mul"]
    assert [float(n.value) for n in graph.nodes] == [-2, 5, -4, 3, -12]
    assert graph["q"].inputs == (graph["x"], graph["y"])
    assert graph["x"].gradient is None
    assert graph.backprop() is graph
    assert [float(n.gradient) for n in graph.inputs] == [-4, -4, 3]
    assert float(graph["q"].gradient) == -4 and float(graph["f"].gradient) == 1
    assert graph["f"].source.startswith("test_graph.py:")
    assert graph["f"].source.endswith("(circuit)")
    assert [str(step) for step in graph.steps()] == [
        "∂f/∂q = ∂f/∂f · ∂f/∂q = 1 · -4 = -4",
        "∂f/∂z = ∂f/∂f · ∂f/∂z = 1 · 3 = 3",
        "∂f/∂x = ∂f/∂q · ∂q/∂x = -4 · 1 = -4",
        "∂f/∂y = ∂f/∂q · ∂q/∂y = -4 · 1 = -4",
    ]
    assert [step.local_gradient for step in graph.steps()] == ["z", "q", "1", "1"]


def test_the_sigmoid_neuron_of_the_lecture():
    graph = fnn.graph(neuron)(2.0, -1.0, -3.0, -2.0, -3.0).backprop()
    assert round(float(graph.value), 2) == 0.73
    want = {"w0": -0.20, "x0": 0.39, "w1": -0.39, "x1": -0.59, "w2": 0.20}
    assert {n.label: round(float(n.gradient), 2) for n in graph.inputs} == want
    # The slides' numbers along the circuit, from the output back to the sum.
    backwards = [round(float(n.gradient), 2) for n in reversed(graph.nodes[5:])]
    assert backwards == [1.0, -0.53, -0.53, -0.20, 0.20, 0.20, 0.20, 0.20]


def test_the_table_is_aligned_and_holds_everything():
    graph = fnn.graph(circuit)(-2.0, 5.0, -4.0)
    assert "gradient" not in str(graph)  # nothing to show before backprop
    title, header, rule, *rows = str(graph.backprop()).splitlines()
    assert title == "circuit(x, y, z): 3 inputs, 2 operations"
    dtype = graph["x"].dtype.name
    assert " ".join(header.split()) == "# name operation inputs shape dtype value gradient source"
    assert rows[0].split() == ["0", "x", "()", dtype, "-2", "-4"]
    assert rows[3].split()[:9] == ["3", "q", "add", "x,", "y", "()", dtype, "3", "-4"]
    assert rows[4].split()[:9] == ["4", "f", "mul", "q,", "z", "()", dtype, "-12", "1"]
    column = header.index("gradient")
    assert rows[3][column:].startswith("-4") and rows[4][column:].startswith("1")
    assert set(rule) == {"─", " "}


def test_arrays_are_shown_by_their_range_and_their_gradients_by_their_norm():
    graph = fnn.graph(lambda x: (x**2).sum())(jnp.arange(5.0)).backprop()
    text = str(graph)
    assert "0 … 4" in text and "0 … 16" in text
    assert f"‖g‖ {np.linalg.norm(2 * np.arange(5)):.3g}" in text
    broken = str(fnn.graph(jnp.log)(jnp.array([-1.0, 0.0, 1.0, 2.0])))
    assert "0 … 0.693, 1 NaN, 1 -inf" in broken


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "complex64"])
def test_what_is_not_finite_is_counted_with_its_sign(dtype):
    x = jnp.full((4, 5), -jnp.inf).at[0].set(jnp.arange(5.0) - 1).astype(dtype)
    (row,) = [line for line in str(fnn.graph(lambda x: x)(x)).splitlines() if " x " in line]
    if dtype == "complex64":
        assert "15 inf" in row
    else:
        assert "-1 … 3, 15 -inf" in row
        assert "all -inf" in str(fnn.graph(lambda x: x)(x[1]))
    both = jnp.array([jnp.inf, 7, jnp.nan, -jnp.inf, jnp.inf]).astype("float32")
    assert "7, 1 NaN, 2 inf, 1 -inf" in str(fnn.graph(lambda x: x)(both))
    assert "15 -inf" not in str(fnn.graph(lambda x: x)(jnp.ones((4, 5), "int32")))


def test_norms_of_large_and_small_gradients():
    with jax.enable_x64(True):
        for size in (1e-200, 1e-12, 1e12, 1e200):
            graph = fnn.graph(lambda x, size=size: (x * size).sum())(jnp.ones(16)).backprop()
            assert f"‖g‖ {4 * size:.3g}" in str(graph)


def test_many_values_of_one_name_are_numbered_in_little_time():
    def function(h):
        for _ in range(3000):
            h = h * 1.0001
        return h

    began = time.process_time()
    graph = fnn.graph(function)(1.0)
    assert time.process_time() - began < 20
    assert [n.label for n in graph][:3] == ["h", "h₂", "h₃"] and graph["h₃₀₀₁"] is graph[-1]
    assert "operations have" in repr(graph.coverage())


@exhaustive
def test_printed_within_a_screen():
    """A graph, a node and a step with hundreds of inputs."""
    params = {f"layer_{i}": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for i in range(200)}

    def many(params, xs):
        def step(h, x):
            for p in params.values():
                h = h @ p["kernel"] + p["bias"]
            return h, h * x

        return lax.scan(step, jnp.zeros(2), xs)[1].sum()

    graph = fnn.graph(many)(params, jnp.ones((3, 2)))
    scan = next(n for n in graph if n.operation == "scan")
    assert len(scan.inputs) > 400
    assert len(repr(graph)) < 400 and len(repr(scan)) < 300
    head = str(graph).split("\n\n")[0]
    assert max(map(len, head.splitlines())) < 220
    assert "… and 3" in next(line for line in head.splitlines() if " scan[" in line)
    for step in (*graph.backprop().steps(),)[:3]:
        assert len(repr(step)) < 500 and "\n" not in repr(step)


def test_inputs_are_called_by_their_path():
    arguments = FUNCTIONS["mlp"][1]
    graph = fnn.graph(mlp)(*arguments).backprop()
    want = jax.grad(mlp)(*arguments)
    for name in ("hidden", "output"):
        got = graph[f"params['{name}']['W']"].gradient
        np.testing.assert_allclose(got, want[name]["W"], rtol=1e-12)
    assert graph["label"].gradient is None
    assert graph["h"].operation == "relu"
    assert graph["logits"].inputs[-1].label == "params['output']['b']"

    def rest(first, *others, key=0.0, **options):
        return first + others[0] + others[1]["a"] + key + options["scale"]

    labels = [n.label for n in fnn.graph(rest)(1.0, 2.0, {"a": 3.0}, scale=4.0, key=5.0).inputs]
    assert labels == ["first", "others[0]", "others[1]['a']", "key", "scale"]
    assert [n.label for n in fnn.graph(circuit)(z=1.0, y=2.0, x=3.0).inputs] == ["x", "y", "z"]


def test_values_get_the_names_of_the_source():
    def function(x):
        h = jnp.tanh(x)
        h = jnp.tanh(h * 2)
        a, b = jnp.sin(h), jnp.cos(h)
        first = jnp.stack([a, b])[0]
        first += 1
        return first

    graph = fnn.graph(function)(1.0)
    labels = [n.label for n in graph]
    assert labels.count("h") == 1 and labels[-1] == "first₂"
    h = math.tanh(2 * math.tanh(1.0))  # the second; of two targets each has its own value
    want = {"h₂": h, "a": math.sin(h), "b": math.cos(h), "first": math.sin(h)}
    assert {name: float(graph[name].value) for name in want} == pytest.approx(want, rel=1e-6)


def test_numbers_in_the_source_are_no_nodes():
    graph = fnn.graph(lambda x: 2 * x + 1)(3.0)
    assert [n.operation for n in graph] == ["input", "mul", "add"]
    two, x = graph[1].inputs
    assert (two.label, two.operation, two.number) == ("2", "constant", None)
    assert x is graph["x"]
    closed_over = jnp.ones(3)
    graph = fnn.graph(lambda x: (x * closed_over).sum())(2.0 * closed_over).backprop()
    np.testing.assert_array_equal(graph["x"].gradient, jnp.ones(3))


def test_uses_of_a_value_add_up():
    graph = fnn.graph(lambda x: x * x + jnp.sin(x))(3.0)
    steps = [step for step in graph.steps() if step.input.label == "x"]
    assert [step.use for step in steps] == [1, 2, 3] and {step.uses for step in steps} == {3}
    assert [round(float(step.product), 3) for step in steps] == [round(math.cos(3), 3), 3, 3]
    assert str(steps[0]).endswith("+= ∂f/∂v2 · ∂v2/∂x = 1 · -0.99 = -0.99")
    assert str(steps[2]).endswith("= 1 · 3 = 3   (in sum 2.01 + 3 = 5.01)")
    assert steps[0].local_gradient == "cos(x)"
    np.testing.assert_allclose(steps[2].total, 6 + math.cos(3), rtol=1e-12)


def test_several_outputs_and_their_seeds():
    def function(x, w):
        y = w * x
        return {"loss": (y**2).sum(), "y": y, "count": jnp.arange(3)}

    x, w = jnp.arange(3.0), jnp.array([1.0, -1.0, 2.0])
    seed = {"loss": 2.0, "y": jnp.array([1.0, 0.0, -1.0]), "count": None}
    graph = fnn.graph(function)(x, w).backprop(seed)
    assert graph.of == "L" and len(graph.outputs) == 3
    value, pullback = jax.vjp(lambda x, w: (function(x, w)["loss"], function(x, w)["y"]), x, w)
    want = pullback((jnp.asarray(2.0), seed["y"]))
    for node, gradient in zip(graph.inputs, want, strict=True):
        np.testing.assert_allclose(node.gradient, gradient, rtol=1e-12)
    np.testing.assert_allclose(graph.value["y"], value[1])
    # An output that is used again begins with its seed.
    (step,) = [step for step in graph.steps() if step.input.label == "y"]
    np.testing.assert_array_equal(step.before, seed["y"])
    np.testing.assert_allclose(step.total, graph["y"].gradient)

    only_y = fnn.graph(function)(x, w).backprop({"loss": None, "y": seed["y"], "count": None})
    np.testing.assert_allclose(only_y["w"].gradient, seed["y"] * x)
    np.testing.assert_allclose(fnn.graph(jnp.sin)(x).backprop(jnp.ones(3))[0].gradient, jnp.cos(x))


def test_local_gradients():
    x = jnp.array([0.3, -1.0, 2.0])
    W = jnp.arange(6.0).reshape(2, 3)

    def function(x, W):
        return cube(W @ jnp.sin(x)).sum()

    steps: list[Step] = list(fnn.graph(function)(x, W).steps())
    by_name = {(s.node.operation, s.input.label): s for s in steps}
    np.testing.assert_allclose(by_name["sin", "x"].local, jnp.cos(x))
    (product,) = [s for s in steps if s.node.operation == "dot_general" and s.position == 1]
    np.testing.assert_allclose(product.local, W)
    jacobian = jax.jacobian(lambda W: W @ jnp.sin(x))(W)
    np.testing.assert_allclose(by_name["dot_general", "W"].local, jacobian)
    (operation,) = [s for s in steps if s.node.operation == "cube"]
    z = W @ jnp.sin(x)
    np.testing.assert_allclose(operation.local, jnp.diag(3 * z**2))
    assert operation.local_gradient == "the hand-written backward of cube"
    large = fnn.graph(lambda x: jnp.cumsum(x).sum())(jnp.ones(100)).steps()
    assert [s.local is None for s in large] == [False, True]

    split = next(
        s for s in fnn.graph(sorted_and_split)(x=jnp.arange(4.0)).steps() if len(s.nodes) > 1
    )
    assert [j.shape for j in split.local] == [(2, 4), (2, 4)]
    assert "∂(" in str(split)


def test_steps_of_arrays_are_spelled_out_in_shapes_and_words():
    W, x = jnp.ones((2, 3)), jnp.ones(3)
    lines = [str(step) for step in fnn.graph(lambda W, x: (W @ x).sum())(W, x).steps()]
    assert lines[0] == "∂f/∂v2 = ∂f/∂f · ∂f/∂v2: () 1 → (2,) [1, 1], local gradient 1"
    assert lines[1].startswith("∂f/∂W = ∂f/∂v2 · ∂v2/∂W: (2,) [1, 1] → (2, 3) ‖g‖ 2.45, ")


def test_words_name_the_exponents_too():
    graph = fnn.graph(lambda x, b: (x**3) ** b)(jnp.array([1.0, 2.0]), jnp.array([2.0, 3.0]))
    words = [step.local_gradient for step in graph.backprop(jnp.ones(2)).steps()]
    assert words == ["b v2^(b − 1)", "v2^b log(v2)", "3 x^(3 − 1)"]


@pytest.mark.parametrize("seed", [1j, np.complex64(1), jnp.array(1j)])
def test_a_real_output_takes_no_complex_seed(seed):
    with pytest.raises(TypeError, match="the seed of f is complex, but it is float"):
        fnn.graph(lambda x: x * x)(2.0).backprop(seed)


@exhaustive
def test_rules_with_a_forward_of_their_own_say_their_local_gradient_too():
    holding_functions = {"scan", "cond", "while", "remat2", "checkpoint"}
    written_by_others = {"custom_jvp_call", "custom_vjp_call"}
    written_by_others |= {"call_hi_primitive", "call_hi_primitive_linearized"}
    silent = {name for name, rule in RULES.items() if not rule.local_gradient}
    assert silent == holding_functions | written_by_others

    def local_gradients(function, *args):
        return [step.local_gradient for step in fnn.graph(function)(*args).steps()]

    x = jnp.array([0.3, -1.0, 2.0])
    assert local_gradients(lambda x: x.prod(), x) == ["Π of the others"]
    assert local_gradients(lambda x: jnp.sort(x)[0], x)[-1] == "g back at its place"
    write = lambda x, u: x.at[jnp.array([0, 2])].set(u).sum()
    assert local_gradients(write, x, x[:2])[1:] == [
        "1, and 0 where overwritten",
        "g[i] where u was the last one",
    ]
    A = jnp.diag(x) + 0.1
    decomposed = local_gradients(lambda A: jnp.linalg.qr(A)[1].sum(), A)
    assert "[Q̄ + Q sym(R̄ Rᴴ - Qᴴ Q̄)] R⁻ᴴ" in decomposed


def test_control_flow_holds_graphs():
    graph = fnn.graph(recurrent)(*FUNCTIONS["recurrent"][1]).backprop()
    scan = next(n for n in graph if n.operation == "scan")
    (body,) = scan.graphs.values()
    assert [n.label for n in body.inputs] == ["W", "carry[0]", "x[0]"]
    assert [n.operation for n in body if n.equation] == ["dot_general", "add", "tanh", "reduce_sum"]
    assert body["h"].value is None and "tanh" in str(graph) and "tanh" in str(body)
    with pytest.raises(ValueError, match="has no values"):
        body.backprop()
    with pytest.raises(ValueError, match="has no values"):
        _ = body.value

    graph = fnn.graph(branching)(jnp.ones(2))
    branches = next(n for n in graph if n.operation == "cond").graphs
    assert [g.nodes[-2].operation for g in branches.values()] == ["integer_pow", "sin"]
    (inside,) = next(n for n in fnn.graph(checkpointed)(jnp.ones(2)) if n.graphs).graphs.values()
    assert [n.operation for n in inside if n.equation] == ["exp", "sin"]

    def counting(x):
        return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * x), (0, x))[1]

    loop = next(n for n in fnn.graph(counting)(2.0) if n.operation == "while")
    assert list(loop.graphs) == ["cond_jaxpr", "body_jaxpr"]
    assert [n.label for n in loop.graphs["body_jaxpr"].inputs] == ["x", "carry[0]", "carry[1]"]
    assert float(fnn.graph(counting)(2.0).backprop()["x"].gradient) == 4 * 2.0**3


def test_coverage_counts_rules_also_inside_control_flow():
    found = fnn.graph(circuit)(1.0, 2.0, 3.0).coverage()
    assert found.ruled == {"add": 1, "mul": 1} and not found.fallback
    found = fnn.graph(recurrent)(*FUNCTIONS["recurrent"][1]).coverage()
    assert found.ruled["scan"] == 1 and found.ruled["tanh"] == 1
    assert found.ruled["dot_general"] == 1 and not found.fallback
    found = fnn.graph(branching)(jnp.ones(2)).coverage()
    assert found.ruled["sin"] == 1 and found.ruled["integer_pow"] == 1
    assert found.ruled["reduce_sum"] == 2  # the condition's sum passes no gradient
    found = fnn.graph(custom)(jnp.ones(2)).coverage()
    assert found.ruled["cube"] == found.ruled["shouting"] == 1
    assert fnn.graph(jnp.floor)(jnp.ones(2)).coverage().ruled == {"floor": 1}
    assert not fnn.graph(lambda n: n + 1)(jnp.arange(3)).coverage().ruled

    def through_shard_map(x):
        mesh = jax.make_mesh((1,), ("i",))
        spec = jax.sharding.PartitionSpec()
        return jax.shard_map(jnp.sin, mesh=mesh, in_specs=spec, out_specs=spec)(x).sum()

    def stops_by_itself(x):
        halve = lambda c: (jnp.sin(c[0]), c[1] / 2)
        return jnp.exp(jax.lax.while_loop(lambda c: c[1] > 1e-3, halve, (x, x))[0])

    found = fnn.graph(stops_by_itself)(1.0).coverage()
    assert found.without == {"while": 1} and found.ruled == {"exp": 1} and not found.fallback
    assert repr(found).endswith("1 of 2 operations have a hand-written rule, 1 without a gradient>")
    assert "1 of 2 operations have a hand-written rule (50%)" in str(found)
    assert "while can't be differentiated in reverse mode" in str(found)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(stops_by_itself)(1.0)

    def counts(x):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, x))

    found = fnn.graph(lambda x: counts(x)[1])(1.0).coverage()
    assert found.ruled == {"while": 1, "sin": 1} and not found.without

    found = fnn.graph(through_shard_map)(jnp.ones(2)).coverage()
    assert found.fallback == {"shard_map": 1} and found.ruled == {"reduce_sum": 1}
    assert str(found).splitlines()[0] == "1 of 2 operations have a hand-written rule (50%)."
    assert "shard_map" in str(found)


def test_it_works_under_jit_and_on_types():
    @jax.jit
    def gradient(x, y, z):
        graph = fnn.graph(circuit)(x, y, z).backprop()
        assert "traced" in str(graph) and "∂f/∂x" in "".join(map(str, graph.steps()))
        return graph["x"].gradient, graph["z"].gradient

    assert [float(g) for g in gradient(-2.0, 5.0, -4.0)] == [-4, 3]
    assert float(jax.grad(lambda x: fnn.graph(jnp.sin)(x).backprop()[0].gradient)(1.0)) == (
        pytest.approx(-math.sin(1))
    )
    params, x, label = FUNCTIONS["mlp"][1]
    graph = fnn.graph(mlp)(jax.eval_shape(lambda: params), x, label)
    assert graph["h"].shape == (5,) and graph["h"].value is None
    assert "relu" in str(graph)
    with pytest.raises(ValueError, match="made from types"):
        graph.backprop()


def test_what_is_no_array_is_handed_on():
    def function(x, kind, flip, activation):
        return activation(x) * (-1 if flip else 1) + len(kind)

    graph = fnn.graph(function)(1.0, "abc", True, jnp.sin).backprop()
    assert [n.label for n in graph.inputs] == ["x"]
    assert float(graph["x"].gradient) == pytest.approx(-math.cos(1))
    key = jax.random.key(0)
    noisy = fnn.graph(lambda key, x: (x * jax.random.normal(key, (3,))).sum())(key, jnp.ones(3))
    assert "key" in str(noisy.backprop())
    np.testing.assert_allclose(noisy["x"].gradient, jax.random.normal(key, (3,)))


def test_a_graph_that_cannot_be_differentiated_can_be_read():
    def until_ten(x):
        return lax.while_loop(lambda y: y < 10, lambda y: y * x, x)

    graph = fnn.graph(until_ten)(2.0)
    assert float(graph.value) == 16
    assert "while" in str(graph)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        graph.backprop()


def test_errors():
    vector = fnn.graph(jnp.sin)(jnp.ones(3))
    with pytest.raises(ValueError, match=r"needs a seed.*sin \(3,\)"):
        vector.backprop()
    with pytest.raises(ValueError, match=r"seed of sin has shape \(2,\).*\(3,\)"):
        vector.backprop(jnp.ones(2))
    with pytest.raises(TypeError, match="seed of sin must be an array"):
        vector.backprop([jnp.ones(3)])
    with pytest.raises(ValueError, match="structure must be that of what f returned"):
        fnn.graph(lambda x: (x, x))(1.0).backprop([1.0])
    with pytest.raises(TypeError, match=r"x int\d+.*-2.0 rather than -2"):
        fnn.graph(circuit)(-2, 5, -4).backprop()
    with pytest.raises(TypeError, match="starts from a real number"):
        fnn.graph(lambda x: x > 0)(1.0).backprop()
    with pytest.raises(TypeError, match="seed must be None"):
        fnn.graph(lambda x: (x, x > 0))(1.0).backprop((1.0, True))
    with pytest.raises(KeyError, match=r"no node 'w'; its inputs are x, y, z"):
        fnn.graph(circuit)(-2.0, 5.0, -4.0)["w"]
    with pytest.raises(TypeError, match="is 'text' of type str"):
        fnn.graph(lambda x: {"a": x, "b": "text"})(1.0)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        fnn.graph(circuit)(1.0, 2.0)


def test_wrong_arguments_are_told():
    for wrong in (3, None, "f", jnp.ones(2)):
        with pytest.raises(TypeError, match="graph: fun must be a function"):
            fnn.graph(wrong)
    graph = fnn.graph(circuit)(-2.0, 5.0, -4.0)
    for wrong in (1.0, None, True, slice(2)):
        with pytest.raises(TypeError, match="number or name must be an integer"):
            graph[wrong]
    for wrong in (5, -6):
        with pytest.raises(IndexError, match="has 5 nodes"):
            graph[wrong]
    assert graph[-1] is graph["f"] and graph[np.int64(3)] is graph["q"]


def test_repr_and_len():
    graph = fnn.graph(circuit)(-2.0, 5.0, -4.0)
    assert repr(graph) == "<Graph of circuit(x, y, z): 3 inputs, 2 operations>"
    assert len(graph) == 5 and list(graph) == graph.nodes
    assert repr(graph["q"]) == f"<Node q: {graph['q'].dtype} = add(x, y)>"
    assert graph["q"].params == {} or isinstance(graph["q"].params, dict)
    (node,) = [n for n in fnn.graph(lambda x: cube(x, scale=2.0))(1.0) if n.equation]
    assert node.params == {"scale": 2.0}


def test_scopes():
    @jax.jit
    def inner(x):
        return jnp.sin(x)

    def function(x):
        with jax.named_scope("outer"):
            y = inner(x)
        return y * 2

    graph = fnn.graph(function)(1.0)
    assert [n.scope for n in graph] == [(), ("outer", "inner"), ()]


def test_lines_of_library_functions_are_the_users():
    """JAX traces jax.nn.silu once; a second use must not point at the first one's line."""

    def first(x):
        return jax.nn.silu(x)

    def second(x):
        return jax.nn.silu(x)

    for function in (first, second):
        graph = fnn.graph(function)(jnp.ones(7))
        assert all(function.__name__ in n.source for n in graph if n.equation)


def test_gradients_from_a_seed_are_of_its_product_with_the_result():
    graph = fnn.graph(lambda x: x * 3.0)(2.0)
    (step,) = graph.backprop(5.0).steps()
    assert graph.of == "L"
    assert str(step) == f"∂L/∂x = ∂L/∂{step.node.label} · ∂{step.node.label}/∂x = 5 · 3 = 15"
    assert graph.backprop().of == graph.outputs[0].label


def test_a_seed_is_asked_for_where_one_helps():
    with pytest.raises(TypeError, match=r"returned complex\d+; give its upstream gradient as"):
        fnn.graph(lambda x: x * 1j)(2.0).backprop()
    with pytest.raises(TypeError, match=r"returned int\d+\.$"):
        fnn.graph(lambda x: jnp.argmax(x))(jnp.ones(3)).backprop()


def test_coverage_knows_the_steps_that_an_input_says():
    def f(x, n):
        return lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] * x), (0, 1.0))[1]

    graph = fnn.graph(f)(2.0, 3)
    assert graph.backprop()["x"].gradient == 12  # of x³
    assert not graph.coverage().without
    unknown = fnn.graph(lambda x: lax.while_loop(lambda c: c < 9, lambda c: c * x, x))(2.0)
    assert unknown.coverage().without.total() == 1
