"""GRAMInverter's configurations, made small, from the command line on a folder of pictures with poses."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from skimage.data import astronaut

from datamodules.framing import recipe_of
from models import artifact
from models.camera import Camera
from models.errors import UserError
from models.faces.recipes import RECIPES
from models.files import ROOT
from models.generators.manifold import ManifoldGenerator
from stages.__main__ import dispatch
from stages.pipeline import presets
from tests.stages.processes import galatea
from tests.stages.small import TRAINER, options

SIZE, COUNT = 32, 12
GENERATOR = {
    "z_dim": 8, "w_dim": 16, "resolution": SIZE, "channels": "[16,16,12,8]", "mapping_hidden": 16,
    "triplane.features": 8, "triplane.hidden": 8, "predictor.hidden": 8, "samples": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def portraits(tmp_path_factory):
    """Noise with the cameras of FFHQ, as EG3D stores them."""
    return noise(tmp_path_factory.mktemp("portraits"), "eg3d")


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """Noise with cameras of GRAM's rig."""
    return noise(tmp_path_factory.mktemp("aligned"), "gram")


def noise(folder, recipe):
    labels = RECIPES[recipe].rig.random(COUNT, torch.Generator().manual_seed(0)).label()
    pixels = np.random.default_rng(0).integers(0, 255, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
    for name, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{name:02d}.png")
    names = [[f"{name:02d}.png", label] for name, label in enumerate(labels.tolist())]
    (folder / "dataset.json").write_text(json.dumps({"recipe": recipe, "labels": names}))
    return folder


def test_a_generator_of_ones_own_folder(portraits, tmp_path):
    """As docs/own_folder.md has it, at its own size in all but the networks' widths."""
    small = {f"model.generator.init_args.{name}": value for name, value in GENERATOR.items()}
    small |= {
        "model.discriminator.init_args.channels": "[8,8,8,8]", "model.total_images": 4,
        "data.init_args.path": portraits,
        "data.init_args.size": SIZE, "data.init_args.batch_size": 2, "data.init_args.workers": 0,
    }  # fmt: skip
    config = ROOT / "configs" / "stages" / "prior_portraits.yaml"
    galatea("prior", "fit", f"--config={config}", *options(small), *TRAINER, f"--out={tmp_path}")
    assert {"generator", "discriminator"} == set(artifact.load(tmp_path).manifest["modules"])
    assert presets.kind(str(tmp_path)) == "manifold"
    assert recipe_of(str(tmp_path)).name == "eg3d"  # that of its training pictures


@pytest.fixture
def photos(tmp_path):
    """Crops of the astronaut: of other sizes, turned, mirrored and of other colours."""
    folder = tmp_path / "my_photos"
    folder.mkdir()
    whole = Image.fromarray(astronaut())
    for number in range(COUNT):
        picture = whole.rotate(3 * (number - 6), Image.Resampling.BICUBIC).crop((90, 0, 370, 280))
        if number % 2:
            picture = ImageOps.mirror(picture)
        picture = ImageEnhance.Color(picture).enhance(number / 6)
        side = 96 + 8 * number
        picture.resize((side, side), Image.Resampling.LANCZOS).save(folder / f"{number:02d}.png")
    return folder


@pytest.mark.slow
def test_ones_own_folder_from_photos_to_a_generator(photos, tmp_path):
    """docs/own_folder.md, command after command, with smaller networks and a few steps."""
    page = (ROOT / "docs" / "own_folder.md").read_text()
    align, fit = re.search(r"```sh\n(.*?)\n```", page, re.DOTALL)[1].splitlines()  # type: ignore[index]
    archive = tmp_path / "data" / "portraits.zip"
    places = {"my_photos": photos, "data/portraits.zip": archive, "runs/own": tmp_path / "own"}
    align, fit = ([str(places.get(word, word)) for word in shlex.split(line)[1:]] for line in (align, fit))

    dispatch([*align, f"--size={SIZE}"])
    with zipfile.ZipFile(archive) as file:
        labels = dict(json.loads(file.read("dataset.json"))["labels"])
    assert len(labels) == COUNT
    yaw, pitch = RECIPES["eg3d"].rig.angles(Camera.from_label(torch.tensor(list(labels.values()))))
    assert float(yaw.abs().max()) < math.radians(6)  # she looks into the camera, however the picture is turned
    assert float(pitch.max() - pitch.min()) < math.radians(6)

    small = {f"model.generator.init_args.{name}": value for name, value in GENERATOR.items()}
    small |= {
        "model.discriminator.init_args.channels": "[8,8,8,8]", "model.total_images": 6,
        "data.init_args.size": SIZE, "data.init_args.batch_size": 2, "data.init_args.workers": 0,
    }  # fmt: skip
    galatea(*fit, *options(small), *TRAINER)
    assert presets.kind(str(tmp_path / "own")) == "manifold"
    assert recipe_of(str(tmp_path / "own")).name == "eg3d"
    generator = artifact.load(tmp_path / "own").module("generator")
    assert isinstance(generator, ManifoldGenerator) and generator.resolution == SIZE
    with torch.no_grad():
        assert generator(generator.sample_z(1), generator.rig.camera(0.2)).image.isfinite().all()


@pytest.mark.parametrize("stage", ["prior", "invert"])
def test_cameras_of_another_rig_are_refused_before_anything_is_computed(stage, portraits, tmp_path):
    """Training would go on for days, and learn nothing."""
    other = {f"model.generator.init_args.{name}": value for name, value in GENERATOR.items()}
    other |= {f"model.generator.init_args.rig.{name}": value for name, value in (("near", 5.6), ("far", 8.4))}
    line = [f"--config={ROOT / 'configs' / 'stages' / 'prior_portraits.yaml'}", *options(other)]
    if stage == "invert":  # of the embedded world's own
        line = [
            *options(
                {"model.prior.path": ROOT / "assets" / "prior", "data": "datamodules.portraits.PortraitDataModule"}
            ),
            *options({"data.val_fraction": 0.25, "data.test_fraction": 0.0}),
        ]
    given = options({"data.init_args.path": portraits, "data.init_args.size": SIZE, "data.init_args.workers": 0})
    with pytest.raises(
        UserError, match=r"^00\.png: its camera is 2\.[57]1? from the head, where the generator sees from 5\."
    ):
        dispatch([stage, "fit", *line, *given, *TRAINER, f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out" / "artifact").exists()


def test_prior_learns_from_portraits_by_adversarial_terms_alone(aligned, tmp_path):
    """Four steps of three pictures."""
    wide = {"predictor.hidden": 64}  # the narrower, the farther from GRAM's spheres it starts
    small = {f"model.generator.init_args.{name}": value for name, value in (GENERATOR | wide).items()}
    small |= {
        "model.discriminator.init_args.channels": "[8,8,8,8]", "model.total_images": 12, "trainer.devices": 1,
        "trainer.log_every_n_steps": 1, "data.path": aligned, "data.size": SIZE, "data.batch_size": 3,
        "data.val_fraction": 0.25, "data.workers": 0,
    }  # fmt: skip
    config = ROOT / "configs" / "paper" / "graminverter" / "prior.yaml"
    galatea("prior", "fit", f"--config={config}", *options(small), *TRAINER, f"--out={tmp_path}")

    with open(next(tmp_path.glob("logs/*/metrics.csv"))) as file:
        rows = [row for row in csv.DictReader(file) if row["prior/adversarial"]]
    terms = {name.removeprefix("prior/") for name in rows[0] if name.startswith("prior/")}
    assert terms == {
        "adversarial", "fake_pose", "discriminator", "real_pose", "r1", "gradient_norm", "lr"
    }  # fmt: skip
    assert len(rows) == 4 and all(math.isfinite(float(row[f"prior/{term}"])) for row in rows for term in terms)
    assert [float(row["prior/lr"]) for row in rows] == pytest.approx([2.5e-3] * 4)
    assert list(tmp_path.glob("panels/pairs/*.png"))

    found = artifact.load(tmp_path)
    assert set(found.manifest["modules"]) == {"generator", "discriminator"}
    generator = found.module("generator")
    assert isinstance(generator, ManifoldGenerator) and len(generator.levels) == 23
    assert generator.predictor.start == "geometric" and generator.predictor.last.weight.isfinite().all()
    with torch.no_grad():
        image = generator(generator.sample_z(2), generator.rig.camera(torch.tensor([-0.3, 0.3]))).image
    assert image.shape == (2, 3, SIZE, SIZE) and image.isfinite().all()
