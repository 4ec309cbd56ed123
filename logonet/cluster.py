"""The Ray cluster a job runs on: connecting to it, and how its processors are shared out.

A job submitted to a cluster (``ray job submit``) finds ``RAY_ADDRESS`` set and joins that cluster.
Without it a private Ray starts on this machine and ends with the process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from logonet.errors import UserError
from logonet.redaction import HIDE_NAMES, holds_credentials

log = logging.getLogger(__name__)

MIB = 1 << 20
# Train workers are told of failures by polling; Ray's own 2 s would make every epoch's report take 2 s.
RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else a worker's every line is shown twice
}
# What worker processes need of the driver's environment. Never credentials: those come from the usual
# AWS chain on every node, and a job's runtime environment can be read on Ray's dashboard.
PASSED_ON = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "LOGONET_HOME",
    "MLFLOW_TRACKING_URI",
    HIDE_NAMES,
)


@dataclass(frozen=True)
class Resources:
    """What a run may use. It changes how fast a result comes, and the result by rounding at most.

    Attributes:
        workers: training workers (the paper: 16).
        gpu: one GPU for each worker; None takes GPUs where the cluster has enough.
        cpus_per_worker: logical CPUs of a training worker; 0 shares out what the data tasks leave.
        max_failures: how often lost workers are replaced before the run gives up.
        wait_s: for an autoscaling cluster's nodes.
        object_store_mb: Ray's shared memory on a machine where the job starts Ray itself; 0 lets Ray choose.
    """

    workers: int = 1
    gpu: bool | None = None
    cpus_per_worker: float = 0.0
    max_failures: int = 8
    wait_s: float = 900.0
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
    cpus_per_data_task: float  # while training goes on
    cpus_per_task: float  # of the stages before
    cpus: float  # of the whole cluster


def submitted() -> bool:
    """Whether this process is the driver of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _env_vars() -> dict[str, str]:
    """What to pass on, less what may hold a password and what the job's submitter set, which Ray refuses twice."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    given = ((job.get("runtime_env") or {}).get("env_vars") or {}).keys()
    names = [n for n in (*PASSED_ON, *RAY_SETTINGS) if n in os.environ and n not in given]
    return {n: os.environ[n] for n in names if not holds_credentials(os.environ[n])}


def address() -> str | None:
    return os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts within this block listens on 127.0.0.1 and nowhere else.

    Its processes believe whoever reaches them. ``ray.init`` takes no loopback address; the one way to tell it is the
    setting by which Ray serves Windows and macOS, where its clusters have one node, as ours does. It is read when
    Ray is imported, hence the second half; and must not stay, as it forbids 'ray start' to join a cluster.
    """
    from ray._private import ray_constants

    name, kept = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    was = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = kept
        del os.environ[name]
        if was is not None:
            os.environ[name] = was


def on_loopback() -> bool:
    """Whether all of the connected cluster is on this machine and out of others' reach, as a Ray of our own is."""
    import ray

    return all(node["NodeManagerAddress"].startswith("127.") for node in ray.nodes() if node["Alive"])


