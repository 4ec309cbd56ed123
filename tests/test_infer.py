"""Streamed segmentation: equal to MONAI's sliding window and SciPy's resampling, in bounded memory."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from logonet import networks
from logonet.core.errors import BadScan, UserError
from logonet.data import volume
from logonet.data.volume import Volume
from logonet.inference import model, sliding_window
from logonet.inference.model import Spec
from logonet.inference.sliding_window import Config, Predictor
from logonet.networks import SegOut
from logonet.storage import object_store

CPU = torch.device("cpu")
OBLIQUE = np.array([[1.4, 0.2, 0.1, 30], [-0.2, 1.6, 0.3, -20], [0, -0.3, 2.4, 7], [0, 0, 0, 1]])


class Net(nn.Module):
    """Two convolutions with zero padding, so that a window's logits depend on where its border is."""

    def __init__(self, classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.last = nn.Conv3d(1, 6, 3, padding=1), nn.Conv3d(6, classes, 3, padding=1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
        self.eval()

    def forward(self, x_BCXYZ: Tensor) -> SegOut:
        return SegOut(self.last(torch.sin(self.first(x_BCXYZ))), [], None)


def spec(classes: int = 4, **changes: Any) -> Spec:
    values: dict[str, Any] = {
        "backbone": {"name": "ulkanet"},
        "in_channels": 1,
        "classes": ("background", *(f"organ {k}" for k in range(1, classes))),
        "label_values": tuple(range(classes)),
        "size_vox": (8, 8, 8),
        "spacing_mm": (1.5, 1.5, 2.0),
        "window_hu": (-200.0, 300.0),
        "mr_percentiles": (1.0, 99.0),
        "modality": "mixed",
    }
    return Spec(**(values | changes))


def smooth(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """(1, *shape) float32, about -300 to 400."""
    noise = np.random.default_rng(seed).normal(size=shape)
    field = ndimage.gaussian_filter(noise, 1.0, mode="wrap")
    return (300 * field / field.std() + 50).astype(np.float32)[None]


def monai_logits(net: nn.Module, image_CXYZ: np.ndarray, size_vox: Any, cfg: Config) -> np.ndarray:
    """logits_KXYZ float64 of the whole image; mirroring written down flip by flip."""
    from monai.inferers import sliding_window_inference

    def network(x_BCXYZ: Tensor) -> Tensor:
        if not cfg.mirror:
            return net(x_BCXYZ).logits
        flips = [
            tuple(d for d, on in zip((2, 3, 4), mask) if on) for mask in itertools.product((0, 1), repeat=3)
        ]
        return torch.stack([net(x_BCXYZ.flip(dims)).logits.flip(dims) for dims in flips]).mean(0)

    with torch.no_grad():
        x_BCXYZ = torch.from_numpy(np.ascontiguousarray(image_CXYZ))[None]
        out = sliding_window_inference(
            x_BCXYZ, size_vox, cfg.batch(CPU), network, cfg.overlap, mode="gaussian"
        )
    return out[0].double().numpy()  # type: ignore[union-attr]


def resampled(logits_KXYZ: np.ndarray, shape: tuple[int, ...], step: np.ndarray) -> np.ndarray:
    """logits at native voxel i = prepared position i / step, the edge repeated."""
    return np.stack(
        [
            ndimage.affine_transform(x_XYZ, 1 / step, output_shape=shape, order=1, mode="nearest")
            for x_XYZ in logits_KXYZ
        ]
    )


def assert_argmax(labels_XYZ: np.ndarray, logits_KXYZ: np.ndarray) -> None:
    """Equal to argmax, except where two classes are equal to rounding."""
    assert labels_XYZ.dtype == np.uint8
    best_XYZ = logits_KXYZ.max(0)
    chosen_XYZ = np.take_along_axis(logits_KXYZ, labels_XYZ[None].astype(np.int64), 0)[0]
    np.testing.assert_allclose(chosen_XYZ, best_XYZ, atol=2e-5)
    assert np.mean(labels_XYZ == logits_KXYZ.argmax(0)) > 0.999


# --------------------------------------------------------------------------------- windows, as MONAI's

SHAPES = [(15, 12, 19), (8, 8, 8), (9, 22, 8), (5, 13, 9), (3, 4, 5), (1, 1, 12), (2, 17, 17)]
CONFIGS = [
    Config(),
    Config(overlap=0.0),
    Config(overlap=0.25, windows_per_batch=3),
    Config(overlap=0.6),
    Config(mirror=True, windows_per_batch=2),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cfg", CONFIGS, ids=str)
def test_logits_equal_monai(shape: tuple[int, int, int], cfg: Config) -> None:
    net, size = Net(), (8, 6, 10)  # unequal: an axis taken for another would show
    image_CXYZ = np.random.default_rng(0).random((1, *shape), np.float32)
    expected_KXYZ = monai_logits(net, image_CXYZ, size, cfg)
    for axis in range(3):
        with torch.no_grad():
            planes = sliding_window.planes(net, torch.from_numpy(image_CXYZ), size, cfg, CPU, axis)
            got_KXYZ = np.stack([plane.numpy().copy() for plane in planes], axis + 1)
        np.testing.assert_allclose(got_KXYZ, expected_KXYZ, atol=1e-5)
    assert_argmax(sliding_window.labels(net, image_CXYZ, size, cfg, "cpu"), expected_KXYZ)


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("length", [8, 9, 12, 13, 16, 31, 100])
def test_windows_begin_where_monai_puts_them(length: int, overlap: float) -> None:
    from monai.data.utils import dense_patch_slices
    from monai.inferers.utils import _get_scan_interval

    interval = _get_scan_interval((length,), (8,), 1, (overlap,))
    expected = [place[0].start for place in dense_patch_slices((length,), (8,), interval)]
    assert sliding_window._starts(length, 8, overlap) == expected


@pytest.mark.parametrize("size", [(8, 8, 8), (96, 96, 96), (3, 16, 40)])
def test_importance_equals_monai(size: tuple[int, int, int]) -> None:
    from monai.data.utils import compute_importance_map

    assert torch.equal(sliding_window._importance(size), compute_importance_map(size, mode="gaussian"))


@pytest.mark.parametrize("backbone", ["ulkanet", "logonet"])
def test_logits_and_labels_of_a_backbone(backbone: str) -> None:
    torch.manual_seed(0)
    net = networks.build(backbone, 1, 3, **networks.tiny(backbone)).eval()
    image_CXYZ, size = np.random.default_rng(0).random((1, 20, 32, 36), np.float32), (32, 32, 32)
    expected_KXYZ = monai_logits(net, image_CXYZ, size, Config())
    with torch.no_grad():
        planes = sliding_window.planes(net, torch.from_numpy(image_CXYZ), size, Config(), CPU, 2)
        got_KXYZ = np.stack([plane.numpy().copy() for plane in planes], 3)
    np.testing.assert_allclose(got_KXYZ, expected_KXYZ, atol=1e-5)
    assert_argmax(
        sliding_window.labels(net, torch.from_numpy(image_CXYZ), size, Config(), "cpu"), expected_KXYZ
    )


# ------------------------------------------------------------------------------------ to native voxels


def reference(net: nn.Module, scan: Volume, modality: str, given: Spec, cfg: Config) -> np.ndarray:
    """logits_KXYZ on the scan's own voxels, everything held whole."""
    ras = volume.to_ras(scan)
    prepared = given.to_grid(scan)
    low_high = given.intensity_range(prepared.array_CXYZ, modality, "scan")
    logits_KXYZ = monai_logits(net, volume.window(prepared.array_CXYZ, low_high), given.size_vox, cfg)
    step = np.array(prepared.spacing_mm) / np.array(ras.spacing_mm)
    logits_KXYZ = resampled(logits_KXYZ, ras.shape_xyz, step)
    to_stored = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.io_orientation(scan.affine)
    )
    return np.stack([nib.orientations.apply_orientation(x_XYZ, to_stored) for x_XYZ in logits_KXYZ])


def oriented(scan: Volume, codes: str) -> Volume:
    """The same scan with its axes stored in another order."""
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(scan.affine), nib.orientations.axcodes2ornt(codes)
    )
    array_XYZ = nib.orientations.apply_orientation(scan.array_CXYZ[0], turn)
    affine = scan.affine @ nib.orientations.inv_ornt_aff(turn, scan.shape_xyz)
    return Volume(np.asfortranarray(array_XYZ)[None], affine)


SCANS = {  # shape, affine, spacing that it is resampled to
    "finer": ((14, 12, 22), OBLIQUE, (1.0, 1.1, 1.3)),
    "coarser": ((30, 26, 18), OBLIQUE, (2.5, 2.5, 4.0)),
    "as it is": ((14, 17, 12), OBLIQUE, None),
    "its own spacing": ((9, 16, 12), np.diag([1.5, 1.5, 2.0, 1.0]), (1.5, 1.5, 2.0)),
    "one axis": ((9, 16, 12), np.diag([1.5, 1.5, 5.0, 1.0]), (1.5, 1.5, 2.0)),
    "two voxels thick": ((20, 19, 2), OBLIQUE, (1.5, 1.5, 2.0)),
    "two voxels become one": ((20, 2, 19), np.diag([1.0, 0.5, 1.0, 1.0]), (1.5, 1.5, 2.0)),
    "smaller than the window": ((5, 4, 6), OBLIQUE, (1.5, 1.5, 2.0)),
}


@pytest.mark.parametrize("case", SCANS)
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_segment_equals_holding_everything(case: str, modality: str) -> None:
    shape, affine, spacing_mm = SCANS[case]
    net, given, scan = Net(), spec(spacing_mm=spacing_mm), Volume(smooth(shape), affine)
    got_XYZ = Predictor(net, given, device="cpu").segment(scan, modality)
    assert got_XYZ.shape == shape
    assert len(np.unique(got_XYZ)) >= 3
    assert_argmax(got_XYZ, reference(net, scan, modality, given, Config()))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "IRP", "ASR"])
