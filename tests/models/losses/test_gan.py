"""Adversarial losses against plain float64 formulas."""

import math

import pytest
import torch
from torch import nn

from models.losses.gan import (
    discriminator_nonsaturating,
    generator_nonsaturating,
    path_length_penalty,
    r1_penalty,
)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_nonsaturating_losses():
    real, fake = [0.3, -1.2, 4.0], [-0.7, 2.5, 0.1]
    expected = -sum(map(log_sigmoid, real)) / 3 - sum(log_sigmoid(-x) for x in fake) / 3
    assert float(discriminator_nonsaturating(torch.tensor(real), torch.tensor(fake))) == pytest.approx(
        expected, rel=1e-6
    )
    expected = -sum(map(log_sigmoid, fake)) / 3
    assert float(generator_nonsaturating(torch.tensor(fake))) == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(generator_nonsaturating(torch.tensor([-1e4, 1e4])))


def test_r1_of_a_quadratic_is_known():
    # D(x) = a |x|^2 / 2 has the gradient a x, so R1 = a^2 |x|^2 and its derivative in a is 2 a |x|^2.
    a = torch.tensor(0.7, requires_grad=True)
    x = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    penalty, logits = r1_penalty(lambda image: 0.5 * a * image.square().flatten(1).sum(1), x)
    square = x.square().flatten(1).sum(1)
    torch.testing.assert_close(penalty, 0.49 * square)
    torch.testing.assert_close(logits, 0.35 * square)
    penalty.sum().backward()
    torch.testing.assert_close(a.grad, 1.4 * square.sum())
    assert not x.requires_grad


def test_r1_stays_float32_under_autocast_and_no_grad():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 1))
    x = torch.randn(2, 3, 4, 4)
    wanted, _ = r1_penalty(network, x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got, _ = r1_penalty(network, x.bfloat16().float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, r1_penalty(network, x.bfloat16().float())[0])
    assert wanted.shape == (2,)


def test_r1_second_derivatives():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Softplus(), nn.Linear(5, 1)).float()
    x = torch.randn(2, 3, 2, 2)
    weight = network[1].weight

    def penalty_at(value: torch.Tensor) -> torch.Tensor:
        return r1_penalty(lambda image: torch.func.functional_call(network, {"1.weight": value}, (image,)), x)[0].sum()

    value = weight.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(penalty_at(value), value)
    direction, h = torch.randn_like(value), 1e-2
    with torch.no_grad():
        numeric = (penalty_at(value + h * direction) - penalty_at(value - h * direction)) / (2 * h)
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=2e-2)


def test_path_length_of_a_linear_generator():
    # image = A w for every code, so J^T y = A^T y; its length is averaged over the n codes before the root.
    g = torch.Generator().manual_seed(1)
    matrix = torch.randn(3 * 4 * 4, 5, generator=g)
    ws = torch.randn(2, 3, 5, generator=g).requires_grad_()
    image = (ws.sum(1) @ matrix.T).view(2, 3, 4, 4)
    noise = torch.randn(2, 3, 4, 4, generator=g)
    penalty, mean = path_length_penalty(image, ws, torch.tensor(2.0), noise, decay=0.1)
    length = ((noise.flatten(1) / 4) @ matrix).norm(dim=1)
    wanted = 2.0 + 0.1 * (length.mean() - 2.0)
    torch.testing.assert_close(mean, wanted)
    torch.testing.assert_close(penalty, (length - wanted).square())
    assert not mean.requires_grad
