"""The files that groups of artworks continue from: damaged ones, and numbers that must not get into them."""

import json
import os

import pytest
import safetensors.torch
import torch

from models.errors import UserError
from models.files import previous
from tests.stages.tiny import ranks, trainer
from tests.stages.toy import ToyArtworks, ToyPerArtwork


class Poisoned(ToyPerArtwork):
    """From step 4 of group i2 on one term, or the gradient, is not a number.

    Args:
        term: "loss", "distance" or "gradient".
        value: what it is instead.
    """

    def __init__(self, term, value=float("nan"), **kwargs):
        super().__init__(**kwargs)
        self.term, self.value = term, value

    def optimise(self, state, step):
        losses = super().optimise(state, step)
        self.poisonous = state.items[0].id == "i2" and step >= 4
        if self.poisonous and self.term in losses:
            losses[self.term] = losses[self.term] * torch.tensor([1.0, self.value])
        return losses

    def before_step(self, state):
        super().before_step(state)
        if self.poisonous and self.term == "gradient":
            state.module.rows.grad[1, 0] = self.value


def fit(out, stage):
    trainer(out, callbacks=[]).fit(stage, datamodule=ToyArtworks(4))
    return {path.parent.name: path.read_bytes() for path in sorted(out.glob("items/*/result.safetensors"))}


def toy(cls=ToyPerArtwork, **options):
    return cls(steps=8, group_size=2, save_every=3, **options)


def step_of(file):
    with safetensors.safe_open(file, "pt") as handle:
        return json.loads(handle.metadata()["galatea"])["step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Results of an uninterrupted run."""
    return fit(tmp_path_factory.mktemp("whole"), toy())


@pytest.fixture
def killed(tmp_path):
    """The newest file of a group whose process was killed at step 7; step 6 and step 3 are saved."""
    ranks(lambda _: fit(tmp_path, toy(kill_at="i2:7")), 1, kill=True)
    file = tmp_path / "items" / "i2" / "group.safetensors"
    assert (step_of(file), step_of(previous(file))) == (6, 3)
    return file


def changed(content):
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


DAMAGE = {"cut off": lambda content: content[:-9], "a changed byte": changed, "empty": lambda _: b""}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_continues_from_the_one_before(whole, killed, tmp_path, caplog, damage):
    killed.write_bytes(DAMAGE[damage](killed.read_bytes()))
    assert fit(tmp_path, toy()) == whole
    (warning,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert warning == f"{killed} is damaged: continuing from {previous(killed)}, step 3"
    assert not list(tmp_path.glob("items/*/group.previous.safetensors"))


def test_killed_between_two_renames(whole, killed, tmp_path):
    os.remove(killed)
    assert fit(tmp_path, toy()) == whole


def test_none_can_be_read(killed, tmp_path):
    for file in (killed, previous(killed)):
        file.write_bytes(b"")
    with pytest.raises(UserError) as error:
        fit(tmp_path, toy())
    assert str(error.value) == f"{killed} and {previous(killed)} are damaged: remove them to start this group again"


TERMS = {
    "loss": "loss of i3 is not finite at step 4",
    "distance": "distance of i3 is not finite at step 4",
    "gradient": "loss of i3 is not finite at step 5",  # of what the step has made of the parameters
}


@pytest.mark.parametrize("term", TERMS)
def test_each_term_is_named_and_the_last_good_state(tmp_path, term):
    with pytest.raises(UserError) as error:
        fit(tmp_path, toy(Poisoned, term=term))
    file = tmp_path / "items" / "i2" / "group.safetensors"
    advice = "lower the learning rates or the loss weights"
    assert str(error.value) == f"toy: {TERMS[term]}: {advice}; step 3 is saved in {file}"
    assert step_of(file) == 3


def test_a_state_that_is_not_finite_is_not_saved(whole, tmp_path):
    """The gradient of the very step that a save follows."""
    with pytest.raises(UserError, match=r"rows of i2 is not finite after step 4: .*nothing was saved before"):
        fit(tmp_path, Poisoned("gradient", float("inf"), steps=8, group_size=2, save_every=5))
    assert not (tmp_path / "items" / "i2").exists()
