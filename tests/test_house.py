"""The house keeps its order: style, the contracts of imports, and of stages, which these do not list, the table."""

import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

from stages.table import STAGES

ROOT = Path(__file__).resolve().parents[1]
METHODS = {target.partition(":")[0] for target, _ in STAGES.values()}
STAND_ON = ("stages.base", "stages.gallery")  # and on nothing else of stages


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("models", "datamodules", "callbacks", "stages", cache_dir=None)


def test_every_room_of_stages_is_known(graph):
    """A method of the table, or one of the layers in pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = " ".join(next(c["layers"] for c in settings["contracts"] if c["name"].startswith("the rooms of stages")))
    listed = {f"stages.{name}" for name in layers.replace("|", " ").replace("(", " ").replace(")", " ").split()}
    assert graph.find_children("stages") == METHODS | listed


@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods_meet_through_artifacts(graph, method):
    for imported in graph.find_modules_directly_imported_by(method):
        assert not imported.startswith("stages.") or imported.startswith(STAND_ON), f"{method} imports {imported}"
    for importer in graph.find_modules_that_directly_import(method):
        assert importer.startswith("tests"), f"{importer} imports {method}: it is found by the table"


@pytest.mark.parametrize("check", ["ruff check .", "ruff format --check .", "lint-imports --no-cache"])
def test_checks(check):
    command = [Path(sys.executable).parent / check.split()[0], *check.split()[1:]]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]
