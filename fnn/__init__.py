"""fnn: neural networks as pure functions, with a backward pass written by hand."""
