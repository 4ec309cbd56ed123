"""The plan as tables for people."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from logonet.planning.planner import Plan, gib


def text(plan: Plan, width: int = 118) -> str:
    """Stages, stored sizes, a worker's memory, scaling, notes, and what will not fit."""
    of, net, worker, step = plan.sizes, plan.sizes.network, plan.worker, plan.step
    out = io.StringIO()
    # A pipe has no width, and a truncated table would be useless.
    console = Console(file=out, width=width, highlight=False)

    def show(title: str, heads: str, rows: Iterable[Iterable[str]]) -> None:
        table = Table(title=title, title_justify="left")
        for i, head in enumerate(heads.split("|")):
            table.add_column(head, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)

    show(
        "Stages",
        "stage|reads|writes|keeps|Ray's store of a node|time|waits for",
        (
            [s.name, *map(gib, (s.read, s.written, s.kept, s.node_shared)), duration(s.seconds), s.waits_for]
            for s in of.stages
        ),
    )
    good, count = len(of.scans.scans) - of.too_small, len(of.cluster_sizes)
    kept = [("crops", gib(of.cache_bytes), f"{of.num_crops:,} crops of {good:,} scans")]
    if count:
        codes = f"{count} with {sum(of.cluster_sizes):,} codes"
        kept.append(("clusterers", gib(of.clusterers_bytes), codes))
        kept.append(("pseudo-labels", gib(of.labels_bytes), f"{of.num_crops * count:,} rows"))
    kept.append(("a checkpoint", gib(net.checkpoint_bytes), f"{plan.cfg.train.keep_checkpoints} are kept"))
    final = "the network's, and the whole method's"
    kept.append(("final weights", gib(net.backbone_file + net.model_file), final))
    show("Stored", "what|size|of", kept)

    gpu = plan.placement is not None and plan.placement.gpu
    host = worker.process + worker.checkpoint
    memory = {
        "weights": worker.weights,
        "gradients": worker.gradients,
        "AdamW's moments": worker.moments,
        "activations": worker.activations,
        "batches": worker.batches,
        "all of these, on the GPU" if gpu else "all of these": worker.device_bytes,
        "the process": worker.process,
        "copies for a checkpoint, on rank 0": worker.checkpoint,
        "in the node's memory": host if gpu else host + worker.device_bytes,
    }
    if plan.labeller_bytes:
        memory["a labelling actor, without the shared centroids"] = plan.labeller_bytes
    title = f"Memory of a training worker ({worker.known_from})"
    show(title, "what|size", ((name, gib(size)) for name, size in memory.items()))

    if plan.scaling:
        show(
            f"More workers, {plan.scaling[0].global_batch} samples each in a step",
            "workers|global batch|compute|all-reduce|data|a step|waits for|samples/s|efficiency",
            (
                [str(s.workers), f"{s.global_batch:,}"]
                + [f"{v:.3g} s" for v in (s.compute_s, s.allreduce_s, s.data_s, s.total_s)]
                + [s.waits_for, f"{s.samples_per_s:.3g}", f"{s.efficiency:.0%}"]
                for s in plan.scaling
            ),
        )
    lines = [f"steps       {of.steps:,}, {of.steps_per_epoch:,} an epoch"]
    if step is not None:
        lines.append(
            f"a step      {step.total_s:.3g} s on {step.workers} workers, {step.accumulate} micro-batches each, "
            f"{step.samples_per_s:.3g} samples/s"
        )
    cost = f", {plan.money:,.2f} {plan.cluster.currency}" if plan.money else ""
    lines.append(f"altogether  {duration(None if plan.hours is None else 3600 * plan.hours)}{cost}")
    lines += [f"note        {note}" for note in plan.notes]
    lines += [f"WILL NOT FIT  {sentence}" for sentence in plan.refusals] or ["fits"]
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    return out.getvalue()


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return "not known"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
