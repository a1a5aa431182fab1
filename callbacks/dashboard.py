"""Weights & Biases, at arm's length: slow, hanging or dead, it never holds up or ends a training."""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from callbacks import dashboard_process
from models.files import ROOT

log = logging.getLogger(__name__)

HURRY_S = 15.0  # that the end of a run may take which failed, or whose machine is wanted back


class Dashboard(Logger):
    """A W&B run that a process of its own keeps (:mod:`callbacks.dashboard_process`).

    Logging puts a record into a bounded queue and returns; a thread hands it on to the process. A record that finds
    the queue full is left out; how many were is told at the end, which waits ``patience_s`` at most.

    Args:
        save_dir: W&B writes to ``save_dir/wandb``.
        project, name, group, job_type: of the run.
        id: of a run to go on with; a new one by default.
        offline: write files only, which is done anyway when there is no key for the server.
        config: the run's configuration.
        size: of the queue, records.
        patience_s: seconds that the end of a run may take.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        project: str = "galatea",
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        id: str | None = None,
        offline: bool | None = None,
        config: Mapping[str, Any] | None = None,
        size: int = 1000,
        patience_s: float = 60.0,
    ) -> None:
        super().__init__()
        self.project, self.id = project, id or secrets.token_hex(4)
        self.size, self.patience_s = size, patience_s
        options = {"project": project, "name": name, "group": group, "job_type": job_type}
        self._start: dict[str, Any] = {
            "source": str(ROOT),
            "offline": offline,
            "pid": os.getpid(),
            "config": _plain(config or {}),
            "dir": str(save_dir),
            "id": self.id,
            "resume": "allow",
            **options,
        }
        self._process: subprocess.Popen[bytes] | None = None

    # -- what can be logged -----------------------------------------------------------------------

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Numbers of a step."""
        self._put("log", values={name: float(value) for name, value in metrics.items()}, step=step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Add to the run's configuration."""
        self._put("configure", values=_plain(dict(params)))

    @rank_zero_only
    def log_media(self, name: str, path: Path, step: int | None = None) -> None:
        """A picture file, or a video's (.mp4)."""
        self._put("media", name=name, path=str(path), step=step)

    @rank_zero_only
    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """A table."""
        self._put("table", name=name, columns=list(columns), rows=[list(row) for row in rows], step=step)

    @rank_zero_only
    def log_csv(self, name: str, path: Path, step: int) -> None:
        """The table in a file."""
        self._put("csv", name=name, path=str(path), step=step)

    @rank_zero_only
    def log_artifact(self, path: Path, kind: str, metadata: Mapping[str, Any]) -> None:
        """A folder, by reference."""
        name = str(self._start["name"] or self.project).replace("/", "-")
        self._put("artifact", name=name, kind=kind, path=str(path.resolve()), metadata=_plain(metadata))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run, and tell what of it was lost."""
        if (process := self._process) is None:
            return
        patience = self.patience_s if status == "success" else min(self.patience_s, HURRY_S)
        self._process, deadline = None, time.monotonic() + patience

        def left() -> float:
            return max(deadline - time.monotonic(), 0.0)

        try:
            for record in (("finish", {"exit_code": int(status != "success")}), None):
                self._queue.put(record, timeout=left())
            process.wait(left())
        except (queue.Full, subprocess.TimeoutExpired):
            process.kill()
            process.wait()
            text = "W&B did not finish within %g s: 'wandb sync' sends what is in %s, the log in logs/ is whole"
            log.warning(text, patience, Path(self._start["dir"]) / "wandb")
        for thread in self._threads:
            thread.join(1.0)
        if self._lost:
            log.warning("W&B was too slow for %d records: its run lacks them, the log in logs/ is whole", self._lost)

    @property
    def name(self) -> str:
        """The project."""
        return self.project

    @property
    def version(self) -> str:
        """The run's id."""
        return self.id

    # -- the process ------------------------------------------------------------------------------

    def _put(self, method: str, **arguments: Any) -> None:
        if self._process is None:
            self._launch()
        try:
            self._queue.put_nowait((method, arguments))
        except queue.Full:
            self._lost += 1

    def _launch(self) -> None:
        self._lost, self._queue = 0, queue.Queue[Any](self.size)
        self._queue.put(("start", self._start))
        # Its output goes through us: whoever reads ours must not have to wait for W&B to close it. A session of its
        # own: Ctrl-C is for the training, which then ends the run in good order.
        command = [sys.executable, "-P", dashboard_process.__file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._process = process = subprocess.Popen(command, start_new_session=True, **pipes)  # type: ignore[call-overload]
        pairs = ((_hand_on, (self._queue, process.stdin)), (_tell, (process.stdout,)))
        self._threads = [threading.Thread(target=t, args=a, name="wandb", daemon=True) for t, a in pairs]
        for thread in self._threads:
            thread.start()


def _hand_on(records: queue.Queue[Any], pipe: IO[bytes]) -> None:
    """Write records to the process until there is ``None``, or until it has died."""
    try:
        with pipe:
            while (record := records.get()) is not None:
                pipe.write(json.dumps(record, default=str).encode() + b"\n")
                pipe.flush()
    except OSError:
        log.warning("W&B has ended unexpectedly: training goes on without it")
        while records.get() is not None:
            pass


def _tell(output: IO[bytes]) -> None:
    """Print what the process prints."""
    for line in output:
        log.info("%s", line.decode(errors="replace").rstrip())


def _plain(values: Mapping[str, Any]) -> Any:
    """JSON values: what else there is becomes its text."""
    return json.loads(json.dumps(dict(values), default=str))
