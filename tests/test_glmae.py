"""glmae: views, what student and teacher see of them, each loss against slow loops, and the teacher.

Letters: B samples, C input channels, W views, N patches, V those that are seen, K the projection's width, XYZ a
view's axes.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from logonet import methods, networks
from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.data import augment
from logonet.methods._masked import patches, unseen
from logonet.methods.glmae import GLMAE, Config, consistency, num_visible, trimmed, view

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (32, 32, 32)
SMALL: dict[str, Any] = {
    "num_local": 3,
    "global_vox": (48, 32, 32),
    "local_vox": (32, 32, 32),
    "decoder_width": 24,
    "decoder_depth": 2,
    "decoder_heads": 2,
    "projection_hidden": 16,
    "projection": 10,
}
PARTS = ("w_local", "w_global", "w_gg", "w_gl")


def only(*parts: str) -> dict[str, Any]:
    return {part: 1.0 if part in parts else 0.0 for part in PARTS}


def module_for(in_channels: int = 1, size_vox: tuple[int, int, int] = SIZE, **options: Any) -> GLMAE:
    torch.manual_seed(0)
    net = networks.build("unetr", in_channels, 2, **networks.tiny("unetr"), positions="sincos", qkv_bias=True)
    module = methods.build("glmae", net, size_vox=size_vox, in_channels=in_channels, **{**SMALL, **options})
    assert isinstance(module, GLMAE)
    return module


def noise(samples: int = 2, in_channels: int = 1, size_vox: tuple[int, int, int] = SIZE) -> np.ndarray:
    return seeding.rng(0, "noise").integers(0, 65536, (samples, in_channels, *size_vox)).astype(np.uint16)


def batch_for(module: GLMAE, images_BCXYZ: np.ndarray | None = None) -> dict[str, Tensor]:
    images = noise() if images_BCXYZ is None else images_BCXYZ
    prepare = methods.prepare("glmae")
    ready = [prepare({"image_CXYZ": x}, module.cfg, seeding.rng(0, "p", i)) for i, x in enumerate(images)]
    return {key: torch.from_numpy(np.stack([r[key] for r in ready])) for key in ready[0]}


# --------------------------------------------------------------------------------------------------- views


def test_views_at_the_papers_size() -> None:
    cfg = methods.config("glmae")
    out = methods.prepare("glmae")({"image_CXYZ": noise(1, 1, (96, 96, 96))[0]}, cfg, seeding.rng(0, "p"))
    assert {k: (v.shape, v.dtype) for k, v in out.items()} == {
        "global": ((2, 1, 160, 160, 160), np.dtype(np.uint16)),
        "local": ((8, 1, 96, 96, 96), np.dtype(np.uint16)),
        "keep_global": ((2, 400), np.dtype(np.int64)),
        "keep_local": ((8, 86), np.dtype(np.int64)),
    }
    for keep in (out["keep_global"], out["keep_local"]):
        assert len(set(map(tuple, keep.tolist()))) == len(keep)  # independent masks
        for keep_V in keep.tolist():
            assert sorted(set(keep_V)) == keep_V
    assert out["keep_global"].max() < 1000
    assert out["keep_local"].max() < 216


@pytest.mark.parametrize(
    ("size_vox", "whole", "half"),
    [
        ((96, 96, 96), (160, 160, 160), (96, 96, 96)),
        ((128, 128, 100), (160, 160, 160), (96, 96, 96)),
        ((64, 64, 64), (64, 64, 64), (32, 32, 32)),
        ((90, 40, 32), (96, 32, 32), (48, 32, 32)),
        ((32, 32, 16), (32, 32, 16), (32, 32, 16)),
    ],
)
def test_views_of_small_crops_are_smaller(
    size_vox: tuple[int, int, int], whole: tuple[int, int, int], half: tuple[int, int, int]
) -> None:
    assert Config().sizes(size_vox) == {"global": whole, "local": half}
    own = Config(global_vox=(48, 48, 48), local_vox=(16, 32, 32))
    assert own.sizes(size_vox) == {"global": (48, 48, 48), "local": (16, 32, 32)}


def test_counts_of_visible_patches() -> None:
    assert (num_visible(216, 0.6), num_visible(1000, 0.6), num_visible(8, 0.0), num_visible(10, 0.9)) == (
        86,
        400,
        8,
        1,
    )


def test_a_view_is_a_resized_box() -> None:
    image = noise(1, 2, (20, 30, 24))[0]
    out = view(image, (16, 16, 32), (0.5, 0.5), augment.none(), seeding.rng(3, "v"))
    rng = seeding.rng(3, "v")
    assert rng.uniform(0.5, 0.5) == 0.5
    first = [int(rng.integers(side - side // 2 + 1)) for side in (20, 30, 24)]
    box = (
        image[:, *(slice(a, a + side // 2) for a, side in zip(first, (20, 30, 24)))].astype(np.float32)
        / 65535
    )
    expected = F.interpolate(torch.from_numpy(box)[None], (16, 16, 32), mode="trilinear", align_corners=False)
    np.testing.assert_allclose(out / 65535, expected[0].numpy(), atol=1e-5)
    assert out.dtype == np.uint16


@pytest.mark.parametrize("size_vox", [(24, 30, 20), (7, 16, 40)])
def test_views_equal_those_of_scipys_zoom(size_vox: tuple[int, int, int]) -> None:
    image, shifted = noise(1, 2, (20, 30, 24))[0], augment.Config(flip_prob=0.5, rotate90_prob=0)
    for i in range(8):
        rng = seeding.rng(i, "v")
        share, box = rng.uniform(0.3, 1.0), []
        for side in image.shape[1:]:
            first = int(rng.integers(side - round(share * side) + 1))
            box.append(slice(first, first + round(share * side)))
        part = image[:, *box].astype(np.float32) / 65535
        zoom = np.array([1, *np.array(size_vox) / part.shape[1:]])
        resized = ndimage.zoom(part, zoom, order=1, mode="nearest", grid_mode=True)
        no_labels = np.zeros(size_vox, np.uint8)
        plain, _ = augment.apply(resized, no_labels, augment.draw(shifted, size_vox, rng))
        stored = np.rint(plain.clip(0, 1) * 65535)
        out = view(image, size_vox, (0.3, 1.0), shifted, seeding.rng(i, "v"))
        assert np.abs(out - stored).max() <= 1
        assert (out != stored).mean() < 0.02  # sums that end close to a half


def test_boxes_have_sizes_of_the_whole_range_and_lie_anywhere() -> None:
    # Intensities that tell where a voxel is along X.
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint16)[None, :, None, None] * 1000, (1, 40, 40, 40))
    rng, spans, middles = seeding.rng(0, "boxes"), [], []
    for _ in range(200):
        line = view(ramp, (40, 1, 1), (0.25, 0.5), augment.none(), rng)[0, :, 0, 0].astype(float)
        spans.append((line[-1] - line[0]) / 1000 + 1)
        middles.append(line.mean() / 1000)
    assert 10 <= min(spans) < 11.5
    assert 18.5 < max(spans) <= 20
    assert min(middles) < 8 < 31 < max(middles)


def test_views_of_a_scan_that_is_smaller_than_the_crop_can_be_of_the_scan_alone() -> None:
    """Whole scans in large crops: half a scan's sides at least, wherever it lies in the padding."""
    image = np.zeros((1, 40, 36, 32), np.uint16)
    image[:, 10:30, 6:30, 11:21] = noise(1, 1, (20, 24, 10))[0] // 2 + 1
    np.testing.assert_array_equal(trimmed(image), image[:, 10:30, 6:30, 11:21])
    assert trimmed(np.zeros((2, 4, 5, 6), np.uint16)).shape == (2, 4, 5, 6)
    options = {"global_vox": (16, 16, 16), "local_vox": (16, 16, 16), "patch_vox": (8, 8, 8)}
    padded, alone = (
        methods.prepare("glmae")({"image_CXYZ": x}, Config(trim=True, **options), seeding.rng(0, "p"))
        for x in (image, trimmed(image))
    )
    assert padded.keys() == alone.keys()
    assert all(np.array_equal(padded[key], alone[key]) for key in padded)
    assert padded["global"].min() > 0
    plain = methods.prepare("glmae")({"image_CXYZ": image}, Config(**options), seeding.rng(0, "p"))
    assert plain["global"].min() == 0


