"""The radiance-manifold generator."""

import pytest
import torch
from torch.testing import assert_close

from models.camera import Rig
from models.generators.manifold import ManifoldGenerator
from models.rendering.manifolds import first_crossings, upsample_crossings
from tests.models.generators.protocol import GeneratorContract, awaken

TINY = {
    "z_dim": 8, "w_dim": 16, "resolution": 16, "channels": [16, 12, 8], "start": 4, "mapping_hidden": 16,
    "background_channels": [8, 8], "ambient": 5, "samples": 48, "predictor": {"hidden": 8, "grid": 40},
}  # fmt: skip


class TestTextures(GeneratorContract):
    excused = ("predictor.",)  # searched on a baked grid
    field_tolerance = 0.2  # the layer index of a crossing is exact to one linear step of the search

    def make(self):
        return ManifoldGenerator(**TINY, expressions=["smile", "blink"])

    def make_still(self):
        return ManifoldGenerator(**TINY)


class TestTriPlane(GeneratorContract):
    """The paper's own field: tri-plane features decoded at the crossings."""

    excused = ("predictor.",)
    field_tolerance = 0.2

    def make(self):
        return ManifoldGenerator(**TINY, field="triplane", triplane={"features": 8, "hidden": 8}, expressions=["smile"])


# GRAM's spheres and background, in a cube of half side 1.
SPHERES = {
    "field": "triplane", "backbone": "stylegan2", "background": "shared", "thickness": 0.04, "bake_predictor": False,
    "levels": [2.3, 1.8, 1.3, 0.8],
    "triplane": {"features": 8, "hidden": 8, "extent": 1.0, "density_scale": 30.0, "density_bias": 0.0},
    "predictor": {"hidden": 8, "centre": [0.0, 0.0, -1.5], "radius": 0.0, "activation": "relu"},
    "rig": {"pivot": [0.0, 0.0, 0.2], "centre": [0.0, 0.0, 0.0]},
}  # fmt: skip


class TestEfficientGRAM(GeneratorContract):
    """GRAMInverter's own: StyleGAN2's backbone, a predictor that learns, and a background that shares the planes."""

    field_tolerance = 0.2
    random = True  # the backbone's noise

    def make(self):
        return ManifoldGenerator(**TINY | SPHERES)


class TestSearchedPredictor(GeneratorContract):
    """Crossings are found on the predictor itself, which then learns from rendering."""

    field_tolerance = 0.2

    def make(self):
        return ManifoldGenerator(**TINY, bake_predictor=False, background="none")


@torch.no_grad()
def test_shared_background_is_the_last_surface():
    """Pixel by pixel: what lies before the plane, front to back (Eq. 3), then the plane, which lets nothing through."""
    torch.manual_seed(0)
    generator = awaken(ManifoldGenerator(**TINY | SPHERES))
    ws, side = generator.mapping(generator.sample_z(1)), 16
    camera = generator.rig.camera(0.5, 0.1)
    found = generator.synthesis(ws, camera)
    origins, directions = camera.rays(side)
    depth, valid = first_crossings(
        generator.predictor, origins, directions, generator.levels, near=generator.rig.near, far=generator.rig.far
    )
    plane = (-1 - origins[..., 2]) / directions[..., 2]  # z = -1: the back of the cube, whose middle is not the pivot

    def decoded(z):
        points = origins + z[..., None] * directions
        return generator.decode(generator.features(ws, points.clamp(-1, 1) if z is plane else points))

    surfaces = [(depth[0, :, k], decoded(depth[..., k]), valid[0, :, k]) for k in range(4)]
    behind, hidden = decoded(plane), 0
    for pixel in range(side * side):
        colour, left = torch.zeros(3), 1.0
        for z, sample, met in surfaces:
            hidden += int(met[pixel] and z[pixel] >= plane[0, pixel])
            if met[pixel] and z[pixel] < plane[0, pixel]:
                alpha = float(sample.occupancy[0, pixel])
                colour, left = colour + left * alpha * sample.colour[0, pixel], left * (1 - alpha)
        colour = colour + left * behind.colour[0, pixel]
        row, column = divmod(pixel, side)
        assert_close(found.image[0, :, row, column], colour, atol=1e-5, rtol=0)
        assert float(found.alpha[0, 0, row, column]) == pytest.approx(1 - left, abs=1e-5)
    assert hidden > 0


