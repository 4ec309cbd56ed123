"""GL-MAE (Zhuang et al., AAAI 2024): pretraining of UNETR's transformer, and finetuning on four datasets."""

from __future__ import annotations

from dataclasses import replace

from logonet import training
from logonet.core.config import Component
from logonet.data import cropping, prepared_scans, splits
from logonet.pipelines import Finetuning, Pretraining
from logonet.recipes import _datasets

SPACING_MM = (1.5, 1.5, 2.0)  # UNETR's, which the paper builds on
# The paper's transformer and UNETR at the width of MAE3D's code.
UNETR = Component("unetr", {"feature_size": 16, "positions": "sincos", "qkv_bias": True})


def pretraining() -> Pretraining:
    """The pretraining behind all of the paper's tables: ViT-B, two global views of 160^3 and eight local ones of 96^3,
    both cut out of crops of 320 x 320 x 192 voxels (480 x 480 x 384 mm: nearly every whole scan), 1600 epochs of
    batches of 256. Data: BTCV and TCIA-COVID19, about 800 CTs. Hardware: four GPUs with 24 GB (the paper's) accumulate
    64 micro-batches each. Hours: 39.7 on 4 x A10G by logonet plan. Verified here: on phantoms at smoke scale.
    The learning rate is MAE's for this batch, with its warm-up, decay and betas: the paper's 1e-2 is implausible for
    AdamW (train.lr=0.01 sets it). backbone.variant=vit_t is the paper's small transformer.
    """
    return Pretraining(
        crops=cropping.Config(
            size_vox=(320, 320, 192), per_scan=1, spacing_mm=SPACING_MM, min_image_share=0.0
        ),
        backbone=UNETR,
        method=Component(
            "glmae", {"trim": True}
        ),  # so that views are of the scan, where it is the smaller one
        train=training.Config(
            epochs=1600,
            global_batch=256,
            batch_size=1,
            lr=1.5e-4,
            warmup_epochs=40,
            weight_decay=0.05,
            betas=(0.9, 0.95),
        ),
    )


def btcv() -> Finetuning:
    """Tables 1 and 2: BTCV, 13 organs, 24 scans to train and 6 to validate; mean Dice .823 with all labels, .764 with
    half (split.fraction=0.5), .664 with a quarter (0.25); from scratch .796, .732, .590. method.encoder=frozen
    train.lr=0.01 is the table's linear evaluation. Layout: MONAI's dataset_0.json, or img0001 to img0040. Hardware:
    four GPUs with 24 GB. Hours: 0.4 on 4 x A10G by logonet plan. Verified here: on phantoms at smoke scale.
    """
    return Finetuning(
        data=_datasets.data(_datasets.BTCV),
        split=_datasets.BTCV_SPLIT,
        cases=prepared_scans.Config(spacing_mm=SPACING_MM),
        crops=prepared_scans.CropSampling(per_case=1),
        backbone=UNETR,
        train=training.Config(
            epochs=3000,
            warmup_epochs=300,
            global_batch=4,
            lr=3e-4,
            min_lr=1e-4,
            weight_decay=0.05,
            validate_every_epochs=50,
        ),
    )


def mmwhs() -> Finetuning:
    """Table 2: MM-WHS, seven structures in 20 CTs; mean Dice .889 with all labels. The paper names no split: a fold
    of five validates. Layout: ct_train_1001_image and _label, whose values go to 850. Hardware: four GPUs with 24 GB.
    Hours: 0.2 on 4 x A10G by logonet plan. Verified here: on phantoms at smoke scale.
    """
    return replace(btcv(), data=_datasets.data(_datasets.MM_WHS), split=splits.Config())


def covid() -> Finetuning:
    """Table 3: lesions in the 199 labelled CTs of COVID-19-20; Dice .499 (.479 from scratch). Layout: imagesTr and
    labelsTr, or volume-covid19-A-0003_ct and _seg. Hardware: four GPUs with 24 GB. Hours: 30.1 on 4 x A10G by
    logonet plan. Verified here: on phantoms at smoke scale.
    """
    return replace(
        btcv(), data=_datasets.data({"lesion": ("lesion", "COVID lesion", "class 1")}), split=splits.Config()
    )


def brats() -> Finetuning:
    """Table 3: MSD Task01, four channels of 484 brains, whole tumour, tumour core and enhancing tumour; mean Dice .783
    (.756 from scratch) with ViT-T. The weights of a CT's single channel are repeated for four. Layout: MSD's
    Task01_BrainTumour, or four numbered files a case. Hardware: four GPUs with 24 GB. Hours: 9.0 on 4 x A10G by
    logonet plan. Verified here: on phantoms at smoke scale.
    """
    small = Component("unetr", {**UNETR.config, "variant": "vit_t"})
    return replace(
        btcv(),
        data=_datasets.data(_datasets.MSD_BRAIN, _datasets.BRATS_REGIONS),
        split=splits.Config(test_share=0.05),
        cases=prepared_scans.Config(spacing_mm=(1.0, 1.0, 1.0), intensity="zscore"),
        backbone=small,
    )


PRETRAINING = {"glmae": pretraining}
FINETUNING = {"glmae_btcv": btcv, "glmae_mmwhs": mmwhs, "glmae_covid": covid, "glmae_brats": brats}
