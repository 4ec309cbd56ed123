"""Masked slices, many clusterers: the pretraining of Masked LoGoNet (KDD 2024, sections 3.3 and 4.1).

Patches in chains of slices are hidden; the network predicts, for every slice of a chain, the label each
of N K-means clusterers gave to the whole slice.

Shapes: B samples, C input channels, F feature channels, X Y Z the crop's axes (Z slices), N clusterers,
K the largest number of clusters, S masked slices of the batch, P rows (positions), D columns (features).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logonet.core.config import OMIT_DEFAULT, Count, Fraction, NonNegative, Positive, Section
from logonet.core.errors import UserError
from logonet.methods import DataSpec, _chain_masks
from logonet.methods._cluster_head import Head
from logonet.methods._masked import masked_error
from logonet.methods._parts import MethodModule, freeze, freeze_unreached, intensity, ratio, sums
from logonet.methods._pooled_head import PooledHead
from logonet.networks import Network

NEEDS = frozenset({"crops", "pseudo_labels"})
BYPASS_SCORE = "accuracy"
NO_LABEL = -1


@dataclass(frozen=True)
class Config(Section, key="method"):
    """Defaults are the paper's Table 2.

    Attributes:
        masking: the paper's Table 11, on BTCV's gallbladder and oesophagus. "chains" ("w/ M": Dice .866 and .845)
            hides patches of chained slices; "none" ("wo/ M": .845, .802) hides nothing; "mixed" ("w/ M + wo/ M":
            .851, .820) hides them in half of the crops, drawn at random. The slices that are chosen and predicted
            are the same under all three.
        phi1: probability that a slice is chosen.
        chain_length: M, a chosen slice and its M - 1 predecessors are masked.
        phi2: probability that a patch of a masked slice is hidden.
        patch_sizes: sides in voxels; each masked slice draws one that fits.
        temperature: tau of Eq. 5.
        reduction: "sum" over clusterers and masked slices (Eq. 4), or "mean".
        final_relu: Algorithm 1, line 20. A slice whose true cluster's logit is not positive sends that
            logit no gradient, and in tiny runs about a third of the training slices stay unlearnt for
            good; False lets the logits be negative and the same runs learn every slice.
        head_chunk_mib: the widest map the head holds at once. Memory only, never results.
        head_keep: hold the output of Algorithm 1's line 9 for the backward pass (at full size 1.4 GiB a sample in
            float32) instead of computing it three more times. Memory only, never results.
        head: "algorithm1" is the paper's, on the decoder; "pooled" sees the encoder alone (`PooledHead`), and the
            decoder is neither run nor trained; "both" adds up their losses.
        hide_image: give the decoder an image of mask tokens alone, so that skips from the image tell it nothing.
        reconstruction: weight of one more loss, the mean squared error of the hidden voxels as a 1x1x1 convolution on
            the decoder's features rebuilds them; beside the mean loss of a label, whatever ``reduction`` is.
    """

    masking: Literal["chains", "none", "mixed"] = "chains"
    phi1: Fraction = 0.1
    chain_length: Count = 5
    phi2: Fraction = 0.7
    patch_sizes: tuple[Count, ...] = (1, 2, 4, 8, 16, 32, 96)
    temperature: Positive = 0.1
    reduction: Literal["sum", "mean"] = "sum"
    final_relu: bool = True
    head_chunk_mib: Positive = 128.0
    head_keep: bool = field(default=True, metadata=OMIT_DEFAULT)
    head: Literal["algorithm1", "pooled", "both"] = field(default="algorithm1", metadata=OMIT_DEFAULT)
    hide_image: bool = field(default=False, metadata=OMIT_DEFAULT)
    reconstruction: NonNegative = field(default=0.0, metadata=OMIT_DEFAULT)

    @property
    def decodes(self) -> bool:
        """Whether anything looks at the decoder."""
        return self.head != "pooled" or self.reconstruction > 0


def check(cfg: Config, data_spec: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on crops and clusterers like these."""
    _chain_masks.check_chains(data_spec.size_vox[2], cfg.chain_length)
    _chain_masks.check_patches(data_spec.size_vox[:2], cfg.patch_sizes)
    if not data_spec.cluster_sizes:
        raise UserError("masked_clusters predicts pseudo-labels and there are no clusterers; fit them first")
    if data_spec.majority_labels and len(data_spec.majority_labels) != len(data_spec.cluster_sizes):
        raise UserError(
            f"{len(data_spec.majority_labels)} majority labels for {len(data_spec.cluster_sizes)} clusterers; "
            "label the crops again with these clusterers"
        )
    if cfg.reconstruction and cfg.masking == "none":
        raise UserError(
            "method.reconstruction rebuilds hidden voxels and method.masking=none hides none; set it to 0"
        )
    if cfg.hide_image and not cfg.decodes:
        raise UserError(
            "method.hide_image hides the image from the decoder, which method.head=pooled does not run; set it to false"
        )


