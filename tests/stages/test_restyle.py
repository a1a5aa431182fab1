"""Photos in a style: codes of a tiny encoder, pictures of a tiny generator."""

import pytest
import torch
from PIL import Image

from models import artifact
from models.encoders.base import inverted
from models.encoders.pyramid import SharedStyleEncoder
from models.errors import UserError
from models.generators.stylegan2 import StyleGAN2Generator
from models.heads.mixing import first_code
from models.image import read_image
from stages import cli
from stages.restyle import RestyleStage
from tests.models.generators.protocol import awaken
from tests.stages import small
from tests.stages.cases import Command, StageCase

SIDE, IDS = 32, ("a", "b", "c")
TRUNK = {"resolution": SIDE, "widths": (4, 6, 8, 10), "depths": (1, 1, 1, 1), "reduction": 1}


def inputs(folder, count=0):
    torch.manual_seed(0)
    generator = awaken(StyleGAN2Generator(channels=[8, 8, 6, 6], style_dim=6, mapping_layers=2)).eval()
    generator.update_mean()
    artifact.save(folder / "instyle", stage="finetune", modules={"generator": generator})
    encoder = SharedStyleEncoder(generator.num_ws, 6, **TRUNK)
    encoder.start(generator.mean_latents)
    artifact.save(folder / "encoder", stage="invert", modules={"encoder": encoder.eval()})
    (folder / "photos").mkdir(exist_ok=True)
    for i, name in enumerate(IDS):
        pixels = (torch.rand(SIDE, SIDE, 3, generator=torch.Generator().manual_seed(i)) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / "photos" / f"{name}.png")


def line(folder, photos="photos", **model):
    given = {
        "style": {"path": str(folder / "instyle")},
        "encoder": {"path": str(folder / "encoder")},
        "samples": 2,
        "reference": str(folder / "photos" / "a.png"),
        "search": {"steps": 3},
        "perceptual": {"class_path": "tests.stages.test_pairs.Difference"},
        "tile": 32,
    }
    data = {"class_path": "datamodules.photos.PhotoDataModule"}
    data["init_args"] = {"path": str(folder / photos), "crop": "none", "size": SIDE, "batch_size": 2}
    file = small.write(folder / "restyle.yaml", {"model": {**given, **model}, "data": data})
    return ["restyle", "predict", f"--config={file}", *small.TRAINER]


CASE = StageCase(line, inputs, commands={"predict": Command()})


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    inputs(folder)
    return folder


def run(words, out, *more):
    cli.run("restyle", RestyleStage, [*words[1:], f"--out={out}", *more])


@torch.no_grad()
def test_pictures_are_of_mixed_codes(work, tmp_path):
    run(line(work, mix_from=8, reference_from=16), tmp_path)
    generator, encoder = (
        artifact.load(work / n).module(m) for n, m in (("instyle", "generator"), ("encoder", "encoder"))
    )
    others = {}
    for name in IDS:
        folder = tmp_path / "items" / name
        ws, _ = inverted(read_image(work / "photos" / f"{name}.png"), encoder, generator)
        general = generator.synthesis(ws).image.clamp(-1, 1)
        torch.testing.assert_close(read_image(folder / "general.png"), general, atol=0.01, rtol=0)
        others[name] = [read_image(folder / f"{kind}.png") for kind in ("sample1", "sample2", "reference")]
        assert all(float((picture - general).abs().max()) > 0.02 for picture in others[name])
        assert not torch.equal(others[name][0], others[name][1])
    page = (tmp_path / "index.html").read_text()
    assert all(
        f"items/{name}/{kind}.png" in page for name in IDS for kind in ("photo", "general", "sample2", "reference")
    )
    assert first_code(generator, 8) == 1 and len(list((tmp_path / "references").iterdir())) == 1


def test_without_variations_or_a_reference(work, tmp_path):
    run(line(work, samples=0, reference=None, perceptual=None), tmp_path)
    assert sorted(p.name for p in (tmp_path / "items" / "a").glob("*.png")) == ["general.png", "photo.png", "row.png"]


def test_a_broken_photo_is_left_out_and_told_of(work, tmp_path):
    folder = work / "mixed"
    folder.mkdir()
    for name in ("a", "c"):
        (folder / f"{name}.png").write_bytes((work / "photos" / f"{name}.png").read_bytes())
    (folder / "b.png").write_bytes((work / "photos" / "b.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"b\.png.*: left out, the others are done"):
        run(line(work, "mixed"), tmp_path)
    assert sorted(p.name for p in (tmp_path / "items").iterdir()) == ["a", "c"]
    assert "Left out" in (tmp_path / "index.html").read_text() and (folder / "notes.txt").exists()


def test_what_does_not_fit(work, tmp_path):
    with pytest.raises(UserError, match="no block of 24 px to mix from"):
        run(line(work, mix_from=24), tmp_path)
    with pytest.raises(UserError, match=r"give --model\.perceptual"):
        run(line(work, perceptual=None), tmp_path)
    with pytest.raises(UserError, match="artwork nowhere does not exist"):
        run([*line(work), "--data.init_args.path=nowhere"], tmp_path)
