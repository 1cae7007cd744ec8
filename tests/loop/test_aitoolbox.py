"""What AIToolbox's train loop and callbacks do, each by the line that the page on coming from it gives."""

import json
import re
import subprocess
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest
from records import committed
from runs import Recorder, data_of, loss_fn, optim_of, scripted, start, update_of
from s3 import objects
from s3 import s3 as s3  # noqa: PLC0414
from s3 import server as server  # noqa: PLC0414

import functrain as ft
from functrain.errors import NonFiniteError
from functrain.loop.remote.store import Store

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
TESTED = set()


def does(*callbacks):
    """Says of which callbacks a test is."""
    TESTED.update(callbacks)
    return lambda test: test


def eval_step(params, batch):
    error = (batch["x"] @ params["body"]["w"]).sum(1) - batch["y"]
    label, prediction = (batch["y"] > 0).astype(int), (error > 0).astype(int)
    return {"loss": error**2, "label": label, "prediction": prediction, "target": batch["y"]}


def evaluation(**options):
    return ft.Evaluation(eval_step, data_of(shuffle=False), **options)


def fitted(epochs=2, **options):
    update = options.pop("update", None) or update_of()
    data = options.pop("data", None) or data_of()
    return ft.fit(update, update.init(start()), data, epochs=epochs, **{"progress": False, **options})


def test_every_callback_of_the_table_has_a_test():
    table = PAGE.read_text().split("each with the line that does it")[1].split("## optax")[0]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for cell in firsts for name in re.findall(r"`([A-Za-z_]+)", cell)}
    assert named == TESTED


@does("TrainLoop", "FunctionOnTrainLoop", "EmailNotification")
def test_fit_goes_through_the_epochs_and_tells_hooks():
    result = fitted(hooks=[recorder := Recorder()])
    assert (result.epochs, len(recorder.at("update_ended")), len(recorder.at("run_ended"))) == (2, 10, 1)


@pytest.mark.slow
@does("TrainLoopCheckpoint", "TrainLoopCheckpointEndSave", "LogUpload")
def test_model_and_optimizers_go_to_the_cloud_and_the_record_with_them(s3, tmp_path):
    fitted(
        checkpoints=ft.Checkpoints(f"{s3}/checkpoints", staging=tmp_path / "checkpoints"),
        record=ft.Record(s3, staging=tmp_path / "record", final=evaluation(name="test"), report=False),
    )
    there = {*objects(Store(s3))}
    assert {"checkpoints/10.manifest.json", "run.json", "log.jsonl", "results.json"} <= there
    fresh = ft.Checkpoints(f"{s3}/checkpoints", staging=tmp_path / "fresh")
    assert int(fresh.restore(like=update_of().abstract(start())).state.step) == 10


@does("TrainLoopEndSave", "source_dirs", "ModelTrainHistoryPlot")
def test_a_record_has_configuration_source_results_of_two_evaluations_and_curves(tmp_path):
    committed(tmp_path / "code", {"src/train.py": "rate = 1\n"})
    final = [evaluation(name="valid"), evaluation(name="test")]
    result = fitted(record=ft.Record(tmp_path / "run", config={"rate": 1}, source=tmp_path / "code/src", final=final))
    assert {"valid/loss", "test/loss"} <= result.final["last"].keys()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    head = subprocess.check_output(["git", "-C", tmp_path / "code", "rev-parse", "HEAD"], text=True)
    assert (run["config"], run["git"]["commit"]) == ({"rate": 1}, head.strip())
    assert (tmp_path / "run" / "source.tar.gz").exists()
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()


@does("ClassificationResultPackage", "RegressionResultPackage")
def test_packages_of_results():
    def scored(params, batch):
        found = eval_step(params, batch)
        return found | {"scores": jnp.stack([-found["loss"], found["loss"]], 1)}

    metrics = {"report": ft.Classification(scores="scores"), "errors": ft.Regression("target", "prediction")}
    found = ft.Evaluation(scored, data_of(), metrics=metrics)(start())
    assert 0 <= found["report/f1/macro"] <= 1
    assert found["errors/mae"] > 0


@does("ModelPerformanceEvaluation", "ModelPerformancePrintReport")
def test_an_evaluation_at_each_epoch_and_a_line_of_it(capsys):
    result = fitted(evaluation=evaluation(every=ft.Every(epochs=1)), progress=None)
    assert [row["step"] for row in result.history if "valid/loss" in row] == [5, 10]
    assert re.search(r"^step 10, epoch 2: .*valid/loss \d", capsys.readouterr().err, re.MULTILINE)


