"""Bad input: every mutation of every kind of file ends in success, one sentence or quarantine (tests/fuzzing.py).

And the smallest input for each fault that mutations have found, by the name of what was wrong.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import fuzz_artifacts
import fuzz_scans
import fuzzing
import pytest

from logonet.core import config
from logonet.core.errors import LONGEST, BadScan, UserError, plain
from logonet.data import manifest, volume
from logonet.data.manifest import Source
from logonet.storage import object_store

EACH = 130  # of the marked test; 21 kinds of input
QUICK = 2  # of the default test


def test_the_first_mutations_of_every_kind() -> None:
    wanted = [(name, n) for name in fuzzing.TARGETS for n in range(QUICK)]
    found = list(fuzzing.attempts(wanted))
    assert not fuzzing.same_faults(found), "\n".join(fuzzing.same_faults(found))


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_mutations(name: str) -> None:
    found = list(fuzzing.attempts((name, n) for n in range(EACH)))
    print(f"\n{fuzzing.summary(found)}")
    assert len(found) == EACH
    assert not fuzzing.same_faults(found), "\n".join(fuzzing.same_faults(found))


# ---------------------------------------------------------------------------- what mutations have found


@pytest.mark.timeout(60)
def test_a_key_of_a_megabyte_is_refused_at_once() -> None:
    """Comparing it with all known keys took minutes."""
    said = config.unknown("config key", "x" * (1 << 20), ["train.lr", "train.epochs"])
    assert str(UserError(said)).startswith("unknown config key 'xxx")


def test_a_sentence_is_one_short_printable_line() -> None:
    said = str(UserError(f"/a\nb\ud800\x1b[31m{'x' * 5000}: is wrong; correct it"))
    assert said.isprintable()
    assert len(said) <= LONGEST
    assert said.startswith("/a\\nb\\ud800\\x1b[31mx")
    assert said.endswith("x: is wrong; correct it")
    assert plain("a scan of 5 × 5 voxels") == "a scan of 5 × 5 voxels"


def header(*dims: int) -> bytes:
    """Of a NIfTI file of int16 voxels."""
    import nibabel as nib
    import numpy as np

    raw = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)).to_bytes()[:352]
    return raw[:40] + np.array([3, *dims, 1, 1, 1, 1], "<i2").tobytes() + raw[56:]


def test_a_gzip_bomb_is_refused_by_its_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 GiB of zeros in 2 MiB, as the header says: 4 GiB of float32."""
    bomb = gzip.compress(header(1024, 1024, 1024), 1) + gzip.compress(bytes(1 << 20)) * 2048
    monkeypatch.setattr("logonet.data.volume.nifti._fill", None)  # nothing is read
    monkeypatch.setattr("logonet.data.volume.nifti.np.empty", None)
    with pytest.raises(BadScan, match=r"^bomb.nii.gz: .*4.0 GiB.*more than 200 times .*save it without"):
        volume.decode_nifti(bomb, "bomb.nii.gz")


def test_a_header_that_claims_ten_to_the_twelve_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logonet.data.volume.nifti.np.empty", None)
    for data in (header(10_000, 10_000, 10_000), gzip.compress(header(10_000, 10_000, 10_000))):
        with pytest.raises(BadScan, match="claims"):
            volume.decode_nifti(data, "x.nii")


def test_deflated_dicom_is_not_inflated(tmp_path: Path) -> None:
    fuzz_scans.make_series(tmp_path)
    files = sorted((tmp_path / "series").iterdir())
    fuzz_scans.deflate(files[0], 1 << 20)
    with pytest.raises(BadScan, match=r"0\.dcm: is deflated DICOM"):
        volume.decode_dicom([(p.name, p.read_bytes()) for p in files])


def test_pipes_and_devices_are_no_objects(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "zero.nii").symlink_to("/dev/zero")
    (tmp_path / "self.nii").symlink_to("self.nii")
    assert list(object_store.listing(str(tmp_path))) == []
    for name in ("pipe.nii", "zero.nii"):
        with pytest.raises(UserError, match="pipe or a device"):
            object_store.read(str(tmp_path / name))


