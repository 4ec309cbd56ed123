"""Kills on purpose: every stage, killed at seeded random moments and run again, must end as if nothing had been.

A stage's command runs on a real Ray cluster of several raylets that is started here, on loopback, and on a real MLflow
server. While it works, one thing after another is done to it (`KINDS`); when that ended the command, the same command
is run again. When it is through, what it left is compared with what an undisturbed run of the same command left
(`outcome`), and whatever says of itself that it is finished must be whole at every kill (`damaged`).

What is drawn (kinds, moments, victims) comes from the seed; which instruction a moment meets is the machine's doing, so
the log of kills says what was met too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import psutil

import logonet
from logonet import training
from logonet.core import config, seeding
from logonet.core.errors import UserError
from logonet.data import phantom
from logonet.storage import artifacts, object_store
from logonet.sweep import records
from tools.s3server import free_ports

Stage = Literal["pretrain", "cluster", "finetune", "predict", "sweep"]
STAGES: tuple[Stage, ...] = get_args(Stage)
HUNG = 1000  # the status of a command that got nothing done and was ended for it
Kind = Literal["worker", "driver", "raylet", "mlflow", "checkpoint", "disk"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Of ten kills: processes of the run, its driver and whole nodes die more often than services and disks.
DECK: tuple[Kind, ...] = (
    *("worker", "driver", "raylet", "worker", "driver", "raylet", "worker"),
    *("mlflow", "checkpoint", "disk"),
)
# One kill in five comes at any moment, imports included; the others once the stage has done something since the last.
ANY_MOMENT = 0.2
ANY_MOMENT_S = (1.0, 20.0)
AFTER_PROGRESS_S = (0.0, 2.5)
AWAY_S = (1.0, 6.0)  # how long the MLflow server is away, or the disk full
# Ray takes 127.0.0.1 for "whatever faces the net".
HOST = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
OBJECT_STORE_MIB = 100  # each raylet's
DISK_MIB = 192
BALLAST = "ballast"
MOST_ENDS = 3  # of a command with nothing done to it in between; beyond, it does not recover
# Ray's own processes beside a raylet's workers, workers that nobody has work for, and detached actors, which outlive
# every run. (That of a training run, PlacementGroupCleaner, ends with it.)
NOT_OF_THE_RUN = re.compile(
    r"ray::(IDLE|DashboardAgent|RuntimeEnvAgent|JobSupervisor|_StatsActor|_AutoscalingCoordinatorActor|"
    r"ActorLocationTracker|TrainStateActor)"
)

# What is compared of a run: weights, clusterers, label arrays, label maps, and the tables that name every crop by its
# digest. Pages and pictures hold times and folders.
COMPARED = (".safetensors", ".nii.gz", "crops.parquet")
# Short runs that write checkpoints all the time: starting again is what a kill costs.
_SHORT = (
    *("train.epochs=6", "train.steps_per_epoch=10", "train.warmup_epochs=1"),
    "train.checkpoint_every_steps=2",
)
PRETRAINING_SET = ("split=null", "crops.per_scan=3", "clusterers.n=16", "clusterers.iterations=100", *_SHORT)
FINETUNING_SET = ("split.test_share=0", "split.folds=4", "train.validate_every_epochs=2", *_SHORT)
CLUSTERING_SET = ("clusterers.iterations=1000",)  # fits are kept until all are done: for seconds, to be met
SWEEP_SET = ("train.epochs=3",)
SPACE = "search:\n  method.phi1: {grid: [0.1, 0.2, 0.3]}\n"
SPACE_NAME = "grid"


@dataclass(frozen=True)
class Config:
    """What `logonet chaos` does.

    Attributes:
        dir: keeps the runs and the results; the same command goes on with what is left.
        stages: done in the order of `STAGES`; "cluster" is crops, clusterers and pseudo-labels.
        kills: of each stage.
        seed: of kinds, moments and victims.
        data: scans, with labels for finetuning; empty writes phantoms.
        recipe: of the jobs; empty is the demo's made smaller.
        set: section.key=value for pretraining, clustering and sweeping.
        finetune_set: the same for finetuning.
        workers: training workers; at a fixed number results are equal bit for bit.
        nodes: raylets beside the head's, 2 CPUs each; one at a time is killed.
        limit_s: a command that wrote nothing for so long has hung, and its stage fails.
    """

    dir: str = "chaos-run"
    stages: tuple[str, ...] = STAGES
    kills: int = 20
    seed: int = 0
    data: str = ""
    recipe: str = ""
    set: tuple[str, ...] = ()
    finetune_set: tuple[str, ...] = ()
    workers: int = 2
    nodes: int = 2
    limit_s: float = 600.0

    def __post_init__(self) -> None:
        if self.kills < 1 or self.nodes < 2 or self.workers < 1:
            raise UserError("--kills and --workers must be at least 1, and --nodes at least 2")
        for stage in self.stages:
            if stage not in STAGES:
                raise UserError(config.unknown("stage", stage, STAGES))
        if self.workers > 2 * (self.nodes - 1):
            raise UserError(
                f"{self.workers} workers have no place while one of {self.nodes} nodes is away; "
                f"use --nodes {-(-self.workers // 2) + 1}"
            )


# ----------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Kill:
    """What is done, and when: ``delay_s`` after the run's last progress, or after its start ("any moment")."""

    index: int
    kind: Kind
    any_moment: bool
    delay_s: float
    victim: float  # in [0, 1): which of those that there are
    away_s: float


