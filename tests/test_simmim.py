"""simmim against slow loops, and its masks, heads and parameter counts.

Letters: B samples, C input channels, E a token's width, XYZ the crop's axes, uvw its units'.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import losses_of
from torch import Tensor

from logonet import methods, networks
from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.methods._masked import depth_to_space, enlarged, masked_error, space_to_depth
from logonet.methods.simmim import SimMIM

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (32, 32, 32)


def module_on(
    backbone: str, size_vox: tuple[int, int, int] = SIZE, in_channels: int = 1, **options: Any
) -> SimMIM:
    torch.manual_seed(0)
    net_options = networks.tiny(backbone)
    if "img_size" in net_options:
        net_options["img_size"] = size_vox
    net = networks.build(backbone, in_channels, 2, **net_options)
    module = methods.build("simmim", net, size_vox=size_vox, in_channels=in_channels, **options)
    assert isinstance(module, SimMIM)
    return module


def batch_of(images_BCXYZ: Tensor, **options: Any) -> dict[str, Tensor]:
    cfg = methods.config("simmim", options)
    ready = [
        methods.prepare("simmim")({"image_CXYZ": image.numpy()}, cfg, seeding.rng(0, "prepare", i))
        for i, image in enumerate(images_BCXYZ)
    ]
    return {key: torch.from_numpy(np.stack([r[key] for r in ready])) for key in ready[0]}


def noise(
    size_vox: tuple[int, int, int] = SIZE, in_channels: int = 1, seed: int = 0, samples: int = 2
) -> Tensor:
    shape = (samples, in_channels, *size_vox)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 65536, shape, generator=generator).to(torch.uint16)


# ------------------------------------------------------------------------------------------ pixel shuffle


def test_the_pixel_shuffle_undoes_space_to_depth() -> None:
    patch = (2, 4, 1)
    image = torch.randn(2, 3, 8, 8, 3)
    cells = space_to_depth(image, patch)
    assert cells.shape == (2, 3 * 8, 4, 2, 3)
    assert torch.equal(depth_to_space(cells, patch), image)
    assert torch.equal(space_to_depth(depth_to_space(cells, patch), patch), cells)
    for c, i, j, k in itertools.product(range(3), range(2), range(4), range(1)):
        assert torch.equal(cells[:, c * 8 + i * 4 + j + k], image[:, c, i::2, j::4, k::1])


# --------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("size_vox", "unit_vox", "share", "count"),
    [
        ((96, 96, 96), (16, 16, 16), 0.75, 162),
        ((96, 96, 96), (16, 16, 16), 0.6, 129),
        ((96, 96, 96), (32, 32, 32), 0.75, 20),
        ((32, 48, 16), (16, 16, 16), 0.5, 3),
        ((32, 32, 32), (4, 4, 4), 1.0, 512),
    ],
)
def test_just_so_many_units_are_hidden(
    size_vox: tuple[int, int, int], unit_vox: tuple[int, int, int], share: float, count: int
) -> None:
    options: dict[str, Any] = {"ratio": share, "unit_vox": unit_vox}
    module = module_on("unet", size_vox, **options)
    images = torch.zeros(20, 1, *size_vox, dtype=torch.uint16)
    hidden_Buvw = module.hidden(batch_of(images, **options)["scores"], size_vox)
    assert hidden_Buvw.shape == (20, *(s // u for s, u in zip(size_vox, unit_vox)))
    assert hidden_Buvw.flatten(1).sum(1).tolist() == [count] * 20
    often = hidden_Buvw.float().mean(0)
    assert share == 1 or (often.min() < often.max() and often.max() > 0)


def test_every_unit_is_hidden_as_often() -> None:
    module = module_on("unet", unit_vox=(16, 16, 16), ratio=0.25)
    images = torch.zeros(800, 1, *SIZE, dtype=torch.uint16)
    hidden_Buvw = module.hidden(batch_of(images)["scores"], SIZE)
    assert (hidden_Buvw.float().mean(0) - 0.25).abs().max() < 5 * (0.25 * 0.75 / 800) ** 0.5


@pytest.mark.parametrize(
    ("backbone", "size_vox", "unit_vox"),
    [
        ("unetr", SIZE, (16, 16, 16)),
        ("swinunetr", (32, 32, 64), (32, 32, 32)),
        ("nnformer", SIZE, (8, 8, 8)),
        ("pcrlv2", SIZE, (16, 16, 16)),
    ],
)
def test_units_are_the_coarsest_cells_of_networks_with_tokens(
    backbone: str, size_vox: tuple[int, int, int], unit_vox: tuple[int, int, int]
) -> None:
    module = module_on(backbone, size_vox)
    assert module.unit_vox == unit_vox
    assert module.tokens is module.on_encoder is (backbone != "pcrlv2")


def test_units_and_outputs_of_the_published_nnformer() -> None:
    with torch.device("meta"):
        net: Any = networks.build(
            "nnformer", img_size=(64, 128, 128), patch=(2, 4, 4), windows=((4, 4, 4),) * 4
        )
        module: Any = methods.build("simmim", net, size_vox=(64, 128, 128))
    assert module.unit_vox == module.stride == (16, 32, 32)
    assert module.head.out_channels == 16_384


# ------------------------------------------------------------------------------------- leaks and the loss


@pytest.mark.parametrize("head", ["encoder", "decoder"])
@pytest.mark.parametrize(
    "backbone",
    ["unetr", "pcrlv2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("swinunetr", "nnformer"))],
)
def test_what_is_hidden_has_no_influence(backbone: str, head: str) -> None:
    size_vox = (32, 32, 64) if backbone == "swinunetr" else SIZE
    module = module_on(backbone, size_vox, head=head).eval()
    with torch.no_grad():
        module.token_C.fill_(0.3)
    image, other = (noise(size_vox, seed=seed).float() / 65535 for seed in (1, 2))
    hidden_Buvw = module.hidden(batch_of(noise(size_vox))["scores"], size_vox)
    hidden_B1XYZ = enlarged(hidden_Buvw, module.unit_vox)[:, None]
    with torch.no_grad():
        feats, guess = module.predict(image, hidden_Buvw)
        feats_too, guess_too = module.predict(torch.where(hidden_B1XYZ, other, image), hidden_Buvw)
        _, guess_of_other = module.predict(other, hidden_Buvw)
    assert torch.equal(guess, guess_too)
    assert all(torch.equal(a, b) for a, b in zip(feats, feats_too, strict=True))
    assert not torch.equal(guess, guess_of_other)
    assert guess.shape == image.shape


@pytest.mark.parametrize("backbone", ["unetr", "nnformer", "pcrlv2"])
def test_a_crop_wholly_hidden_gives_the_same_whatever_it_held(backbone: str) -> None:
    module = module_on(backbone, ratio=1.0).eval()
    hidden_Buvw = module.hidden(torch.rand(2, 512), SIZE)
    assert hidden_Buvw.all()
    with torch.no_grad():
        _, guess = module.predict(noise().float(), hidden_Buvw)
    assert torch.equal(guess[0], guess[1])


@pytest.mark.parametrize("squared", [False, True])
def test_the_loss_is_a_mean_over_hidden_voxels(squared: bool) -> None:
    image, guess = torch.rand(2, 2, 4, 4, 2), torch.rand(2, 2, 4, 4, 2)
    hidden = enlarged(torch.tensor([[[[1], [0]], [[0], [1]]], [[[0], [1]], [[1], [0]]]]) > 0, (2, 2, 2))[
        :, None
    ]
    for b, loss in enumerate(masked_error(guess, image, hidden, squared)):
        total, count = 0.0, 0
        for c, i, j, k in itertools.product(range(2), range(4), range(4), range(2)):
            if hidden[b, 0, i, j, k]:
                error = abs(guess[b, c, i, j, k].item() - image[b, c, i, j, k].item())
                total += error**2 if squared else error
                count += 1
        assert count == 32
        assert loss.item() == pytest.approx(total / (count + 1e-5), rel=1e-5)


def test_l2_is_the_squared_error_and_nothing_else_changes() -> None:
    module = module_on("pcrlv2").eval()
    batch, image = batch_of(noise()), noise().float() / 65535
    hidden_Buvw = module.hidden(batch["scores"], SIZE)
    hidden_B1XYZ = enlarged(hidden_Buvw, module.unit_vox)[:, None]
    expected = (module.predict(image, hidden_Buvw)[1] - image).square()[hidden_B1XYZ].mean()
    squared = module_on("pcrlv2", loss="l2").eval()
    torch.testing.assert_close(squared(batch, 0.0)[0], expected)


@pytest.mark.parametrize("backbone", ["unetr", "pcrlv2"])
def test_voxels_in_sight_send_no_gradient(backbone: str) -> None:
    module = module_on(backbone)
    image = noise().float() / 65535
    hidden_Buvw = module.hidden(batch_of(noise())["scores"], SIZE)
    hidden_B1XYZ = enlarged(hidden_Buvw, module.unit_vox)[:, None]
    target = image.clone().requires_grad_()
    _, guess = module.predict(image, hidden_Buvw)
    masked_error(guess, target, hidden_B1XYZ).sum().backward()
    assert target.grad is not None
    assert (target.grad[~hidden_B1XYZ] == 0).all()
    assert (target.grad[hidden_B1XYZ] != 0).all()


@pytest.mark.parametrize("backbone", ["unetr", "pcrlv2"])
def test_a_constant_crop_is_rebuilt_by_the_bias(backbone: str) -> None:
    module = module_on(backbone)
    constant = torch.full((2, 1, *SIZE), 20_000).to(torch.uint16)
    with torch.no_grad():
        module.head.weight.zero_()
        assert module.head.bias is not None
        module.head.bias.fill_(20_000 / 65535)
    loss, metrics = module(batch_of(constant), 0.0)
    assert loss == 0
    assert metrics["prediction_spread"].tolist() == [0, 0]


def test_metrics() -> None:
    module = module_on("unetr")
    batch = batch_of(noise())
    loss, metrics = module(batch, 0.0)
    assert metrics["loss"][0] / metrics["loss"][1] == pytest.approx(loss.item())
    assert metrics["masked_share"].tolist() == [12, 16]
    hidden_Buvw = module.hidden(batch["scores"], SIZE)
    _, guess = module.predict(batch["image"].float() / 65535, hidden_Buvw)
    hidden_B1XYZ = enlarged(hidden_Buvw, (16, 16, 16))[:, None]
    variance = [
        sum(x[b][hidden_B1XYZ[b]].double().var(correction=0).item() * 6 * 4096 for b in range(2))
        for x in (guess.detach(), batch["image"].float() / 65535)
    ]
    assert metrics["prediction_spread"].tolist() == pytest.approx(variance, rel=1e-4)


def test_one_answer_to_all_is_warned_of() -> None:
    assert methods.warning("simmim", {"prediction_spread": 0.3}) is None
    assert methods.warning("simmim", {}) is None
    sentence = methods.warning("simmim", {"prediction_spread": 1e-5})
    assert sentence is not None
    assert "hardly varies" in sentence


def test_more_channels() -> None:
    module = module_on("unetr", in_channels=2)
    loss, _ = module(batch_of(noise(in_channels=2)), 0.0)
    loss.backward()
    assert (module.token_C.shape, module.head.out_channels) == ((2,), 2 * 4096)


# ------------------------------------------------------------------------------------ what trains, and sizes


def test_the_encoders_head_freezes_what_it_does_not_use() -> None:
    module = module_on("nnformer")
    trained = {k for k, p in module.named_parameters() if p.requires_grad}
    assert {"token_C", "token_E", "head.weight", "head.bias"} < trained
    assert all(k.startswith(("backbone.encoder.", "token_", "head.")) for k in trained)
    # Of the norms of the four stages the last alone stands before the last features.
    assert {k for k in trained if ".norms." in k and "embed" not in k} == {
        f"backbone.encoder.norms.3.{part}" for part in ("weight", "bias")
    }


def test_the_decoders_head_trains_all_but_the_classifier() -> None:
    module = module_on("pcrlv2")
    frozen = {k for k, p in module.named_parameters() if not p.requires_grad}
    heads = tuple(f"backbone.{prefix}" for prefix in module.backbone.head_prefixes)
    assert frozen == {k for k, _ in module.named_parameters() if k.startswith(heads)} != set()


def test_parameters_of_vit_b() -> None:
    """91.510 million as MONAI has them, of which 18,432 belong to norms that no output depends on and ours lacks;
    and the value that stands in for hidden voxels."""
    with torch.device("meta"):
        module: Any = methods.build("simmim", networks.build("unetr"), size_vox=(96, 96, 96))
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == 91_509_760 - 18_432 + 1


def test_overfits_two_crops() -> None:
    module = module_on("unetr")
    batch = batch_of(noise())
    losses = losses_of(module, batch, lr=3e-3)
    assert losses[1] < losses[0]
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize(
    ("backbone", "size_vox", "options", "words"),
    [
        ("unet", SIZE, {"ratio": 0.0}, r"method\.ratio is 0\.0"),
        ("unet", SIZE, {"ratio": 1.1}, r"method\.ratio is 1\.1"),
        (
            "unet",
            (32, 32, 24),
            {},
            r"units of \(16, 16, 16\) voxels, which do not divide crops of \(32, 32, 24\)",
        ),
        ("unet", SIZE, {"unit_vox": (12, 16, 16)}, "do not divide"),
        ("unet", SIZE, {"unit_vox": (0, 16, 16)}, "unit_vox"),
        ("unet", SIZE, {"unit_vox": (2, 4, 4)}, "64 voxels or more"),
        ("unet", SIZE, {"unit_vox": (32, 32, 32)}, "less than one; use larger crops"),
        ("swinunetr", SIZE, {}, r"1 units of \(32, 32, 32\) voxels, which is less than one"),
        ("unetr", SIZE, {"unit_vox": (8, 16, 16)}, r"one coarsest cell of UNETR sees \(16, 16, 16\)"),
        ("unet", SIZE, {"head": "middle"}, "head"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    backbone: str, size_vox: tuple[int, int, int], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        module_on(backbone, size_vox, **options)
