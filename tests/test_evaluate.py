"""Scores against check values, slow loops and MONAI; statistics against SciPy and plain resampling."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage, stats

from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.inference import metrics, statistics

UNIT = (1.0, 1.0, 1.0)
SPACINGS = [UNIT, (0.7, 0.7, 0.7), (0.8, 1.1, 2.5), (3.0, 0.5, 0.9)]
NAN = math.nan


def cube(side: int, start: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros((40, 40, 40), bool)
    mask[tuple(slice(s, s + side) for s in start)] = True
    return mask


def blob(seed: int, shape: tuple[int, int, int] = (14, 17, 12), share: float = 0.3) -> np.ndarray:
    """A smooth random mask that reaches the border of the array."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.5)
    return noise > np.quantile(noise, 1 - share)


def as_frame(scores_NC: Any, **columns: Any) -> pd.DataFrame:
    """Rows with the given Dice of N cases and C classes, and the other scores made from it."""
    rows = []
    for n, scores_C in enumerate(scores_NC):
        for c, dice in enumerate(scores_C):
            others = {m: dice * (i + 2) for i, m in enumerate(metrics.METRICS[1:])}
            key = {"scan_id": f"case{n:02d}", "value": c + 1, "class": f"organ{c + 1}"}
            rows.append({**key, "dice": dice, **others, "empty": "neither", **columns})
    return pd.DataFrame(rows)


def line_of(frame: pd.DataFrame, name: str, metric: str) -> pd.Series:
    (found,) = frame.index[(frame["class"] == name) & (frame["metric"] == metric)]
    return frame.loc[found]


# --------------------------------------------------------------------------- check values and loops

CHECK_VALUES = [
    (cube(10, (12, 10, 10)), cube(10, (10, 10, 10)), (0.8, 2, 2, 0.7213, 1.0)),
    (cube(10, (13, 10, 10)), cube(10, (10, 10, 10)), (0.7, 3, 3, 0.6475, 0.7623)),
    (cube(10, (10, 10, 10)), cube(12, (10, 10, 10)), (0.7331, 2.2361, 2.3748, 0.5321, 0.9202)),
]


@pytest.mark.parametrize(("pred", "truth", "wanted"), CHECK_VALUES)
def test_check_values(pred: np.ndarray, truth: np.ndarray, wanted: tuple[float, ...]) -> None:
    got = metrics.score(pred, truth, UNIT)
    names = ("dice", "hd95_pooled_mm", "hd95_mm", "nsd_1mm", "nsd_2mm")
    assert [round(got[name], 4) for name in names] == list(wanted)
    assert got["hd95_vox"] == got["hd95_mm"] and got["hd95_pooled_vox"] == got["hd95_pooled_mm"]


def test_a_cube_has_488_surface_voxels() -> None:
    assert metrics.surface(cube(10, (10, 10, 10))).sum() == 488


