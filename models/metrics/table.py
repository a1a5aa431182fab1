"""Joins tidy metrics: means, paired differences and bootstrap intervals over subjects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from models.errors import UserError
from models.metrics.records import Record, finite


@dataclass(frozen=True)
class Estimate:
    """A mean over items with its 95 % percentile interval.

    Attributes:
        mean: over items.
        low, high: interval over resampled subjects; NaN for a single one.
        items, subjects: how many.
    """

    mean: float
    low: float
    high: float
    items: int
    subjects: int

    def __str__(self) -> str:
        interval = f" [{self.low:.4g}, {self.high:.4g}]" if self.subjects > 1 else ""
        return f"{self.mean:.4g}{interval}"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Row:
    """One metric of one variant.

    Attributes:
        protocol, version, split, metric, feature_network, variant: as in :class:`models.metrics.records.Record`.
        value: mean over items, each item's values (views, seeds) averaged first.
        difference: to the baseline variant, paired by item, over the items that both have; None for the baseline
            itself or without common items.
        dropped: values left out because they are not finite.
    """

    protocol: str
    version: str
    split: str
    metric: str
    feature_network: str
    variant: str
    value: Estimate
    difference: Estimate | None
    dropped: int


_Key = tuple[str, str, str, str, str]
_NOTHING = Estimate(float("nan"), float("nan"), float("nan"), 0, 0)


def bootstrap(
    values: Sequence[float], subjects: Sequence[str] | None = None, seed: int = 0, resamples: int = 2000
) -> Estimate:
    """Mean of ``values``, one per item, and the 2.5 % and 97.5 % quantiles of the resampled mean.

    Args:
        values: one per item.
        subjects: whose each item is. Items of one subject are not independent: they are drawn together (cluster
            bootstrap). Each item is a subject of its own by default.
        seed, resamples: of the drawing.

    Raises:
        ValueError: without values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no values to average")
    _, owner = np.unique(np.arange(array.size) if subjects is None else np.asarray(subjects), return_inverse=True)
    total, count = np.bincount(owner, array), np.bincount(owner)
    if total.size == 1:
        return Estimate(float(array.mean()), float("nan"), float("nan"), array.size, 1)
    draws = np.random.default_rng(seed).integers(0, total.size, (resamples, total.size))
    low, high = np.quantile(total[draws].sum(1) / count[draws].sum(1), [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high), array.size, total.size)


def summarise(records: Iterable[Record], baseline: str | None = None, seed: int = 0) -> list[Row]:
    """One row per protocol, version, split, metric, feature network and variant, sorted in that order.

    Args:
        records: from any number of files.
        baseline: variant that the others are compared with.
        seed: of the resampling.

    Raises:
        UserError: when no record belongs to ``baseline``.
    """
    records = list(records)
    if baseline is not None and not any(record.variant == baseline for record in records):
        known = ", ".join(sorted({record.variant for record in records})) or "none"
        raise UserError(f"there is no variant {baseline!r} to compare with; the files have: {known}")
    groups: dict[_Key, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    dropped: dict[tuple[_Key, str], int] = defaultdict(int)
    for record in records:
        key = (record.protocol, record.version, record.split, record.metric, record.feature_network)
        if finite([record]):
            groups[key][record.variant][record.item].append(record.value)
        else:
            groups[key][record.variant]  # a variant whose values are all dropped still has a row
            dropped[key, record.variant] += 1
    subjects = {record.item: record.subject or record.item for record in records}

    def estimate(items: dict[str, float]) -> Estimate:
        return bootstrap(list(items.values()), [subjects[item] for item in items], seed) if items else _NOTHING

    rows = []
    for key in sorted(groups):
        variants = {
            variant: {item: float(np.mean(values)) for item, values in items.items()}
            for variant, items in groups[key].items()
        }
        for variant in sorted(variants, key=lambda name: (name != baseline, name)):
            items = variants[variant]
            value = estimate(items)
            difference = None
            if baseline is not None and variant != baseline:
                other = variants.get(baseline, {})
                paired = {item: items[item] - other[item] for item in sorted(items.keys() & other.keys())}
                difference = estimate(paired) if paired else None
            rows.append(Row(*key, variant, value, difference, dropped[key, variant]))
    return rows


COLUMNS = ("protocol", "split", "metric", "measured with", "variant", "mean [95 %]", "difference [95 %]", "items")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text; an asterisk marks a difference whose interval excludes 0."""
    difference = "" if row.difference is None else f"{row.difference}{' *' if row.difference.excludes_zero else ''}"
    items = f"{row.value.items}"
    if row.value.subjects != row.value.items:
        items += f" of {row.value.subjects} subjects"
    if row.dropped:
        items += f" ({row.dropped} values not finite)"
    protocol = f"{row.protocol} v{row.version}"
    return (protocol, row.split, row.metric, row.feature_network, row.variant, str(row.value), difference, items)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; columns that are empty in every row are left out."""
    table = [cells(row) for row in rows]
    kept = [i for i in range(len(COLUMNS)) if any(line[i] for line in table)] or list(range(len(COLUMNS)))
    lines = [[COLUMNS[i] for i in kept], ["---" for _ in kept], *([line[i] for i in kept] for line in table)]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
