"""Trained segmentation models, wherever they lie: a folder, an artifact, or the MLflow registry."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field

import numpy as np
import torch

from logonet import networks, tracking
from logonet.core import config
from logonet.core.errors import UserError
from logonet.data import importers, manifest, volume
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
        artifact: the finetuning it is of, when that is at hand.
        infer: windows and mirroring.
        device: where it runs; None takes a GPU where there is one.
    """

    uri: str
    folder: dict[str, bytes]
    id: str
    lineage: dict[str, str]
    seen: bytes | None = None
    artifact: Artifact | None = None
    infer: sliding_window.Config = field(default_factory=sliding_window.Config)
    device: str | None = None

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
            net = networks.from_component(spec.backbone, spec.in_channels, spec.num_outputs)
        millions = sum(p.numel() for p in net.parameters()) / 1e6
        size_mm = "x".join(f"{s:g}" for s in spec.spacing_mm or ())
        spacing = f"{size_mm} mm" if size_mm else "the scan's own spacing"
        return (
            f"LoadedModel({self.uri}: {spec.backbone.name} with {millions:.1f} M parameters, {spec.modality}, "
            f"windows of {'x'.join(map(str, spec.size_vox))} voxels at {spacing}, "
            f"classes {', '.join(spec.classes[1:])})"
        )


def load_model(
    uri: str, *, infer: sliding_window.Config | None = None, device: str | None = None
) -> LoadedModel:
    """A trained segmentation model.

    Args:
        uri: a finetuning artifact (ROOT/finetune/ID), a model folder (local or s3://), or a registered model
            (models:/NAME@alias or models:/NAME/VERSION).
        infer: windows and mirroring; None for the defaults.
        device: such as "cpu" or "cuda:0"; None takes a GPU where there is one.

    Raises:
        UserError: nothing is there, or it is no segmentation model that runs.

    Example:
        >>> model = logonet.load_model("models:/logonet-seg-liver@champion")
        >>> labels_XYZ = model.segment("s3://scans/patient7.nii.gz")
    """
    files, lineage, seen, artifact = _find(uri)
    digests = {name: hashlib.sha256(blob).hexdigest() for name, blob in files.items()}
    model.build(*model.parse(files, uri))  # a model that cannot run says so here
    own_id, windows = config.fingerprint(digests), infer or sliding_window.Config()
    return LoadedModel(uri, files, own_id, lineage, seen, artifact, windows, device)


def _find(uri: str) -> tuple[dict[str, bytes], dict[str, str], bytes | None, Artifact | None]:
    """The model's files, its lineage, the scans it has seen, and the finetuning artifact that it is of."""
    if uri.startswith("models:/"):
        blobs, lineage = fetch_registered(uri)
        if not set(model.FILES) <= blobs.keys():
            raise UserError(f"{uri} is no segmentation model; it holds {', '.join(sorted(blobs))}")
        return {n: blobs[n] for n in model.FILES}, lineage, blobs.get(SEEN_FILE), None
    artifact = artifacts.find(uri)
    if artifact is None:
        blobs = {n: object_store.read(object_store.join(uri, n)) for n in model.FILES}
        return blobs, {"model_folder": uri}, None, None
    if artifact.stage != "finetune":
        raise UserError(f"{uri} is a '{artifact.stage}' artifact; give a finetuning one, ROOT/finetune/ID")
    lineage = {**artifact.parents, "finetune": artifact.fingerprint, "finetune_uri": artifact.uri}
    return model_files(artifact), lineage, artifact.read(SEEN_FILE), artifact


def model_files(artifact: Artifact) -> dict[str, bytes]:
    """The model folder of a finetuning artifact."""
    return {n: artifact.read(f"{MODEL_FOLDER}/{n}") for n in model.FILES}


def fetch_registered(uri: str) -> tuple[dict[str, bytes], dict[str, str]]:
    """The files of a registered model by name, and its lineage.

    "registered" in the lineage is the version that an alias stood for.
    """
    version = tracking.lineage(uri)["model"]
    with tempfile.TemporaryDirectory() as folder:
        place = tracking.download(version, folder)
        blobs = {name: object_store.read(os.path.join(place, name)) for name in os.listdir(place)}
    return blobs, {"registered": version, **json.loads(blobs.get(LINEAGE_FILE, b"{}"))}
