"""Batches that are read in advance: the run is the same to the bit, and stands where it would have stood."""

import signal
import socket
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import warm

import functrain as ft
from functrain.loop.batches import put_ahead
from functrain.loop.epoch import Epoch
from functrain.loop.prefetch import Prefetched
from functrain.loop.reader import Reader
from functrain.loop.signals import StopSignals

SAFETY = 60  # Seconds after which what is waited for does not come.


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "functrain-reads"]


class Counted:
    """Batches of an epoch, whose position is one object that it keeps; it tells how many it has read."""

    def __init__(self, batches=8):
        self.batches, self.position, self.news = batches, {"number": 0}, threading.Condition()

    def __iter__(self):  # Which begins anew.
        self.position = {"number": 0}
        return self

    def __next__(self):
        with self.news:
            if self.position["number"] == self.batches:
                raise StopIteration
            self.position["number"] += 1
            self.news.notify_all()
        return {"x": runs.X[self.position["number"] :][:4], "y": runs.Y[self.position["number"] :][:4]}

    def get_state(self):
        return self.position

    def set_state(self, state):
        self.position = state

    def has_read(self, count, seconds=SAFETY):
        with self.news:
            return self.news.wait_for(lambda: self.position["number"] >= count, seconds)


def fitted(data, **options):
    update = runs.update_of()
    return ft.fit(update, update.init(runs.start()), data, **{"epochs": 1, **options})


@pytest.mark.parametrize("options", [{}, {"unroll": 2}, {"steps": 7}, {"log": ft.Every(updates=1)}])
def test_a_run_is_the_same_to_the_bit(options):
    options = {"epochs": 3, **options}
    results = [fitted(runs.data_of(), prefetch=prefetch, **options) for prefetch in (0, 1, 2, 9)]
    assert all(runs.bits_of(result.state) == runs.bits_of(results[0].state) for result in results)
    assert len({result.epochs for result in results}) == 1
    assert not readers()


def test_as_many_batches_as_asked_for_are_read_while_an_update_goes_on():
    class Waiting(ft.Hook):
        def update_ended(self, run):
            left = data.batches - run.step
            self.found = data.has_read(run.step + min(2, left))
            assert not (left > 2 and data.has_read(run.step + 3, seconds=0.05))

    data, hook = Counted(), Waiting()
    fitted(data, prefetch=2, hooks=[hook])
    assert hook.found


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_iterator_that_begins_anew_where_it_is_asked_for_one_is_read_to_its_end(prefetch):
    result = fitted(Counted(), prefetch=prefetch, epochs=None, steps=20)
    assert (int(result.state.step), result.epochs) == (20, 2)


@pytest.mark.parametrize("unroll", [1, 3])
def test_the_position_is_that_of_the_batches_that_were_given_out(unroll):
    positions = []
    for prefetch in (0, 3):
        hook = runs.Recorder(lambda run: (run.step, run.reader.read, dict(run.reader.position or {})))
        fitted(Counted(), prefetch=prefetch, unroll=unroll, hooks=[hook])
        positions.append(hook.at("update_ended"))
    assert positions[0] == positions[1]
    assert [position["number"] for _, _, position in positions[0]] == [read for _, read, _ in positions[0]]


def test_a_run_that_was_cut_short_goes_on_with_the_next_batch(tmp_path):
    def run(directory, steps):
        checkpoints = ft.Checkpoints(directory, every=ft.Every(updates=100))
        return fitted(runs.data_of(), prefetch=2, epochs=None, steps=steps, checkpoints=checkpoints).state

    whole = run(tmp_path / "whole", 8)
    run(tmp_path / "in two", 3)
    assert runs.bits_of(run(tmp_path / "in two", 8)) == runs.bits_of(whole)


@pytest.mark.parametrize("reads", ["prefetch", "read_ahead"])
def test_a_signal_that_another_thread_takes_ends_the_wait_for_what_is_read(reads):
    """As one does that comes just as the wait begins: it wakes nobody."""
    goes_on = threading.Event()

    def read(number):
        if not goes_on.is_set():
            time.sleep(0.1)  # Until it is waited for.
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            assert goes_on.wait(SAFETY)
        return {"x": np.float32([number])}

    batches = Epoch(read, 1, read_ahead=1)
    if reads == "prefetch":
        batches = Prefetched(Epoch(read, 1, read_ahead=0), 1, prepare=lambda batch: batch)
    with StopSignals() as signals:
        found = signals.awaited(next, batches)
        goes_on.set()
        assert found is None
    assert next(batches) == {"x": np.float32([0])}


