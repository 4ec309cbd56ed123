"""A model over a bucket: one row per case, whatever the case is, and the same command goes on where it was."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from helpers import HERE, on_ray, tilted, tiny_backbone

from logonet import networks, pipelines
from logonet.core.errors import UserError
from logonet.core.execution import InProcess
from logonet.data import importers, manifest, phantom, volume
from logonet.data.manifest import Manifest, Source
from logonet.distributed import bucket_inference, cluster
from logonet.distributed.cluster import Resources
from logonet.distributed.executor import RayExecutor
from logonet.inference import model, sliding_window
from logonet.storage import object_store

CFG = sliding_window.Config(overlap=0)
LABEL_VALUES = (0, 3, 7)


def model_files(seed: int = 0) -> dict[str, bytes]:
    """A tiny LoGoNet with random weights; of seed 0 it finds background, 0, and spleen, 7, but no liver, 3."""
    options = {k: v for k, v in tiny_backbone().items() if k != "name"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = networks.build("logonet", 1, len(LABEL_VALUES), **options)
    spec = model.Spec(
        backbone=tiny_backbone(),
        in_channels=1,
        classes=("background", "liver", "spleen"),
        label_values=LABEL_VALUES,
        size_vox=(32, 32, 32),
        spacing_mm=None,
        window_hu=(-1000.0, 1000.0),
        mr_percentiles=(0.5, 99.5),
        modality="CT",
    )
    return model.files(spec, net.state_dict())


def write_model(uri: str, seed: int = 0) -> str:
    for name, blob in model_files(seed).items():
        object_store.write(f"{uri}/{name}", blob)
    return uri


def write_scan(
    uri: str, seed: int, orientation: str = "RAS", modality: str = "CT", tilt_deg: float = 0.0
) -> None:
    scan, _ = phantom.phantom(seed, (34, 32, 30), modality=modality, orientation=orientation)
    scan = tilted(scan, tilt_deg)
    object_store.write(uri, volume.encode_nifti(scan.array_CXYZ[0].astype(np.int16), scan.affine))


@pytest.fixture(scope="module")
def model_uri(place: str) -> str:
    return write_model(f"{place}/model")


def write_scans(root: str) -> str:
    """Four good scans in two folders, and four of which nothing can be made."""
    write_scan(f"{root}/a.nii.gz", 0)
    write_scan(f"{root}/deep/er/b.nii.gz", 1, "LPS")
    write_scan(f"{root}/deep/c.nii.gz", 2, "PIR", tilt_deg=20)
    write_scan(f"{root}/d.nii", 3, "LAS")
    write_scan(f"{root}/whole.nii.gz", 4)
    object_store.write(f"{root}/torn.nii.gz", object_store.read(f"{root}/whole.nii.gz")[:5000])
    object_store.delete(f"{root}/whole.nii.gz")
    object_store.write(f"{root}/text.nii.gz", b"patient list, confidential")
    write_scan(f"{root}/head.nii.gz", 5, modality="MR")
    object_store.write(f"{root}/empty.nii.gz", b"")
    object_store.write(f"{root}/readme.txt", b"no scan, and not taken for one")
    return f"{root}/"


GOOD = ["a", "d", "deep/c", "deep/er/b"]
BAD = {
    "empty": "empty",
    "head": "is MR, but the model was trained on CT only",
    "text": "text.nii.gz",
    "torn": "torn.nii.gz",
}


@pytest.fixture(scope="module")
def scans(place: str) -> str:
    return write_scans(f"{place}/in")


@pytest.fixture(scope="module")
def made(
    scans: str, model_uri: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[bucket_inference.Row], str]:
    """A run that several tests look at: its output, its rows, and what it said.

    Into a folder, whose versions are times: what is written again is noticed even if it is the same.
    """
    said, output = io.StringIO(), f"{tmp_path_factory.mktemp('predictions')}/out"
    with contextlib.redirect_stdout(said):
        rows = pipelines.predict_bucket(CFG, model_uri, scans, output, HERE)
    return output, rows, said.getvalue()


def run(model_uri: str, scans: str, output: str, **options: Any) -> list[bucket_inference.Row]:
    return pipelines.predict_bucket(CFG, model_uri, scans, output, HERE, **options)


def versions(uri: str) -> dict[str, str]:
    return {e.uri: e.version for e in object_store.listing(uri)}


def test_a_bucket_of_good_and_bad_scans(
    made: tuple[str, list[bucket_inference.Row], str], model_uri: str
) -> None:
    output, rows, said = made
    assert [row.name for row in rows] == sorted([*GOOD, *BAD])
    for row in rows:
        assert row.name in said
        assert row.seconds > 0
        if row.name in BAD:
            assert row.status == bucket_inference.QUARANTINED
            assert BAD[row.name] in row.reason
            assert row.reason in said
            assert "confidential" not in row.reason
            assert "\n" not in row.reason
            assert not row.output and not row.volumes_ml
            assert not object_store.exists(f"{output}/{row.name}.nii.gz")

    # Label maps lie on their scans' own voxels, in their own axes.
    predictor = sliding_window.Predictor.load(model_uri, CFG, "cpu")
    for row in rows:
        if row.name in BAD:
            continue
        assert (row.status, row.reason) == (bucket_inference.DONE, "")
        assert row.output == f"{output}/{row.name}.nii.gz"
        scan = nib.Nifti1Image.from_bytes(plain(object_store.read(row.uri)))
        found = nib.Nifti1Image.from_bytes(plain(object_store.read(row.output, sha256=row.sha256)))
        assert found.get_data_dtype() == np.uint8
        assert found.shape == scan.shape
        np.testing.assert_array_equal(found.affine, scan.affine)
        assert found.header.get_xyzt_units() == scan.header.get_xyzt_units()
        labels_XYZ = np.asarray(found.dataobj)
        assert set(np.unique(labels_XYZ)) <= set(LABEL_VALUES)
        image = volume.decode_nifti(object_store.read(row.uri), row.uri)
        np.testing.assert_array_equal(labels_XYZ, predictor.segment(image, "CT"))
        ml = (labels_XYZ == 7).sum() * np.prod(found.header.get_zooms()) / 1000
        assert row.volumes_ml["spleen"] == pytest.approx(ml, rel=1e-4)
        assert row.volumes_ml.keys() == {"liver", "spleen"}
    assert all(row.volumes_ml["spleen"] > 1 for row in rows if row.name in GOOD)

    frame = pd.read_csv(io.BytesIO(object_store.read(f"{output}/predictions.csv")), keep_default_na=False)
    assert frame["name"].tolist() == [row.name for row in rows]
    assert frame["status"].tolist() == [row.status for row in rows]
    parquet = pd.read_parquet(io.BytesIO(object_store.read(f"{output}/predictions.parquet")))
    assert parquet["spleen_ml"].notna().tolist() == [row.name in GOOD for row in rows]
    assert parquet["reason"].tolist() == [row.reason for row in rows]


def plain(blob: bytes) -> bytes:
    return gzip.decompress(blob) if blob.startswith(b"\x1f\x8b") else blob


def test_the_same_command_touches_nothing_and_missing_cases_alone_are_done(
    made: tuple[str, list[bucket_inference.Row], str], scans: str, model_uri: str
) -> None:
    output, rows, _ = made
    before = versions(output)
    assert run(model_uri, scans, output) == rows
    assert versions(output) == before

    lost = [
        "a",
        "deep/c",
    ]  # what a run killed between the label map and its row leaves, and one killed earlier
    for name in lost:
        object_store.delete(f"{output}/.cases/{name}/row.json")
    object_store.delete(f"{output}/a.nii.gz")
    torn = f"{output}/.cases/d/row.json"  # counts as absent too
    object_store.write(torn, object_store.read(torn)[:-40])
    lost.append("d")
    again = run(model_uri, scans, output)
    assert [(r.name, r.status, r.sha256) for r in again] == [(r.name, r.status, r.sha256) for r in rows]
    after = versions(output)
    assert {uri for uri in before if after[uri] != before[uri] and "predictions." not in uri} == {
        f"{output}/{part}" for name in lost for part in (f"{name}.nii.gz", f".cases/{name}/row.json")
    }
    assert not [uri for uri in after if "/.attempts/" in uri]


def test_a_replaced_scan_is_segmented_anew_and_quarantined_ones_when_asked(
    place: str, model_uri: str
) -> None:
    scans, output = write_scans(f"{place}/replaced"), f"{place}/replaced-out"
    first = {row.name: row for row in run(model_uri, scans, output)}
    before = versions(output)
    write_scan(f"{scans}torn.nii.gz", 6)  # mended by its owner
    # What a network that was away may have left: nothing is wrong with the scan itself.
    unlucky = replace(
        first["d"], status=bucket_inference.QUARANTINED, reason="no answer", output="", sha256=""
    )
    object_store.write_json(f"{output}/.cases/d/row.json", asdict(unlucky))
    second = {row.name: row for row in run(model_uri, scans, output)}
    assert second["torn"].status == bucket_inference.DONE
    assert second["d"] == unlucky
    assert all(second[name] == first[name] for name in first if name not in ("torn", "d"))
    third = {row.name: row for row in run(model_uri, scans, output, retry=True)}
    assert (third["d"].status, third["d"].sha256) == (bucket_inference.DONE, first["d"].sha256)
    assert sorted(n for n, row in third.items() if row.status != bucket_inference.DONE) == [
        "empty",
        "head",
        "text",
    ]
    after = versions(output)
    assert all(after[f"{output}/{name}.nii.gz"] == before[f"{output}/{name}.nii.gz"] for name in GOOD)


def test_a_manifests_rows_are_segmented_as_their_files_are(tmp_path: Path) -> None:
    """As an evaluation does, also where a header's voxels lie in another file."""
    write_scan(f"{tmp_path}/in/a.nii.gz", 0)
    scan, _ = phantom.phantom(1, (34, 32, 30))
    image = sitk.GetImageFromArray(scan.array_CXYZ[0].T.astype(np.int16))
    sitk.WriteImage(image, f"{tmp_path}/in/b.mhd")
    sources = importers.sources(f"{tmp_path}/in")
    rows = Manifest.of(map(manifest.inspect, sources)).scans
    assert [row.uri for row in rows] == [source.uri for source in sources]

    def digests(which: str, scans: Any) -> list[str]:
        items = [bucket_inference.Item(letter, scan) for letter, scan in zip("ab", scans)]
        out = bucket_inference.run(items, model_files(), f"{tmp_path}/{which}", CFG, HERE, about={})
        return [row.sha256 for row in out]

    assert digests("rows", rows) == digests("files", sources)
    assert all(digests("rows", rows))


