"""Labelled cases: chunks against slices of the whole, where crops fall, and damage that is named.

Shapes: C channels, X Y Z voxels of the prepared grid, R crops.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import prepared_case, stored_case

from logonet.core import config, seeding
from logonet.core.errors import BadScan, UserError
from logonet.data import cropping, manifest, phantom, prepared_scans, preparing, volume
from logonet.data.classes import Classes
from logonet.data.manifest import Scan, Source
from logonet.data.volume import Volume
from logonet.storage import object_store

CHUNK = 4
CFG = prepared_scans.Config()
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
SIZE = (6, 5, 4)


@pytest.fixture(autouse=True)
def small_chunks_and_empty_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(prepared_scans, "CHUNK_VOX", CHUNK)
    prepared_scans._header.cache_clear()
    prepared_scans._tensor.cache_clear()
    yield
    prepared_scans._header.cache_clear()
    prepared_scans._tensor.cache_clear()


def a_case(shape_xyz: Sequence[int], channels: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image_CXYZ = rng.integers(1, 65536, (channels, *shape_xyz)).astype(np.uint16)
    return image_CXYZ, rng.integers(0, 4, shape_xyz).astype(np.uint8)


def kept(folder: Path, image_CXYZ: np.ndarray, labels_XYZ: np.ndarray, name: str = "a") -> prepared_scans.Ref:
    return stored_case(folder, name, image_CXYZ, labels_XYZ)


def labelled(
    folder: Path, *organs: tuple[int, int], shape: Sequence[int] = (40, 40, 40)
) -> prepared_scans.Ref:
    """A case with cubes of ``organs``: (class, side), side by side away from its border."""
    labels_XYZ = np.zeros(shape, np.uint8)
    begin = 5
    for index, side in organs:
        labels_XYZ[begin : begin + side, 12 : 12 + side, 12 : 12 + side] = index
        begin += side + 2
    assert begin < shape[0] - 5
    return kept(folder, np.zeros((1, *shape), np.uint16), labels_XYZ)


# ------------------------------------------------------------------------------------------- the chunks


@pytest.mark.parametrize("shape", [(9, 7, 5), (8, 4, 4), (3, 2, 1), (4, 13, 6)])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_case_comes_back_from_its_chunks(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    image_CXYZ, labels_XYZ = a_case(shape, channels)
    ref = kept(tmp_path, image_CXYZ, labels_XYZ)
    assert ref.shape_cxyz == (channels, *shape)
    got_CXYZ, got_XYZ = prepared_scans.read_case(ref)
    assert (got_CXYZ.dtype, got_XYZ.dtype) == (np.uint16, np.uint8)
    np.testing.assert_array_equal(got_CXYZ, image_CXYZ)
    np.testing.assert_array_equal(got_XYZ, labels_XYZ)
    chunks = [name for name in prepared_scans._header(ref.image).entries if name.startswith("image/")]
    assert len(chunks) == np.prod([-(-n // CHUNK) for n in shape])


def padded_slice(array_XYZ: np.ndarray, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """The box cut out of the array with as many zeros around it as any box here reaches out."""
    around = 50
    wide_XYZ = np.pad(array_XYZ, around)
    return wide_XYZ[tuple(slice(s + around, s + around + n) for s, n in zip(start, size))]


INSIDE = [(0, 0, 0), (3, 2, 1), (5, 6, 4)]
ACROSS = [(-2, 0, 0), (0, -3, 1), (1, 1, -1), (8, 2, 0), (0, 9, 2), (2, 0, 6), (-4, -4, -3), (9, 9, 6)]
OUTSIDE = [(-6, 0, 0), (0, -5, 0), (0, 0, -4), (11, 0, 0), (0, 11, 0), (0, 0, 8), (-20, 30, 40)]


@pytest.mark.parametrize("start", INSIDE + ACROSS + OUTSIDE)
def test_a_crop_is_a_slice_with_zeros_around(tmp_path: Path, start: tuple[int, int, int]) -> None:
    image_CXYZ, labels_XYZ = a_case((11, 11, 8), channels=2)
    got_CXYZ, got_XYZ = prepared_scans.read_crop(kept(tmp_path, image_CXYZ, labels_XYZ), start, SIZE)
    want_CXYZ = np.stack([padded_slice(channel, start, SIZE) for channel in image_CXYZ])
    np.testing.assert_array_equal(got_CXYZ, want_CXYZ)
    np.testing.assert_array_equal(got_XYZ, padded_slice(labels_XYZ, start, SIZE))
    assert got_CXYZ.any() == (start not in OUTSIDE)


def test_a_crop_larger_than_the_case_holds_all_of_it(tmp_path: Path) -> None:
    image_CXYZ, labels_XYZ = a_case((5, 3, 6))
    got_CXYZ, got_XYZ = prepared_scans.read_crop(
        kept(tmp_path, image_CXYZ, labels_XYZ), (-2, -4, -1), (10, 10, 10)
    )
    np.testing.assert_array_equal(got_CXYZ[0], padded_slice(image_CXYZ[0], (-2, -4, -1), (10, 10, 10)))
    np.testing.assert_array_equal(got_XYZ, padded_slice(labels_XYZ, (-2, -4, -1), (10, 10, 10)))


def test_a_case_is_a_plain_safetensors_file() -> None:
    from safetensors.numpy import load

    image_CXYZ, labels_XYZ = a_case((5, 4, 4), channels=2)
    tensors = load(prepared_scans.image_file("a", image_CXYZ))
    both = [tensors[f"image/{x}_0_0"] for x in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(both, 1), image_CXYZ)
    assert {n.split("/")[0] for n in tensors} == {"image", "coverage"}
    of_labels = load(prepared_scans.labels_file("a", labels_XYZ))
    assert {n.split("/")[0] for n in of_labels} == {"labels", "places"}


class Reads:
    """What was asked of the store: (first byte, number of bytes)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[int, int]] = []
        real = object_store.read

        def read(uri: str, **asked: Any) -> bytes:
            self.ranges.append((asked["start"], asked["length"]))
            return real(uri, **asked)

        monkeypatch.setattr(object_store, "read", read)


