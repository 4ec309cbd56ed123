"""The plan as tables for people."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import pandas as pd

from logonet.planning.planner import Plan, gib
from logonet.planning.speed import ZONES

MOVED = ["read", "written", "kept", "node_shared", "driver"]


def text(plan: Plan) -> str:
    """Stages, sizes, a worker's memory, scaling, notes, and what will not fit."""
    stages = pd.DataFrame([asdict(s) for s in plan.stages])
    stages[MOVED] = stages[MOVED].map(gib)
    stages["seconds"] = [duration(s.seconds) for s in plan.stages]
    sizes = {name: gib(n) for name, n in plan.bytes.items() if name != "crops"}
    memory: dict[str, Any] = asdict(plan.worker_bytes)
    known_from = memory.pop("known_from")
    memory |= {"all but process and checkpoint": plan.worker_bytes.device_bytes}
    memory |= {"a labelling actor": plan.labeller_bytes, "a data task": plan.data_task_bytes}
    lines = ["Stages, in bytes and time", *_table(stages.rename(columns={"seconds": "time"}))]
    lines += [f"Sizes of {plan.bytes['crops']:,} crops and what is made of them", *_table(_column(sizes))]
    lines += [f"Peak memory of a training worker ({known_from})"]
    lines += _table(_column({name: gib(n) for name, n in memory.items()}))
    if plan.scaling:
        scaling = pd.DataFrame([asdict(s) for s in plan.scaling])
        scaling["efficiency"] = scaling["efficiency"].map("{:.0%}".format)
        lines += ["More workers, with the same work for each", *_table(scaling)]
    lines.append(f"steps       {plan.steps:,} in {plan.config.train.epochs:,} epochs")
    if step := plan.step:
        lines.append(
            f"a step      {step.total_s:.3g} s on {step.workers} workers, {step.accumulate} micro-batches each, "
            f"{step.samples_per_s:.3g} samples/s"
        )
    if found := plan.validation:
        lines.append(
            f"validation  {duration(found.seconds)} for {found.windows:,} windows of {found.scans:,} scans, "
            f"{found.times:,} times"
        )
    if saves := plan.checkpoints:
        lines.append(
            f"checkpoints {saves.times:,}, one every {duration(saves.interval_s)}; writing takes "
            f"{duration(saves.writing_s)} each and {duration(saves.times * saves.writing_s)} altogether, "
            f"of which training waits {duration(saves.waited_s)}"
        )
    if moved := plan.traffic:
        tb = [f"{n / 1e12:,.1f} TB" for n in (moved.nodes_bytes, moved.zones_bytes, moved.store_bytes)]
        lines.append(
            f"traffic     {tb[0]} between nodes, {tb[1]} of it between zones; {tb[2]} from and to the store"
        )
        if moved.zones_money or moved.money:
            lines.append(
                f"traffic     costs {moved.money:,.2f} {plan.cluster.currency}; in {ZONES} zones it would cost "
                f"{moved.zones_money:,.2f}, and the store behind a NAT gateway {moved.nat_money:,.2f}"
            )
    cost = f", {plan.money:,.2f} {plan.cluster.currency}" if plan.money else ""
    lines.append(f"altogether  {duration(plan.hours and 3600 * plan.hours)}{cost}")
    lines += [f"note        {note}" for note in plan.notes]
    lines += [f"WILL NOT FIT  {sentence}" for sentence in plan.refusals] or ["fits"]
    return "\n".join(lines) + "\n"


def _column(values: dict[str, str]) -> pd.DataFrame:
    return pd.DataFrame(values.items(), columns=["what", "size"])


def _table(rows: pd.DataFrame) -> Iterable[str]:
    return [*rows.to_string(index=False, float_format="{:.3g}".format).splitlines(), ""]


def duration(seconds: float | None) -> str:
    """Days, hours, minutes and seconds."""
    return "not known" if seconds is None else str(datetime.timedelta(seconds=math.ceil(seconds)))
