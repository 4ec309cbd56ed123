"""Synthetic trunks: deterministic, varied, learnable along Z, and written as a Decathlon task."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from logonet.core.errors import UserError
from logonet.data import phantom, volume
from logonet.data.phantom import ORGANS

SMALL = (32, 32, 32)


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_pure_in_the_seed(modality: str) -> None:
    (a, labels_a), (b, labels_b), (c, labels_c) = (
        phantom.phantom(seed, SMALL, modality=modality) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(a.array_CXYZ, b.array_CXYZ)
    np.testing.assert_array_equal(labels_a, labels_b)
    assert not np.array_equal(labels_a, labels_c)
    assert np.mean(a.array_CXYZ != c.array_CXYZ) > 0.3


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("seed", range(3))
def test_intensities_look_like_the_modality(modality: str, seed: int) -> None:
    scan, labels_XYZ = phantom.phantom(seed, modality=modality, classes=phantom.ALWAYS + 1)
    array_XYZ = scan.array_CXYZ[0]
    assert volume.modality(scan, None, "phantom") == modality
    np.testing.assert_array_equal(array_XYZ, array_XYZ.astype(np.int16))
    if modality == "CT":
        assert array_XYZ.min() < -950
        assert array_XYZ.max() > 500  # bone
    else:
        assert array_XYZ.min() == 0
        assert np.mean(array_XYZ == 0) > 0.2  # background
    column = 2 if modality == "CT" else 3
    for label, organ in enumerate(list(ORGANS.values())[: phantom.ALWAYS], start=1):
        inside = array_XYZ[labels_XYZ == label]
        assert len(inside) > 50
        # 8 % of one organ to another, 20 % bias along each axis, soft edges
        assert abs(np.median(inside) / organ[column] - 1) < (0.2 if modality == "CT" else 0.8)


def test_all_organs_are_there() -> None:
    _, labels_XYZ = phantom.phantom(1, classes=phantom.MAX_CLASSES)
    assert np.bincount(labels_XYZ.ravel(), minlength=phantom.MAX_CLASSES).min() > 20


def test_classes_cut_the_list_of_organs_but_not_the_picture() -> None:
    all_scan, all_XYZ = phantom.phantom(3, SMALL, classes=6)
    scan, labels_XYZ = phantom.phantom(3, SMALL, classes=3)
    np.testing.assert_array_equal(scan.array_CXYZ, all_scan.array_CXYZ)
    np.testing.assert_array_equal(labels_XYZ, np.where(all_XYZ < 3, all_XYZ, 0))
    assert set(np.unique(labels_XYZ)) == {0, 1, 2}
    for classes, modality in ((0, "CT"), (15, "CT"), (3, "PT")):
        with pytest.raises(UserError, match="1 to 14 classes"):
            phantom.phantom(0, SMALL, modality=modality, classes=classes)


@pytest.mark.parametrize("orientation", ["LPS", "SAR", "PIR"])
def test_orientation_moves_voxels_not_anatomy(orientation: str) -> None:
    size_vox, spacing_mm = (20, 24, 28), (1.5, 2.0, 3.0)
    plain, labels_XYZ = phantom.phantom(0, size_vox, spacing_mm)
    turned, turned_labels = phantom.phantom(0, size_vox, spacing_mm, orientation=orientation)
    assert (plain.orientation, turned.orientation) == ("RAS", orientation)
    np.testing.assert_allclose(plain.spacing_mm, spacing_mm)
    back = volume.to_ras(turned)
    np.testing.assert_array_equal(back.array_CXYZ, plain.array_CXYZ)
    np.testing.assert_allclose(back.affine, plain.affine)
    labels = volume.Volume(turned_labels[None], turned.affine)
    np.testing.assert_array_equal(volume.to_ras(labels).array_CXYZ[0], labels_XYZ)


def test_slices_tell_their_height() -> None:
    """The nearest slice of another anatomy lies at nearly the same height: Z can be learned."""
    a, b = (phantom.phantom(seed, (48, 48, 48))[0].array_CXYZ[0].reshape(-1, 48).T for seed in (0, 1))
    nearest_Z = ((a[:, None] - b[None]) ** 2).mean(-1).argmin(axis=1)
    correlation = np.corrcoef(nearest_Z, np.arange(48))[0, 1]
    assert correlation > 0.7


def test_write_dataset(tmp_path: Path) -> None:
    uri = phantom.write_dataset(str(tmp_path / "a"), 3, seed=5, size_vox=SMALL, classes=3)
    assert uri == f"{tmp_path}/a/dataset.json"
    description = json.loads(Path(uri).read_text())
    assert description["labels"] == {"0": "background", "1": "liver", "2": "spleen"}
    orientations = []
    for i, item in enumerate(description["training"]):
        image, label = (nib.load(tmp_path / "a" / item[k]) for k in ("image", "label"))
        assert image.get_data_dtype() == np.int16
        assert label.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(image.affine, label.affine)
        assert set(np.unique(np.asarray(label.dataobj))) == {0, 1, 2}
        orientations.append("".join(nib.aff2axcodes(image.affine)))
        assert item["image"] == f"./imagesTr/phantom_{i:03d}.nii.gz"
    assert orientations == ["RAS", "LPS", "LAS"]
    phantom.write_dataset(str(tmp_path / "b"), 2, seed=5, size_vox=SMALL, classes=3)
    for path in sorted((tmp_path / "b").rglob("*.nii.gz")):
        twin = tmp_path / "a" / path.relative_to(tmp_path / "b")
        assert path.read_bytes() == twin.read_bytes()
        assert gzip.decompress(path.read_bytes())[344:348] == b"n+1\0"
