"""Several processes of one run, and one address."""

import json
import socket
from pathlib import Path

import jax
import pytest
import warm
from s3 import environment
from states import over
from trees import bits

import functrain as ft

TOGETHER = """
import json, os, sys
import jax

port, process, tests, variables, address, staging = sys.argv[1:]
os.environ.update(json.loads(variables))
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
sys.path.insert(0, tests)
import functrain as ft
from states import digests, over

update, params, given = over(jax.devices())
state, _ = update(update.init(params, **given), 1.0)
checkpoints = ft.Checkpoints(address, staging=staging.replace("PROCESS", process))
try:
    checkpoints.save(state)
except ft.CheckpointError as error:
    print(json.dumps(str(error)))
    sys.exit()
checkpoints.wait()
trained, _ = update(state, 1.0)
restored = checkpoints.restore(like=update.abstract(params, **given)).state
checkpoints.close()
again, _ = update(restored, 1.0)
print(json.dumps([digests(trained), digests(again)]))
"""


@pytest.fixture
def together(s3, server, tmp_path):
    """What each of two processes prints."""

    def printed(staging):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        given = (Path(__file__).parent, json.dumps(environment(server.url)), s3, tmp_path / staging)
        started = [warm.Process(TOGETHER, port, process, *given) for process in range(2)]
        ended = [process.communicate(timeout=120) for process in started]
        assert [process.returncode for process in started] == [0, 0], ended
        return [json.loads(output.splitlines()[-1]) for output, _ in ended]

    return printed


@pytest.mark.slow
def test_two_processes_with_one_folder_send_and_read_one_checkpoint(together, s3, tmp_path):
    for trained, again in together("shared"):
        assert trained == again
    update, params, given = over(jax.devices()[:4])
    state, _ = update(update.init(params, **given), 1.0)
    restored = ft.Checkpoints(s3, staging=tmp_path / "fresh").restore(like=update.abstract(params, **given)).state
    assert bits(restored) == bits(state)


@pytest.mark.slow
def test_processes_that_see_different_folders_are_told(together):
    for told in together("of-PROCESS"):
        assert "the processes [1] see another folder" in told
        assert "give one that all of them see, Checkpoints(..., staging=)" in told
