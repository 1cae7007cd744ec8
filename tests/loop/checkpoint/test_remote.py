"""Checkpoints at an address: sent while training goes on, read by any machine, in the same bits."""

import jax
import numpy as np
import pytest
from s3 import objects
from states import at, batch_of, digests, like, names, over, saved, simple, updated
from trees import bits, says

import functrain as ft
from functrain.errors import CheckpointError, SaveError, StorageError
from functrain.loop.checkpoint import manifest
from functrain.loop.remote.store import Store

QUICK = ft.Limits(request=2.0, patience=0.7, lease=2.0)


@pytest.fixture(params=["s3", "memory", "file"])
def address(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return {"memory": f"memory://{tmp_path.name}/digits", "file": (tmp_path / "it").as_uri()}[request.param]


@pytest.fixture
def here(tmp_path):
    """`here(address, ...)`: checkpoints at an address, as seen from a machine."""
    return lambda address, machine="a", **options: ft.Checkpoints(
        address, staging=tmp_path / machine, limits=QUICK, **options
    )


def manifests(address):
    return [name.removesuffix(manifest.SUFFIX) for name in objects(Store(address)) if name.endswith(manifest.SUFFIX)]


def test_a_fresh_machine_goes_on_with_the_same_bits(address, here):
    update, params, state = simple()
    with here(address) as checkpoints:
        for number in range(3):
            state, _ = update(state, batch_of(number))
            checkpoints.save(state, data={"position": number}, metrics={"loss": 1.0})
    assert manifests(address) == ["2", "3"]
    with here(address, "b") as fresh:
        assert names(fresh) == ["2", "3"]
        restored = fresh.restore(like=update.abstract(params))
        assert (restored.data, restored.metrics, restored.path.name) == ({"position": 2}, {"loss": 1.0}, "3")
        assert bits(restored.state) == bits(state)
        went_on, _ = update(restored.state, batch_of(3))
        fresh.save(went_on)
    again = here(address).restore(like=update.abstract(params))  # Where nothing of the last one is.
    assert (again.path.name, bits(again.state)) == ("4", bits(went_on))


def test_what_is_there_is_what_a_folder_would_have(address, here, tmp_path):
    with here(address) as checkpoints:
        checkpoints.save(updated(1)[2])
    store = Store(address)
    for name in objects(store):
        store.fetch(name, tmp_path / "copy" / name, store.head(name).size)
    restored = ft.Checkpoints(tmp_path / "copy").restore(like=like())
    assert bits(restored.state) == bits(updated(1)[2])
    assert manifest.damage(tmp_path / "copy" / "1") is None


def test_retention_is_that_of_a_folder_and_here_the_newest_is_kept(address, here, tmp_path):
    with here(address, keep_last=2, keep_best="loss") as checkpoints:
        assert saved(checkpoints, [3.0, 1.0, 2.0, 4.0, 5.0]) == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]
        assert manifests(address) == ["2", "4", "5"]
        assert {name.partition("/")[0] for name in objects(Store(address)) if "/" in name} == {"2", "4", "5"}
        assert [path.name for path in (tmp_path / "a").iterdir() if path.is_dir() and path.name.isdigit()] == ["5"]
        assert checkpoints.best().name == "2"
        assert checkpoints.is_best({"loss": 0.5})
        assert not checkpoints.is_best({"loss": 1.5})


def test_the_best_is_found_and_read_on_a_fresh_machine(address, here, monkeypatch, tmp_path):
    _, params, state = updated(1)
    with here(address, keep_last=1, keep_best="loss") as checkpoints:
        saved(checkpoints, [1.0, 2.0, 3.0])
    fresh = here(address, "b", keep_best="loss")
    assert [path.name for path in fresh.steps()] == ["1", "3"]
    assert fresh.restore(like=like(), step=fresh.best()).metrics == {"loss": 1.0}
    assert int(fresh.restore(like=like(), step=3).state.step) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert bits(ft.load_params(address, like=params, best=True)) == bits(state.params)
    with pytest.raises(CheckpointError, match=says("no checkpoint of step 2 in", address, "there are 1, 3")):
        fresh.restore(like=like(), step=2)


