"""How a part of the rehearsal is made: cases that fail alone, and none that begins without the time for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from models.errors import one_line

Row = dict[str, Any]
"""What one case has found: its name as ``case``, figures, and ``skipped`` or ``failed`` with the reason."""


@dataclass(frozen=True)
class Setting:
    """What every part is told.

    Attributes:
        device: where it runs.
        small: whether at toy sizes.
        folder: of its own, empty, gone afterwards.
        end: when it should be done, ``time.monotonic``.
    """

    device: torch.device
    small: bool
    folder: Path
    end: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


class Case(NamedTuple):
    """One measurement."""

    name: str
    measure: Callable[[], Row]
    needs: float = 1.0
    """Seconds that it takes on a GPU, about."""


Part = Callable[[Setting], Iterator[Case]]


def rows(part: Part, setting: Setting) -> Iterator[Row]:
    """What the cases of a part find, each as soon as it is known."""
    for name, measure, needs in part(setting):
        needs = 0.1 if setting.small else needs
        if setting.left < needs:
            yield {"case": name, "skipped": f"it takes about {needs:.0f} s, and {max(setting.left, 0):.0f} s were left"}
            continue
        try:
            yield {"case": name, **measure()}
        except Exception as error:
            yield {"case": name, "failed": f"{type(error).__name__}: {one_line(error)[:300]}"}


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    """Begin to look for the peak of memory anew, with nothing in the cache."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_mib(device: torch.device) -> float | None:
    """Most that tensors have held at a time since :func:`forget_peak`; None on a CPU, which does not count."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
