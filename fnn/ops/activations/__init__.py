"""Activation functions: forward and backward side by side.

Each operation is three short functions: its definition, its `forward` (the value, and what
is kept for the backward pass) and its `backward` (the local gradient times the upstream
gradient g). What is kept is as little as can be: the output y where the local gradient
can be told from it (the next layer keeps y anyway), a mask of booleans where a mask is enough,
the input x elsewhere.

`forward` calls the operation itself, so that a kept y is differentiated by the operation's rule
and not through its definition. Hence the second derivative, and every one after it, comes from
these rules too, and a definition may be written for accuracy alone.

Common to all, and to the functions in `fnn.ops.probabilities`:

* The result has the dtype of the input. Integers raise a TypeError that names the operation;
  so do complex numbers, except for the holomorphic `sigmoid` and `tanh`.
* Sums over an axis are taken in at least float32, and the result rounded once.
* Values and gradients are finite for every finite input, up to the largest of the dtype, in
  float16, bfloat16, float32 and float64, except where the true value lies beyond the dtype
  (`selu` multiplies by 1.05, `swiglu` and `geglu` multiply two large numbers, `log_softmax`
  subtracts them); so are second derivatives of the elementwise ones.
* At a kink, where there is no derivative, the value given is that of `jax.nn`; each docstring
  says which. Second derivatives are zero there.

"The lecture" is Stanford's CS231n, "Training Neural Networks: activation functions".
"""