def test_another_model_or_setting_does_not_mix_into_an_output(
    made: tuple[str, list[bucket_inference.Row], str], scans: str, place: str, model_uri: str
) -> None:
    output, _, _ = made
    before = versions(output)
    other = write_model(f"{place}/other", seed=1)
    for cfg, uri, named in (
        (CFG, other, "model="),
        (sliding_window.Config(overlap=0.25), model_uri, "infer="),
    ):
        with pytest.raises(UserError, match=f"holds predictions made otherwise \\({named}") as err:
            pipelines.predict_bucket(cfg, uri, scans, output, HERE)
        assert "\n" not in str(err.value)
    assert versions(output) == before


def test_a_case_that_kills_its_process_is_set_aside(scans: str, place: str, ray_local: None) -> None:
    """The others are done all the same, also those that were on their way in the killed process."""

    class TooLarge:  # in here, because Ray's workers know the test's classes by value only
        """In a source's place: a scan that wants more memory than there is, so that Linux kills whoever opens it."""

        uri, version = "s3://somewhere/huge.nii.gz", "1"
        label_uri = subject = dataset = ""
        files = channels = label_files = classes = ()

        @property
        def size_bytes(self) -> int:  # asked of it before a byte is read
            object_store.write(f"{deaths}/{os.getpid()}", b"")
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("still alive")

    names = ("a.nii.gz", "d.nii", "deep/c.nii.gz")
    items = bucket_inference.items_of([Source(f"{scans}{name}") for name in names], scans)
    items.insert(1, bucket_inference.Item("huge", TooLarge()))  # type: ignore[arg-type]
    output, deaths = f"{place}/killed-out", f"{place}/deaths"

    def once() -> list[bucket_inference.Row]:
        return bucket_inference.run(
            items,
            model_files(),
            output,
            CFG,
            on_ray(),
            about={"model": "x"},
        )

    rows = once()
    assert [row.name for row in rows] == ["a", "huge", "d", "deep/c"]
    assert [row.status for row in rows] == [
        bucket_inference.DONE,
        bucket_inference.QUARANTINED,
        bucket_inference.DONE,
        bucket_inference.DONE,
    ]
    assert rows[1].reason.startswith(f"{TooLarge.uri}: took its process down 3 times")
    assert len(list(object_store.listing(deaths))) == bucket_inference.MAX_ATTEMPTS == 3
    before = versions(output)
    assert once() == rows
    assert versions(output) == before


