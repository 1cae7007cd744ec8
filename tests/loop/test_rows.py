"""What `fit` logs, and what the progress bar shows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import counted, data_of, loss_fn, scripted, start, update_of

import functrain as ft
from functrain.loop.logs import read_json_lines


def test_a_row_names_the_loss_each_parts_telemetry_and_its_rate():
    result = ft.fit(*counted(update_of()), steps=4, log=ft.Every(updates=2), evaluation=scripted(7))
    of_part = ("grad_norm", "update_norm", "param_norm", "update_ratio", "learning_rate")
    for row in (row for row in result.history if "train/loss" in row):
        assert row.keys() == {
            "step", "epoch", "train/loss", "train/mean_of_updates", "train/steps_per_second",
            "train/learning_rate/body", "train/learning_rate/head",
            *(f"train/parts/{part}/{name}" for part in ("body", "head") for name in of_part),
        }  # fmt: skip
        assert all(isinstance(value, int | float) for value in row.values())
    assert [row["step"] for row in result.history] == [2, 4, 4][: len(result.history)]


def test_what_is_logged_is_what_the_update_measured():
    update = update_of()
    logged = ft.fit(*counted(update), steps=3, log=ft.Every(updates=3), log_last=True).history
    data, state = counted(update)[2], update.init(start())
    batches = list(data.epoch(0))
    for batch in batches[:2]:
        state, _ = update(state, batch)
    _, metrics = update.measured(state, batches[2])
    (row,) = logged
    assert row["train/last/loss"] == float(metrics["loss"])
    assert row["train/parts/head/grad_norm"] == float(metrics["parts"]["head"]["grad_norm"])
    rate = float(np.float32(optax.cosine_decay_schedule(0.1, 40)(2)))
    assert row["train/learning_rate/body"] == row["train/parts/body/learning_rate"] == rate


def test_losses_and_metrics_are_logged_under_their_own_names():
    """AIToolbox swapped them."""

    def named(params, batch):
        loss = loss_fn(params, batch).value
        return ft.Loss({"main": loss, "aux": 0 * loss + 3}, metrics={"of": {"batch": len(batch["y"])}})

    (row,) = ft.fit(*counted(update_of(named)), steps=1, log=ft.Every(updates=1)).history
    assert (row["train/aux"], row["train/of/batch"]) == (3.0, 2.0)
    assert row["train/loss"] == row["train/main"] + 3


def test_the_log_of_a_window_is_its_mean():
    params = {"w": jnp.zeros(())}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.0)})
    update = ft.make_update(lambda params, batch: params["w"] + batch["x"].mean(), optim, accumulate=2)
    data = [{"x": np.float32([each])} for each in (1, 3, 5)]
    result = ft.fit(update, update.init(params), data, epochs=1, log=ft.Every(updates=1))
    assert [row["train/loss"] for row in result.history] == [2.0, 5.0]


def test_the_phase_of_an_update_names_its_metrics():
    phases = ft.alternate(ft.Phase("a", loss_fn, parts="body"), ft.Phase("b", loss_fn, parts="head"))
    history = ft.fit(*counted(update_of(phases)), steps=2, log=ft.Every(updates=1)).history
    losses = [{name for name in row if name.endswith("/loss")} for row in history]
    assert losses == [{"train/a/loss"}, {"train/a/loss", "train/b/loss"}]
    assert "train/a/parts/body/grad_norm" in history[0]


@pytest.mark.parametrize("unroll", [1, 2])
def test_a_row_has_the_newest_metrics_of_every_phase_whenever_it_comes(tmp_path, unroll):
    """Of D, D, G, with a row every third update, one of them was never seen."""
    phases = ft.alternate(
        ft.Phase("d", loss_fn, parts="body", repeat=2),
        ft.Phase("g", lambda params, batch: loss_fn(params, batch), "head"),
    )
    rows = []
    for steps in ((6, 9), (9,)):  # The first run goes on from a checkpoint.
        folder = tmp_path / str(len(steps))
        for end in steps:
            options = {
                "steps": end,
                "log": ft.Every(updates=3),
                "checkpoints": ft.Checkpoints(folder),
                "unroll": unroll,
            }
            result = ft.fit(*counted(update_of(phases), 12), **options)
        rows.append([[row["step"], row["train/d/loss"], row["train/g/loss"]] for row in result.history])
    assert rows[0] == rows[1]
    assert [row[0] for row in rows[0]] == ([3, 6, 9] if unroll == 1 else [6, 9])
    assert len({row[1] for row in rows[0]} | {row[2] for row in rows[0]}) == 2 * len(rows[0])


def test_the_last_step_of_every_epoch_has_a_row_also_of_a_short_run(tmp_path):
    history = ft.fit(*counted(update_of()), epochs=2).history
    assert [(row["step"], row["epoch"], "train/loss" in row) for row in history] == [(4, 1, True), (8, 2, True)]
    # It is not logged twice, neither where it was due, nor by a run that is started again there.
    for epochs in (1, 2):
        checkpoints = ft.Checkpoints(tmp_path, every=ft.Every(updates=1))
        result = ft.fit(*counted(update_of()), epochs=epochs, log=ft.Every(updates=2), checkpoints=checkpoints)
    assert [(row["step"], row["epoch"]) for row in result.history] == [(2, 0), (4, 1), (6, 1), (8, 2)]


@pytest.mark.parametrize("repeat", [{}, {"same_batch": True}])
def test_a_row_has_the_norms_of_every_phase_and_no_others_are_measured(repeat):
    phases = ft.alternate(
        ft.Phase("d", loss_fn, "body", repeat=2),
        ft.Phase("g", lambda params, batch: loss_fn(params, batch), "head", **repeat),
    )
    histories, measured = [], []

    class Measured(ft.Hook):
        def update_ended(self, run):
            measured[-1].append(any("parts" in metrics for metrics in run.metrics.values()))

    for each in (1, 4):
        measured.append([])
        options = {"steps": 8, "log": ft.Every(updates=each), "hooks": [Measured()]}
        histories.append(ft.fit(*counted(update_of(phases), 9), **options).history)
    rows = {row["step"]: row for row in histories[0]}
    assert len(histories[1]) == 2
    for row in histories[1]:
        norms = [name for name in row if "/parts/" in name]
        assert {name.split("/")[1] for name in norms} == {"d", "g"}
        assert {name: row[name] for name in norms} == {name: rows[row["step"]][name] for name in norms}
    if not repeat:  # Steps 4 and 8 have rows: of d, d, g the newest of each.
        assert [step + 1 for step, is_measured in enumerate(measured[1]) if is_measured] == [3, 4, 6, 8]


def test_all_rows_of_the_last_step_of_an_epoch_have_its_epoch_finished():
    evaluations = [scripted(1, 2, name="one"), scripted(1, 2, name="two", every=ft.Every(updates=4))]
    history = ft.fit(*counted(update_of()), epochs=2, log=ft.Every(updates=2), evaluation=evaluations).history
    assert [(row["step"], row["epoch"], next(name for name in row if name.endswith("/loss"))) for row in history] == [
        (2, 0, "train/loss"), (4, 1, "train/loss"), (4, 1, "two/loss"), (4, 1, "one/loss"),
        (6, 1, "train/loss"), (8, 2, "train/loss"), (8, 2, "two/loss"), (8, 2, "one/loss"),
    ]  # fmt: skip


class Failing(ft.Hook):
    """Logs numbers of one name twice at an epoch's last step, and fails once."""

    def __init__(self, step):
        self.step = step

    def update_ended(self, run):
        if run.step == self.step:
            raise OSError("the power is gone")
        run.log({"count": run.step})

    def epoch_ended(self, run):
        run.log({"count": run.step})


