"""The fields of KubeRay's ``ray.io/v1`` resources that a manifest here may use, as JSON schemas.

Written from KubeRay's documented API (1.6). The operator's own definitions are a hundred times as long, most of it the
pod, which Kubernetes' own schema judges in the test. A field that is not listed is refused, where an API server would
drop it without a word. With ``KUBERAY_CRDS=<folder>``, the ``crds`` of the operator's Helm chart, tests/test_deploy.py
judges by those definitions as well.
"""

from __future__ import annotations

from typing import Any

COUNT = {"type": "integer", "minimum": 0}
TEXT = {"type": "string"}
FLAG = {"type": "boolean"}
POD = {"type": "object", "required": ["spec"]}  # judged apart


def closed(required: str = "", **properties: Any) -> dict[str, Any]:
    """An object that has these properties and no other; the ones named in ``required`` always."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


# `ray start` flags: texts, whatever they mean. A bare 0 or true is refused by the API server.
START_PARAMS = {"type": "object", "additionalProperties": TEXT}

CLUSTER_SPEC = closed(
    "headGroupSpec",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=closed(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        image=TEXT,
        resources={"type": "object"},
    ),
    headGroupSpec=closed("template", serviceType=TEXT, rayStartParams=START_PARAMS, template=POD),
    workerGroupSpecs={
        "type": "array",
        "items": closed(
            "groupName minReplicas maxReplicas template",
            groupName={"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$"},
            labels={"type": "object", "additionalProperties": TEXT},
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts={"type": "integer", "minimum": 1},
            idleTimeoutSeconds=COUNT,
            suspend=FLAG,
            rayStartParams=START_PARAMS,
            template=POD,
        ),
    },
)

JOB_SPEC = closed(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    entrypointNumCpus={"type": "number", "minimum": 0},
    runtimeEnvYAML=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    suspend=FLAG,
    rayClusterSpec=CLUSTER_SPEC,
)


def resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    name = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?-?$", "maxLength": 47}
    metadata = closed(name=name, generateName=name, labels={"type": "object"}, annotations={"type": "object"})
    return closed(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata={**metadata, "minProperties": 1},
        spec=spec,
    )


SCHEMAS = {"RayCluster": resource("RayCluster", CLUSTER_SPEC), "RayJob": resource("RayJob", JOB_SPEC)}


def strict(definition: dict[str, Any]) -> dict[str, Any]:
    """The v1 schema of an operator's CustomResourceDefinition, with unknown fields refused."""

    def close(schema: Any) -> Any:
        if isinstance(schema, list):
            return [close(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        out = {key: close(value) for key, value in schema.items()}
        keeps = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
        if isinstance(schema.get("properties"), dict) and not keeps:
            out["additionalProperties"] = False
        return out

    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    out = close(version["schema"]["openAPIV3Schema"])
    out["properties"]["metadata"] = {
        "type": "object"
    }  # the API server knows its fields, the definition does not
    return out
