"""The one training loop and what goes with it; see `loop`."""

# ruff: noqa: F401
from logonet.training.batches import to_tensors
from logonet.training.building import build_method, dry_run, load_initial, load_weights
from logonet.training.config import Config, Init, Job, accumulation
from logonet.training.loop import TIMINGS, Left, epoch_line
from logonet.training.schedule import lr_at
from logonet.training.step import Diverged, OutOfMemory, reduce_metrics, step
from logonet.training.validation import best_step, case_dice
