"""Networks and weights that are nnU-Net's own: against its layers word for word, and, marked, against the released one.

Letters: B batch, C channels, K classes, XYZ the crop's axes, which nnU-Net has as ZYX.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from logonet import networks
from logonet.core.config import Component
from logonet.core.errors import UserError
from logonet.data import phantom, volume
from logonet.inference.export import nnunet
from logonet.storage import artifacts, object_store

pytestmark = pytest.mark.usefixtures("one_thread")

REPO = Path(__file__).parents[1]
SIZE_VOX, SPACING_MM = (24, 16, 8), (1.0, 1.5, 3.0)
OPTIONS: dict[str, dict[str, Any]] = {
    "residual": {
        "features": (4, 8, 8, 12),
        "kernel_size": ((3, 3, 1), (3, 3, 3), (3, 3, 3), (5, 3, 3)),
        "strides": ((1, 1, 1), (2, 2, 1), (2, 1, 1), (2, 2, 2)),
        "blocks": (1, 2, 2, 1),
        "deep_supervision": True,
        "zero_init": False,
    },
    "plain": {
        "encoder": "plain",
        "features": (4, 8, 12),
        "kernel_size": ((3, 3, 1), (3, 3, 3), (3, 3, 3)),
        "strides": ((1, 1, 1), (2, 2, 1), (2, 2, 2)),
        "blocks": (2, 3, 2),
        "deep_supervision": True,
    },
}
BOTH = pytest.mark.parametrize("encoder", list(OPTIONS))


def network(encoder: str, in_channels: int = 1, **more: Any) -> Any:
    torch.manual_seed(0)
    net = networks.build("resenc", in_channels, 3, **{**OPTIONS[encoder], **more})
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)  # no bias and no norm at its initial value
    return net


def crop(in_channels: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, in_channels, *SIZE_VOX, generator=torch.Generator().manual_seed(1))


class Theirs:
    """nnU-Net's network from an exported checkpoint and its plan, under the second of its names for every tensor."""

    def __init__(self, weights: dict[str, Tensor], kwargs: dict[str, Any]) -> None:
        self.weights, self.kwargs = weights, kwargs

    def conv(self, x: Tensor, name: str, stride: Any = 1, act: bool = True) -> Tensor:
        weight = self.weights[f"{name}.all_modules.0.weight"]
        padding = [side // 2 for side in weight.shape[2:]]
        bias = self.weights.get(f"{name}.all_modules.0.bias")
        x = F.conv3d(x, weight, bias, stride, padding)
        scale, shift = (self.weights[f"{name}.all_modules.1.{part}"] for part in ("weight", "bias"))
        x = F.instance_norm(x, weight=scale, bias=shift, eps=1e-5)
        return F.leaky_relu(x, 0.01) if act else x

    def block(self, x: Tensor, name: str, stride: Any) -> Tensor:
        out = self.conv(self.conv(x, f"{name}.conv1", stride), f"{name}.conv2", act=False)
        strided = any(side != 1 for side in stride)
        skip = F.avg_pool3d(x, stride, stride) if strided else x
        if out.shape[1] != x.shape[1]:
            skip = self.conv(skip, f"{name}.skip.{int(strided)}", act=False)
        return F.leaky_relu(out + skip, 0.01)

    def stages(self, x: Tensor) -> list[Tensor]:
        encoder, feats = "decoder.encoder", []
        residual = "n_blocks_per_stage" in self.kwargs
        if residual:
            x = self.conv(x, f"{encoder}.stem.convs.0")
        depths = self.kwargs["n_blocks_per_stage" if residual else "n_conv_per_stage"]
        for s, (depth, stride) in enumerate(zip(depths, self.kwargs["strides"])):
            for b in range(depth):
                step = stride if b == 0 else [1, 1, 1]
                if residual:
                    x = self.block(x, f"{encoder}.stages.{s}.blocks.{b}", step)
                else:
                    x = self.conv(x, f"{encoder}.stages.{s}.0.convs.{b}", step)
            feats.append(x)
        return feats

    def logits(self, x: Tensor) -> list[Tensor]:
        """Fine to coarse."""
        *skips, x = self.stages(x)
        found = []
        for s, skip in enumerate(reversed(skips)):
            up = {part: self.weights[f"decoder.transpconvs.{s}.{part}"] for part in ("weight", "bias")}
            x = F.conv_transpose3d(x, **up, stride=self.kwargs["strides"][len(skips) - s])
            x = torch.cat((x, skip), dim=1)
            for b in range(self.kwargs["n_conv_per_stage_decoder"][s]):
                x = self.conv(x, f"decoder.stages.{s}.convs.{b}")
            head = {part: self.weights[f"decoder.seg_layers.{s}.{part}"] for part in ("weight", "bias")}
            found.append(F.conv3d(x, **head))
        return found[::-1]


def turned(x_BCXYZ: Tensor) -> Tensor:
    return x_BCXYZ.permute(0, 1, 4, 3, 2)


def component(encoder: str, **more: Any) -> Component:
    return Component("resenc", {**OPTIONS[encoder], **more})


def exported(
    encoder: str, out: Path, in_channels: int = 1, plans: str = "", **more: Any
) -> tuple[Any, dict[str, Any]]:
    net = network(encoder, in_channels, **more)
    backbone = component(encoder, **more)
    nnunet.write_nnunet(backbone, net.state_dict(), SIZE_VOX, SPACING_MM, str(out), plans)
    return net, torch.load(out / nnunet.CHECKPOINT, weights_only=True)


# ------------------------------------------------------------------------------------------------- the network


@BOTH
@pytest.mark.parametrize("in_channels", [1, 2])
def test_the_checkpoint_is_the_network_in_nnunets_axes(
    encoder: str, in_channels: int, tmp_path: Path
) -> None:
    net, checkpoint = exported(encoder, tmp_path, in_channels)
    net.double()
    checkpoint["network_weights"] = {k: w.double() for k, w in checkpoint["network_weights"].items()}
    kwargs = checkpoint["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"]
    theirs, x_BCXYZ = Theirs(checkpoint["network_weights"], kwargs), crop(in_channels).double()
    with torch.no_grad():
        out = net.train()(x_BCXYZ)
        found = theirs.logits(turned(x_BCXYZ))
        for ours, other in zip(net.encode(x_BCXYZ), theirs.stages(turned(x_BCXYZ)), strict=True):
            torch.testing.assert_close(turned(ours), other)
    for ours, other in zip((out.logits, *out.deep), found, strict=True):
        torch.testing.assert_close(turned(ours), other)


@BOTH
def test_auxiliary_logits_are_for_training_with_deep_supervision(encoder: str) -> None:
    assert len(network(encoder)(crop()).deep) == len(OPTIONS[encoder]["features"]) - 2
    assert network(encoder).eval()(crop()).deep == []
    net = network(encoder, deep_supervision=False)
    assert net(crop()).deep == []
    heads = [key for key in net.state_dict() if key.startswith("decoder.seg_layers.")]
    finest = len(OPTIONS[encoder]["features"]) - 2
    assert heads == [f"decoder.seg_layers.{finest}.{part}" for part in ("weight", "bias")]


def test_the_default_is_resenc_l() -> None:
    with torch.device("meta"):
        net: Any = networks.build("resenc", num_classes=2)
        plain: Any = networks.build("resenc", num_classes=2, encoder="plain")
    assert net.channels == (32, 64, 128, 256, 320, 320)
    assert [len(stage.blocks) for stage in net.encoder.stages] == [1, 3, 4, 6, 6, 6]
    assert sum(p.numel() for p in net.parameters()) == RESENC_L
    assert sum(p.numel() for p in plain.parameters()) == PLAIN


# Of dynamic-network-architectures 0.4.4, less the coarser classifiers and what it registers twice.
RESENC_L, PLAIN = 102_348_226, 31_194_050


def test_blocks_begin_as_their_skips() -> None:
    net: Any = networks.build("resenc", **{**OPTIONS["residual"], "zero_init": True})
    block = net.encoder.stages[1].blocks[1]
    x = torch.randn(1, 8, 4, 4, 4)
    torch.testing.assert_close(block(x), F.leaky_relu(x, 0.01))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": (4, 8)}, "2 entries and backbone.kernel_size 6"),
        ({"blocks": (1, 2)}, "6 entries and backbone.blocks 2"),
        ({"strides": ((2, 2, 2),) * 6}, "begin with"),
        ({"kernel_size": ((2, 3, 3),) * 6}, "odd"),
        ({"norm": "group", "features": (6,) * 6}, "multiple of 4"),
    ],
)
def test_networks_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        networks.build("resenc", **options)


