"""Hooks, the one that stops a run early, and what is best."""

import dataclasses
import re
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from runs import Recorder, X, Y, bits, counted, data_of, loss_fn, scripted, start, update_of

import functrain as ft
from functrain.errors import UpdateError


def test_hooks_are_told_each_event_once_and_in_order(tmp_path):
    """The state that a hook is given is that of the event; what is evaluated and saved follows the update."""
    recorder = Recorder()
    ft.fit(
        *counted(update_of(), batches_an_epoch=2), epochs=2, evaluation=scripted(1, 2), hooks=[recorder],
        checkpoints=ft.Checkpoints(tmp_path, keep_best="valid/loss"),
    )  # fmt: skip
    assert recorder.events == [
        ("run_started", (0, 0)),
        ("update_ended", (1, 0)),
        ("update_ended", (2, 0)),
        ("evaluation_ended", (2, 1)),
        ("checkpoint_saved", (2, 1)),
        ("update_ended", (3, 1)),
        ("update_ended", (4, 1)),
        ("evaluation_ended", (4, 2)),
        ("checkpoint_saved", (4, 2)),
        ("run_ended", (4, 2)),
    ]
    assert recorder.error is None


def test_a_step_that_ends_a_window_cut_short_is_told_once():
    recorder = Recorder(of=lambda run: run.step)
    ft.fit(*counted(update_of(accumulate=3)), epochs=2, hooks=[recorder])
    assert recorder.at("update_ended") == [1, 2, 3, 4]


class TroubleError(Exception):
    pass


@pytest.mark.parametrize("event", ["run_started", "update_ended", "evaluation_ended", "checkpoint_saved"])
def test_hooks_are_told_of_the_end_also_when_an_exception_is_it(event, tmp_path):
    class Failing(ft.Hook):
        pass

    def fail(self, run):
        raise TroubleError(event)

    setattr(Failing, event, fail)
    recorder = Recorder()
    with pytest.raises(TroubleError, match=event):
        ft.fit(
            *counted(update_of()), epochs=2, evaluation=scripted(1, 2), checkpoints=ft.Checkpoints(tmp_path),
            hooks=[recorder, Failing()],
        )  # fmt: skip
    assert recorder.events[-1][0] == "run_ended"
    assert isinstance(recorder.error, TroubleError)


def test_hooks_are_told_of_data_that_fails_and_of_an_interrupt():
    for error in (TroubleError(), KeyboardInterrupt()):

        def data(error=error):
            yield from data_of()
            raise error

        update, recorder = update_of(), Recorder()
        with pytest.raises(type(error)):
            ft.fit(update, update.init(start()), data(), epochs=2, hooks=[recorder])
        assert recorder.error is error


class Averaging(ft.Hook):
    """Counts updates, and stops a run."""

    def __init__(self, stop_at=None):
        self.count, self.stop_at = 0, stop_at

    def update_ended(self, run):
        self.count += 1
        if run.step == self.stop_at:
            run.stop("enough")

    def state(self):
        return {"count": self.count}

    def load(self, state):
        self.count = state["count"]


def test_what_a_hook_keeps_is_saved_and_loaded_with_the_checkpoints(tmp_path):
    for epochs in (1, 3):
        hook = Averaging()
        recorder = Recorder(of=lambda run, hook=hook: hook.count)
        ft.fit(
            *counted(update_of()), steps=4 * epochs - 1, checkpoints=ft.Checkpoints(tmp_path), hooks=[hook, recorder]
        )
    assert recorder.at("run_started") == [3]  # Loaded before the run is told to start.


def test_a_hook_that_is_added_leaves_the_others_what_they_saved(tmp_path):
    ft.fit(*counted(update_of()), steps=3, checkpoints=ft.Checkpoints(tmp_path), hooks=[Averaging()])
    hook = Averaging()
    stop = ft.EarlyStopping("valid/loss", patience=2)
    told = "hooks: 'functrain.loop.hooks.EarlyStopping' finds no state in the checkpoint and begins anew; to go on"
    with pytest.warns(UserWarning, match=f"^{re.escape(told)}") as caught:
        ft.fit(
            *counted(update_of()), steps=3, evaluation=scripted(1),
            checkpoints=ft.Checkpoints(tmp_path), hooks=[hook], stop=stop,
        )  # fmt: skip
    assert caught[0].filename == __file__
    assert hook.count == 3
    assert np.isnan(stop.best)


