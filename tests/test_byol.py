"""BYOL against its closed forms, its moving copy, and the collapse that it is built to avoid.

Shapes: B samples, C input channels, X Y Z the crop's axes, N rows, D columns.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_methods import Stub
from test_selfsup import LEARNERS, assert_learns_two_phantoms, phantom_batch
from torch import Tensor, nn

from logonet import methods
from logonet.core.errors import UserError
from logonet.methods._selfsup import joined, pooled, spread


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return phantom_batch("byol", methods.config("byol"), (0, 1, 2))


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    return methods.build("byol", Stub(), size_vox=(32, 32, 32), **options)


@pytest.mark.parametrize(("angle_deg", "expected"), [(0, 0), (90, 4), (180, 8), (60, 2)])
def test_closed_forms(angle_deg: float, expected: float, batch: dict[str, Tensor]):
    """Predictions at one angle to the targets of the other view, in the module itself."""
    module = build(projection=2)
    angle = math.radians(angle_deg)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    along = torch.tensor([3.0, 4.0])

    class Fixed(nn.Module):
        def forward(self, rows_NF: Tensor) -> Tensor:
            return along.expand(len(rows_NF), 2) + 0 * rows_NF.sum()

    module.projector = module.target_projector = Fixed()
    module.predictor = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        module.predictor.weight.copy_(turn)
    loss, _ = module(batch, 0.0)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_the_loss_is_equation_2_both_ways(batch: dict[str, Tensor]):
    module = build()
    plain = copy.deepcopy(module)
    with torch.no_grad():  # the copy is no longer what it copies
        for parameter in module.target_backbone.parameters():
            parameter.mul_(0.9)
        for parameter, theirs in zip(plain.target_backbone.parameters(), module.target_backbone.parameters()):
            parameter.copy_(theirs)
    loss, metrics = module(batch, 0.0)

    def rows(net: Any, key: str) -> Tensor:
        return pooled(joined(net.encode(batch[key]), plain.levels))

    expected = 0
    for one, other in (("first", "second"), ("second", "first")):
        p = plain.predictor(plain.projector(rows(plain.backbone, one)))
        t = plain.target_projector(rows(plain.target_backbone, other)).detach()
        p, t = (x / x.norm(dim=1, keepdim=True) for x in (p, t))
        expected = expected + (p - t).square().sum(1).mean()
    torch.testing.assert_close(loss, expected)
    assert metrics["loss"].tolist() == pytest.approx([3 * loss.item(), 3])
    loss.backward()
    for key, parameter in module.named_parameters():
        if key.startswith("target_"):
            assert parameter.grad is None, key
            assert not parameter.requires_grad, key


def test_the_copy_begins_as_the_network_and_follows(batch: dict[str, Tensor]):
    module = build()
    pairs = [(module.backbone, module.target_backbone), (module.projector, module.target_projector)]

    def weights(net: nn.Module) -> list[Tensor]:
        return [p.detach().clone() for p in net.parameters()]

    for net, target in pairs:
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), target.parameters(), strict=True))
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.5)
    loss, _ = module(batch, 0.0)
    loss.backward()
    optimizer.step()
    before = [weights(target) for _, target in pairs]
    module.after_step(0.5)
    decay = 0.995  # half way from 0.99 to 1
    for (net, target), old in zip(pairs, before):
        for now, was, new in zip(target.parameters(), old, net.parameters()):
            torch.testing.assert_close(now, decay * was + (1 - decay) * new)
        for theirs, own in zip(target.buffers(), net.buffers()):
            assert torch.equal(theirs, own)
    assert not torch.equal(weights(module.projector)[0], weights(module.target_projector)[0])
    old = weights(module.target_projector)
    module.after_step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(weights(module.target_projector), old))


class Features(nn.Module):
    """A linear encoder of crops that are one voxel of 8 channels."""

    channels, strides, feature_channels = (16,), (1,), 16
    encoder_prefixes, head_prefixes = ("layer.",), ()

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(8, 16, 1)

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        return [self.layer(x_BCXYZ)]


class Unstopped(nn.Module):
    """A byol module of which the predictor and the stop of the gradient are taken away."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: dict[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        module = self.module
        a, b = (module.projector(pooled(module.backbone.encode(batch[k])[0])) for k in ("first", "second"))
        return 2 * (2 - 2 * F.cosine_similarity(a, b)).mean(), {"spread": spread(a)[None]}

    def after_step(self, progress: float) -> None:
        pass


@pytest.mark.parametrize("broken", [False, True])
def test_without_predictor_and_stop_all_crops_become_one(broken: bool):
    torch.manual_seed(0)
    module: Any = methods.build("byol", Features(), size_vox=(1, 1, 1), in_channels=8)
    if broken:
        module = Unstopped(module)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 1e-2)
    generator = torch.Generator().manual_seed(0)
    values = []
    for step in range(300):
        crops = torch.randn(16, 8, 1, 1, 1, generator=generator)
        views = {k: crops + 0.5 * torch.randn(crops.shape, generator=generator) for k in ("first", "second")}
        loss, metrics = module(views, step / 300)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.after_step(step / 300)
        total = metrics["spread"]
        values.append((total[0] / (1 if broken else total[1])).item())
    assert values[0] > 0.5
    if broken:
        assert values[-1] < 0.1
        assert loss.item() < 0.05
    else:
        assert values[-1] > 0.5


def test_settings():
    module = build(hidden=24, projection=10)
    shapes = {k: tuple(p.shape) for k, p in module.named_parameters() if p.ndim == 2}
    assert shapes == {
        "projector.0.weight": (24, 8),
        "projector.3.weight": (10, 24),
        "predictor.0.weight": (24, 10),
        "predictor.3.weight": (10, 24),
        "target_projector.0.weight": (24, 8),
        "target_projector.3.weight": (10, 24),
    }
    assert build().projector[0].out_features == 8  # the encoder's width
    assert build().predictor[0].in_features == 256
    assert methods.sizes("byol", methods.config("byol", {"view_vox": [8, 8, 8]}), (32,) * 3) == ((8, 8, 8),)
    for options, words in [
        ({"momentum_start": 1.1}, "momentum"),
        ({"momentum_start": 0.9, "momentum_end": 0.8}, "momentum"),
        ({"hidden": 0}, "hidden"),
        ({"projection": 0}, "projection"),
        ({"view_vox": (64, 8, 8)}, "cannot be larger"),
        ({"batch_size": 1}, "set it to 2"),
    ]:
        with pytest.raises(UserError, match=words):
            build(**options)


@pytest.mark.parametrize("backbone", LEARNERS)
def test_it_learns(backbone: str):
    assert_learns_two_phantoms("byol", backbone)
