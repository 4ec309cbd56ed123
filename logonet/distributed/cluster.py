"""The Ray cluster a job runs on: connecting to it, and how its processors are shared out.

A job submitted to a cluster (``ray job submit``) finds ``RAY_ADDRESS`` set and joins that cluster.
Without it a private Ray starts on this machine and ends with the process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from logonet.core.errors import UserError
from logonet.core.redaction import HIDE_NAMES, holds_credentials
from logonet.distributed import ray_compat

log = logging.getLogger(__name__)

MIB = 1 << 20
WAIT_STEP_S = 1.0  # of a wait for room: between two steps signals are heard
# Once the CPU pool is full, the autoscaler starts GPU nodes for tasks that want CPUs alone. So the files for clusters
# label GPU pools, and stages beside which nothing trains keep off nodes with that label.
POOL = "logonet/pool"
NO_GPU_NODES = {POOL: "!gpu"}
# Train workers are told of failures by polling; Ray's own 2 s would make every epoch's report take 2 s.
RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else a worker's every line is shown twice
    # After a node is lost Ray Train first waits for a place on it, and only then counts the nodes again; its own 60 s
    # would be a minute without training. Where nodes have yet to come, it asks again, for ever.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    # A stream's coordinator would tell of its plan and its end at every window. Errors are raised, and told once.
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    # A preempted machine has as little as 30 s; Ray's own 5 s would be a sixth of them.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
# On a cluster of 'ray start': its dashboard then tells of runs (/api/train/v2/runs/v1), from a process on the head.
CLUSTER_SETTINGS = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # What tracks it reads a setting of Ray Data's that Ray will drop.
    "PYTHONWARNINGS": "ignore:`ExecutionOptions.exclude_resources`",
}
# glibc gives large blocks back to the system when they are freed, and the system clears each page of the next one: a
# sixth of a step's processor time. With these a process keeps what it has had once, a fifth more at its peak.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",  # Ray Train steps in a thread, and threads' own arenas hold no large blocks
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}
# What worker processes need of the driver's environment. Never credentials: those come from the usual
# AWS chain on every node, and a job's runtime environment can be read on Ray's dashboard.
PASSED_ON = (
    "RAY_ADDRESS",  # or a worker that asks the dashboard would look for a Ray on its machine, and may find another
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "LOGONET_HOME",
    "LOGONET_CACHE_DIR",
    "LOGONET_CACHE_GB",
    "MLFLOW_TRACKING_URI",
    HIDE_NAMES,
)


SET_TRACKING = (
    "set MLFLOW_TRACKING_URI to a server that all nodes reach; deploy/mlflow starts one (docs/cluster.md)"
)


@dataclass(frozen=True)
class Workers:
    """A range of training workers, ``4:16``: a run takes as many of them as the cluster has room for at the time."""

    least: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            self.parse(str(self))  # says what is wrong

    def __str__(self) -> str:
        return f"{self.least}:{self.most}"

    @classmethod
    def parse(cls, text: str) -> int | Workers:
        """``4`` or ``4:16``, as people write it."""
        found = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", text)
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= least <= most:
            raise UserError(
                f"--workers {text} is neither a number such as 4 nor a range such as 4:16, from 1 on and the smaller "
                "first"
            )
        return cls(least, most) if most > least else least


WORKERS_FLAG = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="N|N:M",
    instance_from_str=lambda args: Workers.parse(args[0]),
    is_instance=lambda value: isinstance(value, int | Workers),
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True)
class Resources:
    """What a run may use. It changes how fast a result comes, and the result by rounding at most.

    Attributes:
        workers: training workers (the paper: 16), or the least and the most of them, 4:16: machines may come and go.
        gpu: one GPU for each worker; None takes GPUs where the cluster has them or can start nodes that do.
        cpus_per_worker: logical CPUs of a training worker; 0 shares out what the data tasks leave.
        max_failures: how often lost workers are replaced before the run gives up; those that gave notice don't count.
        resize_every_s: with a range of workers, how often to look for room for more of them.
        wait_s: for nodes of an autoscaling cluster, or for those that another job holds.
        object_store_mb: Ray's shared memory on a machine where the job starts Ray itself; 0 lets Ray choose.
    """

    workers: Annotated[int | Workers, WORKERS_FLAG] = 1
    gpu: bool | None = None
    cpus_per_worker: float = 0.0
    max_failures: int = 8
    resize_every_s: float = 60.0
    wait_s: float = 900.0
    object_store_mb: int = 0

    @property
    def least(self) -> int:
        return self.workers.least if isinstance(self.workers, Workers) else self.workers

    @property
    def most(self) -> int:
        return self.workers.most if isinstance(self.workers, Workers) else self.workers

    def fixed(self, what: str) -> int:
        """The one number of workers that ``what`` wants. UserError for a range."""
        if isinstance(self.workers, Workers):
            raise UserError(
                f"--workers {self.workers} is a range, which pretraining and finetuning take and {what} does not; give "
                f"one number, such as --workers {self.least}"
            )
        return self.workers


@dataclass(frozen=True)
class ResourceAllocation:
    """How the cluster's logical CPUs are divided between training and data tasks.

    Train workers must not reserve every CPU: the data tasks that feed them would wait for ever.

    Attributes:
        workers: of a range, as many as there is room for now.
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
    names = [n for n in (*PASSED_ON, *RAY_SETTINGS, *CLUSTER_SETTINGS) if n in os.environ and n not in given]
    return {n: os.environ[n] for n in names if not holds_credentials(os.environ[n])}


