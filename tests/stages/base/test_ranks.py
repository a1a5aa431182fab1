"""What ranks exchange."""

import torch

from stages.base.ranks import collect, gather
from tests.stages import tiny


def test_of_one_process():
    assert gather([1, 2]) == collect([1, 2]) == [1, 2]


def test_large_results_go_to_the_first_rank_alone():
    def rank(index):
        torch.distributed.init_process_group("gloo", rank=index, world_size=2)
        own = [f"{index}{letter}" for letter in "ab"[: 2 - index]]
        assert gather(own) == ["0a", "0b", "1a"]
        assert collect(own) == (["0a", "0b", "1a"] if index == 0 else [])

    tiny.ranks(rank, 2)
