"""How often something is done in a run."""

import re
import types

import pytest
from runs import Recorder, counted, scripted, update_of

import functrain as ft
from functrain.errors import CadenceError


def test_every_n_updates_is_after_each_nth_update():
    evaluation = scripted(*range(9), every=ft.Every(updates=3))
    recorder = Recorder(of=lambda run: run.step)
    result = ft.fit(*counted(update_of()), steps=10, evaluation=evaluation, log=ft.Every(updates=4), hooks=[recorder])
    assert recorder.at("evaluation_ended") == [3, 6, 9]
    assert [row["step"] for row in result.history if "train/loss" in row] == [4, 8]


def test_updates_are_counted_in_windows():
    evaluation = scripted(*range(9), every=ft.Every(updates=2))
    recorder = Recorder(of=lambda run: int(run.state.batches))
    ft.fit(*counted(update_of(accumulate=2)), epochs=3, evaluation=evaluation, hooks=[recorder])
    assert recorder.at("evaluation_ended") == [4, 8, 12]


def test_every_n_epochs_is_at_the_end_of_each_nth_epoch():
    each, second = scripted(*range(9)), scripted(*range(9), every=ft.Every(epochs=2), name="second")
    recorder = Recorder(of=lambda run: (run.step, run.epoch, sorted(run.evaluated)))
    ft.fit(*counted(update_of()), epochs=4, evaluation=[each, second], hooks=[recorder])
    assert recorder.at("evaluation_ended") == [
        (4, 1, ["valid/loss"]),
        (8, 2, ["second/loss", "valid/loss"]),
        (12, 3, ["valid/loss"]),
        (16, 4, ["second/loss", "valid/loss"]),
    ]


def test_every_n_minutes_is_after_the_update_under_way_then(monkeypatch):
    """Of a clock that goes on by 25 seconds at each update."""
    seconds = [0.0]
    monkeypatch.setattr("functrain.loop.run.time", types.SimpleNamespace(monotonic=lambda: seconds[0]))

    class Clock(Recorder):
        def update_ended(self, run):
            seconds[0] = 25.0 * run.step

    recorder = Clock(of=lambda run: run.step)
    evaluation = scripted(*range(9), every=ft.Every(minutes=1))
    result = ft.fit(*counted(update_of()), steps=10, evaluation=evaluation, log=ft.Every(minutes=1.5), hooks=[recorder])
    assert recorder.at("evaluation_ended") == [3, 5, 8, 10]
    assert [row["step"] for row in result.history if "train/loss" in row] == [4, 8]


def test_checkpoints_are_saved_as_often_as_they_say_and_at_the_end(tmp_path):
    recorder = Recorder(of=lambda run: run.step)
    checkpoints = ft.Checkpoints(tmp_path, every=ft.Every(updates=4), keep_last=9)
    ft.fit(*counted(update_of()), steps=10, checkpoints=checkpoints, hooks=[recorder])
    assert recorder.at("checkpoint_saved") == [4, 8, 10]
    assert [path.name for path in checkpoints.steps()] == ["4", "8", "10"]


def test_by_default_it_evaluates_and_saves_at_the_end_of_each_epoch(tmp_path):
    recorder = Recorder(of=lambda run: run.epoch)
    ft.fit(
        *counted(update_of()), epochs=3, evaluation=scripted(3, 2, 1), checkpoints=ft.Checkpoints(tmp_path),
        hooks=[recorder],
    )  # fmt: skip
    assert recorder.at("evaluation_ended") == recorder.at("checkpoint_saved") == [1, 2, 3]


def test_with_unroll_what_is_due_within_a_scan_is_done_after_it():
    evaluation = scripted(*range(9), every=ft.Every(updates=5))
    recorder = Recorder(of=lambda run: run.step)
    data = counted(update_of(), batches_an_epoch=9)
    ft.fit(*data, steps=18, unroll=3, evaluation=evaluation, hooks=[recorder])
    assert recorder.at("evaluation_ended") == [6, 12, 15]


def test_an_epoch_that_ends_with_the_last_of_the_steps_is_an_epoch():
    recorder = Recorder()
    result = ft.fit(*counted(update_of()), steps=8, evaluation=scripted(2, 1), hooks=[recorder])
    assert recorder.at("evaluation_ended") == [(4, 1), (8, 2)]
    assert result.epochs == 2


@pytest.mark.parametrize(
    "cadence",
    [
        {},
        {"updates": 0},
        {"updates": -1},
        {"minutes": 0.0},
        {"updates": 1, "epochs": 1},
        {"updates": 2.5},
        {"epochs": 0.5},
    ],
)
def test_a_cadence_is_one_number_above_0(cadence):
    problem = "give one of updates and epochs, whole numbers, and minutes, above 0, ft.Every(updates=100)"
    with pytest.raises(CadenceError, match=re.escape(problem)):
        ft.Every(**cadence)
