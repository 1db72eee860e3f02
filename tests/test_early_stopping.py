"""Ending training where it no longer gets better, the best state, the learning rate shown."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn import EarlyStopping

X = np.ones((4, 1))
KEY = jax.random.key(0)


def loss(params, x):
    return jnp.sum((params["w"] * x) ** 2), {"w": params["w"]}


# Of one step an epoch, the parameter after epoch i is i, and the validation's loss any function of
# it: here the i-th of these numbers.
def ends_after(values, **options):
    table = jnp.asarray([0.0, *values])
    steps = optax.GradientTransformation(
        lambda params: (), lambda g, state, params=None: (jax.tree.map(jnp.ones_like, g), state)
    )
    shown = lambda params, x: table[params["w"].astype(int)]
    return fnn.fit(
        loss,
        {"w": jnp.zeros(())},
        X,
        steps,
        epochs=len(values),
        shuffle=False,
        validation=X,
        validation_loss=shown,
        progress=False,
        early_stopping=EarlyStopping(**options),
    )


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "options", "epochs", "best"),
    [
        ([3, 2, 1, 2, 2, 2, 0], {"patience": 3}, 6, 3),
        ([3, 2, 1, 2, 2, 0.5, 2], {"patience": 3}, 7, 6),
        ([1, 2, 3, 3, 2], {"patience": 2, "higher": True}, 5, 3),
        ([3, 2.9, 2.8, 2.7, 2.6], {"patience": 3, "least": 0.25}, 5, 4),
        ([NAN, 3, NAN, NAN, 1], {"patience": 2}, 4, 2),
        ([3, 4, 5, 1], {"patience": None}, 4, 4),
        ([NAN, NAN, NAN], {"patience": 2}, 2, None),
    ],
)
def test_it_ends_when_and_keeps_what_it_should(values, options, epochs, best):
    result = ends_after(values, **options)
    assert len(result.history["validation_loss"]) == epochs
    assert result.state.params["w"] == epochs
    if best is None:
        assert result.best is None
    else:
        assert result.best.params["w"] == best and list(result.best.position) == [best, 0, best]


def test_the_best_state_is_a_copy_to_go_on_from():
    seen = []
    options = {"batch_size": 2, "key": KEY, "progress": False}
    options |= {"early_stopping": EarlyStopping(None, "loss", higher=True)}  # the first is best
    start = {"w": jnp.ones(())}
    result = fnn.fit(
        loss,
        start,
        X,
        optax.sgd(0.1),
        epochs=4,
        after_epoch=lambda epoch, state, record: seen.append(np.asarray(state.params["w"])),
        **options,
    )
    np.testing.assert_array_equal(result.best.params["w"], seen[0])
    more = fnn.fit(loss, result.best, X, optax.sgd(0.1), epochs=3, **options)
    np.testing.assert_array_equal(more.params["w"], result.params["w"])


def test_what_cannot_be_monitored():
    run = lambda **options: fnn.fit(
        lambda p, x: (loss(p, x)[0], {"vector": jnp.ones(2)}),
        {"w": jnp.ones(())},
        X,
        optax.sgd(0.1),
        epochs=2,
        shuffle=False,
        progress=False,
        **options,
    )
    with pytest.raises(ValueError, match="monitors 'validation_loss', but there are no data"):
        run(early_stopping=EarlyStopping(3))
    with pytest.raises(ValueError, match="no 'accuracy' to monitor. It has 'loss', 'vector'"):
        run(early_stopping=EarlyStopping(3, "accuracy"))
    with pytest.raises(ValueError, match=r"'vector' is an array of shape \(2,\)"):
        run(early_stopping=EarlyStopping(3, "vector"))
    for wrong in (EarlyStopping, 5):
        with pytest.raises(TypeError, match="early_stopping must be an EarlyStopping such as"):
            run(early_stopping=wrong)
    for fields in ({"patience": 0}, {"patience": 1.5}, {"least": -1}, {"least": NAN}):
        with pytest.raises((TypeError, ValueError), match="EarlyStopping: "):
            EarlyStopping(**{"patience": 3} | fields)
    for fields in ({"monitor": 3}, {"higher": 1}):
        with pytest.raises(TypeError, match="EarlyStopping: "):
            EarlyStopping(3, **fields)


def test_the_learning_rate_in_the_record():
    run = lambda optimizer, **options: (
        fnn.fit(
            loss,
            {"w": jnp.ones(())},
            X,
            optimizer,
            epochs=3,
            batch_size=2,
            shuffle=False,
            progress=False,
            **options,
        ).history
    )
    with pytest.raises(TypeError, match=r"schedule must return a learning rate, .* shape \(2,\)"):
        run(optax.sgd(0.1), schedule=lambda step: np.ones(2, np.float32))
    ended = []
    for odd in ("0.1", None, {"a": 0.1}):
        schedule = lambda step, odd=odd: odd
        with pytest.raises(TypeError, match="schedule must return a learning rate"):
            run(optax.sgd(0.1), schedule=schedule, after_epoch=lambda *_: ended.append(1))
    assert not ended  # it is told at once
    with pytest.raises(TypeError) as caught:
        run(optax.sgd(schedule))
    assert any("in the optimizer's update. A schedule" in n for n in caught.value.__notes__)
    schedule = optax.linear_schedule(0.1, 0.0, 6)
    wanted = [float(schedule(i)) for i in (1, 3, 5)]  # of the last step of each epoch
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
    chained = optax.chain(optax.clip(1.0), injected)
    for found in (
        run(injected)["learning_rate"],
        run(chained)["learning_rate"],
        run(optax.sgd(schedule), schedule=schedule)["learning_rate"],
    ):
        assert found == pytest.approx(wanted)
    assert "learning_rate" not in run(optax.sgd(schedule))
    with pytest.raises(TypeError, match="schedule must be a function of the number of steps"):
        run(optax.sgd(0.1), schedule=0.1)
