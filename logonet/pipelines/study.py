"""A study: networks x pretexts x labels x folds x subsets x seeds, each run judged, all compared with a baseline.

Every run is an ordinary pretraining, finetuning and evaluation, an artifact at its own address. So runs share what they
have in common, nothing is computed twice, and the same command goes on after any kill.
"""

from __future__ import annotations

import html
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import pandas as pd

from logonet import reporting
from logonet.core import config, tables
from logonet.core.config import Fraction, Natural, Section
from logonet.core.errors import UserError, user_sentence
from logonet.data import splits
from logonet.inference import statistics
from logonet.pipelines import stage, study_tables
from logonet.pipelines.evaluation import Evaluation, evaluate_model, scores_of
from logonet.pipelines.finetuning import Finetuning, finetune, resolve_finetuning
from logonet.pipelines.preparation import import_scans, make_cases
from logonet.pipelines.pretraining import Pretraining, pretrain, resolve, upstream
from logonet.pipelines.stage import Made, StageExecutor, Trial, open_stage, run_tracked, say
from logonet.pipelines.study_tables import REPEATS, SETTING
from logonet.storage.artifacts import Artifact

TUNED = "finetuning."
SEEDS_APART = 1000  # of finetunings on different subsets, which all labels together would not tell apart
Metric = Literal["dice", "hd95_mm", "nsd_1mm", "nsd_2mm"]


class StudyExecutor(StageExecutor, Protocol):
    """What studies run on."""

    def side_by_side(
        self, fn: Callable[[Any, Any], Any], items: Sequence[Any], at_once: int = 0
    ) -> Iterator[tuple[int, Any]]:
        """(position, answer or exception) of ``fn(executor, item)`` for every item, as they end."""


@dataclass(frozen=True)
class Base:
    """What all runs start from.

    Attributes:
        recipe: a named config, as `jobs/pretrain.py --list-recipes` shows them.
        set: settings laid on it.
    """

    recipe: str = "small"
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study(Section, key="study"):
    """What is compared. The product of all axes is run.

    Attributes:
        networks: name -> settings that make it, laid on pretraining and finetuning: {dynunet: [backbone=dynunet]}.
        pretexts: name -> settings of the pretraining, {simmim: [method=simmim]}; null does not pretrain. Those that
            begin with "finetuning." are the finetuning's: {encoder: [method=simmim, finetuning.init.parts=encoder]}.
        pretraining, finetuning: recipe and settings that all runs start from.
        evaluation: settings of the evaluation, such as infer.mirror=true.
        shots: training subjects of a run, [1, 5, 20]; empty takes ``fractions``.
        fractions: shares of the training subjects.
        folds: of ``finetuning``'s split; pretraining leaves out the same cases.
        subsets: draws of the training subjects that ``shots`` or ``fractions`` take, [0, 1, 2]; one pretraining serves
            all. Finetunings on different ones also have different seeds.
        seeds: of pretraining and finetuning; the split keeps its own.
        judged_on: cases of each run's split. With "val" give train.validate_every_epochs=0, or they choose the
            checkpoint.
        metric: what runs are compared by.
        baseline: what each setting is compared with: the setting with this network, or pretext, and otherwise the same:
            {pretext: scratch}.
    """

    networks: dict[str, tuple[str, ...]]
    pretexts: dict[str, tuple[str, ...] | None]
    pretraining: Base = field(default_factory=Base)
    finetuning: Base = field(default_factory=Base)
    evaluation: tuple[str, ...] = ()
    shots: tuple[int, ...] = ()
    fractions: tuple[Fraction, ...] = (1.0,)
    folds: tuple[Natural | None, ...] = (0,)
    subsets: tuple[Natural, ...] = (0,)
    seeds: tuple[int, ...] = (0,)
    judged_on: Literal["test", "val"] = "val"  # not "on", which is true in YAML
    metric: Metric = "dice"
    baseline: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for axis in ("networks", "pretexts", "folds", "subsets", "seeds"):
            if not getattr(self, axis):
                raise UserError(f"study.{axis} is empty; name at least one")
        for axis in ("shots", "fractions", "folds", "subsets", "seeds"):
            if len(set(getattr(self, axis))) < len(getattr(self, axis)):
                raise UserError(f"study.{axis} names a value twice; keep one of them")
        if self.shots and self.fractions != (1.0,):
            raise UserError("study.shots and study.fractions are both set; set one of them only")
        if self.judged_on == "val" and None in self.folds:
            raise UserError(
                "study.judged_on is val and a fold is null, which has no validation cases; set study.judged_on=test"
            )
        known = {"network": list(self.networks), "pretext": list(self.pretexts)}
        for axis, name in self.baseline.items():
            if axis not in known:
                raise UserError(config.unknown("axis of study.baseline", axis, known))
            if name not in known[axis]:
                raise UserError(config.unknown(f"{axis} of study.baseline", name, known[axis]))

    def only(self, names: Sequence[str]) -> Study:
        """The study with those of its networks and pretexts that ``names`` has; of an axis without any, all.

        Raises:
            UserError: a name is of neither, or the baseline is not among them.
        """
        known = {*self.networks, *self.pretexts}
        for name in names:
            if name not in known:
                raise UserError(config.unknown("network or pretext of the study", name, known))
        networks = {name: settings for name, settings in self.networks.items() if name in names}
        pretexts = {name: settings for name, settings in self.pretexts.items() if name in names}
        return replace(self, networks=networks or self.networks, pretexts=pretexts or self.pretexts)

    @property
    def labels(self) -> dict[str, dict[str, Any]]:
        """Name of each number of labels -> keys of the split."""
        if self.shots:
            return {f"{n} cases": {"shots": n, "fraction": 1.0} for n in self.shots}
        return {f"{100 * f:.3g} %": {"shots": None, "fraction": f} for f in self.fractions}


