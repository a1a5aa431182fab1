"""``galatea run --launcher slurm``: one batch job a step, each waiting for the steps it takes artifacts of.

What the local launcher does around a step (see ``stages.pipeline.steps``) the job does through ``galatea step``,
which its script calls; so states, hashes, logs and results are the same. A job that is asked to leave (``SIGUSR1``:
before its time is up, or when another takes its place) has its step save itself and goes back into the queue.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from models.errors import UserError, one_line, shown
from models.files import ROOT, atomic_write, resolve
from stages.arguments import Parser
from stages.configs import read_yaml
from stages.pipeline.jobs import Entry, read_plan, write_plan
from stages.pipeline.steps import Task, clear, command_hash, execute, locked, read_state, write_status
from stages.table import STAGES

_TIME = re.compile(r"\d+-\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2}")  # days-hours:minutes:seconds, as sbatch takes it
_OURS = frozenset(
    "job-name chdir output open-mode nodes ntasks-per-node ntasks gpus-per-node cpus-per-task mem time partition "
    "account qos array requeue signal dependency kill-on-invalid-dep".split()
)


@dataclass(frozen=True)
class Resources:
    """What a step asks for; a null leaves it to the cluster.

    Attributes:
        nodes: machines.
        tasks_per_node: processes on each; with GPUs one for each GPU, which is the default.
        gpus_per_node: 0 runs on CPUs.
        cpus_per_task: cores of a process.
        memory: of a node, as in "32G".
        time: limit, as in "12:00:00" or "2-00:00:00"; with quotes, YAML takes some for numbers.
        partition, account, qos: where the cluster wants them named.
        array: of the per-item stages: deal the items to this many jobs, which run whenever there is room.
        array_limit: at most so many of them at once; 0 for all.
        grace_s: seconds before the limit at which the step is asked to save itself.
        requeues: how often a step may go back into the queue before it counts as failed.
        extra: further ``#SBATCH`` options, as in "--constraint=a100".
        setup: shell lines before the step, as in "module load cuda".
    """

    nodes: int = 1
    tasks_per_node: int | None = None
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    memory: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    array: int = 0
    array_limit: int = 0
    grace_s: int = 120
    requeues: int = 100
    extra: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    def problem(self) -> str | None:
        """What cannot be, in words."""
        hints = get_type_hints(Resources)
        for each in fields(self):
            value, kind = getattr(self, each.name), hints[each.name]
            if get_origin(kind) is list:
                if not (isinstance(value, list) and all(isinstance(line, str) for line in value)):
                    return f"{each.name} is {shown(value)}, it must be a list of texts"
            elif not isinstance(value, kind) or isinstance(value, bool):
                kinds = " or ".join("null" if k is type(None) else k.__name__ for k in get_args(kind) or (kind,))
                quotes = ": put it in quotes" if str in (get_args(kind) or (kind,)) else ""
                return f"{each.name} is {shown(value)}, it must be {kinds}{quotes}"
        least = {"nodes": 1, "tasks_per_node": 1, "cpus_per_task": 1, "grace_s": 1}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, int) and value < least.get(each.name, 0):
                return f"{each.name} is {value}, it must be at least {least.get(each.name, 0)}"
        if self.time is not None and not _TIME.fullmatch(self.time):
            return f'time is {self.time!r}, write it as in "12:00:00" or "2-00:00:00"'
        if self.time is not None and (limit := _seconds(self.time)) <= self.grace_s:
            return f"grace_s is {self.grace_s}, and the time of {limit} s ends before"
        if self.gpus_per_node and self.tasks != self.gpus_per_node:
            return f"tasks_per_node is {self.tasks} and gpus_per_node {self.gpus_per_node}: a process has one GPU"
        if self.array and self.nodes * self.tasks > 1:
            return f"array is {self.array} and a step has {self.nodes * self.tasks} processes: deal items out one way"
        if self.array_limit and not self.array:
            return f"array_limit is {self.array_limit} without an array"
        texts = {each.name: getattr(self, each.name) for each in fields(self)}
        for name, given in texts.items():
            for text in given if isinstance(given, list) else [given]:
                if isinstance(text, str) and not text.isprintable():
                    return f"{name} is {shown(text)}: line breaks and control characters would be lines of the script"
        for line in self.extra:
            name = re.match(r"--([a-z-]+)(=|$)", line)
            if name is None:
                return f"extra {line!r} is not an option of sbatch, as in --constraint=a100"
            if name[1] in _OURS:
                return f"extra has --{name[1]}, which galatea sets itself"
        return None


@dataclass(frozen=True)
class Cluster:
    """A cluster file: resources for all steps, and under ``steps`` what differs, by a step's or a stage's name.

    Attributes:
        device: where all steps run, whatever the file says: "cpu", or "gpu", one a machine for steps that have none.
    """

    file: Path
    common: dict[str, Any]
    steps: dict[str, dict[str, Any]]
    device: str | None = None

    def resources(self, step: str, stage: str) -> Resources:
        """Of one step; its own name counts more than its stage's.

        Raises:
            UserError: when they contradict themselves.
        """
        known = {each.name for each in fields(Resources)}
        given = {**self.common, **self.steps.get(stage, {}), **self.steps.get(step, {})}
        if unknown := sorted(given.keys() - known):
            raise UserError(
                f"{self.file}: unknown key {shown(unknown[0])}, known are: steps, {', '.join(sorted(known))}"
            )
        if self.device == "cpu":
            given["gpus_per_node"] = 0
        elif self.device == "gpu" and not given.get("gpus_per_node"):
            given |= {"gpus_per_node": 1, "tasks_per_node": None}
        resources = Resources(**given)
        if problem := resources.problem():
            raise UserError(f"{self.file}: step {step}: {problem}")
        return resources


def read_cluster(path: str | os.PathLike[str], device: str | None = None) -> Cluster:
    """Read a cluster file, for steps that all run on ``device``, when it is given.

    Raises:
        UserError: when it is none.
    """
    file = resolve(path)
    common = read_yaml(file)
    steps = common.pop("steps", None) or {}
    if not isinstance(steps, dict) or not all(isinstance(given, dict) for given in steps.values()):
        raise UserError(f"{file}: steps must hold a mapping of options under each step's name")
    return Cluster(file, {str(k): v for k, v in common.items()}, {str(k): v for k, v in steps.items()}, device)


def _seconds(time: str) -> int:
    """Of a time limit in any of sbatch's forms; a bare number is minutes."""
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = (0, *parts, 0)[:3] if len(parts) < 3 else parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