def address() -> str | None:
    return os.environ.get("RAY_ADDRESS") or None


def on_loopback() -> bool:
    """Whether all of the connected cluster is on this machine and out of others' reach, as a Ray of our own is."""
    import ray

    return all(node["NodeManagerAddress"].startswith("127.") for node in ray.nodes() if node["Alive"])


def _loopback_interface() -> str:
    """ "lo" on Linux, "lo0" on macOS."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


@contextlib.contextmanager
def connected(resources: Resources, logs: bool = True, tracked: bool = False) -> Iterator[None]:
    """Join the cluster at ``RAY_ADDRESS``, or start a Ray of our own and stop it at the end.

    Args:
        logs: show here what workers print; without, it is in Ray's log files only.
        tracked: MLflow will record what is done.

    Raises:
        UserError: no cluster answers, or ``tracked`` in a file that its nodes do not share.
    """
    for name, value in (RAY_SETTINGS | (CLUSTER_SETTINGS if address() else {})).items():
        os.environ.setdefault(name, value)
    # Ray's coming default (tasks without GPUs keep CUDA_VISIBLE_DEVICES as it is); set, it stops asking.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    env_vars = _env_vars()
    runtime_env: dict[str, Any] = {"env_vars": env_vars}
    options: dict[str, Any] = {"log_to_driver": logs, "logging_level": logging.WARNING}
    if address() is None:
        # Two extra logical CPUs keep the data tasks alive beside the workers; threads are set per worker.
        cores = os.cpu_count() or 1
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # loopback only, and it ends with this process
        # A dashboard is eleven processes and a gigabyte, and gone with this process; a cluster of 'ray start' has one.
        options.update(address="local", num_cpus=max(cores, resources.most + 2), include_dashboard=False)
        env_vars |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _loopback_interface())
        # Threads that wait for each other give their core to Ray's processes, which wake up all the time on the same
        # ones, instead of spinning: a step on all of two cores takes an eighth less (docs/performance.md).
        if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
            env_vars["GOMP_SPINCOUNT"] = "1000"
        env_vars |= {key: value for key, value in KEEP_MEMORY.items() if key not in os.environ}
        hook = ray_compat.without_dashboard
        runtime_env["worker_process_setup_hook"] = f"{hook.__module__}.{hook.__name__}"
        if resources.object_store_mb:
            options["object_store_memory"] = resources.object_store_mb * MIB
    try:
        with ray_compat.on_loopback() if address() is None else contextlib.nullcontext():
            ray.init(runtime_env=runtime_env, **options)
    except ConnectionError as err:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address()} ({err}); start it with 'ray start --head' "
            "or unset RAY_ADDRESS to run on this machine alone"
        ) from None
    quiet()
    try:
        if tracked:
            check_tracking()
        yield
    finally:
        ray.shutdown()


def quiet() -> None:
    """Ray's plan and progress chatter off, in this process: one line an epoch is what people read."""
    import ray.data

    context = ray.data.DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    for name in ("ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.WARNING)
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def machines() -> int:
    """How many machines the connected cluster has now; one more than there are where all work is for others to come."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    to_come = not any(node["Resources"].get("CPU") for node in alive)
    return len({node["NodeManagerAddress"] for node in alive}) + to_come


def check_tracking() -> None:
    """UserError where MLflow's runs would lie in a file on one of several machines."""
    from logonet.tracking import tracking_uri

    uri = tracking_uri()
    if uri.startswith("sqlite:") and machines() > 1:
        raise UserError(
            f"MLflow's runs would be recorded in {uri}, which is a file of each machine by itself, and the Ray cluster "
            f"has several machines; {SET_TRACKING}"
        )


def node_resources() -> list[dict[str, float]]:
    """Ray's resources of every live node of the connected cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def allocate(resources: Resources, pool: bool = False) -> ResourceAllocation:
    """Divide the connected cluster for training, when it has nodes for the least of the workers: waits for them.

    Args:
        pool: for a pool of actors and not for training; see `divide`.

    Raises:
        UserError: the workers can never be placed, or their nodes did not come.
    """
    if address() is None:
        # A Ray of our own has more logical CPUs than the machine has cores, so that every worker finds a place.
        return divide(node_resources(), resources, os.cpu_count() or 1, pool)
    grows = ray_compat.grows()
    gpus = sum(node.get("GPU", 0.0) for node in node_resources())
    if resources.gpu is None:
        if gpus and not grows:
            return divide(node_resources(), resources, pool=pool)
        resources = replace(resources, gpu=gpus > 0 or ray_compat.comes({"GPU": 1.0}))
    # How many CPUs a worker gets is known when its node is there.
    bundle = worker_bundle(resources.cpus_per_worker or 1.0, bool(resources.gpu))
    what = f"nodes for {describe(resources.workers, resources.cpus_per_worker, bool(resources.gpu))}"
    with held([bundle] * resources.least, what, resources.wait_s):
        if grows:  # nodes come and go: each by itself must leave something to the data tasks
            resources = replace(resources, workers=Workers(resources.least, resources.most))
        return divide(node_resources(), resources, pool=pool)


def stage_cpus(resources: Resources) -> tuple[float, float]:
    """(logical CPUs of a task, of the cluster) for stages beside which nothing trains; waits for a first node.

    They need no nodes for workers, so none is asked for before training.
    """
    if not _cpus_of_stages():
        with held([{"CPU": 1.0}], "a node with CPUs", resources.wait_s, NO_GPU_NODES):
            pass
    cpus = _cpus_of_stages()
    return _task_cpus(cpus, (os.cpu_count() or 1) if address() is None else None), cpus


def _cpus_of_stages() -> float:
    import ray

    nodes = (node for node in ray.nodes() if node["Alive"] and node["Labels"].get(POOL) != "gpu")
    return sum(node["Resources"].get("CPU", 0.0) for node in nodes)


def _task_cpus(cpus: float, cores: int | None) -> float:
    return min(_oversold(cpus, cores), cpus / 2)


def _oversold(cpus: float, cores: int | None) -> float:
    # Where there are more logical CPUs than cores, other tasks count as that much more, or as many would run at once
    # as there are workers.
    return max(1.0, cpus / cores) if cores else 1.0


def worker_bundle(cpus: float, gpu: bool) -> dict[str, float]:
    """Ray's resources of a training worker."""
    return {"CPU": cpus, **({"GPU": 1.0} if gpu else {})}


def describe(workers: int | Workers, cpus: float, gpu: bool) -> str:
    """``16 workers x 6 CPUs, 1 GPU each``; 0 CPUs are not known yet."""
    named = f"{workers} worker{'' if workers == 1 else 's'}"
    named += f" x {cpus:g} CPU{'' if cpus == 1 else 's'}" if cpus else ""
    return f"{named}, 1 GPU each" if gpu else named


@contextlib.contextmanager
def held(
    bundles: list[dict[str, float]], what: str, wait_s: float, labels: dict[str, str] | None = None
) -> Iterator[None]:
    """Wait for room for all ``bundles`` at once, and hold it in this block.

    An autoscaler starts nodes for a placement group that waits. Ray drops the group with the process that made it, so a
    job that is killed leaves no request.

    Args:
        labels: Ray's selector of nodes.

    Raises:
        UserError: there is no room within ``wait_s``.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(bundles, bundle_label_selector=[labels or {}] * len(bundles))
    try:
        until, said = time.monotonic() + wait_s, False
        while not group.wait(WAIT_STEP_S):
            if time.monotonic() > until:
                cpus, gpus = (sum(n.get(kind, 0.0) for n in node_resources()) for kind in ("CPU", "GPU"))
                raise UserError(
                    f"the cluster found no room for {what} in {wait_s:g} s: it has {cpus:g} CPUs and {gpus:g} GPUs, "
                    "which other jobs may hold; start nodes, ask for fewer workers, or wait longer (--wait-s)"
                )
            if not said:
                print(f"waiting up to {wait_s:g} s for {what}", flush=True)
                said = True
        yield
    finally:
        remove_placement_group(group)


def divide(
    nodes: list[dict[str, float]], resources: Resources, cores: int | None = None, pool: bool = False
) -> ResourceAllocation:
    """Divide a cluster of ``nodes``, each with its resources as Ray names them.

    Args:
        cores: of the machine, where ``nodes`` is a Ray of our own.
        pool: for a pool of actors, which Ray Data places where there is room and which no data tasks feed. So no node
            must keep CPUs for these, as `range_that_fits` wants for the workers of a training.

    Raises:
        UserError: the workers do not fit.
    """
    workers = resources.least
    if workers < 1:
        raise UserError(f"workers is {workers}; it must be at least 1")
    cpus, gpus = (sum(n.get(kind, 0.0) for n in nodes) for kind in ("CPU", "GPU"))
    if gpus < workers and (resources.gpu or (resources.gpu is None and gpus)):
        raise UserError(
            f"the cluster has {gpus:g} GPUs for {workers} workers; use --workers {int(gpus) or 1}, --gpu True to wait "
            "for more, or --gpu False to train on CPUs"
        )
    use_gpu = gpus >= workers if resources.gpu is None else resources.gpu
    homes = [n.get("CPU", 0.0) for n in nodes if n.get("GPU", 0.0) > 0 or not use_gpu]
    spare_cpus = math.inf
    if pool:
        most = min(resources.most, int(gpus)) if use_gpu else resources.most
        workers, per_worker = pool_that_fits(cpus, homes, most, resources.cpus_per_worker)
    elif isinstance(resources.workers, Workers):
        places = [(n.get("CPU", 0.0), n.get("GPU", 0.0) if use_gpu else math.inf) for n in nodes]
        asked = resources.workers, resources.cpus_per_worker
        workers, per_worker, spare_cpus = range_that_fits(places, *asked)
    else:
        per_worker = cpus_of_worker(cpus, homes, workers, resources.cpus_per_worker)
    data_cpus = cpus - per_worker * workers
    oversold = _oversold(cpus, cores)
    return ResourceAllocation(
        workers=workers,
        use_gpu=use_gpu,
        cpus_per_worker=int(per_worker * 1000) / 1000,  # Ray resolves resources to 1/10000
        threads_per_worker=max(1, cores // workers if cores and oversold > 1 else int(per_worker)),
        cpus_per_data_task=min(oversold, data_cpus, spare_cpus),
        cpus_per_task=_task_cpus(cpus, cores),
        cpus=cpus,
    )


def room(resources: Resources, at_once: int = 0) -> Resources:
    """What a Ray of our own should have room for when a sweep runs on it."""
    workers = resources.fixed("a sweep")
    runs = at_once or max(1, (os.cpu_count() or 1) // workers)
    return replace(resources, workers=runs * workers)


# Ray Train adds up a node's workers in binary fractions and Ray counts in 1/10000: sixteenths are exact in both.
PART_CPUS = 1 / 16
DRIVER_CPUS = 0.01  # reserved by a sweep for the process that drives a trial


def allocate_trials(resources: Resources, most: int, at_once: int = 0) -> tuple[int, ResourceAllocation]:
    """How many runs of ``resources`` can go on at once, and what each gets.

    Counted before anything starts, since a run whose workers find no place waits for ever: every worker of
    every run has a CPU (or GPU) of its own, and data tasks have CPUs that no worker can take.

    Args:
        most: runs that there are to do.
        at_once: as many, and not as many as fit; 0 takes what fits.

    Raises:
        UserError: not even one run fits, or not ``at_once``.
    """
    import ray

    workers = resources.fixed("a sweep")
    one = allocate(resources)  # one that can never fit says so here
    cores = (os.cpu_count() or 1) if address() is None else None
    total = ray.cluster_resources()
    units = total["GPU"] if one.use_gpu else total["CPU"] / (resources.cpus_per_worker or 1.0)
    if address() is None and not one.use_gpu and not at_once:
        units = min(units, os.cpu_count() or 1)  # a Ray of our own has more logical CPUs than there are cores
    for runs in range(max(1, min(at_once or most, int(units / workers))), 0, -1):
        try:
            each = divide(
                node_resources(), replace(resources, workers=runs * workers, gpu=one.use_gpu), cores
            )
        except UserError:
            continue
        free = each.cpus - runs * (workers * each.cpus_per_worker + DRIVER_CPUS)
        # Data tasks of all runs queue for the same CPUs; one that asked for more than there are would wait for ever.
        task_cpus = int(min(each.cpus_per_data_task, free) * 1000) / 1000
        if (runs > 1 and each.cpus_per_worker < (resources.cpus_per_worker or 1.0)) or task_cpus <= 0:
            continue
        if runs < at_once:
            raise UserError(
                f"{at_once} trials of {workers} workers do not fit on the cluster's {each.cpus:g} CPUs "
                f"and {total.get('GPU', 0.0):g} GPUs at once; use --concurrent {runs} or fewer workers"
            )
        before_cpus = min(each.cpus_per_task, task_cpus)  # of the stages before training
        return runs, replace(each, workers=workers, cpus_per_data_task=task_cpus, cpus_per_task=before_cpus)
    raise UserError(
        f"{workers} workers leave no CPU of the cluster's {one.cpus:g} to the data tasks; use fewer workers "
        "or a smaller --cpus-per-worker"
    )


def cpus_of_worker(cpus: float, homes: list[float], workers: int, asked: float = 0.0) -> float:
    """Logical CPUs of each of ``workers``, beside what the data tasks need.

    Args:
        cpus: of the whole cluster; ``homes`` those of each node that workers may stand on.
        asked: as many, and not as many as there are; 0 takes what there are.

    Raises:
        UserError: the workers do not fit.
    """
    data_cpus = max(0.25 * cpus, min(1.0, cpus / 2))
    most = (cpus - data_cpus) / workers
    # As many whole ones as fit on the nodes; a fraction where there is not one for each.
    whole = (n for n in range(int(most), 0, -1) if sum(int(cpu / n) for cpu in homes) >= workers)
    per_worker = asked or float(next(whole, most))
    if per_worker * workers >= cpus or sum(int(cpu / per_worker + 1e-9) for cpu in homes) < workers:
        raise UserError(
            f"{describe(workers, per_worker, False)} do not fit on nodes with {', '.join(f'{c:g}' for c in homes)} "
            f"CPUs beside the data tasks; use --cpus-per-worker {most:.2g} or less, or fewer workers"
        )
    return per_worker


def pool_that_fits(cpus: float, homes: list[float], most: int, asked: float = 0.0) -> tuple[int, float]:
    """How many of up to ``most`` actors find room, and logical CPUs of each; the rest as `cpus_of_worker`."""
    for workers in range(most, 1, -1):
        with contextlib.suppress(UserError):
            return workers, cpus_of_worker(cpus, homes, workers, asked)
    return 1, cpus_of_worker(cpus, homes, 1, asked)


def range_that_fits(
    nodes: list[tuple[float, float]], wanted: Workers, given: float = 0.0
) -> tuple[int, float, float]:
    """How many workers of the range there is room for, CPUs for each, and CPUs that the fullest node leaves free.

    Ray Train puts as many workers on a node as it has CPUs for, up to the range's end. So the data tasks' share must
    be left over on every node by itself, whichever of the others go or come; nodes that come later are taken to be
    like those of now.

    Args:
        nodes: of each its CPUs, and how many workers it has GPUs for.
        given: CPUs per worker, as the user wants it; 0 finds the most workers with a whole CPU each.

    Raises:
        UserError: the range's least do not fit.
    """
    best: tuple[tuple[bool, int, bool, float], tuple[int, float, float]] | None = None
    parts = [math.ceil(given / PART_CPUS)] if given else range(1, int(max(nodes)[0] / PART_CPUS) + 1)
    for per_worker in (part * PART_CPUS for part in parts):
        counts = [int(min(cpus // per_worker, gpus, wanted.most)) for cpus, gpus in nodes]
        left = [(cpus - count * per_worker, cpus) for count, (cpus, _) in zip(counts, nodes) if count]
        workers = min(sum(counts), wanted.most)
        if workers < wanted.least or any(free < min(0.5, cpus / 4) for free, cpus in left):
            continue
        # Among equally many workers: as large as leaves a quarter to the data tasks, or else as small as there are.
        quarter = all(free >= cpus / 4 for free, cpus in left)
        rank = (per_worker >= 1, workers, quarter, per_worker if quarter else -per_worker)
        if best is None or rank > best[0]:
            best = rank, (workers, per_worker, min(free for free, _ in left))
    if best is None:
        raise UserError(
            f"{wanted.least} workers{f' x {given:g} CPUs' if given else ''} do not fit on nodes with "
            f"{', '.join(f'{cpus:g}' for cpus, _ in nodes)} CPUs, each of which keeps some for the data tasks; use "
            f"{'another --cpus-per-worker, ' if given else ''}larger nodes or fewer workers"
        )
    return best[1]