# -------------------------------------------------------------------------------------------------- the export


def test_every_name_of_a_tensor() -> None:
    assert list(nnunet.aliases("encoder.stem.convs.0.conv.weight")) == [
        "encoder.stem.convs.0.conv.weight",
        "encoder.stem.convs.0.all_modules.0.weight",
        "decoder.encoder.stem.convs.0.conv.weight",
        "decoder.encoder.stem.convs.0.all_modules.0.weight",
    ]
    assert list(nnunet.aliases("decoder.stages.1.convs.0.norm.bias")) == [
        "decoder.stages.1.convs.0.norm.bias",
        "decoder.stages.1.convs.0.all_modules.1.bias",
    ]
    assert list(nnunet.aliases("decoder.transpconvs.0.weight")) == ["decoder.transpconvs.0.weight"]


def test_names_of_one_tensor_share_its_bytes(tmp_path: Path) -> None:
    net, _ = exported("residual", tmp_path)
    own_bytes = 4 * sum(p.numel() for p in net.parameters())
    assert (tmp_path / nnunet.CHECKPOINT).stat().st_size < 1.2 * own_bytes + 400 * len(net.state_dict())


@pytest.mark.parametrize(
    ("encoder", "stem", "first"),
    [
        ("residual", "encoder.stem", "encoder.stem.convs.0"),
        ("plain", "encoder.stages.0", "encoder.stages.0.0.convs.0"),
    ],
)
def test_the_plan_says_what_nnssls_says(encoder: str, stem: str, first: str, tmp_path: Path) -> None:
    _, checkpoint = exported(encoder, tmp_path, in_channels=2)
    plan, weights = checkpoint["nnssl_adaptation_plan"], checkpoint["network_weights"]
    assert json.loads((tmp_path / nnunet.PLAN).read_text()) == plan
    (pretrained,) = plan["pretrain_plan"]["configurations"].values()
    assert pretrained == {"spacing": [3.0, 1.5, 1.0], "patch_size": [8, 16, 24]}
    assert plan["recommended_downstream_patchsize"] == [8, 16, 24]
    assert plan["pretrain_num_input_channels"] == 2
    assert (plan["key_to_encoder"], plan["key_to_stem"]) == ("encoder.stages", stem)
    assert plan["keys_to_in_proj"] == [f"{first}.conv", f"{first}.all_modules.0"]
    for key in plan["keys_to_in_proj"]:
        assert weights[f"{key}.weight"].shape[1:] == (2, 1, 3, 3)
    kwargs = plan["architecture_plans"]["arch_kwargs"]
    assert kwargs["kernel_sizes"][0] == [1, 3, 3]
    assert kwargs["strides"][1] == [1, 2, 2]


