"""What several test files share."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from logonet import training
from logonet.distributed import trainer
from logonet.distributed.cluster import ResourceAllocation, Resources
from logonet.storage.artifacts import Artifact
from logonet.training import checkpoints, dataset
from tools.chaos import timeless as timeless


def tiny_backbone() -> dict[str, Any]:
    from logonet.networks import logonet

    return {"name": "logonet", **logonet.TINY}


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


def fit_here(
    job: training.Job,
    feed: dataset.TrainingDataset | dataset.LabelledDataset,
    resources: Resources,
    share: ResourceAllocation,
    callbacks: Any = (),
) -> dict[str, Any]:
    """`train.fit` with this process as the one worker: a fit without the nine processes that Ray Train starts for it.

    Samples are prepared by Ray's tasks all the same.
    """
    import ray
    import ray.train
    import ray.train.torch
    import torch

    assert not callbacks
    alone = replace(share, workers=1, threads_per_worker=1)  # more would only wait for each other, busily
    root, threads = logging.getLogger(), torch.get_num_threads()
    level = root.level
    with pytest.MonkeyPatch.context() as patch:
        context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
        patch.setattr(ray.train, "get_context", lambda: context)
        patch.setattr(ray.train, "report", lambda metrics: None)
        patch.setattr(ray.train, "get_preemption_info", lambda: None)
        patch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
        try:
            feeds = [ray.put(feed)]
            return trainer.train_worker(
                {"job": job, "feed": feeds, "share": alone, "watched": False, "run": "here"}
            )
        finally:
            root.setLevel(level)
            torch.set_num_threads(threads)
