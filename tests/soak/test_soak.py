"""SIGKILL at random moments, again and again, then the same command: the same bytes as without it.

``make test-soak`` kills all stages and the pipeline thirty times; ``make test`` two stages, once each. The moments are
drawn by a seed from the time that an uninterrupted run takes; see ``tests/stages/test_killed.py`` for chosen ones.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml

from models import artifact
from models.errors import UserError
from models.files import is_temporary
from stages import __main__
from stages.pipeline.steps import locked
from tests.stages import cases
from tests.stages.processes import galatea
from tests.stages.test_killed import PIPELINE, check_complete, resume

SEED = 0
KILLS = 3  # of each stage
PIPELINE_KILLS = 6
PATIENCE_S = 600


class Inputs:
    """What the stages start from, and the uninterrupted result of each that is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = cases.lines(folder)
        self.seconds: dict[str, float] = {}

    def whole(self, stage: str) -> str:
        """Id of the stage's artifact; the second run, which finds all caches filled, is the one that is timed."""
        if stage not in self.seconds:
            if (needed := cases.collect()[stage].needs) is not None:
                self.whole(needed)
            for out in (self.folder / stage, self.folder / f"{stage}-again"):
                begin = time.monotonic()
                galatea(*self.lines[stage], f"--out={out}")
                self.seconds[stage] = time.monotonic() - begin
            assert artifact.load(out).id == artifact.load(self.folder / stage).id
        return artifact.load(self.folder / stage).id


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


@dataclass
class Tally:
    """What happened: kills, those that a file was being written at, and results that were compared."""

    kills: int = 0
    writing: int = 0
    compared: int = 0


def start(line: list[str], log: Path) -> multiprocessing.Process:
    """``galatea LINE`` in a process, and a process group, of its own: forked, it imports nothing."""

    def run() -> None:
        file = open(log, "a", buffering=1)  # noqa: SIM115
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        sys.argv = ["galatea", *line]
        sys.exit(__main__.main())

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    os.setpgid(process.pid, process.pid)
    return process


def dies(line: list[str], moment: float, log: Path, whole_group: bool = True, writing: Path | None = None) -> bool:
    """Run ``galatea LINE`` and kill it after so many seconds; whether it came to that.

    With ``writing`` it is killed when it writes the next file below that folder.
    """
    process = start(line, log)
    process.join(moment)
    while writing is not None and process.is_alive() and not half_written(writing):
        time.sleep(0.0005)
    if process.is_alive():
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.join()
        return True
    assert process.exitcode == 0, log.read_text()[-4000:]
    return False


def half_written(folder: Path) -> bool:
    """Whether a killed process has left a file that it was writing."""
    return any(is_temporary(path) for path in folder.rglob(".*"))


def check(folder: Path) -> None:
    """Whatever has its final name is complete; artifacts verify."""
    check_complete(folder)
    for manifest in folder.rglob("artifact/manifest.json"):
        artifact.load(manifest.parent)


def soak(inputs: Inputs, stage: str, kills: int, folder: Path) -> Tally:
    """Kill runs of a stage, each of which continues the one before; begin anew when one gets through."""
    wanted, tally, moments = inputs.whole(stage), Tally(), random.Random(f"{SEED} {stage}")
    outs = (folder / str(number) for number in count())
    out = next(outs)
    while tally.kills < kills:
        line, moment = [*inputs.lines[stage], f"--out={out}", *resume(out)], moments.uniform(0, inputs.seconds[stage])
        # Files are small here, and few moments would hit one: every second kill waits for it.
        if dies(line, moment, folder / "log.txt", writing=out if tally.kills % 2 else None):
            tally.kills += 1
            tally.writing += half_written(out)
            check(out)
        else:
            assert artifact.load(out).id == wanted
            tally.compared += 1
            out = next(outs)
    galatea(*inputs.lines[stage], f"--out={out}", *resume(out))
    assert artifact.load(out).id == wanted
    assert not half_written(out)
    tally.compared += 1
    return tally


def tell(record_property, what: str, tally: Tally, begin: float) -> None:
    seconds = time.monotonic() - begin
    text = f"{tally.kills} kills, {tally.writing} while a file was written, {tally.compared} results equal"
    record_property("soak", f"{what:<9} {text}, {seconds:.0f} s")


@pytest.mark.parametrize("stage", ["anchor", "invert"])
def test_one_kill(inputs, tmp_path, stage):
    assert soak(inputs, stage, 1, tmp_path).kills == 1


@pytest.mark.soak
@pytest.mark.parametrize("stage", cases.collect())
def test_stages(inputs, tmp_path, record_property, stage):
    begin = time.monotonic()
    tally = soak(inputs, stage, KILLS, tmp_path)
    assert tally.kills == KILLS
    tell(record_property, stage, tally, begin)


def wait_for_orphans(out: Path) -> None:
    """Until the step of a pipeline that died without it has ended: it holds the lock."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with locked(out):
                return
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


@pytest.mark.soak
def test_the_pipeline(inputs, tmp_path, record_property):
    """Its steps are processes of their own; every second kill takes the orchestrator alone, and they live on."""
    begin, tally, moments = time.monotonic(), Tally(), random.Random(f"{SEED} pipeline")
    stages = ("anchor", "stylize", "present")
    settings = {}
    for stage in stages:
        values = dict(option[2:].split("=", 1) for option in inputs.lines[stage][2:])
        given = ("model.anchor.path", "model.result.path", "data.path") if stage != "anchor" else ()
        settings[stage] = json.dumps({key: yaml.safe_load(value) for key, value in values.items() if key not in given})
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE.format(**settings))

    def line(out: Path) -> list[str]:
        return ["run", str(file), f"--out={out}"]

    first = time.monotonic()
    assert not dies(line(tmp_path / "whole"), PATIENCE_S, tmp_path / "whole.txt")
    seconds = time.monotonic() - first
    wanted = {stage: artifact.load(tmp_path / "whole" / stage).id for stage in stages}
    assert wanted == {stage: inputs.whole(stage) for stage in stages}
    outs = (tmp_path / str(number) for number in count())
    out = next(outs)
    while tally.kills < PIPELINE_KILLS:
        whole_group = tally.kills % 2 == 0
        if dies(line(out), moments.uniform(0, seconds), tmp_path / "log.txt", whole_group):
            tally.kills += 1
            tally.writing += half_written(out)
            wait_for_orphans(out)  # one that writes on replaces files under the eyes of a reader
            check(out)
        else:
            assert {stage: artifact.load(out / stage).id for stage in stages} == wanted
            tally.compared += 1
            out = next(outs)
    assert not dies(line(out), PATIENCE_S, tmp_path / "log.txt")
    assert {stage: artifact.load(out / stage).id for stage in stages} == wanted
    assert galatea(*line(out)).count("up to date") == len(stages)
    tally.compared += 1
    tell(record_property, "pipeline", tally, begin)