def test_views_may_be_distorted() -> None:
    image, cfg = (
        noise(1)[0],
        augment.Config(flip_prob=1.0, rotate90_prob=0, shift_intensity_prob=0, scale_intensity_prob=0),
    )
    plain, flipped = (view(image, SIZE, (1.0, 1.0), c, seeding.rng(0, "v")) for c in (augment.none(), cfg))
    np.testing.assert_array_equal(plain, image)
    np.testing.assert_array_equal(flipped, image[:, ::-1, ::-1, ::-1])
    brighter = augment.Config(shift_intensity_prob=1.0, shift_intensity=0.5)
    bright = view(image, SIZE, (1.0, 1.0), brighter, seeding.rng(5, "v"))
    assert bright.min() == 0 or bright.max() == 65535  # clipped, not wrapped round


# -------------------------------------------------------------------------------------------- who sees what


def test_the_student_sees_visible_patches_and_the_teacher_all_of_global_views() -> None:
    module = module_for(ratio=0.6)
    seen: list[tuple[str, torch.Size]] = []
    for name, net in (("student", module.backbone), ("teacher", module.teacher)):
        block: Any = net.net.vit.blocks[0]
        block.register_forward_hook(lambda _, args, out, name=name: seen.append((name, args[0].shape)))
    module(batch_for(module), 0.0)
    # 12 patches of which 4 are seen, 8 of which 3; and the class token.
    assert seen == [("teacher", (4, 13, 12)), ("student", (4, 5, 12)), ("student", (6, 4, 12))]


