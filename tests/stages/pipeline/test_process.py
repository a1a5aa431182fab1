"""The process of a step: forked, and yet as `python -m stages` would be."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from models import artifact
from models.files import ROOT
from stages.pipeline.process import PROGRAM, start
from stages.table import STAGES, VERBS
from tests.stages import cases

linux = pytest.mark.skipif(sys.platform != "linux", reason="steps are forked on Linux only")


def probe(arguments):
    """A command that tells what it sees, then ends as it is asked to."""
    main = sys.modules["__main__"]
    seen = {
        "argv": sys.argv[1:],
        "main": main.__spec__.name if main.__spec__ else None,
        "path": sys.path[0],
        "signals": [signal.getsignal(n) in (signal.SIG_DFL, signal.default_int_handler) for n in (2, 10, 15)],
        "threads": threading.active_count(),
        "environment": {name: os.environ.get(name) for name in ("PYTHONSAFEPATH", "PYTHONUNBUFFERED", "GIVEN")},
    }
    print(json.dumps(seen), end="")  # no line break: output is not held back
    if arguments[0] == "wait":
        time.sleep(60)
    if arguments[0] == "raise":
        raise RuntimeError("nobody has thought of this")
    sys.exit(int(arguments[0]))


def run(command, ask=None, **variables):
    """Run a command, sending it a signal once it has printed; returns its exit status and output."""
    source, sink = os.pipe()
    child = start(command, sink, source, **variables)
    os.close(sink)
    printed = os.read(source, 65536)
    if ask is not None:
        os.kill(child.pid, ask)
    while more := os.read(source, 65536):
        printed += more
    os.close(source)
    return child.wait(), printed.decode()


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setitem(VERBS, "probe", (f"{__name__}:probe", "a probe"))
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    yield [*PROGRAM, "probe"]
    signal.signal(signal.SIGINT, previous)


@linux
class TestForked:
    def test_it_sees_what_a_new_process_sees(self, command):
        previous = [signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGUSR1)]
        try:
            code, text = run([*command, "3", "--x"], GIVEN="hash")
        finally:
            for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), previous, strict=True):
                signal.signal(number, handler)
        seen = json.loads(text)
        assert code == 3 and seen["argv"] == ["probe", "3", "--x"] and seen["path"] == str(ROOT)
        assert seen["main"] == "stages.__main__"  # further ranks are started as this module
        assert seen["signals"] == [True] * 3 and seen["threads"] == 1
        assert seen["environment"] == {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "GIVEN": "hash"}

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
    def test_signals_end_it(self, command, number):
        assert run([*command, "wait"], ask=number)[0] == -number

    def test_interrupts_are_told(self, command):
        code, text = run([*command, "wait"], ask=signal.SIGINT)
        assert code == 130 and text.endswith("galatea: interrupted\n")

    def test_an_error_that_nobody_has_thought_of(self, command):
        code, text = run([*command, "raise"])
        assert code == 1 and "galatea: error: RuntimeError: nobody has thought of this" in text

    def test_what_is_imported_before_leaves_no_trace(self):
        """No thread but those of BLAS, no use of the GPU, no seed."""
        text = (
            "import importlib, os, torch; before = torch.get_rng_state();"
            "importlib.import_module('stages.cli');"
            "print(len(os.listdir('/proc/self/task')), torch.cuda.is_initialized(),"
            " torch.equal(before, torch.get_rng_state()))"
        )
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        environment.pop("OMP_NUM_THREADS", None)
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.split() == ["1", "False", "True"], done.stderr

    @pytest.mark.slow
    @pytest.mark.parametrize("devices", [1, 2])
    def test_the_same_bytes_as_a_new_process(self, tmp_path, devices):
        """On two devices too: the second rank starts anew from the command line."""
        line = cases.lines(tmp_path / "inputs")["anchor"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        options = ["--threads=1", f"--trainer.devices={devices}"]
        new, forked = tmp_path / "new", tmp_path / "forked"
        subprocess.run([*PROGRAM, *line, *options[:1], f"--out={new}"], env=environment, check=True, timeout=200)
        code, text = run([*PROGRAM, *line, *options, f"--out={forked}"])
        assert code == 0, text
        assert contents(forked) == contents(new) and artifact.load(forked).id == artifact.load(new).id


def contents(out):
    """Of the files that a stage hands on."""
    files = sorted(p for p in (out / "artifact").rglob("*") if p.is_file() and p.name != artifact.RUN)
    assert files
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


def test_stages_import_what_they_use_when_they_use_it():
    """Beyond what Lightning itself imports."""
    names = [target.partition(":")[0] for target, _ in STAGES.values()]
    text = (
        "import importlib, sys; import pytorch_lightning.cli; before = set(sys.modules);"
        f"[importlib.import_module(name) for name in ['stages.cli', *{names}]];"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=120)
    heavy = {"lpips", "open_clip", "kornia", "imageio", "imageio_ffmpeg", "skimage", "sklearn", "trimesh", "wandb"}
    heavy |= {"tensorboard", "viser", "transformers", "timm", "matplotlib", "pandas"}
    assert "stages" in done.stdout.split() and not heavy & set(done.stdout.split()), done.stderr
