"""MLflow runs: one for each artifact, kept up to date while it is made, never in training's way."""

from __future__ import annotations

import json
import logging
import math
import os
import posixpath
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import logonet
from logonet.core.errors import UserError
from logonet.core.redaction import SECRET_NAME, redact, without_secrets
from logonet.storage import object_store

log = logging.getLogger(__name__)


FINGERPRINT_TAG = "logonet.fingerprint"
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: its pages show a run below the one named here
NON_FINITE_TAG = "logonet.non_finite"
TEXTS = (".yaml", ".json", ".csv", ".html", ".txt")  # artifacts that are looked through for secrets
MAX_METRICS_PER_BATCH = 1000  # the REST API refuses more
RETRY_S = 2.0
# MLflow's own defaults (7 retries, 120 s each) hold the last flush of a job for minutes when the server
# is away. Telemetry is off because hospitals' clusters should not call home unasked.
MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # it copies a lock file it finds in the current folder into the model
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",  # we never ask for it; so that nothing does by accident
}


def home() -> str:
    """``LOGONET_HOME``, else ``~/.logonet``, absolute."""
    return os.path.abspath(os.path.expanduser(os.environ.get("LOGONET_HOME") or "~/.logonet"))


def tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``, else a SQLite file under :func:`home`.

    SQLite paths come back absolute: train workers run in another folder than the driver.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///" + os.path.join(home(), "mlflow.db")
    if uri.startswith("sqlite:///"):
        return "sqlite:///" + os.path.abspath(uri.removeprefix("sqlite:///"))
    return uri


def git_commit(folder: str) -> str | None:
    """The commit that ``folder`` is at, with ``-dirty`` when files differ from it; None outside git.

    ``LOGONET_GIT_COMMIT`` wins: the working folder of a Ray job is uploaded without its ``.git``.
    """
    if given := os.environ.get("LOGONET_GIT_COMMIT"):
        return given
    # --exclude keeps tags out, so that the answer is always a commit hash.
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


