"""The holder of frozen networks."""

import copy

import torch
from torch import nn

from models.features.base import Frozen, move_frozen
from models.features.embedded import EmbeddedStyle


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(2, 2)
        self.frozen = Frozen(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)))


def test_owner_does_not_know_it():
    owner = Owner()
    assert set(owner.state_dict()) == {"own.weight", "own.bias"}
    assert len(list(owner.parameters())) == 2 and len(list(owner.modules())) == 2
    owner.train()
    assert not owner.frozen.module.training
    assert not any(p.requires_grad for p in owner.frozen.module.parameters())


def test_gradient_flows_to_the_input_only():
    owner = Owner().train()
    x = torch.randn(5, 3, requires_grad=True)
    owner.frozen(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in owner.frozen.module.parameters())


def test_owner_moves_it():
    owner = Owner()
    assert owner.frozen.to("cpu", torch.float64) is owner.frozen
    assert owner.frozen(torch.zeros(1, 3, dtype=torch.float64)).dtype == torch.float64
    move_frozen(owner, "meta")
    assert next(owner.frozen.module.parameters()).device.type == "meta"
    assert owner.own.weight.device.type == "cpu"
    copy.deepcopy(Owner())


def test_images_of_frozen_networks_are_differentiable():
    frozen = Frozen(EmbeddedStyle(weights=None))
    image = torch.zeros(1, 3, 96, 96, requires_grad=True)
    frozen(image)[0, 0].backward()
    assert torch.isfinite(image.grad).all() and image.grad.abs().sum() > 0