def test_a_run_that_fails_after_an_epochs_end_writes_each_row_once_and_the_next_of_its_own_updates(tmp_path):
    """The checkpoint is of the epoch's last step, before its end; the log has the rows of both."""

    def run(directory, step):
        return ft.fit(
            *counted(update_of()), epochs=2, log=ft.Every(updates=3), hooks=[Failing(step)],
            checkpoints=ft.Checkpoints(directory, every=ft.Every(updates=4)),
        ).history  # fmt: skip

    with pytest.raises(OSError, match="the power is gone"):
        run(tmp_path / "cut", 5)
    whole, cut = (
        [{**row, "train/steps_per_second": None} for row in run(tmp_path / name, None)] for name in ("whole", "cut")
    )
    assert cut == whole
    assert [row["train/mean_of_updates"] for row in whole if "train/loss" in row] == [3, 1, 2, 2]


def test_with_unroll_the_log_has_what_it_has_without():
    one, many = [
        ft.fit(*counted(update_of()), steps=4, log=ft.Every(updates=4), unroll=unroll).history for unroll in (1, 4)
    ]
    assert one[0]["train/loss"] == many[0]["train/loss"]
    assert many[0]["step"] == 4


def test_the_log_may_be_once_an_epoch():
    result = ft.fit(*counted(update_of()), epochs=2, log=ft.Every(epochs=1))
    assert [row["step"] for row in result.history] == [4, 8]
    assert all("train/loss" in row for row in result.history)


