"""What a training run is: its settings, its initial weights, its job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from logonet.core.config import unknown
from logonet.core.errors import UserError
from logonet.inference import sliding_window
from logonet.methods import DataSpec
from logonet.training import linear_probe


@dataclass(frozen=True)
class Config:
    """Training settings; the defaults are the paper's Table 2.

    Attributes:
        epochs: passes over all samples, or as many times ``steps_per_epoch``.
        steps_per_epoch: what counts as an epoch, in optimizer steps; None is one pass over all samples.
        global_batch: samples of one optimizer step, over all workers (the paper: 16 GPUs x 1).
        batch_size: samples a worker puts through the network at once; what batch norm sees. The global_batch /
            batch_size of them that make a step are dealt to the workers, which accumulate gradients over theirs.
        lr: peak learning rate; linear warm-up over ``warmup_epochs``, then cosine to ``min_lr``.
        weight_decay, betas: of AdamW.
        grad_clip: largest gradient norm; None does not clip.
        precision: "bf16" (autocast), "fp32", or "auto": bf16 on CUDA, fp32 on CPU, so that a run that moves from
            one to the other changes its arithmetic. On CPU bf16 is for trying out: torch 2.13's gradient of a
            3x3x3 convolution is then garbage where a feature is exactly 2 voxels long along the first axis.
        compile: torch.compile the network.
        gradient_sync: "ddp", "flat" (one all-reduce of all gradients) or "auto": ddp on CUDA, flat on CPU.
        checkpoint_every_steps: also within an epoch; None: at the end of each.
        keep_checkpoints: newest ones kept.
        validate_every_epochs: measure Dice on the validation cases this often, and at the end; 0 never does.
        patience: stop after this many validations without a better one; None trains to the end.
        seed: of everything drawn.
    """

    epochs: int = 100
    steps_per_epoch: int | None = None
    global_batch: int = 16
    batch_size: int = 1
    lr: float = 1e-4
    min_lr: float = 0.0
    warmup_epochs: float = 10.0
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float | None = None
    precision: str = "auto"
    compile: bool = False
    gradient_sync: str = "auto"
    checkpoint_every_steps: int | None = None
    keep_checkpoints: int = 2
    validate_every_epochs: int = 0
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch", "batch_size", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("checkpoint_every_steps", "steps_per_epoch", "patience"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or null")
        if self.validate_every_epochs < 0 or (self.patience is not None and not self.validate_every_epochs):
            raise ValueError("validate_every_epochs must be at least 0, and above 0 for patience")
        if self.lr <= 0 or not 0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"lr is {self.lr} and min_lr {self.min_lr}; they must be 0 <= min_lr <= lr and lr > 0"
            )
        if self.weight_decay < 0 or (self.grad_clip is not None and self.grad_clip <= 0):
            raise ValueError("weight_decay must be at least 0, and grad_clip above 0 or null")
        if self.precision not in (known := ("auto", "bf16", "fp32")):
            raise ValueError(unknown("precision", self.precision, known))
        if self.gradient_sync not in (known := ("auto", "ddp", "flat")):
            raise ValueError(unknown("gradient_sync", self.gradient_sync, known))
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs}; it must lie in 0..epochs ({self.epochs})"
            )


@dataclass(frozen=True)
class Init:
    """Weights to start from: a safetensors file of a backbone, and how much of it must fit (see `transfer`)."""

    uri: str
    sha256: str
    parts: Literal["all", "encoder"] = "all"
    min_encoder_share: float = 0.95


@dataclass(frozen=True)
class Job:
    """Everything a worker needs, beside the feed. Plain data, so that it travels.

    With ``probe`` the entries of the epochs that it is due in say how good the encoder is: ``probe_dice``,
    ``probe_dice_per_class`` and ``probe_dice_floor``, that of the same network at its random initial weights.
    """

    uri: str
    fingerprint: str
    backbone: dict[str, Any]
    method: dict[str, Any]
    train: Config
    facts: DataSpec
    tracking: dict[str, Any] | None = None
    progress: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    init: Init | None = None
    validation: sliding_window.Config = field(default_factory=sliding_window.Config)
    probe: linear_probe.Task | None = None


def micro_batches(cfg: Config) -> int:
    """Forward passes of one optimizer step, over all workers. UserError when the global batch does not divide."""
    count, rest = divmod(cfg.global_batch, cfg.batch_size)
    if rest:
        near = [n * cfg.batch_size for n in (count, count + 1) if n]
        raise UserError(
            f"train.global_batch {cfg.global_batch} is no multiple of train.batch_size {cfg.batch_size}; use --set "
            f"train.global_batch={' or '.join(map(str, near))}"
        )
    return count


def accumulation(cfg: Config, workers: int) -> int:
    """Micro-batches that the busiest worker has in a step. UserError when one would have none."""
    count = micro_batches(cfg)
    if workers > count:
        raise UserError(
            f"train.global_batch {cfg.global_batch} is {count} batches of train.batch_size {cfg.batch_size}, and there "
            f"are {workers} workers; use --workers {count} or fewer, or --set "
            f"train.global_batch={workers * cfg.batch_size} or more"
        )
    return -(-count // workers)
