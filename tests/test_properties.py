"""Every operation's rule, by `check_rule`, over shapes, dtypes and special values.

A new operation gets a line in OPERATIONS.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweeps import exhaustive

import fnn
from fnn.check import check_rule

# Kinks of one operation or another, ties, and numbers at which something saturates.
SPECIAL = [0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 1e-3, 20.0, -20.0, 100.0, -100.0]
# Programs are compiled for each shape and dtype, so every operation gets one of these in turn.
SHAPES = ((2, 4), (4,), (2, 0), (1, 2), (3, 2, 2))
NOT_EMPTY = ((2, 4), (4,), (3, 2, 2))  # a maximum needs a number, a half needs its half
DTYPES = ("float16", "bfloat16", "float32")


def numbers(shape):
    ordinary = st.floats(-4, 4, allow_subnormal=False, width=16)
    count = int(np.prod(shape))
    entries = st.lists(ordinary | st.sampled_from(SPECIAL), min_size=count, max_size=count)
    return entries.map(lambda entries: np.array(entries, "float64").reshape(shape))


def alone(shape):
    return st.tuples(numbers(shape))


def pair(shape):
    return st.tuples(numbers(shape), numbers(shape))


def scores_and_label(shape):
    return st.tuples(numbers((4,)), st.integers(0, 3).map(jnp.int32))


def scores_and_distribution(shape):
    weights = st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any)
    return st.tuples(numbers((4,)), weights.map(lambda w: np.array(w) / sum(w)))


def logits_and_targets(shape):
    return st.tuples(numbers(shape), numbers(shape).map(lambda x: np.clip(x, 0, 1)))


def predictions_and_targets(shape):
    """Means, and logarithms of variances beside them; their targets."""
    both = lambda m, s: np.stack([m, np.clip(s, -2, 2)], axis=-1)
    near = numbers(shape).map(lambda x: np.clip(x, -4, 4))
    return st.tuples(st.builds(both, near, numbers(shape)), near)


def parameters(shape):
    return st.tuples(st.fixed_dictionaries({"W": numbers((2, 3)), "b": numbers((2,))}))


def small(shape):
    return numbers(shape).map(lambda x: np.clip(x, -4, 4))


def small_pair(shape):
    return st.tuples(small(shape), small(shape))


def with_scale(shape):
    return st.tuples(small(shape), small(shape[-1:]))


def with_scale_and_bias(shape):
    return st.tuples(small(shape), small(shape[-1:]), small(shape[-1:]))


def gates_and_memory(gates, copies=1):
    """For a recurrent cell: so many gates' numbers, once or twice, and the memory's."""
    wide = lambda shape: (*shape[:-1], gates * shape[-1])
    return lambda shape: st.tuples(*[small(wide(shape))] * copies, small(shape))


def with_key(shape):
    return st.tuples(numbers(shape), st.just(np.asarray([0, 3], np.uint32)))


def far_apart(count):
    """Vectors of which no two are alike, and none is 0."""
    places = (10.0, -10.0, 25.0)
    return lambda shape: st.tuples(
        *(small(shape).map(lambda x, p=p: x + p) for p in places[:count])
    )


def scores_and_positive_distribution(shape):
    weights = st.lists(st.integers(1, 3), min_size=4, max_size=4)
    return st.tuples(small((4,)), weights.map(lambda w: np.array(w) / sum(w)))


def logits_and_uncertain_targets(shape):
    return st.tuples(small(shape), numbers(shape).map(lambda x: np.clip(x, 0.1, 0.9)))


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation with its arguments (a strategy for a shape) and static configuration."""

    operation: fnn.Operation
    arguments: Callable
    shapes: tuple[tuple[int, ...], ...]
    static: dict[str, Any]

    def __str__(self):
        return self.operation.name + "".join(f" {k}={v}" for k, v in self.static.items())


def case(operation, arguments=alone, shapes=SHAPES, **static):
    return Case(operation, arguments, shapes, static)


