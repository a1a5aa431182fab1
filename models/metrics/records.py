"""Tidy metrics: one measured value a line, as ``metrics.csv``."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from models.errors import UserError
from models.files import atomic_write, os_errors

FILE = "metrics.csv"


@dataclass(frozen=True)
class Record:
    """One value.

    Attributes:
        protocol: what was done, for example "artform-multiview".
        version: of the protocol; values of different versions are never averaged together.
        split: of the data.
        item: the subject or artwork; differences are paired by item.
        view: camera or frame, "" when the value is not of one view.
        seed: of the run.
        variant: the method or ablation.
        feature_network: the network the metric is measured with, "" for none.
        metric: name, for example "lpips".
        value: may be NaN.
        subject: whose head it is: intervals are drawn over subjects. "" when each item is one of its own.
    """

    protocol: str
    version: str
    split: str
    item: str
    view: str
    seed: int
    variant: str
    feature_network: str
    metric: str
    value: float
    subject: str = ""


COLUMNS = tuple(field.name for field in fields(Record))
REQUIRED = tuple(field.name for field in fields(Record) if field.default is MISSING)


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> Path:
    """Write ``records`` to ``path`` (or ``path/metrics.csv`` for a folder), atomically; values keep all their digits.

    Raises:
        UserError: when the file cannot be written.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerow({**asdict(record), "value": repr(float(record.value))})
    return path


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read a file written by :func:`write_records` (or ``path/metrics.csv``).

    Raises:
        UserError: when it is missing, lacks a column, or a line holds no number where one belongs.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    records = []
    with os_errors(path, "read"), open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in REQUIRED if name not in (reader.fieldnames or ())]:
            raise UserError(f"{path} is not a metrics file: it has no column {', '.join(missing)}")
        for row in reader:
            try:
                record = Record(
                    **{name: row[name] for name in COLUMNS if name in row and name not in ("seed", "value")},
                    seed=int(row["seed"]),
                    value=float(row["value"]),
                )
            except (TypeError, ValueError):
                raise UserError(f"{path}, line {reader.line_num}: not a complete record") from None
            records.append(record)
    return records


def holds_records(path: str | os.PathLike[str]) -> bool:
    """Whether the file's first line names the columns of a record.

    Raises:
        UserError: when it cannot be read.
    """
    with os_errors(path, "read"), open(path, newline="", encoding="utf-8") as file:
        return set(REQUIRED) <= set(next(csv.reader(file), ()))


def records_below(path: Path) -> list[Record]:
    """Those of all tests below a folder, or of one file; a training's log may have the same file name.

    Raises:
        UserError: when there are none.
    """
    files = [path] if path.is_file() else [file for file in sorted(path.rglob(FILE)) if holds_records(file)]
    if not files:
        raise UserError(f"there is no {FILE} of a test in {path}")
    return [record for file in files for record in read_records(file)]


def finite(records: Iterable[Record]) -> list[Record]:
    """The records whose value is a finite number."""
    return [record for record in records if math.isfinite(record.value)]
