"""Phantoms in the layouts and with the classes of the public datasets, to try a recipe on without them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.data.phantom import ORGANS, phantom
from logonet.data.volume import Volume, encode_nifti
from logonet.storage import object_store

Size = tuple[int, int, int]
Spacing = tuple[float, float, float]
# The phantom's organ that stands for each organ of BTCV, in the order of BTCV's numbers.
BTCV = (
    "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland",
)  # fmt: skip
BTCV_NUMBERS = (*range(1, 11), *range(21, 41))
FLARE = ("liver", "kidney", "spleen", "pancreas")
ALL = len(ORGANS) + 1


def _case(seed: int, size_vox: Size, spacing_mm: Spacing, modality: str = "CT") -> tuple[Volume, np.ndarray]:
    return phantom(seeding.integer(seed, "dataset"), size_vox, spacing_mm, modality, ALL)


def _renumbered(labels_XYZ: np.ndarray, value_of: Sequence[int]) -> np.ndarray:
    """Label i of the phantom becomes ``value_of[i - 1]``; those beyond are background."""
    table = np.zeros(ALL, np.int16)
    table[1 : 1 + len(value_of)] = value_of
    return table[labels_XYZ]


def _write(uri: str, array_XYZ: np.ndarray, affine: np.ndarray) -> None:
    object_store.write(uri, encode_nifti(array_XYZ.astype(np.int16), affine))


def _nnunet(
    root: str,
    names: Sequence[str],
    labels: dict[str, int],
    value_of: Sequence[int],
    size_vox: Size,
    spacing_mm: Spacing,
    modality: str = "CT",
    contrasts: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
) -> None:
    """imagesTr, labelsTr and a dataset.json that names the channels and the classes.

    Args:
        contrasts: name and make of each channel; None is the scan's own under the name of its modality.
    """
    contrasts = contrasts or {modality: lambda array_XYZ: array_XYZ}
    for i, name in enumerate(names):
        scan, labels_XYZ = _case(i, size_vox, spacing_mm, modality)
        for channel, contrast in enumerate(contrasts.values()):
            uri = object_store.join(root, f"imagesTr/{name}_{channel:04d}.nii.gz")
            _write(uri, contrast(scan.array_CXYZ[0]), scan.affine)
        renumbered_XYZ = _renumbered(labels_XYZ, value_of)
        _write(object_store.join(root, f"labelsTr/{name}.nii.gz"), renumbered_XYZ, scan.affine)
    description = {
        "channel_names": {str(channel): name for channel, name in enumerate(contrasts)},
        "labels": {"background": 0, **labels},
        "numTraining": len(names),
        "file_ending": ".nii.gz",
    }
    object_store.write(object_store.join(root, "dataset.json"), json.dumps(description, indent=1).encode())


def synapse(root: str, size_vox: Size) -> None:
    """BTCV's 30 CTs, img0001 to img0040, with 13 organs."""
    numbers = {name: i for i, name in enumerate(BTCV, start=1)}
    names = [f"img{n:04d}" for n in BTCV_NUMBERS]
    _nnunet(root, names, numbers, [numbers[organ] for organ in ORGANS], size_vox, (1.5, 1.5, 2.0))


def flare(root: str, size_vox: Size) -> None:
    """Ten CTs with four organs; both kidneys are one."""
    numbers = {name: i for i, name in enumerate(FLARE, start=1)}
    one = {"right kidney": "kidney", "left kidney": "kidney"}
    value_of = [numbers.get(one.get(organ, organ), 0) for organ in ORGANS]
    names = [f"train_{i:03d}" for i in range(10)]
    _nnunet(root, names, numbers, value_of, size_vox, (1.0, 1.0, 1.2))


def amos(root: str, size_vox: Size) -> None:
    """Ten CTs with 15 classes, two of which no scan has."""
    adrenals = ("right adrenal gland", "left adrenal gland")
    classes = (*BTCV[:8], "postcava", "pancreas", *adrenals, "duodenum", "bladder", "prostate uterus")
    numbers = {name: i for i, name in enumerate(classes, start=1)}
    other = {"inferior vena cava": "postcava", "portal and splenic veins": "duodenum"}
    value_of = [numbers.get(other.get(organ, organ), 0) for organ in ORGANS]
    names = [f"amos_{i:04d}" for i in range(10)]
    _nnunet(root, names, numbers, value_of, size_vox, (1.5, 1.5, 2.0))


def feta(root: str, size_vox: Size) -> None:
    """Ten MRs of seven tissues."""
    tissues = (
        "external cerebrospinal fluid", "grey matter", "white matter", "ventricles", "cerebellum",
        "deep grey matter", "brainstem",
    )  # fmt: skip
    numbers = {name: i for i, name in enumerate(tissues, start=1)}
    names = [f"sub-{i:03d}" for i in range(10)]
    _nnunet(root, names, numbers, range(1, 8), size_vox, (0.8, 0.8, 0.8), "MR")


