"""EG3D: the protocol, its quadrature against loops and closed forms, and derivatives."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from models.generators.eg3d import EG3DGenerator, Samples, SuperResolution, integrate, segment_weights
from models.latents import Latents
from tests.models.generators.protocol import GeneratorContract, awaken, seeded

TINY = {
    "z_dim": 8, "w_dim": 16, "channels": (12, 10, 8), "plane_features": 6, "decoder": {"hidden": 12},
    "render_resolution": 16, "coarse": 10, "fine": 8, "superresolution": {"channels": (8, 6), "resolution": 32},
}  # fmt: skip


def small(**changes):
    torch.manual_seed(0)
    generator = EG3DGenerator(**{**TINY, **changes}).eval()
    awaken(generator)
    return generator


class TestEG3D(GeneratorContract):
    random = True
    free_resolution = False
    bounded = False
    excused = (
        "superresolution.blocks.0.conv0.noise_strength",
        "superresolution.blocks.0.conv1.noise_strength",
        "superresolution.blocks.1.conv0.noise_strength",
        "superresolution.blocks.1.conv1.noise_strength",
    )  # EG3D's super-resolution has noise layers that it does not use

    def make(self):
        return EG3DGenerator(**TINY)


class TestCars(TestEG3D):
    """As on ShapeNet: white background, wide view, 2x head with noise, planes that hold all pairs, no conditioning."""

    excused = ()

    def make(self):
        return EG3DGenerator(**{
            **TINY, "fine": 0, "white_back": True, "disparity": True, "axes": ((0, 1), (0, 2), (2, 1)), "box": 1.6,
            "mapping": {"label": 0}, "clamp": 256.0,
            "superresolution": {"channels": (8, 6), "resolution": 32, "factor": 2, "noise": "random"},
            "rig": {"radius": 1.7, "focal": 1.0254, "pivot": (0, 0, 0), "near": 0.1, "far": 2.6},
        })  # fmt: skip


def rays(generator, count=1):
    camera = generator.rig.camera(torch.linspace(-0.2, 0.3, count))
    origins, directions = camera.rays(generator.render_resolution)
    return origins, directions / directions.norm(dim=-1, keepdim=True)


# -- codes -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_camera_conditions_the_code():
    z, generator = torch.randn(2, 8, generator=seeded()), small()
    camera = generator.rig.camera(torch.tensor([0.5, -0.3]))
    frontal = generator.rig.camera(torch.zeros(2))
    assert_close(generator.mapping(z).ws, generator.mapping(z, camera=frontal).ws)
    assert not torch.allclose(generator.mapping(z).ws, generator.mapping(z, camera=camera).ws, atol=1e-3)
    for blind in (small(label_scale=0.0), small(mapping={"label": 0})):
        assert torch.equal(blind.mapping(z).ws, blind.mapping(z, camera=camera).ws)
    with pytest.raises(ValueError, match="1 cameras to condition 2 codes"):
        generator.mapping(z, camera=camera[0])


def test_codes_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"z must be \(B, 8\)"):
        small().mapping(torch.zeros(2, 9))


# -- field -----------------------------------------------------------------------------------------------------------


def test_the_released_planes_hold_xy_xz_and_zx():
    """Planes filled with 10 * column + row give back the coordinates they are read at."""
    generator, side = small(box=2.0), 64
    ramp = (torch.arange(side) + 0.5) / side * 2 - 1
    plane = (10 * ramp[None, :] + ramp[:, None]).expand(1, 6, side, side)
    x, y, z = points = torch.rand(3, 50, generator=seeded()) * 1.8 - 0.9
    found = generator.at(torch.cat([plane, 2 * plane, 4 * plane], 1), points.T[None])
    expected = ((10 * x + y) + 2 * (10 * x + z) + 4 * (10 * z + x)) / 3
    assert_close(found[0], expected[:, None].expand(-1, 6), atol=1e-4, rtol=0)
    assert (generator.at(plane.repeat(1, 3, 1, 1), torch.full((1, 1, 3), 1.1)) == 0).all()


# -- quadrature ------------------------------------------------------------------------------------------------------


def samples(count, generator):
    distance = torch.rand(1, 4, count, generator=generator, dtype=torch.float64) + 2
    colour = torch.rand(1, 4, count, 5, generator=generator, dtype=torch.float64)
    return Samples(distance, colour, torch.randn(1, 4, count, generator=generator, dtype=torch.float64) * 3)


def test_integration_against_a_loop():
    """Sort all samples, average neighbours, composite front to back."""
    noise = seeded()
    passes = [samples(6, noise), samples(5, noise)]
    pixels = integrate(passes)
    for ray in range(4):
        found = sorted(
            (float(p.distance[0, ray, i]), float(p.sigma[0, ray, i]), p.colour[0, ray, i])
            for p in passes
            for i in range(p.distance.shape[-1])
        )
        light, colour, depth = 1.0, torch.zeros(5, dtype=torch.float64), 0.0
        for (near, low, first), (far, high, second) in pairwise(found):
            alpha = 1 - math.exp(-math.log1p(math.exp((low + high) / 2 - 1)) * (far - near))
            colour += light * alpha * (first + second) / 2
            depth += light * alpha * (near + far) / 2
            light *= 1 - alpha
        assert_close(pixels.colour[0, ray], colour)
        assert float(pixels.alpha[0, ray]) == pytest.approx(1 - light)
        assert float(pixels.distance[0, ray]) == pytest.approx(depth / (1 - light))


def test_a_constant_medium_is_integrated_exactly():
    distance = torch.rand(1, 3, 9, generator=seeded(), dtype=torch.float64).sort(-1).values
    density = math.log1p(math.exp(0.7 - 1))
    total = segment_weights(distance, torch.full_like(distance, 0.7)).sum(-1)
    assert_close(total, 1 - torch.exp(-density * (distance[..., -1] - distance[..., 0])))


@torch.no_grad()
@pytest.mark.parametrize(("white_back", "empty"), [(False, -1.0), (True, 1.0)])
def test_an_empty_scene(white_back, empty):
    generator = small(white_back=white_back)
    generator.decoder.out.bias[0] = -200.0
    rendering = generator(generator.sample_z(1, seeded()), generator.rig.camera(0.1))
    assert (rendering.features == empty).all() and (rendering.raw == empty).all()
    assert not rendering.alpha.any() and not rendering.depth.any() and not rendering.normals.any()


@torch.no_grad()
def test_where_the_samples_are():
    generator = small()
    painted = torch.randn(1, 18, 16, 16, generator=seeded())
    origins, directions = rays(generator)
    coarse, fine = generator.march(painted, origins, directions)
    assert_close(coarse.distance[0, 0], torch.linspace(2.25, 3.3, 10))
    assert (fine.distance.diff(dim=-1) >= 0).all()
    ends = coarse.distance[..., [0, -1]].expand(-1, -1, -1)
    assert (fine.distance > ends[..., :1]).all() and (fine.distance < ends[..., 1:]).all()
    disparity = small(disparity=True).march(painted, origins, directions)[0].distance
    assert_close(disparity[0, 0], 1 / torch.linspace(1 / 2.25, 1 / 3.3, 10))


@torch.no_grad()
def test_the_second_pass_looks_where_something_is():
    """A wall at the origin draws most samples to it."""
    generator = small(coarse=24, fine=24)
    generator.decoder.forward = lambda features: (features, torch.where(features[..., 0] > 0.5, 200.0, -50.0))
    painted = torch.zeros(1, 18, 16, 16)
    painted[:, 6:12, :8] = 3.0  # the xz plane, rows of negative z
    fine = generator.march(painted, *rays(generator))[1]
    assert ((fine.distance - 2.7).abs() < 0.1).float().mean() > 0.6


@torch.no_grad()
def test_jitter():
    generator = small()
    ws, camera = generator.mapping(generator.sample_z(1, seeded())), generator.rig.camera(0.1)
    jitter = torch.rand(1, 256, 18, generator=seeded(1))
    image = generator.synthesis(ws, camera, randomness=jitter).image
    assert torch.equal(image, generator.synthesis(ws, camera, randomness=jitter).image)
    assert not torch.equal(image, generator.synthesis(ws, camera).image)
    with pytest.raises(ValueError, match=r"randomness must be uniform numbers of shape \(1, 256, 18\)"):
        generator.synthesis(ws, camera, randomness=jitter[:, :5])


@torch.no_grad()
def test_rays_do_not_depend_on_how_many_are_rendered_at_a_time(monkeypatch):
    generator = small()
    ws, camera = generator.mapping(generator.sample_z(2, seeded())), generator.rig.camera(torch.linspace(-0.3, 0.3, 4))
    jitter = torch.rand(4, 256, 18, generator=seeded(1))
    for randomness in (None, jitter):
        together = generator.synthesis(ws, camera, randomness=randomness)
        with monkeypatch.context() as patched:
            patched.setattr("models.generators.eg3d.CHUNK", 300)
            apart = generator.synthesis(ws, camera, randomness=randomness)
        assert_close(apart.features, together.features)
        assert_close(apart.depth, together.depth)


# -- super-resolution ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 4])
def test_super_resolution_takes_any_side(factor):
    network = SuperResolution(8, 6, channels=(8, 6), resolution=32, factor=factor)
    for side in (32 // factor, 5, 20):
        blocks = network(torch.rand(2, 6, side, side, generator=seeded()), torch.randn(2, 8, generator=seeded()))
        assert [image.shape[-1] for _, image in blocks] == [16, 32]


def test_refused_arguments():
    with pytest.raises(ValueError, match="factor must be 2 or 4, got 8"):
        small(superresolution={"factor": 8})
    with pytest.raises(ValueError, match=r"noise must be one of \('none', 'const', 'random'\), got 'some'"):
        small(superresolution={"noise": "some"})
    with pytest.raises(ValueError, match="coarse must be at least 4, got 3"):
        small(coarse=3)


# -- derivatives -----------------------------------------------------------------------------------------------------


def test_image_can_be_differentiated_twice():
    """R1 and path length. One pass: the choice of a second one's samples has no gradient on purpose."""
    generator = small(fine=0, coarse=4, render_resolution=4, channels=(4, 3), plane_features=3).double()
    camera = generator.rig.camera(0.2).to(torch.float64)
    ws = torch.randn(1, generator.num_ws, 16, dtype=torch.float64, generator=seeded()).requires_grad_()

    def summary(ws):
        rendering = generator.synthesis(Latents({"ws": ws}), camera)
        weights = torch.randn(rendering.image.shape, dtype=torch.float64, generator=seeded(2))
        assert rendering.alpha is not None and rendering.depth is not None
        return (rendering.image * weights).sum() + rendering.alpha.square().mean(), rendering.depth.mean()

    assert torch.autograd.gradcheck(summary, (ws,), fast_mode=True)
    assert torch.autograd.gradgradcheck(summary, (ws,), fast_mode=True)


def test_density_can_be_differentiated_twice():
    """Normals inside a loss."""
    generator = small().double()
    painted = torch.randn(1, 18, 8, 8, dtype=torch.float64, generator=seeded()).requires_grad_()
    points = (torch.rand(1, 6, 3, dtype=torch.float64, generator=seeded(1)) * 0.8 - 0.4).requires_grad_()

    def density(painted, points):
        found = generator.decode(generator.at(painted, points)).density
        assert found is not None
        return found

    assert torch.autograd.gradcheck(density, (painted, points), fast_mode=True)
    assert torch.autograd.gradgradcheck(density, (painted, points), fast_mode=True)
