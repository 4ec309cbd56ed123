"""MLflow: tracking (one run per training job, found again by fingerprint) and the model registry.

Training must neither stop nor slow down because the tracking server is away. So every network call is
made by one daemon thread, the whole history is handed over each time, and the thread asks the server
what it already holds: a job that was killed, resumed, or cut off from its server ends up with the same
points, each once.

Models are registered by content: their files lie in a ``data`` folder beside an ``MLmodel`` file, nothing is
pickled, and what is downloaded is compared with the digest that was registered.

Only this file imports mlflow, and only inside functions (about 3 s with its database layer).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import posixpath
import re
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import logonet
from logonet import config, store
from logonet.errors import UserError
from logonet.redaction import SECRET_NAME, redact, without_secrets

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

Kind = Literal["encoder", "segmentation", "clusterers"]
CONTENT_TAG = "logonet.content"  # of a model version: what its files hold, see _content
SIZE_TAG = "logonet.size_bytes"
KIND_TAG = "logonet.kind"
REGISTERED_TAG = "logonet.registered"  # of a run that stands for a registration alone: NAME/CONTENT
MODELS_EXPERIMENT = "logonet-models"  # for models whose own run this server does not know
MODEL_FILES = "data"  # folder of the model's files, beside MLmodel
MODEL_URI = re.compile(r"models:/([\w.\- ]+)(?:@([\w.\-]+)|/(\d+))")
# What the network needs where it is served; the bounds are our own.
SERVING_PACKAGES = ("torch", "monai", "nibabel", "numpy", "scipy", "safetensors", "pandas")


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
        _set_defaults()  # not in the thread: setenv is not safe beside other threads' getenv
        self.uri = tracking_uri()
        self._fingerprint, self._experiment, self._run_name = fingerprint, experiment, run_name
        self._params = {
            key: "REDACTED" if SECRET_NAME.search(key) else redact(value) for key, value in _flat(params)
        }
        self._tags = _clean({FINGERPRINT_TAG: fingerprint, "logonet.version": logonet.__version__, **tags})
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
            self._client = _client(self.uri)
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
        experiment_id = _experiment_id(client, self._experiment, self._artifact_root)
        # The fingerprint is set by create_run itself: a run cut off before log_batch is found again.
        run = _find_run(client, [experiment_id], FINGERPRINT_TAG, self._fingerprint) or client.create_run(
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
            if not _to_bucket(folder, place):
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
    _set_defaults()
    from mlflow.exceptions import MlflowException

    uri = tracking_uri()
    try:
        _client(uri).search_experiments(max_results=1)
    except MlflowException as err:
        raise UserError(
            f"MLflow at {redact(uri)} does not answer ({redact(str(err).splitlines()[0])}); "
            "start it, or set MLFLOW_TRACKING_URI"
        ) from None
    return redact(uri)


def register(
    name: str,
    files: Mapping[str, bytes],
    tags: Mapping[str, str],
    *,
    kind: Kind,
    aliases: Sequence[str] = ("candidate",),
    description: str = "",
    run_fingerprint: str | None = None,
    artifact_root: str | None = None,
) -> str:
    """Put a model's files in the MLflow registry, and return their URI ``models:/NAME/VERSION``.

    The same files under the same name are one version, however often they are registered: its tags are
    renewed and ``aliases`` are moved to it. A version of kind "segmentation" can be loaded by
    ``mlflow.pyfunc`` and served by ``mlflow models serve`` (see `logonet.serving`); the other kinds are
    kept for `download` alone.

    Args:
        name: such as ``logonet-encoder``, ``logonet-seg-spleen`` or ``logonet-clusterers``.
        files: by relative path: safetensors and JSON, never pickles.
        tags: lineage (``logonet.manifest``, ``logonet.clusterers``, ``logonet.pretrain``, ...), redacted.
        run_fingerprint: links the version to the run of the job that made it, in whatever experiment;
            without such a run the version has a small one of its own.
        artifact_root: as in :class:`Tracker`, for that small run.

    Raises:
        UserError: when the registry does not answer or refuses the name, a tag or an alias.
    """
    assert kind in get_args(Kind), kind
    assert files, name
    for path in files:
        assert not posixpath.isabs(path), path
        assert ".." not in path.split("/"), path
    content = _content({path: (len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items()})
    size_bytes = sum(map(len, files.values()))
    given = {KIND_TAG: kind, "logonet.version": logonet.__version__, **tags}
    clean = _clean({**given, CONTENT_TAG: content, SIZE_TAG: size_bytes})
    with _plainly(f"register {name}"):
        client = _registry_client()
        _make_name(client, name)
        same = client.search_model_versions(f"name = '{name}' and tags.`{CONTENT_TAG}` = '{content}'")
        if same:
            version = min(same, key=lambda v: int(v.version))
            for key, value in clean.items():
                if version.tags.get(key) != value:
                    client.set_model_version_tag(name, version.version, key, value)
        else:
            run = _model_run(client, name, content, clean, run_fingerprint, artifact_root)
            version = _new_version(client, run, name, files, clean, kind, description)
        for alias in aliases:
            client.set_registered_model_alias(name, alias, str(version.version))
    return f"models:/{name}/{version.version}"


def download(model_uri: str, folder: str) -> str:
    """Fetch a registered model into ``folder``/NAME/VERSION unless it is there, and return that path.

    Every byte is compared with what was registered, whether it was fetched now or before. Several
    processes may do this at once.

    Args:
        model_uri: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

    Raises:
        UserError: when there is no such model, alias or version (naming those that exist), or its files
            are missing or not those that were registered.
    """
    with _plainly(f"read {model_uri}"):
        client = _registry_client()
        version = _version(client, model_uri)
        if CONTENT_TAG not in version.tags:
            raise UserError(
                f"{model_uri} has no {CONTENT_TAG} tag, so nothing vouches for its files; register it with "
                "'logonet register'"
            )
        location = client.get_model_version_download_uri(version.name, version.version)
    parent = os.path.join(os.path.abspath(folder), version.name)
    target = os.path.join(parent, str(version.version))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".download-") as temp:
        if os.path.isdir(target):
            why = _difference(target, version.tags)
            if not why:
                return target
            log.warning("%s %s; it is fetched again", target, why)
            os.rename(target, os.path.join(temp, "damaged"))
        fetched = _fetch(model_uri, f"{location.rstrip('/')}/{MODEL_FILES}", temp, client.tracking_uri)
        if why := _difference(fetched, version.tags):
            raise UserError(f"{model_uri}: what lies at {redact(location)} {why}; register the model again")
        try:
            os.rename(fetched, target)
        except OSError:  # another process was faster
            if _difference(target, version.tags):
                raise
    return target


def lineage(model_uri: str) -> dict[str, str]:
    """A registered model's tags, with its own ``model`` URI and the MLflow ``run_id`` it came from.

    Raises:
        UserError: when there is no such model, alias or version.
    """
    with _plainly(f"read {model_uri}"):
        version = _version(_registry_client(), model_uri)
    return {"model": f"models:/{version.name}/{version.version}", "run_id": version.run_id, **version.tags}


def set_alias(model_uri: str, alias: str) -> str:
    """Point ``alias`` at a registered model, and return its ``models:/NAME/VERSION``.

    Raises:
        UserError: when there is no such model, alias or version, or MLflow refuses ``alias``.
    """
    with _plainly(f"give {model_uri} the alias '{alias}'"):
        client = _registry_client()
        version = _version(client, model_uri)
        client.set_registered_model_alias(version.name, alias, str(version.version))
    return f"models:/{version.name}/{version.version}"


def _registry_client() -> Any:
    """A client of `tracking_uri` for runs and of ``MLFLOW_REGISTRY_URI``, when set, for models."""
    _set_defaults()
    return _client(tracking_uri())


@contextlib.contextmanager
def _plainly(doing: str) -> Iterator[None]:
    """MLflow's own errors as one sentence."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as err:
        uri = os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri()
        reason = redact(" ".join(err.message.split()))[:300]
        raise UserError(f"MLflow at {redact(uri)} could not {doing}: {reason}") from None


