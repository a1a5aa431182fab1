"""The benchmark of efficient GRAM, made small."""

from __future__ import annotations

import pytest
import torch

from models.generators.gram import unit_rays
from tests.benchmarks.manifolds import (
    LEVELS,
    codes,
    consistency,
    draw,
    efficient,
    fit,
    score,
    small_efficient,
    small_gram,
    turning,
)
from tests.benchmarks.official import TURN

SIZE = 16


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def views():
    return draw(1, (-20, 0, 20), SIZE)


@torch.no_grad()
def test_both_have_the_same_manifolds():
    torch.manual_seed(0)
    ours, theirs = small_efficient(SIZE), small_gram(SIZE)
    camera = ours.rig.camera(0.3, 0.1)
    hits = ours.crossings(camera, SIZE)
    depth, met = (hits.scatter(x, SIZE * SIZE) for x in (hits.depth, hits.valid.float()))
    origins, directions, length = unit_rays(camera, SIZE)
    latents = theirs.mapping(codes(theirs, 1))
    distance, valid, _ = theirs.crossings(latents, origins, directions)
    both = (met > 0) & valid
    assert both.float().mean() > 0.5 and both.sum() > 0.95 * valid.sum()
    error = (depth * length[..., None] - distance)[both].abs()
    # Ours are found on a quarter of the picture's side, which is only four rays here.
    assert error.mean() < 0.5 * (LEVELS[0] - LEVELS[1])


def test_a_fit_comes_nearer(views):
    torch.manual_seed(0)
    generator = small_efficient(SIZE)
    before = float(score(generator, views, views, SIZE)[0])
    assert fit(generator, views, 1.0, 5e-3, SIZE) > 5
    assert float(score(generator, views, views, SIZE)[0]) > before + 2


def test_consistency_is_told_from_its_absence(views):
    true = consistency(views.image[0], views, 0)
    assert true > 14  # of coarse pixels
    assert consistency(views.image[0] * torch.tensor([1.0, 1.0, -1.0])[:, None, None, None], views, 0) < true - 3


def test_cameras_turn():
    seen = []
    generator, run = turning(small_efficient, SIZE, False)
    synthesis = generator.synthesis
    generator.synthesis = lambda ws, camera: seen.append(float(camera.yaw)) or synthesis(ws, camera)
    assert run(1).shape == run(1).shape == (1, 3, SIZE, SIZE)
    assert seen[1] - seen[0] == pytest.approx(TURN, rel=0.01)


def test_the_paper_s_network_is_measured():
    with torch.device("meta"):
        generator = efficient(64)
    assert len(generator.levels) == 23 and generator.shared and generator.intersection_stride == 4
    assert sum(p.numel() for p in generator.parameters()) > 20e6
