"""All randomness: pure functions of a seed and of what is drawn for.

Nothing here depends on rank, worker, arrival order or on what was drawn before, so a resumed run, a run
on another number of workers and an uninterrupted run draw the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np

Key = int | str


def rng(seed: int, *keys: Key) -> np.random.Generator:
    """A generator that depends on ``seed`` and ``keys`` alone.

    Keys are hashed, so ``rng(0, 'mask', epoch, sample_id)`` and ``rng(0, 'crop', epoch, sample_id)``
    are independent streams.
    """
    text = "\x1f".join([str(int(seed)), *(f"{type(k).__name__}:{k}" for k in keys)])
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))


def integer(seed: int, *keys: Key) -> int:
    """A non-negative 31-bit integer for libraries that want an int seed (torch, scikit-learn)."""
    return int(rng(seed, *keys).integers(0, 2**31 - 1))


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The permutation of sample positions that epoch ``epoch`` visits, shape (num_samples,)."""
    return rng(seed, "order", epoch).permutation(num_samples)
