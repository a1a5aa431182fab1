"""``galatea table DIR...``: joins metrics.csv files into one table."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from models.errors import UserError, printable
from models.files import atomic_write
from models.metrics.records import FILE, records_below
from models.metrics.table import COLUMNS, cells, markdown, summarise
from stages.arguments import Parser


def main(arguments: Sequence[str]) -> None:
    """Run the command with ``arguments``, the ones after ``galatea table``.

    Raises:
        UserError: for a wrong option, or folders without metrics.
    """
    parser = Parser(prog="galatea table", description="Join metrics.csv files: means, paired differences, intervals.")
    parser.add_argument("folders", nargs="+", type=Path, help=f"run folders; every {FILE} below them is read")
    parser.add_argument("--baseline", help="variant that the others are compared with, item by item")
    parser.add_argument("--metric", nargs="+", default=[], help="only these metrics")
    parser.add_argument("--item", nargs="+", default=[], metavar="PATTERN", help="only these items, like 'ukiyoe-*'")
    parser.add_argument("--split", nargs="+", default=[], help="only these splits")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table as Markdown")
    options = parser.parse_args(list(arguments))
    records = [record for folder in options.folders for record in records_below(folder)]
    kept = [
        record
        for record in records
        if (not options.metric or record.metric in options.metric)
        and (not options.split or record.split in options.split)
        and (not options.item or any(fnmatchcase(record.item, pattern) for pattern in options.item))
    ]
    if not kept:
        raise UserError(f"none of the {len(records)} values belongs to the chosen metrics, splits and items")
    rows = summarise(kept, options.baseline, options.seed)
    if options.markdown is not None:
        with atomic_write(options.markdown) as file:
            file.write_text(markdown(rows) + "\n", encoding="utf-8")
    _print([cells(row) for row in rows])


def _print(table: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    kept = [i for i in range(len(COLUMNS)) if any(line[i] for line in table)]
    shown = Table(*(COLUMNS[i] for i in kept), caption="* the interval of the difference excludes 0")
    for line in table:
        shown.add_row(*(Text(printable(line[i])) for i in kept))  # names in files are not markup
    console = Console()
    if not console.is_terminal:  # a pipe or a file has no width: never wrap there
        console = Console(width=240)
    console.print(shown)
