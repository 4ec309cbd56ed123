"""Checkpoints of a training run: the state after a step, written behind the training's back, trusted only
after its checksums, and with the one before as fallback.

A checkpoint is an artifact at ``<run>/checkpoints/step-00001234/``: safetensors for tensors, JSON for the
rest, ``manifest.json`` last. Nothing is pickled.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from logonet.core import config
from logonet.core.errors import UserError
from logonet.storage import artifacts, object_store
from logonet.storage.object_store import IntegrityError, Stored

log = logging.getLogger(__name__)


class Damaged(UserError):
    """A checkpoint that is not whole: unfinished, torn or altered."""


@dataclass(frozen=True)
class _Facts:
    """Of a checkpoint's manifest."""

    step: int
    world: int
    history: list[dict[str, Any]]


STAGE = "checkpoint"
MAX_WORLD = 2**20  # ranks; each has a place in the state
TENSOR_FILES = ("model", "optimizer", "partial")


@dataclass
class State:
    """A run after ``step`` optimizer steps.

    Attributes:
        model: the method module's state dict (its backbone under ``backbone.``).
        optimizer: ``<moment>/<parameter name>`` -> tensor.
        partial: per rank, the metric sums of the epoch under way.
        history: one mapping of metrics per finished epoch.
        world: ranks that wrote it.
    """

    step: int
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    partial: list[dict[str, torch.Tensor]]
    history: list[dict[str, Any]] = field(default_factory=list)
    world: int = 1

    def tensors(self) -> Iterator[torch.Tensor]:
        for group in (self.model, self.optimizer, *self.partial):
            yield from group.values()

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
        """A copy with every tensor changed."""
        groups = (self.model, self.optimizer, *self.partial)
        model, optimizer, *partial = ({n: change(t) for n, t in group.items()} for group in groups)
        return State(self.step, model, optimizer, partial, copy.deepcopy(self.history), self.world)


def save_state(uri: str, fingerprint: str, state: State) -> None:
    """Write a checkpoint at ``uri``, its manifest last."""
    partial = {f"{rank}/{name}": t for rank, part in enumerate(state.partial) for name, t in part.items()}
    groups = {"model": state.model, "optimizer": state.optimizer, "partial": partial}
    blobs = {f"{group}.safetensors": _tensor_bytes(tensors) for group, tensors in groups.items()}
    files = {name: object_store.write(object_store.join(uri, name), blob) for name, blob in blobs.items()}
    facts = {"step": state.step, "world": state.world, "history": state.history}
    artifacts.commit(uri, STAGE, fingerprint, config={}, parents={}, files=files, facts=facts)


def load_state(uri: str, fingerprint: str) -> State:
    """Read a checkpoint, every file against its checksum.

    Raises:
        Damaged: anything is missing or altered. Other UserErrors, such as a store that refuses to be read, say
            nothing about the checkpoint and pass through.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    artifact = artifacts.find(uri)
    if artifact is None:
        raise Damaged(f"{uri} holds no finished checkpoint")
    if artifact.stage != STAGE or artifact.fingerprint != fingerprint:
        raise Damaged(f"{uri} belongs to another run ({artifact.fingerprint}), not to {fingerprint}")
    if missing := artifacts.verify(artifact):
        raise Damaged(f"{uri} has missing or torn files: {', '.join(missing)}")
    try:
        groups = {group: load(artifact.read(f"{group}.safetensors")) for group in TENSOR_FILES}
    except (IntegrityError, SafetensorError) as err:
        raise Damaged(f"{uri} is damaged: {err}") from None
    try:
        facts = config.from_dict(_Facts, artifact.facts)
        if not 1 <= facts.world <= MAX_WORLD:
            raise ValueError(f"world {facts.world}")
        partial: list[dict[str, torch.Tensor]] = [{} for _ in range(facts.world)]
        for name, tensor in groups["partial"].items():
            rank, _, metric = name.partition("/")
            partial[int(rank)][metric] = tensor
        return State(facts.step, groups["model"], groups["optimizer"], partial, facts.history, facts.world)
    except (UserError, ValueError, IndexError) as err:
        raise Damaged(f"{uri} is no checkpoint of this version of logonet ({err})") from None


def all_of(run_uri: str) -> list[str]:
    """The run's checkpoint folders, oldest first; finished or not."""
    folder = object_store.join(run_uri, "checkpoints")
    names = {object_store.relative(e.uri, folder).split("/")[0] for e in object_store.listing(folder)}
    return [object_store.join(folder, n) for n in sorted(names) if n.startswith("step-")]


