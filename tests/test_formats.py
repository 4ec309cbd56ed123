"""Scans in other formats than NIfTI and DICOM, label maps told from scans by content, grids of labels."""

from __future__ import annotations

import bz2
import gzip
import io
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from logonet.core.errors import BadScan
from logonet.data import importers, manifest, phantom, volume
from logonet.data.manifest import Manifest, Quarantined, Scan, Source
from logonet.data.volume import Volume, encode_nifti
from logonet.storage import object_store

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SIZE = (20, 18, 16)


def ct(seed: int = 0, modality: str = "CT") -> tuple[Volume, np.ndarray]:
    """A phantom of whole numbers on an oblique grid."""
    scan, labels_XYZ = phantom.phantom(seed, SIZE, (2.0, 2.5, 3.0), modality=modality, orientation="LPS")
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    return Volume(np.round(scan.array_CXYZ).astype(np.float32), turn @ scan.affine), labels_XYZ


def itk(scan: Volume, dtype: type = np.int16) -> sitk.Image:
    image = sitk.GetImageFromArray(scan.array_CXYZ[0].T.astype(dtype))
    lps = LPS @ scan.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def as_itk(ending: str, compressed: bool) -> Callable[[Volume, Path], None]:
    return lambda scan, folder: sitk.WriteImage(itk(scan), str(folder / f"a{ending}"), compressed)


def as_mgz(scan: Volume, folder: Path) -> None:
    image = nib.MGHImage(scan.array_CXYZ[0].astype(np.int16), scan.affine)
    (folder / "a.mgz").write_bytes(gzip.compress(image.to_bytes()))


def as_pair(scan: Volume, folder: Path) -> None:
    nib.save(nib.Nifti1Pair(scan.array_CXYZ[0].astype(np.int16), scan.affine), folder / "a.hdr")


WRITERS = {
    ".nrrd": as_itk(".nrrd", True),
    ".nhdr": as_itk(".nhdr", False),
    ".mha": as_itk(".mha", True),
    ".mhd": as_itk(".mhd", False),
    ".mhd compressed": as_itk(".mhd", True),
    ".mgz": as_mgz,
    ".hdr": as_pair,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_scan_is_the_same_in_every_format(tmp_path: Path, kind: str) -> None:
    scan, _ = ct()
    WRITERS[kind](scan, tmp_path)
    survey = importers.survey(str(tmp_path))
    (source,) = survey.sources
    assert survey.told() == ""
    assert manifest.stem(source.uri) == "a"
    assert importers.sources(source.uri)[0].files == source.files
    row = manifest.inspect(source)
    assert isinstance(row, Scan), row
    got = manifest.load(row)
    np.testing.assert_array_equal(got.array_CXYZ, scan.array_CXYZ)
    np.testing.assert_allclose(got.affine, scan.affine, atol=1e-4)
    assert (row.modality, row.dtype) == ("CT", "int16")
    with pytest.raises(BadScan):
        volume.decode(source.uri, [(source.uri, Path(source.uri).read_bytes()[:40])])


@pytest.mark.parametrize("kind", [".nrrd", ".mha", ".mgz"])
def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](ct()[0], tmp_path)
    path = tmp_path / f"a{kind}"
    data = path.read_bytes()
    said: list[str] = []
    for n in range(0, len(data), max(1, len(data) // 23)):
        try:
            got = volume.decode(str(path), [(str(path), data[:n])])
        except BadScan as err:
            said.append(str(err))
        else:  # nothing but gzip's checksum is missing
            np.testing.assert_array_equal(got.array_CXYZ, ct()[0].array_CXYZ)
    assert len(said) >= 23
    assert all(sentence.startswith(f"{path}: ") and "\n" not in sentence for sentence in said)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("ElementDataFile = /etc/passwd", "says that its voxels are in '/etc/passwd'"),
        ("ElementDataFile : ../b.raw", "says that its voxels are in '../b.raw'"),
        ("elementdatafile=LIST", "says that its voxels are in 'LIST'"),
        ("DimSize = 9999 9999 9999\nElementDataFile = a.raw", "its header claims 9999x9999x9999 voxels"),
        ("DimSize = 20 18 16\nElementDataFile = a.raw", "cannot be read"),
        ("Comment = " + "x" * 70_000 + "\nElementDataFile = a.raw", "its header is damaged or none"),
    ],
)
def test_a_header_names_no_other_file_and_claims_no_more_than_there_is(
    tmp_path: Path, header: str, said: str
) -> None:
    head = f"ObjectType = Image\nNDims = 3\nElementType = MET_SHORT\n{header}\n"
    head = head if "DimSize" in head else head.replace("NDims = 3\n", "NDims = 3\nDimSize = 2 2 2\n")
    (tmp_path / "a.mhd").write_text(head)
    (tmp_path / "a.raw").write_bytes(bytes(64))
    row = manifest.inspect(Source(str(tmp_path / "a.mhd")))
    assert isinstance(row, Quarantined)
    assert said in row.reason


