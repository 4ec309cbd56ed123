"""A Ray cluster on this machine that grows: Ray's fake provider, whose nodes are raylets, and its autoscaler (v2).

`ray.cluster_utils.AutoscalingCluster` would do the same, but stops every Ray on the machine, and its config is not in
Ray's wheel.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.core.generated.autoscaler_pb2 import DEAD

from logonet.distributed import cluster, ray_compat
from tools.processes import free_ports

HEAD = "ray.head.default"
NO_CAPACITY = (
    "LOGONET_TEST_NO_CAPACITY"  # names a file: while it is there, the provider has no machines to give
)


class Provider(FakeMultiNodeProvider):
    """Runs in the autoscaler's process."""

    def create_node_with_resources_and_labels(self, *args: Any) -> None:
        if Path(os.environ[NO_CAPACITY]).exists():
            raise RuntimeError("InsufficientInstanceCapacity")
        super().create_node_with_resources_and_labels(*args)


class GrowingCluster:
    """A head without CPUs, and pools that start empty.

    Args:
        pools: name -> (resources of a node, most nodes). A pool is labelled with its name.
    """

    def __init__(self, **pools: tuple[dict[str, int], int]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: sockets lie below it
        self.address = f"{ray.util.get_node_ip_address()}:{free_ports()}"
        self.no_capacity = self.folder / "no-capacity"
        types: dict[str, Any] = {
            name: {
                "resources": resources,
                "labels": {cluster.POOL: name},
                "node_config": {},
                "max_workers": most,
            }
            for name, (resources, most) in pools.items()
        }
        types[HEAD] = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        provider = {"type": "external", "module": f"{__name__}.{Provider.__name__}"}
        provider |= {"head_node_id": FAKE_HEAD_NODE_ID, "gcs_address": self.address, "launch_multiple": True}
        config = {
            "cluster_name": "growing",
            "max_workers": sum(most for _, most in pools.values()),
            "idle_timeout_minutes": 0.5,  # more than Ray Data takes to begin on a busy machine
            "upscaling_speed": 100.0,
            "provider": provider,
            "available_node_types": types,
            "head_node_type": HEAD,
        }
        commands = (
            "initialization",
            "setup",
            "head_setup",
            "worker_setup",
            "head_start_ray",
            "worker_start_ray",
        )
        config |= {f"{name}_commands": [] for name in commands}
        config |= {"auth": {}, "file_mounts": {}, "cluster_synced_files": []}
        (self.folder / "cluster.yaml").write_text(json.dumps(config))

    def __enter__(self) -> GrowingCluster:
        env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        tests = Path(__file__).parent
        env |= {
            "RAY_AUTH_MODE": "disabled",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
            NO_CAPACITY: str(self.no_capacity),
        }
        port = self.address.split(":")[1]
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus", "0"]
        command += ["--num-gpus", "0", "--port", port, "--temp-dir", str(self.folder)]
        command += ["--include-dashboard", "false", "--object-store-memory", str(100 << 20)]
        command += ["--autoscaling-config", str(self.folder / "cluster.yaml")]
        log = self.folder / "head.log"
        with open(log, "wb") as out:
            self.head = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
        until = time.monotonic() + 180
        while "started" not in log.read_text():
            if time.monotonic() > until or self.head.poll() is not None:
                said = log.read_text()
                self.__exit__()
                raise AssertionError(said[-3000:])
            time.sleep(0.2)
        return self

    def requested(self) -> list[Any]:
        """What anybody asks of the autoscaler at the moment: tasks, placement groups, ``request_resources``."""
        state = ray_compat.status(self.address).cluster_resource_state
        constraints = [r for c in state.cluster_resource_constraints for r in c.resource_requests]
        return [*state.pending_resource_requests, *state.pending_gang_resource_requests, *constraints]

    def gpu_nodes(self) -> int:
        """Live ones."""
        states = ray_compat.status(self.address).cluster_resource_state.node_states
        return sum(node.ray_node_type_name == "gpu" and node.status != DEAD for node in states)

    def __exit__(self, *exc: object) -> None:
        # The nodes are in the head's session, and only there: nothing else of Ray's on this machine is touched.
        mine = [p for p in psutil.process_iter() if _session(p.pid) == self.head.pid]
        for process in mine:
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs(mine, timeout=30)
        self.head.wait(timeout=30)
        shutil.rmtree(self.folder, ignore_errors=True)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0
