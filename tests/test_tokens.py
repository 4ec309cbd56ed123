"""Backbones that cut a crop into tokens: tokens may be hidden, or left out.

Letters: B batch, C input channels, E a token's width, N tokens of a crop, V those that are seen, XYZ the crop's
axes, xyz those of the tokens.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from logonet import networks
from logonet.core.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

HIDING = [name for name in networks.names() if "encode_hidden" in networks.abilities(name)]
SIDE = 32


def net_for(name: str, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return networks.build(name, 2, 3, **{**networks.tiny(name), **options})


def crops(side: int = SIDE, seed: int = 1) -> Tensor:
    return torch.rand(2, 2, side, side, side, generator=torch.Generator().manual_seed(seed))


def grid(net: Any, side: int = SIDE) -> tuple[int, ...]:
    return tuple(side // stride for stride in net.embed_stride)


def test_who_can_hide_tokens() -> None:
    assert HIDING == ["nnformer", "swinunetr", "unetr"]
    assert [n for n in networks.names() if "encode_visible" in networks.abilities(n)] == ["unetr"]


@pytest.mark.parametrize("name", HIDING)
def test_hiding_nothing_is_encoding(name: str) -> None:
    net, x = net_for(name), crops()
    nothing = torch.zeros(2, *grid(net), dtype=torch.bool)
    token_E = torch.randn(net.embed_channels)
    for ours, plain in zip(net.encode_hidden(x, nothing, token_E), net.encode(x), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("name", HIDING)
def test_what_is_hidden_cannot_be_told(name: str) -> None:
    """Where the crop's voxels are hidden too: nnFormer's tokens overlap."""
    net = net_for(name).eval()
    hidden_Bxyz = torch.rand(2, *grid(net), generator=torch.Generator().manual_seed(2)) < 0.5
    token_E = torch.randn(net.embed_channels, requires_grad=True)
    per_voxel = hidden_Bxyz
    for axis, stride in enumerate(net.embed_stride, start=1):
        per_voxel = per_voxel.repeat_interleave(stride, dim=axis)
    a, b = crops(seed=1), crops(seed=3)
    b = torch.where(per_voxel[:, None], b, a)  # differs from a where hidden alone
    outs = [net.encode_hidden(torch.where(per_voxel[:, None], 0.0, x), hidden_Bxyz, token_E) for x in (a, b)]
    assert all(torch.equal(one, two) for one, two in zip(*outs))
    assert not torch.equal(outs[0][-1], net.encode(a)[-1])
    outs[0][-1].square().sum().backward()
    assert token_E.grad is not None
    assert token_E.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["unetr", "swinunetr"])
def test_the_token_stands_in_for_what_is_hidden(name: str) -> None:
    """Where patches do not overlap, the voxels of hidden ones count for nothing even when they are there. Positions
    stay: UNETR's are added to the token, Swin's are relative."""
    net = net_for(name).eval()
    all_hidden = torch.ones(2, *grid(net), dtype=torch.bool)
    feats = net.encode_hidden(crops(), all_hidden, torch.randn(net.embed_channels))
    for feat in feats:
        assert torch.equal(feat[0], feat[1])
    tokens_BEN = feats[0].flatten(2)
    assert bool((tokens_BEN.std(-1) > 1e-4).any()) is (name == "unetr")


@pytest.mark.parametrize("name", HIDING)
def test_hidden_tokens_under_autocast(name: str) -> None:
    net, x = net_for(name), crops()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = torch.rand(2, *grid(net)) < 0.5
        token_E = torch.zeros(net.embed_channels)
        feats, plain = net.encode_hidden(x, hidden, token_E), net.encode(x)
    assert [f.dtype for f in feats] == [f.dtype for f in plain]


# --------------------------------------------------------------------------------- unetr: visible tokens


def everything(count: int) -> Tensor:
    return torch.arange(count).expand(2, -1)


@pytest.mark.parametrize("options", [{}, {"positions": "sincos"}, {"qkv_bias": True}])
def test_all_visible_is_encoding(options: dict[str, Any]) -> None:
    net, x = net_for("unetr", **options), crops()
    last = net.encode(x)[-1].flatten(2).transpose(1, 2)
    assert torch.equal(net.encode_visible(x, everything(8), None), last)


def test_visible_tokens_know_nothing_of_the_others_and_keep_their_places() -> None:
    net, a, b = net_for("unetr"), crops(seed=1), crops(seed=3)
    keep = torch.tensor([[1, 6, 3], [0, 2, 7]])
    shown = torch.zeros(2, 8, dtype=torch.bool).scatter(1, keep, True).view(2, 2, 2, 2)
    per_voxel = shown.repeat_interleave(16, 1).repeat_interleave(16, 2).repeat_interleave(16, 3)[:, None]
    tokens = net.encode_visible(a, keep, None)
    assert tokens.shape == (2, 3, net.embed_channels)
    torch.testing.assert_close(tokens, net.encode_visible(torch.where(per_voxel, a, b), keep, None))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(tokens[:, order], net.encode_visible(a, keep[:, order], None))
    alike = a[:, :, :16, :16, :16].repeat(1, 1, 2, 2, 2)  # eight equal patches, told apart by position alone
    same = net.encode_visible(alike, everything(8), None)
    assert (same[0, 0] - same[0, 1]).abs().max() > 1e-3


def test_only_the_tokens_that_are_kept_enter_the_transformer() -> None:
    net = net_for("unetr", img_size=(96, 96, 96))
    seen: list[torch.Size] = []
    hook = net.net.vit.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    net.encode_visible(crops(96), torch.arange(0, 216, 4).expand(2, -1), None)
    hook.remove()
    assert seen == [(2, 54, 12)]


def test_a_prefix_comes_first_and_has_no_position() -> None:
    net, x = net_for("unetr"), crops()
    prefix = torch.randn(2, 1, net.embed_channels)
    seen: list[Tensor] = []
    hook = net.net.vit.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    out = net.encode_visible(x, everything(8), prefix)
    hook.remove()
    assert out.shape == (2, 9, net.embed_channels)
    assert torch.equal(seen[0][:, :1], prefix)
    assert not torch.equal(out[:, 1:], net.encode_visible(x, everything(8), None))


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_positions_are_interpolated_for_crops_of_other_sizes(positions: str) -> None:
    net = net_for("unetr", positions=positions)
    own = net.net.vit.patch_embedding.position_embeddings
    zero = torch.zeros(1, net.embed_channels, 3, 2, 4)
    map_Exyz = own[0].T.reshape(-1, 2, 2, 2)
    expected = F.interpolate(map_Exyz[None], (3, 2, 4), mode="trilinear", align_corners=False)
    assert torch.equal(net._placed(zero), expected.flatten(2).transpose(1, 2))
    same = F.interpolate(map_Exyz[None], (2, 2, 2), mode="trilinear", align_corners=False)
    torch.testing.assert_close(same[0], map_Exyz, rtol=0, atol=0)  # to its own size nothing changes
    assert torch.equal(net._placed(zero[:, :, :2, :, :2]), own)
    wide = torch.rand(1, 2, 48, 32, 64)
    assert net.encode_visible(wide, torch.arange(0, 24, 5)[None], None).shape == (1, 5, 12)


def test_fixed_positions_are_sines_and_cosines() -> None:
    net = net_for("unetr", positions="sincos", hidden_size=24, num_heads=2, img_size=(32, 48, 16))
    own = net.net.vit.patch_embedding.position_embeddings
    assert own.shape == (1, 6, 24)
    assert not own.requires_grad
    for n, (x, y, z) in enumerate([(x, y, z) for x in range(2) for y in range(3) for z in range(1)]):
        angles = [place * 10000 ** (-k / 4) for place in (y, x, z) for k in range(4)]
        expected: list[float] = []
        for axis in range(3):
            part = angles[4 * axis : 4 * axis + 4]
            expected += [math.sin(a) for a in part] + [math.cos(a) for a in part]
        assert own[0, n].tolist() == pytest.approx(expected, abs=1e-6)


def test_widths_that_fixed_positions_cannot_have_are_refused() -> None:
    with pytest.raises(UserError, match=r"hidden_size is 16.*multiple of 6"):
        networks.config("unetr", {"hidden_size": 16, "num_heads": 2, "positions": "sincos"})


def test_parameters_of_gl_maes_encoders() -> None:
    """The whole encoders have 88.370 and 6.167 million, of which the class token and a position for it (the
    last 2 widths here) are the method's."""
    for variant, width, whole in (("vit_b", 768, 88_369_920), ("vit_t", 192, 6_167_232)):
        with torch.device("meta"):
            net: Any = networks.build("unetr", variant=variant, positions="sincos", qkv_bias=True)
        assert sum(p.numel() for p in net.net.vit.parameters()) == whole - 2 * width
        assert net.net.vit.patch_embedding.position_embeddings.numel() == 216 * width
