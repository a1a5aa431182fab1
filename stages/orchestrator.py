"""``galatea run PIPELINE.yaml``: steps in order, each in its own process, finished work skipped.

A pipeline file declares ``params``, which become options of the command, and ``steps``::

    params:
      image: {type: path, help: the artwork, sets: [anchor.data.init_args.path]}
    steps:
      - {name: anchor, stage: anchor, command: fit, configs: [], overrides: {model.steps: 300}, inputs: {}}
      - {name: turn, stage: present, command: predict, inputs: {model.result.path: anchor}}

``inputs`` sets an option of the step to the artifact of an earlier step. A step works in ``OUT/NAME``, where
``status.json`` tells its state and ``log.txt`` holds what it printed. A step is skipped when it is done and
its hash (``stages.hashing``) is the same; a changed step starts afresh, as do all after it; a killed one resumes.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from models.artifact import MANIFEST, manifest_id, read_manifest
from models.errors import UserError, one_line
from models.files import ROOT, atomic_write, os_errors, resolve, sweep
from stages.arguments import Parser
from stages.hashing import step_hash
from stages.table import STAGES

COMMANDS = ("fit", "validate", "test", "predict")
PROGRAM = (sys.executable, "-m", "stages")


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


TYPES: dict[str, Any] = {"str": str, "path": str, "int": int, "float": float, "bool": _boolean}


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
    """A parsed pipeline file."""

    params: list[Param]
    steps: list[Step]


# -- the file --------------------------------------------------------------------------------------


def read_pipeline(path: str | os.PathLike[str]) -> Pipeline:
    """Read and check a pipeline file.

    Raises:
        UserError: one sentence naming the file, the step or parameter, and what is wrong.
    """
    file = resolve(path)
    content = _read_yaml(file)
    _check_keys(content, {"params", "steps"}, {"steps"}, str(file))
    steps: list[Step] = []
    for entry in _typed(content["steps"], list, f"{file}: steps"):
        _typed(entry, dict, f"{file}: a step")
        _check_keys(
            entry,
            {"name", "stage", "command", "configs", "overrides", "inputs"},
            {"name", "stage", "command"},
            f"{file}: step {entry.get('name', '?')}",
        )
        steps.append(_check_step(Step(**entry), steps, file))
    if not steps:
        raise UserError(f"{file} has no steps")
    names = [step.name for step in steps]
    params = [_param(str(n), p, names, file) for n, p in _typed(content.get("params") or {}, dict, "params").items()]
    return Pipeline(params, steps)


def _read_yaml(file: Path) -> dict[str, Any]:
    with os_errors(file, "read"):
        try:
            content = yaml.safe_load(file.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is not valid YAML: {one_line(error)}") from error
    return _typed(content if content is not None else {}, dict, str(file))


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"{where}: expected a {kind.__name__}, got {value!r}")
    return value


def _check_keys(entry: Mapping[str, Any], known: set[str], required: set[str], where: str) -> None:
    if unknown := sorted(map(str, entry.keys() - known)):
        raise UserError(f"{where}: unknown key {unknown[0]!r}, known are: {', '.join(sorted(known))}")
    if missing := sorted(required - entry.keys()):
        raise UserError(f"{where}: {missing[0]} is missing")


def _check_step(step: Step, earlier: Sequence[Step], file: Path) -> Step:
    where = f"{file}: step {step.name}"
    if not isinstance(step.name, str) or not re.fullmatch(r"[A-Za-z0-9][\w-]*", step.name):
        raise UserError(f"{where}: a name has letters, digits, '_' and '-' only")
    names = [s.name for s in earlier]
    if step.name in names:
        raise UserError(f"{where}: there are two steps of this name")
    if step.stage not in STAGES:
        raise UserError(f"{where}: unknown stage {step.stage!r}, there are: {', '.join(STAGES)}")
    if step.command not in COMMANDS:
        raise UserError(f"{where}: unknown command {step.command!r}, there are: {', '.join(COMMANDS)}")
    _typed(step.configs, list, f"{where}: configs")
    _typed(step.overrides, dict, f"{where}: overrides")
    for option, source in _typed(step.inputs, dict, f"{where}: inputs").items():
        if source not in names:
            raise UserError(f"{where}: input {option} names {source!r}, which is not an earlier step")
    return step


def _param(name: str, entry: Any, steps: Sequence[str], file: Path) -> Param:
    where = f"{file}: parameter {name}"
    _typed(entry, dict, where)
    _check_keys(entry, {"type", "default", "help", "sets"}, {"sets"}, where)
    if not re.fullmatch(r"[a-z]\w*", name) or name in ("out", "launcher", "dry_run", "from", "set", "help"):
        raise UserError(f"{where}: this name cannot be an option")
    kind = entry.get("type", "str")
    if kind not in TYPES:
        raise UserError(f"{where}: unknown type {kind!r}, there are: {', '.join(TYPES)}")
    sets: list[tuple[str, str]] = []
    for key in _typed(entry["sets"], list, f"{where}: sets"):
        step, _, option = str(key).partition(".")
        if step not in steps or not option:
            raise UserError(f"{where}: sets {step}.{option}, but {step!r} is not a step")
        sets.append((step, option))
    return Param(name, kind, sets, entry.get("help", ""), entry.get("default"), "default" not in entry)


# -- the command line ------------------------------------------------------------------------------


def _parser(pipeline: Pipeline | None, file: str) -> Parser:
    parser = Parser(f"galatea run {file}")
    for param in pipeline.params if pipeline else ():
        text = param.help if param.required or param.default is None else f"{param.help} (default: {param.default})"
        parser.add_argument(
            f"--{param.name}",
            type=TYPES[param.type],
            default=param.default,
            required=param.required,
            metavar=param.type.upper(),
            help=text.replace("%", "%%"),
        )
    parser.add_argument("--out", default=None, metavar="DIR", help="output folder (default: runs/PIPELINE)")
    parser.add_argument("--launcher", default="local", help="local")
    parser.add_argument("--dry_run", action="store_true", help="print what would run, and run nothing")
    parser.add_argument("--from", dest="start", metavar="STEP", help="run this step and all after it again")
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
    if options.launcher != "local":
        raise UserError(f"launcher {options.launcher!r} is not part of this version, use --launcher local")
    names = [step.name for step in pipeline.steps]
    if options.start is not None and options.start not in names:
        raise UserError(f"--from {options.start}: there is no such step, there are: {', '.join(names)}")
    settings: dict[str, dict[str, Any]] = {name: {} for name in names}
    for param in pipeline.params:
        value = getattr(options, param.name)
        if param.type == "path" and value is not None and not resolve(value).exists():
            raise UserError(f"--{param.name} {value}: there is no such file or folder")
        for step, key in param.sets if value is not None else ():
            settings[step][key] = value
    for text in options.set:
        match = re.fullmatch(r"([\w-]+)\.([^=]+)=(.*)", text, re.DOTALL)
        if match is None or match[1] not in settings:
            raise UserError(f"--set {text}: write STEP.KEY=VALUE with one of the steps {', '.join(names)}")
        settings[match[1]][match[2]] = yaml.safe_load(match[3])
    out = Path(options.out or f"runs/{Path(arguments[0]).stem}")
    run(pipeline, settings, out, start=options.start, dry_run=options.dry_run)


# -- running ---------------------------------------------------------------------------------------


def run(
    pipeline: Pipeline,
    settings: Mapping[str, Mapping[str, Any]],
    out: Path,
    *,
    start: str | None = None,
    dry_run: bool = False,
) -> None:
    """Bring every step of ``pipeline`` up to date in ``out``.

    Args:
        settings: by step, options that win over the step's ``overrides``.
        start: this step and all after it run again even when they are up to date.
        dry_run: only print what would be done.

    Raises:
        UserError: when a step fails, or another run is working in ``out``.
    """
    fresh = False
    with _lock(out, dry_run) as lock:
        for number, step in enumerate(pipeline.steps, 1):
            folder = out / step.name
            overrides = {**step.overrides, **settings.get(step.name, {})}
            inputs = {option: str(out / source / "artifact") for option, source in step.inputs.items()}
            # Before the first step that runs, inputs are as they will be; after it they need not even exist.
            digest = "" if dry_run and fresh else _hash(step, overrides, inputs)
            state = "changed" if fresh or step.name == start else _state(folder, digest)
            fresh = fresh or state in ("changed", "new")
            title = f"[{number}/{len(pipeline.steps)}] {step.name}"
            if state == "done":
                print(f"{title}: up to date", flush=True)
                continue
            command = _command(step, folder, overrides, inputs)
            if dry_run:
                print(f"{title}: {'would resume' if state == 'unfinished' else 'would run'}: {shlex.join(command)}")
                fresh = True
                continue
            print(f"{title}: {'resuming' if state == 'unfinished' else 'running'}", flush=True)
            if state != "unfinished":
                _clear(folder)
            _execute(step, folder, command, digest, lock)
            fresh = True
        if not dry_run:
            print(f"result: {out / pipeline.steps[-1].name}", flush=True)


def _hash(step: Step, overrides: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    config: dict[str, Any] = {}
    default = ROOT / "configs" / "stages" / f"{step.stage}.yaml"
    for file in ([default] if default.exists() else []) + [resolve(c) for c in step.configs]:
        _merge(config, _read_yaml(file))
    for key, value in {**overrides, **inputs}.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(config, value)
    return step_hash(step.stage, step.command, config)


def _merge(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def _state(folder: Path, digest: str) -> str:
    """ "done", "unfinished", "changed" (done or begun with another hash) or "new"."""
    try:
        status = json.loads((folder / "status.json").read_text("utf-8"))
    except (OSError, ValueError):
        return "new"
    if status.get("hash") != digest:
        return "changed"
    if status.get("state") != "done":
        return "unfinished"
    return "done" if status.get("artifact") == _artifact_id(folder) else "changed"


def _artifact_id(folder: Path) -> str | None:
    if not (folder / "artifact" / MANIFEST).exists():
        return None
    return manifest_id(read_manifest(folder / "artifact"))


def _command(step: Step, folder: Path, overrides: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    command = [*PROGRAM, step.stage, step.command]
    command += [f"--config={resolve(config)}" for config in step.configs]
    command += [f"--{key}={_text(value)}" for key, value in {**overrides, **inputs}.items()]
    command += [f"--out={folder}"]
    if (checkpoint := folder / "checkpoints" / "last.ckpt").exists() and step.command == "fit":
        command.append(f"--ckpt_path={checkpoint}")
    return command


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _clear(folder: Path) -> None:
    sweep(folder.parent)
    if folder.exists():
        if not (folder / "status.json").exists() and any(folder.iterdir()):
            raise UserError(f"{folder} holds files of something else: choose another --out folder")
        # Renamed first: killed here, the rest of a folder without its status would look like somebody else's.
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        with os_errors(folder, "remove"):
            os.rename(folder, old)
            shutil.rmtree(old)


def _execute(step: Step, folder: Path, command: Sequence[str], digest: str, lock: int) -> None:
    status: dict[str, Any] = {"state": "running", "hash": digest, "stage": step.stage, "command": step.command}
    _write_status(folder, status)
    log, begin = folder / "log.txt", time.monotonic()
    code = _stream(command, log, lock)
    status |= {"state": "done" if code == 0 else "failed", "exit_code": code}
    status |= {"seconds": round(time.monotonic() - begin, 1), "artifact": _artifact_id(folder)}
    _write_status(folder, status)
    if code != 0:
        reason = f"exit code {code}" if code > 0 else f"signal {-code}"
        raise UserError(f"step {step.name} failed ({reason}), its log is {log}; the same command continues it")


def _write_status(folder: Path, status: Mapping[str, Any]) -> None:
    with atomic_write(folder / "status.json") as file:
        file.write_text(json.dumps(status, indent=1) + "\n")


def _stream(command: Sequence[str], log: Path, lock: int) -> int:
    """Run ``command``, passing what it prints on as it comes and appending it to ``log``.

    The command holds ``lock`` as well: should we be killed, it may live on, and nobody else must write meanwhile.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    # Ours first: the current folder may hold another repository's `models`.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with os_errors(log), open(log, "ab") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=(lock,)
        )
        assert process.stdout is not None
        try:
            while chunk := os.read(process.stdout.fileno(), 65536):
                file.write(chunk)
                file.flush()
                sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


@contextmanager
def _lock(out: Path, dry_run: bool) -> Iterator[int]:
    if dry_run:
        yield -1
        return
    with os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "w")  # noqa: SIM115 - closed below, which releases the lock
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another galatea run is working in {out}") from error
        yield file.fileno()