def _make_name(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    if not MODEL_URI.fullmatch(f"models:/{name}/1"):
        raise UserError(f"model name '{name}' may hold letters, digits, '.', '-', '_' and spaces only")
    try:
        client.create_registered_model(name)
    except MlflowException as err:
        if err.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _model_run(
    client: Any,
    name: str,
    content: str,
    tags: Mapping[str, str],
    run_fingerprint: str | None,
    artifact_root: str | None,
) -> Any:
    """The run that made the model, or else one that stands for its registration alone."""
    if run_fingerprint is not None:
        experiments, token = [], None
        while token != "":
            page = client.search_experiments(page_token=token)
            experiments += [e.experiment_id for e in page]
            token = page.token or ""
        if run := _find_run(client, experiments, FINGERPRINT_TAG, run_fingerprint):
            return run
        log.warning(
            "MLflow at %s knows no run with fingerprint %s; %s gets a run of its own",
            redact(client.tracking_uri),
            run_fingerprint,
            name,
        )
    root = artifact_root or os.path.join(home(), "mlflow-artifacts")
    experiment_id = _experiment_id(client, MODELS_EXPERIMENT, root)
    if run := _find_run(client, [experiment_id], REGISTERED_TAG, f"{name}/{content}"):
        return run
    tags = {**tags, REGISTERED_TAG: f"{name}/{content}"}
    run = client.create_run(experiment_id, tags=tags, run_name=f"register {name}")
    client.set_terminated(run.info.run_id)
    return run


def _new_version(
    client: Any,
    run: Any,
    name: str,
    files: Mapping[str, bytes],
    tags: dict[str, str],
    kind: Kind,
    description: str,
) -> Any:
    from mlflow.entities import LoggedModelOutput
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    run_id = run.info.run_id
    model = client.create_logged_model(
        run.info.experiment_id, name=name, source_run_id=run_id, model_type=kind, tags=tags
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    with tempfile.TemporaryDirectory(prefix="logonet-model-") as folder:
        _write_model(folder, files, kind, model, run_id)
        if not _to_bucket(folder, model.artifact_location):
            client.log_model_artifacts(model.model_id, folder)
    client.finalize_logged_model(model.model_id, "READY")
    # The place itself, not models:/<id>: a SQLite registry would look that up in MLflow's default database.
    # A registry of its own does not know the model's id either.
    separate = os.environ.get("MLFLOW_REGISTRY_URI") not in (None, "", client.tracking_uri)
    version = client.create_model_version(
        name,
        model.artifact_location,
        run_id=run_id,
        tags=tags,
        description=description,
        model_id=None if separate else model.model_id,
    )
    named = [{"name": name, "version": version.version}]  # for MLflow's page of the run
    client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(named)})
    return version


