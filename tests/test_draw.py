"""The picture of a graph: its DOT text, its SVG, and how a large graph is grouped."""

import dataclasses
import re
import sys
import time
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import exhaustive, sweep

import fnn
from fnn.backprop.grouping import Group, groups


def circuit(x, y, z):
    q = x + y
    return q * z


def norm(p, x):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return p["scale"] * x + p["bias"]


def attention(p, x):
    q, k, v = x @ p["q"].T, x @ p["k"].T, x @ p["v"].T
    weights = jax.nn.softmax(q @ k.T / jnp.sqrt(q.shape[-1]))
    return weights @ v @ p["out"].T


def mlp(p, x):
    h = jax.nn.gelu(x @ p["up"].T)
    return h @ p["down"].T


def block(p, x):
    x = x + attention(p["attention"], norm(p["norm1"], x))
    x = x + mlp(p["mlp"], norm(p["norm2"], x))
    return x


def loss(blocks, x):
    for p in blocks:
        x = block(p, x)
    return (x**2).mean()


def block_parameters(d=4):
    n = {"scale": jnp.ones(d), "bias": jnp.zeros(d)}
    W = jnp.arange(d * d).reshape(d, d) / (d * d) - 0.4
    attention = dict.fromkeys(("q", "k", "v", "out"), W)
    return {
        "norm1": n,
        "attention": attention,
        "norm2": n,
        "mlp": {"up": jnp.ones((8, d)) / 9, "down": jnp.ones((d, 8)) / 7},
    }


def words(svg):
    """The text in a picture, piece by piece; it must be well-formed XML."""
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    return [(e.text or "").strip() for e in root.iter() if e.tag.endswith("}text")]


def colours(svg):
    """{colour: the pieces of text that have it}."""
    found = {}
    for e in ElementTree.fromstring(svg).iter():
        if e.tag.endswith("}text"):
            found.setdefault(e.get("fill"), []).append((e.text or "").strip())
    return found


def test_dot_of_the_circuit():
    dot = fnn.graph(circuit)(-2.0, 5.0, -4.0).backprop().to_dot()
    assert dot.startswith('digraph "circuit" {') and "rankdir=LR" in dot
    # Five wires: three inputs, q, and the output; two gates.
    assert sorted(re.findall(r"^  (\w+) \[", dot, re.M)) == [
        *["b0", "b1"],
        *["edge", "node"],
        *["w0", "w1", "w2", "w3", "w4"],
    ]
    edges = re.findall(r"(\w+)(?::wire:\w)? -> (\w+)", dot)
    assert sorted(edges) == sorted(
        [("w0", "b0"), ("w1", "b0"), ("b0", "w3"), ("w3", "b1"), ("w2", "b1"), ("b1", "w4")]
    )
    assert 'label="+"' in dot and 'label="*"' in dot


def test_svg_has_values_in_green_and_gradients_in_red(tmp_path):
    pytest.importorskip("pygraphviz")
    graph = fnn.graph(circuit)(-2.0, 5.0, -4.0).backprop()
    svg = graph.to_svg(tmp_path / "circuit.svg")
    assert (tmp_path / "circuit.svg").read_text(encoding="utf-8") == svg
    assert svg == graph._repr_svg_() and svg.startswith("<svg")
    assert {"x", "y", "z", "q", "+", "*"} <= set(words(svg))
    by_colour = colours(svg)
    assert sorted(by_colour["#1a7a36"]) == ["-12", "-2", "-4", "3", "5"]
    assert sorted(by_colour["#b3202c"]) == ["-4", "-4", "-4", "1", "3"]


