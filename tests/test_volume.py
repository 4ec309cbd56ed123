"""Scans as arrays in space: parity with nibabel and MONAI, and what becomes of hostile bytes."""

from __future__ import annotations

import gzip
import itertools
import platform
import random
import tracemalloc
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from logonet.core.errors import BadScan
from logonet.data import volume
from logonet.data.volume import Volume, decode_nifti, encode_nifti


@pytest.fixture(params=["isal", "zlib"])
def inflater(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile gzip data meets both readers: the fast one, and the one where that cannot be installed."""
    if request.param == "zlib":
        monkeypatch.setattr("logonet.data.volume.nifti._gunzip", lambda: (gzip.GzipFile, zlib.error))
    else:
        pytest.importorskip("isal")
        assert volume.nifti._gunzip()[0] is not gzip.GzipFile


AFFINE = np.array([[-1.5, 0.2, 0, 30], [0.1, 2.0, 0.3, -20], [0, -0.2, 3.0, 7], [0, 0, 0, 1]])


def random_xyz(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-900, 900, shape).astype(np.int16)


def nifti_bytes(array: np.ndarray, affine: np.ndarray = AFFINE, **header: object) -> bytes:
    """Uncompressed NIfTI bytes with header fields set by force."""
    data = bytearray(nib.Nifti1Image(array, affine).to_bytes())
    fields = nib.Nifti1Header(bytes(data[:348]), check=False)
    for name, value in header.items():
        fields[name] = value
    data[:348] = fields.binaryblock
    return bytes(data)


# ----------------------------------------------------------------------------------------- NIfTI, good


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i2", "u2", "i4", "<f4", ">f4", "f8"])
@pytest.mark.parametrize("scaling", [(np.nan, np.nan), (1, 0), (2.5, -1024), (0, 3)])
def test_decodes_as_nibabel_does(dtype: str, scaling: tuple[float, float]) -> None:
    header = nib.Nifti1Header(endianness=">" if dtype[0] == ">" else "<")
    header.set_data_dtype(np.dtype(dtype))
    stored = np.random.default_rng(0).integers(0, 100, (5, 4, 3)).astype(dtype)
    image = nib.Nifti1Image(stored, AFFINE, header)
    data = bytearray(image.to_bytes())
    fields = nib.Nifti1Header(bytes(data[:348]), check=False)
    fields["scl_slope"], fields["scl_inter"] = scaling
    data[:348] = fields.binaryblock
    expected = nib.Nifti1Image.from_bytes(bytes(data))
    for blob in (bytes(data), gzip.compress(bytes(data))):
        got = decode_nifti(blob, "scan.nii")
        np.testing.assert_allclose(got.array_CXYZ[0], expected.get_fdata(), rtol=1e-6)
        np.testing.assert_allclose(got.affine, expected.affine)
        assert got.array_CXYZ.dtype == np.float32
        assert got.stored_dtype == np.dtype(dtype).name
        np.testing.assert_allclose(got.spacing_mm, nib.affines.voxel_sizes(expected.affine))
        assert got.orientation == "".join(nib.aff2axcodes(expected.affine))


def test_wide_integers_keep_their_precision_under_an_intercept() -> None:
    stored = np.array([2**30, 2**30 + 1, 2**30 + 7], np.int32).reshape(1, 3, 1).repeat(2, 0).repeat(2, 2)
    got = decode_nifti(nifti_bytes(stored, scl_slope=1.0, scl_inter=-(2.0**30)), "x.nii")
    assert got.array_CXYZ[0, 0, :, 0].tolist() == [0, 1, 7]


@pytest.mark.parametrize(("code", "factor"), [(0, 1), (2, 1), (1, 1000), (3, 0.001)])
def test_spatial_units_become_mm(code: int, factor: float) -> None:
    got = decode_nifti(nifti_bytes(random_xyz(3, 4, 5), xyzt_units=code), "x.nii")
    np.testing.assert_allclose(got.affine[:3], AFFINE[:3] * factor, rtol=1e-6)


def test_trailing_singleton_axis_is_dropped() -> None:
    array = random_xyz(3, 4, 5)
    got = decode_nifti(nifti_bytes(array[..., None]), "x.nii")
    np.testing.assert_array_equal(got.array_CXYZ[0], array)


@pytest.mark.usefixtures("inflater")
def test_gzip_in_several_members_and_with_zero_padding() -> None:
    data, array = nifti_bytes(random_xyz(6, 5, 4)), random_xyz(6, 5, 4)
    parts = gzip.compress(data[:100]) + gzip.compress(data[100:400]) + gzip.compress(data[400:]) + bytes(64)
    np.testing.assert_array_equal(decode_nifti(parts, "x.nii.gz").array_CXYZ[0], array)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_encode_then_decode(dtype: str) -> None:
    array = (random_xyz(4, 5, 6) % 200).astype(dtype)
    data = encode_nifti(array, AFFINE)
    assert data == encode_nifti(array.copy(), AFFINE)
    got = decode_nifti(data, "x.nii.gz")
    np.testing.assert_array_equal(got.array_CXYZ[0], array)
    np.testing.assert_allclose(got.affine, AFFINE, atol=1e-5)
    assert got.stored_dtype == dtype


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize(("qform_code", "sform_code"), [(1, 0), (0, 3), (1, 4), (0, 0)])
def test_labels_keep_the_header_of_their_scan(
    qform_code: int, sform_code: int, endian: str, zipped: bool
) -> None:
    header = nib.Nifti1Header(endianness=endian)
    header.set_data_dtype(np.int16)
    image = nib.Nifti1Image(random_xyz(5, 4, 3)[..., None], AFFINE, header)
    image.set_qform(AFFINE, qform_code)
    image.set_sform(AFFINE, sform_code)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(2.0, -1024)
    image.header["descrip"] = b"abdomen, portal venous"
    image.header["cal_max"] = 300
    scan = image.to_bytes()
    labels_XYZ = np.arange(60, dtype=np.uint8).reshape(5, 4, 3) * 4
    data = volume.encode_labels(labels_XYZ, gzip.compress(scan) if zipped else scan, np.eye(4))
    assert data == volume.encode_labels(labels_XYZ.copy("F"), scan, np.eye(4))
    got = nib.Nifti1Image.from_bytes(gzip.decompress(data))
    np.testing.assert_array_equal(np.asarray(got.dataobj), labels_XYZ)
    assert got.get_data_dtype() == np.uint8
    kept = nib.Nifti1Image.from_bytes(scan)
    np.testing.assert_array_equal(got.affine, kept.affine)
    space = [f"{a}_{b}" for a, b in itertools.product(("qoffset", "srow"), "xyz")]
    for name in [*space, "quatern_b", "quatern_c", "quatern_d", "qform_code", "sform_code"]:
        np.testing.assert_array_equal(got.header[name], kept.header[name], name)
    for name in ("xyzt_units", "descrip"):
        assert got.header[name] == kept.header[name]
    np.testing.assert_array_equal(got.header["pixdim"][:4], kept.header["pixdim"][:4])
    assert got.header["cal_max"] == 0
    assert decode_nifti(data, "x.nii.gz").shape_xyz == (5, 4, 3)


@pytest.mark.parametrize("like", [None, bytes(128) + b"DICM" + bytes(300)])
def test_labels_of_other_files_get_the_affine(like: bytes | None) -> None:
    labels_XYZ = (random_xyz(5, 4, 3) % 7).astype(np.uint8)
    got = decode_nifti(volume.encode_labels(labels_XYZ, like, AFFINE), "x.nii.gz")
    np.testing.assert_array_equal(got.array_CXYZ[0], labels_XYZ)
    np.testing.assert_allclose(got.affine, AFFINE, atol=1e-5)


# ------------------------------------------------------------------------------------------ NIfTI, bad


def _nan() -> np.ndarray:
    array = random_xyz(3, 4, 5).astype(np.float32)
    array[1, 2, 3] = np.nan
    return array


def _rgb() -> np.ndarray:
    return np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])


GOOD = random_xyz(6, 5, 4)
BAD = {
    "empty": (b"", "wrong magic"),
    "text": (b"not a scan " * 100, "wrong magic"),
    "magic of a pair": (nifti_bytes(GOOD, magic=b"ni1"), "wrong magic"),
    "nifti-2": (nib.Nifti2Image(GOOD, AFFINE).to_bytes(), "NIfTI-2"),
    "short header": (nifti_bytes(GOOD)[:200], "wrong magic"),
    "truncated": (nifti_bytes(GOOD)[:-1], "truncated"),
    "2D": (nifti_bytes(GOOD[:, :, 0]), "2D"),
    "2D with singleton": (nifti_bytes(GOOD[:, :, :1]), "2D"),
    "4D": (nifti_bytes(np.stack([GOOD] * 9, -1)), "more than 8 channels"),
    "0 axes": (nifti_bytes(GOOD, dim=[0, 6, 5, 4, 1, 1, 1, 1]), "impossible dimensions"),
    "9 axes": (nifti_bytes(GOOD, dim=[9, 6, 5, 4, 1, 1, 1, 1]), "impossible dimensions"),
    "zero side": (nifti_bytes(GOOD, dim=[3, 6, 0, 4, 1, 1, 1, 1]), "impossible dimensions"),
    "negative side": (nifti_bytes(GOOD, dim=[3, 6, -5, 4, 1, 1, 1, 1]), "impossible dimensions"),
    "10^12 voxels": (nifti_bytes(GOOD, dim=[3, 10000, 10000, 10000, 1, 1, 1, 1]), "10000x10000x10000"),
    "claims 2 GiB": (nifti_bytes(GOOD, dim=[3, 1024, 1024, 1024, 1, 1, 1, 1]), "truncated"),
    "unknown dtype": (nifti_bytes(GOOD, datatype=77), "datatype code 77"),
    "RGB": (nib.Nifti1Image(_rgb(), AFFINE).to_bytes(), "colour"),
    "complex": (nifti_bytes(GOOD.astype(np.complex64)), "complex"),
    "NaN": (nifti_bytes(_nan()), "not finite"),
    "infinity": (nifti_bytes(np.where(GOOD > 0, np.inf, GOOD).astype(np.float32)), "not finite"),
    "beyond float32": (nifti_bytes(GOOD.astype(np.float64) * 1e300), "not finite"),
    "constant": (nifti_bytes(np.full((4, 4, 4), 7, np.int16)), "every voxel is 7"),
    "singular affine": (nifti_bytes(GOOD, srow_x=[0, 0, 0, 0]), "singular"),
    "parallel axes": (
        nifti_bytes(GOOD, srow_x=[1, 0, 0, 0], srow_y=[0, 1, 1, 0], srow_z=[0, 1, 1, 0]),
        "singular",
    ),
    "NaN affine": (nifti_bytes(GOOD, srow_y=[np.nan, 1, 0, 0]), "not finite"),
    "offset in header": (nifti_bytes(GOOD, vox_offset=16), "byte 16"),
    "NaN offset": (nifti_bytes(GOOD, vox_offset=np.nan), "byte nan"),
    "infinite slope": (nifti_bytes(GOOD, scl_slope=1.0, scl_inter=np.inf), "scaling"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("zipped", [False, True])
def test_bad_nifti_says_why(case: str, zipped: bool) -> None:
    data, reason = BAD[case]
    name = "folder/odd scan.nii.gz" if zipped else "folder/odd scan.nii"
    with pytest.raises(BadScan) as refusal:
        decode_nifti(gzip.compress(data) if zipped else data, name)
    assert str(refusal.value).startswith(name + ": ")
    assert reason in str(refusal.value)


@pytest.mark.usefixtures("inflater")
def test_gzip_truncated_anywhere_is_refused() -> None:
    data = encode_nifti(GOOD, AFFINE)
    for length in range(len(data)):
        with pytest.raises(BadScan, match=r"^x\.nii\.gz: "):
            decode_nifti(data[:length], "x.nii.gz")


@pytest.mark.usefixtures("inflater")
def test_gzip_with_one_flipped_bit_never_gives_other_voxels() -> None:
    data = encode_nifti(GOOD, AFFINE)
    rng = random.Random(0)
    refused = 0
    for position in rng.sample(range(10, len(data)), 200):  # the first ten bytes hold a time stamp and flags
        damaged = bytearray(data)
        damaged[position] ^= 1 << rng.randrange(8)
        try:
            np.testing.assert_array_equal(decode_nifti(bytes(damaged), "x.nii.gz").array_CXYZ[0], GOOD)
        except BadScan:
            refused += 1
    assert refused >= 195


def test_damaged_headers_are_read_or_refused_with_the_name() -> None:
    data = nifti_bytes(GOOD)
    rng = random.Random(0)
    for _ in range(1500):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 2, 4])):
            damaged[rng.randrange(348)] = rng.choice([0, 127, 128, 255, rng.randrange(256)])
        try:
            volume.to_ras(decode_nifti(bytes(damaged), "x.nii", max_bytes=2**24))
        except BadScan as refusal:
            assert str(refusal).startswith("x.nii: ")  # noqa: PT017 - both outcomes are allowed


def _peak_bytes(data: bytes) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(BadScan):
            decode_nifti(data, "bomb.nii.gz")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("inflater")
def test_gzip_bomb_is_refused_in_bounded_memory() -> None:
    zeros = gzip.compress(bytes(16 * 2**20))
    bomb = gzip.compress(nifti_bytes(GOOD)) + zeros * 64  # 1 GiB in 1 MiB
    assert _peak_bytes(bomb) < 16 * 2**20


@pytest.mark.usefixtures("inflater")
def test_a_claim_that_the_file_cannot_hold_allocates_nothing() -> None:
    data = nifti_bytes(GOOD, dim=[3, 1024, 1024, 1024, 1, 1, 1, 1])
    assert _peak_bytes(data) < 2**20
    assert _peak_bytes(gzip.compress(data)) < 2**20


def test_gz_name_without_gzip_data() -> None:
    with pytest.raises(BadScan, match="is not gzip data"):
        decode_nifti(nifti_bytes(GOOD), "x.nii.gz")


def test_an_empty_label_map_is_allowed_when_asked_for() -> None:
    label = decode_nifti(nifti_bytes(np.zeros((3, 4, 5), np.uint8)), "x.nii", allow_constant=True)
    assert not label.array_CXYZ.any()


# ------------------------------------------------------------------------- orientation and resampling

ORIENTATIONS = ["".join(p) for q in itertools.permutations(["RL", "AP", "SI"]) for p in itertools.product(*q)]


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_to_ras_equals_nibabel(codes: str) -> None:
    turn = nib.orientations.axcodes2ornt(codes)
    array = random_xyz(3, 4, 5)
    tilted = AFFINE.copy()
    tilted[:3, :3] = np.diag([1.5, 2.0, 3.0]) + 0.2
    affine = tilted @ nib.orientations.inv_ornt_aff(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), turn), (3, 4, 5)
    )
    shape = [(3, 4, 5)[int(axis)] for axis in turn[:, 0]]
    image = nib.Nifti1Image(array.reshape(shape), affine)
    got = volume.to_ras(Volume(image.get_fdata(dtype=np.float32)[None], affine))
    want = nib.as_closest_canonical(image)
    np.testing.assert_array_equal(got.array_CXYZ[0], want.get_fdata())
    np.testing.assert_allclose(got.affine, want.affine)
    assert got.orientation == "RAS"


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize(
    ("spacing_mm", "order"),
    [
        ((1.0, 1.0, 1.0), 1),
        ((2.7, 1.1, 4.0), 1),
        ((1.5, 2.0, 1.5), 1),
        ((2.7, 1.1, 4.0), 0),  # no place lies half-way between two voxels: there either may be taken
        ((1.1, 1.3, 1.7), 0),
    ],
)
def test_resample_equals_monai_spacing(spacing_mm: tuple[float, float, float], order: int) -> None:
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    array = np.random.default_rng(0).normal(size=(1, 13, 11, 9)).astype(np.float32)
    affine = np.diag([1.5, 2.0, 3.0, 1.0])
    affine[:3, 3] = [-10, 20, 30]
    got = volume.resample(Volume(array, affine), spacing_mm, order)
    mode = "bilinear" if order else "nearest"
    want = Spacing(spacing_mm, mode=mode, padding_mode="border", align_corners=True)(
        MetaTensor(array, affine)
    )
    assert got.array_CXYZ.shape == tuple(want.shape)
    np.testing.assert_allclose(got.affine, want.affine.numpy(), atol=1e-6)
    np.testing.assert_allclose(got.spacing_mm, spacing_mm, rtol=1e-6)
    np.testing.assert_allclose(got.array_CXYZ, want.numpy(), atol=1e-4 if order else 0)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="SciPy may fuse products and sums")
@pytest.mark.parametrize("layout", ["F", "C", "flipped"])
def test_resample_is_scipys_to_the_last_bit(layout: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        array = rng.normal(0, 500, rng.integers(2, 40, 3)).astype(
            np.float32, order="F" if layout == "F" else "C"
        )
        array = array[::-1, :, ::-1] if layout == "flipped" else array
        step = rng.choice([rng.uniform(0.3, 3, 3), np.array([0.1, 0.5, 0.75]) * rng.integers(1, 6, 3)])
        shape = tuple(int(n) for n in np.round((np.array(array.shape) - 1) / step + 1))
        expected = ndimage.affine_transform(array, step, output_shape=shape, order=1, mode="nearest")
        np.testing.assert_array_equal(volume.resampling._trilinear(array, step, shape), expected)


def test_resample_turns_to_ras_and_keeps_places() -> None:
    """A linear ramp in world coordinates stays that ramp on any grid."""
    affine = np.array([[0, -2.0, 0, 30], [1.5, 0, 0, -20], [0, 0, -3.0, 7], [0, 0, 0, 1]])
    world = nib.affines.apply_affine(affine, np.moveaxis(np.indices((12, 10, 8)), 0, -1))
    ramp = (world @ [1.0, 2.0, -0.5]).astype(np.float32)
    got = volume.resample(Volume(ramp[None], affine), (1.0, 1.0, 1.5))
    assert got.orientation == "RAS"
    inner = tuple(slice(0, n - 1) for n in got.shape_xyz)  # the last voxel may lie beyond the scan's
    places = nib.affines.apply_affine(got.affine, np.moveaxis(np.indices(got.shape_xyz), 0, -1))
    np.testing.assert_allclose(got.array_CXYZ[0][inner], (places @ [1.0, 2.0, -0.5])[inner], atol=1e-3)


# ------------------------------------------------------------------------------------------ intensity


@pytest.mark.parametrize("window_hu", [(-1000.0, 1000.0), (-175.0, 250.0)])
def test_window_equals_monai(window_hu: tuple[float, float]) -> None:
    from monai.transforms import ScaleIntensityRange

    array = np.random.default_rng(0).normal(0, 900, (1, 9, 9, 9)).astype(np.float32)
    want = ScaleIntensityRange(*window_hu, b_min=0.0, b_max=1.0, clip=True)(array)
    before = array.copy()
    got = volume.window(array, window_hu)
    np.testing.assert_allclose(got, np.asarray(want), atol=1e-6)
    np.testing.assert_array_equal(array, before)
    assert got.min() == 0
    assert got.max() == 1


def test_percentile_range_ignores_zero_background() -> None:
    array = np.zeros((1, 20, 20, 20), np.float32)
    array[0, :5] = np.arange(2000).reshape(5, 20, 20) + 1
    assert volume.percentile_range(array, 0, 100, "x") == (1, 2000)
    low, high = volume.percentile_range(array, 0.5, 99.5, "x")
    np.testing.assert_allclose((low, high), np.percentile(np.arange(1, 2001), [0.5, 99.5]))
    with pytest.raises(BadScan, match=r"x: .*no contrast"):
        volume.percentile_range((array > 0).astype(np.float32), 0.5, 99.5, "x")


def test_uint16_round_trip() -> None:
    every = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(volume.from_uint16(every), every.astype(np.float32) / np.float32(65535))
    np.testing.assert_array_equal(volume.to_uint16(volume.from_uint16(every)), every)
    unit = np.random.default_rng(0).random(1000).astype(np.float32)
    assert np.abs(volume.from_uint16(volume.to_uint16(unit)) - unit).max() <= 0.5 / 65535 + 1e-7


@pytest.mark.parametrize(
    ("low", "high", "hint", "want"),
    [
        (-1000, 1500, None, "CT"),
        (-1000, 1500, "CT", "CT"),
        (-1000, 1500, "MRI", "MR"),  # what the dataset says goes
        (0, 255, "CT", "MR"),  # rescaled to uint8
        (0, 4095, "CT", "MR"),  # stored without its intercept
        (-100, 300, "CT", "CT"),  # cut out within the body: no air, yet HU
        (-47, 800, None, "MR"),
        (0, 800, None, "MR"),
        (0, 800, "T1w", "MR"),
        (0, 800, "FLAIR", "MR"),
    ],
)
def test_modality(low: int, high: int, hint: str | None, want: str) -> None:
    array = np.linspace(low, high, 1000, dtype=np.float32).reshape(1, 10, 10, 10)
    assert volume.modality(Volume(array, np.eye(4)), hint, "x") == want


def test_modality_of_neither_kind() -> None:
    scan = Volume(np.linspace(0, 1, 8, dtype=np.float32).reshape(1, 2, 2, 2), np.eye(4), "PT")
    with pytest.raises(BadScan, match="x: its modality 'pt'"):
        volume.modality(scan, None, "x")


# ----------------------------------------------------------------------------------------- real scans


@pytest.mark.parametrize(
    ("name", "shape", "orientation", "modality"),
    [
        ("ct_abdomen_3mm", (122, 101, 30), "RAS", "CT"),
        ("ct_trunk_3mm", (122, 101, 112), "RAS", "CT"),
        ("mr_abdomen_3mm", (117, 91, 20), "LPS", "MR"),
        ("ct_head_float64", (256, 242, 154), "RAS", "MR"),  # a CT rescaled to 0..563
        ("ct_head_oblique", (175, 248, 58), "RAS", "MR"),  # a CT rescaled to uint8, gantry tilted
    ],
)
def test_real_nifti(shared_data: Path, name: str, shape: tuple, orientation: str, modality: str) -> None:
    path = shared_data / "scans" / f"{name}.nii.gz"
    got = decode_nifti(path.read_bytes(), str(path))
    want = nib.load(path)
    np.testing.assert_array_equal(got.array_CXYZ[0], want.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(got.affine, want.affine)
    assert (got.shape_xyz, got.orientation) == (shape, orientation)
    assert volume.modality(got, None, name) == modality
