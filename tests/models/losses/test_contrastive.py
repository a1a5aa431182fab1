"""Contrastive losses against loops."""

import math

import pytest
import torch
from torch.nn import functional as F

from models.losses.contrastive import ranking, supervised_contrastive


def test_supervised_contrastive_against_a_loop():
    g = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(7, 4, generator=g, dtype=torch.double), dim=1)
    label = torch.tensor([0, 1, 0, 2, 1, 0, 5])
    terms = []
    for i in range(7):
        others = [j for j in range(7) if j != i]
        positives = [j for j in others if label[j] == label[i]]
        if positives:
            total = math.log(sum(math.exp(float(z[i] @ z[j]) / 0.2) for j in others))
            terms.append(-sum(float(z[i] @ z[j]) / 0.2 - total for j in positives) / len(positives))
    assert float(supervised_contrastive(z, label, 0.2)) == pytest.approx(sum(terms) / len(terms))


def test_supervised_contrastive_without_positives_is_zero_with_a_gradient():
    z = torch.randn(3, 4, requires_grad=True)
    loss = supervised_contrastive(F.normalize(z, dim=1), torch.arange(3))
    loss.backward()
    assert float(loss.detach()) == 0 and torch.equal(z.grad, torch.zeros(3, 4))


def test_ranking():
    near, far = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 4.0, 1.0])
    loss = ranking(near, far)
    assert float(loss[0]) == pytest.approx(math.log(2), rel=1e-5)
    assert loss[1] < loss[0] < loss[2]
    torch.testing.assert_close(ranking(3 * near, 3 * far), loss)
