"""The training of the embedded feature networks: a few of its steps."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml

from datamodules.feature_pairs import FeaturePairs
from models import artifact
from models.features.embedded import EmbeddedStyle
from models.files import ROOT
from models.metrics.records import read_records
from stages.features import FeaturesStage
from tests.stages import small
from tests.stages.cases import Command, StageCase
from tests.stages.processes import Kill
from tests.stages.small import pictures


def small_config(folder):
    """Four steps of two subjects, validated after each second."""
    data = {"train_subjects": 4, "val_subjects": 4, "test_subjects": 4, "batch_size": 2}
    data = {
        "class_path": "datamodules.feature_pairs.FeaturePairs",
        "init_args": data | {"size": 64, "cache": str(folder / "pictures")},
    }
    trainer = {"max_steps": 4, "check_val_every_n_epoch": 1, "callbacks": [small.CHECKPOINT]}
    return {"data": data, "trainer": trainer}


def line(folder):
    file = small.write(folder / "features.yaml", small_config(folder))
    return ["features", "fit", f"--config={file}", *small.TRAINER]


def inputs(folder, count):
    for counts in ((4, 4, 4), (12, 5, 5)):
        small.pictures(FeaturePairs(str(folder / "pictures"), 64, *counts))


_FIVES = {f"data.init_args.{split}_subjects": count for split, count in (("train", 12), ("val", 5), ("test", 5))}
CASE = StageCase(
    line,
    inputs,
    commands={"fit": Command(batch=6, options=_FIVES, tolerance=None), "test": Command(options=_FIVES)},
    kills=[Kill("last.ckpt"), Kill("last.ckpt", 4), Kill("artifact")],
)

COUNT = 8


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: more threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path):
    """Pictures that need no renderer: a colour for each subject, a stripe pattern for each style."""
    module = FeaturePairs(str(tmp_path / "cache"), 64, COUNT, COUNT, COUNT, batch_size=4)
    pictures(module)
    return module


def train(tmp_path, data, steps: int) -> FeaturesStage:
    pl.seed_everything(0)
    stage = FeaturesStage()
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
    )
    trainer.fit(stage, data)
    return stage


def losses(stage: FeaturesStage, data: FeaturePairs) -> dict[str, float]:
    batch = torch.utils.data.default_collate([data.dataset("train")[i] for i in range(COUNT)])
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        found = {**stage.style_blind_losses(batch, generator), **stage.style_aware_losses(batch, generator)}
    return {name: float(value) for name, value in found.items()}


def test_steps_lower_the_losses_and_repeat_exactly(tmp_path, data):
    data.prepare_data()
    stage = train(tmp_path, data, 8)
    state = {name: value.clone() for name, value in stage.state_dict().items()}
    before = FeaturesStage()
    torch.manual_seed(0)
    before.configure_model()
    first, last = losses(before, data), losses(stage, data)
    assert all(np.isfinite(value) for value in last.values())
    assert last["parsing"] < first["parsing"] and last["appearance"] < first["appearance"]
    again = train(tmp_path, data, 8).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())


def test_trunks_are_shared_in_training_and_whole_in_the_artifact(tmp_path, data):
    data.prepare_data()
    stage = train(tmp_path, data, 1)
    assert stage.pose.trunk is stage.parser.trunk is stage.identity.trunk
    assert stage.perceptual.trunk is stage.style.trunk is not stage.identity.trunk
    saved = artifact.save(tmp_path / "a", stage="features", **vars(stage.export()))
    assert set(saved.manifest["modules"]) == {"perceptual", "style", "identity", "parser", "pose"}
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(saved.module("style")(image), stage.style(image), rtol=1e-2, atol=1e-2)
    assert isinstance(EmbeddedStyle(str(tmp_path / "a")), EmbeddedStyle)


def test_evaluation_writes_tidy_metrics(tmp_path, data):
    stage = FeaturesStage()
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False
    )
    (values,) = trainer.test(stage, data, verbose=False)
    records = read_records(tmp_path)
    assert {f"test/{record.metric}" for record in records} == set(values)
    assert {"style_accuracy", "identity_top1_art", "parsing_miou_held_out"} <= {record.metric for record in records}


def test_the_shipped_configuration_builds():
    config = yaml.safe_load((ROOT / "configs" / "stages" / "features.yaml").read_text())
    FeaturesStage(**config["model"])
    data = FeaturePairs(**config["data"]["init_args"])
    assert config["data"]["class_path"] == "datamodules.feature_pairs.FeaturePairs"
    assert data.batch_size <= data.counts["train"] and config["trainer"]["max_steps"] > 0
