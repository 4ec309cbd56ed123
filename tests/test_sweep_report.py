"""What a sweep's page says is true: against sums done by hand, slow loops and what is written in its pictures."""

from __future__ import annotations

import io
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import test_records
from matplotlib.colors import to_hex
from matplotlib.text import Text
from scipy import stats
from test_report import check_legible, figure, pixels, words
from test_report_page import Page

from logonet import reporting
from logonet.core.seeding import rng
from logonet.inference import statistics
from logonet.reporting import drawing
from logonet.sweep import analysis, outcome, records
from logonet.sweep import space as spaces

NAN = math.nan
M, PHI, LR = "method.chain_length", "method.phi1", "train.lr"


def sweep(keys, *trials):
    """Table and history of trials: (status, settings, objectives by epoch, and more of the record)."""
    made = []
    for index, (status, settings, curve, *more) in enumerate(trials):
        history = [{"epoch": e, "objective": o} for e, o in enumerate(curve, start=1)]
        chosen = dict(zip(keys, settings))
        made.append(records.Trial(index, chosen, status, history=history, **(more[0] if more else {})))
    rows = [{"trial": t.index, **entry} for t in made for entry in t.history]
    return records.table(made, keys), pd.DataFrame(rows, columns=["trial", "epoch", "objective"])


def grid():
    """The paper's grid: the column of M = 5 and the first ran to the end, one failed, the others were stopped."""
    trials = []
    for m, phi in itertools.product((3, 5, 7), (0.1, 0.2, 0.3)):
        top = 0.5 + 0.05 * (m == 5) - 0.2 * phi
        ended = m == 5 or (m, phi) == (3, 0.1)
        curve = [round(top * (1 - 0.5**e), 4) for e in range(1, (8 if ended else 2) + 1)]
        if (m, phi) == (7, 0.3):
            trials.append(("failed", (m, phi), [], {"reason": "clusterers.k_max <500> is too many"}))
        elif ended:
            more = {"final": {"dice": 0.8 + 0.1 * top, "uri": "f"}, "pretrain": f"s3://b/pretrain/{m}{phi}"}
            trials.append(("done", (m, phi), curve, more))
        else:
            trials.append(("stopped", (m, phi), curve, {"reason": "stopped after epoch 2"}))
    return (*sweep([M, PHI], *trials), [M, PHI])


def random(num=24):
    """Six keys of every kind, of which the learning rate decides."""
    g = rng(0, "random sweep")
    ranges = [{"k_min": 8, "k_max": 40}, {"k_min": 20, "k_max": 100}]
    keys = [M, PHI, LR, "clusterers", "crops.per_scan", "backbone"]
    trials = []
    for i in range(num):
        settings = (
            int(g.integers(1, 10)),
            g.uniform(0.05, 0.5),
            10 ** g.uniform(-4, -2),
            ranges[i % 2],
            int(g.integers(8, 33)),
            ("logonet", "ulkanet", None)[i % 3],
        )
        top = 0.4 + 0.2 * math.log10(settings[2] / 1e-4) + g.normal(0, 0.02)
        status = "failed" if i in (4, 9) else "done" if i % 3 == 0 else "stopped"
        length = {"done": 9, "stopped": 2 + i % 2, "failed": int(i == 4)}[status]
        more = {"final": {"dice": 0.7 + top / 5}} if status == "done" else {}
        trials.append((status, settings, [top * (1 - 0.6**e) for e in range(1, length + 1)], more))
    return (*sweep(keys, *trials), keys)


def running():
    table, history, keys = grid()
    begun = table["trial"] < 5
    table.loc[~begun, ["status", "reason", "objective", "epochs"]] = ["waiting", "", NAN, 0]
    table.loc[4, "status"] = "running"
    return table.assign(final_dice=NAN), history[history["trial"] < 5], keys


