"""Labelling a crop with 80 clusterers: scikit-learn's predict 80 times, one plain matrix product, the fused labeller.

    python benchmarks/labeller.py [--iterations 10] [--repeats 5] [--keep clusterers.safetensors]

Crops of 96^3 from the real scans in ../shared/data where they lie beside the checkout, else from phantoms.
80 clusterers of 80..500 clusters (the paper's) are fitted to 60 random crops, with fewer updates than the
paper's 350 since fitting is not what is timed; ``--keep`` reuses them. Held-out crops have other positions,
or come from scans the clusterers never saw; those make the headline. The ways are timed in turn, so a busy
machine slows all alike.

Every label is compared with scikit-learn's, and every difference with float64: it is explained when ours is
the float64 argmin and the gap is below the rounding bound of scikit-learn's float32 arithmetic.

Shapes: S slices of a crop, T pixels of a slice, N clusterers, V codes of all.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import threadpoolctl
import torch
from rich.console import Console
from rich.table import Table
from sklearn.cluster import MiniBatchKMeans

from logonet.clustering import kmeans
from logonet.clustering.kmeans import ClustererSet
from logonet.clustering.pseudo_labels import UNIT, Labeller, _fast, _product
from logonet.core import seeding
from logonet.data import phantom, volume

SCANS = Path(__file__).parents[2] / "shared" / "data" / "scans"
FITTED_SCANS = ["ct_trunk_3mm", "ct_head_float64", "ct_head_oblique"]
UNSEEN_SCANS = ["ct_abdomen_3mm", "mr_abdomen_3mm"]
SIDE = 96
FIT_CROPS = 60
NOISE = 0.01  # 20 HU of the 2000 HU window


def load_scans(names: list[str]) -> list[np.ndarray]:
    """Scans (X, Y, Z) windowed to [0, 1]: CT in HU by -1000..1000, everything else by percentiles."""
    import nibabel as nib

    out = []
    for i, name in enumerate(names):
        if SCANS.exists():
            image = nib.as_closest_canonical(nib.load(SCANS / f"{name}.nii.gz"))
            scan_XYZ = np.asarray(image.dataobj, np.float32)
        else:
            scan_XYZ = phantom.phantom(i, (160, 140, 130))[0].array_CXYZ[0]
        in_hu = scan_XYZ.min() < -500
        low, high = (-1000, 1000) if in_hu else np.percentile(scan_XYZ, [0.5, 99.5])
        out.append(np.clip((scan_XYZ - low) / (high - low), 0, 1))
    return out


def crop_slices(scan_XYZ: np.ndarray, key: str, noise: float = 0.0) -> np.ndarray:
    """Slices uint16 (S, T) of a random crop, padded with air where the scan is smaller, flipped at random."""
    rng = seeding.rng(0, "benchmark", key)
    padded_XYZ = np.pad(scan_XYZ, [(0, max(0, SIDE - n)) for n in scan_XYZ.shape])
    start = [rng.integers(0, n - SIDE + 1) for n in padded_XYZ.shape]
    crop_XYZ = padded_XYZ[tuple(slice(a, a + SIDE) for a in start)]
    crop_XYZ = np.flip(crop_XYZ, tuple(axis for axis in range(3) if rng.random() < 0.5))
    if noise:
        crop_XYZ = np.clip(crop_XYZ + noise * rng.standard_normal(crop_XYZ.shape), 0, 1)
    return np.ascontiguousarray(volume.to_uint16(crop_XYZ).reshape(-1, SIDE).T)


def fit_all(slices_ST: np.ndarray, cfg: kmeans.Config) -> ClustererSet:
    counts = kmeans.cluster_counts(cfg)
    # fork: both processes read the one sample. Torch has not computed anything yet.
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        jobs = [pool.submit(kmeans.fit_one, slices_ST, k, i, cfg) for i, k in enumerate(counts)]
        return ClustererSet.from_fitted([job.result() for job in jobs], {"iterations": cfg.iterations})


def sklearn_models(fitted: ClustererSet) -> list[MiniBatchKMeans]:
    models = []
    for centroids_KT in np.split(fitted.centroids_VT, fitted.sizes_N.cumsum()[:-1]):
        model = MiniBatchKMeans(len(centroids_KT))
        model.cluster_centers_, model.n_features_in_ = centroids_KT, fitted.centroids_VT.shape[1]
        models.append(model)
    return models


def plain_gemm(fitted: ClustererSet) -> Callable[[np.ndarray], np.ndarray]:
    """All scores in one float32 product, then one argmin per clusterer."""
    norm2_V = np.einsum("vt,vt->v", fitted.centroids_VT, fitted.centroids_VT)
    ends = np.cumsum(fitted.sizes_N)[:-1]

    def label(x_ST: np.ndarray) -> np.ndarray:
        score_SV = norm2_V - 2 * (x_ST @ fitted.centroids_VT.T)
        return np.stack([part.argmin(1) for part in np.split(score_SV, ends, axis=1)], 1)

    return label


def differences(
    fitted: ClustererSet, x_ST: np.ndarray, ours_SN: np.ndarray, theirs_SN: np.ndarray
) -> tuple[int, int, float]:
    """Labels that differ, those of them not explained by rounding, and the largest gap in u |x| |c|."""
    found = np.argwhere(ours_SN != theirs_SN)
    unexplained, largest = 0, 0.0
    for s, n in found:
        c_KT = fitted.of(n).astype(np.float64)
        d2_K = ((x_ST[s].astype(np.float64) - c_KT) ** 2).sum(1)
        unit = UNIT * np.linalg.norm(x_ST[s]) * np.linalg.norm(c_KT[theirs_SN[s, n]])
        gap = (d2_K[theirs_SN[s, n]] - d2_K[ours_SN[s, n]]) / unit
        # Either score |c|^2 - 2 x.c is within 2 T u |x| |c| of the truth, whatever the order of summing.
        is_argmin = d2_K[ours_SN[s, n]] <= d2_K.min() * (1 + 1e-12)
        unexplained += not (is_argmin and gap <= 4 * x_ST.shape[1])
        largest = max(largest, gap)
    return len(found), unexplained, largest


def timed(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, taken in turn."""
    wall_s: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            wall_s[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in wall_s.items()}


