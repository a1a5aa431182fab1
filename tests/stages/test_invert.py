"""Training an encoder: real command lines on the samples of tiny generators of every kind."""

import csv
import json
import math

import pytest
import torch

from models import artifact
from models.encoders.irse import ArcFace
from models.encoders.pyramid import Encoder4Editing
from models.errors import UserError
from models.generators.stylegan2 import StyleGAN2Generator
from models.generators.stylesdf import StyleSDF
from models.heads.directions import Directions
from models.heads.subjects import Subjects
from models.image import read_image
from models.latents import Latents
from models.metrics.records import read_records
from stages import cli
from stages.base.inversion import RateSchedule
from stages.invert import InvertStage
from tests.models.generators.protocol import awaken
from tests.stages import inversions, tiny
from tests.stages.cases import Command, StageCase
from tests.stages.processes import Kill, galatea

CASE = StageCase(
    inversions.invert,
    inversions.prepare,
    commands={
        "fit": Command(batch=6, shared=("model.rendered",), options=inversions.FIFTHS, tolerance=1e-4),
        "test": Command(options=inversions.FIFTHS),
        "predict": Command(options={**inversions.FIFTHS, "data.init_args.batch_size": 1}),
    },
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder of the tiny prior, its portraits and an uninterrupted result."""
    folder = inversions.prepare(tmp_path_factory.mktemp("work"))
    galatea(*inversions.invert(folder), f"--out={folder / 'invert'}")
    return folder


def run(line, out, *more):
    """In this process, which keeps errors as they are."""
    cli.run(line[0], InvertStage, [*line[1:], f"--out={out}", *more])


def logged(out):
    """By key the values of the CSV log."""
    with open(next(out.glob("logs/*/metrics.csv"))) as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}


def test_the_result_is_whole(work):
    found = artifact.load(work / "invert")
    assert set(found.manifest["modules"]) == {"generator", "encoder"}
    generator, encoder = found.module("generator"), found.module("encoder")
    before = artifact.load(work / "tiny").module("generator").state_dict()
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    image = read_image(work / "portraits" / "00.png")
    ws, expression = encoder.invert(image)
    assert expression.shape == (1, 2)
    assert generator.synthesis(ws, generator.rig.camera(0.1), expression=expression).image.isfinite().all()
    assert encoder.mean_latents.ws.sub(generator.mean_latents.ws).abs().max() < 1e-2  # in half precision
    assert {"val/psnr", "val/ssim", "val/lpips", "val/id"} == found.metrics.keys()
    panel = read_image(work / "invert" / "panels" / "heads" / "0000004.png")
    assert panel.shape[-1] == 7 * 33 + 1  # picture, reconstruction and five views


def test_training_reduces_the_loss(work, tmp_path):
    """Of codes and pictures alike, on portraits seen again and again."""
    line = inversions.invert(work, delta_every=0, schedule={"learning_rate": 5e-3, "final": 5e-3, "drop_at": None})
    more = ["--trainer.max_steps=40"]
    run(line, tmp_path, *more, "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0")
    losses = logged(tmp_path)["invert/reconstruction"]
    assert len(losses) == 40 and sum(losses[-8:]) < 0.7 * sum(losses[:8])


@pytest.mark.parametrize("kill", [Kill("last.ckpt", 2), Kill("artifact")], ids=["second step", "export"])
def test_a_killed_run_continues_exactly(work, tmp_path, kill):
    line = [*inversions.invert(work), f"--out={tmp_path}"]
    galatea(*line, kill=kill)
    galatea(*line, f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}")
    assert artifact.load(tmp_path).id == artifact.load(work / "invert").id


def test_killed_after_the_last_validation(work, tmp_path):
    """Within an epoch; its scores are in the artifact though no other validation follows."""
    options = ["--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=3"]
    line = [*inversions.invert(work), *options, "--out"]
    galatea(*line, str(tmp_path / "whole"))
    galatea(*line, str(tmp_path / "killed"), kill=Kill("last.ckpt", 3))
    galatea(*line, str(tmp_path / "killed"), "--ckpt_path=last")
    whole, killed = (artifact.load(tmp_path / name) for name in ("whole", "killed"))
    assert whole.manifest["metrics"]["val/psnr"] and killed.id == whole.id


def test_two_processes_stay_in_step(work, tmp_path):
    more = ["--trainer.strategy=ddp", "--trainer.callbacks+=tests.stages.processes.InStep", f"--out={tmp_path}"]
    assert "2 ranks are equal" in galatea(*inversions.invert(work), *more, ranks=2)
    encoder = artifact.load(tmp_path).module("encoder")
    assert all(value.isfinite().all() for value in encoder.state_dict().values())


def test_bf16(work, tmp_path):
    galatea(
        *inversions.invert(work), "--trainer.precision=bf16-mixed", "--trainer.log_every_n_steps=1", f"--out={tmp_path}"
    )
    found = logged(tmp_path)
    assert len(found["invert/loss"]) == 4 and all(math.isfinite(v) for values in found.values() for v in values)


def test_known_codes_are_asked_for(work):
    """Weighted mean squared errors of codes and expressions, where a batch holds them; some pictures are rendered."""
    generator = artifact.load(work / "tiny").module("generator")
    encoder = Encoder4Editing(**inversions.ENCODER | {"expressions": 2})
    options = {"perceptual": tiny.network("perceptual"), "rendered": 3}
    stage = InvertStage(inversions.ref(work / "tiny"), encoder, code_weight=0.5, expression_weight=2.0, **options)
    stage.build_model()
    stage.draws = lambda: torch.Generator().manual_seed(0)
    z, expression = generator.sample_z(2), torch.rand(2, 3, 2)
    camera = generator.rig.camera(torch.zeros(6))
    batch = {"image": torch.rand(2, 3, 3, 32, 32) * 2 - 1, "label": camera.label().unflatten(0, (2, 3)), "z": z}
    batch["expression"] = expression
    image, camera = stage.pictures(batch)
    stage.eval()
    terms = stage.losses(image, camera, batch)
    ws, moves = stage.invert(image)
    for row in range(6):
        truth = generator.mapping(z)[row // 3].ws[0]
        assert float(terms["code"][row]) == pytest.approx(float((ws.ws[row] - truth).square().mean()), rel=1e-4)
        error = (moves[row] - expression.flatten(0, 1)[row]).square().mean()
        assert float(terms["expression"][row]) == pytest.approx(float(error), rel=1e-4)
    assert len(terms["reconstruction"]) == 3
    expected = terms["reconstruction"].mean() + 1e-3 * terms["delta"] + 1e-4 * terms["pull"]
    torch.testing.assert_close(terms["loss"], expected + 0.5 * terms["code"] + 2.0 * terms["expression"])


def test_without_a_prior_the_generator_learns_too(work, tmp_path):
    run(inversions.invert(work), tmp_path, "--model.joint=true")
    before, after = (artifact.load(path).module("generator") for path in (work / "tiny", tmp_path))
    moved = {
        name.split(".")[0]
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert {"backbone", "background"} <= moved, moved


def test_progress_is_e4es(work):
    encoder = Encoder4Editing(**inversions.ENCODER)
    stage = InvertStage(inversions.ref(work / "tiny"), encoder, perceptual=tiny.network("perceptual"))
    assert [stage.progress(step) for step in (0, 19_999, 20_000, 21_999, 22_000)] == [0, 0, 1, 1, 2]
    stage.delta_every = 0
    assert [stage.progress(step) for step in (0, 20_000)] == [0, None]


def test_schedules():
    drop, fall = RateSchedule(), RateSchedule(1e-3, 1e-5, None)
    assert [drop.rate(step, 10) for step in (0, 99_999, 100_000)] == [3e-4, 3e-4, 6e-5]
    assert [fall.rate(step, 10) for step in (0, 5, 10, 11)] == pytest.approx([1e-3, 5.05e-4, 1e-5, 1e-5])


def stylegan2():
    generator = awaken(StyleGAN2Generator(channels=(6, 5, 4, 4), style_dim=7, mapping_layers=2))
    return generator, {"num_ws": generator.num_ws, "w_dim": 7}


def stylesdf():
    decoder = {"channels": (8, 4, 4), "w_dim": 10, "mapping_layers": 2}
    sizes = {"z_dim": 6, "width": 8, "depth": 2, "mapping_layers": 3, "raw_resolution": 8, "samples": 6}
    generator = awaken(StyleSDF(decoder=decoder, **sizes))
    generator.update_mean()
    groups = {name: list(t.shape[1:]) for name, t in generator.mean_latents.groups.items()}
    return generator, {"num_ws": 0, "groups": groups}


@pytest.mark.parametrize("make", [stylegan2, stylesdf])
def test_other_generators(tmp_path, make):
    """A 2D generator, whose pictures have no cameras, and one with two groups of codes: fit, test and predict."""
    torch.manual_seed(0)
    generator, sizes = make()
    artifact.save(tmp_path / "tiny", stage="zoo", modules={"generator": generator.eval()})
    inversions.portraits(tmp_path / "portraits", generator)
    encoder = {"class_path": "models.encoders.pyramid.Encoder4Editing", "init_args": {**inversions.ENCODER, **sizes}}
    line = inversions.invert(tmp_path, encoder=encoder)
    line += [f"--data.size={generator.resolution}", f"--data.labels={str(generator.is_3d).lower()}"]
    run(line, tmp_path / "out")
    found = artifact.load(tmp_path / "out")
    codes, _ = found.module("encoder").invert(torch.zeros(1, 3, 32, 32))
    assert {n: t.shape for n, t in codes.groups.items()} == {
        n: t.shape for n, t in generator.mean_latents.groups.items()
    }
    tested = f"--model.tested.path={tmp_path / 'out'}"  # which is enough
    run([line[0], "test", *line[2:]], tmp_path / "test", tested, "--model.prior=null", "--model.encoder=null")
    records = read_records(tmp_path / "test")
    assert {record.item for record in records} >= {"10.png", "11.png"}
    assert {"psnr", "ssim", "lpips", "id"} <= {record.metric for record in records}
    assert ("id_nv" in {record.metric for record in records}) == generator.is_3d
    run([line[0], "predict", *line[2:]], tmp_path / "heads", tested)
    heads = Subjects(artifact.load(tmp_path / "heads"))
    assert heads.ids == ("10", "11") and heads["10"].artwork is not None
    assert (heads["10"].camera is None) == (not generator.is_3d)


def test_truth_where_the_data_know_it(work, tmp_path):
    world = {
        "train_subjects": 2, "val_subjects": 1, "test_subjects": 2, "size": 32, "views_per_subject": 2,
        "supersample": 1, "batch_size": 2, "draw_workers": 0, "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    line = inversions.invert(work)
    options = [f"--data.{name}={value}" for name, value in world.items()]
    more = ["--data=datamodules.mannequins.MannequinDataModule", *options, "--model.variant=general"]
    protocol = "--model.protocol.init_args"
    more += [f"{protocol}.sweep_deg=[-20,20]", f"{protocol}.marks=false", f"--model.tested.path={work / 'invert'}"]
    run([line[0], "test", *line[2:]], tmp_path, *more)
    records = read_records(tmp_path)
    assert {record.variant for record in records} == {"general"}
    metrics = {record.metric for record in records}
    assert {"psnr", "psnr@far", "depth_mae", "normal_error", "fid", "psnr@hidden"} - metrics <= {"psnr@hidden"}
    assert len(list((tmp_path / "sweep").glob("*.png"))) == 2


@pytest.fixture
def flat(tmp_path):
    """A 2D generator with its encoder, directions of yaw and pitch, and the line that turns heads by them."""
    torch.manual_seed(0)
    generator, sizes = stylegan2()
    generator.update_mean()
    encoder = Encoder4Editing(**{**inversions.ENCODER, **sizes})
    source = artifact.save(tmp_path / "flat", stage="zoo", modules={"generator": generator.eval(), "encoder": encoder})
    for name, names in (("turns", ("yaw", "pitch")), ("smiles", ("smile", "age"))):
        directions = Directions(names, [("ws", 1, 7)], "")
        directions.direction("ws")[:] = torch.eye(7)[:2, None]
        directions.spread("ws").fill_(1.0)
        modules = {"generator": generator, "directions": directions}
        artifact.save(tmp_path / name, stage="directions", modules=modules, parents={"prior": source})
    world = {
        "train_subjects": 2, "val_subjects": 1, "test_subjects": 2, "size": 32, "views_per_subject": 2,
        "supersample": 1, "batch_size": 2, "draw_workers": 0, "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    line = inversions.invert(tmp_path, prior=None, encoder=None)
    more = ["--data=datamodules.mannequins.MannequinDataModule", *(f"--data.{k}={v}" for k, v in world.items())]
    more += ["--model.protocol.init_args.sweep_deg=[-20,20]", f"--model.tested.path={tmp_path / 'flat'}"]
    more += ["--model.pose=models.features.embedded.EmbeddedPose"]
    return [line[0], "test", *line[2:], *more]


def test_a_2d_generators_heads_turn(flat, tmp_path):
    """They are measured as those of 3D generators are, but for the shape that they have not."""
    run(flat, tmp_path / "out", f"--model.turning.path={tmp_path / 'turns'}", "--model.variant=e4e")
    metrics = {record.metric for record in read_records(tmp_path / "out")}
    assert {"psnr", "id_nv", "fid_nv", "psnr@near", "psnr@far", "psnr_carried"} - metrics <= {"psnr@near"}
    assert not metrics & {"depth_mae", "normal_error"}
    assert {record.variant for record in read_records(tmp_path / "out")} == {"e4e"}
    assert len(list((tmp_path / "out" / "sweep").glob("*.png"))) == 2


def test_what_cannot_turn_is_said(work, flat, tmp_path):
    turns = f"--model.turning.path={tmp_path / 'turns'}"
    with pytest.raises(UserError, match=r"smiles has no direction called yaw: fit it with --model\.names"):
        run(flat, tmp_path / "out", f"--model.turning.path={tmp_path / 'smiles'}")
    with pytest.raises(UserError, match=r"set --model\.pose and --model\.tested\.path"):
        run(flat, tmp_path / "out", turns, "--model.pose=null")
    with pytest.raises(UserError, match="for a 2D generator; a 3D one is seen from other cameras"):
        run(flat, tmp_path / "out", turns, f"--model.tested.path={work / 'invert'}")
    with pytest.raises(UserError, match="give the labels"):
        data = ["--data=datamodules.portraits.PortraitDataModule", f"--data.path={work / 'portraits'}"]
        run(
            [*flat[:2], *flat[2:4], *data, "--data.size=32", "--data.labels=false", *flat[-2:], turns], tmp_path / "out"
        )


def wrong_trunk(folder):
    artifact.save(folder / "face", stage="zoo", modules={"identity": ArcFace(32, 8, (4, 6, 8, 12), (1, 1, 1, 1), 1)})
    return {"trunk": str(folder / "face")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: encoder_of(num_ws=6), r"gives 6 codes of 16 \(ws\), the generator takes 7 codes of 16 \(ws\)"),
        (lambda _: encoder_of(expressions=3), "tells 3 expressions, the generator has 2"),
        (wrong_trunk, "does not fit the trunk of Encoder4Editing"),
    ],
    ids=["codes", "expressions", "trunk"],
)
def test_what_does_not_fit_is_refused(work, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(inversions.invert(work, **change(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out" / "artifact").exists()


def encoder_of(**changes):
    return {
        "encoder": {
            "class_path": "models.encoders.pyramid.Encoder4Editing",
            "init_args": {**inversions.ENCODER, "expressions": 2, **changes},
        }
    }


def test_a_trunk_to_start_from(work, tmp_path):
    torch.manual_seed(5)
    face = ArcFace(32, 8, (4, 6, 8, 10), (1, 1, 1, 1), 1)
    artifact.save(tmp_path / "face", stage="zoo", modules={"identity": face})
    encoder = Encoder4Editing(**inversions.ENCODER | {"expressions": 2})
    stage = InvertStage(
        inversions.ref(work / "tiny"), encoder, trunk=str(tmp_path / "face"), perceptual=tiny.network("perceptual")
    )
    stage.build_model()
    state = stage.encoder.trunk.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in face.trunk.state_dict().items())


def test_what_is_missing_is_said(work, tmp_path):
    line = inversions.invert(work)
    with pytest.raises(UserError, match="a 3D generator needs the cameras"):
        run(line, tmp_path, "--data.labels=false")
    with pytest.raises(UserError, match="test needs what it measures"):
        run([line[0], "test", *line[2:]], tmp_path, "--model.protocol=null", f"--model.tested.path={work / 'invert'}")
    with pytest.raises(UserError, match=r"needs trainer\.max_steps"):
        run(line, tmp_path, "--model.schedule.drop_at=null", "--trainer.max_steps=-1", "--trainer.max_epochs=1")
    for missing in ("prior", "encoder"):
        with pytest.raises(
            UserError, match=r"invert trains --model\.encoder for the generator --model\.prior: give both"
        ):
            run(line, tmp_path, f"--model.{missing}=null")
    with pytest.raises(UserError, match="there is nothing to train"):
        run(line, tmp_path, f"--model.tested.path={work / 'invert'}")
    with pytest.raises(UserError, match="has no module 'encoder'"):
        run([line[0], "test", *line[2:]], tmp_path, f"--model.tested.path={work / 'tiny'}")
    key, inception = "--model.protocol.init_args.distribution", "models.metrics.distribution.InceptionDistribution"
    with pytest.raises(UserError, match=r"^InceptionDistribution has no weights: there is no no\.pth"):
        run([line[0], "test", *line[2:]], tmp_path, f"{key}={inception}", f"{key}.init_args.weights=no.pth")


def test_heads_of_predict(work, tmp_path):
    """What predict hands on shows the codes, expression and camera of each picture."""
    line = inversions.invert(work)
    run([line[0], "predict", *line[2:]], tmp_path, f"--model.tested.path={work / 'invert'}")
    heads = Subjects(artifact.load(tmp_path))
    assert heads.ids == ("10", "11")
    encoder = artifact.load(work / "invert").module("encoder")
    image = read_image(work / "portraits" / "11.png")
    ws, expression = encoder.invert(image)
    assert isinstance(heads["11"].latents, Latents)
    torch.testing.assert_close(heads["11"].latents.ws, ws.ws)
    torch.testing.assert_close(heads["11"].expression, expression)
    label = dict(json.loads((work / "portraits" / "dataset.json").read_text())["labels"])["11.png"]
    torch.testing.assert_close(heads["11"].camera.label()[0], torch.tensor(label))
