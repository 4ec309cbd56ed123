"""The MLflow model registry: versions by content, aliases, lineage."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import posixpath
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import logonet
from logonet.core import config
from logonet.core.errors import UserError
from logonet.core.redaction import redact
from logonet.storage import object_store
from logonet.tracking import runs

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
    ``mlflow.pyfunc`` and served by ``mlflow models serve`` (see `logonet.inference.serving`); the other kinds are
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
    clean = runs.clean_tags({**given, CONTENT_TAG: content, SIZE_TAG: size_bytes})
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
            runs.log.warning("%s %s; it is fetched again", target, why)
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
    runs.set_defaults()
    return runs.connect(runs.tracking_uri())


@contextlib.contextmanager
def _plainly(doing: str) -> Iterator[None]:
    """MLflow's own errors as one sentence."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as err:
        uri = os.environ.get("MLFLOW_REGISTRY_URI") or runs.tracking_uri()
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
        if run := runs.find_run(client, experiments, runs.FINGERPRINT_TAG, run_fingerprint):
            return run
        runs.log.warning(
            "MLflow at %s knows no run with fingerprint %s; %s gets a run of its own",
            redact(client.tracking_uri),
            run_fingerprint,
            name,
        )
    root = artifact_root or os.path.join(runs.home(), "mlflow-artifacts")
    experiment_id = runs.experiment_id_of(client, MODELS_EXPERIMENT, root)
    if run := runs.find_run(client, [experiment_id], REGISTERED_TAG, f"{name}/{content}"):
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
        if not runs.upload_folder(folder, model.artifact_location):
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


def _fetch(model_uri: str, location: str, folder: str, uri: str) -> str:
    from mlflow import artifacts
    from mlflow.exceptions import MlflowException

    if object_store.is_s3(location):
        target = os.path.join(folder, MODEL_FILES)
        for entry in object_store.listing(location):
            name = object_store.relative(entry.uri, location)
            if ".." in name.split("/"):
                raise UserError(f"{entry.uri} leads out of the model's folder; delete it")
            object_store.read_to_file(entry.uri, os.path.join(target, name), size_bytes=entry.size_bytes)
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