def test_only_the_chunks_under_a_crop_are_read_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = kept(tmp_path, *a_case((16, 16, 16)))
    reads = Reads(monkeypatch)
    prepared_scans.read_crop(ref, (4, 8, 5), (4, 4, 3))  # within one chunk
    headers = [(8, ref.header_bytes), (8, ref.labels_header_bytes)]
    assert reads.ranges[:2] == headers
    assert sorted(length for _, length in reads.ranges[2:]) == [CHUNK**3, 2 * CHUNK**3]
    prepared_scans.read_crop(ref, (4, 8, 5), (4, 4, 3))
    prepared_scans.read_crop(ref, (5, 9, 4), (2, 2, 2))
    assert len(reads.ranges) == 4  # all of it is in memory now
    prepared_scans.read_crop(ref, (7, 8, 4), (2, 2, 2))  # and its neighbour along X
    assert sorted(length for _, length in reads.ranges[4:]) == [CHUNK**3, 2 * CHUNK**3]


def test_a_case_is_known_from_its_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = kept(tmp_path, *a_case((16, 16, 16)))
    size_bytes = Path(ref.uri).stat().st_size
    reads = Reads(monkeypatch)
    assert prepared_scans.stored(ref.uri) == ref.image
    assert reads.ranges == [(0, 8), (8, ref.header_bytes)]
    assert 8 + ref.header_bytes < size_bytes


