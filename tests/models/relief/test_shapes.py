"""Shapes as a module of an artifact, and pictures of them."""

import pytest
import torch

from models import artifact
from models.relief.pictures import lit_from, rows_of, turned
from models.relief.shape import Shape
from models.relief.shapes import ReliefShapes
from models.rendering.relief import Relief, sphere_cap

SIZE = 16


def shape(value=0.2):
    cap = sphere_cap(torch.ones(1, 1, SIZE, SIZE))
    light = torch.tensor([[0.3, 0.6, -0.4, 0.2]])
    return Shape(cap, torch.full((1, 3, SIZE, SIZE), value), torch.tensor([[0.1, 0.2, 0.0, 0.0, 0.01, 0.0]]), light)


def test_they_travel(tmp_path):
    given = {"b": shape(0.1), "a": shape(-0.4)}
    packed = ReliefShapes.pack(given, Relief(far=1.2))
    artifact.save(tmp_path, stage="shape", modules={"shapes": packed})
    found = artifact.load(tmp_path).module("shapes")
    assert found.ids == ("a", "b") and found.relief == Relief(far=1.2) and "a" in found and len(found) == 2
    for name, wanted in given.items():
        for field, value in found[name].named().items():
            torch.testing.assert_close(value, getattr(wanted, field), rtol=0, atol=0)
    torch.testing.assert_close(found.normals[:1], found.relief.normals(found["a"].depth))
    with pytest.raises(KeyError):
        found["c"]


def test_ids_that_cannot_be():
    with pytest.raises(ValueError, match="cannot name a file"):
        ReliefShapes(["../a"], SIZE)
    with pytest.raises(ValueError, match="two heads have the same id"):
        ReliefShapes(["a", "a"], SIZE)


def test_turned_and_relit():
    """A turn to the front is the canonical picture; light from the left makes the left brighter."""
    one = shape()
    front = turned(one, Relief(), 0.0)
    torch.testing.assert_close(front, one.seen(Relief(), torch.zeros(1, 6)).image, atol=1e-6, rtol=0)
    frontal = Shape(one.depth, one.albedo, torch.zeros(1, 6), one.light)
    left, right = (lit_from(frontal, Relief(), dx, 0.0) for dx in (1.0, -1.0))
    torch.testing.assert_close(left, right.flip(-1), atol=2e-3, rtol=0)
    half = left[..., 3 : SIZE // 2], left[..., SIZE // 2 : -3]
    assert float(half[0].mean()) > float(half[1].mean()) + 0.02
    rows = rows_of(front, one, Relief(), ["it"])
    assert [title for title, _ in rows[0]][:5] == ["it", "found", "depth", "normals", "albedo"]
