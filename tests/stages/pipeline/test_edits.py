"""A photo to an edited head by E3DGE's pipeline; edits that cannot be are refused before its first step."""

import math

import numpy as np
import pytest
import torch

from models import artifact
from models.errors import UserError
from models.files import ROOT
from models.heads.directions import Directions, fingerprint
from models.heads.pixel_aligned import PixelAlignedGenerator
from models.heads.subjects import Subjects
from models.image import read_image, write_image
from stages.pipeline import run as orchestrator
from tests.stages import heads, tiny
from tests.stages import test_selftrain as toy
from tests.stages import test_selftrain_details as details
from tests.stages.processes import galatea

PIPELINE = "configs/pipelines/e3dge.yaml"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Details that say something, directions of their generator, and a photo."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("work")
    toy.prepare(folder)
    prior = artifact.load(folder / "balls")
    heads.directions(folder / "directions", prior, ("smile", "glasses"))
    module = details.wake(details.built(folder, "hybrid", "hybrid"))
    modules = {"generator": module.generator, "encoder": module.encoder, "local": module.local.eval()}
    artifact.save(folder / "hybrid", stage="selftrain", modules=modules, parents={"prior": prior})
    write_image(folder / "photo.png", details.batch_of(folder)["image"][0, 0])
    heads.directions(folder / "others", tiny.prior(folder / "prior"))
    wrong = Directions(["smile"], [("renderer", 1, 12), ("decoder", 1, 10)], fingerprint(prior.module("generator")))
    artifact.save(folder / "wrong", stage="directions", modules={"directions": wrong}, parents={"prior": prior})
    np.save(folder / "smile.npy", np.ones((1, 16)))
    return folder


def line(work, *words):
    given = {"image": work / "photo.png", "model": work / "hybrid", "crop": "none", "yaw_deg": 5, "pitch_deg": 0}
    return [PIPELINE, *(f"--{name}={value}" for name, value in given.items()), *words]


def test_a_photo_is_edited(work, tmp_path):
    words = ["--edit", "smile=1.0", "--edit", "glasses=-0.5", "--directions", str(work / "directions")]
    small = {"frames": 4, "scale": 1, "video_size": 32, "tile": 32, "mesh_size": 0}
    words += [f"--set=present.model.{name}={value}" for name, value in small.items()]
    words += ["--set=invert.data.init_args.size=32", "--device=cpu"]
    galatea("run", *line(work, *words), f"--out={tmp_path}")
    found = artifact.load(tmp_path / "present")
    assert "smile +1, glasses -0.5" in found.media("index.html").read_text("utf-8")
    shown = read_image(found.media("edits_photo.png"))
    # Two rows of the same cameras, under a line each: the input and its view, and seven views of the turned head.
    gap, caption = 4, 13
    step, top = 32 + gap, gap + caption + gap
    assert shown.shape[-1] == gap + 9 * step
    subject = Subjects(artifact.load(tmp_path / "invert"))["photo"]
    assert isinstance(subject.generator, PixelAlignedGenerator)
    directions = artifact.load(work / "directions").module("directions")
    edited = subject.edited(directions, {"smile": 1.0, "glasses": -0.5})
    for row, head in enumerate((subject, edited)):
        y = top + row * (32 + caption + gap + caption + gap)
        for column, camera in ((1, subject.camera), (8, subject.generator.rig.camera(math.radians(36)))):
            x = gap + column * step
            with torch.no_grad():
                image = head.generator.synthesis(head.latents, camera).image.clamp(-1, 1)
            assert (shown[..., y : y + 32, x : x + 32] - image).abs().max() < 0.02, (row, column)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--edit", "smile", "--directions=D"], "argument --edit: 'smile' is not NAME=NUMBER, as in smile=1.0"),
        (["--edit", "smile=much", "--directions=D"], "argument --edit: 'much' is no number: write smile=1.0"),
        (["--edit", "smile=1", "--edit", "smile=-1", "--directions=D"], "--edit is given twice for 'smile'"),
        (["--edit", "smile=1"], "the directions of assets/sdf_directions are of the generator [0-9a-f]{12}, the heads"),
        (["--directions=D"], "--directions is what heads are edited along: give --edit NAME=1.0"),
        (["--edit", "joy=1", "--directions=D"], "there is no direction 'joy', there are: smile, glasses"),
        (["--edit", "smile=1", "--directions=none"], "--directions none: there is no such file or folder"),
        (["--edit", "smile=1", "--directions=OTHERS"], "are of the generator [0-9a-f]{12}, the heads of .*hybrid of"),
        (["--edit", "smile=1", "--directions=WRONG"], r"the directions are of codes renderer \(1, 12\), decoder"),
        (["--edit", "smile=1", "--directions=FILE"], r"smile\.npy"),
        (["--edit", "smile=1", "--directions=PRIOR"], "has no module 'directions'"),
    ],
)
def test_mistakes_cost_no_computation(work, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr(orchestrator.signal, "signal", lambda *_: None)
    places = {"D": "directions", "OTHERS": "others", "WRONG": "wrong", "FILE": "smile.npy", "PRIOR": "balls"}
    words = [f"--directions={work / places[w]}" if (w := word.partition("=")[2]) in places else word for word in words]
    with pytest.raises(UserError, match=message) as caught:
        orchestrator.main([*line(work, *words), f"--out={tmp_path / 'out'}"])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_pipeline_without_directions_of_its_own_asks_for_them(work, tmp_path):
    text = (ROOT / PIPELINE).read_text().replace("default: assets/sdf_directions", "default: null")
    (tmp_path / "own.yaml").write_text(text)
    words = [str(tmp_path / "own.yaml"), *line(work, "--edit", "smile=1")[1:], f"--out={tmp_path / 'out'}"]
    with pytest.raises(
        UserError, match="--edit needs --directions, an artifact of the stage directions that has smile"
    ):
        orchestrator.main(words)
