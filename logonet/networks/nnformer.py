"""nnFormer (Zhou et al. 2021): windows of attention in the encoder, in the decoder and across the skips.

Letters: B batch, C input channels, D width of a stage (E of the first), F features, K classes, XYZ the crop's or
a map's axes (xyz those of the first stage), W windows (those of all samples), N tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt, MultipleOf
from einops import rearrange
from torch import Tensor, nn

from logonet.core.config import Count, Section, SizeVox
from logonet.core.errors import UserError
from logonet.networks import SegOut, TokenNetwork, Triple, check_img_size
from logonet.networks._conv import channels_first, channels_last
from logonet.networks._shared import check_heads, total_strides, upwards

PatchSide = Literal[1, 2, 4]
Stride = tuple[Literal[1, 2], Literal[1, 2], Literal[1, 2]]

# The last stride keeps the coarsest map at four tokens a side: fewer make windows in which little can happen.
TINY: dict[str, Any] = {
    "img_size": (32, 32, 32),
    "patch": (2, 2, 2),
    "embed_dim": 8,
    "num_heads": (1, 2, 2, 4),
    "windows": ((4, 4, 4),) * 4,
    "strides": ((2, 2, 2), (2, 2, 2), (1, 1, 1)),
    "drop_path": 0.0,
    "deep_supervision": False,
}


@dataclass(frozen=True)
class Config(Section, key="backbone"):
    """The defaults are the published net for abdominal CT (Synapse), its axes in this project's order.

    Attributes:
        img_size: the one crop size (X, Y, Z in voxels) the net takes: windows and shifts depend on it.
        patch: voxels of a token along X, Y and Z; each 1, 2 or 4.
        embed_dim: width of the first stage; each later one doubles it.
        depths: blocks of each of the four stages; every second one is shifted. The decoder mirrors the
            first three.
        num_heads: attention heads of each stage.
        decoder_heads: of the decoder's three levels, fine to coarse; None is those of the same stages. The
            published net for brain tumours has twice as many.
        windows: tokens of a window along X, Y and Z, in each stage.
        strides: between the stages; each 1 or 2.
        drop_path: chance to skip a branch of the last block, for one sample; earlier blocks less often.
        deep_supervision: give logits of the decoder's two coarser levels in training.
    """

    img_size: Triple = (128, 128, 64)
    patch: tuple[PatchSide, PatchSide, PatchSide] = (4, 4, 2)
    embed_dim: Annotated[int, Ge(2), MultipleOf(2)] = 192
    depths: tuple[Count, Count, Count, Count] = (2, 2, 2, 2)
    num_heads: tuple[Count, Count, Count, Count] = (6, 12, 24, 48)
    decoder_heads: tuple[Count, Count, Count] | None = None
    windows: tuple[SizeVox, SizeVox, SizeVox, SizeVox] = ((4, 4, 4), (4, 4, 4), (8, 8, 8), (4, 4, 4))
    strides: tuple[Stride, Stride, Stride] = ((2, 2, 2), (2, 2, 2), (2, 2, 2))
    drop_path: Annotated[float, Ge(0), Lt(1)] = 0.2
    deep_supervision: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads("num_heads", self.num_heads, self.dims)
        check_heads("decoder_heads", self.heads_up, self.dims)
        least = self.total_strides[-1]
        sides = list(zip(self.img_size, least, self.patch))
        if any(side < low or side % p for side, low, p in sides):
            near = tuple(max(-(-side // p) * p, low) for side, low, p in sides)
            raise UserError(
                f"backbone.img_size is {self.img_size}; its sides must be multiples of backbone.patch "
                f"{self.patch} and at least {least}; use {near}"
            )

    @property
    def dims(self) -> list[int]:
        """Width of each stage."""
        return [self.embed_dim * 2**stage for stage in range(4)]

    @property
    def heads_up(self) -> tuple[int, ...]:
        """Attention heads of the decoder's levels, fine to coarse."""
        return self.num_heads[:3] if self.decoder_heads is None else self.decoder_heads

    @property
    def grids(self) -> list[Triple]:
        """Tokens along X, Y and Z in each stage."""
        x, y, z = (side // p for side, p in zip(self.img_size, self.patch))
        grids = [(x, y, z)]
        for sx, sy, sz in self.strides:
            x, y, z = x // sx, y // sy, z // sz
            grids.append((x, y, z))
        return grids

    @property
    def total_strides(self) -> list[Triple]:
        """Voxels of the crop per token in each stage."""
        return total_strides([self.patch, *self.strides])


def size_multiple(cfg: Config) -> Triple:
    """The patch: a map of odd side loses its last token when it is halved and gets one back when it is doubled, as
    in the published net for ACDC."""
    return cfg.patch


class NnFormer(TokenNetwork):
    """150,054,210 parameters and 212.7 G multiply-accumulates (352.1 G as thop counts) for a crop of
    128 x 128 x 64 and 14 classes with deep supervision.

    Features: the four stages, each normalised. The classifier, a transposed convolution as large as a patch,
    goes from tokens to voxels at once, so there are no features between: `decode_features` interpolates the
    tokens' (trilinear; that many channels at full resolution take much memory).
    """

    encoder_prefixes = ("encoder.",)
    head_prefixes = ("heads.",)

    def __init__(self, cfg: Config, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg, in_channels)
        # Coarse to fine; the chance of skipping a branch grows along that way again.
        rates = zip((2, 1, 0), drop_rates(cfg.drop_path, cfg.depths[2::-1]), strict=True)
        self.decoder = nn.ModuleList(UpStage(cfg, stage, rate) for stage, rate in rates)
        dims, patch = cfg.dims[: 3 if cfg.deep_supervision else 1], cfg.patch
        self.heads = nn.ModuleList(nn.ConvTranspose3d(dim, num_classes, patch, patch) for dim in dims)
        self.channels, self.strides = tuple(cfg.dims), tuple(cfg.total_strides)
        self.feature_channels = self.embed_channels = cfg.embed_dim
        self.embed_stride = cfg.patch

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        """Raises UserError when the crop is not of the size the net was built for."""
        check_img_size("nnformer", self.cfg.img_size, x_BCXYZ.shape[2:])
        return self.encoder(self.encoder.embed(x_BCXYZ))

    def encode_hidden(self, x_BCXYZ: Tensor, hidden_Bxyz: Tensor, token_E: Tensor) -> list[Tensor]:
        """Raises UserError when the crop is not of the size the net was built for.

        The convolutions that make tokens overlap: mask the crop too, or its hidden voxels reach their neighbours.
        """
        check_img_size("nnformer", self.cfg.img_size, x_BCXYZ.shape[2:])
        tokens_BxyzE = self.encoder.embed(x_BCXYZ)
        token_E = token_E.to(tokens_BxyzE.dtype)
        return self.encoder(torch.where(hidden_Bxyz[..., None], token_E, tokens_BxyzE))

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        finest = upwards(self.decoder, feats)[0]
        return F.interpolate(finest, x_BCXYZ.shape[2:], mode="trilinear", align_corners=False)

    def decode(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> SegOut:
        heads, levels = self._used_heads(), upwards(self.decoder, feats)
        logits, *deep = [head(level) for head, level in zip(heads, levels)]
        return SegOut(logits, deep, None)

    def _used_heads(self) -> list[nn.Module]:
        return list(self.heads) if self.training else [self.heads[0]]


class Encoder(nn.Module):
    def __init__(self, cfg: Config, in_channels: int) -> None:
        super().__init__()
        self.embed = PatchEmbedding(cfg, in_channels)
        rates = drop_rates(cfg.drop_path, cfg.depths)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                Block(cfg, stage, cfg.num_heads[stage], rate, shifted=n % 2 == 1)
                for n, rate in enumerate(rates[stage])
            )
            for stage in range(4)
        )
        self.downs = nn.ModuleList(down(cfg, stage) for stage in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in cfg.dims)

    def forward(self, tokens_BxyzE: Tensor) -> list[Tensor]:
        """The stages' features from the tokens that ``embed`` makes of a crop."""
        x = tokens_BxyzE
        feats = []
        for n, (stage, norm) in enumerate(zip(self.stages, self.norms)):
            x = self.downs[n - 1](F.gelu(x)) if n else x
            for block in cast(nn.ModuleList, stage):
                x = block(x)
            feats.append(channels_first(norm(x)))
        return feats


