"""Scans of nnU-Net raw folders and of BIDS trees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from importing import found, labels, put, put_json, put_text, refusal

from logonet.data import importers


@pytest.fixture(params=["folder", "bucket"])
def root(request: pytest.FixtureRequest) -> str:
    """A place for a dataset, on disk and in a bucket."""
    if request.param == "bucket":
        return request.getfixturevalue("bucket") + "/some/prefix"
    return str(request.getfixturevalue("tmp_path"))


# -------------------------------------------------------------------------------------------- nnU-Net

NNUNET: dict[str, Any] = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "tumour": 2, "ignore": 3},
    "numTraining": 2,
    "file_ending": ".nii.gz",
    "licence": "CC-BY 4.0",
}


def test_nnunet_raw(root: str) -> None:
    put(root, "Dataset003_Liver/imagesTr/case_7_0000.nii.gz", "Dataset003_Liver/imagesTr/case_8_0000.nii.gz")
    put(root, "Dataset003_Liver/labelsTr/case_7.nii.gz", "Dataset003_Liver/imagesTs/t_0000.nii.gz")
    put(root, "Dataset003_Liver/imagesTr/._case_7_0000.nii.gz", "Dataset003_Liver/nnUNetPlans.json")
    uri = put_json(root, "Dataset003_Liver/dataset.json", NNUNET)
    got = importers.sources(uri)
    folder = f"{root}/Dataset003_Liver"
    assert [(s.uri, s.subject, s.split, s.fold, s.label_uri) for s in got] == [
        (f"{folder}/imagesTr/case_7_0000.nii.gz", "case_7", "train", -1, f"{folder}/labelsTr/case_7.nii.gz"),
        (f"{folder}/imagesTr/case_8_0000.nii.gz", "case_8", "train", -1, ""),
        (f"{folder}/imagesTs/t_0000.nii.gz", "t", "test", -1, ""),
    ]
    assert {(s.dataset, s.licence, s.modality, s.classes) for s in got} == {
        ("Dataset003_Liver", "CC-BY 4.0", "CT", ("background", "liver", "tumour", "ignore"))
    }
    assert got == importers.sources(folder) == importers.sources(root)


def test_several_nnunet_datasets_with_channels_and_test_labels(tmp_path: Path) -> None:
    for name in ("Dataset001_A", "Dataset002_B"):
        put(tmp_path, f"{name}/imagesTr/x_0000.nii.gz", f"{name}/imagesTr/x_0001.nii.gz")
        put(
            tmp_path,
            f"{name}/labelsTr/x.nii.gz",
            f"{name}/imagesTs/y_0000.nii.gz",
            f"{name}/labelsTs/y.nii.gz",
        )
        put_json(tmp_path, f"{name}/dataset.json", NNUNET | {"channel_names": {"0": "T2w", "1": "noNorm"}})
    # nnU-Net copies the description beside what it derives from the data
    put(tmp_path, "preprocessed/gt_segmentations/x.nii.gz")
    put_json(tmp_path, "preprocessed/dataset.json", NNUNET)
    got = found(tmp_path)
    assert {n: (s.dataset, s.subject, s.modality, s.split) for n, s in got.items()} == {
        f"{name}/{file}": (name, subject, modality, split)
        for name in ("Dataset001_A", "Dataset002_B")
        for file, subject, modality, split in (
            ("imagesTr/x_0000.nii.gz", "x", "T2w+noNorm", "train"),
            ("imagesTs/y_0000.nii.gz", "y", "T2w", "test"),
        )
    }
    channels = {n: [u.removeprefix(f"{tmp_path}/") for u in s.channels] for n, s in got.items()}
    assert channels["Dataset001_A/imagesTr/x_0000.nii.gz"] == ["Dataset001_A/imagesTr/x_0001.nii.gz"]
    assert set(labels(tmp_path, got).values()) == {
        f"{name}/{label}.nii.gz"
        for name in ("Dataset001_A", "Dataset002_B")
        for label in ("labelsTr/x", "labelsTs/y")
    }


def test_nnunet_regions(root: str) -> None:
    put(root, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    labels_ = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    uri = put_json(root, "dataset.json", NNUNET | {"labels": labels_, "regions_class_order": [1, 2, 3]})
    (source,) = importers.sources(uri)
    assert source.classes == ("background", "label 1", "label 2", "enhancing", "ignore")
    assert source.regions == ("whole:1,2,3", "core:2,3", "enhancing:3")
    assert source.region_values == (1, 2, 3)


def test_nnunet_folds(root: str) -> None:
    put(root, *(f"imagesTr/c{i}_0000.nii.gz" for i in range(3)), "imagesTs/c0_0000.nii.gz")
    put_json(root, "dataset.json", NNUNET)
    splits = [{"train": ["c1", "c2"], "val": ["c0"]}, {"train": ["c0", "c2"], "val": ["c1"]}]
    put_json(root, "splits_final.json", splits)
    assert {n: s.fold for n, s in found(root).items()} == {
        "imagesTr/c0_0000.nii.gz": 0,
        "imagesTr/c1_0000.nii.gz": 1,
        "imagesTr/c2_0000.nii.gz": -1,
        "imagesTs/c0_0000.nii.gz": -1,
    }


@pytest.mark.parametrize(
    ("change", "names", "sentence"),
    [
        (
            {"labels": {"background": 0, "whole": [1, 2], "core": 2}},
            ["imagesTr/a_0000.nii.gz"],
            "{root}/dataset.json: regions want 'regions_class_order', 2 numbers: the value that each region is written "
            "as, those written later on top",
        ),
        (
            {"file_ending": ".png"},
            ["imagesTr/a_0000.png"],
            "{root}/dataset.json: its files end in '.png'; logonet reads .nii.gz, .nii, .nrrd, .nhdr, .mha, .mhd, "
            ".mgz, .mgh, .hdr; convert them",
        ),
        (
            {},
            ["imagesTr/a.nii.gz"],
            "{root}/imagesTr/a.nii.gz: does not end in a channel of {root}/dataset.json (_0000 before .nii.gz); "
            "rename it",
        ),
        (
            {},
            ["imagesTr/BRATS_0001.nii.gz"],
            "{root}/imagesTr/BRATS_0001.nii.gz: does not end in a channel of {root}/dataset.json (_0000 before "
            ".nii.gz); rename it",
        ),
        (
            {"channel_names": ["CT"]},
            ["imagesTr/a_0000.nii.gz"],
            "{root}/dataset.json: 'channel_names' must be a mapping such as {{\"0\": \"CT\"}}, not ['CT']",
        ),
        (
            {},
            ["labelsTr/a.nii.gz"],
            "{root}/dataset.json: no images of this nnU-Net dataset in {root}/imagesTr; copy them there",
        ),
    ],
)
def test_an_nnunet_dataset_that_makes_no_sense(
    tmp_path: Path, change: dict[str, Any], names: list[str], sentence: str
) -> None:
    put(tmp_path, *names)
    uri = put_json(tmp_path, "dataset.json", NNUNET | change)
    assert refusal(uri) == sentence.format(root=tmp_path)


@pytest.mark.parametrize(
    ("splits", "sentence"),
    [
        ([{"train": [], "val": ["a"]}] * 2, "lists 'a' in folds 0 and 1; keep one"),
        ({"a": 1}, "must hold a list of {train: [cases], val: [cases]}"),
        ([["a"]], "must hold a list of {train: [cases], val: [cases]}"),
        (3, "must hold a list of {train: [cases], val: [cases]}"),
        (
            [{"train": [], "val": ["a", "p", "q", "r", "s"]}],
            "names 4 cases that imagesTr lacks (p, q, r, ...); copy them there or remove them from the splits",
        ),
    ],
)
def test_splits_that_make_no_sense(tmp_path: Path, splits: Any, sentence: str) -> None:
    put(tmp_path, "imagesTr/a_0000.nii.gz")
    put_json(tmp_path, "dataset.json", NNUNET)
    uri = put_json(tmp_path, "splits_final.json", splits)
    assert refusal(tmp_path).removeprefix(uri).lstrip(": ") == sentence


# ----------------------------------------------------------------------------------------------- BIDS


def test_bids_with_derivatives(root: str) -> None:
    put(root, "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz")
    put(root, "sub-02/anat/sub-02_T1w.nii.gz", "sub-02/anat/sub-02_T2w.nii.gz", "sub-03/ct/sub-03_ct.nii.gz")
    put(root, "sub-02/func/sub-02_task-rest_bold.nii.gz", "sub-02/anat/sub-02_desc-brain_mask.nii.gz")
    manual = "derivatives/manual"
    put(root, f"{manual}/sub-01/ses-1/anat/sub-01_ses-1_dseg.nii.gz")
    put(
        root,
        f"{manual}/sub-02/anat/sub-02_T2w_desc-final_dseg.nii.gz",
        "sub-03/ct/sub-03_label-liver_mask.nii.gz",
    )
    put(root, f"{manual}/sub-02/anat/sub-02_space-MNI152_dseg.nii.gz")  # on another grid
    put(root, f"{manual}/sub-02/anat/sub-02_desc-preproc_T1w.nii.gz")  # a derived image, not a new one
    put_text(root, "dseg.tsv", "index\tname\n1\tnot of masks, nor of what is nearer to another table\n")
    put_text(root, f"{manual}/dseg.tsv", "index\tname\n0\tbackground\n2\tkidney\n")
    put_json(root, "dataset_description.json", {"Name": "Kidneys", "License": "CC0", "BIDSVersion": "1.9.0"})
    got = found(root)
    kidneys = ("background", "", "kidney")
    assert {n: (s.subject, s.modality, labels(root, got)[n], s.classes) for n, s in got.items()} == {
        "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz": (
            "sub-01",
            "MR",
            f"{manual}/sub-01/ses-1/anat/sub-01_ses-1_dseg.nii.gz",
            kidneys,
        ),
        "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz": ("sub-01", "MR", "", ()),
        "sub-02/anat/sub-02_T1w.nii.gz": ("sub-02", "MR", "", ()),
        "sub-02/anat/sub-02_T2w.nii.gz": (
            "sub-02",
            "MR",
            f"{manual}/sub-02/anat/sub-02_T2w_desc-final_dseg.nii.gz",
            kidneys,
        ),
        "sub-03/ct/sub-03_ct.nii.gz": (
            "sub-03",
            "CT",
            "sub-03/ct/sub-03_label-liver_mask.nii.gz",
            ("background", "liver"),
        ),
    }
    assert {(s.dataset, s.licence, s.split, s.fold) for s in got.values()} == {
        ("Kidneys", "CC0", "train", -1)
    }


def test_bids_tree_beside_other_scans_and_participants(tmp_path: Path) -> None:
    put(tmp_path, "other.nii.gz", "ds/sub-01/anat/sub-01_T1w.nii.gz", "ds/sub-02/anat/sub-02_T1w.nii.gz")
    put_text(
        tmp_path,
        "ds/participants.tsv",
        "participant_id\tage\tsplit\tfold\nsub-01\t40\ttest\tn/a\nsub-02\t8\t\t3",
    )
    rows = {n: (s.subject, s.dataset, s.split, s.fold) for n, s in found(tmp_path).items()}
    assert rows == {
        "ds/sub-01/anat/sub-01_T1w.nii.gz": ("sub-01", "ds", "test", -1),
        "ds/sub-02/anat/sub-02_T1w.nii.gz": ("sub-02", "ds", "train", 3),
        "other.nii.gz": ("other", tmp_path.name, "train", -1),
    }


@pytest.mark.parametrize(
    ("image", "candidates", "chosen"),
    [
        ("sub-1_T1w", ["sub-1_dseg"], "sub-1_dseg"),
        ("sub-1_T1w", ["sub-1_desc-aseg_dseg", "sub-1_dseg", "sub-1_desc-aparcaseg_dseg"], "sub-1_dseg"),
        ("sub-1_T1w", ["sub-1_T2w_dseg", "sub-1_T1w_dseg"], "sub-1_T1w_dseg"),
        ("sub-1_T1w", ["sub-1_dseg", "sub-1_label-GM_mask"], "sub-1_dseg"),
        ("sub-1_T1w", ["sub-1_label-GM_mask"], "sub-1_label-GM_mask"),
        ("sub-1_T1w", ["sub-1_label-GM_desc-manual_mask"], "sub-1_label-GM_desc-manual_mask"),
        ("sub-1_T2w", ["sub-1_T2w_label-SC_seg"], "sub-1_T2w_label-SC_seg"),
        ("sub-1_T1w", ["sub-1_space-orig_dseg"], "sub-1_space-orig_dseg"),
        ("sub-1_T1w", ["sub-1_space-T1w_dseg"], "sub-1_space-T1w_dseg"),
        ("sub-1_T1w", ["sub-1_space-MNI_dseg", "sub-1_res-2_dseg", "sub-1_run-2_dseg", "sub-1_mask"], ""),
        ("sub-1_run-2_T1w", ["sub-1_dseg", "sub-1_run-2_dseg"], "sub-1_run-2_dseg"),
        ("sub-1_run-1_T1w", ["sub-1_dseg", "sub-1_run-2_dseg", "sub-11_run-1_dseg"], ""),
    ],
)
def test_which_map_is_a_bids_images_label(
    tmp_path: Path, image: str, candidates: list[str], chosen: str
) -> None:
    put(tmp_path, f"sub-1/anat/{image}.nii.gz", *(f"derivatives/x/sub-1/anat/{c}.nii.gz" for c in candidates))
    (source,) = importers.sources(str(tmp_path))
    assert source.label_uri == (f"{tmp_path}/derivatives/x/sub-1/anat/{chosen}.nii.gz" if chosen else "")


def test_two_label_maps_of_one_bids_image(tmp_path: Path) -> None:
    put(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz")
    put(tmp_path, "derivatives/a/sub-1/anat/sub-1_dseg.nii.gz", "derivatives/b/sub-1/anat/sub-1_dseg.nii.gz")
    assert refusal(tmp_path) == (
        f"{tmp_path}/sub-1/anat/sub-1_T1w.nii.gz: both {tmp_path}/derivatives/a/sub-1/anat/sub-1_dseg.nii.gz and "
        f"{tmp_path}/derivatives/b/sub-1/anat/sub-1_dseg.nii.gz are label maps of it; remove one, or list the pairs "
        "that you mean in a CSV with the columns image,label"
    )


def test_the_nearest_table_of_classes_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "derivatives/x/sub-1/anat"
    put(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", f"{folder}/sub-1_desc-a_dseg.nii.gz")
    put_text(tmp_path, "dseg.tsv", "index\tname\n1\ttop\n")
    assert importers.sources(str(tmp_path))[0].classes == ("", "top")
    monkeypatch.chdir(tmp_path)
    assert importers.sources(".")[0].classes == ("", "top")
    put_text(tmp_path, "derivatives/x/dseg.tsv", "index\tname\n1\tplain\n")
    put_text(tmp_path, "derivatives/x/desc-a_dseg.tsv", "index\tname\tcolor\n1\tspecial\t#ff0000\n")
    put_text(tmp_path, "derivatives/x/desc-b_dseg.tsv", "index\tname\n1\tother\n")
    assert importers.sources(str(tmp_path))[0].classes == ("", "special")
    uri = put_text(tmp_path, f"{folder}/sub-1_desc-a_dseg.tsv", "index\tlabel\n1\tx\n")
    assert refusal(tmp_path) == f"{uri}: a table of classes has the columns index and name; add them"