@dataclass(frozen=True)
class StudyRun:
    """One run of a study, before it has been made.

    Attributes:
        pretraining: None for one that starts from random weights.
    """

    network: str
    pretext: str
    labels: str
    fold: int | None
    subset: int
    seed: int
    finetuning: Finetuning
    pretraining: Pretraining | None

    @property
    def name(self) -> str:
        subset = f", subset {self.subset}" if self.subset else ""
        return f"{self.network}, {self.pretext}, {self.labels}, fold {self.fold}{subset}, seed {self.seed}"


def plan_study(
    study: Study, pretraining: Pretraining, finetuning: Finetuning, *, apart: bool = False
) -> list[StudyRun]:
    """All runs of ``study``, checked as far as that goes without data.

    Args:
        pretraining, finetuning: what they start from.
        apart: pretraining is on other scans than finetuning, so it leaves out no cases.

    Raises:
        UserError: naming the network and pretext that cannot be run.
    """
    axes = itertools.product(
        study.networks.items(),
        study.pretexts.items(),
        study.labels.items(),
        study.folds,
        study.subsets,
        study.seeds,
    )
    runs = []
    for (network, of_network), (pretext, of_pretext), (labels, share), fold, subset, seed in axes:
        of_tuned = [s.removeprefix(TUNED) for s in of_pretext or () if s.startswith(TUNED)]
        split = {"split": {**share, "fold": fold, "subset": subset}}
        tuned = _laid_on(
            finetuning, (*of_network, *of_tuned, f"train.seed={seed + SEEDS_APART * subset}"), split
        )
        first = None
        if of_pretext is not None:
            own = [s for s in of_pretext if not s.startswith(TUNED)]
            first = _laid_on(pretraining, (*of_network, *own, f"train.seed={seed}"), {})
            first = replace(
                first, split=None if apart else replace(tuned.split, fraction=1.0, shots=None, subset=0)
            )
        runs.append(StudyRun(network, pretext, labels, fold, subset, seed, tuned, first))
    for (network, pretext), some in itertools.groupby(runs, lambda run: (run.network, run.pretext)):
        run = next(some)
        try:
            resolve_finetuning(run.finetuning)
            if run.pretraining is not None:
                resolve(run.pretraining)
        except UserError as err:
            raise UserError(f"network '{network}' with pretext '{pretext}': {err}") from None
    return runs


def _laid_on(base: Any, settings: Sequence[str], values: Mapping[str, Any]) -> Any:
    own = config.merge(config.override(config.to_dict(base), settings), values)
    return config.from_dict(type(base), own)


@dataclass(frozen=True)
class _Where:
    """Where runs read and write; plain data, which travels to their processes."""

    source: str
    unlabelled: str
    root: str
    experiment: str | None
    evaluation: Evaluation
    trial: Trial

    def pretrain(self, executor: StageExecutor, cfg: Pretraining) -> str:
        where = self.unlabelled or self.source, self.root, executor, self.experiment
        return pretrain(cfg, *where, labelled=self.source, trial=self.trial).uri

    def judge(self, executor: StageExecutor, cfg: Finetuning) -> str:
        """Finetune and evaluate; the evaluation's URI."""
        where = self.source, self.root, executor, self.experiment
        tuned = finetune(cfg, *where, trial=self.trial)
        return evaluate_model(self.evaluation, tuned.uri, *where).uri


