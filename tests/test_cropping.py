"""Crops: parity with a slow loop, padding, determinism and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logonet.core import config
from logonet.core.errors import BadScan, UserError
from logonet.core.execution import InProcess
from logonet.data import crop_shards, cropping, manifest, preparing, volume
from logonet.data.volume import Volume
from logonet.storage.parquet import Rows

CFG = cropping.Config(size_vox=(6, 5, 4), per_scan=3, min_image_share=0.0)
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def ct(*shape: int, seed: int = 0) -> Volume:
    """A scan whose every voxel is different, so that a crop tells where it was cut."""
    values = np.random.default_rng(seed).permutation(np.prod(shape)).reshape(1, *shape)
    return Volume((values * (1900 / values.size) - 950).astype(np.float32), AFFINE)


def slow_crop(array_CXYZ: np.ndarray, start: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    out = np.zeros((array_CXYZ.shape[0], *size), np.uint16)
    for c, x, y, z in np.ndindex(out.shape):
        place = (int(start[0]) + x, int(start[1]) + y, int(start[2]) + z)
        if all(0 <= p < n for p, n in zip(place, array_CXYZ.shape[1:])):
            unit = min(max((array_CXYZ[c][place] + 1000.0) / 2000.0, 0.0), 1.0)
            out[c, x, y, z] = round(65535 * unit)
    return out


@pytest.mark.parametrize("shape", [(12, 11, 10), (6, 5, 4), (3, 11, 10), (12, 2, 3), (3, 2, 1)])
def test_crops_equal_the_slow_loop(shape: tuple[int, int, int]) -> None:
    scan = ct(*shape)
    got = cropping.crops_of(scan, "CT", CFG, "scan")
    assert got.shape == (3, 1, 6, 5, 4)
    assert got.dtype == np.uint16
    starts_R3 = cropping.choose_corners(scan.array_CXYZ, CFG.window_hu, CFG, "scan")
    for crop_CXYZ, start in zip(got, starts_R3):
        want = slow_crop(scan.array_CXYZ, start, CFG.size_vox)
        assert np.abs(crop_CXYZ.astype(int) - want.astype(int)).max() <= 1  # float32 against float64
        for axis, (n, m) in enumerate(zip(shape, CFG.size_vox)):
            if n < m:  # in the middle: the same padding on both sides, or one more in front
                before, after = -start[axis], start[axis] + m - n
                assert 0 <= before - after <= 1
            else:
                assert 0 <= start[axis] <= n - m


def test_padding_is_air_in_ct_and_black_in_mr() -> None:
    for scan, modality in ((ct(3, 5, 4), "CT"), (Volume(ct(3, 5, 4).array_CXYZ + 2000, AFFINE), "MR")):
        crop_CXYZ = cropping.crops_of(scan, modality, CFG, "scan")[0]
        assert not crop_CXYZ[:, :2].any()
        assert not crop_CXYZ[:, 5:].any()
        assert crop_CXYZ[:, 2:5].any()


def test_crops_depend_on_seed_and_scan_id_alone() -> None:
    scan = ct(20, 20, 20)
    first = cropping.crops_of(scan, "CT", CFG, "a")
    np.testing.assert_array_equal(first, cropping.crops_of(scan, "CT", CFG, "a"))
    assert not np.array_equal(first, cropping.crops_of(scan, "CT", CFG, "b"))
    assert not np.array_equal(first, cropping.crops_of(scan, "CT", dataclasses.replace(CFG, seed=1), "a"))
    more = cropping.crops_of(scan, "CT", dataclasses.replace(CFG, per_scan=5), "a")
    np.testing.assert_array_equal(more[:3], first)


def test_corners_are_uniform_over_every_place_where_the_box_fits() -> None:
    cfg = dataclasses.replace(CFG, per_scan=2000)
    corners = cropping.candidates((8, 6, 4), cfg, "scan").reshape(-1, 3)
    for axis, places in enumerate((3, 2, 1)):
        counts = np.bincount(corners[:, axis], minlength=places)
        assert len(counts) == places
        # 8000 draws; five standard deviations of a binomial count
        spread = 5 * np.sqrt(8000 * (1 / places) * (1 - 1 / places))
        assert np.abs(counts - 8000 / places).max() <= spread


def test_the_same_scan_in_any_orientation_gives_the_same_crops() -> None:
    scan = ct(12, 11, 10)
    flipped = Volume(
        scan.array_CXYZ[:, ::-1, :, ::-1],
        AFFINE @ np.array([[-1, 0, 0, 11], [0, 1, 0, 0], [0, 0, -1, 9], [0, 0, 0, 1]]),
    )
    swapped = Volume(np.swapaxes(scan.array_CXYZ, 1, 3), AFFINE[:, [2, 1, 0, 3]])
    want = cropping.crops_of(scan, "CT", CFG, "scan")
    for other in (flipped, swapped):
        np.testing.assert_array_equal(cropping.crops_of(other, "CT", CFG, "scan"), want)


def test_a_candidate_with_foreground_is_preferred_to_air() -> None:
    array = np.full((1, 40, 6, 5), -1000, np.float32)
    array[:, 30:] = 40  # a quarter of the field is body
    cfg = cropping.Config(size_vox=(6, 5, 4), per_scan=40, min_foreground=0.5)
    candidates_RK3 = cropping.candidates((40, 6, 5), cfg, "scan")
    starts_R3 = cropping.choose_corners(array, cfg.window_hu, cfg, "scan")
    share_RK = np.clip(candidates_RK3[..., 0] + 6 - 30, 0, 6) / 6
    first_good = (share_RK >= 0.5).argmax(axis=1)
    chosen_R = np.where((share_RK >= 0.5).any(axis=1), first_good, share_RK.argmax(axis=1))
    np.testing.assert_array_equal(starts_R3, candidates_RK3[np.arange(40), chosen_R])
    assert (chosen_R > 0).any()
    anywhere = dataclasses.replace(cfg, min_foreground=0.0)
    np.testing.assert_array_equal(
        cropping.choose_corners(array, cfg.window_hu, anywhere, "scan"), candidates_RK3[:, 0]
    )


def test_mr_is_scaled_by_its_own_percentiles() -> None:
    scan = Volume(ct(12, 11, 10).array_CXYZ * 3 + 5000, AFFINE)
    doubled = Volume(scan.array_CXYZ * 2, AFFINE)
    got = cropping.crops_of(scan, "MR", CFG, "scan")
    np.testing.assert_allclose(
        got.astype(int), cropping.crops_of(doubled, "MR", CFG, "scan").astype(int), atol=1
    )
    low, high = np.percentile(scan.array_CXYZ, CFG.mr_percentiles)
    crop = cropping.cut(
        scan.array_CXYZ, cropping.choose_corners(scan.array_CXYZ, (low, high), CFG, "scan")[0], CFG.size_vox
    )
    want = np.clip((crop - low) / (high - low), 0, 1)
    np.testing.assert_allclose(volume.from_uint16(got[0]), want, atol=2e-5)


def test_resampling_comes_before_cutting() -> None:
    scan = ct(12, 11, 10)
    cfg = dataclasses.replace(CFG, spacing_mm=(1.0, 1.0, 1.5))
    resampled = volume.resample(scan, (1.0, 1.0, 1.5))
    np.testing.assert_array_equal(
        cropping.crops_of(scan, "CT", cfg, "scan"), cropping.crops_of(resampled, "CT", CFG, "scan")
    )


def test_too_small_is_refused_with_the_name() -> None:
    cfg = dataclasses.replace(CFG, min_image_share=0.25)
    with pytest.raises(BadScan, match=r"^knee-12ab: is too small, \(1, 5, 4\) voxels fill 17 % of a crop"):
        cropping.crops_of(ct(1, 5, 4), "CT", cfg, "knee-12ab")
    assert cropping.crops_of(ct(2, 5, 4), "CT", cfg, "knee-12ab").shape == (3, 1, 6, 5, 4)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"size_vox": [0, 4, 4]}, "size_vox"),
        ({"per_scan": 0}, "per_scan"),
        ({"spacing_mm": [1, 1, 0]}, "spacing_mm"),
        ({"window_hu": [100, 100]}, "window_hu"),
        ({"mr_percentiles": [60, 101]}, "mr_percentiles"),
        ({"min_image_share": 2}, "min_image_share"),
        ({"min_foreground": -1}, "min_foreground"),
    ],
)
def test_impossible_configs_are_refused(values: dict, key: str) -> None:
    with pytest.raises(UserError, match=key):
        config.from_dict(cropping.Config, values, "crops")


def test_a_scan_is_cut_once_and_again_only_when_its_shard_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_scans() -> list[crop_shards.CropRef]:
        refs, bad = preparing.cut_scans([row], CFG, f"{tmp_path}/crops", InProcess())
        assert not bad
        return refs

    (tmp_path / "a.nii").write_bytes(volume.encode_nifti(ct(12, 11, 10).array_CXYZ[0], AFFINE))
    row: Any = manifest.inspect(manifest.Source(f"{tmp_path}/a.nii"))
    refs = cut_scans()
    table = crop_shards.CropTable(f"{tmp_path}/crops", Rows.of(refs, crop_shards.CropRef), CFG.size_vox, 1)
    expected = cropping.crops_of(manifest.load(row), row.modality, CFG, row.scan_id)
    np.testing.assert_array_equal(np.stack([table.read(i) for i in range(3)]), expected)
    shard = tmp_path / "crops" / refs[0].shard
    whole = shard.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(manifest, "load", lambda row: pytest.fail("cut again"))
        assert cut_scans() == refs
    shard.write_bytes(whole[:-1])
    assert cut_scans() == refs
    assert shard.read_bytes() == whole
    np.testing.assert_array_equal(np.stack([table.read(i) for i in range(3)]), expected)


def test_config_from_yaml_lists() -> None:
    cfg = config.from_dict(cropping.Config, {"size_vox": [64, 64, 32], "spacing_mm": [1.5, 1.5, 2]}, "crops")
    assert cfg.size_vox == (64, 64, 32)
    assert cfg.spacing_mm == (1.5, 1.5, 2.0)


def test_real_scans_give_crops_with_tissue(shared_data: Path) -> None:
    path = shared_data / "scans" / "ct_trunk_3mm.nii.gz"
    scan = volume.decode_nifti(path.read_bytes(), path.name)
    got = cropping.crops_of(scan, "CT", cropping.Config(size_vox=(64, 64, 64)), "ct_trunk_3mm")
    assert got.shape == (4, 1, 64, 64, 64)
    assert ((volume.from_uint16(got) > cropping.FOREGROUND).mean(axis=(1, 2, 3, 4)) >= 0.1).all()
