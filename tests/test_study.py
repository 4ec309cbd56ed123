"""Studies: what is run, what is shared, how they go on, and their statistics against plain loops."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import on_ray, tiny_backbone
from scipy import stats

from jobs import study as job
from logonet import networks, pipelines, training
from logonet.core import config
from logonet.core.errors import Stopped, UserError
from logonet.data import cropping, phantom, prepared_scans, splits
from logonet.inference import statistics
from logonet.pipelines.study_tables import comparisons, labels_saved, proxies
from logonet.storage.artifacts import Artifact
from logonet.training.local import LocalExecutor

STUDIES = Path(job.__file__).parent / "studies"
SIZE = (16, 16, 16)
SPLIT = splits.Config(test_share=0.25, folds=3)  # of 8 phantoms 2 test, 2 validate, 4 train
UNET = [f"backbone={json.dumps({'name': 'unet', **networks.tiny('unet')})}"]
LOGONET = [f"backbone={json.dumps(tiny_backbone())}", "crops.size_vox=[32, 32, 32]"]
SIMMIM = ["method=simmim", "method.unit_vox=[8, 8, 8]"]


def read(**keys: Any) -> pipelines.Study:
    values = {
        "networks": {"unet": UNET},
        "pretexts": {"scratch": None, "simmim": SIMMIM},
        "evaluation": ["infer.overlap=0"],
        "baseline": {"pretext": "scratch"},
        "shots": [4],
    }
    return config.from_dict(pipelines.Study, values | keys)


def runs_of(study: pipelines.Study) -> list[pipelines.StudyRun]:
    train = training.Config(epochs=1, steps_per_epoch=1, global_batch=1, lr=1e-3, warmup_epochs=0)
    first = pipelines.Pretraining(crops=cropping.Config(size_vox=SIZE, per_scan=1), train=train)
    crops = prepared_scans.CropSampling(size_vox=SIZE)
    return pipelines.plan_study(study, first, pipelines.Finetuning(split=SPLIT, crops=crops, train=train))


class Counting(LocalExecutor):
    """Notes what it computes; stops, or refuses a method, when it is told to."""

    def __init__(self, stop_at: int | None = None, refuses: str = "") -> None:
        super().__init__(device="cpu")
        self.stop_at, self.refuses = stop_at, refuses
        self.trained: list[str] = []
        self.items: Counter[str] = Counter()

    def train(self, job: training.Job, dataset: Any) -> dict[str, Any]:
        if len(self.trained) == self.stop_at:
            raise Stopped("asked to stop")
        if job.method.name == self.refuses:
            raise UserError("this method is refused")
        self.trained.append(job.fingerprint)
        return super().train(job, dataset)

    def stream(self, fn: Any, items: Sequence[Any], **how: Any) -> Iterator[tuple[int, Any]]:
        self.items[getattr(fn, "__name__", type(fn).__name__)] += len(items)
        yield from super().stream(fn, items, **how)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> str:
    return phantom.write_dataset(str(tmp_path_factory.mktemp("scans")), 8, size_vox=(36, 32, 32), classes=3)


def run(study: pipelines.Study, scans: str, root: Any, executor: Any, **how: Any) -> Artifact:
    return pipelines.run_study(study, runs_of(study), scans, f"{root}/runs", executor, None, **how)


def table(artifact: Artifact, name: str) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(artifact.read(name)))


SMALL = {"seeds": [0, 1]}


@pytest.fixture(scope="module", autouse=True)
def what_takes_long() -> Iterator[None]:
    """The runs' own pictures and dry runs take most of the time of so small runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "dry_run", lambda *_: None)
        for name in ("reporting.curves", "reporting.organ_boxes", "pipelines.evaluation._cases_picture"):
            patch.setattr(f"logonet.{name}", lambda *_: b"a picture")
        yield


@pytest.fixture(scope="module")
def undisturbed(scans: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Counting]:
    executor = Counting()
    root = tmp_path_factory.mktemp("undisturbed")
    return run(read(**SMALL), scans, root, executor), executor


# ------------------------------------------------------------------------------------------- what is run


