"""The Python API. Its names are also those of the package: ``logonet.load_model`` and so on."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from torch import nn

from logonet import methods, networks, pipelines, recipes, training
from logonet.core import config
from logonet.core.errors import UserError
from logonet.data import phantom
from logonet.inference.load import LoadedModel as LoadedModel
from logonet.inference.load import load_model as load_model
from logonet.storage import object_store
from logonet.storage.artifacts import Artifact
from logonet.training.local import LocalExecutor

build_network = networks.build
build_method = methods.build
read_manifest = pipelines.open_manifest
Scans = int | str | Sequence[str | os.PathLike[str] | tuple[str | os.PathLike[str], str | os.PathLike[str]]]


@dataclass(frozen=True, repr=False)
class LocalRun:
    """A finished training.

    Attributes:
        artifact: what it has left; ``files`` lists it.
        history: one mapping of metrics for each epoch.
    """

    artifact: Artifact
    history: list[dict[str, Any]]
    _folder: Any = None  # a temporary folder, which goes when the run does

    def __repr__(self) -> str:
        last = self.history[-1]
        return f"LocalRun({self.uri}: {last['epoch']} epochs, loss {last['loss']:.4g})"

    @property
    def uri(self) -> str:
        """Where it lies: give it to ``train_local(init=...)`` or, after finetuning, to `load_model`."""
        return self.artifact.uri

    @functools.cached_property
    def network(self) -> nn.Module:
        """The trained network on the CPU: the best one where validation was on, else the last."""
        files = self.artifact.files
        name = "best.safetensors" if "best.safetensors" in files else "backbone.safetensors"
        weights = training.load_weights(training.Init(self.artifact.uri_of(name), files[name].sha256))
        backbone = config.Component.of(self.artifact.config["backbone"], "backbone")
        classes = len(self.artifact.facts.get("classes", (0, 1)))
        net = networks.from_component(backbone, 1, classes)
        net.load_state_dict(weights, strict=self.artifact.stage == "finetune")
        return net.eval()


def train_local(
    method: str | Mapping[str, Any] = "masked_clusters",
    network: str | Mapping[str, Any] | None = None,
    scans: Scans = 8,
    *,
    settings: Sequence[str] = (),
    recipe: str = "demo",
    init: str = "",
    root: str | None = None,
    num_workers: int = 0,
    device: str | None = None,
) -> LocalRun:
    """Train any method with any network in this process: without a cluster, under a debugger if you like.

    All stages run as they do on a cluster (manifest, crops, clusterers and pseudo-labels, or split and prepared scans),
    with the same results and the same artifacts below ``root``: the same call again finds them.

    Args:
        method: a pretext or objective by name, or ``{"name": ..., **options}``. One that learns from labels finetunes.
        network: a network by name, or ``{"name": ..., **options}``; None for the recipe's. A name takes the recipe's
            options where it is the recipe's network, otherwise the network's defaults (``networks.tiny(name)`` has
            options for a small one).
        scans: a number of synthetic scans to make; a folder, s3:// prefix or list (JSON, CSV) as for
            ``jobs/pretrain.py --data``; or a list of image files, or of (image, label) pairs.
        settings: ``section.key=value`` laid on the recipe, such as ``"train.epochs=2"``.
        recipe: a named config of `logonet.recipes`.
        init: for finetuning, pretrained weights: ``run.uri``, models:/NAME@alias or a .safetensors file.
        root: folder or s3:// prefix for the artifacts; None for a temporary folder that goes with the returned run.
        num_workers: processes that prepare batches; 0 prepares them in this process.
        device: such as "cpu" or "cuda:0"; None takes a GPU where there is one.

    Raises:
        UserError: an unknown name or key, scans that cannot be used...
        Diverged: training cannot continue.
        Stopped: SIGTERM came; the step is stored, and the same call with the same ``root`` goes on from there.

    Example:
        >>> run = logonet.train_local("simclr", scans=4, settings=["train.epochs=1", "train.batch_size=2"])
        >>> run.history[-1]["loss"]
    """
    name = method if isinstance(method, str) else method.get("name", "masked_clusters")
    finetunes = "labels" in methods.needs(name)
    known: Mapping[str, Any] = recipes.FINETUNING if finetunes else recipes.PRETRAINING
    if recipe not in known:
        raise UserError(config.unknown("recipe", recipe, known))
    base = known[recipe]()
    values = config.merge(config.to_dict(base), {"method": _component(method)})
    if network is not None:
        values = config.merge(values, {"backbone": _component(network)})
    cfg = config.from_dict(type(base), config.override(values, settings))
    folder = None if root is not None else tempfile.TemporaryDirectory(prefix="logonet-")
    place = _absolute(folder.name if folder else str(root))
    source = _source(scans, place)
    executor = LocalExecutor(num_workers, device)
    if isinstance(cfg, pipelines.Finetuning):
        cfg = replace(cfg, init=replace(cfg.init, weights=init))
        artifact = pipelines.finetune(cfg, source, place, executor, experiment=None)
    elif init:
        raise UserError(f"init is for finetuning; the method '{name}' pretrains from random weights")
    else:
        artifact = pipelines.pretrain(cfg, source, place, executor, experiment=None)
    return LocalRun(artifact, config.parse_json(artifact.read("history.json")), folder)


def _component(part: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"name": part} if isinstance(part, str) else dict(part)


def _source(scans: Scans, root: str) -> str:
    """Where the scans are; synthetic ones and lists of files are written below ``root``."""
    if isinstance(scans, int):
        folder = object_store.join(root, f"phantoms-{scans}")
        if not object_store.exists(object_store.join(folder, "dataset.json")):
            phantom.write_dataset(folder, scans, size_vox=(48, 48, 48), classes=3)
        return object_store.join(folder, "dataset.json")
    if isinstance(scans, str):
        return _absolute(scans)
    pairs = (scan if isinstance(scan, tuple) else (scan, "") for scan in scans)
    rows = [(_absolute(image), _absolute(label) if label else "") for image, label in pairs]
    table = pd.DataFrame(rows, columns=["image", "label"]).to_csv(index=False, lineterminator="\r\n")
    uri = object_store.join(root, f"scans-{config.fingerprint(table)}.csv")
    object_store.write(uri, table.encode())
    return uri


def _absolute(place: str | os.PathLike[str]) -> str:
    uri = os.fspath(place)
    return uri if object_store.is_s3(uri) else os.path.abspath(object_store.local_path(uri))