# -- scripts -------------------------------------------------------------------------------------------


def script(task: Task, resources: Resources, out: Path, array: bool = False) -> str:
    """The batch script of a step; with ``array``, of the jobs that share its items and export nothing."""
    place, r = Path.cwd(), resources
    if not str(place / out).isprintable():
        raise UserError(f"{shown(str(place / out))} cannot be the folder of batch jobs: it has control characters")
    log = place / out / "slurm" / f"{task.name}-{'%A_%a' if array else '%j'}.out"
    limit = f"%{r.array_limit}" if r.array_limit else ""
    options = {
        "job-name": f"{out.name}.{task.name}",
        "chdir": place,
        "output": log,
        "open-mode": "append",  # each requeue adds to it
        "nodes": r.nodes,
        "ntasks-per-node": r.tasks,
        "gpus-per-node": r.gpus_per_node or None,
        "cpus-per-task": r.cpus_per_task,
        "mem": r.memory,
        "time": r.time,
        "partition": r.partition,
        "account": r.account,
        "qos": r.qos,
        "array": f"0-{r.array - 1}{limit}" if array else None,
        "signal": f"B:USR1@{r.grace_s}",
    }
    header = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    command = [
        *task.command,
        f"--trainer.accelerator={'gpu' if r.gpus_per_node else 'cpu'}",
        f"--trainer.devices={r.tasks}",
        f"--trainer.num_nodes={r.nodes}",
    ]
    program = [*command[: command.index(task.stage) + 2]]
    # Ranks save and leave at their own pace: the first to go must not take the others with it.
    launch = ["srun", "--kill-on-bad-exit=0", f"--wait={r.grace_s}", f"--cpus-per-task={r.cpus_per_task}"]
    books = [sys.executable, "-m", "stages", "step", str(task.folder), f"--requeues={r.requeues}"]
    lines = [shlex.join(books) + (f' --shard="$SLURM_ARRAY_TASK_ID/{r.array}"' if array else "") + " --"]
    lines += [shlex.join(launch), shlex.join(program), *(shlex.quote(o) for o in command[len(program) :])]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {'Artworks' if array else 'Step'} of {task.name}, as galatea run --launcher slurm submitted it.",
            *(f"#SBATCH {option}" for option in [*header, "--requeue", *r.extra]),
            "set -e",
            *r.setup,
            f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
            f"export OMP_NUM_THREADS={r.cpus_per_task}",
            "# galatea step keeps the books; it is the process that SLURM signals, and passes that on to srun.",
            "exec " + " \\\n    ".join(lines),
            "",
        ]
    )


# -- submission ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """What one call of sbatch submits: its name, the step it is of, its script, the batches it waits for."""

    name: str
    step: str
    text: str
    after: list[str]
    array: int = 0


def batches(tasks: Sequence[Task], cluster: Cluster, out: Path) -> list[Batch]:
    """Of all steps that are not done, in order.

    Raises:
        UserError: when the resources of a step contradict themselves.
    """
    if unknown := sorted(cluster.steps.keys() - {task.name for task in tasks} - STAGES.keys()):
        raise UserError(f"{cluster.file}: steps has {unknown[0]!r}, which is neither a step nor a stage")
    found: list[Batch] = []
    for task in (task for task in tasks if task.state != "done"):
        resources, after = cluster.resources(task.name, task.stage), task.after
        if resources.array:
            _check_array(task, cluster)
            name = f"{task.name}.array"
            found.append(Batch(name, task.name, script(task, resources, out, array=True), after, resources.array))
            after = [name]
        found.append(Batch(task.name, task.name, script(task, resources, out), after))
    return found


