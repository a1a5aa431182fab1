"""Batch normalisation over ranks: torch's own, of the whole batch."""

import pytest
import torch
from torch import nn

from models.encoders.normalization import BatchNorm2d
from tests.stages import tiny


def step(layer, x, rows=slice(None)):
    """Output, gradients by input and weights of a loss that is a mean over items, and the running statistics."""
    x = x[rows].clone().requires_grad_()
    y = layer(x)
    weight = torch.linspace(-1, 2, y[0].numel()).reshape(y.shape[1:])
    (y.square() * weight).mean((1, 2, 3)).mean().backward()
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]


def layers():
    ours, theirs = BatchNorm2d(3), nn.BatchNorm2d(3)
    with torch.no_grad():
        ours.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
        ours.bias.copy_(torch.tensor([0.1, 0.0, -1.0]))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


X = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_see_the_whole_batch(tmp_path, world):
    def rank(index):
        torch.distributed.init_process_group("gloo", rank=index, world_size=world)
        found = step(layers()[0], X, slice(index, None, world))
        torch.distributed.destroy_process_group()
        torch.save(found, tmp_path / f"{index}.pt")

    tiny.ranks(rank, world)
    parts = [torch.load(tmp_path / f"{index}.pt") for index in range(world)]
    y, x_grad, weight_grad, bias_grad, mean, variance = step(layers()[1], X)
    for index, part in enumerate(parts):
        torch.testing.assert_close(part[0], y[index::world])
        torch.testing.assert_close(part[1] / world, x_grad[index::world], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(part[4], mean)
        torch.testing.assert_close(part[5], variance)
    torch.testing.assert_close(torch.stack([part[2] for part in parts]).mean(0), weight_grad)
    torch.testing.assert_close(torch.stack([part[3] for part in parts]).mean(0), bias_grad)


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_the_plain_one_to_the_bit(training):
    ours, theirs = (layer.train(training) for layer in layers())
    assert all(torch.equal(a, b) for a, b in zip(step(ours, X), step(theirs, X), strict=True))
