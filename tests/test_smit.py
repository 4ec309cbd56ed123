"""smit against slow loops: its losses, what is hidden, its teacher.

Shapes: B samples, M views, C input channels, XYZ a view's axes, H hidden blocks, F features, K prototypes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import losses_of
from torch import Tensor

from logonet import methods, networks
from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.methods._masked import enlarged
from logonet.methods.smit import SMIT, cross_entropy, warning

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (32, 32, 32)
SMALL = {"hidden": 16, "bottleneck": 8, "prototypes": 12}
LOSSES = ("w_rebuild", "w_patch", "w_image")


def module_on(backbone: str = "swinunetr", size_vox: tuple[int, int, int] = SIZE, **options: Any) -> SMIT:
    torch.manual_seed(0)
    net_options = networks.tiny(backbone)
    if "img_size" in net_options:
        net_options["img_size"] = size_vox
    net = networks.build(backbone, 1, 2, **net_options)
    module = methods.build("smit", net, size_vox=size_vox, **SMALL, **options)
    assert isinstance(module, SMIT)
    return module


def batch_of(size_vox: tuple[int, int, int] = SIZE, samples: int = 2, **options: Any) -> dict[str, Tensor]:
    cfg = methods.config("smit", options)
    ready = []
    for i in range(samples):
        rng = seeding.rng(0, "smit", i)
        image = rng.integers(0, 65536, (1, *size_vox)).astype(np.uint16)
        ready.append(methods.prepare("smit")({"image_CXYZ": image}, cfg, rng))
    return {key: torch.from_numpy(np.stack([r[key] for r in ready])) for key in ready[0]}


def only(loss: str) -> dict[str, float]:
    return {key: float(key == loss) for key in LOSSES}


def views_of(batch: dict[str, Tensor]) -> Tensor:
    """(2, B, C, X, Y, Z) in [0, 1]."""
    return batch["views"].float().transpose(0, 1) / 65535


# ---------------------------------------------------------------------------------------------------- losses


def test_cross_entropy_is_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    p_MRK = torch.rand(3, 4, 5, generator=generator).softmax(-1)
    cosine_MRK = torch.rand(3, 4, 5, generator=generator)
    for m, found in enumerate(cross_entropy(p_MRK, cosine_MRK, 0.1)):
        total = 0.0
        for r in range(4):
            scores = [value / 0.1 for value in cosine_MRK[m, r].tolist()]
            log_sum = math.log(sum(math.exp(score) for score in scores))
            total -= sum(p * (score - log_sum) for p, score in zip(p_MRK[m, r].tolist(), scores))
        assert found.item() == pytest.approx(total / 4, rel=1e-5)


@torch.no_grad()
def probabilities(module: SMIT, kind: str, rows_NF: Tensor, temperature: float) -> Tensor:
    cosines = module.teacher_projections[kind](rows_NF)
    return ((cosines - getattr(module, f"centre_{kind}_K")) / temperature).softmax(-1)


def moved(module: SMIT) -> SMIT:
    """In evaluation, with a teacher that differs and centres that are not 0."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (*module.teacher.parameters(), *module.teacher_projections.parameters()):
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    for kind in module.weights:
        getattr(module, f"centre_{kind}_K").copy_(torch.rand(12, generator=generator) * 0.2)
    return module.eval()


def test_hidden_blocks_are_matched_with_the_teachers_of_the_same_view() -> None:
    module, batch = moved(module_on(**only("w_patch"))), batch_of()
    loss, metrics = module(batch, 1.0)
    images, scores = views_of(batch), batch["scores"].transpose(0, 1)
    total, count = 0.0, 0
    for view in range(2):
        hidden_BH, hidden_Buvw = module.hidden(scores[view], SIZE)
        student = module.encode(images[view], hidden_Buvw)[3]
        teacher = module.teacher.encode(images[view])[3]
        for b in range(2):
            for x, y, z in hidden_Buvw[b].nonzero().tolist():
                p = probabilities(module, "patch", teacher[b, :, x, y, z], 0.07)
                log_q = (module.projections["patch"](student[b, :, x, y, z]) / 0.1).log_softmax(-1)
                total -= (p * log_q).sum().item()
                count += 1
        assert hidden_BH.shape == (2, 5)
    assert count == 2 * 2 * int(0.7 * 8)
    assert loss.item() == pytest.approx(total / count, rel=1e-4)
    assert metrics["patch_consistency"].tolist() == pytest.approx([2 * total / count, 2], rel=1e-4)


