"""Segmenting scans of any size in bounded memory: sliding window, streamed plane by plane to native labels.

Letters: B windows at once, C input channels, K classes, XYZ axes of a grid in RAS; when planes are streamed, S
is the axis they are streamed along and A, B the other two, in order. *Prepared* is the grid that the
network sees (RAS, the model's spacing), *native* the scan's own voxels.

Windows and their blending are those of ``monai.inferers.sliding_window_inference`` with
``mode="gaussian"``; a test holds the logits equal. The memory differs: windows go layer by layer along S, and only the
sums of the current layer are held, (K, window depth, A, B). Planes that no later window touches are finished: two
neighbours at a time are interpolated to native planes, whose classes are written as uint8 at once. No (K, X, Y, Z)
array exists, on either grid. ``benchmarks/inference.py`` has the formula of the memory that is held, and measures it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from logonet.core.config import Count, Section
from logonet.core.errors import BadScan
from logonet.data import cropping, volume
from logonet.data.volume import LowHigh, Volume
from logonet.inference import model

SIGMA_SHARE = 0.125  # of the window's side, as in MONAI and nnU-Net
MIN_WEIGHT = 1e-3  # MONAI's floor, so that a voxel seen only by a window's corner is not divided by nothing


@dataclass(frozen=True)
class Config(Section, key="infer"):
    """How scans are segmented.

    Attributes:
        overlap: share of a window's side that neighbours have in common, in [0, 1).
        mirror: average the logits over all 8 flips of each window (test-time augmentation), in 8 times the time.
        windows_per_batch: windows that the network sees at once.
    """

    overlap: Annotated[float, Ge(0), Lt(1)] = 0.5
    mirror: bool = False
    windows_per_batch: Count = 1


class Predictor:
    """A network and how scans are prepared for it. Equal scans give equal labels.

    ``net`` is moved to ``device`` (by default a GPU when there is one) and put into eval mode.
    """

    def __init__(
        self,
        net: nn.Module,
        spec: model.Spec,
        cfg: Config = Config(),
        device: str | torch.device | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.net, self.spec, self.cfg = net.to(self.device).eval(), spec, cfg

    @classmethod
    def load(
        cls, folder_uri: str, cfg: Config = Config(), device: str | torch.device | None = None
    ) -> Predictor:
        """The model that `model.files` describes, from a local folder or s3://.

        Raises:
            UserError: naming the file that is missing, damaged or does not fit.
        """
        spec, weights = model.read(folder_uri)
        return cls(model.build(spec, weights), spec, cfg, device)

    def segment(self, scan: Volume, modality: str, scan_id: str = "scan") -> np.ndarray:
        """labels_XYZ uint8 on the scan's own voxels, in its own axes; values are ``spec.label_values``.

        Args:
            scan: in any orientation, oblique or not, of any size.
            modality: as `volume.modality` tells.

        Raises:
            BadScan: for a modality that the model has not been trained on, a scan without contrast, or one
                for which the network's answer is not a number.
        """
        spec = self.spec
        if len(scan.array_CXYZ) != spec.in_channels:
            raise BadScan(
                f"{scan_id}: has {len(scan.array_CXYZ)} channels, but the model wants {spec.in_channels}; use another "
                "model, or give its channels as they were given for training"
            )
        if spec.modality not in (modality, "mixed"):
            raise BadScan(f"{scan_id}: is {modality}, but the model was trained on {spec.modality} only")
        prepared = spec.to_grid(scan)
        low_high = spec.intensity_range(prepared.array_CXYZ, modality, scan_id)
        labels_XYZ = np.empty(scan.shape_xyz, np.uint8)
        # a view: what is written there in RAS axes lands in the scan's own
        native = volume.to_ras(Volume(labels_XYZ[None], scan.affine))
        assert np.may_share_memory(native.array_CXYZ, labels_XYZ)
        step = [new / old for new, old in zip(prepared.spacing_mm, native.spacing_mm)]
        axis = stream_axis(prepared.shape_xyz, spec.size_vox)
        finished = planes(self.net, prepared.array_CXYZ, low_high, spec.size_vox, self.cfg, self.device, axis)
        positions = _positions(native.shape_xyz, prepared.shape_xyz, step, self.device)
        find = _regions if spec.regions else _best
        _write(finished, axis, positions, native.array_CXYZ[0], spec.written, scan_id, find)
        return labels_XYZ


def labels(
    net: nn.Module,
    image_CXYZ: np.ndarray | Tensor,
    size_vox: Sequence[int],
    cfg: Config,
    device: str | torch.device,
    *,
    regions: bool = False,
) -> np.ndarray:
    """labels_XYZ uint8, class indices, of an image that is on the prepared grid already.

    Args:
        regions: the outputs are regions; instead of class indices bit r says whether a voxel is in region r.
        net: a backbone in eval mode, on ``device``.
        image_CXYZ: float32 in [0, 1], on the host.

    Raises:
        BadScan: when the network's answer is not a number.
    """
    image_CXYZ, device = np.asarray(image_CXYZ), torch.device(device)
    shape = image_CXYZ.shape[1:]
    labels_XYZ = np.empty(shape, np.uint8)
    axis = stream_axis(shape, size_vox)
    finished = planes(net, image_CXYZ, (0.0, 1.0), size_vox, cfg, device, axis)
    positions = _positions(shape, shape, (1.0, 1.0, 1.0), device)
    as_found, find = np.arange(256, dtype=np.uint8), _regions if regions else _best
    _write(finished, axis, positions, labels_XYZ, as_found, "the image", find)
    return labels_XYZ


@torch.inference_mode()
def _write(
    planes: Iterator[Tensor],
    axis: int,
    positions: Sequence[_Positions],
    out_XYZ: np.ndarray,
    values: np.ndarray,
    name: str,
    find: Callable[[Iterator[Tensor], str], Tensor],
) -> None:
    """Fill ``out_XYZ`` with the ``values`` of what ``find`` finds in prepared ``planes`` along ``axis``."""
    along, rows, columns = (positions[d] for d in (axis, *_others(axis)))
    low, high, share = along.low.tolist(), along.high.tolist(), along.share.tolist()
    out_SAB = np.moveaxis(out_XYZ, axis, 0)
    n, before_KAB = 0, None
    for p, plane_KAB in enumerate(planes):
        while n < len(out_SAB) and high[n] == p:
            low_KAB = plane_KAB if low[n] == p else before_KAB
            assert low_KAB is not None
            found_AB = find(_interpolated(low_KAB, plane_KAB, share[n], rows, columns), name)
            out_SAB[n] = values[found_AB.cpu().numpy()]
            n += 1
        if n < len(out_SAB) and low[n] == p:  # the next one lies between this plane and the one to come
            before_KAB = plane_KAB.clone() if before_KAB is None else before_KAB.copy_(plane_KAB)
    assert n == len(out_SAB)


@dataclass(frozen=True)
class _Positions:
    """The positions of the N native voxels of one axis between those of the prepared grid: at low + share."""

    low: Tensor  # (N,) int64
    high: Tensor  # (N,) int64; low, or low + 1
    share: Tensor  # (N,) float32
    same: bool  # nothing to interpolate

    def interpolate(self, plane_AB: Tensor, dim: int) -> Tensor:
        if self.same:
            return plane_AB
        share = self.share.unsqueeze(1 - dim)
        low, high = plane_AB.index_select(dim, self.low), plane_AB.index_select(dim, self.high)
        return low.lerp_(high, share)


def _positions(
    native: Sequence[int], prepared: Sequence[int], step: Sequence[float], device: torch.device
) -> list[_Positions]:
    """Of each axis: the inverse of `volume.resample`'s grid; beyond its last voxel the edge is repeated."""
    positions = []
    for length, last, ratio in zip(native, np.array(prepared) - 1, step):
        at = np.minimum(np.arange(length) / ratio, last)
        floor, ceil = np.floor(at), np.ceil(at)
        typed = (floor.astype(np.int64), ceil.astype(np.int64), (at - floor).astype(np.float32))
        low, high, share = (torch.from_numpy(a).to(device) for a in typed)
        same = length == last + 1 and np.array_equal(at, np.arange(length))
        positions.append(_Positions(low, high, share, bool(same)))
    return positions


