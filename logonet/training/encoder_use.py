"""Whether a pretext needs the encoder: its score on one batch, and again with the encoder's features at zero.

A decoder with skips from the image can solve a pretext alone. The loss then falls and the encoder, which is all that
transfers, learns little. A score that stays where it was without the encoder says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

ENOUGH = 0.98  # share of its score that a pretext keeps without an encoder that it does not need
# What is at zero, by the ending of a key of the history.
BLANKED = {"": slice(0, 0), "_without_deepest": slice(-1, None), "_without_encoder": slice(None)}


@torch.no_grad()
def measure(
    method: Any,
    score: str,
    batch: Mapping[str, Tensor],
    progress: float,
    autocast: contextlib.AbstractContextManager[Any],
) -> dict[str, float]:
    """``batch_<score>`` of a batch, and the same without the deepest features and without any.

    Norms take the batch's statistics, as in training. Afterwards buffers and random state are as before.

    Args:
        method: the module that is trained, not wrapped.
        score: one of its metrics, such as "accuracy".

    Returns:
        {} where the method does not call its network's ``encode``.
    """
    before = [buffer.clone() for buffer in method.buffers()]
    device = next(method.parameters()).device
    values: dict[str, float] = {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for ending, levels in BLANKED.items():
            torch.manual_seed(0)  # the same dropout each time
            with blanked(method.backbone, levels) as calls, autocast:
                total, count = method(batch, progress)[1][score].tolist()
            if calls:
                values[f"batch_{score}{ending}"] = total / count
    for buffer, value in zip(method.buffers(), before):
        buffer.copy_(value)
    return values


@contextlib.contextmanager
def blanked(network: Any, levels: slice) -> Iterator[list[int]]:
    """Within the block ``network.encode`` gives zeros at some levels; yields a list that grows with each call."""
    encode, own = network.encode, vars(network).get("encode")
    calls: list[int] = []

    def with_zeros(x_BCXYZ: Tensor) -> list[Tensor]:
        feats = list(encode(x_BCXYZ))
        calls.append(len(feats))
        feats[levels] = [torch.zeros_like(feat) for feat in feats[levels]]
        return feats

    network.encode = with_zeros
    try:
        yield calls
    finally:
        if own is None:
            del network.encode
        else:
            network.encode = own


def warning(entry: Mapping[str, Any]) -> str | None:
    """One sentence with advice where an epoch's ``entry`` of the history says that the encoder is not needed.

    None while the method is no better than always answering the most frequent label: it needs nothing yet.
    """
    keys = [f"batch_accuracy{ending}" for ending in BLANKED]
    if not entry.keys() >= set(keys):
        return None
    whole, *without = (entry[key] for key in keys)
    if whole <= entry.get("accuracy_floor", 0.0) or min(without) < ENOUGH * whole:
        return None
    return (
        f"the pretext does not need the encoder: its accuracy on one batch is {whole:.3f}, and {without[1]:.3f} with "
        "the encoder's features at zero, so little will transfer; if this lasts, set method.head=pooled"
    )
