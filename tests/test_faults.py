"""A store of which many requests fail at random: nothing is lost, doubled or altered, and no scan is blamed for it."""

from __future__ import annotations

import collections
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faultproxy import KINDS, FaultProxy, sort_of
from helpers import timeless

from logonet import pipelines, tracking
from logonet.core.errors import UserError
from logonet.core.execution import InProcess
from logonet.data import manifest, phantom
from logonet.data.volume import encode_nifti
from logonet.distributed import bucket_inference, cluster
from logonet.inference import sliding_window
from logonet.storage import artifacts, object_store
from tools.s3server import S3Server

WAIT = object_store.WAIT  # `no_waiting` takes it away
SMALL = (12, 12, 12)


def unfinished_uploads(bucket: str) -> list[str]:
    reply = object_store._call("list_multipart_uploads", Bucket=bucket.removeprefix(object_store.S3))
    return [upload["Key"] for upload in reply.get("Uploads", [])]


@pytest.fixture
def proxy(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """Without a rate at first: a test writes what it needs, then sets ``proxy.rate``."""
    monkeypatch.setattr(object_store, "READ_TIMEOUTS_S", (30.0,))  # on a busy machine any reply may be late
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0)
    object_store._latencies_s.clear()
    return proxy


# ----------------------------------------------------------------------------------- the proxy's rates


@pytest.mark.parametrize(
    ("method", "target", "sort"),
    [
        ("GET", "/b/a.bin", "get"),
        ("HEAD", "/b/a.bin", "head"),
        ("HEAD", "/b", "head"),
        ("PUT", "/b", ""),
        ("PUT", "/b/a.bin", "put"),
        ("GET", "/b?list-type=2&prefix=x%2F", "list"),
        ("GET", "/b?uploads", "list"),
        ("POST", "/b/a?uploads", "create"),
        ("PUT", "/b/a?uploadId=1&partNumber=2", "part"),
        ("POST", "/b/a?uploadId=1", "complete"),
        ("DELETE", "/b/a?uploadId=1", "abort"),
        ("DELETE", "/b/a", "delete"),
        ("POST", "/b?delete", "delete many"),
    ],
)
def test_requests_are_told_apart(method: str, target: str, sort: str) -> None:
    assert sort_of(method, target) == sort


def drawn(proxy: FaultProxy, keys: range) -> dict[int, str]:
    found = {key: proxy._draw("GET", f"/b/{key}", "") for key in keys}
    return {key: rule.kind for key, rule in found.items() if rule}


def test_a_rate_is_what_it_says_and_depends_on_the_request_alone() -> None:
    keys = range(4000)
    found = drawn(FaultProxy("http://127.0.0.1:9", rate=0.05), keys)
    assert 0.05 - 4 * 0.0035 < len(found) / len(keys) < 0.05 + 4 * 0.0035  # four standard deviations
    counts = collections.Counter(found.values())
    assert set(counts) == {rule.kind for rule in KINDS["get"]}
    expected = len(found) / len(KINDS["get"])
    assert all(abs(n - expected) < 4 * expected**0.5 for n in counts.values()), counts
    again = FaultProxy("http://127.0.0.1:9", rate=0.05)
    assert drawn(again, keys[::-1]) == found
    assert drawn(again, keys) != found, "a repetition is another request"
    assert drawn(FaultProxy("http://127.0.0.1:9", rate=0.05, seed=1), keys) != found
    assert not drawn(FaultProxy("http://127.0.0.1:9"), keys)
    here, there = (FaultProxy("http://127.0.0.1:9", rate=0.05) for _ in range(2))
    other_bucket = [there._draw("GET", f"/other/{key}?uploadId=7", "") for key in keys[:500]]
    same_bucket = [here._draw("GET", f"/b/{key}?uploadId=8", "") for key in keys[:500]]
    assert other_bucket == same_bucket, "a bucket's name or an upload's id must not change the draw"