def slow_surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Foreground voxels with a face neighbour that is background or outside."""
    out = []
    for voxel in itertools.product(*map(range, mask.shape)):
        faces = [(axis, step) for axis in range(3) for step in (-1, 1)]
        neighbours = [tuple(v + step * (a == axis) for a, v in enumerate(voxel)) for axis, step in faces]
        inside = [all(0 <= v < size for v, size in zip(n, mask.shape)) and mask[n] for n in neighbours]
        if mask[voxel] and not all(inside):
            out.append(voxel)
    return out


def slow_distances(a: list[tuple[int, ...]], b: list[tuple[int, ...]], spacing: Any) -> list[float]:
    return [min(math.dist(np.multiply(p, spacing), np.multiply(q, spacing)) for q in b) for p in a]


@pytest.mark.parametrize("points_worth_a_transform", [0.0, math.inf])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_equals_slow_loops(
    share: float, spacing: Any, points_worth_a_transform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "POINTS_WORTH_A_TRANSFORM", points_worth_a_transform)
    rng = np.random.default_rng(int(100 * share))
    pred, truth = (rng.random((5, 7, 4)) < share for _ in range(2))
    got = metrics.score(pred, truth, spacing)
    p, g = slow_surface(pred), slow_surface(truth)
    for unit, scale in (("mm", spacing), ("vox", UNIT)):
        there, back = slow_distances(p, g, scale), slow_distances(g, p, scale)
        largest = max(np.percentile(there, 95), np.percentile(back, 95))
        assert got[f"hd95_{unit}"] == pytest.approx(largest)
        assert got[f"hd95_pooled_{unit}"] == pytest.approx(np.percentile(there + back, 95))
    both_mm = slow_distances(p, g, spacing) + slow_distances(g, p, spacing)
    for name, within_mm in (("nsd_1mm", 1), ("nsd_2mm", 2)):
        assert got[name] == pytest.approx(sum(d <= within_mm + 1e-9 for d in both_mm) / len(both_mm))
    num_pred, num_truth, num_both = (sum(map(bool, m.ravel())) for m in (pred, truth, pred & truth))
    assert got["dice"] == pytest.approx(2 * num_both / (num_pred + num_truth))
    assert got["volume_pred_ml"] == pytest.approx(num_pred * np.prod(spacing) / 1000)
    assert got["volume_error_ml"] == pytest.approx((num_pred - num_truth) * np.prod(spacing) / 1000)


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_tree_and_transform_agree(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (metrics.surface(np.random.default_rng(i).random((20, 31, 17)) < share) for i in range(2))
    found = []
    for points in (0.0, math.inf):
        monkeypatch.setattr(metrics, "POINTS_WORTH_A_TRANSFORM", points)
        found.append(metrics.distances(a, b, (0.7, 1.3, 4.0)))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    assert found[0].max() > 0


def test_a_tolerance_survives_float32_spacings() -> None:
    """Surfaces 5 voxels of 0.2 mm apart are 1 mm apart, though 5 * float32(0.2) is a little more."""
    truth = np.zeros((12, 3, 3), bool)
    truth[1] = True
    spacing = (float(np.float32(0.2)), 1.0, 1.0)
    assert 5 * spacing[0] > 1
    assert metrics.score(np.roll(truth, 5, 0), truth, spacing)["nsd_1mm"] == 1
    assert metrics.score(np.roll(truth, 6, 0), truth, spacing)["nsd_1mm"] == 0


# ------------------------------------------------------------------------------------------- MONAI


@pytest.mark.parametrize("spacing", SPACINGS)
def test_equals_monai(spacing: Any) -> None:
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    noisy = blob(3) ^ (np.random.default_rng(0).random((14, 17, 12)) < 0.03)
    for pred, truth in ((blob(0), blob(1)), (blob(2, share=0.05), blob(2)), (noisy, blob(3))):
        y_pred, y = (torch.from_numpy(m)[None, None].float() for m in (pred, truth))
        hd95 = compute_hausdorff_distance(y_pred, y, include_background=True, percentile=95, spacing=spacing)
        got = metrics.score(pred, truth, spacing)
        assert got["hd95_mm"] == pytest.approx(hd95.item(), rel=1e-5)
        in_voxels = compute_hausdorff_distance(y_pred, y, include_background=True, percentile=95)
        assert got["hd95_vox"] == pytest.approx(in_voxels.item(), rel=1e-5)
        assert got["dice"] == pytest.approx(compute_dice(y_pred, y).item(), rel=1e-5)
        for name, within_mm in (("nsd_1mm", 1.0), ("nsd_2mm", 2.0)):
            nsd = compute_surface_dice(y_pred, y, [within_mm], include_background=True, spacing=spacing)
            assert got[name] == pytest.approx(nsd.item(), rel=1e-5)


def test_empty_masks_equal_monai() -> None:
    import torch
    from monai.metrics import compute_dice, compute_surface_dice

    full, none = blob(0), np.zeros_like(blob(0))
    for pred, truth in itertools.product((full, none), repeat=2):
        y_pred, y = (torch.from_numpy(m)[None, None].float() for m in (pred, truth))
        rows = pd.DataFrame([{"class": "organ", **metrics.score(pred, truth, UNIT)}])
        with warnings.catch_warnings(action="ignore"):
            nsd = compute_surface_dice(y_pred, y, [1.0], include_background=True)
        pairs = [
            (statistics.under_rules(rows, "monai")["dice"], compute_dice(y_pred, y)),
            (statistics.under_rules(rows, "nnformer")["dice"], compute_dice(y_pred, y, ignore_empty=False)),
            (rows["nsd_1mm"], nsd),
        ]
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours.iloc[0], theirs.item())


# ------------------------------------------------------------------------------------- empty masks

RULES = [
    # rule, Dice where both are empty, where truth is, where prediction is
    ("default", NAN, 0.0, 0.0),
    ("nnformer", 1.0, 0.0, 0.0),
    ("unetr", 0.0, 0.0, 0.0),
    ("monai", NAN, NAN, 0.0),
]


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize(("rule", "both", "truth", "prediction"), RULES)
def test_rules_for_empty_masks(
    rule: str, both: float, truth: float, prediction: float, released: bool
) -> None:
    full, none = cube(4, (5, 5, 5)), cube(0, (0, 0, 0))
    pairs = {"both": (none, none), "truth": (full, none), "prediction": (none, full), "neither": (full, full)}
    rows = pd.DataFrame([metrics.score(*pair, UNIT) for pair in pairs.values()])
    before = rows.copy()
    got = statistics.under_rules(rows, rule, released)
    assert list(got["empty"]) == list(pairs)
    np.testing.assert_array_equal(got["dice"], [both, truth, prediction, 1])
    for name in metrics.HD95:
        np.testing.assert_array_equal(got[name], [0, 0, 0, 0] if released else [NAN, NAN, NAN, 0])
    for name in metrics.NSD_MM:
        np.testing.assert_array_equal(got[name], [NAN, 0, 0, 1])
    pd.testing.assert_frame_equal(rows, before)


def test_skipped_cases_are_counted() -> None:
    full, none = cube(4, (5, 5, 5)), cube(0, (0, 0, 0))
    rows = []
    for n, pair in enumerate([(full, full), (none, full), (full, none), (none, none)]):
        rows += metrics.case_rows(*pair, UNIT, {"spleen": (1,)}, f"case{n}")
    frame = pd.DataFrame(rows)
    dice, hd95 = (line_of(statistics.summary(frame), "spleen", m) for m in ("dice", "hd95_mm"))
    assert (dice["mean"], dice["n"], dice["skipped"]) == (pytest.approx(1 / 3), 3, 1)
    assert (hd95["mean"], hd95["n"], hd95["skipped"]) == (0, 1, 3)
    other = statistics.summary(statistics.under_rules(frame, "nnformer", released=True))
    assert line_of(other, "spleen", "dice")["mean"] == 0.5
    assert line_of(other, "spleen", "hd95_mm")["skipped"] == 0


def test_an_unknown_rule_and_no_rows_are_refused() -> None:
    with pytest.raises(UserError, match="'strict' is no rule"):
        statistics.under_rules(as_frame([[0.5]]), "strict")
    with pytest.raises(UserError, match="no case was evaluated"):
        statistics.summary(pd.DataFrame())


# ------------------------------------------------------------------------------------------- a case


def label_map(seed: int) -> np.ndarray:
    labels = np.zeros((14, 17, 12), np.uint8)
    for value in (1, 2, 3, 7):
        labels[blob(10 * seed + value, share=0.1)] = value
    return labels


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "uint64", "float32", "float64", ">i2"])
def test_case_rows_are_the_scores_of_each_class(dtype: str) -> None:
    pred, truth = label_map(1).astype(dtype), label_map(2)
    truth[truth == 7] = 9  # not declared
    classes = {"liver": (3,), "spleen": (1,), "aorta": (5,)}
    rows = metrics.case_rows(pred, truth, (0.8, 0.8, 2.5), classes, "s1")
    assert [(row["scan_id"], row["value"], row["class"]) for row in rows] == [
        ("s1", 3, "liver"),
        ("s1", 1, "spleen"),
        ("s1", 5, "aorta"),
    ]
    for row in rows:  # the box that the rows look into must not matter
        whole = metrics.score(pred == row["value"], truth == row["value"], (0.8, 0.8, 2.5))
        assert {key: row[key] for key in whole} == pytest.approx(whole, nan_ok=True)
    assert [row["empty"] for row in rows] == ["neither", "neither", "both"]


def test_regions_are_the_unions_of_their_values() -> None:
    pred, truth = label_map(1), label_map(2)
    regions = {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    rows = metrics.case_rows(pred, truth, (0.8, 0.8, 2.5), regions, "s1")
    assert [(row["value"], row["class"]) for row in rows] == [(-1, "whole"), (-1, "core"), (3, "enhancing")]
    for row, values in zip(rows, regions.values()):
        whole = metrics.score(np.isin(pred, values), np.isin(truth, values), (0.8, 0.8, 2.5))
        assert {key: row[key] for key in whole} == pytest.approx(whole, nan_ok=True)


def test_masks_apart_are_scored_in_the_box_of_both() -> None:
    pred, truth = cube(3, (1, 30, 8)), cube(4, (25, 2, 11))
    (row,) = metrics.case_rows(pred, truth, (1.0, 1.5, 2.0), {"spleen": (1,)}, "s1")
    whole = metrics.score(pred, truth, (1.0, 1.5, 2.0))
    assert {key: row[key] for key in whole} == pytest.approx(whole)
    assert (row["dice"], row["volume_pred_ml"]) == (0, pytest.approx(0.081)) and row["hd95_mm"] > 40


@pytest.mark.parametrize(
    ("pred", "spacing", "words"),
    [
        (np.zeros((4, 4, 5), np.uint8), UNIT, r"scan s1: .*\(4, 4, 5\).*\(4, 4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), (1.0, 0.0, 1.0), "scan s1: the spacing"),
        (np.zeros((4, 4, 4), np.uint8), (1.0, NAN, 1.0), "scan s1: the spacing"),
        (np.zeros((4, 4, 4), np.uint8), (1.0, 1.0), "scan s1: the spacing"),
        (np.full((4, 4, 4), 0.5), UNIT, "scan s1: some labels are not whole"),
        (np.full((4, 4, 4), NAN), UNIT, "scan s1: some labels are not whole"),
    ],
)
def test_bad_input_is_refused_by_name(pred: np.ndarray, spacing: Any, words: str) -> None:
    with pytest.raises(UserError, match=words), np.errstate(invalid="ignore"):
        metrics.case_rows(pred, np.zeros((4, 4, 4), np.uint8), spacing, {"spleen": (1,)}, "s1")


# -------------------------------------------------------------------------------------- properties

masks = hnp.arrays(bool, (4, 5, 3))
spacings = st.tuples(*[st.floats(0.3, 5)] * 3)


@settings(deadline=None, max_examples=80)
@given(masks, masks, spacings)
def test_properties(pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, float, float]) -> None:
    got = metrics.score(pred, truth, spacing)
    diagonal_mm = math.dist((0, 0, 0), np.multiply(pred.shape, spacing))
    assert all(math.isnan(got[name]) or 0 <= got[name] <= 1 for name in ("dice", "nsd_1mm", "nsd_2mm"))
    assert all(
        math.isnan(got[name]) or 0 <= got[name] <= diagonal_mm for name in ("hd95_mm", "hd95_pooled_mm")
    )
    assert math.isnan(got["hd95_mm"]) == (got["empty"] != "neither")
    if got["empty"] == "neither":
        assert got["nsd_1mm"] <= got["nsd_2mm"]

    swapped = metrics.score(truth, pred, spacing)
    scores = ("dice", *metrics.HD95, *metrics.NSD_MM)
    assert {m: swapped[m] for m in scores} == pytest.approx({m: got[m] for m in scores}, nan_ok=True)
    assert swapped["volume_error_ml"] == -got["volume_error_ml"]

    turned = metrics.score(pred.transpose(2, 0, 1), truth.transpose(2, 0, 1), (spacing[2], *spacing[:2]))
    assert {m: turned[m] for m in scores} == pytest.approx({m: got[m] for m in scores}, nan_ok=True)

    twice = metrics.score(pred, truth, tuple(2 * s for s in spacing))
    assert twice["hd95_mm"] == pytest.approx(2 * got["hd95_mm"], nan_ok=True)
    assert twice["hd95_vox"] == pytest.approx(got["hd95_vox"], nan_ok=True)

    itself = metrics.score(truth, truth, spacing)
    assert not truth.any() or (itself["dice"], itself["hd95_mm"], itself["nsd_1mm"]) == (1, 0, 1)


# --------------------------------------------------------------------------------------- statistics


@pytest.fixture
def scores_NC() -> np.ndarray:
    """Dice of 25 cases and 3 classes, some undefined."""
    rng = np.random.default_rng(0)
    scores_NC = rng.beta(8, 2, (25, 3)) - [0, 0.1, 0.3]
    scores_NC[rng.random((25, 3)) < 0.15] = NAN
    return scores_NC


def test_summary_by_hand(scores_NC: np.ndarray) -> None:
    got = statistics.summary(as_frame(scores_NC))
    assert got["class"].unique().tolist() == ["organ1", "organ2", "organ3", "mean"]
    assert len(got) == 4 * len(metrics.METRICS)
    for c in range(3):
        values = scores_NC[:, c][~np.isnan(scores_NC[:, c])]
        line = line_of(got, f"organ{c + 1}", "dice")
        wanted = (np.mean(values), np.std(values, ddof=1), np.median(values), len(values), 25 - len(values))
        assert tuple(line[["mean", "std", "median", "n", "skipped"]]) == pytest.approx(wanted)
    mean = line_of(got, "mean", "dice")
    assert mean["mean"] == pytest.approx(np.nanmean(np.nanmean(scores_NC, 0)))
    assert mean["mean"] != pytest.approx(np.nanmean(scores_NC))  # classes first, not all scores alike
    assert mean["std"] == pytest.approx(np.std(np.nanmean(scores_NC, 1), ddof=1))
    assert (mean["n"], mean["skipped"]) == (25, np.isnan(scores_NC).sum())


def test_intervals_equal_plain_resampling(scores_NC: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 40)
    got = statistics.summary(as_frame(scores_NC), seed=3)
    times_RN = seeding.rng(3, "bootstrap").multinomial(25, np.full(25, 1 / 25), size=40)
    means_RC = [np.nanmean(np.repeat(scores_NC, times_N, axis=0), axis=0) for times_N in times_RN]
    for name, means_R in [
        *((f"organ{c + 1}", [m[c] for m in means_RC]) for c in range(3)),
        ("mean", [np.mean(m) for m in means_RC]),
    ]:
        line = line_of(got, name, "dice")
        assert tuple(line[["ci_low", "ci_high"]]) == pytest.approx(tuple(np.percentile(means_R, [2.5, 97.5])))


def test_intervals_equal_scipy(scores_NC: np.ndarray) -> None:
    values_N = scores_NC[:, 0][~np.isnan(scores_NC[:, 0])]
    line = line_of(statistics.summary(as_frame(values_N[:, None])), "organ1", "dice")
    theirs = stats.bootstrap((values_N,), np.mean, method="percentile", rng=np.random.default_rng(0))
    width = line["ci_high"] - line["ci_low"]
    assert line["ci_low"] == pytest.approx(theirs.confidence_interval.low, abs=0.05 * width)
    assert line["ci_high"] == pytest.approx(theirs.confidence_interval.high, abs=0.05 * width)


def test_intervals_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    """About 95 % of intervals hold the true mean (fewer at 40 skewed cases, as is known of percentiles)."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    held = 0
    for seed in range(200):
        values_NC = np.random.default_rng(seed).beta(8, 2, (40, 1))
        low, high, *_ = statistics._intervals(values_NC, statistics._resamples(40, seed))
        held += bool(low[0] <= 0.8 <= high[0])
    assert 0.89 <= held / 200 <= 0.985


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("scores", "mean", "low", "high", "n"),
    [
        ([[0.7]], 0.7, 0.7, 0.7, 1),
        ([[0.7]] * 9, 0.7, 0.7, 0.7, 9),
        ([[NAN]] * 3, NAN, NAN, NAN, 0),
        ([[NAN]], NAN, NAN, NAN, 0),
        ([[NAN], [0.4]], 0.4, 0.4, 0.4, 1),
    ],
)
def test_degenerate_summaries(scores: Any, mean: float, low: float, high: float, n: int) -> None:
    got = statistics.summary(as_frame(scores))
    for name in ("organ1", "mean"):
        line = line_of(got, name, "dice")
        assert tuple(line[["mean", "ci_low", "ci_high"]]) == pytest.approx((mean, low, high), nan_ok=True)
        assert line["n"] == n
    assert "organ1" in statistics.table(got)


