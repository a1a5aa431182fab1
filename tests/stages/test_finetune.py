"""Adapting a generator to a style set: a few steps on tiny pictures."""

import copy
import csv
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from datamodules.mannequins import MannequinDataModule
from datamodules.mannequins.scene import POSED_DIM
from models import artifact
from models.encoders.base import inverted
from models.encoders.pyramid import SharedStyleEncoder
from models.errors import UserError
from models.generators.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from models.heads.subjects import Subjects
from models.image import read_image
from models.metrics.distribution import Distribution
from models.metrics.image import psnr
from models.metrics.records import read_records
from stages import cli
from stages.finetune import FinetuneStage
from tests.models.generators.protocol import awaken
from tests.stages import small, test_pairs
from tests.stages.cases import Command, StageCase
from tests.stages.processes import Kill, galatea
from tests.stages.test_pairs import Corners, Difference

SIDE = 16


class Means(Distribution):
    """Features of a kernel distance."""

    num_features = 12

    def forward(self, image):
        return Corners()(image * 2 - 1)


def prior(folder):
    torch.manual_seed(0)
    generator = awaken(StyleGAN2Generator(channels=[8, 8, 8], style_dim=6, mapping_layers=2)).eval()
    generator.update_mean()
    judge = StyleGAN2Discriminator([6, 8, 8])
    artifact.save(folder, stage="prior", modules={"generator": generator, "discriminator": judge.eval()})


