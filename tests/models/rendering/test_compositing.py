"""Compositing, volume quadrature, resampling and normals against loops and closed forms."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from models.camera import Rig
from models.rendering.compositing import (
    composite_layers,
    density_alpha,
    depth_normals,
    field_gradient,
    field_normals,
    layer_weights,
    resample,
    sample_edges,
    stratified_depths,
    uniform,
    widen,
)

RIG = Rig()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layers(batch: int = 2, rays: int = 5, count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    noise = seeded()
    options = {"generator": noise, "dtype": torch.float64}
    colour = torch.rand(batch, rays, count, 3, **options) * 2 - 1
    alpha = torch.rand(batch, rays, count, 1, **options)
    depth = (torch.rand(batch, rays, count, 1, **options) + 1).cumsum(2)
    return colour, alpha, depth


def test_composite_against_a_loop():
    colour, alpha, depth = layers()
    alpha[0, 0] = 0.0  # an empty ray
    alpha[0, 1, 2] = 1.0  # an opaque layer hides what is behind it
    blended, total, expected = composite_layers(colour, alpha, depth)
    for b in range(2):
        for p in range(5):
            light, c, z, w = 1.0, torch.zeros(3, dtype=torch.float64), 0.0, 0.0
            for i in range(6):
                a = float(alpha[b, p, i, 0])
                c = c + light * a * colour[b, p, i]
                z += light * a * float(depth[b, p, i, 0])
                w += light * a
                light *= 1 - a
            assert_close(blended[b, p], c)
            assert float(total[b, p, 0]) == pytest.approx(w)
            assert float(expected[b, p, 0]) == pytest.approx(z / w if w else 0.0)
    assert_close(total[0, 1, 0], torch.tensor(1.0, dtype=torch.float64))


def test_weights_and_transmittance_sum_to_one():
    alpha = layers()[1]
    assert_close(layer_weights(alpha).sum(2) + (1 - alpha).prod(2), torch.ones(2, 5, 1, dtype=torch.float64))


def test_composite_gradients():
    colour, alpha, depth = (x[:1, :2, :4].requires_grad_() for x in layers())
    assert torch.autograd.gradcheck(composite_layers, (colour, alpha, depth))
    assert torch.autograd.gradgradcheck(composite_layers, (colour, alpha, depth))


@pytest.mark.parametrize("opaque", [0.0, 1.0])
def test_composite_gradients_are_finite_at_the_limits(opaque):
    colour, alpha, depth = layers()
    alpha = torch.full_like(alpha, opaque).requires_grad_()
    sum(x.sum() for x in composite_layers(colour, alpha, depth)).backward()
    assert alpha.grad.isfinite().all()


@pytest.mark.parametrize("jittered", [False, True])
@pytest.mark.parametrize("density", [0.05, 0.7, 4.0])
def test_a_constant_slab_is_integrated_exactly(density, jittered):
    """alpha = 1 - exp(-sigma L) wherever the samples are, along slanted rays too."""
    near, far, count = 2.0, 3.5, 7
    slope = torch.tensor([1.0, 1.3], dtype=torch.float64).reshape(1, 2, 1, 1)  # length of the direction
    jitter = uniform((1, 2, count), seeded() if jittered else None, "cpu").double()
    depth = stratified_depths((1, 2), count, near, far, jitter)
    alpha = density_alpha(
        torch.full((1, 2, count, 1), density, dtype=torch.float64),
        sample_edges(depth, near, far).diff(dim=-1)[..., None] * slope,
    )
    _, total, _ = composite_layers(torch.ones(1, 2, count, 3, dtype=torch.float64), alpha, depth[..., None])
    assert_close(total[..., 0], 1 - torch.exp(-density * (far - near) * slope[..., 0, 0]))


def test_slab_depth_converges_to_the_closed_form():
    """Expected depth in a constant medium of length L: near + 1 / sigma - L / (exp(sigma L) - 1)."""
    near, far, sigma = 1.0, 4.0, 1.2
    truth = near + 1 / sigma - (far - near) / math.expm1(sigma * (far - near))
    errors = []
    for count in (8, 16, 32):
        depth = stratified_depths((1, 1), count, near, far, torch.full((1, 1, count), 0.5, dtype=torch.float64))
        length = sample_edges(depth, near, far).diff(dim=-1)[..., None]
        alpha = density_alpha(torch.full_like(length, sigma), length)
        _, _, expected = composite_layers(alpha.expand(-1, -1, -1, 3), alpha, depth[..., None])
        errors.append(abs(float(expected) - truth))
    assert errors[0] / errors[1] > 3.5 and errors[1] / errors[2] > 3.5  # second order
    assert errors[2] < 2e-3


def test_stratified_depths_have_one_sample_a_piece():
    depth = stratified_depths((2, 50), 8, 1.0, 3.0, uniform((2, 50, 8), seeded(), "cpu"))
    piece = ((depth - 1.0) / 0.25).floor()
    assert (piece == torch.arange(8.0)).all()


def test_resampling_follows_the_weights():
    edges = torch.tensor([0.0, 1.0, 3.0, 4.0, 8.0]).expand(1, 1, 5)
    weights = torch.tensor([0.1, 0.4, 0.0, 0.5]).expand(1, 1, 4)
    found = resample(edges, weights, torch.rand(1, 1, 20_000, generator=seeded()))
    assert (found.diff(dim=-1) >= 0).all()
    counts = torch.histogram(found.flatten(), bins=edges.flatten())[0] / 20_000
    assert_close(counts, weights.flatten(), atol=1e-3, rtol=0)
    inside = found[(found > 4) & (found < 8)]
    assert float(inside.mean()) == pytest.approx(6.0, abs=0.02)  # even within a piece


def test_resampling_inverts_the_cdf_by_hand():
    edges = torch.tensor([[[0.0, 1.0, 2.0]]])
    found = resample(edges, torch.tensor([[[1.0, 3.0]]]), torch.full((1, 1, 2), 0.5))
    # u = .25 and .75 of a CDF that reaches .25 at depth 1 and 1 at depth 2
    assert_close(found, torch.tensor([[[1.0, 1 + 2 / 3]]]), atol=1e-4, rtol=0)


def test_resampling_an_empty_ray_is_even_and_carries_no_gradient():
    edges = torch.linspace(0, 1, 5).expand(1, 1, 5)
    weights = torch.zeros(1, 1, 4, requires_grad=True)
    found = resample(edges, weights, torch.full((1, 1, 4), 0.5))
    assert_close(found, torch.tensor([[[0.125, 0.375, 0.625, 0.875]]]))
    assert not found.requires_grad


def test_widen_reaches_both_neighbours():
    found = widen(torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0]]]))
    assert_close(found, torch.tensor([[[0.01, 0.51, 1.01, 0.51, 0.01]]]))


def test_uniform_numbers():
    before = torch.get_rng_state()
    assert torch.equal(uniform((2, 3), seeded(4), "cpu"), uniform((2, 3), seeded(4), "cpu"))
    assert (uniform((2,), None, "cpu") == 0.5).all()
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="uniform numbers of shape"):
        uniform((2, 3), torch.zeros(3, 2), "cpu")


# -- normals -------------------------------------------------------------------------------------------------------


def sphere(camera, side: int, radius: float = 1.0):
    """Analytic depth (B, 1, H, W), mask and outward normals (B, 3, H, W) of a sphere at the pivot."""
    origins, directions = camera.rays(side)
    centre = torch.tensor(RIG.pivot)
    square, slope = directions.square().sum(-1), ((origins - centre) * directions).sum(-1)
    root = slope.square() - square * ((origins - centre).square().sum(-1) - radius**2)
    hit = root > 0
    depth = torch.where(hit, (-slope - root.clamp_min(0).sqrt()) / square, 0.0)
    normals = F.normalize(origins + depth[..., None] * directions - centre, dim=-1) * hit[..., None]
    return (x.mT.unflatten(2, (side, side)) for x in (depth[..., None], hit[..., None].float(), normals))


def angles(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return torch.rad2deg(torch.acos((found * truth).sum(1).clamp(-1, 1)))


def test_depth_normals_of_a_sphere():
    camera = RIG.camera(torch.tensor([0.0, 0.6]), torch.tensor([0.0, -0.3]))
    depth, alpha, truth = sphere(camera, 96)
    found = depth_normals(depth, alpha, camera)
    hit = alpha[:, 0] > 0
    error = angles(found, truth)[hit]
    assert error.median() < 0.1 and error.mean() < 1.0 and error.max() < 20  # one-sided at the silhouette
    assert (found.transpose(0, 1)[:, ~hit] == 0).all()
    assert_close(found.norm(dim=1)[hit], torch.ones(int(hit.sum())))


def test_depth_normals_ignore_what_is_transparent():
    """Haze in front of the sphere, one part in a thousand, must not bend its silhouette."""
    camera = RIG.camera(0.0)
    depth, alpha, _ = sphere(camera, 48)
    clean = depth_normals(depth, alpha, camera)
    hazy = depth_normals(torch.where(alpha > 0, depth, 5.5), alpha.clamp_min(1e-3), camera)
    solid = alpha[:, 0] > 0
    error = angles(hazy, clean)[solid]
    assert error.max() < 10 and error.mean() < 0.5


def test_depth_normals_of_a_lonely_pixel_face_the_camera():
    camera = RIG.camera(0.3)
    alpha = torch.zeros(1, 1, 9, 9)
    alpha[..., 4, 4] = 0.5
    normals = depth_normals(alpha * 14.0, alpha, camera)
    assert_close(normals[0, :, 4, 4], -camera.forward[0])
    assert normals.abs().sum() == normals[0, :, 4, 4].abs().sum()


def test_depth_normals_are_fp32_under_autocast_and_differentiable():
    camera = RIG.camera(0.3)
    depth, alpha, _ = sphere(camera, 24)
    expected = depth_normals(depth, alpha, camera)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(depth_normals(depth, alpha, camera), expected, atol=0, rtol=0)
    depth.requires_grad_()
    depth_normals(depth, alpha, camera).sum().backward()
    assert depth.grad.isfinite().all() and depth.grad.abs().max() > 0


@pytest.mark.parametrize("outward", [1.0, -1.0])
def test_field_normals_of_a_sphere(outward):
    points = F.normalize(torch.randn(2, 30, 3, generator=seeded()), dim=-1) * 0.8

    def field(p):  # a signed distance, or a density that falls outwards
        return outward * (p.norm(dim=-1, keepdim=True) - 0.5)

    with torch.no_grad():
        found = field_normals(field, points, outward=outward)
    assert_close(found, points / 0.8, atol=1e-6, rtol=0)
    assert not found.requires_grad


def test_field_gradient_stays_fp32_under_autocast():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Softplus(), torch.nn.Linear(16, 1))
    points = torch.randn(1, 20, 3, generator=seeded())
    value, gradient = field_gradient(network, points)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        again = field_gradient(network, points)
    assert torch.equal(again[0], value) and torch.equal(again[1], gradient)


def test_field_gradient_supports_an_eikonal_loss():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Softplus(), torch.nn.Linear(8, 1)).double()
    points = torch.randn(1, 4, 3, generator=seeded(), dtype=torch.float64)
    _, gradient = field_gradient(network, points, create_graph=True)
    ((gradient.norm(dim=-1) - 1) ** 2).mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert network[0].weight.grad.abs().max() > 0
