"""Surfaces fitted to views of a ball, and colours carried between them."""

import math
from itertools import pairwise

import pytest
import torch

from models.metrics.consistency import (
    NeuralSurface,
    SurfaceRecipe,
    carried,
    fit_surface,
    look_up,
    stacked_line,
    surface_consistency,
)
from models.metrics.image import psnr
from tests.models.metrics.ball import RADIUS, RIG, look

RECIPE = SurfaceRecipe(cells=24, levels=2, features=4, hidden=16, steps=120, rays=256, coarse=16, fine=8)
YAWS = torch.linspace(-0.5, 0.5, 7)


@pytest.fixture(scope="module")
def views():
    return look(RIG.camera(YAWS, 0.2 * (2 * YAWS).sin()), 20)


@pytest.fixture(scope="module")
def consistent(views):
    return surface_consistency(views.image, views.mask, views.camera, RECIPE)


def test_a_surface_finds_the_ball(views, consistent):
    fit = consistent.fit
    both = (views.mask > 0.5) & (fit.alpha > 0.5)
    assert float(both.sum() / ((views.mask > 0.5) | (fit.alpha > 0.5)).sum()) > 0.9
    assert float((fit.depth - views.depth).abs()[both].mean()) < 0.08 * RADIUS
    assert consistent.psnr > 22 and consistent.ssim > 0.85


def test_inconsistent_views_fit_worse(views, consistent):
    stuck = views.image[3:4].expand_as(views.image)  # one picture, from wherever it is looked at
    mask = views.mask[3:4].expand_as(views.mask)
    g = torch.Generator().manual_seed(0)
    flicker = views.image + 0.3 * torch.randn(7, 3, 5, 5, generator=g).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert surface_consistency(stuck, mask, views.camera, RECIPE).psnr < consistent.psnr - 2
    assert surface_consistency(flicker, views.mask, views.camera, RECIPE).psnr < consistent.psnr - 4


def test_fits_are_seeded_and_leave_the_global_generator_alone(views):
    short = SurfaceRecipe(cells=8, levels=1, steps=3, rays=16, coarse=4, fine=2, seed=1)
    state = torch.get_rng_state()
    first, second = (fit_surface(views.image, views.mask, views.camera, short) for _ in range(2))
    assert torch.equal(first.image, second.image)
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.image.requires_grad


def test_a_mask_may_exceed_one_by_rounding(views):
    short = SurfaceRecipe(cells=8, levels=1, steps=2, rays=64, coarse=4, fine=2)
    above = torch.where(views.mask == 1, 1 + 1e-6, views.mask)
    assert float(above.max()) > 1
    assert torch.equal(
        fit_surface(views.image, above, views.camera, short).image,
        fit_surface(views.image, views.mask, views.camera, short).image,
    )


def test_alpha_against_a_loop():
    surface = NeuralSurface(SurfaceRecipe(cells=16, levels=1, features=2), torch.Generator().manual_seed(0)).double()
    points = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64)[:, None] * torch.tensor([0.1, 0.2, 1.0]).double()
    grid = surface.grid()
    found = surface.alpha(grid, points[None])[0, 0, :, 0].detach()
    s = math.exp(10 * 0.3)
    phi = [1 / (1 + math.exp(-s * float(f))) for f in look_up(grid[:, :1], points[None])[0, :, 0].detach()]
    wanted = [max((a - b) / a, 0) for a, b in pairwise(phi)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    assert found[:2].sum() > 0 and found[4:].sum() == 0  # the ray enters the sphere in front, and leaves it behind


def test_the_grid_starts_as_a_sphere_with_unit_gradient():
    surface = NeuralSurface(SurfaceRecipe(cells=32, levels=3, features=2), torch.Generator().manual_seed(0))
    points = torch.tensor([[[0.0, 0.0, 0.8], [0.5, 0.5, 0.5], [-0.7, 0.1, 0.2]]])
    found = look_up(surface.grid(), points)[0]
    torch.testing.assert_close(found[:, 0], points[0].norm(dim=1) - 0.5, atol=0.02, rtol=0)
    normals = torch.nn.functional.normalize(found[:, 1:4], dim=1)
    torch.testing.assert_close(normals, torch.nn.functional.normalize(points[0], dim=1), atol=0.1, rtol=0)


def test_carried_colours_of_the_truth_stay():
    views = look(RIG.camera(torch.tensor([0.0, 0.2, -0.3])), 64)
    moved, shared = carried(views.image, views.camera, views.depth, views.mask, reference=0)
    inner = torch.nn.functional.max_pool2d((views.mask < 0.5).float(), 5, 1, 2) == 0  # without the border's sampling
    assert (psnr(moved, views.image, shared & inner)[1:] > 30).all()
    assert (
        torch.equal(moved[0][shared[0].expand(3, -1, -1)], views.image[0][shared[0].expand(3, -1, -1)])
        or (moved[0] - views.image[0]).abs().max() < 1e-3
    )
    # What the reference does not see is not compared: the left border of a view from the right.
    assert 0.5 < float(shared[2].sum() / (views.mask[2] > 0.5).sum()) < 0.99
    flat = views.image[:1].expand_as(views.image)
    wrong, shared = carried(flat, views.camera, views.depth, views.mask, reference=0)
    assert (psnr(wrong, flat, shared & inner)[1:] < 25).all()


def test_stacked_lines_are_rows_of_the_views(views):
    line = stacked_line(views.image, 0.3)
    assert line.shape == (3, len(YAWS), 20)
    for index in range(len(YAWS)):
        assert torch.equal(line[:, index], views.image[index, :, 6])
    assert torch.equal(stacked_line(views.image, 1.0)[:, 0], views.image[0, :, 19])


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="at least one cell a level"):
        SurfaceRecipe(cells=2, levels=4)
