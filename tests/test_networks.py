"""Every network by name, through the jobs: pretrained, finetuned from that, registered, fetched back.

Shapes: B batch, C input channels, X Y Z the crop's axes.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HERE, of_each_kind

from logonet import networks, pipelines, training
from logonet.clustering import kmeans
from logonet.data import cropping, phantom, prepared_scans, splits
from logonet.inference import model, sliding_window
from logonet.inference.load import load_model
from logonet.pipelines.finetuning import Init
from logonet.storage import artifacts
from logonet.storage.artifacts import Artifact

SIZE = (32, 32, 32)
REPO = Path(__file__).parents[1]
# A network as somebody may add it: one file, nothing else.
DROPPED_IN = '''
"""One convolution, pooled and back."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logonet.networks import SegOut

TINY: dict[str, Any] = {"width": 4}


@dataclass(frozen=True)
class Config:
    width: int = 16


def size_multiple(cfg: Config) -> tuple[int, int, int]:
    return 2, 2, 2


def build(cfg: Config, in_channels: int, num_classes: int) -> nn.Module:
    return OneLevel(cfg, in_channels, num_classes)


class OneLevel(nn.Module):
    strides, encoder_prefixes, head_prefixes = (1, 2), ("fine.", "coarse."), ("classify.",)

    def __init__(self, cfg: Config, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.channels, self.feature_channels = (cfg.width, 2 * cfg.width), cfg.width
        self.fine = nn.Conv3d(in_channels, cfg.width, 3, padding=1)
        self.coarse = nn.Conv3d(cfg.width, 2 * cfg.width, 2, stride=2)
        self.join = nn.Conv3d(3 * cfg.width, cfg.width, 1)
        self.classify = nn.Conv3d(cfg.width, num_classes, 1)

    def encode(self, x: Tensor) -> list[Tensor]:
        fine = F.gelu(self.fine(x))
        return [fine, F.gelu(self.coarse(fine))]

    def decode_features(self, x: Tensor, feats: list[Tensor]) -> Tensor:
        return F.gelu(self.join(torch.cat([feats[0], F.interpolate(feats[1], scale_factor=2.0)], dim=1)))

    def decode(self, x: Tensor, feats: list[Tensor]) -> SegOut:
        return SegOut(self.classify(self.decode_features(x, feats)), [], None)

    def forward(self, x: Tensor) -> SegOut:
        return self.decode(x, self.encode(x))
'''
Fit = Callable[..., Any]
TWO_STEPS = ["train.epochs=1", "train.steps_per_epoch=2", "train.global_batch=2", "train.warmup_epochs=0"]


@pytest.fixture(scope="module")
def scans(place: str) -> str:
    phantom.write_dataset(f"{place}/scans", 4, size_vox=(36, 32, 32))
    return f"{place}/scans/"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One folder for all networks, which then share crops, clusterers, pseudo-labels and cases."""
    return str(tmp_path_factory.mktemp("networks"))


@pytest.fixture
def dropped_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "one_level.py").write_text(DROPPED_IN)
    monkeypatch.setattr(networks, "__path__", [*networks.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield "one_level"
    sys.modules.pop("logonet.networks.one_level", None)


def two_steps_of_each(name: str, scans: str, root: str) -> tuple[Artifact, Artifact]:
    """The network's pretraining and its finetuning from that, two steps each."""
    two = training.Config(epochs=1, steps_per_epoch=2, global_batch=2, batch_size=2, lr=1e-3, warmup_epochs=0)
    cfg = pipelines.Pretraining(
        split=splits.Config(test_share=0.25, folds=3),
        crops=cropping.Config(size_vox=SIZE, per_scan=2),
        clusterers=kmeans.Config(n=2, k_min=3, k_max=5, iterations=5),
        backbone={"name": name, **networks.tiny(name)},
        method={"name": "masked_clusters", "phi1": 0.2, "final_relu": False},
        train=two,
    )
    pipelines.pretrain(cfg, scans, root, HERE, None)
    (pretrained,) = of_network(root, "pretrain", name)
    labelled = pipelines.Finetuning(
        split=cfg.split or splits.Config(),
        crops=prepared_scans.CropSampling(size_vox=SIZE),
        train=two,
        init=Init(pretrained.uri),
        validation=sliding_window.Config(overlap=0),
    )
    pipelines.finetune(labelled, scans, root, HERE, None)
    (finetuned,) = of_network(root, "finetune", name)
    return pretrained, finetuned


def of_network(root: str, stage: str, name: str) -> list[Artifact]:
    found = [artifacts.find(str(path)) for path in Path(root, stage).iterdir()]
    return [a for a in found if a is not None and a.config["backbone"]["name"] == name]


def assert_trained(pretrained: Artifact, finetuned: Artifact) -> None:
    from safetensors.torch import load

    assert (pretrained.facts["steps"], finetuned.facts["steps"]) == (2, 2)
    own = pretrained.config["backbone"]
    assert finetuned.config["backbone"] == own
    net = networks.build(**{**own, "in_channels": 1, "num_classes": 2})
    before, after = (load(a.read("backbone.safetensors")) for a in (pretrained, finetuned))
    assert before.keys() == net.state_dict().keys()
    prefixes: tuple[str, ...] = net.encoder_prefixes  # type: ignore[assignment]
    encoder = [k for k, _ in net.named_parameters() if f"{k}.".startswith(prefixes)]
    moved = [k for k in encoder if not torch.equal(before[k], after[k])]
    assert len(moved) > len(encoder) / 2


def assert_comes_back(finetuned: Artifact) -> None:
    """From the registry the very same network, which gives the very same logits."""
    name = finetuned.config["backbone"]["name"]
    (segmentation, *_) = pipelines.register(finetuned.uri, f"by-{name}", ("candidate",))
    chosen = [load_model(uri) for uri in (segmentation, finetuned.uri)]
    nets = [model.build(*model.parse(c.folder)) for c in chosen]
    ours, theirs = (net.state_dict() for net in nets)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    x_BCXYZ = torch.rand(1, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        a, b = (net(x_BCXYZ).logits for net in nets)
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", of_each_kind(networks.names(), "logonet", "resenc", "unetr"))
def test_by_name_from_scans_to_the_registry(name: str, scans: str, root: str) -> None:
    pretrained, finetuned = two_steps_of_each(name, scans, root)
    assert_trained(pretrained, finetuned)
    assert_comes_back(finetuned)


def test_a_file_dropped_into_the_folder_trains_by_name(dropped_in: str, scans: str, root: str) -> None:
    assert_trained(*two_steps_of_each(dropped_in, scans, root))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*networks.names(), "one_level"])
def test_by_name_through_the_job_scripts(name: str, scans: str, tmp_path: Path) -> None:
    """As a user starts them: processes of their own, with Ray and its workers. The dropped-in file lies in a copy."""
    home = REPO
    if name not in networks.names():
        home = tmp_path / "checkout"
        for part in ("logonet", "jobs"):
            shutil.copytree(REPO / part, home / part)
        (home / "logonet" / "networks" / f"{name}.py").write_text(DROPPED_IN)
    root = f"{tmp_path}/runs"
    tiny = {"width": 4} if name not in networks.names() else networks.tiny(name)
    backbone = f"backbone={json.dumps({'name': name, **tiny})}"
    two = [f"--set={setting}" for setting in [*TWO_STEPS, "train.batch_size=2"]]
    common = ["--recipe=demo", f"--data={scans}", f"--root={root}", "--workers=1", f"--set={backbone}", *two]
    pretraining = ["--set=split.test_share=0.25", "--set=split.folds=3", "--set=clusterers.n=2"]
    run_script(home, "pretrain", *common, *pretraining)
    (pretrained,) = of_network(root, "pretrain", name)
    labelled = ["--set=split.test_share=0.25", "--set=split.folds=3", f"--init={pretrained.uri}"]
    run_script(home, "finetune", *common, *labelled, "--set=train.validate_every_epochs=0")
    (finetuned,) = of_network(root, "finetune", name)
    assert (pretrained.facts["steps"], finetuned.facts["steps"]) == (2, 2)


def run_script(home: Path, job: str, *args: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(home)}
    command = [sys.executable, f"jobs/{job}.py", *args]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