def test_a_copy_of_the_datasets_plans_has_the_network(tmp_path: Path) -> None:
    given = {
        "plans_name": "nnUNetPlans",
        "dataset_name": "Dataset001_A",
        "configurations": {"3d_fullres": {"a": 1}},
    }
    (tmp_path / "given.json").write_text(json.dumps(given))
    exported("residual", tmp_path, plans=str(tmp_path / "given.json"))
    plans = json.loads((tmp_path / "logonetPlans.json").read_text())
    own = plans["configurations"].pop("3d_logonet")
    assert plans == {**given, "plans_name": "logonetPlans"}
    assert own["inherits_from"] == "3d_fullres"
    assert own["data_identifier"] == "logonetPlans_3d_logonet"
    assert (own["spacing"], own["patch_size"]) == ([3.0, 1.5, 1.0], [8, 16, 24])
    assert own["architecture"]["network_class_name"].endswith(".unet.ResidualEncoderUNet")
    net = network("residual")
    uri = str(tmp_path / "native")
    nnunet.write_nnunet(
        component("residual"), net.state_dict(), SIZE_VOX, None, uri, str(tmp_path / "given.json")
    )
    plans = json.loads((tmp_path / "native/logonetPlans.json").read_text())
    assert plans["configurations"]["3d_logonet"].keys() == {"inherits_from", "architecture", "patch_size"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no plans file"),
        ("[]", "no plans file"),
        ('{"configurations": {"2d": {}}}', "no configuration '3d_fullres'"),
    ],
)
def test_plans_that_are_none_are_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "given.json").write_text(content)
    with pytest.raises(UserError, match=words):
        exported("residual", tmp_path / "out", plans=str(tmp_path / "given.json"))
    assert not (tmp_path / "out").exists()


