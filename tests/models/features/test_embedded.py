"""The embedded networks as networks: shapes, sizes, gradients, round trips. Their quality: test_shipped.py."""

import inspect

import pytest
import torch

from datamodules.mannequins.styles import HELD_OUT_STYLE, STYLES
from models import artifact
from models.errors import UserError
from models.features import base, evaluation
from models.features.embedded import EmbeddedIdentity, EmbeddedLPIPS, EmbeddedParser, EmbeddedPose, EmbeddedStyle
from models.segments import SEGMENTS

NETWORKS = {
    "perceptual": EmbeddedLPIPS,
    "style": EmbeddedStyle,
    "identity": EmbeddedIdentity,
    "parser": EmbeddedParser,
    "pose": EmbeddedPose,
}


def test_the_world_is_the_one_the_networks_know():
    assert STYLES.index(HELD_OUT_STYLE) == evaluation.HELD_OUT


@pytest.mark.parametrize("size", [48, 64, 128])
def test_shapes_at_any_size(size):
    image = torch.rand(2, 3, size, size) * 2 - 1
    style, identity = EmbeddedStyle(weights=None)(image), EmbeddedIdentity(weights=None)(image)
    assert style.shape == (2, EmbeddedStyle.dim) and identity.shape == (2, EmbeddedIdentity.dim)
    torch.testing.assert_close(style.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(identity.norm(dim=1), torch.ones(2))
    assert EmbeddedParser(weights=None)(image).shape == (2, len(SEGMENTS), size, size)
    pose = EmbeddedPose(weights=None)(image)
    assert pose.shape == (2, 2) and (pose.abs() <= EmbeddedPose.limit).all()


@pytest.mark.parametrize("size", [None, 64])
def test_perceptual_distance(size):
    network = EmbeddedLPIPS(size=size, weights=None)
    a, b = torch.rand(2, 3, 3, 96, 96) * 2 - 1
    assert network(a, b).shape == (3,) and (network(a, b) > 0).all()
    torch.testing.assert_close(network(a, b), network(b, a))
    torch.testing.assert_close(network(a, a), torch.zeros(3))
    with pytest.raises(ValueError, match="differ in shape"):
        network(a, b[:2])


def test_perceptual_gradient_at_equal_images_is_zero():
    network = EmbeddedLPIPS(weights=None)
    a = torch.rand(1, 3, 64, 64)
    b = a.clone().requires_grad_()
    network(a, b).sum().backward()
    torch.testing.assert_close(b.grad, torch.zeros_like(b))
    network(a, torch.zeros_like(a, requires_grad=True)).sum().backward()  # flat features have a finite gradient


def test_perceptual_weights_stay_positive_and_the_scale_is_calibrated():
    network = EmbeddedLPIPS(weights=None)
    for raw in network.head.raw:
        torch.nn.init.constant_(raw, -5.0)
    a, b = torch.rand(2, 4, 3, 64, 64)
    assert (network(a, b) > 0).all()
    for _ in range(200):
        network.head.calibrate(network(a, b).detach(), wanted=0.5, momentum=0.1)
    assert float(network(a, b).detach().mean()) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("kind", NETWORKS)
def test_round_trip_through_an_artifact_and_by_path(kind, tmp_path):
    network = NETWORKS[kind](weights=None).eval()
    saved = artifact.save(tmp_path / "a", stage="features", modules={kind: network})
    image = torch.rand(1, 3, 64, 64)
    arguments = (image, image.flip(3)) if kind == "perceptual" else (image,)
    for again in (
        saved.module(kind),
        NETWORKS[kind](weights=str(tmp_path / "a")),
        NETWORKS[kind](weights=str(tmp_path / "a" / f"{kind}.safetensors")),
    ):
        torch.testing.assert_close(again(*arguments), network(*arguments))
    other = "pose" if kind != "pose" else "style"
    with pytest.raises(UserError, match=r"does not hold the weights|has no module"):
        NETWORKS[other](weights=str(tmp_path / "a"))
    with pytest.raises(UserError, match="does not hold the weights"):
        NETWORKS[other](weights=str(tmp_path / "a" / f"{kind}.safetensors"))


@pytest.mark.parametrize(
    ("network", "protocol"),
    [
        (EmbeddedLPIPS, base.PerceptualDistance),
        (EmbeddedStyle, base.ImageEmbedding),
        (EmbeddedIdentity, base.IdentityEmbedding),
        (EmbeddedParser, base.FaceParser),
        (EmbeddedPose, base.PoseEstimator),
    ],
)
def test_protocols(network, protocol):
    assert isinstance(network(weights=None), protocol)
    assert inspect.signature(network).parameters["weights"].default == "embedded"
