"""The dashboard: what is logged arrives, and nothing that W&B does reaches the training."""

import json
import logging
import os
import signal
import statistics
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise

import pytest
import pytorch_lightning as pl

from callbacks import dashboard
from callbacks.dashboard import Dashboard
from callbacks.dashboard_process import git_state
from models.files import ROOT
from tests.stages.toy import ToyData, ToyTraining

# Stands in for the package: writes what it is told to a file, or behaves as WANDB_BEHAVES says.
FAKE = """
import json, os, time
class Error(Exception): pass
def tell(*words):
    with open(os.environ["WANDB_TOLD"], "a") as file:
        file.write(json.dumps(words) + "\\n")
class Config:
    def update(self, values, allow_val_change): tell("config", values)
class Run:
    config = Config()
    def define_metric(self, *names, **options): pass
    def log(self, values):
        behaves = os.environ["WANDB_BEHAVES"]
        if behaves == "slow": time.sleep(5)
        if behaves == "broken": raise OSError("no route to host\\nand more")
        tell("log", values)
    def log_artifact(self, artifact): tell("artifact", artifact.words)
    def finish(self, exit_code):
        if os.environ["WANDB_BEHAVES"] == "hanging": time.sleep(600)
        tell("finish", exit_code)
class Artifact:
    def __init__(self, name, kind, metadata): self.words = [name, kind, metadata]
    def add_reference(self, uri, checksum): self.words += [uri, checksum]
def teardown(): tell("teardown")
def Settings(**options): return options
def Image(path): return "image " + path
def Video(path, format): return "video " + path
def Table(columns, data): return [columns, *data]
def init(mode, **options):
    if not os.environ.get("WANDB_API_KEY") and mode != "offline": raise Error("no key for your server")
    if os.environ["WANDB_BEHAVES"] == "unreachable" and mode != "offline": raise Error("timed out")
    tell("init", mode, options)
    return Run()
"""


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Puts the stand-in in the place of W&B; returns what it was told, once the run is over."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    values = {"PYTHONPATH": tmp_path / "fake", "WANDB_TOLD": tmp_path / "told", "WANDB_API_KEY": "k" * 40}
    for name, value in {**values, "WANDB_BEHAVES": ""}.items():
        monkeypatch.setenv(name, str(value))
    return lambda: [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.INFO, "callbacks.dashboard")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "callbacks.dashboard"]


def test_everything_arrives_in_order(told, tmp_path, warnings):
    board = Dashboard(tmp_path / "out", "heads", "toon/anchor", "toon", "anchor", "abc", config={"path": tmp_path})
    board.log_hyperparams({"inputs": {"prior": "12"}})
    board.log_metrics({"loss": 0.5}, 7)
    board.log_media("panels/turn", tmp_path / "7.mp4", 8)
    board.log_table("final/metrics", ["metric", "value"], [["loss", 0.5]], 9)
    (tmp_path / "metrics.csv").write_text("item,value\nann,1.5\n")
    board.log_csv("final/records", tmp_path / "metrics.csv", 9)
    board.log_artifact(tmp_path, "anchor", {"id": "34"})
    board.finalize("success")
    (_, mode, options), *rest = told()
    assert mode is None and options["dir"] == str(tmp_path / "out") and (tmp_path / "out").is_dir()
    expected = {"project": "heads", "name": "toon/anchor", "group": "toon", "job_type": "anchor", "id": "abc"}
    assert expected.items() <= options.items() and options["settings"]["x_stats_pid"] == os.getpid()
    assert options["config"]["path"] == str(tmp_path) and options["config"]["git"]["commit"]
    assert rest == [
        ["config", {"inputs": {"prior": "12"}}],
        ["log", {"loss": 0.5, "trainer/global_step": 7}],
        ["log", {"panels/turn": f"video {tmp_path / '7.mp4'}", "trainer/global_step": 8}],
        ["log", {"final/metrics": [["metric", "value"], ["loss", 0.5]], "trainer/global_step": 9}],
        ["log", {"final/records": [["item", "value"], ["ann", 1.5]], "trainer/global_step": 9}],
        ["artifact", ["toon-anchor", "anchor", {"id": "34"}, tmp_path.as_uri(), True]],
        ["finish", 0],
    ]
    assert not warnings()


def test_online_with_a_key_and_offline_without_a_network(told, tmp_path, monkeypatch, warnings):
    for behaviour in ("", "unreachable"):
        monkeypatch.setenv("WANDB_BEHAVES", behaviour)
        board = Dashboard(tmp_path)
        board.log_metrics({"loss": 1.0}, 0)
        board.finalize("failed")
    assert [words[1] for words in told() if words[0] == "init"] == [None, "offline"]
    assert [words[1] for words in told() if words[0] == "finish"] == [1, 1]
    assert warnings() == ["W&B: Error: timed out; the run is kept offline, 'wandb sync' sends it"]


