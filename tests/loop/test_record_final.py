"""The final evaluation of a run, and a record in a loop of one's own."""

import gc
import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from records import evaluation, fitted, read, record_of, saved
from runs import Recorder, data_of, scripted, start, update_of

import functrain as ft
from functrain.errors import EvaluationError, FitError, RecordError

# The final evaluation.


class Errors:
    """A package of one's own."""

    names = ("error", "is_up")

    def function(self, error, is_up):
        return {"worst": float(np.abs(error).max()), "curve": np.sort(error), "up": {"share": float(is_up.mean())}}

    def figure(self, result):
        from matplotlib.figure import Figure

        figure = Figure()
        figure.subplots().plot(result["curve"])
        return figure


def test_the_last_and_the_best_state_are_evaluated_at_the_end(tmp_path):
    states = {}
    keep = Recorder(
        lambda run: states.setdefault(
            run.step, {name: np.array(leaf) for name, leaf in ft.flatten(run.state.params).items()}
        )
    )
    metrics = {"errors": Errors(), "confusion": ft.ConfusionMatrix(2, "is_up", "sign")}
    valid = ft.Evaluation(lambda params, batch: {"worse": batch["x"][:, 0] * 0 + (params["head"]["b"] ** 2)}, data_of())
    result = fitted(
        tmp_path, record_of(tmp_path, final=evaluation(metrics=metrics)), 3, hooks=[keep], evaluation=valid,
        checkpoints=saved(tmp_path, keep_best="valid/worse", mode="max"),
    )  # fmt: skip
    last, best = read(tmp_path, "results.json")["final"]
    values = {step: flat["head/b"] ** 2 for step, flat in states.items() if step % 5 == 0}
    best_step = max(values, key=values.__getitem__)
    assert [(last["of"], last["step"]), (best["of"], best["step"])] == [("last", 15), ("best valid/worse", best_step)]
    for entry in (last, best):
        params = ft.unflatten(states[entry["step"]], like=start())
        expected = evaluation(metrics=metrics)(params)
        numbers = {f"test/{name}": value for name, value in expected.items() if isinstance(value, float)}
        assert entry["numbers"] == pytest.approx(numbers, rel=1e-6)
        assert {"test/loss", "test/errors/worst", "test/errors/up/share"} <= entry["numbers"].keys()
        arrays, outputs = (np.load(tmp_path / entry[name]) for name in ("arrays", "outputs"))
        np.testing.assert_allclose(arrays["errors/curve"], expected["errors/curve"], rtol=1e-6)
        assert arrays["confusion"].sum() == len(outputs["error"]) == 18
        assert (tmp_path / entry["figures"]["test/errors"]).read_bytes()[:4] == b"\x89PNG"
    assert result.final == {entry["of"]: entry["numbers"] for entry in (last, best)}


def test_a_best_checkpoint_that_is_the_last_is_evaluated_once(tmp_path):
    calls = []
    valid = ft.Evaluation(lambda params, batch: {"loss": -(params["head"]["b"] ** 2) + 0 * batch["y"]}, data_of())

    class Counting(ft.ConfusionMatrix):
        def compute(self, acc):
            calls.append(1)
            return super().compute(acc)

    record = record_of(tmp_path, final=evaluation(metrics={"confusion": Counting(2, "is_up", "sign")}))
    fitted(tmp_path, record, 1, evaluation=valid, checkpoints=saved(tmp_path, keep_best="valid/loss"))
    last, best = read(tmp_path, "results.json")["final"]
    assert (len(calls), best | {"of": "last"}, last["checkpoint"]) == (1, last, "5")


def test_a_run_that_a_signal_ended_is_evaluated_when_it_has_gone_on_to_its_end(tmp_path):
    class Ending(ft.Hook):
        def epoch_ended(self, run):
            if run.epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def fit():
        record = record_of(tmp_path, final=evaluation())
        return fitted(tmp_path, record, 2, checkpoints=saved(tmp_path), hooks=[Ending()])

    with pytest.raises(SystemExit):
        fit()
    assert not (tmp_path / "results.json").exists()
    result = fit()
    assert [(each["how"], each["why"]) for each in read(tmp_path)["sections"]] == [
        ("stopped", "it was sent SIGTERM"),
        ("finished", None),
    ]
    assert [*result.final] == ["last"]


