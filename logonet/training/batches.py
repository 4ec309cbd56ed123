"""From NumPy batches to tensors on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

AHEAD = 2  # batches that a thread has on the GPU, or on their way there, before a step asks for them


def to_tensors(batches: Iterable[dict[str, np.ndarray]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """NumPy batches as tensors on ``device``. For CUDA a thread takes, pins and copies them, so that no step waits."""
    # Ray's arrays are read-only views of shared memory: copied here, because torch has no read-only tensors.
    tensors = ({k: torch.from_numpy(np.array(v)) for k, v in batch.items()} for batch in batches)
    if device.type != "cuda":
        yield from tensors
        return
    moved = ({k: v.pin_memory().to(device, non_blocking=True) for k, v in b.items()} for b in tensors)
    # A new thread would be on the first GPU, whichever its rank's is.
    thread = ThreadPoolExecutor(1, "batches", torch.cuda.set_device, (torch.cuda.current_device(),))
    try:
        ahead: deque[Any] = deque(thread.submit(next, moved, None) for _ in range(AHEAD))
        while (batch := ahead.popleft().result()) is not None:
            ahead.append(thread.submit(next, moved, None))
            yield batch
    finally:
        thread.shutdown(wait=False, cancel_futures=True)  # a batch that never comes must not hold up the end