def test_nothing_is_there_before_and_that_is_no_error(address, here):
    with here(address) as checkpoints:
        assert checkpoints.restore(like=like()) is None
        assert checkpoints.steps() == []
    assert here(f"{address}-other", "b").restore(like=like()) is None


def test_a_fresh_machine_lists_once_and_a_restart_downloads_no_array(s3, proxy, here):
    with here(s3) as checkpoints:
        for number in (1, 2):
            checkpoints.save(updated(number)[2])
    files = [name for name in objects(Store(s3)) if name.startswith("2/")]
    for machine, fetched in (("a", 0), ("b", len(files)), ("b", 0)):
        proxy.seen.clear()
        with here(s3, machine) as checkpoints:
            checkpoints.open()
            checkpoints.restore(like=like())
        assert len([request for request in proxy.seen if "list-type" in request]) == 1
        assert len([request for request in proxy.seen if request.startswith("GET") and "/2/" in request]) == fetched
        assert not [request for request in proxy.seen if "/1/" in request]


@pytest.mark.parametrize("at", ["GET /{}/digits/1/", "GET /{}/digits/1.manifest"])
def test_a_reader_finds_what_came_in_the_place_of_what_it_had_listed(s3, proxy, here, at):
    bucket, is_done = s3.split("/")[2], []
    with here(s3, keep_last=1) as checkpoints:
        checkpoints.save(updated(1)[2])
        checkpoints.wait()

        def fault(number, method, path):
            if f"{method} {path}".startswith(at.format(bucket)) and not is_done:
                is_done.append(True)
                checkpoints.save(updated(2)[2])
                checkpoints.wait()
            return "pass"

        proxy.fault = fault
        assert int(here(s3, "b").restore(like=like()).state.step) == 2
        assert is_done


def test_objects_of_others_stay(address, here):
    store, others = Store(address), {"7/notes.txt": b"mine", "9.manifest.json": b"{}", "1/facts/metadata2": b"x"}
    for name, content in others.items():
        store.put(name, content)
    with here(address, keep_last=1) as checkpoints:
        for step in (1, 2, 7):
            checkpoints.save(at(step, updated(1)[2]))
            checkpoints.wait()
        assert names(checkpoints) == ["7~7"]
    with here(address, "b", keep_last=1) as checkpoints:
        checkpoints.save(at(9, updated(1)[2]))
        checkpoints.start_anew()
    assert {name: store.get(name) for name in others} == others


def test_what_was_not_sent_is_gone_on_with_and_sent(s3, proxy, here, monkeypatch):
    with here(s3) as checkpoints:
        checkpoints.save(updated(1)[2])
    checkpoints = here(s3)
    checkpoints.open()
    proxy.fault = lambda number, method, path: "503" if "/2/" in path else "pass"
    checkpoints.save(updated(2)[2])
    with pytest.raises(
        SaveError, match=says("the checkpoint '2' could not be sent to", s3, "503", "at the next start")
    ):
        checkpoints.close()
    assert manifests(s3) == ["1"]
    proxy.fault = lambda number, method, path: "pass"
    with here(s3) as checkpoints:
        checkpoints.open()
        assert int(checkpoints.restore(like=like()).state.step) == 2
        checkpoints.wait()
        assert manifests(s3) == ["1", "2"]
    assert int(here(s3, "b").restore(like=like()).state.step) == 2


