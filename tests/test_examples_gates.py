"""examples/gates.py prints the lecture's numbers and draws its circuits."""

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "gates.py"


def test_gates(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pygraphviz")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    # f = (x + y) z at (-2, 5, -4), slide by slide.
    for row in ("x +() +float64 +-2 +-4", "y +() +float64 +5 +-4", "z +() +float64 +-4 +3"):
        assert re.search(row.replace("()", r"\(\)"), printed)
    assert "∂f/∂x = ∂f/∂q · ∂q/∂x = -4 · 1 = -4" in printed
    # One step against the gradient: (-1.96 + 5.04) · -4.03.
    assert "f: -12 before, -12.4124 after" in printed
    # The sigmoid neuron: value 0.73, and the slide's gradients at the inputs, twice.
    gradients = {}
    for name, gradient in re.findall(r"∂f/∂([wx]\d) = .* = (-?[\d.]+)\n", printed):
        gradients.setdefault(name, []).append(round(float(gradient), 2))
    want = {"w0": -0.20, "x0": 0.39, "w1": -0.39, "x1": -0.59, "w2": 0.20}
    assert gradients == {name: [value, value] for name, value in want.items()}
    assert printed.count("0.7311") == 2
    drawn = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert drawn == ["circuit.svg", "neuron.svg", "neuron_of_one_gate.svg"]
    for path in (tmp_path / "out").iterdir():
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
