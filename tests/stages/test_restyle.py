"""Photos in a style: codes of a tiny encoder, pictures of a tiny generator."""

import json

import pytest
import safetensors.torch
import torch
from PIL import Image

from datamodules.mannequins.twins import MannequinTwins
from models import artifact
from models.camera import Camera
from models.encoders.base import inverted
from models.encoders.pyramid import GradualStyleEncoder, SharedStyleEncoder
from models.errors import UserError
from models.generators.stylegan2 import StyleGAN2Generator
from models.generators.stylesdf import StyleSDF
from models.heads.index import read_index
from models.heads.mixing import ReferenceSearch
from models.image import read_image, resized
from models.latents import Latents
from models.metrics.image import psnr
from models.metrics.records import read_records
from stages import cli
from stages.base.seeds import item_generator
from stages.restyle import RestyleStage
from tests.models.generators.protocol import awaken
from tests.stages import small
from tests.stages.cases import Command, StageCase
from tests.stages.processes import galatea
from tests.stages.test_finetune import values
from tests.stages.test_pairs import Corners, Difference

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
        "mix_from": [3],
        "reference_from": [3],
        "reference": str(folder / "photos" / "a.png"),
        "search": {"steps": 3},
        "perceptual": {"class_path": "tests.stages.test_pairs.Difference"},
        "tile": 32,
    }
    data = {"class_path": "datamodules.photos.PhotoDataModule"}
    data["init_args"] = {"path": str(folder / photos), "crop": "none", "size": SIDE, "batch_size": 2}
    file = small.write(folder / "restyle.yaml", {"model": {**given, **model}, "data": data})
    return ["restyle", "predict", f"--config={file}", *small.TRAINER]


CASE = StageCase(line, inputs, commands={"predict": Command(options={"data.init_args.batch_size": 1})})


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    inputs(folder)
    return folder


def run(words, out, *more):
    cli.run("restyle", RestyleStage, [*words[1:], f"--out={out}", *more])


@torch.no_grad()
def test_pictures_are_of_mixed_codes(work, tmp_path, monkeypatch):
    """Of the photo's code, pulled to the mean, with those of a drawn one or of the reference from a number on."""
    monkeypatch.setenv("GALATEA_CACHE", str(tmp_path / "cache"))
    run(line(work, mix_from=[1, 5], reference_from=[3], content_truncation=0.8), tmp_path / "out")
    generator, encoder = (
        artifact.load(work / n).module(m) for n, m in (("instyle", "generator"), ("encoder", "encoder"))
    )
    (kept,) = (tmp_path / "cache" / "references").iterdir()
    guide = Latents(safetensors.torch.load_file(kept))
    drawn = [
        generator.mapping(generator.sample_z(1, item_generator(0, "variation", k)), truncation=0.7) for k in (0, 1)
    ]
    for name in IDS:
        ws, _ = inverted(read_image(work / "photos" / f"{name}.png"), encoder, generator)
        ws = ws.truncate(generator.mean_latents, 0.8)
        expected = {"general": ws, "reference_from3": ws.mix(guide, 3)}
        expected |= {f"sample{k}_from{n}": ws.mix(drawn[k - 1], n) for k in (1, 2) for n in (1, 5)}
        folder = tmp_path / "out" / "items" / name
        assert {file.stem for file in folder.glob("*.png")} == {*expected, "photo", "row"}
        for kind, codes in expected.items():
            picture = generator.synthesis(codes).image.clamp(-1, 1)
            torch.testing.assert_close(read_image(folder / f"{kind}.png"), picture, atol=0.01, rtol=0)
    page = (tmp_path / "out" / "index.html").read_text()
    assert all(f"items/{name}/{kind}.png" in page for name in IDS for kind in ("photo", *expected))
    assert "sample2 (seed 0), codes from 5 on (32 px)" in page


@torch.no_grad()
def test_variations_of_a_code_for_each_layer(work, tmp_path):
    """Drawn from Z+."""
    run(line(work, samples=1, reference=None, mix_from=[0], variation="z+"), tmp_path)
    generator = artifact.load(work / "instyle").module("generator")
    z = generator.sample_z(generator.num_ws, item_generator(0, "variation", 0))[None]
    picture = generator.synthesis(generator.mapping(z, truncation=0.7)).image.clamp(-1, 1)
    found = [read_image(tmp_path / "items" / name / "sample1_from0.png") for name in ("a", "b")]
    torch.testing.assert_close(found[0], picture, atol=0.01, rtol=0)
    assert torch.equal(*found)  # nothing is left of the photos
    told = json.loads((tmp_path / "items" / "a" / "item.json").read_text())
    assert (told["truncation"], told["content_truncation"]) == (0.7, 1.0)


