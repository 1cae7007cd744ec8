"""What a row of the log has of the updates since the row before it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import X, Y, counted, loss_fn, start, update_of

import functrain as ft
from functrain.errors import NonFiniteError
from functrain.loop import means

RNG = np.random.default_rng(1)
NEVER = ft.Every(updates=1000)


def given(params, batch):
    """A loss that the batch says, whatever the parameters are, with the weight that it says."""
    return ft.Loss(jnp.mean(batch["x"]) + 0 * params["w"], weight=jnp.sum(batch["weight"]))


def update_for(loss, **options):
    params = {"w": jnp.zeros(())}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
    return ft.make_update(loss, optim, audit=False, **options)


def history(update, data, **options):
    return ft.fit(update, update.init({"w": jnp.zeros(())}), data, progress=False, **options).history


def batches(count):
    return [{"x": RNG.normal(size=2).astype(np.float32), "weight": RNG.uniform(0.5, 2, 2).astype(np.float32)}
            for _ in range(count)]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "unroll", "steps"),
    [
        ({}, 1, [3, 6, 9, 12]),
        ({"accumulate": 2}, 1, [3, 6]),
        ({"microbatches": 2}, 1, [3, 6, 9, 12]),
        ({}, 2, [4, 6, 10, 12]),
        ({"accumulate": 2}, 2, [4, 6]),
    ],
)
def test_a_row_has_the_weighted_means_of_the_updates_since_the_last_one(options, unroll, steps):
    data = batches(12)
    rows = history(update_for(given, **options), data, epochs=1, log=ft.Every(updates=3), unroll=unroll)
    assert [row["step"] for row in rows] == steps
    assert [row["train/mean_of_updates"] for row in rows] == np.diff([0, *steps]).tolist()
    of_step = options.get("accumulate", 1)
    for row, begin in zip(rows, [0, *steps], strict=False):
        of_row = data[of_step * begin : of_step * row["step"]]
        # Of two microbatches each has the weight of its example.
        if "microbatches" in options:
            expected = np.average([each["x"] for each in of_row], weights=[each["weight"] for each in of_row])
        else:
            weights = [each["weight"].sum() for each in of_row]
            expected = np.average([each["x"].mean() for each in of_row], weights=weights)
        assert row["train/loss"] == pytest.approx(expected, rel=1e-5, abs=1e-6)  # Some roundings in 32 bits.


def test_a_weight_that_follows_from_a_batchs_shape_counts_as_one_that_is_computed():
    def of_shape(params, batch):
        return ft.Loss(batch["x"].mean() + 0 * params["w"], weight=len(batch["x"]))

    data = ft.from_arrays({"x": np.arange(7, dtype=np.float32) ** 2}, batch_size=3, shuffle=False)
    (row,) = history(update_for(of_shape), data, epochs=1)
    assert row["train/loss"] == pytest.approx(np.mean(np.arange(7) ** 2), rel=1e-6)


def test_a_mean_of_many_updates_neither_drifts_nor_overflows():
    """A sum of 0.1 in 32 bits is wrong by a millionth after 100 of them; one of 1e30 times 1e9 is infinite."""

    def constant(params, batch):
        return ft.Loss(1e30 + 0 * params["w"], weight=1e9 * batch["one"], metrics={"tenth": 0.1 * batch["one"]})

    (row,) = history(update_for(constant), [{"one": np.float32(1)}] * 500, epochs=1, log=NEVER)
    assert row["train/mean_of_updates"] == 500
    assert (row["train/loss"], row["train/tenth"]) == (np.float32(1e30), np.float32(0.1))


def test_every_metric_is_a_mean_counts_flags_vectors_lists_and_halves_too():
    def measured(params, batch):
        x = batch["x"]
        metrics = {"count": jnp.sum(x > 1), "is": x[0] > 1, "each": x, "list": [x[0], x[1]]}
        return ft.Loss(x.mean() + 0 * params["w"], metrics={"of": metrics, "half": x[0].astype(jnp.bfloat16)})

    data = [{"x": np.float32(each)} for each in ([1, 2], [2, 3], [3, 4], [4, 5])]
    (row,) = history(update_for(measured), data, epochs=1)
    assert (row["train/of/count"], row["train/of/is"], row["train/half"]) == (7 / 4, 3 / 4, 2.5)
    assert (row["train/of/each/0"], row["train/of/each/1"]) == (2.5, 3.5)
    assert (row["train/of/list/0"], row["train/of/list/1"]) == (2.5, 3.5)


def test_metrics_that_only_some_updates_have_are_means_of_those():
    """A short batch has a program, and here a metric, of its own."""

    def some(params, batch):
        metrics = {"full": batch["x"].mean()} if len(batch["x"]) == 2 else {}
        return ft.Loss(batch["x"].mean() + 0 * params["w"], weight=len(batch["x"]), metrics=metrics)

    data = [{"x": np.float32(each)} for each in ([1, 1], [7], [3, 3])]
    (row,) = history(update_for(some), data, epochs=1)
    assert (row["train/full"], row["train/mean_of_updates"]) == (2, 3)
    assert row["train/loss"] == pytest.approx(15 / 5, rel=1e-6)


def test_the_last_update_alone_is_logged_where_it_is_asked_for():
    data = batches(4)
    without, rows = [history(update_for(given), data, epochs=1, log_last=asked) for asked in (False, True)]
    assert rows[0]["train/last/loss"] == data[-1]["x"].mean()
    assert rows[0].keys() - without[0].keys() == {"train/last/loss"}
    assert rows[0]["train/loss"] == without[0]["train/loss"] != rows[0]["train/last/loss"]


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_means_are_the_same_of_a_batch_that_lies_over_several_devices(kind):
    def each(params, batch):
        return ft.Loss(batch["x"].mean() + 0 * params["w"], metrics={"each": batch["x"]})

    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    update, data = update_for(each), [{"x": np.float32([i, i * i])} for i in range(4)]
    state = update.init(jax.device_put({"w": jnp.zeros(())}, jax.NamedSharding(mesh, jax.P())))
    (row,) = ft.fit(
        update, state, data, epochs=1, sharding=jax.NamedSharding(mesh, jax.P("data")), progress=False
    ).history
    assert [row[f"train/{name}"] for name in ("loss", "each/0", "each/1")] == pytest.approx([2.5, 1.5, 3.5], rel=1e-6)


# Phases


def test_each_phase_has_the_mean_of_its_own_updates():
    """Of D, D, G the updates of D were never seen, with a row every third."""
    update = update_for(ft.alternate(ft.Phase("d", given, "all", repeat=2), ft.Phase("g", given, "all")))
    data = batches(7)
    rows = history(update, data, epochs=1, log=ft.Every(updates=3))
    of_row = [("d", [0, 1]), ("g", [2])], [("d", [3, 4]), ("g", [5])], [("d", [6]), ("g", [])]
    for row, phases in zip(rows, of_row, strict=True):
        for name, mine in phases:
            assert row[f"train/{name}/mean_of_updates"] == len(mine)
            if mine:
                weights = [data[i]["weight"].sum() for i in mine]
                expected = np.average([data[i]["x"].mean() for i in mine], weights=weights)
                assert row[f"train/{name}/loss"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # What has not stepped since has what it had.
    assert rows[2]["train/g/loss"] == rows[1]["train/g/loss"]


def test_steps_of_a_phase_on_one_batch_are_one_number():
    def falling(params, batch):
        return params["w"] * batch["x"].mean()  # By 0.1 a step on a batch of ones.

    update = update_for(ft.alternate(
        ft.Phase("d", falling, "all"), ft.Phase("g", falling, "all", repeat=2, same_batch=True)))  # fmt: skip
    (row,) = history(update, [{"x": np.ones(1, np.float32)}] * 2, epochs=1)
    assert row["train/g/loss"] == pytest.approx(np.mean([-0.1, -0.2, -0.4, -0.5]), rel=1e-6)
    assert (row["train/d/mean_of_updates"], row["train/g/mean_of_updates"]) == (2, 4)


# What is not finite


def breaking(params, batch):
    """NaN in the loss and its gradients, where the batch says so."""
    loss = loss_fn(params, {"x": batch["x"], "y": batch["y"]})
    return ft.Loss(jnp.where(jnp.any(batch["bad"]), jnp.nan, 1.0) * loss.value, weight=loss.weight)


def infinite(params, batch):
    """An infinite loss with sound gradients: nothing else tells."""
    loss = loss_fn(params, {"x": batch["x"], "y": batch["y"]})
    return ft.Loss(loss.value + jnp.where(jnp.any(batch["bad"]), jnp.inf, 0), weight=loss.weight)


def bad_data(*bad):
    _, _, data = counted(update_of(), 6)
    return [{**batch, "bad": np.array(i in bad)} for i, batch in enumerate(data.epoch(0))]


def test_updates_that_are_left_out_are_counted_and_in_no_mean():
    update = update_of(breaking, nonfinite="skip")
    rows = [
        ft.fit(update, update.init(start()), bad_data(*bad), epochs=1, log=ft.Every(updates=3)).history
        for bad in ([1, 2], [3, 4, 5])
    ]
    counts = [[(row["train/skipped"], row["train/mean_of_updates"]) for row in each] for each in rows]
    assert counts == [[(2, 1), (0, 3)], [(0, 3), (3, 0)]]
    assert [row["train/nonfinite/body"] for row in rows[0]] == [2, 0]
    assert all(np.isfinite(row["train/loss"]) for row in [*rows[0], rows[1][0]])
    assert np.isnan(rows[1][1]["train/loss"])  # Of none there is no mean: it is the last one's.


@pytest.mark.parametrize("unroll", [1, 2])
def test_a_loss_that_is_not_finite_between_two_rows_is_found_at_the_second(unroll):
    update = update_of(infinite)
    with pytest.raises(NonFiniteError, match="step 4: 'train/loss' is not finite; "):
        ft.fit(update, update.init(start()), bad_data(2), epochs=1, log=ft.Every(updates=4), unroll=unroll)


def test_it_is_not_saved_and_the_autopsy_names_its_update(tmp_path):
    update, checkpoints = update_of(infinite), ft.Checkpoints(tmp_path, every=ft.Every(updates=2))
    state = update.init(start())
    with pytest.raises(NonFiniteError, match=r"step 4: 'train/loss' is not finite;(.|\n)*update 3, with batch 2 of"):
        ft.fit(update, state, bad_data(2), epochs=1, log=NEVER, checkpoints=checkpoints)
    assert [path.name for path in checkpoints.steps()] == ["2"]


# What a run that goes on has of the updates before, and what the device is asked for


@pytest.mark.parametrize("ends", [(1, 70), (31, 33, 70), (40, 64, 70)])
def test_a_row_is_of_the_updates_before_a_resume_too_to_the_bit(tmp_path, ends):
    """A save adds up what is not in the sums yet: however it falls, the numbers are the same."""
    data = ft.from_arrays({"x": np.tile(X, (10, 1)), "y": np.tile(Y, 10)}, batch_size=2, seed=0)
    rows = []
    for folder, steps in (("whole", (70,)), ("cut", ends)):
        for end in steps:
            result = ft.fit(
                update_of(), update_of().init(start()), data, steps=end, log=ft.Every(updates=70), progress=False,
                checkpoints=ft.Checkpoints(tmp_path / folder),
            )  # fmt: skip
        (row,) = result.history
        rows.append({name: value for name, value in row.items() if name != "train/steps_per_second"})
    assert rows[0] == rows[1]
    assert rows[0]["train/mean_of_updates"] == 70


def test_nothing_waits_for_the_device_where_metrics_are_added_up(monkeypatch):
    """Each update takes the device far longer than the loop: had something waited for it, it would be ready."""
    monkeypatch.setattr(means, "_AT_ONCE", 4)
    params = {"w": jnp.full((192, 192), 0.01)}

    def slow(params, batch):
        x = jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(x @ jax.lax.stop_gradient(params["w"])), params["w"])
        return jnp.mean(x + params["w"]) * batch["x"].mean()

    ready = []

    class Watch(ft.Hook):
        def update_ended(self, run):
            ready.append(run.metrics["loss"].is_ready())

    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.sgd(0.1)})
    update, data = ft.make_update(slow, optim), [{"x": np.ones(2, np.float32)}] * 24
    (row,) = ft.fit(update, update.init(params), data, epochs=1, hooks=[Watch()], log=NEVER, progress=False).history
    assert not all(ready[3::4])
    assert row["train/mean_of_updates"] == 24


def test_hooks_have_the_last_update_alone_also_in_a_run_that_goes_on(tmp_path):
    class Kept(ft.Hook):
        def run_started(self, run):
            self.found = {name: float(value) for name, value in run.metrics.items()}

        def run_ended(self, run, error):
            self.left = float(run.metrics["loss"])

    kept, update = [Kept(), Kept()], update_for(given)
    x = RNG.normal(size=(12, 2)).astype(np.float32)
    data = ft.from_arrays({"x": x, "weight": np.ones(12, np.float32)}, batch_size=2, shuffle=False)
    for hook, steps in zip(kept, (4, 5), strict=True):
        rows = ft.fit(
            update, update.init({"w": jnp.zeros(())}), data, steps=steps, hooks=[hook], progress=False,
            checkpoints=ft.Checkpoints(tmp_path), log=ft.Every(updates=5),
        ).history  # fmt: skip
    assert kept[0].left == kept[1].found["loss"] == x[6:8].mean()
    assert rows[0]["train/mean_of_updates"] == 5
    assert rows[0]["train/loss"] == pytest.approx(x[:10].mean(), rel=1e-5, abs=1e-6)
