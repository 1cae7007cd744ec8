"""An evaluation sees every example once, with its weight, in one compiled program, and what pads a batch never."""

import re
import socket

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import warm
from runs import compilations
from sklearn.metrics import accuracy_score, confusion_matrix, roc_auc_score, top_k_accuracy_score

import functrain as ft
from functrain.errors import EvaluationError
from functrain.loop.metrics import ConfusionMatrix, OnHost, TopK

# Small integers over 16 examples: every sum and every mean below is exact in float32.
X = np.array([3, -1, 4, 1, -5, 9, 2, 6, 5, -3, 5, 8, -9, 7, 9, 3], np.float32)
NAN = np.float32(np.nan)


def batches_of(size, **columns):
    columns = columns or {"x": X}
    return [
        {name: column[start : start + size] for name, column in columns.items()} for start in range(0, len(X), size)
    ]


def squares(params, batch):
    return {"square": batch["x"] ** 2, "scaled": params * batch["x"]}


# Means


@pytest.mark.parametrize("size", [1, 3, 5, 8, 16])
def test_every_example_counts_once_however_they_are_batched(size):
    results = ft.Evaluation(squares, batches_of(size))(2.0)
    assert results == {"square": np.sum(X**2) / 16, "scaled": 2 * np.sum(X) / 16}
    assert {type(value) for value in results.values()} == {float}


def test_the_mean_of_batches_of_unequal_size_is_not_the_mean_of_their_means():
    data = [{"x": np.float32([0, 0, 0])}, {"x": np.float32([4])}]
    assert ft.Evaluation(lambda params, batch: {"x": batch["x"]}, data)(None) == {"x": 1.0}


def test_a_bfloat16_result_is_summed_in_float32():
    data = [{"x": np.ones(512, np.float32)}] * 2  # Above 256 bfloat16 has no odd integers.
    results = ft.Evaluation(lambda params, batch: {"one": batch["x"].astype(jnp.bfloat16)}, data)(None)
    assert results == {"one": 1.0}


def test_booleans_and_integers_are_averaged_too():
    results = ft.Evaluation(
        lambda params, batch: {"positive": batch["x"] > 0, "int": batch["x"].astype(int)}, [{"x": X}]
    )
    assert results(None) == {"positive": 12 / 16, "int": X.sum() / 16}


def test_a_batch_that_is_no_dict_is_padded_too():
    data = [(X[:6], X[:6]), (X[6:12], X[6:12]), (X[12:], X[12:])]
    assert ft.Evaluation(lambda params, batch: {"x": batch[0] * batch[1]}, data)(None) == {"x": np.sum(X**2) / 16}


def test_results_in_dicts_come_by_name():
    evaluation = ft.Evaluation(lambda params, batch: {"by": {"x": batch["x"], "x2": 2 * batch["x"]}}, [{"x": X}])
    assert evaluation(None) == {"by/x": X.sum() / 16, "by/x2": X.sum() / 8}


def test_an_evaluation_can_be_called_again_with_other_params():
    evaluation = ft.Evaluation(squares, batches_of(5))
    assert [evaluation(scale)["scaled"] for scale in (1.0, 3.0)] == [X.sum() / 16, 3 * X.sum() / 16]


def test_eval_step_is_given_the_model_state_that_it_declares():
    def shifted(params, batch, model_state):
        return {"x": batch["x"] - model_state["mean"]}

    assert ft.Evaluation(shifted, batches_of(5))(None, {"mean": 1.0}) == {"x": X.sum() / 16 - 1}


# Padding and compilation


def test_a_short_last_batch_compiles_nothing_and_a_second_evaluation_neither():
    evaluation = ft.Evaluation(squares, batches_of(5))
    with compilations() as compiled:
        evaluation(1.0)
    assert compiled.count("jit(step)") == 1
    with compilations() as compiled:
        evaluation(2.0)
    assert compiled == []


def test_eval_step_is_traced_once_for_all_evaluations():
    traces = []

    def counted(params, batch):
        traces.append(batch["x"].shape)
        return {"x": batch["x"]}

    evaluation = ft.Evaluation(counted, batches_of(8))
    for _ in range(3):
        evaluation(None)
    assert traces == [(8,)]


