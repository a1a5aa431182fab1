"""How much edits change attributes of heads, and what changes beside the attribute that is meant."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from models.errors import UserError
from models.metrics.records import Record

log = logging.getLogger(__name__)

PROTOCOL, VERSION = "directions", "1"

Measure = tuple[str, str]
"""The network that tells an attribute, and the attribute."""


def deviation(values: Tensor) -> Tensor:
    """The standard deviation (A,) of attributes (N, A) among the heads for which they are known."""
    known = values.isfinite()
    centre = values.nan_to_num().sum(0) / known.sum(0)
    return (((values - centre).square()).nan_to_num().sum(0) / known.sum(0)).sqrt()


def varied(before: Tensor, measures: Sequence[Measure]) -> list[bool]:
    """Which attributes (N, A) are not the same for all heads: the others have no unit, and are warned of.

    Raises:
        UserError: when all are.
    """
    varies = _differs(before)
    if alike := [name for (_, name), differs in zip(measures, varies, strict=True) if not differs]:
        if not any(varies):
            raise UserError(f"no two of the test's {len(before)} heads differ in {', '.join(alike)}: take more")
        log.warning("warning: no two heads differ in %s: it is left out", ", ".join(alike))
    return varies


def _differs(before: Tensor) -> list[bool]:
    # Not by the deviation, which rounding may leave above 0; NaN of what no head could be scored for.
    return [b[known].unique().numel() > 1 for b, known in zip(before.T, before.isfinite().T, strict=True)]


def change_records(
    before: Tensor,
    changes: Tensor,
    items: Sequence[str],
    variants: Sequence[tuple[str, str]],
    measures: Sequence[Measure],
    seed: int,
) -> list[Record]:
    """For each head, edit and attribute the change in standard deviations of the attribute among the heads; and of each
    edit its leakage, the mean change of the others as a share of its own.

    Attributes in which no two heads differ have no such unit, and are left out.

    Args:
        before: (N, A) attributes of heads as they are; NaN where they cannot be told. changes: (N, K, A) by each edit.
        items: (N,) ids. variants: (K,) what an edit is called, and the attribute that is meant.
        measures: (A,). seed: of the run.

    Raises:
        UserError: when no attribute varies.
    """
    varies = varied(before, measures)
    measures = [measure for measure, differs in zip(measures, varies, strict=True) if differs]
    changes = (changes / deviation(before))[..., varies]
    records = []

    def record(item: str, variant: str, network: str, metric: str, value: float) -> None:
        records.append(Record(PROTOCOL, VERSION, "test", item, "", seed, variant, network, metric, value))

    for row, item in enumerate(items):
        for k, (variant, _) in enumerate(variants):
            for a, (network, name) in enumerate(measures):
                record(item, variant, network, f"change/{name}", float(changes[row, k, a]))
    for k, (variant, meant) in enumerate(variants):
        for network in dict.fromkeys(network for network, _ in measures):
            own = [a for a, measure in enumerate(measures) if measure == (network, meant)]
            others = [a for a, (n, name) in enumerate(measures) if n == network and name != meant]
            if own and others:
                mean = changes[:, k].nanmean(0).abs()
                if float(mean[own[0]]) > 0:  # an edit by which nothing changes has no share of it
                    record("", variant, network, "leakage", float(mean[others].nanmean() / mean[own[0]]))
    return records


def agreement(changes: Tensor, others: Tensor, before: Tensor) -> Tensor:
    """How alike two generators change heads by equal edits: cosines of changes of all attributes, in deviations.

    Args:
        changes, others: (N, K, A) of N heads by each edit. before: (N, A) attributes of heads as the first shows them.

    Returns:
        (N, K) in [-1, 1]; 0 where one of both changes nothing.
    """
    varies = _differs(before)
    one, other = ((t / deviation(before))[..., varies].nan_to_num() for t in (changes, others))
    return F.cosine_similarity(one, other, -1)