def run_study(
    study: Study,
    runs: Sequence[StudyRun],
    source: str,
    root: str,
    executor: StudyExecutor,
    experiment: str | None,
    *,
    name: str = "study",
    unlabelled: str = "",
    at_once: int = 0,
) -> Artifact:
    """Do what is missing of ``runs`` and compare them all. Run again, it goes on.

    A run that fails is reported, with the reason, and the others go on; the artifact is then of the others.

    Args:
        runs: as `plan_study` made them.
        source: labelled scans.
        unlabelled: scans to pretrain on; "" for ``source``.
        at_once: runs side by side; 0 for as many as the cluster has room for.

    Raises:
        UserError: no run came to an end.
    """
    evaluation = config.from_dict(
        Evaluation,
        config.override({**config.to_dict(Evaluation()), "on": study.judged_on}, study.evaluation),
        "evaluation",
    )
    where = _Where(source, unlabelled, root, experiment, evaluation, Trial(tags={"logonet.study": name}))
    firsts = {config.fingerprint(r.pretraining): r.pretraining for r in runs if r.pretraining is not None}
    say("study", f"{name}: {len(runs)} finetunings on {len(firsts)} pretrainings")
    _make_shared(list(firsts.values()), runs, where, executor)

    def do(what: str, fn: Any, items: Mapping[str, Any]) -> dict[str, Any]:
        """URI or exception of each item."""
        keys, done = list(items), {}
        for i, answer in executor.side_by_side(fn, [items[key] for key in keys], at_once):
            done[keys[i]] = answer
            told = f"failed: {reason_of(answer)}" if isinstance(answer, Exception) else answer
            say("study", f"{what} {len(done)}/{len(keys)}  {told}")
        return done

    pretrained = do("pretraining", where.pretrain, firsts)
    judged: dict[str, Any] = {}
    todo: dict[str, Finetuning] = {}
    for run in runs:
        weights = pretrained[config.fingerprint(run.pretraining)] if run.pretraining is not None else ""
        if isinstance(weights, Exception):
            judged[run.name] = UserError(f"pretraining: {reason_of(weights)}")
        else:
            todo[run.name] = replace(run.finetuning, init=replace(run.finetuning.init, weights=weights))
    judged |= do("finetuning", where.judge, todo)
    failed = {
        run.name: reason_of(judged[run.name]) for run in runs if isinstance(judged[run.name], Exception)
    }
    done = {run.name: open_stage(judged[run.name], "evaluation") for run in runs if run.name not in failed}
    firsts_of = {name: cfg.init.weights for name, cfg in todo.items() if name in done and cfg.init.weights}
    if not done:
        raise UserError(
            f"none of the {len(runs)} runs came to an end; the first: {next(iter(failed.values()))}"
        )
    return _compare(study, name, runs, done, firsts_of, failed, where)


def reason_of(err: Exception) -> str:
    """Why a run failed, in one sentence."""
    return user_sentence(err) or ": ".join([type(err).__name__, *str(err).strip().splitlines()[-1:]])


def _make_shared(
    firsts: Sequence[Pretraining], runs: Sequence[StudyRun], where: _Where, executor: StageExecutor
) -> None:
    """What runs have in common, each once: two that began at once would both make it.

    What cannot be made is told by the run that wants it.
    """
    shared: dict[str, Callable[[], Any]] = {}
    for first in firsts:
        parts = (first.data, first.split, first.crops, first.clusterers, first.probe, first.method.name)
        shared[config.fingerprint(*parts)] = partial(_upstream, first, where, executor)
    for tuned in (run.finetuning for run in runs):
        key = config.fingerprint(
            tuned.data, tuned.cases, replace(tuned.split, fold=0, fraction=1.0, shots=None, subset=0)
        )
        shared[key] = partial(_prepare, tuned, where, executor)
    for make in shared.values():
        try:
            make()
        except UserError as err:
            say("shared", f"cannot be made: {err}")


def _upstream(cfg: Pretraining, where: _Where, executor: StageExecutor) -> None:
    upstream(resolve(cfg), where.unlabelled or where.source, where.root, executor, where.source)


def _prepare(cfg: Finetuning, where: _Where, executor: StageExecutor) -> None:
    table, _ = import_scans(where.source, where.root, executor, cfg.data.channels)
    split = splits.make(table.scans, cfg.split)
    make_cases(table, split.test + split.excluded, cfg.cases, cfg.data, where.root, executor)


# ------------------------------------------------------------------------------------------------ results


