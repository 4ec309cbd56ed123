"""Trained segmentation models, wherever they lie: a folder, an artifact, or the MLflow registry."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from logonet import tracking
from logonet.core import config
from logonet.core.errors import UserError
from logonet.data import importers, manifest, provenance, volume
from logonet.data.volume import Volume
from logonet.inference import model, sliding_window
from logonet.storage import artifacts, object_store
from logonet.storage.artifacts import Artifact

SEEN_FILE = "seen.parquet"  # the scans that an artifact's weights were trained on
LINEAGE_FILE = "lineage.json"  # of a registered model
MODEL_FOLDER = "model"  # of a finetuning artifact


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to segment scans; `load_model` makes it.

    Attributes:
        uri: where it came from.
        folder: its files (`model.files`).
        id: 16 hex digits of their content.
        lineage: ids of what it was made from.
        seen: the scans it was trained and pretrained on (`logonet.data.provenance`), or None when nobody knows.
        artifacts: the finetunings it is of, when those are at hand: of an ensemble several.
        infer: windows and mirroring.
        device: where it runs; None takes a GPU where there is one.
    """

    uri: str
    folder: dict[str, bytes]
    id: str
    lineage: dict[str, str]
    seen: bytes | None = None
    artifacts: tuple[Artifact, ...] = ()
    infer: sliding_window.Config = field(default_factory=sliding_window.Config)
    device: str | None = None

    @property
    def artifact(self) -> Artifact | None:
        """The finetuning of a model of one network, when that is at hand."""
        return self.artifacts[0] if len(self.artifacts) == 1 else None

    @functools.cached_property
    def spec(self) -> model.Spec:
        """The network, how scans are prepared for it, and what its output channels mean."""
        return model.parse(self.folder, self.uri)[0]

    @functools.cached_property
    def predictor(self) -> sliding_window.Predictor:
        """The network itself, built when it is first needed."""
        spec, weights = model.parse(self.folder, self.uri)
        return sliding_window.Predictor(model.build(spec, weights), spec, self.infer, self.device)

    def segment(self, scan: str | tuple[np.ndarray, np.ndarray], modality: str = "") -> np.ndarray:
        """Label values of every voxel of a scan, labels_XYZ uint8 on the scan's own grid.

        Args:
            scan: a file or DICOM series folder (local or s3://), or (array, affine): array_XYZ or array_CXYZ, and a
                (4, 4) affine from voxel indices to RAS+ mm.
            modality: "CT" or "MR"; empty to take it from the file or from what the model was trained on.

        Raises:
            UserError: there is no scan at that place.
            BadScan: it cannot be used; the sentence says why.
        """
        if isinstance(scan, str):
            source = importers.sources(scan, self.spec.channels)[0]
            blobs, _ = manifest.read_scan(source)
            image, name = manifest.decode(source, blobs), scan
        else:
            array, affine = scan
            array_CXYZ = np.asarray(array, np.float32)
            array_CXYZ = array_CXYZ[None] if array_CXYZ.ndim == 3 else array_CXYZ
            image = Volume(array_CXYZ, np.asarray(affine, np.float64))
            name = "the array"
        hint = modality or image.modality or self.spec.one_modality
        return self.predictor.segment(image, volume.modality(image, hint, name), name)

    def __repr__(self) -> str:
        spec = self.spec
        with torch.device("meta"):  # what the predictor runs has fewer parameters
            net = model.network(spec)
        millions = sum(p.numel() for p in net.parameters()) / 1e6
        names = " + ".join(part.name for part in spec.components)
        size_mm = "x".join(f"{s:g}" for s in spec.spacing_mm or ())
        spacing = f"{size_mm} mm" if size_mm else "the scan's own spacing"
        return (
            f"LoadedModel({self.uri}: {names} with {millions:.1f} M parameters, {spec.modality}, "
            f"windows of {'x'.join(map(str, spec.size_vox))} voxels at {spacing}, "
            f"classes {', '.join(spec.classes[1:])})"
        )


