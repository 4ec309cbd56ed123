"""Every method by name, through the jobs: pretexts pretrain and hand on their encoder, objectives finetune."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HERE, of_each_kind

from logonet import methods, networks, pipelines, training
from logonet.clustering import kmeans
from logonet.core.errors import UserError
from logonet.data import cropping, phantom, prepared_scans, splits
from logonet.inference import sliding_window
from logonet.inference.load import load_model
from logonet.pipelines.finetuning import Init
from logonet.storage import artifacts
from logonet.storage.artifacts import Artifact

SIZE = (32, 32, 32)
REPO = Path(__file__).parents[1]
SPLIT = splits.Config(test_share=0.25, folds=3)
TWO_STEPS = training.Config(
    epochs=1, steps_per_epoch=2, global_batch=4, batch_size=2, lr=1e-3, warmup_epochs=0
)
PRETEXTS = [n for n in methods.names() if "labels" not in methods.needs(n)]
OBJECTIVES = [n for n in methods.names() if "labels" in methods.needs(n)]
# A method as somebody may add it: one file, nothing else.
DROPPED_IN = '''
"""Tell how bright a crop is."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from logonet.methods._parts import intensity, ratio

NEEDS = frozenset({"crops"})


@dataclass(frozen=True)
class Config:
    scale: float = 1.0


def check(cfg, facts):
    pass


def prepare(sample, cfg, rng):
    return {"image": sample["image_CXYZ"]}


def build(cfg, backbone, facts):
    return Brightness(cfg, backbone)


class Brightness(nn.Module):
    def __init__(self, cfg, backbone):
        super().__init__()
        self.cfg, self.backbone = cfg, backbone
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name.startswith(backbone.encoder_prefixes))
        self.head = nn.Linear(sum(backbone.channels), 1)

    def forward(self, batch, progress):
        image = intensity(batch["image"])
        feats = torch.cat([f.mean(dim=(2, 3, 4)) for f in self.backbone.encode(image)], dim=1)
        error = (self.head(feats)[:, 0] - self.cfg.scale * image.mean(dim=(1, 2, 3, 4))).square()
        return error.mean(), {"loss": ratio(error.sum(), len(error))}
