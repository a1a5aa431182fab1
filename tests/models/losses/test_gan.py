"""Adversarial losses against plain float64 formulas."""

import math

import pytest
import torch
from torch import nn

from models.generators.stylegan2 import StyleGAN2Generator
from models.latents import Latents
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
    penalty, mean = path_length_penalty(image, Latents({"ws": ws}), torch.tensor(2.0), noise, decay=0.1)
    length = ((noise.flatten(1) / 4) @ matrix).norm(dim=1)
    wanted = 2.0 + 0.1 * (length.mean() - 2.0)
    torch.testing.assert_close(mean, wanted)
    torch.testing.assert_close(penalty, (length - wanted).square())
    assert not mean.requires_grad


def test_path_length_against_finite_differences():
    """Eq. 4 on StyleGAN2 in float64: each number of each code is moved by itself, and so is a weight."""
    torch.manual_seed(0)
    generator = StyleGAN2Generator([6, 4], style_dim=3, mapping_layers=1).double()
    g = torch.Generator().manual_seed(1)
    ws = torch.randn(2, generator.num_ws, 3, generator=g, dtype=torch.float64)
    noise = torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64)
    weight = generator.backbone.blocks[1].conv1.weight
    before, decay, h = 0.3, 0.25, 1e-5

    def along(code: torch.Tensor, item: int) -> float:
        image = generator.synthesis(Latents({"ws": code[None]})).image[0]
        return sum((image * noise[item]).flatten().tolist()) / 8  # the root of 8 * 8 pixels

    @torch.no_grad()
    def lengths() -> list[float]:
        found = []
        for item, code in enumerate(ws):
            squares = 0.0
            for step in h * torch.eye(code.numel(), dtype=torch.float64).unflatten(1, code.shape):
                squares += ((along(code + step, item) - along(code - step, item)) / (2 * h)) ** 2
            found.append(math.sqrt(squares / len(code)))
        return found

    codes = Latents({"ws": ws.clone().requires_grad_()})
    image = generator.synthesis(codes).image
    penalty, mean = path_length_penalty(image, codes, torch.tensor(before, dtype=torch.float64), noise, decay)
    penalty.sum().backward()
    expected = lengths()
    a = before + decay * (sum(expected) / 2 - before)
    assert float(mean) == pytest.approx(a, rel=1e-6)
    assert penalty.tolist() == pytest.approx([(length - a) ** 2 for length in expected], rel=1e-5)
    moved = []
    for change in (1e-4, -2e-4):
        with torch.no_grad():
            weight[0, 0, 0, 0] += change
        moved.append(lengths())
    slope = sum(2 * (n - a) * (up - down) / 2e-4 for n, up, down in zip(expected, *moved, strict=True))
    assert float(weight.grad[0, 0, 0, 0]) == pytest.approx(slope, rel=1e-3)


def test_path_length_takes_the_codes_of_all_groups():
    g = torch.Generator().manual_seed(2)
    first, second = (torch.randn(3 * 4, width, generator=g, dtype=torch.float64) for width in (5, 2))
    a = torch.randn(1, 2, 5, generator=g, dtype=torch.float64).requires_grad_()
    b = torch.randn(1, 1, 2, generator=g, dtype=torch.float64).requires_grad_()
    image = (a.sum(1) @ first.T + b.sum(1) @ second.T).view(1, 3, 2, 2)
    noise = torch.randn(1, 3, 2, 2, generator=g, dtype=torch.float64)
    penalty, _ = path_length_penalty(image, Latents({"one": a, "two": b}), torch.zeros(()).double(), noise, decay=0.0)
    squares = [float((noise.flatten() / 2 @ matrix).square().sum()) for matrix in (first, second)]
    assert float(penalty) == pytest.approx((2 * squares[0] + squares[1]) / 3)
