"""What lies in deploy/ and .github/ is well formed, keeps its promises, and names one Ray and one Python."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import re
import shlex
import tomllib
import urllib.parse
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import tyro
import yaml
from kuberay import SCHEMAS, strict

from logonet import cli

ROOT = pathlib.Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.31"  # the oldest that is still in wide use: what it accepts, later ones do


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RAY, PYTHON = pins()["ray"], PROJECT["tool"]["mypy"]["python_version"]
VERSION = PROJECT["project"]["version"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
LAUNCHED = [ROOT / "cluster.yaml", DEPLOY / "on-premise.yaml"]


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "kuberay" / f"{name}.yaml").read_text())


def cluster_of(name: str) -> dict[str, Any]:
    spec = manifest(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"head": cluster["headGroupSpec"], **{g["groupName"]: g for g in cluster["workerGroupSpecs"]}}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


def walk(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of everything in a parsed YAML file."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from walk(value, f"{path}.{key}")
    else:
        yield path, tree


# ------------------------------------------------------------------------------------------- KubeRay


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kuberay_and_kubernetes_accept_the_manifests(name):
    made = manifest(name)
    jsonschema.validate(made, SCHEMAS[made["kind"]])
    for group in groups(cluster_of(name)).values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    for part in yaml.safe_load_all((DEPLOY / "kuberay" / "settings.yaml").read_text()):
        kubernetes_validate.validate(part, KUBERNETES, strict=True)


@pytest.mark.skipif(
    "KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder of an operator's CRDs"
)
@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_the_operators_own_definitions_accept_the_manifests(name):
    crd = pathlib.Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{name}s.yaml"
    jsonschema.validate(manifest(name), strict(yaml.safe_load(crd.read_text())))


def test_the_schemas_are_enforced():
    """Guards the tests above: what the API server would refuse or drop without a word is refused."""
    for wrong in ({"rayStartParams": {"num-cpus": 0}}, {"spot": True}, {"template": {}}):
        made = copy.deepcopy(manifest("raycluster"))
        made["spec"]["headGroupSpec"].update(wrong)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(made, SCHEMAS["RayCluster"])
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p"},
        "spec": {"containers": [{"image": "i"}]},
    }
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_a_job_has_the_cluster_that_stays():
    assert cluster_of("rayjob") == cluster_of("raycluster")


def gib(quantity: str) -> int:
    return int(quantity.removesuffix("Gi"))


@pytest.mark.parametrize("name", ["head", "cpu", "gpu"])
def test_pods_are_guaranteed_what_they_use(name):
    group = groups(cluster_of("raycluster"))[name]
    pod, ray = group["template"]["spec"], container(group)
    assert ray["resources"]["requests"] == ray["resources"]["limits"]
    shm = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    (mount,) = ray["volumeMounts"]
    assert mount["mountPath"] == "/dev/shm"
    assert shm[mount["name"]]["medium"] == "Memory"
    memory = gib(ray["resources"]["limits"]["memory"])
    assert (
        0.3 * memory <= gib(shm[mount["name"]]["sizeLimit"]) <= 0.4 * memory
    )  # Ray's object store wants 0.3
    assert ("nvidia.com/gpu" in ray["resources"]["limits"]) == (name == "gpu")
    assert ray["image"].endswith("-cuda" if name == "gpu" else "-cpu")


@pytest.mark.parametrize("name", ["head", "cpu", "gpu"])
def test_pods_are_nobody_special_and_their_agent_has_a_safe_port(name):
    group = groups(cluster_of("raycluster"))[name]
    pod, ray = group["template"]["spec"], container(group)
    assert pod["securityContext"]["runAsNonRoot"]
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    assert pod["securityContext"]["runAsUser"] == int(user) > 0
    assert ray["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert pod["serviceAccountName"] == "logonet"
    assert {"configMapRef": {"name": "logonet"}} in ray["envFrom"]
    assert 1024 < int(group["rayStartParams"]["dashboard-agent-listen-port"]) < 32768


def test_nothing_is_scheduled_on_the_head_and_only_a_token_submits():
    cluster = cluster_of("raycluster")
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_worker_that_must_go_has_the_time_to_say_so(name):
    group = groups(cluster_of("raycluster"))[name]
    env = {e["name"]: e["value"] for e in container(group)["env"]}
    drain_s = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    from ray._private import ray_constants

    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")  # this Ray knows the variable
    assert 60 <= drain_s <= group["template"]["spec"]["terminationGracePeriodSeconds"] - 30
    (*_, words) = container(group)["lifecycle"]["postStart"]["exec"]["command"]
    assert "logonet spot-watch" in words and words.endswith("&")  # the pod starts while it goes on


def test_all_pods_are_in_one_zone():
    pools = [groups(cluster_of("raycluster"))[name]["template"]["spec"] for name in ("cpu", "gpu")]
    assert len({pool["nodeSelector"]["topology.kubernetes.io/zone"] for pool in pools}) == 1


def test_a_job_that_is_stopped_has_the_time_for_a_checkpoint(on_premise):
    from ray.dashboard.modules.job import job_supervisor

    assert (
        "RAY_JOB_STOP_WAIT_TIME_S" in pathlib.Path(job_supervisor.__file__).read_text()
    )  # this Ray knows it
    head = container(groups(cluster_of("raycluster"))["head"])
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "120"} in head["env"]
    assert "--env RAY_JOB_STOP_WAIT_TIME_S=120" in on_premise["docker"]["run_options"]


def test_a_job_retries_and_leaves_nothing_behind():
    spec = manifest("rayjob")["spec"]
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0


def test_the_jobs_command_is_one_that_the_job_takes():
    python, dash_m, module, *args = shlex.split(manifest("rayjob")["spec"]["entrypoint"])
    assert (python, dash_m, module) == ("python", "-m", "jobs.pretrain")
    parsed = tyro.cli(cli.JobArgs, args=args, config=(tyro.conf.AvoidSubcommands,))
    assert parsed.resources.gpu is True
    gpu = groups(cluster_of("rayjob"))["gpu"]
    gpus = gpu["maxReplicas"] * container(gpu)["resources"]["limits"]["nvidia.com/gpu"]
    assert getattr(parsed.resources, "most", parsed.resources.workers) <= gpus
    assert parsed.data.startswith("s3://") and parsed.root.startswith("s3://")


# ---------------------------------------------------------------------------------------- on premise


@pytest.fixture(scope="module")
def on_premise() -> dict[str, Any]:
    """As ``ray up`` sees it, with Ray's defaults filled in and checked against Ray's own schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    filled = prepare_config(yaml.safe_load((DEPLOY / "on-premise.yaml").read_text()))
    validate_config(filled)
    return filled


