"""What is sent in the background: once for all that was asked meanwhile, and again when it failed."""

import threading
import time

import pytest

from functrain.errors import SaveError
from functrain.loop.checkpoint.sending import Sender


class Sent:
    """Counts what is sent; each waits for a word, and fails as often as it is told to."""

    def __init__(self, fails=0):
        self.count, self.fails = 0, fails
        self.begun, self.go_on = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self):
        self.begun.release()
        self.go_on.acquire()
        self.count += 1
        if self.count <= self.fails:
            raise OSError(f"number {self.count} failed")


@pytest.fixture
def started():
    senders = []

    def start(send):
        senders.append(Sender(send))
        senders[-1].start()
        return senders[-1]

    yield start
    for sender in senders:
        sender._send.go_on.release(99)
        sender.stop()


def test_what_is_asked_for_while_it_sends_is_sent_at_once_afterwards(started):
    send = Sent()
    sender = started(send)
    sender.ask()
    send.begun.acquire()
    for _ in range(5):
        sender.ask()
    assert not sender.is_done
    send.go_on.release(2)
    sender.wait()
    assert (send.count, sender.is_done, sender.failure) == (2, True, None)


def test_a_failure_is_told_and_told_again_without_another_try(started):
    send = Sent(fails=9)
    sender = started(send)
    send.go_on.release(2)
    sender.ask()
    with pytest.raises(SaveError, match="number 1 failed"):
        sender.wait()
    with pytest.raises(SaveError, match="number 1 failed"):
        sender.wait()
    assert send.count == 1


def test_a_failure_that_nobody_waited_for_is_tried_again_when_somebody_does(started):
    send = Sent(fails=1)
    sender = started(send)
    send.go_on.release(1)
    sender.ask()
    while sender.failure is None:
        time.sleep(0.01)
    send.go_on.release(1)
    sender.wait()
    assert (send.count, sender.failure) == (2, None)


def test_it_tries_again_by_itself(started):
    send = Sent(fails=1)
    sender = started(send)
    sender.ask()
    send.go_on.release(2)
    for _ in range(2):
        send.begun.acquire()
    sender.ask()
    send.go_on.release(1)
    sender.wait()
    assert sender.failure is None


def test_it_may_be_stopped_and_started_again(started):
    send = Sent()
    sender = started(send)
    sender.stop()
    sender.stop()
    sender.start()
    sender.ask()
    send.go_on.release(1)
    sender.wait()
    assert send.count == 1