def _check_array(task: Task, cluster: Cluster) -> None:
    module, _, name = STAGES[task.stage][0].partition(":")
    if "fit" not in task.command or not getattr(import_module(module), name).shardable:  # heavy: only arrays need it
        raise UserError(f"{cluster.file}: step {task.name}: array is for fits item by item, not for {task.stage}")


def submit(tasks: Sequence[Task], cluster: Cluster, out: Path, *, dry_run: bool = False) -> None:
    """Write ``OUT/slurm/NAME.sbatch`` of each batch and submit them: all, or none.

    Raises:
        UserError: when a batch cannot be, or the scheduler refuses it.
    """
    found = batches(tasks, cluster, out)
    files = {batch.name: out / "slurm" / f"{batch.name}.sbatch" for batch in found}
    for task in tasks:
        if task.state == "done":
            print(f"{task.name}: up to date", flush=True)
        elif task.state != "unfinished" and not dry_run:
            clear(task.folder)
    if dry_run:
        for batch in found:
            line = _sbatch(files[batch.name], [f"<{name}>" for name in batch.after if name in files])
            print(f"\n# {shlex.join(line)}\n{batch.text}", end="")
        return
    for batch in found:
        with atomic_write(files[batch.name]) as file:
            file.write_text(batch.text)
    plan, numbers = read_plan(out), dict[str, str]()
    try:
        for batch in found:
            after = {name: numbers[name] for name in batch.after if name in numbers}
            number = numbers[batch.name] = _call(_sbatch(files[batch.name], list(after.values()))).partition(";")[0]
            plan[batch.step].jobs += [f"{number}_{i}" for i in range(batch.array)] if batch.array else [number]
            write_plan(out, plan)  # at once: whatever happens next, its number is known
            waits = f", after {', '.join(after)}" if after else ""
            print(f"{batch.name}: job {number}{waits}", flush=True)
    except BaseException:
        if numbers:
            subprocess.run(["scancel", *numbers.values()])
            write_plan(out, {name: Entry(entry.after) for name, entry in plan.items()})
        raise
    if found:
        print(f"submitted; galatea status {out} tells how it goes", flush=True)


def _sbatch(file: Path, after: Sequence[str]) -> list[str]:
    """The command that submits a script, which runs when the jobs ``after`` have succeeded and never when one fails."""
    waits = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *waits, str(file)]


def _call(command: Sequence[str]) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no {command[0]} here: submit from a machine of the cluster") from error
    if answer.returncode != 0:
        raise UserError(f"{shlex.join(command)} failed: {one_line(answer.stderr) or answer.returncode}")
    return answer.stdout.strip()


# -- in the job ----------------------------------------------------------------------------------------


def step(arguments: Sequence[str]) -> None:
    """``galatea step FOLDER -- COMMAND``: run a submitted step, or continue it, keeping its books.

    Raises:
        UserError: when it fails, or is not the step that was begun in ``FOLDER``.
    """
    parser = Parser("galatea step", "Run one step of a pipeline, as the scripts of --launcher slurm do.")
    parser.add_argument("folder", type=Path, help="OUT/STEP")
    parser.add_argument("--shard", metavar="I/N", help="share of the items; the books are in FOLDER/shards/I")
    parser.add_argument("--requeues", type=int, default=100, help="times the job may go back into the queue")
    parser.add_argument("command", nargs="+", help="what runs the step, after --")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running step is ended as well
    folder, command, name = options.folder, options.command, options.folder.name
    with locked(folder.parent, shared=True) as lock:
        state, digest = read_state(folder, command)
        if state == "changed":
            raise UserError(f"step {name} has other settings or inputs than when it was begun: submit it again")
        if options.shard is not None:
            if state == "new":  # so that a later submission continues what the shards have begun
                digest = command_hash(command)
                write_status(folder, {"state": "running", "hash": digest})
            folder = folder / "shards" / options.shard.partition("/")[0]
            command = [*command, f"--shard={options.shard}"]
            state, _ = read_state(folder, command, digest)
        if state == "done":
            print(f"{name}: up to date", flush=True)
        elif not execute(name, folder, command, lock, digest):
            _requeue(options.requeues)


def _requeue(limit: int) -> None:
    """Put the job back into the queue, to go on where the step stopped; the scheduler ends this process."""
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) >= limit:
        raise UserError(f"the step was stopped and saved, {limit} times now: it needs more time or a longer grace_s")
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    number = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}" if task else os.environ["SLURM_JOB_ID"]
    _call(["scontrol", "requeue", number])
    print(f"job {number} goes back into the queue", flush=True)