def load_model(
    uri: str, *, infer: sliding_window.Config | None = None, device: str | None = None
) -> LoadedModel:
    """A trained segmentation model.

    Args:
        uri: a finetuning or post-processing artifact (ROOT/finetune/ID), a model folder (local or s3://), or a
            registered model (models:/NAME@alias or models:/NAME/VERSION). Several, joined by commas, are an ensemble,
            which answers with the mean of their probabilities.
        infer: windows and mirroring; None for the defaults.
        device: such as "cpu" or "cuda:0"; None takes a GPU where there is one.

    Raises:
        UserError: nothing is there, or it is no segmentation model that runs, or the members of an ensemble differ in
            classes, channels, preprocessing or window.

    Example:
        >>> model = logonet.load_model("models:/logonet-seg-liver@champion")
        >>> labels_XYZ = model.segment("s3://scans/patient7.nii.gz")
    """
    members = [_find(member) for member in uri.split(",")]
    files, lineage, seen, artifacts = members[0] if len(members) == 1 else _ensemble(uri, members)
    digests = {name: hashlib.sha256(blob).hexdigest() for name, blob in files.items()}
    model.build(*model.parse(files, uri))  # a model that cannot run says so here
    own_id, windows = config.fingerprint(digests), infer or sliding_window.Config()
    return LoadedModel(uri, files, own_id, lineage, seen, artifacts, windows, device)


# A model's files, its lineage, the scans it has seen, and the finetunings that it is of.
Found = tuple[dict[str, bytes], dict[str, str], bytes | None, tuple[Artifact, ...]]


def _ensemble(uri: str, members: Sequence[Found]) -> Found:
    """One model of several. Where their lineages differ it has what each says, joined by commas."""
    uris = uri.split(",")
    if len(set(uris)) < len(uris):
        raise UserError(f"{uri} names a member of the ensemble twice; name each once")
    files, lineages, seen, finetunings = zip(*members)
    spec, weights = model.ensemble([model.parse(own, where) for own, where in zip(files, uris)])
    common = [key for key in lineages[0] if all(key in lineage for lineage in lineages)]
    lineage = {key: ",".join(dict.fromkeys(own[key] for own in lineages)) for key in common}
    known = None if None in seen else provenance.join(*seen)
    return model.files(spec, weights), lineage, known, tuple(a for own in finetunings for a in own)


def _find(uri: str) -> Found:
    if uri.startswith("models:/"):
        blobs, lineage = fetch_registered(uri)
        if not set(model.FILES) <= blobs.keys():
            raise UserError(f"{uri} is no segmentation model; it holds {', '.join(sorted(blobs))}")
        return {n: blobs[n] for n in model.FILES}, lineage, blobs.get(SEEN_FILE), ()
    artifact = artifacts.find(uri)
    if artifact is None:
        blobs = {n: object_store.read(object_store.join(uri, n)) for n in model.FILES}
        return blobs, {"model_folder": uri}, None, ()
    if artifact.stage not in ("finetune", "postprocess"):
        raise UserError(f"{uri} is a '{artifact.stage}' artifact; give a finetuning one, ROOT/finetune/ID")
    lineage = {
        **artifact.parents,
        artifact.stage: artifact.fingerprint,
        f"{artifact.stage}_uri": artifact.uri,
    }
    finetunings = [artifact]
    if artifact.stage == "postprocess":
        there = [artifacts.find(member) for member in artifact.facts["finetunings"]]
        finetunings = [member for member in there if member is not None]
    files = {n: artifact.read(f"{MODEL_FOLDER}/{n}") for n in model.FILES}
    seen = artifact.read(SEEN_FILE) if SEEN_FILE in artifact.files else None
    return files, lineage, seen, tuple(finetunings)


def fetch_registered(uri: str) -> tuple[dict[str, bytes], dict[str, str]]:
    """The files of a registered model by name, and its lineage.

    "registered" in the lineage is the version that an alias stood for.
    """
    version = tracking.lineage(uri)["model"]
    with tempfile.TemporaryDirectory() as folder:
        place = tracking.download(version, folder)
        blobs = {name: object_store.read(os.path.join(place, name)) for name in os.listdir(place)}
    return blobs, {"registered": version, **json.loads(blobs.get(LINEAGE_FILE, b"{}"))}
