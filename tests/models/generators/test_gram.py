"""GRAM's generator."""

import math

import pytest
import torch
from torch.testing import assert_close

from models.generators.gram import GRAMGenerator, Surfaces, grid_focal, sphere_camera, unit_rays
from models.latents import Latents
from tests.models.generators.protocol import GeneratorContract, seeded

TINY = {
    "z_dim": 8, "resolution": 16, "width": 16, "layers": 4, "mapping_width": 16, "predictor_width": 32,
    "manifolds": 6, "samples": 24, "box": 1.0,  # a large box makes the random field smooth enough for 16 pixels
}  # fmt: skip


class TestPortraits(GeneratorContract):
    """As of FFHQ: a background plane."""

    def make(self):
        return GRAMGenerator(**TINY)

    def make_still(self):
        return self.make()


class TestObjects(GeneratorContract):
    """As of CARLA: a white background and a larger object."""

    def make(self):
        return GRAMGenerator(
            **TINY | {"box": 4.0}, background=False, white_back=True, centre=(0, 0, 0), levels=(30, 6), delta=0.02,
            fov=30.0, near=0.7, far=1.3,
        )  # fmt: skip


def small(**options):
    torch.manual_seed(0)
    return GRAMGenerator(**{**TINY, "resolution": 8, "manifolds": 4, "width": 6, "layers": 3, **options}).eval()


def traced(generator, ws, side=8):
    origins, directions, length = unit_rays(generator.rig.camera([0.2], [0.1]), side)
    surfaces = generator.surfaces(ws, origins, directions)
    return generator.trace(ws, origins, directions, surfaces), surfaces, length


def test_rig_renders_the_official_grid():
    """NDC from -1 to 1 with both ends, at distance 1 / tan(fov / 2); phi from +y, theta from +x towards +z."""
    side, phi, theta = 6, torch.tensor([1.3]), torch.tensor([1.9])
    origins, directions, _ = unit_rays(sphere_camera(phi, theta, 12.0, side), side)
    position = torch.stack([phi.sin() * theta.cos(), phi.cos(), phi.sin() * theta.sin()], -1)
    assert_close(origins[:, 0], position)
    right = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([[0.0, 1.0, 0.0]]), position), dim=-1)
    up = torch.linalg.cross(position, right)
    reach = math.tan(math.radians(6))
    for pixel, (x, y) in {0: (-1, 1), side - 1: (1, 1), side * side - 1: (1, -1)}.items():
        expected = torch.nn.functional.normalize(reach * (x * right + y * up) - position, dim=-1)
        assert_close(directions[:, pixel], expected, atol=1e-6, rtol=0)
    assert small().rig.focal == grid_focal(12.0, 8)


def test_folded_styles_are_film():
    """phi(x) = sin(gain (W x + b) + phase) in the trunk and in the view layer, heads summed (pi-GAN; GRAM)."""
    generator = small().double()
    field, width = generator.field, 6
    ws, x, d = torch.randn(2, 4, 12).double(), torch.rand(2, 5, 3).double(), torch.rand(2, 5, 3).double()

    def film(layer, x, w):
        return torch.sin((15 * w[:, None, :width] + 30) * layer(x) + w[:, None, width:])

    h, total = x * 2 / TINY["box"], 0
    for index, layer in enumerate(field.layers):
        h = film(layer, h, ws[:, index])
        if index:
            seen = film(field.view, torch.cat([d, h], -1), ws[:, -1]) if index == 2 else h
            total = total + torch.cat([field.colour[index - 1](seen), field.density[index - 1](h)], -1)
    assert_close(field(field.modulate(ws), x, d), total)


def test_double_backward():
    generator = small().double()
    camera = generator.rig.camera([0.2], [0.1])
    origins, directions, _ = unit_rays(type(camera)(camera.cam2world.double(), camera.intrinsics.double()), 2)
    ws = generator.mapping(torch.randn(1, 8).double()).ws.detach()

    def render(ws, origins):
        codes = Latents({"ws": ws})
        return generator.trace(codes, origins, directions, generator.surfaces(codes, origins, directions)).colour

    inputs = ws.requires_grad_(), origins.contiguous().requires_grad_()
    assert torch.autograd.gradcheck(render, inputs)
    assert torch.autograd.gradgradcheck(render, inputs)


