"""What is kept of a training, what it holds, and which of it a run continues from."""

import os
import random
import resource
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from callbacks.checkpoint import LAST, LastCheckpoint, checkpoint_to_read, checkpoints, step_of
from callbacks.guard import FiniteGuard
from callbacks.progress import batches_done
from datamodules.mannequins import MannequinDataModule
from models.errors import UserError
from models.files import is_intact
from stages import cli
from stages.base.ranks import IndependentRanks
from tests.stages import tiny
from tests.stages.test_prior import DATA, stage
from tests.stages.toy import ToyData, ToyTraining


class Everything(ToyTraining):
    """Draws from all global generators, has a moving optimiser and an average, and validates.

    Args:
        scores: by step, what validation finds.
    """

    monitor = ("val/score", "min")

    def __init__(self, scores=None):
        super().__init__()
        self.scores, self.draws = scores or {}, []

    def build_model(self):
        super().build_model()
        self.average = nn.Linear(2, 1).requires_grad_(False)

    def on_train_start(self):
        if self.global_step == 0:  # each rank has its own streams
            for seed in (torch.manual_seed, np.random.seed, random.seed):
                seed(self.global_rank)

    def training_step(self, batch, batch_idx):
        draws = (float(torch.rand(())), float(np.random.rand()), random.random())
        self.draws.append(draws)
        loss = super().training_step(batch, batch_idx) * (1 + sum(draws))
        self.average.weight.lerp_(self.layer.weight, 0.1)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/score", self.scores.get(self.global_step, 1.0))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


class Data(ToyData):
    val_dataloader = ToyData.train_dataloader


def train(out, module=None, resume=False, data=None, callbacks=(), **options):
    """Two passes of twelve batches, saved at every fifth; returns the trained stage."""
    torch.manual_seed(0)
    module = module or Everything()
    trainer = tiny.trainer(out, max_epochs=2, callbacks=[LastCheckpoint(5, keep=3), *callbacks], **options)
    path = checkpoint_to_read(out / "checkpoints" / ("last.ckpt" if resume is True else resume)) if resume else None
    trainer.fit(module, datamodule=data or ToyData(), ckpt_path=path, weights_only=True)
    return module


def names(out):
    return [file.name for file in checkpoints(out / "checkpoints")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder and stage of an uninterrupted training."""
    out = tmp_path_factory.mktemp("whole")
    return out, train(out)


class Died(Exception):
    pass


class Die(pl.Callback):
    """Ends the run before a batch, as a crash would."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batches_done(trainer) == self.batch:
            raise Died


@pytest.fixture
def stopped(tmp_path):
    """Folder of the checkpoints of a training that crashed after batch 17: 15, 12 and 10."""
    with pytest.raises(Died):
        train(tmp_path, callbacks=[Die(17)])
    assert names(tmp_path) == ["step=15.ckpt", "step=12.ckpt", "step=10.ckpt"]
    return tmp_path / "checkpoints"


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_last_ones_are_kept(whole):
    out, _ = whole
    assert names(out) == ["step=24.ckpt", "step=20.ckpt", "step=15.ckpt"]
    assert (out / "checkpoints" / "last.ckpt").resolve().name == "step=24.ckpt"
    assert {file.name for file in (out / "checkpoints").iterdir()} == {*names(out), "last.ckpt"}


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "callbacks.checkpoint"]


def test_a_resumed_run_is_the_same(whole, stopped, caplog):
    resumed = train(stopped.parent, resume=True)
    assert equal(resumed, whole[1]) and resumed.draws == whole[1].draws[15:]
    assert names(stopped.parent) == names(whole[0]) and not warnings(caplog)


def changed(content):
    middle = content.index(b"layer.weight")
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {"cut off": lambda content: content[:-9], "a changed byte": changed, "empty": lambda _: b""}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_falls_back_to_the_one_before(whole, stopped, caplog, damage):
    last = stopped / "step=15.ckpt"
    last.write_bytes(DAMAGE[damage](last.read_bytes()))
    resumed = train(stopped.parent, resume=True)
    assert warnings(caplog) == [f"{last} is damaged: continuing from {stopped / 'step=12.ckpt'}, step 12"]
    assert equal(resumed, whole[1]) and resumed.draws == whole[1].draws[12:]
    assert names(stopped.parent) == names(whole[0]) and all(map(is_intact, checkpoints(stopped)))


