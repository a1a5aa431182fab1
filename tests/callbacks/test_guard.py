"""The guard against numbers that are none. Per-artwork stages: see tests/stages/test_group_file.py."""

import pytest
import pytorch_lightning as pl
import torch

from callbacks.checkpoint import LastCheckpoint, checkpoints
from callbacks.guard import FiniteGuard, not_finite
from callbacks.progress import batches_done
from models.errors import UserError
from stages.base.ranks import IndependentRanks
from tests.stages import tiny
from tests.stages.processes import HalfOnCpu
from tests.stages.toy import ToyData, ToyTraining

TERMS = ("near", "far", "pull")
ADVICE = "lower the learning rate or the loss weights"


class Terms(ToyTraining):
    """A loss of three terms, one of which, or the learning, fails at batch 8.

    Args:
        fails: the name of a term, "gradient", or "moment" of the optimiser.
        value: what it is then.
        rank: of the process that it happens in.
    """

    def __init__(self, fails, value=float("nan"), rank=0):
        super().__init__()
        self.fails, self.value, self.rank = fails, value, rank

    def training_step(self, batch, batch_idx):
        self.failing = batches_done(self.trainer) == 7 and self.global_rank == self.rank
        losses = {name: super(Terms, self).training_step(batch, batch_idx) for name in TERMS}
        if self.failing and self.fails in losses:
            losses[self.fails] = losses[self.fails] * self.value
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()})
        return sum(losses.values())

    def on_after_backward(self):
        if self.failing and self.fails == "gradient":
            self.layer.weight.grad[0, 0] = self.value

    def on_train_batch_end(self, *_):
        if self.failing and self.fails == "moment":
            self.trainer.optimizers[0].state[self.layer.weight]["exp_avg_sq"][0, 0] = self.value

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


def train(out, module, guard, save_every, **options):
    torch.manual_seed(0)
    trainer = tiny.trainer(out, max_epochs=2, callbacks=[LastCheckpoint(save_every), guard], **options)
    trainer.fit(module, datamodule=ToyData())


def stopped(out, module, guard, save_every):
    """What the guard says."""
    with pytest.raises(UserError) as error:
        train(out, module, guard, save_every)
    return str(error.value)


def check_good(out, step):
    """The newest checkpoint is of ``step``; all are of numbers."""
    files = checkpoints(out / "checkpoints")
    assert files[0].name == f"step={step}.ckpt"
    assert not [name for file in files for name in not_finite(torch.load(file, weights_only=True))]
    return files[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("term", TERMS)
def test_the_first_term_and_its_step_are_named(tmp_path, term, value):
    """Read at step 10, when all terms are not numbers any more."""
    text = stopped(tmp_path, Terms(term, value), FiniteGuard(10), 5)
    good = check_good(tmp_path, 5)
    assert text == f"train/{term} is {value} at step 8: {ADVICE}; the last good checkpoint is {good}"


def test_nothing_was_saved_before(tmp_path):
    text = stopped(tmp_path, Terms("far"), FiniteGuard(1), 500)
    assert text == f"train/far is nan at step 8: {ADVICE}; no checkpoint was saved before"


@pytest.mark.parametrize("term", TERMS)
def test_losses_are_read_before_a_checkpoint(tmp_path, term):
    assert stopped(tmp_path, Terms(term), FiniteGuard(500), 3).startswith(f"train/{term} is nan at step 8: ")
    check_good(tmp_path, 6)


STATES = {
    "gradient": "layer.weight is not finite at step 8",
    "moment": "exp_avg_sq of parameter 0 in optimizer 0 is not finite at step 9",
}


@pytest.mark.parametrize("fails", STATES)
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, fails):
    """All losses were numbers until then."""
    every = 8 if fails == "gradient" else 9
    module = Terms(fails, float("inf"))
    train(tmp_path, Terms(None), FiniteGuard(500), 4, max_steps=4)
    with pytest.raises(UserError) as error:
        trainer = tiny.trainer(tmp_path, max_epochs=2, callbacks=[LastCheckpoint(every), FiniteGuard(500)])
        trainer.fit(module, datamodule=ToyData(), ckpt_path=tmp_path / "checkpoints" / "step=4.ckpt", weights_only=True)
    good = check_good(tmp_path, 4)
    assert str(error.value) == f"{STATES[fails]}: {ADVICE}; the last good checkpoint is {good}"


def test_a_sound_run_goes_through(tmp_path):
    train(tmp_path, Terms(None), FiniteGuard(3), 5)
    check_good(tmp_path, 24)


class Told(pl.Callback):
    """Writes down what a rank was told."""

    def __init__(self, folder):
        self.folder = folder

    def on_exception(self, trainer, pl_module, exception):
        (self.folder / str(trainer.global_rank)).write_text(str(exception))


def test_all_ranks_stop_together(tmp_path):
    """Only the second one meets the NaN, and none waits for the other."""

    def rank(index):
        trainer = tiny.trainer(
            tmp_path / "out", max_epochs=2, devices=2, strategy=IndependentRanks(),
            callbacks=[LastCheckpoint(3), FiniteGuard(500), Told(tmp_path)],
        )  # fmt: skip
        torch.manual_seed(0)
        with pytest.raises(UserError):
            trainer.fit(Terms("far", rank=1), datamodule=ToyData())

    tiny.ranks(rank, 2)
    good = check_good(tmp_path / "out", 6)
    rest = f": {ADVICE}; the last good checkpoint is {good}"
    assert (tmp_path / "1").read_text() == f"train/far is nan at step 8{rest}"
    assert (tmp_path / "0").read_text() == f"another process met a number that is not finite{rest}"


class Overflowing(ToyTraining):
    """Finite losses whose gradients are not."""

    def on_after_backward(self):
        self.layer.weight.grad[0, 0] = float("inf")


def test_a_loss_scale_that_is_lost_is_told(tmp_path):
    """16-mixed skips steps without a word; this run would learn nothing."""
    trainer = tiny.trainer(tmp_path, max_epochs=4, callbacks=[FiniteGuard(10)], plugins=[HalfOnCpu()])
    text = r"no gradient fits float16 at step 20 \(loss scale 0\.00024; bf16-mixed may do\): lower the learning rate"
    with pytest.raises(UserError, match=text):
        trainer.fit(Overflowing(), datamodule=ToyData())
