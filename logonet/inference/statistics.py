"""Scores over cases: means with bootstrap intervals, paired comparisons, tables. Over runs: deviations, tests, ranks.

Shapes: N cases, C classes, R bootstrap resamples; of several runs, M runs, K settings that are ranked.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from logonet.core import seeding, tables
from logonet.core.errors import UserError
from logonet.inference.metrics import EMPTY_DICE, HD95, METRICS

# What people compare: titles, and digits of a mean.
SHOWN = {
    "dice": ("Dice", 3),
    "hd95_mm": ("HD95 mm", 2),
    "nsd_1mm": ("NSD 1 mm", 3),
    "nsd_2mm": ("NSD 2 mm", 3),
}
MEAN = "mean"  # the class in the rows of the mean over classes
COLUMNS = ("class", "value", "metric", "mean", "ci_low", "ci_high")
RESAMPLES = 9999
CONFIDENCE = 0.95
MIN_PAIRS = 4  # of 3 pairs even the best order of all has p = 1/3
LESS_IS_BETTER = frozenset(HD95)


def under_rules(rows: pd.DataFrame, empty: str = "default", released: bool = False) -> pd.DataFrame:
    """The same rows under another published rule for empty masks.

    Args:
        rows: of ``case_rows``.
        empty: a key of EMPTY_DICE. It concerns Dice alone: the papers that use the other rules give no NSD.
        released: HD95 is 0 where either mask is empty, as the scripts of nnFormer and MedContext have it.
            That rewards a model for missing an organ altogether, so otherwise it is NaN, and counted.

    Raises:
        UserError: there is no such rule, or there are no rows.
    """
    _need_some(rows)
    if empty not in EMPTY_DICE:
        raise UserError(f"{empty!r} is no rule for empty masks; there are {', '.join(EMPTY_DICE)}")
    rows = rows.copy()
    both, truth_alone = EMPTY_DICE[empty]
    rows.loc[rows["empty"] == "both", "dice"] = both
    rows.loc[rows["empty"] == "truth", "dice"] = truth_alone
    if released:
        rows.loc[rows["empty"] != "neither", list(HD95)] = 0.0
    return rows


def _need_some(rows: pd.DataFrame) -> None:
    if rows.empty:
        raise UserError("there are no scores: no case was evaluated")


def summary(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Each metric of each class over the cases, and the mean over classes, with bootstrap intervals.

    A class's mean is over the cases in which its score is defined; the mean over classes is the mean of
    the classes' means. Cases are what is resampled (percentile bootstrap, Efron & Tibshirani 1993 ch. 13),
    so all classes of a case come and go together.

    Args:
        rows: of ``case_rows`` or ``under_rules``, any number of scans, in any order.
        seed: of the resampling.

    Returns:
        One row per class and metric, the class "mean" last: ``class``, ``value`` (0 for the mean),
        ``metric``, ``mean``, ``ci_low``, ``ci_high`` (95 %), ``std`` (n - 1), ``median``, ``n`` cases with a
        score, ``skipped`` without. In the row of the mean, std and median are those of the cases' averages
        over their classes, n counts cases, skipped scores.
    """
    _need_some(rows)
    order, scans = _class_order(rows), sorted(set(rows["scan_id"]))
    times_RN = _resamples(len(scans), seed)
    out = []
    for metric in METRICS:
        values_NC, missing = _by_case(rows, metric, scans, order), rows[metric].isna()
        means = zip(_class_means(values_NC), *_intervals(values_NC, times_RN))
        columns = [*values_NC.T, _row_means(values_NC)]
        skipped = [*(missing[rows["class"] == name].sum() for _, name in order), missing.sum()]
        for (value, name), mean_low_high, values_N, num in zip([*order, (0, MEAN)], means, columns, skipped):
            line = dict(zip(COLUMNS, (name, value, metric, *mean_low_high)))
            out.append(line | _spread(values_N) | {"skipped": int(num)})
    return _class_by_class(pd.DataFrame(out), order)