@pytest.mark.parametrize("colour", ["#1a7a36", "#b3202c", "#20242c", "#6b7280"])
def test_colours_stand_out_against_white(colour):
    """WCAG 2.1: a contrast of 4.5 : 1 for text."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    assert 1.05 / (luminance + 0.05) > 4.5


def test_numbers_of_the_source_stand_in_the_gates():
    dot = fnn.graph(lambda x: 1 / (2 * x**3 + 1) - 0.5)(2.0).to_dot()
    for symbol in ("x³", "*2", "+1", "1/x", "−0.5"):
        assert f'label="{symbol}"' in dot
    assert "sigmoid" in fnn.graph(jax.jit(lambda x: sigmoid(x)))(2.0).to_dot()


@fnn.rule
def sigmoid(x):
    return jax.nn.sigmoid(x)


def test_where_a_wire_branches_each_branch_shows_what_it_adds():
    dot = fnn.graph(lambda x, y: jnp.sin(x) + x * y)(0.0, 3.0).backprop().to_dot()
    labels = re.findall(r'w0:wire:e -> b\d .*label=" ([^"]*) "', dot)
    assert sorted(labels) == ["1", "3"]  # cos(0) and y


def test_arrays_show_shape_range_and_norm():
    pytest.importorskip("pygraphviz")
    svg = fnn.graph(lambda W, x: (W @ x).sum())(jnp.ones((100, 64)), jnp.arange(64.0)).backprop()
    shown = words(svg.to_svg())
    assert {"(100, 64)", "all 1", "(64,)", "0 … 63", "@", "Σ"} <= set(shown)
    assert "‖g‖ 10" in shown  # of a hundred ones


@exhaustive
@pytest.mark.parametrize("count", sweep([1, 4], quick=[1]))
def test_a_deep_network_is_grouped_by_function(count):
    graph = fnn.graph(loss)([block_parameters()] * count, jnp.ones((3, 4)) * jnp.arange(4.0))
    graph.backprop()
    assert len(graph.nodes) > 80 * count
    top = groups(graph, 16)
    labels = [g.label for g in top if isinstance(g, Group)]
    assert labels[:count] == ["block"] * count and top[0].is_open == (count == 1)
    # Each operation is in exactly one place, in order.
    units = [unit for item in top for unit in item.units()]
    assert [u.results[0].number for u in units] == sorted(
        {id(n.equation): n.number for n in reversed(graph.nodes) if n.equation}.values()
    )
    dot = graph.to_dot()
    boxes = re.findall(r"^ +b\d+ \[", dot, re.M)
    assert len(boxes) <= 16
    if count == 1:
        clusters = re.findall(r"subgraph cluster_\w+ \{\n +label=\"([^\"]*)\"", dot)
        assert clusters[0] == "block" and {"norm", "attention", "mlp"} <= set(clusters)
    assert dot.count("{") == dot.count("}")
    pytest.importorskip("pygraphviz")
    shown = words(graph.to_svg())
    assert {"blocks[0]['mlp']['up']", "(8, 4)"} <= set(shown)
    small = graph.to_dot(max_boxes=5)
    assert len(re.findall(r"^ +b\d+ \[", small, re.M)) <= 5


def test_named_scopes_and_jitted_functions_are_groups():
    def function(x):
        with jax.named_scope("encoder"):
            for _ in range(5):
                x = jnp.sin(x) + jnp.cos(x)
        with jax.named_scope("decoder"):
            for _ in range(5):
                x = jnp.sin(x) * jnp.cos(x)
        return jax.nn.softmax(x).sum()

    dot = fnn.graph(function)(jnp.ones(3)).backprop().to_dot(max_boxes=8)
    assert ">encoder<" in dot and ">decoder<" in dot
    assert "15 operations" in dot


def test_the_unnamed_parts_of_a_network_are_groups_with_their_layers_names():
    swish = lambda x: x * jax.nn.sigmoid(x)
    layers = fnn.layers
    net = layers.chain(
        layers.Linear(4),
        layers.residual(layers.Linear(4), fnn.ops.tanh, layers.Linear(4)),
        swish,
        layers.Linear(2),
        lambda x: jnp.exp(x) / jnp.exp(x).sum(),
    )
    params = net.init(jax.random.key(0), jnp.ones(3))
    graph = fnn.graph(lambda params, x: net(params, x).sum())(params, jnp.ones(3))
    scopes = list(dict.fromkeys(node.scope[0] for node in graph if node.scope))
    assert scopes == ["Linear 0", "residual 1", "part 2", "Linear 3", "part 4"]
    assert any(node.scope == ("residual 1", "Linear 2") for node in graph)
    dot = graph.backprop().to_dot(max_boxes=8)
    assert ">residual 1<" in dot and ">part 4<" in dot  # closed
    assert 'label="Linear 3"' in dot and 'label="part 2"' in dot  # open


def test_a_long_computation_without_functions_stays_readable():
    def function(x):
        for _ in range(60):
            x = jnp.sin(x)
            x = x + 1
        return x

    dot = fnn.graph(function)(1.0).backprop().to_dot()
    assert len(re.findall(r"^ +b\d+ \[", dot, re.M)) <= 16
    assert "operations 1 to 8" in dot and "rankdir=TB" in dot


def test_odd_graphs_are_drawn():
    pytest.importorskip("pygraphviz")

    def looped(W, xs):
        h, ys = jax.lax.scan(lambda h, x: (jnp.tanh(W @ h + x), h.sum()), jnp.zeros(3), xs)
        low, high = jnp.split(ys, 2)
        return {'a "quoted" <key>': h.sum(), "b": (low * high).sum()}

    graph = fnn.graph(looped)(jnp.eye(3), jnp.ones((4, 3)))
    shown = words(graph.to_svg())
    assert "scan × 4" in shown and "split" in shown
    assert any('"quoted" <key>' in w for w in shown)
    words(graph.backprop({'a "quoted" <key>': 1.0, "b": None}).to_svg())
    scan = next(n for n in graph if n.operation == "scan")
    assert "carry[0]" in words(scan.graphs["jaxpr"].to_svg())
    for function in (lambda x: x, lambda x: 3.0 * jnp.ones(2), lambda x: (x, x > 0, x.size)):
        words(fnn.graph(function)(jnp.ones(2)).to_svg())
    words(fnn.graph(lambda k: jax.random.normal(k))(jax.random.key(0)).to_svg())
    under_jit = []
    jax.jit(lambda x: under_jit.append(fnn.graph(circuit)(x, x, x).backprop().to_svg()))(1.0)
    assert "traced" in words(under_jit[0])


def test_without_pygraphviz_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    graph = fnn.graph(circuit)(-2.0, 5.0, -4.0)
    with pytest.raises(ImportError, match=r'(?m) pip install "pygraphviz>=2.0"$'):
        graph.to_svg()
    assert graph._repr_svg_() is None
    assert "digraph" in graph.to_dot()


@dataclasses.dataclass(frozen=True)
class Scale(fnn.layers.Layer):
    """A layer of the user's own."""

    def init(self, key, x):
        return {"s": jnp.ones(x.shape), "b": jnp.zeros(x.shape)}

    def __call__(self, p, x):
        return jnp.tanh(p["s"] * x + p["b"])


