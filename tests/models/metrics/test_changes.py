"""Changes of attributes in their own deviations, and leakage, against loops."""

import math
import statistics

import pytest
import torch

from models.errors import UserError
from models.metrics.changes import agreement, change_records, deviation

MEASURES = [("net", "smile"), ("net", "age"), ("net", "hat"), ("other", "smile")]
BEFORE = torch.tensor([[1.0, 5.0, 2.0, 0.0], [3.0, math.nan, 2.0, 1.0], [8.0, 1.0, 2.0, 5.0]], dtype=torch.float64)
CHANGES = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
VARIANTS = [("smile", "smile"), ("smile optimised", "smile")]


def test_units_are_those_of_known_heads():
    wanted = [statistics.pstdev([1, 3, 8]), statistics.pstdev([5, 1]), 0, statistics.pstdev([0, 1, 5])]
    assert deviation(BEFORE).tolist() == pytest.approx(wanted)


def test_records(caplog):
    records = change_records(BEFORE, CHANGES, ["a", "b", "c"], VARIANTS, MEASURES, 7)
    assert "no two heads differ in hat: it is left out" in caplog.text
    found = {(r.item, r.variant, r.feature_network, r.metric): r.value for r in records}
    units = deviation(BEFORE)
    for i, item in enumerate("abc"):
        for k, (variant, _) in enumerate(VARIANTS):
            for a in (0, 1, 3):
                network, name = MEASURES[a]
                value = found.pop((item, variant, network, f"change/{name}"))
                assert value == pytest.approx(float(CHANGES[i, k, a] / units[a]))
    for k, (variant, _) in enumerate(VARIANTS):
        own, other = (abs(float((CHANGES[:, k, a] / units[a]).mean())) for a in (0, 1))
        assert found.pop(("", variant, "net", "leakage")) == pytest.approx(other / own)
    assert not found and {r.seed for r in records} == {7}  # the other network tells nothing but what is meant


def test_nothing_varies():
    with pytest.raises(UserError, match="no two of the test's 2 heads differ in smile: take more"):
        change_records(torch.ones(2, 1), torch.ones(2, 1, 1), ["a", "b"], VARIANTS[:1], MEASURES[:1], 0)


def test_agreement():
    """Cosines in deviations, of what differs between heads; what one does not know counts nothing."""
    before = torch.tensor([[0.0, 0.0, 5.0], [2.0, 20.0, 5.0]])
    changes = torch.tensor([[[1.0, 0.0, 3.0]], [[1.0, 10.0, 9.0]]])
    others = torch.tensor([[[2.0, 0.0, -3.0]], [[1.0, float("nan"), 9.0]]])
    torch.testing.assert_close(agreement(changes, others, before), torch.tensor([[1.0], [2**-0.5]]))
