"""Depth and normal errors against float64 loops."""

import math

import pytest
import torch
from kornia.morphology import erosion

from models.metrics.geometry import depth_mae, depth_rmse, depth_scale_invariant, eroded, normal_error, relief_errors
from models.rendering.relief import Relief


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


class TestReliefErrors:
    """SIDE and MAD in a protocol that others' numbers are told in."""

    def maps(self, size=9):
        g = torch.Generator().manual_seed(2)
        depth, truth = 0.97 + 0.06 * torch.rand(2, 2, 1, size, size, generator=g)
        mask, other = torch.ones(2, 2, 1, size, size)
        mask[0, :, :2], other[1, :, :, 6:], other[0, 0, 5, 4] = 0, 0, 0
        return depth, mask, truth, other

    def test_against_loops(self):
        depth, mask, truth, other = self.maps()
        found = relief_errors(Relief(), depth, mask, truth, other)
        reach = math.tan(math.radians(5))

        def normal(z, y, x):
            def point(i, j):
                return [(j / 4 - 1) * reach * z[i][j], (i / 4 - 1) * reach * z[i][j], z[i][j]]

            u = [b - a for a, b in zip(point(y, x - 1), point(y, x + 1), strict=True)]
            v = [b - a for a, b in zip(point(y - 1, x), point(y + 1, x), strict=True)]
            n = [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]]
            return [c / math.sqrt(sum(c * c for c in n)) for c in n]

        for i in range(2):
            z, t, m, o = (each[i, 0].double().tolist() for each in (depth, truth, mask, other))
            around = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
            kept = [
                (y, x)
                for y in range(1, 8)
                for x in range(1, 8)
                if all(m[y + a][x + b] and o[y + a][x + b] for a, b in around)
            ]
            assert 10 < len(kept) < 49
            residual = [math.log(z[y][x]) - math.log(t[y][x]) for y, x in kept]
            mean = sum(residual) / len(kept)
            side = math.sqrt(sum((r - mean) ** 2 for r in residual) / len(kept))
            cosines = [sum(a * b for a, b in zip(normal(z, y, x), normal(t, y, x), strict=True)) for y, x in kept]
            mad = sum(math.degrees(math.acos(min(max(c, -1), 1))) for c in cosines) / len(kept)
            assert float(found["side"][i]) == pytest.approx(side, rel=1e-4)
            assert float(found["mad"][i]) == pytest.approx(mad, rel=1e-4)

    def test_what_they_do_not_see(self):
        """A scale changes neither, but a step does: of half of the pixels by e^0.02, SIDE is 0.01."""
        depth, mask, truth, other = self.maps()
        found = relief_errors(Relief(), 3 * depth, mask, depth, mask)
        assert found["side"].max() < 1e-5 and found["mad"].max() < 0.01
        before = relief_errors(Relief(), depth, mask, truth, other)
        after = relief_errors(Relief(), 0.5 * depth, mask, truth, other)
        for name in ("side", "mad"):
            torch.testing.assert_close(before[name], after[name], rtol=1e-3, atol=1e-5)
        flat = torch.ones(1, 1, 12, 12)
        step = flat.clone()
        step[..., 6:] *= math.exp(0.02)
        everywhere = torch.ones_like(flat)
        assert float(relief_errors(Relief(), step, everywhere, flat, everywhere)["side"]) == pytest.approx(0.01)

    def test_an_angle_by_hand(self):
        """The plane z = 1 + x / 2 against a wall: atan(1 / 2)."""
        relief = Relief()
        wall = torch.ones(1, 1, 9, 9)
        plane = 1 / (1 - relief.points(wall)[:, :1] / 2)
        mad = relief_errors(relief, plane, wall, wall, wall)["mad"]
        assert float(mad) == pytest.approx(math.degrees(math.atan(0.5)), abs=1e-2)

    def test_refusals_and_nothing_in_common(self):
        depth, mask, truth, other = self.maps()
        with pytest.raises(ValueError, match="depth maps and masks differ in shape"):
            relief_errors(Relief(), depth, mask[..., 1:], truth, other)
        assert relief_errors(Relief(), depth, mask, truth, 0 * other)["side"].isnan().all()
