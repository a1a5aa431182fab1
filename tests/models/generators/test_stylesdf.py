"""StyleSDF and its discriminator against the protocol, and their gradients."""

import functools
import math

import pytest
import torch
from torch.testing import assert_close

from models.generators.stylesdf import StyleSDF, VolumeDiscriminator, camera_directions
from models.latents import Latents
from models.rendering.compositing import field_gradient
from tests.models.generators.protocol import DiscriminatorContract, GeneratorContract, awaken, seeded

DECODER = {"channels": (16, 8), "w_dim": 10, "mapping_layers": 2, "lr_multiplier": 1.0}
RADIUS = 0.08


def small(**options):
    settings = {"z_dim": 6, "width": 16, "depth": 2, "mapping_layers": 2, "raw_resolution": 16, "samples": 16}
    return StyleSDF(**(settings | options))


@functools.cache
def ball():
    """Weights of a small renderer whose heads are balls with a crisp surface."""
    torch.manual_seed(0)
    generator, draws = awaken(small()), seeded()
    trained = [*generator.field.trunk.parameters(), *generator.field.distance.parameters()]
    with torch.no_grad():
        generator.field.trunk[0].weight.mul_(0.2)  # a smooth start
    for step in range(200):
        points = (torch.rand(4, 100, 3, generator=draws) - 0.5) * 0.24
        found = generator.surface(generator.mapping(generator.sample_z(4, draws)), points)
        loss = (found - points.norm(dim=-1, keepdim=True) + RADIUS).square().mean()
        slopes = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for parameter, slope in zip(trained, slopes, strict=True):
                parameter.sub_(3e-3 * (1 - step / 200) * slope.sign())
    torch.nn.init.constant_(generator.beta, 0.004)
    return generator.state_dict()


class BallContract(GeneratorContract):
    random = True
    options = {}

    def make(self):
        return small(**self.options)

    @pytest.fixture
    def generator(self):
        torch.manual_seed(0)
        generator = awaken(self.make()).eval()
        generator.load_state_dict(ball(), strict=False)
        generator.update_mean(64)
        return generator


class TestRenderer(BallContract):
    pass


class TestPipeline(BallContract):
    options = {"decoder": DECODER}
    bounded = False
    free_resolution = False
    excused = ("field.colour",)  # of the rendered picture, which the decoder does not see

    @torch.no_grad()
    def test_truncation(self, generator):
        """Decoder codes are truncated twice: what they are made from, and they themselves."""
        z = generator.sample_z(2, seeded())
        mean, full = generator.mean_latents, generator.mapping(z)
        half = generator.mapping(z, truncation=0.5)
        renderer = (mean.groups["renderer"] + full.groups["renderer"]) / 2
        decoder = (mean.groups["decoder"][:, :1] + generator.decoder.map_network(renderer[:, :1])) / 2
        assert_close(half.groups["renderer"], renderer)
        assert_close(half.groups["decoder"], decoder.expand(-1, 4, -1))
        for name, value in generator.mapping(z, truncation=0.0).groups.items():
            assert_close(value, mean.groups[name].expand_as(value))
        cut = generator.mapping(z, truncation=0.5, cutoff=5)
        assert_close(cut.groups["renderer"], renderer)
        assert_close(cut.groups["decoder"][:, :2], decoder.expand(-1, 2, -1))
        assert_close(cut.groups["decoder"][:, 2:], full.groups["decoder"][:, 2:])

    @torch.no_grad()
    def test_missing_codes(self, generator):
        """Decoder codes are made of the renderer's, as the mapping does; without either there are the mean ones."""
        full, mean = generator.mapping(generator.sample_z(3, seeded())), generator.mean_latents
        found = generator.complete(Latents({"renderer": full.groups["renderer"]}))
        assert list(found.groups) == ["renderer", "decoder"]
        assert_close(found.groups["decoder"], full.groups["decoder"])
        differing = full.groups["renderer"] + torch.tensor([0.3, -0.3, 0.0])[:, None]  # their mean is the same
        found = generator.complete(Latents({"renderer": differing}))
        assert_close(found.groups["renderer"], differing)
        assert_close(found.groups["decoder"], full.groups["decoder"])
        found = generator.complete(Latents({"decoder": full.groups["decoder"]}))
        assert_close(found.groups["renderer"], mean.groups["renderer"].expand(3, -1, -1))
        assert list(found.groups) == ["renderer", "decoder"]
        assert all(found is own for found, own in zip(
            generator.complete(full).groups.values(), full.groups.values(), strict=True
        ))  # fmt: skip


class TestDensity(GeneratorContract):
    """Without signed distances, moving directions, samples each in its interval, and no opaque end."""

    random = True

    def make(self):
        options = ("signed_distance", "offset_sampling", "normalize_points", "static_directions", "opaque_end")
        return small(**dict.fromkeys(options, False))

    def test_normals_agree_with_depth_where_smooth(self, generator):
        """An awakened field is fog, whose expected depth is no surface."""
        points = torch.zeros(2, 1, 3)
        assert generator.decode(generator.features(self.latents(generator), points)).sdf is None


class TestVolumeDiscriminator(DiscriminatorContract):
    pose = True

    def make(self):
        return VolumeDiscriminator((8, 12, 12, 16))


class TestPoselessDiscriminator(DiscriminatorContract):
    def make(self):
        return VolumeDiscriminator((8, 8), pose=False)


@pytest.fixture(scope="module")
def generator():
    generator = small(decoder=DECODER)
    generator.load_state_dict(ball(), strict=False)
    return awaken(generator).eval()


