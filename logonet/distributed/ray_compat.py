"""Every use of Ray's private or experimental APIs, tried with the Ray version of constraints.txt.

When Ray is upgraded, this is the file to check.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

RESIZE_WAIT_S = 60.0  # for the workers to save and leave before their group is made anew
ANSWER_S = 60.0  # for the autoscaler to look at a request; it does so every 5 s
TOLD, LEFT = b"leave", b"left"


# ------------------------------------------------------------------------------------ words between processes


def _kv() -> Any:
    # A few bytes in Ray's own table: an actor for them would be one more process on every machine that runs a sweep.
    from ray.experimental import internal_kv

    return internal_kv


def tell(run: str) -> None:
    """Ask the ranks of ``run`` to save and leave after the step that they are in."""
    _kv()._internal_kv_put(f"logonet/{run}", TOLD, overwrite=True)


def told(run: str) -> bool:
    """Whether `tell` was called for ``run``."""
    return _kv()._internal_kv_get(f"logonet/{run}") == TOLD


def say_left(run: str) -> None:
    """Answer `tell`: the ranks have saved and leave."""
    _kv()._internal_kv_put(f"logonet/{run}", LEFT, overwrite=True)


def forget(run: str) -> None:
    """Take back what was told."""
    _kv()._internal_kv_del(f"logonet/{run}")


def leave_before_resizing(run: str) -> Any:
    """A callback for Ray Train's controller, which would otherwise stop its workers within a step and lose the steps
    since their last checkpoint."""
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2._internal.execution.controller.state import ResizingState

    class LeaveFirst(ControllerCallback):
        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            if not isinstance(current_state, ResizingState):
                return
            tell(run)
            until = time.monotonic() + RESIZE_WAIT_S
            while time.monotonic() < until and _kv()._internal_kv_get(f"logonet/{run}") != LEFT:
                time.sleep(0.05)
            forget(run)

    return LeaveFirst()


def end_with(key: str) -> Any:
    """A callback for Ray Train's controller: a rank that returns a mapping with ``key`` ends the run, which returns it.

    Ray would wait for the others, which may be waiting in a collective for the one that has left; and a rank that
    raises it would answer by starting all ranks again.
    """
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class EndAll(WorkerGroupCallback):
        def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
            statuses = worker_group_status.worker_statuses.values()
            if found := [s.return_value for s in statuses if key in (s.return_value or {})]:
                for status in statuses:
                    status.running, status.error, status.return_value = False, None, found[0]

    return EndAll()


def in_main_thread(fn: Any, *args: Any) -> None:
    """Call ``fn`` in the main thread of this worker of Ray Train's, whose loop runs in another."""
    import ray

    me: Any = ray.get_runtime_context().current_actor
    ray.get(me.execute.remote(fn, *args))


# ----------------------------------------------------------------------------------------------- an autoscaler


def grows() -> bool:
    """Whether the connected cluster has an autoscaler that can tell what it would start (Ray's v2, its default)."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return is_autoscaler_v2(fetch_from_server=True)


def status(address: str) -> Any:
    """What is asked of the cluster at ``address``, and what its autoscaler makes of it."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.core.generated import autoscaler_pb2

    reply: Any = vars(autoscaler_pb2)["GetClusterStatusReply"]  # generated without types
    return reply.FromString(GcsClient(address).get_cluster_status(timeout_s=10))


