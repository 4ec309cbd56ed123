"""From labelled scans and, if there are any, pretrained weights to a segmentation model and its scores.

    scans -> manifest -> split -> cases -> finetune -> evaluation

Training is `train.fit`, the same loop as pretraining's, with a labelled method and initial weights. Each stage is an
artifact, as in `stages`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from logonet import methods, networks, reporting, training
from logonet.core import config
from logonet.core.config import Component, Section, Share
from logonet.core.errors import UserError
from logonet.data import classes, leakage, manifest, prepared_scans, provenance, splits
from logonet.data.prepared_scans import CropSampling
from logonet.data.preprocessing import Preprocessing
from logonet.inference import model, sliding_window
from logonet.inference.load import MODEL_FOLDER, SEEN_FILE
from logonet.methods import DataSpec
from logonet.pipelines.preparation import import_scans, make_cases
from logonet.pipelines.stage import (
    Made,
    Run,
    StageExecutor,
    Trial,
    last_loss,
    page,
    run_stage,
    run_tracked,
    say,
    transfer_section,
)
from logonet.pipelines.weights import InitialWeights, find_weights
from logonet.storage import object_store
from logonet.storage.artifacts import Artifact
from logonet.storage.object_store import Stored
from logonet.training.dataset import LabelledDataset
from logonet.training.schedule import SampleSchedule


@dataclass(frozen=True)
class Init(Section, key="init"):
    """Where the first weights come from.

    Attributes:
        weights: a pretraining or finetuning artifact (<root>/pretrain/<id>), a model of the registry
            (models:/NAME@alias), a .safetensors file of a backbone, or "" to start from random weights.
        parts: "all" but the classifier, or the "encoder" alone.
        min_encoder_share: stop when a smaller share of the encoder's parameters finds its weights.
    """

    weights: str = ""
    parts: Literal["all", "encoder"] = "all"
    min_encoder_share: Share = 0.95


@dataclass(frozen=True)
class Finetuning:
    """Everything that decides what a finetuning run computes; the defaults are the paper's Table 3.

    An empty ``backbone`` is the one that ``init.weights`` was trained with.

    Attributes:
        leaks: what to do with test cases that training or pretraining has seen.
    """

    data: classes.Config = field(default_factory=classes.Config)
    split: splits.Config = field(default_factory=splits.Config)
    cases: prepared_scans.Config = field(default_factory=prepared_scans.Config)
    crops: CropSampling = field(default_factory=CropSampling)
    backbone: Component = Component("")
    method: Component = Component("supervised")
    train: training.Config = field(
        default_factory=lambda: training.Config(
            epochs=5000, warmup_epochs=100, global_batch=16, validate_every_epochs=50
        )
    )
    init: Init = field(default_factory=Init)
    validation: sliding_window.Config = field(default_factory=sliding_window.Config)
    leaks: leakage.LeakRule = "refuse"

    def __post_init__(self) -> None:
        Component.convert(self, "backbone", "method")


# ---------------------------------------------------------------------------------------------- config


def resolve_finetuning(cfg: Finetuning, weights: InitialWeights | None = None) -> Finetuning:
    """``cfg`` with all defaults written out, checked as far as that goes without data.

    Raises:
        UserError: an unknown name or key, a crop the network cannot take...
    """
    backbone = cfg.backbone
    if not backbone.name:
        if weights is None or not weights.backbone.name:
            if cfg.init.weights and weights is None:  # known once the weights have been looked at
                return cfg
            raise UserError(
                "config section 'backbone' has no name; set backbone.name, or init.weights to take its network"
            )
        backbone = Component(weights.backbone.name, {**weights.backbone.config, **backbone.config})
    method = cfg.method.resolve(methods.config, "method")
    if "labels" not in methods.needs(method.name):
        labelled = [n for n in methods.names() if "labels" in methods.needs(n)]
        raise UserError(
            f"method '{method.name}' does not learn from labels; finetuning takes {', '.join(labelled)}"
        )
    backbone = backbone.resolve(networks.config, "backbone")
    rows = cfg.train.batch_size * cfg.crops.per_case
    training.dry_run(backbone, method, DataSpec(size_vox=cfg.crops.size_vox, num_classes=2, batch_size=rows))
    train = cfg.train.settled(pretrained=bool(cfg.init.weights))
    return replace(cfg, backbone=backbone, method=method, train=train)


# ------------------------------------------------------------------------------------- split and cases


def make_split(
    table: manifest.Manifest, cfg: splits.Config, rule: leakage.LeakRule, known: bytes | None, root: str
) -> tuple[splits.Split, Artifact]:
    """Who trains, validates and tests; test cases that training or pretraining knows are dealt with by ``rule``.

    Raises:
        UserError: under "refuse", naming the contaminated test cases.
    """
    split = splits.make(table.scans, cfg)
    by_id = {s.scan_id: s for s in table.scans}
    # The whole pool, not only this fraction: the answer must not change with the label fraction.
    held_out = {*split.test, *split.excluded}
    pool = [s for s in table.scans if s.label_uri and s.scan_id not in held_out]
    # As one table, so that a scan that trains twice over counts once.
    trained = provenance.to_bytes(pool, "training")
    others = provenance.from_bytes(provenance.join(trained, known) if known else trained)
    test = [by_id[i] for i in split.test]
    found = leakage.find(provenance.anonymous(test), others)
    leaking = leakage.refused(found, len(split.test), rule, " ('logonet data leakcheck' shows all)")
    if leaking and rule == "exclude":
        split = splits.without(split, leaking)
        say("leaks", f"{len(leaking)} contaminated test cases left out")
    own = {"split": config.to_dict(cfg), "leaks": rule}
    parents = {"manifest": table.id, "seen": hashlib.sha256(known or b"").hexdigest()[:16]}
    metadata = {
        "id": split.id,
        **{part: len(getattr(split, part)) for part in ("train", "val", "test")},
        "leaking": leaking,
        "pretraining_known": known is not None,
    }
    files: dict[str, bytes | Stored] = {
        "split.json": split.to_json().encode(),
        "leaks.csv": leakage.to_csv(found),
    }
    artifact = run_stage(
        root, "split", own, parents, lambda uri: Made(files, metadata), lambda a: split.describe()
    )
    if not split.test:
        say("split", "no test cases: evaluation will want other labelled scans, or set split.test_share")
    return split, artifact


# -------------------------------------------------------------------------------------------- finetune


def finetune(
    cfg: Finetuning,
    source: str,
    root: str,
    executor: StageExecutor,
    experiment: str | None,
    *,
    trial: Trial | None = None,
) -> Artifact:
    """All stages from labelled scans at ``source`` to a segmentation model under ``root``. Run again, it resumes.

    Args:
        trial: of the sweep that the run is a trial of.
    """
    weights = find_weights(cfg.init.weights, root)
    cfg = resolve_finetuning(cfg, weights)
    executor.check(cfg.train, cfg.method)
    table, _ = import_scans(source, root, executor, cfg.data.channels)
    split, split_artifact = make_split(table, cfg.split, cfg.leaks, weights.seen if weights else None, root)
    cases_table, cases_artifact = make_cases(
        table, split.test + split.excluded, cfg.cases, cfg.data, root, executor
    )
    place = cases_table.index_of()
    train_ids, val_ids = (tuple(i for i in ids if i in place) for ids in (split.train, split.val))
    if not train_ids:
        raise UserError("all training cases of the split are quarantined; the reasons are above")
    if cfg.train.validate_every_epochs and not val_ids:
        raise UserError(
            "the split has no validation cases; set train.validate_every_epochs=0, or split.fold to a fold"
        )
    lineage = {
        "manifest": table.id,
        "split": split.id,
        "split_uri": split_artifact.uri,
        "cases": cases_artifact.fingerprint,
        **({"weights": weights.sha256[:16], **weights.lineage} if weights else {"weights": "random"}),
    }
    own = {
        "backbone": cfg.backbone,
        "method": cfg.method,
        "train": cfg.train.identity(),
        "crops": config.to_dict(cfg.crops),
        "validation": cfg.validation.identity(),
        "init": {k: v for k, v in config.to_dict(cfg.init).items() if k != "weights"},
    }
    parents = {
        "cases": cases_artifact.fingerprint,
        "split": split_artifact.fingerprint,
        "weights": lineage["weights"],
    }

    def make(run: Run) -> Made:
        data_spec = DataSpec(
            size_vox=cfg.crops.size_vox,
            in_channels=cases_table.in_channels,
            num_classes=cases_table.num_outputs,
            batch_size=cfg.train.batch_size * cfg.crops.per_case,
            ignores=cases_table.ignores,
            regions=tuple(cases_table.regions.values()),
        )
        methods.check(cfg.method.name, cfg.method.config, data_spec)
        schedule = SampleSchedule.of(len(train_ids), cfg.train)
        train, val = (tuple(place[i] for i in ids) for ids in (train_ids, val_ids))
        prepared_by = cfg.method.name, cfg.method.config
        dataset = LabelledDataset(*prepared_by, schedule, cases_table, train, val, cfg.crops)
        files: dict[str, bytes] = {"config.yaml": config.to_yaml(cfg).encode()}
        init, handover = None, None
        if weights is not None:
            how = cfg.init.parts, cfg.init.min_encoder_share
            init = training.Init(weights.uri, weights.sha256, *how, weights.backbone)
            # What loading them will do, before anything is launched.
            net = networks.from_component(cfg.backbone, data_spec.in_channels, data_spec.num_classes)
            handover = training.load_initial(net, init)
            say("transfer", handover.summary())
            if rests := cfg.train.frozen_epochs:
                say("transfer", f"the encoder rests for {rests:g} epochs (train.encoder_frozen_epochs)")
            if weights.preparation and weights.preparation != Preprocessing.of(cfg.cases):
                say("transfer", f"scans are prepared otherwise than for these weights: {weights.preparation}")
            if weights.seen is None:
                say("transfer", "which scans these weights have seen is not known; leaks cannot be ruled out")
            files["transfer.json"] = json.dumps(handover.to_dict(), indent=1).encode()
        what = (cfg.backbone, cfg.method, cfg.train, data_spec)
        job = training.Job(
            run.uri, run.fingerprint, *what, run.tracking, dict(files), init, validation=cfg.validation
        )
        steps = f"{schedule.steps_per_epoch} steps an epoch, {len(val_ids)} to validate"
        say("finetune", f"{run.name} on {len(train_ids)} cases, {steps}  {run.uri}")
        result = executor.train(job, dataset)
        history = result["history"]
        done = {k: Stored(**v) for k, v in result["files"].items()}
        chosen = "best.safetensors" if "best.safetensors" in done else "backbone.safetensors"
        by_id = {s.scan_id: s for s in table.scans}
        train_scans = [by_id[i] for i in train_ids]
        spec = model_spec(cfg, cases_table, train_scans)
        final = training.load_weights(training.Init(object_store.join(run.uri, chosen), done[chosen].sha256))
        trained_on = provenance.to_bytes(train_scans, "training")
        if val_ids:
            validated_on = provenance.to_bytes([by_id[i] for i in val_ids], provenance.VALIDATION)
            trained_on = provenance.join(trained_on, validated_on)
        if weights is not None and weights.seen is not None:
            trained_on = provenance.join(trained_on, weights.seen)
        files[SEEN_FILE] = trained_on
        files |= {f"{MODEL_FOLDER}/{n}": blob for n, blob in model.files(spec, final).items()}
        files["curves.png"] = reporting.curves(history)
        sections: list[tuple[str, Any]] = [("Training", files["curves.png"])]
        if handover is not None:
            sections.append(transfer_section(handover))
        files["report.html"] = page(run, sections, lineage, "finetuning", config.to_yaml(cfg))
        metadata = {
            "final": history[-1],
            "steps": history[-1]["step"],
            "best_step": training.best_step(history),
            "classes": list(cases_table.classes),
            **({"regions": list(cases_table.regions)} if cases_table.regions else {}),
            "test": list(split.test),
            "excluded": list(split.excluded),
            # Test cases that training or pretraining knows, and that are test cases all the same.
            "contaminated": split_artifact.facts["leaking"] if cfg.leaks == "allow" else [],
            "source": source,
            "tracked": result["tracked"],
        }
        return Made({**done, **files}, metadata)

    label = f"finetune-{cfg.method.name}-{cfg.backbone.name}-{'pretrained' if weights else 'scratch'}"
    return run_tracked(
        root, "finetune", label, cfg, own, parents, lineage, make, last_loss, experiment, trial
    )


def model_spec(cfg: Finetuning, table: prepared_scans.Table, scans: list[manifest.Scan]) -> model.Spec:
    modalities = sorted({s.modality for s in scans})
    return model.Spec(
        backbone=cfg.backbone,
        in_channels=table.in_channels,
        classes=table.classes,
        label_values=table.label_values,
        size_vox=cfg.crops.size_vox,
        modality=modalities[0] if len(modalities) == 1 else "mixed",
        channels=cfg.data.channels,
        members=cfg.data.members,
        regions={n: tuple(table.classes[i] for i in own) for n, own in table.regions.items()},
        region_values=table.region_values,
        **vars(Preprocessing.of(cfg.cases)),
    )
