"""The monitor: speed, memory, learning rates and gradient norms as they are, to the CSV log."""

import csv
import math
import time

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger

from callbacks.monitor import Monitor
from datamodules.resumable import ResumableLoader
from stages.base.stage import Stage
from tests.stages.toy import ToyArtworks, ToyPerArtwork

BATCH, WAIT_S = 4, 0.05


class Pictures(torch.utils.data.Dataset):
    """Two views (2, 3, 2, 2) of each of 24 heads, which take their time."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        time.sleep(WAIT_S / BATCH)
        return {"image": torch.full((2, 3, 2, 2), index / 24)}


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return ResumableLoader(Pictures(), BATCH, trainer=self.trainer)


class Two(Stage):
    """Two networks with an optimiser each; the second one's gradients are not finite."""

    name = "two"

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.painter, self.critic = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        turns = zip(self.optimizers(), (self.painter, self.critic), (1.0, math.inf), strict=True)
        for optimizer, network, scale in turns:
            optimizer.zero_grad()
            self.manual_backward(scale * (3 * network.weight + 4 * network.bias).sum())
            optimizer.step()

    def on_before_optimizer_step(self, optimizer):
        torch.nn.utils.clip_grad_norm_(self.painter.parameters(), 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.painter.parameters(), 0.5), torch.optim.SGD(self.critic.parameters(), 0.25)


def rows(out, stage, data, **options):
    """What the monitor wrote, row by row."""
    options = {"max_epochs": 1, "enable_checkpointing": False, "enable_progress_bar": False, **options}
    trainer = pl.Trainer(
        default_root_dir=out, accelerator="cpu", devices=1, logger=CSVLogger(out, name="logs"),
        callbacks=[Monitor()], enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(stage, datamodule=data)
    with open(next(out.glob("logs/*/metrics.csv"))) as file:
        found = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in found if "speed/steps_per_s" in row]


@pytest.mark.filterwarnings("ignore")
def test_of_two_networks(tmp_path):
    begin = time.monotonic()
    found = rows(tmp_path, Two(), Data(), log_every_n_steps=2)
    took = time.monotonic() - begin
    assert [row["step"] for row in found] == [1, 3, 5]
    for row in found:
        assert row["speed/images_per_s"] == pytest.approx(8 * row["speed/steps_per_s"])
        assert 2 / took < row["speed/steps_per_s"] <= 1 / WAIT_S
        assert row["speed/data_wait"] <= 1 and row["speed/data_wait"] >= WAIT_S * row["speed/steps_per_s"] - 1e-6
        assert 0.05 < row["memory/peak_gb"] < 50 and "memory/gpu_peak_gb" not in row
        assert row["gradient_norm/painter"] == pytest.approx(5) == row["gradient_norm/total"]  # 3, 4: before clipping
        assert "gradient_norm/critic" not in row
        assert row["lr/painter"] == 0.5 and row["lr/critic"] == 0.25


@pytest.mark.filterwarnings("ignore")
def test_of_artworks(tmp_path):
    data = ToyArtworks(4)
    found = rows(tmp_path, ToyPerArtwork(steps=4, group_size=2), data, log_every_n_steps=4, max_steps=-1)
    assert len(found) == 2
    for row in found:
        assert row["speed/images_per_s"] == pytest.approx(2 * row["speed/steps_per_s"])
        assert row["lr/toy"] == 0.05 and row["gradient_norm/toy"] == row["gradient_norm/total"] > 1  # clipped to 1
        assert "speed/data_wait" not in row
    ids = (next(tmp_path.glob("logs/*/hparams.yaml"))).read_text()
    assert "inputs: {}" in ids and "step_hash: null" in ids