@torch.no_grad()
def test_backgrounds():
    ws = Latents({"ws": torch.randn(1, 4, 12)})
    black, white = (traced(small(background=False, white_back=w), ws)[0] for w in (False, True))
    assert_close(white.colour - black.colour, 2 * black.missed[..., None].expand(-1, -1, 3))
    last, surfaces, _ = traced(small(background=False, last_back=True), ws)
    assert_close(last.weights.sum(-1), torch.ones_like(last.missed))
    assert_close(last.weights[..., :-1], black.weights[..., :-1])
    (_, weights, missed), surfaces, _ = traced(small(), ws)
    assert missed.abs().max() < 1e-6, "the background plane stops everything"
    assert (surfaces.plane.sum(-1) == 1).all()
    plain, _, _ = traced(small(white_plane=True), ws)
    assert_close(plain.weights, weights)
    share = (weights * surfaces.plane).sum(-1)
    assert plain.colour[share > 0.9].min() > 0.6


@torch.no_grad()
def test_surfaces_that_are_not_there_change_nothing():
    generator = small()
    ws = Latents({"ws": torch.randn(1, 4, 12)})
    (colour, weights, _), surfaces, _ = traced(generator, ws)
    assert not surfaces.valid.all() and (weights[~surfaces.valid] == 0).all()
    origins, directions, _ = unit_rays(generator.rig.camera([0.2], [0.1]), 8)
    moved = Surfaces(surfaces.distance + 0.05 * ~surfaces.valid, surfaces.valid, surfaces.plane)
    assert_close(generator.trace(ws, origins, directions, moved).colour, colour)


def test_crossings_are_cached_until_the_scalar_field_changes():
    generator = small()
    camera, ws = generator.rig.camera([0.0, 0.3]), generator.mapping(torch.randn(2, 8))
    asked = []
    generator.predictor.register_forward_pre_hook(lambda *_: asked.append(1))
    with torch.no_grad():
        first = generator.synthesis(ws, camera).image
        generator.synthesis(ws, camera[:1].repeat_interleave(2))
        assert len(asked) == 2 and torch.equal(generator.synthesis(ws, camera).image, first)
        generator.predictor.last.bias += 3
        assert not torch.equal(generator.synthesis(ws, camera).image, first) and len(asked) == 4
    learning = generator.synthesis(ws, camera).image  # never from the cache: the scalar field gets its gradient
    (gradient,) = torch.autograd.grad(learning.sum(), generator.predictor.last.bias)
    assert len(asked) == 5 and gradient.abs() > 0


@torch.no_grad()
def test_autocast_leaves_the_field_alone():
    generator, z, points = small(), torch.randn(1, 8), torch.rand(1, 5, 3) * 0.1

    def asked():
        ws = generator.mapping(z)
        features = generator.features(ws, points)
        return ws.ws, features, generator.decode(features, points).colour

    expected = asked()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(asked(), expected, strict=True))


@torch.no_grad()
def test_locked_view_is_along_z():
    free, locked = small(), small(lock_view=True)
    sample = free.features(free.mapping(torch.randn(1, 8)), torch.zeros(1, 3, 3))
    along_x, ahead = torch.tensor([1.0, 0, 0]).expand(1, 3, 3), torch.tensor([0, 0, -1.0]).expand(1, 3, 3)
    assert_close(locked.decode(sample, along_x).colour, free.decode(sample, ahead).colour)
    assert_close(free.decode(sample).colour, free.decode(sample, ahead).colour)
    assert (free.decode(sample, along_x).colour - free.decode(sample).colour).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("clamps", [("softplus", "widen_sigmoid"), ("relu", "sigmoid"), ("none", "none")])
def test_clamps(clamps):
    generator, logits = small(density_clamp=clamps[0], colour_clamp=clamps[1]), torch.randn(1, 9, 4)
    sample, colour, density = generator.activate(logits), logits[..., :3], logits[..., 3:]
    rgb = {"widen_sigmoid": colour.sigmoid() * 1.002 - 0.001, "sigmoid": colour.sigmoid(), "none": colour}[clamps[1]]
    assert_close(sample.colour, 2 * rgb - 1)
    assert_close(
        sample.density, {"softplus": density.exp().log1p(), "relu": density.relu(), "none": density}[clamps[0]]
    )


@pytest.mark.parametrize("name", ["density_clamp", "colour_clamp"])
def test_unknown_clamps_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        small(**{name: "tanh"})


def test_wrong_z_is_refused():
    with pytest.raises(ValueError, match="z must be"):
        small().mapping(torch.zeros(2, 7))


@torch.no_grad()
def test_scalar_field_starts_as_a_sphere():
    """Ten times the distance from the centre, in units of half the box."""
    torch.manual_seed(0)
    field = GRAMGenerator(predictor_width=256).predictor
    points = torch.randn(400, 3, generator=seeded()) * 0.1
    distance = 10 * (points / 0.12 - torch.tensor([0.0, 0.0, -1.5])).norm(dim=-1)
    assert (field(points) / distance - 1).abs().mean() < 0.15
