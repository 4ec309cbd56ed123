"""The public datasets of the papers: their classes by name and by number, and who tests.

Datasets come under several names for one organ, and some without any: a class without a name goes by its number, as
"class 4".
"""

from __future__ import annotations

from collections.abc import Mapping

from logonet.data import classes, splits

Members = Mapping[str, tuple[str, ...]]

# BTCV and "Synapse" are the same 30 CTs; names as MONAI's and nnU-Net's lists have them, numbers as the labels do.
BTCV: Members = {
    "spleen": ("spleen", "class 1"),
    "right kidney": ("right kidney", "rkid", "class 2"),
    "left kidney": ("left kidney", "lkid", "class 3"),
    "gallbladder": ("gallbladder", "gall", "class 4"),
    "esophagus": ("esophagus", "oesophagus", "eso", "class 5"),
    "liver": ("liver", "class 6"),
    "stomach": ("stomach", "sto", "class 7"),
    "aorta": ("aorta", "class 8"),
    "inferior vena cava": ("inferior vena cava", "IVC", "class 9"),
    "portal and splenic veins": (
        "portal and splenic veins",
        "portal vein and splenic vein",
        "veins",
        "class 10",
    ),
    "pancreas": ("pancreas", "class 11"),
    "right adrenal gland": ("right adrenal gland", "rad", "class 12"),
    "left adrenal gland": ("left adrenal gland", "lad", "class 13"),
}
# The eight of TransUNet, which SimTROT and MedContext report.
SYNAPSE = {name: BTCV[name] for name in (
    "spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas",
)}  # fmt: skip
SYNAPSE_TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)  # TransUNet's and nnFormer's 12 of 30
BTCV_VAL = (35, 36, 37, 38, 39, 40)  # MONAI's 6 of 30

MM_WHS: Members = {
    "left ventricle": ("left ventricle", "class 500"),
    "right ventricle": ("right ventricle", "class 600"),
    "left atrium": ("left atrium", "class 420"),
    "right atrium": ("right atrium", "class 550"),
    "myocardium": ("myocardium", "class 205"),
    "aorta": ("aorta", "ascending aorta", "class 820"),
    "pulmonary artery": ("pulmonary artery", "class 850"),
}
ACDC: Members = {
    "right ventricle": ("right ventricle", "RV", "class 1"),
    "myocardium": ("myocardium", "MLV", "Myo", "class 2"),
    "left ventricle": ("left ventricle", "LV", "LVC", "class 3"),
}
# MSD's Task01 and BraTS until 2017; the regions are named by its classes.
MSD_BRAIN: Members = {
    "edema": ("edema", "oedema", "class 1"),
    "non-enhancing tumor": ("non-enhancing tumor", "non-enhancing tumour", "class 2"),
    "enhancing tumor": ("enhancing tumor", "enhancing tumour", "class 3"),
}
# BraTS 2021 has other numbers.
BRATS21: Members = {
    "edema": ("edema", "oedema", "class 2"),
    "non-enhancing tumor": ("non-enhancing tumor", "necrotic tumor core", "class 1"),
    "enhancing tumor": ("enhancing tumor", "enhancing tumour", "class 4"),
}
BRATS_REGIONS = {
    "whole tumor": ("edema", "non-enhancing tumor", "enhancing tumor"),
    "tumor core": ("non-enhancing tumor", "enhancing tumor"),
    "enhancing tumor": ("enhancing tumor",),
}
FETA: Members = {
    "external cerebrospinal fluid": ("external cerebrospinal fluid", "class 1"),
    "grey matter": ("grey matter", "gray matter", "class 2"),
    "white matter": ("white matter", "class 3"),
    "ventricles": ("ventricles", "class 4"),
    "cerebellum": ("cerebellum", "class 5"),
    "deep grey matter": ("deep grey matter", "deep gray matter", "class 6"),
    "brainstem": ("brainstem", "brain stem", "class 7"),
}
# The challenge's own order of numbers; lists that name their classes need not have it.
FLARE: Members = {
    "liver": ("liver", "class 1"),
    "kidney": ("kidney", "kidneys", "class 2"),
    "spleen": ("spleen", "class 3"),
    "pancreas": ("pancreas", "class 4"),
}
AMOS_NAMES = (
    "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta", "postcava",
    "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate uterus",
)  # fmt: skip
AMOS: Members = {name: (name, f"class {i}") for i, name in enumerate(AMOS_NAMES, start=1)}


def data(members: Members, regions: Mapping[str, tuple[str, ...]] | None = None) -> classes.Config:
    """The section ``data`` of a dataset."""
    return classes.Config(classes=dict(members), regions=dict(regions or {}))


def numbered(numbers: tuple[int, ...]) -> tuple[str, ...]:
    """Patterns of the cases with these numbers, such as img0035."""
    return tuple(f"*{n:04d}*" for n in numbers)


SYNAPSE_SPLIT = splits.Config(test_names=numbered(SYNAPSE_TEST), fold=None)
BTCV_SPLIT = splits.Config(val_names=numbered(BTCV_VAL))
