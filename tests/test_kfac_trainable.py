"""KFAC where only some parameters are trained: as KFAC of a model that closes over the others."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import exhaustive

import fnn
from fnn import ops
from fnn.curvature import kfac
from fnn.layers import Linear, chain
from fnn.train.coupling import is_coupled

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(14, 4)), RNG.integers(3, size=14)
NET = chain(body=Linear(5), act=ops.tanh, head=Linear(3))
PARAMS = NET.init(jax.random.key(0), X[0])
PARAMS["body"] = jax.tree.map(lambda x: x.astype(jnp.float32), PARAMS["body"])
LOSS = fnn.supervised(NET, ops.softmax_cross_entropy)
OPTIONS = {"damping": 0.1, "adapt_damping_every": 2, "l2": 1e-3}


def of_head(head, x):
    """The network of its head alone, in JAX's own functions."""
    body = PARAMS["body"]
    return head["W"] @ jnp.tanh(body["W"] @ x + body["b"]) + head["b"]


BATCHES = [(X[:7], Y[:7]), (X[7:], Y[7:])]


@functools.cache
def by_hand():
    """The head after a step on each batch, and the optimiser's state."""
    optimizer = kfac(of_head, ops.softmax_cross_entropy, BATCHES[0], **OPTIONS)

    @jax.jit
    def one(head, state, batch):
        def mean(head):
            scores = jax.vmap(lambda x: of_head(head, x))(batch[0])
            return optax.softmax_cross_entropy_with_integer_labels(scores, batch[1]).mean()

        updates, state = optimizer.update(jax.grad(mean)(head), state, head, batch=batch)
        return optax.apply_updates(head, updates), state

    head = PARAMS["head"]
    state = optimizer.init(head)
    for batch in BATCHES:
        head, state = one(head, state, batch)
    return head, state


def told():
    """KFAC that knows of all parameters, by their types."""
    types = jax.eval_shape(lambda p: p, PARAMS)
    options = OPTIONS | {"example_params": types}
    return kfac(NET, ops.softmax_cross_entropy, BATCHES[0], **options)


def close(a, b):
    chex.assert_trees_all_close(jax.device_get(a), jax.device_get(b), rtol=1e-5, atol=1e-7)


@exhaustive
@pytest.mark.parametrize("way", ["step", "fit"])
def test_only_the_head_is_trained(way):
    if way == "step":
        step = fnn.train_step(LOSS, told(), trainable="head.*")
        state = step.init(PARAMS)
        for batch in BATCHES:
            state, _ = step(state, batch)
        step.finish(state)
    else:
        options = {"batch_size": 7, "shuffle": False, "progress": False, "trainable": "head.*"}
        state = fnn.fit(LOSS, PARAMS, (X, Y), told(), epochs=1, **options).state
    head, opt_state = by_hand()
    close(state.params["head"], head)
    chex.assert_trees_all_equal(state.params["body"], PARAMS["body"])
    shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]
    assert shapes(state.opt_state) == shapes(opt_state)
    close(state.opt_state.ratio, opt_state.ratio)


def test_it_is_known_that_kfac_reads_the_batch():
    """So `fit` doesn't fill a short one up."""
    example = X[0], Y[0]
    for optimizer, reads in ((told(), True), (optax.sgd(0.1), False)):
        step = fnn.train_step(LOSS, optimizer, trainable="head.*")
        state = jax.eval_shape(step.traced.first, PARAMS, {})
        assert is_coupled(step, state, jax.eval_shape(lambda x: x, example), None) == reads


def test_where_kfac_is_not_told():
    """At once if the model needs what is missing; else at the step, and never in silence."""
    batch = X, Y
    step = fnn.train_step(LOSS, kfac(NET, ops.softmax_cross_entropy, batch), trainable="head.*")
    with pytest.raises(Exception) as error:  # whatever the model says of None
        step.init(PARAMS)
    (note,) = [n for n in error.value.__notes__ if n.startswith("kfac:")]
    assert "params['body']['W'] is None" in note and "kfac(..., example_params=params)" in note

    def lenient(params, x):
        return x[:3] * params["scale"] + (0 if params["shift"] is None else params["shift"])

    params = {"scale": jnp.ones(3), "shift": jnp.ones(3)}
    loss = fnn.supervised(lenient, ops.softmax_cross_entropy)
    optimizer = kfac(lenient, ops.softmax_cross_entropy, batch)
    step = fnn.train_step(loss, optimizer, trainable="scale")
    state = step.init(params)
    with pytest.raises(ValueError, match=r"params\['shift'\] isn't trained.*example_params"):
        step(state, batch)


def test_what_kfac_is_told_must_fit():
    batch = X, Y
    trained = {"body": {"W": None, "b": None}, "head": PARAMS["head"]}
    for bad in ({"head": PARAMS["head"]}, PARAMS["head"]):
        optimizer = kfac(NET, ops.softmax_cross_entropy, batch, example_params=bad)
        with pytest.raises(ValueError, match="kfac: example_params must be a tree like the param"):
            optimizer.init(trained)
    optimizer = kfac(NET, ops.softmax_cross_entropy, batch, example_params=PARAMS)
    state = jax.eval_shape(optimizer.init, trained)
    update = lambda **more: jax.eval_shape(
        lambda state: optimizer.update(trained, state, trained, batch=batch, **more), state
    )
    with pytest.raises(ValueError, match=r"params\['body'\]\['W'\] is None, so update needs"):
        update()
    updates, _ = update(all_params=PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(trained)
