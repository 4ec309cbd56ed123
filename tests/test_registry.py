"""MLflow tracking against a real SQLite database, a real server and a real bucket."""

from __future__ import annotations

import logging
import math
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import pytest

from logonet import tracking
from logonet.core.errors import UserError
from logonet.core.redaction import command_line
from logonet.tracking import Tracker
from tools.mlflow_server import MLflowServer

PARAMS = {"train": {"lr": 1e-4, "epochs": 4, "amp": True}, "method": {"name": "masked", "sizes": [1, 2]}}


@pytest.fixture(scope="module")
def database(mlflow_template, tmp_path_factory):
    """One for the file; each test has its own experiment."""
    return shutil.copy(mlflow_template, tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def client(database, tmp_path, monkeypatch):
    """Tracking in SQLite, and a client to look into it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    monkeypatch.setenv("LOGONET_HOME", str(tmp_path / "home"))
    for key in tracking.MLFLOW_DEFAULTS:
        monkeypatch.setenv(key, tracking.MLFLOW_DEFAULTS[key])
    return tracking.runs.connect(tracking.tracking_uri())


def tracker(experiment, fingerprint="f00d", **given):
    return Tracker(fingerprint, experiment, "a run", **{"params": PARAMS, "tags": {}, **given})


def history(num_epochs):
    return [
        {"epoch": e, "step": 10 * e, "loss": 5.0 - e, "accuracy_clusterer": [0.1 * e, 0.2 * e], "rank": None}
        for e in range(num_epochs)
    ]


def runs(client, experiment):
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def points(client, experiment, name="loss"):
    (run,) = runs(client, experiment)
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]


class Flaky:
    """A client whose first ``failures`` calls of ``method`` raise after ``through`` have passed."""

    def __init__(self, real, method, failures, through=0):
        self._real, self._method, self.failures, self.through = real, method, failures, through

    def __getattr__(self, name):
        real = getattr(self._real, name)
        if name != self._method:
            return real

        def call(*args, **kwargs):
            if self.through <= 0 < self.failures:
                self.failures -= 1
                raise ConnectionError("https://nurse:hunter2@mlflow.example refused the connection")
            self.through -= 1
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize(
    ("variables", "uri"),
    [
        ({"LOGONET_HOME": "/data/lgn"}, "sqlite:////data/lgn/mlflow.db"),
        ({}, f"sqlite:///{os.path.expanduser('~/.logonet/mlflow.db')}"),
        ({"MLFLOW_TRACKING_URI": "http://mlflow:5000"}, "http://mlflow:5000"),
        ({"MLFLOW_TRACKING_URI": "sqlite:///runs.db"}, f"sqlite:///{os.path.abspath('runs.db')}"),
    ],
)
def test_tracking_uri_is_absolute_and_the_environment_wins(variables, uri, monkeypatch):
    for key in ("LOGONET_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(key, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert tracking.tracking_uri() == uri


def test_a_run_holds_params_tags_metrics_and_files(client, tmp_path):
    t = tracker("whole", tags={"logonet.manifest": "m1", "logonet.git_commit": None})
    t.sync(history(3))
    t.log_files({"report.html": b"<p>", "pictures/loss.png": b"\x89PNG"})
    assert t.close(timeout_s=60)

    (run,) = runs(client, "whole")
    assert run.info.run_name == "a run"
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "train.lr": "0.0001",
        "train.epochs": "4",
        "train.amp": "true",
        "method.name": "masked",
        "method.sizes": "[1, 2]",
    }
    assert run.data.tags["logonet.fingerprint"] == "f00d"
    assert run.data.tags["logonet.manifest"] == "m1"
    assert "logonet.git_commit" not in run.data.tags
    assert points(client, "whole") == [(0, 5.0), (10, 4.0), (20, 3.0)]
    assert points(client, "whole", "accuracy_clusterer/001") == [(0, 0.0), (10, 0.2), (20, 0.4)]
    assert "rank" not in run.data.metrics
    folder = pathlib.Path(run.info.artifact_uri)
    assert folder.is_relative_to(tmp_path / "home" / "mlflow-artifacts")
    assert (folder / "report.html").read_bytes() == b"<p>"
    assert (folder / "pictures" / "loss.png").read_bytes() == b"\x89PNG"


def test_names_that_mlflow_refuses_are_written_otherwise(client):
    """A study's pretext may have a comma in its name, and a dataset's class brackets."""
    t = tracker("names", params={"pretexts": {"pooled head, encoder": "x"}})
    t.sync([{"epoch": 0, "step": 0, "loss": 1.0, "dice/ventricle (left)": 0.5}])
    assert t.close(timeout_s=60)
    (run,) = runs(client, "names")
    assert run.data.params == {"pretexts.pooled head_ encoder": "x"}
    assert run.data.metrics["dice/ventricle _left_"] == 0.5


def test_a_resumed_job_continues_its_run(client):
    first = tracker("resumed", tags={"logonet.command": "pretrain"})
    first.sync(history(2))
    assert first.close("FAILED")
    # The second attempt runs on other nodes, so a param outside the fingerprint may differ.
    second = tracker("resumed", params={**PARAMS, "workers": 4, "train": {"lr": 1e-4, "epochs": 9}})
    second.sync(history(2))
    second.sync(history(5))
    assert second.close()

    (run,) = runs(client, "resumed")
    assert points(client, "resumed") == [(0, 5.0), (10, 4.0), (20, 3.0), (30, 2.0), (40, 1.0)]
    assert run.info.status == "FINISHED"
    assert run.data.params["train.epochs"] == "4"
    assert run.data.params["workers"] == "4"
    assert run.data.tags["logonet.command"] == "pretrain"

    other = tracker("resumed", fingerprint="beef")
    other.sync(history(1))
    assert other.close()
    assert len(runs(client, "resumed")) == 2


def test_another_tracker_completes_a_run_and_leaves_a_complete_one_alone(client):
    def catch_up() -> bool:
        again = tracker("caught")
        again.sync(history(3))
        again.log_files({"a.txt": b"a"})
        return again.close()

    t = tracker("caught")
    t.sync(history(1))
    assert t.close("KILLED")
    assert catch_up()
    (before,) = runs(client, "caught")
    assert before.info.status == "FINISHED"
    assert len(points(client, "caught")) == 3
    assert catch_up()
    (after,) = runs(client, "caught")
    assert after.info.end_time == before.info.end_time
    assert len(points(client, "caught")) == 3


def test_an_epoch_cut_in_two_is_not_lost_and_not_doubled(client, monkeypatch):
    """1500 metrics an epoch go in two batches; the second one fails once."""
    flaky = Flaky(client, "log_batch", failures=1, through=2)  # passed: the params, then the first batch
    monkeypatch.setattr("logonet.tracking.runs.connect", lambda uri: flaky)
    monkeypatch.setattr("logonet.tracking.runs.RETRY_S", 0.01)
    t = tracker("torn")
    t.sync([{"epoch": e, "step": e, "many": [float(i) for i in range(1500)]} for e in range(2)])
    assert t.close()
    assert flaky.failures == 0
    for name in ("many/000", "many/1499", "epoch"):
        assert [step for step, _ in points(client, "torn", name)] == [0, 1]


def test_an_epochs_own_time_is_kept(client):
    t = tracker("clock")
    t.sync([{"epoch": 0, "step": 0, "loss": 1.0, "unix_s": 1_700_000_000.5}])
    assert t.close()
    (run,) = runs(client, "clock")
    (point,) = client.get_metric_history(run.info.run_id, "loss")
    assert point.timestamp == 1_700_000_000_500
    assert "unix_s" not in run.data.metrics


def test_what_is_not_finite_is_named_not_drawn(client):
    t = tracker("nan")
    t.sync([{"epoch": 0, "step": 0, "loss": math.nan, "lr": 0.1}])
    t.sync(
        [
            {"epoch": 0, "step": 0, "loss": math.nan, "lr": 0.1},
            {"epoch": 1, "step": 1, "loss": math.inf, "lr": 0.2},
        ]
    )
    assert t.close()
    (run,) = runs(client, "nan")
    assert "loss" not in run.data.metrics
    assert run.data.metrics["lr"] == 0.2
    assert run.data.tags["logonet.non_finite"] == "loss@0, loss@1"


def test_training_goes_on_while_the_server_hangs(client, monkeypatch):
    """sync and log_files come back while the only thread that talks to the server is stuck in it."""
    stuck, release = threading.Event(), threading.Event()

    def hang(uri):
        stuck.set()
        assert release.wait(60)
        return client

    monkeypatch.setattr("logonet.tracking.runs.connect", hang)
    t = tracker("hung")
    for num_epochs in range(1, 5):
        t.sync(history(num_epochs))
    assert stuck.wait(60)
    t.sync(history(5))
    t.log_files({"late.txt": b"x"})
    assert t.close(timeout_s=0.0) is False
    assert not release.is_set()
    release.set()
    assert t.close(timeout_s=60)
    assert len(points(client, "hung")) == 5


def test_what_arrives_during_the_last_flush_is_not_lost(client, monkeypatch):
    stuck, release = threading.Event(), threading.Event()

    class Gate:
        def __getattr__(self, name):
            return getattr(client, name)

        def set_terminated(self, *args):
            stuck.set()
            assert release.wait(60)
            client.set_terminated(*args)

    monkeypatch.setattr("logonet.tracking.runs.connect", lambda uri: Gate())
    t = tracker("gate")
    t.sync(history(1))
    assert t.close(timeout_s=0.0) is False
    assert stuck.wait(60)
    t.sync(history(3))
    release.set()
    assert t.close()
    assert len(points(client, "gate")) == 3


def test_a_delivered_file_is_not_sent_again_until_it_changes(client, monkeypatch):
    sent = []
    write_files = tracking.runs.write_files

    def spy(folder, files):
        sent.extend(files.values())
        write_files(folder, files)

    monkeypatch.setattr(tracking.runs, "write_files", spy)
    t = tracker("once")
    t.log_files({"a.txt": b"one"})
    for num_epochs in (1, 2):
        t.sync(history(num_epochs))
        assert t.run_id(60)
    t.log_files({"a.txt": b"two"})
    assert t.close()
    assert sent == [b"one", b"two"]
    (run,) = runs(client, "once")
    assert (pathlib.Path(run.info.artifact_uri) / "a.txt").read_bytes() == b"two"


def test_an_outage_is_said_once_and_loses_nothing(client, monkeypatch, caplog):
    flaky = Flaky(client, "get_run", failures=3)
    monkeypatch.setattr("logonet.tracking.runs.connect", lambda uri: flaky)
    monkeypatch.setattr("logonet.tracking.runs.RETRY_S", 0.01)
    t = tracker("outage")
    t.log_files({"kept.txt": b"kept"})
    with caplog.at_level(logging.WARNING, logger="logonet.tracking"):
        t.sync(history(2))
        assert t.close()
    away, back = caplog.messages
    assert "training continues" in away
    assert "hunter2" not in away
    assert "answers again" in back
    assert flaky.failures == 0
    (run,) = runs(client, "outage")
    assert (pathlib.Path(run.info.artifact_uri) / "kept.txt").read_bytes() == b"kept"
    assert len(points(client, "outage")) == 2


def test_close_says_when_it_did_not_deliver(client, monkeypatch):
    monkeypatch.setattr(
        "logonet.tracking.runs.connect", lambda uri: Flaky(client, "search_runs", failures=10**6)
    )
    monkeypatch.setattr("logonet.tracking.runs.RETRY_S", 0.01)
    t = tracker("lost")
    t.sync(history(1))
    assert t.close(timeout_s=0.2) is False


def test_secrets_and_patients_names_stay_out(client, database, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "env-wJalrXUtn")
    argv = ["logonet", "predict", "s3://b/Miller_Ann.nii.gz", "--set", "store.secret=a,b argv-one"]
    argv += ["--api-token", "argv-two", "https://u:argv-three@h/x?X-Amz-Signature=argv-four&a=1"]
    argv += ["--scan=/ward/Ann Miller/t1.nii", "AKIAIOSFODNN7EXAMPLE"]
    line = command_line(argv)
    assert line.startswith("logonet predict")
    assert "a=1" in line
    params = {"store": {"secret_key": "param-one", "url": "s3://u:param-two@b"}, "scans": ["/x/Miller.dcm"]}
    t = tracker("secrets", params=params, tags={"logonet.command": line})
    t.sync(history(1))
    assert t.close()
    (run,) = runs(client, "secrets")
    assert run.data.params == {
        "store.secret_key": "REDACTED",
        "store.url": "s3://REDACTED@b",
        "scans": '["[scan]"]',
    }
    assert run.data.tags["logonet.command"] == line
    written = b"".join(path.read_bytes() for path in pathlib.Path(database).parent.iterdir())
    for secret in ("wJalrXUtn", "argv-", "param-one", "param-two", "Miller", "AKIAIOSFODNN7EXAMPLE"):
        assert secret.encode() not in written, secret


def test_commit_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("LOGONET_GIT_COMMIT", raising=False)
    assert tracking.git_commit(str(tmp_path)) is None

    def git(*words):
        me = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *me, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "one", "--no-verify")
    git("tag", "-a", "v1", "-m", "v1")
    commit = git("rev-parse", "HEAD")
    assert tracking.git_commit(str(tmp_path)) == commit
    (tmp_path / "a").write_text("2")
    assert tracking.git_commit(str(tmp_path)) == f"{commit}-dirty"
    monkeypatch.setenv("LOGONET_GIT_COMMIT", "abc")
    assert tracking.git_commit(str(tmp_path)) == "abc"


def test_importing_the_registry_does_not_import_mlflow():
    code = "import sys, logonet.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_artifacts_of_a_sqlite_run_go_to_the_bucket(client, bucket):
    t = tracker("bucket", artifact_root=f"{bucket}/mlflow-artifacts")
    t.sync(history(1))
    t.log_files({"pictures/a.bin": b"a" * 100_000})
    assert t.close()
    (run,) = runs(client, "bucket")
    assert run.info.artifact_uri.startswith(f"{bucket}/mlflow-artifacts/")
    (entry,) = client.list_artifacts(run.info.run_id, "pictures")
    assert entry.path == "pictures/a.bin"
    assert entry.file_size == 100_000


@pytest.mark.slow
def test_a_run_catches_up_with_a_server_that_comes_late(tmp_path, monkeypatch, caplog):
    from mlflow import MlflowClient

    server = MLflowServer(str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    for key in tracking.MLFLOW_DEFAULTS:
        monkeypatch.setenv(key, tracking.MLFLOW_DEFAULTS[key])
    t = tracker("late", artifact_root=str(tmp_path / "not-used-with-a-server"))
    t.sync(history(2))
    t.log_files({"pictures/early.png": b"early"})
    while not caplog.messages:  # the first try has failed
        time.sleep(0.05)

    with server:
        t.sync(history(4))
        assert t.close(timeout_s=120), pathlib.Path(server.log).read_text()
        client = MlflowClient(tracking_uri=server.uri)
        assert points(client, "late") == [(0, 5.0), (10, 4.0), (20, 3.0), (30, 2.0)]
        assert points(client, "late", "accuracy_clusterer/000") == [(10 * e, 0.1 * e) for e in range(4)]
        (run,) = runs(client, "late")
        assert run.info.status == "FINISHED"
        got = client.download_artifacts(run.info.run_id, "pictures/early.png", str(tmp_path))
        assert pathlib.Path(got).read_bytes() == b"early"
        assert not (tmp_path / "not-used-with-a-server").exists()


def test_check_names_the_server_or_says_it_is_away(
    mlflow_template: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow_template}")
    assert tracking.check() == f"sqlite:///{mlflow_template}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="could not answer") as err:
        tracking.check()
    assert "hunter2" not in str(err.value)


def test_a_folder_of_runs_is_a_tracking_server_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    uri = tracking.register("logonet-encoder", {"a.json": b"{}"}, {"x": "1"}, kind="encoder")
    assert uri == "models:/logonet-encoder/1"
    assert tracking.register("logonet-encoder", {"a.json": b"{}"}, {"x": "1"}, kind="encoder") == uri
    folder = tracking.download(uri, str(tmp_path / "models"))
    assert (pathlib.Path(folder) / "a.json").read_bytes() == b"{}"


@pytest.mark.parametrize("address", ["localhost:5000", "mlflow.hospital:80/tracking"])
def test_an_address_without_its_scheme_is_said(address, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(UserError, match=f"MLFLOW_TRACKING_URI is {address}; write http://{address}"):
        tracking.tracking_uri()


def test_a_home_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOGONET_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(
        UserError, match=r"file/home, where runs are recorded, cannot be made .*set LOGONET_HOME"
    ):
        tracking.check()