def _loopback_interface() -> str:
    """ "lo" on Linux, "lo0" on macOS."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


@contextlib.contextmanager
def connected(resources: Resources, logs: bool = True) -> Iterator[None]:
    """Join the cluster at ``RAY_ADDRESS``, or start a Ray of our own and stop it at the end.

    Args:
        logs: show here what workers print; without, it is in Ray's log files only.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    # Ray's coming default (tasks without GPUs keep CUDA_VISIBLE_DEVICES as it is); set, it stops asking.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    runtime_env = {"env_vars": _env_vars()}
    options: dict[str, Any] = {"runtime_env": runtime_env, "logging_level": logging.WARNING}
    options["log_to_driver"] = logs
    if address() is None:
        # Two extra logical CPUs keep the data tasks alive beside the workers; threads are set per worker.
        cores = os.cpu_count() or 1
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # loopback only, and it ends with this process
        options.update(address="local", num_cpus=max(cores, resources.workers + 2), include_dashboard=True)
        options.update(dashboard_host="127.0.0.1")
        runtime_env["env_vars"]["GLOO_SOCKET_IFNAME"] = _loopback_interface()
        if resources.object_store_mb:
            options["object_store_memory"] = resources.object_store_mb * MIB
    try:
        with _on_loopback() if address() is None else contextlib.nullcontext():
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

    workers = resources.workers
    if workers < 1:
        raise UserError(f"workers is {workers}; it must be at least 1")
    total = _wait_for_nodes(resources)
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    if resources.gpu is None and 0 < gpus < workers:
        raise UserError(
            f"the cluster has {gpus:g} GPUs for {workers} workers; use --workers {int(gpus)}, --gpu True to wait for "
            "more, or --gpu False to train on CPUs"
        )
    use_gpu = gpus >= workers if resources.gpu is None else resources.gpu
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    homes = [n.get("CPU", 0.0) for n in nodes if n.get("GPU", 0.0) > 0 or not use_gpu]
    data_cpus = max(0.25 * cpus, min(1.0, cpus / 2))
    most = (cpus - data_cpus) / workers
    per_worker = resources.cpus_per_worker or _largest_that_fits(homes, workers, most)
    if per_worker * workers >= cpus or sum(int(cpu / per_worker + 1e-9) for cpu in homes) < workers:
        raise UserError(
            f"{workers} workers x {per_worker:g} CPUs do not fit on nodes with {', '.join(f'{c:g}' for c in homes)} "
            f"CPUs beside the data tasks; use --cpus-per-worker {most:.2g} or less, or fewer workers"
        )
    data_cpus = cpus - per_worker * workers
    # A Ray of our own has more logical CPUs than the machine has cores, so that every worker finds a place; other
    # tasks count as that much more, or as many would run at once as there are workers.
    cores = os.cpu_count() or 1
    oversold = max(1.0, cpus / cores) if address() is None else 1.0
    return Share(
        workers=workers,
        use_gpu=use_gpu,
        cpus_per_worker=int(per_worker * 1000) / 1000,  # Ray resolves resources to 1/10000
        threads_per_worker=max(1, cores // workers if oversold > 1 else int(per_worker)),
        cpus_per_data_task=min(oversold, data_cpus),
        cpus_per_task=min(oversold, cpus / 2),
        cpus=cpus,
    )


def room(resources: Resources, at_once: int = 0) -> Resources:
    """What a Ray of our own should have room for when a sweep runs on it."""
    runs = at_once or max(1, (os.cpu_count() or 1) // resources.workers)
    return replace(resources, workers=runs * resources.workers)


DRIVER_CPUS = 0.01  # reserved by a sweep for the process that drives a trial


def shares(resources: Resources, most: int, at_once: int = 0) -> tuple[int, Share]:
    """How many runs of ``resources.workers`` workers can go on at once, and what each gets.

    Counted before anything starts, since a run whose workers find no place waits for ever: every worker of
    every run has a CPU (or GPU) of its own, and data tasks have CPUs that no worker can take.

    Args:
        most: runs that there are to do.
        at_once: as many, and not as many as fit; 0 takes what fits.

    Raises:
        UserError: not even one run fits, or not ``at_once``.
    """
    import ray

    one = share(resources)  # one that can never fit says so here
    total = ray.cluster_resources()
    units = total["GPU"] if one.use_gpu else total["CPU"] / (resources.cpus_per_worker or 1.0)
    if address() is None and not one.use_gpu and not at_once:
        units = min(units, os.cpu_count() or 1)  # a Ray of our own has more logical CPUs than there are cores
    for runs in range(max(1, min(at_once or most, int(units / resources.workers))), 0, -1):
        try:
            each = share(replace(resources, workers=runs * resources.workers, gpu=one.use_gpu))
        except UserError:
            continue
        free = each.cpus - runs * (resources.workers * each.cpus_per_worker + DRIVER_CPUS)
        # Data tasks of all runs queue for the same CPUs; one that asked for more than there are would wait for ever.
        task_cpus = int(min(each.cpus_per_data_task, free) * 1000) / 1000
        if (runs > 1 and each.cpus_per_worker < (resources.cpus_per_worker or 1.0)) or task_cpus <= 0:
            continue
        if runs < at_once:
            raise UserError(
                f"{at_once} trials of {resources.workers} workers do not fit on the cluster's {each.cpus:g} CPUs "
                f"and {total.get('GPU', 0.0):g} GPUs at once; use --concurrent {runs} or fewer workers"
            )
        return runs, replace(
            each,
            workers=resources.workers,
            cpus_per_data_task=task_cpus,
            cpus_per_task=min(each.cpus_per_task, task_cpus),
        )
    raise UserError(
        f"{resources.workers} workers leave no CPU of the cluster's {one.cpus:g} to the data tasks; use fewer workers "
        "or a smaller --cpus-per-worker"
    )


def _largest_that_fits(nodes: list[float], workers: int, most: float) -> float:
    """Whole CPUs per worker, as many as fit on the nodes; a fraction where there is not one for each."""
    for per_worker in range(int(most), 0, -1):
        if sum(int(cpu / per_worker) for cpu in nodes) >= workers:
            return float(per_worker)
    return most


def _wait_for_nodes(resources: Resources) -> dict[str, float]:
    """The cluster's resources, once it has what was asked for; an autoscaler is told of it."""
    import ray

    wanted_gpus = resources.workers if resources.gpu else 0
    until, said = time.monotonic() + resources.wait_s, False
    while True:
        total = ray.cluster_resources()
        if total.get("CPU", 0.0) > 0 and total.get("GPU", 0.0) >= wanted_gpus:
            return total
        if time.monotonic() > until or address() is None:
            raise UserError(
                f"the Ray cluster has {total.get('CPU', 0.0):g} CPUs and {total.get('GPU', 0.0):g} GPUs for "
                f"{resources.workers} workers; start nodes, ask for fewer workers, or wait longer (--wait-s)"
            )
        if not said:
            from ray.autoscaler.sdk import request_resources

            request_resources(
                bundles=[{"CPU": 1, **({"GPU": 1} if resources.gpu else {})}] * resources.workers
            )
            print(
                f"waiting up to {resources.wait_s:g} s for nodes for {resources.workers} workers", flush=True
            )
            said = True
        time.sleep(2)
