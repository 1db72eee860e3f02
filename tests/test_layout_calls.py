"""`fit` on a layout: data on the devices, many steps a call, one program, nothing more sent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled_programs
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive
from test_layout_training import KEY, LAYOUTS, LOSS, NET, PARAMS, close

import fnn
from fnn import ops, sharding
from fnn.layers import BatchNorm, Linear, chain
from fnn.sharding import collectives
from fnn.train import calls, sources

RNG = np.random.default_rng(1)
X, Y = RNG.normal(size=(44, 8)), RNG.integers(8, size=44)  # a last batch of 12: of no use to eight
FULL = LAYOUTS["full"]
ADAM, OPTIONS = optax.adam(0.05), {"batch_size": 16, "epochs": 1, "key": KEY, "progress": False}


def train(layout, data=(X, Y), loss=LOSS, start=PARAMS, **options):
    step = fnn.train_step(loss, optax.adam(0.05), layout=layout)
    size = {} if isinstance(data, list) else {"batch_size": 16}
    options = {"epochs": 3, "key": KEY, "progress": False} | size | options
    return step, fnn.fit(step, start, data, **options)


@pytest.fixture(scope="module")
def alone():
    return train(None)[1]


@pytest.fixture
def counted(monkeypatch):
    """The numbers of steps of each call of the device, and the arguments of its programs."""
    seen, programs = [], []
    once, foresee = calls.Calls._once, calls.foresee

    def note(self, work, chunk, at, count):
        done = once(self, work, chunk, at, count)
        seen.append((chunk.kind, done))
        return done

    def hold(where, step, program, args, *more):
        programs.append((program, args))
        return foresee(where, step, program, args, *more)

    monkeypatch.setattr(calls.Calls, "_once", note)
    monkeypatch.setattr(calls, "foresee", hold)
    return seen, programs


def train_in_one_program(layout, data=(X, Y), **options):
    with compiled_programs() as compiled:
        step, result = train(layout, data, **options)
    assert len(step.programs.traces) == 1
    assert compiled.count("jit(run)") == 1
    return result


def sent(compiled):
    """Bytes by kind of collective, of a loop's one turn."""
    found = {}
    for c in collectives(compiled):
        found[c.kind] = found.get(c.kind, 0) + c.size * c.times
    return found


def test_many_steps_a_call_in_one_program(counted, alone):
    seen, programs = counted
    result = train_in_one_program(FULL, steps_per_call=2)
    close(result.params, alone.params)
    close(result.steps, alone.steps)
    assert seen == [("rows", 2), ("rows", 1)] * 3
    (_, args), data = programs[0], programs[0][1][2]
    assert all(x.sharding == FULL.everywhere for x in jax.tree.leaves(data))
    # And nothing is sent that one step alone doesn't send: the rows of a batch are there already.
    key = FULL.spread(KEY)
    one = fnn.train_step(LOSS, optax.adam(0.05), layout=FULL)
    batch = FULL.place_batch((X[:16], Y[:16]))
    state = one.init(PARAMS)
    wanted = sent(jax.jit(one, donate_argnums=0).lower(state, batch, key).compile())
    program, args = programs[0]
    found = sent(program.lower(*args).compile())
    assert found.keys() == wanted.keys()
    for kind, size in wanted.items():
        assert found[kind] <= size + 64


@exhaustive
@pytest.mark.parametrize("name", ["both", "sequence"])
def test_nothing_more_is_sent(name, counted):
    """Than one step sends whose batch was dealt out beforehand, but for a few flags."""
    _, programs = counted
    layout, loss, data, start = LAYOUTS["both"], LOSS, (X, Y), PARAMS
    at = P()
    if name == "sequence":  # of eight positions a device has two
        layout = sharding.sequence_parallel(jax.make_mesh((2, 4), ("data", "sequence")))
        loss, start, at = of_positions, {"W": np.eye(4)}, P(None, "sequence")
        data = RNG.normal(size=(2, 44, 8, 4))
        data = data[0], data[1]
    train(layout, data, loss, start, epochs=1)
    one = fnn.train_step(loss, optax.adam(0.05), layout=layout)
    batch = layout.place_batch(jax.tree.map(lambda x: x[:16], data))
    key = layout.spread(KEY)
    wanted = sent(jax.jit(one, donate_argnums=0).lower(one.init(start), batch, key).compile())
    program, args = programs[0]
    assert {x.sharding.spec for x in jax.tree.leaves(args[2])} == {at}
    found = sent(program.lower(*args).compile())
    for kind in found.keys() | wanted.keys():
        assert found.get(kind, 0) <= wanted.get(kind, 0) + 64, kind


def of_positions(params, example, mode):
    x, y = example
    return jnp.mean((x @ params["W"] - y) ** 2)


@exhaustive
def test_data_that_do_not_fit_come_from_the_host(counted, alone, monkeypatch):
    seen, _ = counted
    monkeypatch.setattr(sources, "fits", lambda data, layout=None: False)
    close(train_in_one_program(FULL).params, alone.params)
    assert {kind for kind, _ in seen} == {"batch"} and len(seen) == 9


