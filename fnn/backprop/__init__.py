"""The computational graph and backpropagation.

Each module imports only from those above it:

    rules               the form of a backward rule
    sweep               backpropagation: the forward pass, and the reverse sweep by the rules
    partial_evaluation  a gradient cut into a forward and a backward half, for loops
    trip_count          how many steps a while loop takes, where it counts them
    control_flow        the rules of what holds functions: loops, branches, checkpoints
    primitives/         the rules of JAX's own primitives, a file for each family
    transforms          `grad`, `value_and_grad`, `vjp`

    source              the user's lines that made an equation
    scopes              what the scopes around an equation say of its part
    node                one value of a graph, and the operation that made it
    names, labels       what nodes are called
    steps, coverage     the backward pass step by step; which operations have a rule
    grouping            the operations of a large graph, in groups
    picture             what is drawn of a graph: boxes and wires
    graphviz, rows      a picture drawn by Graphviz, or in rows if it is too large for that
    draw                the picture as SVG, and as a file
    computational_graph `Graph`: all of these as its methods
    trace               `graph`: from a function to its graph
"""

from fnn.backprop.computational_graph import Graph
from fnn.backprop.node import Node
from fnn.backprop.trace import graph
from fnn.backprop.transforms import grad, value_and_grad, vjp

__all__ = ["Graph", "Node", "grad", "graph", "value_and_grad", "vjp"]
