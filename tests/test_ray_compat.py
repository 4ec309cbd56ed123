"""The private parts of Ray that we use: all in one file, and each still what it was when Ray is upgraded."""

from __future__ import annotations

import importlib
import inspect
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from logonet.distributed import ray_compat

REPO = Path(__file__).parents[1]
TRAIN = "ray.train.v2._internal.execution"
TORCH = "ray.train.torch.config"
# Where, its parameters (or the fields of a message), and what stops working without it.
PRIVATE: list[tuple[str, tuple[str, ...], str]] = [
    (
        "ray.experimental.internal_kv:_internal_kv_put",
        ("key", "value", "overwrite"),
        "leaving before a resize",
    ),
    ("ray.experimental.internal_kv:_internal_kv_get", ("key",), "leaving before a resize"),
    ("ray.experimental.internal_kv:_internal_kv_del", ("key",), "leaving before a resize"),
    (
        f"{TRAIN}.callback:ControllerCallback.after_controller_state_update",
        ("previous_state", "current_state"),
        "leaving before a resize",
    ),
    (f"{TRAIN}.controller.state:ResizingState", (), "leaving before a resize"),
    (
        f"{TRAIN}.callback:WorkerGroupCallback.after_worker_group_poll_status",
        ("worker_group_status",),
        "a rank that ends the run",
    ),
    (f"{TRAIN}.worker_group:WorkerGroupPollStatus", ("worker_statuses",), "a rank that ends the run"),
    (
        f"{TRAIN}.worker_group:WorkerStatus",
        ("running", "error", "return_value"),
        "a rank that ends the run",
    ),
    (f"{TRAIN}.worker_group:RayTrainWorker.execute", ("fn",), "SIGTERM in workers"),
    ("ray._private.ray_constants:ENABLE_RAY_CLUSTERS_ENV_VAR", (), "listening on loopback alone"),
    ("ray._private.ray_constants:ENABLE_RAY_CLUSTER", (), "listening on loopback alone"),
    ("ray._common.utils:get_system_memory", (), "doctor's and plan's memory"),
    (f"{TRAIN}.controller.placement_group_cleaner:PlacementGroupCleaner", (), "silence without a dashboard"),
    (f"{TORCH}:_TorchBackend.on_start", ("worker_group", "backend_config"), "meeting through a file"),
    (f"{TORCH}:_TorchBackend.on_shutdown", ("worker_group", "backend_config"), "meeting through a file"),
    (f"{TORCH}:_set_torch_distributed_env_vars", (), "meeting through a file"),
    (
        f"{TORCH}:_setup_torch_process_group",
        ("backend", "world_rank", "world_size", "init_method", "timeout_s"),
        "meeting through a file",
    ),
    ("ray.experimental.tqdm_ray:tqdm", ("desc", "total", "unit"), "the bar of training steps"),
    ("ray._private.state:state._connect_and_get_accessor", (), "freeing what dead trials held"),
    (
        "ray.core.generated.gcs_pb2:PlacementGroupTableData",
        ("placement_group_id", "creator_job_id", "creator_actor_id", "creator_actor_dead", "state"),
        "freeing what dead trials held",
    ),
    (
        "ray.autoscaler.v2.utils:is_autoscaler_v2",
        ("fetch_from_server", "gcs_client"),
        "whether a cluster grows",
    ),
    ("ray._raylet:InnerGcsClient.get_cluster_status", (), "whether a pool has GPUs"),
    (
        "ray.core.generated.autoscaler_pb2:AutoscalingState",
        ("last_seen_cluster_resource_state_version", "infeasible_gang_resource_requests"),
        "whether a pool has GPUs",
    ),
    (
        "ray.core.generated.autoscaler_pb2:ClusterResourceState",
        ("cluster_resource_state_version", "pending_gang_resource_requests"),
        "whether a pool has GPUs",
    ),
    ("ray.core.generated.autoscaler_pb2:GangResourceRequest", ("details",), "whether a pool has GPUs"),
]


@pytest.mark.parametrize(("path", "names", "purpose"), PRIVATE, ids=[path for path, _, _ in PRIVATE])
def test_ray_still_has(path: str, names: tuple[str, ...], purpose: str) -> None:
    broken = f"Ray has changed {path}: mend logonet/distributed/ray_compat.py, or there is no more {purpose}"
    module, _, attribute = path.partition(":")
    found: Any = None
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as err:
        pytest.fail(f"{broken} ({err})")
    if hasattr(found, "DESCRIPTOR"):
        assert set(names) <= set(found.DESCRIPTOR.fields_by_name), broken
    elif names:
        assert set(names) <= set(inspect.signature(found).parameters), broken


def test_private_parts_of_ray_are_used_in_one_file() -> None:
    private = re.compile(
        r"\bray(\.\w+)*\.(_\w+|experimental|generated)\b"  # import ray._private, ray.train.v2._internal
        r"|from ray[\w.]* import .*\b_\w|\bray\.autoscaler\.v2\b|current_actor"
    )
    folders = ("logonet", "jobs", "tools")
    uses = {
        str(file.relative_to(REPO)): private.findall(file.read_text())
        for folder in folders
        for file in (REPO / folder).rglob("*.py")
    }
    assert [name for name, found in uses.items() if found] == ["logonet/distributed/ray_compat.py"]


def test_the_interface_that_has_an_address() -> None:
    name = ray_compat.interface_of("127.0.0.1")
    assert name in {name for _, name in socket.if_nameindex()}
    assert ray_compat.interface_of("192.0.2.1") is None  # of documentation, nobody's
