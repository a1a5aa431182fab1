"""Parallax of a painted mark: true renderings move it rightly, wrong depths do not pass."""

import math

import pytest
import torch

from datamodules.mannequins import RIG, SPLITS, Scene, render, subject_z
from models.camera import Camera
from models.metrics.parallax import Mark, Spot, choose_mark, locate, parallax, shows

SIZE = 64


@pytest.fixture(scope="module")
def head():
    """The input's own view of a head, and a sweep of +-30 degrees around it."""
    scene = Scene.from_z(subject_z([SPLITS["test"][3]]))
    yaw = torch.tensor([-25.0, -10.0, 5.0, 20.0, 35.0]).deg2rad()
    source = render(scene, RIG.camera(0.1), SIZE, supersample=1)
    return source, render(scene.repeat_interleave(len(yaw)), RIG.camera(yaw), SIZE, supersample=1)


@pytest.fixture(scope="module")
def mark(head):
    found = choose_mark(*head, torch.Generator().manual_seed(0))
    assert found is not None
    return found


def painted(mark, source):
    return mark.paint(source.image, mark.opacity(source.camera, source.depth, source.mask)) - source.image


def places(mark: Mark, camera: Camera) -> torch.Tensor:
    return camera.project(mark.point.expand(len(camera), 1, 3))[0][:, 0] * SIZE


def measure(head, mark, marked):
    source, sweep = head
    spot = locate(sweep.image, marked, painted(mark, source)[0])
    return parallax(spot, places(mark, sweep.camera), shows(sweep, mark.point))


def stamped(head, mark, where):
    """The sweep with the mark stamped on pixels (V, 2), whatever the surface."""
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    square = (torch.stack([x, y], -1) - where[:, None, None]).square().sum(-1)
    return mark.paint(head[1].image, torch.exp(-square / (2 * 1.4**2))[:, None])


def test_true_renderings_have_the_true_parallax(head, mark):
    sweep = head[1]
    found = measure(head, mark, mark.paint(sweep.image, mark.opacity(sweep.camera, sweep.depth, sweep.mask)))
    assert found.found == 1 and found.strength > 0.5
    assert found.error < 0.3
    assert found.slope == pytest.approx(1, abs=0.05)


def test_a_wrong_depth_fails(head, mark):
    source, sweep = head
    towards = torch.nn.functional.normalize(mark.point - source.camera.position[0], dim=0)
    deeper = Mark(mark.point + 0.4 * towards, mark.sigma)  # the same pixel of the input, seen behind the surface
    torch.testing.assert_close(places(deeper, source.camera), places(mark, source.camera), atol=1e-3, rtol=0)
    wrong = measure(head, mark, stamped(head, mark, places(deeper, sweep.camera)))
    assert wrong.error > 1.5
    assert abs(wrong.slope - 1) > 0.2


def test_a_mark_that_sticks_to_the_picture_has_no_slope(head, mark):
    source, sweep = head
    stuck = places(mark, source.camera).expand(len(sweep.camera), 2)
    found = measure(head, mark, stamped(head, mark, stuck))
    assert found.error > 3
    assert found.slope == pytest.approx(0, abs=0.05)


def test_a_lost_mark_is_said_to_be_lost(head, mark):
    noise = 0.02 * torch.randn(head[1].image.shape, generator=torch.Generator().manual_seed(0))
    found = measure(head, mark, head[1].image + noise)
    assert found.found == 0 and found.strength < 0.1
    assert math.isnan(found.error) and math.isnan(found.slope)


def test_marks_are_on_skin_that_the_input_and_the_sweep_show(head):
    source, sweep = head
    for seed in range(5):
        mark = choose_mark(source, sweep, torch.Generator().manual_seed(seed))
        assert mark is not None
        x, y = places(mark, source.camera)[0].long().tolist()
        assert source.segmentation[0, y, x] == 1
        assert shows(source, mark.point).all() and int(shows(sweep, mark.point).sum()) >= 3
        opacity = mark.opacity(source.camera, source.depth, source.mask)[0, 0]
        assert opacity[y, x] > 0.9
        # A spot of deviation 1.4 pixels covers 2 pi 1.4^2 pixels, somewhat fewer where the skin is inclined.
        assert 0.5 < float(opacity.sum()) / (2 * math.pi * 1.4**2) < 1.05
    bald = source.__class__(**{**vars(source), "segmentation": torch.zeros_like(source.segmentation)})
    assert choose_mark(bald, sweep, torch.Generator()) is None


def test_a_point_behind_the_head_is_not_shown(head):
    source, _ = head
    assert not shows(source, torch.tensor([0.0, 0.0, -0.6])).any()
    assert not shows(source, torch.tensor([9.0, 0.0, 0.0])).any()


def test_parallax_against_a_loop():
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(6, 2, generator=g, dtype=torch.float64) * 40
    pixel = truth + torch.randn(6, 2, generator=g, dtype=torch.float64)
    shown = torch.tensor([True, True, False, True, True, True])
    strength = torch.tensor([0.9, 0.1, 0.8, 0.7, 0.6, 0.5])
    got = parallax(Spot(pixel, strength), truth, shown)
    rows = [0, 3, 4, 5]  # shown and strong
    errors = [math.dist(pixel[i].tolist(), truth[i].tolist()) for i in rows]
    means = [[sum(float(p[i, k]) for i in rows) / 4 for k in (0, 1)] for p in (pixel, truth)]
    above = sum((float(pixel[i, k]) - means[0][k]) * (float(truth[i, k]) - means[1][k]) for i in rows for k in (0, 1))
    below = sum((float(truth[i, k]) - means[1][k]) ** 2 for i in rows for k in (0, 1))
    assert got.error == pytest.approx(sum(errors) / 4)
    assert got.slope == pytest.approx(above / below)
    assert got.found == pytest.approx(4 / 5)
    assert got.strength == pytest.approx((0.9 + 0.1 + 0.7 + 0.6 + 0.5) / 5)