class Clock(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        self.times = [time.monotonic()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.times.append(time.monotonic())


def steps(out, logger):
    """Seconds that each step of a training took that logs after each one."""
    clock = Clock()
    trainer = pl.Trainer(
        default_root_dir=out, accelerator="cpu", devices=1, max_epochs=10, logger=logger, callbacks=[clock],
        log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(ToyTraining(), datamodule=ToyData())
    return [after - before for before, after in pairwise(clock.times)]


@pytest.mark.filterwarnings("ignore")
def test_calls_that_sleep_five_seconds_cost_a_step_nothing(told, tmp_path, monkeypatch, warnings):
    plain = steps(tmp_path, False)
    monkeypatch.setenv("WANDB_BEHAVES", "slow")
    slow = steps(tmp_path, Dashboard(tmp_path, patience_s=0.2))
    assert len(slow) == 120
    assert statistics.median(slow) <= max(plain)  # the other steps' own spread, on a machine that others use too
    (line,) = warnings()
    assert line.startswith(f"W&B did not finish within 0.2 s: 'wandb sync' sends what is in {tmp_path / 'wandb'}, ")


def test_a_full_queue_is_told(told, tmp_path, monkeypatch, warnings):
    monkeypatch.setenv("WANDB_BEHAVES", "slow")
    board = Dashboard(tmp_path, size=20, patience_s=0.2)
    for step in range(5000):  # the pipe holds some hundreds more
        board.log_metrics({"loss": 1.0}, step)
    board.finalize("success")
    told_of = [text for text in warnings() if text.startswith("W&B was too slow")]
    assert len(told_of) == 1 and 3000 < int(told_of[0].split()[5]) < 5000


def test_calls_that_fail_are_one_warning_and_a_count(told, tmp_path, monkeypatch, warnings):
    monkeypatch.setenv("WANDB_BEHAVES", "broken")
    board = Dashboard(tmp_path)
    for step in range(5):
        board.log_metrics({"loss": 1.0}, step)
    board.finalize("success")
    first, count = warnings()
    assert first == "W&B: log failed: OSError: no route to host; training goes on"
    assert count == "W&B: 5 of 7 records were lost to errors"


def test_a_process_that_is_killed(told, tmp_path, warnings):
    board = Dashboard(tmp_path, patience_s=20)
    board.log_metrics({"loss": 1.0}, 0)
    os.kill(board._process.pid, signal.SIGKILL)
    board._process.wait()
    for step in range(2000):  # more than the queue holds
        board.log_metrics({"loss": 1.0}, step)
    begin = time.monotonic()
    board.finalize("success")
    assert time.monotonic() - begin < 10
    assert "W&B has ended unexpectedly: training goes on without it" in warnings()


@pytest.mark.parametrize("stopped", [False, True])
def test_an_end_that_hangs(told, tmp_path, monkeypatch, warnings, stopped):
    monkeypatch.setenv("WANDB_BEHAVES", "hanging")
    board = Dashboard(tmp_path, patience_s=0.5)
    board.log_metrics({"loss": 1.0}, 0)
    process = board._process
    if stopped:
        os.kill(process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    board.finalize("success")
    assert time.monotonic() - begin < 10 and process.poll() == -signal.SIGKILL
    assert warnings()[-1].startswith("W&B did not finish within 0.5 s")


def test_a_machine_that_is_wanted_back_is_not_kept(told, tmp_path, monkeypatch, warnings):
    monkeypatch.setenv("WANDB_BEHAVES", "hanging")
    monkeypatch.setattr(dashboard, "HURRY_S", 0.5)
    board = Dashboard(tmp_path)
    board.log_metrics({"loss": 1.0}, 0)
    board.finalize("failed")
    assert warnings()[-1].startswith("W&B did not finish within 0.5 s")


def test_it_outlives_whoever_logs_only_to_end_the_run(told, tmp_path):
    board = Dashboard(tmp_path)
    board.log_metrics({"loss": 1.0}, 0)
    board._queue.put(None)  # the pipe closes, as when we are killed
    board._process.wait(60)
    assert told()[-1] == ["finish", 1]


def test_offline_without_a_key(told, tmp_path, monkeypatch, warnings):
    """W&B is asked, which alone knows its server and where the key for that is kept."""
    monkeypatch.delenv("WANDB_API_KEY")
    board = Dashboard(tmp_path)
    board.log_metrics({"loss": float("nan")}, 0)
    board.finalize("success")
    assert [words[1] for words in told() if words[0] == "init"] == ["offline"] and told()[-1] == ["finish", 0]
    assert warnings() == ["W&B: Error: no key for your server; the run is kept offline, 'wandb sync' sends it"]


@pytest.mark.parametrize("kept", ["machine 127.0.0.1:{port} login user password {key}", None])
def test_the_key_of_the_server_that_is_used(tmp_path, monkeypatch, warnings, kept):
    """The package itself: it asks the server that is set with the key kept for it, and nobody without one."""
    asked = []

    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            self.send_error(401)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    (tmp_path / "netrc").write_text(kept.format(port=port, key="k" * 40) if kept else "")
    values = {"NETRC": tmp_path / "netrc", "HOME": tmp_path, "WANDB_INIT_TIMEOUT": 5}
    for name, value in {**values, "WANDB_BASE_URL": f"http://127.0.0.1:{port}"}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    board = Dashboard(tmp_path)
    board.log_metrics({"loss": 1.0}, 0)
    board.finalize("success")
    server.shutdown()
    assert bool(asked) == bool(kept) and len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    assert any("the run is kept offline" in line for line in warnings())


def test_commits(tmp_path):
    assert git_state(str(tmp_path)) is None and git_state(str(ROOT))["commit"]