def test_each_device_counts_in_what_fits(monkeypatch):
    from fnn.train import chunks

    data = np.zeros((16, 4), np.float32)
    monkeypatch.setattr(chunks, "device_memory", lambda: 4 * data.nbytes)
    assert chunks.fits(data) and not chunks.fits(data, FULL)  # eight, of one memory
    monkeypatch.setattr(chunks, "device_memory", lambda: 32 * data.nbytes)
    assert chunks.fits(data, FULL)
    sequence = sharding.sequence_parallel(jax.make_mesh((2, 4), ("data", "sequence")))
    monkeypatch.setattr(chunks, "device_memory", lambda: 8 * data.nbytes)
    assert chunks.fits(data, sequence)


@exhaustive
def test_a_stream_has_one_program(counted):
    """A short last batch is filled up; on the devices, where it lies there already."""
    batches = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 44, 16)]
    wanted = train(None, batches, epochs=2)[1]
    for place in (lambda x: x, FULL.place_batch, jnp.asarray):
        placed = [jax.tree.map(place, b) for b in batches]
        result = train_in_one_program(FULL, placed, epochs=2)
        close(result.params, wanted.params)
        assert result.steps["loss"].shape == (6,)


@exhaustive
def test_a_loss_that_sums_over_the_batch_is_not_filled_up(counted):
    seen, _ = counted
    net = chain(hidden=Linear(16), norm=BatchNorm(), out=Linear(8))
    loss, params = fnn.supervised(net, ops.softmax_cross_entropy), net.init(KEY, X[0])
    step, found = train(FULL, loss=loss, start=params, steps_per_call=4)
    wanted = train(None, loss=loss, start=params)[1]
    close((found.params, found.state.model_state), (wanted.params, wanted.state.model_state))
    assert seen[:2] == [("rows", 2), ("rows", 1)] and len(step.programs.traces) == 2


@exhaustive
@pytest.mark.parametrize("nonfinite", ["raise", "roll_back"])
def test_a_bad_step_in_the_midst_of_a_call(nonfinite):
    bad = X.copy()
    bad[20] = np.inf
    run = lambda layout: fnn.fit(
        LOSS,
        PARAMS,
        (bad, Y),
        optax.adam(0.05),
        epochs=2,
        batch_size=16,
        key=KEY,
        shuffle=False,
        check=False,
        progress=False,
        nonfinite=nonfinite,
        layout=layout,
        steps_per_call=3,
    )
    results = []
    for layout in (None, FULL):
        if nonfinite == "raise":
            with pytest.raises(fnn.NonFiniteError, match="hidden") as caught:
                run(layout)
            results.append(caught.value.result)
        else:
            results.append(run(layout))
    alone, ours = results
    close(ours.params, alone.params)
    assert len(ours.steps["loss"]) == len(alone.steps["loss"])
    at = jax.tree.map(lambda x: x.sharding, ours.state)
    assert jax.tree.leaves(at) == jax.tree.leaves(FULL.of_state(ours.state))


@exhaustive
def test_a_state_goes_on_in_the_midst_of_an_epoch(alone):
    class Enough(Exception):
        pass

    def stop(epoch, state, record):
        if epoch == 2:
            raise Enough

    with pytest.raises(Enough) as caught:
        train(FULL, steps_per_call=1, after_epoch=stop)
    _, result = train(FULL, start=caught.value.result.state, epochs=1)
    close(result.params, alone.params)


def test_evaluation_has_one_program():
    """A short last batch is filled up with what doesn't count; on one device, too."""
    from fnn.train.evaluation import Evaluation

    metric = lambda output, target: jnp.argmax(output) == target
    loss = fnn.supervised(NET, ops.softmax_cross_entropy, right=metric, out=lambda o, t: o)
    each = jax.vmap(lambda x, y: loss(PARAMS, (x, y)))(X, Y)
    wanted = {"loss": np.mean(each[0])} | {n: np.mean(v, 0) for n, v in each[1].items()}
    for layout in (None, FULL):
        evaluation = Evaluation(lambda: loss)
        with compiled_programs() as compiled:
            for data in ((X, Y), [(X[:16], Y[:16]), (X[16:32], Y[16:32]), (X[32:], Y[32:])]):
                size = None if isinstance(data, list) else 16
                source = fnn.train.data.batches_of(
                    "evaluate", data, batch_size=size, shuffle=False, epochs=1
                )
                found = evaluation.means(PARAMS, {}, source, None, False, layout=layout)
                for name, value in wanted.items():
                    np.testing.assert_allclose(found[name], value, rtol=1e-6)
        assert evaluation.traces == ["means"]
        assert compiled.count("jit(means)") == 1


def test_a_second_fit_compiles_nothing():
    step, _ = train(FULL)
    with compiled_programs() as compiled:
        fnn.fit(step, PARAMS, (X, Y), batch_size=16, epochs=1, key=KEY, progress=False)
    assert not compiled


def test_a_second_fit_by_name_compiles_nothing():
    def run():
        fnn.fit(LOSS, PARAMS, (X, Y), ADAM, **OPTIONS, layout=FULL)

    run()
    with compiled_programs() as compiled:
        run()
    assert not compiled


def test_a_layout_that_is_none():
    for function in (fnn.fit, fnn.evaluate):
        with pytest.raises(TypeError, match="layout must be one of fnn.sharding's"):
            more = () if function is fnn.evaluate else (optax.sgd(0.1),)
            epochs = {} if function is fnn.evaluate else {"epochs": 1}
            function(LOSS, PARAMS, (X, Y), *more, **epochs, layout=np.zeros(2))