def test_masked_patches_have_no_influence_on_the_student() -> None:
    module = module_for().eval()
    batch = batch_for(module)
    image, keep = batch["local"].float() / 65535, batch["keep_local"]
    hidden = unseen(keep.flatten(0, 1), 8).view(6, 2, 2, 2)
    hidden = hidden.repeat_interleave(16, 1).repeat_interleave(16, 2).repeat_interleave(16, 3)
    hidden = hidden.view(2, 3, 1, *SIZE)
    with torch.no_grad():
        a, b = (module.encode(x, keep) for x in (image, torch.where(hidden, 0.5, image)))
        assert torch.equal(a, b)
        assert not torch.equal(a, module.encode(torch.where(hidden, image, 0.5), keep))


def test_with_nothing_masked_student_and_teacher_agree_at_the_start() -> None:
    module = module_for(ratio=0.0, **only("w_gg", "w_gl")).eval()
    batch = batch_for(module)
    with torch.no_grad():
        taught = module.teach(batch["global"].float() / 65535)
        tokens = module.encode(batch["global"].float() / 65535, batch["keep_global"])
        assert torch.equal(module.class_token.project(tokens[:, :, 0]), taught)
    assert taught.shape == (2, 2, 10)
    assert taught.std() > 0


# -------------------------------------------------------------------------------------------------- losses


def test_consistency_is_a_mean_over_pairs() -> None:
    cfg = Config(student_temperature=0.3, teacher_temperature=0.2)
    teacher, student = torch.randn(2, 2, 5), torch.randn(2, 3, 5)
    losses = consistency(teacher, student, cfg)
    for b in range(2):
        total = 0.0
        for g, w in itertools.product(range(2), range(3)):
            p = [math.exp(v / 0.2) for v in teacher[b, g].tolist()]
            q = [math.exp(v / 0.3) for v in student[b, w].tolist()]
            total -= sum(a / sum(p) * math.log(c / sum(q)) for a, c in zip(p, q))
        assert losses[b].item() == pytest.approx(total / 6, rel=1e-5)


