"""What the self-supervised methods share, against slow loops and closed forms.

Shapes: B samples, C input channels, F features, X Y Z the crop's axes, N rows, D columns.
"""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logonet import methods, networks
from logonet.core import seeding
from logonet.data import phantom
from logonet.methods import _selfsup

# --------------------------------------------------------- a step of a method, for the methods' own files

CUBE = (32, 32, 32)
LEARNERS = ["unetr", *(pytest.param(name, marks=pytest.mark.slow) for name in ("logonet", "swinunetr"))]
Size = tuple[int, int, int]


@functools.cache
def phantom_crop(seed: int, size_vox: Size = CUBE) -> np.ndarray:
    """A whole phantom as a crop, uint16 (1, X, Y, Z), in the window of -1000 to 1000 HU."""
    x, y, z = (192 / side for side in size_vox)
    volume, _ = phantom.phantom(seed, size_vox, (x, y, z))
    return np.round(65535 * np.clip((volume.array_CXYZ + 1000) / 2000, 0, 1)).astype(np.uint16)


def phantom_batch(
    name: str, cfg: Any, seeds: tuple[int, ...] = (0, 1), size_vox: Size = CUBE
) -> dict[str, Tensor]:
    prepare = methods.prepare(name)
    samples = {i: {"image_CXYZ": phantom_crop(i, size_vox)} for i in seeds}
    ready = [prepare(sample, cfg, seeding.rng(0, "prepare", i)) for i, sample in samples.items()]
    return {key: torch.from_numpy(np.stack([r[key] for r in ready])) for key in ready[0]}


def assert_learns_two_phantoms(name: str, backbone: str, size_vox: Size = CUBE, **options: Any) -> None:
    """20 steps on one batch of two phantoms lower the loss; the same step is finite in bfloat16."""
    torch.manual_seed(0)
    net = networks.build(backbone, 1, 2, **networks.tiny(backbone))
    cfg = methods.config(name, options)
    module = methods.build(name, net, size_vox=size_vox, cfg=cfg)
    batch = phantom_batch(name, cfg, size_vox=size_vox)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, _ = module(batch, 0.0)
    narrow.backward()
    trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
    assert any(key.startswith("backbone.") for key in trained)
    for key, parameter in trained.items():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    losses = []
    for step in range(20):
        loss, _ = module(batch, step / 20)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(module, "after_step"):
            module.after_step(step / 20)
        losses.append(loss.item())
    assert math.isfinite(narrow.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.1


# -------------------------------------------------------------------------------------------- contrasts


def rows(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_nt_xent(a_ND: Tensor, b_ND: Tensor, temperature: float) -> Tensor:
    """SimCLR's Eq. 1 and Algorithm 1, word for word."""
    count = len(a_ND)
    z = [row for pair in zip(a_ND, b_ND) for row in pair]  # 2k - 1 and 2k are a pair

    def s(i: int, j: int) -> Tensor:
        return z[i] @ z[j] / (z[i].norm() * z[j].norm())

    def loss(i: int, j: int) -> Tensor:
        others = [torch.exp(s(i, k) / temperature) for k in range(2 * count) if k != i]
        return -torch.log(torch.exp(s(i, j) / temperature) / torch.stack(others).sum())

    terms = [loss(2 * k, 2 * k + 1) + loss(2 * k + 1, 2 * k) for k in range(count)]
    return torch.stack(terms).sum() / (2 * count)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_equation_1(count: int, temperature: float):
    a, b = (rows(count, 6, seed=seed).requires_grad_() for seed in (1, 2))
    found = _selfsup.nt_xent(a, b, temperature)
    expected = plain_nt_xent(a, b, temperature)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, (a, b)), torch.autograd.grad(expected, (a, b))):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(_selfsup.nt_xent(b, a, temperature), found)


