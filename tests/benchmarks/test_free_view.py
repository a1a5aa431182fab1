"""The benchmark of free views, at a size of milliseconds."""

import torch

from tests.benchmarks.free_view import embedded, ratio
from tests.benchmarks.zoo import Cost


def test_a_ratio_is_taken_round_by_round():
    slow, fast = ([Cost(wall, cpu, 0) for wall, cpu in each] for each in ([(8, 3), (9, 2), (20, 4)], [(1, 1)] * 3))
    assert ratio(slow, fast, "wall") == "9 (8 to 20)" and ratio(slow, fast, "cpu") == "3 (2 to 4)"


@torch.no_grad()
def test_every_view_is_a_new_one_and_both_ways_show_it():
    pictures = [[run(1) for _ in range(2)] for _, run in (embedded(32, "synthesis"), embedded(32, "cached"))]
    for painted, shown in zip(*pictures, strict=True):
        assert (painted - shown).square().mean() < 0.02
    assert not torch.equal(*pictures[0]) and not torch.equal(*pictures[1])
    assert pictures[0][0].shape == pictures[1][0].shape == (1, 3, 32, 32)
