import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import warm

from functrain.loop.signals import StopSignals

BOTH = (signal.SIGINT, signal.SIGTERM)

# Runs until it is told to stop, in steps of 16, which the sync point of JAX alone would miss. One process asks twice.
RUN = """
import sys, time
import jax
from functrain.loop.signals import StopSignals

jax.config.update("jax_platforms", "cpu")
questions = 1
if len(sys.argv) > 1:
    port, process = sys.argv[1:]
    questions += int(process)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
with StopSignals() as signals:
    step = 0
    while not any(signals.should_stop(step) for _ in range(questions)):
        step += 16
        print("step", flush=True)
        time.sleep(0.02)
print("stopped at", step, "by", signals.received.name)
sys.exit(signals.exit_code)
"""

WITHOUT_THE_SERVICE = """
import sys
import jax
from functrain.loop.signals import StopSignals

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_preemption_service", False)
port, process = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
with StopSignals() as signals:
    print([signals.should_stop(step) for step in range(3)], signals.received, signals.exit_code)
"""

# A handler that C installed: getpid will do. A module made anew looks at what is installed, as an embedding program's
# interpreter does when it starts.
FOREIGN_HANDLER = """
import ctypes, os, signal, sys
from functrain.loop.signals import StopSignals

libc = ctypes.CDLL(None)
libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.signal(signal.SIGTERM, ctypes.cast(libc.getpid, ctypes.c_void_p))
del sys.modules["_signal"]
import _signal
assert signal.getsignal(signal.SIGTERM) is None
for _ in range(2):
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    print(signals.received, signal.getsignal(signal.SIGTERM))
"""


@pytest.fixture(autouse=True)
def handlers():
    """Whatever a test installs is gone after it."""
    before = {number: signal.getsignal(number) for number in BOTH}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finished(*processes):
    """The last line that each printed, and what it exited with."""
    try:
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        ((out.splitlines() or [err])[-1], process.returncode)
        for (out, err), process in zip(outputs, processes, strict=True)
    ]


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_is_only_recorded(number, exit_code):
    with StopSignals() as signals:
        assert not signals.should_stop(1)
        assert (signals.received, signals.exit_code) == (None, None)
        send(number)
        assert signals.should_stop(2)
        assert signals.should_stop(3)
    assert (signals.received, signals.exit_code) == (number, exit_code)


@pytest.mark.parametrize("first", BOTH)
@pytest.mark.parametrize("second", BOTH)
def test_a_second_signal_stops_at_once_with_the_former_handlers_in_place(first, second):
    former = {number: signal.getsignal(number) for number in BOTH}
    error = KeyboardInterrupt if second == signal.SIGINT else SystemExit
    signals, within = StopSignals(), {}

    def loop():
        with signals:
            send(first)
            try:
                send(second)
            finally:
                within.update({number: signal.getsignal(number) for number in BOTH})

    with pytest.raises(error) as raised:
        loop()
    assert within == former
    assert signals.received == second
    if second == signal.SIGTERM:
        assert raised.value.code == 143


@pytest.mark.parametrize("former", [signal.SIG_DFL, signal.SIG_IGN, lambda number, frame: None])
def test_handlers_are_put_back(former):
    for number in BOTH:
        signal.signal(number, former)
    with StopSignals():
        assert all(signal.getsignal(number) != former for number in BOTH)
    assert [signal.getsignal(number) for number in BOTH] == [former, former]


def test_handlers_are_put_back_when_an_error_leaves():
    former = [signal.getsignal(number) for number in BOTH]
    with pytest.raises(ZeroDivisionError), StopSignals():
        1 / 0  # noqa: B018
    assert [signal.getsignal(number) for number in BOTH] == former


def test_a_former_handler_gets_the_signals_that_come_after():
    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    with StopSignals():
        send(signal.SIGTERM)
    assert not seen
    send(signal.SIGTERM)
    assert seen == [signal.SIGTERM]


def test_it_can_be_entered_again():
    signals = StopSignals()
    with signals:
        send(signal.SIGINT)
    with signals:
        assert not signals.should_stop(1)
        send(signal.SIGTERM)
        assert signals.should_stop(2)
    assert signals.received == signal.SIGTERM


# What is waited for


@pytest.mark.parametrize("number", BOTH)
def test_a_first_signal_ends_a_wait(number):
    with StopSignals() as signals:
        assert signals.awaited(lambda: send(number) or time.sleep(1000)) is None
        assert signals.should_stop(1)
    assert signals.received == number


def test_what_waits_cannot_take_the_signal_for_an_error_of_its_own():
    def stubborn():
        while True:
            try:
                send(signal.SIGTERM)
                time.sleep(1000)
            except Exception:
                pass

    with StopSignals() as signals:
        assert signals.awaited(stubborn) is None


def test_nothing_is_waited_for_after_a_signal():
    with StopSignals() as signals:
        send(signal.SIGTERM)
        assert signals.awaited(time.sleep, 1000) is None


def test_a_wait_gives_what_it_found_and_a_signal_after_it_is_only_recorded():
    batches = iter([1])
    with StopSignals() as signals:
        assert signals.awaited(next, batches) == 1
        with pytest.raises(StopIteration):
            signals.awaited(next, batches)
        send(signal.SIGTERM)
    assert signals.received == signal.SIGTERM


def test_a_second_signal_stops_a_wait_that_takes_its_time_to_end():
    def slow():
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)

    with pytest.raises(SystemExit), StopSignals() as signals:
        signals.awaited(slow)


def test_a_signal_at_any_instant_of_a_wait_ends_it_or_comes_after_it():
    """Sent by another thread, at every place of the interpreter's, many times over."""
    for attempt in range(200):
        given = itertools.count()
        with StopSignals() as signals:
            timer = threading.Timer(0.0005 * (attempt % 7), send, [signal.SIGTERM])
            timer.start()
            seen = []
            while not signals.should_stop(0):
                seen.append(signals.awaited(next, given))
            timer.join()
        ended = seen.index(None) if None in seen else len(seen)
        assert seen == [*range(ended), *[None] * (len(seen) - ended)]
        assert len(seen) - ended <= 1


def test_outside_the_main_thread_nothing_is_installed():
    former = [signal.getsignal(number) for number in BOTH]
    seen = []

    def loop():
        with StopSignals() as signals:
            seen.append([signal.getsignal(number) for number in BOTH])
            seen.append(signals.should_stop(1))

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert seen == [former, False]


def test_a_handler_from_c_is_left_alone():
    command = [sys.executable, "-c", FOREIGN_HANDLER]
    cold = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert finished(cold) == [("None None", 0)]


def test_a_process_exits_with_the_code_of_its_signal():
    process = warm.Process(RUN)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    [(line, code)] = finished(process)
    assert line.endswith("by SIGTERM")
    assert code == 143


@pytest.mark.slow
def test_all_processes_stop_at_one_step():
    port = free_port()
    processes = [warm.Process(RUN, port, process) for process in range(2)]
    for process in processes:
        process.stdout.readline()
    processes[1].send_signal(signal.SIGTERM)
    (line, code), (other_line, other_code) = finished(*processes)
    assert line.startswith("stopped at ")
    assert line.endswith(" by SIGTERM")
    assert line == other_line
    assert code == other_code == 143


@pytest.mark.slow
def test_without_jaxs_preemption_service_several_processes_are_not_stopped():
    port = free_port()
    ended = finished(*(warm.Process(WITHOUT_THE_SERVICE, port, process) for process in range(2)))
    assert ended == [("[False, False, False] None None", 0)] * 2
