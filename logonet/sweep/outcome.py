"""What a sweep has found, read from its records: no Ray, so that a report is made in a second."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd

from logonet import reporting
from logonet.core import config
from logonet.inference import statistics
from logonet.reporting.sweeping import numbers
from logonet.storage import object_store
from logonet.sweep import analysis, records
from logonet.sweep import space as spaces
from logonet.sweep.records import Spec, Trial

Objective = Literal["probe", "effective_rank", "accuracy", "finetune"]
MEASURES: dict[str, str] = {
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
    ended = sorted((t for t in trials if t.status in ("done", "stopped", "failed")), key=lambda t: t.index)
    found = pd.DataFrame({"trial_objective": [t.objective for t in ended]}, dtype=float)
    found["best_objective"] = found["trial_objective"].cummax().ffill()
    found["epoch"] = found["step"] = range(1, len(found) + 1)
    return found.to_dict("records")  # type: ignore[return-value]


def settings_text(settings: dict[str, Any]) -> str:
    """Settings in short: the last word of each key."""
    return "  ".join(f"{path.rsplit('.', 1)[-1]}={spaces.text(value)}" for path, value in settings.items())


def summary(uri: str) -> str:
    """The last lines of a sweep's log."""
    spec, trials = records.read_spec(uri), records.read_all(uri)
    counts = records.table(trials, [])["status"].value_counts()
    ordered = [s for s in ("done", "stopped", "failed", "waiting", "running") if s in counts]
    lines = ["sweep       " + ", ".join(f"{counts[s]} {s}" for s in ordered)]
    lines += [f"            trial {t.index} failed: {t.reason}" for t in trials if t.status == "failed"]
    if (best := winner(trials)) is None:
        return "\n".join([*lines, "            no trial came to an end"])
    lines.append(f"winner      trial {best.index}  {settings_text(best.settings)}")
    lines.append(f"            {MEASURES[spec.objective]} {best.objective:.4f}  {best.pretrain}")
    if best.final:
        lines.append(f"            finetuned: validation Dice {best.final['dice']:.4f}  {best.final['uri']}")
    return "\n".join(lines)


def report(uri: str, out: str) -> dict[str, bytes]:
    """Write the `page` of the sweep at ``uri``, its pictures and its table to ``out``; the files by name.

    Raises:
        UserError: there is no sweep at ``uri``.
    """
    files = page(records.read_spec(uri), records.read_all(uri))
    for name, content in files.items():
        object_store.write(object_store.join(out, name), content)
    return files


def page(spec: Spec, trials: Sequence[Trial]) -> dict[str, bytes]:
    """``report.html``, self-contained, ``trials.csv``, and pictures of what there is anything to show of.

    The pictures: ``heat_map.png``, ``parallel.png``, ``importance.png``, ``progress.png``, ``proxy.png``.
    """
    keys, measure = spaces.parse(spec.space, spec.name).paths, MEASURES[spec.objective]
    table = records.table(trials, keys)
    rows = [(t.index, e["epoch"], e.get("objective", math.nan)) for t in trials for e in t.history]
    history = pd.DataFrame(rows, columns=["trial", "epoch", "objective"])
    best = analysis.best(table)
    base = next((t.index for t in trials if spaces.apply(spec.base, t.settings) == spec.base), None)
    sections: dict[str, Any] = {"Answer": _answer(table, keys, measure, best, base)}
    files = {"trials.csv": table.to_csv(index=False).encode()}

    def add(heading: str, file: str, drawn: bytes) -> None:
        sections[heading] = files[file] = drawn

    measured = numbers(table["objective"]).notna()
    axes = reporting.heat_axes(table, keys)
    if axes:
        x, y = axes[0], axes[1] if len(axes) > 1 else None
        add("Heat map", "heat_map.png", reporting.heat_map(table, x, y, measure, best))
    if numbers(history["objective"]).notna().any():
        add("Progress", "progress.png", reporting.progress(history, table, best, measure))
    if axes and measured.any():
        add("All keys", "parallel.png", reporting.parallel(table, keys, measure, best))
    at_epoch, epoch = analysis.comparable(table, history)
    importances, heading = analysis.importance(at_epoch, keys), "What each key decides"
    if importances["importance"].notna().any():
        trials_at = f"the {at_epoch['objective'].notna().sum()} trials with {measure} at epoch {epoch}"
        note = f"Of {trials_at}, the last that {analysis.COMMON:.0%} of them reached: objectives of unequal epochs"
        note += " cannot be compared."
        add(heading, "importance.png", reporting.importance_bars(importances, note))
    else:
        sections[heading] = f"<p>Not known: {html.escape('; '.join(dict.fromkeys(importances['note'])))}.</p>"
    both = table[measured & numbers(table["final_dice"]).notna()]
    heading = "Can the objective be trusted"
    if len(both) > 1:
        correlation = statistics.rank_correlation(both["objective"], both["final_dice"])
        add(heading, "proxy.png", reporting.proxy_scatter(both, correlation, measure))
    else:
        said = f"{statistics.pairs(len(both))}: whether {measure} orders settings as that does is not known."
        sections[heading] = f"<p>{html.escape(said)}</p>"
    # What the page shows of the table; where the runs are is in trials.csv.
    shown = table[["trial", "status", "epochs", "objective", "final_dice", *keys]]
    shown = shown.assign(minutes=numbers(table["wall_s"]) / 60, reason=table["reason"])
    sections["Trials"] = shown.rename(columns={"objective": measure, "final_dice": "finetuned Dice"})
    sections["Specification"] = f"<pre>{html.escape(config.to_yaml(spec))}</pre>"
    return {**files, "report.html": reporting.run_page(spec.name, list(sections.items())).encode()}