def test_what_fails_in_a_final_evaluation_loses_no_run(tmp_path):
    class Late:
        names = ("error",)

        def function(self, error):
            raise EvaluationError("not with these")

    with pytest.warns(UserWarning, match="the final evaluation of .* failed: EvaluationError: not with these; the run"):
        result = fitted(tmp_path, record_of(tmp_path, final=evaluation(metrics={"late": Late()})))
    assert (int(result.state.step), result.final) == (10, {})
    assert read(tmp_path)["sections"][0]["how"] == "finished"
    assert any("not with these" in each["text"] for each in read(tmp_path)["sections"][0]["warnings"])


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError])
def test_what_a_package_raises_loses_no_run_and_what_was_found_before_it_is_kept(tmp_path, error):
    class OfTheBest:
        names = ("error",)

        def __init__(self):
            self.calls = 0

        def function(self, error_):
            self.calls += 1
            if self.calls == 2:
                raise error("only one class")
            return 1.0

    valid = ft.Evaluation(lambda params, batch: {"worse": batch["y"] * 0 - jnp.abs(params["head"]["b"])}, data_of())
    record = record_of(tmp_path, final=evaluation(metrics={"n": OfTheBest()}))
    checkpoints = saved(tmp_path, keep_best="valid/worse", mode="max")
    with pytest.warns(UserWarning, match=f"the final evaluation of .* failed: {error.__name__}: .*only one class"):
        result = fitted(tmp_path, record, 4, evaluation=valid, checkpoints=checkpoints)
    assert (int(result.state.step), [*result.final]) == (20, ["last"])
    assert [entry["of"] for entry in read(tmp_path, "results.json")["final"]] == ["last"]


def test_each_evaluation_of_a_finished_run_is_made_once_whenever_it_is_given(tmp_path):
    class Stopping(ft.Hook):
        def run_started(self, run):
            if run.step == 10:
                run.stop("enough")

    def counted(name):
        return evaluation(name, metrics={"n": ft.OnHost(lambda error: calls.append(name) or 1.0, "error")})

    def fit(names, epochs):
        record = record_of(tmp_path, final=[counted(name) for name in names])
        return fitted(tmp_path, record, epochs, checkpoints=saved(tmp_path), hooks=[Stopping()] * (epochs > 2))

    calls = []
    for names, epochs in ((["one"], 2), (["one"], 2), (["one"], 3), (["one", "two"], 2), (["two"], 3)):
        result = fit(names, epochs)
        assert {f"{name}/n" for name in names} <= {*result.final["last"]}
    assert calls == ["one", "one", "two"]
    assert len(read(tmp_path)["sections"]) == 1


