"""``galatea status DIR``: what each step of a pipeline is doing, here or on a cluster."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from models.errors import UserError, one_line, printable
from models.files import read_json
from stages.arguments import Parser
from stages.pipeline.jobs import ACTIVE, Entry, Job, query, read_plan

PROGRESS = re.compile(r"^(?:fit|validate|test|predict) \d+(?:/\d+, .+? left)?", re.MULTILINE)  # callbacks.progress
_ERROR = re.compile(r"^(?:galatea: error: (.+)|((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*))$", re.MULTILINE)
_TAIL = 1 << 16  # bytes of a log that are looked at
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING")
_ENDS = {
    "TIMEOUT": "out of time: raise time in the cluster file",
    "DEADLINE": "out of time: its deadline has passed",
    "OUT_OF_MEMORY": "out of memory: raise memory in the cluster file",
    "NODE_FAIL": "its machine failed",
    "BOOT_FAIL": "its machine did not start",
    "PREEMPTED": "another job took its place",
}


@dataclass(frozen=True)
class Row:
    """A line of the table; ``state`` is pending, running, requeued, stopped, failed, cancelled, lost or done."""

    name: str
    state: str
    detail: str = ""


def rows(out: Path) -> list[Row]:
    """One for each step of the pipeline in ``out``, in order.

    Raises:
        UserError: when no pipeline has run there.
    """
    plan = read_plan(out)
    known = query(job for entry in plan.values() for job in entry.jobs)
    found: dict[str, Row] = {}
    for name, entry in plan.items():
        dead = [step for step in entry.after if found[step].state in ("failed", "cancelled", "lost")]
        describe = _submitted if entry.jobs else _local
        found[name] = Row(name, *describe(out, name, entry, dead, known))
    return list(found.values())


def _local(out: Path, name: str, entry: Entry, dead: Sequence[str], known: dict[str, Job]) -> tuple[str, str]:
    folder = out / name
    status = _read(folder)
    match status.get("state"):
        case "done":
            return "done", _done(status)
        case "failed":
            return "failed", _reason(folder / "log.txt") or f"exit code {status.get('exit_code')}"
        case "running" if _busy(out):
            return "running", _progress(folder)
        case "running" | "stopped":
            return "stopped", "the same command continues it"
    return "pending", f"after {', '.join(dead or entry.after)}" + (", which has failed" if dead else "")


def _submitted(out: Path, name: str, entry: Entry, dead: Sequence[str], known: dict[str, Job]) -> tuple[str, str]:
    folder = out / name
    status, jobs = _read(folder), {number: known.get(number) for number in entry.jobs}
    shards = [(number, folder / "shards" / number.partition("_")[2]) for number in entry.jobs[:-1]]
    parts = [*shards, (entry.jobs[-1], folder)]
    states = {job.state for job in jobs.values() if job is not None}
    if status.get("state") == "done" and not states & ACTIVE:
        return "done", _done(status)
    for number, place in parts:
        job = jobs[number]
        failed = job is not None and (job.state == "FAILED" or job.state in _ENDS)
        if failed or (job is None and _read(place).get("state") == "failed"):
            end = _ENDS.get(job.state) if job else None
            slurm = out / "slurm" / f"{name}-{number}.out"
            reason = end or _reason(place / "log.txt") or _reason(slurm, last=True) or "no reason in its log"
            return "failed", f"{reason} (job {number}, {place / 'log.txt'})"
    shared = f"{sum(_read(place).get('state') == 'done' for _, place in shards)} of {len(shards)} shares done"
    for number, place in parts:
        if (job := jobs[number]) is not None and job.state in ACTIVE and job.state not in _WAITING:
            progress = (*([shared] if shards else []), _progress(place), f"job {number}")
            return "running", ", ".join(filter(None, progress))
    for number, place in parts:
        if (job := jobs[number]) is None or job.state not in _WAITING:
            continue
        if job.reason == "DependencyNeverSatisfied":
            return "cancelled", f"{', '.join(dead or entry.after)} failed"
        if starts := _read(place).get("starts", 0):
            return "requeued", ", ".join(filter(None, (f"started {starts} times", _progress(place), f"job {number}")))
        waits = [step for step in entry.after if job.reason == "Dependency"]
        return (
            "pending",
            f"after {', '.join(waits)}, job {number}" if waits else f"{job.reason or 'queued'}, job {number}",
        )
    if dead:
        return "cancelled", f"{', '.join(dead)} failed"
    if "CANCELLED" in states:
        return "cancelled", "by scancel; the same command continues it"
    return "lost", f"job {entry.jobs[-1]} is over, without a result; the same command continues it"


def _read(folder: Path) -> dict[str, Any]:
    return read_json(folder / "status.json") or {}


def _done(status: dict[str, Any]) -> str:
    starts = f", started {status['starts']} times" if status.get("starts", 1) > 1 else ""
    return f"{timedelta(seconds=round(status.get('seconds', 0)))}{starts}"


def _busy(out: Path) -> bool:
    """Whether a process works in ``out``: it holds the lock."""
    try:
        with open(out / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _tail(log: Path) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _progress(folder: Path) -> str:
    found = PROGRESS.findall(_tail(folder / "log.txt"))
    return found[-1] if found else "starting"


def _reason(log: Path, last: bool = False) -> str:
    """Why a step failed: the last error its log tells; with ``last``, or else its last line."""
    text = _tail(log)
    if found := _ERROR.findall(text):
        return one_line("".join(found[-1]))
    lines = [line for line in text.splitlines() if line.strip()] if last else []
    return one_line(lines[-1]) if lines else ""


def main(arguments: Sequence[str]) -> None:
    """``galatea status``.

    Raises:
        UserError: when the folder holds no pipeline's run.
    """
    parser = Parser("galatea status", "What each step of a pipeline is doing, here or on a cluster.")
    parser.add_argument("out", metavar="DIR", type=Path, help="--out folder of galatea run")
    out = parser.parse_args(arguments).out
    if not out.is_dir():
        raise UserError(f"{out} is not a folder")
    table = rows(out)
    wide = max(len(row.name) for row in table)
    for row in table:
        print(printable(f"{row.name:<{wide}}  {row.state:<9}  {row.detail}".rstrip()))