'''


@pytest.fixture(scope="module")
def scans(place: str) -> str:
    phantom.write_dataset(f"{place}/scans", 4, size_vox=(36, 32, 32))
    return f"{place}/scans/"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One folder for all methods, which then share crops and cases."""
    return str(tmp_path_factory.mktemp("pretexts"))


def backbone_for(method: str, **options: Any) -> dict[str, Any]:
    """LoGoNet, or the first network that has what the method wants of one."""
    wanted = set(getattr(methods._file(method), "WANTS", ()))
    name = next(n for n in ("logonet", *networks.names()) if not wanted - networks.abilities(n))
    return {"name": name, **networks.tiny(name), **options}


def pretraining(method: dict[str, Any], backbone: dict[str, Any]) -> pipelines.Pretraining:
    return pipelines.Pretraining(
        split=SPLIT,
        crops=cropping.Config(size_vox=SIZE, per_scan=2),
        clusterers=kmeans.Config(n=2, k_min=3, k_max=5, iterations=5),
        backbone=backbone,
        method=method,
        train=TWO_STEPS,
    )


def of_method(root: str, stage: str, name: str) -> Artifact:
    found = [artifacts.find(str(path)) for path in Path(root, stage).iterdir()]
    (one,) = [a for a in found if a is not None and a.config["method"]["name"] == name]
    return one


@pytest.mark.parametrize("name", of_each_kind(PRETEXTS, "masked_clusters", "simmim", "simclr"))
def test_a_pretext_by_name_hands_its_encoder_on(name: str, scans: str, root: str) -> None:
    pipelines.pretrain(pretraining({"name": name}, backbone_for(name)), scans, root, HERE, None)
    pretrained = of_method(root, "pretrain", name)
    assert pretrained.facts["steps"] == 2
    from safetensors.torch import load

    own = pretrained.config["backbone"]
    torch.manual_seed(0)
    net = networks.build(**own, num_classes=2)
    weights = load(pretrained.read("backbone.safetensors"))
    assert weights.keys() == net.state_dict().keys()  # no teacher, head or mask token among them
    (entry,) = json.loads(pretrained.read("history.json"))
    assert entry["loss"] > 0
    assert entry["effective_rank"] >= 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_by_name_finetunes(name: str, scans: str, root: str) -> None:
    cfg = pipelines.Finetuning(
        split=SPLIT,
        crops=prepared_scans.CropSampling(size_vox=SIZE),
        backbone=backbone_for(name),
        method={"name": name},
        train=TWO_STEPS,
        init=Init(),
        validation=sliding_window.Config(overlap=0),
    )
    pipelines.finetune(cfg, scans, root, HERE, None)
    finetuned = of_method(root, "finetune", name)
    assert finetuned.facts["steps"] == 2
    chosen = load_model(finetuned.uri)  # the student alone: a teacher would not fit the network
    assert set(chosen.folder) == {"config.json", "weights.safetensors"}


def test_a_network_that_a_method_cannot_take_is_refused_with_those_that_it_can(scans: str, root: str) -> None:
    with pytest.raises(UserError, match=r"'mae3d' needs encode_visible .* 'logonet' .* do: unetr$"):
        pipelines.resolve(pretraining({"name": "mae3d"}, {"name": "logonet", **networks.tiny("logonet")}))


def test_units_that_a_network_cannot_hide_are_refused_before_anything_is_read() -> None:
    method = {"name": "simmim", "unit_vox": (8, 8, 8)}
    with pytest.raises(UserError, match=r"method\.unit_vox"):
        pipelines.resolve(pretraining(method, {"name": "unetr", **networks.tiny("unetr")}))


def test_comparing_methods_want_more_than_one_crop() -> None:
    from dataclasses import replace

    cfg = pretraining({"name": "simclr"}, backbone_for("simclr"))
    with pytest.raises(UserError, match=r"train\.batch_size is 1; set it to 2 or more"):
        pipelines.resolve(replace(cfg, train=replace(cfg.train, batch_size=1)))


def test_a_file_dropped_into_the_folder_trains_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    (tmp_path / "brightness.py").write_text(DROPPED_IN)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "logonet.methods.brightness", None)
    del sys.modules["logonet.methods.brightness"]
    torch.manual_seed(0)
    net = networks.build("logonet", 1, 2, **networks.tiny("logonet"))
    module = methods.build("brightness", net, methods.DataSpec(SIZE))
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    drawn = np.random.default_rng(0).integers(0, 65536, (2, 1, *SIZE)).astype(np.uint16)
    cfg, losses = methods.config("brightness"), []
    for _ in range(3):
        ready = [
            methods.prepare("brightness")({"image_CXYZ": x}, cfg, np.random.default_rng(0)) for x in drawn
        ]
        batch = {k: torch.from_numpy(np.stack([r[k] for r in ready])) for k in ready[0]}
        loss, _ = module(batch, 0.0)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_through_the_job_script(scans: str, tmp_path: Path) -> None:
    """In a copy of the checkout, as its owner would: data tasks and workers are processes that find the file too."""
    home = tmp_path / "checkout"
    for part in ("logonet", "jobs"):
        shutil.copytree(REPO / part, home / part)
    (home / "logonet" / "methods" / "brightness.py").write_text(DROPPED_IN)
    command = [
        sys.executable,
        "jobs/pretrain.py",
        "--recipe=demo",
        f"--data={scans}",
        f"--root={tmp_path}/runs",
    ]
    settings = ["method={name: brightness, scale: 0.5}", "train.epochs=1", "train.steps_per_epoch=2"]
    settings += ["split.test_share=0.25", "split.folds=3", "train.warmup_epochs=0"]
    env = {**os.environ, "PYTHONPATH": str(home)}
    command += ["--workers=1", *(f"--set={setting}" for setting in settings)]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert of_method(f"{tmp_path}/runs", "pretrain", "brightness").facts["steps"] == 2
