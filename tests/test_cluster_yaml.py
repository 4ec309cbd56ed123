"""cluster.yaml is what Ray's launcher accepts, and keeps a few promises that cost money when broken."""

from __future__ import annotations

import copy
import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def written():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def filled(written):
    """As ``ray up`` sees it, with Ray's defaults filled in and checked against Ray's own schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(written))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", ["head", "cpu", "gpu"])
def test_every_node_can_reach_the_bucket_and_encrypts_its_disk(filled, name):
    node = filled["available_node_types"][name]["node_config"]
    assert node["IamInstanceProfile"]
    assert node["ImageId"].startswith("ami-")
    assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])


def test_the_schema_is_enforced(written):
    """Guards the fixture above: validate_config must refuse what Ray does not know."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    wrong = copy.deepcopy(written)
    wrong["available_node_types"]["gpu"]["spot"] = True
    with pytest.raises(ValidationError, match="spot"):
        validate_config(prepare_config(wrong))


def test_nothing_is_scheduled_on_the_head_and_it_is_not_spot(filled):
    assert filled["head_node_type"] == "head"
    head = filled["available_node_types"]["head"]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]


def test_the_gpu_pool_is_spot_and_the_cpu_pool_has_no_gpu(filled):
    types = filled["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "GPU" not in types["cpu"]["resources"]
    assert types["cpu"]["node_config"]["InstanceType"].startswith("m")


def test_pools_start_empty_and_can_all_be_full(filled):
    pools = [
        node for name, node in filled["available_node_types"].items() if name != filled["head_node_type"]
    ]
    assert all(pool["min_workers"] == 0 for pool in pools)
    assert sum(pool["max_workers"] for pool in pools) == filled["max_workers"]


# EC2's memory of the chosen instance types, GiB.
MEMORY_GIB = {"m6i.xlarge": 16, "m6i.4xlarge": 64, "g5.2xlarge": 32}


@pytest.mark.parametrize("name", ["head", "cpu", "gpu"])
def test_containers_have_files_and_shared_memory(filled, name):
    docker, node = filled["docker"], filled["available_node_types"][name]
    assert "--ulimit nofile=65536:65536" in docker["run_options"]
    if name == "head":
        options = docker["head_run_options"]
    else:
        options = node.get("docker", {}).get("worker_run_options", docker["worker_run_options"])
    (shm_gib,) = re.findall(r"--shm-size=(\d+)g", " ".join(options))
    memory_gib = MEMORY_GIB[node["node_config"]["InstanceType"]]
    assert 0.3 * memory_gib <= int(shm_gib) <= 0.4 * memory_gib  # Ray's object store wants 0.3


def test_images_hold_the_ray_and_python_that_are_tested(filled):
    import ray

    images = [filled["docker"]["image"], filled["docker"]["head_image"]]
    images += [
        node["docker"]["worker_image"] for node in filled["available_node_types"].values() if "docker" in node
    ]
    assert len(images) == 3
    for image in images:
        assert re.fullmatch(rf"rayproject/ray:{re.escape(ray.__version__)}-py311-(cpu|gpu)", image)
    assert filled["docker"]["image"].endswith("gpu")


def test_setup_installs_this_checkout_through_its_constraints(filled):
    (install,) = filled["setup_commands"]
    (remote,) = [remote for remote, local in filled["file_mounts"].items() if local == "."]
    assert install == f"pip install --constraint {remote}/constraints.txt {remote}"
    for commands in (filled["head_setup_commands"], filled["worker_setup_commands"]):
        assert install in commands


def test_the_dashboard_is_not_open_and_agents_have_a_safe_port(filled):
    (_, head), (_, worker) = filled["head_start_ray_commands"], filled["worker_start_ray_commands"]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    for command in (head, worker):
        (port,) = re.findall(r"--dashboard-agent-listen-port=(\d+)", command)
        assert 1024 < int(port) < 32768
