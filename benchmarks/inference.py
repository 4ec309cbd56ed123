"""Peak memory and time of segmenting a 512 x 512 x 400 CT with 14 classes: ours against MONAI's bundle pipeline.

    python benchmarks/inference.py [--shape 512 512 400] [--limit-gib 20] [--threads 2] [--rounds 3]
    python benchmarks/inference.py --shape 96 96 64 --classes 14 --against monai32    # half a minute

Both resample the same scan from 0.8 x 0.8 x 1.0 to 1.5 x 1.5 x 2.0 mm, slide the same 96^3 window with
overlap 0.5 and Gaussian weights, bring the logits back to the scan's own voxels and take the argmax. MONAI's
way is that of its bundles: Spacingd, ScaleIntensityRanged, sliding_window_inference, Invertd, AsDiscreted;
without the bundles' softmax, which would only add to it. Its Spacingd works in float64 unless told
otherwise, so both are measured. The network is a trivial one, so that what is measured is the rest.

Each row runs in a process of its own. Memory is the process's high-water mark above what it holds after
imports, before the scan is read; of several rounds the most. Seconds are the least. A row that passes
``--limit-gib`` is ended; MONAI is then measured on a half and a quarter of the slices, and what it would need is
extrapolated in a straight line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
import torch
from _measure import machine, peak_bytes, resident_bytes, sentence
from torch import Tensor, nn

from logonet.data.phantom import phantom
from logonet.data.volume import Volume
from logonet.inference import sliding_window
from logonet.inference.model import Spec
from logonet.networks import SegOut

NATIVE_MM, PREPARED_MM = (0.8, 0.8, 1.0), (1.5, 1.5, 2.0)
SIZE_VOX, WINDOW_HU, OVERLAP = (96, 96, 96), (-1000.0, 1000.0), 0.5
RESERVE_BYTES = 3 * 2**30  # left to whoever else is on the machine


class Levels(nn.Module):
    """The nearest of K intensities to the mean of 27 voxels: smooth logits, and every class occurs."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.mean, self.levels = nn.Conv3d(1, 1, 3, padding=1), nn.Conv3d(1, num_classes, 1)
        level_K = torch.linspace(0, 1, num_classes)
        with torch.no_grad():
            self.mean.weight.fill_(1 / 27)
            self.mean.bias.zero_()  # type: ignore[union-attr]
            self.levels.weight.copy_(40 * level_K.view(-1, 1, 1, 1, 1))
            self.levels.bias.copy_(-20 * level_K**2)  # type: ignore[union-attr]
        self.eval()

    def forward(self, x_BCXYZ: Tensor) -> SegOut:
        return SegOut(self.levels(self.mean(x_BCXYZ)), [], None)


def ceiling_bytes(
    native_xyz: Sequence[int],
    prepared_xyz: Sequence[int],
    num_classes: int,
    size_vox: Sequence[int],
    network_bytes: int,
    cfg: sliding_window.Config,
    in_channels: int = 1,
) -> int:
    """An upper bound of the memory of `sliding_window.Predictor.segment` at any time, its scan included.

    The sum of::

        image      4 C (native + prepared)                 float32
        labels     native                                  uint8
        sums       4 (K + 1) depth A' B'  +  4 K A B       the layer under way, its weights, one finished plane
        windows    4 (2 K + 2 C) size B                    a batch of windows and its logits; 4 K to mirror
        planes     24 max(A, A_native) max(B, B_native)    a class at a time; on CUDA CUDA_GROUP of them
        network    ``network_bytes``                       weights, and activations of one batch: measure them

    where A' B' is the prepared cross-section, at least as large as the window's. Before the sums exist, the
    percentiles of an MR scan take 9 C prepared in their stead, and the window 4 C. Only sums and windows grow
    with K, and neither grows with the scan's length along S. On CUDA image and labels are host memory, the rest
    the device's, and so is a copy of the prepared image where that is less than IMAGE_SHARE of what is free there.

    Args:
        native_xyz, prepared_xyz: shapes of the two grids in RAS axes.
        size_vox: the window.
    """
    axis = sliding_window.stream_axis(prepared_xyz, size_vox)
    a, b = (d for d in range(3) if d != axis)
    padded = [max(n, size) for n, size in zip(prepared_xyz, size_vox)]
    wider = [max(n, m) for n, m in zip(prepared_xyz, native_xyz)]
    native, prepared, window = (math.prod(shape) for shape in (native_xyz, prepared_xyz, size_vox))
    image = 4 * in_channels * (native + prepared)
    sums = 4 * (num_classes + 1) * size_vox[axis] * padded[a] * padded[b]
    sums += 4 * num_classes * prepared_xyz[a] * prepared_xyz[b]
    copies = 4 if cfg.mirror else 2  # of the logits: as the network gives them, in float32; the mean, flipped
    windows = 4 * (copies * num_classes + 2 * in_channels) * window * cfg.batch(torch.device("cpu"))
    planes = 24 * wider[a] * wider[b]
    percentiles = 9 * in_channels * prepared
    return image + native + max(sums + windows + planes, percentiles) + network_bytes


