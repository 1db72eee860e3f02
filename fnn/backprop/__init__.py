"""The computational graph and backpropagation."""