def gemm_rates(repeats: int) -> dict[str, float]:
    """Float32 GFLOP/s of a product of the labeller's shape, by NumPy's BLAS and by what the labeller uses."""
    c_VT, x_ST = np.random.default_rng(0).random((2, 1024, SIDE * SIDE), np.float32)
    x_ST = x_ST[:SIDE]
    c, x = _fast(torch.from_numpy(c_VT)), _fast(torch.from_numpy(x_ST))
    rates = {}
    ways: dict[str, Callable[[], object]] = {
        "labeller": lambda: _product(c, x),
        "numpy": lambda: c_VT @ x_ST.T,
    }
    for name, way in ways.items():  # not in turn: see measure
        wall_s = timed({name: way}, 4 * repeats)[name]
        rates[name] = 2e-9 * c_VT.size * SIDE / wall_s
    return rates


class Counting(Labeller):
    """Counts the (slice, code) pairs that get past the screen: products of float32, and distances in float64."""

    products = 0
    distances = 0

    def _products(self, x_ST: torch.Tensor, rows_U: torch.Tensor) -> torch.Tensor:
        self.products += len(x_ST) * len(rows_U)
        return super()._products(x_ST, rows_U)

    def _distances(self, x_ST: torch.Tensor, slice_P: torch.Tensor, code_P: torch.Tensor) -> torch.Tensor:
        self.distances += len(code_P)
        return super()._distances(x_ST, slice_P, code_P)

    def flop(self, num_slices: int) -> int:
        """Of all three steps, for so many slices."""
        V, T = self.centroids_VT.shape
        screen = num_slices * (T * self.rank + V * (self.rank + 4))
        return 2 * (screen + T * self.products) + 3 * T * self.distances


def measure(
    fitted: ClustererSet, fused: Labeller, crops: dict[str, np.ndarray], threads: int, repeats: int
) -> tuple[Table, dict[str, dict[str, float]]]:
    """One row a crop, as a table and as numbers."""
    torch.set_num_threads(threads)
    models, plain = sklearn_models(fitted), plain_gemm(fitted)
    for model in models:
        model._n_threads = threads
    rates = gemm_rates(repeats)
    table = Table(
        title=f"{threads} thread(s): ms per crop of {SIDE} slices, medians of {repeats}. Float32 products here: "
        f"NumPy {rates['numpy']:.0f}, labeller's {rates['labeller']:.0f} GFLOP/s; floor = GFLOP done at that rate"
    )
    table.add_column("crop")
    for column in ("sklearn x 80", "one GEMM", "fused", "speedup", "floor", "GFLOP", "of brute"):
        table.add_column(column, justify="right")
    for column in ("multiplied", "float64 pairs", "differ", "largest gap"):
        table.add_column(column, justify="right")
    rows = {}
    for name, slices_ST in crops.items():
        x_ST = volume.from_uint16(slices_ST)
        theirs_SN = np.stack([m.predict(x_ST) for m in models], 1)
        counting = Counting(fitted)
        ours_SN = counting(x_ST)
        gflop, brute_gflop = counting.flop(len(x_ST)) / 1e9, 2e-9 * x_ST.size * len(fitted.centroids_VT)
        pairs = len(x_ST) * len(fitted.centroids_VT)
        differ, unexplained, gap = differences(fitted, x_ST, ours_SN, theirs_SN)
        # In this order: OpenBLAS's second thread spins on for a while after the plain product, on the core that
        # the fused labeller's second thread needs; scikit-learn uses one thread for so few rows.
        ways: dict[str, Callable[[], object]] = {
            "plain": functools.partial(plain, x_ST),
            "sklearn": functools.partial(lambda x: [m.predict(x) for m in models], x_ST),
            "fused": functools.partial(fused, x_ST),
        }
        wall_s = timed(ways, repeats)
        rows[name] = {**wall_s, "equal": 1 - differ / ours_SN.size, "unexplained": unexplained}
        table.add_row(
            name,
            *(f"{1e3 * wall_s[way]:.0f}" for way in ("sklearn", "plain", "fused")),
            f"{wall_s['sklearn'] / wall_s['fused']:.1f}x",
            f"{1e3 * gflop / rates['labeller']:.0f}",
            f"{gflop:.1f}",
            f"{gflop / brute_gflop:.0%}",
            f"{counting.products / pairs:.1%}",
            str(counting.distances),
            str(differ),
            f"{gap:.2f} u|x||c|" if differ else "-",
        )
    return table, rows


