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
    assert types["gpu"]["resources"]["GPU"] == 4
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
MEMORY_GIB = {"m6i.xlarge": 16, "m6i.4xlarge": 64, "g5.12xlarge": 192}


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


def test_nodes_come_with_everything_inside_and_install_nothing(filled):
    """tests/test_deploy.py holds the images' names together."""
    images = [filled["docker"]["image"], filled["docker"]["head_image"]]
    images += [
        node["docker"]["worker_image"] for node in filled["available_node_types"].values() if "docker" in node
    ]
    assert [image.rpartition("-")[2] for image in images] == ["cuda", "cpu", "cpu"]
    for commands in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert not [command for command in filled[commands] if "install" in command]


def test_all_nodes_are_in_one_zone_and_jobs_have_the_time_to_stop(filled):
    assert "," not in filled["provider"]["availability_zone"]
    assert all("SubnetId" not in node["node_config"] for node in filled["available_node_types"].values())
    (wait_s,) = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", " ".join(filled["docker"]["run_options"]))
    assert int(wait_s) >= 60


def test_every_spot_node_is_watched(filled):
    words = filled["worker_start_ray_commands"][-1]
    assert "logonet spot-watch" in words and words.endswith("&")
    assert "spot-watch" not in " ".join(filled["head_start_ray_commands"])


def test_the_dashboard_is_not_open_and_agents_have_a_safe_port(filled):
    (_, head), (_, worker, _) = filled["head_start_ray_commands"], filled["worker_start_ray_commands"]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    for command in (head, worker):
        (port,) = re.findall(r"--dashboard-agent-listen-port=(\d+)", command)
        assert 1024 < int(port) < 32768
