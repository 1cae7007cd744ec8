"""A folder of checkpoints: which survive, which is best, and what they are called."""

import itertools
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from soak import some
from states import at, batch_of, copied, everything, like, names, one_part, saved, simple, updated
from trees import bits, says

import functrain as ft
from functrain.errors import CheckpointError
from functrain.loop.checkpoint import manifest


@pytest.mark.parametrize(
    ("options", "metrics", "survivors"),
    [
        ({"keep_last": 1}, [3.0, 2.0, 1.0], [[1], [2], [3]]),
        ({"keep_last": 2}, [None] * 4, [[1], [1, 2], [2, 3], [3, 4]]),
        ({"keep_last": 2, "keep_best": "loss"}, [3.0, 1.0, 2.0, 4.0, 5.0], [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]),
        ({"keep_last": 1, "keep_best": "loss"}, [1.0, 2.0, 3.0, 0.5], [[1], [1, 2], [1, 3], [4]]),
        ({"keep_last": 1, "keep_best": "loss", "mode": "max"}, [1.0, 3.0, 2.0, 3.5], [[1], [2], [2, 3], [4]]),
        # The older of two that are equal stays the best one.
        ({"keep_last": 1, "keep_best": "loss"}, [1.0, 1.0, 1.0], [[1], [1, 2], [1, 3]]),
        # What is not finite is never best, nor what is not there.
        ({"keep_last": 1, "keep_best": "loss"}, [math.nan, 2.0, -math.inf, None], [[1], [2], [2, 3], [2, 4]]),
        ({"keep_last": 1, "keep_best": "loss", "mode": "max"}, [math.inf, 2.0, math.inf], [[1], [2], [2, 3]]),
        ({"keep_last": 1, "keep_best": "accuracy", "mode": "max"}, [1.0, 2.0], [[1], [2]]),
    ],
)  # fmt: skip
def test_which_survive(tmp_path, options, metrics, survivors):
    with ft.Checkpoints(tmp_path, **options) as checkpoints:
        assert saved(checkpoints, metrics) == survivors
    left = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert left == {f"{step}{suffix}" for step in survivors[-1] for suffix in ("", ".manifest.json")}


def test_which_survive_is_the_same_after_a_restart(tmp_path):
    for part, first, survivors in (([3.0, 1.0, 2.0], 1, [2, 3]), ([4.0, 5.0], 4, [2, 5]), ([0.5, 6.0], 6, [6, 7])):
        with ft.Checkpoints(tmp_path, keep_last=1, keep_best="loss") as checkpoints:
            assert saved(checkpoints, part, first)[-1] == survivors


def test_what_was_just_saved_is_kept_among_later_ones_of_another_course(tmp_path):
    with ft.Checkpoints(tmp_path, keep_last=2) as checkpoints:
        saved(checkpoints, [None] * 2, first=9)
        assert saved(checkpoints, [None], first=4) == [[4, 9, 10]]


def test_what_is_best(tmp_path):
    with ft.Checkpoints(tmp_path, keep_best="loss") as checkpoints:
        assert checkpoints.best() is None
        assert checkpoints.is_best({"loss": 5.0})
        assert not checkpoints.is_best({"loss": math.nan})
        saved(checkpoints, [2.0, math.nan])
        assert checkpoints.best() == tmp_path / "1"
        found = {value: checkpoints.is_best({"loss": value}) for value in (1.5, 2.0, 2.5, -math.inf)}
        assert found == {1.5: True, 2.0: False, 2.5: False, -math.inf: False}
        assert not checkpoints.is_best({"accuracy": 0.0})
        checkpoints.save(at(3, updated(1)[2]), metrics={"loss": 1.0})  # In the background.
        assert not checkpoints.is_best({"loss": 1.5})
    with ft.Checkpoints(tmp_path, keep_best="loss", mode="max") as checkpoints:
        assert checkpoints.is_best({"loss": np.float32(2.5)})
        assert not checkpoints.is_best({"loss": 0.5})
    assert not ft.Checkpoints(tmp_path).is_best({"loss": 0.0})


def test_the_best_one_is_known_without_its_manifest(tmp_path):
    """Which a process did not write that was killed at that moment."""
    with ft.Checkpoints(tmp_path, keep_last=1, keep_best="loss") as checkpoints:
        saved(checkpoints, [1.0, 2.0])
        manifest.path_of(tmp_path / "1").unlink()
        assert checkpoints.best() == tmp_path / "1"
        assert saved(checkpoints, [3.0], first=3) == [[1, 3]]
        manifest.path_of(tmp_path / "1").write_text("damaged")
        assert checkpoints.best() == tmp_path / "3"


