"""``galatea claims [RUN...]``: what became of the papers' claims, as docs/claims.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models.errors import UserError
from models.files import ROOT, atomic_write
from models.metrics.claims import measured, page, read_claims, read_results, results_text, update
from models.metrics.records import Record, records_below
from stages.arguments import Parser


def main(arguments: Sequence[str]) -> None:
    """Run the command with ``arguments``, the ones after ``galatea claims``.

    Raises:
        UserError: for a wrong option, a pipeline that decides nothing, or folders without metrics.
    """
    parser = Parser(
        prog="galatea claims",
        description="Measure the papers' claims by finished runs of pipelines, and write docs/claims.md anew.",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="a pipeline's folder, called as the pipeline; or PIPELINE=FOLDER, or PIPELINE:STYLE=FOLDER. Several of "
        "one pipeline and style are seeds, and pooled",
    )
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the folder of claims.md (default: docs)")
    options = parser.parse_args(list(arguments))
    folder = options.docs / "claims"
    claims = read_claims(folder / "claims.yaml")
    runs: dict[tuple[str, str], list[Record]] = {}
    for text in options.runs:
        key, path = _named(text)
        if key[0] not in claims.commands:
            raise UserError(f"{text}: no claim is decided by runs of {key[0]}, there are: {', '.join(claims.commands)}")
        runs.setdefault(key, []).extend(records_below(path))
    new = measured(claims, runs)
    results = update(read_results(folder / "results.csv"), new)
    with atomic_write(folder / "results.csv") as file:
        file.write_text(results_text(results, claims), encoding="utf-8")
    results = read_results(folder / "results.csv")  # of as many digits as are written: the page is theirs
    with atomic_write(options.docs / "claims.md") as file:
        file.write_text(page(claims, results), encoding="utf-8")
    print(f"{options.docs / 'claims.md'}: {len(new)} of {len(results)} numbers measured anew")


def _named(text: str) -> tuple[tuple[str, str], Path]:
    """Pipeline and style, and the folder."""
    name, _, folder = text.rpartition("=")
    path = Path(folder)
    pipeline, _, style = name.partition(":")
    return (pipeline or path.name, style), path
