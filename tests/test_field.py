"""Datasets as hospitals and challenges hand them out, from import to a segmented folder.

By default in this process; the slow ones go through the job scripts, as a user starts them.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from helpers import HERE

from logonet import pipelines, recipes
from logonet.core import config
from logonet.core.errors import BadScan, UserError
from logonet.data import importers, manifest, phantom, volume
from logonet.data.manifest import Manifest
from logonet.data.volume import Volume, encode_nifti
from logonet.inference import sliding_window
from logonet.inference.load import load_model
from logonet.networks import tiny
from logonet.storage import artifacts, object_store
from logonet.storage.artifacts import Artifact

REPO = Path(__file__).parents[1]
SIZE = (24, 24, 24)
TWO_STEPS = ["train.epochs=1", "train.steps_per_epoch=2", "train.global_batch=2", "train.warmup_epochs=0"]
SMALL = [f"crops.size_vox={list(SIZE)}", f"backbone={json.dumps({'name': 'unet', **tiny('unet')})}"]
PRETRAIN = [
    "crops.per_scan=2",
    "clusterers.n=2",
    "clusterers.k_min=3",
    "clusterers.k_max=4",
    "crops.min_foreground=0",
]
PRETRAIN += ["clusterers.iterations=3", "crops.min_image_share=0", "train.batch_size=2"]
FINETUNE = ["leaks=allow", "train.validate_every_epochs=1", "crops.per_case=1", "train.batch_size=1"]


@pytest.fixture(
    params=[
        "in this process",
        pytest.param("by the jobs", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ]
)
def by_jobs(request: pytest.FixtureRequest) -> bool:
    return request.param == "by the jobs"


class Run:
    """The stages, one after the other, under one root."""

    def __init__(self, scans: Path, root: Path, by_jobs: bool, own: list[str]) -> None:
        self.scans, self.root, self.by_jobs, self.own = str(scans), str(root), by_jobs, own

    def _job(self, name: str, *args: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(REPO)}
        command = [sys.executable, f"jobs/{name}.py", *args, "--workers=1", "--object-store-mb=200"]
        done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def _made(self, stage: str) -> Artifact:
        uris = [
            e.uri for e in object_store.listing(f"{self.root}/{stage}") if e.uri.endswith(artifacts.MANIFEST)
        ]
        found = [artifacts.find(os.path.dirname(uri)) for uri in uris]
        (artifact,) = [a for a in found if a is not None and a.stage == stage]
        return artifact

    def _train(
        self, stage: str, make: Callable[[], Any], settings: list[str], run: Any, init: str = ""
    ) -> Artifact:
        if self.by_jobs:
            flags = [f"--init={init}"] if init else []
            self._job(
                stage, "--recipe=demo", f"--data={self.scans}", f"--root={self.root}", *flags, *settings
            )
            return self._made(stage)
        given = [*settings, f"init.weights={init}"] if init else settings
        cfg = config.from_dict(type(make()), config.override(config.to_dict(make()), given))
        return run(cfg, self.scans, self.root, HERE, "field")

    def pretrain(self) -> Artifact:
        own = [s for s in self.own if not s.startswith(("data.", "cases."))]
        settings = [*SMALL, *TWO_STEPS, *PRETRAIN, *own, "split.test_share=0.25", "split.folds=3"]
        return self._train("pretrain", recipes.PRETRAINING["demo"], settings, pipelines.pretrain)

    def finetune(self, init: Artifact | None) -> Artifact:
        settings = [*SMALL, *TWO_STEPS, *FINETUNE, *self.own, "split.test_share=0.25", "split.folds=3"]
        return self._train(
            "finetune", recipes.FINETUNING["demo"], settings, pipelines.finetune, init.uri if init else ""
        )

    def evaluate(self, model: Artifact) -> Artifact:
        if self.by_jobs:
            self._job(
                "evaluate",
                f"--model={model.uri}",
                f"--root={self.root}",
                "--overlap=0",
                "--leaks=allow",
            )
            return self._made("evaluation")
        cfg = pipelines.Evaluation(infer=sliding_window.Config(overlap=0), leaks="allow")
        return pipelines.evaluate_model(cfg, model.uri, "", self.root, HERE, "field")

    def predict(self, model: str, scans: Path, output: Path) -> pd.DataFrame:
        if self.by_jobs:
            self._job("predict", f"--model={model}", f"--input={scans}", f"--output={output}")
        else:
            pipelines.predict_bucket(sliding_window.Config(overlap=0), model, str(scans), str(output), HERE)
        return pd.read_csv(output / "predictions.csv")


def channels_of(seed: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Four contrasts of one head, its tumour's three classes, and where they lie."""
    scan, labels_XYZ = phantom.phantom(
        seed, (28, 26, 24), (2.0, 2.0, 2.0), modality="MR", classes=4, orientation="RAS"
    )
    array_XYZ = scan.array_CXYZ[0]
    contrasts = [array_XYZ, array_XYZ.max() - array_XYZ, np.sqrt(array_XYZ), array_XYZ**1.5]
    inside = array_XYZ > 0
    return [np.round(c * inside).astype(np.int16) for c in contrasts], labels_XYZ, scan.affine


