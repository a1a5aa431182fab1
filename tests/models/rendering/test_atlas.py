"""The flattened manifolds."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from models import artifact
from models.generators.fields import FrontalChart, HeadChart
from models.generators.manifold import ManifoldGenerator
from models.rendering.atlas import flatten, texel_centres
from tests.models.generators.test_manifold import TINY

SIZE = 48


def sphere(points):
    return points.norm(dim=-1) - 1


@pytest.fixture(scope="module")
def shipped():
    return artifact.load("assets/prior").module("generator")


def frontal():
    """Two sheets that face the front, curved as a sphere of radius 2 is."""
    options = {"levels": [2.1, 1.9], "predictor": {"hidden": 8, "grid": 64, "radius": 0.0, "centre": [0, 0, -2]}}
    torch.manual_seed(0)
    return ManifoldGenerator(**TINY | options, flattening="frontal")


def grid(atlas):
    """The coordinates (N, H, W, 3) of an atlas's own points."""
    count, height, width = atlas.valid.shape
    layer = (2 * torch.arange(count) + 1) / count - 1
    uv = texel_centres(height, width).expand(count, -1, -1, -1)
    return torch.cat([uv, layer[:, None, None, None].expand(-1, height, width, 1)], -1)


def test_texels_are_where_grid_sample_looks_for_them():
    image = torch.randn(1, 3, 5, 7)
    found = F.grid_sample(image, texel_centres(5, 7)[None], align_corners=False)
    assert_close(found, image)


class TestSphere:
    """|x| = 1 + level, where everything is known."""

    levels = torch.tensor([0.2, 0.0])

    def test_on_the_head_chart(self):
        chart = HeadChart(axis_z=0.0)
        atlas = flatten(sphere, self.levels, chart, SIZE, extent=1.5)
        _, y = chart._place(texel_centres(SIZE, SIZE))
        assert torch.equal(atlas.valid, torch.stack([y.abs() < 1.2, y.abs() < 1.0]))
        radii = atlas.points.norm(dim=-1)
        error = (radii - torch.tensor([[[1.2]], [[1.0]]]))[atlas.valid]
        assert error.abs().max() < 5e-3 and error.abs().mean() < 2e-4  # lines graze the poles

    def test_from_the_front(self):
        atlas = flatten(sphere, self.levels, FrontalChart((0.0, 0.1, 0.0), 0.5), SIZE, extent=1.5)
        x, y = (texel_centres(SIZE, SIZE) / 2).unbind(-1)
        y = 0.1 - y
        expected = torch.stack([(r**2 - x**2 - y**2).sqrt() for r in (1.2, 1.0)])
        assert atlas.valid.all()
        assert_close(
            atlas.points, torch.stack([x.expand(2, -1, -1), y.expand(2, -1, -1), expected], -1), atol=1e-4, rtol=0
        )


class TestGenerator:
    @pytest.mark.parametrize("make", ["shipped", "frontal"])
    def test_points_lie_where_they_are_looked_up(self, make, request):
        generator = frontal() if make == "frontal" else request.getfixturevalue(make)
        atlas = generator.atlas(SIZE)
        assert atlas.points.shape == (len(generator.levels), SIZE, SIZE, 3)
        assert atlas.valid.float().mean() > 0.7
        off = (generator.on_atlas(atlas.points) - grid(atlas))[atlas.valid].abs()
        assert off[:, :2].max() < 1e-4
        # A line may graze a surface: there the search's step is far from its tangent.
        spacing = 2 / len(generator.levels)
        assert off[:, 2].mean() < 0.01 * spacing and (off[:, 2] > 0.1 * spacing).float().mean() < 0.005

    def test_rays_meet_the_surfaces(self, shipped):
        """What a camera sees of a manifold is the manifold's atlas, up to its interpolation."""
        camera, size = shipped.rig.camera(0.3), 24
        hits, atlas = shipped.crossings(camera, size), shipped.atlas(128)
        points, valid = hits.points(camera, size)[0], hits.valid[0]  # (K, N, 3)
        coordinates = shipped.on_atlas(points)
        layer = torch.arange(len(shipped.levels))
        assert ((coordinates[..., 2] + 1) * len(layer) / 2 - 0.5 - layer)[valid].abs().quantile(0.95) < 0.1
        texture = torch.cat([atlas.points, atlas.valid[..., None]], -1).movedim(-1, 1)
        near = F.grid_sample(texture, coordinates[..., :2].transpose(0, 1)[:, None], align_corners=False)
        near = near[:, :, 0].permute(2, 0, 1)
        seen = valid & (near[..., 3] > 0.999)  # not beside a texel that has no point
        assert seen.sum() > 0.85 * valid.sum()
        distance = (near[..., :3] - points).norm(dim=-1)[seen]
        assert distance.median() < 0.002 and distance.quantile(0.95) < 0.03  # a head is 1.6 wide

    def test_is_kept_until_the_predictor_changes(self):
        generator = ManifoldGenerator(**TINY)
        first = generator.atlas(16)
        assert generator.atlas(16) is first and generator.atlas(8) is not first
        with torch.no_grad():
            generator.predictor.last.bias.sub_(0.05)
        assert not torch.equal(generator.atlas(16).points, first.points)
        assert not first.points.requires_grad and "layout" not in " ".join(generator.state_dict())

    def test_an_unknown_layout(self):
        with pytest.raises(ValueError, match="flattening must be one of"):
            ManifoldGenerator(**TINY, flattening="mercator")


def test_lines_of_the_head_chart_keep_their_coordinates():
    chart, uv = HeadChart(lean=0.34, top=1.45), 0.98 * texel_centres(9, 9)
    outer, inner = chart.segments(uv, 1.8)
    for amount in (0.0, 0.5, 0.9):
        assert_close(chart(torch.lerp(outer, inner, amount)), uv, atol=1e-4, rtol=0)
    assert math.isclose(float((outer - inner).norm(dim=-1).min()), math.sqrt(2) * 1.8, rel_tol=1e-5)
