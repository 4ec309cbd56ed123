"""What a sweep's trials say: the winner, what each key decides, whether the proxy can be trusted; and their page.

Everything works on two tables. The table of trials has a row a trial: ``trial`` (its number), ``status``
("waiting", "running", "done", "stopped", "failed"), ``reason``, ``epochs``, ``objective`` (the last finite
one, more is better), ``final_dice``, ``wall_s``, ``pretrain``, and a column per searched key. The history
has a row a trial and epoch: ``trial``, ``epoch``, ``objective``.

**Stopped trials.** Early stopping leaves objectives of unequal epochs, and a trial that ran on has a higher one
for that alone. So the winner is sought among trials that ran to the end, and the importances use every
trial's objective at one common epoch (``comparable``).

Shapes: N trials, K keys, S splits, R repeats or resamples.
"""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from logonet import reporting
from logonet.core import seeding

MIN_TRIALS = 6  # a forest fitted to two thirds of fewer than these has nothing to find
MIN_PAIRS = 4  # of 3 pairs even the best order of all has p = 1/3
STATUSES = ("done", "stopped", "failed", "running", "waiting")
COMMON = 0.75  # the share of the trials that make an epoch a common one
REPEATS = 5
RESAMPLES = 9999
CONFIDENCE = 0.95


# ------------------------------------------------------------------------------------- the winner


def contenders(table: pd.DataFrame) -> pd.DataFrame:
    """The trials that can win, the best first, with what they are ranked by as ``score``.

    By finetuned Dice where any trial has one; else by the objective, of those that ran to the end; where none
    did yet, of those that have not failed. Of equals the first trial is the better.
    """
    final, objective = _numbers(table, "final_dice"), _numbers(table, "objective")
    for score in (
        final,
        objective.where(table["status"] == "done"),
        objective.where(table["status"] != "failed"),
    ):
        if score.notna().any():
            break
    ranked = table.assign(score=score)[score.notna()]
    return ranked.sort_values(["score", "trial"], ascending=[False, True], ignore_index=True)


def best(table: pd.DataFrame) -> int | None:
    """The number of the trial that wins (see ``contenders``); None where no trial has a finite score."""
    ranked = contenders(table)
    return int(ranked.loc[0, "trial"]) if len(ranked) else None


def _numbers(table: pd.DataFrame, column: str) -> pd.Series:
    """A column as floats; NaN where it has no finite number."""
    values = pd.to_numeric(table[column], errors="coerce").astype(float)
    return values.where(np.isfinite(values))


# ------------------------------------------------------------------------------------- importances


def comparable(table: pd.DataFrame, history: pd.DataFrame) -> tuple[pd.DataFrame, int | None]:
    """The table with every trial's objective at one epoch, and that epoch.

    The epoch is the last one that at least three quarters of the trials with any objective have measured:
    of all the epochs at which nearly all can be compared, the least noisy. Trials without an objective at it
    get NaN. None, and a column of NaN, where nothing was measured.
    """
    measured = history[_numbers(history, "objective").notna()]
    wide = measured.pivot_table(index="trial", columns="epoch", values="objective", aggfunc="last")
    if wide.empty:
        return table.assign(objective=math.nan), None
    epoch = max(e for e in wide.columns if wide[e].notna().sum() >= COMMON * len(wide))
    return table.assign(objective=table["trial"].map(wide[epoch])), int(epoch)


