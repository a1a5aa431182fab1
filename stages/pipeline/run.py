"""``galatea run PIPELINE.yaml``: steps in order, each in its own process, finished work skipped.

A pipeline file declares ``params``, which become options of the command, and ``steps``::

    params:
      image: {type: path, help: the artwork, sets: [anchor.data.init_args.path]}
    steps:
      - {name: anchor, stage: anchor, command: fit, configs: [], overrides: {model.steps: 300}, inputs: {}}
      - {name: turn, stage: present, command: predict, inputs: {model.result.path: anchor}}

A parameter sets options of steps; ``*`` in a step's name stands for anything, ``'*_test.model.seed'``.
``preset: PARAMETER`` puts below each step what suits the generator of that artifact (``stages.pipeline.presets``).
``edits: {strengths: PARAMETER, directions: PARAMETER, generator: PARAMETER}`` checks edits before the first step runs.
``inputs`` sets an option of the step to the artifact of an earlier step. A step works in ``OUT/NAME`` (see
``stages.pipeline.steps``). It is skipped when it is done and its hash (``stages.pipeline.hashing``) is the same; a
changed step starts afresh, as do all after it; a killed one resumes. ``--launcher slurm`` submits the same steps
(``stages.pipeline.slurm``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from models.documents import parse_yaml
from models.errors import UserError, one_line, shown
from models.files import resolve
from stages.arguments import Parser
from stages.configs import read_yaml
from stages.pipeline import presets, process, slurm
from stages.pipeline.jobs import Entry, refuse_active, write_plan
from stages.pipeline.slurm import Cluster, read_cluster
from stages.pipeline.steps import Task, clear, execute, locked, read_state, resume_options
from stages.table import STAGES

COMMANDS = ("fit", "validate", "test", "predict")


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _named(text: str) -> tuple[str, float]:
    """``NAME=NUMBER``."""
    name, equals, number = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not NAME=NUMBER, as in smile=1.0")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shown(number)} is no number: write {one_line(name)[:80]}=1.0")
    return name, value


FROM = "--from"  # where it is kept: no parameter's name
NUMBERS = "numbers"  # a mapping, of which an option gives one NAME=NUMBER and may be repeated
TYPES: dict[str, Any] = {"str": str, "path": str, "int": int, "float": float, "bool": _boolean, NUMBERS: _named}
EDITS = {"strengths": NUMBERS, "directions": "path", "generator": "path"}  # what edits are checked by, and its type


@dataclass(frozen=True)
class Param:
    """An option of the pipeline's command; ``sets`` are (step, option) pairs. No default: required."""

    name: str
    type: str
    sets: list[tuple[str, str]]
    help: str = ""
    default: Any = None
    required: bool = False


@dataclass(frozen=True)
class Step:
    """One process: ``python -m stages STAGE COMMAND`` with ``configs``, ``overrides`` and ``inputs``."""

    name: str
    stage: str
    command: str
    configs: list[str] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pipeline:
    """A parsed pipeline file.

    Attributes:
        preset: the parameter that gives the artifact of the generator, or None.
        edits: by the keys of ``EDITS`` the parameters that say how heads are edited; empty where they are not.
    """

    params: list[Param]
    steps: list[Step]
    preset: str | None = None
    edits: Mapping[str, str] = field(default_factory=dict)


# -- the file --------------------------------------------------------------------------------------


def read_pipeline(path: str | os.PathLike[str]) -> Pipeline:
    """Read and check a pipeline file.

    Raises:
        UserError: one sentence naming the file, the step or parameter, and what is wrong.
    """
    file = resolve(path)
    content = read_yaml(file)
    _check_keys(content, {"params", "steps", "preset", "edits"}, {"steps"}, str(file))
    steps: list[Step] = []
    for entry in _typed(content["steps"], list, f"{file}: steps"):
        _typed(entry, dict, f"{file}: a step")
        _check_keys(
            entry,
            {"name", "stage", "command", "configs", "overrides", "inputs"},
            {"name", "stage", "command"},
            f"{file}: step {one_line(entry.get('name', '?'))[:80]}",
        )
        steps.append(_check_step(Step(**entry), steps, file))
    if not steps:
        raise UserError(f"{file} has no steps")
    names = [step.name for step in steps]
    params = [_param(str(n), p, names, file) for n, p in _typed(content.get("params") or {}, dict, "params").items()]
    preset = content.get("preset")
    if preset is not None and preset not in [param.name for param in params if param.type == "path"]:
        raise UserError(f"{file}: preset is {shown(preset)}, which is not a parameter of the type path")
    edits = _typed(content.get("edits") or {}, dict, f"{file}: edits")
    if edits:
        _check_keys(edits, set(EDITS), set(EDITS), f"{file}: edits")
    for key, name in edits.items():
        if name not in [param.name for param in params if param.type == EDITS[key]]:
            raise UserError(f"{file}: edits.{key} is {shown(name)}, which is not a parameter of the type {EDITS[key]}")
    return Pipeline(params, steps, preset, edits)


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"{where}: expected a {kind.__name__}, got {shown(value)}")
    return value


