"""SIGKILL at any moment, then the same command again: the same bytes as without it, and nothing half-written."""

import json
import subprocess
import sys

import pytest
import safetensors
import torch
import yaml
from PIL import Image

from models import artifact, files
from models.errors import UserError
from stages.pipeline import steps
from tests.stages import cases
from tests.stages.processes import Kill, galatea

CASES = {stage: case for stage, case in cases.collect().items() if case.kills}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder of the inputs and of each stage's uninterrupted result."""
    folder = tmp_path_factory.mktemp("work")
    lines = cases.lines(folder)
    for stage in CASES:
        galatea(*lines[stage], f"--out={folder / stage}")
    return folder


@pytest.fixture(scope="module")
def lines(work):
    return cases.lines(work)


def resume(out):
    folder = out / "checkpoints"
    return [f"--ckpt_path={folder / 'last.ckpt'}"] if any(folder.glob("step=*.ckpt")) else []


def contents(out):
    """Names of a run's files, but for logs and panels, of which each start writes its own."""
    names = (path.relative_to(out) for path in out.rglob("*") if path.is_file())
    return {name.as_posix() for name in names if name.parts[0] not in ("logs", "panels", "log.txt")}


def check_complete(out):
    """Whatever has its final name can be read."""
    for path in out.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(out).parts):
            continue
        match path.suffix:
            case ".safetensors":
                with safetensors.safe_open(path, "pt") as file:
                    assert all(torch.is_tensor(file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            case ".json":
                assert isinstance(json.loads(path.read_text()), dict | list)
            case ".yaml":
                assert yaml.safe_load(path.read_text())
            case ".ckpt":
                assert torch.load(path, weights_only=True)
            case ".png":
                with Image.open(path) as image:
                    image.load()


@pytest.mark.parametrize(("stage", "kill"), [(stage, kill) for stage, case in CASES.items() for kill in case.kills])
def test_a_killed_stage(work, lines, tmp_path, stage, kill):
    line = [*lines[stage], f"--out={tmp_path}"]
    galatea(*line, kill=kill)
    assert not (tmp_path / "artifact").exists()
    check_complete(tmp_path)
    galatea(*line, *resume(tmp_path))
    assert artifact.load(tmp_path).id == artifact.load(work / stage).id
    assert contents(tmp_path) == contents(work / stage)


PIPELINE = """
steps:
  - {{name: anchor, stage: anchor, command: fit, overrides: {anchor}}}
  - {{name: stylize, stage: stylize, command: fit, overrides: {stylize},
     inputs: {{model.anchor.path: anchor, data.path: anchor}}}}
  - {{name: present, stage: present, command: predict, overrides: {present}, inputs: {{model.result.path: stylize}}}}
"""


def test_a_killed_pipeline(work, lines, tmp_path):
    """Orchestrator and step die together, again and again; standalone stages give the same artifacts."""
    settings = {
        stage: {key: yaml.safe_load(value) for key, value in (o[2:].split("=", 1) for o in lines[stage][2:])}
        for stage in ("anchor", "stylize", "present")
    }
    for stage, key in (("stylize", "model.anchor.path"), ("stylize", "data.path"), ("present", "model.result.path")):
        del settings[stage][key]  # inputs
    file, out = tmp_path / "pipeline.yaml", tmp_path / "out"
    file.write_text(PIPELINE.format(**{stage: json.dumps(values) for stage, values in settings.items()}))
    line = ["run", str(file), f"--out={out}"]
    # status.json of a step that begins, results of each step, status.json of one that is done.
    for kill in (
        Kill("status.json"),
        Kill("anchor.json", 2),
        Kill("status.json", 3),
        Kill("tuned.safetensors", 2),
        Kill("card.json"),
    ):
        galatea(*line, kill=kill)
        check_complete(out)
    galatea(*line)
    for stage in settings:
        assert artifact.load(out / stage).id == artifact.load(work / stage).id
    assert galatea(*line).count("up to date") == 3


def test_a_step_that_outlives_its_pipeline_keeps_the_folder(tmp_path):
    """Killed alone, the orchestrator cannot end its step, which may still write."""
    code = "import time; print('busy', flush=True); time.sleep(60)"
    with steps.locked(tmp_path) as lock:
        step = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, pass_fds=(lock,))
        assert step.stdout.readline() == b"busy\n"
    try:
        with pytest.raises(UserError, match="another galatea run is working"), steps.locked(tmp_path):
            pass
    finally:
        step.kill()
        step.communicate()
    with steps.locked(tmp_path):
        pass


def test_a_folder_that_was_half_removed_is_not_foreign(tmp_path, monkeypatch):
    """Killed while it cleared the folder of a changed step, the next run clears the rest."""
    step = tmp_path / "step"
    (step / "items").mkdir(parents=True)
    (step / "status.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda path: (path / "status.json").unlink() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            steps.clear(step)
    steps.clear(step)
    assert not list(tmp_path.iterdir())
