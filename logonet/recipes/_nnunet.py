"""What nnFormer, and with it SimTROT and MedContext, take over from nnU-Net."""

from __future__ import annotations

from typing import Any

from logonet import training
from logonet.core import config
from logonet.data import augment
from logonet.inference import sliding_window

# SGD, and 1000 epochs of 250 steps of two crops.
TRAIN = training.Config(
    epochs=1000,
    steps_per_epoch=250,
    global_batch=2,
    batch_size=2,
    optimizer="sgd",
    momentum=0.99,
    lr=1e-2,
    weight_decay=3e-5,
    schedule="poly",
    warmup_epochs=0,
    grad_clip=12.0,
    validate_every_epochs=50,
)
VALIDATION = sliding_window.Config(overlap=0.5)
SYNAPSE_SIZE, SYNAPSE_SPACING_MM = (128, 128, 64), (0.76, 0.76, 3.0)
BRAIN_SIZE, BRAIN_SPACING_MM = (128, 128, 128), (1.0, 1.0, 1.0)
# Networks as published for each: their options beside the defaults, by dataset.
NNFORMER: dict[str, dict[str, Any]] = {
    "synapse": {},
    "brain": {
        "img_size": BRAIN_SIZE,
        "patch": (4, 4, 4),
        "embed_dim": 96,
        "num_heads": (3, 6, 12, 24),
        "decoder_heads": (6, 12, 24),
        "deep_supervision": False,
    },
    "acdc": {
        "img_size": (160, 160, 14),
        "patch": (4, 4, 1),
        "embed_dim": 96,
        "num_heads": (3, 6, 12, 24),
        "windows": ((5, 5, 3), (5, 5, 3), (10, 10, 7), (5, 5, 3)),
        "strides": ((2, 2, 1), (2, 2, 2), (2, 2, 2)),
        "deep_supervision": False,
    },
}
# Batch Dice without background, and nnU-Net's augmentation; of thin crops within the slices.
SUPERVISED: dict[str, Any] = {
    "augment": config.to_dict(augment.nnunet()),
    "batch_dice": True,
    "background": False,
}
SUPERVISED_FLAT = {**SUPERVISED, "augment": config.to_dict(augment.nnunet(flat=True))}