def _check_keys(entry: Mapping[str, Any], known: set[str], required: set[str], where: str) -> None:
    if unknown := sorted(map(str, entry.keys() - known)):
        raise UserError(f"{where}: unknown key {shown(unknown[0])}, known are: {', '.join(sorted(known))}")
    if missing := sorted(required - entry.keys()):
        raise UserError(f"{where}: {missing[0]} is missing")


def _check_step(step: Step, earlier: Sequence[Step], file: Path) -> Step:
    where = f"{file}: step {shown(step.name)}" if not isinstance(step.name, str) else f"{file}: step {step.name[:80]}"
    if not isinstance(step.name, str) or not re.fullmatch(r"[A-Za-z0-9][\w-]*", step.name):
        raise UserError(f"{where}: a name has letters, digits, '_' and '-' only")
    names = [s.name for s in earlier]
    if step.name in names:
        raise UserError(f"{where}: there are two steps of this name")
    if not isinstance(step.stage, str) or step.stage not in STAGES:
        raise UserError(f"{where}: unknown stage {shown(step.stage)}, there are: {', '.join(STAGES)}")
    if step.command not in COMMANDS:
        raise UserError(f"{where}: unknown command {shown(step.command)}, there are: {', '.join(COMMANDS)}")
    for config in _typed(step.configs, list, f"{where}: configs"):
        _typed(config, str, f"{where}: configs")
    for options in (step.overrides, step.inputs):
        for option in _typed(options, dict, f"{where}: overrides and inputs"):
            if not isinstance(option, str) or not re.fullmatch(r"[A-Za-z][\w.]*", option):
                raise UserError(f"{where}: {shown(option)} is not an option")
    for option, source in _typed(step.inputs, dict, f"{where}: inputs").items():
        if source not in names:
            raise UserError(
                f"{where}: input {one_line(option)[:80]} names {shown(source)}, which is not an earlier step"
            )
    return step


def _param(name: str, entry: Any, steps: Sequence[str], file: Path) -> Param:
    where = f"{file}: parameter {one_line(name)[:80]}"
    _typed(entry, dict, where)
    _check_keys(entry, {"type", "default", "help", "sets"}, {"sets"}, where)
    ours = ("out", "device", "launcher", "cluster", "dry_run", "from", "set", "wandb", "help")
    if not re.fullmatch(r"[a-z]\w*", name) or name in ours:
        raise UserError(f"{where}: this name cannot be an option")
    kind = entry.get("type", "str")
    if not isinstance(kind, str) or kind not in TYPES:
        raise UserError(f"{where}: unknown type {shown(kind)}, there are: {', '.join(TYPES)}")
    if kind == NUMBERS and entry.get("default") is not None:
        _typed(entry["default"], dict, f"{where}: default")
    sets: list[tuple[str, str]] = []
    for key in _typed(entry["sets"], list, f"{where}: sets"):
        pattern, _, option = str(key).partition(".")
        chosen = [step for step in steps if fnmatchcase(step, pattern)]
        if not chosen:
            wrong = "matches no step" if "*" in pattern else "is not a step"
            raise UserError(f"{where}: sets {shown(key)}, but {shown(pattern)} {wrong}")
        if not option:
            raise UserError(f"{where}: sets {shown(key)}: write STEP.OPTION")
        sets += [(step, option) for step in chosen]
    return Param(
        name,
        kind,
        sets,
        _typed(entry.get("help", ""), str, f"{where}: help"),
        entry.get("default"),
        "default" not in entry,
    )


# -- the command line ------------------------------------------------------------------------------


