"""RCR's counts, its cuts and its three losses.

Shapes: B samples, C input channels, X Y Z the crop's axes, F features, x y z a map's axes, V = 2 views.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_methods import Stub
from test_selfsup import LEARNERS, assert_learns_two_phantoms, phantom_batch, phantom_crop, plain_nt_xent
from torch import Tensor, nn

from logonet import methods, networks
from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.methods import rcr
from logonet.methods._parts import intensity


def build(
    backbone: nn.Module | None = None, size_vox: tuple[int, int, int] = (32, 32, 32), **options: Any
) -> Any:
    torch.manual_seed(0)
    return methods.build("rcr", backbone or Stub(), size_vox=size_vox, **options)


# ----------------------------------------------------------------------------------------------- counts


class Whole(nn.Module):
    """Encoder and heads of one view, for the counter."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        map_BFxyz = self.module.backbone.encode(x_BCXYZ)[-1]
        for head in (self.module.rotation, self.module.contrast):
            head(map_BFxyz[..., 0, 0, 0])
        return self.module.reconstruction(map_BFxyz, x_BCXYZ.shape[2:])


def millions(part: nn.Module) -> float:
    return round(sum(p.numel() for p in part.parameters()) / 1e6, 3)


def test_the_published_network(monkeypatch: pytest.MonkeyPatch):
    import thop

    monkeypatch.setattr(logging.getLogger(), "level", logging.ERROR)
    with torch.device("meta"):
        net = networks.build("swinunetr", 1, 14)
        module = build(net, (96, 96, 96))
    trained = round(sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6, 3)
    assert (millions(net.net.swinViT), millions(module.reconstruction), trained) == (8.062, 10.638, 19.097)
    crop = torch.empty(1, 1, 96, 96, 96, device="meta")
    assert round(thop.profile(Whole(module).eval(), (crop,), verbose=False)[0] / 1e9, 3) == 24.865


def test_the_published_shapes():
    class Coarse(nn.Module):
        channels, strides = (768,), (32,)

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv3d(1, 768, 32, stride=32)

        def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
            return [self.layer(x_BCXYZ)]

    module = build(Coarse(), (96, 96, 96))
    with torch.no_grad():
        rotation, first, second, rebuilt = module.heads([torch.rand(2, 768, 3, 3, 3)], (96, 96, 96))
    assert rotation.shape == (2, 4)
    assert torch.cat([first, second]).shape == (2, 512)
    assert rebuilt.shape == (2, 1, 96, 96, 96)


def test_the_reconstruction_head_is_the_published_one():
    head = rcr.Reconstruction(24, 8, 2)
    layers: list[nn.Module] = []
    for conv in head.convs:
        norm = nn.InstanceNorm3d(conv.out_channels)
        layers += [
            conv,
            norm,
            nn.LeakyReLU(),
            nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
        ]
    plain = nn.Sequential(*layers, head.out)
    assert [conv.out_channels for conv in head.convs] == [12, 8, 8]
    x = torch.randn(2, 24, 2, 3, 2)
    torch.testing.assert_close(head(x, (16, 24, 16)), plain(x))
    published = rcr.Reconstruction(768, (32, 32, 32), 1)
    assert [conv.out_channels for conv in published.convs] == [384, 192, 96, 48, 48]


@pytest.mark.parametrize(
    ("stride", "size_map", "sizes"),
    [
        # nnFormer on abdominal CT: the last step leaves the slice axis alone
        ((32, 32, 16), (2, 2, 1), [(4, 4, 2), (8, 8, 4), (16, 16, 8), (32, 32, 16), (64, 64, 16)]),
        ((4, 8, 8), (2, 1, 1), [(4, 2, 2), (8, 4, 4), (8, 8, 8)]),
        (1, (4, 4, 4), [(4, 4, 4)]),
        ((3, 3, 3), (2, 2, 2), [(4, 4, 4), (6, 6, 6)]),
    ],
)
def test_each_axis_grows_until_it_is_the_crops(stride: Any, size_map: Any, sizes: list[Any]):
    head = rcr.Reconstruction(16, stride, 1)
    seen: list[Any] = []
    for layer in (*head.convs[1:], head.out):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    out = head(torch.randn(1, 16, *size_map), sizes[-1])
    assert seen == sizes
    assert out.shape == (1, 1, *sizes[-1])


