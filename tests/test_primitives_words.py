"""The table that leads from the lecture's words to the rules, in `fnn.backprop.primitives`."""

import importlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import fnn
from fnn.backprop import primitives
from fnn.jaxpr import program

RULE = re.compile(r"^ {4}(\S.*?) {2,}([a-z_0-9]+) +([a-z_]+)$", re.MULTILINE)
OPERATION = re.compile(r"^ {4}(\S.*?) {2,}([a-z_/]+)$", re.MULTILINE)

x, W = jnp.ones(4), jnp.ones((3, 4))
image, kernel = jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 2, 5))
layout = ("NHWC", "HWIO", "NHWC")
window = ((1, 2, 2, 1), (1, 2, 2, 1), "VALID")

EXAMPLES = {
    "skip connection": (lambda x: x + jnp.tanh(x), x),
    "mul gate": (lambda x: x * jnp.tanh(x), x),
    "ReLU": (lambda x: jnp.maximum(x, 0), x),
    "leaky ReLU": (lambda x: jnp.where(x > 0, x, 0.1 * x), x),
    "sigmoid": (jax.nn.sigmoid, x),
    "tanh": (jnp.tanh, x),
    "softmax: exponential": (jax.nn.softmax, x),
    "cross-entropy: log of a probability": (lambda x: -jnp.log(x)[0], x),
    "squared error": (lambda x: jnp.sum(jnp.square(x)), x),
    "batch norm: 1 / standard deviation": (lambda x: x * lax.rsqrt(jnp.var(x) + 1e-5), x),
    "batch norm: mean": (jnp.mean, x),
    "softmax: largest score": (jax.nn.softmax, x),
    "prediction: the best class": (jnp.argmax, x),
    "matmul": (lambda W, x: W @ x, W, x),
    "convolution": (lambda x, w: lax.conv(x, w, (1, 1), "SAME"), image, jnp.ones((5, 6, 3, 3))),
    "transposed convolution": (lambda x: lax.conv_transpose(x, kernel, (2, 2), "SAME"), image),
    "max-pool": (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, *window), image),
    "average-pool": (lambda x: lax.reduce_window(x, 0.0, lax.add, *window), image),
    "embedding lookup": (lambda E, words: E[words], W, jnp.array([0, 2, 0])),
    "flatten": (jnp.ravel, W),
    "transpose": (jnp.transpose, W),
    "repeating a bias for each example": (lambda x: jnp.broadcast_to(x, (3, 4)), x),
    "zero-padding": (lambda x: jnp.pad(x, 1), x),
    "crop": (lambda x: x[1:3], x),
    "depth concatenation": (lambda x: jnp.concatenate([x, x]), x),
    "PCA": (lambda W: jnp.linalg.eigh(W @ W.T), W),
    "recurrent network": (lambda x: lax.scan(lambda h, x: (jnp.tanh(h + x), h), 0.0, x), x),
}


def rows():
    found = RULE.findall(primitives.__doc__)
    return [([word.strip() for word in re.split("[,;] ", words)], *rest) for words, *rest in found]


@pytest.mark.parametrize("words, primitive, file", rows(), ids=lambda value: str(value))
def test_the_primitive_has_its_rule_in_that_file(words, primitive, file):
    if file == "control_flow":
        rules = importlib.import_module("fnn.backprop.control_flow").rules(primitives.rule_of)
    else:
        rules = importlib.import_module(f"fnn.backprop.primitives.{file}").RULES
    assert primitive in rules
    for function, *args in (EXAMPLES[word] for word in words if word in EXAMPLES):
        equations = program(jax.make_jaxpr(function)(*args)).equations
        assert primitive in {equation.name for equation in equations}


def test_each_operation_stands_in_a_file_of_the_table():
    _, operations = primitives.__doc__.split("stands in fnn/ops:")
    files = {file for _, file in OPERATION.findall(operations)}
    there = {getattr(fnn.ops, name).__module__ for name in fnn.ops.__all__}
    assert {"fnn.ops." + file.replace("/", ".") for file in files} == there


def test_every_example_is_in_the_table():
    assert len(rows()) >= 25
    assert EXAMPLES.keys() <= {word for words, *_ in rows() for word in words}
