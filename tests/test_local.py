"""Training without Ray: every method in a process that cannot import it, and the Python API."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenacity
import torch
from helpers import quick_backbone, timeless

import logonet
from logonet import methods, training
from logonet.core.errors import Stopped, UserError
from logonet.data import phantom, volume
from logonet.storage import artifacts

REPO = Path(__file__).parents[1]
TWO_STEPS = (
    "train.epochs=1",
    "train.steps_per_epoch=2",
    "train.global_batch=2",
    "train.batch_size=2",
    "train.warmup_epochs=0",
)
PRETRAINING = (*TWO_STEPS, "split=null", "crops.per_scan=2", "clusterers.n=2", "clusterers.iterations=5")
FINETUNING = (*TWO_STEPS, "split.test_share=0.25", "split.folds=3", "train.validate_every_epochs=0")

EVERY_METHOD = f"""
import json, sys


class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ray":
            raise ImportError("Ray is blocked here")


sys.meta_path.insert(0, NoRay())
import logonet
from logonet import methods, networks

losses = {{}}
for name in sys.argv[2:]:
    wanted = methods.lacking(name, networks.Network())
    network = next(n for n in ("logonet", *networks.names()) if not wanted - networks.abilities(n))
    settings = {FINETUNING!r} if "labels" in methods.needs(name) else {PRETRAINING!r}
    run = logonet.train_local(
        name, {{"name": network, **networks.tiny(network)}}, 4, settings=settings, root=sys.argv[1], device="cpu"
    )
    assert run.history[-1]["step"] == 2, run.history
    losses[name] = run.history[-1]["loss"]
assert "ray" not in sys.modules
print(json.dumps(losses))
"""


@pytest.mark.parametrize(
    "names",
    [["masked_clusters"], pytest.param(methods.names(), marks=pytest.mark.slow)],
    ids=["the paper's", "all"],
)
def test_methods_take_two_steps_where_ray_cannot_be_imported(names: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", EVERY_METHOD, str(tmp_path), *names]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    assert list(losses) == names
    assert all(math.isfinite(loss) for loss in losses.values()), losses


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def pretrained(root: str) -> logonet.LocalRun:
    return logonet.train_local("masked_clusters", scans=3, settings=PRETRAINING, root=root, device="cpu")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Pairs of image and label files."""
    folder = tmp_path_factory.mktemp("files")
    pairs = []
    for i in range(4):
        scan, labels_XYZ = phantom.phantom(100 + i, (40, 36, 36), classes=3)
        for name, array in (("image", scan.array_CXYZ[0].astype(np.int16)), ("label", labels_XYZ)):
            (folder / f"{i}_{name}.nii.gz").write_bytes(volume.encode_nifti(array, scan.affine))
        pairs.append((f"{folder}/{i}_image.nii.gz", f"{folder}/{i}_label.nii.gz"))
    return pairs


@pytest.fixture(scope="module")
def finetuned(pretrained: logonet.LocalRun, scans: list[tuple[str, str]], root: str) -> logonet.LocalRun:
    return logonet.train_local(
        "supervised", scans=scans, init=pretrained.uri, settings=FINETUNING, root=root, device="cpu"
    )


def test_a_run_leaves_an_artifact_and_the_same_call_finds_it(pretrained: logonet.LocalRun, root: str) -> None:
    assert artifacts.find(pretrained.uri) == pretrained.artifact
    again = logonet.train_local("masked_clusters", scans=3, settings=PRETRAINING, root=root, device="cpu")
    assert (again.uri, again.history) == (pretrained.uri, pretrained.history)
    assert pretrained.uri in repr(pretrained)


def test_a_runs_network_has_the_trained_weights(pretrained: logonet.LocalRun) -> None:
    from safetensors.torch import load

    stored = load(pretrained.artifact.read("backbone.safetensors"))
    own = pretrained.network.state_dict()
    assert stored.keys() <= own.keys()
    for name, tensor in stored.items():
        assert (own[name] == tensor).all(), name


def test_pretrained_weights_reach_the_finetuning(
    pretrained: logonet.LocalRun, finetuned: logonet.LocalRun
) -> None:
    handover = json.loads(finetuned.artifact.read("transfer.json"))
    assert handover["encoder_share"] == 1.0
    assert finetuned.artifact.parents["pretrain"] == pretrained.artifact.fingerprint


def test_sigterm_stores_the_step_and_the_same_call_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = (*PRETRAINING, "train.steps_per_epoch=5", "train.checkpoint_every_s=600")

    def train(root: str) -> logonet.LocalRun:
        return logonet.train_local(
            "simclr", quick_backbone(), 2, settings=settings, root=str(tmp_path / root), device="cpu"
        )

    real_step, steps = training.step, 0

    def counted_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(*args, **kwargs)

    monkeypatch.setattr("logonet.training.loop.step", counted_step)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped after step 3"):
        train("stopped")
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = train("stopped")
    assert steps == 5
    undisturbed = train("undisturbed")
    assert timeless(resumed.history) == timeless(undisturbed.history)
    expected = undisturbed.network.state_dict()
    for name, tensor in resumed.network.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


