"""A step's hash, its process and its folder."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from models.errors import UserError
from stages.configs import read_yaml
from stages.pipeline import process, steps
from stages.pipeline.hashing import step_hash
from stages.pipeline.steps import command_hash, execute, locked
from stages.table import STAGES

DUMMY = str(Path(__file__).with_name("dummy_step.py"))


@pytest.fixture(autouse=True)
def dummy(monkeypatch):
    monkeypatch.setitem(STAGES, "dummy", ("stages.dummy:Dummy", "a dummy"))


class TestHash:
    def test_whatever_launches_it(self):
        step = [sys.executable, DUMMY, "dummy", "fit", "--colour=red"]
        assert command_hash(["srun", "--wait=9", *step]) == command_hash(step)
        assert command_hash([*step, "--out=a", "--trainer.devices=4", "--shard=0/2"]) == command_hash(step)
        assert command_hash([*step[:-1], "--colour=blue"]) != command_hash(step)

    def test_a_step_that_refuses_its_options(self):
        """In the words of the step, and whether its process is forked or not."""
        for program in (process.PROGRAM, ("env", *process.PROGRAM)):
            with pytest.raises(UserError, match=r"^anchor: .*model\.speed"):
                command_hash([*program, "anchor", "fit", "--model.speed=9"])


def test_what_is_up_to_date_is_told_without_starting_the_step(tmp_path, monkeypatch):
    """While its words, configuration files, inputs and our code stay as they were; of anything else it is asked."""
    asked, answer = [], None

    def ask(command):
        asked.append(command)
        return answer

    monkeypatch.setattr(steps, "command_hash", ask)
    data, more, folder = tmp_path / "data.json", tmp_path / "more.yaml", tmp_path / "out"
    data.write_text("1")
    more.write_text("base: []\nmodel: {samples: 3}\n")
    folder.mkdir()
    (folder / "config.yaml").write_text(f"model: {{samples: 3, path: {data}}}\n")
    command = [*process.PROGRAM, "present", "predict", f"--config={more}", f"--model.path={data}"]
    answer = step_hash("present", "predict", read_yaml(folder / "config.yaml"))
    done = {"state": "done", "hash": answer, "asked": steps._asked(command), "artifact": None}
    steps.write_status(folder, done)
    assert steps.read_state(folder, command) == ("done", answer) and not asked

    answer = "another"
    assert steps.read_state(folder, [*command, "--model.samples=4"])[0] == "changed" and len(asked) == 1
    data.write_text("2")
    assert steps.read_state(folder, command)[0] == "changed" and len(asked) == 2
    data.write_text("1")
    assert steps.read_state(folder, command)[0] == "done" and len(asked) == 2
    more.write_text("base: []\nmodel: {samples: 4}\n")
    assert steps.read_state(folder, command)[0] == "changed" and len(asked) == 3
    steps.write_status(folder, done | {"asked": "by other code"})
    assert steps.read_state(folder, command)[0] == "changed" and len(asked) == 4


def script(text):
    """A step that runs ``text``, and whose hash is that of its options."""
    hashes = f'[[ " $* " != *" --print_hash "* ]] || exec {sys.executable} {DUMMY} dummy "$@"'
    return ["bash", "-c", f"{hashes}\n{text}", "dummy", "fit"]


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
        execute("one", tmp_path, [*script("exit 0"), "--steps=2"], locks())
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
