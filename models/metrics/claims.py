"""The papers' claims: what decides each, what was measured of it, and what follows, as one page."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from models.documents import MOST_BYTES, parse_yaml
from models.errors import UserError, shown
from models.files import read_bytes
from models.metrics.records import Record, finite
from models.metrics.table import bootstrap

SIGNS = ("+", "-", "not +", "not -")
Runs = Mapping[tuple[str, str], Sequence[Record]]
"""Records by pipeline, and by what tells apart runs of one: a style, or "" where there is one alone."""


@dataclass(frozen=True)
class Comparison:
    """A number that speaks for a claim, or against it.

    Attributes:
        what: it is, in words; one of its claim's alone.
        sign: what the claim says of the number less ``against``: "+", "-", or what it must not be: "not +", "not -".
        pipelines: whose runs it is told by; none where it is carried from a page.
        metric, variant, baseline: the mean of a variant's metric, or its difference to that of another, paired by item.
        protocol, view, item: patterns of the records that count.
        against: what the number is compared with.
        of: only these runs, by style; all by default. baseline_of: the baseline is of this run instead of the same.
        decides: whether the verdict hangs on it; what is ours, or only goes along, is told beside.
    """

    what: str
    sign: str
    pipelines: tuple[str, ...] = ()
    metric: str = ""
    variant: str = ""
    baseline: str | None = None
    protocol: str = "*"
    view: str = "*"
    item: str = "*"
    against: float = 0.0
    of: tuple[str, ...] | None = None
    baseline_of: str | None = None
    decides: bool = True

    def __post_init__(self) -> None:
        if self.sign not in SIGNS:
            raise UserError(f"claims: {self.what}: sign is {shown(self.sign)}, it must be one of {', '.join(SIGNS)}")
        if self.pipelines and not (self.metric and self.variant):
            raise UserError(f"claims: {self.what}: runs of a pipeline are compared by a metric and a variant")


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper's that can be false.

    Attributes:
        number: "3.12", the paper's card first. words: it, in ours. paper: the paper's figure.
        comparisons: what decides it.
    """

    number: str
    words: str
    paper: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Claims:
    """All claims, and what makes their numbers.

    Attributes:
        papers: names, by the number of the card. commands: that make a pipeline's runs, by its name.
    """

    papers: dict[str, str]
    commands: dict[str, str]
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class Result:
    """A number that was measured.

    Attributes:
        claim, what: whose it is. of: the style, or "".
        value, low, high: mean and 95 % interval; NaN without one.
        seeds: of the fits, separated by spaces. heads: that the interval is over; 0 where it is over the seeds, or
            there is none.
        source: "runs", or the page of docs/ that it is carried from.
    """

    claim: str
    what: str
    of: str
    value: float
    low: float
    high: float
    seeds: str
    heads: int
    source: str


_COLUMNS = [field.name for field in fields(Result)]


def read_claims(path: Path) -> Claims:
    """Read ``docs/claims/claims.yaml``.

    Raises:
        UserError: when it cannot be read, says something unknown, or says a thing twice.
    """
    document = parse_yaml(read_bytes(path, MOST_BYTES), str(path))
    try:
        claims = tuple(
            Claim(number, given["words"], given["paper"], tuple(_comparison(one) for one in given["by"]))
            for number, given in document["claims"].items()
        )
        found = Claims(document["papers"], document["commands"], claims)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a list of claims: {error}") from None
    for claim in found.claims:
        names = [comparison.what for comparison in claim.comparisons]
        if len(set(names)) < len(names):
            raise UserError(f"{path}: claim {claim.number} is compared twice by the same words")
        for comparison in claim.comparisons:
            if unknown := [name for name in comparison.pipelines if name not in found.commands]:
                raise UserError(f"{path}: claim {claim.number}: no command makes runs of {unknown[0]}")
    return found


def _comparison(given: Mapping[str, Any]) -> Comparison:
    lists = {name: tuple(given[name]) for name in ("pipelines", "of") if given.get(name) is not None}
    return Comparison(**{**given, **lists})


def read_results(path: Path) -> list[Result]:
    """Read what :func:`results_text` wrote.

    Raises:
        UserError: when it cannot be read, or a line is not a result.
    """
    text = read_bytes(path, MOST_BYTES).decode("utf-8")
    results = []
    for number, row in enumerate(csv.DictReader(StringIO(text)), 2):
        try:
            numbers = {name: float(row[name] or "nan") for name in ("value", "low", "high")}
            results.append(Result(**{**row, **numbers, "heads": int(row["heads"] or 0)}))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}, line {number}: not a result of a claim") from None
    return results


