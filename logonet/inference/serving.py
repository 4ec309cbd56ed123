"""A registered segmentation model for ``mlflow.pyfunc`` and ``mlflow models serve``.

Two kinds of request, of any size and number of scans:

- an array of raw intensities (Hounsfield units for CT) in RAS axes at the model's voxel size; the answer is
  an array of label values. As HTTP: ``{"inputs": [...]}``;
- a table with a column ``nifti`` of ``.nii`` or ``.nii.gz`` files as base64 text; the answer is a table with
  their label maps, on each scan's own voxels. As HTTP: ``{"dataframe_split": {"columns": ["nifti"], ...}}``.

A bad request gets one sentence, which the server sends with status 400.

Letters: B scans, C channels, XYZ axes of a scan.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from logonet.core.errors import BadScan, UserError
from logonet.data import volume
from logonet.data.volume import Volume
from logonet.inference import metrics
from logonet.inference.sliding_window import Predictor


def _load_pyfunc(path: str) -> Served:
    """MLflow calls this with the folder of a model's files; see `logonet.inference.model`."""
    return Served(Predictor.load(path))


class Served:
    """The model behind ``predict``. It segments one scan at a time, which limits its memory."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, self.spec = predictor, predictor.spec
        self._one = threading.Lock()

    def predict(
        self, model_input: np.ndarray | pd.DataFrame | list[Any], params: Mapping[str, Any] | None = None
    ) -> np.ndarray | pd.DataFrame:
        """Segment an array or a table of scans.

        Args:
            model_input: an array (B, C, X, Y, Z), (B, X, Y, Z) or (X, Y, Z); or a DataFrame with a column
                ``nifti`` of base64 text or bytes and, if known, a column ``modality``.
            params: ``modality``, "CT" or "MR", of scans whose table does not name it. A model trained on both
                needs it where the intensities are ambiguous.

        Returns:
            uint8 labels (B, X, Y, Z); or a DataFrame with ``nifti`` (base64 ``.nii.gz`` of the label map) and
            ``volumes_ml`` (JSON, millilitres by class name).

        Raises:
            UserError: for a bad request or scan.
        """
        hint = str((params or {}).get("modality") or "") or None
        if isinstance(model_input, pd.DataFrame):
            return self._table(model_input, hint)
        return self._arrays(self._as_BCXYZ(model_input), hint)

    def _as_BCXYZ(self, given: Any) -> np.ndarray:
        try:
            array = np.asarray(given, np.float32)
        except (ValueError, TypeError):
            raise UserError(
                "inputs must be an array of numbers whose scans have one size; send scans of several sizes "
                "one by one, or as a table with a column 'nifti'"
            ) from None
        channels = self.spec.in_channels
        if array.ndim == 3:
            array = array[None]
        if array.ndim == 4:
            array = array[:, None]
        if array.ndim != 5 or array.shape[1] != channels or not array.size:
            raise UserError(
                f"inputs have shape {np.shape(given)}; the model wants (scans, {channels}, X, Y, Z)"
                + (", (scans, X, Y, Z) or (X, Y, Z)" if channels == 1 else "")
            )
        if not np.isfinite(array).all():
            raise UserError(
                "inputs hold values that are not finite numbers; send Hounsfield units or MR values"
            )
        return array

    def _arrays(self, scans_BCXYZ: np.ndarray, hint: str | None) -> np.ndarray:
        affine = np.diag([*(self.spec.spacing_mm or (1.0, 1.0, 1.0)), 1.0])
        labels = []
        for b, array_CXYZ in enumerate(scans_BCXYZ):
            scan, name = Volume(array_CXYZ, affine), f"scan {b}"
            # A part of a CT may hold no negative value, so the model's own modality decides.
            modality = self.spec.one_modality or volume.modality(scan, hint, name)
            labels.append(self._segment(scan, modality, name))
        return np.stack(labels)

    def _table(self, table: pd.DataFrame, hint: str | None) -> pd.DataFrame:
        if "nifti" not in table.columns:
            raise UserError(f"the table has columns {list(table.columns)}; it must have one named 'nifti'")
        hint = hint or self.spec.one_modality or None
        given = table["modality"] if "modality" in table.columns else [None] * len(table)
        classes = dict(list(zip(self.spec.label_values, self.spec.classes))[1:])
        maps, volumes_ml = [], []
        for row, (cell, said) in enumerate(zip(table["nifti"], given)):
            name = f"row {row}"
            data = _decoded(cell, name)
            scan = volume.decode_nifti(data, name)
            modality = volume.modality(scan, said if isinstance(said, str) else hint, name)
            labels_XYZ = self._segment(scan, modality, name)
            maps.append(base64.b64encode(volume.encode_labels(labels_XYZ, data, scan.affine)).decode())
            in_ml = metrics.volumes_ml(labels_XYZ, scan.affine, classes, digits=6)
            volumes_ml.append(json.dumps(in_ml))
        return pd.DataFrame({"nifti": maps, "volumes_ml": volumes_ml}, index=table.index)

    def _segment(self, scan: Volume, modality: str, name: str) -> np.ndarray:
        with self._one:
            return self.predictor.segment(scan, modality, name)


def _decoded(cell: Any, name: str) -> bytes:
    if isinstance(cell, bytes):
        return cell
    try:
        return base64.b64decode(cell, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise BadScan(f"{name}: its 'nifti' is not base64 text; encode the file's bytes as base64") from None