def _compare(
    study: Study,
    name: str,
    runs: Sequence[StudyRun],
    done: Mapping[str, Artifact],
    firsts_of: Mapping[str, str],
    failed: Mapping[str, str],
    where: _Where,
) -> Artifact:
    parents = {"evaluations": config.fingerprint({key: e.fingerprint for key, e in done.items()})}
    metric, digits = statistics.SHOWN[study.metric]

    def make(own: stage.Run) -> Made:
        known, scores = [], []
        for run in (r for r in runs if r.name in done):
            artifact = done[run.name]
            about = {key: getattr(run, key) for key in (*SETTING, *REPEATS)} | {"run": run.name}
            scores.append(scores_of(artifact.uri).assign(**about))
            about["train_cases"] = open_stage(artifact.parents["split_uri"], "split").facts["train"]
            about["pretraining"] = firsts_of.get(run.name, "")
            known.append({**about, study.metric: artifact.facts[study.metric], "uri": artifact.uri})
        table, cases = pd.DataFrame(known), pd.concat(scores, ignore_index=True)
        counts = table.groupby(SETTING, sort=False)["train_cases"].mean().round().astype(int)
        summary = statistics.over_runs(cases, SETTING).join(counts, on=SETTING)
        compared = study_tables.comparisons(cases, study.metric, study.baseline)
        means = summary[(summary["metric"] == study.metric) & (summary["class"] == statistics.MEAN)]
        shown = reporting.wide(means, digits)
        pictures = {"labels.png": reporting.label_curves(means, metric)}
        if table.groupby(SETTING).ngroups > table["labels"].nunique():  # something to rank
            pictures["ranks.png"] = reporting.mean_ranks(study_tables.ranks(cases, study.metric), metric)
        headline = {
            f"{study.metric}/{'/'.join(row[:3])}": row[3] for row in means[[*SETTING, "mean"]].to_numpy()
        }
        entry: dict[str, Any] = {"epoch": 1, "step": 1, "unix_s": time.time()}
        entry |= {stage.plain(key): value for key, value in headline.items()}
        sections: list[tuple[str, Any]] = [
            (f"{metric}: mean over runs ± their deviation", shown),
            (f"{metric} by labels", pictures["labels.png"]),
        ]
        if len(compared):
            some = compared[compared["class"] == statistics.MEAN].drop(columns="class")
            sections.append(("Against the baseline", some))
        if study.metric not in statistics.LESS_IS_BETTER and means["train_cases"].nunique() > 1:
            saved = study_tables.labels_saved(means, study.baseline)
            if len(saved):
                sections.append(("Training cases needed to reach the baseline's score", saved))
        finals = {uri: open_stage(uri, "pretrain").facts["final"] for uri in {*firsts_of.values()}}
        if len(told := study_tables.proxies(table, finals, study.metric)):
            sections.append(("What of a pretraining's own measures goes with its score", told))
        if "ranks.png" in pictures:
            sections.append(("Mean ranks over cases", pictures["ranks.png"]))
        if failed:
            lines = [f"<li>{html.escape(f'{key}: {why}')}</li>" for key, why in failed.items()]
            sections.insert(0, ("Runs that failed", f"<ul>{''.join(lines)}</ul>"))
        sections.append(("What was judged", f"<p>{html.escape(_told(study, table, done))}</p>"))
        sections.append(("Runs", table.drop(columns="run")))
        sections.append(("Study", f"<pre>{html.escape(config.to_yaml(study))}</pre>"))
        files = {
            "cases.csv": cases.to_csv(index=False).encode(),
            "runs.csv": table.to_csv(index=False).encode(),
            "summary.csv": summary.to_csv(index=False).encode(),
            "comparisons.csv": compared.to_csv(index=False).encode(),
            "table.tex": reporting.latex(shown).encode(),
            "history.json": json.dumps([entry]).encode(),
            "config.yaml": config.to_yaml(study).encode(),
            "report.html": stage.page(own, sections, {}, "study", ""),
            **pictures,
        }
        return Made(files, {"runs": len(done), "failed": dict(failed), "means": headline})

    def describe(artifact: Artifact) -> str:
        return f"{artifact.facts['runs']} runs, {len(artifact.facts['failed'])} failed"

    own = config.to_dict(study)
    artifact = run_tracked(
        where.root, "study", f"study-{name}", study, own, parents, {}, make, describe, where.experiment
    )
    means = [(key, f"{value:.{digits}f}") for key, value in artifact.facts["means"].items()]
    print(tables.to_text(("setting", f">{metric}"), means, title=f"{name}, mean over runs"))
    return artifact


def _told(study: Study, table: pd.DataFrame, done: Mapping[str, Artifact]) -> str:
    """On what runs were judged, and what stands against the scores."""
    cases = {"test": "test", "val": "validation"}[study.judged_on]
    said = f"{len(table)} runs, judged on the {cases} cases of their split."
    tuned = [open_stage(e.parents["finetune_uri"], "finetune") for e in done.values()]
    if study.judged_on == "val" and any("best.safetensors" in artifact.files for artifact in tuned):
        said += " Checkpoints were chosen on these cases, so the scores are too high."
    tests = "p_cases: two-sided Wilcoxon signed-rank test, paired by case, each case averaged over its runs."
    tests += " p_runs: one-tailed t-test over the runs. Intervals: runs and cases resampled. Holm: over all settings."
    return f"{said} {tests}"
