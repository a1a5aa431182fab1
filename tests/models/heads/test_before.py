"""Artifacts that were written before classes moved and artifacts had an index: they load, and show the same heads.

``tests/fixtures/before`` was written by the code of before, which also told what its heads look like.
"""

import json

import pytest
import torch

from models.artifact import load
from models.classes import BUILDABLE, MOVED
from models.files import ROOT
from models.generators.baked import BakedHead
from models.heads.codes import HeadCodes
from models.heads.detailed import DetailedGenerator
from models.heads.photos import PhotoSet
from models.heads.subjects import Subjects

BEFORE = ROOT / "tests" / "fixtures" / "before"
SHOWN = json.loads((BEFORE / "shown.json").read_text())


@pytest.mark.parametrize("name", SHOWN)
def test_shows_the_same_head(name):
    subjects = Subjects(load(BEFORE / name))
    subject = subjects[subjects.ids[0]]
    camera = subject.camera or subject.generator.rig.camera(0.1)
    side = None if name == "photos" else 8
    image = subject.generator.synthesis(subject.latents, camera, resolution=side).image
    torch.testing.assert_close(image[:, :, ::4, ::4].flatten(), torch.tensor(SHOWN[name]), atol=2e-5, rtol=0)


def test_of_the_kinds_that_moved():
    stylised, photos, head = (load(BEFORE / name) for name in SHOWN)
    assert type(stylised.module("anchors")) is HeadCodes and Subjects(stylised)["ann"].original is not None
    assert type(photos.module("anchors")) is PhotoSet and type(head.module("generator")) is BakedHead
    subjects = Subjects(photos)
    assert type(subjects[subjects.ids[0]].generator) is DetailedGenerator
    written = {entry["class_path"] for a in (stylised, photos, head) for entry in a.manifest["modules"].values()}
    assert written & MOVED.keys() == {
        "models.anchors.AnchorSet",
        "models.photos.PhotoSet",
        "models.rendering.baked.BakedHead",
    }


def test_every_moved_name_leads_to_a_class():
    assert set(MOVED.values()) <= BUILDABLE and not MOVED.keys() & BUILDABLE
