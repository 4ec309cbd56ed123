"""A trained network as a folder: what is written is read, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from logonet import networks
from logonet.core import config
from logonet.core.errors import UserError
from logonet.inference import model
from logonet.inference.model import CONFIG_FILE, WEIGHTS_FILE, Spec
from logonet.storage import object_store

NAME = "ulkanet"


def spec(**changes: Any) -> Spec:
    values: dict[str, Any] = {
        "backbone": {"name": NAME, **networks.tiny(NAME)},
        "in_channels": 1,
        "classes": ("background", "liver", "spleen"),
        "label_values": (0, 6, 1),
        "size_vox": (32, 32, 32),
        "spacing_mm": (1.5, 1.5, 2.0),
        "window_hu": (-175.0, 250.0),
        "mr_percentiles": (0.5, 99.5),
        "modality": "CT",
    }
    return Spec(**(values | changes))


def network(seed: int = 0, classes: int = 3) -> torch.nn.Module:
    torch.manual_seed(seed)
    return networks.build(NAME, 1, classes, **networks.tiny(NAME)).eval()


def folder_of(root: str, given: Spec, weights: dict[str, torch.Tensor]) -> str:
    for name, data in model.files(given, weights).items():
        object_store.write(object_store.join(root, name), data)
    return root


@pytest.mark.parametrize("spacing_mm", [None, (1.5, 1.5, 2.0)])
@pytest.mark.parametrize("where", ["local", "s3"])
def test_what_is_written_is_read(
    where: str, spacing_mm: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if where == "local" else request.getfixturevalue("bucket") + "/model"
    net, given = network(), spec(spacing_mm=spacing_mm)
    read_spec, weights = model.read(folder_of(root, given, net.state_dict()))
    assert config.to_dict(read_spec) == config.to_dict(given)
    built = model.build(read_spec, weights)
    assert not built.training
    x_BCXYZ = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert torch.equal(built(x_BCXYZ).logits, net(x_BCXYZ).logits)


def test_equal_models_give_equal_bytes() -> None:
    weights = network().state_dict()
    turned = dict(reversed(list(weights.items())))
    assert model.files(spec(), weights) == model.files(spec(), turned)
    assert model.files(spec(), weights) != model.files(spec(), network(1).state_dict())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"classes": ("liver", "spleen", "aorta")}, "background"),
        ({"label_values": (0, 1)}, "2 label_values for 3 classes"),
        ({"label_values": (0, 1, 1)}, "distinct"),
        ({"label_values": (0, 1, 256)}, "from 0 to 255"),
        ({"modality": "PET"}, "'PET'"),
        ({"backbone": {}}, "backbone has no name"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"window_hu": (100.0, 100.0)}, "window_hu"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "spacing_mm"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        spec(**changes)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda v: v | {"colour": "red"}, "unknown config key 'colour'"),
        (lambda v: {k: x for k, x in v.items() if k != "classes"}, "classes is missing"),
        (lambda v: {k: x for k, x in v.items() if k != "window_hu"}, "window_hu is missing"),
        (lambda v: v | {"size_vox": "big"}, "size_vox is .big"),
        (lambda v: v | {"modality": "PET"}, "'PET'"),
        (lambda v: [v], "must be a mapping"),
    ],
)
def test_a_bad_config_file_is_named(edit: Any, sentence: str, tmp_path: Path) -> None:
    folder = folder_of(str(tmp_path), spec(), network().state_dict())
    uri = object_store.join(folder, CONFIG_FILE)
    object_store.write_json(uri, edit(json.loads(object_store.read(uri))))
    with pytest.raises(UserError, match=sentence) as caught:
        model.read(folder)
    assert uri in str(caught.value)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("keep", [None, 0, 100])
def test_a_missing_or_torn_file_is_named(name: str, keep: int | None, tmp_path: Path) -> None:
    folder = folder_of(str(tmp_path), spec(), network().state_dict())
    uri = object_store.join(folder, name)
    data = object_store.read(uri)
    object_store.delete(uri)
    if keep is not None:
        object_store.write(uri, data[:keep])
    with pytest.raises(UserError) as caught:
        model.read(folder)
    assert uri in str(caught.value)


def test_foreign_weights_are_refused() -> None:
    weights = dict(network().state_dict())
    with pytest.raises(UserError, match="does not fit the backbone 'ulkanet'"):
        model.build(spec(), network(classes=4).state_dict())
    lacking = {k: v for k, v in weights.items() if k != min(weights)}
    with pytest.raises(UserError, match=r"Missing key.*" + min(weights)):
        model.build(spec(), lacking)
    with pytest.raises(UserError, match=r"Unexpected key.*extra"):
        model.build(spec(), weights | {"extra": torch.zeros(1)})


def test_weights_that_diverged_are_refused() -> None:
    weights = dict(network().state_dict())
    name = next(k for k, v in weights.items() if v.is_floating_point())
    weights[name] = torch.full_like(weights[name], torch.nan)
    with pytest.raises(UserError, match=f"'{name}' is not finite"):
        model.build(spec(), weights)


def test_a_window_that_the_backbone_cannot_take_is_refused() -> None:
    with pytest.raises(UserError, match="does not fit backbone 'ulkanet'"):
        model.build(spec(size_vox=(32, 33, 32)), network().state_dict())
    with pytest.raises(UserError, match="unknown backbone 'unett'"):
        model.build(spec(backbone={"name": "unett"}), {})


# ------------------------------------------------------------------------------------------- batch norm

# Of each network with batch norms, how many stay: those before attention and MLPs, and of patches, in ULKANets.
STAY = {"attention_unet": 0, "logonet": 60, "pcrlv2": 0, "ulkanet": 12, "unet": 0}


def batch_norms(net: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in net.modules())


def tiny(name: str) -> nn.Module:
    return networks.build(name, 1, 3, **networks.tiny(name)).eval()


def test_every_network_with_batch_norms_is_tested() -> None:
    with torch.device("meta"):
        assert {name for name in networks.names() if batch_norms(tiny(name))} == STAY.keys()


@pytest.mark.parametrize("name", STAY)
def test_a_folded_network_gives_the_same_answers(name: str) -> None:
    torch.manual_seed(0)
    net = tiny(name).double()
    for module in net.modules():
        if isinstance(module, _BatchNorm):  # as after training, not the identity that they begin as
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 2)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    x_BCXYZ = torch.rand(1, 1, 64, 64, 64, dtype=torch.float64)
    folded = model.folded(net)
    with torch.inference_mode():
        torch.testing.assert_close(folded(x_BCXYZ).logits, net(x_BCXYZ).logits, rtol=1e-9, atol=1e-9)
    assert batch_norms(folded) == STAY[name] < batch_norms(net)
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
