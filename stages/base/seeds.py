"""Draws that depend on a seed, an item and a step, and the states of all generators."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """States of the Python, NumPy and torch generators, as tensors and primitives only."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],  # type: ignore[union-attr]
        "python": [version, list(words), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def item_seed(seed: int, item: str, step: int) -> int:
    """A seed below 2^63 that depends on nothing but its arguments.

    torch's generators and NumPy take its lower 32 bits: of a hundred thousand, one or two have the draws of another.
    """
    digest = hashlib.sha256(f"{seed}:{step}:{item}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def item_generator(seed: int, item: str, step: int) -> torch.Generator:
    """A CPU generator for the draws of one item at one step, whatever rank or group the item is in."""
    return torch.Generator().manual_seed(item_seed(seed, item, step))


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """A CPU generator for the draws of one training step; the same on all ranks unless they name their own."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 1009 + rank)