def _write_model(folder: str, files: Mapping[str, bytes], kind: Kind, model: Any, run_id: str) -> None:
    """An MLflow model folder: ``MLmodel``, the environment of what can be served, and the files."""
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec

    meta = Model(
        artifact_path=model.artifact_location,
        run_id=run_id,
        model_uuid=model.model_id,
        model_id=model.model_id,
        metadata={KIND_TAG: kind},
    )
    if kind == "segmentation":
        # No signature of the inputs: with one, MLflow would refuse either arrays or tables of files.
        params = ParamSchema([ParamSpec("modality", DataType.string, "")])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*An input example was not provided", UserWarning)
            pyfunc.save_model(
                folder,
                loader_module="logonet.serving",
                mlflow_model=meta,
                signature=ModelSignature(params=params),
                pip_requirements=_requirements(),
            )
        # Not through data_path, which would copy all files once more.
        meta.flavors[pyfunc.FLAVOR_NAME][pyfunc.DATA] = MODEL_FILES
    for path, data in files.items():
        at = os.path.join(folder, MODEL_FILES, path)
        os.makedirs(os.path.dirname(at), exist_ok=True)
        with open(at, "wb") as file:
            file.write(data)
    meta.model_size_bytes = sum(map(len, files.values()))
    meta.save(os.path.join(folder, "MLmodel"))


def _requirements() -> list[str]:
    """Stated, since MLflow would load the model in another process to find out."""
    ours = importlib.metadata.requires("logonet") or []
    return [f"logonet=={logonet.__version__}"] + [
        line for line in ours if re.split(r"[^\w.-]", line)[0] in SERVING_PACKAGES
    ]


