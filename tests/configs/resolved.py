"""What a command line resolves to."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from stages import __main__, cli
from stages.pipeline.run import _tasks, read_pipeline
from stages.table import STAGES


def resolved(stage: str, command: str, *options: str) -> dict[str, Any]:
    """The whole configuration, as ``--print_config`` shows it."""
    text = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
        cli.run(stage, __main__.find(STAGES[stage][0], stage), [command, *options, "--print_config"])
    return yaml.safe_load(text.getvalue())


def steps(pipeline: Path) -> dict[str, list[str]]:
    """``STAGE COMMAND --OPTION...`` of each step, what is required being given."""
    found = read_pipeline(pipeline)
    settings: dict[str, dict[str, Any]] = {step.name: {} for step in found.steps}
    for param in found.params:
        for step, key in param.sets if param.required or param.default is not None else ():
            settings[step][key] = "given" if param.required else param.default
    tasks = _tasks(found, settings, Path("nowhere"), None)
    return {task.name: task.command[task.command.index("stages") + 1 :] for task in tasks}


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of nested mappings under its dotted key."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value