def test_params_on_a_mesh_need_one_program_too():
    mesh = jax.make_mesh((8,), ("data",))
    params = jax.device_put(jnp.float32(2), jax.NamedSharding(mesh, jax.P()))
    with compilations() as compiled:
        results = ft.Evaluation(squares, batches_of(4))(params)
    assert results["scaled"] == X.sum() / 8
    assert compiled.count("jit(step)") == 1


def test_batches_go_where_the_sharding_says():
    mesh = jax.make_mesh((8,), ("data",))
    seen = []

    def observed(params, batch):
        jax.debug.inspect_array_sharding(batch["x"], callback=seen.append)
        return {"x": batch["x"]}

    sharding = jax.NamedSharding(mesh, jax.P("data"))
    metrics = {"sum": OnHost(lambda x: x.sum(), "x")}
    evaluation = ft.Evaluation(observed, batches_of(8), metrics=metrics, sharding=sharding)
    params = jax.device_put(jnp.float32(2), jax.NamedSharding(mesh, jax.P()))
    assert evaluation(params) == {"sum": X.sum()}
    assert seen[0].is_equivalent_to(sharding, 1)


def test_a_result_that_is_nan_for_the_padding_alone_is_not_nan():
    """The padding repeats the last example; here it is told apart by its place in the batch."""

    def spoilt(params, batch):
        is_padding = (jnp.arange(5) > 0) & jnp.all(batch["x"] == X[15])
        return {
            "x": jnp.where(is_padding, jnp.nan, batch["x"]),
            "label": jnp.where(is_padding, -7, 0),
            "prediction": jnp.where(is_padding, 99, 0),
            "scores": jnp.where(is_padding[:, None], jnp.nan, jnp.array([1.0, 0.0])),
            "each": jnp.where(is_padding, jnp.nan, batch["x"]),
        }

    metrics = {
        "confusion": ConfusionMatrix(2),
        "top1": TopK(1),
        "list": OnHost(lambda each: each.tolist(), "each"),
    }
    results = ft.Evaluation(spoilt, batches_of(5), metrics=metrics)(None)
    assert results["x"] == X.sum() / 16
    assert results["confusion"].tolist() == [[16, 0], [0, 0]]
    assert results["top1"] == 1.0
    assert results["list"] == X.tolist()


def test_a_nan_of_a_real_example_is_told():
    data = [{"x": np.array([1, NAN, 2], np.float32)}, {"x": np.float32([1])}]
    assert np.isnan(ft.Evaluation(lambda params, batch: {"x": batch["x"]}, data)(None)["x"])


# Weights


def test_batches_with_a_weight_are_weighted_by_it():
    data = ft.from_arrays({"x": X}, batch_size=5, shuffle=False, last="pad")
    with compilations() as compiled:
        results = ft.Evaluation(squares, data)(1.0)
    assert results == {"square": np.sum(X**2) / 16, "scaled": X.sum() / 16}
    assert compiled.count("jit(step)") == 1


def test_weights_other_than_one_and_zero_are_shares():
    weight = np.array([2, 0, 1, 1] * 4, np.float32)
    results = ft.Evaluation(lambda params, batch: {"x": batch["x"]}, batches_of(4, x=X, weight=weight))(None)
    assert results == {"x": np.sum(weight * X) / 16}


def test_examples_of_weight_zero_are_in_no_metric_not_even_as_nan():
    x = np.where(np.arange(16) % 4 == 3, NAN, X)
    weight = np.float32(np.arange(16) % 4 != 3)
    metrics = {"examples": OnHost(len, "x")}
    data = batches_of(4, x=x, weight=weight)
    results = ft.Evaluation(lambda params, batch: {"x": batch["x"], "y": batch["x"]}, data, metrics=metrics)(None)
    assert results == {"y": float(np.float32(X[weight > 0].sum()) / np.float32(12)), "examples": 12}


# A Loss, or a scalar