@pytest.mark.parametrize("affine", [OBLIQUE, np.diag([0.9, 1.2, 3.0, 1.0])], ids=["oblique", "straight"])
def test_labels_come_in_the_axes_of_the_file(codes: str, affine: np.ndarray) -> None:
    net, cfg = Net(), Config(mirror=True)
    scan = oriented(Volume(smooth((13, 15, 12)), affine), codes)
    assert scan.orientation == codes
    got_XYZ = Predictor(net, spec(), cfg, "cpu").segment(scan, "CT")
    assert_argmax(got_XYZ, reference(net, scan, "CT", spec(), cfg))


def test_label_values_are_written() -> None:
    scan = Volume(smooth((12, 10, 9)), OBLIQUE)
    plain_XYZ = Predictor(Net(), spec(), device="cpu").segment(scan, "CT")
    values = (0, 255, 7, 3)
    valued_XYZ = Predictor(Net(), spec(label_values=values), device="cpu").segment(scan, "CT")
    np.testing.assert_array_equal(valued_XYZ, np.array(values, np.uint8)[plain_XYZ])


def test_in_a_tie_the_first_class_wins() -> None:
    net = Net()
    with torch.no_grad():
        net.last.weight[2], net.last.bias[2] = net.last.weight[1], net.last.bias[1]
    labels_XYZ = sliding_window.labels(
        net, np.random.default_rng(0).random((1, 12, 9, 9), np.float32), (8,) * 3, Config(), CPU
    )
    assert {1, 3} <= set(np.unique(labels_XYZ)) <= {0, 1, 3}