@torch.no_grad()
def test_quarter_crossings_of_spheres_are_nearly_exact():
    """A.3 at its own size, 64 to 256 pixels, on spheres, where crossings are known."""
    rig = Rig(radius=1.0, focal=4.74, pivot=(0.0, 0.0, 0.0), near=0.88, far=1.12)
    camera, levels, centre = rig.camera(0.4, 0.1), torch.linspace(0.276, 0.096, 6), torch.tensor([0.0, 0.0, -0.18])
    coarse = first_crossings(
        lambda x: (x - centre).norm(dim=-1), *camera.rays(64), levels, near=rig.near, far=rig.far, samples=64
    )
    depth, valid = upsample_crossings(*coarse, 64, 256)
    origins, directions = (x[0].double() for x in camera.rays(256))
    # |o + z d - c| = l: the smaller root of a quadratic equation in z
    a, b = directions.square().sum(-1), (directions * (origins - centre)).sum(-1)
    root = b[:, None].square() - a[:, None] * ((origins - centre).square().sum(-1)[:, None] - levels.double().square())
    exact = (-b[:, None] - root.clamp_min(0).sqrt()) / a[:, None]
    inside = (root > 0) & (exact < rig.far)
    assert valid[0][inside].float().mean() > 0.97 and valid[0][~inside].float().mean() < 1e-4
    error = (depth[0] - exact).abs()[valid[0] & inside] / 0.18 * 22  # in spacings of GRAM's level sets
    assert error.mean() < 0.01 and error.quantile(0.99) < 0.1


def test_validity_needs_99_percent_of_the_weight():
    """Against the weights of bilinear interpolation, summed pixel by pixel."""
    side, target = 5, 20
    valid = torch.rand(1, side * side, 2, generator=torch.Generator().manual_seed(0)) < 0.7
    _, found = upsample_crossings(valid.float(), valid, side, target)
    expected = torch.zeros(target * target, 2)
    for pixel in range(target * target):
        place = [min(max((index + 0.5) * side / target - 0.5, 0), side - 1) for index in divmod(pixel, target)]
        for cell in range(side * side):
            weights = [max(0.0, 1 - abs(at - index)) for at, index in zip(place, divmod(cell, side), strict=True)]
            expected[pixel] += weights[0] * weights[1] * valid[0, cell]
    assert torch.equal(found[0], expected > 0.99)
    assert 0.1 < found.float().mean() < 0.6


def test_coarse_crossings_are_close_to_exact_ones():
    """Crossings found on half the image side and upsampled (GRAMInverter, A.3)."""
    torch.manual_seed(0)
    exact = ManifoldGenerator(**TINY | {"resolution": 64}, background="none").eval()
    coarse = ManifoldGenerator(**TINY | {"resolution": 64}, background="none", intersection_stride=2).eval()
    coarse.load_state_dict(exact.state_dict())
    camera = exact.rig.camera(0.4)
    with torch.no_grad():
        found, upsampled = exact.crossings(camera, 64), coarse.crossings(camera, 64)
        (depth, valid), (near, kept) = (
            (h.scatter(h.depth, 64 * 64), h.scatter(h.valid.float(), 64 * 64) > 0) for h in (found, upsampled)
        )
    assert (kept & ~valid).sum() <= 0.01 * valid.sum()  # nothing is invented beyond the silhouette
    assert kept.sum() > 0.8 * valid.sum()
    # The surfaces are about 1 across and .1 apart.
    assert (near - depth).abs()[kept & valid].mean() < 0.02


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"levels": [0.0, 0.1]}, "levels must decrease"),
        ({"background": "shared"}, "no shared background"),
        ({"backbone": "stylegan2"}, "light backbone"),
        ({"backbone": "vgg"}, "light backbone"),
        ({"field": "triplane", "backbone": "vgg"}, "backbone must be one of"),
        ({"field": "triplane", "backbone": "stylegan2", "detail_maps": True}, "detail_maps are of the light backbone"),
        ({"predictor": {"activation": "sine"}}, "activation must be softplus or relu"),
    ],
)
def test_contradictions_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        ManifoldGenerator(**TINY | options)


@torch.no_grad()
def test_points_are_rendered_in_chunks_without_a_graph(monkeypatch):
    generator = ManifoldGenerator(**TINY | SPHERES | {"resolution": 32})
    ws, camera = generator.mapping(generator.sample_z(2)), generator.rig.camera(torch.tensor([0.1, 0.2]))
    monkeypatch.setattr("models.rendering.pointwise.CPU_NUMBERS", 2**12)
    sizes = []
    edit = lambda points, features: sizes.append(points.shape[1]) or features  # noqa: E731
    chunked = generator.synthesis(ws, camera, edit=edit).image
    with torch.enable_grad():
        whole = generator.synthesis(ws, camera, edit=edit).image
    assert sizes[0] == 2**12 // (2 * 8) and sizes[-1] == sum(sizes[:-1])
    assert_close(chunked, whole, atol=1e-5, rtol=0)
