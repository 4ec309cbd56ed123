"""Evaluation: a model's label maps of test or validation cases against their truth, on the scans' own grids, in mm."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import tyro

from logonet import reporting
from logonet.core import config
from logonet.core.errors import UserError
from logonet.core.execution import Executor
from logonet.data import classes, leakage, manifest, provenance, splits, volume
from logonet.data.manifest import Manifest, Scan
from logonet.distributed import bucket_inference
from logonet.inference import metrics, model, sliding_window, statistics
from logonet.inference.load import LoadedModel, load_model
from logonet.pipelines.preparation import import_scans
from logonet.pipelines.stage import Made, Run, open_stage, page, plain, run_tracked, say, transfer_section
from logonet.storage import object_store
from logonet.storage.artifacts import Artifact
from logonet.training import weight_transfer


@dataclass(frozen=True)
class Evaluation:
    """What decides the scores of a model.

    Attributes:
        classes: names by which the dataset calls the model's classes, {"liver": ("hepar",)}.
        infer: overlap of the windows, mirroring, precision.
        leaks: what to do with test cases that the model's training or pretraining has seen.
        on: "test" cases, or the "val" cases of the model's own split, which its checkpoint may have been chosen on.
    """

    classes: Annotated[dict[str, tuple[str, ...]], tyro.conf.Suppress] = field(default_factory=dict)
    infer: sliding_window.Config = field(default_factory=sliding_window.Config)
    leaks: leakage.LeakRule = "refuse"
    on: Literal["test", "val"] = field(default="test", metadata=config.OMIT_DEFAULT)


def judged_scans(table: Manifest, chosen: LoadedModel, on: Literal["test", "val"]) -> list[Scan]:
    """The cases of the model's own split where the manifest is the one it was split on, else all labelled scans.

    Of an ensemble those that are test, or validation, cases of every member.

    Raises:
        UserError: there are none, or validation cases are asked for and the manifest is another.
    """
    own = chosen.artifacts
    if own and all(a.parents.get("manifest") == table.id for a in own):
        cases = [set(a.facts["test"]) if on == "test" else _validation_cases(a) for a in own]
        wanted = set.intersection(*cases)
        if not wanted and on == "test":
            raise UserError(
                f"the split of {own[0].uri} has no test cases; give --data of other labelled scans, or split.test_share"
            )
        if not wanted:
            raise UserError(
                f"no case is a validation case of {' and of '.join(a.uri for a in own)}; judge each member of an "
                "ensemble by itself, and finetune with split.fold set"
            )
        return [s for s in table.scans if s.scan_id in wanted]
    if on == "val":
        raise UserError(
            f"on=val judges a model on the validation cases of its own split, and {chosen.uri} was not split on these "
            "scans; give a finetuning artifact, ROOT/finetune/ID, and its own scans or no --data"
        )
    found = [s for s in table.scans if s.label_uri]
    if not found:
        raise UserError("none of the scans has a label; there is nothing to compare with")
    return found


def _validation_cases(artifact: Artifact) -> set[str]:
    """Ids of the validation cases of a finetuning's split."""
    split = open_stage(artifact.parents["split_uri"], "split")
    return set(splits.Split.from_json(split.read("split.json"), split.uri_of("split.json")).val)


