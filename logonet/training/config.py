"""What a training run is: its settings, its initial weights, its job."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from logonet.core.config import (
    OMIT_DEFAULT,
    Component,
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Section,
    to_dict,
)
from logonet.core.errors import UserError
from logonet.inference import sliding_window
from logonet.methods import DataSpec
from logonet.training import linear_probe

Beta = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True)
class Config(Section, key="train"):
    """Training settings; the defaults are the paper's Table 2.

    Attributes:
        epochs: passes over all samples, or as many times ``steps_per_epoch``.
        steps_per_epoch: what counts as an epoch, in optimizer steps; None is one pass over all samples.
        global_batch: samples of one optimizer step, over all workers (the paper: 16 GPUs x 1).
        batch_size: samples a worker puts through the network at once; what batch norm sees. The global_batch /
            batch_size of them that make a step are dealt to the workers, which accumulate gradients over theirs.
        lr: peak learning rate; linear warm-up over ``warmup_epochs``, then ``schedule`` down to ``min_lr``.
        min_lr: learning rate at the end.
        warmup_epochs: epochs of the warm-up.
        schedule: after the warm-up: "cosine", "poly", "step" or "constant".
        poly_power: of "poly", nnU-Net's: (1 - share of the steps) to this power.
        decay_at, decay_factor: "step" multiplies the learning rate by the factor at each of these shares of the steps.
        optimizer: "adamw", or "sgd" with Nesterov momentum.
        weight_decay: of either; "sgd" adds it to the gradient.
        betas: of AdamW.
        momentum: of SGD; nnU-Net's, which SimTROT has too.
        decay_norms: false takes biases and the weights of norms out of the weight decay.
        encoder_lr_scale, head_lr_scale: factors of the learning rate of the encoder, and of the classifier and what a
            method adds to the network.
        layer_decay: another factor for each level of the encoder, from the coarsest to the finest.
        encoder_frozen_epochs: as many epochs come first in which the encoder rests and the others warm up. "auto": in a
            finetuning of pretrained weights as many as the warm-up has, an eighth of the epochs at most; else none.
        ema: decay of an average of the weights over the steps, which is then what is validated and kept; 0 takes none.
        grad_clip: largest gradient norm; None does not clip.
        precision: "bf16" (autocast), "fp32", or "auto": bf16 on CUDA, fp32 on CPU, so that a run that moves from
            one to the other changes its arithmetic.
        compile: torch.compile the network.
        gradient_sync: "ddp", "flat" (one all-reduce of all gradients) or "auto": ddp on CUDA, flat on CPU.
        gradient_compression: "bf16" sends gradients in half the bytes, and rounds them to 8 bits of precision; it pays
            where workers are joined by Ethernet. With gradient_sync=ddp only.
        checkpoint_every_s: write a checkpoint after the step in which the last one becomes so many seconds old; 0: at
            each epoch's end. A validation that is the best so far has one too, and so has the end. When they are
            written changes no result, so fingerprints leave this out.
        checkpoint_every_steps: also after each so many steps.
        keep_checkpoints: newest ones kept.
        validate_every_epochs: measure Dice on the validation cases this often, and at the end; 0 never does.
        patience: stop after this many validations without a better one; None trains to the end.
        seed: of everything drawn.
    """

    epochs: Count = 100
    steps_per_epoch: Count | None = None
    global_batch: Count = 16
    batch_size: Count = 1
    lr: Positive = 1e-4
    min_lr: NonNegative = 0.0
    warmup_epochs: NonNegative = 10.0
    weight_decay: NonNegative = 1e-5
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    optimizer: Literal["adamw", "sgd"] = field(default="adamw", metadata=OMIT_DEFAULT)
    momentum: Beta = field(default=0.99, metadata=OMIT_DEFAULT)
    schedule: Literal["cosine", "poly", "step", "constant"] = field(default="cosine", metadata=OMIT_DEFAULT)
    poly_power: Positive = field(default=0.9, metadata=OMIT_DEFAULT)
    decay_at: tuple[Fraction, ...] = field(default=(0.5, 0.75), metadata=OMIT_DEFAULT)
    decay_factor: Fraction = field(default=0.1, metadata=OMIT_DEFAULT)
    decay_norms: bool = field(default=True, metadata=OMIT_DEFAULT)
    encoder_lr_scale: NonNegative = field(default=1.0, metadata=OMIT_DEFAULT)
    head_lr_scale: NonNegative = field(default=1.0, metadata=OMIT_DEFAULT)
    layer_decay: Fraction = field(default=1.0, metadata=OMIT_DEFAULT)
    encoder_frozen_epochs: NonNegative | Literal["auto"] = field(default=0.0, metadata=OMIT_DEFAULT)
    ema: Beta = field(default=0.0, metadata=OMIT_DEFAULT)
    grad_clip: Positive | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    gradient_sync: Literal["auto", "ddp", "flat"] = "auto"
    gradient_compression: Literal["none", "bf16"] = field(default="none", metadata=OMIT_DEFAULT)
    checkpoint_every_s: NonNegative = field(default=600.0, metadata=OMIT_DEFAULT)
    checkpoint_every_steps: Count | None = None
    keep_checkpoints: Count = 2
    validate_every_epochs: Natural = 0
    patience: Count | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience is not None and not self.validate_every_epochs:
            raise UserError("train.patience counts validations; set train.validate_every_epochs above 0 too")
        if self.gradient_compression != "none" and self.gradient_sync != "ddp":
            raise UserError(
                "train.gradient_compression works in DDP's hooks; set train.gradient_sync=ddp too"
            )
        for name, value, limit in (
            ("min_lr", self.min_lr, "lr"),
            ("warmup_epochs", self.warmup_epochs, "epochs"),
            ("encoder_frozen_epochs", self.frozen_epochs, "epochs"),
        ):
            most = getattr(self, limit)
            if value > most:
                raise UserError(f"train.{name} is {value}; it must be at most train.{limit} ({most})")

    @property
    def frozen_epochs(self) -> float:
        """``encoder_frozen_epochs`` as a number; "auto" is 0 from random weights."""
        return 0.0 if self.encoder_frozen_epochs == "auto" else self.encoder_frozen_epochs

    def settled(self, *, pretrained: bool) -> Config:
        """With a number for an ``encoder_frozen_epochs`` of "auto"."""
        if self.encoder_frozen_epochs != "auto":
            return self
        frozen = min(self.warmup_epochs, self.epochs / 8) if pretrained else 0.0
        return replace(self, encoder_frozen_epochs=frozen)

    def identity(self) -> dict[str, Any]:
        """What of it decides a result."""
        return to_dict(replace(self, checkpoint_every_s=Config.checkpoint_every_s))


@dataclass(frozen=True)
class Init:
    """Weights to start from: a safetensors file of a backbone, and how much of it must fit (see `transfer`).

    ``backbone`` is the network that they were trained with, without a name where nobody knows.
    """

    uri: str
    sha256: str
    parts: Literal["all", "encoder"] = "all"
    min_encoder_share: float = 0.95
    backbone: Component = Component("")


@dataclass(frozen=True)
class Job:
    """Everything a worker needs, beside the feed. Plain data, so that it travels.

    With ``probe`` the entries of the epochs that it is due in say how good the encoder is: ``probe_dice``,
    ``probe_dice_per_class`` and ``probe_dice_floor``, that of the same network at its random initial weights.
    """

    uri: str
    fingerprint: str
    backbone: Component
    method: Component
    train: Config
    data_spec: DataSpec
    tracking: dict[str, Any] | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    init: Init | None = None
    validation: sliding_window.Config = field(default_factory=sliding_window.Config)
    probe: linear_probe.Task | None = None

    def __post_init__(self) -> None:
        Component.convert(self, "backbone", "method")


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
