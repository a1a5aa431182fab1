"""Averaged networks."""

import pytest
from torch import nn

from models.ema import EMA


def constant(value: float) -> nn.BatchNorm1d:
    network = nn.BatchNorm1d(1)
    nn.init.constant_(network.weight, value)
    network.running_mean.fill_(value)
    return network


def test_a_half_life_halves_the_distance_however_it_is_cut():
    first, target = constant(0.0), constant(1.0)
    once, often = EMA(first, half_life=100), EMA(first, half_life=100)
    once.update(target, 100, 10_000)
    for step in range(5):
        often.update(target, 20, 10_000 + 20 * step)
    for average in (once, often):
        assert float(average.module.weight) == pytest.approx(0.5, rel=1e-5)
        assert average.module.running_mean == 1  # buffers are copied
        assert not average.module.weight.requires_grad
    assert first.weight == 0


def test_the_memory_is_short_at_first():
    average = EMA(constant(0.0), half_life=1e6, ramp=0.05)
    average.update(constant(1.0), 10, seen=100)  # a half-life of 5 images
    assert float(average.module.weight) == pytest.approx(0.75)