OPERATIONS = [
    case(fnn.ops.sigmoid),
    case(fnn.ops.tanh),
    case(fnn.ops.relu),
    case(fnn.ops.selu),
    case(fnn.ops.relu6),
    case(fnn.ops.hard_tanh),
    case(fnn.ops.hard_sigmoid),
    case(fnn.ops.hard_silu),
    case(fnn.ops.softplus),
    case(fnn.ops.log_sigmoid),
    case(fnn.ops.softsign),
    case(fnn.ops.silu),
    case(fnn.ops.mish),
    case(fnn.ops.leaky_relu),
    case(fnn.ops.leaky_relu, slope=0.3),
    case(fnn.ops.elu, alpha=0.7),
    case(fnn.ops.celu, alpha=0.7),
    case(fnn.ops.gelu, approximate=True),
    case(fnn.ops.gelu, approximate=False),
    case(fnn.ops.squareplus, b=2.0),
    case(fnn.ops.maxout, shapes=((3, 2), (2, 2, 3))),
    case(fnn.ops.glu, shapes=NOT_EMPTY),
    case(fnn.ops.swiglu, shapes=NOT_EMPTY),
    case(fnn.ops.geglu, shapes=NOT_EMPTY),
    case(fnn.ops.softmax, shapes=NOT_EMPTY),
    case(fnn.ops.log_softmax, shapes=NOT_EMPTY),
    case(fnn.ops.logsumexp, shapes=NOT_EMPTY, axis=-1),
    case(fnn.ops.softmax_cross_entropy, scores_and_label),
    case(fnn.ops.softmax_cross_entropy, scores_and_distribution, label_smoothing=0.1),
    case(fnn.ops.multiclass_hinge, scores_and_label),
    case(fnn.ops.sigmoid_binary_cross_entropy, logits_and_targets),
    case(fnn.ops.squared_error, pair),
    case(fnn.ops.huber, pair, delta=0.5),
    case(fnn.ops.gaussian_nll, predictions_and_targets),
    case(fnn.ops.l2, parameters),
    case(fnn.ops.rms_norm, with_scale, NOT_EMPTY, epsilon=0.1),
    case(fnn.ops.layer_norm, with_scale_and_bias, NOT_EMPTY, epsilon=0.1),
    case(fnn.ops.group_norm, with_scale_and_bias, NOT_EMPTY, groups=2, epsilon=0.1),
    case(fnn.ops.lstm_cell, gates_and_memory(4), NOT_EMPTY),
    case(fnn.ops.gru_cell, gates_and_memory(3, copies=2), NOT_EMPTY),
    case(fnn.ops.dropout, with_key, rate=0.4),
    case(fnn.ops.kl_divergence, scores_and_positive_distribution),
    case(fnn.ops.sigmoid_focal, logits_and_uncertain_targets, gamma=1.5, alpha=0.25),
    case(fnn.ops.pinball, pair, quantile=0.8),
    case(fnn.ops.poisson_nll, small_pair),
    case(fnn.ops.cosine_similarity, far_apart(2), NOT_EMPTY),
    case(fnn.ops.cosine_distance, far_apart(2), NOT_EMPTY),
    case(fnn.ops.triplet, far_apart(3), NOT_EMPTY, margin=100.0),
]


def test_the_table_holds_every_operation():
    there = {op.name for op in vars(fnn.ops).values() if isinstance(op, fnn.Operation)}
    assert there == {c.operation.name for c in OPERATIONS}


QUICK = ("gelu", "maxout", "softmax_cross_entropy")


def _numbers():
    for number, case in enumerate(OPERATIONS):
        marks = () if case.operation.name in QUICK else exhaustive
        yield pytest.param(number, id=str(case), marks=marks)


@exhaustive
@pytest.mark.parametrize("number", list(_numbers()))
def test_every_rule(number):
    case = OPERATIONS[number]
    shape = case.shapes[number % len(case.shapes)]
    dtype = DTYPES[number % len(DTYPES)]

    @settings(
        max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(case.arguments(shape))
    def holds(args):
        is_empty = 0 in shape and case.arguments is alone
        options = {"dtypes": (dtype,), "order": 1, "raise_on_error": not is_empty}
        report = check_rule(case.operation, *args, **case.static, **options)
        if is_empty:  # every mode ran, and there was nothing to compare
            assert "no argument that can move has any entries" in report.verdict
            assert all(check.ok for check in report.checks[:-1])

    holds()