SWEEPS = {
    "grid": grid,
    "random": random,
    "running": running,
    "one": lambda: (*sweep([PHI], ("done", (0.1,), [0.3, 0.4])), [PHI]),
    "failed": lambda: (*sweep([PHI], *(("failed", (p,), []) for p in (0.1, 0.2))), [PHI]),
    "one epoch": lambda: (*sweep([PHI], *(("done", (p,), [p]) for p in (0.1, 0.2))), [PHI]),
    "all equal": lambda: (*sweep([PHI], *(("done", (p / 10,), [0.5, 0.5]) for p in range(8))), [PHI]),
    "not begun": lambda: (*sweep([PHI]), [PHI]),
}


# ------------------------------------------------------------------------------------- the winner


@pytest.mark.parametrize(
    ("expected", "trials"),
    [
        # A finetuned Dice beats any proxy.
        (0, [("done", (1,), [0.2], {"final": {"dice": 0.8}}), ("done", (2,), [0.9])]),
        (
            1,
            [
                ("done", (1,), [0.9], {"final": {"dice": 0.7}}),
                ("done", (2,), [0.2], {"final": {"dice": 0.8}}),
            ],
        ),
        # A stopped trial's objective is no end, whatever it is.
        (1, [("stopped", (1,), [0.9]), ("done", (2,), [0.4]), ("done", (3,), [0.3])]),
        (1, [("failed", (1,), [0.9]), ("stopped", (2,), [0.3]), ("running", (3,), [0.2])]),
        (0, [("done", (1,), [0.4]), ("done", (2,), [0.4])]),
        (1, [("done", (1,), [NAN]), ("done", (2,), [NAN, 0.1, NAN])]),
        (None, [("failed", (1,), [0.9]), ("waiting", (2,), []), ("done", (3,), [NAN])]),
        (None, []),
    ],
)
def test_the_best(expected, trials):
    table, _ = sweep([PHI], *trials)
    assert analysis.best(table) == expected


# ------------------------------------------------------------------------------------- importances


@pytest.fixture
def few_forests(monkeypatch):
    """Importances that take a fraction of the time."""
    monkeypatch.setattr(analysis, "REPEATS", 2)


def test_objectives_are_compared_at_the_last_epoch_that_most_reached():
    """Of four trials three must have measured; epochs without a number do not count."""
    table, history = sweep(
        [PHI],
        ("done", (1,), [0.1, 0.2, 0.3, 0.4]),
        ("done", (2,), [0.2, 0.3, 0.5, 0.6]),
        ("stopped", (3,), [0.3, 0.4, NAN]),
        ("failed", (4,), [0.05]),
        ("failed", (5,), []),
    )
    compared, epoch = analysis.comparable(table, history)
    assert epoch == 2
    np.testing.assert_array_equal(compared["objective"], [0.2, 0.3, 0.4, NAN, NAN])
    assert table["objective"].tolist()[:3] == [0.4, 0.6, 0.4]  # as it was
    compared, epoch = analysis.comparable(table, history[:0])
    assert epoch is None and compared["objective"].isna().all()


@pytest.mark.usefixtures("few_forests")
def test_a_key_that_decides_all_has_the_importance_that_a_sum_gives():
    """Of two balanced values, shuffled, half meet the other one's objective, 2 standard deviations away.

    So the squared error grows by half of 2 ** 2, on average; a fold without the balance has less to shuffle.
    """
    g = rng(0, "two values")
    table = pd.DataFrame({"trial": range(60), "backbone": ["a", "b"] * 30, PHI: g.random(60)})
    table["objective"] = np.where(table["backbone"] == "a", 0.4, 0.6)
    found = analysis.importance(table, [PHI, "backbone"])
    assert found["key"].tolist() == ["backbone", PHI]
    assert found.loc[0, "importance"] == pytest.approx(2.0, rel=0.1)
    assert found.loc[1, "importance"] == 0
    assert found["note"].tolist() == ["", ""]
    pd.testing.assert_frame_equal(found, analysis.importance(table, [PHI, "backbone"]))


