"""Seeds of numbered items. torch's generators take the lower 32 bits of a seed, so that these are all there is."""

from __future__ import annotations

import functools
import hashlib

import torch

SEEDS = 1 << 32  # that a generator can tell apart


@functools.cache
def _start(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}:{seed}".encode()).digest()[:4], "little")


def index_seed(seed: int, index: int, purpose: str) -> int:
    """32 bits for one draw of the ``index``-th item: of one purpose, no two of ``SEEDS`` items have the same.

    Sets that are to have no item in common take ranges of numbers that do not overlap. Each purpose counts on from a
    place of its own, which depends on it and ``seed``.
    """
    return (_start(seed, purpose) + index) % SEEDS


def index_generator(seed: int, index: int, purpose: str = "z") -> torch.Generator:
    """A CPU generator seeded with :func:`index_seed`."""
    return torch.Generator().manual_seed(index_seed(seed, index, purpose))
