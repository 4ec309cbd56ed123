"""Everything that only a GPU can say, in one run of under eight minutes: is it right, and how fast is it?

    make gpu-site                                     # build/gpu-site.tar.xz: all that is needed beside torch
    tar xf build/gpu-site.tar.xz                      # there, in the repository's root
    PYTHONPATH=.:gpu-site python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --device cpu --quick     # a dry run of every line

Needs one GPU, torch, and what benchmarks/gpu.txt names; neither Ray nor MLflow nor an object store. A section that
fails says so and the others go on. The tables come last, with the numbers as JSON.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from _measure import adamw, machine, markdown, one_step, sentence
from head import Before, Plain
from torch import Tensor, nn

from logonet import methods, networks, training
from logonet.core import seeding
from logonet.core.config import Component
from logonet.methods import DataSpec
from logonet.methods._cluster_head import Head

FP32_ERROR, BF16_ERROR = 1e-4, 3e-2
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last_3d}


@dataclass(frozen=True)
class Args:
    """Attributes:
    device: "cpu" is a dry run.
    quick: tiny sizes, one repeat.
    only: sections to run, by a part of their names; all where empty.
    out: a file for the JSON.
    """

    device: str = "cuda"
    quick: bool = False
    only: tuple[str, ...] = ()
    out: str = ""


@dataclass
class Bench:
    """What the sections share: settings, and the rows that they add to their tables."""

    args: Args
    tables: dict[str, list[dict[str, Any]]]

    @property
    def device(self) -> torch.device:
        return torch.device(self.args.device)

    @property
    def cuda(self) -> bool:
        return self.args.device == "cuda"

    def row(self, table: str, **values: Any) -> None:
        self.tables.setdefault(table, []).append(values)
        print(f"{table}: {values}", file=sys.stderr, flush=True)

    def size(self, full: int, quick: int) -> int:
        return quick if self.args.quick else full

    def autocast(self, enabled: bool = True) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.args.device, torch.bfloat16, enabled=enabled)

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def ms(self, run: Callable[[], Any], repeats: int = 10) -> float:
        """The median milliseconds of ``run``, after two runs to warm up."""
        repeats = self.size(repeats, 1)
        for _ in range(self.size(2, 0)):
            run()
        took = []
        for _ in range(repeats):
            self.sync()
            start_s = time.perf_counter()
            run()
            self.sync()
            took.append(1e3 * (time.perf_counter() - start_s))
        return sorted(took)[len(took) // 2]

    def peak_gib(self, run: Callable[[], Any]) -> float:
        """The most device memory while ``run`` runs."""
        if not self.cuda:
            run()
            return float("nan")
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**30


# ------------------------------------------------------------------------------------------ the machine


def about(b: Bench) -> None:
    """Versions, the rates of copies and of the head's matrix product."""
    if b.cuda:
        name, power = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0)
        b.row(
            "machine",
            gpu=name,
            memory_gib=round(power.total_memory / 2**30),
            torch=torch.__version__,
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
        )
    host = torch.empty(b.size(256, 1) << 18)
    for pinned in (False, True) if b.cuda else (False,):
        source = host.pin_memory() if pinned else host
        ms = b.ms(functools.partial(source.to, b.device, non_blocking=True))
        b.row("copy to the device", pinned=pinned, gb_s=source.nbytes / 1e6 / ms)
    for k in (500, 504, 512):
        rows, weight = (
            torch.randn(n, k, device=b.device, dtype=torch.bfloat16) for n in (b.size(100_000, 100), k)
        )
        ms = b.ms(lambda rows=rows, weight=weight: rows @ weight)
        b.row("product of (100k, K) and (K, K), bf16", K=k, ms=ms, tflop_s=2 * len(rows) * k * k / 1e9 / ms)


# ------------------------------------------------------------------------------------------ correctness