def _interpolated(
    low_KAB: Tensor, high_KAB: Tensor, share: float, rows: _Positions, columns: _Positions
) -> Iterator[Tensor]:
    """The logits of a native plane, one output after the other, so that it is never held K times."""
    for low_AB, high_AB in zip(low_KAB, high_KAB):
        plane_AB = torch.lerp(low_AB, high_AB, share) if share else low_AB
        yield columns.interpolate(rows.interpolate(plane_AB, 0), 1)


def _best(logits: Iterator[Tensor], name: str) -> Tensor:
    """The most likely class of each voxel of a native plane, uint8; the lowest one in a tie, as in argmax."""
    for k, plane_AB in enumerate(logits):
        if k == 0:
            best_AB, class_AB = plane_AB.clone(), torch.zeros_like(plane_AB, dtype=torch.uint8)
            continue
        class_AB.masked_fill_(plane_AB > best_AB, k)
        torch.maximum(best_AB, plane_AB, out=best_AB)
    _refuse_nan(best_AB, name)  # maximum keeps NaN
    return class_AB


def _regions(logits: Iterator[Tensor], name: str) -> Tensor:
    """The regions of each voxel of a native plane, uint8: bit r is set where the logit of region r is above 0."""
    own = []
    for r, plane_AB in enumerate(logits):
        _refuse_nan(plane_AB, name)
        own.append((plane_AB > 0).to(torch.uint8) << r)
    return functools.reduce(torch.bitwise_or, own)


def _refuse_nan(logits_AB: Tensor, name: str) -> None:
    if logits_AB.isnan().any():
        raise BadScan(f"{name}: the network's answer is not a number; look at the scan's intensities")


