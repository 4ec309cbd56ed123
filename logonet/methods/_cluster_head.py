"""Algorithm 1 of LoGoNet: from the network's features to a logit for every slice, clusterer and cluster.

Written plainly, lines 7-11 hold six maps of (B, K, X, N, Z), 1.4 GiB each at K = 500, N = 80 and 96^3 in float32, and
as many gradients. Here no such map is held but one, line 9's, and that only where memory allows. What stands in the
way of working in parts is batch normalisation, whose statistics need every position:

- A 1x1x1 convolution is linear, so the mean and variance of its output follow from the mean and covariance of its
  input. With them lines 2-5, and 7-8, become linear layers, which run in chunks and are computed again in the backward
  pass: where the input has few columns (F or N for lines 2-5, Y for line 7) the covariance costs little.
- Line 9's input has K columns, and its covariance would cost as much as line 9. Its statistics are taken from its
  output, in slabs that stay in a processor's cache: `_Lines7To12`.

Results and gradients are those of the plain layers.

Shapes: B samples, F feature channels, X Y Z the crop's axes, N clusterers, K clusters, J channels after line 12,
P rows (positions), D columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from logonet.methods._parts import wide
from logonet.networks import Triple

CACHE_BYTES = 3 << 19  # of a part on a CPU for each thread: what stays in a core's caches is twice as fast


class Head(nn.Module):
    """Algorithm 1 with 1x1x1 convolutions (the paper gives no kernel; 1 is the only practical one).

    Layers are named after the algorithm's lines. In: features (B, F, X, Y, Z). Out: logits (B, Z, N, K).

    Args:
        chunk_mib: the widest map that is held at once, line 9's aside. On a CPU it is smaller, CACHE_BYTES for each
            thread.
        keep: hold line 9's output for the backward pass, B N X Z K numbers; otherwise it is computed three more times.
    """

    def __init__(
        self,
        feature_channels: int,
        size_vox: Triple,
        num_clusterers: int,
        num_classes: int,
        chunk_mib: float,
        final_relu: bool = True,
        keep: bool = True,
    ) -> None:
        super().__init__()
        num_x, num_y, num_z = size_vox
        narrow = max(1, num_x // 16)  # Algorithm 1 says x_dim // 16, which is nothing below 16 voxels
        self.chunk_bytes, self.final_relu, self.keep = chunk_mib * 2**20, final_relu, keep
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
        num_b, _, _, num_y, num_z = f_BFXYZ.shape

        def rows(chunk_BFxYZ: Tensor) -> Tensor:
            return chunk_BFxYZ.permute(0, 2, 3, 4, 1).flatten(0, 3)

        def line_6(y_PN: Tensor) -> Tensor:
            return y_PN.view(num_b, -1, num_y, num_z, y_PN.shape[1]).permute(4, 0, 1, 3, 2)

        widest_bytes = 4 * num_b * num_y * num_z * max(self.conv2.in_channels, self.conv2.out_channels)
        chunks = f_BFXYZ.split(max(1, int(self._part_bytes(f_BFXYZ.device) // widest_bytes)), dim=2)
        layers = (self.conv2, self.norm3), (self.conv4, self.norm5)
        return torch.cat(_two_layers(chunks, rows, *layers, line_6), dim=2)

    def _lines_7_to_12(self, y_NBXZY: Tensor) -> Tensor:
        num_n, num_b, num_x, num_z, num_y = y_NBXZY.shape
        widest_bytes = 4 * num_b * num_x * num_z * num_y
        chunks = y_NBXZY.split(max(1, int(self._part_bytes(y_NBXZY.device) // widest_bytes)))
        line_8 = _fold(self.conv7, self.norm8, chunks, lambda chunk_nBXZY: chunk_nBXZY.flatten(0, 3))
        norm: Any = self.norm10
        q_NBJZK, mean_K, var_K = _Lines7To12.apply(
            y_NBXZY,
            *line_8,
            self.conv9.weight.flatten(1),
            self.conv9.bias,
            norm.weight,
            norm.bias,
            self.conv12.weight.flatten(1),
            self.conv12.bias,
            None if norm.training else (norm.running_mean, norm.running_var),
            norm.eps,
            self._part_bytes(y_NBXZY.device),
            self.keep and torch.is_grad_enabled(),
        )
        if norm.training:
            _move_running(norm, mean_K, var_K, num_n * num_b * num_x * num_z)
        return q_NBJZK

    def _part_bytes(self, device: torch.device) -> float:
        """Of the widest map of a part, at most."""
        if device.type != "cpu":
            return self.chunk_bytes
        return min(self.chunk_bytes, CACHE_BYTES * torch.get_num_threads())


class _Slabs:
    """Lines 7-9 in parts: some planes along Z of one clusterer, or all planes of some clusterers.

    Line 12 sums over X alone, so a slab has whole X. Products are computed in the type of the weights.

    Attributes:
        parts: an index of y_NBXZY for each slab, and the slab's place among all rows.
        kept_PK: the output of all slabs; None computes it again where it is asked for.
    """

    def __init__(self, y_NBXZY: Tensor, weights: Sequence[Tensor], most_bytes: float) -> None:
        self.y_NBXZY = y_NBXZY
        self.w7_KY, self.b7_K, self.w9_KK, self.b9_K = weights
        w9_KK = self.w9_KK
        self.kept_PK: Tensor | None = None
        num_n, num_b, num_x, num_z, _ = y_NBXZY.shape
        planes = max(1, int(most_bytes // (num_b * num_x * len(w9_KK) * w9_KK.element_size())))
        n, z = max(1, planes // num_z), min(planes, num_z)
        self.parts, begin, every = [], 0, slice(None)
        for i in range(0, num_n, n):
            for j in range(0, num_z, z):
                part = (slice(i, i + n), every, every, slice(j, j + z))
                end = begin + num_b * num_x * min(n, num_n - i) * min(z, num_z - j)
                self.parts.append((part, slice(begin, end)))
                begin = end

    def keep(self) -> None:
        self.kept_PK = self.w9_KK.new_empty(self.parts[-1][1].stop, len(self.w9_KK))

    def line_7(self, part: Any) -> tuple[Tensor, Tensor]:
        """Rows of the input (P, Y) and of line 7's output (P, K), normalised by line 8 and without its GELU."""
        y_PY = self.y_NBXZY[part].to(self.w7_KY.dtype).flatten(0, 3)
        return y_PY, torch.addmm(self.b7_K, y_PY, self.w7_KY.T)

    def line_9(self) -> Iterator[tuple[Any, Tensor]]:
        """Each slab's index and line 9's output (P, K), computed."""
        for part, place in self.parts:
            out_PK = None if self.kept_PK is None else self.kept_PK[place]
            yield part, torch.addmm(self.b9_K, F.gelu(self.line_7(part)[1]), self.w9_KK.T, out=out_PK)

    def line_9_again(self) -> Iterator[tuple[Any, Tensor]]:
        """As `line_9`, read where it was kept."""
        if self.kept_PK is None:
            yield from self.line_9()
        else:
            for part, place in self.parts:
                yield part, self.kept_PK[place]


