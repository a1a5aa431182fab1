"""Pipelines: skip, change, resume, refuse."""

import json
import sys
import textwrap
from pathlib import Path

import pytest

from models.errors import UserError
from stages.pipeline import hashing, process, steps
from stages.pipeline import run as orchestrator
from stages.pipeline.run import main, read_pipeline
from stages.table import STAGES

PIPELINE = """
    params:
      image: {type: path, help: the artwork, sets: [one.data.path]}
      work: {type: int, default: 2, help: "marks, 100 % of them", sets: [two.work, three.work]}
    steps:
      - {name: one, stage: dummy, command: fit, overrides: {colour: red}}
      - {name: two, stage: dummy, command: fit, inputs: {input.path: one}}
      - {name: three, stage: dummy, command: predict, inputs: {input.path: two}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setitem(STAGES, "dummy", ("stages.dummy:Dummy", "a dummy"))
    dummy = Path(__file__).with_name("dummy_step.py")
    monkeypatch.setattr(process, "PROGRAM", (sys.executable, str(dummy)))
    monkeypatch.setattr(orchestrator.signal, "signal", lambda *_: None)
    (tmp_path / "pipeline.yaml").write_text(textwrap.dedent(PIPELINE))
    (tmp_path / "image.png").write_bytes(b"image")
    return tmp_path


@pytest.fixture
def galatea(place, capfd):
    """Run the pipeline; returns what it printed."""

    def run(*options: str, image: str = "image.png") -> str:
        arguments = [str(place / "pipeline.yaml"), "--image", str(place / image), "--out", str(place / "out")]
        main([*arguments, *options])
        return capfd.readouterr().out

    return run


def marks(place, step):
    return (place / "out" / step / "marks.txt").read_text().split()


def status(place, step):
    return json.loads((place / "out" / step / "status.json").read_text())


def test_a_parameter_sets_all_steps_that_a_pattern_matches(place):
    file = place / "patterns.yaml"
    names = "".join(f"  - {{name: {name}, stage: dummy, command: fit}}\n" for name in ("a", "a_test", "b_test"))
    file.write_text("params: {x: {sets: ['*_test.y', '*.z']}}\nsteps:\n" + names)
    sets = read_pipeline(file).params[0].sets
    assert sets == [("a_test", "y"), ("b_test", "y"), ("a", "z"), ("a_test", "z"), ("b_test", "z")]


def test_runs_then_skips(place, galatea):
    text = galatea()
    assert "mark 1" in text  # progress passes through
    assert "mark 0" in (place / "out" / "one" / "log.txt").read_text()
    assert status(place, "two")["state"] == "done"
    before = {step: marks(place, step) for step in ("one", "two", "three")}
    assert galatea().count("up to date") == 3
    assert before == {step: marks(place, step) for step in before}


def test_a_changed_step_and_all_after_it_run_again(place, galatea):
    galatea()
    first, second = marks(place, "one"), marks(place, "two")
    text = galatea("--work", "3")
    assert "one: up to date" in text and "two: running" in text and "three: running" in text
    assert marks(place, "one") == first and len(marks(place, "two")) == 3 and marks(place, "two")[0] != second[0]


def test_contents_count_and_paths_do_not(place, galatea):
    galatea()
    (place / "moved.png").write_bytes(b"image")
    assert galatea(image="moved.png").count("up to date") == 3
    (place / "moved.png").write_bytes(b"other")
    assert "up to date" not in galatea(image="moved.png")


def test_devices_do_not_count_and_set_does(place, galatea):
    galatea()
    assert galatea("--set", "one.trainer.devices=2", "--set", "two.trainer.accelerator=gpu").count("up to date") == 3
    assert "one: running" in galatea("--set", "one.model.rate=0.1")


def test_a_damaged_or_removed_artifact_runs_again(place, galatea):
    galatea()
    (place / "out" / "two" / "artifact" / "manifest.json").unlink()
    text = galatea()
    assert "one: up to date" in text and "two: running" in text and "three: running" in text


def test_a_killed_step_resumes(place, galatea):
    with pytest.raises(UserError, match=r"step two failed \(signal 9\), its log is .*log\.txt"):
        galatea("--work", "3", "--set", "two.die_at=2")
    killed = marks(place, "two")
    assert len(killed) == 2 and status(place, "two")["state"] == "failed"
    text = galatea("--work", "3", "--set", "two.die_at=2")
    assert "one: up to date" in text and "two: resuming" in text
    assert marks(place, "two")[:2] == killed and len(marks(place, "two")) == 3


def test_an_orchestrator_that_died_resumes(place, galatea):
    galatea()
    path = place / "out" / "two" / "status.json"
    path.write_text(json.dumps(status(place, "two") | {"state": "running"}))  # as SIGKILL leaves it
    assert "two: resuming" in galatea()


def test_from(place, galatea):
    galatea()
    before = marks(place, "two")
    text = galatea("--from", "two")
    assert "one: up to date" in text and "two: running" in text and "three: running" in text
    assert marks(place, "two") != before
    with pytest.raises(UserError, match="no such step"):
        galatea("--from", "four")


def test_a_parameter_may_be_called_start(place, galatea):
    file = place / "pipeline.yaml"
    file.write_text(file.read_text().replace("  work:", "  start:"))
    assert "--work=3" in galatea("--start", "3", "--dry_run")
    assert "one: up to date" not in galatea("--start", "3", "--from", "two", "--dry_run")


def test_dry_run(place, galatea):
    text = galatea("--dry_run")
    assert text.count("would run") == 3 and not (place / "out").exists()
    galatea()
    text = galatea("--dry_run", "--work", "5")
    assert "one: up to date" in text and text.count("would run") == 2 and "--work=5" in text
    assert len(marks(place, "two")) == 2


def test_every_step_goes_to_the_dashboard(place, galatea):
    galatea()
    assert galatea("--wandb", "heads").count("up to date") == 3  # what is logged is not what comes out
    text = galatea("--from", "one", "--dry_run", "--wandb", "heads", "--set", "two.wandb=false")
    assert text.count("--wandb=heads") == 2 and text.count("--wandb=false") == 1
    assert galatea("--from", "two", "--dry_run", "--wandb").count("--wandb=true") == 2


def test_a_device_for_all_steps(place, galatea):
    galatea()
    assert galatea("--device", "gpu").count("up to date") == 3  # where it runs is not what comes out
    text = galatea("--from", "one", "--dry_run", "--device", "gpu", "--set", "two.trainer.accelerator=cpu")
    assert text.count("--trainer.accelerator=gpu") == 2 and text.count("--trainer.accelerator=cpu") == 1
    with pytest.raises(UserError, match="argument --device: invalid choice: 'tpu'"):
        galatea("--device", "tpu")


def test_a_failing_step(place, galatea):
    with pytest.raises(UserError, match=r"step two failed \(exit code 2\)"):
        galatea("--set", "two.fail=1")
    assert "does not feel well" in (place / "out" / "two" / "log.txt").read_text()
    assert not (place / "out" / "three").exists()
    assert "three: running" in galatea()


def test_help_shows_the_parameters(place, capfd):
    with pytest.raises(SystemExit):
        main([str(place / "pipeline.yaml"), "--help"])
    text = capfd.readouterr().out
    assert "--image PATH" in text and "100 % of them (default: 2)" in text


def test_numbers_by_name(place, capfd):
    """One NAME=NUMBER an option: together they are a mapping, which adds to the default's."""
    text = PIPELINE.replace("    steps:", "      mix: {type: numbers, default: {red: 1}, sets: [two.mix]}\n    steps:")
    (place / "mixed.yaml").write_text(textwrap.dedent(text))
    words = [str(place / "mixed.yaml"), "--image", str(place / "image.png"), "--out", str(place / "mixed"), "--dry_run"]
    main([*words, "--mix", "blue=-0.5", "--mix", "odd name=1e-3"])
    assert """--mix={"red": 1, "blue": -0.5, "odd name": 0.001}""" in capfd.readouterr().out
    main(words)
    assert """--mix={"red": 1}""" in capfd.readouterr().out
    for given, message in {
        "blue": "'blue' is not NAME=NUMBER, as in smile=1.0",
        "=1": "'=1' is not NAME=NUMBER",
        "blue=much": "'much' is no number: write blue=1.0",
        "blue=nan": "'nan' is no number",
        "blue=": "'' is no number",
    }.items():
        with pytest.raises(UserError, match=f"argument --mix: {message}"):
            main([*words, "--mix", given])


