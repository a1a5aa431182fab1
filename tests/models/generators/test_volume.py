"""The tri-plane volume generator."""

import pytest
import torch
from torch.testing import assert_close

from models.generators.triplane import PLANES, TriPlaneField
from models.generators.volume import TriPlaneVolumeGenerator
from models.rendering.compositing import field_normals
from models.rendering.output import FieldSample
from tests.models.generators.protocol import GeneratorContract, seeded

TINY = {
    "z_dim": 8, "w_dim": 16, "resolution": 16, "channels": [16, 12, 8], "start": 4, "mapping_hidden": 16, "coarse": 10,
    "field": {"features": 6, "hidden": 12}, "background_channels": [8, 8], "ambient": 5,
}  # fmt: skip


class TestVolume(GeneratorContract):
    random = True

    def make(self):
        return TriPlaneVolumeGenerator(**TINY, fine=8, expressions=["smile", "blink"])

    def make_still(self):
        return TriPlaneVolumeGenerator(**TINY, fine=8)


class TestSinglePassOnWhite(GeneratorContract):
    random = True

    def make(self):
        return TriPlaneVolumeGenerator(**TINY, fine=0, background="none")


def test_planes_are_three_orthogonal_projections():
    """A plane painted with its own coordinates gives those back."""
    field = TriPlaneField(features=2, extent=1.5)
    side = 64
    ramp = (torch.arange(side) + 0.5) / side * 2 - 1
    rows, columns = torch.meshgrid(ramp, ramp, indexing="ij")
    points = (torch.rand(1, 40, 3, generator=seeded()) - 0.5) * 2
    for plane, axes in enumerate(PLANES):
        painted = torch.zeros(1, field.channels, side, side)
        painted[0, 2 * plane], painted[0, 2 * plane + 1] = columns, rows
        assert_close(3 * field.at(painted, points), points[..., axes] / 1.5, atol=1e-5, rtol=0)
    assert {frozenset(axes) for axes in PLANES} == {frozenset(pair) for pair in ((0, 1), (0, 2), (1, 2))}


def test_features_vanish_outside_the_cube():
    field = TriPlaneField(features=2, extent=1.0)
    painted = torch.ones(1, field.channels, 8, 8)
    assert (field.at(painted, torch.tensor([[[2.0, 2.0, 2.0]]])) == 0).all()


def test_density_gradient_points_outwards_from_a_ball():
    """Normals of the field by autograd, through lookup and decoder, from a caller without gradients."""
    torch.manual_seed(0)
    field = TriPlaneField(features=1, hidden=2, extent=1.0)
    with torch.no_grad():
        field.hidden.weight.fill_(1.0)
        field.out.weight.fill_(1.0)
    side = 128
    ramp = (torch.arange(side) + 0.5) / side * 2 - 1
    rows, columns = torch.meshgrid(ramp, ramp, indexing="ij")
    painted = -(rows.square() + columns.square()).expand(1, 3, side, side)  # sums to -2 |x|^2
    points = torch.nn.functional.normalize(torch.randn(1, 50, 3, generator=seeded()), dim=-1) * 0.6
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        normals = field_normals(lambda p: field.decode(field.at(painted, p)).density, points, outward=-1)
    assert ((normals * points / 0.6).sum(-1) > 0.99).all()


def test_given_uniform_numbers_are_used_and_checked():
    torch.manual_seed(0)
    generator = TriPlaneVolumeGenerator(**TINY, fine=8)
    ws, camera = generator.mapping(generator.sample_z(1, seeded())), generator.rig.camera(0.2)
    with torch.no_grad():
        middle = generator.synthesis(ws, camera, randomness=torch.full((1, 256, 18), 0.5)).image
        assert torch.equal(middle, generator.synthesis(ws, camera).image)
        with pytest.raises(ValueError, match="randomness"):
            generator.synthesis(ws, camera, randomness=torch.zeros(1, 256, 17))


def test_constant_fog_has_the_closed_form_opacity():
    """alpha = 1 - exp(-sigma L) with L the length of the ray between the near and far planes, not its depth."""
    torch.manual_seed(0)
    generator = TriPlaneVolumeGenerator(**TINY, fine=8)
    generator.decode = lambda f, directions=None: FieldSample(colour=f[..., :3], density=0.3 + 0 * f[..., :1])
    rig = generator.rig.replace(focal=0.5)  # a wide view: the corner rays are much longer
    generator.rig, camera = rig, rig.camera(0.3)
    with torch.no_grad():
        ws = generator.mapping(generator.sample_z(1, seeded()))
        alpha = generator.synthesis(ws, camera, randomness=seeded()).alpha.flatten()
    length = (rig.far - rig.near) * camera.rays(generator.resolution)[1][0].norm(dim=-1)
    assert_close(alpha, 1 - torch.exp(-0.3 * length), atol=1e-5, rtol=0)


def test_second_pass_sharpens_the_depth():
    """Of a dense ball, two passes recover the analytic depth better than one pass of as many samples."""
    torch.manual_seed(0)
    radius, errors = 0.9, []
    for coarse, fine in ((16, 16), (32, 0)):
        generator = TriPlaneVolumeGenerator(**TINY | {"coarse": coarse}, fine=fine)
        pivot, camera = generator.pivot, generator.rig.camera(0.2)

        def ball(points, features, pivot=pivot):
            inside = (points - pivot).norm(dim=-1, keepdim=True) < radius
            return torch.cat([features[..., :3], inside.float()], -1)

        generator.decode = lambda f, directions=None: FieldSample(colour=f[..., :3], density=400 * f[..., 3:])
        with torch.no_grad():
            ws = generator.mapping(generator.sample_z(1, seeded()))
            depth = generator.synthesis(ws, camera, edit=ball).depth.flatten(1)
        origins, directions = camera.rays(generator.resolution)
        square, slope = directions.square().sum(-1), ((origins - pivot) * directions).sum(-1)
        root = slope.square() - square * ((origins - pivot).square().sum(-1) - radius**2)
        truth = (-slope - root.clamp_min(0).sqrt()) / square
        errors.append(float((depth - truth)[root > 0.3].abs().mean()))
    assert errors[0] < 0.7 * errors[1] and errors[0] < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [({"background": "sky"}, "background"), ({"expressions": ["a"], "expression_tap": "x"}, "taps")],
)
def test_contradictory_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TriPlaneVolumeGenerator(**TINY, **change)


def test_z_of_the_wrong_size_is_refused():
    generator = TriPlaneVolumeGenerator(**TINY)
    with pytest.raises(ValueError, match="z must be"):
        generator.mapping(torch.zeros(2, 9))