class _Lines7To12(torch.autograd.Function):
    """conv12(gelu(norm10(conv9(gelu(line 7-8))))) of y_NBXZY as q_NBJZK, and the mean and variance of line 10.

    Under autocast products and the kept map are in its type, and statistics and sums in float32. Two passes over the
    slabs forward (the statistics; what follows them) and two backward: the gradient of a batch's normalisation needs
    two sums over all rows, and then the gradient of each row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_NBXZY: Tensor,
        w7_KY: Tensor,
        b7_K: Tensor,
        w9_KK: Tensor,
        b9_K: Tensor,
        gamma_K: Tensor,
        beta_K: Tensor,
        w12_JX: Tensor,
        b12_J: Tensor,
        running: tuple[Tensor, Tensor] | None,
        eps: float,
        slab_bytes: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = y_NBXZY.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else y_NBXZY.dtype
        sums = torch.promote_types(dtype, torch.float32)
        num_n, num_b, num_x, num_z, _ = y_NBXZY.shape
        num_j, num_k = len(w12_JX), len(w9_KK)
        with torch.autocast(device, enabled=False):
            slabs = _Slabs(y_NBXZY, [w.to(dtype) for w in (w7_KY, b7_K, w9_KK, b9_K)], slab_bytes)
            if keep:
                slabs.keep()
            # Where the statistics are known and nothing is kept, the first pass has nothing to do.
            first = slabs.line_9() if running is None or slabs.kept_PK is not None else ()
            mean_K, scatter_K, count = (
                y_NBXZY.new_zeros(num_k, dtype=sums),
                y_NBXZY.new_zeros(num_k, dtype=sums),
                0,
            )
            for _, z_PK in first:  # joined as Chan, Golub & LeVeque (1979) do
                own_K = z_PK.mean(0, dtype=sums)
                own_scatter_K = (z_PK - own_K).square_().sum(0)
                far_K, count = own_K - mean_K, count + len(z_PK)
                mean_K += far_K * (len(z_PK) / count)
                scatter_K += own_scatter_K + far_K.square() * (len(z_PK) * (count - len(z_PK)) / count)
            mean_K, var_K = (mean_K, scatter_K / count) if running is None else running
            inverse_K = torch.rsqrt(var_K.to(sums) + eps)
            scale_K = gamma_K * inverse_K
            shift_K = beta_K - mean_K * scale_K
            w12, b12_J1 = w12_JX.to(dtype), b12_J.to(dtype)[:, None]
            q_NBJZK = y_NBXZY.new_empty(num_n, num_b, num_j, num_z, num_k, dtype=dtype)
            for part, z_PK in slabs.line_9_again():
                h_PK = F.gelu(torch.addcmul(shift_K, z_PK, scale_K)).to(dtype)
                own_NBJZK = q_NBJZK[part]
                h_RXM = h_PK.view(-1, num_x, own_NBJZK.shape[3] * num_k)  # R = n * B, M = z * K
                own_NBJZK.copy_((torch.matmul(w12, h_RXM) + b12_J1).view_as(own_NBJZK))
        ctx.save_for_backward(
            y_NBXZY, w7_KY, b7_K, w9_KK, b9_K, w12_JX, mean_K, inverse_K, scale_K, shift_K, slabs.kept_PK
        )
        ctx.dtype, ctx.slab_bytes, ctx.in_training = dtype, slab_bytes, running is None
        ctx.mark_non_differentiable(mean_K, var_K)
        return q_NBJZK, mean_K, var_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dq_NBJZK = grads[0]
        y_NBXZY, w7_KY, b7_K, w9_KK, b9_K, w12_JX, mean_K, inverse_K, scale_K, shift_K, kept_PK = (
            ctx.saved_tensors
        )
        dtype, sums, num_x, num_k = ctx.dtype, mean_K.dtype, y_NBXZY.shape[2], len(w9_KK)
        gelu_backward = torch.ops.aten.gelu_backward
        with torch.autocast(y_NBXZY.device.type, enabled=False):
            slabs = _Slabs(y_NBXZY, [w.to(dtype) for w in (w7_KY, b7_K, w9_KK, b9_K)], ctx.slab_bytes)
            slabs.kept_PK = kept_PK
            w12_XJ = w12_JX.to(dtype).T

            def line_10(part: Any, z_PK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                """Line 10's output, its gradient, and the gradient of line 12's output."""
                u_PK, dq_nBJzK = torch.addcmul(shift_K, z_PK, scale_K), dq_NBJZK[part]
                dq_RJM = dq_nBJzK.to(dtype).reshape(-1, dq_nBJzK.shape[2], dq_nBJzK.shape[3] * num_k)
                dh_PK = torch.matmul(w12_XJ, dq_RJM).view(-1, num_k)
                return u_PK, gelu_backward(dh_PK.to(sums), u_PK), dq_RJM

            dbeta_K, du_z_K, dw12_JX = (torch.zeros_like(t, dtype=sums) for t in (mean_K, mean_K, w12_JX))
            for part, z_PK in slabs.line_9_again():
                u_PK, du_PK, dq_RJM = line_10(part, z_PK)
                h_RXM = F.gelu(u_PK).to(dtype).view(len(dq_RJM), num_x, -1)
                dw12_JX += torch.matmul(dq_RJM, h_RXM.transpose(1, 2)).sum(0)
                dbeta_K += du_PK.sum(0)
                du_z_K += du_PK.mul_(z_PK).sum(0)
            dgamma_K = (du_z_K - mean_K * dbeta_K) * inverse_K
            # The gradient of line 9's output is scale * (du - dbeta / P - (z - mean) * inverse * dgamma / P) where the
            # statistics are the batch's, and scale * du where they are constants.
            by_z_K = torch.zeros_like(mean_K)
            by_one_K = torch.zeros_like(mean_K)
            if ctx.in_training:
                count = y_NBXZY.shape[:4].numel()
                by_z_K = -scale_K * inverse_K * dgamma_K / count
                by_one_K = -scale_K * dbeta_K / count - by_z_K * mean_K
            dw9_KK, dw7_KY, db7_K = (torch.zeros_like(t, dtype=sums) for t in (w9_KK, w7_KY, b7_K))
            dy_NBXZY = torch.empty_like(y_NBXZY)
            for part, z_PK in slabs.line_9_again():
                _, du_PK, _ = line_10(part, z_PK)
                dz_PK = torch.addcmul(by_one_K, z_PK, by_z_K).addcmul_(du_PK, scale_K).to(dtype)
                y_PY, a_PK = slabs.line_7(part)
                _add_product(dw9_KK, dz_PK, F.gelu(a_PK))
                da_PK = gelu_backward(dz_PK @ slabs.w9_KK, a_PK)
                _add_product(dw7_KY, da_PK, y_PY)
                db7_K += da_PK.sum(0, dtype=sums)
                own_nBXzY = dy_NBXZY[part]
                own_nBXzY.copy_((da_PK @ slabs.w7_KY).view_as(own_nBXzY))
        # A batch's statistics cancel line 9's bias: its gradient is 0, and rounding, which Adam would amplify, is not.
        db9_K = torch.zeros_like(b9_K) if ctx.in_training else scale_K * dbeta_K
        db12_J = dq_NBJZK.to(sums).sum((0, 1, 3, 4))
        weights = (dw7_KY, db7_K, dw9_KK, db9_K, dgamma_K, dbeta_K, dw12_JX, db12_J)
        typed = zip(weights, (w7_KY, b7_K, w9_KK, b9_K, b9_K, b9_K, w12_JX, b9_K))
        return dy_NBXZY, *(grad.to(weight.dtype) for grad, weight in typed), None, None, None, None


def _add_product(total: Tensor, left_PD: Tensor, right_PE: Tensor) -> None:
    """total (D, E) += left' right, whose sum is in float32 where the factors are in bfloat16."""
    if total.dtype == left_PD.dtype:
        torch.addmm(total, left_PD.T, right_PE, out=total)
    else:
        total += left_PD.T @ right_PE


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
    # Statistics are no place for bfloat16, which autocast would give their matrix products.
    with torch.autocast(rows_PD.device.type, enabled=False):
        return len(rows_PD), *_MeanAndScatter.apply(wide(rows_PD))


class _MeanAndScatter(torch.autograd.Function):
    """The mean (D,) of rows (P, D) and their scatter about it (D, D)."""

    @staticmethod
    def forward(ctx: Any, rows_PD: Tensor) -> tuple[Tensor, Tensor]:
        mean_D = rows_PD.mean(0)
        ctx.save_for_backward(rows_PD, mean_D)
        centred_PD = rows_PD - mean_D  # E[xx'] - E[x]E[x]' would cancel in float32
        return mean_D, centred_PD.T @ centred_PD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (rows_PD, mean_D), (dmean_D, dscatter_DD) = ctx.saved_tensors, grads
        return torch.addmm(dmean_D / len(rows_PD), rows_PD - mean_D, dscatter_DD + dscatter_DD.T)


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
