"""Segmenting scans of any size in bounded memory: sliding window, streamed plane by plane to native labels.

Letters: B windows at once, C input channels, K classes, G of them at once, XYZ axes of a grid in RAS; when planes are
streamed, S is the axis they are streamed along and A, B the other two, in order. *Prepared* is the grid that the
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
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn

from logonet import networks
from logonet.core import config
from logonet.core.config import Count, Section
from logonet.core.errors import BadScan
from logonet.data import volume
from logonet.data.volume import Volume
from logonet.inference import model, postprocessing

SIGMA_SHARE = 0.125  # of the window's side, as in MONAI and nnU-Net
IMAGE_SHARE = 0.25  # of a GPU's free memory, which the prepared image may take
CUDA_GROUP = 16  # classes whose logits are interpolated at once on a GPU
MIN_WEIGHT = 1e-3  # MONAI's floor, so that a voxel seen only by a window's corner is not divided by nothing


@dataclass(frozen=True)
class Config(Section, key="infer"):
    """How scans are segmented.

    Attributes:
        overlap: share of a window's side that neighbours have in common, in [0, 1).
        mirror: average the logits over all 8 flips of each window (test-time augmentation), in 8 times the time.
        windows_per_batch: windows that the network sees at once; None takes 4 on CUDA and 1 elsewhere.
        precision: "bf16" (autocast), "fp32", or "auto": bf16 on CUDA, fp32 elsewhere. Validation in training takes
            ``train.precision`` instead.
    """

    overlap: Annotated[float, Ge(0), Lt(1)] = 0.5
    mirror: bool = False
    windows_per_batch: Count | None = None
    precision: Literal["auto", "bf16", "fp32"] = field(default="auto", metadata=config.OMIT_DEFAULT)

    def identity(self) -> dict[str, Any]:
        """The settings that ids of artifacts cover. Windows at once, which change rounding alone, count as 1."""
        return {**config.to_dict(self), "windows_per_batch": 1}

    def batch(self, device: torch.device) -> int:
        """Windows that the network sees at once on ``device``."""
        return self.windows_per_batch or (4 if device.type == "cuda" else 1)


class Predictor:
    """A network and how scans are prepared for it. Equal scans give equal labels.

    What runs is a copy of ``net`` on ``device`` (by default a GPU when there is one), see `model.folded`.
    """

    def __init__(
        self,
        net: nn.Module,
        spec: model.Spec,
        cfg: Config = Config(),
        device: str | torch.device | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.net, self.spec, self.cfg = model.folded(net).to(self.device), spec, cfg

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
        prepared = replace(prepared, array_CXYZ=volume.window(prepared.array_CXYZ, low_high))
        labels_XYZ = np.empty(scan.shape_xyz, np.uint8)
        # a view: what is written there in RAS axes lands in the scan's own
        native = volume.to_ras(Volume(labels_XYZ[None], scan.affine))
        assert np.may_share_memory(native.array_CXYZ, labels_XYZ)
        step = [new / old for new, old in zip(prepared.spacing_mm, native.spacing_mm)]
        axis = stream_axis(prepared.shape_xyz, spec.size_vox)
        image_CXYZ = _placed(prepared.array_CXYZ, self.device)
        finished = planes(self.net, image_CXYZ, spec.size_vox, self.cfg, self.device, axis)
        positions = _positions(native.shape_xyz, prepared.shape_xyz, step, self.device)
        find = _regions if spec.regions else _best
        _write(finished, axis, positions, native.array_CXYZ[0], spec.written, scan_id, find)
        for name in spec.largest_component:
            postprocessing.keep_largest(labels_XYZ, spec.scored[name], int(spec.written[0]))
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
    device = torch.device(device)
    image_CXYZ = _placed(np.asarray(image_CXYZ), device)
    shape = image_CXYZ.shape[1:]
    labels_XYZ = np.empty(shape, np.uint8)
    axis = stream_axis(shape, size_vox)
    finished = planes(net, image_CXYZ, size_vox, cfg, device, axis)
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
            out_SAB[n] = values.take(found_AB.cpu().numpy())
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

    def interpolate(self, x: Tensor) -> Tensor:
        """``x`` at these positions of its dimension 1, the last or the last but one."""
        if self.same:
            return x
        low, high = x.index_select(1, self.low), x.index_select(1, self.high)
        return low.lerp_(high, self.share.view(-1, *[1] * (x.ndim - 2)))


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
    """The logits of a native plane, one output after the other: G at once, so that it is never held K times."""
    # A CPU's cache has room for one; a GPU would wait for so small tasks.
    G = CUDA_GROUP if low_KAB.is_cuda else 1
    for low_GAB, high_GAB in zip(low_KAB.split(G), high_KAB.split(G)):
        plane_GAB = torch.lerp(low_GAB, high_GAB, share) if share else low_GAB
        # Two dimensions: selecting along the last of three takes up to 15 times as long.
        columns_NB = columns.interpolate(plane_GAB.flatten(0, 1))
        yield from rows.interpolate(columns_NB.unflatten(0, plane_GAB.shape[:2]))


def _best(logits: Iterator[Tensor], name: str) -> Tensor:
    """The most likely class of each voxel of a native plane, uint8; the lowest one in a tie, as in argmax."""
    for k, plane_AB in enumerate(logits):
        if k == 0:
            best_AB, class_AB = plane_AB.clone(), torch.zeros_like(plane_AB, dtype=torch.uint8)
            continue
        # k is above what was found before; filling by a mask takes three times as long
        torch.maximum(class_AB, (plane_AB > best_AB).view(torch.uint8).mul_(k), out=class_AB)
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
    image_CXYZ: Tensor,
    size_vox: Sequence[int],
    cfg: Config,
    device: torch.device,
    axis: int,
) -> Iterator[Tensor]:
    """The blended logits_KAB of the image's planes along ``axis``, in order.

    Each is overwritten once the next is asked for. The image, in [0, 1], is on ``device`` or on the host.
    """
    assert not net.training, "put the net into eval mode first"
    shape, size = image_CXYZ.shape[1:], tuple(size_vox)
    a, b = _others(axis)
    padded = [max(n, m) for n, m in zip(shape, size)]
    before = [(p - n) // 2 for p, n in zip(padded, shape)]
    starts = [_starts(p, m, cfg.overlap) for p, m in zip(padded, size)]
    kept, at_once = [min(n, m) for n, m in zip(shape, size)], cfg.batch(device)
    # What a window lacks on either side where the image is smaller: of all windows the same.
    lacks = [n for d in (2, 1, 0) for n in (before[d], padded[d] - shape[d] - before[d])]
    weight_SAB = _importance(size).permute(axis, a, b).to(device)
    total_SAB = torch.zeros(size[axis], padded[a], padded[b], device=device)
    sum_SKAB: Tensor | None = None
    inside = (slice(before[a], before[a] + shape[a]), slice(before[b], before[b] + shape[b]))
    for start, following in itertools.pairwise((*starts[axis], padded[axis])):
        corners = list(itertools.product(*([start] if d == axis else starts[d] for d in range(3))))
        for k in range(0, len(corners), at_once):
            batch = corners[k : k + at_once]
            boxes = [tuple(slice(c, c + n) for c, n in zip(corner, kept)) for corner in batch]
            x_BCXYZ = torch.stack([image_CXYZ[:, *box] for box in boxes]).to(device)
            x_BCXYZ = F.pad(x_BCXYZ, lacks) if any(lacks) else x_BCXYZ
            logits_BKXYZ = _logits(net, x_BCXYZ, cfg)
            if sum_SKAB is None:
                K = logits_BKXYZ.shape[1]
                sum_SKAB = torch.zeros(size[axis], K, padded[a], padded[b], device=device)
            for corner, logits_KXYZ in zip(batch, logits_BKXYZ):
                box = tuple(slice(corner[d], corner[d] + size[d]) for d in (a, b))
                logits_SKAB = logits_KXYZ.permute(1 + axis, 0, 1 + a, 1 + b)
                # A class at a time stays in cache, unless the network gives those of a voxel side by side.
                G = 1 if logits_KXYZ.stride(-1) == 1 else len(logits_KXYZ)
                for sum_SGAB, logits_SGAB in zip(sum_SKAB[:, :, *box].split(G, 1), logits_SKAB.split(G, 1)):
                    sum_SGAB.addcmul_(logits_SGAB, weight_SAB[:, None])
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


def _placed(image_CXYZ: np.ndarray, device: torch.device) -> Tensor:
    """The image on ``device`` if that is a GPU with room to spare, else on the host; windows are cut from either."""
    image = torch.from_numpy(np.ascontiguousarray(image_CXYZ))
    fits = device.type == "cuda" and image.nbytes < IMAGE_SHARE * torch.cuda.mem_get_info(device)[0]
    return image.to(device) if fits else image


def _logits(net: nn.Module, x_BCXYZ: Tensor, cfg: Config) -> Tensor:
    """logits_BKXYZ float32; with ``cfg.mirror`` their mean over the 8 flips."""
    flips: list[tuple[int, ...]] = [()]
    if cfg.mirror:
        flips = [dims for n in range(4) for dims in itertools.combinations((2, 3, 4), n)]
    total: Tensor | None = None
    for dims in flips:
        with networks.autocast(cfg.precision, x_BCXYZ.device):
            out: Any = net(x_BCXYZ.flip(dims) if dims else x_BCXYZ)
        logits = out.logits.float()
        logits = logits.flip(dims) if dims else logits
        total = logits if total is None else total.add_(logits)
    assert total is not None
    return total.div_(len(flips)) if cfg.mirror else total


def _starts(length: int, size: int, overlap: float) -> list[int]:
    """Where windows begin along one axis: MONAI's ``dense_patch_slices``. ``size`` <= ``length``."""
    interval = max(int(size * (1 - overlap)), 1)
    return [min(k * interval, length - size) for k in range(-(-(length - size) // interval) + 1)]


def num_windows(shape: Sequence[int], size: Sequence[int], overlap: float) -> int:
    """How many windows of ``size`` voxels segment a scan of this ``shape``."""
    return math.prod(len(_starts(max(n, m), m, overlap)) for n, m in zip(shape, size))


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
