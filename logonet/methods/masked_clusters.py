"""Masked slices, many clusterers: the pretraining of Masked LoGoNet (KDD 2024, sections 3.3 and 4.1).

Patches in chains of slices are hidden; the network predicts, for every slice of a chain, the label each
of N K-means clusterers gave to the whole slice.

Shapes: B samples, C input channels, F feature channels, X Y Z the crop's axes (Z slices), N clusterers,
K the largest number of clusters, S masked slices of the batch, P rows (positions), D columns (features).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from logonet.core.config import Count, Fraction, Positive, Section
from logonet.core.errors import UserError
from logonet.methods import DataSpec, _chain_masks
from logonet.methods._parts import MethodModule, freeze, intensity, ratio, wide
from logonet.networks import Network, Triple

NEEDS = frozenset({"crops", "pseudo_labels"})
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
    """Backbone, mask token and Algorithm 1's head; ``forward`` as the package's contract says."""

    cluster_sizes: Tensor
    majority_labels: Tensor

    def __init__(self, cfg: Config, network: Network, data_spec: DataSpec) -> None:
        super().__init__(cfg, network)
        freeze(network, network.head_prefixes)
        # The paper masks "by the method of" SimMIM, whose masked patches carry a learnt token. Before any
        # embedding a token is one scalar per channel; 0 is the window's darkest value, air in CT.
        token_C = torch.zeros(data_spec.in_channels)
        self.mask_token = nn.Parameter(token_C, requires_grad=cfg.masking != "none")
        sizes = data_spec.cluster_sizes
        shape = (network.feature_channels, data_spec.size_vox, len(sizes), max(sizes))
        self.head = Head(*shape, cfg.head_chunk_mib, cfg.final_relu)
        self.register_buffer("cluster_sizes", torch.tensor(sizes), persistent=False)
        self.register_buffer("majority_labels", torch.tensor(data_spec.majority_labels), persistent=False)

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns; they do not depend on ``progress``."""
        chain_BZ, hidden_BXYZ = batch["chain"], batch["hidden"]
        feats, logits_BZNK = self.predict(intensity(batch["image"]), hidden_BXYZ)
        # Of all slices, as CUDA would have to be waited for to learn how many are masked: the others have no label.
        labels_BZN = batch["labels"].transpose(1, 2).long().masked_fill(~chain_BZ[..., None], NO_LABEL)
        total = cluster_nll(logits_BZNK, labels_BZN, self.cluster_sizes, self.cfg.temperature).sum()
        num_slices = chain_BZ.sum()
        num_labels = num_slices * labels_BZN.shape[2]
        # Eq. 4 is one sample's sum. Its mean over samples makes a batch of two on one device equal a
        # batch of one on two devices, whose gradients are averaged.
        loss = total / (len(chain_BZ) if self.cfg.reduction == "sum" else num_labels)
        metrics = self._metrics(logits_BZNK, labels_BZN, num_slices)
        metrics["loss"] = ratio(total, num_labels)
        metrics["masked_share"] = ratio(hidden_BXYZ.sum(), hidden_BXYZ.numel())
        metrics["embeddings_BF"] = feats[-1].detach().float().mean(dim=(2, 3, 4))
        return loss, metrics

    def predict(self, image_BCXYZ: Tensor, hidden_BXYZ: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """Encoder features and logits_BZNK of images in [0, 1] whose hidden voxels the network cannot see."""
        token_C111 = self.mask_token[:, None, None, None]
        x_BCXYZ = torch.where(hidden_BXYZ[:, None], token_C111, image_BCXYZ)
        feats = self.backbone.encode(x_BCXYZ)
        return feats, self.head(self.backbone.decode_features(x_BCXYZ, feats))

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


class Head(nn.Module):
    """Algorithm 1 with 1x1x1 convolutions (the paper gives no kernel; 1 is the only practical one).

    Layers are named after the algorithm's lines. In: features (B, F, X, Y, Z). Out: logits (B, Z, N, K).

    Written plainly, lines 7-11 hold six maps of (B, K, X, N, Z), 1.4 GiB each at K = 500, N = 80 and
    96^3 in float32, and as many gradients. Here lines 2-5 and 7-12 run in chunks that are recomputed in
    the backward pass. What stands in the way of chunks is batch normalisation, whose statistics need
    every position. But a 1x1x1 convolution is linear, so the mean and variance of its output follow from
    the mean and covariance of its input, which are gathered chunk by chunk before: the results and
    gradients are those of the plain layers. The price is arithmetic: 7 products of K x K matrices with
    the widest map instead of 3 (benchmarks/head.py).
    """

    def __init__(
        self,
        feature_channels: int,
        size_vox: Triple,
        num_clusterers: int,
        num_classes: int,
        chunk_mib: float,
        final_relu: bool = True,
    ) -> None:
        super().__init__()
        num_x, num_y, num_z = size_vox
        narrow = max(1, num_x // 16)  # Algorithm 1 says x_dim // 16, which is nothing below 16 voxels
        self.chunk_bytes, self.final_relu = chunk_mib * 2**20, final_relu
        self.conv2 = nn.Conv3d(feature_channels, num_clusterers, 1)
        self.norm3 = nn.BatchNorm3d(num_clusterers)
        self.conv4, self.norm5 = nn.Conv3d(num_clusterers, num_clusterers, 1), nn.BatchNorm3d(num_clusterers)
        self.conv7, self.norm8 = nn.Conv3d(num_y, num_classes, 1), nn.BatchNorm3d(num_classes)
        self.conv9, self.norm10 = nn.Conv3d(num_classes, num_classes, 1), nn.BatchNorm3d(num_classes)
        self.conv12, self.norm13 = nn.Conv3d(num_x, narrow, 1), nn.BatchNorm3d(narrow)
        self.conv14, self.norm15 = nn.Conv3d(narrow, 1, 1), nn.BatchNorm3d(1)
        self.conv17, self.norm18 = nn.Conv3d(num_z, num_z, 1), nn.BatchNorm3d(num_z)
        self.conv19 = nn.Conv3d(num_z, num_z, 1)

    def forward(self, f_BFXYZ: Tensor) -> Tensor:
        y_NBXZY = self._lines_2_to_6(f_BFXYZ)
        q_NBJZK = self._lines_7_to_12(y_NBXZY)
        q_BJKNZ = q_NBJZK.permute(1, 2, 4, 0, 3)
        q_BJKNZ = F.gelu(self.norm13(q_BJKNZ))
        q_B1KNZ = F.gelu(self.norm15(self.conv14(q_BJKNZ)))
        q_BZNK1 = q_B1KNZ.permute(0, 4, 3, 2, 1)
        q_BZNK1 = F.gelu(self.norm18(self.conv17(q_BZNK1)))
        logits_BZNK1 = self.conv19(q_BZNK1)
        # squeeze(-1): the algorithm's bare squeeze() would also drop a batch or clusterer axis of 1.
        return (F.relu(logits_BZNK1) if self.final_relu else logits_BZNK1).squeeze(-1)

    def _lines_2_to_6(self, f_BFXYZ: Tensor) -> Tensor:
        """Lines 2-5 in chunks along X; line 6 so that line 7 finds its input, Y, last and contiguous."""
        num_b, _, num_x, num_y, num_z = f_BFXYZ.shape

        def rows(chunk_BFxYZ: Tensor) -> Tensor:
            return chunk_BFxYZ.permute(0, 2, 3, 4, 1).flatten(0, 3)

        def line_6(y_PN: Tensor) -> Tensor:
            return y_PN.view(num_b, -1, num_y, num_z, y_PN.shape[1]).permute(4, 0, 1, 3, 2)

        chunks = f_BFXYZ.split(self._chunk(num_b * num_y * num_z * self.conv2.out_channels, num_x), dim=2)
        layers = (self.conv2, self.norm3), (self.conv4, self.norm5)
        return torch.cat(_two_layers(chunks, rows, *layers, line_6), dim=2)

    def _lines_7_to_12(self, y_NBXZY: Tensor) -> Tensor:
        """Lines 7-12 in chunks along N. Line 12 shrinks X 16 times, so its output is held whole."""
        num_n, num_b, num_x, num_z, _ = y_NBXZY.shape
        num_k = self.conv7.out_channels
        weight_JX, bias_J = self.conv12.weight.flatten(1), cast(Tensor, self.conv12.bias)

        def rows(chunk_nBXZY: Tensor) -> Tensor:
            return chunk_nBXZY.flatten(0, 3)

        def lines_11_12(g_PK: Tensor) -> Tensor:
            g_RXM = g_PK.view(-1, num_x, num_z * num_k)  # R = n * B, M = Z * K
            q_RJM = torch.bmm(weight_JX.expand(len(g_RXM), -1, -1), g_RXM) + bias_J[:, None]
            return q_RJM.view(-1, num_b, len(bias_J), num_z, num_k)

        chunks = y_NBXZY.split(self._chunk(num_b * num_x * num_z * num_k, num_n), dim=0)
        layers = (self.conv7, self.norm8), (self.conv9, self.norm10)
        return torch.cat(_two_layers(chunks, rows, *layers, lines_11_12))

    def _chunk(self, widest: int, length: int) -> int:
        """How many of ``length`` slabs, whose widest map has ``widest`` float32 numbers, go together."""
        return max(1, min(length, int(self.chunk_bytes // (4 * widest))))


Layer = tuple[nn.Conv3d, nn.BatchNorm3d]
Rows = Callable[[Tensor], Tensor]


def _two_layers(chunks: Sequence[Tensor], rows: Rows, one: Layer, other: Layer, then: Rows) -> list[Tensor]:
    """``then(gelu(other(gelu(one(rows(chunk))))))`` of every chunk, where a layer is ``norm(conv(x))``."""
    first_layer = _fold(*one, chunks, rows)

    def first(chunk: Tensor) -> Tensor:
        return F.gelu(F.linear(rows(chunk), *first_layer))

    second_layer = _fold(*other, chunks, first)

    def both(chunk: Tensor) -> Tensor:
        return then(F.gelu(F.linear(first(chunk), *second_layer)))

    return [_recomputed(both, chunk) for chunk in chunks]


def _fold(conv: Any, norm: Any, chunks: Sequence[Tensor], rows: Rows) -> tuple[Tensor, Tensor]:
    """The one linear layer that ``norm(conv(rows))`` is: weight (out, in) and bias (out,).

    In training mode the statistics are those of all chunks together, with their gradients, and the
    running ones move as nn.BatchNorm3d moves them. (Torch types a layer's tensors as optional, so layers are Any.)
    """
    weight, bias = conv.weight.flatten(1), conv.bias
    parts = [_recomputed(lambda chunk: _moments(rows(chunk)), c) for c in chunks] if norm.training else []
    # Statistics are no place for bfloat16, which autocast would give their matrix products.
    with torch.autocast(weight.device.type, enabled=False):
        if norm.training:
            count, mean_D, scatter_DD = _pooled(parts)
            mean = weight @ mean_D + bias
            # clamp: rounding may leave the variance of a (nearly) constant output a hair below 0.
            var = ((weight @ scatter_DD) * weight).sum(1).clamp_min(0) / count
            _move_running(norm, mean, var, count)
        else:
            mean, var = norm.running_mean, norm.running_var
        scale = norm.weight * torch.rsqrt(var + norm.eps)
        return scale[:, None] * weight, scale * (bias - mean) + norm.bias


Moments = tuple[int, Tensor, Tensor]  # number of rows, their mean (D,), their scatter about it (D, D)


def _moments(rows_PD: Tensor) -> Moments:
    with torch.autocast(rows_PD.device.type, enabled=False):
        rows_PD = wide(rows_PD)
        mean_D = rows_PD.mean(0)
        centred_PD = rows_PD - mean_D  # E[xx'] - E[x]E[x]' would cancel in float32
        return len(rows_PD), mean_D, centred_PD.T @ centred_PD


def _pooled(parts: Sequence[Moments]) -> Moments:
    """Moments of all rows from the moments of the parts (Chan, Golub & LeVeque 1979)."""
    count = sum(n for n, _, _ in parts)
    mean_D = torch.stack([mean * (n / count) for n, mean, _ in parts]).sum(0)
    scatters = [scatter + n * torch.outer(mean - mean_D, mean - mean_D) for n, mean, scatter in parts]
    return count, mean_D, torch.stack(scatters).sum(0)


@torch.no_grad()
def _move_running(norm: Any, mean: Tensor, var: Tensor, count: int) -> None:
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)
    norm.num_batches_tracked += 1


def _recomputed(function: Callable[[Tensor], Any], chunk: Tensor) -> Any:
    """``function(chunk)``, whose intermediate maps the backward pass computes again instead of keeping."""
    # No function given here draws random numbers, so their state need not be restored.
    return checkpoint(function, chunk, use_reentrant=False, preserve_rng_state=False)


build = MaskedClusters