def mmwhs(root: str, size_vox: Size) -> None:
    """Ten CTs whose labels have values up to 850 and no names."""
    for i in range(10):
        scan, labels_XYZ = _case(i, size_vox, (1.5, 1.5, 2.0))
        stem = object_store.join(root, f"ct_train_{1001 + i}")
        _write(f"{stem}_image.nii.gz", scan.array_CXYZ[0], scan.affine)
        values = (500, 600, 420, 550, 205, 820, 850)
        _write(f"{stem}_label.nii.gz", _renumbered(labels_XYZ, values), scan.affine)


def lesions(root: str, size_vox: Size) -> None:
    """Ten CTs, each with one structure that stands for its lesions."""
    for i in range(10):
        scan, labels_XYZ = _case(i, size_vox, (1.5, 1.5, 2.0))
        stem = object_store.join(root, f"volume-covid19-A-{i:04d}")
        _write(f"{stem}_ct.nii.gz", scan.array_CXYZ[0], scan.affine)
        _write(f"{stem}_seg.nii.gz", _renumbered(labels_XYZ, (1,)), scan.affine)


def acdc(root: str, size_vox: Size) -> None:
    """Two labelled frames of each of ten patients beside the whole cine, in slices of 10 mm."""
    x, y, _ = size_vox
    for patient in range(10):
        own = object_store.join(root, f"patient{patient + 1:03d}")
        for frame in (1, 12):
            scan, labels_XYZ = _case(100 * patient + frame, (x, y, 10), (1.5, 1.5, 10.0), "MR")
            name = object_store.join(own, f"patient{patient + 1:03d}_frame{frame:02d}")
            _write(f"{name}.nii.gz", scan.array_CXYZ[0], scan.affine)
            _write(f"{name}_gt.nii.gz", _renumbered(labels_XYZ, (1, 2, 3)), scan.affine)
        cine_XYZT = np.repeat(scan.array_CXYZ[0][..., None], 20, -1)
        _write(object_store.join(own, f"patient{patient + 1:03d}_4d.nii.gz"), cine_XYZT, scan.affine)


def _brains(root: str, size_vox: Size, labels: dict[str, int], value_of: Sequence[int]) -> None:
    contrasts: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "FLAIR": lambda array_XYZ: array_XYZ,
        "T1w": lambda array_XYZ: (array_XYZ.max() - array_XYZ) * (array_XYZ > 0),
        "T1gd": np.sqrt,
        "T2w": lambda array_XYZ: array_XYZ**1.2,
    }
    names = [f"BRATS_{i + 1:03d}" for i in range(20)]
    _nnunet(root, names, labels, value_of, size_vox, (1.0, 1.0, 1.0), "MR", contrasts)


def msd_brain(root: str, size_vox: Size) -> None:
    """Four channels of 20 brains with MSD's names and numbers."""
    _brains(root, size_vox, {"edema": 1, "non-enhancing tumor": 2, "enhancing tumour": 3}, (1, 2, 3))


def brats21(root: str, size_vox: Size) -> None:
    """Four channels of 20 brains with the numbers of BraTS 2021, whose enhancing tumour is 4."""
    _brains(root, size_vox, {"necrotic tumor core": 1, "edema": 2, "enhancing tumor": 4}, (2, 1, 4))


def heart(root: str, size_vox: Size) -> None:
    """Ten MRs of one class."""
    names = [f"la_{i:03d}" for i in range(10)]
    _nnunet(root, names, {"left atrium": 1}, (1,), size_vox, (1.25, 1.25, 1.37), "MR")


def tumour(root: str, size_vox: Size) -> None:
    """Ten CTs of an organ and its tumour."""
    names = [f"pancreas_{i:03d}" for i in range(10)]
    _nnunet(root, names, {"pancreas": 1, "cancer": 2}, (1, 2), size_vox, (0.8, 0.8, 2.5))


DATASETS: dict[str, Callable[[str, Size], None]] = {
    f.__name__: f
    for f in (synapse, flare, amos, feta, mmwhs, lesions, acdc, msd_brain, brats21, heart, tumour)
}


def write(name: str, root: str, size_vox: Size = (48, 44, 40)) -> None:
    """Write the dataset ``name`` under ``root``; ``size_vox`` is each scan's, along R, A and S."""
    if name not in DATASETS:
        raise UserError(f"there are no phantoms of '{name}'; choose one of {', '.join(DATASETS)}")
    DATASETS[name](root, size_vox)
