"""Anchors, decoding and suppression against loops over single boxes."""

from __future__ import annotations

import pytest
import torch

from models.faces.finder import BlazeFace, FullRangeFinder, overlaps, suppress


def naive_suppression(finds: list[list[float]], overlap: float) -> list[list[float]]:
    left = sorted(finds, key=lambda find: -find[16])
    kept = []
    while left:
        best = left[0]
        same = [find for find in left if find is best or naive_overlap(best, find) > overlap]
        total = sum(find[16] for find in same)
        kept.append([sum(find[i] * find[16] for find in same) / total for i in range(16)] + [best[16]])
        left = [find for find in left if not any(find is one for one in same)]
    return kept


def naive_overlap(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def random_finds(count: int, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=draws, dtype=torch.float64)
    side = 0.1 + 0.3 * torch.rand(count, 2, generator=draws, dtype=torch.float64)
    rest = torch.rand(count, 13, generator=draws, dtype=torch.float64)
    return torch.cat([corner, corner + side, rest], 1)


@pytest.mark.parametrize("overlap", [0.1, 0.3, 0.6])
def test_suppression_is_that_of_a_loop(overlap: float) -> None:
    finds = random_finds(60)
    want = naive_suppression(finds.tolist(), overlap)
    assert 1 < len(want) < 60
    torch.testing.assert_close(suppress(finds, overlap), torch.tensor(want, dtype=torch.float64))


def test_nothing_and_boxes_without_an_area_are_suppressed_too() -> None:
    assert suppress(torch.zeros(0, 17)).shape == (0, 17)
    assert suppress(torch.zeros(2, 17)).shape[1] == 17


def test_overlap_of_known_boxes() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [2, 2, 4, 4], [0, 0, 1, 2]])
    assert overlaps(boxes[0], boxes).tolist() == pytest.approx([1, 1 / 7, 0, 0.5])


@pytest.mark.parametrize(
    ("finder", "count", "first", "last"),
    [
        (BlazeFace("short"), 896, (0.5 / 16, 0.5 / 16), (7.5 / 8, 7.5 / 8)),
        (BlazeFace("back"), 896, (0.5 / 16, 0.5 / 16), (7.5 / 8, 7.5 / 8)),
        (FullRangeFinder(), 2304, (0.5 / 48, 0.5 / 48), (47.5 / 48, 47.5 / 48)),
    ],
    ids=["short", "back", "full"],
)
def test_a_find_is_where_its_anchor_and_values_put_it(finder, count, first, last) -> None:
    assert finder.anchors.shape == (count, 2)
    assert finder.anchors[0].tolist() == pytest.approx(first)
    assert finder.anchors[-1].tolist() == pytest.approx(last)
    values, logits = torch.zeros(1, count, 16), torch.full((1, count), -9.0)
    values[0, -1] = torch.arange(16.0)
    logits[0, -1] = 3.0
    finder.forward = lambda image: (values, logits)  # type: ignore[method-assign]
    (find,) = finder.find(torch.zeros(1, 3, finder.size, finder.size))
    size, (x, y) = finder.size, last
    box = [x + (0 - 1) / size, y + (1 - 1.5) / size, x + (0 + 1) / size, y + (1 + 1.5) / size]
    points = [(x, y)[i % 2] + (4 + i) / size for i in range(12)]
    assert find[0].tolist() == pytest.approx([*box, *points, 1 / (1 + 2.718281828**-3)], abs=1e-5)


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="short or back"):
        BlazeFace("far")  # type: ignore[arg-type]
