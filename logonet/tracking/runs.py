"""MLflow runs: one for each artifact, updated during training, without ever blocking it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import logonet
from logonet.core import config
from logonet.core.errors import UserError
from logonet.core.redaction import SECRET_NAME, redact, without_secrets
from logonet.storage import object_store

log = logging.getLogger(__name__)


FINGERPRINT_TAG = "logonet.fingerprint"
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: its pages show a run below the one named here
NON_FINITE_TAG = "logonet.non_finite"
TEXTS = (".yaml", ".json", ".csv", ".html", ".txt")  # artifacts that are searched for secrets
MAX_METRICS_PER_BATCH = 1000  # the REST API refuses more
RETRY_S = 2.0
# MLflow's own defaults (7 retries, 120 s each) delay the last delivery of a job for minutes when the server
# is away. Telemetry is off because hospitals' clusters should not call home unasked.
MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # it would copy a lock file from the current folder into the model
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # who has a folder of runs is to keep it
}


def home() -> str:
    """``LOGONET_HOME``, else ``~/.logonet``, absolute."""
    return os.path.abspath(os.path.expanduser(os.environ.get("LOGONET_HOME") or "~/.logonet"))


def tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``, else a SQLite file under :func:`home`.

    SQLite paths come back absolute: train workers run in another folder than the driver.

    Raises:
        UserError: for host:port, which MLflow would take for a folder.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///" + os.path.join(home(), "mlflow.db")
    if re.fullmatch(r"[\w.-]+:[0-9]+(/.*)?", uri):
        raise UserError(f"MLFLOW_TRACKING_URI is {uri}; write http://{uri}")
    if uri.startswith("sqlite:///"):
        return "sqlite:///" + os.path.abspath(uri.removeprefix("sqlite:///"))
    return uri


def git_commit(folder: str) -> str | None:
    """The commit of ``folder``, with ``-dirty`` when files differ from it; None outside git.

    ``LOGONET_GIT_COMMIT`` takes precedence: the working folder of a Ray job is uploaded without its ``.git``.
    """
    if given := os.environ.get("LOGONET_GIT_COMMIT"):
        return given
    # --exclude ignores tags, so the answer is always a commit hash.
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(FileNotFoundError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip() or None
    return None


@dataclass(eq=False)
class Tracker:
    """The MLflow run of one training job. Every method but ``run_id`` and ``close`` returns at once.

    One background thread talks to the server. Each delivery sends whatever the run lacks, so a failed one is made up
    by the next. Another tracker of the same run can complete it from the driver: when the server was away to the end,
    when rank 0 was lost before its last delivery, and when tracking is SQLite, whose file rank 0 wrote on a worker that
    is gone. A run that is already complete stays as it is.

    Args:
        fingerprint: names the job by content; a resumed job has the same one and continues its run.
        experiment: MLflow experiment, created when missing.
        run_name: the run's display name.
        params: config mapping, flattened to ``train.lr``. MLflow's params cannot change, so a resumed
            job only adds those that its run lacks.
        tags: such as ``logonet.git_commit``, ``logonet.manifest``, ``logonet.clusterers`` and
            ``logonet.command`` (from `redaction.command_line`); each resume rewrites them.
        artifact_root: where a new experiment keeps artifacts when tracking is SQLite, such as
            ``s3://bucket/run/mlflow-artifacts``; None is a folder under :func:`home`. A tracking server
            decides by itself.

    Params and tags are redacted (`redaction.redact`); the environment is never recorded.
    """

    fingerprint: str
    experiment: str
    run_name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str | None]
    artifact_root: str | None = None

    def __post_init__(self) -> None:
        set_defaults()  # here, not only in the thread: setenv is not safe while other threads call getenv
        self._uri = tracking_uri()
        self._named = redact(self._uri)
        self._params = {_name(key): _param(key, value) for key, value in config.flat(self.params).items()}
        own = {FINGERPRINT_TAG: self.fingerprint, "logonet.version": logonet.__version__}
        self._tags = clean_tags({**own, **self.tags})
        # What to deliver. The thread only reads these, and they are replaced, never changed in place.
        self._history: list[dict[str, Any]] = []
        self._files: dict[str, bytes] = {}
        self._status: str | None = None
        self._final: dict[str, float] = {}
        self._seen_s: dict[int, float] = {}
        self._thread = ThreadPoolExecutor(1, "logonet-mlflow")
        self._delivery: Future[bool] | None = None
        # These belong to the thread.
        self._client: Any = None
        self._run_id: str | None = None
        self._sent: dict[str, bytes] = {}
        self._away = False

    def sync(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Pass the whole history, one entry per epoch, without waiting.

        Each entry holds ``epoch`` (counts up), ``step`` (the metrics' x-axis) and metrics: a float, a
        list of floats (one per clusterer, logged as ``name/000``, ``name/001``...) or None for not
        measured. ``unix_s``, if present, is when the epoch ended, so that a resumed run keeps its time axis.
        Values that are not finite are left out of the curve and named in the run's ``logonet.non_finite``
        tag, since MLflow would plot infinity as 1.8e308.
        """
        # The time is fixed when first seen: MLflow drops a repeated point only if its time is the same.
        now_s = time.time()
        self._history = [{"unix_s": self._seen_s.setdefault(e["epoch"], now_s), **e} for e in history]
        self._deliver_soon()

    def log_files(self, files: Mapping[str, bytes]) -> None:
        """Add artifacts, by path inside the run's artifact folder, without waiting.

        They are kept in memory, so this is for reports and configs, not for weights.
        """
        texts = {k: without_secrets(v.decode()).encode() for k, v in files.items() if k.endswith(TEXTS)}
        self._files = {**self._files, **files, **texts}
        self._deliver_soon()

    def run_id(self, timeout_s: float = 20.0) -> str | None:
        """The run's id, for runs to be nested below it; None when the server does not answer in time."""
        return self._run_id if self._delivered(timeout_s) else None

    def close(
        self, status: str = "FINISHED", timeout_s: float = 60.0, metrics: Mapping[str, float] | None = None
    ) -> bool:
        """Set the run's final status (FINISHED, FAILED or KILLED) and deliver, retrying for ``timeout_s``.

        Args:
            metrics: of the run as a whole.

        Returns whether everything is delivered. If not, another tracker can do it later.
        """
        self._final, self._status = dict(metrics or {}), status
        end_s = time.monotonic() + timeout_s
        while not self._delivered(max(0.0, end_s - time.monotonic())):
            if time.monotonic() + RETRY_S >= end_s:
                return False
            time.sleep(RETRY_S)
        return True

    def _deliver_soon(self) -> Future[bool]:
        # A delivery that has not begun yet will see the newest state.
        if self._delivery is None or self._delivery.running() or self._delivery.done():
            self._delivery = self._thread.submit(self._deliver)
        return self._delivery

    def _delivered(self, timeout_s: float) -> bool:
        try:
            return self._deliver_soon().result(timeout_s)
        except TimeoutError:
            return False

    def _deliver(self) -> bool:
        try:
            self._send()
        # No failure between here and a tracking server (network, SQL, S3, a deleted experiment) may reach
        # training. It is logged once, when the server goes away.
        except Exception as err:
            self._client = self._run_id = None
            if not self._away:
                reason = redact(" ".join(str(err).split()) or type(err).__name__)[:300]
                said = "MLflow at %s does not take this run's metrics (%s); training continues and they are sent "
                log.warning(said + "when it answers again", self._named, reason)
            self._away = True
            return False
        if self._away:
            log.warning("MLflow at %s answers again; its run is up to date", self._named)
        self._away = False
        return True

    def _send(self) -> None:
        """Bring the run up to date with the state as it is now."""
        history, files, status, final = self._history, self._files, self._status, self._final
        if self._client is None:
            self._client = connect(self._uri)
        if self._run_id is None:
            self._run_id = self._find_or_create()
        run = self._client.get_run(self._run_id)
        logged = run.data.metrics.get("epoch", -1)
        missing = [entry for entry in history if entry["epoch"] > logged]
        if missing and status is None and run.info.status != "RUNNING":
            self._client.update_run(self._run_id, status="RUNNING")
        self._log_epochs(missing, run.data.tags.get(NON_FINITE_TAG, ""))
        unsent = {name: data for name, data in files.items() if self._sent.get(name) is not data}
        if unsent:
            with tempfile.TemporaryDirectory() as folder:
                write_files(folder, unsent)
                if not upload_folder(folder, run.info.artifact_uri):
                    self._client.log_artifacts(self._run_id, folder)
            self._sent = dict(files)
        step = int(history[-1]["step"]) if history else 0
        named = {_name(k): v for k, v in final.items()}
        new = {k: v for k, v in named.items() if run.data.metrics.get(k) != v and math.isfinite(v)}
        self._log_metrics([(name, value, int(time.time() * 1000), step) for name, value in new.items()])
        if status is not None and (run.info.status != status or missing):
            self._client.set_terminated(self._run_id, status)

    def _find_or_create(self) -> str:
        from mlflow.entities import Param, RunTag

        client = self._client
        experiment_id = experiment_id_of(client, self.experiment, self.artifact_root)
        # create_run itself sets the fingerprint: a run cut off before log_batch is found again.
        run = find_run(client, [experiment_id], FINGERPRINT_TAG, self.fingerprint) or client.create_run(
            experiment_id, tags={FINGERPRINT_TAG: self.fingerprint}, run_name=self.run_name
        )
        params = [Param(k, v) for k, v in self._params.items() if k not in run.data.params]
        run_tags = [RunTag(k, v) for k, v in self._tags.items() if run.data.tags.get(k) != v]
        client.log_batch(run.info.run_id, params=params, tags=run_tags)
        return run.info.run_id

    def _log_epochs(self, entries: list[dict[str, Any]], noted: str) -> None:
        metrics, dropped = [], []
        for entry in entries:
            at = int(entry["unix_s"] * 1000), int(entry["step"])
            for name, value in _metrics(entry):
                if math.isfinite(value):
                    metrics.append((name, value, *at))
                else:
                    dropped.append(f"{name}@{entry['epoch']}")
            # Last of its epoch, so that an epoch cut in two by a failure counts as missing.
            metrics.append(("epoch", float(entry["epoch"]), *at))
        if dropped:
            names = dict.fromkeys([*(noted.split(", ") if noted else []), *dropped])
            self._client.set_tag(self._run_id, NON_FINITE_TAG, ", ".join(names)[:5000])
        self._log_metrics(metrics)

    def _log_metrics(self, metrics: list[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        for i in range(0, len(metrics), MAX_METRICS_PER_BATCH):
            batch = [Metric(*values) for values in metrics[i : i + MAX_METRICS_PER_BATCH]]
            self._client.log_batch(self._run_id, metrics=batch)


def check() -> str:
    """Contact the tracking server; returns its address without credentials.

    Raises:
        UserError: when it does not answer.
    """
    with user_errors("answer", "; start it, or set MLFLOW_TRACKING_URI"):
        connect(tracking_uri()).search_experiments(max_results=1)
    return redact(tracking_uri())


@contextlib.contextmanager
def user_errors(doing: str, hint: str = "") -> Iterator[None]:
    """Turn MLflow's own errors into one sentence."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as err:
        uri = redact(os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri())
        reason = redact(" ".join(err.message.split()))[:300]
        raise UserError(f"MLflow at {uri} could not {doing}: {reason}{hint}") from None


def set_defaults() -> None:
    for key, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(key, value)


def connect(uri: str) -> Any:
    """An MlflowClient of ``uri`` for runs, and of ``MLFLOW_REGISTRY_URI``, when set, for models."""
    set_defaults()
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///"):
        folder = os.path.dirname(uri.removeprefix("sqlite:///"))
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as err:
            ways = "set LOGONET_HOME to a folder that can be written, or MLFLOW_TRACKING_URI to a server"
            raise UserError(
                f"{folder}, where runs are recorded, cannot be made ({err.strerror}); {ways}"
            ) from None
    return MlflowClient(tracking_uri=uri)


def experiment_id_of(client: Any, name: str, artifact_root: str | None) -> str:
    if experiment := client.get_experiment_by_name(name):
        return experiment.experiment_id
    root = artifact_root or os.path.join(home(), "mlflow-artifacts")
    location = root if "://" in root else os.path.abspath(os.path.expanduser(root))
    local = client.tracking_uri.startswith("sqlite:")  # else the server decides
    # Without this tag MLflow's pages open on its language-model views.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return client.create_experiment(name, artifact_location=location if local else None, tags=tags)


def find_run(client: Any, experiment_ids: list[str], tag: str, value: str) -> Any:
    """The oldest run with this tag, or None."""
    wanted = f"tags.`{tag}` = '{value}'"
    oldest_first = ["attributes.start_time ASC"]
    runs = client.search_runs(experiment_ids, wanted, max_results=1, order_by=oldest_first)
    return runs[0] if runs else None


def clean_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    return {key: redact(str(value)) for key, value in tags.items() if value is not None}


def _name(key: str) -> str:
    """A key as MLflow takes it: without commas and brackets, which names of classes and of a study's settings have."""
    return re.sub(r"[^\w .:/-]", "_", key)


def _param(key: str, value: Any) -> str:
    """A value as MLflow shows it: lists and None as JSON, and no secrets."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return "REDACTED" if SECRET_NAME.search(key) else redact(text)


def _metrics(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The (name, value) pairs of one history entry, lists spread out."""
    for name, value in entry.items():
        if name in ("epoch", "step", "unix_s") or value is None:
            continue
        if isinstance(value, Sequence):
            yield from ((f"{_name(name)}/{i:03d}", float(item)) for i, item in enumerate(value))
        else:
            yield _name(name), float(value)


def write_files(folder: str, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        object_store.write(object_store.join(folder, name), data)


def upload_folder(folder: str, location: str) -> bool:
    """Upload to MLflow's ``location`` if that is a bucket, through `object_store`, which survives more faults."""
    if not object_store.is_s3(location):
        return False
    for entry in object_store.listing(folder):
        name = object_store.relative(entry.uri, folder)
        object_store.write_file(entry.uri, object_store.join(location, name))
    return True