def _parser(pipeline: Pipeline | None, file: str) -> Parser:
    parser = Parser(f"galatea run {file}")
    for param in pipeline.params if pipeline else ():
        text = param.help if param.required or param.default is None else f"{param.help} (default: {param.default})"
        numbers = param.type == NUMBERS
        parser.add_argument(
            f"--{param.name}",
            type=TYPES[param.type],
            action="append" if numbers else "store",
            default=list(param.default.items()) if numbers and param.default else param.default,
            required=param.required,
            metavar="NAME=NUMBER" if numbers else param.type.upper(),
            help=text.replace("%", "%%"),
        )
    parser.add_argument("--out", default=None, metavar="DIR", help="output folder (default: runs/PIPELINE)")
    parser.add_argument("--device", choices=("gpu", "cpu"), help="where all steps run (default: a GPU if there is one)")
    parser.add_argument("--launcher", default="local", choices=("local", "slurm"), help="run here, or submit to SLURM")
    parser.add_argument("--cluster", metavar="FILE", help="with --launcher slurm: what a step asks for")
    parser.add_argument("--dry_run", action="store_true", help="print what would run, and run nothing")
    parser.add_argument("--from", dest=FROM, metavar="STEP", help="run this step and all after it again")
    parser.add_argument(
        "--wandb", nargs="?", const=True, metavar="PROJECT", help="log every step to Weights & Biases, as one group"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="STEP.KEY=VALUE", help="set any option of a step; may be repeated"
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    """``galatea run``.

    Raises:
        UserError: for a wrong pipeline or option, or when a step fails.
    """
    if not arguments or arguments[0].startswith("-"):
        _parser(None, "PIPELINE.yaml").print_help()
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running step is ended as well
    pipeline = read_pipeline(arguments[0])
    options = _parser(pipeline, arguments[0]).parse_args(list(arguments[1:]))
    if (options.launcher == "slurm") != (options.cluster is not None):
        raise UserError("--launcher slurm and --cluster FILE go together, as in --cluster configs/cluster/example.yaml")
    names = [step.name for step in pipeline.steps]
    if (start := getattr(options, FROM)) is not None and start not in names:
        raise UserError(f"--from {start}: there is no such step, there are: {', '.join(names)}")
    common = {"wandb": options.wandb, "trainer.accelerator": None if options.cluster else options.device}
    common = {key: value for key, value in common.items() if value is not None}
    settings: dict[str, dict[str, Any]] = {name: dict(common) for name in names}
    given: dict[str, Any] = {param.name: getattr(options, param.name) for param in pipeline.params}
    for param in (param for param in pipeline.params if param.type == NUMBERS):
        pairs = given[param.name] or ()
        chosen = [name for name, _ in pairs[len(param.default or ()) :]]
        if twice := [name for name in chosen if chosen.count(name) > 1]:
            raise UserError(f"--{param.name} is given twice for {shown(twice[0])}: once, with the sum")
        given[param.name] = dict(pairs) or None
    for param in pipeline.params:
        value = given[param.name]
        if param.type == "path" and value is not None and not resolve(value).exists():
            raise UserError(f"--{param.name} {value}: there is no such file or folder")
        for step, key in param.sets if value is not None else ():
            settings[step][key] = value
    if pipeline.edits:
        _check_edits(pipeline, given, settings)
    for text in options.set:
        match = re.fullmatch(r"([\w-]+)\.([^=]+)=(.*)", text, re.DOTALL)
        if match is None or match[1] not in settings:
            raise UserError(f"--set {text}: write STEP.KEY=VALUE with one of the steps {', '.join(names)}")
        parse_yaml(match[3], f"--set {match[1]}.{match[2]}")  # a mistake shows before anything runs
        settings[match[1]][match[2]] = match[3]  # as it was written: the step knows whether 00012 is a number or a name
    if pipeline.preset is not None and (model := getattr(options, pipeline.preset)) is not None:
        pipeline = replace(pipeline, steps=_suited(pipeline.steps, settings, model))
    out = Path(options.out or f"runs/{Path(arguments[0]).stem}")
    cluster = read_cluster(options.cluster, options.device) if options.cluster else None
    run(pipeline, settings, out, start=start, dry_run=options.dry_run, cluster=cluster)


def _check_edits(pipeline: Pipeline, given: Mapping[str, Any], settings: Mapping[str, dict[str, Any]]) -> None:
    """Refuse edits that cannot be made; directions that nothing is edited along are left out of the settings.

    Raises:
        UserError: saying why, before anything is computed.
    """
    strengths, directions, generator = (given[pipeline.edits[key]] for key in EDITS)
    names = {key: f"--{name}" for key, name in pipeline.edits.items()}
    (param,) = (param for param in pipeline.params if param.name == pipeline.edits["directions"])
    if not strengths:
        if directions != param.default:
            raise UserError(f"{names['directions']} is what heads are edited along: give {names['strengths']} NAME=1.0")
        for step, key in param.sets:
            settings[step].pop(key, None)
        return
    if directions is None:
        raise UserError(
            f"{names['strengths']} needs {names['directions']}, an artifact of the stage directions that has "
            f"{', '.join(strengths)}: galatea directions fit finds them"
        )
    # Here: heavy, and for edits alone.
    from models.artifact import load
    from models.heads.directions import directions_for
    from models.heads.subjects import Subjects

    directions_for(load(directions), Subjects(load(generator))).check(strengths)


def _suited(steps: Sequence[Step], settings: Mapping[str, Mapping[str, Any]], model: str) -> list[Step]:
    """The steps with what suits the generator of the artifact ``model`` below their own configurations."""
    kind = presets.kind(model)
    if kind is None:
        return list(steps)
    print(f"{model}: a generator of the kind {kind}, with the settings of {presets.PRESETS}", flush=True)
    found, missing = [], {}
    for step in steps:
        configs = presets.configs(kind, step.stage)
        for option, stand_in, error in presets.stand_ins(step.stage, configs, {*step.overrides, *settings[step.name]}):
            configs.append(stand_in)
            missing.setdefault(error.network, (error, []))[1].append(f"{step.name}.{option}")
        found.append(replace(step, configs=[*configs, *step.configs]))
    for error, options in missing.values():
        names = " and ".join(f"--set {option}.init_args.weights=FILE" for option in options)
        print(
            f"warning: {error.network} has no weights on this machine: an embedded network stands in for it, which "
            f"only knows the embedded world; get {error.file} from {error.source}, or give it as {names} "
            "(docs/real_weights.md)",
            flush=True,
        )
    return found


# -- running ---------------------------------------------------------------------------------------


def run(
    pipeline: Pipeline,
    settings: Mapping[str, Mapping[str, Any]],
    out: Path,
    *,
    start: str | None = None,
    dry_run: bool = False,
    cluster: Cluster | None = None,
) -> None:
    """Bring every step of ``pipeline`` up to date in ``out``.

    Args:
        settings: by step, options that win over the step's ``overrides``.
        start: this step and all after it run again even when they are up to date.
        dry_run: only print what would be done.
        cluster: submit the steps to it, and return at once.

    Raises:
        UserError: when a step fails, or another run is working in ``out``.
    """
    tasks = _tasks(pipeline, settings, out, start)
    with nullcontext(-1) if dry_run else locked(out) as lock:
        if not dry_run:
            refuse_active(out)
            write_plan(out, {step.name: Entry(list(dict.fromkeys(step.inputs.values()))) for step in pipeline.steps})
        if cluster is not None:
            slurm.submit(list(tasks), cluster, out, dry_run=dry_run)
            return
        for number, task in enumerate(tasks, 1):
            title = f"[{number}/{len(pipeline.steps)}] {task.name}"
            resuming = task.state == "unfinished"
            if task.state == "done":
                print(f"{title}: up to date", flush=True)
            elif dry_run:
                command = [*task.command, *(resume_options(task.folder, task.command) if resuming else [])]
                print(f"{title}: {'would resume' if resuming else 'would run'}: {shlex.join(command)}")
            else:
                print(f"{title}: {'resuming' if resuming else 'running'}", flush=True)
                if not resuming:
                    clear(task.folder)
                if not execute(task.name, task.folder, task.command, lock, task.digest):
                    raise UserError(
                        f"step {task.name} was stopped and has saved its work; the same command continues it"
                    )
    if not dry_run:
        print(f"result: {out / pipeline.steps[-1].name}", flush=True)


def _tasks(
    pipeline: Pipeline, settings: Mapping[str, Mapping[str, Any]], out: Path, start: str | None
) -> Iterator[Task]:
    """The steps in order; each one's state is looked up in its turn, after those before it have run."""
    fresh = False
    for step in pipeline.steps:
        folder = out / step.name
        inputs = {option: str(out / source / "artifact") for option, source in step.inputs.items()}
        command = [*process.PROGRAM, step.stage, step.command]
        command += [f"--config={resolve(config)}" for config in step.configs]
        options = {**step.overrides, **settings.get(step.name, {}), **inputs}
        command += [f"--{key}={_text(value)}" for key, value in options.items()]
        command += [f"--out={folder}"]
        # Before the first step that runs, inputs are as they will be; after it they need not even exist.
        state, digest = ("changed", None) if fresh or step.name == start else read_state(folder, command)
        fresh = fresh or state != "done"
        yield Task(step.name, step.stage, folder, command, state, list(dict.fromkeys(step.inputs.values())), digest)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