def test_foreign_folder_and_lock(place, galatea):
    (place / "out" / "one").mkdir(parents=True)
    (place / "out" / "one" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds files of something else"):
        galatea()
    with steps.locked(place / "out"), pytest.raises(UserError, match="another galatea run"):
        galatea()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--launcher", "slurm"], "--launcher slurm and --cluster FILE go together"),
        (["--launcher", "pbs"], "argument --launcher: invalid choice: 'pbs'"),
        (["--work", "x"], "argument --work: invalid int value: 'x'"),
        (["--image", "none.png"], "--image none.png: there is no such file or folder"),
        (["--nothing", "1"], "unrecognized arguments: --nothing 1"),
        (["--set", "four.x=1"], "write STEP.KEY=VALUE"),
    ],
)
def test_bad_options(galatea, options, match):
    with pytest.raises(UserError, match=match):
        galatea(*options)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("steps: []", "has no steps"),
        ("[]", "expected a dict"),
        ("steps: [", "is not valid YAML"),
        ("steps: [{name: a, stage: nothing, command: fit}]", "unknown stage 'nothing'"),
        ("steps: [{name: a, stage: dummy, command: paint}]", "unknown command 'paint'"),
        ("steps: [{name: a, stage: dummy}]", "command is missing"),
        ("steps: [{name: a, stage: dummy, command: fit, input: x}]", "unknown key 'input'"),
        ("steps: [{name: ../a, stage: dummy, command: fit}]", "a name has letters"),
        ("steps: [{name: a, stage: dummy, command: fit, inputs: {x: b}}]", "not an earlier step"),
        ("{steps: [{name: a, stage: dummy, command: fit}], params: {x: {sets: [b.y]}}}", "'b' is not a step"),
        ("{steps: [{name: a, stage: dummy, command: fit}], params: {x: {sets: ['b*.y']}}}", r"'b\*' matches no step"),
        ("{steps: [{name: a, stage: dummy, command: fit}], params: {x: {sets: ['*']}}}", "write STEP.OPTION"),
        (
            "{steps: [{name: a, stage: dummy, command: fit}], params: {x: {type: numbers, default: 1, sets: []}}}",
            "a dict",
        ),
        ("{steps: [{name: a, stage: dummy, command: fit}], edits: {strengths: x}}", "edits: directions is missing"),
        (
            "{steps: [{name: a, stage: dummy, command: fit}], params: {x: {sets: []}}, "
            "edits: {strengths: x, directions: x, generator: x}}",
            r"edits\.strengths is 'x', which is not a parameter of the type numbers",
        ),
        ("{steps: [{name: a, stage: dummy, command: fit}], params: {out: {sets: [a.y]}}}", "cannot be an option"),
        ("{steps: [{name: a, stage: dummy, command: fit}], params: {x: {type: z, sets: [a.y]}}}", "unknown type"),
    ],
)
def test_bad_pipelines(place, text, match):
    (place / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=match):
        read_pipeline(place / "bad.yaml")


