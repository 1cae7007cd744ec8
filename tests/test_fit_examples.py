"""The examples of `fit` run as a reader would run them, also where they are killed in the middle."""

import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warm
from soak import in_soak
from test_examples import EXAMPLES, run

import functrain as ft

EPOCHS = 3


def fit_digits(out):
    return ["fit_digits.py", "--out", out, "--epochs", EPOCHS]


def kill_after(start, program, *arguments):
    """Runs a program until it prints a line that starts so, and kills it then."""
    process = warm.Process(EXAMPLES / program, *arguments)
    for line in process.stdout:
        if line.startswith(start):
            process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL


def results_in(output):
    """What the program prints last: which state is best, and how good it is on the test set."""
    return output[output.index("best after step") :]


def history(out):
    untimed = ("time", "train/steps_per_second")
    return [{k: v for k, v in row.items() if k not in untimed} for row in ft.read_json_lines(out / "log.jsonl")]


def test_fit_digits_learns_and_started_again_says_so(tmp_path):
    whole = tmp_path / "whole"
    output = run(*fit_digits(whole))
    assert float(re.search(r"^test accuracy (\d\.\d{3})$", output, re.MULTILINE)[1]) >= 0.93
    matrix = [[int(n) for n in row.split()] for row in re.findall(r"^ ?\[+([ \d]+)\]+$", output, re.MULTILINE)]
    assert np.sum(matrix) == 360

    ended = run(*fit_digits(whole))
    assert "epoch" not in ended
    assert results_in(ended) == results_in(output)


@in_soak
def test_fit_digits_killed_in_the_middle_of_an_epoch_ends_as_if_it_had_not_been(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    output = run(*fit_digits(whole))
    kill_after("epoch  2", *fit_digits(cut))
    again = run(*fit_digits(cut))
    epochs = [int(epoch) for epoch in re.findall(r"^epoch +(\d+)", again, re.MULTILINE)]
    assert epochs == list(range(epochs[0], EPOCHS + 1))
    assert epochs[0] > 1  # It did go on.
    assert results_in(again) == results_in(output)
    assert history(cut) == history(whole)


# Fine-tuning


@pytest.fixture(scope="module")
def finetuned():
    """What the program prints and returns, and copies of the states before and after each of its stages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import finetune

        fit, stages, printed = ft.fit, [], []

        class Start(ft.Hook):
            def run_started(self, run):
                self.begin = copy_of(run.state)

        def kept(*args, **options):
            result = fit(*args, **options, hooks=[start := Start()])
            stages.append((args[0], start.begin, copy_of(result.state)))
            return result

        patch.setattr(ft, "fit", kept, raising=False)
        patch.setattr("builtins.print", lambda text="", file=None, **_: file or printed.append(str(text)))
        results = finetune.main(["--epochs", "10"])
    return results, "\n".join(printed), stages


def copy_of(state):
    """Flax's own `deepcopy` takes the `Param`s out of an `nnx.State`."""
    return jax.tree.map(jnp.copy, state)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_each_stage_of_fine_tuning_is_printed_and_the_last_is_better_than_the_second(finetuned):
    results, printed, _ = finetuned
    assert results["pretrained"] >= 0.95
    assert 0.7 <= results["frozen"] < results["unfrozen"] - 0.05
    assert re.findall(r"test accuracy, .* (\d\.\d{3})", printed) == [
        f"{results[stage]:.3f}" for stage in ("frozen", "unfrozen")
    ]


def test_the_backbone_is_frozen_to_the_bit_in_the_second_stage_and_trained_in_the_others(finetuned):
    _, _, stages = finetuned
    same = [bits(before.params["backbone"]) == bits(after.params["backbone"]) for _, before, after in stages]
    assert same == [False, True, False]
    _, _, (_, before, _) = stages
    assert bits(before.params) == bits(stages[1][2].params)
    assert bits(stages[1][1].params["backbone"]) == bits(stages[0][2].params["backbone"])


def test_the_moments_of_the_head_are_carried_over_and_those_of_the_backbone_begin(finetuned):
    _, printed, (_, (_, _, probed), (tune, before, _)) = finetuned
    assert bits(before.opt_state["head"]) == bits(probed.opt_state["head"])
    assert any(np.any(leaf) for leaf in jax.tree.leaves(ft.flatten(before.opt_state["head"])))
    assert bits(before.opt_state["backbone"]) == bits(tune.init(before.params).opt_state["backbone"])
    assert "head: carried over from 'head':" in printed
    assert "mu (2 leaves), nu (2 leaves)" in printed
    assert "backbone: started anew:" in printed


def test_each_part_has_a_rate_of_its_own_in_the_last_stage(finetuned):
    _, _, (*_, (tune, _, after)) = finetuned
    rates = {part: float(rate) for part, rate in tune.optim.learning_rates(after.opt_state).items()}
    assert rates == {"backbone": np.float32(1e-3), "head": np.float32(5e-3)}
