"""Baked heads: what lookups show is what the networks paint."""

import math

import pytest
import torch
from torch.testing import assert_close

from models import artifact
from models.generators.baked import BakedHead
from models.generators.fields import FrontalChart
from models.generators.gram import GRAMGenerator
from models.generators.manifold import ManifoldGenerator
from models.heads.subjects import Subjects
from tests.models.generators.protocol import awaken
from tests.models.generators.test_manifold import TINY
from tests.models.heads.test_detailed import head as detailed

YAW, PITCH = torch.tensor([-0.8, 0.0, 0.5]), torch.tensor([0.3, 0.0, -0.2])


def psnr(a, b):
    return 10 * math.log10(4 / float((a - b).square().mean()))


@pytest.fixture(scope="module")
def shipped():
    return artifact.load("assets/prior").module("generator").requires_grad_(False)


@pytest.fixture(scope="module")
def ws(shipped):
    return shipped.mapping(shipped.sample_z(1, torch.Generator().manual_seed(3)), truncation=0.7)


@pytest.fixture(scope="module")
def head(shipped, ws):
    return shipped.bake(ws, 128, stride=1)


def triplane(**options):
    torch.manual_seed(0)
    made = ManifoldGenerator(**TINY, field="triplane", triplane={"features": 8, "hidden": 8}, **options)
    return awaken(made).eval().requires_grad_(False)


class TestViews:
    def test_are_those_of_the_generator(self, shipped, ws, head):
        camera = shipped.rig.camera(YAW, PITCH)
        shown, painted = head.show(camera), shipped.synthesis(ws, camera)
        assert psnr(shown.image, painted.image) > 45
        assert ((shown.alpha > 0.5) != (painted.alpha > 0.5)).float().mean() < 1e-3
        solid = (shown.alpha > 0.9) & (painted.alpha > 0.9)
        assert (shown.depth - painted.depth)[solid].abs().mean() < 2e-3  # a head is 1.6 wide

    def test_outlines_survive_a_coarse_search(self, shipped, ws, head):
        """GRAMInverter's upsampling (A.3) loses a pixel of the coarse image all around, closest approaches do not."""
        options = dict(shipped.init_args, intersection_stride=4)
        upsampled = ManifoldGenerator(**options).eval().requires_grad_(False)
        upsampled.load_state_dict(shipped.state_dict())
        upsampled.predictor = shipped.predictor  # whose grid is there
        camera, coarse = shipped.rig.camera(YAW, PITCH), shipped.bake(ws, 128, stride=4)
        exact, ours, theirs = (g.synthesis(w, camera, resolution=128) for g, w in (
            (shipped, ws), (coarse, coarse.mean_latents), (upsampled, ws),
        ))  # fmt: skip
        assert psnr(ours.image, exact.image) > max(30, psnr(theirs.image, exact.image) + 6)

        def lost(found):
            return ((found.alpha > 0.5) != (exact.alpha > 0.5)).float().mean()

        assert lost(ours) < 0.01 and lost(ours) < lost(theirs) / 4

    def test_with_expression_and_edit(self, shipped, ws):
        expression = torch.zeros(1, 6)
        expression[:, 2] = 1.0

        def paint(points, features):
            """A red band."""
            return features + (points[..., 1:2].abs() < 0.1) * torch.tensor([4.0, -4.0, -4.0, 0.0])

        camera = shipped.rig.camera(0.3)
        shown = shipped.bake(ws, 128, expression=expression, edit=paint, stride=1).show(camera)
        painted = shipped.synthesis(ws, camera, expression=expression, edit=paint)
        assert psnr(shown.image, painted.image) > 35  # the band's border is a step
        assert psnr(shown.image, shipped.synthesis(ws, camera).image) < 25

    @pytest.mark.parametrize("flattening", ["head", "frontal"])
    def test_of_a_triplane(self, flattening):
        generator = triplane(flattening=flattening, background="none")
        camera, ws = generator.rig.camera(0.2), generator.mapping(generator.sample_z(1))
        baked = generator.bake(ws, 96, stride=1)
        shown, painted = (
            g.synthesis(w, camera, resolution=32) for g, w in ((baked, baked.mean_latents), (generator, ws))
        )
        # From the front lines run along the sides of closed surfaces, which that chart is not for.
        middle = slice(10, 22) if flattening == "frontal" else slice(None)
        assert psnr(shown.image[..., middle, middle], painted.image[..., middle, middle]) > 40
        assert isinstance(baked.layout, FrontalChart) == (flattening == "frontal")

    def test_of_a_background_that_shares_the_planes(self):
        generator = triplane(background="shared")
        camera, ws = generator.rig.camera(0.4), generator.mapping(generator.sample_z(1))
        shown, painted = (
            generator.bake(ws, 96, stride=1).show(camera, 32),
            generator.synthesis(ws, camera, resolution=32),
        )
        assert psnr(shown.image, painted.image) > 40
        assert (painted.alpha == 0).any() and painted.image[painted.alpha.expand(-1, 3, -1, -1) == 0].std() > 1e-3

    def test_of_a_photo_with_details(self):
        generator = detailed().eval().requires_grad_(False)
        with torch.no_grad():
            generator.detail.upsampler.out.weight.normal_(std=60.0, generator=torch.Generator().manual_seed(0))
        anchor = generator.photo["p0"]
        shown = generator.bake(anchor.latents, 64, stride=1).show(anchor.camera)
        painted = generator.synthesis(anchor.latents, anchor.camera)
        assert psnr(shown.image, painted.image) > 35
        assert psnr(shown.image, generator.coarse.synthesis(anchor.latents, anchor.camera).image) < 25

    def test_from_nearer_and_farther_than_the_rig(self, shipped, ws, head, monkeypatch):
        """As the generator whose rig stands there."""
        home = shipped.rig
        for radius in (4.0, 14.0):
            moved, scale = radius - home.radius, radius / home.radius
            rig = home.replace(radius=radius, focal=home.focal * scale, near=home.near + moved, far=home.far + moved)
            monkeypatch.setattr(shipped, "rig", rig)
            camera = rig.camera(0.4, 0.1)
            assert psnr(head.show(camera).image, shipped.synthesis(ws, camera).image) > 45

    def test_nothing_in_view_is_the_background(self, shipped, head):
        away = shipped.rig.replace(pivot=(30.0, 0.0, 0.0)).camera(0.0)
        seen = head.synthesis(head.mean_latents, away)
        assert not seen.alpha.any() and not seen.depth.any() and not seen.normals.any()
        assert_close(seen.image, head.show(shipped.rig.camera(0.0)).image * 0 + head._backdrop(away, 64)[0])


