"""LoGoNet's Table 1 beside ours, and what the table leaves out: time and memory.

    python benchmarks/table1.py                          # about half an hour on two quiet cores
    python benchmarks/table1.py --no-time                # the counts alone, a minute
    python benchmarks/table1.py --only SwinUNETR LoGoNet

Counts: one crop of 96^3, one channel, 14 classes, in evaluation. "thop" is what the paper prints as FLOPs:
multiply-accumulates as the thop package counts them, cut off after two decimals (parameters are rounded). "true" is
half of torch's FlopCounterMode: convolutions and matrix products at what they cost, normalisations left out.

Times: each network in a process of its own, one after another, the least of the repeats, at the same crop. In
evaluation batch norms are folded into convolutions where a network has them in a row, as a loaded model runs. A
training step is the forward pass in training mode, the mean square of every output, the backward pass and AdamW.
SwinUNETR is measured at the beginning and at the end; others are set against the mean of both. LoGoNet and the
SwinUNETR of the beginning take turns, call by call, and are set against each other. In parentheses the same of
processor time, which a machine that does other work too distorts less.

Peak memory is resident memory (on a GPU: allocated memory) at its highest less that once the network and the crop
are built: activations and, in a step, gradients and AdamW's moments, but not the weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import psutil
import torch
from _measure import machine, markdown, peak_bytes, reset_peak, resident_bytes, sentence
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from logonet import networks
from logonet.inference.model import folded

SIDE, IN_CHANNELS, CLASSES = 96, 1, 14
REFERENCE, IN_TURNS = "SwinUNETR", "LoGoNet"
TOO_BIG = "does not fit in"
LONG_S = 60.0  # what takes longer is not repeated


# ---- the networks --------------------------------------------------------------------------------


class Printed(NamedTuple):
    """A column of the paper's Table 1, as it stands there."""

    params_m: str
    gmacs: str


@dataclass(frozen=True)
class Network:
    """A row.

    Attributes:
        plain: options that change no number but make every layer one that thop knows.
        profiled: the network whose thop count the paper must have printed, where it is not ours.
        note: what a reader of the row should know; says why where the paper's numbers are not reproduced.
    """

    backbone: str
    options: dict[str, Any] = field(default_factory=dict)
    paper: Printed | None = None
    plain: dict[str, Any] = field(default_factory=dict)
    profiled: Callable[[], nn.Module] | None = None
    note: str = ""

    def build(self, **more: Any) -> Any:
        return networks.build(self.backbone, IN_CHANNELS, CLASSES, **self.options, **more)


def monai_nnunet() -> nn.Module:
    from monai.networks.nets import DynUNet

    from logonet.networks.dynunet import Config

    cfg = Config()
    return DynUNet(
        3, IN_CHANNELS, CLASSES, cfg.kernel_size, cfg.strides, cfg.strides[1:], norm_name="instance"
    )


LKA: dict[str, Any] = {"lka": "plain"}
CONTIGUOUS: dict[str, Any] = {"channels_last": False}
NETWORKS: dict[str, Network] = {
    "SegResNetVAE": Network("segresnetvae", paper=Printed("3.9", "15.50")),
    "SwinUNETR": Network("swinunetr", paper=Printed("62.2", "329.84")),
    "UNETR": Network(
        "unetr",
        paper=Printed("101.7", "264.59"),
        note="the paper rounds the other networks' parameters and cuts off this one's. MONAI's has 18,432 more, "
        "in a normalisation of each transformer layer (norm_cross_attn) that nothing reads.",
    ),
    "UNet++": Network(
        "unetpp",
        paper=Printed("84.6", "4229.20"),
        note="not reproduced: no six widths of MONAI's BasicUNetPlusPlus are known that give the paper's two numbers. "
        "What is counted and measured here are MONAI's default widths, a much smaller network.",
    ),
    "nnU-Net": Network(
        "dynunet",
        paper=Printed("30.7", "1250.65"),
        profiled=monai_nnunet,
        note="the paper's multiply-accumulates are four times too many. MONAI registers every block but the last at "
        "two places of its module tree (once in the list of skip layers); thop counts at both, for both.",
    ),
    "DiNTS Search": Network(
        "dints",
        {"search": True},
        paper=Printed("74.1", "743.88"),
        note="the whole search space with every path in use, as is DiNTS Instance.",
    ),
    "DiNTS Instance": Network("dints", paper=Printed("74.1", "743.88")),
    "Attention U-Net": Network("attention_unet", paper=Printed("64.1", "7984.21")),
    "LoGoNet": Network(
        "logonet",
        paper=Printed("67.5", "246.96"),
        plain=LKA,
        note="not reproduced to the last digit: the paper leaves strides, decoder widths and some kernels open, and no "
        "natural reading of it gives both numbers. Ours is the most literal that comes within half a percent.",
    ),
    "LoGoNet Large": Network("logonet", {"variant": "large"}, plain=LKA),
    "ULKANet": Network("ulkanet", plain=LKA),
    "ULKANet Large": Network("ulkanet", {"variant": "large"}, plain=LKA),
    "3D UX-Net": Network("uxnet3d", plain=CONTIGUOUS),
    "3D UX-Net optimised": Network("uxnet3d", {"variant": "optimised"}, plain=CONTIGUOUS),
    "nnFormer": Network("nnformer", {"img_size": (SIDE,) * 3}),
    "PCRLv2": Network("pcrlv2", plain=CONTIGUOUS),
    "PCRLv2 with skips": Network("pcrlv2", {"skips": True}, plain=CONTIGUOUS),
    "SegResNet": Network("segresnet"),
    "ResEnc-L": Network("resenc"),
    "U-Net": Network("unet"),
}