class PatchEmbedding(nn.Module):
    """Two pairs of convolutions; the first of each pair strides. The released net's four convolutions are
    what its parameters count."""

    def __init__(self, cfg: Config, in_channels: int) -> None:
        super().__init__()
        half, dim = cfg.embed_dim // 2, cfg.embed_dim
        first: Any = tuple(min(p, 2) for p in cfg.patch)
        second: Any = tuple(p // f for p, f in zip(cfg.patch, first))
        widths = (half, half, dim, dim)
        convs = zip((in_channels, *widths), widths, (first, 1, second, 1))
        self.convs = nn.ModuleList(nn.Conv3d(a, b, 3, stride, 1) for a, b, stride in convs)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        x = x_BCXYZ
        for n, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            tokens_BXYZD = channels_last(conv(x))
            tokens_BXYZD = norm(F.gelu(tokens_BXYZD) if n < 3 else tokens_BXYZD)
            x = channels_first(tokens_BXYZD)
        return tokens_BXYZD


class Resample(nn.Module):
    """Normalisation, then a convolution that changes the resolution."""

    def __init__(self, dim: int, conv: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = conv

    def forward(self, x_BXYZD: Tensor) -> Tensor:
        return channels_last(self.conv(channels_first(self.norm(x_BXYZD))))


def down(cfg: Config, stage: int) -> Resample:
    """By a strided convolution from ``stage`` to the next."""
    dim, stride, grid = cfg.dims[stage], cfg.strides[stage], cfg.grids[stage]
    kernel = tuple(3 if s == 2 else 1 for s in stride)
    # Without padding an odd side halves downwards.
    padding = tuple(1 if s == 2 and n % 2 == 0 else 0 for s, n in zip(stride, grid))
    return Resample(dim, nn.Conv3d(dim, 2 * dim, kernel, stride, padding))  # type: ignore[arg-type]


def up(cfg: Config, stage: int) -> Resample:
    """By a transposed convolution from the stage below to ``stage``."""
    dim, stride = cfg.dims[stage], cfg.strides[stage]
    # The token that an odd side lost on the way down consists of the bias alone.
    lost: Any = tuple(n % s for n, s in zip(cfg.grids[stage], stride))
    return Resample(2 * dim, nn.ConvTranspose3d(2 * dim, dim, stride, stride, output_padding=lost))


class UpStage(nn.Module):
    """Up, skip attention, then attention within the sum of both. The released net shifts all but the first
    block."""

    def __init__(self, cfg: Config, stage: int, rates: Sequence[float]) -> None:
        super().__init__()
        self.up = up(cfg, stage)
        self.blocks = nn.ModuleList(
            Block(cfg, stage, cfg.heads_up[stage], rate, shifted=n > 0, skip=n == 0)
            for n, rate in enumerate(rates)
        )

    def forward(self, x_BDXYZ: Tensor, skip_BDXYZ: Tensor) -> Tensor:
        up, skip = self.up(channels_last(x_BDXYZ)), channels_last(skip_BDXYZ)
        x = self.blocks[0](up + skip, up, skip)
        for block in self.blocks[1:]:
            x = block(x)
        return channels_first(x)


class Block(nn.Module):
    """Attention within windows and an MLP, a residual around each, normalisation before it.

    With ``skip`` the queries are the upsampled tokens themselves and the keys and values those of the skip,
    all normalised alike.
    """

    def __init__(
        self, cfg: Config, stage: int, num_heads: int, drop_rate: float, shifted: bool, skip: bool = False
    ) -> None:
        super().__init__()
        from monai.networks.layers.drop_path import DropPath
        from monai.networks.nets.swin_unetr import compute_mask

        dim, grid = cfg.dims[stage], cfg.grids[stage]
        self.window, shift = fit_window(grid, cfg.windows[stage])
        self.shift = shift if shifted else (0, 0, 0)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads, self.window, skip)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop_path = DropPath(drop_rate)
        # (windows, N, N): -100 between tokens that the roll brought together from opposite borders, else 0.
        mask: Tensor | None = None
        if any(self.shift):
            padded = [-(-n // w) * w for n, w in zip(grid, self.window)]
            mask = compute_mask(padded, self.window, self.shift, torch.get_default_device())
        self.register_buffer("mask", mask, persistent=False)

    def forward(
        self, x_BXYZD: Tensor, up_BXYZD: Tensor | None = None, skip_BXYZD: Tensor | None = None
    ) -> Tensor:
        query = x_BXYZD if up_BXYZD is None else up_BXYZD
        sources = [query] if skip_BXYZD is None else [query, skip_BXYZD]
        windows = [to_windows(self.norm1(source), self.window, self.shift) for source in sources]
        attended = self.attention(*windows, mask=self.mask)
        x = x_BXYZD + self.drop_path(from_windows(attended, x_BXYZD.shape, self.window, self.shift))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head attention within windows, with a learnt bias for each head and offset of two tokens."""

    offsets: Tensor

    def __init__(self, dim: int, num_heads: int, window: Triple, skip: bool) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.project = nn.Linear(dim, (2 if skip else 3) * dim)
        self.bias = nn.Parameter(torch.empty(math.prod(2 * w - 1 for w in window), num_heads))
        self.register_buffer("offsets", offsets(window), persistent=False)
        self.softmax = nn.Softmax(dim=-1)
        self.output = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, x_WND: Tensor, skip_WND: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            x_WND: tokens of the windows, or with a skip its queries.
            mask: (windows of one sample, N, N), added to the logits.
        """
        if skip_WND is None:
            q, k, v = (self._heads(part) for part in self.project(x_WND).chunk(3, dim=-1))
        else:
            q = self._heads(x_WND)
            k, v = (self._heads(part) for part in self.project(skip_WND).chunk(2, dim=-1))
        bias_HNN = self.bias[self.offsets].permute(2, 0, 1)
        logits_WHNN = (q * self.scale) @ k.transpose(-2, -1) + bias_HNN
        if mask is not None:
            logits_WHNN = (logits_WHNN.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        out_WHND = self.softmax(logits_WHNN) @ v
        return self.output(out_WHND.transpose(1, 2).flatten(2))

    def _heads(self, x_WND: Tensor) -> Tensor:
        return x_WND.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def drop_rates(highest: float, depths: Sequence[int]) -> list[list[float]]:
    """From 0 to ``highest`` evenly over all blocks, by stage."""
    rates = iter([highest * n / max(sum(depths) - 1, 1) for n in range(sum(depths))])
    return [[next(rates) for _ in range(depth)] for depth in depths]


def fit_window(grid: Triple, window: Triple) -> tuple[Triple, Triple]:
    """The window to use on a map of ``grid`` tokens, and the shift of a shifted block.

    A map as large as the window is one window. Else, where a side of it fits into the window, the released net
    cuts the window to the shortest side of the map and shifts nowhere.
    """
    if grid == window:
        return window, (0, 0, 0)
    if any(n <= w for n, w in zip(grid, window)):
        x, y, z = (min(w, *grid) for w in window)
        return (x, y, z), (0, 0, 0)
    x, y, z = (w // 2 for w in window)
    return window, (x, y, z)


def to_windows(x_BXYZD: Tensor, window: Triple, shift: Triple) -> Tensor:
    """Tokens (W, N, D) of the windows, those of one sample together. What is padded is zero, and attended to."""
    _, nx, ny, nz, _ = x_BXYZD.shape
    wx, wy, wz = window
    x = F.pad(x_BXYZD, (0, 0, 0, -nz % wz, 0, -ny % wy, 0, -nx % wx))
    x = torch.roll(x, [-s for s in shift], (1, 2, 3)) if any(shift) else x
    return rearrange(x, "b (x wx) (y wy) (z wz) d -> (b x y z) (wx wy wz) d", wx=wx, wy=wy, wz=wz)


def from_windows(x_WND: Tensor, shape: Sequence[int], window: Triple, shift: Triple) -> Tensor:
    """Undo `to_windows`; ``shape`` is that of its input."""
    _, nx, ny, nz, _ = shape
    sizes = dict(zip("xyz", (-(-n // w) for n, w in zip((nx, ny, nz), window))), wx=window[0], wy=window[1])
    x = rearrange(x_WND, "(b x y z) (wx wy wz) d -> b (x wx) (y wy) (z wz) d", **sizes)
    x = torch.roll(x, shift, (1, 2, 3)) if any(shift) else x
    return x[:, :nx, :ny, :nz]


def offsets(window: Triple) -> Tensor:
    """(N, N): a number for each offset between two tokens of a window.

    The released code's factor for the first axis is 3 w - 1, by which different offsets share a bias; its
    table has a row for each of them all the same.
    """
    wx, wy, wz = window
    axes = [torch.arange(w) for w in window]
    at_N3 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    dx, dy, dz = (at_N3[:, None] - at_N3[None, :]).unbind(-1)
    return ((dx + wx - 1) * (2 * wy - 1) + dy + wy - 1) * (2 * wz - 1) + dz + wz - 1


build = NnFormer