def test_one_voxel_is_not_normalised_away():
    head = rcr.Reconstruction(16, 4, 1)
    a, b = (head(torch.full((2, 16, 1, 1, 1), value), (4, 4, 4)) for value in (1.0, -1.0))
    assert torch.isfinite(a).all()
    assert not torch.allclose(a, b)


# ------------------------------------------------------------------------------------------------- cuts


@pytest.mark.parametrize("size_vox", [(40, 40, 20), (96, 96, 96), (8, 8, 4)])
def test_boxes_hide_what_was_drawn_and_at_most_one_more(size_vox: tuple[int, int, int]):
    generator = seeding.rng(0, "boxes")
    low, high = ([max(1, int(share * side)) for side in size_vox] for share in (0.05, 0.25))
    shares = []
    for _ in range(60):
        hidden = np.zeros(size_vox, bool)
        for box in rcr.draw_boxes(size_vox, 0.3, generator):
            lengths = [edge.stop - edge.start for edge in box]
            assert all(a <= n <= b for a, n, b in zip(low, lengths, high))
            assert all(0 <= edge.start < edge.stop <= side for edge, side in zip(box, size_vox))
            hidden[box] = True
        shares.append(hidden.mean())
    one_box = math.prod(high) / math.prod(size_vox)
    assert max(shares) <= 0.3 + one_box
    assert np.std(shares) > 0.05
    assert rcr.draw_boxes(size_vox, 0.0, generator) == []


def prepared(seed: str, **options: Any) -> dict[str, np.ndarray]:
    cfg = methods.config("rcr", options)
    return methods.prepare("rcr")({"image_CXYZ": phantom_crop(0)}, cfg, seeding.rng(0, seed))


def test_each_view_is_the_crop_turned_with_noise_in_boxes():
    image = phantom_crop(0)
    turns, share = set(), []
    for i in range(12):
        ready = prepared(f"seed {i}")
        assert ready["whole"].dtype == ready["cut"].dtype == np.uint16
        for v in range(2):
            k = int(ready["turns"][v])
            turns.add(k)
            assert np.array_equal(ready["whole"][v], np.rot90(image, k, (1, 2)))  # in the slice plane
            changed = (ready["whole"][v] != ready["cut"][v])[0]
            share.append(changed.mean())
            if changed.sum() > 500:
                noise = ready["cut"][v, 0][changed] / 65535
                assert 0.4 < noise.mean() < 0.6
                assert 0.1 < noise.std() < 0.3
        assert not np.array_equal(ready["swap"][0], ready["swap"][1])
        assert ((ready["other"] >= 0) & (ready["other"] < 1)).all()
    assert turns == {0, 1, 2, 3}
    assert 0.08 < np.mean(share) < 0.2  # half of 0.3, less what overlaps
    untouched = prepared("none", max_cut=0.0)
    assert np.array_equal(untouched["whole"], untouched["cut"])
    assert not untouched["swap"].any()


def test_second_cuts_are_filled_from_the_sample_that_the_draw_names():
    cut = torch.arange(3.0)[:, None, None, None, None].expand(3, 2, 4, 4, 4)
    swap = torch.zeros(3, 4, 4, 4, dtype=torch.bool)
    swap[:, :2] = True
    # Shares of three samples: the second, the third, and the third itself.
    out = rcr.filled(cut, swap, torch.tensor([0.4, 0.99, 1 - 1e-12], dtype=torch.float64))
    assert out[:, 0, 0, 0, 0].tolist() == [1, 2, 2]
    assert torch.equal(out[:, :, 2:], cut[:, :, 2:])
    nearly_one = torch.tensor([1 - 1e-9] * 3).float()  # 1 in float32
    assert rcr.filled(cut, swap, nearly_one)[:, 0, 0, 0, 0].tolist() == [2, 2, 2]


