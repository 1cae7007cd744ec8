"""What a checkpoint must have in common with the state that is asked for."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import optax
import pytest
from states import KEY, SUMMARY, squares
from trees import says

import functrain as ft
from functrain.errors import CheckpointError
from functrain.loop.checkpoint import manifest
from functrain.loop.checkpoint.leaves import key_kinds, leaf_spec
from functrain.loop.checkpoint.specs import nbytes


def made(params, rules=None, txs=None, *, loss=None, **options):
    parts = ft.partition(params, rules or {"all": ...})
    optim = ft.Optimizer(parts, txs or dict.fromkeys(parts.names, optax.sgd(0.1, momentum=0.9)))
    return ft.make_update(loss or (lambda params, batch: squares(params)), optim, **options), params


def two(**changed):
    return {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)} | changed


BY_NAME = {"a": "a", "b": "b"}
Y = ft.Phase("y", lambda params, batch: squares(params), "b")
A_ONCE, A_TWICE = (
    ft.alternate(ft.Phase("x", lambda params, batch: squares(params), "a", repeat=repeat), Y) for repeat in (1, 2)
)
SGD, ADAM = optax.sgd(0.1, momentum=0.9), optax.adam(0.1)

MISFITS = {
    "a renamed leaf": (
        made(two()), made({"a": jnp.zeros((2, 3)), "c": jnp.zeros(4)}),
        ["opt_state/all/0/trace/b: saved as float32[4], now missing", "params/b: saved as float32[4], now missing",
         "opt_state/all/0/trace/c: not saved, now float32[4]", "params/c: not saved, now float32[4]"],
    ),
    "a missing leaf": (
        made(two()), made({"a": jnp.zeros((2, 3))}),
        ["opt_state/all/0/trace/b: saved as float32[4], now missing", "params/b: saved as float32[4], now missing"],
    ),
    "a leaf more": (
        made({"a": jnp.zeros((2, 3))}), made(two()),
        ["opt_state/all/0/trace/b: not saved, now float32[4]", "params/b: not saved, now float32[4]"],
    ),
    "another shape": (
        made(two()), made(two(a=jnp.zeros((3, 2)))),
        ["opt_state/all/0/trace/a: saved as float32[2,3], now float32[3,2]",
         "params/a: saved as float32[2,3], now float32[3,2]"],
    ),
    "another dtype": (
        made(two()), made(two(a=jnp.zeros((2, 3), jnp.bfloat16))),
        ["opt_state/all/0/trace/a: saved as float32[2,3], now bfloat16[2,3]",
         "params/a: saved as float32[2,3], now bfloat16[2,3]"],
    ),
    "another optimizer": (
        made(two(), BY_NAME, {"a": SGD, "b": SGD}), made(two(), BY_NAME, {"a": SGD, "b": ADAM}),
        ["part 'b': saved with the optimizer chain(trace, scale), now chain(scale_by_adam, scale)",
         "opt_state/b/0/trace/b: saved as float32[4], now missing", "opt_state/b/0/count: not saved, now int32[]",
         "opt_state/b/0/mu/b: not saved, now float32[4]", "opt_state/b/0/nu/b: not saved, now float32[4]"],
    ),
    "another optimizer of the same state": (
        made(two(), txs={"all": ft.with_lr(optax.adam, 0.1)}), made(two(), txs={"all": ft.with_lr(optax.adamw, 0.1)}),
        ["part 'all': saved with the optimizer adam, now adamw"],
    ),
    "another transform of optax's of the same state": (
        made(two(), txs={"all": optax.adam(0.1)}), made(two(), txs={"all": optax.adamw(0.1)}),
        ["part 'all': saved with the optimizer chain(scale_by_adam, scale), now chain(scale_by_adam,"
         " add_decayed_weights, scale)"],
    ),
    "a factory of one's own that makes another": (
        made(two(), txs={"all": ft.with_lr(lambda lr: optax.sgd(lr), 0.1)}),
        made(two(), txs={"all": ft.with_lr(lambda lr: optax.sign_sgd(lr), 0.1)}),
        ["part 'all': saved with the optimizer <lambda>(chain(identity, scale)), now <lambda>(chain(scale_by_sign"],
    ),
    "a part that is frozen": (
        made(two(), BY_NAME, {"a": SGD, "b": SGD}), made(two(), BY_NAME, {"a": SGD, "b": ft.FROZEN}),
        ["part 'b': saved with the optimizer chain(trace, scale), now frozen",
         "opt_state/b/0/trace/b: saved as float32[4], now missing"],
    ),
    "other parts": (
        made(two(), {"x": "a", "y": ...}), made(two(), {"x": ...}),
        ["b: saved in part 'y', now in 'x'", "opt_state/y/0/trace/b: saved as float32[4], now missing",
         "opt_state/x/0/trace/b: not saved, now float32[4]"],
    ),
    "parts that are frozen under another name": (
        made(two(), BY_NAME, {"a": SGD, "b": ft.FROZEN}),
        made(two(), {"a": "a", "other": "b"}, {"a": SGD, "other": ft.FROZEN}),
        ["b: saved in part 'b', now in 'other'"],
    ),
    "another accumulation": (made(two()), made(two(), accumulate=2), ["accumulate: saved as 1, now 2"]),
    "other phases": (
        made(two(), BY_NAME, loss=A_ONCE), made(two(), BY_NAME, loss=A_TWICE),
        ["phases: saved as [['x', 'a', 1, False], ['y', 'b', 1, False]], now [['x', 'a', 2, False]"],
    ),
    "a loss scale": (
        made(two()), made(two(), loss_scale=ft.DynamicScale()),
        ["scale_state/scale: not saved, now float32[]", "scale_state/good: not saved, now int32[]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_one_error_with_all_that_differs(tmp_path, name):
    (saved_by, before), (asked_by, now), lines = MISFITS[name]
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(saved_by.init(before))
    shutil.rmtree(tmp_path / "0" / "state")  # It is raised before an array is read.
    manifest.path_of(tmp_path / "0").unlink()
    with pytest.raises(CheckpointError) as raised:
        checkpoints.restore(like=asked_by.abstract(now))
    text = str(raised.value)
    assert text.startswith(f"the checkpoint {tmp_path / '0'} does not fit the state that is asked for:\n")
    assert "\nrestore it with the" in text
    told = text.split(":\n", 1)[1].splitlines()[:-1]
    assert len(told) == len(lines)
    assert all(one.startswith(f"  {line}") for one, line in zip(told, lines, strict=True)), told
    assert (tmp_path / "0").is_dir()


@pytest.mark.parametrize("given", [{"key": KEY}, {"key": jax.random.key(0, impl="rbg")}, {"model_state": {"m": KEY}}])
def test_another_key_or_model_state_does_not_fit(tmp_path, given):
    def loss_fn(params, batch, key=None, model_state=None):
        return squares(params)

    update, params = made(two(), loss=loss_fn)
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(update.init(params, key=jax.random.PRNGKey(0), model_state={"m": jnp.zeros(2)}))
    with pytest.raises(CheckpointError, match=says("key: saved as uint32[2], now")):
        checkpoints.restore(like=update.abstract(params, **{"key": KEY, "model_state": {"m": jnp.zeros(2)}} | given))


def test_what_regrouping_cannot_mend_it_is_not_advised_for(tmp_path):
    update, params = made({"w": jnp.zeros(2)})
    wider, wide = made({"w": jnp.zeros(3)})
    adam, _ = made({"w": jnp.zeros(2)}, txs={"all": optax.adam(0.1)})
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(update.init(params))
        with pytest.raises(
            CheckpointError, match=says("with the model and the update", "regroup=True", "can't mend that")
        ):
            checkpoints.restore(like=wider.abstract(wide))
        with pytest.raises(CheckpointError, match=says("as only parts, optimizers or ema= are others, regroup=True")):
            checkpoints.restore(like=adam.abstract(params))


def test_ten_differences_are_listed_and_the_others_counted(tmp_path):
    update, params = made({f"w{i:02}": jnp.zeros(1) for i in range(16)}, txs={"all": optax.sgd(0.1)})
    other, changed = made({f"w{i:02}": jnp.zeros(2) for i in range(16)}, txs={"all": optax.sgd(0.1)})
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(update.init(params))
        with pytest.raises(CheckpointError, match=says("params/w09: saved as", "\n  ... and 6 more\n")) as raised:
            checkpoints.restore(like=other.abstract(changed))
    assert "params/w10" not in str(raised.value)


@pytest.mark.parametrize("number", [1, 4])
def test_another_format_is_an_error_that_says_which_version_reads_it(tmp_path, number):
    params = {"w": jnp.ones(2)}
    optim = ft.Optimizer(ft.partition(params, {"all": ...}), {"all": optax.adam(0.1)})
    update = ft.make_update(lambda params, batch: jnp.sum(params["w"] * batch), optim)
    with ft.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(update.init(params))
    written = tmp_path / "0" / "facts" / "metadata"
    contents = json.loads(written.read_bytes()) | {"format": number}
    contents["versions"]["functrain"] = "0.9.9"
    if number == 1:  # It had no number.
        del contents["format"]
    written.write_text(json.dumps(contents))
    manifest.write(tmp_path / "0", SUMMARY)
    told = rf"written by functrain 0\.9\.9 in format {number}.*reads formats 2 and 3: go on with functrain 0\.9\.9"
    with pytest.raises(ft.CheckpointError, match=told):
        ft.Checkpoints(tmp_path).restore(like=update.abstract(params))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == ["0", "0.manifest.json"]


def test_what_a_leaf_takes_up_is_known_without_jax():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int4, jnp.float8_e4m3fn, jnp.bool_, jnp.complex64, jnp.int16):
        leaf = jnp.zeros((3, 2), dtype)
        assert nbytes(leaf_spec(leaf)) == leaf.nbytes
    for name, kind in key_kinds().items():
        assert nbytes(f"{name}[2]") == 2 * math.prod(kind.shape) * 4
