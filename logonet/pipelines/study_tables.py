"""What the scores of a study's runs say: tables for its page.

A setting is a network, a pretext and a number of labels; its runs differ in fold, subset of the labels and seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from logonet.inference import statistics

SETTING = ["network", "pretext", "labels"]  # columns that make a setting; its runs differ in the rest
REPEATS = ["fold", "subset", "seed"]
NO_PROXIES = {
    "unix_s",
    "lr",
    "masked_share",
    "samples_per_s",
    "data_wait_share",
    "peak_memory_mb",
    "accuracy_floor",
}


def comparisons(cases: pd.DataFrame, metric: str, baseline: Mapping[str, str]) -> pd.DataFrame:
    """Each setting against the one that has the baseline's network, or pretext, and is otherwise the same.

    Args:
        cases: scores per run, case and class.
        baseline: axis of SETTING -> the name that settings are compared with.

    Returns:
        Rows of `statistics.compare_runs`, runs paired by fold, subset and seed, with the setting's columns before
        them, and both p-values after Holm's correction over the settings: of the means as one family, of all
        classes as another.
    """
    parts = {setting: part for setting, part in cases.groupby(SETTING, sort=False)}
    found = []
    for setting, part in parts.items():
        base = tuple(baseline.get(axis, name) for axis, name in zip(SETTING, setting))
        if base != setting and base in parts:
            rows = statistics.compare_runs(parts[base], part, metric, REPEATS)
            found.append(rows.assign(**dict(zip(SETTING, setting)), baseline=", ".join(base)))
    if not found:
        return pd.DataFrame()
    compared = pd.concat(found, ignore_index=True)
    for p in ("p_cases", "p_runs"):
        family = compared["class"] == statistics.MEAN
        compared[f"{p}_holm"] = math.nan
        for rows in (family, ~family):
            compared.loc[rows, f"{p}_holm"] = statistics.holm(compared.loc[rows, p].to_numpy(float))
    first = [*SETTING, "baseline"]
    return compared[first + [column for column in compared if column not in first]]


def labels_saved(means: pd.DataFrame, baseline: Mapping[str, str]) -> pd.DataFrame:
    """How many labels each setting needs to reach the baseline's score, for each number of labels of the baseline.

    Args:
        means: a row a setting with ``train_cases`` and ``mean``, of which more is better.
        baseline: as in `comparisons`.

    Returns:
        A row for each network and pretext that has another one as baseline, a column for each number of labels.
    """
    curves = {
        key: part.sort_values("train_cases")
        for key, part in means.groupby(["network", "pretext"], sort=False)
    }
    found = []
    for key, curve in curves.items():
        base = tuple(baseline.get(axis, name) for axis, name in zip(SETTING, key))
        if base == key or base not in curves:
            continue
        line: dict[str, Any] = dict(zip(SETTING, key))
        for count, score in zip(curves[base]["train_cases"], curves[base]["mean"]):
            needed = statistics.labels_to_reach(score, list(curve["train_cases"]), list(curve["mean"]))
            least, most = curve["train_cases"].iloc[[0, -1]]
            told = f"over {most}" if math.isinf(needed) else f"{needed:.3g}"
            line[f"{', '.join(base)} with {count}"] = f"at most {least}" if needed <= least else told
        found.append(line)
    return pd.DataFrame(found)


def proxies(table: pd.DataFrame, finals: Mapping[str, Mapping[str, Any]], metric: str) -> pd.DataFrame:
    """How well each measure of a pretraining orders the scores after finetuning: what a sweep may look at instead.

    Args:
        table: a row a run: ``network``, ``labels``, ``pretraining`` (its URI, "" from scratch) and ``metric``.
        finals: URI of a pretraining -> the last entry of its history.

    Returns:
        A row for each network, number of labels and measure that all pretrainings have:
        ``n`` pretrainings, at least `statistics.MIN_PAIRS`, and Spearman's ``rho`` with the mean score of their
        finetunings, as `statistics.rank_correlation` has it.
    """
    found = []
    judged = table[table["pretraining"] != ""]
    for (network, labels), part in judged.groupby(["network", "labels"], sort=False):
        scores = part.groupby("pretraining", sort=False)[metric].mean()
        if len(scores) < statistics.MIN_PAIRS:
            continue
        rows = [dict(finals[uri]) for uri in scores.index]
        for row in rows:
            if "accuracy_floor" in row:
                row["accuracy_over_floor"] = row["accuracy"] - row["accuracy_floor"]
        shared = [k for k, v in rows[0].items() if k not in NO_PROXIES and isinstance(v, float)]
        for measure in (key for key in shared if all(key in row for row in rows)):
            measured = [row[measure] for row in rows]
            found_of = statistics.rank_correlation(measured, list(scores))
            told = {key: found_of[key] for key in ("n", "rho", "ci_low", "ci_high", "p")}
            found.append({"network": network, "labels": labels, "measure": measure, **told})
    return pd.DataFrame(found)


def ranks(cases: pd.DataFrame, metric: str) -> dict[str, tuple[dict[str, float], float, str]]:
    """What `reporting.mean_ranks` draws."""
    drawn = {}
    for labels, part in cases.groupby("labels", sort=False):
        names = [f"{network}, {pretext}" for network, pretext in zip(part["network"], part["pretext"])]
        if len(set(names)) == 1:
            continue
        found = statistics.ranks(statistics.per_case(part, names, metric), metric)
        p = "" if math.isnan(found.friedman_p) else f", Friedman p {found.friedman_p:.2g}"
        note = f"{found.cases} cases judged{p}, critical difference {found.critical_difference:.2f}"
        drawn[str(labels)] = (found.mean, found.critical_difference, note)
    return drawn