def prepare(sample: Mapping[str, Any], cfg: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw what to hide.

    Returns:
        ``image`` uint16 (C, X, Y, Z) untouched, ``hidden`` bool (X, Y, Z), ``chain`` bool (Z,) the chosen
        slices, ``labels`` int16 (N, Z), ``patch_size`` int16 (Z,) in voxels for pictures. The hidden
        voxels are replaced on the device, because their value is learnt.
    """
    image_CXYZ = sample["image_CXYZ"]
    _, *size_xy, num_z = image_CXYZ.shape
    chain_Z = _chain_masks.draw_chains(num_z, cfg.phi1, cfg.chain_length, rng)
    drawn = _chain_masks.draw_patches(tuple(size_xy), chain_Z, cfg.patch_sizes, cfg.phi2, rng)
    hidden_XYZ, patch_size_Z = drawn
    # The paper says no more of "wo/ M" than "pretraining without masking". Masking (3.3.1) is two steps, choosing
    # chains and distorting their slices, and what Table 11 is said to show is the worth of "distorting": only that
    # step is left out, so the loss (Eq. 4) has as many terms as before. Predicting all slices instead would change
    # how many there are, and with them the size of the gradient. "w/ M + wo/ M" is read as masking half of the
    # crops, which costs no second pass. Drawn last, so that chains are the same under all three.
    if cfg.masking == "none" or (cfg.masking == "mixed" and rng.random() < 0.5):
        hidden_XYZ, patch_size_Z = np.zeros_like(hidden_XYZ), np.zeros_like(patch_size_Z)
    return {
        "image": image_CXYZ,
        "hidden": hidden_XYZ,
        "chain": chain_Z,
        "labels": sample["labels_NZ"],
        "patch_size": patch_size_Z,
    }


class MaskedClusters(MethodModule[Config]):
    """Backbone, mask token and heads; ``forward`` as the package's contract says."""

    cluster_sizes: Tensor
    majority_labels: Tensor

    def __init__(self, cfg: Config, network: Network, data_spec: DataSpec) -> None:
        super().__init__(cfg, network)
        if cfg.decodes:
            freeze(network, network.head_prefixes)
        else:
            x = torch.empty(1, data_spec.in_channels, *data_spec.size_vox, device="meta")
            freeze_unreached(network, lambda net: torch.stack([feat.sum() for feat in net.encode(x)]))
        # The paper masks "by the method of" SimMIM, whose masked patches carry a learnt token. Before any
        # embedding a token is one scalar per channel; 0 is the window's darkest value, air in CT.
        token_C = torch.zeros(data_spec.in_channels)
        self.mask_token = nn.Parameter(token_C, requires_grad=cfg.masking != "none")
        sizes, (_, _, num_z) = data_spec.cluster_sizes, data_spec.size_vox
        self.head: Any = None
        if cfg.head != "pooled":
            shape = (network.feature_channels, data_spec.size_vox, len(sizes), max(sizes))
            self.head = Head(*shape, cfg.head_chunk_mib, cfg.final_relu, cfg.head_keep)
        self.pooled_head: Any = None
        if cfg.head != "algorithm1":
            self.pooled_head = PooledHead(network.channels, num_z, len(sizes), max(sizes))
        self.rebuild: Any = None
        if cfg.reconstruction:
            self.rebuild = nn.Conv3d(network.feature_channels, data_spec.in_channels, 1)
        self.register_buffer("cluster_sizes", torch.tensor(sizes), persistent=False)
        self.register_buffer("majority_labels", torch.tensor(data_spec.majority_labels), persistent=False)

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns; they do not depend on ``progress``."""
        chain_BZ, hidden_BXYZ = batch["chain"], batch["hidden"]
        image_BCXYZ = intensity(batch["image"])
        feats, heads, rebuilt_BCXYZ = self._outputs(image_BCXYZ, hidden_BXYZ)
        # Of all slices, as CUDA would have to be waited for to learn how many are masked: the others have no label.
        labels_BZN = batch["labels"].transpose(1, 2).long().masked_fill(~chain_BZ[..., None], NO_LABEL)
        nll = [cluster_nll(h, labels_BZN, self.cluster_sizes, self.cfg.temperature).sum() for h in heads]
        total = torch.stack(nll).sum()
        num_slices = chain_BZ.sum()
        num_labels = num_slices * labels_BZN.shape[2]
        metrics = self._metrics(heads[0], labels_BZN, num_slices)
        if len(heads) > 1:
            metrics["accuracy_pooled"] = self._metrics(heads[1], labels_BZN, num_slices)["accuracy"]
        if rebuilt_BCXYZ is not None:
            mse_B = masked_error(rebuilt_BCXYZ, image_BCXYZ, hidden_BXYZ[:, None], squared=True)
            # As many times as the sample has labels, of which Eq. 4 is the sum.
            num_labels_B = chain_BZ.sum(1) * labels_BZN.shape[2]
            total = total + self.cfg.reconstruction * (mse_B * num_labels_B).sum()
            metrics |= sums(len(mse_B), reconstruction_mse=mse_B)
        # Eq. 4 is one sample's sum. Its mean over samples makes a batch of two on one device equal a
        # batch of one on two devices, whose gradients are averaged.
        loss = total / (len(chain_BZ) if self.cfg.reduction == "sum" else num_labels)
        metrics["loss"] = ratio(total, num_labels)
        metrics["masked_share"] = ratio(hidden_BXYZ.sum(), hidden_BXYZ.numel())
        metrics["embeddings_BF"] = feats[-1].detach().float().mean(dim=(2, 3, 4))
        return loss, metrics

    def predict(self, image_BCXYZ: Tensor, hidden_BXYZ: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """Encoder features and the first head's logits_BZNK of images in [0, 1] whose hidden voxels nothing sees."""
        feats, heads, _ = self._outputs(image_BCXYZ, hidden_BXYZ)
        return feats, heads[0]

    def _outputs(
        self, image_BCXYZ: Tensor, hidden_BXYZ: Tensor
    ) -> tuple[Sequence[Tensor], list[Tensor], Tensor | None]:
        """Encoder features, each head's logits_BZNK, and the images as rebuilt, (B, C, X, Y, Z)."""
        token_C111 = self.mask_token[:, None, None, None]
        x_BCXYZ = torch.where(hidden_BXYZ[:, None], token_C111, image_BCXYZ)
        feats = self.backbone.encode(x_BCXYZ)
        heads, rebuilt_BCXYZ = [], None
        if self.cfg.decodes:
            shown_BCXYZ = token_C111.expand_as(x_BCXYZ).contiguous() if self.cfg.hide_image else x_BCXYZ
            dense_BFXYZ = self.backbone.decode_features(shown_BCXYZ, feats)
            heads += [] if self.head is None else [self.head(dense_BFXYZ)]
            rebuilt_BCXYZ = None if self.rebuild is None else self.rebuild(dense_BFXYZ)
        heads += [] if self.pooled_head is None else [self.pooled_head(feats)]
        return feats, heads, rebuilt_BCXYZ

    @torch.no_grad()
    def _metrics(self, logits_BZNK: Tensor, labels_BZN: Tensor, num_slices: Tensor) -> dict[str, Tensor]:
        guess_BZN = only_own_clusters(logits_BZNK, self.cluster_sizes).argmax(-1)
        right_N, num_labels = guess_BZN.eq(labels_BZN).sum((0, 1)), num_slices * labels_BZN.shape[2]
        metrics = {"accuracy": ratio(right_N.sum(), num_labels)}
        metrics["accuracy_per_clusterer"] = ratio(right_N, num_slices)
        if len(self.majority_labels):
            # What always answering the most frequent label would score on these very slices.
            floor = labels_BZN.eq(self.majority_labels).sum()
            metrics["accuracy_floor"] = ratio(floor, num_labels)
        return metrics


def only_own_clusters(logits_NK: Tensor, cluster_sizes_N: Tensor) -> Tensor:
    """The head gives K logits to every clusterer; those beyond a clusterer's own clusters become -inf."""
    beyond_NK = torch.arange(logits_NK.shape[-1], device=logits_NK.device) >= cluster_sizes_N[:, None]
    return logits_NK.float().masked_fill(beyond_NK, float("-inf"))


def cluster_nll(logits_NK: Tensor, labels_N: Tensor, cluster_sizes_N: Tensor, temperature: float) -> Tensor:
    """-log p_i(e | x_j) of Eq. 5 for every slice j, whatever axes they have before N, and clusterer i.

    0, and without a gradient, where the label is NO_LABEL.
    """
    scaled = only_own_clusters(logits_NK, cluster_sizes_N).flatten(0, -2) / temperature
    nll = F.cross_entropy(scaled, labels_N.flatten(), reduction="none", ignore_index=NO_LABEL)
    return nll.view_as(labels_N)


build = MaskedClusters