def spec(num_classes: int) -> Spec:
    return Spec(
        backbone={"name": "logonet"},  # not built: the network is Levels
        in_channels=1,
        classes=("background", *(f"organ {k}" for k in range(1, num_classes))),
        label_values=tuple(range(num_classes)),
        size_vox=SIZE_VOX,
        spacing_mm=PREPARED_MM,
        window_hu=WINDOW_HU,
        mr_percentiles=(0.5, 99.5),
        modality="CT",
    )


def affine() -> np.ndarray:
    return np.diag([*NATIVE_MM, 1.0])


def network(path: str, num_classes: int) -> None:
    """What the network itself needs for one window."""
    with torch.inference_mode():
        Levels(num_classes)(torch.zeros(1, 1, *SIZE_VOX))


def ours(path: str, num_classes: int) -> np.ndarray:
    scan = Volume(np.load(path)[None], affine())
    predictor = sliding_window.Predictor(
        Levels(num_classes), spec(num_classes), sliding_window.Config(overlap=OVERLAP), "cpu"
    )
    return predictor.segment(scan, "CT")


def monai(path: str, num_classes: int, dtype: type = np.float64) -> np.ndarray:
    from monai.data import MetaTensor
    from monai.inferers import sliding_window_inference
    from monai.transforms import AsDiscreted, Compose, Invertd, ScaleIntensityRanged, Spacingd

    net, (low, high) = Levels(num_classes), WINDOW_HU
    before = Compose(
        [
            Spacingd("image", PREPARED_MM, mode="bilinear", dtype=dtype),
            ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0, b_max=1, clip=True),
        ]
    )
    after = Compose(
        [
            Invertd("pred", before, orig_keys="image", nearest_interp=False, to_tensor=True),
            AsDiscreted("pred", argmax=True),
        ]
    )
    with torch.inference_mode():
        data = before({"image": MetaTensor(np.load(path)[None], affine=torch.from_numpy(affine()))})
        pred = sliding_window_inference(
            data["image"][None],
            SIZE_VOX,
            1,
            lambda x_BCXYZ: net(x_BCXYZ).logits,
            OVERLAP,
            mode="gaussian",
        )
        data["pred"] = pred[0]  # type: ignore[index]
        del pred
        return np.asarray(after(data)["pred"][0]).astype(np.uint8)


def monai32(path: str, num_classes: int) -> np.ndarray:
    return monai(path, num_classes, np.float32)


KINDS = {"network": network, "ours": ours, "monai": monai, "monai32": monai32}
NAMES = {"ours": "ours", "monai": "MONAI", "monai32": "MONAI, float32"}


def measure(kind: str, path: str, num_classes: int, out: str) -> dict[str, float]:
    import monai.inferers
    import monai.transforms  # noqa: F401

    start_bytes = resident_bytes()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    labels_XYZ = KINDS[kind](path, num_classes)
    wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    peak_mb = (peak_bytes() - start_bytes) / 1e6
    if labels_XYZ is not None:
        np.save(out, labels_XYZ)
    return {"peak_mb": peak_mb, "wall_s": wall_s, "cpu_s": cpu_s}


class TooBig(Exception):
    pass