def mean_square(params, batch):
    return ft.Loss(jnp.mean((params * batch["x"]) ** 2), weight=len(batch["x"]), metrics={"max": batch["x"].max()})


def test_the_loss_function_of_training_is_an_eval_step():
    """A mean of means, weighted by the examples of each: exact, though the last batch is short."""
    results = ft.Evaluation(mean_square, batches_of(8))(2.0)
    assert results == {"loss": 4 * np.sum(X**2) / 16, "max": 9.0}
    short = [{"x": X[:8]}, {"x": X[8:12]}, {"x": X[12:]}]
    assert ft.Evaluation(mean_square, short)(2.0)["loss"] == 4 * np.sum(X**2) / 16


def test_a_short_batch_of_a_loss_compiles_a_second_program_and_no_third():
    evaluation = ft.Evaluation(mean_square, [{"x": X[:8]}, {"x": X[8:12]}, {"x": X[12:]}])
    with compilations() as compiled:
        evaluation(1.0)
        evaluation(2.0)
    assert compiled.count("jit(step)") == 2


def test_a_mean_is_over_the_weight_of_its_loss():
    def over_tokens(params, batch):
        return ft.Loss(jnp.sum(batch["x"] * batch["tokens"]) / jnp.sum(batch["tokens"]), weight=batch["tokens"].sum())

    data = [
        {"x": np.float32([1, 9]), "tokens": np.float32([1, 1])},
        {"x": np.float32([3, 3]), "tokens": np.float32([5, 1])},
    ]
    assert ft.Evaluation(over_tokens, data)(None) == {"loss": (2 * 5 + 6 * 3) / 8}


def test_named_losses_and_nested_metrics_come_each_by_its_name():
    def named(params, batch):
        return ft.Loss({"a": jnp.mean(batch["x"]), "b": jnp.float32(1)}, metrics={"of": {"x": batch["x"]}})

    results = ft.Evaluation(named, batches_of(8))(None)
    mean = X.sum() / 16
    assert results == {"loss": mean + 1, "a": mean, "b": 1.0, "of/x": mean}


def test_metrics_that_are_no_dict_are_named_as_in_training():
    assert ft.Evaluation(lambda params, batch: ft.Loss(jnp.float32(1), metrics=2.0), batches_of(8))(None) == {
        "loss": 1.0,
        "metrics": 2.0,
    }


def test_a_scalar_beside_values_of_each_example_keeps_the_batch_as_it_is():
    def both(params, batch):
        return {"mean": jnp.mean(batch["x"]), "x": batch["x"]}

    assert ft.Evaluation(both, batches_of(12))(None) == {"mean": X.sum() / 16, "x": X.sum() / 16}


# More than means

LABELS = np.array([0, 1, 2, 2, 1, 0, 0, 2, 1, 1, 0, 2, 2, 2, 0, 1], np.int32)
SCORES = np.random.default_rng(0).permutation(48).reshape(16, 3).astype(np.float32)


def outputs(params, batch):
    scores = batch["scores"]
    return {
        "label": batch["label"],
        "prediction": scores.argmax(-1),
        "scores": scores,
        "score": scores[:, 0],
        "is_0": batch["label"] == 0,
        "x": batch["x"],
    }


@pytest.mark.parametrize("size", [4, 5, 16])
def test_metrics_agree_with_scikit_learn(size):
    metrics = {
        "confusion": ConfusionMatrix(classes=3),
        "top2": TopK(2),
        "auc": OnHost(roc_auc_score, "is_0", "score"),
        "accuracy": OnHost(accuracy_score, "label", "prediction"),
    }
    results = ft.Evaluation(outputs, batches_of(size, x=X, label=LABELS, scores=SCORES), metrics=metrics)(None)
    assert results.pop("confusion").tolist() == confusion_matrix(LABELS, SCORES.argmax(-1)).tolist()
    assert results == {
        "x": X.sum() / 16,
        "top2": top_k_accuracy_score(LABELS, SCORES, k=2),
        "auc": roc_auc_score(LABELS == 0, SCORES[:, 0]),
        "accuracy": accuracy_score(LABELS, SCORES.argmax(-1)),
    }


