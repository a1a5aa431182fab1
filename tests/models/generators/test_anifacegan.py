"""AniFaceGAN's generator."""

import inspect

import torch
from torch.testing import assert_close

from models.generators.anifacegan import AniFaceGANGenerator
from models.generators.gram import BOX, GRAMGenerator, unit_rays
from models.latents import Latents
from tests.models.generators.protocol import GeneratorContract, seeded

TINY = {
    "identity": 5, "expression": 4, "noise": 3, "latent": 6, "vae_width": 8, "vae_layers": 2, "deform_width": 12,
    "deform_layers": 2, "deform_mapping_width": 8, "resolution": 16, "width": 16, "layers": 4, "mapping_width": 16,
    "predictor_width": 32, "manifolds": 6, "box": 1.0, "levels": (200, 60), "centre": (0, 0, -12.5),
}  # fmt: skip


def make(**options):
    torch.manual_seed(0)
    return AniFaceGANGenerator(**TINY | options).eval()


class TestAniFaceGAN(GeneratorContract):
    excused = ("identity_vae.", "expression_vae.")  # trained on coefficients, not by rendering

    def make(self):
        return make()


@torch.no_grad()
def test_without_a_shift_it_is_gram_of_scaled_points():
    """Released networks scale what the scalar field gets twice, and the radiance network once."""
    generator, z = make(), torch.randn(2, 9)
    camera = generator.rig.camera([0.1, -0.2])
    ws = generator.mapping(z)
    options = {key: value for key, value in TINY.items() if key in inspect.signature(GRAMGenerator).parameters}
    plain = GRAMGenerator(z_dim=8, **options).eval()
    plain.load_state_dict({key: value for key, value in generator.state_dict().items() if key in plain.state_dict()})
    first = plain.predictor.hidden[0]
    first.weight.mul_(2 / BOX)
    first.bias.add_((first.weight - generator.predictor.hidden[0].weight) @ plain.predictor.centre)
    found, expected = generator.synthesis(ws, camera), plain.synthesis(Latents({"ws": ws.groups["ws"]}), camera)
    assert_close(found.image, expected.image, atol=1e-4, rtol=0)
    assert_close(found.alpha, expected.alpha, atol=1e-4, rtol=0)


@torch.no_grad()
def test_identity_steers_deformation_and_radiance():
    generator = make()
    torch.nn.init.normal_(generator.deformation.last.weight, std=0.02)
    ws, points = generator.mapping(torch.randn(1, 9)), torch.rand(1, 50, 3) * 0.1
    other = Latents({**ws.groups, "identity": ws.groups["identity"] + 1})
    shift, plain = generator.shift(ws, points, None), generator.shift(ws, points, torch.zeros(1, 4))
    assert torch.equal(shift, plain), "no expression is the neutral one"
    assert (generator.shift(other, points, None) - shift).abs().mean() > 1e-4
    assert (generator.shift(ws, points, torch.ones(1, 4)) - shift).abs().mean() > 1e-4
    moved = generator.canonical(ws, points, None)
    assert_close(moved, points + shift)
    plane = points.clone()
    plane[..., 2] = -0.12
    assert torch.equal(generator.canonical(ws, plane, None), plane), "the background plane stays"


@torch.no_grad()
def test_official_truncation_leaves_the_identity():
    generator = make()
    generator.update_mean(50)
    z = torch.randn(2, 9)
    full = generator.mapping(z)
    cut = generator.mapping(z, truncation=0.7, cutoff=generator.num_ws - 1)
    assert torch.equal(cut.groups["identity"], full.groups["identity"])
    assert_close(cut.groups["ws"], generator.mean + 0.7 * (full.groups["ws"] - generator.mean))


@torch.no_grad()
def test_random_expressions():
    generator = make()
    drawn = generator.sample_expression(3, seeded(1))
    assert drawn.shape == (3, 4) and torch.equal(drawn, generator.sample_expression(3, seeded(1)))
    mean, log_variance = generator.expression_vae.encode(drawn)
    assert mean.shape == log_variance.shape == (3, 6)


def test_pretrained_parts_are_frozen():
    assert not any(p.requires_grad for vae in (make().identity_vae, make().expression_vae) for p in vae.parameters())


def test_double_backward():
    torch.manual_seed(0)
    generator = make(width=4, layers=3, manifolds=4, samples=16, deform_width=4).double()
    torch.nn.init.normal_(generator.deformation.last.weight, std=0.02)
    camera = generator.rig.camera([0.2], [0.1])
    origins, directions, _ = unit_rays(type(camera)(camera.cam2world.double(), camera.intrinsics.double()), 2)
    codes = generator.mapping(torch.randn(1, 9).double()).detach()

    def render(ws, identity, expression):
        latents = Latents({"ws": ws, "identity": identity})
        surfaces = generator.surfaces(latents, origins, directions, expression)
        return generator.trace(latents, origins, directions, surfaces).colour

    inputs = [x.requires_grad_() for x in (*codes.groups.values(), torch.randn(1, 4).double())]
    assert torch.autograd.gradcheck(render, inputs)
    assert torch.autograd.gradgradcheck(render, inputs)
