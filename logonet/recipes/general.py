"""Recipes for a user's own scans, for the real scans that this project is tried on, and for the demo.

They leave out the ReLU that Algorithm 1 ends on: a true cluster's logit at or below 0 gets no gradient through it, and
training is slower or stalls (docs/papers.md, tests/test_methods.py; the option is method.final_relu).
"""

from __future__ import annotations

from dataclasses import replace

from logonet import training
from logonet.clustering import kmeans
from logonet.core import config
from logonet.core.config import Component
from logonet.data import augment, cropping, prepared_scans, splits
from logonet.inference import sliding_window
from logonet.pipelines import Finetuning, Pretraining

_TINY = {"dims": [8, 16, 24, 32], "depths": [1] * 4, "mlp_ratios": [2] * 4, "full_width": 8}
TINY_LOGONET = Component("logonet", _TINY)
SMALL_LOGONET = Component("logonet", _TINY | {"dims": [16, 32, 64, 128], "full_width": 16})
MASKED_CLUSTERS = Component("masked_clusters", {"final_relu": False})


def small() -> Pretraining:
    """A LoGoNet of a tenth of the width for one GPU or a fast CPU machine: 64^3 crops, 24 clusterers of 20 to 100
    clusters, 50 epochs, global batch 8. Data: tens to hundreds of scans. Hours and result: depend on the data, not
    measured.
    """
    return Pretraining(
        crops=cropping.Config(size_vox=(64, 64, 64)),
        clusterers=kmeans.Config(n=24, k_min=20, k_max=100, iterations=150),
        backbone=Component("logonet", {"dims": [16, 32, 64, 128], "depths": [2] * 4, "full_width": 16}),
        method=MASKED_CLUSTERS,
        train=training.Config(epochs=50, global_batch=8, warmup_epochs=5),
    )


HIPPOCAMPUS_SPLIT = splits.Config(test_share=0.2, fold=None)  # 40 of 200 test, 160 train
HIPPOCAMPUS_CROP = (40, 56, 40)  # nnU-Net's; the scans have about 35 x 51 x 35 voxels of 1 mm
LOGONET_CROP = (32, 64, 32)  # of the same scans: its sides are multiples of 32
_LEVELS = {
    "filters": [24, 48, 96, 192],
    "kernel_size": [[3, 3, 3]] * 4,
    "strides": [[1, 1, 1]] + [[2, 2, 2]] * 3,
}
SMALL_DYNUNET = Component(
    "dynunet", {**_LEVELS, "norm": "instance_affine", "deep_supervision": True, "deep_supr_num": 2}
)


def hippocampus() -> Pretraining:
    """The MSD hippocampus MR scans (35 x 51 x 35 voxels), without the 40 test cases of the finetuning recipe of this
    name: a DynUNet of 3.2 M parameters whose encoder is trained by the pooled head, 2,000 steps of 8 crops.
    """
    return Pretraining(
        split=HIPPOCAMPUS_SPLIT,
        crops=cropping.Config(size_vox=HIPPOCAMPUS_CROP, per_scan=2),
        clusterers=kmeans.Config(n=8, k_min=8, k_max=40, iterations=100),
        backbone=SMALL_DYNUNET,
        method=Component("masked_clusters", {"final_relu": False, "head": "pooled"}),
        train=training.Config(
            epochs=40,
            steps_per_epoch=50,
            global_batch=8,
            batch_size=4,
            lr=2e-3,
            warmup_epochs=1,
            precision="bf16",
        ),
    )


def hippocampus_logonet() -> Pretraining:
    """The scans of 'hippocampus': a LoGoNet of 3.2 M parameters, crops of 32 x 64 x 32, 16 clusterers of 8 to 40
    clusters, 10 epochs.
    """
    return Pretraining(
        split=HIPPOCAMPUS_SPLIT,
        crops=cropping.Config(size_vox=LOGONET_CROP, per_scan=2),
        clusterers=kmeans.Config(n=16, k_min=8, k_max=40, iterations=100),
        backbone=SMALL_LOGONET,
        method=MASKED_CLUSTERS,
        train=training.Config(epochs=10, global_batch=16, batch_size=4, lr=2e-3, warmup_epochs=1),
    )


def real_ct() -> Pretraining:
    """A handful of real CT and MR scans (trunk, abdomen, head) on 16 workers of a 2-core machine: a tiny LoGoNet,
    32^3 crops, 16 per scan, 16 clusterers of 8 to 40 clusters, 4 epochs.
    """
    return Pretraining(
        crops=cropping.Config(size_vox=(32, 32, 32), per_scan=16),
        clusterers=kmeans.Config(n=16, k_min=8, k_max=40, iterations=100),
        backbone=TINY_LOGONET,
        method=MASKED_CLUSTERS,
        train=training.Config(epochs=4, global_batch=32, batch_size=2, lr=3e-3, warmup_epochs=1),
    )


DEMO_SPLIT = splits.Config(test_share=1 / 6)  # 18 phantoms: 3 test, 3 validate, 12 train


