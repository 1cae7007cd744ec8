"""A sweep of learning rates shows the losses while they rise, and leaves everything as it was."""

import copy
import re
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import X, Y, bits_of, compilations, counted, loss_fn, optim_of, start, update_of

import functrain as ft

BATCHES = [{"x": X[i : i + 3], "y": Y[i : i + 3]} for i in range(0, 18, 3)]
HEAD = {"head": (1e-3, 0.1)}


def by_hand(update, state, rates, batches=BATCHES):
    """The metrics of all calls, with one rate of the head for each."""
    state, found = copy.deepcopy(state), []
    for batch, rate in zip(batches, rates, strict=True):
        state, metrics = update(state, batch, lr={"head": rate})
        found.append(metrics)
    return found


def scripted(*losses):
    """An update whose losses are those of the batches, and the batches."""
    params = {"w": jnp.zeros(())}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": ft.with_lr(optax.sgd, 0.1)})
    update = ft.make_update(lambda params, batch: batch + 0 * params["w"], optim)
    return update, update.init(params), [np.float32(loss) for loss in losses]


def swept(*losses, **options):
    return ft.lr_sweep(*scripted(*losses), {"all": (1e-6, 1.0)}, **options)


def test_rates_rise_in_geometric_steps_one_for_each_batch():
    update, state, _ = counted(update_of())
    sweep = ft.lr_sweep(update, state, BATCHES, HEAD)
    np.testing.assert_allclose(sweep.rates["head"], [10 ** (-3 + 0.4 * i) for i in range(6)])
    assert sweep.losses.tolist() == [float(each["loss"]) for each in by_hand(update, state, sweep.rates["head"])]
    assert not sweep.diverged


def test_the_caller_s_state_and_what_it_trains_to_stay_as_they_were():
    update, state, data = counted(update_of(accumulate=2))
    state, _ = update(state, BATCHES[0])  # In a window.
    before = bits_of(state)
    ft.lr_sweep(update, state, data, HEAD)
    assert bits_of(state) == before
    other, _ = update(update.init(start()), BATCHES[0])
    assert bits_of(update(state, BATCHES[1])[0]) == bits_of(update(other, BATCHES[1])[0])


def test_all_rates_are_of_one_program_and_it_is_the_update_s_own():
    update = ft.make_update(loss_fn, optim_of(head=ft.with_lr(optax.adam, 0.1)))
    with compilations() as names:
        ft.lr_sweep(update, update.init(start()), BATCHES, HEAD)
        ft.lr_sweep(update, update.init(start()), BATCHES, {"head": (1e-5, 1e-2)}, steps=9)
        update(update.init(start()), BATCHES[0], lr={"head": 0.5})
    assert [name for name in names if "functrain" in name] == ["jit(functrain_whole)"]


def test_several_parts_rise_at_once_each_between_its_own_rates():
    update, state, _ = counted(update_of())
    sweep = ft.lr_sweep(update, state, BATCHES, {"body": (1e-4, 1e-3), "head": (1e-3, 1.0)})
    np.testing.assert_allclose(sweep.rates["body"], np.geomspace(1e-4, 1e-3, 6))
    for i, batch in enumerate(BATCHES):
        rates = {part: rates[i] for part, rates in sweep.rates.items()}
        state, metrics = update(state, batch, lr=rates)
        assert sweep.losses[i] == float(metrics["loss"])


def test_with_accumulation_each_window_has_a_rate_and_its_mean_loss():
    update, state, _ = counted(update_of(accumulate=3))
    sweep = ft.lr_sweep(update, state, BATCHES, HEAD)
    assert sweep.rates["head"].tolist() == pytest.approx([1e-3, 0.1])
    found = by_hand(update, state, np.repeat(sweep.rates["head"], 3))
    assert sweep.losses.tolist() == [float(found[2]["loss"]), float(found[5]["loss"])]


def alternating(**options):
    phases = [ft.Phase("b", loss_fn, parts="body", repeat=2), ft.Phase("h", loss_fn, parts="head", **options)]
    return ft.make_update(ft.alternate(*phases), optim_of())


