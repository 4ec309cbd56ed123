"""The probe: interpolation against the naive way, the fit on features that are known, and nothing touched.

Letters: B batch, C channels, F features, K classes, V voxels, XYZ the crop's axes.
"""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import prepared_case, stored_case
from torch import Tensor, nn

from logonet import networks
from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.data import phantom, prepared_scans
from logonet.training import linear_probe

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (16, 16, 16)
CLASSES = ("background", "liver", "spleen")
CPU = torch.device("cpu")
FEW = linear_probe.Config(train_cases=3, val_cases=2, voxels_per_crop=600)


def kept(folder: Path, name: str, image_CXYZ: np.ndarray, labels_XYZ: np.ndarray) -> prepared_scans.Ref:
    return stored_case(folder, name, image_CXYZ, labels_XYZ)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> prepared_scans.Table:
    """Eight phantoms with two organs."""
    folder, refs = tmp_path_factory.mktemp("cases"), []
    for i in range(8):
        scan, labels_XYZ = phantom.phantom(i, (40, 36, 34), (2.5, 2.5, 3.0), classes=len(CLASSES))
        arrays = prepared_case(scan, labels_XYZ, "CT", prepared_scans.Config(), f"case{i}")
        refs.append(kept(folder, f"case{i}", *arrays))
    return prepared_scans.Table(tuple(refs), CLASSES, (0, 1, 2))


IDS = [f"case{i}" for i in range(8)]


def a_probe(
    table: prepared_scans.Table, size_vox: tuple[int, int, int] = SIZE, cfg: linear_probe.Config = FEW
) -> linear_probe.Probe:
    return linear_probe.Probe(linear_probe.task(cfg, table, IDS[:5], IDS[5:], size_vox), CPU)


def tiny_net(name: str, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return networks.build(name, num_classes=2, **networks.tiny(name))


class Given(nn.Module):
    """A backbone whose features are a function of the crop, at stride 1."""

    def __init__(self, channels: int, features: Any) -> None:
        super().__init__()
        self.channels, self.strides, self.features = (channels,), (1,), features
        self.seen: list[tuple[int, ...]] = []

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.seen.append(tuple(x_BCXYZ.shape))
        return [self.features(x_BCXYZ)]


# -------------------------------------------------------------------------------------- settings and task


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("every_epochs", 0), ("train_cases", 0), ("val_cases", 0), ("crops_per_case", 0), ("voxels_per_crop", 0),
        ("iterations", 0), ("weight_decay", -1.0), ("weight_decay", math.nan),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"probe\.{name} is "):
        linear_probe.Config(**{name: value})


def test_a_task_takes_at_most_what_it_may_of_the_scans_that_are_there(table: prepared_scans.Table) -> None:
    picks = set()
    for seed in range(8):
        cfg = linear_probe.Config(train_cases=2, val_cases=2, seed=seed)
        made = linear_probe.task(cfg, table, [*IDS[:5], "quarantined"], IDS[5:], SIZE)
        assert len(made.train) == len(set(made.train)) == 2
        assert {table.refs[i].scan_id for i in made.train} <= set(IDS[:5])
        assert {table.refs[i].scan_id for i in made.val} <= set(IDS[5:])
        assert made == linear_probe.task(cfg, table, ["quarantined", *reversed(IDS[:5])], IDS[5:], SIZE)
        picks.add(made.train)
    assert len(picks) > 2
    made = linear_probe.task(linear_probe.Config(), table, IDS[:5], IDS[5:], SIZE)
    assert (made.train, made.val) == ((0, 1, 2, 3, 4), (5, 6, 7))
    assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize(("train", "val", "use"), [([], IDS, "train"), (IDS, ["elsewhere"], "val")])
def test_a_task_without_cases_is_refused(
    table: prepared_scans.Table, train: Sequence[str], val: Sequence[str], use: str
) -> None:
    with pytest.raises(UserError, match=rf"no labelled cases for its {use} part; give it"):
        linear_probe.task(FEW, table, train, val, SIZE)


def test_a_task_without_classes_is_refused(table: prepared_scans.Table) -> None:
    with pytest.raises(UserError, match=r"no class but background; give"):
        linear_probe.task(
            FEW, prepared_scans.Table(table.refs, ("background",), (0,)), IDS[:5], IDS[5:], SIZE
        )


