"""A step of a pipeline and its folder: done, to be continued or to be done again; and its process.

``status.json`` tells the step's state and hash, ``log.txt`` holds what it printed. A step is known by its command
line, ``... STAGE COMMAND --OPTION=VALUE...``: whatever launches it, and wherever, its hash is the same; the step is
asked for it (``--print_hash``).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

from models.errors import UserError
from models.files import ROOT, atomic_write, os_errors, read_json, remove_folder, sweep, versions
from models.manifest import MANIFEST, manifest_id, read_manifest
from stages.base.foreign import TOLD
from stages.configs import read_config, read_yaml
from stages.pipeline import presets
from stages.pipeline.hashing import GIVEN, step_hash
from stages.pipeline.process import start

STATUS = "status.json"
_CODE = ("models", "datamodules", "callbacks", "stages")
PREEMPTED = os.EX_TEMPFAIL  # exit status of callbacks.preemption: saved and stopped, the same command continues


@dataclass(frozen=True)
class Task:
    """A step that is ready to run.

    Attributes:
        name, stage: of the step.
        folder: its own.
        command: ``... STAGE COMMAND --OPTION=VALUE...``
        state, digest: of :func:`read_state`.
        after: names of the steps whose artifacts it takes.
    """

    name: str
    stage: str
    folder: Path
    command: list[str]
    state: str
    after: list[str]
    digest: str | None = None


# -- the hash ------------------------------------------------------------------------------------------


def command_hash(command: Sequence[str]) -> str:
    """Hash of the step that ``command`` runs, as the step itself tells it: it alone knows all its options.

    Raises:
        UserError: when the step refuses its options, or an input cannot be read.
    """
    words = list(command)
    if words[0] == "srun":
        words = list(dropwhile(lambda word: word.startswith("--"), words[1:]))
    source, sink = os.pipe()
    with open(source, "rb") as answer:
        process = start([*words, "--print_hash"], sink, source)
        os.close(sink)
        lines = answer.read().decode(errors="replace").splitlines()
    if process.wait() != 0 or not lines:
        said = lines[-1].removeprefix("galatea: error: ") if lines else "it does not start"
        raise UserError(f"{_stage(words)[0]}: {said}")
    return lines[-1]


def _remembered(folder: Path, command: Sequence[str], status: Mapping[str, Any]) -> str | None:
    """The hash that asking the step would give, where nothing has changed that its options are made of.

    They are in ``config.yaml`` then, and only what its inputs hold is looked at: no step need be started for it.
    """
    config = folder / "config.yaml"
    if status.get("asked") != _asked(command) or not config.exists():
        return None
    stage, verb = _stage(command)
    return step_hash(stage, verb, read_yaml(config))


def _asked(command: Sequence[str]) -> str:
    """Of a command's words, what its configuration files say, and the state of our code."""
    stage, _ = _stage(command)
    files = [word.removeprefix("--config=") for word in command if word.startswith("--config=")]
    found = sorted(file for room in _CODE for file in (ROOT / room).rglob("*.py"))
    code = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found]
    content = json.dumps([list(command), read_config(stage, files), code], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _stage(command: Sequence[str]) -> tuple[str, str]:
    """Stage and command of ``... STAGE COMMAND --OPTION=VALUE...``."""
    words = list(dropwhile(lambda word: word.startswith("--"), reversed(command)))
    return words[1], words[0]


# -- the folder ----------------------------------------------------------------------------------------


def read_state(folder: Path, command: Sequence[str], digest: str | None = None) -> tuple[str, str | None]:
    """ "done", "unfinished", "changed" (done or begun with another hash) or "new"; and the hash, if not new.

    Args:
        digest: the hash, where it is known.
    """
    status = _read_status(folder)
    if not status:
        if versions(folder / STATUS):
            raise UserError(f"{folder / STATUS} is damaged: remove {folder} to do this step again")
        return "new", digest
    if digest is None:
        digest = _remembered(folder, command, status)
        if digest != status.get("hash"):
            digest = command_hash(command)
    if status.get("hash") != digest:
        return "changed", digest
    if status.get("state") != "done":
        return "unfinished", digest
    return "done" if status.get("artifact") == _artifact_id(folder) else "changed", digest


def clear(folder: Path) -> None:
    """Remove what an earlier run of the step left.

    Raises:
        UserError: when the folder holds something else, or cannot be removed.
    """
    sweep(folder.parent)
    if folder.exists():
        with os_errors(folder, "read"):
            if not versions(folder / STATUS) and any(folder.iterdir()):
                raise UserError(f"{folder} holds files of something else: choose another --out folder")
        # At once: killed here, the rest of a folder without its status would look like somebody else's.
        remove_folder(folder)


def resume_options(folder: Path, command: Sequence[str]) -> list[str]:
    """What continues the step from its last checkpoint, where it has one."""
    checkpoints = folder / "checkpoints"
    return [f"--ckpt_path={checkpoints / 'last.ckpt'}"] if any(checkpoints.glob("*.ckpt")) and "fit" in command else []


@contextmanager
def locked(out: Path, shared: bool = False) -> Iterator[int]:
    """Keep other runs out of a pipeline's folder; jobs of one pipeline share it.

    Raises:
        UserError: when another run works in it.
    """
    with os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "w")  # noqa: SIM115 - closed below, which releases the lock
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another galatea run is working in {out}") from error
        except OSError:  # a file system without locks, as some clusters have
            pass
        yield file.fileno()


