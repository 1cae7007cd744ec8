import json
import math
import re
import signal
import struct
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warm
from tensorboardX.proto.event_pb2 import Event, SessionLog

from functrain.errors import LogError
from functrain.loop.logs import JsonLines, TensorBoard, flattened, read_json_lines

LOG_UNTIL_KILLED = """
import itertools, sys
from functrain.loop.logs import JsonLines

log = JsonLines(sys.argv[1])
for step in itertools.count(1):
    log.log(step, {"train/loss": 1 / step})
    print(step, flush=True)
"""

# A write past this size fails, as on a full disk.
RESUME_ON_A_FULL_DISK = """
import resource, sys
from functrain.loop.logs import JsonLines

resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
JsonLines(sys.argv[1]).resume(40)
"""

BROKEN = [
    b'{"step": 1, "tr', b"[1, 2]", b'{"loss": 1}', b"\xff\x00", b"", b'{"step": true}', b'{"step": "1"}',
    b'{"step": 1.0, "loss": 2}', b'{"step": 1, "loss": "NaO"}', b'{"step": 1, "loss": [2]}', b"[" * 100_000,
]  # fmt: skip

# The same: of the row that crosses it, a part is written.
LOG_ON_A_FULL_DISK = """
import resource, sys
from functrain.loop.logs import JsonLines

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
log, failed = JsonLines(sys.argv[1]), []
for step in range(100):
    try:
        log.log(step, {"train/loss": 0.5})
    except OSError as error:
        failed.append((step, open(sys.argv[1], "rb").read()))
        if len(failed) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
first, whole = failed[0]
assert [content for _, content in failed] == [whole] * 3
assert whole.count(b"\\n") == first and whole.endswith(b"}\\n")
print(first)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "digits" / "log.jsonl"


def logged(path, steps):
    log = JsonLines(path)
    for step in steps:
        log.log(step, {"train/loss": 1 / (step + 1)})
    log.close()
    return path


def resumed(path, step):
    log = JsonLines(path)
    log.resume(step)
    log.close()


def steps(path):
    return [row["step"] for row in read_json_lines(path)]


def events(directory):
    """All events of a run in the order in which TensorBoard reads them."""
    found = []
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(directory):
    return [(event.step, value.tag, value.simple_value) for event in events(directory) for value in event.summary.value]


class TestJsonLines:
    def test_a_row_is_a_line_in_the_file_at_once(self, path):
        log = JsonLines(path)
        before = time.time()
        log.log(12, {"train/loss": 0.5, "epoch": 3})
        row = json.loads(path.read_text())
        assert before <= row.pop("time") <= time.time()
        assert row == {"step": 12, "train/loss": 0.5, "epoch": 3}

    def test_what_is_on_a_device_is_fetched(self, path):
        log = JsonLines(path)
        log.log(jnp.int32(12), {"train": {"loss": jnp.bfloat16(0.5), "rate": np.float32(0.25)}})
        assert read_json_lines(path)[0].items() >= {"step": 12, "train/loss": 0.5, "train/rate": 0.25}.items()

    def test_non_finite_numbers_are_strict_json_and_come_back(self, path):
        JsonLines(path).log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
        strict = json.loads(path.read_text(), parse_constant=pytest.fail)
        assert [strict[name] for name in "abc"] == ["NaN", "Infinity", "-Infinity"]
        (row,) = read_json_lines(path)
        assert math.isnan(row["a"])
        assert (row["b"], row["c"]) == (math.inf, -math.inf)

    @pytest.mark.parametrize(
        ("step", "kept"), [(9, [0, 1, 2, 3]), (3, [0, 1, 2, 3]), (2, [0, 1, 2]), (0, [0]), (-1, [])]
    )
    def test_resume_drops_the_rows_past_a_step(self, path, step, kept):
        logged(path, range(4))
        log = JsonLines(path)
        log.resume(step)
        assert steps(path) == kept
        log.log(step + 1, {})
        assert steps(path) == [*kept, step + 1]
        assert list(path.parent.iterdir()) == [path]

    def test_a_running_log_can_resume(self, path):
        log = JsonLines(path)
        for step in range(4):
            log.log(step, {})
        log.resume(1)
        log.log(2, {})
        assert steps(path) == [0, 1, 2]

    def test_resume_leaves_a_file_alone_that_has_nothing_to_drop(self, path):
        before = logged(path, range(4)).stat()
        resumed(path, 3)
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_resume_without_a_file(self, path):
        log = JsonLines(path)
        log.resume(7)
        log.log(8, {})
        assert steps(path) == [8]

    def test_a_line_torn_at_any_byte_is_dropped(self, path):
        whole = logged(path, range(3)).read_bytes()
        last = whole.rstrip(b"\n").rindex(b"\n") + 1
        for cut in range(last, len(whole) - 1):
            path.write_bytes(whole[:cut])
            assert steps(path) == [0, 1]
            resumed(path, 5)
            assert path.read_bytes() == whole[:last]

    def test_a_line_that_lacks_only_its_newline_is_kept(self, path):
        whole = logged(path, range(3)).read_bytes()
        path.write_bytes(whole[:-1])
        assert steps(path) == [0, 1, 2]
        resumed(path, 5)
        assert path.read_bytes() == whole

    def test_a_row_never_joins_a_torn_line(self, path):
        whole = logged(path, range(3)).read_bytes()
        path.write_bytes(whole[:-5])
        logged(path, [9])
        assert steps(path) == [0, 1, 9]

    @pytest.mark.parametrize("broken", BROKEN)
    def test_a_damaged_line_is_set_aside_with_a_warning_and_the_others_are_kept(self, path, broken):
        lines = logged(path, range(3)).read_bytes().splitlines()
        path.write_bytes(b"\n".join([lines[0], broken, *lines[1:], b""]))
        told = f"{path}: 1 damaged line is left out, the first is line 2, "
        with pytest.warns(UserWarning, match=f"^{re.escape(told)}.*'$"):
            assert steps(path) == [0, 1, 2]
        with pytest.warns(UserWarning, match=f"^{re.escape(told)}.*; they are kept in 'log.jsonl.damaged'$"):
            resumed(path, 1)
        assert path.read_bytes().splitlines() == lines[:2]
        assert (path.parent / "log.jsonl.damaged").read_bytes() == broken + b"\n"
        with warnings.catch_warnings(action="error"):
            resumed(path, 1)
            assert steps(path) == [0, 1]

    def test_every_flipped_bit_loses_at_most_its_line_and_is_set_aside(self, path):
        whole = logged(path, range(3)).read_bytes()
        lines = whole.splitlines(keepends=True)
        aside = path.parent / "log.jsonl.damaged"
        for place in range(8 * len(lines[0]), 8 * len(lines[0] + lines[1][:-1]), 3):
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            aside.unlink(missing_ok=True)
            with warnings.catch_warnings(action="ignore"):
                resumed(path, 10**9)
            left = path.read_bytes().splitlines(keepends=True)
            assert left[0] == lines[0]
            assert left[-1].endswith(lines[2])
            if len(left) == 2 and left[-1] == lines[2]:
                assert aside.read_bytes() == bytes(flipped)[len(lines[0]) : -len(lines[2])]

    def test_a_row_goes_on_behind_a_last_line_that_is_damaged(self, path):
        """As a disk leaves the end of a file whose size it had written, and not its content."""
        whole = logged(path, range(3)).read_bytes()
        path.write_bytes(whole + bytes(100))
        with pytest.warns(UserWarning, match="1 damaged line is left out, the first is line 4"):
            logged(path, [9])
        assert steps(path) == [0, 1, 2, 9]

    @pytest.mark.parametrize("written", [b"what someone else wrote\n", b"no newline", b"\x00" * 40, b"[1]\n[2]\n"])
    def test_a_file_that_is_no_log_is_an_error_and_left_as_it_is(self, path, written):
        path.parent.mkdir(parents=True)
        path.write_bytes(written)
        for attempt in (
            read_json_lines,
            lambda path: JsonLines(path).resume(0),
            lambda path: JsonLines(path).log(0, {}),
        ):
            with pytest.raises(LogError, match=r"is no log: line 1 is no row, '.*'; delete it, or give the") as error:
                attempt(path)
            assert str(error.value).startswith(str(path))
        assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == {"log.jsonl": written}

    def test_a_failed_resume_leaves_the_file_as_it_was(self, path):
        whole = logged(path, range(50)).read_bytes()
        ended = subprocess.run(
            [sys.executable, "-c", RESUME_ON_A_FULL_DISK, path], capture_output=True, text=True, check=False
        )
        assert "File too large" in ended.stderr
        assert path.read_bytes() == whole

    def test_of_a_row_that_fails_nothing_is_left_and_the_next_one_is_whole(self, path):
        process = warm.Process(LOG_ON_A_FULL_DISK, path)
        printed, errors = process.communicate()
        assert process.returncode == 0, errors
        first = int(printed)
        assert steps(path) == [*range(first), *range(first + 3, 100)]

    def test_a_killed_process_leaves_every_row_that_it_logged(self, path):
        command = [sys.executable, "-c", LOG_UNTIL_KILLED, path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(100):
                last = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
        found = steps(path)
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= last

    @pytest.mark.parametrize("name", ["step", "time"])
    def test_names_of_its_own_are_an_error(self, path, name):
        with pytest.raises(LogError, match=f"'{name}' is written with every row; name the number 'train/{name}'"):
            JsonLines(path).log(1, {name: 1.0})


class TestTensorBoard:
    def test_it_writes_scalars(self, tmp_path):
        board = TensorBoard(tmp_path / "run")
        board.log(1, {"train/loss": 0.5, "valid": {"accuracy": jnp.float32(0.75)}})
        board.log(2, {"train/loss": math.inf})
        board.close()
        expected = [(1, "train/loss", 0.5), (1, "valid/accuracy", 0.75), (2, "train/loss", math.inf)]
        assert scalars(tmp_path / "run") == expected

    def test_nothing_is_written_before_the_first_row(self, tmp_path):
        TensorBoard(tmp_path / "run").close()
        assert not (tmp_path / "run").exists()

    def test_resume_hides_what_came_after(self, tmp_path):
        """Also when it follows within a second, which is all that a file's name tells of its time."""
        for resumed, logged in ((0, [1, 2, 3]), (2, [3, 4]), (3, [4])):
            board = TensorBoard(tmp_path)
            board.resume(resumed)
            for step in logged:
                board.log(step, {"loss": 10 * resumed + step})
            board.close()
        assert scalars(tmp_path) == [
            (step, "loss", loss) for step, loss in [(1, 1), (2, 2), (3, 3), (3, 23), (4, 24), (4, 34)]
        ]
        starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
        assert starts == [1, 3, 4]

    def test_without_tensorboardx_it_says_what_to_install(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
        with pytest.raises(LogError, match=r"TensorBoard\('.*'\): .*tensorboardX.*; write pip install tensorboardX$"):
            TensorBoard(tmp_path)


@pytest.mark.parametrize("make", [JsonLines, TensorBoard])
def test_a_closed_logger_says_so(make, tmp_path):
    logger = make(tmp_path / "run")
    logger.log(1, {"loss": 1.0})
    logger.close()
    logger.close()
    for attempt in (lambda: logger.log(2, {}), lambda: logger.resume(1)):
        with pytest.raises(LogError, match=rf"{make.__name__}\('.*run'\) is closed; make a new logger, or call close"):
            attempt()


class TestFlattened:
    def test_numbers_of_any_origin(self):
        metrics = {"a": 1, "b": {"c": np.float16(0.5), "d": {"e": jnp.bfloat16(2.0)}}, "f": jnp.array(True), "g": 0.1}
        flat = flattened(metrics)
        assert flat == {"a": 1, "b/c": 0.5, "b/d/e": 2.0, "f": 1, "g": 0.1}
        assert list(flat) == ["a", "b/c", "b/d/e", "f", "g"]
        assert [type(value) for value in flat.values()] == [int, float, float, int, float]

    def test_vectors_up_to_16(self):
        assert flattened({"a": jnp.arange(16)}) == {f"a/{i}": i for i in range(16)}
        assert flattened({"a": [jnp.float32(1.0), 2.0]}) == {"a/0": 1.0, "a/1": 2.0}

    @pytest.mark.parametrize("shape", [(17,), (0,), (2, 2), (1, 1)])
    def test_a_larger_array_is_an_error(self, shape):
        with pytest.raises(LogError) as error:
            flattened({"train": {"grads": jnp.ones(shape)}})
        assert str(error.value) == (
            f"metric 'train/grads' has shape {shape}, and a log takes at most 16 elements of a vector; reduce it to a"
            " scalar, such as its mean"
        )

    @pytest.mark.parametrize("value", [None, "0.5", 1j, jax.random.key(0), object()])
    def test_what_is_no_number_is_an_error(self, value):
        with pytest.raises(
            LogError, match=r"metric 'a/b' is (.|\n)*, which is no real number; write a float, or leave"
        ):
            flattened({"a": {"b": value}})

    def test_two_metrics_of_one_name_are_an_error(self):
        with pytest.raises(LogError, match=r"two metrics have the name 'a/b': .* reads like two keys; rename one"):
            flattened({"a": {"b": 1}, "a/b": 2})