def make_crops() -> tuple[list[np.ndarray], dict[str, np.ndarray], list[str]]:
    """Slices to fit on, crops to label by name, and the names that make the headline."""
    seen, unseen = load_scans(FITTED_SCANS), load_scans(UNSEEN_SCANS)
    fit = [crop_slices(seen[i % len(seen)], f"fit{i}") for i in range(FIT_CROPS)]
    crops = {f"held out: {name}": crop_slices(seen[i], f"held{i}") for i, name in enumerate(FITTED_SCANS)}
    crops |= {f"unseen: {name}": crop_slices(unseen[i], f"new{i}") for i, name in enumerate(UNSEEN_SCANS)}
    headline = list(crops)
    crops |= {f"fitted: {name}": fit[i] for i, name in enumerate(FITTED_SCANS)}
    crops["held out + 20 HU noise"] = crop_slices(seen[1], "held1", NOISE)
    white_ST = seeding.rng(0, "benchmark", "white").integers(0, 65536, (SIDE, SIDE * SIDE))
    crops["white noise"] = white_ST.astype(np.uint16)
    return fit, crops, headline


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=10, help="updates of every clusterer (paper: 350)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="the first is the headline")
    parser.add_argument("--keep", type=Path, help="fitted clusterers: read if there, else written")
    args = parser.parse_args()

    fit_crops, crops, headline = make_crops()
    started = time.perf_counter()
    if args.keep and args.keep.exists():
        fitted = ClustererSet.from_bytes(args.keep.read_bytes(), str(args.keep))
    else:
        fitted = fit_all(np.concatenate(fit_crops), kmeans.Config(iterations=args.iterations))
        if args.keep:
            args.keep.write_bytes(fitted.to_bytes())
    fit_s = time.perf_counter() - started
    torch.set_num_threads(args.threads[0])
    started = time.perf_counter()
    fused = Labeller(fitted)
    build_s = time.perf_counter() - started
    V, T = fitted.centroids_VT.shape
    print(
        f"{'real scans' if SCANS.exists() else 'phantoms'}; {len(fitted.sizes_N)} clusterers, {V:,} codes of {T:,} "
        f"pixels, {fitted.meta['iterations']} updates (the paper has 350), ready in {fit_s:.0f} s; "
        f"labeller built in {build_s:.1f} s"
    )
    result: dict[str, object] = {"threads": args.threads[0], "codes": V, "build_s": round(build_s, 1)}
    equal, unexplained = [], 0.0
    for threads in args.threads:
        with threadpoolctl.threadpool_limits(threads):
            table, rows = measure(fitted, fused, crops, threads, args.repeats)
        Console(width=170).print(table)
        total = {way: sum(rows[name][way] for name in headline) for way in ("sklearn", "plain", "fused")}
        ratios = {name: row["sklearn"] / row["fused"] for name, row in rows.items()}
        after = "" if threads == args.threads[0] else f"_{threads}_threads"
        result |= {
            f"speedup{after}": round(total["sklearn"] / total["fused"], 2),
            f"speedup_min{after}": round(min(ratios[name] for name in headline), 2),
            f"speedup_fitted_min{after}": round(
                min(r for n, r in ratios.items() if n.startswith("fitted")), 2
            ),
            f"speedup_white_noise{after}": round(ratios["white noise"], 2),
            f"plain_gemm_speedup{after}": round(total["sklearn"] / total["plain"], 2),
        }
        equal += [row["equal"] for row in rows.values()]
        unexplained += sum(row["unexplained"] for row in rows.values())
    result |= {
        "equal_share": min(equal),
        "unexplained_differences": int(unexplained),
        "real_scans": SCANS.exists(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP reads it as it loads. Threads that spin for a partner whose core other work has taken made two
        # threads 20 times slower than one.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    main()