def test_the_same_scan_gives_the_same_labels() -> None:
    predictor, scan = Predictor(Net(), spec(), device="cpu"), Volume(smooth((20, 18, 12)), OBLIQUE)
    before = scan.array_CXYZ.copy()
    first = predictor.segment(scan, "MR")
    np.testing.assert_array_equal(first, predictor.segment(scan, "MR"))
    np.testing.assert_array_equal(scan.array_CXYZ, before)


def test_a_folder_segments_as_its_network_does(tmp_path: Path) -> None:
    torch.manual_seed(1)
    options = {"name": "ulkanet", **networks.tiny("ulkanet")}
    given = spec(3, backbone=options, size_vox=(32, 32, 32))
    net = networks.build("ulkanet", 1, 3, **networks.tiny("ulkanet"))
    for name, data in model.files(given, net.state_dict()).items():
        object_store.write(object_store.join(str(tmp_path), name), data)
    scan = Volume(smooth((24, 20, 30)), OBLIQUE)
    got_XYZ = Predictor.load(str(tmp_path), device="cpu").segment(scan, "CT")
    np.testing.assert_array_equal(got_XYZ, Predictor(net, given, device="cpu").segment(scan, "CT"))


# --------------------------------------------------------------------------- batches, precision, batch norm


class Spy(Net):
    """Notes the windows of each batch and the type that convolutions compute in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, torch.dtype]] = set()

    def forward(self, x_BCXYZ: Tensor) -> SegOut:
        self.seen.add((len(x_BCXYZ), self.first(x_BCXYZ).dtype))
        return super().forward(x_BCXYZ)


@pytest.mark.parametrize(
    ("cfg", "seen"),
    [
        (Config(), {(1, torch.float32)}),
        (Config(windows_per_batch=2), {(2, torch.float32)}),
        (Config(precision="fp32"), {(1, torch.float32)}),
        (Config(precision="bf16"), {(1, torch.bfloat16)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("around", [False, True])
def test_batches_and_precision_are_those_of_the_settings(
    cfg: Config, seen: set[tuple[int, torch.dtype]], around: bool
) -> None:
    net, image_CXYZ = Spy(), np.zeros((1, 8, 12, 12), np.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):  # of whoever calls: it decides nothing
        sliding_window.labels(net, image_CXYZ, (8,) * 3, cfg, CPU)
    predictor = Predictor(net, spec(spacing_mm=None), cfg, CPU)
    predictor.segment(Volume(smooth((8, 12, 12)), np.eye(4)), "CT")
    assert net.seen == predictor.net.seen == seen


def test_a_gpu_sees_several_windows_at_once() -> None:
    assert Config().batch(CPU) == 1 < Config().batch(torch.device("cuda"))
    assert Config(windows_per_batch=3).batch(torch.device("cuda")) == 3


def test_an_id_covers_what_decides_labels() -> None:
    """It is the id of before windows_per_batch could be left to the device."""
    known = {"overlap": 0.5, "mirror": False, "windows_per_batch": 1}
    assert Config().identity() == Config(windows_per_batch=8).identity() == known
    assert Config(mirror=True, precision="fp32").identity() == {**known, "mirror": True, "precision": "fp32"}


# --------------------------------------------------------------------------------------------- refusals


def test_another_modality_is_refused() -> None:
    scan = Volume(smooth((9, 9, 9)), OBLIQUE)
    with pytest.raises(BadScan, match=r"^case 7: is MR, but the model was trained on CT only"):
        Predictor(Net(), spec(modality="CT"), device="cpu").segment(scan, "MR", "case 7")
    with pytest.raises(BadScan, match="has 1 channels, but the model wants 2"):
        Predictor(Net(), spec(in_channels=2), device="cpu").segment(scan, "CT", "case 7")


def test_a_scan_without_contrast_is_refused() -> None:
    flat = np.zeros((1, 9, 9, 9), np.float32)
    flat[0, 2:7] = 5
    with pytest.raises(BadScan, match=r"case 7: .*no contrast"):
        Predictor(Net(), spec(spacing_mm=None), device="cpu").segment(Volume(flat, OBLIQUE), "MR", "case 7")


def test_an_answer_that_is_not_a_number_is_refused() -> None:
    net = Net()
    with torch.no_grad():
        net.last.bias[2] = math.nan
    with pytest.raises(BadScan, match="case 7: the network's answer is not a number"):
        Predictor(net, spec(), device="cpu").segment(Volume(smooth((9, 9, 9)), OBLIQUE), "CT", "case 7")


@pytest.mark.parametrize("changes", [{"overlap": 1.0}, {"overlap": -0.1}, {"windows_per_batch": 0}])
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"infer.{next(iter(changes))}"):
        Config(**changes)


# ----------------------------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation has made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("length", [24, 96])
def test_no_array_has_all_classes_of_all_voxels(length: int) -> None:
    """Memory itself is measured in benchmarks/inference.py; here the largest tensor is."""
    classes, size = 5, 8
    scan = Volume(smooth((20, 22, length)), np.eye(4))
    predictor = Predictor(Net(classes), spec(classes, spacing_mm=(1.1, 1.1, 1.1)), device="cpu")
    prepared = predictor.spec.to_grid(scan).shape_xyz
    with Largest():  # what is imported and cached on first use is not counted
        predictor.segment(scan, "CT")
    tracemalloc.start()
    with Largest() as largest:
        predictor.segment(scan, "CT")
    _, numpy_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # the sums of a layer, or the prepared image of one channel
    assert largest.elements <= max(classes * size * prepared[0] * prepared[1], math.prod(prepared))
    # NumPy's side: the resampled image, twice while its intensities are mapped, and planes that do not grow with length
    assert numpy_bytes < 2 * 4 * math.prod(prepared) + 100_000, (numpy_bytes, prepared)


@pytest.mark.cuda
def test_an_image_that_a_gpu_has_no_room_for_stays_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, scan = Predictor(Net(), spec(), device="cuda"), Volume(smooth((40, 36, 30)), OBLIQUE)
    on_gpu = predictor.segment(scan, "CT")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    np.testing.assert_array_equal(predictor.segment(scan, "CT"), on_gpu)


@pytest.mark.cuda
def test_on_a_gpu_bfloat16_hardly_changes_labels() -> None:
    scan = Volume(smooth((40, 36, 30)), OBLIQUE)
    on_cpu = Predictor(Net(), spec(), device="cpu").segment(scan, "CT")
    predictor = Predictor(Net(), spec(), device="cuda")
    on_gpu = predictor.segment(scan, "CT")
    assert np.mean(on_cpu == on_gpu) > 0.98
    np.testing.assert_array_equal(on_gpu, predictor.segment(scan, "CT"))
