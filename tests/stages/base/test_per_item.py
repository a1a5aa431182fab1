"""Per-item stages of several phases and optimisers, over items that are no artworks."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from datamodules.items import ItemsDataModule
from models.errors import UserError
from stages.base.per_item import GroupState, PerItemStage
from tests.stages.processes import HalfOnCpu
from tests.stages.tiny import killed, ranks, trainer


@dataclass(frozen=True)
class Number:
    """An item."""

    id: str
    value: float


class Numbers(ItemsDataModule[Number]):
    def read_items(self) -> Sequence[Number]:
        return [Number(f"n{k}", float(k)) for k in (2, 1, 3)]


class Phases(PerItemStage[Number, GroupState[Number]]):
    """Three cycles of two phases: first ``left`` moves, then ``right``; and ``late`` in the last one."""

    name = "phases"

    def __init__(self, **options):
        super().__init__(**{"steps": 12, "save_every": 2, **options})
        self.seen, self.after = [], {}

    def start_group(self, items):
        module = nn.ParameterDict({name: nn.Parameter(torch.ones(len(items), 4)) for name in ("left", "right", "late")})
        return GroupState(items, module, {name: torch.optim.Adam([p], 0.1) for name, p in module.items()})

    def active(self, state, step):
        return [("left", "right")[step // 2 % 2], *(["late"] if step >= 8 else [])]

    def optimise(self, state, step):
        values = torch.tensor([item.value for item in state.items])
        total = sum(parameter for parameter in state.module.values())
        return {"loss": (total - values[:, None]).square().mean(1)}

    def before_step(self, state):
        self.seen.append({name for name, p in state.module.items() if p.grad is not None})

    def finish_group(self, state):
        for index, item in enumerate(state.items):
            self.after[item.id] = {name: p[index].detach().clone() for name, p in state.module.items()}
            self.item_dir(item.id).mkdir(parents=True, exist_ok=True)
            torch.save(self.after[item.id], self.item_dir(item.id) / "result.pt")


def fit(out, stage, **options):
    trainer(out, callbacks=[], **options).fit(stage, datamodule=Numbers())
    return {path.parent.name: torch.load(path) for path in sorted(out.glob("items/*/result.pt"))}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k][n], b[k][n]) for k in a for n in a[k])


def test_each_phase_moves_its_own(tmp_path):
    stage = Phases(group_size=3)
    fit(tmp_path, stage)
    assert stage.seen == 2 * ([{"left"}] * 2 + [{"right"}] * 2) + [{"left", "late"}] * 2 + [{"right", "late"}] * 2


def test_items_are_sorted_and_do_not_mix(tmp_path):
    together, alone = fit(tmp_path / "3", Phases(group_size=3)), fit(tmp_path / "1", Phases())
    assert list(together) == ["n1", "n2", "n3"]
    for name, found in alone.items():
        assert all(torch.allclose(t, together[name][key], atol=1e-6) for key, t in found.items())


@pytest.mark.parametrize("step", [3, 9])
def test_a_killed_run_continues_to_the_same_bits(tmp_path, step):
    whole = fit(tmp_path / "whole", Phases(group_size=2))
    ranks(lambda _: fit(tmp_path / "killed", killed(Phases(group_size=2), "n1", step)), 1, kill=True)
    assert not (tmp_path / "killed" / "items" / "n1" / "result.pt").exists()
    assert same(fit(tmp_path / "killed", Phases(group_size=2)), whole)


def test_a_step_without_a_gradient(tmp_path):
    class Still(Phases):
        def optimise(self, state, step):
            losses = super().optimise(state, step)
            return {"loss": losses["loss"].detach()} if step < 10 else losses

    stage = Still(group_size=3)
    after = fit(tmp_path, stage)
    assert stage.seen == [set()] * 10 + [{"right", "late"}] * 2
    assert all((found["left"] == 1).all() for found in after.values()) and (after["n1"]["late"] != 1).all()


def test_float16(tmp_path):
    """The scaler meets the optimisers that have moved only."""
    stage = Phases(group_size=3)
    found = fit(tmp_path / "half", stage, plugins=[HalfOnCpu()])
    assert all(torch.allclose(t, fit(tmp_path / "full", Phases(group_size=3))[k][n], atol=1e-2)
               for k in found for n, t in found[k].items())  # fmt: skip


def test_data_that_are_no_items(tmp_path):
    with pytest.raises(UserError, match="phases works item by item, and LightningDataModule has no items: see --data"):
        trainer(tmp_path, callbacks=[]).fit(Phases(), datamodule=pl.LightningDataModule())
