"""What is found where: Decathlon and MONAI lists, nnU-Net raw, BIDS, CSV, DICOM series, plain folders."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from importing import SMALL, found, labels, put, put_json, put_text, refusal

from logonet.core.errors import UserError
from logonet.data import importers, manifest, phantom
from logonet.data.manifest import Manifest, Scan, Source
from logonet.data.volume import encode_nifti
from logonet.storage import object_store


@pytest.fixture(params=["folder", "bucket"])
def root(request: pytest.FixtureRequest) -> str:
    """A place for a dataset, on disk and in a bucket."""
    if request.param == "bucket":
        return request.getfixturevalue("bucket") + "/some/prefix"
    return str(request.getfixturevalue("tmp_path"))


# ------------------------------------------------------------------------------------- plain folders


def test_prefix_finds_scans_and_skips_the_rest(tmp_path: Path) -> None:
    put(
        tmp_path,
        "a.nii.gz",
        "deep/er/b.nii",
        "C.NII.GZ",
        "._a.nii.gz",
        ".hidden.nii",
        "notes.txt",
        "x.nii.gz.md5",
    )
    got = found(tmp_path)
    assert list(got) == ["C.NII.GZ", "a.nii.gz", "deep/er/b.nii"]
    assert {s.subject for s in got.values()} == {"C", "a", "b"}
    assert {s.dataset for s in got.values()} == {tmp_path.name}
    assert got["a.nii.gz"].size_bytes == len("a.nii.gz")


def test_labels_are_no_scans_and_go_to_their_image(tmp_path: Path) -> None:
    put(
        tmp_path,
        "t/imagesTr/a.nii.gz",
        "t/labelsTr/a.nii.gz",
        "t/imagesTs/b.nii.gz",
        "t/labelsTr/orphan.nii.gz",
    )
    put(tmp_path, "ct.nii.gz", "ct_labels.nii.gz", "mr.nii", "mr_seg.nii", "alone_seg.nii.gz")
    got = found(tmp_path)
    assert labels(tmp_path, got) == {
        "ct.nii.gz": "ct_labels.nii.gz",
        "mr.nii": "mr_seg.nii",
        "t/imagesTr/a.nii.gz": "t/labelsTr/a.nii.gz",
        "t/imagesTs/b.nii.gz": "",
    }
    assert {name: s.split for name, s in got.items() if "images" in name} == {
        "t/imagesTr/a.nii.gz": "train",
        "t/imagesTs/b.nii.gz": "test",
    }


def test_dicom_folders_are_series(tmp_path: Path) -> None:
    put(tmp_path, "p1/ct/2.dcm", "p1/ct/1.dcm", "p1/mr/1.DCM", "p1/mr/._1.dcm", "b.nii.gz")
    got = found(tmp_path)
    assert list(got) == ["b.nii.gz", "p1/ct", "p1/mr"]
    assert got["p1/ct"].files == (f"{tmp_path}/p1/ct/1.dcm", f"{tmp_path}/p1/ct/2.dcm")
    assert importers.sources(f"{tmp_path}/p1/ct")[0].files == got["p1/ct"].files


# ------------------------------------------------------------------------------- Decathlon, MONAI lists

DESCRIPTION = {
    "name": "Liver",
    "licence": "CC-BY-SA 4.0",
    "modality": {"0": "CT"},
    "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
    "validation": [{"image": "imagesTr/v.nii.gz", "label": "labelsTr/v.nii.gz"}],
    "test": ["./imagesTs/t.nii.gz", {"image": "/elsewhere/u.nii.gz"}],
}


@pytest.mark.parametrize("by", ["its dataset.json", "its folder", "a folder above"])
def test_decathlon(tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(importers.DATA_ROOTS, "s3://other/, /elsewhere")
    task = tmp_path / "all" / "Task03"
    put(task, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTr/not_listed.nii.gz")
    (task / "dataset.json").write_text(json.dumps(DESCRIPTION))
    put(tmp_path, "all/other.nii.gz")
    uri = {"its dataset.json": task / "dataset.json", "its folder": task, "a folder above": tmp_path / "all"}[
        by
    ]
    got = importers.sources(str(uri))
    listed = [s for s in got if s.dataset == "Liver"]
    rows = [(s.uri, s.subject, s.split, s.label_uri, s.modality, s.licence) for s in listed]
    assert rows == [
        (f"{task}/imagesTr/a.nii.gz", "a", "train", f"{task}/labelsTr/a.nii.gz", "CT", "CC-BY-SA 4.0"),
        (f"{task}/imagesTr/v.nii.gz", "v", "val", f"{task}/labelsTr/v.nii.gz", "CT", "CC-BY-SA 4.0"),
        (f"{task}/imagesTs/t.nii.gz", "t", "test", "", "CT", "CC-BY-SA 4.0"),
        ("/elsewhere/u.nii.gz", "u", "test", "", "CT", "CC-BY-SA 4.0"),
    ]
    others = [s.uri for s in got if s.dataset != "Liver"]
    assert others == ([f"{tmp_path}/all/other.nii.gz"] if by == "a folder above" else [])


def test_version_follows_the_scan_and_its_label(tmp_path: Path) -> None:
    put(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTr/b.nii.gz")
    before = found(tmp_path)
    assert before == found(tmp_path)
    (tmp_path / "labelsTr/a.nii.gz").write_bytes(b"another label")
    after = found(tmp_path)
    assert after["imagesTr/a.nii.gz"].version != before["imagesTr/a.nii.gz"].version
    assert after["imagesTr/b.nii.gz"].version == before["imagesTr/b.nii.gz"].version


LISTED = {
    "labels": {"0": "background", "2": "spleen"},
    "modality": {"0": "CT"},
    "training": [
        {"fold": 0, "image": "a.nii.gz", "label": "a_label.nii.gz"},
        {"fold": 1, "image": ["b.nii.gz"], "label": ["b_label.nii.gz"], "subject": "Bob"},
    ],
    "validation": [{"image": "../v.nii.gz", "label": "v_label.nii.gz"}],
    "test": [{"image": "t.nii.gz"}],
}


def test_monai_list_under_any_name(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(importers.DATA_ROOTS, root)
    put(root, "lists/a.nii.gz", "lists/a_label.nii.gz", "v.nii.gz")
    uri = put_json(root, "lists/fold_list.json", LISTED)
    rows = [
        (s.uri.removeprefix(root), s.subject, s.split, s.fold, s.label_uri.removeprefix(root), s.size_bytes)
        for s in importers.sources(uri)
    ]
    up = "" if object_store.is_s3(root) else "/lists/.."
    assert rows == [
        ("/lists/a.nii.gz", "a", "train", 0, "/lists/a_label.nii.gz", len("lists/a.nii.gz")),
        ("/lists/b.nii.gz", "Bob", "train", 1, "/lists/b_label.nii.gz", 0),
        (f"{up}/v.nii.gz", "v", "val", -1, "/lists/v_label.nii.gz", len("v.nii.gz")),
        ("/lists/t.nii.gz", "t", "test", -1, "", 0),
    ]
    assert {s.classes for s in importers.sources(uri)} == {("background", "", "spleen")}
    assert {s.dataset for s in importers.sources(uri)} == {"lists"}


def test_channels_of_a_list_are_one_scan(tmp_path: Path) -> None:
    items = [{"image": ["c1_flair.nii.gz", "c1_t1.nii.gz"], "label": "c1_seg.nii.gz"}]
    uri = put_json(tmp_path, "brats.json", {"modality": {"0": "FLAIR", "1": "T1w"}, "training": items})
    (source,) = importers.sources(uri)
    assert (source.uri, source.channels) == (f"{tmp_path}/c1_flair.nii.gz", (f"{tmp_path}/c1_t1.nii.gz",))
    assert (source.modality, source.subject) == ("FLAIR+T1w", "c1")
    assert source.label_uri == f"{tmp_path}/c1_seg.nii.gz"


def test_a_list_sees_that_a_scan_far_away_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(importers.DATA_ROOTS, f"{tmp_path}/far")
    put(tmp_path, "far/a.nii.gz")
    uri = put_json(tmp_path, "near/list.json", {"training": [f"{tmp_path}/far/a.nii.gz"]})
    (before,) = importers.sources(uri)
    (tmp_path / "far/a.nii.gz").write_bytes(b"another scan")
    (after,) = importers.sources(uri)
    assert before.version != after.version
    assert after.size_bytes == len(b"another scan")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{torn", "not valid JSON"),
        ("[1, 2]", "must hold a mapping"),
        ('{"name": "x"}', "has no 'training', 'validation' or 'test' list of scans; is it a dataset.json?"),
        ('{"training": [{"label": "a"}]}', "an item of 'training' names no image: {'label': 'a'}"),
        ('{"training": [{"image": ["a", 2]}]}', "names no image"),
        ('{"training": [7]}', "names no image: 7"),
        ('{"training": 3}', "'training' must be a list of scans, not 3"),
        ('{"training": [{"image": "a", "label": [1, 0]}]}', "has the label [1, 0]; give one path"),
        ('{"training": [{"image": "a", "label": ["x", "y"]}]}', "give one path"),
        ('{"training": [{"image": "a", "fold": "one"}]}', "has the fold 'one'; write an integer"),
        ('{"training": ["a"], "labels": ["liver"]}', "'labels' must be a mapping"),
        ('{"training": ["a"], "labels": {"1": null}}', "one must be an integer"),
        (
            '{"training": ["a"], "labels": {"1": "liver", "01": "lung"}}',
            "'liver' and 'lung' share the value 1",
        ),
        ('{"training": ["a"], "labels": {"liver": 30000}}', "'liver' has the value 30000; use 0 to 16383"),
        ('{"training": ["a"], "labels": {"both": [1, 2]}}', "regions want 'regions_class_order', 1 numbers"),
        ('{"training": ["a"], "labels": {"both": [1, "x"]}}', "the label 'both' is [1, 'x']"),
    ],
)
def test_a_list_that_makes_no_sense(tmp_path: Path, text: str, reason: str) -> None:
    uri = put_text(tmp_path, "dataset.json", text)
    sentence = refusal(uri)
    assert sentence.startswith(uri)
    assert reason in sentence


def test_phantoms_come_back_with_their_class_names(root: str) -> None:
    uri = phantom.write_dataset(root, 2, size_vox=SMALL, classes=4)
    assert importers.sources(uri) == importers.sources(root)
    table = Manifest.of(map(manifest.inspect, importers.sources(root)))
    assert [(s.subject, s.fold, s.classes, s.label_values) for s in table.scans] == [
        (f"phantom_{i:03d}", -1, ("background", "liver", "spleen", "right kidney"), (0, 1, 2, 3))
        for i in range(2)
    ]
    assert Manifest.from_parquet(table.scans_parquet(), table.quarantine_parquet()) == table


# ------------------------------------------------------------------------------------------------ CSV


def test_csv(root: str) -> None:
    scan, labels_XYZ = phantom.phantom(0, SMALL)
    data = encode_nifti(scan.array_CXYZ[0].astype(np.int16), scan.affine)
    object_store.write(f"{root}/deep/a.nii.gz", data)
    object_store.write(f"{root}/deep/seg/a.nii.gz", encode_nifti(labels_XYZ, scan.affine))
    put(root, "deep/dicom/1.dcm", "deep/dicom/2.dcm", "deep/dicom/notes.txt")
    uri = put_text(
        root,
        "deep/table.csv",
        "\ufeffimage,label,subject,dataset,licence,modality,split,fold,sha256\r\n"
        f"a.nii.gz,seg/a.nii.gz,Ann,Organs,CC0,CT,Training,2,{hashlib.sha256(data).hexdigest().upper()}\r\n"
        "\r\n"
        f"{root}/deep/dicom, ,,,,,test,,\r\n",
    )
    first, second = importers.sources(uri)
    assert first == Source(
        uri=f"{root}/deep/a.nii.gz",
        subject="Ann",
        dataset="Organs",
        licence="CC0",
        modality="CT",
        split="train",
        fold=2,
        label_uri=f"{root}/deep/seg/a.nii.gz",
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        version=first.version,
    )
    assert (second.subject, second.dataset, second.split, second.fold, second.label_uri) == (
        "dicom",
        "table",
        "test",
        -1,
        "",
    )
    assert second.files == (f"{root}/deep/dicom/1.dcm", f"{root}/deep/dicom/2.dcm")
    assert isinstance(manifest.inspect(first), Scan)


def test_a_scan_that_is_not_the_one_in_the_csv(tmp_path: Path) -> None:
    put(tmp_path, "a.nii.gz")
    uri = put_text(tmp_path, "t.csv", f"image,sha256\na.nii.gz,{'0' * 64}\n")
    (bad,) = map(manifest.inspect, importers.sources(uri))
    assert bad == manifest.Quarantined(
        f"{tmp_path}/a.nii.gz",
        f"{tmp_path}/a.nii.gz: its SHA-256 begins {hashlib.sha256(b'a.nii.gz').hexdigest()[:10]}, not 0000000000 as "
        "listed; copy the file again or correct the list",
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "image,lable\na.nii.gz,b.nii.gz\n",
            ": unknown column 'lable'; did you mean 'label'? (known: dataset, fold, image, label, licence, modality, "
            "sha256, split, subject)",
        ),
        ("label\nb.nii.gz\n", ", line 2: names no image; fill in the column 'image'"),
        ("image,label\na.nii.gz,\n,b.nii.gz\n", ", line 3: names no image; fill in the column 'image'"),
        ("image,label\na.nii.gz\n", ", line 2: has 1 cells, its header 2; correct it"),
        (
            "image,split\na.nii.gz,tset\n",
            ", line 2: unknown split 'tset'; did you mean 'test'? (known: test, train, val)",
        ),
        ("image,fold\na.nii.gz,1.5\n", ", line 2: the fold is '1.5'; write an integer"),
        (
            "image,sha256\na.nii.gz,beef\n",
            ", line 2: the sha256 is 'beef'; write 64 hex digits or leave it empty",
        ),
        (
            "image\na.nii.gz\n./a.nii.gz\n",
            ", line 3: lists {folder}/a.nii.gz a second time; keep one of the rows",
        ),
        ("image,label\n", ": lists no scans; write a row per scan below the header image,label,subject,..."),
        ("", ": lists no scans; write a row per scan below the header image,label,subject,..."),
    ],
)
def test_a_csv_that_makes_no_sense(tmp_path: Path, text: str, sentence: str) -> None:
    uri = put_text(tmp_path, "table.csv", text)
    assert refusal(uri) == uri + sentence.format(folder=tmp_path)


def test_a_csv_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("image\nMüller.nii.gz\n".encode("latin-1"))
    assert "is not UTF-8 text" in refusal(tmp_path / "t.csv")


# -------------------------------------------------------------------------------------------- nothing


def test_nothing_found_names_the_uri(tmp_path: Path) -> None:
    put(tmp_path, "readme.txt", "._x.nii.gz", "labelsTr/a.nii.gz")
    for uri in (str(tmp_path), f"{tmp_path}/absent"):
        assert re.fullmatch(
            re.escape(uri) + r": no scans found \(\d files; looked for \.nii\.gz, .*\); correct the URI",
            refusal(uri),
        )
    for name in ("absent.nii.gz", "absent/dataset.json", "absent.csv"):
        assert name in refusal(f"{tmp_path}/{name}")
    named = f"{tmp_path}/labelsTr/a.nii.gz"
    assert refusal(named) == f"{named}: is named like a label map; give its image"


def test_real_decathlon_task(shared_data: Path) -> None:
    got = importers.sources(str(shared_data / "Task04_Hippocampus"))
    assert len(got) == 200
    assert {(s.classes, s.split, s.fold, bool(s.label_uri), s.size_bytes > 0) for s in got} == {
        (("background", "Anterior", "Posterior"), "train", -1, True, True)
    }


# -------------------------------------------------------------------------- names of cases and subjects


@pytest.mark.parametrize(
    ("images", "labels_", "wanted"),
    [  # image -> (subject, start of the scan's id, label)
        pytest.param(
            ["p1/imaging.nii.gz", "p2/imaging.nii.gz"],
            ["p1/segmentation.nii.gz", "p2/segmentation.nii.gz"],
            {f"p{i}/imaging.nii.gz": (f"p{i}", f"p{i}_imaging", f"p{i}/segmentation.nii.gz") for i in (1, 2)},
            id="KiTS: the folder is the case",
        ),
        pytest.param(
            ["imagesTr/amos_0001.nii.gz", "imagesTr/amos_0002.nii.gz"],
            ["labelsTr/amos_0001.nii.gz", "labelsTr/amos_0002.nii.gz"],
            {
                f"imagesTr/amos_000{i}.nii.gz": (
                    f"amos_000{i}",
                    f"amos_000{i}",
                    f"labelsTr/amos_000{i}.nii.gz",
                )
                for i in (1, 2)
            },
            id="AMOS: a number of the case",
        ),
        pytest.param(
            ["word_0001.nii.gz", "word_0002.nii.gz", "word_0003.nii.gz"],
            [],
            {f"word_000{i}.nii.gz": (f"word_000{i}", f"word_000{i}", "") for i in (1, 2, 3)},
            id="unlabelled, with a number of the case",
        ),
        pytest.param(
            ["imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz"],
            ["labelsTr/a.nii.gz", "labelsTr/b.nii.gz"],
            {f"imagesTr/{c}_0000.nii.gz": (c, f"{c}_0000", f"labelsTr/{c}.nii.gz") for c in "ab"},
            id="nnU-Net's channel",
        ),
        pytest.param(
            [f"c{i}_000{c}.nii.gz" for i in (1, 2) for c in (0, 1)],
            [],
            {f"c{i}_0000.nii.gz": (f"c{i}", f"c{i}", "") for i in (1, 2)},
            id="several channels of each case",
        ),
        pytest.param(
            [f"patient00{p}/patient00{p}_frame{f}.nii.gz" for p in (1, 2) for f in ("01", "12")],
            [f"patient00{p}/patient00{p}_frame{f}_gt.nii.gz" for p in (1, 2) for f in ("01", "12")],
            {
                f"patient00{p}/patient00{p}_frame{f}.nii.gz": (
                    f"patient00{p}",
                    f"patient00{p}_frame{f}",
                    f"patient00{p}/patient00{p}_frame{f}_gt.nii.gz",
                )
                for p in (1, 2)
                for f in ("01", "12")
            },
            id="ACDC: frames of a patient",
        ),
        pytest.param(
            [f"BraTS_{p}/BraTS_{p}_{c}.nii.gz" for p in (1, 2) for c in ("flair", "t1ce")],
            [f"BraTS_{p}/BraTS_{p}_seg.nii.gz" for p in (1, 2)],
            {
                f"BraTS_{p}/BraTS_{p}_{c}.nii.gz": (
                    f"BraTS_{p}",
                    f"BraTS_{p}_{c}",
                    f"BraTS_{p}/BraTS_{p}_seg.nii.gz",
                )
                for p in (1, 2)
                for c in ("flair", "t1ce")
            },
            id="BraTS: contrasts of a patient",
        ),
        pytest.param(
            ["volume-0.nii", "volume-11.nii"],
            ["segmentation-0.nii", "segmentation-11.nii"],
            {f"volume-{i}.nii": (f"volume-{i}", f"volume-{i}", f"segmentation-{i}.nii") for i in (0, 11)},
            id="LiTS",
        ),
        pytest.param(
            ["img/img01.nii.gz", "img/img02.nii.gz"],
            ["label/label01.nii.gz", "label/label02.nii.gz"],
            {f"img/img0{i}.nii.gz": (f"img0{i}", f"img0{i}", f"label/label0{i}.nii.gz") for i in (1, 2)},
            id="Synapse",
        ),
        pytest.param(
            ["site/site_1.nii.gz", "site/site_2.nii.gz"],
            [],
            {f"site/site_{i}.nii.gz": (f"site_{i}", f"site_{i}", "") for i in (1, 2)},
            id="a folder of numbered cases is no patient",
        ),
        pytest.param(
            ["a.nii.gz", "b.nii.gz", "c.nii.gz", "backup/a.nii.gz"],
            [],
            {
                n: (n.split("/")[-1][0], n.split("/")[-1][0], "")
                for n in ("a.nii.gz", "b.nii.gz", "c.nii.gz", "backup/a.nii.gz")
            },
            id="a copy changes no other scan",
        ),
        pytest.param(
            [f"{site}/{p}/ct.nii.gz" for site in ("siteA", "siteB") for p in ("p1", "p2", "p3")],
            [],
            {
                f"{site}/{p}/ct.nii.gz": (f"{site}_{p}", f"{site}_{p}_ct", "")
                for site in ("siteA", "siteB")
                for p in ("p1", "p2", "p3")
            },
            id="patients of sites",
        ),
        pytest.param(
            [f"p{p}/ses-{s}/ct.nii.gz" for p in (1, 2) for s in (1, 2)],
            [],
            {f"p{p}/ses-{s}/ct.nii.gz": (f"p{p}", f"p{p}_ses-{s}_ct", "") for p in (1, 2) for s in (1, 2)},
            id="sessions of a patient",
        ),
        pytest.param(
            [f"{m}/p{p}.nii.gz" for m in ("CT", "MR") for p in range(4)],
            [],
            {f"{m}/p{p}.nii.gz": (f"p{p}", f"p{p}", "") for m in ("CT", "MR") for p in range(4)},
            id="the file is the case, the folder a contrast",
        ),
        pytest.param(
            ["a/study/ct.nii.gz", "b/study/ct.nii.gz", "b/study/mr.nii.gz"],
            ["a/study/ct_mask.nii.gz"],
            {
                "a/study/ct.nii.gz": ("a", "a_ct", "a/study/ct_mask.nii.gz"),
                "b/study/ct.nii.gz": ("b", "b_ct", ""),
                "b/study/mr.nii.gz": ("b", "b_mr", ""),
            },
            id="a folder that all share says nothing",
        ),
    ],
)
def test_cases_subjects_and_label_maps_by_name(
    tmp_path: Path, images: list[str], labels_: list[str], wanted: dict[str, tuple[str, str, str]]
) -> None:
    put(tmp_path, *images, *labels_)
    got = found(tmp_path)
    assert {
        n: (s.subject, s.case or manifest.stem(s.uri), labels(tmp_path, got)[n]) for n, s in got.items()
    } == wanted
    assert importers.survey(str(tmp_path)).told() == ""


def test_what_is_not_used_is_counted_with_its_reason(tmp_path: Path) -> None:
    put(
        tmp_path,
        "a.nii.gz",
        "b.nii.bz2",
        "c.nrrd.zst",
        "notes.txt",
        "more.txt",
        "x_seg.nii.gz",
        "labelsTr/y.nii.gz",
    )
    (tmp_path / "gone.nii.gz").symlink_to(tmp_path / "annex/objects/MD5E-s1")
    survey = importers.survey(str(tmp_path))
    assert [s.uri for s in survey.sources] == [f"{tmp_path}/a.nii.gz"]
    counts = {why: len(files) for why, files in survey.unused.items()}
    assert sorted(counts.values()) == [1, 1, 1, 2, 2]
    assert counts["label maps without an image of that name"] == 2
    assert counts["packed as bz2, which is not read"] == 1
    told = survey.told()
    assert told.startswith("7 files are not used: ")
    assert "git-annex" in told
    assert "packed as zst" in refusal(tmp_path / "c.nrrd.zst") or "unpack" in refusal(tmp_path / "c.nrrd.zst")


def test_lists_as_other_programs_write_them(tmp_path: Path) -> None:
    put(
        tmp_path,
        *(f"imagesTr/c{i}_0000.nii.gz" for i in range(2)),
        *(f"labelsTr/c{i}.nii.gz" for i in range(2)),
    )
    put(tmp_path, "imagesTs/t.nii.gz")
    items = [{"image": f".\\imagesTr\\c{i}.nii.gz", "label": f".\\labelsTr\\c{i}.nii.gz"} for i in range(2)]
    uri = put_json(tmp_path, "list.json", {"training": items, "testing": ["imagesTs/t.nii.gz"]})
    got = {s.uri.removeprefix(f"{tmp_path}/"): (s.subject, s.split) for s in importers.sources(uri)}
    assert got == {
        "imagesTr/c0_0000.nii.gz": ("c0", "train"),
        "imagesTr/c1_0000.nii.gz": ("c1", "train"),
        "imagesTs/t.nii.gz": ("t", "test"),
    }
    uri = put_json(tmp_path, "typo.json", {"training": [items[0] | {"fold:": 1}]})
    assert refusal(uri).endswith("has the key 'fold:'; did you mean 'fold'?")
    uri = put_json(tmp_path, "other.json", {"training": items, "validatoin": items})
    assert "unknown list of scans 'validatoin'; did you mean 'validation'?" in refusal(uri)
    uri = put_text(
        tmp_path, "excel.csv", "\ufeffimage;label\r\nimagesTr/c0_0000.nii.gz;labelsTr/c0.nii.gz\r\n"
    )
    assert [s.label_uri for s in importers.sources(uri)] == [f"{tmp_path}/labelsTr/c0.nii.gz"]


def test_dicom_is_known_by_its_bytes(root: str) -> None:
    slice_ = bytes(128) + b"DICM" + bytes(8)
    for name in ("p1/IM0001", "p1/IM0002", "p2/x.1.2.840", "p3/a.IMA"):
        object_store.write(f"{root}/{name}", slice_)
    put(root, "p1/DICOMDIR", "p4/LICENCE")
    object_store.write(f"{root}/p4/README", bytes(200))
    survey = importers.survey(root)
    assert {s.uri.removeprefix(f"{root}/"): len(s.files) for s in survey.sources} == {
        "p1": 2,
        "p2": 1,
        "p3": 1,
    }
    assert sum(map(len, survey.unused.values())) == 3


def test_channels_are_chosen_by_the_last_word_of_a_name(tmp_path: Path) -> None:
    for case in ("BraTS_1", "BraTS_2"):
        put(tmp_path, *(f"{case}/{case}_{c}.nii.gz" for c in ("t1", "t1ce", "flair", "seg")))
    put(tmp_path, "BraTS_3/BraTS_3_flair.nii.gz", "BraTS_3/BraTS_3_seg.nii.gz")
    survey = importers.survey(str(tmp_path), ("flair", "T1ce"))
    first, second = survey.sources
    assert first.uri == f"{tmp_path}/BraTS_1/BraTS_1_flair.nii.gz"
    assert first.channels == (f"{tmp_path}/BraTS_1/BraTS_1_t1ce.nii.gz",)
    assert first.label_uri == f"{tmp_path}/BraTS_1/BraTS_1_seg.nii.gz"
    assert (first.subject, first.case, second.subject) == ("BraTS_1", "BraTS_1", "BraTS_2")
    assert len(survey.unused["scans without all of the channels flair, T1ce"]) == 3
    put(tmp_path, "bids/sub-1/anat/sub-1_T1w.nii.gz", "bids/sub-1/anat/sub-1_T2w.nii.gz")
    (session,) = importers.sources(f"{tmp_path}/bids", ("T2w", "T1w"))
    assert (session.uri, session.subject) == (f"{tmp_path}/bids/sub-1/anat/sub-1_T2w.nii.gz", "sub-1")
    with pytest.raises(UserError, match="no case has all of the channels adc"):
        importers.survey(str(tmp_path), ("adc",))


def test_importers_take_time_in_proportion_to_the_scans(tmp_path: Path) -> None:
    """Counted in calls, not in seconds: what is called for each scan is called once for each."""
    import cProfile
    import pstats

    from logonet.data.importers import folder, naming
    from logonet.storage.object_store import Entry

    def calls(n: int) -> int:
        entries = {
            u: Entry(u, 10, "v") for i in range(n) for u in (f"/d/p{i}/ct.nii.gz", f"/d/p{i}/seg.nii.gz")
        }
        profile = cProfile.Profile()
        profile.runcall(lambda: naming.identify(folder.folder_sources(entries, "/d"), "/d"))
        return pstats.Stats(profile).total_calls

    assert calls(400) < 2.5 * calls(200)


def test_a_list_of_too_many_channels_and_a_plus_in_a_modality(tmp_path: Path) -> None:
    put(tmp_path, "a.nii.gz")
    uri = put_json(tmp_path, "dataset.json", {"training": [{"image": ["a.nii.gz"] * 50}]})
    assert "is listed with 50 channels; give at most 8 different files" in refusal(uri)
    uri = put_json(tmp_path, "dataset.json", {"modality": {"0": "T1+C"}, "training": ["a.nii.gz"]})
    assert importers.sources(uri)[0].modality == "T1 C"


def test_masks_of_more_names_than_a_label_map_can_hold(tmp_path: Path) -> None:
    for case in range(2):
        put(
            tmp_path,
            f"c{case}/ct.nii.gz",
            *(f"c{case}/segmentations/lesion_{case}_{i}.nii.gz" for i in range(130)),
        )
    assert "hold 260 different names, more than the 254 classes" in refusal(tmp_path)


def test_a_root_of_any_name(tmp_path: Path) -> None:
    root = tmp_path / "segmentation"
    put(root, "p1/ct.nii.gz", "p1/seg.nii.gz", "p2/ct.nii.gz")
    assert labels(root, found(root)) == {"p1/ct.nii.gz": "p1/seg.nii.gz", "p2/ct.nii.gz": ""}
