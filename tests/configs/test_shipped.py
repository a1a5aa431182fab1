"""Every shipped configuration, and every step of every pipeline, resolves."""

from pathlib import Path

import pytest

from models.files import ROOT
from stages import __main__, cli
from stages.configs import BASE, read_yaml
from stages.pipeline import run
from stages.table import STAGES
from tests.configs.resolved import leaves, resolved, steps

CONFIGS = ROOT / "configs"
FILES = sorted(
    file
    for place in ("stages/*.yaml", "paper/*/*.yaml", "presets/*.yaml", "presets/*/*.yaml")
    for file in CONFIGS.glob(place)
    if file.parent.name != "embedded"  # what stands in for networks, in any stage
)
PIPELINES = sorted(CONFIGS.glob("pipelines/*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_configurations(file):
    name = file.stem.split("_")[0]  # stylize_pti.yaml varies stylize.yaml
    name = "tune" if name == "test" else name  # what invert, tune and detail are tested by
    stage = __main__.find(STAGES[name][0], name)
    command = "test" if file.stem.endswith("test") and "test" in cli.commands(stage) else cli.commands(stage)[0]
    found = resolved(name, command, f"--config={file}")
    assert found["trainer"]["accelerator"] == "auto"
    said = {key for key, _ in leaves(read_yaml(file)) if key != BASE and "." in key}
    assert said <= {key for key, _ in leaves(found)}


@pytest.mark.parametrize("file", PIPELINES, ids=lambda f: f.stem)
def test_pipelines(file):
    for name, (stage, command, *options) in steps(file).items():
        assert resolved(stage, command, *options)["trainer"]["accelerator"] == "auto", name


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("artform", ("image", "model")),
        ("inverter", ("images", "test_images", "arcface", "inception")),
        ("e3dge", ("model", "arcface")),
        ("e3dge_released", ("model", "arcface")),
    ],
)
def test_a_papers_pipeline_is_ready_to_run(name, given, tmp_path, capsys):
    options = [word for param in given for word in (f"--{param}", str(tmp_path))]
    run.main([str(CONFIGS / "pipelines" / f"paper_{name}.yaml"), *options, f"--out={tmp_path / 'out'}", "--dry_run"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "would run" in line]
    assert len(lines) == len(steps(CONFIGS / "pipelines" / f"paper_{name}.yaml"))
    assert all(("configs/paper/" in line) is ("present predict" not in line) for line in lines)
    assert not (tmp_path / "out").exists()


def test_what_is_common_is_shared():
    """By two at least: otherwise it belongs to the one."""
    users: dict[str, set[str]] = {}
    for file in CONFIGS.rglob("*.yaml"):
        for base in read_yaml(file).get(BASE, []):
            users.setdefault((file.parent / base).resolve().name, set()).add(file.name)
    for file in PIPELINES:
        for step in read_yaml(file)["steps"]:
            for named in step.get("configs", []):
                users.setdefault(Path(named).name, set()).add(f"{file.name}/{step['name']}")
    for file in CONFIGS.glob("common/*.yaml"):
        assert len(users.get(file.name, ())) >= 2, file