def counting(module, name="Counting"):
    """A class of hooks as a module would have it that the program imports."""
    return type(name, (Averaging,), {"__module__": module, "__qualname__": name})()


def hooked(directory, *hooks):
    """A run of three steps, which an earlier one has made; and what was told of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ft.fit(*counted(update_of()), steps=3, checkpoints=ft.Checkpoints(directory), hooks=hooks)
    return [hook.count for hook in hooks], [str(each.message) for each in caught]


def test_a_hook_whose_module_was_renamed_takes_back_its_state(tmp_path):
    hooked(tmp_path, counting("before"))
    assert hooked(tmp_path, counting("after.it")) == ([3], [])


def test_hooks_of_one_name_take_their_states_by_their_module_and_else_by_their_place(tmp_path):
    saved = [counting(name) for name in ("one", "two", "three")]
    for number, hook in enumerate(saved):
        hook.count = 10 * number
    hooked(tmp_path, *saved)
    assert hooked(tmp_path, *(counting(name) for name in ("three", "new", "one"))) == ([23, 13, 3], [])


def test_a_state_that_no_hook_takes_back_is_told_and_so_is_a_hook_that_finds_none(tmp_path):
    hooked(tmp_path, counting("m", "Former"))
    counts, told = hooked(tmp_path, counting("m", "Renamed"))
    assert counts == [0]
    assert told == [
        "hooks: the checkpoint has the state of 'm.Former', which no hook takes back; 'm.Renamed' finds no state in the"
        " checkpoint and begins anew; to go on with it, give the class the name under which it was saved"
    ]
    assert hooked(tmp_path) == (
        [],
        [told[0].replace("; 'm.Renamed' finds no state in the checkpoint and begins anew", "")],
    )


def test_a_hook_ends_a_run_after_the_update_under_way():
    result = ft.fit(*counted(update_of()), epochs=9, hooks=[Averaging(stop_at=6)])
    assert (int(result.state.step), result.epochs, result.stopped) == (6, 1, "enough")


# Early stopping, and what is best


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_run_stops_after_as_many_evaluations_without_an_improvement_as_it_has_patience(patience):
    """And not one later, as AIToolbox does."""
    evaluation = scripted(3, 2, 2, 2, 2, 2, 2)
    stop = ft.EarlyStopping("valid/loss", patience=patience)
    result = ft.fit(*counted(update_of()), epochs=100, evaluation=evaluation, stop=stop)
    assert result.epochs == 2 + patience
    assert result.stopped == f"valid/loss has not improved for {patience} evaluations"


def test_an_improvement_begins_the_count_anew_and_nan_is_none():
    values = (3, float("nan"), 2, 2, 1, float("nan"), float("nan"))
    stop = ft.EarlyStopping("valid/loss", patience=2)
    assert ft.fit(*counted(update_of()), epochs=100, evaluation=scripted(*values), stop=stop).epochs == 7


def test_larger_may_be_better_and_an_improvement_no_smaller_than_asked_for():
    stop = ft.EarlyStopping("valid/loss", patience=2, mode="max", least=0.5)
    result = ft.fit(*counted(update_of()), epochs=9, evaluation=scripted(1, 2, 2.25, 2.5, 2.75), stop=stop)
    assert result.epochs == 4  # A gain of 0.5 is not more than 0.5.


def test_a_run_stops_in_the_middle_of_an_epoch_where_it_is_evaluated_there():
    stop, evaluation = ft.EarlyStopping("valid/loss", patience=1), scripted(1, 2, every=ft.Every(updates=3))
    result = ft.fit(*counted(update_of()), epochs=9, evaluation=evaluation, stop=stop)
    assert (int(result.state.step), result.epochs) == (6, 1)


def test_patience_goes_on_where_the_run_goes_on(tmp_path):
    def run(epochs, *values):
        return ft.fit(
            *counted(update_of()), epochs=epochs, evaluation=scripted(*values),
            checkpoints=ft.Checkpoints(tmp_path), stop=ft.EarlyStopping("valid/loss", patience=3),
        )  # fmt: skip

    run(2, 1, 2)
    assert run(9, 2, 2).epochs == 4
    again = run(9, 0)  # It is over: an evaluation would find an improvement.
    assert (again.epochs, again.stopped) == (4, "valid/loss has not improved for 3 evaluations")


def test_early_stopping_has_no_method_that_is_warned_of(recwarn):
    ft.fit(*counted(update_of()), epochs=1, evaluation=scripted(1), stop=ft.EarlyStopping("valid/loss", patience=2))
    assert not recwarn.list


def test_one_early_stopping_may_serve_two_runs():
    stop = ft.EarlyStopping("valid/loss", patience=2)
    for _ in range(2):
        assert ft.fit(*counted(update_of()), epochs=9, evaluation=scripted(1, 2, 2), stop=stop).epochs == 3


@pytest.mark.parametrize(
    ("result", "options", "told"),
    [
        ("valid/loss", {"patience": 0}, "EarlyStopping(patience=0): give a whole number of at least 1"),
        ("valid/loss", {"patience": 1, "mode": "least"}, "mode='least': write 'min' or 'max'"),
        ("valid/accuracy", {"patience": 1}, "is 'valid/accuracy' better when it is larger? Write mode='max'"),
    ],
)
def test_early_stopping_needs_patience_and_a_direction(result, options, told):
    with pytest.raises(ft.FitError, match=re.escape(told)):
        ft.EarlyStopping(result, **options)


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 1)])
def test_the_best_state_comes_back_after_later_and_worse_ones(tmp_path, mode, best):
    """Catalyst's load_best_on_end."""
    recorder = Recorder(of=lambda run: bits(run.state.params))
    checkpoints = ft.Checkpoints(tmp_path, keep_last=1, keep_best="valid/loss", mode=mode)
    result = ft.fit(
        *counted(update_of()), epochs=5, evaluation=scripted(9, 1, 8, 7, 3), checkpoints=checkpoints,
        load_best_on_end=True, hooks=[recorder],
    )  # fmt: skip
    states = recorder.at("evaluation_ended")
    assert bits(result.state.params) == states[best - 1] != states[-1]
    assert int(result.state.step) == 4 * best
    assert {path.name for path in checkpoints.steps()} == {str(4 * best), "20"}
    assert result.results == {"valid/loss": 3.0}