def test_every_logger_gets_every_row_and_the_checkpoints_folder_one_more(tmp_path):
    logger = ft.JsonLines(tmp_path / "mine.jsonl")
    result = ft.fit(
        *counted(update_of()), epochs=2, log=ft.Every(updates=3), evaluation=scripted(2, 1), loggers=[logger],
        checkpoints=ft.Checkpoints(tmp_path / "run"),
    )  # fmt: skip
    rows = [read_json_lines(path) for path in (tmp_path / "mine.jsonl", tmp_path / "run" / "log.jsonl")]
    for row in itertools.chain(*rows):
        assert row.pop("time") > 0
    assert rows[0] == rows[1] == result.history
    assert [(row["step"], row["epoch"], row.get("valid/loss")) for row in result.history] == [
        (3, 0, None), (4, 1, None), (4, 1, 2.0), (6, 1, None), (8, 2, None), (8, 2, 1.0),
    ]  # fmt: skip


def test_what_is_no_number_is_in_the_results_and_not_in_the_log(tmp_path):
    data = [{"x": np.array([0, 1, 1])}]
    evaluation = ft.Evaluation(
        lambda params, batch: {"label": batch["x"], "prediction": batch["x"], "loss": batch["x"]},
        data,
        metrics={"confusion": ft.ConfusionMatrix(2)},
    )
    for _ in ("trained", "ended before it was started"):
        result = ft.fit(*counted(update_of()), epochs=1, evaluation=evaluation, checkpoints=ft.Checkpoints(tmp_path))
        assert result.results["valid/confusion"].tolist() == [[1, 0], [0, 2]]
        _, row = result.history
        assert row.keys() == {"step", "epoch", "valid/loss"}


RESULTS = {
    "counts": np.array([[1, 2], [3, 4]], np.int32),
    "scores": np.array([0.1, np.nan, -np.inf], np.float32),
    "half": jnp.array([1.1, 2.0], jnp.bfloat16),
    "are": np.array([True, False]),
    "bytes": np.arange(3, dtype=np.uint8)[:, None],
    "none": np.zeros((0, 2), np.float16),
    "number": 0.1,
    "count": 3,
    "listed": [1, 2.5],
}