@pytest.mark.filterwarnings("error")
def test_a_class_without_scores_is_left_out_of_the_mean() -> None:
    line = line_of(statistics.summary(as_frame([[0.2, NAN], [0.4, NAN]])), "mean", "dice")
    assert (line["mean"], line["skipped"]) == (pytest.approx(0.3), 2)


def test_statistics_do_not_depend_on_the_order_of_rows(scores_NC: np.ndarray) -> None:
    a = as_frame(scores_NC)
    b = as_frame(scores_NC[::-1] + 0.01)
    shuffled_a, shuffled_b = (frame.sample(frac=1, random_state=i) for i, frame in enumerate((a, b)))
    pd.testing.assert_frame_equal(statistics.summary(a), statistics.summary(shuffled_a))
    pd.testing.assert_frame_equal(statistics.compare(a, b), statistics.compare(shuffled_a, shuffled_b))


def test_intervals_depend_on_the_seed_alone(scores_NC: np.ndarray) -> None:
    a = as_frame(scores_NC)
    pd.testing.assert_frame_equal(statistics.summary(a, seed=1), statistics.summary(a, seed=1))
    assert not statistics.summary(a, seed=1)["ci_low"].equals(statistics.summary(a, seed=2)["ci_low"])


def test_a_scan_scored_twice_is_refused() -> None:
    a = as_frame([[0.5, 0.6]])
    with pytest.raises(UserError, match="case00 has two scores of organ1"):
        statistics.summary(pd.concat([a, a]))