def comes(bundle: dict[str, float], wait_s: float = ANSWER_S) -> bool:
    """Whether the cluster has room for ``bundle``, or its autoscaler a pool whose nodes have; it is asked to start one.

    An autoscaler that gives no answer, as one busy with the cloud's, counts as one that has.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    if not grows():
        return False
    address = ray.get_runtime_context().gcs_address
    group = placement_group([bundle])
    try:
        until, asked = time.monotonic() + wait_s, 0
        while time.monotonic() < until and not group.wait(0.5):
            now = status(address)
            request, answer = now.cluster_resource_state, now.autoscaling_state
            if asked and answer.last_seen_cluster_resource_state_version >= asked:
                return not _names(answer.infeasible_gang_resource_requests, group)
            if not asked and _names(request.pending_gang_resource_requests, group):
                asked = request.cluster_resource_state_version
        return True
    finally:
        remove_placement_group(group)


def _names(requests: Any, group: Any) -> bool:
    return any(group.id.hex() in request.details for request in requests)


def drain(until_s: float, node_id: str = "") -> list[str]:
    """Tell the cluster that this machine is taken away at ``until_s`` (Unix time); returns the ids of nodes told of.

    This is what ``ray drain-node`` does; that would start a driver to learn which node it is on.

    Args:
        node_id: instead of every node on this machine.

    Raises:
        ConnectionError: there is no cluster, none of its nodes is here, or it does not take the word.
    """
    import ray
    from ray._private import services
    from ray.core.generated import autoscaler_pb2, gcs_pb2

    words: Any = vars(autoscaler_pb2)["DrainNodeReason"]  # generated without types
    alive = vars(gcs_pb2)["GcsNodeInfo"].ALIVE
    address = services.canonicalize_bootstrap_address_or_die(None)  # type: ignore[arg-type]
    here = services.get_node_ip_address(address)
    try:
        head: Any = vars(ray._raylet)["GcsClient"](address=address)
        nodes = head.get_all_node_info(timeout=10).items()
        mine = [n.hex() for n, info in nodes if info.state == alive and info.node_manager_address == here]
        if not (told := [node_id] if node_id else mine):
            raise ConnectionError(f"the Ray cluster at {address} has no node on {here}")
        for node in told:
            reason = words.Value("DRAIN_NODE_REASON_PREEMPTION")
            taken, why = head.drain_node(
                node, reason, "the cloud takes the machine away", int(1000 * until_s)
            )
            if not taken:
                raise ConnectionError(f"node {node} is not drained: {why}")
    except ray.exceptions.RayError as err:
        raise ConnectionError(f"the Ray cluster at {address} does not answer: {err}") from None
    return told


# ------------------------------------------------------------------------- lines in red that mean nothing


def quiet_actor_pools() -> None:
    """Ray Data's next pool of actors starts without Ray's word on restarts."""
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

    _unheard(ActorPoolMapOperator, "_start_actor")


def quiet_controller() -> Any:
    """A callback for Ray Train's controller, whose watcher of preemptions starts without Ray's word on restarts."""
    from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class Quiet(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            _unheard(PreemptionCallback, "after_worker_group_start")

    return Quiet()


def _unheard(owner: Any, name: str) -> None:
    """The next call of ``owner``'s method says nothing on standard error; later ones do.

    Ray's core warns, once a process and in red, of an actor that may restart with arguments that are references, for
    these may go out of scope. Ray's own libraries start actors so, and hold the references as long as the actors live
    (ray-project/ray#57733). It comes from C++, past sys.stderr.
    """
    method = getattr(owner, name)

    def once(*args: Any) -> Any:
        setattr(owner, name, method)
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        try:
            return method(*args)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)

    setattr(owner, name, once)


def prefetched_bytes(stream: Any) -> int:
    """Of the blocks that an iterator over a split of a Ray Data stream has been given and nobody has taken from it."""
    return stream._iter_stats.iter_prefetched_bytes


# ---------------------------------------------------------------------------------------------- one machine


def memory_bytes() -> int:
    """What this container may use of the machine's memory."""
    from ray._common.utils import get_system_memory

    return get_system_memory()


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """A Ray that starts within this block listens on 127.0.0.1 and nowhere else.

    Its processes believe whoever reaches them. ``ray.init`` takes no loopback address; the one way to ask for it is the
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


def without_dashboard() -> None:
    """Run in every worker process of a Ray of our own, which has no dashboard.

    Ray Train's watcher over its controller asks the dashboard, and would complain every second. Where another Ray runs
    on the machine it does not know which one it is of, and would end with a traceback.
    """
    import logging

    import ray

    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    name = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(name).setLevel(logging.ERROR)


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has ``address``."""
    import psutil

    interfaces = psutil.net_if_addrs().items()
    return next((name for name, given in interfaces if address in {a.address for a in given}), None)


def speak_as_ray() -> None:
    """Run in a training worker: gloo takes the interface of the address that Ray knows this machine by.

    Left alone, it takes the address that the machine's own name resolves to. That often is a loopback one, such as
    Debian's 127.0.1.1, where no worker on another machine reaches it.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    address = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here)
    if interface := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _torch_config(backend: type) -> Any:
    """A ``TorchConfig`` whose workers ``backend`` brings together."""
    from ray.train.torch import TorchConfig

    class OwnTorchConfig(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return backend

    return OwnTorchConfig()


def cluster_torch_config() -> Any:
    """A ``TorchConfig`` for workers on several machines."""
    from ray.train.torch import config as ray_torch

    class Backend(ray_torch._TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(speak_as_ray)
            super().on_start(worker_group, backend_config)

    return _torch_config(Backend)


def local_torch_config() -> Any:
    """A ``TorchConfig`` for workers that are all on one machine: they meet through a file, on the loopback interface.

    Ray Train lets workers meet at a TCP store of torch's, which listens on every interface of the machine and believes
    whoever connects. Between machines there is no other way. On one there is a file that only its owner can open.
    """
    import ray
    from ray.train.torch import config as ray_torch

    class Backend(ray_torch._TorchBackend):
        folder = ""

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            gpus = worker_group.get_resources_per_worker().get("GPU", 0)
            worker_group.execute(ray_torch._set_torch_distributed_env_vars)
            self.folder = tempfile.mkdtemp(prefix="logonet-meet-")  # the file must be a new one at each start
            started = [
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
            ray.get(started)

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            super().on_shutdown(worker_group, backend_config)
            shutil.rmtree(self.folder, ignore_errors=True)

    return _torch_config(Backend)


def progress_bar(total: int, done: int) -> Any:
    """A bar of training steps with an ETA at the driver's terminal, drawn through Ray."""
    from ray.experimental.tqdm_ray import tqdm

    bar = tqdm(desc="training", total=total, unit="step")
    bar.update(done)
    return bar


# ------------------------------------------------------------------------------------- runs ended from outside


def placement_groups(orphans: bool = False) -> list[str]:
    """Ids of the placement groups that this job holds.

    Ray's public list asks its dashboard, which a Ray of our own does not have; its public table does not say whose
    a group is.

    Args:
        orphans: only those whose creator, an actor, has died.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    job = ray.get_runtime_context().get_job_id()
    # A group that the driver made (Tune does, for a trial) has no actor as its creator, and counts as without one.
    no_actor = ray.ActorID.nil().binary()
    row: Any = vars(gcs_pb2)["PlacementGroupTableData"]  # generated without types
    groups = map(row.FromString, state._connect_and_get_accessor().get_placement_group_table())
    held = [group for group in groups if group.creator_job_id.hex() == job and group.state != row.REMOVED]
    if orphans:
        held = [group for group in held if group.creator_actor_dead and group.creator_actor_id != no_actor]
    return [group.placement_group_id.hex() for group in held]


def free_placement_groups(orphans: bool = False) -> None:
    """Remove the `placement_groups` that training runs of this job have left, and so end their workers.

    Ray removes a group when its job and its creator are both gone. A run that was ended from outside (Tune ends only
    the process that drives a trial) takes its controller with it but not the controller's group, and Ray Train's own
    cleaner may come late, or have died with the same machine.

    Args:
        orphans: only groups whose creator has died, as other runs of this job go on.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for group in placement_groups(orphans):
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
