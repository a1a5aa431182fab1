import pytest
import torch
from torch.testing import assert_close

from models.rendering.pointwise import IMAGES, affine


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("points", [0, 7, IMAGES, 5 * IMAGES])
def test_affine_is_a_product_with_the_rows_own_weight(rows, points):
    draws = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(rows, *shape, generator=draws) for shape in ((points, 5), (4, 5), (1, 4)))
    assert_close(affine(x, weight, bias), torch.einsum("bpi,boi->bpo", x, weight) + bias)


@pytest.mark.parametrize("points", [3, IMAGES])
def test_affine_differentiates_twice(points):
    draws = torch.Generator().manual_seed(0)
    shapes = ((2, points, 3), (2, 2, 3), (2, 1, 2))
    inputs = [torch.randn(shape, generator=draws, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(affine, inputs)
    assert torch.autograd.gradgradcheck(affine, inputs)
