"""Damaged records of a pipeline: what is finished stays, and nothing is done again in silence."""

import json
import sys
from pathlib import Path

import pytest

from models.errors import UserError
from models.files import atomic_write, previous, read_json, versions
from stages.commands import status
from stages.pipeline import process
from stages.pipeline import run as orchestrator
from stages.pipeline.jobs import read_plan
from stages.table import STAGES

PIPELINE = """
steps:
  - {name: one, stage: dummy, command: fit, overrides: {work: 2}}
  - {name: two, stage: dummy, command: fit, overrides: {work: 1}, inputs: {input: one}}
"""


@pytest.fixture
def galatea(tmp_path, monkeypatch, capfd):
    """Run the pipeline in ``OUT``; returns what it printed."""
    monkeypatch.setitem(STAGES, "dummy", ("stages.dummy:Dummy", "a dummy"))
    monkeypatch.setattr(process, "PROGRAM", (sys.executable, str(Path(__file__).with_name("dummy_step.py"))))
    monkeypatch.setattr(orchestrator.signal, "signal", lambda *_: None)
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)

    def run(*options):
        orchestrator.main([str(tmp_path / "pipeline.yaml"), f"--out={tmp_path / 'out'}", *options])
        return capfd.readouterr().out

    return run


def results(out):
    """Marks, one for each piece of work that was done, and manifests."""
    names = ("marks.txt", "artifact/manifest.json")
    return {f"{step}/{name}": (out / step / name).read_text() for step in ("one", "two") for name in names}


@pytest.mark.parametrize("content", ["", '{"state": "do', "[]", "null"])
def test_a_damaged_status_loses_nothing(tmp_path, galatea, content):
    galatea()
    out, before = tmp_path / "out", results(tmp_path / "out")
    (out / "one" / "status.json").write_text(content)
    assert [row.state for row in status.rows(out)] == ["done", "done"]
    assert galatea().count("up to date") == 2
    assert results(out) == before


def test_other_settings_still_count(tmp_path, galatea):
    """The record before the damaged one knows what the step was made with."""
    galatea()
    (tmp_path / "out" / "two" / "status.json").write_text("")
    text = galatea("--set", "two.work=3")
    assert "one: up to date" in text and "two: running" in text


def test_both_records_of_a_step_are_damaged(tmp_path, galatea):
    galatea()
    before, record = results(tmp_path / "out"), tmp_path / "out" / "one" / "status.json"
    for file in versions(record):
        file.write_text("")
    with pytest.raises(UserError) as error:
        galatea()
    assert str(error.value) == f"{record} is damaged: remove {record.parent} to do this step again"
    assert results(tmp_path / "out") == before


def test_a_damaged_plan(tmp_path, galatea):
    """The one before it tells the steps; where there is none, a sentence tells what to do."""
    galatea()
    out = tmp_path / "out"
    galatea()
    (out / "pipeline.json").write_text("")
    assert list(read_plan(out)) == ["one", "two"] and [row.state for row in status.rows(out)] == ["done", "done"]
    assert galatea().count("up to date") == 2
    for file in versions(out / "pipeline.json"):
        file.write_text("")
    with pytest.raises(UserError, match=r"pipeline\.json is damaged: remove it if no job works there"):
        galatea()
    for file in versions(out / "pipeline.json"):
        file.unlink()
    assert galatea().count("up to date") == 2


def test_what_a_file_held_before(tmp_path):
    file = tmp_path / "record.json"
    assert versions(file) == [] and read_json(file) is None
    for number in range(3):
        with atomic_write(file, keep=True) as temporary:
            temporary.write_text(json.dumps({"number": number}))
    assert read_json(file) == {"number": 2} and versions(file) == [file, previous(file)]
    file.write_text("{")
    assert read_json(file) == {"number": 1}
    with pytest.raises(ZeroDivisionError), atomic_write(file, keep=True):
        1 / 0
    assert (file.read_text(), previous(file).read_text()) == ("{", '{"number": 1}')
