"""Pseudo pairs by a tiny generator, one that was moved, and encoders of both kinds."""

import copy
import json

import pytest
import torch
from PIL import Image
from torch import nn

from datamodules.mannequin_artworks import MannequinStyleSet
from datamodules.mannequins import SPLITS, Scene, render
from models import artifact
from models.encoders.base import inverted
from models.encoders.pyramid import GradualStyleEncoder, MappedStyleEncoder
from models.errors import UserError
from models.generators.stylegan2 import StyleGAN2Generator
from models.heads.index import read_index
from models.image import read_image
from models.metrics.records import read_records
from stages import cli
from stages.pairs import PairsStage
from tests.models.generators.protocol import awaken
from tests.stages import small
from tests.stages.cases import Command, StageCase
from tests.stages.processes import Kill


class Difference(nn.Module):
    """Between pictures, mean square."""

    def forward(self, a, b):
        return (a - b).square().mean((1, 2, 3))


class Corners(nn.Module):
    """An embedding: mean colours of four parts."""

    dim = 12

    def forward(self, image):
        return nn.functional.adaptive_avg_pool2d(image.float(), 2).flatten(1)


SIDE, IDS = 32, ("a", "b", "c")
TRUNK = {"resolution": SIDE, "widths": (4, 6, 8, 10), "depths": (1, 1, 1, 1), "reduction": 1}


def inputs(folder, count=0):
    torch.manual_seed(0)
    generator = awaken(StyleGAN2Generator(channels=[8, 8, 6, 6], style_dim=6, mapping_layers=2)).eval()
    generator.update_mean()
    style = copy.deepcopy(generator)
    with torch.no_grad():
        for name, parameter in style.named_parameters():
            if name.startswith("backbone"):
                parameter.add_(0.05 * torch.randn_like(parameter))
        z = generator.sample_z(len(IDS), torch.Generator().manual_seed(1))
        pictures = style.synthesis(style.mapping(z)).image
    photos = artifact.save(folder / "plain2d", stage="prior", modules={"generator": generator})
    artifact.save(folder / "adapted", stage="finetune", modules={"generator": style}, parents={"prior": photos})
    embed = MappedStyleEncoder(groups={"z": (generator.num_ws, 6)}, **TRUNK)
    refine = GradualStyleEncoder(generator.num_ws, 6, **TRUNK)
    for name, encoder in (("embed", embed), ("refine", refine)):
        encoder.start(generator.mean_latents)
        artifact.save(folder / name, stage="invert", modules={"encoder": encoder.eval()})
    (folder / "set").mkdir(exist_ok=True)
    for name, picture in zip(IDS, pictures, strict=True):
        array = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / "set" / f"{name}.png")


def line(folder, **model):
    given = {
        "prior": {"path": str(folder / "plain2d")},
        "style": {"path": str(folder / "adapted")},
        "embed": {"path": str(folder / "embed")},
        "refine": {"path": str(folder / "refine")},
        "perceptual": {"class_path": "tests.stages.test_pairs.Difference"},
        "identity": {"class_path": "tests.stages.test_pairs.Corners"},
        "steps": 6,
        "group_size": 2,
        "save_every": 2,
    }
    data = {"class_path": "datamodules.artworks.ArtworkDataModule"}
    data["init_args"] = {"path": str(folder / "set"), "crop": "none", "size": SIDE}
    config = {"model": {**given, **model}, "data": data}
    return ["pairs", "fit", f"--config={small.write(folder / 'pairs.yaml', config)}", *small.TRAINER]


