"""Loss functions of one example: forward and backward side by side.

A loss is written for one example; `jax.vmap` makes it the losses of a batch, and their mean is
what training minimises. Those that compare along the last axis give one number for each position:
`softmax_cross_entropy` and `multiclass_hinge` for scores of shape `(positions, classes)`, as those
of a language model, `kl_divergence`, and those of `similarity`. The other losses sum over all
entries of the example, as the lecture does, and give a scalar.

The loss has the dtype of the logits, scores or prediction, which must be real floating-point
(else TypeError); labels and targets are converted to it. Shapes that don't fit raise a
ValueError, and so do labels that name no class (see `classification`).

"The lecture" is Stanford's CS231n, "Loss functions and optimization".
"""
