"""A drill: machines with GPUs come and go, the head dies, and a pretraining ends as if nothing had happened.

    make drill

On this machine: a real Ray cluster of a head and two raylets that claim two GPUs each (`tools.fake_gpus`), a real S3
server and a real MLflow server. One machine is lost without a word, another comes late, gets a spot notice and goes;
then the head is lost and with it the cluster. The same command goes on with the same bucket on a new cluster, as
KubeRay makes a job again. What is left is compared with runs of a fixed number of workers to which nothing happened,
and one page shows what happened when.
"""

from __future__ import annotations

import contextlib
import html
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pandas as pd
import psutil
import safetensors.numpy
import tyro

from logonet import cli, reporting
from logonet.core.errors import UserError
from logonet.data import phantom
from logonet.reporting import drawing
from logonet.storage import artifacts, object_store
from logonet.storage.artifacts import Artifact
from tools.chaos import Raylets, clean_environment, timeless
from tools.mlflow_server import MLflowServer
from tools.processes import kill, launch
from tools.s3server import S3Server

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NODE_CPUS, NODE_GPUS = 4, 2
NOTICE_S = 60  # AWS gives 120
LIMIT_S = 400.0  # for any one thing to happen
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
AWS = "/latest/meta-data/spot/instance-action"
COLOURS = {1: drawing.GREY, 2: drawing.ORANGE, 3: drawing.SKY, 4: drawing.BLUE}


def pretraining(scans: str, experiment: str, epochs: int) -> list[str]:
    """The words of a short pretraining of ``epochs`` of ten steps, after the interpreter."""
    settings = [
        "split=null",
        "crops.per_scan=3",
        f"train.epochs={epochs}",
        "train.steps_per_epoch=10",
        "train.global_batch=10",  # five batches, which 2 and 4 workers share unequally
        "train.batch_size=2",
        "train.lr=1e-4",  # AdamW begins with signs of gradients: at 1e-3 rounding makes 1 % by epoch 3
        "train.warmup_epochs=1",
        "train.checkpoint_every_steps=2",
        "train.keep_checkpoints=1000",
    ]
    words = ["jobs/pretrain.py", "--recipe", "demo", "--data", scans, "--experiment", experiment]
    return [*words, *(word for setting in settings for word in ("--set", setting))]


