"""An optimizer of other numbers than a checkpoint was saved with."""

import json
import warnings

import jax.numpy as jnp
import optax
import pytest
from states import SUMMARY, squares
from trees import says

import functrain as ft
from functrain.loop.checkpoint import manifest

PARAMS = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
PARTS = ft.partition(PARAMS, {"a": "a", "b": "b"})


def made(b=None, a=None, **options):
    a, b = a or ft.with_lr(optax.adamw, 0.1), b or optax.adam(0.1)
    optim = ft.Optimizer(PARTS, {"a": a, "b": b}, **options)
    return ft.make_update(lambda params, batch: squares(params), optim)


def saved(directory, update, **written):
    """A checkpoint of which some of the configuration and the versions were written otherwise."""
    with ft.Checkpoints(directory) as checkpoints:
        checkpoints.save(update.init(PARAMS))
    path = directory / "0" / "facts" / "metadata"
    contents = json.loads(path.read_bytes())
    contents["versions"] |= written.pop("versions", {})
    for name, value in written.items():
        contents["configuration"].pop(name)
        contents["configuration"] |= {} if value is None else {name: value}
    path.write_text(json.dumps(contents))
    manifest.write(directory / "0", SUMMARY)
    return ft.Checkpoints(directory)


OTHERS = {
    "b1": (made(), made(optax.adam(0.1, b1=0.8)), ["part 'b': b1 of scale_by_adam was 0.9, is now 0.8"]),
    "weight decay and its eps": (
        made(ft.with_lr(optax.adamw, 0.1)), made(ft.with_lr(optax.adamw, 0.1, weight_decay=0.1, eps=1e-6)),
        ["part 'b': eps of scale_by_adam was 1e-08, is now 1e-06",
         "part 'b': weight_decay of add_decayed_weights was 0.0001, is now 0.1"],
    ),
    "a rate that is a constant": (
        made(), made(optax.adam(0.2)), ["part 'b': step_size of scale was -0.1, is now -0.2"]
    ),
    "clip_norm": (made(clip_norm=1.0), made(clip_norm=0.5), ["clip_norm was 1.0, is now 0.5"]),
    "clip_norm of a part": (
        made(clip_norm={"a": 1.0}), made(clip_norm={"b": 1.0}), ["clip_norm was {'a': 1.0}, is now {'b': 1.0}"]
    ),
    "clip_norm where there was none": (made(), made(clip_norm=0.5), ["clip_norm was None, is now 0.5"]),
    "clip_by": (made(clip_norm=1.0), made(clip_norm=1.0, clip_by="part"), ["clip_by was all, is now part"]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_numbers_are_restored_with_a_warning_of_the_old_and_the_new(tmp_path, name):
    before, now, lines = OTHERS[name]
    checkpoints = saved(tmp_path, before)
    with pytest.warns(
        UserWarning, match=says("goes on with other numbers than", *lines, "write the numbers that were")
    ):
        restored = checkpoints.restore(like=now.abstract(PARAMS))
    assert restored.changed == tuple(lines)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.restore(like=before.abstract(PARAMS)).changed == ()


def test_a_checkpoint_of_before_numbers_were_kept_is_compared_by_the_name_of_its_optimizer(tmp_path):
    checkpoints = saved(tmp_path, made(), makeup=None, clip=None, optimizers={"a": "adamw", "b": "chain"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.restore(like=made(optax.adam(0.1, b1=0.8), clip_norm=1.0).abstract(PARAMS)) is not None
    with pytest.raises(ft.CheckpointError, match=says("part 'b': saved with the optimizer chain, now adam\n")):
        checkpoints.restore(like=made(ft.with_lr(optax.adam, 0.1)).abstract(PARAMS))


def test_another_optax_may_make_an_optimizer_of_other_transforms(tmp_path):
    adam, adamw = made(), made(optax.adamw(0.1))
    checkpoints = saved(tmp_path, adam, versions={"optax": "0.0.1"})
    assert checkpoints.restore(like=adamw.abstract(PARAMS)) is not None
    with pytest.raises(ft.CheckpointError, match="saved with the optimizer adamw, now sgd"):
        checkpoints.restore(like=made(a=ft.with_lr(optax.sgd, 0.1)).abstract(PARAMS))