def test_what_is_in_memory_is_known_by_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its values and not by its identity: every task unpickles references anew."""
    first, second = a_case((4, 4, 4), seed=1), a_case((4, 4, 4), seed=2)
    ref, other = kept(tmp_path, *first, "a"), kept(tmp_path, *second, "b")
    np.testing.assert_array_equal(prepared_scans.read_case(ref)[0], first[0])
    reads = Reads(monkeypatch)
    np.testing.assert_array_equal(prepared_scans.read_case(dataclasses.replace(ref))[0], first[0])
    assert not reads.ranges
    np.testing.assert_array_equal(prepared_scans.read_case(other)[0], second[0])
    assert len(reads.ranges) == 4
    assert prepared_scans._header.cache_info().maxsize
    chunk_bytes = 3 * 64**3  # of image and labels
    assert (prepared_scans._tensor.cache_info().maxsize or 0) // 2 * chunk_bytes <= 96 << 20


# --------------------------------------------------------------------------------------------- damage


def flip(uri: str, place: int) -> None:
    raw = bytearray(Path(uri).read_bytes())
    raw[place] ^= 1
    Path(uri).write_bytes(raw)


@pytest.mark.parametrize("kind", ["image", "labels"])
def test_a_flipped_byte_is_named_with_its_mend_and_spoils_its_chunk_alone(tmp_path: Path, kind: str) -> None:
    image_CXYZ, labels_XYZ = a_case((8, 4, 4))
    ref = kept(tmp_path / "run", image_CXYZ, labels_XYZ)
    damaged = getattr(ref, kind)
    header = prepared_scans._header(damaged)
    flip(damaged.uri, header.offset + header.entries[f"{kind}/1_0_0"]["data_offsets"][0])
    with pytest.raises(object_store.IntegrityError) as err:
        prepared_scans.read_crop(ref, (2, 0, 0), (4, 4, 4))
    said = str(err.value)
    assert "SHA-256" in said
    assert f"delete {damaged.uri} and the tables in {tmp_path}/run/prepared and {tmp_path}/run/cases" in said
    assert "\n" not in said
    got_CXYZ, got_XYZ = prepared_scans.read_crop(ref, (0, 0, 0), (4, 4, 4))
    np.testing.assert_array_equal(got_CXYZ, image_CXYZ[:, :4])
    np.testing.assert_array_equal(got_XYZ, labels_XYZ[:4])


def test_a_flipped_byte_of_places_is_noticed(tmp_path: Path) -> None:
    ref = labelled(tmp_path, (1, 3))
    header = prepared_scans._header(ref.labels)
    flip(ref.labels_uri, header.offset + header.entries["places/1"]["data_offsets"][0])
    with pytest.raises(object_store.IntegrityError, match="prepared again"):
        prepared_scans.draw_corners(
            ref, prepared_scans.CropSampling((8, 8, 8), foreground_share=1.0), seeding.rng(0)
        )


def test_every_flipped_byte_of_the_header_is_noticed(tmp_path: Path) -> None:
    """Names, places in the file and checksums: none of them may be believed when it is damaged."""
    ref = kept(tmp_path, *a_case((2, 2, 2)))
    for file in (ref.image, ref.labels):
        whole = Path(file.uri).read_bytes()
        for place in range(8, 8 + file.header_bytes, 7):
            prepared_scans._header.cache_clear()
            flip(file.uri, place)
            with pytest.raises(object_store.IntegrityError, match="prepared again"):
                prepared_scans.read_case(ref)
            Path(file.uri).write_bytes(whole)
    prepared_scans.read_case(ref)


def test_a_torn_file_is_not_taken(tmp_path: Path) -> None:
    ref = kept(tmp_path, *a_case((5, 4, 4)))
    for file in (ref.image, ref.labels):
        torn_is_not_taken(file)


def torn_is_not_taken(file: prepared_scans.File) -> None:
    whole = Path(file.uri).read_bytes()
    header_end = 8 + file.header_bytes
    torn = [whole[:n] for n in (0, 7, 8, 9, header_end - 1, header_end, header_end + 1, len(whole) - 1)]
    torn += [whole + b"\0", bytes(len(whole)), b"\xff" * len(whole)]
    torn += [whole[:8] + b"\xff" * file.header_bytes + whole[header_end:]]  # no text
    torn += [whole[:8] + whole[8:header_end].replace(b"data_offsets", b"data_0ffsets") + whole[header_end:]]
    for blob in torn:
        Path(file.uri).write_bytes(blob)
        assert prepared_scans.stored(file.uri) is None, len(blob)
    Path(file.uri).write_bytes(whole)
    assert prepared_scans.stored(file.uri) == file


# ------------------------------------------------------------------------------------- where crops fall


def drawn(ref: prepared_scans.Ref, cfg: prepared_scans.CropSampling, times: int) -> np.ndarray:
    """The corners of many iterations, (times * R, 3)."""
    return np.concatenate(
        [prepared_scans.draw_corners(ref, cfg, seeding.rng(0, "crops", i)) for i in range(times)]
    )


def centres(ref: prepared_scans.Ref, corners_R3: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The class of each crop's centre voxel, (R,)."""
    labels_XYZ = prepared_scans.read_case(ref)[1]
    return labels_XYZ[tuple((corners_R3 + np.array(size) // 2).T)]


def test_crops_lie_inside_and_reach_every_corner(tmp_path: Path) -> None:
    ref = labelled(tmp_path, (1, 3), shape=(20, 30, 18))
    corners_R3 = drawn(ref, prepared_scans.CropSampling((16, 29, 18), foreground_share=0.0), 300)
    np.testing.assert_array_equal(corners_R3.min(0), [0, 0, 0])
    np.testing.assert_array_equal(corners_R3.max(0), [4, 1, 0])


@pytest.mark.parametrize("size", [(8, 8, 8), (7, 8, 9)])
def test_a_foreground_crop_is_centred_on_a_voxel_of_a_class(
    tmp_path: Path, size: tuple[int, int, int]
) -> None:
    ref = labelled(tmp_path, (1, 3), (3, 1))
    corners_R3 = drawn(ref, prepared_scans.CropSampling(size, foreground_share=1.0), 200)
    assert set(centres(ref, corners_R3, size)) == {1, 3}


def test_a_foreground_crop_at_the_border_is_moved_inwards(tmp_path: Path) -> None:
    labels_XYZ = np.zeros((12, 12, 12), np.uint8)
    labels_XYZ[0, 11, 6] = 1
    ref = kept(tmp_path, np.zeros((1, 12, 12, 12), np.uint16), labels_XYZ)
    corners_R3 = drawn(ref, prepared_scans.CropSampling((4, 4, 4), foreground_share=1.0), 3)
    np.testing.assert_array_equal(corners_R3, np.tile([0, 8, 4], (6, 1)))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_share_of_foreground_crops(tmp_path: Path, share: float) -> None:
    """Fixed seeds, and five standard deviations of a binomial count."""
    ref = labelled(tmp_path, (1, 4), (2, 2))
    size, times = (8, 8, 8), 1500
    found = np.count_nonzero(
        centres(ref, drawn(ref, prepared_scans.CropSampling(size, foreground_share=share), times), size)
    )
    by_chance = (4**3 + 2**3) / (40 - 8 + 1) ** 3  # both cubes lie where a crop's centre can
    p = share + (1 - share) * by_chance
    assert abs(found - 2 * times * p) <= 5 * np.sqrt(2 * times * p * (1 - p))


def test_rare_classes_are_centred_on_as_often_as_common_ones(tmp_path: Path) -> None:
    """One voxel, 8 and 1331, of which not every one is kept."""
    ref = labelled(tmp_path, (1, 11), (2, 1), (7, 2))
    assert prepared_scans.POSITIONS < 11**3
    size, times = (8, 8, 8), 1500
    found = centres(ref, drawn(ref, prepared_scans.CropSampling(size, foreground_share=1.0), times), size)
    counts = np.bincount(found, minlength=8)
    assert counts[[1, 2, 7]].sum() == 2 * times
    assert np.abs(counts[[1, 2, 7]] - 2 * times / 3).max() <= 5 * np.sqrt(2 * times * (1 / 3) * (2 / 3))


def test_every_voxel_of_a_class_is_reached(tmp_path: Path) -> None:
    ref = labelled(tmp_path, (1, 2))
    corners_R3 = drawn(ref, prepared_scans.CropSampling((8, 8, 8), foreground_share=1.0), 200)
    voxels = {tuple(int(v) for v in c + 4) for c in corners_R3}
    assert voxels == set(itertools.product((5, 6), (12, 13), (12, 13)))


def test_starts_depend_on_the_generator_alone_and_one_crop_not_on_another(tmp_path: Path) -> None:
    ref = labelled(tmp_path, (1, 4), (2, 2))
    cfg = prepared_scans.CropSampling((8, 8, 8), per_case=6, foreground_share=0.5)
    first = prepared_scans.draw_corners(ref, cfg, seeding.rng(7))
    assert first.shape == (6, 3)
    np.testing.assert_array_equal(first, prepared_scans.draw_corners(ref, cfg, seeding.rng(7)))
    assert not np.array_equal(first, prepared_scans.draw_corners(ref, cfg, seeding.rng(8)))
    fewer = prepared_scans.draw_corners(ref, dataclasses.replace(cfg, per_case=2), seeding.rng(7))
    np.testing.assert_array_equal(fewer, first[:2])
    anywhere = prepared_scans.draw_corners(
        ref, dataclasses.replace(cfg, foreground_share=0.0), seeding.rng(7)
    )
    centred = prepared_scans.draw_corners(ref, dataclasses.replace(cfg, foreground_share=1.0), seeding.rng(7))
    is_anywhere, is_centred = (first == anywhere).all(1), (first == centred).all(1)
    assert (is_anywhere ^ is_centred).all()
    assert 0 < is_centred.sum() < 6


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_case_smaller_than_the_crop_lies_in_its_middle(tmp_path: Path, share: float) -> None:
    labels_XYZ = np.ones((5, 20, 4), np.uint8)
    ref = kept(tmp_path, np.zeros((1, 5, 20, 4), np.uint16), labels_XYZ)
    corners_R3 = drawn(ref, prepared_scans.CropSampling((8, 8, 8), foreground_share=share), 50)
    assert set(corners_R3[:, 0]) == {-2}  # 3 voxels to spare: one more before it, as in `crops`
    assert set(corners_R3[:, 2]) == {-2}
    assert corners_R3[:, 1].min() >= 0
    assert corners_R3[:, 1].max() <= 12
    assert len(set(corners_R3[:, 1])) > 5
    as_crops = cropping.candidates((5, 20, 4), cropping.Config(size_vox=(8, 8, 8), min_image_share=0), "a")
    assert {tuple(c) for c in corners_R3[:, [0, 2]]} == {
        tuple(c) for c in as_crops[..., [0, 2]].reshape(-1, 2)
    }


def test_a_case_without_foreground_is_cropped_anywhere(tmp_path: Path) -> None:
    image_CXYZ, _ = a_case((12, 12, 12))
    ref = kept(tmp_path, image_CXYZ, np.zeros((12, 12, 12), np.uint8))
    corners_R3 = drawn(ref, prepared_scans.CropSampling((8, 8, 8), foreground_share=1.0), 50)
    assert len(np.unique(corners_R3, axis=0)) > 25


def test_places_are_voxels_of_their_class_and_all_of_a_small_one() -> None:
    labels_XYZ = np.zeros((30, 30, 30), np.uint8)
    labels_XYZ[10:25, 3:20, 5:15] = 4  # 2550 voxels
    labels_XYZ[1:4, 1:3, 1:3] = 2  # 12
    found = prepared_scans.class_positions(labels_XYZ, seed=0, scan_id="a")
    assert sorted(found) == [2, 4]
    assert {tuple(v) for v in found[2].tolist()} == set(itertools.product((1, 2, 3), (1, 2), (1, 2)))
    assert len(np.unique(found[4], axis=0)) == len(found[4]) == prepared_scans.POSITIONS
    assert (labels_XYZ[tuple(found[4].T)] == 4).all()
    # From all over the organ: the mean of 1000 of them lies near its middle, 5 standard deviations of it at most.
    spread = 5 * np.array([15, 17, 10]) / np.sqrt(12) / np.sqrt(prepared_scans.POSITIONS)
    assert (np.abs(found[4].mean(0) - [17, 11, 9.5]) <= spread).all()
    np.testing.assert_array_equal(found[4], prepared_scans.class_positions(labels_XYZ, 0, "a")[4])
    assert not np.array_equal(found[4], prepared_scans.class_positions(labels_XYZ, 1, "a")[4])
    assert not np.array_equal(found[4], prepared_scans.class_positions(labels_XYZ, 0, "b")[4])


@pytest.mark.parametrize(
    "values",
    [{"size_vox": [0, 4, 4]}, {"per_case": 0}, {"foreground_share": 1.5}, {"foreground_share": -0.1}],
)
def test_impossible_crops_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        config.from_dict(prepared_scans.CropSampling, values, "crops")


@pytest.mark.parametrize(
    "values", [{"spacing_mm": [1, 0, 1]}, {"window_hu": [5, 5]}, {"mr_percentiles": [60, 101]}]
)
def test_impossible_preparations_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"cases\.{next(iter(values))}"):
        config.from_dict(prepared_scans.Config, values, "cases")


# -------------------------------------------------------------------------------------------- preparing


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("spacing_mm", [None, (1.0, 2.5, 3.0)])
@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAR"])
def test_a_case_holds_the_numbers_that_pretraining_sees(
    tmp_path: Path, modality: str, spacing_mm: tuple[float, float, float] | None, orientation: str
) -> None:
    """A network is finetuned on intensities prepared just as those it was pretrained on."""
    scan, _ = phantom.phantom(3, (15, 14, 9), modality=modality, classes=3, orientation=orientation)
    cfg = prepared_scans.Config(spacing_mm=spacing_mm)
    image_CXYZ = prepared_scans.prepare_image(scan, modality, cfg, "a")
    assert image_CXYZ.dtype == np.uint16
    ref = kept(tmp_path, image_CXYZ, np.zeros(image_CXYZ.shape[1:], np.uint8))
    as_crops = cropping.Config(size_vox=(10, 16, 8), spacing_mm=spacing_mm, min_image_share=0.0)
    want_RCXYZ = cropping.crops_of(scan, modality, as_crops, "a")
    prepared = as_crops.to_grid(scan)
    low_high = as_crops.intensity_range(prepared.array_CXYZ, modality, "a")
    for want_CXYZ, start in zip(
        want_RCXYZ, cropping.choose_corners(prepared.array_CXYZ, low_high, as_crops, "a")
    ):
        np.testing.assert_array_equal(prepared_scans.read_crop(ref, start, as_crops.size_vox)[0], want_CXYZ)


@pytest.mark.parametrize("spacing_mm", [None, (1.0, 2.0, 2.0)])
def test_every_orientation_gives_the_same_file(spacing_mm: tuple[float, float, float] | None) -> None:
    cfg, files = prepared_scans.Config(spacing_mm=spacing_mm), set()
    for orientation in ("RAS", "LPS", "LAS", "PIR", "SAL"):
        scan, labels_XYZ = phantom.phantom(2, (13, 12, 11), classes=4, orientation=orientation)
        assert scan.orientation == orientation
        image_CXYZ, prepared_XYZ = prepared_case(scan, labels_XYZ, "CT", cfg, "a")
        files.add((prepared_scans.image_file("a", image_CXYZ), prepared_scans.labels_file("a", prepared_XYZ)))
    assert len(files) == 1


def test_labels_are_taken_from_the_nearest_voxel() -> None:
    rng = np.random.default_rng(0)
    labels_XYZ = rng.integers(0, 3, (7, 6, 5)).astype(np.uint8)
    scan = Volume(rng.uniform(-900, 900, (1, 7, 6, 5)).astype(np.float32), AFFINE)
    spacing_mm = (1.3, 2.7, 2.2)
    image_CXYZ, got_XYZ = prepared_case(
        scan, labels_XYZ, "CT", prepared_scans.Config(spacing_mm=spacing_mm), "a"
    )
    assert got_XYZ.dtype == np.uint8
    assert got_XYZ.shape == image_CXYZ.shape[1:] == (10, 5, 6)
    step = np.array(spacing_mm) / (2.0, 2.0, 3.0)
    for place in np.ndindex(got_XYZ.shape):
        source = np.minimum(
            np.floor(np.array(place) * step + 0.5).astype(int), np.array(labels_XYZ.shape) - 1
        )
        assert got_XYZ[place] == labels_XYZ[tuple(source)], place


def test_a_scan_without_contrast_is_refused() -> None:
    scan = Volume(np.full((1, 8, 8, 8), 5, np.float32), AFFINE)
    with pytest.raises(BadScan, match=r"knee-12ab.*contrast"):
        prepared_scans.prepare_image(scan, "MR", CFG, "knee-12ab")


# ----------------------------------------------------------------------------------- from scan to table


@pytest.fixture
def scan(tmp_path: Path) -> Scan:
    """A phantom on disk, as the manifest has it."""
    made, labels_XYZ = phantom.phantom(5, (16, 16, 16), classes=3, orientation="LPS")
    for name, array in (("a", made.array_CXYZ[0].astype(np.int16)), ("l", labels_XYZ)):
        (tmp_path / f"{name}.nii.gz").write_bytes(volume.encode_nifti(array, made.affine))
    found = manifest.inspect(
        Source(uri=f"{tmp_path}/a.nii.gz", subject="a", dataset="d", label_uri=f"{tmp_path}/l.nii.gz")
    )
    assert isinstance(found, Scan)
    return found


def test_a_scan_is_prepared_once_and_again_only_when_its_file_is_torn(
    tmp_path: Path, scan: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = preparing.PrepareScan(
        Classes.named(("background", "a", "b"), (0, 1, 2)), CFG, f"{tmp_path}/store"
    )
    ref = prepare(scan)
    assert isinstance(ref, prepared_scans.Ref)
    assert Path(ref.uri).parent == tmp_path / "store" / "images"
    assert Path(ref.labels_uri).parent == tmp_path / "store" / "labels"
    image_CXYZ, labels_XYZ = prepared_scans.read_case(ref)
    want = prepared_case(manifest.load(scan), manifest.load_label(scan, manifest.load(scan)), "CT", CFG, "a")
    np.testing.assert_array_equal(image_CXYZ, want[0])
    np.testing.assert_array_equal(labels_XYZ, want[1])
    with monkeypatch.context() as patched:
        patched.setattr(manifest, "load", lambda row: pytest.fail("prepared again"))
        assert prepare(scan) == ref
        without = preparing.PrepareScan(None, CFG, f"{tmp_path}/store")(scan)
        assert without == prepared_scans.ref_of(scan.scan_id, ref.image)  # the same file
    for uri in (ref.uri, ref.labels_uri):
        whole = Path(uri).read_bytes()
        Path(uri).write_bytes(whole[:-1])
        assert prepare(scan) == ref
        assert Path(uri).read_bytes() == whole


def test_other_labels_and_other_scans_are_other_files(tmp_path: Path, scan: Scan) -> None:
    store = f"{tmp_path}/store"
    both = Classes.named(("background", "a", "b"), (0, 1, 2))
    one = Classes.named(("background", "b", "a"), (0, 2, 1))
    ref, other = (preparing.PrepareScan(known, CFG, store)(scan) for known in (both, one))
    assert isinstance(ref, prepared_scans.Ref)
    assert isinstance(other, prepared_scans.Ref)
    assert ref.image == other.image
    assert ref.labels != other.labels
    found, swapped = (prepared_scans.read_case(r)[1] for r in (ref, other))
    np.testing.assert_array_equal(np.array([0, 2, 1])[found], swapped)
    as_mr = preparing.PrepareScan(None, CFG, store)(dataclasses.replace(scan, modality="MR"))
    assert isinstance(as_mr, prepared_scans.Ref)
    assert as_mr.uri != ref.uri
    assert not np.array_equal(prepared_scans.read_image(as_mr, (0, 0, 0), SIZE), found[:6, :5, :4])


def test_a_scan_that_cannot_be_used_is_set_aside_and_nothing_is_written(tmp_path: Path, scan: Scan) -> None:
    answer = preparing.PrepareScan(Classes.named(("background", "a"), (0, 1)), CFG, f"{tmp_path}/store")(scan)
    assert isinstance(answer, manifest.Quarantined)
    assert answer.uri == scan.uri
    assert "holds the value 2, which is no class" in answer.reason
    assert not (tmp_path / "store").exists()


def test_a_stored_file_does_not_hide_a_value_that_is_no_class(tmp_path: Path, scan: Scan) -> None:
    """Whoever chose class a alone has stored labels in which the value 2 is background."""
    only_a = Classes.named(("background", "a"), (0, 1))
    chosen = preparing.PrepareScan(dataclasses.replace(only_a, chosen=True), CFG, f"{tmp_path}/store")(scan)
    assert isinstance(chosen, prepared_scans.Ref)
    assert prepared_scans.read_case(chosen)[1].max() == 1
    answer = preparing.PrepareScan(only_a, CFG, f"{tmp_path}/store")(scan)
    assert isinstance(answer, manifest.Quarantined)
    assert "holds the value 2, which is no class" in answer.reason


def test_a_table_survives_json(tmp_path: Path) -> None:
    refs = tuple(kept(tmp_path, *a_case((5, 4, 3), channels=2, seed=i), f"scan{i}") for i in range(3))
    table = prepared_scans.Table(refs, ("background", "liver"), (0, 6))
    back = prepared_scans.Table.from_json(json.loads(json.dumps(table.to_json())))
    assert back == table
    assert hash(back.refs[0]) == hash(refs[0])
    assert (len(back), back.in_channels) == (3, 2)
    assert back.index_of() == {"scan0": 0, "scan1": 1, "scan2": 2}