def test_what_a_metric_takes_may_have_any_shape_and_is_not_averaged():
    metrics = {"scores": OnHost(lambda scores: scores.tolist(), "scores")}
    evaluation = ft.Evaluation(
        lambda params, batch: {"scores": batch["scores"]}, batches_of(5, scores=SCORES), metrics=metrics
    )
    assert evaluation(None) == {"scores": SCORES.tolist()}


def test_a_metric_may_give_numbers_by_name_or_an_array():
    def summary(x):
        return {"most": x.max(), "least": {"x": x.min()}, "range": np.array([x.min(), x.max()])}

    metrics = {"of": OnHost(summary, "x")}
    results = ft.Evaluation(lambda params, batch: {"x": batch["x"]}, batches_of(5), metrics=metrics)(None)
    assert results.pop("of/range").tolist() == [-9, 9]
    assert results == {"of/most": 9.0, "of/least/x": -9.0}
    assert {type(value) for value in results.values()} == {float}  # JSON, and so a checkpoint, has no np.float32.


def test_a_metric_of_ones_own_is_any_object_with_three_methods():
    class Largest:
        names = ("x",)

        def init(self):
            return jnp.array(-jnp.inf)

        def accumulate(self, acc, outputs, mask):
            return jnp.maximum(acc, jnp.max(jnp.where(mask > 0, outputs["x"], -jnp.inf)))

        def compute(self, acc):
            return acc

    evaluation = ft.Evaluation(lambda params, batch: {"x": batch["x"]}, batches_of(5), metrics={"largest": Largest()})
    assert evaluation(None) == {"largest": 9.0}


def columns(params, batch):
    return {name: batch[name] for name in ("x", "label", "prediction")}


COLUMNS = {"x": X, "label": LABELS, "prediction": SCORES.argmax(-1)}


class Spread:
    """A metric of one's own on the host."""

    names = ("x", "label")

    def function(self, x, label):
        return {str(each): {"most": x[label == each].max()} for each in (0, 1)}


def test_any_object_with_names_and_a_function_is_a_metric():
    evaluation = ft.Evaluation(columns, batches_of(5, **COLUMNS), metrics={"spread": Spread()})
    most = [X[each == LABELS].max() for each in (0, 1)]
    results = evaluation(None)
    assert [results["spread/0/most"], results["spread/1/most"]] == most
    assert "x" not in results


def test_an_outcome_has_what_each_metric_returned_and_each_output_of_the_host_once():
    calls = []

    def kept(x):
        calls.append(x)
        return {"of": {"x": x}}

    metrics = {"kept": OnHost(kept, "x"), "spread": Spread(), "confusion": ConfusionMatrix(3)}
    evaluation = ft.Evaluation(columns, batches_of(5, **COLUMNS), metrics=metrics)
    outcome = evaluation.outcome(None)
    assert outcome.results.keys() == evaluation(None).keys()
    assert outcome.results["kept/of/x"] is outcome.by_metric["kept"]["of"]["x"] is calls[0]
    assert outcome.by_metric["spread"] == Spread().function(X, LABELS)
    assert outcome.by_metric["confusion"].tolist() == outcome.results["confusion"].tolist()
    assert outcome.outputs.keys() == {"x", "label"}  # And not what the confusion matrix took on the device.
    assert outcome.outputs["x"] is calls[0]
    assert (outcome.outputs["x"].tolist(), outcome.outputs["label"].tolist()) == (X.tolist(), LABELS.tolist())


def test_an_outcome_without_metrics_on_the_host_has_no_outputs():
    outcome = ft.Evaluation(squares, batches_of(5)).outcome(1.0)
    assert (outcome.by_metric, outcome.outputs) == ({}, {})


