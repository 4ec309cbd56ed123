"""How the training workers of a Ray of our own meet: through a file, and on the loopback interface alone.

Ray Train lets them meet at a TCP store of torch's, which listens on every interface of the machine and believes
whoever connects. Between machines there is no other way. On one there is a file that only its owner can open.
"""

from __future__ import annotations

import shutil
import tempfile
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch import config as ray_torch


class LocalTorchConfig(TorchConfig):
    """`TorchConfig` for workers that are all on one machine."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _Backend(ray_torch._TorchBackend):
    folder = ""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        worker_group.execute(ray_torch._set_torch_distributed_env_vars)
        self.folder = tempfile.mkdtemp(prefix="logonet-meet-")  # for each start: the file must be a new one
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    ray_torch._setup_torch_process_group,
                    backend=backend_config.backend or ("nccl" if gpus else "gloo"),
                    world_rank=rank,
                    world_size=len(worker_group),
                    init_method=f"file://{self.folder}/workers",
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(len(worker_group))
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        super().on_shutdown(worker_group, backend_config)
        shutil.rmtree(self.folder, ignore_errors=True)
