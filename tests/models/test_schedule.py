"""Learning rates by hand."""

import pytest
import torch

from models.schedule import rate, set_rates


def test_rates():
    assert rate("constant", 7, 10) == 1
    assert [rate("cosine", step, 10) for step in (0, 5, 10)] == pytest.approx([1, 0.525, 0.05])
    assert [rate("cosine", step, 4, 0.0) for step in (0, 1, 2)] == pytest.approx([1, 0.5 + 0.5**1.5, 0.5])


def test_optimisers_keep_what_they_were_made_with():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (0.2, 0.4)]
    optimizer = torch.optim.SGD(groups)
    for share in (0.5, 0.25):
        set_rates([optimizer], share)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2 * share, 0.4 * share])
