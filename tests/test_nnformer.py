"""nnFormer is the published network: its counts, its windows, its skip attention.

Letters: B batch, C channels, D width of a stage, K classes, XYZ the crop's or a map's axes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from monai.networks.layers.drop_path import DropPath
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from logonet import networks
from logonet.core import config
from logonet.core.errors import UserError
from logonet.networks import nnformer

pytestmark = pytest.mark.usefixtures("one_thread")

Triple = tuple[int, int, int]

# Anisotropic, with windows that pad and shift, a side that is odd once, and a stage that is one window.
SMALL: dict[str, Any] = {
    "img_size": (40, 16, 14),
    "patch": (4, 2, 1),
    "embed_dim": 4,
    "num_heads": (1, 2, 4, 2),
    "windows": ((4, 3, 5), (3, 3, 2), (2, 2, 3), (2, 1, 3)),
    "strides": ((2, 1, 2), (1, 2, 1), (2, 2, 2)),
    "drop_path": 0.0,
}
DEEP = {**SMALL, "depths": (3, 2, 2, 1), "decoder_heads": (2, 4, 8)}


def small(**options: Any) -> Any:
    """A small net in float64 whose biases are large enough to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net: Any = networks.build("nnformer", 2, 3, **{**SMALL, **options}).double()
        for key, p in net.named_parameters():
            if "norm" in key or key.endswith("bias"):
                nn.init.uniform_(p, -1, 1)
    return net