@pytest.mark.parametrize(
    "head",
    [
        "NDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nElementDataFile = {secret}\n",
        "NDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nElementDataFile : {secret}\n",
        "NDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\ndata file: LOCAL\nElementDataFile = {secret}\n",
        "NDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nelementdatafile = LOCAL\nElementDataFile = {secret}\n",
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\nencoding: raw\nendian: little\ndata file: {secret}\n\n",
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\nencoding: raw\nendian: little\n" + "#\n" * 40_000
        + "datafile: {secret}\n\n",
        "NRRD0004\rtype: short\rdimension: 3\rsizes: 4 4 4\rencoding: raw\rdata file: {secret}\r\r",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_no_header_reads_another_file_of_this_machine(tmp_path: Path, head: str, name: str) -> None:
    secret = tmp_path / "secret.raw"
    secret.write_bytes(np.arange(64, dtype=np.int16).tobytes())
    data = head.format(secret=secret).encode()
    for tail in (b"", bytes(np.arange(64, dtype=np.int16)[::-1].tobytes())):
        try:
            got = volume.decode(name, [(name, data + tail)])
        except BadScan:
            continue
        assert not np.array_equal(np.sort(got.array_CXYZ.ravel())[1:4], [1, 2, 3]) or tail


def test_label_maps_and_channels_may_lie_beside_their_headers(tmp_path: Path) -> None:
    """As PROMISE12 is handed out."""
    scan, labels_XYZ = ct(0, "MR")
    as_itk(".mhd", False)(scan, tmp_path)
    label = Volume(labels_XYZ[None].astype(np.float32), scan.affine)
    sitk.WriteImage(itk(label, np.uint8), str(tmp_path / "a_segmentation.mhd"))
    survey = importers.survey(str(tmp_path))
    (row,) = Manifest.of(map(manifest.inspect, survey.sources)).scans
    assert survey.told() == ""
    np.testing.assert_array_equal(manifest.load_label(row, manifest.load(row)), labels_XYZ)
    before = survey.sources[0].version
    (tmp_path / "a_segmentation.raw").write_bytes(bytes(labels_XYZ.size))
    assert importers.sources(str(tmp_path))[0].version != before
    with pytest.raises(object_store.IntegrityError):
        manifest.load_label(row, manifest.load(row))
    (tmp_path / "a.raw").unlink()
    bad = manifest.inspect(importers.sources(str(tmp_path))[0])
    assert isinstance(bad, Quarantined)
    assert "the file with its voxels, a.raw or a.zraw, is not beside it" in bad.reason


def test_what_is_no_3d_scalar_image(tmp_path: Path) -> None:
    flat = sitk.GetImageFromArray(np.arange(64, dtype=np.int16).reshape(8, 8))
    colour = sitk.GetImageFromArray(np.zeros((4, 4, 4, 3), np.uint8), isVector=True)
    for name, image, said in (("flat", flat, "8x8"), ("colour", colour, "colour or vector")):
        sitk.WriteImage(image, str(tmp_path / f"{name}.nrrd"))
        with pytest.raises(BadScan, match=said):
            volume.decode(f"{name}.nrrd", [(f"{name}.nrrd", (tmp_path / f"{name}.nrrd").read_bytes())])


def test_packed_scans_are_named_and_not_read(tmp_path: Path) -> None:
    scan, _ = ct()
    (tmp_path / "a.nii.gz").write_bytes(encode_nifti(scan.array_CXYZ[0], scan.affine))
    (tmp_path / "b.nii.bz2").write_bytes(bz2.compress(b"scan"))
    survey = importers.survey(str(tmp_path))
    assert [Path(s.uri).name for s in survey.sources] == ["a.nii.gz"]
    assert "packed as bz2" in survey.told()


# -------------------------------------------------------------------------------------- labels by content


def put(folder: Path, name: str, array_XYZ: np.ndarray, affine: np.ndarray) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(encode_nifti(array_XYZ, affine))
    return str(folder / name)


def test_a_label_map_among_scans_is_told_by_its_content(tmp_path: Path) -> None:
    """Its name says nothing; it lies on the grid of a scan and has few values in flat regions."""
    for seed in range(3):
        scan, labels_XYZ = ct(seed, "MR")
        put(tmp_path, f"case{seed}.nii.gz", scan.array_CXYZ[0].astype(np.uint16), scan.affine)
        put(tmp_path, f"case{seed}_manualA.nii.gz", labels_XYZ, scan.affine)
    table = Manifest.of(map(manifest.inspect, importers.sources(str(tmp_path))))
    assert [s.scan_id[:5] for s in table.scans] == ["case0", "case1", "case2"]
    assert [Path(q.uri).name for q in table.quarantined] == [f"case{i}_manualA.nii.gz" for i in range(3)]
    assert "looks like a label map" in table.quarantined[0].reason
    listed = tmp_path / "list.csv"
    listed.write_text("image,modality\ncase0_manualA.nii.gz,MR\ncase0.nii.gz,MR\n")
    assert len(Manifest.of(map(manifest.inspect, importers.sources(str(listed)))).scans) == 2


@pytest.mark.parametrize("kind", ["8-bit MR", "CT", "alone"])
def test_scans_are_not_taken_for_label_maps(tmp_path: Path, kind: str) -> None:
    scan, labels_XYZ = ct(0, "CT" if kind == "CT" else "MR")
    array_XYZ = scan.array_CXYZ[0]
    if kind == "8-bit MR":
        array_XYZ = np.round(array_XYZ / array_XYZ.max() * 255)
    put(tmp_path, "a.nii.gz", array_XYZ.astype(np.int16), scan.affine)
    if kind == "alone":  # on no scan's grid
        put(tmp_path, "b.nii.gz", labels_XYZ, np.diag([1.0, 2.0, 3.0, 1.0]))
    table = Manifest.of(map(manifest.inspect, importers.sources(str(tmp_path))))
    assert not table.quarantined


# ------------------------------------------------------------------------------------------ grids of labels


@pytest.mark.parametrize("axes", ["RAS", "PIR", "SAL"])
def test_a_label_map_with_other_axes_is_turned_to_its_image(tmp_path: Path, axes: str) -> None:
    scan, labels_XYZ = ct()
    image = put(tmp_path, "a.nii.gz", scan.array_CXYZ[0].astype(np.int16), scan.affine)
    as_saved = nib.Nifti1Image(labels_XYZ, scan.affine)
    wanted = nib.orientations.axcodes2ornt(tuple(axes))
    turn = nib.orientations.ornt_transform(nib.io_orientation(scan.affine), wanted)
    nib.save(as_saved.as_reoriented(turn), tmp_path / "l.nii.gz")
    row = manifest.inspect(Source(image, label_uri=str(tmp_path / "l.nii.gz")))
    assert isinstance(row, Scan), row
    np.testing.assert_array_equal(manifest.load_label(row, manifest.load(row)), labels_XYZ)


def test_values_a_little_off_whole_numbers_are_rounded(tmp_path: Path) -> None:
    scan, labels_XYZ = ct()
    image = put(tmp_path, "a.nii.gz", scan.array_CXYZ[0].astype(np.int16), scan.affine)
    for off, good in ((9e-4, True), (0.3, False)):
        label = put(
            tmp_path, "l.nii.gz", (labels_XYZ - off * (labels_XYZ > 0)).astype(np.float32), scan.affine
        )
        row = manifest.inspect(Source(image, label_uri=label))
        assert isinstance(row, Scan if good else Quarantined)
        if isinstance(row, Scan):
            np.testing.assert_array_equal(manifest.load_label(row, manifest.load(row)), labels_XYZ)


def test_a_good_qform_counts_where_the_sform_is_unusable(tmp_path: Path) -> None:
    scan, _ = ct()
    image = nib.Nifti1Image(scan.array_CXYZ[0].astype(np.int16), scan.affine)
    image.set_qform(scan.affine, 1)
    out = io.BytesIO(image.to_bytes())
    header = nib.Nifti1Header(out.getvalue()[:348])
    for row in ("srow_x", "srow_y", "srow_z"):
        header[row] = 0
    header["sform_code"] = 1
    data = header.binaryblock + out.getvalue()[348:]
    np.testing.assert_allclose(volume.decode_nifti(data, "a.nii").affine, scan.affine, atol=1e-4)
    header["qform_code"] = 0
    with pytest.raises(BadScan, match="affine is singular"):
        volume.decode_nifti(header.binaryblock + out.getvalue()[348:], "a.nii")


@pytest.mark.parametrize(
    ("told", "modality"),
    [("CTA", "CT"), ("CT angiography", "CT"), ("MRI", "MR"), ("T1ce", "MR"), ("FLAIR", "MR")],
)
def test_modalities_as_datasets_write_them(told: str, modality: str) -> None:
    assert volume.modality(ct()[0], told, "a") == modality


def test_few_subjects_are_pointed_out() -> None:
    assert manifest.subjects_doubt(["d/a"] * 8).startswith("8 scans are of 1 subject only")
    assert "(9 of 'd/a')" in manifest.subjects_doubt(["d/a"] * 9 + ["d/b"] * 8)
    assert manifest.subjects_doubt([f"d/{i // 4}" for i in range(40)]) == ""
    assert manifest.subjects_doubt([]) == ""
