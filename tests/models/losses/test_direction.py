"""Direction losses: values, the undefined first step, gradients."""

import pytest
import torch
from torch import nn

from models.losses.direction import directional_l2, directional_loss, displacement


def test_value_against_cosine_similarity():
    g = torch.Generator().manual_seed(0)
    guide, delta = torch.randn(8, generator=g), torch.randn(5, 8, generator=g)
    got = directional_loss(guide, delta)
    torch.testing.assert_close(got.loss, 1 - torch.cosine_similarity(guide[None], delta, dim=1))
    assert got.valid.all()
    torch.testing.assert_close(got.mean(), got.loss.mean())
    torch.testing.assert_close(
        directional_l2(guide, delta).loss, ((delta - guide) ** 2).sum(1) / (guide**2).sum(), rtol=1e-5, atol=1e-6
    )


def test_displacement_normalises_first():
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(displacement(a, b), torch.tensor([[0.6, -0.2]]))
    torch.testing.assert_close(displacement(a, b, normalize_embedding=False), torch.tensor([[3.0, 2.0]]))


def test_step_zero_is_silent_and_leaves_adam_clean():
    # The tuned network starts as a copy of the original: 0 / 0.
    original, image = nn.Linear(6, 4), torch.randn(3, 6)
    tuned = nn.Linear(6, 4)
    tuned.load_state_dict(original.state_dict())
    optimizer = torch.optim.Adam(tuned.parameters(), 1e-2)
    guide = torch.randn(4)
    with torch.no_grad():
        before = original(image)
    result = directional_loss(guide, displacement(tuned(image), before))
    assert not result.valid.any()
    assert torch.equal(result.loss, torch.zeros(3))
    result.mean().backward()
    for parameter in tuned.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    optimizer.step()
    for state in optimizer.state.values():
        assert torch.equal(state["exp_avg"], torch.zeros_like(state["exp_avg"]))
        assert torch.equal(state["exp_avg_sq"], torch.zeros_like(state["exp_avg_sq"]))
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), original.parameters(), strict=True))


def test_one_undefined_item_does_not_touch_the_others():
    delta = torch.randn(3, 5, dtype=torch.double)
    delta[1] = 0
    delta.requires_grad_()
    guide = torch.randn(5, dtype=torch.double)
    result = directional_loss(guide, delta)
    assert result.valid.tolist() == [True, False, True]
    result.mean().backward()
    assert torch.equal(delta.grad[1], torch.zeros(5, dtype=torch.double))
    alone = delta.detach()[[0, 2]].requires_grad_()
    directional_loss(guide, alone).mean().backward()
    torch.testing.assert_close(delta.grad[[0, 2]], alone.grad)
    assert not directional_loss(torch.zeros(5, dtype=torch.double), delta).valid.any()


def test_l2_pulls_from_the_first_step():
    delta = torch.zeros(2, 5, requires_grad=True)
    result = directional_l2(torch.ones(5), delta)
    assert result.valid.all() and torch.allclose(result.loss, torch.ones(2))
    result.loss.sum().backward()
    assert (delta.grad < 0).all()


@pytest.mark.parametrize("loss", [directional_loss, directional_l2])
def test_gradcheck(loss):
    g = torch.Generator().manual_seed(3)
    guide = torch.randn(4, 6, dtype=torch.double, generator=g, requires_grad=True)
    delta = torch.randn(4, 6, dtype=torch.double, generator=g, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b).loss, (guide, delta))
