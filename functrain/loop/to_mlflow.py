"""The numbers, configuration and files of a run, in MLflow."""

import collections
import json
import posixpath
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote

from functrain.errors import LogError
from functrain.loop.names import named_values
from functrain.loop.tracker import Row, Tracker

_TAG = "functrain.run"  # By which a run is found again.
_POINTS, _PARAMS = 1000, 100  # That MLflow takes at once.
_KEY, _VALUE = 250, 6000  # Characters that it takes.


class MLflow(Tracker):
    """Writes to a run of MLflow: each row once, however often the run was killed.

    >>> log = MLflow("digits", experiment="first", uri="http://127.0.0.1:5000")  # doctest: +SKIP
    >>> result = ft.fit(update, state, data, epochs=10, loggers=[log], checkpoints="runs/digits")  # doctest: +SKIP

    MLflow deletes no metric, so with checkpoints a row is sent when one is whole that has it; without, within seconds.
    A run that goes on goes on in the run of MLflow with its name, wherever it is started; one that begins anew, or
    goes on from before what was sent, is a new one there. Rows are sent by a thread, and a server that is away is
    waited for. Names are those of `log.jsonl`, with "_" for each character that MLflow does not take. It shows
    infinity as the largest number.

    Args:
      name: of the run, by which it is found again: no other in the experiment has it.
      experiment: its experiment; it is made.
      uri: of the server, or of a database, by default as `mlflow.get_tracking_uri()` has it.
      every: the seconds for which rows are gathered.
      patience: the seconds that `close` waits for a server that is away.

    Raises:
      LogError: mlflow is not installed, or does not know such an address.
    """

    def __init__(
        self,
        name: str,
        *,
        experiment: str = "functrain",
        uri: str | None = None,
        every: float = 5.0,
        patience: float = 60.0,
    ) -> None:
        super().__init__(every=every, patience=patience)
        self._name, self._experiment = name, experiment
        try:
            import_module("mlflow")
            self._entities = import_module("mlflow.entities")
            client_of = import_module("mlflow.tracking").MlflowClient
        except ImportError as error:
            raise LogError(f"{self!r}: {error}; write pip install 'functrain[mlflow]'") from error
        try:
            self._client = client_of(tracking_uri=uri)
        except Exception as error:
            raise LogError(f"{self!r}: {error}; write an address of a server, uri='http://127.0.0.1:5000'") from error
        self._keys: dict[str, str] = {}
        self._run = ""
        self._there: collections.Counter[tuple[str, int]] = collections.Counter()
        self._is_in_doubt = False

    def __repr__(self) -> str:
        return f"MLflow({self._name!r}, experiment={self._experiment!r})"

    def _open(self, step: int) -> None:
        experiment = self._client.get_experiment_by_name(self._experiment)
        place = experiment.experiment_id if experiment else self._client.create_experiment(self._experiment)
        self._there.clear()
        for run in self._client.search_runs([place], f"tags.`{_TAG}` = '{quote(self._name, safe='')}'"):
            points = self._points(run.info.run_id, run.data.metrics)
            if all(each <= step for _, each, _ in points):
                self._run = run.info.run_id
                self._there.update((key, each) for key, each, _ in points)
                self._client.update_run(self._run, status="RUNNING")
                return
            self._client.set_tag(run.info.run_id, _TAG, f"{quote(self._name, safe='')} before step {step}")
        tags = {_TAG: quote(self._name, safe="")}
        self._run = self._client.create_run(place, run_name=self._name, tags=tags).info.run_id

    def _points(self, run: str, keys: Mapping[str, Any]) -> list[tuple[str, int, int]]:
        """What it has of some metrics: name, step and milliseconds of each number."""
        return [
            (key, point.step, point.timestamp) for key in keys for point in self._client.get_metric_history(run, key)
        ]

    def _send(self, rows: Sequence[Row]) -> None:
        taken: collections.Counter[tuple[str, int]] = collections.Counter()
        new = []
        for row in rows:
            for name, value in row.numbers.items():
                place = (self._key(name), row.step)
                if self._there[place] > taken[place]:
                    taken[place] += 1
                else:
                    new.append(self._entities.Metric(place[0], value, row.milliseconds, row.step))
        if self._is_in_doubt:  # A request that failed may have been served.
            sent = {*self._points(self._run, {point.key: None for point in new})}
            new = [point for point in new if (point.key, point.step, point.timestamp) not in sent]
        self._is_in_doubt = True
        for start in range(0, len(new), _POINTS):
            self._client.log_batch(self._run, metrics=new[start : start + _POINTS], synchronous=True)
        self._is_in_doubt = False
        self._there.subtract(taken)

    def _config(self, config: Mapping[str, Any]) -> None:
        """As params; MLflow changes none, so one that has another value later has it in a tag, "changed/NAME"."""
        given = dict(pair for name, value in named_values(config) for pair in _cut(self._key(name), value))
        data = self._client.get_run(self._run).data
        tags = {
            f"changed/{key}"[:_KEY]: value
            for key, value in given.items()
            if value != data.params.get(key, value) or f"changed/{key}"[:_KEY] in data.tags
        }
        params = [self._entities.Param(key, value) for key, value in given.items() if key not in data.params]
        for start in range(0, len(params), _PARAMS):
            self._client.log_batch(self._run, params=params[start : start + _PARAMS], synchronous=True)
        for key, value in tags.items():
            self._client.set_tag(self._run, key, value)

    def _send_file(self, path: Path) -> None:
        self._client.log_artifact(self._run, str(path))

    def _send_results(self, step: int, numbers: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        for name, value in numbers.items():
            there = self._client.get_metric_history(self._run, self._key(name))
            if all((point.step, str(point.value)) != (step, str(float(value))) for point in there):
                self._client.log_metric(self._run, self._key(name), value, now, step)

    def _end(self, status: str) -> None:
        self._client.set_terminated(self._run, status)

    def _key(self, name: str) -> str:
        """What MLflow calls it: without what it refuses, and like no other."""
        if name not in self._keys:
            key = re.sub(r"[^\w/. -]", "_", name)[: _KEY - 20].strip("/ ").replace("..", "_")
            key = "_" if key in ("", ".") else posixpath.normpath(key)
            is_taken = key in self._keys.values()
            self._keys[name] = f"{key}_{zlib.crc32(name.encode()):08x}" if is_taken else key
        return self._keys[name]


def _cut(key: str, value: Any) -> list[tuple[str, str]]:
    """A param, or several of one that is too long."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    parts = [text[start : start + _VALUE] for start in range(0, len(text), _VALUE)] or [""]
    return [(key if i == 1 else f"{key}.{i}", part) for i, part in enumerate(parts, start=1)]