SIDE_BY_SIDE = """
import sys, time
from pathlib import Path
from logonet.core.errors import Stopped
from logonet.training import local

folder = Path(sys.argv[1])

def wait(executor, item):
    (folder / f"begun-{item}").touch()
    while not local._LEAVING.is_set():
        time.sleep(0.02)
    return item

if __name__ == "__main__":
    ended = []
    try:
        for i, answer in local.LocalExecutor().side_by_side(wait, range(9), 2):
            ended.append(answer)
    except Stopped as err:
        print(sorted(ended), err)
"""


def test_sigterm_to_a_study_reaches_its_processes(tmp_path: Path) -> None:
    """What runs comes to its end, and nothing else begins."""
    (tmp_path / "script.py").write_text(SIDE_BY_SIDE)
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as running:
        for attempt in tenacity.Retrying(stop=tenacity.stop_after_delay(120), wait=tenacity.wait_fixed(0.05)):
            with attempt:
                assert len(list(tmp_path.glob("begun-*"))) == 2
        running.terminate()
        said, _ = running.communicate(timeout=120)
    assert len(list(tmp_path.glob("begun-*"))) == 2
    assert "the same call goes on from there" in said


def test_a_model_segments_a_file_and_an_array_alike(
    finetuned: logonet.LocalRun, scans: list[tuple[str, str]]
) -> None:
    model = logonet.load_model(finetuned.uri, device="cpu")
    image = scans[0][0]
    from_file = model.segment(image)
    scan = volume.decode_nifti(Path(image).read_bytes(), image)
    from_array = model.segment((scan.array_CXYZ[0], scan.affine))
    assert from_file.shape == scan.shape_xyz
    assert from_file.dtype == np.uint8
    assert np.array_equal(from_file, from_array)
    assert set(np.unique(from_file)) <= set(model.spec.label_values)


def test_a_models_repr_says_what_it_is(finetuned: logonet.LocalRun) -> None:
    text = repr(logonet.load_model(finetuned.uri, device="cpu"))
    for part in (finetuned.uri, "logonet", "CT", "32x32x32"):
        assert part in text, text


def test_a_model_folder_is_enough(finetuned: logonet.LocalRun, scans: list[tuple[str, str]]) -> None:
    whole, folder = (
        logonet.load_model(uri, device="cpu") for uri in (finetuned.uri, f"{finetuned.uri}/model")
    )
    assert whole.id == folder.id
    assert np.array_equal(whole.segment(scans[1][0]), folder.segment(scans[1][0]))
    assert folder.artifact is None


def test_what_is_no_model_says_so(pretrained: logonet.LocalRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'pretrain' artifact"):
        logonet.load_model(pretrained.uri)
    with pytest.raises(UserError, match=r"config\.json"):
        logonet.load_model(str(tmp_path))


def test_a_manifest_is_read(pretrained: logonet.LocalRun, root: str) -> None:
    folders = [str(p) for p in Path(root, "manifest").iterdir()]
    tables = [logonet.read_manifest(uri) for uri in folders]
    assert pretrained.artifact.parents["manifest"] in {table.id for table in tables}
    with pytest.raises(UserError, match="manifest"):
        logonet.read_manifest(pretrained.uri)


def test_networks_and_methods_are_built_by_name() -> None:
    from logonet import networks

    net = logonet.build_network("logonet", in_channels=1, num_classes=3, **networks.tiny("logonet"))
    method = logonet.build_method("simmim", net, size_vox=(32, 32, 32), batch_size=2)
    assert method.backbone is net


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"method": "simclrr"}, "simclr"),
        ({"recipe": "demoo"}, "demo"),
        ({"settings": ["train.epoch=1"]}, "train.epochs"),
        ({"init": "somewhere"}, "init"),
    ],
)
def test_a_wrong_argument_is_one_sentence_with_a_hint(arguments: dict[str, Any], names: str) -> None:
    with pytest.raises(UserError, match=names) as err:
        logonet.train_local(**arguments)
    assert "\n" not in str(err.value)


def test_importing_logonet_imports_nothing_heavy() -> None:
    code = "import sys, logonet; sys.exit(bool({'torch', 'ray', 'mlflow', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
    assert set(logonet.__all__) <= set(dir(logonet))
    assert not hasattr(logonet, "no_such_name")


def test_data_tasks_import_no_torch() -> None:
    """Ray's workers of the stages before training would each take seconds and 200 MB for what they do not use."""
    modules = "logonet.data.preparing, logonet.clustering.fitting, logonet.distributed.executor"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