def test_without_it_the_last_state_comes_back(tmp_path):
    checkpoints = ft.Checkpoints(tmp_path, keep_best="valid/loss")
    result = ft.fit(*counted(update_of()), epochs=3, evaluation=scripted(1, 2, 3), checkpoints=checkpoints)
    assert int(result.state.step) == 12


def test_what_is_best_is_saved_also_between_two_checkpoints(tmp_path):
    checkpoints = ft.Checkpoints(tmp_path, every=ft.Every(updates=100), keep_best="valid/loss", keep_last=1)
    evaluation = scripted(3, 1, 2, 2, every=ft.Every(updates=2))
    ft.fit(*counted(update_of()), epochs=2, evaluation=evaluation, checkpoints=checkpoints)
    assert [path.name for path in checkpoints.steps()] == ["4", "8"]
    assert checkpoints.best().name == "4"


def test_a_checkpoint_has_the_results_of_its_own_step_only(tmp_path):
    update, state, data = counted(update_of())
    checkpoints = ft.Checkpoints(tmp_path, every=ft.Every(updates=1), keep_last=9)
    ft.fit(update, state, data, steps=3, evaluation=scripted(5, every=ft.Every(updates=2)), checkpoints=checkpoints)
    like = update.abstract(start())
    assert [checkpoints.restore(like=like, step=step).metrics for step in (1, 2, 3)] == [{}, {"valid/loss": 5.0}, {}]