def _answer(
    table: pd.DataFrame, keys: Sequence[str], measure: str, best: int | None, base: int | None
) -> str:
    """Who won, with what, by how much; as paragraphs of HTML."""
    counts = table["status"].value_counts()
    words = {"done": "run to the end", "stopped": "stopped early"}
    ordered = [s for s in ("done", "stopped", "failed", "running", "waiting") if s in counts]
    count = ", ".join(f"{counts[s]} {words.get(s, s)}" for s in ordered) or "none has begun"
    notes = [f"{len(table)} trial{'s' * (len(table) != 1)}: {count}."]
    if best is None:
        return f"<p><b>No trial has an objective yet.</b></p><p>{notes[0]}</p>"
    by_trial = table.set_index("trial")
    scores, won = analysis.contenders(table).set_index("trial")["score"], by_trial.loc[best]
    others = [int(t) for t in scores.index if t != best]

    def lead(other: int, what: str) -> str:
        apart = scores[best] - scores[other]
        return f"{abs(apart):.4f} {'above' if apart >= 0 else 'below'} {what}"

    leads = []
    if others:
        and_base = ", the base setting" if others[0] == base else ""
        leads.append(lead(others[0], f"the runner-up (trial {others[0]}{and_base})"))
    if base is not None and base in others[1:]:
        leads.append(lead(base, f"the base setting (trial {base})"))
    score = f"{measure} {won['objective']:.4f}"
    if numbers(table["final_dice"]).notna().any():
        proxy = f" ({score})" if math.isfinite(won["objective"]) else ""
        score = f"finetuned Dice {scores[best]:.4f}{proxy}"
    chosen = {k: won[k] for k in keys if pd.notna(won[k])}
    short = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in chosen.items()}
    settings = ", ".join(f"{k} = {v}" for k, v in short.items())
    wins = "wins" if set(counts.index) <= {"done", "stopped", "failed"} else "leads so far"
    sentence = f"Trial {best} {wins}: {settings or 'the base setting'}; {score}"
    sentence += f", {' and '.join(leads)}." if leads else "; no other trial can be compared with it."
    if base == best:
        notes.append("It is the base setting itself.")
    elif base is not None and base not in others:
        missed = by_trial.loc[base]
        why = f" ({missed['reason']})" if missed["reason"] else ""
        notes.append(f"The base setting's trial {base} cannot be compared: {missed['status']}{why}.")
    if won["status"] != "done":
        notes.append("No trial has run to the end, so objectives of unequal epochs were compared.")
    notes += [
        "A lead is of one run each and may be chance: `logonet compare` tests two evaluations case by case."
    ]
    where = f"<p><code>{html.escape(str(won['pretrain']))}</code></p>" if won["pretrain"] else ""
    return f"<p><b>{html.escape(sentence)}</b></p><p>{html.escape(' '.join(notes))}</p>{where}"
