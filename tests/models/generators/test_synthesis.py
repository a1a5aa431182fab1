"""The transposed convolution of StyleGAN2's synthesis, which has a weight gradient of its own."""

import torch
from torch.nn import functional as F
from torch.testing import assert_close

from models.generators.synthesis import up_conv


def draws(dtype=torch.float64, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((2, 3, 4, 5), (3, 2, 3, 3)))
    return x.contiguous(memory_format=layout).requires_grad_(), weight.requires_grad_()


def test_up_conv_equals_the_library():
    for layout in (torch.contiguous_format, torch.channels_last):
        x, weight = draws(layout=layout)
        found, expected = up_conv(x, weight), F.conv_transpose2d(x, weight, stride=2)
        assert_close(found, expected)
        probe = torch.randn_like(expected)
        assert_close(*(torch.autograd.grad(image, (x, weight), probe) for image in (found, expected)))


def test_up_conv_passes_gradgradcheck():
    x, weight = draws(layout=torch.channels_last)
    assert torch.autograd.gradcheck(up_conv, (x, weight))
    assert torch.autograd.gradgradcheck(up_conv, (x, weight))


def test_up_conv_of_frozen_weights():
    x, weight = draws()
    (gradient,) = torch.autograd.grad(up_conv(x, weight.detach()).sum(), x)
    assert_close(gradient, torch.autograd.grad(F.conv_transpose2d(x, weight, stride=2).sum(), x)[0])


def test_up_conv_under_autocast():
    x, weight = draws(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image = up_conv(x, weight)
    assert image.dtype == torch.bfloat16
    image.float().square().sum().backward()
    assert x.grad is not None and weight.grad is not None and weight.grad.dtype == torch.float32
