"""Registration: what a run has made, into the MLflow model registry, with the whole chain it comes from as tags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from logonet import tracking
from logonet.core import config
from logonet.core.errors import UserError
from logonet.data.preprocessing import Preprocessing
from logonet.inference import model
from logonet.inference.load import LINEAGE_FILE, SEEN_FILE, model_files
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

    A pretraining gives ``logonet-encoder`` and ``logonet-clusterers``; a finetuning, or an evaluation of it, gives
    ``logonet-seg-<task>`` and those two of its pretraining. Registering the same content again moves aliases only.

    Args:
        lineage: more of it, such as the sweep that chose the model.

    Raises:
        UserError: ``uri`` holds none of these, or ``task`` is missing.
    """
    artifact = open_stage(uri, "pretrain", "finetune", "evaluation")
    more = dict(lineage or {})
    scores: dict[str, str] = {}
    if artifact.stage == "evaluation":
        scores = {"evaluation": artifact.fingerprint, "evaluation_uri": artifact.uri}
        scores |= {f"test_{k}": f"{v:.6g}" for k, v in artifact.facts.items() if isinstance(v, float)}
        # Not their names, which may be patients' (see `seen`).
        for what in ("contaminated", "excluded"):
            count = len(artifact.facts[what])
            scores[what] = f"{count}, listed in {artifact.uri}/leaks.csv" if count else "none"
        artifact = _upstream(artifact, "finetune")
    made = []
    if artifact.stage == "finetune":
        if not task:
            raise UserError("--task is missing; name what the model segments, such as hippocampus")
        made.append(_segmentation(artifact, task, scores | more, aliases))
        if "pretrain_uri" not in artifact.parents:
            return made
        artifact = _upstream(artifact, "pretrain")
    return [*made, *_pretrained(artifact, more, aliases)]


def _upstream(artifact: Artifact, stage: str) -> Artifact:
    key = f"{stage}_uri"
    found = artifacts.find(artifact.parents[key]) if key in artifact.parents else None
    if found is None:
        raise UserError(
            f"{artifact.uri} does not lead to a finished '{stage}' artifact; register that artifact itself"
        )
    return found


def _segmentation(artifact: Artifact, task: str, scores: Mapping[str, str], aliases: Sequence[str]) -> str:
    lineage = {**artifact.parents, "finetune": artifact.fingerprint, "finetune_uri": artifact.uri, **scores}
    files = model_files(artifact)
    files |= {n: artifact.read(n) for n in (SEEN_FILE, "transfer.json") if n in artifact.files}
    files[LINEAGE_FILE] = json.dumps(lineage, indent=1, sort_keys=True).encode()
    return _register(f"logonet-seg-{task}", files, lineage, "segmentation", aliases, artifact)


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
    made = [_register(ENCODER, files, lineage, "encoder", aliases, artifact)]
    where = artifact.parents.get("clusterers_uri")
    if where is not None and (fitted := artifacts.find(where)) is not None:
        files = {n: fitted.read(n) for n in (CLUSTERERS_FILE, "clusterers.json")}
        chain = {"clusterers": fitted.facts["id"], "clusterers_uri": fitted.uri, **fitted.parents}
        made.append(_register(CLUSTERERS, files, chain, "clusterers", aliases, artifact))
    return made


def _register(
    name: str,
    files: Mapping[str, bytes],
    lineage: Mapping[str, str],
    kind: Literal["encoder", "segmentation", "clusterers"],
    aliases: Sequence[str],
    artifact: Artifact,
) -> str:
    tags = {f"logonet.{k}": v for k, v in lineage.items()}
    place = object_store.join(artifact.uri.rsplit("/", 2)[0], "mlflow-artifacts")
    run = {"run_fingerprint": artifact.fingerprint, "artifact_root": place}
    uri = tracking.register(name, files, tags, kind=kind, aliases=aliases, **run)
    say("register", f"{uri} is now {', '.join(f'models:/{name}@{alias}' for alias in aliases)}")
    return uri
