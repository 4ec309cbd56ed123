"""Run a job on machines that claim GPUs they do not have: Ray places workers by them, and they compute on the CPU.

python -m tools.fake_gpus jobs/pretrain.py --recipe demo ...
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from typing import Any

import torch

from logonet.distributed import ray_compat, trainer


def train_worker(config: dict[Any, Any]) -> dict[str, Any]:
    """As the trainer's, on the CPU."""
    import ray.train.torch

    ray.train.torch.get_device = lambda: torch.device("cpu")
    return trainer.train_worker(config)


def main() -> None:
    """Run the script that the command line names, with its arguments."""
    real = ray_compat.local_torch_config

    def torch_config() -> Any:
        return replace(real(), backend="gloo")

    trainer.train_worker = train_worker  # here, in the driver: a worker's own module has the real one
    ray_compat.local_torch_config = torch_config
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