def demo() -> Pretraining:
    """Synthetic phantoms on 2 workers of a 2-core machine: a tiny LoGoNet, 32^3 crops, 8 clusterers of 4 to 12
    clusters, 20 epochs. ``make demo`` runs it; loss falls and the masked accuracy passes its
    majority-class floor.
    """
    return Pretraining(
        split=DEMO_SPLIT,
        crops=cropping.Config(size_vox=(32, 32, 32), per_scan=4),
        clusterers=kmeans.Config(n=8, k_min=4, k_max=12, iterations=50),
        backbone=TINY_LOGONET,
        method=Component("masked_clusters", {"final_relu": False, "phi1": 0.2}),
        train=training.Config(epochs=20, global_batch=4, batch_size=2, lr=3e-3, warmup_epochs=1),
    )


PRETRAINING = {f.__name__: f for f in (small, hippocampus, hippocampus_logonet, real_ct, demo)}


# ------------------------------------------------------------------------------------------ finetuning


# All vary this.
SHORT = training.Config(global_batch=2, lr=3e-4, warmup_epochs=1, grad_clip=1.0, encoder_frozen_epochs="auto")


def small_finetune() -> Finetuning:
    """The network of the pretraining recipe 'small' on tens to hundreds of labelled scans, one GPU or a fast CPU
    machine: two 64^3 crops of each of 4 cases a step, 250 steps an epoch, 200 epochs; a fifth of the subjects is for
    testing where the dataset names no labelled test scans. Hours and result: depend on the data, not measured.
    """
    return Finetuning(
        split=splits.Config(test_share=0.2),
        crops=prepared_scans.CropSampling(size_vox=(64, 64, 64)),
        backbone=small().backbone,
        train=replace(
            SHORT, epochs=200, steps_per_epoch=250, global_batch=4, warmup_epochs=5, validate_every_epochs=10
        ),
    )


def hippocampus_finetune() -> Finetuning:
    """The MSD hippocampus MR scans, 160 to train and 40 to test, on a 2-core machine: a DynUNet of 3.2 M parameters,
    deep supervision, a crop of 40 x 56 x 40 of each of 4 cases a step, nnU-Net's augmentation, batch Dice, 4,000 steps,
    averaged weights; 83 minutes of one core. Augmentation was chosen on the validation cases of fold 0. Dice on the
    test cases: 0.889, mirrored 0.890.
    """
    # Left and right hippocampus are one class here, and each scan shows one of them, so nothing is against mirroring.
    options = {"augment": config.to_dict(augment.nnunet()), "batch_dice": True}
    return Finetuning(
        split=HIPPOCAMPUS_SPLIT,
        crops=prepared_scans.CropSampling(size_vox=HIPPOCAMPUS_CROP, per_case=1),
        backbone=SMALL_DYNUNET,
        method=Component("supervised", options),
        train=replace(
            SHORT,
            epochs=40,
            steps_per_epoch=100,
            global_batch=4,
            batch_size=4,
            lr=2e-3,
            ema=0.99,
            precision="bf16",  # on a CPU with bfloat16 arithmetic a third of the time
        ),
    )


def hippocampus_logonet_finetune() -> Finetuning:
    """The scans of 'hippocampus' with a LoGoNet of 3.2 M parameters: a crop of 32 x 64 x 32 of each of 4 cases a step,
    flips and changes of intensity, 1,600 steps, averaged weights. Augmentation and rate were chosen on the validation
    cases of fold 0; at this length it was not measured.
    """
    options = {"augment": config.to_dict(augment.Config(flip_prob=0.5)), "batch_dice": True}
    return Finetuning(
        split=HIPPOCAMPUS_SPLIT,
        crops=prepared_scans.CropSampling(size_vox=LOGONET_CROP, per_case=1),
        backbone=SMALL_LOGONET,
        method=Component("supervised", options),
        train=replace(SHORT, epochs=16, steps_per_epoch=100, global_batch=4, batch_size=2, lr=2e-3, ema=0.99),
    )


def demo_finetune() -> Finetuning:
    """Synthetic phantoms on 2 workers of a 2-core machine: a tiny LoGoNet, 32^3 crops, 350 steps.
    ``make demo`` runs it.
    """
    return Finetuning(
        split=DEMO_SPLIT,
        crops=prepared_scans.CropSampling(size_vox=(32, 32, 32)),
        backbone=TINY_LOGONET,
        method=Component("supervised", {"augment": {"flip_prob": 0.0, "rotate90_prob": 0.0}}),
        train=replace(SHORT, epochs=14, steps_per_epoch=25, lr=3e-3, validate_every_epochs=7),
        validation=sliding_window.Config(overlap=0.25),
    )


_FINETUNING = (small_finetune, hippocampus_finetune, hippocampus_logonet_finetune, demo_finetune)
FINETUNING = {f.__name__.removesuffix("_finetune"): f for f in _FINETUNING}