@does("ModelTrainHistoryFileWriter")
def test_the_history_is_in_a_file(tmp_path):
    result = fitted(checkpoints=ft.Checkpoints(tmp_path))
    written = ft.read_json_lines(tmp_path / "log.jsonl")
    assert [{name: value for name, value in row.items() if name != "time"} for row in written] == result.history


@does("GradientStatsPrint", "GradDistributionPlot")
def test_norms_of_gradients_by_part():
    row = fitted(log=ft.Every(updates=1)).history[0]
    _, metrics = update_of().measured(update_of().init(start()), next(iter(data_of())))
    for part in ("body", "head"):
        assert row[f"train/parts/{part}/grad_norm"] > 0
        assert metrics["parts"][part]["grad_norm"] > 0


@does("GradNormClip", "GradValueClip")
def test_clips_by_norm_and_by_value():
    parts, batch = optim_of().parts, next(iter(data_of()))
    grads, _ = ft.make_train_step(loss_fn, parts)(start(), batch)
    by_norm = ft.Optimizer(parts, {"body": optax.sgd(1.0), "head": optax.sgd(1.0)}, clip_norm=0.01)
    updates, _ = by_norm.update(grads, by_norm.init(start()), start())
    assert float(optax.global_norm(updates)) == pytest.approx(0.01, rel=1e-5)
    by_value = ft.Optimizer(parts, {"body": optax.chain(optax.clip(1e-3), optax.sgd(1.0)), "head": optax.sgd(1.0)})
    updates, _ = by_value.update(grads, by_value.init(start()), start())
    assert float(jnp.abs(updates["body"]["body/w"]).max()) == pytest.approx(1e-3)


@does("TensorboardFullTracking", "WandBTracking")
def test_trackers(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    fitted(loggers=[ft.TensorBoard(tmp_path / "board"), ft.WandB("digits", directory=tmp_path)])
    assert len([*(tmp_path / "board").glob("events*")]) == 1


@does("ModelIterationCheckpoint", "num_best_checkpoints_kept", "rm_subopt_local_models")
def test_checkpoints_by_step_of_which_the_best_are_kept(tmp_path):
    fitted(
        evaluation=scripted(3.0, 1.0, 2.0, 5.0, 4.0, every=ft.Every(updates=2)),
        checkpoints=ft.Checkpoints(tmp_path, every=ft.Every(updates=2), keep_last=1, keep_best={"valid/loss": 2}),
    )
    kept = [path.name.partition("~")[0] for path in ft.Checkpoints(tmp_path).steps()]
    assert (kept[:2], {*kept[2:]}) == (["4", "6"], {"10"})


@does("ModelLoadContinueTraining")
def test_the_same_fit_goes_on(tmp_path):
    for epochs in (1, 2):
        result = fitted(epochs, checkpoints=ft.Checkpoints(tmp_path))
    assert [row["step"] for row in result.history] == [5, 10]


@does("DataSubsetTestRun")
def test_a_run_on_a_small_subset():
    assert int(fitted(1, data=data_of().take(8)).state.step) == 2


@does("EarlyStopping", "ThresholdEarlyStopping", "AllPredictionsSame")
def test_runs_that_are_stopped():
    class Stopping(ft.Hook):
        def evaluation_ended(self, run):
            counts = run.results["valid/confusion"]
            if (counts.sum(0) > 0).sum() == 1:
                run.stop("all predictions are the same")
            elif run.results["valid/loss"] < 1e9:
                run.stop("valid/loss is below 1e9")

    each = evaluation(every=ft.Every(updates=1))
    patient = fitted(50, evaluation=each, stop=ft.EarlyStopping("valid/loss", patience=2, least=1e9))
    assert patient.stopped == "valid/loss has not improved for 2 evaluations"
    metrics = {"confusion": ft.ConfusionMatrix(2)}
    assert fitted(evaluation=evaluation(metrics=metrics), hooks=[Stopping()]).stopped == "valid/loss is below 1e9"
    same = ft.Evaluation(
        lambda params, batch: eval_step(params, batch) | {"prediction": (0 * batch["y"]).astype(int)},
        data_of(), metrics=metrics,
    )  # fmt: skip
    assert fitted(evaluation=same, hooks=[Stopping()]).stopped == "all predictions are the same"


@does("TerminateOnNaN")
def test_nan_ends_a_run_unasked():
    update = ft.make_update(lambda params, batch: loss_fn(params, batch).value * jnp.nan, optim_of())
    with pytest.raises(NonFiniteError):
        fitted(update=update)