def test_the_product_of_all_axes_is_planned_on_one_split_a_fold() -> None:
    study = read(
        networks={"unet": UNET, "logonet": LOGONET}, shots=[2, 4], folds=[0, 2], subsets=[0, 1], seeds=[3, 5]
    )
    runs = runs_of(study)
    assert len(runs) == len({run.name for run in runs}) == 2 * 2 * 2 * 2 * 2 * 2
    pretrainings = {config.fingerprint(run.pretraining) for run in runs if run.pretraining}
    assert len(pretrainings) == 2 * 2 * 2, "label shares and subsets have their pretraining in common"
    for planned in runs:
        tuned = planned.finetuning
        assert (tuned.split.fold, tuned.split.subset) == (planned.fold, planned.subset)
        assert tuned.train.seed == planned.seed + 1000 * planned.subset
        assert planned.labels == f"{tuned.split.shots} cases"
        assert tuned.backbone.name == planned.network
        assert (planned.pretraining is None) == (planned.pretext == "scratch")
        if planned.pretraining is not None:
            own = planned.pretraining
            assert (own.split, own.train.seed) == (splits.Config(0.25, 3, planned.fold), planned.seed)
            assert (own.backbone, own.method.name) == (tuned.backbone, "simmim")


def test_a_part_of_a_study_has_the_same_runs() -> None:
    study = read(
        networks={"unet": UNET, "logonet": LOGONET}, pretexts={"scratch": None, "simmim": SIMMIM, "byol": []}
    )
    assert study.only([]) == study
    of_one = {run.name: run for run in runs_of(study) if run.network == "unet" and run.pretext != "byol"}
    assert {run.name: run for run in runs_of(study.only(["simmim", "unet", "scratch"]))} == of_one
    assert set(study.only(["logonet"]).pretexts) == set(study.pretexts)
    with pytest.raises(UserError, match="did you mean 'simmim'"):
        study.only(["simmin"])
    with pytest.raises(UserError, match="baseline"):
        study.only(["byol"])


def test_a_pretext_says_how_it_is_handed_over() -> None:
    encoder = [*SIMMIM, "finetuning.init.parts=encoder", "finetuning.train.layer_decay=0.5"]
    runs = runs_of(read(pretexts={"whole": SIMMIM, "encoder": encoder}, baseline={}))
    assert [(run.finetuning.init.parts, run.finetuning.train.layer_decay) for run in runs] == [
        ("all", 1.0),
        ("encoder", 0.5),
    ]
    assert runs[0].pretraining == runs[1].pretraining, "one pretraining serves both"