def test_a_case_whose_answer_got_lost_is_not_done_again(scans: str, place: str) -> None:
    """Ray gives a finished case again when the node that held its answer goes; it must not count as a death."""
    item, output = bucket_inference.Item("a", Source(f"{scans}a.nii.gz")), f"{place}/lost-out"
    segment = bucket_inference._Segment(output, CFG, "attempt", False, "cpu")
    first = segment(item, model_files())
    before = versions(output)
    for _ in range(bucket_inference.MAX_ATTEMPTS):
        assert segment(item, model_files()) == first
    assert first.status == bucket_inference.DONE
    assert versions(output) == before


class Kept(InProcess):
    """Keeps the function that items were given to."""

    def stream(self, fn: Any, items: Any, **options: Any) -> Any:
        self.fn = fn
        return super().stream(fn, items, **options)


def test_without_gpus_of_their_own_models_leave_the_machines_gpus_alone(
    scans: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    executor, item = Kept(), bucket_inference.Item("a", Source(f"{scans}a.nii.gz"))
    (row,) = bucket_inference.run([item], model_files(), str(tmp_path), CFG, executor, about={})
    assert (row.status, row.reason) == (bucket_inference.DONE, "")
    assert executor.fn.predictor.device == torch.device("cpu")


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda")])
@pytest.mark.parametrize("gpu", [None, False])
def test_models_run_on_gpus_where_workers_have_them(gpu: bool | None, gpus: int, device: str) -> None:
    resources = Resources(gpu=gpu)
    allocation = cluster.divide([{"CPU": 4.0, "GPU": float(gpus)}], resources)
    assert RayExecutor(resources, allocation).device == ("cpu" if gpu is False else device)


def test_an_output_among_the_scans_is_refused(scans: str, place: str, model_uri: str) -> None:
    """A label map must never replace a scan, nor be segmented by the next run."""
    before = versions(scans)
    for output in (scans, scans.rstrip("/"), f"{scans}labels"):
        with pytest.raises(UserError, match="lies in the input"):
            run(model_uri, scans, output)
    listed = f"{place}/list.csv"
    object_store.write(listed, f"image\n{scans}a.nii.gz\n".encode())
    with pytest.raises(UserError, match=r"a\.nii\.gz is a scan, which a label map would replace"):
        run(model_uri, listed, scans)
    assert versions(scans) == before


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        ("nothing", "config.json"),
        ("torn weights", "weights.safetensors is not a whole safetensors file"),
        ("other weights", "weights.safetensors does not fit the backbone 'logonet'"),
        ("encoder", "config.json"),
    ],
)
def test_a_model_that_cannot_run_is_one_sentence_before_any_case(
    spoilt: str, said: str, scans: str, tmp_path: Path
) -> None:
    output, files = f"{tmp_path}/out", model_files()
    if spoilt == "torn weights":
        files[model.WEIGHTS_FILE] = files[model.WEIGHTS_FILE][:-1000]
    elif spoilt == "other weights":
        values = json.loads(files[model.CONFIG_FILE])
        values["backbone"]["dims"] = [16, 24, 32, 40]
        files[model.CONFIG_FILE] = json.dumps(values).encode()
    elif spoilt == "encoder":  # as `logonet register` stores it: no classes
        values = json.loads(files[model.CONFIG_FILE])
        del values["classes"], values["label_values"]
        files[model.CONFIG_FILE] = json.dumps(values).encode()
    if spoilt != "nothing":
        for name, blob in files.items():
            object_store.write(f"{tmp_path}/model/{name}", blob)
    with pytest.raises(UserError, match=said) as err:
        run(f"{tmp_path}/model", scans, output)
    assert "\n" not in str(err.value)
    assert not list(object_store.listing(output))


def test_two_scans_for_one_label_map_are_named(scans: str) -> None:
    sources = [Source(f"{scans}{name}") for name in ("x.nii", "x.nii.gz")]
    with pytest.raises(UserError, match=r"would both be written to x\.nii\.gz"):
        bucket_inference.items_of(sources, scans)