def test_consistency_of_a_student_that_says_nothing_and_of_one_that_agrees() -> None:
    cfg = Config(student_temperature=0.04)
    teacher = torch.randn(3, 1, 512) * 0.05
    flat = consistency(teacher, torch.zeros(3, 4, 512), cfg)
    assert flat.tolist() == pytest.approx([math.log(512)] * 3, rel=1e-5)
    assert math.log(512) == pytest.approx(6.238, abs=5e-4)
    p = (teacher[:, 0] / 0.04).softmax(1)
    entropy = torch.special.entr(p).sum(1)
    torch.testing.assert_close(consistency(teacher, teacher, cfg), entropy)
    assert (consistency(teacher, torch.randn(3, 4, 512) * 0.05, cfg) > entropy).all()


def test_consistency_stays_in_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        huge = consistency(torch.full((1, 1, 4), 3e4), torch.randn(1, 2, 4).bfloat16(), Config())
    assert huge.dtype == torch.float32
    assert torch.isfinite(huge).all()


@pytest.mark.parametrize("all_voxels", [False, True])
@pytest.mark.parametrize("kind", ["global", "local"])
def test_reconstruction_is_the_squared_error_of_masked_patches(kind: str, all_voxels: bool) -> None:
    module = module_for(all_voxels=all_voxels, **only(f"w_{kind}"))
    batch = batch_for(module)
    assert set(batch) == {kind, f"keep_{kind}"}
    loss, metrics = module(batch, 0.0)
    image, keep = batch[kind].float() / 65535, batch[f"keep_{kind}"]
    tokens = module.encode(image, keep)
    total, views, num_views = 0.0, image.shape[1], image.shape[0] * image.shape[1]
    grid = (3, 2, 2) if kind == "global" else (2, 2, 2)
    for b, w in itertools.product(range(2), range(views)):
        guess = module.decoder(tokens[b, w, None, 1:], keep[b, w, None], grid, tokens[b, w, None, :1])[0]
        errors = []
        for n, (x, y, z) in enumerate(itertools.product(*map(range, grid))):
            if all_voxels or n not in keep[b, w]:
                part = image[b, w, :, 16 * x : 16 * x + 16, 16 * y : 16 * y + 16, 16 * z : 16 * z + 16]
                errors.append((guess[n] - part.flatten()).square().mean().item())
        total += float(np.mean(errors)) / num_views
    assert loss.item() == pytest.approx(total, rel=1e-4)
    assert metrics[f"{kind}_mse"].tolist() == pytest.approx([2 * total, 2], rel=1e-4)