def test_networks_and_weights_that_nnunet_lacks_are_refused(tmp_path: Path) -> None:
    def write(backbone: Component, weights: dict[str, Tensor]) -> None:
        nnunet.write_nnunet(backbone, weights, SIZE_VOX, None, str(tmp_path))

    weights = network("residual").state_dict()
    with pytest.raises(UserError, match="cannot build backbone 'unet'"):
        write(Component("unet"), weights)
    with pytest.raises(UserError, match="norm is group"):
        write(component("residual", norm="group"), weights)
    del weights["decoder.transpconvs.0.weight"]
    with pytest.raises(UserError, match=r"lack 'decoder\.transpconvs\.0\.weight'"):
        write(component("residual"), weights)


def a_pretraining(root: Path, **more: Any) -> str:
    """Its artifact, as far as an export reads it."""
    net = network("residual", **more)
    cfg = {
        "backbone": {"name": "resenc", **OPTIONS["residual"], **more},
        "crops": {"size_vox": list(SIZE_VOX), "spacing_mm": list(SPACING_MM)},
    }
    uri, fingerprint = artifacts.address(str(root), "pretrain", cfg, {})
    files = {
        "backbone.safetensors": object_store.write(f"{uri}/backbone.safetensors", save(net.state_dict()))
    }
    artifacts.commit(uri, "pretrain", fingerprint, config=cfg, parents={}, files=files, facts={})
    return uri


