"""Losses of inversion against loops in float64."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from models.generators.base import Generator
from models.latents import Latents
from models.losses.inversion import (
    ReconstructionLoss,
    delta_regulariser,
    latent_error,
    latent_pull,
    locality,
)
from models.rendering.output import Rendering


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def codes(seed=0):
    return Latents({"renderer": seeded(2, 4, 3, seed=seed), "decoder": seeded(2, 3, 5, seed=seed + 1)})


def perceptual(a, b):
    return (a - b).abs().flatten(1).mean(1)


def identity(image):
    return image.flatten(1)[:, :7]


def test_reconstruction_against_a_loop():
    found, wanted = seeded(2, 3, 4, 4), seeded(2, 3, 4, 4, seed=1)
    terms = ReconstructionLoss(0.5, 2.0, 0.25)(found, wanted, perceptual, identity)
    for row in range(2):
        a, b = found[row].flatten().tolist(), wanted[row].flatten().tolist()
        pixel = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
        distance = sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)
        dot = sum(x * y for x, y in zip(a[:7], b[:7], strict=True))
        cosine = dot / math.hypot(*a[:7]) / math.hypot(*b[:7])
        wanted_terms = {"pixel": pixel, "perceptual": distance, "identity": 1 - cosine}
        assert {name: float(terms[name][row]) for name in wanted_terms} == pytest.approx(wanted_terms)
        assert float(terms["reconstruction"][row]) == pytest.approx(0.5 * pixel + 2 * distance + 0.25 * (1 - cosine))


def test_the_papers_weights_and_no_identity():
    found, wanted = seeded(2, 3, 4, 4), seeded(2, 3, 4, 4, seed=1)
    terms = ReconstructionLoss()(found, wanted, perceptual)
    assert terms.keys() == {"pixel", "perceptual", "reconstruction"}
    torch.testing.assert_close(terms["reconstruction"], 1e-2 * terms["pixel"] + terms["perceptual"])
    assert ReconstructionLoss() == ReconstructionLoss(1e-2, 1.0, 4e-2)
    same = ReconstructionLoss()(wanted, wanted, perceptual, identity)
    assert all(float(value.abs().max()) < 1e-6 for value in same.values())


def test_delta_regulariser_against_a_loop():
    latents = codes()
    expected = [
        sum(math.dist(group[row][i].tolist(), group[row][0].tolist()) for group in latents.groups.values()
            for i in range(1, group.shape[1]))
        for row in range(2)
    ]  # fmt: skip
    assert delta_regulariser(latents).tolist() == pytest.approx(expected)


def test_latent_terms_against_a_loop():
    latents, mean = codes(), codes(seed=5)[0]
    squares = [
        sum(
            (x - y) ** 2
            for name, group in latents.groups.items()
            for x, y in zip(group[row].flatten().tolist(), mean.groups[name].flatten().tolist(), strict=True)
        )
        for row in range(2)
    ]
    assert latent_pull(latents, mean).tolist() == pytest.approx(squares)
    assert latent_error(latents, mean).tolist() == pytest.approx([square / (4 * 3 + 3 * 5) for square in squares])


class Affine(Generator):
    """Pictures that are linear in the codes."""

    def __init__(self, gain):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def mapping(self, z, truncation=1.0, **_):  # around a mean code of .2
        z = 0.2 + truncation * z
        return Latents({"a": z[:, None, :3].expand(-1, 4, -1), "b": z[:, None].expand(-1, 3, -1)})

    def synthesis(self, ws, camera=None, **_):
        a, b = ws.groups.values()
        return Rendering(
            self.gain * (a.sum(1)[:, :, None, None] + b.mean((1, 2))[:, None, None, None]).expand(-1, 3, 4, 4)
        )

    @property
    def mean_latents(self):
        return self.mapping(torch.zeros(1, 5, dtype=torch.float64))


def test_locality_against_a_loop():
    """PTI: codes at a distance from the pivot towards random ones that are truncated, and both differences there."""
    pivot, z = Latents({"a": seeded(2, 4, 3), "b": seeded(2, 3, 5, seed=1)}), seeded(2, 5, seed=2)
    original, tuned = Affine(1.0), Affine(1.5)
    value = locality(tuned, original, pivot, z, None, perceptual, distance=2.0, truncation=0.5)
    for row in range(2):
        picture = 0.0
        for name, group in pivot.groups.items():
            mean = original.mean_latents.groups[name][0]
            random = mean + 0.5 * (original.mapping(z).groups[name][row] - mean)
            towards = random - group[row]
            near = group[row] + 2.0 * towards / math.sqrt(float(towards.square().sum()))
            picture = picture + (near.sum(0)[:, None, None] if name == "a" else near.mean())
        difference = (0.5 * picture).expand(3, 4, 4)
        expected = difference.square().mean() + difference.abs().mean()
        torch.testing.assert_close(value[row], expected)
    value.sum().backward()
    assert original.gain.grad is None and tuned.gain.grad is not None
    assert float(locality(Affine(1.0), original, pivot, z, None, perceptual).abs().max()) == 0


def test_gradients():
    group, target = seeded(2, 4, 3).requires_grad_(), Latents({"ws": seeded(2, 4, 3, seed=1)})
    for function in (delta_regulariser, lambda ws: latent_pull(ws, target), lambda ws: latent_error(ws, target)):
        assert gradcheck(lambda t, function=function: function(Latents({"ws": t})), group)
