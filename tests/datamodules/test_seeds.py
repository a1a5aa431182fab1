"""Seeds of numbered items."""

import torch

from datamodules.seeds import index_generator, index_seed


def draw(generator):
    return torch.randn(4, generator=generator)


def test_torch_takes_the_lower_32_bits():
    """Why seeds have no more."""
    a, b = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(draw(a), draw(b))


def test_items_have_seeds_of_their_own():
    seeds = {index_seed(3, index, "z") for index in range(100_000)}
    assert len(seeds) == 100_000 and max(seeds) < 2**32 and min(seeds) >= 0
    first = index_seed(3, 0, "z")
    wrapped = index_seed(3, 2**32 - 1, "z")
    assert (first - wrapped) % 2**32 == 1


def test_purposes_and_seeds_count_from_elsewhere():
    starts = {index_seed(seed, 0, purpose) for seed in range(20) for purpose in ("z", "pose", "points 0", "points 1")}
    assert len(starts) == 80


def test_generators_are_seeded_so():
    assert torch.equal(
        draw(index_generator(3, 7, "pose")), draw(torch.Generator().manual_seed(index_seed(3, 7, "pose")))
    )
    assert not torch.equal(draw(index_generator(3, 7)), draw(index_generator(3, 8)))
