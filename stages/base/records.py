"""The one way from what a test measures to its table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, replace

from models.metrics.records import Record
from stages.base.ranks import gather


class Records:
    """What the running test has measured on this rank."""

    def __init__(self) -> None:
        self._found: list[Record] = []

    def add(self, records: Iterable[Record]) -> None:
        """Keep some more."""
        self._found += records

    def collect(self) -> list[Record]:
        """Those of all ranks, sorted, each once, and none is kept: to be called by all ranks.

        Ranks that are given too few items repeat some, and what is told by all items together each rank may tell.
        """
        first: dict[Record, Record] = {}
        for record in gather(self._found):
            first.setdefault(replace(record, value=0.0), record)
        self._found = []
        return [first[key] for key in sorted(first, key=lambda record: astuple(record))]


def averages(records: Iterable[Record]) -> dict[str, float]:
    """Means of the finite values by metric, or by variant/metric where there are several variants."""
    records = list(records)
    several = len({record.variant for record in records}) > 1
    values: dict[str, list[float]] = {}
    for record in records:
        if math.isfinite(record.value):
            name = f"{record.variant}/{record.metric}" if several else record.metric
            values.setdefault(name, []).append(record.value)
    return {name: sum(values[name]) / len(values[name]) for name in sorted(values)}
