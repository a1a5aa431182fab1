"""Offsets of heads: the schedule, the trust region, and that each head goes its own way."""

import math

import pytest
import torch
from torch.testing import assert_close

from models.errors import UserError
from models.heads.offsets import OffsetSearch
from models.latents import Latents
from models.schedule import projector_rate


def codes(count=3):
    draws = torch.Generator().manual_seed(0)
    return Latents({"a": torch.randn(count, 4, 5, generator=draws), "b": torch.randn(count, 2, 3, generator=draws)})


def start(rows=(1, 2), length=0.5):
    """The same unit vector in some layers of group a, nothing in b."""
    n = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0])
    offset = torch.zeros(4, 5)
    offset[list(rows)] = n / n.norm()
    return {"a": length * offset / offset.norm(), "b": torch.zeros(2, 3)}


def away(ws):
    """A loss that falls without end, along another direction for each head."""

    def losses(moved):
        change = (moved.groups["a"] - ws.groups["a"]).sum(1)
        return {"loss": -(change * ws.groups["a"][:, 0]).sum(1), "size": change.norm(dim=1)}

    return losses


class TestSchedule:
    def test_of_the_projector(self):
        """StyleGAN2's code: min(1, (1 - t) / .25), a cosine of it, times min(1, t / .05)."""
        for t in torch.linspace(0, 1, 41, dtype=torch.float64).tolist():
            ramp = 0.5 - 0.5 * math.cos(min(1.0, (1.0 - t) / 0.25) * math.pi)
            assert projector_rate(t) == pytest.approx(ramp * min(1.0, t / 0.05), abs=1e-15)

    def test_steps_are_adams_at_these_rates(self):
        """By hand in float64: the loss is linear, so that each of Adam's steps is as long as its rate."""
        ws, search = codes(1), OffsetSearch(steps=10, trust=None)
        found, curves = search.fit(ws, start(), away(ws))
        rates = [0.1 * projector_rate((i + 1) / 10) for i in range(10)]
        assert rates[0] == 0.1 and rates[-1] == 0  # the first moves; at i / n it would not
        sign = ws.groups["a"][0, 0].double().sign()
        wanted = start()["a"][1].double() + sum(rates) * sign
        assert_close(found.groups["a"][0, 1].double(), wanted, atol=1e-5, rtol=0)
        assert curves.keys() == {"loss", "size"} and curves["loss"].shape == (10, 1)
        assert curves["size"][0].tolist() == pytest.approx([2 * 0.5 / 2**0.5])  # before the first step: alpha n itself


class TestWhatMoves:
    def test_layers_that_move_alike_do_and_others_stay(self):
        ws = codes()
        found = OffsetSearch().fit(ws, start(), away(ws))[0]
        offsets = found.groups["a"]
        assert torch.equal(offsets[:, 1], offsets[:, 2]) and not offsets[:, [0, 3]].any() and offsets[:, 1].any()
        assert not found.groups["b"].any() and not offsets.requires_grad and offsets.shape == (3, 4, 5)

    def test_layers_with_rows_of_their_own_keep_them(self):
        ws, given = codes(), start()
        given["a"][1] *= 2
        offsets = OffsetSearch().fit(ws, given, away(ws))[0].groups["a"]
        assert not torch.equal(offsets[:, 1], offsets[:, 2]) and not offsets[:, [0, 3]].any()

    def test_one_row_for_all_layers(self):
        ws, given = codes(), {"a": torch.full((1, 5), 0.1), "b": torch.full((1, 3), 0.2)}
        found = OffsetSearch(steps=1).fit(ws, given, away(ws))[0]
        assert all(bool((t == t[:, :1]).all()) for t in found.groups.values())
        assert_close(found.groups["b"], torch.full((3, 2, 3), 0.2))  # the loss does not see it

    @pytest.mark.parametrize("trust", [1.0, 1.5])
    def test_trust_region(self, trust):
        """Without it offsets go as far as ten steps of .1 take them."""
        ws = codes()
        held, free = (OffsetSearch(trust=t).fit(ws, start(), away(ws))[0].groups["a"] for t in (trust, None))
        assert bool((held.flatten(1).norm(dim=1) <= trust * 0.5 + 1e-6).all())
        assert bool((free.flatten(1).norm(dim=1) > 1.0).all())
        loose = OffsetSearch(trust=100.0).fit(ws, start(), away(ws))[0].groups["a"]
        assert torch.equal(loose, free)

    def test_side_by_side_is_one_by_one(self):
        ws = codes(4)
        together = OffsetSearch().fit(ws, start(), away(ws))[0].groups["a"]
        for row in range(4):
            alone = OffsetSearch().fit(ws[row], start(), away(ws[row]))[0].groups["a"]
            assert_close(together[row : row + 1], alone, atol=1e-6, rtol=1e-5)


class TestMistakes:
    def test_nothing_moves(self):
        with pytest.raises(UserError, match="this one moves no code"):
            OffsetSearch().fit(codes(), {"a": torch.zeros(1, 5)}, lambda moved: {})

    def test_a_loss_that_is_no_number(self):
        ws = codes()

        def losses(moved):
            return {"loss": (moved.groups["a"] * math.nan).sum((1, 2))}

        with pytest.raises(UserError, match=r"the loss is not finite at step 0: lower offsets\.learning_rate"):
            OffsetSearch().fit(ws, start(), losses)

    @pytest.mark.parametrize("options", [{"steps": 0}, {"learning_rate": -1.0}, {"trust": 0.0}, {"strength": math.nan}])
    def test_settings(self, options):
        with pytest.raises(UserError, match=f"offsets.{next(iter(options))} is"):
            OffsetSearch(**options)
