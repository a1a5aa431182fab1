"""Loaders: every item once a pass, the same order again, whatever the number of workers; in evaluation once in all."""

from types import SimpleNamespace

import pytest
import torch

from datamodules.resumable import ResumableLoader, evaluation_loader
from models.errors import UserError


def numbers(loader, batches):
    """The next ``batches`` batches, over as many passes as it takes."""
    seen = []
    while len(seen) < batches:
        for batch in loader:
            seen.append(batch.tolist())
            if len(seen) == batches:
                break
    return seen


def flat(batches):
    return [number for batch in batches for number in batch]


def make(**options):
    return ResumableLoader(torch.arange(23), 4, **{"seed": 1, **options})  # type: ignore[arg-type]


def test_a_pass_shows_every_item_at_most_once_and_passes_differ():
    seen = numbers(make(), 10)
    first, second = flat(seen[:5]), flat(seen[5:])
    assert len(set(first)) == len(set(second)) == 20 and first != second
    assert numbers(make(), 10) == seen and numbers(make(seed=2), 10) != seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 7])
def test_continues_where_it_was(workers, stop):
    whole = numbers(make(), 12)
    loader = make(num_workers=workers)
    assert numbers(loader, stop) == whole[:stop]
    again = make(num_workers=workers)
    again.load_state_dict(loader.state_dict())
    assert numbers(again, 12 - stop) == whole[stop:]


def test_ranks_share_the_items():
    parts = [numbers(make(trainer=SimpleNamespace(world_size=2, global_rank=rank)), 2) for rank in (0, 1)]
    items = [set(flat(part)) for part in parts]
    assert len(items[0]) == len(items[1]) == 8 and not items[0] & items[1]


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (5, 1), (5, 2), (5, 3), (7, 7)])
def test_evaluation_shows_each_item_on_one_rank_once(count, ranks):
    trainers = [SimpleNamespace(world_size=ranks, global_rank=rank) for rank in range(ranks)]
    loaders = [evaluation_loader(torch.arange(count), 2, trainer=trainer) for trainer in trainers]
    shares = [flat(batch.tolist() for batch in loader) for loader in loaders]
    assert shares == [list(range(rank, count, ranks)) for rank in range(ranks)]
    assert [len(loader) for loader in loaders] == [-(-len(share) // 2) for share in shares]


def test_more_ranks_than_items_are_refused():
    with pytest.raises(UserError, match="3 processes cannot share 2 items: use at most 2"):
        evaluation_loader(torch.arange(2), 1, trainer=SimpleNamespace(world_size=3, global_rank=0))