def test_two_damaged_ones(stopped, caplog):
    for name in ("step=15.ckpt", "step=12.ckpt"):
        (stopped / name).write_bytes(b"PK")
    assert checkpoint_to_read(stopped / "last.ckpt") == stopped / "step=10.ckpt"
    first = stopped / "step=15.ckpt and step=12.ckpt"
    assert warnings(caplog) == [f"{first} are damaged: continuing from {stopped / 'step=10.ckpt'}, step 10"]


def test_killed_before_the_link_was_made(stopped):
    (stopped / "last.ckpt").unlink()
    assert step_of(checkpoint_to_read(stopped / "last.ckpt")) == 15


def test_none_can_be_read(stopped):
    for file in checkpoints(stopped):
        file.write_bytes(b"")
    with pytest.raises(UserError) as error:
        checkpoint_to_read(stopped / "last.ckpt")
    listed = "step=15.ckpt, step=12.ckpt, step=10.ckpt"
    assert str(error.value) == f"no checkpoint in {stopped} can be read ({listed}): remove the folder to start again"


def test_one_that_is_named_must_be_whole(stopped):
    file = stopped / "step=12.ckpt"
    assert checkpoint_to_read(file) == file
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"step=12\.ckpt is not a checkpoint, or damaged"):
        checkpoint_to_read(file)
    with pytest.raises(UserError, match="there is no checkpoint none"):
        checkpoint_to_read(Path("none/last.ckpt"))


def test_those_after_where_a_run_went_on_are_gone(stopped):
    """Whoever goes back to step 10 does not find step 15 of the other branch as the newest."""
    train(stopped.parent, max_steps=11, resume="step=10.ckpt")
    assert names(stopped.parent) == ["step=11.ckpt", "step=10.ckpt"]


