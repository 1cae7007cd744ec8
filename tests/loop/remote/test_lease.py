"""One process at a time writes to an address."""

import re
import threading
import time

import pytest
from trees import says

from functrain.errors import CheckpointError
from functrain.loop.remote.lease import Lease
from functrain.loop.remote.store import Store

SECONDS = 0.8


@pytest.fixture(params=["s3", "memory", "file"])
def store(request, tmp_path):
    if request.param == "s3":
        return Store(request.getfixturevalue("s3"))
    return Store({"memory": f"memory://{tmp_path.name}/digits", "file": tmp_path.as_uri()}[request.param])


def lease(store, home="one", told=None):
    return Lease(store, SECONDS, home, [].append if told is None else told.append)


def dead(store, home="one"):
    """A lease whose process is no more."""
    it = lease(store, home)
    it.acquire()
    it._ended.set()
    return it


def test_a_living_owner_is_found_and_nothing_is_taken_from_it(store):
    one, told = lease(store), []
    one.acquire()
    with pytest.raises(CheckpointError, match=says("another process writes checkpoints to", "process", "its own")):
        lease(store, "two", told).acquire()
    assert re.search(says("if it is not heard of within 0.8 s"), told[0])
    one.check()
    one.release()


def test_who_lets_go_is_followed_at_once(store):
    one, other = lease(store), lease(store, "two")
    one.acquire()
    one.release()
    one.release()
    began = time.monotonic()
    other.acquire()
    assert time.monotonic() - began < SECONDS / 2
    other.release()


def test_an_owner_that_is_not_heard_of_is_followed_and_finds_out(store):
    one = dead(store)
    other = lease(store, "two")
    other.acquire()
    one._ended.clear()  # As a machine that was asleep.
    time.sleep(SECONDS / 2)
    with pytest.raises(CheckpointError, match=says("took over as this one was not heard of")):
        one.check()
    other.check()
    one.release()
    other.check()
    other.release()


def test_a_dead_owner_from_the_same_folder_is_followed_at_once(store):
    dead(store)
    other, told = lease(store, "one"), []
    other.acquire()
    assert told == []
    other.release()


def test_of_several_that_come_at_once_one_has_it(store):
    if store.address.scheme == "file":
        pytest.skip("files have no operation that compares and replaces")
    dead(store, "none")
    leases, having = [lease(store, f"{number}") for number in range(4)], []

    def take(each):
        try:
            each.acquire()
            having.append(each)
        except CheckpointError:
            pass

    threads = [threading.Thread(target=take, args=[each]) for each in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(having) == 1
    having[0].check()
    having[0].release()


def test_a_lease_that_somebody_deletes_is_made_again(store):
    one = lease(store)
    one.acquire()
    store.delete([".functrain/lease.json"])
    time.sleep(SECONDS / 2)
    one.check()
    assert store.head(".functrain/lease.json") is not None
    one.release()


def test_an_object_in_its_place_that_makes_no_sense_belongs_to_nobody(store):
    store.put(".functrain/lease.json", b"[torn")
    one = lease(store)
    one.acquire()
    one.release()
