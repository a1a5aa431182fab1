"""``OUT/pipeline.json``, the steps of a run and their jobs; and what the scheduler says of a job."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from models.errors import UserError
from models.files import atomic_write, read_json, versions

PLAN = "pipeline.json"
ACTIVE = frozenset(
    {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED", "SIGNALING"}
    | {"REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING", "SPECIAL_EXIT"}
)


@dataclass
class Entry:
    """A step of the run.

    Attributes:
        after: names of the steps it takes artifacts of.
        jobs: ids of its jobs, when it was submitted: an array's tasks first, the one that exports last.
    """

    after: list[str]
    jobs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """The scheduler's word: ``state`` as in ``PENDING`` or ``FAILED``, and its ``reason``."""

    state: str
    reason: str = ""


def write_plan(out: Path, plan: dict[str, Entry]) -> None:
    """Write ``OUT/pipeline.json``, atomically."""
    with atomic_write(out / PLAN, keep=True) as file:
        file.write_text(json.dumps({name: asdict(entry) for name, entry in plan.items()}, indent=1) + "\n")


def read_plan(out: Path) -> dict[str, Entry]:
    """The steps of the run in ``out`` by name, in order.

    Raises:
        UserError: when no pipeline has run there.
    """
    content = read_json(out / PLAN)
    with suppress(TypeError):
        if content:
            return {name: Entry(**entry) for name, entry in content.items()}
    raise UserError(f"{out} is not the --out folder of a pipeline (no {PLAN} that can be read)")


def query(ids: Iterable[str]) -> dict[str, Job]:
    """What the scheduler knows of jobs; those it has forgotten, or that no scheduler answers for, are left out."""
    ids = list(ids)
    jobs: dict[str, Job] = {}
    if ids:
        # An array by its number: asked for one task, squeue does not show the others that wait with it.
        numbers = ",".join(dict.fromkeys(i.partition("_")[0] for i in ids))
        # Jobs that ended a while ago are known to the accounting only, which not every cluster has.
        for command in (
            ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={numbers}", "--format=JobID,State,Reason"],
            ["squeue", "--noheader", "--array", "--states=all", f"--jobs={numbers}", "--format=%i|%T|%r"],
        ):
            for line in _lines(command):
                number, _, rest = line.partition("|")
                state, _, reason = rest.partition("|")
                jobs[number] = Job(state.split()[0], "" if reason == "None" else reason)  # "CANCELLED by 1000"
    return {i: jobs[i] for i in ids if i in jobs}


def refuse_active(out: Path) -> None:
    """Refuse to touch a folder whose jobs are not over.

    Raises:
        UserError: naming them.
    """
    if versions(out / PLAN):
        try:
            plan = read_plan(out)
        except UserError as error:
            raise UserError(f"{out / PLAN} is damaged: remove it if no job works there, to be written anew") from error
        known = query(job for entry in plan.values() for job in entry.jobs)
        if active := [number for number, job in known.items() if job.state in ACTIVE]:
            raise UserError(
                f"jobs {', '.join(active)} still work in {out}: wait for them (galatea status {out}), "
                f"or end them (scancel {' '.join(active)})"
            )


def _lines(command: list[str]) -> list[str]:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in answer.stdout.splitlines() if line.count("|") >= 2]
