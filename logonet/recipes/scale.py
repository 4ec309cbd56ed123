"""Recipes made small: the same structure, in minutes on two cores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, TypeVar

from logonet import networks
from logonet.core.config import Component
from logonet.pipelines import Finetuning, Pretraining

Scale = Literal["full", "smoke"]
Recipe = TypeVar("Recipe", Pretraining, Finetuning)
# Options of methods whose own networks are large, or whose sizes belong to a large crop.
METHODS: dict[str, dict[str, Any]] = {
    "glmae": {"num_local": 2, "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}
    | {"projection_hidden": 16, "projection": 8},
    "simtrot": {"hidden": 16, "projection": 8},
}


def scaled(cfg: Recipe, scale: Scale) -> Recipe:
    """``cfg`` as it is, or for "smoke" with a tiny network of the same kind on crops of 16, 32 or 64 voxels a side, and
    two epochs of three steps. What is segmented, how scans are prepared, the split, the method, the optimizer and the
    schedule stay.
    """
    if scale == "full":
        return cfg
    size_vox: Any = tuple(16 if side < 32 else 32 if side < 160 else 64 for side in cfg.crops.size_vox)
    options = {**cfg.backbone.config, **networks.tiny(cfg.backbone.name)}
    options.pop("decoder_heads", None)  # which do not divide the tiny widths
    if "img_size" in options:
        options["img_size"] = size_vox
    batch = min(cfg.train.global_batch, 2)
    train = replace(
        cfg.train,
        epochs=2,
        steps_per_epoch=3,
        batch_size=batch,
        global_batch=batch,
        warmup_epochs=min(cfg.train.warmup_epochs, 1),
        validate_every_epochs=min(cfg.train.validate_every_epochs, 1),
    )
    changes: dict[str, Any] = {
        "crops": replace(cfg.crops, size_vox=size_vox),
        "backbone": Component(cfg.backbone.name, options),
        "method": Component(cfg.method.name, {**cfg.method.config, **METHODS.get(cfg.method.name, {})}),
        "train": train,
    }
    if isinstance(cfg, Pretraining):
        few = replace(cfg.clusterers, n=2, k_min=3, k_max=4, iterations=5)
        changes |= {
            "clusterers": few,
            "crops": replace(changes["crops"], min_foreground=0.0, min_image_share=0.0),
        }
    return replace(cfg, **changes)