@pytest.mark.usefixtures("few_forests")
def test_noise_is_not_important():
    """On its own trials a forest finds it so; on others it does not."""
    g = rng(0, "noise")
    table = pd.DataFrame(g.random((24, 4)), columns=[*"abc", "objective"])
    found = analysis.importance(table, [*"abc"])
    assert (found["importance"] < 0.3).all()
    assert found["note"].str.contains("not shown to matter").all()


@pytest.mark.slow
def test_the_learning_rate_of_the_random_sweep_decides():
    table, history, keys = random()
    compared, epoch = analysis.comparable(table, history)
    assert epoch == 2
    found = analysis.importance(compared, keys)
    assert found.loc[0, "key"] == LR and found.loc[0, "importance"] > 0.5
    assert (found["importance"][1:] < 0.2).all() and sorted(found["key"]) == sorted(keys)


@pytest.mark.usefixtures("few_forests")
def test_importances_that_cannot_be_measured_say_why():
    table, _ = sweep([M, PHI], *(("done", (3, p / 10), [float(p)]) for p in range(7)))
    found = analysis.importance(table, [M, PHI]).set_index("key")
    assert found.loc[M, "note"] == "one value only" and math.isnan(found.loc[M, "importance"])
    assert math.isfinite(found.loc[PHI, "importance"])
    # The values of failed trials are none that were measured.
    few = table.assign(objective=[0.1, 0.2, NAN, NAN, NAN, 0.5, 0.6])
    found = analysis.importance(few, [M, PHI])
    assert found["importance"].isna().all()
    assert set(found["note"]) == {"4 trials with an objective; 6 are the least to judge by"}
    assert set(analysis.importance(table.assign(objective=0.5), [M, PHI])["note"]) == {
        "all objectives are equal"
    }


# --------------------------------------------------------------------------------------- the proxy


TIED = ([1.0, 2.0, 2.0, 4.0, 3.0, 7.0], [0.3, 0.2, 0.6, 0.9, 0.6, 0.8])


def test_rank_correlation_against_scipy_and_all_permutations():
    proxy, final = TIED
    found = statistics.rank_correlation([*proxy, NAN, 5.0], [*final, 0.5, math.inf])
    rho = stats.spearmanr(proxy, final).statistic
    assert found["n"] == 6 and found["rho"] == pytest.approx(rho)
    every = np.array([stats.spearmanr(order, final).statistic for order in itertools.permutations(proxy)])
    tails = [(every >= rho - 1e-9).mean(), (every <= rho + 1e-9).mean()]
    assert found["p"] == pytest.approx(2 * min(tails))
    assert statistics.rank_correlation(final, proxy)["rho"] == pytest.approx(rho)


def test_the_interval_is_that_of_all_resamples():
    """All 5 ** 5 resamples of the pairs, less those with a constant side, against some of them drawn."""
    proxy, final = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 3, 5, 4])
    every = []
    for at in itertools.product(range(5), repeat=5):
        drawn = proxy[list(at)], final[list(at)]
        if np.ptp(drawn[0]) and np.ptp(drawn[1]):
            ranks = [stats.rankdata(side) for side in drawn]
            every.append(np.corrcoef(*ranks)[0, 1])
    found = statistics.rank_correlation(proxy, final)
    # A percentile of few distinct values jumps: its neighbours hold it.
    assert np.percentile(every, 2.0) - 1e-9 <= found["ci_low"] <= np.percentile(every, 3.0) + 1e-9
    assert found["ci_high"] == pytest.approx(np.percentile(every, 97.5))
    assert found["ci_low"] < found["rho"] == pytest.approx(0.8)
    assert "is not shown" in found["note"] if found["ci_low"] <= 0 else found["note"] == ""
    assert statistics.rank_correlation(proxy, final) == found


