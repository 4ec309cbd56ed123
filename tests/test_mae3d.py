"""mae3d: what the encoder sees, where the decoder puts it, and what the loss counts.

Letters: B samples, C input channels, N patches, V those that are seen, P numbers of a patch, XYZ the crop's axes.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import losses_of
from torch import Tensor, nn

from logonet import methods, networks
from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.methods._masked import Decoder, depth_to_space, patches, sincos, unseen
from logonet.methods.mae3d import MAE3D, masked_l1, normalised

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (32, 32, 32)
SMALL: dict[str, Any] = {"decoder_width": 24, "decoder_depth": 2, "decoder_heads": 2}


def module_for(size_vox: tuple[int, int, int] = SIZE, in_channels: int = 1, **options: Any) -> MAE3D:
    torch.manual_seed(0)
    net = networks.build("unetr", in_channels, 2, **{**networks.tiny("unetr"), "img_size": size_vox})
    module = methods.build("mae3d", net, size_vox=size_vox, in_channels=in_channels, **{**SMALL, **options})
    assert isinstance(module, MAE3D)
    return module


def batch_of(images_BCXYZ: Tensor, **options: Any) -> dict[str, Tensor]:
    cfg = methods.config("mae3d", options)
    ready = [
        methods.prepare("mae3d")({"image_CXYZ": image.numpy()}, cfg, seeding.rng(0, "prepare", i))
        for i, image in enumerate(images_BCXYZ)
    ]
    return {key: torch.from_numpy(np.stack([r[key] for r in ready])) for key in ready[0]}


def noise(size_vox: tuple[int, int, int] = SIZE, in_channels: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 65536, (2, in_channels, *size_vox), generator=generator).to(torch.uint16)


@pytest.mark.parametrize(
    ("size_vox", "share", "visible"),
    [((96, 96, 96), 0.75, 54), ((96, 96, 96), 0.6, 87), ((32, 48, 16), 0.5, 3), ((32, 32, 32), 0.75, 2)],
)
def test_just_so_many_patches_are_seen(size_vox: tuple[int, int, int], share: float, visible: int) -> None:
    keep_BV = batch_of(torch.zeros(9, 1, *size_vox, dtype=torch.uint16), ratio=share)["keep"]
    num_patches = int(np.prod(size_vox)) // 16**3
    assert keep_BV.shape == (9, visible)
    assert len(set(map(tuple, keep_BV.tolist()))) > 1
    for keep_V in keep_BV.tolist():
        assert sorted(set(keep_V)) == keep_V
        assert 0 <= keep_V[0] <= keep_V[-1] < num_patches
    assert unseen(keep_BV, num_patches).sum(1).tolist() == [int(share * num_patches)] * 9


def test_the_encoder_sees_54_tokens_and_the_decoder_216() -> None:
    module = module_for((96, 96, 96))
    seen: dict[str, torch.Size] = {}
    blocks: list[tuple[str, Any]] = [
        ("encoder", module.backbone.net.vit.blocks[0]),
        ("decoder", module.decoder.blocks[0]),
    ]
    for name, block in blocks:
        block.register_forward_hook(lambda _, args, out, name=name: seen.update({name: args[0].shape}))
    loss, metrics = module(batch_of(noise((96, 96, 96))), 0.0)
    assert torch.isfinite(loss)
    assert seen == {"encoder": (2, 54, 12), "decoder": (2, 216, 24)}
    assert metrics["masked_share"].tolist() == [2 * 162, 2 * 216]


def test_masked_patches_have_no_influence_on_what_is_rebuilt() -> None:
    module = module_for().eval()
    keep_BV = torch.tensor([[0, 5], [3, 6]])
    image, other = (noise(seed=seed).float() / 65535 for seed in (1, 2))
    hidden_Bxyz = unseen(keep_BV, 8).view(2, 2, 2, 2)
    hidden = hidden_Bxyz.repeat_interleave(16, 1).repeat_interleave(16, 2).repeat_interleave(16, 3)[:, None]
    with torch.no_grad():
        guess = module.predict(image, keep_BV)[1]
        assert torch.equal(guess, module.predict(torch.where(hidden, other, image), keep_BV)[1])
        assert not torch.equal(guess, module.predict(torch.where(hidden, image, other), keep_BV)[1])


@pytest.mark.parametrize("prefix", [False, True])
def test_the_decoder_puts_patches_back_where_they_were(prefix: bool) -> None:
    """An identity for an encoder and for a decoder restores what was seen; the mask token stands elsewhere."""
    patch, grid, width = (2, 1, 4), (2, 3, 2), 8
    image = torch.randn(2, 1, 4, 3, 8)
    cfg = SimpleNamespace(decoder_width=width, decoder_depth=0, decoder_heads=1, patch_vox=patch)
    network: Any = SimpleNamespace(embed_channels=width)
    data_spec = methods.DataSpec((4, 3, 8))
    decoder = Decoder(cfg, network, data_spec, grid)
    decoder.embed = decoder.norm = decoder.predict = nn.Identity()  # type: ignore[assignment]
    nn.init.zeros_(decoder.positions)
    keep_BV = torch.tensor([[7, 0, 11, 4], [1, 2, 3, 10]])
    all_BNP = patches(image, patch)
    seen_BVP = torch.stack([all_BNP[b, keep] for b, keep in enumerate(keep_BV)])
    out = decoder(seen_BVP, keep_BV, grid, torch.randn(2, 1, width) if prefix else None)
    rebuilt = depth_to_space(out.transpose(1, 2).unflatten(2, grid), patch)
    for b, x, y, z in itertools.product(range(2), *map(range, grid)):
        part = (b, slice(None), slice(2 * x, 2 * x + 2), slice(y, y + 1), slice(4 * z, 4 * z + 4))
        if (x * 3 + y) * 2 + z in keep_BV[b]:
            assert torch.equal(rebuilt[part], image[part])
        else:
            assert torch.equal(rebuilt[part].flatten(), decoder.mask_token)


def test_every_place_has_its_own_position() -> None:
    module = module_for()
    prefix_free = module.decoder(torch.zeros(1, 1, 12), torch.tensor([[0]]), (2, 2, 2))
    rows = prefix_free[0, 1:]  # seven mask tokens, told apart by position alone
    assert torch.pdist(rows).min() > 1e-4


def test_the_loss_is_a_mean_over_masked_patches() -> None:
    guess, target = torch.rand(2, 4, 6), torch.rand(2, 4, 6)
    hidden = torch.tensor([[True, False, True, True], [False, True, True, True]])
    for b, loss in enumerate(masked_l1(guess, target, hidden)):
        errors = [
            abs(guess[b, n, p].item() - target[b, n, p].item())
            for n, p in itertools.product(range(4), range(6))
            if hidden[b, n]
        ]
        assert loss.item() == pytest.approx(sum(errors) / 18, rel=1e-5)


def test_visible_targets_send_no_gradient() -> None:
    module = module_for()
    image, keep_BV = noise().float() / 65535, batch_of(noise())["keep"]
    target = patches(image, (16, 16, 16)).clone().requires_grad_()
    hidden_BN = unseen(keep_BV, 8)
    masked_l1(module.predict(image, keep_BV)[1], target, hidden_BN).sum().backward()
    assert target.grad is not None
    assert (target.grad[~hidden_BN] == 0).all()
    assert (target.grad[hidden_BN] != 0).all()


def test_forward_is_that_loss() -> None:
    module, batch = module_for(), batch_of(noise())
    loss, metrics = module(batch, 0.0)
    image, total, squares = batch["image"].float() / 65535, 0.0, [0.0, 0.0]
    _, guess = module.predict(image, batch["keep"])
    for b in range(2):
        hidden = [n for n in range(8) if n not in batch["keep"][b]]
        parts = []
        for n in hidden:
            x, y, z = 16 * (n // 4), 16 * (n // 2 % 2), 16 * (n % 2)
            parts.append(image[b, :, x : x + 16, y : y + 16, z : z + 16].flatten())
        target = torch.stack(parts)
        total += (guess[b, hidden] - target).abs().mean().item() / 2
        for i, values in enumerate((guess[b, hidden].detach(), target)):
            squares[i] += values.double().var(correction=0).item() * values.numel()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert metrics["loss"].tolist() == pytest.approx([2 * total, 2], rel=1e-5)
    assert metrics["prediction_spread"].tolist() == pytest.approx(squares, rel=1e-4)


def test_a_constant_crop_is_rebuilt_by_the_bias() -> None:
    module = module_for()
    with torch.no_grad():
        module.decoder.predict.weight.zero_()
        module.decoder.predict.bias.fill_(20_000 / 65535)
    loss, _ = module(batch_of(torch.full((2, 1, *SIZE), 20_000).to(torch.uint16)), 0.0)
    assert loss == 0


def test_normalised_patches() -> None:
    rows = normalised(torch.rand(2, 3, 500) * 7 + 3)
    torch.testing.assert_close(rows.mean(2), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.std(2), torch.ones(2, 3), atol=1e-4, rtol=0)
    assert (normalised(torch.full((1, 1, 9), 0.1)).abs() < 1e-3).all()
    module, batch = module_for(normalise_patches=True), batch_of(noise())
    image = batch["image"].float() / 65535
    _, guess = module.predict(image, batch["keep"])
    target = normalised(patches(image, (16, 16, 16)))
    expected = masked_l1(guess, target, unseen(batch["keep"], 8)).mean()
    assert module(batch, 0.0)[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_encoders_last_normalisation_is_trained_and_the_pyramid_frozen() -> None:
    module = module_for()
    trained = {k for k, p in module.named_parameters() if p.requires_grad}
    assert trained == {
        k for k, _ in module.named_parameters() if k.startswith(("backbone.net.vit.", "decoder."))
    }
    assert "backbone.net.vit.norm.weight" in trained


def test_parameters_at_the_papers_size() -> None:
    """As MONAI has them, 88.359 and 27.822 million, of which 18,432 and 8,192 belong to norms that no output
    depends on and ours lacks."""
    with torch.device("meta"):
        module: Any = methods.build("mae3d", networks.build("unetr"), size_vox=(96, 96, 96))
    encoder, decoder = (
        sum(p.numel() for k, p in module.named_parameters() if k.startswith(part) and p.requires_grad)
        for part in ("backbone.", "decoder.")
    )
    assert (encoder, decoder) == (88_359_168 - 18_432, 27_822_080 - 8_192)
    assert round((encoder + 18_432 + decoder + 8_192) / 1e6, 3) == 116.181


def test_fixed_positions_of_any_width() -> None:
    whole, padded = sincos((2, 3, 2), 12), sincos((2, 3, 2), 16)
    assert padded.shape == (1, 12, 16)
    assert torch.equal(padded[..., :12], whole)
    assert (padded[..., 12:] == 0).all()
    assert torch.pdist(whole[0]).min() > 0.1


def test_overfits_two_crops() -> None:
    module, batch = module_for(), batch_of(noise())
    losses = losses_of(module, batch, lr=3e-3)
    assert losses[1] < losses[0]
    assert losses[-1] < 0.9 * losses[0], losses


def test_one_answer_to_all_is_warned_of() -> None:
    assert methods.warning("mae3d", {"prediction_spread": 0.3}) is None
    assert "hardly varies" in str(methods.warning("mae3d", {"prediction_spread": 0.0}))


def test_it_needs_a_network_of_tokens() -> None:
    net = networks.build("swinunetr", **networks.tiny("swinunetr"))
    with pytest.raises(UserError, match="'mae3d' needs encode_visible of its backbone"):
        methods.build("mae3d", net, size_vox=SIZE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.0}, r"method\.ratio is 0\.0"),
        ({"ratio": 1.0}, r"1\.0 of the 8 patches .* none to see"),
        ({"ratio": 0.1}, r"0\.1 of the 8 patches"),
        ({"patch_vox": (16, 16, 12)}, r"\(16, 16, 12\) voxels, which do not divide crops"),
        ({"patch_vox": (8, 16, 16)}, r"set method\.patch_vox to \(16, 16, 16\)"),
        ({"decoder_heads": 5}, "multiple of method.decoder_heads"),
        ({"decoder_depth": 0}, "decoder_depth is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        module_for(**options)