def labels_of(items):
    return [(g.label, labels_of(g.items)) for g in items if isinstance(g, Group)]


def test_neighbouring_layers_of_ones_own_are_boxes_of_their_own():
    net = fnn.layers.chain(Scale(), Scale(), fnn.layers.Linear(3), Scale(), Scale())
    params = net.init(jax.random.key(0), jnp.ones(3))
    graph = fnn.graph(lambda params, x: net(params, x).sum())(params, jnp.ones(3))
    top = groups(graph, 6)
    assert [label for label, _ in labels_of(top)] == [
        *["Scale 0", "Scale 1", "Linear 2", "Scale 3", "Scale 4"]
    ]
    for group in top[:-1]:
        assert {u.equation.scope[0] for u in group.units()} == {group.label}


@pytest.mark.parametrize("form", ["loop", "scopes", "recursion", "jitted"])
def test_each_call_of_a_function_is_a_group_of_its_own(form):
    def layer(x):
        return jnp.sin(x) * x

    def nested(x, n):
        return layer(x) if n == 0 else jnp.cos(nested(layer(x), n - 1))

    jitted = jax.jit(layer)

    def function(x):
        if form == "recursion":
            return nested(x, 2)
        for i in range(3):
            if form == "scopes":
                with jax.named_scope(f"block {i}"):
                    x = layer(x)
            else:
                x = jitted(x) if form == "jitted" else layer(x)
        return x

    found = groups(fnn.graph(function)(1.0), 3)
    sizes = []

    def walk(items):
        for group in items:
            if isinstance(group, Group):
                if all(not isinstance(item, Group) for item in group.items):
                    sizes.append(len(group.units()))
                else:
                    walk(group.items)

    walk(found)
    assert sizes == [2, 2, 2]