def test_nt_xent_is_computed_in_float32_under_autocast():
    a, b = (rows(6, 8, seed=seed).float() for seed in (1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        found = _selfsup.nt_xent(a, b, 0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, _selfsup.nt_xent(a, b, 0.1), rtol=0, atol=0)
    assert torch.isfinite(_selfsup.nt_xent(torch.zeros(3, 4), torch.zeros(3, 4), 0.5))


def _projection() -> nn.Linear:
    layer = nn.Linear(6, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(rows(4, 6, seed=3))
        layer.bias.copy_(rows(4, seed=4))
    return layer


def _one_rank(rank: int, meet: str, gather: bool) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    try:
        layer = _projection()
        a, b = (layer(rows(6, 6, seed=seed).chunk(2)[rank]) for seed in (1, 2))
        loss = _selfsup.nt_xent(a, b, 0.5, gather)
        loss.backward()
        torch.save((loss.detach(), layer.weight.grad, layer.bias.grad), f"{meet}-{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("gather", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_ranks_that_gather_are_one_with_both_batches(tmp_path: Path, gather: bool):
    meet = str(tmp_path / "meet")
    torch.multiprocessing.spawn(_one_rank, (meet, gather), nprocs=2)
    losses, *grads = zip(*(torch.load(f"{meet}-{rank}") for rank in range(2)))
    layer = _projection()
    alone = _selfsup.nt_xent(*(layer(rows(6, 6, seed=seed)) for seed in (1, 2)), 0.5)
    alone.backward()
    assert torch.allclose(torch.stack(losses).mean(), alone) == gather
    for both, whole in zip(grads, (layer.weight.grad, layer.bias.grad)):
        assert torch.allclose(torch.stack(both).mean(0), whole) == gather


def test_byol_loss_and_its_stop():
    a, b = (rows(5, 8, seed=seed).requires_grad_() for seed in (1, 2))
    loss = _selfsup.byol_loss(a, b)
    unit_a, unit_b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    torch.testing.assert_close(loss, (unit_a - unit_b).square().sum(1).mean())  # BYOL's Eq. 2
    loss.backward()
    assert a.grad is not None
    assert b.grad is None
    assert _selfsup.byol_loss(torch.zeros(2, 3), torch.ones(2, 3)) == 2


def test_spread():
    orthogonal = torch.eye(6)[:4] * torch.tensor([[1.0], [5.0], [0.1], [2.0]])
    assert _selfsup.spread(orthogonal) == pytest.approx(1)
    assert _selfsup.spread(torch.ones(4, 6) * torch.arange(1.0, 5)[:, None]) == pytest.approx(0, abs=1e-6)
    z = F.normalize(rows(50, 16), dim=1)
    expected = z.std(0).square().mean().sqrt() * 4  # per column, times sqrt(D)
    assert _selfsup.spread(3 * z) == pytest.approx(expected.item())
    assert _selfsup.spread(z) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["simclr", "byol", "rcr", "simtrot"])
def test_collapse_is_said_with_advice(name: str):
    healthy = {"spread": 0.7, "effective_rank": 9.0}
    assert methods.warning(name, healthy) is None
    assert "raise train.batch_size" in str(methods.warning(name, healthy | {"spread": 0.002}))
    assert "effective rank 1.10" in str(methods.warning(name, healthy | {"effective_rank": 1.1}))


# --------------------------------------------------------------------------------------------- teachers


def test_momentum():
    values = [_selfsup.momentum(step / 1000) for step in range(1001)]
    assert values[0] == pytest.approx(0.996, abs=1e-15)
    assert values[500] == pytest.approx(0.998, abs=1e-12)
    assert values[1000] == 1
    assert all(a < b for a, b in itertools.pairwise(values))
    assert _selfsup.momentum(0.3, 0.99, 0.99) == 0.99


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_teachers_are_copies_that_nothing_trains():
    net = student()
    teacher = _selfsup.teacher_of(net)
    optimizer = torch.optim.SGD(
        [p for p in nn.ModuleList([net, teacher]).parameters() if p.requires_grad], 0.1
    )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in net.parameters()}
    for mine, theirs in zip(net.state_dict().values(), teacher.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    (net(torch.ones(2, 3)) * teacher(torch.ones(2, 3))).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in net.parameters())


def test_follow():
    net = student()
    with torch.no_grad():
        net(torch.randn(8, 3))  # running statistics move
    teacher = _selfsup.teacher_of(student())
    old = [p.clone() for p in teacher.parameters()]
    _selfsup.follow(teacher, net, 1.0)
    assert all(torch.equal(p, before) for p, before in zip(teacher.parameters(), old))
    assert all(torch.equal(a, b) for a, b in zip(teacher.buffers(), net.buffers(), strict=True))
    _selfsup.follow(teacher, net, 0.75)
    for p, before, new in zip(teacher.parameters(), old, net.parameters()):
        torch.testing.assert_close(p, 0.75 * before + 0.25 * new)
    old = [p.clone() for p in teacher.parameters()]
    _selfsup.follow(teacher, net, 0.9963)
    for p, before, new in zip(teacher.parameters(), old, net.parameters()):
        assert torch.equal(p, before.mul(0.9963).add(new, alpha=1 - 0.9963))
    _selfsup.follow(teacher, net, 0.0)
    assert all(torch.equal(p, new) for p, new in zip(teacher.parameters(), net.parameters()))


def test_a_teacher_goes_to_its_student_and_not_to_its_negative():
    """MedContext's Algorithm 1 prints a minus: from 1 its teacher would come to -0.964."""
    net, teacher = (nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        net.weight.fill_(1)
        teacher.weight.fill_(-1)
    for _ in range(1000):
        _selfsup.follow(teacher, net, 0.996)
    assert teacher.weight.item() == pytest.approx(0.964, abs=5e-4)


# --------------------------------------------------------------------------- what of an encoder is trained


@pytest.mark.parametrize(
    ("backbone", "levels", "left"),
    [
        ("logonet", (3, 1), ()),  # the octants' nets end at the second level
        ("unetr", (3,), ()),
        ("swinunetr", (4,), ()),
        ("uxnet3d", (3,), ("out_norms.0.", "out_norms.1.", "out_norms.2.")),  # of the finer maps
    ],
)
def test_the_whole_encoder_is_trained_and_nothing_else(
    backbone: str, levels: tuple[int, ...], left: tuple[str, ...]
):
    net = networks.build(backbone, 1, 2, **networks.tiny(backbone))
    assert _selfsup.train_encoder(net, 1, (32, 32, 32)) == levels
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    encoder = {name for name, _ in net.named_parameters() if name.startswith(net.encoder_prefixes)}
    assert trained == {name for name in encoder if not name.startswith(left)} if left else trained == encoder
    feats = net.encode(torch.randn(2, 1, 32, 32, 32))
    map_BFxyz = _selfsup.joined(feats, levels)
    assert map_BFxyz.shape[1] == sum(net.channels[level] for level in levels)
    assert map_BFxyz.shape[2:] == feats[-1].shape[2:]
    map_BFxyz.square().sum().backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == trained


def test_joined_maps_are_means_of_boxes():
    coarse, fine = torch.randn(2, 3, 2, 3, 1), torch.randn(2, 4, 4, 9, 5)
    map_BFxyz = _selfsup.joined([fine, coarse], (1, 0))
    assert torch.equal(map_BFxyz[:, :3], coarse)
    torch.testing.assert_close(map_BFxyz[:, 3:], F.adaptive_avg_pool3d(fine, (2, 3, 1)))
    assert _selfsup.joined([fine, coarse], (1,)).shape == coarse.shape
    torch.testing.assert_close(_selfsup.pooled(fine.bfloat16()), fine.bfloat16().float().flatten(2).mean(2))


def test_mlp():
    assert [type(m).__name__ for m in _selfsup.mlp((3, 4, 5, 2))] == [*["Linear", "ReLU"] * 2, "Linear"]
    normed = _selfsup.mlp((3, 4, 2), norm=True)
    assert [type(m).__name__ for m in normed] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert normed(torch.randn(5, 3)).shape == (5, 2)
