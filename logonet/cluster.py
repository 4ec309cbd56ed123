"""The Ray cluster a job runs on: connecting to it, and how its processors are shared out.

A job submitted to a cluster (``ray job submit``) finds ``RAY_ADDRESS`` set and joins that cluster.
Without it a private Ray starts on this machine and ends with the process.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from logonet.errors import UserError

log = logging.getLogger(__name__)

MIB = 1 << 20
# Train workers are told of failures by polling; Ray's own 2 s would make every epoch's report take 2 s.
RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else a worker's every line is shown twice
}
# What worker processes need of the driver's environment. Never credentials: those come from the usual
# AWS chain on every node, and a job's runtime environment can be read on Ray's dashboard.
PASSED_ON = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION", "LOGONET_HOME")


@dataclass(frozen=True)
class Resources:
    """What a run may use. Nothing here changes a result, only how fast it comes.

    Attributes:
        workers: training workers (the paper: 16).
        gpu: one GPU for each worker; None takes GPUs where the cluster has enough.
        cpus_per_worker: logical CPUs of a training worker; 0 shares out what the data tasks leave.
        max_failures: lost workers that are replaced before the run gives up.
        object_store_mb: Ray's shared memory on a machine where the job starts Ray itself; 0 lets Ray choose.
    """

    workers: int = 1
    gpu: bool | None = None
    cpus_per_worker: float = 0.0
    max_failures: int = 3
    object_store_mb: int = 0


@dataclass(frozen=True)
class Share:
    """How the cluster's logical CPUs are divided between training and data tasks.

    Train workers must not reserve every CPU: the data tasks that feed them would wait for ever.
    """

    workers: int
    use_gpu: bool
    cpus_per_worker: float
    threads_per_worker: int
    cpus_per_data_task: float
    data_cpus: float


def address() -> str | None:
    return os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def connected(resources: Resources) -> Iterator[None]:
    """Join the cluster at ``RAY_ADDRESS``, or start a Ray of our own and stop it at the end."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    # Ray's coming default (tasks without GPUs keep CUDA_VISIBLE_DEVICES as it is); set, it stops asking.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    runtime_env = {"env_vars": {k: os.environ[k] for k in (*PASSED_ON, *RAY_SETTINGS) if k in os.environ}}
    if "@" not in (tracking := os.environ.get("MLFLOW_TRACKING_URI", "@")):
        runtime_env["env_vars"]["MLFLOW_TRACKING_URI"] = tracking
    options: dict[str, Any] = {"runtime_env": runtime_env, "logging_level": logging.WARNING}
    if address() is None:
        # Two extra logical CPUs keep the data tasks alive beside the workers; threads are set per worker.
        cores = os.cpu_count() or 1
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # loopback only, and it ends with this process
        options.update(address="local", num_cpus=max(cores, resources.workers + 2), include_dashboard=True)
        options.update(dashboard_host="127.0.0.1")
        if resources.object_store_mb:
            options["object_store_memory"] = resources.object_store_mb * MIB
    try:
        ray.init(**options)
    except ConnectionError as err:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address()} ({err}); start it with 'ray start --head' "
            "or unset RAY_ADDRESS to run on this machine alone"
        ) from None
    quiet()
    try:
        yield
    finally:
        ray.shutdown()


def quiet() -> None:
    """Ray's plan and progress chatter off, in this process: one line an epoch is what people read."""
    import ray.data

    context = ray.data.DataContext.get_current()
    for name, level in (
        ("ray.data", logging.ERROR),
        ("ray.train", logging.WARNING),
        ("ray.tune", logging.WARNING),
    ):
        logging.getLogger(name).setLevel(level)
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def share(resources: Resources) -> Share:
    """Divide the connected cluster. UserError when the workers can never be placed."""
    import ray

    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    workers = resources.workers
    if workers < 1:
        raise UserError(f"workers is {workers}; it must be at least 1")
    use_gpu = gpus >= workers if resources.gpu is None else resources.gpu
    if use_gpu and gpus < workers:
        raise UserError(
            f"{workers} GPU workers were asked for but the cluster has {gpus:g} GPUs; "
            f"use --workers {int(gpus)} or add nodes"
        )
    if cpus <= 0:
        raise UserError("the Ray cluster has no CPUs to give; start a node with --num-cpus of at least 1")
    data_cpus = max(0.25 * cpus, min(1.0, cpus / 2))
    most = (cpus - data_cpus) / workers
    per_worker = resources.cpus_per_worker or (max(1.0, most // 1) if most >= 1 else most)
    if per_worker * workers >= cpus:
        raise UserError(
            f"{workers} workers x {per_worker:g} CPUs leave none of the cluster's {cpus:g} CPUs to the data tasks; "
            f"use --cpus-per-worker {most:.2g} or fewer workers"
        )
    data_cpus = cpus - per_worker * workers
    per_worker = int(per_worker * 1000) / 1000  # Ray resolves resources to 1/10000
    threads = max(1, min(int(per_worker), (os.cpu_count() or 1)))
    return Share(
        workers=workers,
        use_gpu=use_gpu,
        cpus_per_worker=per_worker,
        threads_per_worker=threads,
        cpus_per_data_task=min(1.0, data_cpus),
        data_cpus=data_cpus,
    )
