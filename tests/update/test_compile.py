"""Programs that are compiled before the first call: all of them, once, and the calls find them."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear import batches_of, leaves_of, linear_params, loss_fn, optimizer_of, run
from soak import some

import functrain as ft

pytestmark = pytest.mark.usefixtures("no_donation_is_lost")


class Compiled:
    """What XLA compiles of an update, and in which threads."""

    def __enter__(self):
        self.names, self.threads = [], set()
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *error):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration" and "functrain_" in details["fun_name"]:
            self.names.append(details["fun_name"].removeprefix("jit(functrain_").removesuffix(")"))
            self.threads.add(threading.current_thread())


def sharded(params):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    places = {"body": {"w": jax.P("data")}, "head": {"w": jax.P()}}
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, jax.NamedSharding(mesh, spec)), params, places)


PLACES = {
    "anywhere": lambda params: params,
    "the second device": lambda params: jax.device_put(params, jax.devices()[1]),
    "two devices": sharded,
}


def summed(params, batch):
    return ft.Loss(loss_fn(params, batch), weight=len(batch), metrics={"n": 1, "each": batch[:, 0]})


@pytest.mark.parametrize("place", some(PLACES, 2))
@pytest.mark.parametrize(
    ("accumulate", "programs"),
    [
        (1, ["scan", "scan", "whole", "whole"]),
        (2, ["first", "flush", "last", "last", "scan", "scan"]),
        (3, ["first", "flush", "last", "last", "middle", "scan", "scan"]),
    ],
)
def test_every_program_is_compiled_once_in_threads_and_no_call_compiles_another(place, accumulate, programs):
    params, batches = PLACES[place](linear_params()), batches_of(2 * accumulate)
    update = ft.make_update(summed, optimizer_of(params), accumulate=accumulate, ema=0.9)
    state = update.init(params, key=jax.random.key(0))
    with Compiled() as before:
        update.compile(state, batches[0], scan=batches)
    assert sorted(before.names) == programs
    assert threading.main_thread() not in before.threads
    with Compiled() as after:
        for _ in range(2):
            state, _ = run(update, state, np.asarray(batches)[: 2 * accumulate - 1])
            state, _ = update.flush(state)
            for batch in batches[:accumulate]:
                state, _ = update.measured(state, batch)
            state, _ = update.scan(state, batches)
            state, _ = update.scan(state, batches, measured=True)
    assert after.names == []


@pytest.mark.parametrize("place", ["anywhere", "two devices"])
def test_the_programs_of_a_window_of_the_gradients_of_each_loss_too(place):
    def two(params, batch):
        return {"main": loss_fn(params, batch), "aux": jnp.mean(params["body"]["w"] ** 2)}

    def main_alone(grads, *, per_loss):
        return per_loss["main"]

    params, batches = PLACES[place](linear_params()), batches_of(3)
    update = ft.make_update(two, optimizer_of(params), accumulate=3, gradients=main_alone)
    state = update.init(params)
    update.compile(state, batches[0], measured=False, flush=False)
    with Compiled() as after:
        run(update, state, batches)
    assert after.names == []


def test_what_is_not_asked_for_is_not_compiled_and_nothing_is_run():
    params = linear_params()
    update = ft.make_update(loss_fn, optimizer_of(params), accumulate=2, remainder="drop")
    state = update.init(params)
    before = leaves_of(state)
    with Compiled() as compiled:
        update.compile(state, jax.ShapeDtypeStruct((6, 4), jnp.float32), measured=False)
    assert sorted(compiled.names) == ["first", "last"]
    assert leaves_of(state) == before
    with Compiled() as compiled:
        run(update, state, batches_of(4))
    assert compiled.names == []


def phased(phase=None):
    critic = ft.Phase("critic", loss_fn, "body", repeat=1 if phase else 3)
    phases = ft.alternate(critic, ft.Phase("actor", loss_fn, "head"), phase=phase)
    return ft.make_update(phases, optimizer_of(linear_params()), accumulate=2)


@pytest.mark.parametrize("phase", [None, lambda step: "actor" if step % 4 == 3 else "critic"])
def test_every_phase_has_its_programs(phase):
    update, batches = phased(phase), batches_of(8)
    state = update.init(linear_params())
    with Compiled() as compiled:
        update.compile(state, batches[0], measured=False, flush=False)
    assert sorted(compiled.names) == ["first", "first", "last", "last"]
    with Compiled() as compiled:
        run(update, state, batches)
    assert compiled.names == []


def test_a_loss_function_that_fails_does_so_as_in_a_call():
    def failing(params, batch):
        raise ZeroDivisionError("in the loss function")

    update = ft.make_update(failing, optimizer_of(linear_params()))
    with pytest.raises(ZeroDivisionError, match="in the loss function"):
        update.compile(update.init(linear_params()), batches_of(1)[0])


# Telemetry in a scan


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_measured_scan_has_the_telemetry_of_every_step(accumulate):
    params, batches = linear_params(), batches_of(4 * accumulate)
    update = ft.make_update(loss_fn, optimizer_of(params), accumulate=accumulate)
    scanned, metrics = update.scan(update.init(params), batches, measured=True)
    state, rows = update.init(params), []
    for batch in batches:
        state, row = update.measured(state, batch)
        rows += [row["parts"]] if int(state.pending) == 0 else []
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    # A program of its own may fuse otherwise: float32's last bits, over four steps.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics["parts"], expected)
    plain, unmeasured = update.scan(update.init(params), batches)
    assert "parts" not in unmeasured
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), scanned.params, plain.params)


def test_a_measured_scan_of_phases_has_the_telemetry_of_each_under_its_name():
    update = phased()
    _, metrics = update.scan(update.init(linear_params()), batches_of(8), measured=True)
    shapes = {
        name: {part: jnp.shape(norms["grad_norm"]) for part, norms in of["parts"].items()}
        for name, of in metrics.items()
    }
    assert shapes == {"critic": {"body": (3,)}, "actor": {"head": (1,)}}


def test_a_program_is_lowered_of_shapes_alone_as_of_arrays():
    optim = optimizer_of(linear_params())
    update = ft.make_update(loss_fn, optim, accumulate=2)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batches_of(1)[0])
    lowered = update.lower(update.abstract(linear_params()), shapes)
    assert lowered.as_text() == update.lower(update.init(linear_params()), shapes).as_text()


def test_a_spec_that_ends_in_vain_compiles_no_second_program():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    update, batch = ft.make_update(loss_fn, optimizer_of(linear_params())), batches_of(1)[0]
    compiled = []
    for spec in (jax.P(), jax.P(None), jax.P(None, None)):
        params = jax.device_put(linear_params(), jax.NamedSharding(mesh, spec))
        with Compiled() as found:
            state, _ = update(update.init(params), batch)
        compiled.append(found.names)
        shardings = [leaf.sharding for leaf in jax.tree.leaves(state.params)]
        assert shardings == [leaf.sharding for leaf in jax.tree.leaves(update.abstract(params).params)]
    assert compiled == [["whole"], [], []]