def test_a_transform_gives_no_group_without_a_name():
    def branch(x):
        y = jnp.sin(x)
        return y * 2 + jnp.cos(x)

    def mapped(x):
        return jax.vmap(branch)(x).sum() + jax.vmap(jax.grad(branch))(x).sum()

    graph = fnn.graph(mapped)(jnp.ones(3))
    dot = graph.to_dot(max_boxes=4)
    assert "vmap()" not in dot and "jvp(" not in dot and ">branch<" in dot and ">backward<" in dot
    assert not any("vmap" in name for node in graph for name in node.scope)
    with_scope = fnn.graph(lambda x: jax.vmap(jax.named_scope("inner")(jnp.sin))(x))(jnp.ones(2))
    assert [n.scope for n in with_scope if n.equation] == [("inner",)]


def test_a_loops_body_has_the_name_of_its_function():
    def looped(x):
        def step(h, x):
            return h * x, h

        h, _ = jax.lax.scan(step, 1.0, x)
        h = jax.lax.while_loop(lambda h: h < 3, lambda h: h * 2, h)
        return jax.lax.cond(h > 0, jnp.sin, lambda h: h, h)

    graph = fnn.graph(looped)(jnp.ones(3))
    bodies = {role: g.name for n in graph for role, g in n.graphs.items()}
    assert bodies["jaxpr"] == "step" and bodies["cond_jaxpr"] == "condition"
    assert bodies["body_jaxpr"] == "body" and bodies["branches[0]"] == "branch 0"
    assert "jaxpr" not in str(graph)


def boxes(dot):
    return len(re.findall(r"^ +b\d+ \[", dot, re.M))


def test_the_reader_chooses_what_is_open():
    graph = fnn.graph(loss)([block_parameters()] * 4, jnp.ones((3, 4)) * jnp.arange(4.0))
    clusters = lambda dot: re.findall(r'subgraph cluster_\w+ \{\n +label="([^"]*)"', dot)
    assert clusters(graph.to_dot()) == ["(x**2).mean()"]
    assert clusters(graph.to_dot(open="block")).count("block") == 4
    one = graph.to_dot(max_boxes=5, open="block[1]/attention", closed="(x**2).mean()")
    assert clusters(one) == ["block", "attention"] and ">(x**2).mean()<" in one
    largest = lambda group: group.label == "mlp" and group.path.startswith("block[2]")
    assert clusters(graph.to_dot(max_boxes=5, open=largest))[:2] == ["block", "mlp"]
    everything = graph.to_dot(max_boxes=10**6)
    assert boxes(everything) == len([n for n in graph if n.equation and not n.result])
    some = graph.to_dot(max_boxes=10**6, closed=["mlp", "norm"])
    assert boxes(some) < boxes(everything) and "norm" not in clusters(some)
    # In a small graph, which has no groups by itself, too.
    small = fnn.graph(norm)(block_parameters()["norm1"], jnp.ones(4))
    assert ">var<" in small.to_dot(max_boxes=100, closed="var")
    assert clusters(small.to_dot(max_boxes=100, closed="var")) == []