@pytest.mark.parametrize("every", [ft.Every(epochs=1), ft.Every(updates=1), ft.Every(updates=3)])
def test_the_best_one_holds_the_weights_of_the_best_epoch_after_later_and_worse_ones(tmp_path, every):
    """Catalyst 3. The weight passes the optimum, 2.5, in the epoch that leads it from 0 to 2, the first."""
    params = {"w": jnp.zeros(())}
    update = ft.make_update(lambda params, batch: -params["w"] * jnp.mean(batch["x"]), one_part(params, optax.sgd(1.0)))
    data = ft.from_arrays({"x": np.ones(4, np.float32)}, batch_size=2)
    checkpoints = ft.Checkpoints(tmp_path, every=every, keep_last=1, keep_best="valid/loss")
    evaluation = ft.Evaluation(lambda params, batch: {"loss": jnp.abs(params["w"] - 2.5 * batch["x"])}, data)
    options = {"epochs": 4, "evaluation": evaluation, "checkpoints": checkpoints}
    result = ft.fit(update, update.init(params), data, **options, load_best_on_end=True)
    assert (int(result.state.step), float(result.state.params["w"])) == (2, 2.0)
    assert checkpoints.best().name.partition("~")[0] == "2"
    assert float(ft.fit(update, update.init(params), data, **options).state.params["w"]) == 8.0


def test_the_best_by_each_of_several_metrics_is_kept(tmp_path):
    _, _, state = updated(1)
    keep_best = {"loss": "min", "accuracy": "max"}
    with ft.Checkpoints(tmp_path, keep_last=1, keep_best=keep_best) as checkpoints:
        for step, (loss, accuracy) in enumerate([(3.0, 0.5), (1.0, 0.6), (2.0, 0.9), (4.0, 0.7)], 1):
            assert checkpoints.is_best({"loss": loss, "accuracy": accuracy}) == (step < 4)
            checkpoints.save(at(step, state), metrics={"loss": loss, "accuracy": accuracy})
        checkpoints.wait()
        assert names(checkpoints) == ["2", "3", "4"]
    for reader in (checkpoints, ft.Checkpoints(tmp_path)):  # Which need not repeat it.
        assert [reader.best(name) for name in keep_best] == [tmp_path / "2", tmp_path / "3"]
        for asked, told in ((None, "best()"), ("f1", "best('f1')")):
            with pytest.raises(CheckpointError, match=says(told, "kept by ['accuracy', 'loss']; name one")):
                reader.best(asked)


@pytest.mark.parametrize("keep_best", [{"loss": 3}, {"loss": ("min", 3)}, {"-loss": ("max", 3)}])
def test_as_many_of_the_best_are_kept_as_is_asked_for(tmp_path, keep_best):
    _, _, state = updated(1)
    losses = [4.0, 3.0, float("nan"), 5.0, 1.0, 6.0, 2.0, 2.0, 7.0]
    is_best = []
    with ft.Checkpoints(tmp_path, keep_last=1, keep_best=keep_best) as checkpoints:
        for step, loss in enumerate(losses, 1):
            metrics = {"loss": loss, "-loss": -loss}
            is_best.append(checkpoints.is_best(metrics))
            checkpoints.save(at(step, state), metrics=metrics)
        checkpoints.wait()
        assert names(checkpoints) == ["5", "7", "8", "9"]
        assert checkpoints.best() == ft.Checkpoints(tmp_path).best() == tmp_path / "5"
    # The fourth is the third that has a loss.
    assert is_best == [True, True, False, True, True, False, True, True, False]


def test_the_best_one_is_told_to_who_does_not_repeat_by_what(tmp_path):
    with ft.Checkpoints(tmp_path, keep_last=1, keep_best="loss", mode="max") as checkpoints:
        saved(checkpoints, [1.0, 3.0, 2.0])
    assert ft.Checkpoints(tmp_path).best() == tmp_path / "2"
    with pytest.raises(CheckpointError, match=says("best(): the best is kept by no metric", "give keep_best=")):
        ft.Checkpoints(tmp_path / "empty").best()


