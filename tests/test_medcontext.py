"""MedContext against slow loops from the paper's equations, and what it promises of masks, student and teacher.

Shapes: B samples, C input channels, K classes, X Y Z the crop's axes, x y z tokens, E columns of a token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_supervised import slow_dice_and_ce
from torch import Tensor, nn

from logonet import methods, networks
from logonet.core import config, seeding
from logonet.core.errors import UserError
from logonet.data import augment
from logonet.methods import medcontext
from logonet.methods._selfsup import follow, momentum
from logonet.methods.medcontext import Config, MedContext, consistency
from logonet.networks import SegOut
from logonet.training import checkpoints

SIZE = (16, 8, 6)
K = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """A backbone without tokens, with batch norm, dropout and, if wanted, a deep output and a loss of its own."""

    channels, strides, feature_channels = (4, 8), ((1, 1, 1), (2, 2, 2)), 6
    encoder_prefixes, head_prefixes = ("fine.", "coarse."), ("classify.", "deep.")

    def __init__(self, dropout: float = 0.0, deep: bool = False, aux: bool = False) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.GELU(), nn.Dropout(dropout)
        )
        self.coarse = nn.Sequential(nn.Conv3d(4, 8, 2, stride=2), nn.BatchNorm3d(8), nn.GELU())
        self.join = nn.Conv3d(13, 6, 1)
        self.classify = nn.Conv3d(6, K, 1)
        self.deep = nn.Conv3d(8, K, 1) if deep else None
        self.aux = aux
        self.encoded: list[bool] = []  # of each call whether gradients are wanted

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        self.encoded.append(torch.is_grad_enabled())
        fine = self.fine(x_BCXYZ)
        return [fine, self.coarse(fine)]

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        up = F.interpolate(feats[1], size=x_BCXYZ.shape[2:])
        # The crop itself, as UNETR's first skip takes it.
        return self.join(torch.cat([F.interpolate(feats[0], size=x_BCXYZ.shape[2:]), up, x_BCXYZ], dim=1))

    def decode(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> SegOut:
        deep = [] if self.deep is None else [self.deep(feats[1])]
        aux = feats[0].square().mean() if self.aux else None
        return SegOut(self.classify(self.decode_features(x_BCXYZ, feats)), deep, aux)


class Tokens(Net):
    """A backbone with tokens of 4 x 2 x 3 voxels that have a position."""

    embed_stride, embed_channels = (4, 2, 3), 4

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv3d(1, 4, self.embed_stride, stride=self.embed_stride)
        self.coarse = nn.Conv3d(4, 8, 2, stride=2)
        self.position = nn.Parameter(0.1 * torch.randn(4, *(n // s for n, s in zip(SIZE, self.embed_stride))))
        self.encoder_prefixes = ("fine.", "coarse.", "position")
        self.hidden: Tensor | None = None

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        tokens = self.fine(x_BCXYZ) + self.position
        return [tokens, self.coarse(F.gelu(tokens))]

    def encode_hidden(self, x_BCXYZ: Tensor, hidden_Bxyz: Tensor, token_E: Tensor) -> list[Tensor]:
        self.hidden = hidden_Bxyz
        tokens = torch.where(hidden_Bxyz[:, None], token_E[:, None, None, None], self.fine(x_BCXYZ))
        tokens = tokens + self.position
        return [tokens, self.coarse(F.gelu(tokens))]


def data_spec(size_vox: tuple[int, int, int] = SIZE, num_classes: int = K) -> methods.DataSpec:
    return methods.DataSpec(size_vox, num_classes=num_classes)


def medcontext_of(net: nn.Module | None = None, **options: Any) -> MedContext:
    torch.manual_seed(0)
    module = methods.build("medcontext", net or Net(), data_spec(), **{"unit_vox": 4, **options})
    assert isinstance(module, MedContext)
    return module


def sample(index: int = 0, size_vox: tuple[int, int, int] = SIZE) -> dict[str, np.ndarray]:
    generator = seeding.rng(0, "medcontext", index)
    image = generator.integers(0, 65536, (1, *size_vox)).astype(np.uint16)
    return {
        "image_CXYZ": image,
        "labels_XYZ": generator.integers(0, K, size_vox).astype(np.uint8),
    }


def batch_of(cfg: Config, num_samples: int = 2) -> dict[str, Tensor]:
    ready = [medcontext.prepare(sample(i), cfg, seeding.rng(0, i)) for i in range(num_samples)]
    return {key: torch.from_numpy(np.stack([r[key] for r in ready])) for key in ready[0]}


def differ(module: MedContext, seed: int = 1) -> None:
    """Let the teacher be another network than the student."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.teacher.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


