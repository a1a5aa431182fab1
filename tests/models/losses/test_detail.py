"""Losses of the detail stage against loops in float64."""

from itertools import pairwise

import pytest
import torch

from models.generators.manifold import ManifoldGenerator
from models.losses.detail import depth_loss, layer_normals, novel_view_loss, unseen
from models.rendering.compositing import depth_normals
from tests.models.generators.protocol import seeded


def rays(batch=2, count=6, layers=5):
    """Opacities, ascending depths and gaps of rays that meet layers."""
    draws = seeded(3)
    alpha = torch.rand(batch, count, layers, 1, generator=draws, dtype=torch.float64)
    depth = 6 + torch.rand(batch, count, layers, generator=draws, dtype=torch.float64).cumsum(2)
    valid = torch.rand(batch, count, layers, generator=draws) > 0.3
    valid[0, 0], valid[0, 1] = False, True
    valid[0, 2] = torch.tensor([False, True, False, False, False])
    return alpha, depth, valid


def test_normals_against_a_loop():
    """Eq. 9, with the gradient of a known field."""
    _, _, valid = rays()
    points = torch.randn(2, 6, 5, 3, generator=seeded(4), dtype=torch.float64)
    ways = torch.randn(2, 3, generator=seeded(5), dtype=torch.float64)

    def opacity(points):
        return torch.sigmoid((points * ways[:, None]).sum(2, keepdim=True) + points[..., :1].square())

    found = layer_normals(opacity, points, valid)
    for b in range(2):
        for r in range(6):
            total, clear = torch.zeros(3, dtype=torch.float64), 1.0
            for i in range(5):
                x = points[b, r, i]
                alpha = 1 / (1 + torch.exp(-(x @ ways[b]) - x[0] ** 2))
                slope = alpha * (1 - alpha) * (ways[b] + 2 * x[0] * torch.eye(3, dtype=torch.float64)[0])
                if valid[b, r, i]:
                    total -= clear * alpha * slope
                    clear *= 1 - alpha
            expected = total / total.norm() if valid[b, r].any() else total
            torch.testing.assert_close(found[b, r], expected)


def test_normals_are_of_full_precision_without_gradient():
    points = torch.randn(1, 2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = layer_normals(lambda p: torch.sigmoid(p @ torch.ones(3, 1)), points, torch.ones(1, 2, 3) > 0)
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, torch.full((1, 2, 3), -(3**-0.5)))