def plan(seed: int, stage: Stage, kills: int) -> list[Kill]:
    """The kills of a stage: every kind by its share of `DECK`, in a drawn order, at drawn moments."""
    deck = [DECK[i % len(DECK)] for i in range(kills)]
    order = seeding.rng(seed, "chaos", stage, "kinds").permutation(kills)
    out = []
    for index in range(kills):
        rng = seeding.rng(seed, "chaos", stage, index)
        # What is cut short must be there first, and may be gone again soon.
        any_moment = bool(rng.random() < ANY_MOMENT) and deck[order[index]] != "checkpoint"
        delay_s = float(rng.uniform(*(ANY_MOMENT_S if any_moment else AFTER_PROGRESS_S)))
        victim, away_s = float(rng.random()), float(rng.uniform(*AWAY_S))
        out.append(Kill(index, deck[order[index]], any_moment, delay_s, victim, away_s))
    return out


# ------------------------------------------------------------------------------------------- what is compared


def timeless(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history without what depends on the machine."""
    return [{k: v for k, v in e.items() if k not in training.TIMINGS} for e in history]


def outcome(root: str) -> dict[str, str]:
    """Name below ``root`` -> digest, of everything that must be the same whatever was killed on the way."""
    found: dict[str, str] = {}
    for uri in _manifests(root):
        artifact = artifacts.find(uri)
        if artifact is None or artifact.stage == "checkpoint":
            continue
        for name, stored in artifact.files.items():
            if name.endswith(COMPARED):
                found[f"{object_store.relative(uri, root)}/{name}"] = stored.sha256
            elif name == "history.json":
                history = timeless(object_store.read_json(f"{uri}/{name}"))
                found[f"{object_store.relative(uri, root)}/{name}"] = config.fingerprint(history)
    for name, row in _rows(root).items():
        # The version is the scan's, the URI the output's: another folder has others.
        found[name] = config.fingerprint([row["status"], row["reason"], row["sha256"], row["volumes_ml"]])
    for sweep in _sweeps(root):
        for trial in records.read_all(sweep):
            values = [trial.settings, trial.status, timeless(trial.history)]
            found[f"{object_store.relative(sweep, root)}/trial {trial.index}"] = config.fingerprint(values)
    return found


def damaged(root: str, torn: set[str]) -> list[str]:
    """Whatever under ``root`` says that it is finished and is not whole, read byte by byte.

    Args:
        torn: folders of what was cut short on purpose; they are left out until they are whole again.
    """
    out = []
    for uri in _manifests(root):
        bad: list[str] = []
        for _ in range(2):  # twice: one that was read while its run deleted it is gone the second time
            try:
                artifact = artifacts.find(uri)
                there = object_store.exists(object_store.join(uri, artifacts.MANIFEST))
                bad = artifacts.verify(artifact, full=True) if artifact else [artifacts.MANIFEST] * there
            except UserError:
                bad = [artifacts.MANIFEST]
        if uri in torn:
            if not bad:
                torn.discard(uri)
            continue
        out += [f"{uri}/{name}" for name in bad]
    for name, row in _rows(root).items():
        if row["status"] == "done":
            try:
                object_store.read(row["output"], sha256=row["sha256"])
            except UserError:  # another, or none
                out.append(object_store.join(root, name))
    for sweep in _sweeps(root):
        there_are = sum(
            e.uri.endswith(".json") for e in object_store.listing(object_store.join(sweep, records.TRIALS))
        )
        if len(records.read_all(sweep)) < there_are:
            out.append(object_store.join(sweep, records.TRIALS))
    return out


def _manifests(root: str) -> list[str]:
    end = f"/{artifacts.MANIFEST}"
    return [e.uri.removesuffix(end) for e in object_store.listing(root) if e.uri.endswith(end)]


def _rows(root: str) -> dict[str, dict[str, Any]]:
    """The committed rows of a prediction at ``root``, by name; a torn one counts as absent, as it does there."""
    out = {}
    for entry in object_store.listing(object_store.join(root, ".cases")):
        if entry.uri.endswith("/row.json"):
            with contextlib.suppress(object_store.IntegrityError):
                out[object_store.relative(entry.uri, root)] = object_store.read_json(entry.uri)
    return out


def _sweeps(root: str) -> list[str]:
    end = f"/{records.SPEC}"
    return [
        e.uri.removesuffix(end)
        for e in object_store.listing(object_store.join(root, "sweep"))
        if e.uri.endswith(end)
    ]


# ------------------------------------------------------------------------------------------------ processes


def launch(
    command: Sequence[str], env: dict[str, str], log: str, cwd: str | None = None
) -> subprocess.Popen[bytes]:
    """A process in a group of its own, its words at the end of ``log``."""
    with open(log, "ab") as out:
        return subprocess.Popen(
            list(command),
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes], patience_s: float = 20.0) -> None:
    """SIGKILL the process, then whatever of its own outlives it by ``patience_s``, by pid."""
    children = _children(process.pid)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=patience_s)
    for child in alive:
        child.kill()
    psutil.wait_procs(alive, timeout=20)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_for(found: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float, what: str) -> Any:
    """The first true value of ``found``.

    Raises:
        UserError: ``process`` ended first, or ``seconds`` went by.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := found():
            return value
        if process.poll() is not None:
            raise UserError(f"{what}: it ended with status {process.returncode} before it was ready")
        time.sleep(0.05)
    raise UserError(f"{what}: it was not ready within {seconds:g} s")


def clean_environment(**values: str) -> dict[str, str]:
    """This environment without what would lead Ray or MLflow elsewhere, and with ``values``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    # Ray's processes must find the package that this process runs, installed or not.
    paths = [package_folder(), *filter(None, [os.environ.get("PYTHONPATH")])]
    # On loopback, for the length of a test: no token, and no question about usage.
    own = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    # Workers started ahead would not have the run's environment, and cost seconds.
    own["RAY_prestart_worker_first_driver"] = "0"
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), **own, **values}


def package_folder() -> str:
    """Where `logonet` and `jobs` lie."""
    return os.path.dirname(os.path.dirname(os.path.abspath(logonet.__file__)))


def tool(name: str) -> str:
    """A command of this interpreter's environment."""
    return os.path.join(os.path.dirname(sys.executable), name)


class Raylets:
    """A Ray cluster on loopback: a head, which drivers join, and nodes that may be killed.

    Args:
        env: of all of its processes, and so of every worker.
        folder: for their logs.
        head_cpus: for data tasks, while a node is away.
    """

    def __init__(
        self, nodes: int, env: dict[str, str], folder: str, *, head_cpus: int = 1, cpus_per_node: int = 2
    ) -> None:
        self.env, self.folder, self.port = env, folder, free_ports()
        self.head_cpus, self.cpus_per_node = head_cpus, cpus_per_node
        # Ray's own file of "the cluster of this machine" must not lead others here; short, for the sockets' names.
        self.temp = tempfile.mkdtemp(prefix="chaos-", dir="/tmp")
        self.head: subprocess.Popen[bytes] | None = None
        self.nodes: list[subprocess.Popen[bytes] | None] = [None] * nodes

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def __enter__(self) -> Raylets:
        try:
            self.head = self._start("head", self._head_options())
            self._await("head", self.head)
            for i in range(len(self.nodes)):
                self.start(i)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, node: int) -> None:
        """Start a node, and return when the cluster has it."""
        agent = free_ports()
        options = ["--address", self.address, "--num-cpus", str(self.cpus_per_node)]
        options += ["--dashboard-agent-listen-port", str(agent)]
        self.nodes[node] = process = self._start(f"node-{node}", options)
        self._await(f"node-{node}", process)

    def kill(self, node: int) -> int:
        """SIGKILL a node's raylet, as a machine goes: its workers and agents die with it. Returns its pid."""
        process = self.nodes[node]
        assert process is not None
        raylet = self._raylet(process)
        raylet.kill()
        kill(process, patience_s=0)
        return raylet.pid

    def workers(self) -> list[psutil.Process]:
        """Processes that work for a run, on whatever node, in a fixed order of names."""
        found = []
        for process in (self.head, *self.nodes):
            for child in _children(process.pid) if process else []:
                with contextlib.suppress(psutil.NoSuchProcess):
                    title = _title(child)
                    if title.startswith("ray::") and not NOT_OF_THE_RUN.match(title):
                        found.append((title, child.pid, child))
        return [child for *_, child in sorted(found, key=lambda f: f[:2])]

    def stop(self) -> None:
        """What ``ray stop`` does, to this cluster alone."""
        started = [p for p in (*self.nodes, self.head) if p is not None]
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            kill(process, patience_s=0)
        self.head, self.nodes = None, [None] * len(self.nodes)
        shutil.rmtree(self.temp, ignore_errors=True)

    def _head_options(self) -> list[str]:
        options = ["--head", "--port", str(self.port), "--num-cpus", str(self.head_cpus)]
        options += ["--temp-dir", self.temp, "--dashboard-host", "127.0.0.1", "--disable-usage-stats"]
        # The agent's own port lies where Linux takes ports for connections; named, it is not taken by chance.
        return [
            *options,
            *("--dashboard-port", str(self.port + 1)),
            *("--dashboard-agent-listen-port", str(self.port + 2)),
        ]

    def _start(self, name: str, options: list[str]) -> subprocess.Popen[bytes]:
        log = os.path.join(self.folder, f"{name}.log")
        with contextlib.suppress(FileNotFoundError):
            os.rename(log, f"{log}.before")
        common = ["--block", "--node-ip-address", HOST, "--object-store-memory", str(OBJECT_STORE_MIB << 20)]
        return launch([tool("ray"), "start", *options, *common], self.env, log)

    def _await(self, name: str, process: subprocess.Popen[bytes]) -> None:
        log = os.path.join(self.folder, f"{name}.log")
        wait_for(
            lambda: b"Ray runtime started" in _bytes(log), process, 120, f"the Ray {name} (its words: {log})"
        )

    @staticmethod
    def _raylet(process: subprocess.Popen[bytes]) -> psutil.Process:
        return next(p for p in _children(process.pid) if p.name() == "raylet")