class Tracker:
    """The MLflow run of one training job. Every method but ``close`` returns at once.

    Args:
        fingerprint: names the job by content; a resumed job has the same one and continues its run.
        experiment: MLflow experiment, created when missing.
        run_name: the run's display name.
        params: config mapping, flattened to ``train.lr``. MLflow's params cannot change, so a resumed
            job only adds those its run lacks.
        tags: such as ``logonet.git_commit``, ``logonet.manifest``, ``logonet.clusterers`` and
            ``logonet.command`` (from `redaction.command_line`); rewritten by each resume.
        artifact_root: where a new experiment keeps artifacts when tracking is SQLite, such as
            ``s3://bucket/run/mlflow-artifacts``; None is a folder under :func:`home`. A tracking server
            decides by itself. S3 is reached through boto3 as everywhere else: ``AWS_ENDPOINT_URL_S3``
            is honoured.

    Params and tags are redacted (`redaction.redact`); the environment is never recorded.
    """

    def __init__(
        self,
        fingerprint: str,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str | None],
        artifact_root: str | None = None,
    ) -> None:
        set_defaults()  # not in the thread: setenv is not safe beside other threads' getenv
        self.uri = tracking_uri()
        self._fingerprint, self._experiment, self._run_name = fingerprint, experiment, run_name
        self._params = {
            key: "REDACTED" if SECRET_NAME.search(key) else redact(value) for key, value in _flat(params)
        }
        self._tags = clean_tags(
            {FINGERPRINT_TAG: fingerprint, "logonet.version": logonet.__version__, **tags}
        )
        self._artifact_root = artifact_root or os.path.join(home(), "mlflow-artifacts")

        self._changed = threading.Condition()  # guards what follows, up to the thread
        self._history: list[dict[str, Any]] = []
        self._seen_ms: dict[int, int] = {}
        self._files: dict[str, bytes] = {}
        self._status: str | None = None
        self._final: dict[str, float] = {}
        self._deadline_s = math.inf  # on time.monotonic(); finite once closing
        self._asked = False
        self._delivered = False
        self._ended = False
        self._client: Any = None  # this and the next two belong to the thread alone
        self._run_id: str | None = None
        self._away = False
        threading.Thread(target=self._work, name="logonet-mlflow", daemon=True).start()

    def sync(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Hand over the whole history, one entry per epoch, without waiting.

        Each entry holds ``epoch`` (counts up), ``step`` (the metrics' x-axis) and metrics: a float, a
        list of floats (one per clusterer, logged as ``name/000``, ``name/001``...) or None for not
        measured. ``unix_s``, when there, is when the epoch ended: with it a resumed run keeps its
        time axis. What is not finite is left out of the curve and named in the run's
        ``logonet.non_finite`` tag, since MLflow would plot infinity as 1.8e308.
        """
        now_ms = int(time.time() * 1000)
        copy = [dict(entry) for entry in history]
        with self._changed:
            for entry in copy:
                at_ms = int(entry["unix_s"] * 1000) if "unix_s" in entry else now_ms
                # Fixed when first seen: MLflow drops a repeated point only if its time is the same.
                self._seen_ms.setdefault(entry["epoch"], at_ms)
            self._history = copy
            self._ask()

    def log_files(self, files: Mapping[str, bytes]) -> None:
        """Add artifacts, by path inside the run's artifact folder, without waiting.

        They are kept in memory until delivered, so they are for reports and configs, not for weights.
        """
        for name in files:
            assert not posixpath.isabs(name), name
            assert ".." not in name.split("/"), name
        clean = {
            name: without_secrets(data.decode()).encode() if name.endswith(TEXTS) else data
            for name, data in files.items()
        }
        with self._changed:
            self._files.update(clean)
            self._ask()

    def run_id(self, timeout_s: float = 20.0) -> str | None:
        """The run's id, for runs that are to hang below it; None when the server does not answer in time."""
        with self._changed:
            self._ask()
            self._changed.wait_for(lambda: self._delivered, timeout_s)
            return self._run_id if self._delivered else None

    def close(
        self, status: str = "FINISHED", timeout_s: float = 60.0, metrics: Mapping[str, float] | None = None
    ) -> bool:
        """Set the run's final status (FINISHED, FAILED or KILLED) and flush, retrying for ``timeout_s``.

        Args:
            metrics: of the run as a whole.

        Returns whether everything is delivered. If not, :func:`catch_up` can do it later.
        """
        with self._changed:
            if self._ended:
                return self._delivered
            self._final = dict(metrics or {})
            self._status, self._deadline_s = status, time.monotonic() + timeout_s
            self._ask()
            self._changed.wait_for(lambda: self._ended, timeout_s)
            return self._delivered

    def _ask(self) -> None:
        assert not self._ended, "tracker used after close()"
        self._asked, self._delivered = True, False
        self._changed.notify_all()

    def _work(self) -> None:
        while not self._ended:
            with self._changed:
                self._changed.wait_for(lambda: self._asked)
                self._asked = False
                history, files, status = self._history, dict(self._files), self._status
                final = dict(self._final)
            try:
                self._deliver(history, files, status, final)
                error = None
            # Whatever goes wrong between here and a tracking server (network, SQL, S3, a deleted
            # experiment) must not reach training: it is said once and tried again.
            except Exception as err:
                error = err
                self._client = self._run_id = None
            self._say(error)
            with self._changed:
                if error is None:
                    self._delivered = not self._asked
                    self._ended = status is not None and self._delivered
                elif self._deadline_s < math.inf:
                    self._changed.wait_for(lambda: self._asked, RETRY_S)
                    self._asked = True
                    self._ended = time.monotonic() >= self._deadline_s
                self._changed.notify_all()

    def _say(self, error: Exception | None) -> None:
        """One sentence when the server goes away and one when it is back, however often we try."""
        if error is not None and not self._away:
            reason = redact(" ".join(str(error).split()) or type(error).__name__)[:300]
            log.warning(
                "MLflow at %s does not take this run's metrics (%s); training goes on and they are sent "
                "when it answers again",
                redact(self.uri),
                reason,
            )
        elif error is None and self._away:
            log.warning("MLflow at %s answers again; its run is up to date", redact(self.uri))
        self._away = error is not None

    def _deliver(
        self,
        history: list[dict[str, Any]],
        files: dict[str, bytes],
        status: str | None,
        final: dict[str, float],
    ) -> None:
        if self._client is None:
            self._client = connect(self.uri)
        if self._run_id is None:
            self._run_id = self._find_or_create()
        run = self._client.get_run(self._run_id)
        logged = run.data.metrics.get("epoch", -1)
        missing = [entry for entry in history if entry["epoch"] > logged]
        if missing and status is None and run.info.status != "RUNNING":
            self._client.update_run(self._run_id, status="RUNNING")
        self._log_epochs(missing, run.data.tags.get(NON_FINITE_TAG, ""))
        for name, data in files.items():
            self._upload(name, data)
        self._log_final({k: v for k, v in final.items() if run.data.metrics.get(k) != v}, history)
        if status is not None and (run.info.status != status or missing):
            self._client.set_terminated(self._run_id, status)

    def _find_or_create(self) -> str:
        client = self._client
        experiment_id = experiment_id_of(client, self._experiment, self._artifact_root)
        # The fingerprint is set by create_run itself: a run cut off before log_batch is found again.
        run = find_run(client, [experiment_id], FINGERPRINT_TAG, self._fingerprint) or client.create_run(
            experiment_id, tags={FINGERPRINT_TAG: self._fingerprint}, run_name=self._run_name
        )
        from mlflow.entities import Param, RunTag

        params = [Param(k, v) for k, v in self._params.items() if k not in run.data.params]
        run_tags = [RunTag(k, v) for k, v in self._tags.items() if run.data.tags.get(k) != v]
        client.log_batch(run.info.run_id, params=params, tags=run_tags)
        return run.info.run_id

    def _log_epochs(self, entries: list[dict[str, Any]], noted: str) -> None:
        from mlflow.entities import Metric

        epochs, dropped = [], []
        for entry in entries:
            at_ms, step = self._seen_ms[entry["epoch"]], int(entry["step"])
            metrics = []
            for name, value in _metrics(entry):
                if math.isfinite(value):
                    metrics.append(Metric(name, value, at_ms, step))
                else:
                    dropped.append(f"{name}@{entry['epoch']}")
            # Last of its epoch, so that an epoch cut in two by a failure counts as missing.
            epochs.append([*metrics, Metric("epoch", float(entry["epoch"]), at_ms, step)])
        if dropped:
            names = dict.fromkeys([*(noted.split(", ") if noted else []), *dropped])
            self._client.set_tag(self._run_id, NON_FINITE_TAG, ", ".join(names)[:5000])
        for batch in _batches(epochs):
            self._client.log_batch(self._run_id, metrics=batch)

    def _log_final(self, values: dict[str, float], history: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        step, now_ms = (int(history[-1]["step"]) if history else 0), int(time.time() * 1000)
        metrics = [Metric(k, v, now_ms, step) for k, v in values.items() if math.isfinite(v)]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)

    def _upload(self, name: str, data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)
            place = self._client.get_run(self._run_id).info.artifact_uri
            if not upload_folder(folder, place):
                self._client.log_artifacts(self._run_id, folder)
        with self._changed:
            if self._files.get(name) is data:  # it may have been replaced meanwhile
                del self._files[name]


def catch_up(
    fingerprint: str,
    experiment: str,
    run_name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str | None],
    artifact_root: str | None,
    history: Sequence[Mapping[str, Any]],
    files: Mapping[str, bytes],
    status: str = "FINISHED",
    timeout_s: float = 60.0,
    metrics: Mapping[str, float] | None = None,
) -> bool:
    """Make the job's run complete, from the driver, after training: see :class:`Tracker` and its methods.

    Needed when the server was away to the end, when rank 0 was lost before its last flush, and when
    tracking is SQLite, whose file rank 0 wrote on a worker that is gone. Returns whether everything is
    delivered; a run that already is complete stays as it is.
    """
    tracker = Tracker(fingerprint, experiment, run_name, params, tags, artifact_root)
    tracker.sync(history)
    tracker.log_files(files)
    return tracker.close(status, timeout_s, metrics)


def check() -> str:
    """Ask the tracking server for anything at all; returns its address without credentials.

    Raises:
        UserError: it does not answer.
    """
    set_defaults()
    from mlflow.exceptions import MlflowException

    uri = tracking_uri()
    try:
        connect(uri).search_experiments(max_results=1)
    except MlflowException as err:
        raise UserError(
            f"MLflow at {redact(uri)} does not answer ({redact(str(err).splitlines()[0])}); "
            "start it, or set MLFLOW_TRACKING_URI"
        ) from None
    return redact(uri)


def set_defaults() -> None:
    for key, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(key, value)


def connect(uri: str) -> Any:
    """An MlflowClient of ``uri``, whose SQLite folder is made when missing."""
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///"):
        os.makedirs(os.path.dirname(uri.removeprefix("sqlite:///")), exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def experiment_id_of(client: Any, name: str, artifact_root: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    location = _location(artifact_root) if client.tracking_uri.startswith("sqlite:") else None
    # MLflow's pages open on its language-model views unless an experiment says that it trains models.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return client.create_experiment(name, artifact_location=location, tags=tags)


def find_run(client: Any, experiment_ids: list[str], tag: str, value: str) -> Any:
    """The oldest run with this tag, or None."""
    wanted = f"tags.`{tag}` = '{value}'"
    oldest_first = ["attributes.start_time ASC"]
    runs = client.search_runs(experiment_ids, wanted, max_results=1, order_by=oldest_first)
    return runs[0] if runs else None


def clean_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    return {key: redact(str(value)) for key, value in tags.items() if value is not None}


def _location(root: str) -> str:
    return root if "://" in root else os.path.abspath(os.path.expanduser(root))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """``{"train": {"lr": 1.0}}`` as ``("train.lr", "1.0")``; lists and None as JSON."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _metrics(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The (name, value) pairs of one history entry, lists spread out."""
    for name, value in entry.items():
        if name in ("epoch", "step", "unix_s") or value is None:
            continue
        if isinstance(value, Sequence):
            yield from ((f"{name}/{i:03d}", float(item)) for i, item in enumerate(value))
        else:
            yield name, float(value)


def _batches(epochs: Iterable[list[Any]]) -> Iterator[list[Any]]:
    """Whole epochs packed into batches; only an epoch larger than a batch is cut."""
    batch: list[Any] = []
    for metrics in epochs:
        if batch and len(batch) + len(metrics) > MAX_METRICS_PER_BATCH:
            yield batch
            batch = []
        batch = batch + metrics
        while len(batch) > MAX_METRICS_PER_BATCH:
            yield batch[:MAX_METRICS_PER_BATCH]
            batch = batch[MAX_METRICS_PER_BATCH:]
    if batch:
        yield batch


def upload_folder(folder: str, location: str) -> bool:
    """Put a folder's files where MLflow keeps them, if that is a bucket: `store` survives what its client does not."""
    if not object_store.is_s3(location):
        return False
    for at, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(at, name)
            object_store.write_file(
                path, object_store.join(location, os.path.relpath(path, folder).replace(os.sep, "/"))
            )
    return True
