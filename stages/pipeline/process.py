"""The process of a step: as good as new, but forked from one that has imported torch and Lightning, once for all."""

from __future__ import annotations

import atexit
import importlib
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from models.files import ROOT

PROGRAM = (sys.executable, "-m", "stages")


class Process(Protocol):
    """A running command, as :class:`subprocess.Popen` has it."""

    pid: int

    def poll(self) -> int | None:
        """Exit status, or minus the signal that ended it; ``None`` while it runs."""
        ...

    def wait(self) -> int:
        """Exit status, once it has ended."""
        ...

    def terminate(self) -> None:
        """Send ``SIGTERM``."""


class _Forked:
    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: int, unread: int) -> None:
        arguments = (command[len(PROGRAM) :], environment, output, unread)
        self._process = multiprocessing.get_context("fork").Process(target=_run, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()


def start(command: Sequence[str], output: int, unread: int, lock: int = -1, **variables: str) -> Process:
    """Start ``command``, its output and errors going to the file ``output``.

    A step of ours is forked from this process, which imports what all steps need before the first one: nothing is
    computed here, no seed set, and no thread started but those of NumPy's BLAS, which are made for it. Forking is for
    Linux; other systems' libraries do not survive it.

    Args:
        unread: the other end of ``output``, which the command must not hold.
        lock: a file that it holds as well.
        variables: of its environment, beside ours.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **variables}
    # Ours first: the current folder may hold another repository's `models`.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if sys.platform == "linux" and tuple(command[: len(PROGRAM)]) == (sys.executable, "-m", "stages"):
        importlib.import_module("stages.cli")  # by its name: it stands above pipelines; here: heavy
        return _Forked(command, environment, output, unread)
    files = () if lock < 0 else (lock,)
    return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, pass_fds=files)


def _run(arguments: Sequence[str], environment: Mapping[str, str], output: int, unread: int) -> None:
    """What ``python -m stages ARGUMENTS`` does in a new process, here in a forked one."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.close(unread)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    raw = (open(stream, "wb", buffering=0, closefd=False) for stream in (1, 2))  # noqa: SIM115
    sys.stdout, sys.stderr = (io.TextIOWrapper(stream, write_through=True) for stream in raw)
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder of the script, or the current one
    sys.path.insert(0, str(ROOT))
    sys.argv = ["stages", *arguments]
    sys.modules.pop("stages.__main__", None)  # it runs anew, as `__main__`
    try:
        runpy.run_module("stages", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
