"""The benchmark of the zoo, with stand-ins of milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.benchmarks.official import Adapter, Run
from tests.benchmarks.zoo import COLUMNS, ROUNDS, Case, Cost, Request, alternate, measure

SIDE = 256


class Repeated(nn.Module):
    """The same image, made once or many times."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.weight, self.repeats = nn.Parameter(torch.randn(SIDE, SIDE)), repeats

    def forward(self, batch: int) -> Tensor:
        images = [(self.weight @ self.weight.mT).expand(batch, 3, -1, -1) for _ in range(self.repeats)]
        return torch.stack(images).mean(0)


def built(network: nn.Module, refused: int | None = None) -> tuple[nn.Module, Run]:
    def run(batch: int) -> Tensor:
        if batch == refused:
            raise MemoryError("too large")
        return network(batch)

    return network, run


def slow(repeats: int, refused: int | None = None) -> tuple[nn.Module, Run]:
    return built(Repeated(repeats), refused)


def fast(state: dict[str, Tensor] | None) -> tuple[nn.Module, Run]:
    network = Repeated(1)
    if state is not None:
        network.load_state_dict(state)
    return built(network)


def broken() -> tuple[nn.Module, Run]:
    raise ImportError("no module named model")


def cases(official: Callable[[], tuple[nn.Module, Run]], checkout: str | None) -> list[Case]:
    """With batches of 1 and 2, one thread, and no time."""
    adapter = Adapter(official, fast)
    return list(measure("stand-in", adapter, checkout, threads=[1], batches=[1, 2], rounds=9, budget=0))


@pytest.mark.slow
def test_measures_both_networks_with_equal_weights_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    found = cases(partial(slow, 40, refused=2), str(tmp_path))
    assert [case.request for case in found] == [
        Request(kind, 1, batch) for batch in (1, 2) for kind in ("forward", "with backward")
    ]
    for case in found[:2]:
        assert len(case.ours) == len(case.official) == ROUNDS
        assert case.difference is not None and case.difference < 1e-5  # of random weights: they were handed over
        assert sum(cost.cpu for cost in case.ours) < sum(cost.cpu for cost in case.official)
        assert all(cost.peak > 2**20 for cost in case.ours)
    for case in found[2:]:
        assert case.failure == "MemoryError: too large"
        assert case.failure in case.cells()


def test_measures_ours_alone() -> None:
    found = cases(broken, None)
    assert len(found) == 4
    assert all(len(case.ours) == ROUNDS and not case.official for case in found)


def test_says_why_an_official_network_cannot_be_built(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no module named model"):
        cases(broken, str(tmp_path))


class Counting:
    """A worker that answers at once."""

    def ask(self, request: Request) -> Cost:
        return Cost(1.0, 1.0, request.batch)


@pytest.mark.parametrize(("rounds", "budget", "done"), [(7, 60, 7), (7, 0, ROUNDS), (1, 60, ROUNDS)])
def test_slow_cases_are_measured_less_often(rounds: int, budget: float, done: int) -> None:
    costs = alternate([Counting(), Counting()], Request("forward", 1, 1), rounds, budget)  # type: ignore[list-item]
    assert [len(own) for own in costs] == [done, done]


def test_a_row_has_medians_and_the_ranges_of_ratios() -> None:
    ours, official = ([Cost(wall, cpu, 2**20 * peak) for wall, cpu, peak in each] for each in (
        [(1, 2, 10), (2, 3, 12), (4, 4, 11)], [(2, 4, 20), (2, 4, 24), (2, 4, 22)],
    ))  # fmt: skip
    row = Case("a", Request("forward", 2, 4), ours, official, 1e-6).cells()
    assert dict(zip(COLUMNS, row, strict=True)) == {
        "family": "a", "pass": "forward", "threads": "2", "batch": "4", "rounds": "3", "CPU s": "3.00 / 4.00",
        "CPU ratio": "0.75 (0.50 to 1.00)", "ratio": "1.00 (0.50 to 2.00)", "peak MiB": "12 / 24",
        "difference": "1e-06",
    }  # fmt: skip
