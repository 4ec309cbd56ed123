"""The one training loop and what goes with it; see `loop`."""

from logonet.training.building import build_method, dry_run, load_weights
from logonet.training.config import Config, Init, Job, accumulation
from logonet.training.loop import TIMINGS, Left, Loop, epoch_line, peak_memory_mb, to_tensors
from logonet.training.schedule import lr_at
from logonet.training.step import (
    MAX_EMBEDDINGS,
    Diverged,
    autocast_of,
    average_gradients,
    reduce_metrics,
    step,
)
from logonet.training.validation import best_step, case_dice

__all__ = [
    "MAX_EMBEDDINGS",
    "TIMINGS",
    "Config",
    "Diverged",
    "Init",
    "Job",
    "Left",
    "Loop",
    "accumulation",
    "autocast_of",
    "average_gradients",
    "best_step",
    "build_method",
    "case_dice",
    "dry_run",
    "epoch_line",
    "load_weights",
    "lr_at",
    "peak_memory_mb",
    "reduce_metrics",
    "step",
    "to_tensors",
]