@pytest.mark.parametrize("reads", [False, True])
def test_an_address_that_went_on_elsewhere_wins(reads, s3, proxy, here, tmp_path):
    with here(s3) as checkpoints:
        checkpoints.save(updated(1)[2], data="shared")
    proxy.fault = lambda number, method, path: "503" if "/3/" in path else "pass"
    with pytest.raises(SaveError), here(s3) as checkpoints:
        checkpoints.save(at(3, updated(1)[2]), data="only on a")
    proxy.fault = lambda number, method, path: "pass"
    with here(s3, "b") as elsewhere:
        elsewhere.restore(like=like())
        elsewhere.save(updated(2)[2], data="on b")
    told = says("has gone on without what is in", str(tmp_path / "a"), "kept in", "before-1")
    checkpoints = here(s3)
    with pytest.warns(UserWarning, match=told):
        checkpoints.restore(like=like()) if reads else checkpoints.open()
    with here(s3) if reads else checkpoints:
        checkpoints.open()
        assert checkpoints.restore(like=like()).data == "on b"
        assert names(checkpoints) == ["1", "2"]
    assert (tmp_path / "a" / "before-1" / "3").is_dir()
    assert manifests(s3) == ["1", "2"]


def test_a_copy_here_that_is_damaged_is_downloaded_anew(address, here, tmp_path):
    with here(address) as checkpoints:
        checkpoints.save(updated(1)[2])
    next((tmp_path / "a" / "1" / "facts").iterdir()).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=says("the copy of", f"{address}/1", "is damaged", "downloaded anew")):
        restored = here(address).restore(like=like())
    assert bits(restored.state) == bits(updated(1)[2])


def test_a_new_start_moves_all_aside_there(address, here):
    store = Store(address)
    with here(address) as checkpoints:
        saved(checkpoints, [None] * 2)
        before = {name: store.get(name) for name in objects(store)}
        assert checkpoints.start_anew().name == "before-1"
        assert checkpoints.steps() == []
        assert {name: store.get(name) for name in objects(store)} == {
            f"before-1/{name}": content for name, content in before.items()
        }
        assert checkpoints.start_anew() is None
        checkpoints.save(updated(1)[2])
        assert checkpoints.start_anew().name == "before-2"
    assert here(address, "b").restore(like=like()) is None
    assert names(here(f"{address}/before-1", "c")) == ["1", "2"]


def test_eight_devices_to_four(s3, here):
    update, params, options = over(jax.devices()[:8])
    state, _ = update(update.init(params, **options), np.float32(1.5))
    with here(s3) as checkpoints:
        checkpoints.save(state)
    fewer, params, options = over(jax.devices()[:4])
    restored = here(s3, "b").restore(like=fewer.abstract(params, **options)).state
    assert len(restored.params["pieces"].sharding.device_set) == 4
    assert jax.tree.map(np.asarray, ft.flatten(restored.params)).keys() == ft.flatten(state.params).keys()
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(restored.params)] == [
        np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.params)
    ]
    assert digests(restored).keys() == digests(state).keys()


def test_the_folder_of_an_address_is_in_the_cache_of_the_user(address, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ft.Checkpoints(address) as checkpoints:
        checkpoints.save(updated(1)[2])
    assert checkpoints.directory.parent == tmp_path / "cache" / "functrain"
    assert checkpoints.where == address
    assert [path.name for path in checkpoints.steps()] == ["1"]


@pytest.mark.parametrize(
    ("options", "error", "phrases"),
    [
        ({"directory": "s4://bucket/x"}, StorageError, ["s4:// is no storage", "did you mean 's3'?"]),
        ({"directory": "runs/x", "staging": "y"}, CheckpointError, ["staging= and limits= are for an address"]),
        ({"directory": "runs/x", "limits": QUICK}, CheckpointError, ["'runs/x' is a folder: leave them out"]),
    ],
)
def test_options_that_are_none(options, error, phrases):
    with pytest.raises(error, match=says(*phrases)):
        ft.Checkpoints(**options)


@pytest.mark.parametrize("options", [{"request": 0}, {"patience": "long"}, {"lease": float("inf")}])
def test_limits_that_are_no_times(options):
    with pytest.raises(StorageError, match=says("Limits(", "give seconds, more than 0")):
        ft.Limits(**options)


def test_an_address_of_one_checkpoint_is_told(address, here):
    with here(address) as checkpoints:
        checkpoints.save(updated(1)[2])
    with pytest.raises(CheckpointError, match=says("is a checkpoint itself: give what it lies in", address)):
        here(f"{address}/1", "b").restore(like=like())
