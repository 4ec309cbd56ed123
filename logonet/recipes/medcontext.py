"""MedContext (Gani et al. 2024): joint supervised and masked training of three networks on three datasets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from logonet import training
from logonet.core.config import Component
from logonet.data import prepared_scans, splits
from logonet.pipelines import Finetuning
from logonet.recipes import _datasets, _nnunet

SIZE, SPACING_MM = (96, 96, 96), (1.5, 1.5, 2.0)
NETWORKS: dict[str, dict[str, Any]] = {"unetr": {"feature_size": 32}, "swinunetr": {}}
# UNETR's for BTCV.
AUGMENT = {"flip_prob": 0.2, "rotate90_prob": 0.2, "scale_intensity_prob": 0.1, "shift_intensity_prob": 0.1}
EPOCHS = {"synapse": 5000, "acdc": 1000, "brats": 300}
# With MedContext: of UNETR, Swin UNETR and nnFormer, in percent, and from the network alone.
DICE = {
    "synapse": ("81.13, 82.00 and 87.35", "78.76, 80.66 and 86.57"),
    "acdc": ("80.60, 83.38 and 90.73", "76.67, 80.70 and 90.50"),
    "brats": ("88.04, 89.83 and 72.78", "87.50, 89.44 and 72.36"),
}
# On one A100, by `logonet plan`.
HOURS = {
    "synapse": {"unetr": 4.2, "swinunetr": 5.7, "nnformer": 5.3},
    "acdc": {"unetr": 5.9, "swinunetr": 8.2, "nnformer": 1.2},
    "brats": {"unetr": 11.4, "swinunetr": 15.6, "nnformer": 1.8},
}
WHAT = {
    "synapse": "Table 1: Synapse, eight organs, 18 scans to train and 12 to test",
    "acdc": "Table 2: ACDC, three structures in two frames of 100 patients, 80 to train and 20 to test",
    "brats": "Table 3: BraTS 2021 (nnFormer: MSD's Task01), the three regions",
}
LAYOUT = {
    "synapse": "img0001 to img0040",
    "acdc": "patient001/patient001_frame01 and _frame01_gt",
    "brats": "four numbered or named files a case, or MSD's Task01_BrainTumour",
}


def _dataset(name: str, net: str) -> dict[str, Any]:
    """The sections ``data``, ``split`` and ``cases``."""
    spacing = _nnunet.SYNAPSE_SPACING_MM if net == "nnformer" else SPACING_MM
    match name:
        case "synapse":
            # As the UNETR code; the text has -1000 to 1000.
            cases = prepared_scans.Config(spacing_mm=spacing, window_hu=(-175.0, 250.0))
            return {
                "data": _datasets.data(_datasets.SYNAPSE),
                "split": _datasets.SYNAPSE_SPLIT,
                "cases": cases,
            }
        case "acdc":
            own = (1.5, 1.5, 10.0) if net == "nnformer" else SPACING_MM
            cases = prepared_scans.Config(spacing_mm=own, intensity="zscore")
            return {
                "data": _datasets.data(_datasets.ACDC),
                "split": splits.Config(test_share=0.2),
                "cases": cases,
            }
    members = _datasets.MSD_BRAIN if net == "nnformer" else _datasets.BRATS21
    return {
        "data": _datasets.data(members, _datasets.BRATS_REGIONS),
        "split": splits.Config(test_share=0.2 if net != "nnformer" else 0.16),
        "cases": prepared_scans.Config(spacing_mm=(1.0, 1.0, 1.0), intensity="zscore"),
    }


def _recipe(name: str, net: str) -> Callable[[], Finetuning]:
    def recipe() -> Finetuning:
        sections = _dataset(name, net)
        validate = 0 if sections["split"].fold is None else 50
        if net == "nnformer":
            options = _nnunet.NNFORMER["brain" if name == "brats" else name]
            size_vox = options.get("img_size", _nnunet.SYNAPSE_SIZE)
            of_nnunet = _nnunet.SUPERVISED_FLAT if name == "acdc" else _nnunet.SUPERVISED
            return Finetuning(
                **sections,
                crops=prepared_scans.CropSampling(size_vox=size_vox, per_case=1, foreground_share=1 / 3),
                backbone=Component(net, options),
                method=Component("medcontext", {**of_nnunet, "unit_vox": 4}),
                train=replace(_nnunet.TRAIN, validate_every_epochs=validate),
                validation=_nnunet.VALIDATION,
            )
        return Finetuning(
            **sections,
            crops=prepared_scans.CropSampling(size_vox=SIZE, per_case=4),
            backbone=Component(net, NETWORKS[net]),
            method=Component("medcontext", {"augment": AUGMENT, "squared": True}),  # Eq. 3's squares
            train=training.Config(
                epochs=EPOCHS[name], warmup_epochs=50, global_batch=1, validate_every_epochs=validate
            ),
        )

    ours, alone = DICE[name]
    recipe.__doc__ = f"""{WHAT[name]}, with {net}; mean Dice {ours} for UNETR, Swin UNETR and nnFormer with MedContext,
    {alone} without (method=supervised). Layout: {LAYOUT[name]}. Hardware: one GPU with 40 GB.
    Hours: {HOURS[name][net]} on 1 x A100 by logonet plan. Verified here: on phantoms at smoke scale.
    """
    return recipe


PRETRAINING: dict[str, Any] = {}
FINETUNING = {
    f"medcontext_{name}_{net}": _recipe(name, net) for name in EPOCHS for net in (*NETWORKS, "nnformer")
}