def test_the_code_version_counts(monkeypatch):
    before = hashing.step_hash("s", "fit", {})
    monkeypatch.setattr(hashing, "VERSION", "other")
    assert hashing.step_hash("s", "fit", {}) != before


def test_of_a_folder_counts_what_readers_read(tmp_path, monkeypatch):
    """A folder may be a whole disk: only its pictures and lists are read."""
    for name in ("a.png", "sub/b.JPG", "dataset.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    before = hashing.path_hash(tmp_path)
    (tmp_path / "film.mkv").write_text("x" * 100)
    read = []
    monkeypatch.setattr(hashing, "sha256", lambda path: read.append(path.name) or "0")
    hashing.path_hash(tmp_path)
    assert sorted(read) == ["a.png", "b.JPG", "dataset.json"]
    monkeypatch.undo()
    assert hashing.path_hash(tmp_path) == before
    (tmp_path / "sub" / "b.JPG").write_text("y")
    assert hashing.path_hash(tmp_path) != before


def test_a_dry_run_of_something_new_reads_no_input(place, monkeypatch):
    monkeypatch.setattr(steps, "command_hash", None)
    options = [f"--image={place / 'image.png'}", f"--out={place / 'elsewhere'}", "--dry_run"]
    orchestrator.main([str(place / "pipeline.yaml"), *options])
