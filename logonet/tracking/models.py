"""The MLflow model registry: versions by content, aliases, lineage."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import logonet
from logonet.core import config
from logonet.core.errors import UserError
from logonet.core.redaction import redact
from logonet.storage import object_store
from logonet.tracking import runs

Files = Mapping[str, bytes]  # by relative path
Kind = Literal["encoder", "segmentation", "clusterers"]
CONTENT_TAG = "logonet.content"  # of a model version: the digest of its files, see _content
SIZE_TAG = "logonet.size_bytes"
KIND_TAG = "logonet.kind"
REGISTERED_TAG = "logonet.registered"  # of a run that only records a registration: NAME/CONTENT
MODELS_EXPERIMENT = "logonet-models"  # for models whose own run this server does not know
MODEL_FILES = "data"  # folder of the model's files, beside MLmodel
MAX_EXPERIMENTS = 50_000  # MLflow's own limit
MODEL_URI = re.compile(r"models:/([\w.\- ]+)(?:@([\w.\-]+)|/(\d+))")
# What a served network needs, at the versions that logonet itself requires.
SERVING_PACKAGES = ("torch", "monai", "nibabel", "numpy", "scipy", "safetensors", "pandas")


def register(
    name: str,
    files: Files,
    tags: Mapping[str, str],
    *,
    kind: Kind,
    aliases: Sequence[str] = ("candidate",),
    run_fingerprint: str | None = None,
    artifact_root: str | None = None,
) -> str:
    """Put a model's files in the MLflow registry, and return their URI ``models:/NAME/VERSION``.

    Registering the same files under the same name again gives the same version, with new tags, and moves
    ``aliases`` to it. A version of kind "segmentation" can be loaded by ``mlflow.pyfunc`` and served by
    ``mlflow models serve`` (see `logonet.inference.serving`); the other kinds are for `download` alone.

    Args:
        name: such as ``logonet-encoder``, ``logonet-seg-spleen`` or ``logonet-clusterers``.
        files: by relative path: safetensors and JSON, never pickles.
        tags: lineage (``logonet.manifest``, ``logonet.clusterers``, ``logonet.pretrain``, ...), redacted.
        run_fingerprint: links the version to the run of the job that made it, in any experiment; without
            such a run the version gets a small one of its own.
        artifact_root: as in :class:`Tracker`, for that small run.

    Raises:
        UserError: when the registry does not answer or refuses the name, a tag or an alias.
    """
    assert kind in get_args(Kind), kind
    assert files, name
    content = _content({path: (len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items()})
    own = {CONTENT_TAG: content, SIZE_TAG: sum(map(len, files.values()))}
    clean = runs.clean_tags({KIND_TAG: kind, "logonet.version": logonet.__version__, **tags, **own})
    with runs.user_errors(f"register {name}"):
        client = runs.connect(runs.tracking_uri())
        _make_name(client, name)
        same = client.search_model_versions(f"name = '{name}' and tags.`{CONTENT_TAG}` = '{content}'")
        if same:
            version = min(same, key=lambda v: int(v.version))
            for key, value in clean.items():
                if version.tags.get(key) != value:
                    client.set_model_version_tag(name, version.version, key, value)
        else:
            run = _model_run(client, name, clean, run_fingerprint, artifact_root)
            version = _new_version(client, run, name, files, clean)
        for alias in aliases:
            client.set_registered_model_alias(name, alias, str(version.version))
    return f"models:/{name}/{version.version}"


def download(model_uri: str, folder: str) -> str:
    """Fetch a registered model into ``folder``/NAME/VERSION unless it is there, and return that path.

    Every byte is compared with what was registered, whether fetched now or before. Several processes may
    do this at once.

    Args:
        model_uri: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

    Raises:
        UserError: when there is no such model, alias or version (naming those that exist), or its files
            are missing or differ from those registered.
    """
    with runs.user_errors(f"read {model_uri}"):
        client = runs.connect(runs.tracking_uri())
        version = _version(client, model_uri)
        if CONTENT_TAG not in version.tags:
            why = f"has no {CONTENT_TAG} tag, so its files cannot be verified"
            raise UserError(f"{model_uri} {why}; register it with 'logonet register'")
        location = client.get_model_version_download_uri(version.name, version.version)
    parent = os.path.join(os.path.abspath(folder), version.name)
    target = os.path.join(parent, str(version.version))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".download-") as temp:
        if os.path.isdir(target):
            if _same(target, version.tags):
                return target
            runs.log.warning("%s is not what was registered; it is fetched again", target)
            os.rename(target, os.path.join(temp, "damaged"))
        fetched = _fetch(model_uri, f"{location.rstrip('/')}/{MODEL_FILES}", temp, client.tracking_uri)
        if not _same(fetched, version.tags):
            why = f"the content of {redact(location)} is not what was registered"
            raise UserError(f"{model_uri}: {why}; register the model again")
        try:
            os.rename(fetched, target)
        except OSError:  # another process was faster
            if not _same(target, version.tags):
                raise
    return target


def lineage(model_uri: str) -> dict[str, str]:
    """A registered model's tags, with its own ``model`` URI and the MLflow ``run_id`` it came from.

    Raises:
        UserError: when there is no such model, alias or version.
    """
    with runs.user_errors(f"read {model_uri}"):
        version = _version(runs.connect(runs.tracking_uri()), model_uri)
    return {"model": f"models:/{version.name}/{version.version}", "run_id": version.run_id, **version.tags}


def set_alias(model_uri: str, alias: str) -> str:
    """Point ``alias`` at a registered model, and return its ``models:/NAME/VERSION``.

    Raises:
        UserError: when there is no such model, alias or version, or MLflow refuses ``alias``.
    """
    with runs.user_errors(f"give {model_uri} the alias '{alias}'"):
        client = runs.connect(runs.tracking_uri())
        version = _version(client, model_uri)
        client.set_registered_model_alias(version.name, alias, str(version.version))
    return f"models:/{version.name}/{version.version}"


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
    client: Any, name: str, tags: dict[str, str], run_fingerprint: str | None, artifact_root: str | None
) -> Any:
    """The run that made the model, or else one that only records its registration."""
    if run_fingerprint is not None:
        experiments = [e.experiment_id for e in client.search_experiments(max_results=MAX_EXPERIMENTS)]
        if run := runs.find_run(client, experiments, runs.FINGERPRINT_TAG, run_fingerprint):
            return run
        where, what = redact(client.tracking_uri), f"{name} gets a run of its own"
        runs.log.warning("MLflow at %s knows no run with fingerprint %s; %s", where, run_fingerprint, what)
    experiment_id = runs.experiment_id_of(client, MODELS_EXPERIMENT, artifact_root)
    registered = f"{name}/{tags[CONTENT_TAG]}"
    if run := runs.find_run(client, [experiment_id], REGISTERED_TAG, registered):
        return run
    run = client.create_run(
        experiment_id, tags={**tags, REGISTERED_TAG: registered}, run_name=f"register {name}"
    )
    client.set_terminated(run.info.run_id)
    return run


def _new_version(client: Any, run: Any, name: str, files: Files, tags: dict[str, str]) -> Any:
    from mlflow.entities import LoggedModelOutput
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    run_id, experiment_id = run.info.run_id, run.info.experiment_id
    model = client.create_logged_model(
        experiment_id, name=name, source_run_id=run_id, model_type=tags[KIND_TAG], tags=tags
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    with tempfile.TemporaryDirectory(prefix="logonet-model-") as folder:
        _write_model(folder, files, tags[KIND_TAG], model, run_id)
        if not runs.upload_folder(folder, model.artifact_location):
            client.log_model_artifacts(model.model_id, folder)
    client.finalize_logged_model(model.model_id, "READY")
    # The location itself, not models:/<id>: a SQLite registry would look that up in MLflow's default database.
    # A separate registry does not know the model's id either.
    separate = os.environ.get("MLFLOW_REGISTRY_URI") not in (None, "", client.tracking_uri)
    link = {"run_id": run_id, "model_id": None if separate else model.model_id}
    version = client.create_model_version(name, model.artifact_location, tags=tags, **link)
    named = [{"name": name, "version": version.version}]  # for MLflow's page of the run
    client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(named)})
    return version


def _write_model(folder: str, files: Files, kind: str, model: Any, run_id: str) -> None:
    """An MLflow model folder: ``MLmodel``, the requirements of a model that can be served, and the files."""
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec

    ids = {"model_uuid": model.model_id, "model_id": model.model_id, "run_id": run_id}
    meta = Model(artifact_path=model.artifact_location, metadata={KIND_TAG: kind}, **ids)
    if kind == "segmentation":
        # No signature of the inputs: with one, MLflow would refuse either arrays or tables of files.
        signature = ModelSignature(params=ParamSchema([ParamSpec("modality", DataType.string, "")]))
        options = {"loader_module": "logonet.serving", "pip_requirements": _requirements()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*An input example was not provided", UserWarning)
            pyfunc.save_model(folder, mlflow_model=meta, signature=signature, **options)
        # Not through data_path, which would copy all files once more.
        meta.flavors[pyfunc.FLAVOR_NAME][pyfunc.DATA] = MODEL_FILES
    runs.write_files(os.path.join(folder, MODEL_FILES), files)
    meta.model_size_bytes = sum(map(len, files.values()))
    meta.save(os.path.join(folder, "MLmodel"))


def _requirements() -> list[str]:
    """Explicit, since MLflow would otherwise load the model in another process to find them."""
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


def _fetch(model_uri: str, location: str, folder: str, uri: str) -> str:
    from mlflow import artifacts
    from mlflow.exceptions import MlflowException

    if object_store.is_s3(location):
        target = os.path.join(folder, MODEL_FILES)
        for entry in object_store.listing(location):
            name = object_store.relative(entry.uri, location)
            path = object_store.join(target, name)
            object_store.read_to_file(entry.uri, path, size_bytes=entry.size_bytes)
        if os.path.isdir(target):
            return target
    try:
        return artifacts.download_artifacts(artifact_uri=location, dst_path=folder, tracking_uri=uri)
    except (MlflowException, OSError) as err:
        why = f"cannot be read from {redact(location)} ({redact(' '.join(str(err).split()))[:300]})"
        raise UserError(f"the files of {model_uri} {why}; register the model again") from None


def _same(folder: str, tags: Mapping[str, str]) -> bool:
    """Whether the files in ``folder`` are those registered with ``tags``."""
    files = {}
    for entry in object_store.listing(folder):
        with open(entry.uri, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[object_store.relative(entry.uri, folder)] = (entry.size_bytes, digest)
    return _content(files) == tags[CONTENT_TAG]


def _content(files: Mapping[str, tuple[int, str]]) -> str:
    """SHA-256 over the names, sizes in bytes and SHA-256 of all files."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
