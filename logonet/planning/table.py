"""A plan for people."""

from __future__ import annotations

import io

from logonet.planning.planner import Plan, gib


def text(plan: Plan, width: int = 118) -> str:
    """Tables of what is read and kept, of a worker's memory, of steps on more workers; then what will not fit."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    of, net, worker, step = plan.sizes, plan.sizes.network, plan.worker, plan.step
    out = io.StringIO()
    # A pipe has no width, and a cut table hides what it was printed for.
    console = Console(file=out, width=width, highlight=False)

    def columns(title: str, first: str, *others: str) -> Table:
        table = Table(title=title, title_justify="left")
        table.add_column(first)
        for head in others:
            table.add_column(head, justify="right")
        return table

    stages = columns("Stages", "stage", "reads", "writes", "keeps", "Ray store a node", "time", "waits for")
    seconds = {d.name: d for d in plan.durations}
    for s in of.stages:
        d = seconds.get(s.name)
        stages.add_row(
            s.name, gib(s.read), gib(s.written), gib(s.kept), gib(s.node_shared), duration(d.seconds if d else None),
            d.bound if d else "",
        )  # fmt: skip
    console.print(stages)

    kept = columns("What is kept", "what", "size", "of")
    kept.add_row(
        "crops",
        gib(of.cache_bytes),
        f"{of.num_crops:,} crops of {len(of.scans.scans) - of.too_small:,} scans",
    )
    if of.cluster_sizes:
        kept.add_row(
            "clusterers",
            gib(of.clusterers_bytes),
            f"{len(of.cluster_sizes)} with {sum(of.cluster_sizes):,} codes",
        )
        kept.add_row("pseudo-labels", gib(of.labels_bytes), f"{of.num_crops * len(of.cluster_sizes):,} rows")
    kept.add_row("a checkpoint", gib(net.checkpoint_bytes), f"{plan.cfg.train.keep_checkpoints} are kept")
    kept.add_row(
        "final weights", gib(net.backbone_file + net.model_file), "the backbone's, and the whole method's"
    )
    console.print(kept)

    memory = columns(f"Memory of a training worker ({worker.known_from})", "what", "size")
    on_gpu = plan.place is not None and plan.place.gpu
    for name, size in (
        ("weights", worker.weights),
        ("gradients", worker.gradients),
        ("AdamW's moments", worker.moments),
        ("activations", worker.activations),
        ("batches", worker.batches),
        ("the all-reduce's copy, beyond the activations", worker.sync),
        ("on the GPU" if on_gpu else "of training", worker.device_bytes),
        ("its process", worker.process),
        ("a checkpoint's copies, on rank 0", worker.checkpoint),
    ):
        memory.add_row(name, gib(size))
    memory.add_row(
        "in the node's memory", gib(worker.process + worker.checkpoint if on_gpu else worker.cpu_bytes)
    )
    if plan.labeller_bytes:
        memory.add_row("a labelling actor, beside the shared centroids", gib(plan.labeller_bytes))
    console.print(memory)

    if plan.scaling:
        per = plan.scaling[0].step.global_batch
        heads = (
            "global batch",
            "compute",
            "stragglers",
            "all-reduce",
            "data needs",
            "a step",
            "samples/s",
            "efficiency",
        )
        table = columns(f"More workers, {per} samples each in a step", "workers", *heads)
        for row in plan.scaling:
            x = row.step
            parts = (x.compute_s, x.stragglers_s, x.allreduce_s, x.data_s, x.total_s)
            table.add_row(
                str(x.workers), f"{x.global_batch:,}", *(f"{v:.3g} s" for v in parts), f"{x.samples_per_s:.3g}",
                f"{row.efficiency:.0%}",
            )  # fmt: skip
        console.print(table)

    lines = [f"steps       {of.steps:,}, {of.steps_per_epoch:,} an epoch"]
    if step is not None:
        lines.append(
            f"a step      {step.total_s:.3g} s on {step.workers} workers, {step.accumulate} micro-batches each, "
            f"{step.samples_per_s:.3g} samples/s"
        )
    cost = "" if not plan.money else f", {plan.money:,.2f} {plan.cluster.currency}"
    lines.append(f"altogether  {duration(None if plan.hours is None else 3600 * plan.hours)}{cost}")
    lines += [f"note        {note}" for note in plan.notes]
    lines += [f"WILL NOT FIT  {sentence}" for sentence in plan.refusals] or ["fits"]
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    return out.getvalue()


def duration(seconds: float | None) -> str:
    """In the unit that people would use."""
    if seconds is None:
        return "not known"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