def test_normals_of_a_head_agree_with_its_depth():
    """A ball whose inner half is opaque: opacity and depth tell the same surface."""
    torch.manual_seed(0)
    generator = ManifoldGenerator(
        z_dim=4, w_dim=8, resolution=32, channels=[8, 8], start=8, mapping_hidden=8, background="none",
        levels=[0.15, 0.1, 0.05, 0.0, -0.05], predictor={"hidden": 8, "grid": 64}, samples=64,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for out in generator.backbone.outs:
            out.weight.zero_()
        generator.backbone.out_bias[6::4] = torch.linspace(-6, 6, 5)
    ws, camera = generator.mapping(torch.zeros(1, 4)).detach(), generator.rig.camera(0.3, 0.1)
    seen = generator.synthesis(ws, camera)
    hits = generator.crossings(camera, 32)

    def opacity(points):
        return generator.decode(generator.features(ws, points)).occupancy

    normals = layer_normals(opacity, hits.points(camera, 32), hits.valid)
    normals = hits.scatter(normals, 32 * 32).mT.unflatten(2, (32, 32))
    solid = seen.alpha > 0.99
    outwards = torch.nn.functional.normalize(
        seen.depth * camera.rays(32)[1].mT.unflatten(2, (32, 32)) + camera.position[:, :, None, None], dim=1
    )
    for name, found in (("opacity", normals), ("depth", depth_normals(seen.depth, seen.alpha, camera))):
        cosine = (found * outwards).sum(1, keepdim=True)[solid]
        assert cosine.mean() > 0.95, name
    assert solid.sum() > 100


def test_mask_is_what_turns_away_from_the_photo():
    camera = ManifoldGenerator(z_dim=4, channels=[8, 8], start=8).rig.camera(torch.tensor([0.0, 0.6]))
    angles = torch.linspace(-3.1, 3.1, 8)
    normals = torch.stack([angles.sin(), torch.zeros(8), angles.cos()])[:, None].expand(2, 3, 1, 8)
    mask = unseen(normals, camera, 0.1)
    expected = torch.cos(angles - torch.tensor([[0.0], [0.6]])) < 0.1
    assert torch.equal(mask[:, 0, 0] > 0, expected)
    assert unseen(torch.zeros(2, 3, 1, 1), camera).all(), "the background counts as unseen"


def test_novel_view_term_sees_the_mask_only():
    final = torch.randn(2, 3, 4, 4, generator=seeded(), requires_grad=True)
    coarse = torch.randn(2, 3, 4, 4, generator=seeded(1), requires_grad=True)
    mask = (torch.rand(2, 1, 4, 4, generator=seeded(2)) > 0.5).float()
    loss = novel_view_loss(final, coarse, mask, lambda a, b: (a - b).square().flatten(1).sum(1))
    torch.testing.assert_close(loss, (mask * (final - coarse).square()).flatten(1).sum(1))
    loss.sum().backward()
    assert coarse.grad is None
    assert torch.equal(final.grad != 0, mask.bool().expand(2, 3, 4, 4))


@pytest.mark.parametrize("spacings", [0.4, 1.5])
def test_depth_term_against_a_loop(spacings):
    """Eq. 10."""
    alpha, depth, valid = rays()
    details = torch.randn(2, 6, 5, 3, generator=seeded(6), dtype=torch.float64)
    found = depth_loss(details, alpha, depth, valid, spacings)
    pulled = 0
    for b in range(2):
        total, met = 0.0, 0
        for r in range(6):
            layers = [i for i in range(5) if valid[b, r, i]]
            if not layers:
                continue
            met += 1
            clear, weight, surface = 1.0, 0.0, 0.0
            for i in layers:
                share = clear * float(alpha[b, r, i])
                weight, surface = weight + share, surface + share * float(depth[b, r, i])
                clear *= 1 - float(alpha[b, r, i])
            gaps = [float(depth[b, r, j] - depth[b, r, i]) for i, j in pairwise(layers)]
            epsilon = spacings * sum(gaps) / len(gaps) if gaps else 0.0
            for i in layers:
                if gaps and abs(float(depth[b, r, i]) - surface / weight) > epsilon:
                    total += float(details[b, r, i].square().sum())
                    pulled += 1
        torch.testing.assert_close(found[b], torch.tensor(total / met, dtype=torch.float64))
    assert pulled > 0


def test_depth_term_with_a_plane_against_a_loop():
    """Eq. 10, whose last surface is opaque: z_surf = sum_i T_i a_i z_i needs no division."""
    alpha, depth, valid = rays()
    details = torch.randn(2, 6, 5, 3, generator=seeded(6), dtype=torch.float64)
    behind = depth.amax(2) + 0.5 + torch.rand(2, 6, generator=seeded(7), dtype=torch.float64)
    own = torch.randn(2, 6, 3, generator=seeded(8), dtype=torch.float64)
    found = depth_loss(details, alpha, depth, valid, 0.4, behind, own)
    bare = depth_loss(details, alpha, depth, valid, 0.4, behind)
    pulled = 0
    for b in range(2):
        total, plane, met = 0.0, 0.0, 0
        for r in range(6):
            layers = [i for i in range(5) if valid[b, r, i]]
            if not layers:
                continue
            met += 1
            clear, surface = 1.0, 0.0
            for z, a in [*((float(depth[b, r, i]), float(alpha[b, r, i])) for i in layers), (float(behind[b, r]), 1.0)]:
                surface, clear = surface + clear * a * z, clear * (1 - a)
            gaps = [float(depth[b, r, j] - depth[b, r, i]) for i, j in pairwise(layers)]
            epsilon = 0.4 * sum(gaps) / len(gaps) if gaps else 0.0
            total += sum(
                float(details[b, r, i].square().sum()) for i in layers if abs(float(depth[b, r, i]) - surface) > epsilon
            )
            if float(behind[b, r]) - surface > epsilon:
                plane += float(own[b, r].square().sum())
                pulled += 1
        torch.testing.assert_close(bare[b], torch.tensor(total / met, dtype=torch.float64))
        torch.testing.assert_close(found[b], torch.tensor((total + plane) / met, dtype=torch.float64))
    assert pulled > 0


def test_coarse_opacities_get_no_gradient_from_the_depth_term():
    alpha, depth, valid = rays()
    alpha.requires_grad_()
    details = torch.randn(2, 6, 5, 3, dtype=torch.float64, requires_grad=True)
    depth_loss(details, alpha, depth, valid, 0.4).sum().backward()
    assert alpha.grad is None
    assert not details.grad[~valid].any()
