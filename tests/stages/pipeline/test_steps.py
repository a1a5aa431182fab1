"""A step's hash, its process and its folder."""

import json
import os
import signal
import threading
import time

import pytest

from models.errors import UserError
from stages.pipeline import steps
from stages.pipeline.steps import command_hash, execute, locked

STEP = ["anchor", "fit", "--model.steps=3", "--data.init_args.path=art"]


class TestHash:
    def test_whatever_launches_it(self):
        assert command_hash(["srun", "--wait=9", "python", "-m", "stages", *STEP]) == command_hash(["x", *STEP])
        assert command_hash([*STEP, "--out=a", "--trainer.devices=4", "--shard=0/2"]) == command_hash(STEP)

    def test_what_counts(self):
        assert command_hash(["x", *STEP[:2]]) != command_hash(["x", *STEP])
        assert command_hash([*STEP, "--model.steps=4"]) != command_hash(STEP)
        assert command_hash(["stylize", *STEP[1:]]) != command_hash(STEP)

    def test_values_are_as_a_configuration_holds_them(self, tmp_path):
        (tmp_path / "a.yaml").write_text(
            "model: {steps: 3, search: {space: z, restarts: 2}}\ndata: {init_args: {path: art}}\n"
        )
        (tmp_path / "b.yaml").write_text("model: {search: {restarts: 5}}\n")
        config = [f"--config={tmp_path / name}" for name in ("a.yaml", "b.yaml")]
        nested = '--model.search={"space": "z", "restarts": 5}'
        assert command_hash(["anchor", "fit", *config]) == command_hash([*STEP, nested])

    def test_a_folder_may_be_called_2024(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "2024").mkdir()
        before = command_hash(["anchor", "fit", "--data.init_args.path=2024"])
        (tmp_path / "2024" / "a.png").write_bytes(b"a")
        assert command_hash(["anchor", "fit", "--data.init_args.path=2024"]) != before


def script(text):
    return ["bash", "-c", text, "anchor", "fit"]


def status(folder):
    return json.loads((folder / "status.json").read_text())


class TestProcess:
    def ask(self, folder):
        """Send us the signal once the step is ready for it."""

        def send():
            deadline = time.monotonic() + 30
            while "ready" not in (folder / "log.txt").read_text() if (folder / "log.txt").exists() else True:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGUSR1)

        threading.Thread(target=send).start()

    @pytest.mark.parametrize(("code", "state"), [(75, "stopped"), (1, "stopped"), (0, "done")])
    def test_a_step_that_is_asked_to_stop(self, tmp_path, capfd, code, state):
        """However it ends then, it can be continued, unless it is done."""
        before = signal.getsignal(signal.SIGUSR1)
        self.ask(tmp_path)
        trap = f"trap 'echo heard; exit {code}' USR1; echo ready; while :; do sleep 0.02; done"
        assert execute("one", tmp_path, script(trap), locks()) is (code == 0)
        assert status(tmp_path)["state"] == state and "heard" in capfd.readouterr().out
        assert signal.getsignal(signal.SIGUSR1) is before

    def test_it_may_stop_by_itself(self, tmp_path):
        assert execute("one", tmp_path, script(f"exit {steps.PREEMPTED}"), locks()) is False

    def test_starts_are_counted_until_something_changes(self, tmp_path):
        for starts in (1, 2):
            with pytest.raises(UserError, match=r"step one failed \(exit code 3\)"):
                execute("one", tmp_path, script("exit 3"), locks())
            assert (status(tmp_path)["starts"], status(tmp_path)["exit_code"]) == (starts, 3)
        execute("one", tmp_path, [*script("exit 0"), "--model.steps=2"], locks())
        assert status(tmp_path)["starts"] == 1


def locks():
    """A file for the step to hold."""
    return os.open(os.devnull, os.O_RDONLY)


def test_jobs_share_a_folder_and_others_keep_out(tmp_path):
    refused = pytest.raises(UserError, match="another galatea run is working in")
    with locked(tmp_path, shared=True), locked(tmp_path, shared=True), refused, locked(tmp_path):
        pass
    with locked(tmp_path), refused, locked(tmp_path, shared=True):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.fcntl, "flock", lambda *_: os.open(tmp_path / "none" / "such", 0))
    with locked(tmp_path) as lock:
        assert os.fstat(lock)
