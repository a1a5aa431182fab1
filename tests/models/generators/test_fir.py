"""Filters against scipy, and their derivatives."""

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from torch.nn import functional as F
from torch.testing import assert_close

from models.generators.fir import blur, downsample2x, fir_kernel, up_conv, upfirdn2d, upsample2x

TAPS = (1.0, 3.0, 3.0, 1.0)


def reference(image, kernel, up, down, pad):
    left, right, top, bottom = pad if len(pad) == 4 else (*pad, *pad)
    height, width = image.shape
    sparse = np.zeros((height * up, width * up))
    sparse[::up, ::up] = image
    sparse = np.pad(sparse, [(max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0))])
    sparse = sparse[max(-top, 0) : len(sparse) - max(-bottom, 0), max(-left, 0) : sparse.shape[1] - max(-right, 0)]
    return convolve2d(sparse, kernel, "valid")[::down, ::down]


def test_kernel():
    kernel = fir_kernel(TAPS)
    assert_close(kernel, torch.outer(torch.tensor(TAPS), torch.tensor(TAPS)) / 64)
    assert fir_kernel([1.0]).tolist() == [[1.0]]


@pytest.mark.parametrize("shape", [(4, 4), (3, 3), (2, 5), (1, 1)])
@pytest.mark.parametrize("up", [1, 2, 3])
@pytest.mark.parametrize("down", [1, 2])
@pytest.mark.parametrize("pad", [(0, 0), (2, 1), (1, 1), (7, 5), (1, -2, 3, 0), (-1, -1)])
def test_equals_scipy(shape, up, down, pad):
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, 8, generator=noise, dtype=torch.float64)
    kernel = torch.randn(shape, generator=noise, dtype=torch.float64)
    want = [[reference(c.numpy(), kernel.numpy(), up, down, pad) for c in item] for item in x]
    got = upfirdn2d(x, kernel, up=up, down=down, pad=pad, gain=2.0)
    assert_close(got, 2 * torch.tensor(np.array(want)))
    last = upfirdn2d(x.contiguous(memory_format=torch.channels_last), kernel, up=up, down=down, pad=pad, gain=2.0)
    assert_close(last, got)


@pytest.mark.parametrize("taps", [TAPS, (1.0, 2.0, 1.0), (1.0, 1.0), (1.0, 4.0, 6.0, 4.0, 1.0)])
def test_resampling_keeps_sizes_and_brightness(taps):
    x, kernel = torch.ones(1, 2, 8, 8), fir_kernel(taps)
    up, down = upsample2x(x, kernel), downsample2x(x, kernel)
    assert up.shape == (1, 2, 16, 16) and down.shape == (1, 2, 4, 4)
    assert blur(x, kernel, (2, len(taps) - 3)).shape == x.shape
    assert_close(up[..., 4:-4, 4:-4].mean(), torch.tensor(1.0))
    assert_close(down[..., 1:-1, 1:-1], torch.ones(1, 2, 2, 2))


@pytest.mark.parametrize("function", [upsample2x, downsample2x, lambda x, kernel: blur(x, kernel, (2, 1))])
def test_second_derivatives(function):
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    kernel = fir_kernel(TAPS).double()
    assert torch.autograd.gradcheck(lambda x: function(x, kernel).square(), x)
    assert torch.autograd.gradgradcheck(lambda x: function(x, kernel).square(), x)


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