def crop(seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn((2, 2, *SMALL["img_size"]), dtype=torch.float64, generator=rng)


# ---- counts --------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A published network; sizes are in the papers' order of axes, slices first."""

    options: dict[str, Any]
    in_channels: int
    num_classes: int
    params: int
    true_gmacs: float


SYNAPSE: dict[str, Any] = {"img_size": (64, 128, 128), "patch": (2, 4, 4)}
NARROW: dict[str, Any] = {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "deep_supervision": False}
TUMOUR: dict[str, Any] = {
    **NARROW,
    "img_size": (128, 128, 128),
    "patch": (4, 4, 4),
    "decoder_heads": (6, 12, 24),
}
ACDC: dict[str, Any] = {
    **NARROW,
    "img_size": (14, 160, 160),
    "patch": (1, 4, 4),
    "windows": ((3, 5, 5), (3, 5, 5), (7, 10, 10), (3, 5, 5)),
    "strides": ((1, 2, 2), (2, 2, 2), (2, 2, 2)),
}
# Published: 150.054, 149.538, 37.607, 37.160 and 149.266 M; of the encoders 119.046 and 29.840 M.
TABLE = {
    "Synapse": Row(SYNAPSE, 1, 14, 150_054_210, 212.71),
    "Synapse, mirrored": Row({}, 1, 14, 150_054_210, 212.71),
    "Synapse, one head": Row({**SYNAPSE, "deep_supervision": False}, 1, 14, 149_538_086, 211.83),
    "tumour": Row(TUMOUR, 4, 4, 37_606_726, 63.90),
    "ACDC": Row(ACDC, 1, 4, 37_160_200, 47.47),
    "96": Row(
        {"img_size": (96,) * 3, "patch": (2, 4, 4), "deep_supervision": False}, 1, 5, 149_265_629, 176.41
    ),
}


def on_meta(row: Row) -> tuple[Any, Tensor]:
    cfg = networks.config("nnformer", row.options)
    with torch.device("meta"):
        net = networks.build("nnformer", row.in_channels, row.num_classes, cfg=cfg)
        return net, torch.empty(1, row.in_channels, *cfg.img_size)


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def true_gmacs(forward: Any, x: Tensor) -> float:
    with FlopCounterMode(display=False) as flops:
        forward(x)
    return round(flops.get_total_flops() / 2e9, 2)


@pytest.mark.parametrize("row", TABLE)
def test_counts(row: str) -> None:
    expected = TABLE[row]
    net, x = on_meta(expected)
    assert params(net) == expected.params
    assert true_gmacs(net, x) == expected.true_gmacs  # in training, hence with all heads


@pytest.mark.parametrize(
    ("row", "num_params", "gmacs"), [("Synapse", 119_045_772, 153.35), ("tumour", 29_839_734, 48.48)]
)
def test_counts_of_the_encoder(row: str, num_params: int, gmacs: float) -> None:
    net, x = on_meta(TABLE[row])
    assert params(net.encoder) == num_params
    assert true_gmacs(net.encode, x) == gmacs


def test_multiply_accumulates_as_thop_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all three heads, which the published net runs in evaluation too."""
    import thop

    monkeypatch.setattr(logging.getLogger(), "level", logging.ERROR)
    net, x = on_meta(TABLE["Synapse"])
    monkeypatch.setattr(net, "_used_heads", lambda: list(net.heads))
    assert round(thop.profile(net, (x,), verbose=False)[0] / 1e9, 2) == 352.12


def test_sizes_of_the_published_net() -> None:
    net, x = on_meta(TABLE["Synapse"])
    out = net(x)
    assert [tuple(y.shape) for y in (out.logits, *out.deep)] == [
        (1, 14, 64, 128, 128),
        (1, 14, 32, 64, 64),
        (1, 14, 16, 32, 32),
    ]
    assert [tuple(f.shape[1:]) for f in net.encode(x)] == [
        (192, 32, 32, 32),
        (384, 16, 16, 16),
        (768, 8, 8, 8),
        (1536, 4, 4, 4),
    ]


def test_slices_of_acdc_halve_downwards_and_come_back() -> None:
    net, x = on_meta(TABLE["ACDC"])
    assert [tuple(f.shape[2:]) for f in net.encode(x)] == [(14, 40, 40), (14, 20, 20), (7, 10, 10), (3, 5, 5)]
    assert net(x).logits.shape == (1, 4, 14, 160, 160)


# ---- numbers -------------------------------------------------------------------------------------


class Literal:
    """The network read off its description: attention window by window, head by head, bias by offset."""

    def __init__(self, net: nn.Module, cfg: Any) -> None:
        self.weights, self.cfg = dict(net.named_parameters()), cfg

    def conv(self, x: Tensor, name: str, stride: Triple = (1, 1, 1), padding: Any = 1) -> Tensor:
        """Of (B, X, Y, Z, D), as everything here."""
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.conv3d(x.permute(0, 4, 1, 2, 3), weight, bias, stride, padding).permute(0, 2, 3, 4, 1)

    def up_conv(self, x: Tensor, name: str, size: Sequence[int]) -> Tensor:
        """Each token becomes a block of its own; where blocks don't reach, the bias remains."""
        weight_IOxyz, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        sx, sy, sz = weight_IOxyz.shape[2:]
        out = bias.expand(len(x), *size, -1).clone()
        for i, j, k in product(*(range(n) for n in x.shape[1:4])):
            block = torch.einsum("bi,ioxyz->bxyzo", x[:, i, j, k], weight_IOxyz)
            out[:, i * sx : (i + 1) * sx, j * sy : (j + 1) * sy, k * sz : (k + 1) * sz] += block
        return out

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attention(
        self, queries: Tensor, sources: Tensor, name: str, window: Any, shift: Any, num_heads: int
    ) -> Tensor:
        """``sources`` are the tokens that keys and values are made of."""
        size, dim = queries.shape[1:4], queries.shape[-1]
        counts = [-(-n // w) for n, w in zip(size, window)]
        padding = [c * w - n for c, w, n in zip(counts, window, size)]
        pad = [0, 0, 0, padding[2], 0, padding[1], 0, padding[0]]
        queries, sources = F.pad(queries, pad), F.pad(sources, pad)
        side = queries.shape[1:4]
        rows = {at: n for n, at in enumerate(product(*(range(1 - w, w) for w in window)))}
        inner = list(product(*(range(w) for w in window)))
        offset_rows = torch.tensor(
            [[rows[tuple(a - b for a, b in zip(one, other))] for other in inner] for one in inner]
        )
        table, out = self.weights[f"{name}.bias"], torch.zeros_like(queries)
        for corner in product(*(range(c) for c in counts)):
            places = [tuple(c * w + i for c, w, i in zip(corner, window, at)) for at in inner]
            # The shift brings voxels from the far border to the near one; the two don't attend to each other.
            wrapped = [tuple(p + s >= n for p, s, n in zip(at, shift, side)) for at in places]
            places = [tuple((p + s) % n for p, s, n in zip(at, shift, side)) for at in places]
            at: Any = tuple(torch.tensor(axis) for axis in zip(*places))
            tokens = self.linear(sources[:, *at], f"{name}.project")
            q = queries[:, *at] if tokens.shape[-1] == 2 * dim else tokens[..., :dim]
            k, v = tokens[..., -2 * dim : -dim], tokens[..., -dim:]
            mixed = torch.zeros_like(q)
            for head in range(num_heads):
                part = slice(head * dim // num_heads, (head + 1) * dim // num_heads)
                logits = q[..., part] @ k[..., part].transpose(1, 2) / (dim // num_heads) ** 0.5
                apart = torch.tensor([[a != b for b in wrapped] for a in wrapped])
                logits = logits + table[offset_rows, head] - 100 * apart
                mixed[..., part] = logits.softmax(-1) @ v[..., part]
            out[:, *at] = self.linear(mixed, f"{name}.output")
        return out[:, : size[0], : size[1], : size[2]]

    def block(
        self,
        x: Tensor,
        name: str,
        stage: int,
        shifted: bool,
        heads: int,
        up_skip: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        size, window = x.shape[1:4], self.cfg.windows[stage]
        shift = tuple(w // 2 if shifted else 0 for w in window)
        if any(n <= w for n, w in zip(size, window)):
            shift = (0, 0, 0)
            window = window if tuple(size) == window else tuple(min(w, *size) for w in window)
        query, source = (self.norm(t, f"{name}.norm1") for t in (up_skip or (x, x)))
        x = x + self.attention(query, source, f"{name}.attention", window, shift, heads)
        hidden = F.gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.0"))
        return x + self.linear(hidden, f"{name}.mlp.2")

    def encode(self, x: Tensor) -> list[Tensor]:
        strides = [tuple(min(p, 2) for p in self.cfg.patch), tuple(max(p // 2, 1) for p in self.cfg.patch)]
        x = x.permute(0, 2, 3, 4, 1)
        for n in range(4):
            x = self.conv(x, f"encoder.embed.convs.{n}", (1, 1, 1) if n % 2 else strides[n // 2])
            x = self.norm(x if n == 3 else F.gelu(x), f"encoder.embed.norms.{n}")
        feats = []
        for stage, depth in enumerate(self.cfg.depths):
            if stage:
                stride = self.cfg.strides[stage - 1]
                padding = [int(s == 2 and n % 2 == 0) for s, n in zip(stride, x.shape[1:4])]
                x = self.norm(F.gelu(x), f"encoder.downs.{stage - 1}.norm")
                x = self.conv(x, f"encoder.downs.{stage - 1}.conv", stride, padding)
            for n in range(depth):
                heads = self.cfg.num_heads[stage]
                x = self.block(x, f"encoder.stages.{stage}.{n}", stage, n % 2 == 1, heads, None)
            feats.append(self.norm(x, f"encoder.norms.{stage}"))
        return feats

    def decode(self, feats: list[Tensor]) -> list[Tensor]:
        """Logits, fine to coarse."""
        x, outs = feats[3], []
        heads = self.cfg.decoder_heads or self.cfg.num_heads
        for n, stage in enumerate((2, 1, 0)):
            skip, name = feats[stage], f"decoder.{n}"
            up = self.up_conv(self.norm(x, f"{name}.up.norm"), f"{name}.up.conv", skip.shape[1:4])
            x = self.block(up + skip, f"{name}.blocks.0", stage, False, heads[stage], (up, skip))
            for m in range(1, self.cfg.depths[stage]):
                x = self.block(x, f"{name}.blocks.{m}", stage, True, heads[stage], None)
            size = tuple(a * b for a, b in zip(x.shape[1:4], self.cfg.patch))
            outs.append(self.up_conv(x, f"heads.{stage}", size))
        return outs[::-1]


@pytest.mark.parametrize("options", [SMALL, DEEP], ids=["small", "deep"])
def test_equals_the_description(options: dict[str, Any]) -> None:
    net, x = small(**options), crop()
    literal = Literal(net, networks.config("nnformer", options))
    with torch.no_grad():
        feats = literal.encode(x)
        for ours, theirs in zip(net.encode(x), feats, strict=True):
            torch.testing.assert_close(ours, theirs.permute(0, 4, 1, 2, 3))
        out = net(x)
        for ours, theirs in zip([out.logits, *out.deep], literal.decode(feats), strict=True):
            torch.testing.assert_close(ours, theirs.permute(0, 4, 1, 2, 3))


def test_the_small_net_meets_every_case() -> None:
    """What the comparison above must have compared: shifted and padded windows, one window, a cut one."""
    blocks = [m for m in small().modules() if isinstance(m, nnformer.Block)]
    cfg = networks.config("nnformer", SMALL)
    assert cfg.grids == [(10, 8, 14), (5, 8, 7), (5, 4, 7), (2, 2, 3)]
    assert {b.window for b in blocks} == {(4, 3, 5), (3, 3, 2), (2, 2, 3), (2, 1, 2)}
    assert [any(b.shift) for b in blocks if b.window == (4, 3, 5)] == [False, True, False, True]


@pytest.mark.parametrize(
    ("grid", "window", "expected", "shift"),
    [
        ((32, 32, 32), (4, 4, 4), (4, 4, 4), (2, 2, 2)),
        ((8, 8, 8), (8, 8, 8), (8, 8, 8), (0, 0, 0)),
        ((12, 6, 6), (8, 8, 8), (6, 6, 6), (0, 0, 0)),
        ((6, 3, 3), (4, 4, 4), (3, 3, 3), (0, 0, 0)),
        ((6, 6, 4), (8, 8, 8), (4, 4, 4), (0, 0, 0)),
        ((14, 40, 40), (3, 5, 5), (3, 5, 5), (1, 2, 2)),
        ((7, 10, 10), (7, 10, 10), (7, 10, 10), (0, 0, 0)),
    ],
    ids=str,
)
def test_windows_of_the_released_nets(grid: Triple, window: Triple, expected: Triple, shift: Triple) -> None:
    assert nnformer.fit_window(grid, window) == (expected, shift)


@pytest.mark.parametrize("window", [(2, 2, 2), (4, 3, 5), (1, 3, 2)], ids=str)
def test_every_offset_has_a_bias_of_its_own(window: Triple) -> None:
    """In the released code different offsets share one."""
    index = nnformer.offsets(window)
    places = list(product(*(range(w) for w in window)))
    by_offset: dict[Any, set[int]] = {}
    for m, n in product(range(len(places)), repeat=2):
        offset = tuple(a - b for a, b in zip(places[m], places[n]))
        by_offset.setdefault(offset, set()).add(int(index[m, n]))
    rows = [row for found in by_offset.values() for row in found]
    assert sorted(rows) == list(range((2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)))


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 2, 0)], ids=str)
def test_windows_go_round(shift: Triple) -> None:
    x = torch.randn((2, 5, 8, 3, 4), generator=torch.Generator().manual_seed(0))
    windows = nnformer.to_windows(x, (2, 4, 3), shift)
    assert windows.shape == (2 * 3 * 2 * 1, 24, 4)
    assert torch.equal(nnformer.from_windows(windows, x.shape, (2, 4, 3), shift), x)
    if not any(shift):
        assert torch.equal(windows[1, 4 * 3 - 1], x[0, 0, 7, 2])


def test_chances_of_skipping_grow_along_the_way_down_and_again_up() -> None:
    net = small(drop_path=0.35)
    of = [
        [m.drop_prob for m in part.modules() if isinstance(m, DropPath)]
        for part in (net.encoder, net.decoder)
    ]
    assert of[0] == pytest.approx([0.05 * n for n in range(8)])
    assert of[1] == pytest.approx([0.07 * n for n in range(6)])


def test_deep_logits_in_training_alone() -> None:
    net, x = small(), crop()
    with torch.no_grad():
        trained, evaluated = net.train()(x), net.eval()(x)
    assert [tuple(d.shape[2:]) for d in trained.deep] == [(20, 16, 7), (20, 8, 7)]
    assert evaluated.deep == []
    assert torch.equal(trained.logits, evaluated.logits)
    assert len(small(deep_supervision=False).heads) == 1


def test_every_parameter_gets_a_gradient_from_all_logits() -> None:
    net = small()
    out = net(crop())
    sum(y.square().mean() for y in (out.logits, *out.deep)).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


# ---- sizes and options ---------------------------------------------------------------------------


def test_one_size_alone() -> None:
    with pytest.raises(UserError, match=r"\(16, 16, 14\).*backbone\.img_size.*\(40, 16, 14\)"):
        small()(torch.zeros(1, 2, 16, 16, 14).double())
    for row in TABLE.values():
        cfg = networks.config("nnformer", row.options)
        networks.check_size("nnformer", cfg, cfg.img_size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": [126, 128, 64]}, r"multiples of backbone\.patch .*use \(128, 128, 64\)"),
        ({"img_size": [96, 96, 8]}, r"use \(96, 96, 16\)"),
        ({"patch": [4, 4, 3]}, "1, 2 or 4"),
        ({"embed_dim": 5}, "embed_dim is 5.*multiple of 2"),
        ({"depths": [2, 2, 2]}, "depths"),
        ({"windows": [[4, 4, 4]] * 3 + [[0, 4, 4]]}, "windows"),
        ({"strides": [[2, 2, 2]] * 2}, "strides"),
        ({"strides": [[2, 2, 2]] * 2 + [[3, 2, 2]]}, "1 or 2"),
        ({"num_heads": [5, 6, 12, 24]}, "num_heads"),
        ({"decoder_heads": [5, 6, 12]}, "decoder_heads"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        networks.config("nnformer", options)


@pytest.mark.parametrize("row", TABLE)
def test_options_survive_a_file(row: str) -> None:
    cfg = networks.config("nnformer", TABLE[row].options)
    assert networks.config("nnformer", config.to_dict(cfg)) == cfg
