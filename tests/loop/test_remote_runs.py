"""Runs whose checkpoints lie at an address."""

import pytest
from runs import bits_of, data_of, scripted, start, update_of

import functrain as ft


@pytest.fixture
def fitted(tmp_path):
    """`fitted(machine, epochs, ...)`: the result of a run, as a machine has it."""

    def fit(machine, epochs, values=(3.0, 1.0, 2.0, 4.0), **options):
        checkpoints = ft.Checkpoints(f"memory://{tmp_path.name}", staging=tmp_path / machine, keep_best="valid/loss")
        update = update_of()
        return ft.fit(update, update.init(start()), data_of(seed=0), epochs=epochs, evaluation=scripted(*values),
                      checkpoints=checkpoints, log=ft.Every(updates=1), **options)  # fmt: skip

    return fit


def timeless(history):
    return [{name: value for name, value in row.items() if name != "train/steps_per_second"} for row in history]


def test_a_fresh_machine_goes_on_with_the_bits_the_log_and_the_best(fitted, capsys, tmp_path):
    update, valid = update_of(), scripted(3.0, 1.0, 2.0, 4.0)
    whole = ft.fit(update, update.init(start()), data_of(seed=0), epochs=4, evaluation=valid,
                   log=ft.Every(updates=1), progress=False)  # fmt: skip
    fitted("a", 2)
    went_on = fitted("b", 4, (2.0, 4.0))
    assert f"went on from memory://{tmp_path.name}/10, step 10, epoch 2" in capsys.readouterr().err
    assert bits_of(went_on.state) == bits_of(whole.state)
    assert timeless(went_on.history) == timeless(whole.history)
    best = fitted("c", 4, load_best_on_end=True)
    assert int(best.state.step) == 10
    assert f"memory://{tmp_path.name} was finished at step 20" in capsys.readouterr().err


def test_a_new_run_begins_there_too(fitted, capsys, tmp_path):
    fitted("a", 2)
    assert len(timeless(fitted("b", 1, fresh=True).history)) == 6
    where = f"memory://{tmp_path.name}"
    assert f"what was in {where} is kept in {where}/before-1" in capsys.readouterr().out
    assert [path.name for path in ft.Checkpoints(where, staging=tmp_path / "c").steps()] == ["5"]