def _read_status(folder: Path) -> dict[str, Any]:
    return read_json(folder / STATUS) or {}


def write_status(folder: Path, status: Mapping[str, Any]) -> None:
    """Write ``status.json``, atomically."""
    with atomic_write(folder / STATUS, keep=True) as file:
        file.write_text(json.dumps(status, indent=1) + "\n")


def _artifact_id(folder: Path) -> str | None:
    if not (folder / "artifact" / MANIFEST).exists():
        return None
    return manifest_id(read_manifest(folder / "artifact"))


# -- the process ---------------------------------------------------------------------------------------


def execute(name: str, folder: Path, command: Sequence[str], lock: int, digest: str | None = None) -> bool:
    """Run a step, or continue it, and keep its ``status.json`` and ``log.txt``.

    Args:
        lock: a file that the step holds as well.
        digest: the step's hash, where it is known.

    Returns:
        whether it is done; ``False`` when it was asked to stop (``SIGUSR1``) and can be continued.

    Raises:
        UserError: when it fails.
    """
    digest, before = digest or command_hash(command), _read_status(folder)
    starts = before.get("starts", 0) + 1 if before.get("hash") == digest else 1
    status: dict[str, Any] = {"state": "running", "hash": digest, "starts": starts, "asked": _asked(command)}
    write_status(folder, status)
    log, begin = folder / "log.txt", time.monotonic()
    code = _stream([*command, *resume_options(folder, command)], log, lock, digest)
    status |= {"state": {0: "done", PREEMPTED: "stopped"}.get(code, "failed"), "exit_code": code}
    status |= {"seconds": round(time.monotonic() - begin, 1), "artifact": _artifact_id(folder)}
    for _ in range(2):  # so that the one before it knows as well, should it be damaged
        write_status(folder, status)
    if status["state"] == "failed":
        reason = f"exit code {code}" if code > 0 else f"signal {-code}"
        raise UserError(f"step {name} failed ({reason}), its log is {log}; the same command continues it")
    return code == 0


def _stream(command: Sequence[str], log: Path, lock: int, digest: str) -> int:
    """Run ``command``, passing what it prints on as it comes and appending it to ``log``.

    The command holds ``lock`` as well: should we be killed, it may live on, and nobody else must write meanwhile.
    ``SIGUSR1`` is passed on to it; then it may end as it likes, the exit status is ``PREEMPTED`` unless it was done.
    """
    source, sink = os.pipe()
    with os_errors(log), open(log, "ab") as file, open(source, "rb") as printed:
        process = start(command, sink, source, lock, **{GIVEN: digest, TOLD: " ".join(presets.told(command))})
        os.close(sink)
        asked = False

        def pass_on(*_: Any) -> None:
            nonlocal asked
            asked = True
            if process.poll() is None:
                os.kill(process.pid, signal.SIGUSR1)

        previous = signal.signal(signal.SIGUSR1, pass_on)
        try:
            while chunk := os.read(printed.fileno(), 65536):
                file.write(chunk)
                file.flush()
                sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
            code = process.wait()
            return PREEMPTED if asked and code != 0 else code
        finally:
            signal.signal(signal.SIGUSR1, previous)
            if process.poll() is None:
                process.terminate()
                process.wait()
