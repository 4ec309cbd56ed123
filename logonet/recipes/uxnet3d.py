"""3D UX-Net (Lee et al., ICLR 2023): FeTA and FLARE from scratch, and the transfer from FLARE to AMOS.

As released: AdamW 1e-4 without a schedule for 40,000 steps of two 96^3 crops of one scan, half of them on a class.
Network, steps and learning rate are those of the paper; where its text and its code differ (docs/papers.md) the
recipes follow the code, with the paper's percentiles as a setting.
"""

from __future__ import annotations

from logonet import training
from logonet.core import config
from logonet.core.config import Component
from logonet.data import augment, prepared_scans, splits
from logonet.inference import sliding_window
from logonet.pipelines import Finetuning
from logonet.recipes import _datasets

# One epoch is what lies between two validations.
TRAIN = training.Config(
    epochs=80,
    steps_per_epoch=500,
    global_batch=1,
    batch_size=1,
    lr=1e-4,
    warmup_epochs=0,
    weight_decay=0.01,
    schedule="constant",
    validate_every_epochs=1,
)
FOLDS = splits.Config(folds=5)


def _finetuning(members: _datasets.Members, cases: prepared_scans.Config, max_deg: float) -> Finetuning:
    turns = augment.Config(
        flip_prob=0.0,
        rotate90_prob=0.0,
        scale_intensity_prob=0.0,
        affine_prob=1.0,
        rotate_deg=(0.0, 0.0, max_deg),
        zoom=(0.9, 1.1),
    )
    return Finetuning(
        data=_datasets.data(members),
        split=FOLDS,
        cases=cases,
        backbone=Component("uxnet3d"),
        method=Component("supervised", {"augment": config.to_dict(turns)}),
        train=TRAIN,
        validation=sliding_window.Config(overlap=0.5),
    )


def feta() -> Finetuning:
    """Table 1: FeTA 2021, seven tissues in 80 infant brain MRs, five folds (split.fold=0 .. 4); mean Dice .874. Layout:
    imagesTr and labelsTr, or a list. Hardware: one GPU with 16 GB. Hours: 7.4 on 1 x A10G by logonet plan. Verified
    here: on phantoms at smoke scale.
    """
    cases = prepared_scans.Config(window_hu=(0.0, 1000.0), intensity="window")
    return _finetuning(_datasets.FETA, cases, 12.0)


def flare() -> Finetuning:
    """Table 1: FLARE 2021, four organs in 361 labelled CTs, five folds (split.fold=0 .. 4); mean Dice .934. Layout:
    imagesTr and labelsTr, or a list. Hardware: one GPU with 16 GB. Hours: 31.6 on 1 x A10G by logonet plan. Verified
    here: on phantoms at smoke scale.
    The window is the released code's; the paper's text has cases.window_hu=[-175,250] and
    cases.intensity=window_percentiles with cases.mr_percentiles=[1,99].
    """
    cases = prepared_scans.Config(spacing_mm=(1.0, 1.0, 1.2), window_hu=(-125.0, 275.0))
    return _finetuning(_datasets.FLARE, cases, 6.0)


def amos() -> Finetuning:
    """Table 2: AMOS 2022, 15 organs in 200 CTs, from the weights of a FLARE fold (--init with that artifact); mean Dice
    .900 (.880 for SwinUNETR). All but the classifier is taken over. Layout: imagesTr and labelsTr. Hardware: one GPU
    with 48 GB. Hours: 2.0 on 1 x L40S by logonet plan. Verified here: on phantoms at smoke scale, with the transfer.
    """
    cases = prepared_scans.Config(spacing_mm=(1.5, 1.5, 2.0), window_hu=(-125.0, 275.0))
    return _finetuning(_datasets.AMOS, cases, 6.0)


PRETRAINING: dict[str, object] = {}
FINETUNING = {"uxnet3d_feta": feta, "uxnet3d_flare": flare, "uxnet3d_amos": amos}
