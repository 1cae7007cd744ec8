"""A run starts anew where there was one before only if it is told to."""

import warnings

import pytest
from runs import bits_of, counted, update_of

import functrain as ft


def trained_in(directory, epochs, **options):
    update, state, data = counted(update_of())
    return ft.fit(update, state, data, epochs=epochs, checkpoints=ft.Checkpoints(directory), progress=False, **options)


def test_a_run_does_not_start_anew_where_no_checkpoint_is_sound_unless_it_is_told_to(tmp_path, capsys):
    trained_in(tmp_path, 2)
    for path in tmp_path.glob("*/facts/metadata"):
        path.write_bytes(b"{")
    log = (tmp_path / "log.jsonl").read_bytes()
    for damaged in (2, 0):  # The second time they are set aside already.
        with (
            warnings.catch_warnings(record=True) as warned,
            pytest.raises(ft.CheckpointError, match=r"(?s)no checkpoint in .* is sound:.*fit\(\.\.\., fresh=True\)"),
        ):
            trained_in(tmp_path, 3)
        assert ["IS DAMAGED" in str(warning.message) for warning in warned] == [True] * damaged
    assert (tmp_path / "log.jsonl").read_bytes() == log
    result = trained_in(tmp_path, 1, fresh=True)
    assert (int(result.state.step), result.epochs) == (4, 1)
    assert f"is kept in {tmp_path / 'before-1'}" in capsys.readouterr().out
    assert (tmp_path / "before-1" / "log.jsonl").read_bytes() == log
    assert sorted(path.name for path in (tmp_path / "before-1").glob("*.corrupt")) == ["4.corrupt", "8.corrupt"]
    assert int(trained_in(tmp_path, 2).state.step) == 8  # Which goes on with the new run.


def test_what_was_trained_before_is_kept_aside_by_a_run_that_starts_anew(tmp_path):
    first = trained_in(tmp_path, 2)
    again = trained_in(tmp_path, 1, fresh=True)
    assert (int(first.state.step), int(again.state.step)) == (8, 4)
    _, state, _ = counted(update_of())
    kept = ft.Checkpoints(tmp_path / "before-1").restore(like=state)
    assert bits_of(kept.state) == bits_of(first.state)


def test_starting_anew_needs_checkpoints():
    update, state, data = counted(update_of())
    with pytest.raises(ft.FitError, match=r"fresh=True .* give checkpoints="):
        ft.fit(update, state, data, epochs=1, fresh=True)
