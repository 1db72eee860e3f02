"""`find_nonfinite` inside shard_map, on eight devices: what was put there is found, and where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive
from test_birth import born, line_of

import fnn

MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
ROWS = np.arange(1.0, 33.0).reshape(8, 4)  # two rows and two columns on a device


def on_devices(function, ins, out, **options):
    return jax.shard_map(function, mesh=MESH, in_specs=ins, out_specs=out, **options)


def source_of(found, function, text):
    line = line_of(function, text).replace("test_birth.py", "test_birth_devices.py")
    return found.source.startswith(line)


def spoilt(row, column, number):
    rows = ROWS.copy()
    rows[row, column] = number
    return rows


def summed_logs(x):
    y = jnp.log(x)  # the log
    return lax.psum(jnp.sum(y), ("data", "model"))


@pytest.mark.parametrize("checks", [True, pytest.param(False, marks=exhaustive)])
def test_the_operation_and_the_device(checks):
    f = on_devices(summed_logs, P("data", "model"), P(), check_vma=checks)
    assert fnn.find_nonfinite(f, ROWS) is None
    found = born(jax.jit(f), spoilt(5, 2, -1.0))
    assert (found.kind, found.place, found.operation) == ("nan", "forward", "log")
    assert found.device == (("data", 2), ("model", 1))
    assert found.index == (1, 0) and found.shape == (2, 2) and found.inputs == ("-1",)
    assert source_of(found, summed_logs, "the log")
    assert (found.example, found.example_of) == (5, ("x",))
    assert "device    data=2, model=1" in str(found) and "example   5 of x" in str(found)
    assert "on the device data=2, model=1" in found.in_a_sentence()


def test_an_argument_and_what_is_made_outside():
    f = on_devices(summed_logs, P("data", "model"), P())
    found = born(lambda x: f(x), spoilt(6, 3, np.nan))
    assert (found.place, found.operation, found.index) == ("argument", "x", (6, 3))
    assert found.device == ()
    found = born(lambda x: f(jnp.sqrt(x)), spoilt(6, 3, -1.0))
    assert (found.operation, found.index, found.device) == ("sqrt", (6, 3), ())
    # And behind it: divided over both axes at once, in an output that isn't a sum.
    apart = on_devices(lambda x: x * 2.0, P(("data", "model")), P(("data", "model")))
    found = born(lambda x: jnp.log(apart(x)), spoilt(5, 1, 0.0))
    assert (found.operation, found.index, found.device) == ("log", (5, 1), ())
    found = born(lambda x: apart(x) + 1.0, spoilt(5, 1, np.inf))
    assert (found.place, found.index) == ("argument", (5, 1))
    rows = P(("data", "model"))  # the sixth of eight devices
    found = born(on_devices(jnp.log, rows, rows), spoilt(5, 1, -1.0))
    assert (found.device, found.index) == ((("data", 2), ("model", 1)), (0, 1))
    assert found.example == 5


def test_what_devices_share_has_no_device_along_their_axis():
    def f(x, w):
        scale = jnp.log(w)  # on all of "data" alike
        return lax.pmean(x, "data") * scale

    run = on_devices(f, (P("data", "model"), P("model")), P(None, "model"))
    w = np.array([1.0, 2.0, 3.0, -1.0])
    found = born(run, ROWS, w)
    assert (found.operation, found.device, found.index) == ("log", (("model", 1),), (1,))
    assert (found.example, found.example_of) == (3, ("w",))  # of no batch, but of this array
    # Each device's part is fine; their sum overflows.
    total = on_devices(lambda x: lax.psum(x, "data"), P("data"), P())
    found = born(total, np.full(4, 1e308))
    assert (found.kind, found.device) == ("inf", ()) and "psum" in found.operation


@exhaustive
def test_neighbours_and_gathering():
    def f(x):
        y = jnp.sqrt(x)  # the root
        there = lax.ppermute(y, "data", [(i, (i + 1) % 4) for i in range(4)])
        return lax.all_gather(there, "model", axis=1, tiled=True)

    run = on_devices(f, P("data", "model"), P("data", None), check_vma=False)
    found = born(run, spoilt(2, 3, -4.0))
    assert (found.operation, found.device) == ("sqrt", (("data", 1), ("model", 1)))
    assert found.index == (0, 1) and source_of(found, f, "the root")


@exhaustive
@pytest.mark.parametrize("reverse", [False, True])
def test_in_a_scan(reverse):
    def step(carry, x):
        carry = carry + lax.psum(jnp.log(x), "data")  # in the loop
        return carry, x - carry

    def f(xs):
        start = lax.pcast(jnp.zeros(2), "model", to="varying")
        return lax.scan(step, start, xs, reverse=reverse)

    run = on_devices(f, P("data", "model"), (P("model"), P("data", "model")))
    rows = np.repeat(ROWS, 2, 0)  # four steps on each device
    rows[9, 1] = -1.0
    for chosen in (0, 1):
        found = born(lambda x, chosen=chosen: jax.jit(run)(x)[chosen], rows)
        assert (found.operation, found.inputs) == ("log", ("-1",))
        assert found.device == (("data", 2), ("model", 0)) and found.index == (1,)
        (loop,) = found.loops
        assert (loop.kind, loop.number, loop.length) == ("scan", 1, 4)
        assert source_of(found, step, "in the loop")


@exhaustive
def test_in_while_loops_of_other_lengths_on_each_device():
    def f(x):
        def turn(state):
            i, y = state
            return i + 1, jnp.sqrt(y - 1.0)  # the root

        steps = lax.axis_index("data") + 2
        i = jnp.zeros_like(steps)
        return lax.while_loop(lambda s: s[0] < steps, turn, (i, x))[1]

    run = on_devices(f, P("data"), P("data"))
    # 1.5 → 0.7 → nan: the second step. From 1e40 on it goes well.
    found = born(run, np.array([1e40, 1e40, 1e40, 1.5]))
    assert found.operation == "sqrt" and found.device == (("data", 3),)
    assert found.loops[0].kind == "while" and found.loops[0].number == 1
    found = born(run, np.array([1.5, 1e40, 1e40, 1e40]))
    assert found.device == (("data", 0),) and found.loops[0].number == 1


@exhaustive
def test_in_branches_calls_and_custom_derivatives():
    @jax.custom_vjp
    def root(x):
        return jnp.sqrt(x)  # the root

    root.defvjp(lambda x: (root(x), x), lambda x, g: (g,))

    def f(x):
        place = lax.axis_index("data")
        logs = lambda x: jnp.log(x)  # the log
        y = lax.cond(place == 3, logs, lambda x: x * 1.0, x)
        return jax.checkpoint(jax.jit(root))(y + 10.0) + y

    run = on_devices(f, P("data", "model"), P("data", "model"))
    found = born(run, spoilt(7, 0, -1.0))
    assert (found.operation, found.device) == ("log", (("data", 3), ("model", 0)))
    assert fnn.find_nonfinite(run, spoilt(1, 0, -1.0)) is None  # another branch
    found = born(run, spoilt(1, 2, -20.0))
    assert (found.operation, found.device) == ("sqrt", (("data", 0), ("model", 1)))
    assert source_of(found, f.__globals__["born"] and root.__wrapped__, "the root")


@exhaustive
def test_in_the_gradient():
    def f(x):
        y = jnp.where(x > 0, jnp.sqrt(x), 0.0)  # the root
        return lax.psum(jnp.sum(y), ("data", "model"))

    loss = on_devices(f, P("data", "model"), P())
    found = born(loss, spoilt(4, 1, 0.0))
    assert (found.kind, found.place, found.operation) == ("nan", "0 * inf", "mul")
    assert source_of(found, f, "the root")
    assert found.device == (("data", 2), ("model", 0)) and found.output == "the gradient of x"
    assert found.example == 4
    found = born(jax.grad(loss), spoilt(4, 1, 0.0))
    assert found.device == (("data", 2), ("model", 0))


@exhaustive
def test_on_an_explicit_mesh_and_under_vmap():
    mesh = jax.make_mesh((8,), ("data",))
    f = jax.shard_map(
        lambda x: lax.psum(jnp.sum(jnp.log(x)), "data"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )
    x = jax.device_put(spoilt(6, 1, -2.0), jax.sharding.NamedSharding(mesh, P("data")))
    found = born(f, x)
    assert (found.operation, found.device) == ("log", (("data", 6),))
    assert found.example == 6
    mapped = jax.vmap(on_devices(summed_logs, P("data", "model"), P()))
    found = born(mapped, np.stack([ROWS, spoilt(5, 2, -1.0), ROWS]))
    assert (found.operation, found.device) == ("log", (("data", 2), ("model", 1)))
    assert found.index == (1, 1, 0) and found.example == 1  # of those of vmap


@exhaustive
def test_a_part_of_the_mesh():
    """The other axis is the compiler's."""
    f = functools.partial(jax.shard_map, mesh=MESH, in_specs=P("data"), out_specs=P())
    run = jax.jit(f(lambda x: lax.psum(jnp.sum(jnp.log(x)), "data"), axis_names={"data"}))
    found = born(run, spoilt(5, 2, -1.0))
    assert (found.operation, found.device, found.index) == ("log", (("data", 2),), (1, 2))