def test_of_a_loss_or_an_error_it_is_known_that_less_is_better(tmp_path):
    for result in ["loss", "valid/log_loss", "test/top1-error", "rmse", "NLL", "val/cross_entropy", "losses"]:
        assert ft.Checkpoints(tmp_path, keep_best=result).retention.best == {result: "min"}
    for result in ["accuracy", "valid/lossless", "valid/f1", "loss/accuracy", "error_rate", "entropy", "bleu"]:
        with pytest.raises(CheckpointError, match=says(result, "mode='max'")):
            ft.Checkpoints(tmp_path, keep_best=result)


# Names.


def test_names_of_pending_windows_and_of_windows_that_were_dropped(tmp_path):
    update, _, state = simple(accumulate=3, remainder="drop")
    seen = []
    with ft.Checkpoints(tmp_path, keep_last=99) as checkpoints:

        def save():
            checkpoints.save(state)
            checkpoints.wait()
            seen.append(names(checkpoints)[-1])
            restored = checkpoints.restore(like=state)
            assert (restored.path.name, bits(restored.state)) == (seen[-1], bits(state))

        for number in range(5):
            state, _ = update(state, batch_of(number))
            save()
        state, _ = update.flush(state)
        save()
        for number in range(5, 9):
            state, _ = update(state, batch_of(number))
            save()
    assert seen == ["0+1", "0+2", "1", "1+1", "1+2", "1~5", "1+1~6", "1+2~7", "2", "2+1"]
    assert checkpoints.restore(like=state, step=1).path.name == "1~5"
    assert checkpoints.restore(like=state, step=2).path.name == "2"
    for name in seen:
        assert checkpoints.restore(like=state, step=tmp_path / name).path.name == name


def test_the_same_step_twice_is_written_once(tmp_path):
    _, _, state = updated(1)
    with ft.Checkpoints(tmp_path) as checkpoints:
        for _ in range(2):
            checkpoints.save(state, data={"position": 1}, metrics={"loss": 1.0}, extra=b"more")
        checkpoints.wait()
        written = everything(tmp_path / "1")
        checkpoints.save(state, data={"position": 1}, metrics={"loss": 1.0}, extra=b"more")
    assert everything(tmp_path / "1") == written
    assert names(checkpoints) == ["1"]


def test_the_same_step_with_something_new_is_written_again(tmp_path):
    """As an epoch's end is no step, the results of it come after its last step was saved."""
    _, _, state = updated(1)
    with ft.Checkpoints(tmp_path, keep_last=9, keep_best="loss") as checkpoints:
        for data, metrics in ((1, {}), (1, {"loss": 2.0}), (2, {"loss": 3.0}), (1, {})):
            checkpoints.save(state, data=data, metrics=metrics)
        newest = checkpoints.restore(like=state)
        assert (newest.path.name, newest.data, newest.metrics) == ("1~2", 2, {"loss": 3.0})
        assert checkpoints.best() == tmp_path / "1~1"
        assert names(checkpoints) == ["1", "1~1", "1~2"]
        assert checkpoints.restore(like=state, step=1).path.name == "1~2"


def test_a_step_that_is_not_there(tmp_path, monkeypatch):
    _, _, state = updated(2, accumulate=3)
    with ft.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=says(f"no checkpoint of step 1 in {tmp_path}: there are none")):
            checkpoints.restore(like=state, step=1)
        checkpoints.save(state)
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=says("no checkpoint of step 2", "there are 0+2")):
            checkpoints.restore(like=state, step=2)
        with pytest.raises(CheckpointError, match=says("9 is damaged: its folder is missing; restore another of 0+2")):
            checkpoints.restore(like=state, step=tmp_path / "9")
        monkeypatch.chdir(tmp_path)
        assert checkpoints.restore(like=state, step=pathlib.Path("0+2")).path == tmp_path / "0+2"


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    """Whatever its name: only a manifest, or what is in every checkpoint, says that one is ours."""
    theirs = [
        "log",
        "1.corrupt",
        "best",
        "01x",
        "1+",
        "~1",
        "7",
        "before-1",
        "3.orbax-checkpoint-tmp",
        "5",
        ".removed-1",
    ]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("mine")
    (tmp_path / "2").mkdir()
    (tmp_path / "6").write_text("mine")
    (tmp_path / "9.manifest.json").write_text('{"mine": true}')
    (tmp_path / "4").symlink_to("log")
    before = everything(tmp_path)
    with ft.Checkpoints(tmp_path, keep_last=1) as checkpoints:
        assert checkpoints.steps() == []
        for step in range(1, 11):
            checkpoints.save(at(step, updated(1)[2]))
            checkpoints.wait()
            restored = checkpoints.restore(like=like())
            assert (int(restored.state.step), names(checkpoints)) == (step, [restored.path.name])
            assert restored.path.name == (f"{step}~{step}" if step in (2, 4, 5, 6, 7, 9) else str(step))
        checkpoints.start_anew()
    after = everything(tmp_path)
    assert {name: after[name] for name in before} == before