def test_with_phases_a_rate_stays_until_the_phase_whose_loss_it_is_has_stepped():
    update, state, _ = counted(alternating())
    sweep = ft.lr_sweep(update, state, BATCHES, HEAD)
    assert sweep.rates["head"].tolist() == pytest.approx([1e-3, 0.1])
    found = by_hand(update, state, np.repeat(sweep.rates["head"], 3))
    assert sweep.losses.tolist() == [float(found[2]["h"]["loss"]), float(found[5]["h"]["loss"])]
    of_both = {"body": (1e-4, 1e-2), "head": (1e-3, 1.0)}
    assert len(ft.lr_sweep(update, state, BATCHES, of_both, loss="b/loss").losses) == 4
    with pytest.raises(ft.FitError, match=re.escape("'b', 'h' train 'body', 'head': say whose loss it is, loss='b/lo")):
        ft.lr_sweep(update, state, BATCHES, of_both)


def test_a_phase_that_steps_several_times_on_a_batch_has_their_mean():
    update, state, _ = counted(alternating(repeat=2, same_batch=True))
    sweep = ft.lr_sweep(update, state, BATCHES, HEAD)
    found = by_hand(update, state, np.repeat(sweep.rates["head"], 2))
    assert sweep.losses.tolist() == [pytest.approx(float(jnp.mean(each["h"]["loss"]))) for each in found[1::2]]


def test_so_many_steps_read_the_data_again_and_a_spent_iterator_is_told():
    update, state, data = counted(update_of())
    assert len(ft.lr_sweep(update, state, data, HEAD, steps=10).losses) == 10
    assert len(ft.lr_sweep(update, state, iter(BATCHES), HEAD, steps=6).losses) == 6
    with pytest.raises(ft.FitError, match="ended before the steps of the sweep, in epoch 1: give a list or another"):
        ft.lr_sweep(update, state, iter(BATCHES), HEAD, steps=7)
    with pytest.raises(ft.FitError, match="the batches have no length: say how many rates there are, steps=100"):
        ft.lr_sweep(update, state, iter(BATCHES), HEAD)


@pytest.mark.parametrize(
    ("losses", "left"),
    [
        ((3, 2, 1, np.nan, 1), 3),
        ((3, 2, 1, np.inf, 1), 3),
        ((3, 2, 1, 1, 50, 1, 1), 5),
        ((-3, -5, -5, 40, -5, -5), 4),
    ],
)
def test_a_sweep_ends_where_the_loss_diverges(losses, left):
    sweep = swept(*losses)
    assert sweep.diverged
    assert sweep.losses.tolist() == [*map(float, losses[:left])]
    assert len(sweep.rates["all"]) == left


@pytest.mark.parametrize("losses", [(3, 2, 4, 1, 6, 9), (0, 1, 2, 3, 2, 5), (-3, -1, 2, 4, 3, 1)])
def test_a_loss_that_only_rises_ends_no_sweep(losses):
    assert not swept(*losses).diverged


def test_a_loss_that_is_not_finite_at_first_is_an_error():
    with pytest.raises(ft.NonFiniteError, match="the 'loss' of the first step is nan: begin with another state"):
        swept(np.nan, 1, 1)


def test_the_suggested_rate_is_where_the_loss_falls_fastest_and_is_lr_as_it_is():
    noise = np.random.default_rng(0).normal(size=60)
    curve = 10 / (1 + np.exp((np.arange(60) - 30) / 3)) + np.exp((np.arange(60) - 54) / 1.2)
    sweep = swept(*(curve + 0.1 * noise))
    assert np.abs(np.log(sweep.suggested["all"] / sweep.rates["all"][30])) < 3 * np.log(10) * 6 / 59
    update, state, batches = scripted(1.0)
    state, _ = update(state, batches[0], lr=sweep.suggested)
    update.optim.with_learning_rates(state.opt_state, sweep.suggested)


def test_nothing_is_suggested_that_the_losses_do_not_show():
    still_falling = 10 - np.geomspace(0.01, 5, 60)
    assert swept(*still_falling).suggested is None
    assert swept(*np.linspace(1, 2, 60)).suggested is None
    assert swept(*np.ones(60)).suggested is None
    assert swept(3, 2).suggested is None
    flat = [ft.Sweep({"all": np.geomspace(1e-6, 1, 60)}, np.random.default_rng(i).normal(size=60), 3, False)
            for i in range(50)]  # fmt: skip
    assert [sweep.suggested for sweep in flat] == [None] * 50