def _version(client: Any, model_uri: str) -> Any:
    """The model version at ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``."""
    from mlflow.exceptions import MlflowException

    match = MODEL_URI.fullmatch(model_uri)
    if match is None:
        raise UserError(f"model '{model_uri}' must be of the form models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    try:
        model = client.get_registered_model(name)
    except MlflowException as err:
        if err.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = [m.name for m in client.search_registered_models()]
        raise UserError(config.unknown("registered model", name, names)) from None
    versions = {str(v.version): v for v in client.search_model_versions(f"name = '{name}'")}
    wanted = str(model.aliases.get(alias, "")) if alias else number
    if wanted not in versions:
        numbers = ", ".join(sorted(versions, key=int)) or "none"
        aliases = ", ".join(f"@{a} is {v}" for a, v in sorted(model.aliases.items())) or "none"
        what = f"alias '@{alias}'" if alias else f"version {number}"
        raise UserError(f"{name} has no {what} (versions: {numbers}; aliases: {aliases})")
    return versions[wanted]


def _to_bucket(folder: str, location: str) -> bool:
    """Put a folder's files where MLflow keeps them, if that is a bucket: `store` survives what its client does not."""
    if not store.is_s3(location):
        return False
    for at, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(at, name)
            store.write_file(path, store.join(location, os.path.relpath(path, folder).replace(os.sep, "/")))
    return True


def _fetch(model_uri: str, location: str, folder: str, uri: str) -> str:
    from mlflow import artifacts
    from mlflow.exceptions import MlflowException

    if store.is_s3(location):
        target = os.path.join(folder, MODEL_FILES)
        for entry in store.listing(location):
            name = store.relative(entry.uri, location)
            if ".." in name.split("/"):
                raise UserError(f"{entry.uri} leads out of the model's folder; delete it")
            store.read_to_file(entry.uri, os.path.join(target, name), size_bytes=entry.size_bytes)
        if os.path.isdir(target):
            return target
    try:
        return artifacts.download_artifacts(artifact_uri=location, dst_path=folder, tracking_uri=uri)
    except (MlflowException, OSError) as err:
        reason = redact(" ".join(str(err).split()))[:300]
        raise UserError(
            f"the files of {model_uri} cannot be read from {redact(location)} ({reason}); "
            "register the model again"
        ) from None


def _difference(folder: str, tags: Mapping[str, str]) -> str:
    """How the files in ``folder`` differ from those registered with ``tags``; empty when they do not."""
    paths = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    sizes = {os.path.relpath(path, folder).replace(os.sep, "/"): os.path.getsize(path) for path in paths}
    if str(sum(sizes.values())) != tags[SIZE_TAG]:
        return f"holds {sum(sizes.values())} bytes instead of {tags[SIZE_TAG]}"
    files = {}
    for name, size_bytes in sizes.items():
        with open(os.path.join(folder, name), "rb") as file:
            files[name] = (size_bytes, hashlib.file_digest(file, "sha256").hexdigest())
    return "" if _content(files) == tags[CONTENT_TAG] else "is not what was registered"


def _content(files: Mapping[str, tuple[int, str]]) -> str:
    """SHA-256 over the names, sizes in bytes and SHA-256 of all files."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def _set_defaults() -> None:
    for key, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(key, value)


def _client(uri: str) -> Any:
    """An MlflowClient of ``uri``, whose SQLite folder is made when missing."""
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///"):
        os.makedirs(os.path.dirname(uri.removeprefix("sqlite:///")), exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def _experiment_id(client: Any, name: str, artifact_root: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    location = _location(artifact_root) if client.tracking_uri.startswith("sqlite:") else None
    # MLflow's pages open on its language-model views unless an experiment says that it trains models.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return client.create_experiment(name, artifact_location=location, tags=tags)


def _find_run(client: Any, experiment_ids: list[str], tag: str, value: str) -> Any:
    """The oldest run with this tag, or None."""
    wanted = f"tags.`{tag}` = '{value}'"
    oldest_first = ["attributes.start_time ASC"]
    runs = client.search_runs(experiment_ids, wanted, max_results=1, order_by=oldest_first)
    return runs[0] if runs else None


def _clean(tags: Mapping[str, Any]) -> dict[str, str]:
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
