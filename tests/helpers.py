"""What several test files share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logonet.data import prepared_scans
from logonet.data.volume import Volume
from logonet.distributed.cluster import Resources
from logonet.distributed.executor import RayExecutor
from logonet.storage.artifacts import Artifact
from logonet.training import checkpoints
from logonet.training.local import LocalExecutor
from tools.chaos import timeless as timeless

HERE = LocalExecutor(device="cpu")


def of_each_kind(names: Iterable[str], *some: str) -> list[Any]:
    """All ``names`` as parameters of a test, of which those beside ``some`` are slow ones."""
    return [pytest.param(name, marks=[] if name in some else pytest.mark.slow) for name in names]


def on_ray(workers: int = 2) -> RayExecutor:
    return RayExecutor(Resources(workers=workers))


def tilted(scan: Volume, tilt_deg: float) -> Volume:
    """A scan whose acquisition was turned about the first axis."""
    c, s = np.cos(np.deg2rad(tilt_deg)), np.sin(np.deg2rad(tilt_deg))
    turn = np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1.0]])
    return replace(scan, affine=turn @ scan.affine)


def tiny_backbone() -> dict[str, Any]:
    from logonet.networks import logonet

    return {"name": "logonet", **logonet.TINY}


def quick_backbone() -> dict[str, Any]:
    """Takes crops of 16^3; a step has a tenth of the time of one of `tiny_backbone` on crops of 32^3."""
    from logonet import networks

    return {"name": "dynunet", **networks.tiny("dynunet")}


def losses_of(module: Any, batch: Any, lr: float) -> list[float]:
    """Of 20 steps of AdamW on one batch."""
    import torch

    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(20):
        loss, _ = module(batch, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(module, "after_step"):
            module.after_step(0.0)
        losses.append(loss.item())
    return losses


def assert_same_gradients(a: Artifact, b: Artifact) -> None:
    """Of the first step, to rounding: AdamW's first moments after it are 0.1 of them.

    Weights cannot be compared so: AdamW's first steps have the size of the learning rate however small a gradient
    is, so rounding of one near 0 turns its weight's step round.
    """
    import torch

    found, expected = (
        checkpoints.load_state(f"{x.uri}/checkpoints/step-00000001", x.fingerprint) for x in (a, b)
    )
    assert found.optimizer.keys() == expected.optimizer.keys()
    moments = [name for name in found.optimizer if name.startswith("exp_avg/")]
    largest = max(expected.optimizer[name].abs().max() for name in moments)
    assert largest > 0
    for name in moments:
        torch.testing.assert_close(
            found.optimizer[name], expected.optimizer[name], rtol=1e-3, atol=1e-5 * float(largest)
        )


def prepared_case(
    scan: Volume, indices_XYZ: np.ndarray, modality: str, cfg: prepared_scans.Config, scan_id: str
) -> tuple[np.ndarray, np.ndarray]:
    """image_CXYZ and labels_XYZ as they are stored."""
    image_CXYZ = prepared_scans.prepare_image(scan, modality, cfg, scan_id)
    return image_CXYZ, prepared_scans.prepare_labels(indices_XYZ, scan.affine, cfg)


def stored_case(
    folder: Path | str, scan_id: str, image_CXYZ: np.ndarray, labels_XYZ: np.ndarray | None = None
) -> prepared_scans.Ref:
    """A prepared scan in a store of its own at ``folder``/scans/p."""
    store, name = f"{folder}/scans/p", f"{scan_id}.safetensors"
    blob = prepared_scans.image_file(scan_id, image_CXYZ)
    image, labels = prepared_scans.write(f"{store}/images/{name}", blob), None
    if labels_XYZ is not None:
        blob = prepared_scans.labels_file(scan_id, labels_XYZ)
        labels = prepared_scans.write(f"{store}/labels/{name}", blob)
    return prepared_scans.ref_of(scan_id, image, labels)
