"""Scores of a head's views."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from models.metrics.portrait import compare_views
from tests.models.metrics.ball import RIG, look, rendering


def mean_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).abs().flatten(1).mean(1)


def test_shapes_coarser_than_pictures_are_compared_at_their_own_size():
    camera = RIG.camera(torch.tensor([-0.3, 0.3]))
    truth, coarse = look(camera, 32), look(camera, 16)
    found = replace(
        rendering(truth), depth=coarse.depth + 0.25 * coarse.mask, alpha=coarse.mask, normals=coarse.normals
    )
    scores = {(s.view, s.metric): s.value for s in compare_views(found, truth, look(RIG.camera(0.0), 32), mean_error)}
    for row, view in enumerate(("yaw=-17", "yaw=+17")):
        assert scores[view, "psnr"] > 60  # pictures keep their size
        assert scores[view, "depth_mae"] == pytest.approx(0.25, abs=0.02)
        assert scores[view, "normal_error"] < 3
        share = F.avg_pool2d(truth.mask, 2)[row]
        assert scores[view, "alpha_mae"] == pytest.approx(float((coarse.mask[row] - share).abs().mean()), rel=1e-4)