@pytest.mark.parametrize(
    ("proxy", "final", "rho", "said"),
    [
        ([], [], NAN, "0 trials with a finetuned Dice: two pairs are the least"),
        ([1], [2], NAN, "1 trial with a finetuned Dice: two pairs are the least"),
        ([1, 2, 3], [1, 3, 2], 0.5, "3 trials with a finetuned Dice prove nothing"),
        ([1, 1, 1, 1, 1], [1, 2, 3, 4, 5], NAN, "one side is constant"),
        ([1, 2, 3, 4, 5], [2, 4, 6, 8, 9], 1.0, "rho has no interval"),
    ],
)
def test_pairs_that_prove_nothing(proxy, final, rho, said):
    found = statistics.rank_correlation(proxy, final)
    assert found["n"] == len(proxy) and said in found["note"]
    assert found["rho"] == pytest.approx(rho, nan_ok=True)
    assert math.isnan(found["ci_low"]) and math.isnan(found["ci_high"])
    assert found["p"] == pytest.approx(2 / math.factorial(5)) if rho == 1 else math.isnan(found["p"])


# --------------------------------------------------------------------------------------- pictures


def test_the_heat_map_of_the_grid():
    table, _, keys = grid()
    said = words(reporting.heat_map, table, *keys, "probe_dice", 3)
    for row in table.dropna(subset="objective").to_dict("records"):
        assert f"{row['objective']:.4g}" in said
    assert said.count("after epoch 2") == 4 and said.count("failed") == 1
    assert any("outlined: the best, trial 3" in " ".join(t.split()) for t in said)
    assert {M, PHI, "3", "5", "7", "0.1", "0.2", "0.3", "probe_dice of the settings"} <= set(said)


def test_a_cell_has_the_mean_of_the_trials_that_are_comparable():
    table, _ = sweep(
        [M, "backbone"],
        ("done", (3, "a"), [0.1, 0.3]),
        ("done", (3, "a"), [0.1, 0.5]),
        ("stopped", (3, "a"), [0.9]),
        ("failed", (3, "b"), [0.9]),
        ("stopped", (3, "b"), [0.2]),
        ("stopped", (3, "b"), [0.2, 0.3]),
        ("waiting", (7, "b"), []),
        ("failed", (7, "b"), []),
        ("running", (5, None), [0.7]),
    )
    said = words(reporting.heat_map, table, M, "backbone", "Dice")
    assert {"0.4", "2 of 3 trials", "0.25", "after epoch 1 to 2\n2 of 3 trials", "0.7"} <= set(said)
    assert {"waiting, failed\n2 trials", "after epoch 1\nstill running", "a", "b", "not set", "5"} <= set(
        said
    )
    assert not {"nan", "0.9"} & set(said)


def test_stopped_cells_are_lighter_and_hatched_and_the_best_is_outlined():
    objectives = (("done", 1, 0.2), ("done", 2, 0.5), ("stopped", 3, 0.5))
    table, _ = sweep([PHI], *((status, (value,), [o]) for status, value, o in objectives))
    low, done, stopped, outline = figure(reporting.heat_map, table, PHI, None, "Dice", 1).axes[0].patches
    shade = [sum(cell.get_facecolor()[:3]) for cell in (low, stopped, done)]
    assert shade == sorted(shade, reverse=True)  # darker is better
    assert [cell.get_hatch() is None for cell in (low, done, stopped)] == [True, True, False]
    assert outline.get_x() == done.get_x() and not outline.get_fill()
    assert to_hex(outline.get_edgecolor()) == drawing.RED.lower()


def test_numbers_drawn_from_a_range_are_put_in_bins():
    values = [0.01 * i for i in range(1, 21)]
    table, _ = sweep([PHI], *(("done", (v,), [v]) for v in values))
    said = words(reporting.heat_map, table, PHI, None, "Dice")
    assert {"0.01 to 0.04", "0.05 to 0.08", "0.17 to 0.2"} <= set(said)
    assert said.count("4 trials") == 5
    assert f"{np.mean(values[:4]):.4g}" in said