def test_an_error_of_the_data_is_raised_at_its_batch():
    class Broken(Counted):
        def __next__(self):
            if self.position["number"] == 5:
                raise OSError("the disk is gone")
            return super().__next__()

    hook = runs.Recorder()
    with pytest.raises(OSError, match="the disk is gone"):
        fitted(Broken(), prefetch=2, hooks=[hook])
    assert [step for step, _ in hook.at("update_ended")] == [1, 2, 3, 4, 5]
    assert isinstance(hook.error, OSError)
    assert not readers()


def test_the_thread_has_ended_before_the_autopsy_reads_the_data_again(tmp_path):
    class Bad(Counted):
        def __iter__(self):
            assert not readers()
            return super().__iter__()

        def __next__(self):
            batch = super().__next__()
            return batch if self.position["number"] < 5 else {"x": batch["x"] * np.float32(np.nan), "y": batch["y"]}

    options = {"log": ft.Every(updates=1), "checkpoints": ft.Checkpoints(tmp_path, every=ft.Every(updates=2))}
    with pytest.raises(ft.NonFiniteError, match="with batch 4 of epoch 0"):
        fitted(Bad(), prefetch=2, **options)


def test_no_thread_reads_on_when_a_run_ends_within_an_epoch():
    class Stopping(ft.Hook):
        def update_ended(self, run):
            run.stop("enough")

    fitted(Counted(), prefetch=2, hooks=[Stopping()])
    assert not readers()


def test_batches_are_on_the_device_before_they_are_asked_for():
    mesh = jax.make_mesh((1,), ("data",))
    by_example = jax.NamedSharding(mesh, jax.P("data"))
    reader = Reader(runs.data_of(), 2, lambda batch: put_ahead(batch, by_example))
    reader.begin(epoch=0)
    (batch,) = reader.next_chunk()
    assert {leaf.sharding for leaf in batch.values()} == {by_example}
    reader.rest()
    assert {type(leaf) for leaf in put_ahead(batch, None).values()} == {type(jnp.zeros(()))}


def test_the_thread_has_the_dtypes_and_the_device_of_the_program():
    params = {"w": np.zeros((), np.float64)}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(1.0)})
    update = ft.make_update(lambda params, batch: params["w"] * batch["x"], optim)
    with jax.enable_x64(True):
        state = update.init(params)
        state = ft.fit(update, state, [{"x": np.float64(1e-300)}], epochs=1, prefetch=1).state
    assert float(state.params["w"]) == -1e-300


@pytest.mark.parametrize("prefetch", [-1, 2.0, None])
def test_what_is_no_number_of_batches_is_refused(prefetch):
    with pytest.raises(ft.FitError) as raised:
        fitted(runs.data_of(), prefetch=prefetch)
    assert str(raised.value) == f"prefetch={prefetch!r}: give the number of batches to read in advance, such as 2"


TWO_PROCESSES = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
import functrain as ft

jax.config.update("jax_platforms", "cpu")
if len(sys.argv) > 1:
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
mesh = jax.make_mesh((jax.device_count(),), ("data",))

def noisy(example, rng):
    return {"x": example["x"] + rng.integers(100)}

data = ft.from_arrays({"x": np.arange(24)}, batch_size=4, seed=3).map_examples(noisy)
optim = ft.Optimizer(ft.partition({"w": jnp.zeros(())}, {"all": ...}), {"all": optax.sgd(1.0)})
update = ft.make_update(lambda params, batch: params["w"] * (batch["x"] ** 2).sum(), optim)
placed = jax.make_array_from_process_local_data(jax.NamedSharding(mesh, jax.P()), np.float32(0))
for prefetch, unroll in ((0, 1), (2, 1), (2, 3)):
    state = update.init({"w": placed + 0})
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    result = ft.fit(update, state, data, epochs=2, prefetch=prefetch, unroll=unroll, sharding=sharding)
    print("W", int(result.state.params["w"].addressable_data(0)))
"""


@pytest.mark.slow
def test_two_processes_read_ahead_each_its_half_and_draw_what_one_draws():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [warm.Process(TWO_PROCESSES, port, process) for process in range(2)] + [warm.Process(TWO_PROCESSES)]
    outputs = [process.communicate(timeout=120) for process in started]
    sums = [[line for line in output.splitlines() if line.startswith("W ")] for output, _ in outputs]
    assert len(sums[0]) == 3, outputs
    assert len({line for lines in sums for line in lines}) == 1, outputs