def test_full_disk(stopped):
    """The one that does not fit leaves all before it as they were."""
    before = {file.name: file.read_bytes() for file in stopped.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*/step=20\.ckpt: File too large \(it takes about .* MB\)"):
            train(stopped.parent, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in stopped.iterdir()} == before


class TestBest:
    def best(self, out):
        return torch.load(out / "checkpoints" / "best.ckpt", weights_only=True)["global_step"]

    def test_of_epochs(self, tmp_path):
        train(tmp_path, Everything({12: 0.5, 24: 0.7}), data=Data())
        assert self.best(tmp_path) == 12

    def test_within_an_epoch(self, tmp_path):
        """Validation and its checkpoint in the middle of an epoch change nothing; a NaN score is passed over."""
        often = {"val_check_interval": 4, "check_val_every_n_epoch": None, "data": Data()}
        scores = {4: 0.5, 8: 0.2, 12: float("nan"), 16: 0.3, 20: 0.1}
        validated = train(tmp_path / "whole", Everything(scores), callbacks=[FiniteGuard(1)], **often)
        assert self.best(tmp_path / "whole") == 20
        with pytest.raises(Died):
            train(tmp_path / "cut", Everything(scores), callbacks=[Die(9)], **often)
        assert self.best(tmp_path / "cut") == 8 and names(tmp_path / "cut") == [
            "step=8.ckpt",
            "step=5.ckpt",
            "step=4.ckpt",
        ]
        resumed = train(tmp_path / "cut", Everything(scores | {16: 0.15}), resume=True, **often)
        assert equal(resumed, validated) and resumed.draws == validated.draws[8:]
        assert self.best(tmp_path / "cut") == 20

    def test_a_resumed_run_knows_the_best(self, tmp_path):
        with pytest.raises(Died):
            train(tmp_path, Everything({12: 0.5}), data=Data(), callbacks=[Die(14)])
        train(tmp_path, Everything({24: 0.6}), data=Data(), resume=True)
        assert self.best(tmp_path) == 12


def test_by_the_command_line(tmp_path, caplog):
    line = ["fit", "--data=tests.stages.toy.ToyData", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    line += ["--trainer.callbacks=callbacks.checkpoint.LastCheckpoint", "--trainer.callbacks.every_n_batches=4"]
    line += [f"--out={tmp_path}"]
    cli.run("training", ToyTraining, [*line, "--trainer.max_epochs=1"])
    assert names(tmp_path) == ["step=12.ckpt", "step=8.ckpt"]
    (tmp_path / "checkpoints" / "step=12.ckpt").write_bytes(b"half")
    cli.run("training", ToyTraining, [*line, "--trainer.max_epochs=2", "--ckpt_path=last"])
    assert len(warnings(caplog)) == 1 and names(tmp_path) == ["step=24.ckpt", "step=20.ckpt"]
    with pytest.raises(UserError, match=r"there is no checkpoint .*best\.ckpt"):
        cli.run("training", ToyTraining, [*line, "--ckpt_path=best"])


class TestContent:
    def test_of_the_prior(self, tmp_path):
        """G, D, their average, both optimisers, the place in the data, the real images, and all random states."""
        out = tmp_path / "out"
        module = stage(fit_manifolds=False)
        data = MannequinDataModule(**DATA, cache_dir=str(tmp_path))
        trainer = tiny.trainer(out, max_epochs=-1, limit_val_batches=0, callbacks=[LastCheckpoint(1), Die(8)])
        with pytest.raises(Died):
            trainer.fit(module, datamodule=data)
        found = torch.load(checkpoints(out / "checkpoints")[0], weights_only=True)
        state = module.state_dict()
        assert {name.partition(".")[0] for name in state} == {
            *("generator", "discriminator", "average", "images_seen", "steps_done")
        }
        assert found["state_dict"].keys() == state.keys()
        assert all(torch.equal(found["state_dict"][name], value) for name, value in state.items())
        assert (int(state["images_seen"]), int(state["steps_done"])) == (32, 8)
        for held, optimizer in zip(found["optimizer_states"], trainer.optimizers, strict=True):
            for index, slot in optimizer.state_dict()["state"].items():
                assert all(torch.equal(held["state"][index][name], value) for name, value in slot.items())
        place = {"passes": 2, "position": 2}  # eight batches, three of them a pass
        assert found["loops"]["fit_loop"]["state_dict"] == {"combined_loader": [place]}
        (states,) = found["galatea"]["rng"]
        assert states.keys() == {"torch", "cuda", "numpy", "python"}
        assert torch.equal(states["torch"], torch.get_rng_state())

    def test_each_rank_has_its_own_random_numbers(self, tmp_path):
        def run(out, resume, *callbacks):
            def rank(index):
                options = {"devices": 2, "strategy": IndependentRanks(), "callbacks": callbacks}
                try:
                    module = train(out, resume=resume, **options)
                    torch.save(module.draws, out / f"draws-{resume}-{index}.pt")
                except Died:
                    pass

            tiny.ranks(rank, 2)

        def draws(out, resume, rank):
            return torch.load(out / f"draws-{resume}-{rank}.pt")

        whole, cut = tmp_path / "whole", tmp_path / "cut"
        run(whole, False)
        run(cut, False, Die(8))  # two processes: six batches a pass
        assert names(cut) == ["step=6.ckpt", "step=5.ckpt"]
        found = torch.load(cut / "checkpoints" / "step=6.ckpt", weights_only=True)
        assert len(found["galatea"]["rng"]) == 2
        run(cut, True)
        for rank in (0, 1):
            assert draws(cut, True, rank) == draws(whole, False, rank)[6:]
        first, second = (draws(cut, True, rank) for rank in (0, 1))
        assert len(first) == 6 and all(
            a != b for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
        )


def test_a_disk_without_links(tmp_path, monkeypatch, caplog):
    """Google's drive, exFAT and SMB: training goes on to its end, and the newest is found by its name."""

    def refused(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refused)
    caplog.set_level("INFO")
    train(tmp_path)
    assert LAST not in names(tmp_path) and "step=24.ckpt" in names(tmp_path)
    assert checkpoint_to_read(tmp_path / "checkpoints" / LAST).name == "step=24.ckpt"
    assert caplog.text.count("cannot hold links") == 1


@pytest.mark.parametrize("start", [None, "elsewhere/step=5.ckpt"])
def test_checkpoints_that_a_run_does_not_go_on_from_are_set_aside(tmp_path, stopped, caplog, start):
    """Begun from nothing, or from another run: what the folder held would else be taken for older or newer saves."""
    if start:
        (tmp_path / "elsewhere").mkdir()
        start = shutil.copy(stopped / "step=10.ckpt", tmp_path / start)
    before = {file.name: file.read_bytes() for file in stopped.iterdir()}
    for number in (1, 2):
        trainer = tiny.trainer(tmp_path, max_steps=12, callbacks=[LastCheckpoint(5)])
        trainer.fit(Everything(), datamodule=ToyData(), ckpt_path=start)
        kept = tmp_path / f"checkpoints.{number}"
        if number == 1:
            assert {file.name: file.read_bytes() for file in kept.iterdir()} == before
            assert "up to step 15, are kept in" in caplog.text and str(kept / "step=15.ckpt") in caplog.text
        assert names(tmp_path)[0] == "step=12.ckpt"
    assert checkpoints(kept)[0].name == "step=12.ckpt"


def test_a_disk_without_permissions(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(95, "Operation not supported")

    for name in ("chmod", "link", "utime", "setxattr"):
        monkeypatch.setattr(os, name, refused)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))  # nor is there room in the system's folder
    train(tmp_path)
    assert names(tmp_path)[0] == "step=24.ckpt"


def run(out, checkpoint, *options):
    line = ["fit", "--data=tests.stages.toy.ToyData", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    cli.run("toy", ToyTraining, [*line, "--trainer.max_steps=4", f"--out={out}", f"--ckpt_path={checkpoint}", *options])


def test_a_checkpoint_that_would_run_something(tmp_path, stopped):
    class Poison:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'canary'}",)

    torch.save({"state_dict": {}, "x": Poison()}, stopped / "x.ckpt")
    before = {file.name: file.read_bytes() for file in stopped.iterdir()}
    with pytest.raises(UserError, match=r"x\.ckpt holds more than numbers and names"):
        run(tmp_path, stopped / "x.ckpt")
    with pytest.raises(UserError, match="would run what a checkpoint holds"):
        run(tmp_path, stopped / "x.ckpt", "--weights_only=false")
    assert not (tmp_path / "canary").exists()
    assert {file.name: file.read_bytes() for file in stopped.iterdir()} == before


def test_a_checkpoint_has_no_say_in_the_configuration(tmp_path):
    """Lightning would build what its ``hyper_parameters`` name, and the command line would not win."""
    train(tmp_path / "a", ToyTraining(), max_steps=2)
    (file,) = checkpoints(tmp_path / "a" / "checkpoints")
    torch.save(torch.load(file, weights_only=True) | {"hyper_parameters": {"rate": 0.75}}, file)
    run(tmp_path / "b", file, "--model.rate=0.25")
    assert "rate: 0.25" in (tmp_path / "b" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("write", "match"),
    [
        (lambda file: torch.save({"layer.weight": torch.ones(3)}, file), "is not a checkpoint of a training, though"),
        (lambda file: torch.save(torch.ones(3), file), "is not a checkpoint of a training, though"),
        (lambda file: zipfile.ZipFile(file, "w").writestr("a.txt", "a"), "is not a checkpoint: "),
    ],
)
def test_other_files_are_no_checkpoints(tmp_path, write, match):
    write(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=rf"x\.ckpt {match}"):
        run(tmp_path / "out", tmp_path / "x.ckpt")


def test_no_batch_no_artifact(tmp_path):
    line = ["fit", "--data=tests.stages.toy.ToyData", "--trainer.accelerator=cpu", f"--out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="nothing was trained"):
        cli.run("toy", ToyTraining, [*line, "--trainer.max_steps=0"])
    with pytest.raises(UserError, match="nothing was trained"):
        cli.run("toy", ToyTraining, [*line, "--trainer.limit_train_batches=0"])
    assert not (tmp_path / "out" / "artifact").exists()