def run(kind: str, path: str, num_classes: int, out: str, args: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process of its own, ended when it passes the limit."""
    command = [sys.executable, __file__, "--threads", str(args.threads)]
    command += ["--one", kind, path, str(num_classes), out]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process = psutil.Process(child.pid)
    while True:
        try:
            text, _ = child.communicate(timeout=0.1)
            break
        except subprocess.TimeoutExpired:
            held = process.memory_info().rss
        if held > args.limit_gib * 2**30 or psutil.virtual_memory().available < RESERVE_BYTES:
            child.kill()
            child.communicate()
            raise TooBig(f"ended at {held / 2**30:.1f} GiB")
    if child.returncode:
        raise SystemExit(f"{kind} failed with status {child.returncode}")
    return json.loads(text.splitlines()[-1])


def write_scan(path: str, shape: tuple[int, int, int]) -> None:
    scan, _ = phantom(0, shape, NATIVE_MM, "CT", classes=6)
    array_XYZ = scan.array_CXYZ[0]
    noise = np.random.default_rng(0)
    for plane_YZ in array_XYZ:
        plane_YZ += noise.normal(0, 20, plane_YZ.shape)
    np.save(path, np.ascontiguousarray(array_XYZ))


def agreement(a_path: str, b_path: str) -> float:
    pairs = zip(np.load(a_path, mmap_mode="r"), np.load(b_path, mmap_mode="r"))
    return float(np.mean([np.mean(a_YZ == b_YZ) for a_YZ, b_YZ in pairs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs=3, type=int, default=(512, 512, 400))
    parser.add_argument("--limit-gib", type=float, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--classes", nargs="+", type=int, default=(14, 28), help="the first for MONAI too")
    parser.add_argument("--against", nargs="*", choices=("monai32", "monai"), default=("monai32", "monai"))
    parser.add_argument("--one", nargs=4, metavar=("KIND", "PATH", "K", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        kind, path, num_classes, out = args.one
        print(json.dumps(measure(kind, path, int(num_classes), out)))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(folder, args)


def compare(folder: str, args: argparse.Namespace) -> None:
    shape = tuple(args.shape)
    rows = []

    def scan_of(slices: int) -> str:
        path = os.path.join(folder, f"scan-{slices}.npy")
        if not os.path.exists(path):
            whole = os.path.join(folder, f"scan-{shape[2]}.npy")
            np.save(path, np.ascontiguousarray(np.load(whole, mmap_mode="r")[:, :, :slices]))
        return path

    def row(kind: str, num_classes: int, slices: int) -> dict[str, Any]:
        out = os.path.join(folder, f"{kind}-{num_classes}-{slices}.npy")
        size = (*shape[:2], slices)
        new: dict[str, Any] = {"kind": kind, "classes": num_classes, "shape": size, "out": out}
        try:
            done = [run(kind, scan_of(slices), num_classes, out, args) for _ in range(args.rounds)]
            new |= {key: (max if key == "peak_mb" else min)(one[key] for one in done) for key in done[0]}
        except TooBig as err:
            new |= {"failed": str(err)}
        if kind == "ours":
            new["ceiling_mb"] = ceiling_mb(size, num_classes)
            assert new["peak_mb"] <= new["ceiling_mb"], new
        base = os.path.join(folder, f"ours-{num_classes}-{slices}.npy")
        if kind != "ours" and "failed" not in new and os.path.exists(base):
            new["same_share"] = agreement(base, out)
        rows.append(new)
        show(new)
        return new

    def ceiling_mb(size: tuple[int, ...], num_classes: int) -> float:
        meta = Volume(np.broadcast_to(np.float32(0), (1, *size)), affine())
        prepared = spec(num_classes).to_grid(meta).shape_xyz
        cfg = sliding_window.Config(overlap=OVERLAP)
        network_bytes = int(network_mb[num_classes] * 1e6)
        return ceiling_bytes(size, prepared, num_classes, SIZE_VOX, network_bytes, cfg) / 1e6

    def show(r: dict[str, Any]) -> None:
        size = "x".join(map(str, r["shape"]))
        print(f"{NAMES[r['kind']]:>15} {r['classes']:>7} {size:>12} ", end="")
        if "failed" in r:
            print(r["failed"], flush=True)
            return
        ceiling = f"{r['ceiling_mb']:.0f}" if "ceiling_mb" in r else "-"
        same = f"{100 * r['same_share']:.3f} %" if "same_share" in r else "-"
        print(
            f"{r['peak_mb']:>9.0f} {ceiling:>11} {r['wall_s']:>7.1f} {r['cpu_s']:>7.1f} {same:>10}",
            flush=True,
        )

    write_scan(os.path.join(folder, f"scan-{shape[2]}.npy"), shape)
    about = machine()
    network_mb = {k: run("network", "", k, "", args)["peak_mb"] for k in args.classes}
    print(sentence(about))
    print(
        f"{'':>15} {'classes':>7} {'voxels':>12} {'peak MB':>9} {'ceiling MB':>11} {'wall s':>7} {'CPU s':>7} "
        f"{'as ours':>10}"
    )
    first, *more = args.classes
    few, others = row("ours", first, shape[2]), [row("ours", k, shape[2]) for k in more]
    ratios = {}
    for kind in args.against:
        theirs = row(kind, first, shape[2])
        if "failed" not in theirs:
            ratios[kind] = {key: few[key] / theirs[key] for key in ("wall_s", "cpu_s", "peak_mb")}
        else:
            slices = (shape[2] // 4, shape[2] // 2)
            parts = [row(kind, first, n) for n in slices]
            if not any("failed" in part for part in parts):
                a, b = (part["peak_mb"] for part in parts)
                needs = b + (b - a) * (shape[2] - slices[1]) / (slices[1] - slices[0])
                rows.append({"kind": kind, "classes": first, "shape": shape, "extrapolated_mb": needs})
                print(f"{NAMES[kind]:>15} would need about {needs:.0f} MB for {shape[2]} slices", flush=True)
    for many in others:
        k = many["classes"] - first
        print(
            f"{k} more classes: {many['peak_mb'] - few['peak_mb']:+.0f} MB (the ceiling: "
            f"{many['ceiling_mb'] - few['ceiling_mb']:+.0f} MB; at native size they would be "
            f"{k * 4 * np.prod(shape) / 1e6:.0f} MB)"
        )
    for kind, ratio in ratios.items():
        print(
            f"ours / {NAMES[kind]}: {ratio['wall_s']:.2f} of the seconds, {ratio['cpu_s']:.2f} of the processor "
            f"seconds, {ratio['peak_mb']:.2f} of the memory"
        )
    for r in rows:
        r.pop("out", None)
    print(
        json.dumps(
            {"benchmark": "inference", **about, "network_mb": network_mb, "rows": rows, "ratios": ratios}
        )
    )


if __name__ == "__main__":
    main()