def compare(a: pd.DataFrame, b: pd.DataFrame, seed: int = 0, *, common: bool = False) -> pd.DataFrame:
    """Two models on the same cases: is B different from A?

    A pair is a case and class that have a score in both. Where HD95 is undefined for one model (it missed
    the organ) the pair is dropped and counted, so read HD95 together with Dice.

    Args:
        a, b: rows of ``case_rows`` or ``under_rules``, paired by ``scan_id`` and ``class``.
        seed: of the resampling of the cases.
        common: compare on the scans and classes that both have, where they differ.

    Returns:
        One row per class and metric of SHOWN, the class "mean" last: ``class``, ``value``, ``metric``; ``a``
        and ``b``, the means over the pairs; ``difference`` b - a with ``ci_low``, ``ci_high`` (95 %, bootstrap of
        the paired differences); ``p`` of the two-sided Wilcoxon signed-rank test, zero differences left
        out (Wilcoxon's way; 1 when all are zero); ``p_holm``, p after Holm's correction over the classes
        of that metric (the mean is one test: its p unchanged); ``n`` pairs and ``dropped`` ones. In the row
        of the mean, n counts cases, dropped pairs, and the test is on the cases' average differences over
        their classes.

    Raises:
        UserError: the scans or classes differ and ``common`` was not asked for, or none is common.
    """
    _need_some(a)
    _need_some(b)
    for key, noun in (("scan_id", "scans"), ("class", "classes")):
        shared = _shared(set(a[key]), set(b[key]), noun, common)
        a, b = a[a[key].isin(shared)], b[b[key].isin(shared)]
    order, _ = _class_order(a), _class_order(b)
    scans = sorted({*a["scan_id"], *b["scan_id"]})
    times_RN = _resamples(len(scans), seed)
    out = []
    for metric in SHOWN:
        a_NC, b_NC = (_by_case(rows, metric, scans, order) for rows in (a, b))
        difference_NC = b_NC - a_NC
        paired_NC = ~np.isnan(difference_NC)
        low, high = _intervals(difference_NC, times_RN)
        *p_C, p_mean = map(_wilcoxon_p, [*difference_NC.T, _row_means(difference_NC)])
        n_C = paired_NC.sum(0)
        frame = {
            "class": [*(name for _, name in order), MEAN],
            "value": [*(value for value, _ in order), 0],
            "metric": metric,
            "a": _class_means(np.where(paired_NC, a_NC, np.nan)),
            "b": _class_means(np.where(paired_NC, b_NC, np.nan)),
            "difference": _class_means(difference_NC),
            "ci_low": low,
            "ci_high": high,
            "p": [*p_C, p_mean],
            "p_holm": [*holm(np.array(p_C)), p_mean],
            "n": [*n_C, int(paired_NC.any(1).sum())],
            "dropped": [*(len(paired_NC) - n_C), int((~paired_NC).sum())],
        }
        out.append(pd.DataFrame(frame))
    return _class_by_class(pd.concat(out, ignore_index=True), order)