def test_the_command_exports_a_pretraining(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from logonet.cli.commands import main

    main(["export", a_pretraining(tmp_path), "--out", str(tmp_path / "out"), "--format", "nnunet"])
    assert "-pretrained_weights" in capsys.readouterr().out
    checkpoint = torch.load(tmp_path / "out" / nnunet.CHECKPOINT, weights_only=True)
    net = network("residual")
    for key, value in net.state_dict().items():
        found = checkpoint["network_weights"][key]
        assert torch.equal(turned(found) if found.ndim == 5 else found, value)


# ------------------------------------------------------------------------------------------ nnU-Net as released

# What nnU-Net does with the checkpoint: loads it into the network of the plans, and computes.
COUNT = """
import json, sys
import numpy as np, torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

torch.set_num_threads(1)
plans, checkpoint, image, out = sys.argv[1:]
cfg = PlansManager(plans).get_configuration("3d_logonet")
what = cfg.network_arch_class_name, cfg.network_arch_init_kwargs, cfg.network_arch_init_kwargs_req_import
net = get_network_from_plans(*what, 1, 3, deep_supervision=False)
own = dict(net.state_dict())
load_pretrained_weights(net, checkpoint)
given = torch.load(checkpoint, weights_only=True)["network_weights"]
after = net.state_dict()
arrived = [key for key in after if ".seg_layers." not in key and torch.equal(after[key], given[key])]
whole = [key for key in own if ".seg_layers." not in key]
net.load_state_dict({key: given.get(key, after[key]) for key in after})
with torch.no_grad():
    np.save(out, net.eval()(torch.from_numpy(np.load(image))).numpy())
print(json.dumps([len(arrived), len(whole)]))
"""
# PyPI's torchvision is built for CUDA and cannot be imported beside a CPU build of torch, for want of two operators.
# nnU-Net imports it where it looks for trainers.
SITE = """
import torch
try:
    import torchvision
except RuntimeError:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
SHORT = """
from nnUNetTrainer_logonet import nnUNetTrainer_logonet, torch


class nnUNetTrainer_short(nnUNetTrainer_logonet):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1

    def perform_actual_validation(self, save_probabilities=False):
        pass  # of whole cases, by eight processes
"""


@pytest.mark.nnunet
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("encoder", "scans"), [("residual", "phantoms"), ("plain", "phantoms"), ("plain", "hippocampus")]
)
def test_the_released_nnunet_finetunes_the_checkpoint(
    encoder: str, scans: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Its own commands on six scans: plan, preprocess, and an epoch of two steps, from our weights."""
    place = os.environ.get("LOGONET_NNUNET", str(REPO / "build/nnunet"))
    folders = {f"nnUNet_{part}": str(tmp_path / part) for part in ("raw", "preprocessed", "results")}
    out = tmp_path / "out"
    env = {**os.environ, **folders, "nnUNet_extTrainer": f"{out}/trainer", "nnUNet_n_proc_DA": "1"}
    (tmp_path / "sitecustomize.py").write_text(SITE)
    env |= {
        "PYTHONPATH": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "PATH": f"{place}/bin:{os.environ['PATH']}",
    }

    def run(*argv: str) -> str:
        done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    raw = tmp_path / "raw/Dataset001_Phantoms"
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    if scans == "phantoms":
        for i in range(6):
            scan, labels_XYZ = phantom.phantom(i, (26, 20, 12), SPACING_MM, classes=3)
            for name, array_XYZ in (
                (f"imagesTr/case{i}_0000", scan.array_CXYZ[0]),
                (f"labelsTr/case{i}", labels_XYZ),
            ):
                (raw / f"{name}.nii.gz").write_bytes(volume.encode_nifti(array_XYZ, scan.affine))
    else:
        real = request.getfixturevalue("shared_data") / "Task04_Hippocampus"
        for i, labels in enumerate(sorted((real / "labelsTr").glob("hippo*.nii.gz"))[:6]):
            shutil.copy(real / "imagesTr" / labels.name, raw / f"imagesTr/case{i}_0000.nii.gz")
            shutil.copy(labels, raw / f"labelsTr/case{i}.nii.gz")
    dataset = {
        "channel_names": {"0": "CT" if scans == "phantoms" else "MRI"},
        "labels": {"background": 0, "first": 1, "second": 2},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(dataset))
    run("nnUNetv2_extract_fingerprint", "-d", "1", "-np", "1")
    run("nnUNetv2_plan_experiment", "-d", "1")

    preprocessed = tmp_path / "preprocessed/Dataset001_Phantoms"
    net, _ = exported(encoder, out, plans=f"{preprocessed}/nnUNetPlans.json")
    shutil.copy(out / "logonetPlans.json", preprocessed)
    (out / "trainer/nnUNetTrainer_short.py").write_text(SHORT)
    plans = ("1", "3d_logonet", "0", "-p", "logonetPlans")
    run("nnUNetv2_preprocess", "-d", "1", "-plans_name", "logonetPlans", "-c", "3d_logonet", "-np", "1")

    x_BCXYZ = crop(batch=1)
    np.save(tmp_path / "image.npy", turned(x_BCXYZ).contiguous().numpy())
    files = [str(out / "logonetPlans.json"), str(out / nnunet.CHECKPOINT), "image.npy", "logits.npy"]
    arrived, whole = json.loads(run(f"{place}/bin/python", "-c", COUNT, *files).splitlines()[-1])
    names = {alias for key in net.state_dict() for alias in nnunet.aliases(key) if ".seg_layers." not in key}
    assert arrived == whole == len(names)
    with torch.no_grad():
        logits_BKXYZ = net.eval()(x_BCXYZ).logits
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(
        turned(found), logits_BKXYZ, rtol=1e-4, atol=1e-4
    )  # axes turned, sums in another order

    env["nnUNet_n_proc_DA"] = "0"  # augments in its own process; planning wants a number of threads here
    weights = ("-pretrained_weights", str(out / nnunet.CHECKPOINT))
    said = run("nnUNetv2_train", *plans, "-tr", "nnUNetTrainer_short", *weights, "-device", "cpu")
    assert len(re.findall(r"^[\w.]+ shape torch\.Size", said, re.MULTILINE)) == whole
    results = tmp_path / "results/Dataset001_Phantoms/nnUNetTrainer_short__logonetPlans__3d_logonet/fold_0"
    assert (results / "checkpoint_final.pth").exists()