# ------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize(
    ("size_vox", "unit_vox", "mask_ratio", "hidden"),
    [
        ((96, 96, 96), 16, 0.4, 14),  # UNETR: 14 columns of 6 tokens, 84 of 216
        ((96, 96, 96), 16, 0.6, 21),
        ((128, 128, 64), 4, 0.4, 409),  # nnFormer
        ((160, 160, 14), 4, 0.4, 640),  # ACDC
        ((40, 40, 8), 4, 0.29, 29),  # 0.29 * 100 is below 29 in floating point
    ],
)
def test_the_papers_counts(
    size_vox: tuple[int, int, int], unit_vox: int, mask_ratio: float, hidden: int
) -> None:
    cfg = methods.config("medcontext", {"unit_vox": unit_vox, "mask_ratio": mask_ratio})
    methods.check("medcontext", cfg, data_spec(size_vox))
    flat = {
        "image_CXYZ": np.zeros((1, *size_vox), np.uint16),
        "labels_XYZ": np.zeros(size_vox, np.uint8),
    }
    first, second = (medcontext.prepare(flat, cfg, seeding.rng(i))["hidden"] for i in range(2))
    assert first.sum() == second.sum() == hidden
    assert not np.array_equal(first, second)
    assert first.shape == (size_vox[0] // unit_vox, size_vox[1] // unit_vox)


def test_84_of_unetrs_216_tokens_are_hidden() -> None:
    module = methods.build("medcontext", Net(), data_spec((96, 96, 96)))
    flat = {
        "image_CXYZ": np.zeros((1, 96, 96, 96), np.uint16),
        "labels_XYZ": np.zeros((96, 96, 96), np.uint8),
    }
    ready = medcontext.prepare(flat, module.cfg, seeding.rng(0))
    batch = {key: torch.from_numpy(array)[None] for key, array in ready.items()}
    tokens = module.voxels(batch)[:, ::16, ::16, ::16]
    assert (tokens.numel(), tokens.sum()) == (216, 84)


def test_what_is_hidden_is_a_tube_along_the_slices() -> None:
    module = medcontext_of()
    batch = batch_of(module.cfg)
    hidden_BXYZ = module.voxels(batch)
    assert hidden_BXYZ.shape == batch["labels"].shape
    for b, x, y, z in np.ndindex(*hidden_BXYZ.shape):
        assert hidden_BXYZ[b, x, y, z] == batch["hidden"][b, x // 4, y // 4]


def test_all_units_are_hidden_alike_often() -> None:
    cfg = Config(unit_vox=4, augment=augment.none())
    total = sum(medcontext.prepare(sample(), cfg, seeding.rng(i))["hidden"] for i in range(600))
    # 3 of the 8 units: 225 times each, give or take 5 standard deviations.
    assert abs(total - 225).max() < 5 * math.sqrt(600 * 3 / 8 * 5 / 8)


def test_crops_are_distorted_as_for_supervised() -> None:
    cfg = Config(unit_vox=4, augment=augment.Config(flip_prob=1.0, shift_intensity_prob=1.0))
    plain = methods.config("supervised", {"augment": config.to_dict(cfg.augment)})
    ready = medcontext.prepare(sample(), cfg, seeding.rng(5))
    expected = methods.prepare("supervised")(sample(), plain, seeding.rng(5))
    for key, array in expected.items():
        np.testing.assert_array_equal(ready[key], array)
    assert not np.array_equal(ready["labels"], sample()["labels_XYZ"])


@pytest.mark.parametrize("kind", [Net, Tokens])
def test_hidden_voxels_cannot_influence_the_output(kind: type[nn.Module]) -> None:
    module = medcontext_of(kind()).eval()
    batch = batch_of(module.cfg)
    assert_sealed(module, batch["image"], module.voxels(batch))


@pytest.mark.parametrize(
    "name",
    [
        "unetr",
        "pcrlv2",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("logonet", "nnformer", "swinunetr")),
    ],
)
def test_hidden_voxels_cannot_influence_a_backbones_output(name: str) -> None:
    options = networks.tiny(name)
    torch.manual_seed(0)
    net = networks.build(name, 1, K, **options)
    module = methods.build("medcontext", net, data_spec((32, 32, 32))).eval()
    assert (module.token is not None) == ("encode_hidden" in networks.abilities(name))
    hidden = torch.tensor([[True, False], [False, False]])[None]
    batch = {"hidden": hidden, "labels": torch.zeros(1, 32, 32, 32, dtype=torch.uint8)}
    assert_sealed(module, torch.rand(1, 1, 32, 32, 32), module.voxels(batch))


@torch.no_grad()
def assert_sealed(module: Any, image: Tensor, hidden_BXYZ: Tensor) -> None:
    assert hidden_BXYZ.any() and not hidden_BXYZ.all()
    noise = torch.rand_like(image)
    out = module.masked(image, hidden_BXYZ).logits
    unseen = module.masked(torch.where(hidden_BXYZ[:, None], noise, image), hidden_BXYZ).logits
    assert torch.equal(out, unseen)
    seen = module.masked(torch.where(hidden_BXYZ[:, None], image, noise), hidden_BXYZ).logits
    assert not torch.equal(out, seen)


def test_tokens_are_replaced_where_the_network_has_them() -> None:
    net = Tokens()
    module = medcontext_of(net)
    batch = batch_of(module.cfg)
    loss, _ = module(batch, 0.5)
    loss.backward()
    assert net.hidden is not None
    assert net.hidden.shape == (2, 4, 4, 2)
    for b, x, y, z in np.ndindex(*net.hidden.shape):  # a unit of 4 x 4 voxels is 1 x 2 tokens wide
        assert net.hidden[b, x, y, z] == batch["hidden"][b, x, y // 2]
    assert module.token is not None
    assert module.token.shape == (4,)
    assert (module.token.grad != 0).all()


@pytest.mark.parametrize("kind", [Net, Tokens])
def test_what_stands_for_hidden_parts_begins_at_0_and_learns_from_the_masked_pass_alone(
    kind: type[nn.Module],
) -> None:
    module = medcontext_of(kind(), beta=0.0)
    own = [p for p in (module.blank, module.token) if p is not None]
    assert all((p == 0).all() for p in own)
    batch = batch_of(module.cfg)
    whole = module.backbone.decode(batch["image"], module.backbone.encode(batch["image"]))
    assert torch.autograd.grad(whole.logits.sum(), own, allow_unused=True) == (None,) * len(own)
    masked = module.masked(batch["image"], module.voxels(batch))
    expected = torch.autograd.grad(module._supervised(masked, batch["labels"])[0].mean(), own)
    assert all((g != 0).any() for g in expected)
    module(batch, 0.5)[0].backward()
    for p, grad in zip(own, expected):
        torch.testing.assert_close(p.grad, grad)
    module.zero_grad()
    module({**batch, "hidden": torch.zeros_like(batch["hidden"])}, 0.5)[0].backward()
    assert all((p.grad == 0).all() for p in own)


# ------------------------------------------------------------------------------------------------- loss


def test_consistency_is_equation_2() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, K, 3, 2, 2, generator=generator) for _ in range(2))
    for b in range(2):
        pairs = list(zip(student[b].flatten().tolist(), teacher[b].flatten().tolist()))
        square = sum((s - t) ** 2 for s, t in pairs)
        norm2 = sum(t * t for _, t in pairs)
        assert consistency(student, teacher)[b].item() == pytest.approx(square / norm2, rel=1e-5)
        released = square / len(pairs) / math.sqrt(norm2)
        assert consistency(student, teacher, "released")[b].item() == pytest.approx(released, rel=1e-5)