def test_links_that_lead_back_are_walked_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_bytes(b"1")
    for n in range(4):  # followed, they would be 4 ** 40 ways
        (tmp_path / "a" / "b" / f"up{n}").symlink_to("..")
    (tmp_path / "twin").symlink_to("a/b")  # another way, and not back
    names = [object_store.relative(e.uri, str(tmp_path)) for e in object_store.listing(f"{tmp_path}/")]
    assert names[0] == "a/b/x"
    assert len(names) < 20


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_what_can_be_no_name(name: str) -> None:
    for uri in (f"/tmp/{name}", f"s3://bucket/{name}"):
        if name == "a\0b" and object_store.is_s3(uri):
            continue  # S3 has such keys
        with pytest.raises(UserError, match="not a possible"):
            object_store.exists(uri)


def test_a_name_that_is_not_utf8_is_quarantined_and_can_be_written_down(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.nii.gz")
    Path(name).write_bytes(b"x")
    bad = manifest.inspect(Source(name))
    assert isinstance(bad, manifest.Quarantined)
    assert "is not UTF-8" in bad.reason
    table = manifest.Manifest.of([bad])
    assert manifest.Manifest.from_parquet(table.scans_parquet(), table.quarantine_parquet()) == table


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "aliases"),
        ("a: &a [*a]", "contains itself"),
        ("a: !!float x", "is no float .*line 1"),
        ("a: 2001-99-99", "is no timestamp"),
        ("a: !!int ''", "is no int"),
        ("a: !!bool x", "is no bool"),
        ("a: " + "1" * 5000, "is no int"),
        ("[" * 5000, "nested too deeply"),
        ("!!python/object/apply:os.system [x]", "not valid YAML"),
    ],
)
def test_yaml(text: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^mine.yaml .*{said}"):
        config.parse_yaml(text, "mine.yaml")


def test_yaml_with_honest_aliases() -> None:
    assert config.parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}", "x") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


@pytest.mark.parametrize("depth", [150, 100_000])
def test_json_that_is_nested_too_deeply(depth: int) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        config.parse_json("[" * depth + "]" * depth)


def test_a_config_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"a: \xff")
    with pytest.raises(UserError, match=r"x\.yaml: is not UTF-8 text"):
        object_store.read_text(str(tmp_path / "x.yaml"))


def test_splits_that_name_no_text(tmp_path: Path) -> None:
    from logonet.data import importers

    fuzz_scans.make_nnunet(tmp_path)
    (tmp_path / "splits_final.json").write_text('[{"val": [null, "case_0"]}]')
    with pytest.raises(UserError, match=r"splits_final\.json must hold a list"):
        importers.sources(f"{tmp_path}/dataset.json")


def test_a_table_of_other_rows() -> None:
    from logonet.data.crop_shards import CropRef
    from logonet.storage import parquet

    good = parquet.Rows.of([CropRef("a/0", "a", "shards/a", 0, 8, "0" * 64)], CropRef).to_parquet()
    assert list(parquet.from_parquet(good, CropRef, "x")) == [CropRef("a/0", "a", "shards/a", 0, 8, "0" * 64)]
    with pytest.raises(UserError, match=r"^x has the columns uri, reason; it must have crop_id"):
        parquet.from_parquet(manifest.Manifest((), ()).quarantine_parquet(), CropRef, "x")
    with pytest.raises(UserError, match=r"^x is not a Parquet table"):
        parquet.from_parquet(good[:-9], CropRef, "x")


def test_a_case_whose_header_is_another_is_prepared_again(tmp_path: Path) -> None:
    import json

    from logonet.data import prepared_scans

    fuzz_artifacts.make_case(tmp_path)
    path = tmp_path / "scans" / "p" / "images" / "scan-1.safetensors"
    blob = path.read_bytes()
    assert prepared_scans.stored(str(path)) is not None
    size = int.from_bytes(blob[:8], "little")
    for change in (
        {"image/0_0_0": 3},
        {"image/0_0_0": None},
        {"__metadata__": {"scan_id": "x", "shape": "[1, 99999999, 99999999, 2]", "sha256": "{}"}},
    ):
        header = json.dumps(json.loads(blob[8 : 8 + size]) | change).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + blob[8 + size :])
        assert prepared_scans.stored(str(path)) is None