def test_a_whole_view_is_matched_with_the_teachers_of_the_other() -> None:
    module = moved(module_on(size_vox=(64, 32, 32), view_vox=SIZE, **only("w_image")))
    batch = batch_of((64, 32, 32), view_vox=SIZE)
    loss, _ = module(batch, 1.0)
    images, scores = views_of(batch), batch["scores"].transpose(0, 1)
    assert not torch.equal(images[0], images[1])
    total = 0.0
    for view in range(2):
        student = module.encode(images[view], module.hidden(scores[view], SIZE)[1])[3]
        teacher = module.teacher.encode(images[1 - view])[3]
        for b in range(2):
            p = probabilities(module, "image", teacher[b].flatten(1).mean(1), 0.07)
            log_q = (module.projections["image"](student[b].flatten(1).mean(1)) / 0.1).log_softmax(-1)
            total -= (p * log_q).sum().item()
    assert loss.item() == pytest.approx(total / 4, rel=1e-4)


def test_hidden_voxels_are_rebuilt_from_the_coarsest_cells() -> None:
    module, batch = module_on(**only("w_rebuild")).eval(), batch_of()
    loss, _ = module(batch, 0.0)
    images, scores = views_of(batch), batch["scores"].transpose(0, 1)
    errors = []
    for view in range(2):
        hidden_Buvw = module.hidden(scores[view], SIZE)[1]
        coarse = module.encode(images[view], hidden_Buvw)[4]
        guess = (F.conv3d(coarse, module.rebuild.weight, module.rebuild.bias)).reshape(2, 1, *SIZE)
        hidden_BXYZ = enlarged(hidden_Buvw, (16, 16, 16))
        errors += [(guess[b, 0] - images[view][b, 0])[hidden_BXYZ[b]].abs().mean() for b in range(2)]
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)
    assert module.teacher is None
    assert len(module.projections) == 0


def test_losses_are_weighed_and_added() -> None:
    module, batch = moved(module_on(w_rebuild=2.0, w_patch=0.5, w_image=0.25)), batch_of()
    _, metrics = module(batch, 0.5)
    parts = {
        key: metrics[key][0] / metrics[key][1] for key in ("l1", "patch_consistency", "image_consistency")
    }
    weights = dict(zip(parts, (2.0, 0.5, 0.25)))
    total = sum(weights[key] * value for key, value in parts.items())
    torch.testing.assert_close(metrics["loss"][0] / metrics["loss"][1], total)


# --------------------------------------------------------------------------------------- views and blocks


def test_what_is_hidden_has_no_influence() -> None:
    module, batch = module_on("nnformer").eval(), batch_of()
    images = views_of(batch).unbind(1)  # of two crops; views are whole crops here
    _, hidden_Buvw = module.hidden(batch["scores"][0], SIZE)
    hidden_B1XYZ = enlarged(hidden_Buvw, module.unit_vox)[:, None]
    other = torch.where(hidden_B1XYZ, images[1], images[0])
    assert not torch.equal(other, images[0])
    for a, b in zip(module.encode(images[0], hidden_Buvw), module.encode(other, hidden_Buvw)):
        assert torch.equal(a, b)


def test_views_are_parts_of_the_crop() -> None:
    image = np.arange(40 * 36 * 32, dtype=np.uint16).reshape(1, 40, 36, 32)
    cfg = methods.config("smit", {"view_vox": (32, 32, 16)})
    found = set()
    for seed in range(20):
        views = methods.prepare("smit")({"image_CXYZ": image}, cfg, seeding.rng(seed))["views"]
        for view in views:
            x, y, z = np.argwhere(image[0] == view[0, 0, 0, 0])[0]
            np.testing.assert_array_equal(view, image[:, x : x + 32, y : y + 32, z : z + 16])
            found.add((x, y, z))
    assert len(found) > 30


@pytest.mark.parametrize(
    ("size_vox", "view"),
    [((128, 128, 128), (96, 96, 96)), ((96, 64, 32), (64, 32, 32)), ((48, 24, 8), (32, 24, 8))],
)
def test_views_have_the_papers_share_of_the_crop(
    size_vox: tuple[int, int, int], view: tuple[int, int, int]
) -> None:
    assert methods.config("smit").view(size_vox) == view
    assert methods.sizes("smit", methods.config("smit"), size_vox) == (view,)


@pytest.mark.parametrize(
    ("backbone", "level", "unit"), [("swinunetr", 3, 16), ("unetr", 3, 16), ("nnformer", 3, 8)]
)
def test_a_block_has_one_token(backbone: str, level: int, unit: int) -> None:
    module = module_on(backbone)
    assert (module.level, module.unit_vox) == (level, (unit,) * 3)


