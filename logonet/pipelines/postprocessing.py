"""Post-processing: of which classes a model keeps the largest component alone, decided on its validation cases."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pandas as pd

from logonet.core import config, tables
from logonet.core.errors import UserError
from logonet.core.execution import Executor
from logonet.inference import model, postprocessing
from logonet.inference.load import MODEL_FOLDER, SEEN_FILE, load_model
from logonet.pipelines.evaluation import Evaluation, evaluate_model, scores_of
from logonet.pipelines.stage import Made, run_stage
from logonet.storage.artifacts import Artifact

DECISION_FILE = "components.csv"


def postprocess(
    cfg: Evaluation, model_uri: str, source: str, root: str, executor: Executor, experiment: str | None
) -> Artifact:
    """The model with its post-processing: an artifact that evaluation, prediction and registration take as they do it.

    Each member of an ensemble is judged on its own validation cases, as in nnU-Net's cross-validation; the cases of all
    decide together.

    Args:
        cfg: how the validation cases are segmented.
        model_uri: a finetuning artifact; or several, joined by commas: their ensemble.
        source: labelled scans; "" for those that it was finetuned from.

    Raises:
        UserError: it has post-processing already, or no validation cases.
    """
    chosen = load_model(model_uri)
    if chosen.spec.largest_component:
        raise UserError(
            f"{model_uri} has its post-processing already; give the finetuning that it was made of"
        )
    cfg = replace(cfg, on="val")
    judged = [evaluate_model(cfg, uri, source, root, executor, experiment) for uri in model_uri.split(",")]

    def make(uri: str) -> Made:
        scores = [scores_of(evaluation.uri) for evaluation in judged]
        decided = postprocessing.decide(pd.concat(scores, ignore_index=True))
        kept = tuple(decided.loc[decided["largest_component"], "class"])
        spec, weights = model.parse(chosen.folder, model_uri)
        made = model.files(replace(spec, largest_component=kept), weights)
        files = {f"{MODEL_FOLDER}/{name}": blob for name, blob in made.items()}
        if chosen.seen is not None:
            files[SEEN_FILE] = chosen.seen
        files[DECISION_FILE] = decided.to_csv(index=False).encode()
        finetunings = [artifact.uri for artifact in chosen.artifacts]
        return Made(files, {"largest_component": kept, "finetunings": finetunings})

    def describe(artifact: Artifact) -> str:
        kept = artifact.facts["largest_component"]
        return f"the largest component alone of {', '.join(kept)}" if kept else "nothing helps"

    parents = {"plain_model": chosen.id, "judged": config.fingerprint([e.fingerprint for e in judged])}
    artifact = run_stage(root, "postprocess", {}, parents, make, describe, lineage=chosen.lineage)
    told = list(csv.reader(io.StringIO(artifact.read(DECISION_FILE).decode())))
    print(tables.to_text(told[0], told[1:], title="mean Dice over validation cases"))
    return artifact