@torch.no_grad()
def test_a_ball_is_seen_where_it_is():
    generator = small(samples=128, raw_resolution=17)
    generator.load_state_dict(ball())
    found = generator.synthesis(generator.mapping(generator.sample_z(1, seeded())), generator.rig.camera(0.3, 0.1))
    assert found.alpha[0, 0, 8, 8] > 0.95 and found.alpha[0, 0, 0, 0] < 0.05
    assert abs(found.depth[0, 0, 8, 8] - (1 - RADIUS)) < 0.02
    towards = generator.rig.camera(0.3, 0.1).position[0]
    assert found.normals[0, :, 8, 8] @ towards > 0.9


@torch.no_grad()
@torch.enable_grad()
def test_a_surface_is_never_inside_out():
    """What learning does to beta leaves densities those of a thin surface at worst, and their gradients finite."""
    generator = small()
    raw = torch.tensor([-0.1, -1e-5, 0.0, 1e-5, 0.1], requires_grad=True)
    expected = [1e5, 1e5 / (1 + math.exp(-1)), 5e4, 1e5 / (1 + math.exp(1)), 0]
    for beta in (1e-5, 0.0, -0.03):
        torch.nn.init.constant_(generator.beta, beta)
        density = generator.density(raw)
        assert_close(density, torch.tensor(expected))
        assert torch.autograd.grad(density.sum(), raw)[0].isfinite().all()
    torch.nn.init.constant_(generator.beta, 0.5)
    assert_close(generator.density(raw), torch.sigmoid(-2 * raw) * 2)


def test_groups_of_parameters():
    groups = small(decoder=DECODER).parameter_groups()
    assert list(groups) == ["renderer", "decoder", "beta"] and len(groups["beta"].parameters) == 1
    assert list(small(signed_distance=False).parameter_groups()) == ["renderer"]


def test_portions_change_nothing(monkeypatch):
    generator = small(decoder=DECODER)
    ws, camera = generator.mapping(generator.sample_z(2, seeded())), generator.rig.camera(torch.tensor([0.1, -0.3]))
    whole = generator.synthesis(ws, camera)
    monkeypatch.setattr("models.generators.stylesdf.PORTION", {"cpu": 600})
    parts = generator.synthesis(ws, camera)
    for name in ("image", "raw", "depth", "alpha", "normals", "features"):
        assert_close(getattr(parts, name), getattr(whole, name), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_given_jitter_moves_the_samples_of_a_ray_together():
    generator = small()
    jitter = torch.rand(2, 16, 16, generator=seeded())
    depths = generator.sample_depths(2, 16, jitter, jitter.device)
    assert_close(depths[..., 0], 0.88 + 0.24 / 16 * jitter)
    assert_close(depths.diff(dim=-1), torch.full((2, 16, 16, 15), 0.24 / 16), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="randomness must be uniform numbers"):
        generator.sample_depths(2, 16, jitter[:1], jitter.device)


def test_static_directions_turn_with_the_camera():
    camera = small().rig.camera(torch.tensor([0.0, 0.7]), 0.2)
    local = camera_directions(camera, 4)
    assert_close(local[0], local[1])
    world = local * torch.tensor([1.0, -1.0, -1.0]) @ camera.cam2world[:, :3, :3].mT
    assert_close(world, camera.rays(4)[1])


def test_distances_differentiate_twice():
    """Of an eikonal loss: the gradient with respect to points and codes, and its own."""
    generator = small(width=5).double()
    draws = torch.Generator().manual_seed(0)
    points = (torch.rand(1, 3, 3, generator=draws, dtype=torch.float64) - 0.5).mul(0.1).requires_grad_()
    codes = torch.randn(1, 3, 5, generator=draws, dtype=torch.float64).requires_grad_()

    def distance(points, codes):
        return generator.surface(Latents({"renderer": codes}), points)

    assert torch.autograd.gradcheck(distance, (points, codes))
    assert torch.autograd.gradgradcheck(distance, (points, codes))


def test_renderings_differentiate_twice():
    generator = small(width=5, depth=1, raw_resolution=2, samples=3, decoder={**DECODER, "channels": (3,)}).double()
    camera = generator.rig.camera(0.1).to(torch.float64)
    draws = torch.Generator().manual_seed(0)
    codes = torch.randn(1, 2, 5, generator=draws, dtype=torch.float64).requires_grad_()
    styles = torch.randn(1, 2, 10, generator=draws, dtype=torch.float64).requires_grad_()

    def render(codes, styles):
        found = generator.synthesis(Latents({"renderer": codes, "decoder": styles}), camera)
        return found.raw, found.features

    assert torch.autograd.gradcheck(render, (codes, styles))
    assert torch.autograd.gradgradcheck(render, (codes, styles))


def test_eikonal_term():
    generator = small()
    generator.load_state_dict(ball())
    ws = generator.mapping(generator.sample_z(1, seeded())).detach()
    points = ((torch.rand(1, 64, 3, generator=seeded(1)) - 0.5) * 0.2).requires_grad_()
    _, gradient = field_gradient(lambda p: generator.surface(ws, p), points, create_graph=True)
    lengths = gradient.norm(dim=-1)
    assert abs(lengths.mean() - 1) < 0.25
    (lengths - 1).square().mean().backward()
    grads = [p.grad for p in generator.field.trunk.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads) and sum(g.abs().sum() for g in grads) > 0


def test_discriminator_differentiates_twice():
    discriminator = VolumeDiscriminator((2, 3)).double()
    image = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def judge(image):
        x = torch.nn.functional.leaky_relu(discriminator.stem(image), 0.2)
        return discriminator.out(discriminator.blocks[0](x))

    assert torch.autograd.gradcheck(judge, image) and torch.autograd.gradgradcheck(judge, image)