def test_a_heat_map_is_of_the_first_two_keys_that_vary():
    table, _ = sweep([*"abcd"], *(("done", (1, i, "x" * i, i), [0.1]) for i in range(3)))
    assert reporting.heat_axes(table, [*"abcd"]) == ["b", "c"]
    assert reporting.heat_axes(table, ["a", "d"]) == ["d"]
    assert reporting.heat_axes(table[:1], [*"abcd"]) == []


def test_mappings_are_written_as_people_write_them():
    table, _, _ = random()
    assert json.loads(table["clusterers"].iloc[0]) == {"k_min": 8, "k_max": 40}
    said = [
        w.replace("\N{NO-BREAK SPACE}", " ")
        for w in words(reporting.heat_map, table, "clusterers", "backbone", "")
    ]
    assert {"k_min 8, k_max 40", "k_min 20,\nk_max 100", "logonet", "not set"} <= set(said)


def test_lines_run_through_their_settings_to_their_objective():
    settings = [(3, 1e-4, "a"), (3, 1e-3, "b"), (5, 1e-2, "a"), (7, 2e-3, "b")]
    settings += [(7, 10**-e, "a") for e in (2.2, 2.4, 2.6)]
    objectives = [0.1, 0.3, 0.9, 0.5, 0.5, 0.5, 0.5]
    statuses = ["done"] * 6 + ["failed"]
    trials = [(s, v, [o]) for s, v, o in zip(statuses, settings, objectives)]
    table, _ = sweep([M, LR, "backbone"], *trials, ("waiting", (3, 1e-3, "a"), []))
    axes, bar = figure(reporting.parallel, table, [M, LR, "backbone"], "probe_dice", 2).axes
    lines = [line for line in axes.lines if len(line.get_ydata()) > 2]
    assert len(lines) == 7  # not the one that waits
    # The failed first and below, then from the worst to the best.
    np.testing.assert_allclose(lines[0].get_ydata(), [1, 0.7, 0])
    np.testing.assert_allclose(lines[1].get_ydata(), [0, 0, 0, 0])
    np.testing.assert_allclose(lines[2].get_ydata(), [0, 0.5, 1, 0.25])
    np.testing.assert_allclose(lines[-1].get_ydata(), [0.5, 1, 0, 1])
    widths = [line.get_linewidth() for line in lines]
    assert max(widths) == widths[-1] > widths[-2]
    assert {"0.001", "0.01", "a", "b"} <= {text.get_text() for text in axes.texts}
    assert bar.get_ylim() == (0.1, 0.9) and bar.get_ylabel() == "probe_dice"


def test_progress_says_how_each_trial_ended():
    table, history, _ = grid()
    history.loc[0, "objective"] = NAN
    fig = figure(reporting.progress, history, table, 3, "probe_dice")
    last = history.dropna().groupby("trial")["objective"].last()
    assert len(fig.axes[0].lines) == len(last) == 8  # the failed trial has no epoch
    said = [text.get_text() for text in fig.legends[0].get_texts()]
    names = {0: "run to the end", 3: "best", 6: "stopped early"}
    assert {f"{trial}, {name}: {last[trial]:.4g}" for trial, name in names.items()} <= set(said)
    assert [float(line.split(": ")[1]) for line in said] == sorted(last.round(4), reverse=True)
    for line in fig.axes[0].lines:
        trial = int(line.get_label().split(",")[0])
        expected = history[(history["trial"] == trial) & history["objective"].notna()]["objective"]
        np.testing.assert_allclose(line.get_ydata(), expected)


def test_progress_of_many_trials_names_the_best_and_counts_the_others():
    table, history = sweep([PHI], *(("done", (i,), [0.1 + i / 100] * 2) for i in range(30)))
    fig = figure(reporting.progress, history, table, 29, "Dice")
    said = [text.get_text() for text in fig.legends[0].get_texts()]
    assert said[0] == "29, best: 0.39" and said[-1] == "and 10 more" and len(said) == 21


IMPORTANCE = pd.DataFrame(
    {
        "key": [LR, PHI, M],
        "importance": [0.876, -0.001, NAN],
        "std": [0.123, 0.04, NAN],
        "note": ["", "", "one value only"],
    }
)