def test_smoothed_losses_are_means_of_neighbours_without_a_lag():
    sweep = ft.Sweep({"all": np.ones(6)}, np.float64([6, 0, 3, 3, 0, 9]), width=2, diverged=False)
    assert sweep.smoothed.tolist() == [6, 3, 2.4, 3, 4, 9]


@pytest.mark.parametrize(
    ("rates", "options", "error", "told"),
    [
        ({}, {}, ft.FitError, "a sweep of no rates: give the first and the last of a part, {'body': (1e-6, 1e-1)}"),
        (None, {}, ft.FitError, "a sweep of no rates"),
        ({"head": 0.1}, {}, ft.FitError, "the rates of part 'head' are 0.1: give the first and a larger last, {'body'"),
        ({"head": (1, 0.1)}, {}, ft.FitError, "the rates of part 'head' are (1, 0.1): give the first and a larger"),
        ({"head": (0, 0.1)}, {}, ft.FitError, "the rates of part 'head' are (0, 0.1): give the first and a larger"),
        ({"haed": (0.1, 1)}, {}, ft.UpdateError, "give a rate by part, of the parts 'body', 'head'"),
        (HEAD, {"steps": 1}, ft.FitError, "a sweep of 1 rates: give steps= of at least 2, or more batches"),
        (HEAD, {"steps": 2.5}, ft.FitError, "a sweep of 2.5 rates: give steps= of at least 2"),
        (HEAD, {"loss": "lss"}, ft.FitError, "loss='lss': the metrics are 'loss'; name one of them"),
    ],
)
def test_what_can_not_be_swept_is_told(rates, options, error, told):
    update, state, _ = counted(update_of())
    with pytest.raises(error, match=re.escape(told)):
        ft.lr_sweep(update, state, BATCHES, rates, **options)


def test_a_part_without_a_rate_data_that_are_none_and_a_consumed_state_are_told():
    update, state, _ = counted(update_of(head=optax.sgd(0.1)))
    with pytest.raises(ft.OptimizerError, match=re.escape("has no rate to set: make it with ft.with_lr(optax.adam")):
        ft.lr_sweep(update, state, BATCHES, HEAD)
    with pytest.raises(ft.FitError, match="the data is one dict: give batches"):
        ft.lr_sweep(update, state, BATCHES[0], HEAD)
    update(state, BATCHES[0])
    with pytest.raises(ft.UpdateError, match="this state was consumed by an earlier call"):
        ft.lr_sweep(update, state, BATCHES, HEAD)


def test_a_loss_of_a_phase_that_is_not_there_and_one_of_many_numbers_are_told():
    update, state, _ = counted(alternating())
    with pytest.raises(ft.FitError, match=re.escape("loss='loss': say of which phase, of 'b', 'h': loss='b/loss'")):
        ft.lr_sweep(update, state, BATCHES, HEAD, loss="loss")
    vector = ft.make_update(lambda *given: ft.Loss(loss_fn(*given).value, metrics={"all": jnp.ones(3)}), optim_of())
    with pytest.raises(ft.FitError, match=re.escape("loss='all' has shape (3,): name a metric that is one number")):
        ft.lr_sweep(vector, vector.init(start()), BATCHES, HEAD, loss="all")


def test_a_figure_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ft.FitError, match=r"Sweep.figure: .*matplotlib.*; write pip install matplotlib$"):
        swept(3, 2, 1).figure()


def test_a_figure_has_the_losses_of_each_part_by_its_rates(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; what is said then has a test of its own")
    sweep = swept(9, 9, 8, 5, 2, 1, 1, 4, 90)
    figure = sweep.figure()
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    raw, smoothed, suggested = axes.lines
    assert raw.get_ydata().tolist() == sweep.losses.tolist()
    assert smoothed.get_ydata().tolist() == sweep.smoothed.tolist()
    assert suggested.get_xdata()[0] == sweep.suggested["all"]
    figure.savefig(tmp_path / "sweep.png")
