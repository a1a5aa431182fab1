"""The command line: fast help, one-sentence errors, a run from end to end."""

import csv
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml

from models import artifact
from models.errors import UserError
from models.files import ROOT
from stages import __main__, cli
from stages.base.ranks import IndependentRanks
from stages.table import STAGES, VERBS
from tests.stages.toy import ToyPerArtwork, ToyTraining

TOY = ROOT / "tests" / "stages" / "toy.py"
DATA = "--data=tests.stages.toy.ToyArtworks"
COMMON = ("--trainer.accelerator=cpu", "--trainer.devices=1")


@pytest.fixture
def training(tmp_path, monkeypatch):
    """Run the training toy in this process; returns the output folder."""
    monkeypatch.chdir(tmp_path)

    def run(*options, out="out"):
        data = "--data=tests.stages.toy.ToyData"
        cli.run("training", ToyTraining, ["fit", data, f"--out={out}", *COMMON, *options])
        return tmp_path / out

    return run


class TestHelp:
    def test_is_fast_and_imports_nothing_heavy(self):
        command = [sys.executable, "-X", "importtime", "-m", "stages", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
        assert all(f"  {name} " in done.stdout for name in (*STAGES, *VERBS))
        imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
        heavy = {"torch", "numpy", "pytorch_lightning", "jsonargparse", "yaml", "PIL", "rich", "wandb", "argparse"}
        assert not imported & heavy
        # Of the import time, of which a busy machine cannot make much: the whole takes some 30 ms.
        times = [
            int(line.split("|")[1]) for line in done.stderr.splitlines() if line.split("|")[0][12:].strip().isdigit()
        ]
        assert sum(times) < 300_000 * 10

    def test_every_table_entry_is_described(self):
        for target, text in (*STAGES.values(), *VERBS.values()):
            assert target.count(":") == 1 and text


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["paint"], "unknown stage or verb 'paint', there are: features, prior"),
        (["prior", "paint"], "unknown command 'paint' of stage prior, it has: fit, validate, test, predict"),
        (["present", "fit"], "stage present has no command 'fit', it has: predict"),
        (["prior", "predict", "--help"], "stage prior has no command 'predict', it has: fit, validate, test"),
        (["anchor", "test"], "stage anchor has no command 'test', it has: fit"),
    ],
)
def test_unknown_words(arguments, match):
    with pytest.raises(UserError, match=match):
        __main__.dispatch(arguments)