def planes(
    net: nn.Module,
    image_CXYZ: np.ndarray,
    low_high: LowHigh,
    size_vox: Sequence[int],
    cfg: Config,
    device: torch.device,
    axis: int,
) -> Iterator[Tensor]:
    """The blended logits_KAB of the image's planes along ``axis``, in order.

    Each is overwritten once the next is asked for. ``low_high`` are the intensities that become 0 and 1.
    """
    assert not net.training, "put the net into eval mode first"
    shape, size = image_CXYZ.shape[1:], tuple(size_vox)
    a, b = _others(axis)
    padded = [max(n, m) for n, m in zip(shape, size)]
    before = [(p - n) // 2 for p, n in zip(padded, shape)]
    starts = [_starts(p, m, cfg.overlap) for p, m in zip(padded, size)]
    weight_SAB = _importance(size).permute(axis, a, b).to(device)
    total_SAB = torch.zeros(size[axis], padded[a], padded[b], device=device)
    sum_SKAB: Tensor | None = None
    inside = (slice(before[a], before[a] + shape[a]), slice(before[b], before[b] + shape[b]))
    for start, following in itertools.pairwise((*starts[axis], padded[axis])):
        corners = list(itertools.product(*([start] if d == axis else starts[d] for d in range(3))))
        for k in range(0, len(corners), cfg.windows_per_batch):
            batch = corners[k : k + cfg.windows_per_batch]
            x_BCXYZ = _windows(image_CXYZ, np.subtract(batch, before), size, low_high)
            logits_BKXYZ = _logits(net, torch.from_numpy(x_BCXYZ).to(device), cfg.mirror)
            if sum_SKAB is None:
                K = logits_BKXYZ.shape[1]
                sum_SKAB = torch.zeros(size[axis], K, padded[a], padded[b], device=device)
            for corner, logits_KXYZ in zip(batch, logits_BKXYZ):
                box = tuple(slice(corner[d], corner[d] + size[d]) for d in (a, b))
                logits_SKAB = logits_KXYZ.permute(1 + axis, 0, 1 + a, 1 + b)
                sum_SKAB[:, :, *box].addcmul_(logits_SKAB, weight_SAB[:, None])
                total_SAB[:, *box].add_(weight_SAB)
        assert sum_SKAB is not None
        finished = following - start
        for s in range(finished):
            if 0 <= start + s - before[axis] < shape[axis]:
                yield sum_SKAB[s].div_(total_SAB[s])[:, *inside]
        for held in (sum_SKAB, total_SAB):
            for s in range(size[axis] - finished):  # plane by plane: the two ranges overlap
                held[s].copy_(held[s + finished])
            held[size[axis] - finished :].zero_()


def _windows(
    image_CXYZ: np.ndarray, corners_B3: np.ndarray, size: tuple[int, ...], low_high: LowHigh
) -> np.ndarray:
    """The windows from their lower corners, x_BCXYZ float32 in [0, 1], with 0 outside the image."""
    x_BCXYZ = np.empty((len(corners_B3), len(image_CXYZ), *size), np.float32)
    for x_CXYZ, corner in zip(x_BCXYZ, corners_B3):
        x_CXYZ[:] = volume.window(cropping.cut(image_CXYZ, corner, size, pad=low_high[0]), low_high)
    return x_BCXYZ


def _logits(net: nn.Module, x_BCXYZ: Tensor, mirror: bool) -> Tensor:
    """logits_BKXYZ float32; with ``mirror`` their mean over the 8 flips. Bfloat16 on CUDA."""
    flips: list[tuple[int, ...]] = [()]
    if mirror:
        flips = [dims for n in range(4) for dims in itertools.combinations((2, 3, 4), n)]
    total: Tensor | None = None
    for dims in flips:
        with torch.autocast(x_BCXYZ.device.type, torch.bfloat16, enabled=x_BCXYZ.is_cuda):
            out: Any = net(x_BCXYZ.flip(dims) if dims else x_BCXYZ)
        logits = out.logits.float()
        logits = logits.flip(dims) if dims else logits
        total = logits if total is None else total.add_(logits)
    assert total is not None
    return total.div_(len(flips)) if mirror else total


def _starts(length: int, size: int, overlap: float) -> list[int]:
    """Where windows begin along one axis: MONAI's ``dense_patch_slices``. ``size`` <= ``length``."""
    interval = max(int(size * (1 - overlap)), 1)
    return [min(k * interval, length - size) for k in range(-(-(length - size) // interval) + 1)]


def _importance(size: Sequence[int]) -> Tensor:
    """weight_XYZ of a window's voxels: MONAI's ``compute_importance_map``, a Gaussian about the middle."""
    weight = torch.ones(())
    for side in size:
        x = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        weight = weight[..., None] * torch.exp(-(x**2) / (2 * (SIGMA_SHARE * side) ** 2))
    return weight.clamp_(min=max(float(weight.min()), MIN_WEIGHT))


def stream_axis(shape: Sequence[int], size: Sequence[int]) -> int:
    """The axis along which the least has to be held: window depth x cross-section."""
    return max(range(3), key=lambda d: max(shape[d] / size[d], 1.0))


def _others(axis: int) -> tuple[int, int]:
    a, b = (d for d in range(3) if d != axis)
    return a, b