def error(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of the value."""
    exact = exact.double().cpu()
    return float((found.double().cpu() - exact).norm() / exact.norm())


def backbones(b: Bench) -> None:
    """Each tiny network's logits, and the gradient of its input, against float64 on the CPU."""
    for name in networks.names():
        options = networks.tiny(name)
        torch.manual_seed(0)
        net = networks.build(name, **options).eval()
        x = torch.rand(1, 1, *options.get("img_size", (64, 64, 64)))
        exact = _logits_and_gradient(copy.deepcopy(net).double(), x.double())
        found: dict[str, float] = {}
        for short, layout in LAYOUTS.items():
            on_device = copy.deepcopy(net).to(b.device).to(memory_format=layout)
            moved = x.to(b.device).contiguous(memory_format=layout)
            for bf16 in (False, True):
                with b.autocast(bf16):
                    own = _logits_and_gradient(on_device, moved)
                key = f"{'bf16' if bf16 else 'fp32'}, {short}"
                found[key], found[f"{key}, gradient"] = map(error, own, exact)
        bounds = {key: BF16_ERROR if "bf16" in key else FP32_ERROR for key in found if "gradient" not in key}
        wrong = [key for key, bound in bounds.items() if not found[key] <= bound]
        b.row("networks against float64 on the CPU", network=name, **found, wrong="; ".join(wrong) or "-")


def _logits_and_gradient(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    logits = net(x).logits
    logits.double().square().mean().backward()
    assert x.grad is not None
    return logits.detach(), x.grad


def head(b: Bench) -> None:
    """The head against Algorithm 1 word for word."""
    for dtype, bf16 in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        for keep in (True, False):
            torch.manual_seed(0)
            plain = Plain(8, (32, 24, 16), 5, 40, 0.5).double()
            ours = Head(8, (32, 24, 16), 5, 40, 0.5, keep=keep)
            ours.load_state_dict(plain.state_dict())
            ours = ours.to(b.device, dtype)
            f = torch.randn(2, 8, 32, 24, 16, dtype=torch.float64)
            results = []
            for module, autocast, own in ((plain, False, f), (ours, bf16, f.to(b.device, dtype))):
                own = own.clone().requires_grad_()
                with b.autocast(autocast):
                    logits = module(own)
                logits.double().square().sum().backward()
                grads = {k: p.grad for k, p in module.named_parameters() if "conv9.bias" not in k}
                results.append({"logits": logits.detach(), "features": own.grad, **grads})
            # Biases before a norm have a gradient of 0 and rounding: only what is not tiny has an error.
            worst = max(
                error(results[1][k], v) for k, v in results[0].items() if v.abs().max() > 1e-6 * f.numel()
            )
            b.row("head against Algorithm 1", dtype=str(dtype), bf16=bf16, keep=keep, error=worst)


def spec_of(name: str, size: int, batch: int = 2, clusterers: int = 3, k: int = 7) -> DataSpec:
    """Data that suits every method."""
    return DataSpec(
        size_vox=(size,) * 3,
        cluster_sizes=(k,) * clusterers,
        majority_labels=(0,) * clusterers,
        num_classes=3 if "labels" in methods.needs(name) else 0,
        batch_size=batch,
    )


def batch_of(name: str, cfg: Any, spec: DataSpec, device: torch.device) -> dict[str, Tensor]:
    """Prepared random samples."""
    samples = []
    for i in range(spec.batch_size or 1):
        rng = seeding.rng(0, "gpu", i)
        coarse_XYZ = rng.random([side // 8 for side in spec.size_vox])
        image_XYZ = np.kron(coarse_XYZ, np.ones((8, 8, 8))) * 65535
        raw = {
            "image_CXYZ": image_XYZ[None].astype(np.uint16),
            "labels_NZ": rng.integers(
                0, min(spec.cluster_sizes), (len(spec.cluster_sizes), spec.size_vox[2])
            ),
            "labels_XYZ": rng.integers(0, max(spec.num_classes, 1), spec.size_vox).astype(np.uint8),
        }
        samples.append(methods.prepare(name)(raw, cfg, rng))
    return {k: torch.from_numpy(np.stack([s[k] for s in samples])).to(device) for k in samples[0]}


def small(name: str) -> dict[str, Any]:
    """Settings for methods whose own parts are large by default."""
    decoder = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}
    return {"glmae": {**decoder, "num_local": 2}, "mae3d": decoder}.get(name, {})


def pairs() -> Iterator[tuple[str, str]]:
    """Every method with the first tiny network that it can work with."""
    for method in methods.names():
        for backbone in ("logonet", "uxnet3d", "swinunetr", *networks.names()):
            net = networks.build(backbone, **networks.tiny(backbone))
            if not methods.lacking(method, net):
                yield method, backbone
                break


def tiny_method(b: Bench, name: str, backbone: str) -> tuple[Any, dict[str, Tensor]]:
    spec = spec_of(name, 64)
    component = Component(name, methods.config(name, small(name)))
    torch.manual_seed(0)
    module = training.build_method(Component(backbone, networks.tiny(backbone)), component, spec)
    return module.to(b.device).train(), batch_of(name, component.config, spec, b.device)


def all_methods(b: Bench) -> None:
    """A forward and backward pass of every method: its loss, and what makes the host wait within it."""
    for name, backbone in pairs():
        module, batch = tiny_method(b, name, backbone)
        waits: list[str] = []
        loss = torch.zeros(())
        for again in range(2):  # the first pass may wait while it sets up
            with _noting_waits(b, waits if again else []), b.autocast():
                loss, _ = module(batch, 0.5)
            with _noting_waits(b, waits if again else []):
                loss.backward()
        b.row(
            "methods in bf16",
            method=name,
            network=backbone,
            loss=float(loss),
            waits="; ".join(sorted(set(waits))) or "-",
        )


@contextlib.contextmanager
def _noting_waits(b: Bench, waits: list[str]) -> Iterator[None]:
    """Adds the source line of each operation that makes the host wait for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if b.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if b.cuda:
                torch.cuda.set_sync_debug_mode("default")
    waits += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def five_steps(b: Bench) -> None:
    """The losses of five float32 steps on the CPU and on the device, and after saving and loading in between."""
    losses: dict[str, list[float]] = {}
    for where in ("cpu", b.args.device, "restored"):
        device = torch.device("cpu" if where == "cpu" else b.args.device)
        own = Bench(Args(str(device), b.args.quick), {})
        module, batch = tiny_method(own, "masked_clusters", "logonet")
        optimizer = adamw(module, fused=device.type == "cuda")
        losses[where] = []
        for number in range(5):
            if where == "restored" and number == 3:
                state = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
                module, batch = tiny_method(own, "masked_clusters", "logonet")
                optimizer = adamw(module, fused=device.type == "cuda")
                module.load_state_dict(state[0])
                optimizer.load_state_dict(state[1])
            losses[where].append(one_step(module, optimizer, batch, number, own.autocast(False)))
    for where, values in losses.items():
        worst = max(abs(v / e - 1) for v, e in zip(values, losses["cpu"], strict=True))
        b.row("five steps", where=where, **{f"step {i}": v for i, v in enumerate(values)}, error=worst)


def collectives(b: Bench) -> None:
    """A group of one rank over a file, and two ranks of gloo that share the device."""
    import torch.distributed as dist
    import torch.multiprocessing as mp

    if b.cuda:
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group("nccl", f"file://{folder}/store", rank=0, world_size=1)
            x = torch.ones(1 << 20, device=b.device)
            dist.all_reduce(x)
            b.row("collectives", group="nccl, 1 rank", right=bool((x == 1).all()))
            dist.destroy_process_group()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_gloo_rank, (f"file://{folder}/store", b.args.device), nprocs=2)
    b.row("collectives", group="gloo, 2 ranks on one device", right=True)


def _gloo_rank(rank: int, url: str, device: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", url, rank=rank, world_size=2)
    x = torch.full((1 << 10,), float(rank), device=device)
    dist.all_reduce(x)
    assert bool((x == 1).all())
    dist.destroy_process_group()


def marked_tests(b: Bench) -> None:
    """The tests that are marked ``cuda``."""
    import subprocess

    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
    command += ["tests/test_labeller.py", "tests/test_infer.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    b.row(
        "tests marked cuda",
        status=done.returncode,
        said=(done.stdout or done.stderr).strip().splitlines()[-1:],
    )


# ------------------------------------------------------------------------------------------ speed


def paper(
    b: Bench, batch: int = 1, head_kind: type[Head] = Head, **options: Any
) -> tuple[Any, dict[str, Tensor], Any]:
    """The paper's method, a batch and an optimizer; ``options`` of the backbone, and head_keep, fused."""
    keep, fused = options.pop("head_keep", True), options.pop("fused", b.cuda)
    size = b.size(96, 64)
    spec = spec_of("masked_clusters", size, batch, b.size(80, 2), b.size(500, 10))
    cfg = methods.config("masked_clusters", {"head_keep": keep})
    torch.manual_seed(0)
    backbone = Component("logonet", {**(networks.tiny("logonet") if b.args.quick else {}), **options})
    module = training.build_method(backbone, Component("masked_clusters", cfg), spec).to(b.device).train()
    module.head.__class__ = head_kind
    if options.get("channels_last", True):
        module.backbone.to(memory_format=torch.channels_last_3d)
    return (
        module,
        batch_of("masked_clusters", cfg, spec, b.device),
        adamw(module, fused),
    )


def paper_step(b: Bench) -> None:
    """The paper-size step in bf16, one change at a time: layout, routes, optimizer, head, batch."""
    variants: dict[str, dict[str, Any]] = {
        "as it is": {},
        "head as it was": {"head_kind": Before},
        "head computed again": {"head_keep": False},
        "AdamW not fused": {"fused": False},
        "contiguous": {"channels_last": False},
        "torch's convolutions": {"lka": "plain"},
        "torch's convolutions, contiguous": {"lka": "plain", "channels_last": False},
        "batch 2": {"batch": 2},
    }
    if (
        not b.cuda
    ):  # torch's gradient of small depthwise convolutions in bfloat16, channels last, is wrong on CPUs
        variants = {name: options for name, options in variants.items() if "lka" not in options}
    for name, options in variants.items():
        with freed(b):
            module, batch, optimizer = paper(b, **options)
            step = functools.partial(one_step, module, optimizer, batch, 0, b.autocast(b.cuda))
            peak = b.peak_gib(step)
            b.row("the paper's step", variant=name, ms=b.ms(step, 5), peak_gib=peak)
            if name == "as it is":
                _seams(b, module, optimizer, batch)
                _kernels(b, step)


def _seams(b: Bench, module: Any, optimizer: Any, batch: dict[str, Tensor]) -> None:
    """Milliseconds of the parts of a step, each waited for."""
    marks: list[tuple[str, float]] = []

    def mark(name: str) -> None:
        b.sync()
        marks.append((name, time.perf_counter()))

    for _ in range(2):
        marks.clear()
        mark("begin")
        optimizer.zero_grad(set_to_none=True)
        with b.autocast():
            x = methods._parts.intensity(batch["image"])
            feats = module.backbone.encode(x)
            mark("encoders")
            features = module.backbone.decode_features(x, feats)
            mark("decoders")
            cut = features.detach().requires_grad_()
            logits = module.head(cut)
            mark("head")
            loss = logits.float().square().mean()
        loss.backward()
        mark("head, backward")
        features.backward(cut.grad)
        mark("network, backward")
        optimizer.step()
        mark("optimizer")
    for (_, begin_s), (name, end_s) in itertools.pairwise(marks):
        b.row("parts of the paper's step", part=name, ms=1e3 * (end_s - begin_s))


def _kernels(b: Bench, step: Callable[[], Any]) -> None:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if b.cuda else [])]
    with profile(activities=activities) as profiler:
        step()
        b.sync()
    key = "self_device_time_total" if b.cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, key))
    total = sum(getattr(e, key) for e in events)
    for event in events[:15]:
        ms = getattr(event, key) / 1e3
        b.row(
            "kernels of the paper's step",
            kernel=event.key[:70],
            calls=event.count,
            ms=ms,
            share=1e3 * ms / total,
        )