@pytest.mark.parametrize("facts", [{"step": 1, "world": 10**9}, {"step": "1", "world": 1}, {}])
def test_a_checkpoint_with_odd_facts_is_passed_over(tmp_path: Path, facts: dict[str, object]) -> None:
    import json

    from logonet.training import checkpoints

    fuzz_artifacts.make_run(tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000002"
    content = json.loads((newest / "manifest.json").read_text())
    content["facts"] = {"history": [], **facts}
    (newest / "manifest.json").write_text(json.dumps(content))
    fuzz_artifacts.sealed(newest)
    with pytest.raises(checkpoints.Damaged, match="step-00000002 is no checkpoint of this version"):
        checkpoints.load_state(str(newest), "f" * 16)
    found = checkpoints.newest(str(tmp_path), "f" * 16)
    assert found is not None
    assert found.step == 1


def test_a_sweeps_state_that_is_torn(tmp_path: Path) -> None:
    from logonet.sweep import records

    for text in ("{", "[]", '{"spent_s": "x"}'):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(UserError, match=r"state\.json"):
            records.state(str(tmp_path))


def test_scores_that_are_none(tmp_path: Path) -> None:
    from logonet import pipelines

    for text in ("", "a,b\n1,2\n", "scan_id\n\0\n"):
        (tmp_path / "cases.csv").write_text(text)
        with pytest.raises(UserError, match=r"cases\.csv is no table of scores"):
            pipelines.scores_of(f"{tmp_path}/cases.csv")


@pytest.mark.parametrize("stored", ["u1", "i4", "f8"])
def test_decoding_takes_at_most_four_times_what_the_header_claims(stored: str) -> None:
    import tracemalloc

    import numpy as np

    n, dtype = 60, np.dtype(stored)
    voxels = (np.arange(n**3) % 200).astype(dtype).tobytes()
    code = {"u1": 2, "i4": 8, "f8": 64}[stored]
    head = bytearray(header(n, n, n))
    head[70:74] = np.array([code, dtype.itemsize * 8], "<i2").tobytes()
    head[112:116] = np.float32(2).tobytes()
    data = gzip.compress(bytes(head) + voxels, 1)
    volume.decode_nifti(data, "x.nii.gz")  # imports
    tracemalloc.start()
    volume.decode_nifti(data, "x.nii.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    claimed = n**3 * max(4, dtype.itemsize)
    assert peak < 4 * claimed + len(data) + (1 << 20)


def test_a_key_that_is_no_text() -> None:
    assert config.unknown("key", True, ["train"]).startswith("unknown key 'True'; did you mean 'train'?")


@pytest.mark.parametrize("fold", ["true", "1" + "0" * 30, "9223372036854775808", "1.0"])
def test_a_fold_that_no_table_can_hold(tmp_path: Path, fold: str) -> None:
    from logonet.data import importers

    (tmp_path / "d.json").write_text('{"training": [{"image": "x.nii", "fold": ' + fold + "}]}")
    (tmp_path / "d.csv").write_text(f"image,fold\nx.nii,{fold}\n")
    for name in ("d.json", "d.csv"):
        with pytest.raises(UserError, match=f"{name}.* fold .*; write an integer"):
            importers.sources(str(tmp_path / name))


def test_a_table_with_a_cell_without_end(tmp_path: Path) -> None:
    from logonet.data import importers

    (tmp_path / "d.csv").write_text(f"image,fold\n{'x' * 200_000},0\n")
    with pytest.raises(UserError, match=r"d\.csv, line 2: is no line of a table"):
        importers.sources(str(tmp_path / "d.csv"))
