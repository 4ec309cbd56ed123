"""What a sweep is: what to search, on what, how, and for how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Gt

from logonet import pipelines
from logonet.core import config
from logonet.core.config import Component, Count, Section
from logonet.core.errors import UserError
from logonet.data import splits
from logonet.pipelines import Finetuning, Pretraining
from logonet.pipelines.finetuning import Init
from logonet.storage import object_store
from logonet.sweep import records
from logonet.sweep import space as spaces
from logonet.sweep.outcome import Objective
from logonet.sweep.space import Space
from logonet.training import linear_probe


@dataclass(frozen=True)
class Config(Section, key="search"):
    """How to search and whom to believe.

    Attributes:
        objective: what is made large. "probe": Dice of a linear head on the frozen encoder; "effective_rank": of the
            embeddings; "accuracy": of the pseudo-labels, over that of always naming the most frequent; "finetune":
            validation Dice of a finetuning that follows each pretraining. Never the pretext loss, whose scale
            depends on the number of clusters.
        search: "random" draws by the seed (and walks through grids); "optuna" learns from the trials before.
        stop_early: by asynchronous successive halving (ASHA) on every epoch's report.
        grace_epochs: no trial is stopped before.
        reduction: at each rung the best 1 / reduction of the trials go on.
        seed: of the search.
    """

    objective: Objective = "probe"
    search: Literal["random", "optuna"] = "random"
    stop_early: bool = True
    grace_epochs: Count = 1
    reduction: Annotated[float, Gt(1)] = 3.0
    seed: int = 0


@dataclass(frozen=True)
class Budget:
    """What the sweep may cost; a larger one on the same root goes on.

    Attributes:
        trials: settings to try; 0 is the whole grid, where all keys are grids.
        hours: of the clock, over all calls; 0 does not limit. Trials that run when it is over wait for more.
    """

    trials: int = 0
    hours: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """What is searched, on what, and how.

    Attributes:
        base: the pretraining that trials vary.
        finetuning: of objective "finetune", of ``confirm`` and of the winner; its network is the trial's.
        labelled: labelled scans for the probe and the finetuning; empty for those of ``source``.
        confirm: so many of the trials that ran to the end, the best first, are finetuned: whether the proxy can be
            believed is in the report, and the winner is the one with the best validation Dice.
        register: finetune the winner too and register it as ``logonet-seg-<register>``; empty does not.
    """

    name: str
    space: Space
    base: Pretraining
    finetuning: Finetuning
    source: str
    root: str
    experiment: str
    config: Config = field(default_factory=Config)
    labelled: str = ""
    confirm: int = 0
    register: str = ""

    @property
    def uri(self) -> str:
        return object_store.join(self.root, "sweep", self.name)

    @property
    def epochs(self) -> int:
        """Of a trial's reports to the scheduler."""
        return (self.finetuning if self.config.objective == "finetune" else self.base).train.epochs


def resolve(sweep: Sweep) -> Sweep:
    """``sweep`` with defaults written out, checked as far as that goes without data.

    Raises:
        UserError: a searched key or value that no trial could run, a split without validation cases...
    """
    base, tuned = pipelines.resolve(sweep.base), sweep.finetuning
    if sweep.config.objective == "probe" and base.probe is None:
        base = replace(base, probe=linear_probe.Config())
    if base.split is not None:
        tuned = replace(tuned, split=base.split)  # or pretraining would know the finetuning's test cases
    # The trial's own network; and its Dice is wanted at the end whatever the recipe says.
    every = tuned.train.validate_every_epochs or tuned.train.epochs
    tuned = replace(tuned, backbone=Component(""), train=replace(tuned.train, validate_every_epochs=every))
    split = base.split or splits.Config()
    finetunes = sweep.confirm or sweep.register or sweep.config.objective == "finetune"
    if (base.probe is not None or finetunes) and split.fold is None:
        raise UserError("the sweep is judged on validation cases and split.fold is null; set split.fold=0")
    if finetunes:  # before any hour is spent
        pipelines.resolve_finetuning(replace(tuned, backbone=base.backbone, init=Init()))
    spaces.check(sweep.space, config.to_dict(base), pretraining_of)
    return replace(sweep, base=base, finetuning=tuned)


def pretraining_of(values: Mapping[str, Any]) -> Pretraining:
    return pipelines.resolve(config.from_dict(Pretraining, values))


def spec(sweep: Sweep) -> records.Spec:
    """What must not change under the sweep's name."""
    cfg = config.to_dict(sweep.config)
    return records.Spec(
        name=sweep.name,
        space=sweep.space.to_dict(),
        base=config.to_dict(sweep.base),
        objective=cfg.pop("objective"),
        source=sweep.source,
        labelled=sweep.labelled,
        search=cfg.pop("search"),
        seed=cfg.pop("seed"),
        finetuning=config.to_dict(sweep.finetuning),
        scheduler=cfg,
    )
