"""The supervised method against slow loops from Eq. 6-8, MONAI's losses, and what a frozen encoder promises.

Shapes: B samples, C input channels, K classes, X Y Z the crop's axes.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from logonet import methods, networks
from logonet.core import config, seeding
from logonet.core.errors import UserError
from logonet.data import augment
from logonet.data.classes import IGNORE
from logonet.methods._segmentation import (
    SMOOTH,
    Losses,
    by_comparison,
    deep_weights,
    dice_and_ce,
    nearest,
    per_class,
)
from logonet.methods.supervised import Config, Supervised
from logonet.networks import SegOut

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (8, 8, 6)
K = 4
NONE = {"augment": config.to_dict(augment.none())}


def data_spec(size_vox: tuple[int, int, int] = SIZE, num_classes: int = K) -> methods.DataSpec:
    return methods.DataSpec(size_vox, num_classes=num_classes)


class Net(nn.Module):
    """A backbone with everything that can go wrong: batch norm, dropout, deep outputs, a loss of its own."""

    channels, strides, feature_channels = (4, 8), ((1, 1, 1), (2, 2, 2)), 6
    encoder_prefixes, head_prefixes = ("fine.", "coarse"), ("classify.", "deep_heads.")

    def __init__(self, num_classes: int = K, num_deep: int = 0) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Dropout(0.5)
        )
        self.coarse = nn.Sequential(nn.Conv3d(4, 8, 2, stride=2), nn.BatchNorm3d(8), nn.ReLU())
        self.join = nn.Sequential(nn.Conv3d(12, 6, 1), nn.BatchNorm3d(6))
        self.classify = nn.Conv3d(6, num_classes, 1)
        self.deep_heads = nn.ModuleList(nn.Conv3d(6, num_classes, 1) for _ in range(num_deep))
        self.aux = False

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        fine = self.fine(x_BCXYZ)
        return [fine, self.coarse(fine)]

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        up = nn.functional.interpolate(feats[1], size=feats[0].shape[2:])
        return self.join(torch.cat([feats[0], up], dim=1))

    def decode(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> SegOut:
        f = self.decode_features(x_BCXYZ, feats)
        deep = [head(f[:, :, :: 2**i, :: 2**i, ::2]) for i, head in enumerate(self.deep_heads, start=1)]
        return SegOut(self.classify(f), deep, f.square().mean() if self.aux else None)


def batch_of(num_samples: int = 2, seed: int = 0, num_classes: int = K) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples, *SIZE), generator=generator, dtype=torch.uint8)
    return {"image": torch.rand(num_samples, 1, *SIZE, generator=generator), "labels": labels}


def supervised(net: nn.Module | None = None, **options: Any) -> Supervised:
    torch.manual_seed(0)
    module = methods.build("supervised", Net() if net is None else net, data_spec(), **options)
    assert isinstance(module, Supervised)
    return module


def value(metric: Tensor) -> float:
    total, count = metric
    return (total / count).item()


# -------------------------------------------------------------------------------------- Eq. 6 to 8


def slow_dice_and_ce(logits_KXYZ: Tensor, labels_XYZ: Tensor) -> tuple[float, float]:
    """Eq. 7, for every class and averaged, and Eq. 8, for every voxel and averaged, with Python's numbers."""
    num_classes, *size = logits_KXYZ.shape
    overlap, p_sum, t_sum, ce = ([0.0] * num_classes for _ in range(4))
    for place in np.ndindex(*size):
        scores = [logits_KXYZ[k][place].item() for k in range(num_classes)]
        total = sum(math.exp(s) for s in scores)
        for k in range(num_classes):
            p, t = math.exp(scores[k]) / total, float(labels_XYZ[place].item() == k)
            overlap[k] += p * t
            p_sum[k] += p
            t_sum[k] += t
            ce[k] -= t * math.log(p)
    dice = [1 - (2 * o + SMOOTH) / (p + t + SMOOTH) for o, p, t in zip(overlap, p_sum, t_sum)]
    return sum(dice) / num_classes, sum(ce) / math.prod(size)


@pytest.mark.parametrize("labels", ["all classes", "one missing", "background"])
def test_loss_is_equations_7_and_8(labels: str) -> None:
    logits = torch.randn(2, K, 3, 4, 2, generator=torch.Generator().manual_seed(1)) * 3
    truth = torch.randint(K, (2, 3, 4, 2), generator=torch.Generator().manual_seed(2))
    if labels == "one missing":
        truth[truth == 2] = 1
    if labels == "background":
        truth[:] = 0
    dice_B, ce_B = dice_and_ce(logits, truth)
    for b in range(2):
        assert (dice_B[b].item(), ce_B[b].item()) == pytest.approx(
            slow_dice_and_ce(logits[b], truth[b]), rel=1e-5, abs=1e-6
        )