def test_on_premise_all_machines_join_and_the_head_takes_no_work(on_premise):
    node_type = on_premise["available_node_types"]["local.cluster.node"]
    machines = len(on_premise["provider"]["worker_ips"])
    assert node_type["min_workers"] == node_type["max_workers"] == on_premise["max_workers"] == machines
    assert "--num-cpus=0" in on_premise["head_start_ray_commands"][-1]


def test_on_premise_only_a_token_joins_and_the_dashboard_is_not_open(on_premise):
    options = on_premise["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    assert "--ulimit nofile=65536:65536" in options
    assert any(option.startswith("--env-file ") for option in options)
    head, worker = on_premise["head_start_ray_commands"][-1], on_premise["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    for command in (head, worker):
        (port,) = re.findall(r"--dashboard-agent-listen-port=(\d+)", command)
        assert 1024 < int(port) < 32768
    for kind in ("head_run_options", "worker_run_options"):
        assert any(option.startswith("--shm-size=") for option in on_premise["docker"][kind])


# ------------------------------------------------------------------------------- MLflow and monitoring


def mlflow_parts() -> dict[tuple[str, str], dict[str, Any]]:
    """Of kubernetes.yaml, by kind and name."""
    parts = yaml.safe_load_all((DEPLOY / "mlflow" / "kubernetes.yaml").read_text())
    return {(part["kind"], part["metadata"]["name"]): part for part in parts}


def test_kubernetes_and_compose_accept_mlflow():
    from check_jsonschema.builtin_schemas import get_builtin_schema

    for part in mlflow_parts().values():
        kubernetes_validate.validate(part, KUBERNETES, strict=True)
    compose = yaml.safe_load((DEPLOY / "mlflow" / "compose.yaml").read_text())
    schema = get_builtin_schema("vendor.compose-spec")
    jsonschema.validate(compose, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**compose, "services": {"mlflow": {"imgae": "i"}}}, schema)


def test_mlflow_is_the_same_server_on_both_and_where_the_clusters_look_for_it():
    parts = mlflow_parts()
    compose = yaml.safe_load((DEPLOY / "mlflow" / "compose.yaml").read_text())["services"]
    for name, kind in (("postgres", "StatefulSet"), ("mlflow", "Deployment")):
        (there,) = parts[kind, name]["spec"]["template"]["spec"]["containers"]
        settings = {e["name"]: e["value"] for e in there["env"]} | {"PGDATA": None}
        assert settings.keys() == {"PGDATA", *compose[name]["environment"]}
        assert there["image"] == compose[name]["image"]
        (port,) = parts["Service", name]["spec"]["ports"]
        assert port["port"] == there["ports"][0]["containerPort"]
        same = [
            "MLFLOW_BACKEND_STORE_URI",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION",
            "POSTGRES_USER",
            "POSTGRES_DB",
        ]
        assert all(settings.get(key) == compose[name]["environment"].get(key) for key in same)
    assert compose["mlflow"]["image"] == f"registry.example.com/logonet-mlflow:{VERSION}"
    (*_, config) = yaml.safe_load_all((DEPLOY / "kuberay" / "settings.yaml").read_text())
    url = urllib.parse.urlsplit(config["data"]["MLFLOW_TRACKING_URI"])
    assert url.hostname == "mlflow.mlflow.svc"  # service, namespace
    assert url.port == 5000
    assert f"{url.hostname}:*" in settings["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    for file in (DEPLOY / "on-premise.yaml", ROOT / "cluster.yaml"):
        (uri,) = re.findall(r"--env MLFLOW_TRACKING_URI=http://(\S+):5000", file.read_text())
        assert f"{uri}:*" in compose["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


def test_mlflows_image_installs_through_the_constraints_and_is_not_root():
    text = (DEPLOY / "mlflow" / "Dockerfile").read_text()
    assert re.findall(r"^COPY (.+)$", text, re.MULTILINE) == ["constraints.txt /tmp/"]
    (packages,) = re.findall(r"pip install --constraint /tmp/constraints.txt (.+?) \\", text)
    assert set(packages.split()) <= pins().keys()
    assert f"FROM python:{PYTHON}-slim" in text
    assert re.findall(r"^USER (\d+)$", text, re.MULTILINE) == ["1000"]


def test_grafana_draws_every_metric_of_ours_and_no_other():
    from logonet.distributed import gauges

    board = json.loads((DEPLOY / "monitoring" / "grafana.json").read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)  # no panel covers another
    assert max(x for x, _ in cells) < 24
    queries = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    counters = {f"{name}_total" for name in gauges.COUNTERS}
    assert set(re.findall(r"ray_logonet_(\w+)", queries)) == gauges.GAUGES.keys() | counters
    documented = set(re.findall(r"`ray_logonet_(\w+)`", (ROOT / "docs" / "cluster.md").read_text()))
    assert documented == gauges.GAUGES.keys() | counters


# --------------------------------------------------------------------------------------------- image


def copied() -> list[str]:
    """What the image takes from the checkout."""
    lines = re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def test_the_image_gets_all_that_it_copies_and_nothing_else():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied()) == sorted(allowed)
    assert all((ROOT / source).exists() for source in copied())


def test_the_image_installs_through_the_constraints_and_is_not_root():
    installs = re.findall(r"pip install (?!--no-deps)(\S+ \S+)", DOCKERFILE)
    assert installs and set(installs) == {"--constraint constraints.txt"}
    users = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert users and users[-1] != "root"


def test_both_variants_are_stages():
    stages = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)
    assert {"torch-cpu", "torch-cuda"} < set(stages)


# ------------------------------------------------------------------------------------------ all of it


def images() -> list[str]:
    manifests = [manifest("raycluster"), manifest("rayjob")]
    launchers = [yaml.safe_load(file.read_text()) for file in LAUNCHED]
    return [
        str(leaf) for tree in (*manifests, *launchers) for path, leaf in walk(tree) if path.endswith("image")
    ]


def test_everything_names_one_ray_and_one_python():
    assert f"FROM python:{PYTHON}-slim" in DOCKERFILE
    assert f"ARG RAY_VERSION={RAY}\n" in DOCKERFILE
    for name in ("raycluster", "rayjob"):
        assert cluster_of(name)["rayVersion"] == RAY
    for launched in LAUNCHED:
        assert f"Ray {RAY} and Python {PYTHON}" in launched.read_text()
    assert f"python{PYTHON}" in (ROOT / "Makefile").read_text()
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        named = [
            str(leaf) for path, leaf in walk(yaml.safe_load(file.read_text())) if "python-version" in path
        ]
        assert named == [PYTHON] * len(named) and named
    assert len(images()) >= 8
    assert all(
        re.fullmatch(rf"registry\.example\.com/logonet:{VERSION}-(cpu|cuda)", image) for image in images()
    )
    assert f"logonet:{VERSION}-" in DOCKERFILE


SECRET = re.compile(
    r"(ACCESS_KEY|SECRET|TOKEN|PASSWORD)[A-Z_]*[\"']?\s*[:=]\s*(?!\.\.\.)[\"']?[\w/+$]", re.IGNORECASE
)


@pytest.mark.parametrize(
    "file", [*DEPLOY.rglob("*.*"), DEPLOY / "Dockerfile", ROOT / "cluster.yaml"], ids=lambda f: f.name
)
def test_no_file_holds_a_credential(file):
    for line in file.read_text().splitlines():
        found = SECRET.search(line)
        assert not found or "$(" in line, f"{file.name}: {line.strip()}"


def test_a_credential_would_be_found():
    assert SECRET.search("AWS_SECRET_ACCESS_KEY: wJalrXUtnFEMI")
    assert SECRET.search("--env AWS_ACCESS_KEY_ID=AKIA0000")
    assert not SECRET.search("AWS_ACCESS_KEY_ID=..., AWS_SECRET_ACCESS_KEY=...")


@pytest.mark.parametrize("name", ["ci", "docs"])
def test_workflows_are_what_github_accepts(name):
    from check_jsonschema.builtin_schemas import get_builtin_schema

    flow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    schema = get_builtin_schema("vendor.github-workflows")
    jsonschema.validate(flow, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**flow, "jobs": {"j": {"run-on": "ubuntu-latest"}}}, schema)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = [leaf for path, leaf in walk(flow) if path.endswith("run") and leaf.startswith("make ")]
    assert commands
    for command in commands:
        named = command.split()[1:]
        assert named == ["${{", "matrix.target", "}}"] or set(named) <= targets
    matrix = flow["jobs"].get("test", {}).get("strategy", {}).get("matrix", {}).get("target", [])
    assert set(matrix) <= targets
