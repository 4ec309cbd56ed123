"""Synthetic CT- and MR-like trunks with organ labels, for the demo and the tests: ours, free to ship.

Every seed gives another anatomy (positions, sizes and intensities of organs) of the same body plan, which
changes along Z, so both "which slice is this" and "which organ is this" can be learned from few scans.
Coordinates u are in [-1, 1] along each RAS axis. Shape suffixes: X Y Z voxel axes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import nibabel as nib
import numpy as np

from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.data.volume import Volume, encode_nifti
from logonet.storage import object_store

# name: (centre u_xyz, radii u_xyz, HU, MR intensity); the first ``classes - 1`` are labelled 1, 2, ...
ORGANS = {
    "liver": ((0.36, 0.02, -0.20), (0.36, 0.34, 0.34), 110.0, 420.0),
    "spleen": ((-0.46, -0.10, -0.10), (0.20, 0.24, 0.24), 170.0, 560.0),
    "right kidney": ((0.30, -0.26, -0.62), (0.14, 0.14, 0.26), 240.0, 640.0),
    "left kidney": ((-0.30, -0.26, -0.56), (0.14, 0.14, 0.26), 240.0, 640.0),
    "aorta": ((-0.06, -0.20, 0.00), (0.08, 0.08, 4.00), 350.0, 800.0),
    "gallbladder": ((0.20, 0.24, -0.36), (0.10, 0.10, 0.14), 300.0, 900.0),
    "esophagus": ((-0.06, -0.08, 0.55), (0.07, 0.07, 0.45), 190.0, 350.0),
    "stomach": ((-0.26, 0.20, -0.12), (0.20, 0.16, 0.20), 400.0, 500.0),
    "inferior vena cava": ((0.12, -0.20, 0.00), (0.08, 0.07, 3.00), 200.0, 760.0),
    "portal and splenic veins": ((0.04, 0.00, -0.24), (0.24, 0.06, 0.07), 220.0, 720.0),
    "pancreas": ((-0.10, 0.02, -0.40), (0.26, 0.08, 0.08), 90.0, 460.0),
    "right adrenal gland": ((0.24, -0.18, -0.28), (0.08, 0.06, 0.08), 130.0, 480.0),
    "left adrenal gland": ((-0.24, -0.18, -0.26), (0.08, 0.06, 0.08), 130.0, 480.0),
}
ALWAYS = 5  # organs that every phantom has; the others are there from where they are labelled on
FAT, MUSCLE, LUNG, BONE, DISC = (-100.0, 700.0), (45.0, 300.0), (-850.0, 20.0), (700.0, 90.0), (90.0, 350.0)
LUNGS = (((0.38, 0.05, 0.55), (0.26, 0.36, 0.50)), ((-0.38, 0.05, 0.55), (0.26, 0.36, 0.50)))
SPINE = ((0.0, -0.40, 0.0), (0.13, 0.13, 8.0))
MAX_CLASSES = len(ORGANS) + 1
VERTEBRAE = 9


def phantom(
    seed: int,
    size_vox: tuple[int, int, int] = (64, 64, 64),
    spacing_mm: tuple[float, float, float] = (1.5, 1.5, 2.0),
    modality: str = "CT",
    classes: int = 4,
    orientation: str = "RAS",
) -> tuple[Volume, np.ndarray]:
    """A scan and its labels_XYZ uint8 in 0..classes-1, pure in the arguments.

    ``size_vox`` and ``spacing_mm`` are along R, A, S; the arrays come in the axes that ``orientation`` names,
    with an affine that says so. CT values are integers in HU (air -1000), MR values integers from 0, with a smooth
    bias field.
    """
    if modality not in ("CT", "MR") or not 1 <= classes <= MAX_CLASSES:
        raise UserError(f"a phantom is CT or MR with 1 to {MAX_CLASSES} classes, not {modality}, {classes}")
    rng = seeding.rng(seed, "phantom")
    column = ("CT", "MR").index(modality)
    u_xyz = [np.linspace(-1, 1, n, dtype=np.float32) for n in size_vox]
    array_XYZ = np.full(size_vox, (-1000.0, 0.0)[column], np.float32)
    labels_XYZ = np.zeros(size_vox, np.uint8)

    radii = np.array([0.88, 0.66, 1.6]) * rng.uniform(0.93, 1.05, 3)
    body_XYZ = _paint(array_XYZ, FAT[column], u_xyz, (0, 0, 0), radii)
    _paint(array_XYZ, MUSCLE[column], u_xyz, (0, 0, 0), radii * [0.9, 0.88, 1.0])
    for centre, lung_radii in LUNGS:
        _paint(array_XYZ, LUNG[column], u_xyz, *_jitter(rng, centre, lung_radii))
    phase = rng.uniform(0, 2 * np.pi)
    vertebra_Z = 0.5 + 0.5 * np.tanh(4 * np.cos(VERTEBRAE * np.pi * u_xyz[2] + phase))
    _paint(array_XYZ, DISC[column] + (BONE[column] - DISC[column]) * vertebra_Z, u_xyz, *SPINE)
    organs = list(ORGANS.values())[: max(ALWAYS, classes - 1)]
    for label, (centre, organ_radii, *intensity) in enumerate(organs, start=1):
        value = intensity[column] * rng.uniform(0.92, 1.08)
        inside_XYZ = _paint(array_XYZ, value, u_xyz, *_jitter(rng, centre, organ_radii))
        labels_XYZ[inside_XYZ & body_XYZ] = label if label < classes else 0

    array_XYZ = _acquire(array_XYZ, body_XYZ, modality, u_xyz, rng)
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = [-0.5 * s * (n - 1) for s, n in zip(spacing_mm, size_vox)]
    target = nib.orientations.axcodes2ornt(orientation)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), target)
    affine = affine @ nib.orientations.inv_ornt_aff(turn, size_vox)
    array_XYZ, labels_XYZ = (nib.orientations.apply_orientation(a, turn) for a in (array_XYZ, labels_XYZ))
    return Volume(array_XYZ[None], affine, modality), np.ascontiguousarray(labels_XYZ)


def _jitter(
    rng: np.random.Generator, centre: Sequence[float], radii: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    return np.array(centre) + rng.uniform(-0.05, 0.05, 3), np.array(radii) * rng.uniform(0.85, 1.15, 3)


def _paint(
    array_XYZ: np.ndarray,
    value: float | np.ndarray,
    u_xyz: Sequence[np.ndarray],
    centre: Sequence[float] | np.ndarray,
    radii: Sequence[float] | np.ndarray,
) -> np.ndarray:
    """Blend ``value`` (one, or one per Z) into an ellipsoid with a soft edge; bool_XYZ of its inside."""
    x, y, z = (((u - c) / r) ** 2 for u, c, r in zip(u_xyz, centre, radii))
    distance_XYZ = np.sqrt(x[:, None, None] + y[None, :, None] + z[None, None, :], dtype=np.float32)
    soft_XYZ = np.clip((1 - distance_XYZ) * 6 + 0.5, 0, 1)
    array_XYZ += (value - array_XYZ) * soft_XYZ
    return distance_XYZ < 1


def _acquire(
    array_XYZ: np.ndarray,
    body_XYZ: np.ndarray,
    modality: str,
    u_xyz: list[np.ndarray],
    rng: np.random.Generator,
) -> np.ndarray:
    """Texture, noise and, for MR, a bias field and an empty background; integers as scanners store them."""
    from scipy import ndimage

    noise_XYZ = rng.standard_normal(array_XYZ.shape, dtype=np.float32)
    texture_XYZ = 4 * ndimage.gaussian_filter(noise_XYZ, 1.2) + 0.5 * noise_XYZ
    if modality == "CT":
        return np.round(np.maximum(array_XYZ + 15 * texture_XYZ, -1024))
    x, y, z = (1 + rng.uniform(-0.2, 0.2) * u for u in u_xyz)
    bias_XYZ = (x[:, None, None] * y[None, :, None] * z[None, None, :]).astype(np.float32)
    return np.round(np.abs(array_XYZ * bias_XYZ + 20 * texture_XYZ) * body_XYZ)


def write_dataset(
    root_uri: str,
    n: int,
    *,
    seed: int = 0,
    size_vox: tuple[int, int, int] = (64, 64, 64),
    spacing_mm: tuple[float, float, float] = (1.5, 1.5, 2.0),
    modality: str = "CT",
    classes: int = 4,
    orientations: Sequence[str] = ("RAS", "LPS", "LAS"),
) -> str:
    """Write ``n`` labelled phantoms under ``root_uri`` as a Medical Segmentation Decathlon task.

    Orientations are taken in turn, since real collections mix them. Returns the URI of its dataset.json,
    which is written last.
    """
    items = []
    for i in range(n):
        own_seed, orientation = seeding.integer(seed, "case", i), orientations[i % len(orientations)]
        scan, labels_XYZ = phantom(own_seed, size_vox, spacing_mm, modality, classes, orientation)
        image, label = f"imagesTr/phantom_{i:03d}.nii.gz", f"labelsTr/phantom_{i:03d}.nii.gz"
        image_XYZ = scan.array_CXYZ[0].astype(np.int16)
        object_store.write(object_store.join(root_uri, image), encode_nifti(image_XYZ, scan.affine))
        object_store.write(object_store.join(root_uri, label), encode_nifti(labels_XYZ, scan.affine))
        items.append({"image": f"./{image}", "label": f"./{label}"})
    organs = list(ORGANS)[: classes - 1]
    description = {
        "name": f"Phantom{modality}",
        "description": "synthetic trunks with organ labels",
        "licence": "CC0-1.0",
        "tensorImageSize": "3D",
        "modality": {"0": modality},
        "labels": {str(i): name for i, name in enumerate(["background", *organs])},
        "numTraining": n,
        "numTest": 0,
        "training": items,
        "test": [],
    }
    uri = object_store.join(root_uri, "dataset.json")
    object_store.write(uri, json.dumps(description, indent=1).encode())
    return uri