def evaluate_model(
    cfg: Evaluation, model_uri: str, source: str, root: str, executor: Executor, experiment: str | None
) -> Artifact:
    """Scores of the model at ``model_uri`` on labelled scans at ``source`` ("": those it was finetuned from)."""
    chosen = load_model(model_uri)
    if not source:
        sources = {artifact.facts["source"] for artifact in chosen.artifacts}
        if len(sources) != 1:
            raise UserError(f"--data is missing; {model_uri} does not say which scans it was split on")
        (source,) = sources
    table, _ = import_scans(source, root, executor, chosen.spec.channels)
    scans = judged_scans(table, chosen, cfg.on)
    scans, leaking = _without_leaks(scans, chosen, cfg)
    spec = chosen.spec
    label_maps, unscored = _label_maps(scans, spec, cfg.classes)
    own: dict[str, Any] = {"infer": cfg.infer.identity(), "leaks": cfg.leaks}
    if cfg.classes:
        own["classes"] = cfg.classes
    if cfg.on != "test":
        own["on"] = cfg.on
    cases = config.fingerprint([[s.sha256, s.label_sha256] for s in scans])
    lineage = {**chosen.lineage, "test_manifest": table.id}
    parents = {"model": chosen.id, "manifest": table.id, "cases": cases}

    def make(run: Run) -> Made:
        known = sorted({leak.scan_id for leak in leaking})
        say("evaluate", f"{run.name} on {len(scans)} cases  {run.uri}")
        output = object_store.join(run.uri, "predictions")
        items = [bucket_inference.Item(s.scan_id, s, label_maps[s.classes]) for s in scans]
        about = {"model": chosen.id, **own}
        what = items, chosen.folder, output, cfg.infer, executor
        rows = bucket_inference.run(*what, about=about, score=True, largest=cfg.on == "val")
        bad = [row for row in rows if row.status != bucket_inference.DONE]
        for row in bad:
            say("", f"quarantined: {row.reason}")
        scores = pd.DataFrame([line for row in rows for line in row.metrics])
        if scores.empty:
            raise UserError(
                f"none of the {len(rows)} cases could be segmented; the first says: {bad[0].reason}"
            )
        summary = statistics.summary(scores)
        pictures = {
            "organs.png": reporting.organ_boxes(scores),
            "cases.png": _cases_picture(scores, scans, rows, spec, label_maps),
        }
        entry = {"epoch": 1, "step": 1, "unix_s": time.time(), **_headline(summary)}
        bucket_inference.write_table(rows, output)
        files = {
            "cases.csv": scores.to_csv(index=False).encode(),
            "summary.csv": summary.to_csv(index=False).encode(),
            "summary.json": statistics.to_json(summary),
            "summary.txt": statistics.table(summary).encode(),
            "history.json": json.dumps([entry]).encode(),
            "leaks.csv": leakage.to_csv(leaking),
            "config.yaml": config.to_yaml(cfg).encode(),
            "report.html": _page(run, cfg, summary, pictures, chosen, lineage, leaking, bad),
            **pictures,
        }
        metadata = {
            **_headline(summary),
            **({"on": cfg.on} if cfg.on != "test" else {}),
            "cases": len(rows) - len(bad),
            "quarantined": len(bad),
            "not_scored": unscored,
            # Known to training or pretraining: judged on all the same, or left out.
            "contaminated": known if cfg.leaks == "allow" else [],
            "excluded": known if cfg.leaks == "exclude" else [],
        }
        return Made(files, metadata)

    def describe(artifact: Artifact) -> str:
        return f"{artifact.facts['cases']} cases"

    label = f"evaluate-{spec.backbone.name}-{chosen.id[:8]}"
    artifact = run_tracked(root, "evaluation", label, cfg, own, parents, lineage, make, describe, experiment)
    print(artifact.read("summary.txt").decode())
    return artifact


def _label_maps(
    scans: Sequence[Scan], spec: model.Spec, renamed: Mapping[str, tuple[str, ...]]
) -> tuple[dict[tuple[str, ...], classes.LabelMap], list[str]]:
    """How to read the label maps of each dataset's classes, and the model's classes that no dataset has.

    What a dataset has and the model does not know, and the other way round, is told.
    """
    known = classes.Classes.named(spec.classes, spec.label_values, spec.members, renamed)
    found = classes.match(scans, known)
    unknown = {name for label_map in found.values() for name in label_map.unknown.values()}
    if unknown:
        say("classes", f"the model does not know {', '.join(sorted(unknown))}: background in the truth")
    present = {index for label_map in found.values() for index in label_map.present()}
    unscored = [name for index, name in enumerate(spec.classes) if index and index not in present]
    if unscored:
        say("classes", f"the datasets do not label {', '.join(unscored)}: not scored")
    return found, unscored


def _without_leaks(
    scans: list[Scan], chosen: LoadedModel, cfg: Evaluation
) -> tuple[list[Scan], list[leakage.Leak]]:
    """The scans that may be judged on, and every leak found.

    That a validation case was used for validation is no leak where such cases are judged on; pretraining is.
    """
    if chosen.seen is None:
        say("leaks", "which scans this model has seen is not known; leaks cannot be ruled out")
        return scans, []
    allowed = provenance.VALIDATION if cfg.on == "val" else ""
    seen = [trace for trace in provenance.from_bytes(chosen.seen) if provenance.role(trace) != allowed]
    found = leakage.find(provenance.anonymous(scans), seen)
    leaking = leakage.refused(
        found, len(scans), cfg.leaks, cases="test cases" if cfg.on == "test" else "validation cases"
    )
    if not leaking or cfg.leaks == "allow":
        return scans, found
    say("leaks", f"{len(leaking)} contaminated cases left out")
    kept = [s for s in scans if s.scan_id not in set(leaking)]
    if not kept:
        raise UserError("every case is known to the model's training; there is nothing to judge it on")
    return kept, found


def _headline(summary: pd.DataFrame) -> dict[str, float]:
    """The means as MLflow shows them: ``dice``, and ``dice/<class>`` for each class."""
    values = {}
    for line in summary.to_dict("records"):
        label = plain(str(line["class"])).replace("/", "_")
        name = line["metric"] if line["class"] == "mean" else f"{line['metric']}/{label}"
        values[name] = float(line["mean"])
    return values


