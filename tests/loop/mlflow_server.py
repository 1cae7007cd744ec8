"""MLflow's own server on loopback, with a SQLite store, and what is read of it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

os.environ.update(
    MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT="10",
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",  # Processes that the server has beside it.
)  # fmt: skip


class Server:
    """It is started, killed, and started again at the same address with the same store."""

    def __init__(self, directory):
        self.directory, self.process = directory, None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self, seconds=120):
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.directory}/store.db",
            "--artifacts-destination", str(self.directory / "artifacts"),
        ]  # fmt: skip
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            assert self.process.poll() is None, (self.directory / "server.log").read_text()
            time.sleep(0.2)
        raise TimeoutError((self.directory / "server.log").read_text())

    def kill(self):
        """Its processes are a session of their own."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    @property
    def client(self):
        from mlflow.tracking import MlflowClient

        return MlflowClient(self.uri)

    def runs(self, name):
        """The runs of a name, newest first."""
        place = self.client.get_experiment_by_name("functrain").experiment_id
        return [*self.client.search_runs([place], f"attributes.run_name = '{name}'")]

    def run(self, name):
        (run,) = self.runs(name)
        return run

    def histories(self, run):
        """`{metric: [(step, value), ...]}`, but those of the clock; NaN as text, which equals itself."""
        found = {}
        for key in run.data.metrics.keys() - {"train/steps_per_second"}:
            points = self.client.get_metric_history(run.info.run_id, key)
            points.sort(key=lambda point: point.timestamp)
            found[key] = [(point.step, str(point.value)) for point in points]
        return found
