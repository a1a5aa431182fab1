"""The step hash: equal when running a step again would give the same result."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.files import os_errors, resolve, sha256
from models.manifest import MANIFEST, manifest_id, read_manifest
from models.names import IMAGE_SUFFIXES
from models.version import VERSION

GIVEN = "GALATEA_STEP_HASH"  # in the environment of a pipeline's step: its hash, for which all inputs have been read
READ = IMAGE_SUFFIXES | {".json"}

# Where, how visibly and how fast a step runs; not what comes out. By section: elsewhere the same names do count.
_DATA = frozenset({"cache", "cache_dir", "num_workers", "workers", "draw_workers"})
_NOT_HASHED = {
    "": frozenset(
        {
            *("out", "wandb", "compile", "threads", "shard", "print_hash", "config"),
            *("ckpt_path", "weights_only", "verbose", "return_predictions"),
        }
    ),
    "trainer": frozenset(
        {
            *("accelerator", "devices", "num_nodes", "strategy", "plugins"),
            *("logger", "log_every_n_steps", "callbacks", "enable_checkpointing", "default_root_dir"),
            *("enable_progress_bar", "enable_model_summary", "profiler", "detect_anomaly"),
        }
    ),
    "model": frozenset({"save_every"}),
    "data": _DATA,
    "data.init_args": _DATA,
}
# Where a bare word is a path; elsewhere a folder that is named like an option's value must not count.
_PATH_KEY = re.compile(r"(?!class_path$)(.*_)?(path|file|folder|dir)s?")


def step_hash(stage: str, command: str, config: Mapping[str, Any]) -> str:
    """Hash of a step.

    Covers the stage, its command, the version of the code and ``config``, all options with their defaults, in which
    the path of an existing file or folder counts by its content and an artifact by its id; not devices, loggers or
    output.

    Raises:
        UserError: when an input cannot be read.
    """
    content = {"code": VERSION, "stage": stage, "command": command, "config": _content(config)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _content(value: Any, place: str = "") -> Any:
    """What counts of ``value``, which stands at ``place``: the dotted names of its keys."""
    if isinstance(value, Mapping):
        left_out = _NOT_HASHED.get(place, frozenset())
        content = {str(k): _content(v, f"{place}.{k}".lstrip(".")) for k, v in value.items() if k not in left_out}
        return {k: v for k, v in content.items() if v != {}}  # a section that only held what does not count
    if isinstance(value, list | tuple):
        return [_content(item, place) for item in value]
    is_path = _PATH_KEY.fullmatch(place.rpartition(".")[2]) is not None
    if isinstance(value, str) and (is_path or "/" in value or "." in value):
        path = resolve(value)
        with os_errors(path, "read"):
            if value and path.exists():
                return path_hash(path)
    return value


def path_hash(path: Path) -> str:
    """Hash of what a path holds: a file's bytes, an artifact's id, or the pictures and lists of a folder."""
    if path.is_file():
        return sha256(path)
    for folder in (path, path / "artifact"):
        if (folder / MANIFEST).exists():
            return manifest_id(read_manifest(folder))
    # What the readers of folders read; the rest of a folder, which may be a whole disk, tells nothing.
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in READ and p.is_file())
    content = [[p.relative_to(path).as_posix(), sha256(p)] for p in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