class TestHead:
    def test_survives_an_artifact(self, shipped, head, tmp_path):
        saved = artifact.save(tmp_path / "head", stage="present", modules={"generator": head})
        subjects = Subjects(artifact.load(saved.path))
        assert subjects.ids == ("subject-1",)
        again, latents, camera = subjects["subject-1"].generator, subjects["subject-1"].latents, shipped.rig.camera(0.3)
        assert isinstance(again, BakedHead)
        assert torch.equal(again.synthesis(latents, camera).image, head.show(camera).image)

    def test_is_finished(self, shipped, ws, head):
        camera = shipped.rig.camera(0.0)
        with pytest.raises(ValueError, match="neither codes nor edits"):
            head.synthesis(ws, camera)
        with pytest.raises(ValueError, match="neither codes nor edits"):
            head.synthesis(head.mean_latents, camera, edit=lambda points, features: features)
        with pytest.raises(ValueError, match="cannot animate"):
            head.synthesis(head.mean_latents, camera, expression=torch.zeros(1, 6))
        with pytest.raises(ValueError, match="no codes left"):
            head.mapping(torch.zeros(1, 8))

    def test_of_what_has_no_manifolds_to_bake(self, shipped, ws):
        gram = GRAMGenerator(z_dim=4, resolution=8, width=8, layers=2, mapping_width=8, predictor_width=8)
        assert gram.bake(gram.mean_latents, 16) is None
        with pytest.raises(ValueError, match="one head at a time"):
            shipped.bake(ws.repeat_interleave(2), 16)
