"""SimTROT (SimPROT-W in its tables): pretraining on the task's own training scans, and nnFormer's finetuning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from logonet.core.config import Component
from logonet.data import cropping, prepared_scans, splits
from logonet.pipelines import Finetuning, Pretraining
from logonet.recipes import _datasets, _nnunet

# 80, 15 and 5 % of the 484 brains of MSD's Task01 train, validate and test.
BRAIN_SPLIT = splits.Config(test_share=0.05, folds=6)


def _pretraining(size_vox: Any, spacing_mm: Any, epochs: int, **changes: Any) -> Pretraining:
    cfg = Pretraining(crops=cropping.Config(size_vox=size_vox, spacing_mm=spacing_mm, per_scan=1), **changes)
    # "SGD with Nesterov momentum .99, lr 1e-4"; decay and warm-up are the released code's.
    rate = replace(
        _nnunet.TRAIN,
        epochs=epochs,
        steps_per_epoch=None,
        lr=1e-4,
        weight_decay=1e-5,
        schedule="cosine",
        warmup_epochs=50,
        grad_clip=None,
        validate_every_epochs=0,
    )
    return replace(cfg, train=rate)


def synapse() -> Pretraining:
    """Tables 1, 3 and 4: nnFormer's encoder on Synapse's 18 training CTs, crops of 128 x 128 x 64, 1000 epochs of
    batches of 2. Layout: img0001 to img0040. Hardware: one GPU with 10 GB. Hours: 0.5 on 1 x A10G by logonet plan.
    Verified here: on phantoms at smoke scale.
    method.framework=byol is BPROT; method.w=1, method.rotate=false and method.mask=false are Table 4's ablations.
    Swin UNETR: backbone={name: swinunetr, patch: [2,2,1]}; UNETR: backbone={name: unetr, img_size: [128,128,64],
    patch: [16,16,8]} (Table 3).
    """
    return _pretraining(
        _nnunet.SYNAPSE_SIZE,
        _nnunet.SYNAPSE_SPACING_MM,
        1000,
        split=_datasets.SYNAPSE_SPLIT,
        backbone=Component("nnformer", _nnunet.NNFORMER["synapse"]),
        method=Component("simtrot"),
    )


def brats() -> Pretraining:
    """Tables 2 and 3: nnFormer's encoder on the training brains of MSD's Task01 (four channels), crops of 128^3, 500
    epochs of batches of 2. Layout: MSD's Task01_BrainTumour. Hardware: one GPU with 10 GB. Hours: 8.1 on 1 x A10G by
    logonet plan. Verified here: on phantoms at smoke scale.
    """
    cfg = _pretraining(
        _nnunet.BRAIN_SIZE,
        _nnunet.BRAIN_SPACING_MM,
        500,
        split=BRAIN_SPLIT,
        backbone=Component("nnformer", _nnunet.NNFORMER["brain"]),
        method=Component("simtrot", {"mask_unit_vox": (8, 8, 8)}),
    )
    return replace(cfg, crops=replace(cfg.crops, intensity="zscore"))


def _finetuning(
    net: dict[str, Any], size_vox: Any, cases: prepared_scans.Config, **changes: Any
) -> Finetuning:
    return Finetuning(
        cases=cases,
        crops=prepared_scans.CropSampling(size_vox=size_vox, per_case=1, foreground_share=1 / 3),
        backbone=Component("nnformer", net),
        method=Component("supervised", _nnunet.SUPERVISED),
        train=_nnunet.TRAIN,
        validation=_nnunet.VALIDATION,
        **changes,
    )


def synapse_finetune() -> Finetuning:
    """Table 1: Synapse, eight organs, 18 scans to train and TransUNet's 12 to test; Dice 86.79 and HD95 9.19 with
    SimPROT-W, 84.21 and 17.15 from scratch. nnFormer with nnU-Net's SGD and augmentation, 1000 epochs of 250 steps.
    Layout: img0001 to img0040. Hardware: one GPU with 10 GB. Hours: 10.1 on 1 x A10G by logonet plan. Verified here: on
    phantoms at smoke scale.
    """
    cases = prepared_scans.Config(spacing_mm=_nnunet.SYNAPSE_SPACING_MM)
    return replace(
        _finetuning(
            _nnunet.NNFORMER["synapse"],
            _nnunet.SYNAPSE_SIZE,
            cases,
            data=_datasets.data(_datasets.SYNAPSE),
            split=_datasets.SYNAPSE_SPLIT,
        ),
        train=replace(_nnunet.TRAIN, validate_every_epochs=0),  # all 18 train
    )


def brats_finetune() -> Finetuning:
    """Table 2: MSD's Task01, whole tumour, enhancing tumour and tumour core; mean Dice 86.29 and HD95 3.65 with
    SimPROT-W, 85.65 and 4.73 from scratch. Layout: MSD's Task01_BrainTumour. Hardware: one GPU with 10 GB. Hours: 23.4
    on 1 x A10G by logonet plan. Verified here: on phantoms at smoke scale.
    """
    cases = prepared_scans.Config(spacing_mm=_nnunet.BRAIN_SPACING_MM, intensity="zscore")
    return _finetuning(
        _nnunet.NNFORMER["brain"],
        _nnunet.BRAIN_SIZE,
        cases,
        data=_datasets.data(_datasets.MSD_BRAIN, _datasets.BRATS_REGIONS),
        split=BRAIN_SPLIT,
    )


PRETRAINING = {"simtrot_synapse": synapse, "simtrot_brats": brats}
FINETUNING = {"simtrot_synapse": synapse_finetune, "simtrot_brats": brats_finetune}