def layers(b: Bench) -> None:
    """LoGoNet's own kinds of layers in bf16, in both layouts: forward, and with the backward pass."""
    side = b.size(96, 8)
    made: dict[str, tuple[nn.Module, int, int]] = {
        "depthwise 5": (nn.Conv3d(64, 64, 5, padding=2, groups=64), 64, side // 2),
        "depthwise 7, dilation 3": (nn.Conv3d(64, 64, 7, padding=9, dilation=3, groups=64), 64, side // 2),
        "dense 3, 32 channels": (nn.Conv3d(32, 32, 3, padding=1), 32, side),
        "1x1x1, 64 to 512": (nn.Conv3d(64, 512, 1), 64, side // 2),
        "batch norm": (nn.BatchNorm3d(32), 32, side),
        "trilinear x2": (nn.Upsample(scale_factor=2, mode="trilinear"), 64, side // 2),
    }
    for name, (layer, channels, size) in made.items():
        found = {}
        for short, layout in (
            ("contiguous", torch.contiguous_format),
            ("channels last", torch.channels_last_3d),
        ):
            own = copy.deepcopy(layer).to(b.device).to(memory_format=layout)
            x = torch.randn(1, channels, size, size, size, device=b.device, dtype=torch.bfloat16)
            x = x.contiguous(memory_format=layout).requires_grad_()

            def forward(own: nn.Module = own, x: Tensor = x) -> Tensor:
                with b.autocast():
                    return own(x)

            def both(forward: Callable[[], Tensor] = forward) -> None:
                out = forward()
                out.backward(torch.ones_like(out))

            found |= {f"{short}, ms": b.ms(forward), f"{short}, with backward": b.ms(both)}
        b.row("layers in bf16", layer=name, **found)


def graph(b: Bench) -> None:
    """The network's forward and backward pass launched as one CUDA graph, and one by one."""
    module, batch, _ = paper(b)
    net = module.backbone
    x = methods._parts.intensity(batch["image"])

    def run() -> None:
        with torch.autocast(b.args.device, torch.bfloat16, cache_enabled=False):
            net.decode_features(x, net.encode(x)).float().square().mean().backward()

    b.row("CUDA graph of the network", launched="one by one", ms=b.ms(run))
    if not b.cuda:
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            net.zero_grad(set_to_none=True)
            run()
    torch.cuda.current_stream().wait_stream(side)
    net.zero_grad(set_to_none=True)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    b.row("CUDA graph of the network", launched="as a graph", ms=b.ms(captured.replay))


def compiled(b: Bench) -> None:
    """torch.compile of encoder and decoder, as ``train.compile`` does it."""
    module, batch, optimizer = paper(b)
    step = functools.partial(one_step, module, optimizer, batch, 0, b.autocast(b.cuda))
    b.row("compile", compiled=False, ms=b.ms(step, 5))
    if b.args.quick:
        return  # minutes on a CPU
    start_s = time.perf_counter()
    module.backbone.compile_parts()
    step()
    b.row("compile", compiled=True, ms=b.ms(step, 5), first_s=time.perf_counter() - start_s)


def inference(b: Bench) -> None:
    """Windows in batches of 1, 4 and 8, and one big scan."""
    from logonet.inference import sliding_window

    size = (b.size(96, 32),) * 3
    options = networks.tiny("logonet") if b.args.quick else {}
    net = networks.build("logonet", num_classes=14, **options).to(b.device).eval()
    scan = np.random.default_rng(0).random((1, *(b.size(n, 40) for n in (320, 320, 240))), np.float32)
    for count in (1, 4, 8):
        cfg = sliding_window.Config(windows_per_batch=count)
        run = functools.partial(sliding_window.labels, net, scan, size, cfg, b.device)
        peak = b.peak_gib(run)
        start_s = time.perf_counter()
        run()
        shape = "x".join(map(str, scan.shape[1:]))
        b.row(
            "inference", scan=shape, windows_per_batch=count, s=time.perf_counter() - start_s, peak_gib=peak
        )


def other_work(b: Bench) -> None:
    """A supervised step, and labelling slices with many clusterers."""
    from logonet.clustering import pseudo_labels
    from logonet.clustering.kmeans import ClustererSet

    size = b.size(96, 64)
    for backbone in ("logonet", "uxnet3d"):
        with freed(b):
            spec = spec_of("supervised", size)
            options = networks.tiny(backbone) if b.args.quick else {}
            cfg = methods.config("supervised")
            module = training.build_method(
                Component(backbone, options), Component("supervised", cfg), spec
            ).to(b.device)
            batch, optimizer = (
                batch_of("supervised", cfg, spec, b.device),
                adamw(module, b.cuda),
            )
            # On CPUs in float32: there torch's bfloat16 gradient of small depthwise convolutions is wrong.
            step = functools.partial(one_step, module.train(), optimizer, batch, 0, b.autocast(b.cuda))
            peak = b.peak_gib(step)
            b.row("supervised step, batch 2", network=backbone, ms=b.ms(step, 5), peak_gib=peak)
    rng = np.random.default_rng(0)
    slices, side = b.size(960, 32), b.size(96, 16)
    sizes_N = np.full(b.size(20, 2), b.size(500, 8))
    centroids_VT = rng.random((sizes_N.sum(), side * side), np.float32)
    labeller = pseudo_labels.Labeller(ClustererSet(centroids_VT, sizes_N), device=b.device)
    slices_ST = rng.random((slices, side * side), np.float32)
    b.row("labeller", slices=slices, codes=len(centroids_VT), ms=b.ms(lambda: labeller(slices_ST), 3))


@contextlib.contextmanager
def freed(b: Bench) -> Iterator[None]:
    """What was made inside is gone from the device afterwards."""
    yield
    gc.collect()
    if b.cuda:
        torch.cuda.empty_cache()


SECTIONS: tuple[Callable[[Bench], None], ...] = (
    about,
    backbones,
    head,
    all_methods,
    five_steps,
    collectives,
    marked_tests,
    paper_step,
    layers,
    graph,
    compiled,
    inference,
    other_work,
)


def main(args: Args) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is compared
    b, failures, seconds = Bench(args, {}), {}, {}
    where = machine(args.device)
    for section in SECTIONS:
        name = section.__name__
        if args.only and not any(part in name for part in args.only):
            continue
        start_s = time.perf_counter()
        try:
            with freed(b):
                section(b)
        except Exception:  # the others can still say something, and this device time is not given again
            failures[name] = traceback.format_exc()
            print(f"{name} failed:\n{failures[name]}", file=sys.stderr, flush=True)
        seconds[name] = time.perf_counter() - start_s
        if args.out:  # after each section, so that what is known is not lost with the next one
            Path(args.out).write_text(json.dumps({**where, "tables": b.tables, "failures": failures}))
    for name, rows in b.tables.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        print(f"\n### {name}\n")
        print(markdown(columns, [[_shown(row.get(c, "")) for c in columns] for row in rows]))
    print(f"\n{sentence(where)}; seconds: { {k: round(v, 1) for k, v in seconds.items()} }")
    for name, text in failures.items():
        print(f"\nFAILED {name}: {text.strip().splitlines()[-1]}")
    print(
        json.dumps(
            {"benchmark": "gpu", **where, "tables": b.tables, "failures": failures, "seconds": seconds}
        )
    )
    sys.exit(bool(failures))


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    main(tyro.cli(Args, description=__doc__))
