"""nnU-Net: MONAI's DynUNet (Isensee et al. 2018), with the interface of `Network`.

Letters: B batch, C input channels, F features, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from logonet.core.config import Count, Section, SizeVox
from logonet.core.errors import UserError
from logonet.networks import Network, SegOut, Triple
from logonet.networks._shared import Norm, chained, check_groups, norm_name, total_strides, upwards

TINY: dict[str, Any] = {
    "kernel_size": ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
    "filters": (4, 8, 12, 16),
    "norm": "group",
}


@dataclass(frozen=True)
class Config(Section, key="backbone"):
    """The defaults are the nnU-Net of LoGoNet's Table 1.

    Attributes:
        kernel_size: of each level, fine to coarse, along X, Y and Z; odd.
        strides: of each level; that of the first is 1, so features keep the crop's resolution.
            Table 1's leave the first axis alone where the others are halved, as suits crops that are
            coarse along X; for thick slices along Z mirror both lists.
        filters: width of each level; None is nnU-Net's 32, 64, 128, 256, 320, 320.
        norm: "instance" in Table 1; nnU-Net's own is "instance_affine".
        deep_supervision: give auxiliary logits in training.
        deep_supr_num: of how many levels below the first.
    """

    kernel_size: tuple[SizeVox, ...] = ((1, 3, 3), *((3, 3, 3),) * 5)
    strides: tuple[SizeVox, ...] = ((1, 1, 1), (1, 2, 2), *((2, 2, 2),) * 3, (1, 2, 2))
    filters: tuple[Count, ...] | None = None
    norm: Norm = "instance"
    deep_supervision: bool = False
    deep_supr_num: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.strides)
        if levels < 3 or len(self.kernel_size) != levels:
            raise UserError(
                f"backbone.strides has {levels} entries and backbone.kernel_size {len(self.kernel_size)}; "
                "give both the same number, at least 3"
            )
        if self.strides[0] != (1, 1, 1):
            raise UserError(f"backbone.strides begins with {self.strides[0]}; it must begin with (1, 1, 1)")
        for kernel, stride in zip(self.kernel_size, self.strides):
            if any(k % 2 == 0 or s > k + 1 for k, s in zip(kernel, stride)):
                raise UserError(
                    f"backbone.kernel_size {kernel} cannot go with backbone.strides {stride}; kernels must be "
                    "odd and at least as long as their stride less one"
                )
        if len(self.widths) != levels:
            raise UserError(f"backbone.filters has {len(self.widths)} entries; give {levels}, one per stride")
        check_groups("filters", self.widths, self.norm)
        if self.deep_supervision and self.deep_supr_num > levels - 2:
            raise UserError(
                f"backbone.deep_supr_num is {self.deep_supr_num}; it must be at most {levels - 2}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Of each level, fine to coarse."""
        return self.filters or tuple(min(32 * 2**level, 320) for level in range(len(self.strides)))


def size_multiple(cfg: Config) -> Triple:
    return total_strides(cfg.strides)[-1]


class DynUNet(Network):
    """30,745,326 parameters and 312.96 G multiply-accumulates (as thop counts) at 96^3 with 14 classes.

    The 1250.65 G of LoGoNet's Table 1 are an artefact: MONAI registers every block but the last at two
    places of its module tree, and thop hangs a counter on both and then adds both up twice.

    In training with deep supervision ``SegOut.deep`` holds each head's logits at its own level's size,
    which MONAI upsamples (nearest) and stacks onto the final ones. Features: the encoder's levels.
    """

    def __init__(self, cfg: Config, in_channels: int, num_classes: int) -> None:
        super().__init__()
        from monai.networks.nets import DynUNet as Wrapped

        levels = (cfg.kernel_size, cfg.strides, cfg.strides[1:], cfg.widths)
        deep: Any = {"deep_supervision": cfg.deep_supervision, "deep_supr_num": cfg.deep_supr_num}
        self.net: Any = Wrapped(3, in_channels, num_classes, *levels, norm_name=norm_name(cfg.norm), **deep)
        # The recursion of MONAI's forward: the same blocks a second time, which would put every tensor
        # into the state dict twice. safetensors refuses that, and MONAI loads its own weights without.
        del self.net.skip_layers
        self.channels, self.strides = cfg.widths, tuple(total_strides(cfg.strides))
        self.feature_channels = cfg.widths[0]
        self.encoder_prefixes = ("net.input_block.", "net.downsamples.", "net.bottleneck.")
        heads = ("net.deep_supervision_heads.",) if cfg.deep_supervision else ()
        self.head_prefixes = ("net.output_block.", *heads)

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        return chained([self.net.input_block, *self.net.downsamples, self.net.bottleneck], x_BCXYZ)

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        return upwards(self.net.upsamples, feats)[0]

    def decode(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> SegOut:
        finest, *coarser = upwards(self.net.upsamples, feats)
        deep = []
        if self.training and self.net.deep_supervision:
            deep = [head(level) for head, level in zip(self.net.deep_supervision_heads, coarser)]
        return SegOut(self.net.output_block(finest), deep, None)


build = DynUNet
