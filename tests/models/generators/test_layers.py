"""Style layers against explicit float64 references (StyleGAN2, Eq. 1-3)."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from models.generators.layers import (
    EqualConv2d,
    EqualLinear,
    MappingNetwork,
    ModulatedConv2d,
    StyledConv,
    leaky,
)
from tests.models.generators.protocol import seeded


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def modulated_reference(layer: ModulatedConv2d, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """One weight copy per item, by grouped convolution."""
    batch, channels, height, width = x.shape
    affine = layer.affine
    style = w @ (affine.weight * affine.scale).T + affine.bias * affine.lr_multiplier
    weight = style[:, None, :, None, None] * (layer.weight * layer.scale)  # Eq. 1
    if layer.demodulate:
        weight = weight / (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()  # Eq. 2-3
    out = F.conv2d(
        x.reshape(1, batch * channels, height, width), weight.flatten(0, 1), padding=layer.padding, groups=batch
    )
    return out.reshape(batch, -1, height, width)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_convolution_equals_grouped_convolution(kernel, demodulate):
    torch.manual_seed(0)
    layer = ModulatedConv2d(5, 7, kernel, 6, demodulate=demodulate, lr_multiplier=0.5).double()
    x, w = rand(3, 5, 8, 9), rand(3, 6, seed=1)
    # sigma is computed in fp32 on purpose, which bounds the agreement
    assert_close(layer(x, w), modulated_reference(layer, x, w), atol=1e-6, rtol=1e-6)
    single = ModulatedConv2d(5, 7, kernel, 6, demodulate=demodulate, lr_multiplier=0.5)
    single.load_state_dict(layer.state_dict())
    assert_close(single(x.float(), w.float()).double(), modulated_reference(layer, x, w), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_convolution_gradients_equal_the_reference(demodulate):
    """First and second derivatives, by input, style and weight."""
    torch.manual_seed(0)
    layer = ModulatedConv2d(2, 3, 3, 4, demodulate=demodulate).double()
    x, w = rand(2, 2, 4, 4).requires_grad_(), rand(2, 4, seed=1).requires_grad_()
    probe = rand(2, 3, 4, 4, seed=2)
    found = []
    for function in (layer, lambda a, b: modulated_reference(layer, a, b)):
        out = function(x, w)
        wanted = [x, w, layer.weight, layer.affine.weight, layer.affine.bias]
        first = torch.autograd.grad((out * probe).sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        found.append((*first, *second))
    for ours, reference in zip(*found, strict=True):
        assert_close(ours, reference, atol=1e-5, rtol=1e-5)


def test_modulated_convolution_passes_gradgradcheck():
    torch.manual_seed(0)
    layer = ModulatedConv2d(2, 2, 3, 3, demodulate=False).double()
    x, w = rand(1, 2, 3, 3).requires_grad_(), rand(1, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x, w))
    assert torch.autograd.gradgradcheck(layer, (x, w))


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_demodulation_gives_unit_variance_for_any_style(size):
    torch.manual_seed(0)
    layer = ModulatedConv2d(64, 128, 3, 8)
    out = layer(torch.randn(4, 64, 32, 32), torch.randn(4, 8) * size)
    # without the border, where zero padding removes terms
    assert_close(out[..., 1:-1, 1:-1].std((1, 2, 3)), torch.ones(4), atol=0.05, rtol=0)


def test_demodulation_survives_half_precision():
    torch.manual_seed(0)
    layer = ModulatedConv2d(16, 16, 3, 8)
    x, w = torch.randn(2, 16, 8, 8), torch.randn(2, 8) * 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x, w)
    assert_close(found.float(), layer(x, w), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("lr_multiplier", [1.0, 0.01])
def test_equal_linear(lr_multiplier):
    torch.manual_seed(0)
    layer = EqualLinear(256, 512, bias=1.0, lr_multiplier=lr_multiplier)
    assert_close(layer.weight.std(), torch.tensor(1 / lr_multiplier), rtol=0.02, atol=0)
    x = torch.randn(400, 256)
    expected = x.double() @ (layer.weight.double() * lr_multiplier / math.sqrt(256)).T + 1.0
    assert_close(layer(x).double(), expected, atol=1e-4, rtol=1e-4)
    assert_close((layer(x) - 1).std(), torch.tensor(1.0), rtol=0.03, atol=0)


def test_learning_rate_is_equalised():
    """One step of Adam moves the effective weight by lr * scale, whatever the fan-in."""
    for fan_in in (16, 1024):
        torch.manual_seed(0)
        layer = EqualLinear(fan_in, 4, lr_multiplier=0.1)
        before = layer.weight.detach().clone() * layer.scale
        optimiser = torch.optim.Adam(layer.parameters(), lr=0.01)
        layer(torch.randn(8, fan_in)).square().sum().backward()
        optimiser.step()
        moved = (layer.weight.detach() * layer.scale - before).abs()
        assert_close(moved, torch.full_like(moved, 0.01 * 0.1 / math.sqrt(fan_in)), rtol=0.01, atol=0)


def test_equal_conv():
    torch.manual_seed(0)
    layer = EqualConv2d(8, 16, 3, stride=2).double()
    x = rand(2, 8, 9, 9)
    expected = F.conv2d(x, layer.weight / math.sqrt(72), layer.bias, stride=2, padding=1)
    assert_close(layer(x), expected)
    assert EqualConv2d(8, 16, 1, bias=False).bias is None


def test_leaky_keeps_the_second_moment():
    x = torch.randn(200_000, generator=seeded())
    # E[y^2] = gain^2 (1 + slope^2) / 2 = 1.04
    assert_close(leaky(x).square().mean(), torch.tensor(1.04), atol=0.02, rtol=0)


def test_styled_convolution_upsamples_before_it_convolves():
    torch.manual_seed(0)
    layer = StyledConv(4, 6, 5, upsample=True).double()
    nn.init.normal_(layer.bias)
    x, w = rand(2, 4, 5, 5), rand(2, 5, seed=1)
    enlarged = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    expected = F.leaky_relu(modulated_reference(layer.conv, enlarged, w) + layer.bias[:, None, None], 0.2) * 2**0.5
    assert_close(layer(x, w), expected, atol=1e-5, rtol=1e-5)


def test_mapping_network():
    torch.manual_seed(0)
    network = MappingNetwork(6, 10, layers=3, hidden=12)
    z = torch.randn(5, 6)
    assert network(z).shape == (5, 10)
    assert_close(network(z), network(3 * z), atol=1e-4, rtol=1e-4)  # only the direction of z counts
    assert_close(network(z[:, None].expand(-1, 4, -1))[:, 2], network(z))
    free = MappingNetwork(6, 10, normalize=False)
    assert not torch.allclose(free(z), free(3 * z), atol=1e-2)
