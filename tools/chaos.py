"""Kills on purpose: every stage, killed at seeded random moments and run again, must end as if nothing had happened.

A stage's command runs on a real Ray cluster of several raylets, started here on loopback, and on a real MLflow server.
While it works, one thing after another is done to it (`KINDS`). When that ends the command, the same command runs
again. When it is through, what it left is compared with what an undisturbed run of the same command left (`outcome`),
and at every kill whatever claims to be finished must be whole (`damaged`).

The seed decides what is drawn (kinds, moments, victims). Which instruction a moment meets depends on the machine, so
the log of kills also says what was met.
"""

from __future__ import annotations

import contextlib
import functools
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

import pandas as pd
import psutil

from logonet import training
from logonet.cli.machines import ChaosArgs
from logonet.core import config, seeding
from logonet.core.errors import UserError
from logonet.data import phantom
from logonet.storage import artifacts, object_store
from logonet.sweep import records
from tools.mlflow_server import MLflowServer
from tools.processes import free_ports, kill, launch

REPOSITORY = str(Path(__file__).parents[1])
Stage = Literal["pretrain", "cluster", "finetune", "predict", "sweep"]
STAGES: tuple[Stage, ...] = get_args(Stage)
HUNG = 1000  # the status of a command that made no progress and was ended for it
Kind = Literal["worker", "driver", "raylet", "mlflow", "checkpoint", "disk"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Of ten kills: processes of the run, its driver and whole nodes die more often than services and disks.
DECK: tuple[Kind, ...] = ("worker", "driver", "raylet", "worker", "driver", "raylet", "worker", *KINDS[3:])
# One kill in five comes at any moment, imports included; the others once the stage has made progress since the last.
ANY_MOMENT = 0.2
ANY_MOMENT_S = (1.0, 20.0)
AFTER_PROGRESS_S = (0.0, 2.5)
AWAY_S = (1.0, 6.0)  # how long the MLflow server is away, or the disk full
# Ray takes 127.0.0.1 for "whatever faces the net".
HOST = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
OBJECT_STORE_MIB = 100  # each raylet's
DISK_MIB = 192
BALLAST = "ballast"
MOST_ENDS = 3  # of a command to which nothing was done in between; beyond that it does not recover
# Ray's own processes beside a raylet's workers, idle workers, and detached actors, which outlive every run. (That of a
# training run, PlacementGroupCleaner, ends with it.)
NOT_OF_THE_RUN = re.compile(
    r"ray::(IDLE|DashboardAgent|RuntimeEnvAgent|JobSupervisor|_StatsActor|_AutoscalingCoordinatorActor|"
    r"ActorLocationTracker|TrainStateActor)"
)

# What is compared of a run: weights, clusterers, label arrays, label maps, and the tables that name every crop by its
# digest. Pages and pictures hold times and folders.
COMPARED = (".safetensors", ".nii.gz", "crops.parquet")
# Where a killed stage resumes from: the checkpoint; without one, a clusterer's fit or a prediction's row.
KEPT = (r"/checkpoints/step-\d+/model\.safetensors$", r"/fits/\d+\.safetensors$", r"/row\.json$")
# Below the run's root, what shows that a stage works, if not its own folder; cutting crops is not yet pretraining.
PROGRESS = {"cluster": ("crops", "clusterers", "labels"), "predict": (".cases",), "sweep": ("pretrain",)}
# What a stage starts from is made by undisturbed runs of these.
EARLIER: dict[Stage, tuple[Stage, ...]] = {"finetune": ("pretrain",), "predict": ("pretrain", "finetune")}
# Short runs that write checkpoints all the time: starting again is what a kill costs.
_SHORT = "train.epochs=6 train.steps_per_epoch=10 train.warmup_epochs=1 train.checkpoint_every_steps=2"
_PRETRAINING = f"split=null crops.per_scan=3 clusterers.n=16 clusterers.iterations=100 {_SHORT}"
SETTINGS: dict[Stage, str] = {
    "pretrain": _PRETRAINING,
    "cluster": f"{_PRETRAINING} clusterers.iterations=1000",  # fits are kept for seconds, to be met
    "finetune": f"split.test_share=0 split.folds=4 train.validate_every_epochs=2 {_SHORT}",
    "sweep": f"{_PRETRAINING} train.epochs=3",
}
PHANTOMS = (("scans", 4, 0, 40), ("new", 48, 1, 48))  # folder, how many, seed, side in voxels
SPACE = "search:\n  method.phi1: {grid: [0.1, 0.2, 0.3]}\n"


say = functools.partial(print, flush=True)


# ----------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Kill:
    """What is done, and when: ``delay_s`` after the run's last progress, or after its start ("any moment")."""

    index: int
    kind: Kind
    any_moment: bool
    delay_s: float
    victim: float  # in [0, 1): which of the candidates
    away_s: float


def plan(seed: int, stage: Stage, kills: int) -> list[Kill]:
    """The kills of a stage: every kind by its share of `DECK`, in a drawn order, at drawn moments."""
    order = seeding.rng(seed, "chaos", stage, "kinds").permutation(kills)
    out = []
    for index, place in enumerate(order):
        rng = seeding.rng(seed, "chaos", stage, index)
        kind = DECK[place % len(DECK)]
        # What is cut short must be there first, and may be gone again soon.
        any_moment = bool(rng.random() < ANY_MOMENT) and kind != "checkpoint"
        delay_s = float(rng.uniform(*(ANY_MOMENT_S if any_moment else AFTER_PROGRESS_S)))
        out.append(Kill(index, kind, any_moment, delay_s, float(rng.random()), float(rng.uniform(*AWAY_S))))
    return out


# ------------------------------------------------------------------------------------------- what is compared


def timeless(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history without the keys that depend on the machine."""
    return [{k: v for k, v in e.items() if k not in training.TIMINGS} for e in history]


def outcome(root: str) -> dict[str, str]:
    """Name below ``root`` -> digest, of everything that must be the same whatever was killed on the way."""
    found: dict[str, str] = {}
    for uri in _folders_with(artifacts.MANIFEST, root):
        artifact = artifacts.find(uri)
        if artifact is None or artifact.stage == "checkpoint":
            continue
        for name, stored in artifact.files.items():
            where = f"{object_store.relative(uri, root)}/{name}"
            if name.endswith(COMPARED):
                found[where] = stored.sha256
            elif name == "history.json":
                found[where] = config.fingerprint(timeless(object_store.read_json(f"{uri}/{name}")))
    for name, row in _rows(root).items():
        # The version is the scan's, the URI the output's: another folder has others.
        found[name] = config.fingerprint([row[key] for key in ("status", "reason", "sha256", "volumes_ml")])
    for sweep in _folders_with(records.SPEC, root):
        for trial in records.read_all(sweep):
            values = [trial.settings, trial.status, timeless(trial.history)]
            found[f"{object_store.relative(sweep, root)}/trial {trial.index}"] = config.fingerprint(values)
    return found


def damaged(root: str, torn: set[str]) -> list[str]:
    """Whatever under ``root`` claims to be finished and is not whole, read byte by byte.

    Args:
        torn: folders of what was cut short on purpose; they are left out until they are whole again.
    """
    out = []
    for uri in _folders_with(artifacts.MANIFEST, root):
        # Looked at again: what its run deleted while it was read is gone the second time.
        bad = _damaged_files(uri) and _damaged_files(uri)
        if uri not in torn:
            out += bad
        elif not bad:
            torn.discard(uri)
    for name, row in _rows(root).items():
        if row["status"] == "done":
            try:
                object_store.read(row["output"], sha256=row["sha256"])
            except UserError:  # another, or none
                out.append(object_store.join(root, name))
    for sweep in _folders_with(records.SPEC, root):
        trials = object_store.join(sweep, records.TRIALS)
        if len(records.read_all(sweep)) < sum(e.uri.endswith(".json") for e in object_store.listing(trials)):
            out.append(trials)
    return out


def _damaged_files(uri: str) -> list[str]:
    manifest = object_store.join(uri, artifacts.MANIFEST)
    try:
        if (artifact := artifacts.find(uri)) is None:
            return [manifest] * object_store.exists(manifest)
        return [f"{uri}/{name}" for name in artifacts.verify(artifact, full=True)]
    except UserError:
        return [manifest]


def _folders_with(name: str, root: str) -> list[str]:
    """The folders below ``root`` that hold a file of this name."""
    return [e.uri.removesuffix(f"/{name}") for e in object_store.listing(root) if e.uri.endswith(f"/{name}")]


def _rows(root: str) -> dict[str, dict[str, Any]]:
    """The committed rows of a prediction at ``root``, by name; a torn one counts as absent, as it does there."""
    out = {}
    for uri in _folders_with("row.json", object_store.join(root, ".cases")):
        with contextlib.suppress(object_store.IntegrityError):
            out[f"{object_store.relative(uri, root)}/row.json"] = object_store.read_json(f"{uri}/row.json")
    return out


# ------------------------------------------------------------------------------------------------ processes


def clean_environment(**values: str) -> dict[str, str]:
    """This environment without what would lead Ray or MLflow elsewhere, and with ``values``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    # Ray's processes must find the package that this process runs, installed or not.
    path = os.pathsep.join(filter(None, [REPOSITORY, os.environ.get("PYTHONPATH")]))
    # On loopback, for the length of a test: no token, and no question about usage.
    own = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    # Workers started ahead would not have the run's environment, and cost seconds.
    return {**kept, **own, "RAY_prestart_worker_first_driver": "0", "PYTHONPATH": path, **values}


class Raylets:
    """A Ray cluster on loopback, with this process's environment: a head, which drivers join, and nodes to be killed.

    Args:
        head_cpus: for data tasks, while a node is away.
        resources: of a node, as Ray's ``Cluster.add_node`` takes them.
    """

    def __init__(self, nodes: int, head_cpus: int = 1, **resources: Any) -> None:
        from ray.cluster_utils import Cluster

        self.resources = resources or {"num_cpus": 2}

        # Ray's own file of "the cluster of this machine" must not lead others here; short, for the sockets' names.
        self.temp = tempfile.mkdtemp(prefix="chaos-", dir="/tmp")
        with mock.patch.dict(os.environ, RAY_TMPDIR=self.temp):
            self.cluster = Cluster(shutdown_at_exit=False)
            try:
                dashboard = {"dashboard_host": "127.0.0.1", "dashboard_port": free_ports()}
                self._add(num_cpus=head_cpus, include_dashboard=True, **dashboard)
                self.nodes: list[Any] = []
                for _ in range(nodes):
                    self.add()
            except BaseException:
                self.stop()
                raise
        self.address = self.cluster.address

    def _add(self, **options: Any) -> Any:
        # The agent's own port lies where Linux takes ports for connections; named, it is not taken by chance.
        options |= {"node_ip_address": HOST, "dashboard_agent_listen_port": free_ports()}
        memory = OBJECT_STORE_MIB << 20
        return self.cluster.add_node(object_store_memory=memory, **options)

    def add(self) -> Any:
        """A new node."""
        self.nodes.append(self._add(**self.resources))
        return self.nodes[-1]

    def lose(self, index: int) -> int:
        """SIGKILL a node's raylet and its workers, as a machine goes; the raylet's pid."""
        node = self.nodes.pop(index)
        raylet = node.all_processes["raylet"][0].process
        kill(raylet, patience_s=0)
        self.cluster.remove_node(node, allow_graceful=False)
        return raylet.pid

    def replace(self, index: int) -> int:
        """`lose` a node, and start a new one in its place; the raylet's pid."""
        pid = self.lose(index)
        self.nodes.insert(index, self._add(**self.resources))
        return pid

    def lose_head(self) -> None:
        """SIGKILL all processes of the head, and with them the cluster's memory of itself."""
        head: Any = self.cluster.head_node
        for running in list(head.all_processes.values()):
            for info in running:
                kill(info.process, patience_s=0)
        head.kill_all_processes(check_alive=False, allow_graceful=False)

    def workers(self) -> list[psutil.Process]:
        """Processes that work for a run, on whatever node, in a fixed order of names."""
        found = []
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = _title(child)
                if title.startswith("ray::") and not NOT_OF_THE_RUN.match(title):
                    found.append((title, child.pid, child))
        return [child for *_, child in sorted(found, key=lambda f: f[:2])]

    def stop(self) -> None:
        self.cluster.shutdown()
        shutil.rmtree(self.temp, ignore_errors=True)


def _title(process: psutil.Process) -> str:
    return " ".join(process.cmdline()).strip()


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
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", path]
        root = os.geteuid() == 0
        self.mounted = root and subprocess.run(mount, capture_output=True).returncode == 0
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
        with open(os.path.join(self.path, BALLAST), "wb", buffering=0) as ballast:
            with contextlib.suppress(OSError):
                while ballast.write(bytes(1 << 16)):
                    pass
            return f"{ballast.tell() >> 20} MiB of ballast"

    def free(self) -> None:
        if self.mounted:
            Path(self.path, BALLAST).unlink(missing_ok=True)
        else:
            os.chmod(self.path, 0o700)

    def close(self) -> None:
        """Its contents go with it."""
        self.free()
        if self.mounted:
            subprocess.run(["umount", "--lazy", self.path], check=True)
        shutil.rmtree(self.path)


def newest_kept(root: str) -> object_store.Entry | None:
    """The newest finished checkpoint under ``root``, or what else a stage would resume from (`KEPT`)."""
    entries = list(object_store.listing(root))
    finished = _folders_with(artifacts.MANIFEST, root)
    for pattern in KEPT:
        found = [e for e in entries if re.search(pattern, e.uri)]
        if "checkpoints" in pattern:
            found = [e for e in found if os.path.dirname(e.uri) in finished]
        if found:
            return max(found, key=lambda e: (int(e.version), e.uri))
    return None


def tear(root: str) -> str | None:
    """Cut `newest_kept` short; its folder. None where there is nothing to cut."""
    if (kept := newest_kept(root)) is None:
        return None
    os.truncate(object_store.local_path(kept.uri), kept.size_bytes - min(100, kept.size_bytes // 2))
    return os.path.dirname(kept.uri)


def last_write(root: str, parts: Sequence[str] = ("",)) -> int:
    """When something was last written below ``parts`` of ``root``, in ns of the file system's clock."""
    entries = (e for part in parts for e in object_store.listing(object_store.join(root, part)))
    return max((int(e.version) for e in entries), default=0)


# --------------------------------------------------------------------------------------------------- the run


def command(stage: Stage, cfg: ChaosArgs, root: str, experiment: str) -> list[str]:
    """What a user would type, with ``python -m`` for the script."""
    words = [sys.executable, "-m", f"jobs.{stage}"]
    # Every command outlives any number of kills of workers: how often is not what is asked here.
    words += f"--workers {cfg.workers} --cpus-per-worker 1 --max-failures 1000".split()
    if stage == "predict":
        new = cfg.data or os.path.join(cfg.dir, "new", "imagesTr")
        return [*words, "--model", undisturbed_artifact(cfg, "finetune"), "--input", new, "--output", root]
    words += ["--recipe", cfg.recipe or "demo", "--data", cfg.data or os.path.join(cfg.dir, "scans")]
    words += ["--root", root, "--experiment", experiment]
    if stage == "finetune":
        words += ["--init", undisturbed_artifact(cfg, "pretrain")]
    if stage == "sweep":
        words += ["--space", os.path.join(cfg.dir, "grid.yaml")]
        words += ["--objective", "accuracy", "--no-stop-early", "--concurrent", "1"]
    own = () if cfg.recipe else SETTINGS[stage].split()
    for setting in (*own, *(cfg.finetune_set if stage == "finetune" else cfg.set)):
        words += ["--set", setting]
    return words


def undisturbed_artifact(cfg: ChaosArgs, stage: Stage) -> str:
    """What the undisturbed run of ``stage`` has made, for the next stage to start from."""
    folders = _folders_with(artifacts.MANIFEST, os.path.join(cfg.dir, stage, "undisturbed", stage))
    (uri,) = (a.uri for a in map(artifacts.find, folders) if a is not None and a.stage == stage)
    return uri


@dataclass
class Round:
    """A run of a stage's command from an empty folder to its end, over all kills.

    Attributes:
        statuses: of each time the command ended, the last one too; negative is a signal's number.
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
    """The result of a stage.

    Attributes:
        undisturbed_s: the same command without kills, on the same cluster.
    """

    stage: Stage
    kills: int
    undisturbed_s: float = 0.0
    rounds: list[Round] = field(default_factory=list)

    @classmethod
    def read(cls, cfg: ChaosArgs, stage: Stage) -> Result:
        """What there is of a stage."""
        kept = os.path.join(cfg.dir, f"{stage}.json")
        if object_store.exists(kept):
            return config.from_dict(cls, object_store.read_json(kept))
        return cls(stage, cfg.kills)

    @property
    def done(self) -> int:
        return sum(len(r.kills) for r in self.rounds)

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

    def __init__(self, cfg: ChaosArgs, ray: Raylets, mlflow: MLflowServer) -> None:
        self.cfg, self.ray, self.mlflow = cfg, ray, mlflow

    def start(self, stage: Stage, root: str) -> subprocess.Popen[bytes]:
        words = command(stage, self.cfg, root, f"chaos-{stage}-{os.path.basename(root)}")
        env = {**os.environ, "RAY_ADDRESS": self.ray.address}
        return launch(words, f"{self.cfg.dir}/{stage}.log", env=env)

    def undisturbed(self, stage: Stage) -> tuple[dict[str, str], float]:
        """Outcome and seconds of the command that nothing is done to; kept, and run only once."""
        root = os.path.join(self.cfg.dir, stage, "undisturbed")
        if not object_store.exists(f"{root}.json"):
            shutil.rmtree(root, ignore_errors=True)
            os.makedirs(root)
            say(f"{stage}: undisturbed")
            began = time.monotonic()
            process = self.start(stage, root)
            try:
                status = self._await_end(process, root)
            finally:
                kill(process)
            if status:
                log = f"{self.cfg.dir}/{stage}.log"
                raise UserError(f"{stage} fails without any kill (status {status}); see {log}")
            values = {"wall_s": time.monotonic() - began, "outcome": outcome(root)}
            object_store.write_json(f"{root}.json", values)
        values = object_store.read_json(f"{root}.json")
        return values["outcome"], values["wall_s"]

    def stage(self, stage: Stage) -> Result:
        """All kills of a stage, over as many runs of its command as they take; goes on where it was."""
        result = Result.read(self.cfg, stage)
        kills = plan(self.cfg.seed, stage, self.cfg.kills)
        for earlier in EARLIER.get(stage, ()):
            self.undisturbed(earlier)
        while result.done < result.kills:
            expected, result.undisturbed_s = self.undisturbed(stage)
            done = self.round(stage, kills[result.done :], len(result.rounds), expected)
            result.rounds.append(done)
            object_store.write_json(f"{self.cfg.dir}/{stage}.json", asdict(result))
            if not done.equal:
                break  # what differs lies in the run's folder, to be looked at
            if len(result.rounds) > 2 and not any(r.kills for r in result.rounds[-3:]):
                raise UserError(f"{stage} ends before it can be killed; give it more scans or epochs")
        return result

    def round(self, stage: Stage, kills: Sequence[Kill], number: int, expected: dict[str, str]) -> Round:
        """One run of the command from an empty folder, with as many of ``kills`` as find it at work."""
        root = os.path.join(self.cfg.dir, stage, f"run-{number}")
        disk = Disk(root)
        done, torn, waiting = Round(compared=len(expected)), set[str](), list(kills)
        began, ends = time.monotonic(), 0
        say(f"{stage}: run {number}, {len(waiting)} kills to go" + ("" if disk.mounted else ", no mount"))
        process = self.start(stage, root)
        try:
            while True:
                if not waiting:
                    self._await_end(process, root)
                elif self._await_moment(stage, process, root, waiting[0]):
                    if met := self._strike(waiting[0], process, root, disk, torn):
                        after_s = round(time.monotonic() - began, 2)
                        note = {**asdict(waiting.pop(0)), **met, "stage": stage, "seed": self.cfg.seed}
                        note |= {"run": number, "after_s": after_s, "unix_s": time.time()}
                        done.kills.append(note)
                        with open(f"{self.cfg.dir}/kills.jsonl", "a") as log:
                            log.write(json.dumps(note) + "\n")
                        say(f"  {note['index']:>3} {note['kind']:<10} {note['what']} (pid {note['pid']})")
                    ends = 0
                    done.unfit += damaged(root, torn)
                if process.poll() is None:
                    continue
                done.statuses.append(process.returncode)
                ends += 1
                if process.returncode in (0, HUNG) or ends > MOST_ENDS:
                    break
                say(f"{stage}: ended with status {process.returncode}; the same command again")
                process = self.start(stage, root)
            done.wall_s = time.monotonic() - began
            done.unfit += damaged(root, torn)
            found = {} if done.unfit else outcome(root)
            done.differing = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
        finally:
            kill(process)
            # The contents of a run that differs stay, to be looked at.
            (disk.free if done.wall_s and not done.equal else disk.close)()
        verdict = "equal" if done.equal else f"NOT EQUAL, ended with {done.statuses} ({HUNG}: it hung)"
        say(f"{stage}: run {number} {verdict}, {done.wall_s:.0f} s")
        return done

    def _await_moment(self, stage: Stage, process: subprocess.Popen[bytes], root: str, due: Kill) -> bool:
        """Wait for the moment of a kill; whether the command still ran then."""
        parts = PROGRESS.get(stage, (stage,))
        before = last_write(root, parts)
        if due.kind == "checkpoint":  # killed before there is one, a command would begin anew for ever
            self._await_end(process, root, lambda: newest_kept(root) is not None)
        if not due.any_moment:
            self._await_end(process, root, lambda: last_write(root, parts) != before)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=due.delay_s)
        return process.poll() is None

    def _strike(
        self, due: Kill, process: subprocess.Popen[bytes], root: str, disk: Disk, torn: set[str]
    ) -> dict[str, Any] | None:
        """Do it; what was met, or None where there was nothing to do it to."""
        pid = process.pid
        if due.kind == "worker":
            try:
                workers = self.ray.workers()
                victim = workers[int(due.victim * len(workers))]
                pid, what = victim.pid, _title(victim)
                victim.kill()
            except (IndexError, psutil.NoSuchProcess):
                return None
        elif due.kind == "driver":
            what = "driver"
            kill(process)
        elif due.kind == "raylet":
            node = int(due.victim * len(self.ray.nodes))
            pid, what = self.ray.replace(node), f"node {node}"
        elif due.kind == "mlflow":
            pid, what = self.mlflow.kill(), "MLflow server"
            time.sleep(due.away_s)
            self.mlflow.start()
        elif due.kind == "checkpoint":
            kill(process)
            # A worker that outlives its driver would write over what is torn.
            until = time.monotonic() + 60
            while self.ray.workers() and time.monotonic() < until:
                time.sleep(0.2)
            if (folder := tear(root)) is None:
                return None
            torn.add(folder)
            what = object_store.relative(folder, root)
        else:
            pid, what = 0, disk.fill()
            time.sleep(due.away_s)
            disk.free()
        return {"pid": pid, "what": what}

    def _await_end(
        self, process: subprocess.Popen[bytes], root: str, enough: Callable[[], bool] = lambda: False
    ) -> int | None:
        """Wait for the command's end, or until ``enough``; its status. One that has hung is killed."""
        last, since = last_write(root), time.monotonic()
        while process.poll() is None and not enough():
            if (now := last_write(root)) != last:
                last, since = now, time.monotonic()
            if time.monotonic() - since > self.cfg.limit_s:
                kill(process)
                process.returncode = HUNG
            time.sleep(0.1)
        return process.returncode


def run(cfg: ChaosArgs) -> list[Result]:
    """Every stage of ``cfg``, each with its kills; results lie in ``<dir>/<stage>.json`` as soon as there are any.

    Raises:
        UserError: settings that cannot work, ``dir`` is of others, or a stage fails without any kill.
    """
    check(cfg)
    cfg = replace(cfg, dir=os.path.abspath(cfg.dir))
    os.makedirs(cfg.dir, exist_ok=True)
    _claim(cfg, os.path.join(cfg.dir, "settings.json"))
    stages = [stage for stage in STAGES if stage in cfg.stages]
    results = [Result.read(cfg, stage) for stage in stages]
    if all(r.done >= r.kills for r in results):
        return results
    for name, count, seed, size in PHANTOMS if not cfg.data else ():
        at = os.path.join(cfg.dir, name)
        if not object_store.exists(os.path.join(at, "dataset.json")):
            phantom.write_dataset(at, count, seed=seed, size_vox=(size, size, size))
    object_store.write(os.path.join(cfg.dir, "grid.yaml"), SPACE.encode())
    with contextlib.ExitStack() as stack:
        # Whatever ends this process in order ends what it has started.
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)))
        mlflow = MLflowServer(cfg.dir)
        env = clean_environment(LOGONET_HOME=os.path.join(cfg.dir, "home"), MLFLOW_TRACKING_URI=mlflow.uri)
        stack.enter_context(mock.patch.dict(os.environ, env, clear=True))
        mlflow.start()
        stack.callback(mlflow.kill)
        ray = Raylets(cfg.nodes)
        stack.callback(ray.stop)
        say(f"a Ray cluster of {cfg.nodes + 1} raylets at {ray.address}, MLflow at {mlflow.uri}")
        chaos = Chaos(cfg, ray, mlflow)
        return [chaos.stage(stage) for stage in stages]


def print_table(results: Sequence[Result]) -> None:
    """One row a stage; the last line is JSON."""
    rows = [r.row() for r in results]
    print(pd.DataFrame(rows).rename(columns=lambda name: name.replace("_", " ")).to_string(index=False))
    for result in results:
        for number, done in enumerate(result.rounds):
            for what, names in (("differs", done.differing), ("half-written", done.unfit)):
                for name in names:
                    print(f"{result.stage}, run {number}: {what}: {name}")
    print(json.dumps(rows))


def check(cfg: ChaosArgs) -> None:
    """UserError for settings that cannot work."""
    if cfg.kills < 1 or cfg.nodes < 2 or cfg.workers < 1:
        raise UserError("--kills and --workers must be at least 1, and --nodes at least 2")
    for stage in cfg.stages:
        if stage not in STAGES:
            raise UserError(config.unknown("stage", stage, STAGES))
    if cfg.workers > 2 * (cfg.nodes - 1):
        enough = -(-cfg.workers // 2) + 1
        raise UserError(
            f"{cfg.workers} workers do not fit while one of {cfg.nodes} nodes is away; use --nodes {enough}"
        )


def _claim(cfg: ChaosArgs, uri: str) -> None:
    """Write down whose results these are, or refuse where those of other settings lie."""
    own = {k: v for k, v in config.to_dict(cfg).items() if k not in ("dir", "stages", "limit_s")}
    if not object_store.exists(uri):
        object_store.write_json(uri, own)
    elif (there := object_store.read_json(uri)) != own:
        differing = ", ".join(k for k in own if own[k] != there.get(k))
        raise UserError(f"{cfg.dir} holds kills with other settings ({differing}); give another --dir")
