"""What a sweep's trials say: the winner, what each key decides, whether the proxy can be trusted.

Everything works on two tables: that of `records.table`, with a row a trial, and the history, with a row a trial and
epoch: ``trial``, ``epoch``, ``objective``. More is better in objectives.

**Stopped trials.** Early stopping leaves objectives of unequal epochs, and a trial that ran on has a higher one
for that alone. So the winner is sought among trials that ran to the end, and the importances use every
trial's objective at one common epoch (``comparable``).

Shapes: N trials, K keys, S splits, R repeats or resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from logonet.core import seeding
from logonet.reporting.sweeping import numbers

MIN_TRIALS = 6  # a forest fitted to two thirds of fewer than these has nothing to find
COMMON = 0.75  # the share of the trials that make an epoch a common one
REPEATS = 5


# ------------------------------------------------------------------------------------- the winner


def contenders(table: pd.DataFrame) -> pd.DataFrame:
    """The trials that can win, the best first, with what they are ranked by as ``score``.

    By finetuned Dice where any trial has one; else by the objective, of those that ran to the end; where none
    did yet, of those that have not failed. Of equals the first trial is the better.
    """
    final, objective = numbers(table["final_dice"]), numbers(table["objective"])
    done, failed = table["status"] == "done", table["status"] == "failed"
    scores = [final, objective.where(done), objective.where(~failed)]
    score = next((s for s in scores if s.notna().any()), scores[-1])
    ranked = table.assign(score=score)[score.notna()]
    return ranked.sort_values(["score", "trial"], ascending=[False, True], ignore_index=True)


def best(table: pd.DataFrame) -> int | None:
    """The number of the trial that wins (see ``contenders``); None where no trial has a finite score."""
    ranked = contenders(table)
    return int(ranked.loc[0, "trial"]) if len(ranked) else None


# ------------------------------------------------------------------------------------- importances


def comparable(table: pd.DataFrame, history: pd.DataFrame) -> tuple[pd.DataFrame, int | None]:
    """The table with every trial's objective at one epoch, and that epoch.

    The epoch is the last one that at least three quarters of the trials with any objective have measured:
    of all the epochs at which nearly all can be compared, the least noisy. Trials without an objective at it
    get NaN. None, and a column of NaN, where nothing was measured.
    """
    measured = history[numbers(history["objective"]).notna()]
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
    objective = numbers(table["objective"])
    counted, y_N = table[objective.notna()], objective.dropna().to_numpy()
    varied = [k for k in keys if counted[k].nunique(dropna=False) > 1]
    index = pd.Index(keys, name="key")
    found = pd.DataFrame({"importance": math.nan, "std": math.nan, "note": ""}, index)
    if len(counted) < MIN_TRIALS:
        trials = f"{len(counted)} trial{'s' * (len(counted) != 1)}"
        found["note"] = f"{trials} with an objective; {MIN_TRIALS} are the least to judge by"
    elif np.ptp(y_N) == 0:
        found["note"] = "all objectives are equal"
    else:
        found["note"] = "one value only"
        if varied:
            x_NK = np.stack([_encoded(counted[k]) for k in varied], axis=1)
            rows_RK, skill = _held_out_importance(x_NK, (y_N - y_N.mean()) / y_N.std(), seed)
            note = "not shown to matter: these keys do not predict unseen trials" if skill <= 0 else ""
            found.loc[varied, "importance"] = rows_RK.mean(0)
            found.loc[varied, "std"] = rows_RK.std(0, ddof=1)
            found.loc[varied, "note"] = note
    return found.reset_index().sort_values("importance", ascending=False, kind="stable", ignore_index=True)


def _encoded(values: pd.Series) -> np.ndarray:
    """Numbers as they are; categories by the order of their text: a tree only needs some order."""
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
        state, unseen = seeding.integer(seed, "forest", split), (x_NK[held_out], y_N[held_out])
        forest = RandomForestRegressor(50, random_state=state).fit(x_NK[fitted], y_N[fitted])
        # Not R2: a test fold's own variance would weight a fold of equal trials without bound.
        scoring = "neg_mean_squared_error"
        grown = permutation_importance(forest, *unseen, scoring=scoring, n_repeats=5, random_state=state)
        grown_SK.append(grown.importances_mean)
        error += float(np.square(forest.predict(unseen[0]) - unseen[1]).sum())
    return np.reshape(grown_SK, (REPEATS, 3, -1)).mean(1), 1 - error / REPEATS / len(y_N)
