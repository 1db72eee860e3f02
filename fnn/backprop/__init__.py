"""The computational graph and backpropagation.

From the top: `transforms` (`fnn.grad` and its kin) and `trace` (`fnn.graph`) turn a function
into a program; `sweep` runs it forward and back; `primitives/` holds the rules it applies,
in the form that `local` gives; `halves` cuts a gradient in two for loops. Of a graph, `steps`
spells out the chain rule, `coverage` counts the rules, `text` writes the numbers, `draw` and
`grouping` make the picture.
"""

from fnn.backprop.trace import Graph, Node, graph
from fnn.backprop.transforms import grad, value_and_grad, vjp

__all__ = ["Graph", "Node", "grad", "graph", "value_and_grad", "vjp"]
