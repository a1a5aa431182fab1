"""The head chart."""

import math

import pytest
import torch
from torch.testing import assert_close

from models.generators.fields import HeadChart


def surface(count: int = 2000) -> torch.Tensor:
    """Points of a head-sized shell, away from the axis."""
    draws = torch.Generator().manual_seed(0)
    azimuth = (torch.rand(count, generator=draws) * 2 - 1) * math.radians(140)
    radius = 0.4 + 0.5 * torch.rand(count, generator=draws)
    y = torch.rand(count, generator=draws) * 2.6 - 1.3
    return torch.stack([radius * azimuth.sin(), y, radius * azimuth.cos() - 0.1], -1).double()


@pytest.mark.parametrize("lean", [0.0, 0.34])
def test_zero_shift_moves_nothing_and_a_shift_arrives_where_it_points(lean):
    chart = HeadChart(lean=lean, top=1.45).double()
    points = surface()
    inside = (chart(points).abs() < 0.9).all(-1)
    points = points[inside]
    assert len(points) > 1000
    assert_close(chart.displace(points, torch.zeros_like(points[:, :2])), points, atol=1e-6, rtol=0)
    shift = torch.tensor([0.04, -0.03]).double().expand(len(points), 2)
    assert_close(chart(chart.displace(points, shift)), chart(points) + shift, atol=1e-6, rtol=0)


def test_a_leaning_axis_passes_through_a_bun_and_leaves_the_face_alone():
    upright, leaning = HeadChart(), HeadChart(lean=0.34)
    face = torch.tensor([[0.2, 0.1, 0.6], [-0.3, -0.5, 0.4]])
    assert_close(upright(face), leaning(face))
    left, right = torch.tensor([[-0.25, 1.2, -0.25], [0.25, 1.2, -0.25]])
    assert not torch.allclose(leaning(left), leaning(right))
    assert leaning(right)[0].abs() < 1  # within the chart, not clamped to its end
