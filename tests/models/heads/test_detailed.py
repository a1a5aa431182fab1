"""The head of one photo, as a generator."""

import torch

from models.generators.manifold import ManifoldGenerator
from models.heads.detailed import DetailedGenerator
from tests.models.encoders.test_detail import GENERATOR, photos, reconstructor
from tests.models.generators.protocol import GeneratorContract


def head(**options):
    coarse = ManifoldGenerator(**GENERATOR, **options)
    return DetailedGenerator(coarse, reconstructor(), photos(coarse))


class TestDetailed(GeneratorContract):
    excused = ("coarse.predictor.", "detail.")  # searched on a baked grid; reconstructed once, without gradient
    field_tolerance = 0.2

    def make(self):
        return head(expressions=["smile", "blink"])

    def make_still(self):
        return head()


def test_details_follow_weights_and_photo():
    """They are reconstructed once, and again when anything they depend on has changed."""
    shown = head().eval()
    anchor = shown.photo["p0"]
    with torch.no_grad():
        before = shown.synthesis(anchor.latents, anchor.camera).image
        assert shown.details is shown.details
        shown.photo.image.add_(0.5)
        after = shown.synthesis(anchor.latents, anchor.camera).image
        assert (after - before).abs().max() > 1e-4
        shown.photo.image.sub_(0.5)
        shown.detail.upsampler.out.weight.zero_()
        shown.detail.upsampler.out.bias.zero_()
        bare = shown.synthesis(anchor.latents, anchor.camera).image
    torch.testing.assert_close(bare, shown.coarse.synthesis(anchor.latents, anchor.camera).image)