def test_the_loss_is_eq_11() -> None:
    weights: dict[str, Any] = {"w_local": 0.5, "w_global": 2.0, "w_gg": 3.0, "w_gl": 0.25}
    module = module_for(**weights)
    loss, metrics = module(batch_for(module), 0.0)
    value = {key: (m[0] / m[1]).item() for key, m in metrics.items() if key != "embeddings_BF"}
    expected = (
        0.5 * value["local_mse"]
        + 2 * value["global_mse"]
        + 3 * value["global_consistency"]
        + 0.25 * value["local_consistency"]
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert value["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["embeddings_BF"].shape == (2, 12)


@pytest.mark.parametrize("part", PARTS)
def test_each_loss_by_itself_trains_all_that_is_left(part: str) -> None:
    module = module_for(**only(part))
    loss, metrics = module(batch_for(module), 0.0)
    loss.backward()
    module.after_step(0.5)
    for key, parameter in module.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, key
    consistent = part in ("w_gg", "w_gl")
    assert (module.decoder is None) is consistent
    assert (module.teacher is not None) is consistent
    names = {
        "w_local": "local_mse",
        "w_global": "global_mse",
        "w_gg": "global_consistency",
        "w_gl": "local_consistency",
    }
    assert {key for key in metrics if key in names.values()} == {names[part]}
    assert any(key.startswith("class_token.project.") for key, _ in module.named_parameters()) is consistent


def test_visible_targets_send_no_gradient() -> None:
    module = module_for(**only("w_local"))
    batch = batch_for(module)
    image, keep = batch["local"].float() / 65535, batch["keep_local"]
    tokens = module.encode(image, keep)
    target = image.clone().requires_grad_()
    module._rebuild(target, tokens, keep)[0].sum().backward()
    assert target.grad is not None
    grads_MNP = patches(target.grad.flatten(0, 1), (16, 16, 16))
    hidden_MN = unseen(keep.flatten(0, 1), 8)
    assert (grads_MNP[~hidden_MN] == 0).all()
    assert (grads_MNP[hidden_MN] != 0).all()


# ------------------------------------------------------------------------------------------------- teacher


def test_the_teacher_begins_as_the_student_and_follows_it() -> None:
    module = module_for()
    pairs = [(module.teacher, module.backbone), (module.teacher_token, module.class_token)]
    for teacher, student in pairs:
        for (key, a), b in zip(teacher.named_parameters(), student.parameters(), strict=True):
            assert torch.equal(a, b), key
            assert not a.requires_grad
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for step, progress in enumerate((0.0, 0.5, 1.0)):
        before = [copy.deepcopy(teacher.state_dict()) for teacher, _ in pairs]
        loss, _ = module(batch_for(module), progress)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.after_step(progress)
        share = (0.996, 0.998, 1.0)[step]
        for (teacher, student), old in zip(pairs, before):
            for (key, a), b in zip(teacher.named_parameters(), student.parameters(), strict=True):
                torch.testing.assert_close(a, share * old[key] + (1 - share) * b)
                assert a.grad is None
                assert id(a) not in trained
    assert not torch.equal(module.teacher_token.token_11E, module.class_token.token_11E)


def test_the_teachers_running_mean() -> None:
    module = module_for()
    first, second = (batch_for(module, noise() // part) for part in (1, 2))
    rows = [module.teach(batch["global"].float() / 65535).flatten(0, 1) for batch in (first, second)]
    _, metrics = module(first, 0.0)
    assert metrics["teacher_cosine"].tolist() == [0, 4]  # nothing to compare with yet
    module(second, 0.0)  # two micro-batches of one step
    module.after_step(1.0)
    mean = 0.1 * torch.cat(rows).mean(0)
    torch.testing.assert_close(module.mean_K, mean)
    _, metrics = module(first, 0.0)
    expected = F.cosine_similarity(rows[0], mean.expand_as(rows[0])).sum().item()
    assert metrics["teacher_cosine"].tolist() == pytest.approx([expected, 4], rel=1e-5)
    module.after_step(1.0)
    torch.testing.assert_close(module.mean_K, 0.9 * mean + 0.1 * rows[0].mean(0))
    held = module.mean_K.clone()
    module.eval()
    module(second, 0.0)
    assert (module.heard_K == 0).all()
    assert torch.equal(module.mean_K, held)


def test_centring_takes_the_running_mean_off() -> None:
    plain, centred = module_for(), module_for(centre=True)
    for module in (plain, centred):
        module.mean_K.copy_(torch.linspace(-1, 1, 10))
    batch = batch_for(plain)
    taught = plain.teach(batch["global"].float() / 65535)
    assert torch.equal(plain._centred(taught), taught)
    assert torch.equal(centred._centred(taught), taught - plain.mean_K)
    one, two = (module(batch, 0.0)[1]["teacher_entropy"] for module in (plain, centred))
    for entropy, rows in ((one, taught), (two, taught - plain.mean_K)):
        p = (rows.flatten(0, 1).double() / 0.04).softmax(1)
        expected = torch.special.entr(p).sum().item() / math.log(10)
        assert entropy.tolist() == pytest.approx([expected, 4], rel=1e-4)
    assert two[0] < one[0]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"teacher_entropy": 0.001}, "all its weight to one class"),
        ({"teacher_entropy": 0.999}, "all classes the same weight"),
        ({"teacher_entropy": 0.5, "teacher_cosine": 0.99995}, "the same of all volumes"),
        ({"teacher_entropy": 0.5, "prediction_spread": 1e-6}, "hardly varies"),
        ({"prediction_spread": 1e-6}, "hardly varies"),
    ],
)
def test_collapse_is_warned_of(entry: dict[str, float], words: str) -> None:
    assert words in str(methods.warning("glmae", entry))
    healthy = {"teacher_entropy": 0.5, "teacher_cosine": 0.998, "prediction_spread": 0.2}
    assert methods.warning("glmae", healthy) is None


