"""Registration: what a run has made, into the MLflow model registry, with the whole chain it comes from as tags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from logonet import tracking
from logonet.core import config
from logonet.core.errors import UserError
from logonet.data.preprocessing import Preprocessing
from logonet.inference import model
from logonet.inference.load import LINEAGE_FILE, SEEN_FILE, LoadedModel, load_model
from logonet.pipelines.preparation import CLUSTERERS_FILE
from logonet.pipelines.stage import open_stage, say
from logonet.storage import artifacts, object_store
from logonet.storage.artifacts import Artifact

ENCODER, CLUSTERERS = "logonet-encoder", "logonet-clusterers"


def register(
    uri: str,
    task: str = "",
    aliases: Sequence[str] = ("candidate",),
    lineage: Mapping[str, str] | None = None,
) -> list[str]:
    """Register what ``uri`` holds and what it was made from; the models' URIs, models:/NAME/VERSION.

    A pretraining gives ``logonet-encoder`` and ``logonet-clusterers``; a finetuning, a post-processing or an evaluation
    of it gives ``logonet-seg-<task>`` and those two of its pretraining. Registering the same content again moves
    aliases only.

    Args:
        uri: of the artifact; or models joined by commas, which are registered as one ensemble.
        lineage: more of it, such as the sweep that chose the model.

    Raises:
        UserError: ``uri`` holds none of these, or ``task`` is missing.
    """
    more = dict(lineage or {})
    if "," not in uri:
        artifact = open_stage(uri, "pretrain", "finetune", "postprocess", "evaluation")
        if artifact.stage == "pretrain":
            return _pretrained(artifact, more, aliases)
        if artifact.stage == "evaluation":
            uri, scores = _judged(artifact)
            more = scores | more
    if not task:
        raise UserError("--task is missing; name what the model segments, such as hippocampus")
    chosen = load_model(uri)
    if not chosen.artifacts:
        raise UserError(f"{uri} is of no finetuning artifact; give ROOT/finetune/ID, of an ensemble several")
    made = [_segmentation(chosen, task, more, aliases)]
    if "," in chosen.lineage.get("pretrain_uri", ","):  # none, or those of an ensemble's members differ
        return made
    return [*made, *_pretrained(_upstream(chosen.artifacts[0], "pretrain"), more, aliases)]


def _judged(evaluation: Artifact) -> tuple[str, dict[str, str]]:
    """The model that an evaluation is of, and its scores as tags."""
    scores = {"evaluation": evaluation.fingerprint, "evaluation_uri": evaluation.uri}
    on = evaluation.facts.get("on", "test")
    scores |= {f"{on}_{k}": f"{v:.6g}" for k, v in evaluation.facts.items() if isinstance(v, float)}
    # Not their names, which may be patients' (see `seen`).
    for what in ("contaminated", "excluded"):
        count = len(evaluation.facts[what])
        scores[what] = f"{count}, listed in {evaluation.uri}/leaks.csv" if count else "none"
    stage = "postprocess" if "postprocess_uri" in evaluation.parents else "finetune"
    uri = evaluation.parents.get(f"{stage}_uri", "")
    return (uri if "," in uri else _upstream(evaluation, stage).uri), scores


def _upstream(artifact: Artifact, stage: str) -> Artifact:
    key = f"{stage}_uri"
    found = artifacts.find(artifact.parents[key]) if key in artifact.parents else None
    if found is None:
        raise UserError(
            f"{artifact.uri} does not lead to a finished '{stage}' artifact; register that artifact itself"
        )
    return found


def _segmentation(chosen: LoadedModel, task: str, more: Mapping[str, str], aliases: Sequence[str]) -> str:
    lineage = {**chosen.lineage, **more}
    files = dict(chosen.folder)
    if chosen.seen is not None:
        files[SEEN_FILE] = chosen.seen
    if chosen.artifact is not None and "transfer.json" in chosen.artifact.files:
        files["transfer.json"] = chosen.artifact.read("transfer.json")
    files[LINEAGE_FILE] = json.dumps(lineage, indent=1, sort_keys=True).encode()
    return _register(
        f"logonet-seg-{task}", files, lineage, "segmentation", aliases, chosen.artifacts[0], chosen.artifact
    )


def _pretrained(artifact: Artifact, more: Mapping[str, str], aliases: Sequence[str]) -> list[str]:
    lineage = {**artifact.parents, "pretrain": artifact.fingerprint, "pretrain_uri": artifact.uri, **more}
    own = artifact.config
    settings = {
        "backbone": own["backbone"],
        "size_vox": own["crops"]["size_vox"],
        **config.to_dict(Preprocessing.of(own["crops"])),
    }
    files = {
        model.CONFIG_FILE: json.dumps(settings, indent=2, sort_keys=True).encode(),
        model.WEIGHTS_FILE: artifact.read("backbone.safetensors"),
        SEEN_FILE: artifact.read(SEEN_FILE),
        LINEAGE_FILE: json.dumps(lineage, indent=1, sort_keys=True).encode(),
    }
    made = [_register(ENCODER, files, lineage, "encoder", aliases, artifact, artifact)]
    where = artifact.parents.get("clusterers_uri")
    if where is not None and (fitted := artifacts.find(where)) is not None:
        files = {n: fitted.read(n) for n in (CLUSTERERS_FILE, "clusterers.json")}
        chain = {"clusterers": fitted.facts["id"], "clusterers_uri": fitted.uri, **fitted.parents}
        made.append(_register(CLUSTERERS, files, chain, "clusterers", aliases, artifact, artifact))
    return made


def _register(
    name: str,
    files: Mapping[str, bytes],
    lineage: Mapping[str, str],
    kind: Literal["encoder", "segmentation", "clusterers"],
    aliases: Sequence[str],
    artifact: Artifact,
    made_by: Artifact | None,
) -> str:
    """Register beside ``artifact``, in the run of ``made_by``; without one in a run of its own."""
    tags = {f"logonet.{k}": v for k, v in lineage.items()}
    place = object_store.join(artifact.uri.rsplit("/", 2)[0], "mlflow-artifacts")
    run = made_by.fingerprint if made_by is not None else None
    where: Any = {"run_fingerprint": run, "artifact_root": place}
    uri = tracking.register(name, files, tags, kind=kind, aliases=aliases, **where)
    say("register", f"{uri} is now {', '.join(f'models:/{name}@{alias}' for alias in aliases)}")
    return uri