# --------------------------------------------------------------------------------- features and the head


def random_feats(size_vox: Sequence[int], strides: Sequence[int | tuple[int, int, int]]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    feats = []
    for level, stride in enumerate(strides):
        per_axis = (stride,) * 3 if isinstance(stride, int) else stride
        shape = [n // s for n, s in zip(size_vox, per_axis)]
        feats.append(torch.randn(1, 3 + level, *shape, generator=draw, dtype=torch.float64))
    return feats


PYRAMIDS: list[tuple[tuple[int, int, int], tuple[int | tuple[int, int, int], ...]]] = [
    ((8, 16, 12), (1, 2, 4)),
    ((8, 16, 16), ((1, 1, 1), (1, 2, 2), (8, 16, 4))),
    ((16, 16, 16), (16, 16)),
]


@pytest.mark.parametrize(("size_vox", "strides"), PYRAMIDS)
def test_features_at_voxels_are_those_of_interpolating_everywhere(
    size_vox: tuple[int, int, int], strides: tuple[Any, ...]
) -> None:
    feats = random_feats(size_vox, strides)
    everywhere = [F.interpolate(f, size_vox, mode="trilinear", align_corners=False)[0] for f in feats]
    voxels_V3 = np.array(list(itertools.product(*map(range, size_vox))))
    x, y, z = voxels_V3.T
    want_VF = torch.cat(everywhere)[:, x, y, z].T
    assert torch.allclose(linear_probe.at_voxels(feats, voxels_V3, size_vox), want_VF, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size_vox", "strides"), PYRAMIDS)
def test_logits_are_those_of_a_head_on_upsampled_features(
    size_vox: tuple[int, int, int], strides: tuple[Any, ...]
) -> None:
    feats = random_feats(size_vox, strides)
    everywhere_FXYZ = torch.cat(
        [F.interpolate(f, size_vox, mode="trilinear", align_corners=False)[0] for f in feats]
    )
    head = linear_probe.Head(
        torch.randn(3, len(everywhere_FXYZ), dtype=torch.float64), torch.randn(3).double()
    )
    want_KXYZ = F.linear(everywhere_FXYZ.movedim(0, -1), head.weight_KF, head.bias_K).movedim(-1, 0)
    assert torch.allclose(linear_probe.dense_logits(feats, head, size_vox), want_KXYZ, rtol=0, atol=1e-12)


def test_standardising_is_undone_in_the_head() -> None:
    """What the head says of raw features is what the fit said of standardised ones; constant ones count nothing."""
    draw = torch.Generator().manual_seed(0)
    x_VF = torch.randn(400, 4, generator=draw) * torch.tensor([1.0, 1e-4, 1e3, 1.0]) + torch.tensor(
        [5, 1e-3, -2e3, 0]
    )
    x_VF[:, 3] = 0.1
    labels_V = (x_VF[:, 0] > 5).long() + ((x_VF[:, 2] > -2e3) & (x_VF[:, 0] > 5)).long()
    standard_VF = x_VF.clone()
    mean_F, scale_F = linear_probe.standardise(standard_VF)
    assert torch.allclose(standard_VF.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(standard_VF.std(0, correction=0), torch.tensor([1.0, 1, 1, 0]), atol=1e-5)
    assert torch.allclose((x_VF - mean_F) * scale_F, standard_VF)
    cfg = linear_probe.Config(weight_decay=1e-4)
    head = linear_probe.fit_head(x_VF.clone(), labels_V, torch.ones(400), 3, cfg)
    same = linear_probe.fit_head(standard_VF.clone(), labels_V, torch.ones(400), 3, cfg)
    raw_VK = F.linear(x_VF, head.weight_KF, head.bias_K)
    assert torch.allclose(raw_VK, F.linear(standard_VF, same.weight_KF, same.bias_K), rtol=1e-3, atol=1e-2)
    assert (raw_VK.argmax(1) == labels_V).float().mean() > 0.95
    assert torch.equal(head.weight_KF[:, 3], torch.zeros(3))


def test_the_loss_is_a_slow_loop() -> None:
    draw = torch.Generator().manual_seed(0)
    logits_VK, labels_V = (
        torch.randn(9, 4, generator=draw).double(),
        torch.tensor([0, 1, 2, 0, 1, 0, 0, 2, 0]),
    )
    share_V = torch.rand(9, generator=draw).double()
    share_V /= share_V.sum()
    p = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits_VK.tolist()]
    w, y = share_V.tolist(), labels_V.tolist()
    entropy = -sum(w[v] * math.log(p[v][y[v]]) for v in range(9))
    dice = []
    for k in (1, 2):  # class 3 is not there
        both = sum(w[v] * p[v][k] for v in range(9) if y[v] == k)
        dice.append(
            2 * both / (sum(w[v] * p[v][k] for v in range(9)) + sum(w[v] for v in range(9) if y[v] == k))
        )
    got = linear_probe.head_loss(logits_VK, F.one_hot(labels_V, 4), share_V)
    assert got.item() == pytest.approx(entropy + 1 - np.mean(dice))
    nothing = linear_probe.head_loss(
        logits_VK, F.one_hot(0 * labels_V, 4), share_V
    )  # no class but background
    assert nothing.item() == pytest.approx(-sum(w[v] * math.log(p[v][0]) for v in range(9)))


@pytest.mark.parametrize("num_voxels", [1, 50, 10**6])
def test_voxels_drawn_stand_for_the_whole_crop(num_voxels: int) -> None:
    labels_XYZ = np.zeros((9, 8, 7), np.uint8)
    labels_XYZ[2:6, 2:6, 2:6] = 1
    labels_XYZ[7, 7, :4] = 3
    voxels_V3, weights_V = linear_probe.draw_voxels(labels_XYZ, num_voxels, seeding.rng(0))
    drawn_V = labels_XYZ[tuple(voxels_V3.T)]
    assert len(np.unique(voxels_V3, axis=0)) == len(voxels_V3)
    each = math.ceil(num_voxels / 3)
    for k, size in ((0, 504 - 68), (1, 64), (3, 4)):
        assert (drawn_V == k).sum() == min(size, each)
        assert weights_V[drawn_V == k].sum() == pytest.approx(size)


# ------------------------------------------------------------------------------------------- measuring


def by_intensity(x_BCXYZ: Tensor) -> Tensor:
    """Bumps along the intensity: enough to tell labels that the intensity tells."""
    centres = torch.linspace(0, 1, 9)[:, None, None, None]
    return torch.exp(-(((x_BCXYZ - centres) * 8) ** 2))


@pytest.fixture
def coded(tmp_path: Path) -> prepared_scans.Table:
    """Eight cases of noise around an intensity that says the class; each organ has 27 of 32768 voxels (0.08 %)."""
    rng, refs = np.random.default_rng(0), []
    for i in range(8):
        labels_XYZ = np.zeros((32, 32, 32), np.uint8)
        for k in (1, 2):
            x, y, z = rng.integers(0, 14, 3)
            labels_XYZ[x + 15 * (k - 1) :, y:, z:][:3, :3, :3] = k
        image_CXYZ = (np.array([0.2, 0.5, 0.75])[labels_XYZ] + rng.uniform(-0.1, 0.1, labels_XYZ.shape))[None]
        refs.append(kept(tmp_path, f"case{i}", (image_CXYZ * 65535).astype(np.uint16), labels_XYZ))
    return prepared_scans.Table(tuple(refs), CLASSES, (0, 1, 2))


def test_classes_of_hardly_any_voxels_are_found_where_features_tell_them(coded: prepared_scans.Table) -> None:
    measured = a_probe(coded, (32, 32, 32)).measure(Given(9, by_intensity))
    assert measured["probe_dice"] > 0.95
    assert len(measured["probe_dice_per_class"]) == 2
    assert measured["probe_dice"] == pytest.approx(np.mean(measured["probe_dice_per_class"]))
    half = a_probe(coded, (32, 32, 32)).measure(Given(1, lambda x: (x > 0.62).float()))
    assert half["probe_dice_per_class"][1] > 0.95
    assert half["probe_dice_per_class"][0] < 0.05
    nothing = a_probe(coded, (32, 32, 32)).measure(Given(1, torch.zeros_like))
    assert nothing["probe_dice"] < 0.05


def test_dice_is_that_of_all_voxels_of_all_validation_crops(table: prepared_scans.Table) -> None:
    """Against a slow loop with the same head."""
    prober, net = a_probe(table), Given(9, by_intensity)
    measured = prober.measure(net)
    with torch.no_grad():
        head = prober._fit(net.eval())
        found, truth = [], []
        for image_CXYZ, labels_XYZ in prober._val_crops:
            feats_FXYZ = by_intensity(torch.from_numpy(image_CXYZ.astype(np.float32) / 65535))
            logits_KXYZ = (
                torch.einsum("kf,fxyz->kxyz", head.weight_KF, feats_FXYZ) + head.bias_K[:, None, None, None]
            )
            found.append(logits_KXYZ.argmax(0).numpy())
            truth.append(labels_XYZ)
    for k in (1, 2):
        a, b = np.stack(found) == k, np.stack(truth) == k
        want = 2 * (a & b).sum() / (a.sum() + b.sum())
        assert 0 < want < 1
        assert measured["probe_dice_per_class"][k - 1] == pytest.approx(want, rel=1e-3)


def test_a_class_that_no_case_has_is_left_out_of_the_mean(table: prepared_scans.Table) -> None:
    more = prepared_scans.Table(table.refs, (*CLASSES, "pancreas"), (0, 1, 2, 3))
    plain, measured = (a_probe(t).measure(Given(9, by_intensity)) for t in (table, more))
    assert math.isnan(measured["probe_dice_per_class"][2])
    assert measured["probe_dice"] == pytest.approx(np.mean(measured["probe_dice_per_class"][:2]))
    assert measured["probe_dice"] == pytest.approx(plain["probe_dice"], abs=0.02)


def test_crops_are_read_once_and_show_organs(
    table: prepared_scans.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    prober, net = a_probe(table), Given(9, by_intensity)
    first = prober.measure(net)
    assert net.seen == [(1, 1, *SIZE)] * 2 * (3 + 2)
    monkeypatch.setattr(prepared_scans, "read_crop", lambda *args: pytest.fail("read again"))
    assert prober.measure(net) == first
    assert all(crop.labels_V.any() for crop in prober._train_crops)
    assert all(labels_XYZ.any() for _, labels_XYZ in prober._val_crops)


@pytest.mark.parametrize("name", networks.names())
def test_measuring_leaves_no_trace(table: prepared_scans.Table, name: str) -> None:
    """Twice the same; weights, running statistics, gradients, training flags and random states as before."""
    net, size_vox = tiny_net(name).train(), (32, 32, 32)
    frozen = next(m for m in net.modules() if m is not net)
    frozen.eval()
    flags = [m.training for m in net.modules()]
    before = {n: t.clone() for n, t in net.state_dict().items()}
    state = torch.get_rng_state()
    prober = a_probe(
        table,
        size_vox,
        linear_probe.Config(train_cases=2, val_cases=1, crops_per_case=1, voxels_per_crop=300),
    )
    measured = prober.measure(net)
    assert prober.measure(net) == measured
    assert a_probe(table, size_vox, prober.task.cfg).measure(tiny_net(name)) == measured
    assert 0 < measured["probe_dice"] < 1
    assert torch.equal(state, torch.get_rng_state())
    assert flags == [m.training for m in net.modules()]
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert json.loads(json.dumps(measured)) == measured


def test_flags_come_back_after_a_failure(table: prepared_scans.Table) -> None:
    def fail(x_BCXYZ: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    net = Given(1, fail).train()
    with pytest.raises(RuntimeError, match="out of memory"):
        a_probe(table).measure(net)
    assert net.training


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("from_crop", [0, 7])
def test_features_that_are_no_numbers_are_no_score(
    table: prepared_scans.Table, bad: float, from_crop: int
) -> None:
    """In the crops that the head is fitted on, or only in those it is judged on."""
    net = Given(9, by_intensity)

    def spoilt(x_BCXYZ: Tensor) -> Tensor:
        features_BFXYZ = by_intensity(x_BCXYZ)
        features_BFXYZ[:, 4] = bad if len(net.seen) > from_crop else 0.5
        return features_BFXYZ

    net.features = spoilt
    measured = a_probe(table).measure(net)
    if math.isfinite(bad):
        assert 0 <= measured["probe_dice"] <= 1
    else:
        assert math.isnan(measured["probe_dice"])
        assert len(measured["probe_dice_per_class"]) == 2
        assert all(map(math.isnan, measured["probe_dice_per_class"]))
