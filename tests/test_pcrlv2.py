"""PCRLv2's network is the published one, with and without skip connections.

Letters: B batch, C channels, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from logonet import networks
from logonet.core import config
from logonet.core.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def small(**options: Any) -> Any:
    """A small net in float64 whose running statistics are not those of a fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net: Any = networks.build("pcrlv2", 2, 3, **{"width": 3, **options}).double()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm3d):
                for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                    assert tensor is not None
                    nn.init.uniform_(tensor, 0.5, 2)
    return net


def crop(seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn((2, 2, 16, 8, 24), dtype=torch.float64, generator=rng)


def on_meta(num_classes: int, **options: Any) -> Any:
    with torch.device("meta"):
        return networks.build("pcrlv2", 1, num_classes, **options)


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- counts --------------------------------------------------------------------------------------


def pretraining_heads(width: int) -> nn.Module:
    """What the published net carries at each level of its decoder beside what segments."""
    return nn.ModuleList(
        [
            nn.BatchNorm1d(width),
            nn.Sequential(
                nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Linear(2 * width, width)
            ),
            nn.Sequential(nn.Conv3d(width, 1, 3, padding=1), nn.BatchNorm3d(1), nn.Sigmoid()),
        ]
    )


def test_parameters() -> None:
    net = on_meta(1)
    widths = [level[-1].norm.num_features for level in net.decoder]
    assert widths == [256, 128, 64]
    heads = [params(pretraining_heads(width)) for width in widths]
    assert heads == [271_363, 70_147, 18_691]
    assert params(net) == 16_751_233
    assert params(net) + sum(heads) == 17_111_434  # published: 17.111 M
    assert params(on_meta(14)) == 16_752_078
    assert params(on_meta(14, skips=True)) == 19_074_510


def test_multiply_accumulates_at_96(monkeypatch: pytest.MonkeyPatch) -> None:
    """In truth and as thop counts, which takes transposed convolutions for eight times what they are."""
    import thop

    monkeypatch.setattr(logging.getLogger(), "level", logging.ERROR)
    net, x = on_meta(1, channels_last=False), torch.empty(1, 1, 96, 96, 96, device="meta")
    with FlopCounterMode(display=False) as flops:
        net.eval()(x)
    assert round(flops.get_total_flops() / 2e9, 1) == 653.0
    assert round(thop.profile(net, (x,), verbose=False)[0] / 1e9, 1) == 831.6


def test_a_published_crop_goes_through() -> None:
    net = on_meta(1)
    x = torch.empty(2, 1, 64, 64, 32, device="meta")
    assert net(x).logits.shape == x.shape
    assert [tuple(f.shape[1:]) for f in net.encode(x)] == [
        (64, 64, 64, 32),
        (128, 32, 32, 16),
        (256, 16, 16, 8),
        (512, 8, 8, 4),
    ]


# ---- numbers -------------------------------------------------------------------------------------


class Literal:
    """The published network, read off its description, on another net's weights."""

    def __init__(self, net: nn.Module, training: bool, skips: bool) -> None:
        self.weights = {k: v.clone() for k, v in net.state_dict().items()}
        self.training, self.skips = training, skips

    def conv(self, x: Tensor, name: str, padding: int = 1) -> Tensor:
        return F.conv3d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], padding=padding)

    def twice(self, x: Tensor, name: str) -> Tensor:
        for n in (0, 1):
            x, norm = self.conv(x, f"{name}.{n}.conv"), f"{name}.{n}.norm"
            dims = (0, 2, 3, 4)
            mean, var = self.weights[f"{norm}.running_mean"], self.weights[f"{norm}.running_var"]
            if self.training:
                mean, var = x.mean(dims), x.var(dims, unbiased=False)
            x = (x - mean.view(-1, 1, 1, 1)) / (var.view(-1, 1, 1, 1) + 1e-5).sqrt()
            x = x * self.weights[f"{norm}.weight"].view(-1, 1, 1, 1)
            x = (x + self.weights[f"{norm}.bias"].view(-1, 1, 1, 1)).clamp_min(0)
        return x

    def up(self, x: Tensor, name: str) -> Tensor:
        """Each voxel becomes 2 x 2 x 2, each of which sees that voxel alone."""
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        b, _, nx, ny, nz = x.shape
        out = x.new_empty(b, weight.shape[1], 2 * nx, 2 * ny, 2 * nz)
        for i in (0, 1):
            for j in (0, 1):
                for k in (0, 1):
                    part = torch.einsum("bcxyz,co->boxyz", x, weight[:, :, i, j, k])
                    out[:, :, i::2, j::2, k::2] = part + bias.view(-1, 1, 1, 1)
        return out

    def __call__(self, x: Tensor) -> Tensor:
        levels = []
        for n in range(4):
            if n:
                b, c, nx, ny, nz = x.shape
                x = x.reshape(b, c, nx // 2, 2, ny // 2, 2, nz // 2, 2).amax((3, 5, 7))
            x = self.twice(x, f"encoder.{n}")
            levels.append(x)
        for n in range(3):
            x = self.up(x, f"ups.{n}")
            if self.skips:
                x = torch.cat((x, levels[2 - n]), dim=1)
            x = self.twice(x, f"decoder.{n}")
        return self.conv(x, "output", padding=0)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_equals_the_description(skips: bool, training: bool, channels_last: bool) -> None:
    net = small(skips=skips, channels_last=channels_last).train(training)
    literal = Literal(net, training, skips)
    with torch.no_grad():
        torch.testing.assert_close(net(crop()).logits, literal(crop()))


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_fast_layers_change_no_number(skips: bool, training: bool) -> None:
    nets = [small(skips=skips, channels_last=fast).train(training) for fast in (True, False)]
    outs, grads = [], []
    for net in nets:
        x = crop().requires_grad_()
        outs.append(net(x).logits)
        (outs[-1] * torch.linspace(-1, 1, outs[-1].numel()).view_as(outs[-1])).sum().backward()
        grads.append([x.grad, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*outs)
    for ours, torchs in zip(*grads):
        torch.testing.assert_close(ours, torchs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("skips", [False, True])
def test_without_skips_the_coarsest_level_tells_all(skips: bool) -> None:
    net, x = small(skips=skips).eval(), crop()
    with torch.no_grad():
        feats = net.encode(x)
        noise = [torch.randn_like(f) for f in feats[:-1]]
        same = torch.equal(net.decode(x, [*noise, feats[-1]]).logits, net.decode(x, feats).logits)
    assert same is not skips


# ---- sizes and options ---------------------------------------------------------------------------


def test_sizes() -> None:
    cfg = networks.config("pcrlv2")
    networks.check_size("pcrlv2", cfg, (96, 8, 40))
    with pytest.raises(UserError, match=r"\(20, 8, 8\).*\(16, 8, 8\) or \(24, 8, 8\)"):
        networks.check_size("pcrlv2", cfg, (20, 8, 8))


def test_options() -> None:
    with pytest.raises(UserError, match=r"backbone\.width is 0"):
        networks.config("pcrlv2", {"width": 0})
    cfg = networks.config("pcrlv2", {"width": 8, "skips": True})
    assert networks.config("pcrlv2", config.to_dict(cfg)) == cfg