# --------------------------------------------------------------------------------------- sizes and settings


@pytest.mark.parametrize(
    ("variant", "encoder", "decoder", "projection"),
    [("vit_b", 88_369_920, 27_826_688, 6_820_352), ("vit_t", 6_167_232, 27_531_776, 5_640_704)],
)
def test_parameters_at_the_papers_size(variant: str, encoder: int, decoder: int, projection: int) -> None:
    """88.370, 27.827 and 6.820 million, for ViT-T 6.167, 27.532 and 5.641. The paper's tables of positions have a
    row of zeros for the class token, which ours lack."""
    with torch.device("meta"):
        net: Any = networks.build("unetr", variant=variant, positions="sincos", qkv_bias=True)
        module: Any = methods.build("glmae", net, size_vox=(96, 96, 96))
    count = {
        part: sum(p.numel() for k, p in module.named_parameters() if k.startswith(part))
        for part in ("backbone.net.vit.", "class_token.token", "decoder.", "class_token.project.")
    }
    width = net.embed_channels
    assert count["backbone.net.vit."] + count["class_token.token"] == encoder - width
    assert count["decoder."] == decoder - 512
    assert count["class_token.project."] == projection
    fixed = sum(
        p.numel()
        for k, p in module.named_parameters()
        if k.endswith("vit.patch_embedding.position_embeddings")
    )
    assert fixed == 2 * 216 * width  # the student's and the teacher's
    if variant == "vit_b":
        assert fixed // 2 + width == 166_656


def test_nothing_goes_through_encode() -> None:
    assert methods.sizes("glmae", Config(), (96, 96, 96)) == ()


def test_overfits_two_crops() -> None:
    module = module_for()
    batch = batch_for(module)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    values = []
    for _ in range(20):
        loss, metrics = module(batch, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.after_step(0.0)
        values.append({key: (m[0] / m[1]).item() for key, m in metrics.items() if key != "embeddings_BF"})
    for key in ("loss", "local_mse", "global_mse"):
        assert values[-1][key] < 0.9 * values[0][key], key


def test_positions_that_are_learnt_do_too() -> None:
    net: Any = networks.build("unetr", 2, 2, **networks.tiny("unetr"))
    module = methods.build("glmae", net, size_vox=SIZE, in_channels=2, **SMALL)
    assert isinstance(module, GLMAE)
    loss, _ = module(batch_for(module, noise(2, 2)), 0.0)
    loss.backward()
    grad = net.net.vit.patch_embedding.position_embeddings.grad
    assert grad is not None
    assert (grad != 0).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (only(), "one of them above 0"),
        ({"w_gg": -1.0}, "w_gg is -1.0"),
        ({"num_local": 0}, "num_local is 0"),
        ({"global_scale": (0.5, 1.5)}, "global_scale"),
        ({"local_scale": (0.5, 0.25)}, "local_scale"),
        ({"ratio": 1.0}, r"method\.ratio is 1\.0"),
        ({"ratio": 0.95}, "none to see"),
        ({"ratio": 0.0}, "none to rebuild"),
        ({"decoder_heads": 5}, "multiple of method.decoder_heads"),
        ({"projection": 0}, r"method\.projection is 0"),
        ({"teacher_temperature": 0.0}, "teacher_temperature"),
        ({"momentum_start": 0.9, "momentum_end": 0.8}, "momentum_start"),
        ({"patch_vox": (0, 16, 16)}, "patch_vox"),
        ({"patch_vox": (8, 16, 16)}, r"set method\.patch_vox to \(16, 16, 16\)"),
        ({"local_vox": (40, 32, 32)}, r"method\.local_vox is \(40, 32, 32\)"),
        ({"local_vox": (16, 16, 16)}, r"the 1 patches of a local view"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        module_for(**options)