def _cases_picture(
    scores: pd.DataFrame,
    scans: Sequence[Scan],
    rows: Sequence[bucket_inference.Row],
    spec: model.Spec,
    label_maps: Mapping[tuple[str, ...], classes.LabelMap],
) -> bytes:
    """The worst, the median and the best case by Dice, named by the digest that ends their ids."""
    # A case without a score has none of the classes and none was found: nothing is wrong with it.
    per_case = scores.groupby("scan_id")["dice"].mean().fillna(1.0).sort_values(kind="stable")
    by_id = {s.scan_id: s for s in scans}
    output = {row.name: row for row in rows}
    shown = []
    last = len(per_case) - 1
    for place, label in {last: "best", last // 2: "median", 0: "worst"}.items():
        scan_id = str(per_case.index[place])
        image = manifest.load(by_id[scan_id])
        row, labels_XYZ = output[scan_id], manifest.load_label(by_id[scan_id], image)
        blob = object_store.read(row.output, sha256=row.sha256)
        found = volume.decode_nifti(blob, row.output, allow_constant=True)
        label_map = label_maps[by_id[scan_id].classes]
        pair = label_map.as_values(labels_XYZ, found.array_CXYZ[0], spec.label_values)
        maps = [
            volume.to_ras(volume.Volume(labels[None], image.affine)).array_CXYZ[0].astype(int)
            for labels in pair
        ]
        ras = volume.to_ras(image)
        low_high = spec.intensity_range(ras.array_CXYZ, by_id[scan_id].modality, scan_id)
        first_XYZ = volume.window(ras.array_CXYZ, low_high)[0]
        shown.append((f"{label}: {scan_id[-10:]}", first_XYZ, *maps, ras.spacing_mm))
    return reporting.cases_overlay(shown[::-1], spec.foreground)


def _wide(summary: pd.DataFrame) -> pd.DataFrame:
    """A row a class: mean and interval of what people compare; the rest is in summary.csv."""
    lines = []
    for name, part in summary.groupby("class", sort=False):
        values = part.set_index("metric")
        line: dict[str, Any] = {"class": name, "cases": int(values.loc["dice", "n"])}
        cells = {
            title: statistics.cell(values.loc[m], "mean", n) for m, (title, n) in statistics.SHOWN.items()
        }
        lines.append(line | cells)
    return pd.DataFrame(lines)


def _page(
    run: Run,
    cfg: Evaluation,
    summary: pd.DataFrame,
    pictures: Mapping[str, bytes],
    chosen: LoadedModel,
    lineage: Mapping[str, str],
    leaking: Sequence[leakage.Leak],
    bad: Sequence[bucket_inference.Row],
) -> bytes:
    sections: list[tuple[str, Any]] = [
        ("Per organ", pictures["organs.png"]),
        ("Means with 95 % confidence intervals", _wide(summary)),
        ("Worst, median and best case", pictures["cases.png"]),
    ]
    if cfg.on == "val":
        chose = any("best.safetensors" in artifact.files for artifact in chosen.artifacts)
        told = "The checkpoint was chosen on these cases, so the scores are too high." if chose else ""
        kept = "Cases of the model's own validation set, which did not train it."
        sections.insert(
            0, ("Validation cases", f"<p>{kept} {told or 'No checkpoint was chosen on them.'}</p>")
        )
    if (trained := chosen.artifact) is not None:
        sections.append(("How it was trained", trained.read("curves.png")))
        if "transfer.json" in trained.files:
            handover = weight_transfer.Report.from_dict(json.loads(trained.read("transfer.json")))
            sections.append(transfer_section(handover))
    # Counts, not names: this page goes to MLflow, and file names can be patients'.
    known = len({k.scan_id for k in leaking})
    told = f"<p>{known} cases are known to training or pretraining: leaks.csv</p>" if known else ""
    if bad:
        told += f"<p>{len(bad)} cases could not be segmented: predictions/predictions.csv</p>"
    if told:
        sections.append(("Cases to look at", told))
    text = trained.read("config.yaml").decode() if trained is not None else ""
    return page(run, sections, lineage, "evaluation", text)


def scores_of(uri: str) -> pd.DataFrame:
    """The scores per case and class of an evaluation artifact, or of a cases.csv."""
    if uri.endswith(".csv"):
        data, where = object_store.read(uri), uri
    else:
        artifact = open_stage(uri, "evaluation")
        data, where = artifact.read("cases.csv"), artifact.uri_of("cases.csv")
    numbers = ["value", *metrics.METRICS]
    try:
        # Ids and names stay text: "035" is no number and "NA" not nothing.
        text = {"scan_id": str, "class": str}
        rows = pd.read_csv(io.BytesIO(data), dtype=text, keep_default_na=False, na_values=[""])
        if missing := [c for c in ("scan_id", "class", "empty", *numbers) if c not in rows]:
            raise ValueError(f"no column '{missing[0]}'")
        rows[numbers] = rows[numbers].apply(pd.to_numeric)
        if not (np.isfinite(rows["value"]).all() and rows[["scan_id", "class"]].notna().all(axis=None)):
            raise ValueError("a row without scan_id, class or value")
    except (ValueError, TypeError) as err:  # pandas' own are ValueErrors
        raise UserError(
            f"{where} is no table of scores ({err}); give the cases.csv of an evaluation"
        ) from None
    return rows
