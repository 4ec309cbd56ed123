"""MLflow: runs and the model registry."""

from logonet.tracking.models import download, lineage, register, set_alias
from logonet.tracking.runs import (
    MLFLOW_DEFAULTS,
    PARENT_TAG,
    Tracker,
    check,
    git_commit,
    tracking_uri,
)

__all__ = ["MLFLOW_DEFAULTS", "PARENT_TAG", "Tracker", "check", "download", "git_commit"]
__all__ += ["lineage", "register", "set_alias", "tracking_uri"]
