"""3D UX-Net is the published network: its counts, its blocks, its decoder.

Letters: B batch, C channels, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

import logging
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from logonet import networks
from logonet.core import config
from logonet.core.errors import UserError
from logonet.networks import uxnet3d

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"feature_size": 4, "depths": (1, 2, 1, 1), "kernel_size": 5}
CASES: dict[str, dict[str, Any]] = {
    "released": {},
    "optimised": {"variant": "optimised"},
    "mlp": {"scaling": "mlp"},
    "paper": {"block": "paper"},
    "paper mlp": {"block": "paper", "scaling": "mlp"},
    "dense": {"convolution": "dense"},
    "unscaled": {"scaling": "none"},
    "paper unscaled": {"block": "paper", "scaling": "none"},
    "affine": {"norm": "instance_affine"},
    "group": {"norm": "group"},
}


def small(**options: Any) -> Any:
    """A small net in float64 whose blocks and normalisations do something, unlike those of a fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net: Any = networks.build("uxnet3d", 2, 3, **{**SMALL, **options}).double()
        for key, p in net.named_parameters():
            if "gamma" in key or "norm" in key:
                nn.init.uniform_(p, 0.2, 1.5)
    return net


def crop(seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn((2, 2, 32, 16, 16), dtype=torch.float64, generator=rng)


def on_meta(num_classes: int = 14, **options: Any) -> Any:
    """With torch's own layers, for thop counts no others."""
    with torch.device("meta"):
        return networks.build("uxnet3d", 1, num_classes, **{"channels_last": False, **options})


def params(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


# ---- counts --------------------------------------------------------------------------------------


def test_parameters_of_every_part() -> None:
    net = on_meta()
    assert params(net.stages) == 518_400
    assert params(net.stem, net.stem_norm, net.downs, net.down_norms) == 792_096
    assert params(net.out_norms) == 1_440
    assert [params(skip) for skip in net.skips] == [63_552, 377_856, 1_511_424, 6_045_696]
    assert params(net.bottleneck) == 24_182_784
    assert [params(up) for up in net.ups] == [14_598_144, 3_649_536, 912_384, 228_096]
    assert params(net.last) == 124_416
    assert params(net.output) == 686
    assert params(net) == 53_006_510


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kernel_size": 3}, 52_551_470),
        ({"kernel_size": 13}, 55_676_270),
        ({"scaling": "mlp"}, 56_128_430),
        ({"variant": "optimised"}, 32_040_110),
        ({"block": "paper"}, 53_007_950),  # a second LN (2 C) in place of the scale (C): 8 blocks, 180 C
        ({"channels_last": True}, 53_006_510),
        # the paper's "about 3.5 times": 343 C^2 for 343 C in each of 8 blocks
        ({"convolution": "dense"}, 53_006_510 + 2 * 343 * sum(c * c - c for c in (48, 96, 192, 384))),
        # in each block 4 C for and after widening, 4 C and C for narrowing
        ({"scaling": "none"}, 53_006_510 - 2 * 13 * 720),
        ({"deep_supervision": True}, 53_006_510 + 14 * (96 + 192 + 2)),
    ],
    ids=str,
)
def test_parameters_of_the_variants(options: dict[str, Any], expected: int) -> None:
    assert params(on_meta(**options)) == expected