@pytest.mark.parametrize(("w_dice", "w_ce"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.3, 2.0)])
@pytest.mark.parametrize("labels", ["all classes", "one missing", "background"])
def test_loss_and_gradient_are_monais(labels: str, w_dice: float, w_ce: float) -> None:
    from monai.losses import DiceCELoss

    generator = torch.Generator().manual_seed(3)
    truth = torch.randint(0, {"all classes": K, "one missing": K - 1, "background": 1}[labels], (2, *SIZE))
    ours = (torch.randn(2, K, *SIZE, generator=generator, dtype=torch.float64) * 4).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    dice_B, ce_B = dice_and_ce(ours, truth.to(torch.uint8))
    loss = (w_dice * dice_B + w_ce * ce_B).mean()
    options: dict[str, Any] = {"smooth_nr": SMOOTH, "smooth_dr": SMOOTH}
    monai = DiceCELoss(to_onehot_y=True, softmax=True, lambda_dice=w_dice, lambda_ce=w_ce, **options)
    expected = monai(theirs, truth[:, None])
    loss.backward()
    expected.backward()
    # MONAI's one-hot labels are float32, whence not the last digits
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-10)


VARIANTS = {  # ours -> MONAI's, the first of them nnFormer's
    "nnformer": ({"batch_dice": True, "background": False}, {"batch": True, "include_background": False}),
    "batch": ({"batch_dice": True}, {"batch": True}),
    "foreground": ({"background": False}, {"include_background": False}),
    "squared": ({"squared": True}, {"squared_pred": True}),
    "all": (
        {"batch_dice": True, "background": False, "squared": True},
        {"batch": True, "include_background": False, "squared_pred": True},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_dice_are_monais(variant: str) -> None:
    from monai.losses import DiceCELoss

    options, monais = VARIANTS[variant]
    generator = torch.Generator().manual_seed(4)
    truth = torch.randint(0, K, (3, *SIZE), generator=generator)
    truth[0][truth[0] == 2] = 1  # a class that one crop lacks
    ours = (torch.randn(3, K, *SIZE, generator=generator, dtype=torch.float64) * 3).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    dice_B, ce_B = dice_and_ce(ours, truth.to(torch.uint8), cfg=Losses(**options))
    assert dice_B.shape == ce_B.shape == (3,)
    loss = (dice_B + ce_B).mean()
    monai = DiceCELoss(to_onehot_y=True, softmax=True, smooth_nr=SMOOTH, smooth_dr=SMOOTH, **monais)
    expected = monai(theirs, truth[:, None])
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-10)
    plain_B, _ = dice_and_ce(ours.detach(), truth.to(torch.uint8))
    assert abs(plain_B.mean().item() - dice_B.mean().item()) > 1e-3


@pytest.mark.parametrize("squared", [False, True])
def test_gradients_where_voxels_are_ignored(squared: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    truth = torch.randint(0, 3, (2, 2, 3, 2), generator=generator)
    truth[0, 0] = IGNORE
    logits = torch.randn(2, 3, 2, 3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    cfg = Losses(squared=squared, background=False, batch_dice=True)
    assert torch.autograd.gradcheck(lambda x: torch.stack(dice_and_ce(x, truth, True, cfg)), logits)


def test_the_variants_reach_the_loss_and_leave_ids_as_they_were() -> None:
    batch = batch_of()
    losses = {
        key: supervised(**options).eval()(batch, 0.5)[0].item()
        for key, options in {"plain": {}, **{k: v[0] for k, v in VARIANTS.items()}}.items()
    }
    assert len(set(losses.values())) == len(losses)
    assert not {"batch_dice", "background", "squared"} & config.to_dict(Config()).keys()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_the_module_weighs_the_terms(weights: tuple[float, float]) -> None:
    module = supervised(w_dice=weights[0], w_ce=weights[1]).eval()
    loss, metrics = module(batch_of(), 0.5)
    expected = weights[0] * value(metrics["dice_loss"]) + weights[1] * value(metrics["ce"])
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert value(metrics["loss"]) == pytest.approx(loss.item())


def test_confident_logits_stay_finite_and_right() -> None:
    truth = torch.randint(K, (1, *SIZE), generator=torch.Generator().manual_seed(0))
    right = torch.nn.functional.one_hot(truth, K).movedim(-1, 1) * 1e4
    for logits, dice, ce in [(right, 0.0, 0.0), (-right, 1.0, 1e4)]:
        logits = logits.float().requires_grad_()
        dice_B, ce_B = dice_and_ce(logits, truth)
        (dice_B + ce_B).sum().backward()
        assert dice_B.item() == pytest.approx(dice, abs=1e-4)
        assert ce_B.item() == pytest.approx(ce, rel=1e-3, abs=1e-4)
        assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


def test_half_precision_logits_are_summed_in_float32() -> None:
    # 30,000 background voxels: float16 overflows at 65,504 and bfloat16 stops counting at 256
    logits = torch.zeros(1, 2, 40, 40, 40)
    logits[:, 1] = -6.0
    truth = torch.zeros(1, 40, 40, 40, dtype=torch.uint8)
    expected = dice_and_ce(logits, truth)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            for ours, theirs in zip(dice_and_ce(logits.to(dtype), truth), expected):
                assert ours.dtype == torch.float32
                torch.testing.assert_close(ours, theirs)


def kept_bytes(loss: Any, *inputs: Tensor) -> int:
    """What autograd keeps for the backward pass, each storage once, the inputs aside."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = loss(*inputs)
    for tensor in inputs:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del out
    return sum(kept.values())


def test_less_is_kept_for_the_backward_pass_than_with_one_hot_labels() -> None:
    from monai.losses import DiceCELoss

    logits = torch.randn(1, 8, 16, 16, 16).requires_grad_()
    truth = torch.randint(8, (1, 16, 16, 16), dtype=torch.uint8)
    ours = kept_bytes(lambda a, b: sum(part.mean() for part in dice_and_ce(a, b)), logits, truth)
    monai = DiceCELoss(to_onehot_y=True, softmax=True)
    theirs = kept_bytes(lambda a, b: monai(a, b[:, None].long()), logits, truth)
    size = 4 * logits.numel()
    assert ours < 1.3 * size  # log p, and the labels as indices
    assert ours < 0.5 * theirs


# --------------------------------------------------------------------------- deep supervision, aux


def test_deep_supervision_is_monais() -> None:
    from monai.losses import DeepSupervisionLoss, DiceCELoss

    net = Net(num_deep=2)
    module, batch = supervised(net).eval(), batch_of()
    loss, _ = module(batch, 0.0)
    with torch.no_grad():
        out = net.decode(batch["image"], net.encode(batch["image"]))
    assert [tuple(d.shape[2:]) for d in out.deep] == [(4, 4, 3), (2, 2, 3)]
    one = DiceCELoss(to_onehot_y=True, softmax=True, smooth_nr=SMOOTH, smooth_dr=SMOOTH)
    expected = DeepSupervisionLoss(one, weights=[4 / 7, 2 / 7, 1 / 7])(
        [out.logits, *out.deep], batch["labels"][:, None].float()
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.deep_heads.parameters())


@pytest.mark.parametrize(
    ("num_outputs", "expected"), [(1, [1]), (2, [2 / 3, 1 / 3]), (4, [8 / 15, 4 / 15, 2 / 15, 1 / 15])]
)
def test_deep_weights_halve_and_sum_to_one(num_outputs: int, expected: list[float]) -> None:
    assert deep_weights(num_outputs) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_shrink_to_labels(dtype: torch.dtype) -> None:
    labels = torch.randint(250, (2, 8, 6, 4)).to(dtype)
    small = nearest(labels, torch.zeros(2, 3, 4, 3, 4))
    assert small.dtype == dtype
    assert torch.equal(small, labels[:, 1::2, 1::2])
    assert nearest(labels, torch.zeros(2, 3, 8, 6, 4)) is labels


def test_the_networks_own_loss_is_added() -> None:
    net = Net()
    module, batch = supervised(net).eval(), batch_of()
    plain, _ = module(batch, 0.0)
    net.aux = True
    loss, metrics = module(batch, 0.0)
    assert value(metrics["aux_loss"]) > 0
    assert loss.item() == pytest.approx(plain.item() + value(metrics["aux_loss"]), rel=1e-6)


# ------------------------------------------------------------------------------------ frozen encoder


def encoder_bits(net: Any) -> dict[str, Tensor]:
    prefixes = tuple(prefix.rstrip(".") + "." for prefix in net.encoder_prefixes)
    return {k: v.clone() for k, v in net.state_dict().items() if k.startswith(prefixes)}


def steps(module: Supervised, batch: dict[str, Tensor], num_steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad], lr=1e-2, weight_decay=1e-2
    )
    losses = []
    for step in range(num_steps):
        loss, _ = module(batch, step / num_steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "name",
    # By default one with batch norms and dropped paths each.
    [pytest.param(n, marks=() if n in ("unet", "nnformer") else pytest.mark.slow) for n in networks.names()],
)
def test_a_frozen_encoder_keeps_every_bit(name: str) -> None:
    torch.manual_seed(0)
    net: Any = networks.build(name, 1, 3, **networks.tiny(name))
    module = methods.build("supervised", net, data_spec((32, 32, 32), 3), encoder="frozen")
    labels = torch.randint(3, (2, 32, 32, 32), dtype=torch.uint8)
    before, rest = encoder_bits(net), copy.deepcopy(net.state_dict())
    steps(module, {"image": torch.rand(2, 1, 32, 32, 32), "labels": labels}, num_steps=2)  # type: ignore[arg-type]
    after = net.state_dict()
    assert before
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    outside = [key for key, _ in net.named_parameters() if key not in before]
    # A bias before a normalisation gets a gradient of 0 but for rounding, so it need not move.
    assert all(not torch.equal(after[key], rest[key]) for key in outside if after[key].ndim > 1)
    trained = [key for key, p in net.named_parameters() if p.requires_grad]
    assert trained == outside
    assert all(dict(net.named_parameters())[key].grad is not None for key in outside)


def test_training_moves_the_encoder_that_is_not_frozen() -> None:
    module = supervised()
    before = encoder_bits(module.backbone)
    steps(module, batch_of())
    after = encoder_bits(module.backbone)
    assert [key for key in before if torch.equal(before[key], after[key])] == []


def test_a_frozen_encoder_is_in_eval_mode_whatever_is_asked_of_the_module() -> None:
    module = supervised(encoder="frozen")
    modes = {}
    for mode in (None, True, False, True):
        if mode is not None:
            assert module.train(mode) is module
        modes = {name: part.training for name, part in module.backbone.named_modules() if name}
        encoder = {name for name in modes if name.split(".")[0] in ("fine", "coarse")}
        assert not any(modes[name] for name in encoder)
        assert all(modes[name] is (mode is not False) for name in modes.keys() - encoder)
    assert modes["join.1"]
    assert supervised(encoder="train").backbone.fine.training


# ------------------------------------------------------------------------------- metrics and samples


def test_metrics_are_hard_dice() -> None:
    module, batch = supervised().eval(), batch_of(3)
    batch["labels"][0][batch["labels"][0] == 2] = 0
    _, metrics = module(batch, 0.0)
    with torch.no_grad():
        guess = module.backbone.decode(batch["image"], module.backbone.encode(batch["image"])).logits.argmax(
            1
        )
    both, sizes, dice = np.zeros(K - 1), np.zeros(K - 1), []
    for b in range(3):
        for k in range(1, K):
            p, t = (guess[b] == k).numpy(), (batch["labels"][b] == k).numpy()
            both[k - 1] += 2 * (p & t).sum()
            sizes[k - 1] += p.sum() + t.sum()
            if p.any() or t.any():
                dice.append(2 * (p & t).sum() / (p.sum() + t.sum()))
    np.testing.assert_array_equal(metrics["train_dice_per_class"].numpy(), [both, sizes])
    assert metrics["train_dice"].tolist() == pytest.approx([sum(dice), len(dice)])


@pytest.mark.parametrize("kind", ["none", "float", "bool"])
def test_sums_per_class_are_the_same_by_comparison_as_on_cuda(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    labels_BV = torch.randint(0, K, (2, 1000), generator=generator)
    values_BV = torch.rand(2, 1000, generator=generator)
    values_BV = {"none": torch.ones(2, 1000), "float": values_BV, "bool": values_BV > 0.5}[kind]
    sums_BK = by_comparison(values_BV, labels_BV, K + 1)
    assert sums_BK.dtype == torch.float64
    expected = per_class(None if kind == "none" else values_BV, labels_BV, K + 1)
    torch.testing.assert_close(sums_BK, expected, rtol=1e-14, atol=0)
    assert (sums_BK[:, :K] > 0).all()
    assert (sums_BK[:, K] == 0).all()


class Always(nn.Module):
    """A backbone that answers one class everywhere."""

    encoder_prefixes, head_prefixes = ("scale",), ("scale",)

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.scale, self.answer = nn.Parameter(torch.ones(1)), answer

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        return [x_BCXYZ]

    def decode(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> SegOut:
        logits = torch.zeros(len(x_BCXYZ), K, *x_BCXYZ.shape[2:])
        logits[:, self.answer] = 1
        return SegOut(logits * self.scale, [], None)


def test_a_class_that_is_neither_there_nor_found_counts_nothing() -> None:
    batch = batch_of(num_classes=1)
    _, metrics = supervised(Always(0))(batch, 0.0)
    assert metrics["train_dice_per_class"].tolist() == [[0] * 3, [0] * 3]
    assert metrics["train_dice"].tolist() == [0, 0]
    _, metrics = supervised(Always(2))(batch, 0.0)
    num_voxels = 2 * math.prod(SIZE)
    assert metrics["train_dice_per_class"].tolist() == [[0] * 3, [0, num_voxels, 0]]
    assert metrics["train_dice"].tolist() == [0, 2]


@pytest.mark.parametrize("encoder", ["train", "frozen"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["background only", "one class only", "constant image"])
def test_poor_crops_stay_finite(kind: str, autocast: bool, encoder: str) -> None:
    module, batch = supervised(encoder=encoder), batch_of()
    if kind == "constant image":
        batch["image"][:] = 0.5
    else:
        batch["labels"][:] = 0 if kind == "background only" else 3
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, metrics = module(batch, 0.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(metric).all() for metric in metrics.values())
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)
    assert all(torch.isfinite(b).all() for b in module.buffers())


def test_two_crops_are_learnt() -> None:
    module, batch = supervised(), batch_of()
    batch["labels"] = (batch["image"][:, 0] * K).to(torch.uint8)  # bands of intensity
    losses = steps(module, batch, 60)
    assert losses[-1] < 0.6 * losses[0], losses


# ------------------------------------------------------------------------------------------ samples


def sample(in_channels: int = 1) -> dict[str, np.ndarray]:
    generator = seeding.rng(0, "supervised")
    return {
        "image_CXYZ": generator.integers(0, 65536, (in_channels, *SIZE)).astype(np.uint16),
        "labels_XYZ": generator.integers(0, K, SIZE).astype(np.uint8),
    }


@pytest.mark.parametrize("in_channels", [1, 2])
def test_an_undistorted_crop_is_its_intensities(in_channels: int) -> None:
    cfg, raw = methods.config("supervised", NONE), sample(in_channels)
    ready = methods.prepare("supervised")(raw, cfg, seeding.rng(0))
    assert (ready["image"].dtype, ready["labels"].dtype) == (np.float32, np.uint8)
    np.testing.assert_allclose(ready["image"], raw["image_CXYZ"] / 65535, rtol=1e-6)
    np.testing.assert_array_equal(ready["labels"], raw["labels_XYZ"])


def test_labels_follow_the_image() -> None:
    raw = sample()
    raw["labels_XYZ"] = (raw["image_CXYZ"][0] // 16384).astype(np.uint8)
    options = {**config.to_dict(augment.none()), "flip_prob": 0.5, "rotate90_prob": 1.0}
    cfg = methods.config("supervised", {"augment": options})
    distorted = 0
    for i in range(8):
        ready = methods.prepare("supervised")(raw, cfg, seeding.rng(0, i))
        np.testing.assert_array_equal(ready["labels"], (ready["image"][0] * 65535 // 16384).astype(np.uint8))
        distorted += not np.array_equal(ready["labels"], raw["labels_XYZ"])
    assert distorted == 8


def test_a_config_file_may_change_one_distortion() -> None:
    cfg = methods.config("supervised", {"augment": {"flip_axes": [1, 2]}, "w_dice": 2})
    assert cfg == Config(w_dice=2.0, augment=augment.Config(flip_axes=(1, 2)))
    with pytest.raises(UserError, match=r"augment\.flip_axis.*did you mean 'method\.augment\.flip_axes'"):
        methods.config("supervised", {"augment": {"flip_axis": [1]}})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 0}, "declares 0 classes.*import labelled scans"),
        ({"num_classes": 1}, "declares 1 classes"),
        ({"w_dice": 0.0, "w_ce": 0.0}, "w_dice and method.w_ce are all 0"),
        ({"w_ce": -1.0}, "w_ce is -1.0"),
        ({"encoder": "half"}, r"method\.encoder"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        methods.build("supervised", Net(), data_spec(), **options)
