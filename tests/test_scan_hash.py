"""Prints of phantoms and of real scans, and copies that must keep them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import tilted

from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.data import scan_hash, volume
from logonet.data.phantom import phantom
from logonet.data.volume import Volume

DATA = Path(__file__).parents[2] / "shared" / "data"


def turned(scan: Volume, orientation: str = "LSP") -> Volume:
    """The same scan stored along other axes, with an affine that says so."""
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(scan.affine), nib.orientations.axcodes2ornt(orientation)
    )
    array_XYZ = nib.orientations.apply_orientation(scan.array_CXYZ[0], turn)
    affine = scan.affine @ nib.orientations.inv_ornt_aff(turn, scan.shape_xyz)
    return replace(scan, array_CXYZ=array_XYZ[None], affine=affine)


def coarser(scan: Volume) -> Volume:
    return volume.resample(scan, [1.5 * s for s in volume.to_ras(scan).spacing_mm])


def rescaled(scan: Volume) -> Volume:
    return replace(scan, array_CXYZ=0.37 * scan.array_CXYZ + 512)


def noisy(scan: Volume) -> Volume:
    noise = seeding.rng(0, "noise").standard_normal(scan.array_CXYZ.shape, dtype=np.float32)
    return replace(scan, array_CXYZ=scan.array_CXYZ + 0.1 * scan.array_CXYZ.std() * noise)


def eight_bit(scan: Volume) -> Volume:
    low, high = np.percentile(scan.array_CXYZ, [1, 99])
    return replace(scan, array_CXYZ=np.rint(255 * volume.window(scan.array_CXYZ, (low, high))))


COPIES: list[Callable[[Volume], Volume]] = [
    turned,
    coarser,
    rescaled,
    noisy,
    eight_bit,
    lambda scan: noisy(rescaled(turned(coarser(scan), "PIR"))),
]


def similarity(a: str, b: str) -> float:
    row_P, other_P = scan_hash.unit_rows([a, b])
    return float(row_P @ other_P)


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_keeps_the_print(modality: str, copy: Callable[[Volume], Volume]) -> None:
    scan = tilted(phantom(3, (48, 40, 44), (2.0, 2.0, 2.2), modality, orientation="LAS")[0], 7)
    print_ = scan_hash.perceptual_hash(scan)
    assert similarity(print_, scan_hash.perceptual_hash(copy(scan))) > 0.94 > scan_hash.SAME


@pytest.mark.parametrize("orientation", ["LPS", "SAR", "AIL"])
def test_axes_change_neither_digest_nor_print(orientation: str) -> None:
    scan, _ = phantom(0, (21, 17, 13))
    other = turned(scan, orientation)
    assert other.shape_xyz != scan.shape_xyz or orientation == "LPS"
    assert scan_hash.voxel_sha256(other) == scan_hash.voxel_sha256(scan)
    assert scan_hash.perceptual_hash(other) == scan_hash.perceptual_hash(scan)


def test_the_digest_sees_voxels_and_not_the_file() -> None:
    scan, _ = phantom(0, (16, 15, 14))
    voxels_XYZ = scan.array_CXYZ[0].astype(np.int16)
    moved = scan.affine.copy()
    moved[:3, 3] += 100
    moved[:3, :3] *= 2
    files = [
        volume.encode_nifti(voxels_XYZ, scan.affine),
        volume.encode_nifti(voxels_XYZ.astype(np.float32), moved),
        nib.Nifti1Image(voxels_XYZ.astype(np.float64), scan.affine).to_bytes(),
    ]
    digests = {scan_hash.voxel_sha256(volume.decode_nifti(data, "x.nii")) for data in files}
    assert digests == {scan_hash.voxel_sha256(scan)}

    voxels = scan.array_CXYZ.copy()
    voxels[0, 5, 5, 5] += 1
    assert scan_hash.voxel_sha256(replace(scan, array_CXYZ=voxels)) not in digests
    flat = replace(scan, array_CXYZ=scan.array_CXYZ.reshape(1, 15, 16, 14))
    assert scan_hash.voxel_sha256(flat) not in digests


def test_minus_zero_is_zero_and_memory_order_does_not_matter() -> None:
    scan, _ = phantom(0, (9, 8, 7), modality="MR")
    zeros = replace(scan, array_CXYZ=np.where(scan.array_CXYZ == 0, np.float32(-0.0), scan.array_CXYZ))
    fortran = replace(scan, array_CXYZ=np.asfortranarray(scan.array_CXYZ))
    for other in (zeros, fortran):
        assert scan_hash.voxel_sha256(other) == scan_hash.voxel_sha256(scan)


@pytest.mark.parametrize("n", [2, 5, 12, 13, 40])
def test_weights_average_the_linear_interpolant(n: int) -> None:
    samples = seeding.rng(0, "samples", n).standard_normal(n)
    steps = 4000
    t = (np.arange(scan_hash.GRID * steps) + 0.5) / (scan_hash.GRID * steps) * (n - 1)
    slow = np.interp(t, np.arange(n), samples).reshape(scan_hash.GRID, steps).mean(1)
    np.testing.assert_allclose(scan_hash._weights(n) @ samples, slow, atol=1e-5)


def test_the_smallest_scans_have_a_print() -> None:
    scan = Volume(np.arange(6, dtype=np.float32).reshape(1, 3, 2, 1), np.eye(4))
    print_ = scan_hash.perceptual_hash(scan)
    assert len(print_) == scan_hash.GRID**3
    assert similarity(print_, print_) == pytest.approx(1, abs=1e-5)


def test_rows_are_the_slow_correlation() -> None:
    prints = [scan_hash.perceptual_hash(phantom(i, (20, 20, 20))[0]) for i in range(3)]
    levels = np.array([[int(c, 16) for c in p] for p in prints])
    rows_NP = scan_hash.unit_rows(prints)
    np.testing.assert_allclose(rows_NP @ rows_NP.T, np.corrcoef(levels), atol=1e-5)


def test_prints_of_another_version_are_refused() -> None:
    with pytest.raises(UserError, match="import its scans again"):
        similarity("0" * scan_hash.GRID**3, "0" * 8)


# ------------------------------------------------------------------------------------------- real scans


@pytest.fixture(scope="module")
def real() -> list[Volume]:
    files = sorted((DATA / "Task04_Hippocampus" / "imagesTr").glob("*.nii.gz"))
    files += sorted(p for p in (DATA / "scans").glob("*.nii.gz") if "labels" not in p.name)
    if len(files) < 100:
        pytest.skip(f"no real scans below {DATA}")
    return [volume.decode_nifti(p.read_bytes(), p.name) for p in files]


def _similar(scans: list[Volume], copy: Callable[[Volume], Volume]) -> Iterator[float]:
    for scan in scans:
        yield similarity(scan_hash.perceptual_hash(scan), scan_hash.perceptual_hash(copy(scan)))


def test_different_real_scans_are_far_below_the_threshold(real: list[Volume]) -> None:
    rows_NP = scan_hash.unit_rows([scan_hash.perceptual_hash(scan) for scan in real])
    similar_NN = rows_NP @ rows_NP.T
    largest = similar_NN[np.triu_indices(len(real), 1)].max()
    assert largest == pytest.approx(0.73, abs=0.01)
    assert largest < scan_hash.SAME - 0.1


@pytest.mark.parametrize("copy", COPIES)
def test_copies_of_real_scans_are_above_the_threshold(
    real: list[Volume], copy: Callable[[Volume], Volume]
) -> None:
    assert min(_similar([*real[:200:10], *real[200:]], copy)) > scan_hash.SAME + 0.09
