"""docs/new_stage.md is followed to the letter, in a copy of the house."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from models import artifact
from models.files import ROOT

ROOMS = ("models", "datamodules", "callbacks", "stages", "configs", "tests")
STAGE = "pose"


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("assets", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", (ROOT / "docs" / "new_stage.md").read_text(), re.DOTALL)
    for block in blocks:
        if (named := re.match(r"# (\S+/\S+)\n", block)) is not None:
            assert not (folder / named[1]).exists()
            (folder / named[1]).write_text(block[named.end() :])
        else:
            table = folder / "stages" / "table.py"
            before, mark, after = table.read_text().partition("}\n")  # the first table is that of the stages
            table.write_text(f"{before}{block}{mark}{after}")
    return folder


def python(house, *arguments):
    environment = os.environ | {"PYTHONPATH": str(house), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    found = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, (found.stdout + found.stderr)[-4000:]
    return found.stdout


def test_touches_four_places(house):
    made = {path.relative_to(house) for room in ROOMS for path in (house / room).rglob("*.[py]*") if path.is_file()}
    new = {path.as_posix() for path in made if not (ROOT / path).exists()}
    assert new == {f"stages/{STAGE}.py", f"configs/stages/{STAGE}.yaml", f"tests/stages/test_{STAGE}.py"}
    changed = {
        p.as_posix() for p in made if (ROOT / p).exists() and (ROOT / p).read_bytes() != (house / p).read_bytes()
    }
    assert changed == {"stages/table.py"}


def test_keeps_the_order_of_the_house(house):
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={house / 'work'}"]
    assert " passed" in python(house, "-m", "pytest", *options, "tests/test_house.py")
    shutil.rmtree(house / "work", ignore_errors=True)


def test_its_configuration_is_read(house):
    assert f"  {STAGE}" in python(house, "-m", "stages", "--help")
    shown = python(house, "-m", "stages", STAGE, "fit", "--print_config")
    assert "max_steps: 2000" in shown and "MannequinDataModule" in shown and "threads: 1" in shown


def test_fit_resume_test_and_predict(house, tmp_path):
    """Its own test; and, as of any stage: equal in two processes, killed and resumed to the same bytes."""
    soak = f"tests/soak/test_soak.py::test_stages[{STAGE}]"
    suites = ["tests/stages/test_distributed.py", f"tests/stages/test_{STAGE}.py", soak]
    chosen = f"{STAGE} and not three"
    options = ["-q", "-p", "no:cacheprovider", "-m", "not gpu", "-k", chosen, f"--basetemp={tmp_path / 'work'}"]
    text = python(house, "-m", "pytest", *options, *suites)
    found = re.search(r"(\d+) passed", text)
    assert found is not None and int(found[1]) >= 7 and "failed" not in text, text[-2000:]


def test_what_it_hands_on(house, tmp_path):
    script = (
        "from pathlib import Path; from tests.stages import cases, inversions; import sys; "
        f"folder = Path(sys.argv[1]); case = cases.collect()[{STAGE!r}]; case.inputs(folder, 12); "
        "print(*case.line(folder), sep='\\n')"
    )
    line = python(house, "-c", script, tmp_path).split()
    python(house, "-m", "stages", *line, f"--out={tmp_path / 'out'}")
    made = artifact.load(tmp_path / "out")
    assert made.stage == STAGE and made.module("pose").kind == "pose"
