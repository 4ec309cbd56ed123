"""logonet: self-supervised pretraining of 3D medical image networks, and their finetuning for segmentation.

From Python:

    >>> import logonet
    >>> run = logonet.train_local("masked_clusters", scans=8)           # pretrain on eight synthetic scans, here
    >>> tuned = logonet.train_local("supervised", scans="data/dataset.json", init=run.uri)
    >>> model = logonet.load_model(tuned.uri)                           # or models:/NAME@alias, or a folder
    >>> labels_XYZ = model.segment("patient7.nii.gz")

Everything below is loaded when it is first used: importing logonet costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "LoadedModel",
    "LocalRun",
    "build_method",
    "build_network",
    "load_model",
    "read_manifest",
    "train_local",
]

if TYPE_CHECKING:
    from logonet.api import (
        LoadedModel,
        LocalRun,
        build_method,
        build_network,
        load_model,
        read_manifest,
        train_local,
    )


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'logonet' has no attribute '{name}'")
    from logonet import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
