"""Programs are compiled before a run begins, and kept for the next time that it is started."""

import json
from pathlib import Path

import pytest
import warm
from runs import compilations, counted, loss_fn, optim_of

import functrain as ft


def made(**options):
    return ft.make_update(loss_fn, optim_of(), **options)


def compiled_in(update, batches_an_epoch=4, **options):
    """The programs of the update that a run compiles before its first step, and after it."""

    class First(ft.Hook):
        def update_ended(self, run):
            self.count = getattr(self, "count", None) or len(names)

    first = First()
    with compilations() as names:
        ft.fit(*counted(update, batches_an_epoch), log=ft.Every(updates=2), hooks=[first], progress=False, **options)
    short = [[name.removeprefix("jit(functrain_").removesuffix(")") for name in some if "functrain_" in name]
             for some in (names[: first.count], names[first.count :])]  # fmt: skip
    return sorted(short[0]), sorted(short[1])


@pytest.mark.parametrize(
    ("accumulate", "options", "expected"),
    [
        (1, {"epochs": 2}, ["whole", "whole"]),
        (1, {"steps": 1}, ["whole"]),
        (3, {"epochs": 4}, ["first", "flush", "last", "last", "middle"]),
        (4, {"epochs": 2}, ["first", "last", "last", "middle"]),
        (1, {"epochs": 2, "unroll": 2}, ["scan", "scan"]),
    ],
)
def test_a_run_compiles_what_it_will_need_before_its_first_step(accumulate, options, expected):
    before, after = compiled_in(made(accumulate=accumulate), **options)
    assert (before, after) == (expected, [])


def test_scans_of_phases_are_one_program_and_what_they_leave_over_is_compiled_with_them():
    """Of 8 batches an epoch two cycles of 3 are taken at once, so that epochs begin anywhere in a cycle."""
    head, body = ft.Phase("head", loss_fn, "head", repeat=2), ft.Phase("body", loss_fn, "body")
    update = ft.make_update(ft.alternate(head, body), optim_of())
    before, after = compiled_in(update, 8, epochs=4, unroll=2)
    assert (before, after) == (["scan", "scan", "whole", "whole", "whole", "whole"], [])


def test_an_unrolled_run_logs_norms_by_part():
    result = ft.fit(*counted(made()), epochs=2, unroll=2, log=ft.Every(updates=4), progress=False)
    alone = ft.fit(*counted(made()), epochs=2, log=ft.Every(updates=4), progress=False)
    names = {f"train/parts/{part}/grad_norm" for part in ("body", "head")}
    for row, expected in zip(result.history, alone.history, strict=True):
        assert names <= row.keys() == expected.keys()
        assert [row[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-5)


PROGRAM = """
import json, sys

sys.path.insert(0, {here!r})

import jax
import functrain as ft
from runs import counted, loss_fn, optim_of

update, state, data = counted(ft.make_update(loss_fn, optim_of(), accumulate=2))
events = []
jax.monitoring.register_event_listener(lambda event, **details: events.append(event.rpartition("/")[-1]))
ft.fit(update, state, data, epochs=2, log=ft.Every(updates=2), progress=False, compilation_cache=sys.argv[1])
print(json.dumps([events.count("cache_hits"), events.count("cache_misses")]))
"""


def test_a_run_that_is_started_again_compiles_nothing(tmp_path):
    found = []
    for _ in range(2):
        process = warm.Process(PROGRAM.format(here=str(Path(__file__).parent)), tmp_path / "cache")
        printed, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        found.append(json.loads(printed.splitlines()[-1]))
    (_, missed), (hits, missed_again) = found
    assert missed >= 3
    assert (hits >= missed, missed_again) == (True, 0)