def test_of_several_best_states_one_at_a_time_is_in_memory(tmp_path):
    def count(batches):
        for batch in batches:
            counts.append(sum(leaf.shape == (3, 4) for leaf in jax.live_arrays()))
            yield batch

    class Counting:
        def __iter__(self):
            return count(data_of())

    counts = []
    final = ft.Evaluation(lambda params, batch: {"loss": batch["y"]}, Counting(), name="test")
    valid = [scripted(1, 3, 2, 2, name="a"), scripted(3, 3, 1, 2, name="b")]
    checkpoints = saved(tmp_path, keep_best={"a/loss": "max", "b/loss": "min"})
    gc.collect()  # The arrays of other tests.
    fitted(tmp_path, record_of(tmp_path, final=final), 4, evaluation=valid, checkpoints=checkpoints)
    assert [entry["step"] for entry in read(tmp_path, "results.json")["final"]] == [20, 10, 15]
    assert counts[-1] == counts[len(counts) // 2]


def test_a_figure_that_fails_costs_the_figure_alone(tmp_path):
    class Undrawn(Errors):
        def figure(self, result):
            raise KeyError("curves")

    with pytest.warns(UserWarning, match="the figure of 'errors' could not be drawn: KeyError: 'curves'"):
        fitted(tmp_path, record_of(tmp_path, final=evaluation(metrics={"errors": Undrawn()})))
    (entry,) = read(tmp_path, "results.json")["final"]
    assert entry["figures"] == {}
    assert entry["numbers"]["test/errors/worst"] > 0


def test_a_mistake_in_a_final_evaluation_is_found_before_the_first_update(tmp_path):
    recorder = Recorder()
    wrong = ft.Evaluation(lambda params, batch: {"loss": params["nothing"]}, data_of(), name="test")
    with pytest.raises(KeyError):
        fitted(tmp_path, record_of(tmp_path, final=wrong), hooks=[recorder])
    with pytest.raises(FitError, match="needs averages"):
        fitted(tmp_path, record_of(tmp_path, final=evaluation(params="ema")), hooks=[recorder])
    assert recorder.events == []


# In a loop of one's own.


def test_a_loop_of_ones_own_leaves_the_same_record(tmp_path):
    fitted(tmp_path / "fit", record_of(tmp_path / "fit", final=evaluation()), 2)
    update = update_of()
    state = update.init(start())
    with record_of(tmp_path / "own", final=evaluation()) as record:
        record.begin(update, state)
        for epoch in range(2):
            for batch in data_of().epoch(epoch):
                state, metrics = update(state, batch)
            record.log(int(state.step), {"train/loss": metrics["loss"]})
        record.end(state)
    assert read(tmp_path / "own", "results.json") == read(tmp_path / "fit", "results.json")
    own, fit = (read(tmp_path / name) for name in ("own", "fit"))
    assert own["model"]["parts"] == fit["model"]["parts"]
    assert [own["sections"][0][name] for name in ("how", "to_step")] == ["finished", 10]
    assert [row["step"] for row in ft.read_json_lines(tmp_path / "own" / "log.jsonl")] == [5, 10]


def test_a_loop_of_ones_own_that_fails_says_why_and_one_that_goes_on_drops_what_never_happened(tmp_path):
    update = update_of()

    def failing():
        with record_of(tmp_path) as record:
            record.begin(update, update.init(start()))
            for step in (1, 2, 3):
                record.log(step, {"loss": 1.0 / (3 - step)})

    with pytest.raises(ZeroDivisionError):
        failing()
    state, _ = update(update.init(start()), next(iter(data_of())))
    with record_of(tmp_path) as record:
        record.begin(update, state)
        record.log(2, {"loss": 7.0})
        record.end(state, why="enough")
    one, two = read(tmp_path)["sections"]
    assert (one["how"], one["why"]) == ("failed", "ZeroDivisionError: float division by zero")
    assert (two["from_step"], two["how"], two["why"]) == (1, "stopped", "enough")
    assert [row["loss"] for row in ft.read_json_lines(tmp_path / "log.jsonl")] == [0.5, 7.0]


def test_a_last_state_that_was_not_saved_is_no_checkpoint_and_not_the_best(tmp_path):
    update = update_of()
    state = update.init(start())
    kept = saved(tmp_path, keep_best="valid/loss")
    with kept as checkpoints, record_of(tmp_path, final=evaluation()) as record:
        record.begin(update, state, checkpoints=checkpoints)
        for batch in data_of().epoch(0):
            state, _ = update(state, batch)
            if state.step == 1:
                checkpoints.save(state, metrics={"valid/loss": 1.0})
        record.end(state)
    last, best = read(tmp_path, "results.json")["final"]
    assert [(last["checkpoint"], last["step"]), (best["checkpoint"], best["step"])] == [(None, 5), ("1", 1)]
    assert last["numbers"]["test/loss"] != best["numbers"]["test/loss"]


def test_the_seconds_of_a_loop_of_ones_own_are_those_of_all_its_sections(tmp_path):
    update = update_of()
    state, _ = update(update.init(start()), next(iter(data_of())))
    for _ in range(2):
        with record_of(tmp_path) as record:
            record.begin(update, state)
            record.end(state)
        run = read(tmp_path)
        run["sections"][0]["seconds"] = 3600.0  # As if it had taken an hour.
        (tmp_path / "run.json").write_text(json.dumps(run))
    assert read(tmp_path)["sections"][1]["seconds"] >= 3600


def test_what_fails_after_the_end_of_a_run_is_not_of_it(tmp_path):
    update = update_of()

    def failing():
        with record_of(tmp_path) as record:
            record.begin(update, update.init(start()))
            record.end(update.init(start()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    (section,) = read(tmp_path)["sections"]
    assert (section["how"], section["why"], section["to_step"]) == ("finished", None, 0)


def test_a_record_that_was_not_begun_says_so(tmp_path):
    with pytest.raises(RecordError, match=r"record\.log\(step, row\) before the record was begun: record\.begin"):
        record_of(tmp_path).log(1, {"loss": 1.0})
    with pytest.raises(RecordError, match=r"record\.end\(state\) before the record was begun"):
        record_of(tmp_path).end(update_of().init(start()))


def test_a_record_that_is_left_without_its_end_says_so(tmp_path):
    update = update_of()
    with pytest.warns(UserWarning, match=r"was left without record\.end\(state\)"), record_of(tmp_path) as record:
        record.begin(update, update.init(start()))
    assert read(tmp_path)["sections"][0]["why"] == "it was left without record.end(state)"


def test_seconds_of_training_are_of_training(tmp_path):
    class Slow(ft.Hook):
        def run_started(self, run):
            time.sleep(1.0)

    result = fitted(tmp_path, hooks=[Slow()])
    (section,) = read(tmp_path)["sections"]
    assert int(result.state.step) == 10
    assert section["seconds"] < section["ended"] - section["started"] + 1e-3
    assert section["seconds"] < 1.0