def results_text(results: Iterable[Result], claims: Claims) -> str:
    """As CSV, in the order of the claims.

    Raises:
        UserError: for a result that no claim asks for.
    """
    results = list(results)
    order = {(claim.number, one.what): i for i, (claim, one) in enumerate(_all(claims))}
    if strange := [result for result in results if (result.claim, result.what) not in order]:
        raise UserError(
            f"claim {strange[0].claim} does not ask for {shown(strange[0].what)}: rename or drop that result"
        )
    out = StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in sorted(results, key=lambda one: (order[one.claim, one.what], one.of)):
        numbers = {name: _digits(getattr(result, name)) for name in ("value", "low", "high")}
        writer.writerow({**asdict(result), **numbers, "heads": result.heads or ""})
    return out.getvalue()


def _digits(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _all(claims: Claims) -> Iterable[tuple[Claim, Comparison]]:
    return ((claim, comparison) for claim in claims.claims for comparison in claim.comparisons)


def measured(claims: Claims, runs: Runs) -> list[Result]:
    """What runs tell of the claims; nothing where they do not hold what is compared."""
    styles = sorted({of for _, of in runs})
    results = []
    for claim, comparison in _all(claims):
        for of in styles:
            if comparison.of is None or of in comparison.of:
                results += _compare(claim.number, comparison, runs, of)
    return results


def update(results: Iterable[Result], new: Iterable[Result]) -> list[Result]:
    """``results``, of which those that were measured anew are replaced."""
    found = {(result.claim, result.what, result.of): result for result in (*results, *new)}
    return list(found.values())


def _compare(number: str, comparison: Comparison, runs: Runs, of: str) -> list[Result]:
    own = _chosen(comparison, runs, comparison.variant, of)
    other = None
    if comparison.baseline is not None:
        other = _chosen(comparison, runs, comparison.baseline, comparison.baseline_of or of)
    if not own or other == [] or (comparison.baseline_of is not None and comparison.baseline_of == of):
        return []
    if other is not None and (common := {r.seed for r in own} & {r.seed for r in other}):
        own, other = ([r for r in records if r.seed in common] for records in (own, other))
    protocols = {(record.protocol, record.version) for record in (*own, *(other or ()))}
    if len(protocols) > 1:
        raise UserError(f"claim {number}: {comparison.what}: measured by several protocols, {sorted(protocols)}")
    alone = len({record.item for record in (*own, *(other or ()))}) == 1  # one number a run: seeds are what varies
    values, subjects = _means(own, alone)
    if other is not None:
        beside, _ = _means(other, alone)
        values = {unit: values[unit] - beside[unit] for unit in values if unit in beside}
    if not values:
        return []
    units = sorted(values)
    found = bootstrap([values[unit] for unit in units], [subjects[unit] for unit in units])
    seeds = " ".join(str(seed) for seed in sorted({record.seed for record in own}))
    heads = 0 if alone else found.subjects
    return [Result(number, comparison.what, of, found.mean, found.low, found.high, seeds, heads, "runs")]


def _chosen(comparison: Comparison, runs: Runs, variant: str, of: str) -> list[Record]:
    return [
        record
        for pipeline in comparison.pipelines
        for record in finite(runs.get((pipeline, of), ()))
        if record.variant == variant
        and fnmatchcase(record.metric, comparison.metric)
        and fnmatchcase(record.protocol, comparison.protocol)
        and fnmatchcase(record.view, comparison.view)
        and fnmatchcase(record.item, comparison.item)
    ]


def _means(records: Sequence[Record], by_seed: bool) -> tuple[dict[str, float], dict[str, str]]:
    """By item, or by seed; and whose each is."""
    values: dict[str, list[float]] = {}
    subjects = {}
    for record in records:
        unit = f"seed {record.seed}" if by_seed else record.item
        values.setdefault(unit, []).append(record.value)
        subjects[unit] = unit if by_seed else record.subject or record.item
    return {unit: float(np.mean(each)) for unit, each in values.items()}, subjects


# -- what follows -------------------------------------------------------------------------------------------------


def agrees(comparison: Comparison, result: Result) -> bool:
    """Whether the interval, or the number alone where there is none, lies where the claim says."""
    value, low, high = (number - comparison.against for number in (result.value, result.low, result.high))
    if math.isnan(low):
        low = high = value
    return {"+": low > 0, "-": high < 0, "not +": low <= 0, "not -": high >= 0}[comparison.sign]


def verdict(claim: Claim, results: Sequence[Result]) -> str:
    """``reproduced``, ``half`` (most of so many, or as many), ``not reproduced`` or ``not measured yet``."""
    deciding = [comparison for comparison in claim.comparisons if comparison.decides]
    found = [(one, result) for one in deciding for result in results_of(claim, one, results)]
    decided = [(agrees(one, result), math.isnan(result.low)) for one, result in found]
    if not decided:
        return "not measured yet"
    right = sum(agreed for agreed, _ in decided)
    told = "reproduced" if right == len(decided) else "half" if 2 * right >= len(decided) else "not reproduced"
    if 0 < right < len(decided):
        told += f": {right} of {len(decided)}"
    told += ", by sign alone" if all(bare for _, bare in decided) else ""
    return told + ("" if all(results_of(claim, one, results) for one in deciding) else ", in part")


def results_of(claim: Claim, comparison: Comparison, results: Iterable[Result]) -> list[Result]:
    """Of one comparison: a number a style."""
    return [result for result in results if (result.claim, result.what) == (claim.number, comparison.what)]


_INTRODUCTION = """\
# The papers' claims

Made by `make claims` from [claims.yaml](claims/claims.yaml), which says what decides each claim, and
[results.csv](claims/results.csv), what was measured; not by hand. `make claims RUNS="..."` measures anew from
finished runs.

Numbers are means over held-out heads of the embedded world with 95 % bootstrap intervals over heads; where a metric
is one number a run, over seeds. Beside each comparison, (+) or (-) is the sign that the claim tells, (not +) or (not
-) what must not be. A claim is *reproduced* when all intervals that decide it lie on the claim's side of 0, or of the
number that is named, and *half* when most do, or half of them. Where there is no interval the sign decides, and the
verdict says so; it is *in part* where not all that decides is measured yet. What is set in *italics* decides nothing:
ours, or told beside. Fewer than 20 heads or three seeds are a first look, no more.
"""


def page(claims: Claims, results: Sequence[Result]) -> str:
    """``docs/claims.md``."""
    verdicts = {claim.number: verdict(claim, results) for claim in claims.claims}
    lines = [*_INTRODUCTION.splitlines(), "", "| | reproduced | half | not reproduced | not measured yet |"]
    lines.append("|---|---|---|---|---|")
    for card, name in claims.papers.items():
        told = [text for number, text in verdicts.items() if number.split(".")[0] == card]
        kinds = ("reproduced", "half", "not reproduced", "not measured yet")
        counts = [sum(text.split(",")[0].split(":")[0] == kind for text in told) for kind in kinds]
        lines.append(f"| {card}. {name} | " + " | ".join(str(count) for count in counts) + " |")
    for card, name in claims.papers.items():
        lines += ["", f"## {card}. {name}", "", "| | claim | the paper | measured here | verdict | by |"]
        lines.append("|---|---|---|---|---|---|")
        for claim in claims.claims:
            if claim.number.split(".")[0] == card:
                lines.append(_row(claim, results, verdicts[claim.number]))
    lines += ["", "## Commands", "", "| runs of | are made by |", "|---|---|"]
    lines += [f"| {_link(name)} | `{command}` |" for name, command in claims.commands.items()]
    return "\n".join(lines) + "\n"


def _row(claim: Claim, results: Sequence[Result], told: str) -> str:
    measured, sources = [], {}
    for comparison in claim.comparisons:
        own = results_of(claim, comparison, results)
        wanted = f"({comparison.sign}{f' {comparison.against:g}' if comparison.against else ''})"
        text = f"{comparison.what} {wanted}: {'; '.join(_number(result) for result in own) or 'not yet'}"
        measured.append(text if comparison.decides else f"*{text}*")
        sources |= {_link(pipeline): None for pipeline in comparison.pipelines}
        sources |= {f"carried from [{r.source}](../{r.source})": None for r in own if r.source != "runs"}
    cells = (claim.number, claim.words, claim.paper, "<br>".join(measured), told, "<br>".join(sources))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _number(result: Result) -> str:
    interval = "" if math.isnan(result.low) else f" [{result.low:.3g}, {result.high:.3g}]"
    seeds = result.seeds.split()
    about = [f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"] if seeds else []
    about += [f"{result.heads} heads"] if result.heads else []
    name = f"{result.of} " if result.of else ""
    return f"{name}{result.value:.3g}{interval}" + (f" ({'; '.join(about)})" if about else "")


def _link(pipeline: str) -> str:
    return f"[{pipeline}](../configs/pipelines/{pipeline}.yaml)"
