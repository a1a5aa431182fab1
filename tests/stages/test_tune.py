"""Tuning a generator to what its encoder inverts: real command lines on the samples of a tiny prior."""

import csv
import math

import pytest
import torch

from models import artifact
from models.errors import UserError
from models.heads.tuning import select_parameters
from models.metrics.records import read_records
from stages import cli
from stages.tune import TuneStage
from tests.stages import inversions, tiny
from tests.stages.cases import Command, StageCase
from tests.stages.processes import Kill, galatea

CASE = StageCase(
    inversions.tune,
    inversions.prepare,
    needs="invert",
    commands={"fit": Command(batch=6, shared=("model.locality_samples",), options=inversions.FIFTHS, tolerance=1e-4)},
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder of the tiny prior, its portraits, an encoder and an uninterrupted result."""
    folder = inversions.prepare(tmp_path_factory.mktemp("work"))
    galatea(*inversions.invert(folder), f"--out={folder / 'invert'}")
    galatea(*inversions.tune(folder), f"--out={folder / 'tune'}")
    return folder


def run(line, out, *more):
    """In this process, which keeps errors as they are."""
    cli.run(line[0], TuneStage, [*line[1:], f"--out={out}", *more])


def logged(out):
    """By key the values of the CSV log."""
    with open(next(out.glob("logs/*/metrics.csv"))) as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}


def stage(work, **options):
    torch.manual_seed(0)
    made = TuneStage(inversions.ref(work / "invert"), perceptual=tiny.network("perceptual"), **options)
    made.build_model()
    return made


def test_only_the_synthesis_moves(work):
    """The manifold predictor and the mapping stay, and so does the encoder (A.4)."""
    before, after = (artifact.load(work / name) for name in ("invert", "tune"))
    old, new = (found.module("generator").state_dict() for found in (before, after))
    moved = {name for name, value in new.items() if not torch.equal(value, old[name])}
    assert moved and moved == set(select_parameters(before.module("generator"), "synthesis", "predictor"))
    assert not any(name.startswith(("predictor", "map_network", "w_mean")) for name in moved)
    encoders = [found.module("encoder").state_dict() for found in (before, after)]
    assert all(torch.equal(value, encoders[1][name]) for name, value in encoders[0].items())
    assert after.manifest["parents"].keys() == {"inverter"}


def test_tuning_reduces_the_loss(work, tmp_path):
    line = inversions.tune(work, schedule={"learning_rate": 2e-2, "final": 2e-2, "drop_at": None})
    more = ["--trainer.max_steps=40", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0"]
    run(line, tmp_path, *more)
    losses = logged(tmp_path)["tune/reconstruction"]
    assert len(losses) == 40 and sum(losses[-8:]) < 0.8 * sum(losses[:8])


def test_the_loss_is_the_papers(work):
    """L_r + 0.5 L_R, the latter 0 while the generator is the original, and of the first pictures of a batch."""
    made = stage(work, locality_samples=2)
    made.draws = lambda: torch.Generator().manual_seed(0)
    image = torch.rand(3, 3, 32, 32) * 2 - 1
    camera = made.generator.rig.camera(torch.tensor([-0.2, 0.0, 0.2]))
    first = made.losses(image, camera, {})
    assert first["locality"].shape == (2,) and float(first["locality"].abs().max()) == 0
    torch.testing.assert_close(first["loss"], first["reconstruction"])
    with torch.no_grad():
        made.generator.backbone.out_bias[:3] += 1.0
    moved = made.losses(image, camera, {})
    assert (moved["locality"] > 0).all()
    torch.testing.assert_close(moved["loss"], moved["reconstruction"] + 0.5 * moved["locality"].mean())
    moved["loss"].mean().backward()
    learning = {name for name, p in made.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert learning and all(name.startswith("generator.") for name in learning)
    assert "locality" not in stage(work, locality_weight=0.0).losses(image, camera, {})


@pytest.mark.parametrize("kill", [Kill("last.ckpt", 3), Kill("artifact")], ids=["third step", "export"])
def test_a_killed_run_continues_exactly(work, tmp_path, kill):
    line = [*inversions.tune(work), f"--out={tmp_path}"]
    galatea(*line, kill=kill)
    galatea(*line, f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}")
    assert artifact.load(tmp_path).id == artifact.load(work / "tune").id


def test_two_processes_stay_in_step(work, tmp_path):
    more = ["--trainer.strategy=ddp", "--trainer.callbacks+=tests.stages.processes.InStep", f"--out={tmp_path}"]
    assert "2 ranks are equal" in galatea(*inversions.tune(work), *more, ranks=2)


def test_bf16(work, tmp_path):
    more = ["--trainer.precision=bf16-mixed", "--trainer.log_every_n_steps=1", f"--out={tmp_path}"]
    galatea(*inversions.tune(work), *more)
    found = logged(tmp_path)
    assert len(found["tune/loss"]) == 4 and all(math.isfinite(v) for values in found.values() for v in values)


def test_before_and_after_are_scored_alike(work, tmp_path):
    """The protocol of both stages is one: tables join their files, paired by item. What is tested is all they need."""
    line = inversions.tune(work, inverter=None)
    for name in ("invert", "tune"):
        tested = [
            f"--model.tested.path={work / name}",
            f"--model.variant={name}",
            "--model.protocol.init_args.marks=false",
        ]
        run([line[0], "test", *line[2:]], tmp_path / name, *tested)
    before, after = (read_records(tmp_path / name) for name in ("invert", "tune"))
    assert [(r.item, r.metric) for r in before] == [(r.item, r.metric) for r in after]
    assert [r.value for r in before if r.metric == "psnr"] != [r.value for r in after if r.metric == "psnr"]
    assert {r.variant for r in before} == {"invert"} and {r.variant for r in after} == {"tune"}


def test_what_is_no_inverter_is_refused(work, tmp_path):
    with pytest.raises(UserError, match="has no module 'encoder'"):
        run(inversions.tune(work, inverter={"path": str(work / "tiny")}), tmp_path)
    with pytest.raises(UserError, match=r"tune needs the generator and encoder .*: --model\.inverter\.path"):
        run(inversions.tune(work, inverter=None), tmp_path)
    with pytest.raises(UserError, match="leaves no parameter"):
        run(inversions.tune(work), tmp_path, "--model.train=nothing_like_it")
    assert not (tmp_path / "artifact").exists()