def holm(p_C: np.ndarray) -> np.ndarray:
    """Holm's step-down correction (Holm 1979) of a family of p-values; NaN are no tests and stay."""
    out_C = np.full(len(p_C), np.nan)
    order = np.argsort(p_C)[: np.count_nonzero(~np.isnan(p_C))]  # NaN sort last
    scaled = p_C[order] * np.arange(len(order), 0, -1)
    out_C[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return out_C


def over_runs(scores: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The mean of each setting over its runs, and by how much runs and cases differ.

    Args:
        scores: rows of ``case_rows`` of several runs, with a column ``run`` and the columns ``by``.
        by: columns that make a setting; runs of one setting differ in seed or fold.

    Returns:
        A row for each setting, metric of SHOWN and class, "mean" (over classes) last: ``by``, ``metric``, ``class``;
        ``mean`` of the runs' means over their cases; ``std_runs``, their deviation (n - 1); ``std_cases``, the
        deviation over the cases of each case's mean over runs; ``runs`` and ``cases`` with a score. NaN is of fewer
        than two.
    """
    _need_some(scores)
    out = []
    for setting, part in scores.groupby([*by], sort=False):
        for metric in SHOWN:
            per_run, per_case = (_means_per(part, key, metric) for key in ("run", "scan_id"))
            frame = {
                **dict(zip(by, setting)),
                "metric": metric,
                "class": per_run.columns,
                "mean": per_run.mean().to_numpy(),
                "std_runs": per_run.std().to_numpy(),
                "std_cases": per_case.std().to_numpy(),
                "runs": per_run.count().to_numpy(),
                "cases": per_case.count().to_numpy(),
            }
            out.append(pd.DataFrame(frame))
    return pd.concat(out, ignore_index=True)


def compare_runs(
    a: pd.DataFrame, b: pd.DataFrame, metric: str, paired_by: Sequence[str] = ("run",), seed: int = 0
) -> pd.DataFrame:
    """Is setting B better than setting A, each of several runs?

    Args:
        a, b: rows as `over_runs` takes them, of one setting each, judged on the same cases.
        metric: of SHOWN.
        paired_by: columns whose values a run of A shares with its partner of B.
        seed: of the resampling.

    Returns:
        A row a class, "mean" last: ``class``; ``a``, ``b`` and ``difference`` b - a of the means over runs; ``ci_low``
        and ``ci_high`` of the difference (95 %), both pairs of runs and cases resampled (Owen 2007); ``p_cases``
        of the two-sided Wilcoxon signed-rank test over ``cases``, paired by case after averaging each case over the
        runs; ``p_runs`` of the one-tailed t-test over the runs' means that B is better, with equal variances
        (Student's, as in LoGoNet's appendix: t(8) of five runs each). NaN where there are fewer than two runs of
        either, or none differ.
    """
    (a_MC, b_MC), (a_NC, b_NC) = (
        [_means_per(rows, key, metric) for rows in (a, b)] for key in ("run", "scan_id")
    )
    a_MNC, b_MNC = (_means_per(rows, [*paired_by, "scan_id"], metric) for rows in (a, b))
    better = "less" if metric in LESS_IS_BETTER else "greater"
    rows = []
    for name in b_MC.columns.intersection(a_MC.columns, sort=False):
        a_M, b_M = (runs[name].dropna().to_numpy() for runs in (a_MC, b_MC))
        difference_N = (b_NC[name] - a_NC[name]).to_numpy()  # aligned by scan
        varied = min(len(a_M), len(b_M)) > 1 and np.ptp(a_M) + np.ptp(b_M) > 0
        line = {
            "class": name,
            "a": a_M.mean() if len(a_M) else math.nan,
            "b": b_M.mean() if len(b_M) else math.nan,
            **_two_way_interval((b_MNC[name] - a_MNC[name]).unstack("scan_id").to_numpy(), seed),
            "cases": int((~np.isnan(difference_N)).sum()),
            "p_cases": _wilcoxon_p(difference_N),
            "p_runs": float(stats.ttest_ind(b_M, a_M, alternative=better).pvalue) if varied else math.nan,
        }
        rows.append(line | {"difference": line["b"] - line["a"]})
    columns = ["class", "a", "b", "difference", "ci_low", "ci_high", "cases", "p_cases", "p_runs"]
    return pd.DataFrame(rows, columns=columns)


def _two_way_interval(values_MN: np.ndarray, seed: int) -> dict[str, float]:
    """The percentile interval of the mean of ``values_MN``, whose rows and columns are resampled independently."""
    seen_MN = ~np.isnan(values_MN)
    if not seen_MN.any():
        return {"ci_low": math.nan, "ci_high": math.nan}
    times_RM, times_RN = (_resamples(n, seed + axis) for axis, n in enumerate(values_MN.shape))
    total_R = ((times_RM @ np.where(seen_MN, values_MN, 0.0)) * times_RN).sum(1)
    means_R = _mean(total_R, ((times_RM @ seen_MN) * times_RN).sum(1))
    low, high = np.nanpercentile(means_R, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return {"ci_low": float(low), "ci_high": float(high)}


def rank_correlation(proxy: Sequence[float], final: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Does the proxy order trials as the finetuned Dice does? Spearman's rho of pairs that have both.

    Args:
        proxy, final: (N,) each, in the same order; pairs with a value that is not finite are left out.
        seed: of the resamples.

    Returns:
        ``n`` pairs; ``rho``; ``ci_low``, ``ci_high``: percentile interval (95 %) of bootstrap resamples of
        the pairs, without those in which one side is constant; ``p``, two-sided, of the permutations of the
        pairs (all of them up to 7 pairs); ``note``: a sentence where those numbers must not be trusted, or "".
        NaN: rho of a constant side, and interval and p of fewer than 4 pairs; the interval also when all
        resamples agree, as those of a perfect order do: the spread is then unknown, not zero.
    """
    pairs_2N = np.array([proxy, final], dtype=np.float64).reshape(2, -1)
    pairs_2N = pairs_2N[:, np.isfinite(pairs_2N).all(0)]
    n = pairs_2N.shape[1]
    out: dict[str, Any] = {"n": n, **dict.fromkeys(("rho", "ci_low", "ci_high", "p"), math.nan)}
    if n < 2 or (np.ptp(pairs_2N, axis=1) == 0).any():
        why = "one side is constant" if n > 1 else "two pairs are the least"
        return out | {"note": f"{pairs(n)}: {why}, so there is no order to compare."}
    out["rho"] = float(_spearman(*pairs_2N))
    if n < MIN_PAIRS:
        return out | {"note": f"{pairs(n)} prove nothing about the proxy: {MIN_PAIRS} are the least."}
    options: dict[str, Any] = {"n_resamples": RESAMPLES, "vectorized": True}
    exchanged = stats.permutation_test(
        (pairs_2N[0],),
        lambda proxy_N, axis: _spearman(proxy_N, np.broadcast_to(pairs_2N[1], proxy_N.shape), axis=axis),
        permutation_type="pairings",
        rng=seeding.rng(seed, "permutations"),
        **options,
    )
    out["p"] = float(exchanged.pvalue)
    with warnings.catch_warnings():
        # The first constant resample spoils scipy's own interval, and it warns; ours leaves such resamples out.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        options |= {"paired": True, "method": "percentile", "rng": seeding.rng(seed, "bootstrap")}
        rho_R = stats.bootstrap(tuple(pairs_2N), _spearman, **options).bootstrap_distribution
    low, high = np.nanpercentile(rho_R, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    if np.nanmax(rho_R) - np.nanmin(rho_R) < 1e-9:
        return out | {"note": f"Every resample of the {n} pairs has one order, so rho has no interval."}
    note = "The interval holds 0: the proxy is not shown to order the trials." if low <= 0 <= high else ""
    return out | {"ci_low": float(low), "ci_high": float(high), "note": note}


def pairs(n: int) -> str:
    return f"{n} trial{'s' * (n != 1)} with a finetuned Dice"


def _spearman(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """Pearson's correlation of the ranks, ties at their mean; NaN where a side is constant.

    scipy's own spearmanr takes one pair of samples at a time.
    """
    a, b = (stats.rankdata(side, axis=axis) for side in (a, b))
    a, b = (side - side.mean(axis, keepdims=True) for side in (a, b))
    scale = np.sqrt((a * a).sum(axis) * (b * b).sum(axis))
    return np.divide((a * b).sum(axis), scale, out=np.full(np.shape(scale), np.nan), where=scale > 0)


def labels_to_reach(target: float, labels: Sequence[float], scores: Sequence[float]) -> float:
    """How many labels bring a score up to ``target``, on straight lines between points over the labels' logarithm.

    Args:
        labels: ascending numbers of training cases.
        scores: of which more is better; the score at each.

    Returns:
        The least such number, the first of ``labels`` where it is enough; infinity where none is.
    """
    best = np.maximum.accumulate(scores)  # a score that falls again was reached all the same
    if best[0] >= target:
        return float(labels[0])
    if best[-1] < target:
        return math.inf
    i = int(np.searchsorted(best, target))
    share = (target - best[i - 1]) / (best[i] - best[i - 1])
    return float(labels[i - 1] * (labels[i] / labels[i - 1]) ** share)


@dataclass(frozen=True)
class Ranks:
    """The mean ranks of settings over cases (Demsar 2006).

    Attributes:
        mean: setting -> mean rank, the best first; rank 1 is the best of a case, equal scores share a rank.
        cases: N, those in which every setting has a score.
        friedman_p: of Friedman's test that all are alike; NaN of fewer than three settings.
        critical_difference: settings whose mean ranks differ by more do so at the 5 % level (Nemenyi).
    """

    mean: dict[str, float]
    cases: int
    friedman_p: float
    critical_difference: float


def ranks(scores_NK: pd.DataFrame, metric: str) -> Ranks:
    """Rank the settings in the columns of ``scores_NK``, case by case; cases with a missing score are left out."""
    complete_NK = scores_NK.dropna()
    n, k = complete_NK.shape
    ranks_NK = complete_NK.rank(axis=1, ascending=metric in LESS_IS_BETTER)
    p = math.nan
    if k > 2 and n > 1:
        tied = (ranks_NK == (k + 1) / 2).all(axis=None)
        p = 1.0 if tied else float(stats.friedmanchisquare(*ranks_NK.to_numpy().T).pvalue)
    quantile = float(stats.studentized_range.ppf(CONFIDENCE, k, np.inf)) / math.sqrt(2)
    apart = quantile * math.sqrt(k * (k + 1) / (6 * n)) if n else math.nan
    return Ranks(ranks_NK.mean().sort_values(kind="stable").to_dict(), n, p, apart)


def per_case(scores: pd.DataFrame, settings: Sequence[str], metric: str) -> pd.DataFrame:
    """A row a case and a column a setting: means over the setting's runs and the classes (N, K), for `ranks`.

    Args:
        settings: name of the setting of each row of ``scores``.
    """
    named = scores.assign(setting=list(settings))
    found = {
        name: _means_per(part, "scan_id", metric)[MEAN] for name, part in named.groupby("setting", sort=False)
    }
    return pd.DataFrame(found)


def _means_per(rows: pd.DataFrame, key: str | Sequence[str], metric: str) -> pd.DataFrame:
    """Means of each class for each ``key`` (run, case or both), and last the mean over classes; NaN without a score."""
    order = dict.fromkeys(rows.sort_values("value", kind="stable")["class"])
    keys = [key] if isinstance(key, str) else [*key]
    wide = (
        rows.groupby([*keys, "class"], sort=False, dropna=False)[metric].mean().unstack("class")[list(order)]
    )
    return wide.assign(**{MEAN: wide.mean(axis=1)})


def _class_order(rows: pd.DataFrame) -> list[tuple[int, str]]:
    """(value, class) pairs by value: an order that does not depend on that of the rows."""
    twice = rows[rows.duplicated(["scan_id", "class"])]
    if len(twice):
        first = twice.iloc[0]
        raise UserError(f"scan {first['scan_id']} has two scores of {first['class']}; keep one of them")
    return sorted({(int(value), str(name)) for value, name in zip(rows["value"], rows["class"])})


def _by_case(
    rows: pd.DataFrame, metric: str, scans: Sequence[str], order: Sequence[tuple[int, str]]
) -> np.ndarray:
    """Scores (N, C); NaN where a case has none."""
    wide = rows.pivot(index="scan_id", columns="class", values=metric)
    return wide.reindex(index=scans, columns=[name for _, name in order]).to_numpy(np.float64)


def _class_by_class(frame: pd.DataFrame, order: Sequence[tuple[int, str]]) -> pd.DataFrame:
    """Lines of one class together, in their order, the mean last."""
    rank = {name: rank for rank, (_, name) in enumerate([*order, (0, MEAN)])}
    return frame.sort_values("class", key=lambda names: names.map(rank), kind="stable", ignore_index=True)


def _mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """total / count, and NaN without a warning where there is nothing to average."""
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=np.asarray(count) > 0)


def _row_means(values_NC: np.ndarray) -> np.ndarray:
    return _mean(np.nansum(values_NC, 1), (~np.isnan(values_NC)).sum(1))


def _class_means(values_NC: np.ndarray) -> np.ndarray:
    """Each class's mean over cases and, last, the mean of those over classes."""
    means_C = _row_means(values_NC.T)
    return np.append(means_C, _row_means(means_C[None]))


def _resamples(num_cases: int, seed: int) -> np.ndarray:
    """How often each resample holds each case (R, N): means over resamples are then one matrix product."""
    shares_N = np.full(num_cases, 1 / num_cases)
    return seeding.rng(seed, "bootstrap").multinomial(num_cases, shares_N, size=RESAMPLES).astype(np.float64)


def _intervals(values_NC: np.ndarray, times_RN: np.ndarray) -> np.ndarray:
    """Bootstrap percentile intervals of ``_class_means``: their lower and their upper ends (2, C + 1)."""
    seen_NC = ~np.isnan(values_NC)
    centre_C = _row_means(values_NC.T)  # taken off first: resamples of equal values then have equal means
    off_NC = np.where(seen_NC, values_NC - centre_C, 0.0)
    means_RC = _mean(times_RN @ off_NC, times_RN @ seen_NC) + centre_C
    both = np.column_stack([means_RC, _row_means(means_RC)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a class that no case has
        # Resamples that drew no case with a class say nothing of it.
        return np.nanpercentile(both, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)], axis=0)


def _spread(values_N: np.ndarray) -> dict[str, float | int]:
    seen = values_N[~np.isnan(values_N)]
    return {
        "std": float(seen.std(ddof=1)) if len(seen) > 1 else math.nan,
        "median": float(np.median(seen)) if len(seen) else math.nan,
        "n": len(seen),
    }


def _wilcoxon_p(difference_N: np.ndarray) -> float:
    difference_N = difference_N[~np.isnan(difference_N)]
    if not len(difference_N):
        return math.nan
    if not difference_N.any():
        return 1.0
    return float(stats.wilcoxon(difference_N).pvalue)


def _shared(a: set[str], b: set[str], noun: str, common: bool) -> set[str]:
    both = a & b
    sides = (("A", a - b), ("B", b - a))
    only = " and ".join(f"{_some(extra)} only in {side}" for side, extra in sides if extra)
    if not both:
        raise UserError(f"A and B have no {noun} in common: {only}; evaluate both on one test set")
    if only and not common:
        raise UserError(
            f"A and B were scored on different {noun}: {only}; evaluate both on one test set, "
            f"or ask for the {len(both)} common {noun} alone"
        )
    return both


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def table(summarised: pd.DataFrame) -> str:
    """``summary`` for the terminal: a line per class, "mean (95 % interval)" per metric."""
    rows = []
    for name, lines in summarised.groupby("class", sort=False):
        by_metric = lines.set_index("metric")
        cells = [cell(by_metric.loc[metric], "mean", digits) for metric, (_, digits) in SHOWN.items()]
        rows.append((name, *cells, by_metric.loc["dice", "n"], by_metric.loc["hd95_mm", "skipped"]))
    columns = ("class", *(f">{title}" for title, _ in SHOWN.values()), ">cases", ">no HD95")
    return tables.to_text(columns, rows, title="mean over cases (95 % bootstrap interval)")


def compare_table(compared: pd.DataFrame) -> str:
    """``compare`` for the terminal: a line per class and metric."""
    rows = []
    for line in compared.to_dict("records"):
        digits = 2 if line["metric"] == "hd95_mm" else 4
        means = (f"{line[side]:.{digits}f}" for side in ("a", "b"))
        difference, tests = cell(line, "difference", digits), (f"{line[p]:.2g}" for p in ("p", "p_holm"))
        rows.append((line["class"], line["metric"], *means, difference, *tests, line["n"], line["dropped"]))
    numbers = (">A", ">B", ">B - A", ">p Wilcoxon", ">p Holm", ">pairs", ">dropped")
    title = "paired over cases; B - A (95 % bootstrap interval)"
    return tables.to_text(("class", "metric", *numbers), rows, title)


def to_json(frame: pd.DataFrame) -> bytes:
    """A list of records; NaN becomes null."""
    return frame.to_json(orient="records", indent=1, double_precision=15).encode()


def cell(line: Mapping[str, Any], key: str, digits: int) -> str:
    """A number and its interval."""
    if math.isnan(line[key]):
        return "-"
    return f"{line[key]:.{digits}f} ({line['ci_low']:.{digits}f} to {line['ci_high']:.{digits}f})"