# --------------------------------------------------------------------------------------- comparison


def test_compare_by_hand(scores_NC: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    other_NC = scores_NC + rng.normal(0.02, 0.05, scores_NC.shape)
    other_NC[3, 0] = NAN
    difference_NC = other_NC - scores_NC
    got = statistics.compare(as_frame(scores_NC), as_frame(other_NC))
    assert set(got["metric"]) == {"dice", "hd95_mm", "nsd_1mm", "nsd_2mm"}
    p_C = []
    for c in range(3):
        line = line_of(got, f"organ{c + 1}", "dice")
        pairs = difference_NC[:, c][~np.isnan(difference_NC[:, c])]
        assert (line["n"], line["dropped"]) == (len(pairs), 25 - len(pairs))
        assert line["difference"] == pytest.approx(pairs.mean()) == pytest.approx(line["b"] - line["a"])
        assert line["p"] == pytest.approx(stats.wilcoxon(pairs).pvalue)
        theirs = stats.bootstrap((pairs,), np.mean, method="percentile", rng=np.random.default_rng(0))
        width = line["ci_high"] - line["ci_low"]
        # ours resamples cases, some of which have no pair here: a little wider at most
        assert line["ci_low"] == pytest.approx(theirs.confidence_interval.low, abs=0.08 * width)
        assert line["ci_high"] == pytest.approx(theirs.confidence_interval.high, abs=0.08 * width)
        p_C.append(line["p"])
    p_holm = [line_of(got, f"organ{c + 1}", "dice")["p_holm"] for c in range(3)]
    assert p_holm == pytest.approx(statistics.holm(np.array(p_C)))
    mean = line_of(got, "mean", "dice")
    assert mean["difference"] == pytest.approx(np.nanmean(difference_NC, 0).mean())
    assert mean["ci_low"] < mean["difference"] < mean["ci_high"]
    assert mean["p"] == mean["p_holm"] == pytest.approx(stats.wilcoxon(np.nanmean(difference_NC, 1)).pvalue)


def test_compare_is_antisymmetric(scores_NC: np.ndarray) -> None:
    a, b = as_frame(scores_NC), as_frame(scores_NC**2)
    there, back = statistics.compare(a, b), statistics.compare(b, a)
    for mine, theirs in (("difference", "difference"), ("ci_low", "ci_high"), ("ci_high", "ci_low")):
        np.testing.assert_allclose(there[mine], -back[theirs])
    np.testing.assert_allclose(there[["p", "p_holm"]], back[["p", "p_holm"]])


@pytest.mark.filterwarnings("error")
def test_degenerate_comparisons(scores_NC: np.ndarray) -> None:
    a = as_frame(scores_NC)
    same = statistics.compare(a, a)
    assert (same[["difference", "ci_low", "ci_high"]] == 0).all(axis=None)
    assert (same[["p", "p_holm"]] == 1).all(axis=None)

    tied_NC = scores_NC.copy()
    tied_NC[:15] += 0.05  # ten differences are zero, the others tie
    line = line_of(statistics.compare(a, as_frame(tied_NC)), "organ1", "dice")
    assert 0 < line["p"] < 0.01

    nothing = statistics.compare(as_frame([[NAN, 0.5]] * 3), as_frame([[0.5, 0.6]] * 3))
    line = line_of(nothing, "organ1", "dice")
    assert (line["n"], line["dropped"]) == (0, 3)
    assert line[["a", "b", "difference", "ci_low", "p", "p_holm"]].isna().all()
    assert line_of(nothing, "mean", "dice")["difference"] == pytest.approx(0.1)
    assert line_of(statistics.compare(as_frame([[0.4]]), as_frame([[0.5]])), "organ1", "dice")["p"] == 1
    assert "organ1" in statistics.compare_table(nothing)


def test_compare_asks_for_the_same_scans(scores_NC: np.ndarray) -> None:
    a, b = as_frame(scores_NC), as_frame(scores_NC + 0.1)
    b_less = b[b["scan_id"] >= "case05"]
    with pytest.raises(
        UserError, match=r"scans: case00, case01, case02 and 2 more only in A;.* 20 common scans"
    ):
        statistics.compare(a, b_less)
    got = statistics.compare(a, b_less, common=True)
    pd.testing.assert_frame_equal(got, statistics.compare(a[a["scan_id"] >= "case05"], b_less))
    with pytest.raises(UserError, match="different classes: organ3 only in B"):
        statistics.compare(a[a["class"] != "organ3"], b)
    with pytest.raises(UserError, match="no scans in common"):
        statistics.compare(a[a["scan_id"] < "case05"], b_less, common=True)
    # case00 of A has the class alone that B lacks
    lone = a[(a["scan_id"] != "case00") | (a["class"] == "organ3")]
    got = statistics.compare(lone, b[b["class"] != "organ3"], common=True)
    assert list(got["class"].unique()) == ["organ1", "organ2", "mean"]
    assert line_of(got, "organ1", "dice")["n"] == (~np.isnan(scores_NC[1:, 0])).sum()


def test_compare_where_labels_are_partial(scores_NC: np.ndarray) -> None:
    """Scans of which only some classes are labelled have no rows for the others."""
    a, b = as_frame(scores_NC), as_frame(scores_NC + 0.1)
    partial = ~((a["scan_id"] < "case05") & (a["class"] == "organ1"))
    got = line_of(statistics.compare(a[partial], b), "organ1", "dice")
    assert got["n"] == (~np.isnan(scores_NC[5:, 0])).sum()
    assert (
        line_of(statistics.summary(a[partial]), "organ1", "dice")["skipped"]
        == np.isnan(scores_NC[5:, 0]).sum()
    )


@pytest.mark.parametrize(
    ("p", "wanted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # R: p.adjust(c(.01, .04, .03, .005), "holm")
        ([0.5, 0.9], [1, 1]),
        ([0.02], [0.02]),
        ([NAN, 0.02, NAN, 0.03], [NAN, 0.04, NAN, 0.04]),
        ([NAN], [NAN]),
    ],
)
def test_holm(p: list[float], wanted: list[float]) -> None:
    np.testing.assert_allclose(statistics.holm(np.array(p)), wanted)


# --------------------------------------------------------------------------------------------- text


def test_as_text(scores_NC: np.ndarray) -> None:
    frame = as_frame(scores_NC).replace({"class": {"organ2": "tumour [old]"}})
    got = statistics.summary(frame)
    lines = statistics.table(got).splitlines()
    assert any("tumour [old]" in line and f"{np.nanmean(scores_NC[:, 1]):.3f} (" in line for line in lines)
    records = json.loads(statistics.to_json(got))
    assert len(records) == len(got)
    assert pd.DataFrame(records)["mean"].to_numpy() == pytest.approx(got["mean"].to_numpy(), rel=1e-12)
    one = statistics.summary(as_frame([[0.7]]))
    assert json.loads(statistics.to_json(one))[0]["std"] is None
    compared = statistics.compare_table(statistics.compare(frame, frame))
    assert "tumour [old]" in compared and "0.0000 (0.0000 to 0.0000)" in compared