def test_unknown_groups_and_wrong_arguments_are_told(tmp_path):
    graph = fnn.graph(loss)([block_parameters()] * 2, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"open names the group 'atention'.*'attention'"):
        graph.to_svg(open="atention")
    with pytest.raises(ValueError, match=r"closed names the group 'block\[7\]'"):
        graph.to_dot(closed=["mlp", "block[7]"])
    with pytest.raises(ValueError, match="to be open, but 'block.*' is to be closed"):
        graph.to_dot(open="mlp", closed="block")
    with pytest.raises(TypeError, match="open must be a group's name or path"):
        graph.to_dot(open=3)
    with pytest.raises(TypeError, match="must be True or False"):
        graph.to_dot(open=lambda group: None)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="max_boxes must be an integer of at least 1"):
            graph.to_svg(max_boxes=wrong)
    for wrong in (2.5, None, True, "16"):
        with pytest.raises(TypeError, match="max_boxes must be an integer"):
            graph.to_dot(max_boxes=wrong)
    with pytest.raises(ValueError, match=r"path must end in .svg"):
        graph.to_svg(tmp_path / "graph.png")
    with pytest.raises(FileNotFoundError, match="folder that exists"):
        graph.to_svg(tmp_path / "missing" / "graph.svg")
    with pytest.raises(TypeError, match="path must be a path"):
        graph.to_svg(3)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        (tmp_path / "folder.svg").mkdir()
        graph.to_svg(tmp_path / "folder.svg")


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    pytest.importorskip("pygraphviz")
    path = tmp_path / "circuit.svg"
    graph = fnn.graph(circuit)(-2.0, 5.0, -4.0)
    path.write_text("before")
    path.chmod(0o640)

    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="no space"):
            graph.to_svg(path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    svg = graph.to_svg(path)
    assert path.read_text(encoding="utf-8") == svg and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o640


def size(svg):
    return [
        float(x) for x in re.search(r'<svg width="([\d.]+)pt" height="([\d.]+)pt"', svg).groups()
    ]


@pytest.mark.parametrize("skips", [False, True])
def test_a_long_chain_is_straight(skips):
    pytest.importorskip("pygraphviz")

    def deep(p, x):
        for W in p:
            x = jnp.tanh(W @ x) + (x if skips else 1)
        return x.sum()

    graph = fnn.graph(deep)([jnp.eye(3)] * 16, jnp.ones(3)).backprop()
    width, height = size(graph.to_svg(max_boxes=100))
    assert width < 500 and height < 100 * 50
    # Longer than a page: in columns, each of which runs straight down.
    graph = fnn.graph(deep)([jnp.eye(3)] * 120, jnp.ones(3)).backprop()
    width, height = size(svg := graph.to_svg(max_boxes=10**4))
    assert 0.4 < width / height < 3
    places = [float(e.get("cx")) for e in ElementTree.fromstring(svg).iter() if e.get("cx")]
    assert len(set(places)) < 30
    assert {"tanh", "+" if skips else "+1", "@", "Σ", "p[0]", "deep"} <= set(everything(svg))


def everything(svg):
    """The pieces of text of a picture in rows."""
    return [(e.text or "").strip() for e in ElementTree.fromstring(svg).iter() if e.text]


def without_structure(count):
    """Each value is the sum or product of one that wasn't used yet and of any other."""
    random = np.random.default_rng(0)
    kinds, others = random.integers(2, size=count), random.random(count)

    def function(x, y, z):
        values = [x, y, z]
        for k, (kind, other) in enumerate(zip(kinds, others, strict=True)):
            a, b = values[k], values[int(other * len(values))]
            values.append(a + b if kind else a * b)
        return sum(values[-3:])

    return function


def test_a_big_graph_without_structure_is_drawn_in_little_time():
    pytest.importorskip("pygraphviz")
    times = []
    for count in (250, 2000):
        graph = fnn.graph(without_structure(count))(0.3, 0.5, 0.7).backprop()
        assert len(graph) > count
        dot = graph.to_dot()
        assert boxes(dot) <= 16 and dot.count("->") <= 16 * 16
        began = time.process_time()
        assert words(graph.to_svg()) and len(graph.to_svg(max_boxes=10**6)) > 500 * count
        times.append(time.process_time() - began)
    assert times[1] < 5 and times[1] < 25 * max(times[0], 0.05)


def test_values_that_go_the_same_way_are_one_wire():
    def halves(xs):
        middle = [jnp.sin(x) for x in xs]
        return sum(m * m for m in middle)

    xs = [jnp.full(2, 0.1 * k) for k in range(40)]
    graph = fnn.graph(halves)(xs).backprop(jnp.ones(2))
    shown = words(graph.to_svg(max_boxes=2))
    made = [n for n in graph if n.equation]
    count = next(int(s.split()[0]) for s in shown if s.endswith(" operations"))
    first, last = made[:count], made[count:]
    read = {id(n) for node in last for n in node.inputs}
    through = [n for n in first if id(n) in read]
    assert f"{len(through)} values" in shown and len(shown) < 60
    assert f"‖g‖ {np.linalg.norm([n.gradient for n in through]):.3g}" in shown
    # A function of many inputs that one operation reads.
    dot = fnn.graph(lambda xs: jnp.stack(xs).sum())(xs[:20]).to_dot()
    assert dot.count("shape=plain") < 20


def test_bundles_are_named_by_the_operations_in_them():
    """Not by how many groups they are made of."""

    def f(x):
        for i in range(12):
            with jax.named_scope(f"part{i}"):
                x = jnp.cos(jnp.sin(x) * 2)
        return x

    before = 0
    bundles = [
        g
        for g in groups(fnn.graph(f)(1.0).nodes, 4)
        if isinstance(g, Group) and g.label.startswith("operations")
    ]
    assert bundles
    for bundle in bundles:
        count = len(bundle.units())
        assert bundle.label == f"operations {before + 1} to {before + count}"
        before += count