def importance(table: pd.DataFrame, keys: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """How much each searched key decides the objective, of the trials that have a finite one.

    The permutation importance of a random forest (Breiman 2001): by how much its squared error grows when
    the key's values are shuffled among trials, in units of the objective's variance. 0: the key does not
    matter; 1 and more: it decides nearly everything. The error is that on trials the forest was not fitted to
    (three folds, several times over): on its own trials a forest finds every key important, noise too.

    Args:
        table: objectives of equal epochs, see ``comparable``.
        keys: columns; numbers as they are, anything else as categories.
        seed: of folds, forests and shuffles.

    Returns:
        A row a key, the most important first: ``key``, ``importance``, ``std`` (over the repeats) and
        ``note``. Where there is nothing to measure both numbers are NaN and the note says why; where the
        forest does not predict unseen trials at all, the note says that too.
    """
    objective = _numbers(table, "objective")
    counted, y_N = table[objective.notna()], objective.dropna().to_numpy()
    varied = [k for k in keys if counted[k].nunique(dropna=False) > 1]
    out = pd.DataFrame({"key": list(keys), "importance": math.nan, "std": math.nan, "note": ""})
    if len(counted) < MIN_TRIALS:
        trials = f"{len(counted)} trial{'s' * (len(counted) != 1)}"
        out["note"] = f"{trials} with an objective; {MIN_TRIALS} are the least to judge by"
        return out
    if np.ptp(y_N) == 0:
        out["note"] = "all objectives are equal"
        return out
    out.loc[~out["key"].isin(varied), "note"] = "one value only"
    if varied:
        x_NK = np.stack([_encoded(counted[k]) for k in varied], axis=1)
        rows_RK, skill = _held_out_importance(x_NK, (y_N - y_N.mean()) / y_N.std(), seed)
        places = out["key"].map({k: place for place, k in enumerate(varied)})
        tried = places.notna()
        at = places[tried].astype(int)
        out.loc[tried, "importance"] = rows_RK.mean(0)[at]
        out.loc[tried, "std"] = rows_RK.std(0, ddof=1)[at]
        if skill <= 0:
            out.loc[tried, "note"] = "not shown to matter: these keys do not predict unseen trials"
    return out.sort_values("importance", ascending=False, kind="stable", ignore_index=True)


def _encoded(values: pd.Series) -> np.ndarray:
    """Numbers as they are; categories by the order of their text, of which a tree needs only that it is one."""
    if pd.api.types.is_numeric_dtype(values.dropna().infer_objects()):
        return pd.to_numeric(values).to_numpy(np.float64, na_value=np.nan)
    return pd.Categorical(values.map(str)).codes.astype(np.float64)


def _held_out_importance(x_NK: np.ndarray, y_N: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """Importances (R, K) of each repeat's folds, and R2 of the held-out predictions; y has variance 1."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance
    from sklearn.model_selection import RepeatedKFold

    folds = RepeatedKFold(n_splits=3, n_repeats=REPEATS, random_state=seeding.integer(seed, "folds"))
    grown_SK, error = [], 0.0
    for split, (fitted, held_out) in enumerate(folds.split(x_NK)):
        state = seeding.integer(seed, "forest", split)
        forest = RandomForestRegressor(50, random_state=state).fit(x_NK[fitted], y_N[fitted])
        # Not R2: a test fold's own variance would weight a fold of equal trials without bound.
        grown = permutation_importance(
            forest,
            x_NK[held_out],
            y_N[held_out],
            scoring="neg_mean_squared_error",
            n_repeats=5,
            random_state=state,
        )
        grown_SK.append(grown.importances_mean)
        error += float(np.square(forest.predict(x_NK[held_out]) - y_N[held_out]).sum())
    return np.reshape(grown_SK, (REPEATS, 3, -1)).mean(1), 1 - error / REPEATS / len(y_N)


# --------------------------------------------------------------------------------------- the proxy


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
    from scipy import stats

    pairs_2N = np.array([proxy, final], dtype=np.float64).reshape(2, -1)
    pairs_2N = pairs_2N[:, np.isfinite(pairs_2N).all(0)]
    n = pairs_2N.shape[1]
    out: dict[str, Any] = {"n": n, "rho": math.nan, "ci_low": math.nan, "ci_high": math.nan, "p": math.nan}
    if n < 2 or (np.ptp(pairs_2N, axis=1) == 0).any():
        why = "one side is constant" if n > 1 else "two pairs are the least"
        return out | {"note": f"{_pairs(n)}: {why}, so there is no order to compare."}
    out["rho"] = float(_spearman(*pairs_2N))
    if n < MIN_PAIRS:
        return out | {"note": f"{_pairs(n)} prove nothing about the proxy: {MIN_PAIRS} are the least."}
    with warnings.catch_warnings():
        # scipy's own interval is spoilt by the first constant resample, of which it warns; ours leaves them out.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        resampled = stats.bootstrap(
            tuple(pairs_2N),
            _spearman,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=seeding.rng(seed, "bootstrap"),
        )
    rho_R = resampled.bootstrap_distribution
    rho_R = rho_R[~np.isnan(rho_R)]
    exchanged = stats.permutation_test(
        (pairs_2N[0],),
        lambda proxy_N, axis: _spearman(proxy_N, np.broadcast_to(pairs_2N[1], proxy_N.shape), axis=axis),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=seeding.rng(seed, "permutations"),
    )
    out["p"] = float(exchanged.pvalue)
    if np.ptp(rho_R) < 1e-9:
        return out | {"note": f"Every resample of the {n} pairs has one order, so rho has no interval."}
    low, high = np.percentile(rho_R, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    note = "The interval holds 0: the proxy is not shown to order the trials." if low <= 0 <= high else ""
    return out | {"ci_low": float(low), "ci_high": float(high), "note": note}


def _pairs(n: int) -> str:
    return f"{n} trial{'s' * (n != 1)} with a finetuned Dice"


def _spearman(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """Pearson's correlation of the ranks, ties at their mean; NaN where a side is constant.

    scipy's own spearmanr takes one pair of samples at a time.
    """
    from scipy import stats

    a, b = (stats.rankdata(side, axis=axis) for side in (a, b))
    a, b = (side - side.mean(axis, keepdims=True) for side in (a, b))
    scale = np.sqrt((a * a).sum(axis) * (b * b).sum(axis))
    return np.divide((a * b).sum(axis), scale, out=np.full(np.shape(scale), np.nan), where=scale > 0)


# ---------------------------------------------------------------------------------------- the page


def page(
    name: str,
    table: pd.DataFrame,
    history: pd.DataFrame,
    keys: Sequence[str],
    objective_name: str,
    spec_yaml: str,
    best: int | None,
    base: int | None = None,
) -> tuple[str, dict[str, bytes]]:
    """The sweep's page, and its pictures and table as files.

    Args:
        table, history: see the top of this file.
        keys: the searched keys, columns of ``table``.
        objective_name: what the objective is called, such as "probe_dice".
        spec_yaml: the space and settings of the sweep, shown as they are.
        best: number of the winning trial, as ``best`` gives it.
        base: number of the trial of the base setting, if there is one.

    Returns:
        The HTML, self-contained, and ``trials.csv``, ``heat_map.png``, ``parallel.png``, ``importance.png``,
        ``progress.png``, ``proxy.png``: those there is anything to show in.
    """
    files = {"trials.csv": table.to_csv(index=False).encode()}
    sections: list[tuple[str, Any]] = [("Answer", _answer(table, keys, objective_name, best, base))]

    def add(heading: str, file: str, drawn: bytes) -> None:
        files[file] = drawn
        sections.append((heading, drawn))

    axes = reporting.heat_axes(table, keys)
    if axes:
        x, y = axes[0], axes[1] if len(axes) > 1 else None
        add("Heat map", "heat_map.png", reporting.heat_map(table, x, y, objective_name, best))
    if _numbers(history, "objective").notna().any():
        add("Progress", "progress.png", reporting.progress(history, table, best, objective_name))
    if axes and _numbers(table, "objective").notna().any():
        add("All keys", "parallel.png", reporting.parallel(table, keys, objective_name, best))
    at_epoch, epoch = comparable(table, history)
    importances = importance(at_epoch, keys)
    if importances["importance"].notna().any():
        num = at_epoch["objective"].notna().sum()
        note = (
            f"Of the {num} trials with {objective_name} at epoch {epoch}, the last that {COMMON:.0%} of them reached: "
            "objectives of unequal epochs cannot be compared."
        )
        add("What each key decides", "importance.png", reporting.importance_bars(importances, note))
    else:
        why = "; ".join(dict.fromkeys(importances["note"]))
        sections.append(("What each key decides", f"<p>Not known: {html.escape(why)}.</p>"))
    both = table[_numbers(table, "objective").notna() & _numbers(table, "final_dice").notna()]
    heading = "Can the objective be trusted"
    if len(both) > 1:
        correlation = rank_correlation(both["objective"], both["final_dice"])
        add(heading, "proxy.png", reporting.proxy_scatter(both, correlation, objective_name))
    else:
        said = f"{_pairs(len(both))}: whether {objective_name} orders settings as that does is not known."
        sections.append((heading, f"<p>{html.escape(said)}</p>"))
    sections.append(("Trials", _trials(table, keys, objective_name)))
    sections.append(("Specification", f"<pre>{html.escape(spec_yaml)}</pre>"))
    return reporting.run_page(name, sections), files


def _answer(
    table: pd.DataFrame, keys: Sequence[str], objective_name: str, best: int | None, base: int | None
) -> str:
    """Who won, with what, by how much; as paragraphs of HTML."""
    counts = table["status"].value_counts()
    said = {"done": "run to the end", "stopped": "stopped early"}
    count = ", ".join(f"{counts[s]} {said.get(s, s)}" for s in STATUSES if s in counts)
    count = f"{len(table)} trial{'s' * (len(table) != 1)}: {count or 'none has begun'}."
    if best is None:
        return f"<p><b>No trial has an objective yet.</b></p><p>{count}</p>"
    ranked = contenders(table)
    scores = ranked.set_index("trial")["score"]
    by_dice = bool(_numbers(table, "final_dice").notna().any())
    winner = table.set_index("trial").loc[best]
    ended = set(counts.index) <= {"done", "stopped", "failed"}

    def lead(other: int) -> str:
        apart = scores[best] - scores[other]
        return f"{abs(apart):.4f} {'above' if apart >= 0 else 'below'}"

    settings = ", ".join(f"{k} = {_written(winner[k])}" for k in keys if pd.notna(winner[k]))
    score = f"finetuned Dice {scores[best]:.4f}" if by_dice else f"{objective_name} {scores[best]:.4f}"
    if by_dice and math.isfinite(winner["objective"]):
        score += f" ({objective_name} {winner['objective']:.4f})"
    leads = []
    others = [int(t) for t in scores.index if t != best]
    if others:
        and_base = ", the base setting" if others[0] == base else ""
        leads.append(f"{lead(others[0])} the runner-up (trial {others[0]}{and_base})")
    if base is not None and base in others[1:]:
        leads.append(f"{lead(base)} the base setting (trial {base})")
    sentence = (
        f"Trial {best} {'wins' if ended else 'leads so far'}: {settings or 'the base setting'}; {score}"
    )
    sentence += f", {' and '.join(leads)}." if leads else "; no other trial can be compared with it."
    notes = [count]
    if base == best:
        notes.append("It is the base setting itself.")
    elif base is not None and base not in others:
        missed = table.set_index("trial").loc[base]
        why = f" ({missed['reason']})" if missed["reason"] else ""
        notes.append(f"The base setting's trial {base} cannot be compared: {missed['status']}{why}.")
    if winner["status"] != "done":
        notes.append("No trial has run to the end, so objectives of unequal epochs were compared.")
    notes.append(
        "A lead is of one run each and may be chance: `logonet compare` tests two evaluations case by case."
    )
    where = f"<p><code>{html.escape(str(winner['pretrain']))}</code></p>" if winner["pretrain"] else ""
    return f"<p><b>{html.escape(sentence)}</b></p><p>{html.escape(' '.join(notes))}</p>{where}"


def _written(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _trials(table: pd.DataFrame, keys: Sequence[str], objective_name: str) -> pd.DataFrame:
    """What the page shows of the table; where the runs are is in trials.csv."""
    shown = table[["trial", "status", "epochs", "objective", "final_dice", *keys]]
    shown = shown.assign(minutes=_numbers(table, "wall_s") / 60, reason=table["reason"])
    return shown.rename(columns={"objective": objective_name, "final_dice": "finetuned Dice"})