def test_a_folder_of_runs_is_none_of_checkpoints(tmp_path):
    """Each run has a folder of its own, `runs/0`; given `runs` by mistake, nothing of them is touched."""
    for seed in "01":
        with ft.Checkpoints(tmp_path / seed) as checkpoints:
            checkpoints.save(updated(1)[2])
    before = everything(tmp_path)
    with ft.Checkpoints(tmp_path, keep_last=1) as checkpoints:
        assert checkpoints.restore(like=like()) is None
        for step in range(3):
            checkpoints.save(at(step, updated(1)[2]))
    after = everything(tmp_path)
    assert {name: after[name] for name in before} == before


AWKWARD = [
    "layers=[64,64]",
    "a*b?",
    "back\\slash",
    "100%",
    "a#b",
    "{x}",
    "ü",
    "new\nline",
    "quote'\"",
    "~",
    "$HOME",
    "s3:x",
]


@pytest.mark.parametrize(("inner", "name"), some(itertools.product([".", "run/checkpoints"], AWKWARD), 3))
def test_any_name_of_a_folder_will_do(tmp_path, inner, name):
    update, params, state = updated(1)
    directory = tmp_path / name / inner
    with ft.Checkpoints(directory, keep_last=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(at(step, state), data={"position": step})
    with ft.Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(like=update.abstract(params))
        assert (restored.data, restored.path) == ({"position": 2}, (directory / "2").absolute())
        assert bits(restored.state) == bits(at(2, state))
    assert ft.Checkpoints(tmp_path).restore(like=state, step=directory / "2").data == {"position": 2}


def test_a_checkpoint_is_no_folder_of_checkpoints(sound, tmp_path):
    """What is saved in one would go with it."""
    directory = copied(sound, tmp_path)
    before = everything(directory / "2")
    for attempt in (
        lambda checkpoints: checkpoints.restore(like=like()),
        lambda checkpoints: checkpoints.start_anew(),
        lambda checkpoints: ft.load_params(checkpoints.directory, like={}),
    ):
        told = says("/2 is a checkpoint itself: give its folder", str(directory))
        with pytest.raises(CheckpointError, match=told), ft.Checkpoints(directory / "2") as checkpoints:
            attempt(checkpoints)
    with ft.Checkpoints(directory / "2") as checkpoints, pytest.raises(ft.SaveError, match="is a checkpoint itself"):
        checkpoints.save(updated(1)[2])
    assert {name: each for name, each in everything(directory / "2").items() if name in before} == before


# Options.


@pytest.mark.parametrize(
    ("options", "phrases"),
    [
        ({"keep_last": 0}, ["keep_last=0", "at least 1"]),
        ({"keep_last": 1.5}, ["keep_last=1.5", "a whole number"]),
        ({"keep_last": None}, ["keep_last=None", "a whole number"]),
        ({"keep_best": "loss", "mode": "least"}, ["mode='least'", "'min' or 'max'"]),
        ({"keep_best": "valid/accuracy"}, ["keep_best='valid/accuracy'", "better when it is larger? Write mode='max'"]),
        ({"keep_best": {"loss": "least"}}, ["mode='least'", "'min' or 'max'"]),
        ({"keep_best": {"loss": "min"}, "mode": "max"}, ["mode='max' beside keep_best={'loss': 'min'}"]),
        ({"mode": "max"}, ["mode='max' beside keep_best=None"]),
        ({"keep_best": {"f1": 3}}, ["keep_best={'f1': 3}", "is 'f1' better when it is larger? Write mode='max'"]),
        ({"keep_best": {"f1": ("max", 0)}}, ["0 of the best: write how many, such as {'valid/accuracy': ('max', 3)}"]),
    ],
)
def test_options_that_are_none(tmp_path, options, phrases):
    with pytest.raises(CheckpointError, match=says(*phrases)):
        ft.Checkpoints(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