def test_the_results_of_a_run_that_goes_on_have_the_dtypes_and_shapes_that_they_had(tmp_path):
    metrics = {name: ft.OnHost(lambda x, value=value: value, "x") for name, value in RESULTS.items()}
    evaluation = ft.Evaluation(lambda params, batch: {"x": batch["x"]}, [{"x": np.ones(2)}], metrics=metrics)
    for _ in ("evaluated", "as it was saved"):
        results = ft.fit(
            *counted(update_of()), epochs=1, evaluation=evaluation, checkpoints=ft.Checkpoints(tmp_path)
        ).results
        for name, value in RESULTS.items():
            found = results[f"valid/{name}"]
            if hasattr(value, "dtype"):
                assert (found.dtype, found.shape) == (value.dtype, value.shape), name
                assert np.asarray(found).tobytes() == np.asarray(value).tobytes()
                assert isinstance(found, np.ndarray | jax.Array)
            else:
                assert (found, type(found)) == (value, type(value))


def test_the_history_of_a_run_that_goes_on_is_that_of_one_that_was_never_stopped(tmp_path):
    def run(directory, *ends):
        for epochs in ends:
            result = ft.fit(
                *counted(update_of()), epochs=epochs, log=ft.Every(updates=3), checkpoints=ft.Checkpoints(directory),
                evaluation=ft.Evaluation(loss_fn, data_of()),
            )  # fmt: skip
        return [{**row, "train/steps_per_second": None} for row in result.history]

    assert run(tmp_path / "cut", 1, 3) == run(tmp_path / "whole", 3)


# The progress bar


def test_the_progress_bar_counts_steps_and_shows_the_newest_losses(capsys):
    ft.fit(
        *counted(update_of(accumulate=3)), epochs=2, progress=True, log=ft.Every(updates=1), evaluation=scripted(5, 7)
    )
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "train/loss=" in shown
    assert "step" in shown


def test_where_there_is_no_terminal_a_line_says_how_far_it_is(capsys):
    result = ft.fit(*counted(update_of()), epochs=2, evaluation=[scripted(5, 7, 9, 11, every=ft.Every(updates=2))])
    losses = [row["train/loss"] for row in result.history if "train/loss" in row]
    assert capsys.readouterr().err.splitlines() == [
        "step 2, epoch 0: valid/loss 5",
        "step 4, epoch 1: valid/loss 7",
        f"step 4, epoch 1: train/loss {losses[0]:.4g} (mean of 4)",
        "step 6, epoch 1: valid/loss 9",
        "step 8, epoch 2: valid/loss 11",
        f"step 8, epoch 2: train/loss {losses[1]:.4g} (mean of 4)",
    ]
    ft.fit(*counted(update_of()), epochs=1, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("progress", [None, True])
def test_a_run_that_goes_on_says_from_where_and_one_of_which_nothing_is_left_that_it_is_over(
    tmp_path, capsys, progress
):
    def said(epochs, **options):
        checkpoints = ft.Checkpoints(tmp_path)
        ft.fit(*counted(update_of()), epochs=epochs, checkpoints=checkpoints, **{"progress": progress} | options)
        return capsys.readouterr().err

    over = "step 8, epoch 2: nothing to do; for another run give another folder, or fit(..., fresh=True)"
    first, second, third, fewer = said(1), said(2), said(2), said(1)
    assert "went on" not in first
    assert "nothing to do" not in first + second
    assert f"went on from {tmp_path / '4'}, step 4, epoch 1\n" in second
    assert all(f"{tmp_path} was finished at {over}\n" in again for again in (third, fewer))
    assert "went on" not in third + fewer
    assert said(2, progress=False) == ""


def test_a_run_that_was_stopped_says_so_when_it_is_started_again(tmp_path, capsys):
    for _ in range(2):
        stop = ft.EarlyStopping("valid/loss", patience=1)
        ft.fit(
            *counted(update_of()), epochs=9, stop=stop, evaluation=scripted(1, 2), checkpoints=ft.Checkpoints(tmp_path)
        )
    last = capsys.readouterr().err.splitlines()[-1]
    assert "at step 8, epoch 2 (valid/loss has not improved for 1 evaluations): nothing to do" in last
