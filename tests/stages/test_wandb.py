"""What ``--wandb`` leaves in an offline run folder, read back from it."""

import functools
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
from wandb.proto.wandb_internal_pb2 import Record

from callbacks.dashboard import Dashboard
from models import artifact
from models.errors import UserError
from models.version import VERSION
from stages import cli
from stages.anchor import AnchorStage
from stages.pipeline.jobs import Entry, write_plan
from stages.present import PresentStage
from tests.stages import cases, heads, small
from tests.stages.processes import galatea
from tests.stages.toy import ToyPerArtwork, ToyTraining

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = range(1, 5)


def records(path):
    """The records of a ``.wandb`` file: protobufs in the log format of LevelDB, behind a header of 7 bytes."""
    data, place, parts = path.read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:  # too little left in this block for a header
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if place > len(data):  # still being written
            return
        if kind in (FULL, LAST):
            yield Record.FromString(b"".join(parts))
            parts = []


def logged(out):
    """The offline run's folder, its :class:`RunRecord`, and by key all values that were logged, in order."""
    (folder,) = (out / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    assert any(record.HasField("exit") for record in records(file))
    run, history = None, {}
    for record in records(file):
        run = run or (record.run if record.HasField("run") else None)
        row = {}
        for item in record.history.item:
            *outer, last = item.nested_key
            entry = functools.reduce(lambda entry, key: entry.setdefault(key, {}), outer, row)
            entry[last] = json.loads(item.value_json)
        for key, value in row.items():
            history.setdefault(key, []).append(value)
    return folder, run, history


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_a_step_of_a_pipeline(tmp_path):
    line = cases.lines(tmp_path)["anchor"]
    out = tmp_path / "heads" / "anchor"
    write_plan(out.parent, {"anchor": Entry([])})
    cli.run("anchor", AnchorStage, [*line[1:], f"--out={out}", "--trainer.log_every_n_steps=2", "--wandb=portraits"])
    folder, run, history = logged(out)
    assert (run.project, run.run_group, run.display_name) == ("portraits", "heads", "heads/anchor")
    assert run.job_type == "anchor"

    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["model"]["prior"]["path"] == str(tmp_path / "tiny") and config["seed_everything"] == 0
    assert {"commit", "dirty"} == config["git"].keys() and config["code"] == VERSION
    (file,) = folder.glob("*.wandb")
    for record in records(file):
        config |= {update.key: json.loads(update.value_json) for update in record.config.update}
    saved = artifact.load(out)
    assert config["inputs"] == {"prior": artifact.load(tmp_path / "tiny").id}
    assert config["step_hash"] == saved.manifest["step_hash"]

    assert len(history["anchor/loss"]) == 9 and all(value > 0 for value in history["anchor/loss"])  # 18 steps
    assert len(history["speed/images_per_s"]) == len(history["gradient_norm/anchor"]) == 9
    (panel,) = history["panels/anchors"]
    assert panel["_type"] == "image-file" and (folder / "files" / panel["path"]).read_bytes()[:4] == b"\x89PNG"
    assert saved.metrics == {name: history[f"final/{name}"][-1] for name in saved.metrics} != {}
    (table,) = history["final/metrics"]
    content = json.loads((folder / "files" / table["path"]).read_text())
    assert dict(content["data"]) == saved.metrics

    (reference,) = (record.artifact for record in records(file) if record.artifact.type == "anchor")
    assert reference.name == "heads-anchor" and json.loads(reference.metadata)["id"] == saved.id
    entries = {entry.path: entry for entry in reference.manifest.contents}
    assert {"manifest.json", *saved.manifest["files"]} <= entries.keys()
    assert all(entry.ref == (saved.path / name).as_uri() and entry.digest for name, entry in entries.items())


def test_a_run_that_goes_on_is_one_run(tmp_path):
    line = ["fit", "--data=tests.stages.toy.ToyArtworks", "--model.steps=2", f"--out={tmp_path}", *small.TRAINER]
    for _ in range(2):
        cli.run("toy", ToyPerArtwork, [*line, "--wandb"])
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"))
    # offline-run-TIME-ID, and -N behind it where two start within a second
    assert first.name.split("-")[3] == second.name.split("-")[3] != ""
    cli.run("toy", ToyPerArtwork, [*line, "--wandb", "--shard=0/2"])
    (other,) = (tmp_path / "shards" / "0" / "wandb").glob("offline-run-*")
    assert other.name.rpartition("-")[2] != first.name.rpartition("-")[2]


def test_turntables_of_present(tmp_path):
    result = heads.stylised(tmp_path, ids=("ann",))
    options = {"model.result.path": result.path, "model.frames": 4, "model.scale": 1, "model.mesh_size": 0}
    options |= {"model.video_size": 32, "model.tile": 32, "out": tmp_path / "out"}
    cli.run("present", PresentStage, ["predict", *small.options(options), *small.TRAINER, "--wandb"])
    folder, run, history = logged(tmp_path / "out")
    assert run.project == "galatea" and not run.run_group
    (video,), (views,) = history["panels/turntable"], history["panels/views"]
    assert video["_type"] == "video-file" and (folder / "files" / video["path"]).read_bytes()[4:8] == b"ftyp"
    assert views["_type"] == "image-file" and (folder / "files" / views["path"]).exists()


class Cut(pl.Callback):
    """Kills W&B's service, or with it the process that talks to it, after the second step."""

    def __init__(self, both: bool = False) -> None:
        self.both = both

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx != 1:
            return
        (process,) = (logger._process for logger in trainer.loggers if isinstance(logger, Dashboard))
        deadline = time.monotonic() + 60
        while not (services := children(process.pid)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        for pid in (*services, process.pid) if self.both else services:
            os.kill(pid, signal.SIGKILL)
        Path(trainer.default_root_dir, "cut").touch()


def children(pid):
    """Processes whose parent is ``pid``, but for those that have ended."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(file.parent.name))
    return found


@pytest.mark.parametrize("both", ["false", "true"])
def test_killed_in_the_middle(tmp_path, both):
    cut = ["--trainer.callbacks+=tests.stages.test_wandb.Cut", f"--trainer.callbacks.both={both}"]
    line = [*cases.lines(tmp_path)["anchor"], f"--out={tmp_path / 'out'}", "--wandb", *cut]
    galatea(*line, "--trainer.log_every_n_steps=1")  # ends with 0
    assert artifact.load(tmp_path / "out").stage == "anchor" and (tmp_path / "out" / "cut").exists()


def test_no_network(tmp_path, monkeypatch):
    for name, value in {"API_KEY": "0" * 40, "BASE_URL": "http://127.0.0.1:9", "INIT_TIMEOUT": "2"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    galatea(*cases.lines(tmp_path)["anchor"], f"--out={tmp_path / 'out'}", "--wandb")
    _, _, history = logged(tmp_path / "out")  # offline
    assert history["final/perceptual"] == [artifact.load(tmp_path / "out").metrics["perceptual"]]


def test_without_the_package(tmp_path, monkeypatch):
    """W&B is an extra: what asks for it is told so before any work, all else goes without."""
    spec = importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else spec(name, *a))
    line = ["fit", "--data=tests.stages.toy.ToyData", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    with pytest.raises(UserError, match="--wandb needs the package wandb, which is not installed: pip install wandb"):
        cli.run("toy", ToyTraining, [*line, f"--out={tmp_path / 'out'}", "--wandb"])
    assert not (tmp_path / "out" / "artifact").exists()
    cli.run("toy", ToyTraining, [*line, f"--out={tmp_path / 'out'}"])
    assert list((tmp_path / "out" / "checkpoints").glob("step=*.ckpt"))


def test_errors_are_not_reported_to_anybody():
    code = "import os, callbacks.dashboard_process; print(os.environ['WANDB_ERROR_REPORTING'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "false\n"