# -------------------------------------------------------------------- the store's functions under them


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.faults) for n in range(1, 5))])
def test_every_call_does_what_it_says_while_a_quarter_of_all_requests_fail(
    proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(object_store, "PAGE_KEYS", 4)
    monkeypatch.setattr(object_store, "MULTIPART_BYTES", 10 << 20)
    monkeypatch.setattr(object_store, "READ_TIMEOUTS_S", (0.3, 0.3, 2.0, 30.0))
    proxy.rate, proxy.seed = 0.25, seed
    blobs = {f"{object_store.join(bucket, 'x')}/{n:03d}": os.urandom(40_000 + n) for n in range(12)}
    big = os.urandom(11 << 20)
    large = object_store.write(object_store.join(bucket, "large"), big)
    written = dict(zip(blobs, object_store.at_once(lambda uri: object_store.write(uri, blobs[uri]), blobs)))
    assert [e.uri for e in object_store.listing(object_store.join(bucket, "x"))] == sorted(blobs)
    for uri, blob in blobs.items():
        assert object_store.read(uri, sha256=written[uri].sha256) == blob
        assert object_store.read(uri, start=7, length=20_000) == blob[7:20_007]
        assert object_store.read(uri) == blob
        entry = object_store.stat(uri)
        assert entry is not None
        assert entry.size_bytes == len(blob)
    assert object_store.read(object_store.join(bucket, "large"), sha256=large.sha256) == big
    assert object_store.read(object_store.join(bucket, "large")) == big
    assert object_store.stat(object_store.join(bucket, "none")) is None
    object_store.delete(object_store.join(bucket, "large"))
    object_store.delete_prefix(object_store.join(bucket, "x"))
    assert list(object_store.listing(bucket)) == []
    faults = [r for r in proxy.requests if r.fault]
    assert len(faults) > 15
    assert {"get", "put"} <= {r.sort for r in faults}
    assert len({r.fault for r in faults}) > 5


def test_a_page_that_is_empty_or_comes_twice_loses_and_doubles_no_key(
    proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PAGE_KEYS", 3)
    uris = [f"{bucket}/{n:02d}" for n in range(8)]
    for uri in uris:
        object_store.write(uri, b"1")
    for faults in (["short"], ["repeat_page", "repeat_page"], ["repeat_page", "short"]):
        for kind in faults:
            key = "list-type" if kind == "short" else "continuation-token"
            proxy.add(kind, method="GET", key=key)
        proxy.requests.clear()
        assert [e.uri for e in object_store.listing(bucket)] == uris
        assert proxy.faults() != []
    proxy.add("repeat_page", method="GET", key="continuation-token", times=99)
    with pytest.raises(object_store.IntegrityError, match="comes twice"):
        list(object_store.listing(bucket))


def test_bytes_that_nobody_promised_must_be_the_objects_own(proxy: FaultProxy, bucket: str) -> None:
    """An ETag says so, of a whole or of its parts; else they are read twice."""
    uri, blob = object_store.join(bucket, "x"), os.urandom(50_000)
    object_store.write(uri, blob)
    proxy.add("flip", method="GET", at=1234)
    assert object_store.read(uri) == blob
    assert [r.method for r in proxy.requests if r.method != "PUT"] == ["GET", "HEAD", "GET"]

    proxy.requests.clear()
    proxy.add("flip", method="GET", at=100)
    assert object_store.read(uri, start=50, length=1000) == blob[50:1050]
    assert len(proxy.requests) == 2 + 2  # two that differ, then two that agree

    for part_bytes, methods in (
        (8 << 20, ["GET"]),
        (6 << 20, ["GET", "HEAD", "GET"]),
    ):  # 6 MiB is nobody's part size
        client, place = (
            object_store._client(),
            {"Bucket": bucket.removeprefix(object_store.S3), "Key": "parts"},
        )
        upload = place | {"UploadId": client.create_multipart_upload(**place)["UploadId"]}
        blob = os.urandom(part_bytes + 1000)
        parts = []
        for number, piece in enumerate((blob[:part_bytes], blob[part_bytes:]), 1):
            etag = client.upload_part(PartNumber=number, Body=piece, **upload)["ETag"]
            parts.append({"PartNumber": number, "ETag": etag})
        client.complete_multipart_upload(MultipartUpload={"Parts": parts}, **upload)
        proxy.requests.clear()
        assert object_store.read(object_store.join(bucket, "parts")) == blob
        assert [r.method for r in proxy.requests] == methods


def test_a_refusal_is_asked_again_and_then_believed(proxy: FaultProxy, bucket: str) -> None:
    uri = object_store.join(bucket, "x")
    proxy.add("refused", status=403, code="AccessDenied", times=2)
    object_store.write(uri, b"1")
    assert proxy.faults() == ["refused"] * 2
    for call in (
        lambda: object_store.read(uri),
        lambda: object_store.write(uri, b"2"),
        lambda: object_store.stat(uri),
    ):
        proxy.requests.clear()
        proxy.add("refused", status=403, code="AccessDenied", times=99)
        with pytest.raises(object_store.Refused, match="access is refused"):
            call()
        assert len(proxy.faults()) == object_store.REFUSED_ATTEMPTS
        proxy._rules.clear()


def test_a_reader_asks_again_soon_a_writer_waits(
    proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = object_store.join(bucket, "x")
    proxy.add("stall", method="PUT", seconds=1.0)
    stored = object_store.write(uri, b"1" * 1000)
    assert [r.method for r in proxy.requests] == ["PUT"]
    monkeypatch.setattr(object_store, "READ_TIMEOUTS_S", (0.5, 0.5, 30.0))
    for kind in ("stall", "stall_body"):
        proxy.requests.clear()
        proxy.add(kind, method="GET", at=500, seconds=2.0)
        assert object_store.read(uri, size_bytes=1000, sha256=stored.sha256) == b"1" * 1000
        first, *more = [r.fault for r in proxy.requests]
        assert first == kind
        assert set(more) == {None}, "asked again, on a busy machine more than once"


def test_a_store_that_is_always_slow_is_not_asked_twice() -> None:
    assert object_store.READ_TIMEOUTS_S == (0.25, 0.5, 1.0, 2.0, 4.0, 30)
    object_store._latencies_s.clear()
    assert object_store._timeout_s("get_object", 0) == 1.0, "nothing is known of it"
    assert object_store._timeout_s("get_object", 9) == object_store.READ_TIMEOUTS_S[-1]
    assert object_store._timeout_s("put_object", 0) == object_store.WRITE_TIMEOUT_S
    object_store._latencies_s["get_object"].extend([0.01] * 60 + [5.0] * 4)
    assert object_store._timeout_s("get_object", 0) == object_store.READ_TIMEOUTS_S[0], (
        "a few stalls make no slow store"
    )
    assert object_store._timeout_s("get_object", 1) == object_store.READ_TIMEOUTS_S[1]
    object_store._latencies_s["get_object"].extend([0.9] * 64)
    assert object_store._timeout_s("get_object", 0) == 4.0
    object_store._latencies_s.clear()


def test_an_upload_whose_end_was_not_heard_is_whole(
    proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "MULTIPART_BYTES", 10 << 20)
    uri, blob = object_store.join(bucket, "x"), os.urandom(11 << 20)
    proxy.add("lost_reply", method="POST", key="uploadId=")
    stored = object_store.write(uri, blob)
    assert object_store.read(uri, sha256=stored.sha256) == blob
    proxy.add("status", method="PUT", key="partNumber=3", status=400, code="InvalidArgument")
    with pytest.raises(UserError):
        object_store.write(uri, blob[::-1])
    assert object_store.read(uri) == blob
    assert unfinished_uploads(bucket) == []


# --------------------------------------------------------------------- no scan is blamed for the store


@pytest.fixture
def withheld(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """URIs that `store.read` refuses."""
    uris: set[str] = set()
    read = object_store.read

    def reading(uri: str, **options: Any) -> bytes:
        if uri in uris:
            raise object_store.Refused(
                f"{uri}: access is refused (AccessDenied); ask for rights on the bucket"
            )
        return read(uri, **options)

    monkeypatch.setattr(object_store, "read", reading)
    return uris


def test_a_scan_that_is_refused_is_listed_and_asked_for_again(tmp_path: Path, withheld: set[str]) -> None:
    uri, root = phantom.write_dataset(str(tmp_path / "scans"), 3, size_vox=SMALL), str(tmp_path / "root")
    refused = str(tmp_path / "scans/imagesTr/phantom_001.nii.gz")
    withheld.add(refused)
    table, artifact = pipelines.import_scans(uri, root, InProcess())
    assert [q.uri for q in table.quarantined] == [refused]
    assert "access is refused" in table.quarantined[0].reason
    assert len(table.scans) == 2
    assert pipelines.import_scans(uri, root, InProcess())[1].uri == artifact.uri
    withheld.clear()
    read = withheld_count = []  # which scans are read once the rights are there
    with pytest.MonkeyPatch.context() as patch:
        inspect = manifest.inspect
        patch.setattr(manifest, "inspect", lambda source: (read.append(source.uri), inspect(source))[1])
        whole, final = pipelines.import_scans(uri, root, InProcess())
    assert withheld_count == [refused]
    assert len(whole.scans) == 3
    assert whole.quarantined == ()
    assert final.uri != artifact.uri
    assert artifacts.find(artifact.uri) is not None, "what runs were made from stays"
    assert pipelines.import_scans(uri, root, InProcess())[1].uri == final.uri
    assert whole.id == pipelines.import_scans(uri, str(tmp_path / "other"), InProcess())[0].id


def test_a_store_that_refuses_everything_stops_an_import(
    tmp_path: Path,
    withheld: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("logonet.pipelines.preparation.MAX_UNREAD", 2)
    uri = phantom.write_dataset(str(tmp_path / "scans"), 4, size_vox=SMALL)
    withheld |= {str(p) for p in (tmp_path / "scans/imagesTr").iterdir()}
    with pytest.raises(
        UserError, match=r"none of the first 2 scans can be read; the last: .*access is refused"
    ):
        pipelines.import_scans(uri, str(tmp_path / "root"), InProcess())
    assert not list((tmp_path / "root").rglob("manifest.json"))


def test_damage_on_the_way_quarantines_no_scan(proxy: FaultProxy, bucket: str) -> None:
    scan, _ = phantom.phantom(0, SMALL)
    uri = object_store.join(bucket, "scan.nii.gz")
    object_store.write(uri, encode_nifti(scan.array_CXYZ[0], scan.affine))
    expected = manifest.inspect(manifest.Source(uri))
    assert isinstance(expected, manifest.Scan)
    for at in (400, 300, 200):
        proxy.add("flip", method="GET", at=at)
    assert manifest.inspect(manifest.Source(uri)) == expected
    assert len(proxy.faults()) == 3
    proxy.add("short", method="GET", at=400, times=99)
    answer = manifest.inspect(manifest.Source(uri))
    assert isinstance(answer, manifest.Unread)
    assert uri in answer.reason


def test_a_case_that_is_refused_is_no_bad_case(tmp_path: Path, withheld: set[str]) -> None:
    uri, output = str(tmp_path / "a.nii.gz"), str(tmp_path / "out")
    predictor: Any = SimpleNamespace(spec=SimpleNamespace(one_modality="CT"))
    segment = bucket_inference._Segment(output, sliding_window.Config(), "1", False, "cpu", predictor)
    withheld.add(uri)
    row = segment(bucket_inference.Item("a", manifest.Source(uri)), {})
    assert (row.status, "access is refused" in row.reason) == (bucket_inference.UNREAD, True)
    assert bucket_inference.finished(output) == {}


def test_mlflow_files_reach_the_bucket_and_come_back(proxy: FaultProxy, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "in/model").mkdir(parents=True)
    files = {"a.bin": os.urandom(5000), "model/b.json": b"{}"}
    for name, blob in files.items():
        (tmp_path / "in" / name).write_bytes(blob)
    proxy.rate = 0.2
    assert tracking.runs.upload_folder(str(tmp_path / "in"), object_store.join(bucket, "run"))
    fetched = Path(
        tracking.models._fetch("models:/m/1", object_store.join(bucket, "run"), str(tmp_path / "out"), "")
    )
    assert {str(p.relative_to(fetched)): p.read_bytes() for p in fetched.rglob("*") if p.is_file()} == files
    assert not tracking.runs.upload_folder(str(tmp_path / "in"), str(tmp_path / "elsewhere"))


# ------------------------------------------------------------------------------------- whole pipelines

RATE = 0.05
# What a run writes of its own time, place and name.
OWN = ("manifest.json", "history.json", "tracked.json", "predictions.csv", "predictions.parquet", "row.json")


def pipeline(bucket: str, name: str) -> str:
    """Scans to label maps on the Ray that is there; the root below which everything lies."""
    from logonet import recipes
    from logonet.data import splits

    root, source, resources = f"{bucket}/{name}", f"{bucket}/scans/dataset.json", cluster.Resources(workers=2)
    before = recipes.PRETRAINING["demo"]()
    before = replace(before, split=None, crops=replace(before.crops, per_scan=3))
    before = replace(before, train=replace(before.train, epochs=3, checkpoint_every_steps=2))
    pretrained = pipelines.pretrain(before, source, root, resources, name)
    after = recipes.FINETUNING["demo"]()
    steps = {"epochs": 2, "steps_per_epoch": 8, "checkpoint_every_steps": 3, "validate_every_epochs": 1}
    after = replace(after, split=splits.Config(test_share=0, folds=3), train=replace(after.train, **steps))  # type: ignore[arg-type]
    after = replace(after, init=replace(after.init, weights=pretrained.uri))
    tuned = pipelines.finetune(after, source, root, resources, name)
    maps = f"{root}/maps"
    pipelines.predict_bucket(sliding_window.Config(), tuned.uri, f"{bucket}/new/imagesTr/", maps, resources)
    return root


def only(root: str, stage: str) -> artifacts.Artifact:
    """The one finished artifact of a stage."""
    (uri,) = (e.uri for e in object_store.listing(f"{root}/{stage}") if e.uri.endswith(f"/{artifacts.MANIFEST}")
              and e.uri.count("/") == f"{root}/{stage}".count("/") + 2)  # fmt: skip
    found = artifacts.find(uri.removesuffix(f"/{artifacts.MANIFEST}"))
    assert found is not None
    return found


def contents(root: str) -> dict[str, bytes]:
    """Everything that two runs of the same work must have alike, by its place below ``root``."""
    names = [
        object_store.relative(e.uri, root)
        for e in object_store.listing(root)
        if "mlflow-artifacts/" not in e.uri
    ]
    blobs = object_store.at_once(lambda name: object_store.read(object_store.join(root, name)), names)
    return dict(zip(names, blobs))


@pytest.mark.faults
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", [0])
def test_a_pipeline_on_a_faulty_store_makes_what_it_makes_on_a_sound_one(
    s3_server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(object_store, "WAIT", WAIT)
    phantom.write_dataset(f"{bucket}/scans", 6, size_vox=(40, 40, 40))
    phantom.write_dataset(f"{bucket}/new", 3, seed=1, size_vox=(48, 48, 48))
    monkeypatch.setenv("LOGONET_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with FaultProxy(s3_server.endpoint, seed=seed) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with cluster.connected(cluster.Resources(workers=2, object_store_mb=300)):
            sound = pipeline(bucket, "sound")
            proxy.requests.clear()
            proxy.rate = RATE
            faulty = pipeline(bucket, "faulty")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.endpoint)
    faults = collections.Counter((r.sort, r.fault) for r in proxy.requests if r.fault)
    print(f"{len(proxy.requests)} requests, {sum(faults.values())} faults: {dict(sorted(faults.items()))}")  # type: ignore[type-var]
    assert sum(faults.values()) > 20

    expected, found = contents(sound), contents(faulty)
    assert set(found) == set(expected)
    shards = [name for name in found if "/shards/" in name]
    assert len(shards) == 6
    weights = [
        n for n in found if n.endswith(("method.safetensors", "best.safetensors", "weights.safetensors"))
    ]
    assert len(weights) >= 4
    assert sum(name.endswith(".nii.gz") for name in found) == 3
    differing = [n for n in found if not n.endswith(OWN) and found[n] != expected[n]]
    assert [n for n in differing if n in shards or n in weights or n.endswith(".nii.gz")] == []
    print(f"{len(found)} objects, differing besides {', '.join(OWN)}: {differing}")
    for stage in ("pretrain", "finetune"):
        histories = [json.loads(only(root, stage).read("history.json")) for root in (sound, faulty)]
        assert timeless(histories[0]) == timeless(histories[1])
    for stage in ("manifest", "crops", "cases"):
        assert only(faulty, stage).facts["quarantined"] == 0
    rows = bucket_inference.finished(f"{faulty}/maps").values()
    assert [row.status for row in rows] == [bucket_inference.DONE] * 3
    assert unfinished_uploads(bucket) == []

    def tracked(root: str) -> list[str]:
        place = f"{root}/mlflow-artifacts"
        return sorted(
            object_store.relative(e.uri, place).split("/", 1)[1] for e in object_store.listing(place)
        )

    assert tracked(faulty) == tracked(sound) != []