def test_a_reference_is_looked_for_once(work, tmp_path, monkeypatch):
    """By all that its code depends on; a damaged file is looked for again."""
    monkeypatch.setenv("GALATEA_CACHE", str(tmp_path / "cache"))
    counted = []
    original = ReferenceSearch.fit
    monkeypatch.setattr(ReferenceSearch, "fit", lambda self, *a: counted.append(1) or original(self, *a))
    run(line(work), tmp_path / "1")
    run(line(work), tmp_path / "2")
    assert len(counted) == 1
    run(line(work, perceptual={"class_path": "tests.stages.test_restyle.Loud"}), tmp_path / "3")
    assert len(counted) == 2
    for file in (tmp_path / "cache" / "references").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    run(line(work), tmp_path / "4")
    assert len(counted) == 3


class Loud(Difference):
    """Another distance."""

    def forward(self, a, b):
        return 2 * super().forward(a, b)


def test_the_page_shows_what_was_asked(work, tmp_path):
    """And no photos of a run before."""
    run(line(work), tmp_path)
    (work / "later").mkdir()
    (work / "later" / "z.png").write_bytes((work / "photos" / "a.png").read_bytes())
    run(line(work, "later"), tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "items/z/" in page and "items/a/" not in page


@torch.no_grad()
@pytest.mark.parametrize("known", [True, False])
def test_codes_of_the_photos_are_handed_on(work, tmp_path, known):
    """Beside G' and, where its artifact has it, G: what shows them is stored once."""
    style = artifact.load(work / "instyle")
    if known:
        modules = {"generator": style.module("generator"), "original": style.module("generator")}
        style = artifact.save(tmp_path / "style", stage="finetune", modules=modules)
    words = line(work, style={"path": str(style.path)}, content_truncation=0.8)
    run(words, tmp_path / "out")
    found = artifact.load(tmp_path / "out")
    entries = read_index(found.manifest)
    assert [entry.id for entry in entries] == list(IDS)
    assert {entry.original for entry in entries} == {"original" if known else None}
    assert (found.path / "generator.safetensors").stat().st_size < 100  # a reference to where it is
    generator, codes = found.module("generator"), found.module("photos")
    for entry in entries:
        picture = generator.synthesis(codes[entry.id].latents).image.clamp(-1, 1)
        folder = tmp_path / "out" / "items" / entry.id
        torch.testing.assert_close(read_image(folder / "general.png"), picture, atol=0.01, rtol=0)
        assert entry.artwork is not None
        assert found.media(entry.artwork).read_bytes() == (folder / "photo.png").read_bytes()
    assert found.extra["content_truncation"] == 0.8


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
    assert [entry.id for entry in read_index(artifact.load(tmp_path).manifest)] == ["a", "c"]
    assert "Left out" in (tmp_path / "index.html").read_text() and (folder / "notes.txt").exists()


def test_what_does_not_fit(work, tmp_path):
    with pytest.raises(UserError, match=r"mix_from names code 12, .* has 8, numbered from 0, for blocks of 4, 8, 8"):
        run(line(work, mix_from=[3, 12]), tmp_path)
    with pytest.raises(UserError, match=r"framed with 16 px a side, the encoder of .* reads 32"):
        run([*line(work), "--data.init_args.size=16"], tmp_path)
    Image.new("RGB", (SIDE, 2 * SIDE)).save(work / "tall.png")
    with pytest.raises(UserError, match=r"tall\.png"):
        run(line(work, reference=str(work / "tall.png")), tmp_path)
    with pytest.raises(UserError, match="has 3 pictures: name one"):
        run(line(work, reference=str(work / "photos")), tmp_path)
    with pytest.raises(UserError, match=r"give --model\.perceptual"):
        run(line(work, perceptual=None), tmp_path)
    with pytest.raises(UserError, match="artwork nowhere does not exist"):
        run([*line(work), "--data.init_args.path=nowhere"], tmp_path)


@torch.no_grad()
def test_against_the_true_twins(work, tmp_path):
    """The same heads in the style, drawn; and the style set, which no photo is part of."""
    options = {
        "style": "toon", "exaggerate": {"big_eyes": 1.0}, "test_subjects": 3, "style_subjects": 4, "size": SIDE,
        "batch_size": 2, "supersample": 1, "draw_workers": 0, "cache_dir": str(work / "cache"),
    }  # fmt: skip
    embedding = {"class_path": "tests.stages.test_pairs.Corners"}
    config = {
        "model": {
            "style": {"path": str(work / "instyle")}, "encoder": {"path": str(work / "encoder")}, "samples": 1,
            "mix_from": [3], "reference": None, "metric": {"class_path": "tests.stages.test_pairs.Difference"},
            "metric_identity": embedding, "metric_embedding": embedding,
            "kid_features": {"class_path": "tests.stages.test_finetune.Means"}, "attributes": [],
        },
        "data": {"class_path": "datamodules.mannequins.twins.MannequinTwins", "init_args": options},
    }  # fmt: skip
    words = ["test", f"--config={small.write(work / 'twins.yaml', config)}", *small.TRAINER]
    cli.run("restyle", RestyleStage, [*words, f"--out={tmp_path}"])
    records = read_records(tmp_path)
    data = MannequinTwins(**options)
    data.setup("test")
    samples = [data.datasets["test"][i] for i in range(3)]
    generator, encoder = (
        artifact.load(work / n).module(m) for n, m in (("instyle", "generator"), ("encoder", "encoder"))
    )
    for sample in samples:
        assert not torch.equal(sample["image"], sample["twin"])
        picture = generator.synthesis(inverted(sample["image"], encoder, generator)[0]).image.clamp(-1, 1)
        for to, truth in (("photo", sample["image"]), ("twin", sample["twin"])):
            (value,) = [
                r.value for r in records
                if (r.item, r.metric, r.variant) == (str(int(sample["seed"])), f"lpips_{to}", "restyle")
            ]  # fmt: skip
            assert value == pytest.approx(float(Difference()(picture, truth)), rel=1e-3)
    sets = {(r.variant, r.metric) for r in records if r.item == "all"}
    assert sets == {(v, m) for v in ("restyle", "restyle, sample1_from3") for m in ("fid", "kid", "cmmd")}
    config["data"]["init_args"] |= {"test_subjects": 1}
    with pytest.raises(UserError, match="told by 2 pictures of each kind or more, there are 1 photos and 4"):
        run(["restyle", "test", f"--config={small.write(work / 'one.yaml', config)}", *small.TRAINER], tmp_path / "one")
    with pytest.raises(UserError, match="test compares photos with a style set"):
        run(["restyle", "test", *line(work)[2:], "--model.reference=null"], tmp_path)


def test_of_photos_whose_pictures_in_the_style_nobody_knows(work, tmp_path, monkeypatch):
    """How like the photos pictures are, and how far all of them are from the style set."""
    monkeypatch.setenv("GALATEA_CACHE", str(tmp_path / "cache"))
    (work / "style").mkdir()
    for i in range(5):
        pixels = (torch.rand(SIDE, SIDE, 3, generator=torch.Generator().manual_seed(9 + i)) * 255).byte().numpy()
        Image.fromarray(pixels).save(work / "style" / f"{i}.png")
    options = {"path": str(work / "style"), "test_path": str(work / "photos"), "size": SIDE, "batch_size": 2}
    embedding = {"class_path": "tests.stages.test_pairs.Corners"}
    config = {
        "model": {
            "style": {"path": str(work / "instyle")}, "encoder": {"path": str(work / "encoder")}, "samples": 0,
            "reference": str(work / "style" / "0.png"), "reference_from": [3], "search": {"steps": 3},
            "perceptual": {"class_path": "tests.stages.test_pairs.Difference"},
            "metric": {"class_path": "tests.stages.test_pairs.Difference"}, "metric_identity": embedding,
            "metric_embedding": embedding, "kid_features": {"class_path": "tests.stages.test_finetune.Means"},
        },
        "data": {"class_path": "datamodules.style_sets.PhotosAndStyle", "init_args": options},
    }  # fmt: skip
    run(["restyle", "test", f"--config={small.write(work / 'known.yaml', config)}", *small.TRAINER], tmp_path)
    records = read_records(tmp_path)
    generator, encoder = (
        artifact.load(work / n).module(m) for n, m in (("instyle", "generator"), ("encoder", "encoder"))
    )
    with torch.no_grad():
        for name in IDS:
            photo = read_image(work / "photos" / f"{name}.png")
            picture = generator.synthesis(inverted(photo, encoder, generator)[0]).image.clamp(-1, 1)
            look = read_image(work / "style" / "0.png")
            wanted = {"lpips_photo": Difference()(picture, photo)}
            wanted["style_reference"] = 1 - torch.cosine_similarity(Corners()(picture), Corners()(look))
            for metric, expected in wanted.items():
                (value,) = [
                    r.value for r in records if (r.item, r.metric, r.variant) == (f"{name}.png", metric, "restyle")
                ]
                assert value == pytest.approx(float(expected), rel=1e-3)
    assert {r.variant for r in records} == {"restyle", "restyle, reference_from3"}
    again = ["restyle", "test", f"--config={work / 'known.yaml'}", *small.TRAINER, f"--out={tmp_path / 'two'}"]
    galatea(*again, ranks=2)
    assert values(tmp_path / "two") == pytest.approx(values(tmp_path), rel=1e-3, abs=1e-6)
    assert {r.metric for r in records if r.item == "all"} == {"fid", "kid", "cmmd"}
    assert not any(r.metric.endswith("_twin") for r in records)


@torch.no_grad()
def test_heads_in_the_style_against_the_true_twins(work, tmp_path):
    """Of a 3D generator, by the encoder of what it was, seen by the photos' cameras."""
    torch.manual_seed(1)
    sizes = {"z_dim": 51, "width": 8, "depth": 2, "raw_resolution": 8, "samples": 4}
    generator = StyleSDF(**sizes, decoder={"channels": [8], "w_dim": 8, "mapping_layers": 1}).eval()
    generator.update_mean()
    groups = {name: tuple(t.shape[1:]) for name, t in generator.mean_latents.groups.items()}
    encoder = GradualStyleEncoder(groups=groups, **TRUNK)
    encoder.start(generator.mean_latents)
    prior = artifact.save(work / "sdf", stage="prior", modules={"generator": generator})
    parents = {"prior": prior}
    artifact.save(work / "sdf_encoder", stage="selftrain", modules={"encoder": encoder.eval()}, parents=parents)
    for parameter in generator.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    artifact.save(work / "sdf_toon", stage="finetune", modules={"generator": generator}, parents=parents)
    options = {
        "test_subjects": 2, "style_subjects": 2, "size": SIDE, "supersample": 1, "draw_workers": 0, "posed": False,
        "cache_dir": str(work / "cache"),
    }  # fmt: skip
    config = {
        "model": {
            "style": {"path": str(work / "sdf_toon")}, "encoder": {"path": str(work / "sdf_encoder")}, "samples": 0,
            "reference": None, "metric": None, "metric_identity": None, "metric_embedding": None,
            "kid_features": None, "attributes": [],
        },
        "data": {"class_path": "datamodules.mannequins.twins.MannequinTwins", "init_args": options},
    }  # fmt: skip
    file = small.write(work / "sdf.yaml", config)
    cli.run("restyle", RestyleStage, ["test", f"--config={file}", *small.TRAINER, f"--out={tmp_path}"])
    data = MannequinTwins(**options)
    data.setup("test")
    sample = data.datasets["test"][1]
    generator, encoder = (
        artifact.load(work / n).module(m) for n, m in (("sdf_toon", "generator"), ("sdf_encoder", "encoder"))
    )
    ws, _ = inverted(sample["image"], encoder, generator)
    picture = generator.synthesis(ws, Camera.from_label(sample["label"])).image.clamp(-1, 1)
    (found,) = [
        r.value for r in read_records(tmp_path) if r.metric == "psnr_twin" and r.item == str(int(sample["seed"]))
    ]
    truth = resized(sample["twin"], picture.shape[-1])
    assert found == pytest.approx(float(psnr(picture, truth)), abs=0.01)
    with pytest.raises(UserError, match=r"set --model\.samples 0"):
        cli.run("restyle", RestyleStage, ["test", f"--config={file}", "--model.samples=1", f"--out={tmp_path}"])
