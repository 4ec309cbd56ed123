"""The benchmarks of throughput compare like with like, and run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from logonet.data import cropping, manifest, phantom, prepared_scans, preparing, volume
from logonet.storage import object_store

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import ingest  # noqa: E402  (the benchmarks are no package)
from _pictures import bars_with_ci  # noqa: E402


@pytest.mark.parametrize("spacing_mm", [None, (1.0, 1.2, 1.5)])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_bare_loop_cuts_our_crops(
    bucket: str, modality: str, spacing_mm: tuple[float, float, float] | None
) -> None:
    scan, _ = phantom.phantom(0, (40, 36, 28), (0.9, 0.9, 2.0), modality, orientation="LPS")
    uri = f"{bucket}/scan.nii.gz"
    object_store.write(uri, volume.encode_nifti(scan.array_CXYZ[0].astype(np.int16), scan.affine))
    row = manifest.inspect(manifest.Source(uri, modality=modality))
    assert isinstance(row, manifest.Scan)
    cfg = cropping.Config(size_vox=(32, 24, 32), spacing_mm=spacing_mm)
    ref = preparing.PrepareScan(None, prepared_scans.Config.of(cfg), f"{bucket}/scans/p")(row)
    assert isinstance(ref, prepared_scans.Ref)
    ours_RCXYZ = [row["image"] for row in ingest.feed_of([ref], cfg, 4).rows([(0, i) for i in range(4)])]
    bare_RXYZ = ingest.bare_scan((uri, row.modality, cfg, ingest.corners_of(ref, cfg)))
    np.testing.assert_array_equal(bare_RXYZ, np.stack(ours_RCXYZ)[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "ingest.py --scans 3 --distinct 2 --rounds 1 --shape 40 40 40 --crop-vox 32 --batch 2",
        "training.py --workers 1 2 --steps 1 --epochs 1 --global-batch 2 --size 64 --clusterers 2 --k 5",
        "scale.py --scans 50 --per-scan 2 --steps 3 --ranks 2",
        "gpu.py --device cpu --quick",
        "head.py --clusterers 2 --classes 10 --size 16",
        "step.py --head both --size 64 --clusterers 2 --k-min 5 --k-max 10 --dims 8 8 8 8",
        "prepare.py --methods glmae simtrot --side 32 --draws 2 --rounds 1",
        "inference.py --shape 64 64 48 --classes 3 5 --against monai32 --threads 1",
        "fitting.py --clusterers 2 --k-min 4 --k-max 8 --iterations 2 --slices 256 --side 32 --rounds 1",
    ],
    ids=lambda command: command.split(".")[0],
)
def test_benchmarks_run_and_end_on_json(command: str) -> None:
    name, *argv = command.split()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *argv],
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"},
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["cores"] == os.cpu_count()


@pytest.mark.parametrize("rows", [1, 6])
def test_means_with_intervals_in_groups(rows: int) -> None:
    names, groups = ["LoGoNet", "DynUNet", "SwinUNETR"], ["10 % of the labels", "100 % of the labels"]
    mean = np.linspace(0.7, 0.9, 6)
    table = pd.DataFrame({"name": names * 2, "group": np.repeat(groups, 3), "mean": mean})
    table = table.assign(ci_low=mean - 0.02, ci_high=mean + 0.01)[:rows]
    table.loc[1:1, ["mean", "ci_low", "ci_high"]] = np.nan
    assert bars_with_ci(table, "Hippocampus").startswith(b"\x89PNG")
    figure = bars_with_ci.__wrapped__(table, "Hippocampus", "mean Dice")  # type: ignore[attr-defined]
    said = [text.get_text().strip() for text in figure.findobj(Text) if text.get_visible()]
    assert {"10 % of the labels", "0.700 [0.680, 0.710]", "mean Dice"} <= set(said)
    if rows > 1:
        assert said.count("DynUNet") == 2 and {"100 % of the labels", "-"} <= set(said)