@pytest.mark.parametrize(("doubt", "expected"), [("", drawing.BLUE), ("not shown to matter", drawing.GREY)])
def test_importances_are_written_and_doubted(doubt, expected):
    table = IMPORTANCE.assign(note=[doubt, doubt, "one value only"])
    fig = figure(reporting.importance_bars, table, "Of 24 trials.")
    said = [" ".join(text.get_text().split()) for text in fig.findobj(Text)]
    assert {LR, PHI, M, "0.88 0.12", "0.00 0.04", "one value only"} <= set(said)
    assert any(f"Grey: {doubt}." in text for text in said) == bool(doubt)
    assert [bar.get_width() for bar in fig.axes[0].patches][:2] == [0.876, -0.001]
    assert to_hex(fig.axes[0].patches[0].get_facecolor()) == expected.lower()


def test_the_scatter_has_every_trial_with_both_and_the_correlation():
    dice = [0.7, 0.75, 0.72, NAN, 0.8, 0.79]
    trials = [("done", (i,), [0.1 * i], {"final": {"dice": d}} if d == d else {}) for i, d in enumerate(dice)]
    table, _ = sweep([PHI], *trials)
    correlation = statistics.rank_correlation(table["objective"], table["final_dice"])
    fig = figure(reporting.proxy_scatter, table, correlation, "probe_dice")
    assert {text.get_text() for text in fig.axes[0].texts} == {"0", "1", "2", "4", "5"}
    said = " ".join(" ".join(text.get_text() for text in fig.findobj(Text)).split())
    assert f"rho {correlation['rho']:.2f}" in said and "n 5" in said
    assert f"{correlation['ci_low']:.2f} to {correlation['ci_high']:.2f}" in said


@pytest.mark.parametrize("name", ["grid", "random", "one epoch"])
def test_pictures_of_a_sweep_are_legible(name):
    table, history, keys = SWEEPS[name]()
    best = analysis.best(table)
    axes = reporting.heat_axes(table, keys)
    if axes:
        check_legible(reporting.heat_map, table, axes[0], axes[1] if axes[1:] else None, "probe_dice", best)
    if best is not None:
        check_legible(reporting.parallel, table, keys, "probe_dice", best)
        check_legible(reporting.progress, history, table, best, "probe_dice")


def test_importances_of_nothing_can_be_drawn():
    drawn = pixels(reporting.importance_bars(IMPORTANCE.assign(importance=NAN, std=NAN, note="equal")))
    assert drawn.std() > 1


# ---------------------------------------------------------------------------------------- the page


def page(name, base=None):
    """The page of a sweep in whose config the settings of trial ``base`` stand."""
    table, history, keys = SWEEPS[name]()
    trials = []
    for row in table.to_dict("records"):
        entries = history[history["trial"] == row["trial"]][["epoch", "objective"]].to_dict("records")
        final = {} if math.isnan(row["final_dice"]) else {"dice": row["final_dice"], "uri": "f"}
        settings = {key: row[key] for key in keys}
        rest = (row["status"], row["reason"], entries, row["pretrain"], final)
        trials.append(records.Trial(row["trial"], settings, *rest))
    spec = replace(
        test_records.SPEC,
        name=f"Sweep <{name}>",
        space={"search": {key: {"grid": [0]} for key in keys}},
        base={} if base is None else spaces.apply({}, trials[base].settings),
        source="a & <b>",
    )
    files = outcome.page(spec, trials)
    html = files.pop("report.html").decode()
    return Page(html), " ".join(html.split()), files


