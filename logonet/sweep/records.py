"""What a sweep remembers: ``<root>/sweep/<name>/sweep.json`` and ``trials/0000.json`` and so on.

The records are all that a sweep needs to go on after anything died. Each carries a checksum; a trial's record
that cannot be trusted counts as absent, and is kept as ``*.json.torn-<digest>`` before a good one replaces it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import pandas as pd

from logonet.core import config
from logonet.core.errors import UserError
from logonet.storage import object_store

SPEC = "sweep.json"
STATE = "state.json"
TRIALS = "trials"
SHOWN_DIFFERENCES = 5
SHOWN_CHARACTERS = 80
COLUMNS = ("trial", "status", "reason", "epochs", "objective", "final_dice", "wall_s", "pretrain")

T = TypeVar("T")
Status = Literal["waiting", "running", "done", "stopped", "failed"]

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------- trials


@dataclass
class Trial:
    """One trial, as far as it has come.

    Attributes:
        index: its number in the sweep, from 0.
        settings: dotted config key -> value.
        status: "stopped" is early, by the scheduler.
        reason: why it failed or where it was stopped.
        history: an entry for each finished epoch: "epoch", and usually "step", "loss" and "objective".
            A number that is not finite comes back from the store as NaN.
        pretrain: URI of the pretraining artifact, or "".
        final: {"dice": float, "uri": str} of the finetuning that judged it, or {}.
        wall_s: seconds spent on it, over all attempts.
    """

    index: int
    settings: dict[str, Any]
    status: Status = "waiting"
    reason: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    pretrain: str = ""
    final: dict[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0

    @property
    def ended(self) -> bool:
        """It ran to the end or was stopped, and is not tried again."""
        return self.status in ("done", "stopped")

    @property
    def objective(self) -> float:
        """The last finite one of the history; NaN without one."""
        values = [entry.get("objective") for entry in reversed(self.history)]
        return next((float(v) for v in values if v is not None and math.isfinite(v)), math.nan)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def write(uri: str, trial: Trial) -> None:
    """Write, or replace, a trial's record in the sweep at ``uri``."""
    record = _record(uri, trial.index)
    if object_store.exists(record):
        old = object_store.read(record)
        if isinstance(_parsed(old, trial.index, record), str):
            object_store.write(f"{record}.torn-{hashlib.sha256(old).hexdigest()[:8]}", old)
    object_store.write(record, seal(trial))


def read_all(uri: str) -> list[Trial]:
    """The trials of the sweep at ``uri``, by index; a record that cannot be trusted is logged and left out."""
    prefix = object_store.join(uri, TRIALS)
    names = [object_store.relative(entry.uri, prefix) for entry in object_store.listing(prefix)]
    indices = sorted(int(name.removesuffix(".json")) for name in names if re.fullmatch(r"\d{4,}\.json", name))
    records = [_record(uri, index) for index in indices]
    found = [*map(_parsed, object_store.at_once(object_store.read, records), indices, records)]
    for why in (f for f in found if isinstance(f, str)):
        log.warning("%s; the trial counts as never tried, its record is kept as *.torn-*", why)
    return [f for f in found if isinstance(f, Trial)]


def table(trials: Sequence[Trial], keys: Sequence[str]) -> pd.DataFrame:
    """A row for each trial.

    Columns: trial, status, reason, epochs, objective (the last finite one of the history), final_dice, wall_s,
    pretrain, then one for each of ``keys``: scalars as they are, lists and mappings as compact JSON.
    """

    def cell(value: Any) -> Any:
        return json.dumps(value, separators=(",", ":")) if isinstance(value, list | dict) else value

    rows = [
        {
            **vars(trial),
            "trial": trial.index,
            "epochs": int(trial.history[-1]["epoch"]) if trial.history else 0,
            "objective": trial.objective,
            "final_dice": float(trial.final.get("dice", math.nan)),
            **{key: cell(trial.settings.get(key)) for key in keys},
        }
        for trial in trials
    ]
    return pd.DataFrame(rows, columns=[*COLUMNS, *keys])


def _record(uri: str, index: int) -> str:
    return object_store.join(uri, TRIALS, f"{index:04d}.json")


def _parsed(data: bytes, index: int, record: str) -> Trial | str:
    """The trial, or why the record cannot be trusted."""
    try:
        trial = _unseal(Trial, data, record)
    except UserError as err:
        return str(err)
    trial.history, trial.final = _nan_for_null(trial.history), _nan_for_null(trial.final)
    epochs = [entry.get("epoch") for entry in trial.history]
    objectives = [entry.get("objective", 0.0) for entry in trial.history]
    if not all(map(_is_number, [*epochs, *objectives, trial.final.get("dice", 0.0)])):
        return f"{record} is no record of a trial: an epoch, objective or Dice is not a number"
    return trial if trial.index == index else f"{record} is the record of trial {trial.index}"


