"""What ``--wandb`` leaves in an offline run folder, read back from it."""

import functools
import json
import struct
import time

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from stages import cli
from stages.anchor import AnchorStage
from stages.present import PresentStage
from tests.stages import heads, small

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
    """The offline run's folder, its project, and by key all values that were logged, in order."""
    wandb.finish()
    (folder,) = (out / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 60
    while not any(record.HasField("exit") for record in records(file)):  # another process writes, with a buffer
        assert time.monotonic() < deadline
        time.sleep(0.1)
    project, history = "", {}
    for record in records(file):
        if record.HasField("run"):
            project = record.run.project
        row = {}
        for item in record.history.item:
            *outer, last = item.nested_key
            entry = functools.reduce(lambda entry, key: entry.setdefault(key, {}), outer, row)
            entry[last] = json.loads(item.value_json)
        for key, value in row.items():
            history.setdefault(key, []).append(value)
    return folder, project, history


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.finish()


def test_losses_panels_and_final_metrics_of_a_fit(tmp_path):
    line = small.lines(tmp_path)["anchor"]
    options = [f"--out={tmp_path / 'out'}", "--trainer.log_every_n_steps=2", "--wandb=heads"]
    cli.run("anchor", AnchorStage, [*line[1:], *options])
    folder, project, history = logged(tmp_path / "out")
    assert project == "heads"
    assert len(history["anchor/loss"]) == 9 and all(value > 0 for value in history["anchor/loss"])  # 18 steps
    (panel,) = history["panels/anchors"]
    assert panel["_type"] == "image-file" and (folder / "files" / panel["path"]).read_bytes()[:4] == b"\x89PNG"
    metrics = json.loads((tmp_path / "out" / "artifact" / "manifest.json").read_text())["metrics"]
    assert metrics and metrics == {name: history[f"final/{name}"][-1] for name in metrics}


def test_a_run_that_goes_on_is_one_run(tmp_path):
    line = ["anchor", "fit", *small.lines(tmp_path)["anchor"][2:], f"--out={tmp_path / 'out'}", "--wandb"]
    for _ in range(2):
        cli.run("anchor", AnchorStage, line[1:])
        wandb.finish()
    first, second = sorted((tmp_path / "out" / "wandb").glob("offline-run-*"))
    # offline-run-TIME-ID, and -N behind it where two start within a second
    assert first.name.split("-")[3] == second.name.split("-")[3] != ""
    shared = {"out": tmp_path / "out", "shard": "0/2"}
    cli.run("anchor", AnchorStage, [*line[1:], *small.options(shared)])
    wandb.finish()
    (other,) = (tmp_path / "out" / "shards" / "0" / "wandb").glob("offline-run-*")
    assert other.name.rpartition("-")[2] != first.name.rpartition("-")[2]


def test_turntables_of_present(tmp_path):
    result = heads.stylised(tmp_path, ids=("ann",))
    options = {"model.result.path": result.path, "model.frames": 4, "model.scale": 1, "model.mesh_size": 0}
    options |= {"model.video_size": 32, "model.tile": 32, "out": tmp_path / "out"}
    cli.run("present", PresentStage, ["predict", *small.options(options), *small.TRAINER, "--wandb"])
    folder, project, history = logged(tmp_path / "out")
    assert project == "galatea"
    (video,), (views,) = history["panels/turntable"], history["panels/views"]
    assert video["_type"] == "video-file" and (folder / "files" / video["path"]).read_bytes()[4:8] == b"ftyp"
    assert views["_type"] == "image-file" and (folder / "files" / views["path"]).exists()