def test_errors_are_one_line_and_exit_with_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["galatea", "paint"])
    assert __main__.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("galatea: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--model.rat=1"], "model.rat"),
        (["--model.rate=fast"], r"model.rate: .*float.*fast"),
        (["--trainer.max_steps=many"], r"trainer.max_steps: .*many"),
        (["--trainer.precision=7"], r"trainer.precision: .*Got value: 7"),
        (["--nonsense=1"], "nonsense"),
        (["--config=none.yaml"], r"none\.yaml"),
        (["--data=tests.nothing.X"], r"tests\.nothing\.X"),
        (["--data.count=1"], "count"),
    ],
)
def test_wrong_options_are_one_sentence(training, options, match):
    with pytest.raises(UserError, match=match) as error:
        training(*options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_wrong_keys_in_a_file_are_named(training, tmp_path):
    for content, match in (
        ({"model": {"rat": 1}}, "rat"),
        ({"modle": {"a": 1}}, "modle"),
        ({"trainer": {"max_steps": "x"}}, "x"),
    ):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(UserError, match=match) as error:
            training(f"--config={tmp_path / 'c.yaml'}")
        assert "\n" not in str(error.value)


def test_print_config(training, capsys):
    with pytest.raises(SystemExit) as stop:
        training("--print_config", "--model.rate=0.25")
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["rate"] == 0.25 and config["trainer"]["inference_mode"] is False


def test_training_from_end_to_end(training):
    out = training("--trainer.max_steps=6", "--trainer.log_every_n_steps=1")
    assert yaml.safe_load((out / "config.yaml").read_text())["trainer"]["max_steps"] == 6
    with open(next((out / "logs").glob("*/metrics.csv"))) as file:
        logged = list(csv.DictReader(file))
    assert sum(bool(row["loss"]) for row in logged) == sum(bool(row["gradient_norm/layer"]) for row in logged) == 6
    assert len(list((out / "panels" / "weights").glob("*.png"))) == 1  # one, at the end
    assert not (out / "artifact").exists()  # this stage hands nothing on
    last = out / "checkpoints" / "last.ckpt"
    again = training("--trainer.max_steps=8", f"--ckpt_path={last}")  # the same folder: nothing is in the way
    assert torch.load(again / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
    with pytest.raises(UserError, match="only resumes its own"):
        cli.run("toy", ToyPerArtwork, ["fit", DATA, "--model.steps=1", f"--ckpt_path={last}", "--out=other", *COMMON])


def test_profile(training, capfd):
    out = training("--trainer.max_steps=4", "--trainer.profiler=simple")
    (file,) = out.glob("*profile*.txt")
    assert "[_TrainingEpochLoop].train_dataloader_next" in file.read_text()
    assert "[_TrainingEpochLoop].train_dataloader_next" in capfd.readouterr().out


def test_per_artwork_from_end_to_end(tmp_path):
    arguments = ["fit", DATA, "--data.count=2", "--model.steps=3", f"--out={tmp_path}", "--threads=1", *COMMON]
    cli.run("toy", ToyPerArtwork, arguments)
    found = artifact.load(tmp_path)
    assert found.stage == "toy" and set(found.extra["rows"]) == {"i0", "i1"}
    first = found.id
    cli.run("toy", ToyPerArtwork, arguments)  # finished: only exported again
    assert artifact.load(tmp_path).id == first


def test_out_is_not_a_folder(training, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, OSError)) as error:
        training(out="file/x")
    assert "Not a directory" in str(error.value)


def test_not_finite_stops_the_run(training):
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step \d+"):
        training("--model.rate=1e30", "--trainer.max_steps=60", "--trainer.max_epochs=-1")


def test_another_models_package_is_refused(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import stages"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "galatea needs its own 'models' package" in done.stderr


@pytest.mark.parametrize(
    ("devices", "number"),
    [(1, 1), (3, 3), ("2", 2), ("0,1", 2), ("0, 2,3", 3), ("1,", 1), ([0, 1], 2), ([3], 1), ("auto", 4), (-1, 4)],
)
def test_devices_are_counted_as_lightning_counts_them(monkeypatch, devices, number):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert cli._devices({"devices": devices, "accelerator": "auto"}) == number
    if devices in ("auto", -1):
        assert cli._devices({"devices": devices, "accelerator": "cpu"}) == 1


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """The trainer of a toy's command line, which does not run."""
    monkeypatch.setattr(cli.GalateaCLI, "_run_subcommand", lambda *_: None)
    monkeypatch.setattr("pytorch_lightning.accelerators.cuda.CUDAAccelerator.is_available", lambda: False)

    def build(*options):
        common = ["fit", DATA, "--model.steps=3", f"--out={tmp_path}", "--trainer.accelerator=cpu"]
        return cli.GalateaCLI("toy", ToyPerArtwork, [*common, *options]).trainer

    return build


@pytest.mark.parametrize(
    ("options", "devices", "unwrapped"),
    [
        (["--trainer.devices=1"], 1, False),
        (["--trainer.devices=auto"], 1, False),
        (["--trainer.devices=2"], 2, True),
        (["--trainer.devices=2", "--trainer.strategy=ddp"], 2, True),
        (["--trainer.devices=1", "--trainer.strategy=ddp"], 1, True),
    ],
)
def test_devices_and_strategies(trainer, options, devices, unwrapped):
    built = trainer(*options)
    assert built.num_devices == devices and isinstance(built.strategy, IndependentRanks) is unwrapped


def test_a_named_strategy_is_kept_or_refused(trainer):
    given = {"class_path": "stages.base.ranks.IndependentRanks", "init_args": {"process_group_backend": "gloo"}}
    kept = trainer("--trainer.devices=2", f"--trainer.strategy={json.dumps(given)}").strategy
    assert isinstance(kept, IndependentRanks) and kept.process_group_backend == "gloo"
    for name in ("fsdp", "ddp_find_unused_parameters_true"):
        with pytest.raises(UserError, match=rf"trainer\.strategy is '{name}': toy brings its ranks together itself"):
            trainer("--trainer.devices=2", f"--trainer.strategy={name}")


@pytest.mark.slow
@pytest.mark.parametrize(("options", "threads"), [([], 1), (["--threads=3"], 3)])
def test_threads(tmp_path, options, threads):
    """Few, whatever the machine has; and of two processes on one machine, each as many as were asked for."""
    line = ["training", "fit", "--data=toy.ToyData", "--trainer.max_steps=1", "--trainer.accelerator=cpu", *options]
    line += ["--trainer.devices=2", "--trainer.callbacks=toy.Threads", f"--out={tmp_path}"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, str(TOY), *line], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"\d+ threads", done.stdout) == [f"{threads} threads"] * 2  # two processes may share a line


def test_threads_that_the_environment_names(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # torch has read it
    cli._set_threads(None)
    assert asked == []
    cli._set_threads(2)
    assert asked == [2] and os.environ["OMP_NUM_THREADS"] == "2"
