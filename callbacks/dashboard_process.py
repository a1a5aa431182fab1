"""A W&B run in a process of its own, as :class:`callbacks.dashboard.Dashboard` starts it.

Standard input brings pairs (method of :class:`Run`, its arguments) until it ends, a line of JSON each. What fails is
counted and told once; nothing of it reaches the training. Imports nothing of ours, so that it starts fast.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ALONE_S = 60  # seconds to end a run whose training has died
os.environ.setdefault("GIT_OPTIONAL_LOCKS", "0")  # git status, killed, would leave its lock in the repository
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would look for a host, offline too
os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # a network that does not answer for so many seconds is none


class Run:
    """One W&B run; each method logs one kind of thing.

    Args:
        source: repository whose commit goes to the run's configuration.
        offline: write to ``dir`` only; done anyway when there is no key for the server, or no network.
        pid: process whose memory and GPUs the system charts show.
        config: the run's configuration.
        options: of ``wandb.init``.
    """

    def __init__(self, source: str, offline: bool | None, pid: int, config: Mapping[str, Any], **options: Any) -> None:
        import wandb

        self.wandb = wandb
        Path(options["dir"]).mkdir(parents=True, exist_ok=True)  # or W&B writes elsewhere
        options["config"] = {**config, "git": git_state(source)}
        options["settings"] = wandb.Settings(console="off", x_stats_pid=pid)
        try:  # W&B alone knows its server and the key for it: environment, settings and netrc files, identity tokens
            self.run = wandb.init(mode="offline" if offline else None, **options)
        except wandb.Error as error:
            print(f"W&B: {first_line(error)}; the run is kept offline, 'wandb sync' sends it", flush=True)
            wandb.teardown()  # its service still holds the run's id
            self.run = wandb.init(mode="offline", **options)
        self.run.define_metric("trainer/global_step")
        self.run.define_metric("*", step_metric="trainer/global_step", step_sync=True)

    def configure(self, values: Mapping[str, Any]) -> None:
        """Add to the run's configuration."""
        self.run.config.update(values, allow_val_change=True)

    def log(self, values: Mapping[str, Any], step: int | None) -> None:
        """Numbers of a step."""
        self.run.log({**values, **({} if step is None else {"trainer/global_step": step})})

    def media(self, name: str, path: str, step: int | None) -> None:
        """A picture, or a video (.mp4)."""
        video = path.endswith(".mp4")
        self.log({name: self.wandb.Video(path, format="mp4") if video else self.wandb.Image(path)}, step)

    def table(self, name: str, columns: list[Any], rows: list[list[Any]], step: int | None) -> None:
        """A table."""
        self.log({name: self.wandb.Table(columns=columns, data=rows)}, step)

    def csv(self, name: str, path: str, step: int | None) -> None:
        """A table in a file."""
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        self.table(name, header, [[number(cell) for cell in row] for row in rows], step)

    def artifact(self, name: str, kind: str, path: str, metadata: Mapping[str, Any]) -> None:
        """A folder by reference: W&B learns where it is and its checksums, and is sent nothing of it."""
        artifact = self.wandb.Artifact(name, kind, metadata=dict(metadata))
        artifact.add_reference(Path(path).as_uri(), checksum=True)
        self.run.log_artifact(artifact)

    def finish(self, exit_code: int) -> None:
        """The end, with the exit code of the training."""
        self.run.finish(exit_code=exit_code)


def git_state(source: str) -> dict[str, Any] | None:
    """Commit, and whether files differ from it; ``None`` where ``source`` is not a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", source, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def number(cell: str) -> float | str:
    """A cell's number, if it is one."""
    try:
        return float(cell)
    except ValueError:
        return cell


def first_line(error: BaseException) -> str:
    """What went wrong, in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def main() -> None:
    """Do what standard input says until it ends."""
    run: Run | None = None
    ended, failed, total = False, 0, 0
    for total, line in enumerate(sys.stdin.buffer, 1):  # noqa: B007 - its last value is told
        if not line.endswith(b"\n"):  # whoever told us has died
            break
        method, arguments = json.loads(line)
        try:
            if method == "start":
                run = Run(**arguments)
            elif run is not None:
                ended = ended or method == "finish"
                getattr(run, method)(**arguments)
            else:
                failed += 1
        except Exception as error:
            failed += 1
            if failed == 1:
                print(f"W&B: {method} failed: {first_line(error)}; training goes on", flush=True)
    if failed > 1:
        print(f"W&B: {failed} of {total} records were lost to errors", flush=True)
    if run is not None and not ended:  # whoever told us has died
        signal.alarm(ALONE_S)
        run.finish(exit_code=1)


if __name__ == "__main__":
    main()
