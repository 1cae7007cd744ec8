import json
import math
import signal
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "digits" / "log.jsonl"


def logged(path, steps):
    log = JsonLines(path)
    for step in steps:
        log.log(step, {"train/loss": 1 / (step + 1)})
    log.close()
    return path


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

    @pytest.mark.parametrize(("step", "kept"), [(9, [0, 1, 2, 3]), (3, [0, 1, 2, 3]), (2, [0, 1, 2]), (0, [0])])
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
        JsonLines(path).resume(3)
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
            JsonLines(path).resume(5)
            assert path.read_bytes() == whole[:last]

    def test_a_line_that_lacks_only_its_newline_is_kept(self, path):
        whole = logged(path, range(3)).read_bytes()
        path.write_bytes(whole[:-1])
        assert steps(path) == [0, 1, 2]
        JsonLines(path).resume(5)
        assert path.read_bytes() == whole

    def test_a_row_never_joins_a_torn_line(self, path):
        whole = logged(path, range(3)).read_bytes()
        path.write_bytes(whole[:-5])
        JsonLines(path).log(9, {})
        assert steps(path) == [0, 1, 9]

    @pytest.mark.parametrize("broken", [b'{"step": 1, "tr', b"[1, 2]", b'{"loss": 1}', b"\xff\x00", b""])
    def test_a_broken_line_within_the_file_is_an_error(self, path, broken):
        lines = logged(path, range(3)).read_bytes().splitlines()
        written = b"\n".join([lines[0], broken, *lines[1:], b""])
        path.write_bytes(written)
        for attempt in (read_json_lines, lambda path: JsonLines(path).resume(0)):
            with pytest.raises(LogError, match=r"line 2 is no row of a log: .*; delete the line, or give") as error:
                attempt(path)
            assert str(error.value).startswith(str(path))
            assert path.read_bytes() == written

    def test_a_whole_line_that_is_no_row_is_not_taken_for_a_torn_one(self, path):
        logged(path, range(1))
        path.write_bytes(path.read_bytes() + b"what someone else wrote\n")
        with pytest.raises(LogError, match=r"line 2 is no row of a log: 'what someone else wrote'"):
            JsonLines(path).resume(0)

    def test_a_failed_resume_leaves_the_file_as_it_was(self, path):
        whole = logged(path, range(50)).read_bytes()
        ended = subprocess.run(
            [sys.executable, "-c", RESUME_ON_A_FULL_DISK, path], capture_output=True, text=True, check=False
        )
        assert "File too large" in ended.stderr
        assert path.read_bytes() == whole

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