def test_consistency_of_simple_cases() -> None:
    teacher = torch.randn(2, K, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    student = teacher + 0.3
    assert consistency(teacher, teacher).tolist() == [0, 0]
    assert consistency(torch.zeros_like(teacher), teacher).tolist() == [1, 1]
    for factor in (0.01, 50.0):
        torch.testing.assert_close(
            consistency(factor * student, factor * teacher), consistency(student, teacher)
        )
    assert torch.isfinite(consistency(student, torch.zeros_like(student))).all()


def test_the_released_consistency_is_next_to_nothing() -> None:
    """Its ratio to Eq. 2 is |F_t| / n: about 1 / sqrt(n), 1.4e-4 at a batch of four crops of 96^3 with 14 classes."""
    assert 1 / math.sqrt(4 * 14 * 96**3) == pytest.approx(1.4e-4, rel=0.02)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 14, 24, 24, 24, generator=generator) for _ in range(2))
    ratio = consistency(student, teacher, "released") / consistency(student, teacher)
    assert ratio.item() == pytest.approx(teacher.norm().item() / teacher.numel(), rel=1e-4)
    assert ratio.item() == pytest.approx(1 / math.sqrt(14 * 24**3), rel=0.01)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_loss_is_equation_4(mode: str) -> None:
    module = medcontext_of(w_dice=0.7, w_ce=1.3, beta=0.9, consistency=mode).eval()
    differ(module)
    batch = batch_of(module.cfg)
    loss, metrics = module(batch, 0.5)
    with torch.no_grad():
        x_BCXYZ = batch["image"]
        whole = module.backbone.decode(x_BCXYZ, module.backbone.encode(x_BCXYZ)).logits
        blanked = torch.where(module.voxels(batch)[:, None], torch.zeros(()), x_BCXYZ)
        masked = module.backbone.decode(blanked, module.backbone.encode(blanked)).logits
        target = module.teacher.decode(x_BCXYZ, module.teacher.encode(x_BCXYZ)).logits
    losses, parts = [], []
    for b in range(2):
        dice, ce = slow_dice_and_ce(whole[b], batch["labels"][b])
        masked_dice, masked_ce = slow_dice_and_ce(masked[b], batch["labels"][b])
        pairs = list(zip(masked[b].flatten().tolist(), target[b].flatten().tolist()))
        square, norm2 = sum((s - t) ** 2 for s, t in pairs), sum(t * t for _, t in pairs)
        apart = square / norm2 if mode == "paper" else square / len(pairs) / math.sqrt(norm2)
        losses.append(0.7 * (dice + masked_dice) + 1.3 * (ce + masked_ce) + 0.9 * apart)
        parts.append([dice, ce, masked_dice, masked_ce, apart])
    assert loss.item() == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert metrics["loss"].tolist() == pytest.approx([sum(losses), 2], rel=1e-5)
    names = ["dice_loss", "ce", "masked_dice_loss", "masked_ce", "consistency"]
    for name, values in zip(names, zip(*parts)):
        assert metrics[name].tolist() == pytest.approx([sum(values), 2], rel=1e-5), name
    assert metrics["masked_share"].tolist() == [2 * 3 * 4 * 4 * 6, 2 * math.prod(SIZE)]