class TrackingServer:
    """A real MLflow server on loopback, with its database in ``folder``."""

    def __init__(self, env: dict[str, str], folder: str) -> None:
        self.folder, self.port = folder, free_ports()
        # Its own worker processes for jobs that nobody asks of it cost a gigabyte.
        self.env = {**env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> TrackingServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Without waiting: what is tracked must bear that."""
        command = [
            tool("mlflow"),
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--default-artifact-root", os.path.join(self.folder, "mlflow-artifacts")]
        self.process = launch(command, self.env, os.path.join(self.folder, "mlflow.log"))

    def kill(self) -> int:
        assert self.process is not None
        kill(self.process)
        return self.process.pid


class Disk:
    """The empty folder a run writes to: a small file system of its own where this user may mount one.

    Elsewhere it cannot be filled, and is made read-only instead: writes fail then too, with another error.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if os.path.ismount(path):  # of a call that was killed
            subprocess.run(["umount", "--lazy", path], check=True)
        shutil.rmtree(path, ignore_errors=True)
        os.makedirs(path)
        options = ["-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", path]
        root = os.geteuid() == 0
        self.mounted = root and subprocess.run(["mount", *options], capture_output=True).returncode == 0
        if root and not self.mounted:
            raise UserError(
                f"no disk can be filled here: mounting a tmpfs at {path} is refused, and root writes to read-only "
                "folders too; run as another user, or allow mounting"
            )

    def fill(self) -> str:
        """Until nothing more goes onto it."""
        if not self.mounted:
            os.chmod(self.path, 0o500)
            return "read-only"
        with open(os.path.join(self.path, BALLAST), "wb") as ballast:
            size = 0
            piece = 1 << 20
            while piece:
                try:
                    os.posix_fallocate(ballast.fileno(), size, piece)
                    size += piece
                except OSError:
                    piece = piece // 2 if piece > 4096 else 0
        return f"{size >> 20} MiB of ballast"

    def free(self) -> None:
        if self.mounted:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.path, BALLAST))
        else:
            os.chmod(self.path, 0o700)

    def close(self) -> None:
        """Its contents go with it."""
        self.free()
        if self.mounted:
            subprocess.run(["umount", "--lazy", self.path], check=True)
        shutil.rmtree(self.path)