def test_the_page_of_the_grid(few_forests):
    made, html, files = page("grid", base=0)
    text = " ".join(" ".join(made.text).split())
    # Finetuned Dice of trial 3: 0.8 + 0.1 * 0.53; the runner-up has phi1 0.2, the base setting M = 3.
    expected = "Trial 3 wins: method.chain_length = 5, method.phi1 = 0.1; finetuned Dice 0.8530 (probe Dice 0.5279), "
    expected += "0.0020 above the runner-up (trial 4) and 0.0050 above the base setting (trial 0)."
    assert expected in text
    assert "9 trials: 4 run to the end, 4 stopped early, 1 failed." in text
    assert "s3://b/pretrain/50.1" in text
    heads = [
        "Answer",
        "Heat map",
        "Progress",
        "All keys",
        "What each key decides",
        "Can the objective be trusted",
    ]
    places = [html.index(f"<h2>{head}</h2>") for head in [*heads, "Trials", "Specification"]]
    assert places == sorted(places)
    for said in (
        "clusterers.k_max <500> is too many",
        "stopped after epoch 2",
        "source: a & <b>",
        "Sweep <grid>",
    ):
        assert said in text
    pictures = {"heat_map.png", "parallel.png", "importance.png", "progress.png", "proxy.png"}
    assert set(files) == {"trials.csv", *pictures}
    assert made.tags.count("img") == len(pictures)
    fetched = [link for link in made.links if not link.startswith("#")]
    assert all(link.startswith("data:image/png;base64,") for link in fetched)
    for file in pictures:
        assert min(pixels(files[file]).shape[:2]) > 200
    saved = pd.read_csv(io.BytesIO(files["trials.csv"]))
    assert saved[[M, PHI]].to_numpy().tolist() == [[m, p] for m in (3, 5, 7) for p in (0.1, 0.2, 0.3)]


@pytest.mark.parametrize(
    ("name", "base", "said", "files"),
    [
        ("one", 0, ["It is the base setting itself", "no other trial can be compared"], {"progress.png"}),
        ("failed", 0, ["No trial has an objective yet.", "2 trials: 2 failed."], {"heat_map.png"}),
        ("not begun", None, ["No trial has an objective yet.", "0 trials: none has begun."], set()),
        (
            "running",
            0,
            [
                "Trial 3 leads so far",
                "(trial 0, the base setting)",
                "4 waiting",
                "0 trials with a finetuned Dice",
            ],
            {"heat_map.png", "progress.png", "parallel.png"},
        ),
        (
            "all equal",
            None,
            ["Trial 0 wins", "all objectives are equal", "0.0000 above the runner-up (trial 1)"],
            {"heat_map.png", "progress.png", "parallel.png"},
        ),
        (
            "random",
            1,
            ["The base setting's trial 1 cannot be compared: stopped", "24 trials: "],
            {"heat_map.png", "progress.png", "parallel.png", "importance.png", "proxy.png"},
        ),
    ],
)
def test_pages_of_other_sweeps(name, base, said, files, few_forests):
    made, _, found = page(name, base=base)
    text = " ".join(" ".join(made.text).split())
    for part in said:
        assert part in text
    assert set(found) == {"trials.csv", *files}
    assert "nan" not in text.lower().split()


def test_the_command_writes_the_page_and_names_the_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from logonet import cli

    uri = str(tmp_path / "sweep" / "tried")
    spec = replace(test_records.SPEC, base={"method": {"name": "masked_clusters", "phi1": 0.1}})
    records.claim(uri, spec)
    for index, (phi1, value, status) in enumerate([(0.1, 0.6, "done"), (0.2, 0.7, "stopped")]):
        history = [{"epoch": 1, "objective": value}]
        records.write(uri, records.Trial(index, {"method.phi1": phi1}, status, history=history))  # type: ignore[arg-type]
    monkeypatch.setattr("sys.argv", ["logonet", "sweep-report", uri, "--out", str(tmp_path / "out")])
    cli.main()
    said = capsys.readouterr().out
    assert "1 done, 1 stopped" in said
    assert "trial 0  phi1=0.1" in said
    assert {"report.html", "trials.csv", "heat_map.png"} <= {p.name for p in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("sys.argv", ["logonet", "sweep-report", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "holds no sweep" in capsys.readouterr().err