def test_functions_on_the_host_are_given_the_weights_that_they_declare():
    weight = np.array([2, 0, 1, 0.5] * 4, np.float32)
    metrics = {"accuracy": OnHost(accuracy_score, "label", "prediction")}
    data = batches_of(5, **COLUMNS, weight=weight)
    expected = accuracy_score(LABELS, SCORES.argmax(-1), sample_weight=weight)
    assert expected != accuracy_score(LABELS[weight > 0], SCORES.argmax(-1)[weight > 0])
    assert ft.Evaluation(columns, data, metrics=metrics)(None)["accuracy"] == expected


@pytest.mark.parametrize("function", [len, min, lambda x: 0, lambda x, **options: 0])
def test_a_function_that_does_not_take_weights_is_never_given_examples_as_if_they_weighed_the_same(function):
    weight = np.array([2, 0, 1, 0.5] * 4, np.float32)
    told = (
        "the metric 'n' counts all examples alike, and 8 of 12 have a weight other than 0 and 1, such as 2: let its"
        " function declare sample_weight=None, as scikit-learn's do, or give weights of 0 and 1"
    )
    metrics = {"n": OnHost(function, "x")}
    evaluation = ft.Evaluation(columns, batches_of(4, **COLUMNS, weight=weight), metrics=metrics)
    with pytest.raises(EvaluationError, match=f"^{re.escape(told)}$"):
        evaluation(None)
    ones = batches_of(4, **COLUMNS, weight=np.float32(weight > 0))
    ft.Evaluation(columns, ones, metrics=metrics)(None)


class Nameless:
    def function(self, x):
        return 0


class Single(Nameless):
    names = "x"


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        (accuracy_score, "which is no metric: give an object with names and function, or with names, init, accumulate"
         " and compute; of a function, ft.OnHost(accuracy_score, 'label', 'prediction')"),
        ("accuracy", "metrics={'m': ...} is 'accuracy', which is no metric"),
        (Spread, "metrics={'m': ...} is the class Spread: give one of it, Spread(...)"),
        (Nameless(), "has names=None: give the names of the outputs that it takes, names = ('label', 'prediction')"),
        (Single(), "has names='x': give the names of the outputs that it takes, names = ('x',)"),
        (OnHost(len), "has names=(): give the names of the outputs that it takes, names = ('label', 'prediction')"),
    ],
)  # fmt: skip
def test_what_is_no_metric_is_told_where_it_is_given(metric, told):
    with pytest.raises(EvaluationError, match=re.escape(told)):
        ft.Evaluation(squares, batches_of(4), metrics={"m": metric})


@pytest.mark.parametrize(("label", "prediction"), [(-1, 0), (2, 0), (0, -1), (0, 2)])
def test_a_class_that_there_is_not_is_an_error_and_never_another_class(label, prediction):
    data = [{"x": np.array([label, 1]), "y": np.array([prediction, 1])}]
    evaluation = ft.Evaluation(
        lambda params, batch: {"label": batch["x"], "prediction": batch["y"]},
        data,
        metrics={"confusion": ConfusionMatrix(classes=2)},
    )
    problem = "ConfusionMatrix(classes=2): 1 example(s) have a label or a prediction outside of 0 to 1; give them the"
    with pytest.raises(ValueError, match=re.escape(problem)):
        evaluation(None)
    data[0]["weight"] = np.float32([0, 1])
    assert evaluation(None)["confusion"].tolist() == [[0, 0], [0, 1]]


# Several processes

TWO_PROCESSES = """
import sys
import jax, numpy as np
import functrain as ft
from functrain.errors import EvaluationError
from functrain.loop.metrics import ConfusionMatrix, OnHost

jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
mesh = jax.make_mesh((2,), ("data",))
params = jax.make_array_from_process_local_data(jax.NamedSharding(mesh, jax.P()), np.float32(2))
data = ft.from_arrays({"x": np.arange(10, dtype=np.int32)}, batch_size=4, shuffle=False)

def eval_step(params, batch):
    return {"x": params * batch["x"], "each": batch["x"], "label": batch["x"] % 2, "prediction": batch["x"] * 0}

def numbers(each):
    return sorted(each.tolist())

metrics = {"each": OnHost(numbers, "each"), "confusion": ConfusionMatrix(2)}
try:
    ft.Evaluation(eval_step, data, metrics=metrics)(params)
except EvaluationError as error:
    print("ERROR", error)
sharding = jax.NamedSharding(mesh, jax.P("data"))
results = ft.Evaluation(eval_step, data, metrics=metrics, sharding=sharding)(params)
print("RESULTS", results["x"], results["each"], results["confusion"].tolist())
"""