def brats(folder: Path, cases: int) -> dict[str, Any]:
    """An nnU-Net raw dataset of four channels, whose labels are regions."""
    folder.mkdir(parents=True)
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir()
    for case in range(cases):
        contrasts, labels_XYZ, affine = channels_of(case)
        for channel, array_XYZ in enumerate(contrasts):
            data = encode_nifti(array_XYZ, affine)
            (folder / "imagesTr" / f"BraTS_{case:03d}_{channel:04d}.nii.gz").write_bytes(data)
        (folder / "labelsTr" / f"BraTS_{case:03d}.nii.gz").write_bytes(encode_nifti(labels_XYZ, affine))
    description = {
        "channel_names": {"0": "FLAIR", "1": "T1w", "2": "T1gd", "3": "zscore"},
        "labels": {
            "background": 0,
            "whole tumour": [1, 2, 3],
            "tumour core": [2, 3],
            "enhancing tumour": [3],
        },
        "regions_class_order": [1, 2, 3],
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return description


def test_four_channels_and_regions_from_import_to_prediction(tmp_path: Path, by_jobs: bool) -> None:
    brats(tmp_path / "brats", 8)
    run = Run(tmp_path / "brats", tmp_path / "runs", by_jobs, [])
    pretrained = run.pretrain()
    assert pretrained.facts["final"]["step"] == 2
    finetuned = run.finetune(pretrained)
    assert finetuned.facts["regions"] == ["whole tumour", "tumour core", "enhancing tumour"]
    assert len(finetuned.facts["final"]["val_dice_per_class"]) == 3
    evaluation = run.evaluate(finetuned)
    scores = pd.read_csv(io.BytesIO(evaluation.read("cases.csv")))
    assert set(scores["class"]) == {"whole tumour", "tumour core", "enhancing tumour"}
    model = load_model(finetuned.uri)
    assert (model.spec.in_channels, model.spec.num_outputs, model.spec.region_values) == (4, 3, (1, 2, 3))
    assert model.spec.modality == "MR+MR+MR+zscore"
    uri, *_ = pipelines.register(evaluation.uri, "brats", ("candidate",))
    # New scans, their channels numbered as in training.
    brats(tmp_path / "new", 2)
    rows = run.predict(uri, tmp_path / "new" / "imagesTr", tmp_path / "out")
    assert list(rows["status"]) == ["done", "done"]
    for case in range(2):
        contrasts, _, affine = channels_of(case)
        written = nib.load(tmp_path / "out" / f"BraTS_{case:03d}.nii.gz")
        np.testing.assert_allclose(written.affine, affine, atol=1e-4)
        found_XYZ = np.asarray(written.dataobj)
        assert set(np.unique(found_XYZ)) <= {0, 1, 2, 3}
        np.testing.assert_array_equal(found_XYZ, load_model(uri).segment((np.stack(contrasts), affine)))


def test_a_4d_file_is_the_same_scan_as_its_channels(tmp_path: Path) -> None:
    """As the Decathlon's brains are stored."""
    contrasts, labels_XYZ, affine = channels_of(0)
    (tmp_path / "a.nii.gz").write_bytes(encode_nifti(np.stack(contrasts, -1), affine))
    (tmp_path / "l.nii.gz").write_bytes(encode_nifti(labels_XYZ, affine))
    modality = {str(i): name for i, name in enumerate(("FLAIR", "T1w", "t1gd", "T2w"))}
    listed = {"modality": modality, "training": [{"image": "a.nii.gz", "label": "l.nii.gz"}]}
    (tmp_path / "dataset.json").write_text(json.dumps(listed))
    brats(tmp_path / "brats", 1)
    (of_4d,) = Manifest.of(map(manifest.inspect, importers.sources(str(tmp_path / "dataset.json")))).scans
    (of_files,) = Manifest.of(map(manifest.inspect, importers.sources(str(tmp_path / "brats")))).scans
    assert of_4d.modality == "MR+MR+MR+MR"
    assert (of_4d.voxel_sha256, of_4d.shape) == (of_files.voxel_sha256, of_files.shape)
    np.testing.assert_array_equal(manifest.load(of_4d).array_CXYZ, manifest.load(of_files).array_CXYZ)
    other = encode_nifti(contrasts[0], affine)
    (tmp_path / "brats/imagesTr/BraTS_000_0002.nii.gz").write_bytes(other)
    with pytest.raises(object_store.IntegrityError, match="not the manifest's"):
        manifest.load(of_files)


def test_a_channel_on_another_grid_is_resampled_and_told(tmp_path: Path) -> None:
    x = np.linspace(0, 1, 24)
    ramp = np.add.outer(np.add.outer(x, 2 * x), 3 * x).astype(np.float32)
    coarse = np.diag([2.0, 2.0, 2.0, 1.0])
    fine = Volume(ramp[None], np.eye(4))
    other = Volume(ramp[None, ::2, ::2, ::2], coarse)
    both = volume.stacked([fine, other])
    assert both.array_CXYZ.shape == (2, 24, 24, 24)
    np.testing.assert_allclose(both.array_CXYZ[1, :23, :23, :23], ramp[:23, :23, :23], atol=1e-5)
    assert both.note == "channel 1 was resampled to the grid of channel 0"
    assert volume.stacked([fine, Volume(ramp[None], np.eye(4))]).note == ""
    elsewhere = np.eye(4)
    elsewhere[0, 3] = 500
    with pytest.raises(BadScan, match="channel 1 shows another place"):
        volume.stacked([fine, Volume(ramp[None], elsewhere)])


def acdc(folder: Path, patients: int) -> None:
    """Two labelled frames of each patient beside the whole cine, 8 mm slices, and a text file."""
    for patient in range(patients):
        own = folder / f"patient{patient:03d}"
        own.mkdir(parents=True)
        for frame in (1, 12):
            seed = 100 * patient + frame
            scan, labels_XYZ = phantom.phantom(seed, (28, 26, 10), (1.5, 1.5, 8.0), modality="MR", classes=4)
            name = f"patient{patient:03d}_frame{frame:02d}"
            array_XYZ = scan.array_CXYZ[0].astype(np.int16)
            (own / f"{name}.nii.gz").write_bytes(encode_nifti(array_XYZ, scan.affine))
            (own / f"{name}_gt.nii.gz").write_bytes(encode_nifti(labels_XYZ, scan.affine))
        cine = np.repeat(array_XYZ[..., None], 20, -1)
        (own / f"patient{patient:03d}_4d.nii.gz").write_bytes(encode_nifti(cine, scan.affine))
        (own / "Info.cfg").write_text("ED: 1\nES: 12\n")


def test_cine_of_two_frames_a_patient_from_import_to_prediction(
    tmp_path: Path, by_jobs: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    acdc(tmp_path / "acdc", 8)
    own = [
        "crops.size_vox=[24,24,8]",
        "cases.intensity=zscore",
        "data.classes={cavity: [class 1], wall: [class 2, class 3]}",
    ]
    run = Run(tmp_path / "acdc", tmp_path / "runs", by_jobs, own)
    pretrained = run.pretrain()
    if not by_jobs:
        said = capfd.readouterr().out
        assert "16 scans, 16 MR, 16 labelled, 8 subjects" in said
        assert said.count("more than 8 channels; that is a time series") == 8
        assert "8 files are not used: 8 files that are no scan, .cfg (Info.cfg)" in said
    finetuned = run.finetune(pretrained)
    split = (
        json.loads(artifacts.find(finetuned.facts["split_uri"]).read("split.json"))
        if "split_uri" in finetuned.facts
        else None
    )
    assert split is None or len({row["subject"] for row in split["cases"].values()}) == 8
    assert finetuned.facts["classes"] == ["background", "cavity", "wall"]
    evaluation = run.evaluate(finetuned)
    scores = pd.read_csv(io.BytesIO(evaluation.read("cases.csv")))
    assert set(scores["class"]) == {"cavity", "wall"}
    assert evaluation.facts["cases"] == 4  # both frames of two patients
    rows = run.predict(finetuned.uri, tmp_path / "acdc" / "patient000", tmp_path / "out")
    assert sorted(rows["status"]) == ["done", "done", "quarantined"]


def renumbered(folder: Path, value_of: dict[str, int], rename: dict[str, str]) -> Path:
    """Four phantoms whose organs have other numbers and names."""
    listed = phantom.write_dataset(str(folder), 4, seed=9, size_vox=(28, 26, 24), orientations=["RAS"])
    described = json.loads(Path(listed).read_text())
    own = {name: int(value) for value, name in described["labels"].items()}
    for path in (folder / "labelsTr").iterdir():
        image = nib.load(path)
        labels_XYZ = np.asarray(image.dataobj)
        moved_XYZ = np.zeros_like(labels_XYZ)
        for name, value in value_of.items():
            moved_XYZ[labels_XYZ == own[name]] = value
        path.write_bytes(encode_nifti(moved_XYZ, image.affine))
    described["labels"] = {"0": "background"} | {str(v): rename.get(n, n) for n, v in value_of.items()}
    described["name"] = folder.name
    Path(listed).write_text(json.dumps(described))
    return folder


def test_an_external_test_set_is_scored_by_the_names_of_its_organs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    phantom.write_dataset(str(tmp_path / "own"), 8, size_vox=(28, 26, 24), orientations=["RAS"])
    finetuned = Run(tmp_path / "own", tmp_path / "runs", False, []).finetune(None)
    same = {"liver": 1, "spleen": 2, "right kidney": 3}

    def scores(folder: Path, classes: dict[str, tuple[str, ...]] | None = None) -> pd.DataFrame:
        infer = sliding_window.Config(overlap=0)
        cfg = pipelines.Evaluation(classes=classes or {}, infer=infer, leaks="allow")
        made = pipelines.evaluate_model(
            cfg, finetuned.uri, str(folder), str(tmp_path / "runs"), HERE, "field"
        )
        rows = pd.read_csv(io.BytesIO(made.read("cases.csv")))
        # The label map's digest does not stand in a scan's id, so rows can be compared.
        return rows.drop(columns="value").sort_values(["scan_id", "class"], ignore_index=True)

    expected = scores(renumbered(tmp_path / "same", same, {}))
    moved = renumbered(
        tmp_path / "moved", {"spleen": 1, "right kidney": 2, "liver": 9}, {"right kidney": "Kidney, right"}
    )
    pd.testing.assert_frame_equal(scores(moved), expected)
    part = renumbered(tmp_path / "part", {"liver": 3, "spleen": 5}, {"spleen": "gall bladder"})
    capfd.readouterr()
    only = scores(part)
    said = capfd.readouterr().out
    pd.testing.assert_frame_equal(only, expected[expected["class"] == "liver"].reset_index(drop=True))
    assert "the model does not know gall bladder" in said
    assert "the datasets do not label spleen, right kidney: not scored" in said
    german = {"liver": "Leber", "spleen": "Milz", "right kidney": "rechte Niere"}
    foreign = renumbered(tmp_path / "foreign", same, german)
    with pytest.raises(
        UserError, match=r"1 Leber, 2 Milz, 3 rechte Niere, the model's 1 liver, 2 spleen, 3 right kidney"
    ):
        scores(foreign)
    translated = scores(foreign, classes={ours: (theirs,) for ours, theirs in german.items()})
    pd.testing.assert_frame_equal(translated, expected)