def test_the_papers_network_has_the_papers_heads() -> None:
    with torch.device("meta"):
        net: Any = networks.build("swinunetr", depths=(2, 2, 4, 2), num_heads=(4, 4, 4, 4), window_size=4)
        module: Any = methods.build("smit", net, size_vox=(128, 128, 128))
    assert module.rebuild.weight.shape == (32**3, 768, 1, 1, 1)
    assert [p.shape for p in module.projections["patch"].parameters() if p.ndim == 2] == [
        (8192, 256),
        (2048, 384),
        (2048, 2048),
        (256, 2048),
    ]


# ------------------------------------------------------------------------------------------------- teacher


def test_temperatures_rise_for_views_and_then_for_blocks() -> None:
    cfg = methods.config("smit")
    for progress, image, patch in (
        (0, 0.04, 0.04),
        (0.03, 0.055, 0.04),
        (0.06, 0.07, 0.04),
        (0.09, 0.07, 0.055),
    ):
        assert cfg.temperatures(progress) == pytest.approx({"image": image, "patch": patch})
    assert cfg.temperatures(1.0) == pytest.approx({"image": 0.07, "patch": 0.07})
    still = methods.config("smit", {"temperature_warmup": 0.0})
    assert still.temperatures(0.0) == pytest.approx({"image": 0.07, "patch": 0.07})


def test_a_step_moves_the_teacher_and_its_centres() -> None:
    module = module_on(momentum_start=0.9, momentum_end=0.9)
    batches = [batch_of(), batch_of(samples=1)]
    heard: dict[str, list[Tensor]] = {"patch": [], "image": []}
    for batch in batches:
        module(batch, 0.0)
        images, scores = views_of(batch).flatten(0, 1), batch["scores"].transpose(0, 1).flatten(0, 1)
        seen = module.teacher.encode(images)[3]
        said = module._projected(module.teacher_projections, seen, module.hidden(scores, SIZE)[0])
        for kind, rows in said.items():
            heard[kind].append(rows.flatten(0, 1))
    before = {key: p.clone() for key, p in module.teacher.named_parameters()}
    with torch.no_grad():
        for p in module.backbone.parameters():
            p.add_(1.0)
    module.after_step(0.5)
    for key, p in module.teacher.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[key] + 0.1 * (before[key] + 1.0))
    for kind, rows in heard.items():
        centre = getattr(module, f"centre_{kind}_K")
        torch.testing.assert_close(centre, 0.1 * torch.cat(rows).mean(0))
        assert not getattr(module, f"heard_{kind}_K").any()
    assert not any(p.requires_grad for p in module.teacher.parameters())


def test_only_the_encoder_is_trained() -> None:
    module = module_on()
    trained = {key for key, p in module.backbone.named_parameters() if p.requires_grad}
    assert trained == {key for key, _ in module.backbone.named_parameters() if key.startswith("net.swinViT.")}


@pytest.mark.parametrize(("entropy", "warned"), [(0.005, True), (0.995, True), (0.8, False)])
def test_a_teacher_that_says_nothing_is_warned_of(entropy: float, warned: bool) -> None:
    assert (warning({"teacher_patch_entropy": entropy}) is not None) == warned
    assert (warning({"teacher_image_entropy": entropy}) is not None) == warned


def test_overfits_two_crops() -> None:
    module, batch = module_on(), batch_of()
    losses = losses_of(module, batch, lr=3e-3)
    assert losses[-1] < 0.95 * losses[0], losses


@pytest.mark.parametrize(
    ("size_vox", "options", "words"),
    [
        (SIZE, {"w_rebuild": 0.0, "w_patch": 0.0, "w_image": 0.0}, "all 0"),
        (SIZE, {"ratio": 0.1}, "less than one"),
        (SIZE, {"view_vox": (64, 32, 32)}, "use smaller views"),
        (SIZE, {"unit_vox": (12, 12, 12)}, "do not divide"),
        (SIZE, {"unit_vox": (2, 2, 2)}, "64 or more"),
        ((64, 64, 64), {"unit_vox": (4, 8, 8), "view_vox": SIZE}, "have strides of"),
        ((64, 64, 64), {"view_vox": (48, 32, 32)}, r"multiples of \(32, 32, 32\)"),
        (SIZE, {"momentum_start": 1.0, "momentum_end": 0.9}, "momentum_start"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    size_vox: tuple[int, int, int], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        module_on("swinunetr", size_vox, **options)
