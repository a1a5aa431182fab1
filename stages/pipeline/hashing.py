"""The step hash: equal when running a step again would give the same result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.files import os_errors, resolve, sha256
from models.manifest import MANIFEST, manifest_id, read_manifest
from models.names import IMAGE_SUFFIXES
from models.version import VERSION

READ = IMAGE_SUFFIXES | {".json"}

# Where, how visibly and how fast a step runs; not what comes out.
_NOT_HASHED = frozenset(
    {
        *("out", "wandb", "compile", "threads", "shard", "config", "ckpt_path", "weights_only", "verbose"),
        *("cache", "cache_dir"),
        *("accelerator", "devices", "num_nodes", "strategy", "plugins", "num_workers", "workers", "draw_workers"),
        *("logger", "log_every_n_steps", "callbacks", "save_every", "enable_checkpointing", "default_root_dir"),
        *("enable_progress_bar", "enable_model_summary", "profiler", "detect_anomaly", "return_predictions"),
    }
)


def step_hash(stage: str, command: str, config: Mapping[str, Any]) -> str:
    """Hash of a step.

    Covers the stage, its command, the version of the code and the configuration, in which the path of an
    existing file or folder counts by its content and an artifact by its id; not devices, loggers or output.

    Raises:
        UserError: when an input cannot be read.
    """
    content = {"code": VERSION, "stage": stage, "command": command, "config": _content(config)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _content(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        content = {str(k): _content(v, str(k)) for k, v in value.items() if k not in _NOT_HASHED}
        return {k: v for k, v in content.items() if v != {}}  # a section that only held what does not count
    if isinstance(value, list | tuple):
        return [_content(item, key) for item in value]
    # A bare word is a path only where the key says so: a folder named like an option's value must not count.
    if isinstance(value, str) and (key == "path" or "/" in value or "." in value):
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