@pytest.mark.slow
def test_two_processes_evaluate_each_example_once_and_agree():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [warm.Process(TWO_PROCESSES, port, process) for process in range(2)]
    for process in started:
        output, _ = process.communicate(timeout=120)
        assert "ERROR params lie over several processes, and each would evaluate its own batches alone" in output
        assert f"RESULTS 9.0 {list(range(10))} [[5, 0], [5, 0]]\n" in output


# Errors


@pytest.mark.parametrize(
    ("eval_step", "options", "problem"),
    [
        (
            lambda params, batch: {"x": batch["x"][:, None]},
            {},
            "eval_step returned 'x' of shape (4, 1): return a scalar or one value for each of the 4 examples, or give"
            " it to one of metrics=",
        ),
        (lambda params, batch: batch["x"], {}, "Tracer: return a dict by name, or a Loss"),
        (
            lambda params, batch: {"x": batch["x"]},
            {"metrics": {"confusion": ConfusionMatrix(3)}},
            "metrics= takes 'label', 'prediction', but eval_step returned 'x'",
        ),
        (
            lambda params, batch: {"x": batch["x"], "y": batch["x"]},
            {"metrics": {"x": OnHost(len, "y")}},
            "eval_step and metrics= both give 'x': rename one",
        ),
        (
            lambda params, batch: {"mean": batch["x"].mean()},
            {"metrics": {"n": OnHost(len, "mean")}},
            "OnHost 'n' takes 'mean' of shape (): return one value, or one array, for each of the 4 examples",
        ),
        (
            lambda params, batch: {"x": batch["x"].mean(), "label": batch["x"]},
            {"metrics": {"n": Spread()}},
            "Spread 'n' takes 'x' of shape (): return one value, or one array, for each of the 4 examples",
        ),
    ],
)
def test_what_has_no_mean_is_told_with_its_name(eval_step, options, problem):
    with pytest.raises(EvaluationError, match=re.escape(problem)):
        ft.Evaluation(eval_step, batches_of(4), **options)(None)


def test_data_that_can_be_read_once_only_is_told_at_the_second_time():
    evaluation = ft.Evaluation(squares, iter(batches_of(4)))
    evaluation(1.0)
    with pytest.raises(EvaluationError, match="no batch: give data that can be read more than once"):
        evaluation(1.0)


@pytest.mark.parametrize("batch", [{}, {"x": np.float32(1)}])
def test_a_batch_without_examples_is_told(batch):
    problem = "a batch of evaluation data has no leading axis of examples: stack them, (batch, ...)"
    with pytest.raises(EvaluationError, match=re.escape(problem)):
        ft.Evaluation(lambda params, batch: {"x": 1.0}, [batch])(None)


def test_a_text_of_a_metric_is_a_result_and_no_number_of_the_log(tmp_path):
    told = ft.OnHost(lambda loss: f"{len(loss)} examples", "error")
    step = lambda params, batch: {"loss": batch["x"], "error": batch["x"]}  # noqa: E731
    evaluation = ft.Evaluation(step, [{"x": np.ones(4, np.float32)}], metrics={"told": told})
    params = {"w": jnp.zeros(())}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
    update = ft.make_update(lambda params, batch: jnp.mean((params["w"] - batch["x"]) ** 2), optim)
    result = ft.fit(
        update, update.init(params), ft.from_arrays({"x": np.ones(4)}, 2), epochs=1, evaluation=evaluation,
        checkpoints=ft.Checkpoints(tmp_path, keep_best="valid/loss"), progress=False,
    )  # fmt: skip
    assert result.results == {"valid/loss": 1.0, "valid/told": "4 examples"}
    assert [row for row in result.history if "valid/told" in row] == []
