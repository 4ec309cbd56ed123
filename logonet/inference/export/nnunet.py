"""Weights of a `resenc` network for nnU-Net to finetune: a checkpoint, and the plans of the network it belongs to.

The checkpoint serves both of nnU-Net's commands. ``nnUNetv2_train -pretrained_weights`` (release 2.8.1) wants every
tensor but the classifiers' under all its names, and a configuration of the same network in the dataset's plans. The
commands for nnssl's checkpoints (its master, since 887c02e) read the network from the checkpoint's adaptation plan, and
load the encoder alone.

nnU-Net's arrays have the axes Z, Y, X and ours X, Y, Z, so kernels are turned, and sizes and spacings reversed.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from logonet import networks
from logonet.core.config import Component
from logonet.core.errors import UserError
from logonet.networks import Triple
from logonet.storage import object_store

# Names by which nnssl's repositories on the Hugging Face hub have them.
CHECKPOINT, PLAN = "checkpoint_final.pth", "adaptation_plan.json"
CONFIGURATION, PLANS, TRAINER = "3d_logonet", "logonetPlans", "nnUNetTrainer_logonet"
ARCHITECTURES = "dynamic_network_architectures.architectures.unet"
IMPORTED = ["conv_op", "norm_op", "dropout_op", "nonlin"]  # arguments that plans give as names
# Of a _Conv's two parts, which nnU-Net also holds in a Sequential.
PLACES = {"conv": 0, "norm": 1}


def write_nnunet(
    backbone: Component,
    weights: Mapping[str, Tensor],
    size_vox: Triple,
    spacing_mm: tuple[float, float, float] | None,
    out_dir: str,
    plans_file: str = "",
) -> None:
    """Write a checkpoint, its adaptation plan, and a trainer with the learning rate that finetuning wants.

    The same weights give the same checkpoint's tensors, under all of nnU-Net's names.

    Args:
        backbone: a `resenc` network.
        weights: of all of it.
        size_vox: of the crops that it was trained on (X, Y, Z), which becomes nnU-Net's patch.
        spacing_mm: of these; None where each scan kept its own.
        out_dir: local or s3://.
        plans_file: nnU-Net's plans of the dataset to finetune on; a copy with a configuration of this network goes to
            ``out_dir`` too.

    Raises:
        UserError: nnU-Net has no such network, weights are missing, or the plans are not nnU-Net's.
    """
    cfg = _checked(backbone, weights)
    size_zyx = list(size_vox[::-1])
    spacing_zyx = None if spacing_mm is None else list(spacing_mm[::-1])
    plan = adaptation_plan(cfg, weights[f"{_stem(cfg)[1]}.conv.weight"].shape[1], size_zyx, spacing_zyx)
    checkpoint = io.BytesIO()
    torch.save({"network_weights": network_weights(weights), "nnssl_adaptation_plan": plan}, checkpoint)
    files: dict[str, bytes | memoryview] = {
        CHECKPOINT: checkpoint.getbuffer(),
        PLAN: _json(plan),
        f"trainer/{TRAINER}.py": _template("nnunet_trainer.txt").encode(),
    }
    if plans_file:
        files[f"{PLANS}.json"] = _json(_plans(plans_file, cfg, size_zyx, spacing_zyx))
    for file, data in files.items():
        object_store.write(object_store.join(out_dir, file), data)


def _checked(backbone: Component, weights: Mapping[str, Tensor]) -> Any:
    """The network's config, once it and the weights are known to suit nnU-Net."""
    if backbone.name != "resenc":
        raise UserError(
            f"nnU-Net cannot build backbone '{backbone.name}'; pretrain with backbone=resenc, which is its own network"
        )
    cfg: Any = backbone.resolve(networks.config, "backbone").config
    if cfg.norm != "instance_affine":
        raise UserError(f"backbone.norm is {cfg.norm} and nnU-Net's is instance_affine; pretrain with that")
    with torch.device("meta"):
        own = networks.build("resenc", cfg=cfg).state_dict()
    wanted = [key for key in own if not key.startswith("decoder.seg_layers.")]
    if missing := [key for key in wanted if key not in weights]:
        raise UserError(
            f"the weights lack '{missing[0]}' and {len(missing) - 1} more; give those of the whole backbone"
        )
    return cfg


