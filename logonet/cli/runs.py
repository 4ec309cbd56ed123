"""Commands that look after runs and models: compare, register, export and report them."""

from __future__ import annotations

import os
import tempfile
from typing import Annotated, Literal

import tyro

from logonet.cli.jobs import absolute, absolute_model
from logonet.core.errors import UserError
from logonet.distributed import cluster
from logonet.distributed.cluster import Resources
from logonet.distributed.executor import RayExecutor
from logonet.storage import object_store

RunA = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_A")]
RunB = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_B")]
Artifact = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ARTIFACT")]
Model = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
Alias = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ALIAS")]
SweepUri = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SWEEP")]
Clusterers = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CLUSTERERS")]


def compare(run_a: RunA, run_b: RunB, /, out: str = "", common: bool = False) -> None:
    """Is B better than A? Paired Wilcoxon test and bootstrap interval on the same cases.

    Args:
        run_a: an evaluation artifact (ROOT/evaluation/<id>) or its cases.csv.
        run_b: another.
        out: folder or s3:// prefix for compare.csv and compare.png.
        common: compare on the cases both have, where they differ.
    """
    from logonet import pipelines, reporting
    from logonet.inference import statistics

    a, b = (pipelines.scores_of(absolute(uri, "RUN")) for uri in (run_a, run_b))
    compared = statistics.compare(a, b, common=common)
    print(statistics.compare_table(compared))
    if out:
        where = absolute(out, "--out")
        object_store.write(object_store.join(where, "compare.csv"), compared.to_csv(index=False).encode())
        object_store.write(object_store.join(where, "compare.png"), reporting.compare_picture(compared))
        print(f"{where}/compare.csv")


def register(artifact: Artifact, /, task: str = "", alias: tuple[str, ...] = ("candidate",)) -> None:
    """Put what a run has made, and what it was made from, into the MLflow model registry.

    Args:
        artifact: ROOT/evaluation/<id>, ROOT/postprocess/<id>, ROOT/finetune/<id> or ROOT/pretrain/<id>; finetunings
            joined by commas are registered as one ensemble.
        task: names the segmentation model, logonet-seg-<task>.
        alias: such as candidate or champion.
    """
    from logonet import pipelines

    for uri in pipelines.register(absolute_model(artifact, "ARTIFACT"), task, alias):
        print(uri)


def alias(model: Model, name: Alias, /) -> None:
    """Point an alias, such as champion, at a registered model.

    Args:
        model: models:/NAME/VERSION or models:/NAME@ALIAS.
        name: the alias.
    """
    from logonet import tracking

    print(f"{tracking.set_alias(model, name)} is now @{name}")


def export(
    model: Model, /, out: str, format: Literal["bundle", "onnx", "nnunet"] = "bundle", plans: str = ""
) -> None:
    """Write a model for others to run or finetune: a MONAI bundle, ONNX with a parity check, or nnU-Net's checkpoint.

    Args:
        model: models:/NAME@alias, a finetuning artifact ROOT/finetune/<id>, or a model folder; several, joined by
            commas, are an ensemble. For nnU-Net also a pretraining artifact ROOT/pretrain/<id>, and no folder.
        out: a local folder for the bundle or the checkpoint, or a file for ONNX.
        format: which.
        plans: of nnU-Net for the dataset to finetune on; a copy for the checkpoint's network is written.
    """

    from logonet.inference import export as exporting
    from logonet.inference.load import load_model

    where = absolute(out, "--out")
    with tempfile.TemporaryDirectory(prefix="logonet-export-") as folder:
        if format == "nnunet":
            print(_export_nnunet(absolute_model(model), folder, where, plans and absolute(plans, "--plans")))
            return
        for name, blob in load_model(absolute_model(model)).folder.items():
            object_store.write(os.path.join(folder, name), blob)
        print(exporting.write(folder, where, format))


def _export_nnunet(model: str, folder: str, out: str, plans: str) -> str:
    """What to tell the user. ``folder`` is for copies."""
    from logonet import training
    from logonet.inference.export import nnunet
    from logonet.pipelines.weights import find_weights

    found = find_weights(model, folder)
    if found is None or found.preparation is None or found.size_vox is None:
        raise UserError(f"{model} does not say what network it is of; give an artifact or models:/NAME@alias")
    weights = training.load_weights(training.Init(found.uri, found.sha256))
    nnunet.write_nnunet(found.backbone, weights, found.size_vox, found.preparation.spacing_mm, out, plans)
    return f"{out}: finetune it there with 'nnUNetv2_train -pretrained_weights {out}/{nnunet.CHECKPOINT}'"


def sweep_report(sweep: SweepUri, /, out: str = "") -> None:
    """Say what a sweep has found, also while it runs: heat map, all trials, what each key decides, CSV.

    Args:
        sweep: ROOT/sweep/<name>.
        out: folder or s3:// prefix for report.html, its pictures and trials.csv; empty for the sweep's own.
    """
    from logonet.sweep import outcome

    uri = absolute(sweep, "SWEEP")
    where = absolute(out, "--out") if out else uri
    outcome.report(uri, where)
    print(outcome.summary(uri))
    print(f"{where}/report.html")


def clusters_report(clusterers: Clusterers, /, out: str, slices: int = 4096, stability: int = 4) -> None:
    """Say how good a clusterer set is, before any GPU hour is spent on it.

    Args:
        clusterers: a clusterers artifact, ROOT/clusterers/<fingerprint>.
        out: folder or s3:// prefix for report.html, quality.csv and the contact sheets.
        slices: how many slices to judge on.
        stability: refit this many clusterers with another seed and compare; 0 skips it.
    """
    from logonet.pipelines import clusterer_report

    resources = Resources()
    with cluster.connected(resources):
        where, out = absolute(clusterers, "CLUSTERERS"), absolute(out, "--out")
        quality = clusterer_report.write(where, out, slices, stability, RayExecutor(resources))
    print(quality.describe().round(3).to_string())
    print(f"{out.rstrip('/')}/report.html")