CASE = StageCase(
    line,
    inputs,
    commands={"fit": Command()},
    kills=[Kill("group.safetensors"), Kill("pairs.safetensors", 2), Kill("artifact")],
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    inputs(folder)
    return folder


def run(words, out, *more):
    cli.run("pairs", PairsStage, [*words[1:], f"--out={out}", *more])
    return artifact.load(out)


def picture(found, name):
    return read_image(found.media(name))


@torch.no_grad()
def test_levels_are_what_the_paper_says(work, tmp_path):
    """Eq. 4 to 6, each from the one before it; pictures are G's of the codes that are handed on."""
    found = run(line(work, steps=60, search={"learning_rate": 5e-3}), tmp_path)
    generator, style = found.module("generator"), artifact.load(work / "adapted").module("generator")
    embed, refine = (artifact.load(work / name).module("encoder") for name in ("embed", "refine"))
    codes = {k: found.module(f"pairs{k}") for k in (1, 2, 3)}
    assert codes[1].ids == IDS
    for name in IDS:
        s = picture(found, f"style_{name}.png")
        torch.testing.assert_close(s, read_image(work / "set" / f"{name}.png"))
        shown = [generator.synthesis(codes[k][name].latents).image.clamp(-1, 1) for k in (1, 2, 3)]
        for k in (1, 2, 3):
            torch.testing.assert_close(picture(found, f"p{k}_{name}.png"), shown[k - 1], atol=0.01, rtol=0)
        torch.testing.assert_close(codes[1][name].latents.ws, inverted(s, embed, generator)[0].ws, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            codes[3][name].latents.ws, inverted(shown[1], refine, generator)[0].ws, atol=1e-4, rtol=1e-4
        )
        before, after = (Difference()(style.synthesis(codes[k][name].latents).image.clamp(-1, 1), s) for k in (1, 2))
        assert float(after) < float(before)


def test_the_shell_holds_codes(work, tmp_path, monkeypatch):
    """Each layer's z stays as long as N(0, I) has it."""
    lengths = {}
    original = PairsStage.finish_group

    def watch(self, state):
        codes = torch.cat([item.codes["z"].detach() for item in state.projector])
        lengths[self.search.shell] = (codes.square().mean(-1) - 1).square().mean()
        original(self, state)

    monkeypatch.setattr(PairsStage, "finish_group", watch)
    for shell in (0.0, 10.0):
        run(line(work, search={"learning_rate": 0.3, "shell": shell}, steps=25, group_size=3), tmp_path / str(shell))
    assert float(lengths[10.0]) < 0.1 * float(lengths[0.0])


def test_a_plateau_ends_the_search(work, tmp_path):
    losses = []
    for patience in (0, 1):
        search = {"learning_rate": 5e-3, "patience": patience, "plateau": 1e9}
        found = run(line(work, search=search, steps=40, group_size=3), tmp_path / str(patience))
        losses.append(found.metrics["loss"])
    assert losses[1] > losses[0]


def test_sheets_show_all(work, tmp_path, monkeypatch):
    """Pages of the artifact hold every picture beside its three photographs; the index shows heads."""
    monkeypatch.setattr("stages.pairs._PAGE", 2)
    found = run(line(work), tmp_path)
    heights = [picture(found, f"sheet_{page:02d}.png").shape[-2:] for page in (1, 2)]
    assert heights[0][0] == heights[1][0] and heights[0][1] == 2 * heights[1][1] - 5
    assert [entry.id for entry in read_index(found.manifest)] == list(IDS)


@torch.no_grad()
@torch.no_grad()
def test_the_search_outside_of_z(work, tmp_path):
    """From the encoder to W+, in W+."""
    refine = {"path": str(work / "refine")}
    found = run(
        line(work, embed=refine, search={"space": "w+", "learning_rate": 5e-3, "shell": 0.0}, steps=60), tmp_path
    )
    generator, style = found.module("generator"), artifact.load(work / "adapted").module("generator")
    encoder, first, second = (
        artifact.load(work / "refine").module("encoder"),
        *(found.module(f"pairs{k}") for k in (1, 2)),
    )
    for name in IDS:
        s = picture(found, f"style_{name}.png")
        torch.testing.assert_close(first[name].latents.ws, inverted(s, encoder, generator)[0].ws, atol=1e-4, rtol=1e-4)
        before, after = (Difference()(style.synthesis(codes[name].latents).image, s) for codes in (first, second))
        assert float(after) < float(before)


def test_refinement_from_the_style_picture(work, tmp_path):
    """As Eq. 6 is printed."""
    found = run(line(work, refine_from="s"), tmp_path)
    generator, refine = found.module("generator"), artifact.load(work / "refine").module("encoder")
    s = picture(found, "style_a.png")
    torch.testing.assert_close(
        found.module("pairs3")["a"].latents.ws, inverted(s, refine, generator)[0].ws, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_photographs_are_compared_with_the_true_ones(work, tmp_path):
    """Of the embedded world's style sets, whose pictures and twins the data draw."""
    options = {"style": "toon", "subjects": 2, "first": 7, "size": SIDE, "supersample": 1, "draw_workers": 0}
    options["cache_dir"] = str(work / "cache")
    data = MannequinStyleSet(**options)
    names = [item.id for item in data.items]
    assert names == [f"toon-{SPLITS['train'][7 + i]}" for i in range(2)]
    given = [
        f"--data={json.dumps({'class_path': 'datamodules.mannequin_artworks.MannequinStyleSet', 'init_args': options})}"
    ]
    found = run([*line(work), *given], tmp_path / "pairs")
    torch.testing.assert_close(picture(found, f"style_{names[0]}.png")[0], data.items[0].image, atol=0.01, rtol=0)
    words = ["pairs", "test", *line(work)[2:], *given, f"--model.tested.path={tmp_path / 'pairs'}"]
    cli.run("pairs", PairsStage, [*words[1:], f"--out={tmp_path / 'test'}"])
    records = [r for r in read_records(tmp_path / "test") if r.metric == "lpips"]
    assert sorted({r.variant for r in records}) == [*(f"pairs, level {k}" for k in (1, 2, 3)), "the style's picture"]
    for record in records:
        kind = "style" if record.variant.startswith("the") else f"p{record.variant[-1]}"
        twin = data.twin(record.item).image
        assert record.value == pytest.approx(
            float(Difference()(picture(found, f"{kind}_{record.item}.png"), twin)), rel=1e-4
        )
    plain = render(Scene.from_code(data.images[0]["z"][None]), data.items[0].camera, SIDE, "plain", 1).image
    torch.testing.assert_close(data.twin(names[0]).image, plain)
    with pytest.raises(UserError, match="nobody knows whom these pictures show"):
        cli.run(
            "pairs",
            PairsStage,
            ["test", *line(work)[2:], f"--model.tested.path={tmp_path / 'pairs'}", f"--out={tmp_path}"],
        )


def test_what_does_not_fit(work, tmp_path):
    with pytest.raises(UserError, match=r"has an encoder to w: model\.embed is one to z"):
        run(line(work, embed={"path": str(work / "refine")}), tmp_path)
    with pytest.raises(UserError, match=r"has an encoder to z: model\.refine is one to w"):
        run(line(work, refine={"path": str(work / "embed")}), tmp_path)
    with pytest.raises(UserError, match=r"search\.space is 'w'"):
        run(line(work, search={"space": "w"}), tmp_path)
    with pytest.raises(UserError, match=r"has an encoder to z: model\.embed is one to w\+, model\.search\.space"):
        run(line(work, search={"space": "w+", "shell": 0.0}), tmp_path)
    with pytest.raises(UserError, match="no optimize_expression or optimize_noise"):
        run(line(work, search={"optimize_noise": True}), tmp_path)
    with pytest.raises(UserError, match=r"set --model\.identity"):
        run(line(work, identity=None), tmp_path)
    with pytest.raises(UserError, match=r"leave --model\.tested out"):
        run(line(work, tested={"path": str(work / "adapted")}), tmp_path)
    stranger = artifact.load(work / "adapted").module("generator")
    artifact.save(work / "stranger", stage="finetune", modules={"generator": stranger})
    with pytest.raises(UserError, match=r"stranger was made for another generator than that of .*plain2d"):
        run(line(work, style={"path": str(work / "stranger")}), tmp_path)