def state(uri: str) -> dict[str, Any]:
    """What is known of the sweep at ``uri`` as a whole: "spent_s" over all calls, "shared" artifacts by stage."""
    noted = object_store.join(uri, STATE)
    known = object_store.read_json(noted) if object_store.exists(noted) else {}
    if not isinstance(known, dict) or not _is_number(known.get("spent_s", 0.0)):
        hint = "delete it (its time is then counted anew)"
        raise UserError(f"{noted} does not hold what a sweep notes; {hint}")
    return known


def note(uri: str, **values: Any) -> None:
    """Add to, or replace in, the sweep's `state`."""
    object_store.write_json(object_store.join(uri, STATE), state(uri) | values)


# ---------------------------------------------------------------------------------------------- the sweep


@dataclass(frozen=True)
class Spec:
    """All that decides what a sweep computes. Budget and workers do not, so they may change between calls.

    Attributes:
        space: `space.Space.to_dict`.
        base: the resolved config that the trials vary.
        source, labelled: where the scans and the labelled ones are.
        search: how settings are chosen.
        finetuning: config of the finetuning that judges, or {}.
        scheduler: settings of early stopping.
    """

    name: str
    space: dict[str, Any]
    base: dict[str, Any]
    objective: str
    source: str
    labelled: str
    search: str
    seed: int
    finetuning: dict[str, Any]
    scheduler: dict[str, Any]


def claim(uri: str, spec: Spec) -> None:
    """Begin the sweep ``spec`` at ``uri``, or go on with it.

    Raises:
        UserError: when another sweep has that name, saying what differs.
    """
    if not object_store.exists(object_store.join(uri, SPEC)):
        object_store.write(object_store.join(uri, SPEC), seal(spec))
        return
    old, new = (config.flat(config.to_dict(s)) for s in (read_spec(uri), spec))
    if not (changed := [k for k in old | new if k not in old or k not in new or old[k] != new[k]]):
        return
    said = [f"{k} was {_shown(old, k)}, now {_shown(new, k)}" for k in changed[:SHOWN_DIFFERENCES]]
    said += [f"and {len(changed) - SHOWN_DIFFERENCES} more"] if len(changed) > SHOWN_DIFFERENCES else []
    hint = "give --name another name, or the old settings"
    raise UserError(f"the sweep at {uri} was begun with other settings: {', '.join(said)}; {hint}")


def read_spec(uri: str) -> Spec:
    """What the sweep at ``uri`` was begun with.

    Raises:
        UserError: when there is no sweep, or ``sweep.json`` is damaged.
    """
    record = object_store.join(uri, SPEC)
    if not object_store.exists(record):
        raise UserError(f"{uri} holds no sweep ({SPEC} is missing); give the root and name of one")
    try:
        return _unseal(Spec, object_store.read(record), record)
    except UserError as err:
        # Not absence: whatever this call asks for, the trials beside it may have been tried for something else.
        raise UserError(f"{err}; begin another sweep with --name, or restore the file") from None


def _shown(values: Mapping[str, Any], key: str) -> str:
    text = json.dumps(values[key]) if key in values else "unset"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


# ------------------------------------------------------------------------------------------------- sealing


def seal(record: Trial | Spec) -> bytes:
    """Strict JSON with a checksum; null stands for a number that is not finite."""
    values = json.loads(json.dumps(config.to_dict(record)), parse_constant=lambda _: None)
    sealed = values | {"checksum": config.fingerprint(values)}
    return (json.dumps(sealed, indent=2, allow_nan=False) + "\n").encode()


def _unseal(cls: type[T], data: bytes, where: str) -> T:
    try:
        values = config.parse_json(data)
    except ValueError:  # UnicodeDecodeError too
        raise UserError(f"{where} is torn") from None
    if not isinstance(values, dict) or "checksum" not in values:
        raise UserError(f"{where} is no record of a sweep")
    if values.pop("checksum") != config.fingerprint(values):
        raise UserError(f"{where} does not match its own checksum")
    try:
        return config.from_dict(cls, values)
    except UserError as err:
        raise UserError(f"{where} is no record of this version of logonet: {err}") from None


def _nan_for_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _nan_for_null(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_nan_for_null(v) for v in value]
    return math.nan if value is None else value