# ---- counts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    params: int
    thop_macs: int
    true_macs: int
    profiled_macs: int  # thop's, of the network that the paper profiled


def count(network: Network) -> Counts:
    """Needs shapes only, hence the meta device."""
    with torch.device("meta"):
        net = network.build(**network.plain).eval()
        profiled = network.profiled() if network.profiled else None
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        net(torch.empty(1, IN_CHANNELS, *(SIDE,) * 3, device="meta"))
    params = sum(p.numel() for p in net.parameters())
    thop_macs = thop_count(net)
    profiled_macs = thop_macs if profiled is None else thop_count(profiled)
    return Counts(params, thop_macs, flops.get_total_flops() // 2, profiled_macs)


def thop_count(net: nn.Module) -> int:
    import thop

    x = torch.empty(1, IN_CHANNELS, *(SIDE,) * 3, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an API of its own is deprecated
        return int(thop.profile(net.eval(), (x,), verbose=False)[0])


def cut(number: int, unit: int, decimals: int) -> str:
    """In ``unit``, cut off rather than rounded; in whole numbers, for a float may fall below its own digits."""
    hundredths = number * 10**decimals // unit
    return f"{hundredths // 10**decimals}.{hundredths % 10**decimals:0{decimals}d}"


def verdict(counts: Counts, paper: Printed) -> str:
    """Whether our counts, printed as the paper prints, are the paper's digits."""
    if cut(counts.profiled_macs, 10**9, 2) != paper.gmacs:
        return "no"
    if f"{counts.params / 1e6:.1f}" == paper.params_m:
        return "yes"
    return "yes, M cut off" if cut(counts.params, 10**6, 1) == paper.params_m else "no"


def counts_table(counts: dict[str, Counts]) -> str:
    columns = ["network", "paper M", "ours M", "paper G", "ours G (thop)", "true G", "reproduced"]
    rows = []
    for name, c in counts.items():
        paper = NETWORKS[name].paper
        gmacs = cut(c.profiled_macs, 10**9, 2)
        if c.profiled_macs != c.thop_macs:
            gmacs += f" (MONAI's module; {cut(c.thop_macs, 10**9, 2)} counted once)"
        said = verdict(c, paper) if paper else ""
        if paper and said == "no":
            off_m = 100 * (c.params / 1e6 / float(paper.params_m) - 1)
            off_g = 100 * (c.profiled_macs / 1e9 / float(paper.gmacs) - 1)
            said = f"no: {off_m:+.1f} % M, {off_g:+.1f} % G"
        printed = paper or Printed("", "")
        params_m = f"{c.params / 1e6:.3f}"
        rows.append(
            [name, printed.params_m, params_m, printed.gmacs, gmacs, f"{c.true_macs / 1e9:.2f}", said]
        )
    return markdown(columns, rows)


# ---- time and memory -----------------------------------------------------------------------------


@dataclass
class Run:
    wall_s: float
    cpu_s: float
    peak_mb: float


class Failed(str):
    """In place of a Run: why there is none."""


class Worker:
    """A process that holds one network and runs it when told to."""

    def __init__(self, name: str, device: str, memory_gib: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.conn, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, device, memory_gib), daemon=True)
        self.process.start()
        theirs.close()
        self.name = name
        self.state = self._answer()

    def run(self, what: str) -> Run | Failed:
        """After a failure all further runs fail alike."""
        if not isinstance(self.state, Failed):
            self.conn.send(what)
            self.state = self._answer()
        return self.state

    def _answer(self) -> Any:
        try:
            return self.conn.recv()
        except EOFError:
            self.process.join()
            return Failed(f"ended with status {self.process.exitcode}")

    def close(self) -> None:
        self.conn.close()
        self.process.join()


def serve(conn: Connection, name: str, device: str, memory_gib: float) -> None:
    """The worker's own main: builds, then answers each word with a Run, or with Failed when memory ran out."""
    if device == "cpu":
        # Past this an allocation fails instead of the machine. It counts what is asked for, not what is touched.
        limit_bytes = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    try:
        torch.manual_seed(0)
        net = NETWORKS[name].build().to(device)
        nets = {"forward": folded(net), "step": net}
        x = torch.rand(1, IN_CHANNELS, *(SIDE,) * 3).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
        held_bytes = held(device)
        conn.send("ready")
        while True:
            what = conn.recv()
            call = {"forward": forward, "step": step}[what]
            conn.send(measured(partial(call, nets[what], optimizer, x), device, held_bytes))
    except EOFError:  # told to end
        return
    except (MemoryError, RuntimeError) as err:
        if not ran_out(err):
            raise
        conn.send(Failed(f"{TOO_BIG} {memory_gib:.1f} GiB"))


def ran_out(err: Exception) -> bool:
    """torch's allocator, CUDA's, and oneDNN's scratch memory each have their own words."""
    if isinstance(err, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(err) for words in ("can't allocate memory", "could not create", "bad_alloc"))


def forward(net: Any, optimizer: Any, x: Tensor) -> None:
    net.eval()
    with torch.no_grad():
        net(x)


def step(net: Any, optimizer: Any, x: Tensor) -> None:
    net.train()
    optimizer.zero_grad()
    out = net(x)
    loss = torch.stack([logits.square().mean() for logits in (out.logits, *out.deep)]).sum()
    if out.aux_loss is not None:
        loss = loss + out.aux_loss.square()
    del out
    loss.backward()
    optimizer.step()


def measured(call: Callable[[], None], device: str, held_bytes: int) -> Run:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes()
    return Run(wall_s, cpu_s, (peak - held_bytes) / 1e6)


def held(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else resident_bytes()


Best = dict[str, Run | Failed]  # of "forward" and "step"


def in_turns(names: Sequence[str], args: argparse.Namespace) -> dict[str, Best]:
    """Each network's best forward pass and step; with several networks they take turns, call by call."""
    workers = [Worker(name, args.device, args.memory_gib) for name in names]
    best: dict[str, Best] = {name: {} for name in names}
    for what, repeats in zip(("forward", "step"), args.repeats):
        runs: dict[str, list[Run | Failed]] = {name: [] for name in names}
        for _ in range(repeats):
            for worker in workers:
                so_far = runs[worker.name]
                if not (so_far and (isinstance(so_far[-1], Failed) or so_far[-1].wall_s > LONG_S)):
                    so_far.append(worker.run(what))
        for name in names:
            best[name][what] = least(runs[name])
            print(f"{name}, {what}: {best[name][what]}", file=sys.stderr, flush=True)
    for worker in workers:
        worker.close()
    return best


def least(runs: Sequence[Run | Failed]) -> Run | Failed:
    """The least times and the highest peak."""
    fit = [run for run in runs if isinstance(run, Run)]
    if len(fit) < len(runs):
        return next(run for run in runs if isinstance(run, Failed))
    return Run(min(r.wall_s for r in fit), min(r.cpu_s for r in fit), max(r.peak_mb for r in fit))


def mean(a: Run | Failed, b: Run | Failed) -> Run | Failed:
    if isinstance(a, Run) and isinstance(b, Run):
        return Run((a.wall_s + b.wall_s) / 2, (a.cpu_s + b.cpu_s) / 2, max(a.peak_mb, b.peak_mb))
    return a if isinstance(a, Failed) else b


@dataclass
class Measured:
    """All networks' best runs, and SwinUNETR's at the beginning and at the end."""

    best: dict[str, Best]
    start: Best | None = None
    end: Best | None = None

    def reference(self, name: str, what: str) -> Run | Failed:
        if self.start is None or self.end is None:
            return Failed(f"{REFERENCE} was not asked for")
        if name == IN_TURNS:
            return self.start[what]
        return mean(self.start[what], self.end[what])

    def drift(self, what: str) -> float | None:
        a, b = (best[what] if best else None for best in (self.start, self.end))
        return b.wall_s / a.wall_s - 1 if isinstance(a, Run) and isinstance(b, Run) else None


def measure(names: Sequence[str], args: argparse.Namespace) -> Measured:
    first = [name for name in (REFERENCE, IN_TURNS) if name in names]
    best = in_turns(first, args) if first else {}
    start = best.get(REFERENCE)
    for name in names:
        if name not in first:
            best |= in_turns([name], args)
    if start is None:
        return Measured(best)
    end = in_turns([REFERENCE], args)[REFERENCE]
    best[REFERENCE] = {what: mean(start[what], end[what]) for what in start}
    return Measured(best, start, end)


def times_row(name: str, measured: Measured) -> dict[str, Any]:
    """The keys of a row's JSON that come from the clock; null where there is nothing, and why."""
    row: dict[str, Any] = {}
    for what, prefix in (("forward", "forward"), ("step", "train_step")):
        run, reference = measured.best[name][what], measured.reference(name, what)
        row[f"{what}_failed"] = run if isinstance(run, Failed) else None
        done = run if isinstance(run, Run) else None
        both = (done, reference) if done and isinstance(reference, Run) else None
        row[f"{prefix}_s"] = done and done.wall_s
        row[f"{prefix}_cpu_s"] = done and done.cpu_s
        row[f"{what}_peak_mb"] = done and done.peak_mb
        row[f"{what}_ratio"] = both and both[0].wall_s / both[1].wall_s
        row[f"{what}_cpu_ratio"] = both and both[0].cpu_s / both[1].cpu_s
    row["peak_mb"] = row["step_peak_mb"]
    return row


def times_table(rows: list[dict[str, Any]]) -> str:
    columns = ["network"]
    for what in ("forward", "step"):
        columns += [f"{what} s", f"of {REFERENCE}'s", f"{what} peak MB"]
    lines = []
    for row in rows:
        line = [row["name"]]
        for what, prefix in (("forward", "forward"), ("step", "train_step")):
            if row[f"{what}_failed"]:
                line += [row[f"{what}_failed"], "-", "-"]
                continue
            ratio, cpu_ratio = row[f"{what}_ratio"], row[f"{what}_cpu_ratio"]
            said = "-" if ratio is None else f"{ratio:.2f} ({cpu_ratio:.2f})"
            line += [f"{row[f'{prefix}_s']:.2f}", said, f"{row[f'{what}_peak_mb']:.0f}"]
        lines.append(line)
    return markdown(columns, lines)


# ---- the command ---------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=", ".join(NETWORKS)
    )
    parser.add_argument("--only", nargs="+", choices=NETWORKS, metavar="NAME", default=list(NETWORKS))
    parser.add_argument("--no-time", action="store_true", help="the counts alone")
    parser.add_argument("--repeats", nargs=2, type=int, default=(3, 2), metavar=("FORWARD", "STEP"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--memory-gib", type=float, help="what a network's process may hold; 85 %% of what is free"
    )
    args = parser.parse_args()
    if min(args.repeats) < 1:
        parser.error("--repeats must be 1 or more")
    if args.memory_gib is None and args.device == "cpu":
        args.memory_gib = 0.85 * psutil.virtual_memory().available / 2**30
    elif args.device == "cuda":  # where the GPU itself is the limit
        args.memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    args.names = [name for name in NETWORKS if name in args.only]
    return args


def main() -> None:
    args = arguments()
    logging.getLogger().setLevel(logging.ERROR)  # thop warns of layers that it counts as nothing
    about = machine(args.device)
    print(f"{SIDE}^3, {IN_CHANNELS} channel, {CLASSES} classes, batch 1, float32; {sentence(about)}.\n")
    counts = {name: count(NETWORKS[name]) for name in args.names}
    print(counts_table(counts) + "\n")
    for name in counts:
        if NETWORKS[name].note:
            print(f"- {name}: {NETWORKS[name].note}")
    print(flush=True)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "params_m": c.params / 1e6,
            "thop_gmacs": c.profiled_macs / 1e9,
            "true_gmacs": c.true_macs / 1e9,
            "thop_gmacs_ours": c.thop_macs / 1e9,
            "paper": (paper := NETWORKS[name].paper) and paper._asdict(),
            "reproduced": paper and verdict(c, paper),
        }
        for name, c in counts.items()
    ]
    drift = {}
    turns: dict[str, Any] = {}
    if not args.no_time:
        measured = measure(args.names, args)
        for row in rows:
            row |= times_row(row["name"], measured)
        print(times_table(rows) + "\n")
        drift = {what: measured.drift(what) for what in ("forward", "step")}
        for what, by in drift.items():
            if by is not None:
                print(f"{REFERENCE}'s {what} took {by:+.1%} at the end against the beginning.")
        if measured.start and IN_TURNS in args.names:
            turns = {what: asdict(run) for what, run in measured.start.items() if isinstance(run, Run)}
            seconds = " and ".join(f"{run['wall_s']:.2f} s a {what}" for what, run in turns.items())
            print(f"{IN_TURNS}'s share is of the {REFERENCE} that it took turns with: {seconds}.")
    extra = {"memory_gib": args.memory_gib, "drift": drift, "reference_in_turns": turns}
    print(json.dumps({"benchmark": "table1", **about, **extra, "rows": rows}))
    failed = [row.get(f"{what}_failed") or "" for row in rows for what in ("forward", "step")]
    if any(why and not why.startswith(TOO_BIG) for why in failed):
        sys.exit(1)


if __name__ == "__main__":
    main()
