"""Style sets: the pictures that a fit learns from, as items."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.portraits import PortraitDataModule
from datamodules.style_sets import StyleSet
from models.camera import Rig
from models.errors import UserError

SIDES = (48, 32, 96, 40, 64, 32, 80, 33)


@pytest.fixture
def folder(tmp_path):
    """Pictures of mixed sizes, and a text file."""
    place = tmp_path / "style"
    place.mkdir()
    draws = np.random.default_rng(0)
    for i, side in enumerate(SIDES):
        Image.fromarray(draws.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(place / f"s{i}.png")
    (place / "notes.txt").write_text("by hand")
    return place


def given(path):
    return {"path": str(path), "val_fraction": 0.25, "test_fraction": 0.125, "size": 32, "labels": False}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_items_are_what_a_fit_learns_from(folder, packed):
    path = folder
    if packed:
        path = folder.with_suffix(".zip")
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.iterdir():
                archive.write(file, file.name)
    items = StyleSet(**given(path)).items
    data = PortraitDataModule(**given(path), mirror=False)
    data.setup("fit")
    learnt = data.datasets["train"]
    assert [item.id for item in items] == ["s0", "s1", "s2", "s3", "s4"]
    assert len(learnt) == 5
    for item, sample in zip(items, (learnt[i] for i in range(5)), strict=True):
        assert item.label is None
        torch.testing.assert_close(item.image[None], sample["image"], atol=0, rtol=0)


def test_cameras_come_along(folder):
    labels = [[f"s{i}.png", Rig().camera(0.1 * i).label()[0].tolist()] for i in range(len(SIDES))]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    items = StyleSet(**{**given(folder), "labels": True}).items
    torch.testing.assert_close(items[3].label, torch.tensor(labels[3][1]))


def test_two_pictures_of_one_name(folder):
    Image.open(folder / "s0.png").save(folder / "s0.jpg")
    with pytest.raises(UserError, match=r"s0\.jpg and s0\.png have the same id 's0': rename one"):
        _ = StyleSet(**given(folder)).items


def test_three_pictures_are_too_few_to_hold_any_out(folder):
    for file in sorted(folder.glob("*.png"))[3:]:
        file.unlink()
    items = StyleSet(**{**given(folder), "val_fraction": 0.3, "test_fraction": 0.3}).items
    assert [item.id for item in items] == ["s0"]
    data = PortraitDataModule(**{**given(folder), "val_fraction": 0.1}, mirror=False)
    with pytest.raises(UserError, match="too few pictures for a val split: raise its fraction"):
        data.setup("validate")