def style(folder, count=12):
    """Pictures in one style: reddish stripes."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        rows = np.sin(np.arange(SIDE) * (0.5 + 0.1 * i))[:, None, None]
        picture = 128 + 60 * rows + np.array([60, -40, -60]) + np.zeros((SIDE, SIDE, 3))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"style{i:02}.png")


def inputs(folder, count=0):
    prior(folder / "prior2d")
    style(folder / "style")


def line(folder, data=None, **model):
    given = {
        "prior": {"path": str(folder / "prior2d")},
        "total_images": 24,
        "optimization": {"learning_rate": 2e-3, "warmup_images": 1},
        "adversarial": {"pose_weight": 0.0, "r1_every": 2},
        "semantic": {"weight": 1.0},
        "structure": {"weight": 1.0, "blocks": 2},
        "perceptual": {"class_path": "tests.stages.test_pairs.Difference"},
        "identity": {"class_path": "tests.stages.test_pairs.Corners"},
        "scored": 8,
    }
    pictures = {"path": str(folder / "style"), "size": SIDE, "batch_size": 4, "labels": False, "mirror": False}
    pictures |= {"val_fraction": 0.25, "test_fraction": 0.25} | (data or {})
    config = {
        "model": {**given, **model},
        "data": {"class_path": "datamodules.portraits.PortraitDataModule", "init_args": pictures},
        "trainer": {"callbacks": [small.CHECKPOINT]},
    }
    return ["finetune", "fit", f"--config={small.write(folder / 'finetune.yaml', config)}", *small.TRAINER]


CASE = StageCase(
    line,
    inputs,
    commands={"fit": Command(batch=6, tolerance=None)},  # each rank draws noise of its own
    kills=[Kill("last.ckpt", 2), Kill("artifact")],
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    inputs(folder)
    return folder


def run(words, out, *more):
    cli.run("finetune", FinetuneStage, [*words[1:], f"--out={out}", *more])


def states(folder):
    return artifact.load(folder).module("generator").state_dict()


def moved(folder, source):
    """Names of tensors that are others, but for what half precision does."""
    before, after = states(source), states(folder)
    return {name for name in before if not torch.allclose(before[name], after[name], atol=2e-3, rtol=2e-3)}


def test_codes_stay_what_they_were(work, tmp_path):
    run(line(work), tmp_path)
    changed = moved(tmp_path, work / "prior2d")
    assert changed
    assert [name for name in changed if name.startswith(("map_network", "w_avg"))] == []
    assert artifact.load(tmp_path).module("discriminator") is not None


def test_early_layers_are_frozen(work, tmp_path):
    """FreezeG."""
    run(line(work, train="late", semantic=None, structure=None), tmp_path)
    changed = moved(tmp_path, work / "prior2d")
    assert changed and not any(name.startswith("backbone.blocks.0.conv") for name in changed)


@pytest.mark.parametrize("term", ["semantic", "structure"])
def test_terms_hold_the_pictures(work, tmp_path, term):
    """The stronger a term, the less the picture of a code changes; both see equal codes and noise."""
    distances = []
    for number, weight in enumerate((0.0, 100.0)):
        terms = {"semantic": None, "structure": None} | {term: {"weight": weight}}
        run(line(work, total_images=80, **terms), tmp_path / str(number))
        z = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))
        pictures = []
        for folder in (work / "prior2d", tmp_path / str(number)):
            generator = artifact.load(folder).module("generator")
            with torch.no_grad():
                pictures.append(generator.synthesis(generator.mapping(z)).image)
        distances.append(float((pictures[0] - pictures[1]).square().mean()))
    assert distances[1] < 0.7 * distances[0]


@torch.no_grad()
def test_pairs_are_learnt(tmp_path):
    """G' shows what a style's pictures show at the codes of their pairs, here without a discriminator."""
    test_pairs.inputs(tmp_path)
    test_pairs.run(test_pairs.line(tmp_path), tmp_path / "pairs")
    paired = {"path": str(tmp_path / "pairs"), "level": 2, "weight": 1.0, "batch": 2}
    terms = {"prior": {"path": str(tmp_path / "plain2d")}, "semantic": None, "structure": None, "judge": None}
    terms["kid_features"] = None
    data = {"path": str(tmp_path / "set"), "size": 32, "batch_size": 2, "val_fraction": 0.0, "test_fraction": 0.0}
    run(line(tmp_path, data, paired=paired, total_images=120, **terms), tmp_path / "out")
    stranger = artifact.load(tmp_path / "adapted").module("generator")
    artifact.save(tmp_path / "stranger", stage="prior", modules={"generator": stranger})
    with pytest.raises(UserError, match=r"pairs.* was made for another generator than that of .*stranger"):
        run(line(tmp_path, data, paired=paired, **{**terms, "prior": {"path": str(tmp_path / "stranger")}}), tmp_path)
    pairs = artifact.load(tmp_path / "pairs")
    errors = []
    for folder in ("plain2d", "out"):
        generator, codes = artifact.load(tmp_path / folder).module("generator"), pairs.module("pairs2")
        shown = torch.cat([generator.synthesis(codes[name].latents).image for name in codes.ids])
        style = torch.cat([read_image(pairs.media(f"style_{name}.png")) for name in codes.ids])
        errors.append(float(Difference()(shown, style).mean()))
    assert errors[1] < 0.6 * errors[0]


def test_a_shift_without_a_discriminator(work, tmp_path):
    """StyleGAN-NADA between two sets: pictures move towards the style."""
    shift = {"weight": 1.0, "pictures": 32}
    embedding = {"class_path": "tests.stages.test_pairs.Corners"}
    terms = {"semantic": None, "structure": None, "shift": shift, "embedding": embedding, "judge": None}
    run(line(work, total_images=200, **terms), tmp_path)
    assert "discriminator" not in artifact.load(tmp_path).manifest["modules"]
    z = torch.randn(32, 6, generator=torch.Generator().manual_seed(3))
    reds = []
    for folder in (work / "prior2d", tmp_path):
        generator = artifact.load(folder).module("generator")
        with torch.no_grad():
            mean = generator.synthesis(generator.mapping(z)).image.mean((0, 2, 3))
        reds.append(float(mean[0] - mean[2]))
    assert reds[1] > reds[0] + 0.05


def test_the_best_is_handed_on(work, tmp_path, monkeypatch):
    """A fit ends when its score has not improved for a while, and hands on the generator of the best one."""
    scores = iter([0.5, 0.2, 0.3, 0.4, 0.1])
    monkeypatch.setattr("stages.finetune.feature_distances", lambda *_, **__: {"kid": next(scores)})
    kept = []
    original = FinetuneStage.on_validation_epoch_end

    def watch(self):
        original(self)
        if not self.trainer.sanity_checking:
            kept.append({name: tensor.clone() for name, tensor in self.average.module.state_dict().items()})

    monkeypatch.setattr(FinetuneStage, "on_validation_epoch_end", watch)
    features = {"class_path": "tests.stages.test_finetune.Means"}
    options = ["--trainer.check_val_every_n_epoch=1", "--trainer.num_sanity_val_steps=0"]
    run(line(work, total_images=400, patience=2, kid_features=features), tmp_path, *options)
    assert len(kept) == 4
    found = states(tmp_path)
    for name, tensor in kept[1].items():
        torch.testing.assert_close(found[name], tensor, atol=2e-3, rtol=2e-3)
    assert artifact.load(tmp_path).metrics["val/kid"] == 0.2
    shutil.rmtree(tmp_path / "artifact")  # killed before it was written: there is nothing left to learn
    run(line(work, total_images=400, patience=2, kid_features=features), tmp_path, *options, "--ckpt_path=last")
    assert len(kept) == 4 and artifact.load(tmp_path).metrics["val/kid"] == 0.2
    for name, tensor in states(tmp_path).items():
        torch.testing.assert_close(tensor, found[name])


@pytest.fixture(scope="module")
def coded(work):
    """A generator of the embedded world's codes, and one that it became; pictures of that world in a style."""
    torch.manual_seed(0)
    options = {"style_dim": 8, "mapping_layers": 2, "z_dim": POSED_DIM, "normalize": False}
    generator = awaken(StyleGAN2Generator(channels=[8, 8, 8], **options)).eval()
    generator.update_mean()
    adapted = copy.deepcopy(generator)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.startswith("backbone"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    source = artifact.save(work / "coded", stage="prior", modules={"generator": generator})
    artifact.save(work / "instyle", stage="finetune", modules={"generator": adapted}, parents={"prior": source})
    data = {
        "train_subjects": 1, "val_subjects": 2, "test_subjects": 3, "size": SIDE, "views_per_subject": 1,
        "batch_size": 2, "supersample": 1, "draw_workers": 0, "styles": ["toon"], "coded": True, "posed": True,
        "first": 0,
        "cache_dir": str(work / "cache"),
    }  # fmt: skip
    model = {
        "prior": {"path": str(work / "coded")},
        "judge": None,
        "tested": {"path": str(work / "instyle")},
        "metric": {"class_path": "tests.stages.test_pairs.Difference"},
        "metric_identity": {"class_path": "tests.stages.test_pairs.Corners"},
        "metric_embedding": {"class_path": "tests.stages.test_pairs.Corners"},
        "kid_features": {"class_path": "tests.stages.test_finetune.Means"},
        "attributes": [{"class_path": "tests.stages.test_directions.Colours"}],
        "neighbours": 2,
        "scored": 20,
        "diversity_pictures": 6,
    }
    config = {"model": model, "data": {"class_path": "datamodules.mannequins.MannequinDataModule", "init_args": data}}
    return small.write(work / "coded.yaml", config)


def scores(folder):
    found = {}
    for record in read_records(folder):
        found.setdefault(record.metric, []).append(record.value)
    return found


@torch.no_grad()
def test_it_is_measured_against_the_truth(work, coded, tmp_path):
    """The same head in the style, at its own code; and G, at equal codes."""
    run(["finetune", "test", f"--config={coded}", *small.TRAINER], tmp_path)
    found = scores(tmp_path)
    assert {name: len(values) for name, values in found.items()} == {
        "psnr_twin": 3, "lpips_twin": 3, "id_twin": 3, "psnr_source": 20, "lpips_source": 20, "id_source": 20,
        "bright_error_twin": 3, "bright_error_source": 20, "reddish_error_twin": 3, "reddish_error_source": 20,
        "fid": 1, "kid": 1, "fid_source": 1, "kid_source": 1, "cmmd": 1, "recall": 1,
        "diversity": 6, "diversity_change": 6,
        "psnr_train": 2, "psnr_train_held_out": 2,
    }  # fmt: skip
    data = MannequinDataModule(
        1, 1, 3, SIDE, 1, styles=["toon"], supersample=1, draw_workers=0, cache_dir=str(work / "cache"), coded=True,
        posed=True,
    )  # fmt: skip
    data.setup("test")
    adapted = artifact.load(work / "instyle").module("generator")
    samples = [data.datasets["test"][i] for i in range(3)]
    expected = []
    for sample in samples:
        picture = adapted.synthesis(adapted.mapping(sample["z"][None])).image.clamp(-1, 1)
        expected.append(float(Difference()(picture, sample["image"])))
    assert sorted(found["lpips_twin"]) == pytest.approx(sorted(expected), rel=1e-3)
    data.setup("fit")
    learnt = data.datasets["train"][0]["image"]
    wanted = [float(psnr(sample["image"], learnt)) for sample in samples[:2]]
    assert found["psnr_train_held_out"] == pytest.approx(wanted, rel=1e-3)
    assert read_image(tmp_path / "neighbours.png").shape[1] == 3
    assert min(found["lpips_source"]) > 0


def test_two_processes_measure_what_one_does(coded, tmp_path):
    for ranks in (1, 2):
        galatea("finetune", "test", f"--config={coded}", *small.TRAINER, f"--out={tmp_path / str(ranks)}", ranks=ranks)
    assert values(tmp_path / "2") == pytest.approx(values(tmp_path / "1"), rel=1e-3, abs=1e-6)


def values(folder):
    """All that a test has measured, by what it is of."""
    found = {(r.item, r.view, r.variant, r.metric, r.subject): r.value for r in read_records(folder)}
    assert len(found) == len(read_records(folder))
    return found


@torch.no_grad()
def test_a_blend_is_measured_and_handed_on(work, coded, tmp_path):
    """With nothing of the adapted generator it is G; a hard swap has its coarse layers."""
    test, predict = (["finetune", command, f"--config={coded}", *small.TRAINER] for command in ("test", "predict"))
    run(test, tmp_path / "none", "--model.blend.coarse=0", "--model.blend.swap=8")
    assert max(scores(tmp_path / "none")["lpips_source"]) < 1e-9
    assert scores(tmp_path / "none")["diversity_change"] == pytest.approx([0.0] * 6, abs=1e-6)
    validate = ["finetune", "validate", *test[2:]]
    chosen = []
    for swap in (4, 8):
        run(validate, tmp_path / f"val{swap}", f"--model.blend.swap={swap}")
        (log,) = (tmp_path / f"val{swap}").glob("logs/*/metrics.csv")
        chosen.append(next(csv.DictReader(log.read_text().splitlines())))
    assert float(chosen[0]["val/lpips_source"]) < float(chosen[1]["val/lpips_source"])  # less of it is of the style
    assert math.isfinite(float(chosen[1]["val/kid"]))
    run(predict, tmp_path / "swapped", "--model.blend.swap=8")
    mixed, adapted, original = (states(folder) for folder in (tmp_path / "swapped", work / "instyle", work / "coded"))
    for name, tensor in mixed.items():
        if name.startswith("backbone.blocks"):
            source = adapted if name.startswith("backbone.blocks.0.") else original
            torch.testing.assert_close(tensor, source[name], atol=2e-3, rtol=2e-3)
    assert artifact.load(tmp_path / "swapped").extra["blend"]["swap"] == 8
    with pytest.raises(UserError, match=r"give --model\.tested\.path"):
        run(predict, tmp_path / "nothing", "--model.tested=null")
    with pytest.raises(UserError, match=r"no generator that model\.prior could have become"):
        run(test, tmp_path / "other", f"--model.tested.path={work / 'prior2d'}")
    modules = {"generator": artifact.load(work / "instyle").module("generator")}
    artifact.save(tmp_path / "stranger", stage="finetune", modules=modules)
    with pytest.raises(UserError, match="was made for another generator"):
        run(test, tmp_path / "another", f"--model.tested.path={tmp_path / 'stranger'}")


@torch.no_grad()
def test_a_style_has_a_strength(work, tmp_path):
    """Of samples that G and G' show at equal codes, and what lies between."""
    run(line(work), tmp_path)
    subjects = Subjects(artifact.load(tmp_path))
    subject = subjects["sample2"]
    before, after = (artifact.load(folder).module("generator") for folder in (work / "prior2d", tmp_path))
    pictures = [network.synthesis(subject.latents).image for network in (before, after)]
    for strength, picture in zip((0.0, 1.0), pictures, strict=True):
        torch.testing.assert_close(
            subject.styled(strength).synthesis(subject.latents).image, picture, atol=1e-4, rtol=1e-4
        )
    half = subject.styled(0.5).synthesis(subject.latents).image
    assert all(float((half - picture).abs().max()) > 1e-3 for picture in pictures)
    original = load_file(tmp_path / "artifact" / "original.safetensors")
    assert original == {}  # a reference


@torch.no_grad()
def test_a_style_of_low_rank(work, coded, tmp_path):
    """Measured and handed on as factors: what is loaded is G with a change of that rank, the nearest to the whole."""
    words = ["finetune", "predict", f"--config={coded}", *small.TRAINER]
    run([*words, "--model.rank=2"], tmp_path / "thin")
    run(words, tmp_path / "whole")
    original, adapted, thin = (states(folder) for folder in (work / "coded", work / "instyle", tmp_path / "thin"))
    name = "backbone.blocks.1.conv0.weight"
    changes = [(state[name].double() - original[name].double()).flatten(1) for state in (adapted, thin)]
    left, strength, right = torch.linalg.svd(changes[0], full_matrices=False)
    torch.testing.assert_close(changes[1], left[:, :2] * strength[:2] @ right[:2], atol=2e-3, rtol=2e-3)
    assert float((changes[1] - changes[0]).abs().max()) > 0.01
    stored = set(load_file(tmp_path / "thin" / "artifact" / "generator.safetensors"))
    assert {f"{name}//left", f"{name}//right"} <= stored and name not in stored
    run(["finetune", "test", f"--config={coded}", *small.TRAINER, "--model.rank=2"], tmp_path / "measured")
    run(
        ["finetune", "test", f"--config={coded}", *small.TRAINER, f"--model.tested.path={tmp_path / 'thin'}"],
        tmp_path / "t",
    )
    ours, theirs = (scores(tmp_path / folder)["psnr_source"] for folder in ("measured", "t"))
    assert ours == pytest.approx(theirs, abs=0.05)


@torch.no_grad()
def test_an_encoder_is_handed_on_beside_it(work, coded, tmp_path):
    """Photos become heads in the style by the encoder of the generator that was adapted."""
    prior = artifact.load(work / "coded")
    generator = prior.module("generator")
    encoder = SharedStyleEncoder(
        generator.num_ws, 8, resolution=32, widths=(4, 6, 8, 10), depths=(1, 1, 1, 1), reduction=1
    )
    encoder.start(generator.mean_latents)
    artifact.save(work / "encoder", stage="invert", modules={"encoder": encoder.eval()}, parents={"prior": prior})
    words = ["finetune", "predict", f"--config={coded}", *small.TRAINER]
    run([*words, f"--model.encoder.path={work / 'encoder'}"], tmp_path)
    found = artifact.load(tmp_path)
    photo = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    adapted, together = artifact.load(work / "instyle").module("generator"), found.module("generator")
    ws, _ = inverted(photo, found.module("encoder"), together)
    torch.testing.assert_close(ws.ws, inverted(photo, encoder, generator)[0].ws)
    torch.testing.assert_close(together.synthesis(ws).image, adapted.synthesis(ws).image, atol=1e-2, rtol=1e-2)
    artifact.save(work / "stranger", stage="prior", modules={"generator": copy.deepcopy(adapted)})
    artifact.save(
        work / "of_another", stage="invert", modules={"encoder": encoder},
        parents={"prior": artifact.load(work / "stranger")},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"of_another was made for another generator than that of .*coded"):
        run([*words, f"--model.encoder.path={work / 'of_another'}"], tmp_path / "other")


def test_what_does_not_fit(work, tmp_path):
    with pytest.raises(UserError, match=r"set --model\.perceptual"):
        run(line(work, perceptual=None), tmp_path)
    with pytest.raises(UserError, match=r"model\.semantic\.identity is measured by a network: set --model\.identity"):
        run(line(work, identity=None), tmp_path)
    with pytest.raises(UserError, match=r"model\.patience is measured by a network: set --model\.kid_features"):
        run(line(work, patience=2, kid_features=None), tmp_path)
    with pytest.raises(UserError, match=r"model\.blend is of .*: give --model\.tested\.path"):
        run(line(work, blend={"swap": 8}), tmp_path)
    with pytest.raises(UserError, match=r"leave --model\.tested out"):
        run(line(work, tested={"path": str(work / "prior2d")}), tmp_path)
    with pytest.raises(
        UserError, match=r"pictures have 32 px a side, .*prior2d makes 16: set --data\.init_args\.size=16"
    ):
        run(line(work, {"size": 32}), tmp_path)
    features = {"class_path": "tests.stages.test_finetune.Means"}
    with pytest.raises(UserError, match="the data hold out 1: hold out two or more"):
        run(line(work, {"val_fraction": 0.1}, kid_features=features), tmp_path)
    with pytest.raises(UserError, match=r"structure\.blocks is 9, StyleGAN2Generator has 3"):
        run(line(work, structure={"blocks": 9}), tmp_path)
    with pytest.raises(UserError, match="has no 'critic' to start from"):
        run(line(work, judge="critic"), tmp_path)
    with pytest.raises(UserError, match="nothing tells the generator what to do"):
        run(line(work, judge=None, semantic=None, structure=None), tmp_path)