def newest(run_uri: str, fingerprint: str) -> State | None:
    """The newest checkpoint that is whole; damaged ones are passed over with a warning, and kept."""
    found = all_of(run_uri)
    for uri in reversed(found):
        try:
            return load_state(uri, fingerprint)
        except Damaged as err:
            log.warning("checkpoint passed over: %s; going back to the one before", err)
    if found:
        log.warning(
            "none of the %d checkpoints of %s is whole; starting from the beginning", len(found), run_uri
        )
    return None


class Writer:
    """Writes checkpoints in a thread of its own, one at a time, and prunes old ones."""

    def __init__(self, run_uri: str, fingerprint: str, keep: int):
        self.run_uri, self.fingerprint, self.keep = run_uri, fingerprint, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None

    def save(self, state: State) -> None:
        """Take a copy of ``state`` and return; the copy is written while training goes on."""
        self.wait()
        copied = state.mapped(
            lambda t: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        )
        self._saving = self._thread.submit(self._write, copied)

    def wait(self) -> None:
        """Until the last save is in the store; raises what went wrong with it."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _write(self, state: State) -> None:
        uri = object_store.join(self.run_uri, "checkpoints", f"step-{state.step:08d}")
        save_state(uri, self.fingerprint, state)
        self._prune(uri)

    def _prune(self, newest: str) -> None:
        """Delete all but the last ``keep`` up to ``newest``, the one just written, and what is left of older ones.

        Later ones are there after a fallback: torn, and about to be written again.
        """
        there = all_of(self.run_uri)
        finished = [
            u for u in there if u <= newest and object_store.exists(object_store.join(u, "manifest.json"))
        ]
        oldest = finished[-self.keep :][0]
        try:
            for uri in there:
                if uri < oldest:  # unfinished ones too: their run was killed while it wrote or deleted them
                    # The manifest first, so that no half of it is ever trusted.
                    object_store.delete(object_store.join(uri, "manifest.json"))
                    object_store.delete_prefix(uri)
        except UserError as err:
            log.warning("old checkpoints stay: %s", err)


def save_best(run_uri: str, step: int, backbone: torch.nn.Module, keep: int) -> None:
    """Keep the backbone after ``step``, the best so far.

    A run that falls back to an older checkpoint falls back to that one's best too. So there is one for each of the
    ``keep`` checkpoints, for the one that may still be being written, and for the one that will name this best.
    """
    uri = _best_uri(run_uri, step)
    object_store.write(uri, _tensor_bytes(backbone.state_dict()))
    # Later ones are left of a run that went on from before them, and are about to be written again.
    earlier = sorted(e.uri for e in object_store.listing(object_store.join(run_uri, "best")) if e.uri < uri)
    for old in earlier[: max(0, len(earlier) - keep - 1)]:
        object_store.delete(old)


def _best_uri(run_uri: str, step: int) -> str:
    return object_store.join(run_uri, "best", f"step-{step:08d}.safetensors")


def save_final(
    run_uri: str, method: Any, network: Any, history: list[dict[str, Any]], best_step: int | None = None
) -> dict[str, Stored]:
    """The run's results: the weights of the network, of the whole method, and the history.

    With ``best_step`` also ``best.safetensors``: that network after that step.
    """
    blobs = {}
    if best_step is not None:
        blobs["best.safetensors"] = object_store.read(_best_uri(run_uri, best_step))
    blobs["backbone.safetensors"] = _tensor_bytes(network.state_dict())
    blobs["method.safetensors"] = _tensor_bytes(method.state_dict())
    blobs["history.json"] = object_store.json_bytes(history)
    return {name: object_store.write(object_store.join(run_uri, name), b) for name, b in blobs.items()}


def _tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save({n: t.detach().cpu().contiguous() for n, t in tensors.items()})
