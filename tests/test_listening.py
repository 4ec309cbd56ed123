"""Everything that we start listens on this machine's loopback interface alone, looked at socket by socket."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Any

import psutil
import ray

from logonet.distributed import cluster, ray_compat
from tools.s3server import S3Server


def open_doors(root: psutil.Process) -> list[str]:
    """Listening sockets of ``root`` and all processes below it that other machines can reach."""
    found = []
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            found += [
                f"{' '.join(process.cmdline())[:100]} on {c.laddr.ip}:{c.laddr.port}"
                for c in process.net_connections(kind="inet")
                if c.status == psutil.CONN_LISTEN
                and not c.laddr.ip.removeprefix("::ffff:").startswith(("127.", "::1"))
            ]
    return found


@ray.remote(num_cpus=0.1)
class Worker:
    def run(self, fn: Callable[..., Any], **given: Any) -> Any:
        return fn(**given)


class Group:
    """As much of Ray Train's group of workers as a backend asks for."""

    def __init__(self, n: int) -> None:
        self.workers = [Worker.remote() for _ in range(n)]

    def __len__(self) -> int:
        return len(self.workers)

    def get_resources_per_worker(self) -> dict[str, float]:
        return {"CPU": 0.1}

    def execute(self, fn: Callable[..., Any]) -> None:
        """Ranks in environment variables, which only a real group can tell and nothing here reads."""
        assert fn.__name__ == "_set_torch_distributed_env_vars"

    def execute_single_async(self, rank: int, fn: Callable[..., Any], **given: Any) -> Any:
        return self.workers[rank].run.remote(fn, **given)


def test_an_open_door_is_found() -> None:
    with socket.socket() as inside, socket.socket() as outside:
        inside.bind(("127.0.0.1", 0))
        inside.listen()
        assert open_doors(psutil.Process()) == []
        outside.bind(("0.0.0.0", 0))
        outside.listen()
        (door,) = open_doors(psutil.Process())
        assert door.endswith(f"on 0.0.0.0:{outside.getsockname()[1]}")


def test_ray_the_s3_server_and_training_workers_listen_on_loopback(
    ray_local: None, s3_server: S3Server
) -> None:
    """GCS, raylet, object manager, agents, dashboard, drivers and workers, and gloo between the workers."""

    def sum_of_ranks() -> float:  # in here, as Ray's workers do not know this file
        import torch
        import torch.distributed as dist

        total = torch.tensor([float(dist.get_rank() + 1)])
        dist.all_reduce(total)
        return float(total)

    assert cluster.on_loopback()
    group = Group(2)
    config = ray_compat.local_torch_config()
    config.backend_cls().on_start(group, config)
    assert ray.get([w.run.remote(sum_of_ranks) for w in group.workers]) == [3.0, 3.0]  # type: ignore[attr-defined]
    below = psutil.Process().children(recursive=True)
    names = " ".join(p.name() for p in below)
    for part in ("raylet", "gcs_server", "ray::Worker"):
        assert part in names, names
    assert {p.pid for p in below} >= set(s3_server.pids.values())
    assert open_doors(psutil.Process()) == []


def test_the_interface_for_gloo_is_a_loopback_one() -> None:
    """The variable that the workers get names an interface of this machine with a loopback address alone."""
    addresses = psutil.net_if_addrs()[cluster._loopback_interface()]
    inet = [a.address for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)]
    assert inet
    assert all(address.startswith(("127.", "::1")) for address in inet)
