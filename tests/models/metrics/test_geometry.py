"""Depth and normal errors against float64 loops."""

import math

import pytest
import torch
from kornia.morphology import erosion

from models.metrics.geometry import depth_mae, depth_rmse, depth_scale_invariant, eroded, normal_error


@pytest.fixture
def scene():
    g = torch.Generator().manual_seed(0)
    depth, truth = torch.rand(2, 2, 1, 6, 6, generator=g) + 5
    mask = (torch.rand(2, 1, 6, 6, generator=g) > 0.4).float()
    return depth, truth, mask


def inside(value: torch.Tensor, mask: torch.Tensor) -> list[float]:
    return [float(v) for v in value[mask > 0].double()]


def test_depth_errors(scene):
    depth, truth, mask = scene
    for i in range(2):
        a, b = inside(depth[i], mask[i]), inside(truth[i], mask[i])
        n = len(a)
        assert float(depth_mae(depth, truth, mask)[i]) == pytest.approx(
            sum(abs(x - y) for x, y in zip(a, b, strict=True)) / n, rel=1e-4
        )
        assert float(depth_rmse(depth, truth, mask)[i]) == pytest.approx(
            math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / n), rel=1e-4
        )
        residual = [math.log(x) - math.log(y) for x, y in zip(a, b, strict=True)]
        mean = sum(residual) / n
        wanted = math.sqrt(sum((r - mean) ** 2 for r in residual) / n)
        assert float(depth_scale_invariant(depth, truth, mask)[i]) == pytest.approx(wanted, rel=1e-3)


def test_scale_invariance_and_zero_background(scene):
    depth, _, mask = scene
    assert float(depth_scale_invariant(3 * depth * mask, depth * mask, mask).max()) < 1e-3


def test_normal_error_in_degrees():
    up, tilted = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, math.sin(0.3), math.cos(0.3)])
    a, b = (v.view(1, 3, 1, 1).expand(1, 3, 2, 2) for v in (up, 5 * tilted))
    mask = torch.ones(1, 1, 2, 2)
    assert float(normal_error(a, b, mask)) == pytest.approx(math.degrees(0.3), rel=1e-5)
    assert float(normal_error(a, a, mask)) < 1e-6
    assert float(normal_error(a, -a, mask)) == pytest.approx(180)


def test_erosion_against_kornia():
    mask = (torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) > 0.2).float()
    wanted = erosion(torch.nn.functional.pad(mask, (1,) * 4), torch.ones(3, 3))[..., 1:-1, 1:-1]
    torch.testing.assert_close(eroded(mask), wanted)
