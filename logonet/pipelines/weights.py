"""Initial weights of a finetuning: found, and put where every worker can read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from logonet.core.config import Component
from logonet.core.errors import UserError
from logonet.data.preprocessing import Preprocessing
from logonet.inference import model
from logonet.inference.load import SEEN_FILE, fetch_registered
from logonet.storage import artifacts, object_store


@dataclass(frozen=True)
class InitialWeights:
    """Initial weights, at rest where every worker can read them.

    Attributes:
        backbone: the network they belong to; one without a name when the file does not say.
        preparation: how its scans were prepared, or None when unknown.
        size_vox: of the crops that it was trained on, or None when unknown.
        lineage: ids of what they come from.
        seen: the scans they were trained on (`seen`), or None when nobody knows.
    """

    uri: str
    sha256: str
    backbone: Component = Component("")
    preparation: Preprocessing | None = None
    lineage: dict[str, str] = field(default_factory=dict)
    seen: bytes | None = None
    size_vox: tuple[int, int, int] | None = None


def find_weights(source: str, root: str) -> InitialWeights | None:
    """What ``source`` names (see `logonet.pipelines.finetuning.Init.weights`); None for "".

    Raises:
        UserError: nothing is there, or it holds no weights.
    """
    if not source:
        return None
    if source.startswith("models:/"):
        return _registered(source, root)
    if source.endswith(".safetensors"):
        return _copied(object_store.read(source), root, Component(""), None, {"weights_file": source}, None)
    artifact = artifacts.find(source)
    if artifact is None:
        raise UserError(
            f"{source} holds no finished artifact; give a pretraining or finetuning artifact, models:/NAME@alias or a "
            ".safetensors file"
        )
    name = next((n for n in ("best.safetensors", "backbone.safetensors") if n in artifact.files), None)
    if name is None:
        raise UserError(f"{source} is a '{artifact.stage}' artifact, which has no weights of a network")
    own = artifact.config
    return InitialWeights(
        uri=artifact.uri_of(name),
        sha256=artifact.files[name].sha256,
        backbone=Component.of(own["backbone"], "backbone"),
        preparation=Preprocessing.of(own.get("cases") or own["crops"]),
        lineage=_descent(artifact.stage, artifact.fingerprint, artifact.uri, artifact.parents),
        seen=artifact.read(SEEN_FILE) if SEEN_FILE in artifact.files else None,
        size_vox=_size(own.get("crops", {})),
    )


def _descent(stage: str, fingerprint: str, uri: str, parents: Mapping[str, str]) -> dict[str, str]:
    """The lineage that weights hand on: where they were made, and under that stage's name what that came from."""
    return {stage: fingerprint, f"{stage}_uri": uri, **{f"{stage}_{k}": v for k, v in parents.items()}}


def _registered(uri: str, root: str) -> InitialWeights:
    blobs, lineage = fetch_registered(uri)
    if model.WEIGHTS_FILE not in blobs:
        raise UserError(f"{uri} has no {model.WEIGHTS_FILE}; give an encoder or a segmentation model")
    own = json.loads(blobs[model.CONFIG_FILE])
    if "ensemble" in own:
        raise UserError(
            f"{uri} is an ensemble, whose weights are of several networks; give one of its members"
        )
    stage = next((s for s in ("finetune", "pretrain") if s in lineage), None)
    known = {"registered": lineage.pop("registered")}
    if stage is not None:
        known |= _descent(stage, lineage.pop(stage), lineage.pop(f"{stage}_uri"), lineage)
    about = (
        Component.of(own["backbone"], "backbone"),
        Preprocessing.of(own),
        known,
        blobs.get(SEEN_FILE),
        _size(own),
    )
    return _copied(blobs[model.WEIGHTS_FILE], root, *about)


def _size(own: Mapping[str, Any]) -> tuple[int, int, int] | None:
    return tuple(own["size_vox"]) if "size_vox" in own else None  # type: ignore[return-value]  # JSON has lists


def _copied(blob: bytes, root: str, *about: Any) -> InitialWeights:
    """A copy of the weights under ``root``: workers cannot read a file of the driver's machine."""
    digest = hashlib.sha256(blob).hexdigest()
    uri = object_store.join(root, "weights", f"{digest[:16]}.safetensors")
    if not object_store.exists(uri):
        object_store.write(uri, blob)
    return InitialWeights(uri, digest, *about)
