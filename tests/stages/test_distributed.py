"""Two processes, and half precision, by the real command lines. For bf16 in anchor and stylize see their own tests."""

import csv
import math

import pytest

from models import artifact
from tests.stages import small
from tests.stages.processes import galatea

DDP = ["--trainer.strategy=ddp"]
PER_ARTWORK = ("anchor", "stylize")
TRAINING = ("prior", "features")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder of the inputs, and of the results of one process."""
    folder = tmp_path_factory.mktemp("work")
    lines = small.lines(folder)
    for stage in PER_ARTWORK:
        galatea(*lines[stage], f"--out={folder / stage}")
    return folder


@pytest.fixture(scope="module")
def lines(work):
    return small.lines(work)


def finite(found):
    """Whether all modules load, and hold numbers."""
    modules = [found.module(name) for name in found.manifest["modules"]]
    return bool(modules) and all(t.isfinite().all() for m in modules for t in m.state_dict().values())


@pytest.mark.parametrize("stage", PER_ARTWORK)
def test_artworks_do_not_depend_on_the_number_of_processes(work, lines, tmp_path, stage):
    galatea(*lines[stage], *DDP, f"--out={tmp_path}", ranks=2)
    assert artifact.load(tmp_path).id == artifact.load(work / stage).id


@pytest.mark.parametrize("stage", TRAINING)
def test_bf16(work, lines, tmp_path, stage):
    options = ["--trainer.precision=bf16-mixed", "--trainer.log_every_n_steps=1"]
    galatea(*lines[stage], *options, f"--out={tmp_path}")
    with open(next(tmp_path.glob("logs/*/metrics.csv"))) as file:
        rows = list(csv.DictReader(file))
    losses = [float(row[key]) for row in rows for key in row if row[key] and key.startswith((stage, "train"))]
    assert len(losses) > 8 and all(map(math.isfinite, losses))
    assert finite(artifact.load(tmp_path))


@pytest.mark.parametrize("stage", TRAINING)
def test_training_stays_in_step(work, lines, tmp_path, stage):
    in_step = "--trainer.callbacks+=tests.stages.processes.InStep"
    text = galatea(*lines[stage], *DDP, in_step, f"--out={tmp_path}", ranks=2)
    assert "2 ranks are equal" in text
    assert finite(artifact.load(tmp_path))
