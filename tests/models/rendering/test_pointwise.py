import pytest
import torch
from torch import nn
from torch.testing import assert_close

from models.generators.anifacegan import AniFaceGANGenerator
from models.generators.gram import GRAMGenerator
from models.heads.tuning import TunedWeights, select_parameters
from models.rendering import pointwise
from models.rendering.pointwise import IMAGES, affine, in_chunks


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("points", [0, 7, IMAGES, 5 * IMAGES])
def test_affine_is_a_product_with_the_rows_own_weight(rows, points):
    draws = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(rows, *shape, generator=draws) for shape in ((points, 5), (4, 5), (1, 4)))
    assert_close(affine(x, weight, bias), torch.einsum("bpi,boi->bpo", x, weight) + bias)


@pytest.mark.parametrize("points", [3, IMAGES])
def test_affine_differentiates_twice(points):
    draws = torch.Generator().manual_seed(0)
    shapes = ((2, points, 3), (2, 2, 3), (2, 1, 2))
    inputs = [torch.randn(shape, generator=draws, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(affine, inputs)
    assert torch.autograd.gradgradcheck(affine, inputs)


SMALL = {
    "resolution": 8, "width": 8, "layers": 2, "mapping_width": 8, "predictor_width": 16, "manifolds": 4, "samples": 16,
}  # fmt: skip


@pytest.mark.parametrize("kind", [GRAMGenerator, AniFaceGANGenerator])
def test_what_is_computed_again_is_computed_with_the_tuned_weights(kind, monkeypatch):
    """When the gradient is asked for, the generator has its own weights back."""
    more = (
        {"identity": 4, "expression": 3, "noise": 4, "latent": 4, "vae_width": 8}
        if kind is AniFaceGANGenerator
        else {"z_dim": 8}
    )
    torch.manual_seed(0)
    generator = kind(**SMALL, **more).requires_grad_(False)
    tuned = TunedWeights(generator, select_parameters(generator, "synthesis", "predictor"))
    with torch.no_grad():
        for weight in tuned.weights.values():
            weight.add_(0.1 * torch.randn_like(weight))
    ws = generator.mapping(generator.sample_z(1, torch.Generator().manual_seed(0)))
    target, camera = torch.rand(1, 3, 8, 8), generator.rig.camera(0.1)

    def gradients():
        image = tuned.synthesis(ws, camera).image
        loss = (image - target).square().mean()
        return [image.detach(), *torch.autograd.grad(loss, list(tuned.weights.values()))]

    kept = gradients()
    monkeypatch.setattr(pointwise, "KEPT", 0)
    calls, once = [], pointwise.checkpoint
    monkeypatch.setattr(pointwise, "checkpoint", lambda *a, **k: calls.append(1) or once(*a, **k))
    for found, expected in zip(gradients(), kept, strict=True):
        assert_close(found, expected)
    assert calls and any(gradient.abs().max() > 0 for gradient in kept[1:])


def test_memory_is_kept_where_points_are_few_or_nothing_learns(monkeypatch):
    network, points = nn.Linear(3, 4), torch.rand(1, 100, 3)
    monkeypatch.setattr(pointwise, "checkpoint", lambda *a, **k: pytest.fail("computed again"))
    in_chunks(network, points, 4, network)
    monkeypatch.setattr(pointwise, "KEPT", 0)
    in_chunks(network, points, 4)
    with torch.no_grad():
        in_chunks(network, points, 4, network)