@pytest.mark.parametrize(
    ("options", "num_classes", "norms_counted", "expected"),
    [
        ({}, 14, True, 632.28),
        ({}, 14, False, 632.14),
        ({"scaling": "mlp"}, 8, False, 639.42),  # what the paper prints for the other net
        ({"variant": "optimised"}, 14, True, 626.58),
    ],
    ids=str,
)
def test_multiply_accumulates_as_thop_counts(
    options: dict[str, Any],
    num_classes: int,
    norms_counted: bool,
    expected: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At 96^3. thop knows torch's LayerNorm; the released code's own it passes over."""
    import thop

    monkeypatch.setattr(logging.getLogger(), "level", logging.ERROR)
    x = torch.empty(1, 1, 96, 96, 96, device="meta")
    passed_over = {} if norms_counted else {nn.LayerNorm: lambda module, args, out: None}
    net = on_meta(num_classes, **options)
    macs, _ = thop.profile(net, (x,), custom_ops=passed_over, verbose=False)
    assert round(macs / 1e9, 2) == expected


def test_true_multiply_accumulates_and_stages_at_96() -> None:
    net, x = on_meta(), torch.empty(1, 1, 96, 96, 96, device="meta")
    with FlopCounterMode(display=False) as flops:
        net(x)
    assert round(flops.get_total_flops() / 2e9, 2) == 577.79
    assert [tuple(f.shape[1:]) for f in net.encode(x)] == [
        (48, 48, 48, 48),
        (96, 24, 24, 24),
        (192, 12, 12, 12),
        (384, 6, 6, 6),
    ]


# ---- numbers -------------------------------------------------------------------------------------


class Literal:
    """The network read off its description, channel by channel where a channel is alone."""

    def __init__(self, net: nn.Module, cfg: Any) -> None:
        self.weights, self.cfg = dict(net.named_parameters()), cfg

    def conv(self, x: Tensor, name: str, **how: Any) -> Tensor:
        return F.conv3d(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"), **how)

    def scale(self, x: Tensor, name: str) -> Tensor:
        if f"{name}.weight" not in self.weights:
            return x
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return x * weight.view(-1, 1, 1, 1) + bias.view(-1, 1, 1, 1)

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        return self.scale(centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt(), name)

    def decoder_norm(self, x: Tensor, name: str) -> Tensor:
        """Over each channel, or each four of them."""
        b, c, *size = x.shape
        groups = x.reshape(b, 4 if self.cfg.norm == "group" else c, -1, *size)
        centred = groups - groups.mean((2, 3, 4, 5), keepdim=True)
        normed = centred / (centred.square().mean((2, 3, 4, 5), keepdim=True) + 1e-5).sqrt()
        return self.scale(normed.reshape(x.shape), name)

    def large(self, x: Tensor, name: str) -> Tensor:
        """Depthwise, tap by tap; dense, torch's."""
        if self.cfg.convolution == "dense":
            return self.conv(x, name, padding=self.cfg.kernel_size // 2)
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        reach = self.cfg.kernel_size // 2
        padded = F.pad(x, (reach,) * 6)
        nx, ny, nz = x.shape[2:]
        out = torch.zeros_like(x) + bias.view(-1, 1, 1, 1)
        for i, j, k in product(range(self.cfg.kernel_size), repeat=3):
            tap = weight[:, 0, i, j, k].view(-1, 1, 1, 1)
            out = out + tap * padded[:, :, i : i + nx, j : j + ny, k : k + nz]
        return out

    def scaling(self, x: Tensor, name: str) -> Tensor:
        if self.cfg.scaling == "none":
            return x
        if self.cfg.scaling == "mlp":
            return self.conv(F.gelu(self.conv(x, f"{name}.widen")), f"{name}.narrow")
        widen, widen_bias = self.weights[f"{name}.widen.weight"], self.weights[f"{name}.widen.bias"]
        narrow, narrow_bias = self.weights[f"{name}.narrow.weight"], self.weights[f"{name}.narrow.bias"]
        channels = []
        for c in range(x.shape[1]):
            hidden = [F.gelu(x[:, c] * widen[4 * c + j].item() + widen_bias[4 * c + j]) for j in range(4)]
            channels.append(sum(h * narrow[c, j].item() for j, h in enumerate(hidden)) + narrow_bias[c])
        return torch.stack(channels, dim=1)

    def block(self, x: Tensor, name: str) -> Tensor:
        if self.cfg.block == "paper":  # Eq. 1
            x = self.large(self.layer_norm(x, f"{name}.norm1"), f"{name}.large") + x
            if self.cfg.scaling == "none":
                return x
            return self.scaling(self.layer_norm(x, f"{name}.norm2"), f"{name}.scaling") + x
        branch = self.scaling(
            self.layer_norm(self.large(x, f"{name}.large"), f"{name}.norm"), f"{name}.scaling"
        )
        return x + self.weights[f"{name}.gamma"].view(-1, 1, 1, 1) * branch

    def encode(self, x: Tensor) -> list[Tensor]:
        feats = []
        for n, depth in enumerate(self.cfg.depths or uxnet3d._DEPTHS[self.cfg.variant]):
            if n == 0:
                x = self.layer_norm(self.conv(x, "stem", stride=2, padding=3), "stem_norm")
            else:
                x = self.conv(self.layer_norm(x, f"down_norms.{n - 1}"), f"downs.{n - 1}", stride=2)
            for m in range(depth):
                x = self.block(x, f"stages.{n}.{m}")
            feats.append(self.layer_norm(x, f"out_norms.{n}"))
        return feats

    def conv_block(self, x: Tensor, name: str) -> Tensor:
        x = self.decoder_norm(self.conv(x, f"{name}.conv", padding=1), f"{name}.norm")
        return F.leaky_relu(x, 0.01)

    def res_block(self, x: Tensor, name: str) -> Tensor:
        shortcut = x
        if f"{name}.shortcut.0.weight" in self.weights:
            shortcut = self.decoder_norm(self.conv(x, f"{name}.shortcut.0"), f"{name}.shortcut.1")
        x = self.conv_block(x, f"{name}.first")
        x = self.decoder_norm(self.conv(x, f"{name}.conv", padding=1), f"{name}.norm")
        return F.leaky_relu(x + shortcut, 0.01)

    def decode(self, image: Tensor, feats: list[Tensor]) -> Tensor:
        optimised = self.cfg.variant == "optimised"
        x = (self.conv_block if optimised else self.res_block)(feats[3], "bottleneck")
        for n, level in enumerate([feats[2], feats[1], feats[0], image]):
            up = F.conv_transpose3d(x, self.weights[f"ups.{n}.up.weight"], stride=2)
            skip = self.res_block(level, f"skips.{3 - n}")
            x = self.res_block(torch.cat((up, skip), dim=1), f"ups.{n}.mix")
        return self.conv(self.res_block(x, "last"), "output")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("channels_last", [True, False])
def test_equals_the_description(case: str, channels_last: bool) -> None:
    options = {**CASES[case], "channels_last": channels_last}
    net = small(**options)
    literal = Literal(net, networks.config("uxnet3d", {**SMALL, **options}))
    with torch.no_grad():
        feats = literal.encode(crop())
        for ours, theirs in zip(net.encode(crop()), feats, strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(net(crop()).logits, literal.decode(crop(), feats))


@pytest.mark.parametrize("case", CASES)
def test_fast_layers_change_no_number(case: str) -> None:
    grads, outs = [], []
    for fast in (True, False):
        net, x = small(**CASES[case], channels_last=fast), crop().requires_grad_()
        outs.append(net(x).logits)
        (outs[-1] * torch.linspace(-1, 1, outs[-1].numel()).view_as(outs[-1])).sum().backward()
        grads.append([x.grad, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*outs)
    for ours, torchs in zip(*grads):
        torch.testing.assert_close(ours, torchs, rtol=1e-7, atol=1e-7)


def test_decoder_is_monais() -> None:
    """The released network takes its decoder from MONAI: the same blocks, on the same weights."""
    from monai.networks.blocks import UnetrBasicBlock, UnetrUpBlock

    net, x = small(feature_size=4), crop()
    how: dict[str, Any] = {"kernel_size": 3, "norm_name": "instance", "res_block": True}

    def res(ours: Any, in_channels: int, out_channels: int) -> Any:
        theirs = UnetrBasicBlock(3, in_channels, out_channels, stride=1, **how).double()
        load(theirs.layer, ours)
        return theirs

    def load(theirs: Any, ours: Any) -> None:
        names = {"conv1.conv": "first.conv", "conv2.conv": "conv", "conv3.conv": "shortcut.0"}
        weights = ours.state_dict()
        own = {k: weights[f"{names[k.removesuffix('.weight')]}.weight"] for k in theirs.state_dict()}
        theirs.load_state_dict(own)
        assert len(own) == len(weights)

    dims, widths = [2, 4, 8, 16, 32], [4, 8, 16, 32, 64]
    with torch.no_grad():
        feats = net.encode(x)
        levels = [x, *feats]
        blocks = [*net.skips, net.bottleneck]
        skips = [res(*args)(level) for *args, level in zip(blocks, dims, widths, levels, strict=True)]
        f = skips[4]
        for n, up in enumerate(net.ups):
            theirs: Any = UnetrUpBlock(
                3, widths[4 - n], widths[3 - n], upsample_kernel_size=2, **how
            ).double()
            theirs.transp_conv.conv.weight.copy_(up.up.weight)
            load(theirs.conv_block, up.mix)
            f = theirs(f, skips[3 - n])
        torch.testing.assert_close(net.decode_features(x, feats), res(net.last, 4, 4)(f))


def test_deep_logits_of_two_coarser_levels_in_training_alone() -> None:
    net, plain = small(deep_supervision=True), small()
    plain.load_state_dict({k: w for k, w in net.state_dict().items() if not k.startswith("deep_heads.")})
    out = net.train()(crop())
    assert [tuple(d.shape) for d in out.deep] == [(2, 3, 16, 8, 8), (2, 3, 8, 4, 4)]
    torch.testing.assert_close(out.logits, plain(crop()).logits)
    sum(part.sum() for part in (out.logits, *out.deep)).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval()(crop()).deep == []


def test_a_stage_without_its_scales_is_the_identity() -> None:
    x = torch.randn((2, 4, 8, 4, 6), generator=torch.Generator().manual_seed(0))
    net: Any = networks.build("uxnet3d", 1, 3, **SMALL)
    fresh = net.stages[0](x)
    assert not torch.equal(fresh, x)
    torch.testing.assert_close(fresh, x, rtol=0, atol=1e-5)
    for block in net.stages[0]:
        nn.init.zeros_(block.gamma)
    assert torch.equal(net.stages[0](x), x)


def test_fast_layers_keep_channels_last() -> None:
    """A layer that fell back to another layout would put every later one on a slow path."""
    net = small().float()
    blocks = [m for m in net.modules() if isinstance(m, uxnet3d.ResBlock | uxnet3d.ReleasedBlock)]
    layouts: list[bool] = []
    for block in blocks:
        block.register_forward_hook(
            lambda m, args, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last_3d))
        )
    net(crop().float())
    assert len(layouts) == len(blocks)
    assert all(layouts)


# ---- sizes and options ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16, 16), (1, 1, 1), (17, 20, 30)], ids=str)
def test_one_voxel_under_instance_norm_is_refused_with_a_size_that_fits(size: tuple[int, int, int]) -> None:
    cfg = networks.config("uxnet3d")
    with pytest.raises(UserError) as refused:
        networks.check_size("uxnet3d", cfg, size)
    near = str(refused.value).rsplit("(", 1)[1].rstrip(")")
    networks.check_size("uxnet3d", cfg, [int(n) for n in near.split(",")])
    networks.check_size("uxnet3d", networks.config("uxnet3d", {"norm": "group"}), (16, 16, 16))


def test_a_size_between_is_refused_with_both_neighbours() -> None:
    with pytest.raises(UserError, match=r"\(100, 96, 96\).*\(96, 96, 96\) or \(112, 96, 96\)"):
        networks.check_size("uxnet3d", networks.config("uxnet3d"), (100, 96, 96))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"feature_size": 0}, "feature_size"),
        ({"feature_size": 6, "norm": "group"}, "multiple of 4"),
        ({"depths": [2, 2, 2]}, "depths"),
        ({"depths": [2, 0, 2, 2]}, "depths"),
        ({"kernel_size": 4}, "odd"),
        ({"variant": "fast"}, "variant"),
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        networks.config("uxnet3d", options)


@pytest.mark.parametrize("case", CASES)
def test_options_survive_a_file(case: str) -> None:
    cfg = networks.config("uxnet3d", {**SMALL, **CASES[case]})
    assert networks.config("uxnet3d", config.to_dict(cfg)) == cfg