# ------------------------------------------------------------------------------------------------- loss


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return phantom_batch("rcr", methods.config("rcr"), (0, 1, 2))


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_the_loss_is_the_sum_of_the_three(pool: str, batch: dict[str, Tensor]):
    module = build(pool=pool, w_rotation=2.0, w_contrast=3.0, w_reconstruction=5.0)
    loss, metrics = module(batch, 0.0)
    logits, projections, errors, right = [], [], [], 0
    for v in range(2):
        cut = intensity(batch["cut"][:, v])
        source = [int(share * 3) for share in batch["other"][:, v].tolist()]
        seen = torch.stack([torch.where(batch["swap"][i, v], cut[source[i]], cut[i]) for i in range(3)])
        map_BFxyz = module.backbone.encode(seen)[-1]
        tokens = map_BFxyz.permute(0, 2, 3, 4, 1).flatten(1, 3)
        told, compared = (tokens.mean(1),) * 2 if pool == "mean" else (tokens[:, 0], tokens[:, 1])
        logits.append(module.rotation(told))
        projections.append(module.contrast(compared))
        rebuilt = module.reconstruction(map_BFxyz, (32, 32, 32))
        errors.append((rebuilt - intensity(batch["whole"][:, v])).abs().mean())
        right += (logits[-1].argmax(1) == batch["turns"][:, v]).sum().item()
    rotation = F.cross_entropy(torch.cat(logits), torch.cat([batch["turns"][:, 0], batch["turns"][:, 1]]))
    contrast, l1 = plain_nt_xent(*projections, 0.5), torch.stack(errors).mean()
    torch.testing.assert_close(loss, 2 * rotation + 3 * contrast + 5 * l1)
    for key, value in {"rotation": rotation, "contrast": contrast, "reconstruction": l1}.items():
        assert (metrics[key][0] / metrics[key][1]).item() == pytest.approx(value.item(), rel=1e-5)
    assert metrics["rotation_accuracy"].tolist() == [right, 6]


def test_closed_forms(batch: dict[str, Tensor]):
    """Heads that answer the same whatever they see: ln 4 for the turns, ln(2N - 1) for the contrast."""
    module = build()
    four = {key: torch.cat([value, value[:1]]) for key, value in batch.items()}
    with torch.no_grad():
        for head in (module.rotation, module.contrast):
            head.weight.zero_()
            head.bias.fill_(1)
    _, metrics = module(four, 0.0)
    for key, expected in (("rotation", 1.386), ("contrast", 1.946)):
        assert (metrics[key][0] / metrics[key][1]).item() == pytest.approx(expected, abs=5e-4)
    assert metrics["spread"][0] == pytest.approx(0, abs=1e-6)


def test_a_map_of_one_token_serves_both_heads():
    net = networks.build("swinunetr", 1, 2, **networks.tiny("swinunetr"))
    module = build(net)
    feats = net.encode(torch.rand(4, 1, 32, 32, 32))
    rotation, first, second, _ = module.heads(feats, (32, 32, 32))
    only = feats[-1].flatten(1)
    torch.testing.assert_close(rotation, module.rotation(only))
    torch.testing.assert_close(torch.cat([first, second]), module.contrast(only))


def test_settings_that_cannot_work():
    for options, words in [
        ({"size_vox": (32, 16, 32)}, "set crops.size_vox to one length"),
        ({"max_cut": 1.0}, "max_cut"),
        ({"temperature": 0.0}, "temperature"),
        ({"contrast": 0}, "contrast"),
        ({"w_rotation": -1.0}, "w_rotation"),
        ({"w_rotation": 0.0, "w_contrast": 0.0, "w_reconstruction": 0.0}, "w_rotation.*above 0"),
        ({"batch_size": 1}, "set it to 2"),
    ]:
        with pytest.raises(UserError, match=words):
            build(**options)


@pytest.mark.parametrize("backbone", LEARNERS)
def test_it_learns(backbone: str):
    assert_learns_two_phantoms("rcr", backbone)
