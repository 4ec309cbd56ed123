"""Several models as one: the mean of their probabilities, wherever a model is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from logonet import networks
from logonet.core import config
from logonet.core.config import Component
from logonet.core.errors import UserError
from logonet.data import phantom
from logonet.inference import export, model
from logonet.inference.load import load_model
from logonet.inference.sliding_window import Config, Predictor

SIZE = (16, 16, 16)
NAMES = ("unet", "attention_unet", "unet")


def spec(name: str = "unet", **changes: Any) -> model.Spec:
    values: dict[str, Any] = {
        "backbone": {"name": name, **networks.tiny(name)},
        "in_channels": 1,
        "classes": ("background", "liver", "spleen"),
        "label_values": (0, 6, 1),
        "size_vox": SIZE,
        "spacing_mm": (3.0, 3.0, 3.0),
        "window_hu": (-175.0, 250.0),
        "mr_percentiles": (0.5, 99.5),
        "modality": "CT",
    }
    return model.Spec(**(values | changes))


def member(given: model.Spec, seed: int) -> tuple[model.Spec, dict[str, Tensor]]:
    torch.manual_seed(seed)
    net: Any = networks.from_component(given.backbone, given.in_channels, given.num_outputs)
    with torch.no_grad():  # so that members disagree, and are sure of it
        for parameter in net.parameters():
            parameter.mul_(1.5)
    return given, net.state_dict()


def write(folder: Path, given: model.Spec, weights: dict[str, Tensor]) -> str:
    folder.mkdir()
    for name, blob in model.files(given, weights).items():
        (folder / name).write_bytes(blob)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("members")
    return [write(place / str(i), *member(spec(name), i)) for i, name in enumerate(NAMES)]


REGIONS = {"regions": {"both": ("liver", "spleen"), "spleen": ("spleen",)}, "region_values": (6, 1)}


@pytest.mark.parametrize("special", [{}, REGIONS], ids=["classes", "regions"])
def test_its_answer_is_the_mean_of_the_members_probabilities(special: dict[str, Any]) -> None:
    members = [member(spec(name, **special), i) for i, name in enumerate(NAMES)]
    net = model.build(*model.ensemble(members))
    x_BCXYZ = torch.rand(2, 1, *SIZE)
    with torch.inference_mode():
        logits = [model.build(*one)(x_BCXYZ).logits for one in members]
        found = net(x_BCXYZ).logits
    if special:
        expected = sum(1 / (1 + torch.exp(-x)) for x in logits) / 3 - 0.5
    else:
        powers = [torch.exp(x - x.amax(1, keepdim=True)) for x in logits]
        expected = sum(p / p.sum(1, keepdim=True) for p in powers) / 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_scan_is_segmented_as_by_monais_sliding_window_over_the_mean(folders: list[str]) -> None:
    from monai.inferers import sliding_window_inference

    loaded = load_model(",".join(folders), device="cpu")
    scan, _ = phantom.phantom(0, (26, 18, 22), (3.0, 3.0, 3.0))
    found_XYZ = loaded.segment((scan.array_CXYZ[0], scan.affine), "CT")
    nets = [model.build(*model.read(folder)) for folder in folders]

    def mean(x_BCXYZ: Tensor) -> Tensor:
        return torch.stack([net(x_BCXYZ).logits.softmax(1) for net in nets]).mean(0)

    image = ((scan.array_CXYZ - -175) / 425).clip(0, 1).astype(np.float32)
    with torch.inference_mode():
        blended: Any = sliding_window_inference(
            torch.from_numpy(image)[None], SIZE, 1, mean, Config().overlap, mode="gaussian"
        )
    expected_XYZ = np.array([0, 6, 1])[blended[0].argmax(0).numpy()]
    assert len(np.unique(expected_XYZ)) > 1, "the test needs networks that say more than one thing"
    assert np.mean(found_XYZ != expected_XYZ) < 1e-3
    single = [load_model(f, device="cpu").segment((scan.array_CXYZ[0], scan.affine), "CT") for f in folders]
    assert all((found_XYZ != one).any() for one in single)


def test_an_ensemble_is_a_folder_like_any_model(folders: list[str], tmp_path: Path) -> None:
    loaded = load_model(",".join(folders), device="cpu")
    assert set(loaded.folder) == set(model.FILES)
    assert "unet + attention_unet + unet with" in repr(loaded)
    for name, blob in loaded.folder.items():
        (tmp_path / name).write_bytes(blob)
    again = load_model(str(tmp_path), device="cpu")
    assert again.id == loaded.id
    scan, _ = phantom.phantom(1, (20, 18, 16), (3.0, 3.0, 3.0))
    predictor = Predictor.load(str(tmp_path), device="cpu")
    np.testing.assert_array_equal(
        predictor.segment(scan, "CT"), loaded.segment((scan.array_CXYZ[0], scan.affine), "CT")
    )
    made = export.network(
        [config.to_dict(part) for part in loaded.spec.components], 1, 3
    )  # as a bundle's config builds it
    made.load_state_dict(model.parse(again.folder)[1])


def test_one_model_is_what_it_was(folders: list[str]) -> None:
    text = (Path(folders[0]) / model.CONFIG_FILE).read_text()
    assert "ensemble" not in text and "largest_component" not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": ("background", "liver", "kidney")}, "differ in classes"),
        (
            {"spacing_mm": (1.0, 1.0, 1.0)},
            r"differ in spacing_mm \(\[3.0, 3.0, 3.0\] and \[1.0, 1.0, 1.0\]\)",
        ),
        ({"size_vox": (32, 32, 32)}, "differ in size_vox"),
        ({"in_channels": 2}, "differ in in_channels"),
        ({"largest_component": ("liver",)}, "differ in largest_component"),
    ],
)
def test_members_must_agree(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"members 1 and 2 of the ensemble {said}"):
        model.ensemble([member(spec(), 0), member(spec(**changes), 1)])


def test_what_is_no_ensemble_says_so(folders: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names a member of the ensemble twice"):
        load_model(f"{folders[0]},{folders[0]}")
    whole = write(tmp_path / "whole", *model.ensemble([model.read(folder) for folder in folders]))
    with pytest.raises(UserError, match="is an ensemble itself; name its members"):
        load_model(f"{whole},{folders[0]}")
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(f"{folders[0]},{tmp_path}/nothing")


def test_of_two_networks_each_is_checked_against_the_window(folders: list[str]) -> None:
    given, weights = model.ensemble([model.read(folder) for folder in folders])
    wrong = config.to_dict(given) | {"size_vox": [15, 16, 16]}
    with pytest.raises(UserError, match="crop size"):
        model.build(config.from_dict(model.Spec, wrong), weights)
    assert given.components[1] == Component.of(config.to_dict(spec("attention_unet").backbone), "")


def test_an_ensemble_is_written_as_onnx(folders: list[str], tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", *model.ensemble([model.read(folder) for folder in folders[::2]]))
    parity = export.write_onnx(whole, str(tmp_path / "net.onnx"))
    assert parity.max_abs_logit <= 1, "probabilities"