class Dropping(ft.Hook):
    def run_started(self, run):
        run.state = dataclasses.replace(run.state, window=None, pending=np.array(0))


def test_a_hook_may_drop_a_window_that_was_saved_with_other_metrics(tmp_path):
    def fit(name, batches, hooks=()):
        def named(params, batch):
            return ft.Loss(loss_fn(params, batch).value, metrics={name: 1.0})

        data = ft.from_arrays({"x": X[: 2 * batches], "y": Y[: 2 * batches]}, batch_size=2, shuffle=False)
        update = update_of(named, accumulate=4, remainder="carry")
        return ft.fit(
            update, update.init(start()), data, epochs=1 + (name == "new"), checkpoints=ft.Checkpoints(tmp_path),
            hooks=hooks,
        ).state  # fmt: skip

    assert int(fit("old", 2).pending) == 2
    with pytest.raises(UpdateError, match="do not fit those of the batches before it"):
        fit("new", 2)
    state = fit("new", 2, [Dropping()])
    assert (int(state.step), int(state.batches), int(state.pending)) == (0, 4, 2)


# What hooks write, and what is no event.


def test_a_hook_writes_numbers_of_its_own_once_over_restarts(tmp_path):
    class Norm(ft.Hook):
        def epoch_ended(self, run):
            run.log({"norm": {"head": jnp.linalg.norm(run.state.params["head"]["w"])}, "count": run.epoch})

        def update_ended(self, run):
            if run.step == 2:
                run.log({"second": 2.5})

    for epochs in (1, 2):
        result = ft.fit(
            *counted(update_of()), epochs=epochs, hooks=[Norm()], checkpoints=ft.Checkpoints(tmp_path), progress=False
        )
    mine = [row for row in result.history if not any(name.startswith("train/") for name in row)]
    assert [row.keys() - {"step", "epoch"} for row in mine] == [
        {"second"},
        {"norm/head", "count"},
        {"norm/head", "count"},
    ]
    assert [(row["step"], row["epoch"]) for row in mine] == [(2, 0), (4, 1), (8, 2)]
    written = ft.read_json_lines(tmp_path / "log.jsonl")
    assert [{name: row[name] for name in row.keys() - {"time"}} for row in written] == result.history


def test_what_a_hook_writes_is_a_number():
    class Words(ft.Hook):
        def run_started(self, run):
            run.log({"words": "three"})

    with pytest.raises(ft.LogError, match="words"):
        ft.fit(*counted(update_of()), epochs=1, hooks=[Words()])


def test_the_end_of_an_epoch_is_told_after_its_evaluation_and_before_it_is_saved(tmp_path):
    events = []

    class Watching(ft.Hook):
        def evaluation_ended(self, run):
            events.append("evaluation")

        def epoch_ended(self, run):
            events.append(f"epoch {run.epoch}")

        def checkpoint_saved(self, run):
            events.append("saved")

    checkpoints = ft.Checkpoints(tmp_path)
    ft.fit(*counted(update_of()), epochs=2, hooks=[Watching()], evaluation=scripted(1, 2), checkpoints=checkpoints)
    assert events == ["evaluation", "epoch 1", "saved", "evaluation", "epoch 2", "saved"]


def test_a_method_that_no_event_calls_is_told():
    class Other(ft.Hook):
        def on_epoch_end(self, run):
            raise AssertionError

        def train_step_ended(self, run):
            raise AssertionError

        def weekend(self):
            return 2

    with pytest.warns(UserWarning, match="no event of a run") as caught:
        ft.fit(*counted(update_of()), epochs=1, hooks=[Other(), Other()])
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2
    assert re.search(
        r"Other.on_epoch_end: no event of a run calls it, they are 'run_started', .*mean epoch_ended\?", told[0]
    )
    assert "Other.train_step_ended: no event" in told[1]
    assert caught[0].filename == __file__
