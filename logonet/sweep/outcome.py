"""What a sweep has found, read from its records: no Ray, so that a report is made in a second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd

from logonet.core import config
from logonet.storage import object_store
from logonet.sweep import analysis, records
from logonet.sweep import space as spaces
from logonet.sweep.records import Trial

Objective = Literal["probe", "effective_rank", "accuracy", "finetune"]
MEASURES: dict[Objective, str] = {
    "probe": "probe Dice",
    "effective_rank": "effective rank",
    "accuracy": "masked accuracy over its floor",
    "finetune": "validation Dice of a finetuning",
}


def winner(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the best finetuning, else with the best objective among those that ran to the end."""
    index = analysis.best(records.table(trials, []))
    return next((t for t in trials if t.index == index), None)


def best_so_far(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """A history for the sweep's own MLflow run: the best objective after each trial that ended."""
    ended = [t for t in trials if t.status in ("done", "stopped", "failed")]
    out: list[dict[str, Any]] = []
    best = math.nan
    for count, trial in enumerate(sorted(ended, key=lambda t: t.index), 1):
        best = max((v for v in (best, trial.objective) if not math.isnan(v)), default=math.nan)
        out.append(
            {"epoch": count, "step": count, "best_objective": best, "trial_objective": trial.objective}
        )
    return out


def settings_text(settings: dict[str, Any]) -> str:
    """Settings as a person would say them: the last word of each key."""
    return "  ".join(f"{path.rsplit('.', 1)[-1]}={spaces.text(value)}" for path, value in settings.items())


def report(uri: str, out: str) -> dict[str, bytes]:
    """Write the page of the sweep at ``uri``, its pictures and its tables to ``out``; the files by name.

    Raises:
        UserError: there is no sweep at ``uri``.
    """
    spec = records.read_spec(uri)
    trials = records.read_all(uri)
    space = spaces.parse(spec.space, uri)
    table = records.table(trials, space.paths)
    found = winner(trials)
    base = next((t.index for t in trials if spaces.apply(spec.base, t.settings) == spec.base), None)
    page, files = analysis.page(
        spec.name,
        table,
        _history(trials),
        space.paths,
        MEASURES[spec.objective],  # type: ignore[index]
        config.to_yaml(spec),
        None if found is None else found.index,
        base,
    )
    files["report.html"] = page.encode()
    for name, content in files.items():
        object_store.write(object_store.join(out, name), content)
    return files


def _history(trials: Sequence[Trial]) -> pd.DataFrame:
    rows = [
        {"trial": t.index, "epoch": e["epoch"], "objective": e.get("objective", math.nan)}
        for t in trials
        for e in t.history
    ]
    return pd.DataFrame(rows, columns=["trial", "epoch", "objective"])


def summary(uri: str) -> str:
    """What a sweep's log ends on."""
    trials = records.read_all(uri)
    counts = {
        s: sum(t.status == s for t in trials) for s in ("done", "stopped", "failed", "waiting", "running")
    }
    lines = ["sweep       " + ", ".join(f"{n} {s}" for s, n in counts.items() if n)]
    lines += [f"            trial {t.index} failed: {t.reason}" for t in trials if t.status == "failed"]
    best = winner(trials)
    if best is None:
        lines.append("            no trial came to an end")
    else:
        spec = records.read_spec(uri)
        measure = MEASURES[spec.objective]  # type: ignore[index]
        lines.append(f"winner      trial {best.index}  {settings_text(best.settings)}")
        lines.append(f"            {measure} {best.objective:.4f}  {best.pretrain}")
        if best.final:
            lines.append(
                f"            finetuned: validation Dice {best.final['dice']:.4f}  {best.final['uri']}"
            )
    return "\n".join(lines)