class Run:
    """A pretraining in a process of its own; started again it goes on.

    Args:
        root: folder or s3:// prefix of its artifacts.
        log: file that its output is appended to.
        job: the words of the command, after the interpreter.
    """

    def __init__(self, root: str, log: str, *job: str, address: str | None = None) -> None:
        self.root, self.log = root, Path(log)
        self.before = self.log.stat().st_size if self.log.exists() else 0
        self.stored: dict[int, tuple[float, Artifact]] = {}
        words = [sys.executable, *job, "--root", root, "--object-store-mb", "300"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        env.pop("RAY_ADDRESS", None)
        if address is not None:
            env |= {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
        self.process = launch(words, log, env=env, cwd=str(Path(__file__).parents[1]))

    def said(self) -> str:
        return self.log.read_bytes()[self.before :].decode(errors="replace")

    def wait_for(self, found: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
        """The first true answer of ``found``.

        Raises:
            UserError: the run ended before, or it took too long.
        """
        until = time.monotonic() + limit_s
        while not (value := found()):
            if self.process.poll() is not None:
                raise UserError(
                    f"the run ended (status {self.process.returncode}) before {what}; see {self.log}"
                )
            if time.monotonic() > until:
                raise UserError(f"{what}: not within {limit_s:.0f} s; see {self.log}")
            time.sleep(0.2)
        return value

    def checkpoints(self) -> dict[int, tuple[float, Artifact]]:
        """Step -> when it was written, and the checkpoint."""
        parts = "/checkpoints/step-", f"/{artifacts.MANIFEST}"
        for entry in object_store.listing(object_store.join(self.root, "pretrain")):
            if parts[0] not in entry.uri or not entry.uri.endswith(parts[1]):
                continue
            step = int(entry.uri.removesuffix(parts[1]).rpartition("-")[2])
            if step not in self.stored and (made := artifacts.find(entry.uri.removesuffix(parts[1]))):
                self.stored[step] = datetime.fromisoformat(made.created_at).timestamp(), made
        return self.stored

    def worlds(self) -> dict[int, int]:
        """Step -> how many workers wrote its checkpoint."""
        return {step: made.facts["world"] for step, (_, made) in sorted(self.checkpoints().items())}

    def world_reached(self, world: int, after: int = 0) -> int | None:
        """The first step after ``after`` that ``world`` workers have stored."""
        return next((step for step, ranks in self.worlds().items() if ranks == world and step > after), None)

    def history(self) -> list[dict[str, Any]]:
        """Of the newest checkpoint, without what depends on the machine."""
        found = self.checkpoints()
        return timeless(found[max(found)][1].facts["history"]) if found else []

    def weights(self, step: int) -> dict[str, np.ndarray]:
        """Of the model after ``step``, without batch norm's running statistics, which are those of one worker."""
        found = safetensors.numpy.load(self.checkpoints()[step][1].read("model.safetensors"))
        return {k: v for k, v in found.items() if not k.endswith(STATISTICS)}

    def workers(self) -> list[psutil.Process]:
        """Training workers of a Ray that the run has started itself."""
        mine = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in mine if "RayTrainWorker" in " ".join(p.cmdline())]

    def end(self, limit_s: float = 1200.0) -> None:
        """Wait for the end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(limit_s)
        if self.process.poll() != 0:
            raise UserError(f"the run did not end well (status {self.process.returncode}); see {self.log}")

    def stop(self) -> int:
        """SIGTERM to the driver; returns the step that it left after."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=300) == 128 + signal.SIGTERM, self.said()[-4000:]
        step = int(self.said().split("stopped after step ")[-1].split(",")[0])
        assert step == max(self.worlds())
        return step

    def kill(self) -> None:
        """Whatever is left of it."""
        if self.process.poll() is None:
            kill(self.process)


@contextlib.contextmanager
def metadata(pages: dict[str, str], cloud: str) -> Iterator[str]:
    """A cloud's metadata service with ``pages``, which may change; it refuses what lacks the cloud's own header."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            asked = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self.answer("token" if cloud == "aws" and asked else None)

        def do_GET(self) -> None:
            own = {
                "aws": ("X-aws-ec2-metadata-token", "token"),
                "gcp": ("Metadata-Flavor", "Google"),
                "": ("Host", ""),
            }
            header, value = own[cloud]
            self.answer(pages.get(self.path) if self.headers[header] == value else None)

        def answer(self, text: str | None) -> None:
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def aws_page(unix_s: float) -> str:
    """What AWS says of a spot machine that goes at ``unix_s``."""
    at = datetime.fromtimestamp(unix_s, UTC)
    return json.dumps({"action": "terminate", "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"})


# ------------------------------------------------------------------------------------------------- what happens


@dataclass
class Event:
    """One thing that was done, and what became of the run.

    Attributes:
        what: in words.
        unix_s: when.
        stored: the newest step in the bucket at that time.
        resumed: the step that the run went on from.
        back_s: seconds until workers of the new number had stored a step.
        workers: how many there were then.
    """

    what: str
    unix_s: float
    stored: int
    resumed: int = 0
    back_s: float = 0.0
    workers: int = 0


@dataclass
class Drill:
    """A run, the cluster that it is on, and what has happened so far."""

    run: Run
    ray: Raylets
    events: list[Event] = field(default_factory=list)

    def happens(self, what: str) -> None:
        self.events.append(Event(what, time.time(), max(self.run.worlds(), default=0)))
        print(f"{what} (step {self.events[-1].stored:,} is stored)", flush=True)

    def goes_on(self, workers: int, after: int) -> int:
        """Wait for ``workers`` to store a step after step ``after``; it."""
        step = self.run.wait_for(
            lambda: self.run.world_reached(workers, after), f"{workers} workers stored a step"
        )
        event = self.events[-1]
        event.back_s, event.workers = time.time() - event.unix_s, workers
        # Of all steps that the run says it resumed from, the last before this one.
        said = self.run.said().split("resumed after step ")[1:]
        event.resumed = max(
            (n for n in (int(s.split()[0].replace(",", "")) for s in said) if n < step), default=0
        )
        print(f"  {workers} workers store step {step:,} {event.back_s:.0f} s later", flush=True)
        return step


def machines(drill: Drill) -> None:
    """Machines go and come: 4 workers become 2, 4 and 2."""
    run, ray = drill.run, drill.ray
    four = run.wait_for(lambda: run.world_reached(4), "4 workers stored a step")
    drill.happens("a machine is lost without a word")
    ray.lose(1)
    two = drill.goes_on(2, four)
    drill.happens("a machine comes")
    late = ray.add()
    drill.goes_on(4, two)
    drill.happens(f"the late machine gets a spot notice of {NOTICE_S} s")
    spot_notice(late.node_id, ray.address)
    drill.run.wait_for(lambda: "workers were asked to go" in run.said(), "the workers were asked to go")
    left = max(step for step, world in run.worlds().items() if world == 4)
    ray.lose(1)
    drill.goes_on(2, left)


def spot_notice(node_id: str, address: str) -> None:
    """As on AWS: a page of the machine's metadata service, and the watch that the deploy files start; until it goes."""
    logonet, pages = str(Path(sys.executable).parent / "logonet"), dict[str, str]()
    with metadata(pages, "aws") as base:
        command = [logonet, "spot-watch", "--metadata", base, "--node-id", node_id]
        env = {**os.environ, "RAY_ADDRESS": address}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as watch:
            assert watch.stdout is not None
            assert "watching" in watch.stdout.readline()
            goes = time.time() + NOTICE_S
            pages[AWS] = aws_page(goes)
            assert watch.wait(timeout=NOTICE_S) == 0
    time.sleep(max(0.0, goes - time.time()))


# -------------------------------------------------------------------------------------------------- what is left


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The distance of two networks' weights, relative to their length."""
    assert one.keys() == other.keys()
    ours, theirs = (np.concatenate([w[k].ravel() for k in one], dtype=np.float64) for w in (one, other))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(ours))


def losses_apart(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> list[float]:
    """How far the epochs' losses are apart, relatively.

    Raises:
        UserError: samples, masks or learning rates are not the same.
    """
    for key, exact in (("step", True), ("lr", True), ("masked_share", False), ("accuracy_floor", False)):
        ours, theirs = ([e[key] for e in history] for history in (found, expected))
        if not (ours == theirs if exact else np.allclose(ours, theirs, rtol=1e-12, atol=0)):
            raise UserError(f"the runs differ in {key}: {ours} and {theirs}")
    return [abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, expected)]


def beginning(events: Sequence[Event]) -> float:
    """Where the page's time begins, somewhat before the first thing that happened."""
    return events[0].unix_s - 30


@drawing.picture
def picture(run: Run, events: Sequence[Event]) -> Figure:
    """Steps over time, coloured by the number of workers, and what happened."""
    began = beginning(events)
    points = sorted((at, step, made.facts["world"]) for step, (at, made) in run.checkpoints().items())
    fig = drawing.figure(
        9, 4, "What happened when", "A point is a stored checkpoint; a grey line is a thing done."
    )
    axes = fig.subplots()
    for workers in sorted({world for *_, world in points}):
        own = [(at - began, step) for at, step, world in points if world == workers]
        label = f"{workers} workers"
        axes.plot(*zip(*own), "o", color=COLOURS.get(workers, drawing.INK), markersize=3, label=label)
    for number, event in enumerate(events, 1):
        axes.axvline(event.unix_s - began, color=drawing.RULE)
        axes.annotate(
            str(number),
            (event.unix_s - began, 1),
            xycoords=("data", "axes fraction"),
            xytext=(2, -8),
            textcoords="offset points",
            color=drawing.GREY,
        )
    axes.set(xlabel="seconds", ylabel="step")
    axes.legend(loc="lower right")
    return fig


def page(run: Run, events: Sequence[Event], facts: dict[str, Any], typed: str) -> str:
    """What happened when, as one HTML page."""
    began = beginning(events)
    table = pd.DataFrame(
        [
            {
                "": number,
                "what": event.what,
                "second": round(event.unix_s - began),
                "newest step then": event.stored,
                "went on from": event.resumed,
                "workers then": event.workers,
                "back after s": round(event.back_s),
            }
            for number, event in enumerate(events, 1)
        ]
    )
    compared = pd.DataFrame({"what": list(facts), "value": [str(v) for v in facts.values()]})
    sections: list[tuple[str, Any]] = [
        ("What was run", f"<pre>{html.escape(typed)}</pre>"),
        ("What happened when", picture(run, events)),
        ("Each thing", table),
        ("Compared with runs to which nothing happened", compared),
    ]
    return reporting.run_page("A drill: machines come and go, and the head is lost", sections)


# ------------------------------------------------------------------------------------------------------ the drill


@dataclass
class Outcome:
    """What has happened, and how far what is left is from that of runs to which nothing happened."""

    events: list[Event]
    compared: dict[str, Any]


def drill(folder: str, epochs: int) -> Outcome:
    """Run the drill; logs, the bucket and the page are left in ``folder``, whose former contents are deleted.

    Raises:
        UserError: the run did not go on as it should, or did not end where the undisturbed ones do.
    """
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    scans = phantom.write_dataset(os.path.join(folder, "scans"), 4, size_vox=(40, 40, 40))
    job = pretraining(scans, "drill", epochs)
    elastic = ["-m", "tools.fake_gpus", *job, "--workers", "2:4", "--gpu", "True", "--resize-every-s", "10"]
    with contextlib.ExitStack() as stack:
        mlflow = MLflowServer(folder)
        env = clean_environment(LOGONET_HOME=os.path.join(folder, "home"), MLFLOW_TRACKING_URI=mlflow.uri)
        # Otherwise 15, and the times would be those of whatever else runs here.
        env["RAY_worker_niceness"] = "0"
        stack.enter_context(mock.patch.dict(os.environ, env, clear=True))
        mlflow.start()
        stack.callback(mlflow.kill)
        server = stack.enter_context(S3Server(os.path.join(folder, "s3")))
        os.environ.update(server.env())
        object_store.create_bucket("s3://drill")

        def cluster() -> Raylets:
            ray = Raylets(2, head_cpus=0, num_cpus=NODE_CPUS, num_gpus=NODE_GPUS)
            stack.callback(ray.stop)
            return ray

        def start(ray: Raylets) -> Run:
            run = Run("s3://drill/runs", os.path.join(folder, "drill.log"), *elastic, address=ray.address)
            stack.callback(run.kill)
            return run

        ray = cluster()
        under_way = Drill(start(ray), ray)
        machines(under_way)
        under_way.happens("the head is lost, and with it the cluster and the job; both are made again")
        left = under_way.events[-1].stored
        ray.lose_head()
        under_way.run.kill()
        ray = cluster()
        run = under_way.run = start(ray)
        under_way.goes_on(4, left)
        run.end()
        ray.stop()
        # What rounding alone makes of training: a number of workers that never changes, and another.
        compared = _compare(run, *(undisturbed(folder, workers, job) for workers in (2, 4)))
        typed = " ".join(["python", *elastic, "--root", run.root]).replace(f"{folder}/", "")
        events = under_way.events
        object_store.write(os.path.join(folder, "index.html"), page(run, events, compared, typed).encode())
        object_store.write(os.path.join(folder, "timeline.png"), picture(run, events))
    return Outcome(events, compared)


def main(dir: str = "drill-run", epochs: int = 10) -> None:
    """Run the drill on this machine.

    Args:
        dir: keeps logs, the S3 server's data, MLflow's database and the page.
        epochs: of ten steps.
    """
    folder = os.path.abspath(dir)
    for what, value in drill(folder, epochs).compared.items():
        print(f"{what}: {value}")
    print(os.path.join(folder, "index.html"))


def undisturbed(folder: str, workers: int, job: Sequence[str]) -> Run:
    """The same training on a Ray of its own, to which nothing happens."""
    print(f"{workers} workers, to which nothing happens", flush=True)
    root = os.path.join(folder, f"undisturbed-{workers}")
    run = Run(root, f"{root}.log", *job, "--workers", str(workers))
    try:
        run.end()
    finally:
        run.kill()
    return run


def _compare(run: Run, two: Run, four: Run) -> dict[str, Any]:
    """How far the run's losses and last weights are from those of 2 workers, and those of 4 from those of 2.

    Raises:
        UserError: they are further apart than rounding explains.
    """
    last = max(two.worlds())
    losses, rounding = (losses_apart(other.history(), two.history()) for other in (run, four))
    weights, control = (apart(other.weights(last), two.weights(last)) for other in (run, four))
    facts = {
        "steps": last,
        "changes of the number of workers": sum(a != b for a, b in itertools.pairwise(run.worlds().values())),
        "masks, samples and learning rates": "equal",
        "loss of the first epoch, relative difference to 2 workers": f"{losses[0]:.1e}",
        "loss of any epoch, at most": f"{max(losses):.1e}",
        "the same of 4 workers that never changed": f"{max(rounding):.1e}",
        "last weights, relative distance to those of 2 workers": f"{weights:.1e}",
        "the same of 4 workers that never changed ": f"{control:.1e}",
    }
    # A sample counted twice or a gradient weighed wrongly shows in the first epoch; rounding grows as training goes on,
    # and an order of magnitude between two such runs is usual.
    if losses[0] > 1e-4 or max(losses) > 30 * max(rounding) or weights > 30 * control:
        raise UserError(f"the run is not the undisturbed one: {facts}")
    return facts


if __name__ == "__main__":
    with cli.sentences():
        tyro.cli(main, prog="tools/drill.py")
