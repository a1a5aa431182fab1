"""Asked to leave: saved between two batches, and continued at that very batch, whatever the stage and the ranks."""

import multiprocessing
import os
import signal
import socket

import pytest
import pytorch_lightning as pl
import safetensors.torch
import torch

from callbacks.checkpoint import LastCheckpoint
from callbacks.preemption import PREEMPTED, Preemption
from callbacks.progress import batches_done
from models.errors import UserError
from stages import cli
from stages.base.ranks import IndependentRanks
from stages.pipeline import steps
from tests.stages.toy import ToyArtworks, ToyData, ToyPerArtwork, ToyTraining


class Ask(pl.Callback):
    """Sends the signal in the middle of a batch, to the rank that it names."""

    def __init__(self, batch, rank=0):
        self.batch, self.rank = batch, rank

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if batches_done(trainer) + 1 == self.batch and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGUSR1)


class AskInValidation(pl.Callback):
    def on_validation_start(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGUSR1)


class AskPerArtwork(ToyPerArtwork):
    """Sends the signal to itself at a step of its second group."""

    def optimise(self, state, step):
        if state.items[0].id == "i2" and step == 4 and not (self.out / "asked").exists():
            (self.out / "asked").touch()
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().optimise(state, step)


@pytest.fixture(autouse=True)
def restored():
    """Stopped runs leave the handler behind, as their process ends."""
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def train(out, *callbacks, resume=False, data=None, **options):
    """A training of 24 batches, two passes, that saves nothing but at the end of a pass."""
    torch.manual_seed(0)
    trainer = pl.Trainer(
        **{"default_root_dir": out, "accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False,
           "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
           "callbacks": [LastCheckpoint(), *callbacks, Preemption()], **options}
    )  # fmt: skip
    stage = ToyTraining()
    last = str(out / "checkpoints" / "last.ckpt") if resume else None
    trainer.fit(stage, datamodule=data or ToyData(), ckpt_path=last)
    return stage.layer.weight.detach().clone()


def batches(out):
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]


def test_twice_in_a_training(tmp_path):
    whole = train(tmp_path / "whole")
    out = tmp_path / "stopped"
    for batch in (5, 17):
        with pytest.raises(SystemExit) as stop:
            train(out, Ask(batch), resume=batch == 17)
        assert stop.value.code == PREEMPTED == steps.PREEMPTED
        assert batches(out) == batch
    assert torch.equal(train(out, resume=True), whole)


def test_the_last_batch_waits_for_the_validation(tmp_path):
    """Left before it, the run would go on without."""

    class Data(ToyData):
        val_dataloader = ToyData.train_dataloader

    class Validated(pl.Callback):
        epochs = 0

        def on_validation_end(self, trainer, pl_module):
            self.epochs += 1

    validated = Validated()
    with pytest.raises(SystemExit):
        ToyTraining.validation_step = lambda *_: None
        try:
            train(tmp_path, AskInValidation(), validated, data=Data(), num_sanity_val_steps=0)
        finally:
            del ToyTraining.validation_step
    assert validated.epochs == 1 and batches(tmp_path) == 12


def artworks(out, stage=ToyPerArtwork, **options):
    trainer = pl.Trainer(
        **{"default_root_dir": out, "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False,
           "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
           "callbacks": [Preemption()], **options}
    )  # fmt: skip
    trainer.fit(stage(steps=7, group_size=2, save_every=100), datamodule=ToyArtworks(5))


def results(out):
    return {path.parent.name: path.read_bytes() for path in sorted(out.glob("items/*/result.safetensors"))}


def test_the_resident_group_is_saved(tmp_path):
    artworks(tmp_path / "whole")
    out = tmp_path / "stopped"
    with pytest.raises(SystemExit) as stop:
        artworks(out, AskPerArtwork)
    assert stop.value.code == PREEMPTED
    with safetensors.safe_open(out / "items" / "i2" / "group.safetensors", "pt") as file:
        assert '"step": 5, "finished": false' in file.metadata()["galatea"]
    assert results(out).keys() == {"i0", "i1"}
    artworks(out, AskPerArtwork)
    assert results(out) == results(tmp_path / "whole")


@pytest.mark.parametrize("command", ["validate", "test"])
def test_an_evaluation_stops_between_two_batches(tmp_path, command):
    """Nothing is written: the same command begins anew."""
    seen = []

    class Evaluated(ToyTraining):
        def test_step(self, batch, batch_idx):
            seen.append(batch_idx)
            if batch_idx == 1:
                os.kill(os.getpid(), signal.SIGUSR1)

        validation_step = test_step

    trainer = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[Preemption()])
    with pytest.raises(SystemExit) as stop:
        getattr(trainer, command)(Evaluated(), ToyData().train_dataloader(), verbose=False)
    assert stop.value.code == PREEMPTED and seen == [0, 1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_train_together_stop_together(tmp_path, rank):
    """Only one of them hears the signal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(index):
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(index)}
        train(tmp_path, Ask(3, rank), devices=2, strategy=IndependentRanks())

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(index,)) for index in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [PREEMPTED, PREEMPTED]
    assert batches(tmp_path) == 3


class TestShards:
    """Several runs in one folder, each with its share of the artworks; one without a share finishes."""

    LINE = (
        "--data=tests.stages.toy.ToyArtworks",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--model.steps=4",
    )

    def run(self, out, *options):
        cli.run("toy", ToyPerArtwork, ["fit", *self.LINE, f"--out={out}", *options])

    def test_together_they_make_the_whole(self, tmp_path):
        self.run(tmp_path / "whole")
        out = tmp_path / "shared"
        self.run(out, "--shard=1/2")
        assert results(out).keys() == {"i1", "i3"} and not (out / "artifact").exists()
        assert not (out / "config.yaml").exists()  # the first shard's, or the last run's
        self.run(out, "--shard=0/2")
        self.run(out)
        assert results(out) == results(tmp_path / "whole")
        manifests = [(folder / "artifact" / "manifest.json").read_text() for folder in (out, tmp_path / "whole")]
        assert manifests[0] == manifests[1]

    @pytest.mark.parametrize("text", ["2/2", "1", "a/b", "-1/2"])
    def test_bad_shares(self, tmp_path, text):
        with pytest.raises(UserError, match=r"--shard is .*, write I/N"):
            self.run(tmp_path, f"--shard={text}")

    def test_only_artworks_are_shared(self, tmp_path):
        with pytest.raises(UserError, match="--shard is for fits item by item, not for training fit"):
            data = "--data=tests.stages.toy.ToyData"
            cli.run("training", ToyTraining, ["fit", data, f"--out={tmp_path}", *self.LINE[1:3], "--shard=0/2"])
