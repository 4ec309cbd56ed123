"""MLflow: runs and the model registry."""

from logonet.tracking.models import download, lineage, register, set_alias
from logonet.tracking.runs import (
    FINGERPRINT_TAG,
    MLFLOW_DEFAULTS,
    PARENT_TAG,
    Tracker,
    catch_up,
    check,
    git_commit,
    tracking_uri,
)

__all__ = [
    "FINGERPRINT_TAG",
    "MLFLOW_DEFAULTS",
    "PARENT_TAG",
    "Tracker",
    "catch_up",
    "check",
    "download",
    "git_commit",
    "lineage",
    "register",
    "set_alias",
    "tracking_uri",
]
