"""The shipped networks on heads they have never seen. Floors, well below what a full evaluation measures."""

import pytest
import torch

from datamodules.feature_pairs import draw_subject
from models.features.embedded import (
    EmbeddedIdentity,
    EmbeddedLPIPS,
    EmbeddedParser,
    EmbeddedPose,
    EmbeddedStyle,
)
from models.features.evaluation import measure_features
from models.features.weights import EMBEDDED_FOLDER
from models.files import ROOT

SHIPPED = (EMBEDDED_FOLDER, "assets/judges")
SUBJECTS = range(1_100_200, 1_100_204)  # 24 pictures; two subjects to fit centroids on, two to ask about


@pytest.fixture(scope="module")
def batch():
    drawn = [draw_subject(subject, 64, held_out=True) for subject in SUBJECTS]
    return {name: torch.stack([torch.from_numpy(d[name]) for d in drawn]) for name in drawn[0]}


def networks(weights):
    return {
        "style": EmbeddedStyle(weights=weights),
        "identity": EmbeddedIdentity(weights=weights),
        "pose": EmbeddedPose(weights=weights),
        "parser": EmbeddedParser(weights=weights),
        "perceptual": EmbeddedLPIPS(weights=weights),
    }


@pytest.fixture(scope="module", params=SHIPPED)
def measured(request, batch):
    return measure_features(batch, **networks(request.param))


FLOORS = {
    "style_accuracy": 0.8,
    "style_recall_held_out": 0.5,
    "direction_cosine": 0.7,
    "direction_cosine_held_out": 0.5,
    "identity_top1_plain": 0.7,
    "identity_top1_art": 0.7,
    "parsing_miou_plain": 0.5,
    "parsing_miou_art": 0.45,
    "parsing_miou_held_out": 0.4,
    "perceptual_rank_blur": 0.95,
    "perceptual_rank_noise": 0.95,
    "perceptual_rank_colour": 0.95,
    "perceptual_rank_warp": 0.9,
    "perceptual_rank_shift": 0.9,
    "perceptual_rank_occlusion": 0.9,
}
CEILINGS = {
    "yaw_error_deg_plain": 6.0,
    "yaw_error_deg_art": 6.0,
    "yaw_error_deg_held_out": 8.0,
    "pitch_error_deg_plain": 5.0,
    "perceptual_one_pixel_shift": 0.15,
}


@pytest.mark.parametrize("metric", FLOORS)
def test_floor(metric, measured):
    assert measured[metric] >= FLOORS[metric]


@pytest.mark.parametrize("metric", CEILINGS)
def test_ceiling(metric, measured):
    assert measured[metric] <= CEILINGS[metric]


def test_other_heads_lie_in_the_range_of_lpips(measured):
    assert 0.3 < measured["perceptual_other_head"] < 0.8


def test_directions_of_different_styles_differ(measured):
    assert measured["direction_cosine_between_styles"] < measured["direction_cosine"] - 0.2


@pytest.mark.parametrize("folder", SHIPPED)
def test_small(folder):
    assert sum(file.stat().st_size for file in (ROOT / folder).iterdir()) < 6e6


def test_judges_are_others():
    """They learnt other heads from another start: losses that know one set know nothing of the other's weights."""
    for ours, judges in zip(*(networks(folder).values() for folder in SHIPPED), strict=True):
        for (name, one), other in zip(ours.state_dict().items(), judges.state_dict().values(), strict=True):
            assert one.ndim < 2 or not torch.allclose(one, other, atol=1e-3), name
