"""The real thing: real scans in a real S3 server, submitted to a Ray head, 16 workers.

make test-real
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
from test_serving import post, wait_for

from logonet.data import phantom
from logonet.storage import artifacts, object_store
from tools.s3server import S3Server, free_ports

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]
REPO = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def head(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray head with 18 logical CPUs, whose processes know the S3 server; yields a submitter's environment."""
    home = tmp_path_factory.mktemp("home")
    log = open(home / "head.log", "wb")
    port = (
        free_ports()
    )  # a block of free ones below the ephemeral range, where Ray's own defaults may be taken
    env = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}
    env |= {**s3_server.env(), "LOGONET_HOME": str(home), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{BIN}:{env['PATH']}"  # as in an activated environment: a job's 'python' is the head's
    os.environ.update(s3_server.env())
    command = [f"{BIN}/ray", "start", "--head", "--block", "--num-cpus", "18", "--port", str(port)]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(port + 1)]
    command += ["--dashboard-agent-listen-port", str(port + 2), "--object-store-memory", str(600 << 20)]
    process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port + 1}"
    try:
        until = time.monotonic() + 90
        while subprocess.run([f"{BIN}/ray", "job", "list"], env=env, capture_output=True).returncode:
            assert time.monotonic() < until and process.poll() is None, (home / "head.log").read_text()[
                -3000:
            ]
            time.sleep(1)
        yield env
    finally:
        process.send_signal(signal.SIGTERM)  # with --block it stops what it started
        process.wait(timeout=60)


def put(files: list[Path], prefix: str) -> None:
    object_store.create_bucket(prefix.rsplit("/", 1)[0])
    for file in files:
        object_store.write_file(str(file), f"{prefix}/{file.name}")


@pytest.mark.parametrize(
    ("recipe", "folder", "scans", "settings"),
    [
        # Unlabelled images, so no split; two epochs, since docs/results.md has the whole run.
        (
            "hippocampus_logonet",
            "Task04_Hippocampus/imagesTr",
            200,
            ["split=null", "train.epochs=2", "train.warmup_epochs=1", "train.batch_size=1"],
        ),
        ("real_ct", "scans", 5, []),
    ],
)
def test_sixteen_workers_pretrain_on_real_scans(
    head: dict[str, str], shared_data: Path, recipe: str, folder: str, scans: int, settings: list[str]
) -> None:
    """On fresh crops; and once more, killed in the middle, with the same bits at the end."""
    images = sorted(p for p in (shared_data / folder).glob("*.nii.gz") if "labels" not in p.name)
    assert len(images) == scans
    bucket = f"s3://real-{recipe.replace('_', '-')}"
    put(images, f"{bucket}/scans")
    command = [f"{BIN}/ray", "job", "submit", "--working-dir", ".", "--"]
    command += ["python", "jobs/pretrain.py", "--recipe", recipe, "--data", f"{bucket}/scans/"]
    command += ["--root", f"{bucket}/runs", "--workers", "16"]
    command += [word for setting in [*settings, "train.checkpoint_every_s=0"] for word in ("--set", setting)]

    def run() -> artifacts.Artifact:
        started = time.monotonic()
        job = subprocess.run(command, cwd=REPO, env=head, capture_output=True, text=True)
        assert job.returncode == 0, job.stdout[-5000:] + job.stderr[-3000:]
        assert head["AWS_SECRET_ACCESS_KEY"] not in job.stdout + job.stderr
        print(job.stdout[-3000:], f"\n{time.monotonic() - started:.0f} s")
        (place,) = {uri.rsplit("/", 1)[0] for uri in manifests(bucket) if "/checkpoints/" not in uri}
        artifact = artifacts.find(place)
        assert artifact is not None
        return artifact

    artifact = run()
    assert "prepared" in artifact.parents  # fresh crops
    history = json.loads(artifact.read("history.json"))
    assert len(history) == (2 if settings else 4)
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(0 < e["accuracy_floor"] < 1 and e["effective_rank"] > 1 for e in history)

    object_store.delete_prefix(f"{bucket}/runs/pretrain")
    job = subprocess.Popen(command, cwd=REPO, env=head, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any("/checkpoints/" in uri for uri in manifests(bucket)):
        assert job.poll() is None
        time.sleep(1)
    drivers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "jobs/pretrain.py" in (words := process.info["cmdline"] or []) and "submit" not in words
    ]
    assert drivers
    for process in drivers:
        process.kill()
    assert job.wait() != 0
    assert not any("/checkpoints/" not in uri for uri in manifests(bucket))
    again = run()
    assert again.files["backbone.safetensors"] == artifact.files["backbone.safetensors"]
    assert [e["loss"] for e in json.loads(again.read("history.json"))] == [e["loss"] for e in history]


def manifests(bucket: str) -> list[str]:
    """Of what pretraining has stored: checkpoints, and at last the artifact."""
    found = object_store.listing(f"{bucket}/runs/pretrain")
    return [entry.uri for entry in found if entry.uri.endswith("/manifest.json")]


def test_a_model_finetuned_here_and_served_segments_a_real_ct(shared_data: Path, tmp_path: Path) -> None:
    """jobs/finetune.py, logonet register, mlflow models serve, and a scan posted to it."""
    phantom.write_dataset(str(tmp_path / "scans"), 12, size_vox=(48, 48, 48))
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"LOGONET_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    env["PATH"] = f"{BIN}:{env['PATH']}"
    root = str(tmp_path / "runs")
    finetune = [sys.executable, "jobs/finetune.py", "--recipe", "demo", "--data", str(tmp_path / "scans")]
    finetune += ["--root", root, "--workers", "2", "--object-store-mb", "300", "--set", "train.epochs=4"]
    done = subprocess.run(finetune, cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (artifact,) = (tmp_path / "runs" / "finetune").iterdir()
    named = [f"{BIN}/logonet", "register", str(artifact), "--task", "phantom", "--alias", "champion"]
    subprocess.run(named, cwd=REPO, env=env, check=True)
    port = free_ports()
    serve = [f"{BIN}/mlflow", "models", "serve", "-m", "models:/logonet-seg-phantom@champion"]
    serve += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    env["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/home/mlflow.db"
    log = tmp_path / "serve.log"
    with open(log, "wb") as out:
        server = subprocess.Popen(
            serve, cwd=tmp_path, env=env, stdout=out, stderr=out, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", server, log)
        scan = (shared_data / "scans" / "ct_trunk_3mm.nii.gz").read_bytes()
        body = {"dataframe_split": {"columns": ["nifti"], "data": [[base64.b64encode(scan).decode()]]}}
        status, answer = post(f"http://127.0.0.1:{port}/invocations", body)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    assert status == 200, answer
    (row,) = answer["predictions"]
    image = nib.Nifti1Image.from_bytes(gzip.decompress(scan))
    found = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(row["nifti"])))
    assert found.shape == image.shape
    assert np.array_equal(found.affine, image.affine)
    assert found.get_data_dtype() == np.uint8
    assert set(np.unique(found.dataobj)) <= {0, 1, 2, 3}
    assert sum(json.loads(row["volumes_ml"]).values()) > 0