def newest_kept(root: str) -> object_store.Entry | None:
    """The newest finished checkpoint under ``root``; where a stage keeps none, what it would go on from (a clusterer's
    fit, a prediction's row)."""
    for pattern in (r"/checkpoints/step-\d+/model\.safetensors$", r"/fits/\d+\.safetensors$", r"/row\.json$"):
        found = [e for e in object_store.listing(root) if re.search(pattern, e.uri)]
        if "checkpoints" in pattern:
            found = [
                e
                for e in found
                if object_store.exists(object_store.join(os.path.dirname(e.uri), artifacts.MANIFEST))
            ]
        if found:
            return max(found, key=lambda e: (int(e.version), e.uri))
    return None


def tear(root: str) -> str | None:
    """Cut `newest_kept` short; its folder. None where there is nothing to cut."""
    if (kept := newest_kept(root)) is None:
        return None
    os.truncate(object_store.local_path(kept.uri), max(0, kept.size_bytes - min(100, kept.size_bytes // 2)))
    return os.path.dirname(kept.uri)


def _title(process: psutil.Process) -> str:
    return " ".join(process.cmdline()).strip()


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


# -------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Place:
    """Where things are.

    Attributes:
        data: the scans to learn from.
        new: the scans to segment.
        pretrained, finetuned: artifacts of undisturbed runs.
    """

    data: str
    new: str
    pretrained: str = ""
    finetuned: str = ""


def command(stage: Stage, cfg: Config, place: Place, root: str, experiment: str) -> list[str]:
    """What a user would type, with ``python -m`` for the script."""
    words = [sys.executable, "-m", f"jobs.{stage}"]
    # Every command outlives any number of kills of workers: how often is not what is asked here.
    common = ["--workers", str(cfg.workers), "--cpus-per-worker", "1", "--max-failures", "1000"]
    if stage == "predict":
        return [*words, "--model", place.finetuned, "--input", place.new, "--output", root, *common]
    settings: tuple[str, ...] = cfg.finetune_set if stage == "finetune" else cfg.set
    if not cfg.recipe:
        own = FINETUNING_SET if stage == "finetune" else PRETRAINING_SET
        more = {"cluster": CLUSTERING_SET, "sweep": SWEEP_SET}.get(stage, ())
        settings = (*own, *more, *settings)
    words += ["--recipe", cfg.recipe or "demo", "--data", place.data, "--root", root, *common]
    words += ["--experiment", experiment]
    if stage == "finetune":
        words += ["--init", place.pretrained]
    if stage == "sweep":
        words += ["--space", os.path.join(os.path.abspath(cfg.dir), f"{SPACE_NAME}.yaml")]
        words += ["--objective", "accuracy", "--no-stop-early", "--concurrent", "1"]
    for setting in settings:
        words += ["--set", setting]
    return words


# Below the run's root, what shows that a stage works; the pretraining of scans that are cut first is not yet it.
PROGRESS: dict[Stage, tuple[str, ...]] = {
    "pretrain": ("pretrain",),
    "cluster": ("crops", "clusterers", "labels"),
    "finetune": ("finetune",),
    "predict": (".cases",),
    "sweep": ("pretrain",),
}


def newest(root: str, parts: Sequence[str] = ("",)) -> int:
    """When something was last written below ``parts`` of ``root``, in ns of the file system's clock."""
    entries = (e for part in parts for e in object_store.listing(object_store.join(root, part)))
    return max((int(e.version) for e in entries), default=0)


# --------------------------------------------------------------------------------------------------- the run


@dataclass
class Round:
    """A run of a stage's command from an empty folder to its end, over all kills.

    Attributes:
        statuses: of the command's every end, the last one too; negative is a signal's number.
        differing: names whose digests are not those of the undisturbed run.
        unfit: what was found half-written.
    """

    kills: list[dict[str, Any]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    compared: int = 0
    wall_s: float = 0.0

    @property
    def equal(self) -> bool:
        return not self.differing and not self.unfit and self.statuses[-1:] == [0]


@dataclass
class Result:
    """What became of a stage.

    Attributes:
        undisturbed_s: the same command without kills, on the same cluster.
    """

    stage: Stage
    seed: int
    kills: int
    undisturbed_s: float = 0.0
    rounds: list[Round] = field(default_factory=list)

    @property
    def done(self) -> int:
        return sum(len(r.kills) for r in self.rounds)

    @property
    def complete(self) -> bool:
        return self.done >= self.kills

    @property
    def equal(self) -> bool:
        return all(r.equal for r in self.rounds)

    def row(self) -> dict[str, Any]:
        """The stage's line of the table."""
        kinds = Counter(k["kind"] for r in self.rounds for k in r.kills)
        return {
            "stage": self.stage,
            "kills": self.done,
            **{kind: kinds[kind] for kind in KINDS},
            "restarts": sum(len(r.statuses) - 1 for r in self.rounds),
            "tracebacks": sum(r.statuses.count(1) for r in self.rounds),
            "runs": len(self.rounds),
            "compared": sum(r.compared for r in self.rounds),
            "equal": self.equal,
            "half_written": sum(len(r.unfit) for r in self.rounds),
            "undisturbed_s": round(self.undisturbed_s, 1),
            "lost_s": round(sum(r.wall_s for r in self.rounds) - len(self.rounds) * self.undisturbed_s, 1),
        }


class Chaos:
    """A cluster, a tracking server, and what is done to them while a stage's command runs."""

    def __init__(
        self, cfg: Config, folder: str, ray: Raylets, mlflow: TrackingServer, say: Callable[[str], None]
    ):
        self.cfg, self.folder, self.ray, self.mlflow, self.say = cfg, folder, ray, mlflow, say
        self.env = {**ray.env, "RAY_ADDRESS": ray.address}

    def start(self, stage: Stage, place: Place, root: str, experiment: str) -> subprocess.Popen[bytes]:
        words = command(stage, self.cfg, place, root, experiment)
        return launch(words, self.env, self.log(stage), package_folder())

    def log(self, stage: Stage) -> str:
        return os.path.join(self.folder, f"{stage}.log")

    def undisturbed(self, stage: Stage, place: Place) -> tuple[str, dict[str, str], float]:
        """Root, outcome and seconds of the command that nothing is done to; kept, and run only once."""
        root = os.path.join(self.folder, stage, "undisturbed")
        known = os.path.join(self.folder, stage, "undisturbed.json")
        if not object_store.exists(known):
            shutil.rmtree(root, ignore_errors=True)
            os.makedirs(root)
            self.say(f"{stage}: undisturbed")
            began = time.monotonic()
            process = self.start(stage, place, root, f"chaos-{stage}")
            try:
                status = self._end(process, root)
            finally:
                if process.poll() is None:
                    kill(process)
            if status:
                raise UserError(f"{stage} fails without any kill (status {status}); see {self.log(stage)}")
            object_store.write_json(known, {"wall_s": time.monotonic() - began, "outcome": outcome(root)})
        values = object_store.read_json(known)
        return root, values["outcome"], values["wall_s"]

    def stage(self, stage: Stage, place: Place) -> Result:
        """All kills of a stage, over as many runs of its command as they take; goes on where it was."""
        result = _result(self.cfg, self.folder, stage)
        kills = plan(self.cfg.seed, stage, self.cfg.kills)
        barren = 0
        while not result.complete:
            _, expected, result.undisturbed_s = self.undisturbed(stage, place)
            done = self.round(stage, place, kills[result.done :], len(result.rounds), expected)
            result.rounds.append(done)
            object_store.write_json(os.path.join(self.folder, f"{stage}.json"), asdict(result))
            if not done.equal:
                break  # what differs lies in the run's folder, to be looked at
            barren = 0 if done.kills else barren + 1
            if barren == 3:
                raise UserError(f"{stage} ends before it can be killed; give it more scans or epochs")
        return result

    def round(
        self, stage: Stage, place: Place, kills: Sequence[Kill], number: int, expected: dict[str, str]
    ) -> Round:
        """One run of the command from an empty folder, with as many of ``kills`` as find it at work."""
        root = os.path.join(self.folder, stage, f"run-{number}")
        disk = Disk(root)
        done, torn, waiting = Round(), set[str](), list(kills)
        began, since = time.monotonic(), 0
        self.say(
            f"{stage}: run {number}, {len(waiting)} kills to go" + ("" if disk.mounted else ", no mount")
        )
        process = self.start(stage, place, root, f"chaos-{stage}-{number}")
        try:
            while True:
                if waiting and self._await_moment(stage, process, root, waiting[0]):
                    note = self._strike(waiting[0], process, root, disk, torn)
                    since = 0
                    if note is not None:
                        note |= {"stage": stage, "seed": self.cfg.seed, "run": number}
                        note |= {"after_s": round(time.monotonic() - began, 2), "unix_s": time.time()}
                        done.kills.append(note)
                        self._note(note)
                        waiting.pop(0)
                    done.unfit += damaged(root, torn)
                elif not waiting:
                    self._end(process, root)
                if process.poll() is None:
                    continue
                done.statuses.append(process.returncode)
                if process.returncode == 0:
                    break
                if process.returncode == HUNG:
                    self.say(f"{stage}: the command did nothing for {self.cfg.limit_s:g} s")
                    break
                since += 1
                if since > MOST_ENDS:
                    self.say(
                        f"{stage}: the command ended {since} times with nothing done to it; see {self.log(stage)}"
                    )
                    break
                self.say(f"{stage}: ended with status {process.returncode}; the same command again")
                process = self.start(stage, place, root, f"chaos-{stage}-{number}")
            done.wall_s = time.monotonic() - began
            done.unfit += damaged(root, torn)
            found = {} if done.unfit else outcome(root)
            done.differing = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
            done.compared = len(expected)
        finally:
            if process.poll() is None:
                kill(process)
            if done.wall_s and not done.equal:
                disk.free()  # its contents stay, to be looked at
            else:
                disk.close()
        self.say(f"{stage}: run {number} {'equal' if done.equal else 'NOT EQUAL'}, {done.wall_s:.0f} s")
        return done

    def _await_moment(self, stage: Stage, process: subprocess.Popen[bytes], root: str, due: Kill) -> bool:
        """Wait for the moment of a kill; whether the command still ran then."""
        before = newest(root, PROGRESS[stage])
        if due.kind == "checkpoint":  # killed before there is one, a command would begin anew for ever
            self._end(process, root, lambda: newest_kept(root) is not None)
        if not due.any_moment:
            self._end(process, root, lambda: newest(root, PROGRESS[stage]) != before)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=due.delay_s)
        return process.poll() is None

    def _strike(
        self, due: Kill, process: subprocess.Popen[bytes], root: str, disk: Disk, torn: set[str]
    ) -> dict[str, Any] | None:
        """Do it; what was met, or None where there was nothing to do it to."""
        met: dict[str, Any] = {}
        if due.kind == "worker":
            workers = self.ray.workers()
            if not workers:
                return None
            victim = workers[int(due.victim * len(workers))]
            try:
                met = {"pid": victim.pid, "what": _title(victim)}
                victim.kill()
            except psutil.NoSuchProcess:
                return None
        elif due.kind == "driver":
            met = {"pid": process.pid, "what": "driver"}
            kill(process)
        elif due.kind == "raylet":
            node = int(due.victim * len(self.ray.nodes))
            met = {"pid": self.ray.kill(node), "what": f"node {node}"}
            self.ray.start(node)
        elif due.kind == "mlflow":
            met = {"pid": self.mlflow.kill(), "what": "MLflow server", "away_s": due.away_s}
            time.sleep(due.away_s)
            self.mlflow.start()
        elif due.kind == "checkpoint":
            kill(process)
            self._await_quiet()  # or a worker that outlives its driver writes over what is torn
            if (folder := tear(root)) is None:
                return None
            torn.add(folder)
            met = {"pid": process.pid, "what": object_store.relative(folder, root)}
        else:
            met = {"pid": 0, "what": disk.fill(), "away_s": due.away_s}
            time.sleep(due.away_s)
            disk.free()
        return {**asdict(due), **met}

    def _await_quiet(self, seconds: float = 60.0) -> None:
        """Until Ray has ended what a killed driver has left."""
        until = time.monotonic() + seconds
        while self.ray.workers() and time.monotonic() < until:
            time.sleep(0.2)

    def _end(
        self, process: subprocess.Popen[bytes], root: str, enough: Callable[[], bool] = lambda: False
    ) -> int | None:
        """Wait for the command's end, or until ``enough``; its status. One that has hung is killed."""
        last, since = newest(root), time.monotonic()
        while process.poll() is None and not enough():
            if (now := newest(root)) != last:
                last, since = now, time.monotonic()
            if time.monotonic() - since > self.cfg.limit_s:
                kill(process)
                process.returncode = HUNG
            time.sleep(0.1)
        return process.returncode

    def _note(self, note: dict[str, Any]) -> None:
        """One line of the log of kills."""
        with open(os.path.join(self.folder, "kills.jsonl"), "a") as log:
            log.write(json.dumps(note) + "\n")
        self.say(f"  {note['index']:>3} {note['kind']:<10} {note['what']} (pid {note['pid']})")


# ------------------------------------------------------------------------------------------------- the whole


def run(cfg: Config, say: Callable[[str], None] = lambda text: print(text, flush=True)) -> list[Result]:
    """Every stage of ``cfg``, each with its kills; results lie in ``<dir>/<stage>.json`` as soon as there are any.

    Raises:
        UserError: ``dir`` is of other settings, or a stage fails without any kill.
    """
    folder = os.path.abspath(cfg.dir)
    os.makedirs(folder, exist_ok=True)
    _claim(cfg, folder)
    results = [_result(cfg, folder, stage) for stage in STAGES if stage in cfg.stages]
    if all(r.complete for r in results):
        return results
    # Whatever ends this process in order ends what it has started.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    env = clean_environment(LOGONET_HOME=os.path.join(folder, "home"))
    try:
        place = _place(cfg, folder)
        with TrackingServer(env, folder) as mlflow:
            env["MLFLOW_TRACKING_URI"] = mlflow.uri
            with Raylets(cfg.nodes, env, folder) as ray:
                say(f"a Ray cluster of {cfg.nodes + 1} raylets at {ray.address}, MLflow at {mlflow.uri}")
                chaos = Chaos(cfg, folder, ray, mlflow, say)
                results = [chaos.stage(r.stage, _stand_on(chaos, r.stage, place)) for r in results]
    finally:
        signal.signal(signal.SIGTERM, previous)
    return results


def print_table(results: Sequence[Result]) -> None:
    """One row a stage; the last line is JSON."""
    from rich.console import Console
    from rich.table import Table

    rows = [r.row() for r in results]
    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "stage" else "right")
    for row in rows:
        table.add_row(
            *({True: "yes", False: "NO"}[v] if isinstance(v, bool) else str(v) for v in row.values())
        )
    Console(width=180).print(table)
    for result in results:
        for number, done in enumerate(result.rounds):
            for what, names in (("differs", done.differing), ("half-written", done.unfit)):
                for name in names:
                    print(f"{result.stage}, run {number}: {what}: {name}")
    print(json.dumps(rows))


def _claim(cfg: Config, folder: str) -> None:
    """Write down whose results these are, or refuse where those of other settings lie."""
    uri = os.path.join(folder, "settings.json")
    own = {k: v for k, v in config.to_dict(cfg).items() if k not in ("dir", "stages", "limit_s")}
    if not object_store.exists(uri):
        object_store.write_json(uri, own)
    elif (there := object_store.read_json(uri)) != own:
        differing = ", ".join(k for k in own if own[k] != there.get(k))
        raise UserError(f"{cfg.dir} holds kills with other settings ({differing}); give another --dir")


def _result(cfg: Config, folder: str, stage: Stage) -> Result:
    """What there is of a stage."""
    kept = os.path.join(folder, f"{stage}.json")
    if not object_store.exists(kept):
        return Result(stage, cfg.seed, cfg.kills)
    values = object_store.read_json(kept)
    return Result(**{**values, "rounds": [Round(**r) for r in values["rounds"]]})


def _place(cfg: Config, folder: str) -> Place:
    object_store.write(os.path.join(folder, f"{SPACE_NAME}.yaml"), SPACE.encode())
    if cfg.data:
        return Place(cfg.data, cfg.data)
    scans, new = os.path.join(folder, "scans"), os.path.join(folder, "new")
    for at, count, seed, size in ((scans, 4, 0, 40), (new, 48, 1, 48)):
        if not object_store.exists(os.path.join(at, "dataset.json")):
            phantom.write_dataset(at, count, seed=seed, size_vox=(size, size, size))
    return Place(scans, os.path.join(new, "imagesTr"))


def _stand_on(chaos: Chaos, stage: Stage, place: Place) -> Place:
    """What a stage stands on, made by undisturbed runs of the stages before it."""
    if stage in ("finetune", "predict"):
        root, _, _ = chaos.undisturbed("pretrain", place)
        place = dataclasses.replace(place, pretrained=_only(root, "pretrain"))
    if stage == "predict":
        root, _, _ = chaos.undisturbed("finetune", place)
        place = dataclasses.replace(place, finetuned=_only(root, "finetune"))
    return place


def _only(root: str, stage: str) -> str:
    """The one finished artifact of ``stage``."""
    found = [a for uri in _manifests(os.path.join(root, stage)) if (a := artifacts.find(uri)) is not None]
    (one,) = (a.uri for a in found if a.stage == stage)
    return one
