"""The computational graph and backpropagation.

From the top: `transforms` (`fnn.grad` and its kin) and `trace` (`fnn.graph`) turn a function
into a program; `sweep` runs it forward and back; `primitives/` holds the rules it applies,
in the form that `rules` gives; `partial_evaluation` cuts a gradient in two for loops
(`control_flow`). What a graph shows is made in `text`, `names`, `steps`, `coverage`, `grouping`
and `draw`.
"""

from fnn.backprop.trace import Graph, Node, graph
from fnn.backprop.transforms import grad, value_and_grad, vjp

__all__ = ["Graph", "Node", "grad", "graph", "value_and_grad", "vjp"]