def network_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of nnU-Net's network, axes Z, Y, X, under every name by which it registers them."""
    turned = {key: w.detach().cpu().float() for key, w in weights.items()}
    turned = {k: (w.permute(0, 1, 4, 3, 2) if w.ndim == 5 else w).contiguous() for k, w in turned.items()}
    return {alias: tensor for key, tensor in turned.items() for alias in aliases(key)}


def aliases(name: str) -> Iterator[str]:
    """Every name of a tensor in nnU-Net's state dict."""
    part = re.search(r"\.(conv|norm)\.(weight|bias)$", name)
    names = [name]
    if part:
        names.append(f"{name[: part.start()]}.all_modules.{PLACES[part[1]]}.{part[2]}")
    yield from names
    if name.startswith("encoder."):  # which the decoder keeps too
        yield from (f"decoder.{each}" for each in names)


def arch_kwargs(cfg: Any) -> dict[str, Any]:
    """The arguments of nnU-Net's network, as plans hold them."""
    stages = len(cfg.features)
    return {
        "n_stages": stages,
        "features_per_stage": list(cfg.features),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [list(kernel[::-1]) for kernel in cfg.kernel_size],
        "strides": [list(stride[::-1]) for stride in cfg.strides],
        "n_blocks_per_stage" if cfg.residual else "n_conv_per_stage": list(cfg.depths),
        "n_conv_per_stage_decoder": [cfg.convs] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def adaptation_plan(
    cfg: Any, in_channels: int, size_zyx: list[int], spacing_zyx: list[float] | None
) -> dict[str, Any]:
    """What nnssl says of a checkpoint. Plain types alone: nnU-Net reads it without unpickling."""
    kwargs, (stem, first) = arch_kwargs(cfg), _stem(cfg)
    return {
        "architecture_plans": {
            "arch_class_name": _class_name(cfg),
            "arch_kwargs": kwargs,
            "arch_kwargs_requiring_import": IMPORTED,
        },
        "architecture_kwargs": kwargs,  # here the trainer that adapts kernels looks for them
        "pretrain_plan": {"configurations": {"logonet": {"spacing": spacing_zyx, "patch_size": size_zyx}}},
        "pretrain_num_input_channels": in_channels,
        "recommended_downstream_patchsize": size_zyx,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": stem,
        "keys_to_in_proj": [f"{first}.conv", f"{first}.all_modules.0"],
        "key_to_lpe": None,
    }


def _class_name(cfg: Any) -> str:
    return f"{ARCHITECTURES}.{'ResidualEncoderUNet' if cfg.residual else 'PlainConvUNet'}"


def _stem(cfg: Any) -> tuple[str, str]:
    """The modules that nnU-Net calls the stem, and in it the first convolution with its norm."""
    if cfg.residual:
        return "encoder.stem", "encoder.stem.convs.0"
    return "encoder.stages.0", "encoder.stages.0.0.convs.0"


def _plans(plans_file: str, cfg: Any, size_zyx: list[int], spacing_zyx: list[float] | None) -> dict[str, Any]:
    """The dataset's plans, with a configuration that is its ``3d_fullres`` but for the network, patch and spacing."""
    try:
        plans = json.loads(object_store.read_text(plans_file))
        known = plans["configurations"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{plans_file} is no plans file of nnU-Net; give the one of nnUNetv2_plan_experiment"
        ) from None
    if "3d_fullres" not in known:
        raise UserError(f"{plans_file} has no configuration '3d_fullres'; plan the dataset for 3D networks")
    architecture = {
        "network_class_name": _class_name(cfg),
        "arch_kwargs": arch_kwargs(cfg),
        "_kw_requires_import": IMPORTED,
    }
    own = {"inherits_from": "3d_fullres", "architecture": architecture, "patch_size": size_zyx}
    if spacing_zyx is not None:
        own |= {"spacing": spacing_zyx, "data_identifier": f"{PLANS}_{CONFIGURATION}"}
    return {**plans, "plans_name": PLANS, "configurations": {**known, CONFIGURATION: own}}


def _template(name: str) -> str:
    return resources.files("logonet.inference.export").joinpath("templates", name).read_text()


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=4) + "\n").encode()
