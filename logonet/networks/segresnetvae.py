"""SegResNet with its variational autoencoder (Myronenko 2018): MONAI's, with the interface of `Network`.

Letters: B batch, C input channels, F features, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, MultipleOf
from torch import Tensor

from logonet.core.config import Count, Positive
from logonet.core.errors import UserError
from logonet.networks import SegOut, Triple, check_img_size, segresnet

TINY: dict[str, Any] = {**segresnet.TINY, "img_size": (32, 32, 32), "vae_nz": 4}


@dataclass(frozen=True)
class Config(segresnet.Config):
    """The defaults are the SegResNetVAE of LoGoNet's Table 1, but for the two options of the loss.

    Attributes:
        img_size: the one crop size (X, Y, Z in voxels) the net takes: the autoencoder has linear layers.
        vae_nz: latent variables.
        vae_estimate_std: learn their standard deviations, as Myronenko does. Without, as in MONAI's default,
            they are 0.3, and the layer that would estimate them, which counts in Table 1, is left out.
        vae_weight: of the autoencoder's loss (squared error of the reconstruction plus the latent variables'
            divergence from a normal distribution) beside the segmentation's; Myronenko's is 0.1.
    """

    init_filters: Annotated[int, Ge(segresnet.GROUPS), MultipleOf(segresnet.GROUPS)] = 8
    img_size: tuple[int, int, int] = (96, 96, 96)
    vae_nz: Count = 256
    vae_estimate_std: bool = True
    vae_weight: Positive = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        multiple = 2 * self.strides[-1]  # the autoencoder halves the coarsest feature once more
        if any(side < multiple or side % multiple for side in self.img_size):
            raise UserError(
                f"backbone.img_size is {self.img_size}; its sides must be multiples of {multiple}"
            )


def size_multiple(cfg: Config) -> Triple:
    return (2 * cfg.strides[-1],) * 3


class SegResNetVAE(segresnet.SegResNet):
    """3,863,471 parameters and 15.51 G multiply-accumulates (as thop counts) at 96^3 with 14 classes.

    The autoencoder runs in training alone, where it gives ``SegOut.aux_loss``; its latent variables are drawn
    from torch's global random state. It counts as head, so pretraining leaves it out.
    """

    def __init__(self, cfg: Config, in_channels: int, num_classes: int) -> None:
        from monai.networks.nets import SegResNetVAE as Wrapped

        options = segresnet.options(cfg, in_channels, num_classes)
        net = Wrapped(cfg.img_size, cfg.vae_estimate_std, vae_nz=cfg.vae_nz, **options)
        if not cfg.vae_estimate_std:
            del net.vae_fc2  # nothing reads it, so no gradient would ever reach it
        super().__init__(cfg, net)
        self.cfg = cfg
        vae = (f"net.{name}." for name, _ in net.named_children() if name.startswith("vae_"))
        self.head_prefixes = (*segresnet.SegResNet.head_prefixes, *vae)

    def decode(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> SegOut:
        """Raises UserError in training when the crop is not of the size the net was built for."""
        out = super().decode(x_BCXYZ, feats)
        if not self.training:
            return out
        # Of another size MONAI would take one crop for several.
        check_img_size("segresnetvae", self.cfg.img_size, x_BCXYZ.shape[2:])
        vae_loss = self.net._get_vae_loss(x_BCXYZ, feats[-1])
        return out._replace(aux_loss=self.cfg.vae_weight * vae_loss)


build = SegResNetVAE
