"""Every problem of every case is found, said in a sentence, and shown."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logonet.core.errors import UserError
from logonet.data import importers, manifest, phantom, validate
from logonet.data.manifest import Quarantined, Source
from logonet.data.validate import Checked, Problem
from logonet.data.volume import encode_nifti
from logonet.storage import object_store

SMALL = (16, 16, 16)
SCAN, LABELS_XYZ = phantom.phantom(4, SMALL, classes=3)
IMAGE_XYZ = SCAN.array_CXYZ[0].astype(np.int16)
Change = Callable[[np.ndarray], np.ndarray]


def same(array: np.ndarray) -> np.ndarray:
    return array


def image(change: Change = same, affine: np.ndarray = SCAN.affine) -> bytes:
    return encode_nifti(change(IMAGE_XYZ), affine)


def label(change: Change = same, affine: np.ndarray = SCAN.affine) -> bytes:
    return encode_nifti(change(LABELS_XYZ), affine)


def first(*values: float) -> Change:
    """The array as float32 with ``values`` in its first voxels."""

    def change(array: np.ndarray) -> np.ndarray:
        out = array.astype(np.float32)
        out.flat[: len(values)] = values
        return out

    return change


def moved(mm: float) -> np.ndarray:
    affine = SCAN.affine.copy()
    affine[0, 3] += mm
    return affine


def nan_in_metres() -> bytes:
    """A scan with NaN whose header counts in metres, as some converters write."""
    made = nib.Nifti1Image(first(np.nan)(IMAGE_XYZ), np.diag([1e-3, 1e-3, 1e-3, 1]) @ SCAN.affine)
    made.header.set_xyzt_units("meter")
    return gzip.compress(made.to_bytes())


def source(folder: Path, image: bytes | None, label: bytes | None, **changes: Any) -> Source:
    """A case of one image and its label, of which those that are None are not there."""
    for name, data in (("a.nii.gz", image), ("l.nii.gz", label)):
        if data is not None:
            (folder / name).write_bytes(data)
    made = Source(
        uri=f"{folder}/a.nii.gz",
        subject="a",
        dataset="d",
        label_uri=f"{folder}/l.nii.gz",
        classes=("background", "liver", "spleen"),
    )
    return dataclasses.replace(made, **changes)


# what the case is -> image, label, changes of its source, and check -> the sentence behind the file's name
NAN = "has voxels that are not finite (NaN or infinity); replace them"
BROKEN: dict[str, tuple[bytes | None, bytes | None, dict[str, Any], dict[str, str]]] = {
    "fine": (image(), label(), {}, {}),
    "fine without classes": (image(), label(first(9)), {"classes": ()}, {}),
    "no image": (
        None,
        label(),
        {},
        {"opens": "a.nii.gz: no such file; copy it there or drop it from the list"},
    ),
    "no label": (
        image(),
        None,
        {},
        {"label opens": "l.nii.gz: no such file; copy it there or drop it from the list"},
    ),
    "nothing": (
        None,
        None,
        {},
        {
            "opens": "a.nii.gz: no such file; copy it there or drop it from the list",
            "label opens": "l.nii.gz: no such file; copy it there or drop it from the list",
        },
    ),
    "too large": (
        image(),
        label(),
        {"size_bytes": 2**34},
        {"opens": "a.nii.gz: has 16.0 GiB, too much to decode; split it"},
    ),
    "not the listed file, and of another place than its label": (
        image(affine=moved(4)),
        label(),
        {"sha256": "0" * 64},
        {
            "checksum": f"a.nii.gz: its SHA-256 begins {hashlib.sha256(image(affine=moved(4))).hexdigest()[:10]}, not "
            "0000000000 as listed; copy the file again or correct the list",
            "label affine": "l.nii.gz: the label lies 4.0 mm off its image; resample it onto the image's grid, or "
            "correct the affine that is wrong",
        },
    ),
    "torn, with a label of another shape": (
        image()[:-9],
        label(lambda a: a[:, :-1]),
        {},
        {
            "opens": "a.nii.gz: truncated gzip data; copy the file again",
            "label shape": "l.nii.gz: the label has shape (16, 15, 16), its image (16, 16, 16); resample it",
        },
    ),
    "not a scan at all": (
        b"<html>403</html>",
        label(),
        {},
        {"opens": "a.nii.gz: is not gzip data, though its name says so; copy the file again"},
    ),
    "NaN, a moved label with fractions and an undeclared value": (
        image(first(np.nan)),
        label(first(0.5, -1, 20000, 1.5, 7), moved(-3)),
        {},
        {
            "finite": f"a.nii.gz: {NAN}",
            "label affine": "l.nii.gz: the label lies 3.0 mm off its image; resample it onto the image's grid, or "
            "correct the affine that is wrong",
            "label values": "l.nii.gz: a label map holds integers from 0 to 16383, this one also -1, 0.5, 1.5, ...; "
            "correct it",
            "label set": "l.nii.gz: holds 7, but the dataset declares 0 background, 1 liver, 2 spleen; correct one of "
            "them",
        },
    ),
    "infinity": (image(first(np.inf)), label(), {}, {"finite": f"a.nii.gz: {NAN}"}),
    "NaN in metres": (nan_in_metres(), label(), {}, {"finite": f"a.nii.gz: {NAN}"}),
    "constant, in a label of NaN that is too long": (
        image(lambda a: a * 0),
        encode_nifti(np.full((16, 16, 17), np.nan, np.float32), SCAN.affine),
        {},
        {
            "constant": "a.nii.gz: every voxel is 0; there is nothing in the scan",
            "label finite": f"l.nii.gz: {NAN}",
            "label shape": "l.nii.gz: the label has shape (16, 16, 17), its image (16, 16, 16); resample it",
        },
    ),
    "another modality, an empty label": (
        image(),
        label(lambda a: a * 0),
        {"modality": "PET"},
        {
            "modality": "a.nii.gz: its modality 'pet' is neither CT nor MR",
            "label empty": "l.nii.gz: holds nothing but background; segment the case or leave its label out",
        },
    ),
    "two undeclared values, one between the declared ones": (
        image(),
        label(first(2, 4)),
        {"classes": ("", "liver", "", "spleen")},
        {
            "label set": "l.nii.gz: holds 2, 4, but the dataset declares 1 liver, 3 spleen; correct one of them",
        },
    ),
    "flat and long voxels": (
        image(lambda a: a[:, :, :7], np.diag([1, 1.25, 5, 1])),
        label(lambda a: a[:, :, :7], np.diag([1, 1.25, 5, 1])),
        {},
        {
            "anisotropy": "a.nii.gz: its voxels are 1 x 1.25 x 5 mm, 5.0 times longer than wide; set a spacing to "
            "resample to",
            "tiny": "a.nii.gz: has only 16 x 16 x 7 voxels; a crop of it is mostly padding, so leave it out",
        },
    ),
}
WARNINGS = {"anisotropy", "tiny"}


@pytest.mark.parametrize("case", BROKEN)
def test_all_problems_of_a_case_at_once(tmp_path: Path, case: str) -> None:
    *files, changes, expected = BROKEN[case]
    bad = source(tmp_path, *files, **changes)
    checked = validate.check(bad)
    assert {p.check: p.sentence.removeprefix(f"{tmp_path}/") for p in checked.problems} == expected
    for p in checked.problems:
        assert p.uri == bad.uri
        assert p.severity == ("warning" if p.check in WARNINGS else "error")
    assert pickle.loads(pickle.dumps(checked)) == checked


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_fine_here_is_imported_and_what_is_not_imported_is_shown(tmp_path: Path, case: str) -> None:
    *files, changes, _ = BROKEN[case]
    bad = source(tmp_path, *files, **changes)
    row = manifest.inspect(bad)
    checked = validate.check(bad)
    if isinstance(row, Quarantined):
        assert row.reason in {p.sentence for p in checked.problems}
    else:
        # what an import may accept and a training set may not
        assert {p.check for p in checked.problems} <= {"label set", "label empty", *WARNINGS}
        assert row.voxel_sha256 == checked.voxel_sha256


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    which=st.sampled_from(["image", "label"]),
    cut=st.integers(0, len(image())),
    packed=st.booleans(),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8),
)
def test_no_damage_stops_the_check(
    tmp_path: Path, which: str, cut: int, packed: bool, flips: list[tuple[int, int]]
) -> None:
    good = {"image": image(), "label": label()}
    raw = bytearray(good[which] if packed else gzip.decompress(good[which]))
    for place, value in flips:
        raw[min(place, len(raw) - 1)] = value
    damaged = (bytes(raw) if packed else gzip.compress(bytes(raw))) if flips else good[which][:cut]
    bad = source(tmp_path, **{**good, which: damaged})
    checked = validate.check(bad)
    if isinstance(row := manifest.inspect(bad), Quarantined):
        assert row.reason in {p.sentence for p in checked.problems if p.severity == "error"}
    assert all(p.sentence.count("\n") == 0 for p in checked.problems)


def test_an_unreachable_store_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setattr(object_store, "CONTACT_ATTEMPTS", 1)
    with pytest.raises(UserError, match="cannot reach the object store"):
        validate.check(Source("s3://bucket/a.nii.gz"))


# -------------------------------------------------------------------------------------------- together


def case(uri: str, voxels: str = "", **fields: Any) -> Checked:
    made = Source(uri, **{"subject": uri, "dataset": "d", "label_uri": f"{uri}_label", **fields})
    return Checked(made, (), voxels)


def test_duplicates_are_found_whatever_their_headers_say(tmp_path: Path) -> None:
    other = np.diag([2.0, 2.0, 2.0, 1.0])  # another spacing and place of the same voxels
    flipped = encode_nifti(IMAGE_XYZ[::-1].astype(np.float32), SCAN.affine @ _flip(IMAGE_XYZ.shape[0]))
    files = {
        "a": image(),
        "b": image(affine=other),
        "c": flipped,
        "d": image(first(99)),
        "e": gzip.compress(gzip.decompress(image()), 1),
    }
    for name, data in files.items():
        (tmp_path / f"{name}.nii.gz").write_bytes(data)
    found = validate.problems([validate.check(s) for s in importers.sources(str(tmp_path))])
    kept = f"{tmp_path}/a.nii.gz"
    assert found == [
        Problem(
            f"{tmp_path}/{name}.nii.gz",
            "duplicate",
            "error",
            f"{tmp_path}/{name}.nii.gz: has the same voxels as {kept}; keep one of them",
        )
        for name in ("b", "c", "e")
    ]


def _flip(n: int) -> np.ndarray:
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = n - 1
    return flip


def test_a_scan_in_two_lists_is_a_duplicate() -> None:
    found = validate.problems([case("x", "v"), case("x", "v"), case("y"), case("z")])
    assert [(p.check, p.sentence) for p in found] == [
        ("duplicate", "x: is listed twice; keep one of them"),
    ]


def test_a_subject_on_both_sides() -> None:
    checked = [
        case("a1", subject="ann", split="train", fold=0),
        case("a2", subject="ann", split="test"),
        case("a3", subject="ann", split="train", fold=1),
        case("b1", subject="bob", split="train", fold=2),
        case("b2", subject="bob", split="train", fold=2),
        case("c1", subject="ann", split="val", dataset="another"),
        case("c2", subject="ann", split="val", dataset="another"),
    ]
    assert [(p.uri, p.check, p.severity, p.sentence) for p in validate.problems(checked)] == [
        (
            "a2",
            "subject",
            "error",
            "a2: subject ann is in the split 'test' here and in 'train' with a1; give a subject one split",
        ),
        (
            "a3",
            "subject",
            "error",
            "a3: subject ann is in fold 1 here and in fold 0 with a1; give a subject one fold",
        ),
    ]


def test_a_missing_label_where_others_have_one() -> None:
    checked = [
        case("a"),
        case("b", label_uri=""),
        case("c", label_uri="", classes=("background", "liver")),
        case("t", label_uri="", split="test"),
        case("u", label_uri="", dataset="never labelled"),
    ]
    found = validate.problems(checked)
    assert [(p.uri, p.check, p.severity) for p in found] == [
        ("b", "label missing", "warning"),
        ("c", "label missing", "error"),
    ]
    assert found[0].sentence == (
        "b: has no label, though others of the dataset 'd' have; add it or move the scan to 'test'"
    )
    assert validate.failed(found)
    assert not validate.failed(found[:1])


def test_every_offender_is_in_the_table() -> None:
    uris = [f"s3://bucket/set [x]/imagesTr/a_rather_long_name_of_a_case_{i:04d}.nii.gz" for i in range(300)]
    found = [Problem(u, "finite", "error", f"{u}: has voxels that are not finite") for u in uris]
    found.append(Problem(uris[0], "tiny", "warning", f"{uris[0]}: has only 2 x 2 x 2 voxels"))
    found.append(
        Problem("s3://bucket/set [x]/w.nii.gz", "label set", "warning", "s3://bucket/set [x]/l: odd [1]")
    )
    text = validate.table(found, cases=400)
    lines = text.splitlines()
    assert lines[0].strip() == "below s3://bucket/set [x]/"
    assert lines[-1] == "99 of 400 cases are fine, 300 with errors, 1 with warnings only"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert rows[:2] == [
        [uris[0].removeprefix("s3://bucket/set [x]/"), "finite", "error", "has voxels that are not finite"],
        [uris[1].removeprefix("s3://bucket/set [x]/"), "finite", "error", "has voxels that are not finite"],
    ]
    assert rows[-1] == ["w.nii.gz", "label set", "warning", "l: odd [1]"]
    assert len(rows) == 302


def test_a_table_of_nothing_and_of_places_without_a_common_folder() -> None:
    assert validate.table([], cases=7) == "7 of 7 cases are fine\n"
    found = [
        Problem(u, "tiny", "warning", f"{u}: has few voxels") for u in ("/a/x.nii.gz", "s3://b/y.nii.gz")
    ]
    text = validate.table(found, cases=2)
    for p in found:
        assert f"│ {p.uri} " in text
    assert "below" not in text


# -------------------------------------------------------------------------------------- whole data sets


def test_phantoms_in_a_bucket(bucket: str) -> None:
    uri = phantom.write_dataset(f"{bucket}/task", 3, size_vox=SMALL, spacing_mm=(4.0, 4.0, 4.0))
    checked = [validate.check(s) for s in importers.sources(uri)]
    found = validate.problems(checked)
    assert found == []
    torn = f"{bucket}/task/labelsTr/phantom_001.nii.gz"
    object_store.write(torn, object_store.read(torn)[:-20])
    found = validate.problems([validate.check(s) for s in importers.sources(bucket)])
    assert [(p.uri, p.check) for p in found] == [
        (f"{bucket}/task/imagesTr/phantom_001.nii.gz", "label opens")
    ]
    assert found[0].sentence.startswith(torn)


def test_real_decathlon_task_is_fine(shared_data: Path) -> None:
    sources = importers.sources(str(shared_data / "Task04_Hippocampus" / "dataset.json"))
    checked = [validate.check(s) for s in sources[:40]]
    assert validate.problems(checked) == []
    assert len({c.voxel_sha256 for c in checked}) == 40


def test_a_label_map_of_several_channels_is_a_problem_like_others(tmp_path: Path) -> None:
    one_hot = np.zeros((12, 12, 12, 3), np.uint8)
    one_hot[..., 0] = 1
    (tmp_path / "l.nii.gz").write_bytes(encode_nifti(one_hot, np.eye(4)))
    rng = np.random.default_rng(0)
    image = rng.integers(-1000, 1000, (12, 12, 12)).astype(np.int16)
    (tmp_path / "a.nii.gz").write_bytes(encode_nifti(image, np.eye(4)))
    checked = validate.check(Source(f"{tmp_path}/a.nii.gz", label_uri=f"{tmp_path}/l.nii.gz"))
    assert [p.check for p in checked.problems] == ["label values"]
    assert "a label map has one channel, this one 3" in checked.problems[0].sentence