def test_a_pretraining_on_other_scans_leaves_none_out() -> None:
    study = read()
    apart = pipelines.plan_study(study, pipelines.Pretraining(), pipelines.Finetuning(), apart=True)
    assert [run.pretraining.split for run in apart if run.pretraining] == [None]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"networks": {}}, "study.networks is empty"),
        ({"fractions": [0.5]}, "study.shots and study.fractions are both set"),
        ({"seeds": [1, 1]}, "study.seeds names a value twice"),
        ({"folds": [None]}, "a fold is null, which has no validation cases"),
        (
            {"baseline": {"pretext": "simim"}},
            "unknown pretext of study.baseline 'simim'; did you mean 'simmim'",
        ),
        ({"baseline": {"labels": "4"}}, "unknown axis of study.baseline 'labels'"),
        ({"metric": "dise"}, "metric is 'dise'"),
        ({"network": {}}, "unknown config key 'network'; did you mean 'networks'"),
        (
            {"networks": {"odd": ["backbone={name: unet, dimz: 1}"]}},
            "network 'odd' with pretext 'scratch': .*dimz",
        ),
        (
            {"pretexts": {"odd": ["method=simmim", "method.unit_vox=[7, 7, 7]"]}, "baseline": {}},
            "network 'unet' with pretext 'odd': .*7",
        ),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_runs(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        runs_of(read(**keys))


@pytest.mark.parametrize("file", sorted(STUDIES.iterdir()), ids=lambda file: file.stem)
def test_the_studies_in_jobs_can_be_planned(file: Path) -> None:
    runs = job.planned(job.read(file.read_text(), file.name))
    settings = {(run.network, run.pretext) for run in runs}
    assert all(run.finetuning.train.validate_every_epochs == 0 for run in runs), "no checkpoint is chosen"
    assert len(
        job.planned(job.read(file.read_text(), file.name, ("seeds=[0]", "subsets=[0]", "shots=[8]")))
    ) == len(settings)


# ------------------------------------------------------------------------------------------- a whole study


def test_every_score_is_there_and_pages_and_pictures(undisturbed: tuple[Artifact, Counting]) -> None:
    study, executor = undisturbed
    assert len(executor.trained) == len(set(executor.trained)) == 2 + 4
    assert study.facts["runs"] == 4 and study.facts["failed"] == {}
    cases, runs, summary = (table(study, f"{name}.csv") for name in ("cases", "runs", "summary"))
    assert len(cases) == 4 * 2 * 2, "runs x validation cases x classes"
    assert cases.groupby("run")["scan_id"].nunique().eq(2).all()
    assert set(runs["train_cases"]) == {4}
    for line in runs.to_dict("records"):
        own = cases[cases["run"] == line["run"]]
        assert own.groupby("class")["dice"].mean().mean() == pytest.approx(line["dice"])
    means = summary[(summary["class"] == "mean") & (summary["metric"] == "dice")].set_index("pretext")
    for pretext, part in runs.groupby("pretext"):
        assert means.loc[pretext, "mean"] == pytest.approx(part["dice"].mean())
        assert means.loc[pretext, "std_runs"] == pytest.approx(part["dice"].std())
        assert study.facts["means"][f"dice/unet/{pretext}/4 cases"] == pytest.approx(part["dice"].mean())
    compared = table(study, "comparisons.csv")
    assert set(compared["pretext"]) == {"simmim"} and set(compared["baseline"]) == {"unet, scratch, 4 cases"}
    assert list(compared["class"])[-1] == "mean"
    page = study.read("report.html").decode()
    assert page.count("<img") == 2
    # By default the last epoch is not validated, so nothing was chosen.
    assert "judged on the validation cases of their split." in page and "are too high" not in page
    assert r"\toprule" in study.read("table.tex").decode() and r"$\pm$" in study.read("table.tex").decode()


def test_an_interrupted_study_goes_on_and_computes_nothing_twice(
    scans: str, tmp_path: Path, undisturbed: tuple[Artifact, Counting]
) -> None:
    """Stopped in the second of four finetunings."""
    expected, whole = undisturbed
    first, second, third = Counting(stop_at=3), Counting(), Counting()
    with pytest.raises(Stopped):
        run(read(**SMALL), scans, tmp_path, first)
    again = run(read(**SMALL), scans, tmp_path, second)
    assert sorted(first.trained + second.trained) == sorted(whole.trained)
    assert first.items + second.items == whole.items
    assert again.fingerprint == expected.fingerprint
    for name in ("cases.csv", "summary.csv", "comparisons.csv", "table.tex", "labels.png", "ranks.png"):
        assert again.read(name) == expected.read(name), name
    assert run(read(**SMALL), scans, tmp_path, third) == again
    assert third.trained == [] and not third.items


def test_a_run_that_fails_is_reported_and_tried_again(scans: str, tmp_path: Path) -> None:
    partly = run(read(), scans, tmp_path, Counting(refuses="simmim"))
    assert partly.facts["runs"] == 1
    why = "pretraining: this method is refused"
    assert partly.facts["failed"] == {"unet, simmim, 4 cases, fold 0, seed 0": why}
    assert "this method is refused" in partly.read("report.html").decode()
    alone = read(pretexts={"simmim": SIMMIM}, baseline={})
    with pytest.raises(UserError, match=f"none of the 1 runs came to an end; the first: {why}"):
        run(alone, scans, tmp_path, Counting(refuses="simmim"))
    executor = Counting()
    whole = run(read(), scans, tmp_path, executor)
    assert (whole.facts["runs"], whole.facts["failed"]) == (2, {})
    assert len(executor.trained) == 2, "its pretraining and its finetuning"
    assert whole.fingerprint != partly.fingerprint


def test_folds_are_judged_on_their_own_cases(scans: str, tmp_path: Path) -> None:
    study = read(pretexts={"scratch": None}, folds=[0, 2], baseline={}, shots=[], fractions=[1.0])
    done = run(study, scans, tmp_path, Counting())
    cases = table(done, "cases.csv")
    assert cases["scan_id"].nunique() == 4, "the two folds'"
    assert cases.groupby("scan_id")["run"].nunique().eq(1).all()
    assert "ranks.png" not in done.files and "comparisons.csv" in done.files


@pytest.mark.slow
def test_on_ray(bucket: str, ray_local: None, scans: str) -> None:
    """Side by side where there is room, with what a process of each has computed."""
    study = read()
    done = run(study, scans, bucket, on_ray(1))
    assert done.facts["runs"] == 2 and done.facts["failed"] == {}
    assert run(study, scans, bucket, on_ray(1)) == done


@pytest.mark.slow
def test_in_processes_of_this_machine(
    undisturbed: tuple[Artifact, Counting], scans: str, tmp_path: Path
) -> None:
    """Several at once end with what one after the other has ended with."""
    done = run(read(**SMALL), scans, tmp_path, LocalExecutor(device="cpu"), at_once=2)
    columns = ["run", "scan_id", "class", "dice"]
    one, other = (table(artifact, "cases.csv")[columns] for artifact in (undisturbed[0], done))
    pd.testing.assert_frame_equal(one, other)


# ------------------------------------------------------------------------------------------- statistics


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    """Three pretexts, of three runs each, on 12 cases and two classes; one score is missing."""
    rng = np.random.default_rng(0)
    rows = []
    for p, pretext in enumerate(("scratch", "a", "b")):
        for seed in range(3):
            for n in range(12):
                for value, name in ((2, "spleen"), (1, "liver")):
                    dice = 0.6 + 0.02 * p * (name == "liver") + 0.01 * n + 0.03 * rng.standard_normal()
                    dice = math.nan if (pretext, n, name) == ("a", 3, "spleen") else dice
                    setting = {"network": "unet", "pretext": pretext, "labels": "4 cases"}
                    setting |= {"fold": None, "subset": 0, "seed": seed}
                    key = {"run": f"{pretext} {seed}", "scan_id": f"case{n}", "class": name, "value": value}
                    others = {"hd95_mm": 10 * (1 - dice), "nsd_1mm": dice, "nsd_2mm": dice}
                    rows.append({**setting, **key, "dice": dice, **others})
    return pd.DataFrame(rows)


SETTING = ["network", "pretext", "labels"]


def slow_means(rows: pd.DataFrame, key: str, name: str) -> list[float]:
    """One mean for each run, or case: of a class, or the mean of the classes' means."""
    out = []
    for one in dict.fromkeys(rows[key]):
        means = {}
        for c in ("liver", "spleen"):
            found = [d for k, cl, d in zip(rows[key], rows["class"], rows["dice"]) if (k, cl) == (one, c)]
            known = [d for d in found if not math.isnan(d)]
            means[c] = sum(known) / len(known) if known else math.nan
        known = [m for m in means.values() if not math.isnan(m)]
        out.append(means[name] if name != "mean" else sum(known) / len(known))
    return out


@pytest.mark.parametrize("name", ["liver", "spleen", "mean"])
@pytest.mark.parametrize("pretext", ["scratch", "a"])
def test_means_and_deviations_equal_slow_loops(scores: pd.DataFrame, pretext: str, name: str) -> None:
    found = statistics.over_runs(scores, SETTING)
    (line,) = found[
        (found["pretext"] == pretext) & (found["class"] == name) & (found["metric"] == "dice")
    ].to_dict("records")
    part = scores[scores["pretext"] == pretext]
    of_runs, of_cases = (slow_means(part, key, name) for key in ("run", "scan_id"))
    assert line["mean"] == pytest.approx(np.mean(of_runs))
    assert line["std_runs"] == pytest.approx(np.std(of_runs, ddof=1))
    assert line["std_cases"] == pytest.approx(np.nanstd(of_cases, ddof=1))
    assert (line["runs"], line["cases"]) == (3, 11 if (pretext, name) == ("a", "spleen") else 12)


@pytest.mark.parametrize("metric", ["dice", "hd95_mm"])
@pytest.mark.parametrize("name", ["liver", "spleen", "mean"])
def test_comparisons_equal_scipys_tests(scores: pd.DataFrame, metric: str, name: str) -> None:
    a, b = (scores[scores["pretext"] == pretext] for pretext in ("scratch", "a"))
    found = statistics.compare_runs(a, b, metric)
    assert list(found["class"]) == ["liver", "spleen", "mean"]
    (line,) = found[found["class"] == name].to_dict("records")
    a_N, b_N = (np.array(slow_means(part, "scan_id", name)) for part in (a, b))
    a_M, b_M = (np.array(slow_means(part, "run", name)) for part in (a, b))
    difference_N = (b_N - a_N)[~np.isnan(b_N - a_N)]
    assert line["cases"] == len(difference_N)
    assert line["p_cases"] == pytest.approx(stats.wilcoxon(difference_N).pvalue)
    # HD95 here is 10 (1 - Dice): B is better in it where it is smaller.
    assert line["p_runs"] == pytest.approx(stats.ttest_ind(b_M, a_M, alternative="greater").pvalue)
    scale = -10 if metric == "hd95_mm" else 1
    assert line["difference"] == pytest.approx(scale * (b_M.mean() - a_M.mean()))


def test_intervals_are_of_resampled_runs_and_cases(scores: pd.DataFrame) -> None:
    a, b = (scores[scores["pretext"] == pretext] for pretext in ("scratch", "b"))
    (line,) = statistics.compare_runs(a, b, "dice", ["fold", "subset", "seed"])[-1:].to_dict("records")
    by_run = [
        [part[part["scan_id"] == f"case{n}"]["dice"].mean() for n in range(12)]
        for pretext in (a, b)
        for _, part in pretext.groupby("seed")
    ]
    difference_MN = np.array(by_run[3:]) - np.array(by_run[:3])
    assert line["difference"] == pytest.approx(difference_MN.mean())
    rng = np.random.default_rng(1)
    drawn = [
        difference_MN[np.ix_(rng.integers(3, size=3), rng.integers(12, size=12))].mean() for _ in range(4000)
    ]
    assert [line["ci_low"], line["ci_high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=2e-3)
    unpaired = statistics.compare_runs(a, b, "dice")  # by the names of the runs, of which none is in both
    assert unpaired["ci_low"].isna().all()


def test_labels_to_reach_a_score() -> None:
    labels, scores = [2, 8, 32], [0.5, 0.7, 0.6]
    assert statistics.labels_to_reach(0.6, labels, scores) == pytest.approx(4)  # half way, in factors of 2
    assert statistics.labels_to_reach(0.7, labels, scores) == 8
    assert statistics.labels_to_reach(0.4, labels, scores) == 2
    assert statistics.labels_to_reach(0.71, labels, scores) == math.inf
    means = [("scratch", 2, 0.5), ("scratch", 8, 0.7), ("simmim", 2, 0.6), ("simmim", 8, 0.65)]
    frame = pd.DataFrame(means, columns=["pretext", "train_cases", "mean"]).assign(network="unet")
    (line,) = labels_saved(frame, {"pretext": "scratch"}).to_dict("records")
    wanted = {"unet, scratch with 2": "at most 2", "unet, scratch with 8": "over 8"}
    assert line == {"network": "unet", "pretext": "simmim", **wanted}


def test_proxies_are_ranked_by_the_scores_they_go_with() -> None:
    finals = {f"run{i}": {"probe_dice": 0.1 * i, "rank": float(-i), "lr": 0.0, "step": 9} for i in range(5)}
    rows = [(f"run{i}", s, 0.5 + 0.02 * i + 0.001 * s) for i in range(5) for s in range(3)]
    frame = pd.DataFrame(rows, columns=["pretraining", "subset", "dice"]).assign(
        network="unet", labels="4 cases"
    )
    other = frame.iloc[:1].assign(pretraining="", dice=0.9)
    found = proxies(pd.concat([frame, other]), finals, "dice").set_index("measure")
    assert list(found.index) == ["probe_dice", "rank"] and set(found["n"]) == {5}
    assert found["rho"].to_dict() == pytest.approx({"probe_dice": 1.0, "rank": -1.0})
    assert proxies(frame[frame["pretraining"] != "run0"][:9], finals, "dice").empty, (
        "of three there is no order"
    )
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 12))
    one = statistics.rank_correlation(x, y)
    assert one["rho"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert -1 <= one["ci_low"] < one["rho"] < one["ci_high"] <= 1


def test_the_t_test_is_the_papers() -> None:
    """Five runs each: t(8), one-tailed; t = 2.599 has p = 0.016."""
    assert stats.t.sf(2.599, 8) == pytest.approx(0.016, abs=5e-4)
    a_M = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    shift = 2.599 * math.sqrt(2 * a_M.var(ddof=1) / 5)

    def rows(values_M: np.ndarray) -> pd.DataFrame:
        only = {"scan_id": "a", "class": "liver", "value": 1}
        return pd.DataFrame([{"run": str(m), "dice": dice, **only} for m, dice in enumerate(values_M)])

    found = statistics.compare_runs(rows(a_M), rows(a_M + shift), "dice")
    assert found["p_runs"].iloc[-1] == pytest.approx(stats.t.sf(2.599, 8))
    same = statistics.compare_runs(rows(a_M), rows(a_M), "dice").iloc[-1]
    assert (same["p_cases"], same["p_runs"]) == (1.0, 0.5)
    one = statistics.compare_runs(rows(a_M[:1]), rows(a_M[:1]), "dice").iloc[-1]
    assert math.isnan(one["p_runs"])


def test_holm_is_over_the_settings(scores: pd.DataFrame) -> None:
    found = comparisons(scores, "dice", {"pretext": "scratch"})
    assert len(found) == 2 * 3 and set(found["pretext"]) == {"a", "b"}
    for p in ("p_cases", "p_runs"):
        for family in (found["class"] == "mean", found["class"] != "mean"):
            wanted = statistics.holm(found.loc[family, p].to_numpy())
            np.testing.assert_allclose(found.loc[family, f"{p}_holm"], wanted)
    assert comparisons(scores, "dice", {}).empty


def test_ranks_equal_slow_loops_and_demsars_example(scores: pd.DataFrame) -> None:
    wide = statistics.per_case(scores, list(scores["pretext"]), "dice")
    assert wide.shape == (12, 3)
    found = statistics.ranks(wide, "dice")
    slow = dict.fromkeys(wide.columns, 0.0)
    for _, row in wide.iterrows():
        for name in wide.columns:
            better, equal = sum(row > row[name]), sum(row == row[name]) - 1
            slow[name] += (1 + better + equal / 2) / len(wide)
    assert found.mean == pytest.approx(slow)
    assert list(found.mean) == sorted(slow, key=lambda name: slow[name])
    assert found.friedman_p == pytest.approx(stats.friedmanchisquare(*wide.to_numpy().T).pvalue)
    reversed_ranks = statistics.ranks(wide, "hd95_mm").mean
    assert {name: 4 - rank for name, rank in reversed_ranks.items()} == pytest.approx(found.mean)
    # Demsar (2006), section 3.2.2: four classifiers on 14 data sets have q = 2.569 and CD = 1.25.
    example = pd.DataFrame(np.random.default_rng(0).random((14, 4)))
    assert statistics.ranks(example, "dice").critical_difference == pytest.approx(1.25, abs=5e-3)
    alike = statistics.ranks(pd.DataFrame(np.ones((5, 3))), "dice")
    assert alike.friedman_p == 1 and set(alike.mean.values()) == {2.0}
    missing = wide.copy()
    missing.iloc[0, 0] = math.nan
    assert statistics.ranks(missing, "dice").cases == 11
    assert math.isnan(statistics.ranks(wide[["a", "b"]], "dice").friedman_p)
