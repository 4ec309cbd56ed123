"""Optimizers, learning rates of groups, averaged weights; runs with them resume to the bit."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import LocalLoop, a_job, assert_same_run, crops_dataset, killed_at, labelled_dataset, labelled_job
from torch import Tensor, nn

from logonet import networks, training
from logonet.core.errors import UserError
from logonet.training import checkpoints, optimizers
from logonet.training.dataset import LabelledDataset, TrainingDataset

SIZE = (32, 32, 32)
# Of each kind one run that has all of it.
SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"optimizer": "sgd", "schedule": "poly", "momentum": 0.9, "lr": 1e-2},
    "groups": {"layer_decay": 0.7, "decay_norms": False, "head_lr_scale": 3.0, "schedule": "step"},
    "frozen encoder, average": {"encoder_frozen_epochs": 1.5, "ema": 0.9, "schedule": "constant"},
}


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> TrainingDataset:
    return crops_dataset(tmp_path_factory.mktemp("crops"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> LabelledDataset:
    return labelled_dataset(tmp_path_factory.mktemp("cases"))


def network(name: str = "logonet") -> networks.Network:
    return networks.build(name, 1, 3, cfg=networks.config(name, networks.tiny(name)))


# ------------------------------------------------------------------------------------------- schedules


def test_schedules_are_their_formulas() -> None:
    share = torch.arange(40) / 40
    wanted = {
        "poly": (1 - share) ** 0.9,
        "constant": torch.ones(40),
        "step": torch.tensor([1.0] * 20 + [0.1] * 10 + [0.01] * 10),
        "cosine": (1 + torch.cos(math.pi * share)) / 2,
    }
    for name, factors in wanted.items():
        cfg = training.Config(epochs=10, warmup_epochs=2, lr=2.0, min_lr=0.5, schedule=name)  # type: ignore[arg-type]
        lrs = [training.lr_at(step, cfg, steps_per_epoch=5) for step in range(50)]
        assert lrs[:10] == pytest.approx([2.0 * (s + 1) / 10 for s in range(10)])
        assert lrs[10:] == pytest.approx((0.5 + 1.5 * factors).tolist()), name


def test_epochs_of_a_frozen_encoder_are_a_warm_up_before_the_warm_up() -> None:
    cfg = training.Config(epochs=10, warmup_epochs=2, lr=1.0, encoder_frozen_epochs=1)
    after = training.Config(epochs=9, warmup_epochs=2, lr=1.0)
    lrs = [training.lr_at(step, cfg, 5) for step in range(50)]
    assert lrs[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert lrs[5:] == [training.lr_at(step, after, 5) for step in range(45)]
    with pytest.raises(UserError, match=r"train.encoder_frozen_epochs is 11"):
        training.Config(epochs=10, encoder_frozen_epochs=11)


# ---------------------------------------------------------------------------------------------- groups


class Toy(networks.Network):
    """Two features: the first depends on one layer, the second on both."""

    channels, strides, feature_channels = (2, 2), (1, 2), 2
    encoder_prefixes, head_prefixes = ("first.", "second."), ("classifier.",)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 2, 1), nn.Conv3d(2, 2, 2, stride=2)
        self.up, self.classifier = nn.Conv3d(2, 2, 1), nn.Conv3d(2, 3, 1)

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        fine_BFXYZ = self.first(x_BCXYZ)
        return [fine_BFXYZ, self.second(fine_BFXYZ)]


def test_groups_of_a_network_of_two_levels() -> None:
    method = nn.Module()
    method.backbone, method.projection = Toy(), nn.Linear(2, 2)
    params = dict(method.named_parameters())
    cfg = training.Config(layer_decay=0.5, encoder_lr_scale=0.8, head_lr_scale=3.0, decay_norms=False)
    found = optimizers.groups_of(params, method.backbone, SIZE, cfg)
    assert {name: group.lr_scale for name, group in found.items() if name.endswith("weight")} == {
        "backbone.first.weight": pytest.approx(0.8 * 0.25),
        "backbone.second.weight": pytest.approx(0.8 * 0.5),
        "backbone.up.weight": 1.0,
        "backbone.classifier.weight": 3.0,
        "projection.weight": 3.0,
    }
    assert all(group.decays == name.endswith("weight") for name, group in found.items())
    built = optimizers.build(params, method.backbone, SIZE, cfg)
    sizes = [len(group["params"]) for group in built.param_groups]
    assert sum(sizes) == len(params)
    plain = optimizers.build(params, method.backbone, SIZE, training.Config())
    (group,) = plain.param_groups
    assert all(a is b for a, b in zip(group["params"], params.values(), strict=True))


@pytest.mark.parametrize("name", networks.names())
def test_every_parameter_of_an_encoder_has_a_level(name: str) -> None:
    net = network(name)
    levels = optimizers.encoder_levels(net, tuple(networks.tiny(name).get("img_size", SIZE)))
    encoder = {n for n, _ in net.named_parameters() if n.startswith(net.encoder_prefixes)}
    assert levels.keys() <= encoder
    assert set(levels.values()) <= set(range(len(net.channels)))
    # A few networks have parameters that no feature needs, such as the last norm of a transformer.
    assert len(levels) >= 0.9 * len(encoder)


# -------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if "average" in name else pytest.mark.slow) for name in SETTINGS]
)
def test_a_killed_run_resumes_to_the_bit(
    name: str, crops: TrainingDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LocalLoop(crops, a_job(f"{tmp_path}/whole", **SETTINGS[name]))
    whole.train()
    job = a_job(f"{tmp_path}/killed", checkpoint_every_steps=1, **SETTINGS[name])
    for at_step in (2, 5):
        killed_at(monkeypatch, LocalLoop(crops, job), at_step)
    resumed = LocalLoop(crops, job)
    resumed.train()
    assert_same_run(resumed, whole)
    for (key, a), b in zip(whole.network.state_dict().items(), resumed.network.state_dict().values()):
        assert torch.equal(a, b), key


def test_a_frozen_encoder_rests_and_then_learns(crops: TrainingDataset, tmp_path: Path) -> None:
    loop = LocalLoop(crops, a_job(str(tmp_path), epochs=2, encoder_frozen_epochs=1, weight_decay=0.1))
    prefixes = tuple(f"backbone.{prefix}" for prefix in loop.method.backbone.encoder_prefixes)
    first = {n: p.detach().clone() for n, p in loop.params.items()}
    moved: list[set[str]] = []

    def epoch_done(metrics: dict[str, Any]) -> None:
        moved.append({n for n, p in loop.params.items() if not torch.equal(p, first[n])})

    loop.train(epoch_done)
    assert moved[0] == {name for name in first if not name.startswith(prefixes)}
    # But for weights without a gradient, such as a bias before a norm over a map of one voxel.
    assert len(moved[1]) > 0.95 * len(first)


def test_sgd_is_torchs_with_nesterov_momentum() -> None:
    cfg = training.Config(optimizer="sgd", momentum=0.9, lr=0.1, weight_decay=0.01, epochs=1, warmup_epochs=0)
    net = Toy()
    params = {f"backbone.{n}": p for n, p in net.named_parameters()}
    other = copy.deepcopy(net)
    ours = optimizers.build(params, net, SIZE, cfg)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for step in range(3):
        for optimizer, own in ((ours, net), (theirs, other)):
            for i, p in enumerate(own.parameters()):
                p.grad = torch.full_like(p, float(i + step))
            if optimizer is ours:
                optimizers.set_rates(optimizer, 0, cfg, 100)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


def test_an_average_of_weights_is_a_slow_loop_and_is_what_is_kept(
    labelled: LabelledDataset, tmp_path: Path
) -> None:
    loop = LocalLoop(labelled, labelled_job(str(tmp_path), ema=0.6))
    assert loop.average is not None
    own, slow = loop.method.backbone, {}
    real = loop.average.update

    def update(network: networks.Network, steps: int) -> None:
        real(network, steps)
        decay = min(0.6, (1 + steps) / (10 + steps))
        for name, p in own.named_parameters():
            before = slow.get(name, p.detach().double())
            slow[name] = decay * before + (1 - decay) * p.detach().double() if steps > 1 else before.clone()

    loop.average.update = update  # type: ignore[method-assign]
    history = loop.train()
    averaged = dict(loop.network.named_parameters())
    for name, value in slow.items():
        torch.testing.assert_close(averaged[name].double(), value, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(p, averaged[name]) for name, p in own.named_parameters())
    for name, buffer in own.named_buffers():
        assert torch.equal(buffer, dict(loop.network.named_buffers())[name]), name
    files = checkpoints.save_final(str(tmp_path), loop.method, loop.network, history)
    kept = training.load_weights(
        training.Init(f"{tmp_path}/backbone.safetensors", files["backbone.safetensors"].sha256)
    )
    assert all(torch.equal(kept[name], p) for name, p in averaged.items())