@pytest.mark.parametrize(
    "options", [{"w_masked": 0.0}, {"beta": 0.0}, {"w_whole": 0.3, "w_masked": 2.0, "beta": 0.7}]
)
def test_each_term_has_its_weight(options: dict[str, float]) -> None:
    """The consistency alone, the masked loss alone, and any mixture."""
    module = medcontext_of(**options)
    differ(module)
    loss, metrics = module(batch_of(module.cfg), 0.5)
    mean = {name: (value[0] / value[1]).item() for name, value in metrics.items() if value.shape == (2,)}
    expected = options.get("w_whole", 1.0) * (mean["dice_loss"] + mean["ce"])
    expected += options.get("w_masked", 1.0) * (mean["masked_dice_loss"] + mean["masked_ce"])
    expected += options.get("beta", 0.5) * mean["consistency"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_the_dice_can_have_equation_3s_squares() -> None:
    plain, squared = medcontext_of().eval(), medcontext_of(squared=True).eval()
    batch = batch_of(plain.cfg)
    assert squared(batch, 0.5)[0] < plain(batch, 0.5)[0] - 1e-3  # squares of shares are smaller
    for name in ("ce", "masked_ce", "consistency"):
        assert torch.equal(squared(batch, 0.5)[1][name], plain(batch, 0.5)[1][name])


def test_regions_that_overlap_are_learnt_as_by_supervised() -> None:
    """BraTS's, in the paper's Table 3: an output and a sigmoid for each."""
    torch.manual_seed(0)
    spec = methods.DataSpec(SIZE, num_classes=K, regions=((1, 2, 3), (2, 3), (3,), (1,)))
    module = methods.build("medcontext", Net(), spec, unit_vox=4, beta=0.7).eval()
    plain = methods.build("supervised", copy.deepcopy(module.backbone), spec).eval()
    batch = batch_of(module.cfg)
    blanked = torch.where(module.voxels(batch)[:, None], torch.zeros(()), batch["image"])
    whole, masked = (plain({**batch, "image": x}, 0.5) for x in (batch["image"], blanked))
    loss, metrics = module(batch, 0.5)
    apart = (metrics["consistency"][0] / 2).item()
    assert loss.item() == pytest.approx(whole[0].item() + masked[0].item() + 0.7 * apart, rel=1e-5)
    assert torch.equal(metrics["train_dice_per_class"], whole[1]["train_dice_per_class"])
    with torch.no_grad():
        one, other = (
            net.decode(x, net.encode(x)).logits > 0
            for net, x in ((module.backbone, blanked), (module.teacher, batch["image"]))
        )
    sizes = [(a.sum() + b.sum()).item() for a, b in zip(one.flatten(0, 1), other.flatten(0, 1))]
    shared = [2 * (a & b).sum().item() for a, b in zip(one.flatten(0, 1), other.flatten(0, 1))]
    assert metrics["agreement"].tolist() == pytest.approx(
        [sum(s / n for s, n in zip(shared, sizes) if n), sum(n > 0 for n in sizes)]
    )


def test_whose_weights_are_kept(tmp_path: Path) -> None:
    student, teacher = medcontext_of(), medcontext_of(export="teacher")
    assert student.exported is student.backbone
    assert teacher.exported is teacher.teacher
    differ(teacher)
    checkpoints.save_final(str(tmp_path), teacher, teacher.exported, [])
    stored, own = load_file(tmp_path / "backbone.safetensors"), teacher.teacher.state_dict()
    assert stored.keys() == own.keys() == student.backbone.state_dict().keys()
    assert all(torch.equal(stored[name], own[name]) for name in own)
    assert any(not torch.equal(stored[name], w) for name, w in teacher.backbone.state_dict().items())


def test_deep_outputs_count_in_both_supervised_terms_and_not_in_the_consistency() -> None:
    module = medcontext_of(Net(deep=True)).eval()
    differ(module)
    batch = batch_of(module.cfg)
    loss, metrics = module(batch, 0.5)
    fine = sum(metrics[n][0] for n in ("dice_loss", "ce", "masked_dice_loss", "masked_ce")).item() / 2
    deep = 0.0
    with torch.no_grad():
        x_BCXYZ = batch["image"]
        blanked = torch.where(module.voxels(batch)[:, None], torch.zeros(()), x_BCXYZ)
        for x in (x_BCXYZ, blanked):
            out = module.backbone.decode(x, module.backbone.encode(x))
            small = batch["labels"][:, 1::2, 1::2, 1::2]
            deep += sum(sum(slow_dice_and_ce(out.deep[0][b], small[b])) for b in range(2)) / 2
    apart = metrics["consistency"][0].item() / 2
    assert loss.item() == pytest.approx(fine * 2 / 3 + deep / 3 + 0.5 * apart, rel=1e-5)


def test_a_networks_own_loss_is_added_once() -> None:
    without, with_ = medcontext_of(Net(aux=False)).eval(), medcontext_of(Net(aux=True)).eval()
    batch = batch_of(without.cfg)
    plain, (loss, metrics) = without(batch, 0.5)[0], with_(batch, 0.5)
    own = metrics["aux_loss"][0] / metrics["aux_loss"][1]
    assert own > 0
    assert loss.item() == pytest.approx(plain.item() + own.item(), rel=1e-6)


def test_a_step_takes_two_passes_of_the_student_and_one_of_the_teacher_without_gradient() -> None:
    module = medcontext_of()
    module(batch_of(module.cfg), 0.5)
    assert module.backbone.encoded == [True, True]
    assert module.teacher.encoded == [False]


def test_two_crops_are_learnt() -> None:
    module = medcontext_of(Tokens())
    batch = batch_of(module.cfg)
    batch["labels"] = (torch.arange(16) * K // 16).to(torch.uint8)[None, :, None, None].expand(2, *SIZE)
    batch["image"] = batch["labels"][:, None] / K + 0.1 * batch["image"]
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    losses, apart = [], []
    for step in range(60):
        loss, metrics = module(batch, step / 60)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.after_step(step / 60)
        losses.append(loss.item())
        apart.append((metrics["consistency"][0] / metrics["consistency"][1]).item())
    assert losses[-1] < 0.75 * losses[0], losses
    assert all(0 < a < 10 for a in apart), apart


# ---------------------------------------------------------------------------------------------- teacher


def test_the_teacher_begins_as_the_student_whatever_weights_were_loaded() -> None:
    module = medcontext_of()
    other = medcontext_of(Net())
    differ(other)
    module.backbone.load_state_dict(other.teacher.state_dict())  # as finetuning loads pretrained weights
    batch = batch_of(module.cfg)
    nothing = {**batch, "hidden": torch.zeros_like(batch["hidden"])}
    _, metrics = module(nothing, 0.0)
    assert metrics["consistency"].tolist() == [0, 2]
    for key, value in module.backbone.state_dict().items():
        if "running" not in key and "num_batches" not in key:  # the student's second pass has moved those
            assert torch.equal(module.teacher.state_dict()[key], value), key
    differ(module)
    before = copy.deepcopy(module.teacher.state_dict())
    module.eval()(nothing, 0.1)
    assert all(torch.equal(before[key], value) for key, value in module.teacher.state_dict().items())


def test_a_whole_module_comes_back_with_its_own_teacher() -> None:
    module, blank = medcontext_of(), medcontext_of()
    differ(module)
    blank.load_state_dict(module.state_dict())
    for key, value in module.teacher.state_dict().items():
        assert torch.equal(blank.teacher.state_dict()[key], value), key
        if "weight" in key:
            assert not torch.equal(blank.backbone.state_dict()[key], value), key


@pytest.mark.parametrize(("progress", "decay"), [(0.0, 0.996), (0.5, 0.998), (1.0, 1.0)])
def test_the_teacher_follows_by_equation_6(progress: float, decay: float) -> None:
    module = medcontext_of()
    differ(module)
    module.backbone.fine[1].running_mean += 3
    before = {k: v.clone() for k, v in module.teacher.named_parameters()}
    module.after_step(progress)
    assert momentum(progress, module.cfg.momentum_start, module.cfg.momentum_end) == pytest.approx(decay)
    student = dict(module.backbone.named_parameters())
    for key, value in module.teacher.named_parameters():
        torch.testing.assert_close(value, decay * before[key] + (1 - decay) * student[key])
    for key, value in module.teacher.named_buffers():
        assert torch.equal(value, dict(module.backbone.named_buffers())[key]), key


def test_the_printed_sign_would_make_the_teacher_the_students_negative() -> None:
    student, teacher = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    printed = 1.0
    with torch.no_grad():
        student.weight.fill_(1)
        teacher.weight.fill_(1)
    for _ in range(1000):
        follow(teacher, student, 0.996)
        printed = 0.996 * printed - 0.004 * student.weight.item()
    assert teacher.weight.item() == pytest.approx(1, abs=1e-4)
    assert printed == pytest.approx(-0.964, abs=1e-3)


def test_nothing_of_the_teacher_is_trained_or_kept() -> None:
    module = medcontext_of()
    loss, _ = module(batch_of(module.cfg), 0.5)
    loss.backward()
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert all(p.grad is None for p in module.teacher.parameters())
    assert all(p.grad is not None for p in module.backbone.parameters())
    assert module.backbone.state_dict().keys() == Net().state_dict().keys()


def test_the_teacher_normalises_as_the_student_and_drops_nothing() -> None:
    module = medcontext_of(Net(dropout=0.5))
    assert module.backbone.fine[3].training
    assert not module.teacher.fine[3].training
    assert module.teacher.fine[1].training
    assert not module.eval().teacher.fine[1].training
    assert module.train().teacher.fine[1].training


# ---------------------------------------------------------------------------------------------- metrics


def test_agreement_by_hand() -> None:
    module = medcontext_of()
    batch = batch_of(module.cfg)
    module.eval()
    differ(module)
    _, metrics = module(batch, 0.5)
    with torch.no_grad():
        masked = module.masked(batch["image"], module.voxels(batch)).logits.argmax(1)
        target = module.teacher.decode(batch["image"], module.teacher.encode(batch["image"])).logits
        whole = module.backbone.decode(batch["image"], module.backbone.encode(batch["image"])).logits.argmax(
            1
        )
    alike, found = [], []
    for b in range(2):
        for k in range(K):
            for list_, p, g in [(alike, masked, target.argmax(1)), (found, whole, batch["labels"])]:
                guess, truth = p[b] == k, g[b] == k
                if (list_ is alike or k > 0) and (guess.any() or truth.any()):
                    list_.append(2 * (guess & truth).sum().item() / (guess.sum() + truth.sum()).item())
    assert metrics["agreement"].tolist() == pytest.approx([sum(alike), len(alike)])
    assert metrics["train_dice"].tolist() == pytest.approx([sum(found), len(found)])
    slow = [
        np.mean([np.var(t.numpy()) for t in target[b]]) / np.mean(np.square(target[b].numpy()))
        for b in range(2)
    ]
    assert metrics["teacher_variation"].tolist() == pytest.approx([sum(slow), 2], rel=1e-4)


def test_a_constant_teacher_is_warned_of() -> None:
    module = medcontext_of()
    batch = batch_of(module.cfg)

    def entry() -> dict[str, Any]:
        _, metrics = module(batch, 0.5)
        return {k: (v[0] / v[1]).tolist() for k, v in metrics.items() if k != "embeddings_BF"}

    assert medcontext.warning(entry()) is None
    with torch.no_grad():
        module.teacher.classify.weight.zero_()
    said = methods.warning("medcontext", entry())
    assert said is not None
    assert "the teacher gives all voxels nearly the same logits" in said
    assert medcontext.warning({}) is None


# --------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unit_vox": 16}, "unit_vox is 16, which does not divide.*16x8.*divisor of 8"),
        ({"unit_vox": 0}, "unit_vox is 0"),
        ({"unit_vox": 8, "mask_ratio": 0.4}, "mask_ratio 0.4 hides 0 of the 2 units"),
        ({"unit_vox": 4, "mask_ratio": 1.0}, "mask_ratio 1.0 hides 8 of the 8"),
        ({"unit_vox": 4, "mask_ratio": 0.0}, "mask_ratio is 0.0"),
        ({"w_dice": 0.0, "w_ce": 0.0}, "w_dice"),
        ({"w_whole": 0.0, "w_masked": 0.0}, "w_whole and method.w_masked are all 0"),
        ({"w_masked": 0.0, "beta": 0.0}, "w_masked and method.beta are all 0"),
        ({"export": "both"}, "export"),
        ({"beta": -1.0}, "beta"),
        ({"momentum_start": 1.5}, "momentum_start"),
        ({"momentum_start": 0.9, "momentum_end": 0.5}, "momentum_end"),
        ({"unit_vox": 4, "num_classes": 1}, "1 classes"),
        ({"consistency": "kl"}, "consistency"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        methods.build("medcontext", Net(), data_spec(), **options)


def test_a_unit_is_whole_tokens() -> None:
    with pytest.raises(UserError, match=r"unit_vox is 2 and a token of the network 4x2.*multiple of 4"):
        medcontext_of(Tokens(), unit_vox=2)


def test_finetuning_takes_it_by_name() -> None:
    from logonet.data.prepared_scans import CropSampling
    from logonet.pipelines import finetuning

    cfg = finetuning.Finetuning(
        crops=CropSampling(size_vox=(32, 32, 32)),
        backbone={"name": "logonet", **networks.tiny("logonet")},
        method={"name": "medcontext", "beta": 0.4},
    )
    method = finetuning.resolve_finetuning(cfg).method
    assert (method.name, method.config.beta, method.config.mask_ratio) == ("medcontext", 0.4, 0.4)
